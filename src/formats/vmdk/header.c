/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "formats/vmdk/header.h"

#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "formats/vmdk/descriptor.h"

#define MAX_GRAIN  UINT64_C(0x200000)   /* sectors, 1 GiB: as QEMU */
#define MAX_TABLES (UINT64_C(32) << 20) /* directory entries: as QEMU */

/* Sectors of a compressed grain, 4 MiB: it is read as a whole. */
#define MAX_CODED UINT64_C(0x2000)

enum vmdk_magic vmdk_magic(const uint8_t *buf, size_t len)
{
    static const struct {
        const char *bytes;
        size_t len;
        enum vmdk_magic magic;
    } known[] = {
        {"KDMV", 4, VMDK_MAGIC_KDMV},
        {"kdmv", 4, VMDK_MAGIC_UNFINISHED},
        {"COWD", 4, VMDK_MAGIC_COWD},
        {"\xbe\xba\xfe\xca\0\0\0\0", 8, VMDK_MAGIC_SESPARSE},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (len >= known[i].len && memcmp(buf, known[i].bytes, known[i].len) == 0)
            return known[i].magic;
    return VMDK_MAGIC_NONE;
}

/* ------------------------------------------------------------------ reading */

static void load(struct vmdk_header *h, const uint8_t *buf)
{
    *h = (struct vmdk_header){
        .version = get_le32(buf + VMDK_VERSION_AT),
        .flags = get_le32(buf + 8),
        .capacity = get_le64(buf + 12),
        .grain = get_le64(buf + 20),
        .desc_off = get_le64(buf + 28),
        .desc_len = get_le64(buf + 36),
        .gtes = get_le32(buf + 44),
        .rgd_off = get_le64(buf + 48),
        .gd_off = get_le64(buf + 56),
        .overhead = get_le64(buf + 64),
        .unclean = buf[VMDK_UNCLEAN_AT] != 0,
    };
}

static int check_magic(const char *where, const uint8_t *buf, struct dr_error *err)
{
    switch (vmdk_magic(buf, VMDK_HEADER_SIZE)) {
    case VMDK_MAGIC_KDMV:
        return 0;
    case VMDK_MAGIC_UNFINISHED:
        return dr_fail(err, EINVAL,
                       "%s: an unfinished VMDK (magic 'kdmv'): the program that made it was "
                       "interrupted",
                       where);
    case VMDK_MAGIC_SESPARSE:
        return dr_fail(err, ENOTSUP,
                       "%s: a seSparse extent, which its descriptor must call SESPARSE", where);
    default:
        return dr_fail(err, EINVAL, "%s: no VMDK sparse extent: expected magic 'KDMV' at offset 0",
                       where);
    }
}

/* The low half of the flags may be ignored when unknown, the high half may not. */
static int check_flags(const struct vmdk_header *h, const char *where, const uint8_t *buf,
                       struct dr_error *err)
{
    const uint32_t coded = VMDK_FLAG_COMPRESSED | VMDK_FLAG_MARKERS;
    if (h->version < 1 || h->version > 3)
        return dr_fail(err, ENOTSUP, "%s: VMDK header version %u, expected 1, 2 or 3", where,
                       h->version);
    if ((h->flags & VMDK_FLAG_NEWLINES) && memcmp(buf + 73, "\n \r\n", 4) != 0)
        return dr_fail(err, EINVAL,
                       "%s: the line-end bytes at offset 73 are changed: the file was damaged by a "
                       "transfer in text mode",
                       where);
    if (h->flags & 0xffff0000u & ~coded)
        return dr_fail(err, ENOTSUP, "%s: unknown incompatible header flags 0x%x", where,
                       h->flags & 0xffff0000u & ~coded);
    unsigned algorithm = get_le16(buf + 77);
    if ((h->flags & coded) == VMDK_FLAG_COMPRESSED)
        return dr_fail(err, ENOTSUP,
                       "%s: compressed grains without markers in front of them (header flags 0x%x) "
                       "are not supported",
                       where, h->flags);
    if ((h->flags & coded) != coded && (h->flags & coded || algorithm != 0))
        return dr_fail(err, EINVAL,
                       "%s: grains that are not compressed (header flags 0x%x) have markers, or a "
                       "compression algorithm (%u)",
                       where, h->flags, algorithm);
    if ((h->flags & coded) && algorithm != 1)
        return dr_fail(err, ENOTSUP, "%s: compression algorithm %u, expected 1 (deflate)", where,
                       algorithm);
    if (h->gd_off == VMDK_GD_AT_END && !(h->flags & coded))
        return dr_fail(err, EINVAL,
                       "%s: a grain directory at the end of an extent that is no stream", where);
    return 0;
}

/* Sets the derived fields. The bounds before keep every product below 2^64. */
static int check_geometry(struct vmdk_header *h, const char *where, struct dr_error *err)
{
    if (h->grain < 1 || h->grain > MAX_GRAIN || (h->grain & (h->grain - 1)))
        return dr_fail(err, EINVAL,
                       "%s: grain size %llu sectors, expected a power of two up to %llu", where,
                       (unsigned long long)h->grain, (unsigned long long)MAX_GRAIN);
    if ((h->flags & VMDK_FLAG_COMPRESSED) && h->grain > MAX_CODED)
        return dr_fail(err, ENOTSUP, "%s: compressed grains of %llu sectors, expected at most %llu",
                       where, (unsigned long long)h->grain, (unsigned long long)MAX_CODED);
    if (h->gtes < 1 || h->gtes > VMDK_GTES)
        return dr_fail(err, EINVAL, "%s: %u entries a grain table (L2 size), expected 1 to %u",
                       where, h->gtes, VMDK_GTES);
    if (h->capacity > VMDK_MAX_SECTORS)
        return dr_fail(err, EINVAL, "%s: capacity of %llu sectors, expected at most %llu", where,
                       (unsigned long long)h->capacity, (unsigned long long)VMDK_MAX_SECTORS);
    h->n_tables = dr_div_up(h->capacity, h->grain * h->gtes);
    if (h->n_tables > MAX_TABLES)
        return dr_fail(err, EFBIG,
                       "%s: L1 size too big: %llu grain directory entries, expected at most %llu",
                       where, (unsigned long long)h->n_tables, (unsigned long long)MAX_TABLES);
    h->gd_sectors = dr_div_up(h->n_tables * 4, VMDK_SECTOR);
    h->gt_sectors = dr_div_up((uint64_t)h->gtes * 4, VMDK_SECTOR);
    return 0;
}

static bool area_fits(uint64_t off, uint64_t len, uint64_t file_sectors)
{
    return off >= 1 && dr_inside(off, len, file_sectors);
}

static bool areas_overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

/* The sector behind everything the header points to; UINT64_MAX: no file can be that long. */
static uint64_t metadata_end(const struct vmdk_header *h)
{
    bool at_end = h->gd_off == VMDK_GD_AT_END, rgd = !at_end && (h->flags & VMDK_FLAG_RGD);
    const uint64_t areas[][2] = {
        {at_end ? 0 : h->gd_off, at_end ? 0 : h->gd_sectors},
        {rgd ? h->rgd_off : 0, rgd ? h->gd_sectors : 0},
        {h->desc_off, h->desc_off ? h->desc_len : 0},
        {0, h->overhead},
    };
    uint64_t end = 0;
    for (size_t i = 0; i < sizeof(areas) / sizeof(areas[0]); i++) {
        if (!dr_inside(areas[i][0], areas[i][1], UINT32_MAX))
            return UINT64_MAX;
        end = dr_max(end, areas[i][0] + areas[i][1]);
    }
    return end;
}

/* Programs that fetch the head of a file look for these words, and then fetch so many bytes. */
static int refuse_truncated(const struct vmdk_header *h, const char *where, uint64_t file_size,
                            uint64_t end, struct dr_error *err)
{
    return dr_fail(err, EINVAL,
                   "%s: File truncated, expecting at least %llu bytes: it has %llu, and the "
                   "header tells of more tables than that; a sparse VMDK extent of %llu bytes "
                   "(virtual size)",
                   where, (unsigned long long)(end * VMDK_SECTOR), (unsigned long long)file_size,
                   (unsigned long long)(h->capacity * VMDK_SECTOR));
}

/* Everything the header points to lies in the file and does not lie on something else. */
static int check_areas(const struct vmdk_header *h, const char *where, uint64_t file_size,
                       struct dr_error *err)
{
    uint64_t sectors = dr_div_up(file_size, VMDK_SECTOR), end = metadata_end(h);
    bool at_end = h->gd_off == VMDK_GD_AT_END, rgd = !at_end && (h->flags & VMDK_FLAG_RGD);
    if (end > sectors && end != UINT64_MAX)
        return refuse_truncated(h, where, file_size, end, err);
    if ((!at_end && !area_fits(h->gd_off, h->gd_sectors, sectors)) ||
        (rgd && !area_fits(h->rgd_off, h->gd_sectors, sectors)))
        return dr_fail(err, EINVAL,
                       "%s: the grain directory (%llu sectors at sector %llu, copy at %llu) does "
                       "not lie inside the file of %llu bytes",
                       where, (unsigned long long)h->gd_sectors, (unsigned long long)h->gd_off,
                       (unsigned long long)h->rgd_off, (unsigned long long)file_size);
    if (h->desc_off != 0 && !area_fits(h->desc_off, h->desc_len, sectors))
        return dr_fail(err, EINVAL,
                       "%s: the descriptor (%llu sectors at sector %llu) does not lie inside the "
                       "file of %llu bytes",
                       where, (unsigned long long)h->desc_len, (unsigned long long)h->desc_off,
                       (unsigned long long)file_size);
    if (h->overhead > sectors)
        return dr_fail(err, EINVAL, "%s: %llu sectors of metadata in a file of %llu bytes", where,
                       (unsigned long long)h->overhead, (unsigned long long)file_size);
    if ((rgd && areas_overlap(h->gd_off, h->gd_sectors, h->rgd_off, h->gd_sectors)) ||
        (h->desc_off &&
         ((!at_end && areas_overlap(h->desc_off, h->desc_len, h->gd_off, h->gd_sectors)) ||
          (rgd && areas_overlap(h->desc_off, h->desc_len, h->rgd_off, h->gd_sectors)))))
        return dr_fail(err, EINVAL,
                       "%s: descriptor (sector %llu), grain directory (%llu) and its copy (%llu) "
                       "overlap",
                       where, (unsigned long long)h->desc_off, (unsigned long long)h->gd_off,
                       (unsigned long long)h->rgd_off);
    return 0;
}

int vmdk_header_decode(struct vmdk_header *h, const char *where,
                       const uint8_t buf[VMDK_HEADER_SIZE], uint64_t file_size,
                       struct dr_error *err)
{
    int r = check_magic(where, buf, err);
    if (r < 0)
        return r;
    load(h, buf);
    r = check_flags(h, where, buf, err);
    if (r == 0)
        r = check_geometry(h, where, err);
    return r < 0 ? r : check_areas(h, where, file_size, err);
}

/* ------------------------------------------------------------------ making */

void vmdk_header_encode(const struct vmdk_header *h, uint8_t buf[VMDK_HEADER_SIZE])
{
    memset(buf, 0, VMDK_HEADER_SIZE);
    memcpy(buf, "KDMV", 4);
    put_le32(buf + VMDK_VERSION_AT, h->version);
    put_le32(buf + 8, h->flags);
    put_le64(buf + 12, h->capacity);
    put_le64(buf + 20, h->grain);
    put_le64(buf + 28, h->desc_off);
    put_le64(buf + 36, h->desc_len);
    put_le32(buf + 44, h->gtes);
    put_le64(buf + 48, h->rgd_off);
    put_le64(buf + 56, h->gd_off);
    put_le64(buf + 64, h->overhead);
    buf[VMDK_UNCLEAN_AT] = h->unclean;
    memcpy(buf + 73, "\n \r\n", 4);
    put_le16(buf + 77, h->flags & VMDK_FLAG_COMPRESSED ? 1 : 0); /* deflate */
}

int vmdk_header_stream(struct vmdk_header *h, const char *where, uint64_t capacity, uint64_t grain,
                       struct dr_error *err)
{
    *h = (struct vmdk_header){
        .version = 3, /* ESXi refuses streams of version 1 as too old */
        .flags = VMDK_FLAG_NEWLINES | VMDK_FLAG_COMPRESSED | VMDK_FLAG_MARKERS,
        .capacity = capacity,
        .grain = grain,
        .desc_off = 1,
        .desc_len = VMDK_DESC_SECTORS,
        .gtes = VMDK_GTES,
        .gd_off = VMDK_GD_AT_END,
        .overhead = dr_round_up(1 + VMDK_DESC_SECTORS, grain),
    };
    return check_geometry(h, where, err);
}

int vmdk_header_layout(struct vmdk_header *h, const char *where, uint64_t capacity, uint64_t grain,
                       uint32_t desc_sectors, bool zero_grains, struct dr_error *err)
{
    *h = (struct vmdk_header){
        .version = zero_grains ? 2 : 1,
        .flags = VMDK_FLAG_NEWLINES | VMDK_FLAG_RGD | (zero_grains ? VMDK_FLAG_ZERO_GRAINS : 0),
        .capacity = capacity,
        .grain = grain,
        .desc_off = desc_sectors ? 1 : 0,
        .desc_len = desc_sectors,
        .gtes = VMDK_GTES,
    };
    int r = check_geometry(h, where, err);
    if (r < 0)
        return r;
    uint64_t half = h->gd_sectors + h->n_tables * h->gt_sectors;
    h->rgd_off = 1 + (uint64_t)desc_sectors;
    h->gd_off = h->rgd_off + half;
    h->overhead = dr_round_up(h->gd_off + half, grain);
    if (h->overhead >= UINT64_C(1) << 32)
        return dr_fail(err, EFBIG, "%s: a disk of %llu bytes is too big for a sparse VMDK extent",
                       where, (unsigned long long)(capacity * VMDK_SECTOR));
    return 0;
}

int vmdk_header_set_capacity(struct vmdk_header *h, const char *where, uint64_t capacity,
                             struct dr_error *err)
{
    h->capacity = capacity;
    return check_geometry(h, where, err);
}

uint64_t vmdk_header_place_tables(struct vmdk_header *h, uint64_t sector)
{
    uint64_t half = h->gd_sectors + h->n_tables * h->gt_sectors;
    if (h->flags & VMDK_FLAG_RGD) {
        h->rgd_off = sector;
        sector += half;
    }
    h->gd_off = sector;
    return sector + half;
}

void vmdk_header_patch(const struct vmdk_header *h, uint8_t buf[VMDK_HEADER_SIZE])
{
    put_le64(buf + VMDK_CAPACITY_AT, h->capacity);
    put_le64(buf + VMDK_RGD_AT, h->rgd_off);
    put_le64(buf + VMDK_RGD_AT + 8, h->gd_off);
    put_le64(buf + VMDK_RGD_AT + 16, h->overhead);
}
