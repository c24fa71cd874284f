/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction of sparse VMDKs whose tables stand among the grains, or behind them: they move, too,
 * and the file ends where what is in use ends. */
#include "test-ops.h"
#include "faultfs.h"
#include "base/bytes.h"

#define SECTOR 512u
#define SIZE   (10u * MiB) /* 5 tables of ESX's, which cover 2 MiB each */

static uint64_t length(struct dr_fs *fs, const char *path)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, 0, &f, &err));
    uint64_t n = dr_file_size(f);
    dr_file_unref(f);
    return n;
}

static uint32_t le(struct dr_fs *fs, const char *path, uint64_t at)
{
    struct dr_file *f;
    uint8_t raw[4];
    ok(dr_file_open(fs, path, 0, &f, &err));
    ok(dr_file_pread(f, raw, at, sizeof(raw), &err));
    dr_file_unref(f);
    return get_le32(raw);
}

static void is_sound(struct dr_fs *fs)
{
    char *json = NULL;
    ok(dr_check_fs(fs, "disk", NULL, DR_REPAIR_NONE, NULL, NULL, &json, &err));
    if (strstr(json, "\"corruptions\"") || strstr(json, "\"leaks\""))
        fail_msg("%s", json);
    free(json);
}

static void make_vmdk(struct dr_fs *fs, const char *name, const char *value)
{
    const struct dr_pair pair = {name, value};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &pair, .n_pairs = 1};
    ok(dr_create_fs(fs, "disk", &o, &err));
}

static void make_cowd(struct dr_fs *fs)
{
    make_vmdk(fs, "subformat", "vmfsSparse");
}

