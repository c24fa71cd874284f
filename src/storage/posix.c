/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Regular files and block devices: the bytes. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/inline.h"
#include "storage/posix.h"

static bool not_supported(int e)
{
    return e == EOPNOTSUPP || e == ENOSYS || e == EINVAL || e == ENOTTY || e == ENODEV;
}

static void posix_close(struct dr_file *f)
{
    struct posix_file *p = posix_file(f);
    posix_window_leave(p); /* nobody is about to shut it */
    posix_unmap(p);
    if (p->fd >= 0)
        close(p->fd);
    if (p->cached >= 0)
        close(p->cached);
    free(p->home);
    free(f->path);
    free(f);
}

/* ------------------------------------------------------------------ read and write */

void posix_give_up_direct(struct posix_file *p, int fd)
{
    p->direct = false;
    fcntl(fd, F_SETFL, 0);
}

/* Advice only: what the host keeps of these bytes is not needed again. */
static void drop_cache(struct posix_file *p, int fd, uint64_t off, uint64_t len)
{
    if ((p->base.flags & DR_FILE_DIRECT) && !p->direct)
        posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
}

static ssize_t posix_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    struct posix_file *p = posix_file(f);
    size_t done = 0;
    POSIX_USE(use, p);
    if (use.fd < 0)
        return use.fd;
    while (done < len) {
        ssize_t n = pread(use.fd, (char *)buf + done, len - done, (off_t)(off + done));
        if (n > 0)
            done += (size_t)n;
        /* The end of the file. With O_DIRECT, reading on at an odd offset would be an error. */
        if (n == 0 || (n > 0 && p->direct && (size_t)n % dr_max(f->read_align, 1u)))
            break;
        if (n < 0 && errno == EINVAL && p->direct)
            posix_give_up_direct(p, use.fd); /* the file system took the flag, but not this */
        else if (n < 0 && errno != EINTR)
            return -errno;
    }
    drop_cache(p, use.fd, off, len);
    return (ssize_t)done;
}

/* Advance *iov and *n past the bytes that were written. */
static void skip_written(struct iovec **iov, int *n, size_t written)
{
    while (*n && written >= (*iov)->iov_len) {
        written -= (*iov)->iov_len;
        (*iov)++;
        (*n)--;
    }
    if (*n && written) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + written;
        (*iov)->iov_len -= written;
    }
}

static bool is_aligned(const struct posix_file *p, const struct iovec *iov, int n, uint64_t off)
{
    uint64_t align = dr_max(p->base.write_align, 1u), mem = dr_max(p->base.mem_align, 1u);
    bool ok = off % align == 0;
    for (int i = 0; i < n; i++)
        ok = ok && iov[i].iov_len % align == 0 && (uintptr_t)iov[i].iov_base % mem == 0;
    return ok;
}

/* An end of the file that is inside a block goes through the page cache. The kernel keeps that and
 * O_DIRECT apart as long as nobody writes to the same page meanwhile; the range lock sees to it. */
static int fd_for(const struct posix_use *use, const struct iovec *iov, int n, uint64_t off)
{
    const struct posix_file *p = use->p;
    return p->direct && p->cached >= 0 && !is_aligned(p, iov, n, off) ? p->cached : use->fd;
}

static bool lacks_dsync(int e)
{
    return not_supported(e) || e == ENOSPC || e == EDQUOT;
}

/* How far one write reaches where the kernel keeps lists of blocks. Since Linux 6.16, ext4 puts
 * what one write brings into one folio of up to 2 MiB, and each later write into it, however small,
 * walks the list of all its blocks: 26 us for 4 KiB in the largest folio, 6 us in one of 128 KiB.
 * Bringing 1 MiB in eight writes takes a tenth longer than in one. */
#define WRITE_PIECE (128u << 10)

/* Does the kernel keep a list of blocks for each folio of this file? ext4 does, and block devices
 * do. */
static bool keeps_block_lists(struct posix_file *p, int fd)
{
    struct statfs fs;
    if (p->in_pieces == 0) {
        bool keeps = p->base.block_device ||
                     (fstatfs(fd, &fs) == 0 && fs.f_type == EXT4_SUPER_MAGIC);
        p->in_pieces = keeps ? 1 : -1;
    }
    return p->in_pieces > 0;
}

