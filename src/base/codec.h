/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Buffers that are compressed or decompressed by one call.
 *
 * A library's context costs as much to make as a small buffer to decode, so a few of each kind are
 * kept for later calls, for the whole process. All functions may be called by several threads. */
#ifndef DR_BASE_CODEC_H
#define DR_BASE_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decode raw deflate, or one zstd frame; what follows it in `in` is not looked at. Returns how many
 * bytes came out, out_len at most: fewer where the input ends or is damaged. */
size_t dr_inflate(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len);
size_t dr_unzstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len);
/* Do these bytes begin a zlib stream? Two of them tell. */
bool dr_is_zlib(const uint8_t *in, size_t in_len);
/* Decode a zlib stream and compare its checksum; or, if it does not begin as one does, raw deflate,
 * which has none. As many bytes as come out, out_len at most; -1: damaged, or longer than that. */
int64_t dr_unzlib(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len);

/* Encode as raw deflate with matches at most 4096 bytes back, or as one zstd frame; at the level
 * that zlib or zstd takes if it is not told any. Returns the length; -ENOTSUP: it would be more
 * than out_cap; -ENOMEM. */
int64_t dr_deflate_4k(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap);
int64_t dr_zstd(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap);
/* Encode as a zlib stream, level 1 (fast) to DR_ZLIB_MAX (small). Out of dr_zlib_bound(in_len)
 * bytes it always succeeds, but for -ENOMEM. */
#define DR_ZLIB_MAX 12
int64_t dr_zlib(const uint8_t *in, size_t in_len, int level, uint8_t *out, size_t out_cap);
size_t dr_zlib_bound(size_t in_len);

#endif
