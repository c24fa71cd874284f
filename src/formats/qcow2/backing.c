/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Recording another parent, another directory of bitmaps, another data file's name, or a header of
 * another version. All of that stands in the first cluster, of which only the first 512 bytes can
 * be switched at once. So a new name goes where nothing is yet, what else changes behind byte 512
 * must be without meaning for the present first 512 bytes, and then those are written.
 *
 *   old    the cluster as it is
 *   ready  the same, with what the new one needs behind byte 512: still reads as the old one
 *   fresh  the first 512 bytes of the new one, and the rest of `ready`
 *   clean  fresh without what the old one has left
 */
#include "formats/qcow2/layout.h"
#include "formats/qcow2/qcow2.h"

#include "base/cleanup.h"

/* An extension that no program knows and all keep: it spans what is in the way. */
#define EXT_FILLER 0x44724669u
#define SECTOR     512u
#define BITMAPS    24u /* bytes of their extension */

struct change {
    struct dr_image *image;
    const char *name, *format; /* NULL = none */
    bool bitmaps;              /* their extension changes ... */
    const uint8_t *directory;  /* ... to this; NULL = there are none any more */
    bool renamed;              /* the data file's recorded name changes ... */
    const char *data_file;     /* ... to this; "" = none is recorded any more */
    unsigned version;          /* of the format; 0 = as it is */
    bool features;             /* with another version: a feature table is put in */
    uint8_t *old, *ready, *fresh, *clean;
    uint64_t name_at;
    bool moved;    /* the other extensions go to a place of their own ... */
    uint64_t rest; /* ... here; else what is behind byte 512 of them stands there */
};

static int decode_head(const struct change *c, const uint8_t *head, struct qcow2_header *h)
{
    uint64_t cluster = qcow2_of(c->image)->cluster;
    return qcow2_header_decode(h, c->image->path, head, cluster, NULL);
}

/* ------------------------------------------------------------------ do two clusters say the same?
 */

/* The next extension that stays as it is. */
static int next_real(const struct change *c, const struct qcow2_header *h, const uint8_t *head,
                     struct qcow2_ext *ext)
{
    int r;
    do
        r = qcow2_ext_next(h, "", head, qcow2_cluster(h), ext, NULL);
    while (r > 0 && (ext->type == EXT_FILLER || ext->type == QCOW2_EXT_BACKING_FORMAT ||
                     (c->bitmaps && ext->type == QCOW2_EXT_BITMAPS) ||
                     (c->renamed && ext->type == QCOW2_EXT_DATA_FILE) ||
                     (c->version && ext->type == QCOW2_EXT_FEATURES)));
    return r;
}

static bool same_extensions(const struct change *c, const struct qcow2_header *ha, const uint8_t *a,
                            const struct qcow2_header *hb, const uint8_t *b)
{
    struct qcow2_ext x = {0}, y = {0};
    for (;;) {
        int rx = next_real(c, ha, a, &x), ry = next_real(c, hb, b, &y);
        if (rx != ry || rx < 0)
            return false;
        if (rx == 0)
            return true;
        if (x.type != y.type || x.len != y.len || memcmp(a + x.at, b + y.at, x.len) != 0)
            return false;
    }
}

static bool is_text(const uint8_t *bytes, size_t len, const char *text)
{
    return text ? strlen(text) == len && memcmp(bytes, text, len) == 0 : len == 0;
}

/* The bitmaps' extension is this one, and counts; or with NULL it does not. */
static bool has_directory(const struct qcow2_header *h, const uint8_t *head,
                          const uint8_t *directory)
{
    struct qcow2_ext ext;
    int found = qcow2_ext_find(h, "", head, qcow2_cluster(h), QCOW2_EXT_BITMAPS, &ext, NULL);
    bool counts = h->autoclear & QCOW2_BITMAPS;
    if (!directory)
        return found >= 0 && !counts;
    return found > 0 && counts && ext.len == BITMAPS &&
           memcmp(head + ext.at, directory, BITMAPS) == 0;
}

/* As the old one has it. */
static bool keeps_directory(const struct change *c, const struct qcow2_header *old,
                            const struct qcow2_header *h, const uint8_t *head)
{
    struct qcow2_ext ext;
    int found = qcow2_ext_find(old, "", c->old, qcow2_cluster(old), QCOW2_EXT_BITMAPS, &ext, NULL);
    if (found < 0 || old->autoclear != h->autoclear)
        return false;
    if (!(old->autoclear & QCOW2_BITMAPS))
        return true;
    return found > 0 && ext.len == BITMAPS && has_directory(h, head, c->old + ext.at);
}

