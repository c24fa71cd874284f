/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_BASE_THREAD_H
#define DR_BASE_THREAD_H

#include <pthread.h>
#include <signal.h>

/* As pthread_create, for a thread that is given none of the program's signals: they go on to the
 * threads that the program expects them in. */
static inline int dr_thread_start(pthread_t *thread, void *(*run)(void *user), void *user)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(thread, NULL, run, user);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return r;
}

#endif
