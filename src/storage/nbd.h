/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What nbd.c (the file) and nbd-connection.c (its connections) share.
 *
 * A file has one connection, or up to NBD_CONNECTIONS where the server says that they see each
 * other's writes; the second and later ones are made when the first have enough to do. Each
 * connection has a thread that moves its bytes. Callers hand a request to the connection with the
 * fewest and sleep until its answer came, so one connection carries as many requests as there are
 * callers.
 *
 * A connection that is lost is made anew by its thread. Requests that had no answer are sent again,
 * on any connection: each of them may be done twice without harm. A caller gives up when no
 * connection has been there for `reconnect` seconds.
 *
 * Writes that were answered and not flushed may be gone with the server: nbd-kept.h says how they
 * are kept. Where there are such writes when a connection is lost, the others end, too, after what
 * they have under way; then the first one is made anew and writes again what is kept, and the
 * others follow. So no reader sees a server without these writes.
 *
 * A flush goes over one connection and covers the writes that all of them answered, which the
 * server promises (MULTI_CONN) for connections to itself. A server may have been killed and be back
 * while an older connection has not noticed that, as when its host lost power. So a connection that
 * comes up beside others, while there are writes that are not durable, first has the others answer
 * a read: then all had the same server at one moment, and a server that ends later ends all.
 *
 * A server that goes on with requests of a connection that was lost may do them after later ones,
 * which came by the next connection. The protocol has nothing against that. */
#ifndef DR_STORAGE_NBD_H
#define DR_STORAGE_NBD_H

#include <libnbd.h>
#include <semaphore.h>

#include "storage/nbd-kept.h"
#include "storage/remote.h"

#define NBD_CONNECTIONS 4u
#define NBD_EXTENTS     4096u /* of one answer that are kept */

struct nbd_file;

enum nbd_state {
    NBD_IDLE,    /* not wanted yet */
    NBD_DOWN,    /* being made */
    NBD_UP,      /* takes requests */
    NBD_LEAVING, /* takes none, and ends after those that it has */
    NBD_USELESS  /* the server refused it, or has another disk there now */
};

struct nbd_connection {
    struct nbd_file *file;
    pthread_t thread;
    bool started;
    int wake;             /* an eventfd: the thread shall look at its handle again */
    pthread_mutex_t lock; /* of handle while it is exchanged or given a request */
    struct nbd_handle *handle;
    enum nbd_state state; /* under file->lock, as is in_flight */
    unsigned in_flight;
    _Atomic uint64_t heard; /* CLOCK_MONOTONIC seconds: the last sign of life */
    char why[256];          /* the thread's: why it is not up */
};

/* What the server said when the file was opened; a connection to anything else is not used. */
struct nbd_export {
    uint64_t size;
    unsigned align;
    uint32_t max; /* bytes of one read or write */
    bool read_only, multi, flush, fua, zero, fast_zero, extents;
};

/* What the server said of a range. */
struct nbd_extents {
    uint64_t from, end; /* the range; empty = nothing was said */
    size_t n;
    struct nbd_run {
        uint64_t end;
        bool zero;
    } runs[NBD_EXTENTS];
};

struct nbd_file {
    struct dr_file base;
    char *uri, *name; /* name: for messages */
    unsigned timeout, reconnect;
    struct nbd_export export;
    struct nbd_connection connections[NBD_CONNECTIONS];
    pthread_mutex_t lock;
    pthread_cond_t changed; /* some connection's state */
    uint64_t down_since;    /* CLOCK_MONOTONIC seconds: no connection is up; 0 = one is */
    char why[256];          /* the last connection was lost, or cannot be made */
    _Atomic bool stop;
    bool joining;           /* one comes up beside others; under lock, as the next two */
    bool replay;            /* what is kept must be written again before one comes up */
    uint64_t replayed_most; /* so many of the writes were, in the attempt that came furthest */
    _Atomic bool lost;      /* writes that were answered are gone; why_lost is constant then */
    char why_lost[160];
    struct nbd_kept kept;
    _Atomic bool no_extents; /* the connection is lost whenever they are asked for */
    pthread_mutex_t extent_lock;
    struct nbd_extents *extents; /* what the server said last, or NULL: under extent_lock */
    uint64_t changes;            /* writes so far; under extent_lock */
};

