/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Lock bytes as QEMU's: byte 100+i "I use i", byte 200+i "I do not share i", all OFD read locks;
 * whether somebody else holds one is asked with a write lock that is only tested, which works on a
 * read-only descriptor too. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "storage/posix.h"

#define USE_BYTE      100
#define UNSHARED_BYTE 200
#define N_PERMS       4

static const char *const perm_names[N_PERMS] = {"consistent read", "write", "write unchanged",
                                                "resize"};

static int set_bytes(int fd, short type, off_t start, off_t len)
{
    struct flock fl = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len};
    int r;
    do
        r = fcntl(fd, F_OFD_SETLK, &fl);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

static int set_group(int fd, short type, off_t base, unsigned bits)
{
    int r = 0;
    for (unsigned i = 0; i < N_PERMS && !r; i++)
        if (bits & (1u << i))
            r = set_bytes(fd, type, base + (off_t)i, 1);
    return r;
}

static void drop(int fd, unsigned use, unsigned unshared)
{
    set_group(fd, F_UNLCK, USE_BYTE, use);
    set_group(fd, F_UNLCK, UNSHARED_BYTE, unshared);
}

/* Does another description hold the byte? A failure to ask counts as no: the file system that has
 * no locks was found out when setting ours. */
static bool held_by_other(int fd, off_t byte)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    return fcntl(fd, F_OFD_GETLK, &fl) == 0 && fl.l_type != F_UNLCK;
}

static int conflict(const struct dr_file *f, const char *shared, unsigned i, struct dr_error *err)
{
    return dr_fail(err, EBUSY,
                   "%s: Failed to get %s\"%s\" lock. Is another process using the image [%s]?",
                   f->path, shared, perm_names[i], f->path);
}

static int test(const struct dr_file *f, int fd, unsigned use, unsigned unshared,
                struct dr_error *err)
{
    for (unsigned i = 0; i < N_PERMS; i++)
        if ((use & (1u << i)) && held_by_other(fd, UNSHARED_BYTE + (off_t)i))
            return conflict(f, "", i, err);
    for (unsigned i = 0; i < N_PERMS; i++)
        if ((unshared & (1u << i)) && held_by_other(fd, USE_BYTE + (off_t)i))
            return conflict(f, "shared ", i, err);
    return 0;
}

static bool no_locks_here(int r)
{
    return r == -ENOLCK || r == -EOPNOTSUPP || r == -EINVAL || r == -ENOSYS;
}

static int cannot_set(const struct dr_file *f, int r, unsigned use, struct dr_error *err)
{
    if (!no_locks_here(r))
        return dr_fail_errno(err, -r, "%s: Failed to set lock bytes", f->path);
    if (!(use & (DR_PERM_WRITE | DR_PERM_RESIZE)))
        return 0; /* reading is safe enough */
    return dr_fail(err, ENOLCK,
                   "%s: this file system cannot lock files, so a second writer would go unnoticed: "
                   "writing is refused unless locking is turned off (--locking=off)",
                   f->path);
}

static int set(const struct dr_file *f, int fd, unsigned use, unsigned unshared,
               struct dr_error *err)
{
    int r = set_group(fd, F_RDLCK, USE_BYTE, use);
    if (!r)
        r = set_group(fd, F_RDLCK, UNSHARED_BYTE, unshared);
    return r ? cannot_set(f, r, use, err) : 0;
}

/* Set the bytes, then look at those of others: of two that come at once at least one sees the
 * other. On a conflict the new bytes are dropped again. */
static int take(const struct dr_file *f, int fd, unsigned use, unsigned unshared,
                struct dr_error *err)
{
    int r = set(f, fd, use, unshared, err);
    if (!r)
        r = test(f, fd, use, unshared, err);
    if (r)
        drop(fd, use, unshared);
    return r;
}

/* A file that was shut once has its lock bytes on its first description, which has no descriptor.
 * Set them on the present one, which is in use, before the first goes. */
static int settle(struct posix_file *p, int fd, struct dr_error *err)
{
    int r = p->mapping ? set(&p->base, fd, p->use, p->unshared, err) : 0;
    if (r == 0)
        posix_unmap(p);
    return r;
}

/* Somebody who pinned the file may still have a call to make, and needs a descriptor: without the
 * mapping the file could not be told from another one that gets its number. */
static void release(struct posix_file *p)
{
    if (p->base.pins > 1) {
        POSIX_USE(use, p);
        posix_window_leave(p);
    }
    posix_window_leave(p);
    if (p->fd >= 0)
        set_bytes(p->fd, F_UNLCK, USE_BYTE, UNSHARED_BYTE - USE_BYTE + N_PERMS);
    posix_unmap(p);
}

static int change(struct posix_file *p, unsigned use, unsigned unshared, struct dr_error *err)
{
    POSIX_USE(now, p);
    if (now.fd < 0)
        return dr_fail_errno(err, -now.fd, "%s: cannot be opened again", p->base.path);
    int r = settle(p, now.fd, err);
    if (r == 0)
        r = take(&p->base, now.fd, use & ~p->use, unshared & ~p->unshared, err);
    if (r == 0)
        drop(now.fd, p->use & ~use, p->unshared & ~unshared);
    return r;
}