/* How many of the len bytes go at once. Pieces end where folios do, which are aligned to their
 * size. Durable writes stay whole, because each would wait for the device. */
static size_t piece_at(struct posix_file *p, int fd, uint64_t off, size_t len, int how)
{
    size_t piece = WRITE_PIECE - off % WRITE_PIECE;
    return len <= piece || how || p->direct || !keeps_block_lists(p, fd) ? len : piece;
}

/* How many of the buffers hold the first most bytes; *cut: how much of the last one is too much. */
static int iov_within(const struct iovec *iov, int n, size_t most, size_t *cut)
{
    *cut = 0;
    for (int i = 0; i < n; i++) {
        if (iov[i].iov_len >= most) {
            *cut = iov[i].iov_len - most;
            return i + 1;
        }
        most -= iov[i].iov_len;
    }
    return n;
}

/* One call, of one piece at most. */
static ssize_t write_piece(struct posix_file *p, int fd, struct iovec *iov, int n, uint64_t off,
                           int how)
{
    size_t cut, len = 0;
    n = n < IOV_MAX ? n : IOV_MAX;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    n = iov_within(iov, n, piece_at(p, fd, off, len, how), &cut);
    struct iovec *last = &iov[n - 1];
    last->iov_len -= cut;
    ssize_t w = how      ? pwritev2(fd, iov, n, (off_t)off, how)
                : n == 1 ? pwrite(fd, iov->iov_base, iov->iov_len, (off_t)off)
                         : pwritev(fd, iov, n, (off_t)off);
    last->iov_len += cut;
    return w;
}

/* *how are flags of pwritev2; RWF_DSYNC is taken out of them where the kernel or the file system
 * cannot do it, and where space is short: then it would not be known whether bytes were refused or
 * lost, so these are written without. */
DR_INLINE int write_all(struct dr_file *f, struct iovec *iov, int n, uint64_t off, int *how)
{
    struct posix_file *p = posix_file(f);
    POSIX_USE(use, p);
    if (use.fd < 0)
        return use.fd;
    skip_written(&iov, &n, 0);
    while (n) {
        int fd = fd_for(&use, iov, n, off);
        ssize_t w = write_piece(p, fd, iov, n, off, *how);
        if (w < 0 && errno == EINTR)
            continue;
        if (w < 0 && *how && lacks_dsync(errno)) {
            p->no_dsync = not_supported(errno);
            *how = 0;
            continue;
        }
        if (w < 0 && errno == EINVAL && p->direct) {
            posix_give_up_direct(p, use.fd);
            continue;
        }
        if (w < 0)
            return -errno;
        if (w == 0)
            return -ENOSPC; /* the end of a device */
        off += (uint64_t)w;
        skip_written(&iov, &n, (size_t)w);
    }
    return 0;
}

static int posix_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    int how = 0;
    return write_all(f, iov, n, off, &how);
}

/* The inode's own changes are made durable by a flush only. */
static int posix_pwritev_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    struct posix_file *p = posix_file(f);
    int how = p->no_dsync || p->inode_dirty ? 0 : RWF_DSYNC;
    int r = write_all(f, iov, n, off, &how);
    return r ? r : !how;
}

/* ------------------------------------------------------------------ holes */

static int posix_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                        uint64_t *run)
{
    struct posix_file *p = posix_file(f);
    if (f->block_device || p->no_seek)
        return 0;
    POSIX_USE(use, p);
    if (use.fd < 0)
        return use.fd;
    off_t next = lseek(use.fd, (off_t)off, SEEK_DATA);
    if (next < 0 && errno != ENXIO) {
        p->no_seek = not_supported(errno);
        return p->no_seek ? 0 : -errno;
    }
    if (next < 0 || (uint64_t)next > off) {
        *kind = DR_FILE_HOLE;
        *run = next < 0 ? len : dr_min(len, (uint64_t)next - off);
        return 0;
    }
    next = lseek(use.fd, (off_t)off, SEEK_HOLE);
    /* Not behind off: the file changed meanwhile; DATA is always a safe answer. */
    if (next > 0 && (uint64_t)next > off)
        *run = dr_min(len, (uint64_t)next - off);
    return 0;
}

