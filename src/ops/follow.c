/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/follow.h"

#include <time.h>

#include "base/cleanup.h"

#define ROUNDS    8u                   /* of copying again what was changed, at most */
#define LITTLE    (UINT64_C(16) << 20) /* bytes for which no further round is worth it */
#define LEAST     (UINT64_C(1) << 20)  /* the same, once writes block: requests wait for them */
#define GATHER_NS UINT64_C(100000000)  /* between the first of some changes and copying them */
#define FLUSHES   5u                   /* of both sides before the switch, at most */
#define SHORT_NS  UINT64_C(5000000)    /* a flush that leaves next to nothing for one more */
#define PIECE     (UINT64_C(16) << 20) /* bytes of zeros that are locked at once */

/* ------------------------------------------------------------------ one piece */

/* Copy [from, to), which the caller has locked. *writing: a failure is that of the target. */
static int copy_piece(const struct dr_transfer *like, uint64_t from, uint64_t to,
                      uint8_t *const *buf, bool *writing, struct dr_error *err)
{
    struct dr_transfer t = *like;
    t.pos = from;
    t.walk.size = to;
    t.walk.run = (struct dr_run){0}; /* what was known of it is out of date */
    for (;;) {
        struct dr_copy_item item = {0};
        *writing = false;
        int r = dr_transfer_next(&t, &item, err);
        if (r <= 0)
            return r;
        r = dr_transfer_work(&t, &item, buf, err);
        *writing = r == 0;
        if (r == 0)
            r = dr_transfer_emit(&t, &item, buf, err);
        if (r < 0)
            return r;
    }
}

/* ------------------------------------------------------------------ the guest's side */

static void note(struct dr_follow *f, uint64_t off, uint64_t len)
{
    dr_dirty_set(&f->dirty, off, len);
    if (atomic_load(&f->idle) && atomic_exchange(&f->idle, false))
        dr_job_ring(f->job);
}

/* From off on, but not behind end: how far all grains are noted, or none is. */
static uint64_t alike_until(const struct dr_follow *f, uint64_t off, uint64_t end, bool *noted)
{
    uint64_t next = off;
    *noted = dr_dirty_any(&f->dirty, off, 1);
    do
        next = dr_round_down(next, DR_DIRTY_GRAIN) + DR_DIRTY_GRAIN;
    while (next < end && dr_dirty_any(&f->dirty, next, 1) == *noted);
    return dr_min(next, end);
}

/* Copy what the guest has just written, but for what is noted and so left to the job. */
static int copy_through(struct dr_follow *f, uint64_t off, uint64_t end)
{
    struct dr_range range;
    uint64_t from = dr_round_down(off, DR_DIRTY_GRAIN);
    CLEANUP_FREE uint8_t *buf = malloc(dr_min(end - off, DR_STOCK_BUFFER));
    if (!buf)
        return -ENOMEM;
    int r = 0;
    dr_range_lock(f->copying, &range, from, dr_round_up(end, DR_DIRTY_GRAIN) - from, true);
    for (uint64_t next; r == 0 && off < end; off = next) {
        bool noted, writing;
        next = alike_until(f, off, end, &noted);
        if (!noted)
            r = copy_piece(&f->again, off, next, &buf, &writing, NULL);
    }
    dr_range_unlock(f->copying, &range);
    return r;
}

/* The look first keeps the cache line shared between writers. */
static void touch(struct dr_follow *f, uint64_t off, uint64_t len)
{
    if (len > DR_DIRTY_GRAIN || !dr_dirty_any(&f->touched, off, len))
        dr_dirty_set(&f->touched, off, len);
}

/* The disk's hook: under the lock of the units, after the guest's write, before it is told. */
static void on_change(void *user, uint64_t off, uint64_t len)
{
    struct dr_follow *f = user;
    bool inside = len > 0 && dr_inside(off, len, f->size);
    if (atomic_load(&f->watching))
        touch(f, off, len);
    if (inside && atomic_load(&f->blocking) && !dr_job_paused(f->job)) {
        if (copy_through(f, off, off + len) == 0)
            return;
        atomic_store(&f->blocking, false);
    }
    note(f, off, len);
}

