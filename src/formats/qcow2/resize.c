/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Another size of the disk. Growing: a larger L1 table, then whatever stands behind the old end is
 * cleared, then the size is switched. Shrinking: the size is switched, then what is behind the new
 * end is given back. A crash in between leaves the old size or the new one, and what is behind the
 * end is cleared before it can be seen. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ the L1 table */

static int switch_l1(struct dr_image *image, uint64_t at, uint64_t entries, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint8_t field[12];
    put_be32(field, (uint32_t)entries);
    put_be64(field + 4, at);
    int r = qcow2_switch_tables(image, QCOW2_AT_L1, field, sizeof(field), err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, at, dr_round_up(entries * 8, q->cluster));
    q->h.l1_at = at;
    q->h.l1_entries = (uint32_t)entries;
    return 0;
}

/* The table's last cluster has room for more entries; what stands there may be anything. */
static int extend_l1(struct dr_image *image, uint64_t entries, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t from = q->h.l1_entries * UINT64_C(8);
    int r = dr_file_zero(image->files[0], q->h.l1_at + from, entries * 8 - from, 0, err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    return r < 0 ? r : switch_l1(image, q->h.l1_at, entries, err);
}

static int copy_l1(struct dr_image *image, uint64_t to, uint64_t bytes, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *table = calloc(1, bytes);
    if (!table)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_file_pread(image->files[0], table, q->h.l1_at, q->h.l1_entries * UINT64_C(8), err);
    if (r == 0)
        r = dr_file_pwrite(image->files[0], table, to, bytes, err);
    return r < 0 ? r : dr_file_flush(image->files[0], err);
}

/* To n clusters at fresh, which were taken for it. */
static int place_l1(struct dr_image *image, uint64_t fresh, uint64_t n, uint64_t entries,
                    struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t old = q->h.l1_at, old_len = q->h.l1_entries * UINT64_C(8);
    int r = dr_image_flush(image, err); /* the counts, and what the old table says in memory */
    if (r == 0)
        r = copy_l1(image, fresh, n * q->cluster, err);
    if (r == 0)
        r = switch_l1(image, fresh, entries, err);
    return r < 0 || !old_len ? r : qcow2_lose(image, old, old_len, err);
}

int qcow2_place_l1(struct dr_image *image, uint64_t fresh, uint64_t n, struct dr_error *err)
{
    return place_l1(image, fresh, n, qcow2_of(image)->h.l1_entries, err);
}

static int move_l1(struct dr_image *image, uint64_t entries, struct dr_error *err)
{
    uint64_t n = dr_div_up(entries * 8, qcow2_of(image)->cluster), fresh;
    int r = qcow2_take(image, n, &fresh, err);
    return r < 0 ? r : place_l1(image, fresh, n, entries, err);
}

static int check_l1(const struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (dr_div_up(size, qcow2_l2_span(q)) * 8 <= QCOW2_MAX_L1)
        return 0;
    return dr_fail(err, EFBIG, "%s: with clusters of %llu bytes a disk has at most %llu bytes",
                   image->path, ULL(q->cluster), ULL(QCOW2_MAX_L1 / 8 * qcow2_l2_span(q)));
}

static int grow_l1(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t entries = dr_div_up(size, qcow2_l2_span(q));
    int r = check_l1(image, size, err);
    if (r < 0)
        return r;
    if (entries <= q->h.l1_entries)
        return 0;
    uint64_t room = dr_round_up(q->h.l1_entries * UINT64_C(8), q->cluster);
    return entries * 8 <= room ? extend_l1(image, entries, err) : move_l1(image, entries, err);
}

/* ------------------------------------------------------------------ what is behind the end */

/* Whole sub-clusters of one cluster: a reservation that needs no bytes. */
static int clear_cluster(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                         struct dr_error *err)
{
    struct dr_hold hold = {0};
    struct dr_reservation res = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do
        r = dr_image_reserve(image, off, len, want, 0, &res, err);
    while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, off, err)) == 0);
    dr_hold_end(&hold);
    if (r == 0)
        dr_image_publish(image, &res);
    return r;
}

static bool is_clear(enum dr_kind kind, enum dr_want want)
{
    return kind == (want == DR_WANT_ZERO ? DR_ZERO : DR_HOLE);
}

/* [off, end) lies outside the disk; both are multiples of a sub-cluster. */
static int clear_range(struct dr_image *image, uint64_t off, uint64_t end, enum dr_want want,
                       struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = 0;
    end = dr_min(end, q->h.l1_entries * qcow2_l2_span(q));
    while (r == 0 && off < end) {
        struct dr_extent ext;
        uint64_t len = dr_round_down(off, q->cluster) + q->cluster - off;
        r = dr_image_map(image, off, end - off, &ext, err);
        if (r == 0 && is_clear(ext.kind, want) && ext.len >= len)
            len = ext.len;
        else if (r == 0)
            r = clear_cluster(image, off, len, want, err);
        off += len;
    }
    return r;
}

