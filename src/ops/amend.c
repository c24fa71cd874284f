/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* amend: change what create's options have laid down. The driver checks everything first; then its
 * steps and the core's follow, each of which leaves a right image (formats/format.h). */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

struct amending {
    const struct dr_amend_options *o;
    struct dr_amend what;
};

static int on_progress(void *user, uint64_t done, uint64_t total)
{
    struct dr_job *job = user;
    return dr_job_report(job, done, total) != 0 || dr_job_stopped(job);
}

/* Turn zeros that the image itself says into a hole where nothing is below, else into bytes. */
static int drop_zeros(struct dr_chain *chain, struct dr_error *err)
{
    struct dr_image *image = chain->images[0];
    uint64_t size = image->size;
    struct dr_extent ext;
    int r = 0;
    for (uint64_t off = 0; r == 0 && off < size; off += ext.len) {
        r = dr_image_map(image, off, size - off, &ext, err);
        if (r < 0 || ext.kind != DR_ZERO)
            continue;
        if (image->backing_name)
            r = dr_chain_allocate(chain, 0, off, ext.len, DR_PREALLOC_METADATA, err);
        else
            r = dr_chain_drop(chain, 0, off, ext.len, err);
    }
    return r;
}

static int amend_image(struct amending *a, struct dr_chain *chain, struct dr_error *err)
{
    struct dr_image *image = chain->images[0];
    int r = image->fmt->amend(image, &a->what, DR_AMEND_CHECK, err);
    if (r == 0 && a->what.size < image->size && !a->o->shrink)
        r = dr_fail(err, EINVAL,
                    "%s: a size of %llu bytes would lose what is behind; that must be asked for",
                    image->path, (unsigned long long)a->what.size);
    if (r == 0)
        r = image->fmt->amend(image, &a->what, DR_AMEND_FIRST, err);
    if (r == 0 && a->what.size != image->size)
        r = dr_chain_resize(chain, 0, a->what.size, err);
    if (r == 0 && a->what.no_zeros)
        r = drop_zeros(chain, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    return r < 0 ? r : image->fmt->amend(image, &a->what, DR_AMEND_LAST, err);
}

/* Nobody is inside the disk's gate. */
static int amend_step(void *user, struct dr_chain *chain, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct dr_image *image = chain->images[0];
    (void)fresh;
    int r = dr_image_begin(image, 0, false, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    if (r == 0)
        r = amend_image(user, chain, err);
    int flushed = dr_image_flush_all(image, r < 0 ? NULL : err); /* what was freed goes, too */
    return r < 0 ? r : flushed;
}

static int amend_claimed(struct dr_disk *disk, const struct dr_amend_options *o, struct dr_job *job,
                         struct dr_error *err)
{
    struct amending a = {.o = o, .what = {.n_options = o->n_pairs}};
    CLEANUP_FREE struct dr_option *options = NULL;
    const char *format = dr_image_format(disk, 0);
    uint64_t pause = 0;
    if (!dr_writable(disk))
        return dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    if (!dr_format_find(format)->amend)
        return dr_fail(err, ENOTSUP, "Format driver '%s' does not support option amendment",
                       format);
    int r = dr_ops_settings(o->pairs, o->n_pairs, &options, err);
    if (r == 0)
        r = dr_disk_claim(disk, "amend", err);
    if (r < 0)
        return r;
    a.what.options = options;
    a.what.progress = job ? on_progress : NULL;
    a.what.user = job;
    r = dr_disk_quiesce(disk, amend_step, &a, &pause, err);
    dr_job_held(job, pause);
    dr_disk_unclaim(disk);
    return r;
}

static int amend(struct dr_disk *disk, const struct dr_amend_options *o, struct dr_job *job,
                 struct dr_error *err)
{
    dr_job_report(job, 0, 1);
    int r = amend_claimed(disk, o, job, err);
    if (r == 0)
        dr_job_report(job, 1, 1);
    return r;
}

int dr_disk_amend(struct dr_disk *disk, const struct dr_amend_options *options, struct dr_job *job,
                  struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(options, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, amend(disk, options, job, err));
}

int dr_amend_fs(struct dr_fs *fs, const char *path, const struct dr_amend_options *options,
                struct dr_job *job, struct dr_error *err)
{
    struct dr_open_options open = options->open;
    struct dr_disk *disk = NULL;
    open.flags |= DR_OPEN_RDWR;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = amend(disk, options, job, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_amend(const char *path, const struct dr_amend_options *options, struct dr_job *job,
             struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_amend_fs(dr_fs_posix(), path, options, job, err));
}
