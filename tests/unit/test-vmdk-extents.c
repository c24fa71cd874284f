/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Extents of all kinds: each byte at its address, whatever can or cannot be read around it. */
#include "test-vmdk.h"

#define HEAD "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"

static void make_flat(const char *path, size_t len, unsigned seed)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    struct dr_file *f;
    fill(buf, len, seed);
    ok(dr_file_open(mem, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, buf, 0, len, &err));
    dr_file_unref(f);
}

static void extents_of_any_kind_keep_their_addresses(void **state)
{
    (void)state;
    static const char *const middles[] = {
        "RW 8 ZERO\n",
        "RDONLY 8 ZERO\n",
        "NOACCESS 8 ZERO\n",
        "NOACCESS 8 FLAT \"nowhere.vmdk\" 0\n",
        "NOACCESS 8 SPARSE \"nowhere.vmdk\"\n",
        "NOACCESS 8 ZERO \"/dev/none\" 0\n",
        "RDONLY 8 FLAT \"m.raw\" 0 \"uuid\" \"device\"\n",
        "RW 4 ZERO\nNOACCESS 0 ZERO\nRW 4 ZERO\n",
        "RW 8 VMFSRAW \"m.raw\"\n",
    };
    make_flat("/d/a.raw", 4096, 1);
    make_flat("/d/m.raw", 4096, 2);
    make_flat("/d/z.raw", 8192, 3);
    for (size_t i = 0; i < sizeof(middles) / sizeof(middles[0]); i++) {
        char text[512];
        snprintf(text, sizeof(text),
                 HEAD "createType=\"custom\"\nRW 8 FLAT \"a.raw\" 0\n%sRW 8 FLAT \"z.raw\" 8\n",
                 middles[i]);
        make_text("/d/x.vmdk", text);
        struct dr_disk *disk = opened("/d/x.vmdk", 0);
        assert_int_equal(dr_size(disk), 3 * 4096);
        uint8_t buf[4096], want[8192];
        fill(want, sizeof(want), 3);
        ok(dr_pread(disk, buf, 8192, sizeof(buf), &err));
        assert_memory_equal(buf, want + 4096, sizeof(buf));
        reads(disk, 0, 4096, 1);
        if (strstr(middles[i], "m.raw"))
            reads(disk, 4096, 4096, 2);
        else if (strstr(middles[i], "nowhere"))
            fails(EIO, "NOACCESS", dr_pread(disk, buf, 4096, 512, &err));
        else
            reads_zero(disk, 4096, 4096);
        ok(dr_close(disk, &err));
        finds("/d/x.vmdk", 0, 0, "");
        ok(mem->ops->unlink(mem, "/d/x.vmdk", &err));
    }
}

static void only_extents_that_may_be_written_are_written(void **state)
{
    (void)state;
    make_flat("/d/a.raw", 4096, 1);
    make_flat("/d/b.raw", 4096, 2);
    make_text("/d/x.vmdk", HEAD "RW 8 FLAT \"a.raw\" 0\nRDONLY 8 FLAT \"b.raw\" 0\nRW 8 ZERO\n"
                                "NOACCESS 8 FLAT \"c.raw\" 0\n");
    struct dr_disk *disk = opened("/d/x.vmdk", DR_OPEN_RDWR);
    for (uint64_t off = 4096; off < 16384; off += 4096)
        fails(EROFS, "cannot be written", dr_pwrite(disk, "x", off, 1, 0, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(cid_of("/d/x.vmdk"), 0x12345678); /* nothing changed */
    disk = opened("/d/x.vmdk", DR_OPEN_RDWR);
    write_at(disk, 0, 512, 9);
    reads(disk, 4096, 4096, 2);
    ok(dr_close(disk, &err));
}

static void kinds_that_are_no_files_are_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *line, *why;
    } cases[] = {
        {"RW 8 VMFSRDM \"lun-rdm.vmdk\"\n", "maps a device"},
        {"RW 8 VSANSPARSE \"x.vmdk\"\n", "vSAN"},
        {"RW 8 SOMETHING \"x.vmdk\"\n", "SOMETHING (x.vmdk)"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[512];
        struct dr_disk *disk;
        snprintf(text, sizeof(text), HEAD "%s", cases[i].line);
        make_text("/d/x.vmdk", text);
        fails(ENOTSUP, cases[i].why, open_in(mem, "/d/x.vmdk", 0, &disk));
        ok(mem->ops->unlink(mem, "/d/x.vmdk", &err));
    }
}

/* ------------------------------------------------------------------ what is missing */

static void cannot_read(struct dr_disk *disk, uint64_t off, size_t len)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    fails(EIO, "missing", dr_pread(disk, buf, off, len, &err));
}

