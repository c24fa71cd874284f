/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of a qcow2 file. The driver looks at all counts and at the tables of the disk, and
 * chooses the cluster `end` where the file can end: there are as many free clusters before it as
 * there are clusters to be moved behind it.
 *
 *     before:  H T d d . d . . d d L d . d        d data, T and L tables, . free
 *     after:   H T d d L d d d d d|               end = the number of clusters in use
 *
 * What moves: clusters that the disk alone leads to, L2 tables that it does not share, an L1 table
 * and a refcount table of one cluster, refcount blocks. All else (snapshots and what they share,
 * bitmaps, longer tables) stays where it is, and the file does not end before it. */
#ifndef DR_FORMATS_QCOW2_COMPACT_H
#define DR_FORMATS_QCOW2_COMPACT_H

#include "formats/qcow2/qcow2.h"

/* Numbers of clusters. Under image->lock once begin has returned. */
struct qcow2_compact {
    uint64_t clusters; /* in the file */
    uint64_t first;    /* the first bit's cluster: what is before it does not move */
    uint8_t *movable;  /* a bit for each cluster from `first` on */
    uint64_t used;     /* that have a count */
    uint64_t stays;    /* the file cannot end before this one */
    uint64_t end;
    uint64_t cursor;  /* those before it are not free */
    bool moves_coded; /* no snapshot leads to compressed clusters */
};

/* [page] The first free cluster before compact->end; its count is still 0, and in memory. 1: there
 * is none. */
int qcow2_find_lower(struct dr_image *image, uint64_t *host, struct dr_error *err);
/* Is the place of the entry one that is to be moved? */
bool qcow2_stands_high(const struct qcow2 *q, const struct qcow2_entry *e);

int qcow2_compact_begin(struct dr_image *image, struct dr_error *err);
bool qcow2_compact_moves(const struct dr_image *image, const struct dr_extent *ext);
void qcow2_compact_spare(struct dr_image *image, const struct dr_extent *ext);
uint64_t qcow2_compact_length(const struct dr_image *image);
int qcow2_compact_finish(struct dr_image *image, struct dr_error *err);
void qcow2_compact_end(struct dr_image *image);

#endif
