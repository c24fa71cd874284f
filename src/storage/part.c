/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/part.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

/* All that a part has of its own is in struct dr_file: under, under_at and size. */

static void part_close(struct dr_file *f)
{
    dr_file_unclaim(f->under, &f->claim);
    free(f->path);
    free(f);
}

/* A file that ends inside its last sector reads as if that were filled with zeros. */
static ssize_t part_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    uint64_t size = dr_file_size(f);
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    int r = dr_file_pread_short(f->under, buf, f->under_at + off, len, NULL, NULL);
    return r < 0 ? r : (ssize_t)len;
}

/* Nothing is ever written outside of the part: what may be behind it is somebody else's. */
static int check_inside(struct dr_file *f, uint64_t off, uint64_t len)
{
    uint64_t size = dr_file_size(f);
    return off <= size && len <= size - off ? 0 : -ENOSPC;
}

static uint64_t length_of(const struct iovec *iov, int n)
{
    uint64_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    return len;
}

static int part_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    int r = check_inside(f, off, length_of(iov, n));
    return r < 0 ? r : dr_file_pwritev(f->under, iov, n, f->under_at + off, NULL);
}

static int part_pwritev_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    int r = check_inside(f, off, length_of(iov, n));
    return r < 0 ? r : dr_file_pwritev_durable(f->under, iov, n, f->under_at + off, NULL);
}

static int part_extent(struct dr_file *f, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                       uint64_t *run)
{
    return dr_file_extent(f->under, f->under_at + off, len, kind, run, NULL);
}

static int part_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    int r = check_inside(f, off, len);
    return r < 0 ? r : dr_file_zero(f->under, f->under_at + off, len, flags, NULL);
}

static int part_truncate(struct dr_file *f, uint64_t size)
{
    if (f->part == DR_PART_OF_SIZE || f->under->block_device)
        return size == dr_file_size(f) ? 0 : -ENOTSUP;
    return size > INT64_MAX - f->under_at ? -EFBIG
                                          : dr_file_truncate(f->under, f->under_at + size, NULL);
}

static int part_flush(struct dr_file *f)
{
    return dr_file_flush(f->under, NULL);
}

static int part_upgrade(struct dr_file *f, struct dr_error *err)
{
    return dr_file_upgrade_claim(f->under, &f->claim, err);
}

static int part_downgrade(struct dr_file *f, struct dr_error *err)
{
    return dr_file_downgrade_claim(f->under, &f->claim, err);
}

static void part_advise(struct dr_file *f, bool random)
{
    dr_file_advise(f->under, random);
}

static uint64_t part_mtime(struct dr_file *f)
{
    return dr_file_mtime(f->under);
}

static int part_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp)
{
    int r = dr_file_stamp(f->under, settle, stamp, NULL);
    stamp->size = dr_file_size(f);
    return r;
}

/* As QEMU's tools: the space of the whole file. */
static int part_usage(struct dr_file *f, uint64_t *bytes)
{
    return dr_file_usage(f->under, bytes, NULL);
}

static const char *part_reason(struct dr_file *f, int r)
{
    return f->under->ops->reason ? f->under->ops->reason(f->under, r) : NULL;
}

static const struct dr_file_ops part_ops = {
    .name = "part",
    .close = part_close,
    .pread = part_pread,
    .pwritev = part_pwritev,
    .pwritev_durable = part_pwritev_durable,
    .extent = part_extent,
    .zero = part_zero,
    .truncate = part_truncate,
    .flush = part_flush,
    .upgrade = part_upgrade,
    .downgrade = part_downgrade,
    .advise = part_advise,
    .mtime = part_mtime,
    .stamp = part_stamp,
    .usage = part_usage,
    .reason = part_reason,
};

/* ------------------------------------------------------------------ open */

