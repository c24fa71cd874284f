/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The sparse extents of ESX: vmfsSparse disks, with their descriptor and without. */
#include "test-vmdk.h"

#include "base/cleanup.h"
#include "faultfs.h"
#include "powerfs.h"

#define DISK  "/d/esx.vmdk"
#define DELTA "/d/esx-delta.vmdk"
#define SIZE  (5 * MIB) /* three tables, one each 2 MiB */

/* Fields of the header, and the first entries of the directory. */
enum { FLAGS = 8, GRAIN_AT = 16, GD = 20, N_TABLES = 24, FREE = 28, UNCLEAN = 1648, GDE = 2048 };
#define FIRST_FREE 5u /* sectors: the header and the directory */

static void make(void)
{
    ok(create_in(mem, DISK, SIZE, "vmfsSparse", NULL, NULL));
}

static uint64_t sectors_of(const char *path)
{
    return file_size(path) / 512;
}

static void it_is_laid_out_as_esx_does(void **state)
{
    (void)state;
    static const uint32_t want[] = {1, 3, SIZE / 512, 1, 4, 3, FIRST_FREE};
    char magic[4];
    make();
    peek(DELTA, 0, magic, 4);
    assert_memory_equal(magic, "COWD", 4);
    for (size_t i = 0; i < sizeof(want) / sizeof(want[0]); i++)
        assert_int_equal(peek32(DELTA, 4 + i * 4), want[i]);
    assert_int_equal(file_size(DELTA), FIRST_FREE * 512);
}

static void a_table_comes_with_its_first_grain(void **state)
{
    (void)state;
    make();
    write_one(DISK, 4 * MIB + 512, 512, 1, 0);
    assert_int_equal(peek32(DELTA, GDE), 0);
    assert_int_equal(peek32(DELTA, GDE + 4), 0);
    assert_int_equal(peek32(DELTA, GDE + 8), FIRST_FREE);
    assert_int_equal(peek32(DELTA, FIRST_FREE * 512 + 4), FIRST_FREE + 32);
    assert_int_equal(peek32(DELTA, FREE), FIRST_FREE + 33);
    assert_int_equal(sectors_of(DELTA), FIRST_FREE + 33);
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 4 * MIB + 512, 512, 1);
    reads_zero(disk, 0, 4 * MIB + 512);
    ok(dr_close(disk, &err));
    finds(DISK, 0, 0, "");
}

static void grains_are_given_out_in_order(void **state)
{
    (void)state;
    make();
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    write_at(disk, 1 * MIB, 3 * 512, 1);
    write_at(disk, 0, 512, 2);
    ok(dr_flush(disk, &err));
    assert_int_equal(peek32(DELTA, FREE), FIRST_FREE + 36); /* while it is open, too */
    ok(dr_close(disk, &err));
    for (uint32_t i = 0; i < 3; i++)
        assert_int_equal(peek32(DELTA, FIRST_FREE * 512 + (2048 + i) * 4), FIRST_FREE + 32 + i);
    assert_int_equal(peek32(DELTA, FIRST_FREE * 512), FIRST_FREE + 35);
}

static void it_is_marked_while_it_is_written(void **state)
{
    (void)state;
    make();
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    write_at(disk, 0, 512, 1);
    ok(dr_flush(disk, &err));
    assert_int_equal(peek32(DELTA, UNCLEAN), 1);
    ok(dr_close(disk, &err));
    assert_int_equal(peek32(DELTA, UNCLEAN), 0);
}

