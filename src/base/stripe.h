/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counters of one kind, spread over cache lines, so that threads do not meet in one: neither in a
 * counter nor in what happens to stand beside it. */
#ifndef DR_BASE_STRIPE_H
#define DR_BASE_STRIPE_H

#include <stdalign.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define DR_STRIPES 8

/* Begins a cache line. A struct that has such a member is allocated by dr_calloc_lines(). */
#define DR_OWN_LINE alignas(64)

struct dr_stripe {
    DR_OWN_LINE _Atomic uint64_t n;
};

/* One object of zeros that begins a cache line, for free(); size: a multiple of 64, as that of each
 * type with DR_OWN_LINE is. NULL: no memory. */
static inline void *dr_calloc_lines(size_t size)
{
    void *p = aligned_alloc(64, size);
    return p ? memset(p, 0, size) : NULL;
}

/* The stripe of this thread plus 1; 0 = not chosen yet. */
extern _Thread_local unsigned dr_stripe_chosen __attribute__((tls_model("initial-exec")));
unsigned dr_stripe_choose(void);

/* The stripe this thread counts in. */
static inline unsigned dr_stripe_of_thread(void)
{
    return (dr_stripe_chosen ? dr_stripe_chosen : dr_stripe_choose()) - 1;
}

#endif
