/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bits of one bitmap: reading them, and setting more.
 *
 * Bits are set cluster by cluster. A cluster that the bitmap has is overwritten in place if the
 * caller says so (the bitmap is marked as in use, so nobody relies on it meanwhile) and nothing
 * else uses it; else another one is taken. Where there is no room for one, all bits of the cluster
 * are said to be set: more is copied later than need be, and nothing is missed. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

/* ------------------------------------------------------------------ lists of places */

int qcow2_places_add(struct qcow2_places *p, uint64_t at, uint64_t len)
{
    if (p->n == p->room) {
        size_t room = p->room ? p->room * 2 : 16;
        void *more = realloc(p->list, room * sizeof(*p->list));
        if (!more)
            return -ENOMEM;
        p->list = more;
        p->room = room;
    }
    p->list[p->n++] = (struct qcow2_place){at, len};
    return 0;
}

int qcow2_places_lose(struct dr_image *image, struct qcow2_places *p, struct dr_error *err)
{
    int r = 0;
    while (r == 0 && p->n > 0) {
        struct qcow2_place place = p->list[--p->n];
        r = qcow2_lose(image, place.at, place.len, err);
    }
    return r;
}

void qcow2_places_free(struct qcow2_places *p)
{
    free(p->list);
    *p = (struct qcow2_places){0};
}

/* ------------------------------------------------------------------ the table */

static int refuse_entry(const struct dr_image *image, const struct qcow2_bitmap *b, uint64_t i,
                        uint64_t v, struct dr_error *err)
{
    return dr_fail(
        err, EIO,
        "%s: bitmap table entry 0x%llx at byte %llu leads to no cluster of bits; `drover "
        "check` says more, `drover bitmap --remove` removes the bitmap",
        image->path, ULL(v), ULL(b->table_at + 8 * i));
}

int qcow2_count_now(struct dr_image *image, uint64_t at, uint64_t *count, struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do
        r = qcow2_count(image, at, count);
    while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    return r;
}

int qcow2_bitmap_load_table(struct dr_image *image, const struct qcow2_bitmap *b, uint64_t **table,
                            struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t size = dr_file_size(image->files[0]);
    *table = malloc(b->entries * sizeof(**table));
    if (!*table)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_file_pread(image->files[0], *table, b->table_at, b->entries * UINT64_C(8), err);
    for (uint64_t i = 0; r == 0 && i < b->entries; i++) {
        uint64_t v = (*table)[i] = get_be64(&(*table)[i]), at = v & QCOW2_OFFSET;
        bool odd = (v & ~(QCOW2_OFFSET | QCOW2_BITMAP_ALL)) || at % q->cluster;
        if (odd || (at && (v & QCOW2_BITMAP_ALL)) || (at && at >= size))
            r = refuse_entry(image, b, i, v, err);
    }
    if (r < 0)
        free(DR_STEAL(*table));
    return r;
}

/* ------------------------------------------------------------------ reading */

struct run {
    uint64_t off, len; /* bytes of the disk, found so far; len 0: none */
    dr_bitmap_dirty fn;
    void *user;
};

static int run_add(struct run *run, uint64_t off, uint64_t len)
{
    if (run->len && run->off + run->len == off) {
        run->len += len;
        return 0;
    }
    int r = run->len ? run->fn(run->user, run->off, run->len) : 0;
    run->off = off;
    run->len = len;
    return r;
}

/* The bits of one cluster, the first of which stands for the bytes from off on; up to end. */
static int run_add_bits(struct run *run, const uint8_t *bits, uint64_t off, uint64_t end,
                        unsigned granularity_bits)
{
    uint64_t step = UINT64_C(1) << granularity_bits;
    int r = 0;
    for (uint64_t i = 0; r == 0 && off < end; i++, off += step) {
        if (i % 8 == 0 && bits[i / 8] == 0) { /* most are */
            i += 7;
            off += 7 * step;
        } else if (bits[i / 8] >> i % 8 & 1) {
            r = run_add(run, off, dr_min(step, end - off));
        }
    }
    return r;
}

