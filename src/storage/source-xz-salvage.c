/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* xz files for a salvage, block by block, from front to back, where no index can be read first: out
 * of a pipe, or of a file whose index is damaged.
 *
 * A block's header has a checksum of its own. Where it tells how long the block is, packed and
 * unpacked (`xz -T` and pixz write that), damage in the block costs this block: reading goes on
 * behind it. Any other damage costs all up to the next stream, which begins with a magic. Each
 * block vouches for its bytes with its own check. */
#include <lzma.h>

#include "storage/source-codec.h"

enum place {
    AT_STREAM, /* where a stream begins, or padding, or the end */
    AT_BLOCK,  /* where a block begins, or the index */
    IN_BLOCK,
    IN_INDEX
};

struct salvage {
    enum place place;
    lzma_stream_flags flags; /* of the stream */
    lzma_index_hash *hash;   /* of the blocks that came, which the index must list */
    lzma_stream x;           /* IN_BLOCK */
    lzma_block block;
    lzma_filter filters[LZMA_FILTERS_MAX + 1];
    uint64_t block_end; /* IN_BLOCK: offset in the container, as the header tells; 0: it does not */
    lzma_vli unpadded, plain; /* then: the sizes that the index has for it */
    uint64_t padding;         /* AT_STREAM: bytes of it that came */
    bool any;                 /* a stream has begun */
};

static bool salvage_knows(const uint8_t *magic, size_t len)
{
    return source_xz.knows(magic, len);
}

static void leave_block(struct salvage *s)
{
    lzma_end(&s->x);
    lzma_filters_free(s->filters, NULL);
}

static void salvage_close(void *state)
{
    struct salvage *s = state;
    leave_block(s);
    lzma_index_hash_end(s->hash, NULL);
    free(s);
}

static int salvage_open(const char *name, void **state, struct dr_error *err)
{
    struct salvage *s = calloc(1, sizeof(*s));
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    s->x = (lzma_stream)LZMA_STREAM_INIT;
    s->filters[0].id = LZMA_VLI_UNKNOWN;
    *state = s;
    return 0;
}

/* ------------------------------------------------------------------ reading */

static int cut_off(const struct source_in *in, struct dr_error *err)
{
    return dr_fail(err, EBADMSG, "%s: ends at %llu inside its xz data: the file was cut off",
                   in->name, (unsigned long long)in->next);
}

/* Exactly len bytes. */
static int take(struct source_in *in, uint8_t *buf, size_t len, struct dr_error *err)
{
    size_t got;
    int r = source_in_take(in, buf, len, &got, err);
    return r < 0 || got == len ? r : cut_off(in, err);
}

static int failed(const struct source_in *in, lzma_ret code, struct dr_error *err)
{
    return source_xz_failed(in->name, source_in_pos(in), (int)code, err);
}

/* The next byte, which stays. False: nothing comes any more. */
static int peek(struct source_in *in, bool *is, uint8_t *byte, struct dr_error *err)
{
    int r = source_in_fill(in, err);
    *is = r == 0 && !in->end;
    *byte = *is ? in->buf[in->at] : 0;
    return r;
}

/* ------------------------------------------------------------------ streams */

static int begin_stream(struct salvage *s, struct source_in *in, struct dr_error *err)
{
    uint8_t head[LZMA_STREAM_HEADER_SIZE];
    in->begun = source_in_pos(in);
    int r = take(in, head, sizeof(head), err);
    if (r < 0)
        return r;
    lzma_ret code = lzma_stream_header_decode(&s->flags, head);
    if (code == LZMA_OK && !lzma_check_is_supported(s->flags.check))
        code = LZMA_UNSUPPORTED_CHECK;
    if (code != LZMA_OK)
        return failed(in, code, err);
    lzma_index_hash *hash = lzma_index_hash_init(s->hash, NULL);
    if (!hash)
        return failed(in, LZMA_MEM_ERROR, err);
    s->hash = hash;
    s->any = true;
    s->place = AT_BLOCK;
    return 0;
}

/* Zeros between streams and behind the last one come by four. */
static int between_streams(struct salvage *s, struct source_in *in, bool *end, struct dr_error *err)
{
    uint8_t byte;
    bool is;
    int r;
    while ((r = peek(in, &is, &byte, err)) == 0 && is && byte == 0 && s->any) {
        s->padding++;
        in->at++;
    }
    if (r < 0)
        return r;
    bool odd = s->padding % 4 != 0;
    s->padding = 0;
    if (odd || (!is && !s->any)) {
        in->begun = source_in_pos(in) - 1;
        return failed(in, LZMA_DATA_ERROR, err);
    }
    *end = !is;
    return is ? begin_stream(s, in, err) : 0;
}

/* The index, then the footer, which repeats what the header says. */
static int read_index(struct salvage *s, struct source_in *in, struct dr_error *err)
{
    uint8_t foot[LZMA_STREAM_HEADER_SIZE];
    lzma_stream_flags flags;
    lzma_ret code = LZMA_OK;
    while (code == LZMA_OK) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end)
            return cut_off(in, err);
        code = lzma_index_hash_decode(s->hash, in->buf, &in->at, in->n);
        in->begun = source_in_pos(in) - 1;
    }
    if (code != LZMA_STREAM_END)
        return failed(in, code, err);
    int r = take(in, foot, sizeof(foot), err);
    if (r < 0)
        return r;
    code = lzma_stream_footer_decode(&flags, foot);
    if (code == LZMA_OK)
        code = lzma_stream_flags_compare(&s->flags, &flags);
    if (code == LZMA_OK && flags.backward_size != lzma_index_hash_size(s->hash))
        code = LZMA_DATA_ERROR;
    s->place = AT_STREAM;
    return code == LZMA_OK ? 0 : failed(in, code, err);
}

