/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* From extents to items. One thread at a time is here. */
#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#include "archive/vma-layout.h"
#include "archive/vma-read.h"

#define ZERO_RUN 1024u /* clusters of zeros that become one item: 64 MiB */
#define QUIET    256u  /* extents after which the engine may look at its job */
#define TICK_NS  (20u * 1000 * 1000)

/* ------------------------------------------------------------------ bytes of the archive */

/* The bytes at pos through the window. Where units are looked at one by one, many come at once. */
static int read_window(struct vma_read *x, struct dr_error *err)
{
    if (x->pos < x->window_off || x->pos + VMA_EXTENT_HEADER > x->window_off + x->window_len) {
        size_t want = x->pos - x->last_unit <= VMA_EXTENT_HEADER ? VMA_READ_WINDOW
                                                                 : VMA_EXTENT_HEADER;
        x->window_off = x->pos;
        x->window_len = 0;
        int r = dr_file_pread_short(x->file, x->window, x->pos, want, &x->window_len, err);
        if (r < 0 && dr_is_damage(r) && want > VMA_EXTENT_HEADER) { /* behind this unit, maybe */
            dr_error_reset(err);
            r = dr_file_pread_short(x->file, x->window, x->pos, VMA_EXTENT_HEADER, &x->window_len,
                                    err);
        }
        if (r < 0)
            return r;
    }
    size_t at = (size_t)(x->pos - x->window_off);
    x->unit_len = (size_t)dr_min(x->window_len - at, VMA_EXTENT_HEADER);
    memcpy(x->unit, x->window + at, x->unit_len);
    return 0;
}

/* The 512 bytes at pos, or as many as there are, into unit. */
static int read_unit(struct vma_read *x, struct dr_error *err)
{
    if (x->held) {
        x->held = false;
        return 0;
    }
    int r = x->file ? read_window(x, err)
                    : dr_source_read(x->vma->source, x->unit, VMA_EXTENT_HEADER, &x->unit_len, err);
    x->last_unit = x->pos;
    return r;
}

/* ------------------------------------------------------------------ behind damage */

/* Where the header may be wrong, the first good extent says which uuid all have. */
static void learn_uuid(struct vma_read *x)
{
    struct vma_extent extent;
    const uint8_t *uuid = x->unit + VMA_AT_EXTENT_UUID;
    if (!x->vma->header.wrong_sum || x->vma->uuid_known || x->unit_len < VMA_EXTENT_HEADER ||
        vma_extent_parse(x->unit, uuid, x->vma->name, x->pos, &extent, NULL) < 0)
        return;
    memcpy(x->vma->header.uuid, uuid, 16);
    x->vma->uuid_known = true;
}

static bool is_extent(struct vma_read *x)
{
    struct vma_extent extent;
    learn_uuid(x);
    return x->unit_len == VMA_EXTENT_HEADER && memcmp(x->unit, "VMAE", 4) == 0 &&
           vma_extent_parse(x->unit, x->vma->header.uuid, x->vma->name, x->pos, &extent, NULL) == 0;
}

/* Is this failure of the source more than damage? */
static bool ends_all(const struct vma_read *x, int r)
{
    return !x->o->salvage || !dr_is_damage(r);
}

/* Behind what a packed stream could not give. False: there is nothing that can be unpacked. */
static bool bridge(struct vma_read *x)
{
    if (x->file)
        return false;
    vma_doubt_tell(x);
    if (dr_source_resume(x->vma->source) < 0)
        return false;
    x->pos = dr_source_pos(x->vma->source);
    x->shifted = true;
    return true;
}

/* Move on by so many bytes; those that are behind them stay. */
static int move_on(struct vma_read *x, size_t by, struct dr_error *err)
{
    size_t keep = VMA_EXTENT_HEADER - by, got = 0;
    x->pos += by;
    if (x->file || keep == 0)
        return read_unit(x, err);
    memmove(x->unit, x->unit + by, keep);
    int r = dr_source_read(x->vma->source, x->unit + keep, by, &got, err);
    x->unit_len = keep + got;
    return r;
}

/* The unit behind this one. What a file cannot give counts as bytes that are no extent; a stream
 * that breaks off goes on where it can, or ends there. */
