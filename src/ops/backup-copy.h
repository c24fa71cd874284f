/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Copying what a disk holds at one instant, while its guest goes on changing it.
 *
 * From the instant on a hook is told of each change before it happens, under the lock of the units
 * that change. It takes the grains of 64 KiB that the change touches, if nobody has taken them yet:
 * they still hold what they held at the instant. The job takes all others in order. So each grain
 * is taken once, as it was. Taking a grain means to read it into memory; from then on its guest may
 * change it. The thread that took a grain writes it to the target, a hook before the change goes
 * on: so guests are not faster than the target for long.
 *
 * With a spill file (backup-spill.h) the hook only moves the grain there, and the job takes it from
 * there, before it takes anything else: a guest waits for the target only while the spill is full.
 *
 *     todo      a bit for each grain that nobody has taken yet
 *     spilled   a bit for each of these that the disk has no more: it is in the spill
 *     taking    range locks: one thread at a time takes a grain
 *
 * Another thread cannot be changing a part of a grain that is being taken: its own hook waits for
 * the lock of the grain first, and then finds it taken.
 *
 * What the hook cannot copy breaks the copy, and not the guest's request: the job ends with that
 * failure, and nothing is copied any more. */
#ifndef DR_OPS_BACKUP_COPY_H
#define DR_OPS_BACKUP_COPY_H

#include "ops/backup-spill.h"
#include "ops/backup-sums.h"
#include "ops/backup-track.h"
#include "ops/dirty.h"
#include "ops/stock.h"

struct dr_frozen {
    struct dr_disk *disk;
    uint64_t size; /* of the disk; it does not change meanwhile */
    /* What the grains are written to: an image, or a function that gets those that hold data, once
     * each, in any order and from any thread: [off, off+len), which data has. Both NULL: they are
     * only summed. */
    struct dr_chain *target;
    int (*put)(void *user, uint64_t off, uint64_t len, const uint8_t *data, struct dr_error *err);
    bool put_again; /* what it has failed to do may be tried again, with the same arguments */
    /* NULL, or called at the instant, first of all: it may still set what `changed` points to. */
    int (*at_instant)(void *user, struct dr_chain *present, struct dr_error *err);
    void *user;
    struct dr_sums *sums; /* gets the sums of what is copied; or NULL */
    /* NULL: all is copied, into a target that reads as zeros. Else the target holds already what
     * the disk holds elsewhere, and zeros in these ranges are written, too. */
    const struct dr_changed *changed;
    struct dr_dirty *left;  /* NULL, or made by dr_dirty_make: with `changed`, what the target does
                               not  have yet, in whole grains */
    struct dr_spill *spill; /* or NULL; may be shared with other disks */

    /* private */
    struct dr_chain *chain; /* the disk at the instant */
    struct dr_dirty todo, spilled;
    uint32_t *slots; /* where they are in the spill; each under the range lock of its grain */
    struct dr_ranges *taking;
    struct dr_transfer transfer; /* how grains are written */
    struct dr_walk walk;         /* of the job: what there is to copy */
    uint64_t pos, spill_pos;     /* of the job */
    uint64_t ahead;              /* bytes that it took out of the spill, and did not come to yet */
    bool hooked;
    _Atomic uint64_t copied; /* bytes read */
    _Atomic bool broken;
    pthread_mutex_t lock;
    struct dr_error error; /* why it is broken; under lock */
};

/* Make ready for the instant. The members that are not private are set. Ends with dr_frozen_end,
 * also after a failure. */
int dr_frozen_begin(struct dr_frozen *f, struct dr_error *err);
/* This is the instant, one of all n: the requests of their disks wait for it. */
int dr_frozen_now_all(struct dr_frozen *const *all, size_t n, struct dr_job *job,
                      struct dr_error *err);
/* The same of one, in a step of dr_disk_quiesce or dr_disk_exchange of its disk. */
int dr_frozen_now_quiet(struct dr_frozen *f, struct dr_chain *present, struct dr_error *err);
/* Copy all that is to be copied. before, after: bytes of the job's other disks, for progress. */
int dr_frozen_copy(struct dr_frozen *f, uint64_t before, uint64_t after, struct dr_job *job,
                   struct dr_error *err);
/* The guest's changes are told no more, and the target is not written to any more. -errno: the copy
 * was broken. */
int dr_frozen_finish(struct dr_frozen *f, struct dr_error *err);
void dr_frozen_end(struct dr_frozen *f);

#endif
