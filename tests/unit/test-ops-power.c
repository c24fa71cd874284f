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

static int stream_over(struct dr_fs *fs, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_pair sub = {"subformat", "streamOptimized"};
    struct dr_convert_options o = {
        .out_format = "vmdk", .sparse_size = 4096, .pairs = &sub, .n_pairs = 1};
    return dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, err);
}

/* ------------------------------------------------------------------ the same on an open disk */

static int on_open_disk(struct dr_fs *fs, int (*run)(struct dr_disk *disk, struct dr_error *err),
                        struct dr_error *err)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top.vmdk", &rw, &disk, err);
    if (r < 0)
        return r;
    r = run(disk, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int rebase_disk(struct dr_disk *disk, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    return dr_disk_rebase(disk, &o, NULL, err);
}

static int commit_disk(struct dr_disk *disk, struct dr_error *err)
{
    return dr_disk_commit(disk, NULL, NULL, err);
}

static int commit_lower(struct dr_disk *disk, struct dr_error *err)
{
    struct dr_commit_options o = {.top = "mid.vmdk"};
    return dr_chain_length(disk) < 3 ? 0 : dr_disk_commit(disk, &o, NULL, err);
}

static int snapshot_disk(struct dr_disk *disk, struct dr_error *err)
{
    return dr_disk_snapshot(disk, NULL, NULL, NULL, NULL, err);
}

static int open_rebase(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, rebase_disk, err);
}

static int open_commit(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, commit_disk, err);
}

static int open_commit_lower(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, commit_lower, err);
}

static int open_snapshot(struct dr_fs *fs, struct dr_error *err)
{
    return on_open_disk(fs, snapshot_disk, err);
}

/* ------------------------------------------------------------------ disks */

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
    {"rebase of an open disk", "top.vmdk", open_rebase, one_file_each, NULL},
    {"commit of an open disk", "top.vmdk", open_commit, one_file_each, NULL},
    {"commit below an open disk", "top.vmdk", open_commit_lower, one_file_each, NULL},
    {"commit below an open disk, split", "top.vmdk", open_commit_lower, split_ones, NULL},
    {"snapshot of an open disk", "top.vmdk", open_snapshot, one_file_each, NULL},
    {"snapshot of an open disk, split", "top.vmdk", open_snapshot, split_ones, NULL},
    {"convert over a disk", "twin.vmdk", convert_over, one_file_each, NULL},
    {"convert to a stream over a disk", "twin.vmdk", stream_over, one_file_each, NULL},
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

/* ------------------------------------------------------------------ what others left in memory */

/* Another program wrote these bytes, and did not wait until they were durable. */
static void write_and_leave(struct dr_fs *fs, const char *path, uint64_t off, int byte)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR | DR_OPEN_UNCHANGED | DR_OPEN_NO_FLUSH};
    struct dr_disk *disk = NULL;
    uint8_t bytes[64 * KiB];
    memset(bytes, byte, sizeof(bytes));
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    ok(dr_pwrite(disk, bytes, off, sizeof(bytes), 0, &err));
    ok(dr_close(disk, &err));
}

static void with_another_pair(struct dr_fs *fs)
{
    family(fs, false);
    make_image(fs, "b2.vmdk", "b.vmdk", false);
}

/* It is what mid has there. */
static int rebase_onto_that(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = "b2.vmdk", .backing_format = "vmdk"};
    write_and_leave(fs, "b.vmdk", 512 * KiB, 0x23);
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

/* Over the twin, which has the same view. */
static int convert_onto_that(struct dr_fs *fs, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_convert_options o = {
        .out_format = "vmdk", .sparse_size = 4096, .backing = "b2.vmdk", .backing_format = "vmdk"};
    write_and_leave(fs, "b.vmdk", 512 * KiB, 0x23);
    return dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, err);
}

/* No reruns: the other program does not come again. */
static void new_parents_are_durable_before_anything_relies_on_them(void **state)
{
    (void)state;
    static const struct operation ops[] = {
        {"rebase", "top.vmdk", rebase_onto_that, with_another_pair, NULL},
        {"convert", "twin.vmdk", convert_onto_that, with_another_pair, NULL},
    };
    for (size_t k = 0; k < sizeof(ops) / sizeof(ops[0]); k++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        uint64_t size;
        current = &ops[k];
        current->family(fs);
        uint8_t *want = view(fs, current->top, &size);
        powerfs_settle(p);
        ok(current->run(fs, &err));
        for (size_t i = 0; i <= powerfs_ops(p); i++)
            for (int mode = 0; mode < POWERFS_ALL_BUT_ONE; mode++) {
                struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
                snprintf(where, sizeof(where), "%zu mode %d", i, mode);
                assert_true(look(disk, want, false, false, true));
                dr_fs_memory_free(disk);
            }
        free(want);
        powerfs_free(p);
    }
}

