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
#include "formats/vmdk/check.h"
#include "formats/vmdk/cowd.h"
#include "formats/vmdk/sesparse.h"

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

/* ------------------------------------------------------------------ directories */

/* Where create would have put the table; 0 if this file is laid out otherwise. */
static uint32_t regular_place(const struct vmdk_walk *w, uint64_t table, bool copy)
{
    const struct vmdk_header *h = &w->e->h;
    uint64_t half = h->gd_sectors + h->n_tables * h->gt_sectors;
    if (!w->e->rgd || h->gd_off != h->rgd_off + half || h->overhead < h->gd_off + half)
        return 0;
    return (uint32_t)((copy ? h->rgd_off : h->gd_off) + h->gd_sectors + table * h->gt_sectors);
}

static bool overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

/* Does the sector's table lie on one that stands in its own regular place? */
static bool on_a_regular_table(const struct vmdk_walk *w, uint64_t table, bool copy, uint32_t gde)
{
    const struct vmdk_extent *e = w->e;
    uint64_t len = e->h.gt_sectors;
    for (int other = 0; other < 2; other++) {
        const uint32_t *dir = other ? e->rgd : e->gd;
        uint64_t first = regular_place(w, 0, other);
        if (first == 0 || !overlap(gde, len, first, e->h.n_tables * len))
            continue;
        uint64_t u = gde < first ? 0 : (gde - first) / len;
        for (uint64_t end = dr_min(u + 2, e->h.n_tables); u < end; u++)
            if ((u != table || other != copy) && dir[u] == regular_place(w, u, other) &&
                overlap(gde, len, dir[u], len))
                return true;
    }
    return false;
}

/* Can a directory's entry be what it is? */
static bool can_be(const struct vmdk_walk *w, uint64_t table, bool copy, uint32_t gde)
{
    const struct vmdk_header *h = &w->e->h;
    uint64_t len = h->gt_sectors;
    /* A wrong capacity makes the directories longer, but only in the header. */
    uint64_t dir = dr_div_up(vmdk_tables_used(w->e) * 4, VMDK_SECTOR);
    return vmdk_table_fits(w->image, w->e, gde) &&
           !(h->desc_off && overlap(gde, len, h->desc_off, h->desc_len)) &&
           !overlap(gde, len, h->gd_off, dir) &&
           !(w->e->rgd && overlap(gde, len, h->rgd_off, dir)) &&
           !on_a_regular_table(w, table, copy, gde);
}

/* A usable table that stands elsewhere in front of the grains may stand in another one's regular
 * place. */
static bool has_odd_tables(const struct vmdk_walk *w)
{
    const struct vmdk_extent *e = w->e;
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        for (int copy = 0; copy < (e->rgd ? 2 : 1); copy++) {
            uint32_t gde = copy ? e->rgd[t] : e->gd[t];
            if (gde < e->h.overhead && gde != regular_place(w, t, copy) && can_be(w, t, copy, gde))
                return true;
        }
    return false;
}

/* Does every usable entry lead to the regular place? */
static bool all_regular(const struct vmdk_walk *w)
{
    const struct vmdk_extent *e = w->e;
    if (!e->rgd || regular_place(w, 0, false) == 0)
        return false;
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        if ((e->gd[t] != regular_place(w, t, false) && can_be(w, t, false, e->gd[t])) ||
            (e->rgd[t] != regular_place(w, t, true) && can_be(w, t, true, e->rgd[t])))
            return false;
    return true;
}

int vmdk_write_table(struct vmdk_walk *w, uint32_t sector, const uint8_t *buf, struct dr_error *err)
{
    uint8_t padded[VMDK_GTES * 4] = {0};
    memcpy(padded, buf, (size_t)w->e->h.gtes * 4);
    w->changed = true;
    return dr_file_pwrite(w->f, padded, (uint64_t)sector * VMDK_SECTOR,
                          (size_t)(w->e->h.gt_sectors * VMDK_SECTOR), err);
}

/* Make a place for a table whose entry is unusable, with buf in it; the entry is written behind a
 * flush. */
