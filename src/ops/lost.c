/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/lost.h"

#include <stdlib.h>

#include "base/bytes.h"
#include "drover/ops.h"
#include "ops/job.h"

#define MAX_RANGES ((size_t)65536) /* 1 MiB */

static int by_place(const void *a, const void *b)
{
    const struct dr_lost_range *x = a, *y = b;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* Sort, and join what touches. */
static void settle(struct dr_lost *lost)
{
    size_t n = 0;
    if (lost->n)
        qsort(lost->ranges, lost->n, sizeof(*lost->ranges), by_place);
    for (size_t i = 0; i < lost->n; i++) {
        struct dr_lost_range *last = n ? &lost->ranges[n - 1] : NULL, next = lost->ranges[i];
        if (last && next.from <= last->to)
            last->to = dr_max(last->to, next.to);
        else
            lost->ranges[n++] = next;
    }
    lost->n = n;
}

static void report(struct dr_lost *lost, enum dr_salvaged_kind kind, const char *disk,
                   uint64_t from, uint64_t to, const char *why)
{
    const struct dr_salvaged range = {kind, disk, from, to - from, why};
    lost->any = true;
    if (lost->report)
        lost->report(lost->user, &range);
}

static void tell(struct dr_lost *lost, const struct dr_lost_range *range, struct dr_job *job)
{
    dr_job_message(job, "%s%sbytes %llu to %llu cannot be read, zeros instead",
                   lost->disk ? lost->disk : "", lost->disk ? ": " : "",
                   (unsigned long long)range->from, (unsigned long long)range->to);
    report(lost, DR_SALVAGED_LOST, lost->disk, range->from, range->to, NULL);
}

void dr_lost_doubt(struct dr_lost *lost, const char *disk, uint64_t from, uint64_t to,
                   struct dr_job *job)
{
    static const char why[] = "the compressed stream is damaged";
    dr_job_message(job, "%s: %llu..%llu: taken, but may be wrong anywhere: %s", disk,
                   (unsigned long long)from, (unsigned long long)to, why);
    report(lost, DR_SALVAGED_DOUBTFUL, disk, from, to, why);
}

void dr_lost_end(struct dr_lost *lost, const char *disk, uint64_t from, const char *why,
                 struct dr_job *job)
{
    dr_job_message(job, "%s: all behind the first %llu bytes is lost", why,
                   (unsigned long long)from);
    report(lost, DR_SALVAGED_END, disk, from, from, why);
}

/* Tell the first n, which is about where the threads were first. */
static void tell_first(struct dr_lost *lost, size_t n, struct dr_job *job)
{
    for (size_t i = 0; i < n; i++)
        tell(lost, &lost->ranges[i], job);
    for (size_t i = n; i < lost->n; i++)
        lost->ranges[i - n] = lost->ranges[i];
    lost->n -= n;
}

static void grow(struct dr_lost *lost, struct dr_job *job)
{
    settle(lost);
    if (lost->n < lost->room / 2)
        return;
    size_t room = lost->room ? 2 * lost->room : 64;
    void *more = room <= MAX_RANGES ? realloc(lost->ranges, room * sizeof(*lost->ranges)) : NULL;
    if (more) {
        lost->ranges = more;
        lost->room = room;
    } else {
        tell_first(lost, dr_div_up(lost->n, 2), job);
    }
}

void dr_lost_add(struct dr_lost *lost, uint64_t from, uint64_t to, struct dr_job *job)
{
    struct dr_lost_range range = {from, to};
    if (from >= to)
        return;
    pthread_mutex_lock(&lost->lock);
    lost->any = true;
    if (lost->n == lost->room)
        grow(lost, job);
    if (lost->n < lost->room)
        lost->ranges[lost->n++] = range;
    else
        tell(lost, &range, job); /* no memory */
    pthread_mutex_unlock(&lost->lock);
}

void dr_lost_tell(struct dr_lost *lost, struct dr_job *job)
{
    pthread_mutex_lock(&lost->lock);
    settle(lost);
    tell_first(lost, lost->n, job);
    pthread_mutex_unlock(&lost->lock);
}

void dr_lost_free(struct dr_lost *lost)
{
    free(lost->ranges);
    pthread_mutex_destroy(&lost->lock);
}
