/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Content ids and parents of VMDKs. */
#include "test-vmdk.h"

#include <xxhash.h>

#include "faultfs.h"
#include "powerfs.h"

/* ------------------------------------------------------------------ ids */

static void the_cid_changes_once_an_open_and_before_the_data(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    uint32_t first = cid_of("/d/a.vmdk");
    assert_false(vmdk_cid_is_reserved(first));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    assert_int_equal(vmdk_id(disk->chain->images[0]), first);
    write_at(disk, 0, 10, 1);
    uint32_t second = vmdk_id(disk->chain->images[0]);
    assert_int_not_equal(second, first);
    write_at(disk, 5 * GRAIN, 10, 1);
    assert_int_equal(vmdk_id(disk->chain->images[0]), second);
    ok(dr_close(disk, &err));
    assert_int_equal(cid_of("/d/a.vmdk"), second);
    write_one("/d/a.vmdk", 0, 10, 2, DR_OPEN_UNCHANGED);
    assert_int_equal(cid_of("/d/a.vmdk"), second);
    write_one("/d/a.vmdk", 0, 10, 2, 0);
    assert_int_not_equal(cid_of("/d/a.vmdk"), second);
}

/* Between two sessions of one open somebody may have made a child. */
static void a_frozen_image_gets_another_cid_with_the_next_change(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    struct dr_disk *disk = opened("/d/a.vmdk", DR_OPEN_RDWR);
    struct dr_image *image = disk->chain->images[0];
    write_at(disk, 0, 10, 1);
    uint32_t first = vmdk_id(image);
    ok(dr_image_freeze(image, &err));
    uint8_t mark;
    peek("/d/a.vmdk", VMDK_UNCLEAN_AT, &mark, 1);
    assert_int_equal(mark, 0);
    assert_int_equal(cid_of("/d/a.vmdk"), first);
    ok(dr_image_thaw(image, false, &err));
    write_at(disk, 0, 10, 2);
    assert_int_not_equal(vmdk_id(image), first);
    peek("/d/a.vmdk", VMDK_UNCLEAN_AT, &mark, 1);
    assert_int_equal(mark, 1);
    ok(dr_close(disk, &err));
}

static void an_open_without_writes_changes_no_byte(void **state)
{
    (void)state;
    uint8_t before[128 * 512], after[128 * 512];
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    peek("/d/a.vmdk", 0, before, sizeof(before));
    ok(dr_close(opened("/d/a.vmdk", DR_OPEN_RDWR), &err));
    peek("/d/a.vmdk", 0, after, sizeof(after));
    assert_memory_equal(before, after, sizeof(before));
}

