/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Damaged VMDKs: a repair must never destroy what another repair could still bring back. */
#include "formats/vmdk/vmdk.h"
#include "test-ops.h"

/* Layout of a monolithic image of up to 32 MiB. */
#define RGD_AT (0x15 * 512u)
#define RGT_AT (0x16 * 512u)
#define GD_AT  (0x1a * 512u)
#define GT_AT  (0x1b * 512u)
#define GRAIN  65536u

static void poke(struct dr_fs *fs, const char *path, uint64_t off, const void *buf, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, buf, off, len, &err));
    dr_file_unref(f);
}

static void poke32(struct dr_fs *fs, const char *path, uint64_t off, uint32_t v)
{
    uint8_t b[4];
    put_le32(b, v);
    poke(fs, path, off, b, 4);
}

static uint32_t peek32(struct dr_fs *fs, const char *path, uint64_t off)
{
    size_t len;
    uint8_t *all = file_bytes(fs, path, &len);
    assert_true(off + 4 <= len);
    uint32_t v = get_le32(all + off);
    free(all);
    return v;
}

static void repair(struct dr_fs *fs, const char *path, unsigned how)
{
    char *json = NULL;
    ok(dr_check_fs(fs, path, NULL, how, NULL, NULL, &json, &err));
    free(json);
}

/* 1 MiB in two places of a disk of 4 MiB; the view of it. */
static uint8_t *disk_with_data(struct dr_fs *fs, uint64_t *size)
{
    make(fs, "d.vmdk", "vmdk", 4 * MiB, NULL);
    put(fs, "d.vmdk", 0, MiB, 0x11);
    put(fs, "d.vmdk", 2 * MiB, MiB, 0x22);
    return view(fs, "d.vmdk", size);
}

/* ------------------------------------------------------------------ leaks */

