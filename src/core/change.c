/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How bytes of one image change: the part of the data mover that io.c's verbs stand on.
 *
 * A request is worked off from its beginning. Where the image has the bytes in a file already and
 * they may be overwritten, they are, under a shared lock of the units. Everything else takes the
 * units' lock exclusively and goes in three steps: the driver reserves a place, the core writes the
 * bytes there, the driver publishes the place; or, after a failure, cancels it. Up to BATCH_UNITS
 * neighbouring units are reserved together, so that a large write is one system call.
 *
 * Hooks of the disk (core.h) are called under the same locks. */
#include "core/internal.h"
#include "base/bytes.h"
#include "base/inline.h"

#define BATCH_UNITS 64

/* ------------------------------------------------------------------ what a write brings along */

struct batch {
    struct dr_chain *chain;
    size_t at;
    struct dr_image *image;
    const struct dr_change_source *src;
    uint64_t off, end; /* what the source covers of the reserved units */
    unsigned n;
    bool crowded;        /* too much metadata waits to be written */
    unsigned zero_flags; /* enum dr_file_zero_flag for ZERO_HOST */
    unsigned new_flags;  /* the same for zeros in a new place */
    struct dr_reservation r[BATCH_UNITS];
};

static uint64_t reservation_end(const struct dr_reservation *r)
{
    return r->off + r->len;
}

/* r[i] follows r[i-1] in the file and in the guest. */
static bool reservations_join(const struct dr_reservation *a, const struct dr_reservation *b)
{
    return a->todo == b->todo && a->punch == b->punch && a->file == b->file && a->pad == 0 &&
           a->host + a->len == b->host && reservation_end(a) == b->off;
}

static unsigned batch_run(const struct batch *batch, unsigned first)
{
    unsigned n = first + 1;
    while (n < batch->n && reservations_join(&batch->r[n - 1], &batch->r[n]))
        n++;
    return n - first;
}

static void batch_publish(struct batch *batch)
{
    struct dr_image *image = batch->image;
    DR_LOCK_SCOPE(&image->lock);
    for (unsigned i = 0; i < batch->n; i++)
        dr_image_publish(image, &batch->r[i]);
    batch->n = 0;
}

static void batch_cancel(struct batch *batch)
{
    struct dr_image *image = batch->image;
    DR_LOCK_SCOPE(&image->lock);
    while (batch->n > 0) /* the last first: allocators like to step back */
        dr_image_cancel(image, &batch->r[--batch->n]);
}

/* ------------------------------------------------------------------ writing one run of
 * reservations */

struct run {
    struct dr_file *file;
    uint64_t host;
    uint64_t off, len; /* guest */
    uint64_t pad;
    uint64_t from, to; /* guest part that comes from the source; the rest is head and tail */
};

static struct run batch_run_at(const struct batch *batch, unsigned first, unsigned n)
{
    const struct dr_reservation *a = &batch->r[first], *z = &batch->r[first + n - 1];
    struct run run = {.file = a->file, .host = a->host, .off = a->off, .pad = z->pad};
    run.len = reservation_end(z) - a->off;
    run.from = dr_max(run.off, batch->off);
    run.to = dr_min(run.off + run.len, batch->end);
    return run;
}

/* Old content around what is written, as this image reads now; zeros past the end of the disk. */
static int run_read_edge(struct batch *batch, uint8_t *buf, uint64_t off, uint64_t len,
                         struct dr_error *err)
{
    return dr_chain_read_padded(batch->chain, batch->at, buf, off, len, err);
}

