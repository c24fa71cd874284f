/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs: what can be asked of them and told to them while they run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "ops/copy.h"

static struct dr_job *new_job(const char *id, const struct dr_job_options *options)
{
    struct dr_job *job = NULL;
    assert_int_equal(dr_job_new(id, options, &job, NULL), 0);
    return job;
}

static enum dr_job_state state_of(const struct dr_job *job)
{
    struct dr_job_status status;
    dr_job_query(job, &status);
    return status.state;
}

static void ids_are_as_given_or_unlike_each_other(void **state)
{
    (void)state;
    struct dr_job *named = new_job("mirror-0.a_b", NULL), *a = new_job(NULL, NULL),
                  *b = new_job(NULL, NULL);
    assert_string_equal(dr_job_id(named), "mirror-0.a_b");
    assert_string_not_equal(dr_job_id(a), dr_job_id(b));
    dr_job_free(named);
    dr_job_free(a);
    dr_job_free(b);
    dr_job_free(NULL);
}

static void ids_that_qemu_would_refuse_are_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"", "1st", "-a", "a b", "a/b", "\xc3\xa4", "a#0"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct dr_job *job = (struct dr_job *)&bad;
        struct dr_error err = DR_ERROR_INIT;
        assert_int_equal(dr_job_new(bad[i], NULL, &job, &err), -EINVAL);
        assert_null(job);
        assert_non_null(strstr(err.text, "letter"));
    }
}

/* ------------------------------------------------------------------ a run in a thread */

/* Items of 10 bytes; the worker says when it is in one, and waits until it may end it. */
struct stage {
    struct dr_job *job;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned items, given, ended, may_end;
    bool in_item;
    int result;
};

static int stage_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct stage *s = user;
    (void)err;
    item->len = 10;
    return s->given++ < s->items;
}

static int stage_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct stage *s = user;
    (void)item;
    (void)buf;
    (void)err;
    pthread_mutex_lock(&s->lock);
    s->in_item = true;
    pthread_cond_broadcast(&s->changed);
    while (s->ended == s->may_end)
        pthread_cond_wait(&s->changed, &s->lock);
    s->ended++;
    s->in_item = false;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

static void *stage_run(void *user)
{
    struct stage *s = user;
    struct dr_copy_policy policy = {
        .user = s, .next = stage_next, .work = stage_work, .total = s->items * 10};
    s->result = dr_job_begin(s->job, NULL);
    if (s->result == 0)
        s->result = dr_job_end(s->job, dr_copy_run(&policy, s->job, NULL));
    return NULL;
}