int vmdk_new_table(struct vmdk_walk *w, uint64_t table, bool copy, const uint8_t *buf,
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
    int r = vmdk_write_table(w, sector, buf, err);
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
static int read_or_zero(struct vmdk_walk *w, uint32_t gde, uint8_t *buf, struct dr_error *err)
{
    bool hole;
    memset(buf, 0, VMDK_GTES * 4);
    return vmdk_table_fits(w->image, w->e, gde)
               ? vmdk_read_table(w->image, w->e, gde, buf, &hole, err)
               : 0;
}

/* Has the copy's table anything in it? */
static int copy_is_empty(struct vmdk_walk *w, uint64_t table, bool *empty, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    int r = read_or_zero(w, w->e->rgd ? w->e->rgd[table] : 0, buf, err);
    *empty = dr_is_zero(buf, sizeof(buf));
    return r;
}

/* Would a new empty table be written over something? A table may stand there still, of which only
 * the entries are lost. */
static int place_is_empty(struct vmdk_walk *w, uint64_t table, bool *empty, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    int r = 0;
    for (int copy = 0; r == 0 && *empty && copy < 2 && !w->odd; copy++) {
        r = read_or_zero(w, regular_place(w, table, copy), buf, err);
        *empty = dr_is_zero(buf, sizeof(buf));
    }
    return r;
}

/* Is there one answer to what the table of an unusable entry has? The copy's table is it, if there
 * is one; for the copy it is the table. An entry of 0 reads as unallocated, and a crash may leave
 * it so, with a copy that has more. */
static int has_answer(struct vmdk_walk *w, uint64_t table, bool copy, bool *answer,
                      struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    *answer = e->gd[table] != 0;
    if (copy)
        return 0;
    if (e->gd[table] == 0 && (e->h.unclean || !e->rgd || !can_be(w, table, true, e->rgd[table]))) {
        int r = copy_is_empty(w, table, answer, err);
        return r == 0 && *answer ? place_is_empty(w, table, answer, err) : r;
    }
    *answer = e->rgd && can_be(w, table, true, e->rgd[table]);
    return 0;
}

static void tell_entries(struct vmdk_walk *w, bool copy)
{
    const struct vmdk_findings *f = &w->entries[copy];
    const char *which = copy ? "redundant" : "primary";
    const char *why = f->high == 0                               ? "no table"
                      : vmdk_table_fits(w->image, w->e, f->high) ? "other metadata is there"
                                                                 : "no table can be there";
    char sectors[40];
    snprintf(sectors, sizeof(sectors), f->low == f->high ? "sector %u" : "sectors %u to %u", f->low,
             f->high);
    if (f->n == 1)
        vmdk_say_of(w, "%s grain directory entry %" PRIu64 " says %s: %s", which, f->first, sectors,
                    why);
    else if (f->n > 1)
        vmdk_say_of(w, "%s grain directory entries %" PRIu64 " to %" PRIu64 " say %s: %s", which,
                    f->first, f->first + f->n - 1, sectors, why);
}

static void found_entry(struct vmdk_walk *w, uint64_t table, bool copy, uint32_t gde)
{
    struct vmdk_findings *f = &w->entries[copy];
    if (f->n && f->first + f->n == table && (f->high == 0) == (gde == 0)) {
        f->n++;
        f->low = (uint32_t)dr_min(f->low, gde);
        f->high = (uint32_t)dr_max(f->high, gde);
        return;
    }
    tell_entries(w, copy);
    *f = (struct vmdk_findings){.first = table, .n = 1, .low = gde, .high = gde};
}

static bool is_sound(const struct vmdk_walk *w, uint64_t table, bool copy)
{
    const struct vmdk_extent *e = w->e;
    uint32_t gde = copy ? e->rgd[table] : e->gd[table];
    if (gde == 0)
        return table >= vmdk_tables_used(e);
    return can_be(w, table, copy, gde) && (!copy || gde != e->gd[table]);
}

/* *lent: the entry stays as it is, and the copy's table will stand for the table. */
static int check_entry(struct vmdk_walk *w, uint64_t table, bool copy, bool *lent,
                       struct dr_error *err)
{
    struct vmdk_extent *e = w->e;
    uint8_t buf[VMDK_GTES * 4];
    bool answer;
    if (is_sound(w, table, copy))
        return 0;
    int r = has_answer(w, table, copy, &answer, err);
    if (r < 0)
        return r;
    found_entry(w, table, copy, copy ? e->rgd[table] : e->gd[table]);
    if (vmdk_fixing(w) && answer && table < vmdk_tables_used(e)) {
        r = read_or_zero(w, copy ? e->gd[table] : e->rgd ? e->rgd[table] : 0, buf, err);
        if (r == 0)
            r = vmdk_new_table(w, table, copy, buf, err);
        vmdk_count(w, r == 0);
        return r;
    }
    vmdk_count(w, false);
    *lent = answer && !copy && e->rgd && e->rgd[table];
    if (copy)
        e->rgd[table] = 0;
    else
        e->gd[table] = 0;
    return 0;
}

/* Does it look like a table of this disk? */
static bool may_be_table(const struct vmdk_walk *w, const uint8_t *table)
{
    const struct vmdk_header *h = &w->e->h;
    uint64_t end = dr_file_size(w->f) / VMDK_SECTOR;
    for (uint32_t i = 0; i < h->gtes; i++) {
        uint32_t gte = get_le32(table + (size_t)4 * i);
        bool zeroed = gte == 1 && (h->flags & VMDK_FLAG_ZERO_GRAINS);
        if (gte != 0 && !zeroed && (gte < h->overhead || gte % h->grain || gte + h->grain > end))
            return false;
    }
    return true;
}

/* Both entries of a table are unusable, but all usable ones say that the tables stand where create
 * puts them. Is this one still there? Two equal ones are. */
static int stands_regularly(struct vmdk_walk *w, uint64_t table, bool *stands, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t own[VMDK_GTES * 4] = {0}, copy[VMDK_GTES * 4] = {0};
    bool hole;
    *stands = false;
    if (!w->regular || table >= vmdk_tables_used(e) || is_sound(w, table, false) ||
        can_be(w, table, true, e->rgd[table]))
        return 0;
    int r = vmdk_read_table(w->image, w->e, regular_place(w, table, false), own, &hole, err);
    if (r == 0)
        r = vmdk_read_table(w->image, w->e, regular_place(w, table, true), copy, &hole, err);
    *stands = r == 0 && memcmp(own, copy, sizeof(own)) == 0 && may_be_table(w, own);
    return r;
}

/* Lead both entries to where the tables stand; without `fix`, in memory only. */
static int lead_back(struct vmdk_walk *w, uint64_t table, struct dr_error *err)
{
    struct vmdk_extent *e = w->e;
    int r = 0;
    for (int copy = 0; r == 0 && copy < 2; copy++) {
        uint32_t *dir = copy ? e->rgd : e->gd;
        uint64_t at = (copy ? e->h.rgd_off : e->h.gd_off) * VMDK_SECTOR + table * 4;
        uint8_t entry[4];
        found_entry(w, table, copy, dir[table]);
        dir[table] = regular_place(w, table, copy);
        put_le32(entry, dir[table]);
        if (vmdk_fixing(w)) {
            w->changed = true;
            e->tables_at = 0; /* that was learned from the damaged ones */
            r = dr_file_pwrite(w->f, entry, at, sizeof(entry), err);
        }
        vmdk_count(w, vmdk_fixing(w) && r == 0);
    }
    return r;
}

/* Both directories' entries of a table. What cannot be is 0 afterwards, in memory. */
static int check_entries(struct vmdk_walk *w, uint64_t table, struct dr_error *err)
{
    struct vmdk_extent *e = w->e;
    bool lent = false, stands;
    int r = stands_regularly(w, table, &stands, err);
    if (r == 0 && stands)
        return lead_back(w, table, err);
    if (r == 0)
        r = check_entry(w, table, false, &lent, err);
    if (r == 0 && e->rgd && !lent)
        r = check_entry(w, table, true, &lent, err);
    if (lent && e->rgd) {
        e->gd[table] = e->rgd[table];
        e->rgd[table] = 0;
    }
    if (e->gd[table] == 0 && table < vmdk_tables_used(e))
        w->orphaned += e->h.gtes;
    return r;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Two entries that share a table. */
static int check_overlap(struct vmdk_walk *w, struct dr_error *err)
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
        vmdk_say_of(w, "two grain tables overlap at sector %u", all[i]);
        vmdk_count(w, false);
    }
    return 0;
}

