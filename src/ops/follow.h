/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Copying from a disk that its guest goes on changing: a bitmap notes what is changed, which is
 * copied again round by round, then for as long as the job is to follow the guest, and at last,
 * where the guest changes more than is copied, in parts while its requests wait. What is left then
 * is bounded: the caller copies it in the step that switches the disk. */
#ifndef DR_OPS_FOLLOW_H
#define DR_OPS_FOLLOW_H

#include "ops/dirty.h"
#include "ops/stock.h"

struct dr_follow {
    struct dr_job *job;
    uint64_t size;         /* bytes of the disk that are copied */
    struct dr_dirty dirty; /* dr_dirty_begin; all zeros: nobody changes the disk */
    /* Set up a transfer of all of it that overwrites whatever the target has. */
    void (*transfer)(void *user, struct dr_transfer *t);
    /* Make the copy durable. */
    int (*flush)(void *user, struct dr_error *err);
    void *user;
    uint64_t part; /* private: bytes that are copied while requests wait */
};

/* Copy again what was changed, or `most` bytes of it. job: of this copy; NULL while requests wait,
 * so that nobody pauses it there. */
int dr_follow_rest(struct dr_follow *f, uint64_t most, struct dr_job *job, struct dr_error *err);
/* Some rounds of that, until little is left or it does not get less. */
int dr_follow_rounds(struct dr_follow *f, struct dr_error *err);
/* Tell that the job is ready, and copy what is changed until it is told to complete. */
int dr_follow_until_told(struct dr_follow *f, struct dr_error *err);
/* While more than a bounded part is left, requests wait time and again until a part is copied; in
 * between only those that have waited get in. If the guest changes as much as a part meanwhile, the
 * parts grow. */
int dr_follow_catch_up(struct dr_follow *f, struct dr_error *err);

#endif
