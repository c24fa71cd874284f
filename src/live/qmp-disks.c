/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands that ask about disks, or change them at once: snapshots, sizes, names of parents. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/absolute.h"
#include "base/json.h"
#include "live/live.h"
#include "ops/ops-internal.h"

int live_gate(struct dr_live *live, const struct live_disk *on, const char *path,
              struct dr_error *err)
{
    const struct dr_open_options open = {.allow_paths = (const char *const *)live->allow};
    struct dr_chain *chain = dr_disk_chain(on->disk);
    int r = dr_gate_check_new(on->disk->fs, chain->images[0]->path, path, &open, err);
    dr_chain_unref(chain, NULL);
    return r;
}

/* The name of a file as a client gave it, malloc'ed. It goes into the state, so it must mean the
 * same to a server that is begun in another directory. */
char *live_full_path(const struct live_disk *on, const char *path)
{
    return on->disk->fs == dr_fs_posix() ? dr_absolute_path(path) : strdup(path);
}

/* ------------------------------------------------------------------ asking */

struct node_view {
    const char *name, *path, *format, *parent, *parent_format;
    bool read_only;
    int depth; /* images below it */
    unsigned flags;
    uint64_t size;
};

/* QEMU has counters and limits that stay 0 here. */
static json_t *show_node(const struct node_view *v)
{
    static const char *const limits[] = {"bps",     "bps_rd",  "bps_wr",         "iops",
                                         "iops_rd", "iops_wr", "write_threshold"};
    json_t *node = json_pack(
        "{s:s, s:o, s:s, s:b, s:b, s:s, s:i, s:{s:b, s:b, s:b}, s:{s:o, s:s, s:I, s:b}}",
        "node-name", v->name, "file", dr_json_text(v->path), "drv", v->format, "ro", v->read_only,
        "encrypted", 0, "detect_zeroes", "off", "backing_file_depth", v->depth, "cache",
        "writeback", 1, "direct", (v->flags & DR_OPEN_DIRECT) != 0, "no-flush",
        (v->flags & DR_OPEN_NO_FLUSH) != 0, "image", "filename", dr_json_text(v->path), "format",
        v->format, "virtual-size", (json_int_t)v->size, "dirty-flag", 0);
    for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++)
        json_object_set_new(node, limits[i], json_integer(0));
    if (v->parent) {
        json_t *image = json_object_get(node, "image");
        json_object_set_new(node, "backing_file", dr_json_text(v->parent));
        json_object_set_new(image, "full-backing-filename", dr_json_text(v->parent));
        json_object_set_new(image, "backing-filename-format", json_string(v->parent_format));
    }
    return node;
}

/* Inside the disk's gate: a job may be about to give the image another parent, or size. */
static json_t *show_image(struct dr_live *live, const struct live_disk *on,
                          const struct dr_chain *chain, size_t i)
{
    const struct dr_image *image = chain->images[i];
    const struct dr_image *parent = i + 1 < chain->n ? chain->images[i + 1] : NULL;
    json_t *bitmaps = live_show_bitmaps(live, on, chain->images[i]);
    DR_LOCK_SCOPE(&live->lock);
    const struct node_view view = {
        .name = live_node_of(live, image->path),
        .path = image->path,
        .format = image->fmt->name,
        .parent = parent ? parent->path : NULL,
        .parent_format = parent ? parent->fmt->name : NULL,
        .read_only = !image->writable,
        .depth = (int)(chain->n - i - 1),
        .flags = on->disk->flags,
        .size = image->size,
    };
    json_t *shown = show_node(&view);
    if (image->backing_name)
        json_object_set_new(json_object_get(shown, "image"), "backing-filename",
                            dr_json_text(image->backing_name));
    if (bitmaps)
        json_object_set_new(shown, "dirty-bitmaps", bitmaps);
    return shown;
}

static bool is_shown(const json_t *all, const char *name)
{
    const json_t *one;
    size_t i;
    json_array_foreach(all, i, one)
    {
        const char *shown = json_string_value(json_object_get(one, "node-name"));
        if (shown && strcmp(shown, name) == 0)
            return true;
    }
    return false;
}

/* Nodes that blockdev-add named and no disk has. */
static void show_added(struct dr_live *live, json_t *all)
{
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_node *n = live->nodes; n; n = n->next) {
        const struct node_view view = {
            .name = n->name,
            .path = n->path,
            .format = n->format ? n->format : "file",
            .read_only = n->read_only,
            .depth = n->has_parent,
            .flags = n->flags,
            .size = n->size,
        };
        if (n->added && !is_shown(all, n->name))
            json_array_append_new(all, show_node(&view));
    }
}

/* Names that were made up for images that no disk has any more. */
static void forget_unseen(struct dr_live *live, const json_t *all)
{
    DR_LOCK_SCOPE(&live->lock);
    for (struct live_node **at = &live->nodes, *n; (n = *at);) {
        if (n->added || n->name[0] != '#' || is_shown(all, n->name)) {
            at = &n->next;
            continue;
        }
        *at = n->next;
        live_free_node(n);
    }
}

