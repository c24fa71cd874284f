/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Another size of a COWD extent. Its directory stays where it is, and grows into the sectors behind
 * it, where tables and grains stand. Those move to the end of the file first, all by the same
 * distance, and one sector of the header then says how long the directory is:
 *
 *     count ──► flush ──► copies ──► flush ──► entries of tables ──► flush ──► directory ──► flush,
 *         wait for readers ──► zeros behind the directory ──► flush ──► header ──► flush
 *
 * Until a table or a grain has its new place in an entry that is durable, the old one is kept as it
 * is, so that a crash between any two of these leaves a disk that reads the same. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "formats/vmdk/cowd.h"

#define TABLE_SECTORS (VMDK_COWD_TABLE / VMDK_SECTOR)

/* ------------------------------------------------------------------ tables and the directory */

/* The directory is loaded. A table that is missing reads as empty. */
static int load_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                      uint8_t *buf, struct dr_error *err)
{
    uint32_t gde = e->gd[table];
    bool hole;
    memset(buf, 0, VMDK_COWD_TABLE);
    if (gde == 0)
        return 0;
    if (!vmdk_table_fits(image, e, gde))
        return dr_fail(err, EIO,
                       "%s: grain directory entry %" PRIu64 " says sector %u: no table can be "
                       "there",
                       vmdk_extent_path(image, e), table, gde);
    return vmdk_read_table(image, e, gde, buf, &hole, err);
}

static int load_sound_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                            uint8_t *buf, struct dr_error *err)
{
    int r = load_table(image, e, table, buf, err);
    if (r < 0 || vmdk_table_is_sound(image, e, table, buf))
        return r;
    return dr_fail(err, EIO, "%s: grain table %" PRIu64 " is damaged; `drover check` says how",
                   vmdk_extent_path(image, e), table);
}

static int store_table(struct dr_image *image, const struct vmdk_extent *e, uint32_t sector,
                       const uint8_t *buf, struct dr_error *err)
{
    return dr_file_pwrite(image->files[e->file], buf, (uint64_t)sector * VMDK_SECTOR,
                          VMDK_COWD_TABLE, err);
}

