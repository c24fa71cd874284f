/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots that are images: taking one out of its family, and going back to one.
 *
 * P <- M <- C1..Cn: to delete M, either each child gets what it shows of M and P as its parent
 * (up), or M goes down into P, which then reads as M did, and the children get P as their parent
 * (down). Up copies for each child what is not covered there, down copies all of M once; down is
 * impossible where something else needs P as it is: another child, or a snapshot of the machine.
 *
 * There is never one switch over several files. Each child is moved by one of its own, by which its
 * view does not change; M's file goes last. Interrupted, every image reads as before, and the same
 * command goes on with what is left. */
#include <stdio.h>

#include "base/cleanup.h"
#include "core/publish.h"
#include "ops/ops-internal.h"
#include "ops/vmsd.h"

struct removal {
    struct dr_fs *fs;
    const struct dr_snapshot_options *o;
    struct dr_job *job;
    struct dr_tree_node *nodes;
    size_t n, disk, m; /* indexes of the disk that was named, and of the snapshot */
    char *vmsd_path;   /* of the machine, or NULL */
    char *vmsd_fault;  /* why a .vmsd there could not be read, or NULL */
    struct vmsd vmsd;
    bool shared_parent; /* M's has children that are not among the nodes */
};

static struct dr_tree_node *parent_of(const struct removal *x, size_t i)
{
    return x->nodes[i].parent == SIZE_MAX ? NULL : &x->nodes[x->nodes[i].parent];
}

static size_t count_children(const struct removal *x, size_t i)
{
    size_t n = 0;
    for (size_t k = 0; k < x->n; k++)
        n += x->nodes[k].parent == i;
    return n;
}

/* ------------------------------------------------------------------ the machine's snapshots */

static bool ends_with(const char *name, const char *tail)
{
    size_t n = strlen(name), t = strlen(tail);
    return n > t && strcmp(name + n - t, tail) == 0;
}

/* The .vmsd in the directory of the disk that knows one of the family; none is no failure, and one
 * that cannot be read is one only if it is to be changed. */
static int find_vmsd(struct removal *x, const char *path, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    char **names = NULL;
    size_t n = 0;
    int r = dir ? dr_ops_list(x->fs, dir, &names, &n, err)
                : dr_fail(err, ENOMEM, "%s: out of memory", path);
    for (size_t i = 0; r == 0 && i < n && !x->vmsd_path; i++) {
        struct dr_error why = DR_ERROR_INIT;
        CLEANUP_FREE char *at = ends_with(names[i], ".vmsd") ? dr_path_sibling(path, names[i])
                                                             : NULL;
        if (!at)
            continue;
        if (vmsd_load(&x->vmsd, x->fs, at, &why) < 0) {
            r = x->o->update_vmsd ? dr_fail(err, why.errnum, "%s", why.text) : 0;
            free(x->vmsd_fault);
            x->vmsd_fault = strdup(why.text);
            continue;
        }
        bool knows = false;
        for (size_t k = 0; k < x->n; k++)
            knows |= vmsd_of_image(&x->vmsd, x->nodes[k].path) != NULL;
        if (knows)
            x->vmsd_path = DR_STEAL(at);
        else
            vmsd_free(&x->vmsd);
    }
    if (names)
        dr_ops_free_names(names, n);
    return r;
}

static int save_vmsd(struct removal *x, bool changed, struct dr_error *err)
{
    if (!changed)
        return dr_fail(err, ENOMEM, "%s: out of memory", x->vmsd_path);
    return dict_save(&x->vmsd.dict, x->fs, x->vmsd_path, err);
}

/* ------------------------------------------------------------------ which images */

static bool is_named(const struct removal *x, size_t i, const char *name)
{
    const char *path = x->nodes[i].path;
    CLEANUP_FREE char *beside = dr_ops_resolve(x->nodes[x->disk].path, name);
    struct dr_file_id own, id;
    if (dr_name_identify(x->fs, path, &own, NULL) < 0)
        return false;
    return (dr_name_identify(x->fs, name, &id, NULL) == 0 && dr_same_id(id, own)) ||
           (beside && dr_name_identify(x->fs, beside, &id, NULL) == 0 && dr_same_id(id, own));
}

