/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks whose changes are thrown away: an overlay over the disk, in a file that loses its name once
 * it is open.
 *
 * The overlay is a qcow2, the one format that may stand on a parent of any format without a file of
 * the disk's full length beside it. Its directory is private and is empty again before anybody can
 * use the disk. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "drover/ops.h"
#include "exports/exports.h"

/* Which format the disk has, so that nobody guesses later from what a guest wrote; and its size. */
static int look_at_parent(const char *path, const struct dr_open_options *options, char *format,
                          size_t size, uint64_t *length, struct dr_error *err)
{
    struct dr_open_options reading = *options;
    struct dr_disk *disk;
    reading.flags &= ~(unsigned)DR_OPEN_RDWR;
    int r = dr_open(path, &reading, &disk, err);
    if (r < 0)
        return r;
    snprintf(format, size, "%s", dr_image_format(disk, 0));
    *length = dr_size(disk);
    return dr_close(disk, err);
}

static int create_and_open(const char *overlay, const char *path,
                           const struct dr_open_options *options, struct dr_disk **disk,
                           struct dr_error *err)
{
    char format[32];
    uint64_t size;
    int r = look_at_parent(path, options, format, sizeof(format), &size, err);
    if (r < 0)
        return r;
    struct dr_create_options create = {
        .format = "qcow2",
        .size = size,
        .has_size = true,
        .backing = path,
        .backing_format = format,
        .unsafe = true, /* it was opened a moment ago, with options that dr_create() lacks */
        .flags = DR_OPEN_NO_FLUSH | (options->flags & DR_OPEN_NO_LOCK),
    };
    r = dr_create(overlay, &create, err);
    if (r < 0)
        return r;
    const unsigned kept = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_BACKING;
    struct dr_open_options open = *options;
    open.format = "qcow2";
    open.flags = (options->flags & ~kept) | DR_OPEN_RDWR | DR_OPEN_NO_FLUSH;
    open.backing = path;
    open.backing_format = format;
    r = dr_open(overlay, &open, disk, err);
    unlink(overlay);
    return r;
}

int temporary_open(const char *path, const struct dr_open_options *options, struct dr_disk **disk,
                   struct dr_error *err)
{
    const char *parent = getenv("TMPDIR");
    CLEANUP_FREE char *dir = NULL, *overlay = NULL;
    *disk = NULL;
    if (options->snapshot || options->backing || options->data_file)
        return dr_fail(
            err, EINVAL,
            "%s: a temporary disk cannot be made of a snapshot inside an image, nor with "
            "another backing or data file",
            path);
    if (asprintf(&dir, "%s/drover-XXXXXX", parent && *parent ? parent : "/var/tmp") < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (!mkdtemp(dir))
        return dr_fail_errno(err, errno, "%s: cannot make a directory for what is written", dir);
    int r = asprintf(&overlay, "%s/overlay.qcow2", dir) < 0
                ? dr_fail(err, ENOMEM, "%s: out of memory", path)
                : create_and_open(overlay, path, options, disk, err);
    rmdir(dir);
    return r;
}
