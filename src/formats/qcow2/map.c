/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Looking up where the guest's bytes are. */
#include "formats/qcow2/qcow2.h"

#define L1_RESERVED UINT64_C(0x7f000000000001ff)

/* A table that the file is too short for is damage, not zeros (invariant 8). */
static int refuse_cut(const struct dr_image *image, uint64_t at, struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: ends at byte %llu, in or before a table of which byte %llu is needed",
                   image->path, ULL(dr_file_size(image->files[0])), ULL(at));
}

/* ------------------------------------------------------------------ L1 */

int qcow2_check_l1_entry(struct dr_image *image, uint64_t at, uint64_t v, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t table = v & QCOW2_OFFSET;
    if (v & L1_RESERVED)
        return dr_fail(err, EIO, "%s: the L1 entry at byte %llu has reserved bits set: 0x%llx",
                       image->path, ULL(at), ULL(v));
    if (qcow2_in_cluster(q, table) || (!table && v))
        return dr_fail(err, EIO,
                       "%s: the L1 entry at byte %llu points to byte %llu, which is no L2 table's "
                       "place",
                       image->path, ULL(at), ULL(table));
    return 0;
}

/* Entries from i on, which is empty, that are empty too, as far as can be told from memory. */
static uint64_t empty_l1_entries(const struct dr_image *image, const struct dr_page *page,
                                 uint64_t i)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t n = dr_min(q->h.l1_entries, (dr_file_size(image->files[0]) - q->h.l1_at) / 8);
    uint64_t zero = dr_page_zero_until(image, page), next = i + 1;
    if (zero > q->h.l1_at + 8 * next)
        return dr_min(n, (zero - q->h.l1_at) / 8) - i;
    for (; next < n; next++) {
        uint64_t at = q->h.l1_at + 8 * next;
        if (at % DR_PAGE_SIZE == 0 || get_be64(dr_page_at(page, at)))
            break;
    }
    return next - i;
}

int qcow2_find_l2(struct dr_image *image, uint64_t off, uint64_t *table, bool *copied,
                  uint64_t *hole, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct dr_page *page;
    uint64_t span = qcow2_l2_span(q), i = off >> (q->h.cluster_bits + q->l2_bits),
             at = q->h.l1_at + 8 * i;
    if (i >= q->h.l1_entries)
        return dr_fail(err, EIO, "%s: its L1 table ends before guest offset %llu", image->path,
                       ULL(off));
    if (at + 8 > dr_file_size(image->files[0]))
        return refuse_cut(image, at, err);
    int r = dr_page_get(image, 0, at, &page);
    if (r < 0)
        return r;
    uint64_t v = get_be64(dr_page_at(page, at));
    *table = v & QCOW2_OFFSET;
    *copied = v & QCOW2_COPIED;
    *hole = 0;
    if ((r = qcow2_check_l1_entry(image, at, v, err)) < 0)
        return r;
    if (!*table)
        *hole = (i + empty_l1_entries(image, page, i)) * span - off;
    else if (image->writable)
        qcow2_guard(q, *table);
    return 0;
}

/* ------------------------------------------------------------------ L2 */

uint64_t qcow2_entry_at(const struct qcow2 *q, uint64_t table, uint64_t off)
{
    return table + q->entry * (qcow2_cluster_of(q, off) & (q->l2_entries - 1));
}

int qcow2_read_entry(struct dr_image *image, const struct dr_page *page, uint64_t at, uint64_t off,
                     struct qcow2_entry *e, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t start = qcow2_cluster_start(q, off);
    const char *problem = qcow2_entry_decode(q, dr_page_at(page, at), start, e);
    if (!problem)
        return 0;
    return dr_fail(err, EIO,
                   "%s: the L2 entry at byte %llu, for guest offset %llu, has %s; `drover check` "
                   "says more",
                   image->path, ULL(at), ULL(start), problem);
}

static enum dr_kind kind_of(const struct qcow2_entry *e, unsigned sub)
{
    if (e->coded)
        return DR_CODED;
    if (e->held >> sub & 1)
        return DR_DATA;
    return e->zero >> sub & 1 ? DR_ZERO : DR_HOLE;
}

/* Compressed, or encrypted: then decode says why there is nothing to be had. */
static void coded_extent(const struct dr_image *image, const struct qcow2_entry *e, uint64_t off,
                         struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t in = qcow2_in_cluster(q, off), size = dr_file_size(image->files[0]);
    ext->kind = DR_CODED;
    ext->len = q->cluster - in;
    ext->host = e->host;
    ext->host_len = e->coded ? e->coded : (uint32_t)q->cluster;
    if (e->host < size) /* the last one may be shorter than its sectors */
        ext->host_len = (uint32_t)dr_min(ext->host_len, size - e->host);
    ext->unit = (uint32_t)dr_min(q->cluster, image->size - (off - in));
    ext->inner = (uint32_t)in;
}

static void data_extent(const struct dr_image *image, const struct qcow2_entry *e, uint64_t off,
                        struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    ext->host = e->host + qcow2_in_cluster(q, off);
    if (!image->writable)
        return;
    ext->in_place = qcow2_has_data_file(q) ||
                    (e->copied && !q->damage && !qcow2_guarded(q, e->host, q->cluster));
}

