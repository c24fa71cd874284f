/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images that are read in one pass: one thread takes coded units out of the pipe, all workers
 * decode and write them.
 *
 * An item is a batch of some units, as large as the pieces of other copies: a turn for each unit
 * would keep the workers waiting for each other, here and at the target's lock. */
#include "base/cleanup.h"
#include "base/error.h"
#include "ops/ops-internal.h"
#include "ops/pipes.h"

/* Batches that can be in use at once: in order, two a worker, and one in next. */
#define MOST        (2 * DR_COPY_WORKERS + 2)
#define BATCH       ((size_t)512 << 10) /* guest bytes, and coded ones, but one unit at least */
#define BATCH_UNITS 32u

struct batch {
    size_t n;
    struct {
        uint64_t off, bytes; /* of the disk */
        size_t at, len;      /* in coded */
    } unit[BATCH_UNITS];
    uint8_t coded[];
};

struct taking {
    struct dr_piped *piped;
    struct dr_disk *disk; /* or: */
    struct dr_file *file;
    struct dr_transfer t;                 /* how units go into the disk */
    uint64_t pos;                         /* of file: what was written */
    size_t units;                         /* in a batch at most */
    bool ended;                           /* all units have come */
    pthread_mutex_t lock;                 /* of the batches */
    struct batch *all[MOST], *free[MOST]; /* those that were made; those that nobody uses */
    size_t n_all, n_free;
};

static size_t coded_room(const struct taking *k)
{
    return BATCH + k->piped->incoming.coded_most;
}

/* NULL: no memory. */
static struct batch *batch_take(struct taking *k)
{
    DR_LOCK_SCOPE(&k->lock);
    if (k->n_free > 0)
        return k->free[--k->n_free];
    struct batch *fresh = k->n_all < MOST ? malloc(sizeof(*fresh) + coded_room(k)) : NULL;
    if (fresh)
        k->all[k->n_all++] = fresh;
    return fresh;
}

static void batch_give(struct taking *k, struct batch *b)
{
    DR_LOCK_SCOPE(&k->lock);
    k->free[k->n_free++] = b;
}

/* Units out of the pipe until the batch is full or all have come. */
static int batch_fill(struct taking *k, struct batch *b, struct dr_error *err)
{
    const struct dr_piped *p = k->piped;
    size_t used = 0;
    int r = 1;
    for (b->n = 0; b->n < k->units && used <= BATCH && !k->ended; b->n++) {
        size_t len = 0;
        uint64_t off = 0;
        r = p->ops->next(p->state, b->coded + used, &len, &off, err);
        k->ended = r == 0;
        if (r <= 0)
            break;
        b->unit[b->n].off = off;
        b->unit[b->n].bytes = dr_min(p->incoming.unit, p->incoming.size - off);
        b->unit[b->n].at = used;
        b->unit[b->n].len = len;
        used += len;
    }
    return r < 0 ? r : b->n > 0;
}

static int image_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct taking *k = user;
    struct dr_piped *p = k->piped;
    struct batch *b = batch_take(k);
    if (!b)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->name);
    int r = batch_fill(k, b, err);
    if (r <= 0) {
        item->passed = p->incoming.size - dr_min(p->incoming.size, p->reached);
        batch_give(k, b);
        return r;
    }
    for (size_t i = 0; i < b->n; i++) {
        item->len += b->unit[i].bytes;
        item->passed += b->unit[i].off - p->reached;
        p->reached = b->unit[i].off + b->unit[i].bytes;
    }
    item->off = b->unit[0].off;
    item->aux[0] = (uintptr_t)b;
    return 1;
}

static struct batch *batch_of(const struct dr_copy_item *item)
{
    return (struct batch *)(uintptr_t)item->aux[0];
}

/* How many units from this one on follow each other without a gap, and how many bytes they have. */
static size_t run_of(const struct batch *b, size_t first, uint64_t *bytes)
{
    size_t n = 1;
    *bytes = b->unit[first].bytes;
    while (first + n < b->n && b->unit[first + n].off == b->unit[first].off + *bytes)
        *bytes += b->unit[first + n++].bytes;
    return n;
}

/* Unit i of the batch is at i units in plain. */
static int write_batch(struct taking *k, const struct batch *b, uint8_t *plain,
                       struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0, n; r == 0 && i < b->n; i += n) {
        struct dr_copy_item run = {.off = b->unit[i].off, .kind = DR_ITEM_COPY};
        uint8_t *from = plain + i * k->piped->incoming.unit;
        n = run_of(b, i, &run.len);
        r = dr_transfer_emit(&k->t, &run, &from, err);
    }
    return r;
}

static int image_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct taking *k = user;
    const struct dr_piped *p = k->piped;
    struct batch *b = batch_of(item);
    int r = 0;
    for (size_t i = 0; r == 0 && i < b->n; i++)
        r = p->ops->decode(p->state, b->coded + b->unit[i].at, b->unit[i].len, b->unit[i].off,
                           buf[0] + i * p->incoming.unit, err);
    if (k->disk) {
        r = r < 0 ? r : write_batch(k, b, buf[0], err);
        batch_give(k, b);
    }
    return r;
}

/* To a pipe: in order, with the zeros in front. */
static int image_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct taking *k = user;
    struct batch *b = batch_of(item);
    int r = 0;
    uint64_t bytes;
    for (size_t i = 0, n; r == 0 && i < b->n; i += n) {
        uint64_t off = b->unit[i].off;
        n = run_of(b, i, &bytes);
        r = dr_file_zero(k->file, k->pos, off - k->pos, 0, err);
        if (r == 0)
            r = dr_file_pwrite(k->file, buf[0] + i * k->piped->incoming.unit, off, (size_t)bytes,
                               err);
        k->pos = off + bytes;
    }
    batch_give(k, b);
    return r;
}

static int take_all(struct taking *k, struct dr_job *job, struct dr_error *err)
{
    k->units = (size_t)dr_max(1, dr_min(BATCH_UNITS, BATCH / k->piped->incoming.unit));
    struct dr_copy_policy policy = {
        .user = k,
        .next = image_next,
        .work = image_work,
        .emit = k->file ? image_emit : NULL,
        .ordered = k->file != NULL,
        .buffers = 1,
        .buffer_size = k->units * (size_t)k->piped->incoming.unit,
        .total = k->piped->incoming.size,
    };
    pthread_mutex_init(&k->lock, NULL);
    int r = dr_copy_run(&policy, job, err);
    while (k->n_all > 0)
        free(k->all[--k->n_all]);
    pthread_mutex_destroy(&k->lock);
    return r;
}

/* The writer may still send something, mostly padding, and would fail if nobody took it. */
static int drain(struct dr_piped *p, struct dr_error *err)
{
    uint64_t skipped;
    return dr_source_skip(p->source, UINT64_MAX / 2, &skipped, err);
}

int dr_piped_image_to_disk(struct dr_piped *p, struct dr_disk *disk, uint64_t sparse,
                           struct dr_job *job, struct dr_error *err)
{
    struct taking k = {.piped = p, .disk = disk, .t = dr_piped_transfer(disk, sparse, job)};
    int r = take_all(&k, job, err);
    return r < 0 ? r : drain(p, err);
}

int dr_piped_image_to_file(struct dr_piped *p, struct dr_file *out, struct dr_job *job,
                           struct dr_error *err)
{
    struct taking k = {.piped = p, .file = out};
    int r = take_all(&k, job, err);
    if (r == 0)
        r = dr_file_zero(out, k.pos, p->incoming.size - k.pos, 0, err);
    return r < 0 ? r : drain(p, err);
}
