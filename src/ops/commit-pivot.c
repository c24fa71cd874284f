/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The end of a commit of the active image: it is emptied, and with a pivot the disk goes on with
 * the base. */
#include "ops/commit.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ emptying C */

/* What the guest writes to all the time is left in C until requests wait: each write to what has
 * been dropped would copy a whole unit from P, and most of it would have to be dropped again. So
 * much of it takes some milliseconds then. */
#define HOT_UNITS 16384u

/* Is what the guest has written to lately few enough units? */
static bool spares_hot(const struct commit *c)
{
    const struct dr_image *top = commit_c(c);
    uint64_t uoff, ulen, grain = DR_DIRTY_GRAIN;
    if (!atomic_load(&c->follow.watching) || c->size == 0)
        return false;
    top->fmt->unit(top, 0, &uoff, &ulen);
    return dr_dirty_bytes(&c->follow.touched) / dr_min(ulen, grain) <= HOT_UNITS;
}

static bool is_cold(void *user, uint64_t off, uint64_t len)
{
    const struct commit *c = user;
    return !dr_follow_touched(&c->follow, off, len) && !dr_dirty_any(&c->follow.dirty, off, len);
}

static bool not_dirty(void *user, uint64_t off, uint64_t len)
{
    const struct commit *c = user;
    return !c->follow.dirty.disk || !dr_dirty_any(&c->follow.dirty, off, len);
}

/* The end of the range from off on in which everything is dirty, or nothing is. */
static uint64_t same_until(const struct commit *c, uint64_t off, uint64_t size, bool *dirty)
{
    uint64_t end = off;
    if (!c->follow.dirty.disk) {
        *dirty = false;
        return size;
    }
    *dirty = dr_dirty_any(&c->follow.dirty, off, 1);
    while (end < size && dr_dirty_any(&c->follow.dirty, end, 1) == *dirty)
        end += DR_DIRTY_GRAIN;
    return dr_min(end, size);
}

static int drop_clean(struct commit *c, struct dr_error *err)
{
    uint64_t size = commit_c(c)->size, end;
    int r = 0;
    for (uint64_t off = 0; r == 0 && off < size; off = end) {
        bool dirty;
        end = same_until(c, off, size, &dirty);
        if (!dirty)
            r = dr_chain_drop_if(c->chain, 0, off, end - off, not_dirty, c, err);
    }
    return r;
}

static int trim_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    const struct commit *c = user;
    struct dr_image *top = commit_c(c);
    (void)fresh;
    int r = dr_chain_flush(present, 0, err);
    return r < 0 ? r : top->fmt->trim(top, err);
}

/* As drop_clean, but leaves what the guest keeps writing to. */
static int drop_cold(struct commit *c, struct dr_error *err)
{
    if (!spares_hot(c))
        return drop_clean(c, err);
    uint64_t size = commit_c(c)->size, end;
    int r = 0;
    for (uint64_t off = 0; r == 0 && off < size; off = end) {
        end = dr_min(size, dr_round_down(off, DR_DIRTY_GRAIN) + DR_DIRTY_GRAIN);
        bool cold = is_cold(c, off, end - off);
        while (end < size && is_cold(c, end, 1) == cold)
            end = dr_min(size, end + DR_DIRTY_GRAIN);
        if (cold)
            r = dr_chain_drop_if(c->chain, 0, off, end - off, is_cold, c, err);
    }
    return r;
}

int commit_empty_top(struct commit *c, struct dr_error *err)
{
    struct dr_image *top = commit_c(c);
    int r = drop_clean(c, err);
    if (r == -ENOTSUP) {
        dr_job_message(c->job, "%s: cannot be emptied; it is valid as it is", c->path);
        return 0;
    }
    if (r == 0)
        r = dr_image_flush(top, err);
    if (r == 0 && top->fmt->trim)
        r = commit_quiesce(c, dr_disk_quiesce, trim_step, err);
    return r;
}

