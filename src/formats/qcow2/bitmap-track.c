/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Keeping bitmaps right while the disk is written to.
 *
 * Before the first change of an open, every enabled bitmap is marked as in use, durably. From then
 * on marks are kept in memory: one set for all bitmaps, as fine as the finest of them. When the
 * image is closed the marks go into each bitmap, become durable, and only then the bitmaps are no
 * longer in use. A process that is killed in between leaves them in use: nobody relies on them any
 * more. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"
#include "core/marks.h"

struct qcow2_track {
    bool *ours; /* of the directory's bitmaps: which of them we have marked */
    uint32_t n; /* in the directory */
    struct dr_marks marks;
    bool lost;     /* the bitmaps do not go with the disk any more */
    bool doubtful; /* a write of the flags failed: they may say that none is in use */
    bool begins;   /* it is going to be the image's, with marks of its own */
};

/* ------------------------------------------------------------------ marks */

void qcow2_track_free(struct qcow2_track *t)
{
    if (!t)
        return;
    dr_marks_free(&t->marks);
    free(t->ours);
    free(t);
}

void qcow2_changed(struct dr_image *image, uint64_t off, uint64_t len)
{
    struct qcow2_track *t = qcow2_of(image)->track;
    if (t)
        dr_marks_set(&t->marks, off, len);
}

bool qcow2_track_has(const struct dr_image *image, uint32_t i)
{
    const struct qcow2_track *t = qcow2_of(image)->track;
    return t && !t->lost && i < t->n && t->ours[i];
}

const struct dr_marks *qcow2_bitmap_noted(const struct dr_image *image)
{
    const struct qcow2_track *t = qcow2_of(image)->track;
    return t ? &t->marks : NULL;
}

/* ------------------------------------------------------------------ flags of the directory */

/* Write the flags of the bitmaps that are ours, each of which lies inside a sector. */
static int write_flags(struct dr_image *image, const struct qcow2_track *t,
                       struct qcow2_bitmaps *dir, uint32_t set, uint32_t clear,
                       struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_file *f = image->files[0];
    size_t from = dir->len, to = 0;
    for (uint32_t i = 0; i < dir->n; i++) {
        struct qcow2_bitmap *b = &dir->list[i];
        size_t at = b->at + QCOW2_BITMAP_AT_FLAGS;
        if (!t->ours[i])
            continue;
        b->flags = (b->flags | set) & ~clear;
        put_be32(dir->bytes + at, b->flags);
        from = dr_min(from, at);
        to = at + 4;
    }
    int r = from < to ? dr_file_pwrite(f, dir->bytes + from, q->bitmaps_at + from, to - from, err)
                      : 0;
    return r < 0 ? r : dr_file_flush(f, err);
}

/* Nothing else than the bitmap uses these clusters: they are going to be written to. */
static int check_own(struct dr_image *image, uint64_t at, uint64_t len, const char *what,
                     struct dr_error *err)
{
    uint64_t cluster = qcow2_of(image)->cluster, count = 1;
    int r = 0;
    for (uint64_t i = at; r == 0 && count == 1 && i < at + len; i += cluster)
        r = qcow2_count_now(image, i, &count, err);
    if (r < 0 || count == 1)
        return r;
    return dr_fail(
        err, EIO,
        "%s: %s at byte %llu is counted %llu times, expected once; `drover check -r all` "
        "mends it",
        image->path, what, ULL(at), ULL(count));
}

static int check_tracked(struct dr_image *image, const struct qcow2_bitmaps *dir,
                         const struct qcow2_bitmap *b, struct dr_error *err)
{
    CLEANUP_FREE uint64_t *table = NULL;
    if (qcow2_bitmap_foreign(b))
        return dr_fail(err, ENOTSUP,
                       "%s: the bitmap \"%.*s\" has extra data that this version does not know, so "
                       "it would not notice what is written; `drover bitmap --remove` removes it",
                       image->path, (int)b->name_len, qcow2_bitmap_name(dir, b));
    int r = check_own(image, b->table_at, b->entries * UINT64_C(8), "a bitmap's table", err);
    return r < 0 ? r : qcow2_bitmap_load_table(image, b, &table, err);
}

/* ------------------------------------------------------------------ beginning */

static int table_order(const void *a, const void *b)
{
    const struct qcow2_bitmap *x = *(const struct qcow2_bitmap *const *)a;
    const struct qcow2_bitmap *y = *(const struct qcow2_bitmap *const *)b;
    return (x->table_at > y->table_at) - (x->table_at < y->table_at);
}

