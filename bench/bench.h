/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A clock, medians, random numbers and giving up, for the programs that measure. */
#ifndef DR_BENCH_BENCH_H
#define DR_BENCH_BENCH_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "drover/drover.h"

#define BENCH_MAX_ROUNDS 64

/* CLOCK_PROCESS_CPUTIME_ID counts what the processors did, which is of use on a machine where
 * others work, too. */
static clockid_t bench_clock = CLOCK_MONOTONIC;

static inline double bench_now(void) /* seconds */
{
    struct timespec ts;
    clock_gettime(bench_clock, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static inline int bench_by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts the values. */
static inline double bench_median(double *values, unsigned n)
{
    qsort(values, n, sizeof(*values), bench_by_value);
    return values[n / 2];
}

/* End the program if r is a failure; err: what a library function said about it, if it was one. */
static inline void bench_must(int r, const char *what, const struct dr_error *err)
{
    if (r >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, err && err->errnum ? err->text : strerror(-r));
    exit(1);
}

static inline uint64_t bench_random(uint64_t *x)
{
    *x = *x * 6364136223846793005u + 1442695040888963407u;
    return *x >> 20;
}

#endif
