/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The control socket: lines, replies, and whom it serves. */
#include "live/live.h"
#include "test-live.h"

static struct dr_fs *fs;
static struct dr_disk *disk;
static struct dr_live *live;

static int begin(void **state)
{
    const struct dr_live_options o = {.control = socket_path()};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    fs = dr_fs_memory_new();
    make(fs, "disk.vmdk", "vmdk", CROWD_SIZE, NULL);
    put(fs, "disk.vmdk", 0, MiB, 0x11);
    ok(dr_open_fs(fs, "disk.vmdk", &rw, &disk, &err));
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_add(live, "disk0", disk, &err));
    ok(dr_live_start(live, &err));
    return 0;
}

static int end(void **state)
{
    (void)state;
    dr_live_free(live);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
    assert_int_equal(access(socket_path(), F_OK), -1);
    return 0;
}

static void a_client_negotiates_first(void **state)
{
    struct talk t = talk_begin(false);
    (void)state;
    asked_refused(&t, "{\"execute\": \"query-jobs\"}", "CommandNotFound", "qmp_capabilities");
    asked_refused(&t, "{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}",
                  "GenericError", "not available");
    asked_ok(&t, "{\"execute\": \"qmp_capabilities\"}");
    asked_refused(&t, "{\"execute\": \"qmp_capabilities\"}", "CommandNotFound", "already complete");
    asked_ok(&t, "{\"execute\": \"query-jobs\"}");
    talk_end(&t);
}

static void bad_lines_get_an_error_each(void **state)
{
    static const struct {
        const char *line, *class, *word;
    } bad[] = {
        {"{", "GenericError", "JSON parse error"},
        {"\x01\xff", "GenericError", "JSON parse error"},
        {"{\"execute\": \"quit\", \"execute\": \"quit\"}", "GenericError", "JSON parse error"},
        {"[]", "GenericError", "must be a JSON object"},
        {"7", "GenericError", "must be a JSON object"},
        {"{}", "GenericError", "lacks member 'execute'"},
        {"{\"execute\": 3}", "GenericError", "must be a string"},
        {"{\"execute\": \"quit\", \"x\": 3}", "GenericError", "'x' is unexpected"},
        {"{\"exec-oob\": \"quit\"}", "GenericError", "out-of-band"},
        {"{\"execute\": \"quit\", \"arguments\": []}", "GenericError", "must be an object"},
        {"{\"execute\": \"quit\"}", "GenericError", "not ended over"},
        {"{\"execute\": \"drive-nothing\"}", "CommandNotFound", "has not been found"},
        {"{\"execute\": \"block_resize\"}", "GenericError", "'size' is missing"},
        {"{\"execute\": \"block_resize\", \"arguments\": {\"size\": \"1G\"}}", "GenericError",
         "Invalid parameter type"},
        {"{\"execute\": \"block_resize\", \"arguments\": {\"size\": -1}}", "GenericError",
         "Parameter 'size' expects a non-negative value"},
        {"{\"execute\": \"change-backing-file\", \"arguments\": {\"device\": \"disk0\"}}",
         "GenericError", "Parameter 'image-node-name' is missing"},
        {"{\"execute\": \"block_resize\", \"arguments\": {\"size\": 0, \"sise\": 1}}",
         "GenericError", "'sise' is unexpected"},
        {"{\"execute\": \"block_resize\", \"arguments\": {\"size\": 0, \"device\": \"a\\u0000\"}}",
         "GenericError", "JSON parse error"},
        {"{\"execute\": \"block_resize\", \"arguments\": {\"size\": 512}}", "GenericError",
         "Cannot find device"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [3]}}", "GenericError",
         "Invalid parameter type for 'actions[0]', expected: object"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": 3, \"data\": "
         "{}}]}}",
         "GenericError", "Invalid parameter type for 'actions[0].type', expected: string"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": \"abort\"}]}}",
         "GenericError", "'actions[0].data' is missing"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": "
         "\"blockdev-snapshot-sync\", \"data\": {}}]}}",
         "GenericError", "'actions[0].data.snapshot-file' is missing"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": \"abort\", "
         "\"data\": {}}]}}",
         "GenericError", "Transaction aborted using Abort action"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": "
         "\"drive-backup\", "
         "\"data\": {}}]}}",
         "GenericError", "'actions[0].data.device' is missing"},
        {"{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": "
         "\"blockdev-snapshot-internal-sync\", \"data\": {}}]}}",
         "GenericError", "no snapshots inside images here"},
        {"{\"execute\": \"block-job-cancel\", \"arguments\": {\"device\": \"j\"}}",
         "DeviceNotActive", "Block job 'j' not found"},
        {"{\"execute\": \"job-cancel\", \"arguments\": {\"id\": \"j\"}}", "GenericError",
         "Job not found"},
        {"{\"execute\": \"block-commit\", \"arguments\": {\"device\": \"no\"}}", "DeviceNotFound",
         "Device 'no' not found"},
        {"{\"execute\": \"block-stream\", \"arguments\": {\"device\": \"disk0\", \"base\": \"x\"}}",
         "GenericError", "Can't find 'x' in the backing chain"},
        {"{\"execute\": \"block-stream\", \"arguments\": {\"device\": \"disk0\", \"on-error\": "
         "\"panic\"}}",
         "GenericError", "does not accept value 'panic'"},
    };
    struct talk t = talk_begin(true);
    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        asked_refused(&t, bad[i].line, bad[i].class, bad[i].word);
    asked_ok(&t, "{\"execute\": \"query-jobs\"}");
    talk_end(&t);
}

