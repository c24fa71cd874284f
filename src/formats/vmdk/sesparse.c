/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "formats/vmdk/sesparse.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

#define VERSION        UINT64_C(0x0000000200000001)
#define MAGIC          UINT64_C(0xcafebabe)
#define VOLATILE_MAGIC UINT64_C(0xcafecafe)
#define GDE_MARK       UINT32_C(0x10000000) /* the upper half of every entry of the directory */
#define GRAIN_BYTES    (VMDK_SESPARSE_GRAIN * VMDK_SECTOR)
#define TABLE_BYTES    (VMDK_SESPARSE_TABLE * VMDK_SECTOR)

/* The upper four bits of an entry. */
enum {
    NIBBLE_NONE,     /* the whole entry is 0: the parent shows */
    NIBBLE_UNMAPPED, /* the guest has given it back: zeros, whatever the parent has */
    NIBBLE_ZERO,
    NIBBLE_DATA,
};

/* ------------------------------------------------------------------ the headers */

static uint64_t field(const uint8_t *buf, unsigned i)
{
    return get_le64(buf + i * 8);
}

static struct vmdk_se_area area(const uint8_t *buf, unsigned i)
{
    return (struct vmdk_se_area){field(buf, i), field(buf, i + 1)};
}

static int check_constants(const uint8_t buf[VMDK_SECTOR], const char *where, struct dr_error *err)
{
    static const struct {
        unsigned field;
        uint64_t value;
        const char *name;
    } must[] = {
        {0, MAGIC, "magic"},
        {1, VERSION, "version"},
        {3, VMDK_SESPARSE_GRAIN, "grain size in sectors"},
        {4, VMDK_SESPARSE_TABLE, "grain table size in sectors"},
        {5, 0, "flags"},
        {6, 0, "reserved"},
        {7, 0, "reserved"},
        {8, 0, "reserved"},
        {9, 0, "reserved"},
    };
    for (size_t i = 0; i < sizeof(must) / sizeof(must[0]); i++)
        if (field(buf, must[i].field) != must[i].value)
            return dr_fail(err, ENOTSUP,
                           "%s: seSparse header at byte %u, %s: 0x%" PRIx64 ", expected 0x%" PRIx64,
                           where, must[i].field * 8, must[i].name, field(buf, must[i].field),
                           must[i].value);
    if (!dr_is_zero(buf + 208, VMDK_SECTOR - 208))
        return dr_fail(err, ENOTSUP,
                       "%s: seSparse header from byte 208 on: something unknown, expected zeros",
                       where);
    return 0;
}

static bool apart(struct vmdk_se_area a, struct vmdk_se_area b)
{
    return a.off + a.len <= b.off || b.off + b.len <= a.off;
}

/* Grains are appended: the file may end inside their area. */
static int check_areas(struct vmdk_sesparse *se, const char *where, uint64_t file_size,
                       struct dr_error *err)
{
    const struct vmdk_se_area all[] = {
        {0, 1}, se->volatile_header, se->directory, se->tables, se->grains};
    const size_t n = sizeof(all) / sizeof(all[0]);
    for (size_t i = 1; i < n; i++)
        if (!dr_inside(all[i].off, all[i].len, VMDK_MAX_SECTORS) || (i < 3 && all[i].len == 0))
            return dr_fail(err, EINVAL,
                           "%s: seSparse header: an area of %" PRIu64 " sectors at sector %" PRIu64
                           " cannot be",
                           where, all[i].len, all[i].off);
    for (size_t i = 0; i < n; i++)
        for (size_t k = i + 1; k < n; k++)
            if (!apart(all[i], all[k]))
                return dr_fail(err, EINVAL,
                               "%s: seSparse header: the areas at sectors %" PRIu64 " and %" PRIu64
                               " overlap",
                               where, all[i].off, all[k].off);
    uint64_t end = se->directory.off * VMDK_SECTOR + se->n_tables * 8;
    if (end > file_size)
        return dr_fail(err, EINVAL,
                       "%s: File truncated, expecting at least %" PRIu64 " bytes: it has %" PRIu64,
                       where, end, file_size);
    return 0;
}

