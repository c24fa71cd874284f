/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What writing costs in calls to the file system: flushes of an allocating write, punches of a
 * large discard. The files are in memory, behind a layer that counts. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/core.h"
#include "drover/ops.h"
#include "faultfs.h"
#include "ops/ops-internal.h"
#include "toy.h"

#define KIB 1024u
#define MIB (1024u * KIB)

#define ok(expr)                                            \
    do {                                                    \
        struct dr_error err = DR_ERROR_INIT;                \
        int ok_r_ = (expr);                                 \
        if (ok_r_ < 0)                                      \
            fail_msg("%s: %d: %s", #expr, ok_r_, err.text); \
    } while (0)

struct world {
    struct dr_fs *memory;
    struct faultfs *counted;
    struct dr_fs *fs;
    struct dr_disk *disk;
};

static int setup(void **state)
{
    static struct world w;
    w.memory = dr_fs_memory_new();
    w.counted = faultfs_new(w.memory);
    w.fs = faultfs_fs(w.counted);
    w.disk = NULL;
    dr_format_register(&dr_format_toy);
    *state = &w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    dr_close(w->disk, NULL);
    dr_format_register(NULL);
    faultfs_free(w->counted);
    dr_fs_memory_free(w->memory);
    return 0;
}

static void create(struct world *w, const char *format, uint64_t size)
{
    struct dr_create_params toy = {.size = size};
    struct dr_create_options o = {.format = format, .size = size, .has_size = true};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    if (strcmp(format, "toy") == 0)
        ok(dr_format_toy.create(w->fs, "dir/disk.toy", &toy, &err));
    else
        ok(dr_create_fs(w->fs, "dir/disk.img", &o, &err));
    ok(dr_open_fs(w->fs, strcmp(format, "toy") == 0 ? "dir/disk.toy" : "dir/disk.img", &open,
                  &w->disk, &err));
}

static void write_at(struct world *w, uint64_t off, size_t len)
{
    uint8_t *buf = malloc(len);
    memset(buf, 0x5a, len);
    ok(dr_pwrite(w->disk, buf, off, len, 0, &err));
    free(buf);
}

/* Flushes of the files that a write at off and a flush of the disk take. */
static unsigned flushes_of_write(struct world *w, uint64_t off)
{
    faultfs_reset(w->counted);
    write_at(w, off, 4 * KIB);
    ok(dr_flush(w->disk, &err));
    return (unsigned)faultfs_count_of(w->counted, FAULTFS_FLUSH);
}

/* ------------------------------------------------------------------ flushes */

static void
an_allocating_write_with_counts_costs_two_flushes_or_three_with_a_new_table(void **state)
{
    struct world *w = *state;
    create(w, "toy", 1 * MIB);
    write_at(w, 512 * KIB, 512); /* marks the image, and allocates what the first write does */
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 0), 3);
    assert_int_equal(flushes_of_write(w, 4 * KIB), 2);
    assert_int_equal(flushes_of_write(w, 0), 1); /* in place */
}

static void an_allocating_write_to_vmdk_costs_two_flushes(void **state)
{
    struct world *w = *state;
    create(w, "vmdk", 64 * MIB);
    write_at(w, 0, 512);
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 1 * MIB), 2);
    assert_int_equal(flushes_of_write(w, 40 * MIB), 2); /* another table */
    assert_int_equal(flushes_of_write(w, 1 * MIB), 1);
}

static void an_allocating_write_to_add_cow_costs_one_flush_of_each_file(void **state)
{
    struct world *w = *state;
    create(w, "add-cow", 64 * MIB);
    write_at(w, 0, 512);
    ok(dr_flush(w->disk, &err));
    assert_int_equal(flushes_of_write(w, 1 * MIB), 2);
    assert_int_equal(flushes_of_write(w, 1 * MIB), 1);
}

/* ------------------------------------------------------------------ punches */

