/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* chain check: each image of a chain, or of a directory, is looked at alone and with its parent
 * alone, so that what is wrong is told once, where it is. */
#include <stdarg.h>
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/chain-parent.h"
#include "ops/fingerprint.h"

struct examination {
    struct dr_fs *fs;
    const struct dr_chain_options *o;
    struct dr_scan scan;   /* images near those in question */
    struct dr_scan around; /* and further away; when a parent has to be looked for */
    bool *asked;           /* by index in scan: an image in question */
    struct dr_chain_finding *list;
    size_t n, images;
};

const char *dr_chain_fault_name(enum dr_chain_fault fault)
{
    static const char *const names[] = {
        [DR_CHAIN_DAMAGED] = "damaged",     [DR_CHAIN_MISSING] = "missing",
        [DR_CHAIN_MOVED] = "moved",         [DR_CHAIN_LOOP] = "loop",
        [DR_CHAIN_CHANGED] = "changed",     [DR_CHAIN_FORBIDDEN] = "forbidden",
        [DR_CHAIN_REFUSED] = "refused",     [DR_CHAIN_CAPACITY] = "capacity",
        [DR_CHAIN_FORMAT] = "format-guess", [DR_CHAIN_SIBLING] = "sibling",
    };
    return (unsigned)fault < sizeof(names) / sizeof(names[0]) ? names[fault] : "?";
}

void dr_chain_findings_free(struct dr_chain_finding *findings, size_t n)
{
    for (size_t i = 0; findings && i < n; i++) {
        free(findings[i].path);
        free(findings[i].text);
        free(findings[i].found);
    }
    free(findings);
}

__attribute__((format(printf, 5, 6))) static int add(struct examination *x,
                                                     enum dr_chain_fault fault, const char *path,
                                                     struct dr_error *err, const char *fmt, ...)
{
    struct dr_chain_finding *more = realloc(x->list, (x->n + 1) * sizeof(*more));
    struct dr_chain_finding one = {.fault = fault, .path = strdup(path)};
    va_list ap;
    if (more)
        x->list = more;
    va_start(ap, fmt);
    if (vasprintf(&one.text, fmt, ap) < 0)
        one.text = NULL;
    va_end(ap);
    if (!more || !one.path || !one.text) {
        free(one.path);
        free(one.text);
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    }
    x->list[x->n++] = one;
    return 0;
}

/* ------------------------------------------------------------------ a parent that is not there */

/* `why` is what opening says, or NULL. */
static int tell_moved(struct examination *x, const struct dr_scan_entry *e, const char *at,
                      struct dr_error *err)
{
    CLEANUP_FREE char *found = strdup(at);
    if (!found)
        return dr_fail(err, ENOMEM, "%s: out of memory", e->path);
    int r = add(x, DR_CHAIN_MOVED, e->path, err,
                "%s: its parent \"%s\" is not there; %s is the one: drover chain relocate %s",
                e->path, e->backing_name, at, e->path);
    if (r == 0)
        x->list[x->n - 1].found = DR_STEAL(found);
    return r;
}

/* Look for the parent of the entry: *at is where it is, malloc'ed, or NULL. */
static int look_for(struct examination *x, const struct dr_scan_entry *e, char **at,
                    struct dr_error *err)
{
    size_t found = 0;
    *at = NULL;
    int r = chain_scan_around(&x->around, x->fs, e->path, x->o, err);
    if (r < 0)
        return r;
    size_t child = dr_scan_find(&x->around, e->id);
    if (child == x->around.n || chain_find_parent(&x->around, x->fs, child, &found) != 1)
        return 0;
    *at = strdup(x->around.all[found].path);
    return *at ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", e->path);
}

/* `fault` and `why` hold if the right parent is nowhere. */
static int look_elsewhere(struct examination *x, const struct dr_scan_entry *e,
                          enum dr_chain_fault fault, const char *why, struct dr_error *err)
{
    CLEANUP_FREE char *at = NULL;
    int r = look_for(x, e, &at, err);
    if (r < 0)
        return r;
    return at ? tell_moved(x, e, at, err) : add(x, fault, e->path, err, "%s", why);
}

/* ------------------------------------------------------------------ an image and its parent */

static enum dr_chain_fault fault_of(int r)
{
    return r == -ELOOP                     ? DR_CHAIN_LOOP
           : r == -ESTALE                  ? DR_CHAIN_CHANGED
           : r == -EACCES                  ? DR_CHAIN_FORBIDDEN
           : r == -ENOENT || r == -ENOTDIR ? DR_CHAIN_MISSING
                                           : DR_CHAIN_REFUSED;
}

static int tell_refused(struct examination *x, const struct dr_scan_entry *e, int refusal,
                        const char *why, struct dr_error *err)
{
    enum dr_chain_fault fault = fault_of(refusal);
    if (fault == DR_CHAIN_MISSING || fault == DR_CHAIN_CHANGED)
        return look_elsewhere(x, e, fault, why, err);
    return add(x, fault, e->path, err, "%s", why);
}

