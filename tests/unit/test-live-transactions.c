/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Transactions of bitmaps and backups: all at one instant, or nothing of it. */
#include "live/live.h"
#include "test-live.h"

#define SIZE  (2u * MiB)
#define DISKS 2

static struct dr_fs *fs;
static struct dr_disk *disks[DISKS];
static struct dr_live *live;
static struct talk talk;

static void create(const char *format, const char *name)
{
    const struct dr_create_options c = {.format = format, .size = SIZE, .has_size = true};
    ok(dr_create_fs(fs, name, &c, &err));
}

static struct dr_disk *open_disk(const char *format, const char *name)
{
    const struct dr_open_options rw = {.format = format, .flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, name, &rw, &disk, &err));
    return disk;
}

static void done(const char *command, const char *arguments)
{
    asked_ok(&talk, request(command, arguments));
}

/* disk0 and disk1, and the nodes t0 and t1 to back them up to. */
static void begin(const char *format)
{
    const struct dr_live_options o = {.control = socket_path()};
    char name[16], node[128];
    fs = dr_fs_memory_new();
    ok(dr_live_new(&o, &live, &err));
    for (int i = 0; i < DISKS; i++) {
        snprintf(name, sizeof(name), "disk%d", i);
        create(format, name);
        disks[i] = open_disk(format, name);
        ok(dr_live_add(live, name, disks[i], &err));
    }
    ok(dr_live_start(live, &err));
    talk = talk_begin(true);
    for (int i = 0; i < DISKS; i++) {
        snprintf(name, sizeof(name), "t%d", i);
        create("qcow2", name);
        snprintf(node, sizeof(node),
                 "'driver': 'qcow2', 'node-name': '%s', 'file': {'driver': 'file', "
                 "'filename': '%s'}",
                 name, name);
        done("blockdev-add", node);
    }
}

static void end(void)
{
    talk_end(&talk);
    dr_live_free(live);
    for (int i = 0; i < DISKS; i++)
        ok(dr_close(disks[i], &err));
    dr_fs_memory_free(fs);
}

static const char *const formats[] = {"raw", "vmdk", "add-cow", "qcow2"};

static void all_kinds(void (*test)(bool persistent))
{
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++)
        for (int persistent = 0; persistent < 2; persistent++) {
            begin(formats[i]);
            test(persistent);
            end();
        }
}

static void write_disk(int disk, uint64_t off)
{
    uint8_t buf[512] = {0x5a};
    ok(dr_pwrite(disks[disk], buf, off, sizeof(buf), 0, &err));
}

/* What query-block shows of a bitmap of disk0: its count, with "!" when it notes nothing; or "". */
static const char *shown(const char *name)
{
    static char text[64];
    json_t *reply = ask(&talk, request("query-block", "")), *one;
    json_t *device = json_array_get(json_object_get(reply, "return"), 0);
    size_t i;
    text[0] = 0;
    json_array_foreach(json_object_get(json_object_get(device, "inserted"), "dirty-bitmaps"), i,
                       one)
    {
        if (strcmp(json_string_value(json_object_get(one, "name")), name) == 0)
            snprintf(text, sizeof(text), "%lldK%s",
                     (long long)json_integer_value(json_object_get(one, "count")) / 1024,
                     json_is_true(json_object_get(one, "recording")) ? "" : "!");
    }
    json_decref(reply);
    return text;
}

static void is(const char *name, const char *text)
{
    assert_string_equal(shown(name), text);
}

static void add(const char *name, bool persistent, const char *more)
{
    char args[200];
    snprintf(args, sizeof(args), "'node': 'disk0', 'name': '%s', 'persistent': %s%s", name,
             persistent ? "true" : "false", more);
    done("block-dirty-bitmap-add", args);
}

#define BITMAP(verb, name) \
    "{'type': 'block-dirty-bitmap-" verb "', 'data': {'node': 'disk0', 'name': '" name "'}}"
#define MERGE(target, source)                                                           \
    "{'type': 'block-dirty-bitmap-merge', 'data': {'node': 'disk0', 'target': '" target \
    "', 'bitmaps': ['" source "']}}"
#define BACKUP(n, more)                                                          \
    "{'type': 'blockdev-backup', 'data': {'job-id': 'j" n "', 'device': 'disk" n \
    "', 'target': 't" n "', 'sync': " more "}}"

static void forget_events(void)
{
    free(talk.events);
    talk.events = NULL;
}

/* So many jobs are gone since forget_events(), also those that were before the last reply. */
static void wait_for_null(int jobs)
{
    for (const char *at = talk.events; at && (at = strstr(at, ":null ")); at++)
        jobs--;
    while (jobs > 0) {
        json_t *message = hear_one(&talk);
        const char *status =
            json_string_value(json_object_get(json_object_get(message, "data"), "status"));
        jobs -= status && strcmp(status, "null") == 0;
        json_decref(message);
    }
}

/* ------------------------------------------------------------------ nothing of it */

static int nothing(void *user, struct dr_chain *chain, uint64_t off, uint64_t len,
                   struct dr_error *why)
{
    (void)user, (void)chain, (void)off, (void)len, (void)why;
    return 0;
}

#define CHANGES                                                                           \
    "'actions': [" BITMAP("clear", "b") ", " MERGE("b", "c") ", " BITMAP(                 \
        "disable",                                                                        \
        "b") ", " BITMAP("enable",                                                        \
                         "off") ", " BITMAP("add", "n") ", " BITMAP("remove",             \
                                                                    "c") ", " BACKUP("0", \
                                                                                     "'full'") "]"

