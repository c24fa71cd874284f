/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Recording what the parent of an image is, and looking whether it still is. */
#include "ops/fingerprint.h"

#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"

/* ------------------------------------------------------------------ recording */

static bool stopped(void *job)
{
    return dr_job_stopped(job);
}

static int take(struct dr_chain *chain, size_t first, bool full, struct dr_job *job,
                struct dr_fingerprint *print, struct dr_error *err)
{
    const struct dr_image *parent = chain->images[first];
    *print = (struct dr_fingerprint){.size = parent->size, .has_id = parent->fmt->id};
    snprintf(print->format, sizeof(print->format), "%s", parent->fmt->name);
    if (print->has_id)
        print->id = parent->fmt->id(parent);
    int r = dr_fingerprint_sample(chain, first, print->sampled, err);
    if (r == 0 && full)
        r = dr_fingerprint_full(chain, first, stopped, job, print->full, err);
    return r;
}

int ops_fingerprint_take(const struct dr_image *image, struct dr_chain *chain, size_t first,
                         bool full, struct dr_job *job, struct dr_error *err)
{
    struct dr_fingerprint print;
    int r = take(chain, first, full, job, &print, err);
    return r < 0 ? r : dr_fingerprint_store(image, &print, err);
}

void ops_fingerprint_announce(const struct dr_image *image, const char *name,
                              struct dr_chain *chain, size_t first)
{
    struct dr_fingerprint print;
    if (name && image->backing_name && !image->files[0]->block_device &&
        take(chain, first, false, NULL, &print, NULL) == 0)
        dr_fingerprint_store_next(image, name, &print, NULL);
}

int ops_fingerprint_renew(const struct dr_image *image, struct dr_chain *chain, size_t first,
                          struct dr_error *err)
{
    return ops_fingerprint_take(image, chain, first, false, NULL, err);
}

/* ------------------------------------------------------------------ looking again */

int ops_fingerprint_verify(const struct dr_image *image, struct dr_chain *chain, size_t first,
                           const struct dr_fingerprint *print, bool full, struct dr_error *err)
{
    char now[DR_FINGERPRINT_HEX] = "";
    const struct dr_image *parent = chain->images[first];
    int r = dr_fingerprint_compare(image, print, parent, err);
    if (r == 0)
        r = dr_fingerprint_compare_sample(image, print, chain, first, err);
    if (r < 0 || !full || !print->full[0])
        return r;
    r = dr_fingerprint_full(chain, first, stopped, NULL, now, err);
    return r == 0 && strcmp(now, print->full) != 0
               ? dr_fingerprint_refuse(image, parent, "all was compared", err)
               : r;
}

/* ------------------------------------------------------------------ by path */

/* The image alone, and its parent, which need not be what is recorded of it. */
static int open_both(struct dr_fs *fs, const char *path, const char *format,
                     const struct dr_open_options *open, struct dr_image **image,
                     struct dr_disk **parent, struct dr_error *err)
{
    CLEANUP_FREE char *where = NULL;
    struct dr_open_options as = *open;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK | (open->flags & DR_OPEN_ANY_PATH);
    int r = dr_image_open(fs, path, format, flags, image, err);
    if (r < 0 || !(*image)->backing_name)
        return r;
    r = dr_ops_backing_path(*image, open, &where, err);
    if (r == -ENOENT && !where)
        return dr_fail(err, ENOENT, "%s: its parent \"%s\" is not there", path,
                       (*image)->backing_name);
    if (r == 0)
        r = dr_gate_check(fs, path, where, open, err);
    as.format = (*image)->backing_format ? (*image)->backing_format : (*image)->fmt->parent_format;
    as.backing = as.backing_format = NULL; /* those are another parent of the image */
    as.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
    return r < 0 ? r : dr_open_fs(fs, where, &as, parent, err);
}

int ops_fingerprint_look(struct dr_fs *fs, const char *path, const char *format,
                         const struct dr_open_options *open, bool full, struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_DISK struct dr_disk *parent = NULL;
    struct dr_fingerprint print = {0};
    struct dr_open_options as = *open;
    as.flags |= DR_OPEN_FORCE_SHARE;
    int r = open_both(fs, path, format, &as, &image, &parent, err);
    if (r == 0 && parent)
        r = dr_fingerprint_load(image, &print, err);
    if (r <= 0 || !parent)
        return r;
    return ops_fingerprint_verify(image, parent->chain, 0, &print, full, err);
}

int dr_fingerprint_fs(struct dr_fs *fs, const char *path,
                      const struct dr_fingerprint_options *options, struct dr_job *job,
                      struct dr_error *err)
{
    static const struct dr_fingerprint_options defaults;
    const struct dr_fingerprint_options *o = options ? options : &defaults;
    CLEANUP_IMAGE struct dr_image *image = NULL;
    CLEANUP_DISK struct dr_disk *parent = NULL;
    if (o->remove)
        return dr_fingerprint_remove(fs, path, err);
    int r = open_both(fs, path, o->open.format, &o->open, &image, &parent, err);
    if (r < 0)
        return r;
    if (!parent)
        return dr_fail(err, EINVAL, "%s: has no parent to record anything of", path);
    return ops_fingerprint_take(image, parent->chain, 0, o->full_hash, job, err);
}

int dr_fingerprint(const char *path, const struct dr_fingerprint_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_fingerprint_fs(dr_fs_posix(), path, options, job, err));
}
