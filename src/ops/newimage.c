/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New images, which may be several files and may replace older ones. dr_new_begin locks the file
 * that is replaced and makes a private directory beside it; the driver makes the image in there
 * under its own names; dr_new_publish moves the files out, the main file last. An interruption
 * leaves the private directory, and dr_new_judge tells by what is in it whether the image had begun
 * to appear and must be finished, or nothing had changed and it can be removed. */
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define TRIES 16
/* In the private directory: the old main file, while extents are being exchanged. */
#define ASIDE ".replaced"

static int make_dir(struct dr_new_image *n, struct dr_error *err)
{
    const char *base = dr_path_basename(n->final);
    for (int i = 0; i < TRIES; i++) {
        CLEANUP_FREE char *dir = dr_aside_path(n->final, DR_ASIDE_DIR);
        n->path = dir ? dr_path_join(dir, base) : NULL;
        if (!n->path)
            return dr_fail(err, ENOMEM, "%s: out of memory", n->final);
        struct dr_error mine = DR_ERROR_INIT;
        int r = n->fs->ops->mkdir ? n->fs->ops->mkdir(n->fs, dir, &mine) : 0;
        if (r == 0) {
            n->dir = DR_STEAL(dir);
            return 0;
        }
        free(n->path);
        n->path = NULL;
        if (r != -EEXIST)
            return dr_fail(err, -r, "%s%s", mine.text,
                           r == -EACCES && n->old
                               ? ": a new image is made beside the old one; convert -n writes over "
                                 "what is there"
                               : "");
    }
    return dr_fail(err, EEXIST, "%s: no free name for a temporary directory next to it", n->final);
}

/* A dangling symlink tells where the image should go: create it at the link's target. */
static int follow_link(struct dr_new_image *n, struct dr_error *err)
{
    CLEANUP_FREE char *to = NULL;
    int r = dr_path_follow(n->final, &to);
    if (r < 0)
        return dr_fail(err, -r, "%s: the link cannot be followed", n->final);
    if (to) {
        free(n->final);
        n->final = DR_STEAL(to);
    }
    return 0;
}

/* Lock the file that the image replaces, so that nobody is using it and nobody begins to. Without
 * such a file, find out where the image should go. */
static int lock_old(struct dr_new_image *n, const char *path, bool no_replace, unsigned flags,
                    struct dr_error *err)
{
    struct dr_file_id id;
    int r = n->fs->ops->identify(n->fs, path, &id, NULL);
    if (r == -ENOENT && !no_replace && n->fs == dr_fs_posix())
        return follow_link(n, err);
    if (r < 0)
        return 0; /* nothing there; if it is worse, making the new one says so */
    if (no_replace)
        return dr_fail(err, EEXIST, "%s: exists already", path);
    char *real = NULL;
    if (n->fs->ops->realpath(n->fs, path, &real, NULL) == 0) {
        free(n->final);
        n->final = real;
    }
    if (n->fs == dr_fs_posix() && dr_path_is_mount(n->final))
        return dr_fail(err, EBUSY,
                       "%s: is a mount point: no new image can take its place; convert -n writes "
                       "over what is there",
                       n->final);
    unsigned file_flags = DR_FILE_RDWR | (flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0);
    r = dr_file_open(n->fs, n->final, file_flags, &n->old, err);
    if (r == 0 && n->old->block_device) /* the move would put a file in the place of its node */
        return dr_fail(err, ENOTSUP, "%s: is a block device: no new image takes its place",
                       n->final);
    return r;
}

static int refuse_no_device(const struct dr_new_image *n, struct dr_error *err)
{
    if (n->old || n->fs != dr_fs_posix() || !dr_path_is_no_device(n->final))
        return 0;
    return dr_fail(err, ENODEV, "%s: there is no such device, and a file there would not last",
                   n->final);
}

static void drop_unused(const struct dr_new_image *n);

