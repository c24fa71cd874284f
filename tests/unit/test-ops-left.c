/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What operations leave behind when a disk in use goes on with fewer images: files, empty overlays,
 * bitmaps. */
#include "powerfs.h"
#include "test-ops-crowd.h"

static void make_on(struct dr_fs *fs, const char *path, const char *format, const char *backing,
                    const char *backing_format)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : CROWD_SIZE,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing_format};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base ← low ← mid ← top, with some data in each. */
static void make_disks(struct dr_fs *fs, const char *format)
{
    static const char *const names[] = {"base", "low", "mid", "top"};
    for (unsigned i = 0; i < 4; i++) {
        make_on(fs, names[i], format, i ? names[i - 1] : NULL, i ? format : NULL);
        put(fs, names[i], i * 300 * KiB, MiB, 0x11 * ((int)i + 1));
    }
}

static void snapshot(struct dr_disk *disk, const char *name)
{
    struct dr_overlay over = {.disk = disk, .path = name};
    ok(dr_disks_snapshot(&over, 1, NULL, &err));
    free(over.active);
}

static const char *const formats[] = {"vmdk", "qcow2", "add-cow"};

/* ------------------------------------------------------------------ files */

static size_t first_rename(struct powerfs *p)
{
    size_t i = 0;
    while (powerfs_op_kind(p, i) != POWERFS_RENAME)
        i++;
    return i;
}

/* Its name has nothing of its parent's. */
static void recover_finds_a_snapshot_that_was_being_made(void **state)
{
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct powerfs *p = powerfs_new();
        struct dr_disk *disk;
        unsigned found = 0;
        make_disks(powerfs_fs(p), formats[i]);
        make_on(powerfs_fs(p), "another", formats[i], NULL, NULL);
        size_t files = count_files(powerfs_fs(p));
        ok(dr_open_fs(powerfs_fs(p), "top", &(struct dr_open_options){.flags = DR_OPEN_RDWR}, &disk,
                      &err));
        powerfs_settle(p);
        snapshot(disk, "new");
        ok(dr_close(disk, &err));
        struct dr_fs *cut = powerfs_cut(p, first_rename(p), POWERFS_ALL, 0);
        ok(dr_recover_fs(cut, "another", NULL, false, NULL, NULL, &found, &err));
        assert_int_equal(found, 0);
        assert_int_not_equal(count_files(cut), files);
        ok(dr_recover_fs(cut, "top", NULL, false, NULL, NULL, &found, &err));
        assert_int_equal(found, 1);
        assert_int_equal(count_files(cut), files);
        dr_fs_memory_free(cut);
        powerfs_free(p);
    }
}

static size_t inconsistent(struct dr_fs *fs, const char *path)
{
    struct dr_disk *disk = NULL;
    struct dr_bitmap *list;
    size_t n, found = 0;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    for (size_t i = 0; i < n; i++)
        found += list[i].inconsistent;
    dr_bitmaps_free(list, n);
    ok(dr_close(disk, &err));
    return found;
}

/* Whenever a writer, or a change of the bitmaps, is cut off: recover says so once, leaves nothing
 * aside, and the disk and its bitmaps go on. */
static void recover_settles_a_file_of_bitmaps(void **state)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_disk *disk = NULL;
    unsigned in_use = 0, aside = 0;
    (void)state;
    make(fs, "d.raw", "raw", MiB, NULL);
    make(fs, "other.raw", "raw", MiB, NULL);
    powerfs_settle(p);
    ok(dr_open_fs(fs, "d.raw", &(struct dr_open_options){.flags = DR_OPEN_RDWR}, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, NULL, &err));
    ok(dr_pwrite(disk, "x", 7, 1, 0, &err));
    ok(dr_close(disk, &err));
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        struct dr_fs *cut = powerfs_cut(p, i, POWERFS_ALL, i);
        unsigned found = 0, again = 0, foreign = 0;
        size_t files = 2 + exists(cut, "d.raw.drover-bitmaps"), before = count_files(cut);
        ok(dr_recover_fs(cut, "other.raw", NULL, false, NULL, NULL, &foreign, &err));
        assert_int_equal(foreign, 0);
        ok(dr_recover_fs(cut, "d.raw", NULL, false, NULL, NULL, &found, &err));
        ok(dr_recover_fs(cut, "d.raw", NULL, false, NULL, NULL, &again, &err));
        assert_int_equal(again, 0);
        assert_int_equal(count_files(cut), files);
        aside += before > files;
        in_use += found > before - files;
        assert_int_equal(found > before - files, inconsistent(cut, "d.raw"));
        dr_fs_memory_free(cut);
    }
    assert_true(in_use > 0 && aside > 0);
    powerfs_free(p);
}

