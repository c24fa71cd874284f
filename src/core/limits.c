/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How much memory the caches of the process may take: from the environment, or as
 * dr_set_cache_limits() says. */
#include <ctype.h>

#include "core/internal.h"

#define MIB        (1ull << 20)
#define LEAST      (1 * MIB)
#define LIMIT_MOST (1ull << 50)

static const struct {
    const char *name, *env;
    uint64_t initial;
} kinds[DR_CACHE_KINDS] = {
    [DR_CACHE_METADATA] = {"metadata", "DROVER_CACHE_METADATA", 64 * MIB},
    [DR_CACHE_DECODED] = {"decoded units", "DROVER_CACHE_DECODED", 32 * MIB},
    [DR_CACHE_INDEX] = {"the index of chains", "DROVER_CACHE_INDEX", 32 * MIB},
};

static _Atomic uint64_t limits[DR_CACHE_KINDS];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct dr_error env_error; /* what is wrong in the environment; written once */

/* A number of bytes, or of KiB, MiB, GiB with K, M, G behind it. False: it is none. */
static bool parse_size(const char *text, uint64_t *bytes)
{
    static const char units[] = "KMG";
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (!isdigit((unsigned char)*text) || errno)
        return false;
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (end[unit != NULL] != '\0' || n > LIMIT_MOST >> shift)
        return false;
    *bytes = (uint64_t)n << shift;
    return true;
}

static int check_limit(const char *what, uint64_t bytes, struct dr_error *err)
{
    if (bytes >= LEAST)
        return 0;
    return dr_fail(err, EINVAL, "%s: a cache of %llu bytes is too small; give it at least 1M", what,
                   (unsigned long long)bytes);
}

static void read_environment(void)
{
    for (unsigned i = 0; i < DR_CACHE_KINDS; i++) {
        const char *text = getenv(kinds[i].env);
        uint64_t bytes = kinds[i].initial;
        if (text && *text && !parse_size(text, &bytes))
            dr_fail(&env_error, EINVAL, "%s=%s: is no size; say 64M, for example", kinds[i].env,
                    text);
        else
            check_limit(kinds[i].env, bytes, &env_error);
        atomic_store(&limits[i], bytes);
    }
}

uint64_t dr_cache_limit(enum dr_cache_kind kind)
{
    pthread_once(&once, read_environment);
    return atomic_load_explicit(&limits[kind], memory_order_relaxed);
}

int dr_cache_limits_check(struct dr_error *err)
{
    pthread_once(&once, read_environment);
    return env_error.errnum ? dr_fail(err, env_error.errnum, "%s", env_error.text) : 0;
}

int dr_set_cache_limits(const struct dr_cache_limits *wanted, struct dr_error *err)
{
    DR_REQUIRE(wanted, err);
    const uint64_t bytes[DR_CACHE_KINDS] = {
        [DR_CACHE_METADATA] = wanted->metadata,
        [DR_CACHE_DECODED] = wanted->decoded,
        [DR_CACHE_INDEX] = wanted->index,
    };
    pthread_once(&once, read_environment);
    for (unsigned i = 0; i < DR_CACHE_KINDS; i++) {
        int r = bytes[i] ? check_limit(kinds[i].name, bytes[i], err) : 0;
        if (r < 0)
            return r;
    }
    for (unsigned i = 0; i < DR_CACHE_KINDS; i++)
        if (bytes[i])
            atomic_store(&limits[i], bytes[i]);
    return 0;
}
