/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* tree: which images of a directory belong together. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

struct tree {
    struct dr_fs *fs;
    const struct dr_open_options *options;
    struct dr_scan scan;
    bool *placed; /* by scan index */
    size_t asked;
    struct dr_tree_node *nodes;
    size_t n;
};

/* ------------------------------------------------------------------ scan */

/* Collect the ancestors of the scanned image at index `at`, wherever they are. */
static int look_up(struct tree *t, size_t at, struct dr_error *err)
{
    int r = 0;
    for (size_t depth = 0; r == 0 && depth < dr_chain_bound() && t->scan.all[at].backing_path;
         depth++) {
        struct dr_file_id up = t->scan.all[at].backing_id;
        CLEANUP_FREE char *path = strdup(t->scan.all[at].backing_path);
        r = path ? dr_scan_file(&t->scan, t->fs, path, t->options, err)
                 : dr_fail(err, ENOMEM, "out of memory for the tree");
        at = dr_scan_find(&t->scan, up);
        if (at == t->scan.n)
            break;
    }
    return r;
}

/* Collect the image in question, all images in its directory, and its ancestors. */
static int look_around(struct tree *t, const char *path, struct dr_error *err)
{
    struct dr_file_id id;
    int r = t->fs->ops->identify(t->fs, path, &id, err);
    if (r == 0)
        r = dr_scan_file(&t->scan, t->fs, path, t->options, err);
    if (r < 0)
        return r;
    r = dr_scan_beside(&t->scan, t->fs, path, t->options, err);
    t->asked = dr_scan_find(&t->scan, id);
    if (r == 0 && t->asked == t->scan.n)
        return dr_fail(err, EINVAL, "%s: is not a file that can be read", path);
    return r < 0 ? r : look_up(t, t->asked, err);
}

static size_t parent_of(const struct tree *t, size_t i)
{
    const struct dr_scan_entry *e = &t->scan.all[i];
    return e->backing_path ? dr_scan_find(&t->scan, e->backing_id) : t->scan.n;
}

static size_t root_of(const struct tree *t, size_t i)
{
    for (size_t depth = 0; depth < dr_chain_bound(); depth++) {
        size_t up = parent_of(t, i);
        if (up == t->scan.n || up == t->asked)
            break;
        i = up;
    }
    return i;
}

/* ------------------------------------------------------------------ nodes */

/* Try to open the image with its parents; *problem says why that fails, NULL: it opens. Raw
 * files are not tried, since they have no parents. */
static int problem_of(const struct tree *t, const struct dr_scan_entry *e, char **problem)
{
    struct dr_open_options open = {.flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK};
    struct dr_error why = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    *problem = NULL;
    if (!e->problem && (!e->fmt || dr_scan_is_opaque(e)))
        return 0;
    if (e->problem)
        return (*problem = strdup(e->problem)) ? 0 : -ENOMEM;
    open.format = e->fmt->name;
    if (t->options) {
        open.allow_paths = t->options->allow_paths;
        open.flags |= t->options->flags & DR_OPEN_ANY_PATH;
    }
    int r = dr_open_fs(t->fs, e->path, &open, &disk, &why);
    dr_close(disk, NULL);
    if (r == 0 || r == -ENOMEM)
        return r;
    return (*problem = strdup(why.text)) ? 0 : -ENOMEM;
}

static int measure_raw(const struct tree *t, const struct dr_scan_entry *e,
                       struct dr_tree_node *node, struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    int r = dr_image_open(t->fs, e->path, e->fmt->name, flags, &image, err);
    if (r == 0) {
        node->size = image->size;
        r = dr_ops_disk_size(image, &node->disk_size, err);
    }
    return r == -ENOMEM ? r : 0;
}

static int add_node(struct tree *t, size_t i, size_t parent, struct dr_error *err)
{
    const struct dr_scan_entry *e = &t->scan.all[i];
    struct dr_tree_node *node = &t->nodes[t->n];
    *node = (struct dr_tree_node){
        .path = strdup(e->path),
        .format = strdup(e->fmt ? e->fmt->name : "unknown"),
        .size = e->size,
        .disk_size = e->disk_size,
        .asked = i == t->asked,
        .parent = parent,
    };
    t->n++;
    t->placed[i] = true;
    if (!node->path || !node->format || problem_of(t, e, &node->problem) < 0)
        return dr_fail(err, ENOMEM, "out of memory for the tree");
    if (e->fmt && (e->fmt->flags & DR_FORMAT_NO_PROBE))
        return measure_raw(t, e, node, err);
    return 0;
}

/* A node whose children are being placed. */
struct level {
    size_t entry, node; /* in the scan, in the tree */
    size_t next;        /* entry to look at next */
};

static bool next_child(const struct tree *t, struct level *l)
{
    while (
        l->next < t->scan.n &&
        (t->placed[l->next] || !dr_scan_is_child(&t->scan.all[l->next], t->scan.all[l->entry].id)))
        l->next++;
    return l->next < t->scan.n;
}

/* List children in the order of their names, each followed by its own children. The stack is on
 * the heap: a directory may hold a chain of any length. */
