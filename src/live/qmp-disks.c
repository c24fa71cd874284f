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

/* ------------------------------------------------------------------ snapshots */

struct shot {
    struct dr_overlay overlay;
    char *path;
    const char *node; /* what the client calls the new image; or NULL */
    struct live_disk *on;
};

/* As QEMU does, a new overlay is a qcow2 unless a format is said; but a disk whose format has
 * snapshots of its own kind goes on with that. */
static const char *default_format(const struct live_disk *on)
{
    const struct dr_format *fmt = dr_format_find(dr_image_format(on->disk, 0));
    return fmt && fmt->flags & DR_FORMAT_BACKING ? fmt->name : "qcow2";
}

static int check_node(struct dr_live *live, const char *node, struct qmp_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    return node ? live_check_name(live, node, &err->text) : 0;
}

static int out_of_memory(struct qmp_error *err)
{
    return dr_fail(&err->text, ENOMEM, "out of memory");
}

static int read_shot(struct dr_live *live, json_t *args, struct shot *shot, struct qmp_error *err)
{
    const char *mode = qmp_string(args, "mode"), *format = qmp_string(args, "format");
    shot->on = qmp_device(live, args, err);
    shot->node = qmp_string(args, "snapshot-node-name");
    if (!shot->on)
        return -ENOENT;
    if (mode && strcmp(mode, "absolute-paths") != 0) {
        qmp_fail(err, NULL, "Parameter 'mode' does not accept value '%s': a snapshot is a new file",
                 mode);
        return -EINVAL;
    }
    if (check_node(live, shot->node, err) < 0)
        return -EINVAL;
    shot->path = live_full_path(shot->on, qmp_string(args, "snapshot-file"));
    if (!shot->path)
        return out_of_memory(err);
    shot->overlay = (struct dr_overlay){
        .disk = shot->on->disk,
        .path = shot->path,
        .format = format ? format : default_format(shot->on),
        .open = {.allow_paths = (const char *const *)live->allow},
    };
    return live_gate(live, shot->on, shot->overlay.path, &err->text);
}

/* Is the node open as the disk of one of these shots? */
static bool is_shot(const struct live_node *node, const struct shot *shots, size_t n)
{
    bool is = false;
    for (size_t i = 0; i < n; i++)
        is |= shots[i].on->node == node;
    return is;
}

/* A snapshot whose image is there. It is opened by the operation that makes it the active one, so
 * it must not be open as the disk of a shot: of shots[n], which is read here, or of one before. */
static int read_overlay(struct dr_live *live, json_t *args, struct shot *shots, size_t n,
                        struct qmp_error *err)
{
    struct shot *shot = &shots[n];
    const char *name = qmp_string(args, "overlay");
    shot->on = qmp_node_device(live, args, err);
    struct live_node *node = shot->on ? qmp_free_node(live, name, err) : NULL;
    const struct dr_format *fmt = node && node->format ? dr_format_find(node->format) : NULL;
    if (!node)
        return -ENOENT;
    if (!fmt || !(fmt->flags & DR_FORMAT_BACKING))
        qmp_fail(err, NULL, "The overlay does not support backing images");
    else if (node->has_parent)
        qmp_fail(err, NULL, "The overlay already has a backing image");
    else if (node->read_only)
        qmp_fail(err, NULL, "Block node is read-only");
    else if (is_shot(node, shots, n + 1))
        qmp_fail(err, NULL, "The overlay is already in use");
    if (err->text.text[0])
        return -EINVAL;
    int r = live_gate(live, shot->on, node->path, &err->text);
    if (r == 0)
        r = live_node_let_go(live, node, &err->text);
    if (r < 0)
        return r;
    shot->path = strdup(node->path);
    shot->overlay = (struct dr_overlay){
        .disk = shot->on->disk,
        .path = shot->path,
        .existing = true,
        .format = node->format,
        .open = {.allow_paths = (const char *const *)live->allow,
                 .flags = node->flags & ~(unsigned)DR_OPEN_NO_BACKING},
    };
    return shot->path ? 0 : out_of_memory(err);
}

static int record(void *user, const struct dr_switch *switches, size_t n, struct dr_error *err)
{
    return live_record(user, switches, n, err);
}

/* With the names of what is made in the state, should the server be killed meanwhile. */
static int make_shots(struct dr_live *live, struct dr_overlay *overlays, size_t n,
                      struct dr_job *job, struct dr_error *err)
{
    CLEANUP_FREE const char **fresh = calloc(n, sizeof(*fresh));
    size_t n_fresh = 0;
    if (!fresh)
        return dr_fail(err, ENOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) /* what is there already is somebody else's */
        if (!overlays[i].existing && !dr_fs_exists(overlays[i].disk->fs, overlays[i].path))
            fresh[n_fresh++] = overlays[i].path;
    int r = live_making(live, fresh, n_fresh, true, err);
    if (r == 0)
        r = dr_disks_snapshot(overlays, n, job, err);
    live_making(live, fresh, n_fresh, false, NULL);
    return r;
}