static void images_that_a_stream_takes_out_are_removed(void **state)
{
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd c;
        make_disks(fs, formats[i]);
        size_t files = count_files(fs) / 4; /* of each image */
        crowd_begin(&c, fs, "top");
        const struct dr_stream_options o = {.image = "mid", .base = "base", .remove = true};
        ok(dr_disk_stream(c.disk, &o, NULL, &err));
        assert_int_equal(dr_chain_length(c.disk), 3);
        assert_int_equal(count_files(fs), 3 * files);
        assert_false(exists(fs, "low"));
        crowd_end(&c, "top");
        dr_fs_memory_free(fs);
    }
}

static void images_that_a_commit_takes_out_are_removed(void **state)
{
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd c;
        make_disks(fs, formats[i]);
        size_t files = count_files(fs) / 4;
        crowd_begin(&c, fs, "top");
        ok(dr_disk_commit(c.disk, &(struct dr_commit_options){.top = "mid", .remove = true}, NULL,
                          &err));
        assert_int_equal(count_files(fs), 3 * files);
        assert_false(exists(fs, "mid"));
        crowd_pass(&c, 5);
        const struct dr_commit_options all = {.base = "base", .pivot = true, .remove = true};
        ok(dr_disk_commit(c.disk, &all, NULL, &err));
        assert_int_equal(count_files(fs), files);
        crowd_end(&c, "base");
        dr_fs_memory_free(fs);
    }
}

static void an_image_that_somebody_needs_stays(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_stream_options o = {.base = "base", .remove = true};
    struct dr_disk *disk;
    make_disks(fs, "qcow2");
    make_on(fs, "other", "qcow2", "low", "qcow2");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    refused(dr_disk_stream(disk, &o, NULL, &err), EBUSY,
            "top goes on without low, but that could not be removed");
    assert_int_equal(dr_chain_length(disk), 2);
    assert_false(exists(fs, "mid"));
    assert_true(exists(fs, "low"));
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ empty overlays */

static void an_overlay_that_a_pivot_emptied_does_not_hold_up_the_next_one(void **state)
{
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd c;
        const char *const emptied[] = {"top", "new"};
        struct dr_commit_options o = {.base = "base", .pivot = true};
        make_on(fs, "base", formats[i], NULL, NULL);
        make_on(fs, "top", formats[i], "base", formats[i]);
        crowd_begin(&c, fs, "top");
        ok(dr_disk_commit(c.disk, &o, NULL, &err));
        snapshot(c.disk, "new");
        crowd_pass(&c, 5);
        if (i > 0) /* without content ids it still opens, and shows what the base shows */
            refused(dr_disk_commit(c.disk, &o, NULL, &err), EBUSY, "top");
        o.emptied = emptied;
        o.n_emptied = 2;
        ok(dr_disk_commit(c.disk, &o, NULL, &err));
        crowd_end(&c, "base");
        dr_fs_memory_free(fs);
    }
}

static void an_overlay_that_was_written_to_since_holds_up_the_next_one(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const char *const emptied[] = {"top"};
    const struct dr_commit_options o = {
        .base = "base", .pivot = true, .emptied = emptied, .n_emptied = 1};
    struct dr_disk *disk;
    make_on(fs, "base", "qcow2", NULL, NULL);
    make_on(fs, "top", "qcow2", "base", "qcow2");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_commit(disk, &o, NULL, &err));
    ok(dr_close(disk, &err));
    put(fs, "top", 0, 64 * KiB, 0x55); /* somebody began to use it */
    ok(dr_open_fs(fs, "base", &rw, &disk, &err));
    snapshot(disk, "new");
    refused(dr_disk_commit(disk, &o, NULL, &err), EBUSY, "top");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ bitmaps */

