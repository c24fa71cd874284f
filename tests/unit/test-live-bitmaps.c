/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps of served disks over QMP: kept by images of every format, or in memory. */
#include "live/live.h"
#include "slower.h"
#include "test-live.h"

static struct dr_fs *fs;
static struct dr_disk *disk;
static struct dr_live *live;
static struct talk talk;

#define SIZE (8u * MiB)

static void create(const char *format, const char *name, uint64_t size)
{
    const struct dr_create_options c = {.format = format, .size = size, .has_size = true};
    ok(dr_create_fs(fs, name, &c, &err));
}

static void serve(const char *format)
{
    const struct dr_live_options o = {.control = socket_path()};
    const struct dr_open_options rw = {.format = format, .flags = DR_OPEN_RDWR};
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_live_new(&o, &live, &err));
    ok(dr_live_add(live, "disk0", disk, &err));
    ok(dr_live_start(live, &err));
    talk = talk_begin(true);
}

static void stop_serving(void)
{
    talk_end(&talk);
    dr_live_free(live);
    ok(dr_close(disk, &err));
}

static void begin(const char *format)
{
    fs = dr_fs_memory_new();
    create(format, "disk", SIZE);
    serve(format);
}

static void end(void)
{
    stop_serving();
    dr_fs_memory_free(fs);
}

static void done(const char *command, const char *arguments)
{
    asked_ok(&talk, request(command, arguments));
}

static void no(const char *command, const char *arguments, const char *why)
{
    asked_refused(&talk, request(command, arguments), "GenericError", why);
}

static void write_disk(uint64_t off, size_t len)
{
    uint8_t *buf = malloc(len);
    memset(buf, 0x5a, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    free(buf);
}

/* The bitmap of the active image as query-block shows it; a new reference, or NULL. */
static json_t *bitmap(const char *name)
{
    json_t *reply = ask(&talk, request("query-block", "")), *one, *found = NULL;
    json_t *device = json_array_get(json_object_get(reply, "return"), 0);
    json_t *all = json_object_get(json_object_get(device, "inserted"), "dirty-bitmaps");
    size_t i;
    json_array_foreach(all, i, one)
    {
        if (strcmp(json_string_value(json_object_get(one, "name")), name) == 0)
            found = json_incref(one);
    }
    json_decref(reply);
    return found;
}

static void has(const char *name, uint64_t count)
{
    json_t *one = bitmap(name);
    if (!one)
        fail_msg("there is no bitmap %s", name);
    assert_int_equal(json_integer_value(json_object_get(one, "count")), count);
    json_decref(one);
}

static void is_gone(const char *name)
{
    json_t *one = bitmap(name);
    assert_null(one);
}

static const char *const formats[] = {"raw", "vmdk", "add-cow", "qcow2"};

/* Both kinds of bitmaps on images of all formats. */
static void all_kinds(void (*test)(bool persistent))
{
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++)
        for (int persistent = 0; persistent < 2; persistent++) {
            begin(formats[i]);
            test(persistent);
            end();
        }
}

static void add(const char *name, bool persistent, const char *more)
{
    char args[256];
    snprintf(args, sizeof(args), "'node': 'disk0', 'name': '%s', 'persistent': %s%s", name,
             persistent ? "true" : "false", more);
    done("block-dirty-bitmap-add", args);
}

#define B "'node': 'disk0', 'name': 'b'"

static void use_a_bitmap(bool persistent)
{
    write_disk(2 * MiB, 64 * KiB);
    write_disk(3 * MiB, 64 * KiB);
    add("b", persistent, "");
    has("b", 0);
    write_disk(MiB, 512);
    has("b", 64 * KiB);
    ok(dr_zero(disk, 2 * MiB, 64 * KiB, 0, &err));
    ok(dr_discard(disk, 3 * MiB, 64 * KiB, &err));
    has("b", 192 * KiB);
    done("block-dirty-bitmap-disable", B);
    write_disk(5 * MiB, 512);
    has("b", 192 * KiB);
    done("block-dirty-bitmap-enable", B);
    write_disk(6 * MiB, 512);
    has("b", 256 * KiB);
    done("block-dirty-bitmap-clear", B);
    has("b", 0);
    add("c", !persistent, ", 'granularity': 4096");
    write_disk(7 * MiB, 512);
    done("block-dirty-bitmap-disable", B);
    write_disk(4 * MiB, 4096);
    has("b", 64 * KiB);
    done("block-dirty-bitmap-merge", "'node': 'disk0', 'target': 'b', 'bitmaps': ['c']");
    has("b", 128 * KiB);
    has("c", 8 * KiB);
    no("block-dirty-bitmap-add", B, "Bitmap already exists: b");
    done("block-dirty-bitmap-remove", B);
    is_gone("b");
    has("c", 8 * KiB);
}

static void a_bitmap_has_what_is_written_in_every_format(void **state)
{
    (void)state;
    all_kinds(use_a_bitmap);
}

static void grow(bool persistent)
{
    add("b", persistent, "");
    add("off", persistent, ", 'disabled': true");
    done("block_resize", "'device': 'disk0', 'size': 16777216");
    has("b", SIZE);
    has("off", 0);
    done("block-dirty-bitmap-clear", B);
    write_disk(12u * MiB, 512);
    has("b", 64 * KiB);
}

