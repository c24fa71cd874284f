/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps inside qcow2 images: what is noted in them, and what is not. */
#include "faultfs.h"
#include "core/marks.h"
#include "test-qcow2-bitmaps.h"

/* ------------------------------------------------------------------ what changes do */

static void changes_do_what_they_say(void **state)
{
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &geometries[i], SIZE);
        struct dr_disk *disk = open_disk(fs);
        add(disk, "fine", 512, false);
        add(disk, "coarse", 64 * KIB, false);
        write_at(disk, 3 * 512, 512, 1);
        write_at(disk, SIZE - 700, 700, 1);
        ok(dr_close(disk, &err));
        says(fs, "fine 512 on 3+1 2049+2;coarse 65536 on 0+128 2048+3;");
        disk = open_disk(fs);
        ok(change(disk, "coarse", DR_BITMAP_DISABLE, NULL, &err));
        ok(change(disk, "fine", DR_BITMAP_CLEAR, NULL, &err));
        write_at(disk, 64 * KIB, 512, 2);
        ok(dr_close(disk, &err));
        says(fs, "fine 512 on 128+1;coarse 65536 off 0+128 2048+3;");
        disk = open_disk(fs);
        ok(change(disk, "coarse", DR_BITMAP_MERGE, "fine", &err));
        add(disk, "third", 4096, true);
        ok(change(disk, "third", DR_BITMAP_MERGE, "coarse", &err));
        ok(change(disk, "fine", DR_BITMAP_REMOVE, NULL, &err));
        ok(change(disk, "coarse", DR_BITMAP_ENABLE, NULL, &err));
        ok(dr_close(disk, &err));
        says(fs, "coarse 65536 on 0+256 2048+3;third 4096 off 0+256 2048+3;");
        check_clean(fs);
        disk = open_disk(fs);
        ok(change(disk, "coarse", DR_BITMAP_REMOVE, NULL, &err));
        ok(change(disk, "third", DR_BITMAP_REMOVE, NULL, &err));
        ok(dr_close(disk, &err));
        says(fs, "");
        check_clean(fs);
        dr_fs_memory_free(fs);
    }
    (void)state;
}

static void changes_of_a_disk_that_was_written_to_lose_no_marks(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "old", 64 * KIB, false);
    write_at(disk, 0, 512, 1);
    refused(dr_disk_bitmap_read(disk, "old", put_range, NULL, &err), EUCLEAN, "inconsistent");
    add(disk, "new", 64 * KIB, false);
    write_at(disk, 512 * KIB, 512, 2);
    refused(change(disk, "new", DR_BITMAP_ADD, NULL, &err), EEXIST, "already exists");
    write_at(disk, 768 * KIB, 512, 2);
    ok(change(disk, "new", DR_BITMAP_DISABLE, NULL, &err));
    write_at(disk, 128 * KIB, 512, 3);
    ok(dr_close(disk, &err));
    says(*state, "old 65536 on 0+128 256+128 1024+128 1536+128;new 65536 off 1024+128 1536+128;");
    check_clean(*state);
}

static void impossible_names_and_granularities_are_refused(void **state)
{
    char longest[1024 + 1];
    memset(longest, 'n', 1024);
    longest[1024] = '\0';
    const struct {
        const char *name;
        uint64_t granularity;
        const char *why;
    } cases[] = {
        {"", 512, "cannot be empty"},
        {longest, 512, "name too long"},
        {"b", 256, "power of 2"},
        {"b", 1, "power of 2"},
        {"b", 1536, "power of 2"},
        {"b", UINT64_C(1) << 32, "power of 2"},
        {"b", (UINT64_C(1) << 31) + 512, "power of 2"},
    };
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const struct dr_bitmap_options o = {.granularity = cases[i].granularity};
        refused(dr_disk_bitmap_change(disk, cases[i].name, DR_BITMAP_ADD, &o, &err), EINVAL,
                cases[i].why);
    }
    add(disk, longest + 1, UINT64_C(1) << 31, false);
    add(disk, "b", 512, false);
    ok(dr_close(disk, &err));
    check_clean(*state);
}