static int compare_sizes(struct examination *x, const struct dr_scan_entry *e,
                         const struct dr_image *parent, struct dr_error *err)
{
    if (parent->size == e->size)
        return 0;
    return add(x, DR_CHAIN_CAPACITY, e->path, err,
               "%s: has %llu bytes and its parent %s %llu: what is behind the end of a parent "
               "reads as zeros, but VMware opens no such chain",
               e->path, (unsigned long long)e->size, parent->path,
               (unsigned long long)parent->size);
}

static int look_at_format(struct examination *x, const struct dr_scan_entry *e,
                          const struct dr_image *parent, struct dr_error *err)
{
    if (e->backing_format || e->fmt->parent_format || dr_name_format(e->backing_name))
        return 0;
    return add(x, DR_CHAIN_FORMAT, e->path, err,
               "%s: does not record the format of its parent, and programs guess; to record it: "
               "drover rebase -u -F %s -b %s %s",
               e->path, parent->fmt->name, e->backing_name, e->path);
}

static int look_at_parent(struct examination *x, const struct dr_scan_entry *e, const char *path,
                          struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *parent = NULL;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    flags |= x->o->open.flags & DR_OPEN_ANY_PATH;
    const char *format = e->backing_format ? e->backing_format : e->fmt->parent_format;
    if (dr_image_open(x->fs, path, format, flags, &parent, NULL) < 0)
        return 0; /* told where the parent is examined */
    int r = compare_sizes(x, e, parent, err);
    return r < 0 ? r : look_at_format(x, e, parent, err);
}

/* Is the trouble that of the parent, which is examined, too? Texts begin with the file's name. */
static bool is_of_parent(const struct examination *x, const struct dr_scan_entry *e,
                         const char *text)
{
    size_t up = e->backing_path ? dr_scan_find(&x->scan, e->backing_id) : x->scan.n;
    size_t len = strlen(e->path);
    return up < x->scan.n && x->asked[up] && (strncmp(text, e->path, len) != 0 || text[len] != ':');
}

static int examine_reference(struct examination *x, const struct dr_scan_entry *e,
                             struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_FREE char *path = NULL;
    struct dr_error why = DR_ERROR_INIT;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    flags |= x->o->open.flags & DR_OPEN_ANY_PATH;
    int r = dr_image_open(x->fs, e->path, e->fmt->name, flags, &image, &why);
    if (r < 0)
        return add(x, DR_CHAIN_DAMAGED, e->path, err, "%s", why.text);
    if (!image->backing_name)
        return 0;
    r = dr_backing_locate(image, &x->o->open, &path, &why);
    if (r < 0 && is_of_parent(x, e, why.text))
        return 0;
    if (r < 0)
        return tell_refused(x, e, r, why.text, err);
    r = ops_fingerprint_look(x->fs, e->path, e->fmt->name, &x->o->open, true, &why);
    if (r == -ESTALE && !is_of_parent(x, e, why.text))
        return add(x, DR_CHAIN_CHANGED, e->path, err, "%s", why.text);
    return look_at_parent(x, e, path, err);
}

/* Each image of a longer loop opens with its parent alone. */
static bool is_in_loop(const struct examination *x, size_t i)
{
    size_t at = i;
    for (size_t depth = 0; depth < x->scan.n; depth++) {
        const struct dr_scan_entry *e = &x->scan.all[at];
        at = e->backing_path ? dr_scan_find(&x->scan, e->backing_id) : x->scan.n;
        if (at == i || at == x->scan.n)
            return at == i;
    }
    return false;
}

static int examine(struct examination *x, size_t i, struct dr_error *err)
{
    const struct dr_scan_entry *e = &x->scan.all[i];
    x->images++;
    if (e->problem)
        return add(x, DR_CHAIN_DAMAGED, e->path, err, "%s", e->problem);
    if (is_in_loop(x, i))
        return add(x, DR_CHAIN_LOOP, e->path, err, "%s: its parent \"%s\" stands on it: a loop",
                   e->path, e->backing_name);
    return dr_scan_is_opaque(e) ? 0 : examine_reference(x, e, err);
}

/* ------------------------------------------------------------------ siblings */

/* Does the entry, which stands on the image with this index, not fit it any more? */
static bool is_stale(const struct dr_scan_entry *e, const struct dr_scan_entry *parent)
{
    return e->has_ids && parent->has_ids && e->parent_id != parent->content_id;
}

static int examine_siblings(struct examination *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < x->scan.n; i++) {
        const struct dr_scan_entry *e = &x->scan.all[i];
        size_t up = e->backing_path && !x->asked[i] ? dr_scan_find(&x->scan, e->backing_id)
                                                    : x->scan.n;
        if (up < x->scan.n && x->asked[up] && is_stale(e, &x->scan.all[up]))
            r = add(x, DR_CHAIN_SIBLING, e->path, err,
                    "%s: is another child of %s and no longer valid: it was made on CID %08x, and "
                    "that has %08x by now",
                    e->path, x->scan.all[up].path, e->parent_id, x->scan.all[up].content_id);
    }
    return r;
}

