/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The metadata page cache (pages.h): finding, pinning and editing pages.
 *
 * Each image has a table of its own pages, under image->lock. Drivers look pages up and edit them
 * here, in memory only. pages-load.c reads missing pages and evicts others, pages-flush.c writes
 * dirty ones.
 */
#include "core/pages-internal.h"
#include "base/bytes.h"

uint8_t dr_zero_page[DR_PAGE_SIZE];

struct dr_cache *dr_cache_new(void)
{
    struct dr_cache *cache = calloc(1, sizeof(*cache));
    if (!cache)
        return NULL;
    cache->n_buckets = 8; /* chains have thousands of images, most of them with a few pages */
    cache->buckets = calloc(cache->n_buckets, sizeof(struct dr_page *));
    if (!cache->buckets) {
        free(cache);
        return NULL;
    }
    pthread_cond_init(&cache->loaded, NULL);
    return cache;
}

static void free_bytes(uint8_t *bytes)
{
    if (bytes != dr_zero_page)
        free(bytes);
}

void dr_page_free(struct dr_page *page)
{
    dr_clock_charge(0, page->charged);
    if (page->sealed && page->sealed != page->data)
        free_bytes(page->sealed);
    free_bytes(page->data);
    free(page->spare);
    free(page);
}

/* Nobody uses the image any more, but a thread that evicts pages may be looking at one of its. */
void dr_cache_free(struct dr_image *image)
{
    struct dr_cache *cache = image->cache;
    if (!cache)
        return;
    pthread_mutex_lock(&image->lock);
    for (size_t i = 0; i < cache->n_buckets; i++)
        for (struct dr_page *page = cache->buckets[i]; page; page = page->next_in_bucket)
            dr_clock_remove(page);
    pthread_mutex_unlock(&image->lock);
    for (size_t i = 0; i < cache->n_buckets; i++) {
        for (struct dr_page *page = cache->buckets[i], *next; page; page = next) {
            next = page->next_in_bucket;
            dr_page_free(page);
        }
    }
    pthread_cond_destroy(&cache->loaded);
    free(cache->buckets);
    free(cache);
}

void dr_page_charge(struct dr_page *page)
{
    size_t bytes = sizeof(*page);
    if (page->data != dr_zero_page)
        bytes += DR_PAGE_SIZE;
    if (page->sealed && page->sealed != page->data)
        bytes += DR_PAGE_SIZE;
    if (page->spare)
        bytes += DR_PAGE_SIZE;
    dr_clock_charge(bytes, page->charged);
    page->charged = bytes;
}

/* ------------------------------------------------------------------ the table of an image */

static struct dr_page **bucket_of(const struct dr_cache *cache, unsigned file, uint64_t off)
{
    uint64_t h = (off / DR_PAGE_SIZE + file) * 0x9e3779b97f4a7c15ull;
    return &cache->buckets[(size_t)(h >> 32) & (cache->n_buckets - 1)];
}

struct dr_page *dr_cache_find(const struct dr_cache *cache, unsigned file, uint64_t off)
{
    struct dr_page *page = *bucket_of(cache, file, off);
    while (page && (page->off != off || page->file != file))
        page = page->next_in_bucket;
    return page;
}

static void table_insert(struct dr_cache *cache, struct dr_page *page)
{
    struct dr_page **bucket = bucket_of(cache, page->file, page->off);
    page->next_in_bucket = *bucket;
    *bucket = page;
}

static void table_grow(struct dr_cache *cache)
{
    size_t n_old = cache->n_buckets;
    struct dr_page **old = cache->buckets;
    struct dr_page **fresh = calloc(n_old * 2, sizeof(struct dr_page *));
    if (!fresh)
        return; /* slower, not wrong */
    cache->buckets = fresh;
    cache->n_buckets = n_old * 2;
    for (size_t i = 0; i < n_old; i++) {
        for (struct dr_page *page = old[i], *next; page; page = next) {
            next = page->next_in_bucket;
            table_insert(cache, page);
        }
    }
    free(old);
}

