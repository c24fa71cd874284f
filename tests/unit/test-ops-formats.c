/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The operations on a format without content ids, over raw parents: nothing here knows a format. */
#include "test-ops.h"
#include "toy.h"

#define SIZE (256 * KiB)

static int toy_fs(void **state)
{
    static bool done;
    if (!done)
        dr_format_register(&dr_format_toy);
    done = true;
    return new_fs(state);
}

static void child(struct dr_fs *fs, const char *path, uint64_t size, const char *backing,
                  const char *backing_format)
{
    struct dr_create_options o = {.format = "toy",
                                  .size = size,
                                  .has_size = size != 0,
                                  .backing = backing,
                                  .backing_format = backing_format};
    ok(dr_create_fs(fs, path, &o, &err));
}

static void commit_grows_a_raw_base(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "base.raw", "raw", SIZE / 2, NULL);
    put(fs, "base.raw", 0, SIZE / 2, 0x11);
    child(fs, "top.toy", SIZE, "base.raw", "raw");
    put(fs, "top.toy", 4096, 4096, 0x22);
    put(fs, "top.toy", SIZE - 8192, 4096, 0x33);
    put(fs, "top.toy", 16384, 8192, 0);
    uint8_t *want = view(fs, "top.toy", &size);
    struct dr_commit_options o = {0};
    ok(dr_commit_fs(fs, "top.toy", &o, NULL, &err));
    same_view(fs, "top.toy", want, size);
    same_view(fs, "base.raw", want, size);
    free(want);
}

static void commit_does_not_uncover_a_deeper_tail(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "base.raw", "raw", SIZE, NULL);
    put(fs, "base.raw", 0, SIZE, 0x11);
    child(fs, "mid.toy", SIZE / 2, "base.raw", "raw");
    child(fs, "top.toy", SIZE, "mid.toy", "toy");
    uint8_t *want = view(fs, "top.toy", &size);
    assert_int_equal(want[SIZE - 1], 0);
    struct dr_commit_options o = {0};
    ok(dr_commit_fs(fs, "top.toy", &o, NULL, &err)); /* nothing lies there: mid stays short */
    same_view(fs, "top.toy", want, size);
    free(want);
    put(fs, "top.toy", SIZE - 4096, 4096, 0x22);
    want = view(fs, "top.toy", &size);
    refused(dr_commit_fs(fs, "top.toy", &o, NULL, &err), ENOTSUP, "mid.toy");
    same_view(fs, "top.toy", want, size);
    free(want);
}

static void raw_siblings_are_protected(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "base.raw", "raw", SIZE, NULL);
    child(fs, "one.toy", 0, "base.raw", "raw");
    child(fs, "two.toy", 0, "base.raw", "raw");
    struct dr_commit_options o = {0};
    refused(dr_commit_fs(fs, "one.toy", &o, NULL, &err), EBUSY, "two.toy");
}

static void rebase_between_formats(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size, seed = 4711;
    for (int round = 0; round < 30; round++) {
        make(fs, "a.raw", "raw", SIZE - 512 * (next_random(&seed) % 3), NULL);
        put(fs, "a.raw", next_random(&seed) % 100 * 512, 64 * KiB, 0x11);
        make(fs, "b.vmdk", "vmdk", SIZE, NULL);
        put(fs, "b.vmdk", next_random(&seed) % 100 * 512, 96 * KiB, 0x11);
        child(fs, "mid.toy", SIZE, "a.raw", "raw");
        put(fs, "mid.toy", next_random(&seed) % 100 * 512, 8192, 0x22);
        child(fs, "top.toy", SIZE, "mid.toy", "toy");
        put(fs, "top.toy", next_random(&seed) % 100 * 512, 512, 0x33);
        put(fs, "top.toy", next_random(&seed) % 100 * 512, 12288, 0);
        uint8_t *want = view(fs, "top.toy", &size);
        static const char *const to[][2] = {
            {"b.vmdk", "vmdk"}, {"a.raw", "raw"}, {"mid.toy", "toy"}, {"", NULL}};
        for (int step = 0; step < 3; step++) {
            size_t i = next_random(&seed) % 4;
            struct dr_rebase_options o = {
                .backing = to[i][0], .backing_format = to[i][1], .drop_equal = round % 2};
            ok(dr_rebase_fs(fs, "top.toy", &o, NULL, &err));
            same_view(fs, "top.toy", want, size);
        }
        free(want);
    }
}

static void convert_through_formats(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    static const char *const formats[] = {"vmdk", "toy", "raw", "toy", "vmdk"};
    make(fs, "0", "raw", SIZE, NULL);
    put(fs, "0", 512, 100 * KiB, 0x11);
    uint8_t *want = view(fs, "0", &size);
    char from[2] = "0", to[2] = "1";
    for (int i = 0; i < 5; i++) {
        const char *source = from;
        struct dr_convert_options o = {.out_format = formats[i], .sparse_size = 4096};
        ok(dr_convert_fs(fs, &source, 1, to, &o, NULL, &err));
        same_view(fs, to, want, size);
        from[0]++;
        to[0]++;
    }
    free(want);
}

static void snapshot_of_any_format_that_can(void **state)
{
    struct dr_fs *fs = *state;
    char *active = NULL;
    child(fs, "disk.toy", SIZE, NULL, NULL);
    ok(dr_snapshot_create_fs(fs, "disk.toy", NULL, NULL, &active, &err));
    assert_string_equal(active, "disk-000001.toy");
    free(active);
}

#define toy_test(f) cmocka_unit_test_setup_teardown(f, toy_fs, free_fs)

/* Whatever order the file system has them in. */
static void the_names_in_a_directory_are_sorted(void **state)
{
    static const char *const made[] = {"c.raw", "a.raw", "b.raw"};
    struct dr_fs *fs = *state;
    for (size_t n = 0; n <= 3; n++) {
        char **names;
        size_t found;
        if (n > 0)
            make(fs, made[n - 1], "raw", 512, NULL);
        ok(dr_ops_list(fs, ".", &names, &found, &err));
        assert_int_equal(found, n);
        for (size_t i = 1; i < n; i++)
            assert_true(strcmp(names[i - 1], names[i]) < 0);
        dr_ops_free_names(names, found);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(the_names_in_a_directory_are_sorted),
        toy_test(commit_grows_a_raw_base),
        toy_test(commit_does_not_uncover_a_deeper_tail),
        toy_test(raw_siblings_are_protected),
        toy_test(rebase_between_formats),
        toy_test(convert_through_formats),
        toy_test(snapshot_of_any_format_that_can),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
