/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/sequential.h"

#include "base/cleanup.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

/* An item is some units, of which at least one has data: buf[0] has their bytes, buf[1] how long
 * each of them is when coded (0: nothing but zeros), and then a place for each. */
#define SECTOR     512u
#define MOST_UNITS 128u
#define HEAD       (MOST_UNITS * sizeof(uint32_t))

struct in_order {
    const struct dr_sequential *seq;
    void *state;
    struct part *parts;
    size_t n, part;        /* part: the one that next is in */
    uint64_t pos;          /* of next: all units in front of it are dealt with */
    uint64_t total, group; /* bytes: of the disk; of an item at most */
    size_t coded_most;     /* bytes of a coded unit */
    uint64_t unit, align;  /* items are of whole units, and of whole grains of the sums */
    struct dr_sums *sums;  /* NULL, or gets the sums of what the image shows */
    uint64_t stored;       /* bytes of the units that were put */
};

/* [start, end) of the new disk is what the source has from `from` on. */
struct part {
    struct dr_transfer t;
    uint64_t start, end, from;
};

/* The first byte at or behind pos that a source has data for, or total; *until: how far that goes.
 */
static int next_data(struct in_order *o, uint64_t *pos, uint64_t *until, struct dr_error *err)
{
    for (; o->part < o->n; o->part++) {
        struct part *p = &o->parts[o->part];
        *pos = dr_max(*pos, p->start);
        while (*pos < p->end) {
            int r = dr_transfer_walk(&p->t, *pos - p->start + p->from, err);
            if (r < 0)
                return r;
            *until = dr_min(p->t.walk.run.end - p->from + p->start, p->end);
            if (p->t.walk.run.kind == DR_RUN_DATA)
                return 0;
            *pos = *until;
        }
    }
    *pos = *until = o->total;
    return 0;
}

static int stopped(struct dr_error *err)
{
    return dr_fail(err, ECANCELED, "stopped on request");
}

/* The same units as order_next gives, without a look at their bytes. */
static int tell_map(struct in_order *o, unsigned pass, struct dr_job *job, struct dr_error *err)
{
    uint64_t pos = 0, until;
    int r = 0;
    o->part = 0;
    while (r == 0 && pos < o->total) {
        uint64_t at = pos;
        r = dr_job_stopped(job) ? stopped(err) : next_data(o, &at, &until, err);
        if (r < 0 || at == o->total)
            break;
        at = dr_round_down(at, o->align);
        pos = dr_min(dr_round_up(until, o->align), o->total);
        r = o->seq->map(o->state, pass, at, pos - at, err);
    }
    o->part = 0;
    return r < 0 ? r : o->seq->map(o->state, pass, o->total, 0, err);
}

static int order_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct in_order *o = user;
    uint64_t from = o->pos, at = from, until;
    int r = next_data(o, &at, &until, err);
    if (r < 0)
        return r;
    o->pos = item->off = at < o->total ? dr_round_down(at, o->align) : o->total;
    item->passed = item->off - from;
    if (at == o->total)
        return 0;
    uint64_t most = dr_min(dr_round_down(at, o->group) + o->group, o->total);
    o->pos = dr_min(dr_round_up(until, o->align), most);
    item->len = o->pos - item->off;
    return 1;
}

/* The sources' bytes; between two of them zeros. */
static int read_item(const struct in_order *o, const struct dr_copy_item *item, uint8_t *buf,
                     struct dr_error *err)
{
    uint64_t at = item->off, end = item->off + item->len;
    for (size_t i = 0; i < o->n && at < end; i++) {
        const struct part *p = &o->parts[i];
        uint64_t first = dr_min(dr_max(at, p->start), end), last = dr_min(p->end, end);
        if (first >= last)
            continue;
        memset(buf + (at - item->off), 0, (size_t)(first - at));
        at = last;
        int r = dr_transfer_read(&p->t, buf + (first - item->off), first - p->start + p->from,
                                 (size_t)(last - first), err);
        if (r < 0)
            return r;
    }
    memset(buf + (at - item->off), 0, (size_t)(end - at));
    return 0;
}

