/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs: what can be asked of an operation, and told to it, while it runs. */
#include <errno.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "core/core.h"
#include "ops/job.h"

#define ID_MAX 128

/* ------------------------------------------------------------------ the bell */

static void futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *timeout)
{
    syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

void dr_job_sleep(struct dr_job *job, uint32_t bell, uint64_t ns)
{
    const struct timespec ts = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    futex(&job->bell, FUTEX_WAIT, bell, ns == UINT64_MAX ? NULL : &ts);
}

/* Also called from signal handlers: no locks, and errno stays. */
void dr_job_ring(struct dr_job *job)
{
    int saved = errno;
    if (!job)
        return;
    atomic_fetch_add(&job->bell, 1);
    futex(&job->bell, FUTEX_WAKE, INT32_MAX, NULL);
    errno = saved;
}

/* ------------------------------------------------------------------ begin and end */

/* As QEMU wants ids: a letter, then letters, digits, '-', '.' and '_'. */
static bool is_id(const char *id)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    static const char others[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    size_t len = strlen(id);
    return len > 0 && len <= ID_MAX && strspn(id, letters) > 0 && strspn(id, others) == len;
}

static char *next_id(void)
{
    static _Atomic unsigned last;
    char *id;
    return asprintf(&id, "job-%u", atomic_fetch_add(&last, 1) + 1) < 0 ? NULL : id;
}

int dr_job_new(const char *id, const struct dr_job_options *options, struct dr_job **job,
               struct dr_error *err)
{
    DR_REQUIRE(job, err);
    *job = NULL;
    if (id && !is_id(id))
        return dr_fail(err, EINVAL,
                       "\"%s\": a job's id is a letter and then at most %d letters, digits, "
                       "\"-\", \".\" and \"_\"",
                       id, ID_MAX - 1);
    struct dr_job *fresh = calloc(1, sizeof(*fresh));
    char *own_id = id ? strdup(id) : next_id();
    if (!fresh || !own_id) {
        free(fresh);
        free(own_id);
        return dr_fail(err, ENOMEM, "out of memory for a job");
    }
    fresh->id = own_id;
    if (options) {
        fresh->progress = options->progress;
        fresh->message = options->message;
        fresh->before_switch = options->before_switch;
        fresh->ready = options->ready;
        fresh->record = options->record;
        fresh->error = options->error;
        fresh->user = options->user;
        fresh->workers = options->workers;
        fresh->hurry = options->hurry;
        atomic_store(&fresh->rate, options->rate);
    }
    *job = fresh;
    return 0;
}

void dr_job_free(struct dr_job *job)
{
    if (!job)
        return;
    free(job->id);
    free(job);
}

int dr_job_begin(struct dr_job *job, struct dr_error *err)
{
    int created = DR_JOB_CREATED;
    if (!job || atomic_compare_exchange_strong(&job->state, &created, DR_JOB_RUNNING))
        return 0;
    return dr_fail(err, EBUSY, "job %s was used already: each operation needs its own", job->id);
}

int dr_job_begin_beside(struct dr_job *job, const struct dr_disk *disk, struct dr_error *err)
{
    int r = dr_job_begin(job, err);
    if (r == 0)
        dr_job_beside(job, disk);
    return r;
}

int dr_job_end(struct dr_job *job, int r)
{
    if (!job)
        return r;
    atomic_store(&job->result, r < 0 ? r : 0);
    atomic_store(&job->state, DR_JOB_CONCLUDED);
    return r;
}

/* ------------------------------------------------------------------ while it runs */

const char *dr_job_id(const struct dr_job *job)
{
    return job->id;
}

void dr_job_cancel(struct dr_job *job)
{
    if (!job)
        return;
    __atomic_store_n(&job->cancelled, 1, __ATOMIC_RELAXED);
    dr_job_ring(job);
}

void dr_job_pause(struct dr_job *job)
{
    atomic_store(&job->pause, true);
    dr_job_ring(job);
}

void dr_job_resume(struct dr_job *job)
{
    atomic_store(&job->pause, false);
    dr_job_ring(job);
}

void dr_job_set_rate(struct dr_job *job, uint64_t rate)
{
    atomic_store(&job->rate, rate);
    dr_job_ring(job);
}

void dr_job_complete(struct dr_job *job, bool pivot)
{
    int follow = DR_FOLLOW;
    atomic_compare_exchange_strong(&job->complete, &follow,
                                   pivot ? DR_COMPLETE_PIVOT : DR_COMPLETE_COPY);
    dr_job_ring(job);
}

int dr_job_before_switch(struct dr_job *job, struct dr_error *err)
{
    if (job && job->before_switch && !dr_job_stopped(job) && job->before_switch(job->user) != 0)
        dr_job_cancel(job);
    return dr_job_rest(job, err);
}

int dr_job_record(struct dr_job *job, const struct dr_switch *switches, size_t n,
                  struct dr_error *err)
{
    return job && job->record ? job->record(job->user, switches, n, err) : 0;
}

int dr_job_rest(struct dr_job *job, struct dr_error *err)
{
    while (dr_job_paused(job) && !dr_job_stopped(job)) {
        uint32_t bell = dr_job_bell(job);
        atomic_store(&job->waiting, true);
        if (dr_job_paused(job) && !dr_job_stopped(job))
            dr_job_sleep(job, bell, UINT64_MAX);
        atomic_store(&job->waiting, false);
    }
    return dr_job_stopped(job) ? dr_fail(err, ECANCELED, "stopped on request") : 0;
}

enum dr_error_action dr_job_ask(struct dr_job *job, bool reading, int r, const struct dr_error *err)
{
    if (!job || !job->error || dr_job_stopped(job))
        return DR_ERROR_REPORT;
    const char *text = err && err->text[0] ? err->text : strerrordesc_np(-r);
    return job->error(job->user, reading, -r, text);
}

int dr_job_after_failure(struct dr_job *job, int r, struct dr_error *err)
{
    enum dr_error_action action = dr_job_ask(job, false, r, err);
    if (action == DR_ERROR_REPORT)
        return r;
    uint32_t bell = dr_job_bell(job);
    if (action == DR_ERROR_IGNORE && !dr_job_stopped(job))
        dr_job_sleep(job, bell, DR_JOB_AGAIN_NS);
    dr_error_reset(err);
    return dr_job_rest(job, err);
}

bool dr_job_disturbs(const struct dr_job *job, uint32_t *seen)
{
    return dr_job_polite(job) && dr_disk_busy(job->beside, seen);
}

int dr_job_report(struct dr_job *job, uint64_t done, uint64_t total)
{
    if (!job)
        return 0;
    atomic_store(&job->done, done);
    atomic_store(&job->total, total);
    if (!job->progress || job->progress(job->user, done, total) == 0)
        return 0;
    dr_job_cancel(job);
    return 1;
}

void dr_job_held(struct dr_job *job, uint64_t ns)
{
    if (job && ns > atomic_load(&job->held_ns))
        atomic_store(&job->held_ns, ns);
}

/* A pause holds once no worker moves bytes any more. */
static enum dr_job_state state_of(const struct dr_job *job)
{
    int state = atomic_load(&job->state);
    if (state == DR_JOB_RUNNING && atomic_load(&job->pause) && atomic_load(&job->waiting) &&
        atomic_load(&job->busy) == 0)
        return DR_JOB_PAUSED;
    return (enum dr_job_state)state;
}

void dr_job_query(const struct dr_job *job, struct dr_job_status *status)
{
    *status = (struct dr_job_status){
        .state = state_of(job),
        .result = atomic_load(&job->result),
        .cancelled = dr_job_stopped(job),
        .pausing = atomic_load(&job->pause),
        .done = atomic_load(&job->done),
        .total = atomic_load(&job->total),
        .rate = atomic_load(&job->rate),
        .held_ns = atomic_load(&job->held_ns),
    };
}

const char *dr_job_state_name(enum dr_job_state state)
{
    switch (state) {
    case DR_JOB_CREATED:
        return "created";
    case DR_JOB_RUNNING:
        return "running";
    case DR_JOB_PAUSED:
        return "paused";
    case DR_JOB_CONCLUDED:
        return "concluded";
    }
    return NULL;
}

void dr_job_message(const struct dr_job *job, const char *fmt, ...)
{
    if (!job || !job->message)
        return;
    char text[2048];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    job->message(job->user, text);
}
