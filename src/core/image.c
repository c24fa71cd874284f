/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One image: a driver over its files, from open to close. */
#include "core/internal.h"
#include "storage/part.h"
#include "storage/remote.h"

static void image_free(struct dr_image *image)
{
    if (image->fmt && image->fmt->close)
        image->fmt->close(image);
    dr_noting_drop(image);
    for (unsigned i = 0; i < image->n_files; i++)
        dr_file_unref(image->files[i]);
    free(image->files);
    free(image->seen);
    dr_decoded_close(image);
    dr_cache_free(image);
    dr_ranges_free(image->ranges);
    dr_flusher_free(image->flusher);
    pthread_mutex_destroy(&image->lock);
    pthread_mutex_destroy(&image->begin_lock);
    free(image->path);
    free(image->member);
    free(image->backing_name);
    free(image->backing_format);
    free(image->doubt);
    free(image);
}

static struct dr_image *image_new(struct dr_fs *fs, const char *path, unsigned flags)
{
    struct dr_image *image = dr_calloc_lines(sizeof(*image));
    if (!image)
        return NULL;
    dr_mutex_init_brief(&image->lock);
    pthread_mutex_init(&image->begin_lock, NULL);
    atomic_store(&image->refs, 1);
    image->fs = fs;
    image->flags = flags;
    image->writable = flags & DR_OPEN_RDWR;
    image->path = strdup(path);
    image->cache = dr_cache_new();
    image->ranges = dr_ranges_new();
    image->flusher = dr_flusher_new();
    if (!image->path || !image->cache || !image->ranges || !image->flusher) {
        image_free(image);
        return NULL;
    }
    return image;
}

static unsigned image_file_flags(unsigned flags)
{
    unsigned file_flags = 0;
    if (flags & DR_OPEN_RDWR)
        file_flags |= DR_FILE_RDWR;
    if (flags & DR_OPEN_FORCE_SHARE)
        file_flags |= DR_FILE_FORCE_SHARE;
    if (flags & DR_OPEN_NO_LOCK)
        file_flags |= DR_FILE_NO_LOCK;
    if (flags & DR_OPEN_NO_FLUSH)
        file_flags |= DR_FILE_NO_FLUSH;
    if (flags & DR_OPEN_DIRECT)
        file_flags |= DR_FILE_DIRECT;
    return file_flags;
}

/* Users without locks have nobody to rely on: only where locks tell who may write is it noted what
 * was there when no lock kept writers out. */
static bool notes_changes(const struct dr_image *image)
{
    return (image->flags & (DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)) == DR_OPEN_FORCE_SHARE;
}

/* Takes over the file on success. A disk that grows gets files while it is read. */
static int image_add_file(struct dr_image *image, struct dr_file *file, struct dr_error *err)
{
    size_t n = image->n_files + 1;
    pthread_mutex_lock(&image->lock);
    struct dr_file **files = realloc(image->files, n * sizeof(struct dr_file *));
    if (files)
        image->files = files;
    pthread_mutex_unlock(&image->lock);
    if (files && notes_changes(image)) {
        struct dr_seen_file *seen = realloc(image->seen, n * sizeof(*seen));
        if (!seen)
            return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
        image->seen = seen;
        seen[n - 1] = (struct dr_seen_file){dr_file_mtime(file), dr_file_size(file)};
    }
    if (!files)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    DR_LOCK_SCOPE(&image->lock);
    image->files[image->n_files++] = file;
    return 0;
}

static int image_open_path(struct dr_image *image, const char *path, struct dr_error *err)
{
    struct dr_file *file;
    int r = dr_file_open(image->fs, path, image_file_flags(image->flags), &file, err);
    if (r < 0)
        return r;
    r = image_add_file(image, file, err);
    if (r < 0)
        dr_file_unref(file);
    return r;
}

/* ------------------------------------------------------------------ further files */

/* What names inside the image are relative to: its own name may have a format in front. */
static const char *home_of(const struct dr_image *image)
{
    return dr_name_format(image->path) ? image->files[0]->path : image->path;
}

