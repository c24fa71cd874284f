/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Power cuts and kills while names of parents are recorded anew. Each image has its old record or
 * its new one: with absolute names the disk reads at every instant, with a parent that has moved it
 * opens as soon as all records are new, and never onto another parent; doing it again finishes. */
#define SIZE (384 * KiB)
#include "test-ops-power.h"

struct kind {
    const char *format;
    bool by_name; /* a moved parent is known by its name and size, not by a content id */
    bool two;     /* the data are in a file X.raw beside X */
};

static const struct kind kinds[] = {
    {"vmdk", false, false}, {"qcow2", true, false}, {"add-cow", true, true}};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))
static const struct kind *kind;

static int pack(struct dr_fs *fs, struct dr_error *err)
{
    return dr_pack_names_fs(fs, "/top", NULL, NULL, err);
}

static int relocate(struct dr_fs *fs, struct dr_error *err)
{
    return dr_relocate_fs(fs, "/top", NULL, NULL, err);
}

static void child(struct dr_fs *fs, const char *path, const char *backing)
{
    struct dr_create_options o = {
        .format = kind->format, .backing = backing, .backing_format = kind->format};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base <- mid <- top, by absolute names. */
static void chain(struct dr_fs *fs, const char *base, const char *mid)
{
    make(fs, base, kind->format, SIZE, NULL);
    put(fs, base, 0, 200 * KiB, 'b');
    child(fs, mid, base);
    put(fs, mid, 100 * KiB, 200 * KiB, 'm');
    child(fs, "/top", mid);
    put(fs, "/top", 250 * KiB, 100 * KiB, 't');
}

/* Both parents were in another directory before, and of a VMDK, which looks beside it, had other
 * names. */
static void move(struct dr_fs *fs)
{
    ok(fs->ops->rename(fs, "/old/base", kind->by_name ? "/base" : "/base-now", &err));
    ok(fs->ops->rename(fs, "/old/mid", kind->by_name ? "/mid" : "/mid-now", &err));
    if (!kind->two)
        return;
    ok(fs->ops->rename(fs, "/old/base.raw", "/base.raw", &err));
    ok(fs->ops->rename(fs, "/old/mid.raw", "/mid.raw", &err));
}

static void packs(struct dr_fs *fs)
{
    chain(fs, "/base", "/mid");
}

static const struct operation pack_op = {"chain pack", "/top", pack, packs, NULL};

static void no_cut_of_pack_changes_the_view(void **state)
{
    (void)state;
    for (kind = kinds; kind < kinds + N_KINDS; kind++) {
        size_t flushes;
        unsigned changed;
        struct dr_fs *fs = dr_fs_memory_new();
        packs(fs);
        ok(dr_pack_names_fs(fs, "/top", NULL, &changed, &err));
        assert_int_equal(changed, 2);
        dr_fs_memory_free(fs);
        assert_true(run_operation(&pack_op, SIZE_MAX, &flushes, true));
    }
}

static void a_cut_after_a_kill_of_pack_does_not_change_the_view(void **state)
{
    (void)state;
    for (kind = kinds; kind < kinds + N_KINDS; kind++)
        kill_and_cut_each(&pack_op, 1);
}

/* ------------------------------------------------------------------ relocate */

/* It opens as before, or not at all; and the command mends it. */
static void mends(struct dr_fs *fs, const uint8_t *want, bool must_open)
{
    struct dr_error problem = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    bool opens = dr_open_fs(fs, "/top", NULL, &disk, &problem) == 0;
    if (opens)
        dr_close(disk, NULL);
    if (must_open && !opens)
        fail_msg("%s, %s: does not open: %s", kind->format, where, problem.text);
    if (opens && !same_as(fs, "/top", want, &problem))
        fail_msg("%s, %s: reads as another disk: %s", kind->format, where, problem.text);
    if (relocate(fs, &problem) < 0)
        fail_msg("%s, %s: the rerun fails: %s", kind->format, where, problem.text);
    if (!same_as(fs, "/top", want, &problem))
        fail_msg("%s, %s: the rerun does not mend it: %s", kind->format, where, problem.text);
}

static struct powerfs *broken_chain(uint8_t **want)
{
    static const struct operation op = {"chain relocate", "/top", relocate, NULL, NULL};
    struct powerfs *p = powerfs_new();
    uint64_t size;
    current = &op;
    chain(powerfs_fs(p), "/old/base", "/old/mid");
    *want = view(powerfs_fs(p), "/top", &size);
    move(powerfs_fs(p));
    powerfs_settle(p);
    return p;
}

static void cuts_of_relocate(struct powerfs *p, size_t first, const uint8_t *want)
{
    for (size_t i = first; i <= powerfs_ops(p); i = powerfs_next(p, i, POWERFS_EVERY))
        for (int mode = 0; mode < POWERFS_MODES; mode++) {
            char text[128] = "the end";
            if (i < powerfs_ops(p))
                powerfs_op_text(p, i, text, sizeof(text));
            snprintf(where, sizeof(where), "cut %zu mode %d before %s", i, mode, text);
            struct dr_fs *disk = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            mends(disk, want, i == powerfs_ops(p));
            dr_fs_memory_free(disk);
        }
}

static void a_cut_of_relocate_leaves_what_it_mends(void **state)
{
    (void)state;
    for (kind = kinds; kind < kinds + N_KINDS; kind++) {
        uint8_t *want;
        struct powerfs *p = broken_chain(&want);
        unsigned changed;
        ok(dr_relocate_fs(powerfs_fs(p), "/top", NULL, &changed, &err));
        assert_int_equal(changed, 2);
        cuts_of_relocate(p, 0, want);
        free(want);
        powerfs_free(p);
    }
}

/* *changes: how many had been made at the last kill; the same number is the same kill. */
static bool kill_relocate(uint64_t n, size_t *changes)
{
    uint8_t *want;
    struct powerfs *p = broken_chain(&want);
    bool killed = kill_at(current, p, n);
    size_t first = powerfs_ops(p);
    snprintf(where, sizeof(where), "killed at %llu", (unsigned long long)n);
    if (first != *changes) {
        mends(powerfs_fs(p), want, !killed);
        cuts_of_relocate(p, first, want);
    }
    *changes = first;
    free(want);
    powerfs_free(p);
    return killed;
}

static void relocate_killed_anywhere_goes_on(void **state)
{
    (void)state;
    for (kind = kinds; kind < kinds + N_KINDS; kind++) {
        size_t changes = SIZE_MAX;
        for (uint64_t at = 0; kill_relocate(at, &changes); at += SLOWER)
            ;
    }
}

/* Also where their names lead round in a circle. */
static void a_chain_that_could_not_be_opened_is_not_walked(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    kind = &kinds[0];
    chain(fs, "/base", "/mid");
    dr_chain_set_bound(2);
    refused(relocate(fs, &err), ELOOP, "longer than 2 images");
    dr_chain_set_bound(3);
    ok(relocate(fs, &err));
    dr_chain_set_bound(0);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_cut_of_pack_changes_the_view),
        cmocka_unit_test(a_cut_after_a_kill_of_pack_does_not_change_the_view),
        cmocka_unit_test(a_cut_of_relocate_leaves_what_it_mends),
        cmocka_unit_test(relocate_killed_anywhere_goes_on),
        cmocka_unit_test(a_chain_that_could_not_be_opened_is_not_walked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
