/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-copy.h"

#include "base/cleanup.h"

#define GRAIN DR_DIRTY_GRAIN

_Static_assert(GRAIN == DR_SUMS_GRAIN, "what is copied at once has one sum");

static uint64_t grain_end(const struct dr_frozen *f, uint64_t off)
{
    return dr_min(dr_round_down(off, GRAIN) + GRAIN, f->size);
}

/* The first failure counts. */
static void break_copy(struct dr_frozen *f, int r, const struct dr_error *why)
{
    DR_LOCK_SCOPE(&f->lock);
    if (atomic_load(&f->broken))
        return;
    f->error = *why;
    if (f->error.errnum == 0)
        dr_fail_errno(&f->error, -r, "copying before a write failed");
    atomic_store(&f->broken, true);
}

/* ------------------------------------------------------------------ copying grains */

/* Does the grain at off hold data, as far as metadata tells? */
static int look_at_grain(const struct dr_frozen *f, struct dr_walk *walk, uint64_t off, bool *data,
                         struct dr_error *err)
{
    *data = false;
    for (uint64_t end = grain_end(f, off); off < end && !*data; off = walk->run.end) {
        int r = dr_walk_to(walk, off, err);
        if (r < 0)
            return r;
        *data = walk->run.kind == DR_RUN_DATA;
    }
    return 0;
}

/* From off on, but not behind limit: how far grains are alike in holding data or none. */
static int alike_until(const struct dr_frozen *f, struct dr_walk *walk, uint64_t off,
                       uint64_t limit, bool *data, uint64_t *end, struct dr_error *err)
{
    bool next;
    int r = look_at_grain(f, walk, off, data, err);
    for (*end = grain_end(f, off); r == 0 && *end < limit; *end = grain_end(f, *end)) {
        r = look_at_grain(f, walk, *end, &next, err);
        if (r == 0 && next != *data)
            break;
    }
    return r;
}

/* [off, end) of the grains that begin at `base`, and are in buf. */
static int write_part(struct dr_frozen *f, uint64_t base, uint64_t off, uint64_t end, bool data,
                      uint8_t *const *buf, struct dr_error *err)
{
    uint8_t *const part[DR_COPY_BUFFERS] = {data ? buf[0] + (off - base) : NULL};
    struct dr_copy_item item = {.off = off, .len = end - off, .kind = DR_ITEM_COPY};
    item.aux[0] = item.len;
    if (!data)
        item.kind = DR_ITEM_ZERO;
    return dr_transfer_emit(&f->transfer, &item, part, err);
}