static json_t *query_nodes(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    const struct live_disk *on;
    (void)args, (void)err;
    for (size_t n = 0; (on = live_nth_disk(live, n)); n++) {
        struct dr_pass pass;
        const struct dr_chain *chain = dr_disk_enter(on->disk, &pass);
        for (size_t i = 0; i < chain->n; i++)
            json_array_append_new(all, show_image(live, on, chain, i));
        dr_disk_leave(on->disk, &pass);
    }
    show_added(live, all);
    forget_unseen(live, all);
    return all;
}

static const char *io_status(const struct live_disk *on)
{
    return live_io_status(on->stall ? live_stall_error(on->stall) : 0);
}

static json_t *query_block(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    const struct live_disk *on;
    (void)args, (void)err;
    for (size_t n = 0; (on = live_nth_disk(live, n)); n++) {
        if (on->node)
            continue; /* a node, but no device */
        const char *status = io_status(on);
        struct dr_pass pass;
        const struct dr_chain *chain = dr_disk_enter(on->disk, &pass);
        json_array_append_new(all,
                              json_pack("{s:s, s:s, s:b, s:b, s:s, s:o}", "device", on->name,
                                        "type", "unknown", "removable", 0, "locked", 0, "io-status",
                                        status, "inserted", show_image(live, on, chain, 0)));
        dr_disk_leave(on->disk, &pass);
    }
    return all;
}

/* Guests whose requests wait go on. In QEMU this is said to a machine. */
static json_t *cont(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    (void)args, (void)err;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_disk *on = live->disks; on; on = on->next)
        if (on->stall)
            dr_stall_resume(on->stall);
    return json_object();
}

/* ------------------------------------------------------------------ other changes */

static json_t *resize(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_disk *on = qmp_device(live, args, err);
    if (!on)
        return NULL;
    int r = dr_truncate(on->disk, qmp_number(args, "size"), &err->text);
    live_tell_size(live, on);
    return qmp_done(r);
}

/* The path of the node's image, malloc'ed. A failure unless it is in the disk's chain and has a
 * parent there or by name. */
static int find_image(struct dr_live *live, const struct live_disk *on, const char *node,
                      char **path, struct qmp_error *err)
{
    pthread_mutex_lock(&live->lock);
    const char *its = live_node_path(live, node);
    *path = its ? strdup(its) : NULL;
    pthread_mutex_unlock(&live->lock);
    if (!*path) {
        qmp_fail(err, NULL, "Cannot find device='' nor node-name='%s'", node);
        return -ENOENT;
    }
    struct dr_pass pass;
    const struct dr_chain *chain = dr_disk_enter(on->disk, &pass);
    size_t k = dr_ops_member(chain, *path), n = chain->n;
    bool has_parent = k + 1 < n || (k < n && chain->images[k]->backing_name);
    dr_disk_leave(on->disk, &pass);
    if (k < n && has_parent)
        return 0;
    if (k == n)
        qmp_fail(err, NULL, "'%s' and image file are not in the same chain", on->name);
    else
        qmp_fail(err, NULL, "not allowing backing file change on an image without a backing file");
    return -EINVAL;
}

/* The format of the image's parent, in whose place the new one comes. */
static char *parent_format(const struct live_disk *on, const char *path)
{
    struct dr_chain *chain = dr_disk_chain(on->disk);
    size_t k = dr_ops_member(chain, path);
    char *format = k + 1 < chain->n ? strdup(chain->images[k + 1]->fmt->name) : NULL;
    dr_chain_unref(chain, NULL);
    return format;
}

/* Write another parent's name into an image of the chain. The client vouches that this parent reads
 * the same; nothing is compared. */
static json_t *change_backing(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const struct live_disk *on = qmp_root_device(live, args, err);
    CLEANUP_FREE char *path = NULL;
    if (!on || find_image(live, on, qmp_string(args, "image-node-name"), &path, err) < 0)
        return NULL;
    CLEANUP_FREE char *format = parent_format(on, path);
    const struct dr_rebase_options rebase = {
        .open = {.allow_paths = (const char *const *)live->allow},
        .image = path,
        .backing = qmp_string(args, "backing-file"),
        .backing_format = format,
        .unsafe = true,
    };
    return qmp_done(dr_disk_rebase(on->disk, &rebase, NULL, &err->text));
}

/* ------------------------------------------------------------------ the table */

const struct qmp_command qmp_disk_commands[] = {
    {"query-named-block-nodes", query_nodes, {{"flat", 'b', false}}},
    {"query-block", query_block, {{0}}},
    {"cont", cont, {{0}}},
    {"block_resize",
     resize,
     {{"device", 's', false}, {"node-name", 's', false}, {"size", 'n', true}}},
    {"change-backing-file",
     change_backing,
     {{"device", 's', true}, {"image-node-name", 's', true}, {"backing-file", 's', true}}},
    {0},
};
