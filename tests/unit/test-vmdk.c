/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The VMDK driver through the core: in memory, and on disk against qemu-img. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"
#include "formats/vmdk/vmdk.h"

#define MIB   (UINT64_C(1) << 20)
#define TIB   (UINT64_C(1) << 40)
#define GRAIN 65536u

static struct dr_error err;
static struct dr_fs *mem;

static void ok_at(int r, int line)
{
    if (r < 0)
        fail_msg("line %d: %d %s", line, r, err.text);
}
#define ok(expression) (err = (struct dr_error)DR_ERROR_INIT, ok_at((expression), __LINE__))

/* expression fails with -code and the message has why in it */
#define fails(code, why, expression)                                   \
    do {                                                               \
        err = (struct dr_error)DR_ERROR_INIT;                          \
        int fails_r = (expression);                                    \
        if (fails_r != -(code) || !strstr(err.text, why))              \
            fail_msg("line %d: %d '%s'", __LINE__, fails_r, err.text); \
    } while (0)

static int set_up(void **state)
{
    (void)state;
    mem = dr_fs_memory_new();
    return mem ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    dr_fs_memory_free(mem);
    return 0;
}

/* ------------------------------------------------------------------ small helpers */

static int create_in(struct dr_fs *fs, const char *path, uint64_t size, const char *subformat,
                     const char *zeroed, const char *parent)
{
    struct dr_option options[] = {{"subformat", subformat}, {"zeroed_grain", zeroed}};
    struct dr_create_params p = {
        .size = size, .options = options, .n_options = zeroed ? 2 : 1, .backing_name = parent};
    if (parent) {
        CLEANUP_FREE char *where = dr_path_sibling(path, parent);
        int r = dr_image_open(fs, where, "vmdk", 0, &p.backing, &err);
        if (r < 0)
            return r;
    }
    int r = dr_format_vmdk.create(fs, path, &p, &err);
    dr_image_unref(p.backing, NULL);
    return r;
}

static int create(const char *path, uint64_t size, const char *parent)
{
    return create_in(mem, path, size, "monolithicSparse", NULL, parent);
}

static int open_in(struct dr_fs *fs, const char *path, unsigned flags, struct dr_disk **disk)
{
    struct dr_open_options o = {.flags = flags};
    return dr_open_fs(fs, path, &o, disk, &err);
}

static struct dr_disk *opened(const char *path, unsigned flags)
{
    struct dr_disk *disk = NULL;
    ok(open_in(mem, path, flags, &disk));
    return disk;
}

static struct dr_image *image_of(const char *path, unsigned flags)
{
    struct dr_image *image = NULL;
    ok(dr_image_open(mem, path, "vmdk", flags, &image, &err));
    return image;
}

static void fill(uint8_t *buf, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)(seed + i * 7 + i / 251);
}

static void write_at(struct dr_disk *disk, uint64_t off, size_t len, unsigned seed)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    fill(buf, len, seed);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static void reads(struct dr_disk *disk, uint64_t off, size_t len, unsigned seed)
{
    CLEANUP_FREE uint8_t *buf = malloc(len), *want = malloc(len);
    fill(want, len, seed);
    ok(dr_pread(disk, buf, off, len, &err));
    assert_memory_equal(buf, want, len);
}

static void reads_zero(struct dr_disk *disk, uint64_t off, size_t len)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, 1, len);
    ok(dr_pread(disk, buf, off, len, &err));
    assert_true(dr_is_zero(buf, len));
}

static void write_one(const char *path, uint64_t off, size_t len, unsigned seed, unsigned flags)
{
    struct dr_disk *disk = opened(path, DR_OPEN_RDWR | flags);
    write_at(disk, off, len, seed);
    ok(dr_close(disk, &err));
}

/* Bytes of a file in memory, outside of any image. */
static void peek(const char *path, uint64_t off, void *buf, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_NO_LOCK, &f, &err));
    ok(dr_file_pread(f, buf, off, len, &err));
    dr_file_unref(f);
}

