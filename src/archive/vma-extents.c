/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include "archive/vma-extents.h"
#include "archive/vma-pack.h"
#include "base/bytes.h"
#include "base/cleanup.h"

#define EXTENT_BYTES (VMA_EXTENT_HEADER + VMA_WRITE_SLOTS * DR_VMA_CLUSTER)
/* Extents without data in one item: enough of them to make a write worth it, few enough for a zstd
 * frame that nobody minds unpacking for one of them. */
#define ZERO_EXTENTS  1024u
#define ZERO_CLUSTERS (ZERO_EXTENTS * VMA_WRITE_SLOTS)
/* Clusters read before they are looked at: still in the processor's cache then. */
#define GROUP     4u
#define STREAM_MS 100

enum item_kind {
    ITEM_WINDOW, /* aux[0]: the plan */
    ITEM_ZEROS,  /* aux[0]: clusters; aux[1]: index of the member; off: of the first one */
};
#define AUX_CODED 2 /* bytes of the item's zstd frames together */

/* One extent on its way: what must be read, then what it holds. */
struct vma_plan {
    struct vma_plan *all, *idle;
    unsigned n;
    struct {
        size_t member;
        uint16_t want; /* blocks that are not known to be zeros */
    } source[VMA_WRITE_SLOTS];
    struct vma_slot slot[VMA_WRITE_SLOTS];
    uint32_t len;    /* of the extent */
    size_t head;     /* bytes of its header's zstd frame */
    uint8_t *stream; /* the bytes, when they come from one */
};

/* ------------------------------------------------------------------ plans */

static struct vma_plan *take_plan(struct vma_extents *x, struct dr_error *err)
{
    DR_LOCK_SCOPE(&x->lock);
    struct vma_plan *p = x->idle;
    if (p) {
        x->idle = p->idle;
        p->n = 0;
        return p;
    }
    p = calloc(1, sizeof(*p));
    if (!p) {
        dr_fail(err, ENOMEM, "out of memory for an extent");
        return NULL;
    }
    p->all = x->plans;
    x->plans = p;
    return p;
}

static void put_plan(struct vma_extents *x, struct vma_plan *p)
{
    DR_LOCK_SCOPE(&x->lock);
    p->idle = x->idle;
    x->idle = p;
}

static void free_plans(struct vma_extents *x)
{
    while (x->plans) {
        struct vma_plan *p = x->plans;
        x->plans = p->all;
        free(p->stream);
        free(p);
    }
    x->idle = NULL;
}

static void add_slot(struct vma_extents *x, struct vma_plan *p, uint16_t want)
{
    p->source[p->n].member = x->at;
    p->source[p->n].want = want;
    p->slot[p->n] = (struct vma_slot){.id = (uint8_t)x->members[x->at].disk->id,
                                      .cluster = (uint32_t)x->cluster};
    p->n++;
}

/* ------------------------------------------------------------------ next */

static uint64_t disk_size(const struct vma_extents *x)
{
    return x->members[x->at].disk->size;
}

static bool at_disk(const struct vma_extents *x)
{
    return x->at < x->n && x->members[x->at].chain;
}

static void advance(struct vma_extents *x, uint64_t clusters)
{
    x->cluster += clusters;
    if (x->cluster < vma_clusters(disk_size(x)))
        return;
    x->at++;
    x->cluster = 0;
    x->walking = false;
}

static int walk_to(struct vma_extents *x, uint64_t off, struct dr_error *err)
{
    const struct vma_member *m = &x->members[x->at];
    if (!x->walking)
        dr_walk_init(&x->walk, m->chain, 0, m->chain->n, m->disk->size);
    x->walking = true;
    int r = dr_walk_to(&x->walk, off, err);
    return r < 0 ? dr_prefix(err, r, "disk '%s' at offset %" PRIu64, m->disk->name, off) : 0;
}

/* Whole clusters of zeros from here on, at most ZERO_CLUSTERS. */
static int zeros_here(struct vma_extents *x, uint64_t *clusters, struct dr_error *err)
{
    uint64_t size = disk_size(x), from = x->cluster * DR_VMA_CLUSTER, to = from;
    while (to < size && to - from < (uint64_t)ZERO_CLUSTERS * DR_VMA_CLUSTER) {
        int r = walk_to(x, to, err);
        if (r < 0)
            return r;
        if (!dr_run_zero(&x->walk.run))
            break;
        to = x->walk.run.end;
    }
    *clusters = to >= size ? vma_clusters(size - from) : (to - from) / DR_VMA_CLUSTER;
    *clusters = dr_min(*clusters, ZERO_CLUSTERS);
    return 0;
}

