/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An open disk goes on with another image: a mirror, or its parent after a commit with pivot. */
#include "faultfs.h"
#include "test-ops-crowd.h"

static const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};

struct told {
    struct crowd *crowd; /* goes on for a while when the job is ready; or NULL */
    struct dr_job *job;
    struct dr_disk *disk;
    bool pivot, cancel;
    unsigned ready, switches;
};

static void on_ready(void *user)
{
    struct told *t = user;
    t->ready++;
    if (t->crowd)
        crowd_pass(t->crowd, 40);
    dr_job_complete(t->job, t->pivot);
}

static int on_switch(void *user)
{
    struct told *t = user;
    t->switches++;
    if (t->crowd)
        crowd_pass(t->crowd, 40);
    return t->cancel;
}

static void put_byte(struct dr_disk *disk, uint64_t off)
{
    const uint8_t byte = 0x5a;
    ok(dr_pwrite(disk, &byte, off, 1, 0, &err));
}

static void make_job(struct told *t)
{
    const struct dr_job_options o = {.ready = on_ready, .before_switch = on_switch, .user = t};
    ok(dr_job_new(NULL, &o, &t->job, &err));
}

/* An overlay of any format on another, with data in both. */
static void make_pair(struct dr_fs *fs, const char *top, const char *top_format, const char *base,
                      const char *base_format)
{
    struct dr_create_options b = {.format = base_format, .size = CROWD_SIZE, .has_size = true};
    struct dr_create_options t = {
        .format = top_format, .backing = base, .backing_format = base_format};
    struct dr_disk *disk;
    uint8_t *buf = malloc(MiB);
    memset(buf, 0x11, MiB);
    ok(dr_create_fs(fs, base, &b, &err));
    struct dr_open_options open = {.flags = DR_OPEN_RDWR, .format = base_format};
    ok(dr_open_fs(fs, base, &open, &disk, &err));
    ok(dr_pwrite(disk, buf, 0, MiB, 0, &err));
    ok(dr_close(disk, &err));
    ok(dr_create_fs(fs, top, &t, &err));
    ok(dr_open_fs(fs, top, &rw, &disk, &err));
    memset(buf, 0x22, MiB);
    ok(dr_pwrite(disk, buf, 512 * KiB, MiB, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

static const char *const formats[] = {"raw", "vmdk", "qcow2", "add-cow"};

static void a_mirror_follows_a_disk_in_use(void **state)
{
    for (size_t i = 0; i < 4; i++)
        for (int top = 0; top < 2; top++) {
            if (top && strcmp(formats[i], "raw") == 0)
                continue;
            struct dr_fs *fs = dr_fs_memory_new();
            struct crowd crowd;
            bool vmdk = top && strcmp(formats[i], "vmdk") == 0; /* which takes no other parent */
            make_pair(fs, "top", vmdk ? "vmdk" : "qcow2", "base", vmdk ? "vmdk" : "qcow2");
            crowd_begin(&crowd, fs, "top");
            struct told t = {.crowd = &crowd, .pivot = true};
            const struct dr_mirror_options o = {.format = formats[i], .top = top};
            make_job(&t);
            ok(dr_disk_mirror(crowd.disk, "moved", &o, t.job, &err));
            assert_int_equal(t.ready, 1);
            assert_int_equal(t.switches, 1);
            assert_string_equal(dr_image_path(crowd.disk, 0), "moved");
            assert_string_equal(dr_image_format(crowd.disk, 0), formats[i]);
            assert_int_equal(dr_chain_length(crowd.disk), top ? 2 : 1);
            dr_job_free(t.job);
            crowd_end(&crowd, "moved");
            dr_fs_memory_free(fs);
        }
    (void)state;
}

static void a_commit_with_pivot_follows_a_disk_in_use(void **state)
{
    static const struct {
        const char *top, *base;
    } pairs[] = {{"vmdk", "vmdk"}, {"qcow2", "qcow2"}, {"add-cow", "raw"}, {"qcow2", "raw"}};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd crowd;
        make_pair(fs, "top", pairs[i].top, "base", pairs[i].base);
        crowd_begin(&crowd, fs, "top");
        struct told t = {.crowd = &crowd, .pivot = true};
        const struct dr_commit_options o = {.pivot = true};
        make_job(&t);
        ok(dr_disk_commit(crowd.disk, &o, t.job, &err));
        assert_int_equal(t.ready, 1);
        assert_string_equal(dr_image_path(crowd.disk, 0), "base");
        assert_int_equal(dr_chain_length(crowd.disk), 1);
        dr_job_free(t.job);
        crowd_end(&crowd, "top"); /* the overlay is empty: its name reads what the base reads */
        dr_fs_memory_free(fs);
    }
    (void)state;
}

/* From the switch on, what the disk had fails whatever is done to it. */
struct broken {
    struct told told;
    _Atomic bool over;
    unsigned failed, messages;
};

static int on_record(void *user, const struct dr_switch *switches, size_t n, struct dr_error *e)
{
    struct broken *b = user;
    (void)switches, (void)n, (void)e;
    atomic_store(&b->over, true);
    return 0;
}

static void on_message(void *user, const char *text)
{
    struct broken *b = user;
    assert_non_null(strstr(text, "goes on with"));
    b->messages++;
}

static int fail_old(void *user, const struct faultfs_io *io)
{
    struct broken *b = user;
    if (!atomic_load(&b->over) || strcmp(io->path, "top") != 0)
        return 0;
    b->failed++;
    return -EIO;
}

static void a_switch_that_has_been_made_is_no_failure(void **state)
{
    static const char *const kinds[] = {"vmdk", "qcow2", "add-cow"};
    unsigned failed = 0;
    (void)state;
    for (size_t i = 0; i < 6; i++) {
        const char *format = kinds[i / 2];
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct broken b = {.failed = 0};
        const struct dr_job_options o = {.record = on_record, .message = on_message, .user = &b};
        const struct dr_commit_options pivot = {.pivot = true};
        make_pair(memory, "top", format, "base", i / 2 == 0 ? "vmdk" : "raw");
        faultfs_observe(f, fail_old, &b);
        ok(dr_open_fs(faultfs_fs(f), "top", &rw, &b.told.disk, &err));
        put_byte(b.told.disk, MiB);
        ok(dr_job_new(NULL, &o, &b.told.job, &err));
        ok(i % 2 ? dr_disk_commit(b.told.disk, &pivot, b.told.job, &err)
                 : dr_disk_mirror(b.told.disk, "moved", NULL, b.told.job, &err));
        dr_job_free(b.told.job);
        assert_string_equal(dr_image_path(b.told.disk, 0), i % 2 ? "base" : "moved");
        assert_true(b.failed == 0 || b.messages > 0);
        failed += b.failed;
        put_byte(b.told.disk, 2 * MiB);
        ok(dr_close(b.told.disk, &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
    assert_true(failed > 0);
}

static void after_a_pivot_the_next_one_works(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk;
    const struct dr_commit_options o = {.pivot = true};
    make_pair(fs, "top.vmdk", "vmdk", "base.vmdk", "vmdk");
    ok(dr_open_fs(fs, "top.vmdk", &rw, &disk, &err));
    for (int i = 0; i < 3; i++) {
        uint8_t byte = (uint8_t)(0x30 + i), have = 0;
        const char *overlay = dr_image_path(disk, 0);
        ok(dr_pwrite(disk, &byte, MiB + 7, 1, 0, &err));
        ok(dr_disk_commit(disk, &o, NULL, &err));
        assert_int_equal(dr_chain_length(disk), 1);
        ok(fs->ops->unlink(fs, overlay, &err)); /* it would be a sibling of the next one */
        ok(dr_pwrite(disk, &byte, 2 * MiB, 1, 0, &err));
        ok(dr_disk_snapshot(disk, NULL, NULL, NULL, NULL, &err));
        ok(dr_pread(disk, &have, MiB + 7, 1, &err));
        assert_int_equal(have, byte);
    }
    ok(dr_close(disk, &err));
}

static void a_copy_without_pivot_is_the_disk_of_that_moment(void **state)
{
    struct dr_fs *fs = *state;
    struct told t = {.pivot = false};
    uint64_t size;
    make_pair(fs, "top", "qcow2", "base", "raw");
    uint8_t *want = view(fs, "top", &size), byte = 0x99;
    ok(dr_open_fs(fs, "top", &rw, &t.disk, &err));
    const struct dr_mirror_options o = {.format = "vmdk"};
    make_job(&t);
    ok(dr_disk_mirror(t.disk, "copy", &o, t.job, &err));
    dr_job_free(t.job);
    assert_string_equal(dr_image_path(t.disk, 0), "top");
    ok(dr_pwrite(t.disk, &byte, 0, 1, 0, &err));
    ok(dr_close(t.disk, &err));
    same_view(fs, "copy", want, size);
    want[0] = byte;
    same_view(fs, "top", want, size);
    free(want);
}

static void a_mirror_that_is_cancelled_leaves_nothing(void **state)
{
    struct dr_fs *fs = *state;
    struct told t = {.pivot = true, .cancel = true};
    make_pair(fs, "top", "qcow2", "base", "raw");
    size_t files = count_files(fs);
    ok(dr_open_fs(fs, "top", &rw, &t.disk, &err));
    make_job(&t);
    refused(dr_disk_mirror(t.disk, "moved", NULL, t.job, &err), ECANCELED, "stopped");
    dr_job_free(t.job);
    assert_int_equal(count_files(fs), files);
    assert_string_equal(dr_image_path(t.disk, 0), "top");
    ok(dr_truncate(t.disk, 2 * CROWD_SIZE, &err)); /* nobody has a claim on it any more */
    ok(dr_close(t.disk, &err));
}

static void what_is_there_already_is_taken_only_when_told(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk;
    uint64_t size;
    make_pair(fs, "top", "qcow2", "base", "raw");
    uint8_t *want = view(fs, "top", &size);
    struct dr_create_options b = {.format = "raw", .size = CROWD_SIZE, .has_size = true};
    ok(dr_create_fs(fs, "there", &b, &err));
    put(fs, "there", MiB, MiB, 0x77);
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    struct dr_mirror_options o = {.format = "raw"};
    refused(dr_disk_mirror(disk, "there", &o, NULL, &err), EEXIST, "there");
    refused(dr_disk_mirror(disk, "base", &o, NULL, &err), EBUSY, "base");
    o.existing = true;
    ok(dr_disk_mirror(disk, "there", &o, NULL, &err));
    assert_string_equal(dr_image_path(disk, 0), "there");
    ok(dr_close(disk, &err));
    same_view(fs, "there", want, size);
    free(want);
}

static void holes_stay_holes(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk;
    struct dr_create_options b = {.format = "raw", .size = 64 * MiB, .has_size = true};
    ok(dr_create_fs(fs, "disk", &b, &err));
    put(fs, "disk", 32 * MiB, 64 * KiB, 0x77);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_disk_mirror(disk, "moved", NULL, NULL, &err));
    ok(dr_close(disk, &err));
    assert_true(disk_size(fs, "moved") <= 128 * KiB);
}

static void a_pivot_takes_what_is_between_along(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        const char *format = i ? "qcow2" : "vmdk";
        struct crowd crowd;
        make_pair(fs, "low", format, "base", format);
        for (int k = 0; k < 2; k++) {
            struct dr_create_options o = {
                .format = format, .backing = k ? "mid" : "low", .backing_format = format};
            ok(dr_create_fs(fs, k ? "top" : "mid", &o, &err));
            put(fs, k ? "top" : "mid", (1 + (unsigned)k) * MiB, 256 * KiB, 0x70 + k);
        }
        crowd_begin(&crowd, fs, "top");
        struct told t = {.crowd = &crowd, .pivot = true};
        const struct dr_commit_options o = {.pivot = true, .base = "base"};
        make_job(&t);
        ok(dr_disk_commit(crowd.disk, &o, t.job, &err));
        dr_job_free(t.job);
        assert_int_equal(t.switches, 1);
        assert_int_equal(dr_chain_length(crowd.disk), 1);
        assert_string_equal(dr_image_path(crowd.disk, 0), "base");
        crowd_end(&crowd, "top");
        dr_fs_memory_free(fs);
    }
}

static void a_pivot_sees_the_siblings_of_what_is_between(void **state)
{
    static const char *const parents[] = {"base.vmdk", "low.vmdk", "mid.vmdk"};
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_disk *disk;
        make_pair(fs, "low.vmdk", "vmdk", "base.vmdk", "vmdk");
        make(fs, "mid.vmdk", "vmdk", 0, "low.vmdk");
        make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
        make(fs, "other.vmdk", "vmdk", 0, parents[i]);
        ok(dr_open_fs(fs, "top.vmdk", &rw, &disk, &err));
        const struct dr_commit_options o = {.pivot = true, .base = "base.vmdk"};
        refused(dr_disk_commit(disk, &o, NULL, &err), EBUSY, "other.vmdk");
        assert_int_equal(dr_chain_length(disk), 4);
        ok(dr_close(disk, &err));
        dr_fs_memory_free(fs);
    }
}

static void a_pivot_is_of_the_active_image(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk;
    make_pair(fs, "mid.vmdk", "vmdk", "base.vmdk", "vmdk");
    make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
    ok(dr_open_fs(fs, "top.vmdk", &rw, &disk, &err));
    const struct dr_commit_options lower = {.pivot = true, .top = "mid.vmdk"};
    refused(dr_disk_commit(disk, &lower, NULL, &err), EINVAL, "only the active image");
    assert_int_equal(dr_chain_length(disk), 3);
    ok(dr_close(disk, &err));
}

static void snapshots_of_a_disk_in_use_may_have_another_format(void **state)
{
    static const struct {
        const char *base, *child;
    } pairs[] = {{"raw", "add-cow"}, {"vmdk", "qcow2"}, {"qcow2", "add-cow"}, {"raw", "qcow2"}};
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd crowd;
        struct dr_create_options b = {.format = pairs[i].base, .size = CROWD_SIZE};
        ok(dr_create_fs(fs, "disk", &b, &err));
        crowd_begin(&crowd, fs, "disk");
        for (unsigned k = 0; k < 2; k++) {
            struct dr_overlay o = {
                .disk = crowd.disk, .path = k ? "two" : "one", .format = pairs[i].child};
            ok(dr_disks_snapshot(&o, 1, NULL, &err));
            assert_string_equal(o.active, o.path);
            free(o.active);
            assert_string_equal(dr_image_format(crowd.disk, 0), pairs[i].child);
            assert_int_equal(dr_chain_length(crowd.disk), k + 2);
            crowd_pass(&crowd, 30);
        }
        crowd_end(&crowd, "two");
        dr_fs_memory_free(fs);
    }
    (void)state;
}

/* One writer goes from disk to disk: at no moment has a later one more than an earlier one. */
struct in_turn {
    struct dr_disk *disks[3];
    _Atomic bool stop;
    _Atomic unsigned rounds;
};

static void *write_in_turn(void *user)
{
    struct in_turn *t = user;
    for (uint32_t n = 1; !atomic_load(&t->stop); n++) {
        for (unsigned i = 0; i < 3; i++)
            if (dr_pwrite(t->disks[i], &n, 0, sizeof(n), 0, NULL) < 0)
                return t;
        atomic_fetch_add(&t->rounds, 1);
    }
    return NULL;
}

static void several_disks_stop_at_one_moment(void **state)
{
    static const char *const names[] = {"a.vmdk", "b.qcow2", "c.raw"};
    static const char *const kinds[] = {"vmdk", "qcow2", "raw"};
    struct dr_fs *fs = *state;
    struct in_turn t = {0};
    struct dr_overlay o[3] = {0};
    pthread_t thread;
    void *trouble;
    for (unsigned i = 0; i < 3; i++) {
        make(fs, names[i], kinds[i], MiB, NULL);
        ok(dr_open_fs(fs, names[i], &rw, &t.disks[i], &err));
        o[i] = (struct dr_overlay){.disk = t.disks[i], .format = i == 2 ? "add-cow" : NULL};
    }
    assert_int_equal(pthread_create(&thread, NULL, write_in_turn, &t), 0);
    while (atomic_load(&t.rounds) < 50)
        sched_yield();
    ok(dr_disks_snapshot(o, 3, NULL, &err));
    unsigned then = atomic_load(&t.rounds);
    while (atomic_load(&t.rounds) < then + 50)
        sched_yield();
    atomic_store(&t.stop, true);
    pthread_join(thread, &trouble);
    assert_null(trouble);
    uint32_t last = UINT32_MAX, first = 0;
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(dr_chain_length(t.disks[i]), 2);
        ok(dr_close(t.disks[i], &err));
        free(o[i].active);
        uint64_t size;
        uint32_t n;
        uint8_t *all = view(fs, names[i], &size);
        memcpy(&n, all, sizeof(n));
        free(all);
        assert_true(n <= last);
        last = n;
        first = i == 0 ? n : first;
    }
    assert_true(first - last <= 1);
}

