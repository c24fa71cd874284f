/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while bitmaps and tables of several clusters move: the disk reads the same
 * at every instant, and so do its bitmaps. */
#include "test-ops-power.h"

static int compact(struct dr_fs *fs, struct dr_error *err)
{
    const struct dr_compact_options o = {.no_zeros = true};
    return dr_compact_fs(fs, "disk", &o, NULL, NULL, err);
}

static struct dr_disk *open_rw(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    return disk;
}

static void discard(struct dr_fs *fs, uint64_t off, uint64_t len)
{
    struct dr_disk *disk = open_rw(fs);
    ok(dr_discard(disk, off, len, &err));
    ok(dr_close(disk, &err));
}

static void add_bitmap(struct dr_fs *fs, const char *name)
{
    const struct dr_bitmap_options o = {.granularity = 512};
    struct dr_disk *disk = open_rw(fs);
    ok(dr_disk_bitmap_change(disk, name, DR_BITMAP_ADD, &o, &err));
    ok(dr_close(disk, &err));
}

static void make_qcow2(struct dr_fs *fs, uint64_t size, const char *cluster, const char *width)
{
    const struct dr_pair pairs[] = {{"cluster_size", cluster}, {"refcount_bits", width}};
    struct dr_create_options o = {
        .format = "qcow2", .size = size, .has_size = true, .pairs = pairs, .n_pairs = 2};
    ok(dr_create_fs(fs, "disk", &o, &err));
}

#define LONG_NAME                                                                \
    "a-name-of-some-length-with-which-the-directory-takes-more-than-one-cluster" \
    "-a-name-of-some-length-with-which-the-directory-takes-more-than-one-cluster"
static const char *const names[] = {"1" LONG_NAME LONG_NAME, "2" LONG_NAME LONG_NAME};

/* Bits, tables and directory stand behind the data. */
static void bitmaps(struct dr_fs *fs)
{
    make_qcow2(fs, SIZE, "4k", "16");
    put(fs, "disk", 0, 160 * KiB, 'd');
    for (unsigned i = 0; i < 2; i++)
        add_bitmap(fs, names[i]);
    put(fs, "disk", 100 * KiB, 60 * KiB, 'e');
    discard(fs, 0, 120 * KiB);
}

/* So do an L1 table and a directory of two clusters. */
static void long_tables(struct dr_fs *fs)
{
    make_qcow2(fs, 2 * MiB, "512", "16");
    put(fs, "disk", 0, 40 * KiB, 'd');
    struct dr_disk *disk = open_rw(fs);
    ok(dr_resize(disk, 4 * MiB, DR_PREALLOC_OFF, &err));
    ok(dr_close(disk, &err));
    for (unsigned i = 0; i < 2; i++)
        add_bitmap(fs, names[i]);
    put(fs, "disk", 20 * KiB, 20 * KiB, 'e');
    discard(fs, 0, 37 * KiB);
}

/* No two free clusters stand side by side: others give way to the tables. */
static void no_gap_is_long_enough(struct dr_fs *fs)
{
    make_qcow2(fs, 2 * MiB, "512", "16");
    put(fs, "disk", 0, 12 * KiB, 'd');
    struct dr_disk *disk = open_rw(fs);
    ok(dr_resize(disk, 4 * MiB, DR_PREALLOC_OFF, &err));
    for (unsigned i = 0; i < 12; i++)
        ok(dr_discard(disk, i * KiB, 512, &err));
    ok(dr_close(disk, &err));
}

/* The file can end in the middle of the L1 table: what is behind that fits only where it stood. */
static void the_end_is_in_a_table(struct dr_fs *fs)
{
    make_qcow2(fs, 2 * MiB, "512", "16");
    put(fs, "disk", 0, 40 * KiB, 'd');
    struct dr_disk *disk = open_rw(fs);
    ok(dr_resize(disk, 64 * MiB, DR_PREALLOC_OFF, &err));
    ok(dr_close(disk, &err));
    put(fs, "disk", 512, 15 * KiB, 'e');
    put(fs, "disk", 40 * KiB, 15 * KiB, 'e');
    for (unsigned i = 0; i < 40; i++)
        discard(fs, i * KiB, 512);
}

/* The refcount table grew when the data came, which has gone again. */
static void long_refcount_table(struct dr_fs *fs)
{
    make_qcow2(fs, 4 * MiB, "512", "64");
    put(fs, "disk", 128 * KiB, 2 * MiB, 'd');
    put(fs, "disk", 0, 2 * KiB, 'e');
    discard(fs, 132 * KiB, 2 * MiB - 4 * KiB);
}

static const struct operation ops[] = {
    {"compact with bitmaps", "disk", compact, bitmaps, NULL},
    {"compact with long tables", "disk", compact, long_tables, NULL},
    {"compact without long gaps", "disk", compact, no_gap_is_long_enough, NULL},
    {"compact to the middle of a table", "disk", compact, the_end_is_in_a_table, NULL},
    {"compact with a long refcount table", "disk", compact, long_refcount_table, NULL},
};
#define N_OPS (sizeof(ops) / sizeof(ops[0]))

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    cut_each(ops, N_OPS - 1);
}

