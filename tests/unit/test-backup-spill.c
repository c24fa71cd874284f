/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* With a spill file a guest does not wait for the target of a backup, until the spill is full; then
 * one of both yields, as was asked for, and no request of the guest fails. */
#include <pthread.h>

#include "drover/backup.h"
#include "faultfs.h"
#include "instant.h"
#include "ops/backup-spill.h"
#include "test-ops.h"

#define GRAIN (64u * KiB)
#define SIZE  (40u * GRAIN + 5 * 512)

/* Watches the target and the spill, from below. */
struct watch {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    bool shut;       /* writes to the target wait */
    pthread_t guest; /* whose writes to the target are counted */
    unsigned guest_writes, writes;
    uint64_t first;              /* where the first write of the target began */
    int spill_write, spill_read; /* -errno: they fail so */
};

static int look(void *user, const struct faultfs_io *io)
{
    struct watch *w = user;
    int r = 0;
    bool target = strstr(io->path, "copy") && !strstr(io->path, ".sums");
    pthread_mutex_lock(&w->lock);
    if (io->kind == FAULTFS_WRITE && target) {
        if (w->writes++ == 0)
            w->first = io->off;
        w->guest_writes += pthread_equal(pthread_self(), w->guest) != 0;
        while (w->shut)
            pthread_cond_wait(&w->opened, &w->lock);
    }
    if (strstr(io->path, ".drover-spill-"))
        r = io->kind == FAULTFS_WRITE  ? w->spill_write
            : io->kind == FAULTFS_READ ? w->spill_read
                                       : 0;
    pthread_mutex_unlock(&w->lock);
    return r;
}

static void shut(struct watch *w, bool on)
{
    pthread_mutex_lock(&w->lock);
    w->shut = on;
    pthread_cond_broadcast(&w->opened);
    pthread_mutex_unlock(&w->lock);
}

struct scene {
    struct faultfs *faults;
    struct dr_fs *fs;
    struct watch watch;
    struct dr_disk *disk;
    uint8_t *want; /* what the disk held at the instant */
    struct dr_backup_options o;
    struct dr_backup_result result;
    struct dr_job *job;
    pthread_t thread;
    size_t files;
    int r;
    struct dr_error error;
};

static void *back_up(void *arg)
{
    struct scene *s = arg;
    s->r = dr_disk_backup(s->disk, "copy", &s->o, s->job, &s->result, &s->error);
    return NULL;
}

/* Data everywhere but in two grains. */
static void make_disk(struct scene *s, const char *format)
{
    const struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    uint64_t size;
    make(s->fs, "disk", format, SIZE, NULL);
    put(s->fs, "disk", 0, 10 * GRAIN, 0x11);
    put(s->fs, "disk", 12 * GRAIN, SIZE - 12 * GRAIN, 0x22);
    s->want = view(s->fs, "disk", &size);
    s->files = count_files(s->fs);
    ok(dr_open_fs(s->fs, "disk", &o, &s->disk, &err));
}

static void scene_make(struct scene *s, struct dr_fs *memory, const char *format)
{
    *s = (struct scene){.faults = faultfs_new(memory)};
    s->fs = faultfs_fs(s->faults);
    pthread_mutex_init(&s->watch.lock, NULL);
    pthread_cond_init(&s->watch.opened, NULL);
    s->watch.guest = pthread_self();
    s->o = (struct dr_backup_options){.format = "raw", .spill = {.path = "spill"}};
    make_disk(s, format);
}

/* Returns when the instant has been, and the job has copied nothing yet. */
static void start_paused(struct scene *s)
{
    const struct dr_job_options one = {.workers = 1};
    ok(dr_job_new(NULL, &one, &s->job, &err));
    dr_job_pause(s->job);
    assert_int_equal(pthread_create(&s->thread, NULL, back_up, s), 0);
    wait_for_instant(s->job);
    faultfs_observe(s->faults, look, &s->watch);
}

