/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* blockdev-add and blockdev-del: a client gives an image a name, by which other commands use it: as
 * the target of a mirror, as the overlay of a snapshot, or as a disk of its own.
 *
 * blockdev-add opens the image to see that it is one, and closes it again. It is opened for good by
 * the first command that uses it as a disk, and stays open until blockdev-del. An image that
 * becomes part of another disk is opened by the operation that puts it there; the node is then no
 * more than its name. */
#include <stdlib.h>
#include <string.h>

#include "base/absolute.h"
#include "live/live.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ what a client says */

#define ANY_NODE                                                                          \
    {"driver", 's', true}, {"node-name", 's', false}, {"discard", 's', false},            \
        {"cache", 'o', false}, {"read-only", 'b', false}, {"auto-read-only", 'b', false}, \
        {"force-share", 'b', false},                                                      \
    {                                                                                     \
        "detect-zeroes", 's', false                                                       \
    }
static const struct qmp_arg driver_arg[] = {{"driver", 's', true}, {0}};
static const struct qmp_arg file_args[] = {
    ANY_NODE, {"filename", 's', true}, {"locking", 's', false}, {"aio", 's', false}, {0}};
static const struct qmp_arg image_args[] = {
    ANY_NODE, {"file", 'r', true}, {"backing", 'R', false}, {0}};
static const struct qmp_arg cache_args[] = {{"direct", 'b', false}, {"no-flush", 'b', false}, {0}};

static bool is_file_driver(const char *driver)
{
    return strcmp(driver, "file") == 0 || strcmp(driver, "host_device") == 0;
}

/* Formats that keep several disks in one file have no driver: a node has no member's name. */
static bool is_image_driver(const char *driver)
{
    const struct dr_format *fmt = dr_format_find(driver);
    return fmt && fmt->flags & DR_FORMAT_WRITE;
}

static int refuse_value(const char *where, const char *name, const char *value,
                        struct qmp_error *err)
{
    qmp_fail(err, NULL, "Parameter '%s%s' does not accept value '%s'", where, name, value);
    return -EINVAL;
}

/* Is value, if it is there, one of the words? */
static int check_word(json_t *args, const char *where, const char *name, const char *const *words,
                      struct qmp_error *err)
{
    const char *value = qmp_string(args, name);
    for (size_t i = 0; value && words[i]; i++)
        if (strcmp(value, words[i]) == 0)
            return 0;
    return value ? refuse_value(where, name, value, err) : 0;
}

/* One level of the description: the node's own, or that of its file. */
static int check_level(json_t *args, const char *where, struct qmp_error *err)
{
    static const char *const discards[] = {"ignore", "off", "unmap", "on", NULL};
    static const char *const detects[] = {"off", NULL};
    static const char *const lockings[] = {"auto", "on", NULL};
    json_t *cache = json_object_get(args, "cache");
    const char *driver = qmp_string(args, "driver");
    char inside[64];
    if (!driver)
        return qmp_check_args(driver_arg, where, args, err);
    if (!is_file_driver(driver) && (*where || !is_image_driver(driver)))
        return refuse_value(where, "driver", driver, err);
    int r = qmp_check_args(is_file_driver(driver) ? file_args : image_args, where, args, err);
    if (r == 0)
        r = check_word(args, where, "discard", discards, err);
    if (r == 0)
        r = check_word(args, where, "detect-zeroes", detects, err);
    if (r == 0)
        r = check_word(args, where, "locking", lockings, err);
    snprintf(inside, sizeof(inside), "%scache.", where);
    return r == 0 && cache ? qmp_check_args(cache_args, inside, cache, err) : r;
}

static int check_description(json_t *args, struct qmp_error *err)
{
    json_t *file = json_object_get(args, "file");
    int r = check_level(args, "", err);
    if (r == 0 && json_is_object(file))
        r = check_level(file, "file.", err);
    if (r == 0 && json_is_object(json_object_get(args, "backing"))) {
        qmp_fail(err, NULL, "Parameter 'backing' is a node's name or null here");
        r = -EINVAL;
    }
    if (r == 0 && !qmp_string(args, "node-name")) {
        qmp_fail(err, NULL, "'node-name' must be specified for the root node");
        r = -EINVAL;
    }
    return r;
}

