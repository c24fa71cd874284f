/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Grain tables: what their entries say, and what the redundant copies say to that.
 *
 * A first pass notes which places of the file the entries lead to. Then each table is compared with
 * its copy. The table is what every reader uses, so the copy follows it, with two exceptions:
 *
 *   an entry that cannot be, or leads where another one leads: the copy's entry is the answer if it
 *     leads to a place that nothing else claims. That it says "no grain" counts only if the copy is
 *     right about the rest of the table;
 *   an entry of 0 in an image that was closed, where the copy has a grain that nothing claims. Both
 *     are written together, so nothing but damage empties one of them.
 *
 * All other damage stays as it is: a guess could destroy what another repair may bring back. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/check.h"

#define MAX_UNITS (UINT64_C(1) << 33) /* bits of the map of used places: 1 GiB */
#define REACH     8u

/* ------------------------------------------------------------------ what an entry says */

/* Does a grain at the sector lie on metadata? */
static bool on_metadata(const struct vmdk_walk *w, uint64_t sector)
{
    size_t lo = 0, hi = w->n_areas;
    if (sector < w->e->h.overhead)
        return true;
    while (lo < hi) { /* the first area that ends behind it */
        size_t mid = lo + (hi - lo) / 2;
        if (w->areas[mid].end <= sector)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < w->n_areas && w->areas[lo].first < sector + w->e->h.grain;
}

static enum vmdk_entry classify(const struct vmdk_walk *w, uint64_t grain, uint32_t gte)
{
    if (gte == 0)
        return VMDK_ENTRY_HOLE;
    if (gte == 1)
        return vmdk_has_zero_grains(w->e) ? VMDK_ENTRY_ZERO : VMDK_ENTRY_BAD_ZERO;
    if (on_metadata(w, gte))
        return VMDK_ENTRY_METADATA;
    return vmdk_gte_fits(w->image, w->e, grain, gte) ? VMDK_ENTRY_DATA : VMDK_ENTRY_BEYOND;
}

/* Is something of the grain's place set in the map? */
static bool in_map(const struct vmdk_walk *w, const uint8_t *map, uint32_t gte)
{
    for (uint64_t i = gte / w->unit, n = w->e->h.grain / w->unit; n > 0 && i < w->n_used; i++, n--)
        if (map[i / 8] >> i % 8 & 1)
            return true;
    return false;
}

static void set_map(const struct vmdk_walk *w, uint8_t *map, uint32_t gte, bool set)
{
    for (uint64_t i = gte / w->unit, n = w->e->h.grain / w->unit; n > 0 && i < w->n_used; i++, n--)
        if (set)
            map[i / 8] |= (uint8_t)(1u << i % 8);
        else
            map[i / 8] &= (uint8_t) ~(1u << i % 8);
}

/* ------------------------------------------------------------------ the first pass */

static int by_first(const void *a, const void *b)
{
    const struct vmdk_area *x = a, *y = b;
    return x->first < y->first ? -1 : x->first > y->first;
}

static void add_area(struct vmdk_walk *w, uint64_t first, uint64_t n)
{
    if (first + n > w->e->h.overhead)
        w->areas[w->n_areas++] = (struct vmdk_area){first, first + n};
}

/* Metadata behind the overhead: of a disk that grew, of one that was repaired, of some programs.
 * Redundant tables do not count: nobody reads them, so it is they that are wrong. */
static int collect_areas(struct vmdk_walk *w, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    size_t n = 0;
    w->areas = malloc(((size_t)e->h.n_tables + 2) * sizeof(*w->areas));
    if (!w->areas)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    add_area(w, e->h.gd_off, e->h.gd_sectors);
    if (e->h.desc_off)
        add_area(w, e->h.desc_off, e->h.desc_len);
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        if (vmdk_table_fits(w->image, e, e->gd[t]))
            add_area(w, e->gd[t], e->h.gt_sectors);
    qsort(w->areas, w->n_areas, sizeof(*w->areas), by_first);
    for (size_t i = 0; i < w->n_areas; i++) /* those that overlap become one */
        if (n > 0 && w->areas[i].first <= w->areas[n - 1].end)
            w->areas[n - 1].end = dr_max(w->areas[n - 1].end, w->areas[i].end);
        else
            w->areas[n++] = w->areas[i];
    w->n_areas = n;
    return 0;
}

static int note_entry(struct vmdk_walk *w, uint64_t grain, uint32_t gte, struct dr_error *err)
{
    enum vmdk_entry says = classify(w, grain, gte);
    uint64_t table = grain / w->e->h.gtes;
    if (says == VMDK_ENTRY_DATA) {
        w->places |= gte;
        if (in_map(w, w->used, gte)) {
            set_map(w, w->twice, gte, true);
            w->n_twice++;
        }
        set_map(w, w->used, gte, true);
    } else if (says > VMDK_ENTRY_DATA) {
        w->suspect[table / 8] |= (uint8_t)(1u << table % 8);
    }
    return says == VMDK_ENTRY_BEYOND
               ? vmdk_beyond_add(&w->beyond, w->e, dr_file_size(w->f), gte, err)
               : 0;
}

/* The number of entries of the table that the disk has. */
static uint32_t entries_used(const struct vmdk_walk *w, uint64_t table)
{
    uint64_t grains = dr_div_up(w->e->len, w->e->grain), first = table * w->e->h.gtes;
    return (uint32_t)dr_min(w->e->h.gtes, grains > first ? grains - first : 0);
}

static int note_table(struct vmdk_walk *w, uint64_t table, const uint8_t *bytes,
                      struct dr_error *err)
{
    uint32_t n = entries_used(w, table);
    int r = 0;
    for (uint32_t i = 0; r == 0 && i < n; i++)
        if (get_le32(bytes + i * 4))
            r = note_entry(w, table * w->e->h.gtes + i, get_le32(bytes + i * 4), err);
    return r;
}

static int use_noted(struct vmdk_walk *w, uint64_t table, uint8_t *bytes, uint8_t *copy,
                     struct dr_error *err)
{
    (void)copy;
    return bytes ? note_table(w, table, bytes, err) : 0;
}

static int note_tables(struct vmdk_walk *w, struct dr_error *err)
{
    return vmdk_read_tables(w, false, use_noted, err);
}

static int make_maps(struct vmdk_walk *w, uint64_t unit, struct dr_error *err)
{
    free(w->used);
    free(w->twice);
    w->used = w->twice = NULL;
    w->unit = unit;
    w->n_twice = 0;
    w->n_used = dr_div_up(dr_min(dr_file_size(w->f), UINT64_C(1) << 41), unit * VMDK_SECTOR);
    if (w->n_used > MAX_UNITS)
        return dr_fail(err, EFBIG, "%s: too many grains to check", w->path);
    w->used = calloc(1, (size_t)(w->n_used / 8 + 1));
    w->twice = calloc(1, (size_t)(w->n_used / 8 + 1));
    if (!w->used || !w->twice)
        return dr_fail_errno(err, ENOMEM, "%s: %" PRIu64 " grains to check", w->path, w->n_used);
    return 0;
}

int vmdk_mark_tables(struct vmdk_walk *w, struct dr_error *err)
{
    w->suspect = calloc(1, (size_t)(w->e->h.n_tables / 8 + 1));
    if (!w->suspect)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    int r = collect_areas(w, err);
    if (r == 0)
        r = make_maps(w, w->e->h.grain, err);
    if (r == 0)
        r = note_tables(w, err);
    uint64_t aligned = w->places & (~w->places + 1); /* all places are multiples of this */
    if (r == 0 && w->places && aligned < w->unit) {
        r = make_maps(w, aligned, err);
        if (r == 0)
            r = note_tables(w, err);
    }
    vmdk_beyond_end(&w->beyond, REACH);
    return r;
}

void vmdk_walk_free(struct vmdk_walk *w)
{
    dr_ahead_free(w->ahead);
    free(w->used);
    free(w->twice);
    free(w->seen);
    free(w->suspect);
    free(w->areas);
    free(w->beyond.bits);
}

/* ------------------------------------------------------------------ findings */

static const char *const texts[] = {
    [VMDK_FOUND_ZERO] = "which cannot be: this extent has no zeroed grains",
    [VMDK_FOUND_METADATA] = "which cannot be: metadata stands there",
    [VMDK_FOUND_BEYOND] = "which cannot be: the file ends before that",
    [VMDK_FOUND_TWICE] = "which belongs to another one too",
    [VMDK_FOUND_ODD] = "which is not aligned to the size of a grain; it can be read",
    [VMDK_FOUND_GONE] = "though only in the redundant table: the table itself has no entry",
};

static void tell_grains(struct vmdk_walk *w)
{
    const struct vmdk_findings *f = &w->findings;
    uint64_t start = w->e->start + f->first * w->e->grain;
    uint64_t end = w->e->start + dr_min((f->first + f->n) * w->e->grain, w->e->len);
    char sectors[40];
    if (f->n == 0)
        return;
    snprintf(sectors, sizeof(sectors), f->low == f->high ? "sector %u" : "sectors %u to %u", f->low,
             f->high);
    if (f->n == 1)
        vmdk_say_of(w, "the entry for guest offset %" PRIu64 " says %s, %s", start, sectors,
                    texts[f->what]);
    else
        vmdk_say_of(w,
                    "%" PRIu64 " entries for guest offsets %" PRIu64 " to %" PRIu64 " say %s, %s",
                    f->n, start, end - 1, sectors, texts[f->what]);
}

static void tell_tables(struct vmdk_walk *w)
{
    const struct vmdk_findings *f = &w->tables;
    const char *unclean = w->e->h.unclean ? ", as they may when it was not closed" : "";
    if (f->n == 1)
        vmdk_say_of(w, "grain table %" PRIu64 " and its redundant copy differ%s", f->first,
                    unclean);
    else if (f->n > 1)
        vmdk_say_of(w,
                    "grain tables %" PRIu64 " to %" PRIu64 " and their redundant copies differ%s",
                    f->first, f->first + f->n - 1, unclean);
}

static void found(struct vmdk_walk *w, enum vmdk_finding what, uint64_t grain, uint32_t gte)
{
    struct vmdk_findings *f = &w->findings;
    if (f->what == what && f->first + f->n == grain) {
        f->n++;
        f->low = (uint32_t)dr_min(f->low, gte);
        f->high = (uint32_t)dr_max(f->high, gte);
        return;
    }
    tell_grains(w);
    *f = (struct vmdk_findings){what, grain, 1, gte, gte};
}

static void found_table(struct vmdk_walk *w, uint64_t table)
{
    struct vmdk_findings *f = &w->tables;
    if (f->n && f->first + f->n == table) {
        f->n++;
        return;
    }
    tell_tables(w);
    *f = (struct vmdk_findings){VMDK_FOUND_DIFFER, table, 1, 0, 0};
}

/* One line for all that was behind the end. Scripts look for the first words. */
static void tell_cut(struct vmdk_walk *w)
{
    if (w->cut)
        vmdk_say_of(w,
                    "File truncated, expecting at least %" PRIu64 " bytes: it has %" PRIu64
                    ", and %" PRIu64 " grains are lost",
                    w->cut_end, dr_file_size(w->f), w->cut);
}

/* ------------------------------------------------------------------ one table */

struct table {
    uint64_t number;
    uint32_t n;           /* entries that the disk has */
    uint8_t *buf, *copy;  /* copy NULL: there is none that can be used */
    bool trusted;         /* the copy agrees wherever the table is right */
    bool edited, differs; /* buf, or the two of them apart from that */
};

static bool is_twice(const struct vmdk_walk *w, enum vmdk_entry says, uint32_t gte)
{
    return says == VMDK_ENTRY_DATA && w->n_twice && in_map(w, w->twice, gte);
}

/* Is what the copy says a grain that nothing else claims? */
static bool is_free_grain(const struct vmdk_walk *w, uint64_t grain, uint32_t gte)
{
    return classify(w, grain, gte) == VMDK_ENTRY_DATA && gte % w->unit == 0 &&
           !in_map(w, w->used, gte);
}

static bool trust_copy(const struct vmdk_walk *w, const struct table *t)
{
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t gte = get_le32(t->buf + i * 4), other = get_le32(t->copy + i * 4);
        enum vmdk_entry says = classify(w, t->number * w->e->h.gtes + i, gte);
        if (gte != other && says <= VMDK_ENTRY_DATA && !is_twice(w, says, gte))
            return false;
    }
    return true;
}

