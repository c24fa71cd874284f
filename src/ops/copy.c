/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/copy.h"

#define PROGRESS_NS  (50u * 1000 * 1000)
#define SLICE_NS     (20u * 1000 * 1000)
#define SLOTS_FACTOR 2 /* ordered: slots a worker, so that a slow item does not stop the others */

struct slot {
    struct dr_copy_item item;
    uint8_t *buf[DR_COPY_BUFFERS];
    bool done; /* worked, waits for its turn; under run->lock */
};

struct run {
    const struct dr_copy_policy *policy;
    const struct dr_job *job;
    const struct dr_copy_clock *clock;
    struct slot *slots;
    unsigned n_slots, n_workers;

    pthread_mutex_t next_lock; /* one thread in next, taken before lock */
    bool ended;                /* under next_lock */

    pthread_mutex_t lock;
    pthread_cond_t freed; /* ordered: a slot came free, or the run stops */
    uint64_t head, tail;  /* ordered: items [head, tail) are under way */
    bool emitting;        /* ordered: some thread is in emit */
    int result;           /* first failure or "enough" */
    struct dr_error *err; /* the caller's, written once */
    uint64_t rate_next;   /* when the next item may start */
    pthread_mutex_t progress_lock;
    uint64_t progress_at; /* under progress_lock */

    _Atomic bool stopping;
    _Atomic uint64_t done; /* bytes */
};

/* ------------------------------------------------------------------ small things */

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

unsigned dr_copy_workers(const struct dr_job *job)
{
    long n = job && job->workers ? (long)job->workers : sysconf(_SC_NPROCESSORS_ONLN);
    if (n < 1)
        n = 1;
    return n > DR_COPY_WORKERS ? DR_COPY_WORKERS : (unsigned)n;
}

static uint64_t system_now(void *user)
{
    (void)user;
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void system_sleep(void *user, uint64_t ns)
{
    (void)user;
    struct timespec ts = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    nanosleep(&ts, NULL);
}

static const struct dr_copy_clock system_clock = {system_now, system_sleep, NULL};

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

static void report(struct run *run, uint64_t now)
{
    run->progress_at = now;
    uint64_t done = dr_min(atomic_load(&run->done), run->policy->total);
    if (run->job->progress(run->job->user, done, run->policy->total) != 0)
        cancel_run(run);
}

static void account(struct run *run, uint64_t bytes)
{
    atomic_fetch_add(&run->done, bytes);
    if (!run->job || !run->job->progress || pthread_mutex_trylock(&run->progress_lock) != 0)
        return;
    uint64_t now = run->clock->now(run->clock->user);
    if (now - run->progress_at >= PROGRESS_NS)
        report(run, now);
    pthread_mutex_unlock(&run->progress_lock);
}

static void sleep_slice(struct run *run, uint64_t ns)
{
    run->clock->sleep(run->clock->user, dr_min(ns, SLICE_NS));
}

static void wait_while_paused(struct run *run)
{
    while (run->job && run->job->pause && __atomic_load_n(run->job->pause, __ATOMIC_RELAXED) &&
           may_go_on(run))
        sleep_slice(run, SLICE_NS);
}

/* When may an item of len bytes start? Books its time. */
static uint64_t rate_book(struct run *run, uint64_t len)
{
    uint64_t now = run->clock->now(run->clock->user);
    DR_LOCK_SCOPE(&run->lock);
    uint64_t start = dr_max(now, run->rate_next);
    double ns = (double)len * 1e9 / (double)run->job->rate;
    run->rate_next = start + (ns < 1e18 ? (uint64_t)ns : (uint64_t)1e18);
    return start;
}

static void hold_to_rate(struct run *run, uint64_t len)
{
    if (!run->job || run->job->rate == 0)
        return;
    uint64_t start = rate_book(run, len);
    for (;;) {
        uint64_t now = run->clock->now(run->clock->user);
        if (now >= start || !may_go_on(run))
            return;
        sleep_slice(run, start - now);
    }
}

/* ------------------------------------------------------------------ the three steps */

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

/* The next item in a slot, or NULL: no more, or stopped. */
static struct slot *take(struct run *run, struct slot *own, struct dr_error *err)
{
    DR_LOCK_SCOPE(&run->next_lock);
    if (run->ended || !may_go_on(run))
        return NULL;
    struct dr_copy_item item = {0};
    int r = run->policy->next(run->policy->user, &item, err);
    if (r <= 0) {
        run->ended = true;
        if (r < 0)
            stop_run(run, r, err);
        else
            account(run, item.passed);
        return NULL;
    }
    struct slot *slot = run->policy->ordered ? wait_for_slot(run) : own;
    if (slot)
        slot->item = item;
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

static void work_loop(struct run *run, unsigned index)
{
    struct dr_error err = DR_ERROR_INIT;
    struct slot *own = run->policy->ordered ? NULL : &run->slots[index], *slot;

    for (;;) {
        wait_while_paused(run);
        slot = take(run, own, &err);
        if (!slot)
            return;
        hold_to_rate(run, slot->item.len);
        if (!may_go_on(run) || call(run, run->policy->work, slot, &err) != 0)
            return;
        if (run->policy->ordered)
            emit_in_order(run, slot, &err);
        else if (emit(run, slot, &err) != 0)
            return;
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
    if (!run->job || !run->job->progress)
        return;
    if (run->result >= 0)
        atomic_store(&run->done, run->policy->total);
    if (run->job->progress(run->job->user, dr_min(atomic_load(&run->done), run->policy->total),
                           run->policy->total) != 0)
        cancel_run(run); /* a short job makes no other call */
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

int dr_copy_run(const struct dr_copy_policy *policy, const struct dr_job *job, struct dr_error *err)
{
    struct run run = {.policy = policy, .job = job, .err = err};
    run.clock = policy->clock ? policy->clock : &system_clock;
    run.n_workers = dr_copy_workers(job);
    run.n_slots = policy->ordered ? run.n_workers * SLOTS_FACTOR : run.n_workers;
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
    run.progress_at = run.clock->now(run.clock->user);
    run_workers(&run);
    finish_progress(&run);
    destroy_locks(&run);
    if (memory)
        munmap(memory, bytes);
    return run.result;
}
