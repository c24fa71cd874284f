/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"

/* Creating an image uses a directory within the staging directory. */
#define DEPTH 2

int stage_no_memory(const struct stage *s, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", s->dir ? s->dir : "extracting");
}

char *stage_path(const struct stage *s, const char *made)
{
    return dr_path_join(s->work, made);
}

char *stage_aside(const struct stage *s, const char *name)
{
    char *path;
    return asprintf(&path, "%s/" STAGE_ASIDE "%s", s->work, name) < 0 ? NULL : path;
}

static bool is_aside(const char *name)
{
    return strncmp(name, STAGE_ASIDE, strlen(STAGE_ASIDE)) == 0;
}

/* sync_dir takes the path of something in the directory. */
static int sync_dir(const struct stage *s, const char *dir, struct dr_error *err)
{
    CLEANUP_FREE char *entry = dr_path_join(dir, STAGE_OURS);
    if (s->no_sync)
        return 0;
    return entry ? s->fs->ops->sync_dir(s->fs, entry, err) : stage_no_memory(s, err);
}

int stage_sync(const struct stage *s, struct dr_error *err)
{
    int r = s->in_sight ? 0 : sync_dir(s, s->work, err);
    return r == 0 ? sync_dir(s, s->dir, err) : r;
}

/* Is path itself a directory, and no link to one? File systems without links have no look. */
static bool is_dir(struct dr_fs *fs, const char *path, struct dr_file_id *id)
{
    enum dr_name_kind kind;
    return !fs->ops->look || (dr_look(fs, path, &kind, id, NULL) == 0 && kind == DR_NAME_DIR);
}

/* An old file that an interrupted attempt has put aside may be the user's only copy: it stays. */
static void remove_all(struct dr_fs *fs, const char *dir, int depth)
{
    char **names;
    size_t n;
    if (dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        if (!path || is_aside(names[i]) || fs->ops->unlink(fs, path, NULL) == 0 || depth == 0 ||
            !is_dir(fs, path, NULL))
            continue;
        remove_all(fs, path, depth - 1);
        if (fs->ops->rmdir)
            fs->ops->rmdir(fs, path, NULL);
    }
    dr_ops_free_names(names, n);
}

/* The owner of the target directory can exchange the staging directory: for a link to any other
 * directory, of which nothing must be removed. */
bool stage_has_work_dir(const struct stage *s)
{
    struct dr_file_id id = s->work_id;
    return is_dir(s->fs, s->work, &id) && dr_same_id(id, s->work_id);
}

void stage_empty(struct stage *s)
{
    if (stage_has_work_dir(s))
        remove_all(s->fs, s->work, DEPTH);
    s->found = false;
}

/* ------------------------------------------------------------------ begin */

/* With shared rights, since others may read what will be in it. */
static int make_target_dir(struct stage *s, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    if (!s->fs->ops->mkdir)
        return 0;
    int r = s->fs->ops->mkdir(s->fs, s->dir, 0777, &why);
    s->made_dir = r == 0;
    if (r == -EEXIST && !s->in_sight)
        return 0;
    return r < 0
               ? dr_fail(err, -r, "unable to create target directory %s: %s", s->dir, strerror(-r))
               : 0;
}

/* 1: it exists already. */
static int make_work_dir(const struct stage *s, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    if (s->fs->ops->mkdir) {
        int r = s->fs->ops->mkdir(s->fs, s->work, 0700, &why);
        if (r == -ENOENT)
            return dr_fail_errno(err, ENOENT, "Could not create '%s': %s", s->work, s->dir);
        return r == -EEXIST ? 1 : r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
    }
    char **names;
    size_t n;
    int r = dr_ops_list(s->fs, s->work, &names, &n, err);
    if (r < 0)
        return r;
    dr_ops_free_names(names, n);
    return n > 0;
}

/* -ENOENT: the process that held the lock has removed the directory. It has ended, but others may
 * be about to make the directory again, and only one of all may go on. */
static int lock_work_dir(struct stage *s, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_dir_lock(s->fs, s->work, &s->lock, &why);
    if (r == 0 || r == -ENOTSUP)
        return 0;
    if (r == -EBUSY || r == -ENOENT)
        return dr_fail(err, EBUSY, "%s: another extraction is using it", s->work);
    return dr_fail(err, -r, "%s", why.text);
}

