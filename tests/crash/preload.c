/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Records what a program does to the files of one directory, or kills it at a chosen call. Loaded
 * with LD_PRELOAD.
 *
 *   DROVER_WATCH=DIR    only files below this directory (a real path) count
 *   DROVER_RECORD=FILE  append a record of every change, with its data
 *   DROVER_KILL_AT=N    SIGKILL instead of the N-th change (from 1)
 *   DROVER_INTERRUPT_AT=N  SIGINT just before the N-th change, which happens
 *   DROVER_KILL_TEAR=1  a write that is to be the last one is done in part before
 *   DROVER_COUNT=FILE   at exit: how many changes there were, as text
 *
 * A record: 6 x u64 native (type, inode, offset, length, length of name 1, of name 2), the names,
 * then the data of a write. One lock is held across the call and its record, so their order is
 * true.
 */
#undef _FILE_OFFSET_BITS /* it would make pwrite and pwrite64 one name */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum rec {
    REC_CREATE = 1,
    REC_WRITE,
    REC_TRUNCATE,
    REC_PUNCH, /* zeros, the size stays */
    REC_ZERO,  /* zeros, the size may grow */
    REC_GROW,  /* allocation: the size may grow */
    REC_FLUSH,
    REC_RENAME,
    REC_UNLINK,
    REC_MKDIR,
    REC_RMDIR,
    REC_LINK,
    REC_FLUSH_DIR,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char watch[PATH_MAX];
static size_t watch_len;
static int out = -1;
static unsigned long kill_at, interrupt_at, changes;
static bool tear;

static void init(void)
{
    const char *dir = getenv("DROVER_WATCH"), *to = getenv("DROVER_RECORD");
    const char *at = getenv("DROVER_KILL_AT");
    if (!dir)
        return;
    snprintf(watch, sizeof(watch), "%s", dir);
    watch_len = strlen(watch);
    if (to)
        out =
            (int)syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (at)
        kill_at = strtoul(at, NULL, 10);
    if (getenv("DROVER_INTERRUPT_AT"))
        interrupt_at = strtoul(getenv("DROVER_INTERRUPT_AT"), NULL, 10);
    tear = getenv("DROVER_KILL_TEAR") != NULL;
}

__attribute__((destructor)) static void report(void)
{
    const char *to = getenv("DROVER_COUNT");
    char text[32];
    if (!to || !watch_len)
        return;
    int n = snprintf(text, sizeof(text), "%lu\n", changes);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd >= 0 && syscall(SYS_write, fd, text, n) < 0)
        _exit(99);
}

#define REAL(name)                 \
    static __typeof__(&name) real; \
    if (!real)                     \
    real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* ------------------------------------------------------------------ what counts */

static bool watched_path(const char *path)
{
    return watch_len && !strncmp(path, watch, watch_len) &&
           (path[watch_len] == '/' || !path[watch_len]);
}

static bool watched_fd(int fd, char *path)
{
    char link[64];
    pthread_once(&once, init);
    if (!watch_len)
        return false;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0)
        return false;
    path[n] = 0;
    return watched_path(path);
}

/* The absolute name of what may not exist: its directory's real path and its last part. */
static bool watched_name(int dirfd, const char *name, char *path)
{
    char dir[PATH_MAX], full[PATH_MAX];
    int saved = errno;
    pthread_once(&once, init);
    if (!watch_len || !name)
        return false;
    if (name[0] == '/' || dirfd == AT_FDCWD)
        snprintf(full, sizeof(full), "%s", name);
    else
        snprintf(full, sizeof(full), "/proc/self/fd/%d/%s", dirfd, name);
    char *slash = strrchr(full, '/');
    const char *base = slash ? slash + 1 : full;
    char keep[NAME_MAX + 1] = {0};
    memcpy(keep, base, strnlen(base, NAME_MAX));
    if (slash == full)
        strcpy(full, "/");
    else if (slash)
        *slash = 0;
    else
        strcpy(full, ".");
    bool ok = realpath(full, dir) && strlen(dir) + strlen(keep) + 2 < PATH_MAX;
    if (ok) {
        memmove(path, dir, strlen(dir) + 1);
        strcat(path, "/");
        strcat(path, keep);
        ok = watched_path(path);
    }
    errno = saved;
    return ok;
}

static uint64_t inode_of(int fd)
{
    struct stat st;
    return fstat(fd, &st) ? 0 : (uint64_t)st.st_ino;
}

/* ------------------------------------------------------------------ recording */

static void put(const void *p, size_t n)
{
    for (const char *c = p; n;) {
        ssize_t done = syscall(SYS_write, out, c, n);
        if (done <= 0)
            _exit(99);
        c += done;
        n -= (size_t)done;
    }
}

