/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/bytes.h"

/* Vectors of the compiler: SSE2, NEON or plain words, whatever the target has. */
typedef uint64_t vec __attribute__((vector_size(16), aligned(1), may_alias));

static inline bool block_is_zero(const uint8_t *p)
{
    const vec *v = (const vec *)p;
    vec a = v[0] | v[1] | v[2] | v[3];
    vec b = v[4] | v[5] | v[6] | v[7];
    vec c = a | b;
    return (c[0] | c[1]) == 0;
}

static bool tail_is_zero(const uint8_t *p, size_t len)
{
    uint64_t sum = 0;
    for (; len >= 8; p += 8, len -= 8)
        sum |= get_le64(p);
    for (; len; p++, len--)
        sum |= *p;
    return sum == 0;
}

bool dr_is_zero(const void *buf, size_t len)
{
    const uint8_t *p = buf;
    if (len >= 64) {
        /* Look at three words first: most blocks with data are recognised by them, without
         * reading all of the memory. */
        uint64_t probe = get_le64(p) | get_le64(p + len / 2) | get_le64(p + len - 8);
        if (probe)
            return false;
    }
    for (; len >= 128; p += 128, len -= 128)
        if (!block_is_zero(p))
            return false;
    return tail_is_zero(p, len);
}
