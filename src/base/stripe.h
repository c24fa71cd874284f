/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counters of one kind, spread over cache lines, so that threads do not meet in one. */
#ifndef DR_BASE_STRIPE_H
#define DR_BASE_STRIPE_H

#include <stdint.h>

#define DR_STRIPES 8

struct dr_stripe {
    _Atomic uint64_t n;
    char apart[56];
};

/* The stripe this thread counts in. */
unsigned dr_stripe_of_thread(void);

#endif
