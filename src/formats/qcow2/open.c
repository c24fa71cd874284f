/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening and closing, marking as being written, and the driver's table. */
#include "formats/qcow2/bitmap.h"
#include "formats/qcow2/compact.h"
#include "formats/qcow2/snapshot.h"
#include "formats/qcow2/stream-write.h"

#include "base/cleanup.h"

#define FIRST_READ 4096u /* header, extensions and names are rarely more */

static int qcow2_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    /* Version 1 is another format, of the same magic number. */
    return len >= 8 && get_be32(buf) == QCOW2_MAGIC && get_be32(buf + 4) >= 2 ? 100 : 0;
}

/* ------------------------------------------------------------------ the first cluster */

struct head {
    uint8_t *bytes;
    size_t len;
};

/* Read more of the first cluster: what follows the header does not end in what is there. */
static int head_read(struct dr_image *image, struct head *head, size_t want, struct dr_error *err)
{
    free(head->bytes);
    head->bytes = malloc(want);
    if (!head->bytes)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return dr_file_pread_short(image->files[0], head->bytes, 0, want, &head->len, err);
}

static int copy_text(struct dr_image *image, char **out, const uint8_t *text, size_t len,
                     const char *what, struct dr_error *err)
{
    if (memchr(text, 0, len))
        return dr_fail(err, EINVAL, "%s: the name of its %s contains a NUL", image->path, what);
    free(*out);
    *out = strndup((const char *)text, len);
    return *out ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
}

/* A repair opens the image all the same. */
static int refuse_bitmaps(struct dr_image *image, uint32_t len, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = 0;
    if (image->flags & DR_OPEN_AS_FOUND)
        q->bitmaps_bad = true;
    else if (len != 24)
        r = dr_fail(err, EINVAL, "%s: the bitmaps extension has %u bytes, expected 24", image->path,
                    len);
    else
        r = dr_fail(err, EINVAL,
                    "%s: the bitmaps extension is out of bounds: %u bitmaps, a directory of %llu "
                    "bytes at byte %llu",
                    image->path, q->n_bitmaps, ULL(q->bitmaps_len), ULL(q->bitmaps_at));
    q->n_bitmaps = 0;
    q->bitmaps_at = q->bitmaps_len = 0;
    return r;
}

static int take_bitmaps(struct dr_image *image, const uint8_t *data, uint32_t len,
                        struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (!(q->h.autoclear & QCOW2_BITMAPS))
        return 0; /* somebody wrote who does not know them: they mean nothing any more */
    if (len != 24)
        return refuse_bitmaps(image, len, err);
    q->n_bitmaps = get_be32(data);
    q->bitmaps_len = get_be64(data + 8);
    q->bitmaps_at = get_be64(data + 16);
    if (q->bitmaps_at % q->cluster || !q->bitmaps_at || q->bitmaps_len > QCOW2_MAX_BITMAP_DIR ||
        !q->n_bitmaps || q->n_bitmaps > QCOW2_MAX_BITMAPS || q->bitmaps_at > QCOW2_MAX_OFFSET)
        return refuse_bitmaps(image, len, err);
    return 0;
}

static int take_extension(struct dr_image *image, const struct head *head,
                          const struct qcow2_ext *ext, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    const uint8_t *data = head->bytes + ext->at;
    switch (ext->type) {
    case QCOW2_EXT_BACKING_FORMAT:
        return copy_text(image, &image->backing_format, data, ext->len, "backing format", err);
    case QCOW2_EXT_DATA_FILE:
        return copy_text(image, &q->data_name, data, ext->len, "data file", err);
    case QCOW2_EXT_BITMAPS:
        return take_bitmaps(image, data, ext->len, err);
    case QCOW2_EXT_CRYPTO:
        if (ext->len == 16) {
            q->crypto_at = get_be64(data);
            q->crypto_len = get_be64(data + 8);
        }
        return 0;
    default:
        return 0;
    }
}

/* -ERANGE: more of the cluster is needed. */
static int parse_head(struct dr_image *image, const struct head *head, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    const struct qcow2_header *h = &q->h;
    struct qcow2_ext ext = {0};
    int r;
    while ((r = qcow2_ext_next(h, image->path, head->bytes, head->len, &ext, err)) > 0)
        if ((r = take_extension(image, head, &ext, err)) < 0)
            return r;
    if (r < 0 || !h->backing_at || !h->backing_len)
        return r;
    if (h->backing_at + h->backing_len > head->len)
        return -ERANGE;
    return copy_text(image, &image->backing_name, head->bytes + h->backing_at, h->backing_len,
                     "backing file", err);
}

