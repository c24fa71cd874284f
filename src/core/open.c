/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening a whole chain: find each parent, ask the gate, check that it is the right one. */
#include <stdio.h>

#include "core/internal.h"

/* All there are. What a later library may give a meaning is not passed over in silence. */
#define OPEN_FLAGS ((2u * DR_OPEN_DIRECT - 1) | DR_OPEN_AS_FOUND | DR_OPEN_WHOLE)

struct opening {
    struct dr_fs *fs;
    const struct dr_open_options *options;
    struct dr_gate gate;
    struct dr_image *images[DR_CHAIN_MAX];
    size_t n;
};

static unsigned parent_flags(unsigned flags)
{
    return flags &
           ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED | DR_OPEN_NO_RECOVER | DR_OPEN_WHOLE);
}

/* ------------------------------------------------------------------ one candidate */

static bool holds_data_of(const struct dr_image *image, struct dr_file_id id)
{
    for (unsigned i = 1; i < image->n_files; i++)
        if (image->files[i]->id.dev == id.dev && image->files[i]->id.ino == id.ino)
            return true;
    return false;
}

/* Before the parent is opened: its locks would only say that somebody uses it. */
static int refuse_loop(const struct opening *o, const char *path, struct dr_error *err)
{
    struct dr_file_id id;
    const struct dr_image *child = o->images[o->n - 1];
    int r = dr_name_identify(o->fs, path, &id, err);
    for (size_t i = 0; r == 0 && i < o->n; i++) {
        struct dr_file_id seen = dr_image_id(o->images[i]);
        if (seen.dev == id.dev && seen.ino == id.ino)
            r = dr_fail(err, ELOOP, "%s: its backing file %s is already in the chain: a loop",
                        child->path, path);
        else if (holds_data_of(o->images[i], id))
            r = dr_fail(err, EINVAL,
                        "%s: its backing file %s is the file that holds the data of %s",
                        child->path, path, o->images[i]->path);
    }
    return r;
}

/* Nothing recorded means that the format was never established: a guest may have written anything
 * into a raw parent, so only an explicit wish turns probing on. */
static int parent_format(const struct opening *o, const char *path, const char *recorded,
                         const char **format, struct dr_error *err)
{
    const struct dr_image *child = o->images[o->n - 1];
    *format = recorded;
    if (recorded || o->gate.any || dr_name_format(path))
        return 0;
    const struct dr_format *found;
    int r = dr_probe(o->fs, path, DR_FILE_FORCE_SHARE, &found, err);
    if (r == 0 && !(found->flags & DR_FORMAT_NO_PROBE))
        return dr_fail(
            err, EINVAL,
            "%s: does not record the format of its backing file %s, which looks like %s; "
            "name the format of the backing file if you trust it",
            child->path, path, found->name);
    *format = "raw";
    return r;
}

static int check_parent(const struct dr_image *child, const struct dr_image *parent,
                        struct dr_error *err)
{
    if ((child->flags & DR_OPEN_NO_CHECK_ID) || !child->fmt->check_backing)
        return 0;
    return child->fmt->check_backing(child, parent, err);
}

static int open_parent(struct opening *o, const char *path, const char *recorded,
                       struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 1], *parent = NULL;
    const char *format = NULL;
    int r = refuse_loop(o, path, err);
    if (r == 0)
        r = parent_format(o, path, recorded, &format, err);
    if (r == 0)
        r = dr_image_open_through(o->fs, path, format, parent_flags(o->options->flags), &o->gate,
                                  NULL, &parent, err);
    if (r < 0 || !parent)
        return r;
    r = check_parent(child, parent, err);
    if (r < 0) {
        dr_image_unref(parent, NULL);
        return r;
    }
    o->images[o->n++] = parent;
    return 0;
}

/* ------------------------------------------------------------------ all candidates */

static int candidate(const struct dr_image *child, unsigned n, char **path, struct dr_error *err)
{
    if (child->fmt->backing_candidate)
        return child->fmt->backing_candidate(child, n, path, err);
    if (n > 0)
        return -ENOENT;
    *path = dr_name_beside(child->path, child->backing_name);
    return *path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", child->path);
}

/* Which of two failures tells more about why no candidate will do? */
static bool tells_more(int fresh, int old)
{
    static const int order[] = {-ENOENT, -ENOTDIR, -EACCES, -EINVAL};
    size_t n = sizeof(order) / sizeof(order[0]), f = n, o = n;
    for (size_t i = 0; i < n; i++) {
        f = order[i] == fresh ? i : f;
        o = order[i] == old ? i : o;
    }
    return f > o;
}

