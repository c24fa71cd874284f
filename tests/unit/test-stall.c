/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Requests of a guest that cannot be done now wait, in order, and are made again. */
#include "faultfs.h"
#include "live/live.h"
#include "test-live.h"

/* ------------------------------------------------------------------ requests that fail when told
 * to */

struct rig {
    enum dr_stall_policy policy;
    struct dr_stall *stall;
    _Atomic int error; /* positive errno with which requests fail; 0 = they succeed */
    _Atomic unsigned tries, waits;
    pthread_mutex_t lock;
    char done[16]; /* names of the requests that have succeeded, in order */
};

struct client {
    struct rig *rig;
    char name;
    int result;
    struct dr_error err;
    pthread_t thread;
};

static int make_request(void *user, struct dr_error *err)
{
    struct client *c = user;
    int error = atomic_load(&c->rig->error);
    if (error == 0) {
        DR_LOCK_SCOPE(&c->rig->lock);
        c->rig->done[strlen(c->rig->done)] = c->name;
    }
    atomic_fetch_add(&c->rig->tries, 1);
    return error ? dr_fail(err, error, "request %c fails", c->name) : 0;
}

static void on_waits(void *user, const char *text)
{
    struct rig *rig = user;
    assert_non_null(strstr(text, "fails"));
    atomic_fetch_add(&rig->waits, 1);
}

static struct rig rig_up(enum dr_stall_policy policy, int error)
{
    return (struct rig){.lock = PTHREAD_MUTEX_INITIALIZER, .error = error, .policy = policy};
}

/* The rig has its place. */
static void rig_begin(struct rig *rig)
{
    const struct dr_stall_options o = {.policy = rig->policy, .waits = on_waits, .user = rig};
    ok(dr_stall_new(&o, &rig->stall, &err));
}

static void *run(void *user)
{
    struct client *c = user;
    c->result = dr_stall_run(c->rig->stall, make_request, c, &c->err);
    return NULL;
}

static void begin(struct client *c, struct rig *rig, char name)
{
    *c = (struct client){.rig = rig, .name = name};
    assert_int_equal(pthread_create(&c->thread, NULL, run, c), 0);
}

static int end(struct client *c)
{
    pthread_join(c->thread, NULL);
    return c->result;
}

static void await(_Atomic unsigned *counter, unsigned least)
{
    while (atomic_load(counter) < least)
        sched_yield();
}

static void a_request_waits_until_it_is_let_go_on(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct rig rig = rig_up(DR_STALL_ENOSPC, i ? EDQUOT : ENOSPC);
        struct client a;
        rig_begin(&rig);
        begin(&a, &rig, 'a');
        await(&rig.waits, 1);
        unsigned tries = atomic_load(&rig.tries);
        dr_stall_resume(rig.stall); /* in vain */
        await(&rig.waits, 2);
        assert_true(atomic_load(&rig.tries) > tries);
        atomic_store(&rig.error, 0);
        dr_stall_resume(rig.stall);
        assert_int_equal(end(&a), 0);
        assert_string_equal(rig.done, "a");
        dr_stall_free(rig.stall);
    }
}

static void a_request_goes_on_when_space_appears(void **state)
{
    struct rig rig = rig_up(DR_STALL_ENOSPC, ENOSPC);
    struct client a;
    (void)state;
    rig_begin(&rig);
    begin(&a, &rig, 'a');
    await(&rig.waits, 1);
    atomic_store(&rig.error, 0); /* and nobody says so */
    assert_int_equal(end(&a), 0);
    assert_int_equal(rig.waits, 1);
    dr_stall_free(rig.stall);
}

