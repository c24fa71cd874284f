/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Copying from a disk that its guest goes on changing.
 *
 * A bitmap notes what the guest changes. The job copies all of the disk once, then, round by round,
 * what is noted, for as long as it is to follow the guest. A guest that writes faster than that
 * would keep it busy for ever: so near the end its writes block. Each then copies its own bytes
 * before the guest is told, unless the place is noted already and so left to the job. From then on
 * the guest notes nothing, each round leaves less, and what is left for the step that switches the
 * disk is bounded.
 *
 * A piece is copied by one thread at a time: it is locked (`copying`), its note is taken away, it
 * is read, and it is written. A write that blocks waits for that lock after it has reached the
 * disk, so whichever thread comes last to a place copies what the guest wrote there last.
 *
 * What a blocking write cannot copy is noted, and writes block no longer: the guest's write
 * succeeds, and the job meets the failure and does what it was told to do about it. */
#ifndef DR_OPS_FOLLOW_H
#define DR_OPS_FOLLOW_H

#include "ops/dirty.h"
#include "ops/stock.h"

struct dr_follow {
    struct dr_job *job;
    uint64_t size;       /* bytes of the disk that are copied */
    bool write_blocking; /* from the beginning; else only near the end */
    bool only_new;       /* what the guest writes from now on, and nothing else */
    /* Set up a transfer of all of it. first: the first pass, for which the target is as it was;
     * else whatever the target has is to be overwritten. */
    void (*transfer)(void *user, bool first, struct dr_transfer *t);
    /* Make the copy durable. */
    int (*flush)(void *user, struct dr_error *err);
    void *user;

    /* private */
    struct dr_dirty dirty;     /* all zeros: nobody changes the disk */
    struct dr_dirty touched;   /* what the guest has written to since dr_follow_watch() */
    _Atomic bool watching;     /* that is noted */
    struct dr_ranges *copying; /* what is being copied */
    struct dr_transfer again;  /* as transfer() has set it up */
    bool wants_blocking;
    bool hurry;            /* the job does not give way to the guest now */
    _Atomic bool blocking; /* the guest's writes block now */
    _Atomic bool idle;     /* the job sleeps until something is noted */
};

/* Begin to note what the guest does. All but the private members is set. */
int dr_follow_begin(struct dr_follow *f, struct dr_disk *disk, struct dr_error *err);
/* Also for one that was never begun. Not while the disk is quiesced. */
void dr_follow_end(struct dr_follow *f);

/* The first pass over all of it, which copies nothing for only_new. The functions below come after
 * it. Where nobody changes the disk it is the only pass. */
int dr_follow_all(struct dr_follow *f, struct dr_error *err);
/* Some rounds, until little is left or it does not get less; what was copied is durable then. */
int dr_follow_rounds(struct dr_follow *f, struct dr_error *err);
/* Tell that the job is ready, and copy what is changed until it is told to complete. */
int dr_follow_until_told(struct dr_follow *f, struct dr_error *err);
/* The guest's writes block until little is left. They go on blocking, so that it stays so. */
int dr_follow_catch_up(struct dr_follow *f, struct dr_error *err);
/* The same just before the switch, and flush both sides (flush_disk: the guest's), until there is
 * little left to flush while requests wait, but not for ever. */
int dr_follow_draw_near(struct dr_follow *f, int (*flush_disk)(void *user, struct dr_error *err),
                        struct dr_error *err);
/* Note from now on what the guest writes to, whether or not it was copied since. Without memory
 * nothing is noted. */
void dr_follow_watch(struct dr_follow *f);
/* Has the guest written there since? */
bool dr_follow_touched(const struct dr_follow *f, uint64_t off, uint64_t len);
/* They block no longer, and all that is not noted is durable in the copy. It stays so for what is
 * not noted later. */
int dr_follow_settle(struct dr_follow *f, struct dr_error *err);

/* For the step that switches the disk, while its requests wait: copy all that is noted. Writes
 * block no longer afterwards. */
int dr_follow_rest(struct dr_follow *f, struct dr_error *err);
/* The same without copying, after a failure: what there was to copy to may go away. */
void dr_follow_stop(struct dr_follow *f);

#endif
