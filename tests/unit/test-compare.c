/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* compare: the first difference of bytes or, when strict, of allocation; who could not be read. */
#include <sched.h>
#include <stdatomic.h>

#include "faultfs.h"
#include "test-ops.h"

#define SIZE (4 * MiB)

static struct dr_compare_result run(struct dr_fs *fs, const char *a, const char *b, bool strict,
                                    unsigned workers)
{
    struct dr_disk *da, *db;
    struct dr_compare_result result;
    struct dr_job job = {.workers = workers};
    ok(dr_open_fs(fs, a, NULL, &da, &err));
    ok(dr_open_fs(fs, b, NULL, &db, &err));
    ok(dr_compare(da, db, strict, &job, &result, &err));
    ok(dr_close(da, &err));
    ok(dr_close(db, &err));
    return result;
}

static struct dr_compare_result compare(struct dr_fs *fs, const char *a, const char *b, bool strict)
{
    struct dr_compare_result one = run(fs, a, b, strict, 1);
    struct dr_compare_result two = run(fs, b, a, strict, 3);
    /* Neither the order of the disks nor the number of threads changes the answer. */
    assert_int_equal(one.same, two.same);
    assert_int_equal(one.mismatch_off, two.mismatch_off);
    assert_int_equal(one.strict_allocation, two.strict_allocation);
    assert_int_equal(one.failed, 0);
    return one;
}

static void make_two(struct dr_fs *fs)
{
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
}

/* A row writes zeros or 7 at up to two places of b; a stays empty. */
static void strict_tells_allocation_from_bytes(void **state)
{
    static const struct {
        const char *name;
        uint64_t zeros, bytes; /* where; UINT64_MAX = nowhere */
        bool strict_same, plain_same;
        uint64_t strict_off, plain_off;
        bool allocation; /* what a strict run tells of */
    } rows[] = {
        {"nothing", UINT64_MAX, UINT64_MAX, true, true, 0, 0, false},
        {"zeros at the beginning", 0, UINT64_MAX, false, true, 0, 0, true},
        {"zeros at the end", SIZE - 64 * KiB, UINT64_MAX, false, true, SIZE - 64 * KiB, 0, true},
        {"zeros before bytes", 64 * KiB, 2 * MiB, false, false, 64 * KiB, 2 * MiB, true},
        {"bytes in the last unit", UINT64_MAX, SIZE - 512, false, false, SIZE - 64 * KiB,
         SIZE - 512, true},
    };
    struct dr_fs *fs = *state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        make_two(fs);
        if (rows[i].zeros != UINT64_MAX)
            put(fs, "b.vmdk", rows[i].zeros, 64 * KiB, 0);
        if (rows[i].bytes != UINT64_MAX)
            put(fs, "b.vmdk", rows[i].bytes, 512, 7);
        struct dr_compare_result strict = compare(fs, "a.vmdk", "b.vmdk", true);
        struct dr_compare_result plain = compare(fs, "a.vmdk", "b.vmdk", false);
        if (strict.same != rows[i].strict_same || strict.mismatch_off != rows[i].strict_off ||
            strict.strict_allocation != rows[i].allocation || plain.same != rows[i].plain_same ||
            plain.mismatch_off != rows[i].plain_off || plain.strict_allocation)
            fail_msg("%s: strict %d at %llu (allocation: %d), else %d at %llu", rows[i].name,
                     strict.same, (unsigned long long)strict.mismatch_off, strict.strict_allocation,
                     plain.same, (unsigned long long)plain.mismatch_off);
        ok(fs->ops->unlink(fs, "a.vmdk", &err));
        ok(fs->ops->unlink(fs, "b.vmdk", &err));
    }
}

static void bytes_that_differ_come_before_allocation_that_does_later(void **state)
{
    struct dr_fs *fs = *state;
    make_two(fs);
    put(fs, "a.vmdk", MiB, 64 * KiB, 1);
    put(fs, "b.vmdk", MiB, 64 * KiB, 1);
    put(fs, "b.vmdk", MiB + 1024, 1, 2);
    put(fs, "b.vmdk", 3 * MiB, 64 * KiB, 0);
    struct dr_compare_result r = compare(fs, "a.vmdk", "b.vmdk", true);
    assert_false(r.same);
    assert_false(r.strict_allocation);
    assert_int_equal(r.mismatch_off, MiB + 1024);
}

static void the_same_units_with_the_same_bytes_are_strictly_the_same(void **state)
{
    struct dr_fs *fs = *state;
    make_two(fs);
    for (int i = 0; i < 2; i++) {
        const char *path = i ? "a.vmdk" : "b.vmdk";
        put(fs, path, i ? 3 * MiB : MiB, 128 * KiB, 4); /* not in the same order */
        put(fs, path, i ? MiB : 3 * MiB, 128 * KiB, 4);
    }
    assert_true(compare(fs, "a.vmdk", "b.vmdk", true).same);
}

