/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction moves bitmaps: their bits, then their tables, then the directory. Each is first
 * durable in its new place, and then the one link to it switches: an entry of the bitmap's table,
 * 8 bytes of the directory, an extension of the header. Both ends of a link have the same bits, so
 * a bitmap is as good as before at every instant, in use or not, and notes nothing. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/compact.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ bits */

struct moving {
    struct dr_image *image;
    uint64_t *table;
    struct qcow2_places left;
};

/* 1: there is no free place left. */
static int lower_cluster(struct moving *m, uint64_t i, uint8_t *buf, struct dr_error *err)
{
    struct dr_image *image = m->image;
    const struct qcow2 *q = qcow2_of(image);
    uint64_t old = m->table[i] & QCOW2_OFFSET, fresh;
    if (!old || !qcow2_is_high(q, old, q->cluster))
        return 0;
    int r = qcow2_take_lower(image, &fresh, err);
    if (r == 0)
        r = dr_file_pread_short(image->files[0], buf, old, q->cluster, NULL, err);
    if (r == 0)
        r = qcow2_write_taken(image, buf, q->cluster, fresh, err);
    if (r == 0 && qcow2_places_add(&m->left, old, q->cluster) < 0)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r == 0)
        m->table[i] = fresh;
    return r;
}

/* Counts and bits are durable before the entries that lead there. */
static int switch_entries(struct moving *m, const struct qcow2_bitmap *b, struct dr_error *err)
{
    struct dr_image *image = m->image;
    int r = dr_image_flush_all(image, err);
    for (uint64_t i = 0; i < b->entries; i++)
        put_be64(&m->table[i], m->table[i]);
    if (r == 0)
        r = qcow2_write_taken(image, m->table, b->entries * UINT64_C(8), b->table_at, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    return r < 0 ? r : qcow2_places_lose(image, &m->left, err);
}

static int lower_bits(struct dr_image *image, const struct qcow2_bitmap *b, struct dr_error *err)
{
    CLEANUP_FREE uint64_t *table = NULL;
    CLEANUP_FREE uint8_t *buf = malloc(qcow2_of(image)->cluster);
    int r = buf ? qcow2_bitmap_load_table(image, b, &table, NULL) : -ENOMEM;
    if (r < 0) /* the bits of a damaged one stay where they are */
        return r == -EIO ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    struct moving m = {.image = image, .table = table};
    for (uint64_t i = 0; r == 0 && i < b->entries; i++)
        r = lower_cluster(&m, i, buf, err);
    if (r >= 0 && m.left.n) {
        int switched = switch_entries(&m, b, err);
        r = switched < 0 ? switched : r;
    }
    qcow2_places_free(&m.left);
    return r;
}

/* ------------------------------------------------------------------ tables and directory */

static int move_table(struct dr_image *image, const struct qcow2_bitmap *b, uint64_t to,
                      struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t len = b->entries * UINT64_C(8);
    uint8_t link[8];
    put_be64(link, to);
    int r = qcow2_copy_table(image, b->table_at, to, len, err);
    if (r == 0)
        r = dr_file_pwrite(image->files[0], link, q->bitmaps_at + b->at, sizeof(link), err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    return r < 0 ? r : qcow2_lose(image, b->table_at, len, err);
}

int qcow2_move_bitmap_table(struct dr_image *image, uint32_t bitmap, uint64_t to,
                            struct dr_error *err)
{
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    int r = qcow2_bitmaps_load(image, &dir, err);
    return r < 0 ? r : move_table(image, &dir.list[bitmap], to, err);
}

/* Where the first cluster has no room to record another place without a moment in which it would
 * record none, the directory stays. */
int qcow2_move_directory(struct dr_image *image, uint64_t to, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_error why = DR_ERROR_INIT;
    uint64_t old = q->bitmaps_at, len = q->bitmaps_len;
    int r = qcow2_copy_table(image, old, to, len, err);
    if (r < 0)
        return r;
    r = qcow2_set_bitmaps(image, q->n_bitmaps, len, to, &why);
    if (r == -ENOSPC && !q->damage)
        return qcow2_lose(image, to, len, err);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : qcow2_lose(image, old, len, err);
}

/* ------------------------------------------------------------------ all of one cluster */

static int lower_bitmap(struct dr_image *image, const struct qcow2_bitmap *b, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t fresh;
    int r = lower_bits(image, b, err);
    if (r || b->entries * UINT64_C(8) > q->cluster ||
        !qcow2_is_high(q, b->table_at, b->entries * UINT64_C(8)))
        return r;
    r = qcow2_take_lower(image, &fresh, err);
    return r ? r : move_table(image, b, fresh, err);
}

int qcow2_lower_bitmaps(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    uint64_t fresh;
    int r = qcow2_bitmaps_load(image, &dir, NULL);
    if (r < 0)
        return r == -EIO ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint32_t i = 0; r == 0 && i < dir.n; i++)
        r = lower_bitmap(image, &dir.list[i], err);
    if (r || dir.len == 0 || dir.len > q->cluster || !qcow2_is_high(q, q->bitmaps_at, dir.len))
        return r;
    r = qcow2_take_lower(image, &fresh, err);
    return r ? r : qcow2_move_directory(image, fresh, err);
}
