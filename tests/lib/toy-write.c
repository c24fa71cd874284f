/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The toy's changes: counts, roots that move, level-2 tables of its own, reserve and publish, and
 * what becomes of freed places. */
#include "toy.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

/* Orders of the tables: a count block, its root, a level-2 table, the link to it. A level-2 table
 * is one level below its link, so a new table is durable before anything points to it. */
enum { LEVEL_BLOCK = 0, LEVEL_ROOT = 1, LEVEL_L2 = 2, LEVEL_L1 = 3 };

/* reservation: what publish needs. Pin 0 is the level-2 entry, then comes the count of the new
 * place, last that of the old one. */
enum { PIN_L2, PIN_COUNT };
enum { PR_AT, PR_ENTRY, PR_NEW = 3, PR_OLD };

/* ------------------------------------------------------------------ counts
 *
 * A cluster that is handed out has its count raised at once, and a cancel lowers it again: nothing
 * on disk ever pointed to it. Counts of what was in use go down only in release and reuse; the
 * count stays pinned from reserve until then, so they cannot miss it. */

static int toy_pin(struct dr_image *image, uint64_t at, size_t len, unsigned level,
                   struct dr_page **page)
{
    int r = dr_page_get(image, 0, at, page);
    return r ? r : dr_page_pin(image, *page, at, len, level);
}

/* The page of a pinned range: it is in memory. */
static struct dr_page *toy_pinned(struct dr_image *image, uint64_t at)
{
    struct dr_page *page;
    if (dr_page_get(image, 0, at, &page))
        abort();
    return page;
}

static void toy_unpin_counts(struct dr_image *image, unsigned space, uint64_t place, uint64_t len)
{
    struct toy *t = image->state;
    for (uint64_t p = dr_round_down(place, t->cluster); p < place + len; p += t->cluster) {
        uint64_t at = toy_count_at(t, space, p);
        dr_page_unpin(image, toy_pinned(image, at), at, 2);
    }
}

int toy_pin_counts(struct dr_image *image, unsigned space, uint64_t place, uint64_t len)
{
    struct toy *t = image->state;
    struct dr_page *page;
    uint64_t start = dr_round_down(place, t->cluster);
    for (uint64_t p = start; p < place + len; p += t->cluster) {
        int r = toy_pin(image, toy_count_at(t, space, p), 2, LEVEL_BLOCK, &page);
        if (r) {
            if (p > start)
                toy_unpin_counts(image, space, start, p - start);
            return r;
        }
    }
    return 0;
}

/* Pinned counts. */
static void toy_add(struct dr_image *image, unsigned space, uint64_t place, uint64_t len, int diff)
{
    struct toy *t = image->state;
    for (uint64_t p = dr_round_down(place, t->cluster); p < place + len; p += t->cluster) {
        uint64_t at = toy_count_at(t, space, p);
        struct dr_page *page = toy_pinned(image, at);
        uint8_t raw[2];
        put_be16(raw, (uint16_t)(get_be16(dr_page_at(page, at)) + diff));
        dr_page_put(image, page, at, raw, 2);
    }
}

static int toy_find_free(struct dr_image *image, unsigned space, uint64_t len, uint64_t *place,
                         struct dr_error *err);

/* A block for counts that have none yet; harmless if nothing uses it afterwards. */
static int toy_new_block(struct dr_image *image, unsigned space, uint64_t i, struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *root = NULL, *block = NULL;
    uint64_t at = i * t->block * t->cluster;
    uint64_t root_at = (space == TOY_META ? t->roots_at : TOY_DATA_ROOTS_AT) + 8 * i;
    uint8_t raw[8] = {0};
    bool holder = false;
    t->roots_full |= space == TOY_META && i >= t->roots_n;
    if (t->roots_full || t->moving)
        return dr_need_begin(image);
    int r = space == TOY_DATA ? toy_find_free(image, TOY_META, t->cluster, &at, err) : 0;
    if (!r && space == TOY_DATA) {
        r = toy_pin_counts(image, TOY_META, at, t->cluster);
        holder = !r;
    }
    if (!r && (r = toy_pin(image, root_at, 8, LEVEL_ROOT, &root)))
        root = NULL;
    if (!r)
        r = dr_page_new(image, 0, at, t->cluster, LEVEL_BLOCK, &block);
    if (!r) {
        put_be16(raw, space == TOY_META ? 1 : 0);
        dr_page_put(image, block, at, raw, 2);
        if (holder)
            toy_add(image, TOY_META, at, t->cluster, 1);
        put_be64(raw, at);
        dr_page_put(image, root, root_at, raw, 8);
        t->blocks[space][i] = at;
        dr_page_unpin(image, block, at, t->cluster);
    }
    if (root)
        dr_page_unpin(image, root, root_at, 8);
    if (holder)
        toy_unpin_counts(image, TOY_META, at, t->cluster);
    return r;
}

