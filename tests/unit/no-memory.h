/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An allocator in the place of the C library's, one call of which fails. Include it in one file of
 * a program. AddressSanitizer then finds, too, what a failure forgets to free. */
#ifndef DR_TESTS_NO_MEMORY_H
#define DR_TESTS_NO_MEMORY_H

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "slower.h"

#if SLOWER_THREADS
#define CAN_FAIL 0 /* the same threads are seen by other tests */
#else
#define CAN_FAIL 1
#if SLOWER_ADDRESSES /* it also finds what a failure forgets to free */
#define REAL(name) __interceptor_##name
#else
#define REAL(name) __libc_##name
#endif
void *REAL(malloc)(size_t);
void *REAL(calloc)(size_t, size_t);
void *REAL(realloc)(void *, size_t);

static long fail_at = -1; /* allocations until the one that fails; negative: none does */

static bool fails(void)
{
    return __atomic_load_n(&fail_at, __ATOMIC_RELAXED) >= 0 &&
           __atomic_fetch_sub(&fail_at, 1, __ATOMIC_RELAXED) == 0;
}

/* AddressSanitizer does not bear a failure in what it asks the C library when a thread begins. */
static bool must_not_fail(void *caller)
{
#if SLOWER_ADDRESSES
    Dl_info in;
    return dladdr(caller, &in) && strstr(in.dli_fname, "/libc.so");
#else
    (void)caller;
    return false;
#endif
}

static void *none(void)
{
    errno = ENOMEM;
    return NULL;
}

/* In the place of the C library's, for the libraries that we use, too. */
#pragma GCC visibility push(default)
void *malloc(size_t size)
{
    return fails() ? none() : REAL(malloc)(size);
}

void *calloc(size_t n, size_t size)
{
    bool none_left = fails() && !must_not_fail(__builtin_return_address(0));
    return none_left ? none() : REAL(calloc)(n, size);
}

void *realloc(void *old, size_t size)
{
    bool none_left = fails() && !must_not_fail(__builtin_return_address(0));
    return none_left ? none() : REAL(realloc)(old, size);
}
#pragma GCC visibility pop
#endif

/* The allocation after `at` others fails; negative: none does. */
static void let_fail(long at)
{
#if CAN_FAIL
    __atomic_store_n(&fail_at, at, __ATOMIC_RELAXED);
#else
    (void)at;
#endif
}

/* Whether the allocation that was to fail has come. */
static bool has_failed(void)
{
#if CAN_FAIL
    return __atomic_load_n(&fail_at, __ATOMIC_RELAXED) < 0;
#else
    return false;
#endif
}

#endif
