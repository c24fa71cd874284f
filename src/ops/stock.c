/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/stock.h"

#include "base/cleanup.h"

#define SECTOR       512u
#define SALVAGE_UNIT 65536u
#define POLITE_ZERO  (UINT64_C(16) << 20) /* bytes of zeros in one item beside a guest */

/* ------------------------------------------------------------------ walking */

void dr_walk_init(struct dr_walk *w, struct dr_chain *chain, size_t first, size_t last,
                  uint64_t size)
{
    *w = (struct dr_walk){.chain = chain, .first = first, .last = last, .size = size};
    if (chain && first >= chain->n)
        w->chain = NULL;
}

static void set_run(struct dr_walk *w, uint64_t off, uint64_t len, enum dr_run_kind kind)
{
    w->run = (struct dr_run){.off = off, .end = off + len, .kind = kind, .owner = w->last};
}

static int place_to_run(struct dr_walk *w, uint64_t off, struct dr_place *place,
                        struct dr_error *err)
{
    bool zero = false;
    int r = 0;
    /* only where holes of the file are the image's zeros: elsewhere they are rare, and finding the
     * next one can cost the file system a walk over the whole file */
    if (place->ext.kind == DR_DATA && place->ext.flat)
        r = dr_place_sparse(place, &zero, err);
    if (r < 0)
        return r;
    const struct dr_extent *ext = &place->ext;
    if (ext->kind == DR_HOLE)
        set_run(w, off, ext->len, DR_RUN_HOLE);
    else if (ext->kind == DR_ZERO || zero)
        set_run(w, off, ext->len, DR_RUN_ZERO);
    else
        set_run(w, off, ext->len, DR_RUN_DATA);
    w->run.owner = place->owner;
    w->run.past_end = place->past_end;
    if (w->run.kind == DR_RUN_DATA && ext->kind == DR_DATA) {
        w->run.file = ext->file;
        w->run.host = ext->host;
    }
    return 0;
}

int dr_walk_to(struct dr_walk *w, uint64_t off, struct dr_error *err)
{
    if (off >= w->run.off && off < w->run.end)
        return 0;
    if (!w->chain) {
        set_run(w, off, w->size - off, DR_RUN_HOLE);
        return 0;
    }
    uint64_t own = w->chain->images[w->first]->size;
    if (off >= own) {
        set_run(w, off, w->size - off, DR_RUN_ZERO);
        w->run.owner = w->first;
        w->run.past_end = true;
        return 0;
    }
    struct dr_place place;
    uint64_t len = dr_min(own, w->size) - off;
    int r = w->last >= w->chain->n
                ? dr_chain_map(w->chain, w->first, off, len, &place, err)
                : dr_chain_map_part(w->chain, w->first, w->last, off, len, &place, err);
    if (r < 0)
        return r;
    r = place_to_run(w, off, &place, err);
    dr_place_done(&place);
    return r;
}

bool dr_run_same_place(const struct dr_run *a, const struct dr_run *b, uint64_t off)
{
    return a->kind == DR_RUN_DATA && b->kind == DR_RUN_DATA && a->file &&
           dr_file_same(a->file, b->file) && a->host + (off - a->off) == b->host + (off - b->off);
}

uint64_t dr_stock_block(struct dr_chain *chain, size_t at, uint64_t lowest)
{
    struct dr_image *image = chain->images[at];
    struct dr_extent ext;
    uint64_t uoff = 0, ulen = 0;
    if (image->size == 0 || !image->fmt->unit)
        return lowest;
    if (dr_image_map(image, 0, image->size, &ext, NULL) == 0 && ext.kind == DR_DATA && ext.flat)
        return lowest;
    image->fmt->unit(image, 0, &uoff, &ulen);
    if (uoff != 0 || ulen == 0 || (ulen & (ulen - 1)) != 0 || ulen < lowest)
        return lowest;
    return dr_min(ulen, DR_STOCK_BUFFER);
}

