/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the VMDK driver refuses, recovers, finds and mends. */
#include "test-vmdk.h"

/* ------------------------------------------------------------------ refusals */

static void refused(const char *text, int code, const char *why)
{
    struct dr_image *image;
    make_text("/d/r.vmdk", text);
    fails(code, why, dr_image_open(mem, "/d/r.vmdk", "vmdk", 0, &image, &err));
    ok(mem->ops->unlink(mem, "/d/r.vmdk", &err));
}

#define DESC "# Disk DescriptorFile\nversion=1\nCID=12345678\n"

static void what_is_not_read_is_refused_by_name(void **state)
{
    (void)state;
    make_zeros("/d/f.raw", 512);
    ok(create_in(mem, "/d/p.vmdk", 100 * 512, "twoGbMaxExtentSparse", NULL, NULL));
    refused(DESC "RW 1 VMFSSPARSE \"x-delta.vmdk\"\n", ENOENT, "x-delta.vmdk");
    refused(DESC "RW 1 SESPARSE \"x-sesparse.vmdk\"\n", ENOENT, "x-sesparse.vmdk");
    refused(DESC "RW 1 VSANSPARSE \"x\"\n", ENOTSUP, "object of a vSAN");
    refused(DESC "RW 1 NEWSPARSE \"x\"\n", ENOTSUP, "not supported yet");
    refused(DESC "RW 2 FLAT \"f.raw\" 0\n", EINVAL, "ends at 512");
    refused(DESC "RW 1 FLAT \"f.raw\" 1\n", EINVAL, "ends at 512");
    refused(DESC "RW 200 SPARSE \"p-s001.vmdk\"\n", EINVAL, "holds only 100");
    refused(DESC "RW 100 SPARSE \"p-s001.vmdk\"\nRW 100 SPARSE \"p-s001.vmdk\"\n", EINVAL, "two");
    refused(DESC, EINVAL, "no extent");
    refused("version=1\nRW 1 ZERO\n", EINVAL, "CID");
    refused(DESC "parentCID=11111111\nRW 1 ZERO\n", EINVAL, "parentFileNameHint");
    refused(DESC "RW 18014398509481984 ZERO\nRW 1 ZERO\n", EINVAL, "sectors");
    refused(DESC "RW 1 ZERO\nddb.uuid.parent=\"0a000000-0000-0000-0000-000000000001\"\n", ENOENT,
            "VirtualBox");
    refused("kdmv", EINVAL, "unfinished");
    refused("COWD", EINVAL, "File truncated, expecting at least 2048 bytes");
    struct dr_image *image;
    fails(EINVAL, "split disk", dr_image_open(mem, "/d/p-s001.vmdk", NULL, 0, &image, &err));
}