static void giving_back_leaks_spares_grains_of_a_lost_table(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_data(*state, &size);
    poke32(*state, "d.vmdk", GD_AT, 0x7fffffff); /* the redundant directory knows better */
    repair(*state, "d.vmdk", DR_REPAIR_LEAKS);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

static void giving_back_leaks_spares_the_grain_of_a_damaged_entry(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_data(*state, &size);
    uint32_t entry = peek32(*state, "d.vmdk", GT_AT + 4);
    poke32(*state, "d.vmdk", GT_AT + 4, 0x7fffffff);
    repair(*state, "d.vmdk", DR_REPAIR_LEAKS);
    poke32(*state, "d.vmdk", GT_AT + 4, entry); /* mended by hand, from the copy */
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

/* Some programs keep the directory behind the first grains. */
static void move_directory_behind_the_grains(struct dr_fs *fs, const char *path)
{
    struct dr_file *f;
    uint8_t buf[512] = {0};
    ok(dr_file_open(fs, path, DR_FILE_RDWR, &f, &err));
    uint64_t end = dr_round_up(dr_file_size(f), GRAIN);
    put_le32(buf, GT_AT / 512);
    ok(dr_file_pwrite(f, buf, end, 512, &err));
    put_le64(buf, end / 512);
    ok(dr_file_pwrite(f, buf, 56, 8, &err)); /* gdOffset */
    dr_file_unref(f);
}

static void giving_back_leaks_spares_a_directory_behind_the_overhead(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_data(*state, &size);
    move_directory_behind_the_grains(*state, "d.vmdk");
    repair(*state, "d.vmdk", DR_REPAIR_LEAKS);
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

static void leaks_of_a_sound_image_are_given_back(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_data(*state, &size);
    uint64_t before = disk_size(*state, "d.vmdk");
    poke32(*state, "d.vmdk", GT_AT + 4, 0);
    poke32(*state, "d.vmdk", RGT_AT + 4, 0);
    repair(*state, "d.vmdk", DR_REPAIR_LEAKS);
    assert_int_equal(disk_size(*state, "d.vmdk"), before - GRAIN);
    memset(want + GRAIN, 0, GRAIN);
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

/* A write that was cut off left the file with part of a grain, and part of a block. */
static void leaks_at_the_end_are_cut_off(void **state)
{
    uint64_t size;
    size_t before, after;
    uint8_t *want = disk_with_data(*state, &size);
    free(file_bytes(*state, "d.vmdk", &before));
    poke(*state, "d.vmdk", before + 2 * GRAIN + 5000, "junk", 4);
    repair(*state, "d.vmdk", DR_REPAIR_LEAKS);
    free(file_bytes(*state, "d.vmdk", &after));
    assert_int_equal(after, before + 2 * GRAIN);
    assert_int_equal(disk_size(*state, "d.vmdk") % 4096, 0);
    put(*state, "d.vmdk", 3 * MiB, GRAIN, 0x33);
    memset(want + 3 * MiB, 0x33, GRAIN);
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

/* ------------------------------------------------------------------ directories */

/* With only the directory's entry lost the copy is all that is left of 32 MiB. */
static void a_repair_keeps_the_copy_of_a_table_whose_entry_is_zero(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_data(*state, &size);
    poke32(*state, "d.vmdk", GD_AT, 0);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    poke32(*state, "d.vmdk", GD_AT, peek32(*state, "d.vmdk", RGD_AT));
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

static void a_table_that_is_made_from_its_copy_has_all_its_entries(void **state)
{
    uint64_t size;
    make(*state, "d.vmdk", "vmdk", 32 * MiB, NULL); /* one table */
    put(*state, "d.vmdk", 0, MiB, 0x11);
    put(*state, "d.vmdk", 31 * MiB, MiB, 0x22);
    uint8_t *want = view(*state, "d.vmdk", &size);
    poke32(*state, "d.vmdk", GD_AT, 0x7fffffff);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    same_view(*state, "d.vmdk", want, size);
    assert_int_equal(peek32(*state, "d.vmdk", GT_AT + 511 * 4),
                     peek32(*state, "d.vmdk", RGT_AT + 511 * 4));
    free(want);
}

static void an_empty_table_is_made_where_both_entries_are_zero(void **state)
{
    make(*state, "d.vmdk", "vmdk", 4 * MiB, NULL);
    poke32(*state, "d.vmdk", GD_AT, 0);
    poke32(*state, "d.vmdk", RGD_AT, 0);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    put(*state, "d.vmdk", MiB, MiB, 0x33);
    uint64_t size;
    uint8_t *have = view(*state, "d.vmdk", &size);
    assert_int_equal(have[MiB], 0x33);
    assert_int_equal(have[MiB - 1], 0);
    free(have);
}

/* ------------------------------------------------------------------ trim */

static void trimming_spares_a_directory_behind_the_overhead(void **state)
{
    make(*state, "p.vmdk", "vmdk", 4 * MiB, NULL);
    make(*state, "c.vmdk", "vmdk", 0, "p.vmdk");
    put(*state, "c.vmdk", 0, 64 * KiB, 0x55);
    move_directory_behind_the_grains(*state, "c.vmdk");
    struct dr_commit_options o = {0};
    uint64_t size;
    uint8_t *want = view(*state, "c.vmdk", &size);
    assert_int_equal(want[0], 0x55);
    ok(dr_commit_fs(*state, "c.vmdk", &o, NULL, &err));
    same_view(*state, "c.vmdk", want, size);
    free(want);
}

/* ------------------------------------------------------------------ recover */

/* The parent's pages are in memory when a commit recovers it: they must not bring the old copy
 * back. */
static void recovering_a_parent_renews_what_is_in_memory(void **state)
{
    make(*state, "p.vmdk", "vmdk", 32 * MiB, NULL);
    put(*state, "p.vmdk", 17 * MiB, 64 * KiB, 0x11);
    make(*state, "c.vmdk", "vmdk", 0, "p.vmdk");
    put(*state, "c.vmdk", 18 * MiB, 64 * KiB, 0x22);
    uint8_t one = 1;
    unsigned entry = 17 * MiB / GRAIN * 4;
    poke(*state, "p.vmdk", VMDK_UNCLEAN_AT, &one, 1);
    poke32(*state, "p.vmdk", RGT_AT + entry, 0); /* as a power cut may leave it */
    struct dr_commit_options o = {0};
    ok(dr_commit_fs(*state, "c.vmdk", &o, NULL, &err));
    assert_int_not_equal(peek32(*state, "p.vmdk", GT_AT + entry), 0);
    assert_int_equal(peek32(*state, "p.vmdk", RGT_AT + entry),
                     peek32(*state, "p.vmdk", GT_AT + entry));
}

/* ------------------------------------------------------------------ descriptors */

static void extents_of_more_than_2_to_the_63_are_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const char text[] = "# Disk DescriptorFile\nversion=1\nCID=12345678\n"
                               "parentCID=ffffffff\ncreateType=\"custom\"\n"
                               "RW 18014398509481984 ZERO\nRW 18014398509481984 ZERO\n";
    struct dr_file *f;
    struct dr_disk *disk = NULL;
    ok(dr_file_open(fs, "big.vmdk", DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, text, 0, sizeof(text) - 1, &err));
    dr_file_unref(f);
    refused(dr_open_fs(fs, "big.vmdk", NULL, &disk, &err), EINVAL, "more than");
}

/* ------------------------------------------------------------------ a copy in the wrong place */

/* One bit of the redundant directory is wrong, which no reader notices: it points into a grain. */
static uint8_t *disk_with_copy_in_a_grain(struct dr_fs *fs, uint64_t *size)
{
    uint8_t *want = disk_with_data(fs, size);
    poke32(fs, "d.vmdk", RGD_AT, peek32(fs, "d.vmdk", GT_AT + 4) + 7);
    return want;
}

static void a_repair_does_not_write_tables_over_grains(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_copy_in_a_grain(*state, &size);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    same_view(*state, "d.vmdk", want, size);
    put(*state, "d.vmdk", MiB, MiB, 0x77); /* it is mended */
    memset(want + MiB, 0x77, MiB);
    same_view(*state, "d.vmdk", want, size);
    assert_memory_not_equal(want, want + MiB, GRAIN);
    free(want);
}

/* One bit of the header is wrong: a directory is looked for in a grain. */
static void a_repair_does_not_write_directories_into_grains(void **state)
{
    static const unsigned offsets[] = {48,
                                       56}; /* of the redundant one, and of the one that counts */
    for (size_t i = 0; i < 2; i++) {
        uint64_t size;
        size_t len, now;
        uint8_t *want = disk_with_data(*state, &size);
        uint32_t right = peek32(*state, "d.vmdk", offsets[i]);
        poke32(*state, "d.vmdk", offsets[i], peek32(*state, "d.vmdk", GT_AT + 4) + 7);
        uint8_t *before = file_bytes(*state, "d.vmdk", &len);
        repair(*state, "d.vmdk", DR_REPAIR_ALL);
        uint8_t *after = file_bytes(*state, "d.vmdk", &now);
        assert_int_equal(len, now);
        assert_memory_equal(before, after, len);
        poke32(*state, "d.vmdk", offsets[i], right);
        same_view(*state, "d.vmdk", want, size);
        struct dr_fs *fs = *state;
        ok(fs->ops->unlink(fs, "d.vmdk", &err));
        free(before);
        free(after);
        free(want);
    }
}

/* A wrong bit in the capacity: what is taken for the rest of the directory are the tables. */
static void a_repair_makes_no_tables_behind_the_disks_end(void **state)
{
    static const uint8_t bad[] = {0x22, 0xe2}; /* the directory has 1 sector, 4 sectors */
    for (size_t i = 0; i < 2; i++) {
        uint64_t size;
        uint8_t right = 0, *want = disk_with_data(*state, &size);
        struct dr_fs *fs = *state;
        poke(fs, "d.vmdk", 14, &bad[i], 1);
        repair(fs, "d.vmdk", DR_REPAIR_ALL);
        same_view(fs, "d.vmdk", want, size);
        poke(fs, "d.vmdk", 14, &right, 1);
        same_view(fs, "d.vmdk", want, size);
        put(fs, "d.vmdk", 3 * MiB, MiB, 0x77);
        ok(fs->ops->unlink(fs, "d.vmdk", &err));
        free(want);
    }
}

static void recovering_does_not_write_tables_over_grains(void **state)
{
    uint64_t size;
    uint8_t one = 1, *want = disk_with_copy_in_a_grain(*state, &size);
    struct dr_open_options rdwr = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    poke(*state, "d.vmdk", VMDK_UNCLEAN_AT, &one, 1);
    refused(dr_open_fs(*state, "d.vmdk", &rdwr, &disk, &err), EIO, "check -r all");
    same_view(*state, "d.vmdk", want, size);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    ok(dr_open_fs(*state, "d.vmdk", &rdwr, &disk, &err));
    ok(dr_close(disk, &err));
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

static void writing_does_not_put_entries_into_grains(void **state)
{
    uint64_t size;
    uint8_t *want = disk_with_copy_in_a_grain(*state, &size);
    struct dr_open_options rdwr = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(*state, "d.vmdk", &rdwr, &disk, &err));
    refused(dr_pwrite(disk, "x", MiB, 1, 0, &err), EIO, "check -r all");
    ok(dr_close(disk, &err));
    same_view(*state, "d.vmdk", want, size);
    free(want);
}

/* What recover refuses, check must be able to mend. */
static void an_unclean_image_with_a_lost_table_can_be_repaired(void **state)
{
    uint64_t size;
    uint8_t one = 1, *want = disk_with_data(*state, &size);
    poke32(*state, "d.vmdk", GD_AT, 0x7fffffff);
    poke(*state, "d.vmdk", VMDK_UNCLEAN_AT, &one, 1);
    repair(*state, "d.vmdk", DR_REPAIR_ALL);
    same_view(*state, "d.vmdk", want, size);
    put(*state, "d.vmdk", MiB, MiB, 0x77);
    free(want);
}

static void make_text(struct dr_fs *fs, const char *path, const char *text)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, text, 0, strlen(text), &err));
    dr_file_unref(f);
}

/* A text of a megabyte names its file tens of thousands of times, and a sparse one only once. */
static void many_extents_in_one_file_open_at_once(void **state)
{
    enum { LINES = 60000 };
    struct dr_fs *fs = *state;
    static const char head[] = "# Disk DescriptorFile\nversion=1\nCID=12345678\n"
                               "parentCID=ffffffff\ncreateType=\"custom\"\n";
    static const char line[] = "RW 1 FLAT \"a\" 0\n";
    char *text = malloc(sizeof(head) + LINES * (sizeof(line) - 1) + 100), *end;
    struct dr_file *f;
    struct dr_disk *disk = NULL;
    ok(dr_file_open(fs, "a", DR_FILE_CREATE, &f, &err));
    ok(dr_file_truncate(f, 512, &err));
    dr_file_unref(f);
    end = stpcpy(text, head);
    for (int i = 0; i < LINES; i++)
        end = stpcpy(end, line);
    make_text(fs, "many.vmdk", text);
    ok(dr_open_fs(fs, "many.vmdk", NULL, &disk, &err));
    assert_int_equal(dr_size(disk), LINES * 512);
    ok(dr_close(disk, &err));
    stpcpy(end - sizeof(line) + 1, "RW 1 SPARSE \"a\"\n");
    make_text(fs, "mixed.vmdk", text);
    refused(dr_open_fs(fs, "mixed.vmdk", NULL, &disk, &err), EINVAL, "two extents");
    free(text);
}

/* A new CID would turn the children of a disk away whose content has not changed. */
static void a_refused_write_leaves_the_content_id(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rdwr = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    struct dr_file *f;
    size_t len, now;
    ok(dr_file_open(fs, "a", DR_FILE_CREATE, &f, &err));
    ok(dr_file_truncate(f, 512, &err));
    dr_file_unref(f);
    make_text(fs, "ro.vmdk",
              "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
              "createType=\"custom\"\nRDONLY 1 FLAT \"a\" 0\nRW 1 ZERO\n");
    uint8_t *before = file_bytes(fs, "ro.vmdk", &len);
    ok(dr_open_fs(fs, "ro.vmdk", &rdwr, &disk, &err));
    refused(dr_pwrite(disk, "x", 0, 1, 0, &err), EROFS, "read-only");
    refused(dr_pwrite(disk, "x", 512, 1, 0, &err), EROFS, "ZERO");
    ok(dr_close(disk, &err));
    uint8_t *after = file_bytes(fs, "ro.vmdk", &now);
    assert_int_equal(now, len);
    assert_memory_equal(before, after, len);
    free(before);
    free(after);
}

static void info_tells_about_names_that_are_no_utf_8(void **state)
{
    char *json = NULL;
    make_text(*state, "a\xe9.vmdk",
              "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
              "createType=\"\xe9\xe8\"\nRW 10 ZERO\n");
    ok(dr_info_fs(*state, "a\xe9.vmdk", NULL, false, &json, &err));
    assert_non_null(strstr(json, "\"??\""));
    free(json);
}

static void damage_does_not_hide_what_stands_before_it(void **state)
{
    uint64_t size;
    struct dr_disk *disk = NULL;
    struct dr_extent_status st;
    free(disk_with_data(*state, &size));
    poke32(*state, "d.vmdk", GT_AT + 8, 0x7fffffff);
    ok(dr_open_fs(*state, "d.vmdk", NULL, &disk, &err));
    ok(dr_block_status(disk, 0, size, &st, &err));
    assert_int_equal(st.len, 2 * GRAIN);
    refused(dr_block_status(disk, 2 * GRAIN, GRAIN, &st, &err), EIO, "expected");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ threads */

static void *flush_often(void *disk)
{
    for (int i = 0; i < 20; i++)
        dr_flush(disk, NULL);
    return NULL;
}

/* A CID of another length than ours moves the text: the first write replaces the descriptor file,
 * which a flush may have in its hands. For ThreadSanitizer. */
static void a_flush_may_meet_a_new_descriptor_file(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rdwr = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    pthread_t thread;
    struct dr_file *f;
    ok(dr_file_open(fs, "t.raw", DR_FILE_CREATE, &f, &err));
    ok(dr_file_truncate(f, MiB, &err));
    dr_file_unref(f);
    make_text(fs, "t.vmdk",
              "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
              "createType=\"monolithicFlat\"\nRW 2048 FLAT \"t.raw\" 0\n");
    ok(dr_open_fs(fs, "t.vmdk", &rdwr, &disk, &err));
    assert_int_equal(pthread_create(&thread, NULL, flush_often, disk), 0);
    ok(dr_pwrite(disk, "x", 0, 1, 0, &err));
    pthread_join(thread, NULL);
    ok(dr_close(disk, &err));
    put(fs, "t.vmdk", 0, KiB, 0x66);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(giving_back_leaks_spares_grains_of_a_lost_table),
        ops_test(leaks_at_the_end_are_cut_off),
        ops_test(giving_back_leaks_spares_the_grain_of_a_damaged_entry),
        ops_test(giving_back_leaks_spares_a_directory_behind_the_overhead),
        ops_test(leaks_of_a_sound_image_are_given_back),
        ops_test(a_repair_keeps_the_copy_of_a_table_whose_entry_is_zero),
        ops_test(a_table_that_is_made_from_its_copy_has_all_its_entries),
        ops_test(an_empty_table_is_made_where_both_entries_are_zero),
        ops_test(trimming_spares_a_directory_behind_the_overhead),
        ops_test(recovering_a_parent_renews_what_is_in_memory),
        ops_test(extents_of_more_than_2_to_the_63_are_refused),
        ops_test(a_repair_does_not_write_tables_over_grains),
        ops_test(a_repair_does_not_write_directories_into_grains),
        ops_test(a_repair_makes_no_tables_behind_the_disks_end),
        ops_test(recovering_does_not_write_tables_over_grains),
        ops_test(writing_does_not_put_entries_into_grains),
        ops_test(an_unclean_image_with_a_lost_table_can_be_repaired),
        ops_test(many_extents_in_one_file_open_at_once),
        ops_test(a_refused_write_leaves_the_content_id),
        ops_test(info_tells_about_names_that_are_no_utf_8),
        ops_test(damage_does_not_hide_what_stands_before_it),
        ops_test(a_flush_may_meet_a_new_descriptor_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
