/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* dr_vma_create on any file system, for tests on a made one. */
#ifndef DR_ARCHIVE_VMA_WRITE_H
#define DR_ARCHIVE_VMA_WRITE_H

#include "drover/vma.h"
#include "storage/storage.h"

/* fs: of the archive and its checksums; the disks bring their own. */
int dr_vma_create_fs(struct dr_fs *fs, const char *path,
                     const struct dr_vma_create_options *options, struct dr_job *job,
                     struct dr_vma_create_result *result, struct dr_error *err);

#endif
