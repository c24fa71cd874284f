/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Nodes: names that clients give images by blockdev-add, and what they may do with them. */
#include "faultfs.h"
#include "live/live.h"
#include "test-live.h"

#include <sched.h>
#include <stdatomic.h>

static struct dr_fs *fs;
static struct faultfs *faults;  /* around it; some servers use it */
static struct dr_error failure; /* what the end of the server has told */
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

static void note_failure(void *user, const struct dr_error *why)
{
    (void)user;
    failure = *why;
}

/* A server of "disk0", the image disk on base, and files that nobody has open. */
static int begin_on(bool faulty)
{
    const struct dr_live_options o = {.control = socket_path(), .failed = note_failure};
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    fs = dr_fs_memory_new();
    faults = faultfs_new(fs);
    failure = (struct dr_error)DR_ERROR_INIT;
    create("qcow2", "base", CROWD_SIZE, NULL);
    put(fs, "base", 0, MiB, 0x11);
    create("qcow2", "disk", 0, "base");
    put(fs, "disk", MiB, MiB, 0x22);
    create("qcow2", "target", CROWD_SIZE, NULL);
    create("qcow2", "small", CROWD_SIZE / 2, NULL);
    create("qcow2", "child", 0, "base");
    create("vmdk", "target.vmdk", CROWD_SIZE, NULL);
    create("raw", "plain", CROWD_SIZE, NULL);
    ok(dr_open_fs(faulty ? faultfs_fs(faults) : fs, "disk", &rw, &disk, &err));
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_add(live, "disk0", disk, &err));
    ok(dr_live_start(live, &err));
    talk = talk_begin(true);
    return 0;
}

static int begin(void **state)
{
    (void)state;
    return begin_on(false);
}

static int begin_faulty(void **state)
{
    (void)state;
    return begin_on(true);
}

