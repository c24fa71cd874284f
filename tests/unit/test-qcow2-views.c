/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Another parent for qcow2 images with snapshots inside: whatever goes wrong on the way, the disk
 * and every snapshot show what they did before. */
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "core/core.h"
#include "faultfs.h"
#include "ops/ops-internal.h"
#include "outcome.h"
#include "slower.h"
#include "powerfs.h"
#include "qcow2-verify.h"

#define KIB   1024u
#define SIZE  (96 * KIB)
#define LARGE (150 * KIB)
#define PATH  "dir/disk.qcow2"

struct geometry {
    struct dr_pair pairs[3];
    size_t n;
};
#define PAIRS(...)                                                                      \
    {                                                                                   \
        {__VA_ARGS__}, sizeof((struct dr_pair[]){__VA_ARGS__}) / sizeof(struct dr_pair) \
    }
static const struct geometry geometries[] = {
    PAIRS({"cluster_size", "4096"}),
    PAIRS({"cluster_size", "512"}, {"refcount_bits", "2"}),
    PAIRS({"cluster_size", "16k"}, {"extended_l2", "on"}),
    PAIRS({"cluster_size", "1024"}, {"compat", "0.10"}),
    PAIRS({"cluster_size", "64k"}, {"refcount_bits", "64"}),
};
#define N_GEOMETRIES (sizeof(geometries) / sizeof(geometries[0]))

static const char *const views[] = {NULL, "1", "2"}; /* the disk, and its snapshots */
#define N_VIEWS 3

struct shown {
    uint8_t *bytes[N_VIEWS];
    uint64_t size[N_VIEWS];
};

static void shown_free(struct shown *s)
{
    for (unsigned i = 0; i < N_VIEWS; i++)
        free(s->bytes[i]);
}

/* ------------------------------------------------------------------ the family */

static struct dr_disk *open_disk(struct dr_fs *fs, const char *path, const char *format)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR, .format = format};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    return disk;
}

static void write_byte(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    free(buf);
}

/* 4 KiB of data, then as much that the other parent has, too, then a hole, and so on. */
static void make_parent(struct dr_fs *fs, const char *path, uint64_t size, int byte)
{
    struct dr_create_options o = {.format = "raw", .size = size, .has_size = true};
    ok(dr_create_fs(fs, path, &o, &err));
    struct dr_disk *disk = open_disk(fs, path, "raw");
    for (uint64_t off = 0; off + 8 * KIB <= size; off += 12 * KIB) {
        write_byte(disk, off, 4 * KIB, byte);
        write_byte(disk, off + 4 * KIB, 4 * KIB, 0x77);
    }
    ok(dr_close(disk, &err));
}

/* Two snapshots and the disk have tables and clusters in common, and are of different sizes where
 * the version allows it. */
