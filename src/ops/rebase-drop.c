/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The end of a rebase with drop_equal: units of the overlay that equal the new parent become holes.
 * This comes after the switch is durable: before it, the old parent would show through. */
#include "ops/rebase.h"

#include "base/cleanup.h"

struct drop {
    struct dr_pair_walk pair; /* mask = the image's own, pos = how far it was looked at */
    struct dr_chain *chain;
    uint64_t size, unit;
    bool shared;
    uint64_t counted; /* by several threads */
};

/* Items are whole units of the image: holes are passed over, all else is looked at. */
static int drop_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct drop *d = user;
    struct dr_walk *own = &d->pair.mask;
    while (d->pair.pos < d->size) {
        uint64_t off = d->pair.pos;
        int r = dr_walk_to(own, off, err);
        if (r < 0)
            return r;
        uint64_t end = dr_min(d->size, dr_round_down(off, DR_STOCK_BUFFER) + DR_STOCK_BUFFER);
        bool hole = own->run.kind == DR_RUN_HOLE;
        if (hole)
            end = dr_min(d->size, own->run.end);
        d->pair.pos = end;
        if (hole) {
            item->passed += end - off;
            continue;
        }
        item->off = off;
        item->len = end - off;
        item->kind = DR_ITEM_READ_TWO;
        return 1;
    }
    return 0;
}

static int drop_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct drop *d = user;
    int r = dr_chain_read(d->chain, 0, buf[0], item->off, (size_t)item->len, err);
    if (r == 0)
        r = dr_chain_read_padded(d->chain, 1, buf[1], item->off, (size_t)item->len, err);
    return r;
}

/* From at on: how far all units are equal, or how far none is. */
static uint64_t alike_until(const struct drop *d, const struct dr_copy_item *item,
                            uint8_t *const *buf, uint64_t at, bool *equal)
{
    for (bool first = true; at < item->len; first = false) {
        uint64_t n = dr_round_down(item->off + at, d->unit) + d->unit - (item->off + at);
        n = dr_min(n, item->len - at);
        bool same = memcmp(buf[0] + at, buf[1] + at, (size_t)n) == 0;
        if (!first && same != *equal)
            break;
        *equal = same;
        at += n;
    }
    return at;
}

/* The guest may have written since the two were compared: compare again, now that the units are
 * locked. */
static bool still_equal(void *user, uint64_t off, uint64_t len)
{
    const struct drop *d = user;
    CLEANUP_FREE uint8_t *both = malloc(2 * (size_t)len);
    return both && dr_chain_read(d->chain, 0, both, off, (size_t)len, NULL) == 0 &&
           dr_chain_read_padded(d->chain, 1, both + len, off, (size_t)len, NULL) == 0 &&
           memcmp(both, both + len, (size_t)len) == 0;
}

/* Neighbours go together: a file system gives back whole blocks only. */
static int drop_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct drop *d = user;
    int r = 0;
    for (uint64_t at = 0, end; at < item->len && r == 0; at = end) {
        bool equal = false;
        end = alike_until(d, item, buf, at, &equal);
        if (equal)
            r = dr_chain_drop_if(d->chain, 0, item->off + at, end - at,
                                 d->shared ? still_equal : NULL, d, err);
    }
    return r;
}

static int run_drop(const struct rebase *rb, struct drop *d,
                    int (*emit)(void *, struct dr_copy_item *, uint8_t *const *, struct dr_error *),
                    struct dr_error *err)
{
    struct dr_chain *chain = d->chain;
    d->size = chain->images[0]->size;
    d->shared = rb->shared;
    d->unit = dr_stock_block(chain, 0, 512);
    dr_walk_init(&d->pair.mask, chain, 0, 1, d->size);
    struct dr_copy_policy policy = {
        .user = d,
        .next = drop_next,
        .work = drop_work,
        .emit = emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth(chain),
        .total = d->size,
    };
    return dr_copy_run(&policy, rb->job, err);
}

static int drop_from(const struct rebase *rb, struct dr_chain *chain, struct dr_error *err)
{
    struct drop d = {.chain = chain};
    int r = run_drop(rb, &d, drop_emit, err);
    return r < 0 ? r : dr_chain_flush(chain, 0, err);
}

int rebase_drop_equal(const struct rebase *rb, struct dr_error *err)
{
    if (!rb->o->drop_equal || !rb->name)
        return 0;
    struct dr_chain *whole = dr_disk_chain(rb->disk), *chain = dr_chain_tail(whole, rb->at);
    int r = !chain          ? dr_fail(err, ENOMEM, "%s: out of memory", rb->path)
            : chain->n >= 2 ? drop_from(rb, chain, err)
                            : 0;
    dr_chain_unref(chain, NULL);
    dr_chain_unref(whole, NULL);
    return r < 0 ? dr_prefix(err, r, "%s: is rebased, but what equals the parent stays", rb->path)
                 : 0;
}

/* ------------------------------------------------------------------ only counting */

/* Zeros that the image says of itself take no space. */
static int add_data(struct drop *d, uint64_t from, uint64_t to, struct dr_error *err)
{
    struct dr_walk own;
    uint64_t sum = 0;
    dr_walk_init(&own, d->chain, 0, 1, d->size);
    for (uint64_t off = from; off < to; off = own.run.end) {
        int r = dr_walk_to(&own, off, err);
        if (r < 0)
            return r;
        if (own.run.kind == DR_RUN_DATA)
            sum += dr_min(own.run.end, to) - off;
    }
    __atomic_add_fetch(&d->counted, sum, __ATOMIC_RELAXED);
    return 0;
}

static int count_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct drop *d = user;
    int r = 0;
    for (uint64_t at = 0, end; at < item->len && r == 0; at = end) {
        bool equal = false;
        end = alike_until(d, item, buf, at, &equal);
        if (equal)
            r = add_data(d, item->off + at, item->off + end, err);
    }
    return r;
}

int rebase_count_equal(const struct rebase *rb, uint64_t *bytes, struct dr_error *err)
{
    *bytes = 0;
    if (!rb->o->drop_equal || !rb->above)
        return 0;
    struct dr_chain *present = dr_disk_chain(rb->disk), *next = NULL, *chain = NULL;
    struct drop d = {0};
    int r = rebase_make_chain(rb, present, &next, err);
    if (r == 0 && !(chain = dr_chain_tail(next, rb->at)))
        r = dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
    d.chain = chain;
    if (r == 0)
        r = run_drop(rb, &d, count_emit, err);
    *bytes = d.counted;
    dr_chain_unref(chain, NULL);
    dr_chain_unref(next, NULL);
    dr_chain_unref(present, NULL);
    return r;
}
