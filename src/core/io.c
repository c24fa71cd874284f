/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The only data mover: reads that fall through the layers, and the verbs that change a layer:
 * write, fill, zero, drop, discard, copy. How a change is made is in change.c. */
#include "core/internal.h"
#include "base/bytes.h"
#include "base/cleanup.h"

#define COPY_BYTES (1u << 20) /* of a file, at once */

static int check_range(const struct dr_image *image, uint64_t off, uint64_t len,
                       struct dr_error *err)
{
    if (dr_inside(off, len, image->size))
        return 0;
    return dr_fail(err, EINVAL, "%s: %llu bytes at %llu are not inside the disk of %llu bytes",
                   image->path, (unsigned long long)len, (unsigned long long)off,
                   (unsigned long long)image->size);
}

/* ------------------------------------------------------------------ read */

/* A request this large is one of many by which somebody copies the disk, and is not repeated. */
#define READ_ONCE (128u << 10)

static int read_place(struct dr_chain *chain, const struct dr_place *place, uint8_t *buf, bool once,
                      struct dr_error *err)
{
    const struct dr_extent *ext = &place->ext;
    switch (ext->kind) {
    case DR_DATA:
        return dr_file_pread(ext->file, buf, ext->host, ext->len, err);
    case DR_CODED:
        return dr_decoded_read(chain->images[place->owner], ext, buf, ext->len, once, err);
    default:
        memset(buf, 0, ext->len);
        return 0;
    }
}

static int read_range(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                      struct dr_error *err)
{
    uint8_t *out = buf;
    bool once = len >= READ_ONCE;
    while (len > 0) {
        struct dr_place place;
        int r = dr_chain_map(chain, at, off, len, &place, err);
        if (r == 0)
            r = read_place(chain, &place, out, once, err);
        dr_place_done(&place);
        if (r < 0)
            return r;
        out += place.ext.len;
        off += place.ext.len;
        len -= place.ext.len;
    }
    return 0;
}

int dr_chain_read(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                  struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    return r < 0 ? r : read_range(chain, at, buf, off, len, err);
}

int dr_chain_read_padded(struct dr_chain *chain, size_t at, void *buf, uint64_t off, size_t len,
                         struct dr_error *err)
{
    uint64_t size = at < chain->n ? chain->images[at]->size : 0;
    size_t have = off < size ? (size_t)dr_min(len, size - off) : 0;
    if (have < len)
        memset((uint8_t *)buf + have, 0, len - have);
    return read_range(chain, at, buf, off, have, err);
}

/* ------------------------------------------------------------------ write */

/* Changes through the top of a disk's chain are the guest's, unless a job makes them. */
static bool is_guests(const struct dr_chain *chain, size_t at)
{
    return at == 0 && chain->hooks && chain->hooks->n > 0;
}

static struct dr_change guest_change(struct dr_chain *chain, size_t at, enum dr_change_mode mode,
                                     const struct dr_change_source *src)
{
    return (struct dr_change){
        .chain = chain, .at = at, .mode = mode, .src = src, .guest = is_guests(chain, at)};
}

static int change_all(const struct dr_change *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    uint64_t done;
    return dr_change_run(c, off, len, &done, err);
}

int dr_chain_write(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, size_t len,
                   struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct dr_change_source src = {.buf = buf, .off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_WRITE, &src);
    return change_all(&c, off, len, err);
}

int dr_chain_write_durable(struct dr_chain *chain, size_t at, const void *buf, uint64_t off,
                           size_t len, bool *durable, struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    bool not_durable = false;
    struct dr_change_source src = {.buf = buf, .off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_WRITE, &src);
    c.not_durable = &not_durable;
    r = change_all(&c, off, len, err);
    *durable = !not_durable;
    return r;
}

int dr_chain_fill(struct dr_chain *chain, size_t at, const void *buf, uint64_t off, uint64_t len,
                  struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct dr_change_source src = {.buf = buf, .off = off};
    struct dr_change c = {
        .chain = chain, .at = at, .mode = DR_CHANGE_FILL, .src = &src, .keeps_view = true};
    return change_all(&c, off, len, err);
}

/* Nothing to do at off? Then *len is cut to how long that holds; else to how long it does not. */
static int zero_already(struct dr_chain *chain, size_t at, uint64_t off, uint64_t *len,
                        unsigned flags, bool *already, struct dr_error *err)
{
    struct dr_place place;
    int r = dr_chain_map(chain, at, off, *len, &place, err);
    if (r < 0)
        return r;
    dr_place_done(&place);
    *len = place.ext.len;
    bool own = place.owner == at && place.ext.kind == DR_ZERO;
    bool reads_zero = place.ext.kind == DR_ZERO || place.ext.kind == DR_HOLE;
    bool gives_up = (flags & DR_MAY_UNMAP) && own && place.ext.placed;
    *already = gives_up ? false : flags & DR_EXPLICIT ? own : reads_zero;
    return 0;
}

