/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files about bitmaps beside an image share.
 *
 *   bitmaps.c          trust, noting changes, asking
 *   bitmaps-change.c   add, remove, clear, enable, disable, merge, rebuild
 *   bitmap-file.c      the file, byte by byte */
#ifndef DR_CORE_BITMAPS_INTERNAL_H
#define DR_CORE_BITMAPS_INTERNAL_H

#include "core/bitmap-file.h"
#include "core/internal.h"

/* While the image is written to. The list of bitmaps changes only while nobody writes, too. */
struct dr_noting {
    struct dr_bitmap_file file;
    struct dr_marks marks; /* what changed since the bitmaps were stored, as fine as the finest */
    bool marking;          /* an enabled bitmap wants to know */
};

/* All of these with begin_lock held, where the image is in other threads' hands. */

/* NULL: out of memory. */
struct dr_noting *dr_noting_new(void);
void dr_noting_free(struct dr_noting *n); /* may be NULL */
/* Empty marks for the enabled bitmaps of the list, and of another one. -ENOMEM: all of the disk
 * counts as changed. Nobody writes to the image. */
int dr_noting_marks(struct dr_noting *n, uint64_t size, const struct dr_noted *also,
                    uint32_t n_also);
/* What was noted so far goes into the enabled bitmaps, and stays noted. */
void dr_noting_put(const struct dr_image *image, struct dr_noting *n);

/* Load the file of bitmaps, which nobody of this process has in use, and see which can be trusted.
 * -ENOENT: there is none, b->path says where it would be. */
int dr_bitmaps_load(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err);
void dr_bitmaps_distrust(struct dr_bitmap_file *b, enum dr_distrust why);
/* The files of the image, on which nothing is under way, and the bitmaps go together: store both.
 */
int dr_bitmaps_store_clean(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err);
/* NULL, or why the image can have no file of bitmaps. */
const char *dr_bitmaps_no_place(const struct dr_image *image);
/* -EUCLEAN: the bitmap is inconsistent. */
int dr_bitmaps_unusable(const char *name, struct dr_error *err);
/* May the bitmaps take so many bytes together? */
int dr_bitmaps_check_bytes(const struct dr_image *image, uint64_t bytes, struct dr_error *err);
/* Bytes of bits for a disk of that size, a bit for 1 << bits bytes. */
uint64_t dr_bitmaps_bytes(uint64_t size, unsigned bits);
/* A callback: the range becomes set in the struct dr_marks. */
int dr_bitmaps_set_range(void *user, uint64_t off, uint64_t len);

#endif
