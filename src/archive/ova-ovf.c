/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/ova-ovf.h"

#include <ctype.h>
#include <errno.h>
#include <libxml/xmlreader.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/loaded.h"

/* ------------------------------------------------------------------ numbers */

/* Digits, as far as they go; false: none, or too many. */
static bool take_number(const char **text, uint64_t *v)
{
    const char *p = *text;
    *v = 0;
    for (; isdigit((unsigned char)*p); p++)
        if (__builtin_mul_overflow(*v, UINT64_C(10), v) ||
            __builtin_add_overflow(*v, (uint64_t)(*p - '0'), v))
            return false;
    bool any = p > *text;
    *text = p;
    return any;
}

static bool whole_number(const char *text, uint64_t *v)
{
    while (isspace((unsigned char)*text))
        text++;
    if (!take_number(&text, v))
        return false;
    return text[strspn(text, " \t\r\n")] == '\0';
}

static const char *skip_space(const char *p)
{
    return p + strspn(p, " \t\r\n");
}

/* "2^30", "1024" */
static bool take_factor(const char **text, uint64_t *v)
{
    uint64_t base, power;
    if (!take_number(text, &base))
        return false;
    *text = skip_space(*text);
    *v = base;
    if (**text != '^')
        return true;
    *text = skip_space(*text + 1);
    if (!take_number(text, &power) || power > 63)
        return false;
    for (*v = 1; power > 0; power--)
        if (__builtin_mul_overflow(*v, base, v))
            return false;
    return true;
}

bool ovf_unit(const char *text, uint64_t *bytes)
{
    static const struct {
        const char *word;
        uint64_t bytes;
    } words[] = {{"byte", 1},
                 {"bytes", 1},
                 {"kilobytes", 1u << 10},
                 {"megabytes", 1u << 20},
                 {"gigabytes", 1u << 30},
                 {"kb", 1u << 10},
                 {"mb", 1u << 20},
                 {"gb", 1u << 30}};
    *bytes = 1;
    if (!text || !*skip_space(text))
        return true;
    for (const char *p = skip_space(text);;) {
        uint64_t factor = 0;
        size_t n = strcspn(p, "* \t\r\n");
        for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
            if (strlen(words[i].word) == n && strncasecmp(p, words[i].word, n) == 0)
                factor = words[i].bytes;
        if (factor)
            p += n;
        else if (!take_factor(&p, &factor) || factor == 0)
            return false;
        if (__builtin_mul_overflow(*bytes, factor, bytes))
            return false;
        p = skip_space(p);
        if (*p == '\0')
            return true;
        if (*p != '*')
            return false;
        p = skip_space(p + 1);
    }
}

/* ------------------------------------------------------------------ elements */

struct parsing {
    const char *name;
    struct ovf *ovf;
    struct dr_error *err;
    xmlTextReader *reader;
    bool in_envelope, in_system; /* in a VirtualSystem, whose name counts */
    int line;                    /* of the fault that libxml2 told of first */
    bool no_memory;              /* an attribute may have been lost */
    char fault[200];
};

static int no_memory(const struct parsing *p)
{
    return dr_fail(p->err, ENOMEM, "%s: out of memory", p->name);
}

static int line_of(const struct parsing *p)
{
    return xmlTextReaderGetParserLineNumber(p->reader);
}

/* The value of the attribute, whatever its namespace; malloc'ed, NULL = it has none, or there is no
 * memory, which p->no_memory tells. */
static char *attribute(struct parsing *p, const char *name)
{
    char *out = NULL;
    int r = xmlTextReaderMoveToFirstAttribute(p->reader);
    for (; r == 1; r = xmlTextReaderMoveToNextAttribute(p->reader)) {
        const char *own = (const char *)xmlTextReaderConstLocalName(p->reader);
        if (own && (xmlTextReaderIsNamespaceDecl(p->reader) || strcmp(own, name) != 0))
            continue;
        const char *value = own ? (const char *)xmlTextReaderConstValue(p->reader) : NULL;
        out = value ? strdup(value) : NULL;
        p->no_memory |= !out;
        break;
    }
    p->no_memory |= r < 0;
    xmlTextReaderMoveToElement(p->reader);
    return out;
}

static int refuse_number(const struct parsing *p, const char *element, const char *key,
                         const char *value)
{
    return dr_fail(p->err, EINVAL, "%s: line %d: %s of %s is \"%.60s\", expected a number of bytes",
                   p->name, line_of(p), key, element, value);
}

