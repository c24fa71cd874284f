/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs of one group complete together: each waits in WAITING until all of them do. When one fails
 * or is cancelled, all others are cancelled. They conclude in the order in which QEMU's do, the
 * last one first.
 *
 * When they complete they keep step, twice: no target gets its name before all targets are
 * durable, and no bitmap is handed on before all targets have their names. Only a bitmap that
 * cannot be handed on fails alone. */
#include <errno.h>

#include "live/live.h"

bool live_group_has(const struct live_job *job, const struct live_job *other)
{
    return job->group && job->group == other->group;
}

void live_group_wake(struct live_job *job)
{
    for (struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other))
            pthread_cond_broadcast(&other->changed);
}

bool live_group_waits(const struct live_job *job)
{
    for (const struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other) && other->status != LIVE_WAITING)
            return false;
    return true;
}

/* One member's wish is that of all. */
bool live_group_by_hand(const struct live_job *job)
{
    for (const struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other) && other->order.keep_finalize)
            return true;
    return job->order.keep_finalize;
}

static void cancel_group(struct live_job *job)
{
    for (struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other) && other != job && !other->ended) {
            other->cancelled = true;
            dr_job_cancel(other->job);
            pthread_cond_broadcast(&other->changed);
        }
}

/* Have all operations of the group ended, and have the members behind this one concluded? */
static bool is_its_turn(const struct live_job *job)
{
    bool behind = false;
    for (const struct live_job *other = job->live->jobs; other; other = other->next) {
        if (live_group_has(job, other) &&
            (!other->ended || (behind && other->status < LIVE_CONCLUDED)))
            return false;
        behind |= other == job;
    }
    return true;
}

/* The operation of a member has ended; r: its result. */
void live_group_end(struct live_job *job, int r)
{
    if (r < 0)
        cancel_group(job);
    live_group_wake(job);
    while (!is_its_turn(job))
        pthread_cond_wait(&job->changed, &job->live->lock);
}

/* ------------------------------------------------------------------ keeping step */

/* A member that was cancelled, or has failed, has not come. */
static bool all_have_come(const struct live_job *job, unsigned step)
{
    for (const struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other) &&
            (other->ended || other->step < step || (step == 1 && other->cancelled)))
            return false;
    return true;
}

/* Will it never come to the step? Cancelling counts before the first step. Afterwards each member
 * goes on until it has failed itself. */
static bool is_given_up(const struct live_job *job, unsigned step)
{
    bool gone = step == 1 && job->cancelled;
    for (const struct live_job *other = job->live->jobs; other; other = other->next)
        gone |= live_group_has(job, other) && other->ended && other->result < 0;
    return gone;
}

static void let_all_pass(struct live_job *job, unsigned step)
{
    for (struct live_job *other = job->live->jobs; other; other = other->next)
        if (live_group_has(job, other))
            other->passed = step;
    live_group_wake(job);
}

int live_group_keep_step(void *user)
{
    struct live_job *job = user;
    DR_LOCK_SCOPE(&job->live->lock);
    unsigned step = ++job->step;
    if (all_have_come(job, step))
        let_all_pass(job, step);
    while (job->passed < step && !is_given_up(job, step))
        pthread_cond_wait(&job->changed, &job->live->lock);
    return job->passed < step;
}
