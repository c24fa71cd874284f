/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compressed clusters: raw deflate, or one zstd frame. */
#include "formats/qcow2/qcow2.h"

#include <zlib.h>
#include <zstd.h>

#include "base/cleanup.h"

/* QEMU reads with a window of 2^12 bytes, so nothing may be written with a larger one; other
 * programs write with the largest. */
#define READ_WINDOW  (-15)
#define WRITE_WINDOW (-12)
#define WRITE_MEMORY 9

static int refuse_encrypted(const struct dr_image *image, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: is encrypted (%s), and this version cannot decrypt; qemu-img convert can",
                   image->path, qcow2_of(image)->h.crypt == QCOW2_LUKS ? "LUKS" : "AES");
}

/* The number of bytes that came out. */
static size_t inflate_into(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    z_stream z = {.next_in = (Bytef *)(uintptr_t)in,
                  .avail_in = (uInt)in_len,
                  .next_out = out,
                  .avail_out = (uInt)out_len};
    if (inflateInit2(&z, READ_WINDOW) != Z_OK)
        return 0;
    int r;
    do
        r = inflate(&z, Z_FINISH);
    while (r == Z_OK);
    inflateEnd(&z);
    return out_len - z.avail_out;
}

static size_t unzstd_into(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    ZSTD_DCtx *context = ZSTD_createDCtx();
    ZSTD_inBuffer from = {in, in_len, 0};
    ZSTD_outBuffer to = {out, out_len, 0};
    for (size_t r = 1, before; context && r > 0 && to.pos < to.size;) {
        before = to.pos + from.pos;
        r = ZSTD_decompressStream(context, &to, &from);
        if (ZSTD_isError(r) || to.pos + from.pos == before)
            break;
    }
    ZSTD_freeDCtx(context);
    return to.pos;
}

int qcow2_decode(struct dr_image *image, const uint8_t *in, size_t in_len, uint8_t *out,
                 size_t out_len, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    if (q->h.crypt)
        return refuse_encrypted(image, err);
    size_t got = q->h.compression == QCOW2_ZSTD ? unzstd_into(in, in_len, out, out_len)
                                                : inflate_into(in, in_len, out, out_len);
    if (got == out_len)
        return 0;
    return dr_fail(err, EIO, "%s: a compressed cluster decodes to %zu bytes, expected %zu",
                   image->path, got, out_len);
}

static int64_t deflate_into(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap)
{
    z_stream z = {.next_in = (Bytef *)(uintptr_t)in,
                  .avail_in = (uInt)in_len,
                  .next_out = out,
                  .avail_out = (uInt)out_cap};
    if (deflateInit2(&z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, WRITE_WINDOW, WRITE_MEMORY,
                     Z_DEFAULT_STRATEGY) != Z_OK)
        return -ENOMEM;
    int r = deflate(&z, Z_FINISH);
    deflateEnd(&z);
    return r == Z_STREAM_END ? (int64_t)(out_cap - z.avail_out) : -ENOTSUP;
}

static int64_t zstd_into(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap)
{
    size_t r = ZSTD_compress(out, out_cap, in, in_len, ZSTD_CLEVEL_DEFAULT);
    return ZSTD_isError(r) ? -ENOTSUP : (int64_t)r;
}

int64_t qcow2_encode(struct dr_image *image, const uint8_t *in, size_t in_len, uint64_t guest_off,
                     uint8_t *out, size_t out_cap)
{
    const struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE uint8_t *padded = NULL;
    (void)guest_off;
    if (in_len < q->cluster) { /* the last one: a cluster always decodes to a whole one */
        padded = calloc(1, q->cluster);
        if (!padded)
            return -ENOMEM;
        memcpy(padded, in, in_len);
    }
    const uint8_t *from = padded ? padded : in;
    out_cap = dr_min(out_cap, q->cluster - 1);
    return q->h.compression == QCOW2_ZSTD ? zstd_into(from, q->cluster, out, out_cap)
                                          : deflate_into(from, q->cluster, out, out_cap);
}
