/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing into pipes and sockets that nobody reads any more, without a signal: a library must not
 * change what SIGPIPE does to the process, so it is blocked in the writing thread meanwhile. */
#ifndef DR_BASE_SIGPIPE_H
#define DR_BASE_SIGPIPE_H

#include <signal.h>
#include <stdbool.h>

struct dr_sigpipe {
    sigset_t before;
    bool pending; /* one was waiting already, which is not ours */
};

/* Pairs, in one thread. */
void dr_sigpipe_hold(struct dr_sigpipe *s);
/* raised: something in between may have failed with EPIPE. */
void dr_sigpipe_release(const struct dr_sigpipe *s, bool raised);

#endif
