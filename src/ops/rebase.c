/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* rebase: give an image another parent without changing a byte that reads through it.
 *
 * Everything that can be refused is refused first. Then what the old parents show and the new ones
 * do not is filled into the image, all of it is made durable, and only then the name is switched.
 * Killed at any point the image reads the same, and doing it again goes on: what was filled is no
 * hole any more.
 *
 * Other threads may read and write the disk meanwhile. A fill changes nothing but holes, which it
 * looks at under the unit's lock, so what a guest writes stays. Only for the switch, the record on
 * disk and the chain in memory, requests are held up.
 *
 * The image may be a lower one of an open disk. It is thawed for the time of the rebase; the guest
 * writes to the images above it, and reads the same from it all the time. */
#include "ops/rebase.h"

#include "base/cleanup.h"
#include "ops/fingerprint.h"

static struct dr_image *new_parent(const struct rebase *rb)
{
    return rb->above ? rb->above->images[rb->above_first] : NULL;
}

/* ------------------------------------------------------------------ what may be refused */

static int check_overlay(const struct rebase *rb, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb);
    if (!(image->fmt->flags & DR_FORMAT_BACKING) || !image->fmt->set_backing)
        return dr_fail(err, ENOTSUP, "%s: %s images have no backing file to change", rb->path,
                       image->fmt->name);
    if (!rb->o->dry_run && rb->at == 0 && !image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", rb->path);
    if (rb->shared && !rb->o->unsafe && image->backing_name && rb->old->n == 1)
        return dr_fail(err, EINVAL,
                       "%s: was opened without its backing file %s: nothing to copy from", rb->path,
                       image->backing_name);
    if (rb->o->compress && !rb->o->unsafe) {
        int r = dr_compress_check(image, err);
        if (r < 0)
            return r;
    }
    return rebase_retire_check(rb, err);
}

/* Snapshots inside the overlay have the same parent: where the driver can, what they show is filled
 * in, too. Else, and when told to, refuse. */
static int begin_views(struct rebase *rb, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb);
    size_t n;
    int r = dr_image_snapshot_count(image, &n, err);
    if (r < 0 || n == 0 || (!rb->name && !image->backing_name))
        return r;
    if (rb->o->refuse_snapshots || !image->fmt->views_begin)
        return dr_ops_refuse_snapshots(image, "another backing file", err);
    r = dr_image_views_begin(image, &rb->views, err);
    rb->has_views = r == 0;
    return r;
}

