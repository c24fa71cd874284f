/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of a rebase share. Nobody else includes this.
 *
 *   rebase.c       what may be refused, the order of the steps, the switch
 *   rebase-fill.c  fill into the image what only the old parents show
 *   rebase-coded.c the same, compressed
 *   rebase-drop.c  give up what equals the new parent
 *   rebase-retire.c  go on with the image's plain file alone */
#ifndef DR_OPS_REBASE_H
#define DR_OPS_REBASE_H

#include "core/fingerprint.h"
#include "ops/dirty.h"
#include "ops/ops-internal.h"

struct rebase {
    struct dr_fs *fs;
    const struct dr_rebase_options *o;
    struct dr_job *job;
    bool shared;             /* other threads may use the disk */
    bool retire;             /* at last the image's plain file is the disk */
    const char *path, *name; /* name NULL = no parent */
    const char *recorded;    /* the parent's name in the header */
    size_t at;               /* the overlay's index in the disk's chain */
    bool thawed;             /* it lies below the active image, and was frozen before */
    char *where;             /* of the new parent */
    struct dr_disk *disk;
    struct dr_chain *old;   /* the overlay, at its index 0, on its old parents */
    struct dr_disk *parent; /* the new parents when they are not among the old ones */
    struct dr_chain *above; /* the chain that holds the new parent, or NULL */
    size_t above_first;
    struct dr_dirty dirty; /* what the guest changes, where that can undo what was filled */
    bool has_views;        /* until the copy is done: the overlay has snapshots inside, which keep
                              what they show, too */
    struct dr_views views;
    bool has_print; /* what the parent was is recorded beside the overlay, and: */
    struct dr_fingerprint print;
};

static inline struct dr_image *rebase_overlay(const struct rebase *rb)
{
    return rb->old->images[0];
}

/* -ENOSPC, if what is to be filled does not fit into the free space. */
int rebase_check_space(struct rebase *rb, struct dr_error *err);
/* Bytes that the copy would fill; reads what it would read. */
int rebase_count_fill(struct rebase *rb, uint64_t *bytes, struct dr_error *err);
/* Fill what the old parents show and the new ones do not into the overlay, and into all snapshots
 * inside it; then, where it must need no parent, make its holes zeros of its own. */
int rebase_fill(struct rebase *rb, struct dr_error *err);
/* The same for what the guest has changed since, while no request is past the gate. */
int rebase_fill_rest(struct rebase *rb, struct dr_error *err);
/* Make holes that a guest's discards have left since zeros of the image's own. */
int rebase_own_rest(struct rebase *rb, struct dr_error *err);
int rebase_drop_equal(const struct rebase *rb, struct dr_error *err);
/* Bytes that it would give up. */
int rebase_count_equal(const struct rebase *rb, uint64_t *bytes, struct dr_error *err);

/* What is above the overlay in `present`, and the overlay, on its new parents. */
int rebase_make_chain(const struct rebase *rb, const struct dr_chain *present,
                      struct dr_chain **chain, struct dr_error *err);

/* May the image be left to its plain file, if that is wanted? */
int rebase_retire_check(const struct rebase *rb, struct dr_error *err);
/* A dr_quiet_step, in the place of the switch to other parents. */
int rebase_retire_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err);
int rebase_retire_end(const struct rebase *rb, struct dr_error *err);

#endif
