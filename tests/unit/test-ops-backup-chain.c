/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Incremental backups: a chain of them reads as the disk did at each instant, whatever is
 * interrupted in between; sets, verifying and restoring. */
#include "faultfs.h"
#include "powerfs.h"
#include "ops/backup-naming.h"
#include "test-backup.h"

/* ------------------------------------------------------------------ chains */

static void a_chain_of_backups_reads_as_the_disk_did(void **state)
{
    static const uint64_t granularities[] = {0, 512, 4096, 64 * KiB, 2 * MiB};
    (void)state;
    for (size_t g = 0; g < sizeof(granularities) / sizeof(granularities[0]); g++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint64_t seed = 5 + g;
        make_tracked(fs, granularities[g]);
        for (unsigned i = 0; i < 6; i++) {
            char name[32];
            snprintf(name, sizeof(name), "b%u", i);
            struct dr_backup_result result = back_up(fs, name);
            assert_int_equal(result.incremental, i > 0);
            holds_the_disk(fs, name);
            change_disk(fs, &seed, 4);
        }
        for (unsigned i = 0; i < 6; i++) {
            char name[32];
            snprintf(name, sizeof(name), "b%u", i);
            verified(fs, name);
        }
        dr_fs_memory_free(fs);
    }
}

static void for_each_beside(void (*test)(void **), void **state)
{
    for (size_t i = 0; i < N_BESIDE; i++) {
        disk_format = beside[i];
        test(state);
    }
    disk_format = "qcow2";
}

static void a_chain_by_bitmaps_beside_a_disk_reads_as_it_did(void **state)
{
    for_each_beside(a_chain_of_backups_reads_as_the_disk_did, state);
}

static void an_incremental_backup_holds_only_what_has_changed(void **state)
{
    struct dr_fs *fs = *state;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    struct dr_backup_result none = back_up(fs, "b1");
    assert_true(none.incremental);
    assert_int_equal(none.copied, 0);
    put(fs, "disk", 2 * MiB + 100, 5, 0x55);
    put(fs, "disk", MiB, 64 * KiB, 0);
    struct dr_backup_result some = back_up(fs, "b2");
    assert_int_equal(some.copied, 64 * KiB); /* zeros are not read */
    holds_the_disk(fs, "b2");
    assert_true(disk_size(fs, "b2") < 512 * KiB);
}

static void a_disk_may_change_its_size_between_backups(void **state)
{
    struct dr_fs *fs = *state;
    static const uint64_t sizes[] = {5 * MiB + 512, 2 * MiB + 1024, 700 * KiB + 512, 6 * MiB};
    uint64_t seed = 3;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct dr_disk *disk = NULL;
        char name[] = {'c', (char)('0' + i), 0};
        ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
        ok(dr_truncate(disk, sizes[i], &err));
        change_at_random(disk, &seed, 2);
        ok(dr_close(disk, &err));
        assert_true(back_up(fs, name).incremental);
        holds_the_disk(fs, name);
    }
}

/* What was cut off and came back reads as zeros, and the last backup has something else there. */
static void a_disk_that_shrinks_and_grows_again_misses_nothing(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    make_tracked(fs, 0);
    put(fs, "disk", SIZE - 100 * KiB, 100 * KiB, 0x66);
    back_up(fs, "b0");
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_truncate(disk, 2 * MiB, &err));
    ok(dr_truncate(disk, SIZE, &err));
    ok(dr_close(disk, &err));
    back_up(fs, "b1");
    holds_the_disk(fs, "b1");
}

static void without_the_side_file_the_last_backup_is_read(void **state)
{
    struct dr_fs *fs = *state;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    ok(fs->ops->unlink(fs, "b0.sums", &err));
    put(fs, "disk", 2 * MiB, 5, 0x55);
    assert_true(back_up(fs, "b1").incremental);
    holds_the_disk(fs, "b1");
}

static void any_format_that_has_parents_takes_an_increment(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_options o = {.set = set, .bitmap = "B", .format = "raw"};
    make_tracked(fs, 0);
    ok(dr_backup_fs(fs, "disk", NULL, "b0", &o, NULL, NULL, &err));
    put(fs, "disk", 2 * MiB, 50 * KiB, 0x55);
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), ENOTSUP, "raw");
    o.format = "vmdk";
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), ENOTSUP, "vmdk");
    o.format = "add-cow";
    ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
    holds_the_disk(fs, "b1");
}

