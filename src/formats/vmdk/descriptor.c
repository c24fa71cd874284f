/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "formats/vmdk/descriptor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"

/* A piece of the text that is being read. */
struct span {
    const char *p;
    size_t n;
};

static bool is_blank(char c)
{
    return c == ' ' || c == '\t';
}

static struct span trim(struct span s)
{
    while (s.n > 0 && is_blank(s.p[0]))
        s.p++, s.n--;
    while (s.n > 0 && is_blank(s.p[s.n - 1]))
        s.n--;
    return s;
}

static bool span_is(struct span s, const char *word)
{
    return s.n == strlen(word) && strncasecmp(s.p, word, s.n) == 0;
}

/* The next word of s; s moves behind it. Empty at the end. */
static struct span take_word(struct span *s)
{
    *s = trim(*s);
    struct span word = {s->p, 0};
    while (word.n < s->n && !is_blank(s->p[word.n]))
        word.n++;
    s->p += word.n;
    s->n -= word.n;
    return word;
}

bool vmdk_name_is_writable(const char *name)
{
    return name[0] != '\0' && strpbrk(name, "\"\r\n") == NULL;
}

/* ------------------------------------------------------------------ extent lines */

static bool parse_access(struct span word, enum vmdk_access *access)
{
    static const char *const names[] = {"RW", "RDONLY", "NOACCESS"};
    for (unsigned i = 0; i < 3; i++)
        if (span_is(word, names[i])) {
            *access = (enum vmdk_access)i;
            return true;
        }
    return false;
}

/* Decimal digits only, at most VMDK_MAX_SECTORS. */
static bool parse_number(struct span word, uint64_t *v)
{
    *v = 0;
    for (size_t i = 0; i < word.n; i++) {
        if (word.p[i] < '0' || word.p[i] > '9')
            return false;
        *v = *v * 10 + (uint64_t)(word.p[i] - '0');
        if (*v > VMDK_MAX_SECTORS)
            return false;
    }
    return word.n > 0;
}

static enum vmdk_extent_type parse_type(struct span word)
{
    static const struct {
        const char *name;
        enum vmdk_extent_type type;
    } types[] = {
        {"SPARSE", VMDK_SPARSE}, {"VMFSSPARSE", VMDK_SPARSE}, {"SESPARSE", VMDK_SESPARSE},
        {"FLAT", VMDK_FLAT},     {"VMFS", VMDK_VMFS},         {"ZERO", VMDK_ZERO},
        {"VMFSRAW", VMDK_FLAT}, /* a device, as it is */
    };
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++)
        if (span_is(word, types[i].name))
            return types[i].type;
    return VMDK_UNSUPPORTED;
}

/* The quoted name at the start of s; s moves behind it. */
static bool take_name(struct span *s, struct span *name)
{
    *s = trim(*s);
    if (s->n < 2 || s->p[0] != '"')
        return false;
    const char *close = memchr(s->p + 1, '"', s->n - 1);
    if (!close || close == s->p + 1)
        return false;
    *name = (struct span){s->p + 1, (size_t)(close - s->p - 1)};
    s->n -= (size_t)(close + 1 - s->p);
    s->p = close + 1;
    return true;
}

static bool needs_name(const struct vmdk_extent_line *e)
{
    return e->type == VMDK_SPARSE || e->type == VMDK_SESPARSE || e->type == VMDK_FLAT ||
           e->type == VMDK_VMFS;
}

/* Parse the rest of an extent line, behind the type: a name and an offset; a partition uuid and a
 * device id may follow. */
static int parse_extent_rest(struct vmdk_extent_line *e, struct span rest, const char *where,
                             size_t number, struct dr_error *err)
{
    struct span name;
    if (!take_name(&rest, &name)) {
        if (needs_name(e))
            return dr_fail(err, EINVAL, "%s: line %zu: %s extent without a file name in quotes",
                           where, number, e->type_name);
        return 0;
    }
    e->name = strndup(name.p, name.n);
    if (!e->name)
        return dr_fail_errno(err, ENOMEM, "%s", where);
    struct span offset = take_word(&rest);
    if (offset.n > 0 && !parse_number(offset, &e->offset))
        return dr_fail(err, EINVAL, "%s: line %zu: '%.*s' is no extent offset", where, number,
                       (int)dr_min(offset.n, 40), offset.p);
    return 0;
}

static int parse_extent(struct vmdk_extent_line *e, struct span s, const char *where, size_t number,
                        struct dr_error *err)
{
    *e = (struct vmdk_extent_line){0};
    parse_access(take_word(&s), &e->access);
    struct span sectors = take_word(&s);
    if (!parse_number(sectors, &e->sectors))
        return dr_fail(err, EINVAL, "%s: line %zu: '%.*s' is no number of sectors of an extent",
                       where, number, (int)dr_min(sectors.n, 40), sectors.p);
    struct span type = take_word(&s);
    if (type.n == 0)
        return dr_fail(err, EINVAL, "%s: line %zu: extent without a type", where, number);
    e->type = parse_type(type);
    snprintf(e->type_name, sizeof(e->type_name), "%.*s", (int)dr_min(type.n, 23), type.p);
    return parse_extent_rest(e, s, where, number, err);
}

