/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* convert: copy one disk, or several one after another, into one. A new target is written under
 * another name and gets its own when it is complete. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "ops/pipes.h"
#include "ops/sequential.h"
#include "storage/unpacked.h"

#define SECTOR 512

struct convert {
    struct dr_fs *fs;
    const struct dr_convert_options *o;
    struct dr_job *job;
    struct dr_disk **sources;
    size_t n;
    uint64_t total;
    const char *const *names; /* of the sources */
    const char *target;       /* as given */
    struct dr_disk *backing;  /* -B */
    char *backing_path;
    struct dr_disk *out;
    struct dr_new_image fresh; /* when it is new */
    bool is_new;
    bool in_order; /* the target is written from front to back */
    struct dr_lost lost;
    struct dr_sums sums;    /* of what is written; no table: they are not taken while it is */
    struct dr_piped piped;  /* the source, if it comes from a descriptor */
    struct dr_file *outlet; /* the target, if it is one */
};

/* ------------------------------------------------------------------ sources */

/* What is copied of a source: [*from, *to). */
static void part_of(const struct convert *c, size_t i, uint64_t *from, uint64_t *to)
{
    uint64_t size = dr_size(c->sources[i]);
    *from = c->o->has_range ? dr_min(c->o->range_from, size) : 0;
    *to = c->o->has_range ? dr_max(*from, dr_min(c->o->range_to, size)) : size;
}

static uint64_t length_of(const struct convert *c, size_t i)
{
    uint64_t from, to;
    part_of(c, i, &from, &to);
    return to - from;
}

/* What was unpacked in front of damage is copied. Of a raw disk the offsets are known that may be
 * wrong; in other formats a wrong byte may be one of the tables. */
static void tell_doubtful(struct convert *c, const struct dr_disk *disk)
{
    for (size_t i = 0; i < disk->chain->n; i++) {
        const struct dr_image *image = disk->chain->images[i];
        const struct dr_unpack_damage *doubt = image->doubt;
        if (!doubt)
            continue;
        bool raw = image->fmt->flags & DR_FORMAT_NO_PROBE;
        uint64_t from = raw ? doubt->vouched : 0, to = raw ? doubt->came : dr_size(disk);
        dr_lost_end(&c->lost, image->path, doubt->came, doubt->why.text, c->job);
        if (from < to && doubt->vouched < doubt->came)
            dr_lost_doubt(&c->lost, image->path, from, to, c->job);
    }
}

/* After the copy: what was read of packed files although it is damaged, or may be displaced. Of a
 * raw disk that is just this; in other images it may be of anything. */
static void tell_pieces(struct convert *c, size_t source)
{
    const struct dr_chain *chain = c->sources[source]->chain;
    uint64_t from, to;
    for (size_t i = 0; i < chain->n; i++) {
        struct dr_file *file = chain->images[i]->n_files ? chain->images[i]->files[0] : NULL;
        struct dr_source_range range;
        if (!(chain->images[i]->fmt->flags & DR_FORMAT_NO_PROBE)) {
            if (dr_source_doubtful(file, 0, UINT64_MAX, &range))
                dr_lost_doubt(&c->lost, chain->images[i]->path, 0, chain->images[i]->size, c->job);
            continue;
        }
        part_of(c, source, &from, &to);
        for (; dr_source_doubtful(file, from, to, &range); from = range.to)
            dr_lost_doubt(&c->lost, chain->images[i]->path, range.from, range.to, c->job);
    }
}

static int open_sources(struct convert *c, const char *const *names, size_t n, struct dr_error *err)
{
    c->sources = calloc(n, sizeof(struct dr_disk *));
    if (!c->sources)
        return dr_fail(err, ENOMEM, "out of memory for %zu sources", n);
    for (; c->n < n; c->n++) {
        const struct dr_open_options *asked = c->o->each ? c->o->each[c->n] : c->o->source;
        struct dr_open_options open = asked ? *asked : (struct dr_open_options){0};
        open.flags |= c->o->salvage ? DR_OPEN_SALVAGE : 0u;
        int r = dr_open_fs(c->fs, names[c->n], &open, &c->sources[c->n], err);
        if (r < 0)
            return r;
        tell_doubtful(c, c->sources[c->n]);
        if (c->o->has_range && c->o->range_from > dr_size(c->sources[c->n]))
            dr_job_message(c->job, "%s: cannot skip to specified offset", names[c->n]);
        /* the next one begins with a sector */
        if (dr_add_overflow(c->total, (SECTOR - c->total % SECTOR) % SECTOR, &c->total) ||
            dr_add_overflow(c->total, length_of(c, c->n), &c->total) || c->total > INT64_MAX)
            return dr_fail(err, EFBIG, "%s: the sources together are too large", names[c->n]);
    }
    return 0;
}

