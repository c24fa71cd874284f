/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* rebase: give an image another parent without changing a byte that reads through it.
 *
 * Everything that can be refused is refused first. Then what the old parents show and the new ones
 * do not is filled into the image, all of it is made durable, and only then the name is switched.
 * Killed at any point the image reads the same, and doing it again goes on: what was filled is no
 * hole any more.
 *
 * Other threads may read and write the disk meanwhile. A fill changes nothing but holes, which it
 * looks at under the unit's lock, so what a guest writes stays. Only for the switch, the record on
 * disk and the chain in memory, requests are held up. */
#include "base/cleanup.h"
#include "ops/dirty.h"
#include "ops/ops-internal.h"

struct rebase {
    struct dr_fs *fs;
    const struct dr_rebase_options *o;
    struct dr_job *job;
    bool shared;             /* other threads may use the disk */
    const char *path, *name; /* name NULL = no parent */
    char *where;             /* of the new parent */
    struct dr_disk *disk;
    struct dr_chain *old;   /* the overlay on its old parents */
    struct dr_disk *parent; /* the new parents when they are not among the old ones */
    struct dr_chain *above; /* the chain that holds the new parent, or NULL */
    size_t above_first;
    struct dr_dirty dirty; /* what the guest changes, where that can undo what was filled */
};

static struct dr_image *overlay(const struct rebase *rb)
{
    return rb->old->images[0];
}

static struct dr_image *new_parent(const struct rebase *rb)
{
    return rb->above ? rb->above->images[rb->above_first] : NULL;
}

/* ------------------------------------------------------------------ what may be refused */

