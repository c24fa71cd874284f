/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file that answers slowly makes nobody wait but its own users. Any one call on the slow file can
 * be held up, for as long as the test wants; meanwhile other files are opened, flushed, upgraded
 * and closed. A lock that is shared between files and held over the call would stop that for ever:
 * then the alarm ends the test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "storage/storage.h"
#include "place.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static const char *held_call; /* NULL = none */
static bool inside;           /* somebody waits in it */

static void pass(struct dr_file *f, const char *call)
{
    pthread_mutex_lock(&lock);
    while (held_call && strcmp(held_call, call) == 0 && strstr(f->path, "slow")) {
        inside = true;
        pthread_cond_broadcast(&changed);
        pthread_cond_wait(&changed, &lock);
    }
    pthread_mutex_unlock(&lock);
}

static void hold(const char *call)
{
    pthread_mutex_lock(&lock);
    held_call = call;
    inside = false;
    pthread_mutex_unlock(&lock);
}

static void wait_until_inside(void)
{
    pthread_mutex_lock(&lock);
    while (!inside)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void let_go(void)
{
    pthread_mutex_lock(&lock);
    held_call = NULL;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------ files in memory that can wait
 */

static struct dr_fs *inner;
static const struct dr_file_ops *inner_ops;
static struct dr_file_ops slow_ops;

static int slow_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err)
{
    (void)unshared;
    (void)err;
    pass(f, use ? "lock" : "unlock");
    return 0;
}

static int slow_upgrade(struct dr_file *f, struct dr_error *err)
{
    (void)err;
    pass(f, "upgrade");
    return 0;
}

static int slow_downgrade(struct dr_file *f, struct dr_error *err)
{
    (void)err;
    pass(f, "downgrade");
    return 0;
}

static int slow_get_size(struct dr_file *f, uint64_t *size)
{
    pass(f, "get_size");
    return inner_ops->get_size(f, size);
}

static int slow_flush(struct dr_file *f)
{
    pass(f, "flush");
    return inner_ops->flush(f);
}

static int slow_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    pass(f, "pwritev");
    return inner_ops->pwritev(f, iov, n, off);
}

static ssize_t slow_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    pass(f, "pread");
    return inner_ops->pread(f, buf, off, len);
}

static void slow_close(struct dr_file *f)
{
    pass(f, "close");
    inner_ops->close(f);
}

static int slow_open(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                     struct dr_error *err)
{
    (void)fs;
    int r = inner->ops->open(inner, path, flags, file, err);
    if (r < 0)
        return r;
    (*file)->ops = &slow_ops;
    pass(*file, "open");
    return 0;
}

static int slow_identify(struct dr_fs *fs, const char *path, struct dr_file_id *id,
                         struct dr_error *err)
{
    (void)fs;
    return inner->ops->identify(inner, path, id, err);
}

static struct dr_fs_ops slow_fs_ops = {.open = slow_open, .identify = slow_identify};
static struct dr_fs slow_fs = {.ops = &slow_fs_ops};

static int setup(void **state)
{
    (void)state;
    struct dr_file *f;
    alarm(60);
    inner = dr_fs_memory_new();
    assert_int_equal(dr_file_open(inner, "/slow", DR_FILE_CREATE, &f, NULL), 0);
    inner_ops = f->ops;
    dr_file_unref(f);
    slow_ops = *inner_ops;
    slow_ops.close = slow_close;
    slow_ops.pread = slow_pread;
    slow_ops.pwritev = slow_pwritev;
    slow_ops.get_size = slow_get_size;
    slow_ops.flush = slow_flush;
    slow_ops.lock = slow_lock;
    slow_ops.upgrade = slow_upgrade;
    slow_ops.downgrade = slow_downgrade;
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    alarm(0);
    dr_fs_memory_free(inner);
    return 0;
}

/* ------------------------------------------------------------------ */

/* Every kind of call on a file, in the life of one user. */
static int use_all(const char *path)
{
    struct dr_file *f = NULL;
    char buf[16];
    int r = dr_file_open(&slow_fs, path, 0, &f, NULL);
    if (r == 0)
        r = dr_file_upgrade(f, NULL);
    if (r == 0)
        r = dr_file_pwrite(f, "0123456789abcdef", 0, 16, NULL);
    if (r == 0)
        r = dr_file_flush(f, NULL);
    if (r == 0)
        r = dr_file_downgrade(f, NULL);
    if (r == 0)
        r = dr_file_pread(f, buf, 0, 16, NULL);
    dr_file_unref(f);
    return r;
}

static void *use_slow_file(void *unused)
{
    (void)unused;
    return (void *)(intptr_t)use_all("/slow");
}

#define OTHERS 20

static void a_slow_file_stops_no_other(void **state)
{
    (void)state;
    static const char *const calls[] = {"open",  "lock",  "get_size",  "upgrade", "pwritev",
                                        "flush", "pread", "downgrade", "unlock",  "close"};
    char name[16];
    for (int other = 0; other < OTHERS; other++) {
        struct dr_file *f;
        snprintf(name, sizeof(name), "/%d", other);
        assert_int_equal(dr_file_open(inner, name, DR_FILE_CREATE, &f, NULL), 0);
        dr_file_unref(f);
    }
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        pthread_t thread;
        void *r;
        hold(calls[i]);
        assert_int_equal(pthread_create(&thread, NULL, use_slow_file, NULL), 0);
        wait_until_inside();
        for (int other = 0; other < OTHERS; other++) {
            snprintf(name, sizeof(name), "/%d", other);
            assert_int_equal(use_all(name), 0);
        }
        let_go();
        pthread_join(thread, &r);
        assert_null(r);
    }
}

static void *open_reader(void *out)
{
    return (void *)(intptr_t)dr_file_open(&slow_fs, "/slow", 0, out, NULL);
}

/* A second user of the slow file itself waits until it is known whether the first may stay, and
 * then gets the same object, or one of his own if the first was the last to leave. */
static void a_second_user_waits_for_the_first(void **state)
{
    (void)state;
    static const char *const calls[] = {"lock", "unlock"};
    for (int i = 0; i < 2; i++) {
        struct dr_file *first = NULL, *second = NULL;
        pthread_t a, b;
        void *r;
        hold(calls[i]);
        assert_int_equal(pthread_create(&a, NULL, i ? use_slow_file : open_reader, &first), 0);
        wait_until_inside();
        assert_int_equal(pthread_create(&b, NULL, open_reader, &second), 0);
        let_go();
        pthread_join(a, &r);
        assert_null(r);
        pthread_join(b, &r);
        assert_null(r);
        assert_true(i ? !first : first == second);
        assert_int_equal(dr_file_pread(second, NULL, 0, 0, NULL), 0);
        dr_file_unref(first);
        dr_file_unref(second);
        assert_int_equal(use_all("/slow"), 0); /* nobody is left */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_slow_file_stops_no_other, setup, teardown),
        cmocka_unit_test_setup_teardown(a_second_user_waits_for_the_first, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
