/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What formats with counts, internal snapshots and data files elsewhere ask of the core, by means
 * of the toy. */
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "core/core.h"
#include "faultfs.h"
#include "powerfs.h"
#include "toy.h"
#include "outcome.h"

#define KIB  1024u
#define MIB  (1024u * KIB)
#define SIZE (96 * KIB)
#define PATH "dir/disk.toy"

/* The geometries that snapshots are tried in. */
struct geometry {
    struct dr_option options[3];
    size_t n;
};
static const struct geometry geometries[] = {
    {.n = 0},
    {.options = {{"cluster", "512"}, {"roots", "2"}, {"l2_entries", "64"}}, .n = 3},
    {.options = {{"l2_entries", "1024"}}, .n = 1},
    {.options = {{"data_file", "disk.data"}}, .n = 1},
};
#define N_GEOMETRIES (sizeof(geometries) / sizeof(geometries[0]))

static void create(struct dr_fs *fs, const struct geometry *g, uint64_t size)
{
    struct dr_create_params p = {.size = size, .options = g->options, .n_options = g->n};
    ok(dr_format_toy.create(fs, PATH, &p, &err));
}

static struct dr_disk *open_disk(struct dr_fs *fs)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    return disk;
}

static struct dr_image *top_of(struct dr_disk *disk)
{
    return disk->chain->images[0];
}

/* Bytes that tell where they stand and which version they are. */
static void fill(uint8_t *buf, uint64_t off, size_t len, unsigned version)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)(version * 101 + (off + i) / 512 * 7 + 1);
}

static void write_version(struct dr_disk *disk, uint64_t off, size_t len, unsigned version)
{
    uint8_t *buf = malloc(len);
    fill(buf, off, len, version);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    free(buf);
}

/* Version 1: all but a hole in the middle. Version 2: another part, over it. */
static void make_first(struct dr_disk *disk)
{
    write_version(disk, 0, 30 * KIB, 1);
    write_version(disk, 50 * KIB, SIZE - 50 * KIB, 1);
}

static void make_second(struct dr_disk *disk)
{
    write_version(disk, 20 * KIB + 512, 40 * KIB, 2);
    ok(dr_discard(disk, 80 * KIB, 8 * KIB, &err));
}

static uint8_t *read_all(struct dr_disk *disk)
{
    uint8_t *buf = malloc(SIZE);
    ok(dr_pread(disk, buf, 0, SIZE, &err));
    return buf;
}

static void say(void *user, const char *line)
{
    (void)user;
    print_message("%s\n", line);
}

static void check_clean(struct dr_fs *fs, bool leaks_allowed)
{
    struct dr_image *image;
    struct dr_check_result result = {.report = say};
    ok(dr_image_open(fs, PATH, "toy", 0, &image, &err));
    ok(toy_check(image, 0, &result, &err));
    assert_int_equal(result.corruptions, 0);
    if (!leaks_allowed)
        assert_int_equal(result.leaks, 0);
    dr_image_unref(image, NULL);
}

static int setup(void **state)
{
    *state = dr_fs_memory_new();
    dr_format_register(&dr_format_toy);
    return 0;
}

static int teardown(void **state)
{
    struct dr_cache_limits limits = {.metadata = 64 * MIB};
    dr_set_cache_limits(&limits, NULL);
    dr_format_register(NULL);
    dr_fs_memory_free(*state);
    return 0;
}

/* ------------------------------------------------------------------ internal snapshots */

static void applying_a_snapshot_brings_its_bytes_back(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &geometries[i], SIZE);
        struct dr_disk *disk = open_disk(fs);
        make_first(disk);
        uint8_t *first = read_all(disk), *now;
        ok(dr_image_snapshot_create(top_of(disk), "one", &err));
        make_second(disk);
        uint8_t *second = read_all(disk);
        assert_memory_not_equal(first, second, SIZE);
        ok(dr_image_snapshot_create(top_of(disk), "two", &err));
        ok(dr_image_snapshot_apply(top_of(disk), "1", &err));
        now = read_all(disk);
        assert_memory_equal(now, first, SIZE);
        free(now);
        write_version(disk, 0, SIZE, 3); /* changes neither snapshot */
        ok(dr_image_snapshot_apply(top_of(disk), "2", &err));
        now = read_all(disk);
        assert_memory_equal(now, second, SIZE);
        free(now);
        ok(dr_image_snapshot_delete(top_of(disk), "2", &err));
        now = read_all(disk);
        assert_memory_equal(now, second, SIZE);
        free(now);
        ok(dr_close(disk, &err));
        check_clean(fs, false);
        free(first);
        free(second);
        dr_fs_memory_free(fs);
    }
}