/* QEMU appends grains, and leaves the count as it was. */
static void what_was_appended_without_counting_is_not_overwritten(void **state)
{
    (void)state;
    make();
    write_one(DISK, 0, 4096, 1, 0);
    poke32(DELTA, FREE, FIRST_FREE);
    finds(DISK, 1, 0, "the header says that sector 5 is free, but 45 are in use");
    write_one(DISK, MIB, 4096, 2, 0);
    assert_int_equal(peek32(DELTA, FREE), FIRST_FREE + 32 + 16);
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 0, 4096, 1);
    reads(disk, MIB, 4096, 2);
    ok(dr_close(disk, &err));
    poke32(DELTA, FREE, FIRST_FREE);
    struct dr_check_result r = checked(DISK, DR_CHECK_FIX_ALL);
    assert_int_equal(r.corruptions_fixed, 1);
    assert_int_equal(peek32(DELTA, FREE), FIRST_FREE + 32 + 16);
    finds(DISK, 0, 0, "");
}

static void a_crash_is_recovered_by_the_next_writer(void **state)
{
    (void)state;
    make();
    write_one(DISK, 0, 4096, 1, 0);
    poke32(DELTA, FREE, FIRST_FREE);
    poke32(DELTA, UNCLEAN, 1);
    finds(DISK, 0, 0, "was not closed cleanly");
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    ok(dr_close(disk, &err));
    assert_int_equal(peek32(DELTA, FREE), FIRST_FREE + 32 + 8);
    assert_int_equal(peek32(DELTA, UNCLEAN), 0);
}

static void an_inconsistent_one_is_not_written(void **state)
{
    (void)state;
    struct dr_disk *disk;
    make();
    poke32(DELTA, FLAGS, 7);
    assert_int_equal(open_in(mem, DISK, DR_OPEN_RDWR, &disk), -EIO);
    assert_non_null(strstr(err.text, "marked it as inconsistent"));
    finds(DISK, 1, 0, "marked it as inconsistent");
}

/* ------------------------------------------------------------------ bounds */

static void it_has_32_bits(void **state)
{
    (void)state;
    struct dr_disk *disk;
    uint8_t byte = 1;
    assert_int_equal(create_in(mem, "/d/big.vmdk", 2 * TIB, "vmfsSparse", NULL, NULL), -EFBIG);
    ok(create_in(mem, "/d/most.vmdk", 2 * TIB - 512, "vmfsSparse", NULL, NULL));
    write_one("/d/most.vmdk", 2 * TIB - 1024, 512, 3, 0);
    disk = opened("/d/most.vmdk", 0);
    reads(disk, 2 * TIB - 1024, 512, 3);
    ok(dr_close(disk, &err));
    make();
    poke32(DELTA, FREE, UINT32_MAX - 32); /* not even a table and a grain */
    disk = opened(DISK, DR_OPEN_RDWR);
    assert_int_equal(dr_pwrite(disk, &byte, 0, 1, 0, &err), -ENOSPC);
    assert_non_null(strstr(err.text, "beyond 2 TiB"));
    reads_zero(disk, 0, SIZE);
    dr_close(disk, NULL);
}

