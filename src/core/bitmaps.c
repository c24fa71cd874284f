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
#include "core/bitmap-file.h"
#include "core/internal.h"

#define SAMPLE              4096u
#define DEFAULT_GRANULARITY UINT64_C(65536)
#define MAX_GRANULARITY     (UINT64_C(1) << DR_BITMAP_FILE_MAX_BITS)

unsigned dr_noting_samples = 16;

/* While the image is written to. */
struct dr_noting {
    struct dr_bitmap_file file;
    struct dr_marks marks; /* what changed since the bitmaps were stored, as fine as the finest */
    bool marking;          /* an enabled bitmap wants to know */
};

/* ------------------------------------------------------------------ where */

bool dr_image_bitmaps_inside(const struct dr_image *image)
{
    const struct dr_format *fmt = image->fmt;
    return fmt->bitmap_list && (!fmt->bitmaps_inside || fmt->bitmaps_inside(image));
}

/* NULL, or why the image can have no file of bitmaps. */
static const char *no_place(const struct dr_image *image)
{
    if (!(image->fmt->flags & DR_FORMAT_WRITE) || image->member)
        return "is of a format that is only read, and has no bitmaps";
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
    int r = fs->ops->where ? fs->ops->where(fs, file, &real, err) : -ENOTSUP;
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

/* settle: as dr_file_stamp. *files is malloc'ed. */
static int look_at_files(struct dr_image *image, bool settle, struct dr_noted_file **files,
                         struct dr_error *err)
{
    unsigned pieces = image->n_files > 1 ? dr_noting_samples / 4 : dr_noting_samples;
    int r = 0;
    if (image->n_files > DR_BITMAP_FILE_FILES)
        return dr_fail(err, EFBIG, "%s: has %u files, bitmaps beside it go with at most %u",
                       image->path, image->n_files, DR_BITMAP_FILE_FILES);
    *files = calloc(image->n_files, sizeof(**files));
    if (!*files)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (unsigned i = 0; r == 0 && i < image->n_files; i++) {
        struct dr_file *f = dr_image_file(image, i);
        r = dr_file_stamp(f, settle, &(*files)[i].stamp, err);
        if (r == 0)
            r = sample(f, pieces, &(*files)[i].sample, err);
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
    *is = b->disk == image->size && b->n_files == image->n_files;
    int r = *is ? look_at_files(image, false, &files, err) : 0;
    for (unsigned i = 0; r == 0 && *is && i < b->n_files; i++)
        *is = same_file(&files[i], &b->files[i]);
    free(files);
    return r;
}

/* ------------------------------------------------------------------ trust */

static void distrust_all(struct dr_bitmap_file *b, enum dr_distrust why)
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

/* Load the file of bitmaps, which nobody of this process has in use, and see which can be trusted.
 * -ENOENT: there is none, b->path says where it would be. */
static int load(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL;
    bool as_left = true;
    *b = (struct dr_bitmap_file){0};
    int r = beside(image, &path, err);
    if (r == 0)
        r = dr_bitmap_file_load(image->fs, path, b, err);
    if (r == -ENOENT && path)
        b->path = DR_STEAL(path);
    if (r < 0)
        return r;
    if (b->in_use)
        distrust_all(b, DR_UNCLEAN);
    else
        r = looks_the_same(image, b, &as_left, err);
    if (!as_left)
        distrust_all(b, DR_FOREIGN);
    return r;
}

static const char *reason(enum dr_distrust why)
{
    return why == DR_UNCLEAN   ? "the disk was not closed after writing"
           : why == DR_FOREIGN ? "the image was changed by another program, copied or put back"
                               : NULL;
}

/* ------------------------------------------------------------------ noting */

static void noting_free(struct dr_noting *n)
{
    if (!n)
        return;
    dr_bitmap_file_free(&n->file);
    dr_marks_free(&n->marks);
    free(n);
}

void dr_noting_drop(struct dr_image *image)
{
    noting_free(DR_STEAL(image->noting));
    image->noting_begun = false;
}

/* Empty marks for the enabled bitmaps of the list. */
static int marks_for(const struct dr_noted *list, uint32_t n, uint64_t size, struct dr_marks *marks,
                     bool *marking)
{
    dr_marks_init(marks, DR_BITMAP_FILE_MAX_BITS);
    *marking = false;
    for (uint32_t i = 0; i < n; i++)
        if (list[i].enabled && list[i].distrust == DR_TRUSTED) {
            marks->bits = (unsigned)dr_min(marks->bits, list[i].set->bits);
            *marking = true;
        }
    return *marking ? dr_marks_cover(marks, size) : 0;
}

/* *n NULL: there are no bitmaps that could be kept right. */
static int noting_open(struct dr_image *image, struct dr_noting **n, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    *n = NULL;
    if (dr_image_bitmaps_inside(image) || no_place(image))
        return 0;
    struct dr_noting *fresh = calloc(1, sizeof(*fresh));
    if (!fresh)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    dr_marks_init(&fresh->marks, DR_BITMAP_FILE_MAX_BITS);
    int r = load(image, &fresh->file, &why);
    if (r == 0) {
        dr_marks_free(&fresh->marks);
        r = marks_for(fresh->file.list, fresh->file.n, image->size, &fresh->marks, &fresh->marking);
    }
    if (r == 0)
        *n = fresh;
    else
        noting_free(fresh);
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
    else if (n && !n->file.in_use)
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

static int set_range(void *user, uint64_t off, uint64_t len)
{
    dr_marks_set(user, off, len);
    return 0;
}

/* What was noted so far goes into the enabled bitmaps. */
static void put_notes(const struct dr_image *image, struct dr_noting *n)
{
    for (uint32_t i = 0; n->marking && i < n->file.n; i++) {
        struct dr_noted *one = &n->file.list[i];
        if (one->enabled && one->distrust == DR_TRUSTED)
            dr_marks_each(&n->marks, image->size, set_range, one->set);
    }
}

/* The files of the image, on which nothing is under way, and the bitmaps go together. */
static int store_clean(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    struct dr_noted_file *files;
    int r = look_at_files(image, true, &files, err);
    if (r < 0)
        return r;
    free(b->files);
    b->files = files;
    b->n_files = image->n_files;
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
        put_notes(image, n);
        r = store_clean(image, &n->file, err);
    }
    if (r == 0)
        dr_noting_drop(image);
    return r;
}

/* ------------------------------------------------------------------ another size */

static int check_bytes(const struct dr_image *image, uint64_t bytes, struct dr_error *err)
{
    if (bytes <= DR_BITMAP_FILE_BYTES)
        return 0;
    return dr_fail(err, EFBIG,
                   "%s: the bitmaps beside it would take %llu bytes together, at most %llu are "
                   "possible; remove one, or take a larger granularity",
                   image->path, (unsigned long long)bytes,
                   (unsigned long long)DR_BITMAP_FILE_BYTES);
}

static uint64_t bytes_of(uint64_t size, unsigned bits)
{
    return (size / 8 >> bits) + 1;
}

int dr_noting_check_size(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    const struct dr_noting *n = image->noting;
    uint64_t bytes = 0;
    for (uint32_t i = 0; n && i < n->file.n; i++)
        bytes += bytes_of(size, n->file.list[i].set->bits);
    return check_bytes(image, bytes, err);
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
    const char *why = no_place(image);
    *v = (struct view){.b = &v->own};
    if (why)
        return dr_fail(err, ENOTSUP, "%s: %s", image->path, why);
    if (image->noting) {
        v->b = &image->noting->file;
        v->live = true;
        return 0;
    }
    int r = load(image, &v->own, err);
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
    DR_LOCK_SCOPE(&image->begin_lock);
    int r = view_open(image, &v, err);
    for (uint32_t i = 0; r == 0 && i < v.b->n; i++) {
        const struct dr_noted *one = &v.b->list[i];
        const struct dr_bitmap_info info = {
            .name = one->name,
            .granularity = UINT64_C(1) << one->set->bits,
            .enabled = one->enabled,
            .inconsistent = one->distrust != DR_TRUSTED || (v.live && one->enabled),
            .distrust = reason(one->distrust),
        };
        r = each(user, &info);
    }
    view_close(&v);
    return r;
}

static int unusable(const char *name, struct dr_error *err)
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
        r = unusable(name, err);
    if (r == 0)
        r = dr_marks_each(one->set, image->size, each, user);
    view_close(&v);
    return r;
}

int dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                         struct dr_error *err)
{
    return dr_image_bitmaps_inside(image) ? image->fmt->bitmap_list(image, each, user, err)
                                          : list_beside(image, each, user, err);
}