static void make_family(struct dr_fs *fs, const struct geometry *g)
{
    bool v2 = g->n > 1 && strcmp(g->pairs[1].value, "0.10") == 0;
    make_parent(fs, "dir/old.raw", LARGE - 20 * KIB, 0x11);
    make_parent(fs, "dir/new.raw", SIZE, 0x22);
    struct dr_create_options o = {.format = "qcow2",
                                  .size = v2 ? LARGE : SIZE,
                                  .has_size = true,
                                  .pairs = g->pairs,
                                  .n_pairs = g->n,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    write_byte(disk, 2 * KIB + 512, 9 * KIB, 1);
    ok(dr_image_snapshot_create(disk->chain->images[0], "one", &err));
    write_byte(disk, 40 * KIB, 512, 2);
    if (!v2)
        ok(dr_truncate(disk, LARGE, &err));
    write_byte(disk, 120 * KIB, 512, 3);
    ok(dr_image_snapshot_create(disk->chain->images[0], "two", &err));
    write_byte(disk, 60 * KIB, 9 * KIB, 4);
    ok(dr_close(disk, &err));
}

static uint8_t *read_view(struct dr_fs *fs, const char *snapshot, uint64_t *size)
{
    struct dr_open_options o = {.snapshot = snapshot, .flags = DR_OPEN_FORCE_SHARE};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    *size = dr_size(disk);
    uint8_t *buf = malloc(*size);
    ok(dr_pread(disk, buf, 0, *size, &err));
    ok(dr_close(disk, &err));
    return buf;
}

static struct shown look(struct dr_fs *fs)
{
    struct shown s;
    for (unsigned i = 0; i < N_VIEWS; i++)
        s.bytes[i] = read_view(fs, views[i], &s.size[i]);
    return s;
}

static void check_views(struct dr_fs *fs, const struct shown *expected)
{
    for (unsigned i = 0; i < N_VIEWS; i++) {
        uint64_t size;
        uint8_t *now = read_view(fs, views[i], &size);
        assert_int_equal(size, expected->size[i]);
        for (uint64_t k = 0; k < size; k++)
            if (now[k] != expected->bytes[i][k])
                fail_msg("view %u: byte %llu is %02x, not %02x", i, (unsigned long long)k, now[k],
                         expected->bytes[i][k]);
        free(now);
    }
}

/* Nothing is counted too low, nothing that is shared would be written in place, and COPIED is as
 * the counts say. */
static void check_safe(struct dr_fs *fs)
{
    struct qcow2_verdict v;
    ok(qcow2_verify(fs, PATH, &v, &err));
    if (v.low || v.shared || v.broken || v.stale)
        fail_msg("%u low, %u shared, %u broken, %u stale: %s", v.low, v.shared, v.broken, v.stale,
                 v.text);
}

static void check_clean(struct dr_fs *fs)
{
    struct qcow2_verdict v;
    ok(qcow2_verify(fs, PATH, &v, &err));
    if (v.low || v.shared || v.broken || v.leaked || v.stale)
        fail_msg("%u low, %u shared, %u broken, %u leaked, %u stale: %s", v.low, v.shared, v.broken,
                 v.leaked, v.stale, v.text);
}

static const struct target {
    const char *backing;
    bool compress;
} targets[] = {{"new.raw", false}, {"", false}, {"new.raw", true}, {"", true}};
#define N_TARGETS (sizeof(targets) / sizeof(targets[0]))

static int rebase_to(struct dr_fs *fs, const struct target *t, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = t->backing,
                                  .backing_format = *t->backing ? "raw" : NULL,
                                  .compress = t->compress};
    return dr_rebase_fs(fs, PATH, &o, NULL, err);
}

static int rebase(struct dr_fs *fs, const char *backing, struct dr_error *err)
{
    return rebase_to(fs, &(struct target){backing, false}, err);
}

static const char *parent_of(struct dr_fs *fs, char name[32])
{
    struct dr_image *image;
    ok(dr_image_open(fs, PATH, "qcow2", DR_OPEN_NO_BACKING, &image, &err));
    snprintf(name, 32, "%s", image->backing_name ? image->backing_name : "");
    dr_image_unref(image, NULL);
    return name;
}

static uint64_t compressed_units(struct dr_fs *fs)
{
    struct dr_check_result result = {0};
    struct dr_image *image;
    ok(dr_image_open(fs, PATH, "qcow2", DR_OPEN_NO_BACKING, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    dr_image_unref(image, NULL);
    return result.compressed_clusters;
}

/* ------------------------------------------------------------------ whole, cut off, failing */

static void every_view_stays_and_nothing_leaks(void **state)
{
    (void)state;
    size_t compressed = 0;
    for (unsigned round = 0; round < N_GEOMETRIES * N_TARGETS; round++) {
        struct dr_fs *fs = dr_fs_memory_new();
        char name[32];
        make_family(fs, &geometries[round / N_TARGETS]);
        struct shown before = look(fs);
        const struct target *target = &targets[round % N_TARGETS];
        ok(rebase_to(fs, target, &err));
        check_views(fs, &before);
        check_clean(fs);
        assert_string_equal(parent_of(fs, name), target->backing);
        compressed += compressed_units(fs) > 0;
        assert_true(target->compress || compressed_units(fs) == 0);
        shown_free(&before);
        dr_fs_memory_free(fs);
    }
    assert_in_range(compressed, N_TARGETS, N_TARGETS * N_GEOMETRIES); /* not all have a free unit */
}

/* As it may be found after a crash: it shows the same at once, after the rerun, and after a write
 * to the disk, which reaches no snapshot. */
static void check_after(struct dr_fs *fs, const struct shown *before, const struct target *target)
{
    check_views(fs, before);
    check_safe(fs);
    ok(rebase_to(fs, target, &err));
    check_views(fs, before);
    check_safe(fs);
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    write_byte(disk, 0, SIZE, 9);
    ok(dr_pread(disk, before->bytes[0], 0, before->size[0], &err));
    ok(dr_close(disk, &err));
    check_views(fs, before);
    check_safe(fs);
}

static struct shown copy_of(const struct shown *s)
{
    struct shown copy = *s;
    for (unsigned i = 0; i < N_VIEWS; i++) {
        copy.bytes[i] = malloc(s->size[i]);
        memcpy(copy.bytes[i], s->bytes[i], s->size[i]);
    }
    return copy;
}

static void the_power_may_go_at_any_time(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_GEOMETRIES * N_TARGETS; round++) {
        const struct target *target = &targets[round % N_TARGETS];
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        make_family(fs, &geometries[round / N_TARGETS]);
        struct shown before = look(fs);
        powerfs_settle(power);
        ok(rebase_to(fs, target, &err));
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k = powerfs_next(power, k, 25))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                struct shown expected = copy_of(&before);
                check_after(cut, &expected, target);
                shown_free(&expected);
                dr_fs_memory_free(cut);
            }
        shown_free(&before);
        powerfs_free(power);
    }
}

