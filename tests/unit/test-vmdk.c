/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The VMDK driver through the core: reading, writing, allocating. */
#include "test-vmdk.h"

#include "powerfs.h"

/* ------------------------------------------------------------------ reading and writing */

static const char *const subformats[] = {"monolithicSparse", "twoGbMaxExtentSparse",
                                         "monolithicFlat", "twoGbMaxExtentFlat", "vmfs"};

static void every_subformat_reads_back_what_was_written(void **state)
{
    (void)state;
    for (size_t i = 0; i < 5; i++) {
        char path[64];
        snprintf(path, sizeof(path), "/d/%s.vmdk", subformats[i]);
        ok(create_in(mem, path, 4 * MIB + 512, subformats[i], NULL, NULL));
        struct dr_disk *disk = opened(path, DR_OPEN_RDWR);
        assert_int_equal(dr_size(disk), 4 * MIB + 512);
        reads_zero(disk, 0, 4 * MIB + 512);
        write_at(disk, 1000, 200000, 1);
        write_at(disk, 4 * MIB - 100, 612, 2);
        ok(dr_close(disk, &err));
        disk = opened(path, 0);
        reads_zero(disk, 0, 1000);
        reads(disk, 1000, 200000, 1);
        reads_zero(disk, 201000, 4 * MIB - 201100);
        reads(disk, 4 * MIB - 100, 612, 2);
        ok(dr_close(disk, &err));
    }
}

static void split_disks_are_cut_at_2047_mib(void **state)
{
    (void)state;
    ok(create_in(mem, "/d/s.vmdk", 5000 * MIB, "twoGbMaxExtentSparse", NULL, NULL));
    struct dr_image *image = image_of("/d/s.vmdk", 0);
    const struct vmdk_state *s = vmdk_of(image);
    assert_int_equal(s->n_extents, 3);
    assert_int_equal(s->extents[0].len, 2047 * MIB);
    assert_int_equal(s->extents[2].len, 906 * MIB);
    assert_string_equal(s->desc.extents[1].name, "s-s002.vmdk");
    dr_image_unref(image, NULL);
    struct dr_disk *disk = opened("/d/s.vmdk", DR_OPEN_RDWR);
    write_at(disk, 2047 * MIB - 70000, 140000, 3); /* across the cut */
    ok(dr_close(disk, &err));
    disk = opened("/d/s.vmdk", 0);
    reads(disk, 2047 * MIB - 70000, 140000, 3);
    ok(dr_close(disk, &err));
}

static void tables_of_a_new_image_are_complete_and_equal(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 10 * MIB, NULL));
    assert_int_equal(peek32("/d/a.vmdk", RGD_AT), 0x16);
    assert_int_equal(peek32("/d/a.vmdk", GD_AT), 0x1b);
    assert_int_equal(file_size("/d/a.vmdk"), 128 * 512);
    write_one("/d/a.vmdk", 3 * GRAIN, 10, 1, 0);
    assert_int_equal(peek32("/d/a.vmdk", GT_AT + 12), 128);
    assert_int_equal(peek32("/d/a.vmdk", RGT_AT + 12), 128);
    assert_int_equal(file_size("/d/a.vmdk"), 256 * 512);
}

/* What the power leaves of a new image is all of it, or nothing that looks like one. */
static void look_at_new(struct dr_fs *disk)
{
    struct dr_check_result result = {.report = note};
    struct dr_image *image;
    err = (struct dr_error)DR_ERROR_INIT;
    lines[0] = '\0';
    if (dr_image_open(disk, "/d/n.vmdk", "vmdk", 0, &image, &err) < 0) {
        assert_null(strstr(err.text, "extent"));
        return;
    }
    assert_int_equal(image->size, 40 * MIB);
    ok(vmdk_check(image, 0, &result, &err));
    assert_string_equal(lines, "");
    ok(dr_image_unref(image, &err));
}

static void a_new_image_is_whole_or_none_after_any_cut(void **state)
{
    (void)state;
    for (size_t sub = 0; sub < 2; sub++) {
        struct powerfs *p = powerfs_new();
        ok(create_in(powerfs_fs(p), "/d/n.vmdk", 40 * MIB, subformats[sub], NULL, NULL));
        for (size_t i = 0; i <= powerfs_ops(p); i++)
            for (uint64_t seed = 0; seed < 32; seed++) {
                struct dr_fs *disk = powerfs_cut(p, i, POWERFS_RANDOM, seed);
                look_at_new(disk);
                dr_fs_memory_free(disk);
            }
        powerfs_free(p);
    }
}