/* The first len bytes of free clusters in a row. */
static int toy_find_free(struct dr_image *image, unsigned space, uint64_t len, uint64_t *place,
                         struct dr_error *err)
{
    struct toy *t = image->state;
    uint64_t first = 0, n = dr_div_up(len, t->cluster);
    for (uint64_t c = 0; c < t->clusters; c++) {
        uint16_t count;
        int r = t->blocks[space][c / t->block] ? 0 : toy_new_block(image, space, c / t->block, err);
        if (!r)
            r = toy_count(image, space, c * t->cluster, &count);
        if (r)
            return r;
        if (count)
            first = c + 1;
        if (c + 1 - first == n) {
            *place = first * t->cluster;
            return 0;
        }
    }
    return dr_fail(err, ENOSPC, "%s: no %" PRIu64 " of %u clusters are free", image->path, n,
                   t->clusters);
}

int toy_allocate(struct dr_image *image, unsigned space, uint64_t len, uint64_t *place,
                 struct dr_error *err)
{
    int r = toy_find_free(image, space, len, place, err);
    if (!r)
        r = toy_pin_counts(image, space, *place, len);
    if (r)
        return r;
    toy_add(image, space, *place, len, 1);
    toy_unpin_counts(image, space, *place, len);
    return 0;
}

void toy_free(struct dr_image *image, unsigned space, uint64_t place, uint64_t len)
{
    dr_free_later(image, (struct dr_freed){image->files[space], place, len});
}

/* ------------------------------------------------------------------ roots that move
 *
 * The image file's roots are full: write a larger table, together with the block that has no place
 * in the old one, where no count says yet that anything is used; then switch the header. */

static int toy_write_roots(struct dr_image *image, uint64_t block_at, uint64_t roots_at, unsigned n,
                           struct dr_error *err)
{
    struct toy *t = image->state;
    uint8_t block[TOY_MAX_CLUSTER] = {0}, roots[8 * TOY_ROOTS] = {0}, h[512];
    uint32_t bytes = toy_round_up(t, 8ull * n);
    for (unsigned i = 0; i <= bytes / t->cluster; i++)
        put_be16(block + 2 * i, 1);
    for (unsigned i = 0; i < t->roots_n; i++)
        put_be64(roots + 8 * i, t->blocks[TOY_META][i]);
    put_be64(roots + 8 * t->roots_n, block_at);
    int r = dr_file_pwrite(image->files[0], block, block_at, t->cluster, err);
    if (!r)
        r = dr_file_pwrite(image->files[0], roots, roots_at, bytes, err);
    if (!r)
        r = dr_file_flush(image->files[0], err);
    if (!r)
        r = toy_read_header(image, h, err);
    if (r)
        return r;
    put_be64(h + TOY_OFF_ROOTS_AT, roots_at);
    put_be32(h + TOY_OFF_ROOTS_N, n);
    return toy_write_header(image, h, err);
}

/* image->lock held, dropped for I/O. */
static int toy_free_old_roots(struct dr_image *image, uint64_t at, uint64_t len,
                              struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    do {
        if (!(r = dr_free_ahead(image, 1)))
            r = toy_pin_counts(image, TOY_META, at, len);
    } while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    if (!r)
        toy_free(image, TOY_META, at, len);
    return r;
}

