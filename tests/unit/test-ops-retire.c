/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An add-cow in use becomes the raw disk that its data is in, while other threads read and write
 * it: nothing is opened again, what they read is what was written, and after a cut anywhere either
 * the whole add-cow or the whole raw disk is there. */
#include "test-ops-crowd.h"
#include "test-ops-power.h"

static void make_disk(struct dr_fs *fs, const char *path, const char *format, const char *backing,
                      const char *backing_format, uint64_t size)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : size,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing_format};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base.qcow2 ← mid.add-cow ← top.add-cow */
static void make_disks(struct dr_fs *fs, uint64_t size)
{
    make_disk(fs, "base.qcow2", "qcow2", NULL, NULL, size);
    put(fs, "base.qcow2", 0, size / 2, 0x11);
    make_disk(fs, "mid.add-cow", "add-cow", "base.qcow2", "qcow2", size);
    put(fs, "mid.add-cow", size / 8 + 100, size / 4, 0x22);
    make_disk(fs, "top.add-cow", "add-cow", "mid.add-cow", "add-cow", size);
    put(fs, "top.add-cow", size / 4, size / 8, 0x33);
    put(fs, "top.add-cow", size / 16, size / 16, 0);
}

static int retire(struct dr_disk *disk, struct dr_job *job, struct dr_error *err)
{
    return dr_disk_stream(disk, &(struct dr_stream_options){.retire = true}, job, err);
}

static void is_raw_now(struct dr_fs *fs, struct dr_disk *disk)
{
    assert_int_equal(dr_chain_length(disk), 1);
    assert_string_equal(dr_image_path(disk, 0), "top.raw");
    assert_string_equal(dr_image_format(disk, 0), "raw");
    assert_true(dr_writable(disk));
    assert_false(exists(fs, "top.add-cow"));
}

static void the_disk_goes_on_with_its_raw_file(void **state)
{
    struct dr_fs *fs = *state;
    struct crowd c;
    make_disks(fs, CROWD_SIZE);
    crowd_begin(&c, fs, "top.add-cow");
    ok(retire(c.disk, NULL, &err));
    is_raw_now(fs, c.disk);
    ok(fs->ops->unlink(fs, "mid.add-cow", &err)); /* nobody needs the parents any more */
    ok(fs->ops->unlink(fs, "base.qcow2", &err));
    crowd_end(&c, "top.raw");
}

/* What such a disk discards is forgotten by its bits. */
static void a_disk_without_a_parent_goes_on_with_its_raw_file(void **state)
{
    struct dr_fs *fs = *state;
    struct crowd c;
    make_disks(fs, CROWD_SIZE);
    crowd_begin(&c, fs, "top.add-cow");
    ok(dr_disk_stream(c.disk, NULL, NULL, &err));
    crowd_pass(&c, 20);
    assert_string_equal(dr_image_format(c.disk, 0), "add-cow");
    ok(retire(c.disk, NULL, &err));
    is_raw_now(fs, c.disk);
    crowd_end(&c, "top.raw");
}

static void the_raw_disk_gets_an_overlay_again(void **state)
{
    struct dr_fs *fs = *state;
    struct crowd c;
    make_disks(fs, CROWD_SIZE);
    crowd_begin(&c, fs, "top.add-cow");
    ok(retire(c.disk, NULL, &err));
    struct dr_overlay over = {.disk = c.disk, .path = "new.add-cow", .format = "add-cow"};
    ok(dr_disks_snapshot(&over, 1, NULL, &err));
    free(over.active);
    crowd_pass(&c, 10);
    ok(dr_truncate(c.disk, CROWD_SIZE + MiB, &err));
    ok(dr_disk_stream(c.disk, &(struct dr_stream_options){.retire = true}, NULL, &err));
    assert_string_equal(dr_image_path(c.disk, 0), "new.raw");
    crowd_end(&c, "new.raw");
}

static int fail_record(void *user, const struct dr_switch *switches, size_t n, struct dr_error *err)
{
    bool *fail = user;
    assert_int_equal(n, 1);
    assert_string_equal(switches[0].path, "top.raw");
    assert_string_equal(switches[0].format, "raw");
    return *fail ? dr_fail(err, EIO, "cannot be recorded") : 0;
}

