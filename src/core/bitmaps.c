/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Dirty bitmaps of an image: inside it where its format keeps them, else in a file beside it.
 *
 * The functions dr_image_bitmap_*() ask the driver if the image keeps its bitmaps inside. The rest
 * of this file keeps those in the file beside the image right, for all other formats alike:
 *
 * - First write: load the file; mark it as in use, durably; only then anything of the image
 * changes.
 * - Change: note the range in memory, under the lock of its units.
 * - Clean close: all of the image is durable; put the notes into the bitmaps, look at the image's
 *   files, and store both with a header that says that they are not in use.
 *
 * A bitmap lacks changes where a writer was interrupted (the file is still in use), or where a
 * program that does not know of it wrote to the image (its files do not look as they did at the
 * last clean close). Then all bitmaps of the file are distrusted: they are listed as inconsistent,
 * nothing reads them, and they can only be removed or rebuilt. */
#include <xxhash.h>

#include "base/bytes.h"
#include "core/bitmaps-internal.h"

#define SAMPLE 4096u

unsigned dr_noting_samples = 16;

/* ------------------------------------------------------------------ where */

bool dr_image_bitmaps_inside(const struct dr_image *image)
{
    const struct dr_format *fmt = image->fmt;
    return fmt->bitmap_list && (!fmt->bitmaps_inside || fmt->bitmaps_inside(image));
}

const char *dr_bitmaps_no_place(const struct dr_image *image)
{
    if (!(image->fmt->flags & DR_FORMAT_WRITE) || image->member || image->contained)
        return "is of a format that is only read, and has no bitmaps";
    if (image->files[0]->part)
        return "is a part of a file, beside which a file of bitmaps would belong to all of it";
    if (image->files[0]->block_device)
        return "is a block device, which has no place beside it for a file of bitmaps";
    return NULL;
}

/* Beside the file itself: a link to the image may stand elsewhere. */
static int beside(struct dr_image *image, char **path, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    struct dr_fs *fs = image->fs;
    struct dr_file *file = dr_image_file(image, 0);
    int r = dr_file_where(fs, file, &real, err);
    if (r == -ENOTSUP)
        r = fs->ops->realpath(fs, file->path, &real, err);
    dr_file_unpin(file);
    *path = NULL;
    if (r < 0)
        return r;
    if (asprintf(path, "%s" DR_BITMAP_FILE_SUFFIX, real) >= 0)
        return 0;
    *path = NULL;
    return dr_fail_errno(err, ENOMEM, "%s", image->path);
}

int dr_bitmaps_unlink(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    CLEANUP_FREE char *name = NULL;
    enum dr_name_kind kind;
    if (asprintf(&name, "%s" DR_BITMAP_FILE_SUFFIX, path) < 0)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    if (dr_look(fs, name, &kind, NULL, NULL) < 0 || kind == DR_NAME_DIR)
        return 0;
    return fs->ops->unlink(fs, name, err);
}

/* ------------------------------------------------------------------ what the image looks like */

/* Some bytes of the file, from its beginning to its end: for a file that was put back with its old
 * times. */
static int sample(struct dr_file *f, unsigned pieces, uint64_t *hash, struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    uint8_t bytes[SAMPLE];
    int r = 0;
    *hash = 0;
    for (unsigned i = 0; r == 0 && i < pieces && size; i++) {
        uint64_t last = size > SAMPLE ? size - SAMPLE : 0;
        uint64_t off = pieces > 1 ? last / (pieces - 1) * i : 0;
        r = dr_file_pread_short(f, bytes, i + 1 == pieces ? last : off, sizeof(bytes), NULL, err);
        *hash = XXH3_64bits_withSeed(bytes, sizeof(bytes), *hash);
        if (!last)
            break;
    }
    return r;
}

static int look_at_file(struct dr_file *f, unsigned pieces, bool settle,
                        struct dr_noted_file *looks, struct dr_error *err)
{
    int r = dr_file_stamp(f, settle, &looks->stamp, err);
    return r < 0 ? r : sample(f, pieces, &looks->sample, err);
}

/* Those that it will have when it is opened again. settle: as dr_file_stamp. *files is malloc'ed.
 */
static int look_at_files(struct dr_image *image, bool settle, struct dr_noted_file **files,
                         uint32_t *n, struct dr_error *err)
{
    unsigned pieces = image->n_files > 1 ? dr_noting_samples / 4 : dr_noting_samples;
    int r = 0;
    *n = 0;
    *files = NULL;
    if (image->n_files > DR_BITMAP_FILE_FILES)
        return dr_fail(err, EFBIG, "%s: has %u files, bitmaps beside it go with at most %u",
                       image->path, image->n_files, DR_BITMAP_FILE_FILES);
    *files = calloc(image->n_files, sizeof(**files));
    if (!*files)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (unsigned i = 0; r == 0 && i < image->n_files; i++) {
        struct dr_file *f = dr_image_file(image, i);
        if (!atomic_load(&f->unlinked))
            r = look_at_file(f, pieces, settle, &(*files)[(*n)++], err);
        dr_file_unpin(f);
    }
    if (r < 0)
        free(DR_STEAL(*files));
    return r;
}

