/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* lzop files: a header, then blocks with checksums, perhaps several such one after another. All
 * numbers are big endian. The blocks are LZO1X. */
#include <lzo/lzo1x.h>

#include "storage/source-lzop.h"

#define MAGIC      "\x89LZO\0\r\n\x1a\n"
#define MAGIC_LEN  9u
#define HEADER_MAX 512u /* the fields and a name of 255 bytes */
#define EXTRA_MAX  (1u << 20)

/* Versions by which fields came and went. */
#define VERSION_LEVEL 0x0940u
#define VERSION_KNOWN 0x1040u /* "needed to extract": newer ones may be anything */

struct lzop_state {
    uint32_t flags;
    bool any_sum;           /* a header is taken whatever its checksum is */
    bool inside;            /* a header was read and not the end of its blocks */
    uint8_t *coded, *plain; /* the present block */
    size_t coded_room, plain_room;
    size_t at, n;   /* what of plain is still to be given out */
    uint32_t usual; /* plain bytes of the first block; 0 = not known */
};

/* A header as it is read, for its checksum. */
struct header {
    uint8_t bytes[HEADER_MAX];
    size_t n;
};

static bool lzop_knows(const uint8_t *magic, size_t len)
{
    return len >= MAGIC_LEN && memcmp(magic, MAGIC, MAGIC_LEN) == 0;
}

static int lzop_open(const char *name, void **state, struct dr_error *err)
{
    if (lzo_init() != LZO_E_OK)
        return dr_fail(err, ENOTSUP, "%s: this system's LZO library does not work", name);
    *state = calloc(1, sizeof(struct lzop_state));
    return *state ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", name);
}

static void lzop_close(void *state)
{
    struct lzop_state *s = state;
    free(s->coded);
    free(s->plain);
    free(s);
}

/* ------------------------------------------------------------------ reading with an end */

static int damaged(const struct source_in *in, const char *what, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: damaged lzop data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in), what);
}

static int take(struct source_in *in, void *buf, size_t len, struct dr_error *err)
{
    size_t got;
    int r = source_in_take(in, buf, len, &got, err);
    if (r < 0 || got == len)
        return r;
    return dr_fail(err, EBADMSG, "%s: ends at %llu inside its lzop data: the file was cut off",
                   in->name, (unsigned long long)in->next);
}

static int take_u32(struct source_in *in, uint32_t *v, struct dr_error *err)
{
    uint8_t raw[4] = {0};
    int r = take(in, raw, sizeof(raw), err);
    *v = get_be32(raw);
    return r;
}

/* ------------------------------------------------------------------ header */

/* The next n bytes of the header, at *p. */
static int field(struct source_in *in, struct header *h, size_t n, uint8_t **p,
                 struct dr_error *err)
{
    *p = h->bytes + h->n;
    h->n += n;
    return take(in, *p, n, err);
}

static int check_header_sum(const struct lzop_state *s, struct source_in *in,
                            const struct header *h, struct dr_error *err)
{
    uint32_t told, sum = s->flags & LZOP_HEADER_CRC ? lzo_crc32(0, h->bytes, (lzo_uint)h->n)
                                                    : lzo_adler32(1, h->bytes, (lzo_uint)h->n);
    int r = take_u32(in, &told, err);
    return r < 0 || told == sum || s->any_sum
               ? r
               : damaged(in, "the checksum does not fit the header", err);
}

/* Skip the extra field. No program is known to write one, and nothing in it concerns us. */
static int skip_extra(struct source_in *in, struct dr_error *err)
{
    uint32_t len = 0, sum;
    uint8_t byte;
    int r = take_u32(in, &len, err);
    if (r == 0 && len > EXTRA_MAX)
        return damaged(in, "an extra field of more than 1 MiB", err);
    for (uint32_t i = 0; r == 0 && i < len; i++)
        r = take(in, &byte, 1, err);
    return r < 0 ? r : take_u32(in, &sum, err);
}

