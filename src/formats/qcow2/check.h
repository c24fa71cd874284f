/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Checking and repairing: what its files share.
 *
 *   check.c            the order of it all: check, recover, trim
 *   check-walk.c       follows every table and counts the references to each cluster
 *   check-tally.c      the counts, of as many clusters as memory is allowed for
 *   check-ahead.c      reads pieces of the file, several at a time
 *   check-sweep.c      ranges of the file that may overlap, each byte read once; lists of tables
 *   check-snapshots.c  reads the snapshot table and the bitmap directory
 *   check-entry.c      what is wrong with an L2 entry
 *   check-overlap.c    names data that lies on tables
 *   check-compare.c    compares the counts with those on disk, and corrects these
 *   check-copied.c     the COPIED bits of the active tables
 *   check-rebuild.c    writes new counts at the end of the file
 *   check-renew.c      writes a snapshot table or bitmap directory anew
 *   check-split.c      gives entries clusters of their own, where counts cannot say how many share
 * one check-orphans.c    what no table leads to
 *
 * A pass walks all tables in the order of the file and counts what lies in a window of the file's
 * clusters: as many as fit into the memory it may use, which are all clusters of nearly every
 * image. Else the next pass counts the next window. A table that many entries lead to is read once
 * and counts as often.
 *
 * Everything works on the file and not through the page cache: nothing is dirty meanwhile. */
#ifndef DR_FORMATS_QCOW2_CHECK_H
#define DR_FORMATS_QCOW2_CHECK_H

#include "formats/ahead.h"
#include "formats/qcow2/qcow2.h"

#define QCOW2_CHECK_STEP    DR_AHEAD_STEP /* bytes read at once */
#define QCOW2_L1_RESERVED   UINT64_C(0x7f000000000001ff)
#define QCOW2_L2_RESERVED   UINT64_C(0x3f000000000001fe)
#define QCOW2_ROOT_RESERVED UINT64_C(0x1ff)

/* Bounds of the memory that a check takes, and of its threads. Tests make them less, to get several
 * windows. */
struct qcow2_check_limits {
    uint64_t tally;   /* bytes of counts */
    uint64_t tables;  /* L2 tables that are listed at once, 4 at least */
    unsigned readers; /* threads; 0: a processor's each, or as many requests as the file wants */
};
extern struct qcow2_check_limits qcow2_check_limits;

/* ------------------------------------------------------------------ check-tally.c */

/* Active entries say of a cluster that it is theirs alone, or that it is not; QCOW2_IS_TABLE: the
 * reference is not one to data of the guest. */
enum { QCOW2_SAYS_COPIED = 1, QCOW2_SAYS_SHARED = 2, QCOW2_IS_TABLE = 4 };

struct qcow2_tally_page;
/* How often each cluster of [begin, end) is referred to. end shrinks when memory runs short. */
struct qcow2_tally {
    uint64_t begin, end;
    bool more; /* something at or behind end was referred to */
    uint64_t limit, bytes;
    struct qcow2_tally_page **slots, **sorted, *last;
    size_t n, n_sorted;
};
void qcow2_tally_begin(struct qcow2_tally *t, uint64_t first, uint64_t limit);
void qcow2_tally_free(struct qcow2_tally *t);
/* `times` more references. 0 or -ENOMEM; 1: data and a table meet in this cluster. */
int qcow2_tally_add(struct qcow2_tally *t, uint64_t cluster, uint64_t times, unsigned says);
/* One less; there is one. */
void qcow2_tally_remove(struct qcow2_tally *t, uint64_t cluster);
uint64_t qcow2_tally_get(struct qcow2_tally *t, uint64_t cluster, unsigned *says);
/* After all of a pass was added: the first cluster from `from` on that may have references, or
 * t->end. */
int qcow2_tally_sort(struct qcow2_tally *t);
uint64_t qcow2_tally_next(const struct qcow2_tally *t, uint64_t from);

/* ------------------------------------------------------------------ the check */

struct qcow2_range { /* of the file: an L1 table, a bitmap's table */
    uint64_t at, len;
    bool active;
};

/* A cluster in which data and a table meet. */
struct qcow2_overlap {
    uint64_t cluster;
    const char *what; /* the table */
};

struct qcow2_check {
    struct dr_image *image;
    struct qcow2 *q;
    struct dr_file *f;
    void (*plan)(void *user, uint64_t off, const char *change); /* dr_check_result */
    struct dr_check_result *result; /* what this check finds; report is called unless silent */
    bool silent;
    bool upgrading;    /* what version 3 demands is demanded of version 2, too */
    uint64_t said;     /* findings, as lines */
    uint64_t clusters; /* of the file; the last may be shorter */
    struct qcow2_tally tally;
    uint64_t *roots; /* the refcount table, as on disk */
    uint64_t n_roots;
    struct qcow2_range *l1s; /* [0] is the active one */
    size_t n_l1s;
    uint64_t snapshots_len; /* bytes of the snapshot table */
    uint32_t n_snapshots;   /* in it */
    bool overhang;          /* the header says that there are more */
    bool incomplete;        /* some lack what version 3 demands */
    bool bad_bitmaps;       /* some cannot be right */
    struct qcow2_range *bitmaps;
    size_t n_bitmaps;
    struct qcow2_overlap *overlaps;
    size_t n_overlaps, room_overlaps;
    struct qcow2_ahead *ahead;
    uint8_t *buf; /* QCOW2_CHECK_STEP bytes */