unsigned dr_stock_depth(const struct dr_chain *chain)
{
    uint64_t depth = 0;
    for (size_t i = 0; chain && i < chain->n; i++) {
        struct dr_image *image = chain->images[i];
        DR_LOCK_SCOPE(&image->lock); /* a driver may replace a file */
        for (unsigned f = 0; f < image->n_files; f++)
            depth = dr_max(depth, image->files[f]->depth);
    }
    return (unsigned)depth;
}

/* ------------------------------------------------------------------ transfer: next */

enum plan { PLAN_SKIP, PLAN_COPY, PLAN_ZERO };

static enum plan plan_of(const struct dr_transfer *t, const struct dr_run *run)
{
    if (run->kind == DR_RUN_DATA || t->all)
        return PLAN_COPY;
    if (run->kind == DR_RUN_HOLE && !t->hole_is_zero)
        return PLAN_SKIP;
    return t->write_zeros ? PLAN_ZERO : PLAN_SKIP;
}

/* How far reaches what one damaged entry at off may tell of? To the end of the smallest unit in the
 * chain; behind it, another extent may begin, or a parent end. */
static uint64_t salvage_end(const struct dr_chain *chain, uint64_t off)
{
    uint64_t end = dr_round_down(off, SALVAGE_UNIT) + SALVAGE_UNIT;
    for (size_t i = 0; i < chain->n; i++) {
        const struct dr_image *image = chain->images[i];
        uint64_t start = 0, len = 0;
        if (off >= image->size)
            continue;
        end = dr_min(end, image->size);
        if (image->fmt->unit)
            image->fmt->unit(image, off, &start, &len);
        if (start + len > off)
            end = dr_min(end, start + len);
    }
    return end;
}

/* A damaged table costs a salvage one unit, not the disk. */
int dr_transfer_walk(struct dr_transfer *t, uint64_t off, struct dr_error *err)
{
    if (!t->lost)
        return dr_walk_to(&t->walk, off, err);
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_walk_to(&t->walk, off, &why);
    if (r == 0)
        return 0;
    if (!dr_is_damage(r))
        return dr_fail(err, -r, "%s", why.text);
    uint64_t end = dr_min(t->walk.size, salvage_end(t->walk.chain, off));
    set_run(&t->walk, off, end - off, DR_RUN_ZERO);
    dr_lost_add(t->lost, off, end, t->job);
    return 0;
}

/* How far the plan at off stays the same, at most to limit. */
static int plan_until(struct dr_transfer *t, uint64_t off, uint64_t limit, enum plan *plan,
                      uint64_t *end, struct dr_error *err)
{
    int r = dr_transfer_walk(t, off, err);
    if (r < 0)
        return r;
    *plan = plan_of(t, &t->walk.run);
    *end = dr_min(t->walk.run.end, limit);
    while (*end < limit) {
        r = dr_transfer_walk(t, *end, err);
        if (r < 0)
            return r;
        if (plan_of(t, &t->walk.run) != *plan)
            break;
        *end = dr_min(t->walk.run.end, limit);
    }
    return 0;
}

/* Items end where multiples of `most` end in the target. */
static uint64_t item_limit(const struct dr_transfer *t, uint64_t off, uint64_t most)
{
    uint64_t end = dr_round_down(off + t->shift, most) + most - t->shift;
    return dr_min(end, t->walk.size);
}

/* Data: a buffer, so that two workers do not meet in one unit. Zeros: all there are; but beside a
 * guest the worker rests between items, not within one. */
static uint64_t plan_limit(const struct dr_transfer *t, uint64_t off)
{
    if (plan_of(t, &t->walk.run) == PLAN_COPY)
        return item_limit(t, off, DR_STOCK_BUFFER);
    return dr_job_polite(t->job) ? item_limit(t, off, POLITE_ZERO) : t->walk.run.end;
}

/* A grain has one sum, so it is read at once: one that is data in part is copied as data, and zeros
 * end where a grain does. */
