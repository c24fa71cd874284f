/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Extracting into new files: the steps of one call. */
#include "archive/extract-files.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops/ops-internal.h"

#define PARTIAL "drover.partial"
#define UNTIL   "tmp-" /* in front of a disk's name, in sight */

static int no_memory(const struct files *x, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", x->vma->name);
}

/* ------------------------------------------------------------------ begin */

static int check_options(struct files *x, struct dr_error *err)
{
    const struct dr_vma_files_options *o = x->o;
    if (!o->dir == !o->path || (o->path && (o->n_disks != 1 || o->n_configs > 0 || o->in_sight)))
        return dr_fail(err, EINVAL, "%s: either a directory or the path of one disk is needed",
                       x->vma->name);
    if (o->read.headers_only)
        return dr_fail(err, EINVAL, "%s: new files need more than the structure", x->vma->name);
    if (o->resume && (o->no_sync || o->read.salvage || o->in_sight))
        return dr_fail(err, EINVAL,
                       "%s: resuming needs durable files in a staging directory, and "
                       "an archive that is whole",
                       x->vma->name);
    if (o->n_disks > 255)
        return dr_fail(err, EINVAL, "%s: has no %zu disks", x->vma->name, o->n_disks);
    for (size_t i = 0; i < o->n_disks; i++)
        if (!vma_header_disk(&x->vma->header, o->disks[i].id))
            return dr_fail(err, EINVAL, "%s: has no disk %u", x->vma->name, o->disks[i].id);
    for (size_t i = 0; i < o->n_configs; i++)
        if (o->configs[i].index >= x->vma->header.n_configs)
            return dr_fail(err, EINVAL, "%s: has no configuration file %zu", x->vma->name,
                           o->configs[i].index);
    return 0;
}

static int begin(struct files *x, struct dr_error *err)
{
    const struct dr_vma_files_options *o = x->o;
    x->stage.keep = o->resume;
    x->stage.make_dir = o->dir;
    x->stage.in_sight = o->in_sight;
    x->stage.replace = o->replace;
    x->stage.no_sync = o->no_sync;
    x->stage.no_lock = o->flags & DR_OPEN_NO_LOCK;
    if (o->dir)
        return stage_begin(&x->stage, o->dir, "." PARTIAL, err);
    x->alone = o->disks[0];
    x->alone.file = dr_path_basename(o->path);
    x->disks = &x->alone;
    CLEANUP_FREE char *dir = dr_path_dirname(o->path);
    CLEANUP_FREE char *work = dr_aside_fixed_name(x->alone.file, PARTIAL);
    return dir && work ? stage_begin(&x->stage, dir, work, err) : no_memory(x, err);
}

static char *name_made(const struct files *x, const struct dr_vma_new_disk *d)
{
    char *made;
    return asprintf(&made, "%s%s", x->o->in_sight ? UNTIL : "", d->file) < 0 ? NULL : made;
}

/* All names are checked, and the files that give way are locked, before anything is made. */
static int plan(struct files *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < x->o->n_disks && r == 0; i++) {
        CLEANUP_FREE char *made = name_made(x, &x->disks[i]);
        r = made ? stage_plan(&x->stage, made, x->disks[i].file, true, err) : no_memory(x, err);
    }
    for (size_t i = 0; i < x->o->n_configs && r == 0; i++)
        r = stage_plan(&x->stage, x->o->configs[i].file, x->o->configs[i].file, false, err);
    return r;
}

/* ------------------------------------------------------------------ making the files */

static int write_configs(struct files *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < x->o->n_configs && r == 0; i++) {
        const struct dr_vma_new_config *c = &x->o->configs[i];
        const struct dr_vma_config *from = &x->vma->header.configs[c->index];
        r = stage_write(&x->stage, c->file, from->data, from->len, err);
    }
    return r == 0 && x->o->ready ? stage_sync(&x->stage, err) : r;
}

/* Disks in archives may have any size, and new images are made of whole sectors. Formats that
 * cannot be cut to the exact size keep zeros at the end. */
static void cut(struct dr_disk *disk, uint64_t size)
{
    if (dr_size(disk) > size)
        dr_truncate(disk, size, NULL);
}

static int create_image(const struct files *x, const struct dr_vma_new_disk *d, const char *path,
                        unsigned flags, struct dr_error *err)
{
    const struct dr_create_options create = {
        .format = d->format ? d->format : "raw",
        .size = vma_header_disk(&x->vma->header, d->id)->size,
        .has_size = true,
        .pairs = d->pairs,
        .n_pairs = d->n_pairs,
        .no_replace = true,
        .flags = flags,
        .stop = dr_job_stop_flag(x->job),
    };
    return dr_new_hide(dr_create_fs(x->stage.fs, path, &create, err), path, err);
}

