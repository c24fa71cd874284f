/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sparse extents of later ESX, which are read: made here byte by byte. */
#include "test-vmdk.h"

#define DISK     "/d/se.vmdk"
#define EXTENT   "/d/se-sesparse.vmdk"
#define CAPACITY 70000u /* sectors: three tables, the last of them cut */
#define UNIT     4096u  /* bytes a grain */

/* Sectors where the areas begin, and bytes where an entry stands. */
enum { VOLATILE = 1, DIRECTORY = 4, TABLES = 8, GRAINS = 8 + 4 * 64 };
#define GDE(i)      (DIRECTORY * 512u + (i)*8u)
#define GTE(t, i)   ((TABLES + (t)*64u) * 512u + (i)*8u)
#define GRAIN_AT(n) (GRAINS * 512u + (uint64_t)(n)*UNIT)
#define TABLE(n)    (UINT64_C(0x1000000000000000) + (n))
/* An allocated grain: its number is rotated. */
#define DATA(n) (UINT64_C(3) << 60 | ((uint64_t)(n)&0xfff) << 48 | (uint64_t)(n) >> 12)

static void poke64(uint64_t at, uint64_t value)
{
    uint8_t raw[8];
    put_le64(raw, value);
    poke(EXTENT, at, raw, sizeof(raw));
}

static void grain(uint64_t number, unsigned seed)
{
    uint8_t buf[UNIT];
    fill(buf, sizeof(buf), seed);
    poke(EXTENT, GRAIN_AT(number), buf, sizeof(buf));
}

static void make_extent(void)
{
    static const uint64_t fields[] = {
        0xcafebabe, 0x200000001, CAPACITY, 8,       64, 0,
        0,          0,           0,        0,              /* up to the reserved ones */
        VOLATILE,   1,           2,        1,       3,  1, /* and the journal */
        DIRECTORY,  4,           TABLES,   4 * 64,  0,  0,
        0,          0,           GRAINS,   8 * 6000};
    make_zeros(EXTENT, GRAIN_AT(0));
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
        poke64(i * 8, fields[i]);
    poke64(VOLATILE * 512, 0xcafecafe);
}

/* Grain 0 and 1 are the third and second of the file, 3 is unmapped, 5 is zero; 9000 is in the
 * third table, which is the first in the file. */
static void make(const char *parent)
{
    char text[400];
    make_extent();
    snprintf(text, sizeof(text),
             "# Disk DescriptorFile\nversion=1\nCID=12345678\n%screateType=\"seSparse\"\nRW %u "
             "SESPARSE \"se-sesparse.vmdk\"\n",
             parent ? parent : "parentCID=ffffffff\n", CAPACITY - 4);
    make_text(DISK, text);
    poke64(GDE(0), TABLE(1));
    poke64(GDE(2), TABLE(0));
    poke64(GTE(1, 0), DATA(2));
    poke64(GTE(1, 1), DATA(1));
    poke64(GTE(1, 3), UINT64_C(1) << 60);
    poke64(GTE(1, 5), UINT64_C(2) << 60 | 7);
    poke64(GTE(0, 8748 - 2 * 4096), DATA(4097)); /* needs more than twelve bits */
    grain(2, 20);
    grain(1, 10);
    grain(4097, 40);
}

static void remove_all(void)
{
    ok(mem->ops->unlink(mem, DISK, &err));
    ok(mem->ops->unlink(mem, EXTENT, &err));
}

static void every_kind_of_entry_is_read(void **state)
{
    (void)state;
    make(NULL);
    struct dr_disk *disk = opened(DISK, 0);
    assert_int_equal(dr_size(disk), (CAPACITY - 4) * 512u);
    reads(disk, 0, UNIT, 20);
    reads(disk, UNIT, UNIT, 10);
    reads_zero(disk, 2 * UNIT, (8748 - 2) * UNIT);
    reads(disk, 8748 * UNIT, UNIT - 4 * 512, 40);
    ok(dr_close(disk, &err));
    finds(DISK, 0, 0, "");
}

static void unmapped_is_zeros_and_not_the_parent(void **state)
{
    (void)state;
    uint8_t got[UNIT], want[UNIT];
    char parent[100];
    ok(create_in(mem, "/d/base.vmdk", CAPACITY * 512u, "vmfs", NULL, NULL));
    write_one("/d/base.vmdk", 0, 8 * UNIT, 1, 0);
    snprintf(parent, sizeof(parent), "parentCID=%08x\nparentFileNameHint=\"base.vmdk\"\n",
             cid_of("/d/base.vmdk"));
    make(parent);
    struct dr_disk *disk = opened(DISK, 0), *base = opened("/d/base.vmdk", 0);
    reads(disk, 0, UNIT, 20);
    reads_zero(disk, 3 * UNIT, UNIT);
    reads_zero(disk, 5 * UNIT, UNIT);
    ok(dr_pread(disk, got, 4 * UNIT, UNIT, &err));
    ok(dr_pread(base, want, 4 * UNIT, UNIT, &err));
    assert_memory_equal(got, want, UNIT);
    ok(dr_close(disk, &err));
    ok(dr_close(base, &err));
}