static int end(void **state)
{
    (void)state;
    if (live)
        talk_end(&talk);
    dr_live_free(live);
    ok(dr_close(disk, &err));
    faultfs_free(faults);
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

#define BEGUN "JOB_STATUS_CHANGE:created JOB_STATUS_CHANGE:running "
#define READY "JOB_STATUS_CHANGE:ready BLOCK_JOB_READY "
#define COMPLETED                                          \
    "JOB_STATUS_CHANGE:waiting JOB_STATUS_CHANGE:pending " \
    "BLOCK_JOB_COMPLETED JOB_STATUS_CHANGE:concluded JOB_STATUS_CHANGE:null "

static void write_disk(uint64_t off, uint64_t len, int byte)
{
    char *bytes = malloc(len);
    assert_non_null(bytes);
    memset(bytes, byte, len);
    ok(dr_pwrite(disk, bytes, off, len, 0, &err));
    free(bytes);
}

static void disk_has(uint64_t off, int byte)
{
    char have[512], want[512];
    memset(want, byte, sizeof(want));
    ok(dr_pread(disk, have, off, sizeof(have), &err));
    assert_memory_equal(have, want, sizeof(want));
}

static void a_mirror_goes_over_to_a_node(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target") ", 'backing': null");
    done("blockdev-mirror", "'job-id': 'j', 'device': 'disk0', 'target': 'x', 'sync': 'full'");
    events_are(&talk, BEGUN READY);
    no("blockdev-del", "'node-name': 'x'", "Node x is in use");
    no("block_resize", "'node-name': 'x', 'size': 1048576", "already open");
    write_disk(2 * MiB, 512, 0x33);
    done("job-complete", "'id': 'j'");
    events_are(&talk, COMPLETED);
    assert_string_equal(dr_image_path(disk, 0), "target");
    assert_int_equal(dr_chain_length(disk), 1);
    disk_has(0, 0x11);
    disk_has(MiB, 0x22);
    disk_has(2 * MiB, 0x33);
    no("blockdev-del", "'node-name': 'x'", "Node x is in use");
    done("blockdev-del", "'node-name': 'disk0'"); /* the name of the image, not of the disk */
    done("block_resize", "'node-name': 'x', 'size': 16777216");
    assert_int_equal(dr_size(disk), 16777216);
}

static void a_mirror_of_the_top_needs_a_target_on_the_same_parents(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    done("blockdev-mirror", "'job-id': 'j', 'device': 'disk0', 'target': 'x', 'sync': 'top'");
    events_are(&talk, BEGUN "JOB_STATUS_CHANGE:aborting BLOCK_JOB_COMPLETED! "
                            "JOB_STATUS_CHANGE:concluded JOB_STATUS_CHANGE:null ");
    done("blockdev-add", QCOW2("c", "child"));
    done("blockdev-mirror", "'job-id': 'j', 'device': 'disk0', 'target': 'c', 'sync': 'top'");
    events_are(&talk, BEGUN READY);
    done("job-complete", "'id': 'j'");
    events_are(&talk, COMPLETED);
    assert_string_equal(dr_image_path(disk, 0), "child");
    assert_int_equal(dr_chain_length(disk), 2);
    disk_has(0, 0x11);
    disk_has(MiB, 0x22);
}

static void a_mirror_may_copy_only_what_is_written_from_now_on(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    no("drive-mirror", "'device': 'disk0', 'target': 'new', 'sync': 'none'",
       "needs mode 'existing'");
    done("blockdev-mirror", "'job-id': 'j', 'device': 'disk0', 'target': 'x', 'sync': 'none'");
    events_are(&talk, BEGUN READY);
    write_disk(2 * MiB, 64 * KiB, 0x33);
    done("job-complete", "'id': 'j'");
    events_are(&talk, COMPLETED);
    disk_has(0, 0);
    disk_has(MiB, 0);
    disk_has(2 * MiB, 0x33);
}

static void what_cannot_be_a_target_is_refused(void **state)
{
    static const struct {
        const char *arguments, *why;
    } bad[] = {
        {"'device': 'disk0', 'target': 'x'", "Parameter 'sync' is missing"},
        {"'device': 'disk0', 'sync': 'full'", "Parameter 'target' is missing"},
        {"'device': 'none', 'target': 'x', 'sync': 'full'",
         "Cannot find device='none' nor node-name='none'"},
        {"'device': 'disk0', 'target': 'none', 'sync': 'full'",
         "Cannot find device='none' nor node-name='none'"},
        {"'device': 'disk0', 'target': 'disk0', 'sync': 'full'", "Can't mirror node into itself"},
        {"'device': 'disk0', 'target': '#block1', 'sync': 'full'", "not one that blockdev-add"},
        {"'device': 'disk0', 'target': 'x', 'sync': 'nonsense'",
         "Parameter 'sync' does not accept value 'nonsense'"},
        {"'device': 'disk0', 'target': 'x', 'sync': 'incremental'",
         "Sync mode 'incremental' not supported"},
        {"'device': 'disk0', 'target': 'r', 'sync': 'full'", "Block node is read-only"},
        {"'device': 'disk0', 'target': 'x', 'sync': 'full', 'replaces': 'x'",
         "Parameter 'replaces' is unexpected"},
        {"'device': 'disk0', 'target': 'x', 'sync': 'full', 'granularity': 'x'",
         "Invalid parameter type for 'granularity', expected: integer"},
    };
    (void)state;
    json_decref(ask(&talk, request("query-named-block-nodes", ""))); /* names base */
    done("blockdev-add", QCOW2("x", "target"));
    done("blockdev-add", "'driver': 'file', 'node-name': 'r', 'filename': 'plain', "
                         "'read-only': true");
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        no("blockdev-mirror", bad[i].arguments, bad[i].why);
}

static void a_disk_goes_on_with_an_overlay_that_was_named(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    done("blockdev-add", QCOW2("c", "child"));
    done("blockdev-add", QCOW2("s", "small"));
    done("blockdev-add", "'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'file', "
                         "'filename': 'plain'}");
    no("blockdev-snapshot", "", "Parameter 'node' is missing");
    no("blockdev-snapshot", "'node': 'disk0'", "Parameter 'overlay' is missing");
    no("blockdev-snapshot", "'node': 'none', 'overlay': 'x'",
       "Cannot find device='none' nor node-name='none'");
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 'none'",
       "Cannot find device='none' nor node-name='none'");
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 'disk0'", "not one that blockdev-add");
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 'c'",
       "The overlay already has a backing image");
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 'r'",
       "The overlay does not support backing images");
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 's'", "and the disk has");
    done("blockdev-snapshot", "'node': 'disk0', 'overlay': 'x'");
    assert_string_equal(dr_image_path(disk, 0), "target");
    assert_int_equal(dr_chain_length(disk), 3);
    write_disk(2 * MiB, 64 * KiB, 0x33);
    disk_has(0, 0x11);
    disk_has(MiB, 0x22);
    no("blockdev-snapshot", "'node': 'disk0', 'overlay': 'x'", "Node x is in use");
    no("blockdev-del", "'node-name': 'x'", "Node x is in use");
    ok(dr_flush(disk, &err));
    /* The overlay's header has learned its parent. */
    struct dr_disk *again;
    const struct dr_open_options look = {.flags = DR_OPEN_FORCE_SHARE};
    ok(dr_open_fs(fs, "target", &look, &again, &err));
    assert_int_equal(dr_chain_length(again), 3);
    ok(dr_close(again, &err));
}

