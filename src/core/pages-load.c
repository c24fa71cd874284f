/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading metadata pages, and evicting others to make room.
 *
 * A page is read by one thread; others that miss it meanwhile wait for that thread. A read costs
 * one pread; only for a page of zeros the file is asked how far the hole goes, since then the
 * answer saves reads: pages inside the hole that was found last are not read at all. A page right
 * behind that hole is read together with the next one, which mostly begins another hole; a page
 * right behind the last read, together with others, twice as many each time.
 *
 * The budget is one for the whole process and counts the bytes that pages take. The pages of all
 * images stand in one ring, which a hand passes as in any second-chance clock: so an image that
 * nobody uses loses its pages to one that is busy. The ring's lock is the last in the order; to
 * evict a page of another image the evictor tries that image's lock and passes on if it is taken.
 */
#include "core/pages-internal.h"
#include "base/bytes.h"

#define LOAD_PAGES     64u /* at most, by one read */
#define AHEAD_PAGES    8u  /* at most, by one read of pages that are wanted one after the other */
#define BEHIND_HOLE    2u
#define HOLE_LOOKAHEAD (1ull << 40)
/* An evictor looks at this many pages at most: a cache full of dirty pages must not cost much. */
#define EVICT_LOOK 256

/* ------------------------------------------------------------------ the clock */

static pthread_mutex_t clock_lock = PTHREAD_MUTEX_INITIALIZER;
static struct dr_page *clock_hand; /* ring of all pages of the process */
static _Atomic size_t clock_bytes;

void dr_clock_charge(size_t more, size_t less)
{
    atomic_fetch_add_explicit(&clock_bytes, more - less, memory_order_relaxed);
}

/* Behind the hand: looked at last. */
void dr_clock_add(struct dr_page *page)
{
    DR_LOCK_SCOPE(&clock_lock);
    if (!clock_hand) {
        page->clock_prev = page->clock_next = page;
        clock_hand = page;
        return;
    }
    page->clock_next = clock_hand;
    page->clock_prev = clock_hand->clock_prev;
    page->clock_prev->clock_next = page;
    page->clock_next->clock_prev = page;
}

static void ring_remove(struct dr_page *page)
{
    if (clock_hand == page)
        clock_hand = page->clock_next == page ? NULL : page->clock_next;
    page->clock_prev->clock_next = page->clock_next;
    page->clock_next->clock_prev = page->clock_prev;
}

void dr_clock_remove(struct dr_page *page)
{
    DR_LOCK_SCOPE(&clock_lock);
    ring_remove(page);
}

static bool over_budget(void)
{
    return atomic_load_explicit(&clock_bytes, memory_order_relaxed) >
           dr_cache_limit(DR_CACHE_METADATA);
}

/* An image leaves the ring before it is freed, so while the ring's lock is held page->image is
 * there. */
static void evict_page(struct dr_page *page, struct dr_image *own)
{
    struct dr_image *image = page->image;
    if (image != own && pthread_mutex_trylock(&image->lock) != 0)
        return;
    if (dr_page_is_idle(page)) {
        ring_remove(page);
        dr_cache_remove(page);
    }
    if (image != own)
        pthread_mutex_unlock(&image->lock);
}

void dr_clock_evict(struct dr_image *own)
{
    if (!over_budget())
        return;
    DR_LOCK_SCOPE(&clock_lock);
    for (unsigned looked = 0; looked < EVICT_LOOK && clock_hand && over_budget(); looked++) {
        struct dr_page *page = clock_hand;
        clock_hand = page->clock_next;
        if (!atomic_exchange_explicit(&page->referenced, false, memory_order_relaxed))
            evict_page(page, own);
    }
}

/* ------------------------------------------------------------------ reading, no lock held */

/* The pages that one read has brought. */
struct loaded {
    unsigned n;
    uint8_t *data[LOAD_PAGES];     /* dr_zero_page, or malloc'ed */
    uint64_t hole_end[LOAD_PAGES]; /* > 0: the file is a hole from the page to here */
    uint64_t hole_from, hole_to;   /* the last hole of them; equal: none */
};

