/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdkit, told to end, accepts no more clients and answers what it was asked, but waits for its
 * clients to leave. An idle guest never does, so the server would not end, and its disks would
 * never be closed.
 *
 * So this takes over the signals that tell nbdkit to end. The handler calls nbdkit's own and wakes
 * a thread that does nothing else; that thread shuts down the receiving side of every client's
 * connection. The threads of nbdkit then see the end of their clients' requests, send what replies
 * are left, and leave.
 *
 * A client that is stopped, or does not read what it asked for, keeps its threads in send(2).
 * Shutting down its connection for writing, too, would not do: nbdkit 1.32 aborts when two
 * replies fail on one connection. So the disks are closed without nbdkit after a while. */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "base/error.h"
#include "base/thread.h"
#include "exports/clients.h"
#include "exports/hang-up.h"

static const int numbers[] = {SIGTERM, SIGINT, SIGQUIT, SIGHUP};
#define N_SIGNALS (sizeof(numbers) / sizeof(numbers[0]))

static struct sigaction before[N_SIGNALS];
static sem_t wake;
static pthread_t thread;
static atomic_bool running;
static atomic_bool stop;

/* ------------------------------------------------------------------ requests */

static void (*when_ending)(void);
static void (*when_given_up)(void);
static atomic_bool given_up;
static atomic_uint under_way;
static atomic_ulong begun; /* so far */

bool hang_up_begin_request(void)
{
    atomic_fetch_add(&under_way, 1);
    atomic_fetch_add_explicit(&begun, 1, memory_order_relaxed);
    if (!atomic_load(&given_up))
        return true;
    atomic_fetch_sub(&under_way, 1);
    return false;
}

void hang_up_end_request(void)
{
    atomic_fetch_sub(&under_way, 1);
}

/* A request either counts itself before we look here, or sees afterwards that we have given up. */
static void give_up(void)
{
    atomic_store(&given_up, true);
    while (atomic_load(&under_way) > 0)
        sched_yield();
    when_given_up();
}

/* ------------------------------------------------------------------ the thread that ends them */

/* Asleep until the end. Then a connection may have been accepted a moment before nbdkit looked at
 * the signal and after we looked at the connections, so look again until nbdkit is done. */
static void *run(void *unused)
{
    while (sem_wait(&wake) < 0)
        continue;
    if (!atomic_load(&stop))
        when_ending();
    unsigned long before_wait = atomic_load(&begun);
    for (int idle = 0; !atomic_load(&stop) && idle < HANG_UP_PATIENCE;) {
        struct timespec until;
        clients_hang_up();
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec++;
        if (sem_timedwait(&wake, &until) == 0 || errno != ETIMEDOUT)
            continue;
        unsigned long now = atomic_load(&begun);
        idle = now == before_wait && atomic_load(&under_way) == 0 ? idle + 1 : 0;
        before_wait = now;
    }
    if (!atomic_load(&stop))
        give_up();
    return unused;
}

static void on_signal(int number, siginfo_t *info, void *context)
{
    int e = errno;
    for (size_t i = 0; i < N_SIGNALS; i++) {
        if (numbers[i] != number)
            continue;
        if (before[i].sa_flags & SA_SIGINFO)
            before[i].sa_sigaction(number, info, context);
        else
            before[i].sa_handler(number);
    }
    sem_post(&wake);
    errno = e;
}

/* Only signals that have a handler end the server in good order. */
static void take_over(size_t i)
{
    sigaction(numbers[i], NULL, &before[i]);
    if (!(before[i].sa_flags & SA_SIGINFO) &&
        (before[i].sa_handler == SIG_DFL || before[i].sa_handler == SIG_IGN))
        return;
    struct sigaction ours = before[i];
    ours.sa_sigaction = on_signal;
    ours.sa_flags |= SA_SIGINFO;
    sigaction(numbers[i], &ours, NULL);
}

int hang_up_on_signals(void (*ending)(void), void (*give_up_now)(void), struct dr_error *err)
{
    when_ending = ending;
    when_given_up = give_up_now;
    clients_note_listeners();
    sem_init(&wake, 0, 0);
    atomic_store(&stop, false);
    int r = dr_thread_start(&thread, run, NULL);
    if (r != 0)
        return dr_fail_errno(err, r, "cannot start a thread");
    running = true;
    for (size_t i = 0; i < N_SIGNALS; i++)
        take_over(i);
    return 0;
}

void hang_up_now(void)
{
    if (running)
        sem_post(&wake);
}

void hang_up_stop(void)
{
    if (!running)
        return;
    for (size_t i = 0; i < N_SIGNALS; i++)
        sigaction(numbers[i], &before[i], NULL);
    running = false; /* hang_up_now() may be called meanwhile, so the semaphore stays */
    atomic_store(&stop, true);
    sem_post(&wake);
    pthread_join(thread, NULL);
    clients_forget_listeners();
}
