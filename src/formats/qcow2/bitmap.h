/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps that an image keeps: which parts of the disk were written to since some moment.
 *
 *   bitmap-dir.c     reading the directory
 *   bitmap-bits.c    reading and setting bits
 *   bitmap-edit.c    putting another directory in the place of the present one
 *   bitmap-change.c  add, remove, clear, enable, disable, merge
 *   bitmap-live.c    add and remove while the disk is written to
 *   bitmap-track.c   keeping the enabled ones right while the disk is written to
 *
 *   header extension ─► directory ─► a table for each bitmap ─► clusters of bits
 *
 * A table entry leads to a cluster of bits, or says that all of them are 0 or all are 1. Bit i
 * stands for the bytes [i << granularity_bits, (i + 1) << granularity_bits) of the disk; the first
 * is the lowest bit of the first byte. */
#ifndef DR_FORMATS_QCOW2_BITMAP_H
#define DR_FORMATS_QCOW2_BITMAP_H

#include "formats/qcow2/qcow2.h"

enum {
    QCOW2_BITMAP_IN_USE = 1,     /* a writer did not store it: what it says is not to be trusted */
    QCOW2_BITMAP_AUTO = 2,       /* enabled: whoever writes to the disk sets bits */
    QCOW2_BITMAP_COMPATIBLE = 4, /* usable by those who do not know its extra data */
    QCOW2_BITMAP_FLAGS = 7
};

#define QCOW2_BITMAP_ENTRY     24u /* bytes of an entry of the directory before the extra data */
#define QCOW2_BITMAP_AT_FLAGS  12u
#define QCOW2_BITMAP_MIN_BITS  9u /* granularity */
#define QCOW2_BITMAP_MAX_BITS  31u
#define QCOW2_MAX_BITMAP_NAME  1023u
#define QCOW2_MAX_BITMAP_TABLE (UINT64_C(1) << 27)   /* entries (QEMU's) */
#define QCOW2_MAX_BITMAP_BYTES (UINT64_C(512) << 20) /* bytes of bits (QEMU's) */
#define QCOW2_BITMAP_ALL       UINT64_C(1)           /* table entry: all bits are 1 */

struct qcow2_bitmap {
    size_t at, len; /* its entry in the directory */
    uint64_t table_at;
    uint32_t entries; /* of its table */
    uint32_t flags, extra;
    unsigned type, granularity_bits, name_len;
};

struct qcow2_bitmaps {
    uint8_t *bytes; /* the directory */
    size_t len;
    struct qcow2_bitmap *list;
    uint32_t n;
};

/* ------------------------------------------------------------------ bitmap-dir.c */

/* The fixed part of an entry; at and len are not set by it. */
void qcow2_bitmap_decode(const uint8_t *raw, struct qcow2_bitmap *b);
uint64_t qcow2_bitmap_entry_len(const struct qcow2_bitmap *b);
/* NULL, or why the entry cannot be right. */
const char *qcow2_bitmap_problem(const struct dr_image *image, const struct qcow2_bitmap *b);
/* Entries that the table of a bitmap for `size` bytes of disk has. */
uint64_t qcow2_bitmap_entries(const struct qcow2 *q, uint64_t size, unsigned granularity_bits);
/* Read and check the directory; of an image without bitmaps it is empty. A directory that cannot be
 * right: -EIO, naming the byte. Ends with qcow2_bitmaps_free, also after a failure. */
int qcow2_bitmaps_load(struct dr_image *image, struct qcow2_bitmaps *t, struct dr_error *err);
void qcow2_bitmaps_free(struct qcow2_bitmaps *t);
#define CLEANUP_BITMAPS __attribute__((cleanup(qcow2_bitmaps_free)))

/* Not terminated: b->name_len bytes. */
static inline const char *qcow2_bitmap_name(const struct qcow2_bitmaps *t,
                                            const struct qcow2_bitmap *b)
{
    return (const char *)t->bytes + b->at + QCOW2_BITMAP_ENTRY + b->extra;
}
/* NULL: there is none of that name. */
struct qcow2_bitmap *qcow2_bitmaps_find(const struct qcow2_bitmaps *t, const char *name);
/* Bytes that copies of the image's bitmaps take in a qcow2 file with such clusters, as QEMU counts
 * them. image: of any format, or NULL. */
int qcow2_measure_bitmaps(struct dr_image *image, uint64_t cluster, struct dr_cost *cost,
                          struct dr_error *err);