int toy_move_roots(struct dr_image *image, struct dr_error *err)
{
    struct toy *t = image->state;
    unsigned n = (unsigned)dr_min(TOY_ROOTS, 2 * t->roots_n);
    uint64_t block_at = (uint64_t)t->roots_n * t->block * t->cluster;
    uint64_t roots_at = block_at + t->cluster;
    int r = t->roots_n < TOY_ROOTS
                ? dr_image_flush(image, err) /* what they say in memory is on disk */
                : dr_fail(err, ENOSPC, "%s: the roots cannot grow", image->path);
    if (!r)
        r = toy_write_roots(image, block_at, roots_at, n, err);
    DR_LOCK_SCOPE(&image->lock);
    t->moving = false;
    if (r)
        return r;
    uint64_t old = t->roots_at, old_len = toy_roots_bytes(t);
    t->blocks[TOY_META][t->roots_n] = block_at;
    t->roots_at = roots_at;
    t->roots_n = n;
    t->roots_full = false;
    dr_page_forget(image, 0, block_at, t->cluster + toy_roots_bytes(t));
    return toy_free_old_roots(image, old, old_len, err);
}

/* ------------------------------------------------------------------ level-2 tables */

static void toy_fill_table(struct dr_image *image, uint64_t at, uint64_t from, struct dr_page *page)
{
    struct toy *t = image->state;
    uint8_t copy[TOY_MAX_CLUSTER];
    if (from) {
        memcpy(copy, dr_page_at(toy_pinned(image, from), from), t->cluster);
        dr_page_put(image, page, at, copy, t->cluster);
    }
    dr_page_unpin(image, page, at, t->cluster);
}

/* The new table at fresh, whose counts are pinned and become one first: what has been written to
 * when this fails is given back like any other place. */
static int toy_write_table(struct dr_image *image, uint64_t fresh, uint64_t old)
{
    struct toy *t = image->state;
    toy_add(image, TOY_META, fresh, t->l2_bytes, 1);
    for (uint64_t i = 0; i < t->l2_bytes; i += t->cluster) {
        struct dr_page *page;
        int r = dr_page_new(image, 0, fresh + i, t->cluster, LEVEL_L2, &page);
        if (r) {
            toy_free(image, TOY_META, fresh, t->l2_bytes);
            return r;
        }
        toy_fill_table(image, fresh + i, old ? old + i : 0, page);
    }
    toy_unpin_counts(image, TOY_META, fresh, t->l2_bytes);
    return 0;
}

/* Nobody else refers to the table for off: make it or copy it. Changes nothing that can be seen, so
 * it need not be undone when the reservation comes to nothing. */
static int toy_own_l2(struct dr_image *image, uint64_t off, uint64_t *table, struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *page;
    uint64_t old, fresh, hole, link = t->l1_at + 8 * (off / toy_span(t));
    uint16_t count = 0;
    uint8_t raw[8];
    int r = toy_find_l2(image, off, &old, &hole, err);
    if (!r && old)
        r = toy_used_count(image, TOY_META, old, &count, err);
    *table = old;
    if (r || count == 1)
        return r;
    if (old && (r = dr_page_get_all(image, 0, old, t->l2_bytes)))
        return r;
    if ((r = toy_find_free(image, TOY_META, t->l2_bytes, &fresh, err)))
        return r;
    if (t->cluster < DR_PAGE_SIZE && (r = dr_page_get_all(image, 0, fresh, t->l2_bytes)))
        return r;
    if ((r = toy_pin(image, link, 8, LEVEL_L1, &page)))
        return r;
    if (old)
        r = toy_pin_counts(image, TOY_META, old, t->l2_bytes);
    bool old_pinned = !r && old;
    if (!r)
        r = toy_pin_counts(image, TOY_META, fresh, t->l2_bytes);
    if (!r)
        r = toy_write_table(image, fresh, old);
    if (!r) {
        put_be64(raw, fresh);
        dr_page_put(image, page, link, raw, 8);
        if (old)
            toy_free(image, TOY_META, old, t->l2_bytes);
        *table = fresh;
    } else if (old_pinned) {
        toy_unpin_counts(image, TOY_META, old, t->l2_bytes);
    }
    dr_page_unpin(image, page, link, 8);
    return r;
}

/* ------------------------------------------------------------------ reserve, publish */

