/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sparse extent of later ESX (magic CAFEBABE, extent type SESPARSE), which is only read: its
 * journal and its maps of free and used grains are known to VMware alone. Files of this folder
 * only. Sectors, but where a name says bytes. */
#ifndef DR_FORMATS_VMDK_SESPARSE_H
#define DR_FORMATS_VMDK_SESPARSE_H

#include "formats/vmdk/vmdk.h"

#define VMDK_SESPARSE_GRAIN 8u  /* sectors */
#define VMDK_SESPARSE_TABLE 64u /* sectors of a table */
#define VMDK_SESPARSE_GTES  4096u

struct vmdk_se_area {
    uint64_t off, len;
};

struct vmdk_sesparse {
    uint64_t capacity;
    uint64_t n_tables; /* directory entries that the capacity asks for */
    struct vmdk_se_area volatile_header, directory, tables, grains;
};

/* Read both headers of f and check them. flags: DR_OPEN_SALVAGE takes an extent whose journal is
 * not empty. -EINVAL, -ENOTSUP. */
int vmdk_sesparse_read(struct vmdk_sesparse *se, const char *where, struct dr_file *f,
                       unsigned flags, struct dr_error *err);
/* Sets e->se. */
int vmdk_sesparse_open(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
/* [page] rel: byte in the extent. */
int vmdk_sesparse_map(struct dr_image *image, const struct vmdk_extent *e, uint64_t rel,
                      uint64_t len, struct dr_extent *ext, struct dr_error *err);
/* Finds, and mends nothing. */
int vmdk_sesparse_check(struct dr_image *image, struct vmdk_extent *e,
                        struct dr_check_result *result, struct dr_error *err);

#endif
