/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Mount a disk, serve it, and unmount it.
 *
 * The calling thread starts the threads that serve and waits for them. A further one waits for
 * signals. Told to end, it has the kernel write back what programs changed in mapped pages,
 * unmounts (lazily: somebody may have the file open) and stops the others; requests that are under
 * way are answered before. After umount(8) or fusermount3 -u by somebody else the kernel ends the
 * session.
 *
 * The kernel does not tell umount(8) when the disk is closed, so dr_fuse_unmount() asks for the
 * process before it unmounts, and waits until that is gone.
 */
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "exports/fuse-file.h"

extern char **environ;

struct server {
    struct fuse_disk disk;
    const struct dr_fuse_options *options;
    char *mountpoint; /* absolute */
    struct fuse_loop loop;
    pthread_t watcher;
    sigset_t signals;     /* that end the server */
    atomic_bool ended;    /* the loop has returned */
    atomic_bool detached; /* the watcher has unmounted, or left a mount that is not ours alone */
    char *file;           /* absolute path of the disk as a file */
};

/* ------------------------------------------------------------------ what libfuse says */

static pthread_mutex_t said_lock = PTHREAD_MUTEX_INITIALIZER;
static char said[512]; /* the last message */

__attribute__((format(printf, 2, 0))) static void hear(enum fuse_log_level level, const char *fmt,
                                                       va_list args)
{
    DR_LOCK_SCOPE(&said_lock);
    (void)level;
    vsnprintf(said, sizeof(said), fmt, args);
    said[strcspn(said, "\n")] = 0;
}

static int fail_with_said(struct dr_error *err, int errnum, const char *path, const char *what)
{
    DR_LOCK_SCOPE(&said_lock);
    return dr_fail(err, errnum, "%s: %s%s%s%s", path, what, said[0] ? ": " : "", said,
                   strstr(said, "exec fusermount3") ? "; install the package fuse3" : "");
}

/* ------------------------------------------------------------------ the mount point */

static int fail_gone(struct dr_error *err, const char *path)
{
    return dr_fail(err, ENOTCONN,
                   "%s: the process that served what is mounted here is gone; unmount it first: "
                   "fusermount3 -u '%s'",
                   path, path);
}

/* A directory with something in it is refused: the mount would hide that, and perhaps a file of the
 * disk itself. */
static int check_mountpoint(const char *path, struct dr_error *err)
{
    DIR *dir = opendir(path);
    const struct dirent *entry;
    bool empty = true;

    if (!dir && errno == ENOTCONN)
        return fail_gone(err, path);
    if (!dir)
        return dr_fail_errno(err, errno, "%s: the directory to mount on", path);
    while (empty && (entry = readdir(dir)))
        empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0;
    closedir(dir);
    if (!empty)
        return dr_fail(err, ENOTEMPTY,
                       "%s: the directory is not empty; mounting would hide what is in it", path);
    return 0;
}

static int check_fuse(const char *mountpoint, struct dr_error *err)
{
    if (access("/dev/fuse", F_OK) == 0)
        return 0;
    return dr_fail(err, ENODEV,
                   "%s: FUSE is not there (no /dev/fuse): load it with 'modprobe fuse' or give the "
                   "container that device",
                   mountpoint);
}

