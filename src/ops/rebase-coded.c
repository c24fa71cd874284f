/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The copy of a rebase, compressed: as rebase-fill.c has it, but in whole units of the overlay. All
 * workers read, compare and encode; one after another they write, in the order of the disk, so that
 * what is read together later stands together in the file. A unit that gets no smaller, and one of
 * which the overlay has a part already, is filled plain. With snapshots inside the overlay that
 * goes for each view: those that have nothing of a unit share the coded one, the others a plain
 * one. */
#include "ops/rebase-fill.h"

#include "base/cleanup.h"

/* What becomes of a unit; else the number of its coded bytes, which stand in the second buffer. */
enum { UNIT_SKIP = 0, UNIT_ZERO = UINT32_MAX - 1, UNIT_PLAIN = UINT32_MAX };

struct coded {
    struct rebase_fill fill;
    uint64_t unit;
    size_t data; /* bytes of a buffer; in the first one a uint32_t for each unit follows */
};

static struct dr_image *image_of(const struct coded *c)
{
    return c->fill.chain->images[0];
}

static uint8_t *fate_of(const struct coded *c, uint8_t *const *buf, uint64_t at)
{
    return buf[0] + c->data + at / c->unit * sizeof(uint32_t);
}

static uint64_t unit_len(const struct coded *c, const struct dr_copy_item *item, uint64_t at)
{
    return dr_min(c->unit, item->len - at);
}

/* The next range that may differ, widened to whole units; the walk goes on behind them. */
static int coded_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct coded *c = user;
    struct dr_pair_walk *pair = &c->fill.pair;
    int r = dr_pair_next(pair, item, err);
    if (r <= 0)
        return r;
    uint64_t from = dr_round_down(item->off, c->unit);
    uint64_t to = dr_min(pair->size, dr_round_up(item->off + item->len, c->unit));
    if (from < item->off || to > item->off + item->len) /* what was added may be anything */
        item->kind = !pair->b.chain          ? DR_ITEM_READ_A
                     : c->fill.chain->n == 1 ? DR_ITEM_READ_B
                                             : DR_ITEM_READ_TWO;
    item->passed -= dr_min(item->passed, item->off - from);
    item->off = from;
    item->len = to - from;
    pair->pos = to;
    return 1;
}

static uint32_t encode(const struct coded *c, const struct dr_copy_item *item, uint8_t *const *buf,
                       uint64_t at, uint64_t len, int *failure)
{
    struct dr_image *image = image_of(c);
    int64_t n = image->fmt->encode(image, buf[0] + at, (size_t)len, item->off + at, buf[1] + at,
                                   (size_t)len);
    if (n < 0 && n != -ENOTSUP)
        *failure = (int)n;
    return n > 0 ? (uint32_t)n : UNIT_PLAIN;
}

static int coded_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct coded *c = user;
    int r = dr_pair_read(&c->fill.pair, item, buf, err);
    if (r < 0)
        return r;
    for (uint64_t at = 0, len; r == 0 && at < item->len; at += len) {
        struct dr_copy_item up_to = *item;
        uint32_t fate;
        len = unit_len(c, item, at);
        up_to.len = at + len;
        if (dr_pair_differs(&up_to, buf, at, len) != at)
            fate = UNIT_SKIP;
        else if (item->kind == DR_ITEM_READ_B || dr_is_zero(buf[0] + at, (size_t)len))
            fate = UNIT_ZERO;
        else
            fate = encode(c, item, buf, at, len, &r);
        memcpy(fate_of(c, buf, at), &fate, sizeof(fate));
    }
    return r < 0 ? dr_fail_errno(err, -r, "%s: cannot compress guest offset %llu",
                                 image_of(c)->path, (unsigned long long)item->off)
                 : 0;
}

/* One unit, of which `coded` bytes stand in the second buffer, or 0. */
static int fill_unit(const struct coded *c, uint8_t *const *buf, uint32_t coded, bool zero,
                     uint64_t at, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct dr_chain *chain = c->fill.chain;
    int r = 0;
    /* What is plain goes where the coded unit did not. */
    if (!c->fill.views) {
        if (coded)
            r = dr_chain_fill_coded(chain, 0, buf[1] + at, coded, off, len, err);
        return r < 0 ? r : dr_chain_fill(chain, 0, zero ? NULL : buf[0] + at, off, len, err);
    }
    if (coded)
        r = dr_image_views_fill(image_of(c), c->fill.views, buf[1] + at, coded, off, len, err);
    memset(buf[0] + at + len, 0, (size_t)(c->unit - len)); /* behind the end of the largest view */
    if (r == 0)
        r = dr_image_views_fill(image_of(c), c->fill.views, zero ? NULL : buf[0] + at, 0, off,
                                c->unit, err);
    return r;
}

static int coded_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct coded *c = user;
    uint64_t filled = 0;
    int r = 0;
    for (uint64_t at = 0, len; r == 0 && at < item->len; at += len) {
        uint64_t off = item->off + at;
        uint32_t fate;
        memcpy(&fate, fate_of(c, buf, at), sizeof(fate));
        len = unit_len(c, item, at);
        if (fate == UNIT_SKIP)
            continue;
        bool coded = fate != UNIT_ZERO && fate != UNIT_PLAIN;
        r = fill_unit(c, buf, coded ? fate : 0, fate == UNIT_ZERO, at, off, len, err);
        filled += len;
    }
    return r < 0 ? r : rebase_fill_save(&c->fill, filled, err);
}

int rebase_fill_coded(struct rebase *rb, struct dr_error *err)
{
    struct coded c;
    uint64_t start;
    rebase_fill_init(&c.fill, rb);
    image_of(&c)->fmt->unit(image_of(&c), 0, &start, &c.unit);
    c.data = (size_t)dr_max(c.unit, DR_STOCK_BUFFER);
    struct dr_copy_policy policy = {
        .user = &c,
        .next = coded_next,
        .work = coded_work,
        .emit = coded_emit,
        .ordered = true,
        .buffers = 2,
        .buffer_size = c.data + (size_t)(c.data / c.unit) * sizeof(uint32_t),
        .depth = dr_stock_depth_of_two(rb->old, rb->above),
        .total = c.fill.pair.size,
    };
    return dr_copy_run(&policy, rb->job, err);
}
