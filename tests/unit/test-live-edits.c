/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A server is killed anywhere while the chain of its disk changes, and begun again on its state:
 * the disk reads as before, the job ends, and no file is left that is neither the old chain's nor
 * the new one's. */
#include "powerfs.h"
#include "test-live-state.h"

static void make_on(struct dr_fs *fs, const char *path, const char *format, const char *backing)
{
    struct dr_create_options o = {.format = format,
                                  .size = backing ? 0 : SIZE,
                                  .has_size = !backing,
                                  .backing = backing,
                                  .backing_format = backing ? format : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
}

/* base ← mid ← top, and other. */
static void family(struct dr_fs *fs, const char *format)
{
    make_on(fs, "base", format, NULL);
    put(fs, "base", 0, 256 * KiB, 0x11);
    make_on(fs, "mid", format, "base");
    put(fs, "mid", 64 * KiB, 64 * KiB, 0x22);
    make_on(fs, "top", format, "mid");
    put(fs, "top", 96 * KiB, 64 * KiB, 0x33);
    make_on(fs, "other", format, NULL);
    put(fs, "other", 0, 128 * KiB, 0x11);
}

/* The only job, asked anew; a new reference, or NULL: there is none. */
static json_t *the_job(const struct server *s)
{
    json_t *reply = ask(s, "{'execute': 'query-jobs'}");
    json_t *job = json_incref(json_array_get(json_object_get(reply, "return"), 0));
    json_decref(reply);
    return job;
}

/* Wait until the job has ended, well. */
static void end_job(const struct server *s, const char *where)
{
    json_t *job;
    for (bool told = false, gone = false; !gone && (job = the_job(s)); json_decref(job)) {
        const char *now = json_string_value(json_object_get(job, "status"));
        const char *why = json_string_value(json_object_get(job, "error"));
        if (why)
            fail_msg("%s: the job has failed: %s", where, why);
        if (strcmp(now, "ready") == 0 && !told) {
            tell(s, "{'execute': 'job-complete', 'arguments': {'id': 'j'}}");
            told = true;
        }
        gone = strcmp(now, "concluded") == 0;
        sched_yield();
    }
}

static const struct edit {
    const char *name, *format, *line;
    const char *active; /* what the disk goes on with */
    const char *after;  /* files that are there then */
} edits[] = {
    {"stream into mid, qcow2", "qcow2",
     "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'x-image': "
     "'mid', 'auto-dismiss': false}}",
     "top", "base mid other state top "},
    {"rebase of mid, vmdk", "vmdk",
     "{'execute': 'x-drover-rebase', 'arguments': {'job-id': 'j', 'device': 'disk0', 'x-image': "
     "'mid', 'backing-file': 'other', 'auto-dismiss': false}}",
     "top", "base mid other state top "},
    {"stream to a raw disk", "add-cow",
     "{'execute': 'block-stream', 'arguments': {'job-id': 'j', 'device': 'disk0', 'x-retire': "
     "true, 'auto-dismiss': false}}",
     "top.raw", "base base.raw mid mid.raw other other.raw state top.raw "},
    {"mirror", "qcow2",
     "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', 'target': "
     "'moved', 'sync': 'full', 'auto-dismiss': false}}",
     "moved", "base mid moved other state top "},
    {"mirror to two files", "add-cow",
     "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', 'target': "
     "'moved', 'sync': 'full', 'auto-dismiss': false}}",
     "moved", "base base.raw mid mid.raw moved moved.raw other other.raw state top top.raw "},
    {"commit", "vmdk",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'base': 'mid', "
     "'auto-dismiss': false}}",
     "mid", "base mid other state top "},
    {"commit of mid", "qcow2",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'top': 'mid', "
     "'auto-dismiss': false}}",
     "top", "base mid other state top "},
    {"commit of all, qcow2", "qcow2",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', "
     "'auto-dismiss': false}}",
     "base", "base mid other state top "},
    {"commit of all, vmdk", "vmdk",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', "
     "'auto-dismiss': false}}",
     "base", "base mid other state top "},
    {"commit of all that is removed, qcow2", "qcow2",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'x-remove': "
     "true, "
     "'auto-dismiss': false}}",
     "base", "base other state "},
    {"commit of all that is removed, vmdk", "vmdk",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'x-remove': "
     "true, "
     "'auto-dismiss': false}}",
     "base", "base other state "},
    {"commit of the top that is removed, qcow2", "qcow2",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'base': 'mid', "
     "'x-remove': true, "
     "'auto-dismiss': false}}",
     "mid", "base mid other state "},
    {"commit of mid that is removed, vmdk", "vmdk",
     "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'top': 'mid', "
     "'x-remove': true, "
     "'auto-dismiss': false}}",
     "top", "base other state top "},
    {"delete, up", "qcow2",
     "{'execute': 'x-drover-delete', 'arguments': {'job-id': 'j', 'device': 'disk0', 'image': "
     "'mid', 'remove': true, 'auto-dismiss': false}}",
     "top", "base other state top "},
    {"delete, down", "vmdk",
     "{'execute': 'x-drover-delete', 'arguments': {'job-id': 'j', 'device': 'disk0', 'image': "
     "'mid', 'down': true, 'remove': true, 'auto-dismiss': false}}",
     "top", "base other state top "},
    {"snapshot", "vmdk",
     "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', 'snapshot-file': "
     "'new'}}",
     "new", "base mid new other state top "},
    {"snapshot of two files", "add-cow",
     "{'execute': 'blockdev-snapshot-sync', 'arguments': {'device': 'disk0', 'snapshot-file': "
     "'new'}}",
     "new", "base base.raw mid mid.raw new new.raw other other.raw state top top.raw "},
};

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The names in the directory, malloc'ed, each with a blank behind it. */
static char *list(struct dr_fs *fs)
{
    char **names, *all = calloc(1, 4096);
    size_t n;
    ok(dr_ops_list(fs, ".", &names, &n, &err));
    qsort(names, n, sizeof(*names), by_name);
    for (size_t i = 0; i < n; i++) {
        strcat(all, names[i]);
        strcat(all, " ");
    }
    dr_ops_free_names(names, n);
    return all;
}

/* A server begins on what the last one left. */
static void begin_again(const struct edit *e, struct dr_fs *fs, const char *where,
                        const char *before, const uint8_t *want)
{
    uint8_t *have = malloc(SIZE);
    struct server s = serve(fs);
    end_job(&s, where);
    ok(dr_pread(s.disk, have, 0, SIZE, &err));
    for (size_t i = 0; i < SIZE; i++)
        if (have[i] != want[i])
            fail_msg("%s, %s: byte %zu is %02x, not %02x", e->name, where, i, have[i], want[i]);
    bool went_over = strcmp(dr_image_path(s.disk, 0), "top") != 0;
    if (went_over)
        assert_string_equal(dr_image_path(s.disk, 0), e->active);
    stop(&s);
    char *left = list(fs);
    if (strcmp(left, e->after) != 0 && (went_over || strcmp(left, before) != 0))
        fail_msg("%s, %s: there are %s", e->name, where, left);
    free(left);
    free(have);
}

static void a_killed_server_leaves_the_old_chain_or_the_new_one(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof(edits) / sizeof(edits[0]); k++) {
        const struct edit *e = &edits[k];
        struct powerfs *p = powerfs_new();
        uint64_t size;
        family(powerfs_fs(p), e->format);
        uint8_t *want = view(powerfs_fs(p), "top", &size);
        struct server s = serve(powerfs_fs(p));
        char *before = list(powerfs_fs(p));
        powerfs_settle(p);
        tell(&s, e->line);
        end_job(&s, e->name);
        assert_string_equal(dr_image_path(s.disk, 0), e->active);
        stop(&s);
        for (size_t i = 0; i <= powerfs_ops(p); i++) {
            char text[128] = "the end";
            if (i < powerfs_ops(p))
                powerfs_op_text(p, i, text, sizeof(text));
            struct dr_fs *left = powerfs_cut(p, i, POWERFS_ALL, 0);
            begin_again(e, left, text, before, want);
            dr_fs_memory_free(left);
        }
        free(before);
        free(want);
        powerfs_free(p);
    }
}