static bool is_wanted(const struct qcow2_track *t, const struct qcow2_bitmap *b, uint32_t i,
                      bool disabled)
{
    return !t->ours[i] && !(b->flags & QCOW2_BITMAP_IN_USE) &&
           (disabled || (b->flags & QCOW2_BITMAP_AUTO));
}

/* Their tables do not overlap: all of them together are no longer than the file. Reorders them. */
static int check_apart(struct dr_image *image, const struct qcow2_bitmaps *dir,
                       const struct qcow2_bitmap **wanted, size_t n, struct dr_error *err)
{
    qsort(wanted, n, sizeof(*wanted), table_order);
    for (size_t i = 1; i < n; i++) {
        const struct qcow2_bitmap *a = wanted[i - 1], *b = wanted[i];
        if (a->table_at + a->entries * UINT64_C(8) > b->table_at)
            return dr_fail(err, EIO,
                           "%s: the tables of the bitmaps \"%.*s\" and \"%.*s\" overlap at byte "
                           "%llu; after `drover check -r all` one of them can be removed",
                           image->path, (int)a->name_len, qcow2_bitmap_name(dir, a),
                           (int)b->name_len, qcow2_bitmap_name(dir, b), ULL(b->table_at));
    }
    return 0;
}

static int check_wanted(struct dr_image *image, const struct qcow2_bitmaps *dir,
                        const struct qcow2_bitmap **wanted, size_t n, struct dr_error *err)
{
    int r = check_apart(image, dir, wanted, n, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        r = check_tracked(image, dir, wanted[i], err);
    return r < 0 ? r
                 : check_own(image, qcow2_of(image)->bitmaps_at, dir->len, "the bitmap directory",
                             err);
}

static int mark_in_use(struct dr_image *image, struct qcow2_track *t, struct qcow2_bitmaps *dir,
                       struct dr_error *err)
{
    t->doubtful = true;
    int r = write_flags(image, t, dir, QCOW2_BITMAP_IN_USE, 0, err);
    t->doubtful = r < 0;
    return r;
}

/* Those that are enabled and, with disabled, the others, too, are ours from now on. A failure
 * before their flags are written leaves t as it was. */
static int take_bitmaps(struct dr_image *image, struct qcow2_track *t, struct qcow2_bitmaps *dir,
                        bool disabled, struct dr_error *err)
{
    CLEANUP_FREE const struct qcow2_bitmap **wanted = malloc((dir->n + 1) * sizeof(*wanted));
    size_t n = 0;
    if (!wanted)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint32_t i = 0; i < dir->n; i++) {
        const struct qcow2_bitmap *b = &dir->list[i];
        if (!is_wanted(t, b, i, disabled))
            continue;
        wanted[n++] = b;
        if (b->flags & QCOW2_BITMAP_AUTO)
            t->marks.bits = (unsigned)dr_min(t->marks.bits, b->granularity_bits);
    }
    int r = n ? check_wanted(image, dir, wanted, n, err) : 0;
    if (r == 0 && n && !disabled && dr_marks_cover(&t->marks, image->size) < 0)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r < 0 || !n)
        return r;
    for (uint32_t i = 0; i < dir->n; i++)
        t->ours[i] |= is_wanted(t, &dir->list[i], i, disabled);
    return mark_in_use(image, t, dir, err);
}

static bool any_ours(const struct qcow2_track *t)
{
    for (uint32_t i = 0; i < t->n; i++)
        if (t->ours[i])
            return true;
    return false;
}

static struct qcow2_track *track_new(uint32_t n)
{
    struct qcow2_track *t = calloc(1, sizeof(*t));
    if (!t)
        return NULL;
    dr_marks_init(&t->marks, QCOW2_BITMAP_MAX_BITS);
    t->n = n;
    t->ours = calloc(n ? n : 1, sizeof(*t->ours));
    if (t->ours)
        return t;
    qcow2_track_free(t);
    return NULL;
}

int qcow2_track_begin(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    if (!q->bitmaps_at || (q->track && !q->track->doubtful))
        return 0;
    int r = qcow2_bitmaps_load(image, &dir, err);
    if (r < 0)
        return r;
    if (q->track)
        return mark_in_use(image, q->track, &dir, err);
    struct qcow2_track *t = track_new(dir.n);
    if (!t)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = take_bitmaps(image, t, &dir, false, err);
    if (any_ours(t)) /* also when it is not certain that the flags were written */
        q->track = t;
    else
        qcow2_track_free(t);
    return r;
}

