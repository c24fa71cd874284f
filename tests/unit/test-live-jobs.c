/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Jobs over the control socket, on a disk in use: what they do, and the order of their events. */
#include "test-live.h"

#define BEGUN     "JOB_STATUS_CHANGE:created JOB_STATUS_CHANGE:running "
#define ENDING    "JOB_STATUS_CHANGE:waiting JOB_STATUS_CHANGE:pending "
#define READY     "JOB_STATUS_CHANGE:ready BLOCK_JOB_READY "
#define COMPLETED "BLOCK_JOB_COMPLETED JOB_STATUS_CHANGE:concluded "
#define CANCELLED "JOB_STATUS_CHANGE:aborting BLOCK_JOB_CANCELLED JOB_STATUS_CHANGE:concluded "
#define FAILED    "JOB_STATUS_CHANGE:aborting BLOCK_JOB_COMPLETED! JOB_STATUS_CHANGE:concluded "
#define GONE      "JOB_STATUS_CHANGE:null "

struct world {
    struct dr_fs *fs;
    struct crowd crowd;
    struct dr_live *live;
    struct talk talk;
    _Atomic unsigned resized, written_back; /* how often the program was told to */
    _Atomic size_t images; /* that the chain had, the last time it was told to write back */
};

static void resized(void *user, const char *name)
{
    struct world *w = user;
    w->resized += strcmp(name, "disk0") == 0;
}

static void write_back(void *user, const char *name)
{
    struct world *w = user;
    w->written_back += strcmp(name, "disk0") == 0;
    w->images = dr_chain_length(w->crowd.disk);
}

/* base ← mid ← top, of this format, with data in each, and a crowd that uses top. */
static struct world *begin(const char *format)
{
    struct world *w = calloc(1, sizeof(*w));
    const struct dr_live_options o = {
        .control = socket_path(), .user = w, .resized = resized, .write_back = write_back};
    const char *const names[] = {"base", "mid", "top"};
    w->fs = dr_fs_memory_new();
    for (unsigned i = 0; i < 3; i++) {
        struct dr_create_options c = {.format = format,
                                      .size = i ? 0 : CROWD_SIZE,
                                      .backing = i ? names[i - 1] : NULL,
                                      .backing_format = i ? format : NULL};
        ok(dr_create_fs(w->fs, names[i], &c, &err));
        put(w->fs, names[i], i * 512 * KiB, MiB, 0x11 * ((int)i + 1));
    }
    crowd_begin(&w->crowd, w->fs, "top");
    ok(dr_live_new(&o, &w->live, &err));
    ok(dr_live_add(w->live, "disk0", w->crowd.disk, &err));
    ok(dr_live_start(w->live, &err));
    w->talk = talk_begin(true);
    return w;
}

/* The disk is the one at path, whole. */
static void end(struct world *w, const char *path)
{
    crowd_pass(&w->crowd, 10);
    talk_end(&w->talk);
    dr_live_free(w->live);
    assert_string_equal(dr_image_path(w->crowd.disk, 0), path);
    crowd_end(&w->crowd, path);
    dr_fs_memory_free(w->fs);
    free(w);
}

#define tell(w, line)                asked_ok(&(w)->talk, quoted(line))
#define told_no(w, line, class, why) asked_refused(&(w)->talk, quoted(line), class, why)

static void a_stream_pulls_everything_in(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 1);
    end(w, "top");
}