/* The first range of what has changed that ends behind off. */
static size_t changed_from(const struct dr_changed *c, uint64_t off)
{
    size_t low = 0, high = c->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (c->list[middle].off + c->list[middle].len <= off)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int write_changed(struct dr_frozen *f, uint64_t off, uint64_t end, bool data,
                         uint8_t *const *buf, struct dr_error *err)
{
    const struct dr_changed *c = f->changed;
    int r = 0;
    for (size_t i = changed_from(c, off); r == 0 && i < c->n && c->list[i].off < end; i++) {
        uint64_t from = dr_max(off, c->list[i].off);
        uint64_t to = dr_min(end, c->list[i].off + c->list[i].len);
        r = write_part(f, off, from, to, data, buf, err);
    }
    return r;
}

static int write_grains(struct dr_frozen *f, uint64_t off, uint64_t end, bool data,
                        uint8_t *const *buf, struct dr_error *err)
{
    if (!f->target)
        return 0;
    if (f->changed)
        return write_changed(f, off, end, data, buf, err);
    return data ? write_part(f, off, off, end, data, buf, err) : 0;
}

/* Copy the grains [off, end), which the caller has locked. buf has room for DR_STOCK_BUFFER bytes,
 * or for all of them. *writing: a failure is that of the target. */
static int copy_grains(struct dr_frozen *f, uint64_t off, uint64_t end, uint8_t *const *buf,
                       bool *writing, struct dr_error *err)
{
    struct dr_walk walk;
    dr_walk_init(&walk, f->chain, 0, f->chain->n, f->size);
    int r = 0;
    for (uint64_t next; r == 0 && off < end; off = next) {
        bool data;
        *writing = false;
        r = alike_until(f, &walk, off, dr_min(end, off + DR_STOCK_BUFFER), &data, &next, err);
        if (r == 0 && data)
            r = dr_chain_read(f->chain, 0, buf[0], off, (size_t)(next - off), err);
        if (r == 0)
            r = dr_sums_put(f->sums, off, data ? buf[0] : NULL, next - off, err);
        if (r < 0)
            return r;
        *writing = true;
        r = write_grains(f, off, next, data, buf, err);
        atomic_fetch_add(&f->copied, data ? next - off : 0);
    }
    return r;
}

/* Copy what is left to copy of the grains [from, to), and of no others. */
static int copy_left(struct dr_frozen *f, uint64_t from, uint64_t to, uint8_t *const *buf,
                     bool *writing, struct dr_error *err)
{
    struct dr_range range;
    int r = 0;
    dr_range_lock(f->copying, &range, from, to - from, true);
    for (uint64_t off = dr_dirty_next(&f->todo, from), end; r == 0 && off < to;
         off = dr_dirty_next(&f->todo, end)) {
        end = grain_end(f, off);
        while (end < to && dr_dirty_any(&f->todo, end, 1))
            end = grain_end(f, end);
        r = copy_grains(f, off, end, buf, writing, err);
        if (r == 0) /* the target has them: from now on they may change */
            dr_dirty_clear(&f->todo, off, end - off);
    }
    dr_range_unlock(f->copying, &range);
    return r;
}

/* ------------------------------------------------------------------ the guest's side */

static int copy_before(struct dr_frozen *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    uint64_t from = dr_round_down(off, GRAIN), end = dr_min(dr_round_up(off + len, GRAIN), f->size);
    CLEANUP_FREE uint8_t *buf = malloc((size_t)dr_min(end - from, DR_STOCK_BUFFER));
    bool writing;
    int r = buf ? 0 : dr_fail(err, ENOMEM, "out of memory to copy what a guest changes");
    for (uint64_t next; r == 0 && from < end; from = next) {
        next = dr_min(from + DR_STOCK_BUFFER, end);
        r = copy_left(f, from, next, &buf, &writing, err);
    }
    return r;
}

/* The disk's hook. The guest's request goes on, whatever becomes of the copy. */
static int before_change(void *user, struct dr_chain *chain, uint64_t off, uint64_t len,
                         struct dr_error *err)
{
    struct dr_frozen *f = user;
    struct dr_error why = DR_ERROR_INIT;
    (void)chain, (void)err;
    if (off >= f->size || atomic_load(&f->broken))
        return 0;
    len = dr_min(len, f->size - off);
    if (!dr_dirty_any(&f->todo, off, len))
        return 0;
    int r = copy_before(f, off, len, &why);
    if (r < 0)
        break_copy(f, r, &why);
    return 0;
}

/* ------------------------------------------------------------------ the job's side */

/* Pass over what needs no copying: grains that are done, and those that lie in a hole. */
static int pass_over(struct dr_frozen *f, struct dr_copy_item *item, struct dr_error *err)
{
    while (f->pos < f->size) {
        uint64_t next = dr_min(dr_dirty_next(&f->todo, f->pos), f->size);
        if (next == f->pos && f->changed)
            return 0; /* what has become zeros is written, too */
        if (next == f->pos) {
            int r = dr_walk_to(&f->walk, f->pos, err);
            if (r < 0)
                return r;
            const struct dr_run *run = &f->walk.run;
            if (run->kind == DR_RUN_DATA)
                return 0;
            next = run->end >= f->size ? f->size : dr_round_down(run->end, GRAIN);
            if (next <= f->pos)
                return 0; /* the grain is only in part a hole */
        }
        item->passed += next - f->pos;
        f->pos = next;
    }
    return 0;
}

static int frozen_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct dr_frozen *f = user;
    bool data;
    uint64_t end;
    int r = pass_over(f, item, err);
    if (r < 0 || f->pos >= f->size || atomic_load(&f->broken))
        return r;
    uint64_t limit = dr_min(dr_round_down(f->pos, DR_STOCK_BUFFER) + DR_STOCK_BUFFER, f->size);
    for (end = grain_end(f, f->pos); end < limit && dr_dirty_any(&f->todo, end, 1);)
        end = grain_end(f, end);
    limit = dr_min(limit, end);
    r = alike_until(f, &f->walk, f->pos, limit, &data, &end, err);
    if (r < 0)
        return r;
    item->off = f->pos;
    item->len = end - f->pos;
    f->pos = end;
    return 1;
}