static size_t length_of_chain(struct dr_fs *fs)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "top.vmdk", NULL, &disk, &err));
    size_t n = dr_chain_length(disk);
    ok(dr_close(disk, &err));
    return n;
}

/* A program that was killed has copied up all that mid has, and only the name is left to change.
 * The name must not reach the disk before that. */
static void a_rebase_without_copying_waits_for_what_others_left_in_memory(void **state)
{
    (void)state;
    struct dr_rebase_options o = {.backing = "a.vmdk", .backing_format = "vmdk", .unsafe = true};
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    size_t rebased = 0;
    family(fs, false);
    uint8_t *want = view(fs, "top.vmdk", &size);
    powerfs_settle(p);
    write_and_leave(fs, "top.vmdk", 128 * KiB, 0x22);
    write_and_leave(fs, "top.vmdk", 512 * KiB, 0x23);
    size_t first = powerfs_ops(p);
    ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    for (size_t i = first; i <= powerfs_ops(p); i++)
        for (int mode = 0; mode < POWERFS_ALL_BUT_ONE; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
            bool is = length_of_chain(cut) == 2;
            rebased += is;
            if (is)
                same_view(cut, "top.vmdk", want, size);
            dr_fs_memory_free(cut);
        }
    assert_true(rebased > 0);
    free(want);
    powerfs_free(p);
}

/* A child that is there opens: its parent's id is not in memory only. */
static void snapshot_waits_for_what_others_left_in_memory(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_open_options o = {.flags = DR_OPEN_RDWR | DR_OPEN_NO_FLUSH};
    struct dr_disk *disk;
    uint8_t bytes[64 * KiB];
    uint64_t size;
    size_t there = 0;
    memset(bytes, 0x77, sizeof(bytes));
    family(fs, false);
    powerfs_settle(p);
    ok(dr_open_fs(fs, "top.vmdk", &o, &disk, &err));
    ok(dr_pwrite(disk, bytes, 0, sizeof(bytes), 0, &err));
    ok(dr_close(disk, &err));
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(snapshot(fs, &err));
    for (size_t i = 0; i <= powerfs_ops(p); i++)
        for (int mode = 0; mode < POWERFS_ALL_BUT_ONE; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
            there += exists(cut, "top-000001.vmdk");
            if (exists(cut, "top-000001.vmdk"))
                same_view(cut, "top-000001.vmdk", want, size);
            dr_fs_memory_free(cut);
        }
    assert_true(there > 0);
    free(want);
    powerfs_free(p);
}

/* With its names: whoever makes one need not look after that. */
static void an_image_that_a_driver_has_made_is_durable(void **state)
{
    (void)state;
    static const struct {
        const char *format;
        struct dr_option options[1];
        size_t n;
    } kinds[] = {
        {.format = "raw"},
        {.format = "vmdk"},
        {"vmdk", {{"subformat", "twoGbMaxExtentSparse"}}, 1},
        {"vmdk", {{"subformat", "monolithicFlat"}}, 1},
        {.format = "qcow2"},
        {"qcow2", {{"data_file", "new.data"}}, 1},
        {.format = "add-cow"},
    };
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        struct dr_create_params params = {
            .size = SIZE, .options = kinds[i].options, .n_options = kinds[i].n};
        if (strcmp(kinds[i].format, "add-cow") == 0) {
            make(fs, "base", "raw", SIZE, NULL);
            ok(dr_image_open(fs, "base", "raw", 0, &params.backing, &err));
            params.backing_name = "base";
            params.backing_format = "raw";
        }
        powerfs_settle(p);
        ok(dr_format_find(kinds[i].format)->create(fs, "new", &params, &err));
        dr_image_unref(params.backing, NULL);
        assert_true(powerfs_ops(p) > 0);
        if (powerfs_open_ops(p, powerfs_ops(p)) != 0)
            fail_msg("%s, kind %zu: %zu changes may be lost", kinds[i].format, i,
                     powerfs_open_ops(p, powerfs_ops(p)));
        powerfs_free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(new_parents_are_durable_before_anything_relies_on_them),
        cmocka_unit_test(a_rebase_without_copying_waits_for_what_others_left_in_memory),
        cmocka_unit_test(snapshot_waits_for_what_others_left_in_memory),
        cmocka_unit_test(an_image_that_a_driver_has_made_is_durable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