static void huge_empty_disks_are_small_and_mapped_at_once(void **state)
{
    (void)state;
    ok(create("/d/huge.vmdk", 60 * TIB, NULL));
    struct dr_disk *disk = opened("/d/huge.vmdk", DR_OPEN_RDWR);
    write_at(disk, 33 * TIB + 5, 100, 9);
    ok(dr_flush(disk, &err));
    unsigned answers = 0;
    struct dr_extent_status st;
    for (uint64_t off = 0; off < dr_size(disk); off += st.len, answers++)
        ok(dr_block_status(disk, off, dr_size(disk) - off, &st, &err));
    assert_in_range(answers, 3, 12);
    reads(disk, 33 * TIB + 5, 100, 9);
    reads_zero(disk, 60 * TIB - GRAIN, GRAIN);
    ok(dr_close(disk, &err));
}

/* A walk over a chain asks the top for all that is left at each piece of the base: an answer that
 * looks through a whole empty disk every time would make that quadratic. */
static void a_question_does_not_look_through_a_huge_disk(void **state)
{
    (void)state;
    struct dr_extent ext;
    ok(create("/d/huge.vmdk", 8 * TIB, NULL));
    struct dr_disk *disk = opened("/d/huge.vmdk", DR_OPEN_RDWR);
    struct dr_chain *chain = disk->chain;
    ok(dr_image_map(chain->images[0], TIB, 7 * TIB, &ext, &err));
    assert_in_range(ext.len, 1024 * MIB, TIB);
    write_at(disk, 5 * TIB, 100, 9);
    ok(dr_chain_drop(chain, 0, 0, 8 * TIB, &err)); /* as many steps as units would take very long */
    reads_zero(disk, 5 * TIB, GRAIN);
    ok(dr_close(disk, &err));
}

static void mixed_extents_keep_their_places(void **state)
{
    (void)state;
    make_zeros("/d/f.raw", 64 * 512);
    poke("/d/f.raw", 10 * 512, "here", 4);
    poke("/d/f.raw", 40 * 512, "fixed", 5);
    ok(create_in(mem, "/d/p.vmdk", 100 * 512, "twoGbMaxExtentSparse", NULL, NULL));
    make_text("/d/mix.vmdk", "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
                             "createType=\"custom\"\nRW 7 ZERO\nNOACCESS 0 ZERO \n"
                             "RW 20 FLAT \"f.raw\" 10\nNOACCESS 9 FLAT \"gone.raw\" 0\n"
                             "RW 100 SPARSE \"p-s001.vmdk\"\nRDONLY 5 FLAT \"f.raw\" 40\n");
    struct dr_disk *disk = opened("/d/mix.vmdk", DR_OPEN_RDWR);
    char buf[8] = "";
    assert_int_equal(dr_size(disk), 141 * 512);
    reads_zero(disk, 0, 7 * 512);
    ok(dr_pread(disk, buf, 7 * 512, 4, &err));
    assert_string_equal(buf, "here");
    fails(EIO, "NOACCESS", dr_pread(disk, buf, 30 * 512, 4, &err));
    write_at(disk, 36 * 512, 51200, 4);
    reads(disk, 36 * 512, 51200, 4);
    ok(dr_pread(disk, buf, 136 * 512, 5, &err));
    assert_string_equal(buf, "fixed");
    fails(EROFS, "read-only", dr_pwrite(disk, buf, 136 * 512, 4, 0, &err));
    fails(EROFS, "ZERO", dr_pwrite(disk, buf, 0, 4, 0, &err));
    ok(dr_close(disk, &err));
}

