/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The blocks of lzop files, found by going from header to header: each has both its sizes in front
 * of its checksums, and lzop makes all but the last one of 256 KiB. */
#include <lzo/lzo1x.h>

#include "base/notice.h"
#include "storage/source-lzop.h"
#include "storage/source-pieces.h"

/* The sizes and checksums in front of a block's data. */
struct head {
    uint32_t plain, coded, len; /* len: of the head */
    struct lzop_sums of_plain, of_coded;
};

/* A checksum, if the flags announce it, and 0 if not. */
static uint32_t take_sum(uint32_t flags, uint32_t flag, const uint8_t *p, uint32_t *at)
{
    if (!(flags & flag))
        return 0;
    *at += 4;
    return get_be32(p + *at - 4);
}

#define HEAD_MAX 24u

/* p has HEAD_MAX bytes. False: no block begins like this. */
static bool take_head(uint32_t flags, const uint8_t *p, struct head *h)
{
    *h = (struct head){.plain = get_be32(p), .coded = get_be32(p + 4), .len = 8};
    if (h->plain > LZOP_BLOCK_MAX || h->coded > h->plain || h->coded == 0)
        return false;
    h->of_plain.adler = take_sum(flags, LZOP_ADLER_PLAIN, p, &h->len);
    h->of_plain.crc = take_sum(flags, LZOP_CRC_PLAIN, p, &h->len);
    if (h->coded < h->plain) {
        h->of_coded.adler = take_sum(flags, LZOP_ADLER_CODED, p, &h->len);
        h->of_coded.crc = take_sum(flags, LZOP_CRC_CODED, p, &h->len);
    }
    return true;
}

/* The header at *at, behind which *at moves. A salvage takes one whose checksum is wrong, if the
 * blocks have some: where what it says is wrong, too, those do not fit. */
static int take_header(struct dr_file *f, const struct source_pieces *s, uint8_t *buf, uint64_t *at,
                       uint32_t *flags, bool *end, struct dr_error *err)
{
    struct source_in in = {.name = f->path, .file = f, .fd = -1, .next = *at, .buf = buf};
    int r = source_lzop_header(&in, false, flags, end, err);
    if (r == -EBADMSG && source_pieces_salvaging(s)) {
        dr_error_reset(err);
        in = (struct source_in){.name = f->path, .file = f, .fd = -1, .next = *at, .buf = buf};
        r = source_lzop_header(&in, true, flags, end, err);
        if (r == 0 && !*end && !(*flags & (LZOP_ADLER_PLAIN | LZOP_CRC_PLAIN)))
            return dr_fail(err, EBADMSG, "%s: neither its header nor its blocks have a checksum",
                           f->path);
        if (r == 0)
            dr_notice(
                "%s: the checksum of the lzop header at offset %llu is wrong: what it says is "
                "used all the same",
                f->path, (unsigned long long)*at);
    }
    *at = source_in_pos(&in);
    return r;
}

struct walk {
    uint8_t *buf;    /* SOURCE_PIECE */
    uint32_t flags;  /* of the last header */
    uint32_t usual;  /* plain bytes of the first block; 0 = there was none */
    bool end;        /* of the file */
    const char *why; /* there is no block */
};

static int no_block(struct walk *w, const char *why)
{
    w->why = why;
    return -EBADMSG;
}

/* Behind a header, up to the number that ends the blocks. -EBADMSG: no block is at *at, and why. */
static int take_blocks(struct dr_file *f, struct source_pieces *s, struct walk *w, uint64_t *at,
                       struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    for (;;) {
        uint8_t raw[HEAD_MAX];
        struct head h;
        size_t got;
        int r = dr_file_pread_short(f, raw, *at, sizeof(raw), &got, err);
        if (r < 0)
            return r;
        if (got >= 4 && get_be32(raw) == 0) {
            *at += 4;
            return 0;
        }
        if (got >= 4 && got < 8)
            return no_block(w, "the file was cut off");
        if (!take_head(w->flags, raw, &h))
            return no_block(w, "a block of impossible size");
        if (*at + h.len + h.coded > size)
            return no_block(w, "the file was cut off");
        r = source_pieces_add(s, *at, h.len + (uint64_t)h.coded, h.plain, w->flags, err);
        if (r < 0)
            return r;
        w->usual = w->usual ? w->usual : h.plain;
        *at += h.len + h.coded;
    }
}

/* A header and its blocks. */
static int take_file(struct dr_file *f, struct source_pieces *s, struct walk *w, uint64_t *at,
                     struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    uint64_t begin = *at;
    uint32_t flags;
    int r = take_header(f, s, w->buf, at, &flags, &w->end, &why);
    if (r == -EBADMSG || r == -ENOTSUP) {
        *at = begin;
        return no_block(w, "no lzop file begins there");
    }
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    w->flags = flags;
    return w->end ? 0 : take_blocks(f, s, w, at, err);
}

/* From what is no block on to the next one, which begins with the same plain size as the first.
 * -ENOTSUP: there is none. */
static int pass_gap(struct dr_file *f, struct source_pieces *s, const struct walk *w, uint64_t *at,
                    struct dr_error *err)
{
    uint8_t magic[4];
    uint64_t next;
    put_be32(magic, w->usual);
    int r = source_pieces_gap(s, *at, &next, err);
    if (r == 0)
        r = source_pieces_search(f, magic, sizeof(magic), &next, err);
    if (r == 0)
        *at = next;
    return r == -ENODATA ? -ENOTSUP : r;
}

static int find_blocks(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(SOURCE_PIECE);
    struct walk w = {.buf = buf};
    int r = buf && lzo_init() == LZO_E_OK ? 0 : -ENOMEM;
    for (uint64_t at = 0; r == 0 && !w.end;) {
        r = take_file(f, s, &w, &at, err);
        while (r == -EBADMSG) {
            r = pass_gap(f, s, &w, &at, err);
            if (r == -ENOTSUP)
                return source_pieces_end(s, at, w.why);
            if (r == 0)
                r = take_blocks(f, s, &w, &at, err);
        }
    }
    return r;
}

static int decode(const struct source_piece *p, uint32_t common, const uint8_t *coded,
                  uint8_t *plain, size_t plain_len, size_t *good)
{
    uint8_t raw[HEAD_MAX] = {0};
    lzo_uint n = plain_len;
    struct head h;
    (void)common;
    (void)good; /* each block is whole or nothing */
    memcpy(raw, coded, dr_min(p->coded_len, sizeof(raw)));
    if (!take_head(p->word, raw, &h) || h.plain != plain_len ||
        h.len + (uint64_t)h.coded != p->coded_len)
        return -EBADMSG;
    const uint8_t *data = coded + h.len;
    if (h.coded == h.plain)
        memcpy(plain, data, plain_len);
    else if (!source_lzop_sums_fit(p->word, LZOP_ADLER_CODED, LZOP_CRC_CODED, &h.of_coded, data,
                                   h.coded) ||
             lzo1x_decompress_safe(data, h.coded, plain, &n, NULL) != LZO_E_OK || n != plain_len)
        return -EBADMSG;
    return source_lzop_sums_fit(p->word, LZOP_ADLER_PLAIN, LZOP_CRC_PLAIN, &h.of_plain, plain,
                                plain_len)
               ? 0
               : -EBADMSG;
}

const struct source_piece_packer source_lzop_blocks = {
    .name = "lzop",
    .find = find_blocks,
    .decode = decode,
    .unproven = true,
};
