/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "toy.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

/* Orders of the tables: a count block, its root, a level-2 table, the link to it. A level-2 table
 * is one level below its link, so a new table is durable before anything points to it. */
enum { LEVEL_BLOCK = 0, LEVEL_ROOT = 1, LEVEL_L2 = 2, LEVEL_L1 = 3 };

enum { OFF_SIZE = 16, OFF_CLUSTERS = 24, OFF_L2 = 28, OFF_SNAPSHOT = 32, OFF_DATA = 64 };
enum { OFF_BACKING_FORMAT = 128, OFF_BACKING = 144, BACKING_CAP = 368 };

/* reservation: which page is which, and what publish needs */
enum { PIN_L2, PIN_BLOCK }; /* and last that of the old place */
enum { PR_AT, PR_ENTRY, PR_NEW = 3, PR_OLD, PR_OLD_LEN };

static const char toy_magic[8] = "TOYCOW1";

struct toy_entry toy_get_entry(const uint8_t *p)
{
    return (struct toy_entry){get_be64(p), p[8], p[9], get_be16(p + 10)};
}

void toy_put_entry(uint8_t *p, const struct toy_entry *e)
{
    put_be64(p, e->host);
    p[8] = e->held;
    p[9] = e->zero;
    put_be16(p + 10, e->coded);
    put_be32(p + 12, 0);
}

const char *toy_entry_problem(const struct toy *t, const struct toy_entry *e)
{
    if (e->held & e->zero)
        return "a sub-unit both held and zero";
    if (e->coded && (e->held != 0xff || e->coded >= TOY_CLUSTER))
        return "a coded unit that is not whole";
    if (!e->held)
        return e->host ? "a place that holds nothing" : NULL;
    if (e->host % (e->coded ? TOY_SUB : TOY_CLUSTER) || e->host < TOY_SUB)
        if (e->host || !t->has_data)
            return "a place that is not aligned";
    if (e->host >= (uint64_t)t->clusters * TOY_CLUSTER)
        return "a place beyond the end";
    return NULL;
}

/* ------------------------------------------------------------------ header */

int toy_read_header(struct dr_image *image, uint8_t sector[512], struct dr_error *err)
{
    return dr_file_pread(image->files[0], sector, 0, 512, err);
}

int toy_write_header(struct dr_image *image, const uint8_t sector[512], struct dr_error *err)
{
    int r = dr_file_pwrite(image->files[0], sector, 0, 512, err);
    return r ? r : dr_file_flush(image->files[0], err);
}

static int toy_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    return len >= 512 && !memcmp(buf, toy_magic, 8) ? 100 : 0;
}

static int toy_read_roots(struct dr_image *image, unsigned space, struct dr_error *err)
{
    struct toy *t = image->state;
    uint8_t page[TOY_CLUSTER];
    int r = dr_file_pread(image->files[0], page, (1 + space) * (uint64_t)TOY_CLUSTER, sizeof(page),
                          err);
    if (r)
        return r;
    for (unsigned i = 0; i < TOY_ROOTS; i++) {
        t->blocks[space][i] = get_be64(page + 8 * i);
        if (t->blocks[space][i] % TOY_CLUSTER ||
            t->blocks[space][i] >= (uint64_t)t->clusters * TOY_CLUSTER)
            return dr_fail(err, EIO, "%s: count block %u of file %u is at a bad place", image->path,
                           i, space);
    }
    return 0;
}

static int toy_copy_field(char **out, const uint8_t *field, size_t cap)
{
    if (!field[0])
        return 0;
    *out = strndup((const char *)field, cap);
    return *out ? 0 : -ENOMEM;
}