static void record(enum rec type, uint64_t ino, uint64_t off, uint64_t len, const char *a,
                   const char *b)
{
    if (out < 0)
        return;
    uint64_t h[6] = {type, ino, off, len, a ? strlen(a) : 0, b ? strlen(b) : 0};
    put(h, sizeof(h));
    if (a)
        put(a, h[4]);
    if (b)
        put(b, h[5]);
}

static void die(void)
{
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;)
        pause();
}

/* The lock is held. A change is about to happen. True: it is the last and to be torn. */
static bool change(void)
{
    changes++;
    if (interrupt_at && changes == interrupt_at)
        syscall(SYS_kill, syscall(SYS_getpid), SIGINT);
    if (kill_at && changes == kill_at) {
        if (tear)
            return true;
        die();
    }
    return false;
}

/* ------------------------------------------------------------------ writing */

static void iov_record(const struct iovec *iov, int n, uint64_t ino, uint64_t off, uint64_t len)
{
    record(REC_WRITE, ino, off, len, NULL, NULL);
    for (int i = 0; out >= 0 && i < n && len; i++) {
        size_t part = iov[i].iov_len < len ? iov[i].iov_len : len;
        put(iov[i].iov_base, part);
        len -= part;
    }
}

static void torn_write(int fd, const struct iovec *iov, int n, uint64_t off)
{
    uint64_t total = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    uint64_t left = total / 2 / 512 * 512;
    for (int i = 0; i < n && left; i++) {
        size_t part = iov[i].iov_len < left ? iov[i].iov_len : left;
        if (syscall(SYS_pwrite64, fd, iov[i].iov_base, part, off) < 0)
            break;
        off += part;
        left -= part;
    }
    die();
}

