/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A disk as a raw file: a FUSE file system whose only file is the disk. On the public API. */
#ifndef DR_EXPORTS_FUSE_H
#define DR_EXPORTS_FUSE_H

#include "drover/live.h"

struct dr_fuse_options {
    const char *mountpoint; /* an empty directory */
    const char *name;       /* of the file in it */
    const char *source;     /* what tables of mounted file systems show as the device */
    bool allow_other;       /* other users may use it, as far as the file's mode lets them */
    bool allow_root;        /* of the other users root may */
    bool writethrough;      /* every write is durable when it returns */
    struct dr_stall *stall; /* requests that change the disk go through it */
    /* Called once, from another thread, when the file can be used. */
    void (*ready)(void *user);
    /* Called with the text of a request that failed, unless it is the same as the last one; from
     * any thread, but one at a time. */
    void (*message)(void *user, const char *text);
    void *user; /* for both */
};

/* Block SIGTERM, SIGINT and SIGHUP, which end dr_fuse_serve(), in this thread and those that it
 * starts: before others are started. They stay blocked, so that they do not interrupt the closing
 * of the disk. */
void dr_fuse_block_signals(void);

/* Mount the disk and serve it until it is unmounted or one of these signals arrives, which unmount
 * it. Requests that wait in the stall fail then. Call it after forking. The disk stays open: the
 * caller closes it, which flushes it. One at a time in a process. */
int dr_fuse_serve(struct dr_disk *disk, const struct dr_fuse_options *options,
                  struct dr_error *err);

/* For other threads of the process that serves; they do nothing while it does not. */

/* End it, as a signal does. If it has not begun, it ends as soon as it has. */
void dr_fuse_end(void);
/* Have the kernel ask for the file's size again. */
void dr_fuse_resized(void);
/* Have the kernel write what programs have changed in mapped pages, and wait for that, but not
 * while requests wait in the stall. */
void dr_fuse_write_back(void);
/* A request begins to wait in the stall. */
void dr_fuse_stalled(void);

/* Unmount what dr_fuse_serve() of another process has mounted, and wait until that process has
 * closed the disk. -EBUSY: somebody uses the file; nothing is changed. */
int dr_fuse_unmount(const char *mountpoint, struct dr_error *err);

#endif
