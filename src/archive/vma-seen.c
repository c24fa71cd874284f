/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/vma-seen.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bytes.h"

#define DIR_CLUSTERS ((uint64_t)VMA_SEEN_DIR * VMA_SEEN_PAGE)

/* Allocate one zeroed block of 4 KiB, if the budget allows. */
static int take(struct vma_seen_budget *budget, void **block)
{
    if (budget->used + 4096 > VMA_SEEN_FREE + budget->clusters)
        return -E2BIG;
    *block = calloc(1, 4096);
    if (!*block)
        return -ENOMEM;
    budget->used += 4096;
    return 0;
}

int vma_seen_add(struct vma_seen *s, uint32_t cluster, struct vma_seen_budget *budget)
{
    struct vma_seen_dir **dir = &s->dirs[cluster / DIR_CLUSTERS];
    void *block;
    int r = 0;
    if (!*dir) {
        r = take(budget, &block);
        if (r < 0)
            return r;
        *dir = block;
    }
    uint64_t **page = &(*dir)->pages[cluster / VMA_SEEN_PAGE % VMA_SEEN_DIR];
    if (!*page) {
        r = take(budget, &block);
        if (r < 0)
            return r;
        *page = block;
    }
    uint64_t *word = &(*page)[cluster % VMA_SEEN_PAGE / 64], bit = 1ull << cluster % 64;
    r = (*word & bit) != 0;
    *word |= bit;
    budget->clusters += r == 0;
    return r;
}

/* Return the page that holds `cluster`; NULL: no cluster up to *next was seen. *next is the
 * first cluster behind what the answer covers. */
static const uint64_t *page_of(const struct vma_seen *s, uint64_t cluster, uint64_t *next)
{
    const struct vma_seen_dir *dir = s->dirs[cluster / DIR_CLUSTERS];
    uint64_t span = dir ? VMA_SEEN_PAGE : DIR_CLUSTERS;
    *next = dr_round_down(cluster, span) + span;
    return dir ? dir->pages[cluster / VMA_SEEN_PAGE % VMA_SEEN_DIR] : NULL;
}

/* Find the first cluster in [from, end) that was seen (or, with seen false, was not); end if
 * there is none. */
static uint64_t find(const struct vma_seen *s, uint64_t from, uint64_t end, bool seen)
{
    while (from < end) {
        uint64_t next;
        const uint64_t *page = page_of(s, from, &next);
        if (!page) {
            if (!seen)
                return from;
            from = next;
            continue;
        }
        uint64_t word = page[from % VMA_SEEN_PAGE / 64];
        word = (seen ? word : ~word) >> from % 64;
        if (word)
            return dr_min(end, from + (unsigned)__builtin_ctzll(word));
        from = dr_round_down(from, 64) + 64;
    }
    return end;
}

bool vma_seen_gap(const struct vma_seen *s, uint64_t from, uint64_t end, uint64_t *first,
                  uint64_t *n)
{
    *first = find(s, from, end, false);
    *n = find(s, *first, end, true) - *first;
    return *first < end;
}

void vma_seen_free(struct vma_seen *s)
{
    for (unsigned i = 0; i < VMA_SEEN_TOP; i++) {
        for (unsigned k = 0; s->dirs[i] && k < VMA_SEEN_DIR; k++)
            free(s->dirs[i]->pages[k]);
        free(s->dirs[i]);
        s->dirs[i] = NULL;
    }
}
