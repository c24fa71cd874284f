/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check of COWD extents. Tables and grains stand among each other and at any sector, and a place
 * has one owner at most. The directory has no copy, so most damage has no certain answer. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "formats/vmdk/cowd.h"

#define MAX_FILE (UINT64_C(1) << 41) /* bytes: entries have 32 bits */
#define BLOCK    UINT64_C(4096)      /* a file system gives back no less */

enum cowd_finding {
    COWD_NOTHING,
    COWD_ENTRY,       /* of a table: it leads where no grain can be */
    COWD_GRAIN_TWICE, /* something else is there, too */
    COWD_TABLE,       /* an entry of the directory leads where no table can be */
    COWD_TABLE_TWICE,
    COWD_BEHIND, /* tables with entries behind the end of the extent */
};

/* Neighbours with the same finding, told in one line: damage may be in millions of entries. */
struct cowd_findings {
    enum cowd_finding what;
    uint64_t first, n;  /* grains, or tables */
    uint32_t low, high; /* sectors */
    uint64_t entries;
};

struct cowd_walk {
    struct dr_image *image;
    struct vmdk_extent *e;
    struct dr_file *f;
    const char *path;
    bool fix_leaks, fix_all;
    struct dr_check_result *result;
    uint8_t *used;      /* a bit a sector */
    uint64_t n_sectors; /* of the file */
    uint64_t end;       /* behind the last sector that is used */
    struct cowd_findings findings;
    bool changed, damaged;
};

#define say(w, ...) vmdk_say((w)->result, (w)->path, __VA_ARGS__)

static void count(struct cowd_walk *w, bool fixed)
{
    if (fixed)
        w->result->corruptions_fixed++;
    else
        w->result->corruptions++;
    w->damaged |= !fixed;
}

static bool is_used(const struct cowd_walk *w, uint64_t i)
{
    return w->used[i / 8] & (1u << i % 8);
}

/* The first sector from i on of which the answer is another one than `used`. */
static uint64_t run_end(const struct cowd_walk *w, uint64_t i, bool used)
{
    const uint64_t same = used ? UINT64_MAX : 0;
    while (i < w->n_sectors && is_used(w, i) == used)
        i += i % 64 == 0 && i + 64 <= w->n_sectors && get_le64(w->used + i / 8) == same ? 64 : 1;
    return i;
}

/* Answers whether some of it was taken already. */
static bool take(struct cowd_walk *w, uint64_t first, uint64_t n)
{
    bool twice = false;
    uint64_t end = dr_min(first + n, w->n_sectors);
    w->end = dr_max(w->end, first + n);
    for (uint64_t i = first; i < end; i++) {
        twice |= is_used(w, i);
        w->used[i / 8] |= (uint8_t)(1u << i % 8);
    }
    return twice;
}

/* ------------------------------------------------------------------ findings */

static void tell_grains(struct cowd_walk *w, const char *sectors)
{
    const struct cowd_findings *f = &w->findings;
    uint64_t start = w->e->start + f->first * w->e->grain;
    uint64_t end = w->e->start + dr_min((f->first + f->n) * w->e->grain, w->e->len);
    bool one = f->n == 1;
    char offsets[80];
    snprintf(offsets, sizeof(offsets),
             one ? "guest offset %" PRIu64 : "guest offsets %" PRIu64 " to %" PRIu64, start,
             end - 1);
    if (f->what == COWD_GRAIN_TWICE)
        say(w, "the %s of %s at %s %s to something else too", one ? "grain" : "grains", offsets,
            sectors, one ? "belongs" : "belong");
    else if (one)
        say(w, "the entry for %s says %s, which cannot be: grains are elsewhere in the file",
            offsets, sectors);
    else
        say(w,
            "%" PRIu64 " entries for %s say %s, which cannot be: grains are elsewhere in the file",
            f->n, offsets, sectors);
}

