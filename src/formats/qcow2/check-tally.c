/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counts of references, in bounded memory.
 *
 * Counts are kept in pages of neighbouring clusters, and only pages exist of which something is
 * referred to. A page begins with one bit for each count and is widened when one of them outgrows
 * it, so the usual image, in which every cluster is used once, takes four bits a cluster. When the
 * pages take too much, those with the highest clusters are given up, and the window ends where they
 * began. */
#include "formats/qcow2/check.h"

#define PAGE       UINT64_C(16384) /* clusters */
#define SLOTS      32768u          /* a power of two, more than twice the pages that fit */
#define SAYS_BYTES (PAGE / 4)

struct qcow2_tally_page {
    uint64_t index; /* of its first cluster, in pages */
    unsigned order; /* counts have 1 << order bits */
    uint8_t *counts;
    uint8_t says[SAYS_BYTES]; /* two bits a cluster */
    uint8_t tables[PAGE / 8]; /* clusters in which there is a table */
};

static uint64_t page_bytes(const struct qcow2_tally_page *p)
{
    return sizeof(*p) + (PAGE << p->order) / 8;
}

static void page_free(struct qcow2_tally_page *p)
{
    free(p->counts);
    free(p);
}

static size_t slot_of(const struct qcow2_tally *t, uint64_t index)
{
    size_t i = (size_t)(index * UINT64_C(0x9e3779b97f4a7c15) >> 40) & (SLOTS - 1);
    while (t->slots[i] && t->slots[i]->index != index)
        i = (i + 1) & (SLOTS - 1);
    return i;
}

static void drop_pages(struct qcow2_tally *t)
{
    for (size_t i = 0; t->slots && i < SLOTS; i++)
        if (t->slots[i]) {
            page_free(t->slots[i]);
            t->slots[i] = NULL;
        }
    t->n = t->n_sorted = 0;
    t->bytes = 0;
    t->last = NULL;
}

void qcow2_tally_begin(struct qcow2_tally *t, uint64_t first, uint64_t limit)
{
    drop_pages(t);
    t->begin = first;
    t->end = UINT64_MAX;
    t->more = false;
    t->limit = limit;
}

void qcow2_tally_free(struct qcow2_tally *t)
{
    drop_pages(t);
    free(t->slots);
    free(t->sorted);
    *t = (struct qcow2_tally){0};
}

static int by_index(const void *a, const void *b)
{
    const struct qcow2_tally_page *x = *(struct qcow2_tally_page *const *)a;
    const struct qcow2_tally_page *y = *(struct qcow2_tally_page *const *)b;
    return x->index < y->index ? -1 : x->index > y->index;
}

int qcow2_tally_sort(struct qcow2_tally *t)
{
    if (!t->sorted && !(t->sorted = malloc(SLOTS * sizeof(struct qcow2_tally_page *))))
        return -ENOMEM;
    t->n_sorted = 0;
    for (size_t i = 0; t->slots && i < SLOTS; i++)
        if (t->slots[i])
            t->sorted[t->n_sorted++] = t->slots[i];
    qsort(t->sorted, t->n_sorted, sizeof(struct qcow2_tally_page *), by_index);
    return 0;
}

/* Give up the highest eighth of the pages, one at least and never all. */
static int shrink(struct qcow2_tally *t)
{
    if (qcow2_tally_sort(t) < 0)
        return -ENOMEM;
    size_t keep = dr_max(1, t->n_sorted - dr_div_up(t->n_sorted, 8));
    if (keep == t->n_sorted)
        return 0;
    t->end = t->sorted[keep]->index * PAGE;
    t->more = true;
    memset(t->slots, 0, SLOTS * sizeof(struct qcow2_tally_page *));
    t->bytes = 0;
    for (size_t i = 0; i < t->n_sorted; i++) {
        struct qcow2_tally_page *p = t->sorted[i];
        if (i >= keep) {
            page_free(p);
            continue;
        }
        t->slots[slot_of(t, p->index)] = p;
        t->bytes += page_bytes(p);
    }
    t->n = keep;
    t->n_sorted = 0;
    t->last = NULL;
    return 0;
}

