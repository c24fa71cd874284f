/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The calls on open files, around the operations of each container. They check bounds and rights,
 * keep the cached size, turn partial transfers into whole ones or errors, and remember a failed
 * flush. Reads and writes take no lock, except writes of files with write_align (aligned.c). */
#include <inttypes.h>
#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/inline.h"
#include "storage/aligned.h"

#define MAX_SIZE ((uint64_t)INT64_MAX)

/* ------------------------------------------------------------------ helpers */

static int check_range(const struct dr_file *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    if (dr_inside(off, len, MAX_SIZE))
        return 0;
    return dr_fail(err, EFBIG, "%s: %" PRIu64 " bytes at offset %" PRIu64 " are beyond any file",
                   f->path, len, off);
}

static int check_writable(const struct dr_file *f, struct dr_error *err)
{
    if (f->flags & DR_FILE_RDWR)
        return 0;
    return dr_fail(err, EBADF, "%s: not open for writing", f->path);
}

static int check_write(const struct dr_file *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = check_writable(f, err);
    return r ? r : check_range(f, off, len, err);
}

/* The words for r, with which a call of f failed. */
static const char *reason(struct dr_file *f, int r)
{
    const char *more = f->ops->reason ? f->ops->reason(f, r) : NULL;
    if (!more)
        more = strerrordesc_np(-r);
    return more ? more : "unknown error";
}

/* After the change, so that a flush that runs meanwhile does not take the mark away unseen. The
 * look first keeps the cache line shared between writers. */
static void mark_dirty(struct dr_file *f)
{
    if (!f->dirty)
        f->dirty = true;
}

/* Any part of a failed write may be there. */
static int write_failed(struct dr_file *f, int r, const char *what, uint64_t off, uint64_t len,
                        struct dr_error *err)
{
    uint64_t size;
    mark_dirty(f);
    if (f->ops->get_size && f->ops->get_size(f, &size) == 0)
        dr_file_grow_size(f, size); /* never smaller: others may be appending */
    return dr_fail(err, -r, "%s: cannot %s %" PRIu64 " bytes at offset %" PRIu64 ": %s", f->path,
                   what, len, off, reason(f, r));
}

/* ------------------------------------------------------------------ read */

DR_INLINE ssize_t read_some(struct dr_file *f, void *buf, uint64_t off, size_t len,
                            struct dr_error *err)
{
    bool plain = f->read_align <= 1 && f->mem_align <= 1;
    ssize_t n = plain ? f->ops->pread(f, buf, off, len) : dr_aligned_pread(f, buf, off, len);
    if (n < 0)
        return dr_fail(err, (int)-n, "%s: cannot read %zu bytes at offset %" PRIu64 ": %s", f->path,
                       len, off, reason(f, (int)n));
    return n;
}

int dr_file_pread(struct dr_file *f, void *buf, uint64_t off, size_t len, struct dr_error *err)
{
    int r = check_range(f, off, len, err);
    if (r || !len)
        return r;
    ssize_t n = read_some(f, buf, off, len, err);
    if (n < 0)
        return (int)n;
    if ((size_t)n < len)
        return dr_fail(err, EIO, "%s: ends at %" PRIu64 ", expected %zu bytes at offset %" PRIu64,
                       f->path, n ? off + (uint64_t)n : dr_file_size(f), len, off);
    return 0;
}

int dr_file_pread_short(struct dr_file *f, void *buf, uint64_t off, size_t len, size_t *got,
                        struct dr_error *err)
{
    size_t have = 0;
    if (len && dr_inside(off, len, MAX_SIZE)) {
        ssize_t n = read_some(f, buf, off, len, err);
        if (n < 0)
            return (int)n;
        have = (size_t)n;
    }
    if (have < len)
        memset((char *)buf + have, 0, len - have);
    if (got)
        *got = have;
    return 0;
}

/* ------------------------------------------------------------------ write */

