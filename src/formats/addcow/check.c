/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info and check: what the bitmap says. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "formats/addcow/addcow.h"

/* Count the units whose bytes are in the raw file, with the bits as they are in memory. */
static int count_own(struct dr_image *image, uint64_t *n, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t bits = addcow_bits(h, image->size);
    if (h->all) {
        *n = bits;
        return 0;
    }
    int r = image->writable ? dr_image_flush(image, err) : 0;
    return r < 0 ? r : addcow_count(image, 0, bits, n, err);
}

/* The last unit may be shorter; what it has in it is all of it. */
static uint64_t units_to_bytes(const struct dr_image *image, uint64_t units)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    return units == addcow_bits(h, image->size) ? image->size : units * h->granule;
}

/* ------------------------------------------------------------------ info */

int addcow_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t n;
    *cluster_size = h->granule;
    int r = count_own(image, &n, err);
    if (r < 0)
        return r;
    uint64_t bits = addcow_bits(h, image->size);
    bool whole = n == bits;
    json_int_t percent = whole ? 100 : (json_int_t)(n * 100 / bits); /* 100 means all */
    if (json_object_set_new(data, "layout", dr_json_text(h->layout == ADDCOW_V7 ? "v7" : "v20")) <
            0 ||
        json_object_set_new(data, "image-file", dr_json_text(h->image)) < 0 ||
        json_object_set_new(data, "granularity", json_integer(h->granule)) < 0 ||
        json_object_set_new(data, "copied-in", json_integer((json_int_t)units_to_bytes(image, n))) <
            0 ||
        json_object_set_new(data, "copied-in-percent", json_integer(percent)) < 0 ||
        json_object_set_new(data, "all-copied-in", json_boolean(whole)) < 0 ||
        (h->layout == ADDCOW_V20 &&
         json_object_set_new(data, "all-allocated", json_boolean(h->all)) < 0))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return 0;
}

/* ------------------------------------------------------------------ check */

__attribute__((format(printf, 2, 3))) static void say(struct dr_check_result *result,
                                                      const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof(line), fmt, ap);
    va_end(ap);
    result->report(result->user, line);
}

/* Is the bitmap longer than the disk needs? Version 1 has no other record of its size. Bits are
 * written by whole sectors. */
static bool too_long(const struct dr_image *image)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t end = h->bitmap_off + addcow_bitmap_len(h, image->size);
    return h->layout == ADDCOW_V7 &&
           dr_file_size(image->files[ADDCOW_META]) > dr_round_up(end, ADDCOW_SECTOR);
}

/* Bits behind the disk's end show nothing, until another program makes the raw file longer. */
static int check_tail(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                      struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *meta = image->files[ADDCOW_META];
    uint64_t bits = addcow_bits(h, image->size), n = 0, size = dr_file_size(meta);
    uint64_t end = size > h->bitmap_off ? dr_min(size - h->bitmap_off, INT64_MAX / 8) * 8 : 0;
    bool mend = fix == DR_CHECK_FIX_ALL;
    if (h->all || end <= bits)
        return 0;
    int r = addcow_count(image, bits, end, &n, err);
    if (r < 0 || (n == 0 && !too_long(image)))
        return r;
    say(result,
        "%s: has bits for a disk of %" PRIu64 " bytes, %" PRIu64 " of them set behind the end of "
        "its image file %s at %" PRIu64 ": that was cut, or a change of size did not finish",
        image->path, end * h->granule, n, image->files[ADDCOW_RAW]->path, image->size);
    if (mend)
        r = addcow_cut_tail(meta, h, image->size, err);
    if (r == 0 && mend)
        r = dr_file_flush(meta, err);
    *(mend && r == 0 ? &result->corruptions_fixed : &result->corruptions) += dr_max(n, 1);
    return r;
}

/* ------------------------------------------------------------------ space that nobody sees */

/* Space is given back in blocks of the host's; most have this size. */
#define HOST_BLOCK 4096u

struct unseen {
    struct dr_image *image;
    bool mend;
    uint64_t bytes, mended, first;
};

/* [off, end) of the raw file holds data, and no bit of it is set. */
static int unseen_run(struct unseen *u, uint64_t off, uint64_t end, struct dr_error *err)
{
    struct dr_file *raw = u->image->files[ADDCOW_RAW];
    off = dr_round_up(off, HOST_BLOCK);
    end = dr_round_down(end, HOST_BLOCK);
    if (off >= end)
        return 0;
    if (u->bytes == 0)
        u->first = off;
    u->bytes += end - off;
    if (!u->mend)
        return 0;
    unsigned flags = DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST;
    int r = dr_file_zero(raw, off, end - off, flags, err);
    u->mended += r == 0 ? end - off : 0;
    return r == -ENOTSUP ? 0 : r;
}

static int unseen_extent(struct unseen *u, uint64_t off, uint64_t end, struct dr_error *err)
{
    struct dr_extent ext;
    int r = 0;
    for (; off < end && r == 0; off += ext.len) {
        r = dr_image_map(u->image, off, end - off, &ext, err);
        if (r < 0)
            return r;
        if (ext.kind == DR_HOLE)
            r = unseen_run(u, off, off + ext.len, err);
    }
    return r;
}

static int find_unseen(struct unseen *u, struct dr_error *err)
{
    struct dr_file *raw = u->image->files[ADDCOW_RAW];
    int r = 0;
    for (uint64_t off = 0, run; off < u->image->size && r == 0; off += run) {
        enum dr_file_extent kind;
        r = dr_file_extent(raw, off, u->image->size - off, &kind, &run, err);
        if (r < 0)
            return r;
        if (kind == DR_FILE_DATA)
            r = unseen_extent(u, off, off + run, err);
    }
    return r;
}

/* Count, or give back, the data in the raw file under bits that are 0. An interrupted write or drop
 * leaves it there (invariant 3). A user may also have allocated the space beforehand, so it is no
 * leak until asked to be given back. Nothing is said of a file that cannot tell its holes:
 * everything in it would look like that. */
static int check_unseen(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                        struct dr_error *err)
{
    struct dr_file *raw = image->files[ADDCOW_RAW];
    struct unseen u = {.image = image, .mend = fix != 0};
    uint64_t used = 0;
    if (addcow_of(image)->h.all || raw->block_device)
        return 0;
    int r = dr_file_usage(raw, &used, err);
    if (r == 0)
        r = find_unseen(&u, err);
    if (r < 0 || u.bytes == 0 || u.bytes > used)
        return r;
    say(result,
        "%s: %" PRIu64 " bytes of its image file %s, from offset %" PRIu64 " on, are space that no "
        "bit tells of%s",
        image->path, u.bytes, raw->path, u.first, fix ? "" : "; -r leaks gives it back");
    result->leaks_fixed += dr_div_up(u.mended, addcow_of(image)->h.granule);
    return u.mended > 0 ? dr_file_flush(raw, err) : 0;
}

int addcow_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                 struct dr_error *err)
{
    int r = fix ? addcow_refuse_write(image, err) : 0;
    if (r == 0)
        r = count_own(image, &result->allocated_clusters, err);
    if (r < 0)
        return r;
    result->total_clusters = addcow_bits(&addcow_of(image)->h, image->size);
    result->image_end_offset = dr_file_size(image->files[ADDCOW_META]);
    r = check_tail(image, fix, result, err);
    if (r == 0)
        r = check_unseen(image, fix, result, err);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, ADDCOW_META, ADDCOW_HEADER_SIZE, INT64_MAX - ADDCOW_HEADER_SIZE);
    return r;
}
