/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of sparse extents: grains near the end of the file move into gaps before it. Nothing
 * on disk says where gaps are, so all tables are read first. Everything was durable when that
 * began; others may write meanwhile, but only behind the end of the file. A place that comes free
 * later is not one of these gaps: the allocator has it (write.c).
 *
 * Programs put grains at the beginnings of slots; one that is put elsewhere takes two. */
#include "formats/vmdk/compact.h"

#include <stdlib.h>

#include "base/cleanup.h"

/* Bits of a hosted extent's slots: 32 MiB. A file with more of them, of tiny grains, is left as it
 * is. COWD has a slot a sector, of which no file has more than these. */
#define MAX_SLOTS      (UINT64_C(1) << 28)
#define MAX_COWD_SLOTS (UINT64_C(1) << 32)

/* ------------------------------------------------------------------ slots */

static void take_slots(struct vmdk_compact *c, const struct vmdk_extent *e, uint64_t sector,
                       uint64_t sectors, bool stays)
{
    uint64_t end = dr_min(c->slots, vmdk_slots_end(c, e, sector + sectors));
    for (uint64_t slot = vmdk_slot_of(c, e, sector); slot < end; slot++) {
        c->used += !vmdk_slot_is(c->taken, slot);
        vmdk_slot_set(c->taken, slot);
    }
    if (stays)
        c->stays = dr_max(c->stays, end);
}

/* Are the sectors to be left: do they reach behind the end, or into a window? */
static bool is_high(const struct vmdk_extent *e, uint64_t sector, uint64_t end)
{
    const struct vmdk_compact *c = e->compact;
    if (!c)
        return false;
    if (end > vmdk_slot_sector(c, e, c->end))
        return true;
    if (c->n_windows == 0 && !c->moves_row)
        return false;
    for (uint64_t slot = vmdk_slot_of(c, e, sector); slot < vmdk_slots_end(c, e, end); slot++)
        if (vmdk_slot_is(c->kept, slot))
            return true;
    return false;
}

static bool is_free(const struct vmdk_compact *c, uint64_t slot)
{
    return !vmdk_slot_is(c->taken, slot) && !vmdk_slot_is(c->kept, slot);
}

uint32_t vmdk_lower_take(struct vmdk_extent *e, uint32_t gte)
{
    struct vmdk_compact *c = e->compact;
    if (!is_high(e, gte, gte + e->h.grain))
        return 0;
    while (c->cursor < c->end && !is_free(c, c->cursor))
        c->cursor++;
    if (c->cursor >= c->end)
        return 0;
    vmdk_slot_set(c->taken, c->cursor);
    return (uint32_t)vmdk_slot_sector(c, e, c->cursor);
}

void vmdk_lower_give_up(struct vmdk_extent *e, uint32_t sector)
{
    struct vmdk_compact *c = e->compact;
    c->cursor = vmdk_slot_of(c, e, sector);
    c->taken[c->cursor / 8] &= (uint8_t) ~(1u << c->cursor % 8);
}

/* Its place comes back to the allocator: it is no gap, even if the tables say so when they are
 * looked at. */
void vmdk_compact_lost(struct vmdk_extent *e, uint32_t sector)
{
    if (e->compact)
        take_slots(e->compact, e, sector, e->h.grain, false);
}

bool vmdk_is_kept(const struct vmdk_extent *e, uint32_t sector)
{
    const struct vmdk_compact *c = e->compact;
    if (!c || (c->n_windows == 0 && !c->moves_row))
        return false;
    for (uint64_t slot = vmdk_slot_of(c, e, sector),
                  end = dr_min(c->slots, vmdk_slots_end(c, e, sector + e->h.grain));
         slot < end; slot++)
        if (vmdk_slot_is(c->kept, slot))
            return true;
    return false;
}

/* ------------------------------------------------------------------ looking at the tables */

/* Its grains, which a repair might find, would be taken for gaps. */
static int refuse_table(const struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                        struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: grain directory entry %llu has no usable table; `drover check -r all` may "
                   "mend it",
                   vmdk_extent_path(image, e), (unsigned long long)table);
}

/* Entries behind the extent's end, which an interrupted shrinking leaves, are out of reach. */
static int take_grains(struct dr_image *image, struct vmdk_extent *e, struct vmdk_compact *c,
                       uint64_t table, uint8_t *buf, struct dr_error *err)
{
    bool hole = true, fits = vmdk_table_fits(image, e, e->gd[table]);
    if (!fits && (e->gd[table] || (e->rgd && e->rgd[table])))
        return refuse_table(image, e, table, err);
    int r = fits ? vmdk_read_table(image, e, e->gd[table], buf, &hole, err) : 0;
    DR_LOCK_SCOPE(&image->lock); /* others may mark what they give up */
    for (uint32_t i = 0; r == 0 && !hole && i < e->h.gtes; i++) {
        uint32_t gte = get_le32(buf + i * 4);
        bool behind = (table * e->h.gtes + i) * e->grain >= e->len;
        if (gte > 1)
            take_slots(c, e, gte, e->h.grain, behind);
    }
    return r;
}