/* A write to one would change the other. */
static void extents_that_share_bytes_are_only_read(void **state)
{
    (void)state;
#define SHARED(extents)                                                                 \
    mem->ops->unlink(mem, "/d/o.vmdk", NULL);                                           \
    make_text("/d/o.vmdk", "# Disk DescriptorFile\nversion=1\nCID=12345678\n" extents); \
    ok(dr_close(opened("/d/o.vmdk", 0), &err))
    struct dr_disk *disk;
    make_zeros("/d/f.raw", 64 * 512);
    SHARED("RW 10 FLAT \"f.raw\" 30\nRW 10 FLAT \"f.raw\" 20\nRW 10 FLAT \"f.raw\" 29\n");
    fails(EROFS, "share", open_in(mem, "/d/o.vmdk", DR_OPEN_RDWR, &disk));
    SHARED("RDONLY 64 FLAT \"f.raw\" 0\nRDONLY 4 FLAT \"f.raw\" 8\nRW 1 FLAT \"f.raw\" 63\n");
    fails(EROFS, "share", open_in(mem, "/d/o.vmdk", DR_OPEN_RDWR, &disk));
    SHARED("RW 10 FLAT \"f.raw\" 0\nRDONLY 5 FLAT \"f.raw\" 9\n");
    fails(EROFS, "share", open_in(mem, "/d/o.vmdk", DR_OPEN_RDWR, &disk));
    SHARED("RW 10 FLAT \"f.raw\" 20\nRW 20 FLAT \"f.raw\" 0\nRW 34 FLAT \"f.raw\" 30\n");
    ok(dr_close(opened("/d/o.vmdk", DR_OPEN_RDWR), &err));
#undef SHARED
}

static void zeroed_grains_mask_the_parent(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 1 * MIB, 5, 0);
    ok(create_in(mem, "/d/child.vmdk", 1 * MIB, "monolithicSparse", "on", "base.vmdk"));
    uint64_t before = file_size("/d/child.vmdk");
    struct dr_disk *disk = opened("/d/child.vmdk", DR_OPEN_RDWR);
    ok(dr_zero(disk, GRAIN, 2 * GRAIN, DR_MAY_UNMAP, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(file_size("/d/child.vmdk"), before);
    assert_int_equal(peek32("/d/child.vmdk", GT_AT + 4), 1);
    disk = opened("/d/child.vmdk", DR_OPEN_RDWR);
    reads_zero(disk, GRAIN, 2 * GRAIN);
    reads(disk, 0, GRAIN, 5);
    write_at(disk, GRAIN + 100, 50, 6); /* the rest of the grain stays zero */
    reads_zero(disk, GRAIN, 100);
    reads(disk, GRAIN + 100, 50, 6);
    reads_zero(disk, GRAIN + 150, GRAIN - 150);
    ok(dr_close(disk, &err));
}

static void zeros_without_the_flag_are_written(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 1 * MIB, 5, 0);
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    struct dr_disk *disk = opened("/d/child.vmdk", DR_OPEN_RDWR);
    ok(dr_zero(disk, GRAIN, GRAIN, DR_MAY_UNMAP, &err));
    reads_zero(disk, GRAIN, GRAIN);
    reads(disk, 0, GRAIN, 5);
    ok(dr_close(disk, &err));
    assert_in_range(peek32("/d/child.vmdk", GT_AT + 4), 128, 1000);
}

static void dropped_grains_are_used_again(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    write_at(disk, 0, 4 * GRAIN, 1);
    ok(dr_flush(disk, &err));
    uint64_t size = dr_file_size(disk->chain->images[0]->files[0]);
    ok(dr_chain_drop(disk->chain, 0, GRAIN, 2 * GRAIN, &err));
    ok(dr_flush(disk, &err));
    reads_zero(disk, GRAIN, 2 * GRAIN);
    write_at(disk, 8 * GRAIN, 2 * GRAIN, 2);
    reads(disk, 8 * GRAIN, 2 * GRAIN, 2);
    assert_int_equal(dr_file_size(disk->chain->images[0]->files[0]), size);
    ok(dr_close(disk, &err));
}

static void trim_cuts_each_extent(void **state)
{
    (void)state;
    const char *const extents[] = {"/d/a-s001.vmdk", "/d/a-s002.vmdk", "/d/a-s003.vmdk"};
    for (unsigned which = 0; which < 8; which++) { /* one bit for each that is longer */
        uint64_t size[3];
        ok(create_in(mem, "/d/a.vmdk", 5000 * MIB, "twoGbMaxExtentSparse", NULL, NULL));
        for (unsigned i = 0; i < 3; i++) {
            size[i] = file_size(extents[i]);
            if (which >> i & 1)
                poke(extents[i], size[i] + 3 * GRAIN, "old", 3);
        }
        struct dr_image *image = image_of("/d/a.vmdk", DR_OPEN_RDWR);
        ok(vmdk_trim(image, &err));
        ok(dr_image_unref(image, &err));
        for (unsigned i = 0; i < 3; i++) {
            assert_in_range(file_size(extents[i]), 1, dr_round_up(size[i], GRAIN));
            ok(mem->ops->unlink(mem, extents[i], &err));
        }
        ok(mem->ops->unlink(mem, "/d/a.vmdk", &err));
    }
}

