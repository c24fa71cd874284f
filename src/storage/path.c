/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "storage/part.h"
#include "storage/remote.h"

/* Has a name of its own, and not one beside something. */
static bool is_whole(const char *name)
{
    return name[0] == '/' || dr_remote_is(name) || dr_part_is(name);
}

/* What a part names stands beside the file that it is of. */
static char *dirname_of_part(const char *name)
{
    CLEANUP_FREE char *bottom = dr_part_bottom(name);
    return bottom ? dr_path_dirname(bottom) : NULL;
}

char *dr_path_dirname(const char *path)
{
    if (dr_part_is(path))
        return dirname_of_part(path);
    bool remote = dr_remote_is(path);
    size_t length = remote ? dr_remote_path_length(path) : strlen(path);
    if (remote && length == 0)
        return strdup(path); /* nothing stands beside it */
    const char *slash = memrchr(path, '/', length);
    if (!slash)
        return strdup(".");
    while (slash > path && slash[-1] == '/')
        slash--;
    return slash == path ? strdup("/") : strndup(path, (size_t)(slash - path));
}

/* A disk that a socket or a json: object leads to has no other name than the whole. */
const char *dr_path_basename(const char *path)
{
    if (dr_part_is(path))
        return path;
    bool remote = dr_remote_is(path);
    size_t length = remote ? dr_remote_path_length(path) : strlen(path);
    const char *slash = memrchr(path, '/', length);
    return slash ? slash + 1 : path;
}

char *dr_path_join(const char *dir, const char *name)
{
    if (dir[0] == '\0' || is_whole(name))
        return strdup(name);
    size_t d = strlen(dir), n = strlen(name);
    bool slash = dir[d - 1] != '/';
    char *out = malloc(d + slash + n + 1);
    if (!out)
        return NULL;
    memcpy(out, dir, d);
    if (slash)
        out[d] = '/';
    memcpy(out + d + slash, name, n + 1);
    return out;
}

char *dr_path_sibling(const char *path, const char *name)
{
    if (!strchr(path, '/') || is_whole(name))
        return strdup(name);
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    return dir ? dr_path_join(dir, name) : NULL;
}

bool dr_path_inside(const char *dir, const char *real)
{
    size_t n = strlen(dir);
    while (n && dir[n - 1] == '/')
        n--;
    return strncmp(dir, real, n) == 0 && real[n] == '/' && real[n + 1] != '\0';
}

bool dr_path_is_no_device(const char *path)
{
    struct stat st;
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE char *real = dir && stat(path, &st) < 0 ? realpath(dir, NULL) : NULL;
    CLEANUP_FREE char *full = real ? dr_path_join(real, dr_path_basename(path)) : NULL;
    return full && dr_path_inside("/dev", full) && !dr_path_inside("/dev/shm", full);
}
