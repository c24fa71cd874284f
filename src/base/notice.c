/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/notice.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include "drover/drover.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void (*listener)(void *user, const char *text);
static void *listener_user;

void dr_on_notice(void (*notice)(void *user, const char *text), void *user)
{
    pthread_mutex_lock(&lock);
    listener = notice;
    listener_user = user;
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
    if (listener)
        listener(listener_user, text);
    pthread_mutex_unlock(&lock);
}