/* What an old client has written must not come to lie over what its successor writes. */
static void later_requests_wait_behind_it_and_keep_their_order(void **state)
{
    struct rig rig = rig_up(DR_STALL_ENOSPC, ENOSPC);
    struct client all[5];
    (void)state;
    rig_begin(&rig);
    begin(&all[0], &rig, 'a');
    await(&rig.waits, 1);
    for (unsigned i = 1; i < 5; i++) {
        begin(&all[i], &rig, (char)('a' + i));
        while (dr_stall_waiting(rig.stall) < i + 1)
            sched_yield();
    }
    assert_int_equal(rig.waits, 1);
    assert_string_equal(rig.done, "");
    atomic_store(&rig.error, 0);
    dr_stall_resume(rig.stall);
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(end(&all[i]), 0);
    assert_string_equal(rig.done, "abcde");
    dr_stall_free(rig.stall);
}

static void policies_say_what_waits(void **state)
{
    static const struct {
        enum dr_stall_policy policy;
        int error;
    } cases[] = {{DR_STALL_ENOSPC, EIO},
                 {DR_STALL_REPORT, ENOSPC},
                 {DR_STALL_STOP, ENOTSUP},
                 {DR_STALL_STOP, EINVAL},
                 {DR_STALL_STOP, EROFS}};
    (void)state;
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct rig rig = rig_up(cases[i].policy, cases[i].error);
        struct client a = {.rig = &rig, .name = 'a'};
        rig_begin(&rig);
        refused(dr_stall_run(rig.stall, make_request, &a, &err), cases[i].error, "request a fails");
        assert_int_equal(rig.tries, 1);
        assert_int_equal(rig.waits, 0);
        dr_stall_free(rig.stall);
    }
    struct rig rig = rig_up(DR_STALL_STOP, EIO);
    struct client a;
    rig_begin(&rig);
    begin(&a, &rig, 'a');
    await(&rig.waits, 1);
    atomic_store(&rig.error, 0);
    dr_stall_resume(rig.stall);
    assert_int_equal(end(&a), 0);
    dr_stall_free(rig.stall);
}

static void a_failure_that_does_not_wait_ends_only_its_own_request(void **state)
{
    struct rig rig = rig_up(DR_STALL_ENOSPC, ENOSPC);
    struct client a;
    (void)state;
    rig_begin(&rig);
    begin(&a, &rig, 'a');
    await(&rig.waits, 1);
    atomic_store(&rig.error, EIO);
    dr_stall_resume(rig.stall);
    assert_int_equal(end(&a), -EIO);
    atomic_store(&rig.error, 0);
    begin(&a, &rig, 'b');
    assert_int_equal(end(&a), 0);
    dr_stall_free(rig.stall);
}

static void at_the_end_nothing_waits(void **state)
{
    struct rig rig = rig_up(DR_STALL_ENOSPC, ENOSPC);
    struct client all[3];
    (void)state;
    rig_begin(&rig);
    for (unsigned i = 0; i < 3; i++)
        begin(&all[i], &rig, (char)('a' + i));
    while (dr_stall_waiting(rig.stall) < 3)
        sched_yield();
    dr_stall_end(rig.stall);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(end(&all[i]), -ESHUTDOWN);
        assert_non_null(strstr(all[i].err.text, "the server ends"));
    }
    struct client late = {.rig = &rig, .name = 'l'};
    refused(dr_stall_run(rig.stall, make_request, &late, &err), ESHUTDOWN, "the server ends");
    dr_stall_free(rig.stall);
}

/* ------------------------------------------------------------------ on a disk, over the control
 * socket */

struct full {
    struct dr_disk *disk;
    struct dr_stall *stall;
    _Atomic bool full;
    int result;
    struct dr_error err;
};

static int no_space_for_top(void *user, const struct faultfs_io *io)
{
    const struct full *w = user;
    return io->kind == FAULTFS_WRITE && strcmp(io->path, "top") == 0 && atomic_load(&w->full)
               ? -ENOSPC
               : 0;
}

static int write_text(void *user, struct dr_error *err)
{
    const struct full *w = user;
    return dr_pwrite(w->disk, "written at last", MiB, 16, 0, err);
}

static void *write_as_guest(void *user)
{
    struct full *w = user;
    w->result = dr_stall_run(w->stall, write_text, w, &w->err);
    return NULL;
}

