/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only data mover: reads that fall through, writes that copy, zeros, drops.
 *
 * A write, per unit: in place under a shared lock; else under the exclusive lock reserve -> one
 * write of head, the caller's bytes and tail -> publish, or cancel. Neighbouring units are reserved
 * together, so that a large write is one system call.
 */
#include "core/internal.h"
#include "base/bytes.h"

#define BATCH_UNITS 64
/* Writers stall to flush once this many metadata pages wait. */
#define DIRTY_CAP 4096

static int check_range(const struct dr_image *image, uint64_t off, uint64_t len,
                       struct dr_error *err)
{
    if (dr_inside(off, len, image->size))
        return 0;
    return dr_fail(err, EINVAL, "%s: %llu bytes at %llu are not inside the disk of %llu bytes",
                   image->path, (unsigned long long)len, (unsigned long long)off,
                   (unsigned long long)image->size);
}

/* ------------------------------------------------------------------ read */

static int read_coded(struct dr_chain *chain, const struct dr_place *place, uint8_t *buf,
                      size_t len, struct dr_error *err)
{
    const struct dr_extent *ext = &place->ext;
    struct dr_image *image = chain->images[place->owner];
    if (ext->inner > ext->unit || len > ext->unit - ext->inner)
        return dr_fail(err, EIO, "%s: a compressed unit of %u bytes does not hold %zu at %u",
                       image->path, ext->unit, len, ext->inner);
    CLEANUP_FREE uint8_t *coded = malloc(ext->host_len ? ext->host_len : 1);
    CLEANUP_FREE uint8_t *plain = malloc(ext->unit);
    if (!coded || !plain)
        return dr_fail(err, ENOMEM, "%s: out of memory for a compressed unit", image->path);
    /* host_len may be an upper bound at the end of the file: what is there must decode. */
    size_t got;
    int r = dr_file_pread_short(ext->file, coded, ext->host, ext->host_len, &got, err);
    if (r == 0)
        r = image->fmt->decode(image, coded, got, plain, ext->unit, err);
    if (r == 0)
        memcpy(buf, plain + ext->inner, len);
    return r;
}

static int read_place(struct dr_chain *chain, const struct dr_place *place, uint8_t *buf,
                      struct dr_error *err)
{
    const struct dr_extent *ext = &place->ext;
    switch (ext->kind) {
    case DR_DATA:
        return dr_file_pread(ext->file, buf, ext->host, ext->len, err);
    case DR_CODED:
        return read_coded(chain, place, buf, ext->len, err);
    default:
        memset(buf, 0, ext->len);
        return 0;
    }
}

static int read_range(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                      struct dr_error *err)
{
    uint8_t *out = buf;
    while (len > 0) {
        struct dr_place place;
        int r = dr_chain_map(chain, at, off, len, &place, err);
        if (r == 0)
            r = read_place(chain, &place, out, err);
        dr_place_done(&place);
        if (r < 0)
            return r;
        out += place.ext.len;
        off += place.ext.len;
        len -= place.ext.len;
    }
    return 0;
}

int dr_chain_read(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                  struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    return r < 0 ? r : read_range(chain, at, buf, off, len, err);
}

int dr_chain_read_padded(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                         struct dr_error *err)
{
    uint64_t size = at < chain->n ? chain->images[at]->size : 0;
    size_t have = off < size ? (size_t)dr_min(len, size - off) : 0;
    if (have < len)
        memset((uint8_t *)buf + have, 0, len - have);
    return read_range(chain, at, buf, off, have, err);
}

/* ------------------------------------------------------------------ what a write brings along */

/* The bytes for guest offsets from `off` on: memory, zeros, or a file's bytes. */
struct source {
    const uint8_t *buf; /* NULL: zeros or file */
    struct dr_file *file;
    uint64_t file_off;
    uint64_t off;
    const void *coded; /* one coded unit, with coded_len */
    uint32_t coded_len;
};

struct batch {
    struct dr_chain *chain;
    size_t at;
    struct dr_image *image;
    const struct source *src;
    uint64_t off, end; /* what the source covers of the reserved units */
    unsigned n;
    unsigned zero_flags; /* enum dr_file_zero_flag for ZERO_HOST */
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
        image->fmt->publish(image, &batch->r[i]);
    batch->n = 0;
}

