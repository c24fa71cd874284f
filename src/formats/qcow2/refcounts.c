/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counts of another width. All of them are written anew behind everything that is counted, made
 * durable, and become the image's by one write to the header, which names the new table and the new
 * width. The new counts do not count the old table and its blocks, so those are free from then on.
 *
 *   ... all that is counted | blocks | blocks that count the new clusters, too | table
 *
 * Nobody writes to the image meanwhile, and nothing in memory waits to be written. Cut off before
 * the switch the file is longer, and nothing leads to what is new. */
#include "formats/qcow2/amend.h"

#include "base/cleanup.h"

struct recount {
    struct dr_image *image;
    const struct qcow2_amend *amend;
    unsigned order;     /* the new width */
    uint64_t per;       /* counts in a new block */
    uint64_t end;       /* clusters: nothing is counted from here on */
    uint64_t first;     /* cluster: the new structure begins here */
    uint64_t next;      /* cluster: where the next part of it goes */
    uint64_t *roots;    /* the new table, big-endian */
    uint64_t room;      /* entries of it */
    uint8_t *block;     /* a new one, being filled */
    uint8_t *old;       /* an old one ... */
    uint64_t old_index; /* ... this; UINT64_MAX = none */
    uint64_t *owned;    /* clusters of the old structure, sorted */
    size_t n_owned, at_owned;
    bool shared; /* something else claims a cluster of the old structure */
};

/* ------------------------------------------------------------------ the old counts */

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* List the clusters of the old structure: the new counts leave them out. */
static int list_owned(struct recount *c, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    c->owned = calloc(q->reftable_n + q->h.reftable_clusters + 1, sizeof(*c->owned));
    if (!c->owned)
        return dr_fail_errno(err, ENOMEM, "%s", c->image->path);
    for (uint64_t i = 0; i < q->h.reftable_clusters; i++)
        c->owned[c->n_owned++] = q->h.reftable_at / q->cluster + i;
    for (uint64_t i = 0; i < q->reftable_n; i++)
        if (q->reftable[i])
            c->owned[c->n_owned++] = q->reftable[i] / q->cluster;
    qsort(c->owned, c->n_owned, sizeof(*c->owned), by_number);
    return 0;
}

static int load_old(struct recount *c, uint64_t index, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    if (c->old_index == index)
        return 0;
    c->old_index = UINT64_MAX;
    int r = dr_amend_report(c->amend->what, index, q->reftable_n, err);
    if (r == 0)
        r = dr_file_pread(c->image->files[0], c->old, q->reftable[index], q->cluster, err);
    if (r == 0)
        c->old_index = index;
    return r;
}

/* The next cluster from *i on, below end, that has a count, and what the new count of it is; *i =
 * end if there is none. Goes upward. */
static int next_counted(struct recount *c, uint64_t *i, uint64_t end, uint64_t *count,
                        struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    uint64_t per = qcow2_block_entries(q);
    for (; *i < end; ++*i) {
        uint64_t index = *i / per;
        if (index >= q->reftable_n)
            break;
        if (!q->reftable[index]) {
            *i = (index + 1) * per - 1;
            continue;
        }
        int r = load_old(c, index, err);
        if (r < 0)
            return r;
        *count = qcow2_count_get(q->h.refcount_order, c->old, *i % per);
        if (*count == 0)
            continue;
        while (c->at_owned < c->n_owned && c->owned[c->at_owned] < *i)
            c->at_owned++;
        if (c->at_owned < c->n_owned && c->owned[c->at_owned] == *i)
            c->shared |= --*count > 0;
        if (*count)
            return 0;
    }
    *i = end;
    return 0;
}

static void rewind_old(struct recount *c)
{
    c->at_owned = 0;
}

/* Every count must fit; and where do they end? */
static int survey(struct recount *c, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    uint64_t all = q->reftable_n * qcow2_block_entries(q), count = 0;
    uint64_t max = c->order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << c->order)) - 1;
    for (uint64_t i = 0;; i++) {
        int r = next_counted(c, &i, all, &count, err);
        if (r < 0 || i == all)
            return r;
        if (count > max)
            return dr_fail(err, EINVAL,
                           "Cannot decrease refcount entry width to %u bits: Cluster at offset "
                           "0x%llx has a refcount of %llu",
                           1u << c->order, ULL(i * q->cluster), ULL(count));
        c->end = i + 1;
    }
}

/* ------------------------------------------------------------------ the new ones */

/* The most that can be needed. */
static int plan(struct recount *c, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    const struct dr_file *f = c->image->files[0];
    uint64_t before, clusters = 1;
    c->first = c->end;
    for (size_t i = 0; i < c->n_owned; i++)
        c->first = dr_max(c->first, c->owned[i] + 1);
    if (!f->block_device)
        c->first = dr_max(c->first, dr_div_up(dr_file_size(f), q->cluster));
    c->next = c->first;
    do {
        before = c->room;
        c->room = dr_div_up(c->first + c->room + clusters, c->per);
        clusters = dr_div_up(c->room * 8, q->cluster);
    } while (c->room != before);
    if (clusters * q->cluster > QCOW2_MAX_REFTABLE)
        return dr_fail(err, EFBIG,
                       "%s: with counts of %u bits its refcount table would have %llu bytes, at "
                       "most %llu are allowed",
                       c->image->path, 1u << c->order, ULL(clusters * q->cluster),
                       ULL(QCOW2_MAX_REFTABLE));
    c->roots = calloc(clusters, q->cluster);
    c->block = malloc(q->cluster);
    return c->roots && c->block ? 0 : dr_fail_errno(err, ENOMEM, "%s", c->image->path);
}

