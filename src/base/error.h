/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The one error form: return dr_fail(err, EIO, "%s: ...", name). */
#ifndef DR_BASE_ERROR_H
#define DR_BASE_ERROR_H

#include <errno.h>
#include "drover/drover.h"

/* Store the text (unless err is NULL or already holds one) and return -errnum. errnum is positive.
 */
int dr_fail(struct dr_error *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* As dr_fail, with ": " and strerror(errnum) appended. */
int dr_fail_errno(struct dr_error *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Put "fmt: " in front of the text that is there. Returns -err->errnum, or -EIO without err. */
int dr_prefix(struct dr_error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Forget a failure that was dealt with. */
void dr_error_reset(struct dr_error *err);

#endif