static void a_short_flat_extent_opens_for_a_salvage_only(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_flat("/d/a.raw", 3000, 1);
    make_flat("/d/b.raw", 4096, 2);
    make_text("/d/x.vmdk", HEAD "RW 8 FLAT \"a.raw\" 0\nRW 8 FLAT \"b.raw\" 0\n"
                                "RW 8 VMFS \"b.raw\" 8\n");
    fails(
        EINVAL,
        "/d/a.raw: File truncated, expecting at least 4096 bytes: the descriptor wants 4096 at 0, "
        "the file ends at 3000",
        open_in(mem, "/d/x.vmdk", 0, &disk));
    fails(EINVAL, "--salvage", open_in(mem, "/d/x.vmdk", DR_OPEN_RDWR, &disk));
    fails(EINVAL, "only be read", open_in(mem, "/d/x.vmdk", DR_OPEN_RDWR | DR_OPEN_SALVAGE, &disk));
    disk = opened("/d/x.vmdk", DR_OPEN_SALVAGE);
    assert_int_equal(dr_size(disk), 3 * 4096);
    reads(disk, 0, 2560, 1); /* whole sectors */
    cannot_read(disk, 2560, 512);
    cannot_read(disk, 0, 4096);
    reads(disk, 4096, 4096, 2);
    cannot_read(disk, 8192, 4096); /* begins at the end of the file */
    ok(dr_close(disk, &err));
}

static void a_salvage_goes_on_without_an_extent_that_is_missing_or_damaged(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make_flat("/d/a.raw", 4096, 1);
    make_flat("/d/junk.vmdk", 4096, 2);
    make_text("/d/x.vmdk", HEAD "RW 8 FLAT \"a.raw\" 0\nRW 8 SPARSE \"gone.vmdk\"\n"
                                "RW 8 SPARSE \"junk.vmdk\"\nRW 8 FLAT \"a.raw\" 0\n");
    fails(ENOENT, "gone.vmdk", open_in(mem, "/d/x.vmdk", 0, &disk));
    disk = opened("/d/x.vmdk", DR_OPEN_SALVAGE);
    reads(disk, 0, 4096, 1);
    cannot_read(disk, 4096, 4096);
    cannot_read(disk, 8192, 4096);
    reads(disk, 12288, 4096, 1);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ the head of a file */

static void cut_to(const char *path, uint64_t size)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, size, &err));
    dr_file_unref(f);
}

static void a_cut_off_head_tells_how_many_bytes_there_must_be(void **state)
{
    (void)state;
    static const uint64_t cuts[] = {65536, 4096, 1000, 512, 511, 100, 4};
    struct dr_disk *disk;
    ok(create("/d/a.vmdk", 40960 * MIB, NULL));
    uint64_t whole = file_size("/d/a.vmdk");
    write_one("/d/a.vmdk", 0, MIB, 1, 0);
    for (size_t i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
        char why[128];
        cut_to("/d/a.vmdk", cuts[i]);
        snprintf(why, sizeof(why), "/d/a.vmdk: File truncated, expecting at least %llu bytes",
                 (unsigned long long)(cuts[i] < 512 ? 512 : whole));
        fails(EINVAL, why, open_in(mem, "/d/a.vmdk", 0, &disk));
        if (cuts[i] >= 512)
            assert_non_null(strstr(err.text, "42949672960 bytes (virtual size)"));
    }
}

/* All that says so far is in the head: the tables come before the grains. */
static void a_head_with_all_tables_opens_and_its_grains_cannot_be_read(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 40960 * MIB, NULL));
    uint64_t tables = file_size("/d/a.vmdk");
    write_one("/d/a.vmdk", 0, MIB, 1, 0);
    cut_to("/d/a.vmdk", tables);
    struct dr_disk *disk = opened("/d/a.vmdk", 0);
    uint8_t byte;
    assert_int_equal(dr_size(disk), 40960 * MIB);
    fails(EIO, "end of the file", dr_pread(disk, &byte, 0, 1, &err));
    reads_zero(disk, MIB, 4096);
    ok(dr_close(disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(extents_of_any_kind_keep_their_addresses),
        T(only_extents_that_may_be_written_are_written),
        T(kinds_that_are_no_files_are_refused_by_name),
        T(a_short_flat_extent_opens_for_a_salvage_only),
        T(a_salvage_goes_on_without_an_extent_that_is_missing_or_damaged),
        T(a_cut_off_head_tells_how_many_bytes_there_must_be),
        T(a_head_with_all_tables_opens_and_its_grains_cannot_be_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