int dr_image_bitmap_read(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                         struct dr_error *err)
{
    return dr_image_bitmaps_inside(image) ? image->fmt->bitmap_read(image, name, each, user, err)
                                          : read_beside(image, name, each, user, err);
}

/* ------------------------------------------------------------------ changing */

/* The list of bitmaps as it is to be: a copy of the present one with one change. */
struct edit {
    struct dr_image *image;
    struct dr_bitmap_file *b;
    const struct dr_bitmap_change *c;
    const struct dr_marks *source; /* bits that the bitmap gets, or NULL */
    struct dr_noted *list;
    uint32_t n;
    struct dr_noted made; /* what the new list alone has ... */
    struct dr_noted gone; /* ... and the old one alone */
};

static int edit_add(struct edit *e, struct dr_error *err)
{
    const struct dr_bitmap_change *c = e->c;
    uint64_t granularity = c->granularity ? c->granularity : DEFAULT_GRANULARITY, bytes = 0;
    if (c->source_name) /* of an image that keeps coarser ones */
        granularity = dr_min(granularity, MAX_GRANULARITY);
    if (!*c->name)
        return dr_fail(err, EINVAL, "Bitmap name cannot be empty");
    if (granularity < 512 || granularity > MAX_GRANULARITY || granularity & (granularity - 1))
        return dr_fail(err, EINVAL,
                       "Granularity must be power of 2 and at least 512, and beside a %s image at "
                       "most 2 MiB",
                       e->image->fmt->name);
    if (strlen(c->name) > DR_BITMAP_FILE_NAME)
        return dr_fail(err, EINVAL, "Bitmap name too long: %s", c->name);
    if (dr_bitmap_file_find(e->b, c->name))
        return dr_fail(err, EEXIST, "Bitmap already exists: %s", c->name);
    if (e->b->n >= DR_BITMAP_FILE_MAX)
        return dr_fail(err, EINVAL, "%s: has %u bitmaps already, the most there can be",
                       e->image->path, e->b->n);
    unsigned bits = (unsigned)__builtin_ctzll(granularity);
    for (uint32_t i = 0; i < e->b->n; i++)
        bytes += bytes_of(e->image->size, e->b->list[i].set->bits);
    int r = check_bytes(e->image, bytes + bytes_of(e->image->size, bits), err);
    if (r < 0)
        return r;
    e->made.name = strdup(c->name);
    e->made.set = dr_noted_set(bits, e->image->size);
    if (!e->made.name || !e->made.set)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (e->source)
        dr_marks_each(e->source, e->image->size, set_range, e->made.set);
    e->list[e->n] = e->made;
    e->list[e->n++].enabled = !c->disabled;
    return 0;
}

