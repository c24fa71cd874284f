/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while grains and tables of sparse VMDKs move whose tables stand among the
 * grains, or behind them: the disk reads the same at every instant. */
#define SIZE (2 * MiB + 64 * KiB) /* ESX's tables cover 2 MiB */
#include "test-ops-power.h"
#include "base/bytes.h"

#define SECTOR 512u
#define GRAIN  (64 * KiB)

static int compact(struct dr_fs *fs, struct dr_error *err)
{
    const struct dr_compact_options o = {.no_zeros = true};
    return dr_compact_fs(fs, "disk", &o, NULL, NULL, err);
}

static void make_vmdk(struct dr_fs *fs, uint64_t size, const char *subformat)
{
    const struct dr_pair pair = {"subformat", subformat};
    struct dr_create_options o = {
        .format = "vmdk", .size = size, .has_size = true, .pairs = &pair, .n_pairs = 1};
    ok(dr_create_fs(fs, "disk", &o, &err));
}

static void discard(struct dr_fs *fs, uint64_t off, uint64_t len)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_discard(disk, off, len, &err));
    ok(dr_close(disk, &err));
}

/* The second table and what it leads to stand behind the data that goes. */
static void esx(struct dr_fs *fs)
{
    make_vmdk(fs, SIZE, "vmfsSparse");
    put(fs, "disk", 0, 30 * KiB, 'a');
    put(fs, "disk", 2 * MiB, 5 * KiB, 'b');
    discard(fs, 2 * KiB, 28 * KiB);
}

/* The file can end in the middle of the second table, and data must give way to it. */
static void esx_without_gaps(struct dr_fs *fs)
{
    make_vmdk(fs, SIZE, "vmfsSparse");
    put(fs, "disk", 0, 32 * KiB, 'a');
    put(fs, "disk", 2 * MiB, 10 * KiB, 'b');
    for (unsigned i = 0; i < 16; i++)
        discard(fs, i * 2 * KiB, KiB);
}

/* Move a table to the end of the file, as programs put it there that make tables one by one. */
static void put_table_behind(struct dr_file *f, uint64_t directory)
{
    uint8_t entry[4], table[2048];
    uint64_t end = dr_round_up(dr_file_size(f), GRAIN);
    ok(dr_file_pread(f, entry, directory, 4, &err));
    ok(dr_file_pread(f, table, (uint64_t)get_le32(entry) * SECTOR, sizeof(table), &err));
    ok(dr_file_pwrite(f, table, end, sizeof(table), &err));
    put_le32(entry, (uint32_t)(end / SECTOR));
    ok(dr_file_pwrite(f, entry, directory, 4, &err));
}

static void put_tables_behind(struct dr_fs *fs)
{
    struct dr_file *f;
    uint8_t raw[16];
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, raw, 48, 16, &err));
    put_table_behind(f, get_le64(raw) * SECTOR);
    put_table_behind(f, get_le64(raw + 8) * SECTOR);
    dr_file_unref(f);
}

static void tables_among_grains(struct dr_fs *fs)
{
    make_vmdk(fs, SIZE, "monolithicSparse");
    put(fs, "disk", 0, 6 * GRAIN, 'a');
    put_tables_behind(fs);
    put(fs, "disk", 20 * GRAIN, 2 * GRAIN, 'b');
    discard(fs, 0, 5 * GRAIN);
}

/* Directories and tables are behind everything: the disk has grown twice. */
static void tables_at_the_end(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    make_vmdk(fs, MiB, "monolithicSparse");
    put_tables_behind(fs);
    put(fs, "disk", 0, 8 * GRAIN, 'a');
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_resize(disk, 40 * MiB, DR_PREALLOC_OFF, &err));
    ok(dr_close(disk, &err));
    discard(fs, 3 * GRAIN, 4 * GRAIN);
}

static const struct operation ops[] = {
    {"compact vmfsSparse", "disk", compact, esx, NULL},
    {"compact vmfsSparse without gaps", "disk", compact, esx_without_gaps, NULL},
    {"compact tables among grains", "disk", compact, tables_among_grains, NULL},
    {"compact tables at the end", "disk", compact, tables_at_the_end, NULL},
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
    miss_a_flush(&ops[2]);
    miss_a_flush(&ops[3]);
}

static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    kill_and_cut_each(ops, N_OPS);
}

/* Where the tables were, the file ends now, or other things stand. */
static void what_was_killed_ends_as_short(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_OPS; k++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_compact_result want, result;
        const struct dr_compact_options o = {.no_zeros = true};
        bool killed = true;
        ops[k].family(fs);
        ok(dr_compact_fs(fs, "disk", &o, NULL, &want, &err));
        assert_true(want.after < want.before);
        dr_fs_memory_free(fs);
        for (uint64_t at = 0; killed; at += SLOWER) {
            struct powerfs *p = powerfs_new();
            ops[k].family(powerfs_fs(p));
            killed = kill_at(&ops[k], p, at);
            ok(dr_compact_fs(powerfs_fs(p), "disk", &o, NULL, &result, &err));
            if (result.after != want.after || result.before > want.before)
                fail_msg("%s, killed at %llu: from %llu to %llu bytes, not from %llu to %llu",
                         ops[k].name, (unsigned long long)at, (unsigned long long)result.before,
                         (unsigned long long)result.after, (unsigned long long)want.before,
                         (unsigned long long)want.after);
            powerfs_free(p);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
        cmocka_unit_test(what_was_killed_ends_as_short),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