static void poke(const char *path, uint64_t off, const void *buf, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, buf, off, len, &err));
    dr_file_unref(f);
}

static uint32_t peek32(const char *path, uint64_t off)
{
    uint8_t b[4];
    peek(path, off, b, 4);
    return get_le32(b);
}

static void poke32(const char *path, uint64_t off, uint32_t v)
{
    uint8_t b[4];
    put_le32(b, v);
    poke(path, off, b, 4);
}

static void make_text(const char *path, const char *text)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, text, 0, strlen(text), &err));
    dr_file_unref(f);
}

static void make_zeros(const char *path, uint64_t size)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_truncate(f, size, &err));
    dr_file_unref(f);
}

static uint64_t file_size(const char *path)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_NO_LOCK, &f, &err));
    uint64_t size = dr_file_size(f);
    dr_file_unref(f);
    return size;
}

static uint32_t cid_of(const char *path)
{
    struct dr_image *image = image_of(path, DR_OPEN_NO_BACKING);
    uint32_t id = vmdk_id(image);
    dr_image_unref(image, NULL);
    return id;
}

/* Layout of a monolithic image of up to 32 MiB. */
#define GT_AT  (0x1b * 512u)
#define RGT_AT (0x16 * 512u)
#define GD_AT  (0x1a * 512u)
#define RGD_AT (0x15 * 512u)

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
    fails(EACCES, "NOACCESS", dr_pread(disk, buf, 30 * 512, 4, &err));
    write_at(disk, 36 * 512, 51200, 4);
    reads(disk, 36 * 512, 51200, 4);
    ok(dr_pread(disk, buf, 136 * 512, 5, &err));
    assert_string_equal(buf, "fixed");
    fails(EROFS, "read-only", dr_pwrite(disk, buf, 136 * 512, 4, 0, &err));
    fails(EROFS, "ZERO", dr_pwrite(disk, buf, 0, 4, 0, &err));
    ok(dr_close(disk, &err));
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

/* ------------------------------------------------------------------ ids */

static void the_cid_changes_once_an_open_and_before_the_data(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    uint32_t first = cid_of("/d/a.vmdk");
    assert_false(vmdk_cid_is_reserved(first));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    assert_int_equal(vmdk_id(disk->chain->images[0]), first);
    write_at(disk, 0, 10, 1);
    uint32_t second = vmdk_id(disk->chain->images[0]);
    assert_int_not_equal(second, first);
    write_at(disk, 5 * GRAIN, 10, 1);
    assert_int_equal(vmdk_id(disk->chain->images[0]), second);
    ok(dr_close(disk, &err));
    assert_int_equal(cid_of("/d/a.vmdk"), second);
    write_one("/d/a.vmdk", 0, 10, 2, DR_OPEN_UNCHANGED);
    assert_int_equal(cid_of("/d/a.vmdk"), second);
    write_one("/d/a.vmdk", 0, 10, 2, 0);
    assert_int_not_equal(cid_of("/d/a.vmdk"), second);
}

static void an_open_without_writes_changes_no_byte(void **state)
{
    (void)state;
    uint8_t before[128 * 512], after[128 * 512];
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    peek("/d/a.vmdk", 0, before, sizeof(before));
    ok(dr_close(opened("/d/a.vmdk", DR_OPEN_RDWR), &err));
    peek("/d/a.vmdk", 0, after, sizeof(after));
    assert_memory_equal(before, after, sizeof(before));
}

