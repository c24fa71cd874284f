/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Allocation is setting bits: the place in the raw file is the guest's own.
 *
 * Bits go to disk behind the data they tell of (level 2) and only from 0 to 1, so a torn sector of
 * them is harmless. The one way back is a drop, when the parent has the same bytes: the bits are
 * cleared, and only when that is durable the range is punched; until then nobody may write there
 * again, or the punch would take new data away. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

#define BIT_LEVEL 2
/* Dropped ranges that may wait for their punch; then a flush. */
#define MAX_PENDING 65536u

enum { PRIV_DROP };

/* A bitmap that ends early gets its full length before bits are written: a part of one would be
 * taken for a draft's, which has fewer. */
int addcow_begin_write(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err)
{
    (void)off;
    (void)changes;
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *meta = image->files[ADDCOW_META];
    uint64_t room = h->bitmap_off + addcow_bitmap_len(h, image->size);
    int r = addcow_refuse_write(image, err);
    if (r < 0 || dr_file_size(meta) >= room)
        return r;
    r = dr_file_truncate(meta, room, err);
    return r < 0 ? r : dr_file_flush(meta, err);
}

/* ------------------------------------------------------------------ pages of bits */

/* Bits of the units that [off, off + len) touches, as places in the metadata file. */
struct bits {
    uint64_t first, end; /* bits */
    uint64_t at, last;   /* the bytes they stand in */
};

static struct bits bits_of(const struct dr_image *image, uint64_t off, uint64_t len)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct bits b = {.first = off / h->granule, .end = addcow_bits(h, off + len)};
    b.at = h->bitmap_off + b.first / 8;
    b.last = h->bitmap_off + (b.end - 1) / 8;
    return b;
}

