/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* bzip2 files for a salvage, block by block. A block begins with a number of 48 bits, at any bit,
 * and has a checksum of its own, but does not say how long it is: it ends where the next number
 * stands. Each is decoded alone, moved behind the header of a stream. What is in front of a number
 * and is no whole block is the damage, and reading can go on behind it. */
#include <bzlib.h>

#include "storage/source-codec.h"

#define BLOCK_NUMBER UINT64_C(0x314159265359)
#define END_NUMBER   UINT64_C(0x177245385090)
#define NUMBER_BITS  48u
#define PART_MAX     (4u << 20) /* bytes; a block has 900000 symbols of up to 20 bits */
#define HEAD_BITS    32u        /* "BZh9" */
#define SUM_BITS     32u

/* What stands between two numbers. */
enum part {
    PART_HEAD, /* in front of all of them */
    PART_BLOCK,
    PART_END /* of a stream, with the head of the next one */
};

struct blocks {
    bz_stream b;
    bool inside; /* b is in use */
    enum part part, next;
    uint8_t *raw; /* PART_MAX: of the part, from the byte on in which it begins */
    size_t n;
    bool too_long;
    uint64_t window;     /* the last 64 bits of the container */
    uint64_t bits;       /* of the container, up to here */
    uint64_t begin, end; /* of the part, bits */
    uint64_t next_begin;
    bool last;               /* the file ends with this part */
    uint32_t told, sum, all; /* checksums: of the block; so far; of the blocks of this stream */
    bool lost;               /* a block of this stream */
    uint8_t shifts[256];     /* by the byte in front of the last: may a number end here? */
    uint32_t table[256];
};

static bool blocks_knows(const uint8_t *magic, size_t len)
{
    return source_bzip2.knows(magic, len);
}

static void blocks_close(void *state)
{
    struct blocks *s = state;
    if (s->inside)
        BZ2_bzDecompressEnd(&s->b);
    free(s->raw);
    free(s);
}

/* bzip2's checksum takes the highest bit first. */
static void make_tables(struct blocks *s)
{
    for (uint32_t i = 0; i < 256; i++) {
        s->table[i] = i << 24;
        for (unsigned bit = 0; bit < 8; bit++)
            s->table[i] = s->table[i] << 1 ^ (s->table[i] >> 31 ? 0x04c11db7u : 0);
    }
    for (unsigned shift = 0; shift < 8; shift++) {
        s->shifts[BLOCK_NUMBER >> (8 - shift) & 0xff] = 1;
        s->shifts[END_NUMBER >> (8 - shift) & 0xff] = 1;
    }
}

static int blocks_open(const char *name, void **state, struct dr_error *err)
{
    struct blocks *s = calloc(1, sizeof(*s));
    if (!s || !(s->raw = malloc(PART_MAX))) {
        free(s);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    make_tables(s);
    *state = s;
    return 0;
}

static int damaged(struct blocks *s, const struct source_in *in, const char *what,
                   struct dr_error *err)
{
    s->lost = true;
    return dr_fail(err, EBADMSG, "%s: damaged bzip2 data before offset %llu: %s", in->name,
                   (unsigned long long)source_in_pos(in), what);
}

/* ------------------------------------------------------------------ from number to number */

/* Does a number end in the last byte? */
static bool number_ends(struct blocks *s)
{
    for (unsigned shift = 0; shift < 8; shift++) {
        uint64_t v = s->window >> shift & ((UINT64_C(1) << NUMBER_BITS) - 1);
        uint64_t before = s->bits - shift;
        if ((v != BLOCK_NUMBER && v != END_NUMBER) || before < s->begin + NUMBER_BITS)
            continue;
        s->next = v == BLOCK_NUMBER ? PART_BLOCK : PART_END;
        s->next_begin = before;
        s->end = before - NUMBER_BITS;
        return true;
    }
    return false;
}

static bool take_byte(struct blocks *s, uint8_t byte)
{
    s->window = s->window << 8 | byte;
    s->bits += 8;
    s->too_long = s->too_long || s->n == PART_MAX;
    if (!s->too_long)
        s->raw[s->n++] = byte;
    return s->shifts[s->window >> 8 & 0xff] && number_ends(s);
}

/* The next part into raw, up to the number behind it or the end of the file. */
static int gather(struct blocks *s, struct source_in *in, struct dr_error *err)
{
    for (bool found = false; !found;) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end) {
            s->last = true;
            s->end = s->bits;
            return 0;
        }
        while (in->at < in->n && !found)
            found = take_byte(s, in->buf[in->at++]);
    }
    return 0;
}

/* Its first bit comes to the first place. */
static void align(struct blocks *s)
{
    unsigned k = s->begin % 8;
    for (size_t i = 0; k > 0 && i < s->n; i++)
        s->raw[i] = (uint8_t)(s->raw[i] << k | (i + 1 < s->n ? s->raw[i + 1] : 0) >> (8 - k));
    s->n = (size_t)dr_min(s->n, (s->end - s->begin + 7) / 8);
}

static void begin_part(struct blocks *s)
{
    s->part = s->next;
    s->begin = s->next_begin;
    s->n = 0;
    s->too_long = false;
    if (s->begin % 8 > 0)
        s->raw[s->n++] = (uint8_t)s->window;
}

