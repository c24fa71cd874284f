/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* zstd streams: frames one after another, some of them for others to skip. */
#include <zstd.h>
#include <zstd_errors.h>

#include "storage/source-codec.h"

/* Windows up to 128 MiB, as zstd itself reads without being asked; that bounds the memory. */
#define WINDOW_LOG_MAX 27
#define FIRST          5u /* magic and descriptor */

struct zstd_state {
    ZSTD_DStream *stream;
    bool inside;   /* a frame has begun and not ended */
    size_t wanted; /* bytes up to where the decoder would like to be asked again; 0 = not known */
};

static bool zstd_knows(const uint8_t *magic, size_t len)
{
    uint32_t m = len >= 4 ? get_le32(magic) : 0;
    return m == ZSTD_MAGICNUMBER || (m & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START;
}

static void zstd_close(void *state)
{
    struct zstd_state *z = state;
    ZSTD_freeDStream(z->stream);
    free(z);
}

static int zstd_open(const char *name, void **state, struct dr_error *err)
{
    struct zstd_state *z = calloc(1, sizeof(*z));
    if (!z || !(z->stream = ZSTD_createDStream())) {
        free(z);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    ZSTD_DCtx_setParameter(z->stream, ZSTD_d_windowLogMax, WINDOW_LOG_MAX);
    *state = z;
    return 0;
}

static int failed(const struct source_in *in, size_t code, struct dr_error *err)
{
    if (ZSTD_getErrorCode(code) == ZSTD_error_frameParameter_windowTooLarge)
        return dr_fail(err, ENOTSUP,
                       "%s: zstd frame before offset %llu needs more than 128 MiB of memory to be "
                       "decoded (zstd --long=28 or more)",
                       in->name, (unsigned long long)source_in_pos(in));
    return dr_fail(err, EBADMSG, "%s: damaged zstd data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in), ZSTD_getErrorName(code));
}

static int zstd_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                     struct dr_error *err)
{
    struct zstd_state *z = state;
    ZSTD_outBuffer out = {.dst = buf, .size = len};
    while (out.pos == 0) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        /* Call the decoder at the end of input too: it may hold bytes that did not fit the last
         * time. */
        /* No more than it wants at once: that is one block, and the checksum of the frame comes by
         * itself, so that a wrong one takes no plain bytes with it. */
        size_t most = dr_min(in->n - in->at, z->wanted ? z->wanted : FIRST);
        ZSTD_inBuffer piece = {.src = in->buf + in->at, .size = most};
        if (in->end && !z->inside)
            break;
        if (!z->inside)
            in->begun = source_in_pos(in);
        size_t left = ZSTD_decompressStream(z->stream, &out, &piece);
        in->at += piece.pos;
        if (ZSTD_isError(left))
            return failed(in, left, err);
        z->inside = left != 0;
        z->wanted = left;
        if (left == 0)
            in->vouched = in->given + out.pos;
        if (in->end && z->inside && out.pos == 0)
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside a zstd frame: the file was cut off", in->name,
                           (unsigned long long)in->next);
    }
    *got = out.pos;
    return 0;
}

const struct source_codec source_zstd = {
    .name = "zstd",
    .knows = zstd_knows,
    .open = zstd_open,
    .read = zstd_read,
    .magic = {0x28, 0xb5, 0x2f, 0xfd},
    .magic_len = 4,
    .close = zstd_close,
};