/* Find which blocks of the current cluster have to be read: those that no layer says are zero. */
static int wanted(struct vma_extents *x, uint16_t *want, struct dr_error *err)
{
    uint64_t start = x->cluster * DR_VMA_CLUSTER, off = start;
    uint64_t end = dr_min(start + DR_VMA_CLUSTER, disk_size(x));
    *want = 0;
    while (off < end) {
        int r = walk_to(x, off, err);
        if (r < 0)
            return r;
        uint64_t stop = dr_min(end, x->walk.run.end);
        if (!dr_run_zero(&x->walk.run)) {
            unsigned first = (unsigned)((off - start) / DR_VMA_BLOCK);
            unsigned last = (unsigned)((stop - 1 - start) / DR_VMA_BLOCK);
            *want |= (uint16_t)(VMA_ALL << first & VMA_ALL >> (VMA_BLOCKS - 1 - last));
        }
        off = stop;
    }
    return 0;
}

static int next_zeros(struct vma_extents *x, struct dr_copy_item *item, uint64_t clusters)
{
    clusters = dr_round_down(clusters, VMA_WRITE_SLOTS); /* what is left over finds company */
    item->kind = ITEM_ZEROS;
    item->off = x->cluster * DR_VMA_CLUSTER;
    item->passed = dr_min(clusters * DR_VMA_CLUSTER, disk_size(x) - item->off);
    item->aux[0] = clusters;
    item->aux[1] = x->at;
    advance(x, clusters);
    return 1;
}

/* Fill one extent with the next clusters, which may belong to several disks. */
static int next_window(struct vma_extents *x, struct dr_copy_item *item, struct dr_error *err)
{
    struct vma_plan *p = take_plan(x, err);
    if (!p)
        return -ENOMEM;
    item->off = x->cluster * DR_VMA_CLUSTER;
    uint64_t all = 0;
    while (p->n < VMA_WRITE_SLOTS && at_disk(x)) {
        uint64_t off = x->cluster * DR_VMA_CLUSTER;
        uint16_t want;
        int r = wanted(x, &want, err);
        if (r < 0)
            return r;
        add_slot(x, p, want);
        all += dr_min(DR_VMA_CLUSTER, disk_size(x) - off);
        item->len += (uint64_t)__builtin_popcount(want) * DR_VMA_BLOCK;
        advance(x, 1);
    }
    item->len = dr_min(item->len, all);
    item->passed = all - item->len;
    item->kind = ITEM_WINDOW;
    item->aux[0] = (uintptr_t)p;
    return 1;
}

/* As much as there is, up to len bytes. */
static int read_stream(const struct vma_extents *x, int fd, uint8_t *buf, size_t len, size_t *got,
                       struct dr_error *err)
{
    for (*got = 0; *got < len;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (dr_job_stopped(x->job))
            return dr_fail(err, ECANCELED, "stopped on request");
        if (poll(&p, 1, STREAM_MS) <= 0) /* a signal may be what says stop */
            continue;
        ssize_t n = read(fd, buf + *got, len - *got);
        if (n == 0)
            break;
        if (n > 0)
            *got += (size_t)n;
        else if (errno != EINTR && errno != EAGAIN && errno != EWOULDBLOCK)
            return dr_fail_errno(err, errno, "disk 'vmstate': cannot read at offset %" PRIu64,
                                 x->cluster * DR_VMA_CLUSTER + *got);
    }
    return 0;
}

/* Read the machine's state here, in `next`, which runs on one thread and in order; its length is
 * known only at its end. */
