/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Extracting into new files: power cuts, kills and failures at every step. Whatever happens, no
 * file has its final name unless it is complete, and extracting again finishes and leaves nothing
 * behind. */
#include "archive/extract-files.h"
#include "faultfs.h"
#include "powerfs.h"
#include "slower.h"
#include "test-vma-archive.h"

#define CONFIG     "memory: 512\n"
#define OLD_CONFIG "memory: 1\n"
#define OLD_SIZE   (3 * 65536)

/* One way to extract the archive, which has two disks and a configuration file. */
struct way {
    const char *name;
    const char *format;
    bool split; /* images of several files */
    bool old;   /* all names are taken by other disks, and replaced */
    bool resume;
    bool alone; /* one disk, by path */
    bool in_sight;
};

static const struct way ways[] = {
    {"raw", "raw", .split = false},
    {"raw, replacing", "raw", .old = true},
    {"raw, resuming", "raw", .resume = true},
    {"raw, resuming and replacing", "raw", .resume = true, .old = true},
    {"split", "vmdk", .split = true},
    {"split, replacing", "vmdk", .split = true, .old = true},
    {"split, resuming", "vmdk", .split = true, .resume = true},
    {"split, resuming and replacing", "vmdk", .split = true, .resume = true, .old = true},
    {"one file", "vmdk", .alone = true},
    {"one file, replacing", "raw", .alone = true, .old = true},
    {"one split image, replacing", "vmdk", .alone = true, .split = true, .old = true},
    {"in sight", "raw", .in_sight = true},
};
#define N_WAYS (sizeof(ways) / sizeof(ways[0]))

static const struct way *way;
static struct bench *bench;
static char where[256];

/* ------------------------------------------------------------------ extracting */

static const char *const names[] = {"one", "two"};
static const unsigned ids[] = {1, 9};

static const char *file_of(unsigned i)
{
    static char files[2][32];
    snprintf(files[i], sizeof(files[i]), "%s.%s", names[i], way->format);
    return files[i];
}

static const char *path_of(unsigned i)
{
    static char paths[2][64];
    snprintf(paths[i], sizeof(paths[i]), "%s%s", way->alone ? "/" : "/out/", file_of(i));
    return paths[i];
}

static unsigned n_disks(void)
{
    return way->alone ? 1 : 2;
}

static uint64_t hasty_now(void *user)
{
    return *(uint64_t *)user += VMA_CHECKPOINT_NS;
}

static const struct dr_pair split[] = {{"subformat", "twoGbMaxExtentSparse"}};

/* With the clock in a hurry, so that there are several checkpoints. */
static int extract_files(struct dr_fs *fs, const struct dr_vma_files_options *more,
                         struct dr_vma_files_result *result, struct dr_error *err)
{
    struct dr_vma_new_disk disks[2];
    const struct dr_vma_new_config config = {0, "c.conf"};
    struct dr_vma_files_options o = *more;
    uint64_t now = 0;
    const struct dr_copy_clock clock = {hasty_now, NULL, &now};
    struct dr_job job = {.workers = 1};
    struct dr_vma *vma;
    int r = dr_vma_open_fs(fs, ARCHIVE, NULL, &vma, err);
    if (r < 0)
        return r;
    for (unsigned i = 0; i < n_disks(); i++)
        disks[i] = (struct dr_vma_new_disk){ids[i], file_of(i), way->format,
                                            way->split ? split : NULL, way->split};
    o.dir = way->alone ? NULL : "/out";
    o.path = way->alone ? path_of(0) : NULL;
    o.disks = disks;
    o.n_disks = n_disks();
    o.configs = way->alone ? NULL : &config;
    o.n_configs = !way->alone;
    o.in_sight = way->in_sight;
    o.resume = way->resume;
    vma->clock = &clock;
    r = dr_vma_extract_files_fs(fs, vma, &o, &job, result, err);
    dr_vma_close(vma);
    return r;
}

static int run(struct dr_fs *fs, struct dr_error *err)
{
    return extract_files(fs, &(struct dr_vma_files_options){.replace = way->old}, NULL, err);
}

/* ------------------------------------------------------------------ what was there before */

