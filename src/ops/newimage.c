/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Making a new image: find its place and lock what it replaces, make a private directory, let the
 * driver make the image there, move it (ops/newimage.h). */
#include <stdio.h>

#include "base/cleanup.h"
#include "core/fingerprint.h"
#include "ops/ops-internal.h"
#include "storage/vmware-lock.h"

#define TRIES 16

/* ------------------------------------------------------------------ the place */

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

/* Nothing is there yet. */
static int take_free_place(struct dr_new_image *n, struct dr_error *err)
{
    if (n->fs != dr_fs_posix())
        return 0;
    int r = n->no_replace ? 0 : follow_link(n, err);
    if (r == 0 && dr_path_is_no_device(n->final))
        r = dr_fail(err, ENODEV, "%s: there is no such device, and a file there would not last",
                    n->final);
    return r;
}

/* VMware takes no part in our locks. */
static int refuse_locked_by_vmware(const struct dr_new_image *n, unsigned flags,
                                   struct dr_error *err)
{
    bool locked = false;
    int r = flags & DR_OPEN_NO_LOCK ? 0 : dr_vmware_lock_look(n->fs, n->final, &locked, err);
    return r == 0 && locked ? dr_vmware_lock_refuse(n->final, err) : r;
}

/* Lock the file that the image replaces, so that nobody is using it and nobody begins to. */
static int lock_old(struct dr_new_image *n, unsigned flags, struct dr_error *err)
{
    char *real = NULL;
    if (n->no_replace)
        return dr_fail(err, EEXIST, "%s: exists already", n->final);
    if (n->fs->ops->realpath(n->fs, n->final, &real, NULL) == 0) {
        free(n->final);
        n->final = real;
    }
    if (n->fs == dr_fs_posix() && dr_path_is_mount(n->final))
        return dr_fail(err, EBUSY,
                       "%s: is a mount point: no new image can take its place; convert -n writes "
                       "over what is there",
                       n->final);
    unsigned file_flags = DR_FILE_RDWR | (flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0);
    int r = refuse_locked_by_vmware(n, flags, err);
    if (r == 0)
        r = dr_file_open(n->fs, n->final, file_flags, &n->old, err);
    if (r < 0 || !n->old->block_device)
        return r;
    n->on_device = true; /* a move would put a file in the place of its node */
    dr_file_unref(n->old);
    n->old = NULL;
    n->path = strdup(n->final);
    return n->path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", n->final);
}

/* ------------------------------------------------------------------ the private directory */

/* Make the directory and lock it. Another process may have locked it in between, to see whether it
 * is a leftover, and removes it then: -EEXIST, as if the name were taken. */
static int make_locked(struct dr_new_image *n, const char *dir, struct dr_error *err)
{
    int r = n->fs->ops->mkdir ? n->fs->ops->mkdir(n->fs, dir, 0700, err) : 0;
    if (r < 0)
        return r;
    r = dr_dir_lock(n->fs, dir, &n->lock, err);
    if (r == 0 || r == -ENOTSUP)
        return 0;
    if (n->fs->ops->rmdir)
        n->fs->ops->rmdir(n->fs, dir, NULL);
    return r == -EBUSY || r == -ENOENT ? -EEXIST : r;
}

