/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The headers of an HTTP server's answer, and whether it is what was asked for. */
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "storage/http.h"

#define HEADERS_MAX ((size_t)256 << 10) /* bytes, with those of redirections */

/* ------------------------------------------------------------------ headers */

static bool header_is(const char *line, size_t n, const char *name, const char **value)
{
    size_t len = strlen(name);
    if (n <= len || line[len] != ':' || strncasecmp(line, name, len) != 0)
        return false;
    for (len++; len < n && (line[len] == ' ' || line[len] == '\t'); len++)
        ;
    *value = line + len;
    return true;
}

static uint64_t number(const char *text, const char **end)
{
    uint64_t n = 0;
    const char *at = text;
    for (; *at >= '0' && *at <= '9'; at++)
        if (__builtin_mul_overflow(n, UINT64_C(10), &n) ||
            __builtin_add_overflow(n, (uint64_t)(*at - '0'), &n))
            break;
    *end = at;
    return at == text || (*at >= '0' && *at <= '9') ? UINT64_MAX : n;
}

/* "bytes FIRST-LAST/SIZE" or, with a status of 416, one with a star and the size. */
static void read_content_range(struct http_answer *a, const char *value)
{
    const char *at;
    if (strncasecmp(value, "bytes ", 6) != 0)
        return;
    if (value[6] == '*') {
        if (value[7] == '/')
            a->version.size = number(value + 8, &at);
        return;
    }
    a->first = number(value + 6, &at);
    a->last = *at == '-' ? number(at + 1, &at) : UINT64_MAX;
    a->version.size = *at == '/' ? number(at + 1, &at) : UINT64_MAX;
    a->ranged = a->first <= a->last && a->last != UINT64_MAX;
}

/* Redirections have headers, too: each status line begins a new answer. */
size_t http_take_header(char *line, size_t size, size_t n, void *user)
{
    struct http_answer *a = user;
    char text[512];
    const char *value, *end;
    size_t len = dr_min(size * n, sizeof(text) - 1);
    a->header_bytes += size * n;
    a->flood = a->header_bytes > HEADERS_MAX;
    if (a->flood)
        return 0;
    memcpy(text, line, len);
    while (len > 0 && (text[len - 1] == '\r' || text[len - 1] == '\n'))
        len--;
    text[len] = '\0';
    if (strncmp(text, "HTTP/", 5) == 0) {
        a->version = (struct http_version){.size = UINT64_MAX};
        a->length = UINT64_MAX;
        a->ranged = a->encoded = a->whole = false;
    } else if (len == 0) {
        a->whole = true;
    } else if (header_is(text, len, "content-range", &value)) {
        read_content_range(a, value);
    } else if (header_is(text, len, "content-length", &value)) {
        a->length = number(value, &end);
    } else if (header_is(text, len, "etag", &value)) {
        snprintf(a->version.etag, sizeof(a->version.etag), "%s", value);
    } else if (header_is(text, len, "last-modified", &value)) {
        snprintf(a->version.modified, sizeof(a->version.modified), "%s", value);
    } else if (header_is(text, len, "content-encoding", &value)) {
        a->encoded = strcasecmp(value, "identity") != 0;
    }
    return size * n;
}

/* ------------------------------------------------------------------ is it what was asked for? */

int http_refuse(struct http_answer *a, int r, const char *text)
{
    http_note(a->file, text);
    return r;
}

/* A weak ETag says that two states are much alike, not that they have the same bytes. */
static bool same_version(const struct http_version *a, const struct http_version *b)
{
    bool strong = a->etag[0] && strncmp(a->etag, "W/", 2) != 0;
    return a->size == b->size && strcmp(a->etag, b->etag) == 0 &&
           (strong || strcmp(a->modified, b->modified) == 0);
}

/* The range is the one that was asked for, or its beginning, and lies in the file; the body is as
 * long as it, where its length is said. */
static bool is_range_good(const struct http_answer *a)
{
    return a->ranged && a->first == a->from && a->last < a->end && a->last < a->version.size &&
           (a->length == UINT64_MAX || a->length == a->last - a->first + 1);
}

int http_judge(struct http_answer *a)
{
    struct http_file *f = a->file;
    if (a->status == 200) /* with 206 the length is that of the range */
        a->version.size = a->length;
    if (a->encoded)
        return http_refuse(a, -EPROTO,
                           "the server sends it in another encoding than it was asked for");
    if (a->status == 206 && !is_range_good(a))
        return http_refuse(a, -EPROTO, "the server sends another range than it was asked for");
    if (f->opened && !same_version(&a->version, &f->version))
        return http_refuse(a, -ESTALE, "it has changed on the server since it was opened");
    if (f->opened && !f->stream && a->status != 206)
        return http_refuse(a, -EPROTO, "the server sends no ranges any more");
    return 0;
}
