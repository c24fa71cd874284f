/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* compare: do two disks read the same? What has equal places or is zero on both sides is not read.
 */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define STEP 512u /* differences are told to the sector */

struct compare {
    struct dr_pair_walk pair;
    bool strict;
    pthread_mutex_t lock;
    bool found;       /* under lock, with: */
    uint64_t first;   /* the first difference seen so far */
    bool allocation;  /* it is one of allocation only */
    unsigned failed;  /* 1, 2: which one could not be read */
    uint64_t checked; /* strict: allocation is compared up to here */
};

static void note_difference(struct compare *c, uint64_t off, bool allocation)
{
    DR_LOCK_SCOPE(&c->lock);
    if (c->found && c->first <= off)
        return;
    c->found = true;
    c->first = off;
    c->allocation = allocation;
}

static void note_failure(struct compare *c, unsigned which)
{
    DR_LOCK_SCOPE(&c->lock);
    if (c->failed == 0)
        c->failed = which;
}

static bool found_before(struct compare *c, uint64_t off)
{
    DR_LOCK_SCOPE(&c->lock);
    return c->found && c->first <= off;
}

/* ------------------------------------------------------------------ strict */

static bool same_allocation(const struct dr_walk *a, const struct dr_walk *b)
{
    return a->run.kind == b->run.kind;
}

/* Walk both up to `end`; the first place where one has what the other has not. */
static int check_allocation(struct compare *c, uint64_t end, struct dr_error *err)
{
    struct dr_walk *a = &c->pair.a, *b = &c->pair.b;
    while (c->checked < end) {
        int r = dr_walk_to(a, c->checked, err);
        if (r == 0)
            r = dr_walk_to(b, c->checked, err);
        if (r < 0)
            return r;
        if (!same_allocation(a, b)) {
            note_difference(c, c->checked, true);
            return 0;
        }
        c->checked = dr_min(a->run.end, b->run.end);
    }
    return 0;
}

/* ------------------------------------------------------------------ policy */

/* All items in front of a difference have been given out when it is found, and are finished before
 * the run ends: so the smallest one found is the first one. */
static int compare_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct compare *c = user;
    if (found_before(c, c->pair.pos))
        return 0;
    int r = dr_pair_next(&c->pair, item, err);
    if (r >= 0 && c->strict) {
        int s = check_allocation(c, c->pair.pos, err);
        if (s < 0)
            return s;
    }
    return r;
}

static int read_side(struct compare *c, const struct dr_walk *w, unsigned which, uint8_t *buf,
                     const struct dr_copy_item *item, struct dr_error *err)
{
    int r = dr_chain_read_padded(w->chain, w->first, buf, item->off, (size_t)item->len, err);
    if (r < 0)
        note_failure(c, which);
    return r;
}

static int compare_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                        struct dr_error *err)
{
    struct compare *c = user;
    int r = 0;
    if (found_before(c, item->off))
        return 0;
    if (item->kind != DR_ITEM_READ_B)
        r = read_side(c, &c->pair.a, 1, buf[0], item, err);
    if (r == 0 && item->kind != DR_ITEM_READ_A)
        r = read_side(c, &c->pair.b, 2, buf[1], item, err);
    if (r < 0)
        return r;
    uint64_t at = dr_pair_differs(item, buf, 0, item->len);
    if (at < item->len)
        note_difference(c, item->off + dr_pair_differs(item, buf, 0, STEP), false);
    return 0;
}

static int compare_chains(struct compare *c, struct dr_chain *a, struct dr_chain *b,
                          struct dr_job *job, struct dr_error *err)
{
    uint64_t size = dr_max(a->images[0]->size, b->images[0]->size);
    c->pair.size = size;
    dr_walk_init(&c->pair.a, a, 0, a->n, size);
    dr_walk_init(&c->pair.b, b, 0, b->n, size);
    struct dr_copy_policy policy = {
        .user = c,
        .next = compare_next,
        .work = compare_work,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(a, b),
        .total = size,
    };
    return dr_copy_run(&policy, job, err);
}

int dr_compare(struct dr_disk *a, struct dr_disk *b, bool strict, struct dr_job *job,
               struct dr_compare_result *result, struct dr_error *err)
{
    DR_REQUIRE(a, err);
    DR_REQUIRE(b, err);
    DR_REQUIRE(result, err);
    *result = (struct dr_compare_result){.size_differs = dr_size(a) != dr_size(b)};
    if (strict && result->size_differs)
        return 0;
    struct compare c = {.strict = strict, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct dr_chain *ca = dr_disk_chain(a), *cb = dr_disk_chain(b);
    int r = compare_chains(&c, ca, cb, job, err);
    dr_chain_unref(cb, NULL);
    dr_chain_unref(ca, NULL);
    result->failed = r < 0 ? c.failed : 0;
    result->same = r >= 0 && !c.found;
    result->mismatch_off = c.first;
    result->strict_allocation = c.found && c.allocation;
    pthread_mutex_destroy(&c.lock);
    return r;
}