static int make_dir(struct dr_new_image *n, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = -EEXIST;
    for (int i = 0; i < TRIES && r == -EEXIST; i++) {
        CLEANUP_FREE char *dir = dr_aside_path(n->final, DR_ASIDE_DIR);
        CLEANUP_FREE char *path = dir ? dr_path_join(dir, dr_path_basename(n->final)) : NULL;
        if (!path)
            return dr_fail(err, ENOMEM, "%s: out of memory", n->final);
        dr_error_reset(&why);
        r = make_locked(n, dir, &why);
        if (r < 0)
            continue;
        n->dir = DR_STEAL(dir);
        n->path = DR_STEAL(path);
    }
    if (r == -EEXIST)
        return dr_fail(err, EEXIST, "%s: no free name for a temporary directory next to it",
                       n->final);
    if (r == -EACCES && n->old)
        return dr_fail(err, EACCES,
                       "%s: a new image is made beside the old one; convert -n writes over what is "
                       "there",
                       why.text);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_new_begin(struct dr_new_image *n, struct dr_fs *fs, const char *path, bool no_replace,
                 unsigned flags, struct dr_error *err)
{
    *n = (struct dr_new_image){
        .fs = fs, .durable = !(flags & DR_OPEN_NO_FLUSH), .no_replace = no_replace};
    n->final = strdup(path);
    int r = n->final ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r == 0)
        r = dr_fs_exists(fs, path) ? lock_old(n, flags, err) : take_free_place(n, err);
    if (r == 0 && !n->on_device)
        r = make_dir(n, err);
    /* Give back the space of earlier attempts that never began to move files. Those that did are
     * still needed, to tell whose the moved files are. Without locks nobody can tell. */
    if (r == 0 && !n->on_device && !(flags & DR_OPEN_NO_LOCK))
        dr_new_drop_others(n, DR_NEW_UNUSED);
    if (r < 0)
        dr_new_abandon(n);
    return r;
}

static int check_device(const struct dr_new_image *n, const struct dr_format *fmt,
                        struct dr_error *err)
{
    if (fmt->flags & DR_FORMAT_ON_DEVICE)
        return 0;
    return dr_fail(
        err, ENOTSUP,
        "%s: is a block device: %s images need files that grow; raw and qcow2 images can "
        "be made there",
        n->final, fmt->name);
}

int dr_new_create(struct dr_new_image *n, const struct dr_format *fmt,
                  const struct dr_create_params *what, const struct dr_pair *pairs, size_t n_pairs,
                  unsigned flags, struct dr_error *err)
{
    CLEANUP_FREE struct dr_option *options = NULL;
    int r = n->on_device ? check_device(n, fmt, err) : 0;
    if (r == 0)
        r = dr_ops_settings(pairs, n_pairs, &options, err);
    if (r < 0)
        return r;
    struct dr_create_params params = *what;
    params.options = options;
    params.n_options = n_pairs;
    params.file_flags = dr_ops_file_flags(flags);
    params.final = n->final;
    params.any_path = flags & DR_OPEN_ANY_PATH;
    params.on_device = n->on_device;
    r = what->backing ? dr_image_harden(what->backing, err) : 0; /* its id gets recorded */
    r = r < 0 ? r : fmt->create(n->fs, n->path, &params, err);
    n->made_there = r == 0 && n->on_device;
    n->file_flags = params.file_flags;
    return r;
}

int dr_new_open_file(struct dr_new_image *n, const struct dr_format *fmt, unsigned flags,
                     struct dr_file **file, struct dr_error *err)
{
    int r = n->on_device ? check_device(n, fmt, err) : 0;
    n->file_flags = dr_ops_file_flags(flags);
    return r < 0 ? r : dr_file_open(n->fs, n->path, DR_FILE_CREATE | n->file_flags, file, err);
}

void dr_new_take_attrs(const struct dr_new_image *n, const char *from)
{
    char **names;
    size_t count;
    if (n->on_device || dr_ops_list(n->fs, n->dir, &names, &count, NULL) < 0)
        return;
    for (size_t i = 0; i < count; i++) {
        CLEANUP_FREE char *to = dr_path_join(n->dir, names[i]);
        if (to)
            dr_ops_copy_attrs(n->fs, from, to);
    }
    dr_ops_free_names(names, count);
}

/* ------------------------------------------------------------------ what gives way */

/* The image that gives way, to tell its files from others; NULL if it is none that opens. */
static struct dr_image *open_old(const struct dr_new_image *n)
{
    struct dr_image *image;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    if (!n->old || dr_image_open(n->fs, n->final, NULL, flags, &image, NULL) < 0)
        return NULL;
    return image;
}

