/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compares the references that were counted with the counts on disk, and corrects these in place.
 * Each sector of a block has old or new counts after a crash, and every single new count is right
 * whatever the others are. */
#include "formats/qcow2/check.h"

int qcow2_read_roots(struct qcow2_check *c, struct dr_error *err)
{
    const struct qcow2_header *h = &c->q->h;
    uint64_t bytes = h->reftable_clusters * c->q->cluster;
    free(c->roots);
    c->n_roots = bytes / 8;
    c->roots = malloc(bytes ? bytes : 1);
    if (!c->roots)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    int r = bytes ? dr_file_pread_short(c->f, c->roots, h->reftable_at, bytes, NULL, err) : 0;
    for (uint64_t i = 0; r == 0 && i < c->n_roots; i++)
        c->roots[i] = get_be64(&c->roots[i]);
    return r;
}

enum qcow2_root qcow2_root_of(const struct qcow2_check *c, uint64_t block, uint64_t *at)
{
    *at = block < c->n_roots ? c->roots[block] & ~QCOW2_ROOT_RESERVED : 0;
    if (*at % c->q->cluster || c->q->h.reftable_bad)
        return QCOW2_ROOT_UNKNOWN;
    return *at == 0 || *at / c->q->cluster >= c->clusters ? QCOW2_ROOT_NONE : QCOW2_ROOT_BLOCK;
}

/* ------------------------------------------------------------------ one cluster */

/* References as far as a count can say them. */
static uint64_t references(struct qcow2_check *c, uint64_t cluster, unsigned *says)
{
    uint64_t n = qcow2_tally_get(&c->tally, cluster, says), max = qcow2_max_count(c->q);
    c->crowd += n > max ? n - max : 0;
    if (n > max)
        qcow2_found(c, n - max,
                    "ERROR: overflow cluster offset=0x%llx: %llu references, counts "
                    "go up to %llu",
                    ULL(cluster * c->q->cluster), ULL(n), ULL(max));
    return dr_min(n, max);
}

/* The count that the cluster should have on disk, as far as fix allows. */
static uint64_t judge(struct qcow2_check *c, uint64_t cluster, uint64_t stored, unsigned fix)
{
    unsigned says;
    uint64_t n = references(c, cluster, &says), offset = cluster * c->q->cluster;
    if (cluster == c->clusters && n == 0)
        return stored; /* behind the end of the file */
    if (n || stored)
        c->highest = dr_max(c->highest, cluster);
    c->copied_wrong |= says & (stored == 1 ? QCOW2_SAYS_SHARED : QCOW2_SAYS_COPIED);
    if (n == stored)
        return stored;
    qcow2_say(c, "%s cluster %llu refcount=%llu reference=%llu (at byte %llu)",
              stored < n ? "ERROR" : "Leaked", ULL(cluster), ULL(stored), ULL(n), ULL(offset));
    if (stored < n) {
        if (c->low++ == 0)
            c->low_at = offset;
        c->result->corruptions++;
        return fix & QCOW2_RAISE ? n : stored;
    }
    c->high++;
    c->result->leaks++;
    return fix & QCOW2_LOWER ? n : stored;
}

/* ------------------------------------------------------------------ ranges of clusters */

/* Clusters without a count: none of them should be in use. */
static void compare_uncounted(struct qcow2_check *c, uint64_t first, uint64_t last, bool unknown)
{
    uint64_t i = qcow2_tally_next(&c->tally, first), low = c->low;
    for (; i < last; i = qcow2_tally_next(&c->tally, i + 1))
        if (!unknown)
            judge(c, i, 0, 0);
        else if (qcow2_tally_get(&c->tally, i, NULL))
            c->highest = dr_max(c->highest, i);
    c->no_block |= c->low > low;
}