static void a_snapshot_that_is_refused_changes_no_disk(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disks[2];
    make(fs, "a.vmdk", "vmdk", MiB, NULL);
    make(fs, "b.raw", "raw", MiB, NULL);
    size_t files = count_files(fs);
    ok(dr_open_fs(fs, "a.vmdk", &rw, &disks[0], &err));
    ok(dr_open_fs(fs, "b.raw", &rw, &disks[1], &err));
    struct dr_overlay o[2] = {{.disk = disks[0]}, {.disk = disks[1], .format = "vmdk"}};
    refused(dr_disks_snapshot(o, 2, NULL, &err), ENOTSUP, "must be vmdk");
    o[1].format = "raw";
    refused(dr_disks_snapshot(o, 2, NULL, &err), ENOTSUP, "raw");
    o[1] = o[0];
    refused(dr_disks_snapshot(o, 2, NULL, &err), EBUSY, "snapshot");
    o[1] = (struct dr_overlay){.disk = disks[1], .format = "add-cow", .path = "a.vmdk"};
    refused(dr_disks_snapshot(o, 2, NULL, &err), EEXIST, "a.vmdk");
    assert_int_equal(dr_chain_length(disks[0]), 1);
    assert_int_equal(dr_chain_length(disks[1]), 1);
    assert_int_equal(count_files(fs), files);
    ok(dr_close(disks[0], &err));
    ok(dr_close(disks[1], &err));
}

