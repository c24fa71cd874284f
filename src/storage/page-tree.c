/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/page-tree.h"

#include <stdlib.h>

#include "base/bytes.h"

#define BITS   6u
#define FANOUT (1u << BITS)

struct page_node {
    unsigned used;      /* slots that are not NULL */
    void *slot[FANOUT]; /* nodes, or pages at level 1 */
};

/* Pages below one slot of a node at that level, as a shift. Level 1 nodes hold pages. */
static unsigned slot_shift(unsigned level)
{
    return (level - 1) * BITS;
}

static unsigned slot_of(uint64_t index, unsigned level)
{
    return (unsigned)(index >> slot_shift(level)) % FANOUT;
}

static bool covers(const struct page_tree *t, uint64_t index)
{
    return t->height && (t->height * BITS >= 64 || index >> (t->height * BITS) == 0);
}

uint8_t *page_tree_get(const struct page_tree *t, uint64_t index)
{
    if (!covers(t, index))
        return NULL;
    void *p = t->root;
    for (unsigned level = t->height; p && level; level--)
        p = ((struct page_node *)p)->slot[slot_of(index, level)];
    return p;
}

static bool grow(struct page_tree *t, uint64_t index)
{
    while (!covers(t, index)) {
        struct page_node *n = calloc(1, sizeof(*n));
        if (!n)
            return false;
        if (t->root) {
            n->slot[0] = t->root;
            n->used = 1;
        }
        t->root = n;
        t->height++;
    }
    return true;
}

uint8_t *page_tree_make(struct page_tree *t, uint64_t index)
{
    if (!grow(t, index))
        return NULL;
    struct page_node *n = t->root;
    for (unsigned level = t->height;; level--) {
        void **slot = &n->slot[slot_of(index, level)];
        if (!*slot) {
            *slot = calloc(1, level > 1 ? sizeof(struct page_node) : PAGE_TREE_BYTES);
            if (!*slot)
                return NULL; /* an empty node on the way is harmless */
            n->used++;
        }
        if (level == 1)
            return *slot;
        n = *slot;
    }
}

static uint64_t next_below(const struct page_node *n, unsigned level, uint64_t base, uint64_t from)
{
    unsigned i = from > base ? slot_of(from, level) : 0;
    for (; i < FANOUT; i++) {
        uint64_t start = base + ((uint64_t)i << slot_shift(level));
        if (!n->slot[i])
            continue;
        if (level == 1)
            return start;
        uint64_t found = next_below(n->slot[i], level - 1, start, dr_max(from, start));
        if (found != UINT64_MAX)
            return found;
    }
    return UINT64_MAX;
}

uint64_t page_tree_next(const struct page_tree *t, uint64_t from)
{
    return covers(t, from) ? next_below(t->root, t->height, 0, from) : UINT64_MAX;
}

/* Free what lies in [first, end) below n, whose own range starts at base; true = n is empty now. */
static bool drop_below(struct page_node *n, unsigned level, uint64_t base, uint64_t first,
                       uint64_t end)
{
    for (unsigned i = 0; i < FANOUT; i++) {
        uint64_t start = base + ((uint64_t)i << slot_shift(level));
        uint64_t stop = start + ((uint64_t)1 << slot_shift(level));
        if (!n->slot[i] || stop <= first || start >= end)
            continue;
        if (level > 1 && !drop_below(n->slot[i], level - 1, start, first, end))
            continue;
        free(n->slot[i]);
        n->slot[i] = NULL;
        n->used--;
    }
    return n->used == 0;
}

void page_tree_drop(struct page_tree *t, uint64_t first, uint64_t end)
{
    if (t->root && drop_below(t->root, t->height, 0, first, end)) {
        free(t->root);
        t->root = NULL;
        t->height = 0;
    }
}
