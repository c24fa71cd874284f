/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Faults planted into what backups rest on, one at a time: the programs of backups.h must notice
 * each of them. The linker leads calls of a few functions here (--wrap), so the library is as it is
 * but for the fault. Each try is a process of its own. */
#include <string.h>

#include "backups.h"
#include "core/bitmap-file.h"
#include "core/internal.h"
#include "formats/qcow2/bitmap.h"
#include "ops/dirty.h"

enum fault {
    NOTHING,
    MARK_LATE,
    CLEAR_EARLY,
    DISCARD_UNSEEN,
    PUBLISH_UNFLUSHED,
    IN_PLACE_UNSEEN,
    TRUST_UNCLEAN,
};

static enum fault planted;

/* ------------------------------------------------------------------ the functions that are wrapped
 */

void __real_dr_noting_changed(struct dr_image *image, uint64_t off, uint64_t len);
void __wrap_dr_noting_changed(struct dr_image *image, uint64_t off, uint64_t len);
bool __real_dr_dirty_any(const struct dr_dirty *dirty, uint64_t off, uint64_t len);
bool __wrap_dr_dirty_any(const struct dr_dirty *dirty, uint64_t off, uint64_t len);
int __real_dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err);
int __wrap_dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err);
int __real_dr_hooks_before(struct dr_chain *chain, uint64_t off, uint64_t len,
                           struct dr_error *err);
int __wrap_dr_hooks_before(struct dr_chain *chain, uint64_t off, uint64_t len,
                           struct dr_error *err);
bool __real_dr_hooks_any_before(const struct dr_chain *chain);
bool __wrap_dr_hooks_any_before(const struct dr_chain *chain);
int __real_dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                      struct dr_disk **disk, struct dr_error *err);
int __wrap_dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                      struct dr_disk **disk, struct dr_error *err);
int __real_dr_bitmap_file_load(struct dr_fs *fs, const char *path, struct dr_bitmap_file *b,
                               struct dr_error *err);
int __wrap_dr_bitmap_file_load(struct dr_fs *fs, const char *path, struct dr_bitmap_file *b,
                               struct dr_error *err);
int __real_dr_file_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp,
                         struct dr_error *err);
int __wrap_dr_file_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp,
                         struct dr_error *err);
int __real_qcow2_bitmaps_load(struct dr_image *image, struct qcow2_bitmaps *t,
                              struct dr_error *err);
int __wrap_qcow2_bitmaps_load(struct dr_image *image, struct qcow2_bitmaps *t,
                              struct dr_error *err);

int __real_dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                                struct dr_error *err);
int __wrap_dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                                struct dr_error *err);

/* MARK_LATE: a change is marked only when the next one comes, long after it was answered. */
void __wrap_dr_noting_changed(struct dr_image *image, uint64_t off, uint64_t len)
{
    static struct {
        struct dr_image *image;
        uint64_t off, len;
    } last;
    if (planted != MARK_LATE) {
        __real_dr_noting_changed(image, off, len);
        return;
    }
    if (last.image == image && image->noting)
        __real_dr_noting_changed(image, last.off, last.len);
    last.image = image;
    last.off = off;
    last.len = len;
}

/* CLEAR_EARLY: a grain counts as copied as soon as somebody looks whether it must be. */
bool __wrap_dr_dirty_any(const struct dr_dirty *dirty, uint64_t off, uint64_t len)
{
    bool any = __real_dr_dirty_any(dirty, off, len);
    if (any && planted == CLEAR_EARLY)
        dr_dirty_clear((struct dr_dirty *)(uintptr_t)dirty, off, len);
    return any;
}

/* DISCARD_UNSEEN: a discard copies nothing before it changes the disk. */
static _Thread_local bool discarding;

int __wrap_dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err)
{
    discarding = true;
    int r = __real_dr_discard(disk, off, len, err);
    discarding = false;
    return r;
}

int __wrap_dr_hooks_before(struct dr_chain *chain, uint64_t off, uint64_t len, struct dr_error *err)
{
    return planted == DISCARD_UNSEEN && discarding ? 0
                                                   : __real_dr_hooks_before(chain, off, len, err);
}

/* IN_PLACE_UNSEEN: what is overwritten in place is not told to the hook. */
bool __wrap_dr_hooks_any_before(const struct dr_chain *chain)
{
    return planted != IN_PLACE_UNSEEN && __real_dr_hooks_any_before(chain);
}

/* PUBLISH_UNFLUSHED: the new image of a backup is never flushed, yet it gets its name and entry. */
int __wrap_dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                      struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options o = options ? *options : (struct dr_open_options){0};
    if (planted == PUBLISH_UNFLUSHED && strstr(path, ".drover.new-"))
        o.flags |= DR_OPEN_NO_FLUSH;
    return __real_dr_open_fs(fs, path, &o, disk, err);
}