/* The new parent may be one of the old ones: then its images are there already. */
static int find_in_chain(struct rebase *rb, struct dr_error *err)
{
    struct dr_file_id id;
    int r = dr_name_identify(rb->fs, rb->where, &id, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: the new backing file", rb->path);
    struct dr_chain *chain = rb->old;
    if (dr_same_id(dr_image_id(rebase_overlay(rb)), id))
        return dr_fail(err, ELOOP, "%s: cannot be its own backing file", rb->path);
    for (unsigned i = 0; i < rebase_overlay(rb)->n_files; i++)
        if (dr_ids_overlap(rebase_overlay(rb)->files[i]->id, id))
            return dr_fail(err, ELOOP, "%s: %s holds its own data and cannot be its backing file",
                           rb->path, rb->where);
    for (size_t i = 1; i < chain->n; i++) {
        if (!dr_same_id(dr_image_id(chain->images[i]), id))
            continue;
        const char *is = chain->images[i]->fmt->name, *given = rb->o->backing_format;
        if (given && strcmp(given, is) != 0)
            return dr_fail(err, EINVAL, "%s: the new backing file %s is open as %s, not as %s",
                           rb->path, rb->where, is, given);
        rb->above = chain;
        rb->above_first = i;
    }
    return 0;
}

static int refuse_loop(const struct rebase *rb, const struct dr_chain *chain, struct dr_error *err)
{
    for (size_t i = 0; i < chain->n; i++)
        if (dr_ids_overlap(dr_image_id(chain->images[i]), dr_image_id(rebase_overlay(rb))))
            return dr_fail(err, ELOOP, "%s: is itself a backing file of %s: a loop", rb->path,
                           rb->where);
    return 0;
}

/* Locks would refuse the overlay as its own ancestor too, without a reason. */
static int look_for_loop(const struct rebase *rb, const struct dr_open_options *as,
                         struct dr_error *err)
{
    struct dr_open_options open = *as;
    open.flags |= DR_OPEN_NO_LOCK | DR_OPEN_FORCE_SHARE;
    CLEANUP_DISK struct dr_disk *disk = NULL;
    int r = dr_open_fs(rb->fs, rb->where, &open, &disk, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot open the new backing file", rb->path);
    return refuse_loop(rb, disk->chain, err);
}

static int open_parent(struct rebase *rb, struct dr_error *err)
{
    struct dr_open_options open = rb->o->open;
    open.backing = open.backing_format = NULL;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED | DR_OPEN_NO_BACKING);
    open.flags |= rb->o->force_share ? DR_OPEN_FORCE_SHARE : 0u;
    int r = dr_ops_parent_format(rb->fs, rebase_overlay(rb)->fmt, rb->path, rb->name,
                                 rb->o->backing_format, &open.format, err);
    if (r == 0)
        r = dr_gate_check(rb->fs, rb->path, rb->where, &open, err);
    if (r == 0)
        r = find_in_chain(rb, err);
    if (r < 0 || rb->above)
        return r;
    r = look_for_loop(rb, &open, err);
    if (r < 0)
        return r;
    r = dr_open_fs(rb->fs, rb->where, &open, &rb->parent, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot open the new backing file", rb->path);
    rb->above = rb->parent->chain;
    return dr_chain_check_length(rb->path, rb->at + rb->above->n + 1, err);
}

static const char *recorded_format(const struct rebase *rb)
{
    if (!rb->name || rb->o->backing_format)
        return rb->name ? rb->o->backing_format : NULL;
    return rebase_overlay(rb)->fmt->parent_format;
}

static int set_backing(struct rebase *rb, unsigned flags, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb);
    return dr_image_set_backing(image, new_parent(rb), rb->recorded, recorded_format(rb), flags,
                                err);
}

/* What differs in size works here, and in QEMU. */
static void warn_about_sizes(const struct rebase *rb)
{
    const struct dr_image *parent = new_parent(rb), *image = rebase_overlay(rb);
    if (!parent || parent->size == image->size)
        return;
    dr_job_message(rb->job, "%s has %llu bytes, its new backing file %s %llu: %s%s", rb->path,
                   (unsigned long long)image->size, parent->path, (unsigned long long)parent->size,
                   parent->size < image->size ? "behind the end of that the disk reads as zeros"
                                              : "what that has behind the disk's end is not shown",
                   image->fmt->flags & DR_FORMAT_CONTENT_ID
                       ? ". VMware opens no chain whose disks are not all of one size: for it, "
                         "resize one of them"
                       : "");
}

/* ------------------------------------------------------------------ the switch */

int rebase_make_chain(const struct rebase *rb, const struct dr_chain *present,
                      struct dr_chain **chain, struct dr_error *err)
{
    size_t kept = rb->at + 1, below = rb->above ? rb->above->n - rb->above_first : 0;
    CLEANUP_FREE struct dr_image **images = calloc(kept + below, sizeof(struct dr_image *));
    *chain = NULL;
    if (!images)
        return dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
    for (size_t i = 0; i < kept; i++)
        images[i] = dr_image_ref(present->images[i]);
    for (size_t i = 0; i < below; i++)
        images[kept + i] = dr_image_ref(rb->above->images[rb->above_first + i]);
    *chain = dr_chain_new(images, kept + below);
    return *chain ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
}

/* The disk's flushes pass over a lower image while it is filled. */
static int flush(const struct rebase *rb, struct dr_chain *present, struct dr_error *err)
{
    int r = dr_image_flush(rebase_overlay(rb), err);
    return r < 0 ? r : dr_chain_flush(present, 0, err);
}

static int switch_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    struct dr_chain *next = NULL;
    int r = rebase_make_chain(rb, present, &next, err);
    if (r == 0)
        r = rebase_fill_rest(rb, err);
    if (r == 0)
        r = flush(rb, present, err);
    if (r == 0)
        r = set_backing(rb, 0, err);
    if (r == 0)
        *fresh = DR_STEAL(next);
    dr_chain_unref(next, NULL);
    return r;
}