static int next_unit(struct vma_read *x, bool *zero, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    bool last = x->unit_len < VMA_EXTENT_HEADER;
    int r = last ? 0 : move_on(x, x->shifted ? vma_next_magic(x->unit) : VMA_EXTENT_HEADER, &why);
    x->pos += last ? x->unit_len : 0;
    while (r < 0 && !ends_all(x, r) && bridge(x)) {
        dr_error_reset(&why);
        *zero = false;
        r = read_unit(x, &why);
    }
    if (r < 0 && ends_all(x, r))
        return dr_fail(err, -r, "%s", why.text);
    x->ended = last || (r < 0 ? !x->file : x->unit_len == 0);
    x->broke_off = x->broke_off || (r < 0 && !x->file);
    if (r < 0) {
        *zero = false;
        memset(x->unit, 0xff, sizeof(x->unit));
        x->unit_len = VMA_EXTENT_HEADER;
    }
    return 0;
}

/* Go on to the next extent with a good header. Also tells zeros up to the end of the archive, as
 * tapes and block devices leave them, from damage: without --salvage that is all. */
static int resync(struct vma_read *x, const char *why, struct dr_error *err)
{
    uint64_t from = x->pos;
    bool zero = true;
    do {
        zero = zero && dr_is_zero(x->unit, x->unit_len);
        if (!zero && !x->o->salvage)
            return vma_damage(x, DR_VMA_EXTENT, 0, from, x->pos + x->unit_len - from, why, err);
        int r = next_unit(x, &zero, err);
        if (r < 0)
            return r;
        if (dr_job_stopped(x->job))
            return dr_fail(err, ECANCELED, "stopped on request");
        x->held = !x->ended && is_extent(x);
    } while (!x->ended && !x->held);
    if (!zero || !x->ended)
        return vma_damage(x, DR_VMA_EXTENT, 0, from, x->pos - from, why, err);
    vma_read_message(x, "%" PRIu64 " zeros behind the last extent, at offset %" PRIu64,
                     x->pos - from, from);
    return 0;
}

/* Where an extent should be, nothing can be read. */
static int broke_off(struct vma_read *x, int r, const struct dr_error *why, struct dr_error *err)
{
    if (ends_all(x, r))
        return dr_fail(err, -r, "%s", why->text);
    memset(x->unit, 0xff, sizeof(x->unit));
    x->unit_len = VMA_EXTENT_HEADER;
    if (x->file)
        return resync(x, why->text, err);
    uint64_t at = x->pos;
    x->ended = x->broke_off = !bridge(x);
    return vma_damage(x, DR_VMA_EXTENT, 0, at, 1, why->text, err);
}

/* ------------------------------------------------------------------ zeros */

static void give_zeros(struct vma_read *x, unsigned id)
{
    struct vma_reading *d = &x->disks[id];
    if (d->zero_n > 0)
        x->zeros[x->n_zeros++] = (struct vma_zeros){id, d->zero_first, d->zero_n};
    d->zero_n = 0;
}

static void add_zeros(struct vma_read *x, unsigned id, uint32_t cluster)
{
    struct vma_reading *d = &x->disks[id];
    if (d->zero_n > 0 && d->zero_first + d->zero_n == cluster && d->zero_n < ZERO_RUN) {
        d->zero_n++;
        return;
    }
    give_zeros(x, id);
    d->zero_first = cluster;
    d->zero_n = 1;
}

/* One of the runs that still wait for more, when no more can come. */
static bool last_zeros(struct vma_read *x)
{
    for (unsigned id = 1; id < 256 && x->n_zeros == 0; id++)
        give_zeros(x, id);
    return x->n_zeros > 0;
}

/* ------------------------------------------------------------------ slots */

static int out_of_order(struct vma_read *x, const struct vma_slot *s, struct dr_error *err)
{
    char why[512];
    snprintf(why, sizeof(why),
             "%s: extent at offset %" PRIu64 ": cluster %" PRIu32
             " of the machine's state, expected %" PRIu64 ": it must come in order",
             x->vma->name, x->pos, s->cluster, x->disks[s->id].expected);
    return vma_damage(x, DR_VMA_EXTENT, 0, x->pos, VMA_EXTENT_HEADER, why, err);
}