static int decode(struct vmdk_sesparse *se, const char *where, const uint8_t buf[VMDK_SECTOR],
                  uint64_t file_size, struct dr_error *err)
{
    int r = check_constants(buf, where, err);
    if (r < 0)
        return r;
    *se = (struct vmdk_sesparse){.capacity = field(buf, 2),
                                 .volatile_header = area(buf, 10),
                                 .directory = area(buf, 16),
                                 .tables = area(buf, 18),
                                 .grains = area(buf, 24)};
    if (se->capacity > VMDK_MAX_SECTORS)
        return dr_fail(err, EINVAL,
                       "%s: capacity of %" PRIu64 " sectors, expected at most %" PRIu64, where,
                       se->capacity, VMDK_MAX_SECTORS);
    se->n_tables = dr_div_up(se->capacity, (uint64_t)VMDK_SESPARSE_GRAIN * VMDK_SESPARSE_GTES);
    if (se->directory.len < VMDK_MAX_SECTORS &&
        se->n_tables > se->directory.len * (VMDK_SECTOR / 8))
        return dr_fail(err, EINVAL, "%s: a directory of %" PRIu64 " sectors for %" PRIu64 " tables",
                       where, se->directory.len, se->n_tables);
    return check_areas(se, where, file_size, err);
}

/* What is in the journal is newer than the tables. */
static int check_journal(const struct vmdk_sesparse *se, const char *where, struct dr_file *f,
                         unsigned flags, struct dr_error *err)
{
    uint8_t buf[VMDK_SECTOR];
    int r = dr_file_pread(f, buf, se->volatile_header.off * VMDK_SECTOR, sizeof(buf), err);
    if (r < 0)
        return r;
    if (field(buf, 0) != VOLATILE_MAGIC)
        return dr_fail(err, EINVAL,
                       "%s: volatile seSparse header at byte %" PRIu64 ": magic 0x%" PRIx64
                       ", expected 0x%" PRIx64,
                       where, se->volatile_header.off * VMDK_SECTOR, field(buf, 0), VOLATILE_MAGIC);
    if (get_le64(buf + 24) == 0 || (flags & DR_OPEN_SALVAGE))
        return 0;
    return dr_fail(err, ENOTSUP,
                   "%s: the seSparse journal has changes that were not finished, and only ESXi can "
                   "finish them: open the disk there, or take what the tables say with `drover "
                   "convert --salvage`",
                   where);
}

int vmdk_sesparse_read(struct vmdk_sesparse *se, const char *where, struct dr_file *f,
                       unsigned flags, struct dr_error *err)
{
    uint8_t buf[VMDK_SECTOR];
    size_t got = 0;
    *se = (struct vmdk_sesparse){0};
    int r = dr_file_pread_short(f, buf, 0, sizeof(buf), &got, err);
    if (r == 0 && got < sizeof(buf))
        return dr_fail(err, EINVAL, "%s: File truncated, expecting at least %zu bytes", where,
                       sizeof(buf));
    if (r == 0)
        r = decode(se, where, buf, dr_file_size(f), err);
    return r < 0 ? r : check_journal(se, where, f, flags, err);
}

int vmdk_sesparse_open(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    struct vmdk_sesparse se;
    int r = vmdk_sesparse_read(&se, f->path, f, image->flags, err);
    if (r < 0)
        return r;
    if (e->len > dr_round_up(se.capacity, VMDK_SESPARSE_GRAIN) * VMDK_SECTOR)
        return dr_fail(err, EINVAL,
                       "%s: the descriptor says %" PRIu64
                       " sectors, the extent holds only %" PRIu64,
                       f->path, e->len / VMDK_SECTOR, se.capacity);
    e->se = malloc(sizeof(*e->se));
    if (!e->se)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    *e->se = se;
    e->grain = GRAIN_BYTES;
    return 0;
}

/* ------------------------------------------------------------------ entries */

/* The byte where the table of a directory entry that is not 0 begins; 0: none can be there. */
static uint64_t table_place(const struct vmdk_sesparse *se, uint64_t gde, uint64_t file_size)
{
    uint64_t number = gde & UINT32_MAX;
    if (gde >> 32 != GDE_MARK || number >= se->tables.len / VMDK_SESPARSE_TABLE)
        return 0;
    uint64_t at = se->tables.off * VMDK_SECTOR + number * TABLE_BYTES;
    return dr_inside(at, TABLE_BYTES, file_size) ? at : 0;
}

/* The number of a grain is rotated: bits 48 to 59 are its lowest twelve. */
static uint64_t grain_number(uint64_t gte)
{
    return (gte >> 48 & 0xfff) | (gte & UINT64_C(0xffffffffffff)) << 12;
}

