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

/* What requests have left is durable, and the driver ready to write. */
static int prepare(struct dr_image *image, struct dr_error *err)
{
    int r = dr_image_begin(image, 0, false, err);
    return r < 0 ? r : dr_image_flush_all(image, err);
}

int dr_image_compact_begin(struct dr_image *image, struct dr_error *err)
{
    if (!can_move(image))
        return 0;
    int r = image->writable ? prepare(image, err) : 0;
    return r < 0 ? r : image->fmt->compact_begin(image, err);
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

int dr_image_compact_finish(struct dr_image *image, struct dr_error *err)
{
    int r = prepare(image, err);
    if (r == 0 && can_move(image))
        r = image->fmt->compact_finish(image, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    return r == 0 && image->fmt->trim ? image->fmt->trim(image, err) : r;
}

void dr_image_compact_end(struct dr_image *image)
{
    if (can_move(image))
        image->fmt->compact_end(image);
}
