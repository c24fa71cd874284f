/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The first cluster of a qcow2 image: header, extensions, the parent's name.
 *
 * Source: QEMU's docs/interop/qcow2.txt. All integers are big-endian. What is QEMU's limit rather
 * than the format's is marked so: images and their users depend on it. */
#ifndef DR_FORMATS_QCOW2_HEADER_H
#define DR_FORMATS_QCOW2_HEADER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define QCOW2_MAGIC          0x514649fbu
#define QCOW2_HEADER_V2      72u
#define QCOW2_HEADER_V3      104u
#define QCOW2_HEADER_TYPE    112u /* with the compression type */
#define QCOW2_MIN_BITS       9u   /* clusters of 512 bytes ... */
#define QCOW2_MAX_BITS       21u  /* ... to 2 MiB (QEMU's) */
#define QCOW2_SUBS           32u  /* sub-clusters of a cluster with an extended entry */
#define QCOW2_EXTL2_BITS     14u  /* so that a sub-cluster has 512 bytes */
#define QCOW2_MAX_L1         (UINT64_C(32) << 20) /* bytes (QEMU's) */
#define QCOW2_MAX_REFTABLE   (UINT64_C(8) << 20)  /* bytes (QEMU's) */
#define QCOW2_MAX_SNAPSHOTS  65536u               /* QEMU's */
#define QCOW2_MAX_BITMAPS    65535u               /* QEMU's */
#define QCOW2_MAX_BITMAP_DIR (UINT64_C(64) << 20) /* bytes (QEMU's) */
#define QCOW2_MAX_NAME       1023u                /* bytes of the parent's name */
#define QCOW2_MAX_FORMAT     15u                  /* bytes of the parent's format (QEMU's) */
#define QCOW2_MAX_OFFSET     (UINT64_C(1) << 56)  /* entries have bits 9 to 55 */

/* Incompatible features: who does not know one must not open the image. */
enum {
    QCOW2_DIRTY = 1 << 0,   /* the counts may be wrong */
    QCOW2_CORRUPT = 1 << 1, /* not to be written to before it was repaired */
    QCOW2_DATA_FILE = 1 << 2,
    QCOW2_COMPRESSION = 1 << 3, /* another compression type than 0 */
    QCOW2_EXTL2 = 1 << 4,
    QCOW2_INCOMPATIBLE = 31
};
enum { QCOW2_LAZY = 1 << 0 }; /* compatible */
/* Autoclear features: who does not know one clears it before writing. */
enum { QCOW2_BITMAPS = 1 << 0, QCOW2_DATA_RAW = 1 << 1, QCOW2_AUTOCLEAR = 3 };

enum qcow2_crypt { QCOW2_PLAIN, QCOW2_AES, QCOW2_LUKS };
enum qcow2_compression { QCOW2_DEFLATE, QCOW2_ZSTD };

/* Places of fields; each group that switches at once lies inside the first 512 bytes. */
enum {
    QCOW2_AT_BACKING = 8, /* u64 offset, u32 length */
    QCOW2_AT_SIZE = 24,
    QCOW2_AT_L1 = 36,        /* u32 entries, u64 offset */
    QCOW2_AT_REFTABLE = 48,  /* u64 offset, u32 clusters */
    QCOW2_AT_SNAPSHOTS = 60, /* u32 number, u64 offset */
    QCOW2_AT_INCOMPATIBLE = 72,
    QCOW2_AT_COMPATIBLE = 80,
    QCOW2_AT_AUTOCLEAR = 88,
    QCOW2_AT_ORDER = 96,
    QCOW2_AT_LENGTH = 100,
    QCOW2_AT_COMPRESSION = 104
};

struct qcow2_header {
    uint32_t version; /* 2 or 3 */
    uint64_t backing_at;
    uint32_t backing_len;
    unsigned cluster_bits;
    uint64_t size;
    enum qcow2_crypt crypt;
    uint64_t l1_at;
    uint32_t l1_entries;
    uint64_t reftable_at;
    uint32_t reftable_clusters; /* 0 where reftable_bad */
    bool reftable_bad;          /* it cannot be where the header says: reading needs no counts */
    uint64_t snapshots_at;
    uint32_t n_snapshots;
    uint64_t incompatible, compatible, autoclear;
    unsigned refcount_order; /* counts have 1 << order bits */
    uint32_t length;
    enum qcow2_compression compression;
};

/* -EINVAL where the refcount table cannot be: nothing is written to such an image. */
int qcow2_header_check_reftable(const struct qcow2_header *h, const char *path,
                                struct dr_error *err);
/* Decode and check buf, the first len bytes of the file. path is for messages. */
int qcow2_header_decode(struct qcow2_header *h, const char *path, const uint8_t *buf, size_t len,
                        struct dr_error *err);
/* The first h->length bytes of a new image (h->length is 72, 104 or 112). */
void qcow2_header_encode(const struct qcow2_header *h, uint8_t *buf);

/* Refuses what is in no table of features, by the name that the image's feature table has for it;
 * head: the cluster as far as it was read. */
int qcow2_check_features(const struct qcow2_header *h, const char *path, const uint8_t *head,
                         size_t len, struct dr_error *err);

/* ------------------------------------------------------------------ extensions */

enum {
    QCOW2_EXT_END = 0,
    QCOW2_EXT_BACKING_FORMAT = 0xe2792aca,
    QCOW2_EXT_FEATURES = 0x6803f857,
    QCOW2_EXT_BITMAPS = 0x23852875,
    QCOW2_EXT_CRYPTO = 0x0537be77,
    QCOW2_EXT_DATA_FILE = 0x44415441
};

struct qcow2_ext {
    uint32_t type, len;
    size_t at; /* of its data in the buffer */
};

/* The extension after *ext, or the first if ext->at is 0. 1 = found, 0 = there is no more, or
 * -EINVAL. head: the first `len` bytes of the file; -ERANGE: it needs more of them. */
int qcow2_ext_next(const struct qcow2_header *h, const char *path, const uint8_t *head, size_t len,
                   struct qcow2_ext *ext, struct dr_error *err);
/* The same, the one of that type. */
int qcow2_ext_find(const struct qcow2_header *h, const char *path, const uint8_t *head, size_t len,
                   uint32_t type, struct qcow2_ext *ext, struct dr_error *err);

static inline uint64_t qcow2_cluster(const struct qcow2_header *h)
{
    return UINT64_C(1) << h->cluster_bits;
}

#endif
