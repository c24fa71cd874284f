/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the public API tells about formats, and changing the size of a disk, through the public
 * headers alone. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "drover/ops.h"
#include "drover/vma.h"

static char dir[] = "/tmp/drover-public-XXXXXX";
static char path[256];

static void make(const char *format, uint64_t size)
{
    const struct dr_create_options o = {.format = format, .size = size, .has_size = true};
    struct dr_error err = DR_ERROR_INIT;

    snprintf(path, sizeof(path), "%s/disk", dir);
    if (dr_create(path, &o, &err) < 0)
        fail_msg("%s", err.text);
}

static struct dr_disk *open_disk(const char *format, unsigned flags)
{
    const struct dr_open_options o = {.format = format, .flags = flags};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;

    if (dr_open(path, &o, &disk, &err) < 0)
        fail_msg("%s", err.text);
    return disk;
}

static void every_format_has_a_name_and_the_list_ends(void **state)
{
    struct dr_format_info info;
    bool raw = false;
    size_t n = 0;

    (void)state;
    while (dr_format_list(n, &info) == 0) {
        assert_true(info.name[0]);
        raw = raw || (strcmp(info.name, "raw") == 0 && info.can_create && !info.can_back);
        n++;
    }
    assert_true(raw && n >= 2);
    assert_int_equal(dr_format_list(n, &info), -ENOENT);
    assert_int_equal(dr_format_list(SIZE_MAX, &info), -ENOENT);
}

static void create_options_are_listed_with_their_help(void **state)
{
    struct dr_create_option o;
    size_t n = 0;

    (void)state;
    for (; dr_format_option("vmdk", n, &o) == 0; n++)
        assert_true(o.name && o.type && o.help);
    assert_true(n > 0);
    assert_int_equal(dr_format_option("vmdk", n, &o), -ENOENT);
    assert_int_equal(dr_format_option("nope", 0, &o), -EINVAL);
}

static void a_raw_disk_grows_with_zeros_and_shrinks(void **state)
{
    struct dr_disk *disk;
    char buf[4096], zeros[4096] = {0};

    (void)state;
    make("raw", 8192);
    disk = open_disk("raw", DR_OPEN_RDWR);
    memset(buf, 7, sizeof(buf));
    assert_int_equal(dr_pwrite(disk, buf, 4096, sizeof(buf), 0, NULL), 0);
    assert_int_equal(dr_truncate(disk, 6000, NULL), 0);
    assert_int_equal(dr_size(disk), 6000);
    assert_int_equal(dr_pread(disk, buf, 4096, sizeof(buf), NULL), -EINVAL);
    assert_int_equal(dr_truncate(disk, 8192, NULL), 0);
    assert_int_equal(dr_pread(disk, buf, 6000, 2192, NULL), 0);
    assert_memory_equal(buf, zeros, 2192); /* what was cut off does not come back */
    assert_int_equal(dr_close(disk, NULL), 0);
    disk = open_disk("raw", 0);
    assert_int_equal(dr_size(disk), 8192);
    dr_close(disk, NULL);
}

static void a_size_is_refused_where_it_cannot_be(void **state)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;

    (void)state;
    make("raw", 4096);
    disk = open_disk("raw", 0);
    assert_int_equal(dr_truncate(disk, 8192, &err), -EROFS);
    assert_true(strstr(err.text, path) != NULL);
    dr_close(disk, NULL);
    disk = open_disk("raw", DR_OPEN_RDWR);
    assert_int_equal(dr_truncate(disk, UINT64_MAX, NULL), -EFBIG);
    assert_int_equal(dr_size(disk), 4096);
    dr_close(disk, NULL);
    make("vmdk", 1 << 20);
    disk = open_disk("vmdk", DR_OPEN_RDWR);
    assert_int_equal(dr_truncate(disk, (2 << 20) + 1, NULL), -EINVAL);
    assert_int_equal(dr_size(disk), 1 << 20);
    dr_close(disk, NULL);
}

