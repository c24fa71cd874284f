/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* COWD extents: header, allocation, recovery. Looking up and publishing are those of every sparse
 * extent.
 *
 * Levels (invariant 1): the count of taken sectors is raised at level 0, so that no program that
 * goes by it alone ever takes a place that is used. A new table goes out before all else; entries
 * of tables are links of level 2, and the directory's entry, which makes a table visible, is
 * level 3.
 */
#include "formats/vmdk/cowd.h"

#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

/* Byte offsets in the header. */
enum {
    FLAGS_AT = 8,
    CAPACITY_AT = 12,
    GRAIN_AT = 16,
    GD_AT = 20,
    N_TABLES_AT = 24,
    FREE_AT = 28,
    GEOMETRY_AT = 32, /* of a root: cylinders, heads, sectors */
    PARENT_AT = 32,   /* of a child: its parent's name, and its generation */
    PARENT_GENERATION_AT = 1056,
    GENERATION_AT = 1060,
    UNCLEAN_AT = 1648,
};

enum {
    FLAG_ROOT = 1,
    FLAG_CHECK_CAPABLE = 2,
    FLAG_INCONSISTENT = 4,
};

#define HEADER_SECTORS  (VMDK_COWD_HEADER / VMDK_SECTOR)
#define TABLE_SECTORS   (VMDK_COWD_TABLE / VMDK_SECTOR)
#define MAX_TABLES      (UINT64_C(1) << 20) /* what a disk of 2^32 sectors needs at most */
#define LEVEL_COUNT     0
#define LEVEL_TABLE     2 /* as publish has entries */
#define LEVEL_DIRECTORY 3

/* ------------------------------------------------------------------ the header */

static uint64_t tables_needed(const struct vmdk_header *h)
{
    return dr_div_up(h->capacity, h->grain * VMDK_COWD_GTES);
}

static int check_places(const struct vmdk_header *h, const char *where, uint64_t file_size,
                        struct dr_error *err)
{
    uint64_t end = h->gd_off * VMDK_SECTOR + h->n_tables * 4;
    if (h->gd_off < HEADER_SECTORS)
        return dr_fail(err, EINVAL,
                       "%s: COWD grain directory at sector %llu, expected %u at the least", where,
                       (unsigned long long)h->gd_off, HEADER_SECTORS);
    if (end > file_size)
        return dr_fail(err, EINVAL,
                       "%s: File truncated, expecting at least %llu bytes: it has %llu; a COWD "
                       "extent of %llu bytes (virtual size)",
                       where, (unsigned long long)end, (unsigned long long)file_size,
                       (unsigned long long)(h->capacity * VMDK_SECTOR));
    return 0;
}

static int check_header(const struct vmdk_header *h, const char *where, uint64_t file_size,
                        struct dr_error *err)
{
    if (h->version != 1)
        return dr_fail(err, ENOTSUP,
                       "%s: COWD header version %u, expected 1; version 3 is that of Workstation "
                       "3: convert the disk there",
                       where, h->version);
    if (h->grain < 1 || h->grain > VMDK_COWD_MAX_GRAIN || (h->grain & (h->grain - 1)))
        return dr_fail(err, EINVAL,
                       "%s: COWD grain size %llu sectors, expected a power of two up to %u", where,
                       (unsigned long long)h->grain, VMDK_COWD_MAX_GRAIN);
    if (h->n_tables < tables_needed(h) || h->n_tables > MAX_TABLES)
        return dr_fail(err, EINVAL,
                       "%s: %llu COWD grain directory entries, expected %llu for %llu sectors",
                       where, (unsigned long long)h->n_tables, (unsigned long long)tables_needed(h),
                       (unsigned long long)h->capacity);
    return check_places(h, where, file_size, err);
}

static void derive(struct vmdk_header *h)
{
    h->cowd = true;
    h->gtes = VMDK_COWD_GTES;
    h->gt_sectors = TABLE_SECTORS;
    h->gd_sectors = dr_div_up(h->n_tables * 4, VMDK_SECTOR);
    h->overhead = h->gd_off + h->gd_sectors;
}

int vmdk_cowd_decode(struct vmdk_header *h, const char *where, const uint8_t buf[VMDK_COWD_HEADER],
                     uint64_t file_size, struct dr_error *err)
{
    *h = (struct vmdk_header){
        .version = get_le32(buf + VMDK_VERSION_AT),
        .capacity = get_le32(buf + CAPACITY_AT),
        .grain = get_le32(buf + GRAIN_AT),
        .gd_off = get_le32(buf + GD_AT),
        .n_tables = get_le32(buf + N_TABLES_AT),
        .free_sector = get_le32(buf + FREE_AT),
        .unclean = get_le32(buf + UNCLEAN_AT) != 0,
        .inconsistent = get_le32(buf + FLAGS_AT) & FLAG_INCONSISTENT,
    };
    derive(h);
    return check_header(h, where, file_size, err);
}

