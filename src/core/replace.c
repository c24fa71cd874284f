/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only rename in the project that takes over a name (invariant 10). */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "core/aside.h"
#include "storage/storage.h"

#define ATTEMPTS 100

struct replacing {
    struct dr_fs *fs;
    struct dr_file *old;
    char *target;         /* the name that changes hands, links followed */
    char *tmp;            /* exists while not NULL */
    struct dr_file *file; /* behind tmp, then behind target */
};

static int no_memory(const char *path, struct dr_error *err)
{
    return dr_fail_errno(err, ENOMEM, "%s: cannot be replaced", path);
}

/* Refuse when somebody else has replaced the file since we opened it: their file must stay. */
static int check_still_ours(struct replacing *r, const char *path, struct dr_error *err)
{
    struct dr_file_id id;
    if (r->old->block_device)
        return dr_fail(err, ENOTSUP, "%s: a block device cannot be replaced by a file", path);
    int e = r->fs->ops->identify(r->fs, path, &id, err);
    if (e)
        return e;
    if (id.dev == r->old->id.dev && id.ino == r->old->id.ino)
        return 0;
    return dr_fail(err, ESTALE, "%s: the name leads to another file than the one that was opened",
                   path);
}

static int find_target(struct replacing *r, const char *path, struct dr_error *err)
{
    int e = r->old ? check_still_ours(r, path, err) : 0;
    if (e)
        return e;
    if (r->old)
        return r->fs->ops->realpath(r->fs, path, &r->target, err);
    r->target = strdup(path);
    return r->target ? 0 : no_memory(path, err);
}

/* Opened like the old file, so it holds the same lock bytes before it gets the name. Private until
 * it has the old one's mode. */
static int create_tmp(struct replacing *r, struct dr_error *err)
{
    unsigned flags = DR_FILE_CREATE;
    if (r->old)
        flags |= DR_FILE_PRIVATE |
                 (r->old->flags & (DR_FILE_NO_LOCK | DR_FILE_NO_FLUSH | DR_FILE_DIRECT));
    struct dr_error why = DR_ERROR_INIT;
    int e = -EEXIST;
    for (int i = 0; i < ATTEMPTS && e == -EEXIST; i++) {
        dr_error_reset(&why);
        free(r->tmp);
        r->tmp = dr_aside_path(r->target, DR_ASIDE_FILE);
        if (!r->tmp)
            return no_memory(r->target, err);
        e = dr_file_open(r->fs, r->tmp, flags, &r->file, &why);
    }
    if (!e)
        return 0;
    free(DR_STEAL(r->tmp));
    return dr_fail(err, -e, "%s", why.text);
}

static int complete(struct replacing *r, dr_replace_fill fill, void *user, struct dr_error *err)
{
    int e = r->old ? r->fs->ops->copy_attrs(r->fs, r->old, r->file, err) : 0;
    if (!e)
        e = fill(user, r->file, err);
    if (!e)
        e = dr_file_flush(r->file, err);
    return e;
}

static int take_name(struct replacing *r, struct dr_error *err)
{
    char *path = strdup(r->target);
    if (!path)
        return no_memory(r->target, err);
    int e = r->old ? check_still_ours(r, r->target, err) : 0;
    if (!e)
        e = (r->old ? r->fs->ops->rename : r->fs->ops->rename_new)(r->fs, r->tmp, r->target, err);
    if (e) {
        free(path);
        return e;
    }
    free(r->file->path);
    r->file->path = path;
    free(DR_STEAL(r->tmp));
    return 0;
}

/* The name has changed hands whether or not that is durable: nobody may go on with the old file,
 * and no flush of the new one may claim success. */
static int make_durable(struct replacing *r, struct dr_error *err)
{
    if (r->file->flags & DR_FILE_NO_FLUSH)
        return 0;
    int e = r->fs->ops->sync_dir(r->fs, r->target, err);
    if (e)
        r->file->flush_error = e;
    return e;
}

static int replace(struct replacing *r, const char *path, dr_replace_fill fill, void *user,
                   struct dr_error *err)
{
    int e = find_target(r, path, err);
    if (!e)
        e = create_tmp(r, err);
    if (!e)
        e = complete(r, fill, user, err);
    if (!e)
        e = take_name(r, err);
    if (!e)
        return make_durable(r, err);
    if (r->tmp)
        r->fs->ops->unlink(r->fs, r->tmp, NULL);
    dr_file_unref(DR_STEAL(r->file));
    return e;
}

int dr_replace(struct dr_fs *fs, const char *path, struct dr_file *old, dr_replace_fill fill,
               void *user, struct dr_file **fresh, struct dr_error *err)
{
    struct replacing r = {.fs = fs, .old = old};
    int e = replace(&r, path, fill, user, err);
    if (fresh)
        *fresh = r.file;
    else
        dr_file_unref(r.file);
    free(r.tmp);
    free(r.target);
    return e;
}

int dr_replace_try(struct dr_fs *fs, const char *path, struct dr_file *old, struct dr_error *err)
{
    struct replacing r = {.fs = fs, .old = old};
    int e = find_target(&r, path, err);
    if (!e)
        e = create_tmp(&r, err);
    if (!e && old)
        e = fs->ops->copy_attrs(fs, old, r.file, err);
    if (!e &&
        !(r.file->flags & DR_FILE_NO_FLUSH)) /* learn now, not after the rename, that it fails */
        e = fs->ops->sync_dir(fs, r.target, err);
    if (r.tmp)
        fs->ops->unlink(fs, r.tmp, NULL);
    dr_file_unref(r.file);
    free(r.tmp);
    free(r.target);
    return e;
}