static void make_old(struct dr_fs *fs)
{
    for (unsigned i = 0; i < n_disks(); i++) {
        struct dr_create_options o = {.format = way->format,
                                      .size = OLD_SIZE,
                                      .has_size = true,
                                      .pairs = way->split ? split : NULL,
                                      .n_pairs = way->split};
        struct dr_open_options rw = {.format = way->format, .flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        uint8_t *buf = malloc(OLD_SIZE);
        memset(buf, 0x55, OLD_SIZE);
        ok(dr_create_fs(fs, path_of(i), &o, &err));
        ok(dr_open_fs(fs, path_of(i), &rw, &disk, &err));
        ok(dr_pwrite(disk, buf, 0, OLD_SIZE, 0, &err));
        ok(dr_close(disk, &err));
        free(buf);
    }
    if (!way->alone)
        write_file(fs, "/out/c.conf", OLD_CONFIG, strlen(OLD_CONFIG));
}

/* 12 extents of a cluster each, of both disks in turn. */
static void make_archive(struct dr_fs *fs)
{
    struct archive *a = &bench->a;
    if (!a->buf) {
        add_disk(a, 1, "one", 7 * 65536 + 1024);
        add_disk(a, 9, "two", 4 * 65536);
        a->config = (struct dr_vma_config){"c.conf", (const uint8_t *)CONFIG, strlen(CONFIG)};
        a->header.configs = &a->config;
        a->header.n_configs = 1;
        end_header(a);
        for (uint32_t c = 0; c < 12; c++)
            add_extent(a,
                       &(struct vma_slot){c % 3 == 2 ? 9 : 1,
                                          c % 3 == 2 ? c / 3 : c / 3 * 2 + c % 3,
                                          c == 10 ? 1 : 0x0011, 0},
                       1, true);
    }
    write_file(fs, ARCHIVE, a->buf, a->len);
}

static void prepare(struct dr_fs *fs)
{
    make_archive(fs);
    if (way->old)
        make_old(fs);
}

/* ------------------------------------------------------------------ what is there now */

enum content { ABSENT, OLD, NEW, WRONG };

static bool is_all(const uint8_t *buf, uint64_t len, uint8_t byte)
{
    uint64_t i = 0;
    while (i < len && buf[i] == byte)
        i++;
    return i == len;
}

static enum content disk_content(struct dr_fs *fs, unsigned i)
{
    struct dr_open_options o = {.format = way->format};
    struct dr_disk *disk = NULL;
    if (!exists(fs, path_of(i)))
        return ABSENT;
    if (dr_open_fs(fs, path_of(i), &o, &disk, NULL) < 0)
        return WRONG;
    uint64_t size = dr_size(disk), wanted = bench->a.disks[i].size;
    uint8_t *buf = malloc(size + 1);
    enum content found = WRONG;
    if (dr_pread(disk, buf, 0, size, NULL) == 0) {
        if (size == wanted && memcmp(buf, bench->a.image[ids[i]], size) == 0)
            found = NEW;
        else if (way->old && size == OLD_SIZE && is_all(buf, size, 0x55))
            found = OLD;
    }
    dr_close(disk, NULL);
    free(buf);
    return found;
}

static enum content config_content(struct dr_fs *fs)
{
    size_t len;
    if (!exists(fs, "/out/c.conf"))
        return ABSENT;
    uint8_t *text = file_bytes(fs, "/out/c.conf", &len);
    enum content found =
        len == strlen(CONFIG) && memcmp(text, CONFIG, len) == 0                       ? NEW
        : way->old && len == strlen(OLD_CONFIG) && memcmp(text, OLD_CONFIG, len) == 0 ? OLD
                                                                                      : WRONG;
    free(text);
    return found;
}

static bool all_new(struct dr_fs *fs)
{
    bool all = way->alone || config_content(fs) == NEW;
    for (unsigned i = 0; i < n_disks(); i++)
        all &= disk_content(fs, i) == NEW;
    return all;
}

/* The names in both directories, in order, for messages and to be compared. */
static void list_all(struct dr_fs *fs, char *text, size_t room)
{
    static const char *const dirs[] = {"/", "/out"};
    text[0] = '\0';
    for (unsigned d = 0; d < 2; d++) {
        char **found;
        size_t n;
        ok(dr_ops_list(fs, dirs[d], &found, &n, &err));
        for (size_t i = 0; i < n; i++)
            if (strcmp(found[i], "out") != 0 || d == 1) {
                size_t at = strlen(text);
                snprintf(text + at, room - at, "%s ", found[i]);
            }
        dr_ops_free_names(found, n);
    }
}

static void expected_names(char *text, size_t room)
{
    if (way->alone)
        snprintf(text, room, "a.vma %s%s", way->split ? "one-s001.vmdk " : "",
                 way->format[0] == 'r' ? "one.raw " : "one.vmdk ");
    else if (way->split)
        snprintf(text, room, "a.vma c.conf one-s001.vmdk one.vmdk two-s001.vmdk two.vmdk ");
    else
        snprintf(text, room, "a.vma c.conf one.%s two.%s ", way->format, way->format);
}

/* ------------------------------------------------------------------ judging */

static bool report; /* a problem fails the test; else it is only told to the caller */

static bool wrong(const char *what, const char *more)
{
    if (report)
        fail_msg("%s, %s: %s: %s", way->name, where, what, more);
    return false;
}

static bool nothing_is_half(struct dr_fs *fs)
{
    enum content config = way->alone ? NEW : config_content(fs);
    /* In sight configuration files have their names from the start. */
    if (config == WRONG && !way->in_sight)
        return wrong("is not complete", "c.conf");
    if (way->old && config == ABSENT)
        return wrong("is gone", "c.conf");
    for (unsigned i = 0; i < n_disks(); i++) {
        enum content found = disk_content(fs, i);
        if (found == WRONG)
            return wrong("is not complete", path_of(i));
        /* While extents are exchanged, the old descriptor is in the staging directory. */
        if (found == ABSENT && way->old && !way->split)
            return wrong("is gone", path_of(i));
    }
    return true;
}

static bool is_finished(struct dr_fs *fs)
{
    char found[1024], wanted[1024];
    if (!all_new(fs))
        return wrong("is not what the archive holds", "");
    list_all(fs, found, sizeof(found));
    expected_names(wanted, sizeof(wanted));
    return strcmp(found, wanted) == 0 || wrong("other names are there", found);
}

/* In sight there is nothing to go on from: the user removes the directory. */
static bool finishes_when_run_again(struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    const struct dr_vma_files_options force = {.replace = true};
    if (way->in_sight)
        return true;
    bool done = all_new(fs);
    int r = run(fs, &err);
    if (r == -EEXIST && !way->old && (!way->resume || done)) {
        dr_error_reset(&err);
        r = extract_files(fs, &force, NULL, &err);
    }
    return r < 0 ? wrong("does not run again", err.text) : is_finished(fs);
}

/* ------------------------------------------------------------------ power cuts */

static bool all_cuts(struct powerfs *p, size_t first)
{
    for (size_t i = first; i <= powerfs_ops(p); i = powerfs_next(p, i, POWERFS_EVERY)) {
        size_t open_ops = powerfs_open_ops(p, i);
        for (int mode = 0; mode < POWERFS_MODES && (mode == 0 || open_ops > 0); mode++) {
            uint64_t seeds = mode == POWERFS_RANDOM        ? 3
                             : mode == POWERFS_ALL_BUT_ONE ? dr_min(open_ops, 4)
                                                           : 1;
            for (uint64_t seed = 0; seed < seeds; seed++) {
                char text[128] = "the end";
                if (i < powerfs_ops(p))
                    powerfs_op_text(p, i, text, sizeof(text));
                snprintf(where, sizeof(where), "%zu mode %d seed %d before %s", i, mode, (int)seed,
                         text);
                struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, seed);
                bool again = mode == POWERFS_ALL || (i + seed + (size_t)mode) % 5 == 0;
                bool good = nothing_is_half(disk) && (!again || finishes_when_run_again(disk));
                dr_fs_memory_free(disk);
                if (!good)
                    return false;
            }
        }
    }
    return true;
}

