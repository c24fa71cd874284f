/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Exports over the control socket, with the nbdkit plugin's table of what clients see, and threads
 * in the place of clients. */
#include <pthread.h>

#include "exports/shown.h"
#include "test-live.h"

static struct dr_fs *fs;
static struct dr_disk *disk;
static struct disk_list list = DISK_LIST_INIT;
static struct talk talk;
static _Atomic bool stopped;
static int next_socket;          /* connections have numbers in the place of sockets */
static _Atomic unsigned hung_up; /* bit n: on the connection n */

static void hang_up(int socket)
{
    hung_up |= socket >= 0 ? 1u << socket : 0u;
}

static int add(void *user, const char *id, const char *name, struct dr_disk *shown, bool writable,
               struct dr_error *e)
{
    return shown_add(user, id, name, shown, writable, e);
}

static int take_away(void *user, const char *id, bool hard, struct dr_error *e)
{
    return shown_remove(user, id, hard, hang_up, e);
}

static void stop(void *user)
{
    (void)user;
    stopped = true;
}

static int start(void *user, const char *path, const char *port, struct dr_error *e)
{
    (void)user, (void)port;
    if (!path || strcmp(path, "here") != 0) {
        e->errnum = EADDRNOTAVAIL;
        snprintf(e->text, sizeof(e->text), "not there");
        return -EADDRNOTAVAIL;
    }
    stopped = false;
    return 0;
}

static const struct dr_live_exports program = {add, take_away, stop, start};

/* A server of disk0, which is shown as disk0, and the image x, which nobody has open. */
static int begin(void **state)
{
    const struct dr_live_options o = {.control = socket_path(), .exports = &program, .user = &list};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    fs = dr_fs_memory_new();
    make(fs, "disk", "qcow2", CROWD_SIZE, NULL);
    make(fs, "x", "qcow2", CROWD_SIZE, NULL);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_live_new(&o, &list.live, &err));
    ok(dr_live_add(list.live, "disk0", disk, &err));
    ok(shown_add(&list, "disk0", "disk0", disk, true, &err));
    ok(dr_live_start(list.live, &err));
    talk = talk_begin(true);
    stopped = false;
    next_socket = 0;
    hung_up = 0;
    return 0;
}

static int end(void **state)
{
    (void)state;
    talk_end(&talk);
    dr_live_free(list.live);
    list.live = NULL;
    shown_close(&list);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
    return 0;
}

static void done(const char *command, const char *arguments)
{
    asked_ok(&talk, request(command, arguments));
}

static void no(const char *command, const char *arguments, const char *why)
{
    asked_refused(&talk, request(command, arguments), "GenericError", why);
}

#define X    "'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'filename': 'x'}"
#define GONE "BLOCK_EXPORT_DELETED "

static void connected(const char *name, struct connection **c)
{
    ok(shown_connect(&list, name, false, next_socket++, c, &err));
}

static void nobody_finds(const char *name)
{
    struct connection *c;
    refused(shown_connect(&list, name, false, -1, &c, &err), ENOENT, "there is no export");
}

/* How many exports there are, and how many of them are shutting down. */
static void exports_are(size_t all, size_t closing)
{
    json_t *reply = ask(&talk, request("query-block-exports", "")), *one;
    size_t i, n = 0;
    json_array_foreach(json_object_get(reply, "return"), i, one)
        n += json_is_true(json_object_get(one, "shutting-down"));
    assert_int_equal(json_array_size(json_object_get(reply, "return")), all);
    assert_int_equal(n, closing);
    json_decref(reply);
}

