/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Range locks and epochs. Threads meet through counters, never through time. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "core/internal.h"

#define THREADS 4
#define ROUNDS  20000
#define SLOTS   64

struct shared {
    struct dr_ranges *ranges;
    uint64_t slots[SLOTS]; /* plain memory: TSan and the sums see a lock that does not lock */
    unsigned seed;
};

static unsigned step(unsigned *x)
{
    *x = *x * 1664525u + 1013904223u;
    return *x >> 8;
}

static void *add_under_lock(void *arg)
{
    struct shared *s = arg;
    unsigned x = __atomic_add_fetch(&s->seed, 1, __ATOMIC_RELAXED) * 7919u;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t first = step(&x) % SLOTS, n = 1 + step(&x) % (SLOTS - first);
        n = n > 8 ? 8 : n;
        bool exclusive = step(&x) % 4 != 0;
        struct dr_range range;
        volatile uint64_t seen = 0;
        dr_range_lock(s->ranges, &range, first, n, exclusive);
        for (uint64_t k = first; k < first + n; k++) {
            if (exclusive)
                s->slots[k]++;
            else
                seen += s->slots[k];
        }
        (void)seen; /* the reads are what ThreadSanitizer watches */
        dr_range_unlock(s->ranges, &range);
    }
    return NULL;
}

static void ranges_that_overlap_exclude_each_other(void **state)
{
    (void)state;
    struct shared s = {.ranges = dr_ranges_new()};
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, add_under_lock, &s);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    /* The same sequences, one after another, must add up to the same. */
    struct shared alone = {.ranges = dr_ranges_new()};
    for (int i = 0; i < THREADS; i++)
        add_under_lock(&alone);
    assert_memory_equal(s.slots, alone.slots, sizeof(s.slots));
    dr_ranges_free(alone.ranges);
    dr_ranges_free(s.ranges);
}

static void shared_ranges_do_not_wait_for_each_other(void **state)
{
    (void)state;
    struct dr_ranges *ranges = dr_ranges_new();
    struct dr_range a, b, c;
    dr_range_lock(ranges, &a, 0, 100, false);
    dr_range_lock(ranges, &b, 50, 100, false); /* would hang */
    dr_range_lock(ranges, &c, 150, 10, true);  /* touches neither */
    dr_range_unlock(ranges, &b);
    dr_range_unlock(ranges, &a);
    dr_range_unlock(ranges, &c);
    dr_ranges_free(ranges);
}

struct drainer {
    struct dr_ranges *ranges;
    _Atomic int left;
    _Atomic bool drained;
    bool drained_while_inside;
};

static void *drain(void *arg)
{
    struct drainer *d = arg;
    dr_epoch_drain(d->ranges);
    d->drained_while_inside = atomic_load(&d->left) == 0;
    atomic_store(&d->drained, true);
    return NULL;
}

static void draining_waits_for_those_inside_but_not_for_later_ones(void **state)
{
    (void)state;
    struct drainer d = {.ranges = dr_ranges_new()};
    unsigned early = dr_epoch_enter(d.ranges), late = early;
    pthread_t thread;
    pthread_create(&thread, NULL, drain, &d);
    /* The epoch turns when the drainer has come: then newcomers stand in the other one. */
    while (late == early) {
        late = dr_epoch_enter(d.ranges);
        if (late == early)
            dr_epoch_leave(d.ranges, late);
    }
    assert_false(atomic_load(&d.drained));
    atomic_store(&d.left, 1);
    dr_epoch_leave(d.ranges, early);
    pthread_join(thread, NULL); /* although `late` is still inside */
    assert_false(d.drained_while_inside);
    dr_epoch_leave(d.ranges, late);
    dr_epoch_drain(d.ranges);
    dr_ranges_free(d.ranges);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranges_that_overlap_exclude_each_other),
        cmocka_unit_test(shared_ranges_do_not_wait_for_each_other),
        cmocka_unit_test(draining_waits_for_those_inside_but_not_for_later_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
