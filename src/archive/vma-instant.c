/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>
#include <stdlib.h>

#include "archive/vma-append.h"
#include "archive/vma-instant.h"
#include "archive/vma-pack.h"
#include "base/cleanup.h"
#include "ops/backup-copy.h"

#define CLUSTERS     (DR_STOCK_BUFFER / DR_VMA_CLUSTER) /* of an extent with data */
#define ROOM         (VMA_EXTENT_HEADER + CLUSTERS * DR_VMA_CLUSTER)
#define ZERO_EXTENTS (ROOM / VMA_EXTENT_HEADER) /* without data, in one piece */
#define SUMS_AT_ONCE 1024u
#define SUM          16u /* bytes, of the table of a disk */

_Static_assert(DR_SUMS_GRAIN == DR_VMA_CLUSTER, "what is copied at once is a cluster");
_Static_assert(CLUSTERS <= VMA_WRITE_SLOTS, "what is copied at once fits into an extent");

struct member {
    struct run *run;
    const struct dr_vma_disk *disk;
    struct dr_frozen frozen;
    struct dr_sums sums;
    _Atomic uint64_t stored; /* bytes of blocks with data */
};

struct run {
    const struct vma_instant *x;
    struct member *all;
    size_t n;
    struct vma_append append;
    struct dr_spill *spill;
};

/* ------------------------------------------------------------------ clusters with data */

/* Put the blocks that hold data behind each other to `to`; returns where they end. */
static uint8_t *put_cluster(uint8_t *to, const uint8_t *data, size_t len, uint16_t *mask)
{
    memcpy(to, data, len);
    memset(to + len, 0, DR_VMA_CLUSTER - len);
    *mask = vma_find_data(to, VMA_ALL);
    return to + vma_pack(to, to, VMA_ALL, *mask);
}

/* Behind the end of the disk there are zeros, which are no part of it. */
static uint64_t bytes_of(const struct dr_vma_disk *disk, const struct vma_slot *slot)
{
    uint64_t off = (uint64_t)slot->cluster * DR_VMA_CLUSTER, bytes = 0;
    for (unsigned k = 0; k < VMA_BLOCKS; k++, off += DR_VMA_BLOCK)
        bytes += slot->mask >> k & 1 ? dr_min(DR_VMA_BLOCK, disk->size - off) : 0;
    return bytes;
}

/* The extent of the clusters [off, off+len). *end: behind its last byte; NULL: all are zeros. */
static int make_extent(const struct member *m, uint64_t off, uint64_t len, const uint8_t *data,
                       struct vma_append_room *room, uint8_t **end, uint64_t *stored,
                       struct dr_error *err)
{
    struct vma_slot slot[CLUSTERS];
    unsigned n = 0;
    *end = room->plain + VMA_EXTENT_HEADER;
    *stored = 0;
    for (uint64_t done = 0; done < len; done += DR_VMA_CLUSTER) {
        slot[n] = (struct vma_slot){.id = (uint8_t)m->disk->id,
                                    .cluster = (uint32_t)((off + done) / DR_VMA_CLUSTER)};
        *end = put_cluster(*end, data + done, (size_t)dr_min(DR_VMA_CLUSTER, len - done),
                           &slot[n].mask);
        if (slot[n].mask == 0)
            continue; /* it comes at the end */
        *stored += bytes_of(m->disk, &slot[n]);
        n++;
    }
    if (n > 0)
        return vma_extent_build(slot, n, m->run->x->header->uuid, room->plain, err);
    *end = NULL;
    return 0;
}

static int add_extent(struct member *m, uint64_t off, uint64_t len, const uint8_t *data,
                      struct vma_append_room *room, struct dr_error *err)
{
    uint8_t *end;
    uint64_t stored;
    int r = make_extent(m, off, len, data, room, &end, &stored, err);
    if (r < 0 || !end)
        return r;
    r = vma_append(&m->run->append, room, (size_t)(end - room->plain), VMA_EXTENT_HEADER, err);
    if (r == 0 || room->is_stuck)
        atomic_fetch_add(&m->stored, stored);
    return r;
}