static int run_write_buffer(struct batch *batch, const struct run *run, struct dr_error *err)
{
    uint64_t head = run->from - run->off, body = run->to - run->from;
    uint64_t tail = run->off + run->len - run->to;
    /* One allocation: head, then the body if it is zeros, then tail and pad. */
    uint64_t zeros = batch->src->buf ? 0 : body;
    CLEANUP_FREE uint8_t *edges = NULL;
    if (head + zeros + tail + run->pad > 0) {
        edges = calloc(1, head + zeros + tail + run->pad);
        if (!edges)
            return dr_fail(err, ENOMEM, "%s: out of memory for a write", batch->image->path);
    }
    int r = head ? run_read_edge(batch, edges, run->off, head, err) : 0;
    if (r == 0 && tail)
        r = run_read_edge(batch, edges + head + zeros, run->to, tail, err);
    if (r < 0)
        return r;
    struct iovec iov[3];
    int n = 0;
    if (head)
        iov[n++] = (struct iovec){.iov_base = edges, .iov_len = head};
    if (batch->src->buf) /* pwritev takes no const */
        iov[n++] = (struct iovec){
            .iov_base = (void *)(uintptr_t)(batch->src->buf + (run->from - batch->src->off)),
            .iov_len = body};
    else
        iov[n++] = (struct iovec){.iov_base = edges + head, .iov_len = body};
    if (tail + run->pad)
        iov[n++] = (struct iovec){.iov_base = edges + head + zeros, .iov_len = tail + run->pad};
    return dr_file_pwritev(run->file, iov, n, run->host, err);
}

/* -ENOTSUP: nothing was copied, the caller must bring the bytes through memory. */
static int run_copy_file(struct batch *batch, const struct run *run, struct dr_error *err)
{
    uint64_t from = batch->src->file_off + (run->from - batch->src->off);
    uint64_t done = 0, copied;
    while (done < run->len) {
        int r = dr_file_copy(run->file, run->host + done, batch->src->file, from + done,
                             run->len - done, &copied, err);
        if (r < 0)
            return r;
        done += copied;
    }
    return run->pad ? dr_file_zero(run->file, run->host + run->len, run->pad, 0, err) : 0;
}

static int run_write(struct batch *batch, const struct run *run, struct dr_error *err)
{
    bool whole = run->from == run->off && run->to == run->off + run->len;
    if (batch->src->coded) {
        int r = dr_file_pwrite(run->file, batch->src->coded, run->host, batch->src->coded_len, err);
        dr_decoded_forget(batch->image, run->file, run->host, batch->src->coded_len);
        return r;
    }
    if (batch->src->file)
        return whole ? run_copy_file(batch, run, err) : -ENOTSUP;
    if (!batch->src->buf && whole)
        return dr_file_zero(run->file, run->host, run->len + run->pad, batch->new_flags, err);
    return run_write_buffer(batch, run, err);
}

/* ------------------------------------------------------------------ moving units down */

/* Copy bytes of the file to a place that nothing leads to yet. Holes stay holes, so that the file
 * takes no more space than before. */
static int copy_down(struct dr_file *file, uint64_t from, uint64_t to, uint64_t len,
                     struct dr_error *err)
{
    int r = 0;
    for (uint64_t done = 0, run; r == 0 && done < len; done += run) {
        enum dr_file_extent kind = DR_FILE_HOLE;
        run = len - done;
        if (from + done < dr_file_size(file))
            r = dr_file_extent(file, from + done, len - done, &kind, &run, err);
        if (r == 0 && kind == DR_FILE_HOLE)
            r = dr_file_zero(file, to + done, run, DR_FILE_ZERO_PUNCH, err);
        else if (r == 0)
            r = dr_copy_within(file, from + done, to + done, run, err);
    }
    return r;
}

/* Copy the units of r[first] and of those behind it that follow it in both places. *n: how many. */
static int batch_copy_down(struct batch *batch, unsigned first, unsigned *n, struct dr_error *err)
{
    const struct dr_reservation *a = &batch->r[first];
    uint64_t len = a->bytes;
    for (*n = 1; first + *n < batch->n; ++*n) {
        const struct dr_reservation *b = a + *n;
        if (b->todo != DR_TODO_COPY || b->file != a->file || b->from != a->from + len ||
            b->host != a->host + len)
            break;
        len += b->bytes;
    }
    dr_decoded_forget(batch->image, a->file, a->host, len);
    return copy_down(a->file, a->from, a->host, len, err);
}

/* Write what was reserved and make it visible, or give it all back. */
static int batch_finish(struct batch *batch, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0, n; i < batch->n && r == 0; i += n) {
        if (batch->r[i].todo == DR_TODO_COPY) {
            r = batch_copy_down(batch, i, &n, err);
            continue;
        }
        n = batch_run(batch, i);
        struct run run = batch_run_at(batch, i, n);
        if (batch->r[i].todo == DR_TODO_WRITE)
            r = run_write(batch, &run, err);
        else if (batch->r[i].todo == DR_TODO_ZERO_HOST)
            r = dr_file_zero(run.file, run.host, run.len + run.pad,
                             batch->zero_flags | (batch->r[i].punch ? DR_FILE_ZERO_PUNCH : 0), err);
    }
    if (r < 0)
        batch_cancel(batch);
    else
        batch_publish(batch);
    return r;
}

