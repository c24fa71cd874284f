/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Scope guards: what a scope owns is gone when the scope ends. */
#ifndef DR_BASE_CLEANUP_H
#define DR_BASE_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void dr_cleanup_free(void *p)
{
    free(*(void **)p);
}

static inline void dr_cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void dr_cleanup_unlock(pthread_mutex_t **m)
{
    if (*m)
        pthread_mutex_unlock(*m);
}

#define CLEANUP_FREE  __attribute__((cleanup(dr_cleanup_free)))
#define CLEANUP_CLOSE __attribute__((cleanup(dr_cleanup_close)))

#define DR_JOIN_(a, b) a##b
#define DR_JOIN(a, b)  DR_JOIN_(a, b)
/* Lock until the end of the scope. */
#define DR_LOCK_SCOPE(mutex)                                                      \
    __attribute__((cleanup(dr_cleanup_unlock), unused)) pthread_mutex_t *DR_JOIN( \
        dr_held_, __LINE__) = (pthread_mutex_lock(mutex), (mutex))

/* A mutex that is held for less time than it takes to fall asleep: who waits for it spins a little
 * first. */
static inline void dr_mutex_init_brief(pthread_mutex_t *mutex)
{
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(mutex, &attr);
    pthread_mutexattr_destroy(&attr);
}

/* Hand an owned pointer on: the guard of the scope then frees nothing. */
#define DR_STEAL(p)                     \
    __extension__({                     \
        __typeof__(p) dr_stolen_ = (p); \
        (p) = NULL;                     \
        dr_stolen_;                     \
    })

#endif