/* Is the file made, in a private directory, and has it no name yet? */
static bool is_aside(struct dr_fs *fs, const char *name)
{
    char **names;
    size_t n;
    bool aside = false;
    ok(dr_ops_list(fs, ".", &names, &n, &err));
    for (size_t i = 0; i < n; i++) {
        CLEANUP_FREE char *path = dr_path_join(names[i], name);
        aside |= exists(fs, path);
    }
    dr_ops_free_names(names, n);
    return aside && !exists(fs, name);
}

/* The image that was being made may still stand aside when somebody uses its name. */
static void a_file_that_came_after_the_kill_is_not_taken_for_the_target(void **state)
{
    struct powerfs *p = powerfs_new();
    unsigned cuts = 0;
    uint8_t want[SIZE];
    (void)state;
    memset(want, 0x77, sizeof(want));
    family(powerfs_fs(p), "qcow2");
    struct server s = serve(powerfs_fs(p));
    powerfs_settle(p);
    tell(&s, "{'execute': 'drive-mirror', 'arguments': {'job-id': 'j', 'device': 'disk0', "
             "'target': 'moved', 'sync': 'full'}}");
    wait_for(&s, "ready");
    stop(&s);
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        struct dr_fs *left = powerfs_cut(p, i, POWERFS_ALL, 0);
        if (is_aside(left, "moved")) {
            make_on(left, "moved", "qcow2", NULL);
            put(left, "moved", 0, SIZE, 0x77);
            char now[32];
            struct server next = serve(left);
            do {
                status(&next, now, sizeof(now));
                if (strcmp(now, "ready") == 0)
                    fail_msg("what had the target's name was removed");
                sched_yield();
            } while (now[0]);
            stop(&next);
            same_view(left, "moved", want, SIZE);
            cuts++;
        }
        dr_fs_memory_free(left);
    }
    assert_true(cuts > 0);
    powerfs_free(p);
}

