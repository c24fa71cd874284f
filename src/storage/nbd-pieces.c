/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an NBD server sends of a read. It may send chunks in any order, none of them twice, and says
 * which was the last. libnbd does not look whether they are all of the range, and of what is
 * missing the buffer would have whatever was in it. */
#include <string.h>

#include "storage/nbd.h"

static void insert(struct nbd_pieces *pieces, unsigned i, uint64_t off, uint64_t end)
{
    memmove(&pieces->p[i + 1], &pieces->p[i], (pieces->n - i) * sizeof(pieces->p[0]));
    pieces->p[i].off = off;
    pieces->p[i].end = end;
    pieces->n++;
}

static void add(struct nbd_pieces *pieces, uint64_t off, uint64_t end)
{
    unsigned i = pieces->n;
    while (i > 0 && pieces->p[i - 1].off >= end)
        i--;
    bool after = i > 0 && pieces->p[i - 1].end == off;
    bool before = i < pieces->n && pieces->p[i].off == end;
    if (i > 0 && pieces->p[i - 1].end > off)
        pieces->wrong = true;
    else if (after)
        pieces->p[i - 1].end = end;
    else if (before)
        pieces->p[i].off = off;
    else if (pieces->n < NBD_PIECES)
        insert(pieces, i, off, end);
    else
        pieces->wrong = true;
    if (after && before) {
        pieces->p[i - 1].end = pieces->p[i].end;
        pieces->n--;
        memmove(&pieces->p[i], &pieces->p[i + 1], (pieces->n - i) * sizeof(pieces->p[0]));
    }
}

int nbd_take_piece(void *user, const void *bytes, size_t n, uint64_t off, unsigned status,
                   int *error)
{
    struct nbd_request *q = user;
    (void)bytes;
    (void)error;
    if (status != LIBNBD_READ_ERROR && n > 0)
        add(q->pieces, off, off + n);
    return 0;
}

bool nbd_is_whole(const struct nbd_request *q)
{
    const struct nbd_pieces *pieces = q->pieces;
    return !pieces->wrong && pieces->n == 1 && pieces->p[0].off == q->off &&
           pieces->p[0].end == q->off + q->len;
}