static json_t *take_shots(struct dr_live *live, struct shot *shots, size_t n, struct qmp_error *err)
{
    CLEANUP_FREE struct dr_overlay *overlays = calloc(n, sizeof(*overlays));
    if (!overlays)
        return qmp_fail(err, NULL, "out of memory");
    for (size_t i = 0; i < n; i++)
        overlays[i] = shots[i].overlay;
    const struct dr_job_options options = {.record = record, .user = live};
    struct dr_job *job = NULL;
    int r = dr_job_new(NULL, &options, &job, &err->text);
    for (size_t i = 0; i < n && r == 0 && live->write_back; i++)
        if (!shots[i].on->node)
            live->write_back(live->user, shots[i].on->name);
    if (r == 0)
        r = make_shots(live, overlays, n, job, &err->text);
    dr_job_free(job);
    for (size_t i = 0; i < n; i++)
        live_tell_size(live, shots[i].on);
    DR_LOCK_SCOPE(&live->lock);
    for (size_t i = 0; i < n; i++) {
        if (overlays[i].active && shots[i].node) /* also where the old image could not be frozen */
            live_name_node(live, shots[i].node, overlays[i].active, NULL);
        free(overlays[i].active);
    }
    return qmp_done(r);
}

#define SNAPSHOT_ARGS                                                                \
    {"device", 's', false}, {"node-name", 's', false}, {"snapshot-file", 's', true}, \
        {"snapshot-node-name", 's', false}, {"format", 's', false},                  \
    {                                                                                \
        "mode", 's', false                                                           \
    }

static json_t *snapshot_sync(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct shot shot = {0};
    int r = read_shot(live, args, &shot, err);
    json_t *result = r < 0 ? NULL : take_shots(live, &shot, 1, err);
    free(shot.path);
    return result;
}

#define OVERLAY_ARGS         \
    {"node", 's', true},     \
    {                        \
        "overlay", 's', true \
    }

static json_t *snapshot_overlay(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct shot shot = {0};
    int r = read_overlay(live, args, &shot, 0, err);
    json_t *result = r < 0 ? NULL : take_shots(live, &shot, 1, err);
    free(shot.path);
    return result;
}

/* Other things that QEMU's transactions hold: refused by name. */
static bool is_other_action(const char *type)
{
    static const char *const others[] = {"block-dirty-bitmap-add",
                                         "block-dirty-bitmap-clear",
                                         "block-dirty-bitmap-disable",
                                         "block-dirty-bitmap-enable",
                                         "block-dirty-bitmap-merge",
                                         "block-dirty-bitmap-remove",
                                         "blockdev-backup",
                                         "blockdev-snapshot-internal-sync",
                                         "drive-backup"};
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (strcmp(type, others[i]) == 0)
            return true;
    return false;
}

static int read_action(struct dr_live *live, json_t *action, size_t i, struct shot *shots,
                       struct qmp_error *err)
{
    static const struct qmp_arg table[] = {{"type", 's', true}, {"data", 'o', true}, {0}};
    static const struct qmp_arg snapshot_args[] = {SNAPSHOT_ARGS, {0}};
    static const struct qmp_arg overlay_args[] = {OVERLAY_ARGS, {0}};
    char where[40];
    snprintf(where, sizeof(where), "actions[%zu]", i);
    if (!json_is_object(action)) {
        qmp_fail(err, NULL, "Invalid parameter type for '%s', expected: object", where);
        return -EINVAL;
    }
    snprintf(where, sizeof(where), "actions[%zu].", i);
    int r = qmp_check_args(table, where, action, err);
    if (r < 0)
        return r;
    const char *type = qmp_string(action, "type");
    json_t *data = json_object_get(action, "data");
    if (strcmp(type, "abort") == 0) {
        qmp_fail(err, NULL, "Transaction aborted using Abort action");
        return -EINVAL;
    }
    bool overlay = strcmp(type, "blockdev-snapshot") == 0;
    if (!overlay && strcmp(type, "blockdev-snapshot-sync") != 0) {
        qmp_fail(err, NULL, "Parameter 'type' does not accept value '%s'%s", type,
                 is_other_action(type) ? ": a transaction is of blockdev-snapshot and "
                                         "blockdev-snapshot-sync here"
                                       : "");
        return -EINVAL;
    }
    snprintf(where, sizeof(where), "actions[%zu].data.", i);
    r = qmp_check_args(overlay ? overlay_args : snapshot_args, where, data, err);
    if (r < 0)
        return r;
    return overlay ? read_overlay(live, data, shots, i, err)
                   : read_shot(live, data, &shots[i], err);
}

static json_t *transaction(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *actions = json_object_get(args, "actions");
    size_t n = json_array_size(actions);
    CLEANUP_FREE struct shot *shots = calloc(n + 1, sizeof(*shots));
    int r = 0;
    if (!shots)
        return qmp_fail(err, NULL, "out of memory");
    for (size_t i = 0; r == 0 && i < n; i++)
        r = read_action(live, json_array_get(actions, i), i, shots, err);
    json_t *result = r < 0 ? NULL : n == 0 ? json_object() : take_shots(live, shots, n, err);
    for (size_t i = 0; i < n; i++)
        free(shots[i].path);
    return result;
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
    {"blockdev-snapshot-sync", snapshot_sync, {SNAPSHOT_ARGS}},
    {"blockdev-snapshot", snapshot_overlay, {OVERLAY_ARGS}},
    {"transaction", transaction, {{"actions", 'l', true}}},
    {"block_resize",
     resize,
     {{"device", 's', false}, {"node-name", 's', false}, {"size", 'n', true}}},
    {"change-backing-file",
     change_backing,
     {{"device", 's', true}, {"image-node-name", 's', true}, {"backing-file", 's', true}}},
    {0},
};
