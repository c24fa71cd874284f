/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only rename in the project that takes over a name (invariant 10). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/random.h"
#include "storage/storage.h"

#define MARK         ".drover-"
#define MARK_LEN     (sizeof(MARK) - 1)
#define RANDOM_CHARS 6
#define ATTEMPTS     100

static const char name_chars[] = "abcdefghijklmnopqrstuvwxyz0123456789";

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

static char *tmp_path(const char *target)
{
    char random[RANDOM_CHARS + 1];
    const char *base = dr_path_basename(target);
    size_t len = strlen(base) + MARK_LEN + RANDOM_CHARS + 2;
    CLEANUP_FREE char *name = malloc(len);
    if (!name)
        return NULL;
    dr_random_text(random, RANDOM_CHARS);
    snprintf(name, len, ".%s%s%s", base, MARK, random);
    return dr_path_sibling(target, name);
}

/* Whoever replaced the name since we opened the file has the say about it. */
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
        r->tmp = tmp_path(r->target);
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
    if (!e && !(r.file->flags & DR_FILE_NO_FLUSH)) /* who may not must learn it before the rename */
        e = fs->ops->sync_dir(fs, r.target, err);
    if (r.tmp)
        fs->ops->unlink(fs, r.tmp, NULL);
    dr_file_unref(r.file);
    free(r.tmp);
    free(r.target);
    return e;
}

bool dr_replace_is_leftover(const char *name, char **of)
{
    const char *base = dr_path_basename(name);
    size_t len = strlen(base);
    if (base[0] != '.' || len < 2 + MARK_LEN + RANDOM_CHARS)
        return false;
    size_t keep = len - MARK_LEN - RANDOM_CHARS - 1;
    const char *mark = base + 1 + keep;
    if (strncmp(mark, MARK, MARK_LEN) != 0 || strspn(mark + MARK_LEN, name_chars) != RANDOM_CHARS)
        return false;
    if (of) {
        CLEANUP_FREE char *first = strndup(base + 1, keep);
        *of = first ? dr_path_sibling(name, first) : NULL;
    }
    return true;
}
