/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Decoding and checking the header and the extensions behind it. */
#include "formats/qcow2/header.h"

#include <stdio.h>
#include <string.h>

#include "base/bytes.h"

#define ULL(x) ((unsigned long long)(x))

/* ------------------------------------------------------------------ the header */

static void decode_fields(struct qcow2_header *h, const uint8_t *buf)
{
    h->version = get_be32(buf + 4);
    h->backing_at = get_be64(buf + QCOW2_AT_BACKING);
    h->backing_len = get_be32(buf + QCOW2_AT_BACKING + 8);
    h->cluster_bits = get_be32(buf + 20);
    h->size = get_be64(buf + QCOW2_AT_SIZE);
    h->l1_entries = get_be32(buf + QCOW2_AT_L1);
    h->l1_at = get_be64(buf + QCOW2_AT_L1 + 4);
    h->reftable_at = get_be64(buf + QCOW2_AT_REFTABLE);
    h->reftable_clusters = get_be32(buf + QCOW2_AT_REFTABLE + 8);
    h->n_snapshots = get_be32(buf + QCOW2_AT_SNAPSHOTS);
    h->snapshots_at = get_be64(buf + QCOW2_AT_SNAPSHOTS + 4);
    h->refcount_order = 4;
    h->length = QCOW2_HEADER_V2;
}

/* Version 3 has more fields. */
static int decode_v3(struct qcow2_header *h, const char *path, const uint8_t *buf, size_t len,
                     struct dr_error *err)
{
    if (len < QCOW2_HEADER_V3)
        return dr_fail(err, EINVAL, "%s: a qcow2 image that ends in its header, after %zu bytes",
                       path, len);
    h->incompatible = get_be64(buf + QCOW2_AT_INCOMPATIBLE);
    h->compatible = get_be64(buf + QCOW2_AT_COMPATIBLE);
    h->autoclear = get_be64(buf + QCOW2_AT_AUTOCLEAR);
    h->refcount_order = get_be32(buf + QCOW2_AT_ORDER);
    h->length = get_be32(buf + QCOW2_AT_LENGTH);
    if (h->length < QCOW2_HEADER_V3 || h->length % 8 || h->length > qcow2_cluster(h))
        return dr_fail(err, EINVAL,
                       "%s: header length %u at byte %u, expected a multiple of 8 from %u to %llu",
                       path, h->length, QCOW2_AT_LENGTH, QCOW2_HEADER_V3, ULL(qcow2_cluster(h)));
    unsigned type = 0;
    if (h->length > QCOW2_AT_COMPRESSION && len > QCOW2_AT_COMPRESSION)
        type = buf[QCOW2_AT_COMPRESSION];
    if (type > QCOW2_ZSTD)
        return dr_fail(err, ENOTSUP, "%s: compression type %u is not known", path, type);
    h->compression = type;
    if ((type != QCOW2_DEFLATE) != !!(h->incompatible & QCOW2_COMPRESSION))
        return dr_fail(err, EINVAL,
                       "%s: compression type %u at byte %u does not go with the incompatible "
                       "features 0x%llx",
                       path, type, QCOW2_AT_COMPRESSION, ULL(h->incompatible));
    return 0;
}

static int check_table(const struct qcow2_header *h, const char *path, const char *what,
                       uint64_t at, uint64_t bytes, uint64_t max, struct dr_error *err)
{
    if (bytes > max)
        return dr_fail(err, EFBIG, "%s: %s has %llu bytes, at most %llu are allowed", path, what,
                       ULL(bytes), ULL(max));
    if (at % qcow2_cluster(h) || !dr_inside(at, bytes, INT64_MAX))
        return dr_fail(err, EINVAL, "%s: %s is at byte %llu, which is no cluster's beginning", path,
                       what, ULL(at));
    return 0;
}

static int check_l1(const struct qcow2_header *h, const char *path, struct dr_error *err)
{
    uint64_t entry = h->incompatible & QCOW2_EXTL2 ? 16 : 8;
    uint64_t covered = qcow2_cluster(h) / entry * qcow2_cluster(h); /* by an L1 entry */
    int r = check_table(h, path, "the L1 table", h->l1_at, h->l1_entries * UINT64_C(8),
                        QCOW2_MAX_L1, err);
    if (r < 0)
        return r;
    if (h->l1_entries < dr_div_up(h->size, covered))
        return dr_fail(err, EINVAL, "%s: the L1 table has %u entries, %llu bytes of disk need %llu",
                       path, h->l1_entries, ULL(h->size), ULL(dr_div_up(h->size, covered)));
    return 0;
}

