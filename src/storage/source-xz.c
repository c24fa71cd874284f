/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* xz files: streams one after another, with padding between them, each block with a check. Read
 * from front to back here; source-xz-blocks.c reads blocks at random. */
#include <lzma.h>

#include "storage/source-codec.h"

struct xz_state {
    lzma_stream x;
    bool ended;
};

static bool xz_knows(const uint8_t *magic, size_t len)
{
    return len >= 6 && memcmp(magic,
                              "\xfd"
                              "7zXZ\0",
                              6) == 0;
}

static void xz_close(void *state)
{
    struct xz_state *s = state;
    lzma_end(&s->x);
    free(s);
}

static int xz_open(const char *name, void **state, struct dr_error *err)
{
    struct xz_state *s = calloc(1, sizeof(*s));
    if (s)
        s->x = (lzma_stream)LZMA_STREAM_INIT;
    if (!s || lzma_stream_decoder(&s->x, SOURCE_XZ_MEMORY,
                                  LZMA_CONCATENATED | LZMA_TELL_UNSUPPORTED_CHECK) != LZMA_OK) {
        free(s);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    *state = s;
    return 0;
}

int source_xz_failed(const char *name, uint64_t at, int code, struct dr_error *err)
{
    const char *what = "its checksum or structure is wrong";
    if (code == LZMA_MEM_ERROR)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (code == LZMA_MEMLIMIT_ERROR)
        return dr_fail(
            err, ENOTSUP,
            "%s: xz data before offset %llu needs more than %u MiB of memory to be decoded", name,
            (unsigned long long)at, SOURCE_XZ_MEMORY >> 20);
    if (code == LZMA_UNSUPPORTED_CHECK || code == LZMA_OPTIONS_ERROR)
        return dr_fail(err, ENOTSUP,
                       "%s: xz data before offset %llu has a check or a filter that the xz library "
                       "does not know",
                       name, (unsigned long long)at);
    if (code == LZMA_FORMAT_ERROR)
        what = "no xz stream begins there";
    return dr_fail(err, EBADMSG, "%s: damaged xz data before offset %llu: %s", name,
                   (unsigned long long)at, what);
}

static int xz_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                   struct dr_error *err)
{
    struct xz_state *s = state;
    s->x.next_out = buf;
    s->x.avail_out = len;
    while (s->x.avail_out == len && !s->ended) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        s->x.next_in = in->buf + in->at;
        s->x.avail_in = in->n - in->at;
        lzma_ret x = lzma_code(&s->x, in->end ? LZMA_FINISH : LZMA_RUN);
        in->at = in->n - s->x.avail_in;
        in->begun = source_in_pos(in) - 1; /* of streams the decoder tells no beginning */
        s->ended = x == LZMA_STREAM_END;
        *got = len - s->x.avail_out;
        if (s->ended)
            in->vouched = in->given + *got;
        if (in->end && (x == LZMA_BUF_ERROR || (x == LZMA_OK && s->x.avail_out == len)))
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside its xz data: the file was cut off", in->name,
                           (unsigned long long)in->next);
        if (x != LZMA_OK && x != LZMA_STREAM_END && x != LZMA_BUF_ERROR)
            return source_xz_failed(in->name, source_in_pos(in), (int)x, err);
    }
    *got = len - s->x.avail_out;
    return 0;
}

const struct source_codec source_xz = {
    .name = "xz",
    .knows = xz_knows,
    .open = xz_open,
    .read = xz_read,
    .magic = {0xfd, '7', 'z', 'X', 'Z', 0},
    .magic_len = 6,
    .close = xz_close,
};
