/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The refcount table: read whole by the first writer; moved when it is full. */
#include "formats/qcow2/snapshot.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ reading it */

/* A block that the file is too short for would call everything free. */
static const char *block_problem(const struct dr_image *image, uint64_t block)
{
    const struct qcow2 *q = qcow2_of(image);
    if (block % q->cluster || block >= QCOW2_MAX_OFFSET)
        return "which is no cluster's beginning";
    if (block && !dr_inside(block, q->cluster, dr_file_size(image->files[0])))
        return "where the file has ended";
    return block && qcow2_guarded(q, block, q->cluster) ? "which belongs to another table" : NULL;
}

static int check_block(struct dr_image *image, uint64_t i, uint64_t block, struct dr_error *err)
{
    const char *problem = block_problem(image, block);
    if (!problem)
        return 0;
    return dr_fail(err, EIO,
                   "%s: refcount table entry %llu at byte %llu points to byte %llu, %s; `drover "
                   "check -r all` mends it",
                   image->path, ULL(i), ULL(qcow2_of(image)->h.reftable_at + 8 * i), ULL(block),
                   problem);
}

/* A table that is not in use yet: nobody but the caller knows it. */
static int parse_reftable(struct dr_image *image, uint64_t *table, uint64_t n, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->lock); /* readers note their tables meanwhile */
    for (uint64_t i = 0; i < n; i++) {
        table[i] = get_be64(&table[i]);
        int r = check_block(image, i, table[i], err);
        if (r < 0)
            return r;
    }
    return 0;
}

int qcow2_load_reftable(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (q->reftable)
        return 0;
    int r = qcow2_header_check_reftable(&q->h, image->path, err);
    if (r < 0)
        return r;
    uint64_t bytes = q->h.reftable_clusters * q->cluster;
    CLEANUP_FREE uint64_t *table = malloc(bytes ? bytes : 1);
    if (!table)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = dr_file_pread(image->files[0], table, q->h.reftable_at, bytes, err);
    if (r == 0)
        r = parse_reftable(image, table, bytes / 8, err);
    if (r < 0)
        return r;
    qcow2_guard_snapshots(image);
    DR_LOCK_SCOPE(&image->lock);
    q->reftable_n = bytes / 8;
    q->reftable = DR_STEAL(table);
    for (uint64_t i = 0; i < q->reftable_n; i++)
        if (q->reftable[i])
            qcow2_guard(q, q->reftable[i]);
    return 0;
}

/* ------------------------------------------------------------------ taking and losing clusters */

/* dr_image_satisfy, also for a caller that is begin_write itself: damage is not begun anew. */
static int satisfy(struct dr_image *image, struct dr_hold *hold, struct dr_error *err)
{
    return qcow2_of(image)->damage ? qcow2_refuse_damaged(image, err)
                                   : dr_image_satisfy(image, hold, 0, err);
}

