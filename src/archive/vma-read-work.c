/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Checks, writes or compares the data and the zeros of an extent, in many threads at a time. */
#include <inttypes.h>
#include <time.h>

#include "archive/vma-read.h"

#define TICK_NS (20u * 1000 * 1000)
#define FULL    0xffffu

/* ------------------------------------------------------------------ rates */

static void sleep_ns(const struct vma_read *x, uint64_t ns)
{
    struct timespec ts = {0, (long)dr_min(ns, TICK_NS)};
    if (x->clock)
        x->clock->sleep(x->clock->user, dr_min(ns, TICK_NS));
    else
        nanosleep(&ts, NULL);
}

/* When may len bytes be written? Books their time. */
static uint64_t book(struct vma_read *x, struct vma_rate *rate, uint64_t len)
{
    uint64_t now = vma_read_now(x);
    DR_LOCK_SCOPE(&x->lock);
    uint64_t start = dr_max(now, rate->next);
    double ns = (double)len * 1e9 / (double)rate->rate;
    rate->next = start + (ns < 1e17 ? (uint64_t)ns : (uint64_t)1e17);
    return start;
}

/* Returns early, for the run to end, when it is stopped. */
static int hold_to_rate(struct vma_read *x, struct vma_rate *rate, uint64_t len,
                        struct dr_error *err)
{
    if (!rate)
        return 0;
    uint64_t start = book(x, rate, len), now;
    while ((now = vma_read_now(x)) < start && !x->stopping) {
        if (dr_job_stopped(x->job))
            return dr_fail(err, ECANCELED, "stopped on request");
        sleep_ns(x, start - now);
    }
    return 0;
}

/* ------------------------------------------------------------------ comparing */

static int tell_difference(struct vma_read *x, unsigned id, const uint8_t *want,
                           const uint8_t *have, uint64_t off, size_t len, struct dr_error *err)
{
    int r = 0;
    for (size_t at = 0, n; at < len && r == 0; at += n) {
        n = (size_t)dr_min(DR_VMA_BLOCK, len - at);
        bool same = want ? memcmp(want + at, have + at, n) == 0 : dr_is_zero(have + at, n);
        if (!same)
            r = vma_damage(x, DR_VMA_DIFFERS, id, off + at, n, NULL, err);
    }
    return r;
}

/* Behind the end of the disk are zeros: its last sector may be cut. */
static int read_padded(struct dr_disk *disk, uint8_t *buf, uint64_t off, uint64_t len,
                       struct dr_error *err)
{
    uint64_t size = dr_size(disk), n = off < size ? dr_min(len, size - off) : 0;
    memset(buf + n, 0, (size_t)(len - n));
    return n > 0 ? dr_pread(disk, buf, off, (size_t)n, err) : 0;
}

/* Bytes from off on that the disk knows to be zeros; or *n is how many have the same status. */
static int known_zeros(struct dr_disk *disk, uint64_t off, uint64_t len, uint64_t *n, bool *zeros,
                       struct dr_error *err)
{
    struct dr_extent_status status = {0};
    uint64_t size = dr_size(disk);
    *zeros = false;
    if (off >= size)
        return 0;
    int r = dr_block_status(disk, off, dr_min(len, size - off), &status, err);
    if (r < 0)
        return r;
    *zeros = status.flags & DR_EXTENT_ZERO;
    *n = dr_min(*zeros ? len : *n, status.len);
    return 0;
}

/* want NULL = zeros. Where both are known to be zeros nothing is read. */
static int compare(struct vma_read *x, unsigned id, const uint8_t *want, uint64_t off, uint64_t len,
                   uint8_t *buf, struct dr_error *err)
{
    struct dr_disk *disk = x->disks[id].target->disk;
    int r = 0;
    for (uint64_t n; len > 0 && r == 0 && !x->stopping; len -= n, off += n) {
        bool zeros = false;
        n = dr_min(len, VMA_READ_BUFFER);
        if (!want)
            r = known_zeros(disk, off, len, &n, &zeros, err);
        if (r < 0 || zeros)
            continue;
        r = read_padded(disk, buf, off, n, err);
        if (r == 0)
            r = tell_difference(x, id, want, buf, off, (size_t)n, err);
        want = want ? want + n : NULL;
    }
    return r;
}

