/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup: copy what disks hold at one instant into new images.
 *
 *     claim each disk ─► make each target aside ─► the instant, while all their requests wait
 *     ─► copy each disk (backup-copy.h) ─► unhook it, flush its target
 *     ─► side files with checksums ─► the targets get their names
 *
 * Nothing of a disk changes but its list of hooks. Killed anywhere, it is as its guest left it, and
 * a target that has its name is whole. */
#include "base/cleanup.h"
#include "ops/backup-copy.h"
#include "ops/ops-internal.h"

struct backup {
    struct dr_backup_disk *what;
    struct dr_fs *fs;
    const struct dr_format *fmt;
    bool claimed, published;
    struct dr_new_image fresh;
    struct dr_disk *out;
    struct dr_sums sums;
    struct dr_frozen frozen;
};

struct set {
    struct backup *all;
    size_t n, quiet; /* disks whose requests wait */
    struct dr_job *job;
    uint64_t total; /* bytes of all disks */
};

/* ------------------------------------------------------------------ the target */

static unsigned target_flags(const struct backup *b)
{
    const unsigned kept = DR_OPEN_NO_FLUSH | DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_DIRECT;
    return DR_OPEN_RDWR | (b->what->disk->flags & kept) | b->what->options.open.flags;
}

static int create_target(struct backup *b, struct dr_job *job, struct dr_error *err)
{
    const struct dr_create_params params = {
        .size = b->sums.size,
        .stop = dr_job_stop_flag(job),
        .all_new = true,
    };
    const struct dr_backup_options *o = &b->what->options;
    struct dr_open_options open = o->open;
    int r = dr_new_create(&b->fresh, b->fmt, &params, o->pairs, o->n_pairs, target_flags(b), err);
    if (r == 0)
        r = dr_new_check_places(&b->fresh, err);
    open.format = b->fmt->name;
    open.flags = target_flags(b) | DR_OPEN_UNCHANGED;
    return r < 0 ? r : dr_open_fs(b->fs, b->fresh.path, &open, &b->out, err);
}

static int make_target(struct backup *b, struct dr_job *job, struct dr_error *err)
{
    const struct dr_backup_options *o = &b->what->options;
    struct dr_chain *chain = dr_disk_chain(b->what->disk);
    int r = 0;
    if (dr_ops_reads(b->fs, chain, b->what->target))
        r = dr_fail(err, EBUSY, "%s: belongs to the disk itself: the target must be another file",
                    b->what->target);
    else if (dr_fs_exists(b->fs, b->what->target))
        r = dr_fail(err, EEXIST, "%s: exists already", b->what->target);
    dr_chain_unref(chain, NULL);
    if (r < 0)
        return r;
    b->fmt = dr_ops_format(o->format ? o->format : "qcow2", DR_FORMAT_CREATE, err);
    if (!b->fmt)
        return err ? -err->errnum : -EINVAL;
    r = dr_new_begin(&b->fresh, b->fs, b->what->target, true, target_flags(b), err);
    return r < 0 ? r : create_target(b, job, err);
}

/* ------------------------------------------------------------------ the instant */

static int prepare(struct backup *b, struct dr_job *job, struct dr_error *err)
{
    int r = dr_disk_claim(b->what->disk, "backup", err);
    b->claimed = r == 0;
    if (r == 0)
        r = dr_sums_begin(&b->sums, dr_size(b->what->disk), err);
    if (r == 0)
        r = make_target(b, job, err);
    if (r < 0)
        return r;
    b->frozen = (struct dr_frozen){
        .disk = b->what->disk, .size = b->sums.size, .target = b->out->chain, .sums = &b->sums};
    return dr_frozen_begin(&b->frozen, err);
}

/* Each disk's step holds the next one's requests, too. A failure leaves hooks that
 * dr_frozen_finish() takes away. */
static int instant_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    struct set *set = user;
    struct backup *b = &set->all[set->quiet++];
    (void)fresh;
    int r = dr_frozen_now(&b->frozen, present, err);
    if (r < 0 || set->quiet == set->n)
        return r;
    return dr_disk_exchange(set->all[set->quiet].what->disk, instant_step, set, NULL, err);
}

static int take_instant(struct set *set, struct dr_error *err)
{
    uint64_t pause = 0;
    int r = dr_disk_exchange(set->all[0].what->disk, instant_step, set, &pause, err);
    dr_job_held(set->job, pause);
    return r;
}

/* ------------------------------------------------------------------ the copy */

/* A target that is full may notice it only when its metadata is written. */
static int flush_target(struct backup *b, struct dr_job *job, struct dr_error *err)
{
    int r;
    do
        r = dr_chain_flush(b->out->chain, 0, err);
    while (r < 0 && (r = dr_job_after_failure(job, r, err)) == 0);
    return r;
}