static void loaded_free(struct loaded *l)
{
    for (unsigned i = 0; i < l->n; i++)
        if (l->data[i] != dr_zero_page)
            free(l->data[i]);
    l->n = 0;
}

static int no_memory(const struct dr_file *f, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory for metadata", f->path);
}

/* Checks the page at off and takes a copy of it. */
static int take_page(struct dr_image *image, struct dr_file *f, uint64_t off, const uint8_t *bytes,
                     uint8_t **data, struct dr_error *err)
{
    int r = image->fmt->vet ? image->fmt->vet(image, f, off, bytes, DR_PAGE_SIZE, err) : 0;
    if (r < 0)
        return r;
    if (dr_is_zero(bytes, DR_PAGE_SIZE)) {
        *data = dr_zero_page;
        return 0;
    }
    *data = malloc(DR_PAGE_SIZE);
    if (!*data)
        return no_memory(f, err);
    memcpy(*data, bytes, DR_PAGE_SIZE);
    return 0;
}

/* Bytes of a page behind the end of the file are zeros. But if the file is shorter than its length
 * when it was opened, or written last, then somebody has cut it off: zeros would read as "nothing
 * is here". size: of the file, before these bytes were read and now, the smaller one. */
static int check_page_end(const struct dr_file *f, uint64_t off, uint64_t end, uint64_t size,
                          struct dr_error *err)
{
    uint64_t expected = dr_min(off + DR_PAGE_SIZE, size);
    if (end >= expected)
        return 0;
    return dr_fail(err, EIO, "%s: was cut off while it was open: ends at %llu, expected %llu bytes",
                   f->path, (unsigned long long)end, (unsigned long long)size);
}

static int read_pages(struct dr_image *image, struct dr_file *f, uint64_t off, unsigned n,
                      struct loaded *l, struct dr_error *err)
{
    uint8_t few[BEHIND_HOLE * DR_PAGE_SIZE], *bytes = few;
    CLEANUP_FREE uint8_t *many = NULL;
    if (n > BEHIND_HOLE) {
        bytes = many = malloc((size_t)n * DR_PAGE_SIZE);
        if (!many)
            return no_memory(f, err);
    }
    size_t got = 0;
    uint64_t size = dr_file_size(f);
    int r = dr_file_pread_short(f, bytes, off, (size_t)n * DR_PAGE_SIZE, &got, err);
    size = dr_min(size, dr_file_size(f));
    for (l->n = 0; r == 0 && l->n < n; l->n += r == 0) {
        uint64_t at = off + (uint64_t)l->n * DR_PAGE_SIZE;
        r = check_page_end(f, at, off + got, size, err);
        if (r == 0)
            r = take_page(image, f, at, bytes + (size_t)l->n * DR_PAGE_SIZE, &l->data[l->n], err);
    }
    return r;
}

/* Find the ends of the holes that the pages of zeros lie in. */
static int find_holes(struct dr_file *f, uint64_t off, struct loaded *l, struct dr_error *err)
{
    uint64_t known = 0, hole_end = 0; /* up to known the file was asked */
    l->hole_from = l->hole_to = 0;
    for (unsigned i = 0; i < l->n; i++) {
        uint64_t at = off + (uint64_t)i * DR_PAGE_SIZE, run;
        enum dr_file_extent kind;
        l->hole_end[i] = 0;
        if (l->data[i] != dr_zero_page)
            continue;
        if (at >= known) {
            int r = dr_file_extent(f, at, HOLE_LOOKAHEAD, &kind, &run, err);
            if (r < 0)
                return r;
            known = at + run;
            hole_end = kind == DR_FILE_HOLE ? known : 0;
            if (hole_end) {
                l->hole_from = at;
                l->hole_to = hole_end;
            }
        }
        if (hole_end >= at + DR_PAGE_SIZE)
            l->hole_end[i] = hole_end;
    }
    return 0;
}