static void a_disk_whose_raw_file_cannot_be_recorded_stays_an_add_cow(void **state)
{
    struct dr_fs *fs = *state;
    bool fail = true;
    const struct dr_job_options o = {.record = fail_record, .user = &fail};
    struct crowd c;
    struct dr_job *job;
    make_disks(fs, CROWD_SIZE);
    crowd_begin(&c, fs, "top.add-cow");
    for (int i = 0; i < 2; i++) {
        ok(dr_job_new(NULL, &o, &job, &err));
        if (fail)
            refused(retire(c.disk, job, &err), EIO, "cannot be recorded");
        else
            ok(retire(c.disk, job, &err));
        dr_job_free(job);
        assert_string_equal(dr_image_format(c.disk, 0), fail ? "add-cow" : "raw");
        crowd_pass(&c, 10);
        fail = false;
    }
    is_raw_now(fs, c.disk);
    crowd_end(&c, "top.raw");
}

static void what_cannot_be_left_to_a_raw_file_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_stream_options to_base = {.base = "base.qcow2", .retire = true};
    struct dr_disk *disk;
    make_disks(fs, MiB);
    make_disk(fs, "child.qcow2", "qcow2", "top.add-cow", "add-cow", 0);
    ok(dr_open_fs(fs, "top.add-cow", &rw, &disk, &err));
    refused(retire(disk, NULL, &err), EBUSY, "child.qcow2");
    ok(fs->ops->unlink(fs, "child.qcow2", &err));
    refused(dr_disk_stream(disk, &to_base, NULL, &err), EINVAL, "only without a parent");
    assert_int_equal(dr_chain_length(disk), 3);
    ok(dr_close(disk, &err));
    make_disk(fs, "other.qcow2", "qcow2", NULL, NULL, MiB);
    ok(dr_open_fs(fs, "other.qcow2", &rw, &disk, &err));
    refused(retire(disk, NULL, &err), ENOTSUP, "do not keep their disk in a plain file");
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ cut off */

static int run_retire(struct dr_fs *fs, struct dr_error *err)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int r = dr_open_fs(fs, "top.add-cow", &rw, &disk, err);
    if (r < 0)
        return r;
    r = retire(disk, NULL, err);
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static void small_disks(struct dr_fs *fs)
{
    make_disks(fs, SIZE);
}

static const struct operation operations[] = {
    {"stream to a raw disk", "top.add-cow", run_retire, small_disks, "top.raw"},
};

static void a_cut_leaves_the_add_cow_or_the_raw_disk(void **state)
{
    (void)state;
    cut_each(operations, 1);
}

static void missing_flush_is_caught(void **state)
{
    (void)state;
    miss_a_flush(&operations[0]);
}

static void a_cut_after_a_kill_leaves_the_add_cow_or_the_raw_disk(void **state)
{
    (void)state;
    kill_and_cut_each(operations, 1);
}

/* What the guest flushes after the disk went over is found by the raw file's name. */
static void writes_to_the_raw_disk_last(void **state)
{
    static const char text[] = "written to the raw disk";
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_disk *disk;
    uint64_t size;
    (void)state;
    make_disks(fs, SIZE);
    powerfs_settle(p);
    ok(dr_open_fs(fs, "top.add-cow", &rw, &disk, &err));
    ok(retire(disk, NULL, &err));
    ok(dr_pwrite(disk, text, 300 * KiB, sizeof(text), 0, &err));
    ok(dr_flush(disk, &err));
    size_t flushed = powerfs_ops(p);
    ok(dr_close(disk, &err));
    for (size_t i = flushed; i <= powerfs_ops(p); i++)
        for (int mode = 0; mode < POWERFS_RANDOM; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, 0);
            uint8_t *have = view(cut, "top.raw", &size);
            assert_memory_equal(have + 300 * KiB, text, sizeof(text));
            assert_false(exists(cut, "top.add-cow"));
            free(have);
            dr_fs_memory_free(cut);
        }
    powerfs_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(the_disk_goes_on_with_its_raw_file),
        ops_test(a_disk_without_a_parent_goes_on_with_its_raw_file),
        ops_test(the_raw_disk_gets_an_overlay_again),
        ops_test(a_disk_whose_raw_file_cannot_be_recorded_stays_an_add_cow),
        ops_test(what_cannot_be_left_to_a_raw_file_is_refused),
        cmocka_unit_test(a_cut_leaves_the_add_cow_or_the_raw_disk),
        cmocka_unit_test(missing_flush_is_caught),
        cmocka_unit_test(a_cut_after_a_kill_leaves_the_add_cow_or_the_raw_disk),
        cmocka_unit_test(writes_to_the_raw_disk_last),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
