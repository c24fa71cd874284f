/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Copying a chain into compressed units. All workers read and encode; one after another they write,
 * in the order of the disk, so that what is read together later stands together in the file. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* What became of a unit, in front of its bytes in the second buffer; else the number of bytes. */
enum { UNIT_SKIP = 0, UNIT_ZERO = UINT32_MAX - 1, UNIT_PLAIN = UINT32_MAX };
#define UNIT_HEAD 8 /* bytes for it */

static const struct dr_image *target_of(const struct dr_compress *c)
{
    return c->t->dst->images[c->t->dst_at];
}

static size_t slot_of(const struct dr_compress *c, const struct dr_copy_item *item, uint64_t off)
{
    uint64_t first = dr_round_down(item->off, c->unit);
    return (size_t)((off - first) / c->unit * (c->unit + UNIT_HEAD));
}

/* ------------------------------------------------------------------ next
 *
 * Offsets are the target's. An item is some units of which at least one has data, or zeros for
 * whole units. */

static bool passes_over(const struct dr_compress *c, const struct dr_run *run)
{
    if (run->kind == DR_RUN_DATA)
        return false;
    if (run->kind == DR_RUN_HOLE && !c->t->hole_is_zero)
        return true;
    return !c->t->write_zeros && !c->t->all;
}

static void zero_item(const struct dr_compress *c, struct dr_copy_item *item, uint64_t end)
{
    item->kind = DR_ITEM_ZERO;
    item->off = c->pos;
    item->len = end - c->pos;
}

static void data_item(const struct dr_compress *c, struct dr_copy_item *item, uint64_t run_end)
{
    uint64_t from = dr_round_down(c->pos, c->unit), end = c->t->shift + c->t->walk.size;
    end = dr_min(end, dr_min(dr_round_up(run_end, c->unit), from + c->group));
    item->kind = DR_ITEM_COPY;
    item->off = dr_max(from, c->t->shift);
    item->len = end - item->off;
}

static int compress_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct dr_compress *c = user;
    struct dr_walk *w = &c->t->walk;
    uint64_t end = c->t->shift + w->size, from = c->pos;
    for (; c->pos < end; c->pos = c->t->shift + w->run.end) {
        int r = dr_transfer_walk(c->t, c->pos - c->t->shift, err);
        if (r < 0)
            return r;
        if (passes_over(c, &w->run))
            continue;
        uint64_t run_end = c->t->shift + w->run.end, zeros = dr_round_down(run_end, c->unit);
        bool whole = c->pos % c->unit == 0 && zeros > c->pos;
        if (w->run.kind != DR_RUN_DATA && !c->t->all && whole)
            zero_item(c, item, zeros);
        else
            data_item(c, item, run_end);
        item->passed = dr_max(item->off, from) - from;
        c->pos = item->off + item->len;
        return 1;
    }
    item->passed = c->pos - from;
    return 0;
}

/* ------------------------------------------------------------------ work */

/* The part of the unit at off that the item has. */
static uint64_t unit_part(const struct dr_compress *c, const struct dr_copy_item *item,
                          uint64_t off)
{
    uint64_t end = dr_round_down(off, c->unit) + c->unit;
    return dr_min(end, item->off + item->len) - off;
}

static bool is_whole(const struct dr_compress *c, uint64_t off, uint64_t len)
{
    return off % c->unit == 0 && (len == c->unit || off + len == target_of(c)->size);
}

static uint32_t encode_unit(const struct dr_compress *c, const uint8_t *in, uint64_t off,
                            uint64_t len, uint8_t *out, int *failure)
{
    struct dr_image *image = c->t->dst->images[c->t->dst_at];
    int64_t r = image->fmt->encode(image, in, (size_t)len, off, out, (size_t)c->unit);
    if (r < 0 && r != -ENOTSUP)
        *failure = (int)r;
    return r > 0 ? (uint32_t)r : UNIT_PLAIN;
}

/* What the target shows there already, to be left out. NULL: there is no parent. */
static int read_parent(const struct dr_compress *c, const struct dr_copy_item *item,
                       uint8_t **shown, struct dr_error *err)
{
    *shown = NULL;
    if (!c->parent)
        return 0;
    *shown = malloc((size_t)item->len);
    if (!*shown)
        return dr_fail(err, ENOMEM, "out of memory for %llu bytes", (unsigned long long)item->len);
    return dr_chain_read_padded(c->parent, 0, *shown, item->off, (size_t)item->len, err);
}