/* ------------------------------------------------------------------ what is examined */

/* Mark the image and its ancestors, and scan where they are. */
static int mark_chain(struct examination *x, size_t at, struct dr_error *err)
{
    int r = 0;
    for (size_t depth = 0; r == 0 && at < x->scan.n && !x->asked[at]; depth++) {
        CLEANUP_FREE char *up = NULL;
        struct dr_file_id id = x->scan.all[at].backing_id;
        x->asked[at] = true;
        if (!x->scan.all[at].backing_path || depth > dr_chain_bound())
            break;
        up = strdup(x->scan.all[at].backing_path);
        size_t before = x->scan.n;
        r = up ? dr_scan_beside(&x->scan, x->fs, up, &x->o->open, err)
               : dr_fail(err, ENOMEM, "out of memory for the chain");
        bool *asked = r == 0 ? realloc(x->asked, x->scan.n * sizeof(*asked)) : NULL;
        if (r == 0 && !asked)
            return dr_fail(err, ENOMEM, "out of memory for the chain");
        if (asked)
            x->asked = asked;
        if (r == 0)
            memset(x->asked + before, 0, x->scan.n - before);
        at = r == 0 ? dr_scan_find(&x->scan, id) : x->scan.n;
    }
    return r;
}

static bool is_parent(const struct examination *x, size_t i)
{
    for (size_t k = 0; k < x->scan.n; k++)
        if (dr_scan_is_child(&x->scan.all[k], x->scan.all[i].id))
            return true;
    return false;
}

static void mark_all(struct examination *x)
{
    for (size_t i = 0; i < x->scan.n; i++) {
        const struct dr_scan_entry *e = &x->scan.all[i];
        x->asked[i] = e->fmt ? !(e->fmt->flags & DR_FORMAT_NO_PROBE) || is_parent(x, i)
                             : !dr_scan_is_part(&x->scan, e->id);
    }
}

static int choose(struct examination *x, const char *path, bool dir, struct dr_error *err)
{
    struct dr_file_id id = {0};
    int r = dir ? dr_scan_dir(&x->scan, x->fs, path, &x->o->open, err)
                : dr_name_identify(x->fs, path, &id, err);
    if (r == 0 && !dir)
        r = dr_scan_file(&x->scan, x->fs, path, &x->o->open, err);
    if (r == 0 && !dir)
        r = dr_scan_beside(&x->scan, x->fs, path, &x->o->open, err);
    x->asked = r == 0 ? calloc(x->scan.n + 1, sizeof(*x->asked)) : NULL;
    if (r < 0 || !x->asked)
        return r < 0 ? r : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (dir)
        mark_all(x);
    else if (dr_scan_find(&x->scan, id) == x->scan.n)
        return dr_fail(err, EINVAL, "%s: is not a file that can be read", path);
    return dir ? 0 : mark_chain(x, dr_scan_find(&x->scan, id), err);
}

/* Top first: a chain in its order, a directory by names. */
static int examine_marked(struct examination *x, const char *path, bool dir, struct dr_error *err)
{
    struct dr_file_id id = {0};
    int r = 0;
    for (size_t i = 0; dir && r == 0 && i < x->scan.n; i++)
        r = x->asked[i] ? examine(x, i, err) : 0;
    if (dir || dr_name_identify(x->fs, path, &id, NULL) < 0)
        return r;
    size_t at = dr_scan_find(&x->scan, id);
    for (size_t depth = 0; r == 0 && at < x->scan.n && depth < x->scan.n; depth++) {
        const struct dr_scan_entry *e = &x->scan.all[at];
        r = examine(x, at, err);
        at = e->backing_path ? dr_scan_find(&x->scan, e->backing_id) : x->scan.n;
        if (at < x->scan.n && dr_same_id(x->scan.all[at].id, id))
            break; /* around the loop */
    }
    return r < 0 ? r : examine_siblings(x, err);
}

int dr_chain_examine_fs(struct dr_fs *fs, const char *path, const struct dr_chain_options *options,
                        struct dr_chain_finding **findings, size_t *n, size_t *images,
                        struct dr_error *err)
{
    static const struct dr_chain_options defaults;
    struct examination x = {.fs = fs, .o = options ? options : &defaults};
    bool dir = dr_ops_is_directory(fs, path);
    int r = choose(&x, path, dir, err);
    if (r == 0)
        r = examine_marked(&x, path, dir, err);
    dr_scan_free(&x.scan);
    dr_scan_free(&x.around);
    free(x.asked);
    if (r < 0) {
        dr_chain_findings_free(x.list, x.n);
        return r;
    }
    *findings = x.list;
    *n = x.n;
    *images = x.images;
    return 0;
}

int dr_chain_examine(const char *path, const struct dr_chain_options *options,
                     struct dr_chain_finding **findings, size_t *n, size_t *images,
                     struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(findings, err);
    DR_REQUIRE(n, err);
    DR_REQUIRE(images, err);
    return dr_chain_examine_fs(dr_fs_posix(), path, options, findings, n, images, err);
}