static void a_stream_stops_at_its_base(void **state)
{
    struct world *w = begin("vmdk");
    (void)state;
    tell(w, "{'execute': 'block-stream', 'arguments': {'device': 'disk0', 'base': 'base'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    assert_string_equal(dr_image_path(w->crowd.disk, 1), "base");
    end(w, "top");
}

static void a_stream_fills_an_image_below_the_active_one(void **state)
{
    static const char *const by[] = {"'device': 'n1'", "'device': 'disk0', 'x-image': 'top'"};
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct world *w = begin("qcow2");
        char line[200];
        tell(w, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
                "'snapshot-file': 'new', 'snapshot-node-name': 'n1'}}");
        tell(w, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
                "'snapshot-file': 'newer'}}");
        snprintf(line, sizeof(line),
                 "{'execute': 'block-stream', 'arguments': {'job-id': 'j', %s, 'base': 'base'}}",
                 by[i]);
        tell(w, line);
        events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
        assert_string_equal(dr_image_path(w->crowd.disk, 2), i ? "top" : "base");
        assert_string_equal(dr_image_path(w->crowd.disk, dr_chain_length(w->crowd.disk) - 1),
                            "base");
        assert_int_equal(dr_chain_length(w->crowd.disk), 3 + i);
        end(w, "newer");
    }
}