/* With the snapshot nothing is left that its places are counted for: the space is given back. */
static void deleting_a_snapshot_gives_its_space_back(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *counted = faultfs_new(fs);
    create(faultfs_fs(counted), &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(faultfs_fs(counted));
    write_version(disk, 0, SIZE, 1);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    write_version(disk, 0, SIZE, 2);
    faultfs_reset(counted);
    ok(dr_image_snapshot_delete(top_of(disk), "1", &err));
    unsigned punches = (unsigned)faultfs_count_of(counted, FAULTFS_ZERO);
    assert_in_range(punches, 1, 4); /* 24 clusters of data in a row, and tables */
    uint8_t *now = read_all(disk), want[SIZE];
    fill(want, 0, SIZE, 2);
    assert_memory_equal(now, want, SIZE);
    free(now);
    ok(dr_close(disk, &err));
    check_clean(faultfs_fs(counted), false);
    faultfs_free(counted);
}

static int count_snapshot(void *user, const struct dr_snapshot_info *info)
{
    unsigned *n = user;
    assert_non_null(info->id);
    ++*n;
    return 0;
}

static void snapshots_are_listed_and_unknown_ones_refused(void **state)
{
    struct dr_fs *fs = *state;
    unsigned n = 0;
    create(fs, &geometries[0], SIZE);
    struct dr_disk *disk = open_disk(fs);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    ok(dr_image_snapshot_create(top_of(disk), "two", &err));
    ok(dr_image_snapshot_list(top_of(disk), count_snapshot, &n, &err));
    assert_int_equal(n, 2);
    refused(dr_image_snapshot_apply(top_of(disk), "4", &err), ENOENT, "has no snapshot 4");
    ok(dr_close(disk, &err));
}

static void formats_without_snapshots_inside_say_so(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_file *f;
    struct dr_image *image;
    ok(dr_file_open(fs, "dir/a.raw", DR_FILE_CREATE, &f, &err));
    dr_file_unref(f);
    ok(dr_image_open(fs, "dir/a.raw", "raw", DR_OPEN_RDWR, &image, &err));
    refused(dr_image_snapshot_create(image, "x", &err), ENOTSUP, "raw images have no snapshots");
    dr_image_unref(image, NULL);
}

/* ------------------------------------------------------------------ snapshots, cut off anywhere */

enum action { CREATE, APPLY, DELETE, N_ACTIONS };

static int act(struct dr_disk *disk, enum action action, struct dr_error *err)
{
    if (action == CREATE)
        return dr_image_snapshot_create(top_of(disk), "two", err);
    if (action == APPLY)
        return dr_image_snapshot_apply(top_of(disk), "1", err);
    return dr_image_snapshot_delete(top_of(disk), "1", err);
}

struct states {
    uint8_t *first, *second;
};

/* One snapshot with the first state, and the second state on top of it. */
static struct states make_states(struct dr_fs *fs, const struct geometry *g)
{
    struct states s;
    create(fs, g, SIZE);
    struct dr_disk *disk = open_disk(fs);
    make_first(disk);
    s.first = read_all(disk);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    make_second(disk);
    s.second = read_all(disk);
    ok(dr_close(disk, &err));
    return s;
}

static void states_free(struct states *s)
{
    free(s->first);
    free(s->second);
}

/* The disk shows the second state, or, when that is being applied, perhaps the first; opening it
 * for writing mends it. */
static void check_after(struct dr_fs *fs, const struct states *s, enum action action)
{
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, NULL, &disk, &err));
    uint8_t *now = read_all(disk);
    bool second = memcmp(now, s->second, SIZE) == 0;
    if (!second && (action != APPLY || memcmp(now, s->first, SIZE) != 0))
        fail_msg("the disk shows neither state (action %d)", action);
    free(now);
    ok(dr_close(disk, &err));
    check_clean(fs, true);
    disk = open_disk(fs);
    write_version(disk, 0, SIZE, 5);
    ok(dr_close(disk, &err));
    check_clean(fs, false);
}

