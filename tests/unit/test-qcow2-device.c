/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* qcow2 images on block devices, whose size is fixed and whose unused bytes hold junk. The random
 * operations on them are in the model tests. */
#include "test-ops.h"

#include "base/bytes.h"
#include "faultfs.h"
#include "powerfs.h"

#define DEVICE "dir/device"

/* A device of that size; its bytes look like entries of tables. */
static void make_device(struct dr_fs *fs, uint64_t size)
{
    struct dr_file *f;
    uint8_t *junk = malloc(size);
    for (uint64_t i = 0; i + 8 <= size; i += 8)
        put_be64(junk + i, (UINT64_C(1) << 63) | (i * 37 % size & ~UINT64_C(511)));
    ok(dr_file_open(fs, DEVICE, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, junk, 0, size, &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
    free(junk);
    ok(fs->ops->sync_dir(fs, DEVICE, &err));
    ok(fs->ops->make_device(fs, DEVICE, &err));
}

static int make_image(struct dr_fs *fs, uint64_t size, const char *cluster, struct dr_error *err)
{
    const struct dr_pair pairs[] = {{"cluster_size", cluster}};
    struct dr_create_options o = {
        .format = "qcow2", .size = size, .has_size = true, .pairs = pairs, .n_pairs = 1};
    return dr_create_fs(fs, DEVICE, &o, err);
}

static void say_nothing(void *user, const char *line)
{
    (void)user;
    (void)line;
}

static void is_sound(struct dr_fs *fs)
{
    struct dr_check_result result = {.report = say_nothing};
    struct dr_image *image;
    ok(dr_image_open(fs, DEVICE, "qcow2", 0, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    ok(dr_image_unref(image, &err));
    assert_int_equal(result.corruptions, 0);
    assert_int_equal(result.leaks, 0);
}

static void a_new_image_on_a_device_is_empty_and_sound(void **state)
{
    static const char *const clusters[] = {"512", "4096", "64k", "1M"};
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_device(fs, 6 * MiB + 512);
        ok(make_image(fs, 3 * MiB, clusters[i], &err));
        uint64_t size;
        uint8_t *all = view(fs, DEVICE, &size);
        assert_int_equal(size, 3 * MiB);
        for (uint64_t at = 0; at < size; at++)
            assert_int_equal(all[at], 0);
        free(all);
        is_sound(fs);
        dr_fs_memory_free(fs);
    }
}

static void a_device_too_small_for_the_tables_is_left_as_it_is(void **state)
{
    uint8_t before[512], after[512];
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f;
    (void)state;
    make_device(fs, 128 * KiB);
    ok(dr_file_open(fs, DEVICE, 0, &f, &err));
    ok(dr_file_pread(f, before, 0, sizeof(before), &err));
    dr_file_unref(f);
    refused(make_image(fs, 1 * MiB, "64k", &err), ENOSPC, "it has 131072 bytes");
    ok(dr_file_open(fs, DEVICE, 0, &f, &err));
    ok(dr_file_pread(f, after, 0, sizeof(after), &err));
    dr_file_unref(f);
    assert_memory_equal(before, after, sizeof(before));
    dr_fs_memory_free(fs);
}

/* Bytes of one value at every 64 KiB until there is no more room; how many there are. */
static uint64_t fill(struct dr_disk *disk)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t block[4096];
    for (uint64_t n = 0;; n++) {
        memset(block, (int)(n % 255 + 1), sizeof(block));
        int r = dr_pwrite(disk, block, n * 64 * KiB, sizeof(block), 0, &err);
        if (r == 0)
            continue;
        assert_int_equal(r, -ENOSPC);
        assert_non_null(strstr(err.text, "the device is full: all its 716800 bytes are in use"));
        return n;
    }
}

static void holds(struct dr_disk *disk, uint64_t from, uint64_t to)
{
    uint8_t block[4096];
    for (uint64_t n = from; n < to; n++) {
        ok(dr_pread(disk, block, n * 64 * KiB, sizeof(block), &err));
        assert_int_equal(block[0], n % 255 + 1);
        assert_int_equal(block[4095], n % 255 + 1);
    }
}

/* All that was written before the device was full is there; what is given back can be used again.
 */
static void a_full_device_refuses_and_keeps_what_it_has(void **state)
{
    static const char *const clusters[] = {"512", "4096", "64k"};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_open_options o = {.format = "qcow2", .flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        make_device(fs, 700 * KiB);
        ok(make_image(fs, 64 * MiB, clusters[i], &err));
        ok(dr_open_fs(fs, DEVICE, &o, &disk, &err));
        uint64_t n = fill(disk);
        assert_true(n > 4);
        holds(disk, 0, n);
        ok(dr_discard(disk, 0, 128 * KiB, &err));
        ok(dr_flush(disk, &err));
        ok(dr_pwrite(disk, "again", 64 * KiB, 5, 0, &err));
        holds(disk, 2, n);
        ok(dr_close(disk, &err));
        is_sound(fs);
        dr_fs_memory_free(fs);
    }
}

/* The tables grow and move, and the disk shrinks: the device keeps its size. */
static void an_image_on_a_device_is_resized(void **state)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_open_options o = {.format = "qcow2", .flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    struct dr_file *f;
    uint8_t block[512];
    (void)state;
    make_device(fs, 1 * MiB);
    ok(make_image(fs, 64 * KiB, "512", &err));
    ok(dr_open_fs(fs, DEVICE, &o, &disk, &err));
    memset(block, 7, sizeof(block));
    ok(dr_pwrite(disk, block, 64 * KiB - 512, sizeof(block), 0, &err));
    ok(dr_truncate(disk, 64 * MiB, &err));
    ok(dr_pread(disk, block, 32 * MiB, sizeof(block), &err));
    assert_int_equal(block[0], 0);
    memset(block, 9, sizeof(block));
    ok(dr_pwrite(disk, block, 64 * MiB - 512, sizeof(block), 0, &err));
    ok(dr_truncate(disk, 64 * KiB, &err));
    ok(dr_pread(disk, block, 64 * KiB - 512, sizeof(block), &err));
    assert_int_equal(block[0], 7);
    ok(dr_close(disk, &err));
    is_sound(fs);
    ok(dr_file_open(fs, DEVICE, 0, &f, &err));
    assert_int_equal(dr_file_size(f), 1 * MiB);
    dr_file_unref(f);
    dr_fs_memory_free(fs);
}

static void the_counts_of_an_image_on_a_device_get_another_width(void **state)
{
    static const char *const bits[] = {"64", "1", "16"};
    struct dr_fs *fs = dr_fs_memory_new();
    (void)state;
    make_device(fs, 1 * MiB);
    ok(make_image(fs, 256 * KiB, "512", &err));
    put(fs, DEVICE, 5000, 200 * KiB, 5);
    for (size_t i = 0; i < 3; i++) {
        const struct dr_pair pairs[] = {{"refcount_bits", bits[i]}};
        struct dr_amend_options o = {.pairs = pairs, .n_pairs = 1};
        ok(dr_amend_fs(fs, DEVICE, &o, NULL, &err));
        is_sound(fs);
        put(fs, DEVICE, 210 * KiB + 512 * i, 4 * KiB, 6);
        is_sound(fs);
    }
    dr_fs_memory_free(fs);
}

/* Creating an image over an older one: whenever it is cut off there is the old image, the new one,
 * or none. */
static void a_cut_creation_never_shows_a_mixture(void **state)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    unsigned old_ones = 0, none = 0, new_ones = 0;
    (void)state;
    make_device(fs, 1 * MiB);
    ok(make_image(fs, 256 * KiB, "512", &err));
    put(fs, DEVICE, 0, 200 * KiB, 5);
    powerfs_settle(p);
    ok(make_image(fs, 128 * KiB, "4096", &err));
    for (size_t k = 0; k <= powerfs_ops(p); k++)
        for (unsigned seed = 0; seed < 4 * POWERFS_MODES; seed++) {
            struct dr_fs *disk = powerfs_cut(p, k, seed % POWERFS_MODES, seed);
            struct dr_image *image;
            uint64_t size;
            if (dr_image_open(disk, DEVICE, "qcow2", 0, &image, NULL) < 0) {
                none++;
                dr_fs_memory_free(disk);
                continue;
            }
            ok(dr_image_unref(image, &err));
            is_sound(disk);
            uint8_t *all = view(disk, DEVICE, &size);
            bool old = size == 256 * KiB;
            assert_true(old || size == 128 * KiB);
            for (uint64_t at = 0; at < size; at++)
                assert_int_equal(all[at], old && at < 200 * KiB ? 5 : 0);
            free(all);
            old_ones += old;
            new_ones += !old;
            dr_fs_memory_free(disk);
        }
    assert_true(old_ones > 0 && none > 0 && new_ones > 0);
    powerfs_free(p);
}

static int unreadable(void *user, const struct faultfs_io *io)
{
    const uint64_t *from = user;
    return io->kind == FAULTFS_READ && strcmp(io->path, "dir/source.raw") == 0 && io->off >= *from
               ? -EIO
               : 0;
}

/* A copy that failed half-way is no image: nobody takes it for the whole. */
static void a_conversion_that_fails_leaves_no_image_on_the_device(void **state)
{
    static const char *const sources[] = {"dir/source.raw"};
    static const struct dr_convert_options o = {.out_format = "qcow2"};
    uint64_t from = 2 * MiB;
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *faults = faultfs_new(fs);
    struct dr_image *image;
    (void)state;
    make(fs, sources[0], "raw", 3 * MiB, NULL);
    put(fs, sources[0], 0, 3 * MiB, 7);
    make_device(fs, 8 * MiB);
    faultfs_observe(faults, unreadable, &from);
    refused(dr_convert_fs(faultfs_fs(faults), sources, 1, DEVICE, &o, NULL, &err), EIO, "source");
    assert_true(dr_image_open(fs, DEVICE, "qcow2", 0, &image, NULL) < 0);
    faultfs_observe(faults, NULL, NULL);
    ok(dr_convert_fs(faultfs_fs(faults), sources, 1, DEVICE, &o, NULL, &err));
    is_sound(fs);
    faultfs_free(faults);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_new_image_on_a_device_is_empty_and_sound),
        cmocka_unit_test(a_device_too_small_for_the_tables_is_left_as_it_is),
        cmocka_unit_test(a_full_device_refuses_and_keeps_what_it_has),
        cmocka_unit_test(an_image_on_a_device_is_resized),
        cmocka_unit_test(the_counts_of_an_image_on_a_device_get_another_width),
        cmocka_unit_test(a_cut_creation_never_shows_a_mixture),
        cmocka_unit_test(a_conversion_that_fails_leaves_no_image_on_the_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