static void a_rebase_gives_a_lower_image_another_parent(void **state)
{
    struct world *w = begin("vmdk");
    (void)state;
    make(w->fs, "other", "vmdk", CROWD_SIZE, NULL);
    put(w->fs, "other", 64 * KiB, MiB, 0x55);
    tell(w, "{'execute': 'x-drover-rebase', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'x-image': 'mid', 'backing-file': 'other', 'backing-format': 'vmdk'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    assert_string_equal(dr_image_path(w->crowd.disk, 2), "other");
    told_no(w,
            "{'execute': 'x-drover-rebase', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'x-image': 'base', 'backing-file': 'other', 'backing-format': 'vmdk'}}",
            "GenericError", "Can't find 'base' in the backing chain");
    told_no(w,
            "{'execute': 'x-drover-rebase', 'arguments': {'device': 'disk1', "
            "'backing-file': 'other'}}",
            "GenericError", "Cannot find device='disk1'");
    end(w, "top");
}

static void an_image_below_the_active_one_is_deleted(void **state)
{
    static const char *const formats[] = {"vmdk", "qcow2", "add-cow"};
    (void)state;
    for (unsigned i = 0; i < 6; i++) {
        struct world *w = begin(formats[i / 2]);
        char line[200];
        told_no(w,
                "{'execute': 'x-drover-delete', 'arguments': {'device': 'disk0', 'image': 'top'}}",
                "GenericError", "only images below it can be deleted");
        told_no(w,
                "{'execute': 'x-drover-delete', 'arguments': {'device': 'disk0', 'image': 'no'}}",
                "GenericError", "Did not find 'no'");
        told_no(w,
                "{'execute': 'x-drover-delete', 'arguments': {'device': 'disk0', 'image': 'base', "
                "'down': true}}",
                "GenericError", "no parent that it could go down into");
        snprintf(line, sizeof(line),
                 "{'execute': 'x-drover-delete', 'arguments': {'device': 'disk0', 'image': 'mid', "
                 "'down': %s, 'remove': %s}}",
                 i % 2 ? "true" : "false", i < 4 ? "true" : "false");
        tell(w, line);
        events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
        assert_int_equal(dr_chain_length(w->crowd.disk), 2);
        assert_int_equal(exists(w->fs, "mid"), i >= 4); /* only when asked */
        crowd_pass(&w->crowd, 5);
        tell(w, "{'execute': 'x-drover-delete', 'arguments': {'device': 'disk0', 'image': 'base', "
                "'remove': false}}");
        events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
        assert_int_equal(dr_chain_length(w->crowd.disk), 1);
        assert_true(exists(w->fs, "base"));
        end(w, "top");
    }
}

/* The overlay that a commit has emptied shows the disk, and is no other image on its base. */
static void a_second_commit_into_the_same_base_is_not_refused(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        tell(w, "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', "
                "'base': 'mid'}}");
        events_are(&w->talk, BEGUN READY);
        tell(w, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
        events_are(&w->talk, ENDING COMPLETED GONE);
        assert_string_equal(dr_image_path(w->crowd.disk, 0), "mid");
        crowd_pass(&w->crowd, 5);
        if (i == 0)
            tell(w, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
                    "'snapshot-file': 'new'}}");
    }
    end(w, "mid");
}

static void a_job_waits_to_be_finalized_and_dismissed(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'auto-finalize': false, 'auto-dismiss': false}}");
    events_are(&w->talk, BEGUN ENDING "BLOCK_JOB_PENDING ");
    assert_int_equal(dr_chain_length(w->crowd.disk), 3); /* nothing has been switched */
    told_no(w, "{'execute': 'job-dismiss', 'arguments': {'id': 'j'}}", "GenericError",
            "Job 'j' in state 'pending' cannot accept command verb 'dismiss'");
    told_no(w, "{'execute': 'job-pause', 'arguments': {'id': 'j'}}", "GenericError", "'pending'");
    told_no(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0'}}",
            "GenericError", "Node 'disk0' is busy");
    told_no(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'k', 'device': 'disk0'}}",
            "GenericError", "Node 'disk0' is busy");
    tell(w, "{'execute': 'job-finalize', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, COMPLETED);
    assert_int_equal(dr_chain_length(w->crowd.disk), 1);
    json_t *reply = ask(&w->talk, quoted("{'execute': 'query-jobs'}"));
    json_t *job = json_array_get(json_object_get(reply, "return"), 0);
    assert_string_equal(json_string_value(json_object_get(job, "status")), "concluded");
    json_decref(reply);
    tell(w, "{'execute': 'job-dismiss', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, GONE);
    end(w, "top");
}

static void a_pending_job_may_be_cancelled(void **state)
{
    struct world *w = begin("vmdk");
    (void)state;
    tell(w, "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'top': 'mid', 'base': 'base', 'auto-finalize': false}}");
    events_are(&w->talk, BEGUN ENDING "BLOCK_JOB_PENDING ");
    tell(w, "{'execute': 'job-cancel', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, CANCELLED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    end(w, "top");
}

static void an_intermediate_commit_ends_alone(void **state)
{
    struct world *w = begin("vmdk");
    (void)state;
    tell(w, "{'execute': 'block-commit', 'arguments': {'device': 'disk0', 'top': 'mid'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    end(w, "top");
}

static void an_active_commit_is_ready_and_goes_over_when_told(void **state)
{
    static const char *const formats[] = {"vmdk", "qcow2"};
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct world *w = begin(formats[i]);
        tell(w, "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0'}}");
        events_are(&w->talk, BEGUN READY);
        crowd_pass(&w->crowd, 20);
        tell(w, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
        events_are(&w->talk, ENDING COMPLETED GONE);
        assert_int_equal(dr_chain_length(w->crowd.disk), 1);
        end(w, "base");
    }
}

static void a_commit_that_makes_another_image_unusable_has_to_be_forced(void **state)
{
    struct world *w = begin("vmdk");
    const struct dr_create_options sibling = {
        .format = "vmdk", .backing = "base", .backing_format = "vmdk"};
    (void)state;
    ok(dr_create_fs(w->fs, "sibling", &sibling, &err));
    tell(w, "{'execute': 'block-commit', 'arguments': {'device': 'disk0', 'top': 'mid'}}");
    events_are(&w->talk, BEGUN FAILED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    tell(w, "{'execute': 'block-commit', 'arguments': {'device': 'disk0', 'top': 'mid', "
            "'x-force': true}}");
    events_are(&w->talk, BEGUN "X_DROVER_JOB_MESSAGE " ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 2);
    end(w, "top");
}

static void a_disk_in_use_is_backed_up(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-backup', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'b0', 'sync': 'full', 'x-set': 'set', 'x-bitmap': 'B'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    crowd_pass(&w->crowd, 20);
    tell(w, "{'execute': 'drive-backup', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'b1', 'sync': 'incremental', 'x-set': 'set', 'x-bitmap': 'B'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    struct dr_backup_entry *list;
    size_t n;
    ok(dr_backup_list_fs(w->fs, "set", &list, &n, &err));
    assert_int_equal(n, 2);
    assert_string_equal(list[1].parent, "b0");
    dr_backup_list_free(list, n);
    ok(dr_backup_verify_fs(w->fs, "set", "b0", NULL, NULL, NULL, &err));
    ok(dr_backup_verify_fs(w->fs, "set", "b1", NULL, NULL, NULL, &err));
    tell(w, "{'execute': 'drive-backup', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'raw', 'sync': 'full', 'format': 'raw'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_true(exists(w->fs, "raw"));
    end(w, "top");
}

static void a_backup_that_cannot_be_is_refused(void **state)
{
    static const struct {
        const char *arguments, *text;
    } cases[] = {
        {"'sync': 'none'", "Sync mode 'none' needs mode 'existing'"},
        {"'sync': 'incremental'", "bitmap"},
        {"'sync': 'half'", "Parameter 'sync' does not accept value 'half'"},
        {"'sync': 'full', 'mode': 'existing'", "b0"},
        {"'sync': 'full', 'x-bitmap': 'B'", "Parameter 'x-set' is missing"},
    };
    struct world *w = begin("qcow2");
    char line[400];
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        snprintf(
            line, sizeof(line),
            "{'execute': 'drive-backup', 'arguments': {'device': 'disk0', 'target': 'b0', %s}}",
            cases[i].arguments);
        told_no(w, line, "GenericError", cases[i].text);
    }
    assert_false(exists(w->fs, "b0"));
    end(w, "top");
}

static void a_cancelled_backup_leaves_nothing(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-backup', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'b0', 'sync': 'full', 'speed': 1}}");
    events_are(&w->talk, BEGUN);
    tell(w, "{'execute': 'job-cancel', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, CANCELLED GONE);
    assert_false(exists(w->fs, "b0"));
    end(w, "top");
}

static void a_mirror_is_ready_and_goes_over_when_told(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'moved', 'sync': 'full', 'format': 'raw'}}");
    events_are(&w->talk, BEGUN READY);
    crowd_pass(&w->crowd, 20);
    tell(w, "{'execute': 'block-job-pause', 'arguments': {'device': 'j'}}");
    told_no(w, "{'execute': 'block-job-pause', 'arguments': {'device': 'j'}}", "GenericError",
            "already paused");
    told_no(w, "{'execute': 'block-job-cancel', 'arguments': {'device': 'j'}}", "GenericError",
            "currently paused");
    tell(w, "{'execute': 'block-job-resume', 'arguments': {'device': 'j'}}");
    told_no(w, "{'execute': 'block-job-resume', 'arguments': {'device': 'j'}}", "GenericError",
            "not paused");
    tell(w, "{'execute': 'block-job-complete', 'arguments': {'device': 'j'}}");
    events_are(&w->talk,
               "JOB_STATUS_CHANGE:standby JOB_STATUS_CHANGE:ready " ENDING COMPLETED GONE);
    end(w, "moved");
}

static void a_ready_mirror_that_is_cancelled_leaves_a_copy(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'copy', 'sync': 'full', 'format': 'vmdk'}}");
    events_are(&w->talk, BEGUN READY);
    tell(w, "{'execute': 'block-job-cancel', 'arguments': {'device': 'j'}}");
    events_are(&w->talk, ENDING COMPLETED GONE);
    assert_true(exists(w->fs, "copy"));
    end(w, "top");
}

static void a_mirror_that_is_forced_to_end_leaves_nothing(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'copy', 'sync': 'full', 'format': 'vmdk'}}");
    events_are(&w->talk, BEGUN READY);
    tell(w, "{'execute': 'block-job-cancel', 'arguments': {'device': 'j', 'force': true}}");
    events_are(&w->talk, CANCELLED GONE);
    assert_false(exists(w->fs, "copy"));
    end(w, "top");
}

