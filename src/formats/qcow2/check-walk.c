/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Walks all tables once and counts every reference to a cluster in the tally's window. The first
 * window's pass reports damaged entries. They count as references where they do for QEMU. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/check.h"

#include <stdio.h>

#include "base/cleanup.h"

/* Does [at, at + len) end inside the file, or in the cluster in which it ends? from: the place of
 * what refers to it; 0 = the header. */
static bool inside_file(struct qcow2_check *c, uint64_t at, uint64_t len, uint64_t times,
                        uint64_t from)
{
    uint64_t end;
    char by[40] = "by the header";
    if (!dr_add_overflow(at, len, &end) && end < dr_file_size(c->f) + c->q->cluster)
        return true;
    if (!qcow2_first_window(c))
        return false;
    if (from)
        snprintf(by, sizeof(by), "at byte %llu", ULL(from));
    c->dangling += times;
    qcow2_found_lost(c, times,
                     "ERROR: counting reference for region exceeding the end of the file by one "
                     "cluster or more: offset 0x%llx size 0x%llx (referred to %s)",
                     ULL(at), ULL(len), by);
    return false;
}

/* [at, at + len) is referred to. says: of its first cluster; QCOW2_IS_TABLE: of each. */
static int refer(struct qcow2_check *c, uint64_t at, uint64_t len, uint64_t times, unsigned says,
                 uint64_t from, struct dr_error *err)
{
    if (len == 0)
        return 0;
    if (!inside_file(c, at, len, times, from)) {
        c->copied_wrong |= says & QCOW2_SAYS_COPIED; /* its count is 0 */
        return 0;
    }
    for (uint64_t i = at / c->q->cluster; i * c->q->cluster < at + len; i++) {
        int r = qcow2_tally_add(&c->tally, i, times, says);
        if (r < 0)
            return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
        if (r > 0)
            qcow2_note_overlap(c, i);
        says &= QCOW2_IS_TABLE;
    }
    return 0;
}

static int refer_part(struct qcow2_check *c, const struct qcow2_sweep *part, void *user,
                      struct dr_error *err)
{
    (void)user;
    return refer(c, part->at, part->len, part->times, QCOW2_IS_TABLE, 0, err);
}

/* The same for tables, of which a damaged image may have thousands in one place. */
static int refer_ranges(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                        uint64_t from, struct dr_error *err)
{
    CLEANUP_FREE struct qcow2_range *whole = malloc((n ? n : 1) * sizeof(*whole));
    size_t kept = 0;
    if (!whole)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    for (size_t i = 0; i < n; i++)
        if (ranges[i].len && inside_file(c, ranges[i].at, ranges[i].len, 1, from)) {
            uint64_t end = ranges[i].at + ranges[i].len, at = ranges[i].at;
            end = dr_min(dr_round_up(end, c->q->cluster), dr_file_size(c->f) + c->q->cluster - 1);
            whole[kept++] = (struct qcow2_range){at, end - at, false};
        }
    return qcow2_each_part(c, whole, kept, refer_part, NULL, err);
}

/* ------------------------------------------------------------------ L1, L2 */

static int walk_l1_entry(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                         uint64_t v, struct dr_error *err)
{
    uint64_t table = v & QCOW2_OFFSET;
    unsigned says = !part->active ? 0 : v & QCOW2_COPIED ? QCOW2_SAYS_COPIED : QCOW2_SAYS_SHARED;
    if (qcow2_first_window(c) && (v & QCOW2_L1_RESERVED))
        qcow2_found_lost(
            c, part->times,
            "ERROR found L1 entry with reserved bits set: %llx (L1 entry at byte %llu)", ULL(v),
            ULL(at));
    if (qcow2_first_window(c) && !table)
        qcow2_found_lost(c, part->times, "ERROR L1 entry without a table: %llx (at byte %llu)",
                         ULL(v), ULL(at));
    if (qcow2_first_window(c) && table % c->q->cluster)
        qcow2_found_lost(c, part->times,
                         "ERROR l2_offset=%llx: Table is not cluster aligned; L1 entry corrupted "
                         "(L1 entry at byte %llu)",
                         ULL(table), ULL(at));
    says |= QCOW2_IS_TABLE;
    return table ? refer(c, table, c->q->cluster, part->times, says, at, err) : 0;
}