/* Where it is not zero already. */
static int zero_range(const struct dr_change *c, uint64_t off, uint64_t len, unsigned flags,
                      struct dr_error *err)
{
    int r = 0;
    while (r == 0 && len > 0) {
        uint64_t part = len;
        bool already;
        r = zero_already(c->chain, c->at, off, &part, flags, &already, err);
        if (r == 0 && !already)
            r = change_all(c, off, part, err);
        off += part;
        len -= part;
    }
    return r;
}

int dr_chain_zero(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, unsigned flags,
                  struct dr_error *err)
{
    struct dr_change_source src = {.off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_ZERO, &src);
    c.zero_flags = flags & DR_MAY_UNMAP ? DR_FILE_ZERO_PUNCH : 0;
    c.no_bytes = flags & DR_FAST;
    if (c.no_bytes)
        c.zero_flags |= DR_FILE_ZERO_FAST;
    int r = check_range(chain->images[at], off, len, err);
    if (r == 0)
        r = zero_range(&c, off, len, flags, err);
    if (r == -ENOTSUP) /* drivers answer so without a text */
        return dr_fail(err, ENOTSUP, "%s: cannot zero %llu bytes at %llu without writing them",
                       chain->images[at]->path, (unsigned long long)len, (unsigned long long)off);
    return r;
}

int dr_chain_allocate(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                      enum dr_preallocation how, struct dr_error *err)
{
    static const unsigned flags[] = {0, DR_FILE_ZERO_PUNCH, DR_FILE_ZERO_ALLOCATE,
                                     DR_FILE_ZERO_WRITE};
    struct dr_change_source src = {.off = off};
    struct dr_change c = {.chain = chain,
                          .at = at,
                          .mode = DR_CHANGE_ALLOCATE,
                          .src = &src,
                          .zero_flags = flags[how]};
    int r = check_range(chain->images[at], off, len, err);
    return r < 0 || how == DR_PREALLOC_OFF ? r : change_all(&c, off, len, err);
}

/* Shrink [*off, *end) to whole units; the end of the disk counts as a unit's end. */
static void whole_units(const struct dr_image *image, uint64_t *off, uint64_t *end)
{
    uint64_t uoff, ulen;
    image->fmt->unit(image, *off, &uoff, &ulen);
    if (uoff != *off)
        *off = uoff + ulen;
    if (*end >= image->size || *end <= *off)
        return;
    image->fmt->unit(image, *end, &uoff, &ulen);
    *end = uoff;
}

/* Whole units from off on that are a hole already, or that are not: an empty image is a few
 * questions, not one a unit. */
static int hole_or_not(struct dr_image *image, uint64_t off, uint64_t end, bool *hole,
                       uint64_t *next, struct dr_error *err)
{
    struct dr_extent ext;
    uint64_t uoff, ulen;
    *next = end;
    int r = dr_image_map(image, off, end - off, &ext, err);
    if (r < 0 || ext.len == end - off) {
        *hole = r == 0 && ext.kind == DR_HOLE;
        return r;
    }
    image->fmt->unit(image, off + ext.len, &uoff, &ulen);
    *hole = ext.kind == DR_HOLE && uoff > off;
    *next = *hole || uoff == off + ext.len ? uoff : dr_min(uoff + ulen, end);
    return 0;
}

/* c: a change of mode DROP. */
static int drop(const struct dr_change *c, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct dr_image *image = c->chain->images[c->at];
    int r = check_range(image, off, len, err);
    if (r < 0)
        return r;
    uint64_t end = off + len;
    whole_units(image, &off, &end);
    while (r == 0 && off < end) {
        uint64_t next;
        bool hole;
        r = hole_or_not(image, off, end, &hole, &next, err);
        if (r == 0 && !hole)
            r = change_all(c, off, next - off, err);
        off = next;
    }
    return r;
}

int dr_chain_drop_if(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                     bool (*may)(void *user, uint64_t off, uint64_t len), void *user,
                     struct dr_error *err)
{
    struct dr_change_source src = {.off = off};
    struct dr_change c = {.chain = chain,
                          .at = at,
                          .mode = DR_CHANGE_DROP,
                          .src = &src,
                          .zero_flags = DR_FILE_ZERO_PUNCH,
                          .keeps_view = true,
                          .may = may,
                          .user = user};
    return drop(&c, off, len, err);
}

int dr_chain_drop(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                  struct dr_error *err)
{
    return dr_chain_drop_if(chain, at, off, len, NULL, NULL, err);
}

static int drop_for_guest(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                          struct dr_error *err)
{
    struct dr_change_source src = {.off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_DROP, &src);
    c.zero_flags = DR_FILE_ZERO_PUNCH;
    return drop(&c, off, len, err);
}

/* ------------------------------------------------------------------ discard */

/* One extent of this image, len long, that holds something. */
static int discard_extent(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len, bool flat,
                          struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    if (flat)
        return dr_chain_zero(chain, at, off, len, DR_MAY_UNMAP, err);
    uint64_t end = off + len;
    whole_units(image, &off, &end);
    if (off >= end)
        return 0;
    bool alone = at + 1 == chain->n && !image->backing_name;
    int r = alone ? drop_for_guest(chain, at, off, end - off, err) : -ENOTSUP;
    if (r == -ENOTSUP)
        r = dr_chain_zero(chain, at, off, end - off, DR_MAY_UNMAP, err);
    return r;
}

