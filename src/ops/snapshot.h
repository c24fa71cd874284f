/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the two parts of snapshot share: snapshot.c makes the child, snapshot-switch.c has an open
 * disk go on with it. */
#ifndef DR_OPS_SNAPSHOT_H
#define DR_OPS_SNAPSHOT_H

#include "ops/ops-internal.h"

struct snapshot {
    struct dr_disk *disk;
    const struct dr_open_options *options; /* allow_paths and flags for the child; may be NULL */
    const char *name;                      /* as the user gave it, or NULL */
    const struct dr_overlay *overlay;      /* of dr_disks_snapshot, or NULL */
    const struct dr_format *fmt;           /* of the child */
    struct dr_chain *chain;                /* the disk before */
    char *where;                           /* of the child */
    bool record;                           /* the machine's .vmsd is to know of it */
    struct dr_new_image fresh;             /* the child that is being made */
    bool published;                        /* it has its name */
    struct dr_image *child;                /* open for writing; the reference goes to next */
    struct dr_chain *next;                 /* the disk afterwards: child, then all of chain */
};

/* Disks that stop at one moment. */
struct snapshot_set {
    struct snapshot *all;
    size_t n;
    struct dr_job *job;
    size_t quiet;  /* disks whose requests wait */
    bool switched; /* the disks go on with their children, whatever fails afterwards */
};

/* enum dr_open_flag to open the child with. */
unsigned snapshot_child_flags(const struct snapshot *s);
/* A child that was there before records its parent; flags as those of set_backing. */
int snapshot_adopt(struct snapshot *s, unsigned flags, struct dr_error *err);

/* Have the open disks, for which all is prepared, go on with their children. On failure they go on
 * as before, unless set->switched says otherwise. */
int snapshot_switch(struct snapshot_set *set, struct dr_error *err);

#endif
