/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps inside qcow2 images: what is left of them when the power goes or a call fails. */
#include "faultfs.h"
#include "powerfs.h"
#include "test-qcow2-bitmaps.h"

/* ------------------------------------------------------------------ power cuts */

static const struct {
    const char *name;
    enum dr_bitmap_action action;
    const char *source;
} changes[] = {
    {"new", DR_BITMAP_ADD, NULL},    {"one", DR_BITMAP_REMOVE, NULL},
    {"one", DR_BITMAP_CLEAR, NULL},  {"one", DR_BITMAP_DISABLE, NULL},
    {"two", DR_BITMAP_ENABLE, NULL}, {"two", DR_BITMAP_MERGE, "one"},
    {"one", DR_BITMAP_MERGE, "two"},
};
#define N_CHANGES (sizeof(changes) / sizeof(changes[0]))

static int do_change(struct dr_disk *disk, size_t i, struct dr_error *err)
{
    return change(disk, changes[i].name, changes[i].action, changes[i].source, err);
}

/* "one" has bits, "two", coarser and disabled, has others. */
static void make_bitmaps(struct dr_fs *fs, const struct geometry *g)
{
    create(fs, g, SIZE);
    struct dr_disk *disk = open_disk(fs);
    write_at(disk, 0, 300 * KIB, 9);
    add(disk, "two", 64 * KIB, false);
    write_at(disk, 512 * KIB, 4 * KIB, 1);
    ok(change(disk, "two", DR_BITMAP_DISABLE, NULL, &err));
    add(disk, "one", 512, false);
    write_at(disk, 64 * KIB, 6 * KIB, 2);
    ok(dr_close(disk, &err));
    if (g->across)
        put_across(fs);
}

static void a_cut_in_a_change_leaves_the_old_bitmaps_or_the_new_ones(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_CHANGES * N_GEOMETRIES; round++) {
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        make_bitmaps(fs, &geometries[round / N_CHANGES]);
        powerfs_settle(power);
        struct text before = described(fs);
        struct dr_disk *disk = open_disk(fs);
        ok(do_change(disk, round % N_CHANGES, &err));
        ok(dr_close(disk, &err));
        struct text after = described(fs);
        assert_string_not_equal(before.s, after.s);
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k = powerfs_next(power, k, 40))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                struct text now = described(cut);
                if (strcmp(now.s, before.s) != 0)
                    assert_string_equal(now.s, after.s);
                check_crashed(cut);
                dr_fs_memory_free(cut);
            }
        powerfs_free(power);
    }
}

static void any_call_may_fail_during_a_change(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_CHANGES * N_GEOMETRIES; round++) {
        bool failed = true;
        for (uint64_t nth = 0; failed; nth++) {
            struct dr_fs *fs = dr_fs_memory_new();
            make_bitmaps(fs, &geometries[round / N_CHANGES]);
            struct text before = described(fs);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = do_change(disk, round % N_CHANGES, NULL);
            failed = faultfs_fired(faults);
            faultfs_disarm(faults);
            dr_close(disk, NULL);
            faultfs_free(faults);
            struct text now = described(fs);
            if (!failed)
                assert_int_equal(r, 0);
            if (r == 0)
                assert_string_not_equal(now.s, before.s);
            check_crashed(fs);
            dr_fs_memory_free(fs);
        }
    }
}

/* ------------------------------------------------------------------ never a bit too few */

struct cover {
    const uint8_t *was, *is;
    uint64_t size; /* of both */
    uint64_t next; /* all is well up to here */
};

static int cover_range(void *user, uint64_t off, uint64_t len)
{
    struct cover *c = user;
    if (off > c->next && memcmp(c->was + c->next, c->is + c->next, dr_min(off, c->size) - c->next))
        fail_msg("a change between %llu and %llu was missed", (unsigned long long)c->next,
                 (unsigned long long)off);
    c->next = dr_min(off + len, c->size);
    return 0;
}

/* Every bitmap is inconsistent, or enabled ones have all that differs from `was`. */
static void check_covered(struct dr_fs *fs, const uint8_t *was, uint64_t was_size, bool consistent)
{
    struct dr_bitmap *list = NULL;
    uint64_t size;
    size_t n = 0;
    struct dr_disk *disk;
    CLEANUP_FREE uint8_t *is = read_all(fs, &size);
    ok(try_open(fs, 0, &disk, &err));
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    assert_int_equal(n, 2);
    for (size_t i = 0; i < n; i++) {
        struct cover c = {was, is, dr_min(size, was_size), 0};
        assert_false(consistent && list[i].inconsistent);
        if (list[i].inconsistent || !list[i].enabled)
            continue;
        ok(dr_disk_bitmap_read(disk, list[i].name, cover_range, &c, &err));
        cover_range(&c, c.size, 0);
    }
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
}

