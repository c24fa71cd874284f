/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The copy engine alone: no image, no file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/core.h"
#include "ops/copy.h"

#define MAX_ITEMS 4096

struct bench {
    unsigned n_items, given;
    unsigned fail_next_at, fail_work_at, fail_emit_at, enough_at; /* item index + 1; 0 = never */
    _Atomic unsigned in_next, in_emit, worked, emitted;
    _Atomic bool next_overlapped, emit_overlapped;
    unsigned order[MAX_ITEMS];
    _Atomic unsigned char seen[MAX_ITEMS];
    uint8_t *buffers[64]; /* distinct buffers met */
    unsigned n_buffers;
    pthread_mutex_t lock;
    struct dr_job *cancel;
    unsigned stop_at; /* emitted items after which the job is cancelled */
};

static int b_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct bench *b = user;
    if (atomic_fetch_add(&b->in_next, 1) != 0)
        b->next_overlapped = true;
    int r = 0;
    if (b->fail_next_at && b->given + 1 == b->fail_next_at) {
        r = dr_fail(err, EIO, "next broke");
    } else if (b->given < b->n_items) {
        item->off = b->given++;
        item->len = 10;
        r = 1;
    }
    atomic_fetch_sub(&b->in_next, 1);
    return r;
}

static void note_buffer(struct bench *b, uint8_t *buf)
{
    pthread_mutex_lock(&b->lock);
    unsigned i = 0;
    while (i < b->n_buffers && b->buffers[i] != buf)
        i++;
    if (i == b->n_buffers && i < 64)
        b->buffers[b->n_buffers++] = buf;
    pthread_mutex_unlock(&b->lock);
}

static int b_work(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err)
{
    struct bench *b = user;
    note_buffer(b, buf[0]);
    memset(buf[0], (int)(item->off & 0xff), 4096);
    memset(buf[1], (int)(item->off >> 8), 4096);
    atomic_fetch_add(&b->worked, 1);
    if (b->fail_work_at && item->off + 1 == b->fail_work_at)
        return dr_fail(err, ENOSPC, "work broke at %u", (unsigned)item->off);
    if (b->enough_at && item->off + 1 == b->enough_at)
        return 7;
    return 0;
}

static int b_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err)
{
    struct bench *b = user;
    if (atomic_fetch_add(&b->in_emit, 1) != 0)
        b->emit_overlapped = true;
    /* somebody else's bytes in our buffer would show here */
    int r = 0;
    if (buf[0][0] != (item->off & 0xff) || buf[0][4095] != (item->off & 0xff) ||
        buf[1][17] != (item->off >> 8))
        r = dr_fail(err, EILSEQ, "buffer of item %u was overwritten", (unsigned)item->off);
    unsigned n = atomic_fetch_add(&b->emitted, 1);
    b->order[n] = (unsigned)item->off;
    atomic_fetch_add(&b->seen[item->off], 1);
    if (b->cancel && n + 1 == b->stop_at)
        dr_job_cancel(b->cancel);
    if (b->fail_emit_at && item->off + 1 == b->fail_emit_at)
        r = dr_fail(err, EPIPE, "emit broke");
    atomic_fetch_sub(&b->in_emit, 1);
    return r;
}

static struct bench *new_bench(unsigned items)
{
    struct bench *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    b->n_items = items;
    pthread_mutex_init(&b->lock, NULL);
    return b;
}

static struct dr_copy_policy policy_of(struct bench *b)
{
    return (struct dr_copy_policy){.user = b,
                                   .next = b_next,
                                   .work = b_work,
                                   .emit = b_emit,
                                   .buffers = 2,
                                   .buffer_size = 4096,
                                   .total = (uint64_t)b->n_items * 10};
}

static void each_item_is_emitted_once(void **state)
{
    (void)state;
    for (unsigned workers = 1; workers <= 5; workers += 2) {
        for (int ordered = 0; ordered <= 1; ordered++) {
            struct bench *b = new_bench(1500);
            struct dr_copy_policy p = policy_of(b);
            p.ordered = ordered;
            struct dr_job job = {.workers = workers};
            struct dr_error err = DR_ERROR_INIT;
            assert_int_equal(dr_copy_run(&p, &job, &err), 0);
            assert_string_equal(err.text, "");
            assert_int_equal(b->emitted, 1500);
            for (unsigned i = 0; i < 1500; i++)
                assert_int_equal(b->seen[i], 1);
            assert_false(b->next_overlapped);
            free(b);
        }
    }
}

