/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The power fails during a restore. Each sector of the disk is as it was or as it is to be, the
 * backups are whole, the next backup misses nothing, and the same restore again ends what was
 * begun. After one that has ended nothing is missing. */
#define SIZE (3u * MiB / 2 + 3 * 512)
#include "powerfs.h"
#include "slower.h"
#include "test-backup.h"

#define CUTS 25 /* of a restore, in each mode */

struct scene {
    struct powerfs *power;
    uint8_t *before, *want;
    uint64_t size;
    char where[200];
};

static void make_scene(struct scene *s, const char *format)
{
    *s = (struct scene){.power = powerfs_new()};
    struct dr_fs *fs = powerfs_fs(s->power);
    uint64_t seed = 7;
    disk_format = format;
    make_tracked(fs, 4096);
    back_up(fs, "b0");
    put(fs, "disk", 500 * KiB, 90 * KiB, 0x33);
    put(fs, "disk", 64 * KiB, 64 * KiB, 0);
    back_up(fs, "b1");
    s->want = view(fs, "disk", &s->size);
    change_disk(fs, &seed, 8);
    put(fs, "disk", 0, 200 * KiB, 0x55);
    s->before = view(fs, "disk", &s->size);
    powerfs_settle(s->power);
}

static void end_scene(struct scene *s)
{
    free(s->before);
    free(s->want);
    powerfs_free(s->power);
}

static int restore(struct dr_fs *fs, struct dr_error *why)
{
    return dr_restore_fs(fs, "b1", "disk", NULL, NULL, NULL, why);
}

/* NULL, or what is wrong. The disk is opened as its next user would do it. */
static const char *look_at_disk(const struct scene *s, struct dr_fs *fs, bool done)
{
    uint64_t size;
    uint8_t *now = view(fs, "disk", &size);
    const char *wrong = size == s->size ? NULL : "the disk has another size";
    for (uint64_t i = 0; !wrong && i < size; i += 512) {
        size_t n = (size_t)dr_min(512, size - i);
        if (memcmp(now + i, s->want + i, n) != 0 &&
            (done || memcmp(now + i, s->before + i, n) != 0))
            wrong = done ? "it has ended, and is not durable" : "a sector is neither old nor new";
    }
    free(now);
    return wrong;
}

static void back_up_what_is_there(const struct scene *s, struct dr_fs *fs)
{
    struct dr_backup_options o = {.set = set, .bitmap = "B"};
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &why);
    if (r == -EUCLEAN) { /* it says that it does not know all */
        dr_error_reset(&why);
        o.full = true;
        r = dr_backup_fs(fs, "disk", NULL, "b2", &o, NULL, NULL, &why);
    }
    if (r < 0)
        fail_msg("%s: the next backup: %s", s->where, why.text);
    holds_the_disk(fs, "b2");
}

static const char *look(const struct scene *s, struct dr_fs *fs, bool done, bool again)
{
    struct dr_error why = DR_ERROR_INIT;
    const char *wrong = look_at_disk(s, fs, done);
    if (wrong || !again)
        return wrong;
    verified(fs, "b0");
    verified(fs, "b1");
    back_up_what_is_there(s, fs);
    if (restore(fs, &why) < 0)
        fail_msg("%s: the next restore: %s", s->where, why.text);
    return look_at_disk(s, fs, true);
}

/* skip: a flush that does nothing. Returns whether all is well. */
static bool cut_everywhere(struct scene *s, size_t skip, size_t *flushes)
{
    bool well = true;
    powerfs_skip_flush(s->power, skip);
    ok(restore(powerfs_fs(s->power), &err));
    *flushes = powerfs_flushes(s->power);
    powerfs_skip_flush(s->power, SIZE_MAX);
    size_t all = powerfs_ops(s->power);
    for (size_t i = 0; well && i <= all; i = powerfs_next(s->power, i, CUTS))
        for (int mode = 0; well && mode < POWERFS_MODES; mode++) {
            char op[120] = "the end";
            if (i < all)
                powerfs_op_text(s->power, i, op, sizeof(op));
            snprintf(s->where, sizeof(s->where), "%s, cut before %s (%zu of %zu), mode %d",
                     disk_format, op, i, all, mode);
            struct dr_fs *cut = powerfs_cut(s->power, i, (enum powerfs_mode)mode, i);
            const char *wrong = look(s, cut, i == all, skip == SIZE_MAX);
            dr_fs_memory_free(cut);
            if (wrong && skip == SIZE_MAX)
                fail_msg("%s: %s", s->where, wrong);
            well = !wrong;
        }
    return well;
}

static const char *const formats[] = {"raw", "qcow2", "vmdk", "add-cow"};

static void a_restore_that_was_cut_off_is_ended_by_another(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof(formats) / sizeof(formats[0]); k++) {
        struct scene s;
        size_t flushes;
        make_scene(&s, formats[k]);
        assert_true(cut_everywhere(&s, SIZE_MAX, &flushes));
        end_scene(&s);
    }
}

static void a_flush_that_is_missing_is_noticed(void **state)
{
    size_t flushes = 1;
    bool noticed = false;
    (void)state;
    ONLY_IN_A_PLAIN_BUILD();
    for (size_t n = 0; n < flushes && !noticed; n++) {
        struct scene s;
        make_scene(&s, "raw");
        noticed = !cut_everywhere(&s, n, &flushes);
        end_scene(&s);
    }
    assert_true(noticed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_restore_that_was_cut_off_is_ended_by_another),
        cmocka_unit_test(a_flush_that_is_missing_is_noticed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
