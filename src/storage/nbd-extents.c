/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an NBD server said of its extents. */
#include <string.h>

#include "base/bytes.h"
#include "storage/nbd.h"

int nbd_take_extents(void *user, const char *context, uint64_t off, uint32_t *entries, size_t n,
                     int *error)
{
    struct nbd_request *q = user;
    struct nbd_extents *e = q->extents;
    if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0 || off != q->off || *error)
        return 0;
    uint64_t at = off, size = q->file->export.size;
    size_t kept = 0;
    for (size_t i = 0; i + 1 < n && kept < NBD_EXTENTS && at < size && entries[i] > 0; i += 2) {
        at = dr_min(at + entries[i], size);
        bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
        if (kept && e->runs[kept - 1].zero == zero)
            kept--;
        e->runs[kept++] = (struct nbd_run){at, zero};
    }
    e->n = kept;
    e->from = off;
    e->end = kept ? at : off;
    return 0;
}

bool nbd_covers(const struct nbd_extents *e, uint64_t off)
{
    return e && off >= e->from && off < e->end;
}

void nbd_look_up(const struct nbd_extents *e, uint64_t off, uint64_t len, enum dr_file_extent *kind,
                 uint64_t *run)
{
    size_t i = 0;
    for (size_t end = e->n; i < end;) { /* the first that ends behind off */
        size_t middle = i + (end - i) / 2;
        if (e->runs[middle].end > off)
            end = middle;
        else
            i = middle + 1;
    }
    *kind = e->runs[i].zero ? DR_FILE_HOLE : DR_FILE_DATA;
    *run = dr_min(len, e->runs[i].end - off);
}