static void any_call_may_fail(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_GEOMETRIES * N_TARGETS; round++) {
        const struct target *target = &targets[round % N_TARGETS];
        bool failed = true;
        for (uint64_t nth = 0; failed; nth += SLOWER * (1 + nth / 12)) {
            struct dr_fs *fs = dr_fs_memory_new();
            make_family(fs, &geometries[round / N_TARGETS]);
            struct shown before = look(fs);
            struct faultfs *faults = faultfs_new(fs);
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = rebase_to(faultfs_fs(faults), target, NULL);
            failed = faultfs_fired(faults);
            if (!failed && r < 0)
                fail_msg("fails without a fault: %d", r);
            faultfs_free(faults);
            check_after(fs, &before, target);
            shown_free(&before);
            dr_fs_memory_free(fs);
        }
    }
}

static int refuse_growth(void *user, const struct faultfs_io *io)
{
    const uint64_t *limit = user;
    bool grows = (io->kind == FAULTFS_WRITE || io->kind == FAULTFS_TRUNCATE) &&
                 io->off + io->len > *limit;
    return grows ? -ENOSPC : 0;
}

static uint64_t file_size(struct dr_fs *fs)
{
    struct dr_file *file;
    ok(dr_file_open(fs, PATH, 0, &file, &err));
    uint64_t size = dr_file_size(file);
    dr_file_unref(file);
    return size;
}

static uint64_t cluster_size(const struct geometry *g)
{
    char *end;
    uint64_t size = strtoull(g->pairs[0].value, &end, 10);
    return *end == 'k' ? size * KIB : size;
}

/* Also where there is space for data, and none for the table that the flush writes. */
static void a_full_file_system_leaves_every_view_and_no_leaks(void **state)
{
    (void)state;
    unsigned failures = 0;
    for (unsigned round = 0; round < N_GEOMETRIES * N_TARGETS; round++) {
        const struct target *target = &targets[round % N_TARGETS];
        uint64_t cluster = cluster_size(&geometries[round / N_TARGETS]);
        int r = -1;
        for (uint64_t more = 0; r < 0; more += cluster * (SLOWER > 1 ? 2 : 1)) {
            struct dr_fs *fs = dr_fs_memory_new();
            make_family(fs, &geometries[round / N_TARGETS]);
            struct shown before = look(fs);
            struct faultfs *faults = faultfs_new(fs);
            uint64_t limit = file_size(fs) + more;
            faultfs_observe(faults, refuse_growth, &limit);
            r = rebase_to(faultfs_fs(faults), target, NULL);
            failures += r < 0;
            if (r < 0)
                assert_int_equal(r, -ENOSPC);
            faultfs_free(faults);
            check_clean(fs);
            check_after(fs, &before, target);
            shown_free(&before);
            dr_fs_memory_free(fs);
        }
    }
    assert_true(failures > 5);
}