/* ------------------------------------------------------------------ parts */

static int begin_block(struct blocks *s, const struct source_in *in, struct dr_error *err)
{
    static const char head[] = "BZh9\x31\x41\x59\x26\x53\x59";
    if (s->too_long || s->n < 4)
        return damaged(s, in, "no block can be as long as that one", err);
    s->told = get_be32(s->raw);
    s->sum = UINT32_MAX;
    s->b = (bz_stream){.next_in = (char *)(uintptr_t)head, .avail_in = sizeof(head) - 1};
    if (BZ2_bzDecompressInit(&s->b, 0, 0) != BZ_OK)
        return dr_fail(err, ENOMEM, "%s: out of memory", in->name);
    s->inside = true;
    return 0;
}

static int check_head(struct blocks *s, const struct source_in *in, struct dr_error *err)
{
    return s->end == HEAD_BITS ? 0 : damaged(s, in, "a block's beginning cannot be found", err);
}

/* Behind the checksum of all blocks, from the next whole byte on, there is another stream or
 * nothing. */
static int check_end(struct blocks *s, const struct source_in *in, struct dr_error *err)
{
    uint64_t sum_end = dr_round_up(s->begin + SUM_BITS, 8);
    bool fits = s->end == sum_end + (s->last ? 0 : HEAD_BITS);
    bool same = s->lost || (s->n >= 4 && get_be32(s->raw) == s->all);
    s->all = 0;
    s->lost = false;
    if (!fits)
        return damaged(
            s, in, s->last ? "no bzip2 stream ends there" : "a block's beginning cannot be found",
            err);
    return same ? 0 : damaged(s, in, "the checksum of all blocks is wrong", err);
}

static int next_part(struct blocks *s, struct source_in *in, struct dr_error *err)
{
    int r = gather(s, in, err);
    if (r < 0)
        return r;
    align(s);
    return s->part == PART_BLOCK ? begin_block(s, in, err)
           : s->part == PART_END ? check_end(s, in, err)
                                 : check_head(s, in, err);
}

/* ------------------------------------------------------------------ one block */

static void add_sum(struct blocks *s, const uint8_t *p, size_t n)
{
    uint32_t sum = s->sum;
    for (size_t i = 0; i < n; i++)
        sum = sum << 8 ^ s->table[sum >> 24 ^ p[i]];
    s->sum = sum;
}

static void end_block(struct blocks *s)
{
    BZ2_bzDecompressEnd(&s->b);
    s->inside = false;
    s->all = (s->all << 1 | s->all >> 31) ^ s->told;
}

/* *got = 0: the block is through. Its last byte may have come although something that is no number
 * follows. */
static int decode_some(struct blocks *s, uint8_t *buf, size_t len, size_t *got, int *code)
{
    size_t room = (size_t)dr_min(len, 1u << 30);
    s->b.next_out = (char *)buf;
    s->b.avail_out = (unsigned)room;
    do {
        if (s->b.avail_in == 0 && s->b.next_in != (char *)s->raw + s->n) {
            s->b.next_in = (char *)s->raw;
            s->b.avail_in = (unsigned)s->n;
        }
        *code = BZ2_bzDecompress(&s->b);
    } while (*code == BZ_OK && s->b.avail_out == room && s->b.next_in != (char *)s->raw + s->n);
    *got = room - s->b.avail_out;
    add_sum(s, buf, *got);
    return *code == BZ_MEM_ERROR ? -ENOMEM : 0;
}

static int read_block(struct blocks *s, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                      struct dr_error *err)
{
    int code;
    if (decode_some(s, buf, len, got, &code) < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", in->name);
    bool right = ~s->sum == s->told;
    if (code == BZ_OK && *got > 0)
        return 0;
    if (right)
        in->vouched = in->given + *got;
    end_block(s);
    if (code == BZ_OK && right)
        return 0;
    return damaged(
        s, in, right ? "another block should begin there" : "its checksum or structure is wrong",
        err);
}

static int blocks_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                       struct dr_error *err)
{
    struct blocks *s = state;
    int r = 0;
    while (r == 0 && *got == 0) {
        if (s->inside)
            r = read_block(s, in, buf, len, got, err);
        else if (s->last && s->part == PART_END)
            return 0;
        else if (s->last)
            return dr_fail(err, EBADMSG,
                           "%s: ends at %llu inside its bzip2 data: the file was cut off", in->name,
                           (unsigned long long)in->next);
        else {
            if (s->bits > 0)
                begin_part(s);
            r = next_part(s, in, err);
        }
    }
    return r;
}

/* The damage is in the part that was gathered, and the next one begins behind it. */
static int blocks_resume(void *state, struct source_in *in, struct dr_error *err)
{
    const struct blocks *s = state;
    (void)in;
    (void)err;
    return s->last ? -ENODATA : 0;
}

const struct source_codec source_bzip2_blocks = {
    .name = "bzip2",
    .knows = blocks_knows,
    .open = blocks_open,
    .read = blocks_read,
    .resume = blocks_resume,
    .close = blocks_close,
};
