/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps in a file beside the image: what is left of them when the power goes or a call fails. The
 * file systems here know no times, and no samples are taken: only the order of writes keeps a
 * bitmap that lacks a change from being trusted. */
#include "faultfs.h"
#include "powerfs.h"
#include "slower.h"
#include "test-bitmaps-beside.h"

static int no_samples(void **state)
{
    (void)state;
    dr_noting_samples = 0;
    return 0;
}

/* ------------------------------------------------------------------ changes of bitmaps */

static const struct {
    const char *name;
    enum dr_bitmap_action action;
    const char *source;
} changes[] = {
    {"new", DR_BITMAP_ADD, NULL},    {"one", DR_BITMAP_REMOVE, NULL},
    {"one", DR_BITMAP_CLEAR, NULL},  {"one", DR_BITMAP_DISABLE, NULL},
    {"two", DR_BITMAP_ENABLE, NULL}, {"two", DR_BITMAP_MERGE, "one"},
};
#define N_CHANGES (sizeof(changes) / sizeof(changes[0]))

static int do_change(struct dr_disk *disk, size_t i, struct dr_error *err)
{
    return change(disk, changes[i].name, changes[i].action, changes[i].source, err);
}

/* "one" has bits, "two", coarser and disabled, has others. */
static void make_bitmaps(struct dr_fs *fs, const struct kind *k)
{
    create(fs, k);
    struct dr_disk *disk = open_disk(fs);
    add(disk, "two", 64 * KIB, false);
    write_at(disk, 512 * KIB, 4 * KIB, 1);
    ok(change(disk, "two", DR_BITMAP_DISABLE, NULL, &err));
    add(disk, "one", 512, false);
    write_at(disk, 64 * KIB, 6 * KIB, 2);
    ok(dr_close(disk, &err));
}

static void a_cut_in_a_change_leaves_the_old_bitmaps_or_the_new_ones(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_CHANGES; round++) {
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        make_bitmaps(fs, &kinds[0]);
        powerfs_settle(power);
        struct text before = described(fs);
        struct dr_disk *disk = open_disk(fs);
        ok(do_change(disk, round, &err));
        ok(dr_close(disk, &err));
        struct text after = described(fs);
        assert_string_not_equal(before.s, after.s);
        bool old = false, new = false;
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k++)
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                struct text now = described(cut);
                old |= strcmp(now.s, before.s) == 0;
                new |= strcmp(now.s, after.s) == 0;
                if (strcmp(now.s, before.s) != 0)
                    assert_string_equal(now.s, after.s);
                dr_fs_memory_free(cut);
            }
        assert_true(old && new);
        powerfs_free(power);
    }
}

static void any_call_may_fail_during_a_change(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_CHANGES * 2; round++) {
        bool failed = true, live = round >= N_CHANGES;
        for (uint64_t nth = 0; failed; nth++) {
            struct dr_fs *fs = dr_fs_memory_new();
            make_bitmaps(fs, &kinds[0]);
            struct text before = described(fs);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            if (live)
                write_at(disk, 64 * KIB, 512, 3); /* where both have bits */
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = do_change(disk, round % N_CHANGES, NULL);
            failed = faultfs_fired(faults);
            faultfs_disarm(faults);
            int closed = dr_close(disk, NULL); /* fails if a flush of the image has */
            faultfs_free(faults);
            struct text now = described(fs);
            if (!failed)
                assert_int_equal(r | closed, 0);
            if (closed < 0)
                assert_non_null(strstr(now.s, "inconsistent"));
            else if (r == 0)
                assert_string_not_equal(now.s, before.s);
            else if (live) /* who goes on without the change closes with the old ones */
                assert_string_equal(now.s, before.s);
            dr_fs_memory_free(fs);
        }
    }
}

/* ------------------------------------------------------------------ never a bit too few */

struct cover {
    const uint8_t *was, *is;
    uint64_t size; /* of both */
    uint64_t next; /* all is well up to here */
    bool missed;
};

static int cover_range(void *user, uint64_t off, uint64_t len)
{
    struct cover *c = user;
    uint64_t end = dr_min(off, c->size);
    if (end > c->next && memcmp(c->was + c->next, c->is + c->next, end - c->next))
        c->missed = true;
    c->next = dr_min(off + len, c->size);
    return 0;
}

/* Is every enabled bitmap inconsistent, or has it all that differs from `was`? *trusted counts
 * those that are trusted. */
