/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An image that goes into a pipe: header, counts and tables first, then the clusters in the order
 * of the disk. The map of the disk, which is told twice, says where everything will stand: the
 * first time the clusters and tables are counted, the second time the L2 tables are written.
 * Nothing of the map is kept but which L2 tables there are, so memory does not grow with it; a sum
 * over it tells whether the disk changed meanwhile. */
#include "formats/qcow2/stream-write.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "formats/qcow2/layout.h"
#include "formats/qcow2/qcow2.h"

#define STEP       (256u * 1024)                   /* bytes that are collected for one write */
#define CODED_MOST (UINT64_C(1) << QCOW2_MAX_BITS) /* a cluster as it is */
#define NO_TABLE   UINT64_MAX

/* Runs of clusters, however they were cut when they were told. */
struct trail {
    uint64_t start, end, sum;
};

struct writer {
    const char *path;
    struct dr_file *out;
    struct qcow2_layout lay;
    uint64_t cluster, entry, span; /* bytes: of a cluster, of an L2 entry; guest bytes of a table */
    uint8_t *used;                 /* a bit for each L2 table that there is */
    struct trail trails[3];        /* of the two times that the map was told, and of the clusters */
    uint64_t table, next;          /* the L2 table that is being made; the next data cluster */
    uint8_t *l2;                   /* its bytes */
    uint8_t *buf;                  /* what is to be written at `at` */
    size_t len;
    uint64_t at;
};

static void follow(struct trail *t, uint64_t start, uint64_t end)
{
    if (start == t->end && t->end > 0) {
        t->end = end;
        return;
    }
    t->sum = (t->sum ^ t->start) * UINT64_C(0x100000001b3);
    t->sum = (t->sum ^ t->end) * UINT64_C(0x100000001b3);
    t->start = start;
    t->end = end;
}

static int check_trail(struct writer *w, unsigned which, struct dr_error *err)
{
    follow(&w->trails[which], UINT64_MAX, UINT64_MAX);
    if (which == 0 || w->trails[which].sum == w->trails[0].sum)
        return 0;
    return dr_fail(
        err, EBUSY,
        "%s: what the source has and what are holes changed while it was copied: somebody "
        "writes to it, and the image is not usable",
        w->path);
}

/* ------------------------------------------------------------------ bytes, one after another */

static int write_out(struct writer *w, struct dr_error *err)
{
    int r = w->len ? dr_file_pwrite(w->out, w->buf, w->at, w->len, err) : 0;
    w->at += w->len;
    w->len = 0;
    return r;
}

static int append(struct writer *w, const void *data, size_t len, struct dr_error *err)
{
    int r = w->len + len > STEP ? write_out(w, err) : 0;
    if (r < 0)
        return r;
    if (len > STEP) {
        r = dr_file_pwrite(w->out, data, w->at, len, err);
        w->at += len;
        return r;
    }
    memcpy(w->buf + w->len, data, len);
    w->len += len;
    return 0;
}

static int append_be64(struct writer *w, uint64_t value, struct dr_error *err)
{
    uint8_t bytes[8];
    put_be64(bytes, value);
    return append(w, bytes, sizeof(bytes), err);
}

/* ------------------------------------------------------------------ what comes first */

static int append_first_cluster(struct writer *w, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *head = malloc(w->cluster);
    if (!head)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    int r = qcow2_first_cluster(&w->lay, w->path, head, err);
    return r < 0 ? r : append(w, head, w->cluster, err);
}

static int append_reftable(struct writer *w, struct dr_error *err)
{
    uint64_t n = w->lay.reftable * w->cluster / 8;
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < n; i++)
        r = append_be64(w, i < w->lay.blocks ? (1 + w->lay.reftable + i) * w->cluster : 0, err);
    return r;
}

static int append_blocks(struct writer *w, struct dr_error *err)
{
    unsigned order = w->lay.h.refcount_order;
    uint64_t per_block = w->cluster * 8 >> order, n = qcow2_layout_clusters(&w->lay);
    CLEANUP_FREE uint8_t *block = malloc(w->cluster);
    if (!block)
        return dr_fail_errno(err, ENOMEM, "%s", w->path);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < w->lay.blocks; i++) {
        memset(block, 0, w->cluster);
        for (uint64_t j = 0; j < per_block && i * per_block + j < n; j++)
            qcow2_count_put(order, block, j, 1);
        r = append(w, block, w->cluster, err);
    }
    return r;
}

static bool is_used(const struct writer *w, uint64_t table)
{
    return w->used[table / 8] & 1u << table % 8;
}

static int append_l1(struct writer *w, struct dr_error *err)
{
    uint64_t at = qcow2_l1_first(&w->lay) + w->lay.l1;
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < w->lay.l1 * w->cluster / 8; i++) {
        bool there = i < w->lay.h.l1_entries && is_used(w, i);
        r = append_be64(w, there ? at * w->cluster | QCOW2_COPIED : 0, err);
        at += there;
    }
    return r;
}

