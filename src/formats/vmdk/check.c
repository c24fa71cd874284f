/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check: walk directories and tables, find what is wrong, mend what has one answer. Works on the
 * files, not through the page cache: nothing is dirty while check runs. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"
#include "formats/vmdk/sesparse.h"

#define MAX_GRAINS_IN_FILE (UINT64_C(1) << 33) /* bits of the map of used grains: 1 GiB */

struct walk {
    struct dr_image *image;
    struct vmdk_extent *e;
    struct dr_file *f;
    const char *path;
    unsigned fix;
    struct dr_check_result *result;
    uint8_t *used; /* a bit a grain of the file */
    uint64_t n_used;
    bool changed; /* something was written */
    bool damaged; /* something is wrong that was not mended */
    bool odd;     /* some table stands elsewhere than create would have put it */
};

void vmdk_say(struct dr_check_result *result, const char *path, const char *fmt, ...)
{
    char text[512], line[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(line, sizeof(line), "%s: %s", path, text);
    result->report(result->user, line);
}

#define say(w, ...) vmdk_say((w)->result, (w)->path, __VA_ARGS__)

static bool fixing(const struct walk *w)
{
    return (w->fix & DR_CHECK_FIX_ALL) == DR_CHECK_FIX_ALL && w->e->access == VMDK_RW;
}

static void count(struct walk *w, bool fixed)
{
    if (fixed)
        w->result->corruptions_fixed++;
    else
        w->result->corruptions++;
    w->damaged |= !fixed;
}

/* ------------------------------------------------------------------ directories */

/* Where create would have put the table; 0 if this file is laid out otherwise. */
static uint32_t regular_place(const struct walk *w, uint64_t table, bool copy)
{
    const struct vmdk_header *h = &w->e->h;
    uint64_t half = h->gd_sectors + h->n_tables * h->gt_sectors;
    if (!w->e->rgd || h->gd_off != h->rgd_off + half || h->overhead < h->gd_off + half)
        return 0;
    return (uint32_t)((copy ? h->rgd_off : h->gd_off) + h->gd_sectors + table * h->gt_sectors);
}

/* A usable table that stands elsewhere in front of the grains may stand in another one's regular
 * place. */
static bool has_odd_tables(const struct walk *w)
{
    const struct vmdk_extent *e = w->e;
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        for (int copy = 0; copy < (e->rgd ? 2 : 1); copy++) {
            uint32_t gde = copy ? e->rgd[t] : e->gd[t];
            if (vmdk_table_fits(w->image, e, gde) && gde < e->h.overhead &&
                gde != regular_place(w, t, copy))
                return true;
        }
    return false;
}

static int write_table(struct walk *w, uint32_t sector, const uint8_t *buf, struct dr_error *err)
{
    uint8_t padded[VMDK_GTES * 4] = {0};
    memcpy(padded, buf, (size_t)w->e->h.gtes * 4);
    w->changed = true;
    return dr_file_pwrite(w->f, padded, (uint64_t)sector * VMDK_SECTOR,
                          (size_t)(w->e->h.gt_sectors * VMDK_SECTOR), err);
}

/* Make a place for a table whose entry is unusable, with buf in it; the entry is written behind a
 * flush. */
static int new_table(struct walk *w, uint64_t table, bool copy, const uint8_t *buf,
                     struct dr_error *err)
{
    struct vmdk_extent *e = w->e;
    uint32_t *dir = copy ? e->rgd : e->gd, sector = w->odd ? 0 : regular_place(w, table, copy);
    uint8_t entry[4];
    if (sector == 0) {
        uint64_t end = dr_div_up(dr_file_size(w->f), VMDK_SECTOR);
        if (end + e->h.gt_sectors >= UINT32_MAX)
            return dr_fail(err, ENOSPC, "%s: no room for a grain table", w->path);
        sector = (uint32_t)end;
    }
    int r = write_table(w, sector, buf, err);
    if (r == 0)
        r = dr_file_flush(w->f, err);
    put_le32(entry, sector);
    if (!copy)
        e->tables_at = 0; /* they may stand in no row now */
    if (r == 0)
        r = dr_file_pwrite(w->f, entry,
                           (copy ? e->h.rgd_off : e->h.gd_off) * VMDK_SECTOR + table * 4, 4, err);
    if (r == 0)
        dir[table] = sector;
    return r;
}

/* The content of a usable table, or zeros. */
static int read_or_zero(struct walk *w, uint32_t gde, uint8_t *buf, struct dr_error *err)
{
    bool hole;
    memset(buf, 0, VMDK_GTES * 4);
    return vmdk_table_fits(w->image, w->e, gde)
               ? vmdk_read_table(w->image, w->e, gde, buf, &hole, err)
               : 0;
}

/* Has the copy's table anything in it? */
static int copy_is_empty(struct walk *w, uint64_t table, bool *empty, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    int r = read_or_zero(w, w->e->rgd ? w->e->rgd[table] : 0, buf, err);
    *empty = dr_is_zero(buf, sizeof(buf));
    return r;
}

/* Is there one answer to what the table of an unusable entry has? An entry of 0 reads as
 * unallocated, and stays so, unless the copy says otherwise: then it is all that is left of the
 * table. One that points nowhere cannot be read: then the copy's table is the answer. */
static int has_answer(struct walk *w, uint64_t table, bool copy, bool *answer, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    *answer = true;
    if (copy)
        return 0;
    if (e->gd[table] == 0)
        return copy_is_empty(w, table, answer, err);
    *answer = e->rgd && vmdk_table_fits(w->image, e, e->rgd[table]);
    return 0;
}

static int check_entry(struct walk *w, uint64_t table, bool copy, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint32_t gde = copy ? e->rgd[table] : e->gd[table];
    uint32_t other = copy ? e->gd[table] : (e->rgd ? e->rgd[table] : 0);
    uint8_t buf[VMDK_GTES * 4];
    bool answer, used = table < vmdk_tables_used(e);
    if ((vmdk_table_fits(w->image, e, gde) && (!copy || gde != other)) || (gde == 0 && !used))
        return 0;
    int r = has_answer(w, table, copy, &answer, err);
    if (r < 0)
        return r;
    say(w, "%s grain directory entry %" PRIu64 " says sector %u: %s",
        copy ? "redundant" : "primary", table, gde,
        gde == 0 ? "no table" : "no table can be there");
    if (!fixing(w) || !answer || !used) {
        count(w, false);
        return 0;
    }
    r = read_or_zero(w, copy ? e->gd[table] : other, buf, err);
    if (r == 0)
        r = new_table(w, table, copy, buf, err);
    count(w, r == 0);
    return r;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Two entries that share a table. */
static int check_overlap(struct walk *w, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    size_t n = (size_t)e->h.n_tables, total = e->rgd ? 2 * n : n;
    CLEANUP_FREE uint32_t *all = malloc((total ? total : 1) * sizeof(*all));
    if (!all)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    memcpy(all, e->gd, n * sizeof(*all));
    if (e->rgd)
        memcpy(all + n, e->rgd, n * sizeof(*all));
    qsort(all, total, sizeof(*all), by_value);
    for (size_t i = 1; i < total; i++) {
        if (all[i - 1] == 0 || all[i] - all[i - 1] >= e->h.gt_sectors)
            continue;
        say(w, "two grain tables overlap at sector %u", all[i]);
        count(w, false);
    }
    return 0;
}

static bool holds_directory(const struct vmdk_header *h, uint64_t gte, uint64_t directory)
{
    return gte < directory + h->gd_sectors && directory < gte + h->grain;
}

/* Has the table a grain in which a directory stands? */
static int table_holds_directory(struct walk *w, uint64_t table, uint32_t gde, bool *holds,
                                 struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t buf[VMDK_GTES * 4];
    int r = read_or_zero(w, gde, buf, err);
    for (uint32_t i = 0; r == 0 && i < e->h.gtes && !*holds; i++) {
        uint64_t grain = table * e->h.gtes + i;
        uint32_t gte = get_le32(buf + i * 4);
        *holds = grain * e->grain < e->len && vmdk_gte_fits(w->image, e, grain, gte) &&
                 (holds_directory(&e->h, gte, e->h.gd_off) ||
                  (e->rgd && holds_directory(&e->h, gte, e->h.rgd_off)));
    }
    return r;
}

/* One wrong bit in the header, and a directory is looked for in some grain: nothing may be written
 * there. Some programs have it behind the first grains, but not in one. */
static int check_places(struct walk *w, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    bool holds = false;
    int r = 0;
    if (dr_max(e->h.gd_off, e->rgd ? e->h.rgd_off : 0) + e->h.gd_sectors <= e->h.overhead)
        return 0;
    for (uint64_t t = 0; r == 0 && !holds && t < e->h.n_tables; t++) {
        r = table_holds_directory(w, t, e->gd[t], &holds, err);
        if (r == 0 && e->rgd && !holds)
            r = table_holds_directory(w, t, e->rgd[t], &holds, err);
    }
    if (r == 0 && holds) {
        say(w, "the header says that a grain directory stands where a grain is");
        count(w, false);
        w->fix = 0;
    }
    return r;
}

static int check_directories(struct walk *w, struct dr_error *err)
{
    w->odd = has_odd_tables(w);
    for (uint64_t t = 0; t < w->e->h.n_tables; t++) {
        int r = check_entry(w, t, false, err);
        if (r == 0 && w->e->rgd)
            r = check_entry(w, t, true, err);
        if (r < 0)
            return r;
    }
    return check_overlap(w, err);
}

/* ------------------------------------------------------------------ tables */

static uint64_t guest_off(const struct walk *w, uint64_t grain)
{
    return w->e->start + grain * w->e->grain;
}

/* Two table entries for one place in the file? */
static void use_grain(struct walk *w, uint64_t grain, uint32_t gte)
{
    uint64_t i = gte / w->e->h.grain;
    if (gte % w->e->h.grain) /* VirtualBox does that; two bits then */
        say(w, "the grain of guest offset %" PRIu64 " at sector %u is not aligned",
            guest_off(w, grain), gte);
    if (i >= w->n_used)
        return;
    if (w->used[i / 8] & (1u << i % 8)) {
        say(w, "the grain of guest offset %" PRIu64 " at sector %u belongs to another one too",
            guest_off(w, grain), gte);
        count(w, false);
    }
    w->used[i / 8] |= (uint8_t)(1u << i % 8);
    if (gte % w->e->h.grain && i + 1 < w->n_used)
        w->used[(i + 1) / 8] |= (uint8_t)(1u << (i + 1) % 8);
}

static void check_gte(struct walk *w, uint64_t grain, uint32_t gte)
{
    if (gte == 0)
        return;
    if (gte == 1 && vmdk_has_zero_grains(w->e))
        return;
    if (gte > 1 && vmdk_gte_fits(w->image, w->e, grain, gte)) {
        use_grain(w, grain, gte);
        return;
    }
    say(w, "the entry for guest offset %" PRIu64 " says sector %u, which cannot be: %s",
        guest_off(w, grain), gte,
        gte == 1 ? "this extent has no zeroed grains" : "grains are elsewhere in the file");
    count(w, false);
}

static bool is_used(const struct walk *w, uint64_t i)
{
    return w->used[i / 8] & (1u << i % 8);
}

/* A wrong bit in the redundant directory, which nobody reads, and what is written there is some
 * grain's. */
static bool stands_in_a_grain(const struct walk *w, uint32_t sector)
{
    const struct vmdk_header *h = &w->e->h;
    if (sector + h->gt_sectors <= h->overhead)
        return false; /* grains are behind it, though perhaps not at multiples of their size */
    for (uint64_t i = sector / h->grain; i * h->grain < sector + h->gt_sectors && i < w->n_used;
         i++)
        if (is_used(w, i))
            return true;
    return false;
}

static int move_copy(struct walk *w, uint64_t table, const uint8_t *primary, struct dr_error *err)
{
    say(w, "redundant grain table %" PRIu64 " at sector %u stands in a grain", table,
        w->e->rgd[table]);
    int r = fixing(w) ? new_table(w, table, true, primary, err) : 0;
    count(w, fixing(w) && r == 0);
    return r;
}

/* The copy follows the table, unless that is damaged itself and the copy may be what is left. */
static int compare_copy(struct walk *w, uint64_t table, const uint8_t *primary, bool hole,
                        struct dr_error *err)
{
    uint8_t copy[VMDK_GTES * 4];
    bool copy_hole;
    int r = vmdk_read_table(w->image, w->e, w->e->rgd[table], copy, &copy_hole, err);
    if (r < 0 || (hole && copy_hole) || memcmp(copy, primary, (size_t)w->e->h.gtes * 4) == 0)
        return r;
    if (!vmdk_table_is_sound(w->image, w->e, table, primary)) {
        say(w,
            "grain table %" PRIu64 " is damaged, its redundant copy differs and is left as it is",
            table);
        count(w, false);
        return 0;
    }
    say(w, "grain table %" PRIu64 " and its redundant copy differ%s", table,
        w->e->h.unclean ? ", as they may when it was not closed" : "");
    if (fixing(w))
        r = write_table(w, w->e->rgd[table], primary, err);
    /* After a crash that is no damage: opening for writing copies the one over the other. */
    if (!w->e->h.unclean || fixing(w))
        count(w, fixing(w) && r == 0);
    return r;
}

/* When all grains are known. */
static int check_copy(struct walk *w, uint64_t table, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t primary[VMDK_GTES * 4];
    bool hole;
    if (!e->rgd || !vmdk_table_fits(w->image, e, e->gd[table]) ||
        !vmdk_table_fits(w->image, e, e->rgd[table]) || e->rgd[table] == e->gd[table])
        return 0;
    int r = vmdk_read_table(w->image, e, e->gd[table], primary, &hole, err);
    if (r < 0)
        return r;
    if (stands_in_a_grain(w, e->rgd[table]))
        return move_copy(w, table, primary, err);
    return compare_copy(w, table, primary, hole, err);
}

/* Entries behind the end of the extent: a shrinking that was interrupted leaves them. Nobody reads
 * them, so they are lost space and no damage. Tables that nobody uses may hold anything. */
static int check_behind(struct walk *w, uint64_t table, uint32_t first, uint8_t *buf,
                        struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    bool fix = (w->fix & DR_CHECK_FIX_LEAKS) && e->access == VMDK_RW;
    uint32_t n = 0, last = first;
    for (uint32_t i = first; i < e->h.gtes; i++)
        if (get_le32(buf + i * 4)) {
            n += 1;
            last = i;
        }
    if (n == 0)
        return 0;
    say(w, "%u entries of grain table %" PRIu64 " are behind the end of the extent", n, table);
    *(fix ? &w->result->leaks_fixed : &w->result->leaks) += n;
    if (!fix)
        return 0;
    memset(buf + first * 4, 0, (last + 1 - first) * 4);
    int r = e->rgd && vmdk_table_fits(w->image, e, e->rgd[table])
                ? write_table(w, e->rgd[table], buf, err)
                : 0;
    return r < 0 ? r : write_table(w, e->gd[table], buf, err);
}

static int check_table(struct walk *w, uint64_t table, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t buf[VMDK_GTES * 4];
    bool hole;
    if (!vmdk_table_fits(w->image, e, e->gd[table]))
        return 0;
    int r = vmdk_read_table(w->image, e, e->gd[table], buf, &hole, err);
    if (r < 0 || hole)
        return r;
    uint64_t grains = dr_div_up(e->len, e->grain), first = table * e->h.gtes;
    uint32_t n = (uint32_t)dr_min(e->h.gtes, grains > first ? grains - first : 0);
    for (uint32_t i = 0; i < n; i++)
        check_gte(w, first + i, get_le32(buf + i * 4));
    return n > 0 && n < e->h.gtes ? check_behind(w, table, n, buf, err) : 0;
}

/* ------------------------------------------------------------------ leaks */

/* Give the space of unused grains [first, last) back. A hole in the file is no leak. */
static int check_leak(struct walk *w, uint64_t first, uint64_t last, struct dr_error *err)
{
    uint64_t size = dr_file_size(w->f);
    for (uint64_t at = first * w->e->grain, end = last * w->e->grain, run; at < end; at += run) {
        enum dr_file_extent kind;
        int r = dr_file_extent(w->f, at, end - at, &kind, &run, err);
        if (r < 0)
            return r;
        if (kind == DR_FILE_HOLE && at + run < end)
            run = dr_round_down(run, w->e->grain);
        if (kind == DR_FILE_HOLE && run > 0)
            continue;
        run = dr_round_up(dr_max(run, 1), w->e->grain); /* a grain may begin with a hole */
        uint64_t grains = run / w->e->grain;
        /* A grain that a damaged entry should point to looks like a leak, too. */
        bool fix = (w->fix & DR_CHECK_FIX_LEAKS) && w->e->access == VMDK_RW && !w->damaged;
        say(w, "%" PRIu64 " grains at byte %" PRIu64 " belong to nothing%s", grains, at,
            w->damaged ? " that is intact" : "");
        if (fix) /* behind it nothing stands: of a block that the file ends in, no part can be
                    punched */
            r = at + run < size ? dr_file_zero(w->f, at, run, DR_FILE_ZERO_PUNCH, err)
                                : vmdk_cut(w->image, w->e, at / VMDK_SECTOR, err);
        if (r < 0)
            return r;
        w->changed |= fix;
        *(fix ? &w->result->leaks_fixed : &w->result->leaks) += grains;
    }
    return 0;
}

static void use_sectors(struct walk *w, uint64_t first, uint64_t n)
{
    for (uint64_t i = first / w->e->h.grain; i * w->e->h.grain < first + n && i < w->n_used; i++)
        w->used[i / 8] |= (uint8_t)(1u << i % 8);
}

/* Metadata that stands among the grains is no leak: tables after a repair; some programs put the
 * directory there. */
static void use_metadata(struct walk *w)
{
    const struct vmdk_header *h = &w->e->h;
    use_sectors(w, h->gd_off, h->gd_sectors);
    if (w->e->rgd)
        use_sectors(w, h->rgd_off, h->gd_sectors);
    if (h->desc_off)
        use_sectors(w, h->desc_off, h->desc_len);
    use_sectors(w, 0, 1);
    const uint32_t *const directories[] = {w->e->gd, w->e->rgd};
    for (size_t d = 0; d < 2; d++)
        for (uint64_t t = 0; directories[d] && t < h->n_tables; t++)
            if (directories[d][t] >= h->overhead)
                use_sectors(w, directories[d][t], h->gt_sectors);
}

static int check_leaks(struct walk *w, struct dr_error *err)
{
    use_metadata(w);
    for (uint64_t i = dr_div_up(w->e->h.overhead, w->e->h.grain), last; i < w->n_used; i = last) {
        for (last = i; last < w->n_used && !is_used(w, last);)
            last++;
        if (last > i) {
            int r = check_leak(w, i, last, err);
            if (r < 0)
                return r;
        } else {
            last++;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ all together */

static int check_state(struct walk *w, struct dr_error *err)
{
    if (!w->e->h.unclean)
        return 0;
    say(w, "was not closed cleanly%s", w->fix ? "" : " (opening it for writing recovers it)");
    if (!fixing(w))
        return 0;
    int r = vmdk_mark(w->image, w->e, false, false, err);
    w->changed = true;
    return r;
}

static int walk_extent(struct walk *w, struct dr_error *err)
{
    int r = check_places(w, err);
    if (r == 0)
        r = check_directories(w, err);
    for (uint64_t t = 0; r == 0 && t < w->e->h.n_tables; t++)
        r = check_table(w, t, err);
    for (uint64_t t = 0; r == 0 && t < vmdk_tables_used(w->e); t++)
        r = check_copy(w, t, err);
    if (r == 0)
        r = check_leaks(w, err);
    if (r == 0)
        r = check_state(w, err);
    if (r == 0 && w->changed)
        r = dr_file_flush(w->f, err);
    return r;
}

static int check_sparse(struct dr_image *image, struct vmdk_extent *e, unsigned fix,
                        struct dr_check_result *result, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    struct walk w = {.image = image, .e = e, .f = f, .path = f->path, .fix = fix, .result = result};
    w.n_used = dr_div_up(dr_min(dr_file_size(f), UINT64_C(1) << 41), e->grain);
    if (w.n_used > MAX_GRAINS_IN_FILE)
        return dr_fail(err, EFBIG, "%s: too many grains to check", w.path);
    CLEANUP_FREE uint8_t *used = w.used = calloc(1, (size_t)(w.n_used / 8 + 1));
    if (!used)
        return dr_fail_errno(err, ENOMEM, "%s: %" PRIu64 " grains to check", w.path, w.n_used);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = walk_extent(&w, err);
    vmdk_drop_directories(e);
    if (w.changed) {
        DR_LOCK_SCOPE(&image->lock);
        dr_page_forget(image, e->file, 0, dr_file_size(f));
        e->next = 0;
    }
    return r;
}

int vmdk_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
               struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = 0;
    for (size_t i = 0; r == 0 && i < s->n_extents; i++)
        if (vmdk_is_stream(&s->extents[i]))
            r = vmdk_check_stream(image, &s->extents[i], result, err);
        else if (s->extents[i].type == VMDK_SESPARSE)
            r = vmdk_sesparse_check(image, &s->extents[i], result, err);
        else if (s->extents[i].h.cowd)
            r = vmdk_cowd_check(image, &s->extents[i], fix, result, err);
        else if (s->extents[i].type == VMDK_SPARSE)
            r = check_sparse(image, &s->extents[i], fix, result, err);
    return r;
}
