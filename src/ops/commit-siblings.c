/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Other images that stand on the base of a commit, or on an image that goes down: they would show
 * something else, or not open any more. */
#include "ops/commit.h"

#include <stdio.h>

#include "base/cleanup.h"

static bool in_part(const struct commit *c, struct dr_file_id id, size_t first, size_t last)
{
    for (size_t i = first; i <= last; i++)
        if (dr_same_id(dr_image_id(c->chain->images[i]), id))
            return true;
    return false;
}

/* Is path the leftover of an interrupted replacement of one of the chain's own files? */
static bool is_own_leftover(const struct commit *c, const char *path)
{
    struct dr_aside aside;
    bool own = false;
    if (!dr_aside_parse(dr_path_basename(path), DR_ASIDE_FILE, &aside))
        return false;
    for (size_t i = 0; i <= c->base && !own; i++) {
        const char *name = dr_path_basename(c->chain->images[i]->path);
        CLEANUP_FREE char *of = dr_path_sibling(path, name);
        struct dr_file_id id;
        own = of && dr_aside_is_of(&aside, name) && dr_name_identify(c->fs, of, &id, NULL) == 0 &&
              in_part(c, id, 0, c->base);
    }
    return own;
}

static bool is_empty(const struct commit *c, const char *path)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    const unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK | DR_OPEN_NO_BACKING;
    return dr_image_open(c->fs, path, NULL, flags, &image, NULL) == 0 &&
           dr_ops_holds_nothing(image);
}

static bool is_one_of(const struct commit *c, const char *const *paths, size_t n,
                      struct dr_file_id its)
{
    struct dr_file_id id;
    for (size_t i = 0; i < n; i++)
        if (dr_name_identify(c->fs, paths[i], &id, NULL) == 0 && dr_same_id(id, its))
            return true;
    return false;
}

/* An overlay that an earlier commit has emptied and left is another name of the disk itself. An
 * image that this commit has put into the base, before it was interrupted, is of no use any more.
 */
static bool is_left(const struct commit *c, const struct dr_scan_entry *e)
{
    const struct dr_commit_options *o = c->o;
    return is_one_of(c, o->committed, o->n_committed, e->id) ||
           (is_one_of(c, o->emptied, o->n_emptied, e->id) && is_empty(c, e->path));
}

static bool loses_validity(const struct commit *c, const struct dr_scan_entry *e)
{
    size_t from = c->part == COMMIT_FIRST ? c->first : c->first + 1;
    return e->backing_path && in_part(c, e->backing_id, from, c->base) &&
           !in_part(c, e->id, 0, c->base) && !is_own_leftover(c, e->path) && !is_left(c, e);
}

/* Separated by commas alone, so that the names can be copied. */
static char *list_siblings(const struct commit *c, const struct dr_scan *scan)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return NULL;
    for (size_t i = 0; i < scan->n; i++)
        if (loses_validity(c, &scan->all[i]))
            fprintf(out, "%s%s", ftell(out) > 0 ? ", " : "", scan->all[i].path);
    fclose(out);
    return text;
}

static int scan_dirs(const struct commit *c, struct dr_scan *scan, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i <= c->base && r == 0; i++)
        r = dr_scan_beside(scan, c->fs, c->chain->images[i]->path, &c->o->open, err);
    return r;
}

int commit_check_siblings(const struct commit *c, struct dr_error *err)
{
    struct dr_scan scan = {0};
    if (c->part == COMMIT_SECOND)
        return 0;
    int r = scan_dirs(c, &scan, err);
    CLEANUP_FREE char *list = r == 0 ? list_siblings(c, &scan) : NULL;
    dr_scan_free(&scan);
    if (r < 0)
        return r;
    if (!list)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    if (!*list)
        return 0;
    if (!c->o->force)
        return dr_fail(err, EBUSY,
                       "%s: committing into %s would make these images unusable: %s; rebase or "
                       "remove them first, or force it",
                       c->path, commit_p(c)->path, list);
    dr_job_message(c->job, "%s: these images are no longer valid: %s", commit_p(c)->path, list);
    return 0;
}
