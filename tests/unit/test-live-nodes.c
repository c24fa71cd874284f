/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Nodes: names that clients give images by blockdev-add, and what they may do with them. */
#include "test-live.h"

static struct dr_fs *fs;
static struct dr_disk *disk;
static struct dr_live *live;
static struct talk talk;

static void create(const char *format, const char *name, uint64_t size, const char *parent)
{
    const struct dr_create_options c = {.format = format,
                                        .size = size,
                                        .has_size = size > 0,
                                        .backing = parent,
                                        .backing_format = parent ? "qcow2" : NULL};
    ok(dr_create_fs(fs, name, &c, &err));
}

/* A server of "disk0", the image disk on base, and files that nobody has open. */
static int begin(void **state)
{
    const struct dr_live_options o = {.control = socket_path()};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    fs = dr_fs_memory_new();
    create("qcow2", "base", CROWD_SIZE, NULL);
    put(fs, "base", 0, MiB, 0x11);
    create("qcow2", "disk", 0, "base");
    put(fs, "disk", MiB, MiB, 0x22);
    create("qcow2", "target", CROWD_SIZE, NULL);
    create("qcow2", "small", CROWD_SIZE / 2, NULL);
    create("qcow2", "child", 0, "base");
    create("vmdk", "target.vmdk", CROWD_SIZE, NULL);
    create("raw", "plain", CROWD_SIZE, NULL);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_add(live, "disk0", disk, &err));
    ok(dr_live_start(live, &err));
    talk = talk_begin(true);
    return 0;
}

static int end(void **state)
{
    (void)state;
    talk_end(&talk);
    dr_live_free(live);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
    return 0;
}

/* {'execute': COMMAND, 'arguments': {ARGUMENTS}}, with quotes written as ' to be readable. */
static char *request(const char *command, const char *arguments)
{
    static char text[2048];
    snprintf(text, sizeof(text), "{'execute': '%s', 'arguments': {%s}}", command, arguments);
    for (char *p = text; *p; p++)
        if (*p == '\'')
            *p = '"';
    return text;
}

static void done(const char *command, const char *arguments)
{
    asked_ok(&talk, request(command, arguments));
}

static void no(const char *command, const char *arguments, const char *why)
{
    asked_refused(&talk, request(command, arguments), "GenericError", why);
}

/* The member of that node in query-named-block-nodes, or NULL; a new reference. */
static json_t *node(const char *name)
{
    json_t *reply = ask(&talk, request("query-named-block-nodes", "")), *one, *found = NULL;
    size_t i;
    json_array_foreach(json_object_get(reply, "return"), i, one)
    {
        if (strcmp(json_string_value(json_object_get(one, "node-name")), name) == 0)
            found = json_incref(one);
    }
    json_decref(reply);
    return found;
}

static void node_is(const char *name, const char *driver, const char *file, bool read_only)
{
    json_t *one = node(name);
    assert_non_null(one);
    assert_string_equal(json_string_value(json_object_get(one, "drv")), driver);
    assert_string_equal(json_string_value(json_object_get(one, "file")), file);
    assert_int_equal(json_is_true(json_object_get(one, "ro")), read_only);
    json_decref(one);
}

static void node_is_gone(const char *name)
{
    json_t *one = node(name);
    assert_null(one);
}

#define QCOW2(name, file) \
    "'driver': 'qcow2', 'node-name': '" name "', 'file': {'driver': 'file', 'filename': '" file "'}"