/* The parent that was opened is where the gate allowed it to be, or goes. */
static int keep_parent(struct opening *o, struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 2], *parent = o->images[o->n - 1];
    int r = dr_gate_pass_file(&o->gate, child->path, parent->files[0], err);
    if (r == 0)
        return 0;
    o->n--;
    dr_image_unref(parent, NULL);
    return r;
}

static int open_recorded_parent(struct opening *o, struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 1];
    struct dr_error best = DR_ERROR_INIT;
    int result = -ENOENT;
    for (unsigned i = 0;; i++) {
        CLEANUP_FREE char *path = NULL;
        struct dr_error why = DR_ERROR_INIT;
        int r = candidate(child, i, &path, &why);
        if (r == -ENOENT)
            break;
        if (r == 0)
            r = dr_gate_pass(&o->gate, child->path, path, &why);
        if (r == 0)
            r = open_parent(o, path, child->backing_format, &why);
        if (r == 0)
            r = keep_parent(o, &why);
        if (r == 0)
            return 0;
        if (best.errnum == 0 || tells_more(r, result)) {
            best = why;
            result = r;
        }
    }
    return dr_fail(err, -result, "%s: cannot open its backing file \"%s\": %s", child->path,
                   child->backing_name, best.errnum ? best.text : "not found");
}

/* Only to learn where it is: without locks, and without its own parents. */
#define LOOK_ON (DR_OPEN_NO_BACKING | DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)

int dr_backing_locate(struct dr_image *child, const struct dr_open_options *options, char **path,
                      struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    open.flags = (open.flags & DR_OPEN_ANY_PATH) | LOOK_ON;
    CLEANUP_FREE struct opening *o = calloc(1, sizeof(*o));
    *path = NULL;
    if (!o)
        return dr_fail(err, ENOMEM, "%s: out of memory", child->path);
    *o = (struct opening){.fs = child->fs, .options = &open, .images = {child}, .n = 1};
    int r = dr_gate_make(&o->gate, o->fs, &open, err);
    if (r == 0)
        r = open_recorded_parent(o, err);
    dr_gate_clear(&o->gate);
    if (r < 0)
        return r;
    *path = strdup(o->images[1]->path);
    dr_image_unref(o->images[1], NULL);
    return *path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", child->path);
}

static int open_chain(struct opening *o, struct dr_error *err)
{
    const struct dr_open_options *options = o->options;
    if (options->flags & DR_OPEN_NO_BACKING)
        return 0;
    int r = 0;
    if (options->backing)
        r = open_parent(o, options->backing, options->backing_format, err);
    while (r == 0 && o->images[o->n - 1]->backing_name) {
        if (o->n == DR_CHAIN_MAX)
            return dr_fail(err, ELOOP, "%s: the chain is longer than %d images", o->images[0]->path,
                           DR_CHAIN_MAX);
        r = open_recorded_parent(o, err);
    }
    return r;
}

/* By a link from elsewhere an image is itself found, and what it names is not. */
static int hint_at_link(struct dr_fs *fs, const char *path, int r, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *beside = NULL, *dir = dr_path_dirname(path);
    if (r != -ENOENT || !err || err->errnum != ENOENT || !dir ||
        fs->ops->realpath(fs, path, &real, NULL) < 0 ||
        fs->ops->realpath(fs, dir, &beside, NULL) < 0)
        return r;
    CLEANUP_FREE char *real_dir = dr_path_dirname(real);
    size_t used = strlen(err->text);
    if (real_dir && strcmp(real_dir, beside) != 0)
        snprintf(err->text + used, sizeof(err->text) - used,
                 " (%s is a link: what it names is looked for beside the link; use the name %s)",
                 path, real);
    return r;
}

static void drop_images(struct opening *o)
{
    while (o->n > 0)
        dr_image_unref(o->images[--o->n], NULL);
}

int dr_chain_open(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                  struct dr_chain **chain, struct dr_error *err)
{
    static const struct dr_open_options defaults;
    CLEANUP_FREE struct opening *o = calloc(1, sizeof(*o));
    if (!o)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    o->fs = fs;
    o->options = options ? options : &defaults;
    if (o->options->flags & ~OPEN_FLAGS)
        return dr_fail(err, EINVAL, "%s: unknown flags %#x", path, o->options->flags & ~OPEN_FLAGS);
    int r = dr_gate_make(&o->gate, fs, o->options, err);
    if (r < 0)
        return r;
    r = dr_image_open_through(fs, path, o->options->format, o->options->flags, &o->gate,
                              o->options->data_file, &o->images[0], err);
    if (r == 0) {
        o->n = 1;
        r = open_chain(o, err);
    }
    dr_gate_clear(&o->gate);
    if (r < 0) {
        drop_images(o);
        return hint_at_link(fs, path, r, err);
    }
    *chain = dr_chain_new(o->images, o->n);
    return *chain ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
}
