/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Requests of a guest that cannot be done now, because a file system is full, wait here instead of
 * failing: a guest that is told of a failed write takes its disk for broken, and may lose what its
 * programs have written.
 *
 * A request is made first of all. One that fails so, and all that come while one waits, stand in a
 * line and are made again one after another, the oldest first: the client of an old request may
 * have gone meanwhile, and what it wrote must not come to lie over what its successor writes. The
 * first in the line tries when somebody says that it may, and once a second, since space may
 * appear without a word. Nothing is locked while a request is made or waits, and none is past its
 * disk's gate while it waits, so the disk's images may change. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "live/live.h"

#define AGAIN_S 1

struct waiter {
    struct waiter *next;
    bool failed;              /* it was made, in vain */
    unsigned turn;            /* of the stall, when it was made last */
    struct timespec patience; /* the first in the line is made again at this time */
};

struct dr_stall {
    struct dr_stall_options o;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct waiter *first;
    struct waiter **end;
    _Atomic unsigned waiting; /* how many stand in the line */
    unsigned turn; /* another one since the line was told to move, or the first in it was done */
    bool ended;
    bool asked; /* somebody has said that it may go on, and waits for what becomes of it */
    int error;  /* positive errno for which the first one waits; 0 */
    live_stall_listener listener;
    void *listening;
};

int dr_stall_new(const struct dr_stall_options *options, struct dr_stall **stall,
                 struct dr_error *err)
{
    DR_REQUIRE(stall, err);
    *stall = NULL;
    DR_REQUIRE(options, err);
    if (options->policy > DR_STALL_STOP)
        return dr_fail(err, EINVAL, "there is no policy %u for requests that fail",
                       (unsigned)options->policy);
    struct dr_stall *fresh = calloc(1, sizeof(*fresh));
    if (!fresh)
        return dr_fail(err, ENOMEM, "out of memory");
    fresh->o = *options;
    fresh->end = &fresh->first;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&fresh->lock, NULL);
    pthread_cond_init(&fresh->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    *stall = fresh;
    return 0;
}

void dr_stall_free(struct dr_stall *stall)
{
    if (!stall)
        return;
    pthread_cond_destroy(&stall->changed);
    pthread_mutex_destroy(&stall->lock);
    free(stall);
}

/* ------------------------------------------------------------------ telling */

/* Without the lock: who hears it may ask the stall. */
static void tell(struct dr_stall *stall, int error, bool waits, const struct dr_error *err)
{
    pthread_mutex_lock(&stall->lock);
    live_stall_listener listener = stall->listener;
    void *listening = stall->listening;
    pthread_mutex_unlock(&stall->lock);
    const char *text = err->text[0] ? err->text : strerrordesc_np(error);
    if (listener)
        listener(listening, error, waits, text);
    if (waits && stall->o.waits)
        stall->o.waits(stall->o.user, text);
}

/* Is the request to wait after this failure? */
static bool shall_wait(const struct dr_stall *stall, int r)
{
    if (stall->o.policy == DR_STALL_STOP)
        return r < 0 && r != -ENOTSUP && r != -EINVAL && r != -EROFS;
    return stall->o.policy == DR_STALL_ENOSPC && (r == -ENOSPC || r == -EDQUOT);
}

/* ------------------------------------------------------------------ the line */

static void join(struct dr_stall *stall, struct waiter *me)
{
    *stall->end = me;
    stall->end = &me->next;
    atomic_fetch_add(&stall->waiting, 1);
}

/* The first one goes. */
static void leave(struct dr_stall *stall, struct waiter *me)
{
    struct waiter **at = &stall->first;
    while (*at != me)
        at = &(*at)->next;
    *at = me->next;
    if (!me->next)
        stall->end = at;
    atomic_fetch_sub(&stall->waiting, 1);
    if (at == &stall->first)
        stall->error = 0;
    stall->turn++;
    pthread_cond_broadcast(&stall->changed);
}

