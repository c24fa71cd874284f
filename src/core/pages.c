/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The metadata page cache (pages.h). One per image, under image->lock; one memory budget for all.
 */
#include "core/internal.h"
#include "base/bytes.h"

#define SECTOR       512u
#define PAGE_SECTORS (DR_PAGE_SIZE / SECTOR)
/* All caches of the process together; beyond it clean pages go. */
#define CACHE_BUDGET_PAGES ((64u << 20) / DR_PAGE_SIZE)
/* What an image may keep whatever the others use: one callback needs several pages at once. */
#define CACHE_MIN_PAGES 32
#define HOLE_LOOKAHEAD  (1ull << 40)

struct dr_page {
    unsigned file;
    uint64_t off;
    uint8_t *data;        /* the present bytes; zero_page while nobody edits a page of zeros */
    uint8_t *sealed;      /* what the running flush writes; == data until an edit makes a clone */
    uint8_t *spare;       /* guarantees that the clone cannot fail, while pinned */
    uint8_t dirty;        /* a bit a sector: edits that no flush has sealed yet */
    uint8_t sealed_dirty; /* a bit a sector of sealed */
    uint8_t level;        /* of the edits in dirty, or of the pins */
    uint8_t sealed_level;
    bool referenced; /* clock */
    unsigned pins;
    uint64_t hole_end; /* the file is a hole from off to here, if gen is still the cache's */
    uint64_t gen;
    struct dr_page *chain; /* hash */
    struct dr_page *clock_prev, *clock_next;
    struct dr_page *dirty_next; /* list of dirty pages */
    struct dr_page *sealed_next;
    bool on_dirty_list;
};

struct dr_cache {
    struct dr_page **buckets;
    size_t n_buckets, n_pages;
    struct dr_page *hand; /* ring of all pages */
    struct dr_page *dirty_first;
    struct dr_page *sealed_first;
    size_t n_dirty, n_sealed;
    uint64_t gen;      /* of hole knowledge: edits end it */
    uint64_t load_gen; /* what was read from the file before this changed may be stale */
};

static uint8_t zero_page[DR_PAGE_SIZE]; /* never written */
static _Atomic size_t pages_in_process;

struct dr_cache *dr_cache_new(void)
{
    struct dr_cache *cache = calloc(1, sizeof(*cache));
    if (!cache)
        return NULL;
    cache->n_buckets = 64;
    cache->buckets = calloc(cache->n_buckets, sizeof(struct dr_page *));
    if (!cache->buckets) {
        free(cache);
        return NULL;
    }
    return cache;
}

static void page_free_data(uint8_t *data)
{
    if (data != zero_page)
        free(data);
}

static void page_free(struct dr_page *page)
{
    if (page->sealed && page->sealed != page->data)
        page_free_data(page->sealed);
    page_free_data(page->data);
    free(page->spare);
    free(page);
    atomic_fetch_sub(&pages_in_process, 1);
}

void dr_cache_free(struct dr_cache *cache)
{
    if (!cache)
        return;
    for (size_t i = 0; i < cache->n_buckets; i++) {
        for (struct dr_page *page = cache->buckets[i], *next; page; page = next) {
            next = page->chain;
            page_free(page);
        }
    }
    free(cache->buckets);
    free(cache);
}

/* ------------------------------------------------------------------ finding, adding, evicting */

static size_t page_bucket(const struct dr_cache *cache, unsigned file, uint64_t off)
{
    uint64_t h = (off / DR_PAGE_SIZE + file) * 0x9e3779b97f4a7c15ull;
    return (size_t)(h >> 32) & (cache->n_buckets - 1);
}

static struct dr_page *cache_find(const struct dr_cache *cache, unsigned file, uint64_t off)
{
    struct dr_page *page = cache->buckets[page_bucket(cache, file, off)];
    while (page && (page->off != off || page->file != file))
        page = page->chain;
    return page;
}

static void cache_grow(struct dr_cache *cache)
{
    size_t n = cache->n_buckets * 2;
    struct dr_page **fresh = calloc(n, sizeof(struct dr_page *));
    if (!fresh)
        return; /* slower, not wrong */
    struct dr_page **old = cache->buckets;
    size_t n_old = cache->n_buckets;
    cache->buckets = fresh;
    cache->n_buckets = n;
    for (size_t i = 0; i < n_old; i++) {
        for (struct dr_page *page = old[i], *next; page; page = next) {
            next = page->chain;
            size_t b = page_bucket(cache, page->file, page->off);
            page->chain = fresh[b];
            fresh[b] = page;
        }
    }
    free(old);
}

