/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New counts in place of damaged ones: a new refcount table and its blocks are written behind the
 * end of the file, made durable, and then become the image's by one write to the header. The old
 * ones are not counted in them, so their clusters are free.
 *
 *   ... end of the file | blocks | blocks for what is new | table
 *
 * Blocks are written as the windows of clusters are counted. The one in which the file ends, and
 * those behind it, come last: they count the new clusters, too. */
#include "formats/qcow2/check.h"

#include "base/cleanup.h"

struct rebuilding {
    struct qcow2_check *c;
    uint64_t first;  /* cluster: the new structure begins here */
    uint64_t next;   /* cluster: where the next part of it goes */
    uint64_t done;   /* blocks that are counted */
    uint64_t *roots; /* big-endian */
    uint64_t room;   /* entries of it */
    uint8_t *block;  /* being filled */
};

/* The most that can be needed. Nothing leads behind the end of the file. */
static int plan(struct rebuilding *b, struct dr_error *err)
{
    const struct qcow2_check *c = b->c;
    const struct qcow2 *q = c->q;
    uint64_t per = qcow2_block_entries(q), before, clusters = 1;
    b->first = b->next = c->f->block_device ? c->highest + 1 : c->clusters;
    b->room = 0;
    do {
        before = b->room;
        b->room = dr_div_up(b->first + b->room + clusters, per);
        clusters = dr_div_up(b->room * 8, q->cluster);
    } while (b->room != before);
    if (clusters * q->cluster > QCOW2_MAX_REFTABLE)
        return dr_fail(err, EFBIG, "%s: the refcount table cannot grow beyond %llu bytes",
                       c->image->path, ULL(QCOW2_MAX_REFTABLE));
    b->roots = calloc(clusters, q->cluster);
    b->block = malloc(q->cluster);
    return b->roots && b->block ? 0 : dr_fail_errno(err, ENOMEM, "%s", c->image->path);
}

/* ------------------------------------------------------------------ blocks */

/* Where it is not known what a damaged entry should lead to, what was counted stays counted. */
static int keep_counts(struct rebuilding *b, uint64_t block, struct dr_error *err)
{
    struct qcow2_check *c = b->c;
    uint64_t at, per = qcow2_block_entries(c->q);
    unsigned order = c->q->h.refcount_order;
    enum qcow2_root root = qcow2_root_of(c, block, &at);
    if (root == QCOW2_ROOT_NONE)
        return 0;
    CLEANUP_FREE uint8_t *old = calloc(1, c->q->cluster);
    if (!old)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    int r = root == QCOW2_ROOT_BLOCK ? dr_file_pread_short(c->f, old, at, c->q->cluster, NULL, err)
                                     : 0;
    for (uint64_t i = 0; r == 0 && i < per && block * per + i < b->first; i++) {
        uint64_t stored = root == QCOW2_ROOT_BLOCK ? qcow2_count_get(order, old, i) : 1;
        if (stored > qcow2_count_get(order, b->block, i))
            qcow2_count_put(order, b->block, i, stored);
    }
    return r;
}

static int fill_block(struct rebuilding *b, uint64_t block, struct dr_error *err)
{
    struct qcow2_check *c = b->c;
    uint64_t per = qcow2_block_entries(c->q), first = block * per, max = qcow2_max_count(c->q);
    uint64_t last = dr_min(first + per, b->first);
    memset(b->block, 0, c->q->cluster);
    for (uint64_t i = qcow2_tally_next(&c->tally, first); i < last;
         i = qcow2_tally_next(&c->tally, i + 1))
        qcow2_count_put(c->q->h.refcount_order, b->block, i - first,
                        dr_min(max, qcow2_tally_get(&c->tally, i, NULL)));
    return c->lost ? keep_counts(b, block, err) : 0;
}

static int write_clusters(struct rebuilding *b, const void *bytes, uint64_t n, uint64_t *at,
                          struct dr_error *err)
{
    const struct qcow2_check *c = b->c;
    uint64_t cluster = c->q->cluster;
    *at = b->next * cluster;
    b->next += n;
    if (c->f->block_device && b->next * cluster > dr_file_size(c->f))
        return dr_fail(err, ENOSPC, "%s: the device is full: no room for new reference counts",
                       c->image->path);
    return dr_file_pwrite(c->f, bytes, *at, n * cluster, err);
}

