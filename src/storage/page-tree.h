/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bytes of a file in memory: 4 KiB pages in a tree that is as high as the last page needs. A
 * page that is not there reads as zeros. Not thread-safe; the owner locks. */
#ifndef DR_STORAGE_PAGE_TREE_H
#define DR_STORAGE_PAGE_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_TREE_BYTES 4096u

struct page_node;

struct page_tree {
    struct page_node *root;
    unsigned height; /* levels of nodes above the pages; 0 = empty */
};

/* The page with that index, or NULL where there is none. */
uint8_t *page_tree_get(const struct page_tree *t, uint64_t index);
/* As get, but makes one of zeros. NULL = out of memory. */
uint8_t *page_tree_make(struct page_tree *t, uint64_t index);
/* The first index >= from that has a page; UINT64_MAX = none. */
uint64_t page_tree_next(const struct page_tree *t, uint64_t from);
/* Free the pages [first, end). */
void page_tree_drop(struct page_tree *t, uint64_t first, uint64_t end);

#endif
