/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The tables of an image as they are to be after a change of its snapshots, made beside those that
 * are in force.
 *
 * A snapshot changes the counts of nearly everything, and COPIED in the disk's tables says once
 * more which counts are 1. No order of writing the two in place keeps them in agreement at every
 * instant, and QEMU's check calls it corruption where they differ. So both are made anew: all
 * refcount blocks and the refcount table are copied, the L2 tables in which COPIED changes, and the
 * disk's L1 table. Until one write of the header (bytes 36 to 71, which lie next to each other)
 * switches to them, all that is in force stays as it was; a crash before it leaks the copies, a
 * crash after it what they replace.
 *
 * Clusters for the copies are allocated first, as any other, in the counts that are in force. From
 * qcow2_next_count() on the driver counts in the copies, and nothing may be allocated until the
 * switch. */
#include "formats/qcow2/snapshot.h"

#include "base/cleanup.h"

#define MAX_LOST 1024u /* ranges that wait for a flush, and keep pages in memory */

/* ------------------------------------------------------------------ allocating */

static int take(struct qcow2_next *next, uint64_t n, uint64_t *at, struct dr_error *err)
{
    int r = qcow2_take(next->image, n, at, err);
    if (r == 0)
        next->end = dr_max(next->end, *at + n * qcow2_of(next->image)->cluster);
    return r;
}

/* Clusters for copies of the L2 tables in which COPIED is going to change. */
static int take_tables(struct qcow2_next *next, bool share, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(next->image);
    struct qcow2_tree disk = {q->h.l1_at, q->h.l1_entries};
    next->l1_entries = disk.entries;
    next->copies = calloc(disk.entries + 1, sizeof(*next->copies));
    next->lost = calloc(disk.entries + 1, sizeof(*next->lost));
    if (!next->copies || !next->lost)
        return dr_fail_errno(err, ENOMEM, "%s", next->image->path);
    int r = qcow2_tree_mark(next->image, &disk, share, next->lost, err);
    for (uint64_t i = 0; r == 0 && i < disk.entries; i++)
        if (next->lost[i])
            r = take(next, 1, &next->copies[i], err);
    return r;
}

static int take_l1(struct qcow2_next *next, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(next->image);
    uint64_t n = dr_max(1, dr_div_up(next->l1_entries * 8, q->cluster));
    int r = take(next, n, &next->l1_at, err);
    if (r == 0)
        next->l1_len = n * q->cluster;
    return r;
}

int qcow2_next_begin(struct qcow2_next *next, struct dr_image *image, bool share,
                     struct dr_error *err)
{
    *next = (struct qcow2_next){.image = image};
    int r = take_tables(next, share, err);
    return r < 0 ? r : take_l1(next, err);
}

static int take_reftable(struct qcow2_next *next, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(next->image);
    uint64_t len = next->reftable_clusters * q->cluster;
    int r = len ? qcow2_lose(next->image, next->reftable_at, len, err) : 0;
    next->reftable_clusters = 0;
    uint32_t n = q->h.reftable_clusters;
    if (r == 0)
        r = take(next, n, &next->reftable_at, err);
    if (r == 0)
        next->reftable_clusters = n;
    return r;
}

static int room_for_blocks(struct qcow2_next *next, struct dr_error *err)
{
    uint64_t n = qcow2_of(next->image)->reftable_n;
    if (n <= next->n_blocks)
        return 0;
    uint64_t *larger = realloc(next->reftable, n * sizeof(*larger));
    if (!larger)
        return dr_fail_errno(err, ENOMEM, "%s", next->image->path);
    memset(larger + next->n_blocks, 0, (n - next->n_blocks) * sizeof(*larger));
    next->reftable = larger;
    next->n_blocks = n;
    return 0;
}

