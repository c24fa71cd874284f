/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/ova.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "storage/source.h"

#define HEAD 4096u

/* ------------------------------------------------------------------ open, close */

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), k = strlen(suffix);
    return n > k && strcasecmp(name + n - k, suffix) == 0;
}

/* The text of a range of the file; malloc'ed. */
static int read_text(const struct ova *ova, const char *name, uint64_t off, uint64_t len,
                     char **text, struct dr_error *err)
{
    *text = NULL;
    if (len > OVF_TEXT_MAX)
        return dr_fail(err, EFBIG, "%s: %s has %" PRIu64 " bytes, an OVF descriptor has at most %u",
                       ova->file->path, name, len, OVF_TEXT_MAX);
    *text = malloc((size_t)len + 1);
    if (!*text)
        return dr_fail(err, ENOMEM, "%s: out of memory", ova->file->path);
    (*text)[len] = '\0';
    return dr_file_pread(ova->file, *text, off, (size_t)len, err);
}

static int open_descriptor(struct ova *ova, const char *shown, uint64_t off, uint64_t len,
                           struct dr_error *err)
{
    CLEANUP_FREE char *text = NULL;
    int r = read_text(ova, shown, off, len, &text, err);
    return r < 0 ? r : ovf_parse(shown, text, (size_t)len, &ova->ovf, err);
}

static int open_tar(struct ova *ova, struct dr_error *err)
{
    CLEANUP_FREE char *shown = NULL;
    int r = ova_tar_read(ova->file, &ova->tar, err);
    for (size_t i = 0; r == 0 && i < ova->tar.n; i++) {
        const struct ova_member *m = &ova->tar.members[i];
        if (m->odd || !ends_with(m->name, ".ovf"))
            continue;
        ova->descriptor = m->name;
        if (asprintf(&shown, "%s#%s", ova->file->path, m->name) < 0)
            return dr_fail(err, ENOMEM, "%s: out of memory", ova->file->path);
        return open_descriptor(ova, shown, m->off, m->size, err);
    }
    return r;
}

int ova_open(struct dr_file *file, ova_beside beside, void *user, struct ova *ova,
             struct dr_error *err)
{
    uint8_t head[HEAD];
    size_t got = 0;
    *ova = (struct ova){.file = file, .beside = beside, .user = user};
    int r = dr_file_pread_short(file, head, 0, sizeof(head), &got, err);
    if (r < 0)
        return r;
    const char *packer = dr_source_compression_of(head, got);
    if (packer)
        return dr_fail(err, ENOTSUP,
                       "%s: is compressed by %s, but the disks of a machine are read where they "
                       "stand: unpack it first",
                       file->path, packer);
    ova->is_tar = ova_tar_begins(head, got) || !beside;
    if (ova->is_tar)
        return open_tar(ova, err);
    ova->descriptor = file->path;
    return open_descriptor(ova, file->path, 0, dr_file_size(file), err);
}

void ova_close(struct ova *ova)
{
    ova_tar_free(&ova->tar);
    ovf_free(&ova->ovf);
    ova->descriptor = NULL;
}

/* ------------------------------------------------------------------ names */

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* A href is a URI: "my%20disk.vmdk". malloc'ed. */
static char *decode_href(const char *href)
{
    char *out = malloc(strlen(href) + 1), *o = out;
    if (!out)
        return NULL;
    for (const char *p = href; *p; p++) {
        if (*p == '%' && hex(p[1]) >= 0 && hex(p[2]) >= 0 && (p[1] | p[2]) != '0') {
            *o++ = (char)(hex(p[1]) * 16 + hex(p[2]));
            p += 2;
        } else {
            *o++ = *p;
        }
    }
    *o = '\0';
    return out;
}

static bool same_name(const char *href, const char *name)
{
    return strcmp(ova_plain_name(href), ova_plain_name(name)) == 0;
}

static struct ova_found found_disk(const struct ova *ova, const struct ovf_disk *d)
{
    struct ova_found found = {.disk = d, .file = ovf_file_by_id(&ova->ovf, d->file_ref)};
    found.name = found.file ? ova_plain_name(found.file->href) : d->file_ref;
    return found;
}

bool ova_disk_at(const struct ova *ova, size_t n, struct ova_found *found)
{
    for (size_t i = 0; i < ova->ovf.n_disks; i++)
        if (ova->ovf.disks[i].file_ref && n-- == 0) {
            *found = found_disk(ova, &ova->ovf.disks[i]);
            return true;
        }
    return false;
}