/* Unmount as root can, else by the program that may. Returns 0 or -errno. */
static int unmount(const char *mountpoint, bool lazy)
{
    if (umount2(mountpoint, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0)
        return 0;
    if (errno != EPERM)
        return -errno;

    char *argv[] = {"fusermount3", "-u", "-q", "--", (char *)mountpoint, NULL};
    char *lazy_argv[] = {"fusermount3", "-u", "-q", "-z", "--", (char *)mountpoint, NULL};
    pid_t pid;
    int status, e = posix_spawnp(&pid, argv[0], NULL, NULL, lazy ? lazy_argv : argv, environ);
    if (e != 0)
        return -e;
    while (waitpid(pid, &status, 0) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    return status == 0 ? 0 : -EBUSY;
}

/* ------------------------------------------------------------------ the watching thread */

/* Does the path still lead to our mount, and not to another one? */
static bool is_mounted(const struct server *s, dev_t dev)
{
    struct stat st;

    return lstat(s->mountpoint, &st) == 0 && st.st_dev == dev;
}

static void *watch(void *arg)
{
    struct server *s = arg;
    struct stat st;
    int sig;

    /* The answer comes from the loop: when it is there, the file can be used. */
    if (lstat(s->mountpoint, &st) < 0)
        return NULL;
    const struct fuse_outside outside = {
        .session = s->disk.session, .stall = s->options->stall, .file = s->file, .dev = st.st_dev};
    fuse_outside_begin(&outside);
    if (s->options->ready)
        s->options->ready(s->options->user);
    while (sigwait(&s->signals, &sig) != 0)
        ;
    if (atomic_load(&s->ended))
        return NULL;
    dr_stall_end(s->options->stall);
    fuse_disk_write_back(&s->disk, 0, 0);
    atomic_store(&s->detached, true);
    if (is_mounted(s, st.st_dev))
        unmount(s->mountpoint, true);
    fuse_loop_stop(&s->loop);
    return NULL;
}

static int start_watching(struct server *s, struct dr_error *err)
{
    int e = pthread_create(&s->watcher, NULL, watch, s);

    return e == 0 ? 0 : dr_fail_errno(err, e, "%s: starting a thread", s->mountpoint);
}

static void stop_watching(struct server *s)
{
    atomic_store(&s->ended, true);
    pthread_kill(s->watcher, SIGHUP); /* one of those it waits for */
    pthread_join(s->watcher, NULL);
}

/* ------------------------------------------------------------------ the session */

static int add_options(struct fuse_args *args, const struct dr_fuse_options *o, bool writable)
{
    CLEANUP_FREE char *source = NULL;
    char *list = NULL;
    int r = -1;

    if (asprintf(&source, "fsname=%s", o->source) >= 0 &&
        fuse_opt_add_opt(&list, "subtype=drover,default_permissions") == 0 &&
        fuse_opt_add_opt_escaped(&list, source) == 0 &&
        (writable || fuse_opt_add_opt(&list, "ro") == 0) &&
        (!o->allow_other || fuse_opt_add_opt(&list, "allow_other") == 0) &&
        (!o->allow_root || fuse_opt_add_opt(&list, "allow_root") == 0) &&
        fuse_opt_add_arg(args, "drover") == 0 && fuse_opt_add_arg(args, "-o") == 0 &&
        fuse_opt_add_arg(args, list) == 0)
        r = 0;
    free(list);
    return r;
}

static int make_session(struct server *s, struct dr_error *err)
{
    struct fuse_args args = FUSE_ARGS_INIT(0, NULL);

    fuse_set_log_func(hear);
    if (add_options(&args, s->options, dr_writable(s->disk.disk)) == 0)
        s->disk.session = fuse_session_new(&args, &fuse_disk_ops, sizeof(fuse_disk_ops), &s->disk);
    fuse_opt_free_args(&args);
    if (!s->disk.session)
        return fail_with_said(err, EIO, s->mountpoint, "could not set up FUSE");
    if (fuse_session_mount(s->disk.session, s->mountpoint) != 0) {
        fuse_session_destroy(s->disk.session);
        return fail_with_said(err, EIO, s->mountpoint, "could not mount");
    }
    return 0;
}

/* A process that writes much has to wait until the kernel has written pages back. If these belong
 * to this mount, that waits for us: ask to be exempt, as prctl(2) says. Only root may. */
static void exempt_from_write_back(void)
{
#ifdef PR_SET_IO_FLUSHER
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
#endif
}

static void set_signals(sigset_t *signals)
{
    sigemptyset(signals);
    sigaddset(signals, SIGTERM);
    sigaddset(signals, SIGINT);
    sigaddset(signals, SIGHUP);
}

void dr_fuse_block_signals(void)
{
    sigset_t signals;

    set_signals(&signals);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
}

/* Once the watcher has unmounted, libfuse must not: another mount below might be hit. */
static int run_session(struct server *s, struct dr_error *err)
{
    fuse_loop_init(&s->loop, s->disk.session, s->options->stall);
    s->disk.loop = &s->loop;
    int r = start_watching(s, err);
    if (r == 0) {
        r = fuse_loop_run(&s->loop);
        if (r < 0)
            fail_with_said(err, -r, s->mountpoint, "serving ended");
        if (!atomic_load(&s->detached))
            fuse_session_unmount(s->disk.session);
        stop_watching(s);
    } else {
        fuse_session_unmount(s->disk.session);
    }
    fuse_loop_destroy(&s->loop);
    return r;
}

int dr_fuse_serve(struct dr_disk *disk, const struct dr_fuse_options *options, struct dr_error *err)
{
    CLEANUP_FREE char *path = NULL, *file = NULL;
    struct server s = {.options = options};
    int r;

    r = check_fuse(options->mountpoint, err);
    if (r == 0)
        r = check_mountpoint(options->mountpoint, err);
    if (r < 0)
        return r;
    s.mountpoint = path = realpath(options->mountpoint, NULL);
    if (!path)
        return dr_fail_errno(err, errno, "%s", options->mountpoint);
    if (asprintf(&file, "%s/%s", path, options->name) < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    s.file = file;
    r = fuse_disk_init(&s.disk, disk, options, err);
    if (r < 0)
        return r;
    set_signals(&s.signals);
    exempt_from_write_back();
    r = make_session(&s, err);
    if (r == 0) {
        r = run_session(&s, err);
        fuse_outside_end();
        fuse_session_destroy(s.disk.session);
        fuse_outside_join();
    }
    fuse_disk_destroy(&s.disk);
    return r;
}

/* ------------------------------------------------------------------ for another process */

/* A descriptor of the process that serves the mount, after it has flushed the disk. */
static int find_server(const char *mountpoint, int *process, struct dr_error *err)
{
    CLEANUP_CLOSE int dir = open(mountpoint, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int pid;

    if (dir < 0 && errno == ENOTCONN)
        return fail_gone(err, mountpoint);
    if (dir < 0)
        return dr_fail_errno(err, errno, "%s", mountpoint);
    if (ioctl(dir, FUSE_DISK_PID, &pid) < 0)
        return dr_fail(err, EINVAL, "%s: no disk of drover is mounted here", mountpoint);
    if (fsync(dir) < 0)
        return dr_fail_errno(err, errno, "%s: writing to the disk failed; still mounted",
                             mountpoint);
    *process = (int)syscall(SYS_pidfd_open, pid, 0);
    if (*process < 0)
        return dr_fail_errno(err, errno, "%s: process %d, which serves the disk", mountpoint, pid);
    return 0;
}

int dr_fuse_unmount(const char *mountpoint, struct dr_error *err)
{
    CLEANUP_CLOSE int process = -1;
    int r = find_server(mountpoint, &process, err);

    if (r < 0)
        return r;
    r = unmount(mountpoint, false);
    if (r == -ENOENT)
        return dr_fail(err, ENOENT, "%s: who is not root needs fusermount3 (package fuse3)",
                       mountpoint);
    if (r < 0)
        return dr_fail_errno(err, -r, "%s: not unmounted", mountpoint);
    struct pollfd ended = {.fd = process, .events = POLLIN};
    while (poll(&ended, 1, -1) < 0) {
        if (errno != EINTR)
            return dr_fail_errno(err, errno, "%s: waiting for the disk to be closed", mountpoint);
    }
    return 0;
}
