/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* All files in the staging directory become one set for dr_publish(): the planned files are its
 * main files, all others its parts. Extents are known by being there only, so the files that they
 * replace are claimed here. */
#include <stdlib.h>
#include <string.h>

#include "archive/stage.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "core/publish.h"

static bool exists(const struct stage *s, const char *dir, const char *name)
{
    CLEANUP_FREE char *path = dr_path_join(dir, name);
    return path && dr_look(s->fs, path, NULL, NULL, NULL) == 0;
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
    return strncmp(name, STAGE_OURS, strlen(STAGE_OURS)) != 0 && !is_temporary(name);
}

static int add(const struct stage *s, struct dr_publish *p, const char *made, const char *name,
               char *aside, bool part, struct dr_error *err)
{
    CLEANUP_FREE char *from = stage_path(s, made), *to = dr_path_join(s->dir, name);
    const struct stage_claim *claim = stage_claim_of(s, name);
    if (!from || !to)
        return stage_no_memory(s, err);
    struct dr_publish_file file = {
        .from = from, .to = to, .aside = aside, .part = part, .replaces = claim};
    if (claim)
        file.old = claim->id;
    return dr_publish_add(p, &file, err);
}

static int add_extents(struct stage *s, struct dr_publish *p, struct dr_error *err)
{
    char **names;
    size_t n;
    if (!stage_has_work_dir(s))
        return dr_fail(err, ESTALE, "%s: was exchanged for another directory", s->work);
    int r = dr_ops_list(s->fs, s->work, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++) {
        if (!is_extent(s, names[i]))
            continue;
        r = s->replace ? stage_claim(s, names[i], err) : 0;
        if (r == 0)
            r = add(s, p, names[i], names[i], NULL, true, err);
    }
    dr_ops_free_names(names, n);
    return r;
}

/* With extents, the old main files need a place to be put aside. A file that an interrupted attempt
 * has put there is superseded if another one, which gives way now, has its name since. */
static int add_planned(struct stage *s, struct dr_publish *p, struct dr_error *err)
{
    bool extents = p->n > 0;
    int r = 0;
    for (size_t i = 0; i < s->n_files && r == 0; i++) {
        const struct stage_file *f = &s->files[i];
        CLEANUP_FREE char *aside = extents && f->image ? stage_aside(s, f->name) : NULL;
        if (extents && f->image && !aside)
            return stage_no_memory(s, err);
        if (aside && s->replace && exists(s, s->dir, f->name))
            s->fs->ops->unlink(s->fs, aside, NULL);
        bool done = s->finishing && !exists(s, s->work, f->made) && exists(s, s->dir, f->name);
        bool has_its_name = s->in_sight && strcmp(f->made, f->name) == 0;
        if (!done && !has_its_name)
            r = add(s, p, f->made, f->name, aside, false, err);
    }
    return r;
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

/* All files have their names, but perhaps not durably. False: a file has replaced another, so they
 * cannot be moved back. */
static bool undo(const struct dr_publish *p)
{
    for (size_t i = 0; i < p->n; i++)
        if (p->files[i].replaces)
            return false;
    for (size_t i = p->n; i-- > 0;)
        p->fs->ops->rename(p->fs, p->files[i].to, p->files[i].from, NULL);
    return true;
}

int stage_publish(struct stage *s, struct dr_error *err)
{
    struct dr_publish p = {
        .fs = s->fs, .durable = !s->no_sync, .no_follow = true, .again = s->finishing};
    int r = s->in_sight ? 0 : add_extents(s, &p, err);
    if (r == 0)
        r = add_planned(s, &p, err);
    if (r == 0)
        r = dr_publish(&p, err);
    if (r == 0)
        r = sync_parent(s, err);
    if (r == 0) {
        s->published = true;
        s->keep = false;
    } else if (p.state == DR_PUBLISH_STUCK || (p.state == DR_PUBLISH_DONE && !undo(&p))) {
        s->keep = s->stuck = true;
        dr_prefix(err, r,
                  p.state == DR_PUBLISH_DONE
                      ? "%s is left, since the names of the new files may not be durable"
                      : "%s holds complete files that did not get their names",
                  s->work);
    }
    dr_publish_end(&p);
    return r;
}