static int toy_open(struct dr_image *image, struct dr_error *err)
{
    uint8_t h[512];
    int r = toy_read_header(image, h, err);
    if (r)
        return r;
    struct toy *t = calloc(1, sizeof(*t));
    if (!t)
        return dr_fail(err, ENOMEM, "out of memory");
    image->state = t;
    image->size = get_be64(h + OFF_SIZE);
    t->clusters = get_be32(h + OFF_CLUSTERS);
    t->l2_entries = get_be32(h + OFF_L2);
    t->snapshot = get_be64(h + OFF_SNAPSHOT);
    if (!t->l2_entries || t->l2_entries > TOY_MAX_L2 || t->clusters > TOY_MAX_CLUSTERS ||
        image->size > (uint64_t)t->l2_entries * TOY_CLUSTER * TOY_ROOTS)
        return dr_fail(err, EINVAL, "%s: header at 0 is out of bounds", image->path);
    image->unclean = h[TOY_OFF_FLAGS] & TOY_FLAG_UNCLEAN;
    memcpy(t->data_name, h + OFF_DATA, sizeof(t->data_name) - 1);
    t->has_data = t->data_name[0] != 0;
    if (t->has_data && (r = dr_image_open_file(image, t->data_name, &(unsigned){0}, err)))
        return r;
    if (toy_copy_field(&image->backing_name, h + OFF_BACKING, BACKING_CAP) ||
        toy_copy_field(&image->backing_format, h + OFF_BACKING_FORMAT, 16))
        return dr_fail(err, ENOMEM, "out of memory");
    if ((r = toy_read_roots(image, TOY_META, err)))
        return r;
    return toy_read_roots(image, TOY_DATA, err);
}

static void toy_close(struct dr_image *image)
{
    free(image->state);
    image->state = NULL;
}

/* ------------------------------------------------------------------ create */

static const struct dr_option_help toy_options[] = {
    {"data_file", "str", "name of a separate file for the data", NULL},
    {"l2_entries", "num", "entries in a level-2 table", NULL},
    {"clusters", "num", "no more than this many clusters in each file", NULL},
    {NULL, NULL, NULL, NULL},
};

static int toy_header_fields(uint8_t *h, const struct dr_create_params *p, struct dr_error *err)
{
    memcpy(h, toy_magic, 8);
    put_be64(h + OFF_SIZE, p->size);
    put_be32(h + OFF_CLUSTERS, 4096);
    put_be32(h + OFF_L2, 32);
    for (size_t i = 0; i < p->n_options; i++) {
        const struct dr_option *o = &p->options[i];
        if (!strcmp(o->name, "data_file") && strlen(o->value) < 63)
            memcpy(h + OFF_DATA, o->value, strlen(o->value));
        else if (!strcmp(o->name, "l2_entries"))
            put_be32(h + OFF_L2, (uint32_t)strtoul(o->value, NULL, 10));
        else if (!strcmp(o->name, "clusters"))
            put_be32(h + OFF_CLUSTERS, (uint32_t)strtoul(o->value, NULL, 10));
        else
            return dr_fail(err, EINVAL, "toy: unknown option %s", o->name);
    }
    return 0;
}

static int toy_header_backing(uint8_t *h, const char *name, const char *format,
                              struct dr_error *err)
{
    memset(h + OFF_BACKING, 0, BACKING_CAP);
    memset(h + OFF_BACKING_FORMAT, 0, 16);
    if (name && strlen(name) >= BACKING_CAP)
        return dr_fail(err, ENOSPC, "toy: no room for a backing name of %zu bytes", strlen(name));
    if (name)
        memcpy(h + OFF_BACKING, name, strlen(name));
    if (name && format)
        memcpy(h + OFF_BACKING_FORMAT, format, strnlen(format, 15));
    return 0;
}

static int toy_create_data(struct dr_fs *fs, const char *path, const uint8_t *h, unsigned flags,
                           struct dr_error *err)
{
    CLEANUP_FREE char *data = dr_path_sibling(path, (const char *)h + OFF_DATA);
    struct dr_file *f = NULL;
    int r = data ? dr_file_open(fs, data, DR_FILE_CREATE | flags, &f, err)
                 : dr_fail(err, ENOMEM, "out of memory");
    if (r)
        return r;
    r = dr_file_flush(f, err);
    dr_file_unref(f);
    if (r)
        fs->ops->unlink(fs, data, NULL);
    return r;
}

static int toy_fill_new(struct dr_file *f, const uint8_t *h, struct dr_error *err)
{
    uint8_t page[TOY_CLUSTER] = {0};
    int r = dr_file_truncate(f, 5 * TOY_CLUSTER, err);
    for (unsigned i = 0; i < 5; i++)
        put_be16(page + 2 * i, 1);
    if (!r)
        r = dr_file_pwrite(f, page, 4 * TOY_CLUSTER, 512, err);
    put_be64(page, 4 * TOY_CLUSTER);
    memset(page + 8, 0, 8);
    if (!r)
        r = dr_file_pwrite(f, page, TOY_CLUSTER, 512, err);
    if (!r) /* the header last: until then nobody takes it for an image */
        r = dr_file_flush(f, err);
    if (!r)
        r = dr_file_pwrite(f, h, 0, 512, err);
    return r ? r : dr_file_flush(f, err);
}