/* A cluster for each block there is. Allocating may need new blocks, and even a larger table. */
static int take_counts(struct qcow2_next *next, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(next->image);
    bool all = false;
    int r = 0;
    while (r == 0 && !all) {
        all = next->reftable_clusters == q->h.reftable_clusters;
        r = all ? 0 : take_reftable(next, err);
        if (r == 0)
            r = room_for_blocks(next, err);
        for (uint64_t i = 0; r == 0 && i < next->n_blocks; i++) {
            if (!q->reftable[i] || next->reftable[i])
                continue;
            all = false;
            r = take(next, 1, &next->reftable[i], err);
        }
    }
    return r;
}

/* ------------------------------------------------------------------ copying */

static int copy_cluster(struct dr_image *image, uint64_t from, uint64_t to, uint8_t *buf,
                        struct dr_error *err)
{
    uint64_t len = qcow2_of(image)->cluster;
    int r = dr_file_pread(image->files[0], buf, from, len, err);
    return r < 0 ? r : qcow2_write_taken(image, buf, len, to, err);
}

static int copy_counts(struct qcow2_next *next, struct dr_error *err)
{
    struct dr_image *image = next->image;
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *buf = malloc(q->cluster);
    CLEANUP_FREE uint64_t *table = calloc(next->reftable_clusters, q->cluster);
    int r = buf && table ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t i = 0; r == 0 && i < next->n_blocks; i++) {
        if (!q->reftable[i])
            continue;
        put_be64(&table[i], next->reftable[i]);
        r = copy_cluster(image, q->reftable[i], next->reftable[i], buf, err);
    }
    uint64_t len = next->reftable_clusters * q->cluster;
    return r < 0 ? r : qcow2_write_taken(image, table, len, next->reftable_at, err);
}

static void swap_counts(struct qcow2_next *next)
{
    struct qcow2 *q = qcow2_of(next->image);
    DR_LOCK_SCOPE(&next->image->lock);
    uint64_t *other = q->reftable;
    q->reftable = next->reftable;
    next->reftable = other;
    next->counting = !next->counting;
}

/* What is allocated lies inside the file before it is counted: of leaks behind the end QEMU's check
 * knows nothing, and `-r leaks` leaves them. */
static int cover(struct qcow2_next *next, struct dr_error *err)
{
    struct dr_file *f = next->image->files[0];
    return f->block_device || next->end <= dr_file_size(f) ? 0
                                                           : dr_file_truncate(f, next->end, err);
}

int qcow2_next_count(struct qcow2_next *next, struct dr_error *err)
{
    int r = take_counts(next, err);
    if (r == 0)
        r = cover(next, err);
    if (r == 0) /* what is copied, and that the copies are allocated */
        r = dr_image_flush_all(next->image, err);
    if (r == 0)
        r = copy_counts(next, err);
    if (r == 0)
        swap_counts(next);
    return r;
}

/* A table that other snapshots share, too, stays: all below it is shared as before. */
static int keep_shared(struct qcow2_next *next, struct dr_error *err)
{
    int r = 0;
    next->kept = true;
    for (uint64_t i = 0; r == 0 && i < next->l1_entries; i++) {
        uint64_t count;
        if (!next->copies[i])
            continue;
        r = qcow2_count_of(next->image, next->lost[i], &count, err);
        if (r == 0 && count > 1) {
            next->lost[i] = next->copies[i];
            next->copies[i] = 0;
        }
    }
    return r;
}

int qcow2_next_tables(struct qcow2_next *next, struct dr_error *err)
{
    struct dr_image *image = next->image;
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *buf = malloc(q->cluster), *l1 = calloc(1, next->l1_len);
    if (!buf || !l1)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = keep_shared(next, err);
    if (r == 0)
        r = dr_file_pread(image->files[0], l1, q->h.l1_at, next->l1_entries * 8, err);
    for (uint64_t i = 0; r == 0 && i < next->l1_entries; i++) {
        if (!next->copies[i])
            continue;
        put_be64(l1 + 8 * i, next->copies[i] | QCOW2_COPIED);
        r = copy_cluster(image, next->lost[i], next->copies[i], buf, err);
    }
    return r < 0 ? r : qcow2_write_taken(image, l1, next->l1_len, next->l1_at, err);
}

