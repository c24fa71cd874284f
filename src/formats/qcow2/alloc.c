/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Counts of the file's clusters: finding free ones, raising and lowering.
 *
 * A cluster that is handed out has its count raised at once, and a cancel lowers it again: nothing
 * on disk ever pointed to it. Counts of what was in use go down only in release and reuse
 * (invariant 5). They stay pinned from reserve until then. */
#include "formats/qcow2/compact.h"

#include <stdarg.h>
#include <stdio.h>

#define READ_AHEAD UINT64_C(65536) /* bytes of counts, looking for a free one */

/* ------------------------------------------------------------------ counts in a block */

uint64_t qcow2_count_get(unsigned order, const uint8_t *block, uint64_t i)
{
    switch (order) {
    case 6:
        return get_be64(block + i * 8);
    case 5:
        return get_be32(block + i * 4);
    case 4:
        return get_be16(block + i * 2);
    case 3:
        return block[i];
    default: { /* several in a byte, the first in the lowest bits */
        unsigned bits = 1u << order, per = 8 / bits;
        return block[i / per] >> (i % per * bits) & ((1u << bits) - 1);
    }
    }
}

void qcow2_count_put(unsigned order, uint8_t *block, uint64_t i, uint64_t count)
{
    switch (order) {
    case 6:
        put_be64(block + i * 8, count);
        break;
    case 5:
        put_be32(block + i * 4, (uint32_t)count);
        break;
    case 4:
        put_be16(block + i * 2, (uint16_t)count);
        break;
    case 3:
        block[i] = (uint8_t)count;
        break;
    default: {
        unsigned bits = 1u << order, per = 8 / bits, shift = (unsigned)(i % per) * bits;
        uint8_t mask = (uint8_t)(((1u << bits) - 1) << shift);
        block[i / per] = (uint8_t)((block[i / per] & ~mask) | (count << shift & mask));
    }
    }
}

uint64_t qcow2_block_entries(const struct qcow2 *q)
{
    return q->cluster * 8 >> q->h.refcount_order;
}

uint64_t qcow2_max_count(const struct qcow2 *q)
{
    return q->h.refcount_order == 6 ? UINT64_MAX : (UINT64_C(1) << (1u << q->h.refcount_order)) - 1;
}

static size_t count_bytes(const struct qcow2 *q)
{
    return q->h.refcount_order < 3 ? 1 : (size_t)1 << (q->h.refcount_order - 3);
}

/* Where the count of the i-th cluster of the file stands; 0 = it has no block. */
static uint64_t count_place(const struct qcow2 *q, uint64_t i)
{
    uint64_t n = qcow2_block_entries(q), block = i / n;
    if (block >= q->reftable_n || !q->reftable[block])
        return 0;
    return q->reftable[block] + (i % n << q->h.refcount_order) / 8;
}

/* The place of the i-th count inside the byte or word at count_place. */
static unsigned count_index(const struct qcow2 *q, uint64_t i)
{
    return q->h.refcount_order < 3 ? (unsigned)(i % (8u >> q->h.refcount_order)) : 0;
}

static int count_of(struct dr_image *image, uint64_t i, uint64_t *count)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = count_place(q, i);
    struct dr_page *page;
    *count = 0;
    int r = at ? dr_page_get(image, 0, at, &page) : 0;
    if (r == 0 && at)
        *count = qcow2_count_get(q->h.refcount_order, dr_page_at(page, at), count_index(q, i));
    return r;
}

int qcow2_count(struct dr_image *image, uint64_t host, uint64_t *count)
{
    return count_of(image, host / qcow2_of(image)->cluster, count);
}

/* ------------------------------------------------------------------ pins */

/* The page of a pinned range: it is in memory. */
static struct dr_page *pinned_page(struct dr_image *image, uint64_t at)
{
    struct dr_page *page = NULL;
    int r = dr_page_get(image, 0, at, &page);
    (void)r;
    return page;
}

void qcow2_unpin_counts(struct dr_image *image, uint64_t host, uint64_t len)
{
    const struct qcow2 *q = qcow2_of(image);
    for (uint64_t i = host / q->cluster; i * q->cluster < host + len; i++) {
        uint64_t at = count_place(q, i);
        dr_page_unpin(image, pinned_page(image, at), at, count_bytes(q));
    }
}

