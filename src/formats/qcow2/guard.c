/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Clusters that hold tables and must not take data. */
#include "formats/qcow2/qcow2.h"

static size_t set_slot(const struct qcow2_set *set, uint64_t key)
{
    size_t i = (size_t)(key * UINT64_C(0x9e3779b97f4a7c15) >> 20) & (set->room - 1);
    while (set->slots[i] && set->slots[i] != key)
        i = (i + 1) & (set->room - 1);
    return i;
}

static bool set_grow(struct qcow2_set *set)
{
    struct qcow2_set bigger = {.room = set->room ? set->room * 2 : 64, .n = set->n};
    bigger.slots = calloc(bigger.room, sizeof(*bigger.slots));
    if (!bigger.slots)
        return false;
    for (size_t i = 0; i < set->room; i++)
        if (set->slots[i])
            bigger.slots[set_slot(&bigger, set->slots[i])] = set->slots[i];
    free(set->slots);
    *set = bigger;
    return true;
}

void qcow2_guard(struct qcow2 *q, uint64_t host)
{
    struct qcow2_set *set = &q->meta;
    uint64_t key = qcow2_cluster_of(q, host);
    if (key == 0 || ((set->n + 1) * 2 > set->room && !set_grow(set)))
        return;
    size_t i = set_slot(set, key);
    if (set->slots[i]) /* as each read finds it: nothing to write, and no cache line to take */
        return;
    set->n++;
    set->slots[i] = key;
}

/* Those behind it that were displaced move up. */
static void set_remove(struct qcow2_set *set, uint64_t key)
{
    size_t i = set_slot(set, key);
    if (!set->slots[i])
        return;
    set->slots[i] = 0;
    set->n--;
    for (i = (i + 1) & (set->room - 1); set->slots[i]; i = (i + 1) & (set->room - 1)) {
        uint64_t moved = set->slots[i];
        set->slots[i] = 0;
        set->slots[set_slot(set, moved)] = moved;
    }
}

void qcow2_unguard(struct qcow2 *q, uint64_t host, uint64_t len)
{
    for (uint64_t key = qcow2_cluster_of(q, host); q->meta.n && key * q->cluster < host + len;
         key++)
        set_remove(&q->meta, key);
}

static bool overlaps(uint64_t host, uint64_t len, uint64_t at, uint64_t bytes)
{
    return bytes && host < at + bytes && at < host + len;
}

const char *qcow2_guarded(const struct qcow2 *q, uint64_t host, uint64_t len)
{
    const struct qcow2_header *h = &q->h;
    if (host < q->cluster)
        return "the header";
    if (overlaps(host, len, h->l1_at, h->l1_entries * UINT64_C(8)))
        return "the L1 table";
    if (overlaps(host, len, h->reftable_at, h->reftable_clusters * q->cluster))
        return "the refcount table";
    if (overlaps(host, len, h->snapshots_at, h->n_snapshots * UINT64_C(40)))
        return "the snapshot table";
    if (overlaps(host, len, q->bitmaps_at, q->bitmaps_len))
        return "the bitmap directory";
    if (overlaps(host, len, q->crypto_at, q->crypto_len))
        return "the encryption header";
    for (uint64_t key = qcow2_cluster_of(q, host); q->meta.n && key * q->cluster < host + len;
         key++)
        if (q->meta.slots[set_slot(&q->meta, key)])
            return "a table";
    return NULL;
}
