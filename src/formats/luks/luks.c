/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* luks: a header, and behind it the bytes of the disk, encrypted. As raw, but that all bytes go
 * through a cipher (storage/encrypted.h). An image that was opened without its password can be
 * looked at, but not into. */
#include "formats/luks/header.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "core/core.h"
#include "storage/encrypted.h"

/* As raw, luks has no allocation unit: this is how wide the range lock of a zeroing is. */
#define LUKS_UNIT 65536u

struct luks {
    struct luks_header h;
    struct dr_file *plain; /* NULL: the password was not given */
};

static struct luks *luks_of(const struct dr_image *image)
{
    return image->state;
}

static int luks_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    return luks_is_header(buf, len) ? 100 : 0;
}

static int unlock(struct dr_image *image, struct dr_error *err)
{
    struct luks *l = luks_of(image);
    struct dr_cipher *cipher;
    if (!image->key_secret)
        return 0;
    int r = luks_unlock(&l->h, image->files[0], 0, image->key_secret, image->path, &cipher, err);
    return r < 0 ? r : dr_encrypted_open(image->files[0], l->h.payload, cipher, &l->plain, err);
}

static int luks_open(struct dr_image *image, struct dr_error *err)
{
    struct dr_file *f = image->files[0];
    struct luks *l = image->state = calloc(1, sizeof(*l));
    if (!l)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    uint64_t size = dr_file_size(f);
    int r = luks_read(f, 0, size, image->path, &l->h, err);
    if (r == 0 && size > INT64_MAX)
        r = dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", image->path,
                    (unsigned long long)size);
    if (r == 0)
        image->size = dr_round_down(size - l->h.payload, DR_CIPHER_SECTOR);
    return r < 0 ? r : unlock(image, err);
}

static void luks_close(struct dr_image *image)
{
    struct luks *l = image->state;
    if (!l)
        return;
    dr_file_unref(l->plain);
    free(l);
    image->state = NULL;
}

static void luks_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    (void)image;
    *uoff = dr_round_down(off, LUKS_UNIT);
    *ulen = LUKS_UNIT;
}

static int refuse_locked(const struct dr_image *image, struct dr_error *err)
{
    return dr_fail(
        err, EACCES,
        "%s: Parameter 'key-secret' is required for cipher: it is encrypted (LUKS); name "
        "a secret with its password, or the format raw if its bytes are meant as they "
        "are",
        image->path);
}

static int luks_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                    struct dr_error *err)
{
    struct dr_file *plain = luks_of(image)->plain;
    if (!plain)
        return refuse_locked(image, err);
    *ext = (struct dr_extent){
        .kind = DR_DATA, .len = len, .file = plain, .host = off, .in_place = true, .stays = true};
    return 0;
}

/* Zeros are data here. */
static int luks_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                        uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    struct dr_file *plain = luks_of(image)->plain;
    (void)host_len;
    if (!plain)
        return refuse_locked(image, err);
    if (want != DR_WANT_DATA)
        return -ENOTSUP;
    *r = (struct dr_reservation){
        .off = off, .len = len, .file = plain, .host = off, .todo = DR_TODO_WRITE, .want = want};
    return 0;
}

static void luks_settle(struct dr_image *image, struct dr_reservation *r)
{
    (void)image;
    (void)r;
}

/* What is new is written, since a hole of the file would read as noise. The file's length is the
 * disk's, so zeros are written from the old end on: whenever that is interrupted, the disk is
 * longer by what has zeros already. A part of a file takes nothing behind its end, and gets its
 * length first. */
static int grow(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    struct luks *l = luks_of(image);
    struct dr_file *f = image->files[0];
    uint64_t old = image->size, end = dr_file_size(f);
    int r = f->part ? dr_file_truncate(f, l->h.payload + size, err) : 0;
    if (r == 0)
        r = dr_file_zero(l->plain, old, size - old, DR_FILE_ZERO_WRITE, err);
    if (r < 0 && dr_file_size(f) > end)
        dr_file_truncate(f, end, NULL);
    return r;
}

