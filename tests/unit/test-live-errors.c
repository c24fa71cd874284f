/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What jobs do about pieces that cannot be read or written, told over the control socket: fail,
 * try again, or pause until somebody resumes them. */
#include "faultfs.h"
#include "test-live.h"

#define BEGUN   "JOB_STATUS_CHANGE:created JOB_STATUS_CHANGE:running "
#define ERROR   "BLOCK_JOB_ERROR "
#define PAUSED  "JOB_STATUS_CHANGE:paused "
#define RUNNING "JOB_STATUS_CHANGE:running "
#define READY   "JOB_STATUS_CHANGE:ready BLOCK_JOB_READY "
#define COMPLETED                                          \
    "JOB_STATUS_CHANGE:waiting JOB_STATUS_CHANGE:pending " \
    "BLOCK_JOB_COMPLETED JOB_STATUS_CHANGE:concluded JOB_STATUS_CHANGE:null "
#define CANCELLED                                                                 \
    "JOB_STATUS_CHANGE:aborting BLOCK_JOB_CANCELLED JOB_STATUS_CHANGE:concluded " \
    "JOB_STATUS_CHANGE:null "
#define FAILED                                                                     \
    "JOB_STATUS_CHANGE:aborting BLOCK_JOB_COMPLETED! JOB_STATUS_CHANGE:concluded " \
    "JOB_STATUS_CHANGE:null "

/* base ← top, of this format, behind a file system of which single calls fail. */
struct world {
    struct dr_fs *memory;
    struct faultfs *faults;
    bool crowded; /* a crowd uses top; else nobody */
    struct crowd crowd;
    struct dr_live *live;
    struct talk talk;

    enum faultfs_kind kind; /* calls of this kind to files whose names have the word fail */
    const char *word;
    int error;
    _Atomic int left;   /* so many times */
    _Atomic int spared; /* after so many that succeed */
};

static int fail_some(void *user, const struct faultfs_io *io)
{
    struct world *w = user;
    if (io->kind != w->kind || !strstr(io->path, w->word))
        return 0;
    int left = atomic_load(&w->left);
    if (left > 0 && atomic_fetch_sub(&w->spared, 1) > 0)
        return 0;
    while (left > 0 && !atomic_compare_exchange_weak(&w->left, &left, left - 1))
        ;
    return left > 0 ? -w->error : 0;
}

#define ALWAYS 1000000000

static struct world *begin(bool crowded, enum faultfs_kind kind, const char *word, int error,
                           int times)
{
    const struct dr_live_options o = {.control = socket_path()};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct world *w = calloc(1, sizeof(*w));
    w->memory = dr_fs_memory_new();
    w->faults = faultfs_new(w->memory);
    w->crowded = crowded;
    for (unsigned i = 0; i < 2; i++) {
        struct dr_create_options c = {.format = "qcow2",
                                      .size = i ? 0 : CROWD_SIZE,
                                      .backing = i ? "base" : NULL,
                                      .backing_format = i ? "qcow2" : NULL};
        ok(dr_create_fs(w->memory, i ? "top" : "base", &c, &err));
        put(w->memory, i ? "top" : "base", i * 512 * KiB, MiB, 0x11 * ((int)i + 1));
    }
    if (crowded)
        crowd_begin(&w->crowd, faultfs_fs(w->faults), "top");
    else
        ok(dr_open_fs(faultfs_fs(w->faults), "top", &rw, &w->crowd.disk, &err));
    w->kind = kind;
    w->word = word;
    w->error = error;
    w->left = times;
    faultfs_observe(w->faults, fail_some, w);
    ok(dr_live_new(&o, &w->live, &err));
    ok(dr_live_add(w->live, "disk0", w->crowd.disk, &err));
    ok(dr_live_start(w->live, &err));
    w->talk = talk_begin(true);
    return w;
}

/* The disk is the one at path, whole. */
static void end(struct world *w, const char *path)
{
    talk_end(&w->talk);
    dr_live_free(w->live);
    assert_string_equal(dr_image_path(w->crowd.disk, 0), path);
    if (w->crowded)
        crowd_end(&w->crowd, path);
    else
        ok(dr_close(w->crowd.disk, &err));
    faultfs_free(w->faults);
    dr_fs_memory_free(w->memory);
    free(w);
}

#define tell(w, line) asked_ok(&(w)->talk, quoted(line))

static void tell_verb(struct world *w, const char *verb)
{
    char line[128];
    snprintf(line, sizeof(line), "{'execute': '%s', 'arguments': {'id': 'j'}}", verb);
    tell(w, line);
}

