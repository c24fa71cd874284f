/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps inside qcow2 images: what a failure leaves to later writes, and directories made to cost
 * much. */
#include "test-ops.h"

#include "base/bytes.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "formats/qcow2/bitmap.h"

#define PATH "dir/disk.qcow2"
#define SIZE (1 * MiB)

static struct dr_disk *open_disk(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    return disk;
}

static void change(struct dr_disk *disk, const char *name, enum dr_bitmap_action action)
{
    ok(dr_disk_bitmap_change(disk, name, action, NULL, &err));
}

/* "one" is enabled and has bits; "two" is disabled and has others. */
static void make_two(struct dr_fs *fs, const char *cluster)
{
    const struct dr_pair pairs[] = {{"cluster_size", cluster}};
    const struct dr_bitmap_options fine = {.granularity = 512};
    struct dr_create_options o = {
        .format = "qcow2", .size = SIZE, .has_size = true, .pairs = pairs, .n_pairs = 1};
    ok(dr_create_fs(fs, PATH, &o, &err));
    put(fs, PATH, 0, 300 * KiB, 9);
    struct dr_disk *disk = open_disk(fs);
    ok(dr_disk_bitmap_change(disk, "two", DR_BITMAP_ADD, &fine, &err));
    ok(dr_close(disk, &err));
    put(fs, PATH, 512 * KiB, 4 * KiB, 1);
    disk = open_disk(fs);
    change(disk, "two", DR_BITMAP_DISABLE);
    ok(dr_disk_bitmap_change(disk, "one", DR_BITMAP_ADD, &fine, &err));
    ok(dr_close(disk, &err));
    put(fs, PATH, 64 * KiB, 6 * KiB, 2);
}

static void drop_line(void *user, const char *line)
{
    (void)user;
    (void)line;
}