/* May there be tables in memory that the file has not got yet? */
static bool has_new_tables(const struct dr_image *image)
{
    return image->writable || image->given_up;
}

/* An entry that is not in memory has been written, so it must be in the file; a new table is in
 * memory until it is. */
int qcow2_get_table_page(struct dr_image *image, uint64_t at, unsigned len, struct dr_page **page,
                         struct dr_error *err)
{
    uint64_t size = dr_file_size(image->files[0]);
    int r = dr_page_get(image, 0, at, page);
    bool written = r == -EAGAIN || !has_new_tables(image);
    return written && at + len > size ? refuse_cut(image, at, err) : r;
}

/* Describe the bytes from off on, to the end of the sub-cluster, by the entry. */
static void first_extent(const struct dr_image *image, const struct qcow2_entry *e, uint64_t off,
                         struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    unsigned sub = q->subs == 1 ? 0 : (unsigned)(qcow2_in_cluster(q, off) / q->sub);
    *ext = (struct dr_extent){.kind = kind_of(e, sub), .len = q->sub - (off & (q->sub - 1))};
    ext->placed = ext->kind == DR_ZERO && e->host != QCOW2_NO_PLACE && !e->held;
    ext->shared = (ext->kind == DR_DATA || ext->placed) && !e->copied && !qcow2_has_data_file(q);
    if (ext->kind == DR_DATA || ext->kind == DR_CODED)
        ext->file = ext->kind == DR_CODED ? image->files[q->data] : qcow2_data(image);
    if (ext->kind == DR_CODED || (ext->kind == DR_DATA && qcow2_is_locked(q)))
        coded_extent(image, e, off, ext);
    else if (ext->kind == DR_DATA)
        data_extent(image, e, off, ext);
}

static bool continues(const struct dr_extent *ext, const struct dr_extent *next)
{
    if (next->kind != ext->kind || next->kind == DR_CODED || next->placed != ext->placed ||
        next->shared != ext->shared)
        return false;
    return next->kind != DR_DATA ||
           (next->in_place == ext->in_place && next->host == ext->host + ext->len);
}

/* Guest offset up to which this page of the table tells. */
static uint64_t told_until(const struct dr_image *image, uint64_t at, uint64_t off)
{
    const struct qcow2 *q = qcow2_of(image);
    unsigned entry_bits = q->h.cluster_bits - q->l2_bits;
    uint64_t in_page = (DR_PAGE_SIZE - at % DR_PAGE_SIZE) >> entry_bits;
    if (!has_new_tables(image))
        in_page = dr_min(in_page, (dr_file_size(image->files[0]) - at) >> entry_bits);
    uint64_t span = qcow2_l2_span(q), table_end = (off & ~(span - 1)) + span;
    return dr_min(qcow2_cluster_start(q, off) + in_page * q->cluster, table_end);
}

/* Empty from off on, where the table's page is zeros up to the byte `zero` of the file. */
static uint64_t empty_until(const struct qcow2 *q, uint64_t at, uint64_t off, uint64_t zero)
{
    uint64_t span = qcow2_l2_span(q), table_end = (off & ~(span - 1)) + span;
    return dr_min(qcow2_cluster_start(q, off) + (zero - at) / q->entry * q->cluster, table_end);
}

/* A damaged entry ends the extent: a read of that entry fails, and what is before it can be read.
 */
static void grow_extent(struct dr_image *image, const struct dr_page *page, uint64_t at,
                        uint64_t off, uint64_t end, struct dr_extent *ext)
{
    const struct qcow2 *q = qcow2_of(image);
    while (off + ext->len < end) {
        uint64_t next_off = off + ext->len;
        uint64_t next_at = at +
                           (qcow2_cluster_of(q, next_off) - qcow2_cluster_of(q, off)) * q->entry;
        struct qcow2_entry e;
        struct dr_extent next;
        if (qcow2_read_entry(image, page, next_at, next_off, &e, NULL) < 0)
            return;
        first_extent(image, &e, next_off, &next);
        if (!continues(ext, &next))
            return;
        ext->len += next.len;
    }
}

int qcow2_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
              struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct qcow2_entry e;
    struct dr_page *page;
    uint64_t table, hole;
    bool copied;
    int r = qcow2_find_l2(image, off, &table, &copied, &hole, err);
    if (r < 0)
        return r;
    if (!table) {
        *ext = (struct dr_extent){.kind = DR_HOLE, .len = dr_min(len, hole)};
        return 0;
    }
    uint64_t at = qcow2_entry_at(q, table, off);
    if ((r = qcow2_get_table_page(image, at, q->entry, &page, err)) < 0 ||
        (r = qcow2_read_entry(image, page, at, off, &e, err)) < 0)
        return r;
    first_extent(image, &e, off, ext);
    uint64_t zero = ext->kind == DR_HOLE ? dr_page_zero_until(image, page) : 0;
    if (zero > at)
        zero = dr_min(zero, dr_max(dr_file_size(image->files[0]),
                                   has_new_tables(image) ? dr_page_start(page) + DR_PAGE_SIZE : 0));
    if (zero > at + q->entry)
        ext->len = empty_until(q, at, off, zero) - off;
    else
        grow_extent(image, page, at, off, dr_min(told_until(image, at, off), off + len), ext);
    ext->len = dr_min(ext->len, len);
    return 0;
}
