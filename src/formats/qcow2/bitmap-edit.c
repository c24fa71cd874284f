/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Another directory in the place of the present one. It and the tables that changed are written
 * where nothing is, and become durable; one sector of the header switches; then what only the old
 * ones lead to is given up. Killed anywhere, the image has the old bitmaps or the new ones, and
 * perhaps space that a check gives back. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

int qcow2_edit_begin(struct qcow2_bitmap_edit *e, struct dr_image *image, struct dr_error *err)
{
    *e = (struct qcow2_bitmap_edit){.image = image};
    int r = qcow2_bitmaps_load(image, &e->old, err);
    if (r < 0)
        return r;
    e->list = calloc(e->old.n + 1, sizeof(*e->list)); /* one may be added */
    if (!e->list)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (e->n = 0; e->n < e->old.n; e->n++) {
        struct qcow2_bitmap_draft *d = &e->list[e->n];
        d->b = e->old.list[e->n];
        d->raw = malloc(d->b.len);
        if (!d->raw)
            return dr_fail_errno(err, ENOMEM, "%s", image->path);
        memcpy(d->raw, e->old.bytes + d->b.at, d->b.len);
    }
    return 0;
}

void qcow2_edit_end(struct qcow2_bitmap_edit *e)
{
    for (uint32_t i = 0; e->list && i <= e->old.n; i++) {
        free(e->list[i].raw);
        free(e->list[i].table);
    }
    free(e->list);
    qcow2_bitmaps_free(&e->old);
    qcow2_places_free(&e->taken);
    qcow2_places_free(&e->left);
    *e = (struct qcow2_bitmap_edit){0};
}

static int no_memory(const struct qcow2_bitmap_edit *e, struct dr_error *err)
{
    return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
}

/* ------------------------------------------------------------------ drafting */

struct qcow2_bitmap_draft *qcow2_edit_find(struct qcow2_bitmap_edit *e, const char *name)
{
    const struct qcow2_bitmap *b = qcow2_bitmaps_find(&e->old, name);
    return b ? &e->list[b - e->old.list] : NULL;
}

struct qcow2_bitmap_draft *qcow2_edit_add(struct qcow2_bitmap_edit *e, const char *name,
                                          unsigned granularity_bits)
{
    struct qcow2_bitmap_draft *d = &e->list[e->n];
    d->b = (struct qcow2_bitmap){
        .type = 1, .granularity_bits = granularity_bits, .name_len = (unsigned)strlen(name)};
    d->b.len = (size_t)qcow2_bitmap_entry_len(&d->b);
    d->raw = calloc(1, d->b.len);
    if (!d->raw)
        return NULL;
    d->raw[16] = 1;
    d->raw[17] = (uint8_t)granularity_bits;
    put_be16(d->raw + 18, (uint16_t)d->b.name_len);
    memcpy(d->raw + QCOW2_BITMAP_ENTRY, name, d->b.name_len);
    e->n++;
    return d;
}

/* The table and the clusters of bits that `keep`, its next table, does not have. */
static int leave_table(struct qcow2_bitmap_edit *e, const struct qcow2_bitmap *b,
                       const uint64_t *keep, uint64_t n_keep, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(e->image)->cluster;
    CLEANUP_FREE uint64_t *table = NULL;
    int r = qcow2_bitmap_load_table(e->image, b, &table, err);
    for (uint64_t i = 0; r == 0 && i < b->entries; i++) {
        uint64_t at = table[i] & QCOW2_OFFSET;
        bool kept = i < n_keep && (keep[i] & QCOW2_OFFSET) == at;
        if (at && !kept && qcow2_places_add(&e->left, at, cluster) < 0)
            r = no_memory(e, err);
    }
    if (r == 0 && qcow2_places_add(&e->left, b->table_at, b->entries * UINT64_C(8)) < 0)
        r = no_memory(e, err);
    return r;
}

int qcow2_edit_remove(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d,
                      struct dr_error *err)
{
    int r = leave_table(e, &d->b, NULL, 0, err);
    if (r == -EIO) /* what a damaged table leads to is left for a check to give back */
        e->left.n = 0;
    else if (r < 0)
        return r;
    free(d->raw);
    free(d->table);
    memmove(d, d + 1, (size_t)(&e->list[e->n] - (d + 1)) * sizeof(*d));
    e->list[--e->n] = (struct qcow2_bitmap_draft){0};
    return 0;
}

int qcow2_edit_table(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d, uint64_t *table,
                     uint64_t entries, struct dr_error *err)
{
    int r = d->b.table_at ? leave_table(e, &d->b, table, entries, err) : 0;
    free(d->table);
    d->table = table;
    d->entries = entries;
    return r;
}

