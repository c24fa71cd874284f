/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The one error form: return dr_fail(err, EIO, "%s: ...", name). */
#ifndef DR_BASE_ERROR_H
#define DR_BASE_ERROR_H

#include <errno.h>
#include <stdbool.h>
#include "drover/drover.h"

/* Store the text (unless err is NULL or already holds one) and return -errnum. errnum is positive.
 */
int dr_fail(struct dr_error *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* As dr_fail, with ": " and strerror(errnum) appended. */
int dr_fail_errno(struct dr_error *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Put "fmt: " in front of the text that is there. Returns r, which is the failure at hand. */
int dr_prefix(struct dr_error *err, int r, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Can a read that failed with r (negative) have met damage? Not where something is short, in use,
 * forbidden or not there for now, or somebody asked to stop: the bytes may be good. */
bool dr_is_damage(int r);

/* Clear the text of a failure that was handled. */
void dr_error_reset(struct dr_error *err);

/* Names of disks on servers may have passwords and cookies in them, and messages go into logs: put
 * stars in their place, in URLs, json: names and options, whatever words are around them. The text
 * becomes no longer. */
void dr_hide_secrets(char *text);
/* The same in a text that is nothing but image options (NAME=VALUE,...), where a value may hold
 * spaces and quotes. */
void dr_hide_option_secrets(char *text);
/* The name without the passwords and cookies that a json: name has as values of its own, malloc'ed;
 * any other name as it is. NULL = out of memory. */
char *dr_without_secrets(const char *name);
/* Is it the name of an option (perhaps file.NAME) whose value is a secret? */
bool dr_is_secret(const char *name);

/* For public functions: refuse a NULL pointer with -EINVAL (with _N: unless n is 0). */
#define DR_REQUIRE(pointer, err) DR_REQUIRE_N(pointer, 1, err)
#define DR_REQUIRE_N(pointer, n, err)                                                   \
    do {                                                                                \
        if (!(pointer) && (n) > 0)                                                      \
            return dr_fail(err, EINVAL, "%s: %s must not be NULL", __func__, #pointer); \
    } while (0)

/* The analyzer sees one file at a time: tell it that what says "failed" is negative. */
#ifdef __clang_analyzer__
static inline int dr_is_failure(int r)
{
    if (r >= 0)
        __builtin_unreachable();
    return r;
}
#define dr_fail(...)       dr_is_failure((dr_fail)(__VA_ARGS__))
#define dr_fail_errno(...) dr_is_failure((dr_fail_errno)(__VA_ARGS__))
#define dr_prefix(...)     dr_is_failure((dr_prefix)(__VA_ARGS__))
#endif

#endif