static void batch_cancel(struct batch *batch)
{
    struct dr_image *image = batch->image;
    DR_LOCK_SCOPE(&image->lock);
    while (batch->n > 0) /* the last first: allocators like to step back */
        image->fmt->cancel(image, &batch->r[--batch->n]);
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
    if (batch->src->coded)
        return dr_file_pwrite(run->file, batch->src->coded, run->host, batch->src->coded_len, err);
    if (batch->src->file)
        return whole ? run_copy_file(batch, run, err) : -ENOTSUP;
    if (!batch->src->buf && whole)
        return dr_file_zero(run->file, run->host, run->len + run->pad, 0, err);
    return run_write_buffer(batch, run, err);
}

/* Write what was reserved and make it visible, or give it all back. */
static int batch_finish(struct batch *batch, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0, n; i < batch->n && r == 0; i += n) {
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
    for (;;) {
        *r = (struct dr_reservation){.off = off, .len = len, .want = want};
        int rc = image->fmt->reserve(image, off, len, want, batch->src->coded_len, r, err);
        if (rc == 0) {
            batch->n++;
            return 0;
        }
        if (rc != -EAGAIN)
            return reserve_failed(image, rc, off, err);
        if (image->need.kind == DR_NEED_FLUSH && batch->n > 0)
            return -EAGAIN;
        rc = dr_image_satisfy(image, off, err);
        if (rc < 0)
            return rc;
    }
}

/* ------------------------------------------------------------------ changing a range */

enum mode {
    MODE_WRITE, /* the source's bytes, everywhere */
    MODE_FILL,  /* the source's bytes, where this image is a HOLE */
    MODE_ZERO,  /* this image says zeros */
    MODE_DROP,  /* this image is a HOLE; whole units */
    MODE_CODED, /* one coded unit */
};

enum action { ACT_SKIP, ACT_IN_PLACE, ACT_RESERVE };

struct change {
    struct dr_chain *chain;
    size_t at;
    enum mode mode;
    const struct source *src;
    unsigned zero_flags;
    bool no_bytes; /* -ENOTSUP rather than zeros as bytes */
};

/* len: of the piece at hand; the extent may end inside it. */
static enum action choose_action(const struct change *c, const struct dr_extent *ext, uint64_t len,
                                 bool whole)
{
    bool in_place = ext->kind == DR_DATA && ext->in_place;
    switch (c->mode) {
    case MODE_WRITE:
        return in_place ? ACT_IN_PLACE : ACT_RESERVE;
    case MODE_FILL:
        return ext->kind == DR_HOLE ? ACT_RESERVE : ACT_SKIP;
    case MODE_ZERO:
        if (ext->kind == DR_ZERO && ext->len >= len)
            return ACT_SKIP;
        return in_place && (ext->flat || !whole) ? ACT_IN_PLACE : ACT_RESERVE;
    case MODE_DROP:
        return (ext->kind == DR_HOLE && ext->len >= len) || !whole ? ACT_SKIP : ACT_RESERVE;
    default:
        return ACT_RESERVE;
    }
}

static int copy_in_place(const struct source *src, uint64_t off, const struct dr_extent *ext,
                         uint64_t len, struct dr_error *err)
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

static int write_in_place(const struct change *c, uint64_t off, const struct dr_extent *ext,
                          uint64_t len, struct dr_error *err)
{
    const struct source *src = c->src;
    if (src->buf)
        return dr_file_pwrite(ext->file, src->buf + (off - src->off), ext->host, len, err);
    if (src->file)
        return copy_in_place(src, off, ext, len, err);
    return dr_file_zero(ext->file, ext->host, len, c->zero_flags, err);
}

/* The common case: the bytes are there and may be overwritten. *done = 0: they are not. */
static int try_in_place(const struct change *c, uint64_t off, uint64_t len, uint64_t *done,
                        struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    struct dr_range range;
    struct dr_extent ext;
    *done = 0;
    dr_range_lock(image->ranges, &range, off, len, false);
    unsigned ticket = dr_epoch_enter(image->ranges);
    int r = dr_image_map(image, off, len, &ext, err);
    if (r == 0 && ext.kind == DR_DATA && ext.in_place) {
        *done = dr_min(len, ext.len);
        r = write_in_place(c, off, &ext, *done, err);
    }
    dr_epoch_leave(image->ranges, ticket);
    dr_range_unlock(image->ranges, &range);
    return r;
}

static int reserve_piece(struct batch *batch, const struct change *c, uint64_t off, uint64_t len,
                         struct dr_error *err)
{
    bool zeros = !c->src->buf && !c->src->file && !c->src->coded;
    if (c->mode == MODE_DROP)
        return batch_reserve(batch, off, len, DR_WANT_HOLE, err);
    if (c->mode == MODE_CODED)
        return batch_reserve(batch, off, len, DR_WANT_CODED, err);
    if (zeros) {
        int r = batch_reserve(batch, off, len, DR_WANT_ZERO, err);
        if (r != -ENOTSUP || c->no_bytes)
            return r;
    }
    return batch_reserve(batch, off, len, DR_WANT_DATA, err);
}