/* Of a parent that was forced upon the image only the name is changed: whoever has the disk open
 * goes on with the old parents. */
static int record_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    (void)fresh;
    int r = flush(rb, present, err);
    return r < 0 ? r : set_backing(rb, 0, err);
}

static void announce_print(const struct rebase *rb)
{
    if (rb->has_print && rb->above && !rb->retire)
        ops_fingerprint_announce(rebase_overlay(rb), rb->recorded, rb->above, rb->above_first);
}

static int switch_parent(struct rebase *rb, struct dr_error *err)
{
    /* A process that wrote the new parents may have left them in memory. */
    int r = rb->above ? dr_chain_harden(rb->above, rb->above_first, err) : 0;
    if (r == 0)
        r = dr_job_before_switch(rb->job, err);
    if (r < 0)
        return r;
    announce_print(rb);
    uint64_t pause = 0;
    if (rb->retire)
        r = rebase_own_rest(rb, err); /* so that little is left while requests wait */
    if (r == 0)
        r = dr_disk_quiesce(rb->disk,
                            rb->o->unsafe && rb->o->force ? record_step
                            : rb->retire                  ? rebase_retire_step
                                                          : switch_step,
                            rb, &pause, err);
    dr_job_held(rb->job, pause);
    return r == 0 && rb->retire ? rebase_retire_end(rb, err) : r;
}

/* ------------------------------------------------------------------ the two ways */

/* A disk without a parent may forget what its guest discards: the units are holes again, and would
 * show the new parent, or not be the plain file's own. */
static int watch_discards(struct rebase *rb, struct dr_error *err)
{
    if (!rb->shared || (!rb->name && !rb->retire) || rb->at > 0 || rb->old->n > 1)
        return 0;
    return dr_dirty_begin(&rb->dirty, rb->disk, err);
}

static int prepare_safe(struct rebase *rb, struct dr_error *err)
{
    int r = rb->name ? open_parent(rb, err) : 0;
    if (r == 0)
        r = set_backing(rb, DR_TRY, err);
    if (r == 0)
        r = begin_views(rb, err);
    if (r == 0)
        r = rebase_check_space(rb, err);
    return r;
}

static int rebase_prepared(struct rebase *rb, struct dr_error *err)
{
    warn_about_sizes(rb);
    int r = watch_discards(rb, err);
    if (r == 0)
        r = dr_image_harden(rebase_overlay(rb), err); /* what a rebase that was killed has done */
    if (r == 0)
        r = rebase_fill(rb, err);
    if (r == 0)
        r = switch_parent(rb, err);
    dr_dirty_end(&rb->dirty);
    return r;
}

/* Of a dry run. */
static int make_plan(struct rebase *rb, struct dr_error *err)
{
    struct dr_rebase_plan plan = {.free = dr_ops_image_space(rebase_overlay(rb))};
    warn_about_sizes(rb);
    int r = rb->o->plan && !rb->o->unsafe ? rebase_count_fill(rb, &plan.copied, err) : 0;
    if (r == 0 && rb->o->plan && !rb->o->unsafe)
        r = rebase_count_equal(rb, &plan.freed, err);
    if (r == 0 && rb->o->plan)
        *rb->o->plan = plan;
    return r;
}

static int rebase_safe(struct rebase *rb, struct dr_error *err)
{
    int r = prepare_safe(rb, err);
    if (r == 0)
        r = rb->o->dry_run ? make_plan(rb, err) : rebase_prepared(rb, err);
    if (rb->has_views) /* it did not get as far as the end of the copy */
        dr_image_views_end(rebase_overlay(rb), NULL);
    return r < 0 || rb->o->dry_run ? r : rebase_drop_equal(rb, err);
}

/* With force: open the parent alone, for its id, and do without it if it does not open. */
static void open_parent_forced(struct rebase *rb)
{
    struct dr_open_options open = rb->o->open;
    const struct dr_format *fmt = rebase_overlay(rb)->fmt;
    open.format = rb->o->backing_format ? rb->o->backing_format
                  : fmt->parent_format  ? fmt->parent_format
                                        : fmt->default_parent; /* never found out */
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    open.flags |= DR_OPEN_NO_BACKING | DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    struct dr_file_id id;
    if (dr_name_identify(rb->fs, rb->where, &id, NULL) < 0 ||
        dr_ids_overlap(id, dr_image_id(rebase_overlay(rb))))
        return;
    if (dr_open_fs(rb->fs, rb->where, &open, &rb->parent, NULL) == 0)
        rb->above = rb->parent->chain;
}

