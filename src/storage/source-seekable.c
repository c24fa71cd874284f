/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* zstd files of several frames that are decoded each by itself: listed by a seek table, the last
 * frame, which others skip; or, without one, by the header of each frame and the sizes of its
 * blocks, if the headers tell how much is in the frames. */
#include <xxhash.h>
#include <zstd.h>

#include "storage/source-pieces.h"

#define TABLE_MAGIC  0x184d2a5eu
#define FOOTER_MAGIC 0x8f92eab1u
#define FRAME_HEAD   8u /* magic and length of a frame to be skipped */
#define FOOTER       9u /* number of frames, descriptor, magic */
#define HAS_SUMS     0x80u
#define RESERVED     0x7cu
#define PIECE        5461u /* entries of the table read at once: 64 KiB */
#define HEADER_MAX   18u   /* of a frame */

/* ------------------------------------------------------------------ decoding one frame */

/* What comes out of a damaged frame up to where that is noticed. */
static size_t decode_begin(const uint8_t *coded, size_t coded_len, uint8_t *plain, size_t plain_len)
{
    ZSTD_DStream *z = ZSTD_createDStream();
    ZSTD_inBuffer in = {.src = coded};
    ZSTD_outBuffer out = {.dst = plain, .size = plain_len};
    size_t wanted = z ? 5 : 0;
    while (wanted > 0 && !ZSTD_isError(wanted) && in.pos < coded_len) {
        in.size = in.pos + dr_min(wanted, coded_len - in.pos); /* one block */
        wanted = ZSTD_decompressStream(z, &out, &in);
    }
    ZSTD_freeDStream(z);
    return out.pos;
}

static int decode(const struct source_piece *p, uint32_t has_sums, const uint8_t *coded,
                  uint8_t *plain, size_t plain_len, size_t *good)
{
    size_t n = ZSTD_decompress(plain, plain_len, coded, p->coded_len);
    if (!ZSTD_isError(n) && n == plain_len &&
        (!has_sums || (uint32_t)XXH64(plain, n, 0) == p->word))
        return 0;
    *good = decode_begin(coded, p->coded_len, plain, plain_len);
    return -EBADMSG;
}

/* ------------------------------------------------------------------ the table */

struct table {
    uint32_t n;
    unsigned entry;    /* bytes */
    uint64_t at, size; /* of its entries; of the file */
    uint32_t first;    /* the length of the first frame */
};

static int bad_table(const struct dr_file *f, const char *what, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: bad seek table at its end: %s", f->path, what);
}

static int find_table(struct dr_file *f, struct table *t, struct dr_error *err)
{
    uint8_t foot[FOOTER], head[FRAME_HEAD];
    t->size = dr_file_size(f);
    if (t->size < FRAME_HEAD + FOOTER)
        return -ENOTSUP;
    int r = dr_file_pread(f, foot, t->size - FOOTER, FOOTER, err);
    if (r < 0)
        return r;
    if (get_le32(foot + 5) != FOOTER_MAGIC)
        return -ENOTSUP;
    t->n = get_le32(foot);
    t->entry = foot[4] & HAS_SUMS ? 12 : 8;
    if (foot[4] & RESERVED)
        return bad_table(f, "it has bits of a version that is not known", err);
    uint64_t len = (uint64_t)t->n * t->entry + FOOTER;
    if (t->n > SOURCE_PIECES_MAX || len + FRAME_HEAD > t->size)
        return bad_table(f, "it lists more frames than there can be", err);
    t->at = t->size - len;
    r = dr_file_pread(f, head, t->at - FRAME_HEAD, FRAME_HEAD, err);
    if (r == 0 && (get_le32(head) != TABLE_MAGIC || get_le32(head + 4) != len))
        r = bad_table(f, "it does not begin where it should", err);
    return r;
}

/* What a frame of another length than the first says of itself: if the table lied, all that is
 * behind it would come out displaced. Frames that say nothing are found out when they are read. */
static int check_odd(struct dr_file *f, uint64_t at, uint32_t plain, struct dr_error *err)
{
    uint8_t head[HEADER_MAX];
    size_t got;
    int r = dr_file_pread_short(f, head, at, sizeof(head), &got, err);
    if (r < 0)
        return r;
    unsigned long long own = ZSTD_getFrameContentSize(head, got);
    return own == plain || own == ZSTD_CONTENTSIZE_UNKNOWN || own == ZSTD_CONTENTSIZE_ERROR
               ? 0
               : bad_table(f, "it has another length for a frame than that has", err);
}

/* n entries from raw; *at is the offset in the container of the next frame. */
static int take_entries(struct dr_file *f, struct source_pieces *s, const uint8_t *raw, size_t n,
                        struct table *t, uint64_t *at, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; i < n && r == 0; i++, raw += t->entry) {
        uint32_t coded = get_le32(raw), plain = get_le32(raw + 4);
        if (*at == 0)
            t->first = plain;
        if (plain != t->first && !source_pieces_salvaging(s))
            r = check_odd(f, *at, plain, err);
        if (r == 0)
            r = source_pieces_add(s, *at, coded, plain, t->entry > 8 ? get_le32(raw + 8) : 0, err);
        *at += coded;
    }
    return r;
}