static unsigned flags_of(json_t *args)
{
    json_t *cache = json_object_get(args, "cache");
    return (qmp_bool(cache, "direct", false) ? DR_OPEN_DIRECT : 0u) |
           (qmp_bool(cache, "no-flush", false) ? DR_OPEN_NO_FLUSH : 0u) |
           (json_is_null(json_object_get(args, "backing")) ? DR_OPEN_NO_BACKING : 0u);
}

/* ------------------------------------------------------------------ opening */

static struct dr_fs *files_of(struct dr_live *live)
{
    const struct live_disk *first = live_nth_disk(live, 0);
    return first ? first->disk->fs : dr_fs_posix();
}

static int open_node(struct dr_live *live, const struct live_node *node, struct dr_disk **disk,
                     struct dr_error *err)
{
    struct dr_open_options open = {
        .format = node->format ? node->format : "raw",
        .flags = node->flags | (node->read_only ? 0u : DR_OPEN_RDWR),
        .allow_paths = (const char *const *)live->allow,
    };
    return dr_open_fs(files_of(live), node->path, &open, disk, err);
}

/* A node belongs to no disk yet, so its file may be wherever one of the disks may have files. */
static int pass_gate(struct dr_live *live, const char *path, struct dr_error *err)
{
    const struct live_disk *on;
    int r = dr_fail(err, EACCES, "%s: there is no disk yet, whose files may lie there", path);
    for (size_t i = 0; r < 0 && (on = live_nth_disk(live, i)); i++) {
        dr_error_reset(err); /* the first text stays, otherwise */
        r = live_gate(live, on, path, err);
    }
    return r;
}

static bool is_write_refusal(int r)
{
    return r == -EACCES || r == -EPERM || r == -EROFS;
}

/* Is the parent that the client names the one that the image has? It names it because QEMU does not
 * look into the image for it. */
static int check_parent(struct dr_live *live, struct dr_disk *disk, const char *backing,
                        struct dr_error *err)
{
    pthread_mutex_lock(&live->lock);
    const char *path = live_node_path(live, backing);
    pthread_mutex_unlock(&live->lock);
    if (!path)
        return dr_fail(err, ENOENT,
                       "Could not open backing file: Cannot find device='%s' nor node-name='%s'",
                       backing, backing);
    struct dr_chain *chain = dr_disk_chain(disk);
    bool same = chain->n > 1 && dr_ops_member(chain, path) == 1;
    dr_chain_unref(chain, NULL);
    return same ? 0
                : dr_fail(err, EINVAL, "%s: does not have '%s' (%s) as its backing file",
                          dr_image_path(disk, 0), backing, path);
}