/* 1 = ours, 0 = leave it out, negative = stop. */
static int take_in_order(struct vma_read *x, const struct vma_slot *s, struct dr_error *err)
{
    struct vma_reading *d = &x->disks[s->id];
    uint64_t cluster = s->cluster, expected = d->expected;
    if (cluster != expected && !x->o->salvage)
        return out_of_order(x, s, err);
    if (cluster < expected)
        return vma_damage(x, DR_VMA_DUPLICATE, s->id, cluster * DR_VMA_CLUSTER, DR_VMA_CLUSTER,
                          NULL, err);
    if (cluster > expected)
        vma_damage(x, DR_VMA_MISSING, s->id, expected * DR_VMA_CLUSTER,
                   (cluster - expected) * DR_VMA_CLUSTER, NULL, err);
    d->expected = cluster + 1;
    if (d->target && s->mask && !d->cut && cluster >= vma_clusters(d->end)) {
        d->cut = true;
        vma_read_message(x,
                         "the machine's state goes on behind its %" PRIu64
                         " bytes, for which alone there is room",
                         d->end);
    }
    return 1;
}

static int take_once(struct vma_read *x, const struct vma_slot *s, struct dr_error *err)
{
    struct vma_reading *d = &x->disks[s->id];
    int r = vma_seen_add(&d->seen, s->cluster, &x->budget);
    if (r == 0)
        return 1;
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s: out of memory", x->vma->name);
    if (r < 0)
        return dr_fail(err, E2BIG,
                       "%s: extent at offset %" PRIu64 ": more than %" PRIu64
                       " MiB are needed to remember which clusters were "
                       "there: they stand too far apart",
                       x->vma->name, x->pos, x->budget.used >> 20);
    char why[64];
    snprintf(why, sizeof(why), "again in the extent at offset %" PRIu64, x->pos);
    uint64_t off = (uint64_t)s->cluster * DR_VMA_CLUSTER;
    return vma_damage(x, DR_VMA_DUPLICATE, s->id, off, dr_min(DR_VMA_CLUSTER, d->disk->size - off),
                      why, err);
}

static int take_slot(struct vma_read *x, const struct vma_slot *s, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    if (vma_slot_check(&x->vma->header, s, x->vma->name, x->pos, &why) < 0) {
        bool again = x->told_at == x->pos; /* one of several in this extent */
        x->told_at = x->pos;
        return again ? 0
                     : vma_damage(x, DR_VMA_EXTENT, 0, x->pos, VMA_EXTENT_HEADER, why.text, err);
    }
    int r = x->disks[s->id].disk->vmstate ? take_in_order(x, s, err) : take_once(x, s, err);
    if (r <= 0)
        return r;
    unsigned stored = (unsigned)__builtin_popcount(s->mask);
    x->result.bytes_read += DR_VMA_CLUSTER;
    x->result.zero_bytes += (VMA_BLOCKS - stored) * DR_VMA_BLOCK;
    x->result.zero_cluster_bytes += stored ? 0 : DR_VMA_CLUSTER;
    x->passed += DR_VMA_CLUSTER;
    return 1;
}

static bool wanted(const struct vma_read *x, const struct vma_slot *s)
{
    return s->mask != 0 && !x->o->headers_only && (x->sums || x->unpack || x->disks[s->id].target);
}

/* Slots whose data ends by avail; those that somebody wants stay in the extent. before: the extent
 * was extracted before an interruption. */
static int take_slots(struct vma_read *x, struct vma_extent *e, uint64_t avail, bool before,
                      struct dr_error *err)
{
    unsigned n = 0;
    int r = 0;
    if (!x->file)
        vma_doubt_renew(x);
    uint64_t data = x->pos + VMA_EXTENT_HEADER;
    for (unsigned i = 0; i < e->n && r >= 0; i++) {
        struct vma_slot s = e->slot[i];
        uint64_t len = (uint64_t)__builtin_popcount(s.mask) * DR_VMA_BLOCK;
        if (len > 0 && s.data + len > avail)
            continue;
        r = take_slot(x, &s, err);
        if (r > 0 && !x->file && len > 0 && data + s.data + len > x->vouched)
            vma_doubt_note(x, &s);
        if (r <= 0 || before)
            continue;
        if (s.mask == 0 && x->disks[s.id].zeros)
            add_zeros(x, s.id, s.cluster);
        if (wanted(x, &s))
            e->slot[n++] = s;
    }
    e->n = n;
    return r < 0 ? r : 0;
}

