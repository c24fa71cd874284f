/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Moving and cutting the tables of a sparse extent, for resize.
 *
 * A larger directory needs a larger place, and grains stand behind the old one. So the grains right
 * behind the metadata move to the end of the file, the new tables are written where they were, and
 * one sector of the header switches from the old tables to the new ones:
 *
 *     copy grains ──► flush ──► their entries ──► flush, wait for readers ──► new tables ──► flush
 *         ──► header ──► flush ──► punch the old tables
 *
 * A crash leaves the old tables or the new ones, each whole, and at most space that nothing points
 * to. VMware computes where a table is from where the directory is, so tables stay in a row behind
 * their directory. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"

#define MAX_FILE_SECTORS (UINT64_C(1) << 32) /* entries have 32 bits */

/* One grain that gets another place, or none. */
struct move {
    uint64_t table;
    uint32_t entry, from, to;
};

struct moves {
    struct move *list;
    size_t n, room;
};

static int add_move(struct moves *m, const struct move *one, const char *path, struct dr_error *err)
{
    if (m->n == m->room) {
        size_t room = m->room ? m->room * 2 : 64;
        struct move *list = realloc(m->list, room * sizeof(*list));
        if (!list)
            return dr_fail_errno(err, ENOMEM, "%s", path);
        m->list = list;
        m->room = room;
    }
    m->list[m->n++] = *one;
    return 0;
}

static uint64_t file_sectors(const struct dr_image *image, const struct vmdk_extent *e)
{
    return dr_div_up(dr_file_size(image->files[e->file]), VMDK_SECTOR);
}

/* ------------------------------------------------------------------ reading and writing tables */

/* The directories are loaded. A table that is missing reads as empty; *usable = it is there. */
static int load_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                      uint8_t *buf, bool *usable, struct dr_error *err)
{
    uint32_t gde = e->gd[table];
    bool hole, good = gde == 0 || vmdk_table_fits(image, e, gde);
    memset(buf, 0, VMDK_GTES * 4);
    *usable = gde != 0;
    if (good && e->rgd && gde != 0)
        good = vmdk_table_fits(image, e, e->rgd[table]) && e->rgd[table] != gde;
    if (!good)
        return dr_fail(err, EIO,
                       "%s: grain directory entry %" PRIu64 " says sector %u%s: no table can be "
                       "there; `drover check -r all` may mend it",
                       vmdk_extent_path(image, e), table, gde,
                       e->rgd ? ", or its copy is not usable" : "");
    return *usable ? vmdk_read_table(image, e, gde, buf, &hole, err) : 0;
}

/* The copy first: after a crash it follows the table. */
static int store_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                       const uint8_t *buf, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    size_t len = (size_t)e->h.gtes * 4;
    int r = 0;
    if (e->rgd)
        r = dr_file_pwrite(f, buf, (uint64_t)e->rgd[table] * VMDK_SECTOR, len, err);
    return r < 0 ? r : dr_file_pwrite(f, buf, (uint64_t)e->gd[table] * VMDK_SECTOR, len, err);
}

void vmdk_forget_pages(struct dr_image *image, const struct vmdk_extent *e)
{
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, e->file, 0, INT64_MAX);
}

int vmdk_store_directory(struct dr_image *image, const struct vmdk_extent *e, bool copy,
                         struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    const uint32_t *directory = copy ? e->rgd : e->gd;
    size_t size = (size_t)e->h.n_tables * 4;
    CLEANUP_FREE uint8_t *buf = malloc(size + 1);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        put_le32(buf + t * 4, directory[t]);
    return dr_file_pwrite(f, buf, (copy ? e->h.rgd_off : e->h.gd_off) * VMDK_SECTOR, size, err);
}

/* Enter the new places; the old ones wait until nobody reads there any more. On return all of it is
 * durable. give: they come back to use. */