/* ------------------------------------------------------------------ which bitmap, which backup */

static void a_bitmap_without_a_backup_means_a_full_one(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_options o = {.set = set, .bitmap = "B", .full = true};
    make_tracked(fs, 4096);
    put(fs, "disk", 2 * MiB, 5, 0x55);
    assert_false(back_up(fs, "b0").incremental);
    holds_the_disk(fs, "b0");
    ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
    struct dr_backup_result result = back_up(fs, "b2");
    assert_true(result.incremental);
    assert_int_equal(begun(fs, NULL, 0), 1);
}

static void since_means_the_bitmap_of_the_last_backup(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_options o = {.set = set, .since = "b0"};
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5, 0x55);
    ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
    holds_the_disk(fs, "b1");
    refused(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err), EINVAL,
            "from backup \"b0\" to \"b1\"");
    o.since = "b7";
    refused(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err), ENOENT, "b7");
    o.since = "b1";
    o.bitmap = "B";
    refused(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err), EINVAL, "exclude");
    o = (struct dr_backup_options){.bitmap = "B"};
    refused(dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &err), EINVAL, "set");
    assert_false(exists(fs, "b2"));
}

/* As a server that is killed leaves it. */
static void leave_inconsistent(struct dr_fs *fs, struct dr_fs **after)
{
    struct powerfs *p = powerfs_new();
    struct dr_disk *disk = NULL;
    uint8_t byte = 7;
    (void)fs;
    make_tracked(powerfs_fs(p), 0);
    back_up(powerfs_fs(p), "b0");
    ok(dr_open_fs(powerfs_fs(p), "disk", &rw, &disk, &err));
    ok(dr_pwrite(disk, &byte, 2 * MiB, 1, 0, &err));
    ok(dr_flush(disk, &err));
    *after = powerfs_cut(p, powerfs_ops(p), POWERFS_ALL, 0);
    ok(dr_close(disk, &err));
    powerfs_free(p);
}

static void a_bitmap_that_was_not_stored_is_never_trusted(void **state)
{
    struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_fs *fs;
    leave_inconsistent(*state, &fs);
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), EUCLEAN, "--full");
    assert_false(exists(fs, "b1"));
    o.full = true;
    ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
    holds_the_disk(fs, "b1");
    put(fs, "disk", 100 * KiB, 5, 0x77);
    assert_true(back_up(fs, "b2").incremental);
    holds_the_disk(fs, "b2");
    dr_fs_memory_free(fs);
}

/* As by a program that does not know of bitmaps. */
static void write_behind(struct dr_fs *fs, uint64_t off)
{
    struct dr_file *file = NULL;
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR, &file, &err));
    ok(dr_file_pwrite(file, "foreign", off, 7, &err));
    dr_file_unref(file);
}

static void a_disk_that_another_program_wrote_to_is_backed_up_after_a_rebuild(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_disk *disk = NULL, *last = NULL;
    struct dr_backup_result result;
    char name[100];
    disk_format = "raw";
    make_tracked(fs, 0);
    disk_format = "qcow2";
    back_up(fs, "b0");
    assert_int_equal(begun(fs, name, sizeof(name)), 1);
    write_behind(fs, 2 * MiB);
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), EUCLEAN,
            "drover bitmap --rebuild");
    assert_false(exists(fs, "b1"));
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_open_fs(fs, "b0", NULL, &last, &err));
    ok(dr_disk_bitmap_rebuild(disk, name, last, NULL, &err));
    ok(dr_close(last, &err));
    ok(dr_close(disk, &err));
    result = back_up(fs, "b1");
    assert_true(result.incremental);
    assert_int_equal(result.copied, 64 * KiB);
    holds_the_disk(fs, "b1");
}