static int toy_create(struct dr_fs *fs, const char *path, const struct dr_create_params *p,
                      struct dr_error *err)
{
    uint8_t h[512] = {0};
    struct dr_file *f = NULL;
    int r = toy_header_fields(h, p, err);
    if (!r)
        r = toy_header_backing(h, p->backing_name, p->backing_format, err);
    if (!r && h[OFF_DATA])
        r = toy_create_data(fs, path, h, p->file_flags, err);
    if (r)
        return r;
    r = dr_file_open(fs, path, DR_FILE_CREATE | p->file_flags, &f, err);
    bool made = !r;
    if (!r)
        r = toy_fill_new(f, h, err);
    if (!r)
        r = fs->ops->sync_dir(fs, path, err);
    dr_file_unref(f);
    if (!r)
        return 0;
    if (made)
        fs->ops->unlink(fs, path, NULL);
    CLEANUP_FREE char *data = dr_path_sibling(path, (const char *)h + OFF_DATA);
    if (h[OFF_DATA] && data)
        fs->ops->unlink(fs, data, NULL);
    return r;
}

/* ------------------------------------------------------------------ looking up */

static void toy_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    (void)image;
    *uoff = dr_round_down(off, TOY_CLUSTER);
    *ulen = TOY_CLUSTER;
}

static uint64_t toy_span(const struct toy *t)
{
    return (uint64_t)t->l2_entries * TOY_CLUSTER;
}

/* How often the cluster at place of that file is referred to. */
static int toy_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count)
{
    struct toy *t = image->state;
    uint64_t cluster = place / TOY_CLUSTER, block = t->blocks[space][cluster / TOY_BLOCK];
    struct dr_page *page;
    *count = 0;
    if (!block)
        return 0;
    int r = dr_page_get(image, 0, block, &page);
    if (!r)
        *count = get_be16(dr_page_at(page, block) + 2 * (cluster % TOY_BLOCK));
    return r;
}

/* Of something that is in use; 0 would be damage. */
static int toy_used_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count,
                          struct dr_error *err)
{
    int r = toy_count(image, space, place, count);
    if (!r && !*count)
        return dr_fail(err, EIO, "%s: the cluster at %" PRIu64 " is in use and counted as free",
                       image->files[space]->path, place);
    return r;
}

/* The level-2 table for off, 0 = none. *hole: how far there is certainly none. */
static int toy_find_l2(struct dr_image *image, uint64_t off, uint64_t *table, uint64_t *hole,
                       struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *page;
    uint64_t i = off / toy_span(t), end;
    int r = dr_page_get(image, 0, TOY_L1_AT, &page);
    if (r)
        return r;
    const uint8_t *l1 = dr_page_at(page, TOY_L1_AT);
    *table = get_be64(l1 + 8 * i);
    for (end = i + 1; !*table && end < TOY_ROOTS && !get_be64(l1 + 8 * end);)
        end++;
    *hole = end * toy_span(t) - off;
    if (*table % TOY_CLUSTER || *table >= (uint64_t)t->clusters * TOY_CLUSTER)
        return dr_fail(err, EIO, "%s: level-1 entry %" PRIu64 " at %" PRIu64 " points nowhere",
                       image->path, i, TOY_L1_AT + 8 * i);
    return 0;
}

static enum dr_kind toy_sub_kind(const struct toy_entry *e, unsigned sub)
{
    if (e->coded)
        return DR_CODED;
    if (e->held >> sub & 1)
        return DR_DATA;
    return e->zero >> sub & 1 ? DR_ZERO : DR_HOLE;
}

