/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The writes that a server answered, and may still lose.
 *
 * A server that is killed, or whose host loses power, loses what it had not made durable, comes
 * back and answers the next flush as if nothing had happened. So every write is kept in memory
 * until a flush that began after its answer has succeeded. When a connection is lost, all that is
 * kept is written again to the server that comes back, in the old order, before anybody may read,
 * write or flush (nbd-replay.c). Rules:
 *
 * 1. Writes that overlap take turns: the server has the bytes of the later one, and so has what is
 *    kept. Only what was answered is written again here; callers send the rest again themselves.
 * 2. A write that is durable by itself (FUA) is kept, too, unless nothing is: an older write that
 *    is written again would otherwise undo it.
 * 3. NBD_KEPT_BYTES and NBD_KEPT_WRITES bound it. When half of either has been written since the
 *    last flush, the writer whose request just ended flushes, while others write on; at the bound
 *    all wait for that.
 * 4. Where no flush may be sent (the server has none, or the user wants none), and where there is
 *    no memory, writes beyond the bound are not kept. A connection that is lost before the next
 *    flush then loses them: all later writes and flushes fail. */
#ifndef DR_STORAGE_NBD_KEPT_H
#define DR_STORAGE_NBD_KEPT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define NBD_KEPT_BYTES  ((uint64_t)32 << 20)
#define NBD_KEPT_WRITES 16384u
#define NBD_WRITE_MAX   ((size_t)4 << 20) /* bytes of one request, so that it fits well */

struct nbd_file;
struct nbd_request;

enum nbd_kept_state {
    NBD_KEPT_SENT,     /* under way, also again */
    NBD_KEPT_ANSWERED, /* and perhaps not durable */
    NBD_KEPT_OVER,     /* durable, or failed */
};

struct nbd_kept_write {
    uint64_t off, len, at; /* at: position of its bytes in the ring; zeros have none there */
    uint64_t answered;     /* flushes that had begun then */
    uint32_t flags;
    bool zero;
    _Atomic enum nbd_kept_state state;
};

#define NBD_WRITING 64u /* writes under way at once; more wait */

struct nbd_kept {
    pthread_mutex_t lock; /* all below, but the state of a write under way; nobody holds it while
                             waiting for the server */
    pthread_cond_t changed;
    uint8_t *bytes;                /* a ring of NBD_KEPT_BYTES, or NULL: nothing was written yet */
    struct nbd_kept_write *writes; /* a ring of NBD_KEPT_WRITES; number i is at i % that */
    uint64_t first, next;          /* numbers of those that are kept */
    uint64_t head;                 /* position in the ring that is free next */
    uint64_t busy;                 /* a bit for each of these that is being written */
    struct {
        uint64_t off, end;
    } writing[NBD_WRITING];       /* in a row: each write looks at all of them */
    _Atomic uint64_t flushes;     /* that have begun */
    uint64_t fresh, fresh_writes; /* bytes and writes that were answered since the last began */
    uint64_t unkept; /* of a write that is not kept: flushes begun at its answer, plus 1; 0: none */
    bool flushing;   /* for room */
    bool replaying;  /* no room is given back */
};

void nbd_kept_init(struct nbd_kept *k);
void nbd_kept_destroy(struct nbd_kept *k);

/* Before a write or zeros are sent: wait for those that overlap, and for room; copy the bytes.
 * -errno: no room, because the flush failed; do not send it. Else nbd_kept_end() must follow. */
int nbd_kept_begin(struct nbd_file *f, struct nbd_request *q);
/* The server has done it; called by the connection's thread before any loss is noticed. */
void nbd_kept_answered(struct nbd_file *f, const struct nbd_request *q);
/* No more is sent for it; r is its result. True: the caller should call nbd_kept_make_room(). */
bool nbd_kept_end(struct nbd_file *f, struct nbd_request *q, int r);
void nbd_kept_make_room(struct nbd_file *f);

/* A number for a flush that is sent from now on, and its success. */
uint64_t nbd_kept_flush_begin(struct nbd_file *f);
void nbd_kept_flushed(struct nbd_file *f, uint64_t number);

/* 0: all that was answered is durable. 1: all that is not is kept. -1: some of that is not kept. */
int nbd_kept_any(struct nbd_file *f);
/* Nothing is kept, and nothing is being written that the server may have answered already. */
bool nbd_kept_idle(struct nbd_file *f);
/* Nothing is kept any more. */
void nbd_kept_drop(struct nbd_file *f);

/* While writes are done again nothing that is kept moves. */
void nbd_kept_hold(struct nbd_file *f, bool hold);
/* The next to be written again from number *i on, which is set to it; false: none. */
bool nbd_kept_next(struct nbd_file *f, uint64_t *i, struct nbd_kept_write *w, uint8_t **bytes);

#endif