static void end(struct scene *s)
{
    dr_job_resume(s->job);
    pthread_join(s->thread, NULL);
    dr_job_free(s->job);
    faultfs_observe(s->faults, NULL, NULL);
}

static void scene_end(struct scene *s)
{
    assert_int_equal(s->disk->hooks.n, 0);
    ok(dr_close(s->disk, &err));
    free(s->want);
    pthread_cond_destroy(&s->watch.opened);
    pthread_mutex_destroy(&s->watch.lock);
    faultfs_free(s->faults);
}

static void ends_well(struct scene *s)
{
    end(s);
    if (s->r < 0)
        fail_msg("backup: %s", s->error.text);
    same_view(s->fs, "copy", s->want, SIZE);
    scene_end(s);
}

static void ends_in_failure(struct scene *s, int errnum, const char *text)
{
    end(s);
    assert_int_equal(s->r, -errnum);
    if (!strstr(s->error.text, text))
        fail_msg("no \"%s\" in: %s", text, s->error.text);
    assert_int_equal(count_files(s->fs), s->files);
    scene_end(s);
}

static void overwrite(struct scene *s, uint64_t off, uint64_t len)
{
    uint8_t buf[GRAIN];
    memset(buf, 0x99, sizeof(buf));
    for (uint64_t end = off + len, n; off < end; off += n) {
        n = dr_min(end - off, GRAIN);
        ok(dr_pwrite(s->disk, buf, off, (size_t)n, 0, &err));
    }
}

/* Its writes read as they were written, whatever becomes of the backup. */
static void overwrite_all(struct scene *s)
{
    uint8_t *have = malloc(SIZE);
    overwrite(s, 0, SIZE);
    ok(dr_pread(s->disk, have, 0, SIZE, &err));
    for (uint64_t i = 0; i < SIZE; i++)
        assert_int_equal(have[i], 0x99);
    free(have);
}

/* ------------------------------------------------------------------ room enough */

static void a_guest_does_not_wait_for_a_target_that_is_blocked(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    start_paused(&s);
    shut(&s.watch, true);
    dr_job_resume(s.job); /* and is stuck */
    overwrite_all(&s);
    assert_int_equal(s.watch.guest_writes, 0);
    shut(&s.watch, false);
    ends_well(&s);
}

static void the_job_copies_what_is_spilled_before_the_rest(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    start_paused(&s);
    overwrite(&s, 30 * GRAIN, 2 * GRAIN);
    end(&s);
    assert_int_equal(s.r, 0);
    assert_int_equal(s.watch.first, 30 * GRAIN);
    same_view(s.fs, "copy", s.want, SIZE);
    scene_end(&s);
}

static void what_was_a_hole_is_not_spilled(void **state)
{
    struct scene s;
    scene_make(&s, *state, "qcow2");
    start_paused(&s);
    s.watch.spill_write = -EIO; /* nobody notices */
    overwrite(&s, 10 * GRAIN, 2 * GRAIN);
    ends_well(&s);
}

/* A hole of the disk by now, which the job passes over. */
static void what_was_discarded_comes_out_of_the_spill(void **state)
{
    struct scene s;
    scene_make(&s, *state, "qcow2");
    start_paused(&s);
    ok(dr_discard(s.disk, 20 * GRAIN, 10 * GRAIN, &err));
    ok(dr_zero(s.disk, 35 * GRAIN, SIZE - 35 * GRAIN, DR_MAY_UNMAP, &err));
    ends_well(&s);
}