static int toy_first_extent(struct dr_image *image, const struct toy_entry *e, uint64_t off,
                            struct dr_extent *ext)
{
    struct toy *t = image->state;
    unsigned sub = off % TOY_CLUSTER / TOY_SUB;
    uint16_t count = 0;
    *ext = (struct dr_extent){.kind = toy_sub_kind(e, sub), .len = TOY_SUB - off % TOY_SUB};
    if (e->held) {
        int r = toy_count(image, toy_data_space(t), e->host, &count);
        if (r)
            return r;
        ext->file = image->files[toy_data_space(t)];
    }
    if (ext->kind == DR_DATA) {
        ext->host = e->host + off % TOY_CLUSTER;
        ext->in_place = count == 1;
    } else if (ext->kind == DR_CODED) {
        ext->len = TOY_CLUSTER - off % TOY_CLUSTER;
        ext->host = e->host;
        ext->host_len = e->coded;
        ext->unit = (uint32_t)dr_min(TOY_CLUSTER, image->size - dr_round_down(off, TOY_CLUSTER));
        ext->inner = off % TOY_CLUSTER;
    }
    return 0;
}

/* Does what stands at off, with that entry, go on with what ext says? */
static int toy_continues(struct dr_image *image, const struct toy_entry *e, uint64_t off,
                         const struct dr_extent *ext, bool *yes)
{
    struct dr_extent next;
    int r = toy_first_extent(image, e, off, &next);
    *yes = !r && next.kind == ext->kind && next.kind != DR_CODED &&
           next.in_place == ext->in_place &&
           (next.kind != DR_DATA || next.host == ext->host + ext->len);
    return r;
}

static int toy_entry_at(struct dr_image *image, const uint8_t *l2, uint64_t off,
                        struct toy_entry *e, struct dr_error *err)
{
    struct toy *t = image->state;
    uint64_t i = off / TOY_CLUSTER % t->l2_entries;
    *e = toy_get_entry(l2 + 16 * i);
    const char *problem = toy_entry_problem(t, e);
    return problem ? dr_fail(err, EIO, "%s: the entry for offset %" PRIu64 " has %s", image->path,
                             off, problem)
                   : 0;
}

static int toy_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                   struct dr_error *err)
{
    struct toy *t = image->state;
    struct toy_entry e;
    struct dr_page *page;
    uint64_t table, hole, end = off + len;
    int r = toy_find_l2(image, off, &table, &hole, err);
    if (r)
        return r;
    if (!table) {
        *ext = (struct dr_extent){.kind = DR_HOLE, .len = dr_min(len, hole)};
        return 0;
    }
    if ((r = dr_page_get(image, 0, table, &page)))
        return r;
    /* The pointer stays good: nothing below drops the lock. */
    const uint8_t *l2 = dr_page_at(page, table);
    if ((r = toy_entry_at(image, l2, off, &e, err)) || (r = toy_first_extent(image, &e, off, ext)))
        return r;
    end = dr_min(end, dr_round_down(off, toy_span(t)) + toy_span(t));
    for (bool yes = true; off + ext->len < end;) {
        uint64_t at = off + ext->len;
        if ((r = toy_entry_at(image, l2, at, &e, err)) ||
            (r = toy_continues(image, &e, at, ext, &yes)))
            return r;
        if (!yes)
            break;
        ext->len += TOY_SUB;
    }
    ext->len = dr_min(ext->len, len);
    return 0;
}

/* ------------------------------------------------------------------ counts
 *
 * A cluster that is handed out has its count raised at once, and a cancel lowers it again: nothing
 * on disk ever pointed to it. Counts of what was in use go down only in release; the block's page
 * stays pinned from reserve until then, so release cannot miss it. */

static void toy_unpin(struct dr_image *image, struct dr_page *page)
{
    dr_page_unpin(image, page, dr_page_start(page), TOY_CLUSTER);
}

static int toy_pin(struct dr_image *image, uint64_t at, unsigned level, struct dr_page **page)
{
    int r = dr_page_get(image, 0, at, page);
    if (!r)
        r = dr_page_pin(image, *page, dr_round_down(at, TOY_CLUSTER), TOY_CLUSTER, level);
    if (r)
        *page = NULL;
    return r;
}

static uint64_t toy_block(const struct toy *t, unsigned space, uint64_t place)
{
    return t->blocks[space][place / TOY_CLUSTER / TOY_BLOCK];
}

static int toy_pin_block(struct dr_image *image, unsigned space, uint64_t place,
                         struct dr_page **page)
{
    struct toy *t = image->state;
    return toy_pin(image, t->blocks[space][place / TOY_CLUSTER / TOY_BLOCK], LEVEL_BLOCK, page);
}