int qcow2_edit_taken(struct qcow2_bitmap_edit *e, struct qcow2_bits *bits, struct dr_error *err)
{
    int r = 0;
    for (; r == 0 && bits->taken.n; bits->taken.n--) {
        struct qcow2_place place = bits->taken.list[bits->taken.n - 1];
        r = qcow2_places_add(&e->taken, place.at, place.len);
    }
    return r < 0 ? no_memory(e, err) : 0;
}

void qcow2_draft_flags(struct qcow2_bitmap_draft *d, uint32_t flags)
{
    d->b.flags = flags;
    put_be32(d->raw + QCOW2_BITMAP_AT_FLAGS, flags);
}

/* ------------------------------------------------------------------ writing it */

static int take(struct qcow2_bitmap_edit *e, uint64_t bytes, uint64_t *at, struct dr_error *err)
{
    uint64_t cluster = qcow2_of(e->image)->cluster, n = dr_div_up(bytes, cluster);
    int r = qcow2_take(e->image, n, at, err);
    if (r == 0 && qcow2_places_add(&e->taken, *at, n * cluster) < 0)
        r = no_memory(e, err);
    return r;
}

static int write_table(struct qcow2_bitmap_edit *e, struct qcow2_bitmap_draft *d,
                       struct dr_error *err)
{
    uint64_t len = dr_round_up(d->entries * 8, qcow2_of(e->image)->cluster), at;
    CLEANUP_FREE uint8_t *bytes = calloc(1, len);
    if (!bytes)
        return no_memory(e, err);
    for (uint64_t i = 0; i < d->entries; i++)
        put_be64(bytes + 8 * i, d->table[i]);
    int r = take(e, len, &at, err);
    if (r == 0)
        r = qcow2_write_taken(e->image, bytes, len, at, err);
    put_be64(d->raw, at);
    put_be32(d->raw + 8, (uint32_t)d->entries);
    return r;
}

static uint64_t directory_len(const struct qcow2_bitmap_edit *e)
{
    uint64_t len = 0;
    for (uint32_t i = 0; i < e->n; i++)
        len += e->list[i].b.len;
    return len;
}

static int write_directory(struct qcow2_bitmap_edit *e, uint64_t len, uint64_t *at,
                           struct dr_error *err)
{
    uint64_t room = dr_round_up(len, qcow2_of(e->image)->cluster), to = 0;
    CLEANUP_FREE uint8_t *bytes = calloc(1, room ? room : 1);
    if (!bytes)
        return no_memory(e, err);
    for (uint32_t i = 0; i < e->n; i++) {
        const struct qcow2_bitmap_draft *d = &e->list[i];
        memcpy(bytes + to, d->raw, d->b.len);
        to += d->b.len;
    }
    int r = take(e, room, at, err);
    return r < 0 ? r : qcow2_write_taken(e->image, bytes, room, *at, err);
}

static int prepare(struct qcow2_bitmap_edit *e, uint64_t len, uint64_t *at, struct dr_error *err)
{
    int r = 0;
    for (uint32_t i = 0; r == 0 && i < e->n; i++)
        if (e->list[i].table)
            r = write_table(e, &e->list[i], err);
    if (r == 0 && e->n)
        r = write_directory(e, len, at, err);
    return r < 0 ? r : dr_image_flush(e->image, err);
}

/* Who asks for the bitmaps has begin_lock, too: nobody reads a directory while it is given up. */
static int switch_over(struct qcow2_bitmap_edit *e, uint64_t len, uint64_t at, struct dr_error *err)
{
    uint64_t old = qcow2_of(e->image)->bitmaps_at;
    int r = qcow2_set_bitmaps(e->image, e->n, len, at, err);
    if (r < 0)
        return r;
    e->taken.n = 0;
    e->switched = true;
    if (old && qcow2_places_add(&e->left, old, e->old.len) < 0)
        r = no_memory(e, err);
    return r < 0 ? r : qcow2_places_lose(e->image, &e->left, err);
}

int qcow2_edit_commit(struct qcow2_bitmap_edit *e, struct dr_error *err)
{
    uint64_t len = directory_len(e), at = 0;
    if (len > QCOW2_MAX_BITMAP_DIR)
        return dr_fail(err, EINVAL, "Not enough space in the bitmap directory");
    int r = prepare(e, len, &at, err);
    if (r == 0) {
        if (e->live)
            pthread_mutex_lock(&e->image->begin_lock);
        r = switch_over(e, len, at, err);
        if (e->live)
            pthread_mutex_unlock(&e->image->begin_lock);
    }
    if (r < 0 && !qcow2_of(e->image)->damage) /* else the header may name what was taken */
        qcow2_places_lose(e->image, &e->taken, NULL);
    return r;
}
