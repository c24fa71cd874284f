/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while an image is taken out of its family, or a disk goes back to one of its
 * parents: the disk and the others read as before at every instant, and doing it again finishes. */
#define SIZE (192 * KiB)
#include "test-ops-power.h"

static const char *const formats[] = {"vmdk", "qcow2", "add-cow"};
#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))
/* Of these an image is one file: one in several is replaced and removed file by file. */
#define N_SINGLE 2
static const char *format;

static int delete_mid(struct dr_fs *fs, enum dr_snapshot_merge merge, struct dr_error *err)
{
    struct dr_snapshot_options o = {.merge = merge};
    struct dr_snapshot_plan plan;
    if (!exists(fs, "mid")) /* done */
        return 0;
    return dr_snapshot_delete_fs(fs, "top", "mid", &o, &plan, NULL, err);
}

static int delete_up(struct dr_fs *fs, struct dr_error *err)
{
    return delete_mid(fs, DR_SNAPSHOT_MERGE_UP, err);
}

static int delete_down(struct dr_fs *fs, struct dr_error *err)
{
    int r = delete_mid(fs, DR_SNAPSHOT_MERGE_DOWN, err);
    /* Of the two that stood on mid one stands on the base by now, so the rest can only go up. */
    return r == -EBUSY ? delete_mid(fs, DR_SNAPSHOT_MERGE_BEST, err) : r;
}

static int revert(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_snapshot_options o = {0};
    return dr_snapshot_revert_fs(fs, "top", "mid", &o, err);
}

static void child(struct dr_fs *fs, const char *path, const char *backing)
{
    struct dr_create_options o = {.format = format, .backing = backing, .backing_format = format};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base <- mid <- top and twin. */
static void family(struct dr_fs *fs)
{
    make(fs, "base", format, SIZE, NULL);
    put(fs, "base", 0, 100 * KiB, 'b');
    child(fs, "mid", "base");
    put(fs, "mid", 64 * KiB, 70 * KiB, 'm');
    child(fs, "top", "mid");
    put(fs, "top", 10 * KiB, 60 * KiB, 't');
    child(fs, "twin", "mid");
    put(fs, "twin", 128 * KiB, 1 * KiB, 'w');
}

/* What top has is what mid shows there, so that going back to mid changes no byte. */
static void alike(struct dr_fs *fs)
{
    make(fs, "base", format, SIZE, NULL);
    child(fs, "mid", "base");
    put(fs, "mid", 64 * KiB, 70 * KiB, 'm');
    child(fs, "top", "mid");
    put(fs, "top", 64 * KiB, 64 * KiB, 'm');
}

static const struct operation operations[] = {
    {"delete, up", "top", delete_up, family, NULL},
    {"delete, up, of the twin", "twin", delete_up, family, NULL},
    {"delete, down", "top", delete_down, family, NULL},
    {"delete, down, of the twin", "twin", delete_down, family, NULL},
    {"revert", "top", revert, alike, NULL},
};
#define N_OPERATIONS (sizeof(operations) / sizeof(operations[0]))

static void they_do_what_they_say(void **state)
{
    (void)state;
    for (size_t f = 0; f < N_FORMATS; f++)
        for (size_t i = 0; i < N_OPERATIONS; i++) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct dr_disk *disk = NULL;
            format = formats[f];
            operations[i].family(fs);
            ok(operations[i].run(fs, &err));
            bool deletes = operations[i].run != revert;
            assert_int_equal(exists(fs, "mid"), !deletes);
            ok(dr_open_fs(fs, "top", NULL, &disk, &err));
            assert_int_equal(dr_chain_length(disk), deletes ? 2 : 3);
            ok(dr_close(disk, &err));
            dr_fs_memory_free(fs);
        }
}

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    for (size_t f = 0; f < N_SINGLE; f++) {
        format = formats[f];
        cut_each(operations, N_OPERATIONS);
    }
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    format = "vmdk";
    for (size_t i = 0; i < N_OPERATIONS; i += 2)
        kill_and_cut_each(&operations[i], 1);
}

/* Of an image in two files one may be gone by then. It may as well stand on a file system that is
 * not mounted, so the other one stays, and the missing one is named. */
static void what_a_kill_left_without_its_data_file_is_not_removed(void **state)
{
    (void)state;
    format = "add-cow";
    for (size_t i = 0; i < N_OPERATIONS - 1; i++) {
        bool killed = true, halves = false;
        for (uint64_t n = 0; killed; n++) {
            struct powerfs *p = powerfs_new();
            struct dr_fs *fs = powerfs_fs(p);
            uint64_t size;
            current = &operations[i];
            current->family(fs);
            uint8_t *want = view(fs, current->top, &size);
            killed = kill_at(current, p, n);
            if (exists(fs, "mid") && !exists(fs, "mid.raw")) {
                struct dr_error why = DR_ERROR_INIT;
                halves = true;
                assert_int_equal(current->run(fs, &why), -ENOENT);
                assert_non_null(strstr(why.text, "mid.raw"));
                assert_true(exists(fs, "mid"));
            } else {
                ok(current->run(fs, &err));
            }
            same_view(fs, current->top, want, size);
            free(want);
            powerfs_free(p);
        }
        assert_true(halves);
    }
}

static void missing_flush_is_caught(void **state)
{
    (void)state;
    format = "vmdk";
    miss_a_flush(&operations[0]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(they_do_what_they_say),
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(what_a_kill_left_without_its_data_file_is_not_removed),
        cmocka_unit_test(missing_flush_is_caught),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
