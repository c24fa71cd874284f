/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* After a crash, and after a commit: what is done to tables outside the page cache. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"

int vmdk_read_table(struct dr_image *image, const struct vmdk_extent *e, uint32_t gde, uint8_t *buf,
                    bool *hole, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t off = (uint64_t)gde * VMDK_SECTOR, len = (uint64_t)e->h.gtes * 4, run;
    enum dr_file_extent kind;
    int r = dr_file_extent(f, off, len, &kind, &run, err);
    if (r < 0)
        return r;
    *hole = kind == DR_FILE_HOLE && run >= len;
    if (!*hole)
        return dr_file_pread(f, buf, off, (size_t)len, err);
    memset(buf, 0, (size_t)len);
    return 0;
}

/* An interrupted shrinking leaves entries behind the end, which nobody reads. */
static bool may_stay_behind(const struct dr_image *image, const struct vmdk_extent *e, uint32_t gte)
{
    return gte >= e->h.overhead &&
           dr_inside((uint64_t)gte * VMDK_SECTOR, VMDK_SECTOR, dr_file_size(image->files[e->file]));
}

bool vmdk_table_is_sound(const struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                         const uint8_t *buf)
{
    for (uint32_t i = 0; i < e->h.gtes; i++) {
        uint64_t grain = table * e->h.gtes + i;
        uint32_t gte = get_le32(buf + i * 4);
        if (gte == 0 || (gte == 1 && vmdk_has_zero_grains(e)))
            continue;
        if (grain * e->grain >= e->len ? !may_stay_behind(image, e, gte)
                                       : !vmdk_gte_fits(image, e, grain, gte))
            return false;
    }
    return true;
}

/* ------------------------------------------------------------------ recover */

#define MOST_SUSPECTS 1024u

/* Redundant tables that differ from theirs and stand among the grains: the numbers of the tables.
 */
struct suspects {
    uint64_t *list;
    size_t n;
};

static int add_suspect(struct suspects *s, uint64_t table, const char *path, struct dr_error *err)
{
    if ((s->n & (s->n - 1)) == 0) { /* full at each power of two */
        uint64_t *list = realloc(s->list, (s->n ? s->n * 2 : 1) * sizeof(*list));
        if (!list)
            return dr_fail_errno(err, ENOMEM, "%s", path);
        s->list = list;
    }
    s->list[s->n++] = table;
    return 0;
}

static int refuse_copy(const struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                       struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: grain table %llu and its redundant copy at sector %u differ, and not only "
                   "as after a crash; `drover check -r all` mends it",
                   vmdk_extent_path(image, e), (unsigned long long)table, e->rgd[table]);
}

static int write_copy(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                      const uint8_t *primary, struct dr_error *err)
{
    size_t len = (size_t)e->h.gtes * 4;
    uint64_t at = (uint64_t)e->rgd[table] * VMDK_SECTOR;
    int r = dr_file_pwrite(image->files[e->file], primary, at, len, err);
    DR_LOCK_SCOPE(&image->lock); /* the page may be in memory: it has a part of the table, too */
    dr_page_forget(image, e->file, at, len);
    return r;
}

/* The table is what every reader uses: its copy follows. */
static int mend_table(struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                      struct suspects *suspects, struct dr_error *err)
{
    uint8_t primary[VMDK_GTES * 4], copy[VMDK_GTES * 4];
    size_t len = (size_t)e->h.gtes * 4;
    uint32_t gde = e->gd[table], rgde = e->rgd[table];
    bool hole, copy_hole;
    if (gde == 0 && rgde == 0)
        return 0;
    if (!vmdk_table_fits(image, e, gde) || !vmdk_table_fits(image, e, rgde))
        return dr_fail(err, EIO,
                       "%s: grain directory entry %llu says sector %u, its copy %u: one of them "
                       "cannot be; `drover check -r all` mends it",
                       vmdk_extent_path(image, e), (unsigned long long)table, gde, rgde);
    int r = vmdk_read_table(image, e, gde, primary, &hole, err);
    if (r == 0)
        r = vmdk_read_table(image, e, rgde, copy, &copy_hole, err);
    if (r < 0 || (hole && copy_hole) || memcmp(primary, copy, len) == 0)
        return r;
    /* A crash leaves the copy behind, and nothing else. */
    if (!vmdk_table_is_sound(image, e, table, primary))
        return refuse_copy(image, e, table, err);
    return rgde < e->h.overhead ? write_copy(image, e, table, primary, err)
                                : add_suspect(suspects, table, vmdk_extent_path(image, e), err);
}

/* ------------------------------------------------------------------ copies among the grains */

static bool overlaps(const struct vmdk_extent *e, uint32_t copy, uint64_t sector, uint64_t sectors)
{
    return sector < copy + e->h.gt_sectors && copy < sector + sectors;
}

/* Does a directory, or another table, stand in the place of the copy? */
static bool is_metadata(const struct vmdk_extent *e, uint64_t table)
{
    uint32_t copy = e->rgd[table];
    if (overlaps(e, copy, e->h.gd_off, e->h.gd_sectors) ||
        overlaps(e, copy, e->h.rgd_off, e->h.gd_sectors) ||
        (e->h.desc_off && overlaps(e, copy, e->h.desc_off, e->h.desc_len)))
        return true;
    for (uint64_t t = 0; t < e->h.n_tables; t++)
        if ((e->gd[t] && overlaps(e, copy, e->gd[t], e->h.gt_sectors)) ||
            (t != table && e->rgd[t] && overlaps(e, copy, e->rgd[t], e->h.gt_sectors)))
            return true;
    return false;
}