/* ------------------------------------------------------------------ pivot
 *
 * The disk goes on with P. C is emptied before, so that it reads through to P for ever: what P
 * holds durably and is clean is dropped while requests go on, but for what the guest keeps writing
 * to; the rest while they wait. Killed
 * before the last of it is dropped, C still masks P; killed afterwards, C and P read the same. */

bool commit_shall_pivot(const struct commit *c)
{
    return c->o->pivot && (!c->job || atomic_load(&c->job->complete) != DR_COMPLETE_COPY);
}

/* What was dropped is punched when the disk has gone over: until then the guest's writes would wait
 * for each punch, which holds the lock of the file's inode in the kernel. */
static int flush_top(void *user, struct dr_error *err)
{
    const struct commit *c = user;
    return dr_image_flush_keep(commit_c(c), err);
}

static int pivot_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct commit *c = user;
    struct dr_chain *next = dr_chain_tail(present, c->base);
    int r = next ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    if (r == 0)
        r = dr_follow_rest(&c->follow, err);
    if (r == 0)
        r = dr_image_flush(commit_p(c), err);
    if (r == 0)
        r = dr_chain_drop(present, 0, 0, commit_c(c)->size, err);
    if (r == 0)
        r = flush_top(c, err);
    if (r == 0)
        r = dr_ops_bitmaps_move(commit_c(c), commit_p(c), c->job, err);
    const struct dr_switch to = {c->disk, commit_p(c)->path, commit_p(c)->fmt->name};
    if (r == 0)
        r = dr_job_record(c->job, &to, 1, err);
    if (r == 0) {
        c->n_thawed = 0; /* P stays open for writing: it is the disk now */
        commit_p(c)->masked = false;
        *fresh = DR_STEAL(next);
    }
    dr_chain_unref(next, NULL);
    return r;
}

/* The disk has gone over: it is too late for a failure, by which a caller would take it that the
 * disk has the image that it had. */
static void leave_top(const struct commit *c, struct dr_image *top)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_image_flush(top, &why); /* what was dropped is free: so its file can be cut */
    if (r == 0 && top->fmt->trim)
        r = top->fmt->trim(top, &why);
    int closed = dr_image_unref(top, r == 0 ? &why : NULL);
    if (r < 0 || closed < 0)
        dr_job_message(c->job, "the disk goes on with %s, but what it had did not close well: %s",
                       c->chain->images[0]->path, why.text);
}

int commit_pivot(struct commit *c, struct dr_error *err)
{
    struct dr_image *top = dr_image_ref(commit_c(c));
    top->leaving = true;
    int r = dr_follow_settle(&c->follow, err);
    if (r == 0)
        r = drop_cold(c, err);
    if (r == 0)
        r = flush_top(c, err);
    if (r == 0)
        r = dr_follow_rounds(&c->follow, err);
    if (r == 0)
        r = dr_follow_draw_near(&c->follow, flush_top, err);
    if (r == 0)
        r = commit_quiesce(c, dr_disk_quiesce_unflushed, pivot_step, err);
    if (r == 0) {
        leave_top(c, top);
    } else {
        top->leaving = false;
        dr_image_unref(top, NULL);
    }
    return r;
}

int commit_check_pivot(const struct commit *c, struct dr_error *err)
{
    if (!c->o->pivot)
        return 0;
    if (!c->shared || c->first > 0)
        return dr_fail(err, EINVAL,
                       "%s: only the active image of an open disk is committed with a pivot",
                       c->path);
    if (c->size != commit_c(c)->size)
        return dr_fail(err, ENOTSUP, "%s: ends at %llu, and the disk has %llu bytes",
                       commit_p(c)->path, (unsigned long long)commit_p(c)->size,
                       (unsigned long long)commit_c(c)->size);
    return dr_ops_bitmaps_check_move(commit_c(c), commit_p(c), err);
}
