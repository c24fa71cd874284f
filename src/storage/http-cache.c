/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Small reads of a file on an HTTP server: a cache of blocks, and threads that read ahead for
 * readers that go from one block to the next. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/thread.h"
#include "storage/http.h"

#define BLOCK        ((size_t)256 << 10)
#define BLOCKS       64u /* in memory */
#define RUN          4u  /* blocks that are read ahead by one request */
#define AHEAD        16u /* blocks in front of the reader */
#define THREADS      4u
#define STEPS_BEFORE 2u /* from one block to the next, before anything is read ahead */

enum block_state { BLOCK_EMPTY, BLOCK_LOADING, BLOCK_READY };

struct block {
    enum block_state state;
    uint64_t index, used; /* used: when, by the cache's count of uses */
    uint8_t *bytes;       /* BLOCK of them, or NULL: never used yet */
};

struct http_cache {
    struct http_file *file;
    pthread_mutex_t lock; /* all below */
    pthread_cond_t loaded, wanted;
    struct block blocks[BLOCKS];
    uint64_t uses;
    uint64_t last; /* block that was read last */
    unsigned steps;
    uint64_t ahead, ahead_end; /* blocks to be read ahead */
    pthread_t threads[THREADS];
    unsigned n_threads;
    bool stop;
};

/* ------------------------------------------------------------------ blocks; under the lock */

static struct block *find(struct http_cache *c, uint64_t index)
{
    for (size_t i = 0; i < BLOCKS; i++)
        if (c->blocks[i].state != BLOCK_EMPTY && c->blocks[i].index == index)
            return &c->blocks[i];
    return NULL;
}

/* A block that becomes this one, being loaded; NULL: all are, or there is no memory. */
static struct block *claim(struct http_cache *c, uint64_t index)
{
    struct block *oldest = NULL;
    for (size_t i = 0; i < BLOCKS; i++) {
        struct block *b = &c->blocks[i];
        if (b->state != BLOCK_LOADING && (!oldest || b->state < oldest->state ||
                                          (b->state == oldest->state && b->used < oldest->used)))
            oldest = b;
    }
    if (!oldest || (!oldest->bytes && !(oldest->bytes = malloc(BLOCK))))
        return NULL;
    oldest->state = BLOCK_LOADING;
    oldest->index = index;
    oldest->used = ++c->uses;
    return oldest;
}

static size_t block_bytes(const struct http_cache *c, uint64_t index)
{
    return (size_t)dr_min(BLOCK, c->file->version.size - index * BLOCK);
}

/* ------------------------------------------------------------------ reading ahead */

/* The next blocks that nobody has, in a row; under the lock. */
static size_t claim_run(struct http_cache *c, struct block **run)
{
    size_t n = 0;
    while (c->ahead < c->ahead_end && n == 0) {
        while (c->ahead < c->ahead_end && n < RUN && !find(c, c->ahead) &&
               (run[n] = claim(c, c->ahead))) {
            n++;
            c->ahead++;
        }
        if (n == 0)
            c->ahead++;
    }
    return n;
}

static void load_run(struct http_cache *c, struct block **run, size_t n, uint8_t *buf)
{
    uint64_t from = run[0]->index;
    size_t len = (n - 1) * BLOCK + block_bytes(c, from + n - 1);
    int r = http_fetch(c->file, buf, from * BLOCK, len);
    for (size_t i = 0; r == 0 && i < n; i++)
        memcpy(run[i]->bytes, buf + i * BLOCK, block_bytes(c, from + i));
    DR_LOCK_SCOPE(&c->lock);
    for (size_t i = 0; i < n; i++)
        run[i]->state = r == 0 ? BLOCK_READY : BLOCK_EMPTY;
    pthread_cond_broadcast(&c->loaded);
}