static int next_stream(struct vma_extents *x, struct dr_copy_item *item, struct dr_error *err)
{
    const struct vma_member *m = &x->members[x->at];
    struct vma_plan *p = take_plan(x, err);
    if (!p)
        return -ENOMEM;
    if (!p->stream && !(p->stream = malloc(VMA_WRITE_SLOTS * DR_VMA_CLUSTER)))
        return dr_fail(err, ENOMEM, "out of memory for an extent");
    size_t got, room = VMA_WRITE_SLOTS * DR_VMA_CLUSTER;
    int r = read_stream(x, m->fd, p->stream, room, &got, err);
    if (r < 0)
        return r;
    size_t clusters = (got + DR_VMA_CLUSTER - 1) / DR_VMA_CLUSTER;
    memset(p->stream + got, 0, clusters * DR_VMA_CLUSTER - got);
    if (x->cluster + clusters > VMA_MAX_SIZE / DR_VMA_CLUSTER)
        return dr_fail(err, EFBIG, "disk 'vmstate': longer than %llu bytes", VMA_MAX_SIZE);
    item->off = x->cluster * DR_VMA_CLUSTER;
    item->len = got;
    item->kind = ITEM_WINDOW;
    item->aux[0] = (uintptr_t)p;
    for (size_t i = 0; i < clusters; i++, x->cluster++)
        add_slot(x, p, VMA_ALL);
    if (got < room) { /* the end */
        x->at++;
        x->cluster = 0;
    }
    if (got == 0)
        put_plan(x, p);
    return got > 0;
}

static int extents_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct vma_extents *x = user;
    while (x->at < x->n && !x->members[x->at].chain) {
        int r = next_stream(x, item, err);
        if (r != 0)
            return r;
    }
    if (x->at == x->n)
        return 0;
    uint64_t zeros;
    int r = zeros_here(x, &zeros, err);
    if (r < 0)
        return r;
    return zeros >= VMA_WRITE_SLOTS ? next_zeros(x, item, zeros) : next_window(x, item, err);
}

/* ------------------------------------------------------------------ work */

/* The wanted blocks of slots [first, first + n), which follow each other on one disk, side by side
 * to buf: runs of them in one go. */
static int read_blocks(const struct vma_extents *x, const struct vma_plan *p, unsigned first,
                       unsigned n, uint8_t *buf, struct dr_error *err)
{
    const struct vma_member *m = &x->members[p->source[first].member];
    uint64_t base = (uint64_t)p->slot[first].cluster * DR_VMA_CLUSTER;
    unsigned k = 0, blocks = n * VMA_BLOCKS;
    while (k < blocks) {
        unsigned from = k;
        while (k < blocks && p->source[first + k / VMA_BLOCKS].want >> k % VMA_BLOCKS & 1)
            k++;
        size_t len = (size_t)(k - from) * DR_VMA_BLOCK;
        uint64_t off = base + (uint64_t)from * DR_VMA_BLOCK;
        int r = len > 0 ? dr_chain_read_padded(m->chain, 0, buf, off, len, err) : 0;
        if (r < 0)
            return dr_prefix(err, r, "disk '%s' at offset %" PRIu64, m->disk->name, off);
        buf += len;
        k += len == 0;
    }
    return 0;
}

static struct vma_sum sum_blocks(const uint8_t *blocks, uint16_t want)
{
    if (want == VMA_ALL)
        return vma_sum_of(blocks);
    uint8_t cluster[DR_VMA_CLUSTER];
    memset(cluster, 0, sizeof(cluster));
    for (unsigned left = want; left; left &= left - 1, blocks += DR_VMA_BLOCK)
        memcpy(cluster + (size_t)__builtin_ctz(left) * DR_VMA_BLOCK, blocks, DR_VMA_BLOCK);
    return vma_sum_of(cluster);
}

/* Count the slots from i on, at most limit, that are consecutive clusters of one disk. */
static unsigned in_a_row(const struct vma_plan *p, unsigned i, unsigned limit)
{
    unsigned n = 1;
    while (i + n < p->n && n < limit && p->source[i + n].member == p->source[i].member)
        n++;
    return n;
}

static int record_sums(const struct vma_extents *x, const struct vma_plan *p,
                       const struct vma_sum *sums, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0, n; i < p->n && r == 0; i += n) {
        n = in_a_row(p, i, VMA_WRITE_SLOTS);
        r = vma_sums_put_run(x->sums, p->slot[i].id, p->slot[i].cluster, sums + i, n, err);
    }
    return r;
}

/* The digest of a disk is made of the same sums. */
static void note_digests(const struct vma_extents *x, const struct vma_plan *p,
                         const struct vma_sum *sums)
{
    for (unsigned i = 0; i < p->n; i++) {
        const struct vma_member *m = &x->members[p->source[i].member];
        if (m->digest.table)
            dr_sums_put_xxh3(&m->digest, p->slot[i].cluster, sums[i].low, sums[i].high);
    }
}

