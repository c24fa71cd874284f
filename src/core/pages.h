/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The metadata page cache: 4 KiB pages of an image's files, with levels and sealing (invariant 1).
 *
 * A driver finds the page it wants (dr_page_get), looks at its bytes (dr_page_at), pins what it is
 * going to edit (dr_page_pin, or dr_reserve_page for a reservation) and edits it (dr_page_put). The
 * core reads pages before and writes them afterwards.
 *
 * Every function here that takes an image is called with image->lock held, and none does I/O,
 * unless it says otherwise. Only dirty 512-byte sectors of a page are ever written, so a page may
 * share its 4 KiB with guest data.
 *
 * Levels, written ascending with a flush between: 0 unreferenced (new tables, raised counts),
 * 1 allocation roots, 2 links, 3 header switch. The flush of level 0 is that of the guest's data,
 * so what points to data or tells of it is level 1 or higher. A level belongs to a sector, not to a
 * page: where units are small, tables of different kinds share one page.
 */
#ifndef DR_CORE_PAGES_H
#define DR_CORE_PAGES_H

#include "formats/format.h"

#define DR_PAGE_SIZE   4096u
#define DR_PAGE_LEVELS 4

/* The page that holds byte off of files[file]. -EAGAIN: it is not in memory; return that. The
 * pointer is good until the lock is dropped, unless the page is pinned. */
int dr_page_get(struct dr_image *image, unsigned file, uint64_t off, struct dr_page **page);

/* All pages of [off, off + len) are in memory, for dr_page_get to find until the lock is dropped.
 * -EAGAIN: return it; what is missing is read in large pieces. For tables of many pages. */
int dr_page_get_all(struct dr_image *image, unsigned file, uint64_t off, uint64_t len);

/* Where the page begins in its file. */
uint64_t dr_page_start(const struct dr_page *page);

/* The page's present bytes from off (a file offset inside the page) to the page's end. Bytes behind
 * the end of the file are 0. */
const uint8_t *dr_page_at(const struct dr_page *page, uint64_t off);

/* Every byte of the file from the page's start up to the returned offset is zero, as far as is
 * known without I/O: the page's own start if it is not all zero. Beyond the page only when the file
 * has a hole there and no metadata of this image was edited since the page came in. */
uint64_t dr_page_zero_until(const struct dr_image *image, const struct dr_page *page);

/* Keep the page and guarantee that dr_page_put inside [off, off + len) at this level cannot fail.
 * -EAGAIN: return it (one of these sectors is dirty or pinned at another level: a flush comes
 * first). -ENOMEM. Pins nest. A sector is at one level at a time. Give each kind of table one
 * level, tables one below what links to them: pins of two levels on one sector wait for each other.
 */
int dr_page_pin(struct dr_image *image, struct dr_page *page, uint64_t off, size_t len,
                unsigned level);
/* off and len as in the call of dr_page_pin that this ends. */
void dr_page_unpin(struct dr_image *image, struct dr_page *page, uint64_t off, size_t len);

/* The level at which the sector that holds byte off waits to be written, or -1: it has no edits
 * that are not on their way already. */
int dr_page_dirty_level(const struct dr_page *page, uint64_t off);

/* [off, off + len), whole sectors of one page, becomes zeros that are not read from the file: a new
 * table, pinned at level and dirty. Nothing on disk may lead there: the next flush writes it before
 * all else, whatever its level, with what is put into it before that. -EAGAIN: return it (as
 * dr_page_pin; or the rest of the page must be read). */
int dr_page_new(struct dr_image *image, unsigned file, uint64_t off, size_t len, unsigned level,
                struct dr_page **page);

/* Overwrite bytes of a pinned range. Cannot fail; goes to a clone while the page is sealed. */
void dr_page_put(struct dr_image *image, struct dr_page *page, uint64_t off, const void *bytes,
                 size_t len);

/* dr_page_get and dr_page_pin for a reservation, as its pin number r->n_pins - 1. There may be any
 * number of pins. The core takes them back when the reservation has failed, or has been published
 * or cancelled. Where a damaged image has two tables in one sector, a reservation that pins it at
 * two levels fails for good. */
int dr_reserve_page(struct dr_image *image, struct dr_reservation *r, unsigned file, uint64_t off,
                    size_t len, unsigned level, struct dr_page **page);
/* The i-th pin. A driver that needs it for longer (until release, for a count that is lowered
 * there) sets its page to NULL and calls dr_page_unpin itself. */
struct dr_pin *dr_reserved_pin(struct dr_reservation *r, unsigned i);
/* For the core. */
void dr_reserve_unpin(struct dr_image *image, struct dr_reservation *r);

/* Ask the core to call begin_write before trying again. Returns -EAGAIN. */
int dr_need_begin(struct dr_image *image);

/* Ask the core for a flush before trying again: what was freed before is released then. Returns
 * -EAGAIN. */
int dr_need_flush(struct dr_image *image);

/* Forget clean, unpinned pages of a file range: the driver rewrote it by dr_file_pwrite. */
void dr_page_forget(struct dr_image *image, unsigned file, uint64_t off, uint64_t len);

/* Nothing points to this place any more once the present dirty metadata is durable: fmt->release
 * will be called then (invariant 2). Cannot fail: the core has made room for DR_RESERVATION_FREED
 * places of a reservation, the driver itself, by dr_free_ahead, for any others. */
void dr_free_later(struct dr_image *image, struct dr_freed freed);

/* Make room for n calls of dr_free_later outside of a reservation, before anything is changed that
 * needs them. -ENOMEM. */
int dr_free_ahead(struct dr_image *image, size_t n);

#endif