struct dr_page *dr_cache_add(struct dr_image *image, unsigned file, uint64_t off, uint8_t *data)
{
    struct dr_cache *cache = image->cache;
    if (cache->n_pages >= cache->n_buckets * 2)
        table_grow(cache);
    struct dr_page *page = calloc(1, sizeof(*page));
    if (!page)
        return NULL;
    page->image = image;
    page->file = file;
    page->off = off;
    page->data = data;
    page->gen = cache->gen;
    page->hole_end = off;
    table_insert(cache, page);
    cache->n_pages++;
    dr_page_charge(page);
    dr_clock_add(page);
    return page;
}

static void table_remove(struct dr_page *page)
{
    struct dr_cache *cache = page->image->cache;
    struct dr_page **link = bucket_of(cache, page->file, page->off);
    while (*link != page)
        link = &(*link)->next_in_bucket;
    *link = page->next_in_bucket;
    cache->n_pages--;
}

void dr_cache_remove(struct dr_page *page)
{
    table_remove(page);
    if (page->holds > 0)
        page->forgotten = true;
    else
        dr_page_free(page);
}

static bool is_clean(const struct dr_page *page)
{
    return !page->dirty && !page->sealed && page->pinned == 0;
}

bool dr_page_is_idle(const struct dr_page *page)
{
    return is_clean(page) && page->holds == 0;
}

/* ------------------------------------------------------------------ holds */

int dr_hold_add(struct dr_hold *hold, struct dr_page *page)
{
    if (!hold)
        return 0;
    if (hold->n == hold->room) {
        size_t room = hold->room ? hold->room * 2 : 8;
        struct dr_page **pages = realloc(hold->pages, room * sizeof(struct dr_page *));
        if (!pages)
            return -ENOMEM;
        hold->pages = pages;
        hold->room = room;
    }
    page->holds++;
    hold->pages[hold->n++] = page;
    return 0;
}

void dr_hold_end(struct dr_hold *hold)
{
    for (size_t i = 0; i < hold->n; i++) {
        struct dr_page *page = hold->pages[i];
        if (--page->holds == 0 && page->forgotten)
            dr_page_free(page);
    }
    free(hold->pages);
    *hold = (struct dr_hold){0};
}

/* ------------------------------------------------------------------ for drivers: looking */

static int need_more(struct dr_image *image, enum dr_need_kind kind, unsigned file, uint64_t off,
                     uint64_t len)
{
    image->need = (struct dr_need){.kind = kind, .file = file, .off = off, .len = len};
    return -EAGAIN;
}

int dr_need_begin(struct dr_image *image)
{
    return need_more(image, DR_NEED_BEGIN, 0, 0, 0);
}

int dr_need_flush(struct dr_image *image)
{
    return need_more(image, DR_NEED_FLUSH, 0, 0, 0);
}

int dr_page_get(struct dr_image *image, unsigned file, uint64_t off, struct dr_page **page)
{
    off = dr_round_down(off, DR_PAGE_SIZE);
    *page = dr_cache_find(image->cache, file, off);
    if (!*page)
        return need_more(image, DR_NEED_PAGE, file, off, DR_PAGE_SIZE);
    atomic_store_explicit(&(*page)->referenced, true, memory_order_relaxed);
    return 0;
}

int dr_page_get_all(struct dr_image *image, unsigned file, uint64_t off, uint64_t len)
{
    struct dr_page *page;
    uint64_t end = off + len;
    for (uint64_t at = dr_round_down(off, DR_PAGE_SIZE); at < end; at += DR_PAGE_SIZE)
        if (dr_page_get(image, file, at, &page) < 0)
            return need_more(image, DR_NEED_PAGE, file, at, end - at);
    return 0;
}

uint64_t dr_page_start(const struct dr_page *page)
{
    return page->off;
}

const uint8_t *dr_page_at(const struct dr_page *page, uint64_t off)
{
    return page->data + (off - page->off);
}

