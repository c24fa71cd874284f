/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The threads that answer requests.
 *
 * The kernel gives a request to the thread that has waited longest in read(2). libfuse's own loop
 * lets all its threads wait there, so that requests one after another go round all of them, each
 * cold. Here at most two threads read; the others are parked. A thread that got a request answers
 * it, and summons another one only if nobody reads any more, so that a slow request never keeps the
 * next one waiting, and quick ones stay with two threads. */
#include <signal.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "exports/fuse-file.h"

#define READERS 2

void fuse_loop_init(struct fuse_loop *l, struct fuse_session *session, struct dr_stall *stall)
{
    *l = (struct fuse_loop){.session = session, .stall = stall};
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->parked, NULL);
    pthread_cond_init(&l->end, NULL);
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

static void *work(void *arg);

/* Have another thread read. With the lock held. */
static int summon(struct fuse_loop *l)
{
    if (l->n_parked > 0) {
        pthread_cond_signal(&l->parked);
        return 0;
    }
    if (l->n_threads >= FUSE_LOOP_THREADS + dr_min(l->n_waiting, (unsigned)FUSE_LOOP_WAITING))
        return 0; /* the first that is done reads */
    int e = pthread_create(&l->threads[l->n_threads], NULL, work, l);
    if (e == 0)
        l->n_threads++;
    return -e;
}

/* Wait until this thread may read. False: the loop has ended. With the lock held. */
static bool become_reader(struct fuse_loop *l)
{
    while (!l->ended && l->n_readers >= READERS) {
        l->n_parked++;
        pthread_cond_wait(&l->parked, &l->lock);
        l->n_parked--;
    }
    if (!l->ended)
        l->n_readers++;
    return !l->ended;
}

static void *work(void *arg)
{
    struct fuse_loop *l = arg;
    struct fuse_buf buf = {0};

    pthread_mutex_lock(&l->lock);
    while (become_reader(l)) {
        pthread_mutex_unlock(&l->lock);
        int r = fuse_session_receive_buf(l->session, &buf);
        pthread_mutex_lock(&l->lock);
        l->n_readers--;
        if (r == -EINTR)
            continue;
        if (r <= 0) { /* 0: unmounted */
            end_loop(l, r);
            break;
        }
        if (l->n_readers == 0 && !l->ended)
            summon(l);
        pthread_mutex_unlock(&l->lock);
        fuse_session_process_buf(l->session, &buf);
        pthread_mutex_lock(&l->lock);
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
        join(l->threads[i]);
    sigaction(SIGUSR1, &before, NULL);
    return l->result;
}