static void a_reply_has_the_requests_id(void **state)
{
    struct talk t = talk_begin(true);
    (void)state;
    json_t *reply = ask(&t, "{\"execute\": \"query-jobs\", \"id\": {\"n\": [1]}}");
    json_t *want = json_pack("{s:[], s:{s:[i]}}", "return", "id", "n", 1);
    assert_true(json_equal(reply, want));
    json_decref(reply);
    json_decref(want);
    talk_end(&t);
}

static void a_line_without_an_end_is_hung_up_on(void **state)
{
    struct talk t = talk_begin(true), other = talk_begin(true);
    char some[65536];
    size_t sent = 0;
    (void)state;
    memset(some, '[', sizeof(some));
    while (sent < (4u << 20)) {
        ssize_t n = send(t.fd, some, sizeof(some), MSG_NOSIGNAL);
        if (n < 0)
            break;
        sent += (size_t)n;
    }
    assert_true(sent < (4u << 20));
    asked_ok(&other, "{\"execute\": \"query-jobs\"}");
    talk_end(&t);
    talk_end(&other);
}

static void there_are_not_more_clients_than_it_takes(void **state)
{
    struct talk all[16];
    (void)state;
    for (unsigned i = 0; i < 16; i++)
        all[i] = talk_begin(i % 2);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path());
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    char byte;
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(read(fd, &byte, 1), 0);
    close(fd);
    for (unsigned i = 0; i < 16; i++)
        talk_end(&all[i]);
}

static void the_socket_is_the_owners_alone(void **state)
{
    struct stat st;
    (void)state;
    assert_int_equal(stat(socket_path(), &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
}

static void a_socket_in_use_is_left_alone_and_a_stale_one_gives_way(void **state)
{
    const struct dr_live_options o = {.control = socket_path()};
    struct dr_live *second;
    (void)state;
    ok(dr_live_new(&o, &second, &err));
    refused(dr_live_start(second, &err), EADDRINUSE, "another server listens");
    dr_live_free(second);
    struct talk t = talk_begin(true); /* the first one is still there */
    talk_end(&t);
    dr_live_free(live);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path());
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    close(fd);
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_start(live, &err));
    t = talk_begin(true);
    talk_end(&t);
}

static void every_command_that_is_listed_is_there(void **state)
{
    struct talk t = talk_begin(true);
    (void)state;
    json_t *reply = ask(&t, "{\"execute\": \"query-commands\"}"), *one;
    json_t *list = json_object_get(reply, "return");
    size_t i;
    assert_true(json_array_size(list) > 20);
    json_array_foreach(list, i, one)
    {
        char line[200];
        snprintf(line, sizeof(line), "{\"execute\": \"%s\", \"arguments\": {\"no\": 1}}",
                 json_string_value(json_object_get(one, "name")));
        json_t *answer = ask(&t, line);
        assert_non_null(json_object_get(answer, "error"));
        json_decref(answer);
    }
    json_decref(reply);
    talk_end(&t);
}

/* A value of the type, as in struct qmp_arg. */
static const char *value_of(char type)
{
    return type == 'n'   ? "1"
           : type == 'b' ? "true"
           : type == 'l' ? "[]"
           : type == 'o' ? "{}"
                         : "\"x\"";
}

static bool is_of(char type, const char *value)
{
    bool reference = type == 'r' || type == 'R';
    return strcmp(value, value_of(type)) == 0 || (reference && strcmp(value, "{}") == 0) ||
           (type == 'R' && strcmp(value, "null") == 0) || (type == 'u' && strcmp(value, "1") == 0);
}

