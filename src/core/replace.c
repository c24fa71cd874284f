/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One file is written under a temporary name and takes its own when it is complete (invariant 10).
 * The temporary name is in the same directory, and `recover` knows it (core/aside.h). The new file
 * holds the lock bytes of the old one before it has the name, and the old one is locked until then:
 * a process that opened the old file meanwhile would otherwise work on a file without a name. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "core/aside.h"
#include "core/publish.h"

#define ATTEMPTS 100

static int no_memory(const char *path, struct dr_error *err)
{
    return dr_fail_errno(err, ENOMEM, "%s: cannot be replaced", path);
}

/* Refuse when somebody else has replaced the file since we opened it: their file must stay. */
static int check_still_ours(const struct dr_temp *t, const char *path, struct dr_error *err)
{
    struct dr_file_id id;
    if (t->old->block_device)
        return dr_fail(err, ENOTSUP, "%s: a block device cannot be replaced by a file", path);
    int r = t->fs->ops->identify(t->fs, path, &id, err);
    if (r < 0)
        return r;
    if (dr_same_id(id, t->old->id))
        return 0;
    return dr_fail(err, ESTALE, "%s: the name leads to another file than the one that was opened",
                   path);
}

static int find_name(struct dr_temp *t, const char *path, struct dr_error *err)
{
    int r = t->old ? check_still_ours(t, path, err) : 0;
    if (r < 0)
        return r;
    if (t->old)
        return t->fs->ops->realpath(t->fs, path, &t->path, err);
    t->path = strdup(path);
    return t->path ? 0 : no_memory(path, err);
}

/* -ESTALE: between the making of the file and its locking another process took it for a leftover.
 */
static int open_temp(struct dr_temp *t, unsigned flags, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = -EEXIST;
    for (int i = 0; i < ATTEMPTS && (r == -EEXIST || r == -ESTALE); i++) {
        dr_error_reset(&why);
        free(t->temp);
        t->temp = dr_aside_path(t->path, DR_ASIDE_FILE);
        if (!t->temp)
            return no_memory(t->path, err);
        r = dr_file_open(t->fs, t->temp, flags, &t->file, &why);
    }
    if (r == 0)
        return 0;
    free(DR_STEAL(t->temp)); /* what is there is not ours */
    return dr_fail(err, -r, "%s", why.text);
}

int dr_temp_create(struct dr_temp *t, struct dr_fs *fs, const char *path, struct dr_file *old,
                   struct dr_file *like, struct dr_error *err)
{
    *t = (struct dr_temp){.fs = fs, .old = old};
    unsigned flags = DR_FILE_CREATE;
    if (like) /* private until it has the other's mode */
        flags |= DR_FILE_PRIVATE;
    if (old)
        flags |= old->flags & (DR_FILE_NO_LOCK | DR_FILE_NO_FLUSH | DR_FILE_DIRECT);
    int r = find_name(t, path, err);
    if (r == 0)
        r = open_temp(t, flags, err);
    if (r == 0 && like)
        r = fs->ops->copy_attrs(fs, like, t->file, err);
    if (r < 0)
        dr_temp_end(t);
    return r;
}

static int take_name(struct dr_temp *t, struct dr_error *err)
{
    struct dr_publish_file one = {.from = t->temp, .to = t->path, .replaces = t->old};
    struct dr_publish p = {
        .fs = t->fs, .durable = !(t->file->flags & DR_FILE_NO_FLUSH), .files = &one, .n = 1};
    if (t->old)
        one.old = t->old->id;
    char *path = strdup(t->path);
    if (!path)
        return no_memory(t->path, err);
    int r = dr_publish(&p, err);
    if (p.state != DR_PUBLISH_DONE) {
        free(path);
        return r;
    }
    free(t->file->path);
    t->file->path = path;
    free(DR_STEAL(t->temp));
    /* The name has changed hands whether or not that is durable: nobody may go on with the old
     * file, and no flush of the new one may claim success. */
    if (r < 0)
        t->file->flush_error = r;
    return r;
}

int dr_temp_publish(struct dr_temp *t, struct dr_error *err)
{
    int r = dr_file_flush(t->file, err);
    if (r == 0 && t->old)
        r = check_still_ours(t, t->path, err);
    return r == 0 ? take_name(t, err) : r;
}

void dr_temp_end(struct dr_temp *t)
{
    if (t->temp)
        t->fs->ops->unlink(t->fs, t->temp, NULL);
    dr_file_unref(t->file);
    free(t->temp);
    free(t->path);
    *t = (struct dr_temp){0};
}

int dr_replace(struct dr_fs *fs, const char *path, struct dr_file *old, dr_replace_fill fill,
               void *user, struct dr_file **fresh, struct dr_error *err)
{
    struct dr_temp t;
    int r = dr_temp_create(&t, fs, path, old, old, err);
    if (fresh)
        *fresh = NULL;
    if (r < 0)
        return r;
    r = fill(user, t.file, err);
    if (r == 0)
        r = dr_temp_publish(&t, err);
    if (fresh && !t.temp)
        *fresh = DR_STEAL(t.file);
    dr_temp_end(&t);
    return r;
}

int dr_replace_try(struct dr_fs *fs, const char *path, struct dr_file *old, struct dr_error *err)
{
    struct dr_temp t;
    int r = dr_temp_create(&t, fs, path, old, old, err);
    if (r == 0 && !(t.file->flags & DR_FILE_NO_FLUSH)) /* learn now that it will fail */
        r = fs->ops->sync_dir(fs, t.path, err);
    dr_temp_end(&t);
    return r;
}