static bool stands_behind(const struct vmdk_extent *e, uint64_t sector, uint64_t sectors)
{
    return sector + sectors > e->h.overhead;
}

static bool directories_stand_behind(const struct vmdk_extent *e)
{
    return stands_behind(e, e->h.gd_off, e->h.gd_sectors) ||
           (e->rgd && stands_behind(e, e->h.rgd_off, e->h.gd_sectors));
}

static int by_sector(const void *a, const void *b)
{
    const uint32_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* The tables behind the overhead. Those before it stand with the directories, and stay. */
static int list_tables(struct vmdk_extent *e, struct vmdk_compact *c)
{
    const uint32_t *const directories[] = {e->gd, e->rgd};
    size_t room = (size_t)e->h.n_tables * 2 + 1;
    c->tables = malloc(room * sizeof(*c->tables));
    c->own = calloc(room + 1, sizeof(*c->own));
    c->gaps = calloc(room + 1, sizeof(*c->gaps));
    if (!c->tables || !c->own || !c->gaps)
        return -ENOMEM;
    for (size_t d = 0; d < 2; d++)
        for (uint64_t t = 0; directories[d] && t < e->h.n_tables; t++)
            if (directories[d][t] && stands_behind(e, directories[d][t], e->h.gt_sectors))
                c->tables[c->n_tables++] = directories[d][t];
    qsort(c->tables, c->n_tables, sizeof(*c->tables), by_sector);
    return 0;
}

/* What never moves. */
static void take_fixed(struct dr_image *image, struct vmdk_extent *e, struct vmdk_compact *c)
{
    DR_LOCK_SCOPE(&image->lock);
    take_slots(c, e, 0, e->h.overhead, true);
    if (e->h.desc_off)
        take_slots(c, e, e->h.desc_off, e->h.desc_len, true);
    c->low = c->stays;
    if (e->spare_table)
        take_slots(c, e, e->spare_table, e->h.gt_sectors, true);
}

static void add_to_row(struct vmdk_extent *e, struct vmdk_compact *c, uint64_t sector, uint64_t n)
{
    if (!stands_behind(e, sector, n))
        return;
    c->row_from = dr_min(c->row_from, vmdk_slot_of(c, e, sector));
    c->row_end = dr_max(c->row_end, dr_min(c->slots, vmdk_slots_end(c, e, sector + n)));
    take_slots(c, e, sector, n, false);
}

/* Tables stand in a row behind their directory, as VMware computes it: where that one stands behind
 * the overhead, they go with it. */
static void take_row(struct vmdk_extent *e, struct vmdk_compact *c)
{
    struct vmdk_header n = e->h;
    uint64_t before = c->used;
    c->has_row = directories_stand_behind(e);
    if (!c->has_row)
        return;
    c->row_from = c->slots;
    add_to_row(e, c, e->h.gd_off, e->h.gd_sectors);
    if (e->rgd)
        add_to_row(e, c, e->h.rgd_off, e->h.gd_sectors);
    for (size_t i = 0; i < c->n_tables; i++)
        add_to_row(e, c, c->tables[i], e->h.gt_sectors);
    c->n_tables = 0;
    c->row_own = c->used - before;
    c->used = before;
    c->row_slots = dr_div_up(vmdk_header_place_tables(&n, 0), e->h.grain);
}

static int note_all(struct dr_image *image, struct vmdk_extent *e, struct vmdk_compact *c,
                    struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc((size_t)e->h.gtes * 4);
    int r = buf ? vmdk_load_directories(image, e, err)
                : dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r < 0)
        return r;
    take_fixed(image, e, c);
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++)
        r = take_grains(image, e, c, t, buf, err);
    if (r == 0 && list_tables(e, c) < 0)
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    take_row(e, c);
    uint64_t grains = c->used;
    vmdk_compact_count(c, e);
    for (size_t i = 0; i < c->n_tables; i++)
        take_slots(c, e, c->tables[i], e->h.gt_sectors, false);
    c->used = grains;
    if (vmdk_slot_sector(c, e, c->slots) * VMDK_SECTOR > dr_file_size(image->files[e->file]))
        vmdk_slot_set(c->taken, c->slots - 1); /* the file has only a part of it */
    return 0;
}

int vmdk_compact_note(struct dr_image *image, struct vmdk_extent *e, struct vmdk_compact *c,
                      struct dr_error *err)
{
    int r = note_all(image, e, c, err);
    vmdk_drop_directories(e);
    return r;
}

