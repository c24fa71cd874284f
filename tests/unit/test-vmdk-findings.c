/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Each kind of damage is found, by one line, and nothing else is. What has one right answer is
 * mended, and the disk reads as before. */
#include "test-vmdk.h"

#define SIZE (8 * MIB)
#define D    "/d/a.vmdk"

/* Entry i of the table and of its copy. */
#define GTE(i)  (GT_AT + (i)*4)
#define RGTE(i) (RGT_AT + (i)*4)

static void make_disk(void)
{
    ok(create(D, SIZE, NULL));
    write_one(D, 0, MIB, 1, 0);
    write_one(D, 4 * MIB, MIB, 2, 0);
}

static void reads_as_before(void)
{
    struct dr_disk *disk = opened(D, 0);
    reads(disk, 0, MIB, 1);
    reads_zero(disk, MIB, 3 * MIB);
    reads(disk, 4 * MIB, MIB, 2);
    reads_zero(disk, 5 * MIB, 3 * MIB);
    ok(dr_close(disk, &err));
}

static unsigned line_count(void)
{
    unsigned n = 0;
    for (const char *p = lines; (p = strchr(p, '\n')); p++)
        n++;
    return n;
}

/* Exactly one line, with these words and numbers. */
static void finds_only(uint64_t corruptions, uint64_t leaks, const char *words)
{
    finds(D, corruptions, leaks, words);
    if (line_count() != 1)
        fail_msg("%u lines: %s", line_count(), lines);
}

static void mends(uint64_t corruptions)
{
    struct dr_check_result r = checked(D, DR_CHECK_FIX_ALL);
    if (r.corruptions_fixed != corruptions || r.corruptions)
        fail_msg("%llu mended, %llu not: %s", (unsigned long long)r.corruptions_fixed,
                 (unsigned long long)r.corruptions, lines);
    finds(D, 0, 0, "");
    assert_string_equal(lines, "");
    reads_as_before();
}

/* A repair leaves each byte as it is. */
static void mends_nothing(void)
{
    size_t size = (size_t)file_size(D);
    CLEANUP_FREE uint8_t *before = malloc(size), *after = malloc(size);
    peek(D, 0, before, size);
    assert_int_equal(checked(D, DR_CHECK_FIX_ALL).corruptions_fixed, 0);
    assert_int_equal(file_size(D), size);
    peek(D, 0, after, size);
    assert_memory_equal(before, after, size);
}

/* The same in the table and in its copy, so that neither knows better. */
static void poke_both(unsigned entry, uint32_t gte)
{
    poke32(D, GTE(entry), gte);
    poke32(D, RGTE(entry), gte);
}

/* ------------------------------------------------------------------ entries */

static void an_entry_in_the_metadata_is_found(void **state)
{
    (void)state;
    make_disk();
    poke_both(2, 5);
    finds_only(1, 0, "the entry for guest offset 131072 says sector 5, which cannot be: metadata");
    mends_nothing();
    poke32(D, RGTE(2), peek32(D, GTE(1)) + 128);
    finds_only(1, 0, "metadata");
    mends(1);
}

static void neighbours_are_told_in_one_line(void **state)
{
    (void)state;
    make_disk();
    for (unsigned i = 3; i < 13; i++)
        poke_both(i, 5);
    finds_only(10, 0, "10 entries for guest offsets 196608 to 851967 say sector 5,");
}

static void ranges_end_with_the_disk(void **state)
{
    (void)state;
    ok(create(D, MIB + 512, NULL));
    for (unsigned i = 14; i < 17; i++)
        poke_both(i, 7);
    finds_only(3, 0, "guest offsets 917504 to 1049087 say");
}

static void an_entry_of_1_without_zeroed_grains_is_found(void **state)
{
    (void)state;
    make_disk();
    poke_both(1, 1);
    finds_only(1, 0, "this extent has no zeroed grains");
    mends_nothing();
    poke32(D, RGTE(1), peek32(D, GTE(0)) + 128);
    mends(1);
}

static void two_entries_for_one_grain_are_found(void **state)
{
    (void)state;
    make_disk();
    uint32_t right = peek32(D, GTE(2));
    poke_both(2, peek32(D, GTE(5)));
    finds_only(1, 0, "which belongs to another one too");
    mends_nothing();
    poke32(D, RGTE(2), right); /* the first of both is the wrong one */
    finds_only(1, 0, "the entry for guest offset 131072");
    mends(1);
    right = peek32(D, GTE(7));
    poke32(D, GTE(7), peek32(D, GTE(5))); /* the second */
    finds_only(1, 0, "the entry for guest offset 458752");
    mends(1);
}

