/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks with bitmaps, wherever these are kept. The file that includes this has said by PATH which
 * disk. */
#ifndef DR_TEST_BITMAPS_H
#define DR_TEST_BITMAPS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "outcome.h"

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

/* Of the file that includes this. */
static inline struct text describe(struct dr_disk *disk);

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
