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
    uint64_t host; /* of the first stored block, if there is one */
};

/* Read the header of the archive whose plain bytes file has; two requests. End with
 * vma_header_free. warn may be NULL. */
int vma_index_header(struct dr_file *file, struct dr_vma_header *header,
                     void (*warn)(void *user, const char *text), void *user, struct dr_error *err);

/* file: the plain bytes. Checks all that headers can show: broken extents, unknown disks, clusters
 * out of range, duplicates, missing clusters (one message that counts and names the first).
 * -EBADMSG. Memory follows the extents that are really there, not the sizes they claim: at most 8
 * bytes a slot that the archive's length has room for. The state of a running machine
 * (disks[].vmstate) is checked as far as its extents go and not kept. job may be NULL. */
int vma_index_build(struct dr_file *file, const struct dr_vma_header *header, struct dr_job *job,
                    struct vma_index **index, struct dr_error *err);
void vma_index_free(struct vma_index *index); /* NULL allowed */

/* Any threads. cluster < vma_clusters(size of the disk). */
struct vma_place vma_index_find(const struct vma_index *index, unsigned id, uint32_t cluster);

/* Side file: path; validated against the archive's header, length, time and last extent. It gets
 * its name when it is complete. -ESTALE: not this archive's. -ENOENT: there is none. */
int vma_index_save(const struct vma_index *index, struct dr_fs *fs, const char *path,
                   struct dr_file *archive, const struct dr_vma_header *header,
                   struct dr_error *err);
int vma_index_load(struct dr_fs *fs, const char *path, struct dr_file *archive,
                   const struct dr_vma_header *header, struct vma_index **index,
                   struct dr_error *err);

/* The side file's usual path: the archive's, with ".idx" behind. malloc'ed, NULL = out of memory.
 */
char *vma_index_path(const char *archive);

/* ------------------------------------------------------------------ for the side file's code */

/* Room for the header's disks, nothing present. -EBADMSG: an archive of size bytes cannot hold the
 * clusters that the header promises. */
int vma_index_new(const struct dr_vma_header *header, const char *name, uint64_t size,
                  struct vma_index **index, struct dr_error *err);
/* Clusters [first, first+n) have this mask and the first one's data stands at host, the others'
 * right behind it; with mask 0 they are zeros. -EEXIST: one was there already: *first is it.
 * -ERANGE: host cannot be. -ENOMEM. All without a text. */
int vma_index_put(struct vma_index *index, unsigned id, uint64_t *first, uint64_t n, uint16_t mask,
                  uint64_t host);
/* Everything present? */
int vma_index_check(const struct vma_index *index, const struct dr_vma_header *header,
                    const char *name, struct dr_error *err);
/* Where the last extent stands; 0 = there is none. */
uint64_t vma_index_last(const struct vma_index *index);
void vma_index_set_last(struct vma_index *index, uint64_t off);

#endif