/* 0 = one of them is not known. */
static bool same(uint64_t a, uint64_t b)
{
    return a == b || !a || !b;
}

static bool same_file(const struct dr_noted_file *a, const struct dr_noted_file *b)
{
    return a->stamp.size == b->stamp.size && same(a->stamp.mtime, b->stamp.mtime) &&
           same(a->stamp.ctime, b->stamp.ctime) && same(a->stamp.ino, b->stamp.ino) &&
           same(a->sample, b->sample);
}

static int looks_the_same(struct dr_image *image, const struct dr_bitmap_file *b, bool *is,
                          struct dr_error *err)
{
    struct dr_noted_file *files = NULL;
    uint32_t n = 0;
    int r = b->disk == image->size ? look_at_files(image, false, &files, &n, err) : 0;
    *is = n > 0 && n == b->n_files;
    for (unsigned i = 0; r == 0 && *is && i < b->n_files; i++)
        *is = same_file(&files[i], &b->files[i]);
    free(files);
    return r;
}

/* ------------------------------------------------------------------ trust */

void dr_bitmaps_distrust(struct dr_bitmap_file *b, enum dr_distrust why)
{
    for (uint32_t i = 0; i < b->n; i++)
        if (b->list[i].distrust == DR_TRUSTED)
            b->list[i].distrust = why;
}

static bool any_trusted(const struct dr_bitmap_file *b)
{
    for (uint32_t i = 0; i < b->n; i++)
        if (b->list[i].distrust == DR_TRUSTED)
            return true;
    return false;
}

int dr_bitmaps_load(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL;
    bool as_left = true;
    *b = (struct dr_bitmap_file){0};
    int r = beside(image, &path, err);
    if (r == 0)
        r = dr_bitmap_file_load(image->fs, path, b, err);
    if (r == -ENOENT && path && !b->path)
        b->path = DR_STEAL(path);
    if (r < 0)
        return r;
    if (b->in_use)
        dr_bitmaps_distrust(b, DR_UNCLEAN);
    else
        r = looks_the_same(image, b, &as_left, err);
    if (!as_left)
        dr_bitmaps_distrust(b, DR_FOREIGN);
    return r;
}

static const char *reason(enum dr_distrust why)
{
    return why == DR_UNCLEAN   ? "the disk was not closed after writing"
           : why == DR_FOREIGN ? "the image was changed by another program, copied or put back"
                               : NULL;
}

bool dr_bitmaps_left_in_use(struct dr_image *image)
{
    struct dr_bitmap_file b = {0};
    CLEANUP_FREE char *path = NULL;
    bool left = false;
    if (!dr_image_bitmaps_inside(image) && !dr_bitmaps_no_place(image) &&
        beside(image, &path, NULL) == 0)
        left = dr_bitmap_file_load(image->fs, path, &b, NULL) == 0 && b.in_use;
    dr_bitmap_file_free(&b);
    return left;
}

int dr_bitmaps_settle(struct dr_image *image, struct dr_error *err)
{
    struct dr_bitmap_file b;
    DR_LOCK_SCOPE(&image->begin_lock);
    int r = dr_bitmaps_load(image, &b, err);
    if (r == 0)
        r = dr_bitmaps_store_clean(image, &b, err);
    dr_bitmap_file_free(&b);
    return r;
}

/* ------------------------------------------------------------------ noting */

struct dr_noting *dr_noting_new(void)
{
    struct dr_noting *n = calloc(1, sizeof(*n));
    if (n)
        dr_marks_init(&n->marks, DR_BITMAP_FILE_MAX_BITS);
    return n;
}

void dr_noting_free(struct dr_noting *n)
{
    if (!n)
        return;
    dr_bitmap_file_free(&n->file);
    dr_marks_free(&n->marks);
    free(n);
}

void dr_noting_drop(struct dr_image *image)
{
    dr_noting_free(DR_STEAL(image->noting));
    image->noting_begun = false;
}

static void look_for_enabled(struct dr_noting *n, const struct dr_noted *list, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (list[i].enabled && list[i].distrust == DR_TRUSTED) {
            n->marks.bits = (unsigned)dr_min(n->marks.bits, list[i].set->bits);
            n->marking = true;
        }
}