/* The data file's name is this one; NULL or "" = none is recorded. */
static bool has_data_file(const struct qcow2_header *h, const uint8_t *head, const char *name)
{
    struct qcow2_ext ext;
    int found = qcow2_ext_find(h, "", head, qcow2_cluster(h), QCOW2_EXT_DATA_FILE, &ext, NULL);
    return found >= 0 && is_text(head + ext.at, found ? ext.len : 0, name && *name ? name : NULL);
}

/* Does head name this parent, and say everything else that the old one says? fresh: with the
 * directory of bitmaps that it is to have. */
static bool says(const struct change *c, const uint8_t *head, const char *name, const char *format,
                 bool fresh)
{
    struct qcow2_header old, h;
    struct qcow2_ext ext;
    if (decode_head(c, c->old, &old) < 0 || decode_head(c, head, &h) < 0)
        return false;
    if (c->bitmaps &&
        !(fresh ? has_directory(&h, head, c->directory) : keeps_directory(c, &old, &h, head)))
        return false;
    if (h.version != (fresh && c->version ? c->version : old.version))
        return false;
    if (c->renamed &&
        !has_data_file(&h, head, fresh ? c->data_file : qcow2_of(c->image)->data_name))
        return false;
    int found =
        qcow2_ext_find(&h, "", head, qcow2_cluster(&h), QCOW2_EXT_BACKING_FORMAT, &ext, NULL);
    /* Without a name a format means nothing. */
    if (found < 0 || (name && !is_text(head + ext.at, found ? ext.len : 0, format)))
        return false;
    return is_text(head + h.backing_at, h.backing_at ? h.backing_len : 0, name) &&
           same_extensions(c, &old, c->old, &h, head);
}

/* ------------------------------------------------------------------ composing the new one */

static bool put_extension(uint8_t *head, uint64_t *at, uint64_t end, uint32_t type,
                          const uint8_t *data, uint32_t len)
{
    if (*at + 8 + dr_round_up(len, 8) > end)
        return false;
    put_be32(head + *at, type);
    put_be32(head + *at + 4, len);
    memcpy(head + *at + 8, data, len);
    *at += 8 + dr_round_up(len, 8);
    return true;
}

/* Everything that the old cluster holds ends here. */
static uint64_t old_end(const struct change *c, const struct qcow2_header *h)
{
    struct qcow2_ext ext = {0};
    uint64_t end = h->length;
    while (qcow2_ext_next(h, "", c->old, qcow2_cluster(h), &ext, NULL) > 0)
        end = dr_round_up(ext.at + ext.len, 8);
    end += 8;
    return h->backing_at ? dr_max(end, h->backing_at + h->backing_len) : end;
}

/* The new header itself, without what may be behind it; its length. */
static uint64_t put_header(const struct change *c, const struct qcow2_header *h, uint8_t *head)
{
    if (!c->version) {
        memcpy(head, c->old, h->length);
        return h->length;
    }
    memcpy(head, c->old, QCOW2_HEADER_V2);
    put_be32(head + 4, c->version);
    if (c->version < 3)
        return QCOW2_HEADER_V2;
    put_be32(head + QCOW2_AT_ORDER, 4);
    put_be32(head + QCOW2_AT_LENGTH, QCOW2_HEADER_TYPE);
    return QCOW2_HEADER_TYPE;
}

/* Those that change. */
static bool put_changed(const struct change *c, uint8_t *head, uint64_t *at, uint64_t end)
{
    size_t len;
    const uint8_t *features = qcow2_feature_table(&len);
    bool fits = true;
    if (c->bitmaps && c->directory)
        fits = put_extension(head, at, end, QCOW2_EXT_BITMAPS, c->directory, BITMAPS);
    if (fits && c->renamed && *c->data_file)
        fits = put_extension(head, at, end, QCOW2_EXT_DATA_FILE, (const uint8_t *)c->data_file,
                             (uint32_t)strlen(c->data_file));
    if (fits && c->features)
        fits = put_extension(head, at, end, QCOW2_EXT_FEATURES, features, (uint32_t)len);
    return fits;
}

/* The extensions of the new cluster into head, from *at on; *at: where they end. */
static bool put_extensions(struct change *c, const struct qcow2_header *h, uint8_t *head,
                           uint64_t *at)
{
    struct qcow2_ext ext = {0};
    uint64_t end = qcow2_cluster(h);
    bool fits = true;
    c->rest = SECTOR;
    if (c->name && c->format)
        fits = put_extension(head, at, end, QCOW2_EXT_BACKING_FORMAT, (const uint8_t *)c->format,
                             (uint32_t)strlen(c->format));
    fits = fits && put_changed(c, head, at, end);
    if (c->moved) {
        uint64_t to = dr_max(dr_round_up(old_end(c, h), 8), SECTOR);
        if (!fits || *at + 8 > to || to > end)
            return false;
        put_be32(head + *at, EXT_FILLER);
        put_be32(head + *at + 4, (uint32_t)(to - *at - 8));
        *at = c->rest = to;
    }
    while (fits && next_real(c, h, c->old, &ext) > 0)
        fits = put_extension(head, at, end, ext.type, c->old + ext.at, ext.len);
    return fits && put_extension(head, at, end, QCOW2_EXT_END, head, 0);
}

