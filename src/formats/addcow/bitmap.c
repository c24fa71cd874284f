/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bits: bit n of the map is bit n % 8 of byte n / 8, so a little-endian word has its bits in order.
 */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

#define CHUNK (256u << 10)

/* ------------------------------------------------------------------ in memory */

uint64_t addcow_run(const uint8_t *p, uint64_t first, uint64_t end, bool *set)
{
    *set = p[first / 8] >> first % 8 & 1;
    uint64_t flip = *set ? UINT64_MAX : 0, at = first;
    while (at < end) {
        bool word = at % 8 == 0 && end - at >= 64;
        uint64_t left = word ? 64 : dr_min(8 - at % 8, end - at);
        uint64_t bits = word ? get_le64(p + at / 8) ^ flip
                             : (uint64_t)(uint8_t)(p[at / 8] ^ (uint8_t)flip) >> at % 8;
        uint64_t alike = bits ? (uint64_t)__builtin_ctzll(bits) : left;
        if (alike < left)
            return at + alike - first;
        at += left;
    }
    return end - first;
}

static void edit_byte(uint8_t *byte, unsigned first, unsigned end, bool set)
{
    uint8_t mask = (uint8_t)((0xffu << first) & (0xffu >> (8 - end)));
    *byte = (uint8_t)(set ? *byte | mask : *byte & ~mask);
}

void addcow_edit_bits(uint8_t *p, uint64_t first, uint64_t end, bool set)
{
    uint64_t a = first / 8, z = end / 8;
    if (first >= end)
        return;
    if (a == z) {
        edit_byte(p + a, (unsigned)(first % 8), (unsigned)(end % 8), set);
        return;
    }
    edit_byte(p + a, (unsigned)(first % 8), 8, set);
    memset(p + a + 1, set ? 0xff : 0, z - a - 1);
    if (end % 8)
        edit_byte(p + z, 0, (unsigned)(end % 8), set);
}

static uint64_t count_bits(const uint8_t *p, size_t len)
{
    uint64_t n = 0;
    size_t i = 0;
    for (; i + 8 <= len; i += 8)
        n += (uint64_t)__builtin_popcountll(get_le64(p + i));
    for (; i < len; i++)
        n += (uint64_t)__builtin_popcount(p[i]);
    return n;
}

/* ------------------------------------------------------------------ in the file */

/* Bytes [at, at + len) of the map, those of bits outside [first, end) blanked. */
static int count_chunk(struct dr_image *image, uint64_t at, size_t len, uint64_t first,
                       uint64_t end, uint8_t *buf, uint64_t *n, struct dr_error *err)
{
    uint64_t off = addcow_of(image)->h.bitmap_off + at;
    int r = dr_file_pread_short(image->files[ADDCOW_META], buf, off, len, NULL, err);
    if (r < 0)
        return r;
    if (first > at * 8)
        addcow_edit_bits(buf, 0, first - at * 8, false);
    if (end < (at + len) * 8)
        addcow_edit_bits(buf, end - at * 8, len * 8, false);
    *n += count_bits(buf, len);
    return 0;
}

int addcow_count(struct dr_image *image, uint64_t first, uint64_t end, uint64_t *n,
                 struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    struct dr_file *f = image->files[ADDCOW_META];
    uint64_t size = dr_file_size(f), have = size > h->bitmap_off ? size - h->bitmap_off : 0;
    CLEANUP_FREE uint8_t *buf = malloc(CHUNK);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    *n = 0;
    if (end / 8 < have)
        have = end / 8 + (end % 8 != 0);
    for (uint64_t at = first / 8, run; at < have; at += run) {
        enum dr_file_extent kind;
        int r = dr_file_extent(f, h->bitmap_off + at, have - at, &kind, &run, err);
        if (r == 0 && kind != DR_FILE_HOLE) {
            run = dr_min(run, CHUNK);
            r = count_chunk(image, at, (size_t)run, first, end, buf, n, err);
        }
        if (r < 0)
            return r;
    }
    return 0;
}

/* One byte of which only some bits change. */
static int set_part(struct dr_file *f, uint64_t off, unsigned first, unsigned end, bool set,
                    struct dr_error *err)
{
    uint8_t byte;
    int r = dr_file_pread_short(f, &byte, off, 1, NULL, err);
    if (r < 0)
        return r;
    edit_byte(&byte, first, end, set);
    return dr_file_pwrite(f, &byte, off, 1, err);
}

static int fill_ones(struct dr_file *f, uint64_t off, uint64_t len, struct dr_error *err)
{
    size_t room = (size_t)dr_min(len, CHUNK);
    CLEANUP_FREE uint8_t *ones = malloc(room ? room : 1);
    if (!ones)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    memset(ones, 0xff, room);
    int r = 0;
    for (uint64_t done = 0; r == 0 && done < len; done += room)
        r = dr_file_pwrite(f, ones, off + done, (size_t)dr_min(room, len - done), err);
    return r;
}

int addcow_set_in_file(struct dr_file *f, const struct addcow_header *h, uint64_t first,
                       uint64_t end, struct dr_error *err)
{
    uint64_t a = first / 8, z = end / 8, off = h->bitmap_off;
    if (first >= end)
        return 0;
    if (a == z)
        return set_part(f, off + a, (unsigned)(first % 8), (unsigned)(end % 8), true, err);
    int r = set_part(f, off + a, (unsigned)(first % 8), 8, true, err);
    if (r == 0)
        r = fill_ones(f, off + a + 1, z - a - 1, err);
    return r == 0 && end % 8 ? set_part(f, off + z, 0, (unsigned)(end % 8), true, err) : r;
}

int addcow_cut_tail(struct dr_file *f, const struct addcow_header *h, uint64_t size,
                    struct dr_error *err)
{
    uint64_t bits = addcow_bits(h, size), end = h->bitmap_off + addcow_bitmap_len(h, size);
    int r = dr_file_size(f) > end ? dr_file_truncate(f, end, err) : 0;
    if (r == 0 && bits % 8 && dr_file_size(f) == end)
        r = set_part(f, end - 1, (unsigned)(bits % 8), 8, false, err);
    return r;
}