static int reserve_failed(const struct dr_image *image, int r, uint64_t off, struct dr_error *err)
{
    if (r == -ENOTSUP) /* a question answered, not a failure */
        return r;
    return dr_fail_errno(err, -r, "%s: cannot reserve space for guest offset %llu", image->path,
                         (unsigned long long)off);
}

/* image->lock held. Adds a reservation for [off, off+len), inside one unit. -EAGAIN: a flush is
 * needed that the pins of this batch might hold up: finish it first. */
static int batch_reserve(struct batch *batch, uint64_t off, uint64_t len, enum dr_want want,
                         struct dr_error *err)
{
    struct dr_image *image = batch->image;
    struct dr_reservation *r = &batch->r[batch->n];
    struct dr_hold hold = {0};
    int rc;
    do {
        *r = (struct dr_reservation){.off = off, .len = len, .want = want};
        rc = dr_image_reserve(image, off, len, want, batch->src->coded_len, r, err);
        if (rc == 0)
            batch->n++;
        else if (rc != -EAGAIN)
            rc = reserve_failed(image, rc, off, err);
        else if (image->need.kind == DR_NEED_FLUSH && batch->n > 0)
            break;
    } while (rc == -EAGAIN && (rc = dr_image_satisfy(image, &hold, off, err)) == 0);
    dr_hold_end(&hold);
    return rc;
}

/* ------------------------------------------------------------------ changing a range */

enum action {
    ACT_SKIP,     /* nothing to do here */
    ACT_IN_PLACE, /* overwrite the bytes where they are */
    ACT_RESERVE,  /* reserve, write, publish */
};

/* What to do with the bytes from some offset on, and for how many of them. */
struct plan {
    enum action action;
    uint64_t len;
};

/* Does `off` begin a unit? The end of the disk counts as the beginning of one. */
static bool begins_unit(const struct dr_image *image, uint64_t off)
{
    uint64_t uoff, ulen;
    if (off == image->size)
        return true;
    image->fmt->unit(image, off, &uoff, &ulen);
    return uoff == off;
}

/* How far one reservation from cur on may reach: to the end of its unit, or of its span. */
static uint64_t reach(const struct dr_image *image, uint64_t cur)
{
    uint64_t uoff, ulen, span = image->fmt->span;
    image->fmt->unit(image, cur, &uoff, &ulen);
    return span ? dr_round_down(cur, span) + span : uoff + ulen;
}

/* With a span one reservation covers several units. A partial unit at either edge is made a piece
 * of its own, because only whole units can become zeros without bytes being written. */
static uint64_t cut_to_units(const struct dr_image *image, uint64_t cur, uint64_t end)
{
    uint64_t uoff, ulen;
    image->fmt->unit(image, cur, &uoff, &ulen);
    if (cur != uoff)
        return dr_min(end, uoff + ulen);
    if (begins_unit(image, end))
        return end;
    image->fmt->unit(image, end, &uoff, &ulen);
    return uoff > cur ? uoff : end;
}

static bool brings_no_bytes(const struct dr_change_source *src)
{
    return !src->buf && !src->file && !src->coded;
}

/* One reservation from cur on: up to the end of the unit (or span) or of the request, and as far as
 * its bytes are alike now. A whole unit that is dropped, zeroed or coded may be a mixture: none of
 * it is kept. *whole: it is whole units. */
static uint64_t reservation_length(const struct dr_change *c, uint64_t cur, uint64_t limit,
                                   const struct dr_extent *ext, bool *whole)
{
    const struct dr_image *image = c->chain->images[c->at];
    bool first = begins_unit(image, cur);
    bool keeps_rest = c->mode == DR_CHANGE_WRITE || c->mode == DR_CHANGE_FILL ||
                      c->mode == DR_CHANGE_ALLOCATE;
    uint64_t end = dr_min(reach(image, cur), limit);
    if (image->fmt->span || keeps_rest || !first || !begins_unit(image, end))
        end = dr_min(end, cur + ext->len);
    if (image->fmt->span && brings_no_bytes(c->src))
        end = cut_to_units(image, cur, end);
    *whole = first && begins_unit(image, end);
    return end - cur;
}