static void headers_are_checked(void **state)
{
    (void)state;
    static const struct {
        uint64_t at;
        uint32_t value;
        const char *why;
    } cases[] = {
        {4, 3, "header version 3"},       {GRAIN_AT, 0, "grain size 0"},
        {GRAIN_AT, 3, "grain size 3"},    {GRAIN_AT, 4096, "grain size 4096"},
        {GD, 3, "directory at sector 3"}, {GD, 6, "File truncated"},
        {N_TABLES, 2, "2 COWD grain"},    {N_TABLES, 0x7fffffff, "COWD grain directory entries"},
        {12, 8, "holds only 8"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_disk *disk;
        make();
        poke32(DELTA, cases[i].at, cases[i].value);
        assert_true(open_in(mem, DISK, 0, &disk) < 0);
        if (!strstr(err.text, cases[i].why))
            fail_msg("%zu: %s", i, err.text);
        ok(mem->ops->unlink(mem, DISK, &err));
        ok(mem->ops->unlink(mem, DELTA, &err));
    }
}

/* ------------------------------------------------------------------ another size */

#define LARGE (20480 * MIB) /* the directory takes 80 sectors, of which 79 are in use */

/* Behind the directory: a table with 8 grains, one whose last grains stand behind the place that
 * the longer directory takes, and one behind that place, with grains that were the first one's. */
static void write_some(struct dr_fs *fs, uint8_t *content)
{
    static const struct {
        uint64_t off, len;
    } pieces[] = {{1024, 4096}, {2 * MIB - 512, 13 * 512}, {4 * MIB, 700}, {SIZE - 600, 600}};
    const uint64_t gone = 2048;
    struct dr_disk *disk = NULL;
    ok(open_in(fs, DISK, DR_OPEN_RDWR, &disk));
    memset(content, 0, SIZE);
    for (size_t i = 0; i < sizeof(pieces) / sizeof(pieces[0]); i++) {
        fill(content + pieces[i].off, pieces[i].len, (unsigned)i + 1);
        ok(dr_pwrite(disk, content + pieces[i].off, pieces[i].off, pieces[i].len, 0, &err));
        if (i != 1)
            continue;
        ok(dr_discard(disk, 1024, gone, &err));
        ok(dr_flush(disk, &err));
        memset(content + 1024, 0, gone);
    }
    ok(dr_close(disk, &err));
}

static int resize_in(struct dr_fs *fs, uint64_t size)
{
    struct dr_disk *disk = NULL;
    int r = open_in(fs, DISK, DR_OPEN_RDWR, &disk);
    if (r < 0)
        return r;
    r = dr_resize(disk, size, 0, &err);
    int closed = dr_close(disk, r < 0 ? NULL : &err);
    return r < 0 ? r : closed;
}

/* Answers the size. What the disk had, as far as it goes, and zeros behind that. */
static uint64_t holds(struct dr_fs *fs, const uint8_t *content, const char *when)
{
    struct dr_disk *disk = NULL;
    CLEANUP_FREE uint8_t *buf = malloc(SIZE);
    ok(open_in(fs, DISK, 0, &disk));
    uint64_t size = dr_size(disk), len = dr_min(size, SIZE);
    ok(dr_pread(disk, buf, 0, len, &err));
    for (uint64_t i = 0; i < len; i++)
        if (buf[i] != content[i])
            fail_msg("%s: byte %llu is %02x, not %02x", when, (unsigned long long)i, buf[i],
                     content[i]);
    if (size > SIZE)
        reads_zero(disk, SIZE, dr_min(size - SIZE, 3 * MIB));
    ok(dr_close(disk, &err));
    return size;
}

static void is_sound(struct dr_fs *fs, uint64_t leaks, const char *when)
{
    struct dr_check_result result = {.report = note};
    struct dr_image *image = NULL;
    lines[0] = '\0';
    ok(dr_image_open(fs, DISK, "vmdk", 0, &image, &err));
    ok(vmdk_check(image, 0, &result, &err));
    ok(dr_image_unref(image, &err));
    if (result.corruptions || result.leaks > leaks)
        fail_msg("%s: %s", when, lines);
}

static void its_directory_grows_over_what_moves(void **state)
{
    (void)state;
    CLEANUP_FREE uint8_t *content = malloc(SIZE);
    make();
    write_some(mem, content);
    assert_in_range(peek32(DELTA, GDE + 8), 84, UINT32_MAX);
    assert_in_range(peek32(DELTA, peek32(DELTA, GDE + 8) * 512ull), 5, 83);
    ok(resize_in(mem, LARGE));
    assert_int_equal(holds(mem, content, "larger"), LARGE);
    is_sound(mem, 0, "larger");
    assert_int_equal(peek32(DELTA, GD), 4);
    assert_int_equal(peek32(DELTA, N_TABLES), LARGE / (2 * MIB));
    assert_int_equal(peek32(DELTA, 12), LARGE / 512);
    assert_int_equal(peek32(DELTA, FREE), sectors_of(DELTA));
    for (uint64_t t = 0; t < LARGE / (2 * MIB); t++)
        assert_true(t < 3 ? peek32(DELTA, GDE + t * 4) >= 84 : peek32(DELTA, GDE + t * 4) == 0);
    write_one(DISK, LARGE - 512, 512, 9, 0);
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, LARGE - 512, 512, 9);
    ok(dr_close(disk, &err));

    ok(resize_in(mem, 2 * MIB + 512));
    memset(content + 2 * MIB + 512, 0, SIZE - 2 * MIB - 512);
    assert_int_equal(holds(mem, content, "smaller"), 2 * MIB + 512);
    is_sound(mem, 0, "smaller");
    assert_int_equal(peek32(DELTA, N_TABLES), 2);
    assert_int_equal(peek32(DELTA, FREE), sectors_of(DELTA));
    ok(resize_in(mem, LARGE));
    holds(mem, content, "larger again"); /* and nothing of what was cut off */
    is_sound(mem, 0, "larger again");
}