void vmdk_cowd_origin(const uint8_t buf[VMDK_COWD_HEADER], struct vmdk_cowd_origin *origin)
{
    *origin = (struct vmdk_cowd_origin){.generation = get_le32(buf + GENERATION_AT)};
    if (get_le32(buf + FLAGS_AT) & FLAG_ROOT)
        return;
    origin->child = true;
    memcpy(origin->parent, buf + PARENT_AT, VMDK_COWD_NAME_LEN);
    origin->parent_generation = get_le32(buf + PARENT_GENERATION_AT);
}

int vmdk_cowd_read(struct vmdk_header *h, const char *where, struct dr_file *f,
                   struct vmdk_cowd_origin *origin, struct dr_error *err)
{
    uint8_t buf[VMDK_COWD_HEADER];
    size_t got = 0;
    int r = dr_file_pread_short(f, buf, 0, sizeof(buf), &got, err);
    if (r == 0 && got < sizeof(buf))
        return dr_fail(err, EINVAL, "%s: File truncated, expecting at least %zu bytes", where,
                       sizeof(buf));
    if (r == 0)
        r = vmdk_cowd_decode(h, where, buf, dr_file_size(f), err);
    if (r == 0 && origin)
        vmdk_cowd_origin(buf, origin);
    return r;
}

/* ------------------------------------------------------------------ making */

static int refuse_size(const char *where, uint64_t capacity, struct dr_error *err)
{
    if (capacity <= VMDK_COWD_MAX_SECTOR)
        return 0;
    return dr_fail(err, EFBIG,
                   "%s: a disk of %llu bytes is too big for vmfsSparse, which counts %llu sectors "
                   "at most",
                   where, (unsigned long long)(capacity * VMDK_SECTOR),
                   (unsigned long long)VMDK_COWD_MAX_SECTOR);
}

int vmdk_cowd_layout(struct vmdk_header *h, const char *where, uint64_t capacity,
                     struct dr_error *err)
{
    int r = refuse_size(where, capacity, err);
    if (r < 0)
        return r;
    *h = (struct vmdk_header){
        .version = 1, .capacity = capacity, .grain = 1, .gd_off = HEADER_SECTORS};
    h->n_tables = tables_needed(h);
    derive(h);
    h->free_sector = (uint32_t)h->overhead;
    return 0;
}

static void encode_root(const struct vmdk_header *h, uint8_t buf[VMDK_COWD_HEADER])
{
    memset(buf, 0, VMDK_COWD_HEADER);
    memcpy(buf, "COWD", 4);
    put_le32(buf + VMDK_VERSION_AT, h->version);
    put_le32(buf + FLAGS_AT, FLAG_ROOT | FLAG_CHECK_CAPABLE);
    put_le32(buf + CAPACITY_AT, (uint32_t)h->capacity);
    put_le32(buf + GRAIN_AT, (uint32_t)h->grain);
    put_le32(buf + GD_AT, (uint32_t)h->gd_off);
    put_le32(buf + N_TABLES_AT, (uint32_t)h->n_tables);
    put_le32(buf + FREE_AT, h->free_sector);
    put_le32(buf + GEOMETRY_AT, (uint32_t)dr_min(h->capacity / (255 * 63), 65535));
    put_le32(buf + GEOMETRY_AT + 4, 255);
    put_le32(buf + GEOMETRY_AT + 8, 63);
}

