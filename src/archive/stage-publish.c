/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that are complete get their names:
 *
 *     1. old files that give way to images of several files are moved into the staging directory
 *     2. extents, so that the file that names them is never without them
 *     3. the planned files
 *
 * The names of each step are durable before the next one begins. After a failure everything is
 * moved back, unless an old file has been replaced. */
#include <stdlib.h>
#include <string.h>

#include "archive/stage.h"
#include "base/cleanup.h"
#include "base/error.h"

static bool exists(const struct stage *s, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, name);
    return path && dr_look(s->fs, path, NULL, NULL, NULL) == 0;
}

static int move(struct stage *s, const char *made, const char *name, struct dr_error *err)
{
    CLEANUP_FREE char *from = stage_path(s, made), *to = dr_path_join(s->dir, name);
    if (!from || !to || stage_append(&s->moved, &s->n_moved, made, name) < 0)
        return stage_no_memory(s, err);
    /* Only a file that was claimed may be replaced: one that came later may be in use. */
    bool gives_way = s->replace && stage_is_claimed(s, name);
    int r = (gives_way ? s->fs->ops->rename : s->fs->ops->rename_new)(s->fs, from, to, err);
    s->past_return |= r == 0 && gives_way;
    if (r == 0)
        return 0;
    const struct stage_file *last = &s->moved[--s->n_moved];
    free(last->made);
    free(last->name);
    return r;
}

static void move_back(struct stage *s)
{
    while (s->n_moved > 0) {
        const struct stage_file *f = &s->moved[--s->n_moved];
        CLEANUP_FREE char *from = dr_path_join(s->dir, f->name), *to = stage_path(s, f->made);
        if (from && to)
            s->fs->ops->rename(s->fs, from, to, NULL);
        free(f->made);
        free(f->name);
    }
}

/* A job that was killed while it replaced a file in the staging directory has left another one
 * beside it. */
static bool is_temporary(const char *name)
{
    struct dr_aside aside;
    return dr_aside_parse(name, DR_ASIDE_FILE, &aside) ||
           dr_aside_parse(name, DR_ASIDE_DIR, &aside);
}

static bool is_extent(const struct stage *s, const char *name)
{
    for (size_t i = 0; i < s->n_files; i++)
        if (strcmp(s->files[i].made, name) == 0)
            return false;
    return !stage_is_ours(name) && !is_temporary(name);
}

/* Several files cannot be exchanged at once. While extents are, no name may lead to an old
 * descriptor over new extents. */
static int put_aside(struct stage *s, struct dr_error *err)
{
    for (size_t i = 0; i < s->n_files; i++) {
        struct stage_file *f = &s->files[i];
        CLEANUP_FREE char *from = dr_path_join(s->dir, f->name), *to = stage_aside(s, f->name);
        if (!from || !to)
            return stage_no_memory(s, err);
        if (!f->image || !stage_is_claimed(s, f->name) || !exists(s, s->work, f->made))
            continue;
        int r = s->fs->ops->rename(s->fs, from, to, err);
        if (r < 0)
            return r;
        f->aside = true;
    }
    return stage_sync(s, err);
}

/* Not the files that an earlier attempt has put aside: their extents may have been replaced. */
static void put_back(const struct stage *s)
{
    for (size_t i = 0; i < s->n_files; i++) {
        const struct stage_file *f = &s->files[i];
        CLEANUP_FREE char *to = dr_path_join(s->dir, f->name), *from = stage_aside(s, f->name);
        if (from && to && f->aside)
            s->fs->ops->rename_new(s->fs, from, to, NULL);
    }
}

/* Claim the files whose names extents will take. */
static int claim_extents(struct stage *s, char *const *names, size_t n, struct dr_error *err)
{
    bool any = false;
    for (size_t i = 0; i < n && s->replace; i++) {
        if (!is_extent(s, names[i]) || !exists(s, s->dir, names[i]))
            continue;
        int r = stage_claim(s, names[i], err);
        if (r < 0)
            return r;
        any = true;
    }
    return any ? put_aside(s, err) : 0;
}

static int move_extents(struct stage *s, struct dr_error *err)
{
    char **names;
    size_t n;
    int r = dr_ops_list(s->fs, s->work, &names, &n, err);
    if (r < 0)
        return r;
    r = claim_extents(s, names, n, err);
    for (size_t i = 0; i < n && r == 0; i++)
        if (is_extent(s, names[i]))
            r = move(s, names[i], names[i], err);
    dr_ops_free_names(names, n);
    return r == 0 ? stage_sync_dir(s, s->dir, err) : r;
}

static int move_all(struct stage *s, struct dr_error *err)
{
    int r = s->in_sight ? 0 : move_extents(s, err);
    for (size_t i = 0; i < s->n_files && r == 0; i++) {
        const struct stage_file *f = &s->files[i];
        bool done = s->finishing && !exists(s, s->work, f->made) && exists(s, s->dir, f->name);
        bool has_its_name = s->in_sight && strcmp(f->made, f->name) == 0;
        if (!done && !has_its_name)
            r = move(s, f->made, f->name, err);
    }
    return r == 0 ? stage_sync_dir(s, s->dir, err) : r;
}

/* A directory that was made, now or by an attempt that was interrupted, is an entry of its
 * parent. */
static int sync_parent(const struct stage *s, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    if (s->no_sync || !(s->make_dir || s->made_dir))
        return 0;
    int r = s->fs->ops->realpath(s->fs, s->dir, &real, err);
    return r == 0 ? s->fs->ops->sync_dir(s->fs, real, err) : r;
}

int stage_publish(struct stage *s, struct dr_error *err)
{
    int r = move_all(s, err);
    if (r == 0)
        r = sync_parent(s, err);
    if (r == 0) {
        s->published = true;
        s->keep = false;
        return 0;
    }
    if (s->past_return) {
        s->keep = true;
        return dr_prefix(err, r, "%s holds complete files that did not get their names", s->work);
    }
    move_back(s);
    put_back(s);
    return r;
}