/* What was written before somebody made it is not in it. */
static void a_bitmap_that_no_backup_began_is_not_trusted(void **state)
{
    struct dr_fs *fs = *state;
    char name[100];
    make_tracked(fs, 0);
    back_up(fs, "b0");
    assert_int_equal(begun(fs, name, sizeof(name)), 1);
    change_bitmap(fs, name, DR_BITMAP_REMOVE);
    put(fs, "disk", 2 * MiB, 5, 0x55);
    change_bitmap(fs, "B", DR_BITMAP_ADD);
    assert_false(back_up(fs, "b1").incremental);
    holds_the_disk(fs, "b1");
}

/* An older copy of the disk came back, with the bitmap of an older backup. */
static void an_older_copy_of_the_disk_is_backed_up_in_full(void **state)
{
    struct dr_fs *fs = *state;
    size_t len, ignored;
    struct dr_file *file = NULL;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    uint8_t *old = file_bytes(fs, "disk", &len);
    put(fs, "disk", 2 * MiB, 5, 0x55);
    back_up(fs, "b1");
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR | DR_FILE_TRUNCATE, &file, &err));
    ok(dr_file_pwrite(file, old, 0, len, &err));
    dr_file_unref(file);
    free(old);
    free(file_bytes(fs, "disk", &ignored));
    assert_false(back_up(fs, "b2").incremental);
    holds_the_disk(fs, "b2");
    assert_int_equal(begun(fs, NULL, 0), 1); /* the older one is left over, and gone */
}

static void sets_do_not_take_bitmaps_from_each_other(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options other = {.set = "others.json", .bitmap = "B"};
    struct dr_backup_result result;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5, 0x55);
    ok(dr_backup_fs(fs, "disk", NULL, "o0", &other, NULL, &result, &err));
    assert_false(result.incremental);
    put(fs, "disk", 2 * MiB + 512 * KiB, 5, 0x66);
    assert_true(back_up(fs, "b1").incremental);
    holds_the_disk(fs, "b1");
    ok(dr_backup_fs(fs, "disk", NULL, "o1", &other, NULL, &result, &err));
    assert_true(result.incremental);
    assert_int_equal(begun(fs, NULL, 0), 2);
}

static void a_disabled_bitmap_is_not_trusted(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    char name[100];
    make_tracked(fs, 0);
    back_up(fs, "b0");
    assert_int_equal(begun(fs, name, sizeof(name)), 1);
    change_bitmap(fs, name, DR_BITMAP_DISABLE);
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), EUCLEAN, "disabled");
}

static void a_failed_backup_leaves_the_bitmap_as_it_was(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options o = {.set = set, .bitmap = "B", .format = "vmdk"};
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5, 0x55);
    refused(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err), ENOTSUP, "vmdk");
    assert_int_equal(begun(fs, NULL, 0), 1);
    assert_true(back_up(fs, "b1").incremental);
    holds_the_disk(fs, "b1");
}

/* ------------------------------------------------------------------ a disk in use */

static void an_increment_of_a_disk_in_use_is_of_one_instant(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_disk *disk = NULL;
    uint64_t seed = 9;
    uint8_t *want = malloc(SIZE);
    make_tracked(fs, 4096);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    for (unsigned i = 0; i < 5; i++) {
        char name[] = {'b', (char)('0' + i), 0};
        struct dr_backup_result result;
        ok(dr_pread(disk, want, 0, SIZE, &err));
        ok(dr_disk_backup(disk, name, &o, NULL, &result, &err));
        assert_int_equal(result.incremental, i > 0);
        change_at_random(disk, &seed, 5);
        same_view(fs, name, want, SIZE);
    }
    ok(dr_close(disk, &err));
    free(want);
    assert_true(back_up(fs, "last").incremental);
    holds_the_disk(fs, "last");
}

static void increments_by_bitmaps_beside_a_disk_in_use_are_of_one_instant(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_BESIDE; i++) {
        void *fs = dr_fs_memory_new();
        disk_format = beside[i];
        an_increment_of_a_disk_in_use_is_of_one_instant(&fs);
        dr_fs_memory_free(fs);
    }
    disk_format = "qcow2";
}

/* ------------------------------------------------------------------ interruptions */