static void set_geometry(struct qcow2 *q)
{
    bool extended = q->h.incompatible & QCOW2_EXTL2;
    q->cluster = qcow2_cluster(&q->h);
    q->entry = extended ? 16 : 8;
    q->l2_bits = q->h.cluster_bits - (extended ? 4 : 3);
    q->l2_entries = q->cluster / q->entry;
    q->subs = extended ? QCOW2_SUBS : 1;
    q->sub = q->cluster / q->subs;
}

static int read_head(struct dr_image *image, struct head *head, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = head_read(image, head, FIRST_READ, err);
    if (r == 0)
        r = qcow2_header_decode(&q->h, image->path, head->bytes, head->len, err);
    if (r < 0)
        return r;
    set_geometry(q);
    r = qcow2_check_features(&q->h, image->path, head->bytes, head->len, err);
    if (r == 0)
        r = parse_head(image, head, err);
    if (r == -ERANGE && (r = head_read(image, head, q->cluster, err)) == 0)
        r = parse_head(image, head, err);
    if (r == -ERANGE)
        r = dr_fail(err, EINVAL, "%s: ends in its first cluster, after %zu bytes", image->path,
                    head->len);
    return r;
}

/* ------------------------------------------------------------------ open, close */

static int open_data_file(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    if (!qcow2_has_data_file(q) || (image->flags & DR_OPEN_RECORDED))
        return 0;
    if (!q->data_name && !image->data_file)
        return dr_fail(err, EINVAL, "%s: has its data in another file and does not say in which",
                       image->path);
    return dr_image_open_data_file(image, q->data_name ? q->data_name : "", &q->data, err);
}

/* Also asked when a parent is written to, which was opened for reading. */
static int refuse_corrupt(struct dr_image *image, struct dr_error *err)
{
    if (!(qcow2_of(image)->h.incompatible & QCOW2_CORRUPT) || (image->flags & DR_OPEN_AS_FOUND))
        return 0;
    return dr_fail(err, EACCES,
                   "%s: is marked as corrupt and can only be read; `drover check -r all` mends it",
                   image->path);
}

static int check_state(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    int r = image->writable ? refuse_corrupt(image, err) : 0;
    if (r == 0 && image->writable && !(image->flags & DR_OPEN_AS_FOUND))
        r = qcow2_header_check_reftable(&q->h, image->path, err);
    if (r < 0)
        return r;
    if ((q->h.autoclear & QCOW2_DATA_RAW) && qcow2_has_data_file(q) && image->backing_name)
        return dr_fail(err, EINVAL, "%s: a raw data file and a backing file exclude each other",
                       image->path);
    return 0;
}

static int qcow2_open(struct dr_image *image, struct dr_error *err)
{
    struct head head = {0};
    struct qcow2 *q = image->state = calloc(1, sizeof(*q));
    if (!q)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = read_head(image, &head, err);
    free(head.bytes);
    if (r < 0)
        return r;
    image->size = q->h.size;
    image->unclean = q->h.incompatible & QCOW2_DIRTY;
    if (!(q->h.incompatible & QCOW2_DATA_FILE))
        q->h.autoclear &= ~(uint64_t)QCOW2_DATA_RAW; /* it means nothing without */
    /* A program that writes to a raw data file writes to the disk, so each byte of the file must
     * be one of the disk's. */
    image->always_placed = q->h.autoclear & QCOW2_DATA_RAW;
    r = check_state(image, err);
    if (r == 0)
        r = open_data_file(image, err);
    return r < 0 ? r : qcow2_unlock(image, err);
}

static void qcow2_close(struct dr_image *image)
{
    struct qcow2 *q = image->state;
    if (!q)
        return;
    qcow2_track_forget(image);
    dr_file_unref(q->plain);
    free(q->reftable);
    free(q->damage);
    free(q->data_name);
    free(q->meta.slots);
    qcow2_views_free(q);
    free(q);
    image->state = NULL;
}

static void qcow2_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    const struct qcow2 *q = qcow2_of(image);
    *uoff = dr_round_down(off, q->cluster);
    *ulen = q->cluster;
}

/* ------------------------------------------------------------------ marks
 *
 * The order of writes keeps the image right without a mark that it is being written: a crash leaves
 * counts that are too high, nothing else. */

/* Version 2 has no such mark. */
static int note_damage(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = 0;
    if (q->h.version >= 3 && !q->damage_noted)
        r = qcow2_switch_bits(image, QCOW2_AT_INCOMPATIBLE, QCOW2_CORRUPT, 0, err);
    q->damage_noted = r == 0;
    return r < 0 ? r : qcow2_refuse_damaged(image, err);
}

