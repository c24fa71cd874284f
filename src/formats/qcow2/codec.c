/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compressed clusters: raw deflate, or one zstd frame. */
#include "formats/qcow2/qcow2.h"

#include "base/cleanup.h"
#include "base/codec.h"

int qcow2_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                 size_t in_len, uint8_t *out, struct dr_error *err)
{
    size_t out_len = ext->unit;
    const struct qcow2 *q = qcow2_of(image);
    if (qcow2_is_locked(q))
        return qcow2_refuse_locked(image, err);
    size_t got = q->h.compression == QCOW2_ZSTD ? dr_unzstd(in, in_len, out, out_len)
                                                : dr_inflate(in, in_len, out, out_len);
    if (got == out_len)
        return 0;
    return dr_fail(err, EIO, "%s: a compressed cluster decodes to %zu bytes, expected %zu",
                   image->path, got, out_len);
}

/* QEMU decodes deflate with a window of 4 KiB, so nothing may be written with a larger one. Other
 * programs do write with larger ones, and all of that is read. */
int64_t qcow2_encode(struct dr_image *image, const uint8_t *in, size_t in_len, uint64_t guest_off,
                     uint8_t *out, size_t out_cap)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *padded = NULL;
    (void)guest_off;
    if (q->h.crypt) /* as it is, then */
        return -ENOTSUP;
    if (in_len < q->cluster) { /* the last one: a cluster always decodes to a whole one */
        padded = calloc(1, q->cluster);
        if (!padded)
            return -ENOMEM;
        memcpy(padded, in, in_len);
    }
    const uint8_t *from = padded ? padded : in;
    out_cap = dr_min(out_cap, q->cluster - 1);
    return q->h.compression == QCOW2_ZSTD ? dr_zstd(from, q->cluster, out, out_cap)
                                          : dr_deflate_4k(from, q->cluster, out, out_cap);
}