static int walk_l1(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                   uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    int r = 0;
    (void)user;
    for (size_t i = 0; r == 0 && i < len; i += 8)
        if (get_be64(bytes + i))
            r = walk_l1_entry(c, part, at + i, get_be64(bytes + i), err);
    return r;
}

/* Of the active tables, for the numbers that check prints. */
struct fragments {
    uint64_t table, next; /* where the cluster behind the last one would be; 0 = nowhere */
};

static void count_fragments(struct qcow2_check *c, struct fragments *f,
                            const struct qcow2_table *table, const struct qcow2_reference *ref)
{
    struct dr_check_result *res = c->result;
    if (!table->active || !qcow2_first_window(c) || ref->len == 0)
        return;
    res->allocated_clusters += table->active;
    if (ref->use == QCOW2_USE_CODED) {
        res->compressed_clusters += table->active;
        res->fragmented_clusters += table->active;
        return;
    }
    if (f->table == table->at && f->next && f->next != ref->at)
        res->fragmented_clusters += table->active;
    *f = (struct fragments){table->at, ref->at + c->q->cluster};
}

/* Where the cluster of an entry has to be in a data file. */
static uint64_t own_place(const struct qcow2 *q, const struct qcow2_table *table, uint64_t at)
{
    if (!qcow2_has_data_file(q) || table->times != 1)
        return QCOW2_NO_PLACE;
    return (table->index * q->l2_entries + (at - table->at) / q->entry) * q->cluster;
}

static void report_faults(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                          const struct qcow2_fault *faults, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        c->entries |= faults[i].mendable;
        if (faults[i].mendable)
            qcow2_found(c, table->times, "%s (L2 entry at byte %llu)", faults[i].text, ULL(at));
        else
            qcow2_found_lost(c, table->times, "%s (L2 entry at byte %llu)", faults[i].text,
                             ULL(at));
    }
}

static int walk_entry(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                      const uint8_t *raw, struct fragments *fragments, struct dr_error *err)
{
    const struct qcow2 *q = c->q;
    struct qcow2_fault faults[2];
    struct qcow2_reference ref;
    unsigned n = qcow2_entry_faults(q, raw, own_place(q, table, at), faults, &ref), says = 0;
    if (n && qcow2_first_window(c))
        report_faults(c, table, at, faults, n);
    if (ref.use == QCOW2_USE_NOTHING)
        return 0;
    count_fragments(c, fragments, table, &ref);
    if (ref.use == QCOW2_USE_CLUSTER && table->active)
        says = ref.copied ? QCOW2_SAYS_COPIED : QCOW2_SAYS_SHARED;
    if (qcow2_has_data_file(q)) {
        c->copied_wrong |= says == QCOW2_SAYS_SHARED;
        return 0;
    }
    return refer(c, ref.at, ref.len, table->times, says, at, err);
}

static int walk_table(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                      uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    size_t entry = c->q->entry;
    int r = 0;
    for (size_t i = 0; r == 0 && i < len; i += entry)
        if (get_be64(bytes + i) || (entry == 16 && get_be64(bytes + i + 8)))
            r = walk_entry(c, table, at + i, bytes + i, user, err);
    return r;
}

/* ------------------------------------------------------------------ bitmaps */

static bool is_bad_bitmap_entry(const struct qcow2_check *c, uint64_t v)
{
    uint64_t cluster = v & QCOW2_OFFSET;
    return (v & ~(QCOW2_OFFSET | QCOW2_BITMAP_ALL)) || (cluster && (v & QCOW2_BITMAP_ALL)) ||
           cluster % c->q->cluster;
}