static void arguments_that_are_missing_are_refused(void **state)
{
    struct dr_bitmap *list;
    size_t n;
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "b", 0, false);
    refused(dr_disk_bitmaps(NULL, &list, &n, &err), EINVAL, "disk");
    refused(dr_disk_bitmaps(disk, NULL, &n, &err), EINVAL, "bitmaps");
    refused(dr_disk_bitmaps(disk, &list, NULL, &err), EINVAL, "n must");
    refused(dr_disk_bitmap_read(disk, NULL, put_range, NULL, &err), EINVAL, "bitmap");
    refused(dr_disk_bitmap_read(disk, "b", NULL, NULL, &err), EINVAL, "each");
    refused(dr_disk_bitmap_change(disk, NULL, DR_BITMAP_ADD, NULL, &err), EINVAL, "bitmap");
    refused(change(disk, "b", DR_BITMAP_MERGE, NULL, &err), EINVAL, "source");
    refused(change(disk, "b", (enum dr_bitmap_action)77, NULL, &err), EINVAL, "77");
    ok(dr_close(disk, &err));
    ok(try_open(*state, 0, &disk, &err));
    refused(change(disk, "c", DR_BITMAP_ADD, NULL, &err), EROFS, "reading only");
    ok(dr_close(disk, &err));
    says(*state, "b 8192 on;");
}

static int stop(void *user, uint64_t off, uint64_t len)
{
    *(uint64_t *)user += off + len;
    return 7;
}

static void a_reader_of_a_bitmap_may_stop(void **state)
{
    uint64_t seen = 0;
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "b", 512, false);
    write_at(disk, 1024, 512, 1);
    write_at(disk, 4096, 512, 1);
    ok(dr_close(disk, &err));
    ok(try_open(*state, 0, &disk, &err));
    assert_int_equal(dr_disk_bitmap_read(disk, "b", stop, &seen, NULL), 7);
    assert_int_equal(seen, 1024 + 512);
    ok(dr_close(disk, &err));
}

static void what_a_disk_grows_by_has_changed(void **state)
{
    char all[100];
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "b", 512, false);
    add(disk, "off", 512, false);
    write_at(disk, 512 * KIB, 100 * KIB, 1);
    ok(change(disk, "off", DR_BITMAP_DISABLE, NULL, &err));
    ok(dr_truncate(disk, 520 * KIB, &err));
    ok(dr_close(disk, &err));
    says(*state, "b 512 on 1024+16;off 512 off 1024+16;");
    disk = open_disk(*state);
    ok(dr_truncate(disk, SIZE, &err));
    ok(dr_close(disk, &err));
    snprintf(all, sizeof(all), "b 512 on 1024+%u;off 512 off 1024+16;",
             (unsigned)(SIZE / 512 - 1024));
    says(*state, all);
    check_clean(*state);
}

/* Taking clusters for a bitmap makes the refcount table move: begin_write is called for that. */
static void bitmaps_are_added_while_the_refcount_table_grows(void **state)
{
    const struct geometry small = {PAIRS({"cluster_size", "512"}, {"refcount_bits", "64"})};
    struct text expected = {.n = 0};
    create(*state, &small, 3 * MIB);
    struct dr_disk *disk = open_disk(*state);
    write_at(disk, 0, 1940 * KIB, 1);
    ok(dr_close(disk, &err));
    disk = open_disk(*state);
    const struct qcow2 *q = qcow2_of(disk->chain->images[0]);
    uint64_t before = q->h.reftable_at;
    unsigned n = 0;
    for (; n < 100 && q->h.reftable_at == before; n++) {
        char name[8];
        snprintf(name, sizeof(name), "b%u", n);
        add(disk, name, 4096, false);
        put(&expected, "b%u 4096 on 8+8;", n);
    }
    assert_true(n > 2 && n < 100);
    write_at(disk, 4096, 1, 2);
    struct text now = describe(disk);
    for (const char *at = now.s; n > 0; n--, at++) /* every one is in use */
        assert_non_null(at = strstr(at, "inconsistent"));
    ok(dr_close(disk, &err));
    says(*state, expected.s);
    check_clean(*state);
}

