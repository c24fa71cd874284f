/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands that begin jobs, ask about them or speak to them. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "live/live.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ beginning */

/* A name of a file, malloc'ed, for the node that a client means. */
static char *node_file(struct dr_live *live, const char *node)
{
    DR_LOCK_SCOPE(&live->lock);
    const struct live_disk *on = live_find_disk(live, node);
    const char *path = live_node_path(live, node);
    return path ? strdup(path) : on ? strdup(on->path) : NULL;
}

int qmp_chain_path(struct dr_live *live, const struct live_disk *on, const char *node,
                   const char *file, char **path, struct qmp_error *err)
{
    CLEANUP_FREE char *by_node = node ? node_file(live, node) : NULL;
    const char *name = node ? by_node : file;
    *path = NULL;
    if (!node && !file)
        return 0;
    struct dr_chain *chain = dr_disk_chain(on->disk);
    size_t k = name ? dr_ops_member(chain, name) : chain->n;
    if (k < chain->n)
        *path = strdup(chain->images[k]->path);
    else if (!name)
        qmp_fail(err, NULL, "Cannot find device='' nor node-name='%s'", node);
    else if (node)
        qmp_fail(err, NULL, "Node '%s' is not a backing image of '%s'", node, on->name);
    else
        qmp_fail(err, NULL, "Can't find '%s' in the backing chain", file);
    dr_chain_unref(chain, NULL);
    return *path ? 0 : -EINVAL;
}

static int read_policies(json_t *args, struct live_order *order, struct qmp_error *err)
{
    static const char *const names[] = {"on-error", "on-source-error", "on-target-error"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        const char *name = qmp_string(args, names[i]);
        enum live_on_error policy;
        if (!name)
            continue;
        if (live_on_error_parse(name, &policy) < 0) {
            qmp_fail(err, NULL, "Parameter '%s' does not accept value '%s'", names[i], name);
            return -EINVAL;
        }
        if (i != 2)
            order->on_source_error = policy;
        if (i != 1)
            order->on_target_error = policy;
    }
    return 0;
}

json_t *qmp_begin_job(struct dr_live *live, struct live_disk *on, json_t *args,
                      struct live_order *order, struct live_job **created, struct qmp_error *err)
{
    const char *id = qmp_string(args, "job-id");
    order->speed = qmp_number(args, "speed");
    order->hurry = qmp_bool(args, "x-hurry", false);
    order->keep_finalize = !qmp_bool(args, "auto-finalize", true);
    order->keep_dismiss = !qmp_bool(args, "auto-dismiss", true);
    if (read_policies(args, order, err) < 0) {
        live_order_clear(order);
        return NULL;
    }
    id = id ? id : on->name;
    DR_LOCK_SCOPE(&live->lock);
    return qmp_done(created ? live_job_create(live, on, id, order, created, &err->text)
                            : live_job_begin(live, on, id, order, &err->text));
}

static json_t *block_stream(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_STREAM};
    struct live_disk *on = qmp_device_image(live, args, &order.top, err);
    if (!on || qmp_chain_path(live, on, qmp_string(args, "base-node"), qmp_string(args, "base"),
                              &order.base, err) < 0) {
        live_order_clear(&order);
        return NULL;
    }
    order.retire = qmp_bool(args, "x-retire", false);
    if (order.retire) {
        pthread_mutex_lock(&live->lock);
        order.target = strdup(on->path);
        pthread_mutex_unlock(&live->lock);
    }
    if (!order.retire || order.target)
        return qmp_begin_job(live, on, args, &order, NULL, err);
    live_order_clear(&order);
    return qmp_fail(err, NULL, "out of memory");
}

