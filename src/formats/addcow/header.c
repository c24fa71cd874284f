/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Both layouts' headers, and the drafts between them, which share their magic numbers and are
 * refused by name. Nothing is accepted on its magic number alone. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

static const uint8_t magic_v7[8] = {'A', 'D', 'D', '_', 'C', 'O', 'W', 0xff};
static const uint8_t magic_v20[4] = {'A', 'C', 'O', 'W'};

enum { V7_VERSION = 8 };

enum {
    V20_BACKING_OFF = 4,
    V20_BACKING_LEN = 8,
    V20_IMAGE_OFF = 12,
    V20_IMAGE_LEN = 16,
    V20_CLUSTER_BITS = 20,
    V20_FEATURES = 24,
    V20_COMPAT = 32,
    V20_HEADER_SIZE = 40,
    V20_BACKING_FMT = 44,
    V20_IMAGE_FMT = 60,
    V20_STRINGS = 76,
};
#define V20_ALL_ALLOCATED 1u
#define V20_FMT_LEN       16u
#define V20_NAME_MAX      4096u

#define HEAD_MAX 4096u

static bool has_magic(const uint8_t *buf, size_t len, const uint8_t *magic, size_t n)
{
    return len >= n && memcmp(buf, magic, n) == 0;
}

/* ------------------------------------------------------------------ version 1 */

/* NULL, or what is wrong with a NUL-padded name. */
static const char *field_problem(const uint8_t *field)
{
    const uint8_t *nul = memchr(field, 0, ADDCOW_NAME_FIELD);
    if (!nul)
        return "has no NUL at its end";
    if (!dr_is_zero(nul, (size_t)(field + ADDCOW_NAME_FIELD - nul)))
        return "has bytes behind its NUL";
    return NULL;
}

static bool v7_fits(const uint8_t *buf, size_t len)
{
    return len >= ADDCOW_HEADER_SIZE && get_be32(buf + V7_VERSION) == 1 &&
           !field_problem(buf + ADDCOW_BACKING_AT) && !field_problem(buf + ADDCOW_IMAGE_AT) &&
           buf[ADDCOW_IMAGE_AT] != 0 &&
           dr_is_zero(buf + ADDCOW_RESERVED_AT, ADDCOW_HEADER_SIZE - ADDCOW_RESERVED_AT);
}

static int v7_check_version(const uint8_t *buf, const char *path, struct dr_error *err)
{
    if (get_be32(buf + V7_VERSION) == 1)
        return 0;
    if (get_le32(buf + V7_VERSION) == 1)
        return dr_fail(err, ENOTSUP,
                       "%s: is an add-cow image of the drafts v10 to v13 (little endian), which "
                       "nobody released and Drover does not read",
                       path);
    return dr_fail(err, ENOTSUP, "%s: is an add-cow image of version %u, only version 1 is known",
                   path, get_be32(buf + V7_VERSION));
}

#define NOT_V7 "looks like one of the drafts v10 to v13, which Drover does not read"

static int v7_check(const uint8_t *buf, size_t len, const char *path, struct dr_error *err)
{
    if (len < V7_VERSION + 4)
        return dr_fail(err, EINVAL, "%s: is cut short: %zu bytes of an add-cow header of %u", path,
                       len, ADDCOW_HEADER_SIZE);
    int r = v7_check_version(buf, path, err);
    if (r < 0)
        return r;
    if (len < ADDCOW_HEADER_SIZE)
        return dr_fail(err, EINVAL, "%s: is cut short: %zu bytes of an add-cow header of %u", path,
                       len, ADDCOW_HEADER_SIZE);
    const char *problem = field_problem(buf + ADDCOW_BACKING_AT);
    if (problem)
        return dr_fail(err, ENOTSUP, "%s: no add-cow of version 1: its backing_file %s; " NOT_V7,
                       path, problem);
    problem = field_problem(buf + ADDCOW_IMAGE_AT);
    if (problem)
        return dr_fail(err, ENOTSUP, "%s: no add-cow of version 1: its image_file %s; " NOT_V7,
                       path, problem);
    if (!dr_is_zero(buf + ADDCOW_RESERVED_AT, ADDCOW_HEADER_SIZE - ADDCOW_RESERVED_AT))
        return dr_fail(
            err, ENOTSUP,
            "%s: no add-cow of version 1: its reserved bytes %u to %u are not zero; " NOT_V7, path,
            ADDCOW_RESERVED_AT, ADDCOW_HEADER_SIZE - 1);
    if (buf[ADDCOW_IMAGE_AT] == 0)
        return dr_fail(err, EINVAL, "%s: names no image_file", path);
    return 0;
}