static void bad_requests_are_refused_in_qemus_words(void **state)
{
    static const struct {
        const char *command, *arguments, *why;
    } bad[] = {
        {"block-export-add", "", "Parameter 'type' is missing"},
        {"block-export-add", "'type': 7", "Invalid parameter type for 'type', expected: string"},
        {"block-export-add", "'type': 'nbd', 'id': 'e'", "Parameter 'node-name' is missing"},
        {"block-export-add", "'type': 'nbd', 'node-name': 'disk0'", "Parameter 'id' is missing"},
        {"block-export-add", "'type': 'vhost', 'id': 'e', 'node-name': 'disk0'",
         "Parameter 'type' does not accept value 'vhost'"},
        {"block-export-add", "'type': 'nbd', 'id': '0e', 'node-name': 'disk0'",
         "Invalid block export id"},
        {"block-export-add", "'type': 'nbd', 'id': 'disk0', 'node-name': 'disk0', 'name': 'n'",
         "Block export id 'disk0' is already in use"},
        {"block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'none'",
         "Cannot find device='' nor node-name='none'"},
        {"block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0'",
         "NBD server already has export named 'disk0'"},
        {"block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'name': ''",
         "is empty"},
        {"block-export-add",
         "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'name': 'n', 'writable': 1",
         "Invalid parameter type for 'writable', expected: boolean"},
        {"block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'bitmaps': []",
         "Parameter 'bitmaps' is unexpected"},
        {"block-export-del", "", "Parameter 'id' is missing"},
        {"block-export-del", "'id': 'none'", "Export 'none' is not found"},
        {"block-export-del", "'id': 'disk0', 'mode': 'nonsense'",
         "Parameter 'mode' does not accept value 'nonsense'"},
        {"nbd-server-start", "", "Parameter 'addr' is missing"},
        {"nbd-server-start", "'addr': 3", "Invalid parameter type for 'addr', expected: object"},
        {"nbd-server-start", "'addr': {}", "Parameter 'addr.type' is missing"},
        {"nbd-server-start", "'addr': {'type': 'x'}", "Parameter 'type' does not accept value 'x'"},
        {"nbd-server-start", "'addr': {'type': 'unix'}", "Parameter 'addr.data' is missing"},
        {"nbd-server-start", "'addr': {'type': 'unix', 'data': {}}",
         "Parameter 'addr.data.path' is missing"},
        {"nbd-server-start", "'addr': {'type': 'inet', 'data': {'host': 'h', 'port': 1}}",
         "Invalid parameter type for 'addr.data.port', expected: string"},
        {"nbd-server-start", "'addr': {'type': 'unix', 'data': {'path': 'here'}}",
         "NBD server already running"},
        {"nbd-server-stop", "'x': 1", "Parameter 'x' is unexpected"},
    };
    char name[5000] = "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'name': '";
    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        no(bad[i].command, bad[i].arguments, bad[i].why);
    memset(name + strlen(name), 'n', 4097);
    strcat(name, "'");
    no("block-export-add", name, "too long");
    exports_are(1, 0);
}

static void an_export_is_added_and_removed(void **state)
{
    struct connection *c;
    (void)state;
    done("blockdev-add", X);
    no("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'x', 'name': 'disk0'",
       "NBD server already has export named 'disk0'");
    nobody_finds("x");
    done("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'x'");
    exports_are(2, 0);
    connected("x", &c);
    assert_non_null(shown_begin(&list, c));
    assert_false(shown_writable(c)); /* not unless it is said */
    shown_end(&list, c);
    no("block-export-del", "'id': 'e'", "export 'e' still in use");
    no("blockdev-del", "'node-name': 'x'", "Node x is in use");
    shown_disconnect(&list, c);
    done("block-export-del", "'id': 'e', 'mode': 'safe'");
    events_are(&talk, GONE);
    nobody_finds("x");
    done("blockdev-del", "'node-name': 'x'");
    exports_are(1, 0);
}

static void a_disk_may_have_other_names(void **state)
{
    struct connection *c;
    (void)state;
    done("block-export-add",
         "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'name': 'two', 'writable': true");
    done("block-export-del", "'id': 'disk0'");
    events_are(&talk, GONE);
    nobody_finds("disk0");
    connected("two", &c);
    assert_ptr_equal(shown_begin(&list, c), disk);
    assert_true(shown_writable(c));
    shown_end(&list, c);
    shown_disconnect(&list, c);
    connected("", &c); /* the first one that is left */
    shown_disconnect(&list, c);
    done("block-export-add", "'type': 'nbd', 'id': 'disk0', 'node-name': 'disk0'");
    connected("disk0", &c);
    shown_disconnect(&list, c);
}

static void a_removed_export_waits_for_its_requests_only(void **state)
{
    struct connection *c, *idle, *other;
    (void)state;
    done("blockdev-add", X);
    done("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'x'");
    connected("disk0", &other);
    connected("x", &c);
    connected("x", &idle);
    assert_non_null(shown_begin(&list, c));
    no("block-export-del", "'id': 'e'", "export 'e' still in use");
    assert_int_equal(hung_up, 0);
    done("block-export-del", "'id': 'e', 'mode': 'hard'");
    assert_int_equal(hung_up, 6); /* not the other one's */
    assert_int_equal(shown_disconnect(&list, other), 0);
    exports_are(2, 1);
    nobody_finds("x");
    assert_null(shown_begin(&list, idle));
    no("block-export-del", "'id': 'e', 'mode': 'hard'", "Export 'e' is already shutting down");
    no("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'x'", "already in use");
    no("blockdev-del", "'node-name': 'x'", "Node x is in use");
    done("block-export-add", "'type': 'nbd', 'id': 'f', 'node-name': 'x'"); /* the name is free */
    shown_end(&list, c);
    events_are(&talk, GONE);
    exports_are(2, 0);
    assert_null(shown_begin(&list, c));
    shown_disconnect(&list, c);
    done("block-export-del", "'id': 'f'");
    events_are(&talk, GONE);
    done("blockdev-del", "'node-name': 'x'");
    assert_null(shown_begin(&list, idle)); /* its disk is closed */
    shown_disconnect(&list, idle);
}

