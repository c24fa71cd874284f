/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: disks that are in use, with jobs on them, controlled over a socket that speaks QMP.
 *
 * A program opens disks, serves them in whatever way it likes, and adds them to a dr_live. Clients
 * of its socket may then ask about the disks and make snapshots, stream, commit, mirror and resize
 * them while they are in use. Which commands there are, and what differs from QEMU's, is in
 * drover(1).
 *
 * Threads: one that waits for clients, from dr_live_start() on if there is a socket, and one for
 * each job while it runs. All functions may be called from any thread, but for dr_live_free().
 */
#ifndef DROVER_LIVE_H
#define DROVER_LIVE_H

#include "drover/drover.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dr_live;

/* How a program lets clients of the control socket change which disks it shows, and to whom. Called
 * with `user` of struct dr_live_options, from a thread of the dr_live, one at a time. */
struct dr_live_exports {
    /* Show the disk by this name from now on; for reading only, unless writable. -EEXIST: the name
     * is taken. id is what the control calls it. */
    int (*add)(void *user, const char *id, const char *name, struct dr_disk *disk, bool writable,
               struct dr_error *err);
    /* Show it no more: no client comes and no request begins from now on. -EBUSY: clients have it,
     * and not `hard`. When the last request on it has ended, which may be at once, call
     * dr_live_export_gone(); until then its disk stays open. */
    int (*remove)(void *user, const char *id, bool hard, struct dr_error *err);
    /* Hang up on all clients, and let none come until start. */
    void (*stop)(void *user);
    /* Let clients come again. One of path (of a unix socket) and port (of TCP) is given; a failure:
     * it is not where the program listens. */
    int (*start)(void *user, const char *path, const char *port, struct dr_error *err);
};

struct dr_live_options {
    /* Path of the socket that clients connect to, made with mode 0600; NULL = none. A socket that
     * nobody listens on any more gives way. */
    const char *control;
    /* Path of the file that tells which image each disk goes on with and which jobs have not ended,
     * replaced whenever that changes; NULL = none. A server that was killed is begun again with the
     * images that dr_live_recall() says, and goes on with the jobs. */
    const char *state;
    /* Called once, from a thread of its own, when a client has said "quit". It must not call
     * dr_live_free(). NULL = such clients are refused. */
    void (*quit)(void *user);
    /* Called by dr_live_free() for each disk that a client had opened (blockdev-add) and that does
     * not close well: what was written to it last may be lost. NULL = nobody wants to know. */
    void (*failed)(void *failed_user, const struct dr_error *err);
    void *failed_user;
    void *user; /* of quit and the functions below */
    /* NULL or NULL-terminated: directories, besides that of a disk's active image, in which files
     * that clients name may be; as in struct dr_open_options. */
    const char *const *allow_paths;
    /* NULL: which disks are shown does not change. It must live as long as the dr_live. */
    const struct dr_live_exports *exports;
    /* The disk called `name` may have another size now. From any thread of the dr_live, which holds
     * no lock meanwhile. NULL = nobody wants to know. */
    void (*resized)(void *user, const char *name);
    /* A snapshot or backup of the disk called `name` is about to begin: what its users have
     * changed, and the program or the kernel holds back, is to be in the disk when this returns.
     * From the clients' thread. NULL = nothing is held back. */
    void (*write_back)(void *user, const char *name);
};

/* Nothing is started and no socket is made yet: the process may still fork. Strings in options are
 * copied. */
DR_API int dr_live_new(const struct dr_live_options *options, struct dr_live **live,
                       struct dr_error *err);
/* disk, which stays the caller's and must stay open until dr_live_free(), is called `name` by
 * clients: 1 to 31 letters, digits, '-', '.' and '_', the first one a letter. It is an export of
 * that name, too. -EEXIST. */
DR_API int dr_live_add(struct dr_live *live, const char *name, struct dr_disk *disk,
                       struct dr_error *err);
/* What the state at this path says of the disk called name: the path and format to open it by, each
 * malloc'ed; NULL = it says nothing. given: the image that is to be served by that name; -EINVAL:
 * the state knows another disk by it. NULL = whichever it is. -EBUSY: a server has the state. */
DR_API int dr_live_recall(const char *state, const char *name, const char *given, char **path,
                          char **format, struct dr_error *err);
/* Read the state and begin its jobs again; make the socket and listen. -EADDRINUSE: somebody
 * listens there. */
DR_API int dr_live_start(struct dr_live *live, struct dr_error *err);
/* The export that was removed is used by nobody any more. From any thread; unknown ones are
 * ignored. */
DR_API void dr_live_export_gone(struct dr_live *live, const char *id);
/* Stop all jobs and wait until they have ended, hang up, and remove the socket. The disk of a job
 * that was stopped reads as before; the state keeps the job. NULL is allowed. */
DR_API void dr_live_free(struct dr_live *live);

/* ------------------------------------------------------------------ requests that cannot be done
 * now
 *
 * A guest that is told of a failed write takes its disk for broken. So a program that serves a disk
 * makes the requests that change it through a dr_stall, where those that fail wait, and are made
 * again, in the order in which they came: once a second, since space may appear, and when
 * somebody says so. While one waits those that come later wait behind it. What waits holds nothing
 * that other requests, snapshots or jobs need. */

struct dr_stall;

enum dr_stall_policy {
    DR_STALL_ENOSPC, /* what fails because a file system or a quota is full waits */
    DR_STALL_REPORT, /* nothing waits */
    DR_STALL_STOP,   /* whatever fails waits, but for what no request can do: EINVAL, ENOTSUP, EROFS
                      */
};

struct dr_stall_options {
    enum dr_stall_policy policy;
    /* Called when requests begin to wait, from the thread of the first one, with the text of its
     * failure; not again until none waits, but after dr_stall_resume() if that was in vain. NULL
     * allowed. */
    void (*waits)(void *user, const char *text);
    void *user;
};

DR_API int dr_stall_new(const struct dr_stall_options *options, struct dr_stall **stall,
                        struct dr_error *err);
/* No request is under way, and no dr_live has it any more. NULL is allowed. */
DR_API void dr_stall_free(struct dr_stall *stall);
/* Make a request: calls request(user, err), perhaps several times, and returns what it has returned
 * last. request may make half of what it is to do before it fails; the err that it gets is never
 * NULL. From any thread. -ESHUTDOWN: it would wait, but dr_stall_end() was called. */
DR_API int dr_stall_run(struct dr_stall *stall, int (*request)(void *user, struct dr_error *err),
                        void *user, struct dr_error *err);
/* Make what waits again now. */
DR_API void dr_stall_resume(struct dr_stall *stall);
/* How many requests wait. */
DR_API unsigned dr_stall_waiting(const struct dr_stall *stall);
/* What waits fails, and so does what would wait from now on. */
DR_API void dr_stall_end(struct dr_stall *stall);
/* The requests of the disk called `name` go through the stall: clients are told of failures by
 * BLOCK_IO_ERROR, see in query-block that some wait, and let them go on by "cont". */
DR_API int dr_live_add_stall(struct dr_live *live, const char *name, struct dr_stall *stall,
                             struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
