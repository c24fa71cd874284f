/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The one copy engine. It knows neither image nor chain.
 *
 *   next  one thread at a time: the items in order
 *   work  many threads: read, decode, compare, encode into the item's own buffers
 *   emit  by the thread that worked, or (ordered) one thread at a time in the order of next
 *
 * Workers, memory, rate, pause, cancelling and progress belong to the engine; what is copied and
 * where to is the policy's. Memory is fixed when the run starts: every buffer is there,
 * page-aligned and touched, before the first item. No lock of the engine is held while work or emit
 * runs.
 */
#ifndef DR_OPS_COPY_H
#define DR_OPS_COPY_H

#include "ops/job.h"

#define DR_COPY_BUFFERS 2  /* at most, for one item */
#define DR_COPY_CPUS    16 /* workers that processors are counted for */
#define DR_COPY_WORKERS 64 /* workers at most, for files that take many requests at once */

struct dr_copy_item {
    uint64_t off, len; /* the policy's; the engine counts len for rate and progress */
    uint64_t passed;   /* bytes in front of it that needed no work: progress only */
    uint64_t aux[3];   /* the policy's */
    unsigned kind;     /* the policy's */
    bool writing; /* set for emit, and by a work that writes: a failure is that of the target */
};

/* What may become of an item that has failed, if whoever made the job does not take it for the end.
 * But for ONCE, next, work and emit are called again after a failure, next with the same item; not
 * in an ordered run. */
enum dr_copy_repeat {
    DR_COPY_ONCE,  /* nothing: the run has failed */
    DR_COPY_RETRY, /* it is tried again, until it succeeds or the job is cancelled */
    DR_COPY_SKIP,  /* so it is, if the job was paused for it; what is ignored is left out, and the
                      run fails at its end */
};

/* Where the time comes from; tests bring their own. */
struct dr_copy_clock {
    uint64_t (*now)(void *user); /* nanoseconds */
    /* NULL = sleep until the job changes, ns at most */
    void (*sleep)(void *user, uint64_t ns);
    void *user;
};

struct dr_copy_policy {
    void *user;
    /* 1 = *item is the next one, 0 = there are no more, negative errno. The item comes zeroed. On
     * 0, item->passed counts what was skipped at the end. */
    int (*next)(void *user, struct dr_copy_item *item, struct dr_error *err);
    /* buf: `buffers` buffers of buffer_size bytes, the item's alone until emit is done. Either may
     * be NULL. Anything but 0 stops the run with that result; a positive one is "enough, all is
     * well" and is not a failure. */
    int (*work)(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err);
    int (*emit)(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err);
    bool ordered;
    enum dr_copy_repeat repeat;
    unsigned buffers; /* 0..DR_COPY_BUFFERS for each item */
    size_t buffer_size;
    /* How many requests the files want to be under way at once (dr_stock_depth); 0 = local files, a
     * worker a processor is enough. Each worker has one request under way, so this many are
     * started, unless the job says how many it wants. */
    unsigned depth;
    /* For progress: bytes of this run, and those of the same job before and after it. */
    uint64_t total, before, after;
    bool silent;                       /* no progress: the job counts other runs */
    bool hurry;                        /* do not give way to those who use the job's disk */
    const struct dr_copy_clock *clock; /* NULL = the system's */
};

/* 0 when all items are emitted, the positive result of a policy that had enough, or the first
 * failure (the others are forgotten); -ECANCELED when the job was stopped. In each case no thread
 * of the run is left and nothing of the policy is called any more. job may be NULL. */
int dr_copy_run(const struct dr_copy_policy *policy, struct dr_job *job, struct dr_error *err);

/* How many threads a run gets: what the job asks for, else one a processor (at most DR_COPY_CPUS)
 * or as many as the files want, at most DR_COPY_WORKERS. */
unsigned dr_copy_workers(const struct dr_copy_policy *policy, const struct dr_job *job);

#endif