/* ------------------------------------------------------------------ lines */

static bool is_key_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_';
}

/* key = value: sets the offsets in line and answers true. */
static bool parse_assignment(const char *text, struct span s, struct vmdk_line *line)
{
    size_t k = 0;
    while (k < s.n && is_key_char(s.p[k]))
        k++;
    struct span rest = trim((struct span){s.p + k, s.n - k});
    if (k == 0 || rest.n == 0 || rest.p[0] != '=')
        return false;
    struct span value = trim((struct span){rest.p + 1, rest.n - 1});
    if (value.n >= 1 && value.p[0] == '"') {
        value.p++, value.n--;
        const char *close = memchr(value.p, '"', value.n);
        if (!close)
            return false; /* not a value one can rely on, nor edit */
        value.n = (size_t)(close - value.p);
    }
    line->key = (size_t)(s.p - text);
    line->key_len = k;
    line->value = (size_t)(value.p - text);
    line->value_len = value.n;
    return true;
}

static enum vmdk_line_kind classify(const char *text, struct vmdk_line *line)
{
    struct span s = trim((struct span){text + line->off, line->len}), rest = s;
    enum vmdk_access access;
    if (s.n == 0 || s.p[0] == '#')
        return VMDK_LINE_OTHER;
    if (parse_assignment(text, s, line))
        return VMDK_LINE_KEY;
    return parse_access(take_word(&rest), &access) ? VMDK_LINE_EXTENT : VMDK_LINE_OTHER;
}

/* The keys that decide what is read. */
static const char *const once[] = {"version", "CID", "parentCID", "createType",
                                   "parentFileNameHint"};

/* Lines that are not understood are kept and not read. Refuse one that changes what the other lines
 * mean: if "RX 2048 FLAT ..." were left out, all extents behind it would have other addresses. */
static int check_other(const struct vmdk_desc *d, const struct vmdk_line *line, const char *where,
                       struct dr_error *err)
{
    struct span s = trim((struct span){d->text + line->off, line->len}), rest = s;
    uint64_t sectors;
    size_t k = 0;
    if (s.n == 0 || s.p[0] == '#')
        return 0;
    struct span first = take_word(&rest);
    if (parse_number(take_word(&rest), &sectors) && take_word(&rest).n > 0)
        return dr_fail(err, EINVAL,
                       "%s: line %zu: '%.*s' is no access to an extent, expected RW, RDONLY or "
                       "NOACCESS",
                       where, d->n_lines, (int)dr_min(first.n, 40), first.p);
    while (k < s.n && is_key_char(s.p[k]))
        k++;
    for (size_t i = 0; i < sizeof(once) / sizeof(once[0]); i++)
        if (span_is((struct span){s.p, k}, once[i]))
            return dr_fail(err, EINVAL, "%s: line %zu: '%s' without a whole value", where,
                           d->n_lines, once[i]);
    return 0;
}

/* LF or CRLF; a lone CR is no line end. */
static void cut_line(const char *text, size_t len, size_t off, struct vmdk_line *line)
{
    const char *lf = memchr(text + off, '\n', len - off);
    *line = (struct vmdk_line){.off = off};
    line->len = (lf ? (size_t)(lf - text) : len) - off;
    line->end = off + line->len + (lf ? 1 : 0);
    if (line->len > 0 && text[off + line->len - 1] == '\r')
        line->len--;
}

static size_t bom_length(const char *text, size_t len)
{
    return len >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
}

/* Room for one more, doubling. */
static bool grow(void **array, size_t n, size_t item)
{
    if (n & (n - 1))
        return true; /* room up to the next power of two */
    void *p = realloc(*array, (n ? n * 2 : 1) * item);
    if (p)
        *array = p;
    return p != NULL;
}

static int add_line(struct vmdk_desc *d, const struct vmdk_line *line, const char *where,
                    struct dr_error *err)
{
    if (!grow((void **)&d->lines, d->n_lines, sizeof(d->lines[0])))
        return dr_fail_errno(err, ENOMEM, "%s", where);
    d->lines[d->n_lines++] = *line;
    if (line->kind == VMDK_LINE_OTHER)
        return check_other(d, line, where, err);
    if (line->kind != VMDK_LINE_EXTENT)
        return 0;
    if (!grow((void **)&d->extents, d->n_extents, sizeof(d->extents[0])))
        return dr_fail_errno(err, ENOMEM, "%s", where);
    d->n_extents++; /* first, so that free() sees a half made one */
    return parse_extent(&d->extents[d->n_extents - 1],
                        (struct span){d->text + line->off, line->len}, where, d->n_lines, err);
}

/* A key that decides what is read may stand only once: which one holds is anybody's guess. */
static int check_single(const struct vmdk_desc *d, const char *key, const char *where,
                        struct dr_error *err)
{
    unsigned seen = 0;
    for (size_t i = 0; i < d->n_lines; i++)
        if (d->lines[i].kind == VMDK_LINE_KEY &&
            span_is((struct span){d->text + d->lines[i].key, d->lines[i].key_len}, key))
            seen++;
    if (seen > 1)
        return dr_fail(err, EINVAL, "%s: the descriptor has %u lines '%s', expected one", where,
                       seen, key);
    return 0;
}