static bool covered(struct dr_fs *fs, const uint8_t *was, uint64_t was_size, size_t *trusted)
{
    struct dr_bitmap *list = NULL;
    uint64_t size;
    size_t n = 0;
    struct dr_disk *disk;
    bool all = true;
    CLEANUP_FREE uint8_t *is = read_all(fs, &size);
    ok(try_open(fs, 0, &disk, &err));
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    assert_int_equal(n, 2);
    *trusted = 0;
    for (size_t i = 0; i < n; i++) {
        struct cover c = {was, is, dr_min(size, was_size), 0, false};
        if (list[i].inconsistent)
            continue;
        ok(dr_disk_bitmap_read(disk, list[i].name, cover_range, &c, &err));
        cover_range(&c, c.size, 0);
        all &= !c.missed;
        ++*trusted;
    }
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
    return all;
}

static int write_much(struct dr_disk *disk, struct dr_error *err)
{
    CLEANUP_FREE uint8_t *buf = malloc(40 * KIB);
    memset(buf, 5, 40 * KIB);
    int r = dr_pwrite(disk, buf, 100 * KIB + 7, 9 * KIB, 0, err);
    if (r == 0)
        r = dr_flush(disk, err);
    if (r == 0)
        r = dr_zero(disk, 256 * KIB, 64 * KIB, DR_MAY_UNMAP, err);
    return r < 0 ? r : dr_pwrite(disk, buf, 700 * KIB, 20 * KIB, 0, err);
}

static int shrink_and_grow(struct dr_disk *disk, struct dr_error *err)
{
    int r = dr_truncate(disk, 512 * KIB, err);
    return r < 0 ? r : dr_truncate(disk, SIZE, err);
}

static int write_and_change(struct dr_disk *disk, struct dr_error *err)
{
    uint8_t sector[512] = {3};
    int r = dr_pwrite(disk, sector, 512, 512, 0, err);
    if (r == 0)
        r = change(disk, "two", DR_BITMAP_MERGE, "one", err);
    return r < 0 ? r : dr_pwrite(disk, sector, 64 * KIB, 512, 0, err);
}

static int (*const works[])(struct dr_disk *disk,
                            struct dr_error *err) = {write_much, write_and_change, shrink_and_grow};
#define N_WORKS (sizeof(works) / sizeof(works[0]))

static uint8_t *make_covered(struct dr_fs *fs, const struct kind *k)
{
    uint64_t size;
    create(fs, k);
    struct dr_disk *disk = open_disk(fs);
    write_at(disk, 0, 300 * KIB, 9);
    write_at(disk, 600 * KIB, 200 * KIB, 8);
    add(disk, "one", 512, false);
    add(disk, "two", 64 * KIB, false);
    ok(dr_close(disk, &err));
    return read_all(fs, &size);
}

/* Does some cut leave a bitmap that is trusted and misses a change? */
static bool some_cut_lies(struct powerfs *power, const uint8_t *was, size_t *trusted)
{
    bool lies = false;
    for (size_t k = 0, n = powerfs_ops(power); k <= n && !lies; k = powerfs_next(power, k, 60))
        for (unsigned mode = 0; mode < POWERFS_MODES && !lies; mode++) {
            size_t some;
            struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
            lies = !covered(cut, was, SIZE, &some);
            *trusted += some;
            dr_fs_memory_free(cut);
        }
    return lies;
}

static void a_cut_leaves_bitmaps_that_miss_nothing_or_that_nobody_trusts(void **state)
{
    (void)state;
    for (size_t round = 0; round < N_WORKS * N_KINDS; round++) {
        if (round % N_WORKS == 2 && round / N_WORKS > 0) /* not every format shrinks */
            continue;
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        CLEANUP_FREE uint8_t *was = make_covered(fs, &kinds[round / N_WORKS]);
        size_t trusted = 0, at_end;
        powerfs_settle(power);
        struct dr_disk *disk = open_disk(fs);
        ok(works[round % N_WORKS](disk, &err));
        ok(dr_close(disk, &err));
        assert_true(covered(fs, was, SIZE, &at_end));
        assert_int_equal(at_end, 2);
        assert_false(some_cut_lies(power, was, &trusted));
        assert_true(trusted > 0);
        powerfs_free(power);
    }
}

static void a_mark_that_is_not_durable_before_the_first_write_is_found_by_these_tests(void **state)
{
    (void)state;
    ONLY_IN_A_PLAIN_BUILD();
    struct powerfs *power = powerfs_new();
    struct dr_fs *fs = powerfs_fs(power);
    CLEANUP_FREE uint8_t *was = make_covered(fs, &kinds[0]);
    size_t trusted = 0;
    powerfs_settle(power);
    powerfs_skip_flush(power, 0);
    struct dr_disk *disk = open_disk(fs);
    ok(write_much(disk, &err));
    ok(dr_close(disk, &err));
    assert_true(some_cut_lies(power, was, &trusted));
    powerfs_free(power);
}

