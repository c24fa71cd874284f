/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Parts of files: their bounds, their users, and their names. */
#include "place.h"
#include "storage/part.h"

#define KIB 1024u

static char name[512];

/* The part of the file, from offset on; size 0 = to its end. */
static const char *part(struct place *p, uint64_t offset, uint64_t size)
{
    char length[40] = "";
    if (size)
        snprintf(length, sizeof(length), ",\"size\":%llu", (unsigned long long)size);
    snprintf(
        name, sizeof(name),
        "json:{\"driver\":\"raw\",\"offset\":%llu%s,\"file\":{\"driver\":\"file\",\"filename\":"
        "\"%s\"}}",
        (unsigned long long)offset, length, p->path);
    return name;
}

/* A file of 8 KiB of 'f'. */
static void make_file(struct place *p)
{
    uint8_t bytes[8 * KIB];
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    memset(bytes, 'f', sizeof(bytes));
    assert_ok(dr_file_pwrite(f, bytes, 0, sizeof(bytes), &err));
    dr_file_unref(f);
}

static void assert_byte(struct place *p, uint64_t off, uint8_t want)
{
    uint8_t byte;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
    assert_ok(dr_file_pread(f, &byte, off, 1, &err));
    assert_int_equal(byte, want);
    dr_file_unref(f);
}

static void nothing_is_written_outside(void **state)
{
    struct place *p = *state;
    uint8_t bytes[2 * KIB] = {0};
    uint64_t copied;
    make_file(p);
    struct dr_file *f = open_ok(p, part(p, KIB, 4 * KIB), DR_FILE_RDWR);
    assert_int_equal(dr_file_size(f), 4 * KIB);
    assert_ok(dr_file_pwrite(f, bytes, 2 * KIB, 2 * KIB, &err));
    assert_ok(dr_file_zero(f, 0, KIB, 0, &err));
    assert_fails(dr_file_pwrite(f, bytes, 4 * KIB - 1, 2, &err), ENOSPC, p->path);
    assert_fails(dr_file_pwrite(f, bytes, 1 << 20, 1, &err), ENOSPC, p->path);
    assert_fails(dr_file_zero(f, 3 * KIB, 2 * KIB, 0, &err), ENOSPC, p->path);
    assert_fails(dr_file_truncate(f, 8 * KIB, &err), ENOTSUP, p->path);
    struct dr_file *source = open_ok(p, p->other, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(source, bytes, 0, sizeof(bytes), &err));
    assert_int_equal(dr_file_copy(f, 3 * KIB, source, 0, 2 * KIB, &copied, NULL), -ENOTSUP);
    assert_ok(dr_file_flush(f, &err));
    assert_int_equal(dr_file_size(f), 4 * KIB);
    dr_file_unref(source);
    dr_file_unref(f);
    assert_byte(p, KIB - 1, 'f');
    assert_byte(p, KIB, 0);
    assert_byte(p, 5 * KIB - 1, 0);
    assert_byte(p, 5 * KIB, 'f');
}

/* What is copied into a part of a part is as durable after its flush as what is written. */
static void a_flush_reaches_the_file_of_a_part_of_a_part(void **state)
{
    struct place *p = *state;
    uint8_t bytes[KIB] = {0};
    char inner[1024];
    uint64_t copied;
    make_file(p);
    snprintf(inner, sizeof(inner), "json:{\"driver\":\"raw\",\"offset\":%u,\"file\":%s}", KIB,
             part(p, KIB, 4 * KIB) + strlen("json:"));
    struct dr_file *source = open_ok(p, p->other, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(source, bytes, 0, sizeof(bytes), &err));
    struct dr_file *f = open_ok(p, inner, DR_FILE_RDWR);
    assert_int_equal(dr_file_size(f), 3 * KIB);
    if (dr_file_copy(f, 0, source, 0, KIB, &copied, NULL) < 0) { /* not every file system does */
        dr_file_unref(source);
        dr_file_unref(f);
        skip();
    }
    assert_true(f->under->under->dirty);
    assert_ok(dr_file_flush(f, &err));
    assert_false(f->under->under->dirty);
    dr_file_unref(source);
    dr_file_unref(f);
    assert_byte(p, 2 * KIB - 1, 'f');
    assert_byte(p, 2 * KIB, 0);
}

static void a_part_without_a_size_is_resized_with_its_file(void **state)
{
    struct place *p = *state;
    make_file(p);
    struct dr_file *f = open_ok(p, part(p, KIB, 0), DR_FILE_RDWR);
    assert_int_equal(dr_file_size(f), 7 * KIB);
    assert_ok(dr_file_truncate(f, 9 * KIB, &err));
    assert_int_equal(dr_file_size(f->under), 10 * KIB);
    dr_file_unref(f);
}

