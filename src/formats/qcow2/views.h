/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Filling what the parent shows into every view of an image: the disk and each snapshot inside it.
 *
 *   views.c         which views there are, what they have in a span, where the parent shows
 *   views-tables.c  L2 tables that may be edited
 *   views-fill.c    clusters
 *
 * All views have one parent. Before another one takes its place, what it shows is written into the
 * image once, and linked into every tree that has nothing at that offset; the counts say how many
 * these are. A view is read through an L1 table, and several L1 tables may share an L2 table:
 *
 *   L1 disk ──┐                           what is put into the hole of a shared L2 table
 *             ├─► L2 ─► clusters          is there for all that share it, so the table
 *   L1 one  ──┘                           is edited where it is, and the new cluster is
 *   L1 two  ────► nothing                 counted as often as tables lead to it
 *
 * There may be 65536 snapshots, each with tables of its own. So every step goes over the views or
 * their tables one after another, notes in a few bytes what it found, and returns 1 now and then
 * for the caller to let go of the pages and the lock, and to call it again. While they are filled
 * the core keeps writers out of the span, and one fill at a time is at work (qcow2_views.filling),
 * so what was noted stays true; who only asks where holes are looks again when links have changed.
 *
 * Nothing that a view shows changes at any time. Counts and data are durable before the entries
 * that need them (invariants 1 and 5), so a crash leaves counts that are too high. The disk's
 * entries say by COPIED whether they are the only ones: the disk is the first to leave what it
 * shares, so it is never what is left when the others have gone, and COPIED goes with the counts at
 * any time. */
#ifndef DR_FORMATS_QCOW2_VIEWS_H
#define DR_FORMATS_QCOW2_VIEWS_H

#include "formats/qcow2/snapshot.h"

#include <pthread.h>

/* Views or tables that a step looks at before it lets go, and links or tables that it edits before
 * it asks for a flush. */
#define QCOW2_VIEWS_PIECE 256u
#define QCOW2_VIEWS_DIRTY 1024u

struct qcow2_view {
    uint64_t l1_at, size;
};

struct qcow2_sharer {
    uint64_t table; /* the view's L2 table; 0 = none */
    uint32_t view;
};

/* Views with the same L2 table that end at the same offset: what one of them gets all may have. */
struct qcow2_class {
    uint64_t table, end; /* end: guest offset, of the views or of the span */
    uint32_t first, n;   /* of the sharers */
};

/* What all views have for the part of the disk that one L2 table covers. */
struct qcow2_span {
    uint64_t begin, end; /* guest; end 0: nothing is known */
    uint64_t disk;       /* the disk's table */
    uint64_t links;      /* qcow2_views.links at that time */
    size_t n_read;       /* views whose L1 entries are known */
    struct qcow2_sharer *sharers;
    struct qcow2_class *classes;
    size_t n_sharers, n_classes;
    size_t disk_class; /* that of the disk */
    size_t at;         /* class at which the present step goes on */
    size_t dirty;      /* L1 entries that were edited since the last flush */
    unsigned looked;   /* views or tables that steps looked at since they let go */
};

struct qcow2_views {
    struct qcow2_view *list; /* the disk is the first */
    size_t n;
    bool recount;   /* the disk may be the only one left that leads to something */
    bool filling;   /* somebody is at work with `fill` */
    uint64_t links; /* how often L1 entries were changed here */
    pthread_cond_t turn;
    struct qcow2_span fill, ask;
    /* What is asked for, and the answer as far as it is known. */
    uint64_t asked;
    unsigned n_asked;
    uint64_t holes; /* one bit for a cluster */
};

/* A step has looked at one more. Is it time to let go? */
static inline bool qcow2_views_enough(struct qcow2_span *s)
{
    if (s->looked++ < QCOW2_VIEWS_PIECE)
        return false;
    s->looked = 0;
    return true;
}

/* [page] Find out what all views have in the span of off. 1: call again. */
int qcow2_span_look(struct dr_image *image, struct qcow2_span *s, uint64_t off,
                    struct dr_error *err);
/* [page] The entry of a class for the cluster at off. *hole: its sub-clusters that show the parent.
 */
int qcow2_views_entry(struct dr_image *image, const struct qcow2_class *c, uint64_t off,
                      struct qcow2_entry *e, uint32_t *hole, struct dr_error *err);

/* [page] Pin each count of the place n times, for as many calls of qcow2_free_later. */
int qcow2_pin_often(struct dr_image *image, uint64_t host, uint64_t len, size_t n);

/* [page] Give each class to which something in [off, off + len) is missing a table that only its
 * views lead to. Goes on at s->at. 1: call again. */
int qcow2_views_tables(struct dr_image *image, struct qcow2_span *s, uint64_t off, uint64_t len,
                       struct dr_error *err);

#endif
