/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/codec.h"

#include <errno.h>
#include <libdeflate.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <zlib.h>
#include <zstd.h>

#define READ_WINDOW  (-15) /* negative: raw deflate */
#define WRITE_WINDOW (-12)
#define WRITE_MEMORY 9
#define KEPT         16u            /* contexts of a kind */
#define DCTX_MAX     (1024u * 1024) /* a frame with a large window may make a context larger */

/* ------------------------------------------------------------------ contexts
 *
 * Each kind is made and freed by the functions in `kinds`. */

enum kind { INFLATE, DEFLATE, UNZSTD, ZSTD, ZLIB, KINDS = ZLIB + DR_ZLIB_MAX };

static void *new_inflate(void)
{
    return libdeflate_alloc_decompressor();
}

static void free_inflate(void *context)
{
    libdeflate_free_decompressor(context);
}

static void *new_deflate(void)
{
    z_stream *z = calloc(1, sizeof(*z));
    if (z && deflateInit2(z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, WRITE_WINDOW, WRITE_MEMORY,
                          Z_DEFAULT_STRATEGY) != Z_OK) {
        free(z);
        return NULL;
    }
    return z;
}

static void free_deflate(void *context)
{
    deflateEnd(context);
    free(context);
}

static void *new_unzstd(void)
{
    return ZSTD_createDCtx();
}

static void free_unzstd(void *context)
{
    ZSTD_freeDCtx(context);
}

static void *new_zstd(void)
{
    return ZSTD_createCCtx();
}

static void free_zstd(void *context)
{
    ZSTD_freeCCtx(context);
}

/* ZLIB is a kind for each level. */
static void *new_zlib(int level)
{
    return libdeflate_alloc_compressor(level);
}

static void free_zlib(void *context)
{
    libdeflate_free_compressor(context);
}

static const struct {
    void *(*make)(void);
    void (*destroy)(void *context);
} kinds[ZLIB] = {
    [INFLATE] = {new_inflate, free_inflate},
    [DEFLATE] = {new_deflate, free_deflate},
    [UNZSTD] = {new_unzstd, free_unzstd},
    [ZSTD] = {new_zstd, free_zstd},
};

static struct {
    pthread_mutex_t lock;
    struct {
        void *idle[KEPT];
        unsigned n;
    } of[KINDS];
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* NULL: no memory. */
static void *take(unsigned kind)
{
    pthread_mutex_lock(&pool.lock);
    void *context = pool.of[kind].n ? pool.of[kind].idle[--pool.of[kind].n] : NULL;
    pthread_mutex_unlock(&pool.lock);
    if (context)
        return context;
    return kind < ZLIB ? kinds[kind].make() : new_zlib((int)kind - ZLIB + 1);
}

static void give_back(unsigned kind, void *context)
{
    pthread_mutex_lock(&pool.lock);
    bool keep = context && pool.of[kind].n < KEPT;
    if (keep)
        pool.of[kind].idle[pool.of[kind].n++] = context;
    pthread_mutex_unlock(&pool.lock);
    if (context && !keep)
        (kind < ZLIB ? kinds[kind].destroy : free_zlib)(context);
}

/* ------------------------------------------------------------------ deflate */

/* zlib also gives what a stream without an end, or one that goes on behind out_len, has so far. */
static size_t inflate_by_zlib(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    z_stream z = {.next_in = (Bytef *)(uintptr_t)in,
                  .avail_in = (uInt)in_len,
                  .next_out = out,
                  .avail_out = (uInt)out_len};
    if (inflateInit2(&z, READ_WINDOW) != Z_OK)
        return 0;
    int r;
    do
        r = inflate(&z, Z_FINISH);
    while (r == Z_OK);
    inflateEnd(&z);
    return out_len - z.avail_out;
}

size_t dr_inflate(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    void *context = take(INFLATE);
    size_t got = 0;
    bool whole = context && libdeflate_deflate_decompress(context, in, in_len, out, out_len,
                                                          &got) == LIBDEFLATE_SUCCESS;
    give_back(INFLATE, context);
    return whole ? got : inflate_by_zlib(in, in_len, out, out_len);
}

int64_t dr_deflate_4k(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap)
{
    z_stream *z = take(DEFLATE);
    if (!z)
        return -ENOMEM;
    deflateReset(z);
    z->next_in = (Bytef *)(uintptr_t)in;
    z->avail_in = (uInt)in_len;
    z->next_out = out;
    z->avail_out = (uInt)out_cap;
    int64_t len = deflate(z, Z_FINISH) == Z_STREAM_END ? (int64_t)(out_cap - z->avail_out)
                                                       : -ENOTSUP;
    give_back(DEFLATE, z);
    return len;
}

bool dr_is_zlib(const uint8_t *in, size_t in_len)
{
    return in_len >= 2 && (in[0] & 15) == 8 && (in[0] << 8 | in[1]) % 31 == 0;
}

int64_t dr_unzlib(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    void *context = take(INFLATE);
    size_t got = 0;
    if (!context)
        return -1;
    enum libdeflate_result r =
        dr_is_zlib(in, in_len)
            ? libdeflate_zlib_decompress(context, in, in_len, out, out_len, &got)
            : libdeflate_deflate_decompress(context, in, in_len, out, out_len, &got);
    give_back(INFLATE, context);
    return r == LIBDEFLATE_SUCCESS ? (int64_t)got : -1;
}

int64_t dr_zlib(const uint8_t *in, size_t in_len, int level, uint8_t *out, size_t out_cap)
{
    unsigned kind = (unsigned)(ZLIB + level - 1);
    void *context = take(kind);
    if (!context)
        return -ENOMEM;
    size_t len = libdeflate_zlib_compress(context, in, in_len, out, out_cap);
    give_back(kind, context);
    return len > 0 ? (int64_t)len : -ENOTSUP;
}

size_t dr_zlib_bound(size_t in_len)
{
    return libdeflate_zlib_compress_bound(NULL, in_len);
}

/* ------------------------------------------------------------------ zstd */

size_t dr_unzstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    ZSTD_DCtx *context = take(UNZSTD);
    ZSTD_inBuffer from = {in, in_len, 0};
    ZSTD_outBuffer to = {out, out_len, 0};
    if (context)
        ZSTD_DCtx_reset(context, ZSTD_reset_session_only);
    for (size_t r = 1, before; context && r > 0 && to.pos < to.size;) {
        before = to.pos + from.pos;
        r = ZSTD_decompressStream(context, &to, &from);
        if (ZSTD_isError(r) || to.pos + from.pos == before)
            break;
    }
    if (context && ZSTD_sizeof_DCtx(context) > DCTX_MAX)
        ZSTD_freeDCtx(context);
    else
        give_back(UNZSTD, context);
    return to.pos;
}

int64_t dr_zstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap)
{
    ZSTD_CCtx *context = take(ZSTD);
    if (!context)
        return -ENOMEM;
    size_t r = ZSTD_compressCCtx(context, out, out_cap, in, in_len, ZSTD_CLEVEL_DEFAULT);
    give_back(ZSTD, context);
    return ZSTD_isError(r) ? -ENOTSUP : (int64_t)r;
}