/* Features that this driver does not keep up are cleared before anything they tell of changes. */
static int clear_features(struct dr_image *image, bool changes, struct dr_error *err)
{
    uint64_t clear = ~(uint64_t)QCOW2_AUTOCLEAR;
    if (changes && qcow2_of(image)->bitmaps_bad)
        clear |= QCOW2_BITMAPS;
    return qcow2_switch_bits(image, QCOW2_AT_AUTOCLEAR, 0, clear, err);
}

/* Counts of 1 bit cannot say that something is shared. Where two entries lead to one cluster and
 * each says that it is the only one, a write through the one changes what the other shows, and no
 * write can notice it. So all ways to each cluster are counted before the first write. A repair
 * knows already. */
static int refuse_sharing(struct dr_image *image, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    bool repairs = (image->flags & DR_OPEN_AS_FOUND) || (q->h.incompatible & QCOW2_DIRTY);
    if (q->marked || repairs || qcow2_max_count(q) > 1)
        return 0;
    return qcow2_refuse_low_counts(image, err);
}

static int qcow2_begin_write(struct dr_image *image, uint64_t off, bool changes,
                             struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    (void)off;
    pthread_mutex_lock(&image->lock);
    bool damaged = q->damage, move = q->reftable_moving = q->reftable_full;
    pthread_mutex_unlock(&image->lock);
    if (damaged)
        return note_damage(image, err);
    int r = refuse_corrupt(image, err);
    if (r == 0)
        r = refuse_sharing(image, err);
    if (r == 0)
        r = qcow2_load_reftable(image, err);
    if (r == 0)
        r = clear_features(image, changes, err);
    if (r == 0 && changes && !atomic_load(&q->editing))
        r = qcow2_track_begin(image, err);
    if (r == 0 && move)
        r = qcow2_grow_reftable(image, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    q->marked = true;
    q->changing |= changes;
    return 0;
}

static int qcow2_end_write(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = qcow2_track_end(image, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    q->marked = q->changing = false;
    return 0;
}

const struct dr_format dr_format_qcow2 = {
    .name = "qcow2",
    .flags = DR_FORMAT_BACKING | DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_PUNCH_FREED |
             DR_FORMAT_REPAIR_AS_FOUND | DR_FORMAT_PLANS | DR_FORMAT_ON_DEVICE |
             DR_FORMAT_KEEPS_ZEROED,
    .create_options = qcow2_create_options,
    .snapshot_suffix = "qcow2",
    .probe = qcow2_probe,
    .open = qcow2_open,
    .close = qcow2_close,
    .create = qcow2_create,
    .measure = qcow2_measure,
    .unit = qcow2_unit,
    .map = qcow2_map,
    .reserve = qcow2_reserve,
    .publish = qcow2_publish,
    .cancel = qcow2_cancel,
    .release = qcow2_release,
    .reuse = qcow2_reuse,
    .decode = qcow2_decode,
    .encode = qcow2_encode,
    .begin_write = qcow2_begin_write,
    .end_write = qcow2_end_write,
    .set_backing = qcow2_set_backing,
    .amend_options = qcow2_amend_options,
    .amend = qcow2_amend,
    .resize = qcow2_resize,
    .recover = qcow2_recover,
    .trim = qcow2_trim,
    .compact_begin = qcow2_compact_begin,
    .compact_moves = qcow2_compact_moves,
    .compact_spare = qcow2_compact_spare,
    .compact_length = qcow2_compact_length,
    .compact_finish = qcow2_compact_finish,
    .compact_end = qcow2_compact_end,
    .snapshot_create = qcow2_snapshot_create,
    .snapshot_apply = qcow2_snapshot_apply,
    .snapshot_delete = qcow2_snapshot_delete,
    .snapshot_list = qcow2_snapshot_list,
    .snapshot_show = qcow2_snapshot_show,
    .sequential = &qcow2_sequential,
    .bitmaps_inside = qcow2_bitmaps_inside,
    .bitmap_list = qcow2_bitmap_list,
    .bitmap_read = qcow2_bitmap_read,
    .bitmap_stored = qcow2_bitmap_stored,
    .bitmap_noted = qcow2_bitmap_noted,
    .bitmap_change = qcow2_bitmap_change,
    .bitmap_change_live = qcow2_bitmap_change_live,
    .changed = qcow2_changed,
    .views_begin = qcow2_views_begin,
    .views_hole = qcow2_views_hole,
    .views_fill = qcow2_views_fill,
    .views_end = qcow2_views_end,
    .info = qcow2_info,
    .encrypted = qcow2_encrypted,
    .check = qcow2_check,
    .orphans = qcow2_orphans,
};