static int write_much(struct dr_disk *disk, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(40 * KIB);
    memset(buf, 5, 40 * KIB);
    int r = dr_pwrite(disk, buf, 100 * KIB + 7, 9 * KIB, 0, err);
    if (r == 0)
        r = dr_flush(disk, err);
    if (r == 0)
        r = dr_zero(disk, 256 * KIB, 64 * KIB, DR_MAY_UNMAP, err);
    if (r == 0)
        r = dr_pwrite(disk, buf, 700 * KIB, 40 * KIB, 0, err);
    return r;
}

static int grow(struct dr_disk *disk, struct dr_error *err)
{
    uint8_t sector[512] = {3};
    int r = dr_pwrite(disk, sector, 512, 512, 0, err);
    if (r == 0)
        r = dr_truncate(disk, 9 * MIB, err);
    return r < 0 ? r : dr_pwrite(disk, sector, 8 * MIB, 512, 0, err);
}

static int shrink(struct dr_disk *disk, struct dr_error *err)
{
    uint8_t sector[512] = {3};
    int r = dr_pwrite(disk, sector, 512, 512, 0, err);
    return r < 0 ? r : dr_truncate(disk, 200 * KIB, err);
}

static int go_back(struct dr_disk *disk, struct dr_error *err)
{
    return dr_disk_internal_snapshot_apply(disk, "s", NULL, err);
}

static int (*const works[])(struct dr_disk *disk, struct dr_error *err) = {write_much, grow, shrink,
                                                                           go_back};
#define N_WORKS (sizeof(works) / sizeof(works[0]))

/* A smaller snapshot, then two bitmaps. */
static uint8_t *make_covered(struct dr_fs *fs, const struct geometry *g)
{
    uint64_t size;
    create(fs, g, SIZE - 100 * KIB);
    struct dr_disk *disk = open_disk(fs);
    write_at(disk, 64 * KIB, 300 * KIB, 8);
    ok(dr_disk_internal_snapshot_create(disk, "s", NULL, &err));
    ok(dr_truncate(disk, SIZE, &err));
    write_at(disk, 0, 350 * KIB, 9);
    add(disk, "one", 512, false);
    add(disk, "two", 64 * KIB, false);
    ok(dr_close(disk, &err));
    if (g->across)
        put_across(fs);
    uint8_t *was = read_all(fs, &size);
    assert_int_equal(size, SIZE);
    return was;
}

static void a_cut_leaves_bitmaps_that_miss_nothing_or_that_nobody_trusts(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_WORKS * N_GEOMETRIES; round++) {
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        uint8_t *was = make_covered(fs, &geometries[round / N_WORKS]);
        powerfs_settle(power);
        struct dr_disk *disk = open_disk(fs);
        ok(works[round % N_WORKS](disk, &err));
        ok(dr_close(disk, &err));
        check_covered(fs, was, SIZE, true);
        check_clean(fs);
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k = powerfs_next(power, k, 60))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                check_covered(cut, was, SIZE, false);
                check_crashed(cut);
                dr_fs_memory_free(cut);
            }
        free(was);
        powerfs_free(power);
    }
}

static void any_call_may_fail_while_the_disk_is_written_to(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_WORKS * N_GEOMETRIES; round++) {
        bool failed = true;
        for (uint64_t nth = 0; failed; nth += 1 + nth / 20) {
            struct dr_fs *fs = dr_fs_memory_new();
            uint8_t *was = make_covered(fs, &geometries[round / N_WORKS]);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = works[round % N_WORKS](disk, NULL);
            int closed = dr_close(disk, NULL);
            failed = faultfs_fired(faults);
            faultfs_disarm(faults);
            faultfs_free(faults);
            assert_true(failed || (r == 0 && closed == 0));
            check_covered(fs, was, SIZE, !failed);
            check_crashed(fs);
            free(was);
            dr_fs_memory_free(fs);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_cut_in_a_change_leaves_the_old_bitmaps_or_the_new_ones),
        cmocka_unit_test(any_call_may_fail_during_a_change),
        cmocka_unit_test(a_cut_leaves_bitmaps_that_miss_nothing_or_that_nobody_trusts),
        cmocka_unit_test(any_call_may_fail_while_the_disk_is_written_to),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
