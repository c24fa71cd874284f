/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qcow2 images whose numbers are as large as they can be, or lead to each other: what they cost is
 * bounded by what the file holds, counted in calls. */
#include <zlib.h>

#include "base/bytes.h"
#include "core/core.h"
#include "faultfs.h"
#include "test-ops.h"

#define PATH    "dir/disk.qcow2"
#define CLUSTER 512u
#define MAX_L1  (32 * MiB)

/* An image of clusters of 512 bytes. Cluster 1 is the refcount table, 2 its first block. */
struct hostile {
    uint64_t size;
    uint64_t l1_at;
    uint32_t l1_entries;
    uint32_t n_snapshots;
    uint64_t snapshots_at;
    uint64_t file_size;
};

static struct dr_file *make_image(struct dr_fs *fs, const struct hostile *h)
{
    struct dr_file *file;
    fs->ops->unlink(fs, PATH, NULL); /* what an earlier call made */
    uint8_t head[CLUSTER] = {0}, raw[8];
    put_be32(head, 0x514649fb);
    put_be32(head + 4, 3);
    put_be32(head + 20, 9);
    put_be64(head + 24, h->size);
    put_be32(head + 36, h->l1_entries);
    put_be64(head + 40, h->l1_at);
    put_be64(head + 48, CLUSTER);
    put_be32(head + 56, 1);
    put_be32(head + 60, h->n_snapshots);
    put_be64(head + 64, h->snapshots_at);
    put_be32(head + 96, 4);
    put_be32(head + 100, 104);
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR | DR_FILE_CREATE, &file, &err));
    ok(dr_file_pwrite(file, head, 0, sizeof(head), &err));
    put_be64(raw, 2 * CLUSTER);
    ok(dr_file_pwrite(file, raw, CLUSTER, sizeof(raw), &err));
    ok(dr_file_truncate(file, h->file_size, &err));
    return file;
}

static int open_image(struct dr_fs *fs, unsigned flags, struct dr_image **image,
                      struct dr_error *err)
{
    return dr_image_open(fs, PATH, "qcow2", flags, image, err);
}

static void ignore(void *user, const char *line)
{
    (void)user;
    (void)line;
}

/* Check it; the calls that takes. */
static uint64_t check_image(struct dr_fs *fs, struct dr_check_result *result)
{
    struct faultfs *faults = faultfs_new(fs);
    struct dr_image *image;
    *result = (struct dr_check_result){.report = ignore};
    ok(open_image(faultfs_fs(faults), 0, &image, &err));
    ok(image->fmt->check(image, 0, result, &err));
    dr_image_unref(image, NULL);
    uint64_t calls = faultfs_count(faults);
    faultfs_free(faults);
    return calls;
}

static int setup(void **state)
{
    *state = dr_fs_memory_new();
    return 0;
}

static int teardown(void **state)
{
    dr_fs_memory_free(*state);
    return 0;
}

/* ------------------------------------------------------------------ sizes */

static void a_disk_of_2_63_bytes_in_small_clusters_is_refused(void **state)
{
    struct hostile h = {.size = INT64_MAX / 512 * 512,
                        .l1_at = 4 * CLUSTER,
                        .l1_entries = UINT32_MAX,
                        .file_size = 8 * CLUSTER};
    struct dr_image *image;
    dr_file_unref(make_image(*state, &h));
    refused(open_image(*state, 0, &image, &err), EFBIG, "the L1 table has");
    h.l1_entries = MAX_L1 / 8;
    dr_file_unref(make_image(*state, &h));
    refused(open_image(*state, 0, &image, &err), EINVAL, "of disk need");
}

/* 128 GiB of nothing, in a table of 32 MiB that is a hole of the file. */
static void the_largest_l1_table_costs_what_it_holds(void **state)
{
    struct hostile h = {.size = MAX_L1 / 8 * 64 * UINT64_C(512),
                        .l1_at = 4 * CLUSTER,
                        .l1_entries = MAX_L1 / 8,
                        .file_size = 4 * CLUSTER + MAX_L1};
    struct dr_check_result result;
    struct dr_image *image;
    struct dr_extent ext;
    struct faultfs *faults = faultfs_new(*state);
    dr_file_unref(make_image(*state, &h));
    assert_in_range(check_image(*state, &result), 1, 100);
    faultfs_reset(faults);
    ok(open_image(faultfs_fs(faults), 0, &image, &err));
    uint64_t off = 0;
    for (unsigned questions = 0; off < h.size && questions < 100; questions++, off += ext.len)
        ok(dr_image_map(image, off, h.size - off, &ext, &err));
    assert_int_equal(off, h.size);
    assert_in_range(faultfs_count(faults), 1, 300);
    dr_image_unref(image, NULL);
    faultfs_free(faults);
}

