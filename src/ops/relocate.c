/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* chain relocate and chain pack: record anew where parents are. Each image is changed by the one
 * atomic step with which a rebase records its parent; nothing is copied. The lowest image comes
 * first, so that each parent opens when it is recorded. */
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/chain-parent.h"

/* An image whose record of its parent is to be changed. */
struct link {
    char *path, *old_name, *parent, *format;
    char *name; /* that is recorded */
};

struct relocation {
    struct dr_fs *fs;
    const struct dr_chain_options *o;
    bool pack;
    struct link *links; /* top first */
    size_t n;
    unsigned changed;
    struct dr_error first; /* what failed first, while others may still be mended */
};

static void free_links(struct relocation *x)
{
    for (size_t i = 0; i < x->n; i++) {
        free(x->links[i].path);
        free(x->links[i].old_name);
        free(x->links[i].parent);
        free(x->links[i].format);
        free(x->links[i].name);
    }
    free(x->links);
    x->links = NULL;
    x->n = 0;
}

static int add_link(struct relocation *x, const char *path, const char *old_name,
                    const char *parent, const char *format, struct dr_error *err)
{
    struct link *more = realloc(x->links, (x->n + 1) * sizeof(*more));
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    x->links = more;
    struct link *l = &x->links[x->n++];
    *l = (struct link){.path = strdup(path),
                       .old_name = strdup(old_name),
                       .parent = strdup(parent),
                       .format = strdup(format),
                       .name = dr_ops_name_from(x->fs, path, parent)};
    if (!l->path || !l->old_name || !l->parent || !l->format || !l->name)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    return 0;
}

/* ------------------------------------------------------------------ where the parents are */

/* Keep the first failure: the others are reported, and what can be mended is. */
static void note_failure(struct relocation *x, const struct dr_error *why)
{
    if (x->first.errnum == 0)
        x->first = *why;
    else
        dr_ops_report(x->o->report, x->o->user, "%s", why->text);
}

/* The parent is not where the image says. *parent: where it is, malloc'ed; NULL: nowhere. */
static int search(struct relocation *x, const char *path, const char *refusal, char **parent,
                  struct dr_error *err)
{
    struct dr_scan scan = {0};
    struct dr_file_id id;
    size_t found = 0, equal = 0;
    *parent = NULL;
    int r = dr_name_identify(x->fs, path, &id, err);
    if (r == 0)
        r = chain_scan_around(&scan, x->fs, path, x->o, err);
    size_t child = r == 0 ? dr_scan_find(&scan, id) : 0;
    if (r == 0 && child < scan.n && scan.all[child].backing_name)
        equal = chain_find_parent(&scan, x->fs, child, &found);
    struct dr_error why = DR_ERROR_INIT;
    if (r == 0 && equal == 0)
        dr_fail(&why, ENOENT,
                "%s; no image here or near it is the parent: name its directory (--search DIR)",
                refusal);
    else if (r == 0 && equal > 1)
        dr_fail(&why, ENOENT,
                "%s; %zu images may as well be its parent, such as %s: choose one (drover rebase "
                "-u)",
                refusal, equal, scan.all[found].path);
    else if (r == 0 && !(*parent = strdup(scan.all[found].path)))
        r = dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (why.errnum)
        note_failure(x, &why);
    dr_scan_free(&scan);
    return r;
}

/* *parent NULL: it has none, or none was found. */
static int visit(struct relocation *x, const char *path, const char *format, char **parent,
                 char **parent_format, struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    struct dr_error why = DR_ERROR_INIT;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    flags |= x->o->open.flags & DR_OPEN_ANY_PATH;
    *parent = *parent_format = NULL;
    int r = dr_image_open(x->fs, path, format, flags, &image, err);
    if (r < 0 || !image->backing_name)
        return r;
    if (!x->o->dry_run) /* a record that is right may be one that a killed attempt did not flush */
        r = dr_image_harden(image, err);
    if (r < 0)
        return r;
    r = dr_backing_locate(image, &x->o->open, parent, &why);
    bool moved = r == -ENOENT || r == -ENOTDIR || r == -ESTALE;
    if (r < 0 && !moved)
        return dr_fail(err, -r, "%s", why.text);
    if (moved && x->pack)
        return dr_fail(err, -r, "%s; first: drover chain relocate %s", why.text, path);
    r = moved ? search(x, path, why.text, parent, err) : 0;
    if (r < 0 || !*parent)
        return r;
    const char *is = image->backing_format ? image->backing_format : image->fmt->parent_format;
    const struct dr_format *found = NULL;
    if (!is) {
        r = dr_probe(x->fs, *parent, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &found, &why);
        if (r < 0 && (moved || x->pack)) /* a guess would be recorded for good */
            return dr_fail(err, -r,
                           "%s; record its format first: drover rebase -u -F FORMAT -b %s %s",
                           why.text, *parent, path);
        is = r == 0 ? found->name : NULL;
    }
    *parent_format = strdup(is ? is : "raw");
    if (!*parent_format)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    return moved || x->pack ? add_link(x, path, image->backing_name, *parent, *parent_format, err)
                            : 0;
}