static void tell_tables(struct cowd_walk *w, const char *sectors)
{
    const struct cowd_findings *f = &w->findings;
    bool one = f->n == 1;
    char tables[64];
    const char *word = f->what == COWD_TABLE ? one ? "directory entry" : "directory entries"
                       : one                 ? "table"
                                             : "tables";
    snprintf(tables, sizeof(tables), one ? "%s %" PRIu64 : "%s %" PRIu64 " to %" PRIu64, word,
             f->first, f->first + f->n - 1);
    if (f->what == COWD_TABLE)
        say(w, "grain %s %s %s: no table can be there", tables, one ? "says" : "say", sectors);
    else if (f->what == COWD_TABLE_TWICE)
        say(w, "grain %s at %s %s", tables, sectors,
            one ? "overlaps another one" : "overlap other ones");
    else
        say(w, "%" PRIu64 " entries of grain %s are behind the end of the extent", f->entries,
            tables);
}

static void tell(struct cowd_walk *w)
{
    const struct cowd_findings *f = &w->findings;
    char sectors[40];
    snprintf(sectors, sizeof(sectors), f->low == f->high ? "sector %u" : "sectors %u to %u", f->low,
             f->high);
    if (f->what == COWD_ENTRY || f->what == COWD_GRAIN_TWICE)
        tell_grains(w, sectors);
    else if (f->what != COWD_NOTHING)
        tell_tables(w, sectors);
    w->findings = (struct cowd_findings){0};
}

static void found(struct cowd_walk *w, enum cowd_finding what, uint64_t at, uint32_t sector,
                  uint64_t entries)
{
    struct cowd_findings *f = &w->findings;
    if (f->what != what || f->first + f->n != at) {
        tell(w);
        *f = (struct cowd_findings){what, at, 0, sector, sector, 0};
    }
    f->n++;
    f->low = (uint32_t)dr_min(f->low, sector);
    f->high = (uint32_t)dr_max(f->high, sector);
    f->entries += entries;
}

/* ------------------------------------------------------------------ tables */

static void check_entry(struct cowd_walk *w, uint64_t grain, uint32_t gte)
{
    const struct vmdk_extent *e = w->e;
    if (gte == 0)
        return;
    if (!vmdk_gte_fits(w->image, e, grain, gte)) {
        found(w, COWD_ENTRY, grain, gte, 1);
        count(w, false);
    } else if (take(w, gte, e->h.grain)) {
        found(w, COWD_GRAIN_TWICE, grain, gte, 1);
        count(w, false);
    }
}

/* Entries behind the end of the extent, which nobody reads: lost space. */
static int check_behind(struct cowd_walk *w, uint64_t table, uint32_t first, uint8_t *buf,
                        struct dr_error *err)
{
    uint64_t n = 0;
    for (uint32_t i = first; i < VMDK_COWD_GTES; i++)
        n += get_le32(buf + i * 4) != 0;
    if (n == 0)
        return 0;
    found(w, COWD_BEHIND, table, 0, n);
    *(w->fix_leaks ? &w->result->leaks_fixed : &w->result->leaks) += n;
    if (!w->fix_leaks)
        return 0;
    w->changed = true;
    uint64_t at = (uint64_t)w->e->gd[table] * VMDK_SECTOR + first * 4;
    memset(buf + first * 4, 0, VMDK_COWD_TABLE - first * 4);
    return dr_file_pwrite(w->f, buf + first * 4, at, VMDK_COWD_TABLE - first * 4, err);
}

static int check_entries(struct cowd_walk *w, uint64_t table, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    CLEANUP_FREE uint8_t *buf = malloc(VMDK_COWD_TABLE);
    bool hole;
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    int r = vmdk_read_table(w->image, e, e->gd[table], buf, &hole, err);
    if (r < 0 || hole)
        return r;
    uint64_t grains = dr_div_up(e->len, e->grain), first = table * VMDK_COWD_GTES;
    uint32_t n = (uint32_t)dr_min(VMDK_COWD_GTES, grains > first ? grains - first : 0);
    for (uint32_t i = 0; i < n; i++)
        check_entry(w, first + i, get_le32(buf + i * 4));
    return n < VMDK_COWD_GTES ? check_behind(w, table, n, buf, err) : 0;
}