static void three_entries_for_one_grain_are_two_errors(void **state)
{
    (void)state;
    make_disk();
    poke_both(8, peek32(D, GTE(7)));
    poke_both(9, peek32(D, GTE(7)));
    finds_only(2, 0, "2 entries for guest offsets 524288 to 655359");
    mends_nothing();
}

static void a_grain_that_is_not_aligned_is_told(void **state)
{
    (void)state;
    ok(create(D, SIZE, NULL));
    make_zeros("/d/pad", 1);
    uint8_t data[GRAIN];
    fill(data, sizeof(data), 3);
    uint64_t end = file_size(D);
    for (unsigned i = 0; i < 3; i++) {
        poke(D, end + 512 + i * GRAIN, data, GRAIN);
        poke_both(i, (uint32_t)(end / 512) + 1 + i * 128);
    }
    finds_only(0, 0, "not aligned");
    mends_nothing();
    write_one(D, 4 * MIB, GRAIN, 9, 0); /* appended at a multiple, behind a gap */
    finds_only(0, 0, "not aligned");
}

static void an_entry_far_behind_the_end_is_no_truncation(void **state)
{
    (void)state;
    make_disk();
    poke_both(2, 0x7fffff80);
    poke_both(9, 0x7fff0000);
    finds(D, 2, 0,
          "the entry for guest offset 131072 says sector 2147483520, which cannot be: the "
          "file ends before that");
    assert_null(strstr(lines, "truncated"));
    assert_int_equal(line_count(), 2);
    mends_nothing();
    /* the copy is right about the one */
    poke32(D, RGTE(2), peek32(D, GTE(1)) + 128);
    checked(D, DR_CHECK_FIX_ALL);
    finds_only(1, 0, "the entry for guest offset 589824");
}

static void a_file_that_was_cut_off_is_one_line(void **state)
{
    (void)state;
    char words[100];
    struct dr_file *f;
    make_disk();
    uint64_t size = file_size(D);
    ok(dr_file_open(mem, D, DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, size - 9 * GRAIN - 700, &err));
    dr_file_unref(f);
    snprintf(words, sizeof(words),
             "File truncated, expecting at least %llu bytes: it has %llu, and 10",
             (unsigned long long)size, (unsigned long long)size - 9 * GRAIN - 700);
    finds_only(10, 0, words);
    mends_nothing();
    poke_both(0, 0xfffff000); /* a damaged entry makes the file no longer */
    finds(D, 11, 0, words);
    assert_int_equal(line_count(), 2);
}

/* ------------------------------------------------------------------ tables */

static void a_table_without_its_entries_gets_them_from_the_copy(void **state)
{
    (void)state;
    uint8_t zeros[2048] = {0};
    make_disk();
    poke(D, GT_AT, zeros, sizeof(zeros));
    finds(D, 32, 0,
          "16 entries for guest offsets 0 to 1048575 say sectors 128 to 2048, though only");
    assert_int_equal(line_count(), 2);
    mends(32);
}