#define NBD_PIECES 64u /* of one read, that do not touch */

/* What has come of a read: ranges that do not touch, in order. */
struct nbd_pieces {
    unsigned n;
    bool wrong; /* twice, not asked for, or too scattered */
    struct {
        uint64_t off, end;
    } p[NBD_PIECES];
};

/* One request on its way. The callback of libnbd fills in the rest. */
struct nbd_request {
    enum nbd_command { NBD_READ, NBD_WRITE, NBD_ZERO, NBD_FLUSH, NBD_EXTENT } command;
    void *buf;
    uint64_t off, len;
    uint32_t flags;
    struct nbd_extents *extents; /* NBD_EXTENT: filled in */
    struct nbd_pieces *pieces;   /* NBD_READ: filled in */
    struct nbd_file *file;
    sem_t done;
    bool answered;       /* done was posted */
    int error;           /* errno of the answer */
    bool keep, not_kept; /* a write, see nbd-kept.h: it has a number; it is not kept, but should */
    uint64_t number;
    unsigned slot;
};

/* nbd-extents.c. The first is called by libnbd with the server's answer: pairs of a length and
 * flags; user is the struct nbd_request, whose extents are filled in. What makes no sense is left
 * out. */
int nbd_take_extents(void *user, const char *context, uint64_t off, uint32_t *entries, size_t n,
                     int *error);
bool nbd_covers(const struct nbd_extents *e, uint64_t off); /* e NULL: nothing is */
/* The range from off on, which is covered, up to len bytes. */
void nbd_look_up(const struct nbd_extents *e, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                 uint64_t *run);

/* nbd.c. Give it to libnbd, which calls done: the cookie, or -1. */
int64_t nbd_issue(struct nbd_handle *h, struct nbd_request *q, nbd_completion_callback done);
/* Over this connection, once: the errno of the answer; ENOTCONN: there was none. q->done is ready
 * for use. */
int nbd_ask(struct nbd_connection *c, struct nbd_request *q);
/* What was answered when it is called is durable: 0, or -errno. */
int nbd_flush_now(struct nbd_file *f);
/* What was known of the extents is true no more, nor what the server may say right now. */
void nbd_forget_extents(struct nbd_file *f);

/* nbd-replay.c. Write again what is kept, over a connection that nobody else uses yet, and flush.
 * -ENOTCONN: it was lost, too (c->why). Else -errno of the server's answer. */
int nbd_replay(struct nbd_connection *c, struct nbd_handle *h);

/* nbd-pieces.c. Called by libnbd with a chunk of a read's answer; user is the struct nbd_request.
 */
int nbd_take_piece(void *user, const void *bytes, size_t n, uint64_t off, unsigned status,
                   int *error);
/* Has all come that was asked for? */
bool nbd_is_whole(const struct nbd_request *q);

/* nbd-tls.c. Refuse a URI by which libnbd would not check whether the server is the one that was
 * named. */
int nbd_check_tls(const char *uri, const char *name, struct dr_error *err);

/* The first connection; err has the reason. */
int nbd_connect_first(struct nbd_file *f, struct dr_error *err);
/* All connections and their threads end. */
void nbd_disconnect(struct nbd_file *f);
/* The connection for the next request, counted in its in_flight, or NULL: none is there for too
 * long. */
struct nbd_connection *nbd_pick(struct nbd_file *f);
/* Its request has been answered. */
void nbd_put(struct nbd_connection *c);
/* The thread has something to do. */
void nbd_wake(struct nbd_connection *c);
/* Let the connection move what it can, for up to timeout milliseconds. */
void nbd_step(struct nbd_connection *c, struct nbd_handle *h, int timeout);
bool nbd_is_over(struct nbd_handle *h);
int nbd_note_why(struct nbd_connection *c, const char *text); /* -ENOTCONN */
/* Writes that were answered are gone: all later writes and flushes fail, for this reason. */
void nbd_lose(struct nbd_file *f, const char *why);
uint64_t nbd_seconds(void);

#endif
