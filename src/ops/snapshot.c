/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* snapshot: a new, empty child becomes the active disk; what was active keeps its name and is the
 * frozen parent. The parent is not written to. */
#include <ctype.h>
#include <stdio.h>
#include <strings.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define DIGITS     6
#define MAX_NUMBER 999999u

/* The length of "X" in X.vmdk and in X-000012.vmdk. */
static size_t stem_length(const char *name, const char *suffix)
{
    size_t len = strlen(name), tail = strlen(suffix) + 1;
    if (len > tail && name[len - tail] == '.' && strcasecmp(name + len - tail + 1, suffix) == 0)
        len -= tail;
    if (len <= DIGITS + 1 || name[len - DIGITS - 1] != '-')
        return len;
    for (size_t i = len - DIGITS; i < len; i++)
        if (!isdigit((unsigned char)name[i]))
            return len;
    return len - DIGITS - 1;
}

/* stem-NNNNNN.x or stem-NNNNNN-x: the number NNNNNN; else 0. Files without a descriptor count too:
 * somebody may be making them, or they are what is left of a disk. */
static unsigned number_of(const char *name, const char *stem, size_t stem_len)
{
    if (strncmp(name, stem, stem_len) != 0 || name[stem_len] != '-')
        return 0;
    const char *p = name + stem_len + 1;
    unsigned n = 0;
    for (int i = 0; i < DIGITS; i++) {
        if (!isdigit((unsigned char)p[i]))
            return 0;
        n = n * 10 + (unsigned)(p[i] - '0');
    }
    return p[DIGITS] == '.' || p[DIGITS] == '-' || p[DIGITS] == 0 ? n : 0;
}

static int free_number(struct dr_fs *fs, const char *path, size_t stem_len, unsigned *number,
                       struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE uint8_t *used = calloc(1, MAX_NUMBER + 2);
    char **names;
    size_t n;
    if (!dir || !used)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n; i++)
        used[number_of(names[i], dr_path_basename(path), stem_len)] = 1;
    dr_ops_free_names(names, n);
    *number = 1;
    while (used[*number])
        (*number)++;
    return *number <= MAX_NUMBER ? 0 : dr_fail(err, EEXIST, "%s: no free snapshot number", path);
}

static int choose_name(struct dr_fs *fs, const struct dr_image *image, const char *name,
                       char **chosen, struct dr_error *err)
{
    const char *base = dr_path_basename(image->path);
    if (name && (!*name || strchr(name, '/')))
        return dr_fail(err, EINVAL,
                       "\"%s\": a snapshot stands in its disk's directory and needs a "
                       "plain file name",
                       name);
    if (name) {
        *chosen = strdup(name);
        return *chosen ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    }
    const char *suffix = image->fmt->snapshot_suffix;
    size_t stem = stem_length(base, suffix);
    unsigned number = 0;
    int r = free_number(fs, image->path, stem, &number, err);
    if (r < 0)
        return r;
    if (asprintf(chosen, "%.*s-%06u.%s", (int)stem, base, number, suffix) < 0)
        *chosen = NULL;
    return *chosen ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
}

/* A writer's lock keeps out whoever uses the disk, and a second snapshot at the same time; a parent
 * that may only be read is frozen already. */
static int open_exclusive(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                          struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    struct dr_error why = DR_ERROR_INIT;
    open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, disk, &why);
    if (r == -EACCES || r == -EROFS || r == -EPERM) {
        open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
        return dr_open_fs(fs, path, &open, disk, err);
    }
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

static int make_child(struct dr_new_image *fresh, const struct dr_chain *chain, unsigned flags,
                      struct dr_error *err)
{
    struct dr_image *image = chain->images[0];
    const struct dr_create_params what = {
        .size = image->size,
        .backing = image,
        .backing_name = dr_path_basename(image->path),
        .backing_format = image->fmt->name,
        .like = image,
        .like_chain = chain,
        .all_new = true,
    };
    return dr_new_create(fresh, image->fmt, &what, NULL, 0, flags, err);
}

int dr_snapshot_create_fs(struct dr_fs *fs, const char *path, const char *name,
                          const struct dr_open_options *options, char **active,
                          struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    CLEANUP_NEW struct dr_new_image fresh = {0};
    CLEANUP_FREE char *chosen = NULL;
    CLEANUP_FREE char *where = NULL;
    unsigned flags = options ? options->flags : 0;
    int r = open_exclusive(fs, path, options, &disk, err);
    if (r < 0)
        return r;
    struct dr_image *image = disk->chain->images[0];
    if (!(image->fmt->flags & DR_FORMAT_BACKING) || !image->fmt->create ||
        !image->fmt->snapshot_suffix)
        return dr_fail(err, ENOTSUP, "%s: %s images cannot have snapshots", path, image->fmt->name);
    r = choose_name(fs, image, name, &chosen, err);
    if (r < 0)
        return r;
    where = dr_path_sibling(path, chosen);
    if (!where)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    /* by a link the disk may be where the child could not open it */
    r = dr_gate_check(fs, where, image->path, options, err);
    if (r == 0)
        r = dr_new_begin(&fresh, fs, where, true, flags, err);
    if (r == 0)
        r = make_child(&fresh, disk->chain, flags, err);
    /* whoever used the disk goes on with the child; a parent that may only be read says nothing */
    if (r == 0 && image->writable)
        dr_new_take_attrs(&fresh, image->path);
    if (r == 0)
        r = dr_new_publish(&fresh, err);
    if (r == 0 && active)
        *active = DR_STEAL(where);
    return r;
}

int dr_snapshot_create(const char *path, const char *name, const struct dr_open_options *options,
                       char **active, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return dr_new_hide(dr_snapshot_create_fs(dr_fs_posix(), path, name, options, active, err), err);
}
