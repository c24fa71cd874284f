/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A test program with one file system in memory for each test, and one error text. */
#ifndef DROVER_TESTS_TEST_IN_MEMORY_H
#define DROVER_TESTS_TEST_IN_MEMORY_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "core/core.h"

static struct dr_error err;
static struct dr_fs *mem;

static inline void ok_at(int r, int line)
{
    if (r < 0)
        fail_msg("line %d: %d %s", line, r, err.text);
}
#define ok(expression) (err = (struct dr_error)DR_ERROR_INIT, ok_at((expression), __LINE__))

/* expression fails with -code and the message has why in it */
#define fails(code, why, expression)                                   \
    do {                                                               \
        err = (struct dr_error)DR_ERROR_INIT;                          \
        int fails_r = (expression);                                    \
        if (fails_r != -(code) || !strstr(err.text, why))              \
            fail_msg("line %d: %d '%s'", __LINE__, fails_r, err.text); \
    } while (0)

static inline int set_up(void **state)
{
    (void)state;
    mem = dr_fs_memory_new();
    return mem ? 0 : -1;
}

static inline int tear_down(void **state)
{
    (void)state;
    dr_fs_memory_free(mem);
    return 0;
}

#endif