/* The backup finds at its instant that the disk has no place for its hook. */
static void fail_at_the_instant(bool persistent)
{
    const struct dr_hook hook = {.before = nothing, .user = &talk};
    add("b", persistent, "");
    add("off", persistent, ", 'disabled': true");
    write_disk(0, 0);
    add("c", persistent, "");
    write_disk(0, MiB);
    while (dr_disk_hook(disks[0], &hook, NULL) == 0)
        ;
    asked_refused(&talk, request("transaction", CHANGES), "GenericError", "watch its changes");
    is("b", "128K");
    is("c", "64K");
    is("off", "0K!");
    is("n", "");
    write_disk(0, MiB + 512 * 1024); /* they note as before */
    is("b", "192K");
    is("c", "128K");
    is("off", "0K!");
    dr_disk_unhook(disks[0], &talk);
    forget_events();
    done("transaction", CHANGES);
    wait_for_null(1);
    is("b", "128K!");
    is("c", "");
    is("off", "0K");
    is("n", "0K");
}

static void what_fails_at_the_instant_undoes_what_was_done(void **state)
{
    (void)state;
    all_kinds(fail_at_the_instant);
}

/* ------------------------------------------------------------------ one instant */

/* A guest that writes the same number to both disks, first to disk0, as a journal does. */
struct guest {
    pthread_t thread;
    _Atomic bool stop;
    _Atomic uint64_t number;
};

static void *write_on(void *user)
{
    struct guest *g = user;
    for (uint64_t n = 1; !atomic_load(&g->stop); n++) {
        for (int i = 0; i < DISKS; i++)
            if (dr_pwrite(disks[i], &n, n % 4 * 512 * 1024, sizeof(n), 0, NULL) < 0)
                return "a write has failed";
        atomic_store(&g->number, n);
    }
    return NULL;
}

static uint64_t newest(struct dr_disk *disk)
{
    uint64_t n, most = 0;
    for (uint64_t i = 0; i < 4; i++) {
        ok(dr_pread(disk, &n, i * 512 * 1024, sizeof(n), &err));
        most = n > most ? n : most;
    }
    return most;
}

static uint64_t newest_of(const char *name)
{
    struct dr_disk *disk = open_disk("qcow2", name);
    uint64_t n = newest(disk);
    ok(dr_close(disk, &err));
    return n;
}

static void back_up_both(bool persistent)
{
    struct guest g = {.stop = false};
    void *trouble;
    add("b", persistent, "");
    assert_int_equal(pthread_create(&g.thread, NULL, write_on, &g), 0);
    for (int i = 0; i < 3; i++) {
        for (uint64_t from = atomic_load(&g.number); atomic_load(&g.number) < from + 8;)
            sched_yield();
        forget_events();
        done("transaction", i == 0 ? "'actions': [" BITMAP("clear", "b") ", " BACKUP(
                                         "1", "'full'") ", " BACKUP("0", "'full'") "]"
                                   : "'actions': [" BACKUP("1", "'full'") ", " BACKUP(
                                         "0", "'incremental', 'bitmap': 'b'") "]");
        wait_for_null(2);
        uint64_t first = newest_of("t0"), second = newest_of("t1");
        if (first != second && first != second + 1)
            fail_msg("disk0 is at %llu and disk1 at %llu", (unsigned long long)first,
                     (unsigned long long)second);
    }
    atomic_store(&g.stop, true);
    pthread_join(g.thread, &trouble);
    assert_null(trouble);
}

static void backups_and_bitmaps_of_two_disks_have_one_instant(void **state)
{
    (void)state;
    all_kinds(back_up_both);
}

/* ------------------------------------------------------------------ together */

#define NEW(n, more)                                                                              \
    "{'type': 'drive-backup', 'data': {'job-id': 'j" n "', 'device': 'disk" n "', 'target': 'n" n \
    "', 'format': 'qcow2', 'auto-finalize': false, 'sync': " more "}}"

/* Until so many events since forget_events() have the text. */
static void hear_until(const char *text, int times)
{
    int n = 0;
    while (n < times) {
        n = 0;
        for (const char *at = talk.events; at && (at = strstr(at, text)); at++)
            n++;
        json_t *message = n < times ? hear_one(&talk) : NULL;
        if (message)
            note_event(&talk, message);
        json_decref(message);
    }
}

/* Both are complete and durable, and then the target of one of them cannot get its name. */
static void fail_at_the_name(bool persistent)
{
    add("b", persistent, "");
    write_disk(0, MiB);
    forget_events();
    done("transaction", "'actions': [" NEW("0", "'incremental', 'bitmap': 'b'") ", " NEW(
                            "1", "'full'") "], 'properties': {'completion-mode': 'grouped'}");
    hear_until(":pending ", 2);
    create("raw", "n1"); /* somebody else's */
    done("job-finalize", "'id': 'j0'");
    hear_until(":null ", 2);
    assert_non_null(strstr(talk.events, "BLOCK_JOB_CANCELLED "));
    assert_non_null(strstr(talk.events, "BLOCK_JOB_COMPLETED! "));
    is("b", "64K");
    assert_false(dr_fs_exists(fs, "n0"));
    struct dr_disk *theirs = open_disk("raw", "n1");
    assert_int_equal(newest(theirs), 0);
    ok(dr_close(theirs, &err));
}

static void a_backup_that_fails_at_its_name_fails_its_group(void **state)
{
    (void)state;
    for (int i = 0; i < 8; i++) { /* either job may come to its name first */
        begin("qcow2");
        fail_at_the_name(i % 2);
        end();
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_fails_at_the_instant_undoes_what_was_done),
        cmocka_unit_test(backups_and_bitmaps_of_two_disks_have_one_instant),
        cmocka_unit_test(a_backup_that_fails_at_its_name_fails_its_group),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