/* 0, -ENOTSUP (remembered in *lacks), or -errno. */
static int try_fallocate(struct dr_file *f, int mode, uint64_t off, uint64_t len,
                         _Atomic bool *lacks)
{
    if (lacks && *lacks)
        return -ENOTSUP;
    int r;
    POSIX_USE(use, posix_file(f));
    if (use.fd < 0)
        return use.fd;
    do
        r = fallocate(use.fd, mode, (off_t)off, (off_t)len);
    while (r < 0 && errno == EINTR);
    if (r == 0)
        return 0;
    if (!not_supported(errno))
        return -errno;
    if (lacks)
        *lacks = true;
    return -ENOTSUP;
}

static int punch(struct dr_file *f, uint64_t off, uint64_t len)
{
    return try_fallocate(f, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, len,
                         &posix_file(f)->no_punch);
}

static int zero_range(struct dr_file *f, uint64_t off, uint64_t len)
{
    return try_fallocate(f, FALLOC_FL_ZERO_RANGE, off, len, &posix_file(f)->no_zero_range);
}

/* Growing by a byte written at the end never cuts what another thread appends; ftruncate could. */
static int write_last_zero(struct dr_file *f, uint64_t end)
{
    char zero = 0;
    struct iovec iov = {.iov_base = &zero, .iov_len = 1};
    return posix_pwritev(f, &iov, 1, end - 1);
}

/* [off, off+len) ends inside the file or is all there is to its end. */
static int zero_inside(struct dr_file *f, uint64_t off, uint64_t len, bool give_back)
{
    int r = give_back ? punch(f, off, len) : -ENOTSUP;
    if (r != -ENOTSUP)
        return r;
    r = zero_range(f, off, len);
    if (r != -ENOTSUP || give_back)
        return r;
    /* tmpfs: the space is given back and taken again. */
    r = punch(f, off, len);
    return r ? r : try_fallocate(f, 0, off, len, NULL);
}

/* The file grows if the range ends behind it. */
static int zero_allocated(struct dr_file *f, uint64_t off, uint64_t len)
{
    uint64_t size = dr_file_size(f);
    int r = zero_range(f, off, len);
    if (r != -ENOTSUP)
        return r;
    r = off < size ? punch(f, off, dr_min(len, size - off)) : 0;
    return r ? r : try_fallocate(f, 0, off, len, &posix_file(f)->no_allocate);
}

static int zero_regular(struct dr_file *f, uint64_t off, uint64_t len, bool give_back)
{
    uint64_t size = dr_file_size(f), end = off + len;
    int r = 0;
    if (off < size)
        r = zero_inside(f, off, dr_min(len, size - off), give_back);
    return r || end <= size ? r : write_last_zero(f, end);
}

static int write_zero_edge(struct dr_file *f, uint64_t off, uint64_t len)
{
    char zeros[4096] = {0};
    while (len) {
        struct iovec iov = {.iov_base = zeros, .iov_len = (size_t)dr_min(len, sizeof(zeros))};
        uint64_t n = iov.iov_len;
        int r = posix_pwritev(f, &iov, 1, off);
        if (r)
            return r;
        off += n;
        len -= n;
    }
    return 0;
}

/* Devices take whole logical blocks. In the kernel zero_range writes zeros where the device has no
 * command for it, which is slow: not with FAST. */
static int zero_device(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    uint64_t unit = posix_file(f)->sector, end = off + len;
    uint64_t first = dr_round_up(off, unit), last = dr_round_down(end, unit);
    if (end > dr_file_size(f))
        return -ENOSPC;
    if (first >= last)
        return -ENOTSUP;
    int r = flags & DR_FILE_ZERO_PUNCH ? punch(f, first, last - first) : -ENOTSUP;
    if (r == -ENOTSUP && !(flags & DR_FILE_ZERO_FAST))
        r = zero_range(f, first, last - first);
    if (!r && first > off)
        r = write_zero_edge(f, off, first - off);
    if (!r && end > last)
        r = write_zero_edge(f, last, end - last);
    return r;
}