/* It has extra data that only a program which knows it may use. */
static inline bool qcow2_bitmap_foreign(const struct qcow2_bitmap *b)
{
    return b->extra && !(b->flags & QCOW2_BITMAP_COMPATIBLE);
}

/* ------------------------------------------------------------------ bitmap-bits.c */

struct qcow2_place {
    uint64_t at, len;
};
struct qcow2_places {
    struct qcow2_place *list;
    size_t n, room;
};
/* 0 or -ENOMEM. */
int qcow2_places_add(struct qcow2_places *p, uint64_t at, uint64_t len);
/* Nothing durable leads to them any more: give them up. The list is empty on success. */
int qcow2_places_lose(struct dr_image *image, struct qcow2_places *p, struct dr_error *err);
void qcow2_places_free(struct qcow2_places *p);

/* qcow2_count with the pages loaded as needed; no lock is held. */
int qcow2_count_now(struct dr_image *image, uint64_t at, uint64_t *count, struct dr_error *err);
/* The entries of its table, malloc'ed. -EIO: one leads nowhere. */
int qcow2_bitmap_load_table(struct dr_image *image, const struct qcow2_bitmap *b, uint64_t **table,
                            struct dr_error *err);

/* Call fn for each range of a disk of `size` bytes whose bits are set: ascending, and never two
 * that touch. */
int qcow2_bitmap_each_dirty(struct dr_image *image, const struct qcow2_bitmap *b, uint64_t size,
                            dr_bitmap_dirty fn, void *user, struct dr_error *err);

/* More bits of a bitmap, with one cluster of them in memory. */
struct qcow2_bits {
    struct dr_image *image;
    struct qcow2_bitmap bitmap;
    bool in_place;                   /* the bitmap is in use: its clusters may be overwritten */
    uint64_t covers;                 /* bytes of the disk that a cluster of bits stands for */
    uint64_t *table;                 /* as it is to be */
    bool table_changed;              /* and has to be written */
    uint8_t *bits;                   /* of one cluster ... */
    uint64_t index;                  /* ... this one; UINT64_MAX: none */
    bool changed;                    /* and has to be stored */
    struct qcow2_places taken, left; /* clusters that only the new / only the old table leads to */
    struct dr_error *err;            /* the caller's, for a callback */
};
/* Ends with qcow2_bits_close, also after a failure. */
int qcow2_bits_open(struct qcow2_bits *s, struct dr_image *image, const struct qcow2_bitmap *b,
                    bool in_place, struct dr_error *err);
/* Of a bitmap that has no table yet, but will have one of so many entries, all of them 0. */
int qcow2_bits_open_new(struct qcow2_bits *s, struct dr_image *image, const struct qcow2_bitmap *b,
                        uint64_t entries, struct dr_error *err);
int qcow2_bits_set(struct qcow2_bits *s, uint64_t off, uint64_t len, struct dr_error *err);
/* Clear what is behind the end of a disk of that size, and store it. */
int qcow2_bits_cut(struct qcow2_bits *s, uint64_t size, struct dr_error *err);
/* Write the cluster at hand to the file; last of all. The table is the caller's to write. */
int qcow2_bits_store(struct qcow2_bits *s, struct dr_error *err);
void qcow2_bits_close(struct qcow2_bits *s);

/* ------------------------------------------------------------------ bitmap-edit.c; the caller sees
 * to it that only one thread at a time changes the bitmaps */

struct qcow2_bitmap_draft {
    struct qcow2_bitmap b; /* as it is on disk; of a new one what is known so far */
    uint8_t *raw;          /* its entry as it is to be, b.len bytes */
    uint64_t *table;       /* its next table, or NULL: it keeps the present one */
    uint64_t entries;
};
struct qcow2_bitmap_edit {
    struct dr_image *image;
    struct qcow2_bitmaps old;
    struct qcow2_bitmap_draft *list; /* the bitmaps as they are to be */
    uint32_t n;
    struct qcow2_places taken, left; /* that only the new directory / only the old one leads to */
    bool live;                       /* others write to the image: lock them out of its header */
    bool switched; /* the new directory is in force, also when what came after that failed */
};
/* Ends with qcow2_edit_end, also after a failure. Who does not commit gives up what is taken. */
int qcow2_edit_begin(struct qcow2_bitmap_edit *e, struct dr_image *image, struct dr_error *err);
void qcow2_edit_end(struct qcow2_bitmap_edit *e);
/* NULL: there is none. Before any is added or removed. */
struct qcow2_bitmap_draft *qcow2_edit_find(struct qcow2_bitmap_edit *e, const char *name);
/* One at most; it needs a table. NULL: out of memory. */
struct qcow2_bitmap_draft *qcow2_edit_add(struct qcow2_bitmap_edit *e, const char *name,
                                          unsigned granularity_bits);