/* It has to copy more than the crowd may have written over by now. */
static void begin_slow_mirror(struct world *w)
{
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'moved', 'sync': 'full', 'format': 'raw', 'speed': 1}}");
}

static void a_paused_job_waits(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    begin_slow_mirror(w);
    tell(w, "{'execute': 'job-pause', 'arguments': {'id': 'j'}}");
    tell(w, "{'execute': 'block-job-set-speed', 'arguments': {'device': 'j', 'speed': 0}}");
    crowd_pass(&w->crowd, 10);
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    tell(w, "{'execute': 'job-resume', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, BEGUN "JOB_STATUS_CHANGE:paused JOB_STATUS_CHANGE:running " READY);
    tell(w, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 1);
    end(w, "moved");
}

static void a_running_job_is_cancelled(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    begin_slow_mirror(w);
    tell(w, "{'execute': 'job-cancel', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, BEGUN CANCELLED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    end(w, "top");
}

static void a_job_that_fails_says_why(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    make(w->fs, "there", "raw", CROWD_SIZE, NULL);
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'there', 'sync': 'full', 'auto-dismiss': false}}");
    events_are(&w->talk, BEGUN FAILED);
    json_t *reply = ask(&w->talk, quoted("{'execute': 'query-block-jobs'}"));
    json_t *job = json_array_get(json_object_get(reply, "return"), 0);
    assert_non_null(strstr(json_string_value(json_object_get(job, "error")), "exists already"));
    json_decref(reply);
    tell(w, "{'execute': 'job-dismiss', 'arguments': {'id': 'j'}}");
    events_are(&w->talk, GONE);
    end(w, "top");
}