int dr_follow_begin(struct dr_follow *f, struct dr_disk *disk, struct dr_error *err)
{
    f->wants_blocking = f->write_blocking;
    f->copying = dr_ranges_new();
    if (!f->copying)
        return dr_fail(err, ENOMEM, "out of memory to follow a guest");
    return dr_dirty_begin_with(&f->dirty, disk, on_change, f, err);
}

void dr_follow_end(struct dr_follow *f)
{
    dr_dirty_end(&f->dirty);
    dr_dirty_free(&f->touched);
    dr_ranges_free(DR_STEAL(f->copying));
}

void dr_follow_watch(struct dr_follow *f)
{
    if (!f->dirty.disk || atomic_load(&f->watching))
        return;
    if (dr_dirty_make(&f->touched, f->dirty.size, NULL) == 0)
        atomic_store(&f->watching, true);
}

bool dr_follow_touched(const struct dr_follow *f, uint64_t off, uint64_t len)
{
    return atomic_load(&f->watching) && dr_dirty_any(&f->touched, off, len);
}

/* ------------------------------------------------------------------ the job's side */

struct rest {
    struct dr_follow *follow;
    struct dr_transfer walk;        /* finds what there is to copy */
    const struct dr_transfer *like; /* how it is copied */
};

/* The walk told the job of this item without a lock: now it is locked, and looked at again. */
static int rest_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    const struct rest *rest = user;
    uint64_t off = item->off, end = off + item->aux[0];
    int r = 0;
    for (uint64_t next; r == 0 && off < end; off = next) {
        struct dr_range range;
        next = dr_min(end, off + PIECE);
        dr_range_lock(rest->follow->copying, &range, off, next - off, true);
        r = copy_piece(rest->like, off, next, buf, &item->writing, err);
        dr_range_unlock(rest->follow->copying, &range);
    }
    return r;
}

static int rest_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct rest *rest = user;
    struct dr_transfer *t = &rest->walk;
    for (;;) {
        int r = dr_transfer_next(t, item, err);
        uint64_t off = t->pos, end;
        if (r != 0 || !dr_dirty_take(&rest->follow->dirty, &off, &end, UINT64_MAX))
            return r;
        t->pos = off;
        t->walk.size = dr_min(end, rest->follow->size);
        t->walk.run = (struct dr_run){0}; /* what was known of it is out of date */
    }
}

static int first_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    return dr_transfer_next(&((struct rest *)user)->walk, item, err);
}

static int run_rest(struct rest *rest, bool first, struct dr_job *job, struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = rest,
        .next = first ? first_next : rest_next,
        .work = rest_work,
        .repeat = DR_COPY_RETRY,
        .buffers = 1,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rest->like->walk.chain, rest->like->dst),
        .total = rest->follow->size,
        .silent = !first,
        .hurry = rest->follow->hurry,
    };
    return dr_copy_run(&policy, job, err);
}

/* One round. Writes that block, or have to again after a failure, block before it looks at what is
 * noted. job: NULL while requests wait, so that nobody pauses it there. */
static int run_round(struct dr_follow *f, struct dr_job *job, struct dr_error *err)
{
    struct rest rest = {.follow = f, .walk = f->again, .like = &f->again};
    atomic_store(&f->blocking, f->wants_blocking);
    rest.walk.pos = rest.walk.walk.size = 0;
    return run_rest(&rest, false, job, err);
}