static void strict_reads_nothing_when_the_sizes_differ(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct dr_compare_result r;
    struct dr_disk *a, *b;
    make(fs, "a.raw", "raw", MiB, NULL);
    make(fs, "b.raw", "raw", 2 * MiB, NULL);
    put(fs, "a.raw", 0, MiB, 3);
    ok(dr_open_fs(faultfs_fs(f), "a.raw", NULL, &a, &err));
    ok(dr_open_fs(faultfs_fs(f), "b.raw", NULL, &b, &err));
    faultfs_reset(f);
    ok(dr_compare(a, b, true, NULL, &r, &err));
    assert_int_equal(faultfs_count(f), 0);
    assert_true(r.size_differs);
    assert_false(r.same);
    ok(dr_compare(a, a, true, NULL, &r, &err));
    assert_true(r.same);
    assert_false(r.size_differs);
    ok(dr_close(a, &err));
    ok(dr_close(b, &err));
    faultfs_free(f);
}

static int fail_reads(void *user, const struct faultfs_io *io)
{
    return io->kind == FAULTFS_READ && strcmp(io->path, user) == 0 ? -EIO : 0;
}

static void a_disk_that_cannot_be_read_is_told_by_its_number(void **state)
{
    static char paths[2][8] = {"a.raw", "b.raw"};
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    for (int i = 0; i < 2; i++) {
        make(fs, paths[i], "raw", MiB, NULL);
        put(fs, paths[i], 0, MiB, 3);
    }
    for (unsigned i = 0; i < 2; i++) {
        struct dr_compare_result r;
        struct dr_disk *a, *b;
        ok(dr_open_fs(faultfs_fs(f), paths[0], NULL, &a, &err));
        ok(dr_open_fs(faultfs_fs(f), paths[1], NULL, &b, &err));
        faultfs_observe(f, fail_reads, paths[i]);
        refused(dr_compare(a, b, false, NULL, &r, &err), EIO, paths[i]);
        faultfs_observe(f, NULL, NULL);
        assert_int_equal(r.failed, i + 1);
        assert_false(r.same);
        ok(dr_compare(a, b, false, NULL, &r, &err));
        assert_int_equal(r.failed, 0);
        assert_true(r.same);
        ok(dr_close(a, &err));
        ok(dr_close(b, &err));
    }
    faultfs_free(f);
}

static void a_side_that_is_a_hole_is_not_read(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct dr_compare_result r;
    struct dr_disk *a, *b;
    static char hole[] = "a.raw";
    make(fs, "a.raw", "raw", SIZE, NULL);
    make(fs, "b.raw", "raw", SIZE, NULL);
    put(fs, "b.raw", 2 * MiB, 64 * KiB, 5);
    ok(dr_open_fs(faultfs_fs(f), "a.raw", NULL, &a, &err));
    ok(dr_open_fs(faultfs_fs(f), "b.raw", NULL, &b, &err));
    faultfs_observe(f, fail_reads, hole);
    ok(dr_compare(a, b, false, NULL, &r, &err));
    assert_int_equal(r.mismatch_off, 2 * MiB);
    ok(dr_compare(b, a, false, NULL, &r, &err));
    assert_int_equal(r.mismatch_off, 2 * MiB);
    assert_false(r.same);
    faultfs_observe(f, NULL, NULL);
    ok(dr_close(a, &err));
    ok(dr_close(b, &err));
    faultfs_free(f);
}

/* The first worker has read its part of a when another one has found a difference further on. */
static atomic_bool late_part_read;

static int read_late_part_first(void *user, const struct faultfs_io *io)
{
    (void)user;
    if (io->kind != FAULTFS_READ)
        return 0;
    if (io->off > 0 && strcmp(io->path, "b.raw") == 0)
        atomic_store(&late_part_read, true);
    for (int i = 0; i < 100000 && io->off == 0 && !atomic_load(&late_part_read); i++)
        sched_yield();
    for (int i = 0; i < 1000 && io->off == 0; i++) /* let it be compared, too */
        sched_yield();
    return 0;
}

static void the_first_difference_counts_whichever_is_found_first(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct dr_compare_result r;
    struct dr_disk *a, *b;
    make(fs, "a.raw", "raw", SIZE, NULL);
    make(fs, "b.raw", "raw", SIZE, NULL);
    put(fs, "a.raw", 0, SIZE, 5);
    put(fs, "b.raw", 0, SIZE, 6);
    put(fs, "b.raw", 0, 4096, 5);
    ok(dr_open_fs(faultfs_fs(f), "a.raw", NULL, &a, &err));
    ok(dr_open_fs(faultfs_fs(f), "b.raw", NULL, &b, &err));
    for (int round = 0; round < 10; round++) {
        struct dr_job job = {.workers = 4};
        atomic_store(&late_part_read, false);
        faultfs_observe(f, read_late_part_first, NULL);
        ok(dr_compare(a, b, false, &job, &r, &err));
        faultfs_observe(f, NULL, NULL);
        assert_true(atomic_load(&late_part_read));
        assert_int_equal(r.mismatch_off, 4096);
    }
    ok(dr_close(a, &err));
    ok(dr_close(b, &err));
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(strict_tells_allocation_from_bytes),
        ops_test(bytes_that_differ_come_before_allocation_that_does_later),
        ops_test(the_same_units_with_the_same_bytes_are_strictly_the_same),
        ops_test(strict_reads_nothing_when_the_sizes_differ),
        ops_test(a_disk_that_cannot_be_read_is_told_by_its_number),
        ops_test(a_side_that_is_a_hole_is_not_read),
        ops_test(the_first_difference_counts_whichever_is_found_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
