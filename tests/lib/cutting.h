/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A socket in front of a server, whose connections are cut at a chosen byte.
 *
 * A thread of its own carries the bytes of all connections both ways. Servers listen on unix
 * sockets; clients come by another one or by a port of 127.0.0.1. */
#ifndef DR_TESTS_CUTTING_H
#define DR_TESTS_CUTTING_H

#include <stdbool.h>
#include <stdint.h>

enum cutting_side { CUTTING_SERVER, CUTTING_CLIENT, CUTTING_NEVER };

struct cutting_plan {
    const char *server;     /* its socket */
    const char *path;       /* where to listen; NULL: a port of 127.0.0.1 */
    enum cutting_side side; /* whose bytes are counted */
    /* A connection is cut when so many bytes have been carried. `always`: each one, by its own
     * bytes; else one, once, by the bytes of all. */
    uint64_t after;
    bool always;
    /* NBD: the request of this number, counted from 1 over all connections, does not reach the
     * server; its answer is this errno of Linux. `on`: and all after it. 0 = none. */
    unsigned fail;
    int fail_errno;
    bool fail_on;
};

struct cutting_seen {
    uint64_t bytes[2]; /* of either side, in all */
    uint64_t
        first[2]; /* the same of the first connection: all, or with NBD those before a request */
    unsigned connections, requests;
};

struct cutting;

/* NULL: errno says why. The strings stay the caller's until cutting_stop(). */
struct cutting *cutting_start(const struct cutting_plan *plan);
unsigned cutting_port(const struct cutting *c);
/* All connections end. seen may be NULL. */
void cutting_stop(struct cutting *c, struct cutting_seen *seen);

#endif
