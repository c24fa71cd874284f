/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills in the middle of whole operations: after any prefix of what they do to the
 * disk, with any part of what was not durable, the top opens read-only and reads as before; doing
 * it again finishes, and so does recover first. */
#ifndef DROVER_TESTS_TEST_OPS_POWER_H
#define DROVER_TESTS_TEST_OPS_POWER_H

#include "test-ops.h"
#include "faultfs.h"
#include "powerfs.h"
#include "slower.h"

#include <stdio.h>

#ifndef SIZE
#define SIZE (768 * KiB)
#endif

struct operation {
    const char *name;
    const char *top; /* what is looked at, before and after */
    int (*run)(struct dr_fs *fs, struct dr_error *err);
    void (*family)(struct dr_fs *fs); /* make the disks */
    const char *left;                 /* what the disk is once top is gone, a raw disk; or NULL */
};

static const struct operation *current;
static char where[256];

static inline bool same_as(struct dr_fs *fs, const char *path, const uint8_t *want,
                           struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(SIZE);
    struct dr_open_options raw = {.format = "raw"};
    bool gone = current->left && path == current->top && !exists(fs, path);
    int r = dr_open_fs(fs, gone ? current->left : path, gone ? &raw : NULL, &disk, err);
    if (r == 0)
        r = dr_pread(disk, buf, 0, SIZE, err);
    if (disk)
        dr_close(disk, NULL);
    if (r == 0 && memcmp(buf, want, SIZE) != 0)
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
static inline bool look(struct dr_fs *disk, const uint8_t *want, bool again, bool recover_first,
                        bool report)
{
    struct dr_error problem = DR_ERROR_INIT;
    check(same_as(disk, current->top, want, &problem), "does not read as before");
    if (!again)
        return true;
    if (current->left && !exists(disk, current->top))
        return true; /* done */
    unsigned found;
    if (recover_first)
        check(dr_recover_fs(disk, current->top, NULL, false, NULL, NULL, &found, &problem) == 0,
              "recover fails");
    check(same_as(disk, current->top, want, &problem), "recover changes it");
    int r = current->run(disk, &problem);
    check(r == 0, "the rerun fails");
    check(same_as(disk, current->top, want, &problem), "the rerun changes it");
    if (current->left)
        return true;
    check(dr_recover_fs(disk, current->top, NULL, false, NULL, NULL, &found, &problem) == 0,
          "recover fails after the rerun");
    check(same_as(disk, current->top, want, &problem), "recover changes the finished disk");
    return true;
}

static inline bool all_cuts(struct powerfs *p, const uint8_t *want, bool report)
{
    for (size_t i = 0; i <= powerfs_ops(p); i = powerfs_next(p, i, POWERFS_EVERY)) {
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

static inline bool run_operation(const struct operation *o, size_t skip, size_t *flushes,
                                 bool report)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    current = o;
    o->family(fs);
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

/* ------------------------------------------------------------------ a kill, then a power cut */

/* From its n-th I/O on nothing the operation does gets through: what it did before is in the
 * machine's memory, as much of it as it did not flush. Was it long enough for that? */
static inline bool kill_at(const struct operation *o, struct powerfs *p, uint64_t n)
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
static inline bool is_sound(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    char *json = NULL;
    if (current->left && !exists(fs, path))
        return true;
    int r = dr_check_fs(fs, path, NULL, DR_REPAIR_NONE, NULL, NULL, &json, err);
    if (r == 0 && strstr(json, "\"corruptions\""))
        r = dr_fail(err, EIO, "check finds corruptions");
    free(json);
    return r == 0;
}

/* Only what is durable, and that and the last change. */
static inline void cuts_from(struct powerfs *p, size_t first, uint64_t n, const uint8_t *want)
{
    static const enum powerfs_mode modes[] = {POWERFS_NONE, POWERFS_ONLY_LAST};
    for (size_t i = first; i <= powerfs_ops(p); i = powerfs_next(p, i, POWERFS_EVERY))
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
static inline bool kill_and_cut(const struct operation *o, uint64_t n, size_t *changes)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    current = o;
    o->family(fs);
    uint8_t *want = view(fs, o->top, &size);
    powerfs_settle(p);
    bool killed = kill_at(o, p, n);
    size_t first = powerfs_ops(p);
    if (first != *changes) {
        if (!o->left || exists(fs, o->top))
            ok(o->run(fs, &err));
        cuts_from(p, first, n, want);
    }
    *changes = first;
    free(want);
    powerfs_free(p);
    return killed;
}

/* ------------------------------------------------------------------ over a table of them */

static inline void cut_each(const struct operation *all, size_t n)
{
    size_t flushes;
    for (size_t i = 0; i < n; i++)
        assert_true(run_operation(&all[i], SIZE_MAX, &flushes, true));
}

/* The suite can fail: a flush that does nothing is caught. */
static inline void miss_a_flush(const struct operation *o)
{
    size_t flushes = 1;
    bool caught = false;
    ONLY_IN_A_PLAIN_BUILD();
    for (size_t n = 0; n < flushes && !caught; n++)
        caught = !run_operation(o, n, &flushes, false);
    if (!caught)
        fail_msg("%s: no missing flush was caught", o->name);
}

/* What the killed process left unflushed is not dirty for the one that goes on: it has to be made
 * durable all the same, before anything builds on it. */
static inline void kill_and_cut_each(const struct operation *all, size_t n)
{
    for (size_t k = 0; k < n; k++) {
        size_t changes = SIZE_MAX;
        for (uint64_t at = 0; kill_and_cut(&all[k], at, &changes); at += SLOWER)
            ;
    }
}

#endif