/* ------------------------------------------------------------------ storing */

static int store_range(void *user, uint64_t off, uint64_t len)
{
    struct qcow2_bits *bits = user;
    return qcow2_bits_set(bits, off, len, bits->err);
}

/* Only what the table gained is written: entries that led nowhere before, or elsewhere. */
static int store_table(struct qcow2_bits *bits, struct dr_error *err)
{
    struct dr_image *image = bits->image;
    const struct qcow2_bitmap *b = &bits->bitmap;
    if (!bits->table_changed)
        return 0;
    int r = dr_image_flush(image, err); /* counts and bits */
    for (uint64_t i = 0; i < b->entries; i++)
        put_be64(&bits->table[i], bits->table[i]);
    if (r == 0)
        r = dr_file_pwrite(image->files[0], bits->table, b->table_at, b->entries * UINT64_C(8),
                           err);
    if (r == 0)
        r = dr_file_flush(image->files[0], err);
    return r < 0 ? r : qcow2_places_lose(image, &bits->left, err);
}

static int store_one(struct dr_image *image, const struct qcow2_track *t,
                     const struct qcow2_bitmap *b, struct dr_error *err)
{
    struct qcow2_bits bits = {0};
    int r = qcow2_bits_open(&bits, image, b, true, err);
    bits.err = err;
    if (r == 0)
        r = dr_marks_each(&t->marks, image->size, store_range, &bits);
    if (r == 0)
        r = qcow2_bits_store(&bits, err);
    if (r == 0)
        r = store_table(&bits, err);
    qcow2_bits_close(&bits);
    return r;
}

int qcow2_track_end(struct dr_image *image, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_track *t = q->track;
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    if (!t)
        return 0;
    int r = t->lost || q->damage ? 0 : qcow2_bitmaps_load(image, &dir, err);
    for (uint32_t i = 0; r == 0 && i < dir.n; i++)
        if (t->ours[i] && (dir.list[i].flags & QCOW2_BITMAP_AUTO))
            r = store_one(image, t, &dir.list[i], err);
    if (r == 0 && dir.n)
        r = dr_image_flush_all(image, err);
    if (r == 0 && dir.n) {
        t->doubtful = true;
        r = write_flags(image, t, &dir, 0, QCOW2_BITMAP_IN_USE, err);
    }
    if (r < 0)
        return r;
    qcow2_track_forget(image);
    return 0;
}

void qcow2_track_forget(struct dr_image *image)
{
    struct qcow2 *q = qcow2_of(image);
    qcow2_track_free(q->track);
    q->track = NULL;
}

/* ------------------------------------------------------------------ another directory */

bool qcow2_track_is_sound(const struct dr_image *image)
{
    const struct qcow2_track *t = qcow2_of(image)->track;
    return !t || !(t->lost || t->doubtful);
}

static bool is_tracked(const struct qcow2_track *t, const struct qcow2_bitmap_edit *e, uint32_t i)
{
    return t->ours[i] && (e->list[i].b.flags & QCOW2_BITMAP_AUTO);
}

struct qcow2_track *qcow2_track_next(const struct qcow2_bitmap_edit *e,
                                     const struct qcow2_bitmap_draft *added, uint32_t removed)
{
    const struct qcow2_track *t = qcow2_of(e->image)->track;
    struct qcow2_track *next = track_new(e->n);
    if (!next)
        return NULL;
    next->begins = added && (added->b.flags & QCOW2_BITMAP_AUTO);
    for (uint32_t i = 0; i < e->n; i++) {
        uint32_t was = i + (!added && i >= removed);
        next->ours[i] = &e->list[i] == added ? next->begins : t && was < t->n && t->ours[was];
        if (is_tracked(next, e, i))
            next->marks.bits = (unsigned)dr_min(next->marks.bits, e->list[i].b.granularity_bits);
    }
    if (!next->begins || dr_marks_cover(&next->marks, e->image->size) == 0)
        return next;
    qcow2_track_free(next);
    return NULL;
}

struct qcow2_track *qcow2_track_exchange(struct dr_image *image, struct qcow2_track *next)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_track *t = q->track;
    if (next->begins) {
        q->track = next;
        return t;
    }
    if (t) { /* the marks stay */
        bool *ours = t->ours;
        t->ours = next->ours;
        t->n = next->n;
        next->ours = ours;
    }
    return next;
}