/* The copy has the answer to what the entry should say. */
static bool has_answer(const struct vmdk_walk *w, const struct table *t, uint64_t grain,
                       uint32_t gte, uint32_t other)
{
    if (!t->copy || gte == other)
        return false;
    if (is_free_grain(w, grain, other))
        return true;
    return t->trusted && classify(w, grain, other) <= VMDK_ENTRY_ZERO;
}

static void take_answer(struct vmdk_walk *w, struct table *t, uint32_t i, uint32_t other)
{
    if (other > 1)
        set_map(w, w->used, other, true);
    if (!vmdk_fixing(w))
        return;
    put_le32(t->buf + i * 4, other);
    t->edited = true;
}

static enum vmdk_finding what_is_wrong(enum vmdk_entry says)
{
    switch (says) {
    case VMDK_ENTRY_BAD_ZERO:
        return VMDK_FOUND_ZERO;
    case VMDK_ENTRY_METADATA:
        return VMDK_FOUND_METADATA;
    case VMDK_ENTRY_BEYOND:
        return VMDK_FOUND_BEYOND;
    default:
        return VMDK_FOUND_TWICE;
    }
}

static void lost_with_the_end(struct vmdk_walk *w, uint64_t grain, uint32_t gte)
{
    w->cut++;
    set_map(w, w->used, gte, true); /* a part of it may be there */
    w->cut_end = dr_max(w->cut_end, (uint64_t)gte * VMDK_SECTOR + vmdk_grain_len(w->e, grain));
    vmdk_count(w, false);
}