static enum plan whole_grains(const struct dr_transfer *t, enum plan plan, uint64_t off,
                              uint64_t *end)
{
    uint64_t down = dr_round_down(*end, DR_SUMS_GRAIN);
    if (*end == t->walk.size || *end == down)
        return plan;
    *end = plan != PLAN_COPY && down > off ? down : dr_min(down + DR_SUMS_GRAIN, t->walk.size);
    return down > off ? plan : PLAN_COPY;
}

int dr_transfer_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct dr_transfer *t = user;
    while (t->pos < t->walk.size) {
        uint64_t off = t->pos, end;
        enum plan plan;
        int r = dr_transfer_walk(t, off, err);
        if (r < 0)
            return r;
        r = plan_until(t, off, dr_min(plan_limit(t, off), t->walk.size), &plan, &end, err);
        if (r < 0)
            return r;
        if (t->sums)
            plan = whole_grains(t, plan, off, &end);
        t->pos = end;
        if (plan == PLAN_SKIP) {
            item->passed += end - off;
            continue;
        }
        item->off = off;
        item->aux[0] = end - off; /* for zeroing, which is not charged against the rate */
        item->len = plan == PLAN_COPY ? end - off : 0;
        item->passed += plan == PLAN_COPY ? 0 : end - off;
        item->kind = plan == PLAN_COPY ? DR_ITEM_COPY : DR_ITEM_ZERO;
        return 1;
    }
    return 0;
}

/* ------------------------------------------------------------------ transfer: work */

static int read_source(const struct dr_transfer *t, void *buf, uint64_t off, size_t len,
                       struct dr_error *err)
{
    return dr_chain_read(t->walk.chain, t->walk.first, buf, off, len, err);
}

/* Sector by sector; what cannot be read becomes zeros. */
static int salvage(const struct dr_transfer *t, uint8_t *buf, uint64_t off, size_t len,
                   struct dr_error *err)
{
    uint64_t bad = off; /* not noted yet from here on */
    for (size_t done = 0; done < len; done += SECTOR) {
        size_t n = dr_min(SECTOR, len - done);
        struct dr_error why = DR_ERROR_INIT;
        int r = read_source(t, buf + done, off + done, n, &why);
        if (r < 0 && !dr_is_damage(r))
            return dr_fail(err, -r, "%s", why.text);
        if (r < 0) {
            memset(buf + done, 0, n);
            continue;
        }
        dr_lost_add(t->lost, bad, off + done, t->job);
        bad = off + done + n;
    }
    dr_lost_add(t->lost, bad, off + len, t->job);
    return 0;
}

int dr_transfer_read(const struct dr_transfer *t, uint8_t *buf, uint64_t off, size_t len,
                     struct dr_error *err)
{
    if (!t->lost)
        return read_source(t, buf, off, len, err);
    struct dr_error why = DR_ERROR_INIT;
    int r = read_source(t, buf, off, len, &why);
    if (r < 0 && !dr_is_damage(r))
        return dr_fail(err, -r, "%s", why.text);
    return r < 0 ? salvage(t, buf, off, len, err) : 0;
}

/* Let the system copy as much as it can; the number of bytes done. */
static int copy_in_kernel(const struct dr_transfer *t, uint64_t off, uint64_t len, uint64_t *done,
                          struct dr_error *err)
{
    while (*done < len) {
        struct dr_place place;
        int r = dr_chain_map(t->walk.chain, t->walk.first, off + *done, len - *done, &place, err);
        if (r < 0)
            return r;
        uint64_t copied = 0;
        r = -ENOTSUP;
        if (place.ext.kind == DR_DATA)
            r = dr_chain_copy_from(t->dst, t->dst_at, off + *done + t->shift, place.ext.file,
                                   place.ext.host, place.ext.len, &copied, err);
        dr_place_done(&place);
        if (r == -ENOTSUP || (r == 0 && copied == 0))
            return 0;
        if (r < 0)
            return r;
        *done += copied;
    }
    return 0;
}