/* Plants a fault: the skip_flush-th flush, or skip_dir-th sync_dir, does nothing. */
static bool cut_everywhere(size_t skip_flush, size_t skip_dir, size_t *flushes, size_t *dirs)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    prepare(fs);
    powerfs_settle(p);
    powerfs_skip_flush(p, skip_flush);
    powerfs_skip_sync_dir(p, skip_dir);
    ok(run(fs, &err));
    *flushes = powerfs_flushes(p);
    *dirs = powerfs_sync_dirs(p);
    powerfs_skip_flush(p, SIZE_MAX);
    powerfs_skip_sync_dir(p, SIZE_MAX);
    bool good = all_cuts(p, 0);
    powerfs_free(p);
    return good;
}

static void after_a_power_cut_nothing_is_half_and_running_again_finishes(void **state)
{
    size_t flushes, dirs;
    bench = *state;
    report = true;
    for (size_t i = 0; i < N_WAYS; i++) {
        way = &ways[i];
        assert_true(cut_everywhere(SIZE_MAX, SIZE_MAX, &flushes, &dirs));
    }
}

/* The suite can fail. */
static void a_flush_that_does_nothing_is_caught(void **state)
{
    static const size_t some[] = {0, 3, 5};
    ONLY_IN_A_PLAIN_BUILD();
    bench = *state;
    report = false;
    for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        bool caught = false;
        size_t flushes = 1, dirs;
        way = &ways[some[i]];
        for (size_t n = 0; n < flushes && !caught; n++)
            caught = !cut_everywhere(n, SIZE_MAX, &flushes, &dirs);
        if (!caught)
            fail_msg("%s: no missing flush was caught", way->name);
    }
}