DR_INLINE int write_iov(struct dr_file *f, struct iovec *iov, int n, uint64_t off, uint64_t len,
                        struct dr_error *err)
{
    bool durable = false, plain = f->write_align <= 1 && f->mem_align <= 1;
    int r = check_write(f, off, len, err);
    if (r || !len)
        return r;
    r = plain ? f->ops->pwritev(f, iov, n, off) : dr_aligned_pwritev(f, iov, n, off, len, &durable);
    if (r)
        return write_failed(f, r, "write", off, len, err);
    if (plain)
        dr_file_grow_size(f, off + len);
    mark_dirty(f);
    return 0;
}

int dr_file_pwrite(struct dr_file *f, const void *buf, uint64_t off, size_t len,
                   struct dr_error *err)
{
    struct iovec iov = {.iov_base = (void *)buf, .iov_len = len};
    return write_iov(f, &iov, 1, off, len, err);
}

static int iov_length(const struct dr_file *f, const struct iovec *iov, int n, uint64_t *len,
                      struct dr_error *err)
{
    *len = 0;
    for (int i = 0; i < n; i++)
        if (dr_add_overflow(*len, iov[i].iov_len, len))
            return dr_fail(err, EINVAL, "%s: a write of more bytes than there are", f->path);
    return 0;
}

int dr_file_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off, struct dr_error *err)
{
    uint64_t len;
    int r = iov_length(f, iov, n, &len, err);
    return r ? r : write_iov(f, iov, n, off, len, err);
}

/* ------------------------------------------------------------------ zero */

#define ZERO_PIECE  (64u << 10)
#define ZERO_PIECES 32

static int write_zeros(struct dr_file *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    static const uint8_t zeros[ZERO_PIECE];
    struct iovec iov[ZERO_PIECES];
    while (len) {
        uint64_t todo = dr_min(len, (uint64_t)ZERO_PIECE * ZERO_PIECES), left = todo;
        int n = 0;
        for (; left; n++) {
            iov[n].iov_base = (void *)zeros;
            iov[n].iov_len = (size_t)dr_min(left, ZERO_PIECE);
            left -= iov[n].iov_len;
        }
        int r = write_iov(f, iov, n, off, todo, err);
        if (r)
            return r;
        off += todo;
        len -= todo;
    }
    return 0;
}

/* A range past the end needs no zeros, only a new end of the file. One byte written there, not a
 * truncate: that could cut off what another thread appends meanwhile. */
static int grow_to(struct dr_file *f, uint64_t end, struct dr_error *err)
{
    uint8_t zero = 0;
    return end > dr_file_size(f) ? dr_file_pwrite(f, &zero, end - 1, 1, err) : 0;
}

static int write_zeros_sparsely(struct dr_file *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    int r = 0;
    if (off < size)
        r = write_zeros(f, off, dr_min(len, size - off), err);
    return r ? r : grow_to(f, off + len, err);
}

int dr_file_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags,
                 struct dr_error *err)
{
    bool takes_space = flags & (DR_FILE_ZERO_ALLOCATE | DR_FILE_ZERO_WRITE);
    int r = check_write(f, off, len, err);
    if (r || !len)
        return r;
    r = flags & DR_FILE_ZERO_WRITE ? -ENOTSUP : dr_aligned_zero(f, off, len, flags);
    if (r == -ENOTSUP && takes_space)
        return write_zeros(f, off, len, err);
    if (r == -ENOTSUP && !(flags & DR_FILE_ZERO_FAST))
        return write_zeros_sparsely(f, off, len, err);
    if (r == -ENOTSUP)
        return dr_fail(err, ENOTSUP,
                       "%s: cannot zero %" PRIu64 " bytes at offset %" PRIu64
                       " without writing them",
                       f->path, len, off);
    if (r)
        return write_failed(f, r, takes_space ? "allocate" : "zero", off, len, err);
    dr_file_grow_size(f, off + len);
    mark_dirty(f);
    return 0;
}

