/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The raw format: its options, the space it takes, and sizes. */
#include "faultfs.h"
#include "test-ops.h"

static int create(struct dr_fs *fs, uint64_t size, const struct dr_pair *pairs, size_t n,
                  struct dr_error *err)
{
    struct dr_create_options o = {
        .format = "raw", .size = size, .has_size = true, .pairs = pairs, .n_pairs = n};
    return dr_create_fs(fs, "x.raw", &o, err);
}

static void each_create_option_is_taken_or_refused_by_its_value(void **state)
{
    static const struct {
        struct dr_pair pair;
        int errnum;
        const char *word;
    } rows[] = {
        {{"nocow", "off"}, 0, ""},
        {{"nocow", "on"}, 0, ""},
        {{"nocow", "frob"}, EINVAL, "expects 'on' or 'off'"},
        {{"extent_size_hint", "0"}, 0, ""},
        {{"extent_size_hint", "64k"}, 0, ""},
        {{"extent_size_hint", "1M"}, 0, ""},
        {{"extent_size_hint", ""}, EINVAL, "no size"},
        {{"extent_size_hint", "M"}, EINVAL, "no size"},
        {{"extent_size_hint", "1x"}, EINVAL, "no size"},
        {{"extent_size_hint", "1MM"}, EINVAL, "no size"},
        {{"preallocation", "off"}, 0, ""},
        {{"preallocation", "falloc"}, 0, ""},
        {{"preallocation", "full"}, 0, ""},
        {{"preallocation", "metadata"}, EINVAL, "preallocation"},
        {{"subformat", "x"}, EINVAL, "subformat"},
    };
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        struct dr_error err = DR_ERROR_INIT;
        int r = create(fs, MiB, &rows[i].pair, 1, &err);
        if (r != -rows[i].errnum || !strstr(err.text, rows[i].word))
            fail_msg("%s=%s: %d: %s", rows[i].pair.name, rows[i].pair.value, r, err.text);
        assert_int_equal(exists(fs, "x.raw"), r == 0);
        if (r == 0)
            assert_int_equal(fs->ops->unlink(fs, "x.raw", NULL), 0);
    }
}

static void preallocation_full_takes_the_space_and_nothing_takes_none(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_pair full = {"preallocation", "full"};
    uint64_t size = 9 * MiB + 512, n;
    ok(create(fs, size, NULL, 0, &err));
    assert_int_equal(disk_size(fs, "x.raw"), 0);
    ok(fs->ops->unlink(fs, "x.raw", &err));
    ok(create(fs, size, &full, 1, &err));
    assert_true(disk_size(fs, "x.raw") >= size);
    uint8_t *bytes = view(fs, "x.raw", &n);
    assert_int_equal(n, size);
    for (uint64_t i = 0; i < n; i++)
        assert_int_equal(bytes[i], 0);
    free(bytes);
}

static void sizes_are_rounded_up_to_sectors(void **state)
{
    static const uint64_t sizes[][2] = {{0, 0}, {1, 512}, {511, 512}, {512, 512}, {513, 1024}};
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < 5; i++) {
        uint64_t n;
        ok(create(fs, sizes[i][0], NULL, 0, &err));
        free(view(fs, "x.raw", &n));
        assert_int_equal(n, sizes[i][1]);
        ok(fs->ops->unlink(fs, "x.raw", &err));
    }
    refused(create(fs, INT64_MAX, NULL, 0, &err), EFBIG, "more than a disk can have");
    assert_false(exists(fs, "x.raw"));
}

static int fail_plain_zeroing(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_ZERO || io->kind == FAULTFS_WRITE ? -EIO : 0;
}

/* Nothing of a raw disk is overwritten, zeroed or given back without the caller being told when
 * that fails. */
static void each_change_that_fails_is_told(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    uint8_t buf[512] = {1};
    make(fs, "x.raw", "raw", MiB, NULL);
    put(fs, "x.raw", 0, MiB, 5);
    ok(dr_open_fs(faultfs_fs(f), "x.raw", &o, &disk, &err));
    faultfs_observe(f, fail_plain_zeroing, NULL);
    refused(dr_pwrite(disk, buf, 0, sizeof(buf), 0, &err), EIO, "x.raw");
    refused(dr_pwrite(disk, buf, 0, sizeof(buf), DR_FUA, &err), EIO, "x.raw");
    refused(dr_zero(disk, 0, 64 * KiB, 0, &err), EIO, "x.raw");
    refused(dr_discard(disk, 0, 64 * KiB, &err), EIO, "x.raw");
    faultfs_observe(f, NULL, NULL);
    ok(dr_pread(disk, buf, 0, sizeof(buf), &err));
    assert_int_equal(buf[0], 5);
    ok(dr_discard(disk, 0, 64 * KiB, &err));
    ok(dr_pread(disk, buf, 0, sizeof(buf), &err));
    assert_int_equal(buf[0], 0);
    ok(dr_close(disk, &err));
    faultfs_free(f);
}

static void requests_outside_the_disk_or_of_readers_do_nothing(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    uint8_t buf[512] = {1};
    make(fs, "x.raw", "raw", MiB, NULL);
    put(fs, "x.raw", 0, MiB, 5);
    ok(dr_open_fs(fs, "x.raw", &o, &disk, &err));
    refused(dr_pwrite(disk, buf, MiB - 511, sizeof(buf), 0, &err), EINVAL, "x.raw");
    refused(dr_pread(disk, buf, MiB - 511, sizeof(buf), &err), EINVAL, "x.raw");
    refused(dr_zero(disk, UINT64_MAX - 511, 1024, 0, &err), EINVAL, "x.raw");
    refused(dr_discard(disk, MiB, 1, &err), EINVAL, "x.raw");
    refused(dr_pwrite(disk, buf, 0, sizeof(buf), 1 << 30, &err), EINVAL, "unknown flags");
    ok(dr_pwrite(disk, buf, MiB - 512, sizeof(buf), 0, &err));
    ok(dr_discard(disk, MiB, 0, &err));
    ok(dr_close(disk, &err));
    ok(dr_open_fs(fs, "x.raw", NULL, &disk, &err));
    refused(dr_pwrite(disk, buf, 0, sizeof(buf), 0, &err), EROFS, "reading only");
    refused(dr_zero(disk, 0, 512, 0, &err), EROFS, "reading only");
    refused(dr_discard(disk, 0, 512, &err), EROFS, "reading only");
    ok(dr_pread(disk, buf, 0, sizeof(buf), &err));
    assert_int_equal(buf[0], 5);
    ok(dr_close(disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(each_create_option_is_taken_or_refused_by_its_value),
        ops_test(preallocation_full_takes_the_space_and_nothing_takes_none),
        ops_test(sizes_are_rounded_up_to_sectors),
        ops_test(each_change_that_fails_is_told),
        ops_test(requests_outside_the_disk_or_of_readers_do_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