static void a_name_that_was_not_made_durable_is_caught(void **state)
{
    ONLY_IN_A_PLAIN_BUILD();
    bool caught = false;
    size_t flushes, dirs = 1;
    bench = *state;
    report = false;
    way = &ways[5]; /* extents before the file that names them */
    for (size_t n = 0; n < dirs && !caught; n++)
        caught = !cut_everywhere(SIZE_MAX, n, &flushes, &dirs);
    assert_true(caught);
}

/* ------------------------------------------------------------------ kills */

/* From its n-th I/O on nothing gets through. Returns how many there were. */
static uint64_t kill_at(struct dr_fs *fs, uint64_t n)
{
    struct faultfs *f = faultfs_new(fs);
    struct dr_error err = DR_ERROR_INIT;
    faultfs_arm(f, &(struct faultfs_plan){.nth = n, .for_good = true});
    run(faultfs_fs(f), &err);
    uint64_t count = faultfs_count(f);
    faultfs_free(f);
    return count;
}

/* Only what is durable, and that and the last change. */
static void cuts_after_a_kill(struct powerfs *p, size_t first, uint64_t n)
{
    static const enum powerfs_mode modes[] = {POWERFS_NONE, POWERFS_ONLY_LAST};
    for (size_t at = first; at <= powerfs_ops(p); at = powerfs_next(p, at, POWERFS_EVERY))
        for (int mode = 0; mode < 2; mode++) {
            struct dr_fs *disk = powerfs_cut(p, at, modes[mode], 0);
            snprintf(where, sizeof(where), "killed at %llu, cut at %zu (%d)", (unsigned long long)n,
                     at, mode);
            nothing_is_half(disk);
            dr_fs_memory_free(disk);
        }
}

/* *changes: how many had been made at the last kill; the same number is the same kill. Returns the
 * I/Os that were tried. */
static uint64_t kill_and_run_again(uint64_t n, size_t *changes)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    prepare(fs);
    powerfs_settle(p);
    uint64_t tried = kill_at(fs, n);
    size_t first = powerfs_ops(p);
    snprintf(where, sizeof(where), "killed at %llu", (unsigned long long)n);
    nothing_is_half(fs);
    if (first != *changes) {
        finishes_when_run_again(fs);
        cuts_after_a_kill(p, first, n);
    }
    *changes = first;
    powerfs_free(p);
    return tried;
}

/* Bytes and names that a killed process left in memory are not dirty for the next one. Most of it
 * happens at the end. */