int dr_new_begin(struct dr_new_image *n, struct dr_fs *fs, const char *path, bool no_replace,
                 unsigned flags, struct dr_error *err)
{
    *n = (struct dr_new_image){
        .fs = fs, .durable = !(flags & DR_OPEN_NO_FLUSH), .no_replace = no_replace};
    n->final = strdup(path);
    int r = n->final ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r == 0)
        r = lock_old(n, path, no_replace, flags, err);
    if (r == 0)
        r = refuse_no_device(n, err);
    if (r == 0)
        r = make_dir(n, err);
    if (r == 0 && !(flags & DR_OPEN_NO_LOCK)) /* without locks nobody can tell */
        drop_unused(n);
    if (r < 0)
        dr_new_abandon(n);
    return r;
}

/* ------------------------------------------------------------------ moving and removing */

/* Give the file to owner, mode and labels of the file from, as far as we may. */
static void take_attrs(struct dr_fs *fs, const char *from, const char *to)
{
    CLEANUP_FILE struct dr_file *old = NULL, *fresh = NULL;
    unsigned share = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    if (dr_file_open(fs, from, share, &old, NULL) == 0 &&
        dr_file_open(fs, to, DR_FILE_RDWR | DR_FILE_NO_LOCK, &fresh, NULL) == 0)
        fs->ops->copy_attrs(fs, old, fresh, NULL);
}

void dr_new_take_attrs(const struct dr_new_image *n, const char *from)
{
    char **names;
    size_t count;
    if (dr_ops_list(n->fs, n->dir, &names, &count, NULL) < 0)
        return;
    for (size_t i = 0; i < count; i++) {
        CLEANUP_FREE char *to = dr_path_join(n->dir, names[i]);
        if (to)
            take_attrs(n->fs, from, to);
    }
    dr_ops_free_names(names, count);
}

struct move {
    struct dr_fs *fs;
    const char *dir, *final;
    bool durable;
    bool no_replace; /* nothing gives way */
    bool main_new;   /* the main file had no predecessor when this began */
    char **names;
    size_t n, moved;
    bool aside;      /* the old main file has lost its name */
    bool replaced;   /* an old extent has given way: there is no way back */
    bool kept_aside; /* the old main file could not be given its name back */
};

static bool exists(struct dr_fs *fs, const char *path)
{
    struct dr_file_id id;
    return fs->ops->identify(fs, path, &id, NULL) == 0;
}

/* Rename in to out. fresh: nothing had that name before, so a file that somebody else has put there
 * meanwhile is refused and not replaced. */