static int walk(struct relocation *x, const char *path, struct dr_error *err)
{
    char *at = strdup(path), *format = x->o->open.format ? strdup(x->o->open.format) : NULL;
    int r = at ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    for (size_t depth = 0; r == 0 && at; depth++) {
        char *parent = NULL, *parent_format = NULL;
        r = dr_chain_check_length(path, depth + 1, err); /* or a loop */
        if (r == 0)
            r = visit(x, at, format, &parent, &parent_format, err);
        free(at);
        free(format);
        at = parent;
        format = parent_format;
    }
    free(at);
    free(format);
    return r;
}

/* ------------------------------------------------------------------ recording */

/* What was found by its content, or where the user said, is allowed for this once. */
static int record(const struct relocation *x, const struct link *l, struct dr_error *err)
{
    const char *const *given = x->o->open.allow_paths;
    size_t n = 0;
    while (given && given[n])
        n++;
    CLEANUP_FREE const char **allow = calloc(n + 2, sizeof(*allow));
    CLEANUP_FREE char *dir = dr_path_dirname(l->parent);
    if (!allow || !dir)
        return dr_fail(err, ENOMEM, "%s: out of memory", l->path);
    for (size_t i = 0; i < n; i++)
        allow[i] = given[i];
    allow[n] = dir;
    struct dr_rebase_options rebase = {
        .open = x->o->open, .backing = l->name, .backing_format = l->format, .unsafe = true};
    rebase.open.format = NULL;
    rebase.open.allow_paths = allow;
    return dr_rebase_fs(x->fs, l->path, &rebase, NULL, err);
}

static void tell(const struct relocation *x, const struct link *l)
{
    struct dr_error why = DR_ERROR_INIT;
    dr_ops_report(x->o->report, x->o->user, "%s: its parent %s recorded as \"%s\", was \"%s\"",
                  l->path, x->o->dry_run ? "would be" : "is", l->name, l->old_name);
    if (dr_gate_check(x->fs, l->path, l->parent, &x->o->open, &why) < 0)
        dr_ops_report(x->o->report, x->o->user,
                      "%s: to open it, allow the directory of %s (--allow-path)", l->path,
                      l->parent);
}

static int record_all(struct relocation *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = x->n; r == 0 && i-- > 0;) {
        const struct link *l = &x->links[i];
        if (strcmp(l->name, l->old_name) == 0)
            continue;
        r = x->o->dry_run ? 0 : record(x, l, err);
        if (r == 0)
            tell(x, l);
        x->changed += r == 0;
    }
    return r;
}

/* ------------------------------------------------------------------ a chain, a directory */

static int one_chain(struct relocation *x, const char *path, struct dr_error *err)
{
    int r = walk(x, path, err);
    if (r == 0)
        r = record_all(x, err);
    free_links(x);
    return r;
}

/* Each image with what is below it: what was mended once is not found again. */
static int whole_directory(struct relocation *x, const char *dir, struct dr_error *err)
{
    struct dr_scan scan = {0};
    int r = dr_scan_dir(&scan, x->fs, dir, &x->o->open, err);
    for (size_t i = 0; r == 0 && i < scan.n; i++) {
        const struct dr_scan_entry *e = &scan.all[i];
        struct dr_error why = DR_ERROR_INIT;
        if (!e->fmt || dr_scan_is_opaque(e) || !e->backing_name)
            continue;
        r = one_chain(x, e->path, &why);
        if (r == -ENOMEM)
            dr_fail(err, ENOMEM, "%s", why.text);
        else if (r < 0)
            note_failure(x, &why);
        r = r == -ENOMEM ? r : 0;
    }
    dr_scan_free(&scan);
    return r;
}

static int mend(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                bool pack, unsigned *changed, struct dr_error *err)
{
    static const struct dr_chain_options defaults;
    struct relocation x = {.fs = fs, .o = options ? options : &defaults, .pack = pack};
    int r = dr_ops_is_directory(fs, path) ? whole_directory(&x, path, err)
                                          : one_chain(&x, path, err);
    if (changed)
        *changed = x.changed;
    if (r == 0 && x.first.errnum)
        r = dr_fail(err, x.first.errnum, "%s", x.first.text);
    return r;
}

int dr_relocate_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                   unsigned *changed, struct dr_error *err)
{
    return mend(fs, path, options, false, changed, err);
}

int dr_relocate(const char *path, const struct dr_chain_options *options, unsigned *changed,
                struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return mend(dr_fs_posix(), path, options, false, changed, err);
}

int dr_pack_names_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                     unsigned *changed, struct dr_error *err)
{
    return mend(fs, path, options, true, changed, err);
}

int dr_pack_names(const char *path, const struct dr_chain_options *options, unsigned *changed,
                  struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return mend(dr_fs_posix(), path, options, true, changed, err);
}