/* ------------------------------------------------------------------ the record of the parent
 */

static void load_print(struct rebase *rb)
{
    struct dr_error why = DR_ERROR_INIT; /* a damaged one is written anew */
    int r = dr_fingerprint_load(rebase_overlay(rb), &rb->print, &why);
    rb->has_print = r == 1 || r == -EBADMSG;
    if (r < 0)
        rb->print.format[0] = '\0';
}

/* Of a rebase that copies nothing: the new parent has to be what the old one was. */
static int check_print(const struct rebase *rb, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    if (!rb->has_print || !rb->name || !rb->print.format[0])
        return 0;
    int r = ops_fingerprint_verify(rebase_overlay(rb), rb->above, rb->above_first, &rb->print, true,
                                   &why);
    if (r != -ESTALE)
        return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
    return dr_fail(err, ESTALE,
                   "%s. Without copying, the disk would show something else; if it is the right "
                   "one all the same: --force",
                   why.text);
}

/* After the switch. A record that cannot be written is no failure of what was done. */
static void renew_print(const struct rebase *rb)
{
    struct dr_error why = DR_ERROR_INIT;
    const struct dr_image *image = rebase_overlay(rb);
    if (!rb->has_print || rb->o->dry_run)
        return;
    int r = rb->name && rb->above && !rb->retire
                ? ops_fingerprint_renew(image, rb->above, rb->above_first, &why)
                : dr_fingerprint_remove(rb->fs, image->files[0]->path, &why);
    if (r < 0)
        dr_job_message(rb->job, "%s: is rebased, but its new parent was not recorded: %s", rb->path,
                       why.text);
}

static int rebase_unsafe(struct rebase *rb, struct dr_error *err)
{
    int r = 0;
    if (rb->name && rb->o->force)
        open_parent_forced(rb);
    else if (rb->name)
        r = open_parent(rb, err);
    if (r == 0 && !rb->o->force)
        r = check_print(rb, err);
    if (r == 0)
        r = set_backing(rb, DR_TRY, err);
    if (r < 0 || rb->o->dry_run)
        return r < 0 ? r : make_plan(rb, err);
    warn_about_sizes(rb);
    /* A program that was killed may have copied into the overlay what the old parent had, as a
     * stream does: the switch must not be durable before that. */
    r = dr_image_harden(rebase_overlay(rb), err);
    return r < 0 ? r : switch_parent(rb, err);
}

/* ------------------------------------------------------------------ a lower image */

/* What is known of frozen images does not hold for thawed ones, and the other way round: the same
 * images get another chain. */
static int renew_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    const struct rebase *rb = user;
    *fresh = dr_chain_tail(present, 0);
    return *fresh ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
}

static int thaw(struct rebase *rb, struct dr_error *err)
{
    uint64_t pause = 0;
    if (rb->at == 0 || rb->o->dry_run)
        return 0;
    int r = dr_image_thaw(rebase_overlay(rb), true, err);
    rb->thawed = r == 0;
    if (r == 0) /* where its file system is full, the guest's flushes must not fail */
        rebase_overlay(rb)->masked = true;
    if (r == 0)
        r = dr_disk_quiesce(rb->disk, renew_step, rb, &pause, err);
    dr_job_held(rb->job, pause);
    return r;
}

static int freeze_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    struct dr_chain *next = NULL;
    int r = renew_step(rb, present, &next, err);
    if (r == 0)
        r = dr_image_freeze(rebase_overlay(rb), err);
    if (r == 0) {
        dr_chain_renew_index(next); /* made while the image was writable, since that may fail */
        *fresh = DR_STEAL(next);
    }
    dr_chain_unref(next, NULL);
    return r;
}

static int give_up_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    struct rebase *rb = user;
    (void)err;
    dr_image_give_up(rebase_overlay(rb));
    *fresh = dr_chain_tail(present, 0); /* without memory, it goes on without its index */
    return 0;
}