/* Open the image to see that it is one. */
static int try_node(struct dr_live *live, struct live_node *node, json_t *args,
                    struct dr_error *err)
{
    const char *backing = qmp_string(args, "backing");
    struct dr_disk *disk = NULL;
    if (!dr_fs_exists(files_of(live), node->path))
        return dr_fail(err, ENOENT, "Could not open '%s': No such file or directory", node->path);
    int r = open_node(live, node, &disk, err);
    if (is_write_refusal(r) && !node->read_only && qmp_bool(args, "auto-read-only", false)) {
        node->read_only = true;
        r = open_node(live, node, &disk, err);
    }
    if (r < 0)
        return r;
    node->size = dr_size(disk);
    node->has_parent = dr_chain_length(disk) > 1;
    if (backing)
        r = check_parent(live, disk, backing, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* ------------------------------------------------------------------ blockdev-add */

/* Copies of what the client said. */
static int fill_node(struct dr_live *live, json_t *args, struct live_node *node,
                     struct dr_error *err)
{
    json_t *file = json_object_get(args, "file");
    const char *driver = qmp_string(args, "driver"), *by_name = json_string_value(file);
    const char *filename = qmp_string(file ? file : args, "filename");
    const struct live_node *known = NULL;
    const struct live_disk *first = live_nth_disk(live, 0);
    if (by_name) {
        pthread_mutex_lock(&live->lock);
        known = live_find_node(live, by_name);
        pthread_mutex_unlock(&live->lock);
        if (!known)
            return dr_fail(err, ENOENT, "Cannot find device='%s' nor node-name='%s'", by_name,
                           by_name);
        if (!known->added || known->format)
            return dr_fail(err, EINVAL, "Node '%s' is an image, not the file of one", by_name);
    }
    node->added = true;
    node->read_only = qmp_bool(args, "read-only", known && known->read_only);
    node->flags = flags_of(args) | (json_is_object(file) ? flags_of(file) : 0) |
                  (known ? known->flags : 0);
    node->name = strdup(qmp_string(args, "node-name"));
    node->path = known   ? strdup(known->path)
                 : first ? live_full_path(first, filename)
                         : dr_absolute_path(filename);
    node->format = is_file_driver(driver) ? NULL : strdup(driver);
    node->file_node = known ? strdup(known->name) : NULL;
    if (node->name && node->path && (node->format || is_file_driver(driver)) &&
        (node->file_node || !known))
        return 0;
    return dr_fail(err, ENOMEM, "out of memory for a node");
}

/* The node of the file may have a name, too. It is made from the same description. */
static int name_file(struct dr_live *live, json_t *args, struct live_node *node,
                     struct live_node **file, struct dr_error *err)
{
    json_t *inner = json_object_get(args, "file");
    const char *name = json_is_object(inner) ? qmp_string(inner, "node-name") : NULL;
    if (!name)
        return 0;
    if (strcmp(name, node->name) == 0)
        return dr_fail(err, EEXIST, "Duplicate nodes with node-name='%s'", name);
    *file = calloc(1, sizeof(**file));
    int r = *file ? fill_node(live, inner, *file, err) : dr_fail(err, ENOMEM, "out of memory");
    if (r < 0)
        return r;
    (*file)->inner = true;
    node->file_node = strdup(name);
    return node->file_node ? 0 : dr_fail(err, ENOMEM, "out of memory");
}

static int check_name(struct dr_live *live, const struct live_node *node, struct dr_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    return node ? live_check_name(live, node->name, err) : 0;
}

static void link_node(struct dr_live *live, struct live_node *node)
{
    DR_LOCK_SCOPE(&live->lock);
    node->next = live->nodes;
    live->nodes = node;
}

static json_t *blockdev_add(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    if (check_description(args, err) < 0)
        return NULL;
    struct live_node *node = calloc(1, sizeof(*node)), *file = NULL;
    int r = node ? fill_node(live, args, node, &err->text)
                 : dr_fail(&err->text, ENOMEM, "out of memory for a node");
    if (r == 0)
        r = check_name(live, node, &err->text);
    if (r == 0)
        r = name_file(live, args, node, &file, &err->text);
    if (r == 0)
        r = check_name(live, file, &err->text);
    if (r == 0)
        r = pass_gate(live, node->path, &err->text);
    if (r == 0)
        r = try_node(live, node, args, &err->text);
    if (r < 0) {
        live_free_node(node);
        live_free_node(file);
        return NULL;
    }
    if (file) {
        file->size = node->size;
        link_node(live, file);
    }
    link_node(live, node);
    return json_object();
}

/* ------------------------------------------------------------------ a node as a disk */

static struct live_disk *disk_of(struct dr_live *live, const struct live_node *node)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_disk *d = live->disks;
    while (d && d->node != node)
        d = d->next;
    return d;
}

struct live_disk *live_node_disk(struct dr_live *live, struct live_node *node, struct dr_error *err)
{
    struct live_disk *d = disk_of(live, node), **end = &live->disks;
    struct dr_disk *disk = NULL;
    if (d || open_node(live, node, &disk, err) < 0)
        return d;
    d = live_make_disk(node->name, disk);
    if (!d) {
        dr_close(disk, NULL);
        dr_fail(err, ENOMEM, "%s: out of memory", node->name);
        return NULL;
    }
    d->node = node;
    DR_LOCK_SCOPE(&live->lock);
    while (*end)
        end = &(*end)->next;
    *end = d;
    return d;
}

/* A job that has concluded keeps its disk until it is dismissed. */
static int check_idle(struct dr_live *live, const struct live_disk *d, struct dr_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    if (live_is_exported(live, d))
        return dr_fail(err, EBUSY, "Node %s is in use", d->name);
    for (const struct live_job *job = live->jobs; job; job = job->next)
        if (job->on == d || live_archive_has(job->order.archive, d))
            return dr_fail(err, EBUSY, "Node '%s' is busy: block device is in use by block job: %s",
                           d->name, live_kind_name(job->order.kind));
    return 0;
}

static int close_node(struct dr_live *live, struct live_node *node, struct dr_error *err)
{
    struct live_disk *d = disk_of(live, node);
    int r = d ? check_idle(live, d, err) : 0;
    if (!d || r < 0)
        return r;
    live_jobs_reap(live);
    pthread_mutex_lock(&live->lock);
    struct live_disk **at = &live->disks;
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
    pthread_mutex_unlock(&live->lock);
    dr_memory_bitmaps_free(DR_STEAL(d->bitmaps));
    r = dr_close(d->disk, err);
    live_free_disk(d);
    return r;
}

/* ------------------------------------------------------------------ blockdev-del */

/* Does a disk, other than the node's own, have the image in its chain? */
static int check_chains(struct dr_live *live, const struct live_node *node, struct dr_error *err)
{
    const struct live_disk *on;
    int r = 0;
    for (size_t i = 0; r == 0 && (on = live_nth_disk(live, i)); i++) {
        struct dr_chain *chain = dr_disk_chain(on->disk);
        size_t k = on->node == node ? chain->n : dr_ops_member(chain, node->path);
        if (k == 0)
            r = dr_fail(err, EBUSY, "Node %s is in use", node->name);
        else if (k < chain->n) {
            DR_LOCK_SCOPE(&live->lock);
            r = dr_fail(err, EBUSY, "Node '%s' is busy: node is used as backing hd of '%s'",
                        node->name, live_node_of(live, chain->images[k - 1]->path));
        }
        dr_chain_unref(chain, NULL);
    }
    return r;
}

/* Is it the target of a job, or the file of another node? */
static int check_users(struct dr_live *live, const struct live_node *node, struct dr_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_job *job = live->jobs; node->format && job; job = job->next)
        if (job->order.target && job->status < LIVE_CONCLUDED &&
            strcmp(job->order.target, node->path) == 0)
            return dr_fail(err, EBUSY, "Node %s is in use", node->name);
    for (const struct live_node *n = live->nodes; n; n = n->next)
        if (n->file_node && strcmp(n->file_node, node->name) == 0)
            return dr_fail(err, EBUSY, "Block device %s is in use", node->name);
    return 0;
}