int dr_transfer_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct dr_transfer *t = user;
    if (item->kind != DR_ITEM_COPY)
        return 0;
    uint64_t done = 0;
    if (t->to_file) {
        int r = copy_in_kernel(t, item->off, item->len, &done, err);
        if (r < 0)
            return r;
    }
    item->aux[1] = done;
    if (done == item->len)
        return 0;
    int r = dr_transfer_read(t, buf[0] + done, item->off + done, (size_t)(item->len - done), err);
    if (r == 0 && t->sums)
        r = dr_sums_put(t->sums, item->off, buf[0], item->len, err);
    return r;
}

/* ------------------------------------------------------------------ transfer: emit */

static int emit_zero(const struct dr_transfer *t, uint64_t off, uint64_t len, struct dr_error *err)
{
    if (!t->write_zeros)
        return 0;
    return dr_chain_zero(t->dst, t->dst_at, off + t->shift, len, t->zero_flags, err);
}

/* The end of the block of the target that holds off. */
static uint64_t block_end(const struct dr_transfer *t, uint64_t off, uint64_t end)
{
    return dr_min(end, dr_round_down(off + t->shift, t->block) + t->block - t->shift);
}

/* From off on: how far all blocks are zeros (or all are not), starting with the first one. */
static uint64_t same_until(const struct dr_transfer *t, const uint8_t *buf, uint64_t base,
                           uint64_t off, uint64_t end, bool *zero)
{
    uint64_t pos = block_end(t, off, end);
    *zero = dr_is_zero(buf + (off - base), (size_t)(pos - off));
    while (pos < end) {
        uint64_t next = block_end(t, pos, end);
        if (dr_is_zero(buf + (pos - base), (size_t)(next - pos)) != *zero)
            break;
        pos = next;
    }
    return pos;
}

static int write_out(const struct dr_transfer *t, const uint8_t *buf, uint64_t base, uint64_t off,
                     uint64_t end, struct dr_error *err)
{
    if (off == end)
        return 0;
    return dr_chain_write(t->dst, t->dst_at, buf + (off - base), off + t->shift,
                          (size_t)(end - off), err);
}

/* Runs of zeros at least `sparse` long stay out; shorter ones go with their neighbours. */
static int emit_sparse(const struct dr_transfer *t, const uint8_t *buf, uint64_t base, uint64_t off,
                       uint64_t end, struct dr_error *err)
{
    uint64_t from = off; /* not written yet */
    int r = 0;
    while (off < end && r == 0) {
        bool zero;
        uint64_t until = same_until(t, buf, base, off, end, &zero);
        bool skip = zero && (until - off >= t->sparse || until - off == end - from);
        if (skip) {
            r = write_out(t, buf, base, from, off, err);
            if (r == 0)
                r = emit_zero(t, off, until - off, err);
            from = until;
        }
        off = until;
    }
    return r < 0 ? r : write_out(t, buf, base, from, end, err);
}

int dr_transfer_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct dr_transfer *t = user;
    if (item->kind == DR_ITEM_ZERO)
        return dr_chain_zero(t->dst, t->dst_at, item->off + t->shift, item->aux[0], t->zero_flags,
                             err);
    uint64_t off = item->off + item->aux[1], end = item->off + item->len;
    if (t->sparse == 0)
        return write_out(t, buf[0], item->off, off, end, err);
    return emit_sparse(t, buf[0], item->off, off, end, err);
}

int dr_transfer_run(struct dr_transfer *t, uint64_t total, struct dr_job *job, struct dr_error *err)
{
    t->pos = t->from;
    t->job = job;
    struct dr_copy_policy policy = {
        .user = t,
        .next = dr_transfer_next,
        .work = dr_transfer_work,
        .emit = dr_transfer_emit,
        .repeat = DR_COPY_RETRY,
        .buffers = 1,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(t->walk.chain, t->dst),
        .total = total,
        .before = t->before,
        .after = t->after,
    };
    return dr_copy_run(&policy, job, err);
}