/* ------------------------------------------------------------------ loading */

static const struct dr_loading *loading_find(const struct dr_cache *cache, unsigned file,
                                             uint64_t off)
{
    const struct dr_loading *l = cache->loading;
    while (l && (l->file != file || off < l->off || off >= l->end))
        l = l->next;
    return l;
}

static void loading_end(struct dr_cache *cache, const struct dr_loading *mine)
{
    struct dr_loading **link = &cache->loading;
    while (*link != mine)
        link = &(*link)->next;
    *link = mine->next;
    pthread_cond_broadcast(&cache->loaded);
}

/* From *at on, hold the pages that are in memory, since the callback will need them too, and wait
 * for those that another thread reads. Stops at the first page that this thread must read. */
static int pass_present(struct dr_image *image, const struct dr_need *need, uint64_t *at,
                        struct dr_hold *hold)
{
    struct dr_cache *cache = image->cache;
    while (*at < need->off + need->len) {
        struct dr_page *page = dr_cache_find(cache, need->file, *at);
        if (page) {
            int r = dr_hold_add(hold, page);
            if (r < 0)
                return r;
            *at += DR_PAGE_SIZE;
        } else if (loading_find(cache, need->file, *at)) {
            pthread_cond_wait(&cache->loaded, &image->lock);
        } else {
            break;
        }
    }
    return 0;
}

/* The number of pages in a row that are missing, from the one at `at` on, and begin before end. */
static unsigned missing_run(const struct dr_cache *cache, unsigned file, uint64_t at, uint64_t end)
{
    unsigned n = 1;
    for (uint64_t next = at + DR_PAGE_SIZE; n < LOAD_PAGES && next < end; next += DR_PAGE_SIZE, n++)
        if (dr_cache_find(cache, file, next) || loading_find(cache, file, next))
            break;
    return n;
}

/* The end of the read for a callback that wants the page at `at`, and will want more. */
static uint64_t read_ahead(const struct dr_cache *cache, const struct dr_file *f, unsigned file,
                           uint64_t at)
{
    uint64_t n = 1;
    if (cache->hole_file == file && at > 0 && dr_round_down(cache->hole_end, DR_PAGE_SIZE) == at)
        n = BEHIND_HOLE;
    else if (cache->read_file == file && cache->read_end == at && at > 0)
        n = cache->ahead;
    return dr_min(at + n * DR_PAGE_SIZE, dr_file_size(f));
}

/* The number of the n pages at `at` that lie in the hole that was found last. */
static unsigned pages_in_hole(const struct dr_cache *cache, unsigned file, uint64_t at, unsigned n)
{
    if (cache->hole_gen != cache->gen || cache->hole_file != file || at < cache->hole_off ||
        at >= cache->hole_end)
        return 0;
    return (unsigned)dr_min(n, (cache->hole_end - at) / DR_PAGE_SIZE);
}

/* Put the pages that were read into the table, but for those that dr_page_new put there meanwhile.
 */
static int enter_pages(struct dr_image *image, unsigned file, uint64_t off, struct loaded *l,
                       bool holes_hold, struct dr_hold *hold)
{
    int r = 0;
    dr_clock_evict(image);
    for (unsigned i = 0; i < l->n && r == 0; i++) {
        uint64_t at = off + (uint64_t)i * DR_PAGE_SIZE;
        struct dr_page *page = dr_cache_find(image->cache, file, at);
        if (!page) {
            page = dr_cache_add(image, file, at, l->data[i]);
            if (!page)
                return -ENOMEM;
            l->data[i] = dr_zero_page; /* the page has it */
            if (holes_hold && l->hole_end[i])
                page->hole_end = l->hole_end[i];
        }
        r = dr_hold_add(hold, page);
    }
    return r;
}