/* TRUST_UNCLEAN: bitmaps that an interrupted writer left are taken for stored ones. */
static bool trusts_unclean(void)
{
    return planted == TRUST_UNCLEAN && backups_after_cut;
}

int __wrap_dr_bitmap_file_load(struct dr_fs *fs, const char *path, struct dr_bitmap_file *b,
                               struct dr_error *err)
{
    int r = __real_dr_bitmap_file_load(fs, path, b, err);
    if (r == 0 && trusts_unclean())
        b->in_use = false;
    return r;
}

int __wrap_dr_file_stamp(struct dr_file *f, bool settle, struct dr_file_stamp *stamp,
                         struct dr_error *err)
{
    int r = __real_dr_file_stamp(f, settle, stamp, err);
    if (r == 0 && planted == TRUST_UNCLEAN) /* times that are not known are not compared */
        *stamp = (struct dr_file_stamp){.size = stamp->size};
    return r;
}

int __wrap_qcow2_bitmaps_load(struct dr_image *image, struct qcow2_bitmaps *t, struct dr_error *err)
{
    int r = __real_qcow2_bitmaps_load(image, t, err);
    for (uint32_t i = 0; r == 0 && trusts_unclean() && i < t->n; i++)
        t->list[i].flags &= ~(uint32_t)QCOW2_BITMAP_IN_USE;
    return r;
}

struct listing {
    dr_bitmap_each each;
    void *user;
};

static int list_as_stored(void *user, const struct dr_bitmap_info *info)
{
    const struct listing *l = user;
    struct dr_bitmap_info stored = *info;
    stored.inconsistent = false;
    return l->each(l->user, &stored);
}

int __wrap_dr_image_bitmap_list(struct dr_image *image, dr_bitmap_each each, void *user,
                                struct dr_error *err)
{
    struct listing l = {each, user};
    return trusts_unclean() ? __real_dr_image_bitmap_list(image, list_as_stored, &l, err)
                            : __real_dr_image_bitmap_list(image, each, user, err);
}

/* ------------------------------------------------------------------ the tests */

static uint64_t attempt;

static void programs(void **state)
{
    if (planted == TRUST_UNCLEAN)
        dr_noting_samples = 0;
    backups_program(*state, model_seed() + attempt, 4096, 40,
                    planted == PUBLISH_UNFLUSHED || planted == TRUST_UNCLEAN ? 100 : 1);
}

static bool noticed(const char *subject, enum fault fault)
{
    const struct subject *s = model_subject(subject);
    bool found = false;
    assert_non_null(s);
    planted = fault;
    for (attempt = 0; attempt < 10 && !found; attempt++)
        found = model_detects(programs, s);
    planted = NOTHING;
    return found;
}

static void without_a_fault_nothing_is_found(void **state)
{
    (void)state;
    assert_false(noticed("raw", NOTHING));
    assert_false(noticed("qcow2-odd", NOTHING));
}

static void a_bit_that_is_set_after_the_acknowledgement_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", MARK_LATE));
    assert_true(noticed("vmdk-sparse", MARK_LATE));
    assert_true(noticed("add-cow-over-raw", MARK_LATE));
}

static void a_bit_that_is_cleared_before_the_copy_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", CLEAR_EARLY));
    assert_true(noticed("qcow2-odd", CLEAR_EARLY));
}

static void a_discard_without_copy_before_write_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", DISCARD_UNSEEN));
    assert_true(noticed("qcow2-odd", DISCARD_UNSEEN));
}

static void a_backup_that_is_named_before_its_flush_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", PUBLISH_UNFLUSHED));
    assert_true(noticed("qcow2-odd", PUBLISH_UNFLUSHED));
}

static void a_write_in_place_that_bypasses_the_hook_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", IN_PLACE_UNSEEN));
    assert_true(noticed("vmdk-flat", IN_PLACE_UNSEEN));
    assert_true(noticed("qcow2-odd", IN_PLACE_UNSEEN));
}

static void a_bitmap_that_is_trusted_after_an_unclean_end_is_noticed(void **state)
{
    (void)state;
    assert_true(noticed("raw", TRUST_UNCLEAN));
    assert_true(noticed("qcow2-odd", TRUST_UNCLEAN));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(without_a_fault_nothing_is_found),
        cmocka_unit_test(a_bit_that_is_set_after_the_acknowledgement_is_noticed),
        cmocka_unit_test(a_bit_that_is_cleared_before_the_copy_is_noticed),
        cmocka_unit_test(a_discard_without_copy_before_write_is_noticed),
        cmocka_unit_test(a_backup_that_is_named_before_its_flush_is_noticed),
        cmocka_unit_test(a_write_in_place_that_bypasses_the_hook_is_noticed),
        cmocka_unit_test(a_bitmap_that_is_trusted_after_an_unclean_end_is_noticed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