/* May the image open this file, which it calls its `what`? */
static int further_allowed(struct dr_image *image, const char *real, const char *what,
                           struct dr_error *err)
{
    static const struct dr_open_options defaults;
    struct dr_gate gate;
    if (image->gate)
        return dr_gate_pass_further(image->gate, home_of(image), real, what, err);
    int r = dr_gate_make(&gate, image->fs, &defaults, err);
    if (r < 0)
        return r;
    r = dr_gate_pass_further(&gate, home_of(image), real, what, err);
    dr_gate_clear(&gate);
    return r;
}

/* First by its name, then, since a link may have been turned meanwhile, as what was opened. */
static int open_allowed(struct dr_image *image, const char *full, const char *what,
                        struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *opened = NULL;
    bool any = image->flags & DR_OPEN_ANY_PATH;
    int r = any ? 0 : image->fs->ops->realpath(image->fs, full, &real, err);
    if (r == 0 && !any)
        r = further_allowed(image, real, what, err);
    if (r == 0)
        r = image_open_path(image, full, err);
    if (r < 0 || any)
        return r;
    r = dr_file_where(image->fs, image->files[image->n_files - 1], &opened, err);
    return r == 0 ? further_allowed(image, opened, what, err) : r == -ENOTSUP ? 0 : r;
}

/* What a member names would be looked for beside the archive, where nobody put it. */
static int refuse_further(const struct dr_image *image, const char *name, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: needs a further file, \"%.200s\", which a disk inside an archive cannot "
                   "have; extract it first",
                   image->path, name);
}

int dr_image_open_file(struct dr_image *image, const char *name, unsigned *index,
                       struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *full = dr_path_sibling(home_of(image), name);
    if (!full)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    if (image->contained)
        return refuse_further(image, name, err);
    int r = dr_remote_check_beside(home_of(image), name, err);
    if (r < 0)
        return r;
    r = open_allowed(image, full, "extent", &why);
    if (r == -ENOENT)
        return dr_fail(err, ENOENT, "%s: cannot open its extent \"%s\": %s", image->path, name,
                       why.text);
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    *index = image->n_files - 1;
    return 0;
}

int dr_image_open_data_file(struct dr_image *image, const char *name, unsigned *index,
                            struct dr_error *err)
{
    CLEANUP_FREE char *full = dr_path_sibling(home_of(image), name);
    if (!full)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    if (image->contained)
        return refuse_further(image, name, err);
    int r = image->data_file ? 0 : dr_remote_check_beside(home_of(image), name, err);
    if (r == 0)
        r = image->data_file ? image_open_path(image, image->data_file, err)
                             : open_allowed(image, full, "data file", err);
    image->data_file = NULL;
    if (r == 0)
        *index = image->n_files - 1;
    return r;
}

/* ------------------------------------------------------------------ open, close */

int dr_image_harden_name(struct dr_image *image, struct dr_file *file, struct dr_error *err)
{
    if ((file->flags & DR_FILE_NO_FLUSH) || file->block_device)
        return 0;
    struct dr_error why = DR_ERROR_INIT;
    int r = image->fs->ops->sync_dir(image->fs, file->path, &why);
    if (r == 0 || r == -EACCES) /* who may not look into the directory made no names there */
        return 0;
    return dr_fail(err, -r, "%s", why.text);
}

int dr_image_harden_files(struct dr_image *image, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < image->n_files; i++) {
        struct dr_file *file = dr_image_file(image, i);
        atomic_store(&file->dirty, true);
        r = dr_file_flush(file, err);
        dr_file_unpin(file);
    }
    return r;
}

int dr_image_harden(struct dr_image *image, struct dr_error *err)
{
    int r = dr_image_harden_files(image, err);
    for (unsigned i = 0; r == 0 && i < image->n_files; i++) {
        struct dr_file *file = dr_image_file(image, i);
        r = dr_image_harden_name(image, file, err);
        dr_file_unpin(file);
    }
    return r;
}

