/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Looking up: extents, grain directories, grain tables. */
#include <stdlib.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/sesparse.h"

struct vmdk_extent *vmdk_extent_at(const struct dr_image *image, uint64_t off)
{
    struct vmdk_state *s = vmdk_of(image);
    size_t lo = 0, hi = s->n_extents;
    while (hi - lo > 1) {
        size_t mid = lo + (hi - lo) / 2;
        if (s->extents[mid].start <= off)
            lo = mid;
        else
            hi = mid;
    }
    return &s->extents[lo];
}

const char *vmdk_extent_path(const struct dr_image *image, const struct vmdk_extent *e)
{
    return e->file == VMDK_NO_FILE ? image->path : image->files[e->file]->path;
}

bool vmdk_table_fits(const struct dr_image *image, const struct vmdk_extent *e, uint32_t gde)
{
    uint64_t sectors = dr_file_size(image->files[e->file]) / VMDK_SECTOR;
    if (e->h.cowd && gde < e->h.overhead)
        return false;
    if (e->h.cowd) /* a new one is in memory at first */
        sectors = dr_max(sectors, e->next);
    return gde != 0 && dr_inside(gde, e->h.gt_sectors, sectors);
}

/* A page of a directory, kept by those who look up one table after the other. */
struct dir_page {
    struct dr_page *page; /* NULL = none yet */
    uint64_t start;       /* its offset in the file */
};

static uint32_t table_in_row(const struct vmdk_extent *e, uint64_t table)
{
    return (uint32_t)(e->tables_at + table * e->h.gt_sectors);
}

/* [page] The entry of a table in the directory that begins at this sector. */
static int directory_entry(struct dr_image *image, const struct vmdk_extent *e, uint64_t sector,
                           uint64_t table, struct dir_page *last, uint32_t *gde)
{
    uint64_t at = sector * VMDK_SECTOR + table * 4;
    if (!last->page || at - last->start >= DR_PAGE_SIZE) {
        int r = dr_page_get(image, e->file, at, &last->page);
        if (r < 0)
            return r;
        last->start = dr_round_down(at, DR_PAGE_SIZE);
    }
    *gde = get_le32(dr_page_at(last->page, at));
    return 0;
}

static int primary_entry(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                         struct dir_page *last, uint32_t *gde)
{
    if (e->tables_at == 0)
        return directory_entry(image, e, e->h.gd_off, table, last, gde);
    *gde = table_in_row(e, table);
    return 0;
}

/* vmdk_slot for one grain after the other. */
static int next_slot(struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                     struct dir_page *last, struct vmdk_slot *slot, struct dr_error *err)
{
    *slot = (struct vmdk_slot){.table = grain / e->h.gtes, .entry = grain % e->h.gtes};
    int r = primary_entry(image, e, slot->table, last, &slot->gde);
    if (r < 0 || slot->gde == 0)
        return r;
    if (!vmdk_table_fits(image, e, slot->gde))
        return dr_fail(err, EIO,
                       "%s: grain directory entry %llu says sector %u, which is outside the file",
                       vmdk_extent_path(image, e), (unsigned long long)slot->table, slot->gde);
    slot->pos = (uint64_t)slot->gde * VMDK_SECTOR + slot->entry * 4;
    return 0;
}

int vmdk_slot(struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
              struct vmdk_slot *slot, struct dr_error *err)
{
    struct dir_page last = {0};
    return next_slot(image, e, grain, &last, slot, err);
}

int vmdk_slot_copy(struct dr_image *image, const struct vmdk_extent *e, struct vmdk_slot *slot)
{
    struct dir_page last = {0};
    uint32_t gde = 0;
    int r = vmdk_has_copies(e) ? directory_entry(image, e, e->h.rgd_off, slot->table, &last, &gde)
                               : 0;
    if (r == 0 && gde != slot->gde && vmdk_table_fits(image, e, gde))
        slot->rpos = (uint64_t)gde * VMDK_SECTOR + slot->entry * 4;
    return r;
}

/* ------------------------------------------------------------------ whole directories */

/* Larger directories are looked up page by page. */
#define LEARN_MOST (64u << 10)