static void the_unclean_mark_is_there_while_writing(void **state)
{
    (void)state;
    uint8_t mark;
    ok(create_in(mem, "/d/s.vmdk", 3000 * MIB, "twoGbMaxExtentSparse", NULL, NULL));
    struct dr_disk *disk = opened("/d/s.vmdk", DR_OPEN_RDWR);
    write_at(disk, 0, 10, 1);
    peek("/d/s-s001.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 1);
    peek("/d/s-s002.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 0);
    write_at(disk, 2500 * MIB, 10, 1);
    peek("/d/s-s002.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 1);
    ok(dr_close(disk, &err));
    for (int i = 1; i <= 2; i++) {
        peek(i == 1 ? "/d/s-s001.vmdk" : "/d/s-s002.vmdk", 72, &mark, 1);
        assert_int_equal(mark, 0);
    }
}

static void a_changed_parent_turns_its_children_away(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    uint32_t old = cid_of("/d/base.vmdk");
    ok(dr_close(opened("/d/child.vmdk", 0), &err));
    write_one("/d/base.vmdk", 0, 10, 1, 0);
    struct dr_disk *disk;
    char a[9], b[9];
    snprintf(a, sizeof(a), "%08x", old);
    snprintf(b, sizeof(b), "%08x", cid_of("/d/base.vmdk"));
    fails(ESTALE, a, open_in(mem, "/d/child.vmdk", 0, &disk));
    assert_non_null(strstr(err.text, b));
    assert_non_null(strstr(err.text, "/d/base.vmdk"));
    assert_non_null(strstr(err.text, "rebase -u"));
    ok(dr_close(opened("/d/child.vmdk", DR_OPEN_NO_CHECK_ID), &err));
}

static void an_interrupted_commit_opens(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 1000, 1, 0);
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    struct dr_image *base = image_of("/d/base.vmdk", DR_OPEN_RDWR);
    struct dr_image *child = image_of("/d/child.vmdk", 0);
    uint32_t id = vmdk_commit_id(base, child);
    ok(vmdk_set_id(base, id, &err));
    dr_image_unref(base, NULL);
    dr_image_unref(child, NULL);
    assert_int_equal(cid_of("/d/base.vmdk"), id);
    struct dr_disk *disk = opened("/d/child.vmdk", 0);
    reads(disk, 0, 1000, 1);
    ok(dr_close(disk, &err));
    child = image_of("/d/child.vmdk", DR_OPEN_RDWR);
    ok(vmdk_set_parent_id(child, id, &err));
    dr_image_unref(child, NULL);
    ok(dr_close(opened("/d/child.vmdk", 0), &err));
}

static void tracking_and_long_ids_follow_the_cid(void **state)
{
    (void)state;
    make_zeros("/d/x-flat.vmdk", 64 * 512);
    make_text("/d/x.vmdk", "# Disk DescriptorFile\nversion=3\nCID=12345678\nparentCID=ffffffff\n"
                           "createType=\"vmfs\"\nRW 64 VMFS \"x-flat.vmdk\"\n"
                           "changeTrackPath=\"x-ctk.vmdk\"\n"
                           "ddb.longContentID = \"0123456789abcdef0123456712345678\"\n");
    uint64_t size = file_size("/d/x.vmdk");
    write_one("/d/x.vmdk", 0, 10, 1, 0);
    assert_int_equal(file_size("/d/x.vmdk"), size);
    struct dr_image *image = image_of("/d/x.vmdk", 0);
    const struct vmdk_desc *d = &vmdk_of(image)->desc;
    char low[9];
    assert_null(vmdk_desc_find(d, "changeTrackPath"));
    assert_int_equal(d->text[vmdk_desc_find(d, "version")->value], '1');
    CLEANUP_FREE char *id = vmdk_desc_get(d, "ddb.longContentID");
    snprintf(low, sizeof(low), "%08x", vmdk_id(image));
    assert_string_equal(id + 24, low);
    dr_image_unref(image, NULL);
}

/* ------------------------------------------------------------------ parents */

static void hints_of_other_worlds_are_resolved(void **state)
{
    (void)state;
    static const char *const hints[] = {"C:\\\\VMs\\\\base.vmdk", "/vmfs/volumes/1/vm/base.vmdk",
                                        "..\\d\\base.vmdk", "/elsewhere/d/base.vmdk"};
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 100, 3, 0);
    for (size_t i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/d/c%zu.vmdk", i);
        ok(create(path, 1 * MIB, "base.vmdk"));
        struct dr_image *image = image_of(path, DR_OPEN_RDWR);
        struct vmdk_desc d;
        ok(vmdk_desc_copy(image, &d, &err));
        ok(vmdk_desc_set(&d, "parentFileNameHint", hints[i], true, NULL, &err));
        ok(vmdk_store(image, &d, 0, &err));
        dr_image_unref(image, NULL);
        struct dr_disk *disk = opened(path, 0);
        reads(disk, 0, 100, 3);
        ok(dr_close(disk, &err));
    }
}

static void set_backing(const char *path, const char *parent, const char *name, unsigned flags)
{
    struct dr_image *p = parent ? image_of(parent, 0) : NULL;
    struct dr_image *image = image_of(path, DR_OPEN_RDWR);
    ok(vmdk_set_backing(image, p, name, name ? "vmdk" : NULL, flags, &err));
    dr_image_unref(image, NULL);
    dr_image_unref(p, NULL);
}

static void backing_is(const char *path, const char *name, uint32_t id)
{
    struct dr_image *image = image_of(path, DR_OPEN_NO_BACKING);
    if (name)
        assert_string_equal(image->backing_name, name);
    else
        assert_null(image->backing_name);
    assert_int_equal(vmdk_parent_id(image), id);
    dr_image_unref(image, NULL);
}

static char long_name[700];

static void another_parent_is_recorded(void **state)
{
    (void)state;
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/b.vmdk", 1 * MIB, NULL));
    for (int split = 0; split < 2; split++) {
        const char *child = split ? "/d/split.vmdk" : "/d/child.vmdk";
        ok(create_in(mem, child, 1 * MIB, split ? "twoGbMaxExtentSparse" : "monolithicSparse", NULL,
                     "a.vmdk"));
        backing_is(child, "a.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, "/d/b.vmdk", "b.vmdk", DR_TRY);
        backing_is(child, "a.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, "/d/b.vmdk", "b.vmdk", 0);
        backing_is(child, "b.vmdk", cid_of("/d/b.vmdk"));
        set_backing(child, "/d/a.vmdk", long_name, 0); /* needs more than one sector */
        backing_is(child, long_name, cid_of("/d/a.vmdk"));
        set_backing(child, NULL, "gone.vmdk", 0); /* unseen: the id stays */
        backing_is(child, "gone.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, NULL, NULL, 0);
        backing_is(child, NULL, VMDK_NO_PARENT);
        ok(dr_close(opened(child, 0), &err));
    }
    char end[512];
    peek("/d/child.vmdk", 11 * 512, end, sizeof(end));
    assert_true(dr_is_zero(end, sizeof(end))); /* no redo copy is left */
}

static void impossible_parents_are_refused_before_anything(void **state)
{
    (void)state;
    static char name[5000];
    memset(name, 'n', sizeof(name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    ok(create_in(mem, "/d/flat.vmdk", 1 * MIB, "monolithicFlat", NULL, NULL));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    fails(EINVAL, "quotes", vmdk_set_backing(image, NULL, "a\"b", NULL, DR_TRY, &err));
    fails(EINVAL, "line ends", vmdk_set_backing(image, NULL, "a\nb", NULL, DR_TRY, &err));
    fails(EINVAL, "must be a VMDK", vmdk_set_backing(image, NULL, "x", "raw", DR_TRY, &err));
    fails(ENAMETOOLONG, "bytes", vmdk_set_backing(image, NULL, name, NULL, DR_TRY, &err));
    dr_image_unref(image, NULL);
    image = image_of("/d/flat.vmdk", DR_OPEN_RDWR);
    fails(EINVAL, "only sparse", vmdk_set_backing(image, NULL, "a.vmdk", NULL, DR_TRY, &err));
    dr_image_unref(image, NULL);
    backing_is("/d/c.vmdk", "a.vmdk", cid_of("/d/a.vmdk"));
}

/* The states of a rewrite that goes through the redo copy, as a crash leaves them. */
static void every_state_of_a_rewrite_opens(void **state)
{
    (void)state;
    uint8_t old[20 * 512], fresh[20 * 512], block[10 * 512] = {0};
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    peek("/d/c.vmdk", 512, old, sizeof(old));
    set_backing("/d/c.vmdk", "/d/a.vmdk", long_name, 0);
    peek("/d/c.vmdk", 512, fresh, sizeof(fresh));
    size_t len = strlen((char *)fresh);
    memcpy(block, "\0drover redo 1\0", 15);
    put_le64(block + 16, len);
    put_le64(block + 24, XXH3_64bits(fresh, len));
    memcpy(block + 32, fresh, len);
    uint32_t id = cid_of("/d/a.vmdk");
    for (size_t half = 0; half <= 1536; half += 512) {
        /* the copy is complete, the text is new in its first sectors */
        poke("/d/c.vmdk", 512, old, sizeof(old));
        poke("/d/c.vmdk", 512 + 5120, block, sizeof(block));
        poke("/d/c.vmdk", 512, fresh, half);
        backing_is("/d/c.vmdk", long_name, id); /* read-only: nothing is written */
        uint8_t now[512];
        peek("/d/c.vmdk", 512 + 5120, now, sizeof(now));
        assert_memory_equal(now, block, sizeof(now));
        dr_image_unref(image_of("/d/c.vmdk", DR_OPEN_RDWR), NULL);
        uint8_t all[20 * 512];
        peek("/d/c.vmdk", 512, all, sizeof(all));
        assert_memory_equal(all, fresh, sizeof(all));
    }
    for (size_t torn = 512; torn < 1536; torn += 512) { /* the copy is not complete */
        poke("/d/c.vmdk", 512, old, sizeof(old));
        poke("/d/c.vmdk", 512 + 5120, block, torn);
        backing_is("/d/c.vmdk", "a.vmdk", id);
    }
}

static void a_full_descriptor_is_refused(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    struct vmdk_desc d;
    static char comment[5200];
    memset(comment, 'x', sizeof(comment) - 1);
    ok(vmdk_desc_copy(image, &d, &err));
    ok(vmdk_desc_set(&d, "ddb.comment", comment, true, NULL, &err));
    fails(ENOSPC, "no room", vmdk_store(image, &d, VMDK_STORE_TRY, &err));
    vmdk_desc_free(&d);
    dr_image_unref(image, NULL);
}

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
    refused(DESC "RW 1 VMFSSPARSE \"x-delta.vmdk\"\n", ENOTSUP, "x-delta.vmdk");
    refused(DESC "RW 1 SESPARSE \"x-sesparse.vmdk\"\n", ENOTSUP, "not supported yet");
    refused(DESC "RW 2 FLAT \"f.raw\" 0\n", EINVAL, "ends at 512");
    refused(DESC "RW 1 FLAT \"f.raw\" 1\n", EINVAL, "ends at 512");
    refused(DESC "RW 200 SPARSE \"p-s001.vmdk\"\n", EINVAL, "holds only 100");
    refused(DESC "RW 100 SPARSE \"p-s001.vmdk\"\nRW 100 SPARSE \"p-s001.vmdk\"\n", EINVAL, "two");
    refused(DESC, EINVAL, "no extent");
    refused("version=1\nRW 1 ZERO\n", EINVAL, "CID");
    refused(DESC "parentCID=11111111\nRW 1 ZERO\n", EINVAL, "parentFileNameHint");
    refused(DESC "RW 18014398509481984 ZERO\nRW 1 ZERO\n", EINVAL, "sectors");
    refused(DESC "RW 1 ZERO\nddb.uuid.parent=\"0a000000-0000-0000-0000-000000000001\"\n", ENOTSUP,
            "VirtualBox");
    refused("kdmv", EINVAL, "unfinished");
    refused("COWD", ENOTSUP, "COWD");
    struct dr_image *image;
    fails(EINVAL, "split disk", dr_image_open(mem, "/d/p-s001.vmdk", NULL, 0, &image, &err));
}

static void create_refuses_and_leaves_nothing(void **state)
{
    (void)state;
    struct dr_option odd = {"subformat", "odd"}, unknown = {"color", "red"};
    struct dr_option both[] = {{"compat6", "on"}, {"hwversion", "9"}};
    struct dr_create_params p = {.size = MIB, .options = &odd, .n_options = 1};
    fails(EINVAL, "odd", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
    p.options = &unknown;
    fails(EINVAL, "color", dr_format_vmdk.create(mem, "/d/x.vmdk", &p, &err));
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

static char lines[4096];

static void note(void *user, const char *line)
{
    (void)user;
    size_t used = strlen(lines);
    snprintf(lines + used, sizeof(lines) - used, "%s\n", line);
}

static struct dr_check_result checked(const char *path, unsigned fix)
{
    struct dr_check_result result = {.report = note};
    lines[0] = '\0';
    struct dr_image *image = image_of(path, fix ? DR_OPEN_RDWR : 0);
    ok(vmdk_check(image, fix, &result, &err));
    ok(dr_image_unref(image, &err));
    return result;
}

static void finds(const char *path, uint64_t corruptions, uint64_t leaks, const char *why)
{
    struct dr_check_result r = checked(path, 0);
    if (r.corruptions != corruptions || r.leaks != leaks || !strstr(lines, why))
        fail_msg("%llu corruptions, %llu leaks: %s", (unsigned long long)r.corruptions,
                 (unsigned long long)r.leaks, lines);
}

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
    finds("/d/a.vmdk", 1, 3, "primary");
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
    } cases[] = {
        {1, 1, "zeroed"}, {5, 1, "elsewhere"}, {0xfffffff0, 1, "elsewhere"}, {0, 1, "nothing"}};
    for (size_t i = 0; i < 4; i++) {
        poke32("/d/a.vmdk", GT_AT + 8, cases[i].gte);
        poke32("/d/a.vmdk", RGT_AT + 8, cases[i].gte);
        finds("/d/a.vmdk", cases[i].gte ? 1 : 0, cases[i].leaks, cases[i].why);
    }
    poke32("/d/a.vmdk", GT_AT + 8, grain);
    poke32("/d/a.vmdk", RGT_AT + 8, grain);
    finds("/d/a.vmdk", 1, 1, "belongs to another");
    assert_int_equal(checked("/d/a.vmdk", DR_CHECK_FIX_LEAKS).leaks_fixed, 1);
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

int main(void)
{
#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        T(every_subformat_reads_back_what_was_written),
        T(split_disks_are_cut_at_2047_mib),
        T(tables_of_a_new_image_are_complete_and_equal),
        T(huge_empty_disks_are_small_and_mapped_at_once),
        T(mixed_extents_keep_their_places),
        T(zeroed_grains_mask_the_parent),
        T(zeros_without_the_flag_are_written),
        T(dropped_grains_are_used_again),
        T(trim_cuts_what_nothing_points_to),
        T(a_last_grain_may_be_cut_behind_the_disk),
        T(bad_entries_are_errors_not_data),
        T(a_missing_redundant_table_never_costs_the_header),
        T(the_cid_changes_once_an_open_and_before_the_data),
        T(an_open_without_writes_changes_no_byte),
        T(the_unclean_mark_is_there_while_writing),
        T(a_changed_parent_turns_its_children_away),
        T(an_interrupted_commit_opens),
        T(tracking_and_long_ids_follow_the_cid),
        T(hints_of_other_worlds_are_resolved),
        T(another_parent_is_recorded),
        T(impossible_parents_are_refused_before_anything),
        T(every_state_of_a_rewrite_opens),
        T(a_full_descriptor_is_refused),
        T(what_is_not_read_is_refused_by_name),
        T(create_refuses_and_leaves_nothing),
        T(recovery_copies_the_table_over_its_copy),
        T(check_finds_and_mends_tables),
        T(check_finds_what_it_cannot_mend),
        T(what_is_cancelled_does_not_leak),
        T(threads_share_grains),
        T(a_missing_table_can_be_mended_and_written),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