/* ------------------------------------------------------------------ blocks */

/* Where does the block end, and what will the index say of it? */
static void note_sizes(struct salvage *s, uint64_t begin)
{
    const lzma_block *b = &s->block;
    lzma_vli total = lzma_block_total_size(b);
    bool told = total != 0 && total != LZMA_VLI_UNKNOWN && b->uncompressed_size != LZMA_VLI_UNKNOWN;
    s->block_end = told ? begin + total : 0;
    s->unpadded = lzma_block_unpadded_size(b);
    s->plain = b->uncompressed_size;
}

static int begin_block(struct salvage *s, struct source_in *in, struct dr_error *err)
{
    uint8_t head[LZMA_BLOCK_HEADER_SIZE_MAX];
    uint64_t begin = in->begun = source_in_pos(in);
    leave_block(s);
    s->block_end = 0;
    s->block = (lzma_block){.version = 1, .check = s->flags.check, .filters = s->filters};
    int r = take(in, head, 1, err);
    if (r < 0)
        return r;
    if (head[0] == 0) {
        source_in_move(in, begin);
        s->place = IN_INDEX;
        return 0;
    }
    s->block.header_size = lzma_block_header_size_decode(head[0]);
    r = take(in, head + 1, s->block.header_size - 1, err);
    if (r < 0)
        return r;
    lzma_ret code = lzma_block_header_decode(&s->block, NULL, head);
    if (code != LZMA_OK) {
        s->filters[0].id = LZMA_VLI_UNKNOWN; /* the decoder has freed them */
        return failed(in, code, err);
    }
    note_sizes(s, begin);
    if (lzma_raw_decoder_memusage(s->filters) > SOURCE_XZ_MEMORY)
        code = LZMA_MEMLIMIT_ERROR;
    else
        code = lzma_block_decoder(&s->x, &s->block);
    s->place = IN_BLOCK;
    return code == LZMA_OK ? 0 : failed(in, code, err);
}

/* Some bytes of the block; none: it is through, and its check was right. */
static int read_block(struct salvage *s, struct source_in *in, uint8_t *buf, size_t len,
                      size_t *got, struct dr_error *err)
{
    lzma_ret code = LZMA_OK;
    s->x.next_out = buf;
    s->x.avail_out = len;
    while (code == LZMA_OK && s->x.avail_out == len) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end)
            return cut_off(in, err);
        s->x.next_in = in->buf + in->at;
        s->x.avail_in = in->n - in->at;
        code = lzma_code(&s->x, LZMA_RUN);
        in->at = in->n - s->x.avail_in;
    }
    *got = len - s->x.avail_out;
    if (code == LZMA_OK)
        return 0;
    in->begun = source_in_pos(in) - 1;
    if (code == LZMA_STREAM_END)
        code = lzma_index_hash_append(s->hash, lzma_block_unpadded_size(&s->block),
                                      s->block.uncompressed_size);
    if (code != LZMA_OK)
        return failed(in, code, err);
    if (s->flags.check != LZMA_CHECK_NONE)
        in->vouched = in->given + *got;
    s->place = AT_BLOCK;
    return 0;
}

static int salvage_read(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                        struct dr_error *err)
{
    struct salvage *s = state;
    bool end = false;
    int r = 0;
    while (r == 0 && *got == 0 && !end)
        r = s->place == AT_STREAM  ? between_streams(s, in, &end, err)
            : s->place == AT_BLOCK ? begin_block(s, in, err)
            : s->place == IN_INDEX ? read_index(s, in, err)
                                   : read_block(s, in, buf, len, got, err);
    return r;
}

/* ------------------------------------------------------------------ behind damage */

/* Forward to an offset of the container. -ENODATA: it ends before that. */
static int go_to(struct source_in *in, uint64_t pos, struct dr_error *err)
{
    while (source_in_pos(in) < pos) {
        int r = source_in_fill(in, err);
        if (r < 0)
            return r;
        if (in->end)
            return -ENODATA;
        in->at += (size_t)dr_min(in->n - in->at, pos - source_in_pos(in));
    }
    return 0;
}

static int next_stream(struct salvage *s, struct source_in *in, struct dr_error *err)
{
    s->place = AT_STREAM;
    s->padding = 0;
    source_in_move(in, in->begun + 1);
    return source_in_find(in, source_xz.magic, source_xz.magic_len, err);
}

/* The decoder takes no byte behind the end that the header tells. */
static int salvage_resume(void *state, struct source_in *in, struct dr_error *err)
{
    struct salvage *s = state;
    bool skips = s->place == IN_BLOCK && s->block_end > 0 &&
                 lzma_index_hash_append(s->hash, s->unpadded, s->plain) == LZMA_OK;
    if (!skips)
        return next_stream(s, in, err);
    s->place = AT_BLOCK;
    return go_to(in, s->block_end, err);
}

const struct source_codec source_xz_salvage = {
    .name = "xz",
    .knows = salvage_knows,
    .open = salvage_open,
    .read = salvage_read,
    .resume = salvage_resume,
    .close = salvage_close,
};