/* Discard what only a parent holds: this image then says zeros, so that no later job copies the
 * parent's bytes. Only where the driver can say so without writing zeros as bytes. */
static int discard_hole(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                        struct dr_error *err)
{
    uint64_t end = off + len;
    whole_units(chain->images[at], &off, &end);
    if (off >= end || at + 1 == chain->n)
        return 0;
    struct dr_change_source src = {.off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_ZERO, &src);
    c.zero_flags = DR_FILE_ZERO_PUNCH;
    c.no_bytes = true;
    int r = zero_range(&c, off, end - off, 0, err);
    return r == -ENOTSUP ? 0 : r;
}

/* Units that differ within (sub-clusters) are given up whole where the request [off, end) covers
 * them: the range of ext is widened to their edges. */
static void widen_to_units(const struct dr_image *image, const struct dr_extent *ext, uint64_t at,
                           uint64_t off, uint64_t end, uint64_t *from, uint64_t *to)
{
    uint64_t uoff, ulen;
    *from = at;
    *to = at + ext->len;
    if (ext->flat)
        return;
    image->fmt->unit(image, at, &uoff, &ulen);
    *from = dr_max(off, uoff);
    image->fmt->unit(image, at + ext->len - 1, &uoff, &ulen);
    *to = dr_min(end, uoff + ulen);
}

int dr_chain_discard(struct dr_chain *chain, size_t at, uint64_t off, uint64_t len,
                     struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    uint64_t end = off + len, from, to;
    int r = check_range(image, off, len, err);
    for (uint64_t pos = off; r == 0 && pos < end;) {
        struct dr_extent ext;
        r = dr_image_map(image, pos, end - pos, &ext, err);
        if (r < 0)
            break;
        widen_to_units(image, &ext, pos, off, end, &from, &to);
        if ((ext.kind == DR_DATA && !ext.stays) || ext.kind == DR_CODED || ext.placed)
            r = discard_extent(chain, at, from, to - from, ext.flat, err);
        else if (ext.kind == DR_HOLE)
            r = discard_hole(chain, at, pos, ext.len, err);
        pos += ext.len;
    }
    return r;
}

int dr_chain_copy_from(struct dr_chain *chain, size_t at, uint64_t off, struct dr_file *src_file,
                       uint64_t src_off, uint64_t len, uint64_t *copied, struct dr_error *err)
{
    *copied = 0;
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct dr_change_source src = {.file = src_file, .file_off = src_off, .off = off};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_WRITE, &src);
    r = dr_change_run(&c, off, len, copied, err);
    return r == -ENOTSUP && *copied > 0 ? 0 : r;
}

/* The system copies what the file has there, if it can; the rest goes through memory. */
int dr_copy_within(struct dr_file *file, uint64_t from, uint64_t to, uint64_t len,
                   struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = NULL;
    uint64_t size = dr_file_size(file), room = dr_min(len, COPY_BYTES);
    for (uint64_t done = 0, n; done < len; done += n) {
        uint64_t left = len - done, there = size - dr_min(size, from + done);
        int r = there
                    ? dr_file_copy(file, to + done, file, from + done, dr_min(left, there), &n, err)
                    : -ENOTSUP;
        if (r == 0)
            continue;
        if (r != -ENOTSUP)
            return r;
        if (!buf && !(buf = malloc((size_t)room)))
            return dr_fail_errno(err, ENOMEM, "%s", file->path);
        n = dr_min(left, room);
        r = dr_file_pread_short(file, buf, from + done, (size_t)n, NULL, err);
        if (r == 0)
            r = dr_file_pwrite(file, buf, to + done, (size_t)n, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int dr_chain_write_coded(struct dr_chain *chain, size_t at, const void *coded, uint32_t coded_len,
                         uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct dr_change_source src = {.off = off, .coded = coded, .coded_len = coded_len};
    struct dr_change c = guest_change(chain, at, DR_CHANGE_CODED, &src);
    return change_all(&c, off, len, err);
}

static bool is_hole(void *user, uint64_t off, uint64_t len)
{
    struct dr_extent ext;
    return dr_image_map(user, off, len, &ext, NULL) == 0 && ext.kind == DR_HOLE && ext.len == len;
}

int dr_chain_fill_coded(struct dr_chain *chain, size_t at, const void *coded, uint32_t coded_len,
                        uint64_t off, uint64_t len, struct dr_error *err)
{
    int r = check_range(chain->images[at], off, len, err);
    if (r < 0)
        return r;
    struct dr_change_source src = {.off = off, .coded = coded, .coded_len = coded_len};
    struct dr_change c = {.chain = chain,
                          .at = at,
                          .mode = DR_CHANGE_CODED,
                          .src = &src,
                          .keeps_view = true,
                          .may = is_hole,
                          .user = chain->images[at]};
    return change_all(&c, off, len, err);
}