static void discards_and_zeros_are_noted_and_copies_that_change_nothing_are_not(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    write_at(disk, 0, SIZE, 1);
    add(disk, "b", 8 * KIB, false);
    ok(dr_zero(disk, 8 * KIB, 8 * KIB, DR_MAY_UNMAP, &err));
    ok(dr_discard(disk, 64 * KIB, 8 * KIB, &err));
    ok(dr_zero(disk, 128 * KIB + 5, 10, 0, &err));
    ok(dr_chain_fill(disk->chain, 0, NULL, 256 * KIB, 8 * KIB, &err));
    ok(dr_chain_fill(disk->chain, 0, NULL, 64 * KIB, 8 * KIB, &err)); /* there it is a hole */
    ok(dr_chain_drop(disk->chain, 0, 8 * KIB, 8 * KIB, &err));
    ok(dr_close(disk, &err));
    says(*state, "b 8192 on 16+16 128+16 256+16;");
}

static void a_promise_to_leave_the_view_leaves_the_bitmaps(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "b", 64 * KIB, false);
    ok(dr_close(disk, &err));
    ok(try_open(*state, DR_OPEN_RDWR | DR_OPEN_UNCHANGED, &disk, &err));
    uint8_t zeros[512] = {0};
    ok(dr_chain_fill(disk->chain, 0, zeros, 0, sizeof(zeros), &err));
    ok(dr_chain_write(disk->chain, 0, zeros, 0, sizeof(zeros), &err));
    struct text now = describe(disk);
    assert_string_equal(now.s, "b 65536 on;"); /* not even in use */
    ok(dr_close(disk, &err));
    says(*state, "b 65536 on;");
}

static void *write_stripe(void *user)
{
    struct dr_disk *disk = ((void **)user)[0];
    size_t first = (size_t)(uintptr_t)((void **)user)[1];
    for (size_t i = first; i < 256; i += 4)
        write_at(disk, i * 4 * KIB, 512, (int)i);
    return NULL;
}

static void many_threads_write_and_every_mark_is_there(void **state)
{
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "fine", 512, false);
    add(disk, "coarse", 1 * MIB, false);
    pthread_t threads[4];
    void *args[4][2];
    for (size_t i = 0; i < 4; i++) {
        args[i][0] = disk;
        args[i][1] = (void *)(uintptr_t)i;
        assert_int_equal(pthread_create(&threads[i], NULL, write_stripe, args[i]), 0);
    }
    for (size_t i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    ok(dr_close(disk, &err));
    struct text expected = {.n = 0};
    put(&expected, "fine 512 on");
    for (unsigned i = 0; i < 256; i++)
        put(&expected, " %u+1", i * 8);
    put(&expected, ";coarse 1048576 on 0+2048;");
    says(*state, expected.s);
}

/* ------------------------------------------------------------------ little room */

static void where_marks_take_too_much_memory_more_counts_as_written(void **state)
{
    create(*state, &geometries[0], 40 * MIB);
    struct dr_disk *disk = open_disk(*state);
    add(disk, "b", 512, false); /* a page of marks stands for 16 MiB */
    size_t bound = dr_marks_pages;
    dr_marks_pages = 1;
    write_at(disk, 5 * 512, 512, 1);
    write_at(disk, 39 * MIB, 512, 1);
    ok(dr_close(disk, &err));
    dr_marks_pages = bound;
    says(*state, "b 512 on 5+1 65536+16384;");
    check_clean(*state);
}

