/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bitmap directory: one entry for each bitmap, one behind the other.
 *
 *   0 u64 table   8 u32 entries of the table   12 u32 flags   16 u8 type   17 u8 granularity
 *   18 u16 length of the name   20 u32 length of the extra data; extra data; name; padding to 8
 */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

void qcow2_bitmaps_free(struct qcow2_bitmaps *t)
{
    free(t->bytes);
    free(t->list);
    *t = (struct qcow2_bitmaps){0};
}

/* ------------------------------------------------------------------ one entry */

void qcow2_bitmap_decode(const uint8_t *raw, struct qcow2_bitmap *b)
{
    b->table_at = get_be64(raw);
    b->entries = get_be32(raw + 8);
    b->flags = get_be32(raw + QCOW2_BITMAP_AT_FLAGS);
    b->type = raw[16];
    b->granularity_bits = raw[17];
    b->name_len = get_be16(raw + 18);
    b->extra = get_be32(raw + 20);
}

uint64_t qcow2_bitmap_entry_len(const struct qcow2_bitmap *b)
{
    return dr_round_up(QCOW2_BITMAP_ENTRY + (uint64_t)b->extra + b->name_len, 8);
}

uint64_t qcow2_bitmap_entries(const struct qcow2 *q, uint64_t size, unsigned granularity_bits)
{
    uint64_t bits = dr_div_up(size, UINT64_C(1) << granularity_bits);
    return dr_div_up(dr_div_up(bits, 8), q->cluster);
}

const char *qcow2_bitmap_problem(const struct dr_image *image, const struct qcow2_bitmap *b)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t bytes = b->entries * UINT64_C(8);
    if (b->table_at == 0 || b->table_at % q->cluster || b->table_at > INT64_MAX)
        return "its table is at no cluster's beginning";
    if (bytes == 0 || b->entries > QCOW2_MAX_BITMAP_TABLE ||
        b->entries * q->cluster > QCOW2_MAX_BITMAP_BYTES)
        return "its table's size is out of bounds";
    if (!dr_inside(b->table_at, bytes, dr_file_size(image->files[0]) + q->cluster - 1))
        return "its table is behind the end of the file";
    if (b->flags & ~(uint32_t)QCOW2_BITMAP_FLAGS)
        return "it has reserved flags";
    if (b->type != 1)
        return "it is of an unknown type";
    if (b->granularity_bits < QCOW2_BITMAP_MIN_BITS || b->granularity_bits > QCOW2_BITMAP_MAX_BITS)
        return "its granularity is out of bounds";
    if (b->name_len == 0 || b->name_len > QCOW2_MAX_BITMAP_NAME)
        return "its name's length is out of bounds";
    if (!(b->flags & QCOW2_BITMAP_IN_USE) &&
        b->entries < qcow2_bitmap_entries(q, q->h.size, b->granularity_bits))
        return "it does not cover the disk";
    return NULL;
}

/* ------------------------------------------------------------------ all of them */

static int refuse_entry(const struct dr_image *image, uint32_t i, size_t at, const char *problem,
                        struct dr_error *err)
{
    return dr_fail(err, EIO,
                   "%s: bitmap directory entry %u at byte %llu: %s; `drover check -r all` removes "
                   "it",
                   image->path, i, ULL(qcow2_of(image)->bitmaps_at + at), problem);
}

static int parse(struct dr_image *image, struct qcow2_bitmaps *t, struct dr_error *err)
{
    size_t at = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        struct qcow2_bitmap *b = &t->list[i];
        b->at = at;
        if (!dr_inside(at, QCOW2_BITMAP_ENTRY, t->len))
            return refuse_entry(image, i, at, "it is behind the end of the directory", err);
        qcow2_bitmap_decode(t->bytes + at, b);
        uint64_t len = qcow2_bitmap_entry_len(b);
        if (!dr_inside(at, len, t->len))
            return refuse_entry(image, i, at, "it is behind the end of the directory", err);
        b->len = (size_t)len;
        at += b->len;
        const char *problem = qcow2_bitmap_problem(image, b);
        if (problem)
            return refuse_entry(image, i, b->at, problem, err);
    }
    return 0;
}

struct named {
    const char *name;
    unsigned len;
    uint32_t i;
};