static int order_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    const struct in_order *o = user;
    uint32_t *lengths = (uint32_t *)(void *)buf[1];
    int r = read_item(o, item, buf[0], err);
    if (r == 0 && o->sums)
        r = dr_sums_put(o->sums, item->off, buf[0], item->len, err);
    for (uint64_t i = 0, at = 0; r == 0 && at < item->len; i++, at += o->unit) {
        size_t len = (size_t)dr_min(o->unit, item->len - at);
        lengths[i] = 0;
        if (!o->seq->map && dr_is_zero(buf[0] + at, len))
            continue;
        int64_t coded = o->seq->encode(o->state, buf[0] + at, len, item->off + at,
                                       buf[1] + HEAD + i * o->coded_most);
        if (coded < 0)
            return dr_fail_errno(err, (int)-coded, "cannot compress guest offset %llu",
                                 (unsigned long long)(item->off + at));
        lengths[i] = (uint32_t)coded;
    }
    return r;
}

static int order_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct in_order *o = user;
    const uint32_t *lengths = (const uint32_t *)(const void *)buf[1];
    int r = 0;
    for (uint64_t i = 0, at = 0; r == 0 && at < item->len; i++, at += o->unit)
        if (lengths[i] > 0) {
            r = o->seq->put(o->state, item->off + at, buf[1] + HEAD + i * o->coded_most, lengths[i],
                            err);
            o->stored += dr_min(o->unit, item->len - at);
        }
    return r;
}

static int run(struct in_order *o, const struct dr_sequential_job *what, struct dr_error *err)
{
    uint64_t units = dr_min(dr_max(DR_STOCK_BUFFER / 2 / o->unit, 1), MOST_UNITS);
    unsigned depth = 0;
    o->group = units * o->unit;
    for (size_t i = 0; i < o->n; i++)
        depth = (unsigned)dr_max(depth, dr_stock_depth(o->parts[i].t.walk.chain));
    struct dr_copy_policy policy = {
        .user = o,
        .next = order_next,
        .work = order_work,
        .emit = order_emit,
        .ordered = true,
        .buffers = 2,
        .buffer_size = (size_t)dr_max(o->group, HEAD + units * o->coded_most),
        .depth = depth,
        .total = o->total,
        .before = what->before,
        .after = what->after,
    };
    return dr_copy_run(&policy, what->job, err);
}

/* ------------------------------------------------------------------ the whole image */

static int settings(const char *target, const struct dr_convert_options *o, uint64_t total,
                    struct dr_option **options, struct dr_create_params *params,
                    struct dr_error *err)
{
    int r = dr_ops_settings(o->pairs, o->n_pairs, options, err);
    *params = (struct dr_create_params){.size = total,
                                        .options = *options,
                                        .n_options = o->n_pairs,
                                        .backing_name = o->backing,
                                        .backing_format = o->backing_format,
                                        .force = o->force,
                                        .final = target};
    return r;
}

int dr_sequential_wanted(const char *target, const struct dr_convert_options *o, bool *wanted,
                         struct dr_error *err)
{
    const struct dr_format *fmt = dr_format_find(o->out_format);
    CLEANUP_FREE struct dr_option *options = NULL;
    struct dr_create_params params;
    *wanted = false;
    bool for_pipes = fmt && fmt->sequential && fmt->sequential->map;
    if (!fmt || !fmt->sequential || o->no_create || (for_pipes && !o->to_fd))
        return fmt && o->compress && !fmt->encode
                   ? dr_fail(err, ENOTSUP, "Compression not supported for file format '%s'",
                             o->out_format)
                   : 0;
    if (for_pipes && o->compress)
        return dr_fail(
            err, ENOTSUP,
            "%s: compressed clusters cannot go into a pipe: the tables, which come "
            "first, would have to know how long they get; convert to a file, or compress "
            "what comes out of the pipe",
            target);
    int r = settings(target, o, 0, &options, &params, err);
    if (r == 0)
        r = fmt->sequential->wanted(target, &params, err);
    if (r < 0)
        return r;
    *wanted = r > 0;
    if (*wanted && o->bitmaps)
        return dr_fail(err, ENOTSUP, "%s: an image that is written once keeps no bitmaps", target);
    if (!*wanted && o->compress && !fmt->encode)
        return dr_fail(err, ENOTSUP, "Compression not supported for file format '%s'",
                       o->out_format);
    return 0;
}