static int walk_bitmap(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                       uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    int r = 0;
    (void)user;
    for (size_t i = 0; r == 0 && i < len; i += 8) {
        uint64_t v = get_be64(bytes + i), cluster = v & QCOW2_OFFSET;
        bool bad = is_bad_bitmap_entry(c, v);
        c->entries |= bad;
        if (bad && qcow2_first_window(c))
            qcow2_found(c, part->times, "ERROR bitmap table entry 0x%llx at byte %llu", ULL(v),
                        ULL(at + i));
        if (!bad && cluster)
            r = refer(c, cluster, c->q->cluster, part->times, QCOW2_IS_TABLE, at + i, err);
    }
    return r;
}

static int walk_bitmaps(struct qcow2_check *c, struct dr_error *err)
{
    int r = refer(c, c->q->bitmaps_at, c->q->bitmaps_len, 1, QCOW2_IS_TABLE, 0, err);
    if (r == 0)
        r = refer_ranges(c, c->bitmaps, c->n_bitmaps, c->q->bitmaps_at, err);
    return r < 0 ? r : qcow2_sweep(c, c->bitmaps, c->n_bitmaps, walk_bitmap, NULL, err);
}

/* ------------------------------------------------------------------ the refcount structure */

/* Is there anything that can be read? */
static bool judge_root(struct qcow2_check *c, uint64_t i)
{
    uint64_t v = c->roots[i], at = v & ~QCOW2_ROOT_RESERVED, entry = c->q->h.reftable_at + 8 * i;
    bool reserved = v & QCOW2_ROOT_RESERVED, odd = at % c->q->cluster;
    bool outside = at / c->q->cluster >= c->clusters;
    c->rebuild |= reserved || odd || outside;
    if (!qcow2_first_window(c))
        return !reserved && !odd && !outside;
    if (reserved)
        qcow2_found(c, 1, "ERROR refcount table entry %llu has reserved bits set (at byte %llu)",
                    ULL(i), ULL(entry));
    else if (odd)
        qcow2_found(c, 1,
                    "ERROR refcount block %llu is not cluster aligned; refcount table entry "
                    "corrupted (at byte %llu)",
                    ULL(i), ULL(entry));
    else if (outside)
        qcow2_found(
            c, 1, "ERROR refcount block %llu is outside image (refcount table entry at byte %llu)",
            ULL(i), ULL(entry));
    return !reserved && !odd && !outside;
}

static int walk_block(struct qcow2_check *c, uint64_t i, struct dr_error *err)
{
    uint64_t at = c->roots[i] & ~QCOW2_ROOT_RESERVED, cluster = at / c->q->cluster;
    if (!judge_root(c, i))
        return 0;
    int r = refer(c, at, c->q->cluster, 1, QCOW2_IS_TABLE, c->q->h.reftable_at + 8 * i, err);
    if (r < 0 || cluster < c->tally.begin || cluster >= c->tally.end)
        return r;
    uint64_t count = qcow2_tally_get(&c->tally, cluster, NULL);
    c->rebuild |= count != 1;
    if (dr_min(count, qcow2_max_count(c->q)) != 1) /* else its count cannot say more */
        qcow2_found(c, 1, "ERROR refcount block %llu refcount=%llu (at byte %llu)", ULL(i),
                    ULL(count), ULL(at));
    return 0;
}

/* Where it is behind the end of the file, another one can be made. */
static int walk_roots(struct qcow2_check *c, struct dr_error *err)
{
    const struct qcow2 *q = c->q;
    uint64_t dangling = c->dangling;
    bool lost = c->lost;
    int r =
        refer(c, q->h.reftable_at, q->h.reftable_clusters * q->cluster, 1, QCOW2_IS_TABLE, 0, err);
    c->rebuild |= c->dangling > dangling;
    c->lost = lost;
    c->dangling = dangling;
    return r;
}

static int walk_blocks(struct qcow2_check *c, struct dr_error *err)
{
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < c->n_roots; i++)
        if (c->roots[i])
            r = walk_block(c, i, err);
    return r;
}

/* ------------------------------------------------------------------ everything */

static int walk_l1_tables(struct qcow2_check *c, struct dr_error *err)
{
    struct fragments fragments = {0};
    int r = refer_ranges(c, c->l1s, 1, 0, err);
    if (r == 0)
        r = refer_ranges(c, c->l1s + 1, c->n_l1s - 1, c->q->h.snapshots_at, err);
    return r < 0 ? r : qcow2_each_table(c, walk_l1, walk_table, &fragments, err);
}