/* The block's page is pinned. */
static void toy_add(struct dr_image *image, struct dr_page *page, unsigned space, uint64_t place,
                    int diff)
{
    struct toy *t = image->state;
    uint64_t cluster = place / TOY_CLUSTER;
    uint64_t at = t->blocks[space][cluster / TOY_BLOCK] + 2 * (cluster % TOY_BLOCK);
    uint8_t raw[2];
    put_be16(raw, (uint16_t)(get_be16(dr_page_at(page, at)) + diff));
    dr_page_put(image, page, at, raw, 2);
}

static int toy_find_free(struct dr_image *image, unsigned space, uint64_t *place,
                         struct dr_error *err);

/* A block for counts that have none yet; harmless if nothing uses it afterwards. */
static int toy_new_block(struct dr_image *image, unsigned space, uint64_t i, struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *root = NULL, *block = NULL, *holder = NULL;
    uint64_t at = i * TOY_BLOCK * TOY_CLUSTER,
             root_at = (1 + space) * (uint64_t)TOY_CLUSTER + 8 * i;
    uint8_t raw[8] = {0};
    int r = 0;
    if (space == TOY_DATA && (r = toy_find_free(image, TOY_META, &at, err)))
        return r;
    if (space == TOY_DATA)
        r = toy_pin_block(image, TOY_META, at, &holder);
    if (!r)
        r = toy_pin(image, root_at, LEVEL_ROOT, &root);
    if (!r)
        r = dr_page_new(image, 0, at, TOY_CLUSTER, LEVEL_BLOCK, &block);
    if (!r) {
        put_be16(raw, space == TOY_META ? 1 : 0);
        dr_page_put(image, block, at, raw, 2);
        if (holder)
            toy_add(image, holder, TOY_META, at, 1);
        put_be64(raw, at);
        dr_page_put(image, root, root_at, raw, 8);
        t->blocks[space][i] = at;
        toy_unpin(image, block);
    }
    if (root)
        toy_unpin(image, root);
    if (holder)
        toy_unpin(image, holder);
    return r;
}

static int toy_find_free(struct dr_image *image, unsigned space, uint64_t *place,
                         struct dr_error *err)
{
    struct toy *t = image->state;
    for (uint64_t c = 0; c < t->clusters; c++) {
        uint16_t count;
        int r = 0;
        if (!t->blocks[space][c / TOY_BLOCK] &&
            (r = toy_new_block(image, space, c / TOY_BLOCK, err)))
            return r;
        *place = c * TOY_CLUSTER;
        if ((r = toy_count(image, space, *place, &count)))
            return r;
        if (!count)
            return 0;
    }
    return dr_fail(err, ENOSPC, "%s: all %u clusters are in use", image->path, t->clusters);
}

/* ------------------------------------------------------------------ level-2 tables */

static void toy_free(struct dr_image *image, unsigned space, uint64_t place, uint64_t len)
{
    dr_free_later(image, (struct dr_freed){image->files[space], place, len});
}

/* Nobody else refers to the table for off: make it or copy it. Changes nothing that can be seen, so
 * it need not be undone when the reservation comes to nothing. */
static int toy_own_l2(struct dr_image *image, uint64_t off, uint64_t *table, struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *from = NULL, *pages[4] = {0};
    uint64_t old, fresh, hole, link = TOY_L1_AT + 8 * (off / toy_span(t));
    uint16_t count = 0;
    int r = toy_find_l2(image, off, &old, &hole, err);
    if (!r && old)
        r = toy_used_count(image, TOY_META, old, &count, err);
    *table = old;
    if (r || count == 1)
        return r;
    if ((r = toy_find_free(image, TOY_META, &fresh, err)))
        return r;
    if (old && !(r = dr_page_get(image, 0, old, &from)))
        r = toy_pin_block(image, TOY_META, old, &pages[0]);
    if (!r)
        r = toy_pin_block(image, TOY_META, fresh, &pages[1]);
    if (!r)
        r = toy_pin(image, TOY_L1_AT, LEVEL_L1, &pages[2]);
    if (!r)
        r = dr_page_new(image, 0, fresh, TOY_CLUSTER, LEVEL_L2, &pages[3]);
    if (!r) {
        uint8_t copy[TOY_CLUSTER] = {0}, raw[8];
        if (old)
            memcpy(copy, dr_page_at(from, old), TOY_CLUSTER);
        put_be64(raw, fresh);
        toy_add(image, pages[1], TOY_META, fresh, 1);
        dr_page_put(image, pages[3], fresh, copy, TOY_CLUSTER);
        dr_page_put(image, pages[2], link, raw, 8);
        if (old) { /* pages[0] stays pinned until release */
            toy_free(image, TOY_META, old, TOY_CLUSTER);
            pages[0] = NULL;
        }
        *table = fresh;
    }
    for (int i = 0; i < 4; i++)
        if (pages[i])
            toy_unpin(image, pages[i]);
    return r;
}

