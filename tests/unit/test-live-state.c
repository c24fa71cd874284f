/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A server that is killed, or whose power goes, is begun again on its state: with the images that
 * its disks had, all that was flushed, and the jobs that had not ended. */
#include <unistd.h>

#include "core/aside.h"
#include "faultfs.h"
#include "powerfs.h"
#include "test-live-state.h"

static void family(struct dr_fs *fs, const char *format)
{
    struct dr_create_options b = {.format = format, .size = SIZE, .has_size = true};
    struct dr_create_options t = {.format = format, .backing = "base", .backing_format = format};
    ok(dr_create_fs(fs, "base", &b, &err));
    put(fs, "base", 0, 256 * KiB, 0x11);
    ok(dr_create_fs(fs, "top", &t, &err));
    put(fs, "top", 64 * KiB, 64 * KiB, 0x22);
}

static void snapshot(const struct server *s)
{
    tell(s, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
            "'snapshot-file': 'new'}}");
}

/* Begin it, and wait until it is ready. */
static void order_commit(const struct server *s)
{
    tell(s, "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0'}}");
    wait_for(s, "ready");
}

static void order_mirror(const struct server *s)
{
    tell(s, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'moved', 'sync': 'full'}}");
    wait_for(s, "ready");
}

static void commit(const struct server *s)
{
    order_commit(s);
    tell(s, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    wait_for(s, "");
}

static void mirror(const struct server *s)
{
    order_mirror(s);
    tell(s, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    wait_for(s, "");
}

static void stream(const struct server *s)
{
    tell(s, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0'}}");
    wait_for(s, "");
}

static const struct change {
    const char *name, *format;
    void (*make)(const struct server *s);
} changes[] = {
    {"snapshot, vmdk", "vmdk", snapshot}, {"snapshot, qcow2", "qcow2", snapshot},
    {"commit, vmdk", "vmdk", commit},     {"commit, qcow2", "qcow2", commit},
    {"mirror, vmdk", "vmdk", mirror},     {"mirror, qcow2", "qcow2", mirror},
    {"stream, vmdk", "vmdk", stream},     {"stream, qcow2", "qcow2", stream},
};
#define N_CHANGES (sizeof(changes) / sizeof(changes[0]))

/* Where the guest writes, and flushes, before and after the change. */
static const uint64_t before_at = 300 * KiB, after_at = 80 * KiB;

static void look(struct dr_fs *fs, const char *where, const uint8_t *want, bool flushed)
{
    struct dr_error problem = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    uint8_t *have = calloc(1, SIZE);
    int r = open_recalled(fs, &disk, &problem);
    if (r == 0)
        r = dr_pread(disk, have, 0, SIZE, &problem);
    if (r < 0)
        fail_msg("%s: %s", where, problem.text);
    for (uint64_t i = 0; i < SIZE; i++)
        if (have[i] != want[i] && (flushed || i < after_at || i >= after_at + 512))
            fail_msg("%s: byte %llu is %02x, not %02x", where, (unsigned long long)i, have[i],
                     want[i]);
    dr_close(disk, NULL);
    free(have);
}

static void what_was_flushed_is_found_after_a_cut_anywhere(void **state)
{
    (void)state;
    for (size_t k = 0; k < N_CHANGES; k++) {
        struct powerfs *p = powerfs_new();
        struct dr_fs *fs = powerfs_fs(p);
        uint8_t bytes[512], *want = malloc(SIZE);
        memset(bytes, 0x77, sizeof(bytes));
        family(fs, changes[k].format);
        struct server s = serve(fs);
        ok(dr_pwrite(s.disk, bytes, before_at, sizeof(bytes), 0, &err));
        ok(dr_flush(s.disk, &err));
        powerfs_settle(p);
        changes[k].make(&s);
        ok(dr_pwrite(s.disk, bytes, after_at, sizeof(bytes), 0, &err));
        ok(dr_flush(s.disk, &err));
        size_t flushed = powerfs_ops(p);
        ok(dr_pread(s.disk, want, 0, SIZE, &err));
        stop(&s);
        for (size_t i = 0; i <= powerfs_ops(p); i++)
            for (int mode = 0; mode < POWERFS_RANDOM; mode++) {
                char where[200], text[128] = "the end";
                if (i < powerfs_ops(p))
                    powerfs_op_text(p, i, text, sizeof(text));
                snprintf(where, sizeof(where), "%s, mode %d before %s", changes[k].name, mode,
                         text);
                struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
                look(cut, where, want, i >= flushed);
                dr_fs_memory_free(cut);
            }
        free(want);
        powerfs_free(p);
    }
}

/* Kill the server: what the file system has at this moment is all that is left. */
static struct server kill_and_begin_again(struct server *s, struct powerfs *p)
{
    struct dr_fs *left = powerfs_cut(p, powerfs_ops(p), POWERFS_ALL, 0);
    stop(s);
    powerfs_free(p);
    return serve(left);
}

/* A snapshot is killed when the disk has gone over and the old image is to be made durable. */
struct killer {
    struct dr_disk *disk;
    struct dr_fs *fs;
    bool recorded, killed;
};

static int write_and_kill(void *user, const struct faultfs_io *io)
{
    struct killer *k = user;
    uint8_t bytes[512];
    memset(bytes, 0x77, sizeof(bytes));
    if (!k->recorded && io->kind == FAULTFS_RENAME &&
        strcmp(dr_path_basename(io->to), "state") == 0 && exists(k->fs, "new")) {
        k->recorded = true;
        ok(dr_pwrite(k->disk, bytes, after_at, sizeof(bytes), 0, &err)); /* in place */
    }
    struct dr_chain *chain = k->disk->chain;
    k->killed |= chain->n == 3 && io->kind == FAULTFS_FLUSH;
    return k->killed ? -EIO : 0;
}

static void a_flush_of_the_next_server_means_what_the_killed_one_left_in_memory(void **state)
{
    static const char *const formats[] = {"vmdk", "qcow2"};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct powerfs *p = powerfs_new();
        struct faultfs *f = faultfs_new(powerfs_fs(p));
        struct dr_disk *disk;
        uint8_t bytes[512], want[512];
        memset(want, 0x77, sizeof(want));
        family(powerfs_fs(p), formats[i]);
        struct server s = serve(faultfs_fs(f));
        struct killer k = {.disk = s.disk, .fs = powerfs_fs(p)};
        faultfs_observe(f, write_and_kill, &k);
        bool negotiated = true;
        const char *line = "{\"execute\": \"blockdev-snapshot-sync\", \"arguments\": "
                           "{\"device\": \"disk0\", \"snapshot-file\": \"new\"}}";
        json_decref(qmp_answer(s.live, line, strlen(line), &negotiated));
        assert_true(k.recorded && k.killed);
        dr_live_free(s.live);
        dr_close(s.disk, NULL);
        struct server next = serve(powerfs_fs(p));
        assert_string_equal(dr_image_path(next.disk, 0), "new");
        ok(dr_pread(next.disk, bytes, after_at, sizeof(bytes), &err));
        assert_memory_equal(bytes, want, sizeof(want));
        ok(dr_flush(next.disk, &err));
        struct dr_fs *cut = powerfs_cut(p, powerfs_ops(p), POWERFS_NONE, 0);
        ok(open_recalled(cut, &disk, &err));
        ok(dr_pread(disk, bytes, after_at, sizeof(bytes), &err));
        assert_memory_equal(bytes, want, sizeof(want));
        ok(dr_close(disk, &err));
        stop(&next);
        dr_fs_memory_free(cut);
        faultfs_free(f);
        powerfs_free(p);
    }
}

static void a_mirror_goes_on_with_the_next_server(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    uint64_t size;
    family(powerfs_fs(p), "qcow2");
    uint8_t *want = view(powerfs_fs(p), "top", &size);
    struct server s = serve(powerfs_fs(p));
    tell(&s, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
             "'target': 'moved', 'sync': 'full', 'format': 'vmdk'}}");
    wait_for(&s, "ready");
    struct server next = kill_and_begin_again(&s, p);
    wait_for(&next, "ready");
    tell(&next, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    wait_for(&next, "");
    assert_string_equal(dr_image_path(next.disk, 0), "moved");
    stop(&next);
    same_view(next.fs, "moved", want, size);
    assert_int_equal(count_files(next.fs), 4); /* base, top, moved, state: nothing half made */
    dr_fs_memory_free(next.fs);
    free(want);
}

/* By then the guest may have made a raw target look like another format. */
static void a_mirror_knows_the_format_of_its_target_with_the_next_server(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    family(powerfs_fs(p), "qcow2");
    struct server s = serve(powerfs_fs(p));
    ok(dr_pwrite(s.disk, "QFI\xfb\0\0\0\3", 0, 8, 0, &err));
    ok(dr_flush(s.disk, &err));
    const struct dr_create_options raw = {
        .format = "raw", .size = dr_size(s.disk), .has_size = true};
    ok(dr_create_fs(powerfs_fs(p), "moved", &raw, &err));
    tell(&s, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
             "'target': 'moved', 'sync': 'full', 'mode': 'existing'}}");
    wait_for(&s, "ready");
    const uint64_t size = dr_size(s.disk);
    uint8_t *want = malloc(size), *got = malloc(size);
    ok(dr_pread(s.disk, want, 0, size, &err));
    struct server next = kill_and_begin_again(&s, p);
    wait_for(&next, "ready");
    tell(&next, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    wait_for(&next, "");
    assert_string_equal(dr_image_path(next.disk, 0), "moved");
    ok(dr_pread(next.disk, got, 0, size, &err));
    assert_memory_equal(got, want, size);
    stop(&next);
    dr_fs_memory_free(next.fs);
    free(got);
    free(want);
}

static void a_stream_goes_on_with_the_next_server(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    uint64_t size;
    family(powerfs_fs(p), "vmdk");
    uint8_t *want = view(powerfs_fs(p), "top", &size);
    struct server s = serve(powerfs_fs(p));
    tell(&s, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'speed': "
             "1, 'auto-finalize': false, 'x-hurry': true}}");
    struct server next = kill_and_begin_again(&s, p);
    char now[32];
    status(&next, now, sizeof(now));
    assert_string_equal(now, "running");
    assert_true(next.live->jobs->job->hurry);
    tell(&next, "{'execute': 'block-job-set-speed', 'arguments': {'device': 'j', 'speed': 0}}");
    wait_for(&next, "pending");
    tell(&next, "{'execute': 'job-finalize', 'arguments': {'id': 'j'}}");
    wait_for(&next, "");
    assert_int_equal(dr_chain_length(next.disk), 1);
    stop(&next);
    same_view(next.fs, "top", want, size);
    dr_fs_memory_free(next.fs);
    free(want);
}

static void a_job_that_was_cancelled_does_not_come_back(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    family(powerfs_fs(p), "vmdk");
    struct server s = serve(powerfs_fs(p));
    tell(&s, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'speed': "
             "1}}");
    tell(&s, "{'execute': 'job-cancel', 'arguments': {'id': 'j'}}");
    wait_for(&s, "");
    struct server next = kill_and_begin_again(&s, p);
    char now[32];
    status(&next, now, sizeof(now));
    assert_string_equal(now, "");
    stop(&next);
    dr_fs_memory_free(next.fs);
}

static void a_job_that_was_paused_is_paused_with_the_next_server(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    char now[32];
    uint64_t size;
    family(powerfs_fs(p), "vmdk");
    uint8_t *want = view(powerfs_fs(p), "top", &size);
    struct server s = serve(powerfs_fs(p));
    tell(&s, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'speed': "
             "1, 'on-error': 'stop'}}");
    tell(&s, "{'execute': 'job-pause', 'arguments': {'id': 'j'}}");
    struct server next = kill_and_begin_again(&s, p);
    status(&next, now, sizeof(now));
    assert_string_equal(now, "paused");
    tell(&next, "{'execute': 'block-job-set-speed', 'arguments': {'device': 'j', 'speed': 0}}");
    assert_int_equal(dr_chain_length(next.disk), 2);
    tell(&next, "{'execute': 'job-resume', 'arguments': {'id': 'j'}}");
    wait_for(&next, "");
    assert_int_equal(dr_chain_length(next.disk), 1);
    stop(&next);
    same_view(next.fs, "top", want, size);
    dr_fs_memory_free(next.fs);
    free(want);
}

/* ------------------------------------------------------------------ jobs that failed */

/* No flush of the mirror's target succeeds; the first one of them may come together with the end of
 * the server. */
struct full {
    struct dr_live *live; /* is about to end; NULL: it is not */
};

static int fail_target(void *user, const struct faultfs_io *io)
{
    struct full *full = user;
    if (io->kind != FAULTFS_FLUSH || !strstr(io->path, "moved"))
        return 0;
    if (full->live)
        live_jobs_stop(full->live);
    return -ENOSPC;
}

/* To an image that is there: only the job flushes it. */
static void order_mirror_with(const struct server *s, struct dr_fs *fs, const char *policy)
{
    const struct dr_create_options c = {.format = "raw", .size = SIZE, .has_size = true};
    char line[256];
    ok(dr_create_fs(fs, "moved", &c, &err));
    snprintf(line, sizeof(line),
             "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
             "'target': 'moved', 'sync': 'full', 'format': 'raw', 'mode': 'existing', "
             "'on-target-error': '%s'}}",
             policy);
    tell(s, line);
}

static void job_is(const struct server *s, bool paused, const char *io_status)
{
    json_t *reply = ask(s, "{'execute': 'query-block-jobs'}");
    json_t *job = json_array_get(json_object_get(reply, "return"), 0);
    assert_non_null(job);
    assert_int_equal(json_is_true(json_object_get(job, "paused")), paused);
    assert_string_equal(json_string_value(json_object_get(job, "io-status")), io_status);
    json_decref(reply);
}

/* The next server has space for the target. */
static void end_mirror(struct dr_fs *fs, bool paused, const char *io_status)
{
    struct server next = serve(fs);
    job_is(&next, paused, io_status);
    if (paused)
        tell(&next, "{'execute': 'job-resume', 'arguments': {'id': 'j'}}");
    wait_for(&next, "ready");
    job_is(&next, false, "ok");
    tell(&next, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    wait_for(&next, "");
    assert_string_equal(dr_image_path(next.disk, 0), "moved");
    stop(&next);
}

static void a_job_that_an_error_has_paused_says_so_with_the_next_server(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct full full = {0};
    family(memory, "qcow2");
    faultfs_observe(f, fail_target, &full);
    struct server s = serve(faultfs_fs(f));
    order_mirror_with(&s, memory, "enospc");
    wait_for(&s, "paused");
    job_is(&s, true, "nospace");
    stop(&s);
    end_mirror(memory, true, "nospace");
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

/* Wait until the job's thread has told the server to end. */
static void wait_for_stop(struct dr_live *live)
{
    for (bool stops = false; !stops; sched_yield()) {
        DR_LOCK_SCOPE(&live->lock);
        stops = live->stopping;
    }
}

static void a_job_that_fails_as_the_server_ends_is_kept(void **state)
{
    static const struct {
        const char *policy, *io_status;
        bool paused;
    } cases[] = {{"report", "ok", false}, {"stop", "nospace", true}, {"enospc", "nospace", true}};
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        family(memory, "qcow2");
        struct server s = serve(faultfs_fs(f));
        struct full full = {.live = s.live};
        faultfs_observe(f, fail_target, &full);
        order_mirror_with(&s, memory, cases[i].policy);
        wait_for_stop(s.live);
        stop(&s);
        end_mirror(memory, cases[i].paused, cases[i].io_status);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

static void make_aside(struct dr_fs *fs, const char *of)
{
    struct dr_file *file;
    char *name = dr_aside_name(of, DR_ASIDE_FILE);
    ok(dr_file_open(fs, name, DR_FILE_CREATE, &file, &err));
    dr_file_unref(file);
    free(name);
}

static void what_a_killed_server_was_about_to_name_is_removed(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    family(fs, "qcow2");
    make_aside(fs, "state"); /* killed before there was any state */
    struct server s = serve(fs);
    stop(&s);
    assert_int_equal(count_files(fs), 3);
    make_aside(fs, "state");
    make_aside(fs, "other");
    s = serve(fs);
    stop(&s);
    assert_int_equal(count_files(fs), 4); /* base, top, state and what is not the state's */
    dr_fs_memory_free(fs);
}

static void a_server_keeps_its_state_to_itself(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    char *path, *format;
    family(fs, "vmdk");
    struct server s = serve(fs);
    refused(live_recall_fs(fs, "state", "disk0", NULL, &path, &format, &err), EBUSY, "state");
    stop(&s);
    ok(live_recall_fs(fs, "state", "disk0", NULL, &path, &format, &err));
    assert_string_equal(path, "top");
    assert_string_equal(format, "vmdk");
    free(path);
    free(format);
    ok(live_recall_fs(fs, "state", "disk1", NULL, &path, &format, &err));
    assert_null(path);
    dr_fs_memory_free(fs);
}

static void a_name_stays_with_the_disk_that_the_state_knows_by_it(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    char *path, *format;
    family(fs, "qcow2");
    struct server s = serve(fs);
    tell(&s, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
             "'snapshot-file': 'newer', 'format': 'qcow2'}}");
    stop(&s);
    s = serve(fs); /* it knows of the disk's first image only from the state */
    stop(&s);
    static const char *const its[] = {"top", "newer"};
    for (size_t i = 0; i < 2; i++) {
        ok(live_recall_fs(fs, "state", "disk0", its[i], &path, &format, &err));
        assert_string_equal(path, "newer");
        free(path);
        free(format);
    }
    refused(live_recall_fs(fs, "state", "disk0", "base", &path, &format, &err), EINVAL,
            "began with top and goes on with newer");
    assert_null(path);
    dr_fs_memory_free(fs);
}

static void what_is_no_state_is_refused(void **state)
{
    static const char *const bad[] = {"{", "[]", "{\"drover-state\": 2}", "KDMV\1\0\0\0", "7"};
    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_file *file;
        char *path, *format;
        ok(dr_file_open(fs, "state", DR_FILE_CREATE, &file, &err));
        ok(dr_file_pwrite(file, bad[i], 0, strlen(bad[i]), &err));
        dr_file_unref(file);
        refused(live_recall_fs(fs, "state", "disk0", NULL, &path, &format, &err), EINVAL,
                "is no state of a server");
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ a state that is not written */

/* Which steps of replacing the state fail, counted from when it is armed. */
struct trouble {
    _Atomic bool armed;
    unsigned syncs;   /* so many times its new name is not made durable */
    bool then_no_new; /* and then no new file can be made */
};

static int fail_state(void *user, const struct faultfs_io *io)
{
    struct trouble *t = user;
    if (!t->armed || !strstr(io->path, "state"))
        return 0;
    if (io->kind == FAULTFS_SYNC_DIR && t->syncs > 0) {
        t->syncs--;
        return -EIO;
    }
    return io->kind == FAULTFS_WRITE && t->syncs == 0 && t->then_no_new ? -ENOSPC : 0;
}

/* The name of the state may have changed hands although the change failed. */
static void the_next_server_has_the_disk_that_the_guest_wrote_to(void **state)
{
    static const struct {
        unsigned syncs;
        bool then_no_new;
    } cases[] = {{0, true}, {1, false}, {2, false}, {1, true}};
    static void (*const orders[])(const struct server *s) = {order_commit, order_mirror};
    (void)state;
    for (size_t i = 0; i < 2 * sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct trouble t = {.syncs = cases[i / 2].syncs, .then_no_new = cases[i / 2].then_no_new};
        uint8_t bytes[512];
        memset(bytes, 0x77, sizeof(bytes));
        family(memory, "qcow2");
        faultfs_observe(f, fail_state, &t);
        struct server s = serve(faultfs_fs(f));
        orders[i % 2](&s);
        t.armed = true;
        tell(&s, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
        wait_for_end(&s);
        t.armed = false;
        ok(dr_pwrite(s.disk, bytes, 0, sizeof(bytes), 0, &err));
        ok(dr_flush(s.disk, &err));
        char *used = strdup(dr_image_path(s.disk, 0));
        stop(&s);
        struct server next = serve(memory);
        assert_string_equal(dr_image_path(next.disk, 0), used);
        ok(dr_pread(next.disk, bytes, 0, sizeof(bytes), &err));
        assert_int_equal(bytes[511], 0x77);
        stop(&next);
        free(used);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

static void a_state_is_written_again_after_it_could_not_be(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct trouble t = {.syncs = 1};
    family(memory, "qcow2");
    faultfs_observe(f, fail_state, &t);
    struct server s = serve(faultfs_fs(f));
    t.armed = true;
    assert_int_equal(live_state_save(s.live, NULL), -EIO);
    snapshot(&s);
    stop(&s);
    struct server next = serve(memory);
    assert_string_equal(dr_image_path(next.disk, 0), "new");
    stop(&next);
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

static void a_state_that_cannot_be_looked_at_is_not_taken_for_none(void **state)
{
    (void)state;
    char dir[] = "/tmp/drover-state-XXXXXX", where[64];
    char *path, *format;
    assert_non_null(mkdtemp(dir));
    snprintf(where, sizeof(where), "%s/loop", dir);
    ok(dr_live_recall(where, "disk0", NULL, &path, &format, &err));
    assert_null(path);
    assert_int_equal(symlink("loop", where), 0);
    refused(dr_live_recall(where, "disk0", NULL, &path, &format, &err), ELOOP, where);
    unlink(where);
    rmdir(dir);
}

/* ------------------------------------------------------------------ several disks, and the end */

/* The number of jobs, or of disks, that the state has. */
static size_t count_in_state(struct dr_fs *fs, const char *what)
{
    struct dr_file *file;
    char text[4096] = "";
    ok(dr_file_open(fs, "state", DR_FILE_NO_LOCK, &file, &err));
    ok(dr_file_pread(file, text, 0, (size_t)dr_file_size(file), &err));
    json_t *all = json_loads(text, 0, NULL);
    size_t n = json_array_size(json_object_get(all, what));
    json_decref(all);
    dr_file_unref(file);
    return n;
}

static void slow_stream(const struct server *s)
{
    tell(s, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'speed': "
            "1}}");
}

static void a_job_that_the_end_stops_stays_in_every_later_state(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    family(fs, "qcow2");
    struct server s = serve(fs);
    slow_stream(&s);
    live_jobs_stop(s.live);
    ok(live_state_save(s.live, &err)); /* as another disk's job does that ends later */
    assert_int_equal(count_in_state(fs, "jobs"), 1);
    stop(&s);
    assert_int_equal(count_in_state(fs, "jobs"), 1);
    struct server next = serve(fs);
    char now[32];
    status(&next, now, sizeof(now));
    assert_string_equal(now, "running");
    tell(&next, "{'execute': 'job-cancel', 'arguments': {'id': 'j'}}");
    live_jobs_stop(next.live); /* a client has cancelled it, too */
    stop(&next);
    assert_int_equal(count_in_state(fs, "jobs"), 0);
    dr_fs_memory_free(fs);
}

static void a_server_leaves_in_the_state_what_is_of_other_disks(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    family(fs, "qcow2");
    struct server s = serve(fs);
    snapshot(&s);
    slow_stream(&s);
    stop(&s);
    const struct dr_live_options o = {.state = "state"};
    struct dr_create_options b = {.format = "raw", .size = SIZE, .has_size = true};
    struct server other = {.fs = fs};
    ok(dr_create_fs(fs, "elsewhere", &b, &err));
    ok(dr_open_fs(fs, "elsewhere",
                  &(struct dr_open_options){.flags = DR_OPEN_RDWR, .format = "raw"}, &other.disk,
                  &err));
    ok(dr_live_new(&o, &other.live, &err));
    other.live->fs = fs;
    ok(dr_live_add(other.live, "disk7", other.disk, &err));
    ok(dr_live_start(other.live, &err));
    stop(&other);
    assert_int_equal(count_in_state(fs, "disks"), 2);
    s = serve(fs);
    assert_string_equal(dr_image_path(s.disk, 0), "new");
    assert_int_equal(count_in_state(fs, "jobs"), 1);
    stop(&s);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_job_that_an_error_has_paused_says_so_with_the_next_server),
        cmocka_unit_test(a_job_that_fails_as_the_server_ends_is_kept),
        cmocka_unit_test(what_was_flushed_is_found_after_a_cut_anywhere),
        cmocka_unit_test(a_flush_of_the_next_server_means_what_the_killed_one_left_in_memory),
        cmocka_unit_test(a_mirror_goes_on_with_the_next_server),
        cmocka_unit_test(a_mirror_knows_the_format_of_its_target_with_the_next_server),
        cmocka_unit_test(a_stream_goes_on_with_the_next_server),
        cmocka_unit_test(a_job_that_was_cancelled_does_not_come_back),
        cmocka_unit_test(a_job_that_was_paused_is_paused_with_the_next_server),
        cmocka_unit_test(what_a_killed_server_was_about_to_name_is_removed),
        cmocka_unit_test(a_server_keeps_its_state_to_itself),
        cmocka_unit_test(a_name_stays_with_the_disk_that_the_state_knows_by_it),
        cmocka_unit_test(what_is_no_state_is_refused),
        cmocka_unit_test(the_next_server_has_the_disk_that_the_guest_wrote_to),
        cmocka_unit_test(a_state_is_written_again_after_it_could_not_be),
        cmocka_unit_test(a_state_that_cannot_be_looked_at_is_not_taken_for_none),
        cmocka_unit_test(a_job_that_the_end_stops_stays_in_every_later_state),
        cmocka_unit_test(a_server_leaves_in_the_state_what_is_of_other_disks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
