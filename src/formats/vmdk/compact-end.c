/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where the file can end, and the windows for tables: no I/O. Grains fit into any slot, so only
 * their number counts; of tables it also counts whether there are windows for them. Every slot that
 * neither a table nor fixed metadata has may become part of one, free or not: grains give way. */
#include "formats/vmdk/compact.h"

#include <stdlib.h>

static uint64_t table_first(const struct vmdk_compact *c, const struct vmdk_extent *e, size_t i)
{
    return vmdk_slot_of(c, e, c->tables[i]);
}

static uint64_t table_end(const struct vmdk_compact *c, const struct vmdk_extent *e, size_t i)
{
    return vmdk_slots_end(c, e, c->tables[i] + e->h.gt_sectors);
}

static uint64_t fitting(const struct vmdk_compact *c, uint64_t from, uint64_t to)
{
    return to > from ? (to - from) / c->width : 0;
}

void vmdk_compact_count(struct vmdk_compact *c, const struct vmdk_extent *e)
{
    uint64_t last = 0, gap = c->low;
    for (size_t i = 0; i < c->n_tables; i++) {
        uint64_t first = table_first(c, e, i), end = table_end(c, e, i);
        c->gaps[i] = (uint32_t)((i ? c->gaps[i - 1] : 0) + fitting(c, gap, first));
        c->own[i + 1] = c->own[i];
        for (uint64_t slot = dr_max(first, last); slot < dr_min(end, c->slots); slot++)
            c->own[i + 1] += !vmdk_slot_is(c->taken, slot);
        last = end;
        gap = dr_max(c->low, end);
    }
}

/* How many windows fit before the slot `end`. */
static uint64_t windows_before(const struct vmdk_compact *c, const struct vmdk_extent *e,
                               uint64_t end)
{
    size_t lo = 0, hi = c->n_tables;
    while (lo < hi) { /* the first table that begins behind the end */
        size_t mid = lo + (hi - lo) / 2;
        if (table_first(c, e, mid) < end)
            lo = mid + 1;
        else
            hi = mid;
    }
    uint64_t from = lo ? dr_max(c->low, table_end(c, e, lo - 1)) : c->low;
    return (lo ? c->gaps[lo - 1] : 0) + fitting(c, from, dr_min(end, c->slots));
}

static uint64_t windows_needed(const struct vmdk_compact *c, size_t staying)
{
    return dr_div_up(c->n_tables - staying, c->tables_each);
}

/* The more tables move, the shorter the file can be, as far as there are windows for them. These
 * are full before what the tables leave is free: as many slots must be free now. */
static uint64_t end_of_tables(const struct vmdk_compact *c, const struct vmdk_extent *e,
                              size_t *staying)
{
    uint64_t best = UINT64_MAX, free = c->slots - dr_min(c->slots, c->used + c->own[c->n_tables]);
    for (size_t i = 0; i <= c->n_tables; i++) {
        uint64_t need = windows_needed(c, i);
        uint64_t end = dr_max(c->used + c->own[i] + need * c->width, c->stays);
        end = dr_max(end, i ? table_end(c, e, i - 1) : 0);
        if (end > best || need * c->width > free || windows_before(c, e, end) < need)
            continue;
        best = end;
        *staying = i;
    }
    return best;
}

uint64_t vmdk_compact_end_at(const struct vmdk_compact *c, const struct vmdk_extent *e,
                             size_t *staying, bool *row)
{
    *row = false;
    if (!c->has_row)
        return end_of_tables(c, e, staying);
    *staying = 0;
    uint64_t stays = dr_max(dr_max(c->used + c->row_own, c->stays), c->row_end);
    uint64_t goes = dr_max(dr_max(c->used, c->low) + c->row_slots, c->stays);
    uint64_t free = c->slots - dr_min(c->slots, c->used + c->row_own);
    *row = goes < stays && free >= c->row_slots && c->low + c->row_slots <= c->row_from;
    return *row ? goes : stays;
}

/* ------------------------------------------------------------------ windows */

static void keep(struct vmdk_compact *c, uint64_t slot, uint64_t n)
{
    for (uint64_t i = slot; i < slot + n; i++)
        vmdk_slot_set(c->kept, i);
}

static uint64_t count_taken(const struct vmdk_compact *c, uint64_t slot, uint64_t n)
{
    uint64_t taken = 0;
    for (uint64_t i = slot; i < slot + n; i++)
        taken += vmdk_slot_is(c->taken, i);
    return taken;
}

/* Windows in [from, to), as long as some are needed. empty: only those that nothing stands in. */
static void keep_windows(struct vmdk_compact *c, uint64_t from, uint64_t to, size_t needed,
                         bool empty)
{
    for (uint64_t at = from; c->n_windows < needed && at + c->width <= to; at += c->width)
        if (!vmdk_slot_is(c->kept, at) && (!empty || count_taken(c, at, c->width) == 0)) {
            keep(c, at, c->width);
            c->windows[c->n_windows++] = at;
        }
}

static void find_windows(struct vmdk_compact *c, const struct vmdk_extent *e, size_t needed)
{
    for (int empty = 1; empty >= 0; empty--) {
        uint64_t from = c->low;
        for (size_t i = 0; i < c->n_tables && from < c->end; i++) {
            keep_windows(c, from, dr_min(table_first(c, e, i), c->end), needed, empty);
            from = dr_max(c->low, table_end(c, e, i));
        }
        keep_windows(c, from, c->end, needed, empty);
    }
}

/* The place where the fewest grains give way, before `end` and before the row as it stands. */
static void find_place_for_row(struct vmdk_compact *c, uint64_t end)
{
    uint64_t last = dr_min(end, c->row_from) - c->row_slots;
    uint64_t taken = count_taken(c, c->low, c->row_slots), least = taken;
    c->to = c->low;
    for (uint64_t at = c->low; at < last && least > 0; at++) {
        taken += vmdk_slot_is(c->taken, at + c->row_slots);
        taken -= vmdk_slot_is(c->taken, at);
        if (taken < least) {
            least = taken;
            c->to = at + 1;
        }
    }
    keep(c, c->to, c->row_slots);
}

int vmdk_compact_choose(struct vmdk_compact *c, const struct vmdk_extent *e)
{
    uint64_t end = vmdk_compact_end_at(c, e, &c->n_staying, &c->moves_row);
    if (c->moves_row) {
        find_place_for_row(c, end);
        c->end = c->slots;
        c->again = true;
        return 0;
    }
    size_t needed = (size_t)windows_needed(c, c->n_staying);
    c->end = end;
    if (needed == 0)
        return 0;
    c->windows = malloc(needed * sizeof(*c->windows));
    if (!c->windows)
        return -ENOMEM;
    find_windows(c, e, needed);
    /* One of them begins before the end, where there is too little room as long as it is there. At
     * first only the windows are cleared then, into any place that is free. */
    c->again = table_first(c, e, c->n_staying) < end;
    if (c->again)
        c->end = c->slots;
    return 0;
}
