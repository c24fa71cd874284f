/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction: units that read as zeros give up their place, and others move to free places nearer
 * to the file's beginning, so that its end can be cut off.
 *
 * A unit moves like a write: reserve finds a place, the bytes are copied there, publish switches
 * the entry, and the old place is free when that is durable. So the unit has its bytes at every
 * instant, in the old place or in the new one. Nothing here changes what can be read: neither hooks
 * nor bitmaps are told. */
#include "core/internal.h"

#include "base/bytes.h"

static int change(struct dr_change *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    uint64_t done;
    return dr_change_run(c, off, len, &done, err);
}

int dr_chain_vacate(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                    bool (*may)(void *user, uint64_t off, uint64_t len), void *user,
                    struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    struct dr_change_source src = {.off = off};
    struct dr_change c = {.chain = chain,
                          .at = at,
                          .mode = DR_CHANGE_ZERO,
                          .src = &src,
                          .zero_flags = DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST,
                          .no_bytes = true,
                          .keeps_view = true,
                          .may = may,
                          .user = user};
    bool alone = at + 1 == chain->n && !image->backing_name;
    struct dr_extent ext;
    int r = dr_image_map(image, off, len, &ext, err);
    if (r < 0)
        return r;
    r = -ENOTSUP;
    if (alone && !ext.flat) {
        c.mode = DR_CHANGE_DROP;
        r = change(&c, off, len, err);
        c.mode = DR_CHANGE_ZERO;
    }
    return r == -ENOTSUP ? change(&c, off, len, err) : r;
}

int dr_chain_lower(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                   struct dr_error *err)
{
    struct dr_change_source src = {.off = off};
    struct dr_change c = {
        .chain = chain, .at = at, .mode = DR_CHANGE_LOWER, .src = &src, .keeps_view = true};
    return change(&c, off, len, err);
}

/* ------------------------------------------------------------------ the driver's part */

static bool can_move(const struct dr_image *image)
{
    return image->fmt->compact_begin != NULL;
}

/* Everything is durable and nobody writes while step runs. */
static int run_alone(struct dr_image *image,
                     int (*step)(struct dr_image *image, struct dr_error *err),
                     struct dr_error *err)
{
    struct dr_range range;
    int r = dr_image_begin(image, 0, false, err);
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    r = dr_image_flush_all(image, err);
    if (r == 0)
        r = step(image, err);
    dr_range_unlock(image->ranges, &range);
    return r;
}

int dr_image_compact_begin(struct dr_image *image, struct dr_error *err)
{
    if (!can_move(image))
        return 0;
    return image->writable ? run_alone(image, image->fmt->compact_begin, err)
                           : image->fmt->compact_begin(image, err);
}

bool dr_image_compact_moves(struct dr_image *image, const struct dr_extent *ext)
{
    if (!can_move(image) || (ext->kind != DR_DATA && ext->kind != DR_CODED) || ext->flat)
        return false;
    DR_LOCK_SCOPE(&image->lock);
    return image->fmt->compact_moves(image, ext);
}

void dr_image_compact_spare(struct dr_image *image, const struct dr_extent *ext)
{
    if (!can_move(image))
        return;
    DR_LOCK_SCOPE(&image->lock);
    image->fmt->compact_spare(image, ext);
}

uint64_t dr_image_compact_length(struct dr_image *image)
{
    uint64_t length = 0;
    DR_LOCK_SCOPE(&image->lock);
    if (can_move(image))
        return image->fmt->compact_length(image);
    for (unsigned i = 0; i < image->n_files; i++)
        length += dr_file_size(image->files[i]);
    return length;
}

static int finish(struct dr_image *image, struct dr_error *err)
{
    int r = can_move(image) ? image->fmt->compact_finish(image, err) : 0;
    if (r == 0)
        r = dr_image_flush_all(image, err);
    return r == 0 && image->fmt->trim ? image->fmt->trim(image, err) : r;
}

int dr_image_compact_finish(struct dr_image *image, struct dr_error *err)
{
    return run_alone(image, finish, err);
}

void dr_image_compact_end(struct dr_image *image)
{
    if (can_move(image))
        image->fmt->compact_end(image);
}