/* What was written before is durable before the directory, and so is the directory on return. */
static int store_directory(struct dr_image *image, const struct vmdk_extent *e,
                           struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    int r = dr_file_flush(f, err);
    if (r == 0)
        r = vmdk_store_directory(image, e, false, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* ------------------------------------------------------------------ places */

/* Take sectors at the end of the file, and count them in the header, durably. */
static int take_at_end(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                       uint64_t *at, struct dr_error *err)
{
    uint64_t end;
    {
        DR_LOCK_SCOPE(&image->lock);
        vmdk_cowd_find_next(image, e);
        *at = e->next;
        end = *at + sectors;
        if (end <= VMDK_COWD_MAX_SECTOR)
            e->next = end;
    }
    if (end > VMDK_COWD_MAX_SECTOR)
        return dr_fail(err, ENOSPC, "%s: a vmfsSparse extent cannot grow beyond 2 TiB",
                       vmdk_extent_path(image, e));
    int r = end > e->h.free_sector ? vmdk_cowd_set_free(image, e, end, err) : 0;
    return r < 0 ? r : dr_file_flush(image->files[e->file], err);
}

/* No grain or table is put into [from, end) from now on. */
static void keep_clear(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t end)
{
    DR_LOCK_SCOPE(&image->lock);
    size_t kept = 0;
    for (size_t i = 0; i < e->n_free; i++)
        if (e->free[i] >= end || e->free[i] + e->h.grain <= from)
            e->free[kept++] = e->free[i];
    e->n_free = kept;
    if (e->spare_table < end && e->spare_table + TABLE_SECTORS > from)
        e->spare_table = 0;
    vmdk_cowd_find_next(image, e);
    e->next = dr_max(e->next, end);
}

/* [from, end) comes back to use, as soon as nobody reads there any more: on return. Nothing durable
 * leads there. */
static int give_back(struct dr_image *image, const struct vmdk_extent *e, uint64_t from,
                     uint64_t end, struct dr_error *err)
{
    if (end - from < e->h.grain) /* reuse takes the first grain of it */
        return 0;
    pthread_mutex_lock(&image->lock);
    int r = dr_free_ahead(image, 1);
    if (r == 0)
        dr_free_later(image, (struct dr_freed){.file = image->files[e->file],
                                               .host = from * VMDK_SECTOR,
                                               .len = (end - from) * VMDK_SECTOR});
    pthread_mutex_unlock(&image->lock);
    return r < 0 ? dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(image, e)) : 0;
}

/* ------------------------------------------------------------------ room for the directory */

/* What begins in [from, end) of the file moves. */
struct shift {
    struct dr_image *image;
    struct vmdk_extent *e;
    uint64_t from, end; /* sectors */
    uint64_t reach;     /* behind the last thing that begins there */
    uint64_t to;        /* where `from` goes */
    uint8_t *used;      /* a bit a sector from `from` on */
    bool *touched;      /* tables that have to be written */
    bool any;
};

static bool moves(const struct shift *s, uint32_t sector)
{
    return sector >= s->from && sector < s->end;
}

static uint32_t moved(const struct shift *s, uint32_t sector)
{
    return moves(s, sector) ? (uint32_t)(sector - s->from + s->to) : sector;
}

static void mark(struct shift *s, uint64_t table, uint32_t sector, uint64_t n)
{
    if (!moves(s, sector))
        return;
    for (uint64_t i = sector - s->from, end = i + n; i < end; i++)
        s->used[i / 8] |= (uint8_t)(1u << i % 8);
    s->reach = dr_max(s->reach, sector + n);
    s->touched[table] = s->any = true;
}

/* Find what stands in the way. Refuse damaged tables. */
static int plan(struct shift *s, uint8_t *buf, struct dr_error *err)
{
    int r = 0;
    for (uint64_t t = 0; r == 0 && t < s->e->h.n_tables; t++) {
        if (s->e->gd[t] == 0)
            continue;
        r = load_sound_table(s->image, s->e, t, buf, err);
        if (r < 0)
            return r;
        mark(s, t, s->e->gd[t], TABLE_SECTORS);
        for (uint32_t i = 0; i < VMDK_COWD_GTES; i++)
            mark(s, t, get_le32(buf + i * 4), s->e->h.grain);
    }
    return r;
}

static int copy(const struct shift *s, struct dr_error *err)
{
    struct dr_file *f = s->image->files[s->e->file];
    int r = 0;
    for (uint64_t i = 0, n = s->reach - s->from, end; r == 0 && i < n; i = end) {
        bool used = s->used[i / 8] & (1u << i % 8);
        for (end = i + 1; end < n && used == !!(s->used[end / 8] & (1u << end % 8));)
            end++;
        if (used)
            r = dr_copy_within(f, (s->from + i) * VMDK_SECTOR, (s->to + i) * VMDK_SECTOR,
                               (end - i) * VMDK_SECTOR, err);
    }
    return r < 0 ? r : dr_file_flush(f, err);
}

/* Tables that move are written where they go, the others where they are. */
static int redirect(struct shift *s, uint8_t *buf, struct dr_error *err)
{
    struct vmdk_extent *e = s->e;
    bool directory = false;
    int r = 0;
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++) {
        if (!s->touched[t])
            continue;
        r = load_table(s->image, e, t, buf, err);
        for (uint32_t i = 0; i < VMDK_COWD_GTES; i++)
            put_le32(buf + i * 4, moved(s, get_le32(buf + i * 4)));
        if (r == 0)
            r = store_table(s->image, e, moved(s, e->gd[t]), buf, err);
    }
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        if (moves(s, e->gd[t])) {
            e->gd[t] = moved(s, e->gd[t]);
            directory = true;
        }
    if (r == 0)
        r = directory ? store_directory(s->image, e, err)
                      : dr_file_flush(s->image->files[e->file], err);
    vmdk_forget_pages(s->image, e);
    return r;
}

static int move_away(struct shift *s, uint8_t *buf, struct dr_error *err)
{
    struct vmdk_extent *e = s->e;
    int r = take_at_end(s->image, e, s->reach - s->from, &s->to, err);
    if (r == 0)
        r = copy(s, err);
    if (r < 0) { /* nothing leads there: closing cuts the file again */
        DR_LOCK_SCOPE(&s->image->lock);
        e->next = dr_min(e->next, dr_max(s->to, s->end));
        return r;
    }
    r = redirect(s, buf, err);
    if (r == 0)
        r = give_back(s->image, e, s->from, s->reach, err);
    if (r == 0)
        r = dr_image_flush(s->image, err);
    keep_clear(s->image, e, s->from, s->end); /* what moved has given its old place back */
    return r;
}

/* When it returns, nothing stands in [from, end), and nobody reads there. */
static int clear(struct shift *s, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(VMDK_COWD_TABLE);
    uint64_t most = s->end - s->from + dr_max(TABLE_SECTORS, s->e->h.grain);
    CLEANUP_FREE uint8_t *used = s->used = calloc(1, (size_t)(most / 8 + 1));
    CLEANUP_FREE bool *touched = s->touched = calloc(s->e->h.n_tables + 1, sizeof(bool));
    if (!buf || !used || !touched)
        return dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(s->image, s->e));
    keep_clear(s->image, s->e, s->from, s->end);
    int r = plan(s, buf, err);
    return r == 0 && s->any ? move_away(s, buf, err) : r;
}

