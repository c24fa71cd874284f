/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Shared by the stages of one extraction: chunks that travel from the stage that finds extents to
 * the one that works on them and back, the clock, and the flush of all targets. Calls none of
 * them. */
#include <stdlib.h>
#include <time.h>

#include "archive/vma-layout.h"
#include "archive/vma-read.h"

/* ------------------------------------------------------------------ chunks */

struct vma_chunk *vma_chunk_take(struct vma_read *x)
{
    DR_LOCK_SCOPE(&x->lock);
    struct vma_chunk *c = x->free_chunks;
    if (c) {
        x->free_chunks = c->next;
        return c;
    }
    c = calloc(1, sizeof(*c));
    if (c) {
        c->all = x->all_chunks;
        x->all_chunks = c;
    }
    return c;
}

void vma_chunk_done(struct vma_read *x, struct vma_chunk *chunk)
{
    DR_LOCK_SCOPE(&x->lock);
    chunk->next = x->free_chunks;
    x->free_chunks = chunk;
}

void vma_chunks_free(struct vma_read *x)
{
    for (struct vma_chunk *c = x->all_chunks, *next; c; c = next) {
        next = c->all;
        free(c->data);
        free(c);
    }
}

/* ------------------------------------------------------------------ extents at any byte */

size_t vma_next_magic(const uint8_t unit[VMA_EXTENT_HEADER])
{
    size_t at = 1, end = VMA_EXTENT_HEADER;
    while (at < end && memcmp(unit + at, VMA_EXTENT_MAGIC, dr_min(4, end - at)) != 0)
        at++;
    return at;
}

/* ------------------------------------------------------------------ clock and targets */

uint64_t vma_read_now(const struct vma_read *x)
{
    if (x->clock)
        return x->clock->now(x->clock->user);
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int vma_flush_targets(const struct vma_read *x, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < x->o->n_targets && r == 0; i++)
        if (!x->o->targets[i].compare)
            r = dr_flush(x->o->targets[i].disk, err);
    return r;
}