int vmdk_learn_tables(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    uint64_t n = vmdk_tables_used(e);
    e->tables_at = 0;
    if (n == 0 || n * 4 > LEARN_MOST)
        return 0;
    CLEANUP_FREE uint8_t *dir = malloc((size_t)n * 4);
    if (!dir)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r =
        dr_file_pread(image->files[e->file], dir, e->h.gd_off * VMDK_SECTOR, (size_t)n * 4, err);
    if (r < 0)
        return r;
    uint64_t at = get_le32(dir), i = 1;
    while (i < n && get_le32(dir + i * 4) == at + i * e->h.gt_sectors)
        i++;
    e->tables_at = i == n ? (uint32_t)at : 0;
    return 0;
}

static int load_directory(struct dr_image *image, struct vmdk_extent *e, uint64_t sector,
                          uint32_t **dir, struct dr_error *err)
{
    size_t n = (size_t)e->h.n_tables;
    struct dr_file *f = image->files[e->file];
    uint32_t *d = *dir = malloc(n ? n * 4 : 4);
    if (!d)
        return dr_fail_errno(err, ENOMEM, "%s: grain directory of %zu entries", f->path, n);
    int r = dr_file_pread(f, d, sector * VMDK_SECTOR, n * 4, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        d[i] = get_le32(&d[i]);
    return r;
}

int vmdk_load_directories(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    vmdk_drop_directories(e);
    int r = load_directory(image, e, e->h.gd_off, &e->gd, err);
    if (r == 0 && vmdk_has_copies(e))
        r = load_directory(image, e, e->h.rgd_off, &e->rgd, err);
    return r;
}

void vmdk_drop_directories(struct vmdk_extent *e)
{
    free(e->gd);
    free(e->rgd);
    e->gd = e->rgd = NULL;
}

/* ------------------------------------------------------------------ grains */

uint64_t vmdk_grain_len(const struct vmdk_extent *e, uint64_t grain)
{
    return dr_min(e->grain, e->len - grain * e->grain);
}

bool vmdk_gte_fits(const struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                   uint32_t gte)
{
    if (vmdk_is_stream(e)) /* of a marker that is elsewhere the LBA is wrong */
        return gte > 1 && dr_inside(gte, 1, dr_file_size(image->files[e->file]) / VMDK_SECTOR);
    return gte > 1 && gte >= e->h.overhead &&
           dr_inside((uint64_t)gte * VMDK_SECTOR, vmdk_grain_len(e, grain),
                     dr_file_size(image->files[e->file]));
}

void vmdk_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    const struct vmdk_extent *e = vmdk_extent_at(image, off);
    uint64_t unit = e->grain ? e->grain : VMDK_FLAT_UNIT;
    uint64_t rel = dr_round_down(off - e->start, unit);
    *uoff = e->start + rel;
    /* Behind the end of the disk nothing else begins, and the unit ends where it would in a larger
     * disk. */
    *ulen = e->start + e->len == image->size ? unit : dr_min(unit, e->len - rel);
}

/* ------------------------------------------------------------------ map */

/* A run of equal or consecutive entries that grows along one loaded page. */
struct run {
    struct dr_image *image;
    const struct vmdk_extent *e;
    const struct dr_page *page;
    uint64_t page_start, page_end;
    uint64_t zero_end; /* the file is zero from page_start up to here */
    enum dr_kind kind;
    uint64_t first;    /* first grain */
    uint64_t grains;   /* so far */
    uint64_t max;      /* grains worth looking at */
    uint32_t gte;      /* DATA: entry of the first grain */
    uint64_t first_at; /* where that stands in the file */
};

static int entry_kind(struct run *run, uint64_t grain, uint32_t gte, enum dr_kind *kind,
                      struct dr_error *err)
{
    const struct vmdk_extent *e = run->e;
    if (gte == 0)
        *kind = DR_HOLE;
    else if (gte == 1 && vmdk_has_zero_grains(e))
        *kind = DR_ZERO;
    else if (vmdk_gte_fits(run->image, e, grain, gte))
        *kind = DR_DATA;
    else
        return dr_fail(err, EIO,
                       "%s: the entry of the grain at guest offset %llu says sector %u, expected "
                       "one from %llu to the end of the file at %llu bytes",
                       vmdk_extent_path(run->image, e),
                       (unsigned long long)(e->start + grain * e->grain), gte,
                       (unsigned long long)e->h.overhead,
                       (unsigned long long)dr_file_size(run->image->files[e->file]));
    return 0;
}

static bool continues(struct run *run, uint64_t grain, uint32_t gte)
{
    enum dr_kind kind;
    if (entry_kind(run, grain, gte, &kind, NULL) < 0 || kind != run->kind)
        return false;
    return kind != DR_DATA || gte == run->gte + (grain - run->first) * run->e->h.grain;
}