int live_node_let_go(struct dr_live *live, struct live_node *node, struct dr_error *err)
{
    int r = check_users(live, node, err);
    if (r == 0 && (!node->added || node->format))
        r = check_chains(live, node, err);
    return r < 0 ? r : close_node(live, node, err);
}

struct live_node *qmp_free_node(struct dr_live *live, const char *name, struct qmp_error *err)
{
    pthread_mutex_lock(&live->lock);
    struct live_node *node = live_find_node(live, name);
    pthread_mutex_unlock(&live->lock);
    if (!node)
        qmp_fail(err, NULL, "Cannot find device='%s' nor node-name='%s'", name, name);
    else if (!node->added)
        qmp_fail(err, NULL, "Node '%s' is not one that blockdev-add named", name);
    else
        return node;
    return NULL;
}

static void unlink_node(struct dr_live *live, struct live_node *node)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_node *file = node->file_node ? live_find_node(live, node->file_node) : NULL;
    for (struct live_node **at = &live->nodes; *at;)
        if (*at == node || (*at == file && file->inner))
            *at = (*at)->next;
        else
            at = &(*at)->next;
    if (file && file->inner)
        live_free_node(file);
    live_free_node(node);
}

static json_t *blockdev_del(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *name = qmp_string(args, "node-name");
    pthread_mutex_lock(&live->lock);
    struct live_node *node = live_find_node(live, name);
    pthread_mutex_unlock(&live->lock);
    if (!node)
        return qmp_fail(err, NULL, "Failed to find node with node-name='%s'", name);
    if (node->inner)
        return qmp_fail(err, NULL, "Node %s is not owned by the monitor", name);
    int r = live_node_let_go(live, node, &err->text);
    if (r == 0)
        unlink_node(live, node);
    return qmp_done(r);
}

/* ------------------------------------------------------------------ the table */

const struct qmp_command qmp_node_commands[] = {
    {"blockdev-add", blockdev_add, {{"*", 0, false}}},
    {"blockdev-del", blockdev_del, {{"node-name", 's', true}}},
    {0},
};