static int append_front(struct writer *w, struct dr_error *err)
{
    for (uint64_t i = 0; i < w->lay.h.l1_entries; i++)
        w->lay.l2 += is_used(w, i);
    int r = qcow2_layout_counts(&w->lay, w->path, err);
    if (r == 0)
        r = append_first_cluster(w, err);
    if (r == 0)
        r = append_reftable(w, err);
    if (r == 0)
        r = append_blocks(w, err);
    w->next = qcow2_data_first(&w->lay);
    return r < 0 ? r : append_l1(w, err);
}

/* ------------------------------------------------------------------ the map */

static int end_table(struct writer *w, struct dr_error *err)
{
    int r = w->table == NO_TABLE ? 0 : append(w, w->l2, w->cluster, err);
    memset(w->l2, 0, w->cluster);
    return r;
}

static int put_entry(struct writer *w, uint64_t unit, struct dr_error *err)
{
    uint64_t per_table = w->span / w->cluster;
    uint8_t *p = w->l2 + unit % per_table * w->entry;
    int r = unit / per_table == w->table ? 0 : end_table(w, err);
    w->table = unit / per_table;
    put_be64(p, w->next++ * w->cluster | QCOW2_COPIED);
    if (w->entry == 16)
        put_be64(p + 8, UINT32_MAX); /* all its parts are there */
    return r;
}

static int writer_map(void *state, unsigned pass, uint64_t off, uint64_t len, struct dr_error *err)
{
    struct writer *w = state;
    uint64_t first = off / w->cluster, end = dr_div_up(off + len, w->cluster);
    int r = 0;
    if (len == 0) {
        r = check_trail(w, pass, err);
        if (r == 0)
            r = pass == 0 ? append_front(w, err) : end_table(w, err);
        return r;
    }
    follow(&w->trails[pass], first, end);
    if (pass == 0) {
        w->lay.data += end - first;
        for (uint64_t t = off / w->span; t <= (off + len - 1) / w->span; t++)
            w->used[t / 8] |= (uint8_t)(1u << t % 8);
    }
    for (uint64_t i = first; pass == 1 && r == 0 && i < end; i++)
        r = put_entry(w, i, err);
    return r;
}

/* ------------------------------------------------------------------ for the core */

static int writer_wanted(const char *path, const struct dr_create_params *params,
                         struct dr_error *err)
{
    struct qcow2_layout lay;
    int r = qcow2_lay_out(&lay, path, params, err);
    if (r < 0)
        return r;
    const char *what = lay.data_file                        ? "data_file"
                       : lay.h.crypt                        ? "encryption"
                       : lay.prealloc != QCOW2_PREALLOC_OFF ? "preallocation"
                                                            : NULL;
    return what ? dr_fail(err, ENOTSUP, "%s: %s does not go with a pipe", path, what) : 1;
}

static void writer_free(void *state)
{
    struct writer *w = state;
    if (!w)
        return;
    free(w->used);
    free(w->l2);
    free(w->buf);
    free(w);
}

static int writer_begin(const char *path, const struct dr_create_params *params,
                        struct dr_file *out, void **state, struct dr_error *err)
{
    struct writer *w = *state = calloc(1, sizeof(*w));
    if (!w)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    w->path = out->path;
    w->out = out;
    w->at = dr_file_size(out);
    w->table = NO_TABLE;
    int r = qcow2_lay_out(&w->lay, path, params, err);
    if (r < 0)
        return r;
    w->cluster = qcow2_cluster(&w->lay.h);
    w->entry = w->lay.h.incompatible & QCOW2_EXTL2 ? 16 : 8;
    w->span = w->cluster / w->entry * w->cluster;
    w->used = calloc(w->lay.h.l1_entries / 8 + 1, 1);
    w->l2 = calloc(1, w->cluster);
    w->buf = malloc(STEP);
    return w->used && w->l2 && w->buf ? 0 : dr_fail_errno(err, ENOMEM, "%s", path);
}

static uint64_t writer_unit(const void *state)
{
    return ((const struct writer *)state)->cluster;
}

/* Clusters are whole ones: the last is filled up with zeros. */
static int64_t writer_encode(const void *state, const uint8_t *in, size_t len, uint64_t off,
                             uint8_t *coded)
{
    const struct writer *w = state;
    (void)off;
    memcpy(coded, in, len);
    memset(coded + len, 0, w->cluster - len);
    return (int64_t)w->cluster;
}

static int writer_put(void *state, uint64_t off, const uint8_t *coded, size_t len,
                      struct dr_error *err)
{
    struct writer *w = state;
    follow(&w->trails[2], off / w->cluster, off / w->cluster + 1);
    return append(w, coded, len, err);
}

static int writer_finish(void *state, struct dr_error *err)
{
    int r = write_out(state, err);
    return r < 0 ? r : check_trail(state, 2, err);
}

const struct dr_sequential qcow2_sequential = {
    .coded_most = CODED_MOST,
    .wanted = writer_wanted,
    .begin = writer_begin,
    .unit_of = writer_unit,
    .map = writer_map,
    .map_passes = 2,
    .encode = writer_encode,
    .put = writer_put,
    .finish = writer_finish,
    .free = writer_free,
};