static int write_block(struct rebuilding *b, uint64_t block, struct dr_error *err)
{
    uint64_t at;
    int r = write_clusters(b, b->block, 1, &at, err);
    put_be64(&b->roots[block], at);
    return r;
}

/* The blocks that the window holds, but for the one in which the file ends. */
static int write_window(struct rebuilding *b, struct dr_error *err)
{
    const struct qcow2_check *c = b->c;
    uint64_t per = qcow2_block_entries(c->q), whole = b->first / per;
    uint64_t end = dr_min(c->tally.end / per, whole);
    int r = 0;
    for (; r == 0 && b->done < end; b->done++) {
        if (!c->lost)
            b->done = dr_max(b->done, qcow2_tally_next(&c->tally, b->done * per) / per);
        if (b->done >= end)
            break;
        r = fill_block(b, b->done, err);
        if (r == 0 && !dr_is_zero(b->block, c->q->cluster))
            r = write_block(b, b->done, err);
    }
    b->done = dr_max(b->done, end);
    return r;
}

/* A window in which not one block lies completely is counted again with more memory. */
static int write_old_counts(struct rebuilding *b, struct dr_error *err)
{
    struct qcow2_check *c = b->c;
    uint64_t per = qcow2_block_entries(c->q), whole = b->first / per,
             limit = qcow2_check_limits.tally;
    int r;
    for (;;) {
        uint64_t done = b->done;
        qcow2_tally_begin(&c->tally, done * per, limit);
        r = qcow2_walk(c, err);
        if (r == 0)
            r = write_window(b, err);
        if (r < 0 || (b->done == whole && c->tally.end >= b->first))
            return r;
        if (b->done == done)
            limit *= 2;
    }
}

/* ------------------------------------------------------------------ what counts itself */

static int write_own_counts(struct rebuilding *b, uint64_t *table, uint64_t *clusters,
                            struct dr_error *err)
{
    struct qcow2_check *c = b->c;
    uint64_t per = qcow2_block_entries(c->q), first = b->first / per, blocks = 1, end, before;
    unsigned order = c->q->h.refcount_order;
    int r = 0;
    do {
        before = blocks;
        *clusters = dr_div_up((first + blocks) * 8, c->q->cluster);
        end = b->next + blocks + *clusters;
        blocks = (end - 1) / per + 1 - first;
    } while (blocks != before);
    for (uint64_t i = first; r == 0 && i < first + blocks; i++) {
        r = fill_block(b, i, err);
        for (uint64_t j = dr_max(b->first, i * per); j < dr_min(end, (i + 1) * per); j++)
            qcow2_count_put(order, b->block, j - i * per, 1);
        if (r == 0)
            r = write_block(b, i, err);
    }
    return r < 0 ? r : write_clusters(b, b->roots, *clusters, table, err);
}

static int write_structure(struct rebuilding *b, uint64_t *table, uint64_t *clusters,
                           struct dr_error *err)
{
    int r = plan(b, err);
    if (r == 0)
        r = write_old_counts(b, err);
    if (r == 0)
        r = write_own_counts(b, table, clusters, err);
    return r < 0 ? r : dr_file_flush(b->c->f, err);
}

int qcow2_rebuild(struct qcow2_check *c, struct dr_error *err)
{
    struct rebuilding b = {.c = c};
    uint64_t table = 0, clusters = 0, size = dr_file_size(c->f);
    uint8_t field[12];
    c->no_roots = true;
    int r = write_structure(&b, &table, &clusters, err);
    c->no_roots = false;
    free(b.roots);
    free(b.block);
    if (r < 0) {
        if (!c->f->block_device && dr_file_size(c->f) > size)
            dr_file_truncate(c->f, size, NULL); /* nothing leads there */
        return r;
    }
    put_be64(field, table);
    put_be32(field + 8, (uint32_t)clusters);
    qcow2_plan(c, b.first * c->q->cluster,
               "all counts are written anew from here on: %llu clusters", ULL(b.next - b.first));
    qcow2_plan(c, QCOW2_AT_REFTABLE, "the header has the refcount table at byte %llu, not %llu",
               ULL(table), ULL(c->q->h.reftable_at));
    r = qcow2_switch(c->image, QCOW2_AT_REFTABLE, field, sizeof(field), err);
    if (r == 0) {
        c->q->h.reftable_at = table;
        c->q->h.reftable_clusters = (uint32_t)clusters;
        c->q->h.reftable_bad = false;
    }
    return r;
}
