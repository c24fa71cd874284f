/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images of formats that have no room for bitmaps, with a file of them beside, and a text that says
 * what is in them. */
#ifndef DR_TEST_BITMAPS_BESIDE_H
#define DR_TEST_BITMAPS_BESIDE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/bitmap-file.h"
#include "core/internal.h"
#include "ops/ops-internal.h"
#include "outcome.h"

#define KIB    1024u
#define MIB    (1024u * KIB)
#define SIZE   (1 * MIB + 4 * KIB)
#define PATH   "/dir/disk"
#define BESIDE PATH DR_BITMAP_FILE_SUFFIX

struct kind {
    const char *format;
    struct dr_pair pairs[1];
    size_t n_pairs;
};
static const struct kind kinds[] = {
    {.format = "raw"},
    {.format = "vmdk"},
    {.format = "vmdk", {{"subformat", "twoGbMaxExtentFlat"}}, 1},
    {.format = "add-cow"},
    {.format = "qcow2", {{"compat", "0.10"}}, 1},
};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))

static inline void create(struct dr_fs *fs, const struct kind *k)
{
    struct dr_create_options o = {.format = k->format,
                                  .size = SIZE,
                                  .has_size = true,
                                  .pairs = k->pairs,
                                  .n_pairs = k->n_pairs};
    ok(dr_create_fs(fs, PATH, &o, &err));
}

static inline int try_open(struct dr_fs *fs, unsigned flags, struct dr_disk **disk,
                           struct dr_error *err)
{
    struct dr_open_options o = {.flags = flags};
    return dr_open_fs(fs, PATH, &o, disk, err);
}

static inline struct dr_disk *open_disk(struct dr_fs *fs)
{
    struct dr_disk *disk;
    ok(try_open(fs, DR_OPEN_RDWR, &disk, &err));
    return disk;
}

static inline int change(struct dr_disk *disk, const char *name, enum dr_bitmap_action action,
                         const char *source, struct dr_error *err)
{
    const struct dr_bitmap_options o = {.source = source};
    return dr_disk_bitmap_change(disk, name, action, &o, err);
}

static inline void add(struct dr_disk *disk, const char *name, uint64_t granularity, bool disabled)
{
    const struct dr_bitmap_options o = {.granularity = granularity, .disabled = disabled};
    ok(dr_disk_bitmap_change(disk, name, DR_BITMAP_ADD, &o, &err));
}

static inline void write_at(struct dr_disk *disk, uint64_t off, size_t len, int value)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, value, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static inline uint8_t *read_all(struct dr_fs *fs, uint64_t *size)
{
    struct dr_disk *disk;
    ok(try_open(fs, 0, &disk, &err));
    *size = dr_size(disk);
    uint8_t *all = malloc(*size + 1);
    ok(dr_pread(disk, all, 0, *size, &err));
    ok(dr_close(disk, &err));
    return all;
}

/* ------------------------------------------------------------------ what they say */

struct text {
    char s[4000];
    size_t n;
};

static inline void put(struct text *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    t->n += (size_t)vsnprintf(t->s + t->n, sizeof(t->s) - t->n, fmt, ap);
    va_end(ap);
    assert_true(t->n < sizeof(t->s));
}

static inline int put_range(void *user, uint64_t off, uint64_t len)
{
    put(user, " %llu+%llu", (unsigned long long)off / 512, (unsigned long long)(len + 511) / 512);
    return 0;
}

/* "name granularity on|off ranges in sectors;" for each. */
static inline struct text describe(struct dr_disk *disk)
{
    struct text t = {.n = 0};
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    for (size_t i = 0; i < n; i++) {
        put(&t, "%s %llu %s", list[i].name, (unsigned long long)list[i].granularity,
            list[i].enabled ? "on" : "off");
        if (list[i].inconsistent)
            put(&t, " inconsistent");
        else
            ok(dr_disk_bitmap_read(disk, list[i].name, put_range, &t, &err));
        put(&t, ";");
    }
    dr_bitmaps_free(list, n);
    return t;
}

static inline struct text described(struct dr_fs *fs)
{
    struct dr_disk *disk;
    ok(try_open(fs, DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK, &disk, &err));
    struct text t = describe(disk);
    ok(dr_close(disk, &err));
    return t;
}

static inline void says(struct dr_fs *fs, const char *expected)
{
    struct text t = described(fs);
    assert_string_equal(t.s, expected);
}

#endif