static int enter_work_dir(struct stage *s, struct dr_error *err)
{
    int there = make_work_dir(s, err);
    int r = there < 0 ? there : lock_work_dir(s, err);
    if (r == 0 && !is_dir(s->fs, s->work, &s->work_id))
        r = dr_fail(err, EBUSY, "%s: is no directory any more", s->work);
    if (r < 0)
        return r;
    s->found = there && s->keep;
    if (there && !s->keep)
        stage_empty(s);
    return 0;
}

int stage_begin(struct stage *s, const char *dir, const char *work, struct dr_error *err)
{
    s->dir = strdup(dir);
    s->work = s->in_sight ? strdup(dir) : dr_path_join(dir, work);
    if (!s->dir || !s->work)
        return stage_no_memory(s, err);
    int r = s->make_dir || s->in_sight ? make_target_dir(s, err) : 0;
    if (r == 0 && !s->in_sight)
        r = enter_work_dir(s, err);
    s->entered = r == 0;
    return r;
}

/* ------------------------------------------------------------------ plan */

static int hold(struct stage *s, const char *name, struct dr_file_id id, struct dr_file *file,
                struct dr_error *err)
{
    struct stage_claim *more = reallocarray(s->claims, s->n_claims + 1, sizeof(*more));
    char *copy = strdup(name);
    s->claims = more ? more : s->claims;
    if (!more || !copy) {
        free(copy);
        dr_file_unref(file);
        return stage_no_memory(s, err);
    }
    s->claims[s->n_claims++] = (struct stage_claim){copy, file, id};
    return 0;
}

static bool leads_to(const struct stage *s, const char *name, struct dr_file_id id)
{
    CLEANUP_FREE char *path = dr_path_join(s->dir, name);
    struct dr_file_id now;
    return path && dr_look(s->fs, path, NULL, &now, NULL) == 0 && dr_same_id(now, id);
}

const struct stage_claim *stage_claim_of(const struct stage *s, const char *name)
{
    for (size_t i = 0; i < s->n_claims; i++)
        if (strcmp(s->claims[i].name, name) == 0)
            return &s->claims[i];
    return NULL;
}

/* Of a symbolic link only the link is replaced, so the file that it leads to may be in use. */
int stage_claim(struct stage *s, const char *name, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_path_join(s->dir, name);
    struct dr_file *file;
    struct dr_file_id id;
    enum dr_name_kind kind;
    if (!path)
        return stage_no_memory(s, err);
    if (dr_look(s->fs, path, &kind, &id, NULL) < 0)
        return 0;
    if (kind == DR_NAME_LINK)
        return hold(s, name, id, NULL, err);
    if (kind != DR_NAME_FILE)
        return dr_fail(err, EINVAL, "%s: is no regular file, and not replaced by one", path);
    int r =
        dr_file_open(s->fs, path, DR_FILE_RDWR | (s->no_lock ? DR_FILE_NO_LOCK : 0), &file, err);
    if (r < 0)
        return r;
    if (dr_same_id(file->id, id) && leads_to(s, name, id))
        return hold(s, name, id, file, err);
    dr_file_unref(file);
    return dr_fail(err, ESTALE, "%s: was replaced by another process just now", path);
}

static int check_free(struct stage *s, const char *name, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_path_join(s->dir, name);
    if (!path)
        return stage_no_memory(s, err);
    if (s->finishing || dr_look(s->fs, path, NULL, NULL, NULL) < 0)
        return 0;
    return dr_fail(err, EEXIST, "%s: exists already", path);
}

static int append(struct stage *s, const char *made, const char *name, bool image,
                  struct dr_error *err)
{
    struct stage_file *more = reallocarray(s->files, s->n_files + 1, sizeof(*more));
    s->files = more ? more : s->files;
    CLEANUP_FREE char *m = strdup(made);
    CLEANUP_FREE char *n = strdup(name);
    if (!more || !m || !n)
        return stage_no_memory(s, err);
    more[s->n_files++] = (struct stage_file){DR_STEAL(m), DR_STEAL(n), image};
    return 0;
}