static int fill_window(const struct vma_extents *x, struct vma_plan *p, uint8_t *buf,
                       struct dr_error *err)
{
    struct vma_sum sums[VMA_WRITE_SLOTS];
    uint8_t *end = buf + VMA_EXTENT_HEADER;
    memset(sums, 0, sizeof(sums));
    for (unsigned i = 0, n; i < p->n; i += n) {
        n = in_a_row(p, i, GROUP);
        uint8_t *blocks = end;
        int r = 0;
        if (x->members[p->source[i].member].chain)
            r = read_blocks(x, p, i, n, blocks, err);
        else
            memcpy(blocks, p->stream + (size_t)i * DR_VMA_CLUSTER, (size_t)n * DR_VMA_CLUSTER);
        if (r < 0)
            return r;
        for (unsigned k = i; k < i + n; k++) {
            uint16_t want = p->source[k].want, mask = vma_find_data(blocks, want);
            if (mask && (x->sums || x->members[p->source[k].member].digest.table))
                sums[k] = sum_blocks(blocks, want);
            end += vma_pack(end, blocks, want, mask);
            blocks += (size_t)__builtin_popcount(want) * DR_VMA_BLOCK;
            p->slot[k].mask = mask;
        }
    }
    p->len = (uint32_t)(end - buf);
    note_digests(x, p, sums);
    int r = x->sums ? record_sums(x, p, sums, err) : 0;
    return r < 0 ? r : vma_extent_build(p->slot, p->n, x->uuid, buf, err);
}

static size_t zeros_len(const struct dr_copy_item *item)
{
    return (size_t)dr_div_up(item->aux[0], VMA_WRITE_SLOTS) * VMA_EXTENT_HEADER;
}

static int fill_zeros(const struct vma_extents *x, const struct dr_copy_item *item, uint8_t *buf,
                      struct dr_error *err)
{
    struct vma_slot slot[VMA_WRITE_SLOTS] = {0};
    uint32_t cluster = (uint32_t)(item->off / DR_VMA_CLUSTER);
    uint8_t id = (uint8_t)x->members[item->aux[1]].disk->id;
    int r = 0;
    for (uint64_t done = 0; done < item->aux[0] && r == 0; done += VMA_WRITE_SLOTS) {
        for (unsigned i = 0; i < VMA_WRITE_SLOTS; i++)
            slot[i] = (struct vma_slot){.id = id, .cluster = cluster++};
        r = vma_extent_build(slot, VMA_WRITE_SLOTS, x->uuid, buf, err);
        buf += VMA_EXTENT_HEADER;
    }
    return r;
}

static struct vma_plan *plan_of(const struct dr_copy_item *item)
{
    return item->kind == ITEM_ZEROS ? NULL : (struct vma_plan *)(uintptr_t)item->aux[0];
}

static size_t plain_len(const struct dr_copy_item *item)
{
    return item->kind == ITEM_ZEROS ? zeros_len(item) : plan_of(item)->len;
}

/* Compress an extent's header as a frame of its own: a reader that looks for a cluster then
 * decompresses no data. */
static int compress(const struct vma_extents *x, struct dr_copy_item *item, const uint8_t *plain,
                    uint8_t *out, struct dr_error *err)
{
    struct vma_plan *p = plan_of(item);
    size_t len = plain_len(item), coded = 0;
    size_t head = p && len > VMA_EXTENT_HEADER ? VMA_EXTENT_HEADER : 0;
    int r = 0;
    if (head > 0) {
        r = vma_frames_compress(x->frames, plain, head, out, &p->head, err);
        out += p->head;
    }
    if (r == 0)
        r = vma_frames_compress(x->frames, plain + head, len - head, out, &coded, err);
    item->aux[AUX_CODED] = coded + (head ? p->head : 0);
    return r;
}

static int add_frames(struct vma_extents *x, const struct dr_copy_item *item, struct dr_error *err)
{
    const struct vma_plan *p = plan_of(item);
    size_t len = plain_len(item), coded = item->aux[AUX_CODED];
    if (!p || len == VMA_EXTENT_HEADER)
        return vma_frames_add(x->frames, coded, len, err);
    int r = vma_frames_add(x->frames, p->head, VMA_EXTENT_HEADER, err);
    return r < 0 ? r : vma_frames_add(x->frames, coded - p->head, len - VMA_EXTENT_HEADER, err);
}

