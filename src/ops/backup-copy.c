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

/* [off, end) of the disk, which data has; NULL: zeros. */
static int write_part(struct dr_frozen *f, uint64_t off, uint64_t end, uint8_t *data,
                      struct dr_error *err)
{
    uint8_t *const part[DR_COPY_BUFFERS] = {data};
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

static int write_changed(struct dr_frozen *f, uint64_t off, uint64_t end, uint8_t *data,
                         struct dr_error *err)
{
    const struct dr_changed *c = f->changed;
    int r = 0;
    for (size_t i = changed_from(c, off); r == 0 && i < c->n && c->list[i].off < end; i++) {
        uint64_t from = dr_max(off, c->list[i].off);
        uint64_t to = dr_min(end, c->list[i].off + c->list[i].len);
        r = write_part(f, from, to, data ? data + (from - off) : NULL, err);
    }
    return r;
}

/* The grains [off, end), which data has; NULL: zeros. */
static int write_grains(struct dr_frozen *f, uint64_t off, uint64_t end, uint8_t *data,
                        struct dr_error *err)
{
    if (f->put)
        return data ? f->put(f->user, off, end - off, data, err) : 0;
    if (!f->target)
        return 0;
    if (f->changed)
        return write_changed(f, off, end, data, err);
    return data ? write_part(f, off, end, data, err) : 0;
}

/* ------------------------------------------------------------------ taking grains */

/* Up to DR_STOCK_BUFFER bytes of grains, from off on: which of them somebody has taken, and not
 * written yet, and which of these hold data, which stands in buf. */
struct held {
    uint64_t off;
    uint64_t taken, data; /* a bit for each grain */
    uint8_t *buf;
};

_Static_assert(DR_STOCK_BUFFER / GRAIN <= 64, "a bit for each grain of a buffer");

static uint64_t bits_of(const struct held *h, uint64_t off, uint64_t end)
{
    uint64_t first = (off - h->off) / GRAIN, n = dr_div_up(end - off, GRAIN);
    return (n < 64 ? (UINT64_C(1) << n) - 1 : UINT64_MAX) << first;
}

/* Read the grains [off, end), and find out which hold data. looked: it is known that all do. */
static int read_grains(struct dr_frozen *f, struct held *h, uint64_t off, uint64_t end, bool looked,
                       struct dr_error *err)
{
    uint8_t *buf = h->buf + (off - h->off);
    int r = dr_chain_read(f->chain, 0, buf, off, (size_t)(end - off), err);
    if (r < 0)
        return r;
    for (uint64_t next; off < end; off = next, buf = h->buf + (off - h->off)) {
        next = looked ? end : dr_min(grain_end(f, off), end);
        if (!looked && dr_is_zero(buf, (size_t)(next - off)))
            continue;
        h->data |= bits_of(h, off, next);
        atomic_fetch_add(&f->copied, next - off);
    }
    return 0;
}

enum known { KNOWN_DATA, KNOWN_ZEROS, NOT_KNOWN }; /* about grains, as far as metadata tells */

static int take_run(struct dr_frozen *f, struct held *h, uint64_t off, uint64_t end,
                    enum known known, struct dr_error *err)
{
    int r = known == KNOWN_ZEROS ? 0 : read_grains(f, h, off, end, known == KNOWN_DATA, err);
    if (r < 0)
        return r;
    for (uint64_t at = off, next; at < end; at = next) {
        next = grain_end(f, at);
        if (!f->sums)
            continue;
        r = dr_sums_put(f->sums, at, h->data & bits_of(h, at, next) ? h->buf + (at - h->off) : NULL,
                        next - at, err);
        if (r < 0)
            return r;
    }
    h->taken |= bits_of(h, off, end);
    dr_dirty_clear(&f->todo, off, end - off); /* from now on it may change */
    return 0;
}

/* ------------------------------------------------------------------ the spill */

#define ZEROS UINT32_MAX /* a slot: the grain held zeros, and nothing is stored */

static uint32_t *slot_of(const struct dr_frozen *f, uint64_t off)
{
    return &f->slots[off / GRAIN];
}

static bool is_spilled(const struct dr_frozen *f, uint64_t off)
{
    return f->spill && dr_dirty_any(&f->spilled, off, 1);
}

/* Is there anything that a guest must not change yet? */
static bool must_stay(const struct dr_frozen *f, uint64_t off, uint64_t len)
{
    uint64_t end = off + len;
    if (!f->spill)
        return dr_dirty_any(&f->todo, off, len);
    for (off = dr_dirty_next(&f->todo, dr_round_down(off, GRAIN)); off < end;
         off = dr_dirty_next(&f->todo, off + GRAIN))
        if (!is_spilled(f, off))
            return true;
    return false;
}

/* From off on, where a grain is left to take: how far those that are left are all in the spill, or
 * all on the disk. */
static uint64_t left_until(const struct dr_frozen *f, uint64_t off, uint64_t end, bool *spilled)
{
    *spilled = is_spilled(f, off);
    for (off = grain_end(f, off); off < end; off = grain_end(f, off))
        if (!dr_dirty_any(&f->todo, off, 1) || is_spilled(f, off) != *spilled)
            break;
    return dr_min(off, end);
}

/* Take the grains [off, end) out of the spill. */
static int take_spilled(struct dr_frozen *f, struct held *h, uint64_t off, uint64_t end,
                        struct dr_error *err)
{
    for (uint64_t next; off < end; off = next) {
        uint32_t slot = *slot_of(f, off);
        uint8_t *buf = slot == ZEROS ? NULL : h->buf + (off - h->off);
        next = grain_end(f, off);
        int r = buf ? dr_spill_get(f->spill, slot, buf, (size_t)(next - off), err) : 0;
        if (r == 0 && f->sums)
            r = dr_sums_put(f->sums, off, buf, next - off, err);
        if (r < 0)
            return r;
        h->taken |= bits_of(h, off, next);
        h->data |= buf ? bits_of(h, off, next) : 0;
        dr_dirty_clear(&f->todo, off, next - off);
        dr_dirty_clear(&f->spilled, off, next - off);
        if (buf)
            dr_spill_drop(f->spill, slot);
    }
    return 0;
}

/* Move what is left of the grains [off, end) to the spill; buf has room for them. -ENOSPC: some
 * were not moved. */
static int move_to_spill(struct dr_frozen *f, uint64_t off, uint64_t end, uint8_t *buf,
                         struct dr_error *err)
{
    int r = dr_chain_read(f->chain, 0, buf, off, (size_t)(end - off), err);
    for (uint64_t next; r == 0 && off < end; off = next, buf += GRAIN) {
        next = grain_end(f, off);
        *slot_of(f, off) = ZEROS;
        if (!dr_is_zero(buf, (size_t)(next - off))) {
            r = dr_spill_put(f->spill, buf, (size_t)(next - off), slot_of(f, off), err);
            atomic_fetch_add(&f->copied, r == 0 ? next - off : 0);
        }
        if (r == 0) /* from now on it may change */
            dr_dirty_set(&f->spilled, off, next - off);
    }
    return r;
}

static int spill(struct dr_frozen *f, uint64_t from, uint64_t end, uint8_t *buf,
                 struct dr_error *err)
{
    struct dr_range range;
    int r = 0;
    dr_range_lock(f->taking, &range, from, end - from, true);
    for (uint64_t off = dr_dirty_next(&f->todo, from), next; r == 0 && off < end;
         off = dr_dirty_next(&f->todo, dr_round_up(next, GRAIN))) {
        bool spilled;
        next = left_until(f, off, end, &spilled);
        if (!spilled)
            r = move_to_spill(f, off, next, buf, err);
    }
    dr_range_unlock(f->taking, &range);
    return r;
}

/* ------------------------------------------------------------------ taking what is left */

/* Take what is left of the grains [h->off, end). What is known of them is known of those that are
 * left, however long ago somebody looked: they are as they were at the instant. A guest does not
 * look: some file systems take long for it. What is spilled it leaves to the job. */
static int take(struct dr_frozen *f, struct held *h, uint64_t end, enum known known, bool guest,
                struct dr_error *err)
{
    struct dr_range range;
    int r = 0;
    dr_range_lock(f->taking, &range, h->off, end - h->off, true);
    for (uint64_t off = dr_dirty_next(&f->todo, h->off), next; r == 0 && off < end;
         off = dr_dirty_next(&f->todo, dr_round_up(next, GRAIN))) {
        bool spilled;
        next = left_until(f, off, end, &spilled);
        if (!spilled)
            r = take_run(f, h, off, next, known, err);
        else if (!guest)
            r = take_spilled(f, h, off, next, err);
    }
    dr_range_unlock(f->taking, &range);
    return r;
}

/* How far the grains from off on are alike in being taken and holding data. */
static uint64_t held_until(const struct dr_frozen *f, const struct held *h, uint64_t off,
                           uint64_t end)
{
    uint64_t first = bits_of(h, off, off + 1);
    uint64_t next = grain_end(f, off);
    for (; next < end; next = grain_end(f, next)) {
        uint64_t bit = bits_of(h, next, next + 1);
        if (!(h->taken & bit) != !(h->taken & first) || !(h->data & bit) != !(h->data & first))
            break;
    }
    return next;
}

/* Write what was taken. After a failure h has what is still to be written. */
static int write_held(struct dr_frozen *f, struct held *h, uint64_t end, struct dr_error *err)
{
    int r = 0;
    for (uint64_t off = h->off, next; r == 0 && off < end; off = next) {
        uint64_t bits;
        next = held_until(f, h, off, end);
        bits = bits_of(h, off, next);
        if (!(h->taken & bits))
            continue;
        r = write_grains(f, off, next, h->data & bits ? h->buf + (off - h->off) : NULL, err);
        if (r == 0) {
            h->taken &= ~bits;
            if (f->left)
                dr_dirty_clear(f->left, off, next - off);
        }
    }
    return r;
}

/* ------------------------------------------------------------------ the guest's side */

/* Copy the grains [from, end) straight to the target, for which the guest waits. */
static int copy_straight(struct dr_frozen *f, uint64_t from, uint64_t end, uint8_t *buf,
                         struct dr_error *err)
{
    struct held h = {.off = from, .buf = buf};
    int r = take(f, &h, end, NOT_KNOWN, true, err);
    return r < 0 ? r : write_held(f, &h, end, err);
}

static int save(struct dr_frozen *f, uint64_t from, uint64_t end, uint8_t *buf,
                struct dr_error *err)
{
    struct dr_error full = DR_ERROR_INIT;
    if (!f->spill)
        return copy_straight(f, from, end, buf, err);
    int r = spill(f, from, end, buf, &full);
    if (r == -ENOSPC && !dr_spill_fails_when_full(f->spill))
        return copy_straight(f, from, end, buf, err);
    return r < 0 ? dr_fail(err, -r, "%s", full.text) : 0;
}

static int save_before(struct dr_frozen *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    uint64_t from = dr_round_down(off, GRAIN), end = dr_min(dr_round_up(off + len, GRAIN), f->size);
    CLEANUP_FREE uint8_t *buf = malloc((size_t)dr_min(end - from, DR_STOCK_BUFFER));
    int r = buf ? 0 : dr_fail(err, ENOMEM, "out of memory to copy what a guest changes");
    for (uint64_t next; r == 0 && from < end; from = next) {
        next = dr_min(from + DR_STOCK_BUFFER, end);
        r = save(f, from, next, buf, err);
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
    if (!must_stay(f, off, len))
        return 0;
    int r = save_before(f, off, len, &why);
    if (r < 0)
        break_copy(f, r, &why);
    return 0;
}

/* ------------------------------------------------------------------ the job's side */

/* The job has passed so many bytes, of which it took some before, out of the spill. */
static void count_passed(struct dr_frozen *f, struct dr_copy_item *item, uint64_t bytes)
{
    uint64_t counted = dr_min(bytes, f->ahead);
    f->ahead -= counted;
    item->passed += bytes - counted;
}

/* Pass over what needs no copying: grains that are done, and those that lie in a hole. Where the
 * disk has a hole by now the spill may hold what it had. */
static int pass_over(struct dr_frozen *f, struct dr_copy_item *item, struct dr_error *err)
{
    while (f->pos < f->size) {
        uint64_t next = dr_min(dr_dirty_next(&f->todo, f->pos), f->size);
        if (next == f->pos && (f->changed || is_spilled(f, next)))
            return 0; /* what has become zeros is written, too */
        if (next == f->pos) {
            int r = dr_walk_to(&f->walk, f->pos, err);
            if (r < 0)
                return r;
            const struct dr_run *run = &f->walk.run;
            if (run->kind == DR_RUN_DATA)
                return 0;
            next = run->end >= f->size ? f->size : dr_round_down(run->end, GRAIN);
            if (f->spill)
                next = dr_min(next, dr_dirty_next(&f->spilled, f->pos));
            if (next <= f->pos)
                return 0; /* the grain is only in part a hole */
        }
        count_passed(f, item, next - f->pos);
        f->pos = next;
    }
    return 0;
}

/* What is in the spill goes before all else, so that there is room in it again. */
static bool next_spilled(struct dr_frozen *f, struct dr_copy_item *item)
{
    if (!f->spill)
        return false;
    uint64_t off = dr_dirty_next(&f->spilled, f->spill_pos);
    if (off >= f->size)
        off = dr_dirty_next(&f->spilled, 0);
    if (off >= f->size)
        return false;
    uint64_t limit = dr_min(dr_round_down(off, DR_STOCK_BUFFER) + DR_STOCK_BUFFER, f->size);
    uint64_t end = grain_end(f, off);
    while (end < limit && is_spilled(f, end))
        end = grain_end(f, end);
    item->off = off;
    item->len = end - off;
    item->kind = NOT_KNOWN;
    f->spill_pos = end;
    f->ahead += off >= f->pos ? item->len : 0;
    return true;
}

static int frozen_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct dr_frozen *f = user;
    bool data;
    uint64_t end;
    if (next_spilled(f, item))
        return 1;
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
    item->kind = data ? KNOWN_DATA : KNOWN_ZEROS;
    f->pos = end;
    return 1;
}

enum { AUX_TAKEN, AUX_DATA }; /* of struct held, for an item that is tried again */

static int frozen_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                       struct dr_error *err)
{
    struct dr_frozen *f = user;
    uint64_t end = item->off + item->len;
    struct held h = {.off = item->off,
                     .taken = item->aux[AUX_TAKEN],
                     .data = item->aux[AUX_DATA],
                     .buf = buf[0]};
    if (atomic_load(&f->broken))
        return 1; /* the end: dr_frozen_finish tells why */
    int r = take(f, &h, end, item->kind, false, err);
    item->writing = r == 0;
    if (r == 0)
        r = write_held(f, &h, end, err);
    item->aux[AUX_TAKEN] = h.taken;
    item->aux[AUX_DATA] = h.data;
    return r;
}