static void sizes_beyond_its_bounds_are_refused(void **state)
{
    (void)state;
    CLEANUP_FREE uint8_t *content = malloc(SIZE);
    make();
    write_some(mem, content);
    uint32_t cid = cid_of(DISK);
    uint64_t was = file_size(DELTA);
    assert_int_equal(resize_in(mem, 2 * TIB), -EFBIG);
    assert_non_null(strstr(err.text, "too big for vmfsSparse"));
    assert_int_equal(cid_of(DISK), cid);
    poke32(DELTA, FIRST_FREE * 512, 0x7fffffff); /* an entry of the first table */
    assert_int_equal(resize_in(mem, LARGE), -EIO);
    assert_non_null(strstr(err.text, "is damaged"));
    assert_int_equal(file_size(DELTA), was);
}

static void a_longer_parent_does_not_show_behind_its_old_end(void **state)
{
    (void)state;
    ok(create_in(mem, "/d/base.vmdk", 5 * MIB, "vmfs", NULL, NULL));
    write_one("/d/base.vmdk", 0, 5 * MIB, 5, 0);
    ok(create_in(mem, DISK, MIB + 512, "vmfsSparse", NULL, "base.vmdk"));
    ok(resize_in(mem, 6 * MIB));
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 0, MIB + 512, 5);
    reads_zero(disk, MIB + 512, 5 * MIB - 512);
    ok(dr_close(disk, &err));
    finds(DISK, 0, 0, "");
}

/* The old size with all it had, or the new one; and another try works. */
static void survived(struct dr_fs *fs, uint64_t before, uint64_t after, bool done,
                     const uint8_t *content, const char *when)
{
    uint64_t size = holds(fs, content, when);
    if (size != after && (done || size != before))
        fail_msg("%s: size %llu", when, (unsigned long long)size);
    is_sound(fs, UINT64_MAX, when);
    ok(resize_in(fs, after));
    assert_int_equal(holds(fs, content, when), after);
    is_sound(fs, UINT64_MAX, when);
}

static void a_cut_leaves_either_size(void **state)
{
    (void)state;
    static const uint64_t sizes[][2] = {{SIZE, LARGE}, {LARGE, MIB}};
    CLEANUP_FREE uint8_t *content = malloc(SIZE);
    char when[200], op[100];
    for (size_t c = 0; c < 2; c++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        ok(create_in(fs, DISK, sizes[c][0], "vmfsSparse", NULL, NULL));
        write_some(fs, content);
        powerfs_settle(p);
        ok(resize_in(fs, sizes[c][1]));
        for (size_t i = 0, n = powerfs_ops(p); i <= n; i++)
            for (int mode = 0; mode < POWERFS_MODES; mode++) {
                if (mode && powerfs_open_ops(p, i) == 0)
                    continue;
                struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
                snprintf(when, sizeof(when), "%zu: cut after %zu (%s), mode %d", c, i,
                         i ? powerfs_op_text(p, i - 1, op, sizeof(op)) : "nothing", mode);
                survived(disk, sizes[c][0], sizes[c][1], i == n, content, when);
                dr_fs_memory_free(disk);
            }
        powerfs_free(p);
    }
}