static bool is_titled(const struct removal *x, size_t i, const char *name)
{
    const struct vmsd_snapshot *s = vmsd_of_image(&x->vmsd, x->nodes[i].path);
    return s && strcmp(s->name, name) == 0;
}

static int find_snapshot(struct removal *x, const char *name, struct dr_error *err)
{
    size_t titled = 0;
    for (size_t i = 0; i < x->n; i++)
        if (is_named(x, i, name)) {
            x->m = i;
            return 0;
        }
    for (size_t i = 0; i < x->n; i++)
        if (is_titled(x, i, name)) {
            x->m = i;
            titled++;
        }
    if (titled > 1)
        return dr_fail(err, EINVAL, "%s: several snapshots are called \"%s\": name the image",
                       x->vmsd_path, name);
    if (titled == 0)
        return dr_fail(err, ENOENT, "%s: no image of its family is called \"%s\"%s%s",
                       x->nodes[x->disk].path, name,
                       x->vmsd_fault ? "; the names in a .vmsd are "
                                       "not known: "
                                     : "",
                       x->vmsd_fault ? x->vmsd_fault : "");
    return 0;
}

static int refuse_broken(const struct removal *x, size_t i, struct dr_error *err)
{
    return x->nodes[i].problem ? dr_fail(err, EINVAL, "%s", x->nodes[i].problem) : 0;
}

static int look_around(struct removal *x, const char *path, const char *name, struct dr_error *err)
{
    int r = dr_tree_fs(x->fs, path, &x->o->open, &x->nodes, &x->n, err);
    while (r == 0 && x->disk < x->n && !x->nodes[x->disk].asked)
        x->disk++;
    if (r == 0 && x->disk == x->n)
        r = dr_fail(err, EINVAL, "%s: is not an image", path);
    if (r == 0)
        r = find_vmsd(x, path, err);
    if (r == 0)
        r = find_snapshot(x, name, err);
    return r;
}

static void look_end(struct removal *x)
{
    dr_tree_free(x->nodes, x->n);
    vmsd_free(&x->vmsd);
    free(x->vmsd_path);
    free(x->vmsd_fault);
}

/* ------------------------------------------------------------------ how much there is to copy */

static int open_alone(const struct removal *x, size_t i, struct dr_chain **chain,
                      struct dr_error *err)
{
    struct dr_image *image;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    flags |= x->o->open.flags & DR_OPEN_ANY_PATH;
    *chain = NULL;
    int r = dr_image_open(x->fs, x->nodes[i].path, x->nodes[i].format, flags, &image, err);
    if (r == 0 && !(*chain = dr_chain_new(&image, 1)))
        r = dr_fail(err, ENOMEM, "%s: out of memory", x->nodes[i].path);
    return r;
}

/* Bytes of the lower image that show through holes of the upper one. upper NULL: all its bytes. */
static int count_shown(struct dr_chain *upper, struct dr_chain *lower, uint64_t *bytes,
                       struct dr_error *err)
{
    uint64_t size = lower->images[0]->size;
    struct dr_walk up, low;
    if (upper)
        size = dr_min(size, upper->images[0]->size);
    dr_walk_init(&up, upper, 0, 1, size);
    dr_walk_init(&low, lower, 0, 1, size);
    for (uint64_t off = 0, end; off < size; off = end) {
        int r = dr_walk_to(&low, off, err);
        if (r == 0)
            r = dr_walk_to(&up, off, err);
        if (r < 0)
            return r;
        end = dr_min(low.run.end, up.run.end);
        if (low.run.kind == DR_RUN_DATA && up.run.kind == DR_RUN_HOLE)
            *bytes += end - off;
    }
    return 0;
}