uint64_t dr_page_zero_until(const struct dr_image *image, const struct dr_page *page)
{
    if (page->data == dr_zero_page && page->gen == image->cache->gen &&
        page->hole_end > page->off + DR_PAGE_SIZE)
        return page->hole_end;
    if (page->data == dr_zero_page || dr_is_zero(page->data, DR_PAGE_SIZE))
        return page->off + DR_PAGE_SIZE;
    return page->off;
}

int dr_page_dirty_level(const struct dr_page *page, uint64_t off)
{
    unsigned sector = (unsigned)((off - page->off) / DR_SECTOR);
    return page->dirty & (1u << sector) ? page->level[sector] : -1;
}

/* ------------------------------------------------------------------ for drivers: editing */

/* The sectors that [off, off + len) touches; len > 0. */
static uint8_t sector_mask(const struct dr_page *page, uint64_t off, size_t len)
{
    uint64_t first = (off - page->off) / DR_SECTOR, last = (off - page->off + len - 1) / DR_SECTOR;
    return (uint8_t)((0xffu >> (DR_PAGE_SECTORS - 1 - last)) & (0xffu << first));
}

static bool make_private(struct dr_page *page)
{
    if (page->data == dr_zero_page) {
        uint8_t *own = calloc(1, DR_PAGE_SIZE);
        if (!own)
            return false;
        page->data = own;
    }
    /* With a clone under way already, the sealed copy becomes the spare when the flush ends. */
    if (!page->spare && (!page->sealed || page->sealed == page->data))
        page->spare = malloc(DR_PAGE_SIZE);
    dr_page_charge(page);
    return page->spare || (page->sealed && page->sealed != page->data);
}

int dr_page_pin(struct dr_image *image, struct dr_page *page, uint64_t off, size_t len,
                unsigned level)
{
    uint8_t mask = sector_mask(page, off, len);
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++)
        if ((mask >> i & 1) && ((page->dirty >> i & 1) || page->pins[i]) && page->level[i] != level)
            return need_more(image, DR_NEED_FLUSH, page->file, page->off, 0);
    if (!make_private(page))
        return -ENOMEM;
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++) {
        if (!(mask >> i & 1))
            continue;
        page->pins[i]++;
        page->level[i] = (uint8_t)level;
    }
    page->pinned++;
    return 0;
}

void dr_page_unpin(struct dr_image *image, struct dr_page *page, uint64_t off, size_t len)
{
    (void)image;
    uint8_t mask = sector_mask(page, off, len);
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++)
        page->pins[i] -= mask >> i & 1;
    page->pinned--;
}

void dr_page_mark(struct dr_cache *cache, struct dr_page *page, uint8_t sectors)
{
    page->dirty |= sectors;
    cache->gen++;
    if (page->on_dirty_list)
        return;
    page->on_dirty_list = true;
    page->dirty_next = cache->dirty_first;
    cache->dirty_first = page;
    cache->n_dirty++;
}

/* The power-cut tests prove that they would notice if sealing were missing. */
#ifdef DR_TEST_PLANT
extern bool planted_no_seal;
#else
static const bool planted_no_seal = false;
#endif

void dr_page_put(struct dr_image *image, struct dr_page *page, uint64_t off, const void *bytes,
                 size_t len)
{
    if (page->sealed && page->sealed == page->data && !planted_no_seal) {
        memcpy(page->spare, page->data, DR_PAGE_SIZE);
        page->data = page->spare;
        page->spare = NULL;
    }
    memcpy(page->data + (off - page->off), bytes, len);
    dr_page_mark(image->cache, page, sector_mask(page, off, len));
}

