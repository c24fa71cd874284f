/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lz4 files: frames one after another, with checksums of blocks, contents or both. */
#include <lz4frame.h>

#include "storage/source-codec.h"

#define FRAME_MAGIC  0x184d2204u
#define FIRST        7u          /* the shortest header */
#define LEGACY_MAGIC 0x184c2102u /* what the Linux kernel is packed with */

struct lz4_state {
    LZ4F_dctx *ctx;
    bool inside;   /* a frame has begun and not ended */
    size_t wanted; /* bytes up to where the decoder would like to be asked again; 0 = not known */
};

/* A frame to be skipped in front has the magic of zstd's, which passes over it. */
static bool lz4_knows(const uint8_t *magic, size_t len)
{
    uint32_t m = len >= 4 ? get_le32(magic) : 0;
    return m == FRAME_MAGIC || m == LEGACY_MAGIC;
}

static void lz4_close(void *state)
{
    struct lz4_state *s = state;
    LZ4F_freeDecompressionContext(s->ctx);
    free(s);
}

static int lz4_open(const char *name, void **state, struct dr_error *err)
{
    struct lz4_state *s = calloc(1, sizeof(*s));
    if (!s || LZ4F_isError(LZ4F_createDecompressionContext(&s->ctx, LZ4F_VERSION))) {
        free(s);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    *state = s;
    return 0;
}

static int failed(const struct source_in *in, size_t code, struct dr_error *err)
{
    if (in->next - in->n == 0 && in->n >= 4 && get_le32(in->buf) == LEGACY_MAGIC)
        return dr_fail(err, ENOTSUP,
                       "%s: is packed by lz4 in its legacy format, which cannot be read; unpack it "
                       "with `lz4 -d` first",
                       in->name);
    return dr_fail(err, EBADMSG, "%s: damaged lz4 data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in), LZ4F_getErrorName(code));
}

static int lz4_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                    struct dr_error *err)
{
    struct lz4_state *s = state;
    size_t made = 0;
    while (made == 0) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end && !s->inside)
            break;
        if (!s->inside)
            in->begun = source_in_pos(in);
        /* No more than it wants at once: that is one block, and the checksum of all blocks comes
         * by itself, so that a wrong one takes no plain bytes with it. */
        size_t taken = dr_min(in->n - in->at, s->wanted ? s->wanted : FIRST);
        made = len;
        size_t left = LZ4F_decompress(s->ctx, buf, &made, in->buf + in->at, &taken, NULL);
        if (LZ4F_isError(left))
            return failed(in, left, err);
        in->at += taken;
        s->inside = left != 0;
        s->wanted = left;
        if (left == 0)
            in->vouched = in->given + made;
        if (in->end && s->inside && made == 0)
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside an lz4 frame: the file was cut off", in->name,
                           (unsigned long long)in->next);
    }
    *got = made;
    return 0;
}

const struct source_codec source_lz4 = {
    .name = "lz4",
    .knows = lz4_knows,
    .open = lz4_open,
    .read = lz4_read,
    .magic = {0x04, 0x22, 0x4d, 0x18},
    .magic_len = 4,
    .close = lz4_close,
};