static void ordered_emit_keeps_the_order_one_at_a_time(void **state)
{
    (void)state;
    struct bench *b = new_bench(3000);
    struct dr_copy_policy p = policy_of(b);
    p.ordered = true;
    struct dr_job job = {.workers = 4};
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_int_equal(b->emitted, 3000);
    for (unsigned i = 0; i < 3000; i++)
        assert_int_equal(b->order[i], i);
    assert_false(b->emit_overlapped);
    free(b);
}

static void one_worker_stays_on_the_calling_thread(void **state)
{
    (void)state;
    struct bench *b = new_bench(100);
    struct dr_copy_policy p = policy_of(b);
    struct dr_job job = {.workers = 1};
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_int_equal(b->n_buffers, 1);
    for (unsigned i = 0; i < 100; i++)
        assert_int_equal(b->order[i], i);
    free(b);
}

static void buffers_are_as_many_as_workers_whatever_the_length(void **state)
{
    (void)state;
    struct bench *b = new_bench(4000);
    struct dr_copy_policy p = policy_of(b);
    struct dr_job job = {.workers = 3};
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_in_range(b->n_buffers, 1, 3);
    for (unsigned i = 0; i < b->n_buffers; i++)
        assert_int_equal((uintptr_t)b->buffers[i] % 4096, 0);
    b->n_buffers = 0;
    b->given = 0;
    b->emitted = 0;
    p.ordered = true;
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_in_range(b->n_buffers, 1, 6);
    free(b);
}

static void first_failure_stops_everything(void **state)
{
    (void)state;
    for (int ordered = 0; ordered <= 1; ordered++) {
        for (int where = 0; where < 3; where++) {
            struct bench *b = new_bench(4000);
            b->fail_next_at = where == 0 ? 40 : 0;
            b->fail_work_at = where == 1 ? 40 : 0;
            b->fail_emit_at = where == 2 ? 40 : 0;
            struct dr_copy_policy p = policy_of(b);
            p.ordered = ordered;
            struct dr_job job = {.workers = 3};
            struct dr_error err = DR_ERROR_INIT;
            static const int want[] = {-EIO, -ENOSPC, -EPIPE};
            static const char *const text[] = {"next broke", "work broke at 39", "emit broke"};
            assert_int_equal(dr_copy_run(&p, &job, &err), want[where]);
            assert_string_equal(err.text, text[where]);
            assert_int_equal(err.errnum, -want[where]);
            assert_true(b->emitted < 4000);
            if (ordered)
                for (unsigned i = 0; i < b->emitted; i++)
                    assert_int_equal(b->order[i], i);
            free(b);
        }
    }
}

static void enough_is_not_a_failure(void **state)
{
    (void)state;
    struct bench *b = new_bench(4000);
    b->enough_at = 100;
    struct dr_copy_policy p = policy_of(b);
    struct dr_job job = {.workers = 2};
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_copy_run(&p, &job, &err), 7);
    assert_int_equal(err.errnum, 0);
    assert_true(b->emitted < 4000);
    free(b);
}

static void a_cancelled_job_takes_no_more_items(void **state)
{
    (void)state;
    for (unsigned workers = 1; workers <= 2; workers++) {
        struct dr_job job = {.workers = workers};
        struct bench *b = new_bench(4000);
        b->cancel = &job;
        b->stop_at = 10;
        struct dr_copy_policy p = policy_of(b);
        struct dr_error err = DR_ERROR_INIT;
        assert_int_equal(dr_copy_run(&p, &job, &err), -ECANCELED);
        assert_int_equal(err.errnum, ECANCELED);
        assert_in_range(b->emitted, 10, 10 + workers - 1); /* the other one may be under way */
        free(b);
    }
}

/* ------------------------------------------------------------------ depth */

/* A file that answers nobody before enough requests are under way. */
struct slow_file {
    pthread_mutex_t lock;
    pthread_cond_t more;
    unsigned wanted, inside, most;
    unsigned items, given;
};

