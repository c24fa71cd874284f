/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What one request costs: calls to the files, and locks that requests on other disks wait for, too.
 * The table in docs/design.md has the same figures. */
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "drover/ops.h"
#include "faultfs.h"
#include "ops/ops-internal.h"

#define KIB 1024u
#define MIB (1024u * KIB)

#define ok(expr)                                            \
    do {                                                    \
        struct dr_error err = DR_ERROR_INIT;                \
        int ok_r_ = (expr);                                 \
        if (ok_r_ < 0)                                      \
            fail_msg("%s: %d: %s", #expr, ok_r_, err.text); \
    } while (0)

/* ------------------------------------------------------------------ calls to the files */

struct calls {
    uint64_t reads, writes, zeros, flushes, all;
};

static struct calls counted(struct faultfs *f)
{
    struct calls c = {
        .reads = faultfs_count_of(f, FAULTFS_READ),
        .writes = faultfs_count_of(f, FAULTFS_WRITE),
        .zeros = faultfs_count_of(f, FAULTFS_ZERO),
        .flushes = faultfs_count_of(f, FAULTFS_FLUSH),
        .all = faultfs_count(f),
    };
    faultfs_reset(f);
    return c;
}

static void expect(const char *what, struct calls have, struct calls want)
{
    if (memcmp(&have, &want, sizeof(have)) != 0)
        fail_msg("%s: %llu reads, %llu writes, %llu zeros, %llu flushes, %llu calls in all", what,
                 (unsigned long long)have.reads, (unsigned long long)have.writes,
                 (unsigned long long)have.zeros, (unsigned long long)have.flushes,
                 (unsigned long long)have.all);
}

/* Of each format that can be written, once the tables are in memory and the unit is allocated. */
static void a_request_in_place_is_one_call(void **state)
{
    static const char *const formats[] = {"raw", "vmdk", "add-cow"};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_create_options create = {.format = formats[i], .size = 4 * MIB, .has_size = true};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        uint8_t buf[4096] = {1};
        ok(dr_create_fs(faultfs_fs(f), "disk", &create, &err));
        ok(dr_open_fs(faultfs_fs(f), "disk", &open, &disk, &err));
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
        ok(dr_flush(disk, &err));
        faultfs_reset(f);

        ok(dr_pread(disk, buf, MIB, sizeof(buf), &err));
        expect(formats[i], counted(f), (struct calls){.reads = 1, .all = 1});
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
        expect(formats[i], counted(f), (struct calls){.writes = 1, .all = 1});
        ok(dr_flush(disk, &err));
        expect(formats[i], counted(f), (struct calls){.flushes = 1, .all = 1});
        ok(dr_flush(disk, &err));
        expect(formats[i], counted(f), (struct calls){0});
        ok(dr_pwrite(disk, buf, MIB, sizeof(buf), DR_FUA, &err));
        expect(formats[i], counted(f), (struct calls){.writes = 1, .flushes = 1, .all = 2});
        ok(dr_close(disk, &err));
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* ------------------------------------------------------------------ locks */

#define LOCKS_MAX 256

static __thread bool recording;
static const void *locks[2][LOCKS_MAX];
static size_t n_locks[2];
static int recorded; /* which of the two */

/* Every lock that the library takes comes through here. */
int pthread_mutex_lock(pthread_mutex_t *mutex)
{
    static int (*real)(pthread_mutex_t *);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "pthread_mutex_lock");
    if (recording && n_locks[recorded] < LOCKS_MAX)
        locks[recorded][n_locks[recorded]++] = mutex;
    return real(mutex);
}

static void use(struct dr_disk *disk, int which)
{
    uint8_t buf[4096] = {1};
    recorded = which;
    n_locks[which] = 0;
    recording = true;
    ok(dr_pread(disk, buf, MIB, sizeof(buf), &err));
    ok(dr_pwrite(disk, buf, MIB, sizeof(buf), 0, &err));
    ok(dr_pwrite(disk, buf, MIB, sizeof(buf), DR_FUA, &err));
    ok(dr_flush(disk, &err));
    recording = false;
}

static void requests_in_place_take_no_lock_that_those_on_another_disk_take(void **state)
{
    static const char *const formats[] = {"raw", "vmdk", "add-cow"};
    const char *tmp = getenv("TMPDIR");
    char dir[256], path[2][300], clean[300];
    (void)state;
    snprintf(dir, sizeof(dir), "%s/drover-costs-XXXXXX", tmp ? tmp : "/tmp");
    assert_non_null(mkdtemp(dir));
    for (size_t i = 0; i < 3; i++) {
        struct dr_create_options create = {.format = formats[i], .size = 4 * MIB, .has_size = true};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disks[2];
        uint8_t buf[4096] = {1};
        for (int k = 0; k < 2; k++) {
            snprintf(path[k], sizeof(path[k]), "%s/%s-%d", dir, formats[i], k);
            ok(dr_create(path[k], &create, &err));
            ok(dr_open(path[k], &open, &disks[k], &err));
            ok(dr_pwrite(disks[k], buf, MIB, sizeof(buf), 0, &err));
            ok(dr_flush(disks[k], &err));
        }
        use(disks[0], 0);
        use(disks[1], 1);
        for (size_t a = 0; a < n_locks[0]; a++)
            for (size_t b = 0; b < n_locks[1]; b++)
                if (locks[0][a] == locks[1][b])
                    fail_msg("%s: the %zu. lock of %zu is shared", formats[i], a + 1, n_locks[0]);
        /* The recorder works: an image's own lock is among them. */
        assert_true(strcmp(formats[i], "raw") == 0 || n_locks[0] > 0);
        ok(dr_close(disks[0], &err));
        ok(dr_close(disks[1], &err));
    }
    snprintf(clean, sizeof(clean), "rm -rf '%s'", dir);
    assert_int_equal(system(clean), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_request_in_place_is_one_call),
        cmocka_unit_test(requests_in_place_take_no_lock_that_those_on_another_disk_take),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