/* The disk has zeros of its own where the snapshot shows the parent, in clusters that both hold. */
static void make_zeroed_family(struct dr_fs *fs)
{
    struct dr_create_options o = {.format = "qcow2",
                                  .size = LARGE,
                                  .has_size = true,
                                  .pairs = geometries[2].pairs,
                                  .n_pairs = 2,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    make_parent(fs, "dir/old.raw", LARGE, 0x11);
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    for (uint64_t off = 0; off + 16 * KIB <= LARGE; off += 16 * KIB)
        write_byte(disk, off, 512, 1);
    ok(dr_image_snapshot_create(disk->chain->images[0], "one", &err));
    ok(dr_image_snapshot_create(disk->chain->images[0], "two", &err));
    for (uint64_t off = 0; off + 16 * KIB <= LARGE; off += 16 * KIB)
        ok(dr_zero(disk, off + 512, 16 * KIB - 512, DR_MAY_UNMAP, &err));
    ok(dr_image_snapshot_delete(disk->chain->images[0], "2", &err));
    ok(dr_close(disk, &err));
}

/* A snapshot that is larger than the disk, with which it has its table in common. */
static void make_shrunk_family(struct dr_fs *fs)
{
    struct dr_create_options o = {.format = "qcow2",
                                  .size = 64 * KIB,
                                  .has_size = true,
                                  .pairs = geometries[0].pairs,
                                  .n_pairs = 1,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    make_parent(fs, "dir/old.raw", 32 * KIB, 0x11);
    make_parent(fs, "dir/new.raw", LARGE, 0x22);
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    struct dr_image *image = disk->chain->images[0];
    write_byte(disk, 0, 64 * KIB, 1);
    ok(dr_image_snapshot_create(image, "one", &err));
    ok(dr_truncate(disk, LARGE, &err));
    ok(dr_image_snapshot_create(image, "two", &err));
    ok(dr_image_snapshot_apply(image, "1", &err));
    ok(dr_image_snapshot_delete(image, "1", &err));
    ok(dr_close(disk, &err));
}

/* The table of the first snapshot loses the second sub-cluster of each cluster that it has. */
static void poke_holes(struct dr_fs *fs)
{
    uint8_t head[72], raw[8], entry[16];
    struct dr_file *f;
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, head, 0, sizeof(head), &err));
    ok(dr_file_pread(f, raw, get_be64(head + 64), 8,
                     &err)); /* its entry begins with its L1 table */
    ok(dr_file_pread(f, raw, get_be64(raw), 8, &err));
    uint64_t table = get_be64(raw) & UINT64_C(0x00ffffffffffff00);
    for (uint64_t at = table; at < table + LARGE / (16 * KIB) * 16; at += 16) {
        ok(dr_file_pread(f, entry, at, sizeof(entry), &err));
        put_be64(entry + 8, get_be64(entry + 8) & ~UINT64_C(2));
        ok(dr_file_pwrite(f, entry, at, sizeof(entry), &err));
    }
    dr_file_unref(f);
}

/* The disk holds a sub-cluster where the snapshot has a hole, in clusters that only these two have:
 * so a rebase that was cut off between their tables may leave it. */
static void make_holed_family(struct dr_fs *fs)
{
    struct dr_create_options o = {.format = "qcow2",
                                  .size = LARGE,
                                  .has_size = true,
                                  .pairs = geometries[2].pairs,
                                  .n_pairs = 2};
    make_parent(fs, "dir/old.raw", LARGE, 0x11);
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    for (uint64_t off = 0; off + 32 * KIB <= LARGE; off += 16 * KIB)
        write_byte(disk, off, KIB, 1);
    ok(dr_image_snapshot_create(disk->chain->images[0], "one", &err));
    write_byte(disk, LARGE - 16 * KIB, 512, 2); /* it gets a table of its own */
    ok(dr_close(disk, &err));
    poke_holes(fs);
}

/* The same, and the holes show a parent. */
static void make_holed_family_with_parent(struct dr_fs *fs)
{
    make_holed_family(fs);
    struct dr_rebase_options o = {.backing = "old.raw", .backing_format = "raw", .unsafe = true};
    ok(dr_rebase_fs(fs, PATH, &o, NULL, &err));
}

static const struct {
    void (*make)(struct dr_fs *fs);
    const char *target;
} delicate[] = {
    {make_zeroed_family, ""},
    {make_shrunk_family, "new.raw"},
    {make_holed_family, "old.raw"},
    {make_holed_family_with_parent, ""},
};
#define N_DELICATE (sizeof(delicate) / sizeof(delicate[0]))