static int slow_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct slow_file *f = user;
    (void)err;
    item->len = 1;
    return f->given++ < f->items;
}

static int slow_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct slow_file *f = user;
    (void)item;
    (void)err;
    memset(buf[0], 1, 4096);
    pthread_mutex_lock(&f->lock);
    if (++f->inside > f->most)
        f->most = f->inside;
    pthread_cond_broadcast(&f->more);
    while (f->most < f->wanted)
        pthread_cond_wait(&f->more, &f->lock);
    f->inside--;
    pthread_mutex_unlock(&f->lock);
    return 0;
}

/* It would hang if the engine had fewer. */
static void as_many_requests_are_under_way_as_the_files_want(void **state)
{
    (void)state;
    for (int ordered = 0; ordered <= 1; ordered++) {
        struct slow_file f = {.lock = PTHREAD_MUTEX_INITIALIZER,
                              .more = PTHREAD_COND_INITIALIZER,
                              .wanted = 32,
                              .items = 200};
        struct dr_copy_policy p = {.user = &f,
                                   .next = slow_next,
                                   .work = slow_work,
                                   .ordered = ordered,
                                   .buffers = 1,
                                   .buffer_size = 4096,
                                   .depth = 32,
                                   .total = 200};
        assert_int_equal(dr_copy_run(&p, NULL, NULL), 0);
        assert_int_equal(f.most, 32);
    }
}

static void the_number_of_workers_follows_the_job_before_the_files(void **state)
{
    (void)state;
    struct dr_copy_policy p = {.depth = 0};
    struct dr_job two = {.workers = 2}, many = {.workers = 1000}, any = {0};
    assert_in_range(dr_copy_workers(&p, NULL), 1, DR_COPY_CPUS);
    p.depth = DR_COPY_CPUS + 4;
    assert_int_equal(dr_copy_workers(&p, &any), DR_COPY_CPUS + 4);
    assert_int_equal(dr_copy_workers(&p, &two), 2);
    assert_int_equal(dr_copy_workers(&p, &many), DR_COPY_WORKERS);
    p.depth = 1000;
    assert_int_equal(dr_copy_workers(&p, NULL), DR_COPY_WORKERS);
}

/* ------------------------------------------------------------------ time */

struct fake_time {
    uint64_t now, slept;
    unsigned sleeps;
    struct dr_job *change; /* the 5th sleep resumes it and gives it this rate */
    uint64_t new_rate;
    uint64_t step; /* no sleep is longer: something else woke the sleeper; 0 = all are as asked */
};

static uint64_t fake_now(void *user)
{
    return ((struct fake_time *)user)->now;
}

static void fake_sleep(void *user, uint64_t ns)
{
    struct fake_time *t = user;
    if (t->step && ns > t->step)
        ns = t->step;
    t->now += ns;
    t->slept += ns;
    if (++t->sleeps == 5 && t->change) {
        dr_job_resume(t->change);
        dr_job_set_rate(t->change, t->new_rate);
    }
}

static void rate_spreads_the_items(void **state)
{
    (void)state;
    struct bench *b = new_bench(1000); /* 10 bytes each */
    struct fake_time t = {.now = 12345};
    struct dr_copy_clock clock = {fake_now, fake_sleep, &t};
    struct dr_copy_policy p = policy_of(b);
    p.clock = &clock;
    struct dr_job job = {.workers = 1, .rate = 2000};
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    /* 10000 bytes at 2000 a second; the first item waits for nobody */
    assert_in_range(t.slept, 4990000000u, 5000000000u);
    free(b);
}

static void a_new_rate_holds_for_what_is_waiting_already(void **state)
{
    (void)state;
    struct bench *b = new_bench(3); /* 10 bytes each */
    struct dr_job job = {.workers = 1, .rate = 1};
    struct fake_time t = {.now = 12345, .step = 1000000000, .change = &job, .new_rate = 5};
    struct dr_copy_clock clock = {fake_now, fake_sleep, &t};
    struct dr_copy_policy p = policy_of(b);
    p.clock = &clock;
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    /* 5 bytes of the first item in 5 s, the other 5 in 1 s; those of the second in 2 s */
    assert_in_range(t.slept, 7990000000u, 8010000000u);
    free(b);
}