static int extents_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                        struct dr_error *err)
{
    const struct vma_extents *x = user;
    int r = item->kind == ITEM_ZEROS ? fill_zeros(x, item, buf[0], err)
                                     : fill_window(x, plan_of(item), buf[0], err);
    return r < 0 || !x->frames ? r : compress(x, item, buf[0], buf[1], err);
}

/* ------------------------------------------------------------------ emit */

/* Only emit changes this number, but the thread that shows progress reads it. */
static void add_zeros(struct vma_extents *x, struct vma_member *m, uint64_t bytes)
{
    m->zero_bytes += bytes;
    if (x->zeros)
        __atomic_fetch_add(x->zeros, bytes, __ATOMIC_RELAXED);
}

static uint64_t zeros_of(const struct vma_member *m, const struct vma_slot *slot)
{
    uint64_t off = (uint64_t)slot->cluster * DR_VMA_CLUSTER, zeros = 0;
    uint64_t len = m->chain ? dr_min(DR_VMA_CLUSTER, m->disk->size - off) : DR_VMA_CLUSTER;
    if (len == DR_VMA_CLUSTER)
        return len - (uint64_t)__builtin_popcount(slot->mask) * DR_VMA_BLOCK;
    for (unsigned k = 0; k * DR_VMA_BLOCK < len; k++)
        if (!(slot->mask >> k & 1))
            zeros += dr_min(DR_VMA_BLOCK, len - k * DR_VMA_BLOCK);
    return zeros;
}

static void count_zeros(struct vma_extents *x, const struct vma_plan *p)
{
    for (unsigned i = 0; i < p->n; i++) {
        struct vma_member *m = &x->members[p->source[i].member];
        uint64_t zeros = zeros_of(m, &p->slot[i]);
        if (zeros > 0)
            add_zeros(x, m, zeros);
    }
}

static int extents_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                        struct dr_error *err)
{
    struct vma_extents *x = user;
    size_t len = x->frames ? item->aux[AUX_CODED] : plain_len(item);
    int r = x->frames ? add_frames(x, item, err) : 0;
    if (r == 0)
        r = vma_output_write(x->out, buf[x->frames ? 1 : 0], len, err);
    if (r < 0)
        return r;
    x->wrote = true;
    if (item->kind == ITEM_ZEROS) {
        add_zeros(x, &x->members[item->aux[1]], item->passed);
        return 0;
    }
    struct vma_plan *p = plan_of(item);
    count_zeros(x, p);
    put_plan(x, p);
    return 0;
}

/* ------------------------------------------------------------------ the run */

/* An archive without data gets one empty extent: some readers do not take a header alone for an
 * archive. */
static int write_empty(struct vma_extents *x, struct dr_error *err)
{
    uint8_t plain[VMA_EXTENT_HEADER];
    int r = vma_extent_build(NULL, 0, x->uuid, plain, err);
    if (r < 0 || !x->frames)
        return r < 0 ? r : vma_output_write(x->out, plain, sizeof(plain), err);
    size_t len;
    CLEANUP_FREE uint8_t *coded = malloc(vma_frames_bound(sizeof(plain)));
    if (!coded)
        return dr_fail(err, ENOMEM, "out of memory for an extent");
    r = vma_frames_compress(x->frames, plain, sizeof(plain), coded, &len, err);
    if (r == 0)
        r = vma_frames_add(x->frames, len, sizeof(plain), err);
    return r < 0 ? r : vma_output_write(x->out, coded, len, err);
}

int vma_extents_run(struct vma_extents *x, struct dr_error *err)
{
    pthread_mutex_init(&x->lock, NULL);
    struct dr_copy_policy policy = {
        .user = x,
        .next = extents_next,
        .work = extents_work,
        .emit = extents_emit,
        .ordered = true,
        .buffers = x->frames ? 2 : 1,
        .buffer_size = x->frames
                           ? vma_frames_bound(VMA_EXTENT_HEADER) + vma_frames_bound(EXTENT_BYTES)
                           : EXTENT_BYTES,
    };
    for (size_t i = 0; i < x->n; i++) {
        policy.total += x->members[i].disk->size;
        policy.depth = (unsigned)dr_max(policy.depth, dr_stock_depth(x->members[i].chain));
    }
    int r = dr_copy_run(&policy, x->job, err);
    if (r == 0 && !x->wrote)
        r = write_empty(x, err);
    free_plans(x);
    pthread_mutex_destroy(&x->lock);
    return r;
}