/* The words are QEMU's. */
static int check_bounds(const struct dr_part *part, const char *name, uint64_t file,
                        struct dr_error *err)
{
    uint64_t end = file <= INT64_MAX - 511 ? dr_round_up(file, 512) : file;
    if (part->offset > end)
        return dr_fail(err, EINVAL,
                       "%s: Offset (%llu) cannot be greater than size of the containing file "
                       "(%llu)",
                       name, (unsigned long long)part->offset, (unsigned long long)file);
    if (part->has_size && part->size > end - part->offset)
        return dr_fail(err, EINVAL,
                       "%s: The sum of offset (%llu) and size (%llu) has to be smaller or equal to "
                       "the actual size of the containing file (%llu)",
                       name, (unsigned long long)part->offset, (unsigned long long)part->size,
                       (unsigned long long)file);
    if (part->has_size && part->size % 512 != 0)
        return dr_fail(err, EINVAL, "%s: Specified size is not multiple of 512", name);
    return 0;
}

/* The size of what the name stands for, in a file of this size. */
static int measure(const char *name, uint64_t file, uint64_t *size, struct dr_error *err)
{
    DR_CLEANUP_PART struct dr_part part = {0};
    *size = file;
    int r = dr_part_is(name) ? dr_part_parse(name, &part, err) : 0;
    if (r == 0 && part.below)
        r = measure(part.below, file, size, err);
    if (r < 0 || !part.is_range)
        return r;
    r = check_bounds(&part, name, *size, err);
    *size = part.has_size ? part.size : *size - dr_min(*size, part.offset);
    return r;
}

/* What a device writes all or nothing begins at multiples of itself. */
static unsigned atomic_at(uint64_t off, unsigned atomic_size)
{
    while (atomic_size > 1 && off % atomic_size != 0)
        atomic_size /= 2;
    return atomic_size;
}

static int open_under(struct dr_file *f, const char *bottom, unsigned flags, struct dr_error *err)
{
    uint64_t size;
    int r = dr_file_open_claim(f->fs, bottom, flags, &f->claim, &f->under, err);
    if (r < 0)
        return r;
    f->id = f->under->id;
    f->atomic_size = atomic_at(f->under_at, f->under->atomic_size);
    f->depth = f->under->depth;
    r = measure(f->path, dr_file_size(f->under), &size, err);
    f->size = size;
    if (r < 0)
        dr_file_unclaim(f->under, &f->claim);
    return r;
}

static struct dr_file *new_part(struct dr_fs *fs, const char *name, uint64_t from, uint64_t to)
{
    struct dr_file *f = calloc(1, sizeof(*f));
    char *path = strdup(name);
    if (!f || !path) {
        free(f);
        free(path);
        return NULL;
    }
    *f = (struct dr_file){
        .ops = &part_ops,
        .fs = fs,
        .path = path,
        .under_at = from,
        .claim = {.from = from, .to = to},
        .part = to == UINT64_MAX ? DR_PART_TO_END : DR_PART_OF_SIZE,
        .block_device = true, /* it has the room that it has, and nothing stands beside it */
    };
    return f;
}

int dr_part_refuse(const char *name, const char *what, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP, "%s: is a part of a file, which cannot be %s by itself", name,
                   what);
}

int dr_part_open(struct dr_fs *fs, const char *name, unsigned flags, struct dr_file **file,
                 struct dr_error *err)
{
    DR_CLEANUP_PART struct dr_part part = {0};
    int r = dr_part_parse(name, &part, err);
    if (r < 0)
        return r;
    if (part.read_only && (flags & (DR_FILE_RDWR | DR_FILE_CREATE)))
        return dr_fail(err, EROFS, "%s: Block node is read-only", name);
    if (!part.is_range)
        return fs->ops->open(fs, part.below, flags, file, err);
    if ((flags & DR_FILE_CREATE) && !(flags & DR_FILE_TRUNCATE))
        return dr_part_refuse(name, "created", err);
    CLEANUP_FREE char *bottom = NULL;
    uint64_t from, to;
    r = dr_part_range(name, &bottom, &from, &to, err);
    if (r < 0)
        return r;
    struct dr_file *f = new_part(fs, name, from, to);
    if (!f)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    unsigned of_part = DR_FILE_CREATE | DR_FILE_TRUNCATE | DR_FILE_PRIVATE | DR_FILE_NOCOW;
    r = open_under(f, bottom, flags & ~of_part, err);
    if (r < 0) {
        free(f->path);
        free(f);
        return r;
    }
    if (from > 0 || to < UINT64_MAX) {
        f->id.from = from;
        f->id.to = to;
    }
    *file = f;
    return 0;
}