static bool compose(struct change *c)
{
    struct qcow2_header h;
    uint64_t cluster = qcow2_of(c->image)->cluster, at, name_len = c->name ? strlen(c->name) : 0;
    if (decode_head(c, c->old, &h) < 0)
        return false;
    memset(c->clean, 0, cluster);
    at = put_header(c, &h, c->clean);
    if (!put_extensions(c, &h, c->clean, &at))
        return false;
    c->name_at = dr_max(at, c->name_at);
    if (c->name_at + name_len > cluster)
        return false;
    if (c->name)
        memcpy(c->clean + c->name_at, c->name, name_len);
    put_be64(c->clean + QCOW2_AT_BACKING, c->name ? c->name_at : 0);
    put_be32(c->clean + QCOW2_AT_BACKING + 8, (uint32_t)name_len);
    if (c->bitmaps)
        put_be64(c->clean + QCOW2_AT_AUTOCLEAR, c->directory
                                                    ? h.autoclear | QCOW2_BITMAPS
                                                    : h.autoclear & ~(uint64_t)QCOW2_BITMAPS);

    memcpy(c->ready, c->old, cluster);
    if (at > c->rest)
        memcpy(c->ready + c->rest, c->clean + c->rest, at - c->rest);
    for (uint64_t i = dr_max(SECTOR, c->name_at); i < c->name_at + name_len; i++)
        c->ready[i] = c->clean[i];
    memcpy(c->fresh, c->clean, SECTOR);
    memcpy(c->fresh + SECTOR, c->ready + SECTOR, cluster - SECTOR);
    return says(c, c->ready, c->image->backing_name, c->image->backing_format, false) &&
           says(c, c->fresh, c->name, c->format, true) &&
           says(c, c->clean, c->name, c->format, true);
}

/* First as QEMU lays it out, with the name right behind the extensions; then with the name behind
 * the old one; then with the extensions moved, too. */
static int find_composition(struct change *c, struct dr_error *err)
{
    struct qcow2_header h;
    int r = decode_head(c, c->old, &h);
    uint64_t behind = r < 0 ? 0 : old_end(c, &h);
    for (int moved = 0; r == 0 && moved < 2; moved++)
        for (int far = 0; far < 2; far++) {
            c->moved = moved;
            c->name_at = far ? behind : 0;
            if (compose(c))
                return 0;
        }
    if (c->bitmaps || c->renamed || c->version)
        return dr_fail(err, ENOSPC,
                       "%s: the first cluster (%llu bytes) has no room to record %s "
                       "without a moment in which it would record none",
                       c->image->path, ULL(qcow2_of(c->image)->cluster),
                       c->bitmaps   ? "other bitmaps"
                       : c->renamed ? "another data file"
                                    : "another version");
    return dr_fail(err, ENOSPC,
                   "%s: the first cluster (%llu bytes) has no room to record the backing file "
                   "\"%s\" without a moment in which it would record none",
                   c->image->path, ULL(qcow2_of(c->image)->cluster), c->name ? c->name : "");
}

/* ------------------------------------------------------------------ writing it */

/* Write the bytes from SECTOR on in which `to` differs from the present ones, and make them
 * durable. A process that was killed may have written them and not flushed them: then nothing
 * differs, and they are flushed all the same before the first sector may lead there. */
static int write_rest(struct change *c, const uint8_t *present, const uint8_t *to,
                      struct dr_error *err)
{
    uint64_t cluster = qcow2_of(c->image)->cluster, from = SECTOR, end = cluster;
    struct dr_file *f = c->image->files[0];
    while (from < end && present[from] == to[from])
        from++;
    while (end > from && present[end - 1] == to[end - 1])
        end--;
    if (from >= end && dr_is_zero(to + SECTOR, (size_t)(cluster - SECTOR)))
        return 0;
    int r = from < end ? dr_file_pwrite(f, to + from, from, end - from, err) : 0;
    atomic_store(&f->dirty, true); /* perhaps not by this process */
    return r < 0 ? r : dr_file_flush(f, err);
}

static int write_change(struct change *c, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(c->image);
    int r = write_rest(c, c->old, c->ready, err);
    bool tables = c->bitmaps || c->version;
    if (r == 0 && tables)
        r = qcow2_switch_tables(c->image, 0, c->fresh, SECTOR, err);
    else if (r == 0)
        r = qcow2_switch(c->image, 0, c->fresh, SECTOR, err);
    if (r < 0)
        return r;
    q->h.backing_at = c->name ? c->name_at : 0;
    q->h.backing_len = c->name ? (uint32_t)strlen(c->name) : 0;
    r = write_rest(c, c->fresh, c->clean, tables ? NULL : err);
    return tables ? 0 : r; /* the new ones are there, whatever the old ones have left */
}