/* An entry that cannot be, or of which there are two. */
static void check_bad(struct vmdk_walk *w, struct table *t, uint32_t i, enum vmdk_entry says)
{
    uint64_t grain = t->number * w->e->h.gtes + i;
    uint32_t gte = get_le32(t->buf + i * 4), other = t->copy ? get_le32(t->copy + i * 4) : 0;
    bool answer = has_answer(w, t, grain, gte, other);
    if (says == VMDK_ENTRY_BEYOND && !answer && vmdk_beyond_is_cut(&w->beyond, gte)) {
        lost_with_the_end(w, grain, gte);
        return;
    }
    found(w, what_is_wrong(says), grain, gte);
    vmdk_count(w, answer && vmdk_fixing(w));
    w->orphaned += !answer;
    if (says == VMDK_ENTRY_DATA && answer && !in_map(w, w->seen, gte))
        set_map(w, w->twice, gte, false); /* the other one is right */
    if (answer)
        take_answer(w, t, i, other);
}

/* The table is right, and the copy says something else. */
static void check_other(struct vmdk_walk *w, struct table *t, uint32_t i)
{
    uint64_t grain = t->number * w->e->h.gtes + i;
    uint32_t gte = get_le32(t->buf + i * 4), other = get_le32(t->copy + i * 4);
    if (gte != 0 || w->e->h.unclean || !is_free_grain(w, grain, other) ||
        other % w->e->h.grain != 0) {
        t->differs = true;
        return;
    }
    found(w, VMDK_FOUND_GONE, grain, other);
    vmdk_count(w, vmdk_fixing(w));
    take_answer(w, t, i, other);
}