static void cache_remove(struct dr_cache *cache, struct dr_page *page)
{
    struct dr_page **link = &cache->buckets[page_bucket(cache, page->file, page->off)];
    while (*link != page)
        link = &(*link)->chain;
    *link = page->chain;
    if (cache->hand == page)
        cache->hand = page->clock_next == page ? NULL : page->clock_next;
    page->clock_prev->clock_next = page->clock_next;
    page->clock_next->clock_prev = page->clock_prev;
    cache->n_pages--;
    page_free(page);
}

static bool page_is_clean(const struct dr_page *page)
{
    return !page->dirty && !page->sealed && page->pins == 0;
}

/* Second chance; looks at a bounded number of pages so that a cache full of dirty ones costs
 * little. */
static void cache_evict(struct dr_cache *cache)
{
    for (size_t looked = 0; looked < 64 && cache->hand; looked++) {
        if (cache->n_pages <= CACHE_MIN_PAGES ||
            atomic_load(&pages_in_process) <= CACHE_BUDGET_PAGES)
            return;
        struct dr_page *page = cache->hand;
        cache->hand = page->clock_next;
        if (page->referenced)
            page->referenced = false;
        else if (page_is_clean(page))
            cache_remove(cache, page);
    }
}

static struct dr_page *cache_add(struct dr_cache *cache, unsigned file, uint64_t off, uint8_t *data)
{
    if (cache->n_pages >= cache->n_buckets * 2)
        cache_grow(cache);
    struct dr_page *page = calloc(1, sizeof(*page));
    if (!page)
        return NULL;
    page->file = file;
    page->off = off;
    page->data = data;
    page->referenced = true;
    page->gen = cache->gen;
    page->hole_end = off;
    size_t b = page_bucket(cache, file, off);
    page->chain = cache->buckets[b];
    cache->buckets[b] = page;
    if (cache->hand) { /* behind the hand: looked at last */
        page->clock_next = cache->hand;
        page->clock_prev = cache->hand->clock_prev;
        page->clock_prev->clock_next = page;
        page->clock_next->clock_prev = page;
    } else {
        page->clock_prev = page->clock_next = page;
        cache->hand = page;
    }
    cache->n_pages++;
    atomic_fetch_add(&pages_in_process, 1);
    return page;
}

/* ------------------------------------------------------------------ loading (no lock held) */

/* *hole_end = where the hole ends that covers the whole page; 0 = it is not all hole. */
static int load_hole(struct dr_file *f, uint64_t off, uint64_t *hole_end, struct dr_error *err)
{
    enum dr_file_extent kind;
    uint64_t run;
    *hole_end = 0;
    int r = dr_file_extent(f, off, HOLE_LOOKAHEAD, &kind, &run, err);
    if (r < 0)
        return r;
    if (kind == DR_FILE_HOLE && run >= DR_PAGE_SIZE)
        *hole_end = off + run;
    return 0;
}

static int load_bytes(struct dr_image *image, struct dr_file *f, uint64_t off, uint8_t **data,
                      struct dr_error *err)
{
    uint8_t *bytes = malloc(DR_PAGE_SIZE);
    if (!bytes)
        return dr_fail(err, ENOMEM, "%s: out of memory for metadata", f->path);
    int r = dr_file_pread_short(f, bytes, off, DR_PAGE_SIZE, NULL, err);
    if (r == 0 && image->fmt->vet)
        r = image->fmt->vet(image, f, off, bytes, DR_PAGE_SIZE, err);
    if (r < 0) {
        free(bytes);
        return r;
    }
    *data = bytes;
    return 0;
}

int dr_cache_load(struct dr_image *image, struct dr_need need, struct dr_error *err)
{
    struct dr_cache *cache = image->cache;
    struct dr_file *f = image->files[need.file];
    for (;;) {
        pthread_mutex_lock(&image->lock);
        uint64_t load_gen = cache->load_gen, gen = cache->gen;
        bool quiet = cache->n_dirty + cache->n_sealed == 0;
        pthread_mutex_unlock(&image->lock);

        uint64_t hole_end;
        uint8_t *data = zero_page;
        int r = load_hole(f, need.off, &hole_end, err);
        if (r == 0 && hole_end == 0)
            r = load_bytes(image, f, need.off, &data, err);
        if (r < 0)
            return r;

        DR_LOCK_SCOPE(&image->lock);
        bool present = cache_find(cache, need.file, need.off) != NULL;
        if (present || cache->load_gen != load_gen) {
            page_free_data(data);
            if (present)
                return 0;
            continue; /* a flush wrote meanwhile: what was read may be old */
        }
        cache_evict(cache);
        struct dr_page *page = cache_add(cache, need.file, need.off, data);
        if (!page) {
            page_free_data(data);
            return dr_fail(err, ENOMEM, "%s: out of memory for metadata", f->path);
        }
        /* Dirty pages in memory may fill what the file still shows as a hole. */
        if (hole_end && quiet && gen == cache->gen)
            page->hole_end = hole_end;
        return 0;
    }
}

