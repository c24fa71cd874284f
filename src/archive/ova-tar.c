/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "archive/ova-tar.h"

#include <archive.h>
#include <archive_entry.h>
#include <inttypes.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/loaded.h"

#define BLOCK 512u        /* of a tar */
#define PIECE (16u << 10) /* read at once: most of a tar is passed over */

/* ------------------------------------------------------------------ the bytes for libarchive */

struct feed {
    struct dr_file *file;
    uint64_t pos;
    struct dr_error err; /* what reading failed with */
    uint8_t buf[PIECE];
};

static la_ssize_t feed_read(struct archive *a, void *user, const void **buf)
{
    struct feed *f = user;
    size_t got = 0;
    *buf = f->buf;
    int r = dr_file_pread_short(f->file, f->buf, f->pos, PIECE, &got, &f->err);
    if (r < 0) {
        archive_set_error(a, -r, "%s", f->err.text);
        return -1;
    }
    f->pos += got;
    return (la_ssize_t)got;
}

/* Never past the end: libarchive reads on, and sees there that the file is cut. */
static la_int64_t feed_skip(struct archive *a, void *user, la_int64_t request)
{
    struct feed *f = user;
    uint64_t size = dr_file_size(f->file), left = size > f->pos ? size - f->pos : 0;
    (void)a;
    if (request <= 0)
        return 0;
    uint64_t n = dr_min((uint64_t)request, left);
    f->pos += n;
    return (la_int64_t)n;
}

/* ------------------------------------------------------------------ members */

const char *ova_plain_name(const char *name)
{
    while (name[0] == '.' && name[1] == '/')
        for (name++; *name == '/';)
            name++;
    return name;
}

/* Names of pax headers are in UTF-8, others are bytes. */
static const char *name_of(struct archive_entry *entry)
{
    const char *name = archive_entry_pathname(entry);
    return name ? name : archive_entry_pathname_utf8(entry);
}

static const char *oddity(struct archive_entry *entry)
{
    if (archive_entry_hardlink(entry) || archive_entry_filetype(entry) != AE_IFREG)
        return "is a link or a directory there, no file";
    if (archive_entry_sparse_count(entry) > 0)
        return "is stored there without its holes (sparse); pack the archive again without that";
    return archive_entry_size_is_set(entry) ? NULL : "has no size there";
}

static int add(struct ova_tar *t, struct archive *a, struct archive_entry *entry,
               const struct dr_file *f, struct dr_error *err)
{
    const char *name = name_of(entry);
    if (name && strlen(name) > OVA_NAME_MAX)
        name = NULL; /* nothing refers to it */
    int64_t size = archive_entry_size(entry);
    if (t->n == OVA_MEMBERS_MAX)
        return dr_fail(err, E2BIG, "%s: the archive has more than %u members", f->path,
                       OVA_MEMBERS_MAX);
    struct ova_member *more = reallocarray(t->members, t->n + 1, sizeof(*more));
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    t->members = more;
    more[t->n] = (struct ova_member){
        .name = strdup(name ? ova_plain_name(name) : ""),
        .off = (uint64_t)archive_filter_bytes(a, 0),
        .size = size > 0 ? (uint64_t)size : 0,
        .odd = oddity(entry),
    };
    if (!more[t->n].name)
        return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    t->n++;
    return 0;
}

/* The next header stands where the bytes of the last member end, or they are not all there is:
 * whatever way of leaving out holes made that. */
static void check_last(struct ova_tar *t, uint64_t next)
{
    struct ova_member *last = t->n > 0 ? &t->members[t->n - 1] : NULL;
    if (last && !last->odd && last->off + dr_round_up(last->size, BLOCK) != next)
        last->odd = "is not stored there in one piece (sparse?); pack the archive again";
}