/* Two entries lead to one place. The second is told, and mended, unless the copy knows better than
 * the first. */
static bool is_first_of_two(struct vmdk_walk *w, const struct table *t, uint64_t grain, uint32_t i)
{
    uint32_t gte = get_le32(t->buf + i * 4);
    if ((t->copy && has_answer(w, t, grain, gte, get_le32(t->copy + i * 4))) ||
        in_map(w, w->seen, gte))
        return false;
    set_map(w, w->seen, gte, true);
    return true;
}

static void check_entries(struct vmdk_walk *w, struct table *t)
{
    t->trusted = t->copy && trust_copy(w, t);
    for (uint32_t i = 0; i < t->n; i++) {
        uint64_t grain = t->number * w->e->h.gtes + i;
        uint32_t gte = get_le32(t->buf + i * 4);
        enum vmdk_entry says = classify(w, grain, gte);
        bool twice = is_twice(w, says, gte) && !is_first_of_two(w, t, grain, i);
        if (says > VMDK_ENTRY_DATA || twice) {
            check_bad(w, t, i, says);
            continue;
        }
        if (says == VMDK_ENTRY_DATA && gte % w->e->h.grain)
            found(w, VMDK_FOUND_ODD, grain, gte);
        if (t->copy && get_le32(t->copy + i * 4) != gte)
            check_other(w, t, i);
    }
}