/* QEMU's check calls it corruption where COPIED and a count differ. */
static void a_crash_leaves_nothing_but_leaks(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_DELICATE; round++) {
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        delicate[round].make(fs);
        uint64_t size;
        uint8_t *before = read_view(fs, NULL, &size);
        powerfs_settle(power);
        ok(rebase(fs, delicate[round].target, &err));
        check_clean(fs);
        uint8_t *after = read_view(fs, NULL, &size);
        assert_memory_equal(before, after, size);
        for (size_t k = 0, n = powerfs_ops(power); k <= n;
             k = powerfs_next(power, k, POWERFS_EVERY))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                check_safe(cut);
                dr_fs_memory_free(cut);
            }
        free(before);
        free(after);
        powerfs_free(power);
    }
}

/* ------------------------------------------------------------------ while the disk is in use */

struct guest {
    struct dr_disk *disk;
    uint8_t *bytes; /* what the disk must hold */
    _Atomic bool stop;
};

static void *be_a_guest(void *user)
{
    struct guest *g = user;
    uint8_t buf[6 * KIB];
    for (unsigned i = 0; !g->stop; i++) {
        uint64_t off = i * 7919u % (LARGE - sizeof(buf));
        size_t len = 1 + i * 104729u % sizeof(buf);
        memset(buf, i % 5 ? (int)(i % 251) : 0, len);
        memcpy(g->bytes + off, buf, len);
        ok(i % 5 ? dr_pwrite(g->disk, buf, off, len, 0, &err)
                 : dr_zero(g->disk, off, len, DR_MAY_UNMAP, &err));
    }
    return NULL;
}

static void a_guest_may_write_meanwhile(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_GEOMETRIES * N_TARGETS; round++) {
        const struct target *target = &targets[round % N_TARGETS];
        struct dr_fs *fs = dr_fs_memory_new();
        make_family(fs, &geometries[round / N_TARGETS]);
        struct shown shown = look(fs);
        struct guest g = {.disk = open_disk(fs, PATH, NULL), .bytes = shown.bytes[0]};
        struct dr_rebase_options o = {.backing = target->backing,
                                      .backing_format = *target->backing ? "raw" : NULL,
                                      .compress = target->compress};
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, be_a_guest, &g), 0);
        ok(dr_disk_rebase(g.disk, &o, NULL, &err));
        g.stop = true;
        pthread_join(thread, NULL);
        ok(dr_close(g.disk, &err));
        check_views(fs, &shown);
        check_clean(fs);
        shown_free(&shown);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ shared, refused, damaged */

static uint64_t file_space(struct dr_fs *fs)
{
    struct dr_image *image;
    uint64_t bytes;
    ok(dr_image_open(fs, PATH, "qcow2", DR_OPEN_NO_BACKING, &image, &err));
    ok(dr_ops_disk_size(image, &bytes, &err));
    dr_image_unref(image, NULL);
    return bytes;
}

/* What the parent shows is written once, however many snapshots show it. */
static void snapshots_cost_no_copies_of_their_own(void **state)
{
    (void)state;
    uint64_t grown[2];
    for (unsigned round = 0; round < 2; round++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_family(fs, &geometries[0]);
        struct dr_disk *disk = open_disk(fs, PATH, NULL);
        for (unsigned i = 0; i < round * 30; i++) {
            char name[12];
            snprintf(name, sizeof(name), "n%u", i);
            ok(dr_image_snapshot_create(disk->chain->images[0], name, &err));
            write_byte(disk, 60 * KIB, 512, (int)i); /* each has a table of its own */
        }
        ok(dr_close(disk, &err));
        uint64_t before = file_space(fs);
        ok(rebase(fs, "", &err));
        grown[round] = file_space(fs) - before;
        check_clean(fs);
        dr_fs_memory_free(fs);
    }
    assert_true(grown[0] > 40 * KIB);
    assert_in_range(grown[1], 0, grown[0] + 8 * KIB);
}

static void when_told_to_it_refuses_before_anything_is_written(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    make_family(fs, &geometries[0]);
    struct faultfs *faults = faultfs_new(fs);
    struct dr_rebase_options o = {.backing = "", .refuse_snapshots = true};
    struct dr_stream_options s = {.refuse_snapshots = true};
    refused(dr_rebase_fs(faultfs_fs(faults), PATH, &o, NULL, &err), ENOTSUP, "2 snapshots inside");
    refused(dr_stream_fs(faultfs_fs(faults), PATH, &s, NULL, &err), ENOTSUP, "2 snapshots inside");
    assert_int_equal(faultfs_count_of(faults, FAULTFS_WRITE), 0);
    faultfs_free(faults);
    dr_fs_memory_free(fs);
}

