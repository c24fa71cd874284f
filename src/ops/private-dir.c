/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Private directories of new images: moving what is in one, and what becomes of those that
 * interrupted attempts left. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* In the private directory: the old main file, while extents are being exchanged. */
#define ASIDE ".replaced"

#define LOOKED_AT (UINT64_C(64) << 10) /* bytes of a main file: headers, or a descriptor */

static bool holds(struct dr_fs *fs, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, name);
    return path && dr_fs_exists(fs, path);
}

/* Do both names lead to one file? */
static bool is_one_file(struct dr_fs *fs, const char *a, const char *b)
{
    struct dr_file_id one, two;
    return fs->ops->identify(fs, a, &one, NULL) == 0 && fs->ops->identify(fs, b, &two, NULL) == 0 &&
           dr_same_id(one, two);
}

/* ------------------------------------------------------------------ moving and removing */

static int plan_one(struct dr_publish *plan, const char *dir, const char *final, const char *name,
                    struct dr_error *err)
{
    CLEANUP_FREE char *from = dr_path_join(dir, name), *to = dr_path_sibling(final, name);
    CLEANUP_FREE char *aside = dr_path_join(dir, ASIDE);
    if (!from || !to || !aside)
        return dr_fail(err, ENOMEM, "%s: out of memory", final);
    struct dr_publish_file f = {.from = from, .to = to};
    f.part = strcmp(name, dr_path_basename(final)) != 0;
    f.aside = f.part ? NULL : aside;
    f.replaces = plan->fs->ops->identify(plan->fs, to, &f.old, NULL) == 0 &&
                 !is_one_file(plan->fs, from, to);
    return dr_publish_add(plan, &f, err);
}

int dr_new_plan(struct dr_fs *fs, const char *dir, const char *final, struct dr_publish *plan,
                struct dr_error *err)
{
    char **names;
    size_t n;
    *plan = (struct dr_publish){.fs = fs, .durable = true, .over_links = true};
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++)
        if (strcmp(names[i], ASIDE) != 0)
            r = plan_one(plan, dir, final, names[i], err);
    dr_ops_free_names(names, n);
    if (r < 0)
        dr_publish_end(plan);
    return r;
}

int dr_new_move(struct dr_publish *plan, const char *dir, const char *final, struct dr_error *err)
{
    for (size_t i = 0; i < plan->n; i++)
        if (plan->files[i].replaces)
            dr_ops_copy_attrs(plan->fs, plan->files[i].to, plan->files[i].from);
    int r = dr_publish(plan, err);
    if (r == 0 && plan->fs->ops->rmdir)
        plan->fs->ops->rmdir(plan->fs, dir, NULL); /* recover knows an empty directory */
    /* Bitmaps of the image that gave way go with no other. Those that stay, because nothing comes
     * this far, are distrusted: they know which file they are about. */
    if (r == 0)
        dr_bitmaps_unlink(plan->fs, final, NULL);
    return r;
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

/* ------------------------------------------------------------------ what one is */

/* Earlier versions cut long names to this many bytes and noted the full one nowhere. */
#define OLD_CUT 200

/* Is dir one of this image's? It may be that of an image with a longer name, cut by an earlier
 * version: then a file inside has that name, or, when the main file has left, no file tells. */
static bool may_be_cut_short(const struct dr_aside *aside, struct dr_fs *fs, const char *dir)
{
    char **names;
    size_t n;
    bool may = false;
    if (aside->cut || aside->stem_len != OLD_CUT)
        return false;
    if (dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return true;
    for (size_t i = 0; i < n; i++)
        may |= strncmp(names[i], aside->stem, OLD_CUT) == 0 && names[i][OLD_CUT] != 0;
    dr_ops_free_names(names, n);
    return may;
}

static bool can_be_read(struct dr_fs *fs, const char *path)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    uint8_t buf[4096];
    int r = dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, NULL);
    uint64_t size = r == 0 ? dr_file_size(file) : 0;
    for (uint64_t off = 0; r == 0 && off < dr_min(size, LOOKED_AT); off += sizeof(buf))
        r = dr_file_pread_short(file, buf, off, sizeof(buf), NULL, NULL);
    return r == 0;
}

/* Does the image at path lack files that it names? One that does not open may be cut short, as a
 * kill leaves it while it is being made; but what cannot be read now tells nothing: -EIO. */
static int lacks_files(struct dr_fs *fs, const char *path)
{
    const unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    int r = 0;
    for (unsigned tries = 0; tries < 2; tries++) {
        CLEANUP_IMAGE struct dr_image *image = NULL;
        r = dr_image_open(fs, path, NULL, flags, &image, NULL);
        if (r == 0 || r == -ENOENT)
            return r == -ENOENT;
        if (!can_be_read(fs, path))
            return -EIO;
    }
    return 0;
}

/*  in dir                              it was interrupted
 *  main file that has its final name   after the move, which took a second link: remove
 *  main file and .replaced             while extents changed hands: half moved
 *  main file that lacks others         after they had been moved: half moved
 *  main file                           before the move: remove
 *  .replaced, and no final name        the old image is nowhere else: leave it
 *  anything else                       before the main file was made or after it left: remove
 */
