/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The extents of a new archive: all clusters of all disks, in ascending order, read and packed by
 * many threads and written by one at a time. */
#ifndef DR_ARCHIVE_VMA_EXTENTS_H
#define DR_ARCHIVE_VMA_EXTENTS_H

#include "archive/sums.h"
#include "archive/vma-output.h"
#include "ops/backup-sums.h"
#include "ops/stock.h"

struct vma_member {
    const struct dr_vma_disk *disk;
    struct dr_chain *chain; /* NULL: a stream, read from fd */
    int fd;
    uint64_t zero_bytes;   /* result: of the disk, not stored */
    struct dr_sums digest; /* of the disk, if its table is there */
};

struct vma_plan;

struct vma_extents {
    struct vma_member *members; /* in the order of the archive, streams first */
    size_t n;
    const uint8_t *uuid;
    struct vma_output *out;
    struct vma_frames *frames; /* NULL = not compressed */
    struct vma_sums *sums;     /* NULL = none */
    struct dr_job *job;
    uint64_t *zeros; /* the sum of all zero_bytes so far, for who shows progress; or NULL */

    /* of the run */
    size_t at;        /* of next: member and cluster */
    uint64_t cluster; /* up to 2^32 */
    struct dr_walk walk;
    bool walking;   /* walk belongs to the member at hand */
    bool wrote;     /* an extent */
    uint64_t total; /* bytes, for progress */
    pthread_mutex_t lock;
    struct vma_plan *plans, *idle; /* all of them, those in no item; under lock */
};

int vma_extents_run(struct vma_extents *x, struct dr_error *err);

#endif
