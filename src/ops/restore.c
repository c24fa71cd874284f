/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* restore: make a disk hold what an image, mostly a backup, shows. Both are walked side by side;
 * what is equal, or zeros on both sides, stays as it is. */
#include "base/cleanup.h"
#include "drover/backup.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

struct restore {
    struct dr_pair_walk pair; /* a = what is restored, b = what the disk holds */
    struct dr_chain *dst;
    uint64_t step;
    _Atomic uint64_t written;
};

static int restore_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    return dr_pair_next(&((struct restore *)user)->pair, item, err);
}

static int restore_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                        struct dr_error *err)
{
    return dr_pair_read(&((struct restore *)user)->pair, item, buf, err);
}

static int restore_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                        struct dr_error *err)
{
    struct restore *s = user;
    int r = 0;
    uint64_t at = dr_pair_differs(item, buf, 0, s->step);
    while (at < item->len && r == 0) {
        uint64_t n = dr_min(s->step, item->len - at);
        if (item->kind == DR_ITEM_READ_B || dr_is_zero(buf[0] + at, (size_t)n))
            r = dr_chain_zero(s->dst, 0, item->off + at, n, DR_MAY_UNMAP, err);
        else
            r = dr_chain_write(s->dst, 0, buf[0] + at, item->off + at, (size_t)n, err);
        atomic_fetch_add(&s->written, n);
        at = dr_pair_differs(item, buf, at + n, s->step);
    }
    return r;
}

static int write_difference(struct dr_disk *from, struct dr_disk *to, struct dr_job *job,
                            uint64_t *written, struct dr_error *err)
{
    struct restore s = {.dst = to->chain};
    uint64_t size = dr_min(dr_size(from), dr_size(to));
    s.step = dr_stock_block(s.dst, 0, DR_CONVERT_SPARSE_DEFAULT);
    s.pair.size = size;
    dr_walk_init(&s.pair.a, from->chain, 0, from->chain->n, size);
    dr_walk_init(&s.pair.b, s.dst, 0, s.dst->n, size);
    const struct dr_copy_policy policy = {
        .user = &s,
        .next = restore_next,
        .work = restore_work,
        .emit = restore_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(from->chain, s.dst),
        .total = size,
    };
    int r = dr_copy_run(&policy, job, err);
    *written = atomic_load(&s.written);
    return r;
}

/* Does the last sector of what is restored hold zeros from byte `size` on? */
static bool ends_with_zeros(struct dr_disk *from, uint64_t size)
{
    uint8_t end[512];
    size_t len = (size_t)(dr_size(from) - size);
    return len < sizeof(end) && dr_pread(from, end, size, len, NULL) == 0 && dr_is_zero(end, len);
}

/* The image of a backup may count in sectors where its disk did not: the side file has the disk's
 * size, and a raw disk can have it, too. */
static uint64_t size_of_disk(struct dr_fs *fs, struct dr_disk *from, const struct dr_disk *to)
{
    CLEANUP_FREE char *side = dr_sums_path(from->chain->images[0]->path);
    uint64_t size, whole = dr_size(from);
    const struct dr_image *top = to->chain->images[0];
    bool exact = (top->fmt->flags & DR_FORMAT_NO_PROBE) && !top->files[0]->block_device;
    if (exact && side && dr_sums_load_size(fs, side, &size, NULL) == 0 && size < whole &&
        dr_sums_fits(size, whole) && ends_with_zeros(from, size))
        return size;
    return whole;
}

/* The disk shall have the size of what is restored. */
static int fit(struct dr_fs *fs, struct dr_disk *from, struct dr_disk *to, bool shrink,
               struct dr_error *err)
{
    uint64_t want = size_of_disk(fs, from, to), have = dr_size(to);
    if (want < have && !shrink)
        return dr_fail(
            err, EINVAL,
            "%s: has %llu bytes, and %s has %llu: restoring would make it smaller, which "
            "must be asked for (--shrink)",
            dr_image_path(to, 0), (unsigned long long)have, dr_image_path(from, 0),
            (unsigned long long)want);
    return want == have ? 0 : dr_truncate(to, want, err);
}

/* A disk must not be written over with what stands on it. */
static int refuse_own_source(struct dr_fs *fs, struct dr_disk *from, const char *disk,
                             struct dr_error *err)
{
    if (!dr_ops_reads(fs, from->chain, disk))
        return 0;
    return dr_fail(err, EBUSY, "%s: belongs to what is restored: it must be another file", disk);
}

static int refuse_children(struct dr_disk *disk, const struct dr_open_options *open,
                           struct dr_error *err)
{
    struct dr_image *image = disk->chain->images[0];
    CLEANUP_FREE char *names = NULL;
    int r = dr_ops_children(image, open, &names, err);
    if (r < 0 || !*names)
        return r;
    return dr_fail(err, EBUSY,
                   "%s: is the parent of %s, which would read something else afterwards",
                   image->path, names);
}

int dr_restore_fs(struct dr_fs *fs, const char *source, const char *disk,
                  const struct dr_restore_options *options, struct dr_job *job, uint64_t *written,
                  struct dr_error *err)
{
    static const struct dr_restore_options defaults;
    const struct dr_restore_options *o = options ? options : &defaults;
    CLEANUP_DISK struct dr_disk *from = NULL, *to = NULL;
    struct dr_open_options open = o->open;
    uint64_t bytes = 0;
    open.flags |= DR_OPEN_RDWR;
    int r = dr_open_fs(fs, source, &o->source, &from, err);
    if (r == 0)
        r = refuse_own_source(fs, from, disk, err);
    if (r == 0)
        r = dr_open_fs(fs, disk, &open, &to, err);
    if (r == 0) /* overlays on it would read something else */
        r = refuse_children(to, &o->open, err);
    if (r == 0)
        r = fit(fs, from, to, o->shrink, err);
    if (r == 0)
        r = write_difference(from, to, job, &bytes, err);
    if (r == 0)
        r = dr_ops_close(&to, err);
    if (r == 0 && written)
        *written = bytes;
    return r;
}

int dr_restore(const char *source, const char *disk, const struct dr_restore_options *options,
               struct dr_job *job, uint64_t *written, struct dr_error *err)
{
    DR_REQUIRE(source, err);
    DR_REQUIRE(disk, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job, dr_restore_fs(dr_fs_posix(), source, disk, options, job, written, err));
}
