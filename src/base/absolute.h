/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_BASE_ABSOLUTE_H
#define DR_BASE_ABSOLUTE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"

/* The path as it is from any directory, malloc'ed; links stay. NULL = out of memory, or the
 * working directory is gone. */
static inline char *dr_absolute_path(const char *path)
{
    CLEANUP_FREE char *cwd = path[0] == '/' ? NULL : getcwd(NULL, 0);
    char *full = NULL;
    if (path[0] == '/')
        return strdup(path);
    return cwd && asprintf(&full, "%s/%s", cwd, path) >= 0 ? full : NULL;
}

#endif