enum dr_new_state dr_new_judge(struct dr_fs *fs, const char *dir, const char *final)
{
    const char *name = dr_path_basename(final);
    CLEANUP_FREE char *main = dr_path_join(dir, name);
    struct dr_aside aside;
    if (!main || !dr_aside_parse(dr_path_basename(dir), DR_ASIDE_DIR, &aside) ||
        !dr_aside_is_of(&aside, name))
        return DR_NEW_UNKNOWN;
    if (is_one_file(fs, main, final))
        return DR_NEW_UNUSED;
    if (dr_fs_exists(fs, main)) {
        int lacks = holds(fs, dir, ASIDE) ? 1 : lacks_files(fs, main);
        return lacks < 0 ? DR_NEW_UNKNOWN : lacks > 0 ? DR_NEW_HALF_MOVED : DR_NEW_UNUSED;
    }
    if (may_be_cut_short(&aside, fs, dir))
        return DR_NEW_UNKNOWN;
    return holds(fs, dir, ASIDE) && !dr_fs_exists(fs, final) ? DR_NEW_UNKNOWN : DR_NEW_UNUSED;
}

bool dr_new_may_finish(struct dr_fs *fs, const char *final)
{
    return !dr_fs_exists(fs, final);
}

int dr_new_finish(struct dr_fs *fs, const char *dir, const char *final, struct dr_error *err)
{
    struct dr_publish plan;
    int r = dr_new_plan(fs, dir, final, &plan, err);
    if (r < 0)
        return r;
    plan.again = true;
    r = dr_new_move(&plan, dir, final, err);
    dr_publish_end(&plan);
    return r;
}

/* ------------------------------------------------------------------ other attempts at an image */

/* Calls each() for the private directories of other attempts, locked, until it returns true;
 * returns that. Skips those that somebody is at work in. Where directories have no locks, lock is
 * NULL and only the locks of the files inside can tell. */
static bool any_other(const struct dr_new_image *n,
                      bool (*each)(const struct dr_new_image *n, const char *dir,
                                   const struct dr_dir_lock *lock, const void *what),
                      const void *what)
{
    CLEANUP_FREE char *around = dr_path_dirname(n->final);
    char **names;
    size_t count;
    bool found = false;
    if (!around || dr_ops_list(n->fs, around, &names, &count, NULL) < 0)
        return false;
    for (size_t i = 0; i < count && !found; i++) {
        struct dr_aside aside;
        if (!dr_aside_parse(names[i], DR_ASIDE_DIR, &aside) ||
            !dr_aside_is_of(&aside, dr_path_basename(n->final)) ||
            strcmp(names[i], dr_path_basename(n->dir)) == 0)
            continue;
        CLEANUP_FREE char *dir = dr_path_sibling(n->final, names[i]);
        struct dr_dir_lock *lock = NULL;
        int r = dir ? dr_dir_lock(n->fs, dir, &lock, NULL) : -ENOMEM;
        found = (r == 0 || r == -ENOTSUP) && each(n, dir, lock, what);
        dr_dir_unlock(lock);
    }
    dr_ops_free_names(names, count);
    return found;
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

static bool moved_it(const struct dr_new_image *n, const char *dir, const struct dr_dir_lock *lock,
                     const void *name)
{
    (void)lock;
    return main_names(n, dir, name) && (!holds(n->fs, dir, name) || holds(n->fs, dir, ASIDE));
}

bool dr_new_left_by_others(const struct dr_new_image *n, const char *name)
{
    return any_other(n, moved_it, name);
}

/* Is any file in dir locked, or may any be made at once? Without a lock of the directory itself, an
 * empty one may have been made a moment ago. */
static bool is_in_use(struct dr_fs *fs, const char *dir, const struct dr_dir_lock *lock)
{
    char **names;
    size_t n;
    if (dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return true;
    bool used = n == 0 && !lock;
    for (size_t i = 0; i < n && !used; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        CLEANUP_FILE struct dr_file *file = NULL;
        used = !path || dr_file_open(fs, path, DR_FILE_RDWR, &file, NULL) < 0;
    }
    dr_ops_free_names(names, n);
    return used;
}

static bool drop(const struct dr_new_image *n, const char *dir, const struct dr_dir_lock *lock,
                 const void *state)
{
    enum dr_new_state wanted = *(const enum dr_new_state *)state;
    if (dr_new_judge(n->fs, dir, n->final) == wanted &&
        (wanted == DR_NEW_HALF_MOVED || !is_in_use(n->fs, dir, lock)))
        dr_new_remove_all(n->fs, dir, NULL);
    return false;
}

void dr_new_drop_others(const struct dr_new_image *n, enum dr_new_state state)
{
    any_other(n, drop, &state);
}

static bool settle(const struct dr_new_image *n, const char *dir, const struct dr_dir_lock *lock,
                   const void *what)
{
    (void)what;
    enum dr_new_state state = dr_new_judge(n->fs, dir, n->final);
    if (is_in_use(n->fs, dir, lock))
        return false;
    if (state == DR_NEW_UNUSED)
        dr_new_remove_all(n->fs, dir, NULL);
    else if (state == DR_NEW_HALF_MOVED && dr_new_may_finish(n->fs, n->final))
        dr_new_finish(n->fs, dir, n->final, NULL);
    return false;
}

void dr_new_settle_others(struct dr_fs *fs, const char *final)
{
    char path[] = "", *to = strdup(final);
    const struct dr_new_image n = {.fs = fs, .final = to, .dir = path};
    if (to)
        any_other(&n, settle, NULL);
    free(to);
}