static void shrink_and_grow(bool persistent)
{
    add("b", persistent, "");
    add("off", persistent, ", 'disabled': true");
    int r = dr_truncate(disk, SIZE / 2, NULL);
    assert_true(r == 0 || r == -ENOTSUP);
    if (r < 0)
        return;
    done("block_resize", "'device': 'disk0', 'size': 8388608");
    has("b", SIZE / 2);
    has("off", 0);
}

static void what_was_cut_off_and_is_there_again_is_dirty(void **state)
{
    (void)state;
    all_kinds(shrink_and_grow);
}

static void what_a_disk_grows_by_is_dirty(void **state)
{
    (void)state;
    all_kinds(grow);
}

static void others_are_gone_with_the_server(void **state)
{
    (void)state;
    begin("raw");
    add("b", false, "");
    add("kept", true, "");
    write_disk(0, 512);
    stop_serving();
    serve("raw");
    is_gone("b");
    has("kept", 64 * KiB);
    end();
}

#define SNAPSHOT "'device': 'disk0', 'snapshot-file': 'top', 'format': 'qcow2'"

static void a_bitmap_that_has_missed_writes_says_that_all_is_dirty(void **state)
{
    (void)state;
    begin("qcow2");
    add("b", false, "");
    add("off", false, ", 'disabled': true");
    write_disk(0, 512);
    done("blockdev-snapshot-sync", SNAPSHOT);
    is_gone("b"); /* it is the frozen image's */
    write_disk(MiB, 512);
    done("block-commit", "'device': 'disk0', 'job-id': 'j'");
    free(talk.events);
    talk.events = NULL;
    for (bool ready = false; !ready;) {
        json_t *message = hear_one(&talk);
        ready = strcmp(json_string_value(json_object_get(message, "event")), "BLOCK_JOB_READY") ==
                0;
        json_decref(message);
    }
    done("job-complete", "'id': 'j'");
    for (bool gone = false; !gone;) {
        json_t *message = hear_one(&talk);
        const char *status =
            json_string_value(json_object_get(json_object_get(message, "data"), "status"));
        gone = status && strcmp(status, "null") == 0;
        json_decref(message);
    }
    has("b", SIZE);
    has("off", 0);
    done("block-dirty-bitmap-clear", B);
    write_disk(2 * MiB, 512);
    has("b", 64 * KiB);
    end();
}

static void bitmaps_of_images_that_leave_the_chain_go(void **state)
{
#if SLOWER_THREADS
    skip(); /* it looks at the list beside the server, which only replies order */
#endif
    (void)state;
    begin("qcow2");
    done("blockdev-snapshot-sync", SNAPSHOT);
    add("b", false, "");
    write_disk(0, 512);
    dr_memory_bitmaps_prune(live->disks->bitmaps);
    assert_true(dr_memory_bitmap_has(live->disks->bitmaps, "top", "b"));
    const struct dr_stream_options all = {0};
    ok(dr_disk_stream(disk, &all, NULL, &err));
    has("b", 64 * KiB);
    const struct dr_mirror_options mirror = {.format = "qcow2"};
    ok(dr_disk_mirror(disk, "copy", &mirror, NULL, &err));
    done("block-dirty-bitmap-add", "'node': 'disk0', 'name': 'other'");
    assert_false(dr_memory_bitmap_has(live->disks->bitmaps, "top", "b"));
    end();
}

/* ------------------------------------------------------------------ under load */

struct writer {
    pthread_t thread;
    _Atomic bool stop;
    _Atomic uint64_t wrote; /* a bit for each MiB that was acknowledged */
};

static void *write_on(void *user)
{
    struct writer *w = user;
    uint8_t buf[512] = {1};
    for (unsigned i = 0; !atomic_load(&w->stop); i++) {
        if (dr_pwrite(disk, buf, (uint64_t)(i % 8) * MiB, sizeof(buf), 0, NULL) < 0)
            return "a write has failed";
        atomic_fetch_or(&w->wrote, UINT64_C(1) << i % 8);
    }
    return NULL;
}

static void change_while_written(bool persistent)
{
    struct writer w = {.stop = false};
    void *trouble;
    add("b", persistent, "");
    assert_int_equal(pthread_create(&w.thread, NULL, write_on, &w), 0);
    for (int i = 0; i < 3; i++) {
        atomic_store(&w.wrote, 0);
        done("block-dirty-bitmap-clear", B);
        atomic_store(&w.wrote, 0);
        while (atomic_load(&w.wrote) != 0xff)
            sched_yield();
        has("b", 8 * 64 * KiB);
        add("c", !persistent, "");
        done("block-dirty-bitmap-merge", "'node': 'disk0', 'target': 'c', 'bitmaps': ['b']");
        has("c", 8 * 64 * KiB);
        done("block-dirty-bitmap-remove", "'node': 'disk0', 'name': 'c'");
    }
    atomic_store(&w.stop, true);
    pthread_join(w.thread, &trouble);
    assert_null(trouble);
}

static void a_bitmap_misses_nothing_while_it_changes(void **state)
{
    (void)state;
    all_kinds(change_while_written);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_bitmap_has_what_is_written_in_every_format),
        cmocka_unit_test(what_a_disk_grows_by_is_dirty),
        cmocka_unit_test(what_was_cut_off_and_is_there_again_is_dirty),
        cmocka_unit_test(others_are_gone_with_the_server),
        cmocka_unit_test(a_bitmap_that_has_missed_writes_says_that_all_is_dirty),
        cmocka_unit_test(bitmaps_of_images_that_leave_the_chain_go),
        cmocka_unit_test(a_bitmap_misses_nothing_while_it_changes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