static int pin(struct dr_image *image, const struct bits *b, struct dr_reservation *r)
{
    for (uint64_t at = b->at, next; at <= b->last; at = next) {
        struct dr_page *page;
        next = dr_round_down(at, DR_PAGE_SIZE) + DR_PAGE_SIZE;
        size_t len = (size_t)(dr_min(next, b->last + 1) - at);
        int rc = dr_reserve_page(image, r, ADDCOW_META, at, len, BIT_LEVEL, &page);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void edit(struct dr_image *image, struct dr_reservation *r, bool set)
{
    struct bits b = bits_of(image, r->off, r->len);
    uint64_t start = addcow_of(image)->h.bitmap_off;
    for (unsigned i = 0; i < r->n_pins; i++) {
        const struct dr_pin *p = dr_reserved_pin(r, i);
        uint64_t bit = (p->off - start) * 8;
        uint8_t bytes[DR_PAGE_SIZE];
        memcpy(bytes, dr_page_at(p->page, p->off), p->len);
        addcow_edit_bits(bytes, dr_max(b.first, bit) - bit, dr_min(b.end - bit, p->len * 8), set);
        dr_page_put(image, p->page, p->off, bytes, p->len);
    }
}

/* ------------------------------------------------------------------ what waits for its punch */

static bool waits(const struct addcow_state *s, uint64_t off, uint64_t end)
{
    for (const struct addcow_pending *p = s->pending; p; p = p->next)
        if (p->off < end && off < p->off + p->len)
            return true;
    return false;
}

static void pending_add(struct addcow_state *s, struct addcow_pending *p)
{
    *s->pending_end = p;
    s->pending_end = &p->next;
    s->n_pending++;
}

static int reserve_drop(struct dr_image *image, uint64_t off, uint64_t len,
                        struct dr_reservation *r)
{
    struct addcow_state *s = addcow_of(image);
    struct bits b = bits_of(image, off, len);
    if (s->n_pending >= MAX_PENDING)
        return dr_need_flush(image);
    int rc = pin(image, &b, r);
    if (rc < 0)
        return rc;
    struct addcow_pending *p = calloc(1, sizeof(*p));
    if (!p)
        return -ENOMEM;
    *p = (struct addcow_pending){.off = off, .len = len};
    r->priv[PRIV_DROP] = (uintptr_t)p;
    r->todo = DR_TODO_NOTHING;
    return 0;
}

/* They come back in the order they were dropped. */
void addcow_reuse(struct dr_image *image, const struct dr_freed *gone)
{
    struct addcow_state *s = addcow_of(image);
    for (struct addcow_pending **link = &s->pending; *link; link = &(*link)->next) {
        struct addcow_pending *p = *link;
        if (p->off != gone->host || p->len != gone->len)
            continue;
        *link = p->next;
        if (s->pending_end == &p->next)
            s->pending_end = link;
        s->n_pending--;
        free(p);
        return;
    }
}

/* ------------------------------------------------------------------ reserve, publish, cancel */

int addcow_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                   uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    (void)host_len;
    struct addcow_state *s = addcow_of(image);
    uint64_t start = dr_round_down(off, s->h.granule);
    uint64_t end = dr_min(dr_round_up(off + len, s->h.granule), image->size);
    int rc = addcow_refuse_write(image, err);
    if (rc < 0)
        return rc;
    if (want == DR_WANT_CODED)
        return -ENOTSUP;
    if (want != DR_WANT_DATA && (start != off || end != off + len))
        return -ENOTSUP; /* part of a unit: it must be filled up with bytes */
    if (want == DR_WANT_HOLE)
        return reserve_drop(image, off, len, r);
    if (waits(s, start, end))
        return dr_need_flush(image);
    struct bits b = bits_of(image, start, end - start);
    rc = pin(image, &b, r);
    if (rc < 0)
        return rc;
    r->off = r->host = start;
    r->len = end - start;
    r->file = image->files[ADDCOW_RAW];
    /* Under a bit that is 0 there may be junk: "it looks empty" is never enough. */
    r->todo = want == DR_WANT_ZERO ? DR_TODO_ZERO_HOST : DR_TODO_WRITE;
    r->punch = true;
    return 0;
}

void addcow_publish(struct dr_image *image, struct dr_reservation *r)
{
    struct addcow_pending *p = (struct addcow_pending *)(uintptr_t)r->priv[PRIV_DROP];
    edit(image, r, p == NULL);
    if (!p)
        return;
    struct dr_freed freed = {.file = image->files[ADDCOW_RAW], .host = r->off, .len = r->len};
    dr_free_later(image, freed);
    pending_add(addcow_of(image), p);
}

void addcow_cancel(struct dr_image *image, struct dr_reservation *r)
{
    (void)image;
    free((struct addcow_pending *)(uintptr_t)r->priv[PRIV_DROP]);
}

/* ------------------------------------------------------------------ size */

static void forget_bits(struct dr_image *image)
{
    DR_LOCK_SCOPE(&image->lock);
    uint64_t off = addcow_of(image)->h.bitmap_off;
    dr_page_forget(image, ADDCOW_META, off, INT64_MAX - off);
}

static int resize_raw(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    struct dr_file *raw = image->files[ADDCOW_RAW];
    int r = dr_file_truncate(raw, size, err);
    if (r < 0)
        return r;
    image->size = size;
    return dr_file_flush(raw, err);
}

/* The unit the old end lies in must be the raw file's own, or the parent's bytes behind the end
 * come to light. Without the parent at hand the core could not see to that. */
static int check_last_unit(struct dr_image *image, uint64_t parent_size, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_extent ext;
    uint64_t start = dr_round_down(image->size, h->granule);
    if (parent_size <= image->size || start == image->size)
        return 0;
    int r = dr_image_map(image, start, image->size - start, &ext, err);
    if (r < 0 || ext.kind == DR_DATA)
        return r;
    return dr_fail(err, EINVAL,
                   "%s: cannot grow without its backing file: the last %llu bytes come from there",
                   image->path, (unsigned long long)(image->size - start));
}

/* The raw file's length is the size: before it grows, every bit is what it must be afterwards. */
static int grow(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *meta = image->files[ADDCOW_META];
    uint64_t old = addcow_bits(h, image->size), old_size = image->size;
    uint64_t masked = addcow_bits(h, dr_min(size, parent_size));
    uint64_t room = h->bitmap_off + addcow_bitmap_len(h, size);
    int r = check_last_unit(image, parent_size, err);
    if (r == 0)
        r = addcow_cut_tail(meta, h, image->size, err);
    if (r == 0)
        r = dr_file_flush(meta, err);
    if (r == 0 && dr_file_size(meta) < room)
        r = dr_file_truncate(meta, room, err);
    if (r == 0 && parent_size > image->size)
        r = addcow_set_in_file(meta, h, old, masked, err);
    if (r == 0)
        r = dr_file_flush(meta, err);
    if (r == 0)
        r = resize_raw(image, size, err);
    if (r < 0 && image->size == old_size) /* no bit tells of what did not come */
        addcow_cut_tail(meta, h, old_size, NULL);
    return r;
}

static int shrink(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    struct dr_file *meta = image->files[ADDCOW_META];
    int r = resize_raw(image, size, err);
    if (r == 0)
        r = addcow_cut_tail(meta, &addcow_of(image)->h, size, err);
    return r < 0 ? r : dr_file_flush(meta, err);
}

/* Cut off half way, an empty raw file with bits would look like one that lost its bytes. */
static int check_not_empty(const struct dr_image *image, uint64_t size, uint64_t parent_size,
                           struct dr_error *err)
{
    if (size == 0)
        return dr_fail(err, EINVAL, "%s: an add-cow disk cannot be made empty", image->path);
    if (image->size == 0 && parent_size > 0)
        return dr_fail(err, EINVAL,
                       "%s: an empty add-cow disk with a backing file cannot grow; make a new one",
                       image->path);
    return 0;
}

int addcow_resize(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err)
{
    int r = addcow_refuse_write(image, err);
    if (r < 0 || size == image->size)
        return r;
    if (size > ADDCOW_MAX_SIZE)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", image->path,
                       (unsigned long long)size);
    if (image->files[ADDCOW_RAW]->block_device)
        return dr_fail(err, EINVAL, "%s: its image file %s is a block device, whose size is fixed",
                       image->path, image->files[ADDCOW_RAW]->path);
    r = check_not_empty(image, size, parent_size, err);
    if (r < 0)
        return r;
    r = size > image->size ? grow(image, size, parent_size, err) : shrink(image, size, err);
    forget_bits(image);
    return r;
}

/* Commit has dropped everything: no bit is set, so neither the bitmap nor the raw file needs space.
 * They still have the blocks of the host's file system that were dropped in parts, and never as a
 * whole. */
int addcow_trim(struct dr_image *image, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *meta = image->files[ADDCOW_META];
    uint64_t n = 0, room = h->bitmap_off + addcow_bitmap_len(h, image->size);
    int r = addcow_refuse_write(image, err);
    if (r == 0)
        r = addcow_count(image, 0, addcow_bits(h, image->size), &n, err);
    if (r < 0 || n > 0)
        return r;
    r = dr_file_truncate(meta, h->bitmap_off, err);
    if (r == 0)
        r = dr_file_truncate(meta, room, err);
    forget_bits(image);
    if (r == 0)
        r = dr_file_flush(meta, err);
    if (r == 0 && image->size > 0) /* a container that cannot punch keeps the space */
        dr_file_zero(image->files[ADDCOW_RAW], 0, image->size,
                     DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    return r;
}