/* The byte where the grain of a DATA entry begins; 0: none can be there. len: what of it the disk
 * has. */
static uint64_t grain_place(const struct vmdk_sesparse *se, uint64_t gte, uint64_t len,
                            uint64_t file_size)
{
    uint64_t number = grain_number(gte);
    if (number >= se->grains.len / VMDK_SESPARSE_GRAIN)
        return 0;
    uint64_t at = se->grains.off * VMDK_SECTOR + number * GRAIN_BYTES;
    return dr_inside(at, len, file_size) ? at : 0;
}

/* What the entry of a grain says; false: that cannot be. host: DATA. */
static bool read_entry(const struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                       uint64_t gte, enum dr_kind *kind, uint64_t *host)
{
    switch (gte >> 60) {
    case NIBBLE_NONE:
        *kind = DR_HOLE;
        return gte == 0;
    case NIBBLE_UNMAPPED:
    case NIBBLE_ZERO:
        *kind = DR_ZERO;
        return true;
    case NIBBLE_DATA:
        *kind = DR_DATA;
        *host =
            grain_place(e->se, gte, vmdk_grain_len(e, grain), dr_file_size(image->files[e->file]));
        return *host != 0;
    default:
        return false;
    }
}

/* ------------------------------------------------------------------ map */

/* Entries from at on, n of them at most, that stand in one page. */
static int load(struct dr_image *image, const struct vmdk_extent *e, uint64_t at, uint64_t *n,
                const uint8_t **entries)
{
    struct dr_page *page;
    int r = dr_page_get(image, e->file, at, &page);
    if (r < 0)
        return r;
    *entries = dr_page_at(page, at);
    *n = dr_min(*n, (dr_page_start(page) + DR_PAGE_SIZE - at) / 8);
    return 0;
}

/* How many tables from this one on do not exist, and where this one is, if it does. */
static int look_up(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                   uint64_t *missing, uint64_t *place, struct dr_error *err)
{
    uint64_t n = e->se->n_tables - table, at = e->se->directory.off * VMDK_SECTOR + table * 8;
    const uint8_t *entries;
    int r = load(image, e, at, &n, &entries);
    if (r < 0)
        return r;
    for (*missing = 0; *missing < n && get_le64(entries + *missing * 8) == 0;)
        ++*missing;
    *place = 0;
    if (*missing > 0)
        return 0;
    *place = table_place(e->se, get_le64(entries), dr_file_size(image->files[e->file]));
    if (*place != 0)
        return 0;
    return dr_fail(err, EIO,
                   "%s: grain directory entry %" PRIu64 " (at byte %" PRIu64 ") says 0x%" PRIx64
                   ": no table can be there",
                   vmdk_extent_path(image, e), table, at, get_le64(entries));
}

/* The first of n entries, and how many are like it or go on where it is. */
static int alike(struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                 const uint8_t *entries, uint64_t n, struct dr_extent *ext, struct dr_error *err)
{
    enum dr_kind kind;
    uint64_t host = 0, i = 1;
    if (!read_entry(image, e, grain, get_le64(entries), &ext->kind, &ext->host))
        return dr_fail(err, EIO,
                       "%s: the entry of the grain at guest offset %" PRIu64 " says 0x%" PRIx64
                       ", which cannot be",
                       vmdk_extent_path(image, e), e->start + grain * e->grain, get_le64(entries));
    while (i < n && read_entry(image, e, grain + i, get_le64(entries + i * 8), &kind, &host) &&
           kind == ext->kind && (kind != DR_DATA || host == ext->host + i * GRAIN_BYTES))
        i++;
    ext->len = i * GRAIN_BYTES;
    return 0;
}

int vmdk_sesparse_map(struct dr_image *image, const struct vmdk_extent *e, uint64_t rel,
                      uint64_t len, struct dr_extent *ext, struct dr_error *err)
{
    uint64_t grain = rel / GRAIN_BYTES, inner = rel % GRAIN_BYTES;
    uint64_t first = grain % VMDK_SESPARSE_GTES, missing, place;
    const uint8_t *entries;
    int r = look_up(image, e, grain / VMDK_SESPARSE_GTES, &missing, &place, err);
    if (r < 0)
        return r;
    *ext = (struct dr_extent){.kind = DR_HOLE,
                              .len = (missing * VMDK_SESPARSE_GTES - first) * GRAIN_BYTES};
    if (missing == 0) {
        uint64_t n = dr_min(VMDK_SESPARSE_GTES - first, dr_div_up(inner + len, GRAIN_BYTES));
        r = load(image, e, place + first * 8, &n, &entries);
        if (r == 0)
            r = alike(image, e, grain, entries, n, ext, err);
        if (r < 0)
            return r;
    }
    ext->len = dr_min(len, ext->len - inner);
    if (ext->kind == DR_DATA) {
        ext->file = image->files[e->file];
        ext->host += inner;
    }
    return 0;
}

