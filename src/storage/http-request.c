/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One request to an HTTP server, and what may be wrong with the answer. */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/sigpipe.h"
#include "storage/http.h"

#define REDIRECTS_MAX 10L
#define PAGE_MAX      (1 << 20) /* bytes behind the headers of a redirection */
#define SPEED_LEAST   100L      /* bytes a second: what is slower counts as no answer */
/* Bytes a second: a request that takes longer ends, and another one continues it. */
#define SPEED_BOUND UINT64_C(10240)
#define RETRY_FIRST 100
#define RETRY_LAST  5000 /* milliseconds */

uint64_t http_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec;
}

void http_note(struct http_file *f, const char *text)
{
    DR_LOCK_SCOPE(&f->lock);
    snprintf(f->why, sizeof(f->why), "%s", text);
}

bool http_may_retry(const struct http_file *f, unsigned failures, uint64_t since)
{
    int wait = failures < 6 ? RETRY_FIRST << failures : RETRY_LAST;
    if (!f->opened || http_seconds() >= since + f->reconnect)
        return false;
    for (; wait > 0 && !atomic_load(&f->ending); wait -= RETRY_FIRST)
        poll(NULL, 0, RETRY_FIRST);
    return !atomic_load(&f->ending);
}

/* ------------------------------------------------------------------ the body */

struct transfer {
    struct http_answer *a;
    CURL *curl;
    bool judged, ended; /* ended: by take() */
    bool page;          /* a redirection came with a body without end */
};

static size_t on_body(char *bytes, size_t size, size_t n, void *user)
{
    struct transfer *t = user;
    struct http_answer *a = t->a;
    if (!t->judged) {
        t->judged = true;
        curl_easy_getinfo(t->curl, CURLINFO_RESPONSE_CODE, &a->status);
        if (a->status == 200 || a->status == 206)
            a->refused = http_judge(a);
    }
    if ((a->status != 200 && a->status != 206) || a->refused)
        return 0; /* nobody reads pages about errors */
    a->body += size * n;
    if (a->status == 206 && a->body > a->last - a->first + 1) {
        a->refused = http_refuse(a, -EPROTO, "the server sends more bytes than its range has");
        return 0;
    }
    t->ended = !a->take(a->user, bytes, size * n);
    return t->ended ? 0 : size * n;
}

/* Nobody wants any more what threads read ahead of a file that is being closed. libcurl asks every
 * second, and more often while bytes come. It also reads, and drops, the body of a redirection. */
static int on_progress(void *user, curl_off_t total, curl_off_t now, curl_off_t c, curl_off_t d)
{
    struct transfer *t = user;
    (void)total;
    (void)c;
    (void)d;
    t->page = !t->judged && now > PAGE_MAX;
    return t->page || atomic_load(&t->a->file->ending);
}

/* ------------------------------------------------------------------ handles */

static CURL *take_handle(struct http_file *f)
{
    DR_LOCK_SCOPE(&f->lock);
    return f->n_idle > 0 ? f->idle[--f->n_idle] : curl_easy_init();
}

/* Both functions may write to a server that is gone, and OpenSSL does that with a signal. */
static CURLcode perform_quietly(CURL *curl)
{
    struct dr_sigpipe quiet;
    dr_sigpipe_hold(&quiet);
    CURLcode code = curl_easy_perform(curl);
    dr_sigpipe_release(&quiet, true);
    return code;
}

void http_end_handle(CURL *curl)
{
    struct dr_sigpipe quiet;
    dr_sigpipe_hold(&quiet);
    curl_easy_cleanup(curl);
    dr_sigpipe_release(&quiet, true);
}

/* A reset keeps connections and TLS sessions; what this request had in the handle ends with it. */
static void put_handle(struct http_file *f, CURL *curl)
{
    curl_easy_reset(curl);
    pthread_mutex_lock(&f->lock);
    bool kept = f->n_idle < HTTP_DEPTH;
    if (kept)
        f->idle[f->n_idle++] = curl;
    pthread_mutex_unlock(&f->lock);
    if (!kept)
        http_end_handle(curl);
}