/* ------------------------------------------------------------------ reserve, publish */

/* What a reservation is going to do, before anything is pinned. */
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
    uint64_t in = off % TOY_CLUSTER, unit_end = dr_min(p->unit + TOY_CLUSTER, image->size);
    bool aligned = !(in % TOY_SUB) && (!((in + len) % TOY_SUB) || off + len == image->size);
    bool whole = !in && off + len == unit_end;
    uint16_t count = 0;
    struct toy *t = image->state;
    p->first = (unsigned)(in / TOY_SUB);
    p->end = (unsigned)dr_div_up(in + len, TOY_SUB);
    int r = p->old.held ? toy_used_count(image, toy_data_space(t), p->old.host, &count, err) : 0;
    if (r)
        return r;
    if (want == DR_WANT_CODED) {
        if (!whole || !host_len || host_len >= TOY_CLUSTER)
            return -ENOTSUP;
        p->new = (struct toy_entry){.held = 0xff, .coded = (uint16_t)host_len};
        p->place = true;
        p->drops = p->old.held;
        return 0;
    }
    if (want == DR_WANT_DATA) {
        toy_plan_data(p, count == 1 && !p->old.coded);
        return 0;
    }
    if (off + len == unit_end)
        p->end = 8;
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
    if (p->new.coded && next &&next % TOY_CLUSTER + p->new.coded <= TOY_CLUSTER) {
        *place = next;
        return 0;
    }
    return toy_find_free(image, toy_data_space(t), place, err);
}

static void toy_note_coded(struct toy *t, const struct toy_entry *e)
{
    uint64_t end = dr_round_up(e->host + e->coded, TOY_SUB);
    t->coded_next = end % TOY_CLUSTER ? end : 0;
}

static int toy_reserve_at(struct dr_image *image, struct dr_reservation *r, uint64_t at,
                          unsigned level)
{
    struct dr_page *page;
    return dr_reserve_page(image, r, 0, dr_round_down(at, TOY_CLUSTER), TOY_CLUSTER, level, &page);
}

static void toy_describe(struct dr_image *image, const struct toy_plan *p, uint64_t off,
                         uint64_t len, struct dr_reservation *r)
{
    struct toy *t = image->state;
    r->off = off;
    r->len = len;
    if (r->want == DR_WANT_DATA) {
        uint64_t end = p->unit + p->end * TOY_SUB;
        r->off = p->unit + p->first * TOY_SUB;
        r->len = dr_min(end, image->size) - r->off;
        r->pad = end - r->off - r->len;
    }
    r->todo = p->place || r->want == DR_WANT_DATA ? DR_TODO_WRITE : DR_TODO_NOTHING;
    r->file = image->files[toy_data_space(t)];
    r->host = p->new.host + (r->want == DR_WANT_DATA ? p->first * TOY_SUB : 0);
    uint8_t raw[16];
    toy_put_entry(raw, &p->new);
    memcpy(&r->priv[PR_ENTRY], raw, 16);
    r->priv[PR_NEW] = p->place ? p->new.host : UINT64_MAX;
    r->priv[PR_OLD] = p->drops ? p->old.host : UINT64_MAX;
    r->priv[PR_OLD_LEN] = p->old.coded ? p->old.coded : TOY_CLUSTER;
}