static bool holds_directory(const struct vmdk_header *h, uint64_t gte, uint64_t directory)
{
    return gte < directory + h->gd_sectors && directory < gte + h->grain;
}

/* Has the table a grain in which a directory stands? */
static int table_holds_directory(struct vmdk_walk *w, uint64_t table, uint32_t gde, bool *holds,
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
static int check_places(struct vmdk_walk *w, struct dr_error *err)
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
        vmdk_say_of(w, "the header says that a grain directory stands where a grain is");
        vmdk_count(w, false);
        w->fix = 0;
    }
    return r;
}

static int check_directories(struct vmdk_walk *w, struct dr_error *err)
{
    int r = 0;
    w->odd = has_odd_tables(w);
    w->regular = all_regular(w);
    for (uint64_t t = 0; r == 0 && t < w->e->h.n_tables; t++)
        r = check_entries(w, t, err);
    tell_entries(w, false);
    tell_entries(w, true);
    return r < 0 ? r : check_overlap(w, err);
}

/* ------------------------------------------------------------------ leaks */

struct leaks {
    bool fix;
    uint64_t found; /* grains */
    uint64_t units; /* in a grain */
};

/* A grain that a damaged entry should lead to looks like a leak, too. */
static void tell_leak(struct vmdk_walk *w, const struct leaks *l, uint64_t grains, uint64_t at)
{
    vmdk_say_of(w, "%" PRIu64 " grains at byte %" PRIu64 " belong to nothing%s", grains, at,
                w->damaged ? " that is intact" : "");
    *(l->fix ? &w->result->leaks_fixed : &w->result->leaks) += grains;
}

