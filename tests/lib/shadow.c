/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "shadow.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"

uint64_t rnd_next(struct rnd *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t rnd_below(struct rnd *r, uint64_t n)
{
    return rnd_next(r) % n;
}

void rnd_fill(struct rnd *r, void *buf, size_t len)
{
    uint8_t *p = buf;
    for (; len;) {
        uint64_t v = rnd_next(r);
        size_t n = len < 8 ? len : 8;
        memcpy(p, &v, n);
        p += n;
        len -= n;
    }
}

static void *must(void *p)
{
    if (!p)
        abort();
    return p;
}

static uint64_t sectors(const struct shadow *s)
{
    return dr_div_up(s->size, SHADOW_SECTOR);
}

/* The last sector of an odd size is shorter. */
static uint64_t sector_hash(const struct shadow *s, const uint8_t *disk, uint64_t i)
{
    uint64_t at = i * SHADOW_SECTOR;
    return XXH3_64bits(disk + at, dr_min(SHADOW_SECTOR, s->size - at));
}

static void set_add(struct shadow_set *set, uint64_t v)
{
    for (unsigned i = 0; i < set->n; i++)
        if (set->values[i] == v)
            return;
    if (set->n == set->cap) {
        set->cap = set->cap ? set->cap * 2 : 2;
        set->values = must(realloc(set->values, set->cap * sizeof(v)));
    }
    set->values[set->n++] = v;
}

static bool set_has(const struct shadow_set *set, uint64_t v)
{
    for (unsigned i = 0; i < set->n; i++)
        if (set->values[i] == v)
            return true;
    return false;
}

static void set_only(struct shadow_set *set, uint64_t v)
{
    set->n = 0;
    set_add(set, v);
}

void shadow_init(struct shadow *s, uint64_t size)
{
    s->size = size;
    s->now = must(calloc(1, size + 1));
    s->sets = must(calloc(sectors(s) + 1, sizeof(*s->sets)));
    shadow_flushed(s);
}

void shadow_free(struct shadow *s)
{
    for (uint64_t i = 0; s->sets && i < sectors(s); i++)
        free(s->sets[i].values);
    free(s->sets);
    free(s->now);
    *s = (struct shadow){0};
}

static void shadow_touched(struct shadow *s, uint64_t off, uint64_t len)
{
    for (uint64_t i = off / SHADOW_SECTOR; len && i * SHADOW_SECTOR < off + len; i++)
        set_add(&s->sets[i], sector_hash(s, s->now, i));
}

void shadow_write(struct shadow *s, uint64_t off, const void *buf, uint64_t len)
{
    memcpy(s->now + off, buf, len);
    shadow_touched(s, off, len);
}

void shadow_zero(struct shadow *s, uint64_t off, uint64_t len)
{
    memset(s->now + off, 0, len);
    shadow_touched(s, off, len);
}

void shadow_may(struct shadow *s, uint64_t off, const void *buf, uint64_t len)
{
    uint8_t *old = must(malloc(len + 1));
    memcpy(old, s->now + off, len);
    shadow_write(s, off, buf, len);
    memcpy(s->now + off, old, len);
    free(old);
}

void shadow_flushed(struct shadow *s)
{
    for (uint64_t i = 0; i < sectors(s); i++)
        set_only(&s->sets[i], sector_hash(s, s->now, i));
}

bool shadow_settle(struct shadow *s, uint64_t off, const void *buf, uint64_t len, uint64_t *bad)
{
    memcpy(s->now + off, buf, len);
    for (uint64_t i = off / SHADOW_SECTOR; len && i * SHADOW_SECTOR < off + len; i++)
        if (!set_has(&s->sets[i], sector_hash(s, s->now, i))) {
            *bad = i * SHADOW_SECTOR;
            return false;
        }
    return true;
}

bool shadow_same(const struct shadow *s, const void *disk, uint64_t *bad)
{
    const uint8_t *d = disk;
    if (!memcmp(s->now, d, s->size))
        return true;
    for (*bad = 0; s->now[*bad] == d[*bad];)
        ++*bad;
    return false;
}

bool shadow_allows(const struct shadow *s, const void *disk, uint64_t *bad)
{
    for (uint64_t i = 0; i < sectors(s); i++)
        if (!set_has(&s->sets[i], sector_hash(s, disk, i))) {
            *bad = i * SHADOW_SECTOR;
            return false;
        }
    return true;
}

/* ------------------------------------------------------------------ cuts */

void shadow_log_add(struct shadow_log *log, const struct shadow *s, uint64_t off, uint64_t len,
                    bool flush, uint64_t start, uint64_t end)
{
    if (log->n == log->cap) {
        log->cap = log->cap ? log->cap * 2 : 64;
        log->events = must(realloc(log->events, log->cap * sizeof(*log->events)));
    }
    struct shadow_event *e = &log->events[log->n++];
    *e = (struct shadow_event){.start = start, .end = end, .flush = flush};
    if (!len)
        return;
    e->first = off / SHADOW_SECTOR;
    e->n = dr_div_up(off + len, SHADOW_SECTOR) - e->first;
    e->hashes = must(malloc(e->n * sizeof(uint64_t)));
    for (uint64_t i = 0; i < e->n; i++)
        e->hashes[i] = sector_hash(s, s->now, e->first + i);
}

void shadow_log_free(struct shadow_log *log)
{
    for (size_t i = 0; i < log->n; i++)
        free(log->events[i].hashes);
    free(log->events);
    *log = (struct shadow_log){0};
}

void shadow_allow(struct shadow *s, const struct shadow_event *e, bool only)
{
    for (uint64_t i = 0; i < e->n; i++)
        if (only)
            set_only(&s->sets[e->first + i], e->hashes[i]);
        else
            set_add(&s->sets[e->first + i], e->hashes[i]);
}

void shadow_walk_init(struct shadow_walk *w, const struct shadow_log *log, struct shadow *initial)
{
    *w = (struct shadow_walk){.log = log, .s = initial};
    w->latest = must(malloc((sectors(initial) + 1) * sizeof(uint64_t)));
    for (uint64_t i = 0; i < sectors(initial); i++)
        w->latest[i] = sector_hash(initial, initial->now, i);
}

static void walk_start(struct shadow_walk *w, const struct shadow_event *e)
{
    for (uint64_t i = 0; i < e->n; i++) {
        set_add(&w->s->sets[e->first + i], e->hashes[i]);
        w->latest[e->first + i] = e->hashes[i];
    }
}

static void walk_end(struct shadow_walk *w, const struct shadow_event *e)
{
    for (uint64_t i = 0; e->flush && i < sectors(w->s); i++)
        set_only(&w->s->sets[i], w->latest[i]);
}

void shadow_walk_to(struct shadow_walk *w, uint64_t k)
{
    for (;;) { /* events come one after another: each ends before the next starts */
        const struct shadow_event *e = &w->log->events[w->ended];
        if (w->ended == w->log->n)
            return;
        if (w->started == w->ended) {
            if (e->start >= k && e->end > k)
                return;
            walk_start(w, e);
            w->started++;
        }
        if (e->end > k)
            return;
        walk_end(w, e);
        w->ended++;
    }
}

void shadow_walk_free(struct shadow_walk *w)
{
    free(w->latest);
    *w = (struct shadow_walk){0};
}
