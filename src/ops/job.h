/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The inside of a job, for the copy engine and the operations.
 *
 * Everything that changes while a job runs is an atomic, so that any thread may change or read it.
 * Whoever changes something that a worker may be waiting for rings the bell: a counter on which
 * workers sleep (a futex). Ringing takes no lock, so a signal handler may cancel a job. A job that
 * is all zeros is valid; tests make theirs on the stack.
 */
#ifndef DR_OPS_JOB_H
#define DR_OPS_JOB_H

#include <stdatomic.h>

#include "base/error.h"
#include "drover/ops.h"

enum dr_job_complete { DR_FOLLOW, DR_COMPLETE_PIVOT, DR_COMPLETE_COPY };

struct dr_job {
    char *id;
    /* as in struct dr_job_options; they do not change */
    int (*progress)(void *user, uint64_t done, uint64_t total);
    void (*message)(void *user, const char *text);
    int (*before_switch)(void *user);
    void (*ready)(void *user);
    int (*record)(void *user, const struct dr_switch *switches, size_t n, struct dr_error *err);
    enum dr_error_action (*error)(void *user, bool reading, int error, const char *text);
    void *user;
    unsigned workers;
    bool hurry;

    const struct dr_disk *beside; /* other threads use it meanwhile; NULL = no disk is in use */

    _Atomic uint64_t rate;
    int cancelled; /* only by __atomic calls: drivers and sources look at it by its address */
    _Atomic int complete; /* enum dr_job_complete */
    _Atomic bool pause;
    _Atomic bool waiting;  /* the worker whose turn it is waits for the end of a pause */
    _Atomic unsigned busy; /* workers that have an item */
    _Atomic uint32_t bell;

    _Atomic int state; /* enum dr_job_state, never PAUSED: that is computed */
    _Atomic int result;
    _Atomic uint64_t done, total;
    _Atomic uint64_t held_ns;
};

/* For an operation: the job begins, and ends with result r, which is returned. A job serves one
 * operation: -EBUSY if it was used. job may be NULL in all of these. */
int dr_job_begin(struct dr_job *job, struct dr_error *err);
int dr_job_end(struct dr_job *job, int r);
/* dr_job_begin for an operation on an open disk: its copying gives way to those who use the disk.
 */
int dr_job_begin_beside(struct dr_job *job, const struct dr_disk *disk, struct dr_error *err);

/* From now on it works on this disk, one of several. */
static inline void dr_job_beside(struct dr_job *job, const struct dr_disk *disk)
{
    if (job)
        job->beside = disk;
}

/* Is the job to give way to a guest, if there is one? */
static inline bool dr_job_polite(const struct dr_job *job)
{
    return job && job->beside && !job->hurry;
}

/* Has somebody used the disk since the last look (dr_disk_busy), so that the job gives way? */
bool dr_job_disturbs(const struct dr_job *job, uint32_t *seen);

static inline bool dr_job_stopped(const struct dr_job *job)
{
    return job && __atomic_load_n(&job->cancelled, __ATOMIC_RELAXED);
}

static inline bool dr_job_paused(const struct dr_job *job)
{
    return job && atomic_load(&job->pause);
}

/* The same as an address, for those who know no jobs: non-zero = stop. NULL without a job. */
static inline const volatile int *dr_job_stop_flag(const struct dr_job *job)
{
    return job ? &job->cancelled : NULL;
}

/* Between two steps of an operation: wait while the job is paused. -ECANCELED when it was told to
 * stop. */
int dr_job_rest(struct dr_job *job, struct dr_error *err);

/* The copying is done: ask whoever made the job whether the disk may be switched now. -ECANCELED:
 * no. */
int dr_job_before_switch(struct dr_job *job, struct dr_error *err);

/* Tell what the disks are about to go on with; mostly while their requests wait. */
int dr_job_record(struct dr_job *job, const struct dr_switch *switches, size_t n,
                  struct dr_error *err);

/* Waiting for a change: read the bell, look at what matters, then sleep until the bell has been
 * rung since, or for ns nanoseconds (UINT64_MAX = for ever). */
static inline uint32_t dr_job_bell(const struct dr_job *job)
{
    return atomic_load(&job->bell);
}
void dr_job_sleep(struct dr_job *job, uint32_t bell, uint64_t ns);
void dr_job_ring(struct dr_job *job);

/* How far it is; calls progress. Non-zero: the caller of the operation wants it to end, and the job
 * is cancelled. */
int dr_job_report(struct dr_job *job, uint64_t done, uint64_t total);

/* A piece failed with r < 0: ask whoever made the job what to do about it. REPORT for a job that
 * was told to stop, and without a job. */
enum dr_error_action dr_job_ask(struct dr_job *job, bool reading, int r,
                                const struct dr_error *err);

/* After a step that only writes has failed with r: 0 = make it again, after waiting where that was
 * wanted; else r, or -ECANCELED. */
int dr_job_after_failure(struct dr_job *job, int r, struct dr_error *err);
/* Until what has failed, and is ignored, is tried again. */
#define DR_JOB_AGAIN_NS UINT64_C(1000000000)

/* The operation held up the requests of a disk for so long. */
void dr_job_held(struct dr_job *job, uint64_t ns);

/* A notice that is not a failure. */
void dr_job_message(const struct dr_job *job, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