static int fail_second(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_RENAME && strcmp(io->to, "two") == 0 ? -EIO : 0;
}

static int fail_second_and_unlink(void *user, const struct faultfs_io *io)
{
    return io->kind == FAULTFS_UNLINK && strcmp(dr_path_basename(io->path), "one") == 0
               ? -EIO
               : fail_second(user, io);
}

static int record_nothing(void *user, const struct dr_switch *switches, size_t n,
                          struct dr_error *e)
{
    (void)user, (void)switches, (void)n;
    return dr_fail(e, ENOSPC, "it cannot be noted");
}

static void snapshots_that_fail_together_leave_nothing(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct dr_fs *fs = faultfs_fs(f);
    struct dr_overlay o[2] = {{.path = "one"}, {.path = "two"}};
    const struct dr_job_options how = {.record = record_nothing};
    struct dr_job *job;
    make(*state, "a.qcow2", "qcow2", MiB, NULL);
    make(*state, "b.qcow2", "qcow2", MiB, NULL);
    ok(dr_open_fs(fs, "a.qcow2", &rw, &o[0].disk, &err));
    ok(dr_open_fs(fs, "b.qcow2", &rw, &o[1].disk, &err));
    size_t files = count_files(fs);
    faultfs_observe(f, fail_second, NULL);
    refused(dr_disks_snapshot(o, 2, NULL, &err), EIO, "two");
    assert_int_equal(count_files(fs), files);
    faultfs_observe(f, fail_second_and_unlink, NULL);
    refused(dr_disks_snapshot(o, 2, NULL, &err), EIO, "one was made, and cannot be removed");
    faultfs_observe(f, NULL, NULL);
    assert_int_equal(count_files(fs), files + 1);
    o[0].path = "three";
    o[1].path = "four";
    ok(dr_job_new(NULL, &how, &job, &err));
    refused(dr_disks_snapshot(o, 2, job, &err), ENOSPC, "it cannot be noted");
    dr_job_free(job);
    assert_int_equal(count_files(fs), files + 1);
    for (int i = 0; i < 2; i++) {
        put_byte(o[i].disk, 0);
        assert_int_equal(dr_chain_length(o[i].disk), 1);
        ok(dr_close(o[i].disk, &err));
    }
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_mirror_follows_a_disk_in_use),
        cmocka_unit_test(a_commit_with_pivot_follows_a_disk_in_use),
        cmocka_unit_test(a_switch_that_has_been_made_is_no_failure),
        ops_test(snapshots_that_fail_together_leave_nothing),
        ops_test(after_a_pivot_the_next_one_works),
        ops_test(a_copy_without_pivot_is_the_disk_of_that_moment),
        ops_test(a_mirror_that_is_cancelled_leaves_nothing),
        ops_test(what_is_there_already_is_taken_only_when_told),
        ops_test(holes_stay_holes),
        cmocka_unit_test(a_pivot_takes_what_is_between_along),
        cmocka_unit_test(a_pivot_sees_the_siblings_of_what_is_between),
        ops_test(a_pivot_is_of_the_active_image),
        cmocka_unit_test(snapshots_of_a_disk_in_use_may_have_another_format),
        ops_test(several_disks_stop_at_one_moment),
        ops_test(a_snapshot_that_is_refused_changes_no_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
