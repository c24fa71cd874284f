/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VMDK gets another size: tables move, pieces come and go, and nothing else changes. */
#include "test-vmdk.h"

#include "faultfs.h"
#include "powerfs.h"

#define KIB     1024u
#define PATH    "/d/a.vmdk"
#define PIECE   "/d/a-x.vmdk"
#define COVERED (256 * KIB) /* what one table leads to, where a grain is one sector */
#define SMALL   (COVERED + 44 * KIB + 512)
#define LARGE   (20 * COVERED - 512)

/* ------------------------------------------------------------------ fixtures */

/* A text, and one extent with grains of one sector: its tables become many soon. */
static void make_fine(struct dr_fs *fs, uint64_t size)
{
    const struct vmdk_new_extent how = {.sparse = true, .sectors = size / 512, .grain = 1};
    char text[512];
    struct dr_file *f;
    snprintf(text, sizeof(text),
             "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
             "createType=\"custom\"\n\n# Extent description\nRW %llu SPARSE \"a-x.vmdk\"\n\n"
             "# The Disk Data Base \n#DDB\n\nddb.adapterType = \"lsilogic\"\n"
             "ddb.geometry.cylinders = \"1\"\nddb.geometry.heads = \"16\"\n"
             "ddb.geometry.sectors = \"4\"\n",
             (unsigned long long)size / 512);
    ok(vmdk_make_extent(fs, PIECE, &how, &err));
    ok(dr_file_open(fs, PATH, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, text, 0, strlen(text), &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
}

static void pattern(uint8_t *content, uint64_t size)
{
    memset(content, 0, LARGE);
    for (uint64_t off = 0; off < size; off += 512)
        if (off % (5 * 512) != 0 || off + 512 == size)
            fill(content + off, 512, (unsigned)(off / 512 * 3 + 1));
}

/* What the disk holds, all of it in many grains; content has room for the large disk. */
static void write_pattern(struct dr_fs *fs, const uint8_t *content, uint64_t size)
{
    struct dr_disk *disk = NULL;
    ok(open_in(fs, PATH, DR_OPEN_RDWR, &disk));
    for (uint64_t off = 0; off < size; off += 512)
        if (off % (5 * 512) || off + 512 >= size)
            ok(dr_pwrite(disk, content + off, off, 512, 0, &err));
    ok(dr_close(disk, &err));
}

static int resize_in(struct dr_fs *fs, const char *path, uint64_t size)
{
    struct dr_disk *disk = NULL;
    int r = open_in(fs, path, DR_OPEN_RDWR, &disk);
    if (r < 0)
        return r;
    r = dr_truncate(disk, size, &err);
    int closed = dr_close(disk, r < 0 ? NULL : &err);
    return r < 0 ? r : closed;
}

static uint64_t size_in(struct dr_fs *fs, const char *path)
{
    struct dr_disk *disk = NULL;
    ok(open_in(fs, path, 0, &disk));
    uint64_t size = dr_size(disk);
    ok(dr_close(disk, &err));
    return size;
}

/* The size it has; what lies inside of it is content's, but for what a shrinking has cut off. */
static uint64_t holds(struct dr_fs *fs, const uint8_t *content, const char *when)
{
    struct dr_disk *disk = NULL;
    CLEANUP_FREE uint8_t *buf = malloc(LARGE);
    ok(open_in(fs, PATH, 0, &disk));
    uint64_t size = dr_size(disk);
    ok(dr_pread(disk, buf, 0, size, &err));
    ok(dr_close(disk, &err));
    for (uint64_t i = 0; i < size; i++)
        if (buf[i] != content[i])
            fail_msg("%s: of %llu bytes that at %llu is %02x, not %02x", when,
                     (unsigned long long)size, (unsigned long long)i, buf[i], content[i]);
    return size;
}

static void is_sound(struct dr_fs *fs, bool leaks_allowed, const char *when)
{
    struct dr_check_result result = {.report = note};
    struct dr_image *image = NULL;
    lines[0] = '\0';
    ok(dr_image_open(fs, PATH, "vmdk", 0, &image, &err));
    ok(vmdk_check(image, 0, &result, &err));
    ok(dr_image_unref(image, &err));
    if (result.corruptions || (result.leaks && !leaks_allowed))
        fail_msg("%s: %s", when, lines);
}

/* VMware computes where a table is from where its directory is. */
static void tables_stand_in_rows(const char *path)
{
    uint32_t gd = peek32(path, 56), rgd = peek32(path, 48), overhead = peek32(path, 64);
    uint64_t capacity = peek32(path, 12), grain = peek32(path, 20);
    uint32_t n = (uint32_t)dr_div_up(capacity, grain * 512), sectors = (n * 4 + 511) / 512;
    for (uint32_t t = 0; t < n; t++) {
        assert_int_equal(peek32(path, gd * 512ull + t * 4), gd + sectors + t * 4);
        assert_int_equal(peek32(path, rgd * 512ull + t * 4), rgd + sectors + t * 4);
    }
    assert_true(gd >= rgd + sectors + 4 * n);
    assert_true(overhead >= gd + sectors + 4 * n);
}

static char *text_of(const char *path, char *text, size_t room)
{
    size_t len = (size_t)dr_min(file_size(path), room - 1);
    peek(path, 0, text, len);
    text[len] = '\0';
    return text;
}

/* ------------------------------------------------------------------ sparse extents */

static void more_tables_take_the_place_of_grains_that_move(void **state)
{
    (void)state;
    CLEANUP_FREE uint8_t *content = malloc(LARGE);
    char text[1024];
    make_fine(mem, SMALL);
    pattern(content, SMALL);
    write_pattern(mem, content, SMALL);
    uint32_t first = peek32(PIECE, 64);
    ok(resize_in(mem, PATH, LARGE));
    assert_int_equal(holds(mem, content, "larger"), LARGE);
    is_sound(mem, false, "larger");
    tables_stand_in_rows(PIECE);
    assert_true(peek32(PIECE, 64) > first + 160);
    assert_non_null(strstr(text_of(PATH, text, sizeof(text)), "RW 10239 SPARSE \"a-x.vmdk\"\n"));
    assert_non_null(strstr(text, "ddb.geometry.cylinders = \"159\"\n"));
    CLEANUP_FREE uint8_t *last = malloc(512);
    memcpy(last, content + SMALL - 512, 512);
    pattern(content, LARGE);
    memcpy(content + SMALL - 512, last, 512); /* the new pattern has a hole there */
    write_pattern(mem, content, LARGE);
    assert_int_equal(holds(mem, content, "full"), LARGE);
    is_sound(mem, false, "full");
    ok(resize_in(mem, PATH, SMALL));
    memset(content + SMALL, 0, LARGE - SMALL);
    assert_int_equal(holds(mem, content, "smaller"), SMALL);
    is_sound(mem, false, "smaller");
    ok(resize_in(mem, PATH, LARGE));
    holds(mem, content, "larger again");
    is_sound(mem, false, "larger again");
}

static void a_directory_of_more_sectors_moves_both_ways(void **state)
{
    (void)state;
    make_fine(mem, 127 * COVERED);
    write_one(PATH, 0, 700 * KIB, 3, 0);
    write_one(PATH, 20 * MIB, 700 * KIB, 4, 0);
    for (unsigned tables = 200; tables >= 100; tables -= 100) {
        ok(resize_in(mem, PATH, tables * COVERED + 512));
        struct dr_disk *disk = opened(PATH, 0);
        reads(disk, 0, 700 * KIB, 3);
        reads(disk, 20 * MIB, 700 * KIB, 4);
        ok(dr_close(disk, &err));
        tables_stand_in_rows(PIECE);
        is_sound(mem, false, "two directories' sizes");
    }
}

/* As after a repair, or by a program that made them later. */
static void metadata_among_the_grains_stays_whole(void **state)
{
    (void)state;
    CLEANUP_FREE uint8_t *content = malloc(LARGE), table[2048];
    make_fine(mem, SMALL);
    pattern(content, SMALL);
    write_pattern(mem, content, SMALL);
    struct dr_disk *disk = opened(PATH, DR_OPEN_RDWR);
    ok(dr_zero(disk, 0, 32 * KIB, DR_MAY_UNMAP, &err));
    ok(dr_discard(disk, 0, 32 * KIB, &err));
    ok(dr_close(disk, &err));
    memset(content, 0, 32 * KIB);
    uint32_t gd = peek32(PIECE, 56), at = peek32(PIECE, 64) + 8;
    peek(PIECE, peek32(PIECE, gd * 512ull) * 512ull, table, sizeof(table));
    poke(PIECE, at * 512ull, table, sizeof(table));
    poke32(PIECE, gd * 512ull, at);
    uint32_t overhead = peek32(PIECE, 64);
    ok(resize_in(mem, PATH, LARGE));
    assert_int_equal(holds(mem, content, "moved"), LARGE);
    assert_int_equal(peek32(PIECE, 64), overhead);
    is_sound(mem, true, "moved");
}

static void a_damaged_table_is_not_moved(void **state)
{
    (void)state;
    make_fine(mem, SMALL);
    write_one(PATH, 0, 4 * KIB, 3, 0);
    uint32_t gd = peek32(PIECE, 56), table = peek32(PIECE, gd * 512ull),
             was = (uint32_t)file_size(PIECE);
    poke32(PIECE, table * 512ull + 40, 0x7fffffff);
    fails(EIO, "is damaged", resize_in(mem, PATH, LARGE));
    assert_int_equal(size_in(mem, PATH), SMALL);
    assert_int_equal(peek32(PIECE, 56), gd);
    assert_int_equal(file_size(PIECE), was);
}

static void what_a_damaged_entry_behind_the_end_leads_to_stays(void **state)
{
    (void)state;
    CLEANUP_FREE uint8_t *content = malloc(LARGE);
    make_fine(mem, SMALL);
    pattern(content, SMALL);
    write_pattern(mem, content, SMALL);
    uint32_t gd = peek32(PIECE, 56), last = peek32(PIECE, gd * 512ull + 4);
    poke32(PIECE, last * 512ull + 40, gd);
    ok(resize_in(mem, PATH, COVERED));
    assert_int_equal(holds(mem, content, "shrunk"), COVERED);
    is_sound(mem, true, "shrunk");
}

static void an_embedded_text_and_its_geometry_follow(void **state)
{
    (void)state;
    struct dr_disk *disk;
    ok(create(PATH, 4 * MIB, NULL));
    write_one(PATH, 0, 4 * MIB, 9, 0);
    ok(resize_in(mem, PATH, 3 * 1024 * MIB));
    disk = opened(PATH, 0);
    reads(disk, 0, 4 * MIB, 9);
    reads_zero(disk, 4 * MIB, 4 * MIB);
    ok(dr_close(disk, &err));
    assert_int_equal(peek32(PATH, 12), 3 * 1024 * 2048);
    tables_stand_in_rows(PATH);
    finds(PATH, 0, 0, "");
    char text[4096];
    peek(PATH, 512, text, sizeof(text) - 1);
    text[4095] = '\0';
    assert_non_null(strstr(text, "ddb.geometry.cylinders = \"6241\""));
}

static void a_longer_parent_does_not_show_behind_the_old_end(void **state)
{
    (void)state;
    static const char *const zeroed[] = {NULL, "on"};
    for (int i = 0; i < 2; i++) {
        dr_fs_memory_free(mem);
        struct dr_fs *fs = mem = dr_fs_memory_new();
        ok(create("/d/base.vmdk", 4 * MIB, NULL));
        write_one("/d/base.vmdk", 0, 4 * MIB, 5, 0);
        ok(create_in(fs, PATH, MIB + 512, "monolithicSparse", zeroed[i], "base.vmdk"));
        ok(resize_in(fs, PATH, 5 * MIB));
        struct dr_disk *disk = opened(PATH, 0);
        reads(disk, 0, MIB + 512, 5);
        reads_zero(disk, MIB + 512, 4 * MIB - 512);
        ok(dr_close(disk, &err));
        finds(PATH, 0, 0, "");
    }
}

/* ------------------------------------------------------------------ pieces and flat files */

static void a_split_disk_grows_by_pieces_and_loses_them(void **state)
{
    (void)state;
    static const char *const kinds[] = {"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"};
    for (int i = 0; i < 2; i++) {
        char text[1024], line[80], taken[40], made[40];
        snprintf(taken, sizeof(taken), "/d/b%d-%c002.vmdk", i, "sf"[i]);
        snprintf(made, sizeof(made), "/d/b%d-%c003.vmdk", i, "sf"[i]);
        char path[] = "/d/b0.vmdk";
        path[4] += (char)i;
        ok(create_in(mem, path, MIB + 512, kinds[i], NULL, NULL));
        write_one(path, 0, MIB + 512, 6, 0);
        make_text(taken, "somebody's");
        ok(resize_in(mem, path, MIB + 512 + 2048 * MIB));
        assert_int_equal(file_size(taken), 10);
        snprintf(line, sizeof(line), "RW 4192256 %s \"%s\"%s\nRW 2048 %s", i ? "FLAT" : "SPARSE",
                 made + 3, i ? " 0" : "", i ? "FLAT" : "SPARSE");
        if (!strstr(text_of(path, text, sizeof(text)), line))
            fail_msg("%s", text);
        write_one(path, MIB, 2 * MIB, 7, 0);
        struct dr_disk *disk = opened(path, 0);
        reads(disk, 0, MIB, 6);
        reads(disk, MIB, 2 * MIB, 7);
        reads_zero(disk, 3 * MIB, MIB);
        ok(dr_close(disk, &err));
        finds(path, 0, 0, "");
        ok(resize_in(mem, path, 2 * MIB));
        disk = opened(path, 0);
        reads(disk, MIB, MIB, 7);
        ok(dr_close(disk, &err));
        snprintf(made, sizeof(made), "/d/b%d-%c004.vmdk", i, "sf"[i]);
        assert_false(dr_fs_exists(mem, made));
        ok(resize_in(mem, path, MIB));
        made[strlen(made) - 6] = '3';
        assert_false(dr_fs_exists(mem, made));
        finds(path, 0, 0, "");
    }
}

static void what_lies_behind_a_flat_extent_does_not_show(void **state)
{
    (void)state;
    ok(create_in(mem, PATH, MIB, "monolithicFlat", NULL, NULL));
    write_one(PATH, 0, MIB, 6, 0);
    poke("/d/a-flat.vmdk", MIB, "junk", 4);
    ok(resize_in(mem, PATH, 2 * MIB));
    assert_int_equal(file_size("/d/a-flat.vmdk"), 2 * MIB);
    struct dr_disk *disk = opened(PATH, 0);
    reads(disk, 0, MIB, 6);
    reads_zero(disk, MIB, MIB);
    ok(dr_close(disk, &err));
    ok(resize_in(mem, PATH, 512));
    assert_int_equal(file_size("/d/a-flat.vmdk"), 512);
}

static void sizes_that_cannot_be_are_refused(void **state)
{
    (void)state;
    char before[2048], after[2048];
    ok(create(PATH, MIB, NULL));
    peek(PATH, 0, before, sizeof(before));
    fails(EINVAL, "multiple of 512", resize_in(mem, PATH, MIB + 1));
    fails(EINVAL, "cannot be made empty", resize_in(mem, PATH, 0));
    peek(PATH, 0, after, sizeof(after)); /* with the CID: children still know their parent */
    assert_memory_equal(before, after, sizeof(before));
    fails(EFBIG, "too big", resize_in(mem, PATH, 4096 * TIB));
    assert_int_equal(size_in(mem, PATH), MIB);
}

/* ------------------------------------------------------------------ cut off, and failing */

static void cut_everywhere(uint64_t before, uint64_t after)
{
    CLEANUP_FREE uint8_t *content = malloc(LARGE);
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    char when[200], op[100];
    make_fine(fs, before);
    pattern(content, before);
    write_pattern(fs, content, dr_min(before, 2 * COVERED));
    memset(content + dr_min(before, 2 * COVERED), 0, LARGE - dr_min(before, 2 * COVERED));
    powerfs_settle(p);
    ok(resize_in(fs, PATH, after));
    size_t n = powerfs_ops(p);
    for (size_t i = 0; i <= n; i = powerfs_next(p, i, 60))
        for (int mode = 0; mode < POWERFS_MODES; mode++) {
            if (mode && powerfs_open_ops(p, i) == 0)
                continue;
            struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            snprintf(when, sizeof(when), "%llu to %llu, cut after %zu (%s), mode %d",
                     (unsigned long long)before, (unsigned long long)after, i,
                     i ? powerfs_op_text(p, i - 1, op, sizeof(op)) : "nothing", mode);
            uint64_t size = holds(disk, content, when);
            if (size != before && size != after)
                fail_msg("%s: size %llu", when, (unsigned long long)size);
            ok(resize_in(disk, PATH, after));
            assert_int_equal(holds(disk, content, when), after);
            is_sound(disk, true, when);
            dr_fs_memory_free(disk);
        }
    powerfs_free(p);
}

static void a_cut_leaves_the_old_size_or_the_new_one(void **state)
{
    (void)state;
    cut_everywhere(SMALL, LARGE);
    cut_everywhere(LARGE, SMALL);
}

static bool fails_once(uint64_t before, uint64_t after, uint64_t nth)
{
    CLEANUP_FREE uint8_t *content = malloc(LARGE);
    struct dr_fs *memory = dr_fs_memory_new();
    char when[100];
    snprintf(when, sizeof(when), "%llu to %llu, I/O %llu failed", (unsigned long long)before,
             (unsigned long long)after, (unsigned long long)nth);
    make_fine(memory, before);
    pattern(content, dr_min(before, COVERED));
    write_pattern(memory, content, dr_min(before, COVERED));
    struct faultfs *f = faultfs_new(memory);
    faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .error = nth % 2 ? EIO : ENOSPC});
    int r = resize_in(faultfs_fs(f), PATH, after);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    uint64_t size = holds(memory, content, when);
    if (size != after && (r == 0 || size != before))
        fail_msg("%s: %d, size %llu", when, r, (unsigned long long)size);
    ok(resize_in(memory, PATH, after));
    assert_int_equal(holds(memory, content, when), after);
    is_sound(memory, true, when);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void a_failure_leaves_the_old_size_or_the_new_one(void **state)
{
    (void)state;
    uint64_t step = 1;
    for (uint64_t nth = 0; fails_once(SMALL, LARGE, nth); nth += step)
        step = nth > 40 ? 37 : 1; /* many grains move alike */
    for (uint64_t nth = 0; fails_once(LARGE, SMALL, nth); nth++)
        ;
}

/* Opens of a new piece that still work. */
static int fail_opens(void *user, const struct faultfs_io *io)
{
    int *left = user;
    bool piece = io->kind == FAULTFS_OPEN && strstr(io->path, "002.vmdk");
    return piece && (*left)-- <= 0 ? -EIO : 0;
}

/* Else what is written there would go to another file. */
static void a_piece_that_cannot_be_opened_is_no_part_of_the_disk(void **state)
{
    (void)state;
    static const char *const kinds[] = {"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"};
    for (int i = 0; i < 4; i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_disk *disk = NULL;
        int left = i / 2; /* opened when it is made, and for the disk */
        ok(create_in(memory, PATH, MIB, kinds[i % 2], NULL, NULL));
        ok(open_in(faultfs_fs(f), PATH, DR_OPEN_RDWR, &disk));
        faultfs_observe(f, fail_opens, &left);
        fails(EIO, "002.vmdk", dr_truncate(disk, 3 * MIB, &err));
        faultfs_observe(f, NULL, NULL);
        assert_int_equal(left, -1);
        assert_int_equal(dr_size(disk), MIB);
        ok(dr_close(disk, &err));
        assert_int_equal(size_in(memory, PATH), MIB);
        assert_false(dr_fs_exists(memory, i % 2 ? "/d/a-f002.vmdk" : "/d/a-s002.vmdk"));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(more_tables_take_the_place_of_grains_that_move),
        T(a_directory_of_more_sectors_moves_both_ways),
        T(metadata_among_the_grains_stays_whole),
        T(a_damaged_table_is_not_moved),
        T(what_a_damaged_entry_behind_the_end_leads_to_stays),
        T(an_embedded_text_and_its_geometry_follow),
        T(a_longer_parent_does_not_show_behind_the_old_end),
        T(a_split_disk_grows_by_pieces_and_loses_them),
        T(what_lies_behind_a_flat_extent_does_not_show),
        T(sizes_that_cannot_be_are_refused),
        T(a_cut_leaves_the_old_size_or_the_new_one),
        T(a_failure_leaves_the_old_size_or_the_new_one),
        T(a_piece_that_cannot_be_opened_is_no_part_of_the_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
