/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* On-disk integers at any alignment; alignment arithmetic that cannot overflow unseen. */
#ifndef DR_BASE_BYTES_H
#define DR_BASE_BYTES_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define DR_GET(name, type, conv)           \
    static inline type name(const void *p) \
    {                                      \
        type v;                            \
        memcpy(&v, p, sizeof(v));          \
        return conv(v);                    \
    }
#define DR_PUT(name, type, conv)             \
    static inline void name(void *p, type v) \
    {                                        \
        v = conv(v);                         \
        memcpy(p, &v, sizeof(v));            \
    }
DR_GET(get_le16, uint16_t, le16toh)
DR_GET(get_le32, uint32_t, le32toh)
DR_GET(get_le64, uint64_t, le64toh)
DR_GET(get_be16, uint16_t, be16toh)
DR_GET(get_be32, uint32_t, be32toh)
DR_GET(get_be64, uint64_t, be64toh)
DR_PUT(put_le16, uint16_t, htole16)
DR_PUT(put_le32, uint32_t, htole32)
DR_PUT(put_le64, uint64_t, htole64)
DR_PUT(put_be16, uint16_t, htobe16)
DR_PUT(put_be32, uint32_t, htobe32)
DR_PUT(put_be64, uint64_t, htobe64)
#undef DR_GET
#undef DR_PUT

static inline uint64_t dr_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t dr_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* unit > 0, any value, not only powers of two. */
static inline uint64_t dr_round_down(uint64_t v, uint64_t unit)
{
#ifdef __clang_analyzer__
    if (unit == 0)
        __builtin_unreachable();
#endif
    return v - v % unit;
}

/* The caller knows that v + unit - 1 does not overflow; else use dr_round_up_checked. */
static inline uint64_t dr_round_up(uint64_t v, uint64_t unit)
{
    return dr_round_down(v + unit - 1, unit);
}

static inline uint64_t dr_div_up(uint64_t v, uint64_t unit)
{
    return v / unit + (v % unit != 0);
}

/* True = does not fit, *r is unspecified. */
static inline bool dr_add_overflow(uint64_t a, uint64_t b, uint64_t *r)
{
    return __builtin_add_overflow(a, b, r);
}

static inline bool dr_mul_overflow(uint64_t a, uint64_t b, uint64_t *r)
{
    return __builtin_mul_overflow(a, b, r);
}

/* [off, off+len) lies inside [0, size). */
static inline bool dr_inside(uint64_t off, uint64_t len, uint64_t size)
{
    return off <= size && len <= size - off;
}

/* All len bytes are 0. Fast: wide loads, early exit. (iszero.c) */
bool dr_is_zero(const void *buf, size_t len);

#endif