static int take_file(struct parsing *p)
{
    struct ovf *ovf = p->ovf;
    if (ovf->n_files == OVF_FILES_MAX)
        return dr_fail(p->err, E2BIG, "%s: line %d: more than %u files", p->name, line_of(p),
                       OVF_FILES_MAX);
    struct ovf_file *files = reallocarray(ovf->files, ovf->n_files + 1, sizeof(*files));
    if (!files)
        return no_memory(p);
    ovf->files = files;
    struct ovf_file *f = &files[ovf->n_files++];
    *f = (struct ovf_file){.id = attribute(p, "id"), .href = attribute(p, "href")};
    if (!f->id || !f->href || !*f->href)
        return dr_fail(p->err, EINVAL, "%s: line %d: a File without %s", p->name, line_of(p),
                       f->id ? "href" : "id");
    f->compression = attribute(p, "compression");
    if (f->compression && (!*f->compression || strcasecmp(f->compression, "identity") == 0))
        free(DR_STEAL(f->compression));
    CLEANUP_FREE char *size = attribute(p, "size"), *chunk = attribute(p, "chunkSize");
    f->has_size = size;
    if (size && !whole_number(size, &f->size))
        return refuse_number(p, "File", "size", size);
    if (chunk && !whole_number(chunk, &f->chunk))
        return refuse_number(p, "File", "chunkSize", chunk);
    return 0;
}

/* A capacity may be the name of a property, "${...}", that whoever deploys the machine sets. */
static int take_capacity(struct parsing *p, struct ovf_disk *d)
{
    CLEANUP_FREE char *capacity = attribute(p, "capacity");
    CLEANUP_FREE char *units = attribute(p, "capacityAllocationUnits");
    uint64_t unit = 1;
    if (!capacity)
        return 0;
    if (strncmp(capacity, "${", 2) == 0) {
        d->odd_capacity = DR_STEAL(capacity);
        return 0;
    }
    if (!whole_number(capacity, &d->capacity))
        return refuse_number(p, "Disk", "capacity", capacity);
    if (!ovf_unit(units, &unit))
        return dr_fail(p->err, EINVAL,
                       "%s: line %d: capacityAllocationUnits is \"%.60s\", expected such as "
                       "\"byte * 2^30\"",
                       p->name, line_of(p), units);
    if (__builtin_mul_overflow(d->capacity, unit, &d->capacity) || d->capacity > INT64_MAX)
        return dr_fail(p->err, EINVAL, "%s: line %d: a capacity of %.30s times %llu bytes", p->name,
                       line_of(p), capacity, (unsigned long long)unit);
    d->has_capacity = true;
    return 0;
}

static int take_disk(struct parsing *p)
{
    struct ovf *ovf = p->ovf;
    if (ovf->n_disks == OVF_DISKS_MAX)
        return dr_fail(p->err, E2BIG, "%s: line %d: more than %u disks", p->name, line_of(p),
                       OVF_DISKS_MAX);
    struct ovf_disk *disks = reallocarray(ovf->disks, ovf->n_disks + 1, sizeof(*disks));
    if (!disks)
        return no_memory(p);
    ovf->disks = disks;
    struct ovf_disk *d = &disks[ovf->n_disks++];
    *d = (struct ovf_disk){
        .id = attribute(p, "diskId"),
        .file_ref = attribute(p, "fileRef"),
        .format = attribute(p, "format"),
        .parent = attribute(p, "parentRef"),
    };
    if (!d->id)
        return dr_fail(p->err, EINVAL, "%s: line %d: a Disk without diskId", p->name, line_of(p));
    return take_capacity(p, d);
}

static void take_name(struct parsing *p)
{
    xmlChar *text = p->ovf->name ? NULL : xmlTextReaderReadString(p->reader);
    if (text)
        p->no_memory |= !(p->ovf->name = strdup((const char *)text));
    xmlFreeFunc release; /* what xmlFree() calls; that is a variable of the library */
    xmlMemGet(&release, NULL, NULL, NULL);
    release(text);
}

static int take_element(struct parsing *p)
{
    const char *name = (const char *)xmlTextReaderConstLocalName(p->reader);
    if (!name)
        return no_memory(p);
    int depth = xmlTextReaderDepth(p->reader);
    if (depth == 0) {
        p->in_envelope = strcmp(name, "Envelope") == 0;
        return p->in_envelope ? 0
                              : dr_fail(p->err, EINVAL,
                                        "%s: no OVF descriptor: it begins with <%.60s>, expected "
                                        "<Envelope>",
                                        p->name, name);
    }
    int r = 0;
    if (depth == 2 && strcmp(name, "File") == 0)
        r = take_file(p);
    else if (depth == 2 && strcmp(name, "Disk") == 0)
        r = take_disk(p);
    else if (strcmp(name, "VirtualSystem") == 0)
        p->in_system = true;
    else if (p->in_system && strcmp(name, "Name") == 0)
        take_name(p);
    return p->no_memory ? no_memory(p) : r; /* what r says then may be wrong */
}