/* ------------------------------------------------------------------ the target */

static unsigned target_flags(const struct convert *c)
{
    return DR_OPEN_RDWR | c->o->target_flags | (c->o->unsafe_target ? DR_OPEN_NO_FLUSH : 0u);
}

static const char *backing_format(const struct convert *c)
{
    if (!c->backing || c->o->backing_format)
        return c->o->backing_format;
    return dr_image_format(c->backing, 0);
}

static int open_out(struct convert *c, const char *path, const char *format, unsigned flags,
                    struct dr_error *err)
{
    struct dr_open_options open = {
        .format = format,
        .flags = target_flags(c) | flags,
        .backing = c->backing_path,
        .backing_format = c->backing_path ? backing_format(c) : NULL,
        .key_secret = dr_ops_key_secret(c->o->pairs, c->o->n_pairs),
    };
    return dr_open_fs(c->fs, path, &open, &c->out, err);
}

static int open_existing(struct convert *c, struct dr_error *err)
{
    int r = open_out(c, c->target, c->o->out_format, 0, err);
    if (r == 0 && dr_size(c->out) < c->total)
        r = dr_fail(err, ENOSPC,
                    "%s: output file is smaller than input file: it holds %llu bytes, the source "
                    "has %llu",
                    c->target, (unsigned long long)dr_size(c->out), (unsigned long long)c->total);
    return r;
}

static int open_backing(struct convert *c, struct dr_error *err)
{
    struct dr_open_options open = {
        .flags = c->o->target_flags & (DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH),
    };
    const struct dr_format *fmt = dr_ops_format(c->o->out_format, DR_FORMAT_BACKING, err);
    if (!fmt)
        return err ? -err->errnum : -EINVAL;
    c->backing_path = dr_ops_resolve(c->target, c->o->backing);
    if (!c->backing_path)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->target);
    int r = dr_ops_parent_format(c->fs, fmt, c->target, c->o->backing, c->o->backing_format,
                                 &open.format, err);
    if (r == 0)
        r = dr_gate_check(c->fs, c->target, c->backing_path, &open, err);
    if (r == 0)
        r = dr_open_fs(c->fs, c->backing_path, &open, &c->backing, err);
    return r < 0 ? r : dr_chain_check_length(c->target, c->backing->chain->n + 1, err);
}

static int create_out(struct convert *c, const struct dr_format *fmt, struct dr_error *err)
{
    const struct dr_create_params what = {
        .size = c->total,
        .backing = c->backing ? c->backing->chain->images[0] : NULL,
        .backing_name = c->o->backing,
        .backing_format = backing_format(c),
        .stop = dr_job_stop_flag(c->job),
        .all_new = true,
        .force = c->o->force,
    };
    int r = dr_new_create(&c->fresh, fmt, &what, c->o->pairs, c->o->n_pairs, target_flags(c), err);
    if (r == 0)
        r = dr_new_check_places(&c->fresh, err);
    if (r < 0)
        return r;
    /* its names will be right when it has moved; the backing was let through by its gate */
    return open_out(c, c->fresh.path, fmt->name, DR_OPEN_UNCHANGED, err);
}

static int refuse_own_source(const struct convert *c, struct dr_error *err)
{
    for (size_t i = 0; i < c->n; i++)
        if (dr_ops_reads(c->fs, c->sources[i]->chain, c->target))
            return dr_fail(err, EBUSY,
                           "%s: is read from, as a source or its parent: the target must be "
                           "another file",
                           c->target);
    if (c->backing && dr_ops_reads(c->fs, c->backing->chain, c->target))
        return dr_fail(err, ELOOP, "%s: cannot be its own backing file", c->target);
    return 0;
}

