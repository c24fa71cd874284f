/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills in the middle of whole operations: after any prefix of what they do to the
 * disk, with any part of what was not durable, the top opens read-only and reads as before; doing
 * it again finishes, and so does recover first. */
#include "test-ops.h"
#include "faultfs.h"
#include "powerfs.h"

#include <stdio.h>

#define SIZE (768 * KiB)

struct operation {
    const char *name;
    const char *top; /* what is looked at, before and after */
    int (*run)(struct dr_fs *fs, struct dr_error *err);
    bool split; /* text descriptors, extents of their own */
};

static int onto_stranger(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = "b.vmdk", .backing_format = "vmdk"};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int onto_long_name(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "a-name-of-some-length-that-moves-everything-behind-it-in-the-descriptor.vmdk",
        .backing_format = "vmdk"};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int onto_stranger_dropping(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int flatten(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = ""};
    return dr_rebase_fs(fs, "top.vmdk", &o, NULL, err);
}

static int stream(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_stream_options o = {.base = "a.vmdk"};
    return dr_stream_fs(fs, "top.vmdk", &o, NULL, err);
}

static int commit(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top.vmdk", &o, NULL, err);
}

static int commit_deep(struct dr_fs *fs, struct dr_error *err)
{
    struct dr_commit_options o = {.base = "a.vmdk"};
    return dr_commit_fs(fs, "top.vmdk", &o, NULL, err);
}

static int snapshot(struct dr_fs *fs, struct dr_error *err)
{
    char *active = NULL;
    int r = dr_snapshot_create_fs(fs, "top.vmdk", NULL, NULL, &active, err);
    free(active);
    return r;
}

static int convert_over(struct dr_fs *fs, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    return dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, err);
}

static const struct operation operations[] = {
    {"rebase", "top.vmdk", onto_stranger, false},
    {"rebase, split", "top.vmdk", onto_stranger, true},
    {"rebase to a long name", "top.vmdk", onto_long_name, false},
    {"rebase, dropping what is equal", "top.vmdk", onto_stranger_dropping, false},
    {"flatten", "top.vmdk", flatten, false},
    {"stream", "top.vmdk", stream, false},
    {"commit", "top.vmdk", commit, false},
    {"commit, split", "top.vmdk", commit, true},
    {"commit through two", "top.vmdk", commit_deep, false},
    {"snapshot", "top.vmdk", snapshot, false},
    {"snapshot, split", "top.vmdk", snapshot, true},
    {"convert over a disk", "twin.vmdk", convert_over, false},
};

static void make_image(struct dr_fs *fs, const char *path, const char *backing, bool split)
{
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {.format = "vmdk",
                                  .size = SIZE,
                                  .has_size = true,
                                  .backing = backing,
                                  .backing_format = backing ? "vmdk" : NULL,
                                  .pairs = split ? &sub : NULL,
                                  .n_pairs = split};
    ok(dr_create_fs(fs, path, &o, &err));
}

static void family(struct dr_fs *fs, bool split)
{
    make_image(fs, "a.vmdk", NULL, split);
    put(fs, "a.vmdk", 0, 256 * KiB, 0x11);
    make_image(fs, "mid.vmdk", "a.vmdk", split);
    put(fs, "mid.vmdk", 128 * KiB, 64 * KiB, 0x22);
    put(fs, "mid.vmdk", 512 * KiB, 64 * KiB, 0x23);
    make_image(fs, "top.vmdk", "mid.vmdk", split);
    put(fs, "top.vmdk", 64 * KiB, 4 * KiB, 0x33);
    put(fs, "top.vmdk", 192 * KiB, 64 * KiB, 0);
    put(fs, "top.vmdk", 640 * KiB, 64 * KiB, 0x44);
    make_image(fs, "b.vmdk", NULL, split);
    put(fs, "b.vmdk", 0, 64 * KiB, 0x11);
    put(fs, "b.vmdk", 640 * KiB, 64 * KiB, 0x44);
    make_image(fs, "a-name-of-some-length-that-moves-everything-behind-it-in-the-descriptor.vmdk",
               NULL, false);
    const char *from = "top.vmdk"; /* the view of top, so that replacing it changes no byte */
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    ok(dr_convert_fs(fs, &from, 1, "twin.vmdk", &o, NULL, &err));
}

static const struct operation *current;
static char where[256];

static bool same_as(struct dr_fs *fs, const char *path, const uint8_t *want, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(SIZE);
    int r = dr_open_fs(fs, path, NULL, &disk, err);
    if (r == 0)
        r = dr_pread(disk, buf, 0, SIZE, err);
    if (disk)
        dr_close(disk, NULL);
    if (r == 0)
        for (size_t i = 0; i < SIZE && r == 0; i++)
            if (buf[i] != want[i])
                r = dr_fail(err, EILSEQ, "byte %zu is %02x, not %02x", i, buf[i], want[i]);
    free(buf);
    return r == 0;
}

#define check(cond, what)                                                         \
    do {                                                                          \
        if (!(cond)) {                                                            \
            if (!report)                                                          \
                return false;                                                     \
            fail_msg("%s, %s: %s: %s", current->name, where, what, problem.text); \
        }                                                                         \
    } while (0)

/* One disk as it may be found after the cut. */
static bool look(struct dr_fs *disk, const uint8_t *want, bool again, bool recover_first,
                 bool report)
{
    struct dr_error problem = DR_ERROR_INIT;
    check(same_as(disk, current->top, want, &problem), "does not read as before");
    if (!again)
        return true;
    unsigned found;
    if (recover_first)
        check(dr_recover_fs(disk, current->top, NULL, false, NULL, NULL, &found, &problem) == 0,
              "recover fails");
    check(same_as(disk, current->top, want, &problem), "recover changes it");
    int r = current->run(disk, &problem);
    check(r == 0, "the rerun fails");
    check(same_as(disk, current->top, want, &problem), "the rerun changes it");
    check(dr_recover_fs(disk, current->top, NULL, false, NULL, NULL, &found, &problem) == 0,
          "recover fails after the rerun");
    check(same_as(disk, current->top, want, &problem), "recover changes the finished disk");
    return true;
}