static int check_keys(const struct vmdk_desc *d, const char *where, struct dr_error *err)
{
    for (size_t i = 0; i < sizeof(once) / sizeof(once[0]); i++) {
        int r = check_single(d, once[i], where, err);
        if (r < 0)
            return r;
    }
    const struct vmdk_line *v = vmdk_desc_find(d, "version");
    if (!v)
        return dr_fail(err, EINVAL, "%s: no line 'version=' in the VMDK descriptor", where);
    if (v->value_len != 1 || d->text[v->value] < '1' || d->text[v->value] > '3')
        return dr_fail(err, ENOTSUP, "%s: VMDK descriptor version '%.*s', expected 1, 2 or 3",
                       where, (int)dr_min(v->value_len, 20), d->text + v->value);
    return 0;
}

/* Everything but the checks of keys; takes text over. */
static int parse_lines(struct vmdk_desc *d, const char *where, struct dr_error *err)
{
    struct vmdk_line line;
    for (size_t off = bom_length(d->text, d->len); off < d->len; off = line.end) {
        cut_line(d->text, d->len, off, &line);
        line.kind = classify(d->text, &line);
        int r = add_line(d, &line, where, err);
        if (r < 0)
            return r;
    }
    return check_keys(d, where, err);
}

int vmdk_desc_parse(struct vmdk_desc *d, const char *where, const void *buf, size_t len,
                    struct dr_error *err)
{
    *d = (struct vmdk_desc){0};
    d->len = strnlen(buf, len);
    if (d->len >= VMDK_DESC_MAX)
        return dr_fail(err, EINVAL, "%s: VMDK descriptor of more than %u bytes", where,
                       VMDK_DESC_MAX);
    d->text = strndup(buf, d->len);
    if (!d->text)
        return dr_fail_errno(err, ENOMEM, "%s", where);
    int r = parse_lines(d, where, err);
    if (r < 0)
        vmdk_desc_free(d);
    return r;
}

void vmdk_desc_free(struct vmdk_desc *d)
{
    for (size_t i = 0; i < d->n_extents; i++)
        free(d->extents[i].name);
    free(d->extents);
    free(d->lines);
    free(d->text);
    *d = (struct vmdk_desc){0};
}

/* ------------------------------------------------------------------ probing */

static bool is_signature(struct span s)
{
    static const char *const first[] = {"# Disk DescriptorFile", "# Disk Descriptor File",
                                        "#Disk DescriptorFile", "#Disk Descriptor File"};
    for (size_t i = 0; i < sizeof(first) / sizeof(first[0]); i++)
        if (span_is(trim(s), first[i]))
            return true;
    return false;
}

static bool is_version(const char *text, const struct vmdk_line *line)
{
    return line->kind == VMDK_LINE_KEY &&
           span_is((struct span){text + line->key, line->key_len}, "version") &&
           line->value_len == 1 && text[line->value] >= '1' && text[line->value] <= '3';
}

int vmdk_desc_probe(const uint8_t *buf, size_t len)
{
    const char *text = (const char *)buf;
    struct vmdk_line line;
    len = strnlen(text, len);
    for (size_t off = bom_length(text, len); off < len; off = line.end) {
        cut_line(text, len, off, &line);
        struct span s = trim((struct span){text + line.off, line.len});
        if (is_signature(s))
            return 90;
        line.kind = classify(text, &line);
        if (is_version(text, &line))
            return 80;
        if (s.n > 0 && s.p[0] != '#')
            return 0;
    }
    return 0;
}

/* ------------------------------------------------------------------ asking */

const struct vmdk_line *vmdk_desc_find(const struct vmdk_desc *d, const char *key)
{
    for (size_t i = 0; i < d->n_lines; i++) {
        const struct vmdk_line *l = &d->lines[i];
        if (l->kind == VMDK_LINE_KEY && span_is((struct span){d->text + l->key, l->key_len}, key))
            return l;
    }
    return NULL;
}

char *vmdk_desc_get(const struct vmdk_desc *d, const char *key)
{
    const struct vmdk_line *l = vmdk_desc_find(d, key);
    return l ? strndup(d->text + l->value, l->value_len) : NULL;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

int vmdk_desc_get_id(const struct vmdk_desc *d, const char *where, const char *key, uint32_t *id,
                     struct dr_error *err)
{
    const struct vmdk_line *l = vmdk_desc_find(d, key);
    if (!l)
        return -ENOENT;
    *id = 0;
    bool good = l->value_len >= 1 && l->value_len <= 8;
    for (size_t i = 0; good && i < l->value_len; i++) {
        int digit = hex_digit(d->text[l->value + i]);
        good = digit >= 0;
        *id = *id << 4 | (uint32_t)(digit & 15);
    }
    if (!good)
        return dr_fail(err, EINVAL, "%s: %s=%.*s: expected 1 to 8 hex digits", where, key,
                       (int)dr_min(l->value_len, 40), d->text + l->value);
    return 0;
}
