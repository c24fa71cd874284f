/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/dirty.h"
#include "base/bytes.h"
#include "base/cleanup.h"

#define WORD 64u

void dr_dirty_set(struct dr_dirty *dirty, uint64_t off, uint64_t len)
{
    uint64_t last = len ? (off + len - 1) / DR_DIRTY_GRAIN : 0;
    for (uint64_t i = off / DR_DIRTY_GRAIN; len && i <= last && i / WORD < dirty->n; i++)
        atomic_fetch_or(&dirty->bits[i / WORD], UINT64_C(1) << i % WORD);
}

void dr_dirty_clear(struct dr_dirty *dirty, uint64_t off, uint64_t len)
{
    uint64_t last = len ? (off + len - 1) / DR_DIRTY_GRAIN : 0;
    for (uint64_t i = off / DR_DIRTY_GRAIN; len && i <= last && i / WORD < dirty->n; i++)
        atomic_fetch_and(&dirty->bits[i / WORD], ~(UINT64_C(1) << i % WORD));
}

static void on_change(void *user, uint64_t off, uint64_t len)
{
    struct dr_dirty *dirty = user;
    if (dirty->changed)
        dirty->changed(dirty->user, off, len);
    else
        dr_dirty_set(dirty, off, len);
}

int dr_dirty_begin(struct dr_dirty *dirty, struct dr_disk *disk, struct dr_error *err)
{
    return dr_dirty_begin_with(dirty, disk, NULL, NULL, err);
}

int dr_dirty_make(struct dr_dirty *dirty, uint64_t size, struct dr_error *err)
{
    uint64_t grains = (size + DR_DIRTY_GRAIN - 1) / DR_DIRTY_GRAIN;
    *dirty = (struct dr_dirty){.size = size, .n = (size_t)(grains + WORD - 1) / WORD};
    dirty->bits = calloc(dirty->n ? dirty->n : 1, sizeof(*dirty->bits));
    return dirty->bits
               ? 0
               : dr_fail(err, ENOMEM, "out of memory to follow the changes of a disk of %llu bytes",
                         (unsigned long long)size);
}

void dr_dirty_free(struct dr_dirty *dirty)
{
    free(dirty->bits);
    *dirty = (struct dr_dirty){0};
}

int dr_dirty_begin_with(struct dr_dirty *dirty, struct dr_disk *disk,
                        void (*changed)(void *user, uint64_t off, uint64_t len), void *user,
                        struct dr_error *err)
{
    const struct dr_hook hook = {.after = on_change, .user = dirty};
    int r = dr_dirty_make(dirty, dr_size(disk), err);
    if (r < 0)
        return r;
    dirty->changed = changed;
    dirty->user = user;
    r = dr_disk_hook(disk, &hook, err);
    if (r < 0) {
        dr_dirty_free(dirty);
        return r;
    }
    dirty->disk = disk;
    return 0;
}

void dr_dirty_end(struct dr_dirty *dirty)
{
    if (!dirty->disk)
        return;
    dr_disk_unhook(dirty->disk, dirty);
    dr_dirty_free(dirty);
}

static bool test_and_clear(struct dr_dirty *dirty, uint64_t grain)
{
    uint64_t bit = UINT64_C(1) << grain % WORD;
    return atomic_fetch_and(&dirty->bits[grain / WORD], ~bit) & bit;
}

bool dr_dirty_take(struct dr_dirty *dirty, uint64_t *off, uint64_t *end, uint64_t most)
{
    /* Rounded up: the grain that the disk ends in was handed out with its end as *end, and must not
     * be handed out to a second worker while the first still copies it. */
    uint64_t i = *off / DR_DIRTY_GRAIN + (*off % DR_DIRTY_GRAIN != 0);
    uint64_t n = (uint64_t)dirty->n * WORD;
    while (i < n && !test_and_clear(dirty, i)) {
        i++;
        while (i % WORD == 0 && i < n && atomic_load(&dirty->bits[i / WORD]) == 0)
            i += WORD;
    }
    if (i >= n)
        return false;
    *off = i * DR_DIRTY_GRAIN;
    do
        i++;
    while (i < n && i * DR_DIRTY_GRAIN - *off < most && test_and_clear(dirty, i));
    *end = dr_min(i * DR_DIRTY_GRAIN, dirty->size);
    return true;
}

uint64_t dr_dirty_next(const struct dr_dirty *dirty, uint64_t off)
{
    for (uint64_t i = off / DR_DIRTY_GRAIN; i / WORD < dirty->n; i = (i / WORD + 1) * WORD) {
        uint64_t word = atomic_load(&dirty->bits[i / WORD]) & (UINT64_MAX << i % WORD);
        if (word)
            return (i / WORD * WORD + (unsigned)__builtin_ctzll(word)) * DR_DIRTY_GRAIN;
    }
    return UINT64_MAX;
}

bool dr_dirty_any(const struct dr_dirty *dirty, uint64_t off, uint64_t len)
{
    for (uint64_t i = off / DR_DIRTY_GRAIN; i * DR_DIRTY_GRAIN < off + len; i++)
        if (i / WORD < dirty->n && atomic_load(&dirty->bits[i / WORD]) & (UINT64_C(1) << i % WORD))
            return true;
    return false;
}

uint64_t dr_dirty_bytes(const struct dr_dirty *dirty)
{
    uint64_t grains = 0;
    for (size_t i = 0; i < dirty->n; i++)
        grains += (uint64_t)__builtin_popcountll(atomic_load(&dirty->bits[i]));
    return grains * DR_DIRTY_GRAIN;
}