/* fd is watched. flags as of pwritev2. */
static ssize_t do_writev(int fd, const struct iovec *iov, int n, uint64_t off)
{
    pthread_mutex_lock(&lock);
    if (change())
        torn_write(fd, iov, n, off);
    ssize_t r = syscall(SYS_pwritev, fd, iov, n, (long)off, (long)(off >> 32 >> 32));
    int e = errno;
    if (r > 0)
        iov_record(iov, n, inode_of(fd), off, (uint64_t)r);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

static ssize_t one_write(int fd, const void *buf, size_t len, uint64_t off)
{
    struct iovec iov = {(void *)(uintptr_t)buf, len};
    return do_writev(fd, &iov, 1, off);
}

#define WRITERS(pw, pwv, pwv2)                                                         \
    EXPORT ssize_t pw(int fd, const void *buf, size_t len, off_t off)                  \
    {                                                                                  \
        char path[PATH_MAX];                                                           \
        REAL(pw);                                                                      \
        return watched_fd(fd, path) ? one_write(fd, buf, len, (uint64_t)off)           \
                                    : real(fd, buf, len, off);                         \
    }                                                                                  \
    EXPORT ssize_t pwv(int fd, const struct iovec *iov, int n, off_t off)              \
    {                                                                                  \
        char path[PATH_MAX];                                                           \
        REAL(pwv);                                                                     \
        return watched_fd(fd, path) ? do_writev(fd, iov, n, (uint64_t)off)             \
                                    : real(fd, iov, n, off);                           \
    }                                                                                  \
    EXPORT ssize_t pwv2(int fd, const struct iovec *iov, int n, off_t off, int flags)  \
    {                                                                                  \
        char path[PATH_MAX];                                                           \
        REAL(pwv2);                                                                    \
        return watched_fd(fd, path) && off >= 0 ? do_writev(fd, iov, n, (uint64_t)off) \
                                                : real(fd, iov, n, off, flags);        \
    }
#pragma GCC diagnostic ignored "-Wmissing-prototypes"
#undef pwrite
#undef pwritev
#undef pwritev2
ssize_t pwrite64(int, const void *, size_t, off_t);
ssize_t pwritev64(int, const struct iovec *, int, off_t);
ssize_t pwritev64v2(int, const struct iovec *, int, off_t, int);
WRITERS(pwrite, pwritev, pwritev2)
WRITERS(pwrite64, pwritev64, pwritev64v2)

EXPORT ssize_t write(int fd, const void *buf, size_t len)
{
    char path[PATH_MAX];
    if (fd <= 2 || !watched_fd(fd, path))
        return syscall(SYS_write, fd, buf, len);
    off_t at = lseek(fd, 0, SEEK_CUR);
    if (at < 0)
        return syscall(SYS_write, fd, buf, len);
    ssize_t r = one_write(fd, buf, len, (uint64_t)at);
    if (r > 0)
        lseek(fd, r, SEEK_CUR);
    return r;
}

/* ------------------------------------------------------------------ sizes, holes, copies */

static enum rec fallocate_kind(int mode)
{
    if (mode & FALLOC_FL_PUNCH_HOLE)
        return REC_PUNCH;
    if (mode & FALLOC_FL_ZERO_RANGE)
        return mode & FALLOC_FL_KEEP_SIZE ? REC_PUNCH : REC_ZERO;
    return REC_GROW;
}

static int do_fallocate(int fd, int mode, uint64_t off, uint64_t len)
{
    pthread_mutex_lock(&lock);
    if (change())
        die();
    int r = (int)syscall(SYS_fallocate, fd, mode, off, len), e = errno;
    if (!r && (fallocate_kind(mode) != REC_GROW || !(mode & FALLOC_FL_KEEP_SIZE)))
        record(fallocate_kind(mode), inode_of(fd), off, len, NULL, NULL);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

static int do_truncate(int fd, uint64_t size)
{
    pthread_mutex_lock(&lock);
    if (change())
        die();
    int r = (int)syscall(SYS_ftruncate, fd, size), e = errno;
    if (!r)
        record(REC_TRUNCATE, inode_of(fd), size, 0, NULL, NULL);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

#define SIZERS(fa, pfa, ft)                                              \
    EXPORT int fa(int fd, int mode, off_t off, off_t len)                \
    {                                                                    \
        char path[PATH_MAX];                                             \
        if (watched_fd(fd, path))                                        \
            return do_fallocate(fd, mode, (uint64_t)off, (uint64_t)len); \
        return (int)syscall(SYS_fallocate, fd, mode, off, len);          \
    }                                                                    \
    EXPORT int pfa(int fd, off_t off, off_t len)                         \
    {                                                                    \
        return fa(fd, 0, off, len) ? errno : 0;                          \
    }                                                                    \
    EXPORT int ft(int fd, off_t size)                                    \
    {                                                                    \
        char path[PATH_MAX];                                             \
        if (watched_fd(fd, path))                                        \
            return do_truncate(fd, (uint64_t)size);                      \
        return (int)syscall(SYS_ftruncate, fd, size);                    \
    }
SIZERS(fallocate, posix_fallocate, ftruncate)
SIZERS(fallocate64, posix_fallocate64, ftruncate64)

/* What a copy inside the kernel has put there, read back. */
static void record_back(int fd, uint64_t off, uint64_t len)
{
    char *buf = out >= 0 ? malloc(len + 1) : NULL;
    if (!buf)
        return;
    ssize_t n = syscall(SYS_pread64, fd, buf, len, off);
    if (n > 0) {
        struct iovec iov = {buf, (size_t)n};
        iov_record(&iov, 1, inode_of(fd), off, (uint64_t)n);
    }
    free(buf);
}

EXPORT ssize_t copy_file_range(int in, off_t *in_off, int fd, off_t *off, size_t len,
                               unsigned flags)
{
    char path[PATH_MAX];
    if (!watched_fd(fd, path))
        return syscall(SYS_copy_file_range, in, in_off, fd, off, len, flags);
    pthread_mutex_lock(&lock);
    if (change())
        die();
    uint64_t at = off ? (uint64_t)*off : (uint64_t)lseek(fd, 0, SEEK_CUR);
    ssize_t r = syscall(SYS_copy_file_range, in, in_off, fd, off, len, flags);
    int e = errno;
    if (r > 0)
        record_back(fd, at, (uint64_t)r);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list ap;
    char path[PATH_MAX];
    va_start(ap, request);
    void *arg = va_arg(ap, void *);
    va_end(ap);
    if ((request != FICLONE && request != FICLONERANGE) || !watched_fd(fd, path))
        return (int)syscall(SYS_ioctl, fd, request, arg);
    pthread_mutex_lock(&lock);
    if (change())
        die();
    int r = (int)syscall(SYS_ioctl, fd, request, arg), e = errno;
    struct stat st;
    if (!r && !fstat(fd, &st)) {
        const struct file_clone_range *c = arg;
        uint64_t at = request == FICLONE ? 0 : c->dest_offset;
        record_back(fd, at, (uint64_t)st.st_size - at);
    }
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

/* ------------------------------------------------------------------ durability */

static int do_sync(int fd, const char *path, long number)
{
    struct stat st;
    pthread_mutex_lock(&lock);
    if (change())
        die();
    int r = (int)syscall(number, fd), e = errno;
    bool dir = !fstat(fd, &st) && S_ISDIR(st.st_mode);
    if (!r)
        record(dir ? REC_FLUSH_DIR : REC_FLUSH, inode_of(fd), 0, 0, path, NULL);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

EXPORT int fdatasync(int fd)
{
    char path[PATH_MAX];
    return watched_fd(fd, path) ? do_sync(fd, path, SYS_fdatasync)
                                : (int)syscall(SYS_fdatasync, fd);
}

EXPORT int fsync(int fd)
{
    char path[PATH_MAX];
    return watched_fd(fd, path) ? do_sync(fd, path, SYS_fsync) : (int)syscall(SYS_fsync, fd);
}

/* ------------------------------------------------------------------ names */

static int do_open(int dirfd, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC)) || !watched_name(dirfd, name, path))
        return (int)syscall(SYS_openat, dirfd, name, flags, mode);
    pthread_mutex_lock(&lock);
    bool existed = !access(path, F_OK);
    if ((!existed || flags & O_TRUNC) && change())
        die();
    int fd = (int)syscall(SYS_openat, dirfd, name, flags, mode), e = errno;
    if (fd >= 0 && !existed)
        record(REC_CREATE, inode_of(fd), 0, 0, path, NULL);
    if (fd >= 0 && existed && flags & O_TRUNC)
        record(REC_TRUNCATE, inode_of(fd), 0, 0, NULL, NULL);
    pthread_mutex_unlock(&lock);
    errno = e;
    return fd;
}

#define OPENERS(o, oat)                                                       \
    EXPORT int o(const char *name, int flags, ...)                            \
    {                                                                         \
        va_list ap;                                                           \
        va_start(ap, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0; \
        va_end(ap);                                                           \
        return do_open(AT_FDCWD, name, flags, mode);                          \
    }                                                                         \
    EXPORT int oat(int dirfd, const char *name, int flags, ...)               \
    {                                                                         \
        va_list ap;                                                           \
        va_start(ap, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0; \
        va_end(ap);                                                           \
        return do_open(dirfd, name, flags, mode);                             \
    }
OPENERS(open, openat)
OPENERS(open64, openat64)

static int two_names(enum rec type, long number, int a_dir, const char *a, int b_dir, const char *b,
                     unsigned flags)
{
    char from[PATH_MAX], to[PATH_MAX];
    bool is_from = watched_name(a_dir, a, from), is_to = watched_name(b_dir, b, to);
    if (!is_from && !is_to)
        return (int)syscall(number, a_dir, a, b_dir, b, flags);
    pthread_mutex_lock(&lock);
    struct stat st = {0};
    if (change())
        die();
    if (lstat(from, &st))
        st.st_ino = 0;
    int r = (int)syscall(number, a_dir, a, b_dir, b, flags), e = errno;
    if (!r)
        record(type, (uint64_t)st.st_ino, flags, 0, from, to);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

EXPORT int rename(const char *a, const char *b)
{
    return two_names(REC_RENAME, SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 0);
}

EXPORT int renameat(int ad, const char *a, int bd, const char *b)
{
    return two_names(REC_RENAME, SYS_renameat2, ad, a, bd, b, 0);
}

EXPORT int renameat2(int ad, const char *a, int bd, const char *b, unsigned flags)
{
    return two_names(REC_RENAME, SYS_renameat2, ad, a, bd, b, flags);
}

EXPORT int link(const char *a, const char *b)
{
    return two_names(REC_LINK, SYS_linkat, AT_FDCWD, a, AT_FDCWD, b, 0);
}

EXPORT int linkat(int ad, const char *a, int bd, const char *b, int flags)
{
    return two_names(REC_LINK, SYS_linkat, ad, a, bd, b, (unsigned)flags);
}

static int one_name(enum rec type, long number, int dirfd, const char *name, long arg)
{
    char path[PATH_MAX];
    if (!watched_name(dirfd, name, path))
        return (int)syscall(number, dirfd, name, arg);
    pthread_mutex_lock(&lock);
    if (change())
        die();
    int r = (int)syscall(number, dirfd, name, arg), e = errno;
    if (!r)
        record(type, 0, 0, 0, path, NULL);
    pthread_mutex_unlock(&lock);
    errno = e;
    return r;
}

EXPORT int unlink(const char *name)
{
    return one_name(REC_UNLINK, SYS_unlinkat, AT_FDCWD, name, 0);
}

EXPORT int unlinkat(int dirfd, const char *name, int flags)
{
    return one_name(flags & AT_REMOVEDIR ? REC_RMDIR : REC_UNLINK, SYS_unlinkat, dirfd, name,
                    flags);
}

EXPORT int rmdir(const char *name)
{
    return one_name(REC_RMDIR, SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
}

EXPORT int mkdir(const char *name, mode_t mode)
{
    return one_name(REC_MKDIR, SYS_mkdirat, AT_FDCWD, name, (long)mode);
}

EXPORT int mkdirat(int dirfd, const char *name, mode_t mode)
{
    return one_name(REC_MKDIR, SYS_mkdirat, dirfd, name, (long)mode);
}
