/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files with alignment: O_DIRECT, and back ends with large blocks.
 *
 * A file says in read_align, write_align and mem_align what its operations take. Callers need not
 * care: a request that does not fit passes through an aligned bounce buffer. A write that covers a
 * block only in part reads the block, changes its bytes and writes it back. Two such writes to
 * different sectors of one block would undo each other, so every change of a file with write_align
 * locks the blocks it touches, for as long as it lasts. Reads lock nothing: a block is written back
 * with the bytes that it had.
 *
 * The end of a file may lie inside a block. The block is then written only up to that end: an
 * operation takes any length where its range reaches the end of the file. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "storage/aligned.h"

#define BOUNCE_BYTES ((uint64_t)1 << 20) /* at most; a multiple of every alignment */
#define PAGE_BYTES   4096u /* of the host's page cache, through which unaligned ends go */

/* ------------------------------------------------------------------ alignment */

static uint64_t unit(unsigned align)
{
    return align ? align : 1;
}

static bool fits(uint64_t off, uint64_t len, unsigned align)
{
    return off % unit(align) == 0 && len % unit(align) == 0;
}

static bool buffer_fits(const struct dr_file *f, const void *buf)
{
    return (uintptr_t)buf % unit(f->mem_align) == 0;
}

static bool iov_fits(const struct dr_file *f, const struct iovec *iov, int n)
{
    for (int i = 0; i < n; i++)
        if (!buffer_fits(f, iov[i].iov_base) || !fits(0, iov[i].iov_len, f->write_align))
            return false;
    return true;
}

/* Room for len bytes at off with the blocks around them, or for as much as is moved at once. */
static uint8_t *bounce_new(uint64_t off, uint64_t len, unsigned align, size_t *room)
{
    uint64_t around = dr_round_up(off + len, unit(align)) - dr_round_down(off, unit(align));
    *room = (size_t)dr_min(dr_round_up(around, PAGE_BYTES), BOUNCE_BYTES);
    return aligned_alloc(PAGE_BYTES, *room);
}

/* ------------------------------------------------------------------ range lock */

/* Does a range that came before this one overlap it? */
static bool is_blocked(const struct dr_file *f, const struct dr_busy_range *range)
{
    for (const struct dr_busy_range *busy = f->busy; busy != range; busy = busy->next)
        if (busy->off < range->end && range->off < busy->end)
            return true;
    return false;
}

/* f->busy has all ranges in the order in which they came, also those that wait. A range waits for
 * what came before it and for nothing else: a writer of the last block, which locks all that lies
 * behind, would wait for ever if others that come later got in. */
void dr_aligned_begin(struct dr_file *f, uint64_t off, uint64_t len, struct dr_busy_range *range)
{
    if (unit(f->write_align) == 1)
        return;
    uint64_t block = dr_max(f->write_align, PAGE_BYTES);
    range->off = dr_round_down(off, block);
    range->end = dr_round_up(off + len, block);
    /* The last block is written only up to the end of the file, which must not move meanwhile: this
     * write locks everything behind it, too. */
    if ((off + len) % f->write_align != 0 && range->end > dr_file_size(f))
        range->end = UINT64_MAX;
    DR_LOCK_SCOPE(&f->range_lock);
    struct dr_busy_range **last = &f->busy;
    while (*last)
        last = &(*last)->next;
    range->next = NULL;
    *last = range;
    while (is_blocked(f, range))
        pthread_cond_wait(&f->range_free, &f->range_lock);
}

void dr_aligned_end(struct dr_file *f, struct dr_busy_range *range)
{
    if (unit(f->write_align) == 1)
        return;
    DR_LOCK_SCOPE(&f->range_lock);
    struct dr_busy_range **p = &f->busy;
    while (*p != range)
        p = &(*p)->next;
    *p = range->next;
    pthread_cond_broadcast(&f->range_free);
}

/* ------------------------------------------------------------------ read */

ssize_t dr_aligned_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    if (fits(off, len, f->read_align) && buffer_fits(f, buf))
        return f->ops->pread(f, buf, off, len);
    size_t room, done = 0;
    CLEANUP_FREE uint8_t *bounce = bounce_new(off, len, f->read_align, &room);
    if (!bounce)
        return -ENOMEM;
    while (done < len) {
        uint64_t at = off + done, from = dr_round_down(at, unit(f->read_align));
        uint64_t want = dr_min(dr_round_up(off + len, unit(f->read_align)) - from, room);
        ssize_t got = f->ops->pread(f, bounce, from, (size_t)want);
        if (got < 0)
            return got;
        if (from + (uint64_t)got <= at)
            break; /* the end of the file */
        size_t n = (size_t)dr_min(from + (uint64_t)got - at, len - done);
        memcpy((uint8_t *)buf + done, bounce + (at - from), n);
        done += n;
        if ((uint64_t)got < want)
            break;
    }
    return (ssize_t)done;
}