static int luks_resize(struct dr_image *image, uint64_t size, uint64_t parent_size,
                       struct dr_error *err)
{
    struct luks *l = luks_of(image);
    (void)parent_size;
    if (!l->plain)
        return refuse_locked(image, err);
    if (image->files[0]->part == DR_PART_OF_SIZE)
        return dr_fail(err, EINVAL, "%s: a part of a fixed size cannot be resized", image->path);
    if (size > INT64_MAX - 511 - l->h.payload)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", image->path,
                       (unsigned long long)size);
    size = dr_round_up(size, DR_CIPHER_SECTOR);
    int r = size > image->size ? grow(image, size, err)
                               : dr_file_truncate(image->files[0], l->h.payload + size, err);
    if (r == 0)
        image->size = size;
    return r;
}

static int luks_image_info(struct dr_image *image, json_t *data, uint64_t *cluster_size,
                           struct dr_error *err)
{
    *cluster_size = 0;
    return luks_info(&luks_of(image)->h, data) == 0 ? 0
                                                    : dr_fail_errno(err, ENOMEM, "%s", image->path);
}

static bool luks_encrypted(const struct dr_image *image)
{
    (void)image;
    return true;
}

/* ------------------------------------------------------------------ create */

static const struct dr_option_help luks_create_options[] = {
    LUKS_OPTION_HELP(""),
    {NULL, NULL, NULL, NULL},
};

static int plan(const char *path, const struct dr_create_params *params, struct luks_options *o,
                struct luks_header *h, struct dr_error *err)
{
    for (size_t i = 0; i < params->n_options; i++) {
        const struct dr_option *option = &params->options[i];
        int r = luks_take_option(o, path, option->name, option->value, err);
        if (r > 0)
            r = dr_fail(err, EINVAL, "luks: unknown create option '%s'", option->name);
        if (r < 0)
            return r;
    }
    if (params->backing_name)
        return dr_fail(err, EINVAL, "%s: a luks image cannot have a backing file", path);
    if (params->size > INT64_MAX - 511 - LUKS_MAX_PAYLOAD)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", path,
                       (unsigned long long)params->size);
    return luks_plan(o, path, "", h, err);
}

static int luks_measure(const char *path, const struct dr_create_params *params,
                        struct dr_cost *cost, struct dr_error *err)
{
    struct luks_options o = LUKS_DEFAULTS;
    struct luks_header h;
    o.secret = ""; /* the size is the same with every password */
    int r = plan(path, params, &o, &h, err);
    if (r == 0)
        *cost = (struct dr_cost){.fixed = h.payload + dr_round_up(params->size, DR_CIPHER_SECTOR)};
    return r;
}

/* The slots first, then the header: a file with a magic number is complete. */
static int write_image(struct dr_file *f, const uint8_t *bytes, const struct luks_header *h,
                       uint64_t size, struct dr_error *err)
{
    int r = dr_file_truncate(f, h->payload + dr_round_up(size, DR_CIPHER_SECTOR), err);
    if (r == 0)
        r = dr_file_pwrite(f, bytes + LUKS_FIRST_SLOT, LUKS_FIRST_SLOT,
                           h->payload - LUKS_FIRST_SLOT, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = dr_file_pwrite(f, bytes, 0, LUKS_FIRST_SLOT, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int luks_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                       struct dr_error *err)
{
    struct luks_options o = LUKS_DEFAULTS;
    struct luks_header h;
    struct dr_file *f = NULL;
    int r = plan(path, params, &o, &h, err);
    if (r < 0)
        return r;
    CLEANUP_FREE uint8_t *bytes = calloc(1, h.payload);
    if (!bytes)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    r = luks_make(&o, path, &h, bytes, err);
    if (r == 0)
        r = dr_file_open(fs, path, DR_FILE_CREATE | params->file_flags, &f, err);
    if (r < 0)
        return r;
    r = write_image(f, bytes, &h, params->size, err);
    dr_file_unref(f);
    if (r == 0 && !(params->file_flags & DR_FILE_NO_FLUSH))
        r = fs->ops->sync_dir(fs, path, err);
    if (r < 0)
        fs->ops->unlink(fs, path, NULL);
    return r;
}

const struct dr_format dr_format_luks = {
    .name = "luks",
    .flags = DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_FIXED_MAP | DR_FORMAT_NOISE,
    .create_options = luks_create_options,
    .snapshot_suffix = "luks",
    .probe = luks_probe,
    .open = luks_open,
    .close = luks_close,
    .create = luks_create,
    .measure = luks_measure,
    .unit = luks_unit,
    .map = luks_map,
    .reserve = luks_reserve,
    .publish = luks_settle,
    .cancel = luks_settle,
    .resize = luks_resize,
    .info = luks_image_info,
    .encrypted = luks_encrypted,
};