static int take_place(const struct move *m, const char *in, const char *out, bool fresh,
                      struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    if (!fresh)
        return m->fs->ops->rename(m->fs, in, out, err);
    int r = m->fs->ops->rename_new(m->fs, in, out, &why);
    if (r == -EEXIST && !m->no_replace && !exists(m->fs, out)) /* a link that leads nowhere */
        return m->fs->ops->rename(m->fs, in, out, err);
    if (r == -EEXIST)
        return dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", out);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

static int move_one(struct move *m, const char *name, bool back, struct dr_error *err)
{
    CLEANUP_FREE char *in = dr_path_join(m->dir, name), *out = dr_path_sibling(m->final, name);
    if (!in || !out)
        return dr_fail(err, ENOMEM, "%s: out of memory", m->final);
    if (back)
        return m->fs->ops->rename(m->fs, out, in, err);
    bool main = strcmp(name, dr_path_basename(m->final)) == 0;
    bool there = !m->no_replace && !(main && m->main_new) && exists(m->fs, out);
    if (there)
        take_attrs(m->fs, out, in);
    int r = take_place(m, in, out, !there, err);
    m->replaced |= there && r == 0 && !main;
    return r;
}

static int sync_places(const struct move *m, struct dr_error *err)
{
    return m->durable ? m->fs->ops->sync_dir(m->fs, m->final, err) : 0;
}

static bool is_main(const struct move *m, size_t i)
{
    return strcmp(m->names[i], dr_path_basename(m->final)) == 0;
}

static bool extents_give_way(const struct move *m)
{
    bool any = false;
    for (size_t i = 0; i < m->n && !any; i++) {
        CLEANUP_FREE char *out = dr_path_sibling(m->final, m->names[i]);
        any = !is_main(m, i) && out && exists(m->fs, out);
    }
    return any;
}

/* Several files cannot be exchanged at once. Before the first old extent is replaced, the old main
 * file is moved into the private directory: a reader finds no image rather than the old descriptor
 * over new extents, and recover sees by it that the new image was complete. */
static int put_aside(struct move *m, struct dr_error *err)
{
    CLEANUP_FREE char *aside = dr_path_join(m->dir, ASIDE);
    CLEANUP_FREE char *main = dr_path_join(m->dir, dr_path_basename(m->final));
    if (!aside || !main)
        return dr_fail(err, ENOMEM, "%s: out of memory", m->final);
    bool before = exists(m->fs, aside), there = exists(m->fs, m->final);
    if (before && there)
        return dr_fail(
            err, EEXIST,
            "%s: was being replaced by what is in %s, but exists again: remove one of them",
            m->final, m->dir);
    if (!there || !extents_give_way(m))
        return 0;
    take_attrs(m->fs, m->final, main);
    int r = m->fs->ops->rename(m->fs, m->final, aside, err);
    m->aside = r == 0;
    if (r == 0 && m->durable) /* both directories: the old file must not end up in neither */
        r = m->fs->ops->sync_dir(m->fs, aside, err);
    return r == 0 ? sync_places(m, err) : r;
}

/* Where that fails the old file stays aside, and the private directory with it. */
static void put_back(struct move *m)
{
    CLEANUP_FREE char *aside = dr_path_join(m->dir, ASIDE);
    if (!m->aside)
        return;
    if (aside && m->fs->ops->rename_new(m->fs, aside, m->final, NULL) == 0)
        sync_places(m, NULL);
    else
        m->kept_aside = true;
}

/* Move all files out of the private directory, the main file last: until then no image can be
 * opened by the final name. After a failure move them back, unless an old extent has been replaced.
 */
static int move_all(struct move *m, struct dr_error *err)
{
    int r = put_aside(m, err);
    while (m->moved < m->n && r == 0) {
        if (!is_main(m, m->moved))
            r = move_one(m, m->names[m->moved], false, err);
        m->moved += r == 0;
    }
    if (r == 0 && m->n > 1)
        r = sync_places(m, err);
    if (r == 0)
        r = move_one(m, dr_path_basename(m->final), false, err);
    if (r == 0)
        return sync_places(m, err);
    /* Not the one that failed: an old file may stand in its place. */
    for (size_t i = 0; !m->replaced && i < m->moved; i++)
        if (!is_main(m, i))
            move_one(m, m->names[i], true, NULL);
    if (!m->replaced)
        put_back(m);
    return r;
}

/* The files of a private directory that are to be moved. */
static int list_new(struct dr_fs *fs, const char *dir, char ***names, size_t *n,
                    struct dr_error *err)
{
    int r = dr_ops_list(fs, dir, names, n, err);
    size_t kept = 0;
    for (size_t i = 0; r == 0 && i < *n; i++) {
        if (strcmp((*names)[i], ASIDE) == 0)
            free((*names)[i]);
        else
            (*names)[kept++] = (*names)[i];
    }
    *n = r == 0 ? kept : 0;
    return r;
}

/* *stuck: it failed after an old extent was replaced, or the old main file is still aside. The
 * private directory must stay, so that recover can finish. */
static int move_dir(struct move *m, bool *stuck, struct dr_error *err)
{
    struct dr_fs *fs = m->fs;
    const char *dir = m->dir;
    *stuck = false;
    int r = list_new(fs, dir, &m->names, &m->n, err);
    if (r < 0)
        return r;
    r = move_all(m, err);
    dr_ops_free_names(m->names, m->n);
    *stuck = r < 0 && (m->replaced || m->kept_aside);
    CLEANUP_FREE char *aside = dr_path_join(dir, ASIDE);
    if (r == 0 && aside && exists(fs, aside))
        fs->ops->unlink(fs, aside, NULL);
    if (r == 0 && fs->ops->rmdir)
        fs->ops->rmdir(fs, dir, NULL); /* an empty directory harms nobody; recover knows it */
    return r;
}

int dr_new_move_all(struct dr_fs *fs, const char *dir, const char *final, bool durable,
                    struct dr_error *err)
{
    struct move m = {.fs = fs, .dir = dir, .final = final, .durable = durable};
    bool stuck;
    return move_dir(&m, &stuck, err);
}

int dr_new_remove_all(struct dr_fs *fs, const char *dir, struct dr_error *err)
{
    char **names;
    size_t n;
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        r = path ? fs->ops->unlink(fs, path, err) : dr_fail(err, ENOMEM, "%s: out of memory", dir);
    }
    dr_ops_free_names(names, n);
    if (r == 0 && fs->ops->rmdir)
        r = fs->ops->rmdir(fs, dir, err);
    return r;
}

