/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The command that backs up disks of the server, as they are at one instant, into a VMA archive. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/json.h"
#include "drover/vma.h"
#include "live/live.h"
#include "ops/ops-internal.h"

#define DISKS_MAX   254 /* that an archive can hold */
#define CONFIGS_MAX 256

/* Its job is one on the first disk, and keeps the others, too. */
struct live_archive {
    struct live_disk *on[DISKS_MAX];
    struct dr_vma_create_disk disks[DISKS_MAX];
    size_t n;
    struct dr_vma_config configs[CONFIGS_MAX];
    size_t n_configs;
    enum dr_vma_compression compression;
    int level;
    bool no_sums;
};

void live_archive_free(struct live_archive *a)
{
    if (!a)
        return;
    for (size_t i = 0; i < a->n; i++)
        free((char *)(uintptr_t)a->disks[i].name);
    for (size_t i = 0; i < a->n_configs; i++) {
        free((char *)(uintptr_t)a->configs[i].name);
        free((uint8_t *)(uintptr_t)a->configs[i].data);
    }
    free(a);
}

bool live_archive_has(const struct live_archive *a, const struct live_disk *on)
{
    for (size_t i = 0; a && i < a->n; i++)
        if (a->on[i] == on)
            return true;
    return false;
}

int live_archive_run(struct live_job *job, struct dr_error *err)
{
    const struct live_order *o = &job->order;
    const struct live_archive *a = o->archive;
    const struct dr_vma_create_options options = {.disks = a->disks,
                                                  .n_disks = a->n,
                                                  .configs = a->configs,
                                                  .n_configs = a->n_configs,
                                                  .compression = a->compression,
                                                  .level = a->level,
                                                  .no_sums = a->no_sums,
                                                  .at_instant = true,
                                                  .set = o->set,
                                                  .spill = live_spill(o)};
    return dr_vma_create(o->target, &options, job->job, NULL, err);
}

/* ------------------------------------------------------------------ the spill */

static int out_of_memory(struct qmp_error *err)
{
    qmp_fail(err, NULL, "out of memory");
    return -ENOMEM;
}

struct dr_backup_spill live_spill(const struct live_order *order)
{
    return (struct dr_backup_spill){
        .path = order->spill, .size = order->spill_size, .fail_when_full = order->spill_fails};
}

/* Where the file will be: in a directory, or there. */
static int spill_path(struct dr_live *live, const struct live_disk *on, const char *path,
                      char **full, struct qmp_error *err)
{
    struct dr_fs *fs = on->disk->fs;
    enum dr_name_kind kind;
    bool dir = dr_look(fs, path, &kind, NULL, NULL) == 0 && kind == DR_NAME_DIR;
    CLEANUP_FREE char *inside = dir ? dr_path_join(path, "spill") : strdup(path);
    int r = inside ? live_gate(live, on, inside, &err->text) : -ENOMEM;
    *full = r == 0 ? live_full_path(on, path) : NULL;
    if (r == -ENOMEM || (r == 0 && !*full))
        return out_of_memory(err);
    return r;
}

int qmp_spill(struct dr_live *live, const struct live_disk *on, json_t *args,
              struct live_order *order, struct qmp_error *err)
{
    const char *path = qmp_string(args, "x-spill"), *full = qmp_string(args, "x-when-full");
    order->spill_size = qmp_number(args, "x-spill-size");
    order->spill_fails = full && strcmp(full, "backup-fails") == 0;
    if (full && !order->spill_fails && strcmp(full, "guest-waits") != 0)
        qmp_fail(err, NULL, "Parameter 'x-when-full' does not accept value '%s'", full);
    else if (!path && (full || order->spill_size))
        qmp_fail(err, NULL, "Parameter 'x-spill' is missing");
    else if (!path)
        return 0;
    else
        return spill_path(live, on, path, &order->spill, err);
    return -EINVAL;
}

/* ------------------------------------------------------------------ arguments */

static int add_disk(struct live_archive *a, struct live_disk *on, struct qmp_error *err)
{
    if (live_archive_has(a, on) || a->n == DISKS_MAX) {
        qmp_fail(err, NULL,
                 a->n == DISKS_MAX ? "Device '%s' is one too many for an archive"
                                   : "Device '%s' is named twice",
                 on->name);
        return -EINVAL;
    }
    char *name = strdup(on->name);
    if (!name)
        return out_of_memory(err);
    a->disks[a->n] = (struct dr_vma_create_disk){.name = name, .disk = on->disk, .state_fd = -1};
    a->on[a->n++] = on;
    return 0;
}

static int add_named(struct dr_live *live, struct live_archive *a, json_t *name,
                     struct qmp_error *err)
{
    if (!json_is_string(name)) {
        qmp_fail(err, NULL, "Invalid parameter type for 'devices', expected: array of strings");
        return -EINVAL;
    }
    json_t *one = json_pack("{s:O}", "device", name);
    struct live_disk *on = one ? qmp_device(live, one, err) : NULL;
    json_decref(one);
    if (!one)
        return out_of_memory(err);
    return on ? add_disk(a, on, err) : -EINVAL;
}

