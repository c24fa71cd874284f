/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a call is expected to do. The expression may use err, which is its own: ok(dr_flush(d,
 * &err)). */
#ifndef DROVER_TESTS_OUTCOME_H
#define DROVER_TESTS_OUTCOME_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "base/error.h"

#define ok(expr)                                            \
    do {                                                    \
        struct dr_error err = DR_ERROR_INIT;                \
        int ok_r_ = (expr);                                 \
        if (ok_r_ < 0)                                      \
            fail_msg("%s: %d: %s", #expr, ok_r_, err.text); \
    } while (0)

/* It fails with -errnum_, and its text has the word. */
#define refused(expr, errnum_, word)                               \
    do {                                                           \
        struct dr_error err = DR_ERROR_INIT;                       \
        int refused_r_ = (expr);                                   \
        if (refused_r_ != -(errnum_) || !strstr(err.text, (word))) \
            fail_msg("%s: %d: %s", #expr, refused_r_, err.text);   \
    } while (0)

#endif