/* One of the list gets other bits: those of old, or none, and those of the source. */
static int edit_bits(struct edit *e, struct dr_noted *one, bool keep, struct dr_error *err)
{
    e->made.set = dr_noted_set(one->set->bits, e->image->size);
    if (!e->made.set)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (keep)
        dr_marks_each(one->set, e->image->size, set_range, e->made.set);
    if (e->source)
        dr_marks_each(e->source, e->image->size, set_range, e->made.set);
    e->gone.set = one->set;
    one->set = e->made.set;
    return 0;
}

static int edit_list(struct edit *e, struct dr_error *err)
{
    const struct dr_bitmap_change *c = e->c;
    e->n = e->b->n;
    e->list = calloc(e->n + 1, sizeof(*e->list));
    if (!e->list)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (e->n)
        memcpy(e->list, e->b->list, e->n * sizeof(*e->list));
    if (c->action == DR_BITMAP_ADD)
        return edit_add(e, err);
    const struct dr_noted *old = dr_bitmap_file_find(e->b, c->name);
    if (!old)
        return dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", c->name);
    struct dr_noted *one = &e->list[old - e->b->list];
    if (c->action == DR_BITMAP_REMOVE) {
        e->gone = *one;
        memmove(one, one + 1, (size_t)(e->list + --e->n - one) * sizeof(*one));
        return 0;
    }
    bool rebuilt = c->action == DR_BITMAP_CLEAR && c->ranges;
    if (one->distrust != DR_TRUSTED && !rebuilt)
        return unusable(c->name, err);
    one->distrust = DR_TRUSTED;
    if (c->action == DR_BITMAP_CLEAR || c->action == DR_BITMAP_MERGE)
        return edit_bits(e, one, c->action == DR_BITMAP_MERGE, err);
    one->enabled = c->action == DR_BITMAP_ENABLE;
    return 0;
}

