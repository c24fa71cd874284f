/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* stream: pull what the parents hold into the overlay. A rebase onto an ancestor, or onto nothing.
 * What is in the overlay already is not looked at again: a stream that was killed goes on. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

struct base {
    char *name;     /* that opens it */
    char *recorded; /* how the overlay is to name it */
    char *format;
};

static void base_free(struct base *b)
{
    free(b->name);
    free(b->recorded);
    free(b->format);
}

/* The ancestor that stays. image: the overlay if it is not the active one. */
static int find_base(const struct dr_chain *chain, const char *image, const char *base,
                     struct base *found, struct dr_error *err)
{
    size_t at = image ? dr_ops_member(chain, image) : 0, k = dr_ops_member(chain, base);
    if (at == chain->n)
        return dr_fail(err, EINVAL, "%s: '%s' is not an image of its chain", chain->images[0]->path,
                       image);
    const struct dr_image *overlay = chain->images[at];
    if (k <= at || k == chain->n)
        return dr_fail(err, EINVAL, "%s: %s is not one of its backing files", overlay->path, base);
    found->name = dr_ops_name_from(overlay->fs, overlay->path, chain->images[k]->path);
    found->recorded = dr_ops_name_of(overlay->fs, overlay->path, chain, k);
    found->format = strdup(chain->images[k]->fmt->name);
    return found->name && found->recorded && found->format
               ? 0
               : dr_fail(err, ENOMEM, "%s: out of memory", overlay->path);
}

static int stream(struct dr_disk *disk, const struct dr_stream_options *o, bool shared,
                  struct dr_job *job, struct dr_error *err)
{
    __attribute__((cleanup(base_free))) struct base base = {0};
    if (o->base && *o->base) {
        struct dr_chain *chain = dr_disk_chain(disk);
        int r = find_base(chain, o->image, o->base, &base, err);
        dr_chain_unref(chain, NULL);
        if (r < 0)
            return r;
    }
    struct dr_rebase_options rebase = {
        .open = o->open,
        .backing = base.name ? base.name : "",
        .backing_format = base.format,
        .image = o->image,
        .refuse_snapshots = o->refuse_snapshots,
    };
    struct dr_ops_left left = {0};
    int r = o->remove ? dr_ops_left_begin(&left, disk, err) : 0;
    if (r == 0)
        r = dr_ops_rebase(disk, &rebase, base.recorded, o->retire, shared, job, err);
    if (r == 0)
        r = dr_ops_left_remove(&left, disk, &o->open, err);
    dr_ops_left_free(&left);
    return r;
}

int dr_disk_stream(struct dr_disk *disk, const struct dr_stream_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    static const struct dr_stream_options defaults;
    int r = dr_job_begin_beside(job, disk, err);
    if (r < 0)
        return r;
    return dr_job_end(job, stream(disk, options ? options : &defaults, true, job, err));
}

int dr_stream_fs(struct dr_fs *fs, const char *path, const struct dr_stream_options *o,
                 struct dr_job *job, struct dr_error *err)
{
    struct dr_open_options open = o->open;
    struct dr_disk *disk = NULL;
    open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = stream(disk, o, false, job, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
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