static int check_overlay(const struct rebase *rb, struct dr_error *err)
{
    struct dr_image *image = overlay(rb);
    if (!(image->fmt->flags & DR_FORMAT_BACKING) || !image->fmt->set_backing)
        return dr_fail(err, ENOTSUP, "%s: %s images have no backing file to change", rb->path,
                       image->fmt->name);
    if (!rb->o->dry_run && !image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", rb->path);
    if (rb->shared && !rb->o->unsafe && image->backing_name && rb->old->n == 1)
        return dr_fail(err, EINVAL,
                       "%s: was opened without its backing file %s: nothing to copy from", rb->path,
                       image->backing_name);
    if (rb->o->unsafe || (!rb->name && !image->backing_name))
        return 0;
    return dr_ops_refuse_snapshots(image, "another backing file", err);
}

/* The new parent may be one of the old ones: then its images are there already. */
static int find_in_chain(struct rebase *rb, struct dr_error *err)
{
    struct dr_file_id id;
    int r = dr_name_identify(rb->fs, rb->where, &id, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: the new backing file", rb->path);
    struct dr_chain *chain = rb->old;
    if (dr_same_id(dr_image_id(overlay(rb)), id))
        return dr_fail(err, ELOOP, "%s: cannot be its own backing file", rb->path);
    for (unsigned i = 0; i < overlay(rb)->n_files; i++)
        if (dr_same_id(overlay(rb)->files[i]->id, id))
            return dr_fail(err, ELOOP, "%s: %s holds its own data and cannot be its backing file",
                           rb->path, rb->where);
    for (size_t i = 1; i < chain->n; i++) {
        if (!dr_same_id(dr_image_id(chain->images[i]), id))
            continue;
        const char *is = chain->images[i]->fmt->name, *given = rb->o->backing_format;
        if (given && strcmp(given, is) != 0)
            return dr_fail(err, EINVAL, "%s: the new backing file %s is open as %s, not as %s",
                           rb->path, rb->where, is, given);
        rb->above = chain;
        rb->above_first = i;
    }
    return 0;
}

static int refuse_loop(const struct rebase *rb, const struct dr_chain *chain, struct dr_error *err)
{
    for (size_t i = 0; i < chain->n; i++)
        if (dr_same_id(dr_image_id(chain->images[i]), dr_image_id(overlay(rb))))
            return dr_fail(err, ELOOP, "%s: is itself a backing file of %s: a loop", rb->path,
                           rb->where);
    return 0;
}

/* Locks would refuse the overlay as its own ancestor too, without a reason. */
static int look_for_loop(const struct rebase *rb, const struct dr_open_options *as,
                         struct dr_error *err)
{
    struct dr_open_options open = *as;
    open.flags |= DR_OPEN_NO_LOCK | DR_OPEN_FORCE_SHARE;
    CLEANUP_DISK struct dr_disk *disk = NULL;
    int r = dr_open_fs(rb->fs, rb->where, &open, &disk, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot open the new backing file", rb->path);
    return refuse_loop(rb, disk->chain, err);
}

static int open_parent(struct rebase *rb, struct dr_error *err)
{
    struct dr_open_options open = rb->o->open;
    open.backing = open.backing_format = NULL;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED | DR_OPEN_NO_BACKING);
    open.flags |= rb->o->force_share ? DR_OPEN_FORCE_SHARE : 0u;
    int r = dr_ops_parent_format(rb->fs, overlay(rb)->fmt, rb->path, rb->name,
                                 rb->o->backing_format, &open.format, err);
    if (r == 0)
        r = dr_gate_check(rb->fs, rb->path, rb->where, &open, err);
    if (r == 0)
        r = find_in_chain(rb, err);
    if (r < 0 || rb->above)
        return r;
    r = look_for_loop(rb, &open, err);
    if (r < 0)
        return r;
    r = dr_open_fs(rb->fs, rb->where, &open, &rb->parent, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot open the new backing file", rb->path);
    rb->above = rb->parent->chain;
    return dr_chain_check_length(rb->path, rb->above->n + 1, err);
}

static const char *recorded_format(const struct rebase *rb)
{
    if (!rb->name || rb->o->backing_format)
        return rb->name ? rb->o->backing_format : NULL;
    return overlay(rb)->fmt->parent_format;
}

static int set_backing(struct rebase *rb, unsigned flags, struct dr_error *err)
{
    struct dr_image *image = overlay(rb);
    return dr_image_set_backing(image, new_parent(rb), rb->name, recorded_format(rb), flags, err);
}

static void warn_about_sizes(const struct rebase *rb)
{
    const struct dr_image *parent = new_parent(rb);
    if (parent && parent->size != overlay(rb)->size)
        dr_job_message(rb->job, "%s has %llu bytes, its new backing file %s %llu", rb->path,
                       (unsigned long long)overlay(rb)->size, parent->path,
                       (unsigned long long)parent->size);
}

/* ------------------------------------------------------------------ the copy */

/* What a run that is killed has to do again at most: the metadata of what was filled waits in
 * memory until it is flushed. */
#define SAVE_EVERY (UINT64_C(128) << 20)

struct fill {
    struct dr_pair_walk pair; /* a = old view, b = new view, mask = the overlay itself */
    struct dr_dirty *rest;    /* NULL, or: go on with what is dirty there */
    struct dr_chain *chain;
    uint64_t step;
    uint64_t unsaved; /* bytes filled since the last flush; by several threads */
};

static void fill_init(struct fill *f, const struct rebase *rb)
{
    struct dr_chain *old = rb->old;
    uint64_t size = overlay(rb)->size;
    *f = (struct fill){.chain = old, .step = dr_stock_block(old, 0, 4096)};
    f->pair.size = size;
    f->pair.masked = true;
    dr_walk_init(&f->pair.mask, old, 0, 1, size);
    dr_walk_init(&f->pair.a, old, 1, old->n, size);
    dr_walk_init(&f->pair.b, rb->above, rb->above_first, rb->above ? rb->above->n : 0, size);
}

static int fill_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct fill *f = user;
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
    return dr_pair_read(&((struct fill *)user)->pair, item, buf, err);
}

/* From at on, how many steps in a row differ? */
static uint64_t differing_until(const struct dr_copy_item *item, uint8_t *const *buf, uint64_t at,
                                uint64_t step)
{
    while (at < item->len && dr_pair_differs(item, buf, at, step) == at)
        at += dr_min(step, item->len - at);
    return at;
}

static int save(struct fill *f, uint64_t filled, struct dr_error *err)
{
    if (__atomic_add_fetch(&f->unsaved, filled, __ATOMIC_RELAXED) < SAVE_EVERY ||
        __atomic_exchange_n(&f->unsaved, 0, __ATOMIC_RELAXED) < SAVE_EVERY)
        return 0; /* the second: another thread was faster */
    return dr_chain_flush(f->chain, 0, err);
}

static int fill_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct fill *f = user;
    uint64_t filled = 0;
    int r = 0;
    uint64_t at = dr_pair_differs(item, buf, 0, f->step);
    while (at < item->len && r == 0) {
        uint64_t end = differing_until(item, buf, at, f->step);
        const uint8_t *old = item->kind == DR_ITEM_READ_B ? NULL : buf[0] + at;
        r = dr_chain_fill(f->chain, 0, old, item->off + at, end - at, err);
        filled += end - at;
        at = dr_pair_differs(item, buf, end, f->step);
    }
    return r < 0 ? r : save(f, filled, err);
}

static int run_fill(struct rebase *rb, struct fill *f, struct dr_job *job, struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = f,
        .next = fill_next,
        .work = fill_work,
        .emit = fill_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rb->old, rb->above),
        .total = overlay(rb)->size,
    };
    return dr_copy_run(&policy, job, err);
}

