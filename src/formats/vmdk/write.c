/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing where grains are: reserve, publish, cancel, reuse. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"

/* Indices in dr_reservation.priv, where reserve leaves values for publish and cancel. */
enum {
    PRIV_EXTENT, /* index in state->extents */
    PRIV_POS,    /* the entry in the table, 0: publish has nothing to do */
    PRIV_RPOS,   /* ... and in its copy, 0: there is none */
    PRIV_NEW,    /* the entry's new value */
    PRIV_FREE,   /* sector of the grain that loses its entry, 0: none */
    PRIV_ALLOC,  /* sector of the grain that cancel gives back, 0: none */
};

#define MAX_FILE_SECTORS (UINT64_C(1) << 32) /* entries have 32 bits */

/* ------------------------------------------------------------------ allocation */

static int alloc_grain(struct dr_image *image, struct vmdk_extent *e, uint32_t *sector,
                       struct dr_error *err)
{
    if (e->n_free > 0) {
        *sector = e->free[--e->n_free];
        return 0;
    }
    if (e->h.cowd)
        return vmdk_cowd_take(image, e, e->h.grain, sector, err);
    if (e->next == 0)
        e->next =
            dr_max(e->h.overhead, dr_div_up(dr_file_size(image->files[e->file]), VMDK_SECTOR));
    uint64_t at = dr_round_up(e->next, e->h.grain);
    if (at + e->h.grain > MAX_FILE_SECTORS)
        return dr_fail(err, ENOSPC, "%s: a sparse VMDK extent cannot grow beyond 2 TiB",
                       vmdk_extent_path(image, e));
    e->next = at + e->h.grain;
    *sector = (uint32_t)at;
    return 0;
}

/* Without memory for the list the place is lost until `check -r leaks`. */
static void give_back(struct vmdk_extent *e, uint32_t sector)
{
    if (sector + e->h.grain == e->next) {
        e->next = sector;
        return;
    }
    size_t n = e->n_free;
    if ((n & (n - 1)) == 0) { /* full at each power of two */
        uint32_t *p = realloc(e->free, (n ? n * 2 : 1) * sizeof(*p));
        if (!p)
            return;
        e->free = p;
    }
    e->free[e->n_free++] = sector;
}

/* ------------------------------------------------------------------ reserve */

/* One call of reserve, with everything the helpers need. */
struct request {
    struct dr_image *image;
    struct vmdk_extent *e;
    uint64_t off, len;  /* guest */
    uint64_t grain;     /* index in the extent */
    uint64_t grain_off; /* guest offset of the grain */
    uint64_t grain_len; /* bytes of it that belong to the disk */
    struct vmdk_slot slot;
    struct dr_page *page, *copy;
    uint32_t gte;
    bool keep; /* zeros keep the place they have */
};

static bool whole_grain(const struct request *q)
{
    return q->off == q->grain_off && q->len == q->grain_len;
}

/* Compare as much of the table and of its copy as the two pages hold. If they differ, the redundant
 * directory may be damaged, and what it points to may be a grain: it must not be written to. */
static bool copy_is_equal(const struct request *q)
{
    const struct vmdk_slot *s = &q->slot;
    uint64_t before = s->entry * 4, behind = (q->e->h.gtes - s->entry) * 4;
    before = dr_min(before, dr_min(s->pos % DR_PAGE_SIZE, s->rpos % DR_PAGE_SIZE));
    behind = dr_min(behind, DR_PAGE_SIZE - dr_max(s->pos % DR_PAGE_SIZE, s->rpos % DR_PAGE_SIZE));
    return memcmp(dr_page_at(q->page, s->pos - before), dr_page_at(q->copy, s->rpos - before),
                  before + behind) == 0;
}