/* The device that a commit goes by has an error class of its own. */
static json_t *block_commit(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_COMMIT,
                               .remove = qmp_bool(args, "x-remove", false),
                               .force = qmp_bool(args, "x-force", false)};
    const char *device = qmp_string(args, "device");
    struct live_disk *on = qmp_device(live, args, err);
    if (!on)
        return qmp_fail(err, "DeviceNotFound", "Device '%s' not found", device);
    if (qmp_chain_path(live, on, qmp_string(args, "base-node"), qmp_string(args, "base"),
                       &order.base, err) < 0 ||
        qmp_chain_path(live, on, qmp_string(args, "top-node"), qmp_string(args, "top"), &order.top,
                       err) < 0) {
        live_order_clear(&order);
        return NULL;
    }
    /* One look at the chain: another job on the disk may be about to shorten it. */
    struct dr_chain *chain = dr_disk_chain(on->disk);
    if (!order.base) /* the lowest one */
        order.base = strdup(chain->images[chain->n - 1]->path);
    if (order.top && strcmp(order.top, chain->images[0]->path) == 0) {
        free(order.top); /* the active image */
        order.top = NULL;
    }
    dr_chain_unref(chain, NULL);
    if (!order.base) {
        live_order_clear(&order);
        return qmp_fail(err, NULL, "out of memory");
    }
    return qmp_begin_job(live, on, args, &order, NULL, err);
}

/* Read the arguments that both kinds of mirrors take. */
static int mirror_order(json_t *args, struct live_order *order, struct qmp_error *err)
{
    const char *sync = qmp_string(args, "sync"), *how = qmp_string(args, "copy-mode");
    order->top_only = strcmp(sync, "top") == 0;
    order->only_new = strcmp(sync, "none") == 0;
    order->write_blocking = how && strcmp(how, "write-blocking") == 0;
    order->bitmaps = qmp_bool(args, "x-bitmaps", false);
    if (strcmp(sync, "incremental") == 0 || strcmp(sync, "bitmap") == 0)
        qmp_fail(err, NULL, "Sync mode '%s' not supported", sync);
    else if (!order->top_only && !order->only_new && strcmp(sync, "full") != 0)
        qmp_fail(err, NULL, "Parameter 'sync' does not accept value '%s'", sync);
    else if (how && !order->write_blocking && strcmp(how, "background") != 0)
        qmp_fail(err, NULL, "Parameter 'copy-mode' does not accept value '%s'", how);
    else
        return 0;
    return -EINVAL;
}

/* Which format the target has is found out once: later what a guest wrote into a raw one would
 * decide. The result is malloc'ed; NULL and a failure. */
static char *target_format(const struct live_disk *on, const struct live_order *order,
                           const char *given, struct qmp_error *err)
{
    const struct dr_format *found;
    if (!given) {
        if (dr_probe(on->disk->fs, order->target, 0, &found, &err->text) < 0)
            return NULL;
        given = found->name;
    }
    char *format = strdup(given);
    if (!format)
        qmp_fail(err, NULL, "out of memory");
    return format;
}

static int drive_order(struct dr_live *live, struct live_disk *on, json_t *args,
                       struct live_order *order, struct qmp_error *err)
{
    const char *mode = qmp_string(args, "mode"), *format = qmp_string(args, "format");
    order->existing = mode && strcmp(mode, "existing") == 0;
    if (mode && !order->existing && strcmp(mode, "absolute-paths") != 0)
        qmp_fail(err, NULL, "Parameter 'mode' does not accept value '%s'", mode);
    else if (mirror_order(args, order, err) < 0)
        return -EINVAL;
    else if (order->only_new && !order->existing)
        qmp_fail(err, NULL,
                 "Sync mode 'none' needs mode 'existing': blockdev-snapshot-sync makes a new image "
                 "for what is written from now on");
    else if (live_gate(live, on, qmp_string(args, "target"), &err->text) == 0) {
        order->target = live_full_path(on, qmp_string(args, "target"));
        if (!order->target)
            qmp_fail(err, NULL, "out of memory");
        else if (!format && !order->existing) /* the job gives it that of the disk */
            return 0;
        else if ((order->format = target_format(on, order, format, err)))
            return 0;
    }
    return -EINVAL;
}