static int make_target(struct convert *c, struct dr_error *err)
{
    int r = refuse_own_source(c, err);
    if (r < 0)
        return r;
    if (c->o->no_create)
        return open_existing(c, err);
    unsigned need = DR_FORMAT_CREATE | (c->o->backing ? DR_FORMAT_BACKING : 0u);
    const struct dr_format *fmt = dr_ops_format(c->o->out_format, need, err);
    if (!fmt)
        return err ? -err->errnum : -EINVAL;
    if ((fmt->flags & DR_FORMAT_NO_PROBE) && dr_ops_is_device(c->fs, c->target))
        return open_existing(c, err);
    r = dr_new_begin(&c->fresh, c->fs, c->target, false, target_flags(c), err);
    if (r < 0)
        return r;
    c->is_new = true;
    return create_out(c, fmt, err);
}

/* ------------------------------------------------------------------ what differs from -B */

struct diff {
    struct dr_pair_walk pair; /* a = source, b = what the target shows already */
    struct dr_chain *dst;
    uint64_t step;
};

static int diff_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    return dr_pair_next(&((struct diff *)user)->pair, item, err);
}

static int diff_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    return dr_pair_read(&((struct diff *)user)->pair, item, buf, err);
}

static int diff_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    const struct diff *d = user;
    int r = 0;
    uint64_t at = dr_pair_differs(item, buf, 0, d->step);
    while (at < item->len && r == 0) {
        uint64_t n = dr_min(d->step, item->len - at);
        if (item->kind == DR_ITEM_READ_B || dr_is_zero(buf[0] + at, (size_t)n))
            r = dr_chain_zero(d->dst, 0, item->off + at, n, DR_MAY_UNMAP, err);
        else
            r = dr_chain_write(d->dst, 0, buf[0] + at, item->off + at, (size_t)n, err);
        at = dr_pair_differs(item, buf, at + n, d->step);
    }
    return r;
}

static int copy_difference(struct convert *c, struct dr_chain *src, struct dr_chain *dst,
                           struct dr_error *err)
{
    struct diff d = {.dst = dst, .step = dr_stock_block(dst, 0, DR_CONVERT_SPARSE_DEFAULT)};
    d.pair.size = c->total;
    dr_walk_init(&d.pair.a, src, 0, src->n, c->total);
    dr_walk_init(&d.pair.b, c->backing->chain, 0, c->backing->chain->n, c->total);
    struct dr_copy_policy policy = {
        .user = &d,
        .next = diff_next,
        .work = diff_work,
        .emit = diff_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(src, dst),
        .total = c->total,
    };
    return dr_copy_run(&policy, c->job, err);
}

/* Index of the source's layer that is also the new backing file; n if none is. */
static size_t member_of(const struct dr_chain *chain, const struct dr_image *image)
{
    size_t i = 0;
    while (i < chain->n && !dr_same_id(dr_image_id(chain->images[i]), dr_image_id(image)))
        i++;
    return i;
}

/* ------------------------------------------------------------------ the checksum */

/* Do all bytes of the target pass through the transfer, at the offsets that they have there? */
static bool sums_on_the_way(const struct convert *c)
{
    return c->n == 1 && !c->o->has_range && !c->backing && !c->o->compress && !c->o->offload &&
           c->o->sparse_size != 0 && dr_size(c->out) == dr_size(c->sources[0]);
}

static int begin_sums(struct convert *c, struct dr_error *err)
{
    bool pipes = c->o->from_fd || c->o->to_fd;
    if (!c->o->digest || c->piped.ops || (!pipes && !sums_on_the_way(c)))
        return 0;
    uint64_t size = c->o->from_fd ? 0
                    : c->o->to_fd ? dr_round_up(c->total, SECTOR)
                                  : dr_size(c->out);
    c->piped.sums = &c->sums;
    return dr_sums_begin_as(&c->sums, c->o->digest_kind, size, err);
}

static int finish_sums(struct convert *c, struct dr_error *err)
{
    int r = 0;
    if (!c->o->digest)
        return 0;
    if (!c->sums.table)
        r = dr_sums_of_disk(&c->sums, c->o->digest_kind, c->out, NULL, err);
    return r < 0 ? r : dr_sums_digest_any(&c->sums, c->o->digest, err);
}

/* ------------------------------------------------------------------ copying */

/* Is the target new, and reads as zeros? */
static bool is_empty(const struct convert *c)
{
    return c->is_new && !(c->out->chain->images[0]->fmt->flags & DR_FORMAT_NOISE);
}