static int refuse_grains(const struct dr_image *image, const struct vmdk_extent *e,
                         const struct suspects *s, const uint8_t *buf, struct dr_error *err)
{
    for (uint32_t i = 0; i < e->h.gtes; i++) {
        uint32_t gte = get_le32(buf + i * 4);
        for (size_t k = 0; gte > 1 && k < s->n; k++)
            if (overlaps(e, e->rgd[s->list[k]], gte, e->h.grain))
                return refuse_copy(image, e, s->list[k], err);
    }
    return 0;
}

/* Nothing else stands where these copies do: they are what they are said to be, and follow. Each is
 * compared with all entries, so there must not be too many. */
static int mend_suspects(struct dr_image *image, const struct vmdk_extent *e,
                         const struct suspects *s, struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    bool hole;
    int r = 0;
    for (size_t k = 0; r == 0 && k < s->n; k++)
        if (s->n > MOST_SUSPECTS || is_metadata(e, s->list[k]))
            r = refuse_copy(image, e, s->list[k], err);
    for (uint64_t t = 0; r == 0 && s->n > 0 && t < vmdk_tables_used(e); t++) {
        r = vmdk_table_fits(image, e, e->gd[t])
                ? vmdk_read_table(image, e, e->gd[t], buf, &hole, err)
                : 0;
        if (r == 0 && vmdk_table_fits(image, e, e->gd[t]))
            r = refuse_grains(image, e, s, buf, err);
    }
    for (size_t k = 0; r == 0 && k < s->n; k++) {
        r = vmdk_read_table(image, e, e->gd[s->list[k]], buf, &hole, err);
        if (r == 0)
            r = write_copy(image, e, s->list[k], buf, err);
    }
    return r;
}

static int mend_copies(struct dr_image *image, const struct vmdk_extent *e, struct dr_error *err)
{
    struct suspects s = {0};
    int r = 0;
    for (uint64_t i = 0; r == 0 && e->rgd && i < vmdk_tables_used(e); i++)
        r = mend_table(image, e, i, &s, err);
    if (r == 0)
        r = mend_suspects(image, e, &s, err);
    free(s.list);
    return r;
}

static int recover_extent(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    if (e->h.cowd)
        return vmdk_cowd_recover(image, e, err);
    int r = vmdk_has_copies(e) ? vmdk_load_directories(image, e, err) : 0;
    if (r == 0)
        r = mend_copies(image, e, err);
    vmdk_drop_directories(e);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = vmdk_mark(image, e, false, false, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

int vmdk_recover(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = vmdk_finish_redo(image, err);
    for (size_t i = 0; r == 0 && i < s->n_extents; i++) {
        struct vmdk_extent *e = &s->extents[i];
        if (e->type == VMDK_SPARSE && e->access == VMDK_RW && (e->h.unclean || e->h.inconsistent))
            r = recover_extent(image, e, err);
    }
    return r;
}

/* ------------------------------------------------------------------ trim */

/* The sector behind the last thing that anything points to. */
static int used_end(struct dr_image *image, const struct vmdk_extent *e, uint64_t *end,
                    struct dr_error *err)
{
    uint8_t buf[VMDK_GTES * 4];
    *end = dr_max(e->h.overhead, e->h.gd_off + e->h.gd_sectors);
    if (e->rgd)
        *end = dr_max(*end, e->h.rgd_off + e->h.gd_sectors);
    if (e->h.desc_off)
        *end = dr_max(*end, e->h.desc_off + e->h.desc_len);
    for (uint64_t t = 0; t < e->h.n_tables; t++) {
        const uint32_t gdes[2] = {e->gd[t], e->rgd ? e->rgd[t] : 0};
        bool hole = true;
        for (int i = 0; i < 2; i++)
            if (gdes[i])
                *end = dr_max(*end, gdes[i] + e->h.gt_sectors);
        int r = vmdk_table_fits(image, e, gdes[0])
                    ? vmdk_read_table(image, e, gdes[0], buf, &hole, err)
                    : 0;
        if (r < 0)
            return r;
        for (uint32_t i = 0; !hole && i < e->h.gtes; i++) {
            uint32_t gte = get_le32(buf + i * 4);
            if (gte > 1)
                *end = dr_max(*end, gte + e->h.grain);
        }
    }
    return 0;
}

/* Forget the free grains behind the new end: they must not be handed out again. */
static void forget_free(struct dr_image *image, struct vmdk_extent *e, uint64_t end)
{
    DR_LOCK_SCOPE(&image->lock);
    size_t kept = 0;
    for (size_t i = 0; i < e->n_free; i++)
        if (e->free[i] < end)
            e->free[kept++] = e->free[i];
    /* n_free may grow again at any count: give_back() relies on room up to a power of two. */
    e->n_free = kept;
    e->next = 0;
    if (e->spare_table >= end) /* no link leads there, and none is on its way: all was flushed */
        e->spare_table = 0;
}

int vmdk_cut(struct dr_image *image, struct vmdk_extent *e, uint64_t end, struct dr_error *err)
{
    forget_free(image, e, end);
    return dr_file_truncate(image->files[e->file], end * VMDK_SECTOR, err);
}

static int trim_extent(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t end = 0;
    if (e->h.cowd)
        return vmdk_cowd_trim(image, e, err);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0)
        r = used_end(image, e, &end, err);
    vmdk_drop_directories(e);
    if (r < 0)
        return r;
    end = dr_round_up(end, e->h.grain);
    if (end * VMDK_SECTOR >= dr_file_size(f))
        return 0;
    r = vmdk_cut(image, e, end, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

int vmdk_trim(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    int r = 0;
    for (size_t i = 0; r == 0 && i < s->n_extents; i++)
        if (s->extents[i].type == VMDK_SPARSE && s->extents[i].access == VMDK_RW)
            r = trim_extent(image, &s->extents[i], err);
    return r;
}