static int check_change(const struct change *c, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    const char *path = c->image->path;
    if (c->name && strlen(c->name) > QCOW2_MAX_NAME)
        return dr_fail(err, EINVAL, "%s: the backing file's name has %zu bytes, at most %u fit",
                       path, strlen(c->name), QCOW2_MAX_NAME);
    if (c->name && c->format && strlen(c->format) > QCOW2_MAX_FORMAT)
        return dr_fail(err, EINVAL, "%s: the backing format's name has more than %u bytes", path,
                       QCOW2_MAX_FORMAT);
    if (c->name && (q->h.autoclear & QCOW2_DATA_RAW))
        return dr_fail(err, EINVAL, "%s: a raw data file and a backing file exclude each other",
                       path);
    return 0;
}

/* try: write nothing. */
static int compose_and_write(struct change *c, bool try, struct dr_error *err)
{
    struct dr_image *image = c->image;
    CLEANUP_FREE uint8_t *old = NULL;
    uint64_t cluster = qcow2_of(image)->cluster;
    int r = qcow2_read_head(image, &old, err);
    if (r < 0)
        return r;
    CLEANUP_FREE uint8_t *space = malloc(3 * cluster);
    if (!space)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    c->old = old;
    c->ready = space;
    c->fresh = space + cluster;
    c->clean = space + 2 * cluster;
    r = find_composition(c, err);
    return r < 0 || try ? r : write_change(c, err);
}

int qcow2_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                      const char *format, unsigned flags, struct dr_error *err)
{
    struct change c = {.image = image, .name = name && *name ? name : NULL};
    c.format = format ? format : parent ? parent->fmt->name : NULL;
    int r = check_change(&c, err);
    if (r < 0)
        return r;
    CLEANUP_FREE char *its_name = c.name ? strdup(c.name) : NULL;
    CLEANUP_FREE char *its_format = c.name && c.format ? strdup(c.format) : NULL;
    if ((c.name && !its_name) || (c.name && c.format && !its_format))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    r = compose_and_write(&c, flags & DR_TRY, err);
    if (r < 0 || (flags & DR_TRY))
        return r;
    free(image->backing_name);
    free(image->backing_format);
    image->backing_name = DR_STEAL(its_name);
    image->backing_format = DR_STEAL(its_format);
    return 0;
}

int qcow2_set_bitmaps(struct dr_image *image, uint32_t n, uint64_t len, uint64_t at,
                      struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint8_t directory[BITMAPS] = {0};
    struct change c = {.image = image,
                       .name = image->backing_name,
                       .format = image->backing_format,
                       .bitmaps = true,
                       .directory = n ? directory : NULL};
    put_be32(directory, n);
    put_be64(directory + 8, len);
    put_be64(directory + 16, at);
    int r = compose_and_write(&c, false, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&image->lock);
    q->n_bitmaps = n;
    q->bitmaps_len = n ? len : 0;
    q->bitmaps_at = n ? at : 0;
    if (n)
        q->h.autoclear |= QCOW2_BITMAPS;
    else
        q->h.autoclear &= ~(uint64_t)QCOW2_BITMAPS;
    return 0;
}

/* Bring the driver's copy of the header up to date. */
static int adopt_head(struct dr_image *image, const struct change *c, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    CLEANUP_FREE char *name = c->renamed && *c->data_file ? strdup(c->data_file) : NULL;
    DR_LOCK_SCOPE(&image->lock);
    if (c->version) {
        q->h.version = c->version;
        q->h.length = c->version < 3 ? QCOW2_HEADER_V2 : QCOW2_HEADER_TYPE;
        q->h.incompatible = q->h.compatible = q->h.autoclear = 0;
        q->h.refcount_order = 4;
    }
    if (!c->renamed)
        return 0;
    if (*c->data_file && !name)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    free(q->data_name);
    q->data_name = DR_STEAL(name);
    return 0;
}

int qcow2_set_head(struct dr_image *image, unsigned version, const char *data_file, bool try,
                   struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    struct change c = {.image = image,
                       .name = image->backing_name,
                       .format = image->backing_format,
                       .renamed = data_file,
                       .data_file = data_file,
                       .version = version != q->h.version ? version : 0};
    c.features = c.version >= 3 && q->cluster > 4096;
    int r = compose_and_write(&c, true, c.features ? NULL : err);
    if (r == -ENOSPC && c.features) {
        c.features = false; /* it only says what features are called */
        r = compose_and_write(&c, true, err);
    }
    if (r == 0 && !try)
        r = compose_and_write(&c, false, err);
    return r < 0 || try ? r : adopt_head(image, &c, err);
}
