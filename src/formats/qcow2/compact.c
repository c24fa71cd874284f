/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which clusters can move, and where the file can end. Everything is durable, and nobody writes, so
 * tables are read from the file, past the page cache. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/compact.h"

#include "base/cleanup.h"

/* Of larger files, only what is in the last so many clusters moves: 32 MiB of bits. Doing it again
 * goes on. */
#define MAX_BITS (UINT64_C(1) << 28)

/* ------------------------------------------------------------------ which clusters can move */

bool qcow2_can_move(const struct qcow2_compact *c, uint64_t i)
{
    return i >= c->first && i < c->clusters &&
           (c->movable[(i - c->first) / 8] >> (i - c->first) % 8 & 1);
}

static void set_bits(struct qcow2_compact *c, const struct qcow2 *q, uint64_t host, uint64_t len)
{
    for (uint64_t i = dr_max(host / q->cluster, c->first);
         i < c->clusters && i * q->cluster < host + len; i++)
        c->movable[(i - c->first) / 8] |= (uint8_t)(1u << (i - c->first) % 8);
}

/* A table of so many bytes: it moves whole. */
static void set_table(struct dr_image *image, enum qcow2_long what, uint32_t bitmap, uint64_t host,
                      uint64_t bytes)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    uint64_t n = dr_div_up(bytes, q->cluster), at = host / q->cluster;
    if (n > 1 && (c->n_windows == QCOW2_WINDOWS || at < c->first))
        return;
    if (n > 1)
        c->windows[c->n_windows++] = (struct qcow2_window){what, bitmap, at, n, 0};
    set_bits(c, q, host, bytes);
}

static int mark_entry(struct dr_image *image, const uint8_t *raw, uint64_t at, uint64_t off,
                      struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    struct qcow2_entry e;
    const char *problem = qcow2_entry_decode(q, raw, off, &e);
    if (problem)
        return dr_fail(err, EIO,
                       "%s: the L2 entry at byte %llu, for guest offset %llu, has %s; `drover "
                       "check` says more",
                       image->path, ULL(at), ULL(off), problem);
    if (e.host == QCOW2_NO_PLACE || qcow2_has_data_file(q))
        return 0;
    if (e.coded ? c->moves_coded : e.copied)
        set_bits(c, q, e.host, e.coded ? e.coded : q->cluster);
    return 0;
}

/* The i-th L2 table, and what it leads to. A shared one keeps its place, and so does all below. */
static int mark_table(struct dr_image *image, uint64_t i, uint64_t l1_entry, uint8_t *buf,
                      struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t table = l1_entry & QCOW2_OFFSET, off = i * qcow2_l2_span(q);
    int r = qcow2_check_l1_entry(image, q->h.l1_at + 8 * i, l1_entry, err);
    if (r < 0 || !table || !(l1_entry & QCOW2_COPIED))
        return r;
    r = dr_file_pread(image->files[0], buf, table, q->cluster, err);
    if (r == 0)
        set_bits(q->compact, q, table, q->cluster);
    for (uint64_t n = 0; r == 0 && n < q->l2_entries; n++)
        r = mark_entry(image, buf + n * q->entry, table + n * q->entry, off + n * q->cluster, err);
    return r;
}

static int mark_tree(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t bytes = q->h.l1_entries * UINT64_C(8);
    CLEANUP_FREE uint8_t *l1 = malloc(bytes ? bytes : 1), *buf = malloc(q->cluster);
    if (!l1 || !buf)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_file_pread(image->files[0], l1, q->h.l1_at, bytes, err);
    for (uint64_t i = 0; r == 0 && i < q->h.l1_entries; i++)
        r = mark_table(image, i, get_be64(l1 + 8 * i), buf, err);
    if (r == 0 && bytes)
        set_table(image, QCOW2_LONG_L1, 0, q->h.l1_at, bytes);
    return r;
}