static void a_paused_job_moves_nothing_until_it_is_resumed(void **state)
{
    (void)state;
    struct bench *b = new_bench(10);
    struct dr_job job = {.workers = 1, .pause = true};
    struct fake_time t = {.change = &job};
    struct dr_copy_clock clock = {fake_now, fake_sleep, &t};
    struct dr_copy_policy p = policy_of(b);
    p.clock = &clock;
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_int_equal(t.sleeps, 5);
    assert_int_equal(b->emitted, 10);
    free(b);
}

static void a_paused_job_can_be_cancelled(void **state)
{
    (void)state;
    struct bench *b = new_bench(10);
    struct dr_job job = {.workers = 2, .pause = true, .cancelled = 1};
    struct dr_copy_policy p = policy_of(b);
    assert_int_equal(dr_copy_run(&p, &job, NULL), -ECANCELED);
    assert_int_equal(b->worked, 0);
    free(b);
}

/* ------------------------------------------------------------------ a busy guest */

#define MS UINT64_C(1000000)

/* A worker's item takes 1 ms, or as said, in which the guest makes a request or does not. */
struct shared_disk {
    struct dr_disk disk;
    struct fake_time time;
    struct dr_job job;
    uint64_t item_ns;
    unsigned given, items, worked, busy_items, busy_sleeps;
    bool cancel, pause; /* by the first sleep */
    bool hurry;         /* this run only */
};

static void guest_asks(struct dr_disk *disk)
{
    struct dr_pass pass;
    dr_disk_enter(disk, &pass);
    dr_disk_leave(disk, &pass);
}

static int shared_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct shared_disk *s = user;
    (void)item, (void)err;
    return s->given < s->items ? (int)(++s->given > 0) : 0;
}

static int shared_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    struct shared_disk *s = user;
    (void)item, (void)buf, (void)err;
    s->time.now += s->item_ns ? s->item_ns : MS;
    if (s->worked++ < s->busy_items)
        guest_asks(&s->disk);
    return 0;
}

static void shared_sleep(void *user, uint64_t ns)
{
    struct shared_disk *s = user;
    assert_int_equal(s->job.busy, 0); /* or a pause would wait for it */
    fake_sleep(&s->time, ns);
    if (s->time.sleeps <= s->busy_sleeps)
        guest_asks(&s->disk);
    if (s->time.sleeps == 1 && s->cancel)
        dr_job_cancel(&s->job);
    if (s->time.sleeps == 1 && s->pause)
        dr_job_pause(&s->job);
    if (s->time.sleeps == 2 && s->pause)
        assert_true(s->job.waiting && ns > 1000 * 1000 * MS); /* for its end, not for the guest */
}

static uint64_t shared_now(void *user)
{
    return fake_now(&((struct shared_disk *)user)->time);
}

static int run_shared(struct shared_disk *s)
{
    struct dr_copy_clock clock = {shared_now, shared_sleep, s};
    struct dr_copy_policy p = {
        .user = s, .next = shared_next, .work = shared_work, .clock = &clock, .hurry = s->hurry};
    s->items = 10;
    s->job.workers = 1;
    return dr_copy_run(&p, &s->job, NULL);
}

static void a_job_works_a_tenth_of_the_time_beside_a_busy_guest(void **state)
{
    (void)state;
    struct shared_disk s = {.job.beside = &s.disk, .busy_items = 10, .busy_sleeps = 100};
    assert_int_equal(run_shared(&s), 0);
    assert_int_equal(s.worked, 10);
    assert_int_equal(s.time.slept, 90 * MS);
}

static void a_job_waits_only_after_items_beside_which_the_guest_was_busy(void **state)
{
    (void)state;
    struct shared_disk idle = {.job.beside = &idle.disk},
                       first = {.job.beside = &first.disk, .busy_items = 3};
    guest_asks(&first.disk); /* what was before the job is no matter, but for the first look */
    assert_int_equal(run_shared(&idle), 0);
    assert_int_equal(idle.time.slept, 0);
    assert_int_equal(run_shared(&first), 0);
    assert_int_equal(first.time.slept,
                     15 * MS); /* each rest ends with the first look at the guest */
}

