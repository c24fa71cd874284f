/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots inside a qcow2 image. Each is an L1 table of its own, named by an entry of the snapshot
 * table; tables and clusters below it are shared with the disk and with other snapshots, and their
 * counts say how often.
 *
 *   snapshot-table.c  the snapshot table: read, find, encode with one entry more or less
 *   snapshot-tree.c   all that one L1 table leads to: counts up and down, COPIED
 *   snapshot-next.c   counts and the disk's tables as they are to be, and the switch to them
 *   snapshot.c        create, apply, delete, list, show
 *   views.h           filling the holes of the disk and of all snapshots together */
#ifndef DR_FORMATS_QCOW2_SNAPSHOT_H
#define DR_FORMATS_QCOW2_SNAPSHOT_H

#include "formats/qcow2/qcow2.h"

/* ------------------------------------------------------------------ snapshot-table.c */

#define QCOW2_MAX_SNAPSHOT_NAME 255u /* bytes that QEMU shows of a name */

struct qcow2_snapshot {
    size_t at, len; /* of its entry in the table's bytes, with what pads it to 8 */
    uint64_t l1_at, l1_entries;
    size_t id_at, id_len, name_at, name_len;
    struct dr_snapshot_info info; /* but for the texts */
};

struct qcow2_snapshots {
    uint8_t *bytes; /* as in the file */
    size_t len;
    struct qcow2_snapshot *list;
    uint32_t n;
};

int qcow2_snapshots_load(struct dr_image *image, struct qcow2_snapshots *t, struct dr_error *err);
void qcow2_snapshots_free(struct qcow2_snapshots *t);
#define CLEANUP_SNAPSHOTS __attribute__((cleanup(qcow2_snapshots_free)))
/* -ENOENT: none has that id. */
int qcow2_snapshots_find(struct dr_image *image, const struct qcow2_snapshots *t, const char *id,
                         const struct qcow2_snapshot **s, struct dr_error *err);
/* Its L1 table lies where one may be. */
int qcow2_snapshot_check_l1(struct dr_image *image, const struct qcow2_snapshot *s,
                            struct dr_error *err);
/* No lock held. Protect the L1 tables of snapshots from now on: they take no data. Of a table that
 * cannot be read nothing is protected; the check names what is wrong with it. */
void qcow2_guard_snapshots(struct dr_image *image);
/* The table's bytes, malloc'ed and padded to whole clusters, with one entry more, whose id is
 * larger than all others, or without one. Where nothing is left *bytes is NULL. */
int qcow2_snapshots_with(struct dr_image *image, const struct qcow2_snapshots *t, const char *name,
                         uint64_t l1_at, uint64_t l1_entries, uint8_t **bytes, size_t *len,
                         struct dr_error *err);
int qcow2_snapshots_without(struct dr_image *image, const struct qcow2_snapshots *t,
                            const struct qcow2_snapshot *s, uint8_t **bytes, size_t *len,
                            struct dr_error *err);

/* ------------------------------------------------------------------ snapshot-tree.c; no lock held
 */

struct qcow2_tree {
    uint64_t l1_at, entries;
};

/* Every table and every cluster can be understood and is counted; with raise, has room for one
 * more in its count. -EINVAL: it has not. Changes nothing. */
int qcow2_tree_check(struct dr_image *image, const struct qcow2_tree *tree, bool raise,
                     struct dr_error *err);
/* One more way to each. *raised: how many counts went up, also after a failure. */
int qcow2_tree_raise(struct dr_image *image, const struct qcow2_tree *tree, uint64_t *raised,
                     struct dr_error *err);
/* Undo that, while nothing durable counts on it. */
int qcow2_tree_unraise(struct dr_image *image, const struct qcow2_tree *tree, uint64_t raised,
                       struct dr_error *err);
/* One way less to each, which is durable: what has none left goes to the core. */
int qcow2_tree_lose(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err);
/* The same, of counts that are not in force yet, and nothing is freed: counts may become 0. */
int qcow2_tree_lower(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err);
/* Those counts are in force, durably: what is counted 0 times goes to the core. */
int qcow2_tree_free(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err);
/* tables, by L1 entry: the offsets of the L2 tables that have an entry with COPIED (share), or one
 * that could have COPIED and has not; of the others it is left as it is. */
int qcow2_tree_mark(struct dr_image *image, const struct qcow2_tree *tree, bool share,
                    uint64_t *tables, struct dr_error *err);
/* Everything below the tree is shared from now on. own: the tables of the disk itself, whose L1
 * entries say so, too. */
int qcow2_tree_share(struct dr_image *image, const struct qcow2_tree *tree, bool own,
                     struct dr_error *err);
/* COPIED as the counts say, in the tables of the disk. What is counted 0 times is damage. */
int qcow2_tree_recount(struct dr_image *image, const struct qcow2_tree *tree, struct dr_error *err);

/* ------------------------------------------------------------------ snapshot-next.c; no lock held
 */

struct qcow2_next {
    struct dr_image *image;
    uint64_t l1_at, l1_len, l1_entries; /* the disk's L1 table; len 0: none yet */
    uint64_t *copies;                   /* by L1 entry: its L2 table in there; 0 = as before */
    uint64_t *lost; /* by L1 entry: an L2 table that nothing leads to after the switch; 0 = none */
    bool kept;      /* lost has copies, too, that will not be used */
    uint64_t *reftable; /* the new blocks; once the driver counts in them: the former ones */
    uint64_t n_blocks;  /* entries of that */
    bool counting;
    uint64_t reftable_at;
    uint32_t reftable_clusters; /* 0: none yet */
    uint64_t end;               /* of what was allocated; the caller's goes in here, too */
    uint64_t lost_l1_at, lost_reftable_at;
    size_t n_lost;
};

/* Allocate clusters for the disk's tables. share: COPIED will be cleared, else it may be set. After
 * a failure of this and the next two: qcow2_next_undo(), qcow2_next_free(). */
int qcow2_next_begin(struct qcow2_next *next, struct dr_image *image, bool share,
                     struct dr_error *err);
/* Everything else is allocated, too: copy the counts, and count in the copies. */
int qcow2_next_count(struct qcow2_next *next, struct dr_error *err);
/* Write the disk's tables at their new places; counts of what it had are as they are to be, or
 * lower.
 */
int qcow2_next_tables(struct qcow2_next *next, struct dr_error *err);
/* Everything is durable: put it in force, with another snapshot table. After a failure nothing is
 * to be undone. */
int qcow2_next_switch(struct qcow2_next *next, uint32_t n_snapshots, uint64_t snapshots_at,
                      struct dr_error *err);
/* Free what is no longer in force. */
int qcow2_next_end(struct qcow2_next *next, struct dr_error *err);
/* Free all that was allocated; where this fails it is leaked. */
void qcow2_next_undo(struct qcow2_next *next);
void qcow2_next_free(struct qcow2_next *next);

/* ------------------------------------------------------------------ the callbacks */

int qcow2_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err);
int qcow2_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err);
int qcow2_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err);
int qcow2_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                        struct dr_error *err);
int qcow2_snapshot_show(struct dr_image *image, const char *id, struct dr_error *err);

int qcow2_views_begin(struct dr_image *image, struct dr_views *views, struct dr_error *err);
int qcow2_views_hole(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                     struct dr_error *err);
int qcow2_views_fill(struct dr_image *image, const void *buf, uint32_t coded_len, uint64_t off,
                     uint64_t len, struct dr_error *err);
int qcow2_views_end(struct dr_image *image, struct dr_error *err);
void qcow2_views_free(struct qcow2 *q);

#endif
