/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing metadata pages: seal them, write the sealed ones level by level, unseal (invariant 1). */
#include "core/pages-internal.h"
#include "base/bytes.h"

/* Writers stop to flush when an image has this many dirty pages, or when its dirty pages take a
 * quarter of the budget. */
#define DIRTY_PAGES     4096u
#define DIRTY_PAGES_MIN 64u

size_t dr_cache_dirty(const struct dr_cache *cache)
{
    return cache->n_dirty;
}

bool dr_cache_is_clean(const struct dr_cache *cache)
{
    return cache->n_dirty + cache->n_sealed == 0;
}

bool dr_cache_is_crowded(const struct dr_cache *cache)
{
    uint64_t share = dr_cache_limit(DR_CACHE_METADATA) / DR_PAGE_SIZE / 4;
    return cache->n_dirty > dr_min(DIRTY_PAGES, dr_max(DIRTY_PAGES_MIN, share));
}

void dr_cache_seal(struct dr_cache *cache)
{
    for (struct dr_page *page = cache->dirty_first, *next; page; page = next) {
        next = page->dirty_next;
        page->sealed = page->data;
        page->sealed_dirty = page->dirty;
        memcpy(page->sealed_level, page->level, sizeof(page->level));
        page->sealed_fresh = page->fresh;
        page->dirty = page->fresh = 0;
        page->on_dirty_list = false;
        page->dirty_next = NULL;
        page->sealed_next = cache->sealed_first;
        cache->sealed_first = page;
    }
    cache->n_sealed = cache->n_dirty;
    cache->n_dirty = 0;
    cache->dirty_first = NULL;
    cache->linking = false;
}

/* ------------------------------------------------------------------ writing, no lock held: nothing
 * of a sealed page that is read here changes until it is unsealed */

struct write_page {
    const struct dr_page *page;
    uint8_t mask; /* sectors of the level at hand */
};

/* Fresh sectors have no level: nothing on disk leads to them before this flush has linked them. */
#define FRESH DR_PAGE_LEVELS

static uint8_t sealed_at_level(const struct dr_page *page, unsigned level)
{
    uint8_t mask = 0;
    if (level == FRESH)
        return page->sealed_dirty & page->sealed_fresh;
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++)
        if ((page->sealed_dirty & ~page->sealed_fresh) >> i & 1 && page->sealed_level[i] == level)
            mask |= (uint8_t)(1u << i);
    return mask;
}

static int write_order(const void *a, const void *b)
{
    const struct dr_page *p = ((const struct write_page *)a)->page;
    const struct dr_page *q = ((const struct write_page *)b)->page;
    if (p->file != q->file)
        return p->file < q->file ? -1 : 1;
    return p->off < q->off ? -1 : p->off > q->off;
}

/* Runs of sectors, each by one write. */
static int write_sectors(struct dr_file *f, const struct write_page *w, struct dr_error *err)
{
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++) {
        unsigned n = 0;
        while (i + n < DR_PAGE_SECTORS && (w->mask & (1u << (i + n))))
            n++;
        if (n == 0)
            continue;
        int r = dr_file_pwrite(f, w->page->sealed + i * DR_SECTOR, w->page->off + i * DR_SECTOR,
                               (size_t)n * DR_SECTOR, err);
        if (r < 0)
            return r;
        i += n;
    }
    return 0;
}

/* How many whole pages follow one another in the file. */
static size_t whole_run(const struct write_page *w, size_t n)
{
    size_t run = 1;
    while (run < n && run < 64 && w[run - 1].mask == 0xff && w[run].mask == 0xff &&
           w[run].page->file == w[0].page->file &&
           w[run].page->off == w[run - 1].page->off + DR_PAGE_SIZE)
        run++;
    return run;
}

static int write_run(struct dr_image *image, const struct write_page *w, size_t n,
                     struct dr_error *err)
{
    struct dr_file *f = image->files[w->page->file];
    if (n == 1)
        return write_sectors(f, w, err);
    struct iovec iov[64];
    for (size_t i = 0; i < n; i++)
        iov[i] = (struct iovec){.iov_base = w[i].page->sealed, .iov_len = DR_PAGE_SIZE};
    return dr_file_pwritev(f, iov, (int)n, w->page->off, err);
}

static int write_level(struct dr_image *image, unsigned level, bool *wrote, struct dr_error *err)
{
    const struct dr_cache *cache = image->cache;
    CLEANUP_FREE struct write_page *pages = malloc(cache->n_sealed * sizeof(*pages));
    if (!pages)
        return dr_fail(err, ENOMEM, "%s: out of memory for a flush", image->path);
    size_t n = 0;
    for (const struct dr_page *page = cache->sealed_first; page; page = page->sealed_next) {
        uint8_t mask = sealed_at_level(page, level);
        if (mask)
            pages[n++] = (struct write_page){page, mask};
    }
    qsort(pages, n, sizeof(*pages), write_order);
    *wrote |= n > 0;
    for (size_t i = 0, run; i < n; i += run) {
        run = whole_run(pages + i, n - i);
        int r = write_run(image, pages + i, run, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Fresh sectors go before the others of level 0, the raised counts: where the file system has no
 * space for a table, nothing on disk counts it yet, and nothing leaks. */
int dr_cache_write_level(struct dr_image *image, unsigned level, bool *wrote, struct dr_error *err)
{
    struct dr_cache *cache = image->cache;
    *wrote = false;
    if (cache->n_sealed == 0)
        return 0;
    cache->linking |= level > 0;
    int r = level == 0 ? write_level(image, FRESH, wrote, err) : 0;
    return r < 0 ? r : write_level(image, level, wrote, err);
}

/* ------------------------------------------------------------------ unsealing */

/* The sealed sectors were not written: they are dirty again, together with edits that came since.
 * What may be linked on disk is no longer fresh: it waits for the data that it tells of.
 * False: a sector has edits of two levels now. */
static bool put_back(struct dr_cache *cache, struct dr_page *page)
{
    bool fits = true;
    for (unsigned i = 0; i < DR_PAGE_SECTORS; i++) {
        if (!(page->sealed_dirty >> i & 1))
            continue;
        if ((page->dirty >> i & 1) || page->pins[i])
            fits &= page->level[i] == page->sealed_level[i];
        else
            page->level[i] = page->sealed_level[i];
    }
    dr_page_mark(cache, page, page->sealed_dirty);
    if (!cache->linking)
        page->fresh |= page->sealed_fresh;
    return fits;
}

bool dr_cache_unseal(struct dr_image *image, bool ok)
{
    struct dr_cache *cache = image->cache;
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
        if (page->pinned == 0) {
            free(page->spare);
            page->spare = NULL;
        }
        dr_page_charge(page);
        if (!ok)
            fits &= put_back(cache, page);
        page->sealed_dirty = page->sealed_fresh = 0;
    }
    cache->sealed_first = NULL;
    cache->n_sealed = 0;
    dr_clock_evict(image);
    return fits;
}