static void a_request_that_takes_long_counts_all_the_time(void **state)
{
    (void)state;
    struct shared_disk s = {.job.beside = &s.disk};
    struct dr_pass pass;
    dr_disk_enter(&s.disk, &pass);
    assert_int_equal(run_shared(&s), 0);
    dr_disk_leave(&s.disk, &pass);
    assert_int_equal(s.time.slept, 90 * MS);
}

/* It looks every few milliseconds: an item of 50 ms would make it wait for 450. */
static void a_job_does_not_wait_for_a_guest_that_has_become_idle(void **state)
{
    (void)state;
    struct shared_disk s = {
        .job.beside = &s.disk, .item_ns = 50 * MS, .busy_items = 1, .busy_sleeps = 3};
    assert_int_equal(run_shared(&s), 0);
    assert_int_equal(s.time.sleeps, 4);
    assert_in_range(s.time.slept, 4 * MS, 40 * MS);
}

/* As after a failure for which the job was paused. */
static void a_job_does_not_rest_long_after_an_item_that_took_very_long(void **state)
{
    (void)state;
    struct shared_disk s = {.job.beside = &s.disk,
                            .item_ns = 3600 * 1000 * MS,
                            .busy_items = 1,
                            .busy_sleeps = 1000000};
    assert_int_equal(run_shared(&s), 0);
    assert_int_equal(s.time.slept, 10 * 1000 * MS);
}

static void a_job_in_a_hurry_or_on_a_disk_of_its_own_does_not_wait(void **state)
{
    (void)state;
    struct shared_disk hurry = {.job = {.beside = &hurry.disk, .hurry = true}, .busy_items = 10};
    struct shared_disk alone = {.busy_items = 10};
    struct shared_disk this_run = {.job.beside = &this_run.disk, .busy_items = 10, .hurry = true};
    assert_int_equal(run_shared(&this_run), 0);
    assert_int_equal(this_run.time.sleeps, 0);
    assert_int_equal(run_shared(&hurry), 0);
    assert_int_equal(hurry.time.sleeps, 0);
    assert_int_equal(run_shared(&alone), 0);
    assert_int_equal(alone.time.sleeps, 0);
}

static void a_cancel_ends_the_wait_for_the_guest(void **state)
{
    (void)state;
    struct shared_disk s = {.job.beside = &s.disk,
                            .item_ns = 1000 * MS,
                            .busy_items = 10,
                            .busy_sleeps = 1000,
                            .cancel = true};
    assert_int_equal(run_shared(&s), -ECANCELED);
    assert_int_equal(s.worked, 1);
    assert_int_equal(s.time.sleeps, 1);
}

static void a_pause_ends_the_wait_for_the_guest(void **state)
{
    (void)state;
    struct shared_disk s = {.job.beside = &s.disk,
                            .item_ns = 1000 * MS,
                            .busy_items = 1,
                            .busy_sleeps = 1000,
                            .pause = true};
    s.time.change = &s.job; /* resumed by the 5th sleep */
    assert_int_equal(run_shared(&s), 0);
    assert_int_equal(s.worked, 10);
    assert_true(s.time.sleeps >= 5);
}

/* All workers wait for the guest at the same time; it would hang if they queued up. */
struct crossing {
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct dr_disk disk;
    unsigned given, asleep;
    _Atomic uint64_t now;
};

static int crossing_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    (void)item, (void)err;
    return ((struct crossing *)user)->given++ < 2;
}

static int crossing_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                         struct dr_error *err)
{
    struct crossing *c = user;
    (void)item, (void)buf, (void)err;
    atomic_fetch_add(&c->now, MS);
    return 0;
}

static uint64_t crossing_now(void *user)
{
    return atomic_load(&((struct crossing *)user)->now);
}

static void crossing_sleep(void *user, uint64_t ns)
{
    struct crossing *c = user;
    pthread_mutex_lock(&c->lock);
    c->asleep++;
    pthread_cond_broadcast(&c->more);
    while (c->asleep < 2)
        pthread_cond_wait(&c->more, &c->lock);
    pthread_mutex_unlock(&c->lock);
    atomic_fetch_add(&c->now, ns);
}

