/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The public handle: a gate in front of the present chain. */
#include "core/internal.h"
#include "base/bytes.h"

static struct dr_disk *disk_new(struct dr_fs *fs, struct dr_chain *chain, unsigned flags)
{
    struct dr_disk *disk = calloc(1, sizeof(*disk));
    if (!disk)
        return NULL;
    pthread_mutex_init(&disk->gate_lock, NULL);
    pthread_cond_init(&disk->gate_cond, NULL);
    disk->fs = fs;
    disk->chain = chain;
    disk->flags = flags;
    return disk;
}

int dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               struct dr_disk **disk, struct dr_error *err)
{
    struct dr_chain *chain;
    int r = dr_chain_open(fs, path, options, &chain, err);
    if (r < 0)
        return r;
    *disk = disk_new(fs, chain, options ? options->flags : 0);
    if (*disk)
        return 0;
    dr_chain_unref(chain, NULL);
    return dr_fail(err, ENOMEM, "%s: out of memory", path);
}

int dr_open(const char *path, const struct dr_open_options *options, struct dr_disk **disk,
            struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    *disk = NULL;
    DR_REQUIRE(path, err);
    return dr_open_fs(dr_fs_posix(), path, options, disk, err);
}

int dr_close(struct dr_disk *disk, struct dr_error *err)
{
    if (!disk)
        return 0;
    int r = dr_chain_unref(disk->chain, err);
    pthread_cond_destroy(&disk->gate_cond);
    pthread_mutex_destroy(&disk->gate_lock);
    free(disk);
    return r;
}

/* ------------------------------------------------------------------ the gate */

struct dr_chain *dr_disk_enter(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    while (disk->closed)
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
    disk->inside++;
    return disk->chain;
}

void dr_disk_leave(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    if (--disk->inside == 0 && disk->closed)
        pthread_cond_broadcast(&disk->gate_cond);
}

int dr_disk_swap(struct dr_disk *disk, struct dr_chain *fresh, struct dr_error *err)
{
    pthread_mutex_lock(&disk->gate_lock);
    while (disk->closed)
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
    disk->closed = true;
    while (disk->inside > 0)
        pthread_cond_wait(&disk->gate_cond, &disk->gate_lock);
    struct dr_chain *old = disk->chain;
    disk->chain = fresh;
    disk->closed = false;
    pthread_cond_broadcast(&disk->gate_cond);
    pthread_mutex_unlock(&disk->gate_lock);
    return dr_chain_unref(old, err);
}

/* ------------------------------------------------------------------ questions */

uint64_t dr_size(const struct dr_disk *disk)
{
    return disk->chain->images[0]->size;
}

bool dr_writable(const struct dr_disk *disk)
{
    return disk->chain->images[0]->writable;
}

size_t dr_chain_length(const struct dr_disk *disk)
{
    return disk->chain->n;
}

static const struct dr_image *image_at(const struct dr_disk *disk, size_t index)
{
    return index < disk->chain->n ? disk->chain->images[index] : NULL;
}

const char *dr_image_path(const struct dr_disk *disk, size_t index)
{
    const struct dr_image *image = image_at(disk, index);
    return image ? image->path : NULL;
}

const char *dr_image_format(const struct dr_disk *disk, size_t index)
{
    const struct dr_image *image = image_at(disk, index);
    return image ? image->fmt->name : NULL;
}

uint64_t dr_image_size(const struct dr_disk *disk, size_t index)
{
    const struct dr_image *image = image_at(disk, index);
    return image ? image->size : 0;
}

const char *dr_image_backing_name(const struct dr_disk *disk, size_t index)
{
    const struct dr_image *image = image_at(disk, index);
    return image ? image->backing_name : NULL;
}

/* ------------------------------------------------------------------ data */

/* Also where there is nothing to do. Bits that a later library may give a meaning are not passed
 * over in silence. */
static int may_change(const struct dr_disk *disk, unsigned flags, struct dr_error *err)
{
    const unsigned known = DR_FUA | DR_MAY_UNMAP | DR_EXPLICIT;
    if (flags & ~known)
        return dr_fail(err, EINVAL, "%s: unknown flags %#x", dr_image_path(disk, 0),
                       flags & ~known);
    if (!dr_writable(disk))
        return dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    return 0;
}

int dr_pread(struct dr_disk *disk, void *buf, uint64_t off, size_t len, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE_N(buf, len, err);
    int r = dr_chain_read(dr_disk_enter(disk), 0, buf, off, len, err);
    dr_disk_leave(disk);
    return r;
}

static int finish_write(struct dr_chain *chain, int r, unsigned flags, struct dr_error *err)
{
    return r == 0 && (flags & DR_FUA) ? dr_chain_flush(chain, 0, err) : r;
}

int dr_pwrite(struct dr_disk *disk, const void *buf, uint64_t off, size_t len, unsigned flags,
              struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE_N(buf, len, err);
    int r = may_change(disk, flags, err);
    if (r < 0)
        return r;
    struct dr_chain *chain = dr_disk_enter(disk);
    r = dr_chain_write(chain, 0, buf, off, len, err);
    r = finish_write(chain, r, flags, err);
    dr_disk_leave(disk);
    return r;
}

int dr_zero(struct dr_disk *disk, uint64_t off, uint64_t len, unsigned flags, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    int r = may_change(disk, flags, err);
    if (r < 0)
        return r;
    struct dr_chain *chain = dr_disk_enter(disk);
    r = dr_chain_zero(chain, 0, off, len, flags, err);
    r = finish_write(chain, r, flags, err);
    dr_disk_leave(disk);
    return r;
}

int dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    int r = may_change(disk, 0, err);
    if (r < 0)
        return r;
    r = dr_chain_discard(dr_disk_enter(disk), 0, off, len, err);
    dr_disk_leave(disk);
    return r;
}

int dr_flush(struct dr_disk *disk, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    int r = dr_chain_flush(dr_disk_enter(disk), 0, err);
    dr_disk_leave(disk);
    return r;
}

/* Behind the old end zeros come to light, never the parent. The driver sees to whole units; the one
 * the old end lies in becomes this image's own here. */
static int fill_last_unit(struct dr_chain *chain, size_t at, uint64_t parent_size,
                          struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    uint64_t uoff, ulen, end = image->size;
    if (parent_size <= end || end == 0)
        return 0;
    image->fmt->unit(image, end - 1, &uoff, &ulen);
    if (uoff + ulen == end)
        return 0;
    CLEANUP_FREE uint8_t *buf = malloc(end - uoff);
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = dr_chain_read(chain, at, buf, uoff, end - uoff, err);
    return r < 0 ? r : dr_chain_fill(chain, at, buf, uoff, end - uoff, err);
}

static uint64_t parent_size_of(const struct dr_chain *chain, size_t at)
{
    if (chain->n > at + 1)
        return chain->images[at + 1]->size;
    return chain->images[at]->backing_name ? UINT64_MAX : 0;
}

int dr_chain_resize(struct dr_chain *chain, size_t at, uint64_t size, struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    if (!image->fmt->resize)
        return dr_fail(err, ENOTSUP, "%s: %s images cannot change their size", image->path,
                       image->fmt->name);
    if (size > INT64_MAX)
        return dr_fail(err, EFBIG, "%s: no disk is larger than 2^63-1 bytes", image->path);
    uint64_t below = parent_size_of(chain, at);
    int r = dr_image_begin(image, 0, !(image->flags & DR_OPEN_UNCHANGED), err);
    if (r == 0 && size > image->size && chain->n > at + 1)
        r = fill_last_unit(chain, at, below, err);
    if (r == 0)
        r = dr_chain_flush(chain, at, err);
    return r < 0 ? r : image->fmt->resize(image, size, below, err);
}

int dr_truncate(struct dr_disk *disk, uint64_t size, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    int r = dr_chain_resize(dr_disk_enter(disk), 0, size, err);
    dr_disk_leave(disk);
    return r;
}

/* ------------------------------------------------------------------ where bytes live */

static int status_at(struct dr_chain *chain, uint64_t off, uint64_t len,
                     struct dr_extent_status *status, struct dr_error *err)
{
    struct dr_place place;
    bool zero = false;
    int r = dr_chain_map(chain, 0, off, len, &place, err);
    if (r == 0 && place.ext.kind == DR_DATA && place.ext.flat)
        r = dr_place_sparse(&place, &zero, err);
    dr_place_done(&place);
    if (r < 0)
        return r;
    *status = (struct dr_extent_status){.off = off, .len = place.ext.len};
    status->depth = (unsigned)(place.owner < chain->n ? place.owner : chain->n - 1);
    if (place.past_end) { /* no image has it; the parent's child is the last that could */
        status->flags = DR_EXTENT_ZERO;
        status->depth--;
        return 0;
    }
    switch (place.ext.kind) {
    case DR_HOLE:
        status->flags = DR_EXTENT_ZERO;
        break;
    case DR_ZERO:
        status->flags = DR_EXTENT_ALLOCATED | DR_EXTENT_ZERO;
        break;
    case DR_DATA:
        status->flags = DR_EXTENT_ALLOCATED | DR_EXTENT_OFFSET;
        status->flags |= zero ? DR_EXTENT_ZERO : DR_EXTENT_DATA;
        status->file = place.ext.file->path;
        status->host_off = place.ext.host;
        break;
    case DR_CODED:
        status->flags = DR_EXTENT_ALLOCATED | DR_EXTENT_DATA | DR_EXTENT_CODED;
        break;
    }
    return 0;
}

static bool status_continues(const struct dr_extent_status *a, const struct dr_extent_status *b)
{
    if (a->flags != b->flags || a->depth != b->depth || a->file != b->file)
        return false;
    return !(a->flags & DR_EXTENT_OFFSET) || a->host_off + a->len == b->host_off;
}

int dr_block_status(struct dr_disk *disk, uint64_t off, uint64_t len,
                    struct dr_extent_status *status, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(status, err);
    struct dr_chain *chain = dr_disk_enter(disk);
    int r = 0;
    if (len == 0 || !dr_inside(off, len, chain->images[0]->size))
        r = dr_fail(err, EINVAL, "%s: %llu bytes at %llu are not inside the disk of %llu bytes",
                    chain->images[0]->path, (unsigned long long)len, (unsigned long long)off,
                    (unsigned long long)chain->images[0]->size);
    if (r == 0)
        r = status_at(chain, off, len, status, err);
    while (r == 0 && status->len < len) { /* damage behind what is known is told when asked */
        struct dr_extent_status more;
        if (status_at(chain, off + status->len, len - status->len, &more, NULL) < 0 ||
            !status_continues(status, &more))
            break;
        status->len += more.len;
    }
    dr_disk_leave(disk);
    return r;
}