/* What query-block-jobs says of the only job, once it moves no bytes if it is paused. */
static void job_is(struct world *w, const char *io_status, bool paused)
{
    json_t *reply = NULL, *job = NULL;
    do {
        json_decref(reply);
        reply = ask(&w->talk, quoted("{'execute': 'query-block-jobs'}"));
        job = json_array_get(json_object_get(reply, "return"), 0);
    } while (paused && json_is_true(json_object_get(job, "busy")));
    assert_string_equal(json_string_value(json_object_get(job, "io-status")), io_status);
    assert_int_equal(json_is_true(json_object_get(job, "paused")), paused);
    json_decref(reply);
}

#define MIRROR(more)                                                                         \
    "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', 'target': " \
    "'moved', 'sync': 'full', 'format': 'raw', " more "}}"
#define COMMIT(more) \
    "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', " more "}}"
#define STREAM(more) \
    "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', " more "}}"

#define SNAPSHOT(file)                                                        \
    "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', " \
    "'snapshot-file': '" file "'}}"

static void a_mirror_to_a_full_target_waits_until_it_is_resumed(void **state)
{
    static const char *const policies[] = {"enospc", "stop", "auto"};
    (void)state;
    for (unsigned i = 0; i < 3; i++) {
        struct world *w = begin(true, FAULTFS_WRITE, "moved", ENOSPC, ALWAYS);
        char line[512];
        snprintf(line, sizeof(line), MIRROR("'on-target-error': '%s'"), policies[i]);
        tell(w, line);
        events_are(&w->talk, BEGUN ERROR PAUSED);
        job_is(w, "nospace", true);
        crowd_pass(&w->crowd, 20);
        tell_verb(w, "job-resume"); /* there is no more space than before */
        events_are(&w->talk, RUNNING ERROR PAUSED);
        job_is(w, "nospace", true);
        atomic_store(&w->left, 0);
        tell_verb(w, "job-resume");
        events_are(&w->talk, RUNNING READY);
        job_is(w, "ok", false);
        tell_verb(w, "job-complete");
        events_are(&w->talk, COMPLETED);
        end(w, "moved");
    }
}

static void a_ready_mirror_waits_in_standby(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", EIO, 0);
    (void)state;
    tell(w, MIRROR("'on-target-error': 'stop'"));
    events_are(&w->talk, BEGUN READY);
    atomic_store(&w->left, ALWAYS);
    events_are(&w->talk, ERROR "JOB_STATUS_CHANGE:standby ");
    job_is(w, "failed", true);
    crowd_pass(&w->crowd, 20);
    atomic_store(&w->left, 0);
    tell_verb(w, "job-resume");
    tell_verb(w, "job-complete");
    events_are(&w->talk, "JOB_STATUS_CHANGE:ready " COMPLETED);
    end(w, "moved");
}

static void a_commit_into_a_full_base_waits_until_it_is_resumed(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "base", ENOSPC, ALWAYS);
    (void)state;
    tell(w, COMMIT("'on-error': 'enospc'"));
    events_are(&w->talk, BEGUN ERROR PAUSED);
    job_is(w, "nospace", true);
    crowd_pass(&w->crowd, 20);
    atomic_store(&w->left, 0);
    tell_verb(w, "job-resume");
    events_are(&w->talk, RUNNING READY);
    tell_verb(w, "job-complete");
    events_are(&w->talk, COMPLETED);
    end(w, "base");
}

static void a_stream_that_cannot_read_waits_until_it_is_resumed(void **state)
{
    struct world *w = begin(false, FAULTFS_READ, "base", EIO, ALWAYS);
    (void)state;
    tell(w, STREAM("'on-error': 'stop'"));
    events_are(&w->talk, BEGUN ERROR PAUSED);
    job_is(w, "failed", true);
    atomic_store(&w->left, 0);
    tell_verb(w, "job-resume");
    events_are(&w->talk, RUNNING COMPLETED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 1);
    end(w, "top");
}

