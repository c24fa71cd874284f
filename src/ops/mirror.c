/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* mirror: copy an open disk into another image while its guest goes on, and let the disk go on with
 * that image.
 *
 * A new target is made aside and gets its name when it is complete and durable, while requests
 * wait: killed before, the disk is where it was; killed afterwards, both images hold the same, and
 * the target is whole. What follows the guest is a bitmap of what it changes (follow.h). */
#include "base/cleanup.h"
#include "ops/follow.h"
#include "ops/ops-internal.h"

struct mirror {
    struct dr_fs *fs;
    const struct dr_mirror_options *o;
    struct dr_job *job;
    struct dr_disk *disk;
    const char *target;
    struct dr_chain *chain; /* the disk when it began */
    size_t last;            /* images[0..last) are copied */
    const struct dr_format *fmt;
    struct dr_new_image fresh; /* of a new target */
    char *parent;              /* what a new target of the top image alone stands on, by the name
                                  that opens it: the target's header may have no password */
    struct dr_disk *out;
    struct dr_follow follow;
    bool pivot;
};

/* ------------------------------------------------------------------ the target */

static unsigned out_flags(const struct mirror *m)
{
    const unsigned kept = DR_OPEN_NO_FLUSH | DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_DIRECT;
    return DR_OPEN_RDWR | (m->disk->flags & kept) | m->o->open.flags;
}

static const struct dr_image *parent_of(const struct mirror *m)
{
    return m->o->top && m->chain->n > 1 ? m->chain->images[1] : NULL;
}

static int open_out(struct mirror *m, const char *path, unsigned flags, const char *parent,
                    struct dr_disk **out, struct dr_error *err)
{
    struct dr_open_options open = m->o->open;
    open.format = m->fmt ? m->fmt->name : m->o->format;
    open.flags = out_flags(m) | flags;
    open.backing = parent;
    open.backing_format = parent ? parent_of(m)->fmt->name : NULL;
    open.key_secret = dr_ops_key_secret(m->o->pairs, m->o->n_pairs);
    int r = dr_open_fs(m->fs, path, &open, out, err);
    if (r == 0 && dr_size(*out) != m->follow.size)
        r = dr_fail(err, EINVAL, "%s: holds %llu bytes, and the disk has %llu", m->target,
                    (unsigned long long)dr_size(*out), (unsigned long long)m->follow.size);
    return r;
}

static int create_out(struct mirror *m, struct dr_error *err)
{
    const struct dr_image *parent = parent_of(m);
    CLEANUP_FREE char *name = parent ? dr_ops_name_of(m->fs, m->target, m->chain, 1) : NULL;
    const struct dr_create_params what = {
        .size = m->follow.size,
        .backing = parent ? m->chain->images[1] : NULL,
        .backing_name = name,
        .backing_format = parent ? parent->fmt->name : NULL,
        .stop = dr_job_stop_flag(m->job),
        .all_new = true,
        .force = true,
    };
    if (parent && !name)
        return dr_fail(err, ENOMEM, "%s: out of memory", m->target);
    int r = dr_new_create(&m->fresh, m->fmt, &what, m->o->pairs, m->o->n_pairs, out_flags(m), err);
    if (r == 0)
        r = dr_new_check_places(&m->fresh, err);
    m->parent = parent ? strdup(parent->path) : NULL;
    if (r == 0 && parent && !m->parent)
        r = dr_fail(err, ENOMEM, "%s: out of memory", m->target);
    return r < 0 ? r : open_out(m, m->fresh.path, DR_OPEN_UNCHANGED, m->parent, &m->out, err);
}

/* A target that holds a part of the disk must show the rest as the disk does. */
static int check_parents(const struct mirror *m, struct dr_error *err)
{
    const struct dr_chain *out = m->out->chain;
    bool same = out->n == m->chain->n;
    for (size_t i = 1; same && i < out->n; i++)
        same = dr_same_id(dr_image_id(out->images[i]), dr_image_id(m->chain->images[i]));
    return same ? 0
                : dr_fail(err, EINVAL, "%s: does not have the parents of %s, whose data it lacks",
                          m->target, m->chain->images[0]->path);
}

