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

#include "base/error.h"
#include "drover/ops.h"

#define DR_COPY_BUFFERS 2 /* at most, for one item */
#define DR_COPY_WORKERS 16

struct dr_copy_item {
    uint64_t off, len; /* the policy's; the engine counts len for rate and progress */
    uint64_t passed;   /* bytes in front of it that needed no work: progress only */
    uint64_t aux[3];   /* the policy's */
    unsigned kind;     /* the policy's */
};

/* Where the time comes from; tests bring their own. */
struct dr_copy_clock {
    uint64_t (*now)(void *user); /* nanoseconds */
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
    unsigned buffers; /* 0..DR_COPY_BUFFERS for each item */
    size_t buffer_size;
    uint64_t total;                    /* for progress */
    const struct dr_copy_clock *clock; /* NULL = the system's */
};

/* 0 when all items are emitted, the positive result of a policy that had enough, or the first
 * failure (the others are forgotten); -ECANCELED when the job was stopped. In each case no thread
 * of the run is left and nothing of the policy is called any more. job may be NULL. */
int dr_copy_run(const struct dr_copy_policy *policy, const struct dr_job *job,
                struct dr_error *err);

/* How many threads a job gets: what it asks for, else one a processor, 1..DR_COPY_WORKERS. */
unsigned dr_copy_workers(const struct dr_job *job);

/* True when the job was told to stop. */
static inline bool dr_job_stopped(const struct dr_job *job)
{
    return job && job->stop && __atomic_load_n(job->stop, __ATOMIC_RELAXED);
}

/* A notice that is not a failure. */
void dr_job_message(const struct dr_job *job, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