int dr_sequential_write(struct dr_file *out, const char *path, const struct dr_sequential_job *what,
                        struct dr_error *err)
{
    CLEANUP_FREE struct dr_option *options = NULL;
    CLEANUP_FREE struct part *parts = calloc(what->n, sizeof(*parts));
    struct dr_create_params params;
    struct in_order o = {.seq = dr_format_find(what->o->out_format)->sequential,
                         .parts = parts,
                         .n = what->n,
                         .total = what->total,
                         .sums = what->sums};
    uint64_t at = 0;
    if (!parts)
        return dr_fail(err, ENOMEM, "out of memory for %zu sources", what->n);
    for (size_t i = 0; i < what->n; i++) {
        const struct dr_sequential_part *from = &what->parts[i];
        struct dr_chain *chain = from->disk->chain;
        parts[i] =
            (struct part){.start = at, .end = at + (from->to - from->from), .from = from->from};
        parts[i].t.lost = what->o->salvage ? what->lost : NULL;
        parts[i].t.job = what->job;
        dr_walk_init(&parts[i].t.walk, chain, 0, chain->n, dr_size(from->disk));
        at = dr_round_up(parts[i].end, SECTOR);
    }
    int r = settings(path, what->o, what->total, &options, &params, err);
    if (r == 0)
        r = o.seq->begin(path, &params, out, &o.state, err);
    o.unit = r == 0 && o.seq->unit_of ? o.seq->unit_of(o.state) : o.seq->unit;
    o.coded_most = o.seq->map ? (size_t)o.unit : o.seq->coded_most;
    o.align = o.sums ? dr_max(o.unit, DR_SUMS_GRAIN) : o.unit;
    for (unsigned i = 0; r == 0 && o.seq->map && i < o.seq->map_passes; i++)
        r = tell_map(&o, i, what->job, err);
    if (r == 0)
        r = run(&o, what, err);
    if (r == 0 && what->stored)
        *what->stored = o.stored;
    if (r == 0)
        r = o.seq->finish(o.state, err);
    o.seq->free(o.state);
    return r;
}

static int sum_up(struct dr_fs *fs, const char *path, const struct dr_convert_options *o,
                  struct dr_error *err)
{
    struct dr_open_options open = {.format = o->out_format, .flags = o->target_flags};
    struct dr_disk *disk = NULL;
    struct dr_sums sums = {0};
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r == 0)
        r = dr_sums_of_disk(&sums, o->digest_kind, disk, NULL, err);
    if (r == 0)
        r = dr_sums_digest_any(&sums, o->digest, err);
    dr_sums_end(&sums);
    dr_ops_close(&disk, NULL);
    return r;
}

int dr_sequential_convert(struct dr_fs *fs, const char *target,
                          const struct dr_sequential_job *what, struct dr_error *err)
{
    const struct dr_convert_options *o = what->o;
    unsigned flags = DR_OPEN_RDWR | o->target_flags | (o->unsafe_target ? DR_OPEN_NO_FLUSH : 0u);
    struct dr_new_image fresh = {0};
    struct dr_file *out = NULL;
    int r = dr_new_begin(&fresh, fs, target, false, flags, err);
    if (r < 0)
        return r;
    r = dr_new_open_file(&fresh, dr_format_find(o->out_format), flags, &out, err);
    if (r == 0)
        r = dr_new_check_places(&fresh, err);
    if (r == 0)
        r = dr_sequential_write(out, fresh.final, what, err);
    if (r == 0)
        r = dr_file_flush(out, err);
    dr_file_unref(out);
    if (r == 0 && o->digest)
        r = sum_up(fs, fresh.path, o, err);
    if (r == 0)
        r = dr_new_publish(&fresh, err);
    dr_new_abandon(&fresh);
    return r;
}