static void forget(struct dr_new_image *n)
{
    dr_file_unref(n->old);
    free(n->final);
    free(n->dir);
    free(n->path);
    *n = (struct dr_new_image){0};
}

static bool is_part_of(const struct dr_image *image, struct dr_file_id id)
{
    for (unsigned i = 0; image && i < image->n_files; i++)
        if (dr_ops_same_id(image->files[i]->id, id))
            return true;
    return false;
}

/* The image that gives way, to tell its files from others; NULL if it is none that opens. */
static struct dr_image *open_old(const struct dr_new_image *n)
{
    struct dr_image *image;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    if (!n->old || dr_image_open(n->fs, n->final, NULL, flags, &image, NULL) < 0)
        return NULL;
    return image;
}

/* The private directories of other attempts at this image; free with dr_ops_free_names. */
static char **other_dirs(const struct dr_new_image *n, size_t *count)
{
    CLEANUP_FREE char *around = dr_path_dirname(n->final);
    char **names;
    size_t all, kept = 0;
    *count = 0;
    if (!around || dr_ops_list(n->fs, around, &names, &all, NULL) < 0)
        return NULL;
    for (size_t i = 0; i < all; i++) {
        struct dr_aside aside;
        CLEANUP_FREE char *name = names[i];
        if (!dr_aside_parse(name, DR_ASIDE_DIR, &aside) ||
            !dr_aside_is_of(&aside, dr_path_basename(n->final)))
            continue;
        char *dir = dr_path_sibling(n->final, name);
        if (dir && strcmp(dir, n->dir) != 0)
            names[kept++] = dir;
        else
            free(dir);
    }
    *count = kept;
    return names;
}

static bool holds(struct dr_fs *fs, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, name);
    struct dr_file_id id;
    return path && fs->ops->identify(fs, path, &id, NULL) == 0;
}

#define MAIN_MAX (8u << 20) /* no descriptor that names other files is larger */

/* Does the main file in the private directory name this one? Only then the attempt made it. */
static bool main_names(const struct dr_new_image *n, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, dr_path_basename(n->final));
    CLEANUP_FILE struct dr_file *main = NULL;
    if (!path || dr_file_open(n->fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &main, NULL) < 0)
        return false;
    size_t len = (size_t)dr_min(dr_file_size(main), MAIN_MAX);
    CLEANUP_FREE char *text = malloc(len + 1);
    return text && dr_file_pread(main, text, 0, len, NULL) == 0 &&
           memmem(text, len, name, strlen(name));
}

/* Was name moved here by an earlier attempt at this image that was interrupted before it moved its
 * main file? Then it is our own and may be replaced. */