static void transfer_init(struct convert *c, struct dr_transfer *t, size_t source, uint64_t shift)
{
    struct dr_chain *src = c->sources[source]->chain, *dst = c->out->chain;
    uint64_t from, to;
    part_of(c, source, &from, &to);
    *t = (struct dr_transfer){
        .dst = dst,
        .shift = shift - from, /* modulo 2^64 */
        .from = from,
        .sparse = c->o->sparse_size,
        .all = c->o->sparse_size == 0 && !c->backing,
        .hole_is_zero = !c->backing,
        .write_zeros = c->backing || (!is_empty(c) && !c->o->target_is_zero),
        .zero_flags = DR_MAY_UNMAP,
        .lost = c->o->salvage ? &c->lost : NULL,
        .to_file = c->o->offload || c->o->sparse_size == 0,
        .job = c->job,
        .sums = c->sums.table ? &c->sums : NULL,
    };
    uint64_t lowest = c->o->sparse_size ? c->o->sparse_size : DR_CONVERT_SPARSE_DEFAULT;
    lowest = dr_min(dr_max(lowest, 512), DR_CONVERT_SPARSE_DEFAULT);
    t->block = dr_stock_block(dst, 0, lowest);
    dr_walk_init(&t->walk, src, 0, src->n, to);
}

static int copy_above(struct convert *c, size_t last, struct dr_error *err)
{
    struct dr_transfer t;
    transfer_init(c, &t, 0, 0);
    t.walk.last = last;
    return c->o->compress ? dr_compress_run(&t, NULL, c->total, c->job, err)
                          : dr_transfer_run(&t, c->total, c->job, err);
}

/* Everything is read and compared: what is kept is whole units anyway. */
static int compress_difference(struct convert *c, struct dr_error *err)
{
    struct dr_transfer t;
    transfer_init(c, &t, 0, 0);
    t.hole_is_zero = true;
    return dr_compress_run(&t, c->backing->chain, c->total, c->job, err);
}

/* Disks are whole sectors, so pad the last, partial sector with zeros in the target. */
static int fill_sector(struct convert *c, uint64_t end, struct dr_error *err)
{
    uint64_t to = dr_min(dr_round_up(end, SECTOR), dr_size(c->out));
    if (to <= end || (is_empty(c) && !c->backing))
        return 0;
    return dr_chain_zero(c->out->chain, 0, end, to - end, DR_MAY_UNMAP, err);
}

static int copy_with_backing(struct convert *c, struct dr_error *err)
{
    struct dr_chain *src = c->sources[0]->chain, *dst = c->out->chain;
    if (c->n > 1)
        return dr_fail(err, EINVAL, "%s: a backing file goes with one source only", c->target);
    if (!c->o->unsafe_target) { /* what is left out must be there for good */
        int r = dr_chain_harden(c->backing->chain, 0, err);
        if (r < 0)
            return r;
    }
    size_t k = member_of(src, c->backing->chain->images[0]);
    int r;
    if (k > 0 && k < src->n)
        r = copy_above(c, k, err);
    else if (c->o->compress)
        r = compress_difference(c, err);
    else
        r = copy_difference(c, src, dst, err);
    return r < 0 ? r : fill_sector(c, c->total, err);
}

static int copy_plain(struct convert *c, struct dr_error *err)
{
    uint64_t end = 0; /* of what the sources up to here make in the target */
    int r = 0;
    for (size_t i = 0; i < c->n && r == 0; i++) {
        struct dr_transfer t;
        uint64_t len = length_of(c, i);
        transfer_init(c, &t, i, end);
        c->lost.disk = c->o->salvage ? c->names[i] : NULL;
        t.before = end;
        t.after = c->total - dr_min(c->total, end + len);
        r = c->o->compress ? dr_compress_run(&t, NULL, len, c->job, err)
                           : dr_transfer_run(&t, len, c->job, err);
        dr_lost_tell(&c->lost, c->job);
        end += len;
        if (r == 0)
            r = fill_sector(c, end, err);
        end = dr_round_up(end, SECTOR);
    }
    return r;
}

/* Bytes that the target's data may take; links are followed. */
static uint64_t target_room(const struct convert *c)
{
    const struct dr_file *file = c->out->chain->images[0]->files[0];
    return c->fresh.on_device ? dr_file_size(file) : dr_ops_free_space(c->fs, c->fresh.final);
}