static void create_refuses_and_leaves_nothing(void **state)
{
    (void)state;
    struct dr_option odd = {"subformat", "odd"}, unknown = {"color", "red"};
    struct dr_option adapter = {"adapter_type", "odd"};
    struct dr_option both[] = {{"compat6", "on"}, {"hwversion", "9"}};
    struct dr_create_params p = {.size = MIB, .options = &odd, .n_options = 1};
    fails(EINVAL, "odd", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
    p.options = &unknown;
    fails(EINVAL, "color", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
    p.options = &adapter;
    fails(EINVAL, "adapter type: odd", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
    p.options = both;
    p.n_options = 2;
    fails(EINVAL, "compat6", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
    fails(EINVAL, "quotes", create("/d/x\"y.vmdk", MIB, NULL));
    ok(create("/d/base.vmdk", MIB, NULL));
    fails(EINVAL, "Flat", create_in(mem, "/d/x.vmdk", MIB, "monolithicFlat", NULL, "base.vmdk"));
    /* a piece that is in the way */
    make_text("/d/x-s002.vmdk", "mine");
    fails(EEXIST, "x-s002.vmdk",
          create_in(mem, "/d/x.vmdk", 3000 * MIB, "twoGbMaxExtentSparse", NULL, NULL));
    struct dr_file *f;
    assert_int_equal(dr_file_open(mem, "/d/x-s001.vmdk", 0, &f, NULL), -ENOENT);
    assert_int_equal(dr_file_open(mem, "/d/x.vmdk", 0, &f, NULL), -ENOENT);
    assert_int_equal(file_size("/d/x-s002.vmdk"), 4);
    /* the name itself is taken */
    fails(EEXIST, "base.vmdk", create("/d/base.vmdk", MIB, NULL));
    ok(dr_close(opened("/d/base.vmdk", 0), &err));
}

/* ------------------------------------------------------------------ recover, check */
static void make_checked(const char *path)
{
    ok(create(path, 1 * MIB, NULL));
    write_one(path, 0, 3 * GRAIN, 1, 0);
    finds(path, 0, 0, "");
    assert_string_equal(lines, "");
}

static void recovery_copies_the_table_over_its_copy(void **state)
{
    (void)state;
    make_checked("/d/a.vmdk");
    poke32("/d/a.vmdk", RGT_AT + 4, 0); /* as a crash between both leaves it */
    poke("/d/a.vmdk", 72, "\1", 1);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    reads(disk, 0, 3 * GRAIN, 1);
    ok(dr_close(disk, &err));
    assert_int_equal(peek32("/d/a.vmdk", RGT_AT + 4), 0); /* read-only: untouched */
    fails(EUCLEAN, "not closed",
          open_in(mem, "/d/a.vmdk", DR_OPEN_RDWR | DR_OPEN_NO_RECOVER, &disk));
    ok(dr_close(opened("/d/a.vmdk", DR_OPEN_RDWR), &err));
    assert_int_equal(peek32("/d/a.vmdk", RGT_AT + 4), peek32("/d/a.vmdk", GT_AT + 4));
    uint8_t mark;
    peek("/d/a.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 0);
    finds("/d/a.vmdk", 0, 0, "");
}

static void a_mended_directory_is_looked_up_anew(void **state)
{
    (void)state;
    struct dr_check_result result = {.report = note};
    struct dr_extent ext;
    make_checked("/d/a.vmdk");
    poke32("/d/a.vmdk", GD_AT, 99999999);
    struct dr_image *image = image_of("/d/a.vmdk", DR_OPEN_RDWR);
    assert_int_equal(dr_image_map(image, 0, GRAIN, &ext, &err), -EIO);
    ok(vmdk_check(image, DR_CHECK_FIX_ALL, &result, &err));
    ok(dr_image_map(image, 0, GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    ok(dr_image_unref(image, &err));
}

/* Its pages are as they were before the table was written anew. */
static void a_mended_table_is_read_anew(void **state)
{
    (void)state;
    struct dr_check_result result = {.report = note};
    struct dr_extent ext;
    uint8_t zeros[2048] = {0};
    ok(create("/d/a.vmdk", 40 * MIB, NULL));
    write_one("/d/a.vmdk", 0, GRAIN, 1, 0);
    write_one("/d/a.vmdk", 36 * MIB, GRAIN, 5, 0);
    struct dr_image *image = image_of("/d/a.vmdk", 0);
    uint64_t gd = vmdk_of(image)->extents[0].h.gd_off * 512;
    ok(dr_image_unref(image, &err));
    uint64_t second = peek32("/d/a.vmdk", gd + 4) * UINT64_C(512);
    poke("/d/a.vmdk", second, zeros, sizeof(zeros)); /* its copy is sound */
    poke32("/d/a.vmdk", gd + 4, 99999999);
    image = image_of("/d/a.vmdk", DR_OPEN_RDWR);
    ok(dr_image_map(image, 0, GRAIN, &ext, &err)); /* it stands in a page with the second */
    ok(vmdk_check(image, DR_CHECK_FIX_ALL, &result, &err));
    assert_int_equal(peek32("/d/a.vmdk", gd + 4) * UINT64_C(512), second);
    ok(dr_image_map(image, 36 * MIB, GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    ok(dr_image_unref(image, &err));
}

static void check_finds_and_mends_tables(void **state)
{
    (void)state;
    make_checked("/d/a.vmdk");
    uint32_t grain = peek32("/d/a.vmdk", GT_AT);
    poke32("/d/a.vmdk", RGT_AT, 0);
    finds("/d/a.vmdk", 1, 0, "differ");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    assert_int_equal(peek32("/d/a.vmdk", RGT_AT), grain);
    poke32("/d/a.vmdk", RGD_AT, 0);
    finds("/d/a.vmdk", 1, 0, "redundant");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    assert_int_equal(peek32("/d/a.vmdk", RGD_AT), 0x16);
    poke32("/d/a.vmdk", GD_AT, 99999999);
    finds("/d/a.vmdk", 1, 0, "primary");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    finds("/d/a.vmdk", 0, 0, "");
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    reads(disk, 0, 3 * GRAIN, 1);
    ok(dr_close(disk, &err));
}

static void check_finds_what_it_cannot_mend(void **state)
{
    (void)state;
    make_checked("/d/a.vmdk");
    uint32_t grain = peek32("/d/a.vmdk", GT_AT);
    static const struct {
        uint32_t gte;
        uint64_t leaks;
        const char *why;
    } cases[] = {{1, 0, "zeroed"}, {5, 0, "metadata"}, {0xfffffff0, 0, "ends"}, {0, 1, "nothing"}};
    for (size_t i = 0; i < 4; i++) {
        poke32("/d/a.vmdk", GT_AT + 8, cases[i].gte);
        poke32("/d/a.vmdk", RGT_AT + 8, cases[i].gte);
        finds("/d/a.vmdk", cases[i].gte ? 1 : 0, cases[i].leaks, cases[i].why);
    }
    poke32("/d/a.vmdk", GT_AT + 8, grain);
    poke32("/d/a.vmdk", RGT_AT + 8, grain);
    /* the grain without an entry is perhaps the one that the wrong entry should lead to */
    finds("/d/a.vmdk", 1, 0, "belongs to another");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_LEAKS).leaks_fixed, 0);
    finds("/d/a.vmdk", 1, 0, "belongs to another");
}

/* Ten grains are no whole bytes of a map of bits. */
static void the_last_grain_of_a_file_may_belong_to_two(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    write_one("/d/a.vmdk", 0, 9 * GRAIN, 1, 0);
    uint32_t last = peek32("/d/a.vmdk", GT_AT + 8 * 4);
    poke32("/d/a.vmdk", GT_AT, last);
    poke32("/d/a.vmdk", RGT_AT, last);
    finds("/d/a.vmdk", 1, 0, "belongs to another");
}

static void what_is_cancelled_does_not_leak(void **state)
{
    (void)state;
    struct dr_reservation first, second;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    struct dr_image *image = disk->chain->images[0];
    write_at(disk, 0, GRAIN, 1);
    pthread_mutex_lock(&image->lock);
    ok(vmdk_reserve(image, 3 * GRAIN, GRAIN, DR_WANT_DATA, 0, &first, &err));
    pthread_mutex_unlock(&image->lock);
    write_at(disk, 5 * GRAIN, GRAIN, 2);
    pthread_mutex_lock(&image->lock);
    ok(vmdk_reserve(image, 7 * GRAIN, GRAIN, DR_WANT_DATA, 0, &second, &err));
    pthread_mutex_unlock(&image->lock);
    assert_int_equal(second.host, first.host + 2 * GRAIN);
    ok(dr_file_pwrite(image->files[0], "junk", first.host, 4, &err)); /* half a write */
    ok(dr_file_pwrite(image->files[0], "junk", second.host, 4, &err));
    pthread_mutex_lock(&image->lock);
    vmdk_cancel(image, &second);
    vmdk_cancel(image, &first);
    pthread_mutex_unlock(&image->lock);
    reads_zero(disk, 3 * GRAIN, GRAIN);
    ok(dr_close(disk, &err));
    assert_int_equal(file_size("/d/a.vmdk"), second.host);
    finds("/d/a.vmdk", 0, 0, "");
    assert_string_equal(lines, "");
}

static void a_missing_table_can_be_mended_and_written(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 40 * MIB, NULL));
    poke32("/d/a.vmdk", GD_AT + 4 * 512 + 4, 0); /* two tables: the directory is further on */
    struct dr_image *image = image_of("/d/a.vmdk", 0);
    uint64_t gd = vmdk_of(image)->extents[0].h.gd_off * 512;
    dr_image_unref(image, NULL);
    poke32("/d/a.vmdk", gd + 4, 0);
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    reads_zero(disk, 36 * MIB, GRAIN);
    fails(EIO, "check -r", dr_pwrite(disk, "x", 36 * MIB, 1, 0, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(peek32("/d/a.vmdk", 0), 0x564d444b);
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    write_one("/d/a.vmdk", 36 * MIB, 1000, 5, 0);
    disk = opened("/d/a.vmdk", 0);
    reads(disk, 36 * MIB, 1000, 5);
    ok(dr_close(disk, &err));
    finds("/d/a.vmdk", 0, 0, "");
}

/* No redundant one says more, and what stands elsewhere in the file is no table. */
static void without_a_redundant_directory_a_missing_table_is_made_empty(void **state)
{
    (void)state;
    make_checked("/d/a.vmdk");
    poke32("/d/a.vmdk", 8, peek32("/d/a.vmdk", 8) & ~2u); /* the flag of the redundant directory */
    poke32("/d/a.vmdk", GD_AT, 0);
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_ALL).corruptions_fixed, 1);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    reads_zero(disk, 0, MIB);
    ok(dr_close(disk, &err));
    assert_int_equal(checked("/d/a.vmdk", 0).corruptions, 0);
}

static void tables_that_overlap_are_named(void **state)
{
    (void)state;
    make_checked("/d/a.vmdk");
    poke32("/d/a.vmdk", GD_AT, 200); /* behind the metadata a table can be anywhere */
    poke32("/d/a.vmdk", RGD_AT, 201);
    checked("/d/a.vmdk", 0);
    assert_non_null(strstr(lines, "two grain tables overlap at sector 201"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(what_is_not_read_is_refused_by_name),
        T(create_refuses_and_leaves_nothing),
        T(recovery_copies_the_table_over_its_copy),
        T(check_finds_and_mends_tables),
        T(a_mended_table_is_read_anew),
        T(a_mended_directory_is_looked_up_anew),
        T(check_finds_what_it_cannot_mend),
        T(the_last_grain_of_a_file_may_belong_to_two),
        T(what_is_cancelled_does_not_leak),
        T(a_missing_table_can_be_mended_and_written),
        T(without_a_redundant_directory_a_missing_table_is_made_empty),
        T(tables_that_overlap_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