/* Without bitmaps there is no file. */
static int remove_file(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    struct dr_fs *fs = image->fs;
    int r = b->generation ? fs->ops->unlink(fs, b->path, err) : 0;
    if (r == 0 && !(image->flags & DR_OPEN_NO_FLUSH))
        r = fs->ops->sync_dir(fs, b->path, err);
    return r;
}

/* The list takes the place of the present one, in memory and on disk. After a failure it does not,
 * in memory; on disk it may. live: the image is being written to. */
static int edit_store(struct edit *e, bool live, struct dr_error *err)
{
    struct dr_bitmap_file *b = e->b;
    struct dr_noted *old = b->list;
    uint32_t n = b->n;
    b->list = e->list;
    b->n = e->n;
    b->disk = e->image->size;
    int r = !b->n  ? remove_file(e->image, b, err)
            : live ? dr_bitmap_file_store(b, true, e->image->files[0], err)
                   : store_clean(e->image, b, err);
    if (r < 0) {
        b->list = old;
        b->n = n;
        return r;
    }
    e->list = old;
    e->made = (struct dr_noted){0};
    free(e->gone.name);
    dr_noted_set_free(e->gone.set);
    return 0;
}

static int edit_run(struct edit *e, bool live, struct dr_error *err)
{
    int r = edit_list(e, err);
    if (r == 0)
        r = edit_store(e, live, err);
    free(e->list);
    free(e->made.name);
    dr_noted_set_free(e->made.set);
    return r;
}

/* The image is not being written to: the bitmaps that are trusted stay so, whenever this is
 * interrupted. */
static int change_at_rest(struct dr_image *image, struct edit *e, struct dr_error *err)
{
    struct dr_bitmap_file b;
    int r = load(image, &b, err);
    e->b = &b;
    if (r == 0 || r == -ENOENT)
        r = edit_run(e, false, err);
    e->b = NULL;
    dr_bitmap_file_free(&b);
    return r;
}

/* What was noted so far goes into the bitmaps first, and what changes afterwards into those that
 * there are then. */
static int change_live(struct dr_image *image, struct edit *e, struct dr_error *err)
{
    struct dr_noting *n = image->noting, *fresh = NULL;
    if (!n) {
        n = fresh = calloc(1, sizeof(*fresh));
        if (!n)
            return dr_fail_errno(err, ENOMEM, "%s", image->path);
        dr_marks_init(&n->marks, DR_BITMAP_FILE_MAX_BITS);
        int r = load(image, &n->file, err);
        if (r < 0 && r != -ENOENT) {
            noting_free(fresh);
            return r;
        }
        distrust_all(&n->file, DR_FOREIGN); /* it came while the image was open */
    }
    put_notes(image, n);
    e->b = &n->file;
    int r = edit_run(e, true, err);
    if (r == 0) {
        dr_marks_free(&n->marks);
        if (marks_for(n->file.list, n->file.n, image->size, &n->marks, &n->marking) < 0)
            n->marks.all = true;
        image->noting = n;
    } else {
        noting_free(fresh);
    }
    if (r == 0 && !n->file.n) {
        noting_free(n);
        image->noting = NULL;
    }
    return r;
}

/* The source's bits, before the lock of the image is taken: it may be the other way round in
 * another thread. */
static int read_source(struct dr_image *image, const struct dr_bitmap_change *c,
                       struct dr_marks **set, struct dr_error *err)
{
    if (c->source->size != image->size)
        return dr_fail(err, EINVAL,
                       "Bitmaps are of different sizes (destination size is %llu, source size is "
                       "%llu) and can't be merged",
                       (unsigned long long)image->size, (unsigned long long)c->source->size);
    *set = dr_noted_set(DR_BITMAP_FILE_MIN_BITS, image->size);
    if (!*set)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return dr_image_bitmap_read(c->source, c->source_name, set_range, *set, err);
}