/* Entries that go on the run, of n in the loaded page. */
static uint64_t alike_entries(struct run *run, const uint8_t *entries, uint64_t n)
{
    uint64_t i = 0;
    if (run->kind == DR_HOLE) {
        while (i + 2 <= n && get_le64(entries + i * 4) == 0)
            i += 2;
        return i < n && get_le32(entries + i * 4) == 0 ? i + 1 : i;
    }
    while (i < n && continues(run, run->first + run->grains + i, get_le32(entries + i * 4)))
        i++;
    return i;
}

/* The number of entries of the table at slot that go on the run, looking at the loaded page and at
 * what is known to be zero; 0: the run ends here. */
static uint64_t extend(struct run *run, const struct vmdk_slot *slot)
{
    uint64_t left = run->e->h.gtes - slot->entry;
    if (slot->pos == 0)
        return run->kind == DR_HOLE ? left : 0;
    if (slot->pos >= run->page_start && slot->pos < run->zero_end)
        return run->kind == DR_HOLE ? dr_min(left, (run->zero_end - slot->pos) / 4) : 0;
    if (slot->pos < run->page_start || slot->pos >= run->page_end)
        return 0;
    uint64_t n = dr_min(dr_min(left, run->max - run->grains), (run->page_end - slot->pos) / 4);
    return alike_entries(run, dr_page_at(run->page, slot->pos), n);
}

/* Count the tables in a row, from this one on, that have no entries: they do not exist, or they lie
 * where the file is known to be zero. Looks at one page of the directory at most. */
static uint64_t empty_tables(const struct run *run, uint64_t table, struct dir_page *dir)
{
    const struct vmdk_extent *e = run->e;
    uint64_t n = vmdk_tables_used(e) - table;
    /* Sectors of the zeros, [first, end). */
    uint64_t file_size = dr_file_size(run->image->files[e->file]);
    uint64_t first = dr_div_up(run->page_start, VMDK_SECTOR);
    uint64_t end = dr_min(run->zero_end, file_size) / VMDK_SECTOR;
    if (e->tables_at != 0) {
        uint64_t at = table_in_row(e, table);
        return at < first || at > end ? 0 : dr_min(n, (end - at) / e->h.gt_sectors);
    }
    uint32_t gde;
    if (directory_entry(run->image, e, e->h.gd_off, table, dir, &gde) < 0)
        return 0;
    uint64_t at = e->h.gd_off * VMDK_SECTOR + table * 4;
    const uint8_t *entries = dr_page_at(dir->page, at);
    n = dr_min(n, (dir->start + DR_PAGE_SIZE - at) / 4);
    uint64_t i = 0;
    for (; i < n; i++) {
        gde = get_le32(entries + i * 4);
        if (gde != 0 && (gde < first || gde + e->h.gt_sectors > end))
            break;
    }
    return i;
}

/* Bounded: a walk of a chain asks again for each piece that a lower image has, always up to the
 * end of the disk. */
#define MAX_TABLES_A_RUN 1024

static void look_at(struct run *run, const struct dr_page *page)
{
    run->page = page;
    run->page_start = dr_page_start(page);
    run->page_end = run->page_start + DR_PAGE_SIZE;
    run->zero_end = dr_page_zero_until(run->image, page);
}

/* A hole goes on in the page of the entry at pos, if that is another one and in memory. */
static bool turn_page(struct run *run, uint64_t pos)
{
    struct dr_page *page;
    if (run->kind != DR_HOLE || pos == 0 || (pos >= run->page_start && pos < run->page_end) ||
        dr_page_get(run->image, run->e->file, pos, &page) < 0)
        return false;
    look_at(run, page);
    return true;
}

static void run_on(struct run *run)
{
    struct vmdk_slot slot;
    struct dir_page dir = {0};
    uint64_t gtes = run->e->h.gtes, last = run->first / gtes + MAX_TABLES_A_RUN;
    run->max = dr_min(run->max, last * gtes - run->first);
    while (run->grains < run->max) {
        uint64_t grain = run->first + run->grains;
        if (run->kind == DR_HOLE && grain % gtes == 0) {
            uint64_t tables = empty_tables(run, grain / gtes, &dir);
            run->grains += tables * gtes;
            if (tables > 0)
                continue;
        }
        if (next_slot(run->image, run->e, grain, &dir, &slot, NULL) < 0)
            return;
        uint64_t more = extend(run, &slot);
        if (more == 0 && !turn_page(run, slot.pos))
            return;
        run->grains += more;
    }
}