static void the_unclean_mark_is_there_while_writing(void **state)
{
    (void)state;
    uint8_t mark;
    ok(create_in(mem, "/d/s.vmdk", 3000 * MIB, "twoGbMaxExtentSparse", NULL, NULL));
    struct dr_disk *disk = opened("/d/s.vmdk", DR_OPEN_RDWR);
    write_at(disk, 0, 10, 1);
    peek("/d/s-s001.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 1);
    peek("/d/s-s002.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 0);
    write_at(disk, 2500 * MIB, 10, 1);
    peek("/d/s-s002.vmdk", 72, &mark, 1);
    assert_int_equal(mark, 1);
    ok(dr_close(disk, &err));
    for (int i = 1; i <= 2; i++) {
        peek(i == 1 ? "/d/s-s001.vmdk" : "/d/s-s002.vmdk", 72, &mark, 1);
        assert_int_equal(mark, 0);
    }
}

static void a_changed_parent_turns_its_children_away(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    uint32_t old = cid_of("/d/base.vmdk");
    ok(dr_close(opened("/d/child.vmdk", 0), &err));
    write_one("/d/base.vmdk", 0, 10, 1, 0);
    struct dr_disk *disk;
    char a[9], b[9];
    snprintf(a, sizeof(a), "%08x", old);
    snprintf(b, sizeof(b), "%08x", cid_of("/d/base.vmdk"));
    fails(ESTALE, a, open_in(mem, "/d/child.vmdk", 0, &disk));
    assert_non_null(strstr(err.text, b));
    assert_non_null(strstr(err.text, "/d/base.vmdk"));
    assert_non_null(strstr(err.text, "rebase -u"));
    ok(dr_close(opened("/d/child.vmdk", DR_OPEN_NO_CHECK_ID), &err));
}

static void an_interrupted_commit_opens(void **state)
{
    (void)state;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 1000, 1, 0);
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    struct dr_image *base = image_of("/d/base.vmdk", DR_OPEN_RDWR);
    struct dr_image *child = image_of("/d/child.vmdk", 0);
    uint32_t id = vmdk_commit_id(base, child);
    ok(vmdk_set_id(base, id, &err));
    dr_image_unref(base, NULL);
    dr_image_unref(child, NULL);
    assert_int_equal(cid_of("/d/base.vmdk"), id);
    struct dr_disk *disk = opened("/d/child.vmdk", 0);
    reads(disk, 0, 1000, 1);
    ok(dr_close(disk, &err));
    child = image_of("/d/child.vmdk", DR_OPEN_RDWR);
    ok(vmdk_set_parent_id(child, id, &err));
    dr_image_unref(child, NULL);
    ok(dr_close(opened("/d/child.vmdk", 0), &err));
}

/* A commit fails between the two ids, and the disk goes on: with the child's own id changes what
 * tells that the commit was begun. */
static void an_id_that_the_child_could_not_learn_comes_with_its_next_one(void **state)
{
    (void)state;
    struct faultfs *faults = faultfs_new(mem);
    struct faultfs_plan plan = {.kinds = 1u << FAULTFS_WRITE};
    struct dr_image *base, *child;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 1000, 1, 0);
    ok(create("/d/child.vmdk", 1 * MIB, "base.vmdk"));
    struct dr_disk *disk;
    ok(open_in(faultfs_fs(faults), "/d/child.vmdk", DR_OPEN_RDWR, &disk));
    child = disk->chain->images[0];
    base = disk->chain->images[1];
    ok(dr_image_thaw(base, true, &err));
    uint32_t id = vmdk_commit_id(base, child);
    ok(vmdk_set_id(base, id, &err));
    faultfs_arm(faults, &plan);
    fails(EIO, "child.vmdk", vmdk_set_parent_id(child, id, &err));
    faultfs_disarm(faults);
    ok(dr_image_freeze(base, &err));
    write_at(disk, 5 * GRAIN, 10, 2);
    ok(dr_close(disk, &err));
    disk = opened("/d/child.vmdk", 0);
    reads(disk, 0, 1000, 1);
    reads(disk, 5 * GRAIN, 10, 2);
    ok(dr_close(disk, &err));
    faultfs_free(faults);
}

static void tracking_and_long_ids_follow_the_cid(void **state)
{
    (void)state;
    make_zeros("/d/x-flat.vmdk", 64 * 512);
    make_text("/d/x.vmdk", "# Disk DescriptorFile\nversion=3\nCID=12345678\nparentCID=ffffffff\n"
                           "createType=\"vmfs\"\nRW 64 VMFS \"x-flat.vmdk\"\n"
                           "changeTrackPath=\"x-ctk.vmdk\"\n"
                           "ddb.longContentID = \"0123456789abcdef0123456712345678\"\n");
    uint64_t size = file_size("/d/x.vmdk");
    write_one("/d/x.vmdk", 0, 10, 1, 0);
    assert_int_equal(file_size("/d/x.vmdk"), size);
    struct dr_image *image = image_of("/d/x.vmdk", 0);
    const struct vmdk_desc *d = &vmdk_of(image)->desc;
    char low[9];
    assert_null(vmdk_desc_find(d, "changeTrackPath"));
    assert_int_equal(d->text[vmdk_desc_find(d, "version")->value], '1');
    CLEANUP_FREE char *id = vmdk_desc_get(d, "ddb.longContentID");
    snprintf(low, sizeof(low), "%08x", vmdk_id(image));
    assert_string_equal(id + 24, low);
    dr_image_unref(image, NULL);
}

/* ------------------------------------------------------------------ parents */