/* ------------------------------------------------------------------ stretches of a disk */

/* One write: data that is contiguous in memory and in the disk, or zeros. */
struct stretch {
    struct vma_read *x;
    uint8_t *scratch; /* VMA_READ_BUFFER bytes */
    unsigned id;
    const uint8_t *data; /* NULL = zeros */
    uint64_t off, len;
};

static int emit(struct stretch *s, struct dr_error *err)
{
    struct vma_reading *d = &s->x->disks[s->id];
    uint64_t len = s->off < d->end ? dr_min(s->len, d->end - s->off) : 0;
    s->len = 0;
    if (len == 0)
        return 0;
    if (d->target->compare)
        return compare(s->x, s->id, s->data, s->off, len, s->scratch, err);
    if (!s->data)
        return d->target->is_zero ? 0 : dr_zero(d->target->disk, s->off, len, DR_MAY_UNMAP, err);
    int r = hold_to_rate(s->x, d->rate, len, err);
    return r < 0 || s->x->stopping
               ? r
               : dr_pwrite(d->target->disk, s->data, s->off, (size_t)len, 0, err);
}

static int add(struct stretch *s, unsigned id, const uint8_t *data, uint64_t off, uint64_t len,
               struct dr_error *err)
{
    bool joins = s->len > 0 && s->id == id && s->off + s->len == off &&
                 (data ? s->data && s->data + s->len == data : !s->data);
    if (joins) {
        s->len += len;
        return 0;
    }
    int r = emit(s, err);
    s->id = id;
    s->data = data;
    s->off = off;
    s->len = len;
    return r;
}

/* ------------------------------------------------------------------ clusters */

/* All of a cluster, zeros and all; its own bytes if that is what they are. */
static const uint8_t *whole(const struct vma_slot *slot, const uint8_t *data, uint8_t *scratch)
{
    if (slot->mask == FULL)
        return data;
    for (unsigned k = 0; k < VMA_BLOCKS; k++) {
        if (slot->mask & 1u << k) {
            memcpy(scratch + k * DR_VMA_BLOCK, data, DR_VMA_BLOCK);
            data += DR_VMA_BLOCK;
        } else {
            memset(scratch + k * DR_VMA_BLOCK, 0, DR_VMA_BLOCK);
        }
    }
    return scratch;
}

static int bad_sum(struct vma_read *x, unsigned id, uint64_t off, struct dr_error *err)
{
    const struct dr_vma_disk *disk = x->disks[id].disk;
    uint64_t len = disk->vmstate ? DR_VMA_CLUSTER : dr_min(DR_VMA_CLUSTER, disk->size - off);
    return vma_damage(x, DR_VMA_CHECKSUM, id, off, len, NULL, err);
}

static int check_sum(struct vma_read *x, const struct vma_slot *slot, const uint8_t *data,
                     uint8_t *scratch, struct dr_error *err)
{
    struct vma_sum want;
    bool known;
    const struct dr_vma_disk *disk = x->disks[slot->id].disk;
    uint64_t off = (uint64_t)slot->cluster * DR_VMA_CLUSTER;
    int r = vma_sums_get(x->sums, slot->id, slot->cluster, &want, &known, err);
    if (r < 0)
        return r;
    const uint8_t *cluster = whole(slot, data, scratch);
    if (!disk->vmstate &&
        disk->size - off < DR_VMA_CLUSTER) { /* what is behind the end is no data */
        size_t n = (size_t)(disk->size - off);
        memmove(scratch, cluster, n);
        memset(scratch + n, 0, DR_VMA_CLUSTER - n);
        cluster = scratch;
    }
    struct vma_sum have = {0, 0};
    if (known)
        have = vma_sum_of(cluster);
    if (known ? have.low == want.low && have.high == want.high
              : dr_is_zero(cluster, DR_VMA_CLUSTER))
        return 0;
    return bad_sum(x, slot->id, off, err);
}

