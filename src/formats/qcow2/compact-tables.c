/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction's last step: tables move down, and refcount blocks that count nothing any more go.
 * Nobody writes. Each table is first durable in its new place, which is counted; then one link to
 * it switches; then its old place is freed. A crash leaves the old link or the new one, and at most
 * a cluster that is counted and not used. */
#include "formats/qcow2/compact.h"

#include "base/cleanup.h"

static bool is_high(const struct qcow2 *q, uint64_t host)
{
    return qcow2_is_high(q, host, q->cluster);
}

int qcow2_take_lower(struct dr_image *image, uint64_t *host, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do {
        struct dr_reservation pins = {0};
        r = qcow2_find_lower(image, host, err);
        if (r == 0)
            r = qcow2_reserve_counts(image, &pins, *host, q->cluster);
        if (r == 0)
            qcow2_add(image, *host, q->cluster, 1);
        dr_reserve_unpin(image, &pins);
    } while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

/* All of a window. 1: something stands there still, or again. */
static int take_window(struct dr_image *image, const struct qcow2_window *w, struct dr_error *err)
{
    uint64_t host = w->to * qcow2_of(image)->cluster;
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do
        r = qcow2_allocate_at(image, host, w->n);
    while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

int qcow2_copy_table(struct dr_image *image, uint64_t from, uint64_t to, uint64_t len,
                     struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *buf = malloc(q->cluster);
    int r = buf ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t i = 0; r == 0 && i < len; i += q->cluster) {
        r = dr_file_pread_short(image->files[0], buf, from + i, q->cluster, NULL, err);
        if (r == 0)
            r = qcow2_write_taken(image, buf, q->cluster, to + i, err);
    }
    return r < 0 ? r : dr_image_flush_all(image, err);
}

/* ------------------------------------------------------------------ L2 tables */

/* [page] */
static int lower_l2(struct dr_image *image, uint64_t i, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t off = i * qcow2_l2_span(q), table, hole, fresh;
    bool copied;
    int r = qcow2_find_l2(image, off, &table, &copied, &hole, err);
    if (r < 0 || !table || !copied || !is_high(q, table))
        return r;
    if ((r = dr_page_get_all(image, 0, table, q->cluster)) < 0 ||
        (r = qcow2_find_lower(image, &fresh, err)) != 0)
        return r;
    r = dr_free_ahead(image, 1);
    return r < 0 ? r : qcow2_replace_table(image, q->h.l1_at + 8 * i, table, fresh, false);
}

static int lower_l2_tables(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < q->h.l1_entries; i++) {
        struct dr_hold hold = {0};
        pthread_mutex_lock(&image->lock);
        do
            r = lower_l2(image, i, err);
        while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
        dr_hold_end(&hold);
        pthread_mutex_unlock(&image->lock);
        if (r == 0)
            r = dr_image_relieve(image, err);
    }
    return r;
}

/* ------------------------------------------------------------------ L1 and refcount table */

static int lower_l1(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t fresh, bytes = q->h.l1_entries * UINT64_C(8);
    if (bytes == 0 || bytes > q->cluster || !is_high(q, q->h.l1_at))
        return 0;
    int r = qcow2_take_lower(image, &fresh, err);
    return r ? r : qcow2_place_l1(image, fresh, 1, err);
}

static int write_reftable(struct dr_image *image, uint64_t at, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t len = q->h.reftable_clusters * q->cluster;
    CLEANUP_FREE uint64_t *table = malloc(len);
    uint8_t field[12];
    if (!table)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t i = 0; i < q->reftable_n; i++)
        put_be64(&table[i], q->reftable[i]);
    int r = qcow2_write_taken(image, table, len, at, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    if (r < 0)
        return r;
    put_be64(field, at);
    put_be32(field + 8, q->h.reftable_clusters);
    return qcow2_switch_tables(image, QCOW2_AT_REFTABLE, field, sizeof(field), err);
}

/* To a place that was taken for it. */
static int place_reftable(struct dr_image *image, uint64_t fresh, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t old = q->h.reftable_at;
    int r = dr_image_flush_all(image, err);
    if (r == 0)
        r = write_reftable(image, fresh, err);
    if (r < 0)
        return r;
    pthread_mutex_lock(&image->lock);
    q->h.reftable_at = fresh;
    pthread_mutex_unlock(&image->lock);
    return qcow2_lose(image, old, q->h.reftable_clusters * q->cluster, err);
}

