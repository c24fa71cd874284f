/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "core/marks.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "base/cleanup.h"

size_t dr_marks_pages = 8192;

static _Atomic uint8_t whole_page[1]; /* stands for a page with all bits set */

void dr_marks_init(struct dr_marks *m, unsigned bits)
{
    *m = (struct dr_marks){.bits = bits};
    pthread_mutex_init(&m->lock, NULL);
}

void dr_marks_free(struct dr_marks *m)
{
    for (size_t i = 0; i < m->n_pages; i++)
        if (atomic_load(&m->pages[i]) != whole_page)
            free(atomic_load(&m->pages[i]));
    free(m->pages);
    m->pages = NULL;
    m->n_pages = 0;
    pthread_mutex_destroy(&m->lock);
}

void dr_marks_move(struct dr_marks *m, struct dr_marks *from)
{
    dr_marks_free(m);
    dr_marks_init(m, from->bits);
    m->pages = from->pages;
    m->n_pages = from->n_pages;
    m->n_used = from->n_used;
    atomic_store(&m->all, atomic_load(&from->all));
    from->pages = NULL;
    from->n_pages = 0;
    dr_marks_free(from);
}

int dr_marks_cover(struct dr_marks *m, uint64_t size)
{
    uint64_t n = dr_div_up(dr_div_up(size, UINT64_C(1) << m->bits), DR_MARKS_PAGE_BITS);
    if (m->pages && n <= m->n_pages)
        return 0;
    _Atomic(_Atomic uint8_t *) *pages = calloc(n ? n : 1, sizeof(*pages));
    if (!pages)
        return -ENOMEM;
    for (size_t i = 0; i < m->n_pages; i++)
        atomic_store(&pages[i], atomic_load(&m->pages[i]));
    free(m->pages);
    m->pages = pages;
    m->n_pages = (size_t)n;
    return 0;
}

/* ------------------------------------------------------------------ setting */

/* whole: all bits of the page are going to be set. */
static _Atomic uint8_t *get_page(struct dr_marks *m, size_t i, bool whole)
{
    _Atomic uint8_t *page = atomic_load_explicit(&m->pages[i], memory_order_acquire);
    if (page)
        return page;
    DR_LOCK_SCOPE(&m->lock);
    page = atomic_load_explicit(&m->pages[i], memory_order_acquire);
    if (page)
        return page;
    page = !whole && m->n_used < dr_marks_pages ? calloc(1, DR_MARKS_PAGE) : NULL;
    if (page)
        m->n_used++;
    else
        page = whole_page;
    atomic_store_explicit(&m->pages[i], page, memory_order_release);
    return page;
}

static void set_in_page(_Atomic uint8_t *page, uint64_t from, uint64_t to)
{
    for (uint64_t i = from; i < to; i = (i / 8 + 1) * 8) {
        uint64_t last = dr_min(to, (i / 8 + 1) * 8);
        unsigned mask = ((1u << (last - i)) - 1) << i % 8;
        if ((atomic_load_explicit(&page[i / 8], memory_order_relaxed) & mask) != mask)
            atomic_fetch_or_explicit(&page[i / 8], (uint8_t)mask, memory_order_relaxed);
    }
}

void dr_marks_set(struct dr_marks *m, uint64_t off, uint64_t len)
{
    if (!len || !m->pages)
        return;
    uint64_t first = off >> m->bits, end = ((off + len - 1) >> m->bits) + 1;
    for (uint64_t i = first; i < end;) {
        uint64_t n = i / DR_MARKS_PAGE_BITS, stop = dr_min(end, (n + 1) * DR_MARKS_PAGE_BITS);
        if (n >= m->n_pages)
            return;
        bool whole = stop - i == DR_MARKS_PAGE_BITS;
        _Atomic uint8_t *page = get_page(m, (size_t)n, whole);
        if (page != whole_page)
            set_in_page(page, i % DR_MARKS_PAGE_BITS, (stop - 1) % DR_MARKS_PAGE_BITS + 1);
        i = stop;
    }
}

void dr_marks_cut(struct dr_marks *m, uint64_t size)
{
    uint64_t bits = dr_div_up(size, UINT64_C(1) << m->bits);
    for (size_t i = (size_t)(bits / DR_MARKS_PAGE_BITS); i < m->n_pages; i++) {
        _Atomic uint8_t *page = atomic_load(&m->pages[i]);
        uint64_t first = i * (uint64_t)DR_MARKS_PAGE_BITS;
        if (!page || page == whole_page) {
            if (first >= bits)
                atomic_store(&m->pages[i], NULL);
            continue;
        }
        for (uint64_t k = bits > first ? bits - first : 0; k < DR_MARKS_PAGE_BITS; k++)
            page[k / 8] &= (uint8_t) ~(1u << k % 8);
    }
}

/* ------------------------------------------------------------------ reading */

enum dr_marks_kind dr_marks_page(const struct dr_marks *m, size_t i, const _Atomic uint8_t **bits)
{
    *bits = NULL;
    if (atomic_load(&m->all))
        return DR_MARKS_WHOLE;
    const _Atomic uint8_t *page = m->pages ? atomic_load(&m->pages[i]) : NULL;
    if (!page || page == whole_page)
        return page ? DR_MARKS_WHOLE : DR_MARKS_NONE;
    *bits = page;
    return DR_MARKS_SOME;
}

/* Joins ranges that touch before they are told. */
struct joining {
    uint64_t off, len, size;
    int (*each)(void *user, uint64_t off, uint64_t len);
    void *user;
};

static int tell(const struct joining *j)
{
    if (!j->len || j->off >= j->size)
        return 0;
    return j->each(j->user, j->off, dr_min(j->len, j->size - j->off));
}

static int join(struct joining *j, uint64_t off, uint64_t len)
{
    if (j->len && j->off + j->len == off) {
        j->len += len;
        return 0;
    }
    int r = tell(j);
    j->off = off;
    j->len = len;
    return r;
}

static int join_page(struct joining *j, const struct dr_marks *m, size_t n,
                     const _Atomic uint8_t *page)
{
    uint64_t first = n * (uint64_t)DR_MARKS_PAGE_BITS;
    int r = 0;
    for (uint64_t i = 0, from; r == 0 && i < DR_MARKS_PAGE_BITS; i++) {
        if (i % 8 == 0 && !page[i / 8]) {
            i += 7;
            continue;
        }
        for (from = i; i < DR_MARKS_PAGE_BITS && page[i / 8] >> i % 8 & 1; i++)
            ;
        if (i > from)
            r = join(j, (first + from) << m->bits, (i - from) << m->bits);
    }
    return r;
}

int dr_marks_each(const struct dr_marks *m, uint64_t size,
                  int (*each)(void *user, uint64_t off, uint64_t len), void *user)
{
    struct joining j = {.size = size, .each = each, .user = user};
    uint64_t whole = (uint64_t)DR_MARKS_PAGE_BITS << m->bits;
    int r = 0;
    if (atomic_load(&m->all))
        return size ? each(user, 0, size) : 0;
    for (size_t i = 0; r == 0 && i < m->n_pages; i++) {
        const _Atomic uint8_t *bits;
        enum dr_marks_kind kind = dr_marks_page(m, i, &bits);
        if (kind == DR_MARKS_WHOLE)
            r = join(&j, i * whole, whole);
        else if (kind == DR_MARKS_SOME)
            r = join_page(&j, m, i, bits);
    }
    return r ? r : tell(&j);
}