static json_t *drive_mirror(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_MIRROR};
    struct live_disk *on = qmp_root_device(live, args, err);
    if (!on || drive_order(live, on, args, &order, err) < 0) {
        live_order_clear(&order);
        return NULL;
    }
    return qmp_begin_job(live, on, args, &order, NULL, err);
}

char *qmp_gated_path(struct dr_live *live, const struct live_disk *on, const char *path,
                     struct qmp_error *err)
{
    if (live_gate(live, on, path, &err->text) < 0)
        return NULL;
    char *full = live_full_path(on, path);
    if (!full)
        qmp_fail(err, NULL, "out of memory");
    return full;
}

static int backup_sync(json_t *args, struct live_order *order, struct qmp_error *err)
{
    const char *sync = qmp_string(args, "sync"), *mode = qmp_string(args, "mode");
    const char *bitmap = qmp_string(args, "x-bitmap"), *set = qmp_string(args, "x-set");
    bool incremental = strcmp(sync, "incremental") == 0;
    order->full = !incremental;
    if (mode && strcmp(mode, "absolute-paths") != 0)
        qmp_fail(err, NULL, "Parameter 'mode' does not accept value '%s'%s", mode,
                 strcmp(mode, "existing") == 0 ? ": the target of a backup is a new image here"
                                               : "");
    else if (strcmp(sync, "top") == 0 || strcmp(sync, "none") == 0 || strcmp(sync, "bitmap") == 0 ||
             (incremental && !bitmap))
        qmp_fail(err, NULL, "Sync mode '%s' not supported", sync);
    else if (!incremental && strcmp(sync, "full") != 0)
        qmp_fail(err, NULL, "Parameter 'sync' does not accept value '%s'", sync);
    else if (bitmap && !set)
        qmp_fail(err, NULL, "Parameter 'x-set' is missing");
    else
        return 0;
    return -EINVAL;
}

static int backup_order(struct dr_live *live, struct live_disk *on, json_t *args,
                        struct live_order *order, struct qmp_error *err)
{
    const char *format = qmp_string(args, "format"), *set = qmp_string(args, "x-set");
    const char *bitmap = qmp_string(args, "x-bitmap");
    if (backup_sync(args, order, err) < 0)
        return -EINVAL;
    order->target = qmp_gated_path(live, on, qmp_string(args, "target"), err);
    if (order->target && set)
        order->set = qmp_gated_path(live, on, set, err);
    if (!order->target || (set && !order->set) || qmp_spill(live, on, args, order, err) < 0)
        return -EINVAL;
    order->format = format ? strdup(format) : NULL;
    order->bitmap = bitmap ? strdup(bitmap) : NULL;
    if ((order->format || !format) && (order->bitmap || !bitmap))
        return 0;
    qmp_fail(err, NULL, "out of memory");
    return -EINVAL;
}

static json_t *drive_backup(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_BACKUP};
    if (qmp_is_point_backup(args))
        return qmp_drive_backup(live, args, err);
    struct live_disk *on = qmp_root_device(live, args, err);
    if (!on || backup_order(live, on, args, &order, err) < 0) {
        live_order_clear(&order);
        return NULL;
    }
    if (live->write_back)
        live->write_back(live->user, on->name);
    return qmp_begin_job(live, on, args, &order, NULL, err);
}

static bool is_active(struct dr_live *live, const struct live_disk *on, const char *node)
{
    DR_LOCK_SCOPE(&live->lock);
    return live_find_device(live, node) == on;
}

