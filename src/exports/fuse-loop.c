/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The threads that answer requests.
 *
 * The kernel gives a request to the thread that has waited longest in read(2). libfuse's own loop
 * lets all its threads wait there, so that requests one after another go round all of them, each
 * cold. Here at most two threads read; the others are parked. A thread that got a request answers
 * it, and summons another one only if nobody reads any more, so that a slow request never keeps the
 * next one waiting, and quick ones stay with two threads.
 *
 * To wake a thread takes longer than to answer a request whose bytes are in memory. So a reader
 * that finds nothing looks again for some microseconds before it blocks. While requests are found
 * like that, or are there already, the loop is *busy*: nobody is summoned for a request that will
 * be answered in a moment. Instead one of the parked threads, the standby, wakes up each TICK_NS.
 * If the others have taken no request meanwhile, it reads (they are all at slow ones) or parks for
 * good (there are none). Requests that take long end it, too, for a while.
 *
 * A busy loop is *deep* or not. Where requests queue up, some threads read, nobody looks, and
 * whoever finds nothing blocks. Else one thread looks; others park, since the kernel would wake who
 * blocks in read(2) for each request in vain. */
#include <poll.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "exports/fuse-file.h"

#define READERS      2u
#define MOST_BUSY    4u                 /* threads that read while requests queue up, at most */
#define LOOK_NS      UINT64_C(25000)    /* before a reader blocks */
#define TICK_NS      UINT64_C(500000)   /* of the standby */
#define SLOW_NS      UINT64_C(100000)   /* of a request that takes long */
#define SLOW         8u                 /* so many of them in a row: not busy */
#define CALM_NS      UINT64_C(50000000) /* and not again for so long */
#define STREAK       8u                 /* requests for which nobody blocked: it is busy */
#define DEEP         16u                /* requests that were there already, less LESS_DEEP for */
#define LESS_DEEP    8u                 /* each that was not: they queue up. At 0 they do not */
#define MOST_DEEP    32u                /* is counted */
#define LOOK_DEEP    16u                /* while they queue up a reader looks once in so many */
#define MISSES       4u                 /* looks in vain after which a reader looks no more, */
#define LOOK_AGAIN   64u                /* but once in so many requests */
#define INTERRUPT_AT 16u                /* requests after which those who still block are to park */

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void fuse_loop_init(struct fuse_loop *l, struct fuse_session *session, struct dr_stall *stall)
{
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    pthread_condattr_t monotonic;

    *l = (struct fuse_loop){.session = session, .stall = stall};
    if (processors > 1) /* else the program that looks keeps the one that asks from asking */
        l->most_busy = (unsigned)dr_min((uint64_t)processors + 1, (uint64_t)MOST_BUSY);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->parked, &monotonic);
    pthread_cond_init(&l->end, NULL);
    pthread_condattr_destroy(&monotonic);
}

void fuse_loop_destroy(struct fuse_loop *l)
{
    pthread_cond_destroy(&l->end);
    pthread_cond_destroy(&l->parked);
    pthread_mutex_destroy(&l->lock);
}

/* With the lock held. */
static void end_loop(struct fuse_loop *l, int result)
{
    if (!l->ended)
        l->result = result;
    l->ended = true;
    pthread_cond_broadcast(&l->parked);
    pthread_cond_broadcast(&l->end);
}

void fuse_loop_stop(struct fuse_loop *l)
{
    DR_LOCK_SCOPE(&l->lock);
    end_loop(l, 0);
}

/* ------------------------------------------------------------------ who reads */

static void *work(void *arg);

/* Have another thread read. With the lock held. */
static int summon(struct fuse_loop *l)
{
    if (l->n_parked > l->n_summoned) {
        l->n_summoned++;
        pthread_cond_signal(&l->parked);
        return 0;
    }
    if (l->n_threads >= FUSE_LOOP_THREADS + dr_min(l->n_waiting, (unsigned)FUSE_LOOP_WAITING))
        return 0; /* the first that is done reads */
    struct fuse_loop_thread *t = &l->threads[l->n_threads];
    *t = (struct fuse_loop_thread){.loop = l};
    int e = pthread_create(&t->id, NULL, work, t);
    if (e == 0)
        l->n_threads++;
    return -e;
}

/* With the lock held. */
static void end_busy(struct fuse_loop *l, uint64_t calm)
{
    l->busy = false;
    l->deep = false;
    l->streak = l->score = 0;
    l->calm_until = now() + calm;
}

/* Others get on without the standby: if they take nothing, nobody reads (then this thread does), or
 * there is nothing to take. With the lock held. */