/* Find the entry; both pages are in memory afterwards. COWD may have no table: slot.pos is 0. */
static int look_up(struct request *q, struct dr_error *err)
{
    int r = vmdk_slot(q->image, q->e, q->grain, &q->slot, err);
    if (r == 0 && q->slot.pos == 0 && q->e->h.cowd)
        return 0;
    if (r == 0 && q->slot.pos)
        r = vmdk_slot_copy(q->image, q->e, &q->slot);
    if (r < 0)
        return r;
    if (q->slot.pos == 0 || (vmdk_has_copies(q->e) && q->slot.rpos == 0))
        return dr_fail(err, EIO,
                       "%s: grain directory entry %llu has no usable %s; `drover check -r all` "
                       "mends it",
                       vmdk_extent_path(q->image, q->e), (unsigned long long)q->slot.table,
                       q->slot.pos == 0 ? "table" : "redundant table");
    r = dr_page_get(q->image, q->e->file, q->slot.pos, &q->page);
    if (r == 0 && q->slot.rpos)
        r = dr_page_get(q->image, q->e->file, q->slot.rpos, &q->copy);
    if (r < 0)
        return r;
    q->gte = get_le32(dr_page_at(q->page, q->slot.pos));
    if (!q->copy || copy_is_equal(q))
        return 0;
    return dr_fail(err, EIO,
                   "%s: grain table %llu and its redundant copy at byte %llu differ; `drover check "
                   "-r all` mends it",
                   vmdk_extent_path(q->image, q->e), (unsigned long long)q->slot.table,
                   (unsigned long long)q->slot.rpos);
}

/* The entry becomes value when published. */
static int link_grain(const struct request *q, uint32_t value, struct dr_reservation *r)
{
    struct dr_page *page;
    int ret = dr_reserve_page(q->image, r, q->e->file, q->slot.pos, 4, 2, &page);
    if (ret == 0 && q->slot.rpos)
        ret = dr_reserve_page(q->image, r, q->e->file, q->slot.rpos, 4, 2, &page);
    if (ret < 0)
        return ret;
    r->off = q->grain_off;
    r->len = q->grain_len;
    r->priv[PRIV_POS] = q->slot.pos;
    r->priv[PRIV_RPOS] = q->slot.rpos;
    r->priv[PRIV_NEW] = value;
    return 0;
}

static void in_place(const struct request *q, uint64_t host, enum dr_todo todo,
                     struct dr_reservation *r)
{
    r->off = q->off;
    r->len = q->len;
    r->file = q->image->files[q->e->file];
    r->host = host;
    r->todo = todo;
}

static uint64_t grain_host(const struct request *q)
{
    return (uint64_t)q->gte * VMDK_SECTOR + (q->off - q->grain_off);
}

/* Only COWD lacks some: there a table comes with the first of its grains. */
static int need_table(struct request *q, struct dr_error *err)
{
    if (q->slot.pos != 0)
        return 0;
    int r = vmdk_cowd_make_table(q->image, q->e, q->slot.table, err);
    return r < 0 ? r : vmdk_slot(q->image, q->e, q->grain, &q->slot, err);
}

static int reserve_data(struct request *q, struct dr_reservation *r, struct dr_error *err)
{
    if (vmdk_gte_fits(q->image, q->e, q->grain, q->gte)) {
        in_place(q, grain_host(q), DR_TODO_WRITE, r);
        return 0;
    }
    uint32_t sector = 0;
    int ret = need_table(q, err);
    if (ret == 0)
        ret = alloc_grain(q->image, q->e, &sector, err);
    if (ret < 0)
        return ret;
    ret = link_grain(q, sector, r);
    if (ret < 0) {
        give_back(q->e, sector);
        return ret;
    }
    r->file = q->image->files[q->e->file];
    r->host = (uint64_t)sector * VMDK_SECTOR;
    r->pad = q->e->grain - q->grain_len;
    r->todo = DR_TODO_WRITE;
    r->priv[PRIV_ALLOC] = sector;
    return 0;
}

/* An allocated grain stays allocated and is zeroed in the file, since not every program that reads
 * VMDKs knows the entry that says zeros; but where the extent has such entries, and the zeros need
 * no place, it is given up. */
