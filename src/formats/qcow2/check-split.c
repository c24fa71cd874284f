/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Gives entries clusters of their own where more of them lead to a cluster than its count can say:
 * with counts of 1 bit that is a second one. Nothing else would keep them apart: a write through
 * one of them changes what the other shows, or frees it. Each reads the same afterwards.
 *
 * The copy and its count are durable before the entry leads there. An entry in a table that several
 * ways lead to is left alone; so are tables that are used too often. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

struct splitting {
    uint64_t left; /* copies that may be made: a damaged image must not grow without bound */
    bool full;     /* the file cannot grow */
};

/* Does one of the clusters have more references than a count can say? */
static bool is_crowded(struct qcow2_check *c, const struct qcow2_reference *ref)
{
    uint64_t cluster = c->q->cluster, max = qcow2_max_count(c->q);
    for (uint64_t i = ref->at / cluster; i * cluster < ref->at + ref->len; i++)
        if (qcow2_tally_get(&c->tally, i, NULL) > max)
            return true;
    return false;
}

static void leave(struct qcow2_check *c, const struct qcow2_reference *ref)
{
    uint64_t cluster = c->q->cluster;
    for (uint64_t i = ref->at / cluster; i * cluster < ref->at + ref->len; i++)
        qcow2_tally_remove(&c->tally, i);
}

/* Take clusters and copy into them what the entry leads to. */
static int copy(struct qcow2_check *c, const struct qcow2_reference *ref, uint64_t *host,
                struct dr_error *err)
{
    uint64_t cluster = c->q->cluster;
    /* Compressed bytes are told in sectors: they may begin inside of one, but not any more. */
    uint64_t n = dr_div_up(ref->len + ref->at % 512, cluster);
    CLEANUP_FREE uint8_t *bytes = calloc(n, cluster);
    if (!bytes)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    int r = dr_file_pread_short(c->f, bytes, ref->at, ref->len, NULL, err);
    if (r == 0)
        r = qcow2_take(c->image, n, host, err);
    if (r < 0)
        return r;
    r = dr_file_pwrite(c->f, bytes, *host, n * cluster, err);
    if (r < 0 && qcow2_lose(c->image, *host, n * cluster, NULL) == 0)
        dr_image_flush_all(c->image, NULL);
    return r;
}

static uint64_t moved_entry(const struct qcow2 *q, uint64_t v, bool active, uint64_t host)
{
    if (v & QCOW2_CODED)
        return (v & ~((UINT64_C(1) << (62 - (q->h.cluster_bits - 8))) - 1)) | host;
    return (v & ~(QCOW2_OFFSET | QCOW2_COPIED)) | host | (active ? QCOW2_COPIED : 0);
}

static bool has_no_space(int r)
{
    return r == -ENOSPC || r == -EDQUOT || r == -EFBIG;
}

/* Nothing but the one entry that leads to this table may be there: writing changes it, too. */
static bool stands_alone(struct qcow2_check *c, const struct qcow2_table *table)
{
    uint64_t cluster = table->at / c->q->cluster;
    return table->times == 1 && table->at % c->q->cluster == 0 && cluster >= c->tally.begin &&
           cluster < c->tally.end && qcow2_tally_get(&c->tally, cluster, NULL) == 1;
}

static int split_table(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                       uint8_t *bytes, size_t len, void *user, struct dr_error *err)
{
    struct splitting *s = user;
    size_t from = len, to = 0;
    int r = 0;
    if (!stands_alone(c, table))
        return 0;
    for (size_t i = 0; r == 0 && s->left && !s->full && i < len; i += c->q->entry) {
        struct qcow2_fault faults[2];
        struct qcow2_reference ref;
        uint64_t host = 0, v = get_be64(bytes + i);
        if (qcow2_entry_faults(c->q, bytes + i, QCOW2_NO_PLACE, faults, &ref) ||
            ref.use == QCOW2_USE_NOTHING || !is_crowded(c, &ref))
            continue;
        if (has_no_space(r = copy(c, &ref, &host, err))) {
            dr_error_reset(err);
            s->full = true;
            r = 0;
            break;
        }
        if (r < 0)
            return r;
        qcow2_plan(c, host, "what stands at byte %llu is written anew here, for one of its users",
                   ULL(ref.at));
        qcow2_plan(c, at + i, "the L2 entry leads to byte %llu, not %llu", ULL(host), ULL(ref.at));
        leave(c, &ref);
        put_be64(bytes + i, moved_entry(c->q, v, table->active, host));
        s->left--;
        from = dr_min(from, i);
        to = i + 8;
    }
    if (to)
        r = dr_image_flush_all(c->image, err);
    return r < 0 || !to ? r : dr_file_pwrite(c->f, bytes + from, at + from, to - from, err);
}

int qcow2_split_crowded(struct qcow2_check *c, struct dr_error *err)
{
    struct splitting s = {.left = c->clusters};
    int r = qcow2_load_reftable(c->image, err);
    c->tally.end = 0;
    do {
        qcow2_tally_begin(&c->tally, c->tally.end, qcow2_check_limits.tally);
        if (r == 0)
            r = qcow2_walk(c, err);
        c->writes = true;
        if (r == 0)
            r = qcow2_each_table(c, NULL, split_table, &s, err);
        c->writes = false;
    } while (r == 0 && c->tally.more);
    return r;
}
