/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The hosted sparse extent's header (magic KDMV) and the geometry that follows from it. Pure: no
 * I/O. Sectors are 512 bytes; bytes where a name says so. */
#ifndef DR_FORMATS_VMDK_HEADER_H
#define DR_FORMATS_VMDK_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "drover/drover.h"

#define VMDK_SECTOR        512u
#define VMDK_HEADER_SIZE   512u
#define VMDK_VERSION_AT    4 /* byte offsets in the header, for changes in place */
#define VMDK_CAPACITY_AT   12
#define VMDK_RGD_AT        48 /* the redundant directory, the directory, the overhead */
#define VMDK_UNCLEAN_AT    72
#define VMDK_DESC_SECTORS  20u /* reserved for an embedded descriptor in what we create */
#define VMDK_DEFAULT_GRAIN 128u
#define VMDK_GTES          512u
#define VMDK_GD_AT_END     UINT64_MAX /* as gd_off: a footer says where the directory is */

enum vmdk_header_flag {
    VMDK_FLAG_NEWLINES = 1u << 0,    /* bytes 73-76 tell whether a text transfer spoiled the file */
    VMDK_FLAG_RGD = 1u << 1,         /* redundant directory and tables */
    VMDK_FLAG_ZERO_GRAINS = 1u << 2, /* table entry 1 = a grain of zeros */
    VMDK_FLAG_COMPRESSED = 1u << 16,
    VMDK_FLAG_MARKERS = 1u << 17,
};

/* The kind of file that the first bytes tell. */
enum vmdk_magic {
    VMDK_MAGIC_NONE, /* text, or flat data */
    VMDK_MAGIC_KDMV,
    VMDK_MAGIC_UNFINISHED, /* "kdmv": its writer never came to the end */
    VMDK_MAGIC_COWD,
    VMDK_MAGIC_SESPARSE,
};

struct vmdk_header {
    uint32_t version, flags;
    uint64_t capacity, grain; /* sectors */
    uint64_t desc_off, desc_len;
    uint32_t gtes; /* entries a grain table */
    uint64_t rgd_off, gd_off, overhead;
    bool unclean;
    /* derived */
    uint64_t n_tables;
    uint64_t gd_sectors, gt_sectors;
    /* COWD (cowd.h): no copies, no flags; tables are made when they are needed. */
    bool cowd, inconsistent;
    uint32_t free_sector; /* all that is taken lies before it */
};

enum vmdk_magic vmdk_magic(const uint8_t *buf, size_t len);

/* Decode and check; file_size in bytes bounds what the tables may need. -EINVAL: damaged;
 * -ENOTSUP: a variant that is not read (yet). */
int vmdk_header_decode(struct vmdk_header *h, const char *where,
                       const uint8_t buf[VMDK_HEADER_SIZE], uint64_t file_size,
                       struct dr_error *err);
void vmdk_header_encode(const struct vmdk_header *h, uint8_t buf[VMDK_HEADER_SIZE]);

/* VMware's layout for a new extent: header, descriptor (desc_sectors, may be 0), RGD and its
 * tables, GD and its tables, grains. -EFBIG: the tables alone would pass 2^32 sectors. */
int vmdk_header_layout(struct vmdk_header *h, const char *where, uint64_t capacity, uint64_t grain,
                       uint32_t desc_sectors, bool zero_grains, struct dr_error *err);

/* A stream that is written in one go: its directory comes at the end. */
int vmdk_header_stream(struct vmdk_header *h, const char *where, uint64_t capacity, uint64_t grain,
                       struct dr_error *err);
/* Another capacity, and the sizes of directories and tables that follow from it. Their places stay
 * those of the old ones. */
int vmdk_header_set_capacity(struct vmdk_header *h, const char *where, uint64_t capacity,
                             struct dr_error *err);
/* Directories and tables stand in a row from this sector on, the redundant ones first. Answers the
 * sector behind them. */
uint64_t vmdk_header_place_tables(struct vmdk_header *h, uint64_t sector);
/* Change only capacity, places of the directories, and overhead, in the sector of a header. */
void vmdk_header_patch(const struct vmdk_header *h, uint8_t buf[VMDK_HEADER_SIZE]);

#endif
