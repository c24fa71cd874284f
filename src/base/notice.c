/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/notice.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

#include "drover/drover.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t returned = PTHREAD_COND_INITIALIZER;
static void (*listener)(void *user, const char *text);
static void *listener_user;
static unsigned calls;                 /* of listeners that have not returned yet */
static _Thread_local bool is_listener; /* this thread is in one */

/* The lock is not held while a listener runs: it may take locks of its own, or call us. */
void dr_on_notice(void (*notice)(void *user, const char *text), void *user)
{
    pthread_mutex_lock(&lock);
    listener = notice;
    listener_user = user;
    while (calls > 0 && !is_listener)
        pthread_cond_wait(&returned, &lock);
    pthread_mutex_unlock(&lock);
}

static void call(void (*notice)(void *user, const char *text), void *user, const char *text)
{
    bool nested = is_listener;
    is_listener = true;
    notice(user, text);
    is_listener = nested;
    pthread_mutex_lock(&lock);
    calls--;
    pthread_cond_broadcast(&returned);
    pthread_mutex_unlock(&lock);
}

void dr_notice(const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    pthread_mutex_lock(&lock);
    void (*notice)(void *user, const char *text) = listener;
    void *user = listener_user;
    calls += notice != NULL;
    pthread_mutex_unlock(&lock);
    if (notice)
        call(notice, user, text);
}
