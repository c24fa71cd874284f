/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/ova-manifest.h"

#include <ctype.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

#define LINES_MAX 8192u
#define PIECE     (256u << 10) /* bytes summed at once */

static const struct {
    const char *name;
    size_t len;
    const EVP_MD *(*md)(void);
} kinds[] = {
    [OVA_SHA1] = {"SHA1", 20, EVP_sha1},
    [OVA_SHA256] = {"SHA256", 32, EVP_sha256},
    [OVA_SHA512] = {"SHA512", 64, EVP_sha512},
};

const char *ova_digest_name(enum ova_digest_kind kind)
{
    return kinds[kind].name;
}

size_t ova_digest_len(enum ova_digest_kind kind)
{
    return kinds[kind].len;
}

void ova_digest_text(const struct ova_digest *d, char text[2 * OVA_DIGEST_MAX + 1])
{
    for (size_t i = 0; i < kinds[d->kind].len; i++)
        snprintf(text + 2 * i, 3, "%02x", d->value[i]);
}

/* ------------------------------------------------------------------ lines */

static bool take_kind(const char **p, enum ova_digest_kind *kind)
{
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        size_t n = strlen(kinds[i].name);
        if (strncasecmp(*p, kinds[i].name, n) == 0 && strchr(" \t(", (*p)[n])) {
            *kind = (enum ova_digest_kind)i;
            *p += n;
            return true;
        }
    }
    return false;
}

static bool take_hex(const char *p, struct ova_digest *d)
{
    size_t n = kinds[d->kind].len;
    for (size_t i = 0; i < n; i++, p += 2) {
        if (!isxdigit((unsigned char)p[0]) || !isxdigit((unsigned char)p[1]))
            return false;
        const char both[3] = {p[0], p[1], 0};
        d->value[i] = (uint8_t)strtoul(both, NULL, 16);
    }
    return p[strspn(p, " \t\r")] == '\0';
}

/* "SHA256(name)= digest", where the name may hold parentheses; false: it is not like that. */
static bool take_line(const char *line, struct ova_digest *d, const char **name, size_t *len)
{
    const char *p = line + strspn(line, " \t");
    if (!take_kind(&p, &d->kind))
        return false;
    p += strspn(p, " \t");
    const char *close = strrchr(p, ')');
    if (*p != '(' || !close || close == p + 1)
        return false;
    *name = p + 1;
    *len = (size_t)(close - *name);
    p = close + 1;
    p += strspn(p, " \t");
    if (*p != '=')
        return false;
    p++;
    return take_hex(p + strspn(p, " \t"), d);
}

static int add_line(struct ova_manifest *m, const char *shown, const char *line, unsigned at,
                    struct dr_error *err)
{
    struct ova_digest d = {0};
    const char *name;
    size_t len;
    if (line[strspn(line, " \t\r")] == '\0')
        return 0;
    if (!take_line(line, &d, &name, &len))
        return dr_fail(err, EINVAL,
                       "%s: line %u: expected \"SHA256(NAME)= DIGEST\" (or SHA1, SHA512)", shown,
                       at);
    if (m->n == LINES_MAX)
        return dr_fail(err, E2BIG, "%s: more than %u digests", shown, LINES_MAX);
    struct ova_digest *more = reallocarray(m->all, m->n + 1, sizeof(*more));
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", shown);
    m->all = more;
    d.name = strndup(name, len);
    if (!d.name)
        return dr_fail(err, ENOMEM, "%s: out of memory", shown);
    for (size_t i = 0; i < m->n; i++) /* each file is read once */
        if (strcmp(ova_plain_name(m->all[i].name), ova_plain_name(d.name)) == 0) {
            free(d.name);
            return dr_fail(err, EINVAL, "%s: line %u: a second digest of '%.200s'", shown, at,
                           m->all[i].name);
        }
    more[m->n++] = d;
    return 0;
}

int ova_manifest_parse(const char *name, const char *text, size_t len, struct ova_manifest *m,
                       struct dr_error *err)
{
    CLEANUP_FREE char *copy = strndup(text, len);
    char *rest = copy, *line;
    int r = 0;
    *m = (struct ova_manifest){0};
    if (!copy)
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    if (strlen(copy) < len)
        return dr_fail(err, EINVAL, "%s: a zero byte at offset %zu, expected text", name,
                       strlen(copy));
    for (unsigned at = 1; r == 0 && (line = strsep(&rest, "\n")); at++)
        r = add_line(m, name, line, at, err);
    return r;
}

void ova_manifest_free(struct ova_manifest *m)
{
    for (size_t i = 0; i < m->n; i++)
        free(m->all[i].name);
    free(m->all);
    free(m->name);
    *m = (struct ova_manifest){0};
}

/* ------------------------------------------------------------------ the file */

/* The descriptor's name with another ending; malloc'ed. */
static char *like_descriptor(const struct ova *ova, const char *ending)
{
    const char *base = ova->is_tar ? ova->descriptor : dr_path_basename(ova->descriptor);
    const char *dot = strrchr(base, '.');
    size_t n = dot ? (size_t)(dot - base) : strlen(base);
    char *name = malloc(n + strlen(ending) + 1);
    if (name) {
        memcpy(name, base, n);
        strcpy(name + n, ending);
    }
    return name;
}