/* After a crash the table is what counts, and the copy may be ahead. */
static void an_unclean_table_keeps_its_holes(void **state)
{
    (void)state;
    make_disk();
    uint32_t gte = peek32(D, GTE(3));
    poke32(D, GTE(3), 0);
    poke(D, 72, "\1", 1);
    finds(D, 0, 1, "differ, as they may when it was not closed");
    assert_non_null(strstr(lines, "was not closed cleanly"));
    assert_int_equal(checked(D, DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    assert_int_equal(peek32(D, GTE(3)), 0);
    assert_int_equal(peek32(D, RGTE(3)), 0);
    uint8_t mark;
    peek(D, 72, &mark, 1);
    assert_int_equal(mark, 0);
    (void)gte;
}

static void a_table_of_rubbish_is_mended_from_its_copy(void **state)
{
    (void)state;
    uint8_t junk[2048];
    make_disk();
    for (size_t i = 0; i < sizeof(junk); i += 4)
        put_le32(junk + i, (uint32_t)(0x80000001 + i * 7919));
    poke(D, GT_AT, junk, sizeof(junk));
    struct dr_check_result r = checked(D, 0);
    assert_int_equal(r.corruptions, 128);
    assert_null(strstr(lines, "truncated"));
    mends(128);
}

static void a_copy_of_rubbish_follows(void **state)
{
    (void)state;
    uint8_t junk[2048];
    make_disk();
    memset(junk, 0xa5, sizeof(junk));
    poke(D, RGT_AT, junk, sizeof(junk));
    finds_only(1, 0, "grain table 0 and its redundant copy differ");
    mends(1);
}

static void an_unclean_mark_alone_is_told(void **state)
{
    (void)state;
    make_disk();
    poke(D, 72, "\1", 1);
    finds_only(0, 0, "was not closed cleanly");
    mends(0);
}

/* ------------------------------------------------------------------ directories */

static void a_directory_entry_that_cannot_be_is_found(void **state)
{
    (void)state;
    static const struct {
        uint64_t at;
        uint32_t gde;
        const char *words;
    } cases[] = {
        {GD_AT, 0x7fffffff, "primary grain directory entry 0 says sector 2147483647: no table can"},
        {GD_AT, 0, "primary grain directory entry 0 says sector 0: no table"},
        {GD_AT, 5, "primary grain directory entry 0 says sector 5: other metadata"},
        {GD_AT, 0x16, "primary grain directory entry 0 says sector 22: other metadata"},
        {GD_AT, 0x19, "primary grain directory entry 0 says sector 25: other metadata"},
        {RGD_AT, 0x1b, "redundant grain directory entry 0 says sector 27: other metadata"},
        {RGD_AT, 0x7fffffff, "redundant grain directory entry 0 says sector 2147483647: no table"},
        {RGD_AT, 0, "redundant grain directory entry 0 says sector 0: no table"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        make_disk();
        poke32(D, cases[i].at, cases[i].gde);
        finds_only(1, 0, cases[i].words);
        mends(1);
        ok(mem->ops->unlink(mem, D, &err));
    }
}

static void a_directory_that_is_gone_is_one_line(void **state)
{
    (void)state;
    uint8_t zeros[512] = {0};
    ok(create(D, 256 * MIB, NULL));
    write_one(D, 0, MIB, 1, 0);
    write_one(D, 4 * MIB, MIB, 2, 0);
    write_one(D, 200 * MIB, MIB, 3, 0);
    struct dr_image *image = image_of(D, 0);
    uint64_t gd = vmdk_of(image)->extents[0].h.gd_off * 512;
    ok(dr_image_unref(image, &err));
    poke(D, gd, zeros, sizeof(zeros));
    finds_only(8, 0, "primary grain directory entries 0 to 7 say sector 0: no table");
    assert_int_equal(checked(D, DR_CHECK_FIX_ALL).corruptions_fixed, 8);
    finds(D, 0, 0, "");
    struct dr_disk *disk = opened(D, 0);
    reads(disk, 0, MIB, 1);
    reads(disk, 200 * MIB, MIB, 3);
    ok(dr_close(disk, &err));
}

/* Where the tables are is known from the layout, and two equal ones are there. */
static void directories_that_are_both_gone_are_led_back_to_their_tables(void **state)
{
    (void)state;
    make_disk();
    for (unsigned k = 0; k < 2; k++) {
        poke32(D, GD_AT, k ? 0xffffffff : 0);
        poke32(D, RGD_AT, k ? 0x7fffffff : 0);
        finds(D, 2, 0,
              k ? "primary grain directory entry 0 says sector 4294967295: no table can be there"
                : "redundant grain directory entry 0 says sector 0: no table");
        assert_int_equal(line_count(), 2);
        mends(2);
    }
}

/* The image that was repaired goes on with what the repair has written. */
static void directories_that_were_led_back_are_used_at_once(void **state)
{
    (void)state;
    struct dr_check_result result = {.report = note};
    struct dr_extent ext;
    make_disk();
    poke32(D, GD_AT, 0xffffffff);
    poke32(D, RGD_AT, 0xffffffff);
    struct dr_image *image = image_of(D, DR_OPEN_RDWR | DR_OPEN_AS_FOUND);
    ok(vmdk_check(image, DR_CHECK_FIX_ALL, &result, &err));
    assert_int_equal(result.corruptions_fixed, 2);
    ok(dr_image_map(image, 0, MIB, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    ok(dr_image_unref(image, &err));
}

/* Which of two tables would be the right one is not known; a copy of nothing is no mending. */
static void directories_that_are_both_gone_stay_where_the_tables_differ(void **state)
{
    (void)state;
    static const uint32_t lost[][2] = {{0xffffffff, 0xffffffff}, {0, 0xffffffff}, {0, 0}};
    make_disk();
    poke32(D, RGTE(1), 0);
    for (unsigned k = 0; k < 3; k++) {
        poke32(D, GD_AT, lost[k][0]);
        poke32(D, RGD_AT, lost[k][1]);
        finds(D, 2, 0, lost[k][1] ? "no table can be there" : "no table");
        assert_int_equal(line_count(), 2);
        mends_nothing();
    }
}

/* ------------------------------------------------------------------ headers and descriptors */

static void a_transfer_in_text_mode_is_found(void **state)
{
    (void)state;
    struct dr_image *image;
    make_disk();
    poke(D, 75, "\n", 1);
    fails(EINVAL, "text mode", dr_image_open(mem, D, NULL, 0, &image, &err));
}

/* A word of the embedded descriptor becomes another one of the same length. */
static void change_text(const char *from, const char *to)
{
    char text[2048];
    assert_int_equal(strlen(from), strlen(to));
    peek(D, 512, text, sizeof(text));
    text[sizeof(text) - 1] = '\0';
    const char *at = strstr(text, from);
    assert_non_null(at);
    poke(D, 512 + (uint64_t)(at - text), to, strlen(to));
}

static void a_type_that_the_disk_is_not_is_found(void **state)
{
    (void)state;
    make_disk();
    change_text("\"monolithicSparse\"", "\"streamOptimized\" ");
    finds_only(1, 0,
               "createType is \"streamOptimized\", but by its extents the disk is "
               "\"monolithicSparse\"");
    mends(1);
}

static void a_capacity_that_is_more_than_the_line_is_told(void **state)
{
    (void)state;
    make_disk();
    change_text("RW 16384", "RW 12288");
    finds_only(0, 0, "the header says 16384 sectors, the descriptor 12288");
    change_text("RW 12288", "RW 16500");
    struct dr_image *image;
    fails(EINVAL, "holds only 16384", dr_image_open(mem, D, NULL, 0, &image, &err));
}

static void a_stale_long_id_is_told_and_renewed(void **state)
{
    (void)state;
    make_disk();
    char now[20], old[20], text[2048];
    snprintf(now, sizeof(now), "%08x\"\n", cid_of(D));
    snprintf(old, sizeof(old), "%08x\"\n", ~cid_of(D));
    change_text(now, old);
    finds_only(0, 0, "it is stale");
    mends(0);
    peek(D, 512, text, sizeof(text));
    const char *id = strstr(text, "longContentID = \"");
    assert_non_null(id);
    assert_memory_equal(id + strlen("longContentID = \"") + 24, now, 10);
}

#define HEAD "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"

static void extents_that_share_bytes_are_found(void **state)
{
    (void)state;
    make_zeros("/d/f.raw", 8192);
    make_text(D, HEAD "createType=\"custom\"\nRW 8 FLAT \"f.raw\" 0\nRW 8 FLAT \"f.raw\" 4\n");
    finds_only(1, 0, "guest offsets 0 and 4096 share the bytes 2048 to 4095");
    ok(mem->ops->unlink(mem, D, &err));
    make_text(D,
              HEAD "createType=\"custom\"\nRDONLY 8 FLAT \"f.raw\" 0\nRDONLY 8 FLAT \"f.raw\" 4\n");
    finds(D, 0, 0, "");
    assert_string_equal(lines, "");
}

static void a_type_of_flat_disks_that_is_only_another_word_is_told(void **state)
{
    (void)state;
    make_zeros("/d/f.raw", 8192);
    make_text(D, HEAD "createType=\"vmfs\"\nRW 8 FLAT \"f.raw\" 0\n");
    finds_only(0, 0, "by its extents the disk is \"monolithicFlat\"");
    ok(mem->ops->unlink(mem, D, &err));
    make_text(D, HEAD "createType=\"twoGbMaxExtentFlat\"\nRW 8 VMFS \"f.raw\"\n");
    finds_only(0, 0, "by its extents the disk is \"vmfs\"");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(an_entry_in_the_metadata_is_found),
        T(neighbours_are_told_in_one_line),
        T(ranges_end_with_the_disk),
        T(an_entry_of_1_without_zeroed_grains_is_found),
        T(two_entries_for_one_grain_are_found),
        T(three_entries_for_one_grain_are_two_errors),
        T(a_grain_that_is_not_aligned_is_told),
        T(an_entry_far_behind_the_end_is_no_truncation),
        T(a_file_that_was_cut_off_is_one_line),
        T(a_table_without_its_entries_gets_them_from_the_copy),
        T(an_unclean_table_keeps_its_holes),
        T(a_table_of_rubbish_is_mended_from_its_copy),
        T(a_copy_of_rubbish_follows),
        T(an_unclean_mark_alone_is_told),
        T(a_directory_entry_that_cannot_be_is_found),
        T(a_directory_that_is_gone_is_one_line),
        T(directories_that_are_both_gone_are_led_back_to_their_tables),
        T(directories_that_were_led_back_are_used_at_once),
        T(directories_that_are_both_gone_stay_where_the_tables_differ),
        T(a_transfer_in_text_mode_is_found),
        T(a_type_that_the_disk_is_not_is_found),
        T(a_capacity_that_is_more_than_the_line_is_told),
        T(a_stale_long_id_is_told_and_renewed),
        T(extents_that_share_bytes_are_found),
        T(a_type_of_flat_disks_that_is_only_another_word_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