static int count_bytes(const struct removal *x, struct dr_snapshot_plan *plan, struct dr_error *err)
{
    struct dr_chain *lower = NULL;
    int r = open_alone(x, x->m, &lower, err);
    if (r == 0)
        r = count_shown(NULL, lower, &plan->down, err);
    for (size_t i = 0; r == 0 && i < x->n; i++) {
        struct dr_chain *upper = NULL;
        if (x->nodes[i].parent != x->m)
            continue;
        r = refuse_broken(x, i, err);
        if (r == 0)
            r = open_alone(x, i, &upper, err);
        if (r == 0)
            r = count_shown(upper, lower, &plan->up, err);
        dr_chain_unref(upper, NULL);
    }
    dr_chain_unref(lower, NULL);
    return r;
}

/* ------------------------------------------------------------------ children elsewhere */

static bool is_known(const struct removal *x, struct dr_file_id id)
{
    struct dr_file_id own;
    for (size_t i = 0; i < x->n; i++)
        if (dr_name_identify(x->fs, x->nodes[i].path, &own, NULL) == 0 && dr_same_id(own, id))
            return true;
    return false;
}

static bool is_stranger(const struct removal *x, struct dr_file_id id)
{
    return !is_known(x, id);
}

static bool is_any(const struct removal *x, struct dr_file_id id)
{
    (void)x;
    (void)id;
    return true;
}

/* *path: a child of the image beside it for which counts() is true, malloc'ed; NULL: none. */
static int find_child(const struct removal *x, size_t i,
                      bool (*counts)(const struct removal *x, struct dr_file_id id), char **path,
                      struct dr_error *err)
{
    struct dr_scan scan = {0};
    struct dr_file_id own;
    *path = NULL;
    int r = dr_name_identify(x->fs, x->nodes[i].path, &own, err);
    if (r == 0)
        r = dr_scan_beside(&scan, x->fs, x->nodes[i].path, &x->o->open, err);
    for (size_t k = 0; r == 0 && !*path && k < scan.n; k++)
        if (dr_scan_is_child(&scan.all[k], own) && counts(x, scan.all[k].id) &&
            !(*path = strdup(scan.all[k].path)))
            r = dr_fail(err, ENOMEM, "%s: out of memory", x->nodes[i].path);
    dr_scan_free(&scan);
    return r;
}

/* The nodes are what is beside the disk, and its ancestors: where these are in another directory,
 * other images there may stand on them. */
static int look_for_strangers(struct removal *x, struct dr_error *err)
{
    CLEANUP_FREE char *on_m = NULL;
    CLEANUP_FREE char *on_parent = NULL;
    int r = find_child(x, x->m, is_stranger, &on_m, err);
    if (r == 0 && on_m)
        r = dr_fail(err, EBUSY, "%s: %s stands on it, too, and is not in the directory of %s",
                    x->nodes[x->m].path, on_m, x->nodes[x->disk].path);
    if (r == 0 && parent_of(x, x->m))
        r = find_child(x, x->nodes[x->m].parent, is_stranger, &on_parent, err);
    x->shared_parent = on_parent != NULL;
    return r;
}

/* ------------------------------------------------------------------ which way */

/* Why M cannot go down, or NULL. */
static const char *obstacle(const struct removal *x)
{
    const struct dr_tree_node *p = parent_of(x, x->m);
    if (!p)
        return "it has no parent";
    if (count_children(x, x->nodes[x->m].parent) > 1 || x->shared_parent)
        return "its parent has other children";
    if (vmsd_of_image(&x->vmsd, p->path))
        return "a snapshot of the machine is what its parent holds now";
    return NULL;
}

