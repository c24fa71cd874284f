/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The failing file system itself, and dr_replace with every single I/O failing in turn. */
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
#include "core/aside.h"
#include "faultfs.h"

struct world {
    struct dr_fs *memory;
    struct faultfs *faults;
    struct dr_fs *fs;
};

static int setup(void **state)
{
    struct world *w = calloc(1, sizeof(*w));
    w->memory = dr_fs_memory_new();
    w->faults = faultfs_new(w->memory);
    w->fs = faultfs_fs(w->faults);
    *state = w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    faultfs_free(w->faults);
    dr_fs_memory_free(w->memory);
    free(w);
    return 0;
}

static struct dr_file *make(struct world *w, const char *path, const void *bytes, size_t len)
{
    struct dr_file *f;
    assert_int_equal(dr_file_open(w->fs, path, DR_FILE_CREATE, &f, NULL), 0);
    assert_int_equal(dr_file_pwrite(f, bytes, 0, len, NULL), 0);
    return f;
}

static void every_io_is_counted_by_kind(void **state)
{
    struct world *w = *state;
    char buf[4] = "abc";
    struct dr_file *f = make(w, "/a", buf, 4);
    enum dr_file_extent kind;
    uint64_t run;
    dr_file_pread(f, buf, 0, 4, NULL);
    dr_file_zero(f, 0, 2, 0, NULL);
    dr_file_truncate(f, 100, NULL);
    dr_file_extent(f, 0, 100, &kind, &run, NULL);
    dr_file_flush(f, NULL);
    w->fs->ops->rename(w->fs, "/a", "/b", NULL);
    w->fs->ops->sync_dir(w->fs, "/b", NULL);
    w->fs->ops->unlink(w->fs, "/b", NULL);
    dr_file_unref(f);
    for (int k = 0; k < FAULTFS_KINDS; k++)
        if (k != FAULTFS_COPY && k != FAULTFS_LIST)
            assert_int_equal(faultfs_count_of(w->faults, (enum faultfs_kind)k), 1);
    assert_int_equal(faultfs_count(w->faults), FAULTFS_KINDS - 2);
}

static void the_nth_fails_once_or_for_good(void **state)
{
    struct world *w = *state;
    struct dr_file *f = make(w, "/a", "abcd", 4);
    for (int for_good = 0; for_good < 2; for_good++) {
        faultfs_arm(w->faults, &(struct faultfs_plan){.nth = 1,
                                                      .kinds = 1u << FAULTFS_WRITE,
                                                      .error = ENOSPC,
                                                      .for_good = for_good});
        assert_int_equal(dr_file_pwrite(f, "1", 0, 1, NULL), 0);
        assert_false(faultfs_fired(w->faults));
        assert_int_equal(dr_file_pwrite(f, "2", 0, 1, NULL), -ENOSPC);
        assert_true(faultfs_fired(w->faults));
        assert_int_equal(dr_file_pwrite(f, "3", 0, 1, NULL), for_good ? -ENOSPC : 0);
        faultfs_disarm(w->faults);
        assert_int_equal(dr_file_pwrite(f, "4", 0, 1, NULL), 0);
    }
    dr_file_unref(f);
}

static void a_partial_write_leaves_whole_sectors(void **state)
{
    struct world *w = *state;
    static uint8_t old[512 * 64], fresh[512 * 64], now[512 * 64];
    memset(old, 1, sizeof(old));
    memset(fresh, 2, sizeof(fresh));
    for (uint64_t seed = 0; seed < 4; seed++) {
        struct dr_file *f = make(w, "/a", old, sizeof(old));
        faultfs_arm(w->faults, &(struct faultfs_plan){.nth = 0, .partial = true, .seed = seed});
        assert_int_equal(dr_file_pwrite(f, fresh, 0, sizeof(fresh), NULL), -EIO);
        faultfs_disarm(w->faults);
        assert_int_equal(dr_file_pread(f, now, 0, sizeof(now), NULL), 0);
        int news = 0;
        for (size_t s = 0; s < 64; s++) {
            assert_int_equal(now[s * 512], now[s * 512 + 511]);
            news += now[s * 512] == 2;
        }
        assert_in_range(news, 1, 63);
        assert_int_equal(dr_file_size(f), sizeof(old));
        dr_file_unref(f);
        w->fs->ops->unlink(w->fs, "/a", NULL);
    }
}