/* Calls that give space back when what was written is dropped, 1 MiB at a time. */
static unsigned punches_of_drop(struct world *w, uint64_t len)
{
    struct dr_chain *chain = w->disk->chain;
    for (uint64_t off = 0; off < len; off += MIB)
        write_at(w, off, MIB);
    ok(dr_flush(w->disk, &err));
    faultfs_reset(w->counted);
    for (uint64_t off = 0; off < len; off += MIB)
        ok(dr_chain_drop(chain, 0, off, MIB, &err));
    ok(dr_flush(w->disk, &err));
    return (unsigned)faultfs_count_of(w->counted, FAULTFS_ZERO);
}

static void neighbouring_freed_grains_are_punched_by_one_call(void **state)
{
    struct world *w = *state;
    create(w, "vmdk", 64 * MIB);
    assert_int_equal(punches_of_drop(w, 64 * MIB), 1); /* of 1024 grains */
}

static void neighbouring_freed_ranges_of_add_cow_are_punched_by_one_call(void **state)
{
    struct world *w = *state;
    create(w, "add-cow", 64 * MIB);
    assert_int_equal(punches_of_drop(w, 64 * MIB), 1);
}

/* What was freed in any order is sorted, and a place between that is still used is left alone. */
static void freed_places_with_a_used_one_between_them_are_two_punches(void **state)
{
    struct world *w = *state;
    struct dr_chain *chain;
    uint8_t byte;
    create(w, "vmdk", 64 * MIB);
    chain = w->disk->chain;
    write_at(w, 0, 5 * 64 * KIB);
    ok(dr_flush(w->disk, &err));
    faultfs_reset(w->counted);
    static const unsigned order[] = {4, 0, 3, 1};
    for (unsigned i = 0; i < 4; i++)
        ok(dr_chain_drop(chain, 0, order[i] * 64 * KIB, 64 * KIB, &err));
    ok(dr_flush(w->disk, &err));
    assert_int_equal(faultfs_count_of(w->counted, FAULTFS_ZERO), 2);
    ok(dr_pread(w->disk, &byte, 2 * 64 * KIB + 5, 1, &err));
    assert_int_equal(byte, 0x5a);
    ok(dr_pread(w->disk, &byte, 3 * 64 * KIB + 5, 1, &err));
    assert_int_equal(byte, 0);
}

/* The place is the snapshot's from now on: its count goes from two to one. */
static void what_a_snapshot_still_holds_is_not_punched(void **state)
{
    struct world *w = *state;
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    uint8_t old[64 * KIB];
    create(w, "toy", 1 * MIB);
    write_at(w, 0, sizeof(old));
    ok(dr_close(w->disk, &err));
    w->disk = NULL;
    ok(toy_snapshot(w->fs, "dir/disk.toy", &err));
    ok(dr_open_fs(w->fs, "dir/disk.toy", &open, &w->disk, &err));
    faultfs_reset(w->counted);
    ok(dr_chain_drop(w->disk->chain, 0, 0, sizeof(old), &err));
    ok(dr_flush(w->disk, &err));
    assert_int_equal(faultfs_count_of(w->counted, FAULTFS_ZERO), 0);
    ok(dr_close(w->disk, &err));
    w->disk = NULL;
    ok(toy_snapshot_read(w->fs, "dir/disk.toy", old, sizeof(old), 0, &err));
    for (size_t i = 0; i < sizeof(old); i++)
        assert_int_equal(old[i], 0x5a);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(an_allocating_write_with_counts_costs_two_flushes_or_three_with_a_new_table),
        T(an_allocating_write_to_vmdk_costs_two_flushes),
        T(an_allocating_write_to_add_cow_costs_one_flush_of_each_file),
        T(neighbouring_freed_grains_are_punched_by_one_call),
        T(neighbouring_freed_ranges_of_add_cow_are_punched_by_one_call),
        T(freed_places_with_a_used_one_between_them_are_two_punches),
        T(what_a_snapshot_still_holds_is_not_punched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