/* The longer directory is empty behind its present entries. */
static int extend_directory(struct dr_image *image, const struct vmdk_extent *e,
                            const struct vmdk_header *n, struct dr_error *err)
{
    static const uint8_t zeros[VMDK_SECTOR];
    struct dr_file *f = image->files[e->file];
    uint64_t at = e->h.gd_off * VMDK_SECTOR + e->h.n_tables * 4,
             behind = e->h.overhead * VMDK_SECTOR, end = n->overhead * VMDK_SECTOR;
    int r = at < behind ? dr_file_pwrite(f, zeros, at, (size_t)(behind - at), err) : 0;
    if (r == 0 && dr_file_size(f) > behind)
        r = dr_file_zero(f, behind, dr_min(dr_file_size(f), end) - behind, DR_FILE_ZERO_PUNCH, err);
    if (r == 0 && dr_file_size(f) < end)
        r = dr_file_truncate(f, end, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int grow_directory(struct dr_image *image, struct vmdk_extent *e,
                          const struct vmdk_header *n, struct dr_error *err)
{
    struct shift s = {.image = image, .e = e, .from = e->h.overhead, .end = n->overhead};
    s.reach = s.end;
    int r = s.end > s.from ? clear(&s, err) : 0;
    return r < 0 ? r : extend_directory(image, e, n, err);
}

int vmdk_cowd_set_capacity(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                           struct dr_error *err)
{
    const struct vmdk_header old = e->h;
    struct vmdk_header n = e->h;
    int r = vmdk_cowd_resized(&n, vmdk_extent_path(image, e), sectors, err);
    if (r < 0 || (sectors == old.capacity && n.n_tables == old.n_tables))
        return r;
    r = vmdk_load_directories(image, e, err);
    if (r == 0 && n.n_tables > old.n_tables)
        r = grow_directory(image, e, &n, err);
    if (r == 0)
        r = vmdk_cowd_switch(image, e, &n, err);
    vmdk_drop_directories(e);
    if (r == 0 && n.overhead < old.overhead)
        dr_file_zero(image->files[e->file], n.overhead * VMDK_SECTOR,
                     (old.overhead - n.overhead) * VMDK_SECTOR,
                     DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    return r;
}

/* ------------------------------------------------------------------ behind the end */

/* What is cut off, neighbours in the file together: it comes back when nothing durable leads there
 * any more. */
struct cut {
    struct dr_image *image;
    struct vmdk_extent *e;
    struct run {
        uint64_t from, end; /* sectors */
    } * runs;
    size_t n;
};

static int cut_add(struct cut *c, uint64_t sector, uint64_t n, struct dr_error *err)
{
    if (c->n > 0 && c->runs[c->n - 1].end == sector) {
        c->runs[c->n - 1].end += n;
        return 0;
    }
    if ((c->n & (c->n - 1)) == 0) { /* full at each power of two */
        struct run *runs = realloc(c->runs, (c->n ? c->n * 2 : 1) * sizeof(*runs));
        if (!runs)
            return dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(c->image, c->e));
        c->runs = runs;
    }
    c->runs[c->n++] = (struct run){sector, sector + n};
    return 0;
}

static int cut_entries(struct cut *c, const uint8_t *buf, uint32_t first, struct dr_error *err)
{
    int r = 0;
    for (uint32_t i = first; r == 0 && i < VMDK_COWD_GTES; i++)
        if (get_le32(buf + i * 4) != 0)
            r = cut_add(c, get_le32(buf + i * 4), c->e->h.grain, err);
    return r;
}

/* The first table that has entries behind the end keeps those before it. */
static int cut_table(struct cut *c, uint64_t table, uint32_t first, bool give, uint8_t *buf,
                     struct dr_error *err)
{
    struct vmdk_extent *e = c->e;
    int r = load_table(c->image, e, table, buf, err);
    size_t len = VMDK_COWD_TABLE - first * 4;
    if (r < 0 || dr_is_zero(buf + first * 4, len))
        return r;
    if (give && vmdk_table_is_sound(c->image, e, table, buf))
        r = cut_entries(c, buf, first, err);
    memset(buf + first * 4, 0, len);
    return r < 0 ? r : store_table(c->image, e, e->gd[table], buf, err);
}

/* Tables behind the end are given up, with all they lead to. Of damaged ones nothing is known. */
static int cut_tables(struct cut *c, uint64_t first, uint64_t trusted, bool give, uint8_t *buf,
                      bool *any, struct dr_error *err)
{
    struct vmdk_extent *e = c->e;
    int r = 0;
    for (uint64_t t = first; r == 0 && t < e->h.n_tables; t++) {
        uint32_t gde = e->gd[t];
        if (gde == 0)
            continue;
        *any = true;
        if (give && t < trusted && load_sound_table(c->image, e, t, buf, NULL) == 0) {
            r = cut_add(c, gde, TABLE_SECTORS, err);
            if (r == 0)
                r = cut_entries(c, buf, 0, err);
        }
        e->gd[t] = 0;
    }
    return r;
}

static int clear_last_grain(struct dr_image *image, const struct vmdk_extent *e, uint8_t *buf,
                            struct dr_error *err)
{
    if (e->len % e->grain == 0)
        return 0;
    int r = load_table(image, e, e->len / e->grain / VMDK_COWD_GTES, buf, err);
    return r < 0 ? r : vmdk_clear_last_grain(image, e, buf, err);
}

static int clear_behind(struct cut *c, uint64_t trusted, bool give, uint8_t *buf,
                        struct dr_error *err)
{
    struct vmdk_extent *e = c->e;
    uint64_t first = dr_div_up(e->len, e->grain);
    uint32_t part = (uint32_t)(first % VMDK_COWD_GTES);
    bool directory = false;
    int r = part ? cut_table(c, first / VMDK_COWD_GTES, part, give, buf, err) : 0;
    if (r == 0)
        r = cut_tables(c, dr_div_up(first, VMDK_COWD_GTES), trusted, give, buf, &directory, err);
    if (r == 0 && directory)
        r = store_directory(c->image, e, err);
    if (r == 0)
        r = clear_last_grain(c->image, e, buf, err);
    if (r == 0)
        r = dr_file_flush(c->image->files[e->file], err);
    vmdk_forget_pages(c->image, e);
    for (size_t i = 0; r == 0 && i < c->n; i++)
        r = give_back(c->image, e, c->runs[i].from, c->runs[i].end, err);
    return r;
}

int vmdk_cowd_clear_behind(struct dr_image *image, struct vmdk_extent *e, uint64_t was, bool give,
                           struct dr_error *err)
{
    uint64_t trusted = dr_div_up(was, e->grain * VMDK_COWD_GTES);
    struct cut c = {.image = image, .e = e};
    CLEANUP_FREE uint8_t *buf = malloc(VMDK_COWD_TABLE);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(image, e));
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = clear_behind(&c, trusted, give, buf, err);
    free(c.runs);
    vmdk_drop_directories(e);
    return r == 0 && give ? dr_image_flush(image, err) : r;
}

/* ------------------------------------------------------------------ zeros over the parent */

/* [first, end) are grains. The zeros are durable, and in a row from grains_at on. */
static int mask_tables(struct dr_image *image, struct vmdk_extent *e, uint64_t first, uint64_t end,
                       uint64_t tables_at, uint64_t grains_at, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(VMDK_COWD_TABLE);
    int r = buf ? 0 : dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(image, e));
    for (uint64_t g = first; r == 0 && g < end;) {
        uint64_t t = g / VMDK_COWD_GTES;
        r = load_table(image, e, t, buf, err);
        for (; g < end && g / VMDK_COWD_GTES == t; g++)
            put_le32(buf + g % VMDK_COWD_GTES * 4,
                     (uint32_t)(grains_at + (g - first) * e->h.grain));
        if (e->gd[t] == 0) {
            e->gd[t] = (uint32_t)tables_at;
            tables_at += TABLE_SECTORS;
        }
        if (r == 0)
            r = store_table(image, e, e->gd[t], buf, err);
    }
    return r < 0 ? r : store_directory(image, e, err);
}