/* How far one reservation from cur on may reach: to the end of its unit, or of its span. */
static uint64_t reach(const struct dr_image *image, uint64_t cur)
{
    uint64_t uoff, ulen, span = image->fmt->span;
    image->fmt->unit(image, cur, &uoff, &ulen);
    return span ? dr_round_down(cur, span) + span : uoff + ulen;
}

static bool is_unit_end(const struct dr_image *image, uint64_t off)
{
    uint64_t uoff, ulen;
    if (off == image->size)
        return true;
    image->fmt->unit(image, off, &uoff, &ulen);
    return uoff == off;
}

/* Zeros for several units at once: a partial unit at an edge is a piece of its own, so that the
 * others need no bytes written. */
static uint64_t cut_to_units(const struct dr_image *image, uint64_t cur, uint64_t end)
{
    uint64_t uoff, ulen;
    image->fmt->unit(image, cur, &uoff, &ulen);
    if (cur != uoff)
        return dr_min(end, uoff + ulen);
    if (is_unit_end(image, end))
        return end;
    image->fmt->unit(image, end, &uoff, &ulen);
    return uoff > cur ? uoff : end;
}

struct piece {
    uint64_t len;
    bool first; /* begins with its unit */
    bool whole; /* whole units, the end of the disk counting as a unit's end */
};

/* The next piece of [cur, limit), whose beginning ext tells of: one reservation, if it needs one.
 */
static struct piece next_piece(const struct change *c, uint64_t cur, uint64_t limit,
                               const struct dr_extent *ext)
{
    const struct dr_image *image = c->chain->images[c->at];
    const struct source *src = c->src;
    bool zeros = !src->buf && !src->file && !src->coded;
    uint64_t end = dr_min(reach(image, cur), limit);
    struct piece p = {.first = is_unit_end(image, cur)};
    p.whole = p.first && is_unit_end(image, end);
    /* What is dropped, zeroed or coded as a whole unit may be a mixture (sub-units). */
    if (image->fmt->span || !p.whole || c->mode == MODE_WRITE || c->mode == MODE_FILL)
        end = dr_min(end, cur + ext->len);
    if (image->fmt->span && zeros)
        end = cut_to_units(image, cur, end);
    p.whole = p.first && is_unit_end(image, end);
    p.len = end - cur;
    return p;
}

/* What the first piece of a step turned out to be, when it was not a reservation. */
struct step {
    enum action action;
    struct dr_extent ext;
    uint64_t done;
};

/* image->lock and the exclusive range lock held. Collects reservations from off on; stops before
 * anything that needs none. */
static int collect(struct batch *batch, const struct change *c, uint64_t off, uint64_t limit,
                   struct step *step, struct dr_error *err)
{
    struct dr_image *image = batch->image;
    *step = (struct step){.action = ACT_RESERVE};
    for (uint64_t cur = off; cur < limit && batch->n < BATCH_UNITS;) {
        struct dr_extent ext;
        int r = dr_image_map_locked(image, cur, limit - cur, &ext, err);
        if (r < 0)
            return r;
        struct piece piece = next_piece(c, cur, limit, &ext);
        uint64_t len = piece.len;
        enum action action = choose_action(c, &ext, len, piece.whole);
        if (action != ACT_RESERVE) {
            if (batch->n == 0)
                *step = (struct step){.action = action, .ext = ext, .done = dr_min(len, ext.len)};
            if (batch->n == 0 && (action == ACT_IN_PLACE || c->mode == MODE_FILL))
                step->done = dr_min(ext.len, limit - cur);
            return 0;
        }
        if (batch->n > 0 && !piece.first)
            return 0; /* one reservation a unit: publish the first one before */
        r = reserve_piece(batch, c, cur, len, err);
        if (r == -ENOTSUP && c->mode == MODE_ZERO && ext.kind == DR_DATA && ext.in_place) {
            if (batch->n == 0)
                *step =
                    (struct step){.action = ACT_IN_PLACE, .ext = ext, .done = dr_min(len, ext.len)};
            return 0;
        }
        if (r == -EAGAIN)
            return 0;
        if (r < 0)
            return r;
        cur += len;
        batch->end = cur;
        step->done = cur - off;
    }
    return 0;
}

/* Whole units from off's unit on, as many as the request or a batch has. */
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