/* A reservation as it is going to be, before anything is pinned. */
struct toy_plan {
    uint64_t unit;
    struct toy_entry old, new;
    unsigned first, end; /* sub-units */
    bool place;          /* needs a place */
    bool drops;          /* the old place goes */
};

static uint8_t toy_mask(unsigned first, unsigned end)
{
    return (uint8_t)(((1u << end) - 1) & ~((1u << first) - 1));
}

static void toy_plan_clear(struct toy_plan *p, enum dr_want want)
{
    uint8_t mask = toy_mask(p->first, p->end);
    p->new = p->old;
    p->new.held &= (uint8_t)~mask;
    p->new.zero = (uint8_t)(want == DR_WANT_ZERO ? p->old.zero | mask : p->old.zero & ~mask);
    p->drops = p->old.held && !p->new.held;
    if (!p->new.held)
        p->new.host = p->new.coded = 0;
}

static void toy_plan_data(struct toy_plan *p, bool private)
{
    if (p->old.held && !private) { /* a new place must hold all that the old one does */
        for (unsigned i = 0; i < 8; i++)
            if (p->old.held >> i & 1) {
                p->first = i < p->first ? i : p->first;
                p->end = i + 1 > p->end ? i + 1 : p->end;
            }
    }
    uint8_t mask = toy_mask(p->first, p->end);
    p->place = !p->old.held || !private;
    p->drops = p->old.held && !private;
    p->new.host = p->place ? 0 : p->old.host;
    p->new.held = (uint8_t)((private ? p->old.held : 0) | mask);
    p->new.zero = (uint8_t)(p->old.zero & ~mask);
}

static int toy_make_plan(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                         uint32_t host_len, struct toy_plan *p, struct dr_error *err)
{
    struct toy *t = image->state;
    uint64_t in = off % t->cluster, unit_end = dr_min(p->unit + t->cluster, image->size);
    bool aligned = !(in % t->sub) && (!((in + len) % t->sub) || off + len == image->size);
    bool whole = !in && off + len == unit_end;
    uint16_t count = 0;
    p->first = (unsigned)(in / t->sub);
    p->end = (unsigned)dr_div_up(in + len, t->sub);
    int r = p->old.held ? toy_used_count(image, toy_data_space(t), p->old.host, &count, err) : 0;
    if (r)
        return r;
    if (want == DR_WANT_CODED) {
        if (!whole || !host_len || host_len >= t->cluster)
            return -ENOTSUP;
        p->new = (struct toy_entry){.held = toy_all(t), .coded = (uint16_t)host_len};
        p->place = true;
        p->drops = p->old.held;
        return 0;
    }
    if (want == DR_WANT_DATA) {
        toy_plan_data(p, count == 1 && !p->old.coded);
        return 0;
    }
    if (off + len == unit_end)
        p->end = t->subs;
    if (!aligned || (p->old.coded && !whole) || (p->old.held && count > 1 && !whole))
        return -ENOTSUP;
    toy_plan_clear(p, want);
    return 0;
}

/* Coded units share clusters: the next one goes behind the last one while it fits. */
static int toy_find_place(struct dr_image *image, const struct toy_plan *p, uint64_t *place,
                          struct dr_error *err)
{
    struct toy *t = image->state;
    uint64_t next = t->coded_next;
    if (p->new.coded && next &&next % t->cluster + p->new.coded <= t->cluster) {
        *place = next;
        return 0;
    }
    return toy_find_free(image, toy_data_space(t), t->cluster, place, err);
}

static void toy_note_coded(struct toy *t, const struct toy_entry *e)
{
    uint64_t end = dr_round_up(e->host + e->coded, TOY_SECTOR);
    t->coded_next = end % t->cluster ? end : 0;
}