static int write_clusters(struct recount *c, const void *bytes, uint64_t n, uint64_t *at,
                          struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(c->image);
    struct dr_file *f = c->image->files[0];
    *at = c->next * q->cluster;
    c->next += n;
    if (f->block_device && c->next * q->cluster > dr_file_size(f))
        return dr_fail(err, ENOSPC, "%s: the device is full: no room for new reference counts",
                       c->image->path);
    return dr_file_pwrite(f, bytes, *at, n * q->cluster, err);
}

/* The b-th block with what is counted already. */
static int fill_block(struct recount *c, uint64_t b, bool *any, struct dr_error *err)
{
    uint64_t from = b * c->per, end = dr_min(from + c->per, dr_max(c->end, from)), count = 0;
    memset(c->block, 0, qcow2_of(c->image)->cluster);
    *any = false;
    for (uint64_t i = from;; i++) {
        int r = next_counted(c, &i, end, &count, err);
        if (r < 0 || i >= end)
            return r;
        qcow2_count_put(c->order, c->block, i - from, count);
        *any = true;
    }
}

static int write_block(struct recount *c, uint64_t b, struct dr_error *err)
{
    uint64_t at;
    int r = write_clusters(c, c->block, 1, &at, err);
    put_be64(&c->roots[b], at);
    return r;
}

/* The block in which the new clusters begin, and those behind it, come last. */
static int write_own_counts(struct recount *c, uint64_t *table, uint64_t *clusters,
                            struct dr_error *err)
{
    uint64_t cluster = qcow2_of(c->image)->cluster, begin = c->first / c->per, blocks = 1, before;
    uint64_t end;
    bool any;
    int r = 0;
    do {
        before = blocks;
        *clusters = dr_div_up((begin + blocks) * 8, cluster);
        end = c->next + blocks + *clusters;
        blocks = (end - 1) / c->per + 1 - begin;
    } while (blocks != before);
    for (uint64_t b = begin; r == 0 && b < begin + blocks; b++) {
        r = fill_block(c, b, &any, err);
        for (uint64_t i = dr_max(c->first, b * c->per); i < dr_min(end, (b + 1) * c->per); i++)
            qcow2_count_put(c->order, c->block, i - b * c->per, 1);
        if (r == 0)
            r = write_block(c, b, err);
    }
    return r < 0 ? r : write_clusters(c, c->roots, *clusters, table, err);
}

static int write_structure(struct recount *c, uint64_t *table, uint64_t *clusters,
                           struct dr_error *err)
{
    int r = list_owned(c, err);
    if (r == 0)
        r = survey(c, err);
    if (r == 0)
        r = plan(c, err);
    rewind_old(c);
    for (uint64_t b = 0; r == 0 && b < c->first / c->per; b++) {
        bool any;
        r = fill_block(c, b, &any, err);
        if (r == 0 && any)
            r = write_block(c, b, err);
    }
    if (r == 0)
        r = write_own_counts(c, table, clusters, err);
    return r < 0 ? r : dr_file_flush(c->image->files[0], err);
}

/* ------------------------------------------------------------------ the switch */

static int switch_counts(struct recount *c, uint64_t table, uint64_t clusters, struct dr_error *err)
{
    enum { LEN = QCOW2_AT_ORDER + 4 - QCOW2_AT_REFTABLE };
    struct qcow2 *q = qcow2_of(c->image);
    uint8_t field[LEN];
    int r = dr_file_pread(c->image->files[0], field, QCOW2_AT_REFTABLE, LEN, err);
    if (r < 0)
        return r;
    put_be64(field, table);
    put_be32(field + 8, (uint32_t)clusters);
    put_be32(field + LEN - 4, c->order);
    r = qcow2_switch_tables(c->image, QCOW2_AT_REFTABLE, field, LEN, err);
    if (r < 0)
        return r;
    DR_LOCK_SCOPE(&c->image->lock);
    q->h.reftable_at = table;
    q->h.reftable_clusters = (uint32_t)clusters;
    q->h.refcount_order = c->order;
    return 0;
}

/* The old structure's space goes back to the file system, run by run; where it cannot be given
 * back it is used again all the same. */
static void punch_old(const struct recount *c)
{
    uint64_t cluster = qcow2_of(c->image)->cluster;
    for (size_t i = 0, n; i < c->n_owned && !c->shared; i += n) {
        n = 1;
        while (i + n < c->n_owned && c->owned[i + n] == c->owned[i] + n)
            n++;
        dr_file_zero(c->image->files[0], c->owned[i] * cluster, n * cluster,
                     DR_FILE_ZERO_PUNCH | DR_FILE_ZERO_FAST, NULL);
    }
}

int qcow2_change_order(struct dr_image *image, const struct qcow2_amend *amend, unsigned order,
                       struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct dr_file *f = image->files[0];
    struct recount c = {.image = image,
                        .amend = amend,
                        .order = order,
                        .per = q->cluster * 8 >> order,
                        .old = malloc(q->cluster),
                        .old_index = UINT64_MAX};
    uint64_t table = 0, clusters = 0, size = dr_file_size(f);
    int r = c.old ? write_structure(&c, &table, &clusters, err)
                  : dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (r < 0 && !f->block_device && dr_file_size(f) > size)
        dr_file_truncate(f, size, NULL); /* nothing leads there */
    if (r == 0)
        r = switch_counts(&c, table, clusters, err);
    if (r == 0)
        r = qcow2_reload(image, err);
    if (r == 0)
        punch_old(&c);
    free(c.owned);
    free(c.roots);
    free(c.block);
    free(c.old);
    return r;
}