/* ------------------------------------------------------------------ for drivers */

static int need_more(struct dr_image *image, enum dr_need_kind kind, unsigned file, uint64_t off)
{
    image->need = (struct dr_need){.kind = kind, .file = file, .off = off};
    return -EAGAIN;
}

int dr_need_begin(struct dr_image *image)
{
    return need_more(image, DR_NEED_BEGIN, 0, 0);
}

int dr_need_flush(struct dr_image *image)
{
    return need_more(image, DR_NEED_FLUSH, 0, 0);
}

int dr_page_get(struct dr_image *image, unsigned file, uint64_t off, struct dr_page **page)
{
    off = dr_round_down(off, DR_PAGE_SIZE);
    *page = cache_find(image->cache, file, off);
    if (!*page)
        return need_more(image, DR_NEED_PAGE, file, off);
    (*page)->referenced = true;
    return 0;
}

const uint8_t *dr_page_at(const struct dr_page *page, uint64_t off)
{
    return page->data + (off - page->off);
}

uint64_t dr_page_zero_until(const struct dr_image *image, const struct dr_page *page)
{
    if (page->data == zero_page && page->gen == image->cache->gen &&
        page->hole_end > page->off + DR_PAGE_SIZE)
        return page->hole_end;
    if (page->data == zero_page || dr_is_zero(page->data, DR_PAGE_SIZE))
        return page->off + DR_PAGE_SIZE;
    return page->off;
}

int dr_page_dirty_level(const struct dr_page *page)
{
    return page->dirty ? page->level : -1;
}

static bool page_make_private(struct dr_page *page)
{
    if (page->data == zero_page) {
        uint8_t *own = calloc(1, DR_PAGE_SIZE);
        if (!own)
            return false;
        page->data = own;
    }
    /* With a clone under way already, the sealed copy becomes the spare when the flush ends. */
    if (!page->spare && (!page->sealed || page->sealed == page->data))
        page->spare = malloc(DR_PAGE_SIZE);
    return page->spare || (page->sealed && page->sealed != page->data);
}

int dr_page_pin(struct dr_image *image, struct dr_page *page, unsigned level)
{
    if ((page->dirty || page->pins) && page->level != level)
        return need_more(image, DR_NEED_FLUSH, page->file, page->off);
    if (!page_make_private(page))
        return -ENOMEM;
    page->pins++;
    page->level = (uint8_t)level;
    return 0;
}

void dr_page_unpin(struct dr_image *image, struct dr_page *page)
{
    (void)image;
    page->pins--;
}

static void page_mark(struct dr_cache *cache, struct dr_page *page, uint8_t sectors)
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

static uint8_t sector_mask(uint64_t first, uint64_t last)
{
    return (uint8_t)((0xffu >> (PAGE_SECTORS - 1 - last)) & (0xffu << first));
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
    size_t at = (size_t)(off - page->off);
    memcpy(page->data + at, bytes, len);
    page_mark(image->cache, page, sector_mask(at / SECTOR, (at + len - 1) / SECTOR));
}

int dr_page_new(struct dr_image *image, unsigned file, uint64_t off, unsigned level,
                struct dr_page **out)
{
    struct dr_cache *cache = image->cache;
    struct dr_page *page = cache_find(cache, file, off);
    if (!page)
        page = cache_add(cache, file, off, zero_page);
    if (!page)
        return -ENOMEM;
    int r = dr_page_pin(image, page, level);
    if (r < 0)
        return r;
    static const uint8_t zeros[DR_PAGE_SIZE];
    dr_page_put(image, page, off, zeros, DR_PAGE_SIZE);
    *out = page;
    return 0;
}

/* A range of more pages than there are: look at those. */
static void cache_forget_all(struct dr_cache *cache, unsigned file, uint64_t off, uint64_t len)
{
    for (size_t i = 0; i < cache->n_buckets; i++)
        for (struct dr_page *page = cache->buckets[i], *next; page; page = next) {
            next = page->chain;
            if (page->file == file && page->off + DR_PAGE_SIZE > off && page->off < off + len &&
                page_is_clean(page))
                cache_remove(cache, page);
        }
}

void dr_page_forget(struct dr_image *image, unsigned file, uint64_t off, uint64_t len)
{
    struct dr_cache *cache = image->cache;
    cache->load_gen++;
    cache->gen++;
    if (len / DR_PAGE_SIZE > cache->n_pages) {
        cache_forget_all(cache, file, off, len);
        return;
    }
    for (uint64_t at = dr_round_down(off, DR_PAGE_SIZE); at < off + len; at += DR_PAGE_SIZE) {
        struct dr_page *page = cache_find(cache, file, at);
        if (page && page_is_clean(page))
            cache_remove(cache, page);
    }
}