/* A backup after whatever has happened holds the disk; so do those that the set names. */
static bool next_one_is_right(struct dr_fs *fs, bool report)
{
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_error why = DR_ERROR_INIT;
    struct dr_backup_set s;
    uint64_t size, n;
    uint8_t *want = view(fs, "disk", &size), *have = NULL;
    int r = dr_backup_fs(fs, "disk", NULL, "again", &o, NULL, NULL, &why);
    if (r == 0)
        have = view(fs, "again", &n);
    bool good = r == 0 && n == size && memcmp(have, want, size) == 0;
    r = good ? dr_set_load(&s, fs, set, &why) : -1;
    for (size_t i = 0; r == 0 && i < s.n; i++)
        r = dr_backup_verify_fs(fs, set, s.all[i].name, NULL, NULL, NULL, &why);
    if (good)
        dr_set_free(&s);
    if (report && r < 0)
        fail_msg("the next backup: %s", why.errnum ? why.text : "it holds something else");
    free(want);
    free(have);
    return r == 0;
}

static bool cut_everywhere(size_t skip, size_t *flushes, bool report)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    bool good = true;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5000, 0x55);
    put(fs, "disk", MiB, 64 * KiB, 0);
    powerfs_settle(p);
    powerfs_skip_flush(p, skip);
    back_up(fs, "b1");
    *flushes = powerfs_flushes(p);
    for (size_t i = 0; i <= powerfs_ops(p) && good; i = powerfs_next(p, i, POWERFS_EVERY))
        for (int mode = 0; mode < POWERFS_MODES && good; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            good = next_one_is_right(cut, report);
            dr_fs_memory_free(cut);
        }
    powerfs_free(p);
    return good;
}

static void after_a_power_cut_the_next_backup_misses_nothing(void **state)
{
    size_t flushes;
    (void)state;
    assert_true(cut_everywhere(SIZE_MAX, &flushes, true));
    assert_true(flushes > 5);
}

static void after_a_power_cut_bitmaps_beside_a_disk_miss_nothing(void **state)
{
    for_each_beside(after_a_power_cut_the_next_backup_misses_nothing, state);
}

/* Whichever I/O fails: the next backup is right. */
static void after_a_failure_the_next_backup_misses_nothing(void **state)
{
    (void)state;
    for (uint64_t nth = 0, fired = 1; fired; nth++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(f);
        const struct dr_backup_options o = {.set = set, .bitmap = "B"};
        make_tracked(fs, 0);
        back_up(fs, "b0");
        put(fs, "disk", 2 * MiB, 5000, 0x55);
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .error = ENOSPC});
        int r = dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, NULL);
        fired = faultfs_fired(f);
        faultfs_disarm(f);
        if (r == 0)
            holds_the_disk(fs, "b1");
        next_one_is_right(fs, true);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

static bool lists(struct dr_fs *fs, const char *name)
{
    struct dr_backup_entry *list;
    bool does = false;
    size_t n;
    ok(dr_backup_list_fs(fs, set, &list, &n, &err));
    for (size_t i = 0; i < n; i++)
        does |= !list[i].naming && strcmp(list[i].name, name) == 0;
    dr_backup_list_free(list, n);
    return does;
}

/* Somebody takes the set away while the disk is copied. */
static int takes_the_set(void *user, const struct faultfs_io *io)
{
    _Atomic(struct dr_fs *) *memory = user;
    struct dr_fs *fs = io->kind == FAULTFS_WRITE ? atomic_exchange(memory, NULL) : NULL;
    if (fs)
        ok(fs->ops->rename(fs, set, "kept.json", &err));
    return 0;
}

static void a_set_that_has_gone_meanwhile_is_not_made_anew(void **state)
{
    struct dr_fs *memory = *state;
    _Atomic(struct dr_fs *) planted = memory;
    struct faultfs *f = faultfs_new(memory);
    const struct dr_backup_options o = {.set = set};
    make_tracked(memory, 0);
    back_up(memory, "b0");
    faultfs_observe(f, takes_the_set, &planted);
    refused(dr_backup_fs(faultfs_fs(f), "disk", NULL, "b1", &o, NULL, NULL, &err), ESTALE,
            "is gone");
    assert_false(exists(memory, "b1") || exists(memory, "b1.sums") || exists(memory, set));
    ok(memory->ops->rename(memory, "kept.json", set, &err));
    assert_true(back_up(memory, "b1").incremental);
    holds_the_disk(memory, "b1");
    faultfs_free(f);
}

