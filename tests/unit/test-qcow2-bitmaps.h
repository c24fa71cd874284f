/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images with bitmaps, and a text that says what is in them: for the tests of what changes do, and
 * for those that cut changes off. */
#ifndef DR_TEST_QCOW2_BITMAPS_H
#define DR_TEST_QCOW2_BITMAPS_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "formats/qcow2/bitmap.h"
#include "ops/ops-internal.h"
#include "outcome.h"

#define KIB  1024u
#define MIB  (1024u * KIB)
#define SIZE (1 * MIB + 3 * 512)
#define PATH "dir/disk.qcow2"

/* ------------------------------------------------------------------ images */

struct geometry {
    struct dr_pair pairs[2];
    size_t n;
    bool across; /* the extension lies across the end of the first sector, as QEMU puts it */
};
#define PAIRS(...) \
    .pairs = {__VA_ARGS__}, .n = sizeof((struct dr_pair[]){__VA_ARGS__}) / sizeof(struct dr_pair)
static const struct geometry geometries[] = {
    {PAIRS({"cluster_size", "8k"}), .across = true},
    {PAIRS({"cluster_size", "512"}, {"refcount_bits", "64"})},
    {PAIRS({"cluster_size", "16k"}, {"extended_l2", "on"})},
    {PAIRS({"cluster_size", "64k"}), .across = true},
};
#define N_GEOMETRIES (sizeof(geometries) / sizeof(geometries[0]))

static inline void create(struct dr_fs *fs, const struct geometry *g, uint64_t size)
{
    struct dr_create_options o = {
        .format = "qcow2", .size = size, .has_size = true, .pairs = g->pairs, .n_pairs = g->n};
    ok(dr_create_fs(fs, PATH, &o, &err));
}

#include "test-bitmaps.h"

/* Bytes of the file. */
static inline void patch(struct dr_fs *fs, uint64_t off, const void *bytes, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, bytes, off, len, &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
}

static inline void peek(struct dr_fs *fs, uint64_t off, void *bytes, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, 0, &f, &err));
    ok(dr_file_pread(f, bytes, off, len, &err));
    dr_file_unref(f);
}

/* Where an extension's data is in the file. */
static inline size_t find_extension(const uint8_t *head, uint32_t type)
{
    size_t at = get_be32(head + 100);
    while (get_be32(head + at) != type) {
        assert_int_not_equal(get_be32(head + at), 0);
        at += 8 + dr_round_up(get_be32(head + at + 4), 8);
    }
    return at + 8;
}

/* Exchange the bitmaps' extension and the feature table behind it. */
static inline void put_across(struct dr_fs *fs)
{
    uint8_t head[4096], ext[32];
    peek(fs, 0, head, sizeof(head));
    size_t at = find_extension(head, QCOW2_EXT_BITMAPS) - 8;
    assert_int_equal(get_be32(head + at + 32), QCOW2_EXT_FEATURES);
    size_t len = 8 + get_be32(head + at + 36);
    memcpy(ext, head + at, 32);
    memmove(head + at, head + at + 32, len);
    memcpy(head + at + len, ext, 32);
    assert_true(at + len < 512 && at + len + 32 > 512);
    patch(fs, 0, head, sizeof(head));
}

static inline uint64_t directory_at(struct dr_fs *fs)
{
    uint8_t head[4096];
    peek(fs, 0, head, sizeof(head));
    return get_be64(head + find_extension(head, QCOW2_EXT_BITMAPS) + 16);
}

/* ------------------------------------------------------------------ what they say */

/* "name granularity [on|off] ranges in sectors;" for each. */
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

static inline void drop_line(void *user, const char *line)
{
    (void)user;
    (void)line;
}

static inline struct dr_check_result check(struct dr_fs *fs, unsigned fix)
{
    struct dr_check_result result = {.report = drop_line};
    struct dr_disk *disk;
    ok(try_open(fs, DR_OPEN_NO_BACKING | (fix ? DR_OPEN_RDWR : 0u), &disk, &err));
    struct dr_image *image = disk->chain->images[0];
    ok(image->fmt->check(image, fix, &result, &err));
    ok(dr_close(disk, &err));
    return result;
}

static inline void check_clean(struct dr_fs *fs)
{
    struct dr_check_result result = check(fs, 0);
    assert_int_equal(result.corruptions, 0);
    assert_int_equal(result.leaks, 0);
}

/* A crash leaks at most, and a repair gives it back. */
static inline void check_crashed(struct dr_fs *fs)
{
    struct dr_check_result result = check(fs, 0);
    assert_int_equal(result.corruptions, 0);
    check(fs, DR_CHECK_FIX_LEAKS);
    check_clean(fs);
}

#endif
