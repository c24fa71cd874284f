/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VMDK that was not closed: each of its tables is compared with its copy, and only those that
 * differ as after a crash are written. */
#include "test-vmdk.h"

#define PATH        "/d/a.vmdk"
#define TABLES      3u
#define TABLE_BYTES (32 * MIB) /* of the disk that one table leads to */

static uint64_t directory(bool copy)
{
    return (uint64_t)peek32(PATH, copy ? 48 : 56) * 512;
}

static uint64_t table_at(unsigned i, bool copy)
{
    return (uint64_t)peek32(PATH, directory(copy) + i * 4) * 512;
}

static void mark_unclean(void)
{
    poke(PATH, 72, "\1", 1);
}

/* Each table leads to two grains. */
static void make_disk(void)
{
    ok(create(PATH, TABLES * TABLE_BYTES, NULL));
    for (unsigned i = 0; i < TABLES; i++)
        write_one(PATH, i * TABLE_BYTES, 2 * GRAIN, i + 1, 0);
}

static void disk_is_whole(void)
{
    struct dr_disk *disk = opened(PATH, 0);
    for (unsigned i = 0; i < TABLES; i++)
        reads(disk, i * TABLE_BYTES, 2 * GRAIN, i + 1);
    ok(dr_close(disk, &err));
}

static void any_table_whose_copy_is_behind_is_copied_over_it(void **state)
{
    (void)state;
    make_disk();
    for (unsigned i = 0; i < TABLES; i++) {
        poke32(PATH, table_at(i, true) + 4, 0);
        mark_unclean();
        ok(dr_close(opened(PATH, DR_OPEN_RDWR), &err));
        for (unsigned k = 0; k < TABLES; k++)
            for (unsigned g = 0; g < 2; g++)
                assert_int_equal(peek32(PATH, table_at(k, true) + 4 * g),
                                 peek32(PATH, table_at(k, false) + 4 * g));
        disk_is_whole();
    }
}

static void an_entry_that_only_one_directory_has_is_refused_by_its_number(void **state)
{
    (void)state;
    make_disk();
    for (unsigned i = 0; i < TABLES; i++)
        for (int copy = 0; copy < 2; copy++) {
            uint64_t at = directory(copy) + i * 4;
            uint32_t entry = peek32(PATH, at);
            char words[64];
            struct dr_disk *disk;
            snprintf(words, sizeof(words), "grain directory entry %u ", i);
            poke32(PATH, at, 0);
            mark_unclean();
            fails(EIO, words, open_in(mem, PATH, DR_OPEN_RDWR, &disk));
            poke32(PATH, at, entry);
            ok(dr_close(opened(PATH, DR_OPEN_RDWR), &err));
            disk_is_whole();
        }
}

/* Other programs keep copies among the grains, where recovery writes nothing. */
static void a_copy_that_is_equal_may_stand_anywhere(void **state)
{
    (void)state;
    make_disk();
    for (unsigned i = 0; i < TABLES; i++) {
        uint8_t table[512 * 4];
        uint32_t place = (uint32_t)dr_div_up(file_size(PATH), 512);
        peek(PATH, table_at(i, false), table, sizeof(table));
        poke(PATH, place * UINT64_C(512), table, sizeof(table));
        poke32(PATH, directory(true) + i * 4, place);
        mark_unclean();
        ok(dr_close(opened(PATH, DR_OPEN_RDWR), &err));
        disk_is_whole();
    }
}

/* The copy is not written over when the table leads out of the file. */
static void a_table_that_is_not_sound_is_refused_and_its_copy_kept(void **state)
{
    (void)state;
    make_disk();
    for (unsigned i = 0; i < TABLES; i++) {
        struct dr_disk *disk;
        uint32_t grain = peek32(PATH, table_at(i, false));
        char words[64];
        snprintf(words, sizeof(words), "grain table %u ", i);
        poke32(PATH, table_at(i, false), 0xfffffff0);
        mark_unclean();
        fails(EIO, words, open_in(mem, PATH, DR_OPEN_RDWR, &disk));
        assert_int_equal(peek32(PATH, table_at(i, true)), grain);
        poke32(PATH, table_at(i, false), grain);
        ok(dr_close(opened(PATH, DR_OPEN_RDWR), &err));
        disk_is_whole();
    }
}

static void a_disk_that_was_recovered_is_a_clean_one_for_those_who_have_it_open(void **state)
{
    (void)state;
    struct dr_check_result result = {.report = note};
    make_disk();
    mark_unclean();
    struct dr_image *image = image_of(PATH, DR_OPEN_RDWR);
    lines[0] = '\0';
    ok(vmdk_check(image, 0, &result, &err));
    assert_string_equal(lines, "");
    ok(dr_image_unref(image, &err));
}

static void check_mends_an_entry_that_leads_nowhere_from_its_copy(void **state)
{
    static const uint32_t entries[] = {99999999, 0xffffffff};
    (void)state;
    make_disk();
    for (size_t e = 0; e < 2; e++)
        for (unsigned i = 0; i < TABLES; i++) {
            poke32(PATH, directory(false) + i * 4, entries[e]);
            assert_int_equal(checked(PATH, DR_CHECK_FIX_ALL).corruptions_fixed, 1);
            disk_is_whole();
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(any_table_whose_copy_is_behind_is_copied_over_it),
        T(an_entry_that_only_one_directory_has_is_refused_by_its_number),
        T(a_copy_that_is_equal_may_stand_anywhere),
        T(a_table_that_is_not_sound_is_refused_and_its_copy_kept),
        T(a_disk_that_was_recovered_is_a_clean_one_for_those_who_have_it_open),
        T(check_mends_an_entry_that_leads_nowhere_from_its_copy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