static int note_range(void *user, uint64_t off, uint64_t len)
{
    qcow2_changed(user, off, len);
    return 0;
}

int qcow2_track_store(struct dr_image *image, const struct qcow2_track *t, struct dr_error *err)
{
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    int r = qcow2_bitmaps_load(image, &dir, err);
    for (uint32_t i = 0; r == 0 && i < dir.n && i < t->n; i++)
        if (t->ours[i] && (dir.list[i].flags & QCOW2_BITMAP_AUTO))
            r = store_one(image, t, &dir.list[i], err);
    if (r < 0)
        dr_marks_each(&t->marks, image->size, note_range, image);
    return r;
}

/* ------------------------------------------------------------------ another size */

static int check_resizable(struct dr_image *image, const struct qcow2_track *t,
                           const struct qcow2_bitmaps *dir, uint64_t size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    for (uint32_t i = 0; i < dir->n; i++) {
        const struct qcow2_bitmap *b = &dir->list[i];
        int len = (int)b->name_len;
        const char *name = qcow2_bitmap_name(dir, b);
        if ((b->flags & QCOW2_BITMAP_IN_USE) && !(t && t->ours[i]))
            return dr_fail(err, ENOTSUP,
                           "%s: Bitmap '%.*s' is inconsistent and cannot be used; `drover bitmap "
                           "--remove` removes it",
                           image->path, len, name);
        if (qcow2_bitmap_entries(q, size, b->granularity_bits) * q->cluster >
            QCOW2_MAX_BITMAP_BYTES)
            return dr_fail(err, EFBIG,
                           "%s: Bitmap '%.*s' is too big for a disk of %llu bytes; `drover bitmap "
                           "--remove` removes it",
                           image->path, len, name, ULL(size));
    }
    return 0;
}

int qcow2_track_check(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    int r = qcow2_bitmaps_load(image, &dir, err);
    return r < 0 ? r : check_resizable(image, qcow2_of(image)->track, &dir, size, err);
}

int qcow2_track_all(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_BITMAPS struct qcow2_bitmaps dir = {0};
    struct qcow2_track *t = q->track;
    int r = qcow2_bitmaps_load(image, &dir, err);
    if (r == 0)
        r = check_resizable(image, t, &dir, size, err);
    if (r < 0 || !dir.n)
        return r;
    if (!t && !(t = track_new(dir.n)))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = take_bitmaps(image, t, &dir, true, err);
    if (any_ours(t))
        q->track = t;
    else if (t != q->track)
        qcow2_track_free(t);
    return r;
}

static int resize_table(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d, uint64_t size,
                        struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(e->image);
    uint64_t n = dr_max(1, qcow2_bitmap_entries(q, size, d->b.granularity_bits));
    uint64_t *table = calloc(n, sizeof(*table));
    struct qcow2_bits bits = {0};
    int r = table ? qcow2_bits_open(&bits, e->image, &d->b, true, err)
                  : dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (r == 0)
        r = qcow2_bits_cut(&bits, size, err);
    if (r == 0)
        memcpy(table, bits.table, dr_min(n, d->b.entries) * sizeof(*table));
    if (r == 0)
        r = qcow2_edit_taken(e, &bits, err);
    if (r == 0)
        r = qcow2_edit_table(e, d, DR_STEAL(table), n, err);
    free(table);
    qcow2_bits_close(&bits);
    return r;
}

int qcow2_track_resize(struct dr_image *image, struct dr_error *err)
{
    struct qcow2_track *t = qcow2_of(image)->track;
    struct qcow2_bitmap_edit e;
    if (!t)
        return 0;
    int r = qcow2_edit_begin(&e, image, err);
    for (uint32_t i = 0; r == 0 && i < e.n; i++)
        if (t->ours[i])
            r = resize_table(&e, &e.list[i], image->size, err);
    if (r == 0)
        r = qcow2_edit_commit(&e, err);
    else
        qcow2_places_lose(image, &e.taken, NULL);
    qcow2_edit_end(&e);
    if (r == 0 && t->marks.pages && dr_marks_cover(&t->marks, image->size) < 0)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    t->lost |= r < 0;
    return r;
}

void qcow2_track_everything(struct dr_image *image)
{
    struct qcow2_track *t = qcow2_of(image)->track;
    if (t)
        t->marks.all = true;
}