static void a_lower_image_gets_another_name_for_its_parent(void **state)
{
    (void)state;
    create("qcow2", "same", CROWD_SIZE, NULL);
    put(fs, "same", 0, MiB, 0x11);
    done("blockdev-add", QCOW2("x", "target"));
    done("blockdev-snapshot", "'node': 'disk0', 'overlay': 'x'");
    json_decref(ask(&talk, request("query-named-block-nodes", ""))); /* names base */
    done("blockdev-add", QCOW2("s", "small"));
    no("change-backing-file",
       "'device': 'disk0', 'image-node-name': 'none', 'backing-file': 'same'",
       "Cannot find device='' nor node-name='none'");
    no("change-backing-file", "'device': 'none', 'image-node-name': 'x', 'backing-file': 'same'",
       "Cannot find device='none' nor node-name='none'");
    no("change-backing-file", "'device': 'disk0', 'image-node-name': 's', 'backing-file': 'same'",
       "'disk0' and image file are not in the same chain");
    no("change-backing-file",
       "'device': 'disk0', 'image-node-name': '#block1', 'backing-file': 'same'",
       "not allowing backing file change on an image without a backing file");
    done("change-backing-file",
         "'device': 'x', 'image-node-name': 'disk0', 'backing-file': 'same'");
    assert_int_equal(dr_chain_length(disk), 3);
    assert_string_equal(dr_image_path(disk, 1), "disk");
    assert_string_equal(dr_image_path(disk, 2), "same");
    disk_has(0, 0x11);
    disk_has(MiB, 0x22);
}

static void what_a_job_has_to_say_is_an_event(void **state)
{
    (void)state;
    done("x-drover-rebase", "'job-id': 'j', 'device': 'disk0', 'backing-file': 'small', "
                            "'backing-format': 'qcow2', 'auto-dismiss': false");
    events_are(&talk, BEGUN "X_DROVER_JOB_MESSAGE JOB_STATUS_CHANGE:waiting "
                            "JOB_STATUS_CHANGE:pending BLOCK_JOB_COMPLETED "
                            "JOB_STATUS_CHANGE:concluded ");
    json_t *reply = ask(&talk, request("query-jobs", ""));
    json_t *job = json_array_get(json_object_get(reply, "return"), 0);
    assert_non_null(
        strstr(json_string_value(json_object_get(job, "x-message")), "its new backing file small"));
    json_decref(reply);
    done("job-dismiss", "'id': 'j'");
}

