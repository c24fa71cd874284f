/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What stands in for the FUSE mount in a build without libfuse. */
#include "base/error.h"
#include "exports/fuse.h"

int dr_fuse_serve(struct dr_disk *disk, const struct dr_fuse_options *options, struct dr_error *err)
{
    (void)disk;
    return dr_fail(err, ENOTSUP,
                   "%s: this drover was built without FUSE; build it with libfuse3-dev",
                   options->mountpoint);
}

void dr_fuse_block_signals(void)
{
}

void dr_fuse_end(void)
{
}

void dr_fuse_resized(void)
{
}

void dr_fuse_write_back(void)
{
}

void dr_fuse_stalled(void)
{
}

int dr_fuse_unmount(const char *mountpoint, struct dr_error *err)
{
    return dr_fail(err, ENOTSUP,
                   "%s: this drover was built without FUSE; use: fusermount3 -u or umount",
                   mountpoint);
}
