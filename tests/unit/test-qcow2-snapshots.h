/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the tests of snapshots inside qcow2 images share: images of several geometries with a first
 * and a second state, and what must be true of them. */
#ifndef DROVER_TESTS_TEST_QCOW2_SNAPSHOTS_H
#define DROVER_TESTS_TEST_QCOW2_SNAPSHOTS_H

#include "base/bytes.h"
#include "core/core.h"
#include "qcow2-verify.h"
#include "test-ops.h"

#define SIZE (96 * KiB)
#define PATH "dir/disk.qcow2"

struct geometry {
    struct dr_pair pairs[3];
    size_t n;
    bool coded; /* part of the first content is compressed */
};
#define PAIRS(...) \
    .pairs = {__VA_ARGS__}, .n = sizeof((struct dr_pair[]){__VA_ARGS__}) / sizeof(struct dr_pair)
static const struct geometry geometries[] = {
    {PAIRS({"cluster_size", "4096"}), .coded = true},
    {PAIRS({"cluster_size", "512"}, {"refcount_bits", "2"})},
    {PAIRS({"cluster_size", "16k"}, {"extended_l2", "on"})},
    {PAIRS({"cluster_size", "1024"}, {"compat", "0.10"}), .coded = true},
    {PAIRS({"cluster_size", "512"}, {"refcount_bits", "64"}), .coded = true},
    {PAIRS({"cluster_size", "2M"})},
};
#define N_GEOMETRIES (sizeof(geometries) / sizeof(geometries[0]))

static inline void create(struct dr_fs *fs, const struct geometry *g, uint64_t size)
{
    struct dr_create_options o = {
        .format = "qcow2", .size = size, .has_size = true, .pairs = g->pairs, .n_pairs = g->n};
    ok(dr_create_fs(fs, PATH, &o, &err));
}

static inline struct dr_disk *open_disk(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    return disk;
}

static inline struct dr_image *top_of(struct dr_disk *disk)
{
    return disk->chain->images[0];
}

/* Bytes that tell where they stand and which version they are, and compress well. */
static inline void fill(uint8_t *buf, uint64_t off, size_t len, unsigned version)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)(version * 101 + (off + i) / 512 * 7 + 1);
}

static inline void write_version(struct dr_disk *disk, uint64_t off, size_t len, unsigned version)
{
    uint8_t *buf = malloc(len);
    fill(buf, off, len, version);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    free(buf);
}

static inline void write_coded(struct dr_disk *disk, uint64_t off, size_t len, unsigned version)
{
    struct dr_image *image = top_of(disk);
    uint64_t start, cluster;
    image->fmt->unit(image, off, &start, &cluster);
    uint8_t *buf = malloc(len), *coded = malloc(cluster);
    fill(buf, off, len, version);
    for (uint64_t at = 0; at < len; at += cluster) {
        int64_t n = image->fmt->encode(image, buf + at, cluster, off + at, coded, cluster);
        assert_true(n > 0);
        ok(dr_chain_write_coded(disk->chain, 0, coded, (uint32_t)n, off + at, cluster, &err));
    }
    free(buf);
    free(coded);
}

/* Version 1: all but a hole in the middle. Version 2: another part, over it, with a discard. */
static inline void make_first(struct dr_disk *disk, const struct geometry *g)
{
    if (g->coded)
        write_coded(disk, 0, 28 * KiB, 1);
    else
        write_version(disk, 0, 28 * KiB, 1);
    write_version(disk, 28 * KiB, 2 * KiB, 1);
    write_version(disk, 50 * KiB, SIZE - 50 * KiB, 1);
}

static inline void make_second(struct dr_disk *disk)
{
    write_version(disk, 20 * KiB + 512, 40 * KiB, 2);
    ok(dr_discard(disk, 80 * KiB, 8 * KiB, &err));
}

static inline uint8_t *read_disk(struct dr_disk *disk)
{
    uint8_t *buf = malloc(dr_size(disk));
    ok(dr_pread(disk, buf, 0, dr_size(disk), &err));
    return buf;
}

/* The disk as it is, or as a snapshot shows it. */
static inline uint8_t *read_view(struct dr_fs *fs, const char *snapshot, uint64_t *size)
{
    struct dr_open_options o = {.snapshot = snapshot, .flags = DR_OPEN_FORCE_SHARE};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    uint8_t *buf = read_disk(disk);
    *size = dr_size(disk);
    ok(dr_close(disk, &err));
    return buf;
}

static inline void view_is(struct dr_fs *fs, const char *snapshot, const uint8_t *expected)
{
    uint64_t size;
    uint8_t *now = read_view(fs, snapshot, &size);
    assert_int_equal(size, SIZE);
    if (memcmp(now, expected, SIZE) != 0)
        fail_msg("%s shows something else", snapshot ? snapshot : "the disk");
    free(now);
}

/* Nothing is counted too low, and COPIED is as the counts say: QEMU's check finds no corruption. */
static inline void check_safe(struct dr_fs *fs)
{
    struct qcow2_verdict v;
    ok(qcow2_verify(fs, PATH, &v, &err));
    if (v.low || v.shared || v.broken || v.stale)
        fail_msg("%u low, %u shared, %u broken, %u stale, %u leaked: %s", v.low, v.shared, v.broken,
                 v.stale, v.leaked, v.text);
}

static inline void check_clean(struct dr_fs *fs)
{
    struct qcow2_verdict v;
    ok(qcow2_verify(fs, PATH, &v, &err));
    if (v.low || v.shared || v.broken || v.leaked || v.stale)
        fail_msg("%u low, %u shared, %u broken, %u leaked, %u stale: %s", v.low, v.shared, v.broken,
                 v.leaked, v.stale, v.text);
}

static inline int setup(void **state)
{
    *state = dr_fs_memory_new();
    return 0;
}

static inline int teardown(void **state)
{
    dr_fs_memory_free(*state);
    return 0;
}

struct states {
    uint8_t *first, *second;
};

/* Snapshot 1 with the first state, and the second state on top of it. */
static inline struct states make_states(struct dr_fs *fs, const struct geometry *g)
{
    struct states s;
    create(fs, g, SIZE);
    struct dr_disk *disk = open_disk(fs);
    make_first(disk, g);
    s.first = read_disk(disk);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    make_second(disk);
    s.second = read_disk(disk);
    ok(dr_close(disk, &err));
    return s;
}

static inline void states_free(struct states *s)
{
    free(s->first);
    free(s->second);
}

#endif