static int reserve_zero(struct request *q, struct dr_reservation *r)
{
    bool unmap = !q->keep && vmdk_has_zero_grains(q->e) && whole_grain(q);
    r->todo = DR_TODO_NOTHING;
    r->off = q->off;
    r->len = q->len;
    if (q->gte == 1)
        return 0;
    if (q->gte != 0 && !unmap) {
        in_place(q, grain_host(q), DR_TODO_ZERO_HOST, r);
        if (q->off + q->len == q->grain_off + q->grain_len && q->off == q->grain_off)
            r->pad = q->e->grain - q->grain_len;
        return 0;
    }
    if (!vmdk_has_zero_grains(q->e) || !whole_grain(q))
        return -ENOTSUP;
    int ret = link_grain(q, 1, r);
    if (ret == 0)
        r->priv[PRIV_FREE] = q->gte;
    return ret;
}

static int reserve_hole(struct request *q, struct dr_reservation *r)
{
    if (!whole_grain(q))
        return -ENOTSUP;
    r->todo = DR_TODO_NOTHING;
    r->off = q->off;
    r->len = q->len;
    if (q->gte == 0)
        return 0;
    int ret = link_grain(q, 0, r);
    if (ret == 0 && q->gte > 1)
        r->priv[PRIV_FREE] = q->gte;
    return ret;
}

static int nothing_to_do(const struct request *q, struct dr_reservation *r)
{
    r->off = q->off;
    r->len = q->len;
    r->todo = DR_TODO_NOTHING;
    return 0;
}

static int reserve_lower(const struct request *q, struct dr_reservation *r)
{
    uint32_t sector = q->gte > 1 ? vmdk_lower_take(q->e, q->gte) : 0;
    if (!sector)
        return nothing_to_do(q, r);
    int ret = link_grain(q, sector, r);
    if (ret < 0) {
        vmdk_lower_give_up(q->e, sector);
        return ret;
    }
    r->file = q->image->files[q->e->file];
    r->from = (uint64_t)q->gte * VMDK_SECTOR;
    r->host = (uint64_t)sector * VMDK_SECTOR;
    r->bytes = q->e->grain;
    r->todo = DR_TODO_COPY;
    r->priv[PRIV_FREE] = q->gte;
    r->priv[PRIV_ALLOC] = sector;
    return 0;
}

static int reserve_sparse(struct request *q, enum dr_want want, struct dr_reservation *r,
                          struct dr_error *err)
{
    uint64_t rel = q->off - q->e->start;
    q->grain = rel / q->e->grain;
    q->grain_off = q->e->start + q->grain * q->e->grain;
    q->grain_len = vmdk_grain_len(q->e, q->grain);
    if (!atomic_load(&q->e->marked))
        return dr_need_begin(q->image);
    int ret = look_up(q, err);
    if (ret < 0)
        return ret;
    if (q->gte == 1 && !vmdk_has_zero_grains(q->e))
        return dr_fail(err, EIO,
                       "%s: grain table entry 1 (at byte %llu) in an extent without zeroed grains",
                       vmdk_extent_path(q->image, q->e), (unsigned long long)q->slot.pos);
    if (q->gte > 1 && !vmdk_gte_fits(q->image, q->e, q->grain, q->gte))
        return dr_fail(err, EIO,
                       "%s: grain table entry at byte %llu says sector %u, which cannot "
                       "be",
                       vmdk_extent_path(q->image, q->e), (unsigned long long)q->slot.pos, q->gte);
    if (want == DR_WANT_DATA)
        return reserve_data(q, r, err);
    if (want == DR_WANT_LOWER)
        return reserve_lower(q, r);
    return want == DR_WANT_ZERO ? reserve_zero(q, r) : reserve_hole(q, r);
}

static int reserve_flat(struct request *q, enum dr_want want, struct dr_reservation *r)
{
    if (want == DR_WANT_HOLE)
        return -ENOTSUP;
    in_place(q, q->e->host + (q->off - q->e->start),
             want == DR_WANT_ZERO ? DR_TODO_ZERO_HOST : DR_TODO_WRITE, r);
    return 0;
}