static int copy_one(struct set *set, struct backup *b, uint64_t before, struct dr_error *err)
{
    uint64_t after = set->total - before - b->sums.size;
    dr_job_beside(set->job, b->what->disk);
    int r = dr_frozen_copy(&b->frozen, before, after, set->job, err);
    int broken = dr_frozen_finish(&b->frozen, err);
    r = r < 0 ? r : broken;
    b->what->result.copied = atomic_load(&b->frozen.copied);
    if (r == 0)
        r = flush_target(b, set->job, err);
    return r < 0 ? r : dr_ops_close(&b->out, err);
}

static int copy_all(struct set *set, struct dr_error *err)
{
    uint64_t before = 0;
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        r = copy_one(set, &set->all[i], before, err);
        before += set->all[i].sums.size;
    }
    return r;
}

/* ------------------------------------------------------------------ names */

/* The side file first: where the target has its name, its checksums are there. */
static int publish_one(struct backup *b, struct dr_error *err)
{
    CLEANUP_FREE char *sums = dr_sums_path(b->what->target);
    if (!sums)
        return dr_fail(err, ENOMEM, "%s: out of memory", b->what->target);
    int r = dr_sums_save(&b->sums, b->fs, sums, dr_ops_file_flags(target_flags(b)), err);
    if (r == 0) {
        r = dr_new_publish(&b->fresh, err);
        b->published = r == 0;
        if (r < 0)
            b->fs->ops->unlink(b->fs, sums, NULL);
    }
    if (r == 0) {
        b->what->result.size = b->sums.size;
        dr_sums_digest(&b->sums, b->what->result.digest);
    }
    return r;
}

/* Another target did not get its name: there are none. */
static void unpublish(struct backup *b)
{
    static const struct dr_open_options defaults;
    struct dr_open_options open = defaults;
    CLEANUP_FREE char *sums = dr_sums_path(b->what->target);
    open.flags = target_flags(b) & (DR_OPEN_NO_LOCK | DR_OPEN_NO_FLUSH | DR_OPEN_ANY_PATH);
    dr_ops_remove_image(b->fs, b->what->target, b->fmt->name, &open, NULL, NULL, NULL);
    if (sums)
        b->fs->ops->unlink(b->fs, sums, NULL);
}

static int publish_all(struct set *set, struct dr_error *err)
{
    int r = dr_job_before_switch(set->job, err);
    for (size_t i = 0; r == 0 && i < set->n; i++)
        r = publish_one(&set->all[i], err);
    for (size_t i = 0; r < 0 && i < set->n; i++)
        if (set->all[i].published)
            unpublish(&set->all[i]);
    return r;
}

/* ------------------------------------------------------------------ the whole */

static void end_one(struct backup *b)
{
    dr_frozen_end(&b->frozen);
    dr_ops_close(&b->out, NULL);
    dr_new_abandon(&b->fresh);
    dr_sums_end(&b->sums);
    if (b->claimed)
        dr_disk_unclaim(b->what->disk);
}

static int run(struct set *set, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        r = prepare(&set->all[i], set->job, err);
        if (r == 0 && dr_add_overflow(set->total, set->all[i].sums.size, &set->total))
            r = dr_fail(err, EFBIG, "the disks together are too large");
    }
    if (r == 0)
        r = take_instant(set, err);
    if (r == 0)
        r = copy_all(set, err);
    if (r == 0)
        r = publish_all(set, err);
    for (size_t i = 0; i < set->n; i++)
        end_one(&set->all[i]);
    return r;
}

static int backup_disks(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                        struct dr_error *err)
{
    struct set set = {.all = calloc(n, sizeof(*set.all)), .n = n, .job = job};
    if (!set.all)
        return dr_fail(err, ENOMEM, "out of memory for %zu backups", n);
    for (size_t i = 0; i < n; i++) {
        disks[i].result = (struct dr_backup_result){0};
        set.all[i] = (struct backup){.what = &disks[i], .fs = disks[i].disk->fs};
    }
    int r = run(&set, err);
    free(set.all);
    return r;
}

int dr_disks_backup(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                    struct dr_error *err)
{
    DR_REQUIRE(disks, err);
    if (n == 0)
        return dr_fail(err, EINVAL, "no disk to back up");
    for (size_t i = 0; i < n; i++) {
        DR_REQUIRE(disks[i].disk, err);
        DR_REQUIRE(disks[i].target, err);
    }
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    r = dr_job_end(job, backup_disks(disks, n, job, err));
    for (size_t i = 0; r < 0 && i < n; i++)
        dr_new_hide(r, disks[i].target, err);
    return r;
}

int dr_disk_backup(struct dr_disk *disk, const char *target,
                   const struct dr_backup_options *options, struct dr_job *job,
                   struct dr_backup_result *result, struct dr_error *err)
{
    struct dr_backup_disk one = {.disk = disk, .target = target};
    if (options)
        one.options = *options;
    int r = dr_disks_backup(&one, 1, job, err);
    if (r == 0 && result)
        *result = one.result;
    return r;
}