static int check_geometry(const struct qcow2_header *h, const char *path, struct dr_error *err)
{
    if (h->refcount_order > 6)
        return dr_fail(err, EINVAL, "%s: refcount order %u at byte %u, expected 0 to 6", path,
                       h->refcount_order, QCOW2_AT_ORDER);
    if ((h->incompatible & QCOW2_EXTL2) && h->cluster_bits < QCOW2_EXTL2_BITS)
        return dr_fail(err, EINVAL,
                       "%s: extended L2 entries need clusters of %u bytes or more, it has %llu",
                       path, 1u << QCOW2_EXTL2_BITS, ULL(qcow2_cluster(h)));
    if (h->size > INT64_MAX)
        return dr_fail(err, EFBIG, "%s: a disk of %llu bytes, at most 2^63-1 are possible", path,
                       ULL(h->size));
    int r = check_l1(h, path, err);
    if (r == 0 && h->n_snapshots > QCOW2_MAX_SNAPSHOTS)
        r = dr_fail(err, EFBIG, "%s: %u snapshots, at most %u are allowed", path, h->n_snapshots,
                    QCOW2_MAX_SNAPSHOTS);
    if (r == 0)
        r = check_table(h, path, "the snapshot table", h->snapshots_at, 0, 0, err);
    return r;
}

int qcow2_header_check_reftable(const struct qcow2_header *h, const char *path,
                                struct dr_error *err)
{
    if (!h->reftable_bad)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: the refcount table cannot be where the header's bytes 48 to 59 say: a "
                   "multiple of %llu and at most %llu bytes of table are expected; the image can "
                   "be read, and `drover check -r all` counts anew",
                   path, ULL(qcow2_cluster(h)), ULL(QCOW2_MAX_REFTABLE));
}

static void judge_reftable(struct qcow2_header *h, const char *path)
{
    uint64_t bytes = h->reftable_clusters * qcow2_cluster(h);
    h->reftable_bad = check_table(h, path, "the refcount table", h->reftable_at, bytes,
                                  QCOW2_MAX_REFTABLE, NULL) < 0;
    if (h->reftable_bad)
        h->reftable_clusters = 0;
}

static int check_backing(const struct qcow2_header *h, const char *path, struct dr_error *err)
{
    if (h->backing_at == 0)
        return 0;
    if (h->backing_len > QCOW2_MAX_NAME)
        return dr_fail(err, EINVAL, "%s: the backing file's name has %u bytes, at most %u fit",
                       path, h->backing_len, QCOW2_MAX_NAME);
    if (h->backing_at < h->length || !dr_inside(h->backing_at, h->backing_len, qcow2_cluster(h)))
        return dr_fail(
            err, EINVAL,
            "%s: the backing file's name at byte %llu is not in the first cluster behind "
            "the header",
            path, ULL(h->backing_at));
    return 0;
}

int qcow2_header_decode(struct qcow2_header *h, const char *path, const uint8_t *buf, size_t len,
                        struct dr_error *err)
{
    *h = (struct qcow2_header){0};
    if (len < QCOW2_HEADER_V2 || get_be32(buf) != QCOW2_MAGIC)
        return dr_fail(err, EINVAL,
                       "%s: Image is not in qcow2 format: expected \"QFI\\xfb\" and a header at 0",
                       path);
    decode_fields(h, buf);
    if (h->version != 2 && h->version != 3)
        return dr_fail(err, ENOTSUP, "%s: a QCOW image of version %u, only 2 and 3 are known", path,
                       h->version);
    if (h->cluster_bits < QCOW2_MIN_BITS || h->cluster_bits > QCOW2_MAX_BITS)
        return dr_fail(err, EINVAL, "%s: clusters of 2^%u bytes (byte 20), expected 2^%u to 2^%u",
                       path, h->cluster_bits, QCOW2_MIN_BITS, QCOW2_MAX_BITS);
    uint32_t crypt = get_be32(buf + 32);
    if (crypt > QCOW2_LUKS)
        return dr_fail(err, ENOTSUP, "%s: encryption method %u is not known", path, crypt);
    h->crypt = crypt;
    int r = h->version == 3 ? decode_v3(h, path, buf, len, err) : 0;
    if (r == 0)
        r = check_geometry(h, path, err);
    if (r < 0)
        return r;
    judge_reftable(h, path);
    return check_backing(h, path, err);
}