static void a_transaction_takes_overlays_of_both_kinds(void **state)
{
    struct dr_disk *second;
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    (void)state;
    create("vmdk", "disk.vmdk", CROWD_SIZE, NULL);
    ok(dr_open_fs(fs, "disk.vmdk", &rw, &second, &err));
    ok(dr_live_add(live, "disk1", second, &err));
    done("blockdev-add", "'driver': 'vmdk', 'node-name': 'v', 'file': {'driver': 'file', "
                         "'filename': 'target.vmdk'}");
    no("transaction", "'actions': [{'type': 'blockdev-snapshot', 'data': {'node': 'disk1'}}]",
       "Parameter 'actions[0].data.overlay' is missing");
    no("transaction", "'actions': [{'type': 'blockdev-backup', 'data': {}}]",
       "Parameter 'actions[0].data.device' is missing");
    no("transaction",
       "'actions': [{'type': 'block-dirty-bitmap-add', 'data': {'node': 'disk1', 'name': 'b'}}, "
       "{'type': 'blockdev-snapshot', 'data': {'node': 'disk1', 'overlay': 'v'}}]",
       "A transaction of snapshots has no other actions here");
    no("transaction",
       "'actions': [{'type': 'blockdev-snapshot', 'data': {'node': 'disk1', 'overlay': 'v'}}, "
       "{'type': 'abort', 'data': {}}]",
       "Transaction aborted using Abort action");
    done("transaction",
         "'actions': [{'type': 'blockdev-snapshot', 'data': {'node': 'disk1', 'overlay': 'v'}}, "
         "{'type': 'blockdev-snapshot-sync', 'data': {'device': 'disk0', 'snapshot-file': 'o'}}]");
    assert_string_equal(dr_image_path(second, 0), "target.vmdk");
    assert_int_equal(dr_chain_length(second), 2);
    assert_string_equal(dr_image_path(disk, 0), "o");
    talk_end(&talk);
    dr_live_free(live);
    live = NULL;
    ok(dr_close(second, &err));
    ok(dr_open_fs(fs, "target.vmdk", &rw, &second, &err)); /* its content ids fit */
    ok(dr_close(second, &err));
}

/* The node becomes a disk, since it is to be snapshotted, and must not be closed as an overlay. */
static void a_disk_is_not_an_overlay_of_the_same_command(void **state)
{
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    no("blockdev-snapshot", "'node': 'x', 'overlay': 'x'", "The overlay is already in use");
    no("transaction",
       "'actions': [{'type': 'blockdev-snapshot-sync', 'data': {'node-name': 'x', "
       "'snapshot-file': 'o'}}, {'type': 'blockdev-snapshot', 'data': {'node': 'disk0', "
       "'overlay': 'x'}}]",
       "The overlay is already in use");
    done("block_resize", "'node-name': 'x', 'size': 16777216");
    done("block_resize", "'node-name': 'disk0', 'size': 16777216");
    done("blockdev-snapshot", "'node': 'disk0', 'overlay': 'x'");
}

static void *change_parents(void *ended)
{
    static const char *const parents[] = {"other", "base"};
    struct dr_error why = DR_ERROR_INIT;
    for (unsigned i = 0; i < 100; i++) {
        const struct dr_rebase_options o = {
            .backing = parents[i % 2], .backing_format = "qcow2", .unsafe = true};
        if (dr_disk_rebase(disk, &o, NULL, &why) < 0)
            break;
    }
    atomic_store((atomic_bool *)ended, true);
    return why.errnum ? strdup(why.text) : NULL;
}

