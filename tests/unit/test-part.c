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
    assert_true(f->under->dirty);
    assert_ok(dr_file_flush(f, &err));
    assert_false(f->under->dirty);
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

static void assert_busy(struct place *p, const char *path, unsigned flags)
{
    struct dr_file *f;
    assert_fails(dr_file_open(p->fs, path, flags, &f, &err), EBUSY, "lock");
}

static void parts_that_do_not_overlap_are_written_at_once(void **state)
{
    struct place *p = *state;
    uint8_t bytes[KIB] = {0};
    uint64_t copied;
    make_file(p);
    struct dr_file *f = open_ok(p, part(p, 0, KIB), 0);
    struct dr_file *other = open_ok(p, part(p, KIB, 2 * KIB), 0);
    assert_ptr_not_equal(f, other);
    assert_ptr_equal(f->under, other->under);
    assert_false(dr_file_same(f, other));
    assert_ok(dr_file_upgrade(f, &err));
    assert_ok(dr_file_upgrade(other, &err));
    struct dr_file *third = open_ok(p, part(p, 4 * KIB, 0), DR_FILE_RDWR);
    assert_ok(dr_file_pwrite(f, bytes, 0, KIB, &err));
    if (dr_file_copy(other, KIB, f, 0, KIB, &copied, NULL) < 0) /* not every file system does */
        assert_ok(dr_file_pwrite(other, bytes, KIB, KIB, &err));
    assert_busy(p, p->path, 0);
    dr_file_unref(third);
    assert_ok(dr_file_downgrade(other, &err));
    assert_busy(p, p->path, 0); /* f still writes */
    dr_file_unref(f);
    assert_false(other->under->flags & DR_FILE_RDWR);
    f = open_ok(p, p->path, 0);
    assert_busy(p, part(p, 4 * KIB, 0), DR_FILE_RDWR); /* all of it is read */
    assert_fails(dr_file_upgrade(other, &err), EBUSY, "lock");
    dr_file_unref(f);
    dr_file_unref(other);
    assert_byte(p, KIB - 1, 0);
    assert_byte(p, KIB, 'f');
    assert_byte(p, 2 * KIB, 0);
    assert_byte(p, 3 * KIB, 'f');
}

static void parts_that_overlap_exclude_each_other_as_users_of_one_file_do(void **state)
{
    struct place *p = *state;
    char inner[1024];
    make_file(p);
    struct dr_file *f = open_ok(p, part(p, KIB, 2 * KIB), DR_FILE_RDWR);
    assert_busy(p, part(p, KIB, 2 * KIB), DR_FILE_RDWR);
    assert_busy(p, part(p, 3 * KIB - 512, KIB), 0);
    assert_busy(p, part(p, 0, 0), 0);
    assert_busy(p, p->path, DR_FILE_RDWR);
    /* a part of a part uses no more than it is */
    snprintf(inner, sizeof(inner), "json:{\"driver\":\"raw\",\"offset\":%u,\"file\":%s}", 2 * KIB,
             part(p, KIB, 4 * KIB) + strlen("json:"));
    struct dr_file *other = open_ok(p, inner, DR_FILE_RDWR);
    assert_busy(p, part(p, 4 * KIB, KIB), 0);
    dr_file_unref(other);
    assert_ok(dr_file_downgrade(f, &err));
    other = open_ok(p, part(p, 2 * KIB, 0), 0);
    assert_fails(dr_file_upgrade(f, &err), EBUSY, "overlap");
    dr_file_unref(other);
    assert_ok(dr_file_upgrade(f, &err));
    dr_file_unref(f);
}

static void ids_tell_which_bytes_two_names_share(void **state)
{
    struct place *p = *state;
    static const struct {
        uint64_t offset, size;
    } all[] = {{0, 0}, {0, KIB}, {KIB, 2 * KIB}, {2 * KIB, 0}};
    static const char *const shared[] = {"1111", "1100", "1011", "1011"};
    struct dr_file_id ids[4], whole;
    make_file(p);
    assert_ok(p->fs->ops->identify(p->fs, p->path, &whole, &err));
    for (size_t i = 0; i < 4; i++) {
        struct dr_file *f = open_ok(p, part(p, all[i].offset, all[i].size), 0);
        assert_ok(p->fs->ops->identify(p->fs, part(p, all[i].offset, all[i].size), &ids[i], &err));
        assert_true(dr_same_id(f->id, ids[i]));
        assert_true(dr_ids_overlap(whole, ids[i]));
        assert_int_equal(dr_same_id(whole, ids[i]), i == 0);
        dr_file_unref(f);
    }
    for (size_t i = 0; i < 4; i++)
        for (size_t k = 0; k < 4; k++)
            assert_int_equal(dr_ids_overlap(ids[i], ids[k]), shared[i][k] == '1');
}

static void sectors_are_atomic_only_where_those_of_the_file_are(void **state)
{
    struct place *p = *state;
    static const struct {
        uint64_t offset;
        unsigned atomic;
    } all[] = {{0, 512}, {512, 512}, {5 * KIB, 512}, {256, 256}, {520, 8}, {777, 1}};
    make_file(p);
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        struct dr_file *f = open_ok(p, part(p, all[i].offset, 0), 0);
        assert_int_equal(f->atomic_size, all[i].atomic);
        dr_file_unref(f);
    }
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
        cmocka_unit_test_setup_teardown(parts_that_do_not_overlap_are_written_at_once, setup_posix,
                                        teardown_posix),
        cmocka_unit_test_setup_teardown(
            parts_that_overlap_exclude_each_other_as_users_of_one_file_do, setup_posix,
            teardown_posix),
        cmocka_unit_test_setup_teardown(ids_tell_which_bytes_two_names_share, setup_posix,
                                        teardown_posix),
        cmocka_unit_test_setup_teardown(sectors_are_atomic_only_where_those_of_the_file_are,
                                        setup_posix, teardown_posix),
        cmocka_unit_test(names_tell_what_is_below),
        cmocka_unit_test(names_that_mean_nothing_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
