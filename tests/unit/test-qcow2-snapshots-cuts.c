/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changes of the snapshots inside qcow2 images that are cut off, that fail, and that find no space.
 */
#include "faultfs.h"
#include "powerfs.h"
#include "test-qcow2-snapshots.h"

/* ------------------------------------------------------------------ cut off anywhere */

enum action { CREATE, APPLY, DELETE, N_ACTIONS };

static int act(struct dr_disk *disk, enum action action, struct dr_error *err)
{
    if (action == CREATE)
        return dr_image_snapshot_create(top_of(disk), "two", err);
    if (action == APPLY)
        return dr_image_snapshot_apply(top_of(disk), "1", err);
    return dr_image_snapshot_delete(top_of(disk), "1", err);
}

static int remember(void *user, const struct dr_snapshot_info *info)
{
    bool *there = user;
    there[atoi(info->id)] = true;
    return 0;
}

/* Which of the ids 1 and 2 there are. */
static void list(struct dr_fs *fs, bool there[3])
{
    struct dr_image *image;
    memset(there, 0, 3 * sizeof(*there));
    ok(dr_image_open(fs, PATH, "qcow2", 0, &image, &err));
    ok(dr_image_snapshot_list(image, remember, there, &err));
    dr_image_unref(image, NULL);
}

static void check_views(struct dr_fs *fs, const struct states *s, const bool there[3])
{
    if (there[1])
        view_is(fs, "1", s->first);
    if (there[2])
        view_is(fs, "2", s->second);
}

/* The disk shows the second state, or, when that is being applied, perhaps the first; snapshots
 * show what they always did, also after the disk was written to, and go. */
static void check_after(struct dr_fs *fs, const struct states *s, enum action action)
{
    bool there[3];
    uint64_t size;
    check_safe(fs);
    uint8_t *now = read_view(fs, NULL, &size);
    bool second = memcmp(now, s->second, SIZE) == 0;
    if (!second && (action != APPLY || memcmp(now, s->first, SIZE) != 0))
        fail_msg("the disk shows neither state (action %d)", action);
    free(now);
    list(fs, there);
    if (!there[1] && action != DELETE)
        fail_msg("the snapshot is gone (action %d)", action);
    check_views(fs, s, there);
    struct dr_disk *disk = open_disk(fs);
    write_version(disk, 0, SIZE, 5);
    ok(dr_close(disk, &err));
    check_safe(fs);
    check_views(fs, s, there);
    disk = open_disk(fs);
    for (int i = 1; i <= 2; i++)
        if (there[i])
            ok(dr_image_snapshot_delete(top_of(disk), i == 1 ? "1" : "2", &err));
    ok(dr_close(disk, &err));
    check_safe(fs);
}

static void the_power_may_go_during_each_change(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_ACTIONS * N_GEOMETRIES; round++) {
        enum action action = round % N_ACTIONS;
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        struct states s = make_states(fs, &geometries[round / N_ACTIONS]);
        powerfs_settle(power);
        struct dr_disk *disk = open_disk(fs);
        ok(act(disk, action, &err));
        ok(dr_close(disk, &err));
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k = powerfs_next(power, k, 25))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                check_after(cut, &s, action);
                dr_fs_memory_free(cut);
            }
        states_free(&s);
        powerfs_free(power);
    }
}

static void any_call_may_fail_during_a_change(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_ACTIONS * N_GEOMETRIES; round++) {
        enum action action = round % N_ACTIONS;
        bool failed = true;
        for (uint64_t nth = 0; failed; nth += 1 + nth / 12) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct states s = make_states(fs, &geometries[round / N_ACTIONS]);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = act(disk, action, NULL);
            failed = faultfs_fired(faults);
            if (!failed && r < 0)
                fail_msg("fails without a fault: %d", r);
            faultfs_disarm(faults);
            dr_close(disk, NULL);
            faultfs_free(faults);
            check_after(fs, &s, action);
            states_free(&s);
            dr_fs_memory_free(fs);
        }
    }
}

/* Reading fails before the switch: what was allocated is given back; after it: space is lost, no
 * more. */
static void a_change_that_fails_leaves_nothing_behind(void **state)
{
    (void)state;
    unsigned failures = 0;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        bool failed = true;
        for (uint64_t nth = 0; failed; nth++) {
            bool there[3];
            struct dr_fs *fs = dr_fs_memory_new();
            struct states s = make_states(fs, &geometries[i]);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .kinds = 1u << FAULTFS_READ});
            int r = dr_image_snapshot_create(top_of(disk), "two", NULL);
            failed = faultfs_fired(faults);
            faultfs_disarm(faults);
            ok(dr_close(disk, &err));
            faultfs_free(faults);
            list(fs, there);
            assert_int_equal(there[2], r == 0);
            failures += r < 0;
            if (r < 0 || !failed)
                check_clean(fs);
            else
                check_safe(fs);
            states_free(&s);
            dr_fs_memory_free(fs);
        }
    }
    assert_true(failures > 10);
}

struct full {
    uint64_t size; /* the file cannot be larger */
    int error;
    unsigned refused;
};

static int refuse_growth(void *user, const struct faultfs_io *io)
{
    struct full *full = user;
    bool grows = (io->kind == FAULTFS_WRITE || io->kind == FAULTFS_TRUNCATE) &&
                 io->off + io->len > full->size;
    full->refused += grows;
    return grows ? -full->error : 0;
}

static uint64_t file_size(struct dr_fs *fs)
{
    struct dr_file *file;
    ok(dr_file_open(fs, PATH, 0, &file, &err));
    uint64_t size = dr_file_size(file);
    dr_file_unref(file);
    return size;
}

/* Where there is no space for copies of the tables. A refcount block has room to count them: small
 * clusters would need another block first. */
static void a_snapshot_can_be_deleted_in_a_full_file_system(void **state)
{
    (void)state;
    static const int errors[] = {ENOSPC, EDQUOT, EFBIG};
    for (size_t round = 0; round < 3 * N_GEOMETRIES; round++) {
        size_t i = round / 3;
        bool there[3];
        if (!strcmp(geometries[i].pairs[0].value, "512"))
            continue;
        struct dr_fs *fs = dr_fs_memory_new();
        struct states s = make_states(fs, &geometries[i]);
        struct faultfs *faults = faultfs_new(fs);
        struct full full = {.size = file_size(fs), .error = errors[round % 3]};
        struct dr_disk *disk = open_disk(faultfs_fs(faults));
        faultfs_observe(faults, refuse_growth, &full);
        refused(dr_image_snapshot_create(top_of(disk), "two", &err), full.error, "");
        ok(dr_image_snapshot_delete(top_of(disk), "1", &err));
        ok(dr_close(disk, &err));
        assert_true(full.refused >= 2);
        faultfs_free(faults);
        list(fs, there);
        assert_false(there[1] || there[2]);
        check_clean(fs);
        view_is(fs, NULL, s.second);
        states_free(&s);
        dr_fs_memory_free(fs);
    }
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_power_may_go_during_each_change),
        T(any_call_may_fail_during_a_change),
        T(a_change_that_fails_leaves_nothing_behind),
        T(a_snapshot_can_be_deleted_in_a_full_file_system),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