static int store_moves(struct dr_image *image, struct vmdk_extent *e, const struct moves *m,
                       bool give, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    bool usable;
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n;) {
        uint64_t table = m->list[i].table;
        r = load_table(image, e, table, buf, &usable, err);
        for (; i < m->n && m->list[i].table == table; i++)
            put_le32(buf + m->list[i].entry * 4, m->list[i].to);
        if (r == 0) {
            r = store_table(image, e, table, buf, err);
            e->torn |= r < 0;
        }
    }
    vmdk_forget_pages(image, e);
    if (r < 0)
        return r;
    pthread_mutex_lock(&image->lock);
    r = give ? dr_free_ahead(image, m->n) : 0;
    for (size_t i = 0; r == 0 && give && i < m->n; i++)
        if (m->list[i].from > 1)
            dr_free_later(image, (struct dr_freed){.file = image->files[e->file],
                                                   .host = (uint64_t)m->list[i].from * VMDK_SECTOR,
                                                   .len = e->grain});
    pthread_mutex_unlock(&image->lock);
    if (r < 0)
        return dr_fail_errno(err, ENOMEM, "%s", vmdk_extent_path(image, e));
    r = dr_file_flush(image->files[e->file], err);
    return r < 0 ? r : dr_image_flush(image, err);
}

/* ------------------------------------------------------------------ places */

static void begin_at_end(struct dr_image *image, struct vmdk_extent *e)
{
    if (e->next == 0)
        e->next = dr_max(e->h.overhead, file_sectors(image, e));
}

/* No grain is put into [from, end) from now on. */
static void keep_clear(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t end)
{
    DR_LOCK_SCOPE(&image->lock);
    size_t kept = 0;
    begin_at_end(image, e);
    for (size_t i = 0; i < e->n_free; i++)
        if (e->free[i] >= end || e->free[i] + e->h.grain <= from)
            e->free[kept++] = e->free[i];
    e->n_free = kept;
    e->next = dr_max(e->next, end);
}

/* At the end of the file, where nothing else is. */
static int append_grain(struct dr_image *image, struct vmdk_extent *e, uint32_t *sector,
                        struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->lock);
    begin_at_end(image, e);
    uint64_t at = dr_round_up(e->next, e->h.grain);
    if (at + e->h.grain > MAX_FILE_SECTORS)
        return dr_fail(err, ENOSPC, "%s: a sparse VMDK extent cannot grow beyond 2 TiB",
                       vmdk_extent_path(image, e));
    *sector = (uint32_t)at;
    e->next = at + e->h.grain;
    return 0;
}

/* ------------------------------------------------------------------ moving grains away */

/* Find the grains that reach into [from, end), and a new place for each. Refuse damaged tables. */
static int plan_moves(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t end,
                      struct moves *m, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    bool usable;
    int r = 0;
    for (uint64_t t = 0; r == 0 && t < vmdk_tables_used(e); t++) {
        r = load_table(image, e, t, buf, &usable, err);
        if (r == 0 && !vmdk_table_is_sound(image, e, t, buf))
            r = dr_fail(err, EIO, "%s: grain table %" PRIu64 " is damaged; `drover check` says how",
                        vmdk_extent_path(image, e), t);
        for (uint32_t i = 0; r == 0 && i < e->h.gtes; i++) {
            struct move one = {.table = t, .entry = i, .from = get_le32(buf + i * 4)};
            if (one.from <= 1 || one.from >= end || one.from + e->h.grain <= from)
                continue;
            r = append_grain(image, e, &one.to, err);
            if (r == 0)
                r = add_move(m, &one, vmdk_extent_path(image, e), err);
        }
    }
    return r;
}

