/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/vmsd.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "core/publish.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ lines */

static void line_free(struct dict_line *l)
{
    free(l->text);
    free(l->key);
    free(l->value);
}

void dict_free(struct dict *d)
{
    for (size_t i = 0; i < d->n; i++)
        line_free(&d->lines[i]);
    free(d->lines);
    *d = (struct dict){0};
}

static bool is_key_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == ':' || c == '-';
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* "|22" stands for a quote. A '|' that stands for nothing is itself. */
static char *decode(const char *text, size_t len)
{
    char *out = malloc(len + 1);
    size_t n = 0;
    for (size_t i = 0; out && i < len; i++) {
        int high = text[i] == '|' && i + 2 < len ? hex_digit(text[i + 1]) : -1;
        int low = high >= 0 ? hex_digit(text[i + 2]) : -1;
        if (low >= 0 && (high || low)) {
            out[n++] = (char)(high * 16 + low);
            i += 2;
        } else {
            out[n++] = text[i];
        }
    }
    if (out)
        out[n] = '\0';
    return out;
}

static char *encode(const char *value)
{
    char *out = malloc(strlen(value) * 3 + 1), *p = out;
    for (; out && *value; value++) {
        unsigned char c = (unsigned char)*value;
        if (c < 0x20 || c == '"' || c == '|' || c == 0x7f)
            p += sprintf(p, "|%02X", c);
        else
            *p++ = (char)c;
    }
    if (out)
        *p = '\0';
    return out;
}

static const char *skip_blanks(const char *p, const char *end)
{
    while (p < end && (*p == ' ' || *p == '\t'))
        p++;
    return p;
}

/* 0; -EINVAL: the line is neither empty, nor a comment, nor an assignment. */
static int parse_line(struct dict_line *l, const char *text, size_t len)
{
    const char *end = text + len, *p = skip_blanks(text, end), *key = p;
    l->text = strndup(text, len);
    if (!l->text)
        return -ENOMEM;
    if (p == end || *p == '#')
        return 0;
    while (p < end && is_key_char(*p))
        p++;
    const char *key_end = p;
    p = skip_blanks(p, end);
    if (p == end || *p != '=' || key_end == key)
        return -EINVAL;
    p = skip_blanks(p + 1, end);
    while (end > p && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    if (end - p < 2 || *p != '"' || end[-1] != '"' || memchr(p + 1, '"', (size_t)(end - p) - 2))
        return -EINVAL;
    l->key = strndup(key, (size_t)(key_end - key));
    l->value = decode(p + 1, (size_t)(end - p) - 2);
    return l->key && l->value ? 0 : -ENOMEM;
}

static int add_line(struct dict *d, const char *path, const char *text, size_t len,
                    struct dr_error *err)
{
    struct dict_line line = {0};
    if (d->n == DICT_MAX_LINES)
        return dr_fail(err, EFBIG, "%s: has more than %u lines", path, DICT_MAX_LINES);
    struct dict_line *more = (d->n & (d->n - 1)) == 0
                                 ? realloc(d->lines, (d->n ? d->n * 2 : 1) * sizeof(*more))
                                 : d->lines;
    int r = more ? parse_line(&line, text, len) : -ENOMEM;
    if (more)
        d->lines = more;
    if (r == 0) {
        d->lines[d->n++] = line;
        return 0;
    }
    line_free(&line);
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    return dr_fail(err, EINVAL, "%s: line %zu is not of the form KEY = \"VALUE\"", path, d->n + 1);
}

int dict_parse(struct dict *d, const char *path, const void *data, size_t len, struct dr_error *err)
{
    const char *p = data, *end = p ? p + len : p;
    *d = (struct dict){0};
    int r = len <= DICT_MAX_BYTES
                ? 0
                : dr_fail(err, EFBIG, "%s: is longer than %u bytes", path, DICT_MAX_BYTES);
    if (r == 0 && len && memchr(p, 0, len))
        r = dr_fail(err, EINVAL, "%s: is no text: there is a NUL in it", path);
    while (r == 0 && p < end) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        size_t n = (size_t)((stop ? stop : end) - p);
        bool cr = n > 0 && p[n - 1] == '\r';
        d->crlf |= cr;
        r = add_line(d, path, p, n - cr, err);
        p = stop ? stop + 1 : end;
    }
    if (r < 0)
        dict_free(d);
    return r;
}

int dict_load(struct dict *d, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    *d = (struct dict){0};
    int r = dr_file_open(fs, path, DR_FILE_NO_LOCK | DR_FILE_FORCE_SHARE, &file, err);
    if (r < 0)
        return r;
    uint64_t size = dr_file_size(file);
    if (size > DICT_MAX_BYTES)
        return dr_fail(err, EFBIG, "%s: is longer than %u bytes", path, DICT_MAX_BYTES);
    CLEANUP_FREE char *text = malloc((size_t)size + 1);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    r = size ? dr_file_pread(file, text, 0, (size_t)size, err) : 0;
    return r < 0 ? r : dict_parse(d, path, text, (size_t)size, err);
}

/* ------------------------------------------------------------------ looking and changing */

static struct dict_line *find(const struct dict *d, const char *key)
{
    for (size_t i = 0; i < d->n; i++)
        if (d->lines[i].key && strcasecmp(d->lines[i].key, key) == 0)
            return &d->lines[i];
    return NULL;
}

const char *dict_get(const struct dict *d, const char *key)
{
    const struct dict_line *l = find(d, key);
    return l ? l->value : NULL;
}

bool dict_set(struct dict *d, const char *key, const char *value)
{
    CLEANUP_FREE char *coded = encode(value);
    struct dict_line fresh = {.key = strdup(key), .value = strdup(value)};
    struct dict_line *old = find(d, key);
    if (!coded || asprintf(&fresh.text, "%s = \"%s\"", key, coded) < 0)
        fresh.text = NULL;
    struct dict_line *more = old ? d->lines : realloc(d->lines, (d->n + 1) * sizeof(*more));
    if (!old && more) /* add_line takes powers of two for what has room */
        d->lines = more;
    if (!fresh.key || !fresh.value || !fresh.text || !more) {
        line_free(&fresh);
        return false;
    }
    if (old)
        line_free(old);
    else
        old = &d->lines[d->n++];
    *old = fresh;
    return true;
}

void dict_remove(struct dict *d, const char *prefix)
{
    size_t kept = 0;
    for (size_t i = 0; i < d->n; i++) {
        struct dict_line *l = &d->lines[i];
        if (l->key && strncasecmp(l->key, prefix, strlen(prefix)) == 0)
            line_free(l);
        else
            d->lines[kept++] = *l;
    }
    d->n = kept;
}

char *dict_text(const struct dict *d, size_t *len)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, len);
    if (!out)
        return NULL;
    for (size_t i = 0; i < d->n; i++)
        fprintf(out, "%s%s", d->lines[i].text, d->crlf ? "\r\n" : "\n");
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

int dict_save(const struct dict *d, struct dr_fs *fs, const char *path, struct dr_error *err)
{
    CLEANUP_FILE struct dr_file *old = NULL;
    struct dr_temp temp = {0};
    size_t len = 0;
    CLEANUP_FREE char *text = dict_text(d, &len);
    if (!text)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_file_open(fs, path, DR_FILE_RDWR, &old, err);
    if (r == 0)
        r = dr_temp_create(&temp, fs, path, old, old, err);
    if (r == 0)
        r = dr_file_pwrite(temp.file, text, 0, len, err);
    if (r == 0)
        r = dr_temp_publish(&temp, err);
    dr_temp_end(&temp);
    return r;
}
