/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of sparse extents: grains near the end of the file move into gaps before it. Nothing
 * on disk says where gaps are, so all tables are read first; everything is durable then, and nobody
 * writes. A place that comes free later is not one of these gaps: the allocator has it (write.c).
 *
 * The file is looked at in slots, as long as a grain each. Programs put grains at their beginnings;
 * one that is put elsewhere takes two. */
#include <stdlib.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"

/* 32 MiB of bits. A file with more slots, of tiny grains, is left as it is. */
#define MAX_SLOTS (UINT64_C(1) << 28)

struct vmdk_compact {
    uint8_t *taken; /* a bit a slot: something stands there, or did */
    uint64_t slots, used;
    uint64_t stays;  /* slots: what does not move ends here */
    uint64_t end;    /* slots: the file can end here */
    uint64_t cursor; /* slots before it are taken */
};

/* ------------------------------------------------------------------ slots */

static bool is_taken(const struct vmdk_compact *c, uint64_t slot)
{
    return c->taken[slot / 8] >> slot % 8 & 1;
}

static void take_slots(struct vmdk_compact *c, const struct vmdk_extent *e, uint64_t sector,
                       uint64_t sectors, bool stays)
{
    uint64_t end = dr_min(c->slots, dr_div_up(sector + sectors, e->h.grain));
    for (uint64_t slot = sector / e->h.grain; slot < end; slot++) {
        c->used += !is_taken(c, slot);
        c->taken[slot / 8] |= (uint8_t)(1u << slot % 8);
    }
    if (stays)
        c->stays = dr_max(c->stays, end);
}

static bool is_high(const struct vmdk_extent *e, uint64_t sector)
{
    const struct vmdk_compact *c = e->compact;
    return c && sector + e->h.grain > c->end * e->h.grain;
}

uint32_t vmdk_lower_take(struct vmdk_extent *e, uint32_t gte)
{
    struct vmdk_compact *c = e->compact;
    if (!is_high(e, gte))
        return 0;
    while (c->cursor < c->end && is_taken(c, c->cursor))
        c->cursor++;
    if (c->cursor >= c->end)
        return 0;
    c->taken[c->cursor / 8] |= (uint8_t)(1u << c->cursor % 8);
    return (uint32_t)(c->cursor * e->h.grain);
}

void vmdk_lower_give_up(struct vmdk_extent *e, uint32_t sector)
{
    struct vmdk_compact *c = e->compact;
    c->cursor = sector / e->h.grain;
    c->taken[c->cursor / 8] &= (uint8_t) ~(1u << c->cursor % 8);
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
static int take_grains(struct dr_image *image, struct vmdk_extent *e, uint64_t table,
                       struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    bool hole = true, fits = vmdk_table_fits(image, e, e->gd[table]);
    if (!fits && (e->gd[table] || (e->rgd && e->rgd[table])))
        return refuse_table(image, e, table, err);
    int r = fits ? vmdk_read_table(image, e, e->gd[table], buf, &hole, err) : 0;
    for (uint32_t i = 0; r == 0 && !hole && i < e->h.gtes; i++) {
        uint32_t gte = get_le32(buf + i * 4);
        bool behind = (table * e->h.gtes + i) * e->grain >= e->len;
        if (gte > 1)
            take_slots(e->compact, e, gte, e->h.grain, behind);
    }
    return r;
}

static void take_metadata(struct vmdk_extent *e)
{
    struct vmdk_compact *c = e->compact;
    take_slots(c, e, 0, e->h.overhead, true);
    take_slots(c, e, e->h.gd_off, e->h.gd_sectors, true);
    if (e->rgd)
        take_slots(c, e, e->h.rgd_off, e->h.gd_sectors, true);
    if (e->h.desc_off)
        take_slots(c, e, e->h.desc_off, e->h.desc_len, true);
    for (uint64_t t = 0; t < e->h.n_tables; t++) {
        if (e->gd[t])
            take_slots(c, e, e->gd[t], e->h.gt_sectors, true);
        if (e->rgd && e->rgd[t])
            take_slots(c, e, e->rgd[t], e->h.gt_sectors, true);
    }
}

static int look_at(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        take_metadata(e);
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++)
        r = take_grains(image, e, t, err);
    vmdk_drop_directories(e);
    return r;
}

static bool can_move(const struct dr_image *image, const struct vmdk_extent *e)
{
    return e->type == VMDK_SPARSE && e->access == VMDK_RW && !e->h.cowd &&
           !image->files[e->file]->block_device;
}

static int survey(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    uint64_t slots = dr_div_up(dr_file_size(image->files[e->file]), e->grain);
    if (slots > MAX_SLOTS)
        return 0;
    struct vmdk_compact *c = calloc(1, sizeof(*c));
    if (c)
        c->taken = calloc(1, (size_t)(slots / 8 + 1));
    if (!c || !c->taken) {
        free(c);
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    }
    c->slots = slots;
    e->compact = c;
    int r = look_at(image, e, err);
    c->end = dr_max(c->used, c->stays);
    DR_LOCK_SCOPE(&image->lock);
    e->n_free = 0; /* these are gaps now */
    return r;
}

int vmdk_compact_begin(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = vmdk_refuse_streams(image, err);
    for (size_t i = 0; r == 0 && i < s->n_extents; i++)
        if (can_move(image, &s->extents[i]))
            r = survey(image, &s->extents[i], err);
    return r;
}

void vmdk_compact_end(struct dr_image *image)
{
    struct vmdk_state *s = vmdk_of(image);
    DR_LOCK_SCOPE(&image->lock);
    for (size_t i = 0; i < s->n_extents; i++) {
        struct vmdk_compact *c = DR_STEAL(s->extents[i].compact);
        if (c)
            free(c->taken);
        free(c);
    }
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
    return is_high(e, dr_div_up(ext->host + ext->len, VMDK_SECTOR) - e->h.grain);
}

/* A grain over a parent may keep its place, where the extent has no zeroed grains. */
void vmdk_compact_spare(struct dr_image *image, const struct dr_extent *ext)
{
    const struct vmdk_extent *e = extent_of(image, ext);
    if (!e || ext->kind != DR_DATA || (image->backing_name && !vmdk_has_zero_grains(e)))
        return;
    struct vmdk_compact *c = e->compact;
    c->used -= dr_min(c->used, dr_div_up(ext->len, e->grain));
    c->end = dr_max(c->used, c->stays);
}

uint64_t vmdk_compact_length(const struct dr_image *image)
{
    const struct vmdk_state *s = vmdk_of(image);
    uint64_t length = 0;
    for (unsigned i = 0; i < image->n_files; i++)
        length += dr_file_size(image->files[i]);
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent *e = &s->extents[i];
        uint64_t size = e->compact ? dr_file_size(image->files[e->file]) : 0;
        if (e->compact)
            length -= size - dr_min(size, e->compact->end * e->grain);
    }
    return length;
}

int vmdk_compact_finish(struct dr_image *image, struct dr_error *err)
{
    (void)image;
    (void)err;
    return 0; /* trim cuts */
}