/* Of struct dr_frozen. What could not be written comes again, if whoever made the job wants that.
 */
static int put(void *user, uint64_t off, uint64_t len, const uint8_t *data, struct dr_error *err)
{
    struct member *m = user;
    struct vma_append *append = &m->run->append;
    struct vma_append_room *room = vma_append_stuck(append, m, off);
    int r;
    if (room)
        r = vma_append_again(append, room, err);
    else if ((room = vma_append_take(append, ROOM)))
        r = add_extent(m, off, len, data, room, err);
    else
        return dr_fail(err, ENOMEM, "out of memory for an extent");
    vma_append_keep(append, room, m, off);
    return r < 0 ? dr_prefix(err, r, "disk '%s' at offset %" PRIu64, m->disk->name, off) : 0;
}

/* ------------------------------------------------------------------ clusters of zeros */

struct zeros {
    struct run *run;
    struct vma_append_room *room;
    struct vma_slot slot[VMA_WRITE_SLOTS];
    unsigned n;
    size_t len;
};

static int add_zeros(struct zeros *z, struct dr_error *err)
{
    struct vma_append *append = &z->run->append;
    int r = z->len > 0 ? vma_append(append, z->room, z->len, z->len, err) : 0;
    while (r < 0 && z->room->is_stuck && (r = dr_job_after_failure(z->run->x->job, r, err)) == 0)
        r = vma_append_again(append, z->room, err);
    z->len = 0;
    return r;
}

static int end_zero_extent(struct zeros *z, struct dr_error *err)
{
    if (z->n == 0)
        return 0;
    int r = vma_extent_build(z->slot, z->n, z->run->x->header->uuid, z->room->plain + z->len, err);
    z->len += VMA_EXTENT_HEADER;
    z->n = 0;
    return r == 0 && z->len == ZERO_EXTENTS * VMA_EXTENT_HEADER ? add_zeros(z, err) : r;
}

static int zeros_of(struct zeros *z, const struct member *m, struct dr_error *err)
{
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < m->sums.n; i++) {
        if (!dr_is_zero(m->sums.table + i * SUM, SUM))
            continue;
        z->slot[z->n++] = (struct vma_slot){.id = (uint8_t)m->disk->id, .cluster = (uint32_t)i};
        if (z->n == VMA_WRITE_SLOTS)
            r = end_zero_extent(z, err);
        if (i % VMA_WRITE_SLOTS == 0 && dr_job_stopped(z->run->x->job))
            r = dr_fail(err, ECANCELED, "stopped on request");
    }
    return r;
}

static int write_zeros(struct run *run, struct dr_error *err)
{
    struct zeros z = {.run = run, .room = vma_append_take(&run->append, ROOM)};
    int r = z.room ? 0 : dr_fail(err, ENOMEM, "out of memory for an extent");
    for (size_t i = 0; r == 0 && i < run->n; i++)
        r = zeros_of(&z, &run->all[i], err);
    if (r == 0)
        r = end_zero_extent(&z, err);
    if (r == 0)
        r = add_zeros(&z, err);
    if (z.room)
        vma_append_give(&run->append, z.room);
    return r;
}

/* ------------------------------------------------------------------ the run */

static int begin(struct member *m, struct dr_disk *disk, struct dr_error *err)
{
    int r = dr_sums_begin(&m->sums, dr_size(disk), err);
    if (r < 0)
        return r;
    m->frozen = (struct dr_frozen){.disk = disk,
                                   .size = m->sums.size,
                                   .put = put,
                                   .put_again = m->run->x->out->file,
                                   .user = m,
                                   .sums = &m->sums,
                                   .spill = m->run->spill};
    return dr_frozen_begin(&m->frozen, err);
}