int stage_plan(struct stage *s, const char *made, const char *name, bool image,
               struct dr_error *err)
{
    if (!dr_vma_name_is_safe(name) || !dr_vma_name_is_safe(made))
        return dr_fail(err, EINVAL, "%s: a file there cannot have the name that was asked for",
                       s->dir);
    if (!s->in_sight && strncmp(name, STAGE_OURS, strlen(STAGE_OURS)) == 0)
        return dr_fail(err, EINVAL, "%s/%s: files of that name are kept for what is not complete",
                       s->dir, name);
    for (size_t i = 0; i < s->n_files; i++) {
        const struct stage_file *f = &s->files[i];
        if (strcmp(f->name, name) == 0 || strcmp(f->made, made) == 0 ||
            strcmp(f->name, made) == 0 || strcmp(f->made, name) == 0)
            return dr_fail(err, EINVAL, "more than one file would be called '%s' in %s", name,
                           s->dir);
    }
    int r = s->replace ? stage_claim(s, name, err) : check_free(s, name, err);
    return r == 0 ? append(s, made, name, image, err) : r;
}

/* ------------------------------------------------------------------ files */

static int write_file(const struct stage *s, const char *path, const void *data, size_t len,
                      struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    unsigned flags = DR_FILE_CREATE | DR_FILE_NO_LOCK | (s->no_sync ? DR_FILE_NO_FLUSH : 0);
    int r = dr_file_open(s->fs, path, flags, &file, err);
    if (r == 0 && len > 0)
        r = dr_file_pwrite(file, data, 0, len, err);
    return r == 0 ? dr_file_flush(file, err) : r;
}

int stage_write(struct stage *s, const char *made, const void *data, size_t len,
                struct dr_error *err)
{
    CLEANUP_FREE char *path = stage_path(s, made);
    if (!path)
        return stage_no_memory(s, err);
    if (s->found) /* the interrupted attempt has made it */
        s->fs->ops->unlink(s->fs, path, NULL);
    return write_file(s, path, data, len, err);
}

int stage_note(struct stage *s, const char *name, const void *data, size_t len,
               struct dr_error *err)
{
    CLEANUP_FREE char *path = stage_path(s, name);
    CLEANUP_FREE char *fresh = NULL;
    if (!path || asprintf(&fresh, "%s.new", path) < 0) {
        fresh = NULL;
        return stage_no_memory(s, err);
    }
    s->fs->ops->unlink(s->fs, fresh, NULL);
    int r = write_file(s, fresh, data, len, err);
    if (r == 0)
        r = s->fs->ops->rename(s->fs, fresh, path, err);
    return r == 0 ? sync_dir(s, s->work, err) : r;
}

/* ------------------------------------------------------------------ end */

/* Remove the old files that published ones have replaced. Tell of the others: an earlier,
 * interrupted attempt left them, and they may be the only copy. */
static void remove_aside(const struct stage *s)
{
    for (size_t i = 0; s->published && i < s->n_files; i++) {
        CLEANUP_FREE char *aside = stage_aside(s, s->files[i].name);
        if (aside)
            s->fs->ops->unlink(s->fs, aside, NULL);
    }
    char **names;
    size_t n;
    if (dr_ops_list(s->fs, s->work, &names, &n, NULL) < 0)
        return;
    for (size_t i = 0; i < n; i++)
        if (is_aside(names[i]))
            dr_job_message(
                s->job,
                "%s/%s: is the %s that was to be replaced when an extraction was interrupted",
                s->work, names[i], names[i] + strlen(STAGE_ASIDE));
    dr_ops_free_names(names, n);
}

static void remove_work(const struct stage *s)
{
    if (!stage_has_work_dir(s))
        return;
    remove_all(s->fs, s->work, DEPTH);
    remove_aside(s);
    if (s->fs->ops->rmdir)
        s->fs->ops->rmdir(s->fs, s->work, NULL);
}

static void remove_unpublished(const struct stage *s)
{
    for (size_t i = 0; i < s->n_files && !s->published; i++) {
        CLEANUP_FREE char *path = stage_path(s, s->files[i].made);
        if (path)
            s->fs->ops->unlink(s->fs, path, NULL);
    }
}

void stage_end(struct stage *s)
{
    if (s->entered && !s->keep)
        s->in_sight ? remove_unpublished(s) : remove_work(s);
    if (s->made_dir && !s->keep && !s->published)
        s->fs->ops->rmdir(s->fs, s->dir, NULL);
    dr_dir_unlock(s->lock);
    for (size_t i = 0; i < s->n_claims; i++) {
        dr_file_unref(s->claims[i].file);
        free(s->claims[i].name);
    }
    free(s->claims);
    for (size_t i = 0; i < s->n_files; i++) {
        free(s->files[i].made);
        free(s->files[i].name);
    }
    free(s->files);
    free(s->dir);
    free(s->work);
    *s = (struct stage){0};
}