static bool is_left_by_us(const struct dr_new_image *n, const char *name)
{
    size_t count;
    char **dirs = other_dirs(n, &count);
    bool found = false;
    for (size_t i = 0; i < count && !found; i++)
        found = main_names(n, dirs[i], name) &&
                (!holds(n->fs, dirs[i], name) || holds(n->fs, dirs[i], ASIDE));
    dr_ops_free_names(dirs, count);
    return found;
}

static bool is_half_moved(struct dr_fs *fs, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, name);
    CLEANUP_IMAGE struct dr_image *image = NULL;
    struct dr_error why = DR_ERROR_INIT;
    if (!path || !holds(fs, dir, name))
        return false;
    if (holds(fs, dir, ASIDE))
        return true;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    return dr_image_open(fs, path, NULL, flags, &image, &why) == -ENOENT;
}

/* Earlier versions cut long names to this many bytes and noted the full one nowhere. */
#define OLD_CUT 200

static bool may_be_cut_short(const struct dr_aside *aside, char *const *names, size_t n)
{
    bool may = false;
    for (size_t i = 0; !aside->cut && aside->stem_len == OLD_CUT && i < n; i++)
        may |= strncmp(names[i], aside->stem, OLD_CUT) == 0 && names[i][OLD_CUT] != 0;
    return may;
}

/* The main file has its final name and, where that takes a second link, its old one, too. */
static bool is_published(struct dr_fs *fs, const char *dir, const char *final)
{
    CLEANUP_FREE char *main = dr_path_join(dir, dr_path_basename(final));
    struct dr_file_id inside, outside;
    return main && fs->ops->identify(fs, main, &inside, NULL) == 0 &&
           fs->ops->identify(fs, final, &outside, NULL) == 0 && dr_ops_same_id(inside, outside);
}

bool dr_new_may_finish(struct dr_fs *fs, const char *final)
{
    return !exists(fs, final);
}