static void where_there_is_no_room_for_bits_all_of_them_are_set(void **state)
{
    struct faultfs *faults = faultfs_new(*state);
    create(*state, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    add(disk, "b", 512, false);
    write_at(disk, 5 * 512, 512, 1);
    ok(dr_flush(disk, &err));
    faultfs_arm(faults, &(struct faultfs_plan){.kinds = 1u << FAULTFS_WRITE, .error = ENOSPC});
    ok(dr_close(disk, &err));
    assert_true(faultfs_fired(faults));
    faultfs_free(faults);
    says(*state, "b 512 on 0+2051;");
    check_clean(*state);
}

/* ------------------------------------------------------------------ what cannot be kept right */

static void make_two(struct dr_fs *fs)
{
    create(fs, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "b1", 64 * KIB, false);
    add(disk, "b2", 64 * KIB, true);
    ok(dr_close(disk, &err));
}

/* Give the n-th bitmap four bytes of extra data, of which nobody knows what they mean. */
static void put_extra(struct dr_fs *fs, unsigned n, bool compatible)
{
    uint8_t entry[32];
    uint64_t at = directory_at(fs) + n * 32;
    peek(fs, at, entry, sizeof(entry));
    put_be32(entry + 12, get_be32(entry + 12) | (compatible ? QCOW2_BITMAP_COMPATIBLE : 0));
    put_be32(entry + 20, 4);
    memcpy(entry + 24, "abcd", 4);
    memcpy(entry + 28, n ? "b2" : "b1", 2);
    patch(fs, at, entry, sizeof(entry));
}

static void writes_are_refused_where_an_enabled_bitmap_would_miss_them(void **state)
{
    make_two(*state);
    put_extra(*state, 0, false);
    struct dr_disk *disk = open_disk(*state);
    uint8_t sector[512] = {1};
    refused(dr_pwrite(disk, sector, 0, 512, 0, &err), ENOTSUP, "\"b1\" has extra data");
    refused(change(disk, "b1", DR_BITMAP_CLEAR, NULL, &err), ENOTSUP, "only be removed");
    ok(change(disk, "b1", DR_BITMAP_REMOVE, NULL, &err));
    ok(dr_pwrite(disk, sector, 0, 512, 0, &err));
    ok(dr_close(disk, &err));
    says(*state, "b2 65536 off;");
    check_clean(*state);
}

static void extra_data_stays(void **state)
{
    uint8_t entry[32];
    make_two(*state);
    put_extra(*state, 0, true);
    put_extra(*state, 1, false); /* not enabled: nobody has to understand it */
    struct dr_disk *disk = open_disk(*state);
    write_at(disk, 0, 512, 1);
    add(disk, "b3", 0, false);
    ok(change(disk, "b1", DR_BITMAP_DISABLE, NULL, &err));
    ok(dr_close(disk, &err));
    for (unsigned i = 0; i < 2; i++) {
        peek(*state, directory_at(*state) + i * 32, entry, sizeof(entry));
        assert_int_equal(get_be32(entry + 20), 4);
        assert_memory_equal(entry + 24, i ? "abcdb2" : "abcdb1", 6);
    }
}

static void damage_table(struct dr_fs *fs)
{
    uint8_t entry[8];
    peek(fs, directory_at(fs), entry, 8);
    patch(fs, get_be64(entry), "\0\0\0\0\0\0\x02\0", 8); /* 512: no cluster begins there */
}

static void same_names(struct dr_fs *fs)
{
    patch(fs, directory_at(fs) + 32 + 24, "b1", 2);
}

static void too_far(struct dr_fs *fs)
{
    patch(fs, directory_at(fs), "\0\0\0\x10\0\0\0\0", 8);
}

static void too_long(struct dr_fs *fs)
{
    patch(fs, directory_at(fs) + 20, "\x7f\xff\xff\xff", 4);
}

static void reserved_flag(struct dr_fs *fs)
{
    patch(fs, directory_at(fs) + 32 + 12, "\x80\0\0\0", 4);
}

static void a_damaged_directory_refuses_writes_and_nothing_else(void **state)
{
    static void (*const damages[])(struct dr_fs * fs) = {damage_table, same_names, too_far,
                                                         too_long, reserved_flag};
    (void)state;
    for (size_t i = 0; i < sizeof(damages) / sizeof(damages[0]); i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint8_t sector[512] = {1};
        make_two(fs);
        damages[i](fs);
        struct dr_disk *disk = open_disk(fs);
        refused(dr_pwrite(disk, sector, 0, 512, 0, &err), EIO, "bitmap");
        ok(dr_pread(disk, sector, 0, 512, &err));
        assert_int_equal(sector[0], 0);
        ok(dr_close(disk, &err));
        dr_fs_memory_free(fs);
    }
}

static void a_repair_gives_back_bitmaps_that_miss_nothing(void **state)
{
    make_two(*state);
    damage_table(*state);
    check(*state, DR_CHECK_FIX_ALL);
    says(*state, "b1 65536 on 0+2051;b2 65536 off;");
    check_clean(*state);
    same_names(*state);
    check(*state, DR_CHECK_FIX_ALL);
    says(*state, "b1 65536 on 0+2051;");
    check_clean(*state);
}

/* QEMU puts the extension where it cannot be switched at once. */
static void a_repair_removes_bitmaps_wherever_their_extension_is(void **state)
{
    make_two(*state);
    put_across(*state);
    reserved_flag(*state);
    check(*state, DR_CHECK_FIX_ALL);
    says(*state, "b1 65536 on;");
    check_clean(*state);
}

static void a_damaged_table_can_be_removed(void **state)
{
    make_two(*state);
    damage_table(*state);
    struct dr_disk *disk = open_disk(*state);
    ok(change(disk, "b1", DR_BITMAP_REMOVE, NULL, &err));
    write_at(disk, 0, 512, 1);
    ok(dr_close(disk, &err));
    says(*state, "b2 65536 off;");
    check_crashed(*state);
}

static void a_table_that_something_else_uses_is_not_written_to(void **state)
{
    uint8_t table[8], sector[512] = {1};
    make_two(*state);
    peek(*state, directory_at(*state), table, 8);
    struct dr_disk *disk = open_disk(*state);
    struct dr_image *image = disk->chain->images[0];
    uint64_t count = 0;
    ok(qcow2_count_now(image, get_be64(table), &count, &err)); /* loads nothing: frozen */
    ok(dr_close(disk, &err));
    patch(*state, directory_at(*state) + 32, table, 8); /* both have one table */
    check(*state, DR_CHECK_FIX_ALL);
    disk = open_disk(*state);
    refused(dr_pwrite(disk, sector, 0, 512, 0, &err), EIO, "counted 2 times");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ costs */

static void a_bitmap_costs_one_write_and_one_flush_when_writing_begins(void **state)
{
    uint64_t writes[2], flushes[2];
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *faults = faultfs_new(fs);
        create(fs, &geometries[0], SIZE);
        struct dr_disk *disk = open_disk(fs);
        write_at(disk, 0, SIZE, 1);
        add(disk, "idle", 0, true);
        if (i)
            add(disk, "b", 0, false);
        ok(dr_close(disk, &err));
        disk = open_disk(faultfs_fs(faults));
        write_at(disk, 0, 4096, 1);
        writes[i] = faultfs_count_of(faults, FAULTFS_WRITE);
        flushes[i] = faultfs_count_of(faults, FAULTFS_FLUSH);
        write_at(disk, 4096, 4096, 1);
        assert_int_equal(faultfs_count_of(faults, FAULTFS_WRITE), writes[i] + 1);
        assert_int_equal(faultfs_count_of(faults, FAULTFS_FLUSH), flushes[i]);
        ok(dr_close(disk, &err));
        faultfs_free(faults);
        dr_fs_memory_free(fs);
    }
    assert_int_equal(writes[0], 1); /* the data */
    assert_int_equal(flushes[0], 0);
    assert_int_equal(writes[1], 2);
    assert_int_equal(flushes[1], 1);
}

static int setup(void **state)
{
    *state = dr_fs_memory_new();
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    dr_fs_memory_free(*state);
    return 0;
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(changes_do_what_they_say),
        T(changes_of_a_disk_that_was_written_to_lose_no_marks),
        T(impossible_names_and_granularities_are_refused),
        T(arguments_that_are_missing_are_refused),
        T(a_reader_of_a_bitmap_may_stop),
        T(what_a_disk_grows_by_has_changed),
        T(bitmaps_are_added_while_the_refcount_table_grows),
        T(discards_and_zeros_are_noted_and_copies_that_change_nothing_are_not),
        T(a_promise_to_leave_the_view_leaves_the_bitmaps),
        T(many_threads_write_and_every_mark_is_there),
        T(where_marks_take_too_much_memory_more_counts_as_written),
        T(where_there_is_no_room_for_bits_all_of_them_are_set),
        T(writes_are_refused_where_an_enabled_bitmap_would_miss_them),
        T(extra_data_stays),
        T(a_damaged_directory_refuses_writes_and_nothing_else),
        T(a_repair_gives_back_bitmaps_that_miss_nothing),
        T(a_repair_removes_bitmaps_wherever_their_extension_is),
        T(a_damaged_table_can_be_removed),
        T(a_table_that_something_else_uses_is_not_written_to),
        T(a_bitmap_costs_one_write_and_one_flush_when_writing_begins),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