/* There cannot be any; a header may say so all the same. */
static void make_snapshot_beside_data_file(struct dr_fs *fs)
{
    struct dr_pair pairs[] = {{"data_file", "disk.data"}, {"cluster_size", "4096"}};
    struct dr_create_options o = {.format = "qcow2",
                                  .size = LARGE,
                                  .has_size = true,
                                  .pairs = pairs,
                                  .n_pairs = 2,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    uint8_t one[4], at[8], entry[64] = {0};
    struct dr_file *f;
    make_parent(fs, "dir/old.raw", LARGE, 0x11);
    ok(dr_create_fs(fs, PATH, &o, &err));
    uint64_t end = file_size(fs);
    put_be32(one, 1);
    put_be64(at, end);
    put_be64(entry, end + 4096); /* its L1 table: zeros */
    put_be32(entry + 8, 1);
    put_be16(entry + 12, 1); /* bytes of its id */
    put_be32(entry + 36, 16);
    put_be64(entry + 48, LARGE);
    entry[56] = '1';
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, end + 2 * 4096, &err));
    ok(dr_file_pwrite(f, entry, end, sizeof(entry), &err));
    ok(dr_file_pwrite(f, one, 60, sizeof(one), &err));
    ok(dr_file_pwrite(f, at, 64, sizeof(at), &err));
    dr_file_unref(f);
}

static void snapshots_beside_a_data_file_are_refused(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    uint64_t size;
    make_snapshot_beside_data_file(fs);
    uint8_t *before = read_view(fs, NULL, &size);
    refused(rebase(fs, "", &err), ENOTSUP, "data in another file");
    uint8_t *after = read_view(fs, NULL, &size);
    assert_memory_equal(before, after, size);
    free(before);
    free(after);
    dr_fs_memory_free(fs);
}

struct told {
    unsigned errors, data_file;
};

static void count_errors(void *user, const char *line)
{
    struct told *told = user;
    told->errors += strstr(line, "ERROR") != NULL;
    told->data_file += strstr(line, "image with data file") != NULL;
}

/* Nor are the snapshot's clusters counted. */
static void a_check_counts_snapshots_beside_a_data_file_as_one_error(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct told told = {0};
    struct dr_check_result result = {.report = count_errors, .user = &told};
    struct dr_image *image;
    make_snapshot_beside_data_file(fs);
    ok(dr_image_open(fs, PATH, "qcow2", DR_OPEN_NO_BACKING, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    dr_image_unref(image, NULL);
    assert_int_equal(told.data_file, 1);
    assert_int_equal(told.errors, result.corruptions);
    dr_fs_memory_free(fs);
}

/* Counts that are too high, as a crash leaves them: something unknown may lead there. */
static void a_table_with_a_higher_count_is_not_edited(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    uint8_t header[72], raw[8], table[4096], later[4096];
    struct dr_file *f;
    make_family(fs, &geometries[0]);
    struct shown before = look(fs);
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, header, 0, sizeof(header), &err));
    ok(dr_file_pread(f, raw, get_be64(header + 40), 8, &err));
    uint64_t at = get_be64(raw) & UINT64_C(0x00ffffffffffff00);
    ok(dr_file_pread(f, raw, get_be64(header + 48), 8, &err));
    uint64_t count_at = get_be64(raw) + at / 4096 * 2;
    ok(dr_file_pread(f, raw, count_at, 2, &err));
    put_be16(raw, (uint16_t)(get_be16(raw) + 1));
    ok(dr_file_pwrite(f, raw, count_at, 2, &err));
    ok(dr_file_pread(f, table, at, sizeof(table), &err));
    dr_file_unref(f);
    ok(rebase(fs, "", &err));
    ok(dr_file_open(fs, PATH, 0, &f, &err));
    ok(dr_file_pread(f, later, at, sizeof(later), &err));
    dr_file_unref(f);
    assert_memory_equal(table, later, sizeof(table));
    check_views(fs, &before);
    struct qcow2_verdict v;
    ok(qcow2_verify(fs, PATH, &v, &err));
    if (v.low || v.shared || v.broken || v.stale) /* leaked: at least the table */
        fail_msg("%s", v.text);
    shown_free(&before);
    dr_fs_memory_free(fs);
}