static void an_incremental_backup_spills_zeros_and_data(void **state)
{
    static const uint64_t sizes[] = {0, GRAIN, 3 * GRAIN};
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct scene s;
        uint64_t size;
        scene_make(&s, memory, "qcow2");
        s.o = (struct dr_backup_options){
            .set = "set", .bitmap = "b", .spill = {.path = "spill", .size = sizes[i]}};
        ok(dr_disk_backup(s.disk, "before", &s.o, NULL, NULL, &err));
        ok(dr_zero(s.disk, 0, 4 * GRAIN, DR_MAY_UNMAP, &err));
        overwrite(&s, 9 * GRAIN, 4 * GRAIN);
        overwrite(&s, 30 * GRAIN, SIZE - 30 * GRAIN);
        ok(dr_flush(s.disk, &err));
        ok(dr_pread(s.disk, s.want, 0, SIZE, &err));
        start_paused(&s);
        overwrite(&s, 0, SIZE);
        end(&s);
        if (s.r < 0)
            fail_msg("backup: %s", s.error.text);
        assert_true(s.result.incremental);
        uint8_t *have = view(s.fs, "copy", &size);
        assert_memory_equal(have, s.want, SIZE);
        free(have);
        scene_end(&s);
        dr_fs_memory_free(memory);
    }
    (void)state;
}

/* ------------------------------------------------------------------ names */

static int count_name(void *user, const char *name)
{
    (void)name;
    ++*(unsigned *)user;
    return 0;
}

static void a_spill_file_has_no_name(void **state)
{
    char dir[] = "/tmp/drover-test-spill-XXXXXX", spot[64];
    struct dr_fs *fs = dr_fs_posix();
    unsigned names = 0;
    (void)state;
    assert_non_null(mkdtemp(dir));
    snprintf(spot, sizeof(spot), "%s/spot", dir);
    const char *const places[] = {dir, spot};
    for (size_t i = 0; i < 2; i++) {
        uint8_t put[GRAIN], got[GRAIN];
        struct dr_spill *s;
        uint32_t slot;
        ok(dr_spill_new(&s, fs, &(struct dr_backup_spill){.path = places[i]}, 0, &err));
        memset(put, 0x5a, sizeof(put));
        ok(dr_spill_put(s, put, GRAIN, &slot, &err));
        ok(dr_spill_get(s, slot, got, GRAIN, &err));
        assert_memory_equal(put, got, GRAIN);
        ok(fs->ops->list(fs, dir, count_name, &names, &err));
        assert_int_equal(names, 0);
        dr_spill_free(s);
    }
    ok(fs->ops->rmdir(fs, dir, &err));
}

/* Where files without a name are unknown, a kill may come before the name is gone. */
static void what_a_killed_maker_left_goes_with_the_next_spill(void **state)
{
    static const char *const left = "dir/.drover-spill-0123456789abcdef",
                             *const used = "dir/.drover-spill-00000000000000ff",
                             *const others[] = {"dir/.drover-spill-0123456789abcde",
                                                "dir/.drover-spill-0123456789abcdeg",
                                                "dir/drover-spill-0123456789abcdef"};
    struct dr_fs *fs = *state;
    struct dr_file *file, *user;
    struct dr_spill *s;
    for (size_t i = 0; i < 4; i++) {
        ok(dr_file_open(fs, i < 3 ? others[i] : left, DR_FILE_CREATE, &file, &err));
        dr_file_unref(file);
    }
    ok(dr_file_open(fs, used, DR_FILE_CREATE, &user, &err));
    ok(dr_spill_new(&s, fs, &(struct dr_backup_spill){.path = "dir/spot"}, 0, &err));
    assert_false(exists(fs, left));
    assert_true(exists(fs, used));
    for (size_t i = 0; i < 3; i++)
        assert_true(exists(fs, others[i]));
    unsigned names = 0;
    ok(fs->ops->list(fs, "dir", count_name, &names, &err));
    assert_int_equal(names, 4);
    dr_spill_free(s);
    dr_file_unref(user);
}

/* ------------------------------------------------------------------ full */

static void a_guest_waits_for_the_target_when_the_spill_is_full(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    s.o.spill.size = 4 * GRAIN;
    start_paused(&s);
    overwrite_all(&s);
    assert_int_equal(s.watch.guest_writes, 40 - 4 - 2 + 1);
    ends_well(&s);
}

