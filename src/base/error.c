/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/error.h"

#undef dr_fail
#undef dr_fail_errno
#undef dr_prefix

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const char *dr_version(void)
{
    return DR_VERSION;
}

static bool error_is_free(const struct dr_error *err)
{
    return err && err->errnum == 0;
}

int dr_fail(struct dr_error *err, int errnum, const char *fmt, ...)
{
    if (error_is_free(err)) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err->text, sizeof(err->text), fmt, ap);
        va_end(ap);
        dr_hide_secrets(err->text);
        err->errnum = errnum;
    }
    return -errnum;
}

/* Put ": more" behind what is in the text already, as far as there is room. */
static void append(struct dr_error *err, int used, const char *more)
{
    if (used >= 0 && (size_t)used < sizeof(err->text))
        snprintf(err->text + used, sizeof(err->text) - (size_t)used, ": %s", more);
}

int dr_fail_errno(struct dr_error *err, int errnum, const char *fmt, ...)
{
    if (error_is_free(err)) {
        char reason[128];
        va_list ap;
        va_start(ap, fmt);
        int used = vsnprintf(err->text, sizeof(err->text), fmt, ap);
        va_end(ap);
        append(err, used, strerror_r(errnum, reason, sizeof(reason)));
        dr_hide_secrets(err->text);
        err->errnum = errnum;
    }
    return -errnum;
}

int dr_prefix(struct dr_error *err, int r, const char *fmt, ...)
{
    if (!err || err->errnum == 0)
        return r;
    char old[sizeof(err->text)];
    memcpy(old, err->text, sizeof(old));
    va_list ap;
    va_start(ap, fmt);
    int used = vsnprintf(err->text, sizeof(err->text), fmt, ap);
    va_end(ap);
    append(err, used, old);
    dr_hide_secrets(err->text);
    return r;
}

bool dr_is_damage(int r)
{
    static const int others[] = {
        ENOMEM,       ECANCELED,    EINTR,        ENOSPC,    EDQUOT,   EMFILE,
        ENFILE,       EACCES,       EPERM,        EBUSY,     EAGAIN,   ETIMEDOUT,
        ENOTCONN,     ECONNRESET,   EPIPE,        ESHUTDOWN, ENETDOWN, ENETUNREACH,
        EHOSTUNREACH, ECONNREFUSED, ECONNABORTED, ESTALE,    ETXTBSY,
    };
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (r == -others[i])
            return false;
    return true;
}

void dr_error_reset(struct dr_error *err)
{
    if (err) {
        err->errnum = 0;
        err->text[0] = '\0';
    }
}
