/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Chains: images linked by backing, and the walk that finds where a byte lives. */
#include "core/internal.h"
#include "base/bytes.h"

struct dr_chain *dr_chain_new(struct dr_image *const *images, size_t n)
{
    struct dr_chain *chain = malloc(sizeof(*chain) + n * sizeof(struct dr_image *));
    if (!chain) {
        for (size_t i = 0; i < n; i++)
            dr_image_unref(images[i], NULL);
        return NULL;
    }
    atomic_init(&chain->refs, 1);
    chain->hooks = NULL;
    chain->n = n;
    memcpy(chain->images, images, n * sizeof(struct dr_image *));
    return chain;
}

struct dr_chain *dr_chain_ref(struct dr_chain *chain)
{
    atomic_fetch_add(&chain->refs, 1);
    return chain;
}

/* Deepest first: a child's data must not become durable on a parent that is not. */
int dr_chain_unref(struct dr_chain *chain, struct dr_error *err)
{
    int result = 0;
    if (!chain || atomic_fetch_sub(&chain->refs, 1) != 1)
        return 0;
    for (size_t i = chain->n; i-- > 0;) {
        int r = dr_image_unref(chain->images[i], err);
        if (r < 0 && result == 0)
            result = r;
    }
    free(chain);
    return result;
}

struct dr_chain *dr_chain_tail(struct dr_chain *chain, size_t first)
{
    for (size_t i = first; i < chain->n; i++)
        dr_image_ref(chain->images[i]);
    return dr_chain_new(chain->images + first, chain->n - first);
}

/* ------------------------------------------------------------------ places */

/* Frozen images, too: one that is thawed meanwhile frees and reuses places. */
static void place_pin(struct dr_place *place, struct dr_image *image)
{
    place->ticket = dr_epoch_enter(image->ranges);
    place->pinned = image;
}

void dr_place_done(struct dr_place *place)
{
    if (place->pinned)
        dr_epoch_leave(place->pinned->ranges, place->ticket);
    place->pinned = NULL;
}

int dr_chain_map_part(struct dr_chain *chain, size_t first, size_t last, uint64_t off, uint64_t len,
                      struct dr_place *place, struct dr_error *err)
{
    *place = (struct dr_place){.owner = chain->n};
    for (size_t i = first; i < last; i++) {
        struct dr_image *image = chain->images[i];
        if (off >= image->size) {
            place->ext = (struct dr_extent){.kind = DR_ZERO, .len = len};
            place->owner = i;
            place->past_end = true;
            return 0;
        }
        len = dr_min(len, image->size - off);
        place_pin(place, image);
        int r = dr_image_map(image, off, len, &place->ext, err);
        if (r == 0 && place->ext.kind != DR_HOLE) {
            place->owner = i;
            return 0;
        }
        dr_place_done(place);
        if (r < 0)
            return r;
        len = place->ext.len;
    }
    place->ext = (struct dr_extent){.kind = DR_HOLE, .len = len};
    return 0;
}

int dr_chain_map(struct dr_chain *chain, size_t first, uint64_t off, uint64_t len,
                 struct dr_place *place, struct dr_error *err)
{
    return dr_chain_map_part(chain, first, chain->n, off, len, place, err);
}

int dr_place_sparse(struct dr_place *place, bool *zero, struct dr_error *err)
{
    *zero = false;
    struct dr_extent *ext = &place->ext;
    if (ext->kind != DR_DATA)
        return 0;
    enum dr_file_extent kind;
    uint64_t run;
    int r = dr_file_extent(ext->file, ext->host, ext->len, &kind, &run, err);
    if (r < 0)
        return r;
    /* What metadata points to must be there: a file that ends is not a hole (invariant 8). */
    uint64_t size = dr_file_size(ext->file);
    if (!dr_inside(ext->host, ext->len, size))
        return dr_fail(err, EIO, "%s: ends at %llu, data up to %llu was expected", ext->file->path,
                       (unsigned long long)size, (unsigned long long)(ext->host + ext->len));
    ext->len = run;
    *zero = kind == DR_FILE_HOLE;
    return 0;
}

int dr_chain_flush(struct dr_chain *chain, size_t at, struct dr_error *err)
{
    int result = 0;
    for (size_t i = chain->n; i-- > at;) {
        int r = dr_image_flush(chain->images[i], err);
        if (r < 0 && result == 0)
            result = r;
    }
    return result;
}

int dr_chain_harden(struct dr_chain *chain, size_t first, struct dr_error *err)
{
    int r = 0;
    for (size_t i = chain->n; r == 0 && i-- > first;)
        r = dr_image_harden(chain->images[i], err);
    return r;
}