int vmdk_check_writable(const struct dr_image *image, const struct vmdk_extent *e, uint64_t off,
                        struct dr_error *err)
{
    if (e->access == VMDK_RW && e->type != VMDK_ZERO)
        return 0;
    return dr_fail(err, EROFS, "%s: guest offset %llu is in a%s extent that cannot be written",
                   image->path, (unsigned long long)off,
                   e->type == VMDK_ZERO ? " ZERO" : " read-only");
}

int vmdk_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                 uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    (void)host_len;
    struct request q = {.image = image, .e = vmdk_extent_at(image, off), .off = off, .len = len};
    *r = (struct dr_reservation){.want = want};
    if (want == DR_WANT_ZERO_KEPT) {
        q.keep = true;
        want = DR_WANT_ZERO;
    }
    r->priv[PRIV_EXTENT] = (uint64_t)(q.e - vmdk_of(image)->extents);
    if (want == DR_WANT_CODED)
        return -ENOTSUP;
    if ((q.e->type == VMDK_ZERO && want == DR_WANT_ZERO) ||
        (q.e->type != VMDK_SPARSE && want == DR_WANT_LOWER))
        return nothing_to_do(&q, r);
    int ret = vmdk_check_writable(image, q.e, off, err);
    if (ret < 0)
        return ret;
    return q.e->type == VMDK_SPARSE ? reserve_sparse(&q, want, r, err) : reserve_flat(&q, want, r);
}

/* ------------------------------------------------------------------ publish, cancel, reuse */

void vmdk_publish(struct dr_image *image, struct dr_reservation *r)
{
    struct vmdk_extent *e = &vmdk_of(image)->extents[r->priv[PRIV_EXTENT]];
    if (r->priv[PRIV_POS] == 0)
        return;
    uint8_t entry[4];
    put_le32(entry, (uint32_t)r->priv[PRIV_NEW]);
    if (r->priv[PRIV_RPOS])
        dr_page_put(image, r->pins[1].page, r->priv[PRIV_RPOS], entry, sizeof(entry));
    dr_page_put(image, r->pins[0].page, r->priv[PRIV_POS], entry, sizeof(entry));
    if (r->priv[PRIV_FREE])
        vmdk_compact_lost(e, (uint32_t)r->priv[PRIV_FREE]);
    if (r->priv[PRIV_FREE])
        dr_free_later(image, (struct dr_freed){.file = image->files[e->file],
                                               .host = r->priv[PRIV_FREE] * VMDK_SECTOR,
                                               .len = e->grain});
}

void vmdk_cancel(struct dr_image *image, struct dr_reservation *r)
{
    struct vmdk_extent *e = &vmdk_of(image)->extents[r->priv[PRIV_EXTENT]];
    /* Part of it may be written: punched like any other freed grain, else it leaks at close. */
    if (r->priv[PRIV_ALLOC])
        dr_free_later(image, (struct dr_freed){.file = image->files[e->file],
                                               .host = r->priv[PRIV_ALLOC] * VMDK_SECTOR,
                                               .len = e->grain});
}

void vmdk_reuse(struct dr_image *image, const struct dr_freed *gone)
{
    struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        struct vmdk_extent *e = &s->extents[i];
        uint32_t sector = (uint32_t)(gone->host / VMDK_SECTOR);
        if (e->type != VMDK_SPARSE || image->files[e->file] != gone->file)
            continue;
        if (gone->len >= e->grain && !vmdk_is_kept(e, sector)) /* a table may be shorter */
            give_back(e, sector);
        return;
    }
}

int vmdk_tidy(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t end;
    if (e->spare_table && e->spare_table + e->h.gt_sectors == e->next)
        e->next = e->spare_table;
    e->spare_table = 0;
    end = e->next * VMDK_SECTOR;
    for (size_t i = 0; i < e->n_free; i++) { /* where nothing can be punched, the space stays */
        uint64_t at = (uint64_t)e->free[i] * VMDK_SECTOR;
        if (at + e->grain <= dr_min(end, dr_file_size(f)))
            dr_file_zero(f, at, e->grain, DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    }
    if (end == 0 || dr_file_size(f) <= end)
        return 0;
    return dr_file_truncate(f, end, err);
}