int qcow2_walk(struct qcow2_check *c, struct dr_error *err)
{
    const struct qcow2 *q = c->q;
    int r = refer(c, 0, q->cluster, 1, QCOW2_IS_TABLE, 0, err);
    if (r == 0)
        r = walk_l1_tables(c, err);
    if (r == 0)
        r = refer(c, q->h.snapshots_at, c->snapshots_len, 1, QCOW2_IS_TABLE, 0, err);
    if (r == 0 && !c->no_roots)
        r = walk_roots(c, err);
    if (r == 0)
        r = refer(c, q->crypto_at, q->crypto_len, 1, QCOW2_IS_TABLE, 0, err);
    if (r == 0)
        r = walk_bitmaps(c, err);
    if (r == 0 && !c->no_roots)
        r = walk_blocks(c, err);
    if (r == 0 && qcow2_tally_sort(&c->tally) < 0)
        r = dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    return r;
}

/* ------------------------------------------------------------------ entries that can be mended */

/* Nothing but what leads to this table may be there: writing changes it, too. */
static bool may_mend(struct qcow2_check *c, uint64_t table, uint64_t times)
{
    uint64_t cluster = table / c->q->cluster;
    return cluster >= c->tally.begin && cluster < c->tally.end && table % c->q->cluster % 8 == 0 &&
           qcow2_tally_get(&c->tally, cluster, NULL) == times;
}

/* What a bitmap says of these bytes is lost: they count as written, so that nothing is missed. */
static int mend_bitmap(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                       uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    uint8_t all[8];
    int r = 0;
    (void)user;
    put_be64(all, QCOW2_BITMAP_ALL);
    for (size_t i = 0; r == 0 && i < len; i += 8)
        if (is_bad_bitmap_entry(c, get_be64(bytes + i)) && may_mend(c, at + i, part->times)) {
            qcow2_plan(c, at + i, "the bitmap table's entry says that all was written, was 0x%llx",
                       ULL(get_be64(bytes + i)));
            r = dr_file_pwrite(c->f, all, at + i, sizeof(all), err);
        }
    return r;
}

static int mend_table(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                      uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    const struct qcow2 *q = c->q;
    uint64_t cluster = table->at / q->cluster;
    size_t from = len, to = 0;
    (void)user;
    /* Nothing but the entries that lead to the table may be there: writing changes it, too. */
    if (cluster < c->tally.begin || cluster >= c->tally.end || table->at % q->cluster ||
        qcow2_tally_get(&c->tally, cluster, NULL) != table->times)
        return 0;
    for (size_t i = 0; i < len; i += q->entry) {
        struct qcow2_fault faults[2];
        struct qcow2_reference ref;
        unsigned n = qcow2_entry_faults(q, bytes + i, own_place(q, table, at + i), faults, &ref);
        if (n != 1 || !faults[0].mendable)
            continue;
        qcow2_plan(c, at + i, "the L2 entry becomes 0x%llx, was 0x%llx (%s)", ULL(faults[0].value),
                   ULL(get_be64(bytes + i)), faults[0].text);
        put_be64(bytes + i, faults[0].value);
        if (q->entry == 16)
            put_be64(bytes + i + 8, faults[0].masks);
        from = dr_min(from, i);
        to = i + q->entry;
    }
    return to ? dr_file_pwrite(c->f, bytes + from, at + from, to - from, err) : 0;
}

int qcow2_mend_entries(struct qcow2_check *c, struct dr_error *err)
{
    int r;
    c->tally.end = 0;
    do {
        qcow2_tally_begin(&c->tally, c->tally.end, qcow2_check_limits.tally);
        r = qcow2_walk(c, err);
        c->writes = true;
        if (r == 0)
            r = qcow2_each_table(c, NULL, mend_table, NULL, err);
        if (r == 0)
            r = qcow2_sweep(c, c->bitmaps, c->n_bitmaps, mend_bitmap, NULL, err);
        c->writes = false;
    } while (r == 0 && c->tally.more);
    return r;
}