static int copy_moves(struct dr_image *image, const struct vmdk_extent *e, const struct moves *m,
                      struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n; i++)
        r = dr_copy_within(f, (uint64_t)m->list[i].from * VMDK_SECTOR,
                           (uint64_t)m->list[i].to * VMDK_SECTOR, e->grain, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* When it returns, no grain stands in [from, end), and nobody reads there. */
static int move_grains_away(struct dr_image *image, struct vmdk_extent *e, uint64_t from,
                            uint64_t end, struct dr_error *err)
{
    struct moves m = {0};
    uint64_t next;
    keep_clear(image, e, from, end);
    next = e->next;
    int r = plan_moves(image, e, from, end, &m, err);
    if (r == 0)
        r = copy_moves(image, e, &m, err);
    if (r < 0) { /* nothing leads there: closing cuts the file again */
        DR_LOCK_SCOPE(&image->lock);
        e->next = next;
    } else if (m.n > 0) {
        r = store_moves(image, e, &m, true, err);
    }
    free(m.list);
    keep_clear(image, e, from, end); /* what moved has given its old place back */
    return r;
}

/* ------------------------------------------------------------------ new tables */

static bool touches(uint64_t at, uint64_t len, uint64_t from, uint64_t end)
{
    return at < end && from < at + len;
}

/* Does any metadata stand in [from, end)? Some programs have put theirs among the grains. */
static bool has_metadata(const struct vmdk_extent *e, uint64_t from, uint64_t end)
{
    const struct vmdk_header *h = &e->h;
    const uint32_t *const directories[] = {e->gd, e->rgd};
    if (touches(h->gd_off, h->gd_sectors, from, end) ||
        (e->rgd && touches(h->rgd_off, h->gd_sectors, from, end)) ||
        (h->desc_off && touches(h->desc_off, h->desc_len, from, end)))
        return true;
    for (size_t d = 0; d < 2; d++)
        for (uint64_t t = 0; directories[d] && t < h->n_tables; t++)
            if (directories[d][t] && touches(directories[d][t], h->gt_sectors, from, end))
                return true;
    return false;
}

/* Right behind the present metadata if only grains stand there, else at the end of the file. */
static void place_tables(const struct dr_image *image, const struct vmdk_extent *e,
                         struct vmdk_header *n, uint64_t *from, uint64_t *end)
{
    *from = e->h.overhead;
    *end = dr_round_up(vmdk_header_place_tables(n, *from), n->grain);
    if (!has_metadata(e, *from, *end)) {
        n->overhead = *end;
        return;
    }
    *from = dr_round_up(dr_max(e->next, file_sectors(image, e)), n->grain);
    *end = dr_round_up(vmdk_header_place_tables(n, *from), n->grain);
}

static int write_directory(struct dr_file *f, const struct vmdk_header *n, uint64_t sector,
                           struct dr_error *err)
{
    size_t size = (size_t)(n->gd_sectors * VMDK_SECTOR);
    CLEANUP_FREE uint8_t *buf = calloc(1, size + 1);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s: grain directory of %zu bytes", f->path, size);
    for (uint64_t t = 0; t < n->n_tables; t++)
        put_le32(buf + t * 4, (uint32_t)(sector + n->gd_sectors + t * n->gt_sectors));
    return size ? dr_file_pwrite(f, buf, sector * VMDK_SECTOR, size, err) : 0;
}

/* Empty tables stay a hole. */
static int copy_tables(struct dr_image *image, const struct vmdk_extent *e,
                       const struct vmdk_header *n, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint8_t buf[VMDK_GTES * 4];
    size_t len = (size_t)n->gtes * 4;
    bool usable;
    int r = 0;
    for (uint64_t t = 0; r == 0 && t < dr_min(e->h.n_tables, n->n_tables); t++) {
        if (t >= vmdk_tables_used(e))
            break; /* those are empty */
        r = load_table(image, e, t, buf, &usable, err);
        if (r < 0 || dr_is_zero(buf, len))
            continue;
        uint64_t at = n->gd_sectors + t * n->gt_sectors;
        r = dr_file_pwrite(f, buf, (n->gd_off + at) * VMDK_SECTOR, len, err);
        if (r == 0 && e->rgd)
            r = dr_file_pwrite(f, buf, (n->rgd_off + at) * VMDK_SECTOR, len, err);
    }
    return r;
}

static int write_tables(struct dr_image *image, const struct vmdk_extent *e,
                        const struct vmdk_header *n, uint64_t from, uint64_t end,
                        struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t size = dr_file_size(f), first = from * VMDK_SECTOR, last = end * VMDK_SECTOR;
    int r = 0;
    if (size > first)
        r = dr_file_zero(f, first, dr_min(size, last) - first, DR_FILE_ZERO_PUNCH, err);
    if (r == 0 && size < last)
        r = dr_file_truncate(f, last, err);
    if (r == 0)
        r = write_directory(f, n, n->gd_off, err);
    if (r == 0 && e->rgd)
        r = write_directory(f, n, n->rgd_off, err);
    if (r == 0)
        r = copy_tables(image, e, n, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* One sector. What is not changed stays as it is, known or not. */
static int switch_header(struct dr_image *image, struct vmdk_extent *e, const struct vmdk_header *n,
                         struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint8_t buf[VMDK_HEADER_SIZE];
    bool moved = n->gd_off != e->h.gd_off;
    int r = dr_file_pread(f, buf, 0, sizeof(buf), err);
    if (r < 0)
        return r;
    vmdk_header_patch(n, buf);
    r = dr_file_pwrite(f, buf, 0, sizeof(buf), err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    bool unclean = e->h.unclean;
    e->h = *n;
    e->h.unclean = unclean;
    if (moved)
        e->tables_at = (uint32_t)(n->gd_off + n->gd_sectors);
    dr_page_forget(image, e->file, 0, INT64_MAX);
    return 0;
}

/* The old tables, if they stand alone: the space comes back where the file system can do that. */
static void punch_old_tables(struct dr_image *image, const struct vmdk_extent *e,
                             const struct vmdk_header *old)
{
    uint64_t from = old->flags & VMDK_FLAG_RGD ? dr_min(old->rgd_off, old->gd_off) : old->gd_off;
    uint64_t half = old->gd_sectors + old->n_tables * old->gt_sectors;
    uint64_t end = old->gd_off + half;
    bool regular = end <= old->overhead && old->desc_off + old->desc_len <= from;
    if (old->flags & VMDK_FLAG_RGD)
        regular &= old->gd_off == old->rgd_off + half;
    if (regular && !touches(e->h.gd_off, 1, from, end))
        dr_file_zero(image->files[e->file], from * VMDK_SECTOR, (end - from) * VMDK_SECTOR,
                     DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
}

/* The header leads to tables in [from, end), where only free space is. */
static int switch_tables(struct dr_image *image, struct vmdk_extent *e, const struct vmdk_header *n,
                         uint64_t from, uint64_t end, struct dr_error *err)
{
    int r = write_tables(image, e, n, from, end, err);
    if (r < 0) { /* they hold nothing that counts */
        dr_file_zero(image->files[e->file], from * VMDK_SECTOR, (end - from) * VMDK_SECTOR,
                     DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
        return r;
    }
    return switch_header(image, e, n, err);
}

int vmdk_place_row(struct dr_image *image, struct vmdk_extent *e, uint64_t from,
                   struct dr_error *err)
{
    struct vmdk_header n = e->h;
    uint64_t end = dr_round_up(vmdk_header_place_tables(&n, from), n.grain);
    if (from == n.overhead)
        n.overhead = end;
    return switch_tables(image, e, &n, from, end, err);
}

static int move_tables(struct dr_image *image, struct vmdk_extent *e, struct vmdk_header *n,
                       struct dr_error *err)
{
    const struct vmdk_header old = e->h;
    uint64_t from, end;
    place_tables(image, e, n, &from, &end);
    if (end + n->grain > MAX_FILE_SECTORS)
        return dr_fail(err, EFBIG,
                       "%s: a disk of %" PRIu64 " bytes is too big for this sparse VMDK extent",
                       vmdk_extent_path(image, e), n->capacity * VMDK_SECTOR);
    int r = move_grains_away(image, e, from, end, err);
    if (r == 0)
        r = switch_tables(image, e, n, from, end, err);
    if (r == 0)
        punch_old_tables(image, e, &old);
    return r;
}

/* Do the first n tables and their copies stand in rows, as programs lay them out? What a directory
 * has beyond the tables in use may be anything, and then nothing may be written there. */
static bool stand_in_rows(const struct dr_image *image, const struct vmdk_extent *e, uint64_t n)
{
    const uint32_t *const directories[] = {e->gd, e->rgd};
    for (size_t d = 0; d < 2; d++)
        for (uint64_t t = 0; directories[d] && t < n; t++)
            if (directories[d][t] != directories[d][0] + t * e->h.gt_sectors ||
                !vmdk_table_fits(image, e, directories[d][t]))
                return false;
    return n == 0 || !e->gd || !e->rgd || e->gd[0] != e->rgd[0];
}

/* Fewer tables that stand where they did are fine, as long as the directory in front of them does
 * not become shorter. */
static bool tables_may_stay(const struct dr_image *image, const struct vmdk_extent *e,
                            const struct vmdk_header *n)
{
    if (n->n_tables > e->h.n_tables || n->gd_sectors != e->h.gd_sectors)
        return false;
    return n->n_tables <= vmdk_tables_used(e) || stand_in_rows(image, e, n->n_tables);
}

int vmdk_set_capacity(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                      struct dr_error *err)
{
    struct vmdk_header n = e->h;
    if (n.cowd)
        return vmdk_cowd_set_capacity(image, e, sectors, err);
    int r = vmdk_header_set_capacity(&n, vmdk_extent_path(image, e), sectors, err);
    if (r == 0)
        r = vmdk_load_directories(image, e, err);
    if (r == 0 && !tables_may_stay(image, e, &n))
        r = move_tables(image, e, &n, err);
    else if (r == 0 && sectors != e->h.capacity)
        r = switch_header(image, e, &n, err);
    vmdk_drop_directories(e);
    return r;
}

/* ------------------------------------------------------------------ behind the end */

/* The first `trusted` tables were in use. */
static int find_behind(struct dr_image *image, const struct vmdk_extent *e, uint64_t trusted,
                       struct moves *m, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    uint64_t first = dr_div_up(e->len, e->grain), end = e->h.n_tables;
    bool usable;
    int r = 0;
    if (end > trusted && !stand_in_rows(image, e, end))
        end = trusted;
    for (uint64_t t = first / e->h.gtes; r == 0 && t < end; t++) {
        r = load_table(image, e, t, buf, &usable, err);
        bool sound = r == 0 && vmdk_table_is_sound(image, e, t, buf);
        uint32_t i = t == first / e->h.gtes ? (uint32_t)(first % e->h.gtes) : 0;
        for (; r == 0 && i < e->h.gtes; i++) {
            struct move one = {.table = t, .entry = i, .from = get_le32(buf + i * 4)};
            if (one.from && !sound)
                one.from = 1; /* it may lead to what is in use: nothing there is given back */
            if (one.from)
                r = add_move(m, &one, vmdk_extent_path(image, e), err);
        }
    }
    return r;
}

int vmdk_clear_last_grain(struct dr_image *image, const struct vmdk_extent *e, const uint8_t *buf,
                          struct dr_error *err)
{
    uint64_t grain = e->len / e->grain, used = e->len % e->grain;
    uint32_t gte = get_le32(buf + grain % e->h.gtes * 4);
    if (gte <= 1 || !vmdk_gte_fits(image, e, grain, gte))
        return 0;
    return dr_file_zero(image->files[e->file], (uint64_t)gte * VMDK_SECTOR + used, e->grain - used,
                        0, err);
}

static int clear_last_grain(struct dr_image *image, const struct vmdk_extent *e,
                            struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    bool usable;
    if (e->len % e->grain == 0)
        return 0;
    int r = load_table(image, e, e->len / e->grain / e->h.gtes, buf, &usable, err);
    return r < 0 ? r : vmdk_clear_last_grain(image, e, buf, err);
}

int vmdk_clear_behind(struct dr_image *image, struct vmdk_extent *e, uint64_t was, bool give,
                      struct dr_error *err)
{
    uint64_t trusted = dr_min(dr_div_up(was, e->grain * e->h.gtes), e->h.n_tables);
    struct moves m = {0};
    if (e->h.cowd)
        return vmdk_cowd_clear_behind(image, e, was, give, err);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = find_behind(image, e, trusted, &m, err);
    if (r == 0 && m.n > 0)
        r = store_moves(image, e, &m, give, err);
    if (r == 0)
        r = clear_last_grain(image, e, err);
    free(m.list);
    vmdk_drop_directories(e);
    return r < 0 ? r : dr_file_flush(image->files[e->file], err);
}

/* ------------------------------------------------------------------ zeros over the parent */

static int plan_mask(struct dr_image *image, struct vmdk_extent *e, uint64_t first, uint64_t end,
                     struct moves *m, struct dr_error *err)
{
    int r = 0;
    for (uint64_t g = first; r == 0 && g < end; g++) {
        struct move one = {.table = g / e->h.gtes, .entry = (uint32_t)(g % e->h.gtes), .to = 1};
        if (!vmdk_has_zero_grains(e))
            r = append_grain(image, e, &one.to, err);
        if (r == 0)
            r = add_move(m, &one, vmdk_extent_path(image, e), err);
    }
    return r;
}

int vmdk_mask(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t to,
              struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    struct moves m = {0};
    uint64_t next = e->next;
    if (e->h.cowd)
        return vmdk_cowd_mask(image, e, from, to, err);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = plan_mask(image, e, dr_div_up(from, e->grain), dr_div_up(to, e->grain), &m, err);
    if (r == 0 && m.n > 0 && !vmdk_has_zero_grains(e)) /* in a row, and without space */
        r = dr_file_zero(f, (uint64_t)m.list[0].to * VMDK_SECTOR, m.n * e->grain,
                         DR_FILE_ZERO_PUNCH, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0 && m.n > 0)
        r = store_moves(image, e, &m, false, err);
    else if (r < 0)
        e->next = next;
    free(m.list);
    vmdk_drop_directories(e);
    return r;
}