static void what_must_be_given_is_asked_for(void **state)
{
    struct dr_disk *disk = (struct dr_disk *)dir;
    struct dr_measure_result measured;
    struct dr_create_options create = {0};
    struct dr_rebase_options rebase = {0};
    struct dr_pair pair = {"subformat", NULL};
    const char *sources[] = {NULL};
    struct dr_error err = DR_ERROR_INIT;

    (void)state;
    assert_int_equal(dr_open(NULL, NULL, &disk, &err), -EINVAL);
    assert_true(strstr(err.text, "dr_open: path") != NULL);
    assert_null(disk);
    assert_int_equal(dr_open(path, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_create("x", NULL, NULL), -EINVAL);
    assert_int_equal(dr_create("x", &create, NULL), -EINVAL);
    create = (struct dr_create_options){.format = "vmdk", .size = 1 << 20, .pairs = &pair};
    create.n_pairs = 1;
    make("vmdk", 1 << 20);
    assert_int_equal(dr_create(path, &create, NULL), -EINVAL);
    assert_int_equal(dr_convert(sources, 1, path, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_convert(NULL, 1, path, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_measure(NULL, 1 << 20, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_measure(NULL, 1 << 20, NULL, &measured, NULL), 0);
    assert_int_equal(dr_rebase(path, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_rebase(path, &rebase, NULL, NULL), -EINVAL); /* no "" by mistake */
    assert_int_equal(dr_compare(NULL, NULL, false, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_stream(NULL, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_stream(path, NULL, NULL, NULL), 0); /* nothing to pull in */
    assert_int_equal(dr_info(path, NULL, false, NULL, NULL), -EINVAL);
    assert_int_equal(dr_snapshot_create(NULL, NULL, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_vma_create(path, NULL, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_vma_open(path, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_vma_extract(NULL, NULL, NULL, NULL, NULL), -EINVAL);
    assert_int_equal(dr_vma_extract_files(NULL, NULL, NULL, NULL, NULL), -EINVAL);
}

static void no_buffer_is_no_buffer_of_zeros(void **state)
{
    char buf[512], seven[512];
    struct dr_disk *disk;

    (void)state;
    make("raw", 4096);
    disk = open_disk("raw", DR_OPEN_RDWR);
    memset(seven, 7, sizeof(seven));
    assert_int_equal(dr_pwrite(disk, seven, 0, sizeof(seven), 0, NULL), 0);
    assert_int_equal(dr_pwrite(disk, NULL, 0, sizeof(seven), 0, NULL), -EINVAL);
    assert_int_equal(dr_pread(disk, NULL, 0, sizeof(seven), NULL), -EINVAL);
    assert_int_equal(dr_pwrite(disk, NULL, 4096, 0, 0, NULL), 0);
    assert_int_equal(dr_pread(disk, NULL, 4096, 0, NULL), 0);
    assert_int_equal(dr_pread(disk, buf, 0, sizeof(buf), NULL), 0);
    assert_memory_equal(buf, seven, sizeof(buf));
    dr_close(disk, NULL);
}

static void flags_of_a_later_library_are_refused(void **state)
{
    struct dr_open_options o = {.flags = 1u << 20};
    struct dr_disk *disk;
    char buf[512] = {0};

    (void)state;
    make("raw", 4096);
    assert_int_equal(dr_open(path, &o, &disk, NULL), -EINVAL);
    disk = open_disk("raw", DR_OPEN_RDWR);
    assert_int_equal(dr_pwrite(disk, buf, 0, sizeof(buf), 1u << 15, NULL), -EINVAL);
    assert_int_equal(dr_zero(disk, 0, 512, 1u << 15, NULL), -EINVAL);
    dr_close(disk, NULL);
}

static void a_disk_open_for_reading_takes_no_change_at_all(void **state)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;

    (void)state;
    make("vmdk", 1 << 20);
    disk = open_disk("vmdk", 0);
    assert_int_equal(dr_discard(disk, 0, 65536, &err), -EROFS); /* though there is nothing */
    assert_true(strstr(err.text, path) != NULL);
    assert_int_equal(dr_zero(disk, 0, 65536, 0, NULL), -EROFS);
    assert_int_equal(dr_pwrite(disk, NULL, 0, 0, 0, NULL), -EROFS);
    assert_int_equal(dr_flush(disk, NULL), 0);
    dr_close(disk, NULL);
}

static int say_stop(void *user, uint64_t done, uint64_t total)
{
    (void)done;
    (void)total;
    ++*(int *)user;
    return 1;
}

static void a_job_of_one_call_can_be_stopped_by_it(void **state)
{
    int calls = 0;
    const struct dr_job_options options = {.progress = say_stop, .user = &calls};
    struct dr_job *job = NULL;
    const char *sources[] = {path};
    char target[300];

    (void)state;
    make("raw", 4096);
    snprintf(target, sizeof(target), "%s/target", dir);
    assert_int_equal(dr_job_new(NULL, &options, &job, NULL), 0);
    assert_int_equal(dr_convert(sources, 1, target, NULL, job, NULL), -ECANCELED);
    dr_job_free(job);
    assert_int_equal(calls, 1);
    assert_int_equal(access(target, F_OK), -1);
}

static void the_result_is_the_same_without_a_place_for_the_text(void **state)
{
    const struct dr_create_options o = {.format = "vmdk", .backing = "absent", .flags = 0};
    const struct dr_create_options f = {.format = "vmdk", .size = 4096, .backing_format = "vmdk"};
    char child[300];

    (void)state;
    snprintf(child, sizeof(child), "%s/child", dir);
    assert_int_equal(dr_create(child, &o, NULL), -ENOENT);
    assert_int_equal(dr_create(child, &f, NULL), -EINVAL); /* a format, but of what? */
    assert_int_equal(access(child, F_OK), -1);
}

/* Zero a part of a child without data, whose parent of the same format is full of sevens. */
static void zero_fast(const char *format, uint64_t off, uint64_t len, int expected)
{
    struct dr_create_options o = {.format = format, .backing = "disk", .backing_format = format};
    struct dr_open_options open = {.format = format, .flags = DR_OPEN_RDWR};
    struct dr_error err = DR_ERROR_INIT;
    static unsigned char sevens[1 << 20], buf[1 << 20];
    struct dr_disk *disk;
    char child[300];

    make(format, sizeof(sevens));
    memset(sevens, 7, sizeof(sevens));
    disk = open_disk(format, DR_OPEN_RDWR);
    assert_int_equal(dr_pwrite(disk, sevens, 0, sizeof(sevens), 0, NULL), 0);
    assert_int_equal(dr_close(disk, NULL), 0);
    snprintf(child, sizeof(child), "%s/child", dir);
    assert_int_equal(dr_create(child, &o, NULL), 0);
    assert_int_equal(dr_open(child, &open, &disk, &err), 0);
    assert_int_equal(dr_zero(disk, off, len, DR_FAST, &err), expected);
    assert_int_equal(dr_pread(disk, buf, 0, sizeof(buf), NULL), 0);
    if (expected == 0)
        memset(sevens + off, 0, len);
    else
        assert_non_null(strstr(err.text, "without writing"));
    assert_memory_equal(buf, sevens, sizeof(buf));
    assert_int_equal(dr_close(disk, NULL), 0);
    unlink(child);
}

static void zeroing_fast_writes_no_zeros_as_bytes(void **state)
{
    (void)state;
    zero_fast("qcow2", 128 << 10, 128 << 10, 0);
    zero_fast("qcow2", 128 << 10, 4096, -ENOTSUP);     /* the rest of the cluster would be copied */
    zero_fast("vmdk", 128 << 10, 128 << 10, -ENOTSUP); /* its tables have no word for zeros */
}

static void a_block_is_what_a_write_copies_nothing_for(void **state)
{
    static const struct {
        const char *format;
        uint64_t size;
        uint32_t block;
    } cases[] = {{"raw", 1 << 20, 4096},
                 {"qcow2", 1 << 20, 65536},
                 {"vmdk", 1 << 20, 65536},
                 {"raw", 0, 4096}};

    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        make(cases[i].format, cases[i].size);
        struct dr_disk *disk = open_disk(cases[i].format, 0);
        assert_int_equal(dr_block_size(disk), cases[i].block);
        assert_int_equal(dr_close(disk, NULL), 0);
    }
}

static void tables_of_a_file_that_is_cut_off_meanwhile_are_missed(void **state)
{
    static const char *const formats[] = {"qcow2", "vmdk"};
    const uint64_t far = UINT64_C(1000) << 20;
    uint8_t byte = 7;

    (void)state;
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        struct dr_error err = DR_ERROR_INIT;
        make(formats[i], UINT64_C(1) << 30);
        struct dr_disk *disk = open_disk(formats[i], DR_OPEN_RDWR);
        assert_int_equal(dr_pwrite(disk, &byte, far, 1, 0, &err), 0);
        assert_int_equal(dr_close(disk, &err), 0);
        disk = open_disk(formats[i], 0);
        assert_int_equal(truncate(path, 65536), 0);
        assert_int_equal(dr_pread(disk, &byte, far, 1, &err), -EIO);
        assert_non_null(strstr(err.text, "was cut off"));
        assert_int_equal(dr_close(disk, NULL), 0);
    }
}

static void snapshots_inside_are_listed_without_the_parent(void **state)
{
    struct dr_create_options o = {.format = "qcow2", .backing = "disk", .backing_format = "raw"};
    struct dr_internal_snapshot *list = NULL;
    struct dr_error err = DR_ERROR_INIT;
    char child[300];
    size_t n = 7;

    (void)state;
    make("raw", 1 << 20);
    snprintf(child, sizeof(child), "%s/child", dir);
    unlink(child);
    assert_int_equal(dr_internal_snapshots(child, NULL, &list, &n, &err), -ENOENT);
    assert_non_null(strstr(err.text, child));
    assert_null(list);
    assert_int_equal(n, 7);
    assert_int_equal(dr_create(child, &o, &err), 0);
    struct dr_open_options writable = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    assert_int_equal(dr_open(child, &writable, &disk, &err), 0);
    assert_int_equal(dr_disk_internal_snapshot_create(disk, "before", NULL, &err), 0);
    assert_int_equal(dr_close(disk, &err), 0);
    unlink(path);
    assert_int_equal(dr_internal_snapshots(child, NULL, &list, &n, &err), 0);
    assert_int_equal(n, 1);
    assert_string_equal(list[0].name, "before");
    assert_int_equal(list[0].size, 1 << 20);
    dr_internal_snapshots_free(list, n);
    unlink(child);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_has_a_name_and_the_list_ends),
        cmocka_unit_test(create_options_are_listed_with_their_help),
        cmocka_unit_test(a_raw_disk_grows_with_zeros_and_shrinks),
        cmocka_unit_test(a_size_is_refused_where_it_cannot_be),
        cmocka_unit_test(what_must_be_given_is_asked_for),
        cmocka_unit_test(no_buffer_is_no_buffer_of_zeros),
        cmocka_unit_test(flags_of_a_later_library_are_refused),
        cmocka_unit_test(a_disk_open_for_reading_takes_no_change_at_all),
        cmocka_unit_test(a_job_of_one_call_can_be_stopped_by_it),
        cmocka_unit_test(the_result_is_the_same_without_a_place_for_the_text),
        cmocka_unit_test(zeroing_fast_writes_no_zeros_as_bytes),
        cmocka_unit_test(a_block_is_what_a_write_copies_nothing_for),
        cmocka_unit_test(tables_of_a_file_that_is_cut_off_meanwhile_are_missed),
        cmocka_unit_test(snapshots_inside_are_listed_without_the_parent),
    };

    if (!mkdtemp(dir))
        return 1;
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    rmdir(dir);
    return r;
}