static int name_order(const void *a, const void *b)
{
    const struct named *x = a, *y = b;
    int order = memcmp(x->name, y->name, x->len < y->len ? x->len : y->len);
    return order ? order : (x->len > y->len) - (x->len < y->len);
}

static int check_names(struct dr_image *image, const struct qcow2_bitmaps *t, struct dr_error *err)
{
    CLEANUP_FREE struct named *names = malloc((t->n ? t->n : 1) * sizeof(*names));
    if (!names)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (uint32_t i = 0; i < t->n; i++)
        names[i] = (struct named){qcow2_bitmap_name(t, &t->list[i]), t->list[i].name_len, i};
    qsort(names, t->n, sizeof(*names), name_order);
    for (uint32_t i = 1; i < t->n; i++)
        if (name_order(&names[i - 1], &names[i]) == 0)
            return refuse_entry(image, names[i].i, t->list[names[i].i].at,
                                "another one has the same name", err);
    return 0;
}

int qcow2_bitmaps_load(struct dr_image *image, struct qcow2_bitmaps *t, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    *t = (struct qcow2_bitmaps){0};
    if (!q->bitmaps_at)
        return 0;
    t->len = (size_t)q->bitmaps_len;
    t->n = q->n_bitmaps;
    t->bytes = malloc(t->len ? t->len : 1);
    t->list = calloc(t->n, sizeof(*t->list));
    if (!t->bytes || !t->list)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_file_pread(image->files[0], t->bytes, q->bitmaps_at, t->len, err);
    if (r == 0)
        r = parse(image, t, err);
    return r < 0 ? r : check_names(image, t, err);
}

struct qcow2_bitmap *qcow2_bitmaps_find(const struct qcow2_bitmaps *t, const char *name)
{
    size_t len = strlen(name);
    for (uint32_t i = 0; i < t->n; i++) {
        struct qcow2_bitmap *b = &t->list[i];
        if (b->name_len == len && memcmp(qcow2_bitmap_name(t, b), name, len) == 0)
            return b;
    }
    return NULL;
}

bool qcow2_bitmaps_inside(const struct dr_image *image)
{
    return qcow2_of(image)->h.version >= 3;
}

int qcow2_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user, struct dr_error *err)
{
    CLEANUP_BITMAPS struct qcow2_bitmaps t = {0};
    int r = qcow2_bitmaps_load(image, &t, err);
    for (uint32_t i = 0; r == 0 && i < t.n; i++) {
        const struct qcow2_bitmap *b = &t.list[i];
        CLEANUP_FREE char *name = strndup(qcow2_bitmap_name(&t, b), b->name_len);
        if (!name)
            return dr_fail_errno(err, ENOMEM, "%s", image->path);
        struct dr_bitmap_info info = {
            .name = name,
            .granularity = UINT64_C(1) << b->granularity_bits,
            .enabled = b->flags & QCOW2_BITMAP_AUTO,
            .inconsistent = b->flags & QCOW2_BITMAP_IN_USE,
            .noting = qcow2_track_has(image, i),
        };
        r = each(user, &info);
    }
    return r;
}

/* ------------------------------------------------------------------ measure */

struct measured {
    uint64_t size, cluster, bits, names;
};

static int measure_one(void *user, const struct dr_bitmap_info *info)
{
    struct measured *m = user;
    uint64_t bytes = dr_div_up(dr_div_up(m->size, info->granularity), 8);
    uint64_t clusters = dr_div_up(bytes, m->cluster);
    m->bits += clusters * m->cluster + dr_round_up(clusters * 8, m->cluster);
    m->names += dr_round_up(QCOW2_BITMAP_ENTRY + strlen(info->name), 8);
    return 0;
}

int qcow2_measure_bitmaps(struct dr_image *image, uint64_t cluster, struct dr_cost *cost,
                          struct dr_error *err)
{
    if (!image)
        return 0;
    struct measured m = {.size = image->size, .cluster = cluster};
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_image_bitmap_list(image, measure_one, &m, &why);
    if (r == -ENOTSUP)
        return 0;
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    if (!m.bits && !dr_image_bitmaps_inside(image))
        return 0;
    cost->has_bitmaps = true;
    cost->bitmaps = m.bits + dr_round_up(m.names, cluster);
    return 0;
}