static int enter_hole(struct dr_image *image, unsigned file, uint64_t at, unsigned n,
                      struct dr_hold *hold)
{
    struct loaded l;
    for (l.n = 0; l.n < n; l.n++) {
        l.data[l.n] = dr_zero_page;
        l.hole_end[l.n] = image->cache->hole_end;
    }
    return enter_pages(image, file, at, &l, true, hold);
}

/* Reads n pages; if that fails, at least the `wanted` first ones. No lock held. */
static int load_pages(struct dr_image *image, struct dr_file *f, uint64_t off, unsigned n,
                      unsigned wanted, struct loaded *l, struct dr_error *err)
{
    int r = read_pages(image, f, off, n, l, n > wanted ? NULL : err);
    if (r < 0 && n > wanted) {
        loaded_free(l);
        r = read_pages(image, f, off, wanted, l, err);
    }
    return r < 0 ? r : find_holes(f, off, l, err);
}

/* Pages from *at on, by at most one read; image->lock held, dropped for the read. */
static int load_run(struct dr_image *image, const struct dr_need *need, uint64_t *at,
                    struct dr_hold *hold, struct dr_error *err)
{
    struct dr_cache *cache = image->cache;
    struct dr_file *f = image->files[need->file];
    uint64_t need_end = need->off + need->len;
    unsigned wanted = missing_run(cache, need->file, *at, need_end), n = wanted;
    unsigned in_hole = pages_in_hole(cache, need->file, *at, wanted);
    if (in_hole > 0) {
        int r = enter_hole(image, need->file, *at, in_hole, hold);
        *at += (uint64_t)in_hole * DR_PAGE_SIZE;
        return r < 0 ? no_memory(f, err) : 0;
    }
    if (*at + DR_PAGE_SIZE >= need_end)
        n = missing_run(cache, need->file, *at, read_ahead(cache, f, need->file, *at));
    dr_file_pin(f); /* no user of its own: one more would refuse the others an upgrade */
    struct dr_loading mine = {need->file, *at, *at + (uint64_t)n * DR_PAGE_SIZE, cache->loading};
    uint64_t load_gen = cache->load_gen, gen = cache->gen;
    bool quiet = cache->n_dirty + cache->n_sealed == 0;
    cache->loading = &mine;
    pthread_mutex_unlock(&image->lock);

    struct loaded l; /* without its pages: clearing them would cost more than most reads */
    l.n = 0;
    int r = load_pages(image, f, *at, n, wanted, &l, err);

    pthread_mutex_lock(&image->lock);
    loading_end(cache, &mine);
    if (r == 0 && cache->load_gen == load_gen) { /* else a flush wrote meanwhile: read again */
        /* Dirty pages in memory may fill what the file still shows as a hole. */
        bool holes_hold = quiet && gen == cache->gen;
        r = enter_pages(image, need->file, *at, &l, holes_hold, hold);
        *at += (uint64_t)l.n * DR_PAGE_SIZE;
        bool goes_on = cache->read_file == need->file && cache->read_end == mine.off;
        unsigned before = goes_on && cache->ahead > 0 ? cache->ahead : 1;
        cache->ahead = before < AHEAD_PAGES ? 2 * before : AHEAD_PAGES;
        cache->read_file = need->file;
        cache->read_end = *at;
        if (holes_hold && l.hole_to > l.hole_from) {
            cache->hole_file = need->file;
            cache->hole_off = l.hole_from;
            cache->hole_end = l.hole_to;
            cache->hole_gen = gen;
        }
        if (r < 0)
            no_memory(f, err);
    }
    loaded_free(&l);
    dr_file_unpin(f);
    return r;
}

int dr_cache_load(struct dr_image *image, struct dr_need need, struct dr_hold *hold,
                  struct dr_error *err)
{
    uint64_t at = dr_round_down(need.off, DR_PAGE_SIZE);
    int r = 0;
    while (r == 0) {
        r = pass_present(image, &need, &at, hold);
        if (r < 0)
            return no_memory(image->files[need.file], err);
        if (at >= need.off + need.len)
            return 0;
        r = load_run(image, &need, &at, hold, err);
    }
    return r;
}