/* A bitmap of the image itself that is to be merged: what is noted for it by now, too. */
static int read_own_source(struct dr_image *image, const struct dr_bitmap_change *c,
                           struct dr_marks **set, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    struct dr_noting *n = image->noting;
    const struct dr_noted *one = n ? dr_bitmap_file_find(&n->file, c->source_name) : NULL;
    if (!one || one->distrust != DR_TRUSTED)
        return 1;
    *set = dr_noted_set(one->set->bits, image->size);
    if (!*set)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    put_notes(image, n);
    dr_marks_each(one->set, image->size, set_range, *set);
    return 0;
}

static int change_beside(struct dr_image *image, const struct dr_bitmap_change *c,
                         struct dr_error *err)
{
    struct dr_marks *read = NULL;
    struct edit e = {.image = image, .c = c, .source = c->ranges};
    bool merges = c->source_name && (c->action == DR_BITMAP_ADD || c->action == DR_BITMAP_MERGE);
    int r = merges && c->source == image ? read_own_source(image, c, &read, err) : 1;
    if (r == 1)
        r = merges ? read_source(image, c, &read, err) : 0;
    if (read)
        e.source = read;
    if (r == 0) {
        DR_LOCK_SCOPE(&image->begin_lock);
        r = image->noting_begun || image->noting ? change_live(image, &e, err)
                                                 : change_at_rest(image, &e, err);
    }
    dr_noted_set_free(read);
    return r;
}

/* With every writer kept out and all durable. */
static int change_alone(struct dr_image *image, const struct dr_bitmap_change *c,
                        struct dr_error *err)
{
    if (!dr_image_bitmaps_inside(image))
        return change_beside(image, c, err);
    int r = image->fmt->bitmap_change(image, c, err);
    if (r < 0) /* perhaps nothing is noted any more: the next change of the view begins anew */
        atomic_fetch_and(&image->begun, ~(unsigned)DR_BEGUN_CHANGES);
    return r;
}

int dr_image_bitmap_change(struct dr_image *image, const struct dr_bitmap_change *change,
                           struct dr_error *err)
{
    struct dr_range range;
    if (!dr_image_bitmaps_inside(image) && (change->inside || no_place(image)))
        return dr_fail(err, ENOTSUP, "Can't store persistent bitmaps to %s: %s", image->path,
                       strerror(ENOTSUP));
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    int r = dr_image_bitmaps_inside(image) ? dr_image_begin(image, 0, false, err) : 0;
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    r = dr_image_flush_all(image, err);
    if (r == 0)
        r = change_alone(image, change, err);
    int flushed = dr_image_flush_all(image, r < 0 ? NULL : err);
    dr_range_unlock(image->ranges, &range);
    return r < 0 ? r : flushed;
}

/* ------------------------------------------------------------------ rebuilding */

struct search {
    const char *name;
    uint64_t granularity;
    bool enabled, found;
};

static int find_one(void *user, const struct dr_bitmap_info *info)
{
    struct search *s = user;
    if (strcmp(info->name, s->name) == 0) {
        s->granularity = info->granularity;
        s->enabled = info->enabled;
        s->found = true;
    }
    return 0;
}

int dr_image_bitmap_rebuild(struct dr_image *image, const char *name, const struct dr_marks *ranges,
                            struct dr_error *err)
{
    struct search s = {.name = name};
    struct dr_bitmap_change c = {.action = DR_BITMAP_CLEAR, .name = name, .ranges = ranges};
    if (!dr_image_bitmaps_inside(image))
        return dr_image_bitmap_change(image, &c, err);
    int r = dr_image_bitmap_list(image, find_one, &s, err);
    if (r == 0 && !s.found)
        r = dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
    c.action = DR_BITMAP_REMOVE;
    if (r == 0)
        r = dr_image_bitmap_change(image, &c, err);
    c.action = DR_BITMAP_ADD;
    c.granularity = s.granularity;
    c.disabled = !s.enabled;
    return r < 0 ? r : dr_image_bitmap_change(image, &c, err);
}
