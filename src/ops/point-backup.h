/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A backup into an image that is there, or a new one, in QEMU's manner: all of a disk, its active
 * image alone, what a bitmap has, or only what the guest is about to change, as it was at one
 * instant.
 *
 *     dr_point_begin      claim the disk, open the target, read what is stored of the bitmap
 *     dr_point_now_quiet  the instant, while the disk's requests wait
 *     dr_point_run        copy, make the target durable, hand the bitmap on
 *
 * While it runs, the bitmap goes on noting what it did before. A second set of bits, the successor,
 * notes what changes from the instant on. When the target is durable, the bitmap gets the bits of
 * the successor in one step. So whatever is interrupted, it has at least what is not in the target
 * yet. With `always` a failed backup hands on, too: the successor gets what was not written. */
#ifndef DR_OPS_POINT_BACKUP_H
#define DR_OPS_POINT_BACKUP_H

#include "drover/backup.h"
#include "ops/memory-bitmaps.h"

enum dr_point_sync { DR_POINT_FULL, DR_POINT_TOP, DR_POINT_NONE, DR_POINT_BITMAP };
enum dr_point_mode { DR_POINT_NEVER, DR_POINT_ON_SUCCESS, DR_POINT_ALWAYS };

/* The strings are copied. */
struct dr_point_order {
    struct dr_disk *disk;
    const char *target, *format;
    struct dr_open_options open; /* of the target: flags and allow_paths */
    bool made; /* the target is made by this, of the disk's size, and has its name when it is
                  complete */
    enum dr_point_sync sync;
    const char *bitmap; /* of the active image, or NULL */
    bool stored;        /* it is the image's; else it is one of memory */
    bool late; /* it is read at the instant: it changes, or comes into being, just before */
    struct dr_memory_bitmaps *memory;
    enum dr_point_mode mode;
    struct dr_backup_spill spill;
};

struct dr_point;

/* -EINVAL: the target has another size. The disk is claimed until dr_point_run or dr_point_free. */
int dr_point_begin(struct dr_point **p, const struct dr_point_order *order, struct dr_error *err);
/* In a step of dr_disk_quiesce or dr_disk_exchange. Afterwards its caller lends the disk. */
int dr_point_now_quiet(struct dr_point *p, struct dr_chain *present, struct dr_error *err);
/* The same of one disk, which it holds up. */
int dr_point_now(struct dr_point *p, struct dr_error *err);
/* Before dr_point_run: it succeeds or fails with others. keep_step is called when the target is
 * durable, and again when it has its name; it waits for the others. Other than 0: one of them has
 * failed, and this one fails, too. */
void dr_point_together(struct dr_point *p, int (*keep_step)(void *user), void *user);
/* Once, after the instant. */
int dr_point_run(struct dr_point *p, struct dr_job *job, struct dr_error *err);
void dr_point_free(struct dr_point *p); /* NULL allowed */
/* Does it use this bitmap? NULL allowed for p. */
bool dr_point_uses(const struct dr_point *p, const struct dr_disk *disk, const char *image,
                   const char *bitmap);

#endif