/* 4 million entries, of one L2 table, whose entries all lead to the L1 table. */
static void tables_that_lead_to_each_other_are_read_once(void **state)
{
    struct hostile h = {.size = MAX_L1 / 8 * 64 * UINT64_C(512),
                        .l1_at = 4 * CLUSTER,
                        .l1_entries = MAX_L1 / 8,
                        .file_size = 4 * CLUSTER + MAX_L1};
    struct dr_check_result result;
    struct dr_file *file = make_image(*state, &h);
    uint8_t *l1 = malloc(MAX_L1), l2[CLUSTER];
    for (size_t i = 0; i < MAX_L1; i += 8)
        put_be64(l1 + i, 3 * CLUSTER);
    for (size_t i = 0; i < sizeof(l2); i += 8)
        put_be64(l2 + i, 4 * CLUSTER + i * CLUSTER);
    ok(dr_file_pwrite(file, l2, 3 * CLUSTER, sizeof(l2), &err));
    ok(dr_file_pwrite(file, l1, h.l1_at, MAX_L1, &err));
    dr_file_unref(file);
    free(l1);
    assert_in_range(check_image(*state, &result), 1, 1000);
    assert_true(result.corruptions > 0);
}

/* ------------------------------------------------------------------ snapshots */

static int count_one(void *user, const struct dr_snapshot_info *info)
{
    (void)info;
    ++*(unsigned *)user;
    return 0;
}

static void as_many_snapshots_as_there_can_be_are_listed(void **state)
{
    struct hostile h = {.size = 32 * KiB,
                        .l1_at = 3 * CLUSTER,
                        .l1_entries = 1,
                        .n_snapshots = 65536,
                        .snapshots_at = 8 * CLUSTER,
                        .file_size = 8 * CLUSTER + 65536 * 40};
    struct dr_image *image;
    struct dr_check_result result;
    unsigned n = 0;
    struct faultfs *faults = faultfs_new(*state);
    dr_file_unref(make_image(*state, &h));
    ok(open_image(faultfs_fs(faults), 0, &image, &err));
    ok(dr_image_snapshot_list(image, count_one, &n, &err));
    dr_image_unref(image, NULL);
    assert_int_equal(n, 65536);
    assert_in_range(faultfs_count(faults), 1, 30);
    assert_in_range(check_image(*state, &result), 1, 300);
    h.n_snapshots++;
    dr_file_unref(make_image(*state, &h));
    refused(open_image(*state, 0, &image, &err), EFBIG, "65537 snapshots");
    faultfs_free(faults);
}

/* Each has the same L1 table of 32 MiB: 128 GiB of tables, were they read one by one. */
static void snapshots_with_one_large_table_read_it_once(void **state)
{
    enum { N = 4096 };
    struct hostile h = {.size = 32 * KiB,
                        .l1_at = 3 * CLUSTER,
                        .l1_entries = 1,
                        .n_snapshots = N,
                        .snapshots_at = 8 * CLUSTER,
                        .file_size = MiB + MAX_L1};
    struct dr_check_result result;
    struct dr_file *file = make_image(*state, &h);
    uint8_t *table = calloc(N, 40);
    for (size_t i = 0; i < N; i++) {
        put_be64(table + 40 * i, MiB);
        put_be32(table + 40 * i + 8, MAX_L1 / 8);
    }
    uint8_t *l1 = calloc(1, MAX_L1); /* no hole */
    ok(dr_file_pwrite(file, table, h.snapshots_at, N * 40, &err));
    ok(dr_file_pwrite(file, l1, MiB, MAX_L1, &err));
    dr_file_unref(file);
    free(table);
    free(l1);
    assert_in_range(check_image(*state, &result), 1, N + 300);
}

/* It is known to be in use though the counts do not say so, and no entry may lead to it. */
static void an_l1_table_of_a_snapshot_is_not_written_over(void **state)
{
    struct hostile h = {.size = 32 * KiB,
                        .l1_at = 3 * CLUSTER,
                        .l1_entries = 1,
                        .n_snapshots = 1,
                        .snapshots_at = 8 * CLUSTER,
                        .file_size = 16 * CLUSTER};
    uint8_t raw[40] = {0}, now[8], data[CLUSTER] = {1};
    uint64_t copied = UINT64_C(1) << 63;
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    for (unsigned leads_there = 0; leads_there < 2; leads_there++) {
        struct dr_file *file = make_image(*state, &h);
        put_be64(raw, 9 * CLUSTER); /* the snapshot's L1 table */
        put_be32(raw + 8, 1);
        ok(dr_file_pwrite(file, raw, h.snapshots_at, sizeof(raw), &err));
        put_be64(raw, 4 * CLUSTER | copied);
        ok(dr_file_pwrite(file, raw, h.l1_at, 8, &err));
        put_be64(raw, leads_there ? 9 * CLUSTER | copied : 0);
        ok(dr_file_pwrite(file, raw, 4 * CLUSTER, 8, &err));
        memset(raw, 0, sizeof(raw));
        for (unsigned i = 0; i < 9; i++) /* all but the snapshot's table are counted */
            raw[2 * i + 1] = 1;
        ok(dr_file_pwrite(file, raw, 2 * CLUSTER, sizeof(raw), &err));
        dr_file_unref(file);
        ok(dr_open_fs(*state, PATH, &o, &disk, &err));
        refused(dr_pwrite(disk, data, 0, sizeof(data), 0, &err), EIO, "a table");
        dr_close(disk, NULL);
        ok(dr_file_open(*state, PATH, 0, &file, &err));
        ok(dr_file_pread(file, now, 9 * CLUSTER, sizeof(now), &err));
        assert_true(dr_is_zero(now, sizeof(now)));
        dr_file_unref(file);
    }
}