int vmdk_cowd_write_new(struct dr_file *f, const struct vmdk_header *h, struct dr_error *err)
{
    uint8_t buf[VMDK_COWD_HEADER];
    encode_root(h, buf);
    int r = dr_file_truncate(f, h->overhead * VMDK_SECTOR, err);
    if (r == 0)
        r = dr_file_pwrite(f, buf + VMDK_SECTOR, VMDK_SECTOR, sizeof(buf) - VMDK_SECTOR, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = dr_file_pwrite(f, buf, 0, VMDK_SECTOR, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* ------------------------------------------------------------------ allocation */

/* Behind what the header counts, and behind what the file has: some programs append without
 * counting. */
static uint64_t first_free(const struct dr_image *image, const struct vmdk_extent *e)
{
    uint64_t end = dr_div_up(dr_file_size(image->files[e->file]), VMDK_SECTOR);
    return dr_max(dr_max(e->h.overhead, e->h.free_sector), end);
}

/* The header's count covers all up to `end`. */
static int raise_count(struct dr_image *image, struct vmdk_extent *e, uint64_t end)
{
    struct dr_reservation pins = {0};
    struct dr_page *page;
    uint8_t raw[4];
    if (end <= e->h.free_sector)
        return 0;
    int r = dr_reserve_page(image, &pins, e->file, FREE_AT, sizeof(raw), LEVEL_COUNT, &page);
    if (r == 0) {
        put_le32(raw, (uint32_t)end);
        dr_page_put(image, page, FREE_AT, raw, sizeof(raw));
        e->h.free_sector = (uint32_t)end;
    }
    dr_reserve_unpin(image, &pins);
    return r;
}

void vmdk_cowd_find_next(const struct dr_image *image, struct vmdk_extent *e)
{
    if (e->next == 0)
        e->next = first_free(image, e);
}

int vmdk_cowd_take(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                   uint32_t *sector, struct dr_error *err)
{
    vmdk_cowd_find_next(image, e);
    if (e->next + sectors > VMDK_COWD_MAX_SECTOR)
        return dr_fail(err, ENOSPC, "%s: a vmfsSparse extent cannot grow beyond 2 TiB",
                       vmdk_extent_path(image, e));
    int r = raise_count(image, e, e->next + sectors);
    if (r < 0)
        return r;
    *sector = (uint32_t)e->next;
    e->next += sectors;
    return 0;
}

/* All of the table in memory, as zeros, to be written before the next link. */
static int zero_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t at)
{
    for (uint64_t end = at + VMDK_COWD_TABLE, len; at < end; at += len) {
        struct dr_page *page;
        len = dr_min(end, dr_round_down(at, DR_PAGE_SIZE) + DR_PAGE_SIZE) - at;
        int r = dr_page_new(image, e->file, at, (size_t)len, LEVEL_TABLE, &page);
        if (r < 0)
            return r;
        dr_page_unpin(image, page, at, (size_t)len);
    }
    return 0;
}

/* A place that a table was begun in stays one for a table: zeros may be on their way there. */
int vmdk_cowd_make_table(struct dr_image *image, struct vmdk_extent *e, uint64_t table,
                         struct dr_error *err)
{
    struct dr_reservation pins = {0};
    struct dr_page *page;
    uint64_t at = e->h.gd_off * VMDK_SECTOR + table * 4;
    uint8_t raw[4];
    int r = e->spare_table ? 0 : vmdk_cowd_take(image, e, TABLE_SECTORS, &e->spare_table, err);
    if (r == 0)
        r = dr_reserve_page(image, &pins, e->file, at, sizeof(raw), LEVEL_DIRECTORY, &page);
    if (r == 0)
        r = zero_table(image, e, (uint64_t)e->spare_table * VMDK_SECTOR);
    if (r == 0) {
        put_le32(raw, e->spare_table);
        dr_page_put(image, page, at, raw, sizeof(raw));
        e->spare_table = 0;
    }
    dr_reserve_unpin(image, &pins);
    return r;
}

/* ------------------------------------------------------------------ changes in place */

/* 32 bits of the header, whose sector has nothing else that is being changed. */
static int put_field(struct dr_image *image, struct vmdk_extent *e, uint64_t at, uint32_t value,
                     struct dr_error *err)
{
    uint8_t buf[VMDK_SECTOR];
    uint64_t start = dr_round_down(at, VMDK_SECTOR);
    struct dr_file *f = image->files[e->file];
    int r = dr_file_pread(f, buf, start, sizeof(buf), err);
    if (r < 0)
        return r;
    put_le32(buf + (at - start), value);
    return dr_file_pwrite(f, buf, start, sizeof(buf), err);
}

int vmdk_cowd_mark(struct dr_image *image, struct vmdk_extent *e, bool unclean,
                   struct dr_error *err)
{
    int r = put_field(image, e, UNCLEAN_AT, unclean, err);
    if (r == 0)
        e->h.unclean = unclean;
    return r;
}

int vmdk_cowd_consistent(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    uint8_t buf[4];
    int r = dr_file_pread(image->files[e->file], buf, FLAGS_AT, sizeof(buf), err);
    if (r == 0)
        r = put_field(image, e, FLAGS_AT, get_le32(buf) & ~(uint32_t)FLAG_INCONSISTENT, err);
    if (r == 0)
        e->h.inconsistent = false;
    return r;
}

int vmdk_cowd_set_free(struct dr_image *image, struct vmdk_extent *e, uint64_t sector,
                       struct dr_error *err)
{
    int r = put_field(image, e, FREE_AT, (uint32_t)sector, err);
    if (r == 0)
        e->h.free_sector = (uint32_t)sector;
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, e->file, FREE_AT, 4);
    return r;
}

int vmdk_cowd_settle(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    if (e->next == 0 || e->next == e->h.free_sector)
        return 0;
    return vmdk_cowd_set_free(image, e, e->next, err);
}

/* ------------------------------------------------------------------ another size */

int vmdk_cowd_resized(struct vmdk_header *h, const char *where, uint64_t capacity,
                      struct dr_error *err)
{
    uint64_t had = capacity < h->capacity ? 0 : h->n_tables;
    int r = refuse_size(where, capacity, err);
    if (r < 0)
        return r;
    h->capacity = capacity;
    h->n_tables = dr_max(tables_needed(h), had);
    derive(h);
    h->free_sector = (uint32_t)dr_max(h->free_sector, h->overhead);
    return 0;
}

/* A root knows its geometry: the cylinders follow. */
static void put_size(const struct vmdk_header *h, uint8_t buf[VMDK_SECTOR])
{
    uint64_t track = (uint64_t)get_le32(buf + GEOMETRY_AT + 4) * get_le32(buf + GEOMETRY_AT + 8);
    put_le32(buf + CAPACITY_AT, (uint32_t)h->capacity);
    put_le32(buf + N_TABLES_AT, (uint32_t)h->n_tables);
    put_le32(buf + FREE_AT, h->free_sector);
    if (get_le32(buf + FLAGS_AT) & FLAG_ROOT && track != 0)
        put_le32(buf + GEOMETRY_AT, (uint32_t)dr_min(h->capacity / track, 65535));
}

int vmdk_cowd_switch(struct dr_image *image, struct vmdk_extent *e, const struct vmdk_header *n,
                     struct dr_error *err)
{
    uint8_t buf[VMDK_SECTOR];
    struct vmdk_header fresh = *n;
    struct dr_file *f = image->files[e->file];
    int r = dr_file_pread(f, buf, 0, sizeof(buf), err);
    if (r < 0)
        return r;
    fresh.unclean = e->h.unclean;
    fresh.free_sector = (uint32_t)dr_max(n->free_sector, e->h.free_sector);
    put_size(&fresh, buf);
    r = dr_file_pwrite(f, buf, 0, sizeof(buf), err);
    if (r == 0)
        r = dr_file_flush(f, err);
    DR_LOCK_SCOPE(&image->lock);
    if (r == 0)
        e->h = fresh;
    dr_page_forget(image, e->file, 0, INT64_MAX);
    return r;
}

/* ------------------------------------------------------------------ recover, trim */

static int end_of_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                        bool strict, uint64_t *end, struct dr_error *err)
{
    uint8_t buf[VMDK_COWD_TABLE];
    bool hole;
    uint32_t gde = e->gd[table];
    if (gde == 0 || (!strict && !vmdk_table_fits(image, e, gde)))
        return 0;
    if (!vmdk_table_fits(image, e, gde))
        return dr_fail(err, EIO,
                       "%s: grain directory entry %llu says sector %u, which is outside the file",
                       vmdk_extent_path(image, e), (unsigned long long)table, gde);
    *end = dr_max(*end, (uint64_t)gde + TABLE_SECTORS);
    int r = vmdk_read_table(image, e, gde, buf, &hole, err);
    if (r < 0 || hole)
        return r;
    if (strict && !vmdk_table_is_sound(image, e, table, buf))
        return dr_fail(err, EIO,
                       "%s: grain table %llu at sector %u is damaged; `drover check` says where",
                       vmdk_extent_path(image, e), (unsigned long long)table, gde);
    for (size_t i = 0; i < VMDK_COWD_GTES; i++) {
        uint32_t gte = get_le32(buf + i * 4);
        if (gte != 0)
            *end = dr_max(*end, gte + e->h.grain);
    }
    return 0;
}