/* ------------------------------------------------------------------ flushing */

size_t dr_cache_dirty(const struct dr_cache *cache)
{
    return cache->n_dirty;
}

bool dr_cache_is_clean(const struct dr_cache *cache)
{
    return cache->n_dirty + cache->n_sealed == 0;
}

void dr_cache_seal(struct dr_cache *cache)
{
    for (struct dr_page *page = cache->dirty_first, *next; page; page = next) {
        next = page->dirty_next;
        page->sealed = page->data;
        page->sealed_dirty = page->dirty;
        page->sealed_level = page->level;
        page->dirty = 0;
        page->on_dirty_list = false;
        page->dirty_next = NULL;
        page->sealed_next = cache->sealed_first;
        cache->sealed_first = page;
    }
    cache->n_sealed = cache->n_dirty;
    cache->n_dirty = 0;
    cache->dirty_first = NULL;
}

static int page_order(const void *a, const void *b)
{
    const struct dr_page *p = *(struct dr_page *const *)a, *q = *(struct dr_page *const *)b;
    if (p->file != q->file)
        return p->file < q->file ? -1 : 1;
    return p->off < q->off ? -1 : p->off > q->off;
}

/* Runs of dirty sectors; sealed data does not change, so no lock. */
static int page_write(struct dr_image *image, const struct dr_page *page, struct dr_error *err)
{
    struct dr_file *f = image->files[page->file];
    for (unsigned i = 0; i < PAGE_SECTORS; i++) {
        unsigned n = 0;
        while (i + n < PAGE_SECTORS && (page->sealed_dirty & (1u << (i + n))))
            n++;
        if (n == 0)
            continue;
        int r = dr_file_pwrite(f, page->sealed + i * SECTOR, page->off + i * SECTOR,
                               (size_t)n * SECTOR, err);
        if (r < 0)
            return r;
        i += n;
    }
    return 0;
}

/* Whole neighbouring pages go out in one write. */
static int pages_write_run(struct dr_image *image, struct dr_page *const *pages, size_t n,
                           struct dr_error *err)
{
    if (n == 1)
        return page_write(image, pages[0], err);
    struct iovec iov[64];
    for (size_t i = 0; i < n; i++)
        iov[i] = (struct iovec){.iov_base = pages[i]->sealed, .iov_len = DR_PAGE_SIZE};
    return dr_file_pwritev(image->files[pages[0]->file], iov, (int)n, pages[0]->off, err);
}

static size_t page_run(struct dr_page *const *pages, size_t n)
{
    size_t run = 1;
    while (run < n && run < 64 && pages[run - 1]->sealed_dirty == 0xff &&
           pages[run]->sealed_dirty == 0xff && pages[run]->file == pages[0]->file &&
           pages[run]->off == pages[run - 1]->off + DR_PAGE_SIZE)
        run++;
    return run;
}

int dr_cache_write_level(struct dr_image *image, unsigned level, bool *wrote, struct dr_error *err)
{
    struct dr_cache *cache = image->cache;
    *wrote = false;
    if (cache->n_sealed == 0)
        return 0;
    CLEANUP_FREE struct dr_page **pages = malloc(cache->n_sealed * sizeof(*pages));
    if (!pages)
        return dr_fail(err, ENOMEM, "%s: out of memory for a flush", image->path);
    size_t n = 0;
    for (struct dr_page *page = cache->sealed_first; page; page = page->sealed_next)
        if (page->sealed_level == level)
            pages[n++] = page;
    qsort(pages, n, sizeof(*pages), page_order);
    *wrote = n > 0;
    for (size_t i = 0, run; i < n; i += run) {
        run = page_run(pages + i, n - i);
        int r = pages_write_run(image, pages + i, run, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* What was not written waits again, with what came since: only if both are of one level. */
static bool page_put_back(struct dr_cache *cache, struct dr_page *page)
{
    bool fits = (!page->dirty && !page->pins) || page->level == page->sealed_level;
    if (fits)
        page->level = page->sealed_level;
    page_mark(cache, page, page->sealed_dirty);
    return fits;
}

bool dr_cache_unseal(struct dr_cache *cache, bool ok)
{
    bool fits = true;
    cache->load_gen++;
    for (struct dr_page *page = cache->sealed_first, *next; page; page = next) {
        next = page->sealed_next;
        page->sealed_next = NULL;
        uint8_t *sealed = page->sealed;
        page->sealed = NULL;
        if (sealed != page->data) {
            free(page->spare);
            page->spare = sealed;
        }
        if (page->pins == 0) {
            free(page->spare);
            page->spare = NULL;
        }
        if (!ok)
            fits &= page_put_back(cache, page);
    }
    cache->sealed_first = NULL;
    cache->n_sealed = 0;
    return fits;
}