int qcow2_take(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do
        r = qcow2_allocate(image, n, host, err);
    while (r == -EAGAIN && (r = satisfy(image, &hold, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

int qcow2_write_taken(struct dr_image *image, const void *bytes, uint64_t len, uint64_t host,
                      struct dr_error *err)
{
    int r = dr_file_pwrite(image->files[0], bytes, host, len, err);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, host, len);
    return r;
}

int qcow2_lose(struct dr_image *image, uint64_t host, uint64_t len, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do {
        if ((r = dr_free_ahead(image, 1)) == 0)
            r = qcow2_pin_counts(image, host, len);
    } while (r == -EAGAIN && (r = satisfy(image, &hold, err)) == 0);
    dr_hold_end(&hold);
    if (r == 0)
        qcow2_free_later(image, host, len);
    return r;
}

int qcow2_count_of(struct dr_image *image, uint64_t host, uint64_t *count, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do
        r = qcow2_count(image, host, count);
    while (r == -EAGAIN && (r = satisfy(image, &hold, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

/* ------------------------------------------------------------------ moving it
 *
 * The table is full, so every cluster that has a count is in use, and what comes behind them is
 * free. There the new table goes, behind the new blocks that count both. One switch of the header
 * makes it the image's. */

struct move {
    struct dr_image *image;
    uint64_t first;    /* cluster: the first that has no count */
    uint64_t n_blocks; /* new ones, from `first` on */
    uint64_t clusters; /* of the new table */
    uint64_t *table;   /* big-endian */
    uint8_t *blocks;
};

static void plan_move(struct move *m)
{
    const struct qcow2 *q = qcow2_of(m->image);
    uint64_t per_block = qcow2_block_entries(q), per_table = q->cluster / 8, need;
    m->first = q->reftable_n * per_block;
    m->clusters = dr_max(1, q->h.reftable_clusters * UINT64_C(2));
    m->clusters = dr_max(q->h.reftable_clusters + UINT64_C(1),
                         dr_min(m->clusters, QCOW2_MAX_REFTABLE / q->cluster));
    m->n_blocks = 1;
    do {
        need = dr_div_up(m->n_blocks + m->clusters, per_block);
        if (need > m->n_blocks)
            m->n_blocks = need;
        uint64_t entries = q->reftable_n + m->n_blocks;
        m->clusters = dr_max(m->clusters, dr_div_up(entries, per_table));
    } while (dr_div_up(m->n_blocks + m->clusters, per_block) > m->n_blocks);
}

static int fill_move(struct move *m, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(m->image);
    m->table = calloc(m->clusters, q->cluster);
    m->blocks = calloc(m->n_blocks, q->cluster);
    if (!m->table || !m->blocks)
        return dr_fail_errno(err, ENOMEM, "%s", m->image->path);
    for (uint64_t i = 0; i < q->reftable_n; i++)
        put_be64(&m->table[i], q->reftable[i]);
    for (uint64_t i = 0; i < m->n_blocks; i++)
        put_be64(&m->table[q->reftable_n + i], (m->first + i) * q->cluster);
    for (uint64_t i = 0; i < m->n_blocks + m->clusters; i++) /* blocks follow each other */
        qcow2_count_put(q->h.refcount_order, m->blocks, i, 1);
    return 0;
}

static int write_move(struct move *m, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(m->image);
    struct dr_file *f = m->image->files[0];
    uint64_t blocks_at = m->first * q->cluster, table_at = blocks_at + m->n_blocks * q->cluster;
    uint8_t field[12];
    if (f->block_device && table_at + m->clusters * q->cluster > dr_file_size(f))
        return dr_fail(err, ENOSPC, "%s: the device is full: no room for a larger refcount table",
                       m->image->path);
    int r = dr_file_pwrite(f, m->blocks, blocks_at, m->n_blocks * q->cluster, err);
    if (r == 0)
        r = dr_file_pwrite(f, m->table, table_at, m->clusters * q->cluster, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r < 0)
        return r;
    put_be64(field, table_at);
    put_be32(field + 8, (uint32_t)m->clusters);
    return qcow2_switch_tables(m->image, QCOW2_AT_REFTABLE, field, sizeof(field), err);
}

/* image->lock held. */
static void adopt_move(struct move *m)
{
    struct qcow2 *q = qcow2_of(m->image);
    uint64_t n = m->clusters * q->cluster / 8;
    uint64_t blocks_at = m->first * q->cluster, table_at = blocks_at + m->n_blocks * q->cluster;
    for (uint64_t i = 0; i < n; i++)
        m->table[i] = get_be64(&m->table[i]);
    free(q->reftable);
    q->reftable = DR_STEAL(m->table);
    for (uint64_t i = 0; i < m->n_blocks; i++)
        qcow2_guard(q, (m->first + i) * q->cluster);
    q->reftable_n = n;
    q->h.reftable_at = table_at;
    q->h.reftable_clusters = (uint32_t)m->clusters;
    q->reftable_full = false;
    dr_page_forget(m->image, 0, blocks_at, (m->n_blocks + m->clusters) * q->cluster);
}

static int move_table(struct move *m, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(m->image);
    uint64_t old = q->h.reftable_at, old_len = q->h.reftable_clusters * q->cluster;
    plan_move(m);
    if (m->clusters * q->cluster > QCOW2_MAX_REFTABLE)
        return dr_fail(err, EFBIG,
                       "%s: the refcount table cannot grow beyond %llu bytes; larger clusters make "
                       "room for more",
                       m->image->path, ULL(QCOW2_MAX_REFTABLE));
    int r = dr_image_flush(m->image, err); /* what the table says in memory is on disk */
    if (r == 0)
        r = fill_move(m, err);
    if (r == 0)
        r = write_move(m, err);
    if (r == 0) {
        DR_LOCK_SCOPE(&m->image->lock);
        adopt_move(m);
    }
    return r < 0 || !old_len ? r : qcow2_lose(m->image, old, old_len, err);
}

int qcow2_grow_reftable(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct move m = {.image = image};
    int r = move_table(&m, err);
    free(m.table);
    free(m.blocks);
    DR_LOCK_SCOPE(&image->lock);
    q->reftable_moving = false;
    return r;
}