static int note(void *user, uint64_t off, uint64_t len)
{
    uint64_t *bytes = user;
    (void)off;
    *bytes += len;
    return 0;
}

static uint64_t noted(struct dr_fs *fs, const char *path, const char *bitmap)
{
    struct dr_disk *disk;
    uint64_t bytes = 0;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    ok(dr_disk_bitmap_read(disk, bitmap, note, &bytes, &err));
    ok(dr_close(disk, &err));
    return bytes;
}

static void a_pivot_takes_the_bitmaps_of_the_active_image_along(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_bitmap_options small = {.granularity = 64 * KiB};
    struct dr_disk *disk;
    uint8_t bytes[512] = {1};
    make_on(fs, "base", "qcow2", NULL, NULL);
    ok(dr_open_fs(fs, "base", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "both", DR_BITMAP_ADD, &small, &err));
    ok(dr_close(disk, &err));
    make_on(fs, "top", "qcow2", "base", "qcow2");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "both", DR_BITMAP_ADD, &small, &err));
    ok(dr_disk_bitmap_change(disk, "own", DR_BITMAP_ADD, &small, &err));
    ok(dr_pwrite(disk, bytes, 128 * KiB, sizeof(bytes), 0, &err));
    ok(dr_disk_commit(disk, &(struct dr_commit_options){.pivot = true}, NULL, &err));
    assert_string_equal(dr_image_path(disk, 0), "base");
    ok(dr_pwrite(disk, bytes, 320 * KiB, sizeof(bytes), 0, &err)); /* it goes on */
    ok(dr_close(disk, &err));
    assert_int_equal(noted(fs, "base", "own"), 128 * KiB);
    assert_int_equal(noted(fs, "base", "both"), 128 * KiB);
}

/* A bitmap that is there without its bits would hide what was written. */
static void a_pivot_that_is_killed_leaves_no_bitmap_without_its_bits(void **state)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_bitmap_options small = {.granularity = 64 * KiB};
    struct dr_disk *disk;
    uint8_t bytes[512] = {1};
    unsigned without = 0, with = 0;
    (void)state;
    make_on(fs, "base", "qcow2", NULL, NULL);
    make_on(fs, "top", "qcow2", "base", "qcow2");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "own", DR_BITMAP_ADD, &small, &err));
    ok(dr_pwrite(disk, bytes, 128 * KiB, sizeof(bytes), 0, &err));
    ok(dr_disk_commit(disk, &(struct dr_commit_options){.pivot = true}, NULL, &err));
    ok(dr_close(disk, &err));
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        struct dr_fs *cut = powerfs_cut(p, i, POWERFS_ALL, 0);
        uint64_t noted = 0;
        disk = NULL;
        if (dr_fs_exists(cut, "top") && dr_open_fs(cut, "base", NULL, &disk, NULL) == 0) {
            int r = dr_disk_bitmap_read(disk, "own", note, &noted, NULL);
            without += r < 0;
            with += r == 0;
            if (r == 0)
                assert_int_equal(noted, 64 * KiB);
        }
        ok(dr_close(disk, &err));
        dr_fs_memory_free(cut);
    }
    assert_true(without > 0 && with > 0);
    powerfs_free(p);
}

static void a_pivot_to_a_base_that_keeps_no_bitmaps_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    make_on(fs, "base", "raw", NULL, NULL);
    ok(fs->ops->make_device(fs, "base", &err));
    make_on(fs, "top", "qcow2", "base", "raw");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, NULL, &err));
    refused(dr_disk_commit(disk, &(struct dr_commit_options){.pivot = true}, NULL, &err), ENOTSUP,
            "has 1 bitmap inside, which base cannot keep");
    ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_REMOVE, NULL, &err));
    ok(dr_disk_commit(disk, &(struct dr_commit_options){.pivot = true}, NULL, &err));
    ok(dr_close(disk, &err));
}

