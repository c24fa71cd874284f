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
    assert_int_equal(dr_truncate(disk, 2 << 20, NULL), -ENOTSUP);
    assert_int_equal(dr_size(disk), 1 << 20);
    dr_close(disk, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_has_a_name_and_the_list_ends),
        cmocka_unit_test(create_options_are_listed_with_their_help),
        cmocka_unit_test(a_raw_disk_grows_with_zeros_and_shrinks),
        cmocka_unit_test(a_size_is_refused_where_it_cannot_be),
    };

    if (!mkdtemp(dir))
        return 1;
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    rmdir(dir);
    return r;
}