static int take_node(struct parsing *p)
{
    switch (xmlTextReaderNodeType(p->reader)) {
    case XML_READER_TYPE_DOCUMENT_TYPE:
    case XML_READER_TYPE_ENTITY_REFERENCE:
        return dr_fail(p->err, EINVAL,
                       "%s: line %d: a document type or an entity, which no OVF "
                       "descriptor has",
                       p->name, line_of(p));
    case XML_READER_TYPE_ELEMENT:
        return take_element(p);
    default:
        return 0;
    }
}

/* ------------------------------------------------------------------ the document */

static void note_fault(void *user, xmlError *e)
{
    struct parsing *p = user;
    p->no_memory |= e && e->code == XML_ERR_NO_MEMORY;
    if (p->fault[0] || !e || !e->message)
        return;
    p->line = e->line > 0 ? e->line : 1; /* a fault of the encoding has none */
    snprintf(p->fault, sizeof(p->fault), "%s", e->message);
    p->fault[strcspn(p->fault, "\r\n")] = '\0';
}

static void say_nothing(void *user, const char *fmt, ...)
{
    (void)user;
    (void)fmt;
}

/* What belongs to no reader libxml2 prints on standard error, unless this thread says otherwise. */
struct printing {
    xmlGenericErrorFunc generic;
    xmlStructuredErrorFunc structured;
    void *generic_user, *structured_user;
};

static void silence(struct printing *before, struct parsing *p)
{
    *before = (struct printing){xmlGenericError, xmlStructuredError, xmlGenericErrorContext,
                                xmlStructuredErrorContext};
    xmlSetGenericErrorFunc(NULL, say_nothing);
    xmlSetStructuredErrorFunc(p, note_fault);
}

static void print_as(const struct printing *before)
{
    xmlSetGenericErrorFunc(before->generic_user, before->generic);
    xmlSetStructuredErrorFunc(before->structured_user, before->structured);
}

static int walk(struct parsing *p)
{
    int r = 0, more;
    while ((more = xmlTextReaderRead(p->reader)) == 1 && r == 0)
        r = take_node(p);
    if (r == 0 && more < 0)
        return dr_fail(p->err, EINVAL, "%s: line %d: no well-formed XML: %s", p->name, p->line,
                       p->fault[0] ? p->fault : "damaged");
    return r;
}

/* Before a byte of it is parsed: what a document type holds would be parsed as a whole. */
static bool has_doctype(const char *text, size_t len)
{
    return memmem(text, len, "<!DOCTYPE", 9) || memmem(text, len, "<!ENTITY", 8);
}

int ovf_parse(const char *name, const char *text, size_t len, struct ovf *ovf, struct dr_error *err)
{
    struct parsing p = {.name = name, .ovf = ovf, .err = err};
    struct printing before;
    *ovf = (struct ovf){0};
    if (len > OVF_TEXT_MAX)
        return dr_fail(err, EFBIG, "%s: %zu bytes are no OVF descriptor, which has at most %u",
                       name, len, OVF_TEXT_MAX);
    if (has_doctype(text, len))
        return dr_fail(err, EINVAL, "%s: a document type, which no OVF descriptor has", name);
    int loaded = dr_load_xml(err);
    if (loaded < 0)
        return dr_prefix(err, loaded, "%s", name);
    silence(&before, &p);
    p.reader = xmlReaderForMemory(text, (int)len, NULL, NULL, XML_PARSE_NONET | XML_PARSE_COMPACT);
    if (p.reader)
        xmlTextReaderSetStructuredErrorHandler(p.reader, note_fault, &p);
    int r = p.reader ? walk(&p) : no_memory(&p);
    xmlFreeTextReader(p.reader);
    print_as(&before);
    if (r == 0 || !p.no_memory)
        return r;
    dr_error_reset(err); /* what seemed to be wrong with the text is not */
    return no_memory(&p);
}

void ovf_free(struct ovf *ovf)
{
    for (size_t i = 0; i < ovf->n_files; i++) {
        free(ovf->files[i].id);
        free(ovf->files[i].href);
        free(ovf->files[i].compression);
    }
    for (size_t i = 0; i < ovf->n_disks; i++) {
        free(ovf->disks[i].id);
        free(ovf->disks[i].file_ref);
        free(ovf->disks[i].format);
        free(ovf->disks[i].parent);
        free(ovf->disks[i].odd_capacity);
    }
    free(ovf->files);
    free(ovf->disks);
    free(ovf->name);
    *ovf = (struct ovf){0};
}

const struct ovf_file *ovf_file_by_id(const struct ovf *ovf, const char *id)
{
    for (size_t i = 0; i < ovf->n_files; i++)
        if (strcmp(ovf->files[i].id, id) == 0)
            return &ovf->files[i];
    return NULL;
}