static void bad_descriptions_are_refused_in_qemus_words(void **state)
{
    static const struct {
        const char *arguments, *why;
    } bad[] = {
        {"", "Parameter 'driver' is missing"},
        {"'driver': 7", "Invalid parameter type for 'driver', expected: string"},
        {"'driver': 'nonsense', 'node-name': 'x'",
         "Parameter 'driver' does not accept value 'nonsense'"},
        {"'driver': 'vma', 'node-name': 'x'", "Parameter 'driver' does not accept value 'vma'"},
        {"'driver': 'qcow2', 'node-name': 'x'", "Parameter 'file' is missing"},
        {"'driver': 'file', 'node-name': 'x'", "Parameter 'filename' is missing"},
        {"'driver': 'file', 'filename': 'target'",
         "'node-name' must be specified for the root node"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': 3",
         "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': null",
         "Invalid parameter type for 'file', expected: BlockdevRef"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': 'none'",
         "Cannot find device='none' nor node-name='none'"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': 'disk0'", "Node 'disk0' is an image"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': {}", "Parameter 'file.driver' is missing"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file'}",
         "Parameter 'file.filename' is missing"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'raw', 'file': 'y'}",
         "Parameter 'file.driver' does not accept value 'raw'"},
        {QCOW2("x", "target") ", 'nonsense': 1", "Parameter 'nonsense' is unexpected"},
        {QCOW2("x", "target") ", 'read-only': 'yes'",
         "Invalid parameter type for 'read-only', expected: boolean"},
        {QCOW2("x", "target") ", 'cache': {'writeback': true}",
         "Parameter 'cache.writeback' is unexpected"},
        {QCOW2("x", "target") ", 'detect-zeroes': 'on'",
         "Parameter 'detect-zeroes' does not accept value 'on'"},
        {QCOW2("x", "target") ", 'backing': {'driver': 'file'}", "a node's name or null"},
        {QCOW2("x", "target") ", 'backing': 'none'",
         "Could not open backing file: Cannot find device='none' nor node-name='none'"},
        {QCOW2("x", "target") ", 'backing': 'disk0'", "does not have 'disk0'"},
        {QCOW2("0x", "target"), "Invalid node-name: '0x'"},
        {QCOW2("disk0", "target"), "Duplicate nodes with node-name='disk0'"},
        {"'driver': 'qcow2', 'node-name': 'x', 'file': {'driver': 'file', 'node-name': 'x', "
         "'filename': 'target'}",
         "Duplicate nodes with node-name='x'"},
        {QCOW2("x", "none"), "Could not open 'none': No such file or directory"},
        {QCOW2("x", "plain"), "plain"},
        {QCOW2("x", "disk"), "Failed to get \"write\" lock"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        no("blockdev-add", bad[i].arguments, bad[i].why);
    node_is_gone("x");
    no("blockdev-del", "", "Parameter 'node-name' is missing");
    no("blockdev-del", "'node-name': 'x'", "Failed to find node with node-name='x'");
}

static void a_node_is_shown_until_it_is_deleted(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target") ", 'backing': null");
    done("blockdev-add", "'driver': 'file', 'node-name': 'f', 'filename': 'plain', "
                         "'read-only': true");
    done("blockdev-add", "'driver': 'raw', 'node-name': 'r', 'file': 'f'");
    done("blockdev-add", "'driver': 'vmdk', 'node-name': 'v', 'discard': 'unmap', 'file': "
                         "{'driver': 'file', 'filename': 'target.vmdk', 'node-name': 'vf'}");
    done("blockdev-add", QCOW2("c", "child"));
    node_is("x", "qcow2", "target", false);
    node_is("f", "file", "plain", true);
    node_is("r", "raw", "plain", true);
    node_is("v", "vmdk", "target.vmdk", false);
    node_is("vf", "file", "target.vmdk", false);
    no("blockdev-del", "'node-name': 'f'", "Block device f is in use");
    no("blockdev-del", "'node-name': 'vf'", "Node vf is not owned by the monitor");
    done("blockdev-del", "'node-name': 'r'");
    done("blockdev-del", "'node-name': 'f'");
    done("blockdev-del", "'node-name': 'v'");
    done("blockdev-del", "'node-name': 'x'");
    static const char *const gone[] = {"r", "f", "v", "vf", "x"};
    for (size_t i = 0; i < 5; i++)
        node_is_gone(gone[i]);
    done("blockdev-add", QCOW2("x", "target"));
}

static void an_image_of_a_disk_is_not_deleted(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    json_decref(ask(&talk, request("query-named-block-nodes", ""))); /* names base, too */
    no("blockdev-del", "'node-name': 'disk0'", "Node disk0 is in use");
    no("blockdev-del", "'node-name': '#block1'",
       "Node '#block1' is busy: node is used as backing hd of 'disk0'");
}

/* It is opened by the first command that needs it, and closed by blockdev-del. */
static void a_node_can_be_used_as_a_disk(void **state)
{
    struct dr_disk *again;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    json_decref(ask(&talk, request("query-named-block-nodes", ""))); /* names base */
    done("blockdev-add", QCOW2("c", "child") ", 'backing': '#block1'");
    ok(dr_open_fs(fs, "child", &rw, &again, &err)); /* nobody has it */
    no("block_resize", "'node-name': 'c', 'size': 16777216", "already open");
    ok(dr_close(again, &err));
    done("block_resize", "'node-name': 'c', 'size': 16777216");
    done("blockdev-add", QCOW2("s", "small"));
    done("block-stream", "'job-id': 's', 'device': 's'");
    events_are(&talk, "JOB_STATUS_CHANGE:created JOB_STATUS_CHANGE:running "
                      "JOB_STATUS_CHANGE:waiting JOB_STATUS_CHANGE:pending BLOCK_JOB_COMPLETED "
                      "JOB_STATUS_CHANGE:concluded JOB_STATUS_CHANGE:null ");
    refused(dr_open_fs(fs, "child", &rw, &again, &err), EBUSY, "already open");
    done("block-stream", "'job-id': 'j', 'device': 'c', 'auto-dismiss': false");
    events_are(&talk, "JOB_STATUS_CHANGE:created JOB_STATUS_CHANGE:running "
                      "JOB_STATUS_CHANGE:waiting JOB_STATUS_CHANGE:pending BLOCK_JOB_COMPLETED "
                      "JOB_STATUS_CHANGE:concluded ");
    no("blockdev-del", "'node-name': 'c'",
       "Node 'c' is busy: block device is in use by block job: stream");
    done("job-dismiss", "'id': 'j'");
    done("blockdev-del", "'node-name': 'c'");
    ok(dr_open_fs(fs, "child", &rw, &again, &err));
    assert_int_equal(dr_chain_length(again), 1);
    assert_int_equal(dr_size(again), 16777216);
    ok(dr_close(again, &err));
}

#define live_test(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(bad_descriptions_are_refused_in_qemus_words),
        live_test(a_node_is_shown_until_it_is_deleted),
        live_test(an_image_of_a_disk_is_not_deleted),
        live_test(a_node_can_be_used_as_a_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