static int toy_reserve_pinned(struct dr_image *image, uint64_t off, uint64_t len, uint32_t host_len,
                              struct dr_reservation *r, struct dr_error *err)
{
    struct toy *t = image->state;
    struct toy_plan p = {.unit = dr_round_down(off, TOY_CLUSTER)};
    uint64_t table;
    unsigned space = toy_data_space(t);
    int e = toy_own_l2(image, off, &table, err);
    if (!e)
        e = toy_reserve_at(image, r, table, LEVEL_L2);
    if (!e)
        e = toy_entry_at(image, dr_page_at(r->pins[PIN_L2].page, table), off, &p.old, err);
    if (!e)
        e = toy_make_plan(image, off, len, r->want, host_len, &p, err);
    if (!e && p.place)
        e = toy_find_place(image, &p, &p.new.host, err);
    if (!e && p.place)
        e = toy_reserve_at(image, r, toy_block(t, space, p.new.host), LEVEL_BLOCK);
    if (!e && p.drops)
        e = toy_reserve_at(image, r, toy_block(t, space, p.old.host), LEVEL_BLOCK);
    if (e)
        return e;
    r->priv[PR_AT] = table + 16 * (off / TOY_CLUSTER % t->l2_entries);
    if (p.place)
        toy_add(image, r->pins[PIN_BLOCK].page, space, p.new.host, 1);
    if (p.new.coded && p.place)
        toy_note_coded(t, &p.new);
    toy_describe(image, &p, off, len, r);
    return 0;
}

static int toy_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                       uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    struct toy *t = image->state;
    if (!t->marked)
        return dr_need_begin(image);
    *r = (struct dr_reservation){.want = want};
    return toy_reserve_pinned(image, off, len, host_len, r, err);
}

static void toy_publish(struct dr_image *image, struct dr_reservation *r)
{
    struct toy *t = image->state;
    dr_page_put(image, r->pins[PIN_L2].page, r->priv[PR_AT], &r->priv[PR_ENTRY], 16);
    if (r->priv[PR_OLD] != UINT64_MAX) {
        r->pins[r->n_pins - 1].page = NULL; /* stays pinned until release */
        toy_free(image, toy_data_space(t), r->priv[PR_OLD], r->priv[PR_OLD_LEN]);
    }
}

static void toy_cancel(struct dr_image *image, struct dr_reservation *r)
{
    struct toy *t = image->state;
    if (r->priv[PR_NEW] != UINT64_MAX) {
        toy_add(image, r->pins[PIN_BLOCK].page, toy_data_space(t), r->priv[PR_NEW], -1);
        t->coded_next = 0;
    }
}

/* The block's page is pinned since the reservation: it is in memory. */
static struct dr_page *toy_pinned_block(struct dr_image *image, const struct dr_freed *freed)
{
    struct toy *t = image->state;
    unsigned space = freed->file == image->files[0] ? TOY_META : TOY_DATA;
    struct dr_page *page = NULL;
    int r = dr_page_get(image, 0, t->blocks[space][freed->host / TOY_CLUSTER / TOY_BLOCK], &page);
    if (r)
        abort();
    return page;
}

static void toy_release(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone)
{
    struct toy *t = image->state;
    unsigned space = freed->file == image->files[0] ? TOY_META : TOY_DATA;
    uint64_t cluster = freed->host / TOY_CLUSTER;
    struct dr_page *page = toy_pinned_block(image, freed);
    uint16_t count = get_be16(
        dr_page_at(page, t->blocks[space][cluster / TOY_BLOCK] + 2 * (cluster % TOY_BLOCK)));
    if (count > 1) {
        toy_add(image, page, space, freed->host, -1);
        toy_unpin(image, page);
        return;
    }
    *gone = (struct dr_freed){freed->file, cluster * TOY_CLUSTER, TOY_CLUSTER};
    if (space == toy_data_space(t) && t->coded_next / TOY_CLUSTER == cluster)
        t->coded_next = 0; /* nothing may be put behind what is going to be punched */
}

static void toy_reuse(struct dr_image *image, const struct dr_freed *gone)
{
    unsigned space = gone->file == image->files[0] ? TOY_META : TOY_DATA;
    struct dr_page *page = toy_pinned_block(image, gone);
    toy_add(image, page, space, gone->host, -1);
    toy_unpin(image, page);
}

/* ------------------------------------------------------------------ the code: runs of bytes */

static int toy_decode(struct dr_image *image, const uint8_t *in, size_t in_len, uint8_t *out,
                      size_t out_len, struct dr_error *err)
{
    size_t done = 0;
    for (size_t i = 0; i + 1 < in_len && done < out_len; i += 2) {
        size_t run = in[i] + 1u;
        if (run > out_len - done)
            run = out_len - done;
        memset(out + done, in[i + 1], run);
        done += run;
    }
    return done == out_len ? 0
                           : dr_fail(err, EIO, "%s: a coded unit ends after %zu of %zu bytes",
                                     image->path, done, out_len);
}