struct announced {
    struct dr_fs *fs;
    bool together;
};

/* As a kill leaves them that comes before they are confirmed, all within one second. */
static int announce_again(void *user, struct dr_backup_set *s, struct dr_error *why)
{
    const struct announced *a = user;
    for (size_t i = 0; i < s->n; i++) {
        ok(dr_naming_mark(a->fs, s->all[i].file, a->together ? 7 : 7 + i, &s->all[i].naming, why));
        free(s->all[i].time);
        s->all[i].time = strdup("2026-11-30T02:10:00Z");
    }
    return 1;
}

static void killed_backups_of_one_second_are_judged_each_for_itself(void **state)
{
    (void)state;
    for (unsigned together = 0; together < 2; together++) {
        struct dr_fs *fs = dr_fs_memory_new();
        const struct dr_backup_options o = {.set = set};
        struct announced a = {fs, together};
        make_tracked(fs, 0);
        ok(dr_backup_fs(fs, "disk", NULL, "b0", &o, NULL, NULL, &err));
        ok(dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, &err));
        ok(dr_set_change(fs, set, announce_again, &a, &err));
        ok(fs->ops->unlink(fs, "b1", &err));
        ok(dr_naming_settle(fs, set, NULL, NULL, &err));
        assert_false(lists(fs, "b1") || exists(fs, "b1.sums"));
        assert_int_equal(lists(fs, "b0"), !together);
        assert_int_equal(exists(fs, "b0"), !together);
        dr_fs_memory_free(fs);
    }
}

/* The set names it, but may not after a power cut: the bitmaps of both lists stay. */
static void a_backup_whose_entry_may_not_last_keeps_its_bitmap(void **state)
{
    (void)state;
    unsigned seen = 0;
    for (uint64_t nth = 0, fired = 1; fired; nth++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(f);
        const struct dr_backup_options o = {.set = set, .bitmap = "B"};
        make_tracked(fs, 0);
        back_up(fs, "b0");
        put(fs, "disk", 2 * MiB, 5000, 0x55);
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .kinds = 1u << FAULTFS_SYNC_DIR});
        int r = dr_backup_fs(fs, "disk", NULL, "b1", &o, NULL, NULL, NULL);
        fired = faultfs_fired(f);
        faultfs_disarm(f);
        if (r < 0 && lists(fs, "b1")) {
            assert_int_equal(begun(fs, NULL, 0), 2);
            assert_true(back_up(fs, "b2").incremental);
            holds_the_disk(fs, "b2");
            seen++;
        } else if (r < 0) { /* there is nothing by its name */
            assert_false(exists(fs, "b1") || exists(fs, "b1.sums"));
        }
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
    assert_true(seen > 0);
}

/* ------------------------------------------------------------------ verify */

static void verify_tells_where_a_backup_differs(void **state)
{
    struct dr_fs *fs = *state;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5, 0x55);
    back_up(fs, "b1");
    put(fs, "b0", 70 * KiB, 1, 0x12);
    refused(dr_backup_verify_fs(fs, set, "b0", NULL, NULL, NULL, &err), EBADMSG, "at 65536");
    refused(dr_backup_verify_fs(fs, set, "b1", NULL, NULL, NULL, &err), EBADMSG, "at 65536");
    refused(dr_backup_verify_fs(fs, set, "b2", NULL, NULL, NULL, &err), ENOENT, "b2");
    ok(fs->ops->unlink(fs, "b0.sums", &err));
    refused(dr_backup_verify_fs(fs, set, "b0", NULL, NULL, NULL, &err), EBADMSG, "digest");
    put(fs, "b0", 70 * KiB, 1, 0x11);
    verified(fs, "b0");
}

static int cannot_read(void *user, const struct faultfs_io *io)
{
    return io->kind == FAULTFS_READ && strcmp(io->path, user) == 0 && io->off > 0 ? -EIO : 0;
}