static int mask(struct dr_image *image, struct vmdk_extent *e, uint64_t first, uint64_t end,
                struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t missing = 0, sectors, at = 0;
    for (uint64_t t = first / VMDK_COWD_GTES; t * VMDK_COWD_GTES < end; t++)
        missing += e->gd[t] == 0;
    sectors = missing * TABLE_SECTORS + (end - first) * e->h.grain;
    int r = take_at_end(image, e, sectors, &at, err);
    if (r < 0)
        return r;
    r = dr_file_zero(f, at * VMDK_SECTOR, sectors * VMDK_SECTOR, DR_FILE_ZERO_PUNCH, err);
    if (r == 0 && dr_file_size(f) < (at + sectors) * VMDK_SECTOR)
        r = dr_file_truncate(f, (at + sectors) * VMDK_SECTOR, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r < 0) {
        DR_LOCK_SCOPE(&image->lock);
        e->next = at;
        return r;
    }
    r = mask_tables(image, e, first, end, at, at + missing * TABLE_SECTORS, err);
    vmdk_forget_pages(image, e);
    return r;
}

int vmdk_cowd_mask(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t to,
                   struct dr_error *err)
{
    uint64_t first = dr_div_up(from, e->grain), end = dr_div_up(to, e->grain);
    int r = first < end ? vmdk_load_directories(image, e, err) : 0;
    if (r == 0 && first < end)
        r = mask(image, e, first, end, err);
    vmdk_drop_directories(e);
    return r;
}
