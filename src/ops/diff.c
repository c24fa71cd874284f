/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* diff: every range in which two disks differ. What both read from one place, and what is zero in
 * both, is not read. Items are compared by all workers and told in order. */
#include "base/cleanup.h"
#include "drover/chain.h"
#include "ops/ops-internal.h"

#define STEP 512u

enum { SAME = 1 }; /* aux[0] of an item */

struct diff {
    struct dr_pair_walk pair;
    int (*each)(void *user, uint64_t off, uint64_t len);
    void *user;
    uint64_t off, len; /* what differs and was not told yet, since more may follow */
    int enough;        /* what `each` has returned, if it ended the run */
};

static int diff_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    return dr_pair_next(&((struct diff *)user)->pair, item, err);
}

static int diff_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    int r = dr_pair_read(&((struct diff *)user)->pair, item, buf, err);
    if (r == 0 && dr_pair_differs(item, buf, 0, item->len) == item->len)
        item->aux[0] = SAME;
    return r;
}

static int tell(struct diff *d)
{
    if (d->len > 0)
        d->enough = d->each(d->user, d->off, d->len);
    d->len = 0;
    return d->enough;
}

static int note(struct diff *d, uint64_t off, uint64_t len)
{
    if (d->len > 0 && d->off + d->len == off) {
        d->len += len;
        return 0;
    }
    int r = tell(d);
    d->off = off;
    d->len = len;
    return r;
}

static int diff_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct diff *d = user;
    uint64_t at = item->aux[0] == SAME ? item->len : dr_pair_differs(item, buf, 0, STEP);
    int r = 0;
    (void)err;
    while (r == 0 && at < item->len) {
        uint64_t end = at;
        while (end < item->len && dr_pair_differs(item, buf, end, STEP) == end)
            end += dr_min(STEP, item->len - end);
        r = note(d, item->off + at, end - at);
        at = dr_pair_differs(item, buf, end, STEP);
    }
    return r != 0; /* a positive result is no failure of the run */
}

static int diff_chains(struct diff *d, struct dr_chain *a, struct dr_chain *b, struct dr_job *job,
                       struct dr_error *err)
{
    uint64_t size = dr_max(a->images[0]->size, b->images[0]->size);
    d->pair.size = size;
    dr_walk_init(&d->pair.a, a, 0, a->n, size);
    dr_walk_init(&d->pair.b, b, 0, b->n, size);
    struct dr_copy_policy policy = {
        .user = d,
        .next = diff_next,
        .work = diff_work,
        .emit = diff_emit,
        .ordered = true,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(a, b),
        .total = size,
    };
    int r = dr_copy_run(&policy, job, err);
    if (r == 0)
        tell(d);
    return r < 0 ? r : d->enough;
}

int dr_diff(struct dr_disk *a, struct dr_disk *b,
            int (*each)(void *user, uint64_t off, uint64_t len), void *user, struct dr_job *job,
            struct dr_error *err)
{
    DR_REQUIRE(a, err);
    DR_REQUIRE(b, err);
    DR_REQUIRE(each, err);
    struct diff d = {.each = each, .user = user};
    struct dr_chain *ca = dr_disk_chain(a), *cb = dr_disk_chain(b);
    int r = diff_chains(&d, ca, cb, job, err);
    dr_chain_unref(cb, NULL);
    dr_chain_unref(ca, NULL);
    return r;
}