static bool survives_a_fault(uint64_t before, uint64_t after, uint64_t nth)
{
    CLEANUP_FREE uint8_t *content = malloc(SIZE);
    struct dr_fs *memory = dr_fs_memory_new();
    char when[60];
    snprintf(when, sizeof(when), "I/O %llu failed", (unsigned long long)nth);
    ok(create_in(memory, DISK, before, "vmfsSparse", NULL, NULL));
    write_some(memory, content);
    struct faultfs *f = faultfs_new(memory);
    faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .error = nth % 2 ? EIO : ENOSPC});
    int r = resize_in(faultfs_fs(f), after);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    survived(memory, before, after, r == 0, content, when);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void a_failing_io_leaves_either_size(void **state)
{
    (void)state;
    for (uint64_t nth = 0; survives_a_fault(SIZE, LARGE, nth); nth++)
        ;
    for (uint64_t nth = 0; survives_a_fault(LARGE, MIB, nth); nth++)
        ;
}

/* ------------------------------------------------------------------ damage */

static void damaged(uint64_t at, uint32_t value, const char *why)
{
    make();
    write_one(DISK, 0, 4096, 1, 0);
    write_one(DISK, 2 * MIB, 4096, 1, 0);
    poke32(DELTA, at, value);
    finds(DISK, 1, strstr(why, "no table can be there") ? 8 + 32 : 0, why);
    assert_int_equal(checked(DISK, DR_CHECK_FIX_ALL).corruptions, 1);
    ok(mem->ops->unlink(mem, DISK, &err));
    ok(mem->ops->unlink(mem, DELTA, &err));
}

static void damage_is_found_and_left(void **state)
{
    (void)state;
    const uint64_t entry = FIRST_FREE * 512;
    damaged(entry, 4, "guest offset 0 says sector 4, which cannot be");
    damaged(entry, 100000, "guest offset 0 says sector 100000, which cannot be");
    damaged(entry, FIRST_FREE + 33, "sector 38 belongs to something else too");
    damaged(entry, FIRST_FREE + 1, "sector 6 belongs to something else too");
}

static size_t lines_told(void)
{
    size_t n = 0;
    for (const char *p = lines; (p = strstr(p, DELTA ": ")); p++)
        n++;
    return n;
}

/* Damage may be in millions of entries. */
static void neighbours_are_told_in_one_line(void **state)
{
    (void)state;
    make();
    write_one(DISK, 0, 65536, 1, 0);
    for (uint32_t i = 0; i < 40; i++)
        poke32(DELTA, FIRST_FREE * 512 + i * 4, 100000 + i);
    for (uint32_t i = 40; i < 44; i++)
        poke32(DELTA, FIRST_FREE * 512 + i * 4, FIRST_FREE + i % 2);
    poke32(DELTA, GDE + 4, 2);
    poke32(DELTA, GDE + 8, 3);
    finds(DISK, 46, 40, "grain directory entries 1 to 2 say sectors 2 to 3: no table can be there");
    assert_non_null(strstr(lines, "40 entries for guest offsets 0 to 20479 say sectors 100000 to "
                                  "100039, which cannot be"));
    assert_non_null(strstr(lines, "the grains of guest offsets 20480 to 22527 at sectors 5 to 6 "
                                  "belong to something else too"));
    assert_int_equal(lines_told(), 4);
}

/* Not once for each of its entries: a directory may lead a million times to one place. */
static void a_table_of_two_is_told_once(void **state)
{
    (void)state;
    make();
    write_one(DISK, 0, 4096, 1, 0);
    poke32(DELTA, GDE + 4, FIRST_FREE);
    assert_int_equal(checked(DISK, 0).corruptions, 1);
    assert_int_equal(checked(DISK, DR_CHECK_FIX_ALL).corruptions, 1);
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 0, 4096, 1);
    ok(dr_close(disk, &err));
}