static struct dr_check_result check(struct dr_fs *fs)
{
    struct dr_check_result result = {.report = drop_line};
    struct dr_image *image;
    ok(dr_image_open(fs, PATH, "qcow2", 0, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    ok(dr_image_unref(image, &err));
    return result;
}

/* ------------------------------------------------------------------ failures */

static int has_sector(void *user, uint64_t off, uint64_t len)
{
    bool *found = user;
    *found |= off <= 700 * KiB && off + len > 700 * KiB;
    return 0;
}

/* Every enabled bitmap that may be relied on says that byte 700 Ki was written to. */
static void is_noted(struct dr_fs *fs, uint64_t nth)
{
    struct dr_open_options o = {.flags = DR_OPEN_NO_LOCK};
    struct dr_bitmap *list = NULL;
    struct dr_disk *disk;
    size_t n = 0;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    for (size_t i = 0; i < n; i++) {
        bool found = false;
        if (list[i].inconsistent || !list[i].enabled)
            continue;
        ok(dr_disk_bitmap_read(disk, list[i].name, has_sector, &found, &err));
        if (!found)
            fail_msg("I/O %llu failed: \"%s\" misses a write", (unsigned long long)nth,
                     list[i].name);
    }
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
}

/* The nth I/O of a change or, without a name, of freezing the image fails, then the guest goes on.
 * False: there is none. */
static bool write_after_failure(enum dr_bitmap_action action, const char *name, uint64_t nth)
{
    const struct dr_bitmap_options o = {.source = "one"};
    struct dr_fs *fs = dr_fs_memory_new();
    make_two(fs, "4096");
    struct faultfs *faults = faultfs_new(fs);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    uint8_t sector[512] = {77};
    ok(dr_pwrite(disk, sector, 900 * KiB, sizeof(sector), 0, &err));
    faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
    if (name)
        dr_disk_bitmap_change(disk, name, action, &o, NULL);
    else if (dr_image_freeze(disk->chain->images[0], NULL) == 0)
        ok(dr_image_thaw(disk->chain->images[0], false, &err));
    bool failed = faultfs_fired(faults);
    faultfs_disarm(faults);
    bool wrote = dr_pwrite(disk, sector, 700 * KiB, sizeof(sector), 0, NULL) == 0;
    if (wrote)
        is_noted(fs, nth); /* as somebody finds it who comes after a kill */
    dr_close(disk, NULL);
    faultfs_free(faults);
    if (wrote)
        is_noted(fs, nth);
    assert_int_equal(check(fs).corruptions, 0);
    dr_fs_memory_free(fs);
    return failed;
}

static void what_is_written_after_a_freezing_that_failed_is_noted(void **state)
{
    (void)state;
    for (uint64_t nth = 0; write_after_failure(0, NULL, nth); nth++)
        ;
}

static void what_is_written_after_a_change_that_failed_is_noted(void **state)
{
    (void)state;
    for (uint64_t nth = 0; write_after_failure(DR_BITMAP_ADD, "new", nth); nth++)
        ;
    for (uint64_t nth = 0; write_after_failure(DR_BITMAP_ENABLE, "two", nth); nth++)
        ;
    for (uint64_t nth = 0; write_after_failure(DR_BITMAP_MERGE, "two", nth); nth++)
        ;
}

/* Where there is no room for a cluster of bits they all count as set, and its place is free. */
static void a_merge_without_room_for_bits_leaks_nothing(void **state)
{
    const struct dr_bitmap_options o = {.source = "one"};
    bool failed = true;
    (void)state;
    for (uint64_t nth = 0; failed; nth++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_two(fs, "512");
        struct faultfs *faults = faultfs_new(fs);
        struct dr_disk *disk = open_disk(faultfs_fs(faults));
        faultfs_arm(faults, &(struct faultfs_plan){
                                .nth = nth, .kinds = 1u << FAULTFS_WRITE, .error = ENOSPC});
        int r = dr_disk_bitmap_change(disk, "two", DR_BITMAP_MERGE, &o, NULL);
        failed = faultfs_fired(faults);
        faultfs_disarm(faults);
        int closed = dr_close(disk, NULL);
        faultfs_free(faults);
        if (r == 0 && closed == 0)
            assert_int_equal(check(fs).leaks, 0);
        dr_fs_memory_free(fs);
    }
}

/* The nth I/O of a change of the size fails. False: there is none. */
static bool resize_with_failure(uint64_t size, uint64_t nth)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    make_two(fs, "4096");
    struct faultfs *faults = faultfs_new(fs);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
    int r = dr_truncate(disk, size, NULL);
    bool failed = faultfs_fired(faults);
    faultfs_disarm(faults);
    int closed = dr_close(disk, NULL);
    faultfs_free(faults);
    assert_int_equal(check(fs).corruptions, 0);
    ok(dr_open_fs(fs, PATH, NULL, &disk, &err));
    if (r == 0)
        assert_int_equal(dr_size(disk), size);
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    assert_int_equal(n, 2);
    for (size_t i = 0; i < n && r == 0 && closed == 0; i++)
        if (list[i].inconsistent)
            fail_msg("I/O %llu failed: \"%s\" is lost, and nobody was told",
                     (unsigned long long)nth, list[i].name);
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
    return failed;
}

static void a_resize_that_loses_bitmaps_fails(void **state)
{
    (void)state;
    for (uint64_t nth = 0; resize_with_failure(2 * SIZE, nth); nth++)
        ;
    for (uint64_t nth = 0; resize_with_failure(SIZE / 2, nth); nth++)
        ;
}

/* ------------------------------------------------------------------ copies */

static void a_copy_of_bitmaps_that_the_target_has_leaves_its_data(void **state)
{
    static const char *const sources[] = {PATH};
    static const struct dr_convert_options o = {
        .out_format = "qcow2", .no_create = true, .bitmaps = true};
    struct dr_create_options target = {.format = "qcow2", .size = SIZE, .has_size = true};
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    uint64_t size;
    (void)state;
    make_two(fs, "4096");
    ok(dr_create_fs(fs, "dir/target", &target, &err));
    put(fs, "dir/target", 0, SIZE, 8);
    ok(dr_open_fs(fs, "dir/target", &open, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "one", DR_BITMAP_ADD, NULL, &err));
    ok(dr_close(disk, &err));
    uint8_t *before = view(fs, "dir/target", &size);
    refused(dr_convert_fs(fs, sources, 1, "dir/target", &o, NULL, &err), EEXIST, "exists: one");
    same_view(fs, "dir/target", before, size);
    free(before);
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ hostile directories */

/* Where the directory is, and in the header what names it. */
static uint64_t find_directory(struct dr_file *f, uint64_t *extension)
{
    uint8_t head[4096];
    ok(dr_file_pread(f, head, 0, sizeof(head), &err));
    size_t at = get_be32(head + 100);
    while (get_be32(head + at) != QCOW2_EXT_BITMAPS)
        at += 8 + dr_round_up(get_be32(head + at + 4), 8);
    *extension = at + 8;
    return get_be64(head + at + 8 + 16);
}

/* The directory gets n entries, all of which have the table of the first, with so many entries. */
static void multiply(struct dr_fs *fs, uint32_t n, uint32_t entries)
{
    struct dr_file *f;
    uint8_t first[24], ext[24] = {0};
    uint64_t extension, len = n * UINT64_C(32);
    ok(dr_file_open(fs, PATH, DR_FILE_RDWR, &f, &err));
    uint64_t at = find_directory(f, &extension);
    ok(dr_file_pread(f, first, at, sizeof(first), &err));
    CLEANUP_FREE uint8_t *all = calloc(n, 32);
    put_be32(first + 8, entries);
    put_be32(first + 12, QCOW2_BITMAP_AUTO);
    put_be16(first + 18, 8);
    for (uint32_t i = 0; i < n; i++) {
        char name[9];
        memcpy(all + i * 32, first, sizeof(first));
        snprintf(name, sizeof(name), "%08u", i);
        memcpy(all + i * 32 + 24, name, 8);
    }
    put_be32(ext, n);
    put_be64(ext + 8, len);
    put_be64(ext + 16, at);
    ok(dr_file_pwrite(f, all, at, len, &err));
    ok(dr_file_pwrite(f, ext, extension, sizeof(ext), &err));
    ok(dr_file_truncate(f, UINT64_C(4) << 30, &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
}

static void bitmaps_that_share_a_table_cost_no_more_than_one(void **state)
{
    uint8_t sector[512] = {1};
    struct dr_fs *fs = dr_fs_memory_new();
    (void)state;
    make_two(fs, "64k");
    multiply(fs, 2000, 1);
    struct faultfs *faults = faultfs_new(fs);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    faultfs_reset(faults);
    refused(dr_pwrite(disk, sector, 0, sizeof(sector), 0, &err), EIO, "00000001");
    assert_in_range(faultfs_count(faults), 1, 100);
    ok(dr_close(disk, &err));
    faultfs_free(faults);
    dr_fs_memory_free(fs);
}

static void tables_of_bitmaps_that_overlap_are_refused(void **state)
{
    (void)state;
    for (uint32_t n = 2; n < 5; n++) {
        uint8_t sector[512] = {1};
        struct dr_fs *fs = dr_fs_memory_new();
        make_two(fs, "64k");
        multiply(fs, n, 1);
        struct dr_disk *disk = open_disk(fs);
        refused(dr_pwrite(disk, sector, 0, sizeof(sector), 0, &err), EIO, "overlap");
        ok(dr_close(disk, &err));
        dr_fs_memory_free(fs);
    }
}

/* 2^27 entries would be 1 GiB of table, for 8 TiB of bits. */
static void a_table_for_more_bits_than_a_bitmap_may_have_is_not_read(void **state)
{
    uint8_t sector[512] = {1};
    struct dr_fs *fs = dr_fs_memory_new();
    (void)state;
    make_two(fs, "64k");
    multiply(fs, 1, 1u << 27);
    struct dr_disk *disk = open_disk(fs);
    refused(dr_pwrite(disk, sector, 0, sizeof(sector), 0, &err), EIO, "size is out of bounds");
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_after_a_change_that_failed_is_noted),
        cmocka_unit_test(what_is_written_after_a_freezing_that_failed_is_noted),
        cmocka_unit_test(a_merge_without_room_for_bits_leaks_nothing),
        cmocka_unit_test(a_resize_that_loses_bitmaps_fails),
        cmocka_unit_test(a_copy_of_bitmaps_that_the_target_has_leaves_its_data),
        cmocka_unit_test(bitmaps_that_share_a_table_cost_no_more_than_one),
        cmocka_unit_test(tables_of_bitmaps_that_overlap_are_refused),
        cmocka_unit_test(a_table_for_more_bits_than_a_bitmap_may_have_is_not_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
