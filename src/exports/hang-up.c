/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdkit, told to end, accepts no more clients and answers what it was asked, but waits for its
 * clients to leave. An idle guest never does, so the server would not end, and its disks would
 * never be closed.
 *
 * So this takes over the signals that tell nbdkit to end. The handler calls nbdkit's own and wakes
 * a thread that does nothing else; that thread shuts down the receiving side of every connection.
 * The threads of nbdkit then see the end of their clients' requests, send what replies are left,
 * and leave. */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "exports/hang-up.h"

static const int numbers[] = {SIGTERM, SIGINT, SIGQUIT};
#define N_SIGNALS (sizeof(numbers) / sizeof(numbers[0]))

static struct sigaction before[N_SIGNALS];
static sem_t wake;
static pthread_t thread;
static bool running;
static atomic_bool stop;

/* A connection of a client: a stream that has a peer. */
static bool is_connection(int fd)
{
    struct sockaddr_storage peer;
    socklen_t size = sizeof(peer), type_size = sizeof(int);
    int type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_size) == 0 && type == SOCK_STREAM &&
           getpeername(fd, (struct sockaddr *)&peer, &size) == 0;
}

static void shut_connections(void)
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));) {
        int fd = (int)strtol(entry->d_name, NULL, 10);
        if (entry->d_name[0] != '.' && fd > STDERR_FILENO && is_connection(fd))
            shutdown(fd, SHUT_RD);
    }
    closedir(dir);
}

/* Asleep until the end. Then a connection may have been accepted a moment before nbdkit looked at
 * the signal and after we looked at the connections, so look again until nbdkit is done. */
static void *run(void *unused)
{
    while (sem_wait(&wake) < 0)
        continue;
    while (!atomic_load(&stop)) {
        struct timespec until;
        shut_connections();
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec++;
        sem_timedwait(&wake, &until);
    }
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

/* Signals go on being delivered to the threads that nbdkit expects them in. */
static int start_thread(void)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
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

int hang_up_on_signals(struct dr_error *err)
{
    sem_init(&wake, 0, 0);
    atomic_store(&stop, false);
    int r = start_thread();
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
    atomic_store(&stop, true);
    sem_post(&wake);
    pthread_join(thread, NULL);
    sem_destroy(&wake);
    running = false;
}