static int image_recover(struct dr_image *image, struct dr_error *err)
{
    if (!image->writable || !image->unclean)
        return 0;
    if (image->flags & DR_OPEN_NO_RECOVER)
        return dr_fail(err, EUCLEAN, "%s: was not closed properly; `drover recover` repairs it",
                       image->path);
    int r = dr_image_harden(image, err);
    if (r < 0 || (image->flags & DR_OPEN_AS_FOUND))
        return r;
    if (image->fmt->recover)
        r = image->fmt->recover(image, err);
    if (r == 0)
        image->unclean = false;
    return r;
}

/* Tables are changed by sectors that hold their old bytes or their new ones after a power cut
 * (invariant 10). A part that does not begin at a sector has none such. */
static int check_atomic(const struct dr_image *image, struct dr_error *err)
{
    for (unsigned i = 0; i < image->n_files && !(image->fmt->flags & DR_FORMAT_FIXED_MAP); i++)
        if (image->files[i]->atomic_size < 512)
            return dr_fail(err, EROFS,
                           "%s: begins in the middle of a sector: a power cut could leave half of "
                           "an entry in its tables, so it can only be read there",
                           image->files[i]->path);
    return 0;
}

static int image_open_driver(struct dr_image *image, const struct dr_format *fmt,
                             struct dr_error *err)
{
    if (image->writable && !(fmt->flags & DR_FORMAT_WRITE))
        return dr_fail(err, EROFS,
                       "%s: %s images can only be read; convert it, or create an overlay on it",
                       image->path, fmt->name);
    image->fmt = fmt;
    int r = fmt->open(image, err);
    if (r == 0 && image->writable)
        r = check_atomic(image, err);
    if (r == 0)
        r = image_recover(image, err);
    return r;
}

static int choose_format(const char *path, const char *format, const struct dr_name *name,
                         const struct dr_format **fmt, struct dr_error *err)
{
    *fmt = format ? dr_format_find(format) : name->fmt;
    if (format && !*fmt)
        return dr_fail(err, EINVAL, "%s: unknown format \"%s\"", path, format);
    if (name->fmt && (name->fmt->flags & DR_FORMAT_CONTAINER)) {
        *fmt = name->fmt; /* what was named is the format of the member */
        return 0;
    }
    if (name->fmt && *fmt != name->fmt)
        return dr_fail(err, EINVAL, "%s: names a disk in a %s file, not a %s image", path,
                       name->fmt->name, format);
    return 0;
}

int dr_image_open(struct dr_fs *fs, const char *path, const char *format, unsigned flags,
                  struct dr_image **out, struct dr_error *err)
{
    static const struct dr_image_how plainly;
    return dr_image_open_how(fs, path, format, flags, &plainly, out, err);
}

/* A json: name may say the format and which secret has the password; NULL: it does not. */
static void look_into_name(const char *path, char **format, char **key_secret)
{
    DR_CLEANUP_PART struct dr_part part = {0};
    *format = *key_secret = NULL;
    if (!dr_part_is(path) || dr_part_parse(path, &part, NULL) < 0)
        return;
    *format = DR_STEAL(part.format);
    *key_secret = DR_STEAL(part.key_secret);
}