/* ------------------------------------------------------------------ extents and size */

int dr_file_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                   uint64_t *run, struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    *kind = DR_FILE_HOLE;
    *run = len;
    if (off >= size)
        return 0;
    len = dr_min(len, size - off);
    *kind = DR_FILE_DATA;
    *run = len;
    int r = f->ops->extent ? f->ops->extent(f, off, len, kind, run) : 0;
    if (r)
        return dr_fail(err, -r, "%s: cannot find data or holes at offset %" PRIu64 ": %s", f->path,
                       off, reason(f, r));
    return 0;
}

int dr_file_truncate(struct dr_file *f, uint64_t size, struct dr_error *err)
{
    int r = check_write(f, size, 0, err);
    if (r)
        return r;
    r = f->ops->truncate(f, size);
    if (r)
        return dr_fail_errno(err, -r, "%s: cannot change the size to %" PRIu64, f->path, size);
    f->size = size;
    mark_dirty(f);
    return 0;
}

void dr_file_advise(struct dr_file *f, bool random)
{
    if (f->ops->advise)
        f->ops->advise(f, random);
}

uint64_t dr_file_mtime(struct dr_file *f)
{
    return f->ops->mtime ? f->ops->mtime(f) : 0;
}

int dr_file_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp, struct dr_error *err)
{
    *stamp = (struct dr_file_stamp){.size = dr_file_size(f)};
    int r = f->ops->stamp ? f->ops->stamp(f, settle, stamp) : 0;
    return r < 0 ? dr_fail_errno(err, -r, "%s: its size and times cannot be read", f->path) : 0;
}

static int sum_data(struct dr_file *f, uint64_t *bytes, struct dr_error *err)
{
    uint64_t size = dr_file_size(f), run;
    *bytes = 0;
    for (uint64_t off = 0; off < size; off += run) {
        enum dr_file_extent kind;
        int r = dr_file_extent(f, off, size - off, &kind, &run, err);
        if (r < 0)
            return r;
        *bytes += kind == DR_FILE_DATA ? run : 0;
    }
    return 0;
}

int dr_file_usage(struct dr_file *f, uint64_t *bytes, struct dr_error *err)
{
    if (!f->ops->usage)
        return sum_data(f, bytes, err);
    int r = f->ops->usage(f, bytes);
    return r < 0 ? dr_fail(err, -r, "%s: cannot tell how much space it takes: %s", f->path,
                           reason(f, r))
                 : 0;
}

int dr_file_refresh_size(struct dr_file *f, struct dr_error *err)
{
    uint64_t size;
    if (!f->ops->get_size)
        return 0;
    int r = f->ops->get_size(f, &size);
    if (r)
        return dr_fail(err, -r, "%s: cannot get the size: %s", f->path, reason(f, r));
    f->size = size;
    return 0;
}

int dr_file_see_growth(struct dr_file *f, struct dr_error *err)
{
    uint64_t size;
    if (!f->ops->get_size)
        return 0;
    int r = f->ops->get_size(f, &size);
    if (r)
        return dr_fail(err, -r, "%s: cannot get the size: %s", f->path, reason(f, r));
    dr_file_grow_size(f, size);
    return 0;
}

/* ------------------------------------------------------------------ flush */

static int flush_lost(const struct dr_file *f, struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: an earlier flush failed (%s): what was written is lost, open it again",
                   f->path, strerrordesc_np(-f->flush_error));
}

static int flush_locked(struct dr_file *f, struct dr_error *err)
{
    if (f->flush_error)
        return flush_lost(f, err);
    if (!atomic_exchange(&f->dirty, false))
        return 0;
    int r = f->ops->flush(f);
    if (!r)
        return 0;
    if (f->ops->reason && f->ops->reason(f, r))
        f->dirty = true; /* nothing was tried, so nothing is lost */
    else
        f->flush_error = r;
    return dr_fail(err, -r, "%s: cannot flush: %s", f->path, reason(f, r));
}