/* Something that is in use: it has a block and a count. */
static int pin_count(struct dr_image *image, uint64_t i)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = count_place(q, i), count = 0;
    struct dr_page *page = NULL;
    int r = count_of(image, i, &count);
    if (r == 0 && count == 0)
        return qcow2_damage(image, "the cluster at byte %llu is in use and counted as free",
                            ULL(i * q->cluster));
    if (r == 0)
        r = dr_page_get(image, 0, at, &page);
    return r < 0 ? r : dr_page_pin(image, page, at, count_bytes(q), QCOW2_LEVEL_BLOCK);
}

int qcow2_pin_counts(struct dr_image *image, uint64_t host, uint64_t len)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t first = host / q->cluster;
    for (uint64_t i = first; i * q->cluster < host + len; i++) {
        int r = pin_count(image, i);
        if (r < 0) {
            if (i > first)
                qcow2_unpin_counts(image, first * q->cluster, (i - first) * q->cluster);
            return r;
        }
    }
    return 0;
}

int qcow2_reserve_counts(struct dr_image *image, struct dr_reservation *r, uint64_t host,
                         uint64_t len)
{
    const struct qcow2 *q = qcow2_of(image);
    for (uint64_t i = host / q->cluster; i * q->cluster < host + len; i++) {
        struct dr_page *page;
        uint64_t at = count_place(q, i);
        if (!at)
            return qcow2_damage(image, "the cluster at byte %llu is in use and has no count",
                                ULL(i * q->cluster));
        int rc = dr_reserve_page(image, r, 0, at, count_bytes(q), QCOW2_LEVEL_BLOCK, &page);
        if (rc < 0)
            return rc;
    }
    return 0;
}

void qcow2_add(struct dr_image *image, uint64_t host, uint64_t len, int diff)
{
    const struct qcow2 *q = qcow2_of(image);
    for (uint64_t i = host / q->cluster; i * q->cluster < host + len; i++) {
        uint64_t at = count_place(q, i), count;
        struct dr_page *page = pinned_page(image, at);
        uint8_t raw[8];
        memcpy(raw, dr_page_at(page, at), count_bytes(q));
        count = qcow2_count_get(q->h.refcount_order, raw, count_index(q, i));
        qcow2_count_put(q->h.refcount_order, raw, count_index(q, i), count + (uint64_t)diff);
        dr_page_put(image, page, at, raw, count_bytes(q));
    }
}

/* The i-th count and those behind it that stand in the same page and the same block. */
static uint64_t counts_in_page(const struct qcow2 *q, uint64_t i, uint64_t at)
{
    uint64_t bits = (DR_PAGE_SIZE - at % DR_PAGE_SIZE) * 8, per = qcow2_block_entries(q);
    return dr_min((bits >> q->h.refcount_order) - count_index(q, i), per - i % per);
}

int qcow2_shift_counts(struct dr_image *image, uint64_t i, uint64_t n, int diff,
                       enum qcow2_shift how, uint64_t *done)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = count_place(q, i), max = qcow2_max_count(q), count = 0;
    unsigned order = q->h.refcount_order, first = count_index(q, i);
    uint8_t raw[DR_PAGE_SIZE];
    struct dr_page *page;
    *done = 0;
    if (!at)
        return qcow2_damage(image, "the cluster at byte %llu is in use and has no count",
                            ULL(i * q->cluster));
    int r = dr_page_get(image, 0, at, &page);
    if (r < 0)
        return r;
    n = dr_min(n, counts_in_page(q, i, at));
    size_t len = (size_t)dr_div_up((first + n) << order, 8);
    memcpy(raw, dr_page_at(page, at), len);
    for (; *done < n; ++*done) {
        count = qcow2_count_get(order, raw, first + *done);
        if (count == 0 || (diff > 0 && count == max) ||
            (diff < 0 && count == 1 && how != QCOW2_SHIFT_TO_ZERO))
            break;
        qcow2_count_put(order, raw, first + *done, count + (uint64_t)diff);
    }
    if (*done == 0 && count == 0)
        return qcow2_damage(image, "the cluster at byte %llu is in use and counted as free",
                            ULL(i * q->cluster));
    if (*done == 0)
        return diff > 0 ? -EOVERFLOW : 0;
    if (how == QCOW2_SHIFT_LOOK || diff == 0)
        return 0;
    r = dr_page_pin(image, page, at, len, QCOW2_LEVEL_BLOCK);
    if (r < 0)
        return r;
    dr_page_put(image, page, at, raw, len);
    dr_page_unpin(image, page, at, len);
    return 0;
}

