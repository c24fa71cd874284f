/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sparse extent of ESX (magic COWD, extent type VMFSSPARSE): one directory, whose tables of
 * 4096 entries are made when the first grain of each is written, and a count of the sectors that
 * are taken. Files of this folder only. */
#ifndef DR_FORMATS_VMDK_COWD_H
#define DR_FORMATS_VMDK_COWD_H

#include "formats/vmdk/vmdk.h"

#define VMDK_COWD_HEADER     2048u /* bytes */
#define VMDK_COWD_GTES       4096u
#define VMDK_COWD_TABLE      (VMDK_COWD_GTES * 4) /* bytes */
#define VMDK_COWD_MAX_GRAIN  2048u                /* sectors: 1 MiB */
#define VMDK_COWD_MAX_SECTOR UINT64_C(0xffffffff) /* of a disk, and of a file */
#define VMDK_COWD_NAME_LEN   1024u                /* of the parent's name in the header */

/* What a header says of the parent. ESX leaves that to the descriptor. */
struct vmdk_cowd_origin {
    bool child;
    char parent[VMDK_COWD_NAME_LEN + 1]; /* "": none, or of a child one that is not told */
    uint32_t parent_generation, generation;
};

/* Decode and check a header; file_size in bytes. -EINVAL, -ENOTSUP. */
int vmdk_cowd_decode(struct vmdk_header *h, const char *where, const uint8_t buf[VMDK_COWD_HEADER],
                     uint64_t file_size, struct dr_error *err);
void vmdk_cowd_origin(const uint8_t buf[VMDK_COWD_HEADER], struct vmdk_cowd_origin *origin);
/* Read the header of f and decode it. origin: NULL, or what it says of the parent. */
int vmdk_cowd_read(struct vmdk_header *h, const char *where, struct dr_file *f,
                   struct vmdk_cowd_origin *origin, struct dr_error *err);

/* A new extent: header and an empty directory. -EFBIG. */
int vmdk_cowd_layout(struct vmdk_header *h, const char *where, uint64_t capacity,
                     struct dr_error *err);
/* Write it into the empty file f, durably, the header last. */
int vmdk_cowd_write_new(struct dr_file *f, const struct vmdk_header *h, struct dr_error *err);

/* Allocation. [page], image->lock. */

/* So many sectors behind all others; the header counts them as taken before anything can lead to
 * them. -ENOSPC: the file would pass 2 TiB. */
int vmdk_cowd_take(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                   uint32_t *sector, struct dr_error *err);
/* e->next is known. */
void vmdk_cowd_find_next(const struct dr_image *image, struct vmdk_extent *e);
/* Make the table that is missing. */
int vmdk_cowd_make_table(struct dr_image *image, struct vmdk_extent *e, uint64_t table,
                         struct dr_error *err);

/* With the file, past the page cache; no write is in flight. */

int vmdk_cowd_mark(struct dr_image *image, struct vmdk_extent *e, bool unclean,
                   struct dr_error *err);
/* The mark of an inconsistent extent is taken back; the caller flushes. */
int vmdk_cowd_consistent(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
/* The header's count becomes `sector`; the caller flushes. */
int vmdk_cowd_set_free(struct dr_image *image, struct vmdk_extent *e, uint64_t sector,
                       struct dr_error *err);
/* What vmdk_tidy does has been done: the count follows. */
int vmdk_cowd_settle(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
/* The sector behind the last thing that anything points to. strict: -EIO where an entry leads
 * nowhere. */
int vmdk_cowd_used_end(struct dr_image *image, const struct vmdk_extent *e, bool strict,
                       uint64_t *end, struct dr_error *err);
int vmdk_cowd_recover(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
int vmdk_cowd_trim(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
int vmdk_cowd_check(struct dr_image *image, struct vmdk_extent *e, unsigned fix,
                    struct dr_check_result *result, struct dr_error *err);

/* Another size. A header for so many sectors: a smaller disk has fewer tables. -EFBIG. */
int vmdk_cowd_resized(struct vmdk_header *h, const char *where, uint64_t capacity,
                      struct dr_error *err);
/* The header on disk gets its size, the length of its directory and its count, in one write,
 * durably. */
int vmdk_cowd_switch(struct dr_image *image, struct vmdk_extent *e, const struct vmdk_header *n,
                     struct dr_error *err);
/* cowd-resize.c: vmdk_set_capacity, vmdk_clear_behind and vmdk_mask of a COWD extent. */
int vmdk_cowd_set_capacity(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                           struct dr_error *err);
int vmdk_cowd_clear_behind(struct dr_image *image, struct vmdk_extent *e, uint64_t was, bool give,
                           struct dr_error *err);
int vmdk_cowd_mask(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t to,
                   struct dr_error *err);

/* bare.c: an extent without its descriptor. A text that stands for it becomes that of the image.
 */
int vmdk_open_bare(struct dr_image *image, enum vmdk_magic magic, struct vmdk_header *h,
                   struct dr_error *err);

#endif