static void let_end(struct stage *s, unsigned n)
{
    pthread_mutex_lock(&s->lock);
    s->may_end += n;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

static void wait_until_in_item(struct stage *s)
{
    pthread_mutex_lock(&s->lock);
    while (!s->in_item)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

static void wait_for_state(const struct dr_job *job, enum dr_job_state want)
{
    while (state_of(job) != want)
        sched_yield();
}

static struct stage stage_of(struct dr_job *job, unsigned items)
{
    return (struct stage){.job = job,
                          .items = items,
                          .lock = PTHREAD_MUTEX_INITIALIZER,
                          .changed = PTHREAD_COND_INITIALIZER};
}

static void a_pause_holds_once_the_item_at_hand_is_done_and_ends_at_once(void **state)
{
    (void)state;
    const struct dr_job_options one = {.workers = 1};
    struct dr_job *job = new_job(NULL, &one);
    struct stage s = stage_of(job, 3);
    pthread_t thread;
    assert_int_equal(state_of(job), DR_JOB_CREATED);
    assert_int_equal(pthread_create(&thread, NULL, stage_run, &s), 0);
    wait_until_in_item(&s);
    dr_job_pause(job);
    assert_int_equal(state_of(job), DR_JOB_RUNNING);
    let_end(&s, 2);
    wait_for_state(job, DR_JOB_PAUSED);
    assert_int_equal(s.ended, 1);
    dr_job_resume(job);
    wait_until_in_item(&s); /* the third: it may not end yet */
    assert_int_equal(state_of(job), DR_JOB_RUNNING);
    let_end(&s, 1);
    pthread_join(thread, NULL);
    struct dr_job_status status;
    dr_job_query(job, &status);
    assert_int_equal(status.state, DR_JOB_CONCLUDED);
    assert_int_equal(status.result, 0);
    assert_int_equal(status.done, 30);
    assert_int_equal(status.total, 30);
    assert_false(status.cancelled);
    dr_job_free(job);
}

static struct dr_job *job_of_handler;

static void cancel_it(int number)
{
    (void)number;
    dr_job_cancel(job_of_handler);
}

/* The worker sleeps in the pause without a time-out: only the bell wakes it. */
static void a_signal_handler_cancels_a_paused_job(void **state)
{
    (void)state;
    const struct dr_job_options one = {.workers = 1};
    struct dr_job *job = new_job(NULL, &one);
    struct stage s = stage_of(job, 3);
    struct sigaction action = {.sa_handler = cancel_it, .sa_flags = SA_RESTART}, old;
    pthread_t thread;
    job_of_handler = job;
    sigaction(SIGUSR2, &action, &old);
    dr_job_pause(job);
    assert_int_equal(pthread_create(&thread, NULL, stage_run, &s), 0);
    wait_for_state(job, DR_JOB_PAUSED);
    raise(SIGUSR2);
    pthread_join(thread, NULL);
    sigaction(SIGUSR2, &old, NULL);
    assert_int_equal(s.result, -ECANCELED);
    assert_int_equal(s.ended, 0);
    struct dr_job_status status;
    dr_job_query(job, &status);
    assert_int_equal(status.state, DR_JOB_CONCLUDED);
    assert_int_equal(status.result, -ECANCELED);
    assert_true(status.cancelled);
    dr_job_free(job);
}

/* At a byte a second the test would take more than an hour. */
static void a_new_rate_wakes_the_worker_that_waits_for_the_old_one(void **state)
{
    (void)state;
    const struct dr_job_options slow = {.workers = 1, .rate = 1};
    struct dr_job *job = new_job(NULL, &slow);
    struct stage s = stage_of(job, 400);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, stage_run, &s), 0);
    wait_until_in_item(&s);
    let_end(&s, 400);
    dr_job_set_rate(job, 0);
    pthread_join(thread, NULL);
    assert_int_equal(s.result, 0);
    assert_int_equal(s.ended, 400);
    dr_job_free(job);
}

static void a_job_serves_one_operation(void **state)
{
    (void)state;
    struct dr_job *job = new_job("once", NULL);
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_job_begin(job, &err), 0);
    assert_int_equal(dr_job_begin(job, &err), -EBUSY);
    assert_non_null(strstr(err.text, "once"));
    assert_int_equal(dr_job_end(job, 7), 7);
    assert_int_equal(dr_job_begin(job, NULL), -EBUSY);
    assert_int_equal(dr_job_begin(NULL, NULL), 0);
    dr_job_free(job);
}

struct heard {
    uint64_t done, total;
    int calls;
};

static int hear(void *user, uint64_t done, uint64_t total)
{
    struct heard *h = user;
    h->done = done;
    h->total = total;
    h->calls++;
    return 0;
}

/* convert of several sources, say: each is a run of its own. */
static void progress_over_several_runs_adds_up(void **state)
{
    (void)state;
    struct heard h = {0};
    const struct dr_job_options options = {.workers = 1, .progress = hear, .user = &h};
    struct dr_job *job = new_job(NULL, &options);
    struct stage s = stage_of(job, 2);
    struct dr_copy_policy policy = {
        .user = &s, .next = stage_next, .work = stage_work, .total = 20, .before = 5, .after = 75};
    s.may_end = 100;
    assert_int_equal(dr_copy_run(&policy, job, NULL), 0);
    assert_int_equal(h.done, 25);
    assert_int_equal(h.total, 100);
    int calls = h.calls;
    policy.silent = true;
    s.given = 0;
    assert_int_equal(dr_copy_run(&policy, job, NULL), 0);
    assert_int_equal(h.calls, calls);
    dr_job_free(job);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ids_are_as_given_or_unlike_each_other),
        cmocka_unit_test(ids_that_qemu_would_refuse_are_refused),
        cmocka_unit_test(a_pause_holds_once_the_item_at_hand_is_done_and_ends_at_once),
        cmocka_unit_test(a_signal_handler_cancels_a_paused_job),
        cmocka_unit_test(a_new_rate_wakes_the_worker_that_waits_for_the_old_one),
        cmocka_unit_test(a_job_serves_one_operation),
        cmocka_unit_test(progress_over_several_runs_adds_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