int posix_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err)
{
    struct posix_file *p = posix_file(f);
    int r = 0;
    if (!use && !unshared)
        release(p);
    else
        r = change(p, use, unshared, err);
    if (r == 0) {
        p->use = use;
        p->unshared = unshared;
    }
    return r;
}

/* ------------------------------------------------------------------ another access mode */

static bool same_file(int fd, const struct dr_file *f)
{
    struct stat st;
    if (fstat(fd, &st))
        return false;
    struct dr_file_id id = posix_id(&st);
    return id.dev == f->id.dev && id.ino == f->id.ino;
}

/* A new description of the same inode, whatever its name is by now. */
static int reopen(const struct dr_file *f, int access)
{
    char link[64];
    bool direct = ((const struct posix_file *)f)->direct;
    snprintf(link, sizeof(link), "/proc/self/fd/%d", ((const struct posix_file *)f)->fd);
    int fd = posix_open_fd(link, access, 0, &direct);
    if (fd == -ENOENT || fd == -ENOTDIR)
        fd = posix_open_fd(f->path, access, 0, &direct);
    if (fd < 0)
        return fd;
    if (same_file(fd, f))
        return fd;
    close(fd);
    return -ESTALE;
}

/* The descriptor's number keeps its meaning for reads that are under way; the old description, and
 * with it its lock bytes, goes in the same instant. */
static int exchange(struct posix_file *p, int fresh)
{
    int r;
    do
        r = dup3(fresh, p->fd, O_CLOEXEC);
    while (r < 0 && (errno == EINTR || errno == EBUSY));
    return r < 0 ? -errno : 0;
}

/* Set the writer's bytes on the new description. Our old "not shared" bytes would conflict with our
 * new "use" bytes, so they are dropped before the test, but only after the new "not shared" bytes
 * are set: otherwise another writer could come, write and leave unseen, and our cached size would
 * be stale. */
static int take_over(struct posix_file *p, int fd, unsigned use, unsigned unshared,
                     struct dr_error *err)
{
    const struct dr_file *f = &p->base;
    int r = set(f, fd, use, unshared, err);
    if (!r) {
        set_group(p->fd, F_UNLCK, UNSHARED_BYTE, p->unshared);
        r = test(f, fd, use, unshared, err);
    }
    return r;
}

static void take_back(struct posix_file *p, int fd, unsigned use, unsigned unshared)
{
    set_group(p->fd, F_RDLCK, UNSHARED_BYTE, p->unshared);
    drop(fd, use, unshared);
}

static int exchange_for_writing(struct posix_file *p, struct dr_error *err)
{
    struct dr_file *f = &p->base;
    unsigned use = DR_PERM_READ | DR_PERM_WRITE | DR_PERM_RESIZE;
    unsigned unshared = DR_PERM_WRITE | DR_PERM_RESIZE;
    bool locks = !(f->flags & DR_FILE_NO_LOCK);
    CLEANUP_CLOSE int fd = reopen(f, O_RDWR);
    if (fd < 0)
        return dr_fail_errno(err, -fd, "%s: cannot open for writing", f->path);
    int r = locks ? take_over(p, fd, use, unshared, err) : 0;
    if (!r && (r = exchange(p, fd)))
        dr_fail_errno(err, -r, "%s: cannot open for writing", f->path);
    if (r) {
        if (locks)
            take_back(p, fd, use, unshared);
        return r;
    }
    p->use = locks ? use : 0;
    p->unshared = locks ? unshared : 0;
    posix_open_cached(p);
    return 0;
}

/* A writer keeps its descriptor. */
int posix_upgrade(struct dr_file *f, struct dr_error *err)
{
    struct posix_file *p = posix_file(f);
    POSIX_USE(use, p);
    if (use.fd < 0)
        return dr_fail_errno(err, -use.fd, "%s: cannot open for writing", f->path);
    posix_window_leave(p);
    int r = settle(p, use.fd, err);
    if (r == 0)
        r = exchange_for_writing(p, err);
    if (r < 0)
        posix_window_enter(p);
    return r;
}

/* "Not shared" is held throughout, by one description or the other, so no writer gets between and
 * nothing need be tested. Where a read-only description cannot be had the old one serves on. */
static void exchange_for_reading(struct posix_file *p)
{
    CLEANUP_CLOSE int fd = reopen(&p->base, O_RDONLY);
    unsigned use = p->use & DR_PERM_READ;
    if (p->cached >= 0)
        close(p->cached);
    p->cached = -1;
    if (fd >= 0 && set_group(fd, F_RDLCK, USE_BYTE, use) == 0 &&
        set_group(fd, F_RDLCK, UNSHARED_BYTE, p->unshared) == 0 && exchange(p, fd) == 0) {
        p->use = use;
        return;
    }
    drop(p->fd, p->use & ~use, 0);
    p->use = use;
}

int posix_downgrade(struct dr_file *f, struct dr_error *err)
{
    struct posix_file *p = posix_file(f);
    (void)err;
    exchange_for_reading(p);
    posix_window_enter(p);
    return 0;
}