static void stand_by(struct fuse_loop *l)
{
    unsigned taken = l->n_taken;
    uint64_t end = now() + TICK_NS;
    struct timespec t = {(time_t)(end / 1000000000u), (long)(end % 1000000000u)};

    l->has_standby = true;
    pthread_cond_timedwait(&l->parked, &l->lock, &t);
    l->has_standby = false;
    if (l->busy && l->n_taken == taken && now() >= end)
        end_busy(l, l->n_readers == 0 ? CALM_NS : 0);
}

/* Until somebody summons this thread. With the lock held. */
static void park(struct fuse_loop *l)
{
    l->n_parked++;
    if (l->busy && !l->has_standby)
        stand_by(l);
    else
        pthread_cond_wait(&l->parked, &l->lock);
    l->n_parked--;
}

/* A parked thread is about to read: another one has to be the standby. With the lock held. */
static void leave(struct fuse_loop *l)
{
    if (l->n_summoned > 0)
        l->n_summoned--;
    if (!l->busy || l->has_standby)
        return;
    if (l->n_parked > 0)
        pthread_cond_signal(&l->parked);
    else
        l->busy = false;
}

/* With the lock held. */
static unsigned most_readers(const struct fuse_loop *l)
{
    return l->busy && l->deep ? l->most_busy : READERS;
}

/* Wait until this thread may read. yields: it is not needed now. False: the loop has ended. With
 * the lock held. */
static bool become_reader(struct fuse_loop_thread *t, bool yields)
{
    struct fuse_loop *l = t->loop;

    while (!l->ended && (l->n_readers >= most_readers(l) || (yields && l->busy))) {
        park(l);
        yields = l->n_summoned == 0;
        if (!yields || !l->busy)
            leave(l);
    }
    t->reads = !l->ended;
    t->turn++;
    l->n_readers += t->reads;
    return t->reads;
}

/* ------------------------------------------------------------------ while it is busy */

/* Those who have been in read(2) since the last call are to park. One whom the signal reaches just
 * before that blocks all the same, and is told again by the next call. With the lock held. */
static void interrupt_blocked(struct fuse_loop *l)
{
    for (unsigned i = 0; i < l->n_threads; i++) {
        struct fuse_loop_thread *t = &l->threads[i];
        if (t->reads && t->turn == t->turn_seen)
            pthread_kill(t->id, SIGUSR1);
        t->turn_seen = t->turn;
    }
}

/* Somebody has to be the standby. With the lock held. */
static void become_busy(struct fuse_loop *l)
{
    l->busy = l->n_parked + l->n_readers > 0;
    if (l->n_parked > 0)
        pthread_cond_signal(&l->parked);
}

enum found {
    UNSEEN, /* it did not look */
    MISSED, /* it looked in vain */
    LOOKED, /* it looked, and after some time there was a request */
    QUEUED  /* there was one at once */
};

/* Do requests queue up? With the lock held. */
static void note_depth(struct fuse_loop *l, enum found found)
{
    if (found == QUEUED)
        l->score += l->score < MOST_DEEP;
    else
        l->score -= (unsigned)dr_min(l->score, LESS_DEEP);
    if (l->score == 0)
        l->deep = false;
    else if (l->score >= DEEP)
        l->deep = true;
}

/* A request was taken. With the lock held. */
static void note_found(struct fuse_loop *l, enum found found)
{
    if (found == UNSEEN)
        return;
    note_depth(l, found);
    if (found == MISSED)
        return;
    l->streak++;
    if (!l->busy && l->streak >= STREAK && now() >= l->calm_until)
        become_busy(l);
    if (l->busy && !l->deep && l->streak % INTERRUPT_AT == 0)
        interrupt_blocked(l);
    unsigned active = l->n_threads - (l->n_parked - l->n_summoned) - l->n_waiting;
    if (l->busy && l->deep && active < l->most_busy)
        summon(l);
}

/* With the lock held. */
static void note_time(struct fuse_loop *l, uint64_t took)
{
    l->slow = took >= SLOW_NS ? l->slow + 1 : 0;
    if (l->slow >= SLOW) {
        l->slow = 0;
        end_busy(l, CALM_NS);
    }
}

/* Does a standby see to it that somebody reads? With the lock held. */
static bool has_reserve(const struct fuse_loop *l)
{
    return l->busy && l->n_parked > 0;
}