/* Bitmaps in an existing target may be what this mirror has put there before it was interrupted:
 * they get what ours have besides. */
static int check_bitmaps(const struct mirror *m, struct dr_error *err)
{
    if (!m->o->bitmaps)
        return 0;
    const struct dr_image *to = m->out->chain->images[0];
    if (!dr_image_bitmaps_inside(to)) /* a file beside it would not get its name with it */
        return dr_fail(err, ENOTSUP, "Format driver '%s' does not support bitmaps inside",
                       to->fmt->name);
    const struct dr_convert_options passing = {.skip_broken_bitmaps = true};
    int r = dr_ops_bitmaps_check(m->disk, m->out, &passing, err);
    if (r != -EEXIST || !m->o->existing)
        return r;
    dr_error_reset(err);
    return 0;
}

static int make_target(struct mirror *m, struct dr_error *err)
{
    if (m->o->only_new && !m->o->existing)
        return dr_fail(err, EINVAL,
                       "%s: a target that gets only what is written from now on must exist",
                       m->target);
    if (dr_ops_reads(m->fs, m->chain, m->target))
        return dr_fail(err, EBUSY,
                       "%s: belongs to the disk itself: the target must be another file",
                       m->target);
    if (m->o->existing) {
        int r = open_out(m, m->target, 0, NULL, &m->out, err);
        if (r == 0) /* it is not found out again: what a guest wrote into a raw one would decide */
            m->fmt = m->out->chain->images[0]->fmt;
        return r == 0 && m->o->top ? check_parents(m, err) : r;
    }
    m->fmt = dr_ops_format(m->o->format ? m->o->format : m->chain->images[0]->fmt->name,
                           DR_FORMAT_CREATE | (parent_of(m) ? DR_FORMAT_BACKING : 0u), err);
    if (!m->fmt)
        return err ? -err->errnum : -EINVAL;
    if (dr_fs_exists(m->fs, m->target))
        return dr_fail(err, EEXIST, "%s: exists already", m->target);
    /* Nothing has the name, but parts that an interrupted attempt has moved give way. */
    int r = dr_new_begin(&m->fresh, m->fs, m->target, false, out_flags(m), err);
    return r < 0 ? r : create_out(m, err);
}

/* ------------------------------------------------------------------ the copy */

static void transfer_init(void *user, bool first, struct dr_transfer *t)
{
    const struct mirror *m = user;
    *t = (struct dr_transfer){
        .dst = m->out->chain,
        .sparse = DR_CONVERT_SPARSE_DEFAULT,
        .hole_is_zero = m->last == m->chain->n,
        /* else it is new, and empty */
        .write_zeros = !first || m->o->existing || parent_of(m) ||
                       (m->fmt->flags & DR_FORMAT_NOISE),
        .zero_flags = DR_MAY_UNMAP,
        .job = m->job,
    };
    t->block = dr_stock_block(t->dst, 0, DR_CONVERT_SPARSE_DEFAULT);
    dr_walk_init(&t->walk, m->chain, 0, m->last, m->follow.size);
}

static int flush_out(void *user, struct dr_error *err)
{
    const struct mirror *m = user;
    return dr_chain_flush(m->out->chain, 0, err);
}

static int flush_disk(void *user, struct dr_error *err)
{
    const struct mirror *m = user;
    return dr_chain_flush(m->chain, 0, err);
}

static int copy(struct mirror *m, struct dr_error *err)
{
    int r = dr_follow_all(&m->follow, err);
    if (r == 0)
        r = dr_follow_rounds(&m->follow, err);
    if (r == 0)
        r = dr_follow_until_told(&m->follow, err);
    if (r == 0) /* the next failure is the end: little shall be left for it */
        r = dr_follow_catch_up(&m->follow, err);
    if (!m->o->write_blocking)
        dr_follow_stop(&m->follow); /* whoever is asked next may take long */
    if (r == 0)
        r = dr_job_before_switch(m->job, err);
    return r < 0 ? r : dr_follow_draw_near(&m->follow, flush_disk, err);
}

/* ------------------------------------------------------------------ the end */