int qcow2_edit_remove(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d,
                      struct dr_error *err);
/* Give it this table, malloc'ed, which is taken over also after a failure. Clusters that the
 * present table does not have are in e->taken, by qcow2_edit_taken. */
int qcow2_edit_table(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d, uint64_t *table,
                     uint64_t entries, struct dr_error *err);
int qcow2_edit_taken(struct qcow2_bitmap_edit *e, struct qcow2_bits *bits, struct dr_error *err);
void qcow2_draft_flags(struct qcow2_bitmap_draft *d, uint32_t flags);
/* Make it the image's, durably but for what is given up. A failure leaves the old ones. */
int qcow2_edit_commit(struct qcow2_bitmap_edit *e, struct dr_error *err);

/* ------------------------------------------------------------------ bitmap-change.c */

/* Of the drafts: -EEXIST, -ENOENT and what else makes it impossible. */
int qcow2_edit_change(struct qcow2_bitmap_edit *e, const struct dr_bitmap_change *c,
                      struct dr_error *err);

/* ------------------------------------------------------------------ bitmap-track.c */

/* From now on what changes goes into the enabled bitmaps; they are marked as in use, durably. Does
 * nothing where there are none or that was done. -EIO, -ENOTSUP: one cannot be kept right. */
int qcow2_track_begin(struct dr_image *image, struct dr_error *err);
/* Store what has changed. Nobody writes meanwhile. After a failure they stay in use. */
int qcow2_track_end(struct dr_image *image, struct dr_error *err);
void qcow2_track_forget(struct dr_image *image);
/* May the disk get this size? Not where a bitmap is inconsistent, or would be too large. */
int qcow2_track_check(struct dr_image *image, uint64_t size, struct dr_error *err);
/* Before the disk gets another size: all bitmaps are marked as in use. Refuses where one is
 * inconsistent, or would be too large. */
int qcow2_track_all(struct dr_image *image, uint64_t size, struct dr_error *err);
/* The disk has another size: so have the bitmaps. */
int qcow2_track_resize(struct dr_image *image, struct dr_error *err);
/* All of the disk counts as changed. */
void qcow2_track_everything(struct dr_image *image);
/* The i-th bitmap of the directory is in use by us, who note all that changes. */
bool qcow2_track_has(const struct dr_image *image, uint32_t i);
/* Marks are noted, or there is no enabled bitmap, and nothing has gone wrong with them. */
bool qcow2_track_is_sound(const struct dr_image *image);
/* What notes marks once the edit is the image's directory: for the same bitmaps as now, as far as
 * they are still there, and for `added`, the last one, if it is enabled. With added all of them
 * begin with no marks. NULL: out of memory. */
struct qcow2_track *qcow2_track_next(const struct qcow2_bitmap_edit *e,
                                     const struct qcow2_bitmap_draft *added, uint32_t removed);
/* It takes the place of the present one, in dr_image_quietly(); that is returned. */
struct qcow2_track *qcow2_track_exchange(struct dr_image *image, struct qcow2_track *next);
/* Store what t noted in the bitmaps it has. After a failure it is noted for all that there are. */
int qcow2_track_store(struct dr_image *image, const struct qcow2_track *t, struct dr_error *err);
void qcow2_track_free(struct qcow2_track *t);

/* ------------------------------------------------------------------ the callbacks */

bool qcow2_bitmaps_inside(const struct dr_image *image);
int qcow2_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                      struct dr_error *err);
int qcow2_bitmap_read(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                      struct dr_error *err);
int qcow2_bitmap_stored(struct dr_image *image, const char *name, dr_bitmap_dirty each, void *user,
                        bool *enabled, struct dr_error *err);
const struct dr_marks *qcow2_bitmap_noted(const struct dr_image *image);
int qcow2_bitmap_change(struct dr_image *image, const struct dr_bitmap_change *change,
                        struct dr_error *err);
int qcow2_bitmap_change_live(struct dr_image *image, const struct dr_bitmap_change *change,
                             struct dr_error *err);
void qcow2_changed(struct dr_image *image, uint64_t off, uint64_t len);

#endif