int qcow2_revive_counts(struct dr_image *image, uint64_t i, uint64_t n, uint64_t *done,
                        bool *revived)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = count_place(q, i), count, pinned = 0;
    struct dr_page *page;
    *done = 0;
    if (!at)
        return qcow2_damage(image, "the cluster at byte %llu is in use and has no count",
                            ULL(i * q->cluster));
    n = dr_min(n, counts_in_page(q, i, at));
    int r = count_of(image, i, &count);
    *revived = count == 0;
    while (r == 0 && (count == 0) == *revived && ++*done < n)
        r = count_of(image, i + *done, &count);
    if (r < 0 || !*revived)
        return r;
    for (; r == 0 && pinned < *done; pinned++) {
        at = count_place(q, i + pinned);
        r = dr_page_get(image, 0, at, &page);
        if (r == 0)
            r = dr_page_pin(image, page, at, count_bytes(q), QCOW2_LEVEL_BLOCK);
    }
    if (r < 0 && pinned > 1)
        qcow2_unpin_counts(image, i * q->cluster, (pinned - 1) * q->cluster);
    if (r == 0)
        qcow2_add(image, i * q->cluster, *done * q->cluster, 1);
    return r;
}

int qcow2_count_sole(struct dr_image *image, uint64_t i, uint64_t n, uint64_t *sole)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t at = count_place(q, i), count;
    n = at ? dr_min(n, counts_in_page(q, i, at)) : 0;
    for (*sole = 0; *sole < n; ++*sole) {
        int r = count_of(image, i + *sole, &count);
        if (r < 0 || count != 1)
            return r;
    }
    return 0;
}

/* ------------------------------------------------------------------ free clusters */

static void drop_oldest_free(struct qcow2 *q)
{
    q->cursor = dr_min(q->cursor, q->free[0].first);
    memmove(q->free, q->free + 1, --q->n_free * sizeof(q->free[0]));
}

void qcow2_note_free(struct qcow2 *q, uint64_t host, uint64_t len)
{
    uint64_t first = host / q->cluster, n = dr_div_up(len, q->cluster);
    struct qcow2_free *last = q->n_free ? &q->free[q->n_free - 1] : NULL;
    if (first >= q->cursor)
        return;
    if (last && last->first + last->n == first) {
        last->n += n;
        return;
    }
    if (q->n_free == QCOW2_FREE_RANGES)
        drop_oldest_free(q);
    q->free[q->n_free++] = (struct qcow2_free){first, n};
}

/* How many blocks a run of n clusters behind them needs, the first for the clusters from
 * block * qcow2_block_entries on. 1 if the next ones exist already: the run does not fit then. */
static uint64_t blocks_for(const struct qcow2 *q, uint64_t block, uint64_t n)
{
    uint64_t per = qcow2_block_entries(q), n_blocks = 1;
    while (n_blocks * per < n_blocks + n)
        n_blocks++;
    for (uint64_t i = 1; i < n_blocks; i++)
        if (block + i < q->reftable_n && q->reftable[block + i])
            return 1;
    return n_blocks;
}

/* Zeros for a block, kept in memory by r. */
static int block_pages(struct dr_image *image, uint64_t host, struct dr_reservation *r)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t step = dr_min(q->cluster, DR_PAGE_SIZE);
    for (uint64_t at = host; at < host + q->cluster; at += step) {
        struct dr_page *page;
        int rc = dr_page_new(image, 0, at, (size_t)step, QCOW2_LEVEL_BLOCK, &page);
        if (rc < 0)
            return rc;
        rc = dr_reserve_page(image, r, 0, at, (size_t)step, QCOW2_LEVEL_BLOCK, &page);
        dr_page_unpin(image, page, at, (size_t)step);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void put_root(struct dr_image *image, uint64_t block, uint64_t host)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t at = q->h.reftable_at + 8 * block;
    uint8_t raw[8];
    put_be64(raw, host);
    dr_page_put(image, pinned_page(image, at), at, raw, sizeof(raw));
    q->reftable[block] = host;
    qcow2_guard(q, host);
}

/* Does [host, host + len) end behind the end of a device, which does not grow? */
static bool device_lacks(const struct dr_image *image, uint64_t host, uint64_t len)
{
    const struct dr_file *f = image->files[0];
    return f->block_device && host + len > dr_file_size(f);
}

static int device_full(const struct dr_image *image, struct dr_error *err)
{
    return dr_fail(err, ENOSPC, "%s: the device is full: all its %llu bytes are in use",
                   image->path, ULL(dr_file_size(image->files[0])));
}

/* Blocks for the counts of clusters that have none yet, in a row, so that a run of n clusters fits
 * behind them. They take the first of these clusters, which nothing can be using. Harmless if
 * nothing is allocated afterwards. */
