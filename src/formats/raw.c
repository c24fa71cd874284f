/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* raw: the bytes of the file are the bytes of the disk. There is no magic number and no
 * metadata; a file that no other format recognises is taken for raw. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "core/core.h"

/* Raw has no allocation unit. This only sets how wide the range lock of a zeroing is. */
#define RAW_UNIT 65536u

/* After so many bytes of preallocation, create looks whether it is to stop. */
#define RAW_FULL_STEP   (UINT64_C(1) << 20)
#define RAW_FALLOC_STEP (UINT64_C(1) << 30)

static int raw_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)buf;
    (void)len;
    (void)path;
    return 0;
}

static int raw_open(struct dr_image *image, struct dr_error *err)
{
    uint64_t size = dr_file_size(image->files[0]);
    if (size > INT64_MAX)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", image->path,
                       (unsigned long long)size);
    image->size = size;
    return 0;
}

static void raw_close(struct dr_image *image)
{
    (void)image;
}

static void raw_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    (void)image;
    *uoff = dr_round_down(off, RAW_UNIT);
    *ulen = RAW_UNIT;
}

static int raw_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                   struct dr_error *err)
{
    (void)err;
    *ext = (struct dr_extent){
        .kind = DR_DATA,
        .len = len,
        .file = image->files[0],
        .host = off,
        .in_place = true,
        .flat = true,
    };
    return 0;
}

static int raw_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                       uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    (void)host_len;
    (void)err;
    if (want == DR_WANT_HOLE || want == DR_WANT_CODED)
        return -ENOTSUP; /* every byte of a raw image is its own */
    *r = (struct dr_reservation){
        .off = off,
        .len = len,
        .file = image->files[0],
        .host = off,
        .todo = want == DR_WANT_ZERO ? DR_TODO_ZERO_HOST : DR_TODO_WRITE,
        .want = want,
    };
    return 0;
}

static void raw_settle(struct dr_image *image, struct dr_reservation *r)
{
    (void)image;
    (void)r;
}

static int raw_resize(struct dr_image *image, uint64_t size, uint64_t parent_size,
                      struct dr_error *err)
{
    (void)parent_size;
    if (image->files[0]->part == DR_PART_OF_SIZE)
        return dr_fail(err, EINVAL, "%s: Cannot resize fixed-size raw disks", image->path);
    int r = dr_file_truncate(image->files[0], size, err);
    if (r == 0)
        image->size = size;
    return r;
}

static int raw_info(struct dr_image *image, json_t *data, uint64_t *cluster_size,
                    struct dr_error *err)
{
    (void)image;
    (void)data;
    (void)err;
    *cluster_size = 0;
    return 0;
}

/* ------------------------------------------------------------------ create */

enum raw_preallocation { RAW_OFF, RAW_FALLOC, RAW_FULL };

static const struct dr_option_help raw_create_options[] = {
    {"nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)", NULL},
    {"preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)", NULL},
    {"extent_size_hint", "size", "Extent size hint for the host's file system (not acted on)",
     NULL},
    {NULL, NULL, NULL, NULL},
};

static int raw_preallocation(const struct dr_option *option, enum raw_preallocation *mode,
                             struct dr_error *err)
{
    static const char *const names[] = {"off", "falloc", "full"};
    for (unsigned i = 0; i < 3; i++)
        if (strcmp(option->value, names[i]) == 0) {
            *mode = (enum raw_preallocation)i;
            return 0;
        }
    return dr_fail(err, EINVAL,
                   "raw: preallocation=%s is none of the allowed values off, falloc, full",
                   option->value);
}

/* Scripts pass this hint for every image. It must be a size, and is then ignored. */
static int raw_extent_size_hint(const struct dr_option *option, struct dr_error *err)
{
    size_t digits = strspn(option->value, "0123456789");
    size_t suffix = digits > 0 && option->value[digits] &&
                    strchr("bBkKMGTPE", option->value[digits]) != NULL;
    if (digits > 0 && option->value[digits + suffix] == '\0')
        return 0;
    return dr_fail(err, EINVAL, "raw: extent_size_hint=%s is no size", option->value);
}