static int compress_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                         struct dr_error *err)
{
    const struct dr_compress *c = user;
    CLEANUP_FREE uint8_t *shown = NULL;
    if (item->kind != DR_ITEM_COPY)
        return 0;
    int r = dr_transfer_read(c->t, buf[0], item->off - c->t->shift, (size_t)item->len, err);
    if (r == 0)
        r = read_parent(c, item, &shown, err);
    for (uint64_t at = 0, len; r == 0 && at < item->len; at += len) {
        uint64_t off = item->off + at;
        uint8_t *slot = buf[1] + slot_of(c, item, off);
        uint32_t what = UNIT_PLAIN;
        len = unit_part(c, item, off);
        if (shown && memcmp(buf[0] + at, shown + at, len) == 0)
            what = UNIT_SKIP;
        else if (!c->t->all && dr_is_zero(buf[0] + at, len))
            what = c->t->write_zeros ? UNIT_ZERO : UNIT_SKIP;
        else if (is_whole(c, off, len))
            what = encode_unit(c, buf[0] + at, off, len, slot + UNIT_HEAD, &r);
        memcpy(slot, &what, sizeof(what));
    }
    return r < 0 ? dr_fail_errno(err, -r, "cannot compress guest offset %llu",
                                 (unsigned long long)item->off)
                 : 0;
}

/* ------------------------------------------------------------------ emit */

static int emit_unit(const struct dr_compress *c, const uint8_t *plain, const uint8_t *slot,
                     uint64_t off, uint64_t len, struct dr_error *err)
{
    uint32_t what;
    memcpy(&what, slot, sizeof(what));
    switch (what) {
    case UNIT_SKIP:
        return 0;
    case UNIT_ZERO:
        return dr_chain_zero(c->t->dst, c->t->dst_at, off, len, c->t->zero_flags, err);
    case UNIT_PLAIN:
        return dr_chain_write(c->t->dst, c->t->dst_at, plain, off, (size_t)len, err);
    default:
        return dr_chain_write_coded(c->t->dst, c->t->dst_at, slot + UNIT_HEAD, what, off, len, err);
    }
}

static int compress_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                         struct dr_error *err)
{
    const struct dr_compress *c = user;
    int r = 0;
    if (item->kind == DR_ITEM_ZERO)
        return dr_chain_zero(c->t->dst, c->t->dst_at, item->off, item->len, c->t->zero_flags, err);
    for (uint64_t at = 0, len; r == 0 && at < item->len; at += len) {
        uint64_t off = item->off + at;
        len = unit_part(c, item, off);
        r = emit_unit(c, buf[0] + at, buf[1] + slot_of(c, item, off), off, len, err);
    }
    return r;
}

/* ------------------------------------------------------------------ running it */

int dr_compress_check(const struct dr_image *image, struct dr_error *err)
{
    if (image->fmt->encode && image->n_files == 1)
        return 0;
    return dr_fail(err, ENOTSUP, "%s: Compression not supported for %s '%s'", image->path,
                   image->fmt->encode ? "an external data file, file format" : "file format",
                   image->fmt->name);
}

int dr_compress_run(struct dr_transfer *t, struct dr_chain *parent, uint64_t total,
                    struct dr_job *job, struct dr_error *err)
{
    struct dr_compress c = {.t = t, .parent = parent, .pos = t->shift};
    uint64_t start;
    const struct dr_image *image = target_of(&c);
    image->fmt->unit(image, 0, &start, &c.unit);
    c.group = dr_max(c.unit, dr_round_down(DR_STOCK_BUFFER / 2, c.unit));
    struct dr_copy_policy policy = {
        .user = &c,
        .next = compress_next,
        .work = compress_work,
        .emit = compress_emit,
        .ordered = true,
        .buffers = 2,
        .buffer_size = (size_t)(c.group / c.unit * (c.unit + UNIT_HEAD)),
        .depth = dr_stock_depth_of_two(t->walk.chain, t->dst),
        .total = total,
        .before = t->before,
        .after = t->after,
    };
    return dr_copy_run(&policy, job, err);
}
