/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files of HTTP servers; what http.c (the file), http-request.c (one request), http-answer.c (what
 * its headers say), http-cache.c (small reads) and http-stream.c (servers without ranges) share.
 *
 * Large reads are one request each, straight into the caller's buffer, as many at once as there are
 * callers. Small ones go through a cache of 16 MiB in memory, for which threads read ahead when
 * they come one after another. A server that knows no ranges sends the whole file once; a window of
 * 32 MiB of it is kept in memory, and a reader that goes back behind the window costs another
 * download.
 *
 * Every answer is compared with the first one: a file that has another size, ETag or time of change
 * by now is an error (-ESTALE), since its bytes would be mixed with those read before. */
#ifndef DR_STORAGE_HTTP_H
#define DR_STORAGE_HTTP_H

#include <curl/curl.h>

#include "storage/remote.h"

#define HTTP_DEPTH 8u

struct http_cache;
struct http_stream;

/* What tells one state of the file from another. */
struct http_version {
    uint64_t size;
    char etag[256], modified[64];
};

struct http_file {
    struct dr_file base;
    char *name, *url; /* name: for messages */
    char *user;
    struct curl_slist *cookie; /* the header, which libcurl sends to no server redirected to, as it
                                  would a cookie that it was told of as such; NULL = none */
    unsigned timeout, reconnect;
    bool insecure;
    bool opened; /* constant from then on: version, and which of the two below there is */
    struct http_version version;
    struct http_cache *cache;
    struct http_stream *stream;
    _Atomic bool ending;  /* it is being closed: all requests end soon */
    pthread_mutex_t lock; /* all below */
    char *effective;      /* where redirections led; NULL = not known */
    CURL *idle[HTTP_DEPTH];
    unsigned n_idle;
    char why[256]; /* the last failure, in words */
};

/* One request and what its answer says; the body goes to take(). */
struct http_answer {
    struct http_file *file;
    uint64_t from, end; /* the range that was asked for; end 0 = the whole file */
    /* Takes all bytes, or ends the transfer by returning false. */
    bool (*take)(void *user, const char *bytes, size_t n);
    void *user;
    long status;
    struct http_version version; /* size: UINT64_MAX = not said */
    uint64_t first, last;        /* Content-Range: of a status of 206 */
    uint64_t length;             /* Content-Length: of the body; UINT64_MAX = not said */
    bool ranged, encoded;
    bool whole;          /* the headers: the empty line behind them has come */
    bool flood;          /* of headers: the transfer was ended */
    size_t header_bytes; /* of all answers that this request got */
    uint64_t body;       /* bytes that came */
    int refused;         /* the headers were wrong: -errno */
};

/* Send it once and hand on the body. 0: it came whole. 1: it did not, and asking again may help.
 * Else -errno, with the reason in file->why. */
int http_ask(struct http_answer *a);
void http_note(struct http_file *f, const char *text);
/* The bytes [off, off+len) of a server with ranges, asking again where it may help. 0 or -errno. */
int http_fetch(struct http_file *f, void *buf, uint64_t off, size_t len);
/* Wait before the attempt after `failures` ones, of which the first was at `since` (CLOCK_MONOTONIC
 * seconds); false: it has been long enough. */
bool http_may_retry(const struct http_file *f, unsigned failures, uint64_t since);
uint64_t http_seconds(void);
void http_end_handle(CURL *curl); /* NULL allowed */

/* http-answer.c. The first is called by libcurl with one line at a time, which need not end in a
 * zero byte; user is the struct http_answer. */
size_t http_take_header(char *line, size_t size, size_t n, void *user);
/* Before the first byte is taken: 0 or -errno, with the reason in file->why. */
int http_judge(struct http_answer *a);
int http_refuse(struct http_answer *a, int r, const char *text); /* r */

/* http-cache.c */
struct http_cache *http_cache_new(struct http_file *f);
void http_cache_free(struct http_cache *cache); /* NULL allowed */
int http_cache_read(struct http_cache *cache, uint8_t *buf, uint64_t off, size_t len);

/* http-stream.c */
struct http_stream *http_stream_new(struct http_file *f);
void http_stream_free(struct http_stream *stream); /* NULL allowed */
int http_stream_read(struct http_stream *stream, uint8_t *buf, uint64_t off, size_t len);

#endif