static int choose(const struct removal *x, struct dr_snapshot_plan *plan, struct dr_error *err)
{
    const char *no = obstacle(x);
    if (no && x->o->merge == DR_SNAPSHOT_MERGE_DOWN)
        return dr_fail(err, EBUSY, "%s: cannot be merged down: %s", x->nodes[x->m].path, no);
    plan->possible_down = !no;
    plan->goes_down = !no && (x->o->merge == DR_SNAPSHOT_MERGE_DOWN ||
                              (x->o->merge == DR_SNAPSHOT_MERGE_BEST && plan->down <= plan->up));
    return 0;
}

static void tell_plan(const struct removal *x, const struct dr_snapshot_plan *plan)
{
    const struct dr_tree_node *p = parent_of(x, x->m);
    const char *path = x->nodes[x->m].path;
    unsigned long long bytes = plan->goes_down ? plan->down : plan->up;
    const char *would = x->o->dry_run ? "would be " : "";
    if (count_children(x, x->m) == 0)
        dr_ops_report(x->o->report, x->o->user, "%s: %sremoved; nothing stands on it", path, would);
    else if (plan->goes_down)
        dr_ops_report(x->o->report, x->o->user,
                      "%s: %smerged down into %s, which then reads as it did: %llu bytes", path,
                      would, p->path, bytes);
    else
        dr_ops_report(x->o->report, x->o->user, "%s: %smerged up into %zu image%s: %llu bytes",
                      path, would, count_children(x, x->m), count_children(x, x->m) == 1 ? "" : "s",
                      bytes);
}

/* ------------------------------------------------------------------ up and down */

static int merge_up(const struct removal *x, struct dr_error *err)
{
    const struct dr_tree_node *p = parent_of(x, x->m);
    int r = 0;
    for (size_t i = 0; r == 0 && i < x->n; i++) {
        struct dr_stream_options stream = {.open = x->o->open, .base = p ? p->path : NULL};
        stream.open.format = x->nodes[i].format;
        if (x->nodes[i].parent == x->m)
            r = dr_stream_fs(x->fs, x->nodes[i].path, &stream, x->job, err);
    }
    return r;
}

/* P reads as M does by now. Where their sizes differ the child may see the difference. */
static int move_child(const struct removal *x, size_t i, struct dr_error *err)
{
    const struct dr_tree_node *p = parent_of(x, x->m), *c = &x->nodes[i];
    CLEANUP_FREE char *name = dr_ops_name_from(x->fs, c->path, p->path);
    if (!name)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    struct dr_rebase_options rebase = {.open = x->o->open,
                                       .backing = name,
                                       .backing_format = p->format,
                                       .unsafe = x->nodes[x->m].size == p->size};
    rebase.open.format = c->format;
    return dr_rebase_fs(x->fs, c->path, &rebase, x->job, err);
}

static int merge_down(const struct removal *x, struct dr_error *err)
{
    const struct dr_tree_node *p = parent_of(x, x->m);
    size_t first = 0;
    while (x->nodes[first].parent != x->m)
        first++;
    struct dr_commit_options commit = {
        .open = x->o->open, .top = x->nodes[x->m].path, .base = p->path};
    commit.open.format = x->nodes[first].format;
    int r = dr_commit_fs(x->fs, x->nodes[first].path, &commit, x->job, err);
    for (size_t i = first + 1; r == 0 && i < x->n; i++)
        if (x->nodes[i].parent == x->m)
            r = move_child(x, i, err);
    return r;
}

/* ------------------------------------------------------------------ deleting */

/* An image that was being removed when that was interrupted may lack some of its files by now. */
static int remove_image(struct removal *x, struct dr_error *err)
{
    const struct dr_tree_node *m = &x->nodes[x->m];
    struct dr_open_options open = x->o->open;
    int r = 0;
    if (m->problem)
        open.flags |= DR_OPEN_SALVAGE;
    if (x->o->update_vmsd && x->vmsd_path && vmsd_of_image(&x->vmsd, m->path))
        r = save_vmsd(x, vmsd_forget_image(&x->vmsd, m->path), err);
    return r < 0 ? r
                 : dr_ops_remove_image(x->fs, m->path, m->problem ? NULL : m->format, &open, NULL,
                                       NULL, err);
}