static void trim_cuts_what_nothing_points_to(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    uint64_t empty = file_size("/d/a.vmdk");
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    struct dr_image *image = disk->chain->images[0];
    write_at(disk, 0, 1 * MIB, 1);
    ok(dr_flush(disk, &err));
    ok(dr_chain_drop(disk->chain, 0, 2 * GRAIN, 1 * MIB - 2 * GRAIN, &err));
    ok(dr_flush(disk, &err));
    ok(vmdk_trim(image, &err));
    assert_int_equal(dr_file_size(image->files[0]), empty + 2 * GRAIN);
    write_at(disk, 5 * GRAIN, GRAIN, 2);
    reads(disk, 5 * GRAIN, GRAIN, 2);
    ok(dr_chain_drop(disk->chain, 0, 0, 1 * MIB, &err));
    ok(dr_flush(disk, &err));
    ok(vmdk_trim(image, &err));
    assert_int_equal(dr_file_size(image->files[0]), empty);
    ok(dr_close(disk, &err));
}

static void a_last_grain_may_be_cut_behind_the_disk(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", GRAIN + 5 * 512, NULL));
    write_one("/d/a.vmdk", GRAIN, 5 * 512, 7, 0);
    struct dr_file *f;
    ok(dr_file_open(mem, "/d/a.vmdk", DR_FILE_RDWR, &f, &err));
    assert_int_equal(dr_file_size(f), 128 * 512 + GRAIN); /* the whole grain is there */
    ok(dr_file_truncate(f, 128 * 512 + 5 * 512, &err));
    dr_file_unref(f);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    reads(disk, GRAIN, 5 * 512, 7);
    ok(dr_close(disk, &err));
    ok(dr_file_open(mem, "/d/a.vmdk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, 128 * 512 + 4 * 512, &err));
    dr_file_unref(f);
    char buf[512];
    disk = opened("/d/a.vmdk", 0);
    fails(EIO, "/d/a.vmdk", dr_pread(disk, buf, GRAIN, 512, &err));
    ok(dr_close(disk, &err));
}

static void bad_entries_are_errors_not_data(void **state)
{
    (void)state;
    static const uint32_t bad[] = {1, 2, 127, 0xffffffff, 100000};
    char buf[16];
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    for (size_t i = 0; i < 5; i++) {
        poke32("/d/a.vmdk", GT_AT + 8, bad[i]);
        struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
        reads_zero(disk, 0, 2 * GRAIN);
        fails(EIO, "/d/a.vmdk", dr_pread(disk, buf, 2 * GRAIN, 16, &err));
        fails(EIO, "/d/a.vmdk", dr_pwrite(disk, buf, 2 * GRAIN, 16, 0, &err));
        ok(dr_close(disk, &err));
    }
    poke32("/d/a.vmdk", GD_AT, 5000000);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    fails(EIO, "directory entry 0", dr_pread(disk, buf, 0, 16, &err));
    ok(dr_close(disk, &err));
}

static void a_missing_redundant_table_never_costs_the_header(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    poke32("/d/a.vmdk", RGD_AT, 0);
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    fails(EIO, "check -r", dr_pwrite(disk, "x", 0, 1, 0, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(peek32("/d/a.vmdk", 0), 0x564d444b);
}

/* ------------------------------------------------------------------ threads */

#define THREADS 4
#define ROUNDS  60

struct writer {
    pthread_t thread;
    struct dr_disk *disk;
    unsigned index;
    int failed;
};

/* Every thread has its own 512-byte sectors of grains that all of them allocate. */
static void *write_sectors(void *user)
{
    struct writer *w = user;
    uint8_t buf[512];
    for (unsigned i = 0; i < ROUNDS && w->failed == 0; i++) {
        uint64_t grain = (i * 7) % 32, off = grain * GRAIN + w->index * 512 + (i / 32) * 4096;
        fill(buf, sizeof(buf), w->index * 100 + i);
        w->failed = dr_pwrite(w->disk, buf, off, sizeof(buf), 0, NULL);
        if (w->failed == 0 && i % 16 == 0)
            w->failed = dr_flush(w->disk, NULL);
        if (w->failed == 0)
            w->failed = dr_pread(w->disk, buf, off, sizeof(buf), NULL);
    }
    return NULL;
}

static void threads_share_grains(void **state)
{
    (void)state;
    struct writer writers[THREADS];
    ok(create("/d/base.vmdk", 4 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 2 * MIB, 3, 0);
    ok(create_in(mem, "/d/c.vmdk", 4 * MIB, "twoGbMaxExtentSparse", NULL, "base.vmdk"));
    struct dr_disk *disk = opened("/d/c.vmdk", DR_OPEN_RDWR);
    for (unsigned i = 0; i < THREADS; i++) {
        writers[i] = (struct writer){.disk = disk, .index = i};
        assert_int_equal(pthread_create(&writers[i].thread, NULL, write_sectors, &writers[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(writers[i].thread, NULL);
        assert_int_equal(writers[i].failed, 0);
    }
    ok(dr_close(disk, &err));
    finds("/d/c.vmdk", 0, 0, "");
    disk = opened("/d/c.vmdk", 0);
    for (unsigned t = 0; t < THREADS; t++)
        for (unsigned i = 0; i < ROUNDS; i++)
            reads(disk, (i * 7) % 32 * GRAIN + t * 512 + (i / 32) * 4096, 512, t * 100 + i);
    ok(dr_close(disk, &err));
}

/* The table reads 1, 1, 256, 0: looked at one byte off, the third entry says zeros, too. */
static void zeros_end_where_the_next_grain_has_data(void **state)
{
    (void)state;
    struct dr_option zeroed = {"zeroed_grain", "on"};
    struct dr_create_params p = {.size = MIB, .options = &zeroed, .n_options = 1};
    ok(dr_format_vmdk.create(mem, "/d/zero.vmdk", &p, &err));
    struct dr_disk *disk = opened("/d/zero.vmdk", DR_OPEN_RDWR);
    write_at(disk, 5 * GRAIN, GRAIN, 1);
    write_at(disk, 2 * GRAIN, GRAIN, 2);
    ok(dr_zero(disk, 0, 2 * GRAIN, DR_EXPLICIT, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(peek32("/d/zero.vmdk", GT_AT), 1);
    assert_int_equal(peek32("/d/zero.vmdk", GT_AT + 8), 256);
    disk = opened("/d/zero.vmdk", 0);
    reads_zero(disk, 0, 2 * GRAIN);
    reads(disk, 2 * GRAIN, GRAIN, 2);
    struct dr_extent ext;
    ok(dr_image_map(disk->chain->images[0], 0, MIB, &ext, &err));
    assert_int_equal(ext.kind, DR_ZERO);
    assert_int_equal(ext.len, 2 * GRAIN);
    ok(dr_close(disk, &err));
}

/* One extent, however many grains it has, up to what is otherwise. */
static void grains_that_stand_in_a_row_are_one_extent(void **state)
{
    (void)state;
    struct dr_extent ext;
    ok(create("/d/row.vmdk", 64 * MIB, NULL));
    struct dr_disk *disk = opened("/d/row.vmdk", DR_OPEN_RDWR);
    for (unsigned i = 0; i < 100; i++)
        if (i < 20 || i >= 30)
            write_at(disk, i * GRAIN, GRAIN, i);
    ok(dr_close(disk, &err));
    struct dr_image *image = image_of("/d/row.vmdk", 0);
    ok(dr_image_map(image, 0, 64 * MIB, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    assert_int_equal(ext.len, 20 * GRAIN);
    ok(dr_image_map(image, 20 * GRAIN, 64 * MIB - 20 * GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_HOLE);
    assert_int_equal(ext.len, 10 * GRAIN);
    ok(dr_image_map(image, 31 * GRAIN, 64 * MIB - 31 * GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    assert_int_equal(ext.len, 69 * GRAIN);
    ok(dr_image_unref(image, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(grains_that_stand_in_a_row_are_one_extent),
        T(zeros_end_where_the_next_grain_has_data),
        T(every_subformat_reads_back_what_was_written),
        T(split_disks_are_cut_at_2047_mib),
        T(tables_of_a_new_image_are_complete_and_equal),
        T(a_new_image_is_whole_or_none_after_any_cut),
        T(huge_empty_disks_are_small_and_mapped_at_once),
        T(a_question_does_not_look_through_a_huge_disk),
        T(mixed_extents_keep_their_places),
        T(extents_that_share_bytes_are_only_read),
        T(zeroed_grains_mask_the_parent),
        T(zeros_without_the_flag_are_written),
        T(dropped_grains_are_used_again),
        T(trim_cuts_each_extent),
        T(trim_cuts_what_nothing_points_to),
        T(a_last_grain_may_be_cut_behind_the_disk),
        T(bad_entries_are_errors_not_data),
        T(a_missing_redundant_table_never_costs_the_header),
        T(threads_share_grains),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