static void all_clients_hear_the_same_events(void **state)
{
    struct world *w = begin("qcow2");
    struct talk deaf = talk_begin(false), second = talk_begin(true);
    (void)state;
    tell(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0'}}");
    events_are(&second, BEGUN ENDING COMPLETED GONE);
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    asked_ok(&deaf, "{\"execute\": \"qmp_capabilities\"}");
    assert_null(deaf.events); /* it had not negotiated when they came */
    talk_end(&deaf);
    talk_end(&second);
    end(w, "top");
}

static void a_client_may_leave_in_the_middle(void **state)
{
    struct world *w = begin("qcow2");
    struct talk other = talk_begin(true);
    (void)state;
    say_line(&other, quoted("{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': "
                            "'disk0'}}"));
    talk_end(&other);
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    end(w, "top");
}

static void the_end_cancels_jobs(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
            "'target': 'moved', 'sync': 'full', 'format': 'raw'}}");
    events_are(&w->talk, BEGUN READY);
    end(w, "top");
}

static void a_disk_grows_in_use(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'block_resize', 'arguments': {'device': 'disk0', 'size': 8388608}}");
    assert_int_equal(dr_size(w->crowd.disk), 8388608);
    assert_int_equal(w->resized, 1);
    tell(w, "{'execute': 'block_resize', 'arguments': {'device': 'disk0', 'size': 8388608}}");
    assert_int_equal(w->resized, 1);
    end(w, "top");
}

static void a_program_writes_back_what_it_holds_before_a_snapshot(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'block_resize', 'arguments': {'device': 'disk0', 'size': 8388608}}");
    assert_int_equal(w->written_back, 0);
    tell(w, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
            "'snapshot-file': 'new'}}");
    assert_int_equal(w->written_back, 1);
    assert_int_equal(w->images, 3);
    assert_int_equal(dr_chain_length(w->crowd.disk), 4);
    end(w, "new");
}