int dr_image_open_how(struct dr_fs *fs, const char *path, const char *format, unsigned flags,
                      const struct dr_image_how *how, struct dr_image **out, struct dr_error *err)
{
    DR_CLEANUP_NAME struct dr_name name = {0};
    const struct dr_format *fmt = NULL;
    int r = dr_cache_limits_check(err);
    if (r == 0)
        r = dr_name_parse(fs, path, &name, err);
    CLEANUP_FREE char *said = NULL, *key_secret = NULL;
    if (r == 0)
        look_into_name(path, &said, &key_secret);
    format = format ? format : said;
    if (r == 0)
        r = choose_format(path, format, &name, &fmt, err);
    if (r < 0)
        return r;
    if ((flags & DR_OPEN_RDWR) && (flags & DR_OPEN_FORCE_SHARE))
        return dr_fail(err, EINVAL, "%s: writing and sharing with other writers exclude each other",
                       path);
    struct dr_image *image = image_new(fs, path, flags);
    if (!image)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    image->gate = how->gate;
    image->data_file = how->data_file;
    image->key_secret = how->key_secret ? how->key_secret : key_secret;
    if (fmt && (fmt->flags & DR_FORMAT_CONTAINER) && format && strcmp(format, fmt->name) != 0)
        image->member_format = format;
    image->member = DR_STEAL(name.member);
    r = image_open_path(image, name.file, err);
    if (r == 0)
        r = dr_probe_image(image, &fmt, err);
    if (r == 0)
        r = image_open_driver(image, fmt, err);
    if (r == 0 && image->data_file)
        r = dr_fail(err, EINVAL, "%s: has no data file of its own that %s could replace", path,
                    how->data_file);
    image->gate = NULL;
    image->data_file = image->key_secret = NULL;
    image->member_format = NULL;
    if (r < 0) {
        image_free(image);
        return r;
    }
    *out = image;
    return 0;
}

/* ------------------------------------------------------------------ members of containers */

/* The file, for which a place is made in front of the container's. */
static int put_in_front(struct dr_image *image, struct dr_file *file, struct dr_error *err)
{
    int r = image_add_file(image, file, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    for (unsigned i = image->n_files - 1; i > 0; i--) {
        image->files[i] = image->files[i - 1];
        if (image->seen)
            image->seen[i] = image->seen[i - 1];
    }
    image->files[0] = file;
    if (image->seen)
        image->seen[0] = (struct dr_seen_file){dr_file_mtime(file), dr_file_size(file)};
    image->contained = true;
    return 0;
}

static int member_driver(struct dr_image *image, const struct dr_format **fmt, struct dr_error *err)
{
    *fmt = image->member_format ? dr_format_find(image->member_format) : NULL;
    int r = dr_probe_image(image, fmt, err);
    if (r == 0 && ((*fmt)->flags & DR_FORMAT_MEMBERS))
        return dr_fail(err, ENOTSUP, "%s: is an archive (%s) inside an archive", image->path,
                       (*fmt)->name);
    return r;
}

int dr_image_enter(struct dr_image *image, struct dr_file *file, struct dr_error *err)
{
    const struct dr_format *fmt = NULL;
    int r = put_in_front(image, file, err);
    if (r < 0) {
        dr_file_unref(file);
        return r;
    }
    image->state = NULL;
    r = member_driver(image, &fmt, err);
    if (r == 0)
        r = image_open_driver(image, fmt, err);
    if (r == 0 && image->backing_name && !(image->flags & DR_OPEN_NO_BACKING))
        return dr_fail(err, ENOTSUP,
                       "%s: holds only what differs from a parent (%.200s), which a disk inside an "
                       "archive cannot have; extract both first",
                       image->path, image->backing_name);
    return r;
}

int dr_image_over(struct dr_image *image, unsigned i, const char *format, struct dr_image **out,
                  struct dr_error *err)
{
    struct dr_file *file = image->files[i];
    const struct dr_format *fmt = dr_format_find(format);
    struct dr_image *over =
        image_new(image->fs, file->path, image->flags & ~(unsigned)DR_OPEN_UNCHANGED);
    if (!fmt || !over) {
        if (over)
            image_free(over);
        return fmt ? dr_fail(err, ENOMEM, "%s: out of memory", file->path)
                   : dr_fail(err, EINVAL, "%s: unknown format \"%s\"", file->path, format);
    }
    int r = image_add_file(over, file, err);
    if (r == 0)
        dr_file_ref(file);
    if (r == 0)
        r = image_open_driver(over, fmt, err);
    if (r < 0)
        image_free(over);
    else
        *out = over;
    return r;
}

struct dr_image *dr_image_ref(struct dr_image *image)
{
    atomic_fetch_add(&image->refs, 1);
    return image;
}

#define MAX_FLUSHES 64

/* Releasing what was freed edits pages again, so one flush may not be enough. */
int dr_image_flush_all(struct dr_image *image, struct dr_error *err)
{
    for (int round = 0; round < MAX_FLUSHES; round++) {
        int r = dr_image_flush(image, err);
        if (r < 0)
            return r;
        pthread_mutex_lock(&image->lock);
        bool dirty = dr_cache_dirty(image->cache) != 0;
        pthread_mutex_unlock(&image->lock);
        if (!dirty)
            return 0;
    }
    return dr_fail(err, EBUSY, "%s: metadata still waits to be written after %d flushes",
                   image->path, MAX_FLUSHES);
}

/* After a failed flush the unclean mark stays: the next write-open recovers. */
int dr_image_settle(struct dr_image *image, struct dr_error *err)
{
    if (!image->writable)
        return 0;
    int r = dr_image_flush_all(image, err);
    if (r < 0)
        return r;
    if (atomic_load(&image->begun) && image->fmt->end_write)
        r = image->fmt->end_write(image, err);
    if (r == 0)
        r = dr_noting_end(image, err);
    atomic_store(&image->begun, r < 0 ? DR_END_DUE : 0); /* the marks may be gone, or not */
    return r;
}

int dr_image_unref(struct dr_image *image, struct dr_error *err)
{
    if (!image || atomic_fetch_sub(&image->refs, 1) != 1)
        return 0;
    int r = dr_image_settle(image, err);
    image_free(image);
    return r;
}

/* ------------------------------------------------------------------ another parent */

/* Where the driver replaces a file, it copies the old one and then changes over to the copy. What a
 * flush wrote in between would go into the old file and be lost with it. */
int dr_image_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                         const char *format, unsigned flags, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock); /* begin_write edits what set_backing reads */
    if (flags & DR_TRY)
        return image->fmt->set_backing(image, parent, name, format, flags, err);
    int r = image->writable ? dr_noting_begin(image, err) : 0;
    if (r < 0)
        return r;
    dr_flush_hold(image);
    r = image->fmt->set_backing(image, parent, name, format, flags, err);
    dr_flush_resume(image);
    return r;
}