static void a_pivot_takes_bitmaps_to_a_file_beside_a_raw_base(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_bitmap_options fine = {.granularity = 512};
    const uint8_t sector[512] = {1};
    uint64_t noted = 0;
    struct dr_disk *disk;
    make_on(fs, "base", "raw", NULL, NULL);
    make_on(fs, "top", "qcow2", "base", "raw");
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, &fine, &err));
    ok(dr_pwrite(disk, sector, 1024, 512, 0, &err));
    ok(dr_disk_commit(disk, &(struct dr_commit_options){.pivot = true}, NULL, &err));
    ok(dr_pwrite(disk, sector, 4096, 512, 0, &err));
    ok(dr_close(disk, &err));
    ok(dr_open_fs(fs, "base", NULL, &disk, &err));
    ok(dr_disk_bitmap_read(disk, "b", note, &noted, &err));
    assert_int_equal(noted, 1024);
    ok(dr_close(disk, &err));
}

/* A mirror whose guest writes once more when it is ready. */
struct moving {
    struct dr_disk *disk;
    struct dr_job *job;
    bool pivot;
};

static void write_when_ready(void *user)
{
    struct moving *m = user;
    uint8_t bytes[512] = {2};
    ok(dr_pwrite(m->disk, bytes, 320 * KiB, sizeof(bytes), 0, &err));
    dr_job_complete(m->job, m->pivot);
}

/* Mirror top, which has a bitmap that is on and one that is off, to moved. */
static void mirror_with(struct dr_fs *fs, const struct dr_mirror_options *o, bool pivot)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct moving m = {.pivot = pivot};
    const struct dr_job_options job = {.ready = write_when_ready, .user = &m};
    uint8_t bytes[512] = {1};
    ok(dr_open_fs(fs, "top", &rw, &m.disk, &err));
    ok(dr_job_new(NULL, &job, &m.job, &err));
    ok(dr_disk_mirror(m.disk, "moved", o, m.job, &err));
    dr_job_free(m.job);
    assert_string_equal(dr_image_path(m.disk, 0), pivot ? "moved" : "top");
    ok(dr_pwrite(m.disk, bytes, 512 * KiB, sizeof(bytes), 0, &err)); /* it goes on */
    ok(dr_close(m.disk, &err));
}

static void make_noted(struct dr_fs *fs)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_bitmap_options on = {.granularity = 64 * KiB};
    struct dr_disk *disk;
    uint8_t bytes[512] = {1};
    make_on(fs, "top", "qcow2", NULL, NULL);
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "off", DR_BITMAP_ADD, &on, &err));
    ok(dr_pwrite(disk, bytes, 0, sizeof(bytes), 0, &err));
    ok(dr_disk_bitmap_change(disk, "off", DR_BITMAP_DISABLE, NULL, &err));
    ok(dr_disk_bitmap_change(disk, "on", DR_BITMAP_ADD, &on, &err));
    ok(dr_pwrite(disk, bytes, 128 * KiB, sizeof(bytes), 0, &err));
    ok(dr_close(disk, &err));
}

static void a_mirror_takes_bitmaps_along_if_asked(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 4; i++) {
        const struct dr_mirror_options o = {.bitmaps = i < 2};
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_disk *disk;
        struct dr_bitmap *all;
        size_t n;
        bool pivot = i % 2 == 0;
        make_noted(fs);
        mirror_with(fs, &o, pivot);
        assert_int_equal(noted(fs, "top", "on"), (pivot ? 2u : 3u) * 64 * KiB);
        ok(dr_open_fs(fs, "moved", NULL, &disk, &err));
        ok(dr_disk_bitmaps(disk, &all, &n, &err));
        ok(dr_close(disk, &err));
        assert_int_equal(n, o.bitmaps ? 2 : 0);
        dr_bitmaps_free(all, n);
        if (o.bitmaps) {
            assert_int_equal(noted(fs, "moved", "on"), (pivot ? 3u : 2u) * 64 * KiB);
            assert_int_equal(noted(fs, "moved", "off"), 64 * KiB);
        }
        dr_fs_memory_free(fs);
    }
}