static struct qcow2_tally_page *page_find(struct qcow2_tally *t, uint64_t cluster)
{
    uint64_t index = cluster / PAGE;
    if (t->last && t->last->index == index)
        return t->last;
    struct qcow2_tally_page *p = t->slots ? t->slots[slot_of(t, index)] : NULL;
    if (p)
        t->last = p;
    return p;
}

static int page_new(struct qcow2_tally *t, uint64_t cluster, struct qcow2_tally_page **page)
{
    struct qcow2_tally_page *p = calloc(1, sizeof(*p));
    if (p)
        p->counts = calloc(1, PAGE / 8);
    if (!p || !p->counts) {
        free(p);
        return -ENOMEM;
    }
    p->index = cluster / PAGE;
    t->slots[slot_of(t, p->index)] = p;
    t->n++;
    t->bytes += page_bytes(p);
    t->last = *page = p;
    return 0;
}

static unsigned order_for(uint64_t count)
{
    unsigned order = 0;
    while (order < 6 && count >> (1u << order))
        order++;
    return order;
}

static int page_widen(struct qcow2_tally *t, struct qcow2_tally_page *p, unsigned order)
{
    uint8_t *wider = calloc(1, (PAGE << order) / 8);
    if (!wider)
        return -ENOMEM;
    for (uint64_t i = 0; i < PAGE; i++)
        qcow2_count_put(order, wider, i, qcow2_count_get(p->order, p->counts, i));
    t->bytes -= page_bytes(p);
    free(p->counts);
    p->counts = wider;
    p->order = order;
    t->bytes += page_bytes(p);
    return 0;
}

static bool has_table(const struct qcow2_tally_page *p, uint64_t i)
{
    return p->tables[i / 8] >> i % 8 & 1;
}

int qcow2_tally_add(struct qcow2_tally *t, uint64_t cluster, uint64_t times, unsigned says)
{
    if (cluster < t->begin || times == 0)
        return 0;
    if (cluster >= t->end) {
        t->more = true;
        return 0;
    }
    if (!t->slots && !(t->slots = calloc(SLOTS, sizeof(struct qcow2_tally_page *))))
        return -ENOMEM;
    struct qcow2_tally_page *p = page_find(t, cluster);
    if (!p && page_new(t, cluster, &p) < 0)
        return -ENOMEM;
    uint64_t i = cluster % PAGE, before = qcow2_count_get(p->order, p->counts, i), count;
    bool table = says & QCOW2_IS_TABLE, meet = before && table != has_table(p, i);
    if (dr_add_overflow(before, times, &count))
        count = UINT64_MAX;
    unsigned order = order_for(count);
    if (order > p->order && page_widen(t, p, order) < 0)
        return -ENOMEM;
    qcow2_count_put(p->order, p->counts, i, count);
    p->says[i / 4] |= (uint8_t)((says & 3) << i % 4 * 2);
    if (table)
        p->tables[i / 8] |= (uint8_t)(1u << i % 8);
    int r = t->bytes > t->limit || t->n >= SLOTS / 2 ? shrink(t) : 0;
    return r < 0 ? r : meet;
}

uint64_t qcow2_tally_get(struct qcow2_tally *t, uint64_t cluster, unsigned *says)
{
    const struct qcow2_tally_page *p = page_find(t, cluster);
    uint64_t i = cluster % PAGE;
    if (says)
        *says = p ? p->says[i / 4] >> i % 4 * 2 & 3 : 0;
    return p ? qcow2_count_get(p->order, p->counts, i) : 0;
}

void qcow2_tally_remove(struct qcow2_tally *t, uint64_t cluster)
{
    struct qcow2_tally_page *p = page_find(t, cluster);
    uint64_t i = cluster % PAGE, count = p ? qcow2_count_get(p->order, p->counts, i) : 0;
    if (count)
        qcow2_count_put(p->order, p->counts, i, count - 1);
}

uint64_t qcow2_tally_next(const struct qcow2_tally *t, uint64_t from)
{
    size_t low = 0, high = t->n_sorted;
    while (low < high) { /* the first page that ends behind from */
        size_t mid = low + (high - low) / 2;
        if ((t->sorted[mid]->index + 1) * PAGE > from)
            high = mid;
        else
            low = mid + 1;
    }
    return low < t->n_sorted ? dr_max(from, t->sorted[low]->index * PAGE) : t->end;
}