int vmdk_compact_new(const struct dr_image *image, const struct vmdk_extent *e,
                     struct vmdk_compact **out, struct dr_error *err)
{
    uint64_t sectors = dr_div_up(dr_file_size(image->files[e->file]), VMDK_SECTOR);
    uint64_t origin = e->h.cowd ? e->h.overhead % e->h.grain : 0;
    uint64_t slots = dr_div_up(sectors - dr_min(sectors, origin), e->h.grain);
    *out = NULL;
    if (slots > (e->h.cowd ? MAX_COWD_SLOTS : MAX_SLOTS))
        return 0;
    struct vmdk_compact *c = calloc(1, sizeof(*c));
    if (c) {
        c->origin = origin;
        c->slots = slots;
        c->width = (uint32_t)dr_div_up(e->h.gt_sectors, e->h.grain);
        c->tables_each = (uint32_t)dr_max(1, e->h.grain / e->h.gt_sectors);
        c->taken = calloc(1, (size_t)(slots / 8 + 1));
        c->kept = calloc(1, (size_t)(slots / 8 + 1));
    }
    if (c && c->taken && c->kept) {
        *out = c;
        return 0;
    }
    vmdk_compact_free(c);
    return dr_fail_errno(err, ENOMEM, "%s", image->path);
}

void vmdk_compact_free(struct vmdk_compact *c)
{
    if (!c)
        return;
    free(c->taken);
    free(c->kept);
    free(c->tables);
    free(c->own);
    free(c->gaps);
    free(c->windows);
    free(c);
}

/* ------------------------------------------------------------------ beginning and end */

static bool can_move(const struct dr_image *image, const struct vmdk_extent *e)
{
    return e->type == VMDK_SPARSE && e->access == VMDK_RW && !image->files[e->file]->block_device;
}

/* From now on vmdk_compact_lost sees what is given up. */
static int begin(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct vmdk_compact *c = NULL;
    int r = vmdk_compact_new(image, e, &c, err);
    DR_LOCK_SCOPE(&image->lock);
    e->compact = c;
    if (!c)
        return r;
    /* What is free now, up to the end of the file, are gaps: new grains go behind them. */
    e->n_free = 0;
    if (e->next != 0)
        e->next = dr_max(e->next, vmdk_slot_sector(c, e, c->slots));
    return 0;
}

int vmdk_compact_begin(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = vmdk_refuse_streams(image, err);
    for (size_t i = 0; r == 0 && i < s->n_extents; i++)
        if (can_move(image, &s->extents[i]))
            r = begin(image, &s->extents[i], err);
    return r;
}

int vmdk_compact_look(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = 0;
    for (size_t i = 0; r == 0 && i < s->n_extents; i++) {
        struct vmdk_extent *e = &s->extents[i];
        if (!e->compact)
            continue;
        r = vmdk_compact_note(image, e, e->compact, err);
        DR_LOCK_SCOPE(&image->lock);
        if (r == 0 && vmdk_compact_choose(e->compact, e) < 0)
            r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    }
    return r;
}

int vmdk_compact_finish(struct dr_image *image, bool *again, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = 0;
    for (size_t i = 0; r == 0 && i < s->n_extents; i++) {
        struct vmdk_extent *e = &s->extents[i];
        if (e->compact && (e->compact->n_windows > 0 || e->compact->moves_row))
            r = vmdk_compact_move_tables(image, e, err);
        *again |= e->compact && e->compact->again;
    }
    return r;
}

void vmdk_compact_end(struct dr_image *image)
{
    struct vmdk_state *s = vmdk_of(image);
    DR_LOCK_SCOPE(&image->lock);
    for (size_t i = 0; i < s->n_extents; i++)
        vmdk_compact_free(DR_STEAL(s->extents[i].compact));
}

/* ------------------------------------------------------------------ questions */

static struct vmdk_extent *extent_of(const struct dr_image *image, const struct dr_extent *ext)
{
    struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; ext->file && i < s->n_extents; i++)
        if (s->extents[i].compact && image->files[s->extents[i].file] == ext->file)
            return &s->extents[i];
    return NULL;
}

bool vmdk_compact_moves(const struct dr_image *image, const struct dr_extent *ext)
{
    const struct vmdk_extent *e = extent_of(image, ext);
    if (!e || e->compact->cursor >= e->compact->end)
        return false;
    uint64_t first = ext->host / VMDK_SECTOR;
    return is_high(e, first, first + dr_div_up(ext->len, e->grain) * e->h.grain);
}

/* A grain over a parent may keep its place, where the extent has no zeroed grains. */
void vmdk_compact_spare(struct dr_image *image, const struct dr_extent *ext)
{
    const struct vmdk_extent *e = extent_of(image, ext);
    if (!e || ext->kind != DR_DATA || (image->backing_name && !vmdk_has_zero_grains(e)))
        return;
    e->compact->used -= dr_min(e->compact->used, dr_div_up(ext->len, e->grain));
}

uint64_t vmdk_compact_length(const struct dr_image *image)
{
    const struct vmdk_state *s = vmdk_of(image);
    uint64_t length = 0;
    for (unsigned i = 0; i < image->n_files; i++)
        length += dr_file_size(image->files[i]);
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent *e = &s->extents[i];
        size_t staying;
        bool row;
        if (!e->compact)
            continue;
        uint64_t size = dr_file_size(image->files[e->file]);
        uint64_t end = vmdk_compact_end_at(e->compact, e, &staying, &row);
        length -= size - dr_min(size, vmdk_slot_sector(e->compact, e, end) * VMDK_SECTOR);
    }
    return length;
}