int qcow2_bitmap_each_dirty(struct dr_image *image, const struct qcow2_bitmap *b, uint64_t size,
                            dr_bitmap_dirty fn, void *user, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t covers = q->cluster * 8 << b->granularity_bits, off = 0;
    CLEANUP_FREE uint64_t *table = NULL;
    CLEANUP_FREE uint8_t *bits = malloc(q->cluster);
    struct run run = {.fn = fn, .user = user};
    if (!bits)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = qcow2_bitmap_load_table(image, b, &table, err);
    for (uint64_t i = 0; r == 0 && i < b->entries && off < size; i++, off += covers) {
        uint64_t end = off + dr_min(covers, size - off), at = table[i] & QCOW2_OFFSET;
        if (table[i] & QCOW2_BITMAP_ALL)
            r = run_add(&run, off, end - off);
        if (r == 0 && at)
            r = dr_file_pread(image->files[0], bits, at, q->cluster, err);
        if (r == 0 && at)
            r = run_add_bits(&run, bits, off, end, b->granularity_bits);
    }
    return r || !run.len ? r : fn(user, run.off, run.len);
}

/* ------------------------------------------------------------------ setting more */

static int bits_init(struct qcow2_bits *s, struct dr_image *image, const struct qcow2_bitmap *b,
                     bool in_place, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    *s = (struct qcow2_bits){.image = image, .bitmap = *b, .in_place = in_place};
    s->index = UINT64_MAX;
    s->covers = q->cluster * 8 << b->granularity_bits;
    s->bits = malloc(q->cluster);
    return s->bits ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
}

int qcow2_bits_open(struct qcow2_bits *s, struct dr_image *image, const struct qcow2_bitmap *b,
                    bool in_place, struct dr_error *err)
{
    int r = bits_init(s, image, b, in_place, err);
    return r < 0 ? r : qcow2_bitmap_load_table(image, b, &s->table, err);
}

int qcow2_bits_open_new(struct qcow2_bits *s, struct dr_image *image, const struct qcow2_bitmap *b,
                        uint64_t entries, struct dr_error *err)
{
    int r = bits_init(s, image, b, false, err);
    s->bitmap.entries = (uint32_t)entries;
    s->table = calloc(entries, sizeof(*s->table));
    return r == 0 && !s->table ? dr_fail_errno(err, ENOMEM, "%s", image->path) : r;
}

void qcow2_bits_close(struct qcow2_bits *s)
{
    free(s->table);
    free(s->bits);
    qcow2_places_free(&s->taken);
    qcow2_places_free(&s->left);
    *s = (struct qcow2_bits){0};
}

/* Nothing else leads to the cluster. */
static int is_own(struct qcow2_bits *s, uint64_t at, bool *own, struct dr_error *err)
{
    uint64_t count = 0;
    int r = qcow2_count_now(s->image, at, &count, err);
    *own = r == 0 && count == 1;
    return r;
}

/* Another place for the cluster at hand; at 0: there is no room. */
static int take_place(struct qcow2_bits *s, uint64_t old, uint64_t *at, struct dr_error *err)
{
    struct dr_image *image = s->image;
    uint64_t cluster = qcow2_of(image)->cluster;
    struct dr_error why = DR_ERROR_INIT;
    int r = qcow2_take(image, 1, at, &why);
    if (r == -ENOSPC || r == -EFBIG)
        *at = 0;
    else if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    r = *at ? qcow2_places_add(&s->taken, *at, cluster) : 0;
    if (r == 0 && old)
        r = qcow2_places_add(&s->left, old, cluster);
    return r < 0 ? dr_fail_errno(err, -r, "%s: cannot store a bitmap", image->path) : 0;
}