static bool is_part_of(const struct dr_image *image, struct dr_file_id id)
{
    for (unsigned i = 0; image && i < image->n_files; i++)
        if (dr_same_id(image->files[i]->id, id))
            return true;
    return false;
}

/* f->to leads to a file. It may be replaced if it is the one that was locked in the beginning, an
 * extent of that image (old), or one that an interrupted attempt moved there. */
static int check_place(const struct dr_new_image *n, const struct dr_image *old,
                       const struct dr_publish_file *f, struct dr_error *err)
{
    if (f->part) {
        if (!n->no_replace &&
            (is_part_of(old, f->old) || dr_new_left_by_others(n, dr_path_basename(f->to))))
            return 0;
        return dr_fail(err, EEXIST, "%s: exists already and is no part of %s", f->to, n->final);
    }
    if (!n->old)
        return dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", f->to);
    if (dr_same_id(n->old->id, f->old))
        return 0;
    return dr_fail(err, ESTALE, "%s: was replaced by somebody else meanwhile", f->to);
}

static int plan_move(const struct dr_new_image *n, struct dr_publish *plan, struct dr_error *err)
{
    int r = dr_new_plan(n->fs, n->dir, n->final, plan, err);
    if (r < 0)
        return r;
    plan->durable = n->durable;
    plan->over_links = !n->no_replace;
    CLEANUP_IMAGE struct dr_image *old = open_old(n);
    for (size_t i = 0; i < plan->n && r == 0; i++)
        if (plan->files[i].replaces)
            r = check_place(n, old, &plan->files[i], err);
    if (r < 0)
        dr_publish_end(plan);
    return r;
}

int dr_new_check_places(const struct dr_new_image *n, struct dr_error *err)
{
    struct dr_publish plan;
    if (n->on_device)
        return 0;
    int r = plan_move(n, &plan, err);
    if (r == 0)
        dr_publish_end(&plan);
    return r;
}

/* ------------------------------------------------------------------ the end */

static void forget(struct dr_new_image *n)
{
    dr_file_unref(n->old);
    dr_dir_unlock(n->lock);
    free(n->final);
    free(n->dir);
    free(n->path);
    *n = (struct dr_new_image){0};
}

int dr_new_publish(struct dr_new_image *n, struct dr_error *err)
{
    struct dr_publish plan = {0};
    CLEANUP_FREE char *print = NULL; /* recorded of the parent of the image that gives way */
    if (n->on_device) {
        forget(n);
        return 0;
    }
    int r = plan_move(n, &plan, err);
    if (r == 0)
        r = dr_fingerprint_set_aside(n->fs, n->final, &print, err);
    if (r == 0)
        r = dr_new_move(&plan, n->dir, n->final, err);
    if (plan.state == DR_PUBLISH_STUCK)
        dr_prefix(err, r, "%s: is complete but only half in its place, `drover recover %s` goes on",
                  n->final, n->final);
    else if (r < 0) {
        dr_fingerprint_put_back(n->fs, n->final, print);
        dr_new_remove_all(n->fs, n->dir, NULL);
    } else /* completing an earlier, half moved attempt now would mix two images */
        dr_new_drop_others(n, DR_NEW_HALF_MOVED);
    dr_publish_end(&plan);
    forget(n);
    return r;
}

/* What stands there is not complete, so it must not look like an image. */
static void clear_device(const struct dr_new_image *n)
{
    static const char zeros[512];
    CLEANUP_FILE struct dr_file *f = NULL;
    if (dr_file_open(n->fs, n->final, DR_FILE_RDWR | n->file_flags, &f, NULL) == 0 &&
        dr_file_pwrite(f, zeros, 0, sizeof(zeros), NULL) == 0)
        dr_file_flush(f, NULL);
}

void dr_new_abandon(struct dr_new_image *n)
{
    if (n->made_there)
        clear_device(n);
    if (n->dir)
        dr_new_remove_all(n->fs, n->dir, NULL);
    forget(n);
}