static void users_of_one_file_see_each_other(void **state)
{
    struct place *p = *state;
    struct dr_file *f, *other;
    uint8_t byte;
    make_file(p);
    /* readers of different parts have different bytes */
    f = open_ok(p, part(p, 0, KIB), 0);
    other = open_ok(p, part(p, KIB, 2 * KIB), 0);
    assert_ptr_not_equal(f, other);
    assert_true(dr_file_same(f, other));
    assert_int_equal(dr_file_size(other), 2 * KIB);
    assert_fails(dr_file_upgrade(f, &err), EBUSY, "lock");
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &(struct dr_file *){0}, &err), EBUSY,
                 "lock");
    dr_file_unref(other);
    /* one alone becomes a writer, who keeps everybody out */
    assert_ok(dr_file_upgrade(f, &err));
    assert_fails(dr_file_open(p->fs, p->path, 0, &other, &err), EBUSY, "lock");
    assert_fails(dr_file_open(p->fs, part(p, 2 * KIB, KIB), DR_FILE_RDWR, &other, &err), EBUSY,
                 "lock");
    assert_ok(dr_file_downgrade(f, &err));
    other = open_ok(p, p->path, 0);
    assert_ok(dr_file_pread(other, &byte, 0, 1, &err));
    dr_file_unref(other);
    dr_file_unref(f);
}

static void names_tell_what_is_below(void **state)
{
    (void)state;
    static const struct {
        const char *name, *below, *format;
        uint64_t offset, size;
    } all[] = {
        {"json:{\"driver\":\"raw\",\"offset\":\"1k\",\"size\":512,\"file.filename\":\"x\"}", "x",
         "raw", 1024, 512},
        {"json:{\"driver\":\"qcow2\",\"file.driver\":\"raw\",\"file.offset\":7,"
         "\"file.file\":{\"filename\":\"x\"}}",
         "x", "qcow2", 7, 0},
        {"json:{\"file\":{\"driver\":\"raw\",\"size\":512,\"file\":{\"driver\":\"host_device\","
         "\"filename\":\"x\"}}}",
         "x", NULL, 0, 512},
        {"json:{\"driver\":\"raw\",\"offset\":\"010k\",\"size\":\"0x400\",\"file.filename\":\"x\"}",
         "x", "raw", 10240, 1024},
        {"json:{\"driver\":\"file\",\"filename\":\"x\"}", "x", "raw", 0, 0},
        {"json:{\"driver\":\"vmdk\",\"file\":{\"filename\":\"x\"}}", "x", "vmdk", 0, 0},
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        DR_CLEANUP_PART struct dr_part part = {0};
        assert_true(dr_part_is(all[i].name));
        assert_ok(dr_part_parse(all[i].name, &part, &err));
        assert_string_equal(part.below, all[i].below);
        assert_int_equal(part.offset, all[i].offset);
        assert_int_equal(part.size, all[i].size);
        assert_int_equal(part.format != NULL, all[i].format != NULL);
        if (part.format)
            assert_string_equal(part.format, all[i].format);
    }
}

static void names_that_mean_nothing_are_refused(void **state)
{
    (void)state;
    static const char *const all[] = {
        "json:{\"driver\":\"raw\",\"offset\":-1,\"file.filename\":\"x\"}",
        "json:{\"driver\":\"raw\",\"offset\":\"17179869184G\",\"file.filename\":\"x\"}",
        "json:{\"driver\":\"raw\",\"offset\":1,\"sizes\":1,\"file.filename\":\"x\"}",
        "json:{\"driver\":\"raw\",\"offset\":1,\"file.filename\":\"x\",\"file.url\":\"x\"}",
        "json:{\"driver\":\"qcow2\",\"offset\":1,\"file.filename\":\"x\"}",
        "json:{\"driver\":\"file\",\"filename\":\"\"}",
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        DR_CLEANUP_PART struct dr_part part = {0};
        struct dr_error why = DR_ERROR_INIT;
        if (!dr_part_is(all[i]) || dr_part_parse(all[i], &part, &why) != -EINVAL)
            fail_msg("%s: %s", all[i], why.text);
    }
    assert_false(dr_part_is("json:{\"driver\":\"nbd\",\"file\":{\"filename\":\"x\"}}"));
    assert_false(dr_part_is("json:{\"driver\":\"raw\",\"file\":{\"driver\":\"nbd\"}}"));
    assert_false(dr_part_is("json:[1]"));
    assert_false(dr_part_is("x"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(nothing_is_written_outside, setup_posix, teardown_posix),
        cmocka_unit_test_setup_teardown(a_flush_reaches_the_file_of_a_part_of_a_part, setup_posix,
                                        teardown_posix),
        cmocka_unit_test_setup_teardown(a_part_without_a_size_is_resized_with_its_file, setup_posix,
                                        teardown_posix),
        cmocka_unit_test_setup_teardown(users_of_one_file_see_each_other, setup_posix,
                                        teardown_posix),
        cmocka_unit_test(names_tell_what_is_below),
        cmocka_unit_test(names_that_mean_nothing_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