/* Write the cluster at hand to the place that was taken last. */
static int write_taken(struct qcow2_bits *s, uint64_t *at, struct dr_error *err)
{
    struct dr_image *image = s->image;
    uint64_t cluster = qcow2_of(image)->cluster;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_file_pwrite(image->files[0], s->bits, *at, cluster, &why);
    if (r == -ENOSPC) {
        uint64_t unused = *at;
        s->taken.n--;
        *at = 0;
        return qcow2_lose(image, unused, cluster, err);
    }
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, *at, cluster);
    return 0;
}

/* Store the cluster at hand. */
int qcow2_bits_store(struct qcow2_bits *s, struct dr_error *err)
{
    struct dr_image *image = s->image;
    uint64_t cluster = qcow2_of(image)->cluster, old, at;
    bool own = false;
    int r = 0;
    if (!s->changed)
        return 0;
    at = old = s->table[s->index] & QCOW2_OFFSET;
    if (old && s->in_place)
        r = is_own(s, old, &own, err);
    if (r == 0 && own) {
        r = dr_file_pwrite(image->files[0], s->bits, old, cluster, err);
    } else if (r == 0) {
        r = take_place(s, old, &at, err);
        if (r == 0 && at)
            r = write_taken(s, &at, err);
    }
    if (r < 0)
        return r;
    if (!own) {
        s->table[s->index] = at ? at : QCOW2_BITMAP_ALL;
        s->table_changed = true;
    }
    s->changed = false;
    return 0;
}

/* Get the i-th cluster of bits. */
static int seek(struct qcow2_bits *s, uint64_t i, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(s->image)->cluster, at = s->table[i] & QCOW2_OFFSET;
    if (i == s->index)
        return 0;
    int r = qcow2_bits_store(s, err);
    if (r == 0)
        s->index = UINT64_MAX;
    if (r == 0 && at)
        r = dr_file_pread(s->image->files[0], s->bits, at, cluster, err);
    else
        memset(s->bits, 0, cluster);
    if (r == 0)
        s->index = i;
    return r;
}

static void set_bits(struct qcow2_bits *s, uint64_t from, uint64_t to)
{
    for (uint64_t i = from; i < to; i++) {
        uint8_t *byte = &s->bits[i / 8], mask = (uint8_t)(1u << i % 8);
        if (i % 8 == 0 && to - i >= 8)
            mask = 0xff;
        s->changed |= (*byte & mask) != mask;
        *byte |= mask;
        if (mask == 0xff)
            i += 7;
    }
}

int qcow2_bits_set(struct qcow2_bits *s, uint64_t off, uint64_t len, struct dr_error *err)
{
    unsigned shift = s->bitmap.granularity_bits;
    uint64_t end = dr_min(off + len, s->image->size); /* bits behind the disk's end stay 0 */
    int r = 0;
    while (r == 0 && off < end) {
        uint64_t i = off / s->covers, start = i * s->covers;
        uint64_t part = dr_min(end, start + s->covers);
        if (i >= s->bitmap.entries)
            break;
        if (!(s->table[i] & QCOW2_BITMAP_ALL) && (r = seek(s, i, err)) == 0)
            set_bits(s, (off - start) >> shift, (part - start - 1) / (UINT64_C(1) << shift) + 1);
        off = part;
    }
    return r;
}

int qcow2_bits_cut(struct qcow2_bits *s, uint64_t size, struct dr_error *err)
{
    uint64_t bits = dr_div_up(size, UINT64_C(1) << s->bitmap.granularity_bits);
    uint64_t in_cluster = qcow2_of(s->image)->cluster * 8, i = bits / in_cluster;
    if (bits % in_cluster == 0 || i >= s->bitmap.entries || !(s->table[i] & QCOW2_OFFSET))
        return 0;
    int r = seek(s, i, err);
    for (uint64_t n = bits % in_cluster; r == 0 && n < in_cluster; n++) {
        uint8_t mask = (uint8_t)(1u << n % 8);
        s->changed |= s->bits[n / 8] & mask;
        s->bits[n / 8] &= (uint8_t)~mask;
    }
    return r < 0 ? r : qcow2_bits_store(s, err);
}