static bool all_cuts(struct powerfs *p, const uint8_t *want, bool report)
{
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        for (int mode = 0; mode < POWERFS_MODES; mode++) {
            size_t open_ops = powerfs_open_ops(p, i);
            uint64_t seeds = mode == POWERFS_RANDOM        ? 3
                             : mode == POWERFS_ALL_BUT_ONE ? dr_min(open_ops, 6)
                                                           : 1;
            for (uint64_t seed = 0; seed < seeds; seed++) {
                char text[128] = "the end";
                if (i < powerfs_ops(p))
                    powerfs_op_text(p, i, text, sizeof(text));
                snprintf(where, sizeof(where), "%zu mode %d seed %d before %s", i, mode, (int)seed,
                         text);
                struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, seed);
                bool good = look(disk, want, mode == POWERFS_ALL || (i + seed) % 5 == 0, i % 2 == 1,
                                 report);
                dr_fs_memory_free(disk);
                if (!good)
                    return false;
            }
            if (open_ops == 0)
                break;
        }
    }
    return true;
}

static bool run_operation(const struct operation *o, size_t skip, size_t *flushes, bool report)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    current = o;
    family(fs, o->split);
    uint8_t *want = view(fs, o->top, &size);
    powerfs_settle(p);
    powerfs_skip_flush(p, skip);
    ok(o->run(fs, &err));
    *flushes = powerfs_flushes(p);
    powerfs_skip_flush(p, SIZE_MAX);
    bool good = all_cuts(p, want, report);
    free(want);
    powerfs_free(p);
    return good;
}

static void no_cut_changes_the_view(void **state)
{
    (void)state;
    size_t flushes;
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
        assert_true(run_operation(&operations[i], SIZE_MAX, &flushes, true));
}

/* The suite can fail: at least one flush that does nothing is caught in each kind of operation. */
static void missing_flush_is_caught(void **state)
{
    (void)state;
    static const size_t with[] = {0, 4, 6};
    for (size_t k = 0; k < 3; k++) {
        const struct operation *o = &operations[with[k]];
        size_t flushes = 1;
        bool caught = false;
        for (size_t n = 0; n < flushes && !caught; n++)
            caught = !run_operation(o, n, &flushes, false);
        if (!caught)
            fail_msg("%s: no missing flush was caught", o->name);
    }
}

/* ------------------------------------------------------------------ a kill, then a power cut */

/* From its n-th I/O on nothing the operation does gets through: what it did before is in the
 * machine's memory, as much of it as it did not flush. Was it long enough for that? */
static bool kill_at(const struct operation *o, struct powerfs *p, uint64_t n)
{
    struct faultfs *f = faultfs_new(powerfs_fs(p));
    faultfs_arm(f, &(struct faultfs_plan){.nth = n, .for_good = true});
    struct dr_error problem = DR_ERROR_INIT;
    o->run(faultfs_fs(f), &problem);
    bool killed = faultfs_fired(f);
    faultfs_free(f);
    return killed;
}

/* What is not marked as unclean must be sound. */
static bool is_sound(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    char *json = NULL;
    int r = dr_check_fs(fs, path, NULL, DR_REPAIR_NONE, NULL, NULL, &json, err);
    if (r == 0 && strstr(json, "\"corruptions\""))
        r = dr_fail(err, EIO, "check finds corruptions");
    free(json);
    return r == 0;
}

/* Only what is durable, and that and the last change. */
static void cuts_from(struct powerfs *p, size_t first, uint64_t n, const uint8_t *want)
{
    static const enum powerfs_mode modes[] = {POWERFS_NONE, POWERFS_ONLY_LAST};
    for (size_t i = first; i <= powerfs_ops(p); i++)
        for (int mode = 0; mode < 2; mode++) {
            struct dr_error problem = DR_ERROR_INIT;
            char text[128] = "the end";
            if (i < powerfs_ops(p))
                powerfs_op_text(p, i, text, sizeof(text));
            struct dr_fs *disk = powerfs_cut(p, i, modes[mode], 0);
            if (!same_as(disk, current->top, want, &problem) ||
                !is_sound(disk, current->top, &problem))
                fail_msg("%s, killed at %llu, done again, cut before %s (mode %d): %s",
                         current->name, (unsigned long long)n, text, mode, problem.text);
            dr_fs_memory_free(disk);
        }
}

/* *changes: how many had been made at the last kill; the same number is the same kill. */
static bool kill_and_cut(const struct operation *o, uint64_t n, size_t *changes)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    current = o;
    family(fs, o->split);
    uint8_t *want = view(fs, o->top, &size);
    powerfs_settle(p);
    bool killed = kill_at(o, p, n);
    size_t first = powerfs_ops(p);
    if (first != *changes) {
        ok(o->run(fs, &err));
        cuts_from(p, first, n, want);
    }
    *changes = first;
    free(want);
    powerfs_free(p);
    return killed;
}

/* What the killed process left unflushed is not dirty for the one that goes on: it has to be made
 * durable all the same, before anything builds on it. */
static void a_cut_after_a_kill_does_not_change_the_view(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof(operations) / sizeof(operations[0]); k++) {
        size_t changes = SIZE_MAX;
        for (uint64_t n = 0; kill_and_cut(&operations[k], n, &changes); n++)
            ;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_changes_the_view),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_does_not_change_the_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
