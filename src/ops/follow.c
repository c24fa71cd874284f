/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/follow.h"

#define ROUNDS    8u                   /* of copying again what was changed, at most */
#define REST_SIZE (UINT64_C(16) << 20) /* bytes that are copied while requests wait */
#define LOOK_NS   UINT64_C(100000000)  /* between two looks for changes, once all is copied */

struct rest {
    struct dr_transfer transfer;
    struct dr_dirty *dirty;
    uint64_t size, left; /* left: bytes of it to be copied yet */
};

static int rest_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct rest *rest = user;
    struct dr_transfer *t = &rest->transfer;
    for (;;) {
        int r = dr_transfer_next(t, item, err);
        uint64_t off = t->pos, end;
        if (r != 0 || rest->left == 0 || !dr_dirty_take(rest->dirty, &off, &end, rest->left))
            return r;
        rest->left -= dr_min(rest->left, end - off);
        t->pos = off;
        t->walk.size = dr_min(end, rest->size);
        t->walk.run = (struct dr_run){0}; /* what was known of it is out of date */
    }
}

int dr_follow_rest(struct dr_follow *f, uint64_t most, struct dr_job *job, struct dr_error *err)
{
    struct rest rest = {.dirty = &f->dirty, .size = f->size, .left = most};
    f->transfer(f->user, &rest.transfer);
    rest.transfer.walk.size = 0;
    struct dr_copy_policy policy = {
        .user = &rest,
        .next = rest_next,
        .work = dr_transfer_work,
        .emit = dr_transfer_emit,
        .repeat = DR_COPY_RETRY,
        .buffers = 1,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rest.transfer.walk.chain, rest.transfer.dst),
        .total = f->size,
        .silent = true,
    };
    return dr_copy_run(&policy, job, err);
}

/* A target that is full may notice it only when its metadata is written. */
static int flush_copy(struct dr_follow *f, struct dr_error *err)
{
    int r;
    do
        r = f->flush(f->user, err);
    while (r < 0 && (r = dr_job_after_failure(f->job, r, err)) == 0);
    return r;
}

int dr_follow_rounds(struct dr_follow *f, struct dr_error *err)
{
    int r = 0;
    if (!f->dirty.disk)
        return 0;
    for (unsigned i = 0; r == 0 && i < ROUNDS; i++) {
        if (dr_dirty_bytes(&f->dirty) <= REST_SIZE)
            break;
        r = dr_follow_rest(f, UINT64_MAX, f->job, err);
    }
    return r < 0 ? r : flush_copy(f, err);
}

int dr_follow_until_told(struct dr_follow *f, struct dr_error *err)
{
    struct dr_job *job = f->job;
    if (!job || !job->ready)
        return 0;
    int r = dr_job_rest(job, err);
    if (r == 0)
        job->ready(job->user);
    while (r == 0 && atomic_load(&job->complete) == DR_FOLLOW) {
        uint32_t bell = dr_job_bell(job);
        if (dr_dirty_bytes(&f->dirty) > 0)
            r = dr_follow_rest(f, UINT64_MAX, job, err);
        else if (atomic_load(&job->complete) == DR_FOLLOW && !dr_job_stopped(job))
            dr_job_sleep(job, bell, LOOK_NS);
        if (r == 0)
            r = dr_job_rest(job, err);
    }
    return r;
}

static int part_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    struct dr_follow *f = user;
    (void)present, (void)fresh;
    int r = dr_follow_rest(f, f->part, NULL, err);
    return r < 0 ? r : f->flush(f->user, err);
}

int dr_follow_catch_up(struct dr_follow *f, struct dr_error *err)
{
    uint64_t dirty = f->dirty.disk ? dr_dirty_bytes(&f->dirty) : 0, before;
    int r = 0;
    for (f->part = REST_SIZE; r == 0 && dirty > f->part; f->part *= dirty < before ? 1 : 2) {
        uint64_t pause = 0;
        before = dirty;
        r = dr_disk_quiesce_unflushed(f->dirty.disk, part_step, f, &pause, err);
        dr_job_held(f->job, pause);
        if (r == 0)
            r = dr_job_rest(f->job, err);
        dirty = dr_dirty_bytes(&f->dirty);
    }
    return r;
}