static void after_a_kill_and_another_run_a_power_cut_finds_nothing_half(void **state)
{
    static const size_t some[] = {1, 2, 3, 5, 7, 10};
    bench = *state;
    report = true;
    for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        size_t changes = SIZE_MAX;
        way = &ways[some[i]];
        uint64_t all = kill_and_run_again(UINT64_MAX, &changes);
        changes = SIZE_MAX;
        for (uint64_t n = 0; n < all; n += n + 45 < all ? 9 : 1)
            kill_and_run_again(n, &changes);
    }
}

/* ------------------------------------------------------------------ failures */

/* A failed call must have left everything as it was; or with resume, or when an old file had
 * been replaced already, a staging directory from which the next call goes on. */
static void judge_failure(struct dr_fs *fs, const char *before, const struct dr_error *err,
                          const struct dr_vma_files_result *result)
{
    char now[1024];
    list_all(fs, now, sizeof(now));
    assert_true(err->text[0]);
    nothing_is_half(fs);
    if (result->kept[0])
        assert_true(way->resume || way->old);
    else if (strcmp(before, now) != 0)
        wrong("something was left", now);
}

/* The n-th I/O of these kinds fails. False: there are not so many. */
static bool fail_and_run_again(unsigned kinds, uint64_t n)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(fs);
    struct dr_vma_files_result result = {0};
    struct dr_error err = DR_ERROR_INIT;
    const struct dr_vma_files_options o = {.replace = way->old};
    char before[1024];
    prepare(fs);
    list_all(fs, before, sizeof(before));
    snprintf(where, sizeof(where), "failure %llu", (unsigned long long)n);
    faultfs_arm(f, &(struct faultfs_plan){.nth = n, .kinds = kinds, .partial = true});
    int r = extract_files(faultfs_fs(f), &o, &result, &err);
    bool fired = faultfs_fired(f);
    if (r < 0)
        judge_failure(fs, before, &err, &result);
    else
        assert_true(all_new(fs));
    finishes_when_run_again(fs);
    faultfs_free(f);
    dr_fs_memory_free(fs);
    return fired;
}

static void after_each_failure_nothing_is_half_and_running_again_finishes(void **state)
{
    /* Failing to remove something is no failure of the call, and leaves it there. */
    static const unsigned removing = 1u << FAULTFS_UNLINK | 1u << FAULTFS_LIST;
    bench = *state;
    report = true;
    for (size_t i = 0; i < N_WAYS; i++) {
        way = &ways[i];
        for (uint64_t n = 0; fail_and_run_again(~removing, n); n++)
            ;
        for (uint64_t n = 0; fail_and_run_again(removing, n); n++)
            ;
    }
}

/* ------------------------------------------------------------------ refused */

static int call(struct dr_fs *fs, const struct dr_vma_files_options *o,
                struct dr_vma_files_result *result, struct dr_error *err)
{
    struct dr_vma *vma;
    int r = dr_vma_open_fs(fs, ARCHIVE, NULL, &vma, err);
    if (r < 0)
        return r;
    r = dr_vma_extract_files_fs(fs, vma, o, NULL, result, err);
    dr_vma_close(vma);
    return r;
}

static int no(void *user)
{
    (void)user;
    return 1;
}