static int64_t toy_encode(struct dr_image *image, const uint8_t *in, size_t in_len,
                          uint64_t guest_off, uint8_t *out, size_t out_cap)
{
    size_t used = 0;
    (void)image;
    (void)guest_off;
    for (size_t i = 0; i < in_len;) {
        size_t run = 1;
        while (run < 256 && i + run < in_len && in[i + run] == in[i])
            run++;
        if (used + 2 > out_cap)
            return -ENOTSUP;
        out[used++] = (uint8_t)(run - 1);
        out[used++] = in[i];
        i += run;
    }
    return (int64_t)used;
}

/* ------------------------------------------------------------------ header changes */

static int toy_mark(struct dr_image *image, bool unclean, struct dr_error *err)
{
    uint8_t h[512];
    int r = toy_read_header(image, h, err);
    if (r || (h[TOY_OFF_FLAGS] & TOY_FLAG_UNCLEAN) == unclean)
        return r;
    h[TOY_OFF_FLAGS] = unclean ? TOY_FLAG_UNCLEAN : 0;
    return toy_write_header(image, h, err);
}

static int toy_begin_write(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err)
{
    struct toy *t = image->state;
    (void)off;
    (void)changes;
    int r = toy_mark(image, true, err);
    if (!r) {
        pthread_mutex_lock(&image->lock);
        t->marked = true;
        pthread_mutex_unlock(&image->lock);
    }
    return r;
}

static int toy_end_write(struct dr_image *image, struct dr_error *err)
{
    struct toy *t = image->state;
    pthread_mutex_lock(&image->lock);
    t->marked = false;
    pthread_mutex_unlock(&image->lock);
    return toy_mark(image, false, err);
}

static int toy_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                           const char *format, unsigned flags, struct dr_error *err)
{
    uint8_t h[512];
    (void)parent;
    int r = toy_read_header(image, h, err);
    if (!r)
        r = toy_header_backing(h, name, format, err);
    if (r || flags & DR_TRY)
        return r;
    return toy_write_header(image, h, err);
}

static int toy_resize(struct dr_image *image, uint64_t size, uint64_t parent_size,
                      struct dr_error *err)
{
    uint8_t h[512];
    struct toy *t = image->state;
    if (size > image->size && parent_size > image->size)
        return dr_fail(err, ENOTSUP,
                       "%s: a toy cannot grow over what its parent has behind its end",
                       image->path);
    if (size > toy_span(t) * TOY_ROOTS)
        return dr_fail(err, EFBIG, "%s: no room for %" PRIu64 " bytes", image->path, size);
    int r = toy_read_header(image, h, err);
    put_be64(h + OFF_SIZE, size);
    if (!r)
        r = toy_write_header(image, h, err);
    if (!r)
        image->size = size;
    return r;
}

static int toy_info(struct dr_image *image, json_t *data, uint64_t *cluster_size,
                    struct dr_error *err)
{
    const struct toy *t = image->state;
    *cluster_size = TOY_CLUSTER;
    if (t->has_data && json_object_set_new(data, "data-file", json_string(t->data_name)))
        return dr_fail(err, ENOMEM, "out of memory");
    return 0;
}

const struct dr_format dr_format_toy = {
    .name = "toy",
    .flags = DR_FORMAT_BACKING | DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_PUNCH_FREED,
    .create_options = toy_options,
    .snapshot_suffix = "toy",
    .probe = toy_probe,
    .open = toy_open,
    .close = toy_close,
    .create = toy_create,
    .unit = toy_unit,
    .map = toy_map,
    .reserve = toy_reserve,
    .publish = toy_publish,
    .cancel = toy_cancel,
    .release = toy_release,
    .reuse = toy_reuse,
    .decode = toy_decode,
    .encode = toy_encode,
    .begin_write = toy_begin_write,
    .end_write = toy_end_write,
    .set_backing = toy_set_backing,
    .recover = toy_recover,
    .resize = toy_resize,
    .trim = toy_trim,
    .info = toy_info,
    .check = toy_check,
};
