/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills in operations on VMDK. */
#include "test-ops-power.h"

static int onto_stranger(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = "b.vmdk", .backing_format = "vmdk"};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int onto_long_name(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "a-name-of-some-length-that-moves-everything-behind-it-in-the-descriptor.vmdk",
        .backing_format = "vmdk"};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int onto_stranger_dropping(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int flatten(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = ""};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int stream(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_stream_options o = {.base = "a.vmdk"};
    return dr_stream_fs(fs, "top.vmdk", &o, NULL, err);
}

static int commit(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top.vmdk", &o, NULL, err);
}

static int commit_deep(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {.base = "a.vmdk"};
    return dr_commit_fs(fs, "top.vmdk", &o, NULL, err);
}

static int snapshot(struct dr_fs *fs, struct dr_error *err)
{
    char *active = NULL;
    int r = dr_snapshot_create_fs(fs, "top.vmdk", NULL, NULL, &active, err);
    free(active);
    return r;
}

static int convert_over(struct dr_fs *fs, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    return dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, err);
}

static void make_image(struct dr_fs *fs, const char *path, const char *backing, bool split)
{
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {.format = "vmdk",
                                  .size = SIZE,
                                  .has_size = true,
                                  .backing = backing,
                                  .backing_format = backing ? "vmdk" : NULL,
                                  .pairs = split ? &sub : NULL,
                                  .n_pairs = split};
    ok(dr_create_fs(fs, path, &o, &err));
}

static void family(struct dr_fs *fs, bool split)
{
    make_image(fs, "a.vmdk", NULL, split);
    put(fs, "a.vmdk", 0, 256 * KiB, 0x11);
    make_image(fs, "mid.vmdk", "a.vmdk", split);
    put(fs, "mid.vmdk", 128 * KiB, 64 * KiB, 0x22);
    put(fs, "mid.vmdk", 512 * KiB, 64 * KiB, 0x23);
    make_image(fs, "top.vmdk", "mid.vmdk", split);
    put(fs, "top.vmdk", 64 * KiB, 4 * KiB, 0x33);
    put(fs, "top.vmdk", 192 * KiB, 64 * KiB, 0);
    put(fs, "top.vmdk", 640 * KiB, 64 * KiB, 0x44);
    make_image(fs, "b.vmdk", NULL, split);
    put(fs, "b.vmdk", 0, 64 * KiB, 0x11);
    put(fs, "b.vmdk", 640 * KiB, 64 * KiB, 0x44);
    make_image(fs, "a-name-of-some-length-that-moves-everything-behind-it-in-the-descriptor.vmdk",
               NULL, false);
    const char *from = "top.vmdk"; /* the view of top, so that replacing it changes no byte */
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    ok(dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, &err));
}

static void one_file_each(struct dr_fs *fs)
{
    family(fs, false);
}

static void split_ones(struct dr_fs *fs)
{
    family(fs, true);
}

static const struct operation operations[] = {
    {"rebase", "top.vmdk", onto_stranger, one_file_each, NULL},
    {"rebase, split", "top.vmdk", onto_stranger, split_ones, NULL},
    {"rebase to a long name", "top.vmdk", onto_long_name, one_file_each, NULL},
    {"rebase, dropping what is equal", "top.vmdk", onto_stranger_dropping, one_file_each, NULL},
    {"flatten", "top.vmdk", flatten, one_file_each, NULL},
    {"stream", "top.vmdk", stream, one_file_each, NULL},
    {"commit", "top.vmdk", commit, one_file_each, NULL},
    {"commit, split", "top.vmdk", commit, split_ones, NULL},
    {"commit through two", "top.vmdk", commit_deep, one_file_each, NULL},
    {"snapshot", "top.vmdk", snapshot, one_file_each, NULL},
    {"snapshot, split", "top.vmdk", snapshot, split_ones, NULL},
    {"convert over a disk", "twin.vmdk", convert_over, one_file_each, NULL},
};

#define N_OPERATIONS (sizeof(operations) / sizeof(operations[0]))

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    cut_each(operations, N_OPERATIONS);
}

/* In each kind of operation. */
static void missing_flush_is_caught(void **state)
{
    (void)state;
    static const size_t with[] = {0, 4, 6};
    for (size_t k = 0; k < sizeof(with) / sizeof(with[0]); k++)
        miss_a_flush(&operations[with[k]]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(operations, N_OPERATIONS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