/* ------------------------------------------------------------------ check */

struct se_walk {
    struct dr_image *image;
    const struct vmdk_extent *e;
    struct dr_file *f;
    struct dr_check_result *result;
    uint8_t *tables, *grains; /* a bit each */
};

static bool take(uint8_t *bits, uint64_t i)
{
    bool before = bits[i / 8] & (1u << i % 8);
    bits[i / 8] |= (uint8_t)(1u << i % 8);
    return before;
}

#define say(w, ...) (vmdk_say((w)->result, (w)->f->path, __VA_ARGS__), (w)->result->corruptions++)

static void check_entry(struct se_walk *w, uint64_t grain, uint64_t gte)
{
    const struct vmdk_extent *e = w->e;
    uint64_t host, guest = e->start + grain * e->grain;
    enum dr_kind kind;
    if (grain * e->grain >= e->len) /* nobody reads it */
        return;
    if (!read_entry(w->image, e, grain, gte, &kind, &host))
        say(w, "the entry for guest offset %" PRIu64 " says 0x%" PRIx64 ", which cannot be", guest,
            gte);
    else if (kind == DR_DATA && take(w->grains, grain_number(gte)))
        say(w,
            "the grain of guest offset %" PRIu64 " at byte %" PRIu64 " belongs to another one too",
            guest, host);
}

static int check_table(struct se_walk *w, uint64_t table, uint64_t gde, uint8_t *buf,
                       struct dr_error *err)
{
    uint64_t place = gde ? table_place(w->e->se, gde, dr_file_size(w->f)) : 0;
    if (gde == 0)
        return 0;
    if (place == 0) {
        say(w, "grain directory entry %" PRIu64 " says 0x%" PRIx64 ": no table can be there", table,
            gde);
        return 0;
    }
    if (take(w->tables, gde & UINT32_MAX)) {
        say(w, "the grain table of directory entry %" PRIu64 " belongs to another one too", table);
        return 0;
    }
    int r = dr_file_pread(w->f, buf, place, TABLE_BYTES, err);
    for (uint64_t i = 0; r == 0 && i < VMDK_SESPARSE_GTES; i++)
        check_entry(w, table * VMDK_SESPARSE_GTES + i, get_le64(buf + i * 8));
    return r;
}

static int check_tables(struct se_walk *w, struct dr_error *err)
{
    const struct vmdk_sesparse *se = w->e->se;
    CLEANUP_FREE uint8_t *buf = malloc(TABLE_BYTES);
    uint8_t dir[VMDK_SECTOR];
    int r = buf ? 0 : dr_fail_errno(err, ENOMEM, "%s", w->f->path);
    for (uint64_t t = 0; r == 0 && t < se->n_tables; t++) {
        if (t % (VMDK_SECTOR / 8) == 0)
            r = dr_file_pread(w->f, dir, se->directory.off * VMDK_SECTOR + t * 8,
                              (size_t)dr_min(sizeof(dir), (se->n_tables - t) * 8), err);
        if (r == 0)
            r = check_table(w, t, get_le64(dir + t % (VMDK_SECTOR / 8) * 8), buf, err);
    }
    return r;
}

int vmdk_sesparse_check(struct dr_image *image, struct vmdk_extent *e,
                        struct dr_check_result *result, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t size = dr_file_size(f); /* no more tables and grains than the file can hold count */
    CLEANUP_FREE uint8_t *tables = calloc(1, (size_t)(size / TABLE_BYTES / 8 + 1));
    CLEANUP_FREE uint8_t *grains = calloc(1, (size_t)(size / GRAIN_BYTES / 8 + 1));
    if (!tables || !grains)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    struct se_walk w = {
        .image = image, .e = e, .f = f, .result = result, .tables = tables, .grains = grains};
    return check_tables(&w, err);
}