static int take_instant(struct run *run, struct dr_error *err)
{
    CLEANUP_FREE struct dr_frozen **all = calloc(run->n + 1, sizeof(*all));
    if (!all)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    for (size_t i = 0; i < run->n; i++)
        all[i] = &run->all[i].frozen;
    return dr_frozen_now_all(all, run->n, run->x->job, err);
}

static int copy_one(struct member *m, uint64_t before, uint64_t after, struct dr_error *err)
{
    struct dr_job *job = m->run->x->job;
    dr_job_beside(job, m->frozen.disk);
    int r = dr_frozen_copy(&m->frozen, before, after, job, err);
    int broken = dr_frozen_finish(&m->frozen, err);
    return r < 0 ? r : broken;
}

static int copy_all(struct run *run, struct dr_error *err)
{
    uint64_t before = 0, after = 0;
    int r = 0;
    for (size_t i = 0; i < run->n; i++)
        if (dr_add_overflow(after, run->all[i].sums.size, &after))
            return dr_fail(err, EFBIG, "the disks together are too large");
    for (size_t i = 0; r == 0 && i < run->n; i++) {
        after -= run->all[i].sums.size;
        r = copy_one(&run->all[i], before, after, err);
        before += run->all[i].sums.size;
    }
    return r;
}

/* The table of a disk is that of its digest. */
static int record_sums(const struct member *m, struct dr_error *err)
{
    struct vma_sum some[SUMS_AT_ONCE];
    int r = 0;
    for (uint64_t i = 0, n; r == 0 && i < m->sums.n; i += n) {
        bool any = false;
        n = dr_min(SUMS_AT_ONCE, m->sums.n - i);
        for (uint64_t k = 0; k < n; k++) {
            const uint8_t *sum = m->sums.table + (i + k) * SUM;
            some[k] = (struct vma_sum){get_le64(sum), get_le64(sum + 8)};
            any |= some[k].low || some[k].high;
        }
        if (any)
            r = vma_sums_put_run(m->run->x->sums, m->disk->id, (uint32_t)i, some, (size_t)n, err);
    }
    return r;
}

static void tell_result(const struct member *m, struct dr_vma_disk_result *result)
{
    *result = (struct dr_vma_disk_result){.size = m->disk->size,
                                          .zero_bytes = m->disk->size - atomic_load(&m->stored),
                                          .copied = atomic_load(&m->frozen.copied)};
    dr_sums_digest(&m->sums, result->digest);
}

static int run_all(struct run *run, struct dr_error *err)
{
    const struct vma_instant *x = run->x;
    const struct dr_backup_spill *spill = &x->options->spill;
    int r = spill->path ? dr_spill_new(&run->spill, x->fs, spill, 0, err) : 0;
    for (size_t i = 0; r == 0 && i < run->n; i++) {
        struct member *m = &run->all[i];
        m->run = run;
        m->disk = &x->header->disks[i];
        r = begin(m, x->options->disks[i].disk, err);
    }
    if (r == 0)
        r = take_instant(run, err);
    if (r == 0)
        r = copy_all(run, err);
    if (r == 0)
        r = write_zeros(run, err);
    for (size_t i = 0; r == 0 && x->sums && i < run->n; i++)
        r = record_sums(&run->all[i], err);
    for (size_t i = 0; r == 0 && i < run->n; i++)
        tell_result(&run->all[i], &x->results[i]);
    return r;
}

int vma_instant_run(const struct vma_instant *x, struct dr_error *err)
{
    struct run run = {.x = x, .n = x->options->n_disks};
    run.all = calloc(run.n, sizeof(*run.all));
    if (!run.all)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    vma_append_begin(&run.append, x->out, x->frames);
    int r = run_all(&run, err);
    for (size_t i = 0; i < run.n; i++) {
        dr_frozen_end(&run.all[i].frozen);
        dr_sums_end(&run.all[i].sums);
    }
    dr_spill_free(run.spill);
    vma_append_end(&run.append);
    free(run.all);
    return r;
}
