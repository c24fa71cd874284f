/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* create: make a new image, with or without a backing image. */
#include "base/bytes.h"
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* Open the backing image by the name the new image will record, relative to the new image's
 * directory. */
static int open_backing(struct dr_fs *fs, const char *path, const struct dr_create_options *o,
                        const char *format, struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options open = {
        .format = format,
        .flags = o->flags & (DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH),
    };
    CLEANUP_FREE char *where = dr_ops_resolve(path, o->backing);
    if (!where)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_gate_check(fs, path, where, &open, err);
    if (r < 0)
        return r;
    r = dr_open_fs(fs, where, &open, disk, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: Could not open backing file", path);
    return dr_chain_check_length(path, (*disk)->chain->n + 1, err);
}

/* Refuse to create an image over its own parent, or over a file that the parent uses. */
static int refuse_loop(struct dr_fs *fs, const char *path, const char *name,
                       const struct dr_disk *backing, struct dr_error *err)
{
    struct dr_file_id parent, old;
    CLEANUP_FREE char *where = name ? dr_ops_resolve(path, name) : NULL;
    bool same = where && dr_name_identify(fs, where, &parent, NULL) == 0 &&
                fs->ops->identify(fs, path, &old, NULL) == 0 && dr_ids_overlap(parent, old);
    if (same || (backing && dr_ops_reads(fs, backing->chain, path)))
        return dr_fail(err, ELOOP, "%s: cannot be its own backing file", path);
    return 0;
}

static int choose_size(const char *path, const struct dr_create_options *o,
                       const struct dr_disk *backing, uint64_t *size, struct dr_error *err)
{
    if (!o->has_size && o->size == 0 && !backing && !o->n_adopt)
        return dr_fail(err, EINVAL, "%s: Image creation needs a size parameter", path);
    *size = o->has_size || o->size || !backing ? o->size : dr_size(backing);
    return 0;
}

/* A raw disk on a device needs no creation. Only its first bytes are cleared, so that it is not
 * taken for the format that was there before. */
static int clear_device(struct dr_fs *fs, const char *path, const struct dr_create_options *o,
                        uint64_t size, struct dr_error *err)
{
    static const char zeros[4096];
    CLEANUP_FILE struct dr_file *file = NULL;
    unsigned flags = DR_FILE_RDWR | (o->flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0);
    if (o->no_replace)
        return dr_fail(err, EEXIST, "%s: exists already", path);
    int r = dr_file_open(fs, path, flags, &file, err);
    if (r < 0)
        return r;
    uint64_t room = dr_file_size(file);
    if (size > room)
        return dr_fail(err, ENOSPC, "%s: Cannot grow device files: %llu bytes, wanted %llu", path,
                       (unsigned long long)room, (unsigned long long)size);
    r = dr_file_pwrite(file, zeros, 0, (size_t)dr_min(sizeof(zeros), room), err);
    return r < 0 || (o->flags & DR_OPEN_NO_FLUSH) ? r : dr_file_flush(file, err);
}

int dr_create_fs(struct dr_fs *fs, const char *path, const struct dr_create_options *o,
                 struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *backing = NULL;
    CLEANUP_NEW struct dr_new_image fresh = {0};
    const char *name = o->backing && *o->backing ? o->backing : NULL;
    unsigned need = DR_FORMAT_CREATE | (name ? DR_FORMAT_BACKING : 0u);
    const struct dr_format *fmt = dr_ops_format(o->format, need, err);
    const char *format = NULL;
    uint64_t size = 0;

    if (!fmt)
        return err ? -err->errnum : -EINVAL;
    if (o->n_adopt && !(fmt->flags & DR_FORMAT_ADOPTS))
        return dr_fail(err, ENOTSUP, "%s: Format driver '%s' does not support --adopt", path,
                       fmt->name);
    if (!name && o->backing_format)
        return dr_fail(err, EINVAL, "%s: Backing format cannot be used without backing file", path);
    int r = name ? dr_ops_parent_format(fs, fmt, path, name, o->backing_format, &format, err) : 0;
    if (r == 0 && name && !o->unsafe)
        r = open_backing(fs, path, o, format, &backing, err);
    if (r == 0)
        r = refuse_loop(fs, path, name, backing, err);
    if (r == 0)
        r = choose_size(path, o, backing, &size, err);
    if (r == 0 && (fmt->flags & DR_FORMAT_NO_PROBE) && dr_ops_is_device(fs, path))
        return clear_device(fs, path, o, size, err);
    if (r == 0)
        r = dr_new_begin(&fresh, fs, path, o->no_replace, o->flags, err);
    if (r < 0)
        return r;
    const struct dr_create_params what = {
        .size = size,
        .backing = backing ? backing->chain->images[0] : NULL,
        .backing_name = name,
        .backing_format = format,
        .stop = o->stop,
        .force = o->force,
        .adopt = o->adopt,
        .n_adopt = o->n_adopt,
    };
    r = dr_new_create(&fresh, fmt, &what, o->pairs, o->n_pairs, o->flags, err);
    if (r == 0)
        r = dr_create_stopped(o->stop, err);
    return r < 0 ? r : dr_new_publish(&fresh, err);
}

int dr_create(const char *path, const struct dr_create_options *options, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(options, err);
    DR_REQUIRE(options->format, err);
    return dr_new_hide(dr_create_fs(dr_fs_posix(), path, options, err), path, err);
}