/* One step under the exclusive lock; *done > 0 bytes are dealt with. */
static int change_step(const struct change *c, uint64_t off, uint64_t len, uint64_t *done,
                       struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    struct batch batch;
    batch.chain = c->chain;
    batch.at = c->at;
    batch.image = image;
    batch.src = c->src;
    batch.off = off;
    batch.end = off;
    batch.n = 0;
    batch.zero_flags = c->zero_flags;
    uint64_t lock_off, lock_len;
    uint64_t limit = batch_limit(image, off, len, &lock_off, &lock_len);
    struct dr_range range;
    struct step step;
    dr_range_lock(image->ranges, &range, lock_off, lock_len, true);
    pthread_mutex_lock(&image->lock);
    int r = collect(&batch, c, off, limit, &step, err);
    bool dirty = dr_cache_dirty(image->cache) > DIRTY_CAP;
    pthread_mutex_unlock(&image->lock);
    if (r < 0)
        batch_cancel(&batch);
    else if (batch.n > 0)
        r = batch_finish(&batch, err);
    else if (step.action == ACT_IN_PLACE)
        r = write_in_place(c, off, &step.ext, step.done, err);
    dr_range_unlock(image->ranges, &range);
    *done = step.done;
    if (r == 0 && dirty)
        r = dr_image_flush(image, err);
    return r;
}

static int change_range(const struct change *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    bool optimistic = c->mode == MODE_WRITE;
    int r = len ? dr_image_begin(image, off, !(image->flags & DR_OPEN_UNCHANGED), err) : 0;
    while (r == 0 && len > 0) {
        uint64_t done = 0;
        if (optimistic)
            r = try_in_place(c, off, len, &done, err);
        if (r == 0 && done == 0)
            r = change_step(c, off, len, &done, err);
        off += done;
        len -= done;
    }
    return r;
}

/* ------------------------------------------------------------------ the public verbs */

int dr_chain_write(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, size_t len,
                   struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct source src = {.buf = buf, .off = off};
    struct change c = {.chain = chain, .at = at, .mode = MODE_WRITE, .src = &src};
    return change_range(&c, off, len, err);
}

int dr_chain_fill(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, uint64_t len,
                  struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct source src = {.buf = buf, .off = off};
    struct change c = {.chain = chain, .at = at, .mode = MODE_FILL, .src = &src};
    return change_range(&c, off, len, err);
}

/* Nothing to do at off? Then *len is cut to how long that holds; else to how long it does not. */
static int zero_already(struct dr_chain *chain, size_t at, uint64_t off, uint64_t *len,
                        unsigned flags, bool *already, struct dr_error *err)
{
    struct dr_place place;
    int r = dr_chain_map(chain, at, off, *len, &place, err);
    if (r < 0)
        return r;
    dr_place_done(&place);
    *len = place.ext.len;
    bool own = place.owner == at && place.ext.kind == DR_ZERO;
    bool reads_zero = place.ext.kind == DR_ZERO || place.ext.kind == DR_HOLE;
    *already = flags & DR_EXPLICIT ? own : reads_zero;
    return 0;
}

/* Where it is not zero already. */
static int zero_range(const struct change *c, uint64_t off, uint64_t len, unsigned flags,
                      struct dr_error *err)
{
    int r = 0;
    while (r == 0 && len > 0) {
        uint64_t part = len;
        bool already;
        r = zero_already(c->chain, c->at, off, &part, flags, &already, err);
        if (r == 0 && !already)
            r = change_range(c, off, part, err);
        off += part;
        len -= part;
    }
    return r;
}

int dr_chain_zero(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, unsigned flags,
                  struct dr_error *err)
{
    struct source src = {.off = off};
    struct change c = {.chain = chain, .at = at, .mode = MODE_ZERO, .src = &src};
    c.zero_flags = flags & DR_MAY_UNMAP ? DR_FILE_ZERO_PUNCH : 0;
    int r = check_range(chain->images[at], off, len, err);
    return r < 0 ? r : zero_range(&c, off, len, flags, err);
}

/* Shrink [*off, *end) to whole units; the end of the disk counts as a unit's end. */
static void whole_units(const struct dr_image *image, uint64_t *off, uint64_t *end)
{
    uint64_t uoff, ulen;
    image->fmt->unit(image, *off, &uoff, &ulen);
    if (uoff != *off)
        *off = uoff + ulen;
    if (*end >= image->size || *end <= *off)
        return;
    image->fmt->unit(image, *end, &uoff, &ulen);
    *end = uoff;
}

/* Whole units from off on that are a hole already, or that are not: an empty image is a few
 * questions, not one a unit. */
