/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* bzip2 files: streams one after another, each with checksums. */
#include <bzlib.h>

#include "storage/source-codec.h"

struct bzip2_state {
    bz_stream b;
    bool inside; /* b is in use */
};

static bool bzip2_knows(const uint8_t *magic, size_t len)
{
    return len >= 4 && memcmp(magic, "BZh", 3) == 0 && magic[3] >= '1' && magic[3] <= '9';
}

static void bzip2_close(void *state)
{
    struct bzip2_state *s = state;
    if (s->inside)
        BZ2_bzDecompressEnd(&s->b);
    free(s);
}

static int begin(struct bzip2_state *s, const char *name, struct dr_error *err)
{
    s->b = (bz_stream){0};
    if (BZ2_bzDecompressInit(&s->b, 0, 0) != BZ_OK)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    s->inside = true;
    return 0;
}

static int bzip2_open(const char *name, void **state, struct dr_error *err)
{
    struct bzip2_state *s = calloc(1, sizeof(*s));
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    int r = begin(s, name, err);
    if (r < 0)
        free(s);
    else
        *state = s;
    return r;
}

static int decompress_some(struct bzip2_state *s, struct source_in *in, struct dr_error *err)
{
    s->b.next_in = (char *)in->buf + in->at;
    s->b.avail_in = (unsigned)(in->n - in->at);
    int b = BZ2_bzDecompress(&s->b);
    in->at = in->n - s->b.avail_in;
    if (b == BZ_OK)
        return 0;
    BZ2_bzDecompressEnd(&s->b);
    s->inside = false;
    if (b == BZ_STREAM_END)
        return 0;
    if (b == BZ_MEM_ERROR)
        return dr_fail(err, ENOMEM, "%s: out of memory", in->name);
    return dr_fail(err, EBADMSG, "%s: damaged bzip2 data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in),
                   b == BZ_DATA_ERROR_MAGIC ? "no bzip2 stream begins there"
                                            : "its checksum or structure is wrong");
}

static int bzip2_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                      struct dr_error *err)
{
    struct bzip2_state *s = state;
    size_t left = (size_t)dr_min(len, 1u << 30), room = left;
    while (left == room) {
        int r = source_in_fill(in, err);
        if (r == 0 && !s->inside && in->end)
            break;
        if (r == 0 && !s->inside)
            r = begin(s, in->name, err);
        if (r < 0)
            return r;
        s->b.next_out = (char *)buf;
        s->b.avail_out = (unsigned)room;
        r = decompress_some(s, in, err);
        left = s->b.avail_out;
        *got = room - left;
        if (r < 0)
            return r;
        if (!s->inside)
            in->vouched = in->given + *got;
        if (in->end && s->inside && left == room)
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside its bzip2 data: the file was cut off", in->name,
                           (unsigned long long)in->next);
    }
    *got = room - left;
    return 0;
}

const struct source_codec source_bzip2 = {
    .name = "bzip2",
    .knows = bzip2_knows,
    .open = bzip2_open,
    .read = bzip2_read,
    .close = bzip2_close,
};