/* Entries behind the end of the extent: a shrinking that was interrupted leaves them. Nobody reads
 * them, so they are lost space and no damage. Tables that nobody uses may hold anything. */
static void check_behind(struct vmdk_walk *w, struct table *t)
{
    bool fix = (w->fix & DR_CHECK_FIX_LEAKS) && w->e->access == VMDK_RW;
    uint32_t n = 0;
    for (uint32_t i = t->n; i < w->e->h.gtes; i++)
        n += get_le32(t->buf + i * 4) != 0;
    if (n == 0)
        return;
    vmdk_say_of(w, "%u entries of grain table %" PRIu64 " are behind the end of the extent", n,
                t->number);
    *(fix ? &w->result->leaks_fixed : &w->result->leaks) += n;
    if (fix)
        memset(t->buf + t->n * 4, 0, (w->e->h.gtes - t->n) * 4);
    t->edited |= fix;
}

/* The copy says what the table says. Where the table stays damaged, both stay as they are. */
static void follow(const struct vmdk_walk *w, const struct table *t)
{
    for (uint32_t i = vmdk_fixing(w) ? 0 : t->n; i < w->e->h.gtes; i++) {
        uint32_t gte = get_le32(t->buf + i * 4);
        if (i >= t->n || classify(w, t->number * w->e->h.gtes + i, gte) <= VMDK_ENTRY_DATA)
            put_le32(t->copy + i * 4, gte);
    }
}

static int store(struct vmdk_walk *w, const struct table *t, struct dr_error *err)
{
    bool leaks = (w->fix & DR_CHECK_FIX_LEAKS) && w->e->access == VMDK_RW;
    int r = 0;
    if (!(leaks && t->edited) && !(vmdk_fixing(w) && t->differs))
        return 0;
    if (t->copy) {
        follow(w, t);
        r = vmdk_write_table(w, w->e->rgd[t->number], t->copy, err);
    }
    return r == 0 && t->edited ? vmdk_write_table(w, w->e->gd[t->number], t->buf, err) : r;
}

/* After a crash that is no damage: opening for writing copies the one over the other. */
static void count_difference(struct vmdk_walk *w, const struct table *t)
{
    if (!t->differs)
        return;
    found_table(w, t->number);
    if (!w->e->h.unclean || vmdk_fixing(w))
        vmdk_count(w, vmdk_fixing(w));
}

static bool is_suspect(const struct vmdk_walk *w, uint64_t table)
{
    return (w->suspect[table / 8] >> table % 8 & 1) || w->n_twice || w->unit < w->e->h.grain;
}

/* A wrong bit in the redundant directory, which nobody reads, and what is written there is some
 * grain's. */
