/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file of an HTTP server that knows no ranges: it is downloaded from front to back by a thread,
 * which stays a little ahead of the readers, into a window in memory. A reader that goes back
 * behind the window, and a connection that was lost, begin the download again. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/thread.h"
#include "storage/http.h"

#define WINDOW       ((size_t)32 << 20)
#define IN_FRONT     (WINDOW / 2) /* of the furthest reader */
#define RESTARTS_MAX 8u           /* because of readers that go back */

struct http_stream {
    struct http_file *file;
    pthread_t thread;
    bool started;
    pthread_mutex_t lock; /* all below */
    pthread_cond_t moved, wanted;
    uint8_t *window; /* the last WINDOW bytes before pos: that at offset i is at i % WINDOW */
    uint64_t pos, want;
    uint64_t skip; /* bytes of the present download that came already */
    unsigned restarts;
    bool again, stop;
    int failed;
};

/* ------------------------------------------------------------------ the download */

/* Keep n bytes; under the lock, which is given up while there is no room. False: end the download.
 */
static bool keep(struct http_stream *s, const char *bytes, size_t n)
{
    while (n > 0) {
        while (!s->stop && !s->again && s->pos >= s->want + IN_FRONT)
            pthread_cond_wait(&s->wanted, &s->lock);
        if (s->stop || s->again || s->pos >= s->file->version.size)
            return false;
        size_t at = (size_t)(s->pos % WINDOW);
        size_t fits = dr_min(dr_min(n, WINDOW - at), s->want + IN_FRONT - s->pos);
        fits = (size_t)dr_min(fits, s->file->version.size - s->pos);
        memcpy(s->window + at, bytes, fits);
        s->pos += fits;
        bytes += fits;
        n -= fits;
        pthread_cond_broadcast(&s->moved);
    }
    return true;
}

static bool take(void *user, const char *bytes, size_t n)
{
    struct http_stream *s = user;
    DR_LOCK_SCOPE(&s->lock);
    size_t known = (size_t)dr_min(n, s->skip);
    s->skip -= known;
    return keep(s, bytes + known, n - known) && !s->stop && !s->again;
}

/* 0: all has come, or somebody wants it from the beginning. */
static int download(struct http_stream *s)
{
    uint64_t since = http_seconds();
    for (unsigned failures = 0;;) {
        pthread_mutex_lock(&s->lock);
        uint64_t before = s->skip = s->pos;
        pthread_mutex_unlock(&s->lock);
        struct http_answer a = {.file = s->file, .take = take, .user = s};
        int r = http_ask(&a);
        if (r < 0)
            return r;
        pthread_mutex_lock(&s->lock);
        bool done = s->stop || s->again || s->pos == s->file->version.size;
        bool went_on = s->pos > before;
        pthread_mutex_unlock(&s->lock);
        if (done)
            return 0;
        if (went_on) {
            failures = 0;
            since = http_seconds();
        } else if (!http_may_retry(s->file, failures++, since)) {
            return -ENOTCONN;
        }
    }
}

/* Wait until the file is wanted from the beginning; false: never again. */
static bool wait_for_readers(struct http_stream *s)
{
    DR_LOCK_SCOPE(&s->lock);
    while (!s->again && !s->stop)
        pthread_cond_wait(&s->wanted, &s->lock);
    if (s->again) {
        s->again = false;
        s->pos = s->want = 0;
        s->failed = 0;
    }
    return !s->stop;
}

static void *run(void *user)
{
    struct http_stream *s = user;
    do {
        int r = download(s);
        DR_LOCK_SCOPE(&s->lock);
        s->failed = r;
        pthread_cond_broadcast(&s->moved);
    } while (wait_for_readers(s));
    return NULL;
}

/* ------------------------------------------------------------------ readers */

static void copy_out(const struct http_stream *s, uint8_t *buf, uint64_t off, size_t len)
{
    size_t at = (size_t)(off % WINDOW), n = dr_min(len, WINDOW - at);
    memcpy(buf, s->window + at, n);
    memcpy(buf + n, s->window, len - n);
}

static bool is_behind(const struct http_stream *s, uint64_t off)
{
    return s->pos > WINDOW && off < s->pos - WINDOW;
}

/* The window moves on while one waits. Under the lock. */
static int wait_for(struct http_stream *s, uint64_t off, size_t len)
{
    while (s->again || is_behind(s, off) || s->pos < off + len) {
        if (!s->again && is_behind(s, off)) {
            if (s->restarts++ == RESTARTS_MAX)
                return -ESPIPE;
            s->again = true;
            s->failed = 0;
            pthread_cond_broadcast(&s->wanted);
        }
        if (!s->again && s->failed)
            return s->failed;
        if (!s->again && s->want < off + len) {
            s->want = off + len;
            pthread_cond_broadcast(&s->wanted);
        }
        pthread_cond_wait(&s->moved, &s->lock);
    }
    return 0;
}

static int read_piece(struct http_stream *s, uint8_t *buf, uint64_t off, size_t len)
{
    DR_LOCK_SCOPE(&s->lock);
    if (!s->started) {
        s->window = s->window ? s->window : malloc(WINDOW);
        if (!s->window || dr_thread_start(&s->thread, run, s) != 0)
            return -ENOMEM;
        s->started = true;
    }
    int r = wait_for(s, off, len);
    if (r == 0)
        copy_out(s, buf, off, len);
    return r;
}

int http_stream_read(struct http_stream *s, uint8_t *buf, uint64_t off, size_t len)
{
    int r = 0;
    for (size_t done = 0, n; r == 0 && done < len; done += n) {
        n = dr_min(len - done, (size_t)1 << 20);
        r = read_piece(s, buf + done, off + done, n);
    }
    return r;
}

/* ------------------------------------------------------------------ begin and end */

struct http_stream *http_stream_new(struct http_file *f)
{
    struct http_stream *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->file = f;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->moved, NULL);
    pthread_cond_init(&s->wanted, NULL);
    return s;
}

void http_stream_free(struct http_stream *s)
{
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->stop = true;
    pthread_cond_broadcast(&s->wanted);
    pthread_mutex_unlock(&s->lock);
    if (s->started)
        pthread_join(s->thread, NULL);
    pthread_mutex_destroy(&s->lock);
    pthread_cond_destroy(&s->moved);
    pthread_cond_destroy(&s->wanted);
    free(s->window);
    free(s);
}
