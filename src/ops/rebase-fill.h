/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the two ways of copying in a rebase share: rebase-fill.c and rebase-coded.c. */
#ifndef DR_OPS_REBASE_FILL_H
#define DR_OPS_REBASE_FILL_H

#include "ops/rebase.h"

struct rebase_fill {
    struct dr_pair_walk pair; /* a = old view, b = new view, mask = the overlay itself */
    struct dr_dirty *rest;    /* NULL, or: go on with what is dirty there */
    struct dr_chain *chain;
    const struct dr_views *views; /* NULL: there is only the disk */
    uint64_t step;
    uint64_t unsaved; /* bytes filled since the last flush; by several threads */
};

void rebase_fill_init(struct rebase_fill *f, const struct rebase *rb);
/* So many bytes more were filled: flush now and then. */
int rebase_fill_save(struct rebase_fill *f, uint64_t filled, struct dr_error *err);
/* The whole copy, compressed. */
int rebase_fill_coded(struct rebase *rb, struct dr_error *err);

#endif