static int new_blocks(struct dr_image *image, uint64_t block, uint64_t n, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct dr_reservation pins = {0};
    struct dr_page *page;
    uint64_t host = block * qcow2_block_entries(q) * q->cluster;
    uint64_t n_blocks = blocks_for(q, block, n);
    const char *taken = qcow2_guarded(q, host, n_blocks * q->cluster);
    if (taken)
        return qcow2_damage(image, "%s at byte %llu or behind it is counted as free", taken,
                            ULL(host));
    if (device_lacks(image, host, n_blocks * q->cluster))
        return device_full(image, err);
    q->reftable_full |= block + n_blocks > q->reftable_n;
    if (q->reftable_full || q->reftable_moving)
        return dr_need_begin(image);
    int r = 0;
    for (uint64_t i = 0; r == 0 && i < n_blocks; i++) {
        r = dr_reserve_page(image, &pins, 0, q->h.reftable_at + 8 * (block + i), 8,
                            QCOW2_LEVEL_ROOT, &page);
        if (r == 0)
            r = block_pages(image, host + i * q->cluster, &pins);
    }
    for (uint64_t i = 0; r == 0 && i < n_blocks; i++)
        put_root(image, block + i, host + i * q->cluster);
    if (r == 0)
        qcow2_add(image, host, n_blocks * q->cluster, 1);
    dr_reserve_unpin(image, &pins);
    return r;
}

/* Is the cluster free, the first of n perhaps? Makes the blocks for their counts. */
static int is_free(struct dr_image *image, uint64_t i, uint64_t n, bool *yes, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t block = i / qcow2_block_entries(q), count;
    *yes = false;
    if (device_lacks(image, i * q->cluster, q->cluster))
        return device_full(image, err);
    if (block >= q->reftable_n) {
        q->reftable_full = true;
        return dr_need_begin(image);
    }
    int r = q->reftable[block] ? 0 : new_blocks(image, block, n, err);
    if (r == 0 && (r = count_of(image, i, &count)) == -EAGAIN) {
        uint64_t at = count_place(q, i), end = q->reftable[block] + q->cluster;
        r = dr_page_get_all(image, 0, at, dr_min(READ_AHEAD, end - at));
    }
    *yes = r == 0 && count == 0;
    return r;
}

/* One of those that became free lately. */
static int find_freed(struct dr_image *image, bool *found, uint64_t *host, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    *found = false;
    while (q->n_free > 0) {
        struct qcow2_free *last = &q->free[q->n_free - 1];
        int r = is_free(image, last->first, 1, found, err);
        if (r < 0)
            return r;
        if (*found) {
            *host = last->first * q->cluster;
            return 0;
        }
        last->first++; /* taken meanwhile */
        if (--last->n == 0)
            q->n_free--;
    }
    return 0;
}

/* A table counted as free: then any count may be wrong, and what is allocated overwrites data. */
static int check_free(struct dr_image *image, uint64_t host, uint64_t len)
{
    const char *taken = qcow2_guarded(qcow2_of(image), host, len);
    return taken ? qcow2_damage(image, "%s at byte %llu is counted as free", taken, ULL(host)) : 0;
}

int qcow2_find_free(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    bool found = false;
    int r = n == 1 ? find_freed(image, &found, host, err) : 0;
    if (r < 0)
        return r;
    for (uint64_t i = q->cursor, run = 0; !found; i++) {
        bool yes;
        if ((r = is_free(image, i, n, &yes, err)) < 0)
            return r;
        run = yes ? run + 1 : 0;
        if (!yes && q->cursor == i)
            q->cursor = i + 1;
        found = run == n;
        *host = (i + 1 - run) * q->cluster;
    }
    if (*host + n * q->cluster > QCOW2_MAX_OFFSET)
        return dr_fail(err, EFBIG, "%s: a qcow2 file cannot be larger than 2^56 bytes",
                       image->path);
    return check_free(image, *host, n * q->cluster);
}

int qcow2_find_lower(struct dr_image *image, uint64_t *host, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct qcow2_compact *c = q->compact;
    for (; c && c->cursor < c->end; c->cursor++) {
        const struct qcow2_window *w = qcow2_window_of(c, c->cursor);
        bool yes;
        if (w) {
            c->cursor = w->to + w->n - 1;
            continue;
        }
        int r = is_free(image, c->cursor, 1, &yes, err);
        if (r < 0)
            return r;
        *host = c->cursor * q->cluster;
        if (yes)
            return check_free(image, *host, q->cluster);
    }
    return 1;
}

