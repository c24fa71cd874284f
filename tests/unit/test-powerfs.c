/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The power-cut file system itself, and dr_replace cut at every point. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/error.h"
#include "powerfs.h"

static int setup(void **state)
{
    *state = powerfs_new();
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    powerfs_free(*state);
    return 0;
}

static struct dr_file *make(struct powerfs *p, const char *path)
{
    struct dr_file *f;
    assert_int_equal(dr_file_open(powerfs_fs(p), path, DR_FILE_CREATE, &f, NULL), 0);
    return f;
}

static void fill(struct dr_file *f, uint64_t off, size_t len, int value)
{
    uint8_t *buf = malloc(len);
    memset(buf, value, len);
    assert_int_equal(dr_file_pwrite(f, buf, off, len, NULL), 0);
    free(buf);
}

/* A settled file of 16 sectors of 1. */
static struct dr_file *settled(struct powerfs *p)
{
    struct dr_file *f = make(p, "/d/a");
    fill(f, 0, 16 * 512, 1);
    powerfs_settle(p);
    assert_int_equal(powerfs_ops(p), 0);
    return f;
}

/* The first byte of each sector of a file on a disk as digits; "-" = no such file. */
static char *sectors(struct dr_fs *disk, const char *path, char text[64])
{
    struct dr_file *f;
    strcpy(text, "-");
    if (dr_file_open(disk, path, DR_FILE_FORCE_SHARE, &f, NULL))
        return text;
    size_t n = 0;
    for (; n * 512 < dr_file_size(f); n++) {
        uint8_t b[512];
        dr_file_pread_short(f, b, n * 512, 512, NULL, NULL);
        text[n] = (char)('0' + b[0]);
    }
    text[n] = '\0';
    dr_file_unref(f);
    return text;
}

static void assert_cut(struct powerfs *p, size_t prefix, enum powerfs_mode mode, uint64_t seed,
                       const char *expect)
{
    char text[64];
    struct dr_fs *disk = powerfs_cut(p, prefix, mode, seed);
    assert_non_null(disk);
    assert_string_equal(sectors(disk, "/d/a", text), expect);
    dr_fs_memory_free(disk);
}

static void what_was_flushed_is_there_and_the_rest_depends(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    fill(f, 0, 512, 2);
    assert_int_equal(dr_file_flush(f, NULL), 0);
    fill(f, 512, 512, 3);
    fill(f, 1024, 512, 4);
    assert_int_equal(powerfs_ops(p), 4);
    assert_cut(p, 0, POWERFS_ALL, 0, "1111111111111111");
    assert_cut(p, 1, POWERFS_ALL, 0, "2111111111111111");
    assert_cut(p, 1, POWERFS_NONE, 0, "1111111111111111");
    assert_cut(p, 2, POWERFS_NONE, 0, "2111111111111111");
    assert_cut(p, 4, POWERFS_NONE, 0, "2111111111111111");
    assert_cut(p, 4, POWERFS_ALL, 0, "2341111111111111");
    assert_cut(p, 4, POWERFS_ONLY_LAST, 0, "2141111111111111");
    assert_cut(p, 4, POWERFS_ALL_BUT_ONE, 0, "2141111111111111");
    assert_cut(p, 4, POWERFS_ALL_BUT_ONE, 1, "2311111111111111");
    assert_int_equal(powerfs_open_ops(p, 4), 2);
    assert_int_equal(powerfs_open_ops(p, 2), 0);
    dr_file_unref(f);
}

static void a_flush_is_for_its_own_file(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p), *g = make(p, "/d/b");
    fill(g, 0, 512, 5);
    fill(f, 0, 512, 2);
    assert_int_equal(dr_file_flush(g, NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "1111111111111111");
    dr_file_unref(f);
    dr_file_unref(g);
}

