/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The toy's header, looking things up, its code, and the format itself; toy-write.c changes it. */
#include "toy.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"

const char toy_magic[8] = "TOYCOW2";

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

uint8_t toy_all(const struct toy *t)
{
    return (uint8_t)((1u << t->subs) - 1);
}

const char *toy_entry_problem(const struct toy *t, const struct toy_entry *e)
{
    if (e->held & e->zero)
        return "a sub-unit both held and zero";
    if ((e->held | e->zero) & ~toy_all(t))
        return "a sub-unit that it has not";
    if (e->coded && (e->held != toy_all(t) || e->coded >= t->cluster))
        return "a coded unit that is not whole";
    if (!e->held)
        return e->host ? "a place that holds nothing" : NULL;
    if (e->host % (e->coded ? TOY_SECTOR : t->cluster) || (!e->host && !t->has_data))
        return "a place that is not aligned";
    if (e->host >= (uint64_t)t->clusters * t->cluster)
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

static int toy_read_roots(struct dr_image *image, unsigned space, uint64_t at, unsigned n,
                          struct dr_error *err)
{
    struct toy *t = image->state;
    uint8_t raw[8 * TOY_ROOTS];
    int r = dr_file_pread(image->files[0], raw, at, 8 * n, err);
    if (r)
        return r;
    for (unsigned i = 0; i < n; i++) {
        t->blocks[space][i] = get_be64(raw + 8 * i);
        if (t->blocks[space][i] % t->cluster ||
            t->blocks[space][i] >= (uint64_t)t->clusters * t->cluster)
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

bool toy_set_cluster(struct toy *t, uint32_t cluster)
{
    t->cluster = cluster;
    t->subs = cluster == 8 * TOY_SECTOR ? 8 : 1;
    t->sub = cluster / t->subs;
    return cluster >= 512 && cluster <= TOY_MAX_CLUSTER && !(cluster & (cluster - 1));
}

static int toy_parse(struct dr_image *image, const uint8_t h[512], struct dr_error *err)
{
    struct toy *t = image->state;
    image->size = get_be64(h + TOY_OFF_SIZE);
    t->clusters = get_be32(h + TOY_OFF_CLUSTERS);
    t->l2_entries = get_be32(h + TOY_OFF_L2);
    t->l1_at = get_be64(h + TOY_OFF_L1);
    t->roots_at = get_be64(h + TOY_OFF_ROOTS_AT);
    t->roots_n = get_be32(h + TOY_OFF_ROOTS_N);
    t->block = get_be32(h + TOY_OFF_BLOCK);
    for (unsigned i = 0; i < TOY_SNAPSHOTS; i++)
        t->snapshots[i] = get_be64(h + TOY_OFF_SNAPSHOTS + 8 * i);
    if (!toy_set_cluster(t, get_be32(h + TOY_OFF_CLUSTER)) || !t->l2_entries ||
        t->l2_entries > TOY_MAX_L2 || t->clusters > TOY_MAX_CLUSTERS || !t->roots_n ||
        t->roots_n > TOY_ROOTS || t->block < 64 || t->block > t->cluster / 2 ||
        image->size > (uint64_t)t->l2_entries * t->cluster * TOY_L1)
        return dr_fail(err, EINVAL, "%s: header at 0 is out of bounds", image->path);
    t->l2_bytes = toy_round_up(t, 16ull * t->l2_entries);
    image->unclean = h[TOY_OFF_FLAGS] & TOY_FLAG_UNCLEAN;
    memcpy(t->data_name, h + TOY_OFF_DATA, sizeof(t->data_name) - 1);
    t->has_data = t->data_name[0] != 0;
    return 0;
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
    if ((r = toy_parse(image, h, err)))
        return r;
    if (t->has_data && (r = dr_image_open_data_file(image, t->data_name, &(unsigned){0}, err)))
        return r;
    if (toy_copy_field(&image->backing_name, h + TOY_OFF_BACKING, TOY_BACKING_CAP) ||
        toy_copy_field(&image->backing_format, h + TOY_OFF_BACKING_FORMAT, 16))
        return dr_fail(err, ENOMEM, "out of memory");
    if ((r = toy_read_roots(image, TOY_META, t->roots_at, t->roots_n, err)))
        return r;
    return toy_read_roots(image, TOY_DATA, TOY_DATA_ROOTS_AT, TOY_ROOTS, err);
}

static void toy_close(struct dr_image *image)
{
    free(image->state);
    image->state = NULL;
}

/* ------------------------------------------------------------------ looking up */

static void toy_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    const struct toy *t = image->state;
    *uoff = dr_round_down(off, t->cluster);
    *ulen = t->cluster;
}

uint64_t toy_span(const struct toy *t)
{
    return (uint64_t)t->l2_entries * t->cluster;
}

/* Where the count of the cluster at place stands, 0 = it has no block yet and is not used. */
uint64_t toy_count_at(const struct toy *t, unsigned space, uint64_t place)
{
    uint64_t cluster = place / t->cluster, block = t->blocks[space][cluster / t->block];
    return block ? block + 2 * (cluster % t->block) : 0;
}

/* How many ways lead to the cluster at place of that file. */
int toy_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count)
{
    uint64_t at = toy_count_at(image->state, space, place);
    struct dr_page *page;
    *count = 0;
    int r = at ? dr_page_get(image, 0, at, &page) : 0;
    if (!r && at)
        *count = get_be16(dr_page_at(page, at));
    return r;
}

/* Of something that is in use; 0 would be damage. */
int toy_used_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count,
                   struct dr_error *err)
{
    int r = toy_count(image, space, place, count);
    if (!r && !*count)
        return dr_fail(err, EIO, "%s: the cluster at %" PRIu64 " is in use and counted as free",
                       image->files[space]->path, place);
    return r;
}