    bool writes;   /* this pass writes to the file: nothing is read ahead */
    bool renewed;  /* a table was written anew */
    bool no_roots; /* walk: leave the refcount table and its blocks out */

    /* Findings. */
    bool lost;          /* what some entry should lead to is not known: unused clusters may be it */
    bool rebuild;       /* the refcount structure itself is damaged */
    bool no_block;      /* a cluster in use has no refcount block */
    bool copied_wrong;  /* in some entry of the active tables */
    bool entries;       /* some entry can be mended */
    uint64_t crowd;     /* references that are more than counts can say */
    uint64_t highest;   /* cluster that is in use or counted */
    uint64_t dangling;  /* references that lead behind the end of the file */
    uint64_t low, high; /* counts */
    uint64_t low_at;    /* the first cluster whose count is too low */
};

/* A finding, as a line for the user; those that are too many are left out. */
void qcow2_say(struct qcow2_check *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A repair changes something at byte `at` of the file. */
void qcow2_plan(struct qcow2_check *c, uint64_t at, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* `times` errors. */
void qcow2_found(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* The same, where it is not known what the damaged entry should say. */
void qcow2_found_lost(struct qcow2_check *c, uint64_t times, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Ends with qcow2_check_end, also after a failure. */
int qcow2_check_begin(struct qcow2_check *c, struct dr_image *image, struct dr_error *err);
/* Find the tables that a walk begins with. */
int qcow2_read_structure(struct qcow2_check *c, struct dr_check_result *result, bool silent,
                         struct dr_error *err);
void qcow2_check_end(struct qcow2_check *c);

/* The first window: what does not depend on it is reported once. */
static inline bool qcow2_first_window(const struct qcow2_check *c)
{
    return c->tally.begin == 0;
}

/* ------------------------------------------------------------------ check-ahead.c */

/* A part of the file, in as many ranges. Its ends are multiples of 8. */
struct qcow2_sweep {
    uint64_t at, len;
    uint64_t times, active; /* active: that many of the ranges are */
};

/* An L2 table, or a cluster of a bitmap. */
struct qcow2_table {
    uint64_t at;
    uint64_t times;  /* entries that lead to it */
    uint32_t active; /* of them, in the active L1 */
    uint32_t index;  /* in the active L1, of one of them */
};

/* Bytes of the file to be read, and what they are: part of one of these. */
struct qcow2_piece {
    uint64_t at;
    size_t len; /* up to QCOW2_CHECK_STEP; 0: nothing is read, it only waits its turn */
    bool used;  /* surely no hole: the file need not be asked */
    struct qcow2_sweep part;
    const struct qcow2_table *tables; /* the first one of a run */
    uint64_t first, n;                /* clusters whose counts these are */
    bool unknown;                     /* their block is somewhere, nobody knows where */
};
/* Uses a piece. bytes NULL: it is a hole, and so zeros; else they may be changed. */
typedef int (*qcow2_piece_fn)(struct qcow2_check *c, const struct qcow2_piece *piece,
                              uint8_t *bytes, void *user, struct dr_error *err);
/* From start to finish pieces may be added. Each is shown to fn by this thread, in the order of
 * adding, during a call of add or finish. finish: r < 0 drops what waits; returns r, or what went
 * wrong. After a failed add: nothing but finish, with that failure. */
void qcow2_ahead_start(struct qcow2_check *c, qcow2_piece_fn fn, void *user);
int qcow2_ahead_add(struct qcow2_check *c, const struct qcow2_piece *piece, struct dr_error *err);
int qcow2_ahead_finish(struct qcow2_check *c, int r, struct dr_error *err);
int qcow2_ahead_new(struct qcow2_check *c);
void qcow2_ahead_free(struct qcow2_check *c);

/* ------------------------------------------------------------------ check-sweep.c */

/* The union of ranges, each byte once, in parts. */
typedef int (*qcow2_part_fn)(struct qcow2_check *c, const struct qcow2_sweep *part, void *user,
                             struct dr_error *err);
int qcow2_each_part(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                    qcow2_part_fn fn, void *user, struct dr_error *err);
/* The same, and reads it. */
typedef int (*qcow2_sweep_fn)(struct qcow2_check *c, const struct qcow2_sweep *part, uint64_t at,
                              uint8_t *bytes, size_t len, void *user, struct dr_error *err);
int qcow2_sweep(struct qcow2_check *c, const struct qcow2_range *ranges, size_t n,
                qcow2_sweep_fn fn, void *user, struct dr_error *err);

/* All L2 tables in the order of the file, each once. Entries of the L1 tables are shown to each_l1
 * (may be NULL) exactly once. */
typedef int (*qcow2_table_fn)(struct qcow2_check *c, const struct qcow2_table *table, uint64_t at,
                              uint8_t *bytes, size_t len, void *user, struct dr_error *err);
int qcow2_each_table(struct qcow2_check *c, qcow2_sweep_fn each_l1, qcow2_table_fn each, void *user,
                     struct dr_error *err);

/* ------------------------------------------------------------------ check-snapshots.c */

#define QCOW2_SNAPSHOT_HEADER 40u
#define QCOW2_SNAPSHOT_EXTRA  16u /* bytes that version 3 demands */

struct qcow2_snapshot {
    uint64_t at, len; /* of its entry */
    uint64_t l1_at;
    uint32_t l1_entries, extra;
};
/* Lists all L1 tables. */
int qcow2_read_snapshots(struct qcow2_check *c, struct dr_error *err);
/* 0, or > 0: there is none that can be read. */
int qcow2_read_snapshot(struct qcow2_check *c, uint64_t at, struct qcow2_snapshot *s,
                        struct dr_error *err);
/* Lists the tables of all bitmaps that may be right, and shows their entries of the directory to
 * each (may be NULL). */
typedef int (*qcow2_bitmap_fn)(struct qcow2_check *c, uint64_t at, uint64_t len, void *user,
                               struct dr_error *err);
int qcow2_read_bitmaps(struct qcow2_check *c, qcow2_bitmap_fn each, void *user,
                       struct dr_error *err);

/* ------------------------------------------------------------------ check-renew.c; the counts are
 * right, and nothing of the file is in the page cache */

int qcow2_renew_snapshots(struct qcow2_check *c, struct dr_error *err);
/* Without those that cannot be right. */
int qcow2_renew_bitmaps(struct qcow2_check *c, struct dr_error *err);

/* ------------------------------------------------------------------ check-entry.c */

enum qcow2_use {
    QCOW2_USE_NOTHING,
    QCOW2_USE_CLUSTER, /* one */
    QCOW2_USE_CODED,   /* each that the coded bytes touch */
};
/* The clusters that an L2 entry refers to, as QEMU reads it even where it is damaged. */
struct qcow2_reference {
    enum qcow2_use use;
    uint64_t at, len;
    bool copied;
};
struct qcow2_fault {
    char text[160];
    bool mendable; /* there is one right value: the two words of the entry */
    uint64_t value, masks;
};
/* The number of faults (0 to 2). host: where the guest's cluster has to be in a data file, or
 * QCOW2_NO_PLACE: anywhere. */
unsigned qcow2_entry_faults(const struct qcow2 *q, const uint8_t *raw, uint64_t host,
                            struct qcow2_fault faults[2], struct qcow2_reference *ref);

/* ------------------------------------------------------------------ the passes */

/* check-walk.c: adds everything that lies in the tally's window. */
int qcow2_walk(struct qcow2_check *c, struct dr_error *err);
/* Corrects entries that have one right value. */
int qcow2_mend_entries(struct qcow2_check *c, struct dr_error *err);

/* check-overlap.c. The walk notes clusters; afterwards the entries that lead there are named. */
void qcow2_note_overlap(struct qcow2_check *c, uint64_t cluster);
int qcow2_name_overlaps(struct qcow2_check *c, struct dr_error *err);

/* check-compare.c. A root: what an entry of the refcount table says. */
enum qcow2_root { QCOW2_ROOT_NONE, QCOW2_ROOT_BLOCK, QCOW2_ROOT_UNKNOWN };
enum qcow2_root qcow2_root_of(const struct qcow2_check *c, uint64_t block, uint64_t *at);
int qcow2_read_roots(struct qcow2_check *c, struct dr_error *err);
/* A repair of counts on disk: */
enum { QCOW2_RAISE = 1 /* counts that are too low */, QCOW2_LOWER = 2 /* too high */ };
int qcow2_compare(struct qcow2_check *c, unsigned fix, struct dr_error *err);
/* Walk and compare, window by window. */
int qcow2_count_all(struct qcow2_check *c, unsigned fix, struct dr_error *err);

/* check-copied.c: report wrong bits, or correct them. */
int qcow2_check_copied(struct qcow2_check *c, bool fix, struct dr_error *err);

/* check-split.c; the counts are right as far as they go, and nothing of the file is in the page
 * cache. */
int qcow2_split_crowded(struct qcow2_check *c, struct dr_error *err);

/* check-rebuild.c */
int qcow2_rebuild(struct qcow2_check *c, struct dr_error *err);

#endif
