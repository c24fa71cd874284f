/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Random numbers for names and ids. Not repeatable: tests bring their own generator. */
#ifndef DR_BASE_RANDOM_H
#define DR_BASE_RANDOM_H

#include <stddef.h>
#include <stdint.h>

/* From the kernel; never fails (mixes the clock and the process id where the kernel has none). */
void dr_random(void *buf, size_t len);

static inline uint32_t dr_random32(void)
{
    uint32_t v;
    dr_random(&v, sizeof(v));
    return v;
}

static inline uint64_t dr_random64(void)
{
    uint64_t v;
    dr_random(&v, sizeof(v));
    return v;
}

/* n characters of [a-z0-9] and a NUL: text holds n + 1 bytes. */
void dr_random_text(char *text, size_t n);

#endif
