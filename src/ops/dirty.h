/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which parts of an open disk has its guest changed since a job looked at them?
 *
 * A bit for each 64 KiB, set by a hook after the data is written and before the guest is told,
 * while the lock of the unit is still held. A job takes a bit away before it reads what the bit
 * stands for: what changes later sets it again. */
#ifndef DR_OPS_DIRTY_H
#define DR_OPS_DIRTY_H

#include "core/core.h"

#define DR_DIRTY_GRAIN 65536u

struct dr_dirty {
    struct dr_disk *disk; /* NULL = nothing is watched */
    uint64_t size;
    size_t n; /* words */
    _Atomic uint64_t *bits;
    void (*changed)(void *user, uint64_t off, uint64_t len); /* of dr_dirty_begin_with */
    void *user;
};

/* The disk keeps its size while it is watched: the caller has claimed it. */
int dr_dirty_begin(struct dr_dirty *dirty, struct dr_disk *disk, struct dr_error *err);
/* The same, but each change is told to `changed`, which notes it by dr_dirty_set() if it likes. */
int dr_dirty_begin_with(struct dr_dirty *dirty, struct dr_disk *disk,
                        void (*changed)(void *user, uint64_t off, uint64_t len), void *user,
                        struct dr_error *err);
void dr_dirty_set(struct dr_dirty *dirty, uint64_t off, uint64_t len);
void dr_dirty_clear(struct dr_dirty *dirty, uint64_t off, uint64_t len);
/* Also for one that was never begun. Not while the disk is quiesced. */
void dr_dirty_end(struct dr_dirty *dirty);

/* A bitmap of a disk of that size that watches nothing; nothing is set. */
int dr_dirty_make(struct dr_dirty *dirty, uint64_t size, struct dr_error *err);
void dr_dirty_free(struct dr_dirty *dirty);

/* The first dirty grain at or behind off, a multiple of the grain; UINT64_MAX: there is none. */
uint64_t dr_dirty_next(const struct dr_dirty *dirty, uint64_t off);
/* The next dirty run at or behind *off, or the first grains of it that come to `most` bytes; its
 * bits are cleared. False: there is none. */
bool dr_dirty_take(struct dr_dirty *dirty, uint64_t *off, uint64_t *end, uint64_t most);
/* Is any of [off, off+len) dirty? */
bool dr_dirty_any(const struct dr_dirty *dirty, uint64_t off, uint64_t len);
/* The number of bytes that are dirty, in whole grains. */
uint64_t dr_dirty_bytes(const struct dr_dirty *dirty);

#endif