static int lower_reftable(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t fresh;
    if (q->h.reftable_clusters != 1 || !is_high(q, q->h.reftable_at))
        return 0;
    int r = qcow2_take_lower(image, &fresh, err);
    return r ? r : place_reftable(image, fresh, err);
}

/* ------------------------------------------------------------------ refcount blocks */

/* Write entries of the refcount table as they are in memory, each of which may be old or new after
 * a crash. */
static int switch_roots(struct dr_image *image, uint64_t first, uint64_t n, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint64_t *roots = malloc((size_t)(n * 8));
    if (!roots)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t i = 0; i < n; i++)
        put_be64(&roots[i], q->reftable[first + i]);
    int r = qcow2_write_taken(image, roots, n * 8, q->h.reftable_at + 8 * first, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    if (r < 0) { /* the file may have the one or the other: opening it again tells */
        DR_LOCK_SCOPE(&image->lock);
        q->damage_noted = true;
    }
    return r;
}

/* Put a block at `at` (0: nowhere), and forget what is in memory of its old place. */
static void set_root(struct dr_image *image, uint64_t b, uint64_t at)
{
    struct qcow2 *q = qcow2_of(image);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, q->reftable[b], q->cluster);
    if (at)
        qcow2_guard(q, at);
    else
        qcow2_unguard(q, q->reftable[b], q->cluster);
    q->reftable[b] = at;
}

static int lower_block(struct dr_image *image, uint64_t b, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t old = q->reftable[b], fresh;
    CLEANUP_FREE uint8_t *block = malloc(q->cluster);
    int r = block ? qcow2_take_lower(image, &fresh, err)
                  : dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r == 0)
        r = dr_image_flush_all(image, err); /* what it counts is in the file, and nothing changes */
    if (r == 0)
        r = dr_file_pread(image->files[0], block, old, q->cluster, err);
    if (r == 0)
        r = qcow2_write_taken(image, block, q->cluster, fresh, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    if (r != 0)
        return r;
    set_root(image, b, fresh);
    r = switch_roots(image, b, 1, err);
    return r < 0 ? r : qcow2_lose(image, old, q->cluster, err);
}

/* Those that are needed: they count something before the end. */
static int lower_blocks(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t n = dr_min(q->reftable_n, dr_div_up(q->compact->end, qcow2_block_entries(q)));
    int r = 0;
    for (uint64_t b = 0; r == 0 && b < n; b++)
        if (q->reftable[b] && is_high(q, q->reftable[b]))
            r = lower_block(image, b, err);
    return r;
}

/* Does the block count nothing, or only itself? */
static int is_idle(struct dr_image *image, uint64_t b, uint8_t *block, bool *idle,
                   struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t per = qcow2_block_entries(q), own = q->reftable[b] / q->cluster;
    int r = dr_file_pread(image->files[0], block, q->reftable[b], q->cluster, err);
    *idle = r == 0;
    for (uint64_t i = 0; *idle && i < per; i++)
        *idle = qcow2_count_get(q->h.refcount_order, block, i) == (b * per + i == own);
    return r;
}

/* n blocks from `first` on become free with the next flush, but for those that one of them counted,
 * whose count is gone with it. */
static int lose_blocks(struct dr_image *image, const uint64_t *places, uint64_t first, uint64_t n,
                       struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t per = qcow2_block_entries(q);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < n; i++)
        if (places[i] && !dr_inside(places[i] / q->cluster / per - first, 1, n))
            r = qcow2_lose(image, places[i], q->cluster, err);
    return r;
}

static int drop_roots(struct dr_image *image, uint64_t first, uint64_t n, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint64_t *places = malloc((size_t)(n * 8));
    if (!places)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    memcpy(places, q->reftable + first, (size_t)(n * 8));
    for (uint64_t b = first; b < first + n; b++)
        if (q->reftable[b])
            set_root(image, b, 0);
    int r = switch_roots(image, first, n, err);
    return r < 0 ? r : lose_blocks(image, places, first, n, err);
}