/* The walk told of this item without a lock: now it is locked, and looked at again. */
static int frozen_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    struct dr_frozen *f = user;
    if (atomic_load(&f->broken))
        return 1; /* the end: dr_frozen_finish tells why */
    return copy_left(f, item->off, item->off + item->len, buf, &item->writing, err);
}

int dr_frozen_copy(struct dr_frozen *f, uint64_t before, uint64_t after, struct dr_job *job,
                   struct dr_error *err)
{
    const struct dr_copy_policy policy = {
        .user = f,
        .next = frozen_next,
        .work = frozen_work,
        .repeat = DR_COPY_RETRY,
        .buffers = 1,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(f->chain, f->target),
        .total = f->size,
        .before = before,
        .after = after,
    };
    int r = dr_copy_run(&policy, job, err);
    return r < 0 ? r : 0;
}

/* ------------------------------------------------------------------ beginning and end */

int dr_frozen_begin(struct dr_frozen *f, struct dr_error *err)
{
    pthread_mutex_init(&f->lock, NULL);
    f->copying = dr_ranges_new();
    if (!f->copying)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    f->transfer = (struct dr_transfer){.dst = f->target,
                                       .sparse = DR_CONVERT_SPARSE_DEFAULT,
                                       .write_zeros = f->changed,
                                       .zero_flags = DR_MAY_UNMAP};
    if (f->target)
        f->transfer.block = dr_stock_block(f->target, 0, DR_CONVERT_SPARSE_DEFAULT);
    return dr_dirty_make(&f->todo, f->size, err);
}

int dr_frozen_now(struct dr_frozen *f, struct dr_chain *present, struct dr_error *err)
{
    const struct dr_hook hook = {.before = before_change, .user = f};
    f->chain = dr_chain_ref(present);
    if (!f->changed)
        dr_dirty_set(&f->todo, 0, f->size);
    for (size_t i = 0; f->changed && i < f->changed->n; i++)
        dr_dirty_set(&f->todo, f->changed->list[i].off, f->changed->list[i].len);
    dr_walk_init(&f->walk, f->chain, 0, f->chain->n, f->size);
    if (!present->images[0]->writable)
        return 0; /* nobody changes it */
    int r = dr_disk_hook_quiet(f->disk, &hook, err);
    f->hooked = r == 0;
    return r;
}

int dr_frozen_finish(struct dr_frozen *f, struct dr_error *err)
{
    if (f->hooked)
        dr_disk_unhook(f->disk, f);
    f->hooked = false;
    if (!atomic_load(&f->broken))
        return 0;
    if (err && err->errnum == 0)
        *err = f->error;
    return -f->error.errnum;
}

void dr_frozen_end(struct dr_frozen *f)
{
    if (!f->disk)
        return; /* it was never begun */
    if (f->hooked)
        dr_disk_unhook(f->disk, f);
    if (f->chain)
        dr_chain_unref(f->chain, NULL);
    dr_dirty_free(&f->todo);
    if (f->copying)
        dr_ranges_free(f->copying);
    pthread_mutex_destroy(&f->lock);
    *f = (struct dr_frozen){0};
}