static int refuse_flush(void *user, const struct faultfs_io *io)
{
    ++*(int *)user;
    return io->kind == FAULTFS_FLUSH && strcmp(io->path, "/a") == 0 ? -EROFS : 0;
}

static void an_observer_sees_and_may_refuse(void **state)
{
    struct world *w = *state;
    int seen = 0;
    struct dr_file *f = make(w, "/a", "abcd", 4);
    faultfs_observe(w->faults, refuse_flush, &seen);
    assert_int_equal(dr_file_pwrite(f, "x", 0, 1, NULL), 0);
    assert_int_equal(dr_file_flush(f, NULL), -EROFS);
    assert_int_equal(seen, 2);
    faultfs_observe(w->faults, NULL, NULL);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ dr_replace */

static int fill_new(void *user, struct dr_file *tmp, struct dr_error *err)
{
    (void)user;
    int r = dr_file_pwrite(tmp, "new", 0, 3, err);
    return r ? r : dr_file_zero(tmp, 3, 1000, 0, err);
}

static int count_leftover(void *user, const char *name)
{
    struct dr_aside a;
    if (dr_aside_parse(name, DR_ASIDE_FILE, &a))
        ++*(int *)user;
    return 0;
}

static int replace_a(struct world *w, struct dr_error *err)
{
    struct dr_file *old, *fresh = NULL;
    int r = dr_file_open(w->fs, "/a", DR_FILE_RDWR, &old, err);
    if (r)
        return r;
    r = dr_replace(w->fs, "/a", old, fill_new, NULL, &fresh, err);
    if (fresh && r)
        assert_int_equal(dr_file_flush(fresh, NULL), -EIO);
    dr_file_unref(old);
    dr_file_unref(fresh);
    return r;
}

static void assert_old_or_new(struct world *w, bool must_be_new)
{
    struct dr_file *f;
    char text[4] = "";
    assert_int_equal(dr_file_open(w->memory, "/a", 0, &f, NULL), 0);
    assert_int_equal(dr_file_pread(f, text, 0, 3, NULL), 0);
    bool fresh = strcmp(text, "new") == 0;
    assert_true(fresh || (!must_be_new && strcmp(text, "old") == 0));
    assert_int_equal(dr_file_size(f), fresh ? 1003 : 3);
    dr_file_unref(f);
}

static void replace_fails_whole_at_every_io(void **state)
{
    struct world *w = *state;
    uint64_t n = 1;
    for (uint64_t i = 0; i < n; i++) {
        dr_file_unref(make(w, "/a", "old", 3));
        struct dr_error err = DR_ERROR_INIT;
        faultfs_arm(w->faults, &(struct faultfs_plan){.nth = i, .partial = true});
        int r = replace_a(w, &err);
        bool fired = faultfs_fired(w->faults);
        n = faultfs_count(w->faults) + fired; /* until nothing is left to fail */
        faultfs_disarm(w->faults);
        assert_int_equal(r != 0, fired);
        assert_int_equal(err.errnum != 0, fired);
        assert_old_or_new(w, !fired);
        int leftovers = 0;
        w->fs->ops->list(w->fs, "/", count_leftover, &leftovers, NULL);
        assert_int_equal(leftovers, 0);
        w->fs->ops->unlink(w->fs, "/a", NULL);
    }
    assert_in_range(n, 7, 20); /* open, create, writes, flush, rename, sync_dir */
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(every_io_is_counted_by_kind),          T(the_nth_fails_once_or_for_good),
        T(a_partial_write_leaves_whole_sectors), T(an_observer_sees_and_may_refuse),
        T(replace_fails_whole_at_every_io),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
