/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What builds with sanitizers leave out.
 *
 * Power cuts, faults and enumerated programs run the same code over and over on other states. A
 * plain build does all of them. A sanitizer finds what it can find in a path when that is first
 * taken, and makes it several times slower, so those builds take one in SLOWER. */
#ifndef DROVER_TEST_SLOWER_H
#define DROVER_TEST_SLOWER_H

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define SLOWER_THREADS 1
#elif __has_feature(address_sanitizer)
#define SLOWER_ADDRESSES 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define SLOWER_THREADS 1
#elif defined(__SANITIZE_ADDRESS__)
#define SLOWER_ADDRESSES 1
#endif

#ifndef SLOWER_THREADS
#define SLOWER_THREADS 0
#endif
#ifndef SLOWER_ADDRESSES
#define SLOWER_ADDRESSES 0
#endif
#define SLOWER (SLOWER_THREADS || SLOWER_ADDRESSES ? 5 : 1)

/* A test that plants a fault needs all of its suite to see that found. */
#define ONLY_IN_A_PLAIN_BUILD() \
    do {                        \
        if (SLOWER > 1)         \
            skip();             \
    } while (0)

#endif