/* It may be read again tomorrow, so nothing is recorded. */
static void a_backup_that_cannot_be_read_just_now_is_not_recorded_as_damaged(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct dr_backup_set s;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    faultfs_observe(f, cannot_read, (void *)(uintptr_t) "b0");
    refused(dr_backup_verify_fs(faultfs_fs(f), set, "b0", NULL, NULL, NULL, &err), EIO, "b0");
    faultfs_free(f);
    ok(dr_set_load(&s, fs, set, &err));
    assert_null(s.all[0].damaged);
    assert_null(s.all[0].verified);
    dr_set_free(&s);
    verified(fs, "b0");
}

static void verify_compares_with_a_disk_in_use(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    uint8_t byte = 0x99;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_backup_verify_fs(fs, set, "b0", NULL, disk, NULL, &err));
    ok(dr_pwrite(disk, &byte, 130 * KiB, 1, 0, &err));
    refused(dr_backup_verify_fs(fs, set, "b0", NULL, disk, NULL, &err), EBADMSG, "at 131072");
    ok(dr_truncate(disk, 4 * MiB, &err));
    refused(dr_backup_verify_fs(fs, set, "b0", NULL, disk, NULL, &err), EBADMSG, "bytes");
    ok(dr_close(disk, &err));
}

static void write_set(struct dr_fs *fs, const char *text)
{
    struct dr_file *file = NULL;
    fs->ops->unlink(fs, set, NULL);
    ok(dr_file_open(fs, set, DR_FILE_CREATE, &file, &err));
    ok(dr_file_pwrite(file, text, 0, strlen(text), &err));
    dr_file_unref(file);
}

static void a_file_that_is_no_set_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const char *const texts[] = {
        "",
        "[]",
        "{\"drover-backups\": 2, \"backups\": []}",
        "{\"drover-backups\": 1, \"backups\": 3}",
        "{\"drover-backups\": 1, \"backups\": [{}]}",
        "{\"drover-backups\": 1, \"backups\": [{\"name\": \"a\", \"file\": \"a\", \"format\": "
        "\"raw\","
        "\"disk\": \"d\", \"time\": \"t\", \"size\": -1, \"copied\": 0, "
        "\"digest\": \"00000000000000000000000000000000\"}]}",
        "{\"drover-backups\": 1, \"backups\": [{\"name\": \"a\", \"file\": \"a\", \"format\": "
        "\"raw\","
        "\"disk\": \"d\", \"time\": \"t\", \"size\": 1, \"copied\": 0, \"digest\": \"0\"}]}",
    };
    struct dr_backup_set s;
    make_tracked(fs, 0);
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        const struct dr_backup_options o = {.set = set};
        write_set(fs, texts[i]);
        refused(dr_set_load(&s, fs, set, &err), EINVAL, set);
        refused(dr_backup_fs(fs, "disk", NULL, "b0", &o, NULL, NULL, &err), EINVAL, set);
        assert_false(exists(fs, "b0"));
    }
}

/* ------------------------------------------------------------------ restore */

static void restoring_writes_only_what_differs(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size, written;
    make_tracked(fs, 0);
    uint8_t *want = view(fs, "disk", &size);
    back_up(fs, "b0");
    ok(dr_restore_fs(fs, "b0", "disk", NULL, NULL, &written, &err));
    assert_int_equal(written, 0);
    put(fs, "disk", 2 * MiB, 5, 0x55);
    put(fs, "disk", 0, 4096, 0);
    ok(dr_restore_fs(fs, "b0", "disk", NULL, NULL, &written, &err));
    assert_true(written > 0 && written <= 128 * KiB);
    same_view(fs, "disk", want, size);
    assert_true(back_up(fs, "b1").incremental); /* what was restored has changed, too */
    holds_the_disk(fs, "b1");
    free(want);
}

static void a_restored_disk_has_the_size_of_the_backup(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_restore_options o = {0};
    struct dr_disk *disk = NULL;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    uint64_t size;
    uint8_t *want = view(fs, "b0", &size);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_truncate(disk, MiB, &err));
    ok(dr_close(disk, &err));
    ok(dr_restore_fs(fs, "b0", "disk", &o, NULL, NULL, &err));
    same_view(fs, "disk", want, size);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_truncate(disk, 8 * MiB, &err));
    ok(dr_close(disk, &err));
    refused(dr_restore_fs(fs, "b0", "disk", &o, NULL, NULL, &err), EINVAL, "--shrink");
    o.shrink = true;
    ok(dr_restore_fs(fs, "b0", "disk", &o, NULL, NULL, &err));
    same_view(fs, "disk", want, size);
    free(want);
}