static void leaks_in_many_places_are_told_in_one_line(void **state)
{
    (void)state;
    make();
    write_one(DISK, 0, 262144, 1, 0);
    for (uint32_t i = 0; i < 512; i++) /* of 16 KiB each second one */
        if (i / 32 % 2)
            poke32(DELTA, FIRST_FREE * 512 + i * 4, 0);
    struct dr_check_result r = checked(DISK, 0);
    assert_true(r.leaks > 8 * 16 && r.leaks <= 8 * 32);
    assert_int_equal(lines_told(), 1);
    assert_non_null(strstr(lines, " on, in 8 places, belong to nothing"));
    assert_int_equal(checked(DISK, DR_CHECK_FIX_LEAKS).leaks_fixed, r.leaks);
    finds(DISK, 0, 0, "");
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 0, 16384, 1);
    reads_zero(disk, 16384, 16384);
    ok(dr_close(disk, &err));
}

static void a_read_through_damage_is_an_error(void **state)
{
    (void)state;
    uint8_t buf[512];
    make();
    write_one(DISK, 0, 4096, 1, 0);
    poke32(DELTA, GDE, 3);
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    assert_int_equal(dr_pread(disk, buf, 0, 512, &err), -EIO);
    assert_int_equal(dr_pwrite(disk, buf, 0, 512, 0, &err), -EIO);
    dr_close(disk, NULL);
    finds(DISK, 1, 40 - 3, "says sector 3: no table can be there");
}