/* -ENOENT: there is no such file. */
static int open_like(const struct ova *ova, const char *ending, char **name, struct dr_file **file,
                     struct dr_error *err)
{
    *file = NULL;
    *name = ova->descriptor ? like_descriptor(ova, ending) : NULL;
    if (!*name)
        return ova->descriptor ? dr_fail(err, ENOMEM, "%s: out of memory", ova->file->path)
                               : -ENOENT;
    struct ova_found found = {.name = *name};
    return ova_file_open(ova, &found, false, file, err);
}

static bool is_there(const struct ova *ova, const char *ending)
{
    CLEANUP_FREE char *name = NULL;
    struct dr_file *file;
    int r = open_like(ova, ending, &name, &file, NULL);
    dr_file_unref(file);
    return r == 0;
}

int ova_manifest_read(const struct ova *ova, struct ova_manifest *m, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *name = NULL, *text = NULL;
    struct dr_file *file;
    *m = (struct ova_manifest){0};
    int r = open_like(ova, ".mf", &name, &file, &why);
    if (r == -ENOENT)
        return 0;
    uint64_t len = r == 0 ? dr_file_size(file) : 0;
    if (r == 0 && len > OVF_TEXT_MAX)
        r = dr_fail(&why, EFBIG, "%s: %" PRIu64 " bytes are no manifest, which has at most %u",
                    file->path, len, OVF_TEXT_MAX);
    if (r == 0 && !(text = malloc((size_t)len + 1)))
        r = dr_fail(&why, ENOMEM, "%s: out of memory", file->path);
    if (r == 0)
        r = dr_file_pread(file, text, 0, (size_t)len, &why);
    if (r == 0)
        r = ova_manifest_parse(file->path, text, (size_t)len, m, &why);
    dr_file_unref(file);
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    m->name = DR_STEAL(name);
    m->has_certificate = is_there(ova, ".cert");
    return 0;
}

/* ------------------------------------------------------------------ sums */

struct ova_summing {
    EVP_MD_CTX *ctx;
    enum ova_digest_kind kind;
    bool failed;
};

struct ova_summing *ova_summing_new(enum ova_digest_kind kind)
{
    struct ova_summing *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->kind = kind;
    s->ctx = EVP_MD_CTX_new();
    if (s->ctx && EVP_DigestInit_ex(s->ctx, kinds[kind].md(), NULL) == 1)
        return s;
    ova_summing_end(s, NULL);
    return NULL;
}

void ova_summing_add(struct ova_summing *s, const void *buf, size_t len)
{
    s->failed |= EVP_DigestUpdate(s->ctx, buf, len) != 1;
}

bool ova_summing_end(struct ova_summing *s, struct ova_digest *d)
{
    bool done = s && !s->failed;
    if (done && d) {
        d->kind = s->kind;
        done = EVP_DigestFinal_ex(s->ctx, d->value, NULL) == 1;
    }
    if (s)
        EVP_MD_CTX_free(s->ctx);
    free(s);
    return done;
}

static int sum_file(struct dr_file *f, struct ova_summing *s, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(PIECE);
    uint64_t size = dr_file_size(f);
    int r = buf ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    for (uint64_t at = 0; r == 0 && at < size; at += PIECE) {
        size_t n = (size_t)dr_min(PIECE, size - at);
        r = dr_file_pread(f, buf, at, n, err);
        if (r == 0)
            ova_summing_add(s, buf, n);
    }
    return r;
}

const struct ova_digest *ova_manifest_find(const struct ova_manifest *m, const char *name)
{
    for (size_t i = 0; i < m->n; i++)
        if (strcmp(ova_plain_name(m->all[i].name), ova_plain_name(name)) == 0)
            return &m->all[i];
    return NULL;
}

int ova_digest_check(const struct ova *ova, const struct ova_digest *want, struct ova_digest *have,
                     struct dr_error *err)
{
    struct dr_file *file = NULL;
    struct ova_found found = {.name = want->name};
    *have = (struct ova_digest){.kind = want->kind};
    int r = 0;
    if (!ova->is_tar && strcmp(want->name, dr_path_basename(ova->descriptor)) == 0)
        file = dr_file_ref(ova->file);
    else
        r = ova_file_open(ova, &found, false, &file, err);
    struct ova_summing *s = r == 0 ? ova_summing_new(want->kind) : NULL;
    if (r == 0)
        r = s ? sum_file(file, s, err) : dr_fail(err, ENOMEM, "%s: out of memory", file->path);
    if (!ova_summing_end(s, r == 0 ? have : NULL) && r == 0)
        r = dr_fail(err, EIO, "%s: its %s could not be computed", file->path,
                    kinds[want->kind].name);
    if (r == 0 && memcmp(want->value, have->value, kinds[want->kind].len) != 0) {
        char was[2 * OVA_DIGEST_MAX + 1], should[2 * OVA_DIGEST_MAX + 1];
        ova_digest_text(have, was);
        ova_digest_text(want, should);
        r = dr_fail(err, EBADMSG, "%s: its %s is %s, the manifest says %s", file->path,
                    kinds[want->kind].name, was, should);
    }
    dr_file_unref(file);
    return r;
}