static bool stands_in_a_grain(const struct vmdk_walk *w, uint32_t sector)
{
    const struct vmdk_header *h = &w->e->h;
    if (sector + h->gt_sectors <= h->overhead)
        return false; /* grains are behind it, though perhaps not at multiples of their size */
    for (uint64_t i = sector / w->unit; i * w->unit < sector + h->gt_sectors && i < w->n_used; i++)
        if (vmdk_is_used(w, i))
            return true;
    return false;
}

static int move_copy(struct vmdk_walk *w, uint64_t table, struct dr_error *err)
{
    uint8_t primary[VMDK_GTES * 4];
    bool hole;
    vmdk_say_of(w, "redundant grain table %" PRIu64 " at sector %u stands in a grain", table,
                w->e->rgd[table]);
    int r = vmdk_read_table(w->image, w->e, w->e->gd[table], primary, &hole, err);
    if (r == 0 && vmdk_fixing(w))
        r = vmdk_new_table(w, table, true, primary, err);
    vmdk_count(w, vmdk_fixing(w) && r == 0);
    return r;
}

/* bytes, copy: NULL where they are holes; a copy is given only where one can be used. */
static int check_bytes(struct vmdk_walk *w, uint64_t number, uint8_t *bytes, uint8_t *copy,
                       struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    struct table t = {.number = number, .n = entries_used(w, number), .buf = bytes, .copy = copy};
    if (is_suspect(w, number) || (copy && memcmp(bytes, copy, (size_t)t.n * 4) != 0))
        check_entries(w, &t);
    if (t.n < e->h.gtes)
        check_behind(w, &t);
    count_difference(w, &t);
    return store(w, &t, err);
}

/* A table that was read ahead; nothing is written. */
static int use_checked(struct vmdk_walk *w, uint64_t number, uint8_t *bytes, uint8_t *copy,
                       struct dr_error *err)
{
    static const uint8_t zeros[VMDK_GTES * 4];
    uint8_t none[2][VMDK_GTES * 4];
    bool has_copy = vmdk_has_copy(w, number);
    if (has_copy && stands_in_a_grain(w, w->e->rgd[number])) {
        int r = move_copy(w, number, err);
        if (r < 0)
            return r;
        has_copy = false;
    }
    if (!bytes && (!has_copy || !copy))
        return 0;
    if (!bytes)
        bytes = memcpy(none[0], zeros, sizeof(zeros));
    if (has_copy && !copy)
        copy = memcpy(none[1], zeros, sizeof(zeros));
    return check_bytes(w, number, bytes, has_copy ? copy : NULL, err);
}

/* One that may be written to, and so may others. */
static int check_table(struct vmdk_walk *w, uint64_t number, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t buf[VMDK_GTES * 4], copy[VMDK_GTES * 4];
    bool hole, copy_hole = true;
    if (!vmdk_table_fits(w->image, e, e->gd[number]))
        return 0;
    bool has_copy = vmdk_has_copy(w, number);
    if (has_copy && stands_in_a_grain(w, e->rgd[number])) {
        int r = move_copy(w, number, err);
        if (r < 0)
            return r;
        has_copy = vmdk_fixing(w);
    }
    int r = vmdk_read_table(w->image, e, e->gd[number], buf, &hole, err);
    if (r == 0 && has_copy)
        r = vmdk_read_table(w->image, e, e->rgd[number], copy, &copy_hole, err);
    if (r < 0 || (hole && copy_hole))
        return r;
    return check_bytes(w, number, buf, has_copy ? copy : NULL, err);
}

static int check_all(struct vmdk_walk *w, struct dr_error *err)
{
    int r = 0;
    if (!w->fix)
        return vmdk_read_tables(w, true, use_checked, err);
    for (uint64_t t = 0; r == 0 && t < vmdk_tables_used(w->e); t++)
        r = check_table(w, t, err);
    return r;
}

int vmdk_check_tables(struct vmdk_walk *w, struct dr_error *err)
{
    w->seen = w->n_twice ? calloc(1, (size_t)(w->n_used / 8 + 1)) : NULL;
    if (w->n_twice && !w->seen)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    int r = check_all(w, err);
    tell_grains(w);
    tell_tables(w);
    tell_cut(w);
    return r;
}