int dr_frozen_copy(struct dr_frozen *f, uint64_t before, uint64_t after, struct dr_job *job,
                   struct dr_error *err)
{
    const struct dr_copy_policy policy = {
        .user = f,
        .next = frozen_next,
        .work = frozen_work,
        .repeat = f->put && !f->put_again ? DR_COPY_ONCE : DR_COPY_RETRY,
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
    f->taking = dr_ranges_new();
    if (!f->taking)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    f->transfer = (struct dr_transfer){.dst = f->target,
                                       .sparse = DR_CONVERT_SPARSE_DEFAULT,
                                       .write_zeros = f->changed,
                                       .zero_flags = DR_MAY_UNMAP};
    if (f->target)
        f->transfer.block = dr_stock_block(f->target, 0, DR_CONVERT_SPARSE_DEFAULT);
    int r = dr_dirty_make(&f->todo, f->size, err);
    if (r < 0 || !f->spill)
        return r;
    f->slots = calloc((size_t)dr_div_up(f->size, GRAIN) + 1, sizeof(*f->slots));
    return f->slots ? dr_dirty_make(&f->spilled, f->size, err)
                    : dr_fail(err, ENOMEM, "out of memory for a backup");
}

int dr_frozen_now_quiet(struct dr_frozen *f, struct dr_chain *present, struct dr_error *err)
{
    const struct dr_hook hook = {.before = before_change, .user = f};
    int r = f->at_instant ? f->at_instant(f->user, present, err) : 0;
    if (r < 0)
        return r;
    f->chain = dr_chain_ref(present);
    if (!f->changed)
        dr_dirty_set(&f->todo, 0, f->size);
    for (size_t i = 0; f->changed && i < f->changed->n; i++)
        dr_dirty_set(&f->todo, f->changed->list[i].off, f->changed->list[i].len);
    for (size_t i = 0; f->left && f->changed && i < f->changed->n; i++)
        dr_dirty_set(f->left, f->changed->list[i].off, f->changed->list[i].len);
    dr_walk_init(&f->walk, f->chain, 0, f->chain->n, f->size);
    if (!present->images[0]->writable)
        return 0; /* nobody changes it */
    r = dr_disk_hook_quiet(f->disk, &hook, err);
    f->hooked = r == 0;
    return r;
}

struct instant {
    struct dr_frozen *const *all;
    size_t n, quiet; /* disks whose requests wait */
};

static int instant_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err);

static int hold_next(struct instant *i, uint64_t *pause, struct dr_error *err)
{
    return dr_disk_exchange(i->all[i->quiet]->disk, instant_step, i, pause, err);
}

/* Each disk's step holds the next one's requests, too. A failure leaves hooks, which
 * dr_frozen_finish and dr_frozen_end take away. */
static int instant_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    struct instant *i = user;
    (void)fresh;
    int r = dr_frozen_now_quiet(i->all[i->quiet++], present, err);
    return r < 0 || i->quiet == i->n ? r : hold_next(i, NULL, err);
}

int dr_frozen_now_all(struct dr_frozen *const *all, size_t n, struct dr_job *job,
                      struct dr_error *err)
{
    struct instant i = {.all = all, .n = n};
    uint64_t pause = 0;
    int r = hold_next(&i, &pause, err);
    dr_job_held(job, pause);
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
    dr_dirty_free(&f->spilled);
    free(f->slots);
    if (f->taking)
        dr_ranges_free(f->taking);
    pthread_mutex_destroy(&f->lock);
    *f = (struct dr_frozen){0};
}
