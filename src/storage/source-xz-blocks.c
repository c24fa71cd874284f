/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The blocks of xz files, listed by the indexes at the ends of their streams, which have checksums.
 * `xz -T0` makes blocks of 24 MiB, and `xz --block-size` whatever is wanted. */
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

static int find_by_index(struct dr_file *f, struct source_pieces *s, struct dr_error *err)
{
    lzma_stream x = LZMA_STREAM_INIT;
    lzma_index *index = NULL;
    if (lzma_file_info_decoder(&x, &index, INDEX_MEMORY, dr_file_size(f)) != LZMA_OK)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    int r = read_index(f, &x, err);
    if (r == 0)
        r = take_blocks(index, s, err);
    lzma_index_end(index, NULL);
    lzma_end(&x);
    return r;
}

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
    if (p->coded_len == 0 || coded[0] == 0)
        return -EBADMSG;
    b.header_size = lzma_block_header_size_decode(coded[0]);
    if (b.header_size >= p->coded_len)
        return -EBADMSG;
    lzma_ret code = lzma_block_header_decode(&b, NULL, coded);
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
    .find = find_by_index,
    .decode = decode,
};
