/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What threads that answer no requests want of the mount: jobs and clients of the control socket
 * change the disk's size, take snapshots, and end the server.
 *
 * The kernel's pages are written back by a thread of its own that opens the file as any program
 * would. The caller waits for that thread, unless a request of the mount begins to wait for space:
 * the page that is written may stand in the line behind it, and the caller may be the only one who
 * can let the line move.
 *
 * These threads may use the file while the server ends. The session is destroyed first, whereupon
 * the kernel fails whatever they wait for, and then they are waited for. */
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "exports/fuse-file.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all that follows */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct fuse_outside mount;
static bool mounted;
static unsigned users;  /* they use the file; its path stays */
static unsigned stalls; /* how often a request has begun to wait */
static bool writing;    /* a thread writes pages back */

void fuse_outside_begin(const struct fuse_outside *o)
{
    DR_LOCK_SCOPE(&lock);
    mount = *o;
    mounted = true;
}

void fuse_outside_end(void)
{
    DR_LOCK_SCOPE(&lock);
    mounted = false;
}

void fuse_outside_join(void)
{
    DR_LOCK_SCOPE(&lock);
    while (users > 0)
        pthread_cond_wait(&changed, &lock);
}

static void leave(void)
{
    DR_LOCK_SCOPE(&lock);
    users--;
    pthread_cond_broadcast(&changed);
}

/* Of the process: all threads block it, but for the one that waits for it, now or later. */
void dr_fuse_end(void)
{
    kill(getpid(), SIGTERM);
}

/* The kernel asks again when somebody wants to know. Not everybody does: a loop device takes the
 * size that the kernel has, so we ask at once. */
void dr_fuse_resized(void)
{
    struct stat st;

    pthread_mutex_lock(&lock);
    bool ask = mounted;
    if (ask) {
        users++;
        fuse_lowlevel_notify_inval_inode(mount.session, FUSE_DISK_FILE, -1, 0);
    }
    pthread_mutex_unlock(&lock);
    if (!ask)
        return;
    /* Where something else is mounted over the file, those who have it open ask themselves. */
    (void)!lstat(mount.file, &st);
    leave();
}

/* Not fsync(2): the disk is flushed by the snapshot. */
static void write_pages(void)
{
    struct stat st;
    CLEANUP_CLOSE int fd = open(mount.file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0 && fstat(fd, &st) == 0 && st.st_dev == mount.dev)
        sync_file_range(fd, 0, 0,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                            SYNC_FILE_RANGE_WAIT_AFTER);
}

static void *write_back(void *unused)
{
    (void)unused;
    write_pages();
    pthread_mutex_lock(&lock);
    writing = false;
    pthread_mutex_unlock(&lock);
    leave();
    return NULL;
}

/* With the lock held. */
static void begin_to_write(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, write_back, NULL) != 0)
        return; /* what programs have not synced may be missing in the snapshot */
    pthread_detach(thread);
    writing = true;
    users++;
}

/* False: a request has begun to wait since `before` was looked at. With the lock held. */
static bool wait_for_writing(unsigned before)
{
    while (writing && stalls == before)
        pthread_cond_wait(&changed, &lock);
    return stalls == before;
}

/* What an earlier call has left behind, since a request waited, may have passed a page by. */
void dr_fuse_write_back(void)
{
    DR_LOCK_SCOPE(&lock);
    unsigned before = stalls;
    if (!mounted || dr_stall_waiting(mount.stall) > 0 || !wait_for_writing(before) || !mounted)
        return;
    begin_to_write();
    wait_for_writing(before);
}

void dr_fuse_stalled(void)
{
    DR_LOCK_SCOPE(&lock);
    stalls++;
    pthread_cond_broadcast(&changed);
}
