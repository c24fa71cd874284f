/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where each cluster of each disk stands in an archive that can be read at random. Built by one
 * pass over the extent headers, never the data; or loaded from a side file. */
#ifndef DR_ARCHIVE_VMA_INDEX_H
#define DR_ARCHIVE_VMA_INDEX_H

#include "archive/vma-format.h"
#include "storage/storage.h"

struct vma_index;

struct vma_place {
    bool present;  /* an extent has this cluster */
    uint16_t mask; /* blocks that are stored; the others are zeros */
    uint64_t host; /* of the first stored block */
};

/* file: the plain bytes. Checks all that headers can show: broken extents, unknown disks, clusters
 * out of range, duplicates, missing clusters (one message that counts and names the first). Memory
 * follows the extents that are really there, not the sizes they claim. job may be NULL. */
int vma_index_build(struct dr_file *file, const struct dr_vma_header *header,
                    const struct dr_job *job, struct vma_index **index, struct dr_error *err);
void vma_index_free(struct vma_index *index); /* NULL allowed */

/* Any threads. cluster < vma_clusters(size of the disk). */
struct vma_place vma_index_find(const struct vma_index *index, unsigned id, uint32_t cluster);

/* Side file: path; validated against the archive's header, size and time. -ESTALE: not this one's.
 */
int vma_index_save(const struct vma_index *index, struct dr_fs *fs, const char *path,
                   struct dr_file *archive, const struct dr_vma_header *header,
                   struct dr_error *err);
int vma_index_load(struct dr_fs *fs, const char *path, struct dr_file *archive,
                   const struct dr_vma_header *header, struct vma_index **index,
                   struct dr_error *err);

#endif
