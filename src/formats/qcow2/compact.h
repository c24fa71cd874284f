/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of a qcow2 file. The driver looks at all counts and at the tables of the disk, and
 * chooses the cluster `end` where the file can end: there are as many free clusters before it as
 * there are clusters to be moved behind it.
 *
 *     before:  H T d d . d . . d d L d . d        d data, T and L tables, . free
 *     after:   H T d d L d d d d d|               end = the number of clusters in use
 *
 * What moves: clusters that the disk alone leads to, L2 tables that it does not share, its L1
 * table, the refcount table and its blocks, bitmaps with their tables and their directory. All else
 * (snapshots and what they share) stays where it is, and the file does not end before it.
 *
 * A table of several clusters needs as many free ones in a row. A window is chosen for it where the
 * fewest clusters have to give way; those move like the ones behind the end, and the table follows
 * last of all. Where there is no window, the table stays, and the file does not end before it.
 *
 * As long as such a table stands where the file is to end, what is behind it does not fit before
 * the end. Then only the windows are cleared and the tables moved, and all of it begins again. */
#ifndef DR_FORMATS_QCOW2_COMPACT_H
#define DR_FORMATS_QCOW2_COMPACT_H

#include "formats/qcow2/qcow2.h"

#define QCOW2_WINDOWS 16u /* more long tables than that do not move */

enum qcow2_long { QCOW2_LONG_L1, QCOW2_LONG_REFTABLE, QCOW2_LONG_DIRECTORY, QCOW2_LONG_BITMAP };

/* A table of n clusters from `at` on, and where it is to be moved to. Numbers of clusters. */
struct qcow2_window {
    enum qcow2_long what;
    uint32_t bitmap; /* its number in the directory */
    uint64_t at, n;
    uint64_t to; /* 0: it stays */
};

/* Numbers of clusters. Under image->lock once begin has returned. */
struct qcow2_compact {
    uint64_t clusters;  /* in the file */
    uint64_t first;     /* the first bit's cluster: what is before it does not move */
    uint8_t *movable;   /* a bit for each cluster from `first` on */
    uint64_t used;      /* that have a count */
    uint64_t stays;     /* the file cannot end before this one */
    uint64_t end, goal; /* goal: the end once all is done, where that takes another round */
    uint64_t cursor;    /* those before it are not free */
    bool clears;        /* only windows are cleared now, into any free cluster of the file */
    bool moves_coded;   /* no snapshot leads to compressed clusters */
    struct qcow2_window windows[QCOW2_WINDOWS];
    unsigned n_windows;
};

/* Can what stands in the cluster be moved? */
bool qcow2_can_move(const struct qcow2_compact *c, uint64_t cluster);
/* The window that the cluster lies in, or NULL. */
const struct qcow2_window *qcow2_window_of(const struct qcow2_compact *c, uint64_t cluster);
/* Are the bytes [host, host + len) to be moved: do they reach behind the end, or into a window? */
bool qcow2_is_high(const struct qcow2 *q, uint64_t host, uint64_t len);
/* The same of an entry's place, if it can move. */
bool qcow2_stands_high(const struct qcow2 *q, const struct qcow2_entry *e);

/* [page] The first free cluster before compact->end and in no window; its count is still 0, and in
 * memory. 1: there is none. */
int qcow2_find_lower(struct dr_image *image, uint64_t *host, struct dr_error *err);

/* compact-windows.c */

/* compact->end is chosen: find a window for each long table behind it. What finds none stays, and
 * moves the end. */
int qcow2_find_windows(struct dr_image *image, struct dr_error *err);
/* Where the file can end, by what is in use and what stays. */
void qcow2_choose_end(const struct qcow2 *q, struct qcow2_compact *c);

/* compact-tables.c; nobody writes, no lock is held */

/* A free cluster before the end, counted 1 from now on. 1: there is none. */
int qcow2_take_lower(struct dr_image *image, uint64_t *host, struct dr_error *err);
/* Copy len bytes, whole clusters, to a place that was taken; durable, and so are the counts. */
int qcow2_copy_table(struct dr_image *image, uint64_t from, uint64_t to, uint64_t len,
                     struct dr_error *err);

/* compact-bitmaps.c; nobody writes, no lock is held */

/* Bits, tables and a directory of one cluster. 1: there is no free place left. */
int qcow2_lower_bitmaps(struct dr_image *image, struct dr_error *err);
/* To a place that was taken for it. */
int qcow2_move_directory(struct dr_image *image, uint64_t to, struct dr_error *err);
int qcow2_move_bitmap_table(struct dr_image *image, uint32_t bitmap, uint64_t to,
                            struct dr_error *err);

int qcow2_compact_begin(struct dr_image *image, struct dr_error *err);
bool qcow2_compact_moves(const struct dr_image *image, const struct dr_extent *ext);
void qcow2_compact_spare(struct dr_image *image, const struct dr_extent *ext);
uint64_t qcow2_compact_length(const struct dr_image *image);
int qcow2_compact_finish(struct dr_image *image, bool *again, struct dr_error *err);
void qcow2_compact_end(struct dr_image *image);

#endif
