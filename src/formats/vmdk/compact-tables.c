/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction's last step: tables move into the windows that were kept for them. No request is under
 * way; readers may be.
 *
 *     copies of tables ──► flush ──► entries of the directory ──► flush, wait for readers ──► the
 *         old places come free
 *
 * A crash leaves each entry as it was or as it is now; both tables are there and equal. Tables that
 * move together with their directories are written as resize does it (tables.c). */
#include "formats/vmdk/compact.h"

#include <stdlib.h>

#include "base/cleanup.h"

/* A table that moves. Sectors. */
struct table_move {
    uint32_t from, to;
};

struct table_moves {
    struct table_move *list;
    size_t n;
    bool primary, copy; /* the directory has changed, and so has the redundant one */
};

/* ------------------------------------------------------------------ places in windows */

/* The windows that nothing stands in any more, and the next place in them. */
struct places {
    const struct vmdk_compact *c, *now;
    const struct vmdk_extent *e;
    size_t window;
    uint32_t i;
};

static bool is_empty(const struct vmdk_compact *now, uint64_t slot, uint64_t n)
{
    for (uint64_t i = slot; i < slot + n; i++)
        if (i >= now->slots || vmdk_slot_is(now->taken, i))
            return false;
    return true;
}

static uint32_t next_place(struct places *p)
{
    const struct vmdk_compact *c = p->c;
    while (p->i == 0 && p->window < c->n_windows &&
           !is_empty(p->now, c->windows[p->window], c->width))
        p->window++;
    if (p->window >= c->n_windows)
        return 0;
    uint64_t sector = vmdk_slot_sector(c, p->e, c->windows[p->window]);
    sector += p->i * p->e->h.gt_sectors;
    if (++p->i == c->tables_each) {
        p->i = 0;
        p->window++;
    }
    return (uint32_t)sector;
}

/* Choose a place for each table of the directory that stands high. What finds none stays. */
static bool plan(struct places *p, uint32_t *directory, struct table_moves *m)
{
    uint32_t first = p->c->tables[p->c->n_staying];
    bool any = false;
    for (uint64_t t = 0; directory && t < p->e->h.n_tables; t++) {
        uint32_t from = directory[t], to = from >= first ? next_place(p) : 0;
        if (!to)
            continue;
        m->list[m->n++] = (struct table_move){from, to};
        directory[t] = to;
        any = true;
    }
    return any;
}

/* ------------------------------------------------------------------ one by one */

static int copy_tables(struct dr_image *image, const struct vmdk_extent *e,
                       const struct table_moves *m, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n; i++)
        r = dr_copy_within(f, (uint64_t)m->list[i].from * VMDK_SECTOR,
                           (uint64_t)m->list[i].to * VMDK_SECTOR, e->h.gt_sectors * VMDK_SECTOR,
                           err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int switch_entries(struct dr_image *image, struct vmdk_extent *e,
                          const struct table_moves *m, struct dr_error *err)
{
    int r = m->copy ? vmdk_store_directory(image, e, true, err) : 0;
    if (r == 0 && m->primary)
        r = vmdk_store_directory(image, e, false, err);
    if (r == 0)
        r = dr_file_flush(image->files[e->file], err);
    struct vmdk_extent fresh = *e;
    if (r == 0 && !e->h.cowd)
        r = vmdk_learn_tables(image, &fresh, err);
    DR_LOCK_SCOPE(&image->lock);
    e->tables_at = r == 0 ? fresh.tables_at : 0;
    dr_page_forget(image, e->file, 0, INT64_MAX);
    return r;
}

static void give_up(struct dr_image *image, const struct vmdk_extent *e, uint64_t sector,
                    uint64_t sectors)
{
    dr_free_later(image, (struct dr_freed){.file = image->files[e->file],
                                           .host = sector * VMDK_SECTOR,
                                           .len = sectors * VMDK_SECTOR});
}

static int room_to_give_up(struct dr_image *image, size_t n, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->lock);
    int r = dr_free_ahead(image, n);
    return r < 0 ? dr_fail_errno(err, ENOMEM, "%s", image->path) : 0;
}

static int move_each(struct dr_image *image, struct vmdk_extent *e, struct places *p,
                     struct dr_error *err)
{
    size_t most = (size_t)e->h.n_tables * (e->rgd ? 2 : 1);
    CLEANUP_FREE struct table_move *list = malloc((most + 1) * sizeof(*list));
    struct table_moves m = {.list = list};
    if (!list)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    m.primary = plan(p, e->gd, &m);
    m.copy = plan(p, e->rgd, &m);
    if (m.n == 0)
        return 0;
    int r = room_to_give_up(image, m.n, err);
    if (r == 0)
        r = copy_tables(image, e, &m, err);
    if (r == 0)
        r = switch_entries(image, e, &m, err);
    DR_LOCK_SCOPE(&image->lock);
    for (size_t i = 0; r == 0 && i < m.n; i++)
        give_up(image, e, m.list[i].from, e->h.gt_sectors);
    return r;
}

/* ------------------------------------------------------------------ with their directories */

static void give_up_row(struct dr_image *image, const struct vmdk_extent *e,
                        const struct vmdk_header *old)
{
    const uint32_t *const directories[] = {e->gd, e->rgd};
    const uint64_t at[] = {old->gd_off, old->rgd_off};
    DR_LOCK_SCOPE(&image->lock);
    for (size_t d = 0; d < 2; d++) {
        if (directories[d] && at[d] >= old->overhead)
            give_up(image, e, at[d], old->gd_sectors);
        for (uint64_t t = 0; directories[d] && t < old->n_tables; t++)
            if (directories[d][t] >= old->overhead)
                give_up(image, e, directories[d][t], old->gt_sectors);
    }
}

static int move_row(struct dr_image *image, struct vmdk_extent *e, const struct places *p,
                    struct dr_error *err)
{
    const struct vmdk_compact *c = p->c;
    const struct vmdk_header old = e->h;
    if (!is_empty(p->now, c->to, c->row_slots))
        return 0;
    int r = room_to_give_up(image, (size_t)e->h.n_tables * 2 + 2, err);
    if (r == 0)
        r = vmdk_place_row(image, e, vmdk_slot_sector(c, e, c->to), err);
    if (r == 0)
        give_up_row(image, e, &old);
    return r;
}

int vmdk_compact_move_tables(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct vmdk_compact *now = NULL;
    struct places p = {.c = e->compact, .e = e};
    int r = vmdk_compact_new(image, e, &now, err);
    p.now = now;
    if (r == 0 && now)
        r = vmdk_compact_note(image, e, now, err);
    if (r == 0)
        r = vmdk_load_directories(image, e, err);
    if (r == 0 && now)
        r = e->compact->moves_row ? move_row(image, e, &p, err) : move_each(image, e, &p, err);
    vmdk_drop_directories(e);
    vmdk_compact_free(now);
    return r;
}