static const char *ca_file(void)
{
    const char *file = getenv("CURL_CA_BUNDLE");
    return file && *file ? file : getenv("SSL_CERT_FILE");
}

static bool same_part(CURLU *a, CURLU *b, CURLUPart part)
{
    char *in_a = NULL, *in_b = NULL;
    bool same = !curl_url_get(a, part, &in_a, CURLU_DEFAULT_PORT) &&
                !curl_url_get(b, part, &in_b, CURLU_DEFAULT_PORT) && strcasecmp(in_a, in_b) == 0;
    curl_free(in_a);
    curl_free(in_b);
    return same;
}

/* Do both lead to one server? */
static bool same_server(const char *url, const char *other)
{
    CURLU *a = curl_url(), *b = curl_url();
    bool same = a && b && !curl_url_set(a, CURLUPART_URL, url, 0) &&
                !curl_url_set(b, CURLUPART_URL, other, 0) && same_part(a, b, CURLUPART_SCHEME) &&
                same_part(a, b, CURLUPART_HOST) && same_part(a, b, CURLUPART_PORT);
    curl_url_cleanup(a);
    curl_url_cleanup(b);
    return same;
}

/* The password and the cookies are for the server that the name has, not for one that it led to. */
static void set_secrets(CURL *curl, const struct http_file *f, const char *url)
{
    if ((!f->user && !f->cookie) || !same_server(f->url, url))
        return;
    if (f->user)
        curl_easy_setopt(curl, CURLOPT_USERPWD, f->user);
    if (f->cookie)
        curl_easy_setopt(curl, CURLOPT_HTTPHEADER, f->cookie);
}

static void set_up(CURL *curl, struct http_file *f, const char *url, struct transfer *t)
{
    bool secure = strncmp(url, "https:", 6) == 0;
    const char *ca = ca_file();
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(curl, CURLOPT_REDIR_PROTOCOLS_STR, secure ? "https" : "http,https");
    curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 1L);
    curl_easy_setopt(curl, CURLOPT_MAXREDIRS, REDIRECTS_MAX);
    curl_easy_setopt(curl, CURLOPT_NETRC, (long)CURL_NETRC_OPTIONAL);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "drover/" DR_VERSION);
    curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, (long)f->timeout);
    curl_easy_setopt(curl, CURLOPT_BUFFERSIZE, 512L * 1024);
    if (f->insecure) {
        curl_easy_setopt(curl, CURLOPT_SSL_VERIFYPEER, 0L);
        curl_easy_setopt(curl, CURLOPT_SSL_VERIFYHOST, 0L);
    }
    if (ca && *ca)
        curl_easy_setopt(curl, CURLOPT_CAINFO, ca);
    set_secrets(curl, f, url);
    curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, http_take_header);
    curl_easy_setopt(curl, CURLOPT_HEADERDATA, t->a);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, t);
}

/* ------------------------------------------------------------------ one request */

/* *again: the server that was redirected to may not know it any more; the first one may. */
static int judge_status(struct http_answer *a, bool redirected, bool *again)
{
    char text[64];
    snprintf(text, sizeof(text), "the server answers with status %ld", a->status);
    http_note(a->file, text);
    *again = a->status >= 400 && a->status < 500 && redirected;
    if (*again || a->status == 429 || a->status >= 500)
        return 1;
    if (a->status == 416 && a->version.size == 0)
        return 0;
    return a->status == 404 || a->status == 410   ? -ENOENT
           : a->status == 401 || a->status == 403 ? -EACCES
                                                  : -EPROTO;
}

static int judge_code(struct http_answer *a, CURLcode code, const char *text)
{
    if (code == CURLE_UNSUPPORTED_PROTOCOL)
        text = "the server redirects to a URL without TLS, or of another protocol";
    http_note(a->file, *text ? text : curl_easy_strerror(code));
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
        return 1;
    case CURLE_SSL_CONNECT_ERROR:
        return a->file->opened ? 1 : -EPROTO;
    case CURLE_OUT_OF_MEMORY:
        return -ENOMEM;
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
        return -EACCES;
    default:
        return -EPROTO;
    }
}

