/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images that are read in one pass: one thread takes coded units out of the pipe, all workers
 * decode and write them. */
#include "base/cleanup.h"
#include "base/error.h"
#include "ops/ops-internal.h"
#include "ops/pipes.h"

/* Buffers that can be in use at once: a worker has one until it has decoded it. */
#define MOST (DR_COPY_WORKERS + 2)

struct taking {
    struct dr_piped *piped;
    struct dr_disk *disk; /* or: */
    struct dr_file *file;
    uint64_t pos;                    /* of file: what was written */
    pthread_mutex_t lock;            /* of the buffers */
    uint8_t *all[MOST], *free[MOST]; /* those that were made; those that nobody uses */
    size_t n_all, n_free;
};

/* A buffer for a coded unit; NULL: no memory. */
static uint8_t *buffer_take(struct taking *k)
{
    DR_LOCK_SCOPE(&k->lock);
    if (k->n_free > 0)
        return k->free[--k->n_free];
    uint8_t *fresh = k->n_all < MOST ? malloc(k->piped->incoming.coded_most) : NULL;
    if (fresh)
        k->all[k->n_all++] = fresh;
    return fresh;
}

static void buffer_give(struct taking *k, uint8_t *buf)
{
    DR_LOCK_SCOPE(&k->lock);
    k->free[k->n_free++] = buf;
}

static int image_next(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct taking *k = user;
    struct dr_piped *p = k->piped;
    uint8_t *coded = buffer_take(k);
    size_t len = 0;
    uint64_t off = 0;
    if (!coded)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->name);
    int r = p->ops->next(p->state, coded, &len, &off, err);
    if (r <= 0) {
        item->passed = p->incoming.size - dr_min(p->incoming.size, p->reached);
        buffer_give(k, coded);
        return r;
    }
    item->off = off;
    item->len = dr_min(p->incoming.unit, p->incoming.size - off);
    item->passed = off - p->reached;
    item->aux[0] = (uintptr_t)coded;
    item->aux[1] = len;
    p->reached = off + item->len;
    return 1;
}

static int image_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct taking *k = user;
    uint8_t *coded = (uint8_t *)(uintptr_t)item->aux[0];
    int r =
        k->piped->ops->decode(k->piped->state, coded, (size_t)item->aux[1], item->off, buf[0], err);
    buffer_give(k, coded);
    if (r == 0 && k->disk)
        r = dr_chain_write(k->disk->chain, 0, buf[0], item->off, (size_t)item->len, err);
    return r;
}

/* To a pipe: in order, with the zeros in front. */
static int image_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                      struct dr_error *err)
{
    struct taking *k = user;
    int r = dr_file_zero(k->file, k->pos, item->off - k->pos, 0, err);
    if (r == 0)
        r = dr_file_pwrite(k->file, buf[0], item->off, (size_t)item->len, err);
    k->pos = item->off + item->len;
    return r;
}

static int take_all(struct taking *k, struct dr_job *job, struct dr_error *err)
{
    struct dr_copy_policy policy = {
        .user = k,
        .next = image_next,
        .work = image_work,
        .emit = k->file ? image_emit : NULL,
        .ordered = k->file != NULL,
        .buffers = 1,
        .buffer_size = (size_t)k->piped->incoming.unit,
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

int dr_piped_image_to_disk(struct dr_piped *p, struct dr_disk *disk, struct dr_job *job,
                           struct dr_error *err)
{
    struct taking k = {.piped = p, .disk = disk};
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