/* ext: what the image has from cur on. */
static struct plan plan_at(const struct dr_change *c, uint64_t cur, uint64_t limit,
                           const struct dr_extent *ext)
{
    bool in_place = ext->kind == DR_DATA && ext->in_place, whole;
    uint64_t alike = dr_min(ext->len, limit - cur);
    uint64_t len = reservation_length(c, cur, limit, ext, &whole);
    struct plan reserve = {ACT_RESERVE, len};
    switch (c->mode) {
    case DR_CHANGE_WRITE:
        return in_place ? (struct plan){ACT_IN_PLACE, alike} : reserve;
    case DR_CHANGE_FILL:
        return ext->kind == DR_HOLE ? reserve : (struct plan){ACT_SKIP, alike};
    case DR_CHANGE_ZERO:
        if (ext->kind == DR_ZERO && ext->len >= len &&
            !(ext->placed && whole && (c->zero_flags & DR_FILE_ZERO_PUNCH)))
            return (struct plan){ACT_SKIP, len};
        /* A whole unit is better given back than overwritten, unless the file's holes are zeros. */
        if (in_place && (ext->flat || !whole))
            return (struct plan){ACT_IN_PLACE, alike};
        return reserve;
    case DR_CHANGE_DROP:
        if (!whole || (ext->kind == DR_HOLE && ext->len >= len))
            return (struct plan){ACT_SKIP, dr_min(len, ext->len)};
        return reserve;
    case DR_CHANGE_ALLOCATE:
        if (ext->kind == DR_DATA && ext->flat && in_place)
            return (struct plan){ACT_IN_PLACE, alike};
        return ext->kind == DR_HOLE || ext->kind == DR_ZERO ? reserve
                                                            : (struct plan){ACT_SKIP, alike};
    case DR_CHANGE_LOWER:
        if (!whole || ((ext->kind == DR_HOLE || ext->kind == DR_ZERO) && ext->len >= len))
            return (struct plan){ACT_SKIP, dr_min(len, alike)};
        return reserve;
    default:
        return reserve;
    }
}

/* Zeros that may be unmapped give their place up, where they have one; others keep it. */
static enum dr_want zero_want(const struct batch *batch)
{
    bool keep = !(batch->zero_flags & DR_FILE_ZERO_PUNCH) &&
                (batch->image->fmt->flags & DR_FORMAT_KEEPS_ZEROED);
    return keep ? DR_WANT_ZERO_KEPT : DR_WANT_ZERO;
}

static int reserve_piece(struct batch *batch, const struct dr_change *c, uint64_t off, uint64_t len,
                         struct dr_error *err)
{
    switch (c->mode) {
    case DR_CHANGE_DROP:
        return batch_reserve(batch, off, len, DR_WANT_HOLE, err);
    case DR_CHANGE_CODED:
        return batch_reserve(batch, off, len, DR_WANT_CODED, err);
    case DR_CHANGE_LOWER:
        return batch_reserve(batch, off, len, DR_WANT_LOWER, err);
    default:
        break;
    }
    if (brings_no_bytes(c->src) && c->mode != DR_CHANGE_ALLOCATE) {
        int r = batch_reserve(batch, off, len, zero_want(batch), err);
        if (r != -ENOTSUP || c->no_bytes)
            return r;
    }
    return batch_reserve(batch, off, len, DR_WANT_DATA, err);
}

/* What the beginning of a step turned out to need, when it was not a reservation. */
struct step {
    enum action action;
    struct dr_extent ext;
    uint64_t done; /* bytes that the step deals with */
};

/* image->lock and the exclusive range lock held. Either the batch gets reservations for
 * [off, off + step->done), or step says what else to do there. Stops before the first piece that
 * cannot join the batch. */
