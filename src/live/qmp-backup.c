/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Backups into images that are there, as QEMU makes them: the instant is that of the command, and
 * the job copies. Texts are QEMU's. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

struct plan {
    struct dr_live *live;
    struct live_disk *on;
    json_t *args;
    struct dr_point_order order;
    struct live_order job; /* its target, format and spill are the order's, too */
};

static bool is(const char *word, const char *other)
{
    return word && strcmp(word, other) == 0;
}

static int refuse_value(const char *name, const char *value, struct qmp_error *err)
{
    qmp_fail(err, NULL, "Parameter '%s' does not accept value '%s'", name, value);
    return -EINVAL;
}

/* ------------------------------------------------------------------ what is copied */

static int read_sync(struct plan *p, struct qmp_error *err)
{
    static const char *const syncs[] = {"full", "top", "none", "bitmap"};
    static const char *const modes[] = {"never", "on-success", "always"};
    const char *sync = qmp_string(p->args, "sync"), *mode = qmp_string(p->args, "bitmap-mode");
    size_t s = is(sync, "incremental") ? DR_POINT_BITMAP : 0, m = 0;
    while (s < 4 && !is(sync, "incremental") && !is(sync, syncs[s]))
        s++;
    while (mode && m < 3 && !is(mode, modes[m]))
        m++;
    if (s == 4)
        return refuse_value("sync", sync, err);
    if (m == 3)
        return refuse_value("bitmap-mode", mode, err);
    p->order.sync = (enum dr_point_sync)s;
    p->order.mode = (enum dr_point_mode)m;
    if (is(sync, "incremental"))
        p->order.mode = DR_POINT_ON_SUCCESS;
    return 0;
}

/* As QEMU does, before "incremental" becomes "bitmap". */
static int check_modes(const struct plan *p, struct qmp_error *err)
{
    const char *sync = qmp_string(p->args, "sync"), *mode = qmp_string(p->args, "bitmap-mode");
    const char *bitmap = qmp_string(p->args, "bitmap");
    if (p->order.sync == DR_POINT_BITMAP && !bitmap)
        qmp_fail(err, NULL, "must provide a valid bitmap name for '%s' sync mode", sync);
    else if (is(sync, "incremental") && mode && !is(mode, "on-success"))
        qmp_fail(err, NULL, "Bitmap sync mode must be 'on-success' when using sync mode '%s'",
                 sync);
    else if (!bitmap && mode)
        qmp_fail(err, NULL, "Cannot specify bitmap sync mode without a bitmap");
    else if (qmp_bool(p->args, "compress", false))
        qmp_fail(err, NULL,
                 "Compression is not supported for this drive %s: copy the backup with "
                 "`drover convert -c`",
                 p->on->name);
    else
        return 0;
    return -EINVAL;
}

static int read_bitmap(struct plan *p, struct qmp_error *err)
{
    const char *sync = qmp_string(p->args, "sync"), *mode = qmp_string(p->args, "bitmap-mode");
    const char *name = p->order.bitmap = qmp_string(p->args, "bitmap");
    struct live_bitmap b;
    if (!name)
        return 0;
    int r = live_find_bitmap(p->live, p->on, name, &b, err);
    if (r < 0)
        return r;
    p->order.stored = b.stored;
    p->order.memory = p->on->bitmaps;
    if (!b.found)
        qmp_fail(err, NULL, "Bitmap '%s' could not be found", name);
    else if (!mode && !is(sync, "incremental"))
        qmp_fail(err, NULL, "Bitmap sync mode must be given when providing a bitmap");
    else if (live_check_bitmap(p->on, name, &b, false, err) < 0)
        return -EINVAL;
    else if (p->order.sync == DR_POINT_NONE)
        qmp_fail(err, NULL, "sync mode '%s' does not produce meaningful bitmap outputs", sync);
    else if (p->order.mode == DR_POINT_NEVER && p->order.sync != DR_POINT_BITMAP)
        qmp_fail(err, NULL,
                 "Bitmap sync mode '%s' has no meaningful effect when combined with sync mode '%s'",
                 mode, sync);
    else
        return p->order.mode == DR_POINT_NEVER ? 0 : live_check_bitmap(p->on, name, &b, true, err);
    return -EINVAL;
}