int dr_noting_marks(struct dr_noting *n, uint64_t size, const struct dr_noted *also,
                    uint32_t n_also)
{
    dr_marks_free(&n->marks);
    dr_marks_init(&n->marks, DR_BITMAP_FILE_MAX_BITS);
    n->marking = false;
    look_for_enabled(n, n->file.list, n->file.n);
    look_for_enabled(n, also, n_also);
    int r = n->marking ? dr_marks_cover(&n->marks, size) : 0;
    n->marks.all = r < 0;
    return r;
}

/* *n NULL: there are no bitmaps that could be kept right. */
static int noting_open(struct dr_image *image, struct dr_noting **n, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    *n = NULL;
    if (dr_image_bitmaps_inside(image) || dr_bitmaps_no_place(image))
        return 0;
    struct dr_noting *fresh = dr_noting_new();
    if (!fresh)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_bitmaps_load(image, &fresh->file, &why);
    if (r == 0)
        r = dr_noting_marks(fresh, image->size, NULL, 0);
    if (r == 0)
        *n = fresh;
    else
        dr_noting_free(fresh);
    if (r == 0 || r == -ENOENT || r == -EBADMSG) /* nothing trusts a damaged file */
        return 0;
    return why.errnum ? dr_fail(err, -r, "%s", why.text)
                      : dr_fail_errno(err, -r, "%s: its bitmaps", image->path);
}

int dr_noting_begin(struct dr_image *image, struct dr_error *err)
{
    if (image->noting_begun)
        return 0;
    struct dr_noting *n = image->noting;
    int r = n ? 0 : noting_open(image, &n, err);
    if (r < 0)
        return r;
    image->noting = n;
    /* That all are distrusted must last, and why: the image is about to look different. */
    if (n && any_trusted(&n->file))
        r = dr_bitmap_file_use(&n->file, image->files[0], err);
    else if (n && n->file.n && !n->file.in_use)
        r = dr_bitmap_file_store(&n->file, true, image->files[0], err);
    image->noting_begun = r == 0;
    return r;
}

void dr_noting_changed(struct dr_image *image, uint64_t off, uint64_t len)
{
    if (image->noting->marking)
        dr_marks_set(&image->noting->marks, off, len);
}

void dr_noting_everything(struct dr_image *image)
{
    if (image->noting)
        image->noting->marks.all = true;
}

int dr_bitmaps_set_range(void *user, uint64_t off, uint64_t len)
{
    dr_marks_set(user, off, len);
    return 0;
}

void dr_noting_put(const struct dr_image *image, struct dr_noting *n)
{
    for (uint32_t i = 0; n->marking && i < n->file.n; i++) {
        struct dr_noted *one = &n->file.list[i];
        if (one->enabled && one->distrust == DR_TRUSTED)
            dr_marks_each(&n->marks, image->size, dr_bitmaps_set_range, one->set);
    }
}

int dr_bitmaps_store_clean(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    struct dr_noted_file *files;
    uint32_t n;
    int r = look_at_files(image, true, &files, &n, err);
    if (r < 0)
        return r;
    free(b->files);
    b->files = files;
    b->n_files = n;
    b->disk = image->size;
    return dr_bitmap_file_store(b, false, image->files[0], err);
}

int dr_noting_end(struct dr_image *image, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    struct dr_noting *n = image->noting;
    int r = 0;
    image->noting_begun = false; /* after a failure the header may say anything: mark it again */
    if (n && any_trusted(&n->file)) {
        dr_noting_put(image, n);
        r = dr_bitmaps_store_clean(image, &n->file, err);
    }
    if (r == 0)
        dr_noting_drop(image);
    return r;
}

/* ------------------------------------------------------------------ another size */

int dr_bitmaps_check_bytes(const struct dr_image *image, uint64_t bytes, struct dr_error *err)
{
    if (bytes <= DR_BITMAP_FILE_BYTES)
        return 0;
    return dr_fail(err, EFBIG,
                   "%s: the bitmaps beside it would take %llu bytes together, at most %llu are "
                   "possible; remove one, or take a larger granularity",
                   image->path, (unsigned long long)bytes,
                   (unsigned long long)DR_BITMAP_FILE_BYTES);
}

uint64_t dr_bitmaps_bytes(uint64_t size, unsigned bits)
{
    return (size / 8 >> bits) + 1;
}

int dr_noting_check_size(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    const struct dr_noting *n = image->noting;
    uint64_t bytes = 0;
    for (uint32_t i = 0; n && i < n->file.n; i++)
        bytes += dr_bitmaps_bytes(size, n->file.list[i].set->bits);
    return dr_bitmaps_check_bytes(image, bytes, err);
}

