/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdkit 1.32 (Debian 12) aborts when a client goes away while two of its threads have replies for
 * it: the first finds the connection broken and closes it, the second asserts that it is open. A
 * guest that is killed would take the disks of all others with it.
 *
 * So where an assertion of nbdkit itself fails, the thread is stopped instead of the process. It
 * keeps the lock of its connection, which nobody needs any more; its threads stay until the
 * server ends, and hang-up.c ends the server without them. Ending the thread would free no more:
 * nbdkit is not compiled for its cleanups to run when a thread unwinds, so the lock stays taken,
 * and the other threads of the connection wait for it. Other reasons to abort, in our library, in
 * the C library or by a signal from outside, end the process as always. */
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "exports/outlive.h"

#define FRAMES 16

static const void *program; /* where nbdkit itself is loaded */

/* The function that the return address is in, which may be behind its last instruction. */
static bool look_up(void *address, Dl_info *info)
{
    return dladdr((char *)address - 1, info) != 0;
}

/* Has this thread got here from __assert_fail(), called by nbdkit? */
static bool is_assertion_of_nbdkit(void)
{
    void *frames[FRAMES];
    int n = backtrace(frames, FRAMES);
    for (int i = 0; i + 1 < n; i++) {
        Dl_info callee, caller;
        if (look_up(frames[i], &callee) && callee.dli_sname &&
            strcmp(callee.dli_sname, "__assert_fail") == 0)
            return look_up(frames[i + 1], &caller) && caller.dli_fbase == program;
    }
    return false;
}

static void on_abort(int number)
{
    if (is_assertion_of_nbdkit()) {
        for (;;)
            pause();
    }
    signal(number, SIG_DFL);
    raise(number); /* delivered when this returns */
}

void outlive_clients_that_vanish(void)
{
    const struct sigaction ours = {.sa_handler = on_abort};
    void *frames[1];
    Dl_info info;
    void *entry = dlsym(RTLD_DEFAULT, "nbdkit_error"); /* plugins find it in the program */
    if (!entry || !dladdr(entry, &info))
        return;
    program = info.dli_fbase;
    backtrace(frames, 1); /* loads what it needs, which a handler must not do */
    sigaction(SIGABRT, &ours, NULL);
}