/* ------------------------------------------------------------------ where it goes */

static int out_of_memory(struct qmp_error *err)
{
    return dr_fail(&err->text, ENOMEM, "out of memory");
}

static int keep_target(struct plan *p, char *path, const char *format, struct qmp_error *err)
{
    p->job.target = path;
    p->job.format = strdup(format);
    return p->job.target && p->job.format ? 0 : out_of_memory(err);
}

/* The job opens the target by its path. */
static int node_target(struct plan *p, struct qmp_error *err)
{
    const char *name = qmp_string(p->args, "target");
    pthread_mutex_lock(&p->live->lock);
    bool same = live_find_device(p->live, name) == p->on;
    pthread_mutex_unlock(&p->live->lock);
    if (same) {
        qmp_fail(err, NULL, "Source and target cannot be the same");
        return -EINVAL;
    }
    struct live_node *node = qmp_free_node(p->live, name, err);
    if (node && node->read_only)
        qmp_fail(err, NULL, "Block node is read-only");
    if (!node || node->read_only || live_gate(p->live, p->on, node->path, &err->text) < 0)
        return -EINVAL;
    if (node->size != dr_size(p->on->disk)) {
        qmp_fail(err, NULL, "Source and target image have different sizes");
        return -EINVAL;
    }
    p->order.open.flags = node->flags & ~(unsigned)DR_OPEN_NO_BACKING;
    return keep_target(p, strdup(node->path), node->format ? node->format : "raw", err);
}

static int free_target(struct plan *p, struct qmp_error *err)
{
    struct live_node *node = qmp_free_node(p->live, qmp_string(p->args, "target"), err);
    return node ? live_node_let_go(p->live, node, &err->text) : -EINVAL;
}

static int file_target(struct plan *p, struct qmp_error *err)
{
    const char *mode = qmp_string(p->args, "mode"), *format = qmp_string(p->args, "format");
    char *path = qmp_gated_path(p->live, p->on, qmp_string(p->args, "target"), err);
    const struct dr_format *found = NULL;
    int r = path ? 0 : -EINVAL;
    p->order.made = !is(mode, "existing");
    if (r == 0 && mode && p->order.made && !is(mode, "absolute-paths"))
        r = refuse_value("mode", mode, err);
    if (r == 0 && p->order.made && p->order.sync == DR_POINT_NONE) {
        qmp_fail(err, NULL, "Sync mode 'none' needs mode 'existing'");
        r = -EINVAL;
    }
    if (r == 0 && !p->order.made && !format)
        r = dr_probe(p->on->disk->fs, path, 0, &found, &err->text);
    if (r == 0)
        return keep_target(p, path, format ? format : found ? found->name : "qcow2", err);
    free(path);
    return r;
}

/* ------------------------------------------------------------------ beginning */

static int check_job(const struct plan *p, struct qmp_error *err)
{
    const char *id = qmp_string(p->args, "job-id");
    DR_LOCK_SCOPE(&p->live->lock);
    const struct live_job *other = live_job_on(p->live, p->on);
    if (other)
        return dr_fail(&err->text, EBUSY,
                       "Node '%s' is busy: block device is in use by block job: %s", p->on->name,
                       live_kind_name(other->order.kind));
    if (live_job_find(p->live, id ? id : p->on->name))
        return dr_fail(&err->text, EEXIST, "Job ID '%s' already in use", id ? id : p->on->name);
    return 0;
}

/* All that can be refused, without changing anything. */
static int read_plan(struct plan *p, bool node, struct qmp_error *err)
{
    p->job.kind = LIVE_BACKUP;
    int r = read_sync(p, err);
    if (r < 0)
        return r;
    p->on = qmp_root_device(p->live, p->args, err);
    r = !p->on ? -ENOENT : node ? node_target(p, err) : file_target(p, err);
    if (r == 0)
        r = check_modes(p, err);
    if (r == 0)
        r = read_bitmap(p, err);
    if (r == 0)
        r = qmp_spill(p->live, p->on, p->args, &p->job, err);
    return r < 0 ? r : check_job(p, err);
}

