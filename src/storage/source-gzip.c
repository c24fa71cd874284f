/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* gzip files: members one after another, each with a checksum. */
#include <zlib.h>

#include "storage/source-codec.h"

struct gzip_state {
    z_stream z;
    bool inside, padding; /* in a member; behind the last one */
};

static bool gzip_knows(const uint8_t *magic, size_t len)
{
    return len >= 3 && magic[0] == 0x1f && magic[1] == 0x8b && magic[2] == Z_DEFLATED;
}

static void gzip_close(void *state)
{
    struct gzip_state *g = state;
    inflateEnd(&g->z);
    free(g);
}

static int gzip_open(const char *name, void **state, struct dr_error *err)
{
    struct gzip_state *g = calloc(1, sizeof(*g));
    if (!g || inflateInit2(&g->z, 15 + 16) != Z_OK) { /* 16: gzip's header and nothing else */
        free(g);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    g->inside = true;
    *state = g;
    return 0;
}

/* A member may be followed by the next one, by zeros that pad a tape's block, or by nothing. */
static int next_member(struct gzip_state *g, struct source_in *in, struct dr_error *err)
{
    const uint8_t *p = in->buf + in->at;
    size_t n = in->n - in->at;
    in->begun = source_in_pos(in);
    if (!g->padding && p[0] != 0) {
        inflateReset(&g->z);
        g->inside = true;
        return 0;
    }
    g->padding = true;
    if (!dr_is_zero(p, n))
        return dr_fail(err, EBADMSG,
                       "%s: neither gzip data nor zeros behind offset %llu, where it should end",
                       in->name, (unsigned long long)source_in_pos(in));
    in->at = in->n;
    return 0;
}

static int inflate_some(struct gzip_state *g, struct source_in *in, size_t room,
                        struct dr_error *err)
{
    g->z.next_in = in->buf + in->at;
    g->z.avail_in = (uInt)(in->n - in->at);
    int z = inflate(&g->z, Z_NO_FLUSH);
    in->at = in->n - g->z.avail_in;
    g->inside = z != Z_STREAM_END;
    if (z == Z_STREAM_END)
        in->vouched = in->given + (room - g->z.avail_out);
    if (z == Z_OK || z == Z_STREAM_END || z == Z_BUF_ERROR)
        return 0;
    return dr_fail(err, EBADMSG, "%s: damaged gzip data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in), g->z.msg ? g->z.msg : "no reason told");
}

static int gzip_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                     struct dr_error *err)
{
    struct gzip_state *g = state;
    size_t room = (size_t)dr_min(len, 1u << 30);
    g->z.next_out = buf;
    g->z.avail_out = (uInt)room;
    while (g->z.avail_out == room) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end && !g->inside)
            break;
        r = g->inside ? inflate_some(g, in, room, err) : next_member(g, in, err);
        *got = room - g->z.avail_out; /* also where the checksum behind them is wrong */
        if (r < 0)
            return r;
        if (in->end && g->inside && g->z.avail_out == room)
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside its gzip data: the file was cut off", in->name,
                           (unsigned long long)in->next);
    }
    *got = room - g->z.avail_out;
    return 0;
}

const struct source_codec source_gzip = {
    .name = "gzip",
    .knows = gzip_knows,
    .open = gzip_open,
    .read = gzip_read,
    .magic = {0x1f, 0x8b, Z_DEFLATED},
    .magic_len = 3,
    .close = gzip_close,
};
