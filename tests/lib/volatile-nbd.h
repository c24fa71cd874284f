/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An NBD server that loses power: what was not flushed may be gone when it is back, sector by
 * sector. It speaks the protocol's old handshake and simple replies, on a unix socket, and serves
 * each connection by a thread. */
#ifndef DR_TESTS_VOLATILE_NBD_H
#define DR_TESTS_VOLATILE_NBD_H

#include <stdbool.h>
#include <stdint.h>

enum volatile_flag { /* what it says that it can, beside writing */
                     VOLATILE_READ_ONLY = 1 << 0,
                     VOLATILE_FLUSH = 1 << 1,
                     VOLATILE_FUA = 1 << 2,
                     VOLATILE_ZEROES = 1 << 3,
                     VOLATILE_MULTI_CONN = 1 << 4,
};

struct volatile_plan {
    const char *path; /* of the socket */
    uint64_t size;
    unsigned flags;
    unsigned seed; /* of what survives */
    /* Power goes, once, when so many bytes have come from clients, or gone to them, in all; the
     * greetings count. 0 = never. */
    uint64_t after_in, after_out;
    bool lose_all; /* nothing survives that was not flushed */
    bool silent;   /* connections stay open then, and are served no more */
    /* From then on: */
    unsigned then_flags;
    uint64_t then_size;
    int then_errno; /* the protocol's, of each write; 0 = none */
};

struct volatile_seen {
    uint64_t in, out; /* bytes */
    unsigned writes, flushes, connections, cuts;
};

struct volatile_nbd;

/* NULL: errno says why. then_flags and then_size must be given, too, where power may go. */
struct volatile_nbd *volatile_start(const struct volatile_plan *plan);
/* Power goes now, and is back. */
void volatile_cut(struct volatile_nbd *s);
/* The newest connection ends, and nothing is lost. */
void volatile_hang_up(struct volatile_nbd *s);
/* Is this what would be there after power went? */
bool volatile_holds(struct volatile_nbd *s, const void *bytes, uint64_t off, uint64_t len);
struct volatile_seen volatile_look(struct volatile_nbd *s);
void volatile_stop(struct volatile_nbd *s);

#endif
