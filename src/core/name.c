/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names of images: a path, or FORMAT:PATH#MEMBER for the formats whose files hold several
 * disks. A path that begins like that by chance is written ./FORMAT:... */
#include <stdio.h>

#include "base/absolute.h"
#include "core/internal.h"
#include "storage/part.h"
#include "storage/remote.h"

/* The format and what stands behind its colon; NULL: a plain path. */
static const struct dr_format *prefix_of(const char *name, const char **rest)
{
    const struct dr_format *fmt;
    for (size_t i = 0; (fmt = dr_format_at(i)); i++) {
        size_t n = strlen(fmt->name);
        if ((fmt->flags & DR_FORMAT_MEMBERS) && strncmp(name, fmt->name, n) == 0 &&
            name[n] == ':') {
            *rest = name + n + 1;
            return fmt;
        }
    }
    *rest = name;
    return NULL;
}

/* Find the member in rest; NULL: rest is a path as a whole. A file that has the whole name wins, so
 * that every file can be named; no file of a server has it, where # ends the name. */
static const char *member_in(struct dr_fs *fs, const char *rest)
{
    struct dr_file_id id;
    const char *hash = strrchr(rest, '#');
    bool is_url = strstr(rest, "://") && dr_remote_is(rest) && strncmp(rest, "json:", 5) != 0;
    return hash && (is_url || fs->ops->identify(fs, rest, &id, NULL) < 0) ? hash + 1 : NULL;
}

void dr_name_clear(struct dr_name *n)
{
    free(n->file);
    free(n->member);
    *n = (struct dr_name){0};
}

int dr_name_parse(struct dr_fs *fs, const char *name, struct dr_name *n, struct dr_error *err)
{
    const char *rest;
    *n = (struct dr_name){.fmt = prefix_of(name, &rest)};
    const char *member = n->fmt ? member_in(fs, rest) : NULL;
    n->file = member ? strndup(rest, (size_t)(member - 1 - rest)) : strdup(rest);
    n->member = member ? strdup(member) : NULL;
    if (n->file && (n->member || !member))
        return 0;
    dr_name_clear(n);
    return dr_fail(err, ENOMEM, "%s: out of memory", name);
}

/* ------------------------------------------------------------------ identity */

struct dr_file_id dr_member_id(struct dr_file_id id, const char *member)
{
    uint64_t h = 0xcbf29ce484222325u;
    if (!member)
        return id;
    for (; *member; member++)
        h = (h ^ (uint8_t)*member) * 0x100000001b3u;
    id.ino ^= h | 1;
    return id;
}

struct dr_file_id dr_image_id(const struct dr_image *image)
{
    return dr_member_id(dr_image_named_file(image)->id, image->member);
}

int dr_name_identify(struct dr_fs *fs, const char *name, struct dr_file_id *id,
                     struct dr_error *err)
{
    DR_CLEANUP_NAME struct dr_name n = {0};
    int r = dr_name_parse(fs, name, &n, err);
    if (r == 0)
        r = fs->ops->identify(fs, n.file, id, err);
    if (r == 0)
        *id = dr_member_id(*id, n.member);
    return r;
}

/* ------------------------------------------------------------------ for everybody */

const char *dr_name_format(const char *name)
{
    const char *rest;
    const struct dr_format *fmt = prefix_of(name, &rest);
    return fmt ? fmt->name : NULL;
}

char *dr_name_file(const char *name)
{
    DR_CLEANUP_NAME struct dr_name n = {0};
    return dr_name_parse(dr_fs_posix(), name, &n, NULL) == 0 ? dr_part_bottom(n.file) : NULL;
}

static char *absolute_path(const char *path)
{
    DR_CLEANUP_PART struct dr_part part = {0};
    if (!dr_part_is(path))
        return dr_remote_is(path) ? strdup(path) : dr_absolute_path(path);
    if (dr_part_parse(path, &part, NULL) < 0)
        return strdup(path); /* opening it tells what is wrong */
    CLEANUP_FREE char *full = part.filename ? dr_absolute_path(part.filename) : strdup("");
    char *name = NULL;
    return full && dr_part_rename(path, full, &name, NULL) == 0 ? name : NULL;
}

char *dr_name_absolute(const char *name)
{
    const char *rest;
    const struct dr_format *fmt = prefix_of(name, &rest);
    CLEANUP_FREE char *path = absolute_path(rest);
    char *full = NULL;
    if (!fmt || !path)
        return DR_STEAL(path);
    return asprintf(&full, "%s:%s", fmt->name, path) >= 0 ? full : NULL;
}

char *dr_name_beside(const char *path, const char *name)
{
    const char *rest, *own;
    const struct dr_format *fmt = prefix_of(name, &rest);
    prefix_of(path, &own);
    CLEANUP_FREE char *full = dr_path_sibling(own, rest);
    if (!fmt || !full)
        return DR_STEAL(full);
    char *out = malloc(strlen(fmt->name) + strlen(full) + 2);
    if (out)
        stpcpy(stpcpy(stpcpy(out, fmt->name), ":"), full);
    return out;
}
