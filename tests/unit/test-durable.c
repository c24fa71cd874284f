/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Durable writes (DR_FUA) to real files, counted in system calls, and direct requests that a file
 * system refuses. The C library's functions of
 * these names are replaced by the ones below, in this program only. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "drover/drover.h"
#include "drover/ops.h"

#define BLOCK 4096

/* ------------------------------------------------------------------ system calls that count */

static struct calls {
    int plain, durable, flushes;
} calls;

static int durable_fails;   /* an errno; 0 = no */
static bool direct_refused; /* O_DIRECT can be set, but no alignment is good enough */

static bool refused_here(int fd)
{
    errno = EINVAL;
    return direct_refused && (fcntl(fd, F_GETFL) & O_DIRECT);
}

ssize_t pwrite(int fd, const void *buf, size_t len, off_t off)
{
    calls.plain++;
    if (refused_here(fd))
        return -1;
    return syscall(SYS_pwrite64, fd, buf, len, off);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t off)
{
    calls.plain++;
    if (refused_here(fd))
        return -1;
    return syscall(SYS_pwritev, fd, iov, n, off, 0);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int n, off_t off, int flags)
{
    assert_int_equal(flags, RWF_DSYNC);
    calls.durable++;
    errno = durable_fails;
    return durable_fails ? -1 : syscall(SYS_pwritev2, fd, iov, n, off, 0, flags);
}

ssize_t pread(int fd, void *buf, size_t len, off_t off)
{
    return refused_here(fd) ? -1 : syscall(SYS_pread64, fd, buf, len, off);
}

int fdatasync(int fd)
{
    calls.flushes++;
    return (int)syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    calls.flushes++;
    return (int)syscall(SYS_fsync, fd);
}

/* ------------------------------------------------------------------ a disk whose bytes are there
 */

struct place {
    char dir[32], path[64];
    struct dr_disk *disk;
};

static struct dr_error err;

static void ok(int r)
{
    if (r < 0)
        fail_msg("%s", err.text);
}

static void write_block(struct place *p, unsigned flags)
{
    uint8_t buf[BLOCK], back[BLOCK];
    memset(buf, 0xa5, sizeof(buf));
    ok(dr_pwrite(p->disk, buf, BLOCK, sizeof(buf), flags, &err));
    ok(dr_pread(p->disk, back, BLOCK, sizeof(back), &err));
    assert_memory_equal(buf, back, sizeof(buf));
}

/* All files are opened again after they were made, so nothing of the making is left to flush. */
static void open_disk(struct place *p, const char *format)
{
    struct dr_create_options o = {.format = format, .size = 1 << 20, .has_size = true};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR, .format = format};
    snprintf(p->path, sizeof(p->path), "%s/%s", p->dir, format);
    ok(dr_create(p->path, &o, &err));
    ok(dr_open(p->path, &rw, &p->disk, &err));
    write_block(p, 0);
    ok(dr_close(p->disk, &err));
    ok(dr_open(p->path, &rw, &p->disk, &err));
    write_block(p, 0);
    ok(dr_flush(p->disk, &err));
    calls = (struct calls){0};
}

static int setup(void **state)
{
    static struct place p;
    strcpy(p.dir, "/tmp/drover-durable-XXXXXX");
    err = (struct dr_error)DR_ERROR_INIT;
    durable_fails = 0;
    direct_refused = false;
    *state = &p;
    return mkdtemp(p.dir) ? 0 : -1;
}

static int teardown(void **state)
{
    struct place *p = *state;
    char command[64];
    dr_close(p->disk, NULL);
    snprintf(command, sizeof(command), "rm -rf '%s'", p->dir);
    return system(command) == 0 ? 0 : -1;
}

static void costs(int plain, int durable, int flushes)
{
    assert_int_equal(calls.plain, plain);
    assert_int_equal(calls.durable, durable);
    assert_int_equal(calls.flushes, flushes);
    calls = (struct calls){0};
}

/* ------------------------------------------------------------------ */

static void a_durable_write_in_place_is_one_call(void **state)
{
    static const char *const formats[] = {"raw", "vmdk", "add-cow"};
    struct place *p = *state;
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        open_disk(p, formats[i]);
        write_block(p, DR_FUA);
        costs(0, 1, 0);
        ok(dr_flush(p->disk, &err)); /* nothing is left to do */
        costs(0, 0, 0);
        if (i + 1 < sizeof(formats) / sizeof(formats[0]))
            ok(dr_close(p->disk, &err));
    }
}

static void a_file_that_cannot_write_durably_is_asked_once(void **state)
{
    struct place *p = *state;
    open_disk(p, "raw");
    durable_fails = EOPNOTSUPP;
    write_block(p, DR_FUA);
    costs(1, 1, 1);
    write_block(p, DR_FUA);
    costs(1, 0, 1);
}

/* After a durable write that failed for want of space nobody knows whether the bytes are there. */
static void a_durable_write_without_space_is_done_in_two_steps_this_once(void **state)
{
    static const int errors[] = {ENOSPC, EDQUOT};
    struct place *p = *state;
    open_disk(p, "raw");
    for (int i = 0; i < 2; i++) {
        durable_fails = errors[i];
        write_block(p, DR_FUA);
        costs(1, 1, 1);
        durable_fails = 0;
        write_block(p, DR_FUA);
        costs(0, 1, 0);
    }
}

static void another_error_of_a_durable_write_is_the_callers(void **state)
{
    struct place *p = *state;
    uint8_t buf[BLOCK] = {0};
    open_disk(p, "raw");
    durable_fails = EIO;
    assert_int_equal(dr_pwrite(p->disk, buf, 0, sizeof(buf), DR_FUA, NULL), -EIO);
    costs(0, 1, 0);
}

static void a_file_that_refuses_direct_requests_is_used_through_the_page_cache(void **state)
{
    struct place *p = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR | DR_OPEN_DIRECT, .format = "raw"};
    open_disk(p, "raw");
    for (int i = 0; i < 2; i++) { /* what comes first: a write, a read */
        uint8_t buf[BLOCK];
        ok(dr_close(p->disk, &err));
        ok(dr_open(p->path, &rw, &p->disk, &err));
        direct_refused = true;
        if (i)
            ok(dr_pread(p->disk, buf, 0, sizeof(buf), &err));
        write_block(p, 0);
        direct_refused = false;
    }
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_durable_write_in_place_is_one_call),
        T(a_file_that_cannot_write_durably_is_asked_once),
        T(a_durable_write_without_space_is_done_in_two_steps_this_once),
        T(another_error_of_a_durable_write_is_the_callers),
        T(a_file_that_refuses_direct_requests_is_used_through_the_page_cache),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