int qcow2_allocate(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    struct dr_reservation pins = {0};
    int r = qcow2_find_free(image, n, host, err);
    if (r == 0)
        r = qcow2_reserve_counts(image, &pins, *host, n * q->cluster);
    if (r == 0)
        qcow2_add(image, *host, n * q->cluster, 1);
    dr_reserve_unpin(image, &pins);
    return r;
}

int qcow2_allocate_at(struct dr_image *image, uint64_t host, uint64_t n)
{
    const struct qcow2 *q = qcow2_of(image);
    struct dr_reservation pins = {0};
    int r = 0;
    for (uint64_t i = host / q->cluster, end = i + n, count; r == 0 && i < end; i++) {
        if (!count_place(q, i))
            return 1;
        r = count_of(image, i, &count);
        if (r == 0 && count)
            return 1;
    }
    if (r == 0)
        r = check_free(image, host, n * q->cluster);
    if (r == 0)
        r = qcow2_reserve_counts(image, &pins, host, n * q->cluster);
    if (r == 0)
        qcow2_add(image, host, n * q->cluster, 1);
    dr_reserve_unpin(image, &pins);
    return r;
}

void qcow2_free_later(struct dr_image *image, uint64_t host, uint64_t len)
{
    dr_free_later(image, (struct dr_freed){image->files[0], host, len});
}

/* Compressed clusters follow each other byte by byte, as long as each host cluster's count has room
 * and the next cluster of the file is free. */
int qcow2_find_packed(struct dr_image *image, uint32_t len, uint64_t times, uint64_t *host)
{
    const struct qcow2 *q = qcow2_of(image);
    uint64_t next = q->coded_next, end = next + len, count;
    if (!next)
        return 1;
    int r = qcow2_count(image, next, &count);
    if (r < 0 || count == 0 || count > qcow2_max_count(q) - times)
        return r < 0 ? r : 1;
    uint64_t second = dr_round_up(next, q->cluster);
    *host = next;
    if (end <= second)
        return 0;
    if (second / q->cluster / qcow2_block_entries(q) != next / q->cluster / qcow2_block_entries(q))
        return 1; /* perhaps it has no block yet */
    if (qcow2_guarded(q, second, q->cluster) || device_lacks(image, second, q->cluster))
        return 1;
    r = qcow2_count(image, second, &count);
    return r < 0 ? r : count != 0;
}

void qcow2_packed_until(struct qcow2 *q, uint64_t end)
{
    q->coded_next = end % q->cluster ? end : 0;
}

/* ------------------------------------------------------------------ freed places */

/* All clusters of a range have as many ways to them. */
void qcow2_release(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone)
{
    struct qcow2 *q = qcow2_of(image);
    uint64_t start = dr_round_down(freed->host, q->cluster), count = 0;
    if (freed->file != image->files[0])
        return;
    count_of(image, start / q->cluster, &count);
    if (count > 1) {
        qcow2_add(image, freed->host, freed->len, -1);
        qcow2_unpin_counts(image, freed->host, freed->len);
        return;
    }
    *gone = (struct dr_freed){freed->file, start,
                              dr_round_up(freed->host + freed->len, q->cluster) - start};
    if (dr_inside(q->coded_next - start, 0, gone->len))
        q->coded_next = 0; /* nothing may be put into what is going to be punched */
}

void qcow2_reuse(struct dr_image *image, const struct dr_freed *gone)
{
    struct qcow2 *q = qcow2_of(image);
    qcow2_add(image, gone->host, gone->len, -1);
    qcow2_unpin_counts(image, gone->host, gone->len);
    qcow2_unguard(q, gone->host, gone->len);
    qcow2_note_free(q, gone->host, gone->len);
}

/* ------------------------------------------------------------------ damage */

int qcow2_damage(struct dr_image *image, const char *fmt, ...)
{
    struct qcow2 *q = qcow2_of(image);
    va_list ap;
    va_start(ap, fmt);
    if (!q->damage && vasprintf(&q->damage, fmt, ap) < 0)
        q->damage = NULL;
    va_end(ap);
    return q->damage ? dr_need_begin(image) : -ENOMEM;
}

int qcow2_refuse_damaged(struct dr_image *image, struct dr_error *err)
{
    const char *damage = qcow2_of(image)->damage;
    return dr_fail(err, EIO,
                   "%s: is damaged, nothing more is written to it: %s; `drover check -r all` mends "
                   "it",
                   image->path, damage ? damage : "a switch of its header failed");
}