static void wrong_options_are_refused_and_leave_nothing(void **state)
{
    static const struct dr_vma_new_disk one = {1, "d", NULL, NULL, 0},
                                        none = {3, "d", NULL, NULL, 0},
                                        up = {1, "../d", NULL, NULL, 0},
                                        ours = {1, ".drover.d", NULL, NULL, 0},
                                        twice[] = {{1, "d", NULL, NULL, 0},
                                                   {9, "d", NULL, NULL, 0}},
                                        qcow9 = {1, "d", "qcow9", NULL, 0};
    static const struct dr_vma_new_config second = {1, "c"};
    static const struct {
        struct dr_vma_files_options o;
        int errnum;
        const char *word;
    } cases[] = {
        {{.disks = &one, .n_disks = 1}, EINVAL, "either a directory or"},
        {{.dir = "/out", .path = "/d", .disks = &one, .n_disks = 1}, EINVAL, "either a directory"},
        {{.path = "/d", .disks = twice, .n_disks = 2}, EINVAL, "either a directory"},
        {{.dir = "/out", .disks = &none, .n_disks = 1}, EINVAL, "no disk 3"},
        {{.dir = "/out", .disks = &up, .n_disks = 1}, EINVAL, "cannot have the name"},
        {{.dir = "/out", .disks = &ours, .n_disks = 1}, EINVAL, "/out/.drover.d: files of that"},
        {{.dir = "/out", .disks = twice, .n_disks = 2}, EINVAL, "more than one file"},
        {{.dir = "/out", .disks = &qcow9, .n_disks = 1}, EINVAL, "qcow9"},
        {{.dir = "/out", .configs = &second, .n_configs = 1}, EINVAL, "no configuration file 1"},
        {{.dir = "/out", .disks = &one, .n_disks = 1, .resume = true, .no_sync = true},
         EINVAL,
         "resuming"},
        {{.dir = "/out", .disks = &one, .n_disks = 1, .resume = true, .read.salvage = true},
         EINVAL,
         "resuming"},
        {{.dir = "/out", .disks = &one, .n_disks = 1, .read.headers_only = true},
         EINVAL,
         "structure"},
        {{.dir = "/out", .disks = &one, .n_disks = 1, .ready = no}, ECANCELED, "stopped"},
    };
    bench = *state;
    make_archive(bench->fs);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_vma_files_result result;
        refused(call(bench->fs, &cases[i].o, &result, &err), cases[i].errnum, cases[i].word);
        assert_int_equal(count_files(bench->fs), 1);
        assert_string_equal(result.kept, "");
    }
}

static void a_staging_directory_that_is_in_use_is_left_alone(void **state)
{
    static const struct dr_vma_new_disk one = {1, "d", NULL, NULL, 0};
    const struct dr_vma_files_options o = {.dir = "/out", .disks = &one, .n_disks = 1};
    struct dr_dir_lock *lock;
    bench = *state;
    make_archive(bench->fs);
    write_file(bench->fs, "/out/.drover.partial/d", "theirs", 6);
    ok(dr_dir_lock(bench->fs, "/out/.drover.partial", &lock, &err));
    refused(call(bench->fs, &o, NULL, &err), EBUSY, "another extraction");
    assert_true(exists(bench->fs, "/out/.drover.partial/d"));
    dr_dir_unlock(lock);
    ok(call(bench->fs, &o, NULL, &err));
    assert_false(exists(bench->fs, "/out/.drover.partial/d"));
    assert_true(exists(bench->fs, "/out/d"));
}

static void long_names_with_one_beginning_have_a_staging_directory_each(void **state)
{
    char first[NAME_MAX + 1], second[NAME_MAX + 1];
    (void)state;
    for (size_t len = 1; len <= NAME_MAX; len++) {
        memset(first, 'x', len);
        first[len] = '\0';
        strcpy(second, first);
        second[len - 1] = 'y';
        char *a = dr_aside_fixed_name(first, "drover.partial");
        char *b = dr_aside_fixed_name(second, "drover.partial");
        assert_true(strlen(a) <= NAME_MAX && a[0] == '.');
        assert_string_not_equal(a, b);
        free(a);
        free(b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(
            after_a_power_cut_nothing_is_half_and_running_again_finishes, setup, teardown),
        cmocka_unit_test_setup_teardown(a_flush_that_does_nothing_is_caught, setup, teardown),
        cmocka_unit_test_setup_teardown(a_name_that_was_not_made_durable_is_caught, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(after_a_kill_and_another_run_a_power_cut_finds_nothing_half,
                                        setup, teardown),
        cmocka_unit_test_setup_teardown(
            after_each_failure_nothing_is_half_and_running_again_finishes, setup, teardown),
        cmocka_unit_test_setup_teardown(wrong_options_are_refused_and_leave_nothing, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(a_staging_directory_that_is_in_use_is_left_alone, setup,
                                        teardown),
        cmocka_unit_test(long_names_with_one_beginning_have_a_staging_directory_each),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
