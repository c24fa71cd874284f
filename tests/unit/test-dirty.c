/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Which parts of a disk in use have changed since a job looked at them. */
#include "ops/dirty.h"
#include "test-ops.h"

#define SIZE (MiB + 1536)
#define LAST MiB /* the grain that the disk ends in */

struct rig {
    struct dr_fs *fs;
    struct dr_disk *disk;
    struct dr_dirty dirty;
};

static int rig_up(void **state)
{
    struct rig *g = calloc(1, sizeof(*g));
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    g->fs = dr_fs_memory_new();
    make(g->fs, "/d/d.vmdk", "vmdk", SIZE, NULL);
    ok(dr_open_fs(g->fs, "/d/d.vmdk", &o, &g->disk, &err));
    ok(dr_dirty_begin(&g->dirty, g->disk, &err));
    *state = g;
    return 0;
}

static int rig_down(void **state)
{
    struct rig *g = *state;
    dr_dirty_end(&g->dirty);
    int r = dr_close(g->disk, NULL);
    dr_fs_memory_free(g->fs);
    free(g);
    return r;
}

static void taken(struct rig *g, uint64_t from, uint64_t want_off, uint64_t want_end)
{
    uint64_t off = from, end = 0;
    assert_true(dr_dirty_take(&g->dirty, &off, &end, UINT64_MAX));
    assert_int_equal(off, want_off);
    assert_int_equal(end, want_end);
}

static void runs_are_handed_out_once(void **state)
{
    struct rig *g = *state;
    uint64_t off = 0, end;
    ok(dr_pwrite(g->disk, "x", 70000, 1, 0, &err));
    ok(dr_pwrite(g->disk, "x", 131072, 1, 0, &err));
    ok(dr_pwrite(g->disk, "x", 262144, 1, 0, &err));
    assert_int_equal(dr_dirty_bytes(&g->dirty), 3 * DR_DIRTY_GRAIN);
    taken(g, 0, 65536, 196608);
    taken(g, 196608, 262144, 327680);
    assert_false(dr_dirty_take(&g->dirty, &off, &end, UINT64_MAX));
}

static void a_run_is_handed_out_in_parts(void **state)
{
    struct rig *g = *state;
    uint64_t off = 0, end = 0;
    ok(dr_pwrite(g->disk, "x", 65535, 1, 0, &err));
    ok(dr_pwrite(g->disk, "x", 65536, 1, 0, &err));
    ok(dr_pwrite(g->disk, "x", 131072, 1, 0, &err));
    assert_true(dr_dirty_take(&g->dirty, &off, &end, 2 * DR_DIRTY_GRAIN));
    assert_int_equal(off, 0);
    assert_int_equal(end, 2 * DR_DIRTY_GRAIN);
    assert_true(dr_dirty_take(&g->dirty, &end, &off, 1));
    assert_int_equal(end, 2 * DR_DIRTY_GRAIN);
    assert_int_equal(off, 3 * DR_DIRTY_GRAIN);
    assert_int_equal(dr_dirty_bytes(&g->dirty), 0);
}

/* One worker copies the end of the disk; the guest changes it again; the worker that asks next,
 * from where the first one's run ended, must not get it: the first could write its older bytes
 * last. */
static void the_end_of_the_disk_waits_for_the_next_round(void **state)
{
    struct rig *g = *state;
    uint64_t off = SIZE, end;
    ok(dr_pwrite(g->disk, "x", LAST, 1, 0, &err));
    taken(g, 0, LAST, SIZE);
    ok(dr_pwrite(g->disk, "y", LAST, 1, 0, &err));
    assert_false(dr_dirty_take(&g->dirty, &off, &end, UINT64_MAX));
    taken(g, 0, LAST, SIZE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(runs_are_handed_out_once, rig_up, rig_down),
        cmocka_unit_test_setup_teardown(a_run_is_handed_out_in_parts, rig_up, rig_down),
        cmocka_unit_test_setup_teardown(the_end_of_the_disk_waits_for_the_next_round, rig_up,
                                        rig_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
