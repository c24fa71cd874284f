/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Checksums over the data of an archive, which the format lacks: a side file, ARCHIVE.sums, with an
 * xxh3-128 for each cluster of each disk (over its 65536 bytes, zeros behind the disk's end) and
 * for each disk. docs/formats/vma-sums.md has its bytes. Sparse: clusters of zeros take no space.
 */
#ifndef DR_ARCHIVE_SUMS_H
#define DR_ARCHIVE_SUMS_H

#include "archive/vma-format.h"
#include "storage/storage.h"

struct vma_sums;

struct vma_sum {
    uint64_t low, high;
};

/* Of one cluster's 65536 bytes; never {0, 0}, which means: no sum recorded / all zeros. */
struct vma_sum vma_sum_of(const uint8_t *cluster);

/* ---- writing: may be called from many threads for different clusters; memory is bounded. */
/* Into an empty file that is open for writing. It should have the owner and mode of the archive:
 * checksums reveal something of the data they were made from. */
int vma_sums_create(struct dr_file *file, const struct dr_vma_header *header,
                    struct vma_sums **sums, struct dr_error *err);
int vma_sums_put(struct vma_sums *s, unsigned id, uint32_t cluster, struct vma_sum sum,
                 struct dr_error *err);
/* The same for n clusters in a row; {0, 0} for those that are all zeros. One write. */
int vma_sums_put_run(struct vma_sums *s, unsigned id, uint32_t cluster, const struct vma_sum *sums,
                     size_t n, struct dr_error *err);
/* Complete it (sums of disks) and make it durable (unless the file is NO_FLUSH). */
int vma_sums_finish(struct vma_sums *s, struct dr_error *err);

/* ---- reading: any threads. -ENOENT: no such file; -ESTALE: it is another archive's; -EINVAL: it
 * is no such file or damaged itself (all of it is checked here). */
int vma_sums_open(struct dr_fs *fs, const char *path, const struct dr_vma_header *header,
                  struct vma_sums **sums, struct dr_error *err);
/* *known false: a cluster of zeros, which has none (also if the archive stores its blocks). */
int vma_sums_get(struct vma_sums *s, unsigned id, uint32_t cluster, struct vma_sum *sum,
                 bool *known, struct dr_error *err);
void vma_sums_close(struct vma_sums *s); /* NULL allowed */

/* Is there such a file at path, of whatever archive? */
bool vma_sums_is(struct dr_fs *fs, const char *path);

#endif
