/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The blocks of xz files, listed by the indexes at the ends of their streams, which have checksums.
 * `xz -T0` makes blocks of 24 MiB, and `xz --block-size` whatever is wanted.
 *
 * Where a salvage finds no good index, the headers of the blocks make the list, if they tell sizes
 * (`xz -T` writes that). They have checksums, too. */
#include <lzma.h>

#include "storage/source-pieces.h"

#define INDEX_MEMORY (UINT64_C(64) << 20)
#define READ_SIZE    ((size_t)64 << 10)

/* The indexes of all streams of f, joined. The decoder says where it wants to read. */
static int read_index(struct dr_file *f, lzma_stream *x, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(READ_SIZE);
    uint64_t at = 0;
    lzma_ret code = LZMA_OK;
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    while (code == LZMA_OK) {
        size_t got = 0;
        int r = 0;
        if (x->avail_in == 0) {
            r = dr_file_pread_short(f, buf, at, READ_SIZE, &got, err);
            at += got;
            x->next_in = buf;
            x->avail_in = got;
        }
        if (r < 0)
            return r;
        code = lzma_code(x, LZMA_RUN);
        if (code == LZMA_SEEK_NEEDED) {
            at = x->seek_pos;
            x->avail_in = 0;
            code = LZMA_OK;
        }
    }
    return code == LZMA_STREAM_END  ? 0
           : code == LZMA_MEM_ERROR ? dr_fail(err, ENOMEM, "%s: out of memory", f->path)
                                    : -ENOTSUP;
}

static int take_blocks(const lzma_index *index, struct source_pieces *s, struct dr_error *err)
{
    lzma_index_iter i;
    int r = 0;
    lzma_index_iter_init(&i, index);
    while (r == 0 && !lzma_index_iter_next(&i, LZMA_INDEX_ITER_BLOCK))
        r = i.stream.flags
                ? source_pieces_add(s, i.block.compressed_file_offset, i.block.total_size,
                                    i.block.uncompressed_size, i.stream.flags->check, err)
                : -ENOTSUP;
    return r;
}

static int find_by_index(struct dr_file *f, struct source_pieces *s, bool *has_index,
                         struct dr_error *err)
{
    lzma_stream x = LZMA_STREAM_INIT;
    lzma_index *index = NULL;
    if (lzma_file_info_decoder(&x, &index, INDEX_MEMORY, dr_file_size(f)) != LZMA_OK)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    int r = read_index(f, &x, err);
    *has_index = r == 0;
    if (r == 0)
        r = take_blocks(index, s, err);
    lzma_index_end(index, NULL);
    lzma_end(&x);
    return r;
}

/* ------------------------------------------------------------------ without an index */

/* The header of a block in the bytes at coded. The filters are freed by the caller. */
static lzma_ret read_header(lzma_block *b, const uint8_t *coded, size_t len)
{
    if (len == 0 || coded[0] == 0)
        return LZMA_DATA_ERROR;
    b->header_size = lzma_block_header_size_decode(coded[0]);
    return b->header_size < len ? lzma_block_header_decode(b, NULL, coded) : LZMA_DATA_ERROR;
}

/* The walk from header to header. */
struct walk {
    struct dr_file *f;
    struct source_pieces *s;
    uint64_t at;             /* offset in the container */
    lzma_stream_flags flags; /* of the stream */
    lzma_index_hash *hash;   /* of its blocks, which its index must list */
    uint8_t *buf;            /* READ_SIZE */
};

static int no_memory(const struct walk *w, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", w->f->path);
}

/* One more block. -ENODATA: no header that tells sizes is there. */
static int add_block(struct walk *w, struct dr_error *err)
{
    lzma_filter filters[LZMA_FILTERS_MAX + 1];
    lzma_block b = {.version = 1, .check = w->flags.check, .filters = filters};
    size_t got;
    int r = dr_file_pread_short(w->f, w->buf, w->at, LZMA_BLOCK_HEADER_SIZE_MAX + 1, &got, err);
    if (r < 0)
        return r;
    lzma_ret code = read_header(&b, w->buf, got);
    if (code != LZMA_OK)
        return code == LZMA_MEM_ERROR ? no_memory(w, err) : -ENODATA;
    lzma_filters_free(filters, NULL);
    lzma_vli total = lzma_block_total_size(&b);
    if (total == 0 || total == LZMA_VLI_UNKNOWN || b.uncompressed_size == LZMA_VLI_UNKNOWN ||
        lzma_index_hash_append(w->hash, lzma_block_unpadded_size(&b), b.uncompressed_size) !=
            LZMA_OK)
        return -ENODATA;
    r = source_pieces_add(w->s, w->at, total, b.uncompressed_size, (uint32_t)b.check, err);
    w->at += total;
    return r;
}