/* Each view has clusters of its own in a range that is filled together: more than there is room for
 * in one round. */
static void views_that_have_nothing_in_common_are_all_filled(void **state)
{
    (void)state;
    static const char *const names[] = {"1", "2", "3", "4", "5", NULL};
    enum { N = sizeof(names) / sizeof(names[0]) };
    const uint64_t cluster = 16 * KIB, size = 64 * cluster;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_create_options o = {.format = "qcow2",
                                  .size = size,
                                  .has_size = true,
                                  .pairs = geometries[2].pairs,
                                  .n_pairs = 2,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    uint8_t *before[N];
    uint64_t len;
    make_parent(fs, "dir/old.raw", size, 0x11);
    struct dr_disk *disk = open_disk(fs, "dir/old.raw", "raw");
    write_byte(disk, 0, size, 0x11); /* without gaps */
    ok(dr_close(disk, &err));
    ok(dr_create_fs(fs, PATH, &o, &err));
    disk = open_disk(fs, PATH, NULL);
    for (unsigned i = 0; i < N; i++) {
        for (uint64_t off = 0; off < size; off += cluster)
            write_byte(disk, off + i * KIB, 512, 0x40 + (int)i);
        if (names[i])
            ok(dr_image_snapshot_create(disk->chain->images[0], names[i], &err));
    }
    ok(dr_close(disk, &err));
    for (unsigned i = 0; i < N; i++)
        before[i] = read_view(fs, names[i], &len);
    ok(rebase(fs, "", &err));
    for (unsigned i = 0; i < N; i++) {
        uint8_t *after = read_view(fs, names[i], &len);
        assert_int_equal(len, size);
        assert_memory_equal(before[i], after, size);
        free(before[i]);
        free(after);
    }
    check_clean(fs);
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ compressed */

static void a_compressed_unit_fills_nothing_but_a_hole(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_create_options o = {.format = "qcow2",
                                  .size = 64 * KIB,
                                  .has_size = true,
                                  .pairs = geometries[2].pairs,
                                  .n_pairs = 2};
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs, PATH, NULL);
    struct dr_image *image = disk->chain->images[0];
    uint8_t *ones = malloc(16 * KIB), *coded = malloc(16 * KIB), buf[512];
    memset(ones, 1, 16 * KIB);
    int64_t n = image->fmt->encode(image, ones, 16 * KIB, 0, coded, 16 * KIB);
    assert_true(n > 0);
    write_byte(disk, 16 * KIB + 5 * 512, 512, 2); /* one sub-cluster */
    for (uint64_t off = 0; off < 32 * KIB; off += 16 * KIB)
        ok(dr_chain_fill_coded(disk->chain, 0, coded, (uint32_t)n, off, 16 * KIB, &err));
    ok(dr_pread(disk, buf, 8 * KIB, 512, &err));
    assert_memory_equal(buf, ones, 512);
    ok(dr_pread(disk, buf, 16 * KIB + 5 * 512, 512, &err));
    assert_int_equal(buf[0], 2);
    ok(dr_pread(disk, buf, 16 * KIB, 512, &err));
    assert_int_equal(buf[0], 0);
    ok(dr_close(disk, &err));
    check_clean(fs);
    free(ones);
    free(coded);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_view_stays_and_nothing_leaks),
        cmocka_unit_test(the_power_may_go_at_any_time),
        cmocka_unit_test(any_call_may_fail),
        cmocka_unit_test(a_full_file_system_leaves_every_view_and_no_leaks),
        cmocka_unit_test(a_crash_leaves_nothing_but_leaks),
        cmocka_unit_test(a_guest_may_write_meanwhile),
        cmocka_unit_test(snapshots_cost_no_copies_of_their_own),
        cmocka_unit_test(snapshots_beside_a_data_file_are_refused),
        cmocka_unit_test(a_check_counts_snapshots_beside_a_data_file_as_one_error),
        cmocka_unit_test(when_told_to_it_refuses_before_anything_is_written),
        cmocka_unit_test(a_compressed_unit_fills_nothing_but_a_hole),
        cmocka_unit_test(a_table_with_a_higher_count_is_not_edited),
        cmocka_unit_test(views_that_have_nothing_in_common_are_all_filled),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
