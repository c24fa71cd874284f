/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What tests of copies of one instant share. */
#ifndef DROVER_TESTS_INSTANT_H
#define DROVER_TESTS_INSTANT_H

#include <sched.h>

#include "drover/ops.h"
#include "ops/backup-sums.h"
#include "outcome.h"

/* text: DR_DIGEST_TEXT bytes. */
static inline void digest_of(const uint8_t *bytes, uint64_t size, char *text)
{
    struct dr_sums sums;
    ok(dr_sums_begin(&sums, size, &err));
    ok(dr_sums_put(&sums, 0, bytes, size, &err));
    dr_sums_digest(&sums, text);
    dr_sums_end(&sums);
}

/* Another thread runs the job, which was paused before: returns when it has got as far as it can,
 * behind its instant and in front of all copying. */
static inline enum dr_job_state wait_for_instant(struct dr_job *job)
{
    struct dr_job_status status;
    do {
        sched_yield();
        dr_job_query(job, &status);
    } while (status.state != DR_JOB_PAUSED && status.state != DR_JOB_CONCLUDED);
    return status.state;
}

#endif