/* The job opens the target by its path. */
static int node_order(struct dr_live *live, const struct live_disk *on, json_t *args,
                      struct live_order *order, struct qmp_error *err)
{
    const char *name = qmp_string(args, "target");
    if (mirror_order(args, order, err) < 0)
        return -EINVAL;
    if (is_active(live, on, name)) {
        qmp_fail(err, NULL, "Can't mirror node into itself");
        return -EINVAL;
    }
    struct live_node *node = qmp_free_node(live, name, err);
    if (node && node->read_only)
        qmp_fail(err, NULL, "Block node is read-only");
    if (!node || node->read_only || live_gate(live, on, node->path, &err->text) < 0 ||
        live_node_let_go(live, node, &err->text) < 0)
        return -EINVAL;
    order->existing = true;
    order->flags = node->flags & ~(unsigned)DR_OPEN_NO_BACKING;
    order->target = strdup(node->path);
    order->format = strdup(node->format ? node->format : "raw");
    if (order->target && order->format)
        return 0;
    qmp_fail(err, NULL, "out of memory");
    return -EINVAL;
}

static json_t *blockdev_mirror(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_MIRROR};
    struct live_disk *on = qmp_root_device(live, args, err);
    if (!on || node_order(live, on, args, &order, err) < 0) {
        live_order_clear(&order);
        return NULL;
    }
    return qmp_begin_job(live, on, args, &order, NULL, err);
}

/* ------------------------------------------------------------------ asking */

static json_t *query_jobs(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    (void)args, (void)err;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_job *job = live->jobs; job; job = job->next) {
        struct dr_job_status s;
        dr_job_query(job->job, &s);
        json_t *one = json_pack("{s:s, s:s, s:s, s:I, s:I}", "id", dr_job_id(job->job), "type",
                                live_kind_name(job->order.kind), "status",
                                live_status_name(job->status), "current-progress",
                                (json_int_t)s.done, "total-progress", (json_int_t)s.total);
        if (job->result < 0)
            json_object_set_new(one, "error", dr_json_text(job->error.text));
        if (job->message)
            json_object_set_new(one, "x-message", dr_json_text(job->message));
        json_array_append_new(all, one);
    }
    return all;
}

static json_t *query_block_jobs(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    json_t *all = json_array();
    (void)args, (void)err;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_job *job = live->jobs; job; job = job->next) {
        struct dr_job_status s;
        dr_job_query(job->job, &s);
        json_t *one =
            json_pack("{s:s, s:s, s:I, s:I, s:b, s:b, s:I, s:s, s:b, s:s, s:b, s:b}", "type",
                      live_kind_name(job->order.kind), "device", dr_job_id(job->job), "len",
                      (json_int_t)s.total, "offset", (json_int_t)s.done, "busy",
                      s.state == DR_JOB_RUNNING, "paused", job->paused, "speed", (json_int_t)s.rate,
                      "io-status", live_io_status(job->stopped_by), "ready",
                      job->status == LIVE_READY || job->status == LIVE_STANDBY, "status",
                      live_status_name(job->status), "auto-finalize", !job->order.keep_finalize,
                      "auto-dismiss", !job->order.keep_dismiss);
        if (job->result < 0)
            json_object_set_new(one, "error", dr_json_text(job->error.text));
        json_array_append_new(all, one);
    }
    return all;
}

/* ------------------------------------------------------------------ verbs */

static json_t *speak(struct dr_live *live, json_t *args, enum live_verb verb, bool force,
                     struct qmp_error *err)
{
    const char *id = qmp_string(args, "id"), *device = qmp_string(args, "device");
    DR_LOCK_SCOPE(&live->lock);
    struct live_job *job = live_job_find(live, device ? device : id);
    if (!job && device)
        return qmp_fail(err, "DeviceNotActive", "Block job '%s' not found", device);
    if (!job)
        return qmp_fail(err, NULL, "Job not found");
    return qmp_done(live_job_do(job, verb, force, qmp_number(args, "speed"), &err->text));
}

#define VERB(name, verb, force)                                                    \
    static json_t *name(struct dr_live *live, json_t *args, struct qmp_error *err) \
    {                                                                              \
        return speak(live, args, verb, force, err);                                \
    }