int vmdk_cowd_used_end(struct dr_image *image, const struct vmdk_extent *e, bool strict,
                       uint64_t *end, struct dr_error *err)
{
    int r = 0;
    *end = e->h.overhead;
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++)
        r = end_of_table(image, e, t, strict, end, err);
    return r;
}

static int find_end(struct dr_image *image, struct vmdk_extent *e, bool strict, uint64_t *end,
                    struct dr_error *err)
{
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = vmdk_cowd_used_end(image, e, strict, end, err);
    vmdk_drop_directories(e);
    return r;
}

int vmdk_cowd_recover(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t end = 0;
    if (e->h.inconsistent)
        return dr_fail(err, EIO,
                       "%s: its writer has marked it as inconsistent; `drover check -r all` takes "
                       "the mark back if nothing is damaged",
                       f->path);
    int r = find_end(image, e, true, &end, err);
    if (r == 0 && end > e->h.free_sector)
        r = vmdk_cowd_set_free(image, e, end, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = vmdk_cowd_mark(image, e, false, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

int vmdk_cowd_trim(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t end = 0;
    int r = find_end(image, e, true, &end, err);
    if (r < 0 || end * VMDK_SECTOR >= dr_file_size(f))
        return r;
    r = vmdk_cut(image, e, end, err);
    if (r == 0)
        r = vmdk_cowd_set_free(image, e, end, err);
    return r < 0 ? r : dr_file_flush(f, err);
}