/* Many small holes in what must be zeroed cost more than writing their zeros. */
static int send_whole(struct stretch *s, const struct vma_slot *slot, const uint8_t *data,
                      struct dr_error *err)
{
    int r = emit(s, err); /* it may still need the scratch */
    const uint8_t *cluster = whole(slot, data, s->scratch);
    if (r == 0)
        r = add(s, slot->id, cluster, (uint64_t)slot->cluster * DR_VMA_CLUSTER, DR_VMA_CLUSTER,
                err);
    return r < 0 ? r : emit(s, err);
}

static int send_cluster(struct stretch *s, const struct vma_slot *slot, const uint8_t *data,
                        struct dr_error *err)
{
    const struct dr_vma_target *t = s->x->disks[slot->id].target;
    uint64_t off = (uint64_t)slot->cluster * DR_VMA_CLUSTER;
    if (slot->mask == FULL)
        return add(s, slot->id, data, off, DR_VMA_CLUSTER, err);
    if (!t->is_zero && !t->compare)
        return send_whole(s, slot, data, err);
    int r = 0;
    for (unsigned k = 0; k < VMA_BLOCKS && r == 0; k++) {
        bool stored = slot->mask & 1u << k;
        r = add(s, slot->id, stored ? data : NULL, off + k * DR_VMA_BLOCK, DR_VMA_BLOCK, err);
        data += stored ? DR_VMA_BLOCK : 0;
    }
    return r;
}

/* ------------------------------------------------------------------ extents */

static uint32_t stored(const struct vma_slot *slot)
{
    return (uint32_t)__builtin_popcount(slot->mask) * DR_VMA_BLOCK;
}

/* Slots from i on whose data stands together and fits the buffer. */
static unsigned group(const struct vma_extent *e, unsigned i, uint32_t *len)
{
    unsigned n = 1;
    *len = stored(&e->slot[i]);
    while (i + n < e->n && e->slot[i + n].data == e->slot[i].data + *len &&
           *len + stored(&e->slot[i + n]) <= VMA_READ_BUFFER)
        *len += stored(&e->slot[i + n++]);
    return n;
}

/* Of a compressed archive's damaged pieces some bytes can be read, but no checksum was right for
 * them. at: of the slot's data in the archive. The checksums beside it say more, where they are. */
static int tell_doubtful(struct vma_read *x, const struct vma_slot *slot, uint64_t at,
                         struct dr_error *err)
{
    struct dr_source_range range;
    const struct dr_vma_disk *disk = x->disks[slot->id].disk;
    uint64_t off = (uint64_t)slot->cluster * DR_VMA_CLUSTER, len = DR_VMA_CLUSTER;
    if (!x->file || x->sums || !dr_source_doubtful(x->file, at, at + stored(slot), &range))
        return 0;
    if (!disk->vmstate)
        len = dr_min(len, disk->size - off);
    return vma_damage(x, DR_VMA_DOUBTFUL, slot->id, off, len, NULL, err);
}

/* at: of the first slot's data in the archive. */
static int take_group(struct stretch *s, const struct vma_slot *slots, unsigned n, uint64_t at,
                      const uint8_t *data, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0; i < n && r == 0; i++)
        r = tell_doubtful(s->x, &slots[i], at + (slots[i].data - slots[0].data), err);
    for (unsigned i = 0; i < n && s->x->sums && r == 0; i++)
        r = check_sum(s->x, &slots[i], data + (slots[i].data - slots[0].data), s->scratch, err);
    for (unsigned i = 0; i < n && r == 0; i++)
        if (s->x->disks[slots[i].id].target)
            r = send_cluster(s, &slots[i], data + (slots[i].data - slots[0].data), err);
    return r < 0 ? r : emit(s, err);
}

static int read_group(struct vma_read *x, const struct vma_chunk *c, const struct vma_slot *slot,
                      uint32_t len, uint8_t *buf, const uint8_t **data, struct dr_error *err)
{
    *data = buf;
    if (x->file)
        return dr_file_pread(x->file, buf, c->off + slot->data, len, err);
    *data = c->data + slot->data;
    return 0;
}