/* -ENODATA: none begins there. */
static int begin_stream(struct walk *w, struct dr_error *err)
{
    size_t got;
    int r = dr_file_pread_short(w->f, w->buf, w->at, LZMA_STREAM_HEADER_SIZE, &got, err);
    if (r < 0)
        return r;
    if (got < LZMA_STREAM_HEADER_SIZE || lzma_stream_header_decode(&w->flags, w->buf) != LZMA_OK)
        return -ENODATA;
    lzma_index_hash *hash = lzma_index_hash_init(w->hash, NULL);
    w->hash = hash ? hash : w->hash;
    w->at += LZMA_STREAM_HEADER_SIZE;
    return hash ? 0 : no_memory(w, err);
}

/* Behind the stream's index and footer. -ENODATA: the index is none, or damaged. */
static int pass_index(struct walk *w, struct dr_error *err)
{
    lzma_ret code = LZMA_OK;
    while (code == LZMA_OK) {
        size_t got, used = 0;
        int r = dr_file_pread_short(w->f, w->buf, w->at, READ_SIZE, &got, err);
        if (r < 0)
            return r;
        code = got > 0 ? lzma_index_hash_decode(w->hash, w->buf, &used, got) : LZMA_DATA_ERROR;
        w->at += used;
    }
    w->at += LZMA_STREAM_HEADER_SIZE; /* the footer is as long */
    return code == LZMA_STREAM_END ? 0 : -ENODATA;
}

/* The blocks of all streams that follow each other. -ENODATA: at w->at it is not known how to go
 * on. */
static int walk_headers(struct walk *w, struct dr_error *err)
{
    int r = begin_stream(w, err);
    while (r == 0) {
        while ((r = add_block(w, err)) == 0)
            continue;
        uint64_t at = w->at;
        if (r == -ENODATA && (r = pass_index(w, err)) == -ENODATA)
            w->at = at;
        if (r == 0 && w->at == dr_file_size(w->f))
            return 0;
        if (r == 0)
            r = begin_stream(w, err);
    }
    return r;
}

static int find_by_headers(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(READ_SIZE);
    struct walk w = {.f = f, .s = s, .buf = buf};
    int r = buf ? walk_headers(&w, err) : no_memory(&w, err);
    lzma_index_hash_end(w.hash, NULL);
    if (r != -ENODATA)
        return r;
    uint64_t size = dr_file_size(f);
    return source_pieces_end(s, dr_min(w.at, size),
                             w.at < size ? "no block that tells its sizes begins there, and no "
                                           "index of the blocks"
                                         : "the file was cut off there");
}

/* Without an index an archive is better read from front to back: its reader tells the damage, and
 * goes on behind it in other streams. */
static int find_blocks(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    bool has_index = false;
    int r = find_by_index(f, s, &has_index, err);
    if (r == -ENOTSUP && !has_index && source_pieces_salvaging(s) && !source_pieces_bridging(s))
        r = find_by_headers(f, s, err);
    return r;
}

/* ------------------------------------------------------------------ one block */

static int run_block(lzma_block *b, const uint8_t *coded, size_t coded_len, uint8_t *plain,
                     size_t plain_len, size_t *good)
{
    lzma_stream x = LZMA_STREAM_INIT;
    lzma_ret code = lzma_block_decoder(&x, b);
    if (code == LZMA_OK) {
        x.next_in = coded + b->header_size;
        x.avail_in = coded_len - b->header_size;
        x.next_out = plain;
        x.avail_out = plain_len;
        code = lzma_code(&x, LZMA_FINISH);
        *good = plain_len - x.avail_out;
    }
    lzma_end(&x);
    if (code == LZMA_MEM_ERROR)
        return -ENOMEM;
    return code == LZMA_STREAM_END && *good == plain_len ? 0 : -EBADMSG;
}

static int decode(const struct source_piece *p, uint32_t common, const uint8_t *coded,
                  uint8_t *plain, size_t plain_len, size_t *good)
{
    lzma_filter filters[LZMA_FILTERS_MAX + 1];
    lzma_block b = {.version = 1, .check = (lzma_check)p->word, .filters = filters};
    (void)common;
    lzma_ret code = read_header(&b, coded, p->coded_len);
    if (code != LZMA_OK)
        return code == LZMA_MEM_ERROR ? -ENOMEM : -EBADMSG;
    int r = lzma_raw_decoder_memusage(filters) > SOURCE_XZ_MEMORY
                ? -EBADMSG
                : run_block(&b, coded, p->coded_len, plain, plain_len, good);
    lzma_filters_free(filters, NULL);
    return r;
}

const struct source_piece_packer source_xz_blocks = {
    .name = "xz",
    .find = find_blocks,
    .decode = decode,
};
