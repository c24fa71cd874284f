/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "core/publish.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"

static bool copy_text(char **to, const char *text)
{
    *to = text ? strdup(text) : NULL;
    return *to || !text;
}

static void free_file(struct dr_publish_file *f)
{
    free(f->from);
    free(f->to);
    free(f->aside);
}

int dr_publish_add(struct dr_publish *p, const struct dr_publish_file *file, struct dr_error *err)
{
    struct dr_publish_file *files = reallocarray(p->files, p->n + 1, sizeof(*files));
    struct dr_publish_file copy = *file;
    p->files = files ? files : p->files;
    bool copied = copy_text(&copy.from, file->from);
    copied &= copy_text(&copy.to, file->to);
    copied &= copy_text(&copy.aside, file->aside);
    if (!files || !copied) {
        free_file(&copy);
        return dr_fail(err, ENOMEM, "%s: out of memory", file->to);
    }
    files[p->n++] = copy;
    return 0;
}

void dr_publish_end(struct dr_publish *p)
{
    for (size_t i = 0; i < p->n; i++)
        free_file(&p->files[i]);
    free(p->files);
    *p = (struct dr_publish){0};
}

/* ------------------------------------------------------------------ look */

static bool identify(const struct dr_publish *p, const char *path, struct dr_file_id *id)
{
    return (p->no_follow ? dr_look(p->fs, path, NULL, id, NULL)
                         : p->fs->ops->identify(p->fs, path, id, NULL)) == 0;
}

static bool exists(const struct dr_publish *p, const char *path)
{
    struct dr_file_id id;
    return identify(p, path, &id);
}

/* May the file get its name now? *gives_way: by replacing the old one. */
static int look(const struct dr_publish *p, const struct dr_publish_file *f, bool *gives_way,
                struct dr_error *err)
{
    struct dr_file_id there, ours;
    *gives_way = false;
    if (!identify(p, f->to, &there))
        return 0;
    /* An earlier attempt made a second link to the file and was killed before it removed the first:
     * rename_new() does the rest. */
    if (identify(p, f->from, &ours) && dr_same_id(there, ours))
        return 0;
    *gives_way = f->replaces && dr_same_id(there, f->old);
    if (*gives_way)
        return 0;
    return f->replaces
               ? dr_fail(err, ESTALE, "%s: was replaced by somebody else meanwhile", f->to)
               : dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", f->to);
}

/* *old_parts: parts of an old set give way. */
static int look_at_all(const struct dr_publish *p, bool *old_parts, struct dr_error *err)
{
    int r = 0;
    *old_parts = false;
    for (size_t i = 0; i < p->n && r == 0; i++) {
        const struct dr_publish_file *f = &p->files[i];
        bool gives_way;
        r = look(p, f, &gives_way, err);
        *old_parts |= f->part && gives_way;
        if (r == 0 && f->aside && exists(p, f->aside) && exists(p, f->to))
            r = dr_fail(err, EEXIST,
                        "%s: was being replaced when that was interrupted, and exists again: the "
                        "old file is %s, remove one of them",
                        f->to, f->aside);
    }
    return r;
}

/* ------------------------------------------------------------------ the steps */

static int sync_dir(const struct dr_publish *p, const char *path, struct dr_error *err)
{
    return p->durable ? p->fs->ops->sync_dir(p->fs, path, err) : 0;
}

/* Both directories: an old file must not end up in neither. An earlier attempt may have been killed
 * between its renames and this. */
static int put_aside(struct dr_publish *p, struct dr_error *err)
{
    const struct dr_publish_file *last = NULL;
    int r = 0;
    for (size_t i = 0; i < p->n && r == 0; i++) {
        struct dr_publish_file *f = &p->files[i];
        if (!f->aside)
            continue;
        if (exists(p, f->to)) {
            r = p->fs->ops->rename(p->fs, f->to, f->aside, err);
            f->put_aside = r == 0;
        }
        if (f->put_aside || exists(p, f->aside))
            last = f;
    }
    if (r == 0 && last)
        r = sync_dir(p, last->aside, err);
    return r == 0 && last ? sync_dir(p, last->to, err) : r;
}

static int take_name(struct dr_publish *p, struct dr_publish_file *f, bool *replaced,
                     struct dr_error *err)
{
    bool gives_way;
    struct dr_error why = DR_ERROR_INIT;
    int r = look(p, f, &gives_way, err);
    if (r < 0)
        return r;
    r = (gives_way ? p->fs->ops->rename : p->fs->ops->rename_new)(p->fs, f->from, f->to, &why);
    if (r == -EEXIST && p->over_links && !dr_fs_exists(p->fs, f->to))
        r = p->fs->ops->rename(p->fs, f->from, f->to, &why);
    f->moved = r == 0;
    *replaced |= r == 0 && gives_way;
    if (r == -EEXIST)
        return dr_fail(err, EEXIST, "%s: exists by now: somebody else made it meanwhile", f->to);
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

/* The parts or the mains get their names. *replaced: an old file has been replaced. */
static int take_names(struct dr_publish *p, bool parts, bool *replaced, struct dr_error *err)
{
    const struct dr_publish_file *last = NULL;
    int r = 0;
    for (size_t i = 0; i < p->n && r == 0; i++) {
        if (p->files[i].part != parts)
            continue;
        last = &p->files[i];
        r = take_name(p, &p->files[i], replaced, err);
    }
    if (parts && p->again && p->n > 0)
        last = &p->files[0];
    return r == 0 && last ? sync_dir(p, last->to, err) : r;
}

/* ------------------------------------------------------------------ all of it */

static bool all_moved(const struct dr_publish *p)
{
    for (size_t i = 0; i < p->n; i++)
        if (!p->files[i].moved)
            return false;
    return true;
}

/* False: an old file could not get its name back and is still aside. */
static bool undo(struct dr_publish *p)
{
    bool back = true;
    for (size_t i = p->n; i-- > 0;) {
        struct dr_publish_file *f = &p->files[i];
        if (f->moved)
            p->fs->ops->rename(p->fs, f->to, f->from, NULL);
        f->moved = false;
    }
    for (size_t i = 0; i < p->n; i++) {
        struct dr_publish_file *f = &p->files[i];
        if (!f->put_aside)
            continue;
        if (p->fs->ops->rename_new(p->fs, f->aside, f->to, NULL) == 0)
            sync_dir(p, f->to, NULL);
        else
            back = false;
    }
    return back;
}

static void remove_aside(const struct dr_publish *p)
{
    for (size_t i = 0; i < p->n; i++)
        if (p->files[i].aside && exists(p, p->files[i].aside))
            p->fs->ops->unlink(p->fs, p->files[i].aside, NULL);
}

int dr_publish(struct dr_publish *p, struct dr_error *err)
{
    bool old_parts, replaced = false;
    p->state = DR_PUBLISH_UNDONE;
    int r = look_at_all(p, &old_parts, err);
    if (r == 0 && old_parts)
        r = put_aside(p, err);
    if (r == 0)
        r = take_names(p, true, &replaced, err);
    if (r == 0)
        r = take_names(p, false, &replaced, err);
    if (r == 0)
        remove_aside(p);
    if (all_moved(p))
        p->state = DR_PUBLISH_DONE;
    else if (replaced || !undo(p))
        p->state = DR_PUBLISH_STUCK;
    return r;
}