/* Compare the bytes to copy with the free space. When zeros are looked for, fewer bytes than
 * these may be written, so this only warns; else it refuses. */
static int check_space(struct convert *c, struct dr_error *err)
{
    uint64_t need = 0, part = 0, room;
    const char *where = c->fresh.on_device ? "device" : "file system";
    if (!c->is_new)
        return 0;
    room = target_room(c);
    if (c->total <= room)
        return 0; /* whatever is in it: no need to look */
    for (size_t i = 0; i < c->n; i++) {
        struct dr_transfer t;
        transfer_init(c, &t, i, 0);
        int r = c->o->salvage ? 0 : dr_transfer_measure(&t, &part, err);
        if (r < 0)
            return r;
        need += t.all ? length_of(c, i) : part;
    }
    if (need <= room)
        return 0;
    if (c->o->sparse_size == 0)
        return dr_fail(err, ENOSPC, "%s: needs %llu bytes, its %s has %llu free", c->target,
                       (unsigned long long)need, where, (unsigned long long)room);
    dr_job_message(c->job, "%s: may need up to %llu bytes, its %s has %llu free", c->target,
                   (unsigned long long)need, where, (unsigned long long)room);
    return 0;
}

static bool bitmaps_inside(const struct convert *c)
{
    return !c->is_new || dr_image_bitmaps_inside(c->out->chain->images[0]);
}