static int add_family(struct tree *t, size_t root, struct dr_error *err)
{
    CLEANUP_FREE struct level *stack = calloc(t->scan.n, sizeof(*stack));
    if (!stack)
        return dr_fail(err, ENOMEM, "out of memory for the tree");
    int r = add_node(t, root, SIZE_MAX, err);
    size_t depth = 1;
    stack[0] = (struct level){.entry = root, .node = t->n - 1};
    while (r == 0 && depth > 0) {
        struct level *l = &stack[depth - 1];
        if (!next_child(t, l)) {
            depth--;
            continue;
        }
        size_t child = l->next++;
        r = add_node(t, child, l->node, err);
        stack[depth++] = (struct level){.entry = child, .node = t->n - 1};
    }
    return r;
}

static int by_path(const void *a, const void *b)
{
    return strcmp(((const struct dr_scan_entry *)a)->path, ((const struct dr_scan_entry *)b)->path);
}

static int build(struct tree *t, const char *path, struct dr_error *err)
{
    int r = look_around(t, path, err);
    if (r < 0 || t->scan.n == 0)
        return r;
    struct dr_file_id asked = t->scan.all[t->asked].id;
    qsort(t->scan.all, t->scan.n, sizeof(*t->scan.all), by_path);
    t->asked = dr_scan_find(&t->scan, asked);
    t->placed = calloc(t->scan.n, sizeof(*t->placed));
    t->nodes = calloc(t->scan.n, sizeof(*t->nodes));
    if (!t->placed || !t->nodes)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    return add_family(t, root_of(t, t->asked), err);
}

/* ------------------------------------------------------------------ all of a directory */

/* A file without a magic number is listed only where an image names it as its parent, and pieces of
 * split disks are not. */
static bool is_listed(const struct tree *t, size_t i)
{
    const struct dr_scan_entry *e = &t->scan.all[i];
    if (!e->fmt)
        return !dr_scan_is_part(&t->scan, e->id);
    if (!(e->fmt->flags & DR_FORMAT_NO_PROBE))
        return true;
    for (size_t k = 0; k < t->scan.n; k++)
        if (dr_scan_is_child(&t->scan.all[k], e->id))
            return true;
    return false;
}

/* Roots first; what is left then has no root: a loop. */
static int add_families(struct tree *t, struct dr_error *err)
{
    int r = 0;
    for (int loops = 0; loops < 2; loops++)
        for (size_t i = 0; r == 0 && i < t->scan.n; i++)
            if (!t->placed[i] && is_listed(t, i) && (loops || parent_of(t, i) == t->scan.n))
                r = add_family(t, i, err);
    return r;
}

static int build_forest(struct tree *t, const char *dir, struct dr_error *err)
{
    int r = dr_scan_dir(&t->scan, t->fs, dir, t->options, err);
    for (size_t i = 0, n = t->scan.n; r == 0 && i < n; i++)
        r = look_up(t, i, err);
    if (r < 0 || t->scan.n == 0)
        return r;
    qsort(t->scan.all, t->scan.n, sizeof(*t->scan.all), by_path);
    t->asked = t->scan.n;
    t->placed = calloc(t->scan.n, sizeof(*t->placed));
    t->nodes = calloc(t->scan.n, sizeof(*t->nodes));
    if (!t->placed || !t->nodes)
        return dr_fail(err, ENOMEM, "%s: out of memory", dir);
    return add_families(t, err);
}

static int finish(struct tree *t, int r, struct dr_tree_node **nodes, size_t *n)
{
    dr_scan_free(&t->scan);
    free(t->placed);
    if (r < 0) {
        dr_tree_free(t->nodes, t->n);
        return r;
    }
    *nodes = t->nodes;
    *n = t->n;
    return 0;
}

int dr_forest_fs(struct dr_fs *fs, const char *dir, const struct dr_open_options *options,
                 struct dr_tree_node **nodes, size_t *n, struct dr_error *err)
{
    struct tree t = {.fs = fs, .options = options};
    int r = build_forest(&t, dir, err);
    return finish(&t, r, nodes, n);
}

int dr_forest(const char *dir, const struct dr_open_options *options, struct dr_tree_node **nodes,
              size_t *n, struct dr_error *err)
{
    DR_REQUIRE(dir, err);
    DR_REQUIRE(nodes, err);
    DR_REQUIRE(n, err);
    return dr_forest_fs(dr_fs_posix(), dir, options, nodes, n, err);
}

int dr_tree_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               struct dr_tree_node **nodes, size_t *n, struct dr_error *err)
{
    struct tree t = {.fs = fs, .options = options};
    int r = build(&t, path, err);
    return finish(&t, r, nodes, n);
}

int dr_tree(const char *path, const struct dr_open_options *options, struct dr_tree_node **nodes,
            size_t *n, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(nodes, err);
    DR_REQUIRE(n, err);
    return dr_tree_fs(dr_fs_posix(), path, options, nodes, n, err);
}

void dr_tree_free(struct dr_tree_node *nodes, size_t n)
{
    for (size_t i = 0; nodes && i < n; i++) {
        free(nodes[i].path);
        free(nodes[i].format);
        free(nodes[i].problem);
    }
    free(nodes);
}