static void any_call_may_fail_while_the_disk_is_written_to(void **state)
{
    (void)state;
    for (size_t round = 0; round < 2 * N_KINDS; round++) {
        bool failed = true;
        for (uint64_t nth = 0; failed; nth += nth < 20 ? 1 : 3) {
            struct dr_fs *fs = dr_fs_memory_new();
            size_t trusted;
            CLEANUP_FREE uint8_t *was = make_covered(fs, &kinds[round / 2]);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .for_good = nth % 2});
            works[round % 2](disk, NULL);
            int r = dr_close(disk, NULL);
            failed = faultfs_fired(faults);
            faultfs_disarm(faults);
            faultfs_free(faults);
            assert_true(covered(fs, was, SIZE, &trusted));
            if (!failed) {
                assert_int_equal(r, 0);
                assert_int_equal(trusted, 2);
            }
            dr_fs_memory_free(fs);
        }
    }
}

static void read_header(struct dr_fs *fs, uint64_t at, uint8_t *bytes)
{
    struct dr_file *f;
    ok(dr_file_open(fs, BESIDE, 0, &f, &err));
    ok(dr_file_pread(f, bytes, at, 512, &err));
    dr_file_unref(f);
}

/* A cut in the second try would else find neither header whole. */
static void a_header_that_could_not_be_written_is_tried_again_at_its_place(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *faults = faultfs_new(fs);
    struct dr_bitmap_file b;
    struct dr_file *like;
    uint8_t before[512], after[512];
    size_t trusted;
    CLEANUP_FREE uint8_t *was = make_covered(fs, &kinds[0]);
    ok(dr_bitmap_file_load(faultfs_fs(faults), BESIDE, &b, &err));
    uint64_t counts = b.generation % 2 * 4096;
    read_header(fs, counts, before);
    ok(dr_file_open(faultfs_fs(faults), PATH, DR_FILE_RDWR, &like, &err));
    faultfs_arm(faults, &(struct faultfs_plan){.kinds = 1u << FAULTFS_FLUSH});
    assert_int_equal(dr_bitmap_file_use(&b, like, NULL), -EIO);
    faultfs_disarm(faults);
    ok(dr_bitmap_file_use(&b, like, &err));
    read_header(fs, counts, after);
    assert_memory_equal(before, after, sizeof(before));
    dr_bitmap_file_free(&b);
    dr_file_unref(like);
    faultfs_free(faults);
    assert_true(covered(fs, was, SIZE, &trusted));
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ commit */

/* Here only what the commit notes tells a base from one that nobody wrote to. */
static void a_commit_is_noted_in_the_bitmaps_of_its_base(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_KINDS; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        bool vmdk = strcmp(kinds[i].format, "vmdk") == 0;
        struct dr_create_options o = {.format = vmdk ? "vmdk" : "qcow2",
                                      .backing = "disk",
                                      .backing_format = kinds[i].format};
        struct dr_commit_options c = {0};
        struct dr_disk *disk;
        create(fs, &kinds[i]);
        disk = open_disk(fs);
        add(disk, "b", 64 * KIB, false);
        ok(dr_close(disk, &err));
        ok(dr_create_fs(fs, "/dir/child", &o, &err));
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        ok(dr_open_fs(fs, "/dir/child", &open, &disk, &err));
        write_at(disk, 64 * KIB, 512, 3);
        ok(dr_close(disk, &err));
        says(fs, "b 65536 on;");
        ok(dr_commit_fs(fs, "/dir/child", &c, NULL, &err));
        says(fs, "b 65536 on 128+128;");
        dr_fs_memory_free(fs);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_cut_in_a_change_leaves_the_old_bitmaps_or_the_new_ones),
        cmocka_unit_test(any_call_may_fail_during_a_change),
        cmocka_unit_test(a_cut_leaves_bitmaps_that_miss_nothing_or_that_nobody_trusts),
        cmocka_unit_test(a_mark_that_is_not_durable_before_the_first_write_is_found_by_these_tests),
        cmocka_unit_test(any_call_may_fail_while_the_disk_is_written_to),
        cmocka_unit_test(a_header_that_could_not_be_written_is_tried_again_at_its_place),
        cmocka_unit_test(a_commit_is_noted_in_the_bitmaps_of_its_base),
    };
    return cmocka_run_group_tests(tests, no_samples, NULL);
}