/* ------------------------------------------------------------------ extents */

static bool any_wanted(const struct vma_read *x, const struct vma_extent *e)
{
    bool any = false;
    for (unsigned i = 0; i < e->n && !any; i++)
        any = wanted(x, &e->slot[i]);
    return any;
}

/* Where the source stops short of len, *got tells how far it came. */
static int read_data(struct vma_read *x, struct vma_chunk *c, size_t len, uint64_t *got,
                     struct dr_error *err)
{
    if (!c->data)
        c->data = malloc(VMA_EXTENT_MAX - VMA_EXTENT_HEADER);
    if (!c->data)
        return dr_fail(err, ENOMEM, "%s: out of memory", x->vma->name);
    size_t n = 1;
    int r = 0;
    for (*got = 0; *got < len && n > 0 && r == 0; *got += n) {
        n = 0;
        r = dr_source_read(x->vma->source, c->data + *got, len - (size_t)*got, &n, err);
    }
    return r;
}

/* Pass over the extent's data, or read it; *avail = how much of it there is. */
static int get_data(struct vma_read *x, struct vma_chunk *c, bool before, uint64_t *avail,
                    struct dr_error *err)
{
    uint32_t len = c->extent.data_len;
    c->off = x->pos + VMA_EXTENT_HEADER;
    if (x->file) {
        uint64_t size = dr_file_size(x->file);
        *avail = dr_min(len, size > c->off ? size - c->off : 0);
        return 0;
    }
    if (!before && any_wanted(x, &c->extent))
        return read_data(x, c, len, avail, err);
    return dr_source_skip(x->vma->source, len, avail, err);
}

static int cut_short(struct vma_read *x, const struct vma_chunk *c, uint64_t avail,
                     const char *reason, struct dr_error *err)
{
    char why[512];
    uint64_t end = c->off + avail;
    if (reason[0])
        snprintf(why, sizeof(why), "%s", reason);
    else
        snprintf(why, sizeof(why),
                 "%s: ends at offset %" PRIu64 " inside the extent at offset %" PRIu64
                 ", expected %" PRIu32 " bytes of data",
                 x->vma->name, end, x->pos, c->extent.data_len);
    return vma_damage(x, DR_VMA_EXTENT, 0, x->pos, end - x->pos, why, err);
}

/* An extent with a good header. */
static int take_extent(struct vma_read *x, struct vma_chunk *c, struct dr_error *err)
{
    uint64_t avail = 0, len = c->extent.data_len;
    uint64_t end = x->pos + VMA_EXTENT_HEADER + len;
    bool before = end <= x->resume.from;
    struct dr_error why = DR_ERROR_INIT;
    int r = get_data(x, c, before, &avail, &why);
    if (r < 0 && ends_all(x, r))
        return dr_fail(err, -r, "%s", why.text);
    x->ended = avail < len;
    x->broke_off = x->broke_off || (r < 0 && !x->file);
    r = x->ended ? cut_short(x, c, avail, why.text, err) : 0;
    if (r == 0)
        r = take_slots(x, &c->extent, avail, before, err);
    x->pos = x->ended ? c->off + avail : end;
    if (r == 0 && why.errnum && bridge(x))
        x->ended = x->broke_off = false;
    return r;
}

static int next_extent(struct vma_read *x, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = read_unit(x, &why);
    if (r < 0)
        return broke_off(x, r, &why, err);
    if (x->unit_len == 0) {
        x->ended = true;
        return 0;
    }
    struct vma_chunk *c = vma_chunk_take(x);
    if (!c)
        return dr_fail(err, ENOMEM, "%s: out of memory", x->vma->name);
    learn_uuid(x);
    if (x->unit_len < VMA_EXTENT_HEADER)
        r = dr_fail(&why, EBADMSG,
                    "%s: ends at offset %" PRIu64
                    " inside the header of an extent at offset %" PRIu64,
                    x->vma->name, x->pos + x->unit_len, x->pos);
    else
        r = vma_extent_parse(x->unit, x->vma->header.uuid, x->vma->name, x->pos, &c->extent, &why);
    if (r == 0)
        r = take_extent(x, c, err);
    else
        c->extent.n = 0;
    if (why.errnum == EBADMSG)
        r = resync(x, why.text, err);
    else if (why.errnum)
        r = dr_fail(err, why.errnum, "%s", why.text);
    if (r == 0 && c->extent.n > 0)
        x->ready = c;
    else
        vma_chunk_done(x, c);
    return r;
}