static int copy(struct rebase *rb, struct dr_error *err)
{
    struct fill f;
    fill_init(&f, rb);
    return run_fill(rb, &f, rb->job, err);
}

/* With the gate closed: the same for the ranges that the guest has changed since. No job: nobody
 * may pause it here. */
static int copy_rest(struct rebase *rb, struct dr_error *err)
{
    struct fill f;
    if (!rb->dirty.disk)
        return 0;
    fill_init(&f, rb);
    f.rest = &rb->dirty;
    f.pair.size = 0;
    return run_fill(rb, &f, NULL, err);
}

/* An upper bound of the bytes that the copy fills, from metadata alone. */
static int measure(struct rebase *rb, uint64_t *bytes, struct dr_error *err)
{
    struct fill f;
    struct dr_copy_item item = {0};
    int r;
    fill_init(&f, rb);
    *bytes = 0;
    while ((r = dr_pair_next(&f.pair, &item, err)) > 0)
        *bytes += item.len;
    return r;
}

struct count {
    struct fill fill;       /* first: next and work are the copy's */
    uint64_t bytes, enough; /* bytes: by several threads */
};

static int count_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    (void)err;
    struct count *c = user;
    uint64_t at = dr_pair_differs(item, buf, 0, c->fill.step), sum = 0;
    while (at < item->len) {
        uint64_t end = differing_until(item, buf, at, c->fill.step);
        sum += end - at;
        at = dr_pair_differs(item, buf, end, c->fill.step);
    }
    return __atomic_add_fetch(&c->bytes, sum, __ATOMIC_RELAXED) > c->enough;
}

/* The same by reading both parents, as the copy will: only asked when it may not fit. 1 = it needs
 * more than there is. */
static int does_not_fit(struct rebase *rb, uint64_t room, struct dr_error *err)
{
    struct count c = {.enough = room};
    fill_init(&c.fill, rb);
    struct dr_copy_policy policy = {
        .user = &c,
        .next = fill_next,
        .work = fill_work,
        .emit = count_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(rb->old, rb->above),
        .total = c.fill.pair.size,
        .silent = true, /* the copy reports all bytes */
    };
    return dr_copy_run(&policy, rb->job, err);
}