static int mark_bitmap(struct dr_image *image, const struct qcow2_bitmaps *dir, uint32_t i,
                       struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    const struct qcow2_bitmap *b = &dir->list[i];
    CLEANUP_FREE uint64_t *table = NULL;
    int r = qcow2_bitmap_load_table(image, b, &table, err);
    for (uint64_t n = 0; r == 0 && n < b->entries; n++)
        if (table[n] & QCOW2_OFFSET)
            set_bits(q->compact, q, table[n] & QCOW2_OFFSET, q->cluster);
    if (r == 0)
        set_table(image, QCOW2_LONG_BITMAP, i, b->table_at, b->entries * UINT64_C(8));
    return r == -EIO ? 0 : r; /* a damaged one stays where it is */
}

static int mark_bitmaps(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    if (!q->bitmaps_at)
        return 0;
    int r = qcow2_bitmaps_load(image, &dir, err);
    if (r == -EIO)
        return 0;
    if (r == 0)
        set_table(image, QCOW2_LONG_DIRECTORY, 0, q->bitmaps_at, dir.len);
    for (uint32_t i = 0; r == 0 && i < dir.n; i++)
        r = mark_bitmap(image, &dir, i, err);
    return r;
}

/* ------------------------------------------------------------------ what is in use */

static int count_block(struct dr_image *image, uint64_t b, const uint8_t *block)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    uint64_t per = qcow2_block_entries(q);
    for (uint64_t n = 0; n < per; n++) {
        if (!qcow2_count_get(q->h.refcount_order, block, n))
            continue;
        c->used++;
        if (!qcow2_can_move(c, b * per + n))
            c->stays = b * per + n + 1;
    }
    return 0;
}

/* Where a part of the file has no block, using it takes one. */
static int count_all(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t per = qcow2_block_entries(q);
    CLEANUP_FREE uint8_t *block = malloc(q->cluster);
    int r = block ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint64_t b = 0; r == 0 && b < q->reftable_n; b++) {
        if (!q->reftable[b]) {
            q->compact->used += b * per < q->compact->clusters;
            continue;
        }
        r = dr_file_pread(image->files[0], block, q->reftable[b], q->cluster, err);
        if (r == 0)
            r = count_block(image, b, block);
    }
    return r;
}

/* ------------------------------------------------------------------ the end */

/* Blocks that count nothing but what is behind `end` are not needed any more then. */
static uint64_t blocks_behind(const struct qcow2 *q, uint64_t end)
{
    uint64_t n = 0;
    for (uint64_t b = dr_div_up(end, qcow2_block_entries(q)); b < q->reftable_n; b++)
        n += q->reftable[b] != 0;
    return n;
}

/* The fewer clusters there are, the fewer blocks they need. */
void qcow2_choose_end(const struct qcow2 *q, struct qcow2_compact *c)
{
    uint64_t least = dr_max(c->stays, c->first), end = dr_max(c->used, least), before;
    do {
        before = end;
        end = dr_max(least, c->used - dr_min(c->used, blocks_behind(q, before)));
    } while (end < before);
    c->end = dr_min(before, c->clusters);
}

static int survey(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    int r = qcow2_load_reftable(image, err);
    if (r < 0)
        return r;
    c->clusters = dr_div_up(dr_file_size(image->files[0]), q->cluster);
    c->first = c->clusters - dr_min(c->clusters, MAX_BITS);
    c->moves_coded = q->h.n_snapshots == 0;
    c->movable = calloc(1, (size_t)((c->clusters - c->first) / 8 + 1));
    if (!c->movable)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = mark_tree(image, err);
    if (r == 0)
        r = mark_bitmaps(image, err);
    if (r == 0)
        set_table(image, QCOW2_LONG_REFTABLE, 0, q->h.reftable_at,
                  q->h.reftable_clusters * q->cluster);
    for (uint64_t b = 0; r == 0 && b < q->reftable_n; b++)
        if (q->reftable[b])
            set_bits(c, q, q->reftable[b], q->cluster);
    return r < 0 ? r : count_all(image, err);
}

