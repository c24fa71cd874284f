/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files of HTTP servers for reading, through libcurl. http.h has the plan. */
#include "base/loaded.h"
#include "storage/http.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define DIRECT ((size_t)256 << 10) /* reads of this size pass the cache by */

static struct http_file *http_of(struct dr_file *f)
{
    return (struct http_file *)f;
}

static ssize_t http_pread(struct dr_file *base, void *buf, uint64_t off, size_t len)
{
    struct http_file *f = http_of(base);
    uint64_t size = f->version.size;
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    int r = 0;
    if (len == 0)
        return 0;
    if (f->stream)
        r = http_stream_read(f->stream, buf, off, len);
    else if (len < DIRECT)
        r = http_cache_read(f->cache, buf, off, len);
    else
        r = http_fetch(f, buf, off, len);
    return r < 0 ? r : (ssize_t)len;
}

static int no_change(void)
{
    return -EROFS;
}

static int http_pwritev(struct dr_file *base, struct iovec *iov, int n, uint64_t off)
{
    (void)base;
    (void)iov;
    (void)n;
    (void)off;
    return no_change();
}

static int http_zero(struct dr_file *base, uint64_t off, uint64_t len, unsigned flags)
{
    (void)base;
    (void)off;
    (void)len;
    (void)flags;
    return no_change();
}

static int http_truncate(struct dr_file *base, uint64_t size)
{
    (void)base;
    (void)size;
    return no_change();
}

static int http_flush(struct dr_file *base)
{
    (void)base;
    return 0;
}

static int http_upgrade(struct dr_file *base, struct dr_error *err)
{
    return dr_fail(err, EROFS, "%s: cannot be written: HTTP servers only give files",
                   http_of(base)->name);
}

/* The text stays as it is until another request of the same thread fails. */
static const char *http_reason(struct dr_file *base, int r)
{
    static _Thread_local char text[320];
    struct http_file *f = http_of(base);
    if (r == -ESPIPE)
        return "the server sends no ranges, so it can only be read from front to back: download it "
               "first";
    if (r != -ESTALE && r != -ENOTCONN && r != -EPROTO && r != -ENOENT && r != -EACCES)
        return NULL;
    DR_LOCK_SCOPE(&f->lock);
    snprintf(text, sizeof(text), "%s", f->why);
    return text;
}

static void http_free(struct http_file *f)
{
    atomic_store(&f->ending, true);
    http_cache_free(f->cache);
    http_stream_free(f->stream);
    while (f->n_idle > 0)
        http_end_handle(f->idle[--f->n_idle]);
    pthread_mutex_destroy(&f->lock);
    free(f->name);
    free(f->url);
    free(f->user);
    curl_slist_free_all(f->cookie);
    free(f->effective);
    free(f->base.path);
    free(f);
}

static void http_close(struct dr_file *base)
{
    http_free(http_of(base));
}

static const struct dr_file_ops http_ops = {
    .name = "http",
    .close = http_close,
    .pread = http_pread,
    .pwritev = http_pwritev,
    .zero = http_zero,
    .truncate = http_truncate,
    .flush = http_flush,
    .upgrade = http_upgrade,
    .reason = http_reason,
};

/* ------------------------------------------------------------------ opening */

static bool take_nothing(void *user, const char *bytes, size_t n)
{
    (void)user;
    (void)bytes;
    (void)n;
    return false;
}

static int judge_first(struct http_file *f, struct http_answer *a, struct dr_error *err)
{
    if (a->version.size == UINT64_MAX)
        return dr_fail(err, ENOTSUP,
                       "%s: the server does not say how large it is: download it first", f->name);
    if (a->version.size > INT64_MAX)
        return dr_fail(err, EFBIG, "%s: the server says a size that no disk can have", f->name);
    f->version = a->version;
    bool ranges = a->status != 200;
    f->cache = ranges ? http_cache_new(f) : NULL;
    f->stream = ranges ? NULL : http_stream_new(f);
    return f->cache || f->stream ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", f->name);
}

/* One byte tells whether there are ranges, the size, and which version it is. */
static int look(struct http_file *f, struct dr_error *err)
{
    struct http_answer a = {.file = f, .from = 0, .end = 1, .take = take_nothing, .user = f};
    int r = http_ask(&a);
    if (r == 0)
        r = judge_first(f, &a, err);
    else
        r = dr_fail(err, r > 0 ? ENOTCONN : -r, "%s: cannot be opened: %s", f->name, f->why);
    f->opened = r == 0;
    return r;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void init_curl(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

static int copy_text(char **to, const char *from)
{
    *to = from ? strdup(from) : NULL;
    return from && !*to ? -ENOMEM : 0;
}

static int set_cookie(struct http_file *f, const char *cookie)
{
    CLEANUP_FREE char *header = NULL;
    if (cookie && asprintf(&header, "Cookie: %s", cookie) < 0)
        header = NULL;
    f->cookie = header ? curl_slist_append(NULL, header) : NULL;
    return cookie && !f->cookie ? -ENOMEM : 0;
}

int dr_http_open(const struct dr_remote *remote, const char *name, struct dr_file **file,
                 struct dr_error *err)
{
    int loaded = dr_load_curl(err);
    if (loaded < 0)
        return dr_prefix(err, loaded, "%s", name);
    struct http_file *f = calloc(1, sizeof(*f));
    pthread_once(&once, init_curl);
    if (!f)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    pthread_mutex_init(&f->lock, NULL);
    f->timeout = (unsigned)dr_max(remote->timeout, 1u);
    f->reconnect = remote->reconnect;
    f->insecure = remote->insecure;
    int r = 0;
    if (copy_text(&f->name, name) < 0 || copy_text(&f->url, remote->uri) < 0 ||
        copy_text(&f->user, remote->user) < 0 || set_cookie(f, remote->cookie) < 0)
        r = dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (r == 0)
        r = look(f, err);
    if (r < 0) {
        http_free(f);
        return r;
    }
    f->base.ops = &http_ops;
    f->base.size = f->version.size;
    f->base.atomic_size = 512;
    f->base.depth = f->cache ? HTTP_DEPTH : 0;
    *file = &f->base;
    return 0;
}