/* This file is a long one: not every cut of it. */
static void no_cut_with_a_long_refcount_table_changes_the_view(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    uint64_t size;
    current = &ops[N_OPS - 1];
    current->family(powerfs_fs(p));
    uint8_t *want = view(powerfs_fs(p), current->top, &size);
    powerfs_settle(p);
    ok(current->run(powerfs_fs(p), &err));
    for (size_t at = 0; at <= powerfs_ops(p); at = powerfs_next(p, at, 60))
        for (int mode = 0; mode < POWERFS_MODES; mode++) {
            struct dr_fs *disk = powerfs_cut(p, at, (enum powerfs_mode)mode, 1);
            snprintf(where, sizeof(where), "%zu mode %d", at, mode);
            look(disk, want, at % 8 == 0, at % 16 == 0, true);
            dr_fs_memory_free(disk);
        }
    free(want);
    powerfs_free(p);
}

static void missing_flush_is_caught(void **state)
{
    (void)state;
    miss_a_flush(&ops[0]);
    miss_a_flush(&ops[2]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(&ops[1], 2);
}

/* ------------------------------------------------------------------ how short they become */

static uint64_t be(struct dr_fs *fs, uint64_t at, unsigned bytes)
{
    struct dr_file *f;
    uint8_t raw[8];
    uint64_t v = 0;
    ok(dr_file_open(fs, "disk", 0, &f, &err));
    ok(dr_file_pread(f, raw, at, bytes, &err));
    dr_file_unref(f);
    for (unsigned i = 0; i < bytes; i++)
        v = v << 8 | raw[i];
    return v;
}

/* Nothing keeps the file from ending where the last cluster in use is. */
static void the_file_has_no_gaps_afterwards(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_OPS; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_compact_options o = {.dry_run = true};
        struct dr_compact_result plan, result, again;
        ops[i].family(fs);
        uint64_t cluster = UINT64_C(1) << be(fs, 20, 4), l1 = be(fs, 40, 8);
        ok(dr_compact_fs(fs, "disk", &o, NULL, &plan, &err));
        o.dry_run = false;
        ok(dr_compact_fs(fs, "disk", &o, NULL, &result, &err));
        ok(dr_compact_fs(fs, "disk", &o, NULL, &again, &err));
        if (result.after != plan.after || result.after >= plan.before ||
            again.after != result.after || again.moved)
            fail_msg("%s: %llu bytes before, %llu planned, %llu after, %llu the next time",
                     ops[i].name, (unsigned long long)plan.before, (unsigned long long)plan.after,
                     (unsigned long long)result.after, (unsigned long long)again.after);
        if (ops[i].family == no_gap_is_long_enough)
            assert_true(l1 + cluster >= result.after && be(fs, 40, 8) < result.after);
        if (ops[i].family == long_refcount_table)
            assert_true(be(fs, 56, 4) > 1);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ the bitmaps */

struct ranges {
    uint64_t at[64];
    size_t n;
};

static int note(void *user, uint64_t off, uint64_t len)
{
    struct ranges *r = user;
    if (r->n + 2 <= 64) {
        r->at[r->n++] = off;
        r->at[r->n++] = len;
    }
    return 0;
}

static struct ranges dirty(struct dr_fs *fs, const char *name)
{
    struct dr_disk *disk = NULL;
    struct ranges r = {{0}, 0};
    ok(dr_open_fs(fs, "disk", NULL, &disk, &err));
    ok(dr_disk_bitmap_read(disk, name, note, &r, &err));
    ok(dr_close(disk, &err));
    return r;
}

static void bitmaps_are_as_before_at_each_cut(const struct operation *o)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct ranges want[2];
    o->family(fs);
    for (unsigned i = 0; i < 2; i++)
        want[i] = dirty(fs, names[i]);
    assert_true(want[0].n > 0);
    powerfs_settle(p);
    ok(o->run(fs, &err));
    for (size_t at = 0; at <= powerfs_ops(p); at = powerfs_next(p, at, POWERFS_EVERY))
        for (int mode = 0; mode < POWERFS_MODES; mode++) {
            struct dr_fs *cut = powerfs_cut(p, at, (enum powerfs_mode)mode, 1);
            for (unsigned i = 0; i < 2; i++) {
                struct ranges found = dirty(cut, names[i]);
                if (memcmp(&found, &want[i], sizeof(found)) != 0)
                    fail_msg("%s: cut at %zu, mode %d: bitmap %u is another one", o->name, at, mode,
                             i);
            }
            dr_fs_memory_free(cut);
        }
    powerfs_free(p);
}

static void no_cut_changes_a_bitmap(void **state)
{
    (void)state;
    bitmaps_are_as_before_at_each_cut(&ops[0]);
    bitmaps_are_as_before_at_each_cut(&ops[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_file_has_no_gaps_afterwards),
        cmocka_unit_test(no_cut_changes_a_bitmap),
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(no_cut_with_a_long_refcount_table_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
