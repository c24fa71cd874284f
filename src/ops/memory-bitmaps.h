/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps of an open disk that are kept in memory, and end with it.
 *
 * Each belongs to one image of the disk's chain and notes what the guest changes while that image
 * is the active one. One hook of the disk serves all of them; a change is noted under the lock of
 * the units that change, before the guest is told.
 *
 * While another image is the active one, a bitmap that notes changes cannot see what becomes of its
 * image: an overlay may be committed into it. When its image becomes the active one again, the
 * bitmap counts as all set. So a bitmap may say too much, and never too little.
 *
 * Lists and bits change only while no request is past the disk's gate. Those who read them are past
 * it, or have closed it. So there is no lock. */
#ifndef DR_OPS_MEMORY_BITMAPS_H
#define DR_OPS_MEMORY_BITMAPS_H

#include "core/core.h"
#include "core/marks.h"

#define DR_MEMORY_BITMAP_NAME 1023 /* bytes, as inside a qcow2 */

struct dr_memory_bitmaps;

struct dr_memory_bitmap_info {
    const char *name, *image; /* image: the path of the one that it belongs to */
    uint64_t granularity;
    uint64_t dirty; /* bytes, in whole granules */
    bool enabled;
};

/* NULL: out of memory. The disk must outlive it. */
struct dr_memory_bitmaps *dr_memory_bitmaps_new(struct dr_disk *disk);
void dr_memory_bitmaps_free(struct dr_memory_bitmaps *set); /* NULL allowed */

/* The texts are QEMU's. -EEXIST; granularity: a power of 2, at least 512. These close the gate. */
int dr_memory_bitmap_add(struct dr_memory_bitmaps *set, const char *image, const char *name,
                         uint64_t granularity, bool enabled, struct dr_error *err);
/* As dr_disk_bitmap_change, but for ADD. ranges: of MERGE, what is set, too; of CLEAR, what is set
 * afterwards (NULL: nothing). It is read with the gate closed. -ENOENT. */
int dr_memory_bitmap_change(struct dr_memory_bitmaps *set, const char *image, const char *name,
                            enum dr_bitmap_action action, const struct dr_marks *ranges,
                            struct dr_error *err);
/* The same two in a step of dr_disk_quiesce or dr_disk_exchange: the gate is closed already. */
int dr_memory_bitmap_add_quiet(struct dr_memory_bitmaps *set, const char *image, const char *name,
                               uint64_t granularity, bool enabled, struct dr_error *err);
int dr_memory_bitmap_change_quiet(struct dr_memory_bitmaps *set, const char *image,
                                  const char *name, enum dr_bitmap_action action,
                                  const struct dr_marks *ranges, struct dr_error *err);
/* Images have left the disk's chain: their bitmaps go. set may be NULL. */
void dr_memory_bitmaps_prune(struct dr_memory_bitmaps *set);

/* The rest is for callers past the disk's gate, or that have closed it. set may be NULL. */

bool dr_memory_bitmap_has(const struct dr_memory_bitmaps *set, const char *image, const char *name);
/* Those of the image, the newest first. A result other than 0 ends it and becomes its result. */
int dr_memory_bitmaps_each(const struct dr_memory_bitmaps *set, const char *image,
                           int (*each)(void *user, const struct dr_memory_bitmap_info *info),
                           void *user);
/* Its bits, added to those of into, which covers the disk. *enabled: it notes changes. -ENOENT. */
int dr_memory_bitmap_read(const struct dr_memory_bitmaps *set, const char *image, const char *name,
                          struct dr_marks *into, bool *enabled);
/* The disk is about to go on with the image at this path, or was about to. */
void dr_memory_bitmaps_moved(struct dr_memory_bitmaps *set, const char *image);

#endif
