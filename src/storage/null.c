/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* QEMU's drivers null-co and null-aio: a disk of any size without a medium, to measure all that is
 * above it. It reads as zeros, keeps nothing that is written, and answers each request after the
 * latency that it was given. Without read-zeroes its zeros count as data, so a copy reads all of
 * them, as that of a full disk would. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/error.h"
#include "storage/remote.h"

struct null_file {
    struct dr_file base;
    uint64_t latency;
    bool zeroes;
};

static void answer_later(const struct dr_file *base)
{
    uint64_t latency = ((const struct null_file *)base)->latency;
    struct timespec rest = {.tv_sec = (time_t)(latency / 1000000000u),
                            .tv_nsec = (long)(latency % 1000000000u)};
    while (latency && nanosleep(&rest, &rest) < 0 && errno == EINTR)
        ;
}

static void null_close(struct dr_file *base)
{
    free(base->path);
    free(base);
}

static ssize_t null_pread(struct dr_file *base, void *buf, uint64_t off, size_t len)
{
    uint64_t size = dr_file_size(base);
    size_t n = off >= size ? 0 : size - off < len ? (size_t)(size - off) : len;
    memset(buf, 0, n);
    answer_later(base);
    return (ssize_t)n;
}

static int null_pwritev(struct dr_file *base, struct iovec *iov, int n, uint64_t off)
{
    uint64_t size = dr_file_size(base);
    for (int i = 0; i < n; i++) {
        if (off > size || iov[i].iov_len > size - off)
            return -ENOSPC;
        off += iov[i].iov_len;
    }
    answer_later(base);
    return 0;
}

static int null_zero(struct dr_file *base, uint64_t off, uint64_t len, unsigned flags)
{
    uint64_t size = dr_file_size(base);
    (void)flags;
    if (off > size || len > size - off)
        return -ENOSPC;
    answer_later(base);
    return 0;
}

static int null_extent(struct dr_file *base, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                       uint64_t *run)
{
    (void)off;
    *kind = ((struct null_file *)base)->zeroes ? DR_FILE_HOLE : DR_FILE_DATA;
    *run = len;
    return 0;
}

static int null_truncate(struct dr_file *base, uint64_t size)
{
    return size == dr_file_size(base) ? 0 : -ENOTSUP;
}

static int null_flush(struct dr_file *base)
{
    answer_later(base);
    return 0;
}

static int null_usage(struct dr_file *base, uint64_t *bytes)
{
    (void)base;
    *bytes = 0;
    return 0;
}

static const struct dr_file_ops null_ops = {
    .name = "null",
    .close = null_close,
    .pread = null_pread,
    .pwritev = null_pwritev,
    .extent = null_extent,
    .zero = null_zero,
    .truncate = null_truncate,
    .flush = null_flush,
    .usage = null_usage,
};

int dr_null_open(const struct dr_remote *remote, const char *name, struct dr_file **file,
                 struct dr_error *err)
{
    struct null_file *f = calloc(1, sizeof(*f));
    if (!f)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    f->base.ops = &null_ops;
    f->base.size = remote->size;
    f->base.atomic_size = 512;
    f->base.block_device = true;
    f->latency = remote->latency;
    f->zeroes = remote->zeroes;
    *file = &f->base;
    return 0;
}