static int collect(struct batch *batch, const struct dr_change *c, uint64_t off, uint64_t limit,
                   struct step *step, struct dr_error *err)
{
    struct dr_image *image = batch->image;
    struct plan plan;
    *step = (struct step){.action = ACT_RESERVE};
    for (uint64_t cur = off; cur < limit && batch->n < BATCH_UNITS; cur += plan.len) {
        struct dr_extent ext;
        int r = dr_image_map_locked(image, cur, limit - cur, &ext, err);
        if (r < 0)
            return r;
        plan = plan_at(c, cur, limit, &ext);
        if (plan.action == ACT_RESERVE) {
            if (batch->n > 0 && !begins_unit(image, cur))
                return 0; /* a unit takes one reservation: publish the first one before */
            r = reserve_piece(batch, c, cur, plan.len, err);
            if (r == -EAGAIN)
                return 0; /* a flush must come first, and before it this batch */
            if (r == -ENOTSUP && c->mode == DR_CHANGE_ZERO && ext.kind == DR_DATA && ext.in_place)
                plan = (struct plan){ACT_IN_PLACE, dr_min(plan.len, ext.len)};
            else if (r < 0)
                return r;
        }
        if (plan.action != ACT_RESERVE) {
            if (batch->n == 0)
                *step = (struct step){plan.action, ext, plan.len};
            return 0;
        }
        batch->end = cur + plan.len;
        step->done = batch->end - off;
    }
    return 0;
}

/* Tell those who want to know what the guest has changed: the disk's hooks and, for its bitmaps,
 * the driver and the file beside the image. Under the lock of the units, also after a failure. */
static void note_change(const struct dr_change *c, uint64_t off, uint64_t len)
{
    struct dr_image *image = c->chain->images[c->at];
    bool promised = (image->flags & DR_OPEN_UNCHANGED) && !image->overwritten;
    bool other_view = !c->keeps_view && !promised;
    if (other_view && image->fmt->changed)
        image->fmt->changed(image, off, len);
    if (other_view && image->noting)
        dr_noting_changed(image, off, len);
    if (c->guest)
        dr_hooks_after(c->chain, off, len);
}

/* ------------------------------------------------------------------ overwriting in place */

static int copy_in_place(const struct dr_change_source *src, uint64_t off,
                         const struct dr_extent *ext, uint64_t len, struct dr_error *err)
{
    uint64_t done = 0, copied;
    while (done < len) {
        int r = dr_file_copy(ext->file, ext->host + done, src->file,
                             src->file_off + (off - src->off) + done, len - done, &copied, err);
        if (r < 0)
            return r;
        done += copied;
    }
    return 0;
}

DR_INLINE int write_in_place(const struct dr_change *c, uint64_t off, const struct dr_extent *ext,
                             uint64_t len, bool durably, struct dr_error *err)
{
    const struct dr_change_source *src = c->src;
    const uint8_t *from = src->buf ? src->buf + (off - src->off) : NULL;
    if (from && !durably)
        return dr_file_pwrite(ext->file, from, ext->host, (size_t)len, err);
    if (from) { /* pwritev takes no const */
        struct iovec iov = {.iov_base = (void *)(uintptr_t)from, .iov_len = (size_t)len};
        return dr_file_pwritev_durable(ext->file, &iov, 1, ext->host, err);
    }
    return src->file ? copy_in_place(src, off, ext, len, err)
                     : dr_file_zero(ext->file, ext->host, len, c->zero_flags, err);
}

/* *durably: the request asked for it, and this one write is all it takes, because the metadata that
 * leads to these bytes is durable. */
static int map_in_place(const struct dr_change *c, uint64_t off, uint64_t len,
                        struct dr_extent *ext, bool *durably, struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    if (image->fmt->flags & DR_FORMAT_FIXED_MAP) { /* nothing leads to the bytes */
        *durably = c->not_durable && c->src->buf;
        return dr_image_map(image, off, len, ext, err);
    }
    DR_LOCK_SCOPE(&image->lock);
    int r = dr_image_map_locked(image, off, len, ext, err);
    *durably = c->not_durable && c->src->buf && dr_cache_is_clean(image->cache);
    return r;
}

