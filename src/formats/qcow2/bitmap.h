/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps that an image keeps: which parts of the disk were written to since some moment.
 *
 *   bitmap-dir.c   reading the directory
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

/* ------------------------------------------------------------------ the callbacks */

int qcow2_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                      struct dr_error *err);

#endif