int dr_page_new(struct dr_image *image, unsigned file, uint64_t off, size_t len, unsigned level,
                struct dr_page **out)
{
    uint64_t start = dr_round_down(off, DR_PAGE_SIZE);
    struct dr_page *page = dr_cache_find(image->cache, file, start), *added = NULL;
    if (!page && len < DR_PAGE_SIZE) /* the rest of the page is something else */
        return need_more(image, DR_NEED_PAGE, file, start, DR_PAGE_SIZE);
    if (!page)
        page = added = dr_cache_add(image, file, start, dr_zero_page);
    if (!page)
        return -ENOMEM;
    int r = dr_page_pin(image, page, off, len, level);
    if (r < 0 && added) { /* the file may have other bytes there */
        dr_clock_remove(added);
        dr_cache_remove(added);
    }
    if (r < 0)
        return r;
    dr_page_put(image, page, off, dr_zero_page, len);
    page->fresh |= sector_mask(page, off, len);
    *out = page;
    return 0;
}

static void forget_page(struct dr_page *page)
{
    if (!is_clean(page))
        return;
    dr_clock_remove(page);
    dr_cache_remove(page);
}

void dr_page_forget(struct dr_image *image, unsigned file, uint64_t off, uint64_t len)
{
    struct dr_cache *cache = image->cache;
    cache->load_gen++;
    cache->gen++;
    if (len / DR_PAGE_SIZE <= cache->n_pages) {
        for (uint64_t at = dr_round_down(off, DR_PAGE_SIZE); at < off + len; at += DR_PAGE_SIZE) {
            struct dr_page *page = dr_cache_find(cache, file, at);
            if (page)
                forget_page(page);
        }
        return;
    }
    for (size_t i = 0; i < cache->n_buckets; i++) /* fewer pages in memory than in the range */
        for (struct dr_page *page = cache->buckets[i], *next; page; page = next) {
            next = page->next_in_bucket;
            if (page->file == file && page->off + DR_PAGE_SIZE > off && page->off < off + len)
                forget_page(page);
        }
}

/* ------------------------------------------------------------------ pins of a reservation */

struct dr_pin *dr_reserved_pin(struct dr_reservation *r, unsigned i)
{
    return i < DR_RESERVATION_PINS ? &r->pins[i] : &r->more[i - DR_RESERVATION_PINS];
}

static int pin_room(struct dr_reservation *r)
{
    if (r->n_pins < DR_RESERVATION_PINS + r->room)
        return 0;
    unsigned room = r->room ? r->room * 2 : 8;
    struct dr_pin *more = realloc(r->more, room * sizeof(*more));
    if (!more)
        return -ENOMEM;
    r->more = more;
    r->room = room;
    return 0;
}

/* The reservation itself keeps a sector of the range at another level: no flush will ever help. */
static bool waits_for_itself(struct dr_reservation *r, const struct dr_page *page, uint64_t off,
                             size_t len, unsigned level)
{
    uint8_t mask = sector_mask(page, off, len);
    for (unsigned i = 0; i < r->n_pins; i++) {
        const struct dr_pin *pin = dr_reserved_pin(r, i);
        uint8_t both = pin->page == page ? mask & sector_mask(page, pin->off, pin->len) : 0;
        if (both && page->level[__builtin_ctz(both)] != level)
            return true;
    }
    return false;
}

int dr_reserve_page(struct dr_image *image, struct dr_reservation *r, unsigned file, uint64_t off,
                    size_t len, unsigned level, struct dr_page **page)
{
    int rc = dr_page_get(image, file, off, page);
    if (rc == 0)
        rc = pin_room(r);
    if (rc == 0)
        rc = dr_page_pin(image, *page, off, len, level);
    if (rc == -EAGAIN && *page && waits_for_itself(r, *page, off, len, level))
        return need_more(image, DR_NEED_REPAIR, file, dr_round_down(off, 512), 512);
    if (rc == 0)
        *dr_reserved_pin(r, r->n_pins++) = (struct dr_pin){*page, off, len};
    return rc;
}

void dr_reserve_unpin(struct dr_image *image, struct dr_reservation *r)
{
    for (unsigned i = 0; i < r->n_pins; i++) {
        struct dr_pin *pin = dr_reserved_pin(r, i);
        if (pin->page)
            dr_page_unpin(image, pin->page, pin->off, pin->len);
    }
    free(r->more);
    r->more = NULL;
    r->n_pins = r->room = 0;
}