void dr_noting_resized(struct dr_image *image, uint64_t old)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    struct dr_noting *n = image->noting;
    uint64_t size = image->size;
    if (!n || size == old)
        return;
    n->file.disk = size;
    for (uint32_t i = 0; i < n->file.n; i++) {
        struct dr_noted *one = &n->file.list[i];
        if (dr_marks_cover(one->set, size) < 0 && one->distrust == DR_TRUSTED)
            one->distrust = DR_UNCLEAN; /* no memory for the bits of what is new */
        dr_marks_cut(one->set, size);
    }
    if (n->marking && dr_marks_cover(&n->marks, size) < 0)
        n->marks.all = true;
    if (size > old && n->marking) /* zeros now, whatever a backup of a larger disk has there */
        dr_marks_set(&n->marks, old, size - old);
}

/* ------------------------------------------------------------------ asking */

/* The bitmaps as they are: those in memory while the image is written to, else those on disk. */
struct view {
    struct dr_bitmap_file own;
    const struct dr_bitmap_file *b;
    bool live;
};

/* begin_lock held until the view is closed. */
static int view_open(struct dr_image *image, struct view *v, struct dr_error *err)
{
    const char *why = dr_bitmaps_no_place(image);
    *v = (struct view){.b = &v->own};
    if (why)
        return dr_fail(err, ENOTSUP, "%s: %s", image->path, why);
    if (image->noting) {
        v->b = &image->noting->file;
        v->live = true;
        return 0;
    }
    int r = dr_bitmaps_load(image, &v->own, err);
    return r == -ENOENT ? 0 : r;
}

static void view_close(struct view *v)
{
    dr_bitmap_file_free(&v->own);
}

static int list_beside(struct dr_image *image, dr_bitmap_each each, void *user,
                       struct dr_error *err)
{
    struct view v;
    int r = view_open(image, &v, err);
    for (uint32_t i = 0; r == 0 && i < v.b->n; i++) {
        const struct dr_noted *one = &v.b->list[i];
        const struct dr_bitmap_info info = {
            .name = one->name,
            .granularity = UINT64_C(1) << one->set->bits,
            .enabled = one->enabled,
            .inconsistent = one->distrust != DR_TRUSTED || (v.live && one->enabled),
            .noting = one->distrust == DR_TRUSTED && v.live && one->enabled,
            .distrust = reason(one->distrust),
        };
        r = each(user, &info);
    }
    view_close(&v);
    return r;
}

int dr_bitmaps_unusable(const char *name, struct dr_error *err)
{
    return dr_fail(err, EUCLEAN, "Bitmap '%s' is inconsistent and cannot be used", name);
}

static int read_beside(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                       struct dr_error *err)
{
    struct view v;
    DR_LOCK_SCOPE(&image->begin_lock);
    int r = view_open(image, &v, err);
    const struct dr_noted *one = r == 0 ? dr_bitmap_file_find(v.b, name) : NULL;
    if (r == 0 && !one)
        r = dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
    else if (r == 0 && (one->distrust != DR_TRUSTED || (v.live && one->enabled)))
        r = dr_bitmaps_unusable(name, err);
    if (r == 0)
        r = dr_marks_each(one->set, image->size, each, user);
    view_close(&v);
    return r;
}

int dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                         struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    return dr_image_bitmaps_inside(image) ? image->fmt->bitmap_list(image, each, user, err)
                                          : list_beside(image, each, user, err);
}

int dr_image_bitmap_read(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                         struct dr_error *err)
{
    return dr_image_bitmaps_inside(image) ? image->fmt->bitmap_read(image, name, each, user, err)
                                          : read_beside(image, name, each, user, err);
}

/* ------------------------------------------------------------------ while it is written to */

static int stored_beside(struct dr_image *image, const char *name, struct dr_marks *into,
                         bool *enabled, struct dr_error *err)
{
    struct view v;
    int r = view_open(image, &v, err);
    const struct dr_noted *one = r == 0 ? dr_bitmap_file_find(v.b, name) : NULL;
    if (r == 0 && !one)
        r = dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
    else if (r == 0 && one->distrust != DR_TRUSTED)
        r = dr_bitmaps_unusable(name, err);
    if (r == 0) {
        *enabled = one->enabled;
        dr_marks_each(one->set, image->size, dr_bitmaps_set_range, into);
    }
    view_close(&v);
    return r;
}

int dr_image_bitmap_stored(struct dr_image *image, const char *name, struct dr_marks *into,
                           bool *enabled, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    return dr_image_bitmaps_inside(image)
               ? image->fmt->bitmap_stored(image, name, dr_bitmaps_set_range, into, enabled, err)
               : stored_beside(image, name, into, enabled, err);
}

void dr_image_bitmap_noted(struct dr_image *image, struct dr_marks *into)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    const struct dr_marks *marks = dr_image_bitmaps_inside(image) ? image->fmt->bitmap_noted(image)
                                   : image->noting && image->noting->marking ? &image->noting->marks
                                                                             : NULL;
    if (marks)
        dr_marks_each(marks, image->size, dr_bitmaps_set_range, into);
}