static void toy_describe(struct dr_image *image, const struct toy_plan *p, uint64_t off,
                         uint64_t len, struct dr_reservation *r)
{
    struct toy *t = image->state;
    r->off = off;
    r->len = len;
    if (r->want == DR_WANT_DATA) {
        uint64_t end = p->unit + p->end * t->sub;
        r->off = p->unit + p->first * t->sub;
        r->len = dr_min(end, image->size) - r->off;
        r->pad = end - r->off - r->len;
    }
    r->todo = p->place || r->want == DR_WANT_DATA ? DR_TODO_WRITE : DR_TODO_NOTHING;
    r->file = image->files[toy_data_space(t)];
    r->host = p->new.host + (r->want == DR_WANT_DATA ? p->first * t->sub : 0);
    uint8_t raw[16];
    toy_put_entry(raw, &p->new);
    memcpy(&r->priv[PR_ENTRY], raw, 16);
    r->priv[PR_NEW] = p->place ? p->new.host : UINT64_MAX;
    r->priv[PR_OLD] = p->drops ? p->old.host : UINT64_MAX;
}

int toy_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    struct toy *t = image->state;
    struct toy_plan p = {.unit = dr_round_down(off, t->cluster)};
    struct dr_page *page;
    uint64_t table, at = 0;
    unsigned space = toy_data_space(t);
    if (!t->marked)
        return dr_need_begin(image);
    *r = (struct dr_reservation){.want = want};
    int e = toy_own_l2(image, off, &table, err);
    if (!e) {
        at = r->priv[PR_AT] = toy_entry_place(t, table, off);
        e = dr_reserve_page(image, r, 0, at, 16, LEVEL_L2, &page);
    }
    if (!e)
        e = toy_entry_at(image, page, at, off, &p.old, err);
    if (!e)
        e = toy_make_plan(image, off, len, want, host_len, &p, err);
    if (!e && p.place)
        e = toy_find_place(image, &p, &p.new.host, err);
    if (!e && p.place)
        e = dr_reserve_page(image, r, 0, toy_count_at(t, space, p.new.host), 2, LEVEL_BLOCK, &page);
    if (!e && p.drops)
        e = dr_reserve_page(image, r, 0, toy_count_at(t, space, p.old.host), 2, LEVEL_BLOCK, &page);
    if (e)
        return e;
    if (p.place)
        toy_add(image, space, p.new.host, 1, 1);
    if (p.new.coded && p.place)
        toy_note_coded(t, &p.new);
    toy_describe(image, &p, off, len, r);
    return 0;
}

void toy_publish(struct dr_image *image, struct dr_reservation *r)
{
    struct toy *t = image->state;
    dr_page_put(image, r->pins[PIN_L2].page, r->priv[PR_AT], &r->priv[PR_ENTRY], 16);
    if (r->priv[PR_OLD] != UINT64_MAX) {
        dr_reserved_pin(r, r->n_pins - 1)->page = NULL; /* stays pinned until it is lowered */
        toy_free(image, toy_data_space(t), r->priv[PR_OLD], 1);
    }
}

void toy_cancel(struct dr_image *image, struct dr_reservation *r)
{
    struct toy *t = image->state;
    if (r->priv[PR_NEW] != UINT64_MAX) {
        toy_add(image, toy_data_space(t), r->priv[PR_NEW], 1, -1);
        t->coded_next = 0;
    }
}

/* ------------------------------------------------------------------ freed places */

static unsigned toy_space_of(const struct dr_image *image, const struct dr_freed *freed)
{
    return freed->file == image->files[0] ? TOY_META : TOY_DATA;
}

/* All clusters of a range have as many ways to them. */
void toy_release(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone)
{
    struct toy *t = image->state;
    unsigned space = toy_space_of(image, freed);
    uint64_t at = toy_count_at(t, space, freed->host);
    uint64_t start = dr_round_down(freed->host, t->cluster);
    if (get_be16(dr_page_at(toy_pinned(image, at), at)) > 1) {
        toy_add(image, space, freed->host, freed->len, -1);
        toy_unpin_counts(image, space, freed->host, freed->len);
        return;
    }
    *gone = (struct dr_freed){freed->file, start,
                              dr_round_up(freed->host + freed->len, t->cluster) - start};
    if (space == toy_data_space(t) && dr_round_down(t->coded_next, t->cluster) == start)
        t->coded_next = 0; /* nothing may be put behind what is going to be punched */
}

void toy_reuse(struct dr_image *image, const struct dr_freed *gone)
{
    unsigned space = toy_space_of(image, gone);
    toy_add(image, space, gone->host, gone->len, -1);
    toy_unpin_counts(image, space, gone->host, gone->len);
}