enum dr_new_state dr_new_judge(struct dr_fs *fs, const char *dir, const char *final)
{
    const char *main = dr_path_basename(final);
    struct dr_aside aside;
    char **names;
    size_t n;
    if (!dr_aside_parse(dr_path_basename(dir), DR_ASIDE_DIR, &aside) ||
        !dr_aside_is_of(&aside, main) || dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return DR_NEW_UNKNOWN;
    bool cut = may_be_cut_short(&aside, names, n);
    dr_ops_free_names(names, n);
    if (is_published(fs, dir, final))
        return DR_NEW_UNUSED;
    if (is_half_moved(fs, dir, main))
        return DR_NEW_HALF_MOVED;
    if (holds(fs, dir, main))
        return DR_NEW_UNUSED;
    /* The main file is moved last: it has left, or was never made. */
    if (cut || (holds(fs, dir, ASIDE) && !exists(fs, final)))
        return DR_NEW_UNKNOWN;
    return DR_NEW_UNUSED;
}

/* The process that made dir has ended: none of its files is locked. An empty directory may have
 * been made a moment ago and counts as in use. */
static bool is_dead(struct dr_fs *fs, const char *dir)
{
    char **names;
    size_t n;
    if (dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return false;
    bool dead = n > 0;
    for (size_t i = 0; i < n && dead; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        CLEANUP_FILE struct dr_file *file = NULL;
        dead = path && dr_file_open(fs, path, DR_FILE_RDWR, &file, NULL) == 0;
    }
    dr_ops_free_names(names, n);
    return dead;
}

static void drop_dirs(const struct dr_new_image *n, enum dr_new_state state)
{
    size_t count;
    char **dirs = other_dirs(n, &count);
    for (size_t i = 0; i < count; i++)
        if (dr_new_judge(n->fs, dirs[i], n->final) == state &&
            (state == DR_NEW_HALF_MOVED || is_dead(n->fs, dirs[i])))
            dr_new_remove_all(n->fs, dirs[i], NULL);
    dr_ops_free_names(dirs, count);
}

/* Before a new attempt: give back the space of earlier ones that never began to move files. Those
 * that did are still needed, to tell whose the moved files are. */
static void drop_unused(const struct dr_new_image *n)
{
    drop_dirs(n, DR_NEW_UNUSED);
}

/* After success: completing an earlier, half moved attempt now would mix two images. */
static void drop_half_moved(const struct dr_new_image *n)
{
    drop_dirs(n, DR_NEW_HALF_MOVED);
}

/* May moving replace the file of this name next to the image? */
static bool may_replace(const struct dr_new_image *n, const struct dr_image *old, const char *name,
                        struct dr_file_id id)
{
    if (n->no_replace)
        return false;
    if (strcmp(name, dr_path_basename(n->final)) == 0)
        return n->old && dr_ops_same_id(n->old->id, id);
    return is_part_of(old, id) || is_left_by_us(n, name);
}

static int refuse_place(const struct dr_new_image *n, const char *name, const char *to,
                        struct dr_error *err)
{
    if (strcmp(name, dr_path_basename(n->final)) != 0)
        return dr_fail(err, EEXIST, "%s: exists already and is no part of %s", to, n->final);
    if (n->old)
        return dr_fail(err, ESTALE, "%s: was replaced by somebody else meanwhile", to);
    return dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", to);
}

int dr_new_check_places(const struct dr_new_image *n, struct dr_error *err)
{
    char **names;
    size_t count;
    int r = list_new(n->fs, n->dir, &names, &count, err);
    if (r < 0)
        return r;
    CLEANUP_IMAGE struct dr_image *image = open_old(n);
    for (size_t i = 0; i < count && r == 0; i++) {
        CLEANUP_FREE char *to = dr_path_sibling(n->final, names[i]);
        struct dr_file_id id;
        if (!to || n->fs->ops->identify(n->fs, to, &id, NULL) < 0)
            continue;
        if (!may_replace(n, image, names[i], id))
            r = refuse_place(n, names[i], to, err);
    }
    dr_ops_free_names(names, count);
    return r;
}

int dr_new_publish(struct dr_new_image *n, struct dr_error *err)
{
    struct move m = {.fs = n->fs,
                     .dir = n->dir,
                     .final = n->final,
                     .durable = n->durable,
                     .no_replace = n->no_replace,
                     .main_new = !n->old};
    bool stuck = false;
    int r = dr_new_check_places(n, err);
    if (r == 0)
        r = move_dir(&m, &stuck, err);
    if (stuck)
        dr_prefix(err, r, "%s: is complete but only half in its place, `drover recover %s` goes on",
                  n->final, n->final);
    else if (r < 0)
        dr_new_remove_all(n->fs, n->dir, NULL);
    else
        drop_half_moved(n);
    forget(n);
    return r;
}

void dr_new_abandon(struct dr_new_image *n)
{
    if (n->dir)
        dr_new_remove_all(n->fs, n->dir, NULL);
    forget(n);
}

int dr_new_create(const struct dr_new_image *n, const struct dr_format *fmt,
                  const struct dr_create_params *what, const struct dr_pair *pairs, size_t n_pairs,
                  unsigned flags, struct dr_error *err)
{
    CLEANUP_FREE struct dr_option *options = NULL;
    int r = dr_ops_settings(pairs, n_pairs, &options, err);
    if (r < 0)
        return r;
    struct dr_create_params params = *what;
    params.options = options;
    params.n_options = n_pairs;
    params.file_flags = dr_ops_file_flags(flags);
    params.final = n->final;
    params.any_path = flags & DR_OPEN_ANY_PATH;
    r = what->backing ? dr_image_harden(what->backing, err) : 0; /* its id gets recorded */
    return r < 0 ? r : fmt->create(n->fs, n->path, &params, err);
}
