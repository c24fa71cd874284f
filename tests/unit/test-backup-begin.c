/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A backup that begins, or hands its bitmap on, lets nobody wait for a file: at each I/O that it
 * does there a guest writes and reads, and gets its answer before the I/O goes on. */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#define SIZE (3u * MiB)
#include "faultfs.h"
#include "test-backup.h"

#define PATIENCE 30 /* seconds; only a failure takes so long */

struct scene {
    struct faultfs *faults;
    struct dr_fs *fs;
    struct dr_disk *disk;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t guest;
    unsigned asked, answered; /* requests of the guest */
    bool ended;

    _Atomic bool copying; /* then a guest may have to wait, for what it is about to overwrite */
    unsigned looks;
    char stuck[200]; /* the I/O during which a request got no answer */
};

/* ------------------------------------------------------------------ the guest */

static void write_and_read(struct scene *s, uint8_t value)
{
    uint8_t buf[4096];
    struct dr_error why = DR_ERROR_INIT;
    memset(buf, value, sizeof(buf));
    if (dr_pwrite(s->disk, buf, 64 * KiB, sizeof(buf), 0, &why) < 0 ||
        dr_pread(s->disk, buf, 0, sizeof(buf), &why) < 0)
        snprintf(s->stuck, sizeof(s->stuck), "%s", why.text);
}

static void *guest(void *arg)
{
    struct scene *s = arg;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (s->asked == s->answered && !s->ended)
            pthread_cond_wait(&s->changed, &s->lock);
        if (s->ended)
            break;
        pthread_mutex_unlock(&s->lock);
        write_and_read(s, (uint8_t)(s->asked));
        pthread_mutex_lock(&s->lock);
        s->answered++;
        pthread_cond_broadcast(&s->changed);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* Before each I/O. */
static int look(void *user, const struct faultfs_io *io)
{
    struct scene *s = user;
    if (pthread_equal(pthread_self(), s->guest))
        return 0;
    if (strstr(io->path, ".sums")) /* all is copied, and the target is to get its name */
        atomic_store(&s->copying, false);
    if (atomic_load(&s->copying))
        return 0;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE;
    pthread_mutex_lock(&s->lock);
    s->looks++;
    s->asked++;
    pthread_cond_broadcast(&s->changed);
    int r = 0;
    while (r == 0 && s->asked != s->answered && !s->stuck[0])
        r = pthread_cond_timedwait(&s->changed, &s->lock, &until);
    if (r != 0)
        snprintf(s->stuck, sizeof(s->stuck), "%s of %s at %llu", faultfs_kind_name(io->kind),
                 io->path, (unsigned long long)io->off);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

/* ------------------------------------------------------------------ backups beside it */

struct running {
    struct scene *s;
    const char *target;
    struct dr_job *job;
    struct dr_backup_result result;
    struct dr_error error;
    int r;
};

static void *run_backup(void *arg)
{
    struct running *run = arg;
    const struct dr_backup_options o = {.set = set, .bitmap = "B"};
    run->r = dr_disk_backup(run->s->disk, run->target, &o, run->job, &run->result, &run->error);
    return NULL;
}

static struct dr_backup_result back_up_beside(struct scene *s, const char *target)
{
    struct running run = {.s = s, .target = target};
    pthread_t thread;
    ok(dr_job_new(NULL, NULL, &run.job, &err));
    dr_job_pause(run.job);
    atomic_store(&s->copying, false);
    s->looks = 0;
    faultfs_observe(s->faults, look, s);
    assert_int_equal(pthread_create(&thread, NULL, run_backup, &run), 0);
    wait_for_instant(run.job);
    assert_true(s->looks > 3);
    atomic_store(&s->copying, true);
    dr_job_resume(run.job);
    pthread_join(thread, NULL);
    faultfs_observe(s->faults, NULL, NULL);
    dr_job_free(run.job);
    if (run.r < 0)
        fail_msg("%s: %s", target, run.error.text);
    if (s->stuck[0])
        fail_msg("%s of a %s disk: the guest waits for: %s", target, disk_format, s->stuck);
    assert_true(s->looks > 6);
    return run.result;
}

static void begin(struct scene *s, struct dr_fs *memory)
{
    *s = (struct scene){.faults = faultfs_new(memory)};
    s->fs = faultfs_fs(s->faults);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
    make_tracked(s->fs, 0);
    ok(dr_open_fs(s->fs, "disk", &rw, &s->disk, &err));
    write_and_read(s, 1); /* it has been at work for some time */
    assert_int_equal(pthread_create(&s->guest, NULL, guest, s), 0);
}

static void end(struct scene *s)
{
    pthread_mutex_lock(&s->lock);
    s->ended = true;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->guest, NULL);
    ok(dr_close(s->disk, &err));
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    faultfs_free(s->faults);
}

static void nobody_waits(const char *format)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct scene s;
    disk_format = format;
    begin(&s, memory);
    assert_false(back_up_beside(&s, "b0").incremental);
    for (int i = 1; i < 4; i++) {
        char name[] = {'b', (char)('0' + i), 0};
        struct dr_backup_result result = back_up_beside(&s, name);
        assert_true(result.incremental);
        assert_int_equal(result.copied, 64 * KiB); /* what was written before is not in it */
    }
    end(&s);
    back_up(memory, "b4");
    holds_the_disk(memory, "b4");
    for (int i = 0; i < 4; i++)
        verified(memory, (const char[]){'b', (char)('0' + i), 0});
    dr_fs_memory_free(memory);
}

static void no_request_waits_for_a_file_while_a_backup_begins_and_ends(void **state)
{
    (void)state;
    nobody_waits("qcow2");
    nobody_waits("raw");
    nobody_waits("vmdk");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_request_waits_for_a_file_while_a_backup_begins_and_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