static int check_kind(struct lzop_state *s, struct source_in *in, uint32_t needed, uint8_t method,
                      struct dr_error *err)
{
    if (needed > VERSION_KNOWN)
        return dr_fail(err, ENOTSUP, "%s: needs a newer version of the lzop format (0x%04x)",
                       in->name, needed);
    if (method < 1 || method > 3)
        return dr_fail(err, ENOTSUP, "%s: lzop method %u, only LZO1X (1 to 3) is known", in->name,
                       method);
    if (s->flags & (LZOP_HEADER_FILTER | LZOP_MULTIPART))
        return dr_fail(err, ENOTSUP, "%s: lzop files in parts or with filters are not supported",
                       in->name);
    return 0;
}

/* Read what follows the magic number: versions, method, flags, mode, times, name. */
static int take_header(struct lzop_state *s, struct source_in *in, struct dr_error *err)
{
    struct header h = {.n = 0};
    uint8_t *p = NULL, *q = NULL;
    int r = field(in, &h, 4, &p, err);
    if (r < 0)
        return r;
    bool modern = get_be16(p) >= VERSION_LEVEL;
    uint32_t needed = 0;
    if (modern && (r = field(in, &h, 2, &q, err)) == 0)
        needed = get_be16(q);
    if (r < 0 || (r = field(in, &h, modern ? 6 : 5, &p, err)) < 0)
        return r;
    s->flags = get_be32(p + (modern ? 2 : 1));
    r = check_kind(s, in, needed, p[0], err);
    if (r == 0) /* mode, mtime, and the length of the name */
        r = field(in, &h, modern ? 13 : 9, &p, err);
    if (r == 0)
        r = field(in, &h, h.bytes[h.n - 1], &p, err);
    if (r == 0)
        r = check_header_sum(s, in, &h, err);
    if (r == 0 && (s->flags & LZOP_HEADER_EXTRA))
        r = skip_extra(in, err);
    s->inside = r == 0;
    return r;
}

/* ------------------------------------------------------------------ blocks */

static int room_for(uint8_t **buf, size_t *room, size_t n)
{
    if (n <= *room)
        return 0;
    uint8_t *more = realloc(*buf, n);
    if (!more)
        return -ENOMEM;
    *buf = more;
    *room = n;
    return 0;
}

/* Read the Adler-32 and CRC-32 of the plain or of the compressed bytes, those that the flags
 * announce. */
static int take_sums(const struct lzop_state *s, struct source_in *in, uint32_t adler, uint32_t crc,
                     struct lzop_sums *sums, struct dr_error *err)
{
    int r = s->flags & adler ? take_u32(in, &sums->adler, err) : 0;
    return r == 0 && (s->flags & crc) ? take_u32(in, &sums->crc, err) : r;
}

bool source_lzop_sums_fit(uint32_t flags, uint32_t adler, uint32_t crc,
                          const struct lzop_sums *sums, const uint8_t *p, size_t n)
{
    if ((flags & adler) && lzo_adler32(1, p, (lzo_uint)n) != sums->adler)
        return false;
    return !(flags & crc) || lzo_crc32(0, p, (lzo_uint)n) == sums->crc;
}