/* A deletion that was killed may have moved images from M to its parent, and their new records may
 * be in the machine's memory only. Without them they could not do without M. */
static int harden_siblings(const struct removal *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < x->n; i++) {
        const struct dr_tree_node *node = &x->nodes[i];
        struct dr_chain *alone = NULL;
        if (i == x->m || node->problem || node->parent != x->nodes[x->m].parent)
            continue;
        r = open_alone(x, i, &alone, err);
        if (r == 0)
            r = dr_chain_harden(alone, 0, err);
        dr_chain_unref(alone, NULL);
    }
    return r;
}

static int delete_found(struct removal *x, struct dr_snapshot_plan *plan, struct dr_error *err)
{
    bool leaf = count_children(x, x->m) == 0;
    if (leaf && x->m == x->disk)
        return dr_fail(err, EINVAL, "%s: is the disk itself, and no snapshot of it",
                       x->nodes[x->m].path);
    int r = leaf ? 0 : refuse_broken(x, x->m, err);
    if (r == 0)
        r = look_for_strangers(x, err);
    if (r == 0 && !leaf)
        r = count_bytes(x, plan, err);
    if (r == 0 && !leaf)
        r = choose(x, plan, err);
    if (r < 0)
        return r;
    tell_plan(x, plan);
    if (x->o->dry_run)
        return 0;
    if (!leaf)
        r = plan->goes_down ? merge_down(x, err) : merge_up(x, err);
    if (r == 0)
        r = harden_siblings(x, err);
    return r < 0 ? r : remove_image(x, err);
}

int dr_snapshot_delete_fs(struct dr_fs *fs, const char *disk, const char *name,
                          const struct dr_snapshot_options *options, struct dr_snapshot_plan *plan,
                          struct dr_job *job, struct dr_error *err)
{
    static const struct dr_snapshot_options defaults;
    struct dr_snapshot_plan found = {0};
    struct removal x = {.fs = fs, .o = options ? options : &defaults, .job = job};
    int r = look_around(&x, disk, name, err);
    if (r == 0)
        r = delete_found(&x, &found, err);
    if (r == 0 && plan)
        *plan = found;
    look_end(&x);
    return r;
}