/* For the sanitizers: the names of parents are looked at while they change. */
static void images_are_shown_while_their_parents_change(void **state)
{
    atomic_bool ended = false;
    pthread_t thread;
    void *why;
    (void)state;
    create("qcow2", "other", CROWD_SIZE, NULL);
    assert_int_equal(pthread_create(&thread, NULL, change_parents, &ended), 0);
    do {
        json_t *one = node("disk0");
        const json_t *image = json_object_get(one, "image");
        const char *name = json_string_value(json_object_get(image, "backing-filename"));
        assert_true(strcmp(name, "base") == 0 || strcmp(name, "other") == 0);
        json_decref(one);
    } while (!atomic_load(&ended));
    pthread_join(thread, &why);
    assert_null(why);
}

static int fail_flush(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_FLUSH && strstr(io->path, "target") ? -EIO : 0;
}

static void a_node_that_does_not_close_well_is_told_at_the_end(void **state)
{
    const uint8_t byte = 1;
    (void)state;
    done("blockdev-add", QCOW2("x", "target"));
    done("block_resize", "'node-name': 'x', 'size': 16777216"); /* the server has it open now */
    pthread_mutex_lock(&live->lock);
    struct live_disk *x = live->disks;
    while (!x->node)
        x = x->next;
    struct dr_disk *opened = x->disk;
    pthread_mutex_unlock(&live->lock);
    ok(dr_pwrite(opened, &byte, 0, 1, 0, &err));
    faultfs_observe(faults, fail_flush, NULL);
    talk_end(&talk);
    dr_live_free(live);
    live = NULL;
    assert_non_null(strstr(failure.text, "target"));
}

/* How many names the server has made up. */
static unsigned made_up(void)
{
    unsigned n = 0;
    DR_LOCK_SCOPE(&live->lock);
    for (const struct live_node *one = live->nodes; one; one = one->next)
        n += one->name[0] == '#';
    return n;
}

static void names_of_images_that_are_gone_are_forgotten(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 3; i++) {
        done("blockdev-snapshot-sync", i ? "'device': 'disk0', 'snapshot-file': 'upper'"
                                         : "'device': 'disk0', 'snapshot-file': 'lower'");
        node_is_gone("nobody");
        done("block-commit", "'device': 'disk0', 'base': 'disk', 'x-remove': true, 'job-id': 'j', "
                             "'auto-dismiss': false");
        for (bool ready = false; !ready; sched_yield()) {
            DR_LOCK_SCOPE(&live->lock);
            ready = live->jobs->status == LIVE_READY;
        }
        done("job-complete", "'id': 'j'");
        for (bool over = false; !over; sched_yield()) {
            DR_LOCK_SCOPE(&live->lock);
            over = live->jobs->status == LIVE_CONCLUDED;
        }
        done("job-dismiss", "'id': 'j'");
        node_is_gone("nobody");
        assert_int_equal(made_up(), 1); /* base */
    }
}

#define live_test(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
    const struct CMUnitTest tests[] = {
        live_test(bad_descriptions_are_refused_in_qemus_words),
        live_test(a_node_is_shown_until_it_is_deleted),
        live_test(an_image_of_a_disk_is_not_deleted),
        live_test(a_node_can_be_used_as_a_disk),
        live_test(images_are_shown_while_their_parents_change),
        live_test(a_disk_is_not_an_overlay_of_the_same_command),
        live_test(a_mirror_goes_over_to_a_node),
        live_test(a_mirror_of_the_top_needs_a_target_on_the_same_parents),
        live_test(a_mirror_may_copy_only_what_is_written_from_now_on),
        live_test(what_cannot_be_a_target_is_refused),
        live_test(a_disk_goes_on_with_an_overlay_that_was_named),
        live_test(a_lower_image_gets_another_name_for_its_parent),
        live_test(what_a_job_has_to_say_is_an_event),
        cmocka_unit_test_setup_teardown(a_node_that_does_not_close_well_is_told_at_the_end,
                                        begin_faulty, end),
        live_test(names_of_images_that_are_gone_are_forgotten),
        live_test(a_transaction_takes_overlays_of_both_kinds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