/* r: of what was done while the image was thawed. What a failure leaves in it changes no view. */
static int freeze(struct rebase *rb, int r, struct dr_error *err)
{
    uint64_t pause = 0;
    if (!rb->thawed)
        return r;
    int frozen = r == 0 ? dr_disk_quiesce(rb->disk, freeze_step, rb, &pause, err)
                        : dr_disk_quiesce_unflushed(rb->disk, freeze_step, rb, &pause, NULL);
    dr_job_held(rb->job, pause);
    if (frozen < 0) /* its flushes fail: those of the disk must not */
        dr_disk_quiesce_unflushed(rb->disk, give_up_step, rb, &pause, NULL);
    return r < 0 ? r : frozen;
}

/* ------------------------------------------------------------------ on an open disk, and by path
 */

/* The chain that begins with the image which gets another parent. */
static int find_overlay(struct rebase *rb, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(rb->disk);
    const char *top = chain->images[0]->path;
    int r = 0;
    rb->at = rb->o->image ? dr_ops_member(chain, rb->o->image) : 0;
    if (rb->at >= chain->n)
        r = dr_fail(err, EINVAL, "%s: '%s' is not an image of its chain", top, rb->o->image);
    else if (rb->at > 0 && !rb->o->dry_run && !chain->images[0]->writable)
        r = dr_fail(err, EROFS, "%s: is open for reading only", top);
    else if (!(rb->old = rb->at ? dr_chain_tail(chain, rb->at) : dr_chain_ref(chain)))
        r = dr_fail(err, ENOMEM, "%s: out of memory", top);
    dr_chain_unref(chain, NULL);
    return r;
}

static int rebase_claimed(struct rebase *rb, struct dr_error *err)
{
    int r = find_overlay(rb, err);
    if (!rb->old)
        return r;
    rb->path = rebase_overlay(rb)->path;
    rb->name = rb->o->backing && *rb->o->backing ? rb->o->backing : NULL;
    rb->recorded = rb->recorded ? rb->recorded : rb->name;
    r = check_overlay(rb, err);
    if (r == 0 && rb->name) {
        rb->where = dr_ops_resolve(rb->path, rb->name);
        r = rb->where ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
    }
    if (r == 0)
        load_print(rb);
    if (r == 0)
        r = thaw(rb, err);
    if (r == 0)
        r = rb->o->unsafe ? rebase_unsafe(rb, err) : rebase_safe(rb, err);
    r = freeze(rb, r, err);
    if (r == 0)
        renew_print(rb);
    dr_ops_close(&rb->parent, NULL);
    int closed = dr_chain_unref(rb->old, r == 0 ? err : NULL);
    free(rb->where);
    return r < 0 ? r : closed;
}

int dr_ops_rebase(struct dr_disk *disk, const struct dr_rebase_options *options,
                  const char *recorded, bool retire, bool shared, struct dr_job *job,
                  struct dr_error *err)
{
    struct rebase rb = {.fs = disk->fs,
                        .o = options,
                        .job = job,
                        .disk = disk,
                        .recorded = recorded,
                        .shared = shared,
                        .retire = retire};
    int r = dr_disk_claim(disk, "rebase", err);
    if (r < 0)
        return r;
    if (!options->dry_run)
        r = dr_ops_freeze_parents(disk, job, err);
    if (r == 0)
        r = rebase_claimed(&rb, err);
    dr_disk_unclaim(disk);
    return r;
}

int dr_disk_rebase(struct dr_disk *disk, const struct dr_rebase_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE(options->backing, err);
    int r = dr_job_begin_beside(job, disk, err);
    return r < 0 ? r : dr_job_end(job, dr_ops_rebase(disk, options, NULL, false, true, job, err));
}

int dr_rebase_fs(struct dr_fs *fs, const char *path, const struct dr_rebase_options *options,
                 struct dr_job *job, struct dr_error *err)
{
    struct dr_open_options open = options->open;
    struct dr_disk *disk = NULL;
    /* a rehearsal needs no more than reading */
    open.flags |= options->dry_run ? 0u : DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    open.flags |= options->unsafe ? DR_OPEN_NO_BACKING : 0u;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = dr_ops_rebase(disk, options, NULL, false, false, job, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_rebase(const char *path, const struct dr_rebase_options *options, struct dr_job *job,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE(options->backing, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_rebase_fs(dr_fs_posix(), path, options, job, err));
}
