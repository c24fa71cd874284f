/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands that have disks go on with a new image over the one they have. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

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

int live_read_shot(struct dr_live *live, json_t *args, struct live_shot *shot,
                   struct qmp_error *err)
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
static bool is_shot(const struct live_node *node, const struct live_shot *shots, size_t n)
{
    bool is = false;
    for (size_t i = 0; i < n; i++)
        is |= shots[i].on->node == node;
    return is;
}

/* A snapshot whose image is there. It is opened by the operation that makes it the active one, so
 * it must not be open as the disk of a shot: of shots[n], which is read here, or of one before. */
int live_read_overlay(struct dr_live *live, json_t *args, struct live_shot *shots, size_t n,
                      struct qmp_error *err)
{
    struct live_shot *shot = &shots[n];
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

json_t *live_take_shots(struct dr_live *live, struct live_shot *shots, size_t n,
                        struct qmp_error *err)
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
    struct live_shot shot = {0};
    int r = live_read_shot(live, args, &shot, err);
    json_t *result = r < 0 ? NULL : live_take_shots(live, &shot, 1, err);
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
    struct live_shot shot = {0};
    int r = live_read_overlay(live, args, &shot, 0, err);
    json_t *result = r < 0 ? NULL : live_take_shots(live, &shot, 1, err);
    free(shot.path);
    return result;
}

/* ------------------------------------------------------------------ the table */

const struct qmp_arg qmp_snapshot_args[] = {SNAPSHOT_ARGS, {0}};
const struct qmp_arg qmp_overlay_args[] = {OVERLAY_ARGS, {0}};

const struct qmp_command qmp_snapshot_commands[] = {
    {"blockdev-snapshot-sync", snapshot_sync, {SNAPSHOT_ARGS}},
    {"blockdev-snapshot", snapshot_overlay, {OVERLAY_ARGS}},
    {0},
};
