/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which blocks of a cluster an archive stores, and side by side. */
#ifndef DR_ARCHIVE_VMA_PACK_H
#define DR_ARCHIVE_VMA_PACK_H

#include <string.h>

#include "archive/vma-format.h"
#include "base/bytes.h"

#define VMA_ALL 0xffffu /* blocks of a cluster */

/* Those of the blocks of want, which stand side by side, that are not zeros. */
static inline uint16_t vma_find_data(const uint8_t *blocks, uint16_t want)
{
    uint16_t mask = 0;
    for (unsigned left = want; left; left &= left - 1, blocks += DR_VMA_BLOCK)
        if (!dr_is_zero(blocks, DR_VMA_BLOCK))
            mask |= (uint16_t)(left & -left);
    return mask;
}

/* The blocks of mask, out of those of want, to `to`; the number of bytes they take. Moves towards
 * the front only, by whole blocks. */
static inline uint32_t vma_pack(uint8_t *to, const uint8_t *blocks, uint16_t want, uint16_t mask)
{
    uint32_t len = (uint32_t)__builtin_popcount(mask) * DR_VMA_BLOCK;
    if (to == blocks && want == mask)
        return len;
    for (unsigned left = want; left; left &= left - 1, blocks += DR_VMA_BLOCK)
        if (left & -left & mask) {
            if (to != blocks)
                memcpy(to, blocks, DR_VMA_BLOCK);
            to += DR_VMA_BLOCK;
        }
    return len;
}

#endif
