/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check of COWD extents. Tables and grains stand among each other and at any sector, and a place
 * has one owner at most. The directory has no copy, so most damage has no certain answer. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "formats/vmdk/cowd.h"

#define MAX_FILE (UINT64_C(1) << 41) /* bytes: entries have 32 bits */
#define BLOCK    UINT64_C(4096)      /* a file system gives back no less */

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

/* ------------------------------------------------------------------ tables */

static void check_entry(struct cowd_walk *w, uint64_t grain, uint32_t gte)
{
    const struct vmdk_extent *e = w->e;
    uint64_t guest = e->start + grain * e->grain;
    if (gte == 0)
        return;
    if (!vmdk_gte_fits(w->image, e, grain, gte)) {
        say(w,
            "the entry for guest offset %" PRIu64 " says sector %u, which cannot be: grains are "
            "elsewhere in the file",
            guest, gte);
        count(w, false);
    } else if (take(w, gte, e->h.grain)) {
        say(w, "the grain of guest offset %" PRIu64 " at sector %u belongs to something else too",
            guest, gte);
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
    say(w, "%" PRIu64 " entries of grain table %" PRIu64 " are behind the end of the extent", n,
        table);
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
        say(w, "grain directory entry %" PRIu64 " says sector %u: no table can be there", table,
            gde);
        count(w, false);
        return false;
    }
    if (!take(w, gde, w->e->h.gt_sectors))
        return true;
    /* Its entries are those of the other one: a million tables in one place would be walked a
     * million times, and each entry told as often. */
    say(w, "grain table %" PRIu64 " at sector %u overlaps another one", table, gde);
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

/* Bytes of the file that nothing leads to. What a file system cannot give back, less than a block,
 * is no leak. */
static int check_leak(struct cowd_walk *w, uint64_t first, uint64_t last, struct dr_error *err)
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
    say(w, "%" PRIu64 " grains from byte %" PRIu64 " on belong to nothing%s", grains, begin,
        w->damaged ? " that is intact" : "");
    *(fix ? &w->result->leaks_fixed : &w->result->leaks) += grains;
    return fix ? give_back(w, begin, end - begin, err) : 0;
}

static int check_leaks(struct cowd_walk *w, struct dr_error *err)
{
    int r = 0;
    for (uint64_t i = w->e->h.overhead, last; r == 0 && i < w->n_sectors; i = last) {
        bool used = is_used(w, i);
        for (last = i + 1; last < w->n_sectors && is_used(w, last) == used;)
            last++;
        r = used ? 0 : check_leak(w, i, last, err);
    }
    return r;
}

/* ------------------------------------------------------------------ the header */

/* A program that goes by the count writes over what lies behind it. */
static int check_count(struct cowd_walk *w, struct dr_error *err)
{
    if (w->e->h.free_sector >= w->end)
        return 0;
    say(w, "the header says that sector %u is free, but %" PRIu64 " are in use%s",
        w->e->h.free_sector, w->end, w->e->h.unclean ? ", as may be when it was not closed" : "");
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
    CLEANUP_FREE uint8_t *used = w.used = calloc(1, (size_t)(w.n_sectors / 8 + 1));
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