/* All disks of the server, but for those that only blockdev-add named; or these. */
static int add_disks(struct dr_live *live, struct live_archive *a, const json_t *devices,
                     struct qmp_error *err)
{
    struct live_disk *on;
    json_t *name;
    size_t i;
    int r = 0;
    for (i = 0; !devices && r == 0 && (on = live_nth_disk(live, i)); i++)
        r = on->node ? 0 : add_disk(a, on, err);
    json_array_foreach(devices, i, name)
    {
        r = r < 0 ? r : add_named(live, a, name, err);
    }
    if (r == 0 && a->n == 0) {
        qmp_fail(err, NULL, "There is no device to back up");
        r = -EINVAL;
    }
    return r;
}

static int add_configs(struct live_archive *a, const json_t *configs, struct qmp_error *err)
{
    json_t *one;
    size_t i;
    json_array_foreach(configs, i, one)
    {
        const json_t *data = json_object_get(one, "data");
        const char *name = json_string_value(json_object_get(one, "name"));
        if (!name || !json_is_string(data) || i == CONFIGS_MAX) {
            qmp_fail(err, NULL, "Parameter 'configs' expects at most %d of {\"name\", \"data\"}",
                     CONFIGS_MAX);
            return -EINVAL;
        }
        size_t len = json_string_length(data);
        struct dr_vma_config *c = &a->configs[a->n_configs];
        uint8_t *copy = malloc(len + 1);
        char *called = strdup(name);
        if (copy)
            memcpy(copy, json_string_value(data), len);
        *c = (struct dr_vma_config){.name = called, .data = copy, .len = len};
        a->n_configs++;
        if (!copy || !called)
            return out_of_memory(err);
    }
    return 0;
}

static int read_compression(struct live_archive *a, json_t *args, struct qmp_error *err)
{
    const char *how = qmp_string(args, "compression");
    const char *format = qmp_string(args, "format");
    uint64_t level = qmp_number(args, "level");
    a->no_sums = !qmp_bool(args, "sums", true);
    a->compression = how && strcmp(how, "zstd") == 0 ? DR_VMA_ZSTD : DR_VMA_PLAIN;
    a->level = (int)level;
    if (format && strcmp(format, "vma") != 0)
        qmp_fail(err, NULL, "Parameter 'format' does not accept value '%s'", format);
    else if (how && a->compression == DR_VMA_PLAIN && strcmp(how, "none") != 0)
        qmp_fail(err, NULL, "Parameter 'compression' does not accept value '%s'", how);
    else if (level > 22)
        qmp_fail(err, NULL, "Parameter 'level' expects a number from 1 to 22");
    else
        return 0;
    return -EINVAL;
}

static int read_order(struct dr_live *live, json_t *args, struct live_order *order,
                      struct qmp_error *err)
{
    struct live_archive *a = order->archive = calloc(1, sizeof(*a));
    const char *target = qmp_string(args, "target"), *set = qmp_string(args, "x-set");
    if (!a)
        return out_of_memory(err);
    int r = add_disks(live, a, json_object_get(args, "devices"), err);
    if (r == 0)
        r = add_configs(a, json_object_get(args, "configs"), err);
    if (r == 0)
        r = read_compression(a, args, err);
    for (size_t i = 0; r == 0 && i < a->n; i++)
        r = live_gate(live, a->on[i], target, &err->text);
    if (r == 0)
        r = qmp_spill(live, a->on[0], args, order, err);
    for (size_t i = 0; set && r == 0 && i < a->n; i++)
        r = live_gate(live, a->on[i], set, &err->text);
    if (r < 0)
        return r;
    order->target = live_full_path(a->on[0], target);
    order->set = set ? live_full_path(a->on[0], set) : NULL;
    return order->target && (order->set || !set) ? 0 : out_of_memory(err);
}

/* No other job may be at work on one of the disks; later ones see that this one is. */
static int check_idle(struct dr_live *live, const struct live_archive *a, struct qmp_error *err)
{
    DR_LOCK_SCOPE(&live->lock);
    for (size_t i = 1; i < a->n; i++) {
        const struct live_job *job = live_job_on(live, a->on[i]);
        if (job)
            return dr_fail(&err->text, EBUSY,
                           "Node '%s' is busy: block device is in use by block job: %s",
                           a->on[i]->name, live_kind_name(job->order.kind));
    }
    return 0;
}

static json_t *archive(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.kind = LIVE_BACKUP};
    int r = read_order(live, args, &order, err);
    if (r == 0)
        r = check_idle(live, order.archive, err);
    if (r < 0) {
        live_order_clear(&order);
        return NULL;
    }
    for (size_t i = 0; live->write_back && i < order.archive->n; i++)
        live->write_back(live->user, order.archive->on[i]->name);
    return qmp_begin_job(live, order.archive->on[0], args, &order, NULL, err);
}

const struct qmp_command qmp_archive_commands[] = {
    {"x-drover-archive",
     archive,
     {{"job-id", 's', false},
      {"devices", 'l', false},
      {"target", 's', true},
      {"format", 's', false},
      {"configs", 'l', false},
      {"compression", 's', false},
      {"level", 'n', false},
      {"sums", 'b', false},
      {"x-set", 's', false},
      {"on-source-error", 's', false},
      {"on-target-error", 's', false},
      {"x-spill", 's', false},
      {"x-spill-size", 'n', false},
      {"x-when-full", 's', false},
      {"speed", 'n', false},
      {"auto-finalize", 'b', false},
      {"auto-dismiss", 'b', false},
      {"x-hurry", 'b', false}}},
    {0},
};