static void the_power_may_go_during_each_change_of_snapshots(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_ACTIONS * N_GEOMETRIES; round++) {
        enum action action = round % N_ACTIONS;
        struct powerfs *power = powerfs_new();
        struct dr_fs *fs = powerfs_fs(power);
        struct states s = make_states(fs, &geometries[round / N_ACTIONS]);
        powerfs_settle(power);
        struct dr_disk *disk = open_disk(fs);
        ok(act(disk, action, &err));
        ok(dr_close(disk, &err));
        for (size_t k = 0, n = powerfs_ops(power); k <= n; k = powerfs_next(power, k, 40))
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                struct dr_fs *cut = powerfs_cut(power, k, mode, k * 7 + mode);
                check_after(cut, &s, action);
                dr_fs_memory_free(cut);
            }
        states_free(&s);
        powerfs_free(power);
    }
}

static void any_call_may_fail_during_a_change_of_snapshots(void **state)
{
    (void)state;
    for (unsigned round = 0; round < N_ACTIONS * 2; round++) {
        enum action action = round % N_ACTIONS;
        bool failed = true;
        for (uint64_t nth = 0; failed; nth += 1 + nth / 16) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct states s = make_states(fs, &geometries[round / N_ACTIONS]);
            struct faultfs *faults = faultfs_new(fs);
            struct dr_disk *disk = open_disk(faultfs_fs(faults));
            faultfs_arm(faults, &(struct faultfs_plan){.nth = nth, .error = EIO});
            int r = act(disk, action, NULL);
            failed = faultfs_fired(faults);
            if (!failed && r < 0)
                fail_msg("fails without a fault: %d", r);
            faultfs_disarm(faults);
            dr_close(disk, NULL);
            faultfs_free(faults);
            check_after(fs, &s, action);
            states_free(&s);
            dr_fs_memory_free(fs);
        }
    }
}

/* ------------------------------------------------------------------ writers beside a snapshot */

struct writer {
    struct dr_disk *disk;
    _Atomic unsigned version, stop;
};

static void *write_in_place(void *user)
{
    struct writer *w = user;
    uint8_t buf[4 * KIB];
    for (unsigned v = 1; !atomic_load(&w->stop); v++) {
        memset(buf, (int)(v % 250 + 1), sizeof(buf));
        atomic_store(&w->version, v);
        if (dr_pwrite(w->disk, buf, 0, sizeof(buf), 0, NULL) < 0)
            return w;
    }
    return NULL;
}

