/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reads grain tables for a check. Programs lay tables out in rows, the redundant ones in another
 * row; up to 256 KiB of a row are read at once, and several rows by several threads. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/check.h"

unsigned vmdk_check_readers;

/* n tables from `first` on. */
struct row {
    uint64_t first, n;
    bool copies; /* the redundant ones, of tables that came right before */
    bool then;   /* the redundant ones come next */
};

struct reading {
    struct vmdk_walk *w;
    vmdk_table_fn fn;
    size_t step;      /* bytes from one table to the next */
    uint8_t *primary; /* of a row whose copies come next */
    bool hole;        /* that row is one */
};

bool vmdk_has_copy(const struct vmdk_walk *w, uint64_t table)
{
    const struct vmdk_extent *e = w->e;
    return e->rgd && vmdk_table_fits(w->image, e, e->rgd[table]) && e->rgd[table] != e->gd[table];
}

static int use_row(void *user, const void *what, uint8_t *bytes, struct dr_error *err)
{
    struct reading *g = user;
    const struct row *row = what;
    int r = 0;
    if (row->then) {
        g->hole = !bytes;
        if (bytes)
            memcpy(g->primary, bytes, row->n * g->step);
        return 0;
    }
    uint8_t *copies = row->copies ? bytes : NULL;
    if (row->copies)
        bytes = g->hole ? NULL : g->primary;
    for (uint64_t i = 0; r == 0 && i < row->n; i++)
        r = g->fn(g->w, row->first + i, bytes ? bytes + i * g->step : NULL,
                  copies ? copies + i * g->step : NULL, err);
    return r;
}

/* Does table t + n go on with the row that begins with t, and, if with, so do their copies? */
static bool goes_on(const struct vmdk_walk *w, uint64_t t, uint64_t n, bool with)
{
    const struct vmdk_extent *e = w->e;
    uint64_t sectors = n * e->h.gt_sectors;
    return e->gd[t + n] == e->gd[t] + sectors && vmdk_table_fits(w->image, e, e->gd[t + n]) &&
           (!with || e->rgd[t + n] == e->rgd[t] + sectors);
}

/* How many tables from the t-th on stand in a row. All of them have a copy, or none has. */
static uint64_t row_length(const struct reading *g, uint64_t t, bool copies, bool with)
{
    const struct vmdk_walk *w = g->w;
    uint64_t n = 1, most = dr_min(DR_AHEAD_STEP / g->step, vmdk_tables_used(w->e) - t);
    while (n < most && goes_on(w, t, n, with) && (!copies || vmdk_has_copy(w, t + n) == with))
        n++;
    return n;
}

static int add_row(struct reading *g, const struct row *row, struct dr_error *err)
{
    const struct vmdk_extent *e = g->w->e;
    uint64_t sector = row->copies ? e->rgd[row->first] : e->gd[row->first];
    const struct dr_ahead_range range = {sector * VMDK_SECTOR, row->n * g->step, false};
    return dr_ahead_add(g->w->ahead, &range, row, false, err);
}

static int add_rows(struct reading *g, bool copies, struct dr_error *err)
{
    const struct vmdk_walk *w = g->w;
    int r = 0;
    for (uint64_t t = 0, n; r == 0 && t < vmdk_tables_used(w->e); t += n) {
        n = 1;
        if (!vmdk_table_fits(w->image, w->e, w->e->gd[t]))
            continue;
        bool with = copies && vmdk_has_copy(w, t);
        n = row_length(g, t, copies, with);
        r = add_row(g, &(struct row){t, n, false, with}, err);
        if (r == 0 && with)
            r = add_row(g, &(struct row){t, n, true, false}, err);
    }
    return r;
}

int vmdk_read_tables(struct vmdk_walk *w, bool copies, vmdk_table_fn fn, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *primary = malloc(DR_AHEAD_STEP);
    struct reading g = {
        .w = w, .fn = fn, .step = w->e->h.gt_sectors * VMDK_SECTOR, .primary = primary};
    if (primary && !w->ahead)
        w->ahead = dr_ahead_new(w->f, sizeof(struct row), vmdk_check_readers);
    if (!primary || !w->ahead)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    dr_ahead_start(w->ahead, use_row, &g);
    return dr_ahead_finish(w->ahead, add_rows(&g, copies, err), err);
}