/* ------------------------------------------------------------------ the switch */

static void adopt(struct qcow2_next *next, uint32_t n_snapshots, uint64_t snapshots_at)
{
    struct qcow2 *q = qcow2_of(next->image);
    DR_LOCK_SCOPE(&next->image->lock); /* readers look there */
    next->lost_l1_at = q->h.l1_at;
    next->lost_reftable_at = q->h.reftable_at;
    q->h.l1_at = next->l1_at;
    q->h.reftable_at = next->reftable_at;
    q->h.n_snapshots = n_snapshots;
    q->h.snapshots_at = snapshots_at;
    for (uint64_t i = 0; i < q->reftable_n; i++)
        if (q->reftable[i])
            qcow2_guard(q, q->reftable[i]);
    for (uint64_t i = 0; i < next->l1_entries; i++)
        if (next->copies[i])
            qcow2_guard(q, next->copies[i]);
}

int qcow2_next_switch(struct qcow2_next *next, uint32_t n_snapshots, uint64_t snapshots_at,
                      struct dr_error *err)
{
    uint8_t field[36];
    put_be32(field, (uint32_t)next->l1_entries);
    put_be64(field + 4, next->l1_at);
    put_be64(field + 12, next->reftable_at);
    put_be32(field + 20, next->reftable_clusters);
    put_be32(field + 24, n_snapshots);
    put_be64(field + 28, snapshots_at);
    int r = qcow2_switch_tables(next->image, QCOW2_AT_L1, field, sizeof(field), err);
    if (r == 0)
        adopt(next, n_snapshots, snapshots_at);
    return r;
}

/* ------------------------------------------------------------------ what is over */

static int lose(struct qcow2_next *next, uint64_t at, uint64_t len, struct dr_error *err)
{
    int r = len ? qcow2_lose(next->image, at, len, err) : 0;
    if (r == 0 && ++next->n_lost % MAX_LOST == 0)
        r = dr_image_flush(next->image, err);
    return r;
}

int qcow2_next_end(struct qcow2_next *next, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(next->image)->cluster;
    int r = lose(next, next->lost_l1_at, next->l1_entries * 8, err);
    if (r == 0)
        r = lose(next, next->lost_reftable_at, next->reftable_clusters * cluster, err);
    for (uint64_t i = 0; r == 0 && i < next->n_blocks; i++)
        if (next->reftable[i])
            r = lose(next, next->reftable[i], cluster, err);
    for (uint64_t i = 0; r == 0 && i < next->l1_entries; i++)
        if (next->lost[i])
            r = lose(next, next->lost[i], cluster, err);
    return r;
}

void qcow2_next_undo(struct qcow2_next *next)
{
    if (!next->image)
        return;
    uint64_t cluster = qcow2_of(next->image)->cluster;
    if (next->counting)
        swap_counts(next);
    int r = lose(next, next->l1_at, next->l1_len, NULL);
    if (r == 0)
        r = lose(next, next->reftable_at, next->reftable_clusters * cluster, NULL);
    for (uint64_t i = 0; r == 0 && i < next->n_blocks; i++)
        if (next->reftable[i])
            r = lose(next, next->reftable[i], cluster, NULL);
    for (uint64_t i = 0; r == 0 && next->copies && i < next->l1_entries; i++) {
        /* One that is not to be used stands among the lost ones; a marked one is not allocated. */
        uint64_t at = next->copies[i] ? next->copies[i] : next->kept ? next->lost[i] : 0;
        if (at)
            r = lose(next, at, cluster, NULL);
    }
}

void qcow2_next_free(struct qcow2_next *next)
{
    free(next->reftable);
    free(next->copies);
    free(next->lost);
    *next = (struct qcow2_next){0};
}