static int raw_nocow(const struct dr_option *option, bool *nocow, struct dr_error *err)
{
    *nocow = strcmp(option->value, "on") == 0;
    if (*nocow || strcmp(option->value, "off") == 0)
        return 0;
    return dr_fail(err, EINVAL, "raw: Parameter 'nocow' expects 'on' or 'off'");
}

static int raw_option(const struct dr_option *option, enum raw_preallocation *mode, bool *nocow,
                      struct dr_error *err)
{
    if (strcmp(option->name, "preallocation") == 0)
        return raw_preallocation(option, mode, err);
    if (strcmp(option->name, "extent_size_hint") == 0)
        return raw_extent_size_hint(option, err);
    if (strcmp(option->name, "nocow") == 0)
        return raw_nocow(option, nocow, err);
    return dr_fail(err, EINVAL, "raw: unknown create option '%s'", option->name);
}

static int raw_fill(struct dr_file *f, uint64_t size, enum raw_preallocation mode,
                    const volatile int *stop, struct dr_error *err)
{
    unsigned how = mode == RAW_FULL ? DR_FILE_ZERO_WRITE : DR_FILE_ZERO_ALLOCATE;
    uint64_t step = mode == RAW_FULL ? RAW_FULL_STEP : RAW_FALLOC_STEP, off = 0;
    int r = dr_file_size(f) != size ? dr_file_truncate(f, size, err) : 0;
    for (; r == 0 && mode != RAW_OFF && off < size; off += step) {
        r = dr_create_stopped(stop, err);
        if (r == 0)
            r = dr_file_zero(f, off, dr_min(step, size - off), how, err);
    }
    return r < 0 ? r : dr_file_flush(f, err);
}

static int raw_options(const struct dr_create_params *params, enum raw_preallocation *mode,
                       bool *nocow, struct dr_error *err)
{
    *mode = RAW_OFF;
    *nocow = false;
    for (size_t i = 0; i < params->n_options; i++) {
        int r = raw_option(&params->options[i], mode, nocow, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int raw_check_size(const char *path, uint64_t size, struct dr_error *err)
{
    if (size <= INT64_MAX - 511)
        return 0;
    return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", path,
                   (unsigned long long)size);
}

static int raw_measure(const char *path, const struct dr_create_params *params,
                       struct dr_cost *cost, struct dr_error *err)
{
    enum raw_preallocation mode;
    bool nocow;
    int r = raw_options(params, &mode, &nocow, err);
    if (r == 0)
        r = raw_check_size(path, params->size, err);
    if (r == 0)
        *cost = (struct dr_cost){.fixed = dr_round_up(params->size, 512)};
    return r;
}

static int raw_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                      struct dr_error *err)
{
    enum raw_preallocation mode;
    bool nocow;
    int r = raw_options(params, &mode, &nocow, err);
    if (r < 0)
        return r;
    if (params->backing_name)
        return dr_fail(err, EINVAL, "%s: a raw image cannot have a backing file", path);
    r = raw_check_size(path, params->size, err);
    if (r < 0)
        return r;

    struct dr_file *f;
    r = dr_file_open(fs, path, DR_FILE_CREATE | params->file_flags | (nocow ? DR_FILE_NOCOW : 0u),
                     &f, err);
    if (r < 0)
        return r;
    r = raw_fill(f, dr_round_up(params->size, 512), mode, params->stop, err);
    dr_file_unref(f);
    if (r == 0 && !(params->file_flags & DR_FILE_NO_FLUSH))
        r = fs->ops->sync_dir(fs, path, err);
    if (r < 0)
        fs->ops->unlink(fs, path, NULL);
    return r;
}

const struct dr_format dr_format_raw = {
    .name = "raw",
    .flags = DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_NO_PROBE | DR_FORMAT_FIXED_MAP,
    .create_options = raw_create_options,
    .snapshot_suffix = "raw",
    .probe = raw_probe,
    .open = raw_open,
    .close = raw_close,
    .create = raw_create,
    .measure = raw_measure,
    .unit = raw_unit,
    .map = raw_map,
    .reserve = raw_reserve,
    .publish = raw_settle,
    .cancel = raw_settle,
    .resize = raw_resize,
    .info = raw_info,
};
