/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/sigpipe.h"

#include <errno.h>
#include <pthread.h>
#include <time.h>

void dr_sigpipe_hold(struct dr_sigpipe *s)
{
    sigset_t set;
    sigpending(&set);
    s->pending = sigismember(&set, SIGPIPE) == 1;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, &s->before);
}

void dr_sigpipe_release(const struct dr_sigpipe *s, bool raised)
{
    sigset_t set;
    const struct timespec now = {0, 0};
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    if (raised && !s->pending)
        while (sigtimedwait(&set, NULL, &now) < 0 && errno == EINTR)
            ;
    pthread_sigmask(SIG_SETMASK, &s->before, NULL);
}
