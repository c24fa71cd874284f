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

/* Do the images below show zeros in all of [off, off + len)? */
static int below_is_zero(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, bool *zero,
                         struct dr_error *err)
{
    uint64_t end = dr_min(off + len, chain->images[at + 1]->size);
    int r = 0;
    *zero = true;
    while (r == 0 && *zero && off < end) {
        struct dr_place place;
        r = dr_chain_map(chain, at + 1, off, end - off, &place, err);
        if (r < 0)
            return r;
        *zero = place.ext.kind == DR_HOLE || place.ext.kind == DR_ZERO;
        if (place.ext.kind == DR_DATA)
            r = dr_place_sparse(&place, zero, err);
        off += place.ext.len;
        dr_place_done(&place);
    }
    return r;
}

/* *nothing: below the units from off on there is nothing to be seen, for *run bytes. A parent that
 * is not open may have anything. */
static int look_below(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, uint64_t *run,
                      bool *nothing, struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    uint64_t uoff, ulen, end = off + len, next;
    *run = len;
    *nothing = at + 1 == chain->n && !image->backing_name;
    if (at + 1 == chain->n)
        return 0;
    for (uint64_t pos = off; pos < end; pos = next) {
        bool zero;
        image->fmt->unit(image, pos, &uoff, &ulen);
        next = dr_min(uoff + ulen, end);
        int r = below_is_zero(chain, at, pos, next - pos, &zero, err);
        if (r < 0)
            return r;
        *run = pos - off;
        if (pos > off && zero != *nothing)
            return 0;
        *nothing = zero;
    }
    *run = len;
    return 0;
}

int dr_chain_vacate(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                    bool (*may)(void *user, uint64_t off, uint64_t len), void *user,
                    struct dr_error *err)
{
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
    struct dr_extent ext;
    bool kept = false;
    int r = dr_image_map(chain->images[at], off, len, &ext, err);
    if (r == 0 && ext.flat)
        return change(&c, off, len, err);
    for (uint64_t end = off + len, run; r == 0 && off < end; off += run) {
        bool nothing;
        r = look_below(chain, at, off, end - off, &run, &nothing, err);
        src.off = off;
        c.mode = nothing ? DR_CHANGE_DROP : DR_CHANGE_ZERO;
        if (r == 0)
            r = change(&c, off, run, err);
        c.mode = DR_CHANGE_ZERO;
        if (r == -ENOTSUP && nothing)
            r = change(&c, off, run, err);
        kept |= r == -ENOTSUP;
        r = r == -ENOTSUP ? 0 : r;
    }
    return r == 0 && kept ? -ENOTSUP : r;
}

int dr_chain_lower(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                   struct dr_error *err)
{
    struct dr_change_source src = {.off = off};
    struct dr_change c = {
        .chain = chain, .at = at, .mode = DR_CHANGE_LOWER, .src = &src, .keeps_view = true};
    return change(&c, off, len, err);
}

/* ------------------------------------------------------------------ beside writers */

int dr_image_check_beside(struct dr_image *image, struct dr_check_result *result,
                          struct dr_error *err)
{
    int r = image->writable ? dr_image_begin(image, 0, false, err) : 0;
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->begin_lock);
    dr_keep_freed(image, true);
    r = dr_image_flush(image, err);
    if (r == 0)
        r = image->fmt->check(image, 0, result, err);
    dr_keep_freed(image, false);
    return r;
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

int dr_image_compact_look(struct dr_image *image, struct dr_error *err)
{
    if (!image->fmt->compact_look)
        return 0;
    DR_LOCK_SCOPE(&image->begin_lock);
    return image->fmt->compact_look(image, err);
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

int dr_image_compact_finish(struct dr_image *image, bool *again, struct dr_error *err)
{
    int r = prepare(image, err);
    if (r == 0 && can_move(image))
        r = image->fmt->compact_finish(image, again, err);
    if (r == 0)
        r = dr_image_flush_all(image, err);
    return r == 0 && image->fmt->trim ? image->fmt->trim(image, err) : r;
}

void dr_image_compact_end(struct dr_image *image)
{
    if (can_move(image))
        image->fmt->compact_end(image);
}