static int v7_parse(const uint8_t *buf, const char *path, struct addcow_header *h,
                    struct dr_error *err)
{
    const char *backing = (const char *)buf + ADDCOW_BACKING_AT;
    h->layout = ADDCOW_V7;
    h->bitmap_off = ADDCOW_HEADER_SIZE;
    h->granule = ADDCOW_SECTOR;
    h->backing = *backing ? strdup(backing) : NULL;
    h->image = strdup((const char *)buf + ADDCOW_IMAGE_AT);
    if (!h->image || (*backing && !h->backing))
        return dr_fail_errno(err, ENOMEM, "%s", path);
    return 0;
}

void addcow_header_encode(uint8_t out[ADDCOW_HEADER_SIZE], const char *backing, const char *image)
{
    memset(out, 0, ADDCOW_HEADER_SIZE);
    memcpy(out, magic_v7, sizeof(magic_v7));
    put_be32(out + V7_VERSION, 1);
    memcpy(out + ADDCOW_BACKING_AT, backing, strlen(backing));
    memcpy(out + ADDCOW_IMAGE_AT, image, strlen(image));
}

/* ------------------------------------------------------------------ the last revision */

static bool v20_fits(const uint8_t *buf, size_t len)
{
    if (len < V20_STRINGS)
        return false;
    uint32_t first = get_le32(buf + V20_BACKING_OFF), bits = get_le32(buf + V20_CLUSTER_BITS);
    return (first == 0 || first >= V20_STRINGS) && bits >= 9 && bits <= 21 &&
           get_le32(buf + V20_HEADER_SIZE) == dr_max(4096, UINT64_C(1) << bits);
}

static int v20_check(const uint8_t *buf, size_t len, const char *path, struct dr_error *err)
{
    uint32_t first = len >= 8 ? get_le32(buf + V20_BACKING_OFF) : 0;
    if (first > 0 && first < V20_STRINGS)
        return dr_fail(err, ENOTSUP,
                       "%s: is an add-cow image of the drafts v14 to v17 (version %u), which "
                       "nobody released and Drover does not read",
                       path, first);
    if (len < V20_STRINGS)
        return dr_fail(err, EINVAL,
                       "%s: is cut short: %zu bytes of an add-cow header of 4096 or more; name the "
                       "format raw if its bytes are meant as they are",
                       path, len);
    if (!v20_fits(buf, len))
        return dr_fail(err, ENOTSUP,
                       "%s: begins like an add-cow image, but cluster bits %u and header size %u "
                       "fit no layout; name the format raw if its bytes are meant as they are",
                       path, get_le32(buf + V20_CLUSTER_BITS), get_le32(buf + V20_HEADER_SIZE));
    if (get_le64(buf + V20_FEATURES))
        return dr_fail(err, ENOTSUP, "%s: has the unknown features 0x%llx", path,
                       (unsigned long long)get_le64(buf + V20_FEATURES));
    return 0;
}

/* A string somewhere between the fixed part of the header and its end. */
static int v20_name(struct dr_file *f, const char *what, uint32_t off, uint32_t len,
                    uint32_t header_size, char **name, struct dr_error *err)
{
    *name = NULL;
    if (off == 0 && len == 0)
        return 0;
    if (off < V20_STRINGS || len == 0 || len > V20_NAME_MAX || !dr_inside(off, len, header_size))
        return dr_fail(err, EINVAL,
                       "%s: the name of its %s, %u bytes at %u, is not inside the header of %u",
                       f->path, what, len, off, header_size);
    CLEANUP_FREE char *text = calloc(1, (size_t)len + 1);
    if (!text)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    int r = dr_file_pread(f, text, off, len, err);
    if (r < 0)
        return r;
    if (strlen(text) != len)
        return dr_fail(err, EINVAL, "%s: the name of its %s has a NUL inside", f->path, what);
    *name = DR_STEAL(text);
    return 0;
}