static void a_mirror_without_room_for_bitmaps_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_mirror_options to_raw = {.bitmaps = true, .format = "raw"};
    struct dr_disk *disk;
    make_noted(fs);
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    refused(dr_disk_mirror(disk, "moved", &to_raw, NULL, &err), ENOTSUP,
            "Format driver 'raw' does not support bitmaps inside");
    ok(dr_close(disk, &err));
    assert_false(exists(fs, "moved"));
}

static void a_mirror_takes_bitmaps_beside_an_image_into_one(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_mirror_options to_qcow2 = {.bitmaps = true, .format = "qcow2"};
    const struct dr_bitmap_options on = {.granularity = 64 * KiB};
    const uint8_t bytes[512] = {1};
    struct dr_disk *disk;
    make_on(fs, "other", "vmdk", NULL, NULL);
    ok(dr_open_fs(fs, "other", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "on", DR_BITMAP_ADD, &on, &err));
    ok(dr_pwrite(disk, bytes, 0, sizeof(bytes), 0, &err));
    ok(dr_disk_mirror(disk, "moved", &to_qcow2, NULL, &err));
    ok(dr_pwrite(disk, bytes, 128 * KiB, sizeof(bytes), 0, &err));
    ok(dr_close(disk, &err));
    assert_int_equal(noted(fs, "moved", "on"), 2 * 64 * KiB);
}

/* Killed anywhere, the target has its name only with its bitmaps. */
static void a_mirror_that_is_killed_leaves_no_target_without_its_bitmaps(void **state)
{
    (void)state;
    const struct dr_mirror_options o = {.bitmaps = true};
    struct powerfs *p = powerfs_new();
    unsigned with = 0;
    make_noted(powerfs_fs(p));
    powerfs_settle(p);
    mirror_with(powerfs_fs(p), &o, true);
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        struct dr_fs *cut = powerfs_cut(p, i, POWERFS_ALL, 0);
        if (exists(cut, "moved")) {
            assert_int_equal(noted(cut, "moved", "off"), 64 * KiB);
            with++;
        }
        dr_fs_memory_free(cut);
    }
    assert_true(with > 0);
    powerfs_free(p);
}

/* A mirror that was interrupted may have put them there. */
static void a_mirror_adds_to_bitmaps_that_an_existing_target_has(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_bitmap_options small = {.granularity = 64 * KiB, .disabled = true};
    struct dr_disk *disk;
    make_noted(fs);
    make_on(fs, "moved", "qcow2", NULL, NULL);
    ok(dr_open_fs(fs, "moved", &rw, &disk, &err));
    ok(dr_disk_bitmap_change(disk, "on", DR_BITMAP_ADD, &small, &err));
    ok(dr_close(disk, &err));
    mirror_with(fs, &(struct dr_mirror_options){.bitmaps = true, .existing = true}, true);
    assert_int_equal(noted(fs, "moved", "on"), 2 * 64 * KiB);
    assert_int_equal(noted(fs, "moved", "off"), 64 * KiB);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(recover_finds_a_snapshot_that_was_being_made),
        cmocka_unit_test(recover_settles_a_file_of_bitmaps),
        cmocka_unit_test(images_that_a_stream_takes_out_are_removed),
        cmocka_unit_test(images_that_a_commit_takes_out_are_removed),
        ops_test(an_image_that_somebody_needs_stays),
        cmocka_unit_test(an_overlay_that_a_pivot_emptied_does_not_hold_up_the_next_one),
        ops_test(an_overlay_that_was_written_to_since_holds_up_the_next_one),
        ops_test(a_pivot_takes_bitmaps_to_a_file_beside_a_raw_base),
        ops_test(a_pivot_takes_the_bitmaps_of_the_active_image_along),
        cmocka_unit_test(a_pivot_that_is_killed_leaves_no_bitmap_without_its_bits),
        ops_test(a_pivot_to_a_base_that_keeps_no_bitmaps_is_refused),
        cmocka_unit_test(a_mirror_takes_bitmaps_along_if_asked),
        ops_test(a_mirror_without_room_for_bitmaps_is_refused),
        ops_test(a_mirror_takes_bitmaps_beside_an_image_into_one),
        cmocka_unit_test(a_mirror_that_is_killed_leaves_no_target_without_its_bitmaps),
        ops_test(a_mirror_adds_to_bitmaps_that_an_existing_target_has),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
