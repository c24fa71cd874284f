/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the two readers of lzop files share: source-lzop.c goes from front to back,
 * source-lzop-blocks.c lists the blocks. */
#ifndef DR_STORAGE_SOURCE_LZOP_H
#define DR_STORAGE_SOURCE_LZOP_H

#include "storage/source-codec.h"

#define LZOP_BLOCK_MAX   (64u << 20) /* lzop's own limit */
#define LZOP_BLOCK_USUAL (256u << 10)

/* Of a header; a block has those of its checksums that the flags announce. */
enum lzop_flag {
    LZOP_ADLER_PLAIN = 1 << 0,
    LZOP_ADLER_CODED = 1 << 1, /* only where the block got smaller */
    LZOP_HEADER_EXTRA = 1 << 6,
    LZOP_CRC_PLAIN = 1 << 8,
    LZOP_CRC_CODED = 1 << 9,
    LZOP_MULTIPART = 1 << 10,
    LZOP_HEADER_FILTER = 1 << 11,
    LZOP_HEADER_CRC = 1 << 12,
};

struct lzop_sums {
    uint32_t adler, crc;
};

bool source_lzop_sums_fit(uint32_t flags, uint32_t adler, uint32_t crc,
                          const struct lzop_sums *sums, const uint8_t *p, size_t n);
/* The header that begins at the next byte; *end: the file ended instead. any_sum: its checksum may
 * be wrong. */
int source_lzop_header(struct source_in *in, bool any_sum, uint32_t *flags, bool *end,
                       struct dr_error *err);

#endif