int dr_follow_all(struct dr_follow *f, struct dr_error *err)
{
    struct dr_transfer first;
    f->transfer(f->user, true, &first);
    f->transfer(f->user, false, &f->again);
    if (f->only_new)
        return 0;
    if (!f->wants_blocking)
        return dr_transfer_run(&first, f->size, f->job, err);
    struct rest rest = {.follow = f, .walk = first, .like = &first};
    atomic_store(&f->blocking, true);
    return run_rest(&rest, true, f->job, err);
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

/* Is so much left after a round that another one like it is of little use? */
static bool no_progress(uint64_t before, uint64_t left)
{
    return left > before - before / 4;
}

int dr_follow_rounds(struct dr_follow *f, struct dr_error *err)
{
    int r = 0;
    if (!f->dirty.disk)
        return 0;
    uint64_t before = UINT64_MAX, left = dr_dirty_bytes(&f->dirty);
    for (unsigned i = 0; i < ROUNDS && left > LITTLE && !no_progress(before, left); i++) {
        r = run_round(f, f->job, err);
        if (r < 0)
            break;
        before = left;
        left = dr_dirty_bytes(&f->dirty);
    }
    return r < 0 ? r : flush_copy(f, err);
}

static bool is_told(const struct dr_job *job)
{
    return atomic_load(&job->complete) != DR_FOLLOW || dr_job_stopped(job);
}

/* Sleep until something is noted, and then a little, so that what changes time and again is not
 * copied each time. */
static void wait_for_changes(struct dr_follow *f)
{
    struct dr_job *job = f->job;
    uint32_t bell = dr_job_bell(job);
    atomic_store(&f->idle, true); /* before the look: what is noted after it rings */
    if (dr_dirty_bytes(&f->dirty) == 0 && !is_told(job) && !dr_job_paused(job))
        dr_job_sleep(job, bell, UINT64_MAX);
    atomic_store(&f->idle, false);
    bell = dr_job_bell(job);
    if (!is_told(job) && dr_dirty_bytes(&f->dirty) <= LITTLE)
        dr_job_sleep(job, bell, GATHER_NS);
}

int dr_follow_until_told(struct dr_follow *f, struct dr_error *err)
{
    struct dr_job *job = f->job;
    if (!job || !job->ready)
        return 0;
    int r = dr_job_rest(job, err);
    if (r == 0)
        job->ready(job->user);
    while (r == 0 && !is_told(job)) {
        wait_for_changes(f);
        if (!is_told(job) && dr_dirty_bytes(&f->dirty) > 0)
            r = run_round(f, job, err);
        if (r == 0)
            r = dr_job_rest(job, err);
    }
    return r < 0 ? r : dr_job_rest(job, err);
}

/* ------------------------------------------------------------------ the end */

/* A round leaves less than the one before unless the guest's writes could not block all the time
 * (the target fails now and then): then the next one must be faster than the guest. */
int dr_follow_catch_up(struct dr_follow *f, struct dr_error *err)
{
    int r = 0;
    if (!f->dirty.disk)
        return 0;
    uint64_t before = UINT64_MAX, left;
    f->wants_blocking = true;
    while (r == 0 && (left = dr_dirty_bytes(&f->dirty)) > LEAST) {
        f->hurry = f->hurry || no_progress(before, left);
        before = left;
        r = run_round(f, f->job, err);
        if (r == 0)
            r = dr_job_rest(f->job, err);
    }
    f->hurry = false;
    return r < 0 ? r : flush_copy(f, err);
}

static uint64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* What the guest writes during a flush is left for the next one, which takes the shorter the less
 * that is. Where it is not shorter the guest writes as fast as the flushes do: another one would
 * cost the guest as much and leave no less. */
int dr_follow_draw_near(struct dr_follow *f, int (*flush_disk)(void *user, struct dr_error *err),
                        struct dr_error *err)
{
    int r = dr_follow_catch_up(f, err);
    uint64_t before = UINT64_MAX, took;
    for (unsigned i = 0; r == 0 && i < FLUSHES; i++, before = took) {
        uint64_t start = now();
        r = flush_disk(f->user, err);
        if (r == 0)
            r = dr_follow_catch_up(f, err);
        took = now() - start;
        if (took <= SHORT_NS || no_progress(before, took))
            break;
    }
    return r;
}

void dr_follow_stop(struct dr_follow *f)
{
    f->wants_blocking = false;
    atomic_store(&f->blocking, false);
}

static int stop_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    (void)present, (void)fresh, (void)err;
    dr_follow_stop(user);
    return 0;
}

/* The gate is closed for a moment: a write that has begun to block must come to its end, or the
 * flush may miss what it copies. */
int dr_follow_settle(struct dr_follow *f, struct dr_error *err)
{
    uint64_t pause = 0;
    if (!f->dirty.disk)
        return f->flush(f->user, err);
    int r = dr_disk_quiesce_unflushed(f->dirty.disk, stop_step, f, &pause, err);
    dr_job_held(f->job, pause);
    return r < 0 ? r : f->flush(f->user, err);
}

int dr_follow_rest(struct dr_follow *f, struct dr_error *err)
{
    dr_follow_stop(f);
    return f->dirty.disk ? run_round(f, NULL, err) : 0;
}