/* Whole clusters behind the end show nothing of this image. In a raw data file their bytes are what
 * counts, and those go with its length. */
static int drop_range(struct dr_image *image, uint64_t off, uint64_t end, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (q->h.autoclear & QCOW2_DATA_RAW)
        return 0;
    return clear_range(image, dr_round_up(off, q->cluster), dr_round_up(end, q->cluster),
                       DR_WANT_HOLE, err);
}

/* The old end lies inside a cluster of this image's own: its rest may hold anything. */
static int clear_tail(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t size = image->size, end = dr_round_up(size, q->cluster);
    struct dr_extent ext = {.kind = DR_HOLE};
    int r = 0;
    for (uint64_t off = size; r == 0 && off < end; off += ext.len) {
        r = dr_image_map(image, off, end - off, &ext, err);
        if (r < 0 || ext.kind == DR_HOLE || ext.kind == DR_ZERO)
            continue;
        if (ext.kind != DR_DATA || !ext.in_place) /* the core has rewritten the cluster */
            r = dr_fail(err, EIO, "%s: cannot clear what is behind the end, at guest offset %llu",
                        image->path, ULL(off));
        else
            r = dr_file_zero(ext.file, ext.host, ext.len, 0, err);
    }
    return r;
}

/* ------------------------------------------------------------------ resize */

static int switch_size(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint8_t field[8];
    put_be64(field, size);
    int r = qcow2_switch_tables(image, QCOW2_AT_SIZE, field, sizeof(field), err);
    if (r < 0)
        return r;
    q->h.size = size;
    image->size = size;
    return 0;
}

/* The data file is at least as long as the disk. A raw one shows whatever it holds, so what an
 * interrupted shrink has left behind the old end goes first. */
static int grow_data_file(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_file *f = image->files[q->data]; /* encrypted or not: its length counts */
    uint64_t old = image->size, end = dr_file_size(f);
    int r = 0;
    if (!qcow2_has_data_file(q))
        return 0;
    if ((q->h.autoclear & QCOW2_DATA_RAW) && end > old)
        r = dr_file_zero(f, old, dr_min(end, size) - old, DR_FILE_ZERO_PUNCH, err);
    if (r == 0 && end < size && f->block_device)
        r = dr_fail(err, ENOSPC, "%s: a device of %llu bytes, the disk's data would need %llu",
                    f->path, ULL(end), ULL(size));
    else if (r == 0 && end < size)
        r = dr_file_truncate(f, size, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int grow(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t old = image->size, shown = dr_min(parent_size, size);
    int r = grow_l1(image, size, err);
    if (r == 0)
        r = clear_tail(image, err);
    if (r == 0)
        r = drop_range(image, old, size, err);
    if (r == 0 && shown > old)
        r = clear_range(image, dr_round_up(old, q->sub), dr_round_up(shown, q->cluster),
                        DR_WANT_ZERO, err);
    if (r == 0)
        r = dr_image_flush(image, err);
    if (r == 0)
        r = grow_data_file(image, size, err);
    return r < 0 ? r : switch_size(image, size, err);
}

static int shrink(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t old = image->size;
    int r = switch_size(image, size, err);
    if (r == 0)
        r = drop_range(image, size, old, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    if (r == 0 && (q->h.autoclear & QCOW2_DATA_RAW) && !image->files[q->data]->block_device)
        r = dr_file_truncate(image->files[q->data], size, err);
    return r;
}

int qcow2_clear_behind(struct dr_image *image, struct dr_error *err)
{
    return clear_range(image, dr_round_up(image->size, qcow2_of(image)->cluster), UINT64_MAX,
                       DR_WANT_HOLE, err);
}

int qcow2_check_size(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    int r = check_l1(image, size, err);
    return r < 0 || !qcow2_of(image)->bitmaps_at ? r : qcow2_track_check(image, size, err);
}

int qcow2_resize(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (size % 512)
        return dr_fail(err, EINVAL, "%s: The new size must be a multiple of 512", image->path);
    if (q->h.version < 3 && q->h.n_snapshots)
        return dr_fail(err, ENOTSUP, "%s: Can't resize a version 2 image which has snapshots",
                       image->path);
    uint64_t old = image->size;
    if (size == old)
        return 0;
    int r = q->bitmaps_at ? qcow2_track_all(image, size, err) : 0;
    if (r < 0)
        return r;
    r = size > old ? grow(image, size, parent_size, err) : shrink(image, size, err);
    int resized = image->size != old ? qcow2_track_resize(image, r < 0 ? NULL : err) : 0;
    /* What comes back after the disk was made smaller reads as zeros now, and not as before. */
    if (image->size > old)
        qcow2_changed(image, old, image->size - old);
    return r < 0 ? r : resized;
}