static void keep_effective(struct http_file *f, CURL *curl)
{
    char *url = NULL;
    DR_LOCK_SCOPE(&f->lock);
    if (!f->effective && !curl_easy_getinfo(curl, CURLINFO_EFFECTIVE_URL, &url) && url)
        f->effective = strdup(url);
}

static char *start_url(struct http_file *f)
{
    DR_LOCK_SCOPE(&f->lock);
    return strdup(f->effective ? f->effective : f->url);
}

static void forget_effective(struct http_file *f)
{
    DR_LOCK_SCOPE(&f->lock);
    free(DR_STEAL(f->effective));
}

static CURLcode perform(CURL *curl, struct http_answer *a, const char *url)
{
    char range[64];
    uint64_t bound = 0;
    const struct http_file *f = a->file;
    if (a->end) {
        snprintf(range, sizeof(range), "%llu-%llu", (unsigned long long)a->from,
                 (unsigned long long)a->end - 1);
        curl_easy_setopt(curl, CURLOPT_RANGE, range);
        bound = (uint64_t)f->timeout * 10 + (a->end - a->from) / SPEED_BOUND;
        curl_easy_setopt(curl, CURLOPT_TIMEOUT, (long)bound);
    }
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_LIMIT, SPEED_LEAST);
    curl_easy_setopt(curl, CURLOPT_LOW_SPEED_TIME, (long)f->timeout);
    curl_easy_setopt(curl, CURLOPT_URL, url);
    return perform_quietly(curl);
}

int http_ask(struct http_answer *a)
{
    struct http_file *f = a->file;
    CURL *curl = take_handle(f);
    CLEANUP_FREE char *url = start_url(f);
    struct transfer t = {.a = a, .curl = curl};
    char text[CURL_ERROR_SIZE] = "";
    bool again = false;
    if (!curl || !url) {
        http_end_handle(curl);
        return http_refuse(a, -ENOMEM, "out of memory");
    }
    set_up(curl, f, url, &t);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, text);
    CURLcode code = perform(curl, a, url);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &a->status);
    bool good = a->status == 200 || a->status == 206;
    int r = 0;
    if (a->refused)
        r = a->refused;
    else if (a->flood || t.page)
        r = http_refuse(a, -EPROTO,
                        a->flood ? "the server sends headers without end"
                                 : "the server redirects with a page without end");
    else if (code == CURLE_OK && !a->whole) /* which libcurl takes for an answer without a body */
        r = http_refuse(a, 1, "the connection was lost within the headers");
    else if (a->status && !good && (code == CURLE_OK || code == CURLE_WRITE_ERROR))
        r = judge_status(a, strcmp(url, f->url) != 0, &again);
    else if (code != CURLE_OK && !(t.ended && code == CURLE_WRITE_ERROR))
        r = judge_code(a, code, text);
    else if (!t.judged)
        r = http_judge(a); /* an answer without a body */
    if (r == 0)
        keep_effective(f, curl);
    if (again)
        forget_effective(f);
    put_handle(f, curl);
    return r;
}

/* ------------------------------------------------------------------ a range */

struct target {
    uint8_t *buf;
    size_t len, got;
};

static bool take_range(void *user, const char *bytes, size_t n)
{
    struct target *t = user;
    size_t fits = dr_min(n, t->len - t->got);
    memcpy(t->buf + t->got, bytes, fits);
    t->got += fits;
    return fits == n;
}

int http_fetch(struct http_file *f, void *buf, uint64_t off, size_t len)
{
    struct target t = {.buf = buf, .len = len};
    uint64_t since = http_seconds();
    for (unsigned failures = 0; t.got < len;) {
        size_t before = t.got;
        struct http_answer a = {
            .file = f, .from = off + t.got, .end = off + len, .take = take_range, .user = &t};
        int r = http_ask(&a);
        if (r < 0)
            return r;
        if (t.got > before) {
            failures = 0;
            since = http_seconds();
            continue;
        }
        if (r == 0)
            http_note(f, "the server's answer has no bytes");
        if (!http_may_retry(f, failures++, since))
            return -ENOTCONN;
    }
    return 0;
}