/* ------------------------------------------------------------------ thaw, freeze */

static void downgrade_files(struct dr_image *image, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        dr_file_downgrade(image->files[i], NULL);
}

/* Did somebody write to the files before they were locked against that? */
static int image_is_as_seen(struct dr_image *image, struct dr_error *err)
{
    for (unsigned i = 0; image->seen && i < image->n_files; i++) {
        struct dr_file *file = image->files[i];
        int r = dr_file_refresh_size(file, err);
        if (r < 0)
            return r;
        if (dr_file_size(file) != image->seen[i].size ||
            dr_file_mtime(file) != image->seen[i].mtime)
            return dr_fail(err, EBUSY,
                           "%s: another program wrote to %s since it was opened to be shared with "
                           "writers: close the disk, and open it again",
                           image->path, file->path);
    }
    return 0;
}

static void image_set_frozen(struct dr_image *image)
{
    image->writable = false;
    image->masked = false;
    image->leaving = false;
    image->overwritten = false;
    image->flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
}

int dr_image_thaw(struct dr_image *image, bool unchanged, struct dr_error *err)
{
    if (image->writable)
        return 0;
    if (image->contained)
        return dr_fail(err, EROFS, "%s: is inside an archive, and can only be read", image->path);
    if (!(image->fmt->flags & DR_FORMAT_WRITE))
        return dr_fail(err, EROFS, "%s: %s images can only be read", image->path, image->fmt->name);
    int r = check_atomic(image, err);
    if (r < 0)
        return r;
    for (unsigned i = 0; i < image->n_files; i++) {
        r = dr_file_upgrade(image->files[i], err);
        if (r < 0) {
            downgrade_files(image, i);
            return r;
        }
    }
    r = image_is_as_seen(image, err);
    if (r < 0) {
        downgrade_files(image, image->n_files);
        return r;
    }
    free(DR_STEAL(image->seen)); /* from now on locks keep writers out */
    image->flags |= DR_OPEN_RDWR | (unchanged ? DR_OPEN_UNCHANGED : 0);
    image->writable = true;
    dr_index_thawed(image);
    r = image_recover(image, err);
    if (r < 0) {
        image_set_frozen(image);
        downgrade_files(image, image->n_files);
    }
    return r;
}