size_t ova_disk_count(const struct ova *ova)
{
    size_t n = 0;
    for (size_t i = 0; i < ova->ovf.n_disks; i++)
        n += ova->ovf.disks[i].file_ref != NULL;
    return n;
}

void ova_list_disks(const struct ova *ova, const char *prefix, char *text, size_t size)
{
    struct ova_found d;
    size_t n = 0;
    text[0] = '\0';
    for (size_t i = 0; ova_disk_at(ova, i, &d); i++) {
        if (n + strlen(prefix) + strlen(d.name) + 8 > size) {
            if (n + 6 <= size)
                snprintf(text + n, size - n, ", ...");
            return;
        }
        n += (size_t)snprintf(text + n, size - n, "%s%s%s", n ? ", " : "", prefix, d.name);
    }
}

static bool is_disk_called(const struct ova_found *d, const char *name, int how)
{
    switch (how) {
    case 0:
        return same_name(d->name, name);
    case 1:
        return strcmp(d->disk->id, name) == 0;
    default:
        return strcmp(d->disk->file_ref, name) == 0;
    }
}

int ova_find(const struct ova *ova, const char *name, struct ova_found *found, struct dr_error *err)
{
    char text[400];
    int r;
    for (int how = 0; how < 3; how++)
        for (size_t i = 0; ova_disk_at(ova, i, found); i++)
            if (is_disk_called(found, name, how))
                return 0;
    *found = (struct ova_found){.name = name};
    for (size_t i = 0; i < ova->ovf.n_files; i++)
        if (same_name(ova->ovf.files[i].href, name)) {
            found->file = &ova->ovf.files[i];
            return 0;
        }
    if (ova->is_tar && (ova_tar_find(&ova->tar, name, &r) || r < 0))
        return 0;
    ova_list_disks(ova, "", text, sizeof(text));
    return dr_fail(err, ENOENT, "%s: has no disk '%.200s', only: %s", ova->file->path, name,
                   text[0] ? text : "none at all");
}

/* ------------------------------------------------------------------ bytes */

/* The pieces of one file, while they are gathered. */
struct pieces {
    const struct ova *ova;
    struct dr_window_part *parts;
    size_t n;
    bool cut;
};

static void pieces_free(struct pieces *p)
{
    for (size_t i = 0; i < p->n; i++)
        dr_file_unref(p->parts[i].file);
    free(p->parts);
}

static int add_part(struct pieces *p, struct dr_file *file, uint64_t off, uint64_t len,
                    struct dr_error *err)
{
    struct dr_window_part *more = reallocarray(p->parts, p->n + 1, sizeof(*more));
    if (!more) {
        dr_file_unref(file);
        return dr_fail(err, ENOMEM, "%s: out of memory", p->ova->file->path);
    }
    p->parts = more;
    more[p->n++] = (struct dr_window_part){file, off, len};
    return 0;
}

static int add_member(struct pieces *p, const char *name, struct dr_error *err)
{
    const struct ova *ova = p->ova;
    uint64_t size = dr_file_size(ova->file);
    int r;
    const struct ova_member *m = ova_tar_find(&ova->tar, name, &r);
    if (r < 0)
        return dr_fail(err, -r, "%s: has two members named '%.200s'", ova->file->path, name);
    if (!m)
        return dr_fail(err, ENOENT, "%s: has no member '%.200s'%s%s", ova->file->path, name,
                       ova->tar.problem ? ": " : "", ova->tar.problem ? ova->tar.problem : "");
    if (m->odd)
        return dr_fail(err, ENOTSUP, "%s: '%.200s' %s", ova->file->path, name, m->odd);
    if (!p->cut && !dr_inside(m->off, m->size, size))
        return dr_fail(
            err, EIO, "%s: ends at %" PRIu64 ", expected %" PRIu64 " bytes of '%.200s' at %" PRIu64,
            ova->file->path, size, m->size, name, m->off);
    return add_part(p, dr_file_ref(ova->file), m->off, m->size, err);
}

static int add_piece(struct pieces *p, const char *name, struct dr_error *err)
{
    struct dr_file *file = NULL;
    if (p->ova->is_tar)
        return add_member(p, name, err);
    int r = p->ova->beside(p->ova->user, name, &file, err);
    return r < 0 ? r : add_part(p, file, 0, dr_file_size(file), err);
}