/* The target gets its name, if it is new. It is closed, and durable. */
static int publish(struct mirror *m, struct dr_error *err)
{
    int r = dr_ops_close(&m->out, err);
    return r < 0 || m->o->existing ? r : dr_new_publish(&m->fresh, err);
}

/* After this failure the disk goes on with what it had: the target is a whole copy. */
static int take_over(struct mirror *m, struct dr_chain **fresh, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *out = NULL;
    const struct dr_switch to = {m->disk, m->target, m->fmt->name};
    int r = open_out(m, m->target, 0, m->parent, &out, err);
    if (r == 0)
        r = dr_job_record(m->job, &to, 1, err);
    if (r < 0)
        return dr_prefix(err, r, "%s was made, but the disk goes on without it", m->target);
    *fresh = dr_disk_chain(out);
    return 0;
}

static int end_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                    struct dr_error *err)
{
    struct mirror *m = user;
    int r = dr_follow_rest(&m->follow, err);
    if (r == 0)
        r = flush_out(m, err);
    if (r == 0 && m->o->bitmaps)
        r = dr_ops_bitmaps_move(present->images[0], m->out->chain->images[0], m->job, err);
    /* What the guest has flushed must be durable in the old images, too, should the target not open
     * again: the target's name is what decides. */
    if (r == 0)
        r = dr_chain_flush(present, 0, err);
    if (r < 0 || !m->pivot)
        return r;
    r = publish(m, err);
    return r < 0 ? r : take_over(m, fresh, err);
}

static int end(struct mirror *m, struct dr_error *err)
{
    uint64_t pause = 0;
    m->pivot = !m->job || atomic_load(&m->job->complete) != DR_COMPLETE_COPY;
    int r = dr_disk_quiesce_unflushed(m->disk, end_step, m, &pause, err);
    dr_job_held(m->job, pause);
    return r < 0 || m->pivot ? r : publish(m, err);
}

/* ------------------------------------------------------------------ the whole */

/* The disk has gone over, or still has these images: either way it is too late for a failure, by
 * which a caller would take it that the disk has what it had. */
static void close_old(struct mirror *m)
{
    struct dr_error why = DR_ERROR_INIT;
    if (dr_chain_unref(m->chain, &why) < 0)
        dr_job_message(m->job, "the disk goes on with %s, but what it had did not close well: %s",
                       m->target, why.text);
}

static int mirror_claimed(struct mirror *m, struct dr_error *err)
{
    m->chain = dr_disk_chain(m->disk);
    m->last = m->o->top ? 1 : m->chain->n;
    m->follow = (struct dr_follow){.job = m->job,
                                   .size = m->chain->images[0]->size,
                                   .write_blocking = m->o->write_blocking,
                                   .only_new = m->o->only_new,
                                   .transfer = transfer_init,
                                   .flush = flush_out,
                                   .user = m};
    int r = make_target(m, err);
    if (r == 0 && m->out)
        r = check_bitmaps(m, err);
    if (r == 0)
        r = dr_follow_begin(&m->follow, m->disk, err);
    if (r == 0)
        r = copy(m, err);
    if (r == 0)
        r = end(m, err);
    dr_follow_end(&m->follow);
    dr_ops_close(&m->out, NULL);
    dr_new_abandon(&m->fresh);
    free(m->parent);
    close_old(m);
    return r;
}

int dr_disk_mirror(struct dr_disk *disk, const char *target,
                   const struct dr_mirror_options *options, struct dr_job *job,
                   struct dr_error *err)
{
    static const struct dr_mirror_options defaults;
    DR_REQUIRE(disk, err);
    DR_REQUIRE(target, err);
    int r = dr_job_begin_beside(job, disk, err);
    if (r < 0)
        return r;
    struct mirror m = {.fs = disk->fs,
                       .o = options ? options : &defaults,
                       .job = job,
                       .disk = disk,
                       .target = target};
    if (!dr_writable(disk))
        r = dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    else
        r = dr_disk_claim(disk, "mirror", err);
    if (r == 0) {
        r = mirror_claimed(&m, err);
        dr_disk_unclaim(disk);
    }
    return dr_new_hide(dr_job_end(job, r), target, err);
}
