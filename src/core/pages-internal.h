/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Shared by pages.c (finding and editing pages), pages-load.c (reading them, evicting others) and
 * pages-flush.c (writing them). */
#ifndef DR_CORE_PAGES_INTERNAL_H
#define DR_CORE_PAGES_INTERNAL_H

#include "core/internal.h"

#define DR_SECTOR       512u
#define DR_PAGE_SECTORS (DR_PAGE_SIZE / DR_SECTOR)

/* Masks have a bit a 512-byte sector of the page. All but the clock's fields are under the lock of
 * the image. */
struct dr_page {
    struct dr_image *image;
    unsigned file;
    uint64_t off;
    uint8_t *data;        /* the present bytes; dr_zero_page while nobody edits a page of zeros */
    uint8_t *sealed;      /* what the running flush writes; == data until an edit makes a clone */
    uint8_t *spare;       /* guarantees that the clone cannot fail, while pinned */
    uint8_t dirty;        /* mask of edits that no flush has sealed yet */
    uint8_t sealed_dirty; /* mask, of sealed */
    uint8_t fresh;        /* mask, of dirty: dr_page_new made them, and no flush has linked them */
    uint8_t sealed_fresh; /* mask, of sealed */
    uint8_t level[DR_PAGE_SECTORS]; /* of sectors that are dirty or pinned */
    uint8_t sealed_level[DR_PAGE_SECTORS];
    uint32_t pins[DR_PAGE_SECTORS];
    unsigned pinned;   /* how many pins there are in all */
    unsigned holds;    /* callbacks that will be repeated and need the page (struct dr_hold) */
    bool forgotten;    /* out of the table; the last hold frees it */
    uint64_t hole_end; /* the file is a hole from off to here, if gen is still the cache's */
    uint64_t gen;
    size_t charged; /* bytes of the budget */
    struct dr_page *next_in_bucket;
    struct dr_page *dirty_next;
    struct dr_page *sealed_next;
    bool on_dirty_list;
    _Atomic bool referenced;
    struct dr_page *clock_prev, *clock_next; /* under the clock's lock */
};

/* Pages [off, off + n pages) of a file that one thread is reading; on that thread's stack. */
struct dr_loading {
    unsigned file;
    uint64_t off, end;
    struct dr_loading *next;
};

/* The pages of one image. */
struct dr_cache {
    struct dr_page **buckets;
    size_t n_buckets, n_pages;
    struct dr_page *dirty_first;
    struct dr_page *sealed_first;
    size_t n_dirty, n_sealed;
    bool linking;               /* the running flush has come to level 1 */
    uint64_t gen;               /* of hole knowledge: edits end it */
    uint64_t load_gen;          /* what was read from the file before this changed may be stale */
    struct dr_loading *loading; /* reads under way */
    /* The hole of a file that was found last, while hole_gen is gen; where the last read ended, and
     * how many pages the next one will have if it goes on there. */
    unsigned hole_file, read_file, ahead;
    uint64_t hole_off, hole_end, hole_gen, read_end;
    pthread_cond_t loaded; /* with image->lock: one of them has ended */
};

extern uint8_t dr_zero_page[DR_PAGE_SIZE]; /* never written */

/* pages.c; image->lock held */
struct dr_page *dr_cache_find(const struct dr_cache *cache, unsigned file, uint64_t off);
/* Takes over data on success. NULL: no memory. */
struct dr_page *dr_cache_add(struct dr_image *image, unsigned file, uint64_t off, uint8_t *data);
/* The page must be idle but for holds. */
void dr_cache_remove(struct dr_page *page);
/* Neither edited, nor on its way to the file, nor wanted by anybody. */
bool dr_page_is_idle(const struct dr_page *page);
void dr_page_mark(struct dr_cache *cache, struct dr_page *page, uint8_t sectors);
/* Adjust the budget to what the page takes now. */
void dr_page_charge(struct dr_page *page);
void dr_page_free(struct dr_page *page);
/* The callback at hand needs the page until it has succeeded. -ENOMEM. */
int dr_hold_add(struct dr_hold *hold, struct dr_page *page);

/* pages-load.c: one clock over the pages of all images, so that the page that was not used for the
 * longest time goes first, whichever image it belongs to. */
void dr_clock_add(struct dr_page *page);
void dr_clock_remove(struct dr_page *page);
void dr_clock_charge(size_t more, size_t less);
/* Drop idle pages while the process has more than its budget. own->lock is held; of other images
 * only those are looked at whose lock is free. */
void dr_clock_evict(struct dr_image *own);

#endif