static void compare_counts(struct qcow2_check *c, uint8_t *counts, uint64_t at, uint64_t first,
                           uint64_t n, unsigned fix, uint64_t *changed_from, uint64_t *changed_to)
{
    unsigned order = c->q->h.refcount_order;
    *changed_from = *changed_to = 0;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t stored = qcow2_count_get(order, counts, i);
        uint64_t right = judge(c, first + i, stored, fix);
        if (right == stored)
            continue;
        qcow2_count_put(order, counts, i, right);
        uint64_t byte = (i << order) / 8;
        qcow2_plan(c, at + byte, "the count of the cluster at byte %llu becomes %llu, was %llu",
                   ULL((first + i) * c->q->cluster), ULL(right), ULL(stored));
        if (*changed_to == 0)
            *changed_from = byte;
        *changed_to = byte + dr_max(1, (UINT64_C(1) << order) / 8);
    }
}

/* Counts of piece->n clusters from piece->first on: part of a block, or there is none. */
static int use_counts(struct qcow2_check *c, const struct qcow2_piece *piece, uint8_t *bytes,
                      void *user, struct dr_error *err)
{
    unsigned fix = *(const unsigned *)user;
    uint64_t from, to;
    if (piece->len == 0) {
        compare_uncounted(c, piece->first, piece->first + piece->n, piece->unknown);
        return 0;
    }
    bool unused = qcow2_tally_next(&c->tally, piece->first) >= piece->first + piece->n;
    if (unused && (!bytes || dr_is_zero(bytes, piece->len)))
        return 0;
    if (!bytes)
        bytes = memset(c->buf, 0, piece->len);
    compare_counts(c, bytes, piece->at, piece->first, piece->n, fix, &from, &to);
    return to ? dr_file_pwrite(c->f, bytes + from, piece->at + from, to - from, err) : 0;
}

static int compare_block(struct qcow2_check *c, uint64_t at, uint64_t first, uint64_t last,
                         struct dr_error *err)
{
    unsigned order = c->q->h.refcount_order;
    uint64_t step = QCOW2_CHECK_STEP * 8 >> order, start = first % qcow2_block_entries(c->q);
    int r = 0;
    for (uint64_t i = first, n; r == 0 && i < last; i += n) {
        n = dr_min(step, last - i);
        struct qcow2_piece piece = {.first = i, .n = n};
        piece.at = at + ((start + i - first) << order) / 8;
        piece.len = (size_t)(((n << order) + 7) / 8);
        piece.used = qcow2_tally_next(&c->tally, i) < i + n;
        r = qcow2_ahead_add(c, &piece, err);
    }
    return r;
}

/* Clusters without a block wait their turn, too, so that findings stand in the order of the file.
 */
static int compare_blocks(struct qcow2_check *c, struct dr_error *err)
{
    uint64_t per = qcow2_block_entries(c->q), end = dr_min(c->tally.end, c->clusters + 1), at;
    int r = 0;
    for (uint64_t i = c->tally.begin, next; r == 0 && i < end; i = next) {
        enum qcow2_root root = qcow2_root_of(c, i / per, &at);
        next = dr_min((i / per + 1) * per, end);
        if (root == QCOW2_ROOT_BLOCK) {
            r = compare_block(c, at, i, next, err);
            continue;
        }
        if (i / per >= c->n_roots)
            next = end;
        struct qcow2_piece piece = {.first = i, .n = next - i};
        piece.unknown = root == QCOW2_ROOT_UNKNOWN;
        r = qcow2_ahead_add(c, &piece, err);
    }
    return r;
}

int qcow2_compare(struct qcow2_check *c, unsigned fix, struct dr_error *err)
{
    c->writes = fix;
    qcow2_ahead_start(c, use_counts, &fix);
    int r = qcow2_ahead_finish(c, compare_blocks(c, err), err);
    c->writes = false;
    return r;
}

int qcow2_count_all(struct qcow2_check *c, unsigned fix, struct dr_error *err)
{
    int r;
    c->tally.end = 0;
    do {
        qcow2_tally_begin(&c->tally, c->tally.end, qcow2_check_limits.tally);
        r = qcow2_walk(c, err);
        if (r == 0)
            r = qcow2_compare(c, fix, err);
    } while (r == 0 && c->tally.more);
    return r;
}