/* Give back [at, at + len), or cut the file there. Behind its end nothing stands: of a block that
 * it ends in, no part can be punched. */
static int give_back(struct vmdk_walk *w, uint64_t at, uint64_t len, struct dr_error *err)
{
    w->changed = true;
    return at + len < dr_file_size(w->f) ? dr_file_zero(w->f, at, len, DR_FILE_ZERO_PUNCH, err)
                                         : vmdk_cut(w->image, w->e, at / VMDK_SECTOR, err);
}

/* Units [first, last) are used by nothing. A hole in the file is no leak. tell: else only count. */
static int check_leak(struct vmdk_walk *w, struct leaks *l, uint64_t first, uint64_t last,
                      bool tell, struct dr_error *err)
{
    const uint64_t unit = w->unit * VMDK_SECTOR, grain = w->e->grain;
    int r = 0;
    for (uint64_t at = first * unit, end = last * unit, run; r == 0 && at < end; at += run) {
        enum dr_file_extent kind;
        r = dr_file_extent(w->f, at, end - at, &kind, &run, err);
        if (r < 0)
            return r;
        if (kind == DR_FILE_HOLE && at + run < end)
            run = dr_round_down(run, grain);
        if (kind == DR_FILE_HOLE && run > 0)
            continue;
        run = dr_min(dr_round_up(dr_max(run, 1), grain), end - at); /* it may begin with a hole */
        uint64_t grains = run / grain; /* less is what lies between grains at odd places */
        l->found += grains;
        if (!tell || grains == 0)
            continue;
        tell_leak(w, l, grains, at);
        if (l->fix)
            r = give_back(w, at, grains * grain, err);
    }
    return r;
}

static void use_sectors(struct vmdk_walk *w, uint64_t first, uint64_t n)
{
    for (uint64_t i = first / w->unit; i * w->unit < first + n && i < w->n_used; i++)
        w->used[i / 8] |= (uint8_t)(1u << i % 8);
}

/* Metadata that stands among the grains is no leak: tables after a repair; some programs put the
 * directory there. */
static void use_metadata(struct vmdk_walk *w)
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

static int walk_leaks(struct vmdk_walk *w, struct leaks *l, bool tell, struct dr_error *err)
{
    int r = 0;
    for (uint64_t i = dr_div_up(w->e->h.overhead, w->unit), last; r == 0 && i < w->n_used;
         i = last + 1) {
        for (last = i; last < w->n_used && !vmdk_is_used(w, last);)
            last++;
        if (last > i)
            r = check_leak(w, l, i, last, tell, err);
    }
    return r;
}

/* Not more than damaged entries have lost are no leaks, but theirs. */
static int check_leaks(struct vmdk_walk *w, struct dr_error *err)
{
    struct leaks l = {.fix = (w->fix & DR_CHECK_FIX_LEAKS) && w->e->access == VMDK_RW &&
                             !w->damaged};
    use_metadata(w);
    if (w->orphaned) {
        int r = walk_leaks(w, &l, false, err);
        if (r < 0 || l.found <= w->orphaned)
            return r;
    }
    return walk_leaks(w, &l, true, err);
}

/* ------------------------------------------------------------------ all together */

/* No damage by itself: the tables tell. */
static int check_state(struct vmdk_walk *w, struct dr_error *err)
{
    if (!w->e->h.unclean)
        return 0;
    vmdk_say_of(w, "was not closed cleanly%s",
                w->fix ? "" : " (opening it for writing recovers it)");
    if (!vmdk_fixing(w))
        return 0;
    int r = vmdk_mark(w->image, w->e, false, false, err);
    w->changed = true;
    return r;
}

static int walk_extent(struct vmdk_walk *w, struct dr_error *err)
{
    int r = check_places(w, err);
    if (r == 0)
        r = check_directories(w, err);
    if (r == 0)
        r = vmdk_mark_tables(w, err);
    if (r == 0)
        r = vmdk_check_tables(w, err);
    if (r == 0)
        r = check_leaks(w, err);
    if (r == 0 && w->changed) /* the mark goes last */
        r = dr_file_flush(w->f, err);
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
    struct vmdk_walk w = {
        .image = image, .e = e, .f = f, .path = f->path, .fix = fix, .result = result};
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = walk_extent(&w, err);
    vmdk_drop_directories(e);
    vmdk_walk_free(&w);
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
    int r = fix ? vmdk_finish_redo(image, err) : 0;
    if (r == 0 && image->unclean && fix == DR_CHECK_FIX_LEAKS) /* what a crash left is not asked */
        r = vmdk_recover(image, err);
    if (r == 0)
        r = vmdk_check_text(image, fix, result, err);
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