static void change(struct dr_fs *fs, uint64_t off, uint64_t len, int byte)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(byte ? dr_pwrite(disk, buf, off, len, 0, &err) : dr_discard(disk, off, len, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

/* Compact, after a dry run that must tell the same; a second time there is nothing to do. */
static struct dr_compact_result compact(struct dr_fs *fs)
{
    struct dr_compact_options o = {.dry_run = true};
    struct dr_compact_result plan, result, again;
    uint64_t size;
    uint8_t *want = view(fs, "disk", &size);
    ok(dr_compact_fs(fs, "disk", &o, NULL, &plan, &err));
    o.dry_run = false;
    ok(dr_compact_fs(fs, "disk", &o, NULL, &result, &err));
    same_view(fs, "disk", want, size);
    is_sound(fs);
    ok(dr_compact_fs(fs, "disk", &o, NULL, &again, &err));
    if (plan.after != result.after || again.after != result.after || again.moved)
        fail_msg("%llu bytes before, %llu planned, %llu after, %llu the next time, %llu moved then",
                 (unsigned long long)result.before, (unsigned long long)plan.after,
                 (unsigned long long)result.after, (unsigned long long)again.after,
                 (unsigned long long)again.moved);
    assert_true(result.after <= result.before);
    free(want);
    return result;
}

/* ------------------------------------------------------------------ ESX's */

#define TABLE (32 * SECTOR)
#define HEAD  (5 * SECTOR) /* header and directory */

/* The first table's data goes; the second table and its data, which were made later, follow. */
static void data_and_tables_of_esx_move_down(void **state)
{
    static const unsigned kept[] = {8, 90, 99, 100, 180}; /* sectors; 90: the end is in the table */
    (void)state;
    for (size_t i = 0; i < 5; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_cowd(fs);
        change(fs, 0, 100 * SECTOR, 'a');
        change(fs, 2 * MiB, (uint64_t)kept[i] * SECTOR, 'b');
        assert_int_equal(length(fs, "disk-delta.vmdk"),
                         HEAD + 2 * TABLE + (100 + kept[i]) * SECTOR);
        change(fs, 0, 100 * SECTOR, 0);
        compact(fs);
        uint64_t after = length(fs, "disk-delta.vmdk");
        assert_int_equal(after, HEAD + 2 * TABLE + kept[i] * SECTOR);
        assert_int_equal(le(fs, "disk-delta.vmdk", 28) * (uint64_t)SECTOR, after);
        change(fs, 4 * MiB, 10 * SECTOR, 'c');
        is_sound(fs);
        dr_fs_memory_free(fs);
    }
}

/* Between the tables there is no room for another one: the file ends behind a table. */
static void a_table_of_esx_without_room_stays(void **state)
{
    struct dr_fs *fs = *state;
    make_cowd(fs);
    for (unsigned i = 0; i < 5; i++)
        change(fs, i * 2 * MiB, 8 * SECTOR, 'a' + (int)i);
    for (unsigned i = 0; i < 4; i++)
        change(fs, i * 2 * MiB, 8 * SECTOR, 0);
    compact(fs);
    assert_int_equal(length(fs, "disk-delta.vmdk"), HEAD + 5 * TABLE + 4 * 8 * SECTOR);
}

static void zeros_of_esx_s_disks_are_given_back(void **state)
{
    struct dr_fs *fs = *state;
    make_cowd(fs);
    change(fs, 0, MiB, 'a');
    change(fs, 6 * MiB, MiB, 'b');
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *zeros = calloc(1, MiB);
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_pwrite(disk, zeros, 0, MiB, 0, &err));
    ok(dr_close(disk, &err));
    free(zeros);
    struct dr_compact_result result = compact(fs);
    assert_int_equal(result.zeros, MiB);
    assert_int_equal(length(fs, "disk-delta.vmdk"), HEAD + 2 * TABLE + MiB);
}

static void lives_of_esx_s_disks(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint8_t *shadow = calloc(1, SIZE);
        uint64_t rnd = seed * 7919;
        make_cowd(fs);
        for (int round = 0; round < 5; round++) {
            for (int i = 0; i < 8; i++) {
                uint64_t len = SECTOR * (1 + next_random(&rnd) % 200);
                uint64_t off = next_random(&rnd) % (SIZE - len) / SECTOR * SECTOR;
                int byte = next_random(&rnd) % 3 ? 0 : 1 + (int)(next_random(&rnd) % 255);
                memset(shadow + off, byte, len);
                change(fs, off, len, byte);
            }
            struct dr_compact_options how = {.no_zeros = next_random(&rnd) % 2};
            struct dr_compact_result result;
            ok(dr_compact_fs(fs, "disk", &how, NULL, &result, &err));
            assert_true(result.after <= result.before);
            same_view(fs, "disk", shadow, SIZE);
            is_sound(fs);
        }
        free(shadow);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ hosted ones */

#define GRAIN UINT64_C(65536)

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

static void tables_among_the_grains_move_down(void **state)
{
    struct dr_fs *fs = *state;
    make_vmdk(fs, "subformat", "monolithicSparse");
    change(fs, 0, 40 * GRAIN, 'a');
    put_tables_behind(fs);
    change(fs, 100 * GRAIN, 4 * GRAIN, 'b');
    change(fs, 0, 38 * GRAIN, 0);
    is_sound(fs);
    compact(fs);
    /* Overhead, six grains, both tables. */
    assert_int_equal(length(fs, "disk"), 8 * GRAIN);
    change(fs, 0, MiB, 'c');
    is_sound(fs);
}

/* A disk that grew with tables right behind its overhead: the new ones are at the file's end. */
static void tables_at_the_end_move_down_with_their_directories(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    make_vmdk(fs, "subformat", "monolithicSparse");
    put_tables_behind(fs);
    change(fs, 0, 40 * GRAIN, 'a');
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_resize(disk, UINT64_C(8192) * MiB, DR_PREALLOC_OFF, &err));
    ok(dr_close(disk, &err));
    assert_true(le(fs, "disk", 56) * (uint64_t)SECTOR > 40 * GRAIN);
    change(fs, 0, 30 * GRAIN, 0);
    struct dr_compact_options dry = {.dry_run = true, .no_zeros = true}, how = {.no_zeros = true};
    struct dr_compact_result plan, result, again;
    ok(dr_compact_fs(fs, "disk", &dry, NULL, &plan, &err));
    ok(dr_compact_fs(fs, "disk", &how, NULL, &result, &err));
    ok(dr_compact_fs(fs, "disk", &how, NULL, &again, &err));
    is_sound(fs);
    assert_int_equal(plan.after, result.after);
    assert_int_equal(again.after, result.after);
    /* Overhead, ten grains, two directories with 256 tables each. */
    assert_int_equal(result.after, (1 + 10 + 17) * GRAIN);
    assert_true(le(fs, "disk", 56) * (uint64_t)SECTOR < 20 * GRAIN);
    uint8_t buf[512];
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    for (unsigned i = 0; i < 40; i++) {
        ok(dr_pread(disk, buf, i * GRAIN, 512, &err));
        assert_int_equal(buf[5], i < 30 ? 0 : 'a');
    }
    ok(dr_pwrite(disk, buf, UINT64_C(8000) * MiB, 512, 0, &err));
    ok(dr_close(disk, &err));
    is_sound(fs);
}

/* ------------------------------------------------------------------ what fails */

static void make_esx_gaps(struct dr_fs *fs)
{
    make_cowd(fs);
    change(fs, 0, 100 * SECTOR, 'a');
    change(fs, 2 * MiB, 20 * SECTOR, 'b');
    change(fs, 0, 90 * SECTOR, 0);
}

static void make_hosted_gaps(struct dr_fs *fs)
{
    make_vmdk(fs, "subformat", "monolithicSparse");
    change(fs, 0, 20 * GRAIN, 'a');
    put_tables_behind(fs);
    change(fs, 0, 18 * GRAIN, 0);
}

static void a_failure_leaves_the_disk_as_it_was(void **state)
{
    void (*const make_gaps[])(struct dr_fs *) = {make_esx_gaps, make_hosted_gaps};
    static const enum faultfs_kind kinds[] = {FAULTFS_WRITE, FAULTFS_COPY, FAULTFS_FLUSH};
    (void)state;
    for (size_t i = 0; i < 2; i++)
        for (size_t k = 0; k < 3; k++)
            for (uint64_t n = 0, fired = 1; fired; n++) {
                struct dr_fs *fs = dr_fs_memory_new();
                struct faultfs *f = faultfs_new(fs);
                const struct dr_compact_options o = {.no_zeros = true};
                uint64_t size;
                make_gaps[i](fs);
                uint8_t *want = view(fs, "disk", &size);
                faultfs_arm(f, &(struct faultfs_plan){.nth = n, .kinds = 1u << kinds[k]});
                int r = dr_compact_fs(faultfs_fs(f), "disk", &o, NULL, NULL, NULL);
                fired = faultfs_fired(f);
                faultfs_free(f);
                if (fired != (r < 0))
                    fail_msg("disk %zu, kind %zu, number %d: %d", i, k, (int)n, r);
                same_view(fs, "disk", want, size);
                ok(dr_compact_fs(fs, "disk", &o, NULL, NULL, &err));
                same_view(fs, "disk", want, size);
                is_sound(fs);
                free(want);
                dr_fs_memory_free(fs);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(data_and_tables_of_esx_move_down),
        ops_test(a_table_of_esx_without_room_stays),
        ops_test(zeros_of_esx_s_disks_are_given_back),
        cmocka_unit_test(lives_of_esx_s_disks),
        ops_test(tables_among_the_grains_move_down),
        ops_test(tables_at_the_end_move_down_with_their_directories),
        cmocka_unit_test(a_failure_leaves_the_disk_as_it_was),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