/* How many bytes of tables to read from pos on. The first table mostly begins in a page with the
 * end of the directory. What follows is a hole in a disk with nothing in it, as most layers of a
 * deep chain: read with the next page, that is found out by the same read. */
static uint64_t first_read(const struct vmdk_extent *e, uint64_t pos)
{
    uint64_t left = DR_PAGE_SIZE - pos % DR_PAGE_SIZE,
             tables = (uint64_t)e->tables_at * VMDK_SECTOR;
    return tables > dr_round_down(pos, DR_PAGE_SIZE) ? left + DR_PAGE_SIZE : left;
}

/* The kind of the first grain; loads its page. */
static int run_start(struct run *run, struct dr_error *err)
{
    struct vmdk_slot slot;
    struct dr_page *page;
    int r = vmdk_slot(run->image, run->e, run->first, &slot, err);
    if (r < 0)
        return r;
    if (slot.pos == 0) {
        run->kind = DR_HOLE;
        return 0;
    }
    r = dr_page_get(run->image, run->e->file, slot.pos, &page);
    if (r < 0)
        return dr_page_get_all(run->image, run->e->file, slot.pos, first_read(run->e, slot.pos));
    look_at(run, page);
    run->first_at = slot.pos;
    run->gte = get_le32(dr_page_at(page, slot.pos));
    r = entry_kind(run, run->first, run->gte, &run->kind, err);
    run->grains = 1;
    return r;
}

/* The next entry behind that of the first grain that is not 0, in the same table and page; 0: there
 * is none. */
static uint32_t next_entry(const struct run *run)
{
    uint64_t left = run->e->h.gtes - run->first % run->e->h.gtes;
    uint64_t end = dr_min(run->page_end, run->first_at + left * 4);
    for (uint64_t at = run->first_at + 4; at < end; at += 4) {
        uint32_t gte = get_le32(dr_page_at(run->page, at));
        if (gte != 0)
            return gte;
    }
    return 0;
}

static int map_sparse(struct dr_image *image, const struct vmdk_extent *e, uint64_t rel,
                      uint64_t len, struct dr_extent *ext, struct dr_error *err)
{
    uint64_t first = rel / e->grain, inner = rel % e->grain;
    struct run run = {
        .image = image, .e = e, .first = first, .max = dr_div_up(inner + len, e->grain)};
    int r = run_start(&run, err);
    if (r < 0)
        return r;
    if (run.kind == DR_DATA && vmdk_is_stream(e)) {
        vmdk_map_coded(image, e, first, inner, run.gte, next_entry(&run), ext);
        ext->len = dr_min(ext->len, len);
        return 0;
    }
    run_on(&run);
    *ext = (struct dr_extent){.kind = run.kind};
    ext->len = dr_min(len, run.grains * e->grain - inner);
    if (run.kind == DR_DATA) {
        ext->file = image->files[e->file];
        ext->host = (uint64_t)run.gte * VMDK_SECTOR + inner;
        ext->in_place = e->access == VMDK_RW;
    }
    return 0;
}

int vmdk_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
             struct dr_error *err)
{
    const struct vmdk_extent *e = vmdk_extent_at(image, off);
    uint64_t rel = off - e->start;
    len = dr_min(len, e->len - rel);
    if (e->type == VMDK_ABSENT && e->access == VMDK_NOACCESS)
        return dr_fail(err, EIO, "%s: guest offset %llu is in a NOACCESS extent", image->path,
                       (unsigned long long)off);
    if (e->type == VMDK_ABSENT || rel >= e->there)
        return dr_fail(err, EIO,
                       "%s: guest offset %llu is in a part of its %s extent that is missing",
                       image->path, (unsigned long long)off, e->type_name);
    len = dr_min(len, e->there - rel);
    if (e->scanned)
        return vmdk_map_found(image, e, rel, len, ext, err);
    if (e->type == VMDK_SPARSE)
        return map_sparse(image, e, rel, len, ext, err);
    if (e->type == VMDK_SESPARSE)
        return vmdk_sesparse_map(image, e, rel, len, ext, err);
    if (e->type == VMDK_ZERO) {
        *ext = (struct dr_extent){.kind = DR_ZERO, .len = len};
        return 0;
    }
    *ext = (struct dr_extent){
        .kind = DR_DATA,
        .len = len,
        .file = image->files[e->file],
        .host = e->host + rel,
        .in_place = e->access == VMDK_RW,
        .flat = true,
    };
    return 0;
}
