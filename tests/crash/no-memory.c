/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Lets one allocation of a program fail. Loaded with LD_PRELOAD.
 *
 *   DROVER_NO_MEMORY_AT=N     the N-th allocation fails (from 1), of those since the program began
 *   DROVER_ALLOCATIONS=FILE   at exit: how many allocations there were, as text
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);

static atomic_long count;
static long fails_at;

__attribute__((constructor)) static void begin(void)
{
    const char *at = getenv("DROVER_NO_MEMORY_AT");
    fails_at = at ? atol(at) : 0;
    atomic_store(&count, 0);
}

__attribute__((destructor)) static void end(void)
{
    const char *path = getenv("DROVER_ALLOCATIONS");
    long n = atomic_load(&count);
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%ld\n", n);
        fclose(file);
    }
}

static int fails(void)
{
    if (atomic_fetch_add(&count, 1) + 1 != fails_at)
        return 0;
    errno = ENOMEM;
    return 1;
}

EXPORT void *malloc(size_t size)
{
    return fails() ? NULL : __libc_malloc(size);
}

EXPORT void *calloc(size_t n, size_t size)
{
    return fails() ? NULL : __libc_calloc(n, size);
}

EXPORT void *realloc(void *old, size_t size)
{
    return fails() ? NULL : __libc_realloc(old, size);
}