/* The level-2 table for off, 0 = none. *hole: how far there is certainly none. */
int toy_find_l2(struct dr_image *image, uint64_t off, uint64_t *table, uint64_t *hole,
                struct dr_error *err)
{
    struct toy *t = image->state;
    struct dr_page *page;
    uint64_t i = off / toy_span(t), end, at = t->l1_at + 8 * i;
    int r = dr_page_get(image, 0, at, &page);
    if (r)
        return r;
    *table = get_be64(dr_page_at(page, at));
    for (end = i + 1; !*table && end < TOY_L1; end++) {
        uint64_t next = t->l1_at + 8 * end;
        if (next % DR_PAGE_SIZE == 0 || get_be64(dr_page_at(page, next)))
            break;
    }
    *hole = end * toy_span(t) - off;
    if (*table % t->cluster || *table >= (uint64_t)t->clusters * t->cluster)
        return dr_fail(err, EIO, "%s: level-1 entry %" PRIu64 " at %" PRIu64 " points nowhere",
                       image->path, i, at);
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
    uint32_t in = (uint32_t)(off % t->cluster);
    uint16_t count = 0;
    *ext = (struct dr_extent){.kind = toy_sub_kind(e, in / t->sub), .len = t->sub - in % t->sub};
    if (e->held) {
        int r = toy_count(image, toy_data_space(t), e->host, &count);
        if (r)
            return r;
        ext->file = image->files[toy_data_space(t)];
    }
    if (ext->kind == DR_DATA) {
        ext->host = e->host + in;
        ext->in_place = count == 1;
    } else if (ext->kind == DR_CODED) {
        ext->len = t->cluster - in;
        ext->host = e->host;
        ext->host_len = e->coded;
        ext->unit = (uint32_t)dr_min(t->cluster, image->size - (off - in));
        ext->inner = in;
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

uint64_t toy_entry_place(const struct toy *t, uint64_t table, uint64_t off)
{
    return table + 16 * (off / t->cluster % t->l2_entries);
}

int toy_entry_at(struct dr_image *image, const struct dr_page *page, uint64_t at, uint64_t off,
                 struct toy_entry *e, struct dr_error *err)
{
    *e = toy_get_entry(dr_page_at(page, at));
    const char *problem = toy_entry_problem(image->state, e);
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
    uint64_t table, hole;
    int r = toy_find_l2(image, off, &table, &hole, err);
    if (r)
        return r;
    if (!table) {
        *ext = (struct dr_extent){.kind = DR_HOLE, .len = dr_min(len, hole)};
        return 0;
    }
    uint64_t at = toy_entry_place(t, table, off);
    if ((r = dr_page_get(image, 0, at, &page)) ||
        (r = toy_entry_at(image, page, at, off, &e, err)) ||
        (r = toy_first_extent(image, &e, off, ext)))
        return r;
    /* As far as this page of the table goes. */
    uint64_t in_page = (DR_PAGE_SIZE - at % DR_PAGE_SIZE) / 16;
    uint64_t first = dr_round_down(off, t->cluster);
    uint64_t end =
        dr_min(first + in_page * t->cluster, dr_round_down(off, toy_span(t)) + toy_span(t));
    end = dr_min(end, off + len);
    for (bool yes = true; off + ext->len < end;) {
        uint64_t next = off + ext->len;
        if ((r = toy_entry_at(image, page, toy_entry_place(t, table, next), next, &e, err)) ||
            (r = toy_continues(image, &e, next, ext, &yes)))
            return r;
        if (!yes)
            break;
        ext->len += t->sub;
    }
    ext->len = dr_min(ext->len, len);
    return 0;
}

/* ------------------------------------------------------------------ the code: runs of bytes */

static int toy_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                      size_t in_len, uint8_t *out, struct dr_error *err)
{
    size_t out_len = ext->unit;
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
    if (r)
        return r;
    pthread_mutex_lock(&image->lock);
    t->marked = true;
    bool move = t->moving = t->roots_full;
    pthread_mutex_unlock(&image->lock);
    return move ? toy_move_roots(image, err) : 0;
}

static int toy_end_write(struct dr_image *image, struct dr_error *err)
{
    struct toy *t = image->state;
    pthread_mutex_lock(&image->lock);
    t->marked = false;
    pthread_mutex_unlock(&image->lock);
    return t->leaks ? 0 : toy_mark(image, false, err);
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
    if (size > toy_span(t) * TOY_L1)
        return dr_fail(err, EFBIG, "%s: no room for %" PRIu64 " bytes", image->path, size);
    int r = toy_read_header(image, h, err);
    put_be64(h + TOY_OFF_SIZE, size);
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
    *cluster_size = t->cluster;
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
    .snapshot_create = toy_snapshot_create,
    .snapshot_apply = toy_snapshot_apply,
    .snapshot_delete = toy_snapshot_delete,
    .snapshot_list = toy_snapshot_list,
    .check = toy_check,
};