/* The target, open, and the disk claimed: then comes the instant. */
static int prepare(struct plan *p, bool node, struct qmp_error *err)
{
    int r = node ? free_target(p, err) : 0;
    if (r < 0)
        return r;
    p->order.disk = p->on->disk;
    p->order.target = p->job.target;
    p->order.format = p->job.format;
    p->order.open.allow_paths = (const char *const *)p->live->allow;
    p->order.spill = live_spill(&p->job);
    if (p->live->write_back && !p->on->node)
        p->live->write_back(p->live->user, p->on->name);
    return dr_point_begin(&p->job.point, &p->order, &err->text);
}

/* Ends the plan in each case. */
static json_t *begin_job(struct plan *p, struct qmp_error *err)
{
    struct dr_point *point = p->job.point;
    json_t *result = qmp_begin_job(p->live, p->on, p->args, &p->job, NULL, err);
    if (!result)
        dr_point_free(point);
    return result;
}

static json_t *back_up(struct dr_live *live, json_t *args, bool node, struct qmp_error *err)
{
    struct plan p = {.live = live, .args = args};
    int r = read_plan(&p, node, err);
    if (r == 0)
        r = prepare(&p, node, err);
    if (r == 0)
        r = dr_point_now(p.job.point, &err->text);
    if (r == 0)
        return begin_job(&p, err);
    dr_point_free(p.job.point);
    live_order_clear(&p.job);
    return NULL;
}

/* The bitmap is in use for the actions that follow. */
static int plan_bitmap(const struct plan *p, struct qmp_error *err)
{
    struct live_bitmap b;
    const char *name = p->order.bitmap;
    int r = name ? live_find_bitmap(p->live, p->on, name, &b, err) : 0;
    if (r < 0 || !name)
        return r;
    pthread_mutex_lock(&p->live->lock);
    CLEANUP_FREE char *image = strdup(p->on->path);
    pthread_mutex_unlock(&p->live->lock);
    b.busy = true;
    return image ? live_plan_bitmap(p->live, image, name, &b, err) : out_of_memory(err);
}

int live_ready_backup(struct dr_live *live, json_t *args, bool node, bool late,
                      struct live_ready *ready, struct qmp_error *err)
{
    struct plan p = {.live = live, .args = args, .order.late = late};
    int r = read_plan(&p, node, err);
    if (r == 0)
        r = plan_bitmap(&p, err);
    if (r == 0)
        r = prepare(&p, node, err);
    struct dr_point *point = p.job.point;
    ready->on = p.on;
    json_t *begun = r == 0 ? qmp_begin_job(live, p.on, args, &p.job, &ready->job, err) : NULL;
    r = r == 0 && !begun ? -EINVAL : r;
    json_decref(begun);
    if (r == 0)
        ready->point = point;
    else
        dr_point_free(point);
    live_order_clear(&p.job);
    return r;
}

static json_t *blockdev_backup(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    return back_up(live, args, true, err);
}

bool qmp_is_point_backup(json_t *args)
{
    const char *sync = qmp_string(args, "sync");
    if (qmp_string(args, "x-set") || qmp_string(args, "x-bitmap"))
        return false;
    return !is(sync, "full") || qmp_string(args, "bitmap") || qmp_string(args, "bitmap-mode") ||
           is(qmp_string(args, "mode"), "existing") || qmp_bool(args, "compress", false);
}

json_t *qmp_drive_backup(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    return back_up(live, args, false, err);
}

const struct qmp_command qmp_backup_commands[] = {
    {"blockdev-backup",
     blockdev_backup,
     {{"job-id", 's', false},
      {"device", 's', true},
      {"sync", 's', true},
      {"speed", 'n', false},
      {"bitmap", 's', false},
      {"bitmap-mode", 's', false},
      {"compress", 'b', false},
      {"on-source-error", 's', false},
      {"on-target-error", 's', false},
      {"auto-finalize", 'b', false},
      {"auto-dismiss", 'b', false},
      {"filter-node-name", 's', false},
      {"x-spill", 's', false},
      {"x-spill-size", 'n', false},
      {"x-when-full", 's', false},
      {"x-hurry", 'b', false},
      {"target", 's', true}}},
    {0},
};