static int walk(struct ova_tar *t, struct archive *a, const struct feed *feed, struct dr_error *err)
{
    const struct dr_file *f = feed->file;
    for (;;) {
        struct archive_entry *entry;
        int r = archive_read_next_header(a, &entry);
        uint64_t at = (uint64_t)archive_read_header_position(a);
        if (r == ARCHIVE_EOF || r == ARCHIVE_OK || r == ARCHIVE_WARN)
            check_last(t, at);
        if (r == ARCHIVE_EOF)
            return 0;
        if (r != ARCHIVE_OK && r != ARCHIVE_WARN) {
            if (feed->err.errnum)
                return dr_fail(err, feed->err.errnum, "%s", feed->err.text);
            if (archive_errno(a) == ENOMEM)
                return dr_fail(err, ENOMEM, "%s: out of memory", f->path);
            const char *why = archive_error_string(a);
            if (t->n == 0)
                return dr_fail(err, EINVAL, "%s: no tar: %s", f->path, why ? why : "damaged");
            if (asprintf(&t->problem,
                         "the archive is damaged or cut off behind offset %" PRIu64
                         " (the file ends at %" PRIu64 "): %s",
                         t->members[t->n - 1].off, dr_file_size(f), why ? why : "no header") < 0)
                t->problem = NULL;
            return t->problem ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", f->path);
        }
        r = add(t, a, entry, f, err);
        if (r < 0)
            return r;
    }
}

/* libarchive converts names to the charset of the locale. */
static locale_t use_utf8(void)
{
    locale_t utf8 = newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0);
    return utf8;
}

int ova_tar_read(struct dr_file *f, struct ova_tar *t, struct dr_error *err)
{
    *t = (struct ova_tar){0};
    int loaded = dr_load_archive(err);
    if (loaded < 0)
        return dr_prefix(err, loaded, "%s", f->path);
    CLEANUP_FREE struct feed *feed = calloc(1, sizeof(*feed));
    struct archive *a = archive_read_new();
    locale_t utf8 = use_utf8(), before = utf8 ? uselocale(utf8) : (locale_t)0;
    int r = feed && a ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", f->path);
    if (r == 0) {
        feed->file = f;
        archive_read_support_format_tar(a);
        archive_read_set_callback_data(a, feed);
        archive_read_set_read_callback(a, feed_read);
        archive_read_set_skip_callback(a, feed_skip);
        if (archive_read_open1(a) == ARCHIVE_OK)
            r = walk(t, a, feed, err);
        else
            r = dr_fail(err, EINVAL, "%s: no tar: %s", f->path, archive_error_string(a));
    }
    archive_read_free(a);
    if (utf8) {
        uselocale(before);
        freelocale(utf8);
    }
    return r;
}

void ova_tar_free(struct ova_tar *t)
{
    for (size_t i = 0; i < t->n; i++)
        free(t->members[i].name);
    free(t->members);
    free(t->problem);
    *t = (struct ova_tar){0};
}

const struct ova_member *ova_tar_find(const struct ova_tar *t, const char *name, int *r)
{
    const struct ova_member *found = NULL;
    *r = 0;
    name = ova_plain_name(name);
    for (size_t i = 0; i < t->n; i++) {
        if (strcmp(t->members[i].name, name) != 0)
            continue;
        if (found)
            *r = -ENOTUNIQ;
        found = &t->members[i];
    }
    return *r < 0 ? NULL : found;
}

/* ------------------------------------------------------------------ what a file begins with */

enum { AT_NAME = 0, NAME_LEN = 100, AT_SIZE = 124, AT_SUM = 148, SUM_LEN = 8, AT_TYPE = 156 };

static uint64_t octal(const uint8_t *p, size_t len)
{
    uint64_t v = 0;
    size_t i = 0;
    while (i < len && p[i] == ' ')
        i++;
    for (; i < len && p[i] >= '0' && p[i] <= '7'; i++)
        v = v * 8 + (p[i] - '0');
    return v;
}

bool ova_tar_begins(const uint8_t *buf, size_t len)
{
    uint64_t sum = 0;
    if (len < BLOCK || buf[0] == '\0')
        return false;
    for (size_t i = 0; i < BLOCK; i++)
        sum += i >= AT_SUM && i < AT_SUM + SUM_LEN ? ' ' : buf[i];
    return octal(buf + AT_SUM, SUM_LEN) == sum;
}

/* Headers that only say something of the next member are passed over, as far as buf has them. */
bool ova_tar_begins_with_ovf(const uint8_t *buf, size_t len)
{
    while (ova_tar_begins(buf, len)) {
        size_t n = strnlen((const char *)buf, NAME_LEN);
        uint8_t type = buf[AT_TYPE];
        if (type != 'x' && type != 'g' && type != 'L' && type != 'K')
            return n > 4 && memcmp(buf + n - 4, ".ovf", 4) == 0;
        uint64_t skip = BLOCK + dr_round_up(octal(buf + AT_SIZE, 12), BLOCK);
        if (skip >= len)
            return false;
        buf += skip;
        len -= skip;
    }
    return false;
}