/* ------------------------------------------------------------------ items */

static void begin_item(struct vma_read *x, struct dr_copy_item *item, enum vma_item_kind kind)
{
    item->kind = kind;
    item->passed = x->passed;
    x->passed = 0;
    x->quiet = 0;
    DR_LOCK_SCOPE(&x->lock);
    x->under_way++;
}

static void zeros_item(struct vma_read *x, struct dr_copy_item *item)
{
    struct vma_zeros z = x->zeros[--x->n_zeros];
    begin_item(x, item, VMA_ITEM_ZEROS);
    item->aux[0] = z.id;
    item->aux[1] = z.first;
    item->aux[2] = z.n;
}

/* Its stored bytes count for the job's rate. */
static void data_item(struct vma_read *x, struct dr_copy_item *item)
{
    struct vma_chunk *c = x->ready;
    x->ready = NULL;
    begin_item(x, item, VMA_ITEM_DATA);
    for (unsigned i = 0; i < c->extent.n; i++)
        item->len += (uint64_t)__builtin_popcount(c->extent.slot[i].mask) * DR_VMA_BLOCK;
    item->passed -= dr_min(item->passed, item->len);
    item->aux[0] = (uintptr_t)c;
}

/* ------------------------------------------------------------------ checkpoints */

/* Until all that was given out is written, or the run ends. */
static void wait_until_idle(struct vma_read *x)
{
    DR_LOCK_SCOPE(&x->lock);
    while (x->under_way > 0 && !x->stopping && !dr_job_stopped(x->job)) {
        struct timespec ts;
        clock_gettime(CLOCK_MONOTONIC, &ts);
        uint64_t ns = (uint64_t)ts.tv_nsec + TICK_NS;
        ts.tv_sec += (time_t)(ns / 1000000000u);
        ts.tv_nsec = (long)(ns % 1000000000u);
        pthread_cond_timedwait(&x->idle, &x->lock, &ts);
    }
}

/* At most a tenth of the time goes into being durable. */
static int checkpoint(struct vma_read *x, struct dr_error *err)
{
    uint64_t begun = vma_read_now(x);
    wait_until_idle(x);
    if (x->stopping || dr_job_stopped(x->job))
        return 0; /* the engine says how the run ends */
    int r = vma_flush_targets(x, err);
    if (r == 0)
        r = x->resume.checkpoint(x->resume.user, x->pos, err);
    uint64_t now = vma_read_now(x);
    x->checkpoint_at = now + dr_max(VMA_CHECKPOINT_NS, 9 * (now - begun));
    return r;
}

static bool checkpoint_due(const struct vma_read *x)
{
    return x->resume.checkpoint && x->pos > dr_max(x->resume.from, x->vma->header.header_size) &&
           vma_read_now(x) >= x->checkpoint_at;
}

/* ------------------------------------------------------------------ next */

int vma_read_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct vma_read *x = user;
    for (;;) {
        int r = 0;
        bool due = !x->ready && checkpoint_due(x);
        if (x->n_zeros > 0 || ((due || (x->ended && !x->ready)) && last_zeros(x))) {
            zeros_item(x, item);
            return 1;
        }
        if (x->ready) {
            data_item(x, item);
            return 1;
        }
        if (x->ended) {
            item->passed = x->passed;
            return 0;
        }
        if (x->quiet++ >= QUIET) {
            begin_item(x, item, VMA_ITEM_NONE);
            return 1;
        }
        if (due)
            r = checkpoint(x, err);
        if (r == 0)
            r = next_extent(x, err);
        if (r < 0) {
            atomic_store(&x->stopping, true);
            return r;
        }
    }
}
