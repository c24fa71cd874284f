/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which clusters of a disk an archive has shown so far: a bitmap in pages that come as they are
 * touched. Disks may claim 2^32 clusters each; memory follows what extents really name. */
#ifndef DR_ARCHIVE_VMA_SEEN_H
#define DR_ARCHIVE_VMA_SEEN_H

#include <stdbool.h>
#include <stdint.h>

#define VMA_SEEN_TOP  256u   /* directories of a disk */
#define VMA_SEEN_DIR  512u   /* pages of a directory */
#define VMA_SEEN_PAGE 32768u /* clusters of a page: 4 KiB */

struct vma_seen_dir {
    uint64_t *pages[VMA_SEEN_DIR];
};

struct vma_seen {
    struct vma_seen_dir *dirs[VMA_SEEN_TOP];
};

/* Shared by the disks of an archive. An honest archive needs about an eighth of a byte a cluster,
 * one that names clusters far apart 8 KiB each: the allowance is what the largest disks of today
 * need when they come in any order, and grows with the archive. */
#define VMA_SEEN_FREE (256u << 20)
struct vma_seen_budget {
    uint64_t used, clusters;
};

/* 1 = it was there before, 0 = it is new, -ENOMEM, -E2BIG = over the budget. */
int vma_seen_add(struct vma_seen *s, uint32_t cluster, struct vma_seen_budget *budget);
/* The first run in [from, end) of clusters not seen; false = all were. */
bool vma_seen_gap(const struct vma_seen *s, uint64_t from, uint64_t end, uint64_t *first,
                  uint64_t *n);
void vma_seen_free(struct vma_seen *s);

#endif
