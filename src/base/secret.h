/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The secrets that the program was given, by their names (dr_secret_set() of drover.h). */
#ifndef DR_BASE_SECRET_H
#define DR_BASE_SECRET_H

#include <stddef.h>

#include "base/error.h"

/* A copy, to be freed by dr_key_free(*data, *len). -ENOENT: none has this name. what: the name of
 * the image that wants it, for the message. */
int dr_secret_get(const char *id, const char *what, void **data, size_t *len, struct dr_error *err);

#endif