static void *run_ahead(void *user)
{
    struct http_cache *c = user;
    CLEANUP_FREE uint8_t *buf = malloc(RUN * BLOCK);
    struct block *run[RUN];
    while (buf) {
        pthread_mutex_lock(&c->lock);
        while (!c->stop && c->ahead >= c->ahead_end)
            pthread_cond_wait(&c->wanted, &c->lock);
        bool stop = c->stop;
        size_t n = stop ? 0 : claim_run(c, run);
        pthread_mutex_unlock(&c->lock);
        if (stop)
            break;
        if (n > 0)
            load_run(c, run, n, buf);
    }
    return NULL;
}

/* Tell the threads what comes next; under the lock. */
static void look_ahead(struct http_cache *c, uint64_t index)
{
    uint64_t end = (c->file->version.size + BLOCK - 1) / BLOCK;
    if (index == c->last)
        return;
    c->steps = index == c->last + 1 ? c->steps + 1 : 0;
    c->last = index;
    if (c->steps < STEPS_BEFORE)
        return;
    uint64_t to = dr_min(index + 1 + AHEAD, end);
    if (c->ahead <= index || c->ahead > to)
        c->ahead = index + 1;
    if (to < end && to - c->ahead < RUN)
        return; /* a request of one block is not worth while */
    c->ahead_end = to;
    while (c->n_threads < THREADS && dr_thread_start(&c->threads[c->n_threads], run_ahead, c) == 0)
        c->n_threads++;
    pthread_cond_broadcast(&c->wanted);
}

/* ------------------------------------------------------------------ reading */

/* The block is in memory afterwards: *b; NULL: there is no place for it. Under the lock, which is
 * given up meanwhile. */
static int get_block(struct http_cache *c, uint64_t index, struct block **b)
{
    while ((*b = find(c, index)) && (*b)->state == BLOCK_LOADING)
        pthread_cond_wait(&c->loaded, &c->lock);
    if (*b || !(*b = claim(c, index)))
        return 0;
    struct block *mine = *b;
    pthread_mutex_unlock(&c->lock);
    int r = http_fetch(c->file, mine->bytes, index * BLOCK, block_bytes(c, index));
    pthread_mutex_lock(&c->lock);
    mine->state = r == 0 ? BLOCK_READY : BLOCK_EMPTY;
    pthread_cond_broadcast(&c->loaded);
    return r;
}

static int read_in_block(struct http_cache *c, uint8_t *buf, uint64_t off, size_t len)
{
    struct block *b;
    {
        DR_LOCK_SCOPE(&c->lock);
        look_ahead(c, off / BLOCK);
        int r = get_block(c, off / BLOCK, &b);
        if (r < 0)
            return r;
        if (b) {
            b->used = ++c->uses;
            memcpy(buf, b->bytes + off % BLOCK, len);
            return 0;
        }
    }
    return http_fetch(c->file, buf, off, len);
}

int http_cache_read(struct http_cache *c, uint8_t *buf, uint64_t off, size_t len)
{
    int r = 0;
    for (size_t n; r == 0 && len > 0; buf += n, off += n, len -= n) {
        n = dr_min(len, BLOCK - off % BLOCK);
        r = read_in_block(c, buf, off, n);
    }
    return r;
}

/* ------------------------------------------------------------------ begin and end */

struct http_cache *http_cache_new(struct http_file *f)
{
    struct http_cache *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    c->file = f;
    c->last = UINT64_MAX - 1;
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->loaded, NULL);
    pthread_cond_init(&c->wanted, NULL);
    return c;
}

void http_cache_free(struct http_cache *c)
{
    if (!c)
        return;
    pthread_mutex_lock(&c->lock);
    c->stop = true;
    pthread_cond_broadcast(&c->wanted);
    pthread_mutex_unlock(&c->lock);
    for (unsigned i = 0; i < c->n_threads; i++)
        pthread_join(c->threads[i], NULL);
    for (size_t i = 0; i < BLOCKS; i++)
        free(c->blocks[i].bytes);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->loaded);
    pthread_cond_destroy(&c->wanted);
    free(c);
}
