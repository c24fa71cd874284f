/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while a disk is compacted: it reads the same at every instant, and doing it
 * again finishes. */
#include "test-ops-power.h"

static int compact(struct dr_fs *fs, struct dr_error *err)
{
    const struct dr_compact_options o = {.no_zeros = false};
    return dr_compact_fs(fs, "disk", &o, NULL, NULL, err);
}

static void discard(struct dr_fs *fs, uint64_t off, uint64_t len)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_discard(disk, off, len, &err));
    ok(dr_close(disk, &err));
}

static void write_zeros(struct dr_fs *fs, uint64_t off, size_t len)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *zeros = calloc(1, len);
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_pwrite(disk, zeros, off, len, 0, &err));
    ok(dr_close(disk, &err));
    free(zeros);
}

/* Gaps near the beginning of the file, zeros, and data at its end. */
static void make_gaps(struct dr_fs *fs)
{
    for (unsigned i = 0; i < 8; i++)
        put(fs, "disk", i * 64 * KiB, 12 * KiB, 1 + (int)i);
    discard(fs, 0, 256 * KiB);
    write_zeros(fs, 384 * KiB, 12 * KiB);
}

static void make_with(struct dr_fs *fs, const char *format, uint64_t size, const char *name,
                      const char *value)
{
    const struct dr_pair pairs[] = {{name, value}};
    struct dr_create_options o = {
        .format = format, .size = size, .has_size = true, .pairs = pairs, .n_pairs = 1};
    ok(dr_create_fs(fs, "disk", &o, &err));
}

static void qcow2_disk(struct dr_fs *fs)
{
    make_with(fs, "qcow2", SIZE, "cluster_size", "4k");
    make_gaps(fs);
}

/* The L1 table and several L2 tables stand behind the data; and refcount blocks, many of them. */
static void qcow2_tables(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    make_with(fs, "qcow2", 64 * KiB, "cluster_size", "512");
    put(fs, "disk", 0, 64 * KiB, 'd');
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_resize(disk, SIZE, DR_PREALLOC_OFF, &err));
    ok(dr_close(disk, &err));
    put(fs, "disk", 700 * KiB, 4 * KiB, 'e');
    discard(fs, 0, 60 * KiB);
}

static void qcow2_coded(struct dr_fs *fs)
{
    const struct dr_pair pairs[] = {{"cluster_size", "4k"}};
    const struct dr_convert_options o = {
        .out_format = "qcow2", .pairs = pairs, .n_pairs = 1, .compress = true};
    const char *plain = "plain";
    make(fs, "plain", "vmdk", SIZE, NULL);
    for (unsigned i = 0; i < 4; i++)
        put(fs, "plain", i * 64 * KiB, 16 * KiB, 1 + (int)i);
    ok(dr_convert_fs(fs, &plain, 1, "disk", &o, NULL, &err));
    put(fs, "disk", 512 * KiB, 8 * KiB, 'd');
    discard(fs, 0, 128 * KiB);
}

static void vmdk_disk(struct dr_fs *fs)
{
    make(fs, "disk", "vmdk", SIZE, NULL);
    make_gaps(fs);
}

/* Zeros that hide what the parent has, and zeros where it has nothing. */
static void vmdk_child(struct dr_fs *fs)
{
    make(fs, "base", "vmdk", SIZE, NULL);
    put(fs, "base", 0, 100 * KiB, 'b');
    make(fs, "disk", "vmdk", 0, "base");
    write_zeros(fs, 64 * KiB, 256 * KiB);
    put(fs, "disk", 600 * KiB, 100 * KiB, 'c');
}

static const struct operation ops[] = {
    {"compact qcow2", "disk", compact, qcow2_disk, NULL},
    {"compact qcow2, tables", "disk", compact, qcow2_tables, NULL},
    {"compact qcow2, compressed", "disk", compact, qcow2_coded, NULL},
    {"compact vmdk", "disk", compact, vmdk_disk, NULL},
    {"compact vmdk over a parent", "disk", compact, vmdk_child, NULL},
};
#define N_OPS (sizeof(ops) / sizeof(ops[0]))

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    cut_each(ops, N_OPS);
}

static void missing_flush_is_caught(void **state)
{
    (void)state;
    miss_a_flush(&ops[0]);
    miss_a_flush(&ops[3]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(ops, N_OPS);
}

/* ------------------------------------------------------------------ a repair after a kill */

static int repair_leaks(struct dr_fs *fs, struct dr_error *err)
{
    char *json = NULL;
    int r = dr_check_fs(fs, "disk", NULL, DR_REPAIR_LEAKS, NULL, NULL, &json, err);
    free(json);
    return r;
}

/* What the killed process did not flush is in the machine's memory alone: an entry that leads to a
 * cluster no more there still does so on the disk. */
static bool kill_repair_and_cut(const struct operation *o, uint64_t n)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    current = o;
    o->family(fs);
    uint8_t *want = view(fs, o->top, &size);
    powerfs_settle(p);
    bool killed = kill_at(o, p, n);
    size_t first = powerfs_ops(p);
    ok(repair_leaks(fs, &err));
    cuts_from(p, first, n, want);
    free(want);
    powerfs_free(p);
    return killed;
}

static void a_cut_after_a_repair_leaves_it_sound(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_OPS; k++)
        for (uint64_t at = 0; kill_repair_and_cut(&ops[k], at); at += SLOWER)
            ;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(a_cut_after_a_repair_leaves_it_sound),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
