/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a disk must hold, kept in memory, and for each sector which values a cut may leave. */
#ifndef DROVER_TESTS_SHADOW_H
#define DROVER_TESTS_SHADOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SHADOW_SECTOR 512u

/* Repeatable random numbers. */
struct rnd {
    uint64_t state;
};
uint64_t rnd_next(struct rnd *r);
uint64_t rnd_below(struct rnd *r, uint64_t n); /* n > 0 */
void rnd_fill(struct rnd *r, void *buf, size_t len);

struct shadow_set {
    uint64_t *values;
    unsigned n, cap;
};

struct shadow {
    uint64_t size;
    uint8_t *now;            /* what a read gives */
    struct shadow_set *sets; /* a sector each: what it may be after a cut (hashes) */
};

void shadow_init(struct shadow *s, uint64_t size);
void shadow_free(struct shadow *s);

/* The disk has changed, or is about to. */
void shadow_write(struct shadow *s, uint64_t off, const void *buf, uint64_t len);
void shadow_zero(struct shadow *s, uint64_t off, uint64_t len);
/* It may become this at any time now; it has not yet. */
void shadow_may(struct shadow *s, uint64_t off, const void *buf, uint64_t len);
/* All of it is durable. */
void shadow_flushed(struct shadow *s);
/* In [off, off+len) the disk reads as buf, and that is one of the values it may have. False: no. */
bool shadow_settle(struct shadow *s, uint64_t off, const void *buf, uint64_t len, uint64_t *bad);

/* Is this whole disk exactly / within what is allowed? Else *bad is the first wrong byte/sector. */
bool shadow_same(const struct shadow *s, const void *disk, uint64_t *bad);
bool shadow_allows(const struct shadow *s, const void *disk, uint64_t *bad);

/* The changes of a run in order, for cuts at any point of it. */
struct shadow_event {
    uint64_t start, end; /* positions in the storage's record before and after */
    bool flush;
    uint64_t first, n; /* sectors */
    uint64_t *hashes;
};
struct shadow_log {
    struct shadow_event *events;
    size_t n, cap;
};
/* Note what s->now holds in [off, off+len) as what the event left there. */
void shadow_log_add(struct shadow_log *log, const struct shadow *s, uint64_t off, uint64_t len,
                    bool flush, uint64_t start, uint64_t end);
void shadow_log_free(struct shadow_log *log);
/* What the event left there is allowed too / is all that is allowed. */
void shadow_allow(struct shadow *s, const struct shadow_event *e, bool only);

/* Walks along the log: after shadow_walk_to(w, k), w->sets is what a cut after k records may leave.
 * k only grows. */
struct shadow_walk {
    const struct shadow_log *log;
    struct shadow *s; /* its sets only */
    uint64_t *latest; /* a hash a sector */
    size_t started, ended;
};
/* initial: the state before the first event (its `now` and sets). */
void shadow_walk_init(struct shadow_walk *w, const struct shadow_log *log, struct shadow *initial);
void shadow_walk_to(struct shadow_walk *w, uint64_t k);
void shadow_walk_free(struct shadow_walk *w);

#endif