/* Bitmaps beside an image go with its name and its files as they are at last. */
static int copy_bitmaps_beside(struct convert *c, struct dr_error *err)
{
    int r = open_out(c, c->target, c->o->out_format, DR_OPEN_NO_BACKING, err);
    if (r == 0)
        r = dr_ops_bitmaps_copy(c->sources[0], c->out, c->job, err);
    int closed = dr_ops_close(&c->out, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* ------------------------------------------------------------------ pipes */

/* Before anything is read or made. */
static int check_pipes(const struct convert *c, size_t n, struct dr_error *err)
{
    const struct dr_convert_options *o = c->o;
    const struct dr_format *fmt = dr_format_find(o->out_format);
    if (!o->from_fd && !o->to_fd)
        return 0;
    const char *what = o->backing                    ? "a backing file"
                       : o->no_create                ? "writing over what is there"
                       : o->compress && !c->in_order ? "compressing"
                       : o->bitmaps                  ? "copying bitmaps"
                       : o->offload                  ? "copying in the kernel"
                       : o->from_fd && o->salvage    ? "salvaging"
                                                     : NULL;
    if (what)
        return dr_fail(err, ENOTSUP, "%s: %s does not go with a pipe", c->target, what);
    if (o->digest && o->to_fd && (n > 1 || o->has_range))
        return dr_fail(err, ENOTSUP, "%s: a checksum goes with one whole disk in a pipe",
                       c->target);
    if (o->from_fd && n > 1)
        return dr_fail(err, ENOTSUP, "%s: a pipe must be the only source", c->target);
    if (c->in_order && o->from_fd)
        return dr_fail(err, ENOTSUP,
                       "%s: such an image begins with the size of its disk, which a pipe does not "
                       "tell",
                       c->target);
    if (o->to_fd && fmt && !(fmt->flags & DR_FORMAT_NO_PROBE) && !c->in_order)
        return dr_fail(
            err, ENOTSUP,
            "%s: a %s image cannot be written into a pipe; only raw, qcow2, and VMDK with "
            "-o subformat=streamOptimized, can",
            c->target, fmt->name);
    if (o->to_fd && o->n_pairs > 0 && !c->in_order)
        return dr_fail(err, EINVAL, "%s: %s has no meaning in a pipe", c->target, o->pairs[0].name);
    return 0;
}

/* What comes as it is tells its size by its end only. */
static int check_growing(const struct convert *c, struct dr_error *err)
{
    const struct dr_format *fmt = dr_format_find(c->o->out_format);
    if (c->o->to_fd || !fmt || fmt->resize)
        return 0;
    return dr_fail(err, ENOTSUP,
                   "%s: %s images cannot grow, so what comes from a pipe cannot be put into one "
                   "as it comes; convert to raw or qcow2 first",
                   c->target, fmt->name);
}

static int begin_piped_image(struct convert *c, struct dr_error *err)
{
    c->total = c->piped.incoming.size;
    if (c->o->has_range || (c->o->digest && c->o->to_fd))
        return dr_fail(err, ENOTSUP, "%s: %s does not go with an image that comes from a pipe",
                       c->target, c->o->has_range ? "a range" : "a checksum");
    return 0;
}

static int open_piped(struct convert *c, const char *name, struct dr_error *err)
{
    const struct dr_open_options *open = c->o->each ? c->o->each[0] : c->o->source;
    const char *format = open ? open->format : NULL;
    struct dr_source *source;
    int r = dr_source_open_as(c->fs, name, c->o->source_fd, format != NULL, &source, err);
    if (r < 0)
        return r;
    dr_source_stop_by(source, dr_job_stop_flag(c->job));
    r = dr_piped_begin(&c->piped, source, format, err);
    if (r == 0)
        r = c->piped.ops ? begin_piped_image(c, err) : check_growing(c, err);
    if (r == 0 && c->o->has_range)
        r = dr_piped_range(&c->piped, c->o->range_from, c->o->range_to, err);
    return r;
}

/* An image that is written from front to back. */
static int run_in_order(struct convert *c, struct dr_error *err)
{
    CLEANUP_FREE struct dr_sequential_part *parts = calloc(c->n, sizeof(*parts));
    struct dr_sequential_job what = {
        .o = c->o, .parts = parts, .n = c->n, .total = c->total, .lost = &c->lost, .job = c->job};
    if (!parts)
        return dr_fail(err, ENOMEM, "out of memory for %zu sources", c->n);
    for (size_t i = 0; i < c->n; i++) {
        parts[i].disk = c->sources[i];
        part_of(c, i, &parts[i].from, &parts[i].to);
    }
    if (c->outlet) {
        const struct dr_format *fmt = dr_format_find(c->o->out_format);
        what.sums = c->sums.table ? &c->sums : NULL;
        return dr_sequential_write(c->outlet, fmt->sequential->map ? c->target : "stream.vmdk",
                                   &what, err);
    }
    int r = refuse_own_source(c, err);
    return r < 0 ? r : dr_sequential_convert(c->fs, c->target, &what, err);
}

/* Nothing is written before the sources are open. */
static int run_to_pipe(struct convert *c, struct dr_error *err)
{
    int r =
        dr_file_open_pipe(c->o->target_fd, c->target, dr_job_stop_flag(c->job), &c->outlet, err);
    if (r < 0)
        return r;
    r = begin_sums(c, err);
    if (r == 0 && c->in_order)
        r = run_in_order(c, err);
    else if (r == 0 && c->piped.ops)
        r = dr_piped_image_to_file(&c->piped, c->outlet, c->job, err);
    else if (r == 0 && c->o->from_fd)
        r = dr_piped_to_file(&c->piped, c->outlet, NULL, c->job, err);
    for (size_t i = 0; i < c->n && r == 0 && !c->in_order; i++) {
        uint64_t from, to;
        part_of(c, i, &from, &to);
        c->lost.disk = c->names[i];
        r = dr_pipe_write(c->sources[i], from, to, c->outlet, c->total,
                          c->o->salvage ? &c->lost : NULL, c->sums.table ? &c->sums : NULL, c->job,
                          err);
    }
    if (r == 0)
        r = finish_sums(c, err);
    return r < 0 ? r : dr_file_flush(c->outlet, err);
}

/* A device may hold anything. */
static int piped_image_to_disk(struct convert *c, struct dr_error *err)
{
    int r = is_empty(c) ? 0 : dr_chain_zero(c->out->chain, 0, 0, c->total, DR_MAY_UNMAP, err);
    return r < 0 ? r : dr_piped_image_to_disk(&c->piped, c->out, c->o->sparse_size, c->job, err);
}

/* ------------------------------------------------------------------ the whole */

static int run(struct convert *c, const char *const *names, size_t n, struct dr_error *err)
{
    int r = dr_sequential_wanted(c->target, c->o, &c->in_order, err);
    if (r == 0)
        r = check_pipes(c, n, err);
    if (r == 0)
        r = c->o->from_fd ? open_piped(c, names[0], err) : open_sources(c, names, n, err);
    if (r == 0 && c->o->to_fd)
        return run_to_pipe(c, err);
    if (r == 0 && c->in_order)
        return run_in_order(c, err);
    if (r == 0 && c->o->backing)
        r = open_backing(c, err);
    if (r == 0)
        r = make_target(c, err);
    if (r == 0 && c->o->bitmaps)
        r = dr_ops_bitmaps_check(c->sources[0], c->out, c->o, err);
    if (r == 0 && c->o->compress)
        r = dr_compress_check(c->out->chain->images[0], err);
    if (r == 0)
        r = check_space(c, err);
    if (r == 0)
        r = begin_sums(c, err);
    if (r == 0 && c->piped.ops)
        r = piped_image_to_disk(c, err);
    else if (r == 0 && c->o->from_fd)
        r = dr_piped_to_disk(&c->piped, c->out, c->o->sparse_size, NULL, c->job, err);
    else if (r == 0)
        r = c->backing ? copy_with_backing(c, err) : copy_plain(c, err);
    dr_lost_tell(&c->lost, c->job);
    if (r == 0)
        r = finish_sums(c, err);
    bool inside = r == 0 && c->o->bitmaps && bitmaps_inside(c);
    if (inside)
        r = dr_ops_bitmaps_copy(c->sources[0], c->out, c->job, err);
    if (r == 0)
        r = dr_ops_close(&c->out, err);
    if (r == 0 && c->is_new)
        r = dr_new_publish(&c->fresh, err);
    if (r == 0 && c->o->bitmaps && !inside)
        r = copy_bitmaps_beside(c, err);
    return r;
}

static void clean_up(struct convert *c)
{
    dr_ops_close(&c->out, NULL);
    dr_new_abandon(&c->fresh);
    dr_ops_close(&c->backing, NULL);
    for (size_t i = 0; i < c->n; i++)
        dr_ops_close(&c->sources[i], NULL);
    free(c->sources);
    dr_piped_close(&c->piped);
    dr_file_unref(c->outlet);
    free(c->backing_path);
    dr_lost_free(&c->lost);
    dr_sums_end(&c->sums);
}

int dr_convert_fs(struct dr_fs *fs, const char *const *sources, size_t n, const char *target,
                  const struct dr_convert_options *options, struct dr_job *job,
                  struct dr_error *err)
{
    struct dr_convert_options o =
        options ? *options : (struct dr_convert_options){.sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    o.out_format = o.out_format ? o.out_format : "raw";
    o.backing = o.backing && *o.backing ? o.backing : NULL;
    if (!o.backing && o.backing_format)
        return dr_fail(err, EINVAL, "%s: Backing format cannot be used without backing file",
                       target);
    if (n == 0)
        return dr_fail(err, EINVAL, "%s: nothing to convert", target);
    if (o.has_range && (n > 1 || o.backing || o.bitmaps || o.compress))
        return dr_fail(err, EINVAL, "%s: a range goes with one source, and alone", target);
    if (o.bitmaps && n > 1)
        return dr_fail(err, EINVAL, "Copying bitmaps only possible with single source");
    const struct dr_format *fmt = dr_format_find(o.out_format);
    if (o.compress && dr_ops_key_secret(o.pairs, o.n_pairs))
        return dr_fail(err, EINVAL, "%s: Compression and encryption not supported at the same time",
                       target);
    if (o.compress && fmt && !fmt->encode && !fmt->sequential)
        return dr_fail(err, ENOTSUP, "Compression not supported for file format '%s'",
                       o.out_format);
    struct convert c = {.fs = fs, .o = &o, .job = job, .target = target, .lost = DR_LOST_INIT};
    c.names = sources;
    c.lost.disk = n == 1 ? sources[0] : NULL;
    c.lost.report = o.salvaged;
    c.lost.user = o.salvaged_user;
    int r = run(&c, sources, n, err);
    dr_lost_tell(&c.lost, job);
    for (size_t i = 0; i < c.n && o.salvage && r == 0; i++)
        tell_pieces(&c, i);
    if (o.lost && c.lost.any)
        *o.lost = true;
    clean_up(&c);
    return r;
}

int dr_convert(const char *const *sources, size_t n, const char *target,
               const struct dr_convert_options *options, struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(target, err);
    DR_REQUIRE_N(sources, n, err);
    for (size_t i = 0; i < n; i++)
        DR_REQUIRE(sources[i], err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    r = dr_job_end(job, dr_convert_fs(dr_fs_posix(), sources, n, target, options, job, err));
    return dr_new_hide(r, target, err);
}