static int v20_names(const uint8_t *buf, struct dr_file *f, struct addcow_header *h,
                     struct dr_error *err)
{
    uint32_t size = get_le32(buf + V20_HEADER_SIZE);
    int r = v20_name(f, "backing file", get_le32(buf + V20_BACKING_OFF),
                     get_le32(buf + V20_BACKING_LEN), size, &h->backing, err);
    if (r == 0)
        r = v20_name(f, "image file", get_le32(buf + V20_IMAGE_OFF), get_le32(buf + V20_IMAGE_LEN),
                     size, &h->image, err);
    if (r == 0 && !h->image)
        r = dr_fail(err, EINVAL, "%s: names no image_file", f->path);
    return r;
}

/* v18 only padded it; nothing recorded is told from an empty text by NULL. */
static int v20_format(const uint8_t *field, const char *path, char **fmt, struct dr_error *err)
{
    *fmt = field[0] ? strndup((const char *)field, V20_FMT_LEN) : NULL;
    return *fmt || !field[0] ? 0 : dr_fail_errno(err, ENOMEM, "%s", path);
}

static int v20_check_image_format(const uint8_t *buf, const char *path, struct dr_error *err)
{
    CLEANUP_FREE char *fmt = NULL;
    int r = v20_format(buf + V20_IMAGE_FMT, path, &fmt, err);
    if (r < 0 || !fmt || strcmp(fmt, "raw") == 0 || strcmp(fmt, "host_device") == 0)
        return r;
    return dr_fail(err, ENOTSUP, "%s: its image file has the format \"%s\", only raw is supported",
                   path, fmt);
}

static int v20_parse(const uint8_t *buf, struct dr_file *f, struct addcow_header *h,
                     struct dr_error *err)
{
    h->layout = ADDCOW_V20;
    h->bitmap_off = get_le32(buf + V20_HEADER_SIZE);
    h->granule = UINT32_C(1) << get_le32(buf + V20_CLUSTER_BITS);
    h->all = get_le64(buf + V20_COMPAT) & V20_ALL_ALLOCATED;
    int r = v20_check_image_format(buf, f->path, err);
    if (r == 0 && dr_file_size(f) < h->bitmap_off)
        r = dr_fail(err, EINVAL, "%s: is cut short: %llu bytes of an add-cow header of %llu",
                    f->path, (unsigned long long)dr_file_size(f),
                    (unsigned long long)h->bitmap_off);
    if (r == 0)
        r = v20_names(buf, f, h, err);
    if (r == 0 && h->backing)
        r = v20_format(buf + V20_BACKING_FMT, f->path, &h->backing_fmt, err);
    return r;
}

/* ------------------------------------------------------------------ both */

/* Drafts and damage are ours too: opening tells what they are. Taken for raw, their metadata would
 * be shown as the disk. */
int addcow_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    if (has_magic(buf, len, magic_v7, sizeof(magic_v7)))
        return v7_fits(buf, len) ? 100 : 50;
    if (has_magic(buf, len, magic_v20, sizeof(magic_v20)))
        return v20_fits(buf, len) ? 100 : 50;
    return 0;
}

static int parse(const uint8_t *buf, size_t len, struct dr_file *f, struct addcow_header *h,
                 struct dr_error *err)
{
    int r;
    if (has_magic(buf, len, magic_v7, sizeof(magic_v7))) {
        r = v7_check(buf, len, f->path, err);
        return r < 0 ? r : v7_parse(buf, f->path, h, err);
    }
    if (has_magic(buf, len, magic_v20, sizeof(magic_v20))) {
        r = v20_check(buf, len, f->path, err);
        return r < 0 ? r : v20_parse(buf, f, h, err);
    }
    return dr_fail(err, EINVAL, "%s: is no add-cow image: it has no magic number", f->path);
}

int addcow_header_read(struct dr_file *f, struct addcow_header *h, struct dr_error *err)
{
    uint8_t buf[HEAD_MAX];
    size_t got;
    *h = (struct addcow_header){0};
    int r = dr_file_pread_short(f, buf, 0, sizeof(buf), &got, err);
    if (r == 0)
        r = parse(buf, got, f, h, err);
    if (r < 0)
        addcow_header_free(h);
    return r;
}

void addcow_header_free(struct addcow_header *h)
{
    free(h->backing);
    free(h->backing_fmt);
    free(h->image);
    *h = (struct addcow_header){0};
}
