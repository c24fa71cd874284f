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
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/error.h"
#include "base/thread.h"
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

/* ------------------------------------------------------------------ connections
 *
 * A connection of a client was accepted by a socket that listens, so it has that one's name, or its
 * port. Other connections of the process, to storage for example, are left alone. */

#define LISTENERS_MOST 16

union name {
    struct sockaddr_storage any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    struct sockaddr_un local;
};

static union name listeners[LISTENERS_MOST];
static size_t n_listeners;

static bool is_stream(int fd, bool listening)
{
    socklen_t type_size = sizeof(int), accepts_size = sizeof(int);
    int type = 0, accepts = 0;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_size) == 0 && type == SOCK_STREAM &&
           getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &accepts, &accepts_size) == 0 &&
           (accepts != 0) == listening;
}

static bool get_name(int fd, union name *name)
{
    socklen_t size = sizeof(*name);
    memset(name, 0, sizeof(*name));
    return getsockname(fd, (struct sockaddr *)name, &size) == 0;
}

static bool same_listener(const union name *a, const union name *b)
{
    if (a->any.ss_family != b->any.ss_family)
        return false;
    if (a->any.ss_family == AF_INET)
        return a->v4.sin_port == b->v4.sin_port;
    if (a->any.ss_family == AF_INET6)
        return a->v6.sin6_port == b->v6.sin6_port;
    if (a->any.ss_family == AF_UNIX)
        return memcmp(a->local.sun_path, b->local.sun_path, sizeof(a->local.sun_path)) == 0;
    return true; /* vsock: nobody but clients has it */
}

static void note_listener(int fd)
{
    if (n_listeners < LISTENERS_MOST && is_stream(fd, true) &&
        get_name(fd, &listeners[n_listeners]))
        n_listeners++;
}

static void shut_if_clients(int fd)
{
    union name name;
    if (!is_stream(fd, false) || !get_name(fd, &name))
        return;
    for (size_t i = 0; i < n_listeners; i++)
        if (same_listener(&listeners[i], &name))
            shutdown(fd, SHUT_RD);
}

static void for_each_descriptor(void (*each)(int fd))
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir)
        return;
    for (struct dirent *entry; (entry = readdir(dir));)
        if (entry->d_name[0] != '.')
            each((int)strtol(entry->d_name, NULL, 10));
    closedir(dir);
}

void hang_up_on_clients(void)
{
    for_each_descriptor(shut_if_clients);
}

static bool is_socket_at(const union name *name, const char *path)
{
    struct stat ours, given;
    return name->any.ss_family == AF_UNIX &&
           (strcmp(name->local.sun_path, path) == 0 ||
            (stat(name->local.sun_path, &ours) == 0 && stat(path, &given) == 0 &&
             ours.st_dev == given.st_dev && ours.st_ino == given.st_ino));
}

static bool is_port(const union name *name, const char *port)
{
    long number = strtol(port, NULL, 10);
    return (name->any.ss_family == AF_INET && ntohs(name->v4.sin_port) == number) ||
           (name->any.ss_family == AF_INET6 && ntohs(name->v6.sin6_port) == number);
}

bool hang_up_listens_at(const char *path, const char *port)
{
    for (size_t i = 0; i < n_listeners; i++)
        if (path ? is_socket_at(&listeners[i], path) : is_port(&listeners[i], port))
            return true;
    return false;
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
        for_each_descriptor(shut_if_clients);
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
    for_each_descriptor(note_listener);
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
    n_listeners = 0;
}