static void it_is_only_read(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make(NULL);
    fails(EROFS, "can only be read", open_in(mem, DISK, DR_OPEN_RDWR, &disk));
    ok(create_in(mem, "/d/top.vmdk", (CAPACITY - 4) * 512u, "monolithicSparse", NULL, "se.vmdk"));
    write_one("/d/top.vmdk", 512, 512, 5, 0);
    disk = opened("/d/top.vmdk", 0);
    reads(disk, 512, 512, 5);
    reads(disk, UNIT, UNIT, 10);
    ok(dr_close(disk, &err));
}

static void a_journal_that_is_not_empty_is_refused(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make(NULL);
    poke64(VOLATILE * 512 + 24, 1);
    fails(ENOTSUP, "journal", open_in(mem, DISK, 0, &disk));
    disk = opened(DISK, DR_OPEN_SALVAGE);
    reads(disk, 0, UNIT, 20);
    ok(dr_close(disk, &err));
}

static void headers_are_checked(void **state)
{
    (void)state;
    static const struct {
        uint64_t at, value;
        const char *why;
    } cases[] = {
        {8, 0x100000001, "version"},
        {16, UINT64_MAX, "capacity"},
        {16, 1000, "holds only 1000"},
        {16, UINT64_C(1) << 40, "a directory of 4 sectors"},
        {24, 16, "grain size"},
        {32, 32, "table size"},
        {40, 1, "flags"},
        {72, 1, "reserved"},
        {80, UINT64_MAX, "cannot be"},
        {80, 3, "volatile seSparse header"},
        {88, 0, "cannot be"},
        {128, 0, "overlap"},
        {136, UINT64_MAX, "cannot be"},
        {128, UINT64_C(1) << 40, "File truncated"},
        {144, 5, "overlap"},
        {152, UINT64_MAX - 2, "cannot be"},
        {192, 10, "overlap"},
        {208, 1, "byte 208"},
        {504, 1, "byte 208"},
        {VOLATILE * 512, 0xcafebabe, "volatile"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_disk *disk;
        make(NULL);
        poke64(cases[i].at, cases[i].value);
        assert_true(open_in(mem, DISK, 0, &disk) < 0);
        if (!strstr(err.text, cases[i].why))
            fail_msg("%zu: %s", i, err.text);
        remove_all();
    }
}

static void damage_is_an_error_and_found(void **state)
{
    (void)state;
    static const struct {
        uint64_t at, value;
        const char *why;
    } cases[] = {
        {GDE(0), 1, "no table can be there"},
        {GDE(0), TABLE(4), "no table can be there"},
        {GDE(0), TABLE(0xffffffff), "no table can be there"},
        {GTE(1, 0), 1, "which cannot be"},
        {GTE(1, 0), UINT64_C(4) << 60, "which cannot be"},
        {GTE(1, 0), UINT64_MAX, "which cannot be"},
        {GTE(1, 0), DATA(4098), "which cannot be"}, /* behind the end of the file */
        {GTE(1, 0), DATA(6000), "which cannot be"}, /* ... of the area */
        {GTE(1, 0), UINT64_C(0x3fffffffffffffff), "which cannot be"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint8_t buf[512];
        make(NULL);
        poke64(cases[i].at, cases[i].value);
        struct dr_disk *disk = opened(DISK, 0);
        fails(EIO, cases[i].why, dr_pread(disk, buf, 0, sizeof(buf), &err));
        dr_close(disk, NULL);
        finds(DISK, 1, 0, cases[i].why);
        remove_all();
    }
    make(NULL);
    poke64(GTE(1, 0), DATA(1));
    finds(DISK, 1, 0, "belongs to another one too");
    poke64(GTE(1, 0), DATA(2));
    poke64(GDE(2), TABLE(1));
    finds(DISK, 1, 0, "directory entry 2 belongs to another one too");
}

static void alone_it_is_refused_by_its_name(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make(NULL);
    fails(EINVAL, "open se.vmdk instead", open_in(mem, EXTENT, 0, &disk));
    disk = opened(EXTENT, DR_OPEN_SALVAGE);
    reads(disk, 0, UNIT, 20);
    ok(dr_close(disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(every_kind_of_entry_is_read),
        T(unmapped_is_zeros_and_not_the_parent),
        T(it_is_only_read),
        T(a_journal_that_is_not_empty_is_refused),
        T(headers_are_checked),
        T(damage_is_an_error_and_found),
        T(alone_it_is_refused_by_its_name),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