/* By its name as it is written, and then, if the descriptor has it, as the URI that it is. */
static int add_named(struct pieces *p, const char *href, bool is_uri, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = add_piece(p, href, &why);
    if (r == -ENOENT && is_uri && strchr(href, '%')) {
        CLEANUP_FREE char *name = decode_href(href);
        struct dr_error other = DR_ERROR_INIT;
        r = name ? add_piece(p, name, &other)
                 : dr_fail(&other, ENOMEM, "%s: out of memory", p->ova->file->path);
        why = r == -ENOENT ? why : other;
    }
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

char *ova_piece_name(const struct ova_found *found, size_t i)
{
    char *name = NULL;
    if (!found->file || !found->file->chunk)
        return strdup(found->name);
    return asprintf(&name, "%s.%09zu", found->file->href, i) < 0 ? NULL : name;
}

/* HREF.000000000 and on: as many as the size wants, or as there are. */
static int add_chunks(struct pieces *p, const struct ovf_file *f, struct dr_error *err)
{
    uint64_t wanted = f->has_size ? dr_div_up(f->size, f->chunk) : 0;
    if (wanted > OVA_MEMBERS_MAX)
        return dr_fail(err, E2BIG,
                       "%s: '%.200s' should be in %" PRIu64 " pieces, at most %u are "
                       "read",
                       p->ova->file->path, f->href, wanted, OVA_MEMBERS_MAX);
    for (unsigned i = 0; i < (wanted ? wanted : OVA_MEMBERS_MAX); i++) {
        struct dr_error why = DR_ERROR_INIT;
        CLEANUP_FREE char *name = NULL;
        if (asprintf(&name, "%s.%09u", f->href, i) < 0)
            return dr_fail(err, ENOMEM, "%s: out of memory", p->ova->file->path);
        int r = add_named(p, name, true, &why);
        if (r == -ENOENT && i > 0 && (!wanted || p->cut))
            return 0;
        if (r < 0)
            return dr_fail(err, -r, "%s", why.text);
        if (i + 1 < wanted && !p->cut && p->parts[i].len != f->chunk)
            return dr_fail(err, EIO,
                           "%s: the piece '%.200s' has %" PRIu64 " bytes, expected %" PRIu64,
                           p->ova->file->path, name, p->parts[i].len, f->chunk);
    }
    return 0;
}

static int gather(struct pieces *p, const struct ova_found *found, struct dr_error *err)
{
    if (found->disk && !found->file)
        return dr_fail(err, ENOENT,
                       "%s: disk '%.100s' refers to a file '%.100s', which the descriptor does not "
                       "list",
                       p->ova->file->path, found->disk->id, found->disk->file_ref);
    return found->file && found->file->chunk ? add_chunks(p, found->file, err)
                                             : add_named(p, found->name, found->file, err);
}

static uint64_t length_of(const struct pieces *p)
{
    uint64_t sum = 0; /* each is below 2^63, and a window refuses more than that */
    for (size_t i = 0; i < p->n; i++)
        sum = p->parts[i].len > UINT64_MAX - sum ? UINT64_MAX : sum + p->parts[i].len;
    return sum;
}

static int check_length(const struct pieces *p, const struct ova_found *found, struct dr_error *err)
{
    const struct ovf_file *f = found->file;
    if (p->cut || !f || !f->has_size || f->size == length_of(p))
        return 0;
    return dr_fail(err, EIO, "%s: '%.200s' has %" PRIu64 " bytes, the descriptor says %" PRIu64,
                   p->ova->file->path, found->name, length_of(p), f->size);
}

int ova_file_open(const struct ova *ova, const struct ova_found *found, bool cut,
                  struct dr_file **file, struct dr_error *err)
{
    __attribute__((cleanup(pieces_free))) struct pieces p = {.ova = ova, .cut = cut};
    CLEANUP_FREE char *shown = NULL;
    *file = NULL;
    int r = gather(&p, found, err);
    if (r == 0)
        r = check_length(&p, found, err);
    if (r < 0)
        return r;
    if (!ova->is_tar && p.n == 1) {
        *file = dr_file_ref(p.parts[0].file);
        return 0;
    }
    if (asprintf(&shown, "%s#%s", ova->file->path, found->name) < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", ova->file->path);
    return dr_file_window(shown, p.parts, p.n, file, err);
}

int ova_file_pieces(const struct ova *ova, const struct ova_found *found, size_t *n,
                    struct dr_error *err)
{
    __attribute__((cleanup(pieces_free))) struct pieces p = {.ova = ova};
    int r = gather(&p, found, err);
    *n = p.n;
    return r;
}

int ova_file_stored(const struct ova *ova, const struct ova_found *found, uint64_t *bytes,
                    struct dr_error *err)
{
    __attribute__((cleanup(pieces_free))) struct pieces p = {.ova = ova};
    int r = gather(&p, found, err);
    *bytes = r == 0 ? length_of(&p) : 0;
    return r < 0 ? r : check_length(&p, found, err);
}
