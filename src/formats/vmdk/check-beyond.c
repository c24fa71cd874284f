/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file that was cut off has table entries that lead behind its end, as many as grains were lost.
 * Damaged entries lead anywhere. Told apart, a truncation is one finding, with the length that the
 * file must have had, and a damaged entry never makes it a length of terabytes. */
#include <stdlib.h>

#include "base/error.h"
#include "formats/vmdk/check.h"

#define LEAST_UNIT  128u                /* sectors */
#define MAX_SECTORS (UINT64_C(1) << 32) /* entries have 32 bits */

int vmdk_beyond_add(struct vmdk_beyond *b, const struct vmdk_extent *e, uint64_t file_size,
                    uint32_t sector, struct dr_error *err)
{
    if (!b->bits) {
        b->unit = dr_max(e->h.grain, LEAST_UNIT);
        b->first = file_size / VMDK_SECTOR / b->unit;
        b->bits = calloc(1, (size_t)(MAX_SECTORS / b->unit / 8 + 1));
        if (!b->bits)
            return dr_fail_errno(err, ENOMEM, "VMDK check");
    }
    uint64_t i = sector / b->unit;
    b->bits[i / 8] |= (uint8_t)(1u << i % 8);
    b->last = dr_max(b->last, i);
    return 0;
}

void vmdk_beyond_end(struct vmdk_beyond *b, uint64_t reach)
{
    uint64_t found = 0;
    b->end = b->first;
    for (uint64_t i = b->first; b->bits && i <= b->last; i++) {
        if (!(b->bits[i / 8] >> i % 8 & 1))
            continue;
        if (i - b->end > reach + found) /* a disk that was trimmed has gaps */
            return;
        b->end = i + 1;
        found++;
    }
}

bool vmdk_beyond_is_cut(const struct vmdk_beyond *b, uint32_t sector)
{
    return b->bits && sector / b->unit < b->end;
}
