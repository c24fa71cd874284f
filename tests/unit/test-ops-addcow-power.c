/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills in operations on add-cow. */
#define SIZE (192 * KiB)
#include "test-ops-power.h"

static int rebase(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = "b.raw", .backing_format = "raw", .drop_equal = true};
    return dr_rebase_fs(fs, "top.add-cow", &o, NULL, err);
}

static int flatten(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = ""};
    return dr_rebase_fs(fs, "top.add-cow", &o, NULL, err);
}

/* Longer than what the header's first sector has room for. */
static int long_name(struct dr_fs *fs, struct dr_error *err)
{
    char name[600];
    memset(name, 0, sizeof(name));
    for (size_t i = 0; i < 510; i += 2)
        memcpy(name + i, "./", 2);
    strcat(name, "mid.add-cow");
    struct dr_rebase_options o = {.backing = name, .backing_format = "add-cow"};
    return dr_rebase_fs(fs, "top.add-cow", &o, NULL, err);
}

static int stream_retire(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_stream_options s = {0};
    struct dr_retire_options o = {0};
    int r = dr_stream_fs(fs, "top.add-cow", &s, NULL, err);
    return r < 0 ? r : dr_retire_fs(fs, "top.add-cow", &o, NULL, err);
}

static int retire_keep(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_retire_options o = {.keep = true};
    return dr_retire_fs(fs, "full.add-cow", &o, NULL, err);
}

static int commit(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top.add-cow", &o, NULL, err);
}

static int commit_vmdk(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {.base = "a.vmdk"};
    return dr_commit_fs(fs, "top.add-cow", &o, NULL, err);
}

static int snapshot(struct dr_fs *fs, struct dr_error *err)
{
    char *active = NULL;
    int r = dr_snapshot_create_fs(fs, "top.add-cow", NULL, NULL, &active, err);
    free(active);
    return r;
}

static void make_child(struct dr_fs *fs, const char *path, const char *backing, const char *format)
{
    struct dr_create_options o = {.format = "add-cow",
                                  .size = backing ? 0 : SIZE,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = format};
    ok(dr_create_fs(fs, path, &o, &err));
}

static void family(struct dr_fs *fs)
{
    make(fs, "b.raw", "raw", SIZE, NULL);
    put(fs, "b.raw", 0, 64 * KiB, 0x11);
    put(fs, "b.raw", 160 * KiB, 16 * KiB, 0x44);
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, 64 * KiB, 0x11);
    make_child(fs, "mid.add-cow", "a.vmdk", "vmdk");
    put(fs, "mid.add-cow", 25 * KiB, 17 * KiB + 512, 0x22);
    put(fs, "mid.add-cow", 128 * KiB, 16 * KiB, 0x23);
    make_child(fs, "top.add-cow", "mid.add-cow", "add-cow");
    put(fs, "top.add-cow", 16 * KiB, 1 * KiB + 100, 0x33);
    put(fs, "top.add-cow", 48 * KiB, 16 * KiB, 0);
    put(fs, "top.add-cow", 160 * KiB, 16 * KiB, 0x44);
    make_child(fs, "full.add-cow", NULL, NULL);
    put(fs, "full.add-cow", 0, SIZE, 0x55);
}

static const struct operation operations[] = {
    {"rebase", "top.add-cow", rebase, family, NULL},
    {"flatten", "top.add-cow", flatten, family, NULL},
    {"long name", "top.add-cow", long_name, family, NULL},
    {"stream, retire", "top.add-cow", stream_retire, family, "top.raw"},
    {"retire", "full.add-cow", retire_keep, family, "full.raw"},
    {"commit", "top.add-cow", commit, family, NULL},
    {"commit into vmdk", "top.add-cow", commit_vmdk, family, NULL},
    {"snapshot", "top.add-cow", snapshot, family, NULL},
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
    static const size_t with[] = {0, 3, 5};
    for (size_t k = 0; k < sizeof(with) / sizeof(with[0]); k++)
        miss_a_flush(&operations[with[k]]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(operations, N_OPERATIONS);
}

/* It was filled by somebody who did not wait for the disk. Where the metadata are gone, the raw
 * file must have everything. */
static void retire_waits_for_what_others_left_in_memory(void **state)
{
    (void)state;
    for (int keep = 0; keep < 2; keep++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        struct dr_open_options rw = {.flags = DR_OPEN_RDWR | DR_OPEN_NO_FLUSH};
        struct dr_retire_options o = {.keep = keep};
        struct dr_disk *disk;
        static uint8_t bytes[SIZE];
        size_t gone = 0, len;
        memset(bytes, 0x66, SIZE);
        make_child(fs, "new.add-cow", NULL, NULL);
        powerfs_settle(p);
        ok(dr_open_fs(fs, "new.add-cow", &rw, &disk, &err));
        ok(dr_pwrite(disk, bytes, 0, SIZE, 0, &err));
        ok(dr_close(disk, &err));
        ok(dr_retire_fs(fs, "new.add-cow", &o, NULL, &err));
        for (size_t i = 0; i <= powerfs_ops(p); i++)
            for (int mode = 0; mode < POWERFS_ALL_BUT_ONE; mode++) {
                struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
                if (!exists(cut, "new.add-cow")) {
                    uint8_t *have = file_bytes(cut, "new.raw", &len);
                    assert_int_equal(len, SIZE);
                    assert_memory_equal(have, bytes, SIZE);
                    free(have);
                    gone++;
                }
                dr_fs_memory_free(cut);
            }
        assert_true(gone > 0);
        powerfs_free(p);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(retire_waits_for_what_others_left_in_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