/* The common case: the bytes are there and may be overwritten. *done = 0: they are not. */
static int try_in_place(const struct dr_change *c, uint64_t off, uint64_t len, uint64_t *done,
                        struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    struct dr_range range;
    struct dr_extent ext;
    *done = 0;
    dr_range_lock(image->ranges, &range, off, len, false);
    unsigned ticket = dr_epoch_enter(image->ranges);
    bool durably;
    int r = map_in_place(c, off, len, &ext, &durably, err);
    if (r == 0 && ext.kind == DR_DATA && ext.in_place) {
        *done = dr_min(len, ext.len);
        r = write_in_place(c, off, &ext, *done, durably, err);
        if (c->not_durable && !durably)
            *c->not_durable = true;
        note_change(c, off, *done);
    }
    dr_epoch_leave(image->ranges, ticket);
    dr_range_unlock(image->ranges, &range);
    return r;
}

/* ------------------------------------------------------------------ one step */

/* From off up to the end of the units that one batch may hold, or of the request; and the range of
 * whole units that must be locked for that. */
static uint64_t batch_limit(const struct dr_image *image, uint64_t off, uint64_t len,
                            uint64_t *lock_off, uint64_t *lock_len)
{
    uint64_t uoff, ulen, limit = off;
    for (unsigned n = 0; n < BATCH_UNITS && limit < off + len; n++)
        limit = reach(image, limit);
    limit = dr_min(limit, off + len);
    image->fmt->unit(image, off, lock_off, &ulen);
    image->fmt->unit(image, limit - 1, &uoff, &ulen);
    *lock_len = uoff + ulen - *lock_off;
    return limit;
}

/* The exclusive range lock is held. */
static int run_step(const struct dr_change *c, struct batch *batch, uint64_t off, uint64_t limit,
                    struct step *step, struct dr_error *err)
{
    struct dr_image *image = batch->image;
    if (c->may && !c->may(c->user, off, limit - off)) {
        step->done = limit - off;
        return 0;
    }
    int r = c->guest ? dr_hooks_before(c->chain, off, limit - off, err) : 0;
    if (r < 0)
        return r;
    pthread_mutex_lock(&image->lock);
    r = collect(batch, c, off, limit, step, err);
    batch->crowded = dr_cache_is_crowded(image->cache);
    pthread_mutex_unlock(&image->lock);
    if (r < 0)
        batch_cancel(batch);
    else if (batch->n > 0)
        r = batch_finish(batch, err);
    else if (step->action == ACT_IN_PLACE)
        r = write_in_place(c, off, &step->ext, step->done, false, err);
    if (step->action != ACT_SKIP)
        note_change(c, off, step->done);
    return r;
}

/* Deals with *done > 0 bytes from off on. */
static int change_step(const struct dr_change *c, uint64_t off, uint64_t len, uint64_t *done,
                       struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    struct batch
        batch; /* without its reservations: clearing them would cost more than most steps */
    batch.chain = c->chain;
    batch.at = c->at;
    batch.image = image;
    batch.src = c->src;
    batch.off = off;
    batch.end = off;
    batch.n = 0;
    batch.crowded = false;
    batch.zero_flags = c->zero_flags;
    batch.new_flags = c->mode == DR_CHANGE_ALLOCATE ? c->zero_flags : 0;
    struct step step = {.action = ACT_SKIP};
    struct dr_range range;
    uint64_t lock_off, lock_len;
    uint64_t limit = batch_limit(image, off, len, &lock_off, &lock_len);
    dr_range_lock(image->ranges, &range, lock_off, lock_len, true);
    int r = run_step(c, &batch, off, limit, &step, err);
    dr_range_unlock(image->ranges, &range);
    *done = step.done;
    if (c->not_durable)
        *c->not_durable = true;
    if (r == 0 && batch.crowded)
        r = dr_image_flush(image, err);
    return r;
}

int dr_change_run(const struct dr_change *c, uint64_t off, uint64_t len, uint64_t *done,
                  struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    *done = 0;
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    /* Data that a hook wants to see first must not change under a lock that others share. */
    bool shared = c->mode == DR_CHANGE_WRITE && !(c->guest && dr_hooks_any_before(c->chain));
    int r = len ? dr_image_begin(image, off, !(image->flags & DR_OPEN_UNCHANGED), err) : 0;
    while (r == 0 && *done < len) {
        uint64_t part = 0;
        if (shared)
            r = try_in_place(c, off + *done, len - *done, &part, err);
        if (r == 0 && part == 0)
            r = change_step(c, off + *done, len - *done, &part, err);
        if (r == 0)
            *done += part;
    }
    return r;
}