/* ------------------------------------------------------------------ write */

/* The next len bytes of the buffers; NULL = zeros. */
static void take_bytes(struct iovec **iov, uint8_t *to, size_t len)
{
    if (!iov) {
        memset(to, 0, len);
        return;
    }
    while (len) {
        size_t n = dr_min((*iov)->iov_len, len);
        if (n) {
            memcpy(to, (*iov)->iov_base, n);
            (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + n;
        }
        (*iov)->iov_len -= n;
        to += n;
        len -= n;
        if ((*iov)->iov_len == 0 && len)
            (*iov)++;
    }
}

static int write_now(struct dr_file *f, struct iovec *iov, int n, uint64_t off, bool *durable)
{
    int r = *durable && f->ops->pwritev_durable ? f->ops->pwritev_durable(f, iov, n, off) : 1;
    if (r <= 0)
        return r;
    /* 1 from the operation: written, but not durable. */
    bool written = *durable && f->ops->pwritev_durable;
    *durable = false;
    return written ? 0 : f->ops->pwritev(f, iov, n, off);
}

/* The block at from as the file has it; zeros past the end. */
static int read_block(struct dr_file *f, uint8_t *block, uint64_t from)
{
    size_t len = f->write_align;
    ssize_t got = dr_aligned_pread(f, block, from, len);
    if (got < 0)
        return (int)got;
    memset(block + got, 0, len - (size_t)got);
    return 0;
}

/* Write [off, end), which with the blocks around it has room in bounce. */
static int write_through(struct dr_file *f, uint8_t *bounce, struct iovec **iov, uint64_t off,
                         uint64_t end, bool *durable)
{
    uint64_t align = unit(f->write_align), size = dr_file_size(f);
    uint64_t from = dr_round_down(off, align), to = dr_round_up(end, align), last = to - align;
    int r = 0;
    if (from < off || (end < to && last == from))
        r = read_block(f, bounce, from);
    if (r == 0 && end < to && last > from)
        r = read_block(f, bounce + (last - from), last);
    if (r < 0)
        return r;
    take_bytes(iov, bounce + (off - from), (size_t)(end - off));
    if (to > size)
        to = dr_max(end, size); /* no block past the end of the file */
    struct iovec one = {.iov_base = bounce, .iov_len = (size_t)(to - from)};
    r = write_now(f, &one, 1, from, durable);
    if (r == 0)
        dr_file_grow_size(f, end); /* before the next writer may look at the end */
    return r;
}

/* iov NULL = zeros. The blocks are locked. */
static int write_bounced(struct dr_file *f, struct iovec *iov, uint64_t off, uint64_t len,
                         bool *durable)
{
    size_t room;
    uint64_t end = off + len;
    int r = 0;
    CLEANUP_FREE uint8_t *bounce = bounce_new(off, len, f->write_align, &room);
    if (!bounce)
        return -ENOMEM;
    while (off < end && r == 0) {
        uint64_t from = dr_round_down(off, unit(f->write_align));
        uint64_t next = dr_min(end, from + room);
        r = write_through(f, bounce, iov ? &iov : NULL, off, next, durable);
        off = next;
    }
    return r;
}

int dr_aligned_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off, uint64_t len,
                       bool *durable)
{
    struct dr_busy_range range;
    int r;
    dr_aligned_begin(f, off, len, &range);
    if (fits(off, len, f->write_align) && iov_fits(f, iov, n))
        r = write_now(f, iov, n, off, durable);
    else
        r = write_bounced(f, iov, off, len, durable);
    if (r == 0)
        dr_file_grow_size(f, off + len);
    dr_aligned_end(f, &range);
    return r;
}

/* ------------------------------------------------------------------ zero */

/* Whole blocks by the container; what the range has of other blocks is written. The end of the
 * range may be the new end of the file. */
static int zero_locked(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    uint64_t align = unit(f->write_align), end = off + len;
    uint64_t first = dr_round_up(off, align);
    uint64_t last = end >= dr_file_size(f) ? end : dr_round_down(end, align);
    bool durable = false;
    if (first >= last)
        return write_bounced(f, NULL, off, len, &durable);
    int r = f->ops->zero(f, first, last - first, flags);
    if (r == 0)
        dr_file_grow_size(f, last);
    if (r == 0 && off < first)
        r = write_bounced(f, NULL, off, first - off, &durable);
    if (r == 0 && last < end)
        r = write_bounced(f, NULL, last, end - last, &durable);
    return r;
}

int dr_aligned_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    struct dr_busy_range range;
    if (!f->ops->zero)
        return -ENOTSUP;
    if (unit(f->write_align) == 1)
        return f->ops->zero(f, off, len, flags);
    dr_aligned_begin(f, off, len, &range);
    int r = zero_locked(f, off, len, flags);
    dr_aligned_end(f, &range);
    return r;
}