int dr_transfer_measure(const struct dr_transfer *t, uint64_t *bytes, struct dr_error *err)
{
    struct dr_walk walk = t->walk;
    *bytes = 0;
    for (uint64_t off = t->from; off < walk.size; off = walk.run.end) {
        int r = dr_walk_to(&walk, off, err);
        if (r < 0)
            return r;
        if (walk.run.kind == DR_RUN_DATA)
            *bytes += walk.run.end - off;
    }
    return 0;
}

/* ------------------------------------------------------------------ pairs */

/* Is there anything to look at in [off, *end)? Shortens *end to where the answer holds. */
static int pair_kind(struct dr_pair_walk *p, uint64_t off, uint64_t *end, int *kind,
                     struct dr_error *err)
{
    *kind = -1;
    int r = 0;
    if (p->masked) {
        r = dr_walk_to(&p->mask, off, err);
        if (r < 0)
            return r;
        *end = dr_min(*end, p->mask.run.end);
        if (p->mask.run.kind != DR_RUN_HOLE)
            return 0;
    }
    r = dr_walk_to(&p->a, off, err);
    if (r == 0)
        r = dr_walk_to(&p->b, off, err);
    if (r < 0)
        return r;
    *end = dr_min(*end, dr_min(p->a.run.end, p->b.run.end));
    bool za = dr_run_zero(&p->a.run), zb = dr_run_zero(&p->b.run);
    if (za && zb)
        return 0;
    if (dr_run_same_place(&p->a.run, &p->b.run, off))
        return 0;
    if (p->views) {
        uint64_t len = *end - off;
        bool hole;
        r = dr_image_views_hole(p->views, off, &len, &hole, err);
        *end = off + len;
        if (r < 0 || !hole)
            return r;
    }
    *kind = za ? DR_ITEM_READ_B : zb ? DR_ITEM_READ_A : DR_ITEM_READ_TWO;
    return 0;
}

int dr_pair_next(struct dr_pair_walk *p, struct dr_copy_item *item, struct dr_error *err)
{
    while (p->pos < p->size) {
        uint64_t off = p->pos, end = p->size;
        int kind, more;
        int r = pair_kind(p, off, &end, &kind, err);
        if (r < 0)
            return r;
        if (kind < 0) {
            item->passed += end - off;
            p->pos = end;
            continue;
        }
        uint64_t limit = dr_min(p->size, dr_round_down(off, DR_STOCK_BUFFER) + DR_STOCK_BUFFER);
        end = dr_min(end, limit);
        while (end < limit) {
            uint64_t to = limit;
            r = pair_kind(p, end, &to, &more, err);
            if (r < 0)
                return r;
            if (more != kind)
                break;
            end = to;
        }
        *item = (struct dr_copy_item){
            .off = off, .len = end - off, .passed = item->passed, .kind = (unsigned)kind};
        p->pos = end;
        return 1;
    }
    return 0;
}

static int read_view(const struct dr_walk *w, void *buf, const struct dr_copy_item *item,
                     struct dr_error *err)
{
    return dr_chain_read_padded(w->chain, w->first, buf, item->off, (size_t)item->len, err);
}

int dr_pair_read(struct dr_pair_walk *p, const struct dr_copy_item *item, uint8_t *const *buf,
                 struct dr_error *err)
{
    int r = 0;
    if (item->kind != DR_ITEM_READ_B)
        r = read_view(&p->a, buf[0], item, err);
    if (r == 0 && item->kind != DR_ITEM_READ_A)
        r = read_view(&p->b, buf[1], item, err);
    return r;
}

static bool differs(const struct dr_copy_item *item, uint8_t *const *buf, uint64_t at, size_t len)
{
    if (item->kind == DR_ITEM_READ_TWO)
        return memcmp(buf[0] + at, buf[1] + at, len) != 0;
    return !dr_is_zero(buf[item->kind == DR_ITEM_READ_A ? 0 : 1] + at, len);
}

uint64_t dr_pair_differs(const struct dr_copy_item *item, uint8_t *const *buf, uint64_t from,
                         uint64_t step)
{
    for (uint64_t at = from; at < item->len; at += step)
        if (differs(item, buf, at, (size_t)dr_min(step, item->len - at)))
            return at;
    return item->len;
}