static bool is_over(const struct timespec *then)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec > then->tv_sec ||
           (now.tv_sec == then->tv_sec && now.tv_nsec >= then->tv_nsec);
}

/* Until this one is to be made again. */
static void wait_for_turn(struct dr_stall *stall, struct waiter *me)
{
    while (!stall->ended) {
        if (stall->first != me)
            pthread_cond_wait(&stall->changed, &stall->lock);
        else if (!me->failed || me->turn != stall->turn || is_over(&me->patience))
            return;
        else
            pthread_cond_timedwait(&stall->changed, &stall->lock, &me->patience);
    }
}

static void note_failure(struct dr_stall *stall, struct waiter *me, int r)
{
    me->failed = true;
    me->turn = stall->turn;
    clock_gettime(CLOCK_MONOTONIC, &me->patience);
    me->patience.tv_sec += AGAIN_S;
    if (stall->first == me)
        stall->error = -r;
}

static int end_waiting(const struct dr_error *why, struct dr_error *err)
{
    dr_error_reset(err);
    return dr_fail(err, ESHUTDOWN, "the server ends before a write could be made again: %.1000s",
                   why->text);
}

/* The request stands in the line, and failed if failure says so. */
static int wait_and_make(struct dr_stall *stall, struct waiter *me,
                         int (*request)(void *user, struct dr_error *err), void *user,
                         struct dr_error *err)
{
    struct dr_error why = *err;
    int r;
    pthread_mutex_lock(&stall->lock);
    for (;;) {
        wait_for_turn(stall, me);
        if (stall->ended) {
            r = end_waiting(&why, err);
            break;
        }
        bool asked = stall->asked;
        stall->asked = false;
        pthread_mutex_unlock(&stall->lock);
        dr_error_reset(err);
        r = request(user, err);
        bool again = r < 0 && shall_wait(stall, r);
        if (r < 0 && (!again || asked || !me->failed))
            tell(stall, -r, again, err);
        pthread_mutex_lock(&stall->lock);
        if (!again)
            break;
        why = *err;
        note_failure(stall, me, r);
    }
    leave(stall, me);
    pthread_mutex_unlock(&stall->lock);
    return r;
}

int dr_stall_run(struct dr_stall *stall, int (*request)(void *user, struct dr_error *err),
                 void *user, struct dr_error *err)
{
    struct dr_error own = DR_ERROR_INIT;
    struct waiter me = {0};
    if (!err)
        err = &own;
    int r = 0;
    if (atomic_load(&stall->waiting) == 0) {
        r = request(user, err);
        if (r >= 0)
            return r;
        if (!shall_wait(stall, r)) {
            tell(stall, -r, false, err);
            return r;
        }
    }
    pthread_mutex_lock(&stall->lock);
    join(stall, &me);
    bool first = stall->first == &me;
    if (r < 0)
        note_failure(stall, &me, r);
    pthread_mutex_unlock(&stall->lock);
    if (r < 0 && first)
        tell(stall, -r, true, err);
    return wait_and_make(stall, &me, request, user, err);
}

/* ------------------------------------------------------------------ from outside */

void dr_stall_resume(struct dr_stall *stall)
{
    DR_LOCK_SCOPE(&stall->lock);
    stall->asked = atomic_load(&stall->waiting) > 0;
    stall->turn++;
    pthread_cond_broadcast(&stall->changed);
}

void dr_stall_end(struct dr_stall *stall)
{
    DR_LOCK_SCOPE(&stall->lock);
    stall->ended = true;
    pthread_cond_broadcast(&stall->changed);
}

unsigned dr_stall_waiting(const struct dr_stall *stall)
{
    return atomic_load(&stall->waiting);
}

int live_stall_error(struct dr_stall *stall)
{
    DR_LOCK_SCOPE(&stall->lock);
    return stall->error;
}

void live_stall_listen(struct dr_stall *stall, live_stall_listener listener, void *user)
{
    DR_LOCK_SCOPE(&stall->lock);
    stall->listener = listener;
    stall->listening = user;
}
