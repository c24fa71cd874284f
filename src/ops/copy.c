/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/copy.h"

#define PROGRESS_NS  (50u * 1000 * 1000)
#define GIVE_WAY     9                    /* times as long as it worked a worker rests */
#define REST_NS      UINT64_C(1000000000) /* at most: an item may have waited for a resume */
#define LOOK_NS      (5u * 1000 * 1000)   /* whether the guest is still busy */
#define NAP_NS       (1000u * 1000)       /* a shorter rest is not worth falling asleep */
#define MAX_WAIT_NS  UINT64_C(1000000000000000000)
#define SLOTS_FACTOR 2 /* ordered: slots a worker, so that a slow item does not stop the others */
#define MEMORY_MAX   (UINT64_C(64) << 20) /* of all buffers of a run that has many workers */

struct slot {
    struct dr_copy_item item;
    uint8_t *buf[DR_COPY_BUFFERS];
    bool done; /* worked, waits for its turn; under run->lock */
};

struct run {
    const struct dr_copy_policy *policy;
    struct dr_job *job;
    const struct dr_copy_clock *clock;
    struct slot *slots;
    unsigned n_slots, n_workers;

    pthread_mutex_t next_lock; /* one thread waits for its turn or is in next; before lock */
    bool ended;                /* under next_lock, as the next three */
    double owed;               /* bytes given out that the rate does not allow for yet, as of: */
    uint64_t owed_at, rate;

    pthread_mutex_t lock;
    pthread_cond_t freed; /* ordered: a slot came free, or the run stops */
    uint64_t head, tail;  /* ordered: items [head, tail) are under way */
    bool emitting;        /* ordered: some thread is in emit */
    int result;           /* first failure or "enough" */
    struct dr_error *err; /* the caller's, written once */
    int skipped;          /* failure of the first item that was left out, and its text */
    struct dr_error skipped_err;
    pthread_mutex_t progress_lock;
    uint64_t progress_at; /* under progress_lock */

    _Atomic bool stopping;
    _Atomic uint64_t done; /* bytes */
};

/* ------------------------------------------------------------------ small things */

unsigned dr_copy_workers(const struct dr_copy_policy *policy, const struct dr_job *job)
{
    if (job && job->workers)
        return (unsigned)dr_min(job->workers, DR_COPY_WORKERS);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    unsigned n = cpus < 1 ? 1 : (unsigned)dr_min((uint64_t)cpus, DR_COPY_CPUS);
    return (unsigned)dr_min(dr_max(n, policy->depth), DR_COPY_WORKERS);
}