/* An interrupted extraction that has a record has made all of its images. */
static int make_target(struct files *x, const struct dr_vma_new_disk *d, struct dr_error *err)
{
    unsigned flags = (x->o->flags & DR_OPEN_NO_LOCK) | (x->o->no_sync ? DR_OPEN_NO_FLUSH : 0);
    const struct dr_open_options open = {.format = d->format ? d->format : "raw",
                                         .flags = DR_OPEN_RDWR | flags,
                                         .key_secret = dr_ops_key_secret(d->pairs, d->n_pairs)};
    CLEANUP_FREE char *made = name_made(x, d);
    CLEANUP_FREE char *path = made ? stage_path(&x->stage, made) : NULL;
    struct dr_disk *disk = NULL;
    int r = path ? 0 : no_memory(x, err);
    if (r == 0 && !x->stage.found)
        r = create_image(x, d, path, flags, err);
    if (r == 0)
        r = dr_open_fs(x->stage.fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    assert(disk);
    if (!x->stage.found)
        cut(disk, vma_header_disk(&x->vma->header, d->id)->size);
    bool noise = disk->chain->images[0]->fmt->flags & DR_FORMAT_NOISE;
    x->targets[x->n_new++] = (struct dr_vma_target){.id = d->id, .disk = disk, .is_zero = !noise};
    return 0;
}

static int make_targets(struct files *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < x->o->n_disks && r == 0; i++)
        r = make_target(x, &x->disks[i], err);
    x->n_targets = x->n_new;
    if (r == 0 && x->o->read.n_targets > 255)
        return dr_fail(err, EINVAL, "%s: has no %zu disks", x->vma->name, x->o->read.n_targets);
    for (size_t i = 0; i < x->o->read.n_targets && r == 0; i++)
        x->targets[x->n_targets++] = x->o->read.targets[i];
    return r;
}

static int tell_ready(const struct files *x, struct dr_error *err)
{
    return x->o->ready && x->o->ready(x->o->user) != 0
               ? dr_fail(err, ECANCELED, "%s: stopped on request", x->vma->name)
               : 0;
}

static int make_all(struct files *x, struct dr_error *err)
{
    int r = write_configs(x, err);
    if (r == 0)
        r = tell_ready(x, err);
    if (r == 0)
        r = make_targets(x, err);
    if (r == 0 && x->record)
        r = files_record_save(x, x->resume_from, err);
    return r;
}

/* ------------------------------------------------------------------ reading the archive */

static int checkpoint(void *user, uint64_t off, struct dr_error *err)
{
    return files_record_save(user, off, err);
}

static int close_targets(struct files *x, struct dr_error *err)
{
    int result = 0;
    for (size_t i = 0; i < x->n_new; i++) {
        int r = dr_close(DR_STEAL(x->targets[i].disk), result == 0 ? err : NULL);
        result = result < 0 ? result : r;
    }
    x->n_new = x->n_targets = 0;
    return result;
}

static int read_archive(struct files *x, struct dr_error *err)
{
    const struct vma_resume resume = {x->resume_from, x->record ? checkpoint : NULL, x};
    struct dr_vma_extract_options o = x->o->read;
    o.targets = x->targets;
    o.n_targets = x->n_targets;
    int r = vma_read_disks(x->vma, &o, &resume, x->job, &x->result.read, err);
    return r == 0 ? close_targets(x, err) : r;
}

/* ------------------------------------------------------------------ the call */

static int extract(struct files *x, struct dr_error *err)
{
    int r = check_options(x, err);
    if (r == 0)
        r = begin(x, err);
    if (r == 0 && x->o->resume)
        r = files_record_load(x, err);
    if (r == 0)
        r = plan(x, err);
    if (r < 0)
        return r;
    if (!x->stage.finishing) {
        r = make_all(x, err);
        if (r == 0)
            r = read_archive(x, err);
        if (r == 0 && x->record)
            r = files_record_complete(x, err);
    }
    return r == 0 ? stage_publish(&x->stage, err) : r;
}

/* Without a record there is nothing to go on from. */
static bool is_worth_keeping(const struct files *x)
{
    CLEANUP_FREE char *record = x->stage.entered ? stage_path(&x->stage, RECORD) : NULL;
    return x->stage.stuck || (record && dr_look(x->stage.fs, record, NULL, NULL, NULL) == 0);
}

static void end(struct files *x)
{
    for (size_t i = 0; i < x->n_new; i++)
        dr_close(x->targets[i].disk, NULL);
    x->stage.keep = x->stage.keep && is_worth_keeping(x);
    if (x->stage.keep)
        snprintf(x->result.kept, sizeof(x->result.kept), "%s", x->stage.work);
    stage_end(&x->stage);
    json_decref(x->record);
}

int dr_vma_extract_files_fs(struct dr_fs *fs, struct dr_vma *vma,
                            const struct dr_vma_files_options *options, struct dr_job *job,
                            struct dr_vma_files_result *result, struct dr_error *err)
{
    struct files *x = calloc(1, sizeof(*x));
    if (!x)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    x->vma = vma;
    x->o = options;
    x->disks = options->disks;
    x->job = job;
    x->stage.fs = fs;
    x->stage.job = job;
    int r = extract(x, err);
    end(x);
    if (result)
        *result = x->result;
    free(x);
    return r;
}

int dr_vma_extract_files(struct dr_vma *vma, const struct dr_vma_files_options *options,
                         struct dr_job *job, struct dr_vma_files_result *result,
                         struct dr_error *err)
{
    DR_REQUIRE(vma, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE_N(options->disks, options->n_disks, err);
    DR_REQUIRE_N(options->configs, options->n_configs, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job, dr_vma_extract_files_fs(vma->fs, vma, options, job, result, err));
}