/* The image has left the chain, and the server was killed before its file went. */
static void a_job_of_a_server_that_knew_no_lists_is_ended(void **state)
{
    static const char *const jobs[] = {
        "'kind': 0, 'base': 'base'",
        "'kind': 1, 'base': 'base', 'top': 'mid'",
    };
    (void)state;
    for (size_t i = 0; i < sizeof(jobs) / sizeof(jobs[0]); i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_file *file;
        char text[512];
        family(fs, "qcow2");
        struct server s = serve(fs);
        tell(&s, "{'execute': 'x-drover-delete', 'arguments': {'job-id': 'j', 'device': 'disk0', "
                 "'image': 'mid', 'auto-dismiss': false}}");
        end_job(&s, "delete");
        stop(&s);
        assert_true(exists(fs, "mid"));
        int n = snprintf(text, sizeof(text),
                         "{'drover-state': 1, 'disks': [{'name': 'disk0', 'path': 'top', 'format': "
                         "'qcow2', 'first': 'top'}], 'jobs': [{'id': 'j', 'disk': 'disk0', "
                         "'remove': true, 'target': 'mid', 'format': 'qcow2', 'keep-dismiss': "
                         "true, %s}]}",
                         jobs[i]);
        for (int at = 0; at < n; at++)
            text[at] = text[at] == '\'' ? '"' : text[at];
        ok(fs->ops->unlink(fs, "state", &err));
        ok(dr_file_open(fs, "state", DR_FILE_CREATE, &file, &err));
        ok(dr_file_pwrite(file, text, 0, (size_t)n, &err));
        dr_file_unref(file);
        s = serve(fs);
        end_job(&s, jobs[i]);
        assert_int_equal(dr_chain_length(s.disk), 2);
        stop(&s);
        assert_false(exists(fs, "mid"));
        dr_fs_memory_free(fs);
    }
}

/* Wait until the job has ended, with a failure that says why. */
static void fail_job(const struct server *s, const char *why)
{
    json_t *job;
    for (bool gone = false; !gone && (job = the_job(s)); json_decref(job)) {
        const char *error = json_string_value(json_object_get(job, "error"));
        gone = strcmp(json_string_value(json_object_get(job, "status")), "concluded") == 0;
        if (gone && (!error || !strstr(error, why)))
            fail_msg("the job ended with: %s", error ? error : "no failure");
        sched_yield();
    }
}

/* Somebody boots the guest from the overlay that was about to be removed. */
static void an_overlay_that_was_written_to_after_the_kill_stays(void **state)
{
    (void)state;
    struct powerfs *p = powerfs_new();
    unsigned cuts = 0;
    family(powerfs_fs(p), "qcow2");
    struct server s = serve(powerfs_fs(p));
    powerfs_settle(p);
    tell(&s, "{'execute': 'block-commit', 'arguments': {'job-id': 'j', 'device': 'disk0', 'base': "
             "'mid', 'x-remove': true, 'auto-dismiss': false}}");
    end_job(&s, "commit");
    stop(&s);
    for (size_t i = 0; i <= powerfs_ops(p); i++) {
        struct dr_fs *left = powerfs_cut(p, i, POWERFS_ALL, 0);
        char *path = NULL, *format = NULL;
        ok(live_recall_fs(left, "state", "disk0", NULL, &path, &format, &err));
        if (path && strcmp(path, "mid") == 0 && exists(left, "top")) {
            uint64_t size;
            put(left, "top", 0, 64 * KiB, 0x77);
            uint8_t *want = view(left, "top", &size);
            struct server next = serve(left);
            fail_job(&next, "top: was written to since");
            stop(&next);
            same_view(left, "top", want, size);
            free(want);
            cuts++;
        }
        free(path);
        free(format);
        dr_fs_memory_free(left);
    }
    assert_true(cuts > 0);
    powerfs_free(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_file_that_came_after_the_kill_is_not_taken_for_the_target),
        cmocka_unit_test(an_overlay_that_was_written_to_after_the_kill_stays),
        cmocka_unit_test(a_job_of_a_server_that_knew_no_lists_is_ended),
        cmocka_unit_test(a_killed_server_leaves_the_old_chain_or_the_new_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