static void random_subsets_tear_writes_at_sectors(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    unsigned seen[17] = {0};
    fill(f, 0, 16 * 512, 2);
    for (uint64_t seed = 0; seed < 200; seed++) {
        char text[64], again[64];
        struct dr_fs *disk = powerfs_cut(p, 1, POWERFS_RANDOM, seed);
        sectors(disk, "/d/a", text);
        dr_fs_memory_free(disk);
        disk = powerfs_cut(p, 1, POWERFS_RANDOM, seed);
        assert_string_equal(sectors(disk, "/d/a", again), text);
        dr_fs_memory_free(disk);
        assert_int_equal(strspn(text, "12"), 16);
        int news = 0;
        for (int i = 0; i < 16; i++)
            news += text[i] == '2';
        seen[news]++;
    }
    assert_true(seen[0] > 20 && seen[16] > 20);
    assert_true(seen[6] + seen[7] + seen[8] + seen[9] + seen[10] > 20);
    dr_file_unref(f);
}

static void truncates_and_zeros_arrive_or_not(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    assert_int_equal(dr_file_zero(f, 512, 1024, 0, NULL), 0);
    assert_int_equal(dr_file_truncate(f, 2048, NULL), 0);
    assert_cut(p, 2, POWERFS_NONE, 0, "1111111111111111");
    assert_cut(p, 2, POWERFS_ALL, 0, "1001");
    assert_cut(p, 2, POWERFS_ONLY_LAST, 0, "1111");
    assert_int_equal(dr_file_flush(f, NULL), 0);
    assert_cut(p, 3, POWERFS_NONE, 0, "1001");
    dr_file_unref(f);
}