/* The place of a table; 0 is no table yet. False: its entries are not to be looked at. */
static bool check_table(struct cowd_walk *w, uint64_t table)
{
    uint32_t gde = w->e->gd[table];
    if (gde == 0)
        return false;
    if (!vmdk_table_fits(w->image, w->e, gde)) {
        found(w, COWD_TABLE, table, gde, 1);
        count(w, false);
        return false;
    }
    if (!take(w, gde, w->e->h.gt_sectors))
        return true;
    /* Its entries are those of the other one: a million tables in one place would be walked a
     * million times, and each entry told as often. */
    found(w, COWD_TABLE_TWICE, table, gde, 1);
    count(w, false);
    return false;
}

static int check_tables(struct cowd_walk *w, struct dr_error *err)
{
    int r = 0;
    /* All tables first: of a grain that stands in one, the grain is what is wrong. */
    CLEANUP_FREE bool *there = calloc((size_t)w->e->h.n_tables + 1, sizeof(*there));
    if (!there)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    take(w, 0, w->e->h.overhead);
    for (uint64_t t = 0; t < w->e->h.n_tables; t++)
        there[t] = check_table(w, t);
    for (uint64_t t = 0; r == 0 && t < w->e->h.n_tables; t++)
        r = there[t] ? check_entries(w, t, err) : 0;
    tell(w);
    return r;
}

/* ------------------------------------------------------------------ leaks */

/* Is there something in [at, end) of the file that is not zero? *run: how far the answer goes. */
static int has_bytes(struct cowd_walk *w, uint64_t at, uint64_t end, uint64_t *run, bool *bytes,
                     struct dr_error *err)
{
    uint8_t buf[65536];
    enum dr_file_extent kind;
    int r = dr_file_extent(w->f, at, end - at, &kind, run, err);
    *bytes = false;
    if (r < 0 || kind == DR_FILE_HOLE)
        return r;
    *run = dr_min(*run, sizeof(buf));
    r = dr_file_pread(w->f, buf, at, (size_t)*run, err);
    *bytes = r == 0 && !dr_is_zero(buf, (size_t)*run);
    return r;
}

static int give_back(struct cowd_walk *w, uint64_t at, uint64_t len, struct dr_error *err)
{
    w->changed = true;
    return at + len < dr_file_size(w->f)
               ? dr_file_zero(w->f, at, len, DR_FILE_ZERO_PUNCH, err)
               : vmdk_cut(w->image, w->e, dr_div_up(at, VMDK_SECTOR), err);
}

struct leaks {
    uint64_t bytes, first; /* where the first of them is */
    uint64_t places;
};

/* One line for all: in a file of small grains they may be anywhere between those. */
static void tell_leaks(struct cowd_walk *w, const struct leaks *l)
{
    char places[40] = "";
    if (l->bytes == 0)
        return;
    if (l->places > 1)
        snprintf(places, sizeof(places), ", in %" PRIu64 " places,", l->places);
    say(w, "%" PRIu64 " grains from byte %" PRIu64 " on%s belong to nothing%s",
        dr_div_up(l->bytes, w->e->grain), l->first, places, w->damaged ? " that is intact" : "");
}

/* Bytes of the file that nothing leads to. What a file system cannot give back, less than a block,
 * is no leak. */
static int check_leak(struct cowd_walk *w, struct leaks *l, uint64_t first, uint64_t last,
                      struct dr_error *err)
{
    uint64_t size = dr_file_size(w->f), end = last * VMDK_SECTOR, run;
    uint64_t begin = dr_round_up(first * VMDK_SECTOR, BLOCK), leaked = 0;
    end = end >= size ? size : dr_round_down(end, BLOCK);
    for (uint64_t at = begin; at < end; at += run) {
        bool bytes;
        int r = has_bytes(w, at, end, &run, &bytes, err);
        if (r < 0)
            return r;
        leaked += bytes ? run : 0;
    }
    if (leaked == 0)
        return 0;
    bool fix = w->fix_leaks && !w->damaged;
    uint64_t grains = dr_div_up(leaked, w->e->grain);
    l->first = l->places++ ? l->first : begin;
    l->bytes += leaked;
    *(fix ? &w->result->leaks_fixed : &w->result->leaks) += grains;
    return fix ? give_back(w, begin, end - begin, err) : 0;
}