/* Of the blocks from `least` on, those that count nothing else, row by row, the last one first.
 * *dropped: there were some; *left: and others. */
static int drop_idle(struct dr_image *image, uint64_t least, uint8_t *block, bool *dropped,
                     bool *left, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = 0;
    *dropped = *left = false;
    for (uint64_t first = q->reftable_n, end; r == 0 && first > least; first--) {
        bool idle = true, any = false;
        for (end = first; first > least; any |= q->reftable[--first] != 0) {
            if (q->reftable[first - 1])
                r = is_idle(image, first - 1, block, &idle, err);
            if (r < 0 || !idle)
                break;
        }
        if (r == 0 && any)
            r = drop_roots(image, first, end - first, err);
        *dropped |= any;
        *left |= !idle;
        if (first == least)
            break;
    }
    return r;
}

/* Blocks that count nothing before the end any more. One may count another one: it is idle when
 * that one is gone. */
static int drop_blocks(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *block = malloc(q->cluster);
    uint64_t least = dr_div_up(q->compact->end, qcow2_block_entries(q));
    bool dropped = true, left = true;
    int r = block ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (unsigned round = 0; r == 0 && dropped && left && round < 8; round++) {
        r = drop_idle(image, least, block, &dropped, &left, err);
        if (r == 0 && dropped)
            r = dr_image_flush_all(image, err);
    }
    return r;
}

/* ------------------------------------------------------------------ tables of several clusters */

static int move_long(struct dr_image *image, const struct qcow2_window *w, struct dr_error *err)
{
    uint64_t to = w->to * qcow2_of(image)->cluster;
    switch (w->what) {
    case QCOW2_LONG_L1:
        return qcow2_place_l1(image, to, w->n, err);
    case QCOW2_LONG_REFTABLE:
        return place_reftable(image, to, err);
    case QCOW2_LONG_DIRECTORY:
        return qcow2_move_directory(image, to, err);
    default:
        return qcow2_move_bitmap_table(image, w->bitmap, to, err);
    }
}

/* Writers may have made the refcount table longer since, which took it elsewhere. All others stand
 * still as long as a disk is compacted. */
static bool stands_there(const struct qcow2 *q, const struct qcow2_window *w)
{
    return w->what != QCOW2_LONG_REFTABLE ||
           (q->h.reftable_at == w->at * q->cluster && q->h.reftable_clusters == w->n);
}

/* Their windows are free by now, unless what stood there found no other place, or others who write
 * to the disk have taken one. Such a table stays for the next time. */
static int move_longs(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    const struct qcow2_compact *c = q->compact;
    int r = 0;
    for (unsigned i = 0; r == 0 && i < c->n_windows; i++) {
        if (!c->windows[i].to)
            continue;
        r = dr_image_flush_all(image, err); /* what has left the window is free */
        if (r == 0 && !stands_there(q, &c->windows[i]))
            continue;
        if (r == 0)
            r = take_window(image, &c->windows[i], err);
        if (r == 0)
            r = move_long(image, &c->windows[i], err);
        r = r == 1 ? 0 : r;
    }
    return r;
}

/* ------------------------------------------------------------------ all of them */

/* 1, from any of the steps: there is no free place left before the end, so what is behind stays. */
static int lower_tables(struct dr_image *image, struct dr_error *err)
{
    int r = lower_l2_tables(image, err);
    if (r == 0)
        r = lower_l1(image, err);
    if (r == 0)
        r = lower_reftable(image, err);
    if (r == 0)
        r = qcow2_lower_bitmaps(image, err);
    if (r == 0)
        r = lower_blocks(image, err);
    return r;
}

int qcow2_compact_finish(struct dr_image *image, bool *again, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (!q->compact)
        return 0;
    *again = q->compact->clears;
    int r = lower_tables(image, err);
    if (r >= 0)
        r = move_longs(image, err);
    if (r < 0)
        return r;
    r = dr_image_flush_all(image, err);
    if (r == 0)
        r = drop_blocks(image, err);
    DR_LOCK_SCOPE(&image->lock);
    q->cursor = 0; /* what is free is found anew: much of it is cut off */
    q->n_free = 0;
    q->coded_next = 0;
    return r;
}