int dr_file_flush(struct dr_file *f, struct dr_error *err)
{
    if (f->flags & DR_FILE_NO_FLUSH)
        return 0;
    /* Clean may mean that another thread's flush is under way: wait for it. */
    pthread_mutex_lock(&f->flush_lock);
    int r = flush_locked(f, err);
    pthread_mutex_unlock(&f->flush_lock);
    return r;
}

/* A container that has no room has written nothing, and nothing else is lost. After any other
 * failure of a durable write the kernel may have dropped the bytes, as after a failed flush. */
static bool is_refusal(int r)
{
    return r == -ENOSPC || r == -EDQUOT || r == -EFBIG || r == -ENOMEM || r == -EINTR;
}

int dr_file_pwritev_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off,
                            struct dr_error *err)
{
    bool durable = !(f->flags & DR_FILE_NO_FLUSH);
    uint64_t len;
    if (!durable)
        return dr_file_pwritev(f, iov, n, off, err);
    if (f->flush_error)
        return flush_lost(f, err);
    int r = iov_length(f, iov, n, &len, err);
    if (!r)
        r = check_write(f, off, len, err);
    if (r || !len)
        return r;
    r = dr_aligned_pwritev(f, iov, n, off, len, &durable);
    if (r && durable && !is_refusal(r)) {
        int none = 0;
        atomic_compare_exchange_strong(&f->flush_error, &none, r);
    }
    if (r)
        return write_failed(f, r, "write durably", off, len, err);
    if (durable)
        return 0;
    mark_dirty(f);
    return dr_file_flush(f, err);
}

/* ------------------------------------------------------------------ copy */

static bool means_unsupported(ssize_t r)
{
    return r == -ENOTSUP || r == -EXDEV || r == -EINVAL || r == -ENOSYS || r == 0;
}

/* Between the files below, never beyond the ends of the parts. */
static int copy_parts(struct dr_file *dst, uint64_t dst_off, struct dr_file *src, uint64_t src_off,
                      uint64_t len, uint64_t *copied, struct dr_error *err)
{
    if ((dst->part && dst_off + len > dr_file_size(dst)) ||
        (src->part && src_off + len > dr_file_size(src)))
        return -ENOTSUP;
    struct dr_file *to = dr_file_whole(dst, &dst_off), *from = dr_file_whole(src, &src_off);
    int r = dr_file_copy(to, dst_off, from, src_off, len, copied, err);
    for (; r != -ENOTSUP && dst != to; dst = dst->under)
        mark_dirty(dst); /* a flush passes no part that is clean */
    return r;
}

int dr_file_copy(struct dr_file *dst, uint64_t dst_off, struct dr_file *src, uint64_t src_off,
                 uint64_t len, uint64_t *copied, struct dr_error *err)
{
    *copied = 0;
    int r = check_write(dst, dst_off, len, err);
    if (!r)
        r = check_range(src, src_off, len, err);
    if (r)
        return r;
    if (dst->part || src->part)
        return copy_parts(dst, dst_off, src, src_off, len, copied, err);
    if (!dst->ops->copy || dst->ops != src->ops || !len)
        return -ENOTSUP;
    struct dr_busy_range range;
    dr_aligned_begin(dst, dst_off, len, &range);
    ssize_t n = dst->ops->copy(dst, dst_off, src, src_off, len);
    if (n > 0)
        dr_file_grow_size(dst, dst_off + (uint64_t)n);
    dr_aligned_end(dst, &range);
    if (means_unsupported(n))
        return -ENOTSUP;
    if (n < 0)
        return write_failed(dst, (int)n, "copy", dst_off, len, err);
    *copied = (uint64_t)n;
    mark_dirty(dst);
    return 0;
}