/* A writer that had looked up its place before would write into the snapshot. */
static void writes_in_place_do_not_reach_a_snapshot_that_exists(void **state)
{
    (void)state;
    for (unsigned round = 0; round < 20; round++) {
        struct dr_fs *fs = dr_fs_memory_new();
        create(fs, &geometries[0], SIZE);
        struct writer w = {.disk = open_disk(fs)};
        pthread_t thread;
        void *result;
        uint8_t at_once[4 * KIB], later[4 * KIB];
        write_version(w.disk, 0, 4 * KIB, 1);
        assert_int_equal(pthread_create(&thread, NULL, write_in_place, &w), 0);
        while (atomic_load(&w.version) < round * 3 + 2)
            sched_yield();
        ok(dr_image_snapshot_create(top_of(w.disk), "one", &err));
        struct toy *t = top_of(w.disk)->state;
        uint8_t raw[16];
        struct dr_file *f = top_of(w.disk)->files[0];
        ok(dr_file_pread(f, raw, t->snapshots[0], 8, &err));
        ok(dr_file_pread(f, raw, get_be64(raw), 16, &err));
        ok(dr_file_pread(f, at_once, toy_get_entry(raw).host, sizeof(at_once), &err));
        unsigned seen = atomic_load(&w.version);
        while (atomic_load(&w.version) < seen + 20)
            sched_yield();
        atomic_store(&w.stop, 1);
        pthread_join(thread, &result);
        assert_null(result);
        ok(dr_close(w.disk, &err));
        ok(toy_snapshot_read(fs, PATH, later, sizeof(later), 0, &err));
        assert_memory_equal(later, at_once, sizeof(later));
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ large tables */

static void a_table_larger_than_the_cache_is_copied(void **state)
{
    struct dr_fs *fs = *state;
    static const struct geometry large = {.options = {{"l2_entries", "65000"}, {"block", "2048"}},
                                          .n = 2};
    struct dr_cache_limits limits = {.metadata = MIB};
    uint8_t byte;
    create(fs, &large, 200ull * MIB);
    ok(dr_set_cache_limits(&limits, &err));
    struct dr_disk *disk = open_disk(fs);
    for (unsigned i = 0; i < 200; i++) /* an entry in each page of the table */
        write_version(disk, i * 1000 * KIB, 512, i);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    write_version(disk, 5 * MIB, 512, 1);
    ok(dr_flush(disk, &err));
    for (unsigned i = 0; i < 200; i++) {
        uint8_t want[512];
        fill(want, i * 1000 * KIB, 512, i);
        ok(dr_pread(disk, &byte, i * 1000 * KIB, 1, &err));
        assert_int_equal(byte, want[0]);
    }
    ok(dr_close(disk, &err));
    check_clean(fs, false);
}

/* ------------------------------------------------------------------ data files elsewhere */

static void a_data_file_elsewhere_must_be_allowed(void **state)
{
    struct dr_fs *fs = *state;
    static const struct geometry elsewhere = {.options = {{"data_file", "/other/disk.data"}},
                                              .n = 1};
    const char *allow[] = {"/other", NULL};
    struct dr_open_options o = {.flags = DR_OPEN_RDWR, .allow_paths = allow};
    struct dr_disk *disk;
    create(fs, &elsewhere, SIZE);
    refused(dr_open_fs(fs, PATH, NULL, &disk, &err), EACCES,
            "refuses to open its data file /other/disk.data");
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    write_version(disk, 0, 4 * KIB, 1);
    ok(dr_close(disk, &err));
}

static void a_data_file_that_the_user_names_replaces_the_recorded_one(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options o = {.flags = DR_OPEN_RDWR, .data_file = "/moved/volume"};
    struct dr_disk *disk;
    uint8_t want[512], got[512];
    create(fs, &geometries[3], SIZE);
    ok(fs->ops->rename(fs, "dir/disk.data", "/moved/volume", &err));
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    write_version(disk, 0, 512, 1);
    ok(dr_pread(disk, got, 0, 512, &err));
    ok(dr_close(disk, &err));
    fill(want, 0, 512, 1);
    assert_memory_equal(got, want, 512);
}

static void a_data_file_for_an_image_that_has_none_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options o = {.data_file = "dir/x"};
    struct dr_disk *disk;
    create(fs, &geometries[0], SIZE);
    refused(dr_open_fs(fs, PATH, &o, &disk, &err), EINVAL, "has no data file of its own");
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(applying_a_snapshot_brings_its_bytes_back),
        T(deleting_a_snapshot_gives_its_space_back),
        T(snapshots_are_listed_and_unknown_ones_refused),
        T(formats_without_snapshots_inside_say_so),
        T(the_power_may_go_during_each_change_of_snapshots),
        T(any_call_may_fail_during_a_change_of_snapshots),
        T(writes_in_place_do_not_reach_a_snapshot_that_exists),
        T(a_table_larger_than_the_cache_is_copied),
        T(a_data_file_elsewhere_must_be_allowed),
        T(a_data_file_that_the_user_names_replaces_the_recorded_one),
        T(a_data_file_for_an_image_that_has_none_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