void qcow2_header_encode(const struct qcow2_header *h, uint8_t *buf)
{
    memset(buf, 0, h->length);
    put_be32(buf, QCOW2_MAGIC);
    put_be32(buf + 4, h->version);
    put_be64(buf + QCOW2_AT_BACKING, h->backing_at);
    put_be32(buf + QCOW2_AT_BACKING + 8, h->backing_len);
    put_be32(buf + 20, h->cluster_bits);
    put_be64(buf + QCOW2_AT_SIZE, h->size);
    put_be32(buf + 32, h->crypt);
    put_be32(buf + QCOW2_AT_L1, h->l1_entries);
    put_be64(buf + QCOW2_AT_L1 + 4, h->l1_at);
    put_be64(buf + QCOW2_AT_REFTABLE, h->reftable_at);
    put_be32(buf + QCOW2_AT_REFTABLE + 8, h->reftable_clusters);
    put_be32(buf + QCOW2_AT_SNAPSHOTS, h->n_snapshots);
    put_be64(buf + QCOW2_AT_SNAPSHOTS + 4, h->snapshots_at);
    if (h->length < QCOW2_HEADER_V3)
        return;
    put_be64(buf + QCOW2_AT_INCOMPATIBLE, h->incompatible);
    put_be64(buf + QCOW2_AT_COMPATIBLE, h->compatible);
    put_be64(buf + QCOW2_AT_AUTOCLEAR, h->autoclear);
    put_be32(buf + QCOW2_AT_ORDER, h->refcount_order);
    put_be32(buf + QCOW2_AT_LENGTH, h->length);
    if (h->length > QCOW2_AT_COMPRESSION)
        buf[QCOW2_AT_COMPRESSION] = (uint8_t)h->compression;
}

/* ------------------------------------------------------------------ extensions */

/* Where they must end at the latest. */
static uint64_t extensions_end(const struct qcow2_header *h)
{
    return h->backing_at ? h->backing_at : qcow2_cluster(h);
}

int qcow2_ext_next(const struct qcow2_header *h, const char *path, const uint8_t *head, size_t len,
                   struct qcow2_ext *ext, struct dr_error *err)
{
    uint64_t end = extensions_end(h);
    uint64_t at = ext->at ? dr_round_up(ext->at + ext->len, 8) : h->length;
    if (at + 8 > end)
        return 0;
    if (at + 8 > len)
        return -ERANGE;
    *ext = (struct qcow2_ext){get_be32(head + at), get_be32(head + at + 4), at + 8};
    if (ext->type == QCOW2_EXT_END)
        return 0;
    if (!dr_inside(ext->at, ext->len, end))
        return dr_fail(err, EINVAL,
                       "%s: the header extension 0x%08x at byte %llu has %u bytes, only %llu are "
                       "left in the first cluster",
                       path, ext->type, ULL(at), ext->len, ULL(end - at - 8));
    return ext->at + ext->len > len ? -ERANGE : 1;
}

int qcow2_ext_find(const struct qcow2_header *h, const char *path, const uint8_t *head, size_t len,
                   uint32_t type, struct qcow2_ext *ext, struct dr_error *err)
{
    int r;
    *ext = (struct qcow2_ext){0};
    do
        r = qcow2_ext_next(h, path, head, len, ext, err);
    while (r > 0 && ext->type != type);
    return r;
}

/* ------------------------------------------------------------------ features */

#define FEATURE_BYTES 48 /* kind, bit, name */

/* The image's own name of an incompatible feature, which ends up in name. */
static void feature_name(const struct qcow2_header *h, const char *path, const uint8_t *head,
                         size_t len, unsigned bit, char *name, size_t room)
{
    struct qcow2_ext ext;
    int r = qcow2_ext_find(h, path, head, len, QCOW2_EXT_FEATURES, &ext, NULL);
    snprintf(name, room, "bit %u", bit);
    for (uint32_t i = 0; r > 0 && i + FEATURE_BYTES <= ext.len; i += FEATURE_BYTES) {
        const uint8_t *row = head + ext.at + i;
        if (row[0] == 0 && row[1] == bit)
            snprintf(name, room, "\"%.46s\" (bit %u)", (const char *)row + 2, bit);
    }
}

int qcow2_check_features(const struct qcow2_header *h, const char *path, const uint8_t *head,
                         size_t len, struct dr_error *err)
{
    uint64_t unknown = h->incompatible & ~(uint64_t)QCOW2_INCOMPATIBLE;
    char name[80];
    if (!unknown)
        return 0;
    feature_name(h, path, head, len, (unsigned)__builtin_ctzll(unknown), name, sizeof(name));
    return dr_fail(err, ENOTSUP, "%s: uses the feature %s, which this version does not know", path,
                   name);
}
