/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What fuse.c (mounting, signals), fuse-loop.c (threads), fuse-file.c (the requests) and
 * fuse-outside.c (what other threads want of the mount) share. */
#ifndef DR_EXPORTS_FUSE_FILE_H
#define DR_EXPORTS_FUSE_FILE_H

#define FUSE_USE_VERSION 312
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>

#include "exports/fuse.h"

struct fuse_disk {
    struct dr_disk *disk;
    const struct dr_fuse_options *options;
    struct fuse_session *session;
    struct fuse_loop *loop;
    atomic_uint writers; /* opened for writing: these may have it mapped, too */
    /* Attributes of the file that its owner may change; they last as long as the mount. */
    atomic_uint mode, uid, gid;
    atomic_llong mtime; /* nanoseconds since 1970 */
    long long started;
    pthread_key_t buffer; /* each thread's buffer for reads */
    pthread_mutex_t lock; /* of what follows */
    char last_text[sizeof(((struct dr_error *)0)->text)];
};

#define FUSE_DISK_FILE 2 /* the inode of the file; that of the directory is FUSE_ROOT_ID */

/* Asked of the directory: the process that serves it. */
#define FUSE_DISK_PID _IOR('D', 1, int)

extern const struct fuse_lowlevel_ops fuse_disk_ops;

int fuse_disk_init(struct fuse_disk *d, struct dr_disk *disk, const struct dr_fuse_options *options,
                   struct dr_error *err);
void fuse_disk_destroy(struct fuse_disk *d);

/* Have the kernel write back what programs changed in this range of a mapped file. */
void fuse_disk_write_back(struct fuse_disk *d, uint64_t off, uint64_t len);

/* ------------------------------------------------------------------ fuse-loop.c */

/* Threads mostly wait for the disk, not for a processor. Those that wait for space are not counted,
 * so that reads and other files' users go on. */
#define FUSE_LOOP_THREADS 32
#define FUSE_LOOP_WAITING 128

struct fuse_loop_thread {
    struct fuse_loop *loop;
    pthread_t id;
    bool reads;                /* under the loop's lock, as the next two */
    unsigned turn, turn_seen;  /* how often it has begun to, and when that was last looked at */
    unsigned misses, unlooked; /* looks in vain, and requests since then */
};

struct fuse_loop {
    struct fuse_session *session;
    struct dr_stall *stall;
    unsigned most_busy;   /* threads that answer requests while it is busy; 0: it never is */
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t parked, end;
    unsigned n_readers, n_parked, n_summoned, n_threads, n_waiting;
    struct fuse_loop_thread threads[FUSE_LOOP_THREADS + FUSE_LOOP_WAITING];
    bool busy, has_standby;
    _Atomic bool deep;   /* requests queue up; also read without the lock */
    uint64_t calm_until; /* not busy until then */
    unsigned n_taken;    /* requests */
    unsigned streak;     /* of those for which nobody blocked */
    unsigned score;      /* of how many queue up */
    unsigned slow;       /* that took long, one after another */
    bool ended;
    int result;
};

void fuse_loop_init(struct fuse_loop *l, struct fuse_session *session, struct dr_stall *stall);
void fuse_loop_destroy(struct fuse_loop *l);
/* Serve until the kernel ends the session (0), it fails (-errno), or fuse_loop_stop() is called in
 * another thread (0). Requests that were received are answered before it returns. SIGUSR1 is used
 * meanwhile. */
int fuse_loop_run(struct fuse_loop *l);
void fuse_loop_stop(struct fuse_loop *l);
/* The calling thread, which answers a request, begins to wait for space, or ends to. */
void fuse_loop_waits(struct fuse_loop *l, bool begin);

/* ------------------------------------------------------------------ fuse-outside.c */

struct fuse_outside {
    struct fuse_session *session;
    struct dr_stall *stall;
    char *file; /* its path */
    dev_t dev;  /* of what is mounted */
};

/* The file can be used: other threads may have wishes. */
void fuse_outside_begin(const struct fuse_outside *o);
/* The session is about to be destroyed: nobody uses it any more. */
void fuse_outside_end(void);
/* The session was destroyed: wait until nobody is left who used the file. */
void fuse_outside_join(void);

#endif
