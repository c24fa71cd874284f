/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The plan of a new image: create's options and where everything stands.
 *
 *   header, refcount table, refcount blocks, L1 table, L2 tables, encryption header, data; L2
 * tables and data only where they are made at once (preallocation) */
#ifndef DR_FORMATS_QCOW2_LAYOUT_H
#define DR_FORMATS_QCOW2_LAYOUT_H

#include "formats/format.h"
#include "formats/luks/header.h"
#include "formats/qcow2/header.h"

enum qcow2_prealloc {
    QCOW2_PREALLOC_OFF,
    QCOW2_PREALLOC_METADATA, /* tables; the data is a hole of the file */
    QCOW2_PREALLOC_FALLOC,   /* and its space */
    QCOW2_PREALLOC_FULL,     /* and its bytes */
};

struct qcow2_layout {
    struct qcow2_header h;
    enum qcow2_prealloc prealloc;
    bool nocow;            /* its files are made without copy-on-write of the file system */
    const char *data_file; /* name to be recorded, or NULL */
    const char *backing_name, *backing_format;
    struct luks_options encrypt; /* with h.crypt */
    struct luks_header luks;     /* of which the keys are made when the image is */
    /* In clusters, each part from where the one before it ends. */
    uint64_t reftable, blocks, l1, l2, crypto, data;
};

/* Read the options and lay everything out. path is for messages. */
int qcow2_lay_out(struct qcow2_layout *lay, const char *path, const struct dr_create_params *params,
                  struct dr_error *err);

/* Once more: how many counts the image needs, and where what is behind them stands, after l2 or
 * data became another number. */
int qcow2_layout_counts(struct qcow2_layout *lay, const char *path, struct dr_error *err);

static inline uint64_t qcow2_l1_first(const struct qcow2_layout *lay)
{
    return 1 + lay->reftable + lay->blocks;
}
static inline uint64_t qcow2_crypto_first(const struct qcow2_layout *lay)
{
    return qcow2_l1_first(lay) + lay->l1 + lay->l2;
}
static inline uint64_t qcow2_data_first(const struct qcow2_layout *lay)
{
    return qcow2_crypto_first(lay) + lay->crypto;
}
/* The clusters of the image file. */
static inline uint64_t qcow2_layout_clusters(const struct qcow2_layout *lay)
{
    return qcow2_data_first(lay) + lay->data;
}

/* The value of refcount_bits: 1 << *order. */
int qcow2_read_width(const char *path, const char *value, unsigned *order, struct dr_error *err);
/* A number of bytes, perhaps with a suffix. */
int qcow2_read_size(const char *path, const struct dr_option *o, uint64_t *size,
                    struct dr_error *err);
/* The extension that says what features are called. */
const uint8_t *qcow2_feature_table(size_t *len);

/* The first cluster with the extensions and the parent's name. -ENOSPC: they do not fit. */
int qcow2_first_cluster(struct qcow2_layout *lay, const char *path, uint8_t *head,
                        struct dr_error *err);

#endif