void dr_image_give_up(struct dr_image *image)
{
    if (!image->writable)
        return;
    image->given_up = true; /* first: its tables are still looked up there */
    image_set_frozen(image);
    dr_noting_drop(image);
    downgrade_files(image, image->n_files);
}

void dr_image_leave(struct dr_image *image, const struct dr_file *kept)
{
    image_set_frozen(image);
    for (unsigned i = 0; i < image->n_files; i++)
        if (image->files[i] != kept)
            dr_file_downgrade(image->files[i], NULL);
}

int dr_image_freeze(struct dr_image *image, struct dr_error *err)
{
    if (!image->writable)
        return 0;
    int r = dr_image_settle(image, err);
    if (r < 0)
        return r;
    image_set_frozen(image);
    image->given_up = false;
    downgrade_files(image, image->n_files);
    return 0;
}

/* ------------------------------------------------------------------ driving the driver */

int dr_image_begin(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err)
{
    unsigned wanted = DR_BEGUN_WRITING | (changes ? DR_BEGUN_CHANGES : 0);
    if ((atomic_load(&image->begun) & wanted) == wanted)
        return 0;
    DR_LOCK_SCOPE(&image->begin_lock);
    if ((atomic_load(&image->begun) & wanted) == wanted)
        return 0;
    int r = dr_noting_begin(image, err);
    if (r == 0 && image->fmt->begin_write)
        r = image->fmt->begin_write(image, off, changes, err);
    if (r == 0)
        atomic_fetch_or(&image->begun, wanted);
    return r;
}

static int begin_again(struct dr_image *image, uint64_t off, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    if (!image->fmt->begin_write)
        return dr_fail(err, EINVAL, "%s: the %s driver asks for what it does not have", image->path,
                       image->fmt->name);
    return image->fmt->begin_write(image, off, !(image->flags & DR_OPEN_UNCHANGED), err);
}

int dr_image_satisfy(struct dr_image *image, struct dr_hold *hold, uint64_t off,
                     struct dr_error *err)
{
    struct dr_need need = image->need;
    image->need.kind = DR_NEED_NONE;
    if (need.kind == DR_NEED_PAGE)
        return dr_cache_load(image, need, hold, err);
    pthread_mutex_unlock(&image->lock);
    int r;
    if (need.kind == DR_NEED_FLUSH)
        r = dr_image_flush(image, err);
    else if (need.kind == DR_NEED_BEGIN)
        r = begin_again(image, off, err);
    else if (need.kind == DR_NEED_REPAIR)
        r = dr_fail(err, EIO,
                    "%s: is damaged: two tables have the sector at byte %llu, and no order of "
                    "writing it is right for both; `drover check` says more",
                    image->path, (unsigned long long)need.off);
    else
        r = dr_fail(err, EINVAL, "%s: the %s driver wants to be called again but not why",
                    image->path, image->fmt->name);
    pthread_mutex_lock(&image->lock);
    return r;
}

int dr_image_map_locked(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                        struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    do {
        *ext = (struct dr_extent){.kind = DR_HOLE};
        r = image->fmt->map(image, off, len, ext, err);
    } while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, off, err)) == 0);
    dr_hold_end(&hold);
    if (r < 0)
        return r;
    if (ext->len > 0 && ext->len <= len)
        return 0;
    return dr_fail(err, EIO, "%s: the %s driver answers %llu bytes to a question about %llu",
                   image->path, image->fmt->name, (unsigned long long)ext->len,
                   (unsigned long long)len);
}

int dr_image_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                 struct dr_error *err)
{
    if (image->fmt->flags & DR_FORMAT_FIXED_MAP)
        return image->fmt->map(image, off, len, ext, err);
    DR_LOCK_SCOPE(&image->lock);
    return dr_image_map_locked(image, off, len, ext, err);
}
