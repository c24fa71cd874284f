/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/chain-parent.h"

#include "base/cleanup.h"

#define NO_PARENT UINT32_MAX /* as a parent's content id */

/* ------------------------------------------------------------------ where to look */

static int scan_nearby(struct dr_scan *scan, struct dr_fs *fs, const char *dir,
                       const struct dr_open_options *open, struct dr_error *err)
{
    char **names = NULL;
    size_t n = 0;
    int r = scan->n < CHAIN_NEARBY_MAX ? dr_ops_list(fs, dir, &names, &n, NULL) : -ENOENT;
    for (size_t i = 0; r == 0 && i < n && scan->n < CHAIN_NEARBY_MAX; i++) {
        CLEANUP_FREE char *below = dr_path_join(dir, names[i]);
        struct dr_error why = DR_ERROR_INIT;
        if (!below)
            r = dr_fail(err, ENOMEM, "%s: out of memory", dir);
        else if (dr_scan_dir(scan, fs, below, open, &why) == -ENOMEM)
            r = dr_fail(err, ENOMEM, "%s", why.text);
    }
    if (names)
        dr_ops_free_names(names, n);
    return r == -ENOMEM ? r : 0;
}

/* What cannot be read there is no parent either. */
int chain_scan_around(struct dr_scan *scan, struct dr_fs *fs, const char *path,
                      const struct dr_chain_options *o, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE char *up = dir ? dr_path_join(dir, "..") : NULL;
    if (!up)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_scan_beside(scan, fs, path, &o->open, err);
    for (size_t i = 0; r == 0 && o->search && o->search[i]; i++)
        r = dr_scan_dir(scan, fs, o->search[i], &o->open, err);
    if (r == 0)
        r = scan_nearby(scan, fs, dir, &o->open, err);
    if (r == 0 && scan->n < CHAIN_NEARBY_MAX &&
        dr_scan_dir(scan, fs, up, &o->open, NULL) == -ENOMEM)
        r = dr_fail(err, ENOMEM, "%s: out of memory", path);
    return r < 0 ? r : scan_nearby(scan, fs, up, &o->open, err);
}

/* ------------------------------------------------------------------ which it is */

/* The last part of a recorded name, which may be one of another system. */
static const char *last_part(const char *name)
{
    const char *last = name;
    for (; *name; name++)
        if (*name == '/' || *name == '\\')
            last = name + 1;
    return last;
}

static bool has_name(const struct dr_scan_entry *e, const char *name)
{
    return strcmp(dr_path_basename(e->path), last_part(name)) == 0;
}

/* Raw files were not opened by the scan. */
static uint64_t size_of(const struct dr_scan_entry *e, struct dr_fs *fs)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    if (!(e->fmt->flags & DR_FORMAT_NO_PROBE))
        return e->size;
    unsigned flags = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    return dr_file_open(fs, e->path, flags, &file, NULL) == 0 ? dr_file_size(file) : 0;
}

static bool is_of_format(const struct dr_scan_entry *child, const struct dr_scan_entry *e)
{
    const char *want = child->backing_format;
    if (!want && child->fmt)
        want = child->fmt->parent_format ? child->fmt->parent_format : child->fmt->default_parent;
    return want && strcmp(e->fmt->name, want) == 0;
}

/* How sure is it? 0 = it is not. */
static unsigned certainty(const struct dr_scan_entry *child, const struct dr_scan_entry *e,
                          struct dr_fs *fs)
{
    if (!e->fmt || dr_same_id(e->id, child->id) || !is_of_format(child, e))
        return 0;
    bool named = has_name(e, child->backing_name), sized = size_of(e, fs) == child->size;
    if (child->has_ids && child->parent_id != NO_PARENT)
        return e->has_ids && e->content_id == child->parent_id ? 1u + sized * 2u + named : 0;
    return named && sized ? 1 : 0;
}

size_t chain_find_parent(const struct dr_scan *scan, struct dr_fs *fs, size_t child, size_t *found)
{
    unsigned best = 0;
    size_t equal = 0;
    for (size_t i = 0; i < scan->n; i++) {
        unsigned sure = certainty(&scan->all[child], &scan->all[i], fs);
        if (sure == 0 || sure < best)
            continue;
        equal = sure > best ? 1 : equal + 1;
        *found = sure > best ? i : *found;
        best = sure;
    }
    return equal;
}