int dr_snapshot_delete(const char *disk, const char *name,
                       const struct dr_snapshot_options *options, struct dr_snapshot_plan *plan,
                       struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(name, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r
                 : dr_job_end(job, dr_snapshot_delete_fs(dr_fs_posix(), disk, name, options, plan,
                                                         job, err));
}

/* ------------------------------------------------------------------ going back */

static bool stands_on(const struct removal *x, size_t i, size_t below)
{
    for (size_t depth = 0; depth <= x->n && i != SIZE_MAX; depth++, i = x->nodes[i].parent)
        if (i == below)
            return true;
    return false;
}

static int check_revert(const struct removal *x, struct dr_error *err)
{
    const char *path = x->nodes[x->disk].path;
    int r = refuse_broken(x, x->m, err);
    if (r < 0)
        return r;
    if (stands_on(x, x->m, x->disk))
        return dr_fail(err, EINVAL, "%s: %s is %s: there is nothing to go back to", path,
                       x->nodes[x->m].path,
                       x->m == x->disk ? "the disk itself" : "made on that disk");
    if (count_children(x, x->disk) > 0)
        return dr_fail(err, EBUSY,
                       "%s: other images stand on it, and would lose what they show: go back with "
                       "a disk of another name (drover snapshot -c)",
                       path);
    return dr_gate_check(x->fs, path, x->nodes[x->m].path, &x->o->open, err);
}

/* The disk as it is, for its layout and to keep its content from others. */
static int make_empty(struct removal *x, struct dr_disk *snapshot, struct dr_new_image *fresh,
                      struct dr_error *err)
{
    const struct dr_tree_node *d = &x->nodes[x->disk];
    CLEANUP_IMAGE struct dr_image *like = NULL;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    flags |= x->o->open.flags & DR_OPEN_ANY_PATH;
    CLEANUP_FREE char *name = dr_ops_name_from(x->fs, d->path, x->nodes[x->m].path);
    if (!name)
        return dr_fail(err, ENOMEM, "%s: out of memory", d->path);
    int r = dr_image_open(x->fs, d->path, d->format, flags, &like, err);
    if (r < 0)
        return r;
    const struct dr_format *fmt = like->fmt;
    struct dr_image *parent = snapshot->chain->images[0];
    if (!(fmt->flags & DR_FORMAT_BACKING) || !fmt->create)
        return dr_fail(err, ENOTSUP, "%s: %s images cannot have snapshots", d->path, fmt->name);
    if (fmt->parent_format && strcmp(fmt->parent_format, parent->fmt->name) != 0)
        return dr_fail(err, ENOTSUP, "%s: is a %s image, and the parent of a %s image must be %s",
                       parent->path, parent->fmt->name, fmt->name, fmt->parent_format);
    const struct dr_create_params what = {
        .size = parent->size,
        .backing = parent,
        .backing_name = name,
        .backing_format = parent->fmt->name,
        .like = like,
        .like_chain = snapshot->chain,
        .all_new = true,
    };
    return dr_new_create(fresh, fmt, &what, NULL, 0, x->o->open.flags, err);
}

/* The family was looked at before the disk was locked, and a lock keeps nobody from making a child.
 */
static int refuse_new_children(const struct removal *x, struct dr_error *err)
{
    const char *path = x->nodes[x->disk].path;
    CLEANUP_FREE char *child = NULL;
    int r = find_child(x, x->disk, is_any, &child, err);
    return r == 0 && child ? dr_fail(err, EBUSY, "%s: %s was made on it meanwhile", path, child)
                           : r;
}

static int revert_found(struct removal *x, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *snapshot = NULL;
    CLEANUP_NEW struct dr_new_image fresh = {0};
    struct dr_open_options open = x->o->open;
    int r = check_revert(x, err);
    if (r < 0)
        return r;
    dr_ops_report(x->o->report, x->o->user, "%s: %s an empty image on %s", x->nodes[x->disk].path,
                  x->o->dry_run ? "would become" : "becomes", x->nodes[x->m].path);
    if (x->o->dry_run)
        return 0;
    open.format = x->nodes[x->m].format;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    r = dr_new_begin(&fresh, x->fs, x->nodes[x->disk].path, false, x->o->open.flags, err);
    open.flags |= DR_OPEN_FORCE_SHARE; /* the lock that we hold would be in the way */
    if (r == 0)
        r = dr_open_fs(x->fs, x->nodes[x->m].path, &open, &snapshot, err);
    if (r == 0)
        r = make_empty(x, snapshot, &fresh, err);
    if (r == 0)
        r = refuse_new_children(x, err);
    if (r == 0)
        r = dr_new_publish(&fresh, err);
    if (r == 0 && x->o->update_vmsd && x->vmsd_path)
        r = save_vmsd(x, vmsd_set_current(&x->vmsd, x->nodes[x->m].path), err);
    return r;
}

int dr_snapshot_revert_fs(struct dr_fs *fs, const char *disk, const char *name,
                          const struct dr_snapshot_options *options, struct dr_error *err)
{
    static const struct dr_snapshot_options defaults;
    struct removal x = {.fs = fs, .o = options ? options : &defaults};
    int r = look_around(&x, disk, name, err);
    if (r == 0)
        r = revert_found(&x, err);
    look_end(&x);
    return r;
}

int dr_snapshot_revert(const char *disk, const char *name,
                       const struct dr_snapshot_options *options, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(name, err);
    return dr_new_hide(dr_snapshot_revert_fs(dr_fs_posix(), disk, name, options, err), disk, err);
}