/* What a stream fills in, the image's parents show as well until they are left. */
static void a_stream_into_a_full_lower_image_does_not_fail_the_guests_flushes(void **state)
{
    struct world *w = begin(false, FAULTFS_WRITE, "lower", ENOSPC, 0);
    char bytes[64 * KiB];
    (void)state;
    memset(bytes, 0x55, sizeof(bytes));
    for (uint64_t off = MiB; off + sizeof(bytes) <= CROWD_SIZE; off += sizeof(bytes))
        ok(dr_pwrite(w->crowd.disk, bytes, off, sizeof(bytes), 0, &err));
    tell(w, SNAPSHOT("lower"));
    tell(w, SNAPSHOT("upper"));
    atomic_store(&w->spared, 1);
    atomic_store(&w->left, ALWAYS);
    tell(w, STREAM("'x-image': 'lower', 'on-error': 'enospc'"));
    events_are(&w->talk, BEGUN ERROR PAUSED);
    job_is(w, "nospace", true);
    ok(dr_pwrite(w->crowd.disk, bytes, 0, sizeof(bytes), 0, &err));
    ok(dr_flush(w->crowd.disk, &err));
    atomic_store(&w->left, 0);
    tell_verb(w, "job-resume");
    events_are(&w->talk, RUNNING COMPLETED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    end(w, "upper");
}

static void each_side_has_its_own_policy(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", EIO, 1);
    (void)state;
    tell(w, MIRROR("'on-source-error': 'stop', 'on-target-error': 'enospc'"));
    events_are(&w->talk, BEGUN ERROR FAILED); /* nothing is full */
    end(w, "top");
}

static void by_default_a_job_tells_and_fails(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", ENOSPC, 1);
    (void)state;
    tell(w, MIRROR("'speed': 0"));
    events_are(&w->talk, BEGUN ERROR FAILED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    end(w, "top");
}

static void what_a_mirror_ignores_it_tries_again(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", EIO, 1);
    (void)state;
    tell(w, MIRROR("'on-target-error': 'ignore'"));
    events_are(&w->talk, BEGUN ERROR READY);
    tell_verb(w, "job-complete");
    events_are(&w->talk, COMPLETED);
    end(w, "moved");
}

/* As in QEMU: it goes on to the end and fails then. Doing it again copies the rest. */
static void what_a_stream_ignores_it_leaves_out(void **state)
{
    struct world *w = begin(false, FAULTFS_READ, "base", EIO, 1);
    (void)state;
    tell(w, STREAM("'on-error': 'ignore'"));
    events_are(&w->talk, BEGUN ERROR FAILED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    tell(w, STREAM("'on-error': 'ignore'"));
    events_are(&w->talk, BEGUN COMPLETED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 1);
    end(w, "top");
}

static void a_job_that_waits_after_an_error_may_be_cancelled(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", ENOSPC, ALWAYS);
    (void)state;
    tell(w, MIRROR("'on-target-error': 'stop'"));
    events_are(&w->talk, BEGUN ERROR PAUSED);
    tell_verb(w, "job-cancel");
    events_are(&w->talk, CANCELLED);
    assert_false(exists(w->memory, "moved"));
    end(w, "top");
}

static void the_end_does_not_wait_for_a_job_that_waits(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "base", ENOSPC, ALWAYS);
    (void)state;
    tell(w, COMMIT("'on-error': 'stop'"));
    events_are(&w->talk, BEGUN ERROR PAUSED);
    end(w, "top");
}

static void the_event_says_what_was_done(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", ENOSPC, ALWAYS);
    json_t *message = NULL, *data = NULL;
    (void)state;
    tell(w, MIRROR("'on-target-error': 'stop'"));
    do {
        json_decref(message);
        message = hear_one(&w->talk);
        data = json_object_get(message, "data");
    } while (strcmp(json_string_value(json_object_get(message, "event")), "BLOCK_JOB_ERROR") != 0);
    assert_string_equal(json_string_value(json_object_get(data, "device")), "j");
    assert_string_equal(json_string_value(json_object_get(data, "operation")), "write");
    assert_string_equal(json_string_value(json_object_get(data, "action")), "stop");
    json_decref(message);
    end(w, "top");
}

static void unknown_policies_are_refused(void **state)
{
    struct world *w = begin(true, FAULTFS_WRITE, "moved", ENOSPC, 0);
    (void)state;
    asked_refused(&w->talk, quoted(STREAM("'on-error': 'panic'")), "GenericError",
                  "'on-error' does not accept value 'panic'");
    end(w, "top");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_mirror_to_a_full_target_waits_until_it_is_resumed),
        cmocka_unit_test(a_ready_mirror_waits_in_standby),
        cmocka_unit_test(a_commit_into_a_full_base_waits_until_it_is_resumed),
        cmocka_unit_test(a_stream_that_cannot_read_waits_until_it_is_resumed),
        cmocka_unit_test(a_stream_into_a_full_lower_image_does_not_fail_the_guests_flushes),
        cmocka_unit_test(each_side_has_its_own_policy),
        cmocka_unit_test(by_default_a_job_tells_and_fails),
        cmocka_unit_test(what_a_mirror_ignores_it_tries_again),
        cmocka_unit_test(what_a_stream_ignores_it_leaves_out),
        cmocka_unit_test(a_job_that_waits_after_an_error_may_be_cancelled),
        cmocka_unit_test(the_end_does_not_wait_for_a_job_that_waits),
        cmocka_unit_test(the_event_says_what_was_done),
        cmocka_unit_test(unknown_policies_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
