/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The copy of a rebase: what the old parents show and the new ones do not is filled into the
 * overlay. Both views are walked side by side, and read only where their metadata leaves open
 * whether they differ. Only holes are filled, looked at under the unit's lock, so other threads may
 * write to the disk meanwhile.
 *
 * Snapshots inside the overlay have the same parents. With them the overlay's driver fills the
 * holes of all views together (views_fill), whole units at a time. rebase-coded.c is the same copy,
 * compressed. */
#include "ops/rebase-fill.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ the copy */

/* What a run that is killed has to do again at most: the metadata of what was filled waits in
 * memory until it is flushed. */
#define SAVE_EVERY (UINT64_C(128) << 20)

void rebase_fill_init(struct rebase_fill *f, const struct rebase *rb)
{
    struct dr_chain *old = rb->old;
    uint64_t size = rb->has_views ? rb->views.size : rebase_overlay(rb)->size;
    *f = (struct rebase_fill){.chain = old, .step = dr_stock_block(old, 0, 4096)};
    f->pair.size = size;
    if (rb->has_views) {
        f->views = &rb->views;
        f->pair.views = rebase_overlay(rb);
    } else {
        f->pair.masked = true;
        dr_walk_init(&f->pair.mask, old, 0, 1, size);
    }
    dr_walk_init(&f->pair.a, old, 1, old->n, size);
    dr_walk_init(&f->pair.b, rb->above, rb->above_first, rb->above ? rb->above->n : 0, size);
}

static int fill_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct rebase_fill *f = user;
    for (;;) {
        int r = dr_pair_next(&f->pair, item, err);
        if (r != 0 || !f->rest)
            return r;
        uint64_t off = f->pair.pos, end;
        if (!dr_dirty_take(f->rest, &off, &end, UINT64_MAX))
            return 0;
        f->pair.pos = off;
        f->pair.size = end;
    }
}

static int fill_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    return dr_pair_read(&((struct rebase_fill *)user)->pair, item, buf, err);
}

/* From at on, how many steps in a row differ? */
static uint64_t differing_until(const struct dr_copy_item *item, uint8_t *const *buf, uint64_t at,
                                uint64_t step)
{
    while (at < item->len && dr_pair_differs(item, buf, at, step) == at)
        at += dr_min(step, item->len - at);
    return at;
}

int rebase_fill_save(struct rebase_fill *f, uint64_t filled, struct dr_error *err)
{
    if (__atomic_add_fetch(&f->unsaved, filled, __ATOMIC_RELAXED) < SAVE_EVERY ||
        __atomic_exchange_n(&f->unsaved, 0, __ATOMIC_RELAXED) < SAVE_EVERY)
        return 0; /* the second: another thread was faster */
    return dr_chain_flush(f->chain, 0, err);
}

/* Units of which the item has all bytes are written from its buffer; those at its edges are read
 * from the old parents again. */
static int fill_views(struct rebase_fill *f, const struct dr_copy_item *item, const uint8_t *old,
                      uint64_t from, uint64_t to, struct dr_error *err)
{
    struct dr_image *image = f->chain->images[0];
    uint64_t unit = f->views->unit, next;
    CLEANUP_FREE uint8_t *edge = NULL;
    int r = 0;
    to = dr_round_up(to, unit);
    for (uint64_t off = dr_round_down(from, unit); off < to && r == 0; off = next) {
        uint64_t whole = dr_min(to, dr_round_down(item->off + item->len, unit));
        if (off >= item->off && off < whole) {
            next = whole;
            r = dr_image_views_fill(image, f->views, old ? old + (off - item->off) : NULL, 0, off,
                                    next - off, err);
            continue;
        }
        next = off + unit;
        if (!edge && !(edge = calloc(1, unit)))
            return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
        if (f->chain->n > 1)
            r = dr_chain_read_padded(f->chain, 1, edge, off, unit, err);
        if (r == 0)
            r = dr_image_views_fill(image, f->views, edge, 0, off, unit, err);
    }
    return r;
}

static int fill_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct rebase_fill *f = user;
    uint64_t filled = 0;
    int r = 0;
    uint64_t at = dr_pair_differs(item, buf, 0, f->step);
    while (at < item->len && r == 0) {
        uint64_t end = differing_until(item, buf, at, f->step);
        const uint8_t *old = item->kind == DR_ITEM_READ_B ? NULL : buf[0];
        if (f->views)
            r = fill_views(f, item, old, item->off + at, item->off + end, err);
        else
            r = dr_chain_fill(f->chain, 0, old ? old + at : NULL, item->off + at, end - at, err);
        filled += end - at;
        at = dr_pair_differs(item, buf, end, f->step);
    }
    return r < 0 ? r : rebase_fill_save(f, filled, err);
}

static int run_fill(struct rebase *rb, struct rebase_fill *f, struct dr_job *job,
                    struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = f,
        .next = fill_next,
        .work = fill_work,
        .emit = fill_emit,
        .repeat = DR_COPY_SKIP,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rb->old, rb->above),
        .total = rb->has_views ? rb->views.size : rebase_overlay(rb)->size,
    };
    return dr_copy_run(&policy, job, err);
}

static int copy(struct rebase *rb, struct dr_error *err)
{
    struct rebase_fill f;
    rebase_fill_init(&f, rb);
    return run_fill(rb, &f, rb->job, err);
}

/* No job: nobody may pause it here. Snapshots do not change meanwhile. */
int rebase_fill_rest(struct rebase *rb, struct dr_error *err)
{
    struct rebase_fill f;
    if (!rb->dirty.disk)
        return 0;
    rebase_fill_init(&f, rb);
    f.rest = &rb->dirty;
    f.pair.size = 0;
    return run_fill(rb, &f, NULL, err);
}