static int check_space(struct rebase *rb, struct dr_error *err)
{
    uint64_t need, room = dr_ops_image_space(overlay(rb));
    if (overlay(rb)->size <= room && !rb->o->dry_run)
        return 0; /* whatever is in it: no need to look */
    int r = measure(rb, &need, err);
    if (r == 0 && need > room)
        r = does_not_fit(rb, room, err);
    if (r < 0)
        return r;
    if (r > 0)
        return dr_fail(err, ENOSPC, "%s: needs up to %llu bytes, its file system has %llu free",
                       rb->path, (unsigned long long)need, (unsigned long long)room);
    if (rb->o->dry_run)
        dr_job_message(rb->job, "%s: up to %llu bytes have to be copied, %llu are free", rb->path,
                       (unsigned long long)need, (unsigned long long)room);
    return 0;
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
    const struct dr_image *image = overlay(rb);
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

/* ------------------------------------------------------------------ giving up what is equal */

struct drop {
    struct dr_pair_walk pair; /* mask = the image's own, pos = how far it was looked at */
    struct dr_chain *chain;
    uint64_t size, unit;
    bool shared;
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

static int drop_from(const struct rebase *rb, struct dr_chain *chain, struct dr_error *err)
{
    struct drop d = {.chain = chain, .size = chain->images[0]->size, .shared = rb->shared};
    d.unit = dr_stock_block(chain, 0, 512);
    dr_walk_init(&d.pair.mask, chain, 0, 1, d.size);
    struct dr_copy_policy policy = {
        .user = &d,
        .next = drop_next,
        .work = drop_work,
        .emit = drop_emit,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth(chain),
        .total = d.size,
    };
    int r = dr_copy_run(&policy, rb->job, err);
    return r < 0 ? r : dr_chain_flush(chain, 0, err);
}

static int drop_equal(const struct rebase *rb, struct dr_error *err)
{
    if (!rb->o->drop_equal || !rb->name)
        return 0;
    struct dr_chain *chain = dr_disk_chain(rb->disk);
    int r = chain->n < 2 ? 0 : drop_from(rb, chain, err);
    dr_chain_unref(chain, NULL);
    return r < 0 ? dr_prefix(err, r, "%s: is rebased, but what equals the parent stays", rb->path)
                 : 0;
}

/* ------------------------------------------------------------------ the switch */

/* The overlay on its new parents. */
static int make_chain(const struct rebase *rb, struct dr_chain **chain, struct dr_error *err)
{
    size_t below = rb->above ? rb->above->n - rb->above_first : 0;
    CLEANUP_FREE struct dr_image **images = calloc(below + 1, sizeof(struct dr_image *));
    *chain = NULL;
    if (!images)
        return dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
    images[0] = dr_image_ref(overlay(rb));
    for (size_t i = 0; i < below; i++)
        images[i + 1] = dr_image_ref(rb->above->images[rb->above_first + i]);
    *chain = dr_chain_new(images, below + 1);
    return *chain ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
}

static int switch_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    struct dr_chain *next = NULL;
    int r = make_chain(rb, &next, err);
    if (r == 0)
        r = copy_rest(rb, err);
    if (r == 0)
        r = dr_chain_flush(present, 0, err);
    if (r == 0)
        r = set_backing(rb, 0, err);
    if (r == 0)
        *fresh = DR_STEAL(next);
    dr_chain_unref(next, NULL);
    return r;
}

/* Of a parent that was forced upon the image only the name is changed: whoever has the disk open
 * goes on with the old parents. */
static int record_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    (void)fresh;
    int r = dr_chain_flush(present, 0, err);
    return r < 0 ? r : set_backing(rb, 0, err);
}

static int switch_parent(struct rebase *rb, struct dr_error *err)
{
    /* A process that wrote the new parents may have left them in memory. */
    int r = rb->above ? dr_chain_harden(rb->above, rb->above_first, err) : 0;
    if (r == 0)
        r = dr_job_rest(rb->job, err);
    if (r < 0)
        return r;
    uint64_t pause = 0;
    r = dr_disk_quiesce(rb->disk, rb->o->unsafe && rb->o->force ? record_step : switch_step, rb,
                        &pause, err);
    dr_job_held(rb->job, pause);
    return r;
}

/* ------------------------------------------------------------------ the two ways */

/* A disk without a parent may forget what its guest discards: the units are holes again, and would
 * show the new parent. */
static int watch_discards(struct rebase *rb, struct dr_error *err)
{
    if (!rb->shared || !rb->name || rb->old->n > 1)
        return 0;
    return dr_dirty_begin(&rb->dirty, rb->disk, err);
}