/* All arguments that the command needs, and `bad`, which gets the value. */
static void ask_with(struct talk *t, const struct qmp_command *c, const struct qmp_arg *bad,
                     const char *value)
{
    char line[2048], why[200];
    int n = snprintf(line, sizeof(line), "{\"execute\": \"%s\", \"arguments\": {", c->name);
    for (const struct qmp_arg *a = c->args; a->name; a++)
        if (a->required && a != bad)
            n += snprintf(line + n, sizeof(line) - (size_t)n, "\"%s\": %s, ", a->name,
                          value_of(a->type));
    snprintf(line + n, sizeof(line) - (size_t)n, "\"%s\": %s}}", bad->name, value);
    snprintf(why, sizeof(why),
             bad->type == 'u' ? "Parameter '%s' expects uint64"
                              : "Invalid parameter type for '%s', expected: ",
             bad->name);
    asked_refused(t, line, "GenericError", why);
}

static void every_argument_of_another_type_is_refused(void **state)
{
    static const char *const values[] = {"null", "7.5", "1", "\"x\"", "true", "[]", "{}", "[[{}]]"};
    struct talk t = talk_begin(true);
    size_t asked = 0;
    (void)state;
    for (size_t i = 0; qmp_tables[i]; i++)
        for (const struct qmp_command *c = qmp_tables[i]; c->name; c++)
            for (const struct qmp_arg *a = c->args; a->name && a->type; a++)
                for (size_t v = 0; v < sizeof(values) / sizeof(values[0]); v++)
                    if (!is_of(a->type, values[v]) &&
                        !(a->type == 'l' && strcmp(values[v], "[[{}]]") == 0) &&
                        strcmp(c->name, "qmp_capabilities") != 0) {
                        ask_with(&t, c, a, values[v]);
                        asked++;
                    }
    assert_true(asked > 500);
    talk_end(&t);
}

static void nodes_and_exports_are_told(void **state)
{
    struct talk t = talk_begin(true);
    (void)state;
    asked_ok(&t, "{\"execute\": \"blockdev-snapshot-sync\", \"arguments\": {\"device\": \"disk0\", "
                 "\"snapshot-file\": \"one.vmdk\", \"snapshot-node-name\": \"one\"}}");
    json_t *reply = ask(&t, "{\"execute\": \"query-named-block-nodes\"}");
    json_t *nodes = json_object_get(reply, "return");
    assert_int_equal(json_array_size(nodes), 2);
    json_t *top = json_array_get(nodes, 0), *base = json_array_get(nodes, 1);
    assert_string_equal(json_string_value(json_object_get(top, "node-name")), "one");
    assert_string_equal(json_string_value(json_object_get(top, "backing_file")), "disk.vmdk");
    assert_string_equal(json_string_value(json_object_get(base, "node-name")), "disk0");
    assert_string_equal(json_string_value(json_object_get(base, "drv")), "vmdk");
    json_decref(reply);
    reply = ask(&t, "{\"execute\": \"query-block-exports\"}");
    json_t *one = json_array_get(json_object_get(reply, "return"), 0);
    assert_string_equal(json_string_value(json_object_get(one, "id")), "disk0");
    assert_string_equal(json_string_value(json_object_get(one, "node-name")), "one");
    json_decref(reply);
    reply = ask(&t, "{\"execute\": \"query-block\"}");
    one = json_object_get(json_array_get(json_object_get(reply, "return"), 0), "inserted");
    assert_string_equal(json_string_value(json_object_get(one, "file")), "one.vmdk");
    json_decref(reply);
    talk_end(&t);
}

static void names_are_checked(void **state)
{
    (void)state;
    refused(dr_live_add(live, "disk0", disk, &err), EEXIST, "Duplicate");
    refused(dr_live_add(live, "0disk", disk, &err), EINVAL, "Invalid");
    refused(dr_live_add(live, "", disk, &err), EINVAL, "Invalid");
    refused(dr_live_add(live, "a-name-that-is-longer-than-31-characters", disk, &err), EINVAL,
            "Invalid");
}

#define live_test(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(a_client_negotiates_first),
        live_test(bad_lines_get_an_error_each),
        live_test(a_reply_has_the_requests_id),
        live_test(a_line_without_an_end_is_hung_up_on),
        live_test(there_are_not_more_clients_than_it_takes),
        live_test(the_socket_is_the_owners_alone),
        live_test(a_socket_in_use_is_left_alone_and_a_stale_one_gives_way),
        live_test(every_command_that_is_listed_is_there),
        live_test(every_argument_of_another_type_is_refused),
        live_test(nodes_and_exports_are_told),
        live_test(names_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