/* An upper bound of the bytes that the copy fills, from metadata alone. */
static int measure(struct rebase *rb, uint64_t *bytes, struct dr_error *err)
{
    struct rebase_fill f;
    struct dr_copy_item item = {0};
    int r;
    rebase_fill_init(&f, rb);
    *bytes = 0;
    while ((r = dr_pair_next(&f.pair, &item, err)) > 0)
        *bytes += item.len;
    return r;
}

struct count {
    struct rebase_fill fill; /* first: next and work are the copy's */
    uint64_t bytes, enough;  /* bytes: by several threads */
};

/* Whole units are filled, as far as the disk goes. */
static uint64_t filled_by(const struct count *c, const struct dr_copy_item *item, uint64_t from,
                          uint64_t to)
{
    uint64_t unit = c->fill.views ? c->fill.views->unit : c->fill.step;
    if (item->off % unit != 0)
        return to - from;
    uint64_t end = dr_min(item->off + dr_round_up(to, unit), c->fill.pair.size);
    return end - (item->off + dr_round_down(from, unit));
}

static int count_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    (void)err;
    struct count *c = user;
    uint64_t at = dr_pair_differs(item, buf, 0, c->fill.step), sum = 0;
    while (at < item->len) {
        uint64_t end = differing_until(item, buf, at, c->fill.step);
        sum += filled_by(c, item, at, end);
        at = dr_pair_differs(item, buf, end, c->fill.step);
    }
    return __atomic_add_fetch(&c->bytes, sum, __ATOMIC_RELAXED) > c->enough;
}

/* The same by reading both parents, as the copy will: only asked when it may not fit, or when
 * somebody wants to know. 1 = it needs more than `room`. */
static int count_by_reading(struct rebase *rb, uint64_t room, uint64_t *bytes, struct dr_error *err)
{
    struct count c = {.enough = room};
    rebase_fill_init(&c.fill, rb);
    struct dr_copy_policy policy = {
        .user = &c,
        .next = fill_next,
        .work = fill_work,
        .emit = count_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rb->old, rb->above),
        .total = c.fill.pair.size,
        .silent = !rb->o->dry_run, /* else the copy reports all bytes */
    };
    int r = dr_copy_run(&policy, rb->job, err);
    *bytes = c.bytes;
    return r;
}

int rebase_count_fill(struct rebase *rb, uint64_t *bytes, struct dr_error *err)
{
    return count_by_reading(rb, UINT64_MAX, bytes, err);
}

int rebase_check_space(struct rebase *rb, struct dr_error *err)
{
    uint64_t need, room = dr_ops_image_space(rebase_overlay(rb));
    uint64_t size = rb->has_views ? rb->views.size : rebase_overlay(rb)->size;
    if (size <= room)
        return 0; /* whatever is in it: no need to look */
    uint64_t counted;
    int r = measure(rb, &need, err);
    if (r == 0 && need > room)
        r = count_by_reading(rb, room, &counted, err);
    if (r > 0)
        r = dr_fail(err, ENOSPC, "%s: needs up to %llu bytes, its file system has %llu free",
                    rb->path, (unsigned long long)need, (unsigned long long)room);
    return r;
}

/* ------------------------------------------------------------------ zeros of its own
 *
 * Without parents every hole reads as zeros; an image that keeps its disk in a plain file says so
 * itself, so that nothing but that file is needed. */

#define OWN_STEP (UINT64_C(64) << 20) /* what one worker takes at a time; nothing is read */

static int own_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct dr_walk *w = user;
    for (uint64_t off = w->run.end; off < w->size; off = w->run.end) {
        int r = dr_walk_to(w, off, err);
        if (r < 0)
            return r;
        if (w->run.kind != DR_RUN_HOLE) {
            item->passed += w->run.end - off;
            continue;
        }
        w->run.end = dr_min(w->run.end, dr_round_down(off, OWN_STEP) + OWN_STEP);
        item->off = off;
        item->aux[0] = w->run.end - off; /* not len: zeroing is not charged against the rate */
        item->passed += item->aux[0];
        return 1;
    }
    return 0;
}

static int own_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                    struct dr_error *err)
{
    (void)buf;
    const struct dr_walk *w = user;
    return dr_chain_fill(w->chain, 0, NULL, item->off, item->aux[0], err);
}

static int own_zeros(struct rebase *rb, struct dr_error *err)
{
    const struct dr_image *image = rebase_overlay(rb);
    struct dr_walk walk;
    if (rb->name || !image->fmt->plain || !image->fmt->plain(image))
        return 0;
    dr_walk_init(&walk, rb->old, 0, 1, image->size);
    struct dr_copy_policy policy = {
        .user = &walk,
        .next = own_next,
        .emit = own_emit,
        .total = walk.size,
        .silent = true, /* the copy has reported all bytes */
    };
    return dr_copy_run(&policy, rb->job, err);
}

int rebase_own_rest(struct rebase *rb, struct dr_error *err)
{
    uint64_t off = 0, end;
    int r = 0;
    while (r == 0 && rb->dirty.disk && dr_dirty_take(&rb->dirty, &off, &end, UINT64_MAX)) {
        r = dr_chain_fill(rb->old, 0, NULL, off, end - off, err);
        off = end;
    }
    return r;
}

/* ------------------------------------------------------------------ all of it */

int rebase_fill(struct rebase *rb, struct dr_error *err)
{
    int r = rb->o->compress ? rebase_fill_coded(rb, err) : copy(rb, err);
    if (rb->has_views) {
        int ended = dr_image_views_end(rebase_overlay(rb), r == 0 ? err : NULL);
        rb->has_views = false;
        r = r < 0 ? r : ended;
    }
    return r < 0 ? r : own_zeros(rb, err);
}