static void names_need_their_directory_synced(void **state)
{
    struct powerfs *p = *state;
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_file *f = make(p, "/d/a");
    fill(f, 0, 512, 7);
    assert_int_equal(dr_file_flush(f, NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "-");
    assert_cut(p, SIZE_MAX, POWERFS_ALL, 0, "7");
    assert_int_equal(fs->ops->sync_dir(fs, "/other/x", NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "-");
    assert_int_equal(fs->ops->sync_dir(fs, "/d/whatever", NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "7");
    assert_int_equal(fs->ops->unlink(fs, "/d/a", NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "7");
    assert_cut(p, SIZE_MAX, POWERFS_ALL, 0, "-");
    dr_file_unref(f);
}

static void a_name_may_arrive_before_the_bytes(void **state)
{
    struct powerfs *p = *state;
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_file *f = settled(p), *g = make(p, "/d/b");
    fill(g, 0, 512, 9);
    assert_int_equal(fs->ops->rename(fs, "/d/b", "/d/a", NULL), 0);
    assert_int_equal(fs->ops->sync_dir(fs, "/d/a", NULL), 0);
    assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, "");
    assert_cut(p, 3, POWERFS_NONE, 0, "1111111111111111");
    assert_cut(p, 3, POWERFS_ONLY_LAST, 0, "");
    dr_file_unref(f);
    dr_file_unref(g);
}

static void skipped_flushes_claim_success(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    powerfs_skip_flush(p, 1);
    for (int i = 2; i < 5; i++) {
        fill(f, (uint64_t)(i - 2) * 512, 512, i);
        assert_int_equal(dr_file_flush(f, NULL), 0);
        const char *expect[] = {"2111111111111111", "2111111111111111", "2341111111111111"};
        assert_cut(p, SIZE_MAX, POWERFS_NONE, 0, expect[i - 2]);
    }
    assert_int_equal(powerfs_flushes(p), 3);
    dr_file_unref(f);
}

static void an_uncut_disk_is_the_live_one(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    uint64_t seed = 3;
    for (int i = 0; i < 300; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uint64_t off = (seed >> 33) % 20000, len = 1 + (seed >> 50) % 3000;
        if (i % 10 == 9)
            assert_int_equal(dr_file_truncate(f, off, NULL), 0);
        else if (i % 3 == 0)
            assert_int_equal(dr_file_zero(f, off, len, 0, NULL), 0);
        else
            fill(f, off, (size_t)len, 1 + i % 9);
        if (i % 40 == 39)
            assert_int_equal(dr_file_flush(f, NULL), 0);
        char live[64], cut[64];
        struct dr_fs *disk = powerfs_cut(p, SIZE_MAX, i % 40 == 39 ? POWERFS_NONE : POWERFS_ALL, 0);
        assert_string_equal(sectors(disk, "/d/a", cut), sectors(powerfs_fs(p), "/d/a", live));
        dr_fs_memory_free(disk);
    }
    dr_file_unref(f);
}

static void the_log_can_be_read(void **state)
{
    struct powerfs *p = *state;
    char text[128];
    struct dr_file *f = settled(p);
    fill(f, 512, 1024, 2);
    powerfs_fs(p)->ops->rename(powerfs_fs(p), "/d/a", "/d/c", NULL);
    assert_int_equal(powerfs_op_kind(p, 0), POWERFS_WRITE);
    assert_string_equal(powerfs_op_text(p, 0, text, sizeof(text)), "0 write /d/a 512+1024");
    assert_string_equal(powerfs_op_text(p, 1, text, sizeof(text)), "1 rename /d/a -> /d/c");
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ dr_replace */

static int fill_new(void *user, struct dr_file *tmp, struct dr_error *err)
{
    (void)user;
    uint8_t buf[4 * 512];
    memset(buf, 2, sizeof(buf));
    return dr_file_pwrite(tmp, buf, 0, sizeof(buf), err);
}

static void replace_a(struct powerfs *p, struct dr_file *old)
{
    struct dr_error err = DR_ERROR_INIT;
    if (dr_replace(powerfs_fs(p), "/d/a", old, fill_new, NULL, NULL, &err))
        fail_msg("%s", err.text);
}

/* How many cuts leave neither the whole old nor the whole new file (or, after the end, not the new
 * one). */
static unsigned broken_cuts(struct powerfs *p)
{
    unsigned broken = 0;
    for (size_t prefix = 0; prefix <= powerfs_ops(p); prefix++)
        for (int mode = 0; mode < POWERFS_MODES; mode++)
            for (uint64_t seed = 0; seed < 10; seed++) {
                char text[64];
                struct dr_fs *disk = powerfs_cut(p, prefix, (enum powerfs_mode)mode, seed);
                sectors(disk, "/d/a", text);
                bool fresh = strcmp(text, "2222") == 0;
                bool old = strcmp(text, "1111111111111111") == 0;
                broken += !fresh && (!old || prefix == powerfs_ops(p));
                dr_fs_memory_free(disk);
            }
    return broken;
}

static void replace_survives_every_power_cut(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    replace_a(p, f);
    assert_int_equal(broken_cuts(p), 0);
    dr_file_unref(f);
}

static void a_replace_without_its_flushes_is_caught(void **state)
{
    struct powerfs *p = *state;
    struct dr_file *f = settled(p);
    powerfs_skip_flush(p, 0);
    replace_a(p, f);
    assert_true(broken_cuts(p) > 0);
    dr_file_unref(f);
    assert_int_equal(dr_file_open(powerfs_fs(p), "/d/a", DR_FILE_RDWR, &f, NULL), 0);
    fill(f, 0, 16 * 512, 1);
    powerfs_settle(p);
    powerfs_skip_sync_dir(p, 0);
    replace_a(p, f);
    assert_true(broken_cuts(p) > 0);
    dr_file_unref(f);
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(what_was_flushed_is_there_and_the_rest_depends),
        T(a_flush_is_for_its_own_file),
        T(random_subsets_tear_writes_at_sectors),
        T(truncates_and_zeros_arrive_or_not),
        T(names_need_their_directory_synced),
        T(a_name_may_arrive_before_the_bytes),
        T(skipped_flushes_claim_success),
        T(an_uncut_disk_is_the_live_one),
        T(the_log_can_be_read),
        T(replace_survives_every_power_cut),
        T(a_replace_without_its_flushes_is_caught),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