static void a_disk_in_use_is_not_restored(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    make_tracked(fs, 0);
    back_up(fs, "b0");
    put(fs, "disk", 2 * MiB, 5, 0x55);
    back_up(fs, "b1");
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    assert_true(dr_restore_fs(fs, "b0", "disk", NULL, NULL, NULL, NULL) < 0);
    ok(dr_close(disk, &err));
    refused(dr_restore_fs(fs, "b1", "b0", NULL, NULL, NULL, &err), EBUSY, "b0");
    refused(dr_restore_fs(fs, "disk", "b0", NULL, NULL, NULL, &err), EBUSY, "b1");
}

static void a_restore_that_failed_goes_on(void **state)
{
    (void)state;
    for (uint64_t nth = 0, fired = 1; fired; nth++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(f);
        uint64_t size, seed = 4;
        make_tracked(fs, 0);
        uint8_t *want = view(fs, "disk", &size);
        back_up(fs, "b0");
        change_disk(fs, &seed, 6);
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .partial = true, .seed = nth + 1});
        int r = dr_restore_fs(fs, "b0", "disk", NULL, NULL, NULL, NULL);
        fired = faultfs_fired(f);
        faultfs_disarm(f);
        if (r < 0)
            ok(dr_restore_fs(fs, "b0", "disk", NULL, NULL, NULL, &err));
        same_view(fs, "disk", want, size);
        free(want);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_chain_of_backups_reads_as_the_disk_did),
        cmocka_unit_test(a_chain_by_bitmaps_beside_a_disk_reads_as_it_did),
        ops_test(an_incremental_backup_holds_only_what_has_changed),
        ops_test(a_disk_may_change_its_size_between_backups),
        ops_test(a_disk_that_shrinks_and_grows_again_misses_nothing),
        ops_test(without_the_side_file_the_last_backup_is_read),
        ops_test(any_format_that_has_parents_takes_an_increment),
        ops_test(a_bitmap_without_a_backup_means_a_full_one),
        ops_test(since_means_the_bitmap_of_the_last_backup),
        ops_test(a_bitmap_that_was_not_stored_is_never_trusted),
        ops_test(a_bitmap_that_no_backup_began_is_not_trusted),
        ops_test(a_disk_that_another_program_wrote_to_is_backed_up_after_a_rebuild),
        ops_test(an_older_copy_of_the_disk_is_backed_up_in_full),
        ops_test(sets_do_not_take_bitmaps_from_each_other),
        ops_test(a_disabled_bitmap_is_not_trusted),
        ops_test(a_failed_backup_leaves_the_bitmap_as_it_was),
        ops_test(an_increment_of_a_disk_in_use_is_of_one_instant),
        cmocka_unit_test(increments_by_bitmaps_beside_a_disk_in_use_are_of_one_instant),
        cmocka_unit_test(after_a_power_cut_the_next_backup_misses_nothing),
        cmocka_unit_test(after_a_power_cut_bitmaps_beside_a_disk_miss_nothing),
        cmocka_unit_test(after_a_failure_the_next_backup_misses_nothing),
        ops_test(a_set_that_has_gone_meanwhile_is_not_made_anew),
        cmocka_unit_test(killed_backups_of_one_second_are_judged_each_for_itself),
        cmocka_unit_test(a_backup_whose_entry_may_not_last_keeps_its_bitmap),
        ops_test(verify_tells_where_a_backup_differs),
        ops_test(a_backup_that_cannot_be_read_just_now_is_not_recorded_as_damaged),
        ops_test(verify_compares_with_a_disk_in_use),
        ops_test(a_file_that_is_no_set_is_refused),
        ops_test(restoring_writes_only_what_differs),
        ops_test(a_restored_disk_has_the_size_of_the_backup),
        ops_test(a_disk_in_use_is_not_restored),
        cmocka_unit_test(a_restore_that_failed_goes_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