static void snapshots_are_all_or_none(void **state)
{
    struct world *w = begin("vmdk");
    struct dr_disk *second;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    make(w->fs, "second.raw", "raw", MiB, NULL);
    ok(dr_open_fs(w->fs, "second.raw", &rw, &second, &err));
    ok(dr_live_add(w->live, "disk1", second, &err));
#define BOTH(a, b)                                                                             \
    "{'execute': 'transaction', 'arguments': {'actions': [{'type': 'blockdev-snapshot-sync', " \
    "'data': {'device': 'disk0', 'snapshot-file': '" a "'}}, {'type': "                        \
    "'blockdev-snapshot-sync', 'data': {'device': 'disk1', 'snapshot-file': '" b               \
    "', 'format': 'add-cow'}}]}}"
    told_no(w, BOTH("one", "base"), "GenericError", "base");
    assert_int_equal(dr_chain_length(w->crowd.disk), 3);
    tell(w, BOTH("one", "two"));
    assert_int_equal(dr_chain_length(w->crowd.disk), 4);
    assert_string_equal(dr_image_format(second, 0), "add-cow");
    crowd_pass(&w->crowd, 10);
    talk_end(&w->talk);
    dr_live_free(w->live);
    ok(dr_close(second, &err));
    crowd_end(&w->crowd, "one");
    dr_fs_memory_free(w->fs);
    free(w);
}

static void a_node_that_a_client_named_is_a_device_and_a_base(void **state)
{
    struct world *w = begin("qcow2");
    (void)state;
    tell(w, "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
            "'snapshot-file': 'new', 'snapshot-node-name': 'n1'}}");
    told_no(w,
            "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', "
            "'snapshot-file': 'newer', 'snapshot-node-name': 'n1'}}",
            "GenericError", "Duplicate");
    tell(w, "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'n1', "
            "'base-node': 'disk0'}}");
    events_are(&w->talk, BEGUN ENDING COMPLETED GONE);
    assert_int_equal(dr_chain_length(w->crowd.disk), 4); /* its parent stays its parent */
    end(w, "new");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_stream_pulls_everything_in),
        cmocka_unit_test(a_stream_stops_at_its_base),
        cmocka_unit_test(a_stream_fills_an_image_below_the_active_one),
        cmocka_unit_test(a_rebase_gives_a_lower_image_another_parent),
        cmocka_unit_test(an_image_below_the_active_one_is_deleted),
        cmocka_unit_test(a_second_commit_into_the_same_base_is_not_refused),
        cmocka_unit_test(a_job_waits_to_be_finalized_and_dismissed),
        cmocka_unit_test(a_pending_job_may_be_cancelled),
        cmocka_unit_test(an_intermediate_commit_ends_alone),
        cmocka_unit_test(an_active_commit_is_ready_and_goes_over_when_told),
        cmocka_unit_test(a_commit_that_makes_another_image_unusable_has_to_be_forced),
        cmocka_unit_test(a_disk_in_use_is_backed_up),
        cmocka_unit_test(a_backup_that_cannot_be_is_refused),
        cmocka_unit_test(a_cancelled_backup_leaves_nothing),
        cmocka_unit_test(a_mirror_is_ready_and_goes_over_when_told),
        cmocka_unit_test(a_ready_mirror_that_is_cancelled_leaves_a_copy),
        cmocka_unit_test(a_mirror_that_is_forced_to_end_leaves_nothing),
        cmocka_unit_test(a_paused_job_waits),
        cmocka_unit_test(a_running_job_is_cancelled),
        cmocka_unit_test(a_job_that_fails_says_why),
        cmocka_unit_test(all_clients_hear_the_same_events),
        cmocka_unit_test(a_client_may_leave_in_the_middle),
        cmocka_unit_test(the_end_cancels_jobs),
        cmocka_unit_test(a_disk_grows_in_use),
        cmocka_unit_test(a_program_writes_back_what_it_holds_before_a_snapshot),
        cmocka_unit_test(snapshots_are_all_or_none),
        cmocka_unit_test(a_node_that_a_client_named_is_a_device_and_a_base),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