VERB(job_cancel, LIVE_CANCEL, true)
VERB(block_job_cancel, LIVE_CANCEL, qmp_bool(args, "force", false))
VERB(job_pause, LIVE_PAUSE, false)
VERB(job_resume, LIVE_RESUME, false)
VERB(job_set_speed, LIVE_SET_SPEED, false)
VERB(job_complete, LIVE_COMPLETE, false)
VERB(job_finalize, LIVE_FINALIZE, false)
VERB(job_dismiss, LIVE_DISMISS, false)

/* ------------------------------------------------------------------ the table */

#define DEVICE              \
    {                       \
        "device", 's', true \
    }
#define ID              \
    {                   \
        "id", 's', true \
    }
#define ANY_JOB                                                                           \
    {"job-id", 's', false}, DEVICE, {"speed", 'n', false}, {"auto-finalize", 'b', false}, \
        {"auto-dismiss", 'b', false}, {"x-hurry", 'b', false},                            \
    {                                                                                     \
        "filter-node-name", 's', false                                                    \
    }

const struct qmp_command qmp_job_commands[] = {
    {"block-stream",
     block_stream,
     {ANY_JOB,
      {"base", 's', false},
      {"base-node", 's', false},
      {"x-image", 's', false},
      {"x-retire", 'b', false},
      {"on-error", 's', false}}},
    {"block-commit",
     block_commit,
     {ANY_JOB,
      {"base", 's', false},
      {"base-node", 's', false},
      {"top", 's', false},
      {"top-node", 's', false},
      {"x-remove", 'b', false},
      {"x-force", 'b', false},
      {"on-error", 's', false}}},
    {"drive-mirror",
     drive_mirror,
     {ANY_JOB,
      {"target", 's', true},
      {"sync", 's', true},
      {"format", 's', false},
      {"mode", 's', false},
      {"copy-mode", 's', false},
      {"unmap", 'b', false},
      {"x-bitmaps", 'b', false},
      {"on-source-error", 's', false},
      {"on-target-error", 's', false}}},
    {"drive-backup",
     drive_backup,
     {ANY_JOB,
      {"target", 's', true},
      {"sync", 's', true},
      {"format", 's', false},
      {"mode", 's', false},
      {"bitmap", 's', false},
      {"bitmap-mode", 's', false},
      {"compress", 'b', false},
      {"x-set", 's', false},
      {"x-bitmap", 's', false},
      {"x-spill", 's', false},
      {"x-spill-size", 'n', false},
      {"x-when-full", 's', false},
      {"on-source-error", 's', false},
      {"on-target-error", 's', false}}},
    {"blockdev-mirror",
     blockdev_mirror,
     {ANY_JOB,
      {"target", 's', true},
      {"sync", 's', true},
      {"granularity", 'n', false},
      {"buf-size", 'n', false},
      {"copy-mode", 's', false},
      {"x-bitmaps", 'b', false},
      {"on-source-error", 's', false},
      {"on-target-error", 's', false}}},
    {"query-jobs", query_jobs, {{0}}},
    {"query-block-jobs", query_block_jobs, {{0}}},
    {"block-job-set-speed", job_set_speed, {DEVICE, {"speed", 'n', true}}},
    {"block-job-cancel", block_job_cancel, {DEVICE, {"force", 'b', false}}},
    {"block-job-pause", job_pause, {DEVICE}},
    {"block-job-resume", job_resume, {DEVICE}},
    {"block-job-complete", job_complete, {DEVICE}},
    {"block-job-finalize", job_finalize, {ID}},
    {"block-job-dismiss", job_dismiss, {ID}},
    {"job-cancel", job_cancel, {ID}},
    {"job-pause", job_pause, {ID}},
    {"job-resume", job_resume, {ID}},
    {"job-complete", job_complete, {ID}},
    {"job-finalize", job_finalize, {ID}},
    {"job-dismiss", job_dismiss, {ID}},
    {0},
};