static void workers_wait_for_the_guest_beside_each_other(void **state)
{
    (void)state;
    struct crossing c = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};
    struct dr_copy_clock clock = {crossing_now, crossing_sleep, &c};
    struct dr_copy_policy p = {
        .user = &c, .next = crossing_next, .work = crossing_work, .clock = &clock};
    struct dr_job job = {.workers = 2, .beside = &c.disk};
    struct dr_pass pass;
    dr_disk_enter(&c.disk, &pass); /* busy all the time */
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    dr_disk_leave(&c.disk, &pass);
    assert_true(c.asleep >= 2);
}

struct seen_progress {
    unsigned calls;
    uint64_t last, total;
    bool went_back;
    uint64_t cancel_above;
    struct fake_time *time;
};

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    struct seen_progress *s = user;
    s->calls++;
    if (done < s->last)
        s->went_back = true;
    s->last = done;
    s->total = total;
    return s->cancel_above && done > s->cancel_above;
}

/* Each look at the clock lets a millisecond pass. */
static uint64_t ticking_now(void *user)
{
    return ((struct fake_time *)user)->now += 1000000;
}

static void progress_is_rare_and_ends_at_the_total(void **state)
{
    (void)state;
    struct bench *b = new_bench(1000);
    struct fake_time t = {0};
    struct dr_copy_clock clock = {ticking_now, fake_sleep, &t};
    struct seen_progress s = {0};
    struct dr_copy_policy p = policy_of(b);
    p.clock = &clock;
    struct dr_job job = {.workers = 1, .progress = on_progress, .user = &s};
    assert_int_equal(dr_copy_run(&p, &job, NULL), 0);
    assert_int_equal(s.last, 10000);
    assert_int_equal(s.total, 10000);
    assert_false(s.went_back);
    assert_in_range(s.calls, 15, 25); /* 1000 ms / 50 ms, and the last */
    free(b);
}

static void progress_can_cancel(void **state)
{
    (void)state;
    struct bench *b = new_bench(1000);
    struct fake_time t = {0};
    struct dr_copy_clock clock = {ticking_now, fake_sleep, &t};
    struct seen_progress s = {.cancel_above = 3000};
    struct dr_copy_policy p = policy_of(b);
    p.clock = &clock;
    struct dr_job job = {.workers = 1, .progress = on_progress, .user = &s};
    assert_int_equal(dr_copy_run(&p, &job, NULL), -ECANCELED);
    assert_true(b->emitted < 1000);
    free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_item_is_emitted_once),
        cmocka_unit_test(ordered_emit_keeps_the_order_one_at_a_time),
        cmocka_unit_test(one_worker_stays_on_the_calling_thread),
        cmocka_unit_test(buffers_are_as_many_as_workers_whatever_the_length),
        cmocka_unit_test(first_failure_stops_everything),
        cmocka_unit_test(enough_is_not_a_failure),
        cmocka_unit_test(a_cancelled_job_takes_no_more_items),
        cmocka_unit_test(as_many_requests_are_under_way_as_the_files_want),
        cmocka_unit_test(the_number_of_workers_follows_the_job_before_the_files),
        cmocka_unit_test(rate_spreads_the_items),
        cmocka_unit_test(a_new_rate_holds_for_what_is_waiting_already),
        cmocka_unit_test(a_paused_job_moves_nothing_until_it_is_resumed),
        cmocka_unit_test(a_paused_job_can_be_cancelled),
        cmocka_unit_test(progress_is_rare_and_ends_at_the_total),
        cmocka_unit_test(progress_can_cancel),
        cmocka_unit_test(a_job_works_a_tenth_of_the_time_beside_a_busy_guest),
        cmocka_unit_test(a_job_waits_only_after_items_beside_which_the_guest_was_busy),
        cmocka_unit_test(a_request_that_takes_long_counts_all_the_time),
        cmocka_unit_test(a_job_does_not_wait_for_a_guest_that_has_become_idle),
        cmocka_unit_test(a_job_does_not_rest_long_after_an_item_that_took_very_long),
        cmocka_unit_test(a_job_in_a_hurry_or_on_a_disk_of_its_own_does_not_wait),
        cmocka_unit_test(a_cancel_ends_the_wait_for_the_guest),
        cmocka_unit_test(a_pause_ends_the_wait_for_the_guest),
        cmocka_unit_test(workers_wait_for_the_guest_beside_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
