/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* retire: an image whose plain file holds every byte of the disk gives up its metadata.
 *
 * The plain file is durable before the metadata goes, and that is one unlink (or rename): killed
 * anywhere, the name leads to the whole image, or the plain file is the disk. */
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

struct retire {
    struct dr_fs *fs;
    const char *path;
    const struct dr_retire_options *o;
    struct dr_disk *disk;
    struct dr_image *image; /* of the disk; or of one that others use */
};

static struct dr_image *image_of(const struct retire *rt)
{
    return rt->image;
}

static struct dr_file *plain_of(const struct retire *rt)
{
    struct dr_image *image = image_of(rt);
    return image->fmt->plain ? image->fmt->plain(image) : NULL;
}

/* ------------------------------------------------------------------ opening */

static int open_image(struct retire *rt, unsigned more, struct dr_error *err)
{
    struct dr_open_options open = rt->o->open;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    open.flags |= DR_OPEN_NO_BACKING | more;
    int r = dr_open_fs(rt->fs, rt->path, &open, &rt->disk, err);
    if (r == 0)
        rt->image = rt->disk->chain->images[0];
    return r;
}

/* A revision that we only read can be retired as well, since retiring writes nothing to it. Its
 * files are locked as by a writer, so that nobody else has the image open. */
static int open_read_only(struct retire *rt, struct dr_error *err)
{
    int r = open_image(rt, 0, err);
    for (unsigned i = 0; r == 0 && i < image_of(rt)->n_files; i++)
        r = dr_file_upgrade(image_of(rt)->files[i], err);
    return r;
}

static int open_exclusive(struct retire *rt, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = open_image(rt, DR_OPEN_RDWR | DR_OPEN_UNCHANGED, &why);
    if (r == -EROFS || r == -ENOTSUP)
        return open_read_only(rt, err);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

static int check_kind(const struct retire *rt, struct dr_error *err)
{
    if (plain_of(rt))
        return 0;
    return dr_fail(err, ENOTSUP, "%s: %s images do not keep their disk in a plain file", rt->path,
                   image_of(rt)->fmt->name);
}

/* ------------------------------------------------------------------ what may be refused */

/* Is this extent stored in the plain file, at the offset it has on the disk? */
static bool is_plain(const struct dr_extent *ext, const struct dr_file *plain, uint64_t off)
{
    return ext->kind == DR_DATA && ext->file == plain && ext->host == off;
}

static int count_missing(const struct retire *rt, struct dr_retire_state *state,
                         struct dr_error *err)
{
    struct dr_image *image = image_of(rt);
    struct dr_file *plain = plain_of(rt);
    struct dr_extent ext;
    for (uint64_t off = 0; off < image->size; off += ext.len) {
        int r = dr_image_map(image, off, image->size - off, &ext, err);
        if (r < 0)
            return r;
        if (is_plain(&ext, plain, off))
            continue;
        if (state->missing == 0)
            state->first_missing = off;
        state->missing += ext.len;
    }
    return 0;
}

static int check_children(const struct retire *rt, struct dr_error *err)
{
    CLEANUP_FREE char *list = NULL;
    int r = dr_ops_children(image_of(rt), &rt->o->open, &list, err);
    if (r < 0 || !*list)
        return r;
    return dr_fail(err, EBUSY,
                   "%s: these images have it as their parent: %s; rebase them first (-u to the "
                   "plain file is enough), or force it",
                   rt->path, list);
}

static int look(const struct retire *rt, struct dr_retire_state *state, struct dr_error *err)
{
    int r = check_kind(rt, err);
    if (r == 0 && !rt->o->force)
        r = check_children(rt, err);
    if (r == 0)
        r = count_missing(rt, state, err);
    if (r < 0)
        return r;
    state->plain = strdup(plain_of(rt)->path);
    return state->plain ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rt->path);
}

static int refuse_missing(const struct retire *rt, const struct dr_retire_state *state,
                          struct dr_error *err)
{
    if (state->missing == 0)
        return 0;
    return dr_fail(err, ENODATA,
                   "%s: %llu of %llu bytes are not in %s yet, the first at offset %llu; "
                   "`drover stream` brings them in",
                   rt->path, (unsigned long long)state->missing,
                   (unsigned long long)image_of(rt)->size, state->plain,
                   (unsigned long long)state->first_missing);
}

/* ------------------------------------------------------------------ the removal */

static char *done_name(const char *path)
{
    char *name;
    return asprintf(&name, "%s.done", path) < 0 ? NULL : name;
}

static int put_away(const struct retire *rt, const char *path, struct dr_error *err)
{
    CLEANUP_FREE char *done = done_name(path);
    if (!done)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (dr_fs_exists(rt->fs, done))
        return dr_fail(err, EEXIST, "%s: exists already: %s cannot be kept under that name", done,
                       path);
    return rt->fs->ops->rename_new(rt->fs, path, done, err);
}

/* Follow links to the real name: unlinking a link would leave the metadata where it is. */
static int real_name(const struct retire *rt, char **real, struct dr_error *err)
{
    struct dr_file_id id;
    int r = rt->fs->ops->realpath(rt->fs, rt->path, real, err);
    if (r == 0)
        r = rt->fs->ops->identify(rt->fs, *real, &id, err);
    if (r < 0 || dr_same_id(id, image_of(rt)->files[0]->id))
        return r;
    return dr_fail(err, ESTALE, "%s: was replaced by somebody else meanwhile", rt->path);
}