/* Look for a request. */
static enum found look(struct fuse_loop_thread *t)
{
    struct fuse_loop *l = t->loop;
    struct pollfd requests = {.fd = fuse_session_fd(l->session), .events = POLLIN};
    bool deep = l->deep;
    unsigned often = deep ? LOOK_DEEP : t->misses >= MISSES ? LOOK_AGAIN : 1;

    if (l->most_busy == 0 || ++t->unlooked < often)
        return UNSEEN;
    t->unlooked = 0;
    t->misses += t->misses < MISSES;
    uint64_t end = now() + LOOK_NS;
    for (bool first = true; first || (!deep && now() < end); first = false) {
        if (poll(&requests, 1, 0) > 0) {
            t->misses = 0;
            return first ? QUEUED : LOOKED;
        }
    }
    return MISSED;
}

/* This thread has looked in vain. May it block? If that happens all the time the loop is not busy:
 * it is of no use. With the lock held. */
static bool may_block(const struct fuse_loop_thread *t)
{
    struct fuse_loop *l = t->loop;

    if (l->ended || (l->busy && !l->deep && l->n_readers > 1))
        return false; /* others look */
    if (!l->deep && t->misses >= MISSES) {
        l->busy = false;
        l->streak = 0;
    }
    return true;
}

/* As fuse_session_receive_buf(); -EAGAIN: others look for requests. */
static int receive(struct fuse_loop_thread *t, struct fuse_buf *buf, enum found *found)
{
    *found = look(t);
    if (*found == MISSED) {
        DR_LOCK_SCOPE(&t->loop->lock);
        if (!may_block(t))
            return -EAGAIN;
    }
    return fuse_session_receive_buf(t->loop->session, buf);
}

/* ------------------------------------------------------------------ the threads */

static void *work(void *arg)
{
    struct fuse_loop_thread *t = arg;
    struct fuse_loop *l = t->loop;
    struct fuse_buf buf = {0};
    enum found found;
    int r = 0;

    pthread_mutex_lock(&l->lock);
    while (become_reader(t, r < 0)) {
        pthread_mutex_unlock(&l->lock);
        r = receive(t, &buf, &found);
        pthread_mutex_lock(&l->lock);
        t->reads = false;
        l->n_readers--;
        if (r == -EINTR || r == -EAGAIN)
            continue;
        if (r <= 0) { /* 0: unmounted */
            end_loop(l, r);
            break;
        }
        l->n_taken++;
        note_found(l, found);
        if (l->n_readers == 0 && !l->ended && !has_reserve(l))
            summon(l);
        pthread_mutex_unlock(&l->lock);
        uint64_t start = now();
        fuse_session_process_buf(l->session, &buf);
        start = now() - start;
        pthread_mutex_lock(&l->lock);
        note_time(l, start);
    }
    pthread_mutex_unlock(&l->lock);
    free(buf.mem);
    return NULL;
}

void fuse_loop_waits(struct fuse_loop *l, bool begin)
{
    DR_LOCK_SCOPE(&l->lock);
    l->n_waiting += begin ? 1 : -1u;
    if (begin && l->n_readers == 0 && !l->ended)
        summon(l);
}

static void interrupt_read(int sig)
{
    (void)sig; /* it is there to end a system call */
}

/* A thread may be about to read when the signal arrives, so it is sent until the thread has ended.
 */
static void join(pthread_t thread)
{
    struct timespec t;

    do {
        pthread_kill(thread, SIGUSR1);
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += 10000000;
        if (t.tv_nsec >= 1000000000) {
            t.tv_sec++;
            t.tv_nsec -= 1000000000;
        }
    } while (pthread_timedjoin_np(thread, NULL, &t) == ETIMEDOUT);
}

int fuse_loop_run(struct fuse_loop *l)
{
    const struct sigaction interrupt = {.sa_handler = interrupt_read};
    struct sigaction before;
    sigset_t unblocked;

    /* Our caller may have blocked it; the threads that serve inherit this thread's mask. */
    sigemptyset(&unblocked);
    sigaddset(&unblocked, SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &unblocked, NULL);
    sigaction(SIGUSR1, &interrupt, &before);
    pthread_mutex_lock(&l->lock);
    int r = summon(l);
    if (r < 0)
        end_loop(l, r);
    while (!l->ended)
        pthread_cond_wait(&l->end, &l->lock);
    unsigned n = l->n_threads; /* once it has ended, nobody summons */
    pthread_mutex_unlock(&l->lock);
    if (l->stall)
        dr_stall_end(l->stall);
    for (unsigned i = 0; i < n; i++)
        join(l->threads[i].id);
    sigaction(SIGUSR1, &before, NULL);
    return l->result;
}