/* Salvaging over an image that held something: its old bytes must not look like the archive's. */
static int clear_missing(struct stretch *s, unsigned id, uint64_t off, struct dr_error *err)
{
    const struct dr_vma_target *t = s->x->disks[id].target;
    if (!t || t->compare || t->is_zero)
        return 0;
    int r = add(s, id, NULL, off, DR_VMA_CLUSTER, err);
    return r < 0 ? r : emit(s, err);
}

/* After a failed read of several clusters, read them one by one; those that fail again are missing.
 */
static int save_group(struct stretch *s, const struct vma_chunk *c, const struct vma_slot *slots,
                      unsigned n, uint8_t *buf, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0; i < n && r == 0; i++) {
        const uint8_t *data;
        uint64_t off = (uint64_t)slots[i].cluster * DR_VMA_CLUSTER;
        struct dr_error why = DR_ERROR_INIT;
        int read = read_group(s->x, c, &slots[i], stored(&slots[i]), buf, &data, &why);
        if (read < 0 && !dr_is_damage(read))
            r = dr_fail(err, -read, "%s", why.text);
        else if (read == 0)
            r = take_group(s, &slots[i], 1, c->off + slots[i].data, data, err);
        else
            r = vma_damage(s->x, DR_VMA_MISSING, slots[i].id, off, DR_VMA_CLUSTER, why.text, err);
        if (r == 0 && read < 0)
            r = clear_missing(s, slots[i].id, off, err);
    }
    return r;
}

static int work_data(struct stretch *s, struct vma_chunk *c, uint8_t *buf, struct dr_error *err)
{
    struct vma_read *x = s->x;
    const struct vma_extent *e = &c->extent;
    int r = 0;
    for (unsigned i = 0, n; i < e->n && r == 0 && !x->stopping; i += n) {
        const uint8_t *data;
        uint32_t len;
        n = group(e, i, &len);
        struct dr_error why = DR_ERROR_INIT;
        r = read_group(x, c, &e->slot[i], len, buf, &data, &why);
        if (r == 0)
            r = take_group(s, &e->slot[i], n, c->off + e->slot[i].data, data, err);
        else if (x->o->salvage)
            r = save_group(s, c, &e->slot[i], n, buf, err);
        else
            r = dr_fail(err, -r, "%s", why.text);
    }
    return r;
}

/* ------------------------------------------------------------------ zeros */

static int check_zero_sums(struct vma_read *x, unsigned id, uint64_t first, uint64_t n,
                           struct dr_error *err)
{
    int r = 0;
    for (uint64_t c = first; c < first + n && r == 0; c++) {
        struct vma_sum sum;
        bool known;
        r = vma_sums_get(x->sums, id, (uint32_t)c, &sum, &known, err);
        if (r == 0 && known)
            r = bad_sum(x, id, c * DR_VMA_CLUSTER, err);
    }
    return r;
}

static int work_zeros(struct stretch *s, unsigned id, uint64_t first, uint64_t n,
                      struct dr_error *err)
{
    int r = 0;
    if (s->x->sums)
        r = check_zero_sums(s->x, id, first, n, err);
    if (r < 0 || !s->x->disks[id].target)
        return r;
    r = add(s, id, NULL, first * DR_VMA_CLUSTER, n * DR_VMA_CLUSTER, err);
    return r < 0 ? r : emit(s, err);
}

/* ------------------------------------------------------------------ work */

static void item_done(struct vma_read *x)
{
    DR_LOCK_SCOPE(&x->lock);
    if (--x->under_way == 0)
        pthread_cond_signal(&x->idle);
}

int vma_read_work(void *user, struct dr_copy_item *item, uint8_t *const *buf, struct dr_error *err)
{
    struct vma_read *x = user;
    struct stretch s = {.x = x, .scratch = buf[1]};
    int r = 0;
    if (item->kind == VMA_ITEM_DATA) {
        struct vma_chunk *c = (struct vma_chunk *)(uintptr_t)item->aux[0];
        r = work_data(&s, c, buf[0], err);
        vma_chunk_done(x, c);
    } else if (item->kind == VMA_ITEM_ZEROS) {
        r = work_zeros(&s, (unsigned)item->aux[0], item->aux[1], item->aux[2], err);
    }
    if (r != 0)
        atomic_store(&x->stopping, true);
    item_done(x);
    return r;
}