static int remove_metadata(const struct retire *rt, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    int r = real_name(rt, &real, err);
    if (r == 0) /* its bitmaps are of an image that is no more */
        r = dr_bitmaps_unlink(rt->fs, real, err);
    if (r == 0)
        r = rt->o->keep ? put_away(rt, real, err) : rt->fs->ops->unlink(rt->fs, real, err);
    if (r == 0 && !(rt->o->open.flags & DR_OPEN_NO_FLUSH))
        r = rt->fs->ops->sync_dir(rt->fs, real, err);
    return r;
}

/* ------------------------------------------------------------------ of a disk in use */

int dr_ops_retire_check(struct dr_image *image, const struct dr_open_options *open,
                        struct dr_error *err)
{
    const struct dr_retire_options o = {.open = *open};
    const struct retire rt = {.fs = image->fs, .path = image->path, .o = &o, .image = image};
    return check_children(&rt, err);
}

int dr_ops_retire_remove(struct dr_image *image, const struct dr_open_options *open,
                         struct dr_error *err)
{
    struct dr_retire_options o = {.open = *open};
    const struct retire rt = {.fs = image->fs, .path = image->path, .o = &o, .image = image};
    o.open.flags |= image->flags & DR_OPEN_NO_FLUSH;
    return remove_metadata(&rt, err);
}

/* Is the open image nothing but a second way to the disk? */
static int check_rest(const struct retire *rt, struct dr_disk *disk, struct dr_error *err)
{
    struct dr_retire_state state = {0};
    struct dr_chain *chain = dr_disk_chain(disk);
    const struct dr_image *now = chain->images[0];
    const struct dr_file *plain = plain_of(rt);
    bool its = plain && now->n_files == 1 && dr_same_id(plain->id, now->files[0]->id) &&
               !image_of(rt)->backing_name;
    int r = its ? count_missing(rt, &state, err) : 0;
    if (r == 0 && (!its || state.missing > 0))
        r = dr_fail(err, EINVAL, "%s: is not what is left of an image that the disk %s was: kept",
                    rt->path, now->path);
    dr_chain_unref(chain, NULL);
    return r;
}

int dr_ops_retire_rest(struct dr_disk *disk, const char *path, const struct dr_open_options *open,
                       struct dr_error *err)
{
    const struct dr_retire_options o = {.open = *open};
    struct retire rt = {.fs = disk->fs, .path = path, .o = &o};
    if (!dr_fs_exists(rt.fs, path))
        return 0;
    int r = open_image(&rt, DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK, err);
    if (r == 0)
        r = check_rest(&rt, disk, err);
    if (r == 0)
        r = remove_metadata(&rt, err);
    dr_ops_close(&rt.disk, NULL);
    return r;
}

/* ------------------------------------------------------------------ by path */

static int run(struct retire *rt, struct dr_retire_state *state, struct dr_error *err)
{
    int r = open_exclusive(rt, err);
    if (r == 0)
        r = look(rt, state, err);
    if (r == 0)
        r = refuse_missing(rt, state, err);
    if (r == 0) /* flush what an earlier process wrote without making it durable, too */
        r = dr_image_harden(image_of(rt), err);
    return r < 0 ? r : remove_metadata(rt, err);
}

/* With keep, an earlier run may have been killed after it had renamed the file. */
static bool was_put_away(const struct retire *rt, const char *done)
{
    return rt->o->keep && !dr_fs_exists(rt->fs, rt->path) && dr_fs_exists(rt->fs, done);
}

static int finish_earlier(struct retire *rt, const char *done, struct dr_retire_state *state,
                          struct dr_error *err)
{
    struct retire old = {.fs = rt->fs, .path = done, .o = rt->o};
    int r = open_image(&old, 0, err);
    if (r == 0)
        r = look(&old, state, err);
    if (r == 0)
        r = refuse_missing(&old, state, err);
    if (r == 0)
        r = dr_image_harden(image_of(&old), err);
    int closed = dr_ops_close(&old.disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_retire_fs(struct dr_fs *fs, const char *path, const struct dr_retire_options *options,
                 char **plain, struct dr_error *err)
{
    static const struct dr_retire_options defaults;
    struct retire rt = {.fs = fs, .path = path, .o = options ? options : &defaults};
    struct dr_retire_state state = {0};
    CLEANUP_FREE char *done = done_name(path);
    if (!done)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    bool again = was_put_away(&rt, done);
    int r = again ? finish_earlier(&rt, done, &state, err) : run(&rt, &state, err);
    int closed = dr_ops_close(&rt.disk, r == 0 ? err : NULL);
    r = r < 0 ? r : closed;
    if (r == 0 && plain)
        *plain = DR_STEAL(state.plain);
    free(state.plain);
    return r;
}

int dr_retire(const char *path, const struct dr_retire_options *options, char **plain,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return dr_retire_fs(dr_fs_posix(), path, options, plain, err);
}

int dr_retire_look_fs(struct dr_fs *fs, const char *path, const struct dr_retire_options *options,
                      struct dr_retire_state *state, struct dr_error *err)
{
    static const struct dr_retire_options defaults;
    struct retire rt = {.fs = fs, .path = path, .o = options ? options : &defaults};
    *state = (struct dr_retire_state){0};
    int r = open_image(&rt, 0, err);
    if (r == 0)
        r = look(&rt, state, err);
    dr_ops_close(&rt.disk, NULL);
    return r;
}

int dr_retire_look(const char *path, const struct dr_retire_options *options,
                   struct dr_retire_state *state, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(state, err);
    return dr_retire_look_fs(dr_fs_posix(), path, options, state, err);
}
