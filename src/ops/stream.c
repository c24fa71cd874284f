/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* stream: pull what the parents hold into the overlay. A rebase onto an ancestor, or onto nothing.
 * What is in the overlay already is not looked at again: a stream that was killed goes on. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* How the overlay is to name the ancestor, and which format that has. */
static int find_base(struct dr_fs *fs, const char *path, const struct dr_stream_options *o,
                     char **name, char **format, struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = o->open;
    open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    size_t k = dr_ops_member(disk->chain, o->base);
    if (k == 0 || k == disk->chain->n)
        return dr_fail(err, EINVAL, "%s: %s is not one of its backing files", path, o->base);
    *name = dr_ops_name_from(fs, path, disk->chain->images[k]->path);
    *format = strdup(disk->chain->images[k]->fmt->name);
    return *name && *format ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
}

int dr_stream_fs(struct dr_fs *fs, const char *path, const struct dr_stream_options *o,
                 struct dr_job *job, struct dr_error *err)
{
    CLEANUP_FREE char *name = NULL, *format = NULL;
    int r = o->base && *o->base ? find_base(fs, path, o, &name, &format, err) : 0;
    if (r < 0)
        return r;
    struct dr_rebase_options rebase = {
        .open = o->open,
        .backing = name ? name : "",
        .backing_format = format,
    };
    return dr_rebase_fs(fs, path, &rebase, job, err);
}

int dr_stream(const char *path, const struct dr_stream_options *options, struct dr_job *job,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    static const struct dr_stream_options defaults;
    options = options ? options : &defaults;
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_stream_fs(dr_fs_posix(), path, options, job, err));
}