static void a_server_that_is_stopped_has_no_exports(void **state)
{
    struct connection *c;
    (void)state;
    done("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0', 'name': 'two'");
    connected("two", &c);
    done("nbd-server-stop", "");
    events_are(&talk, GONE GONE);
    assert_true(stopped);
    assert_null(shown_begin(&list, c));
    shown_disconnect(&list, c);
    exports_are(0, 0);
    no("nbd-server-stop", "", "NBD server not running");
    no("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0'",
       "NBD server not running");
    no("nbd-server-start", "'addr': {'type': 'inet', 'data': {'host': 'h', 'port': '1'}}",
       "not there");
    done("nbd-server-start", "'addr': {'type': 'unix', 'data': {'path': 'here'}}");
    assert_false(stopped);
    done("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'disk0'");
    connected("disk0", &c);
    shown_disconnect(&list, c);
}

/* ------------------------------------------------------------------ requests beside removals */

enum { GUESTS = 3, ROUNDS = 20, ENOUGH = 20 };

struct guests {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    unsigned round, requests, resting;
    bool end;
};

static void note(struct guests *g, unsigned *count)
{
    pthread_mutex_lock(&g->lock);
    ++*count;
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->lock);
}

/* Write and read as long as the export is there. */
static void use(struct guests *g)
{
    struct connection *c;
    struct dr_disk *x;
    struct dr_error why = DR_ERROR_INIT;
    char bytes[4096] = {1};
    if (shown_connect(&list, "x", false, -1, &c, &why) < 0)
        return; /* it came too late */
    while ((x = shown_begin(&list, c))) {
        ok(dr_pwrite(x, bytes, 0, sizeof(bytes), 0, &why));
        ok(dr_pread(x, bytes, 0, sizeof(bytes), &why));
        shown_end(&list, c);
        note(g, &g->requests);
    }
    shown_disconnect(&list, c);
}

static void *guest(void *user)
{
    struct guests *g = user;
    for (unsigned round = 0;; round++) {
        pthread_mutex_lock(&g->lock);
        while (g->round <= round && !g->end)
            pthread_cond_wait(&g->changed, &g->lock);
        bool end = g->round <= round;
        pthread_mutex_unlock(&g->lock);
        if (end)
            return NULL;
        use(g);
        note(g, &g->resting);
    }
}

static void until(struct guests *g, const unsigned *count, unsigned n)
{
    pthread_mutex_lock(&g->lock);
    while (*count < n)
        pthread_cond_wait(&g->changed, &g->lock);
    pthread_mutex_unlock(&g->lock);
}

/* Under the thread sanitizer, and with the address sanitizer: no request meets a closed disk. */
static void a_disk_is_closed_beside_clients_that_use_it(void **state)
{
    struct guests g = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    pthread_t threads[GUESTS];
    (void)state;
    for (size_t i = 0; i < GUESTS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, guest, &g), 0);
    for (unsigned round = 1; round <= ROUNDS; round++) {
        unsigned before = g.requests; /* all rest */
        done("blockdev-add", X);
        done("block-export-add", "'type': 'nbd', 'id': 'e', 'node-name': 'x', 'writable': true");
        note(&g, &g.round);
        until(&g, &g.requests, before + ENOUGH);
        done("block-export-del", "'id': 'e', 'mode': 'hard'");
        events_are(&talk, GONE);
        done("blockdev-del", "'node-name': 'x'");
        until(&g, &g.resting, round * GUESTS);
    }
    pthread_mutex_lock(&g.lock);
    g.end = true;
    pthread_cond_broadcast(&g.changed);
    pthread_mutex_unlock(&g.lock);
    for (size_t i = 0; i < GUESTS; i++)
        pthread_join(threads[i], NULL);
}

#define live_test(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(bad_requests_are_refused_in_qemus_words),
        live_test(an_export_is_added_and_removed),
        live_test(a_disk_may_have_other_names),
        live_test(a_removed_export_waits_for_its_requests_only),
        live_test(a_server_that_is_stopped_has_no_exports),
        live_test(a_disk_is_closed_beside_clients_that_use_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
