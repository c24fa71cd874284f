/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of a commit share. Nobody else includes this.
 *
 *   commit.c           what may be refused, the order of the steps, the copy
 *   commit-siblings.c  other images that would no longer be valid
 *   commit-pivot.c     emptying C, and going over to P
 */
#ifndef DR_OPS_COMMIT_H
#define DR_OPS_COMMIT_H

#include "ops/follow.h"
#include "ops/ops-internal.h"

struct commit {
    struct dr_fs *fs;
    const struct dr_commit_options *o;
    struct dr_job *job;
    bool shared; /* other threads may use the disk */
    /* A pivot over several images is two commits: the first one looks for siblings for both, and
     * nobody is asked before its switch. */
    enum commit_part { COMMIT_WHOLE, COMMIT_FIRST, COMMIT_SECOND } part;
    const char *path;
    struct dr_disk *disk;
    struct dr_chain *chain;
    size_t first, base; /* indexes of C and P */
    uint64_t size;      /* bytes that go down */
    bool keep;
    struct dr_image *thawed[3]; /* by this commit */
    unsigned n_thawed;
    struct dr_follow follow;
    const struct dr_image **forgot; /* whose record of its parent was removed: of C to M. Only to be
                                     * compared: they may be gone */
    size_t n_forgot;
    bool k_print;             /* what K's parent is is recorded */
    const struct dr_image *p; /* the base, also when the chain is another one */
};

static inline struct dr_image *commit_c(const struct commit *c)
{
    return c->chain->images[c->first];
}

static inline struct dr_image *commit_m(const struct commit *c)
{
    return c->chain->images[c->base - 1];
}

/* NULL: C is the top. */
static inline struct dr_image *commit_k(const struct commit *c)
{
    return c->first > 0 ? c->chain->images[c->first - 1] : NULL;
}

static inline struct dr_image *commit_p(const struct commit *c)
{
    return c->chain->images[c->base];
}

/* ------------------------------------------------------------------ commit.c */

/* Calls `by`, which is dr_disk_quiesce or dr_disk_quiesce_unflushed, and renews c->chain. */
int commit_quiesce(struct commit *c,
                   int (*by)(struct dr_disk *, dr_quiet_step, void *, uint64_t *,
                             struct dr_error *),
                   dr_quiet_step step, struct dr_error *err);

/* ------------------------------------------------------------------ commit-siblings.c */

/* -EBUSY: other images would show something else once P has changed, and no force. */
int commit_check_siblings(const struct commit *c, struct dr_error *err);

/* ------------------------------------------------------------------ commit-pivot.c */

/* C holds nothing that P does not hold, but for what the guest has changed since. */
int commit_empty_top(struct commit *c, struct dr_error *err);
/* Before anything changes: can the disk go over to P? */
int commit_check_pivot(const struct commit *c, struct dr_error *err);
/* After the copy: is it to go over, and not to leave a copy? */
bool commit_shall_pivot(const struct commit *c);
int commit_pivot(struct commit *c, struct dr_error *err);

#endif