static void hints_of_other_worlds_are_resolved(void **state)
{
    (void)state;
    static const char *const hints[] = {"C:\\\\VMs\\\\base.vmdk", "/vmfs/volumes/1/vm/base.vmdk",
                                        "..\\d\\base.vmdk", "/elsewhere/d/base.vmdk"};
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 100, 3, 0);
    for (size_t i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof(path), "/d/c%zu.vmdk", i);
        ok(create(path, 1 * MIB, "base.vmdk"));
        struct dr_image *image = image_of(path, DR_OPEN_RDWR);
        struct vmdk_desc d;
        ok(vmdk_desc_copy(image, &d, &err));
        ok(vmdk_desc_set(&d, "parentFileNameHint", hints[i], true, NULL, &err));
        ok(vmdk_store(image, &d, 0, &err));
        dr_image_unref(image, NULL);
        struct dr_disk *disk = opened(path, 0);
        reads(disk, 0, 100, 3);
        ok(dr_close(disk, &err));
    }
}

/* The recorded name leads to another disk, the right one stands beside the child. */
static void of_several_candidates_the_one_with_the_right_id_is_taken(void **state)
{
    (void)state;
    struct dr_disk *disk;
    ok(create("/d/base.vmdk", 1 * MIB, NULL));
    write_one("/d/base.vmdk", 0, 100, 3, 0);
    ok(create("/d/old/base.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "base.vmdk"));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    ok(vmdk_set_backing(image, NULL, "old/base.vmdk", "vmdk", 0, &err));
    dr_image_unref(image, NULL);
    disk = opened("/d/c.vmdk", 0);
    reads(disk, 0, 100, 3);
    assert_string_equal(disk->chain->images[1]->path, "/d/base.vmdk");
    ok(dr_close(disk, &err));
    write_one("/d/base.vmdk", 0, 100, 4, 0);
    fails(ESTALE, "CID", open_in(mem, "/d/c.vmdk", 0, &disk));
}

static void set_backing(const char *path, const char *parent, const char *name, unsigned flags)
{
    struct dr_image *p = parent ? image_of(parent, 0) : NULL;
    struct dr_image *image = image_of(path, DR_OPEN_RDWR);
    ok(vmdk_set_backing(image, p, name, name ? "vmdk" : NULL, flags, &err));
    dr_image_unref(image, NULL);
    dr_image_unref(p, NULL);
}

static void backing_is(const char *path, const char *name, uint32_t id)
{
    struct dr_image *image = image_of(path, DR_OPEN_NO_BACKING);
    if (name)
        assert_string_equal(image->backing_name, name);
    else
        assert_null(image->backing_name);
    assert_int_equal(vmdk_parent_id(image), id);
    dr_image_unref(image, NULL);
}

static char long_name[700];

static void another_parent_is_recorded(void **state)
{
    (void)state;
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/b.vmdk", 1 * MIB, NULL));
    for (int split = 0; split < 2; split++) {
        const char *child = split ? "/d/split.vmdk" : "/d/child.vmdk";
        ok(create_in(mem, child, 1 * MIB, split ? "twoGbMaxExtentSparse" : "monolithicSparse", NULL,
                     "a.vmdk"));
        backing_is(child, "a.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, "/d/b.vmdk", "b.vmdk", DR_TRY);
        backing_is(child, "a.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, "/d/b.vmdk", "b.vmdk", 0);
        backing_is(child, "b.vmdk", cid_of("/d/b.vmdk"));
        set_backing(child, "/d/a.vmdk", long_name, 0); /* needs more than one sector */
        backing_is(child, long_name, cid_of("/d/a.vmdk"));
        set_backing(child, NULL, "gone.vmdk", 0); /* unseen: the id stays */
        backing_is(child, "gone.vmdk", cid_of("/d/a.vmdk"));
        set_backing(child, NULL, NULL, 0);
        backing_is(child, NULL, VMDK_NO_PARENT);
        ok(dr_close(opened(child, 0), &err));
    }
    char end[512];
    peek("/d/child.vmdk", 11 * 512, end, sizeof(end));
    assert_true(dr_is_zero(end, sizeof(end))); /* no redo copy is left */
}

static void impossible_parents_are_refused_before_anything(void **state)
{
    (void)state;
    static char name[5000];
    memset(name, 'n', sizeof(name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    ok(create_in(mem, "/d/flat.vmdk", 1 * MIB, "monolithicFlat", NULL, NULL));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    fails(EINVAL, "quotes", vmdk_set_backing(image, NULL, "a\"b", NULL, DR_TRY, &err));
    fails(EINVAL, "line ends", vmdk_set_backing(image, NULL, "a\nb", NULL, DR_TRY, &err));
    fails(EINVAL, "must be a VMDK", vmdk_set_backing(image, NULL, "x", "raw", DR_TRY, &err));
    fails(ENAMETOOLONG, "bytes", vmdk_set_backing(image, NULL, name, NULL, DR_TRY, &err));
    dr_image_unref(image, NULL);
    image = image_of("/d/flat.vmdk", DR_OPEN_RDWR);
    fails(EINVAL, "only sparse", vmdk_set_backing(image, NULL, "a.vmdk", NULL, DR_TRY, &err));
    dr_image_unref(image, NULL);
    backing_is("/d/c.vmdk", "a.vmdk", cid_of("/d/a.vmdk"));
}

/* The states of a rewrite that goes through the redo copy, as a crash leaves them. */
static void every_state_of_a_rewrite_opens(void **state)
{
    (void)state;
    uint8_t old[20 * 512], fresh[20 * 512], block[10 * 512] = {0};
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    peek("/d/c.vmdk", 512, old, sizeof(old));
    set_backing("/d/c.vmdk", "/d/a.vmdk", long_name, 0);
    peek("/d/c.vmdk", 512, fresh, sizeof(fresh));
    size_t len = strlen((char *)fresh);
    memcpy(block, "\0drover redo 1\0", 15);
    put_le64(block + 16, len);
    put_le64(block + 24, XXH3_64bits(fresh, len));
    memcpy(block + 32, fresh, len);
    uint32_t id = cid_of("/d/a.vmdk");
    for (size_t half = 0; half <= 1536; half += 512) {
        /* the copy is complete, the text is new in its first sectors */
        poke("/d/c.vmdk", 512, old, sizeof(old));
        poke("/d/c.vmdk", 512 + 5120, block, sizeof(block));
        poke("/d/c.vmdk", 512, fresh, half);
        backing_is("/d/c.vmdk", long_name, id); /* read-only: nothing is written */
        uint8_t now[512];
        peek("/d/c.vmdk", 512 + 5120, now, sizeof(now));
        assert_memory_equal(now, block, sizeof(now));
        dr_image_unref(image_of("/d/c.vmdk", DR_OPEN_RDWR), NULL);
        uint8_t all[20 * 512];
        peek("/d/c.vmdk", 512, all, sizeof(all));
        assert_memory_equal(all, fresh, sizeof(all));
    }
    for (size_t torn = 512; torn < 1536; torn += 512) { /* the copy is not complete */
        poke("/d/c.vmdk", 512, old, sizeof(old));
        poke("/d/c.vmdk", 512 + 5120, block, torn);
        backing_is("/d/c.vmdk", "a.vmdk", id);
    }
}

/* Any sectors of what was not flushed may be on the disk. */
static void a_rewrite_is_old_or_new_after_any_cut(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_image *image;
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create_in(fs, "/d/a.vmdk", 1 * MIB, "monolithicSparse", NULL, NULL));
    ok(create_in(fs, "/d/c.vmdk", 1 * MIB, "monolithicSparse", NULL, "a.vmdk"));
    powerfs_settle(p);
    ok(dr_image_open(fs, "/d/c.vmdk", "vmdk", DR_OPEN_RDWR, &image, &err));
    ok(vmdk_set_backing(image, NULL, long_name, "vmdk", 0, &err));
    ok(dr_image_unref(image, &err));
    for (size_t i = 0; i <= powerfs_ops(p); i++)
        for (uint64_t seed = 0; seed < 32; seed++) {
            struct dr_fs *disk = powerfs_cut(p, i, POWERFS_RANDOM, seed);
            ok(dr_image_open(disk, "/d/c.vmdk", "vmdk", DR_OPEN_NO_BACKING, &image, &err));
            assert_true(strcmp(image->backing_name, "a.vmdk") == 0 ||
                        strcmp(image->backing_name, long_name) == 0);
            assert_non_null(vmdk_desc_find(&vmdk_of(image)->desc, "ddb.virtualHWVersion"));
            ok(dr_image_unref(image, &err));
            dr_fs_memory_free(disk);
        }
    powerfs_free(p);
}

/* A redo copy that stayed must not win over what the same session records later. */
static void a_rewrite_that_failed_does_not_undo_a_later_one(void **state)
{
    (void)state;
    struct faultfs *faults = faultfs_new(mem);
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    bool fired = true;
    for (uint64_t nth = 0; fired; nth++) {
        mem->ops->unlink(mem, "/d/c.vmdk", NULL);
        ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
        struct dr_image *image;
        ok(dr_image_open(faultfs_fs(faults), "/d/c.vmdk", "vmdk", DR_OPEN_RDWR, &image, &err));
        struct faultfs_plan plan = {.nth = nth, .kinds = 1u << FAULTFS_WRITE};
        faultfs_arm(faults, &plan);
        int r = vmdk_set_backing(image, NULL, long_name, "vmdk", 0, &err);
        fired = faultfs_fired(faults);
        faultfs_disarm(faults);
        assert_int_equal(r, fired ? -EIO : 0);
        dr_error_reset(&err);
        ok(vmdk_set_backing(image, NULL, "later.vmdk", "vmdk", 0, &err));
        ok(dr_image_unref(image, &err));
        backing_is("/d/c.vmdk", "later.vmdk", cid_of("/d/a.vmdk"));
    }
    faultfs_free(faults);
}

/* A change of one sector is written in place, where that copy would still win. */
static void a_rewrite_that_failed_does_not_hide_a_small_change(void **state)
{
    (void)state;
    struct faultfs *faults = faultfs_new(mem);
    memset(long_name, 'n', sizeof(long_name) - 1);
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    bool fired = true;
    for (uint64_t nth = 0; fired; nth++) {
        mem->ops->unlink(mem, "/d/c.vmdk", NULL);
        ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
        struct dr_image *image;
        ok(dr_image_open(faultfs_fs(faults), "/d/c.vmdk", "vmdk", DR_OPEN_RDWR, &image, &err));
        struct faultfs_plan plan = {.nth = nth, .kinds = 1u << FAULTFS_WRITE};
        faultfs_arm(faults, &plan);
        int r = vmdk_set_backing(image, NULL, long_name, "vmdk", 0, &err);
        fired = faultfs_fired(faults);
        faultfs_disarm(faults);
        assert_int_equal(r, fired ? -EIO : 0);
        ok(vmdk_set_parent_id(image, 0x12345678, &err));
        ok(dr_image_unref(image, &err));
        image = image_of("/d/c.vmdk", DR_OPEN_NO_BACKING);
        assert_int_equal(vmdk_parent_id(image), 0x12345678);
        dr_image_unref(image, NULL);
    }
    faultfs_free(faults);
}

static void a_full_descriptor_is_refused(void **state)
{
    (void)state;
    ok(create("/d/a.vmdk", 1 * MIB, NULL));
    ok(create("/d/c.vmdk", 1 * MIB, "a.vmdk"));
    struct dr_image *image = image_of("/d/c.vmdk", DR_OPEN_RDWR);
    struct vmdk_desc d;
    static char comment[5200];
    memset(comment, 'x', sizeof(comment) - 1);
    ok(vmdk_desc_copy(image, &d, &err));
    ok(vmdk_desc_set(&d, "ddb.comment", comment, true, NULL, &err));
    fails(ENOSPC, "no room", vmdk_store(image, &d, VMDK_STORE_TRY, &err));
    vmdk_desc_free(&d);
    dr_image_unref(image, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_cid_changes_once_an_open_and_before_the_data),
        T(a_frozen_image_gets_another_cid_with_the_next_change),
        T(an_open_without_writes_changes_no_byte),
        T(the_unclean_mark_is_there_while_writing),
        T(a_changed_parent_turns_its_children_away),
        T(an_interrupted_commit_opens),
        T(an_id_that_the_child_could_not_learn_comes_with_its_next_one),
        T(tracking_and_long_ids_follow_the_cid),
        T(hints_of_other_worlds_are_resolved),
        T(of_several_candidates_the_one_with_the_right_id_is_taken),
        T(another_parent_is_recorded),
        T(impossible_parents_are_refused_before_anything),
        T(every_state_of_a_rewrite_opens),
        T(a_rewrite_is_old_or_new_after_any_cut),
        T(a_rewrite_that_failed_does_not_undo_a_later_one),
        T(a_rewrite_that_failed_does_not_hide_a_small_change),
        T(a_full_descriptor_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
