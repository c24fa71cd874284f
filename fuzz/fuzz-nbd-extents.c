/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An NBD server's answer of its extents: the size of the disk, where was asked, then pairs of a
 * length and flags. What is kept of it covers a range of the disk without gaps. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "storage/nbd.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool it)
{
    if (!it)
        abort();
}

static void walk(const struct nbd_extents *e, uint64_t from, uint64_t size)
{
    must(e->from == from && e->end >= from && e->end <= size && e->n <= NBD_EXTENTS);
    must(!nbd_covers(e, e->end) && !nbd_covers(NULL, from));
    for (uint64_t at = from, run; at < e->end; at += run) {
        enum dr_file_extent kind, again;
        uint64_t one;
        must(nbd_covers(e, at));
        nbd_look_up(e, at, UINT64_MAX, &kind, &run);
        must(run > 0 && run <= e->end - at);
        nbd_look_up(e, at + run - 1, 1, &again, &one);
        must(again == kind && one == 1);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct nbd_file file;
    static struct nbd_extents extents;
    if (size < 16)
        return 0;
    uint64_t from = get_le64(data + 8);
    file.export.size = get_le64(data) & INT64_MAX;
    if (from >= file.export.size)
        return 0;
    size_t n = (size - 16) / 4;
    uint32_t *entries = malloc(n * 4 + 1);
    if (!entries)
        return 0;
    memcpy(entries, data + 16, n * 4);
    struct nbd_request q = {.command = NBD_EXTENT, .off = from, .extents = &extents, .file = &file};
    int error = 0;
    extents.from = extents.end = from;
    must(nbd_take_extents(&q, "other:context", from, entries, n, &error) == 0 &&
         extents.end == from);
    must(nbd_take_extents(&q, LIBNBD_CONTEXT_BASE_ALLOCATION, from, entries, n, &error) == 0);
    walk(&extents, from, file.export.size);
    free(entries);
    return 0;
}