static int decode(struct lzop_state *s, struct source_in *in, uint32_t plain, uint32_t coded,
                  const struct lzop_sums *sums, struct dr_error *err)
{
    lzo_uint n = plain;
    if (room_for(&s->coded, &s->coded_room, coded) < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", in->name);
    int r = take(in, s->coded, coded, err);
    if (r < 0)
        return r;
    if (!source_lzop_sums_fit(s->flags, LZOP_ADLER_CODED, LZOP_CRC_CODED, sums, s->coded, coded))
        return damaged(in, "the checksum does not fit the compressed block", err);
    if (lzo1x_decompress_safe(s->coded, coded, s->plain, &n, NULL) != LZO_E_OK || n != plain)
        return damaged(in, "a block that cannot be decoded", err);
    return 0;
}

static int take_block_body(struct lzop_state *s, struct source_in *in, uint32_t plain,
                           struct dr_error *err)
{
    struct lzop_sums of_plain, of_coded;
    uint32_t coded;
    int r = take_u32(in, &coded, err);
    if (r < 0)
        return r;
    if (plain > LZOP_BLOCK_MAX || coded > plain || coded == 0)
        return damaged(in, "a block of impossible size", err);
    r = take_sums(s, in, LZOP_ADLER_PLAIN, LZOP_CRC_PLAIN, &of_plain, err);
    if (r == 0 && coded < plain)
        r = take_sums(s, in, LZOP_ADLER_CODED, LZOP_CRC_CODED, &of_coded, err);
    if (r == 0 && room_for(&s->plain, &s->plain_room, plain) < 0)
        r = dr_fail(err, ENOMEM, "%s: out of memory", in->name);
    if (r == 0) /* what does not shrink is stored */
        r = coded < plain ? decode(s, in, plain, coded, &of_coded, err)
                          : take(in, s->plain, plain, err);
    if (r == 0 && !source_lzop_sums_fit(s->flags, LZOP_ADLER_PLAIN, LZOP_CRC_PLAIN, &of_plain,
                                        s->plain, plain))
        r = damaged(in, "the checksum does not fit the block", err);
    s->at = 0;
    s->n = r == 0 ? plain : 0;
    if (r == 0 && s->usual == 0)
        s->usual = plain;
    if (r == 0 && (s->flags & (LZOP_ADLER_PLAIN | LZOP_CRC_PLAIN)))
        in->vouched = in->given + plain;
    return r;
}

/* Where a file may begin or all may end. */
static int take_magic(struct lzop_state *s, struct source_in *in, bool *end, struct dr_error *err)
{
    uint8_t magic[MAGIC_LEN];
    int r = source_in_fill(in, err);
    *end = in->end;
    if (r < 0 || in->end)
        return r;
    r = take(in, magic, sizeof(magic), err);
    if (r < 0)
        return r;
    if (!lzop_knows(magic, sizeof(magic)))
        return damaged(in, "no lzop file begins there", err);
    return take_header(s, in, err);
}

int source_lzop_header(struct source_in *in, bool any_sum, uint32_t *flags, bool *end,
                       struct dr_error *err)
{
    struct lzop_state s = {.any_sum = any_sum};
    int r = take_magic(&s, in, end, err);
    *flags = s.flags;
    return r;
}

static int lzop_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                     struct dr_error *err)
{
    struct lzop_state *s = state;
    bool end = false;
    int r = 0;
    while (r == 0 && s->at == s->n && !end) {
        uint32_t plain = 0;
        if (!s->inside) {
            r = take_magic(s, in, &end, err);
            continue;
        }
        in->begun = source_in_pos(in);
        r = take_u32(in, &plain, err);
        if (r == 0 && plain == 0)
            s->inside = false;
        else if (r == 0)
            r = take_block_body(s, in, plain, err);
    }
    if (r < 0)
        return r;
    *got = (size_t)dr_min(len, s->n - s->at);
    if (*got > 0)
        memcpy(buf, s->plain + s->at, *got);
    s->at += *got;
    return 0;
}

/* A block says how long it is, but that may be what is damaged: the next one begins with the same
 * plain size as the first. */
static int lzop_resume(void *state, struct source_in *in, struct dr_error *err)
{
    struct lzop_state *s = state;
    uint8_t size[4];
    if (!s->inside)
        return -ENODATA;
    put_be32(size, s->usual ? s->usual : LZOP_BLOCK_USUAL);
    s->at = s->n = 0;
    source_in_move(in, in->begun + 1);
    return source_in_find(in, size, sizeof(size), err);
}

const struct source_codec source_lzop = {
    .name = "lzop",
    .knows = lzop_knows,
    .open = lzop_open,
    .read = lzop_read,
    .resume = lzop_resume,
    .close = lzop_close,
};