static int posix_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    if (f->block_device)
        return zero_device(f, off, len, flags);
    if (flags & DR_FILE_ZERO_ALLOCATE)
        return zero_allocated(f, off, len);
    return zero_regular(f, off, len, flags & DR_FILE_ZERO_PUNCH);
}

/* ------------------------------------------------------------------ size and flush */

static int posix_truncate(struct dr_file *f, uint64_t size)
{
    if (f->block_device)
        return size == dr_file_size(f) ? 0 : -ENOTSUP;
    int r;
    POSIX_USE(use, posix_file(f));
    if (use.fd < 0)
        return use.fd;
    do
        r = ftruncate(use.fd, (off_t)size);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

static int posix_get_size(struct dr_file *f, uint64_t *size)
{
    POSIX_USE(use, posix_file(f));
    off_t end = use.fd < 0 ? use.fd : lseek(use.fd, 0, SEEK_END);
    if (end < 0)
        return use.fd < 0 ? use.fd : -errno;
    *size = (uint64_t)end;
    return 0;
}

static int posix_flush(struct dr_file *f)
{
    struct posix_file *p = posix_file(f);
    POSIX_USE(use, p);
    if (use.fd < 0)
        return use.fd;
    bool whole = atomic_exchange(&p->inode_dirty, false);
    /* EINVAL: a file system without anything to make durable, that of a read-only medium. */
    if ((whole ? fsync(use.fd) : fdatasync(use.fd)) && errno != EINVAL)
        return -errno;
    drop_cache(p, use.fd, 0, 0);
    return 0;
}

/* ------------------------------------------------------------------ copy */

/* How much of the range can share its blocks: whole blocks at block boundaries. */
static uint64_t clone_length(const struct posix_file *dst, uint64_t dst_off,
                             const struct posix_file *src, uint64_t src_off, uint64_t len)
{
    if (dst->base.block_device || src->base.block_device || dst->no_clone ||
        dst->no_clone_from == src->base.id.dev + 1 || dst_off % dst->block || src_off % dst->block)
        return 0;
    return dr_round_down(len, dst->block);
}

/* A reflink shares the blocks: no byte moves. The number of bytes shared. */
static uint64_t clone_range(const struct posix_use *to, uint64_t dst_off,
                            const struct posix_use *from, uint64_t src_off, uint64_t len)
{
    struct posix_file *dst = to->p, *src = from->p;
    len = clone_length(dst, dst_off, src, src_off, len);
    struct file_clone_range range = {
        .src_fd = from->fd, .src_offset = src_off, .src_length = len, .dest_offset = dst_off};
    if (!len || ioctl(to->fd, FICLONERANGE, &range) == 0)
        return len;
    /* EINVAL may be about this range (the end of src); the others are about the file system. */
    if (errno == EXDEV)
        dst->no_clone_from = src->base.id.dev + 1;
    dst->no_clone = errno == EOPNOTSUPP || errno == ENOTTY || errno == ENOSYS;
    return 0;
}

static ssize_t posix_copy(struct dr_file *dst, uint64_t dst_off, struct dr_file *src,
                          uint64_t src_off, uint64_t len)
{
    struct posix_file *d = posix_file(dst), *s = posix_file(src);
    off64_t in = (off64_t)src_off, out = (off64_t)dst_off;
    POSIX_USE(to, d);
    POSIX_USE(from, s);
    if (to.fd < 0 || from.fd < 0)
        return -ENOTSUP; /* reading says what is wrong */
    uint64_t cloned = clone_range(&to, dst_off, &from, src_off, len);
    if (cloned)
        return (ssize_t)cloned;
    if (dst->block_device || src->block_device || d->no_copy || d->no_copy_from == src->id.dev + 1)
        return -ENOTSUP;
    ssize_t n;
    do
        n = copy_file_range(from.fd, &in, to.fd, &out, (size_t)len, 0);
    while (n < 0 && errno == EINTR);
    if (n >= 0)
        return n ? n : -EINVAL;
    int e = errno;
    /* Another source may be on the same file system as dst. */
    if (e == EXDEV)
        d->no_copy_from = src->id.dev + 1;
    if (e == EOPNOTSUPP || e == ENOSYS)
        d->no_copy = true;
    bool unable = e == EXDEV || d->no_copy || e == EBADF || e == ETXTBSY || e == EPERM ||
                  e == EOVERFLOW;
    return unable ? -ENOTSUP : -e;
}

static void posix_advise(struct dr_file *f, bool random)
{
    struct posix_file *p = posix_file(f);
    p->random = random; /* for when it is opened again, which advice is no reason for */
    if (p->fd < 0)
        return;
    POSIX_USE(use, p);
    if (use.fd >= 0)
        posix_fadvise(use.fd, 0, 0, random ? POSIX_FADV_RANDOM : POSIX_FADV_NORMAL);
}

static uint64_t posix_mtime(struct dr_file *f)
{
    struct stat st;
    POSIX_USE(use, posix_file(f));
    if (f->block_device || use.fd < 0 || fstat(use.fd, &st))
        return 0;
    return (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
}

static uint64_t nanoseconds(const struct timespec *t)
{
    return (uint64_t)t->tv_sec * 1000000000u + (uint64_t)t->tv_nsec;
}

/* How fine the file system keeps times. Some know only every other second (FAT), or whole seconds
 * (ext4 with inodes of 128 bytes); a time that looks like theirs by chance costs a wait. */
static uint64_t granule_of(const struct dr_file_stamp *stamp)
{
    static const uint64_t granules[] = {2000000000, 1000000000, 10000000, 1000000};
    for (size_t i = 0; i < sizeof(granules) / sizeof(granules[0]); i++)
        if (stamp->mtime % granules[i] == 0 && stamp->ctime % granules[i] == 0)
            return granules[i];
    return 1;
}

/* File times come from a clock that ticks every few milliseconds, and are cut to what the file
 * system can keep: until both have gone on, a write would leave the same time. A ctime far ahead
 * was set by another clock: there is nothing to wait for. */
static void wait_for_tick(const struct dr_file_stamp *stamp)
{
    const uint64_t most = 1000000000, granule = granule_of(stamp), until = stamp->ctime + granule;
    const struct timespec pause = {.tv_nsec = 1000000};
    struct timespec now;
    while (clock_gettime(CLOCK_REALTIME_COARSE, &now) == 0 && nanoseconds(&now) < until &&
           until - nanoseconds(&now) < granule + most)
        nanosleep(&pause, NULL);
}

static int posix_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp)
{
    struct stat st;
    POSIX_USE(use, posix_file(f));
    if (use.fd < 0)
        return use.fd;
    /* fdatasync leaves out times. */
    if (settle && !(f->flags & DR_FILE_NO_FLUSH) && fsync(use.fd))
        return -errno;
    if (fstat(use.fd, &st))
        return -errno;
    *stamp = (struct dr_file_stamp){.size = (uint64_t)st.st_size,
                                    .mtime = nanoseconds(&st.st_mtim),
                                    .ctime = nanoseconds(&st.st_ctim),
                                    .ino = (uint64_t)st.st_ino};
    if (settle)
        wait_for_tick(stamp);
    return 0;
}

static int posix_usage(struct dr_file *f, uint64_t *bytes)
{
    struct stat st;
    POSIX_USE(use, posix_file(f));
    if (use.fd < 0 || fstat(use.fd, &st))
        return use.fd < 0 ? use.fd : -errno;
    *bytes = (uint64_t)st.st_blocks * 512;
    return 0;
}

const struct dr_file_ops posix_file_ops = {
    .name = "posix",
    .close = posix_close,
    .pread = posix_pread,
    .pwritev = posix_pwritev,
    .pwritev_durable = posix_pwritev_durable,
    .extent = posix_extent,
    .zero = posix_zero,
    .truncate = posix_truncate,
    .flush = posix_flush,
    .get_size = posix_get_size,
    .copy = posix_copy,
    .upgrade = posix_upgrade,
    .downgrade = posix_downgrade,
    .lock = posix_lock,
    .advise = posix_advise,
    .mtime = posix_mtime,
    .stamp = posix_stamp,
    .usage = posix_usage,
    .reason = posix_reason,
};