static uint64_t system_now(void *user)
{
    (void)user;
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static const struct dr_copy_clock system_clock = {system_now, NULL, NULL};

/* ------------------------------------------------------------------ stopping */

static void stop_run(struct run *run, int result, const struct dr_error *from)
{
    DR_LOCK_SCOPE(&run->lock);
    if (run->result == 0) {
        run->result = result;
        if (result < 0 && run->err && run->err->errnum == 0) {
            if (from->errnum)
                *run->err = *from;
            else
                dr_fail_errno(run->err, -result, "copying failed");
        }
    }
    atomic_store(&run->stopping, true);
    pthread_cond_broadcast(&run->freed);
    dr_job_ring(run->job);
}

static void cancel_run(struct run *run)
{
    struct dr_error why = DR_ERROR_INIT;
    stop_run(run, dr_fail(&why, ECANCELED, "stopped on request"), &why);
}

static bool may_go_on(struct run *run)
{
    if (dr_job_stopped(run->job))
        cancel_run(run);
    return !atomic_load(&run->stopping);
}

/* ------------------------------------------------------------------ progress, pause, rate */

static void report(struct run *run)
{
    const struct dr_copy_policy *p = run->policy;
    uint64_t done = dr_min(atomic_load(&run->done), p->total);
    if (!p->silent && dr_job_report(run->job, p->before + done, p->before + p->total + p->after))
        cancel_run(run);
}

static void account(struct run *run, uint64_t bytes)
{
    atomic_fetch_add(&run->done, bytes);
    if (!run->job || pthread_mutex_trylock(&run->progress_lock) != 0)
        return;
    uint64_t now = run->clock->now(run->clock->user);
    if (now - run->progress_at >= PROGRESS_NS) {
        run->progress_at = now;
        report(run);
    }
    pthread_mutex_unlock(&run->progress_lock);
}

/* Until the job changes, and no longer than ns. */
static void wait_for_change(struct run *run, uint32_t bell, uint64_t ns)
{
    if (run->clock->sleep)
        run->clock->sleep(run->clock->user, ns);
    else
        dr_job_sleep(run->job, bell, ns);
}

/* How long the next item has to wait for those before it to keep to the rate. The time since the
 * last look counts at the rate that held then, what is left waits at the present one. */
static uint64_t rate_wait(struct run *run)
{
    uint64_t rate = atomic_load(&run->job->rate);
    if (rate == 0) {
        run->rate = 0;
        return 0;
    }
    uint64_t now = run->clock->now(run->clock->user);
    run->owed -= (double)(now - run->owed_at) / 1e9 * (double)run->rate;
    if (run->rate == 0 || run->owed < 0)
        run->owed = 0;
    run->owed_at = now;
    run->rate = rate;
    double ns = run->owed * 1e9 / (double)rate;
    return ns < (double)MAX_WAIT_NS ? (uint64_t)ns : MAX_WAIT_NS;
}

/* next_lock held: all other workers queue behind the one that waits here, for the end of a pause
 * and, when it has an item, for the rate. False: the run ends. */
static bool wait_for_turn(struct run *run, bool has_item)
{
    struct dr_job *job = run->job;
    if (!job)
        return may_go_on(run);
    bool go;
    for (;;) {
        uint32_t bell = dr_job_bell(job);
        go = may_go_on(run);
        bool paused = dr_job_paused(job);
        uint64_t ns = paused ? MAX_WAIT_NS : has_item ? rate_wait(run) : 0;
        if (!go || ns == 0)
            break;
        atomic_store(&job->waiting, paused);
        wait_for_change(run, bell, ns);
    }
    atomic_store(&job->waiting, false);
    return go;
}

/* ------------------------------------------------------------------ a busy guest */

static uint64_t now(struct run *run)
{
    return run->clock->now(run->clock->user);
}

/* A worker that has been at work for so long rests for nine times as long, while requests use the
 * disk: so it takes a tenth of what it could take. It has no item then and holds no lock, so
 * workers rest beside each other, and whatever changes the job ends the rest. After small items it
 * goes on until it has earned a rest of some length: *worked is what it has not rested for yet. */
static void give_way(struct run *run, uint64_t *worked, uint32_t *seen)
{
    if (GIVE_WAY * *worked < NAP_NS)
        return;
    uint64_t start = now(run), end = start + dr_min(GIVE_WAY * *worked, REST_NS);
    *worked = 0;
    for (uint64_t at = start; at < end; at = now(run)) {
        uint32_t bell = dr_job_bell(run->job);
        if (!may_go_on(run) || dr_job_paused(run->job) || !dr_job_disturbs(run->job, seen))
            break;
        wait_for_change(run, bell, dr_min(end - at, LOOK_NS));
    }
}

/* ------------------------------------------------------------------ failures that are not the end
 */

/* Until the job is not paused any more, or for a while after a failure that is ignored. */
static void wait_to_try_again(struct run *run, enum dr_error_action action)
{
    struct dr_job *job = run->job;
    uint64_t ns = action == DR_ERROR_IGNORE ? DR_JOB_AGAIN_NS : 0;
    for (;;) {
        uint32_t bell = dr_job_bell(job);
        bool paused = dr_job_paused(job);
        if (!may_go_on(run) || (!paused && ns == 0))
            break;
        atomic_store(&job->waiting, paused);
        wait_for_change(run, bell, paused ? MAX_WAIT_NS : ns);
        ns = 0;
    }
    atomic_store(&job->waiting, false);
}

/* The item has failed with r. 0: it is to be tried again; 1: it is to be left out; else r. busy:
 * the job counts this worker as one that moves bytes. */
static int after_failure(struct run *run, const struct dr_copy_item *item, bool busy, int r,
                         struct dr_error *err)
{
    const struct dr_copy_policy *p = run->policy;
    if (p->repeat == DR_COPY_ONCE || p->ordered || !run->job || !may_go_on(run))
        return r;
    /* A copy inside the kernel does not tell which side failed: only one of them can be full. */
    bool reading = !item->writing && r != -ENOSPC && r != -EDQUOT;
    enum dr_error_action action = dr_job_ask(run->job, reading, r, err);
    if (action == DR_ERROR_REPORT)
        return r;
    if (action == DR_ERROR_IGNORE && p->repeat == DR_COPY_SKIP)
        return busy ? 1 : r;
    if (busy)
        atomic_fetch_sub(&run->job->busy, 1);
    wait_to_try_again(run, action);
    if (busy)
        atomic_fetch_add(&run->job->busy, 1);
    if (!may_go_on(run))
        return r;
    dr_error_reset(err);
    return 0;
}

static void note_skipped(struct run *run, int r, const struct dr_error *err)
{
    DR_LOCK_SCOPE(&run->lock);
    if (run->skipped == 0) {
        run->skipped = r;
        run->skipped_err = *err;
    }
}

/* ------------------------------------------------------------------ the three steps */

static int call_next(struct run *run, struct dr_copy_item *item, struct dr_error *err)
{
    int r;
    do
        r = run->policy->next(run->policy->user, item, err);
    while (r < 0 && (r = after_failure(run, item, false, r, err)) == 0);
    return r;
}

/* Ordered: wait for a slot to come free; next_lock is held, so nobody overtakes. */
static struct slot *wait_for_slot(struct run *run)
{
    DR_LOCK_SCOPE(&run->lock);
    while (run->tail - run->head == run->n_slots && !atomic_load(&run->stopping))
        pthread_cond_wait(&run->freed, &run->lock);
    if (atomic_load(&run->stopping))
        return NULL;
    return &run->slots[run->tail++ % run->n_slots];
}

/* The next item in a slot, or NULL: no more, or stopped. The worker counts as busy from then on. */
static struct slot *take(struct run *run, struct slot *own, struct dr_error *err)
{
    DR_LOCK_SCOPE(&run->next_lock);
    if (run->ended || !wait_for_turn(run, false))
        return NULL;
    struct dr_copy_item item = {0};
    int r = call_next(run, &item, err);
    if (r <= 0) {
        run->ended = true;
        if (r < 0)
            stop_run(run, r, err);
        else
            account(run, item.passed);
        return NULL;
    }
    if (!wait_for_turn(run, true))
        return NULL;
    struct slot *slot = run->policy->ordered ? wait_for_slot(run) : own;
    if (!slot)
        return NULL;
    slot->item = item;
    run->owed += (double)item.len;
    if (run->job)
        atomic_fetch_add(&run->job->busy, 1);
    return slot;
}

static int call(struct run *run,
                int (*step)(void *, struct dr_copy_item *, uint8_t *const *, struct dr_error *),
                struct slot *slot, struct dr_error *err)
{
    if (!step)
        return 0;
    int r = step(run->policy->user, &slot->item, slot->buf, err);
    if (r != 0)
        stop_run(run, r, err);
    return r;
}

static int emit(struct run *run, struct slot *slot, struct dr_error *err)
{
    uint64_t bytes = slot->item.passed + slot->item.len;
    int r = call(run, run->policy->emit, slot, err);
    if (r == 0)
        account(run, bytes);
    return r;
}

/* The thread that finds the oldest item done emits it and all that follow it. */
static void emit_in_order(struct run *run, struct slot *slot, struct dr_error *err)
{
    pthread_mutex_lock(&run->lock);
    slot->done = true;
    while (!run->emitting && run->head < run->tail && !atomic_load(&run->stopping)) {
        struct slot *first = &run->slots[run->head % run->n_slots];
        if (!first->done)
            break;
        run->emitting = true;
        pthread_mutex_unlock(&run->lock);
        int r = emit(run, first, err);
        pthread_mutex_lock(&run->lock);
        run->emitting = false;
        if (r == 0) {
            first->done = false;
            run->head++;
            pthread_cond_broadcast(&run->freed);
        }
    }
    pthread_mutex_unlock(&run->lock);
}

static int work_and_emit(const struct dr_copy_policy *p, struct slot *slot, struct dr_error *err)
{
    slot->item.writing = false;
    int r = p->work ? p->work(p->user, &slot->item, slot->buf, err) : 0;
    if (r != 0 || !p->emit)
        return r;
    slot->item.writing = true;
    return p->emit(p->user, &slot->item, slot->buf, err);
}

/* Not ordered. What has failed is read again, too: it may be another one by now. */
static int finish_item(struct run *run, struct slot *slot, struct dr_error *err)
{
    int r, failure = 0;
    do
        failure = r = work_and_emit(run->policy, slot, err);
    while (r < 0 && (r = after_failure(run, &slot->item, true, r, err)) == 0);
    if (failure < 0 && r > 0) {
        note_skipped(run, failure, err);
        dr_error_reset(err);
        r = 0;
    }
    if (r == 0)
        account(run, slot->item.passed + slot->item.len);
    else
        stop_run(run, r, err);
    return r;
}

/* False: the run ends. */
static bool do_item(struct run *run, struct slot *slot, struct dr_error *err)
{
    if (!run->policy->ordered)
        return finish_item(run, slot, err) == 0;
    if (call(run, run->policy->work, slot, err) != 0)
        return false;
    emit_in_order(run, slot, err);
    return true;
}

static void work_loop(struct run *run, unsigned index)
{
    struct dr_error err = DR_ERROR_INIT;
    struct slot *own = run->policy->ordered ? NULL : &run->slots[index], *slot;
    bool more = true, polite = dr_job_polite(run->job) && !run->policy->hurry;
    uint64_t worked = 0;
    uint32_t seen = 0;

    while (more && (slot = take(run, own, &err))) {
        uint64_t begin = polite ? now(run) : 0;
        more = do_item(run, slot, &err);
        if (run->job)
            atomic_fetch_sub(&run->job->busy, 1);
        worked += polite ? now(run) - begin : 0;
        if (more && polite)
            give_way(run, &worked, &seen);
    }
}

/* ------------------------------------------------------------------ the run */

struct thread {
    struct run *run;
    unsigned index;
    pthread_t id;
};

static void *thread_main(void *p)
{
    struct thread *t = p;
    work_loop(t->run, t->index);
    return NULL;
}

/* The calling thread is worker 0; a thread that cannot be had is done without. */
static void run_workers(struct run *run)
{
    struct thread threads[DR_COPY_WORKERS];
    unsigned n = 1;
    while (n < run->n_workers) {
        threads[n] = (struct thread){run, n, 0};
        if (pthread_create(&threads[n].id, NULL, thread_main, &threads[n]) != 0)
            break;
        n++;
    }
    work_loop(run, 0);
    while (n > 1)
        pthread_join(threads[--n].id, NULL);
}

static void finish_progress(struct run *run)
{
    if (run->result >= 0)
        atomic_store(&run->done, run->policy->total);
    report(run); /* a short job makes no other call */
}

static size_t rounded_buffer(const struct dr_copy_policy *policy)
{
    return (policy->buffer_size + 4095) / 4096 * 4096;
}

static void give_buffers(struct run *run, uint8_t *memory)
{
    size_t size = rounded_buffer(run->policy);
    for (unsigned i = 0; i < run->n_slots; i++)
        for (unsigned b = 0; b < run->policy->buffers; b++)
            run->slots[i].buf[b] = memory + (i * run->policy->buffers + b) * size;
}

static void init_locks(struct run *run)
{
    pthread_mutex_init(&run->next_lock, NULL);
    pthread_mutex_init(&run->lock, NULL);
    pthread_mutex_init(&run->progress_lock, NULL);
    pthread_cond_init(&run->freed, NULL);
}

static void destroy_locks(struct run *run)
{
    pthread_cond_destroy(&run->freed);
    pthread_mutex_destroy(&run->progress_lock);
    pthread_mutex_destroy(&run->lock);
    pthread_mutex_destroy(&run->next_lock);
}

/* Fewer buffers rather than more memory: two workers always have theirs. */
static unsigned bounded_slots(const struct dr_copy_policy *policy, unsigned n)
{
    uint64_t each = (uint64_t)rounded_buffer(policy) * policy->buffers;
    if (n <= DR_COPY_CPUS * SLOTS_FACTOR || each == 0)
        return n;
    return (unsigned)dr_min(n, dr_max(MEMORY_MAX / each, DR_COPY_CPUS));
}

int dr_copy_run(const struct dr_copy_policy *policy, struct dr_job *job, struct dr_error *err)
{
    struct run run = {.policy = policy, .job = job, .err = err};
    run.clock = policy->clock ? policy->clock : &system_clock;
    run.n_workers = dr_copy_workers(policy, job);
    run.n_slots =
        bounded_slots(policy, policy->ordered ? run.n_workers * SLOTS_FACTOR : run.n_workers);
    run.n_workers = (unsigned)dr_min(run.n_workers, run.n_slots);
    CLEANUP_FREE struct slot *slots = calloc(run.n_slots, sizeof(*slots));
    if (!slots)
        return dr_fail(err, ENOMEM, "out of memory for %u copy slots", run.n_slots);
    run.slots = slots;

    size_t bytes = rounded_buffer(policy) * policy->buffers * run.n_slots;
    uint8_t *memory = NULL;
    if (bytes > 0) {
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (memory == MAP_FAILED)
            return dr_fail(err, ENOMEM, "out of memory for %zu bytes of copy buffers", bytes);
        give_buffers(&run, memory);
    }
    init_locks(&run);
    run.progress_at = run.owed_at = run.clock->now(run.clock->user);
    run_workers(&run);
    if (run.result == 0 && run.skipped < 0)
        stop_run(&run, run.skipped, &run.skipped_err);
    finish_progress(&run);
    destroy_locks(&run);
    if (memory)
        munmap(memory, bytes);
    return run.result;
}