/* ------------------------------------------------------------------ two tables in one place */

/* The first refcount block is the disk's L2 table, too: an entry and the count of what it leads to
 * stand in one sector, of which the one must be durable before the other. */
static void an_entry_beside_its_count_is_refused(void **state)
{
    struct hostile h = {
        .size = 32 * KiB, .l1_at = 3 * CLUSTER, .l1_entries = 1, .file_size = 16 * CLUSTER};
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    uint8_t raw[8], data[CLUSTER] = {1}, before[CLUSTER], now[CLUSTER];
    struct dr_file *file = make_image(*state, &h);
    struct dr_disk *disk;
    put_be64(raw, 2 * CLUSTER | UINT64_C(1) << 63);
    ok(dr_file_pwrite(file, raw, h.l1_at, sizeof(raw), &err));
    put_be64(raw, UINT64_C(0x0001000100010001));
    ok(dr_file_pwrite(file, raw, 2 * CLUSTER, sizeof(raw), &err));
    ok(dr_file_pread(file, before, 2 * CLUSTER, sizeof(before), &err));
    dr_file_unref(file);
    ok(dr_open_fs(*state, PATH, &o, &disk, &err));
    refused(dr_pwrite(disk, data, 10 * CLUSTER, sizeof(data), 0, &err), EIO, "is damaged");
    ok(dr_close(disk, &err));
    ok(dr_file_open(*state, PATH, 0, &file, &err));
    ok(dr_file_pread(file, now, 2 * CLUSTER, sizeof(now), &err));
    dr_file_unref(file);
    assert_memory_equal(before, now, sizeof(now));
}

/* ------------------------------------------------------------------ bombs */

/* 1 MiB of zeros, deflated, as a cluster of 512 bytes: no more than that is decoded. */
static void a_decompression_bomb_gives_a_cluster_at_most(void **state)
{
    struct hostile h = {
        .size = 32 * KiB, .l1_at = 3 * CLUSTER, .l1_entries = 1, .file_size = 16 * CLUSTER};
    struct dr_file *file = make_image(*state, &h);
    uint8_t raw[8], coded[4 * CLUSTER] = {0}, data[2 * CLUSTER];
    uint8_t *zeros = calloc(1, MiB);
    z_stream z = {.next_in = zeros, .avail_in = MiB, .next_out = coded, .avail_out = sizeof(coded)};
    assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    free(zeros);
    ok(dr_file_pwrite(file, coded, 5 * CLUSTER, sizeof(coded), &err));
    put_be64(raw, 4 * CLUSTER | UINT64_C(1) << 63);
    ok(dr_file_pwrite(file, raw, h.l1_at, sizeof(raw), &err));
    put_be64(raw, UINT64_C(3) << 61 | 5 * CLUSTER);
    ok(dr_file_pwrite(file, raw, 4 * CLUSTER, sizeof(raw), &err));
    dr_file_unref(file);
    struct dr_disk *disk;
    ok(dr_open_fs(*state, PATH, NULL, &disk, &err));
    struct dr_error err = DR_ERROR_INIT;
    memset(data, 0x5a, sizeof(data));
    int r = dr_pread(disk, data, 0, CLUSTER, &err);
    assert_true(r == 0 || (r == -EIO && strstr(err.text, "dir/disk.qcow2")));
    assert_int_equal(data[CLUSTER], 0x5a);
    dr_close(disk, NULL);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_disk_of_2_63_bytes_in_small_clusters_is_refused),
        T(the_largest_l1_table_costs_what_it_holds),
        T(tables_that_lead_to_each_other_are_read_once),
        T(as_many_snapshots_as_there_can_be_are_listed),
        T(snapshots_with_one_large_table_read_it_once),
        T(an_l1_table_of_a_snapshot_is_not_written_over),
        T(an_entry_beside_its_count_is_refused),
        T(a_decompression_bomb_gives_a_cluster_at_most),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