static int check_leaks(struct cowd_walk *w, struct dr_error *err)
{
    struct leaks l = {0};
    int r = 0;
    for (uint64_t i = w->e->h.overhead, last; r == 0 && i < w->n_sectors; i = last) {
        bool used = is_used(w, i);
        last = run_end(w, i, used);
        r = used ? 0 : check_leak(w, &l, i, last, err);
    }
    tell_leaks(w, &l);
    return r;
}

/* ------------------------------------------------------------------ the header */

/* A program that goes by the count writes over what lies behind it. */
static int check_count(struct cowd_walk *w, struct dr_error *err)
{
    pthread_mutex_lock(&w->image->lock); /* others may be writing */
    uint32_t sector = w->e->h.free_sector;
    pthread_mutex_unlock(&w->image->lock);
    if (sector >= w->end)
        return 0;
    say(w, "the header says that sector %u is free, but %" PRIu64 " are in use%s", sector, w->end,
        w->e->h.unclean ? ", as may be when it was not closed" : "");
    bool fix = w->fix_all && w->end <= VMDK_COWD_MAX_SECTOR;
    if (!w->e->h.unclean || fix)
        count(w, fix);
    w->changed |= fix;
    return fix ? vmdk_cowd_set_free(w->image, w->e, w->end, err) : 0;
}

static int check_state(struct cowd_walk *w, struct dr_error *err)
{
    if (w->e->h.inconsistent) {
        bool fix = w->fix_all && !w->damaged;
        say(w, "its writer has marked it as inconsistent");
        count(w, fix);
        int r = fix ? vmdk_cowd_consistent(w->image, w->e, err) : 0;
        w->changed |= fix;
        if (r < 0)
            return r;
    }
    if (!w->e->h.unclean)
        return 0;
    say(w, "was not closed cleanly%s", w->fix_all ? "" : " (opening it for writing recovers it)");
    if (!w->fix_all || w->damaged)
        return 0;
    w->changed = true;
    return vmdk_cowd_mark(w->image, w->e, false, err);
}

static int walk(struct cowd_walk *w, struct dr_error *err)
{
    int r = check_tables(w, err);
    if (r == 0)
        r = check_count(w, err);
    if (r == 0)
        r = check_leaks(w, err);
    if (r == 0)
        r = check_state(w, err);
    return r == 0 && w->changed ? dr_file_flush(w->f, err) : r;
}

int vmdk_cowd_check(struct dr_image *image, struct vmdk_extent *e, unsigned fix,
                    struct dr_check_result *result, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    bool writable = e->access == VMDK_RW;
    struct cowd_walk w = {.image = image,
                          .e = e,
                          .f = f,
                          .path = f->path,
                          .fix_leaks = (fix & DR_CHECK_FIX_LEAKS) && writable,
                          .fix_all = (fix & DR_CHECK_FIX_ALL) == DR_CHECK_FIX_ALL && writable,
                          .result = result,
                          .n_sectors = dr_div_up(dr_min(dr_file_size(f), MAX_FILE), VMDK_SECTOR)};
    CLEANUP_FREE uint8_t *used = w.used = calloc(1, (size_t)(w.n_sectors / 8 + 8));
    if (!used)
        return dr_fail_errno(err, ENOMEM, "%s: %" PRIu64 " sectors to check", w.path, w.n_sectors);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = walk(&w, err);
    vmdk_drop_directories(e);
    if (w.changed) {
        DR_LOCK_SCOPE(&image->lock);
        dr_page_forget(image, e->file, 0, dr_file_size(f));
        e->next = 0;
    }
    return r;
}