static void what_nothing_leads_to_is_given_back(void **state)
{
    (void)state;
    uint8_t junk[8192];
    make();
    write_one(DISK, 0, 4096, 1, 0);
    uint64_t end = file_size(DELTA);
    memset(junk, 1, sizeof(junk));
    poke(DELTA, end, junk, sizeof(junk));
    finds(DISK, 0, (end + sizeof(junk) - dr_round_up(end, 4096)) / 512, "belong to nothing");
    checked(DISK, DR_CHECK_FIX_LEAKS);
    finds(DISK, 0, 0, "");
    assert_true(file_size(DELTA) < end + 4096);
    struct dr_disk *disk = opened(DISK, 0);
    reads(disk, 0, 4096, 1);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ without a descriptor */

static void bare(const char *path, const char *parent, uint32_t generation)
{
    make();
    write_one(DISK, 512, 512, 1, 0);
    ok(mem->ops->rename(mem, DELTA, path, &err));
    ok(mem->ops->unlink(mem, DISK, &err));
    poke32(path, 1060, generation + 1);
    if (!parent)
        return;
    char name[1024] = {0};
    snprintf(name, sizeof(name), "%s", parent);
    poke32(path, FLAGS, 2);
    poke(path, 32, name, sizeof(name));
    poke32(path, 1056, generation);
}

static void alone_it_is_read(void **state)
{
    (void)state;
    struct dr_disk *disk;
    bare("/d/old.vmdk", NULL, 4);
    disk = opened("/d/old.vmdk", 0);
    assert_int_equal(dr_size(disk), SIZE);
    reads(disk, 512, 512, 1);
    reads_zero(disk, 1024, MIB);
    ok(dr_close(disk, &err));
    assert_int_equal(open_in(mem, "/d/old.vmdk", DR_OPEN_RDWR, &disk), -EROFS);
    assert_non_null(strstr(err.text, "without its descriptor"));
}

static void alone_a_delta_is_refused(void **state)
{
    (void)state;
    struct dr_disk *disk;
    bare(DELTA, NULL, 4);
    assert_int_equal(open_in(mem, DELTA, 0, &disk), -EINVAL);
    assert_non_null(strstr(err.text, "open esx.vmdk instead"));
    disk = opened(DELTA, DR_OPEN_SALVAGE);
    reads(disk, 512, 512, 1);
    ok(dr_close(disk, &err));
}

static void alone_a_child_of_nobody_knows_whom_is_refused(void **state)
{
    (void)state;
    struct dr_disk *disk;
    bare("/d/renamed.vmdk", "", 4);
    assert_int_equal(open_in(mem, "/d/renamed.vmdk", 0, &disk), -EINVAL);
    assert_non_null(strstr(err.text, "with a parent, which only its descriptor knows"));
    disk = opened("/d/renamed.vmdk", DR_OPEN_SALVAGE);
    reads(disk, 512, 512, 1);
    ok(dr_close(disk, &err));
}

static void its_own_record_of_a_parent_counts(void **state)
{
    (void)state;
    struct dr_disk *disk;
    ok(create_in(mem, "/d/base.vmdk", SIZE, "monolithicSparse", NULL, NULL));
    write_one("/d/base.vmdk", 0, 4096, 9, 0);
    bare("/d/child.vmdk", "base.vmdk", 7);
    disk = opened("/d/child.vmdk", 0);
    uint8_t want[512], got[512];
    fill(want, 512, 9);
    ok(dr_pread(disk, got, 0, 512, &err));
    assert_memory_equal(got, want, 512);
    reads(disk, 512, 512, 1);
    ok(dr_close(disk, &err));
    bare("/d/old.vmdk", NULL, 6); /* of generation 7 */
    bare("/d/younger.vmdk", "old.vmdk", 7);
    ok(dr_close(opened("/d/younger.vmdk", 0), &err));
    poke32("/d/old.vmdk", 1060, 8);
    assert_int_equal(open_in(mem, "/d/younger.vmdk", 0, &disk), -ESTALE);
}

/* ------------------------------------------------------------------ chains */

static void a_child_shows_its_parent(void **state)
{
    (void)state;
    ok(create_in(mem, "/d/base.vmdk", SIZE, "vmfs", NULL, NULL));
    write_one("/d/base.vmdk", MIB, 8192, 1, 0);
    ok(create_in(mem, DISK, SIZE, "vmfsSparse", NULL, "base.vmdk"));
    write_one(DISK, MIB + 1024, 100, 2, 0); /* in the middle of a grain */
    struct dr_disk *disk = opened(DISK, 0);
    uint8_t want[8192], got[8192];
    fill(want, 8192, 1);
    fill(want + 1024, 100, 2);
    ok(dr_pread(disk, got, MIB, 8192, &err));
    assert_memory_equal(got, want, 8192);
    ok(dr_close(disk, &err));
    assert_int_equal(sectors_of(DELTA), FIRST_FREE + 32 + 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(it_is_laid_out_as_esx_does),
        T(a_table_comes_with_its_first_grain),
        T(grains_are_given_out_in_order),
        T(it_is_marked_while_it_is_written),
        T(what_was_appended_without_counting_is_not_overwritten),
        T(a_crash_is_recovered_by_the_next_writer),
        T(an_inconsistent_one_is_not_written),
        T(it_has_32_bits),
        T(headers_are_checked),
        T(its_directory_grows_over_what_moves),
        T(sizes_beyond_its_bounds_are_refused),
        T(a_longer_parent_does_not_show_behind_its_old_end),
        T(a_cut_leaves_either_size),
        T(a_failing_io_leaves_either_size),
        T(damage_is_found_and_left),
        T(neighbours_are_told_in_one_line),
        T(a_table_of_two_is_told_once),
        T(leaks_in_many_places_are_told_in_one_line),
        T(a_read_through_damage_is_an_error),
        T(what_nothing_leads_to_is_given_back),
        T(alone_it_is_read),
        T(alone_a_delta_is_refused),
        T(alone_a_child_of_nobody_knows_whom_is_refused),
        T(its_own_record_of_a_parent_counts),
        T(a_child_shows_its_parent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
