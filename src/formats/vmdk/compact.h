/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of a sparse extent. The file is looked at in slots, as long as a grain each. The
 * driver reads all tables and chooses the slot `end` where the file can end: as many slots are free
 * before it as grains and tables have to be moved behind it.
 *
 *     before:  H d d . d . . d T d . d T      d grains, T tables, . free
 *     after:   H d d d d T d d T|             end = the number of slots in use
 *
 * A table takes several slots, or several tables fit into one. Tables behind the end get windows
 * before it, which grains leave and no grain is put into, and follow last of all
 * (compact-tables.c). Where there are not enough windows, the lowest of these tables stay, and the
 * file does not end before them.
 *
 * A hosted extent whose directories stand behind the overhead has its tables in a row with these,
 * where a growing disk has put them. They move as a whole into one window: the grains there give
 * way, the tables are written there, the header switches, and then compaction begins again, with
 * the tables at their new place. */
#ifndef DR_FORMATS_VMDK_COMPACT_H
#define DR_FORMATS_VMDK_COMPACT_H

#include "formats/vmdk/cowd.h"

/* Numbers of slots, but for what says sectors. Under image->lock once begin has returned. */
struct vmdk_compact {
    uint64_t origin; /* the sector where slot 0 begins */
    uint64_t slots;  /* of the file */
    uint8_t *taken;  /* a bit a slot: something stands there, or did */
    uint8_t *kept;   /* a bit a slot: it belongs to a window */
    uint64_t used;   /* taken by grains, and by metadata that does not move */
    uint64_t low;    /* the directories and what else does not move end here */
    uint64_t stays;  /* the file cannot end before this one */
    uint64_t end;
    uint64_t cursor; /* those before it are taken, or kept */

    /* Tables that can move, redundant ones among them: their sectors, ascending. The first
     * n_staying stay. own[i]: how many slots the first i have to themselves; gaps[i]: how many
     * windows fit in front of the i-th. */
    uint32_t *tables, *own, *gaps;
    size_t n_tables, n_staying;
    uint32_t width, tables_each; /* of a window: slots; tables that fit */
    uint64_t *windows;           /* where they begin */
    size_t n_windows;

    /* Directories and tables that can only move together: they stand in [row_from, row_end), have
     * row_own slots there to themselves, and need row_slots. moves_row: they do move, to `to`. */
    bool has_row, moves_row;
    uint64_t row_from, row_end, row_own, row_slots, to;

    bool again; /* only tables move, and what they leave is of use: all of it is to be done again */
};

static inline bool vmdk_slot_is(const uint8_t *bits, uint64_t slot)
{
    return bits[slot / 8] >> slot % 8 & 1;
}

static inline void vmdk_slot_set(uint8_t *bits, uint64_t slot)
{
    bits[slot / 8] |= (uint8_t)(1u << slot % 8);
}

/* The slots of [sector, sector + sectors): the first of them, and the one behind them. */
static inline uint64_t vmdk_slot_of(const struct vmdk_compact *c, const struct vmdk_extent *e,
                                    uint64_t sector)
{
    return sector > c->origin ? (sector - c->origin) / e->h.grain : 0;
}
static inline uint64_t vmdk_slots_end(const struct vmdk_compact *c, const struct vmdk_extent *e,
                                      uint64_t end)
{
    return end > c->origin ? dr_div_up(end - c->origin, e->h.grain) : 0;
}
static inline uint64_t vmdk_slot_sector(const struct vmdk_compact *c, const struct vmdk_extent *e,
                                        uint64_t slot)
{
    return c->origin + slot * e->h.grain;
}

/* compact.c */

/* Nothing is noted yet. NULL: the file has too many slots, or -ENOMEM. */
int vmdk_compact_new(const struct dr_image *image, const struct vmdk_extent *e,
                     struct vmdk_compact **c, struct dr_error *err);
/* Read all tables and note what stands where. Others may write meanwhile, if c is e->compact: what
 * they use was not free when begin had returned, or lies behind the file's end as it was. */
int vmdk_compact_note(struct dr_image *image, struct vmdk_extent *e, struct vmdk_compact *c,
                      struct dr_error *err);
void vmdk_compact_free(struct vmdk_compact *c);

/* compact-end.c; no I/O */

/* Fill in own and gaps. */
void vmdk_compact_count(struct vmdk_compact *c, const struct vmdk_extent *e);
/* Where the file can end at last, so many tables staying where they are; *row: the row moves. */
uint64_t vmdk_compact_end_at(const struct vmdk_compact *c, const struct vmdk_extent *e,
                             size_t *staying, bool *row);
/* Choose the end, and the windows. -ENOMEM. */
int vmdk_compact_choose(struct vmdk_compact *c, const struct vmdk_extent *e);

/* compact-tables.c; nobody writes, no lock is held */
int vmdk_compact_move_tables(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);

#endif