static void the_backup_fails_when_the_spill_is_full_if_it_was_asked_to(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    s.o.spill.size = 4 * GRAIN;
    s.o.spill.fail_when_full = true;
    start_paused(&s);
    overwrite_all(&s);
    assert_int_equal(s.watch.guest_writes, 0);
    ends_in_failure(&s, ENOSPC, "spill: the spill file is full, with 262144 bytes");
}

static void there_is_room_in_the_spill_again_for_what_was_copied(void **state)
{
    struct scene s;
    struct dr_job_status status;
    scene_make(&s, *state, "raw");
    s.o.spill.size = 8 * GRAIN;
    s.o.spill.fail_when_full = true;
    start_paused(&s);
    overwrite(&s, 32 * GRAIN, 8 * GRAIN);
    dr_job_resume(s.job);
    do { /* until the job has taken them: it does so first */
        sched_yield();
        dr_job_query(s.job, &status);
    } while (status.done < 8 * GRAIN && status.state != DR_JOB_CONCLUDED);
    overwrite(&s, 24 * GRAIN, 8 * GRAIN);
    ends_well(&s);
}

static void a_full_file_system_is_a_full_spill(void **state)
{
    for (int fails = 0; fails < 2; fails++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct scene s;
        scene_make(&s, memory, "raw");
        s.o.spill.fail_when_full = fails;
        s.watch.spill_write = -ENOSPC;
        start_paused(&s);
        overwrite_all(&s);
        if (fails)
            ends_in_failure(&s, ENOSPC, "spill");
        else
            ends_well(&s);
        dr_fs_memory_free(memory);
    }
    (void)state;
}

/* ------------------------------------------------------------------ failures */

static void a_spill_that_fails_fails_the_backup_and_not_the_guest(void **state)
{
    for (int reading = 0; reading < 2; reading++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct scene s;
        scene_make(&s, memory, "raw");
        *(reading ? &s.watch.spill_read : &s.watch.spill_write) = -EIO;
        start_paused(&s);
        overwrite_all(&s);
        ends_in_failure(&s, EIO, "spill");
        dr_fs_memory_free(memory);
    }
    (void)state;
}

static void the_spill_has_no_name(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    start_paused(&s);
    overwrite_all(&s);
    assert_false(exists(s.fs, "spill"));
    ends_well(&s);
}

static void what_is_no_place_for_a_spill_is_refused(void **state)
{
    struct scene s;
    scene_make(&s, *state, "raw");
    s.o.spill.size = GRAIN - 1;
    refused(dr_disk_backup(s.disk, "copy", &s.o, NULL, NULL, &err), EINVAL, "it takes pieces of");
    s.o.spill.path = "other";
    s.o.spill.size = 0;
    make(s.fs, "other", "raw", MiB, NULL);
    refused(dr_disk_backup(s.disk, "copy", &s.o, NULL, NULL, &err), EEXIST, "other");
    assert_true(exists(s.fs, "other"));
    assert_int_equal(count_files(s.fs), s.files + 1);
    scene_end(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(a_guest_does_not_wait_for_a_target_that_is_blocked),
        ops_test(the_job_copies_what_is_spilled_before_the_rest),
        ops_test(what_was_a_hole_is_not_spilled),
        ops_test(what_was_discarded_comes_out_of_the_spill),
        cmocka_unit_test(an_incremental_backup_spills_zeros_and_data),
        ops_test(what_a_killed_maker_left_goes_with_the_next_spill),
        ops_test(a_spill_file_has_no_name),
        ops_test(a_guest_waits_for_the_target_when_the_spill_is_full),
        ops_test(the_backup_fails_when_the_spill_is_full_if_it_was_asked_to),
        ops_test(there_is_room_in_the_spill_again_for_what_was_copied),
        cmocka_unit_test(a_full_file_system_is_a_full_spill),
        cmocka_unit_test(a_spill_that_fails_fails_the_backup_and_not_the_guest),
        ops_test(the_spill_has_no_name),
        ops_test(what_is_no_place_for_a_spill_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