static int find_by_table(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    struct table t = {0};
    uint64_t at = 0;
    int r = find_table(f, &t, err);
    if (r < 0)
        return r;
    CLEANUP_FREE uint8_t *raw = malloc((size_t)PIECE * t.entry);
    if (!raw)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    source_pieces_common(s, t.entry > 8);
    for (size_t i = 0, n; i < t.n && r == 0; i += n) {
        n = (size_t)dr_min(PIECE, t.n - i);
        r = dr_file_pread(f, raw, t.at + (uint64_t)i * t.entry, n * t.entry, err);
        if (r == 0)
            r = take_entries(f, s, raw, n, &t, &at, err);
    }
    if (r == -ENOTSUP)
        return bad_table(f, "it has a frame too large to be decoded at once", err);
    if (r == 0 && at != t.at - FRAME_HEAD)
        r = bad_table(f, "its frames do not make up the file", err);
    return r;
}

const struct source_piece_packer source_zstd_table = {
    .name = "zstd",
    .find = find_by_table,
    .decode = decode,
    .proof_for_salvage = true,
};

/* ------------------------------------------------------------------ frame by frame */

#define BLOCK_HEAD 3u

/* The header, up to the first block; 0: that is no header. */
static unsigned header_len(const uint8_t *p, size_t len)
{
    static const uint8_t size[] = {0, 2, 4, 8}, dictionary[] = {0, 1, 2, 4};
    if (len < 6 || get_le32(p) != ZSTD_MAGICNUMBER || (p[4] & 8))
        return 0;
    bool single = p[4] & 0x20;
    unsigned content = size[p[4] >> 6] ? size[p[4] >> 6] : single;
    return 5u + (single ? 0 : 1) + dictionary[p[4] & 3] + content;
}

/* Where the frame's blocks end that begin at *at; -EBADMSG: they do not. */
static int pass_blocks(struct dr_file *f, bool checked, uint64_t *at, struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    for (bool last = false; !last;) {
        uint8_t raw[4] = {0};
        size_t got;
        int r = dr_file_pread_short(f, raw, *at, BLOCK_HEAD, &got, err);
        uint32_t head = get_le32(raw);
        if (r < 0)
            return r;
        if (got < BLOCK_HEAD || (head >> 1 & 3) == 3)
            return -EBADMSG;
        last = head & 1;
        *at += BLOCK_HEAD + ((head >> 1 & 3) == 1 ? 1 : head >> 3);
    }
    *at += checked ? 4 : 0;
    return *at <= size ? 0 : -EBADMSG;
}

/* The frame at *at, which moves behind it. */
static int take_frame(struct dr_file *f, struct source_pieces *s, uint64_t *at,
                      struct dr_error *err)
{
    uint8_t raw[HEADER_MAX];
    uint64_t begin = *at;
    size_t got;
    int r = dr_file_pread_short(f, raw, begin, sizeof(raw), &got, err);
    if (r < 0)
        return r;
    if (got >= FRAME_HEAD &&
        (get_le32(raw) & ZSTD_MAGIC_SKIPPABLE_MASK) == ZSTD_MAGIC_SKIPPABLE_START) {
        *at += FRAME_HEAD + get_le32(raw + 4);
        return 0;
    }
    unsigned head = header_len(raw, got);
    unsigned long long plain = ZSTD_getFrameContentSize(raw, got);
    if (head == 0 || plain == ZSTD_CONTENTSIZE_ERROR)
        return -EBADMSG;
    if (plain == ZSTD_CONTENTSIZE_UNKNOWN || plain > SOURCE_PIECE_PLAIN_MAX)
        return -ENOTSUP;
    *at += head;
    r = pass_blocks(f, raw[4] & 4, at, err);
    return r < 0 ? r : source_pieces_add(s, begin, *at - begin, plain, 0, err);
}

/* From a frame that is none on to the next one. -EBADMSG: there is none. */
static int pass_gap(struct dr_file *f, struct source_pieces *s, uint64_t begin, uint64_t *at,
                    struct dr_error *err)
{
    static const uint8_t magic[] = {0x28, 0xb5, 0x2f, 0xfd};
    int r = source_pieces_gap(s, begin, at, err);
    if (r == 0)
        r = source_pieces_search(f, magic, sizeof(magic), at, err);
    return r == -ENOTSUP || r == -ENODATA ? -EBADMSG : r;
}

static int find_by_frames(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    uint64_t size = dr_file_size(f), begin = 0;
    int r = 0;
    for (uint64_t at = 0; at < size && r == 0;) {
        begin = at;
        r = take_frame(f, s, &at, err);
        if (r == 0 && at > size)
            r = -EBADMSG;
        if (r == -EBADMSG)
            r = pass_gap(f, s, begin, &at, err);
    }
    return r == -EBADMSG ? source_pieces_end(s, begin, "no zstd frame can be read there") : r;
}

const struct source_piece_packer source_zstd_frames = {
    .name = "zstd",
    .find = find_by_frames,
    .decode = decode,
    .unproven = true,
};