static int hole_or_not(struct dr_image *image, uint64_t off, uint64_t end, bool *hole,
                       uint64_t *next, struct dr_error *err)
{
    struct dr_extent ext;
    uint64_t uoff, ulen;
    *next = end;
    int r = dr_image_map(image, off, end - off, &ext, err);
    if (r < 0 || ext.len == end - off) {
        *hole = r == 0 && ext.kind == DR_HOLE;
        return r;
    }
    image->fmt->unit(image, off + ext.len, &uoff, &ulen);
    *hole = ext.kind == DR_HOLE && uoff > off;
    *next = *hole || uoff == off + ext.len ? uoff : dr_min(uoff + ulen, end);
    return 0;
}

int dr_chain_drop(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                  struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    int r = check_range(image, off, len, err);
    if (r < 0)
        return r;
    uint64_t end = off + len;
    whole_units(image, &off, &end);
    if (off >= end)
        return 0;
    struct source src = {.off = off};
    struct change c = {.chain = chain, .at = at, .mode = MODE_DROP, .src = &src};
    c.zero_flags = DR_FILE_ZERO_PUNCH;
    while (r == 0 && off < end) {
        uint64_t next;
        bool hole;
        r = hole_or_not(image, off, end, &hole, &next, err);
        if (r == 0 && !hole)
            r = change_range(&c, off, next - off, err);
        off = next;
    }
    return r;
}

/* One extent of this image, len long, that holds something. */
static int discard_extent(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, bool flat,
                          struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    if (flat)
        return dr_chain_zero(chain, at, off, len, DR_MAY_UNMAP, err);
    uint64_t end = off + len;
    whole_units(image, &off, &end);
    if (off >= end)
        return 0;
    bool alone = at + 1 == chain->n && !image->backing_name;
    int r = alone ? dr_chain_drop(chain, at, off, end - off, err) : -ENOTSUP;
    if (r == -ENOTSUP)
        r = dr_chain_zero(chain, at, off, end - off, DR_MAY_UNMAP, err);
    return r;
}

/* What a parent shows: nobody wants it any more, so nobody has to copy it in one day. Only where
 * saying so is a matter of metadata. */
static int discard_hole(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                        struct dr_error *err)
{
    uint64_t end = off + len;
    whole_units(chain->images[at], &off, &end);
    if (off >= end || at + 1 == chain->n)
        return 0;
    struct source src = {.off = off};
    struct change c = {.chain = chain,
                       .at = at,
                       .mode = MODE_ZERO,
                       .src = &src,
                       .zero_flags = DR_FILE_ZERO_PUNCH,
                       .no_bytes = true};
    int r = zero_range(&c, off, end - off, 0, err);
    return r == -ENOTSUP ? 0 : r;
}

int dr_chain_discard(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                     struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    int r = check_range(image, off, len, err);
    while (r == 0 && len > 0) {
        struct dr_extent ext;
        r = dr_image_map(image, off, len, &ext, err);
        if (r == 0 && (ext.kind == DR_DATA || ext.kind == DR_CODED))
            r = discard_extent(chain, at, off, ext.len, ext.flat, err);
        else if (r == 0 && ext.kind == DR_HOLE)
            r = discard_hole(chain, at, off, ext.len, err);
        off += ext.len;
        len -= ext.len;
    }
    return r;
}

int dr_chain_copy_from(struct dr_chain *chain, size_t at, uint64_t off, struct dr_file *src_file,
                       uint64_t src_off, uint64_t len, uint64_t *copied, struct dr_error *err)
{
    *copied = 0;
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct source src = {.file = src_file, .file_off = src_off, .off = off};
    struct change c = {.chain = chain, .at = at, .mode = MODE_WRITE, .src = &src};
    r = dr_image_begin(chain->images[at], off, !(chain->images[at]->flags & DR_OPEN_UNCHANGED),
                       err);
    while (r == 0 && *copied < len) {
        uint64_t done = 0;
        r = try_in_place(&c, off + *copied, len - *copied, &done, err);
        if (r == 0 && done == 0)
            r = change_step(&c, off + *copied, len - *copied, &done, err);
        if (r == 0)
            *copied += done;
    }
    return r == -ENOTSUP && *copied > 0 ? 0 : r;
}

int dr_chain_write_coded(struct dr_chain *chain, size_t at, const void *coded, uint32_t coded_len,
                         uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct source src = {.off = off, .coded = coded, .coded_len = coded_len};
    struct change c = {.chain = chain, .at = at, .mode = MODE_CODED, .src = &src};
    return change_range(&c, off, len, err);
}
