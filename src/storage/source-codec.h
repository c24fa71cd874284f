/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The interface between source.c and the decoders: both sides hand bytes over in pieces of any
 * length. */
#ifndef DR_STORAGE_SOURCE_CODEC_H
#define DR_STORAGE_SOURCE_CODEC_H

#include "storage/source.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define SOURCE_PIECE (128u << 10) /* the most that is taken from the container at once */
#define SOURCE_MAGIC 9u           /* bytes by which every kind is known */

/* The container's bytes, still compressed. Bytes at to n of buf were read and are not decoded
 * yet. */
struct source_in {
    const char *name;     /* for messages */
    struct dr_file *file; /* or NULL: read from fd */
    int fd;
    const volatile int *stop; /* dr_source_stop_by() */
    uint64_t next;            /* offset in the container of what is behind buf[n] */
    uint8_t *buf;             /* SOURCE_PIECE */
    size_t at, n;
    bool end;         /* nothing comes behind buf[n] */
    uint64_t begun;   /* offset in the container where the frame, member or block began; the
                         decoder's, who tells of each */
    uint64_t given;   /* plain bytes that all reads of the decoder before this one gave out */
    uint64_t vouched; /* a checksum was right for the first so many plain bytes; the decoder's */
};

static inline uint64_t source_in_pos(const struct source_in *in)
{
    return in->next - (in->n - in->at);
}

/* Read more if the buffer is empty. Afterwards at < n, or end is set. */
int source_in_fill(struct source_in *in, struct dr_error *err);
/* Go back to this offset of the container, or as far as its bytes are still there; or forward to
 * it, up to what was not read yet. */
void source_in_move(struct source_in *in, uint64_t pos);
/* Go on to where these bytes are next, from here on. -ENODATA (silently): nowhere. */
int source_in_find(struct source_in *in, const uint8_t *magic, size_t len, struct dr_error *err);
/* Exactly len bytes into buf, fewer only at the end. */
int source_in_take(struct source_in *in, void *buf, size_t len, size_t *got, struct dr_error *err);

struct source_codec {
    const char *name;
    bool (*knows)(const uint8_t *magic, size_t len); /* len <= SOURCE_MAGIC: all there is */
    int (*open)(const char *name, void **state, struct dr_error *err);
    /* Some of the plain bytes (1..len); *got = 0: the end, and everything was complete. *got is 0
     * before the call. After a failure *got are those that came before it, and only close is
     * called. */
    int (*read)(void *state, struct source_in *in, uint8_t *buf, size_t len, size_t *got,
                struct dr_error *err);
    /* After a failure (damage): read goes on with what is whole behind that; -ENODATA (silently):
     * there is no more. NULL = the decoder is opened again where magic is next. */
    int (*resume)(void *state, struct source_in *in, struct dr_error *err);
    uint8_t magic[6];
    size_t magic_len;
    void (*close)(void *state);
};

extern const struct source_codec source_zstd, source_gzip, source_bzip2, source_lzop, source_xz,
    source_lz4;
/* For a salvage, in place of source_bzip2 and source_xz. */
extern const struct source_codec source_bzip2_blocks, source_xz_salvage;

/* What xz may take to decode a stream: `xz -9` takes 65 MiB. */
#define SOURCE_XZ_MEMORY (256u << 20)
/* Say what a lzma_ret means for the data before an offset of the file. */
int source_xz_failed(const char *name, uint64_t at, int code, struct dr_error *err);

#endif
