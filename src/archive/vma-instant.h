/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The extents of an archive of disks in use: what they hold at one instant of the run, while other
 * threads go on changing them (ops/backup-copy.h).
 *
 * Clusters come in the order in which they are read: the job reads one disk after the other, and
 * before a guest changes a cluster that was not read yet, that one is read and added. Clusters of
 * zeros come last, those of all disks together: which ones they are is known only then. */
#ifndef DR_ARCHIVE_VMA_INSTANT_H
#define DR_ARCHIVE_VMA_INSTANT_H

#include "archive/sums.h"
#include "archive/vma-output.h"

struct vma_instant {
    const struct dr_vma_create_options *options;
    const struct dr_vma_header *header; /* its disks are those of the options, in their order */
    struct vma_output *out;
    struct vma_frames *frames; /* NULL = not compressed */
    struct vma_sums *sums;     /* NULL = none */
    struct dr_job *job;
    struct dr_fs *fs;                   /* of a spill file */
    struct dr_vma_disk_result *results; /* one for each disk */
};

/* The disks are claimed. */
int vma_instant_run(const struct vma_instant *x, struct dr_error *err);

#endif