static int rebase_safe(struct rebase *rb, struct dr_error *err)
{
    int r = rb->name ? open_parent(rb, err) : 0;
    if (r == 0)
        r = set_backing(rb, DR_TRY, err);
    if (r == 0)
        r = check_space(rb, err);
    if (r < 0 || rb->o->dry_run)
        return r;
    warn_about_sizes(rb);
    r = watch_discards(rb, err);
    if (r == 0)
        r = dr_image_harden(overlay(rb), err); /* what a rebase that was killed has done */
    if (r == 0)
        r = copy(rb, err);
    if (r == 0)
        r = own_zeros(rb, err);
    if (r == 0)
        r = switch_parent(rb, err);
    dr_dirty_end(&rb->dirty);
    return r < 0 ? r : drop_equal(rb, err);
}

/* With force: open the parent alone, for its id, and do without it if it does not open. */
static void open_parent_forced(struct rebase *rb)
{
    struct dr_open_options open = rb->o->open;
    const struct dr_format *fmt = overlay(rb)->fmt;
    open.format = rb->o->backing_format ? rb->o->backing_format
                  : fmt->parent_format  ? fmt->parent_format
                                        : fmt->default_parent; /* never found out */
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    open.flags |= DR_OPEN_NO_BACKING | DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    struct dr_file_id id;
    if (dr_name_identify(rb->fs, rb->where, &id, NULL) < 0 ||
        dr_same_id(id, dr_image_id(overlay(rb))))
        return;
    if (dr_open_fs(rb->fs, rb->where, &open, &rb->parent, NULL) == 0)
        rb->above = rb->parent->chain;
}

static int rebase_unsafe(struct rebase *rb, struct dr_error *err)
{
    int r = 0;
    if (rb->name && rb->o->force)
        open_parent_forced(rb);
    else if (rb->name)
        r = open_parent(rb, err);
    if (r == 0)
        r = set_backing(rb, DR_TRY, err);
    if (r < 0 || rb->o->dry_run)
        return r;
    warn_about_sizes(rb);
    return switch_parent(rb, err);
}

/* ------------------------------------------------------------------ on an open disk, and by path
 */

static int rebase_claimed(struct rebase *rb, struct dr_error *err)
{
    rb->old = dr_disk_chain(rb->disk);
    rb->path = overlay(rb)->path;
    rb->name = rb->o->backing && *rb->o->backing ? rb->o->backing : NULL;
    int r = check_overlay(rb, err);
    if (r == 0 && rb->name) {
        rb->where = dr_ops_resolve(rb->path, rb->name);
        r = rb->where ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
    }
    if (r == 0)
        r = rb->o->unsafe ? rebase_unsafe(rb, err) : rebase_safe(rb, err);
    dr_ops_close(&rb->parent, NULL);
    int closed = dr_chain_unref(rb->old, r == 0 ? err : NULL);
    free(rb->where);
    return r < 0 ? r : closed;
}

int dr_ops_rebase(struct dr_disk *disk, const struct dr_rebase_options *options, bool shared,
                  struct dr_job *job, struct dr_error *err)
{
    struct rebase rb = {.fs = disk->fs, .o = options, .job = job, .disk = disk, .shared = shared};
    int r = dr_disk_claim(disk, "rebase", err);
    if (r < 0)
        return r;
    r = rebase_claimed(&rb, err);
    dr_disk_unclaim(disk);
    return r;
}

int dr_disk_rebase(struct dr_disk *disk, const struct dr_rebase_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE(options->backing, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_ops_rebase(disk, options, true, job, err));
}

int dr_rebase_fs(struct dr_fs *fs, const char *path, const struct dr_rebase_options *options,
                 struct dr_job *job, struct dr_error *err)
{
    struct dr_open_options open = options->open;
    struct dr_disk *disk = NULL;
    /* a rehearsal needs no more than reading */
    open.flags |= options->dry_run ? 0u : DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    open.flags |= options->unsafe ? DR_OPEN_NO_BACKING : 0u;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = dr_ops_rebase(disk, options, false, job, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_rebase(const char *path, const struct dr_rebase_options *options, struct dr_job *job,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE(options->backing, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_rebase_fs(dr_fs_posix(), path, options, job, err));
}