static void io_status_is(struct talk *t, const char *wanted)
{
    json_t *reply = ask(t, "{\"execute\": \"query-block\"}");
    json_t *disk = json_array_get(json_object_get(reply, "return"), 0);
    assert_string_equal(json_string_value(json_object_get(disk, "io-status")), wanted);
    json_decref(reply);
}

static void hear_failure(struct talk *t)
{
    json_t *event = hear_one(t), *data = json_object_get(event, "data");
    assert_string_equal(json_string_value(json_object_get(event, "event")), "BLOCK_IO_ERROR");
    assert_string_equal(json_string_value(json_object_get(data, "device")), "disk0");
    assert_string_equal(json_string_value(json_object_get(data, "operation")), "write");
    assert_string_equal(json_string_value(json_object_get(data, "action")), "stop");
    assert_true(json_is_true(json_object_get(data, "nospace")));
    assert_non_null(strstr(json_string_value(json_object_get(data, "reason")), "No space left"));
    json_decref(event);
}

/* The reply and the event of the next failure come in any order. */
static void go_on_in_vain(struct talk *t)
{
    bool failed = false, replied = false;
    say_line(t, "{\"execute\": \"cont\"}");
    while (!failed || !replied) {
        json_t *message = hear_one(t);
        assert_non_null(message);
        failed |= json_object_get(message, "event") != NULL;
        replied |= json_object_get(message, "return") != NULL;
        json_decref(message);
    }
}

/* A snapshot into another file system is the cure, and must not wait for what waits. */
static void a_snapshot_is_made_while_a_write_waits(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct full w = {.full = true};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_live_options o = {.control = socket_path()};
    const struct dr_stall_options enospc = {.policy = DR_STALL_ENOSPC};
    struct dr_create_options raw = {.format = "raw", .size = 4 * MiB, .has_size = true};
    struct dr_live *live;
    pthread_t guest;
    uint64_t size;
    ok(dr_create_fs(*state, "top", &raw, &err));
    faultfs_observe(f, no_space_for_top, &w);
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &w.disk, &err));
    ok(dr_stall_new(&enospc, &w.stall, &err));
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_add(live, "disk0", w.disk, &err));
    refused(dr_live_add_stall(live, "disk1", w.stall, &err), ENOENT, "disk1");
    ok(dr_live_add_stall(live, "disk0", w.stall, &err));
    ok(dr_live_start(live, &err));
    struct talk t = talk_begin(true);
    io_status_is(&t, "ok");
    assert_int_equal(pthread_create(&guest, NULL, write_as_guest, &w), 0);
    hear_failure(&t);
    io_status_is(&t, "nospace");
    go_on_in_vain(&t);
    asked_ok(&t, "{\"execute\": \"blockdev-snapshot-sync\", \"arguments\": {\"device\": \"disk0\", "
                 "\"snapshot-file\": \"new\", \"format\": \"qcow2\"}}");
    asked_ok(&t, "{\"execute\": \"cont\"}");
    pthread_join(guest, NULL);
    assert_int_equal(w.result, 0);
    io_status_is(&t, "ok");
    talk_end(&t);
    dr_live_free(live);
    dr_stall_free(w.stall);
    ok(dr_close(w.disk, &err));
    faultfs_free(f);
    uint8_t *all = view(*state, "new", &size);
    assert_string_equal((char *)all + MiB, "written at last");
    free(all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_request_waits_until_it_is_let_go_on),
        cmocka_unit_test(a_request_goes_on_when_space_appears),
        cmocka_unit_test(later_requests_wait_behind_it_and_keep_their_order),
        cmocka_unit_test(policies_say_what_waits),
        cmocka_unit_test(a_failure_that_does_not_wait_ends_only_its_own_request),
        cmocka_unit_test(at_the_end_nothing_waits),
        ops_test(a_snapshot_is_made_while_a_write_waits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