int qcow2_compact_begin(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (image->files[0]->block_device) /* it keeps its length */
        return 0;
    struct qcow2_compact *c = calloc(1, sizeof(*c));
    if (!c)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    q->compact = c;
    int r = survey(image, err);
    if (r < 0)
        return r;
    qcow2_choose_end(q, c);
    return qcow2_find_windows(image, err);
}

void qcow2_compact_end(struct dr_image *image)
{
    struct qcow2 *q = qcow2_of(image);
    pthread_mutex_lock(&image->lock);
    struct qcow2_compact *c = DR_STEAL(q->compact);
    pthread_mutex_unlock(&image->lock);
    if (c)
        free(c->movable);
    free(c);
}

/* ------------------------------------------------------------------ questions */

const struct qcow2_window *qcow2_window_of(const struct qcow2_compact *c, uint64_t cluster)
{
    for (unsigned i = 0; i < c->n_windows; i++) {
        const struct qcow2_window *w = &c->windows[i];
        if (w->to && dr_inside(cluster - w->to, 1, w->n))
            return w;
    }
    return NULL;
}

bool qcow2_is_high(const struct qcow2 *q, uint64_t host, uint64_t len)
{
    const struct qcow2_compact *c = q->compact;
    uint64_t first = host / q->cluster, last = (host + len - 1) / q->cluster;
    if (last >= c->end)
        return true;
    for (unsigned i = 0; i < c->n_windows; i++) {
        const struct qcow2_window *w = &c->windows[i];
        if (w->to && first < w->to + w->n && last >= w->to)
            return true;
    }
    return false;
}

bool qcow2_stands_high(const struct qcow2 *q, const struct qcow2_entry *e)
{
    const struct qcow2_compact *c = q->compact;
    if (!c || e->host == QCOW2_NO_PLACE || qcow2_has_data_file(q))
        return false;
    return qcow2_is_high(q, e->host, e->coded ? e->coded : q->cluster) &&
           (e->coded ? c->moves_coded : e->copied);
}

bool qcow2_compact_moves(const struct dr_image *image, const struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    const struct qcow2_compact *c = q->compact;
    if (!c || c->cursor >= c->end || (ext->file != image->files[0] && ext->file != q->plain))
        return false;
    uint64_t len = ext->kind == DR_CODED ? ext->host_len : ext->len;
    return qcow2_is_high(q, ext->host, len) &&
           (ext->kind == DR_CODED ? c->moves_coded : ext->in_place);
}

/* No more than once for a cluster, of which each part may have an extent of its own. */
static void spare_cluster(struct qcow2_compact *c, uint64_t i)
{
    if (!qcow2_can_move(c, i))
        return;
    c->used -= c->used > 0;
    c->movable[(i - c->first) / 8] &= (uint8_t) ~(1u << (i - c->first) % 8);
}

/* Compressed clusters share those of the file: what would come free is not known. Nor is it of
 * zeros that have a place, where a snapshot may have the same. Version 2 cannot say zeros over a
 * parent without a place. */
void qcow2_compact_spare(struct dr_image *image, const struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    if (!c || qcow2_has_data_file(q) || (q->h.version < 3 && image->backing_name))
        return;
    if (ext->kind == DR_ZERO && ext->placed && c->moves_coded)
        c->used -= dr_min(c->used, dr_div_up(ext->len, q->cluster));
    for (uint64_t at = ext->host; ext->kind == DR_DATA && at < ext->host + ext->len;
         at += q->cluster)
        spare_cluster(c, at / q->cluster);
    qcow2_choose_end(q, c);
    c->goal = c->end;
}

uint64_t qcow2_compact_length(const struct dr_image *image)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t length = 0;
    for (unsigned i = q->compact ? 1 : 0; i < image->n_files; i++)
        length += dr_file_size(image->files[i]);
    return q->compact ? length + q->compact->goal * q->cluster : length;
}
