/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The storage contract, the same tests over the operating system's files and over memory. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/error.h"
#include "storage/storage.h"
#include "place.h"

static int setup_memory(void **state)
{
    struct place *p = calloc(1, sizeof(*p));
    p->fs = dr_fs_memory_new();
    strcpy(p->dir, "/d");
    strcpy(p->path, "/d/a.img");
    strcpy(p->other, "/d/b.img");
    *state = p;
    return 0;
}

static int teardown_memory(void **state)
{
    struct place *p = *state;
    dr_fs_memory_free(p->fs);
    free(p);
    return 0;
}

static void assert_bytes(struct dr_file *f, uint64_t off, size_t len, int value)
{
    uint8_t *buf = malloc(len);
    assert_ok(dr_file_pread(f, buf, off, len, &err));
    for (size_t i = 0; i < len; i++)
        if (buf[i] != value)
            fail_msg("byte %zu is 0x%02x, not 0x%02x", (size_t)off + i, buf[i], value);
    free(buf);
}

static void fill(struct dr_file *f, uint64_t off, size_t len, int value)
{
    uint8_t *buf = malloc(len);
    memset(buf, value, len);
    assert_ok(dr_file_pwrite(f, buf, off, len, &err));
    free(buf);
}

/* ------------------------------------------------------------------ bytes */

static void what_is_written_is_read(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    fill(f, 1000, 70000, 0x5a);
    assert_int_equal(dr_file_size(f), 71000);
    assert_bytes(f, 0, 1000, 0);
    assert_bytes(f, 1000, 70000, 0x5a);
    char a[600], b[5000];
    memset(a, 1, sizeof(a));
    memset(b, 2, sizeof(b));
    struct iovec iov[3] = {{a, sizeof(a)}, {NULL, 0}, {b, sizeof(b)}};
    assert_ok(dr_file_pwritev(f, iov, 3, 4000, &err));
    assert_bytes(f, 4000, 600, 1);
    assert_bytes(f, 4600, 5000, 2);
    assert_bytes(f, 9600, 100, 0x5a);
    dr_file_unref(f);
    f = open_ok(p, p->path, 0);
    assert_int_equal(dr_file_size(f), 71000);
    assert_bytes(f, 4600, 5000, 2);
    dr_file_unref(f);
}

static void many_buffers_are_written_in_one_call(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    static uint8_t buf[1024][3];
    struct iovec iov[1024];
    for (int i = 0; i < 1024; i++) {
        memset(buf[i], i, 3);
        iov[i] = (struct iovec){buf[i], 3};
    }
    assert_ok(dr_file_pwritev(f, iov, 1024, 7, &err));
    uint8_t back[1024][3];
    assert_ok(dr_file_pread(f, back, 7, sizeof(back), &err));
    assert_memory_equal(back, buf, sizeof(buf));
    dr_file_unref(f);
}

static void reading_past_the_end_says_where_it_ends(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    char buf[64];
    size_t got;
    fill(f, 0, 100, 7);
    assert_fails(dr_file_pread(f, buf, 90, 20, &err), EIO, "ends at 100");
    assert_fails(dr_file_pread(f, buf, 5000, 20, &err), EIO, "ends at 100");
    assert_ok(dr_file_pread_short(f, buf, 90, 20, &got, &err));
    assert_int_equal(got, 10);
    assert_int_equal(buf[9], 7);
    assert_true(dr_is_zero(buf + 10, 10));
    assert_ok(dr_file_pread_short(f, buf, UINT64_MAX - 3, 20, &got, &err));
    assert_int_equal(got, 0);
    assert_ok(dr_file_pread(f, buf, 100, 0, &err));
    dr_file_unref(f);
}

static void offsets_that_no_file_has_are_refused(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    char b = 0;
    assert_fails(dr_file_pwrite(f, &b, UINT64_MAX, 1, &err), EFBIG, "beyond any file");
    assert_fails(dr_file_pread(f, &b, (uint64_t)INT64_MAX, 1, &err), EFBIG, "beyond any file");
    assert_fails(dr_file_zero(f, 1, UINT64_MAX, 0, &err), EFBIG, "beyond any file");
    assert_fails(dr_file_truncate(f, UINT64_MAX, &err), EFBIG, "beyond any file");
    dr_file_unref(f);
}

static void a_reader_cannot_write(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *f = open_ok(p, p->path, 0);
    assert_fails(dr_file_pwrite(f, "x", 0, 1, &err), EBADF, "not open for writing");
    assert_fails(dr_file_truncate(f, 5, &err), EBADF, "not open for writing");
    assert_fails(dr_file_zero(f, 0, 5, 0, &err), EBADF, "not open for writing");
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ zeros, holes, size */

static void zero_range(struct place *p, unsigned flags)
{
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE | DR_FILE_TRUNCATE);
    fill(f, 0, 100000, 3);
    assert_ok(dr_file_zero(f, 5001, 50000, flags, &err));
    assert_bytes(f, 0, 5001, 3);
    assert_bytes(f, 5001, 50000, 0);
    assert_bytes(f, 55001, 44999, 3);
    assert_ok(dr_file_zero(f, 90000, 200000, flags, &err));
    assert_int_equal(dr_file_size(f), 290000);
    assert_bytes(f, 55001, 34999, 3);
    assert_bytes(f, 90000, 200000, 0);
    assert_ok(dr_file_zero(f, 400000, 100, flags, &err));
    assert_int_equal(dr_file_size(f), 400100);
    assert_bytes(f, 90000, 310100, 0);
    assert_ok(dr_file_zero(f, 10, 20, flags, &err));
    assert_bytes(f, 0, 10, 3);
    assert_bytes(f, 10, 20, 0);
    assert_bytes(f, 30, 10, 3);
    assert_ok(dr_file_refresh_size(f, &err));
    assert_int_equal(dr_file_size(f), 400100);
    dr_file_unref(f);
}

static void zeroed_bytes_read_as_zeros(void **state)
{
    zero_range(*state, 0);
    zero_range(*state, DR_FILE_ZERO_PUNCH);
}

static int no_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    (void)f;
    (void)off;
    (void)len;
    (void)flags;
    return -ENOTSUP;
}

static void zeros_are_written_where_the_container_cannot(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    const struct dr_file_ops *good = f->ops;
    struct dr_file_ops bad = *good;
    bad.zero = no_zero;
    f->ops = &bad;
    fill(f, 0, 5 << 20, 9);
    assert_ok(dr_file_zero(f, 3, 4 << 20, 0, &err));
    assert_bytes(f, 0, 3, 9);
    assert_bytes(f, 3, 4 << 20, 0);
    assert_bytes(f, 3 + (4 << 20), 1000, 9);
    assert_ok(dr_file_zero(f, (5 << 20) - 1, 1 << 30, 0, &err));
    assert_int_equal(dr_file_size(f), (5 << 20) - 1 + (1 << 30));
    assert_ok(dr_file_zero(f, 2ull << 30, 100, 0, &err)); /* behind the end */
    assert_int_equal(dr_file_size(f), (2ull << 30) + 100);
    assert_bytes(f, 2ull << 30, 100, 0);
    assert_fails(dr_file_zero(f, 0, 10, DR_FILE_ZERO_FAST, &err), ENOTSUP, "without writing");
    f->ops = good;
    dr_file_unref(f);
}

/* Inside the file and behind its end, by either way, and where the container cannot reserve. */
static void allocated_zeros_take_their_space(void **state)
{
    static const unsigned how[] = {DR_FILE_ZERO_ALLOCATE, DR_FILE_ZERO_WRITE};
    struct place *p = *state;
    for (unsigned i = 0; i < 2; i++) {
        struct dr_file *f = open_ok(p, i ? p->other : p->path, DR_FILE_CREATE);
        uint8_t junk[100], got[1 << 16];
        uint64_t bytes;
        memset(junk, 7, sizeof(junk));
        assert_ok(dr_file_pwrite(f, junk, 3000, sizeof(junk), &err));
        assert_ok(dr_file_truncate(f, 1 << 20, &err));
        assert_ok(dr_file_zero(f, 3001, (2 << 20) - 3001, how[i], &err));
        assert_int_equal(dr_file_size(f), 2 << 20);
        assert_ok(dr_file_usage(f, &bytes, &err));
        assert_true(bytes >= 2 << 20);
        for (uint64_t off = 0; off < 2 << 20; off += sizeof(got)) {
            assert_ok(dr_file_pread(f, got, off, sizeof(got), &err));
            for (size_t at = 0; at < sizeof(got); at++)
                assert_int_equal(got[at], off + at == 3000 ? 7 : 0);
        }
        dr_file_unref(f);
    }
}

static void holes_and_data_are_told_apart(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    enum dr_file_extent kind;
    uint64_t run;
    assert_ok(dr_file_truncate(f, 16 << 20, &err));
    fill(f, 4 << 20, 1 << 20, 1);
    assert_ok(dr_file_extent(f, 0, 16 << 20, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_HOLE);
    assert_int_equal(run, 4 << 20);
    assert_ok(dr_file_extent(f, 4 << 20, 12 << 20, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_DATA);
    assert_int_equal(run, 1 << 20);
    assert_ok(dr_file_extent(f, (4 << 20) + 4096, 100, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_DATA);
    assert_int_equal(run, 100);
    assert_ok(dr_file_extent(f, 5 << 20, 100 << 20, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_HOLE);
    assert_ok(dr_file_extent(f, 16 << 20, 4711, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_HOLE);
    assert_int_equal(run, 4711);
    assert_ok(dr_file_zero(f, 4 << 20, 1 << 20, DR_FILE_ZERO_PUNCH, &err));
    assert_ok(dr_file_extent(f, 0, 16 << 20, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_HOLE);
    assert_int_equal(run, 16 << 20);
    dr_file_unref(f);
}

static void a_shorter_file_forgets_what_was_behind(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    fill(f, 0, 10000, 8);
    assert_ok(dr_file_truncate(f, 5000, &err));
    assert_ok(dr_file_truncate(f, 10000, &err));
    assert_bytes(f, 0, 5000, 8);
    assert_bytes(f, 5000, 5000, 0);
    dr_file_unref(f);
    f = open_ok(p, p->path, DR_FILE_RDWR | DR_FILE_TRUNCATE);
    assert_int_equal(dr_file_size(f), 0);
    dr_file_unref(f);
}

static void sizes_beyond_16_tib_work_in_memory(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    uint64_t far = (uint64_t)1 << 62;
    enum dr_file_extent kind;
    uint64_t run;
    fill(f, far, 5000, 4);
    assert_int_equal(dr_file_size(f), far + 5000);
    assert_bytes(f, far, 5000, 4);
    assert_ok(dr_file_extent(f, 0, far + 5000, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_HOLE);
    assert_int_equal(run, far);
    fill(f, 0, 10, 5);
    assert_bytes(f, 0, 10, 5);
    assert_bytes(f, far, 5000, 4);
    assert_ok(dr_file_truncate(f, far + 1, &err));
    assert_ok(dr_file_truncate(f, far + 10, &err));
    assert_bytes(f, far, 1, 4);
    assert_bytes(f, far + 1, 9, 0);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ against a plain buffer */

#define SHADOW_BYTES (1u << 20)

static uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 24;
}

struct shadow {
    uint8_t bytes[SHADOW_BYTES];
    uint64_t size, seed;
};

static void random_change(struct dr_file *f, struct shadow *s)
{
    static uint8_t buf[40000];
    uint64_t off = next_random(&s->seed) % (SHADOW_BYTES - sizeof(buf));
    uint64_t len = 1 + next_random(&s->seed) % (next_random(&s->seed) % 2 ? 700 : sizeof(buf));
    unsigned what = (unsigned)(next_random(&s->seed) % 8);
    if (what < 4) {
        memset(buf, (int)(1 + next_random(&s->seed) % 255), len);
        memcpy(s->bytes + off, buf, len);
        assert_ok(dr_file_pwrite(f, buf, off, len, &err));
    } else if (what < 7) {
        memset(s->bytes + off, 0, len);
        assert_ok(dr_file_zero(f, off, len, what & 1 ? DR_FILE_ZERO_PUNCH : 0, &err));
    } else {
        memset(s->bytes + off, 0, SHADOW_BYTES - off);
        assert_ok(dr_file_truncate(f, off, &err));
        s->size = off;
        return;
    }
    s->size = dr_max(s->size, off + len);
}

static void check_shadow(struct dr_file *f, const struct shadow *s)
{
    static uint8_t now[SHADOW_BYTES];
    assert_int_equal(dr_file_size(f), s->size);
    assert_ok(dr_file_pread(f, now, 0, s->size, &err));
    assert_memory_equal(now, s->bytes, s->size);
    enum dr_file_extent kind;
    uint64_t run;
    for (uint64_t off = 0; off < s->size; off += run) {
        assert_ok(dr_file_extent(f, off, s->size - off, &kind, &run, &err));
        assert_true(run > 0 && run <= s->size - off);
        assert_true(kind == DR_FILE_DATA || dr_is_zero(s->bytes + off, run));
    }
}

static void random_changes_match_a_plain_buffer(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    static struct shadow s;
    memset(&s, 0, sizeof(s));
    for (s.seed = 1; s.size < SHADOW_BYTES / 2;)
        random_change(f, &s);
    for (unsigned i = 0; i < 2000; i++) {
        random_change(f, &s);
        if (i % 50 == 0)
            check_shadow(f, &s);
    }
    check_shadow(f, &s);
    assert_ok(dr_file_refresh_size(f, &err));
    assert_int_equal(dr_file_size(f), s.size);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ flush */

static int flush_result;
static int flushes;

static int counting_flush(struct dr_file *f)
{
    (void)f;
    flushes++;
    return flush_result;
}

static void only_what_was_written_is_flushed_and_failures_stick(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *f = open_ok(p, p->path, DR_FILE_RDWR);
    const struct dr_file_ops *good = f->ops;
    struct dr_file_ops counting = *good;
    counting.flush = counting_flush;
    f->ops = &counting;
    flushes = 0;
    flush_result = 0;
    assert_ok(dr_file_flush(f, &err));
    assert_int_equal(flushes, 0);
    fill(f, 0, 10, 1);
    assert_ok(dr_file_flush(f, &err));
    assert_ok(dr_file_flush(f, &err));
    assert_int_equal(flushes, 1);
    fill(f, 0, 10, 2);
    flush_result = -ENOSPC;
    assert_fails(dr_file_flush(f, &err), ENOSPC, "cannot flush");
    flush_result = 0;
    assert_fails(dr_file_flush(f, &err), EIO, "earlier flush failed");
    fill(f, 0, 10, 2);
    assert_fails(dr_file_flush(f, &err), EIO, "earlier flush failed");
    assert_int_equal(flushes, 2);
    f->ops = good;
    dr_file_unref(f);
    f = open_ok(p, p->path, DR_FILE_RDWR);
    fill(f, 0, 10, 3);
    assert_ok(dr_file_flush(f, &err));
    dr_file_unref(f);
}

static _Atomic bool second_came, second_done, second_was_early;

/* Gives the other thread every chance to come back while this flush is not done. */
static int slow_flush(struct dr_file *f)
{
    (void)f;
    while (!second_came)
        sched_yield();
    for (int i = 0; i < 2000; i++)
        sched_yield();
    second_was_early = second_done;
    return 0;
}

static void *flush_second(void *file)
{
    second_came = true;
    intptr_t r = dr_file_flush(file, NULL);
    second_done = true;
    return (void *)r;
}

/* Clean means that nothing is left to do only when nobody is at work on it. */
static void a_second_flush_waits_for_the_first(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    const struct dr_file_ops *good = f->ops;
    struct dr_file_ops slow = *good;
    slow.flush = slow_flush;
    f->ops = &slow;
    pthread_t first, second;
    second_came = second_done = second_was_early = false;
    fill(f, 0, 10, 1);
    /* Whoever is first flushes; the other must not be back before. */
    assert_int_equal(pthread_create(&first, NULL, flush_second, f), 0);
    assert_int_equal(pthread_create(&second, NULL, flush_second, f), 0);
    pthread_join(first, NULL);
    pthread_join(second, NULL);
    assert_false(second_was_early);
    f->ops = good;
    dr_file_unref(f);
}

static void no_flush_flushes_nothing(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE | DR_FILE_NO_FLUSH);
    const struct dr_file_ops *good = f->ops;
    struct dr_file_ops counting = *good;
    counting.flush = counting_flush;
    f->ops = &counting;
    flushes = 0;
    fill(f, 0, 10, 1);
    assert_ok(dr_file_flush(f, &err));
    assert_int_equal(flushes, 0);
    f->ops = good;
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ copy */

static void copying_gives_the_same_bytes_or_says_no(void **state)
{
    struct place *p = *state;
    struct dr_file *a = open_ok(p, p->path, DR_FILE_CREATE);
    struct dr_file *b = open_ok(p, p->other, DR_FILE_CREATE);
    uint64_t copied = 1;
    fill(a, 0, 1 << 20, 6);
    fill(a, 4096, 4096, 7);
    struct dr_error err = DR_ERROR_INIT;
    int r = dr_file_copy(b, 8192, a, 0, 65536, &copied, &err);
    if (r == -ENOTSUP) {
        assert_int_equal(copied, 0);
        assert_int_equal(err.errnum, 0);
        assert_int_equal(dr_file_size(b), 0);
    } else {
        assert_int_equal(r, 0);
        assert_true(copied > 8192 && copied <= 65536);
        assert_int_equal(dr_file_size(b), 8192 + copied);
        assert_bytes(b, 8192, 4096, 6);
        assert_bytes(b, 8192 + 4096, 4096, 7);
    }
    assert_int_equal(dr_file_copy(b, 0, a, 2 << 20, 100, &copied, &err), -ENOTSUP);
    assert_int_equal(err.errnum, 0);
    dr_file_unref(a);
    dr_file_unref(b);
}

/* ------------------------------------------------------------------ names */

static void a_new_file_never_takes_over_a_name(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE), *g;
    fill(f, 0, 10, 1);
    dr_file_unref(f);
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_CREATE, &g, &err), EEXIST, p->path);
    assert_fails(dr_file_open(p->fs, p->other, 0, &g, &err), ENOENT, p->other);
    assert_null(g);
    f = open_ok(p, p->path, DR_FILE_CREATE | DR_FILE_TRUNCATE);
    assert_int_equal(dr_file_size(f), 0);
    dr_file_unref(f);
}

static void files_live_on_without_a_name(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE), *g;
    fill(f, 0, 10, 1);
    assert_ok(p->fs->ops->unlink(p->fs, p->path, &err));
    assert_fails(p->fs->ops->unlink(p->fs, p->path, &err), ENOENT, p->path);
    g = open_ok(p, p->path, DR_FILE_CREATE);
    assert_ptr_not_equal(f, g);
    fill(f, 5, 10, 2);
    fill(g, 0, 10, 3);
    assert_bytes(f, 0, 5, 1);
    assert_bytes(f, 5, 10, 2);
    assert_bytes(g, 0, 10, 3);
    dr_file_unref(f);
    dr_file_unref(g);
}

static void rename_moves_and_replaces(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE), *g;
    g = open_ok(p, p->other, DR_FILE_CREATE);
    fill(f, 0, 10, 1);
    assert_fails(p->fs->ops->rename_new(p->fs, p->path, p->other, &err), EEXIST, p->other);
    assert_ok(p->fs->ops->rename(p->fs, p->path, p->other, &err));
    struct dr_file_id id;
    assert_ok(p->fs->ops->identify(p->fs, p->other, &id, &err));
    assert_int_equal(id.ino, f->id.ino);
    assert_fails(p->fs->ops->identify(p->fs, p->path, &id, &err), ENOENT, p->path);
    assert_ok(p->fs->ops->rename_new(p->fs, p->other, p->path, &err));
    assert_ok(p->fs->ops->identify(p->fs, p->path, &id, &err));
    assert_ok(p->fs->ops->sync_dir(p->fs, p->path, &err));
    dr_file_unref(f);
    dr_file_unref(g);
}

static int see_name(void *user, const char *name)
{
    unsigned *seen = user;
    *seen |= strcmp(name, "a.img") == 0 ? 1u : strcmp(name, "b.img") == 0 ? 2u : 4u;
    return 0;
}

static int stop(void *user, const char *name)
{
    (void)user;
    (void)name;
    return 17;
}

static void a_directory_is_listed_by_name(void **state)
{
    struct place *p = *state;
    unsigned seen = 0;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    dr_file_unref(open_ok(p, p->other, DR_FILE_CREATE));
    assert_ok(p->fs->ops->list(p->fs, p->dir, see_name, &seen, &err));
    assert_int_equal(seen, 3);
    assert_int_equal(p->fs->ops->list(p->fs, p->dir, stop, NULL, NULL), 17);
}

static void real_paths_and_space_are_told(void **state)
{
    struct place *p = *state;
    char path[256], *real;
    uint64_t space;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    snprintf(path, sizeof(path), "%s/./x/../a.img", p->dir);
    if (p->fs == dr_fs_posix())
        snprintf(path, sizeof(path), "%s/./../%s/a.img", p->dir, dr_path_basename(p->dir));
    assert_ok(p->fs->ops->realpath(p->fs, path, &real, &err));
    assert_string_equal(real, p->path);
    free(real);
    assert_ok(p->fs->ops->realpath(p->fs, p->dir, &real, &err));
    assert_string_equal(real, p->dir);
    free(real);
    assert_fails(p->fs->ops->realpath(p->fs, p->other, &real, &err), ENOENT, p->other);
    assert_ok(p->fs->ops->free_space(p->fs, p->path, &space, &err));
    assert_true(space > 0);
}

/* ------------------------------------------------------------------ one object per file */

static void the_same_file_is_the_same_object(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *a = open_ok(p, p->path, 0), *b = open_ok(p, p->path, 0);
    assert_ptr_equal(a, b);
    if (p->fs == dr_fs_posix()) {
        assert_int_equal(link(p->path, p->other), 0);
        struct dr_file *c = open_ok(p, p->other, 0);
        assert_ptr_equal(a, c);
        dr_file_unref(c);
    }
    dr_file_unref(a);
    assert_ok(dr_file_pread(b, NULL, 0, 0, &err));
    dr_file_unref(b);
    dr_file_unref(NULL);
}

/* A reader that shares the file is another object than its writer, and the next one joins it. */
static void a_reader_that_joins_sees_what_was_appended(void **state)
{
    struct place *p = *state;
    struct dr_file *w = open_ok(p, p->path, DR_FILE_CREATE);
    fill(w, 0, 10, 1);
    struct dr_file *first = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
    fill(w, 10, 10, 2);
    struct dr_file *second = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
    assert_ptr_equal(first, second);
    assert_ptr_not_equal(first, w);
    assert_int_equal(dr_file_size(second), 20);
    dr_file_unref(first);
    dr_file_unref(second);
    dr_file_unref(w);
}

static void users_in_one_process_exclude_each_other(void **state)
{
    struct place *p = *state;
    struct dr_file *w = open_ok(p, p->path, DR_FILE_CREATE), *r;
    assert_fails(dr_file_open(p->fs, p->path, 0, &r, &err), EBUSY,
                 "Failed to get shared \"write\" lock");
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &r, &err), EBUSY,
                 "Failed to get \"write\" lock");
    r = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
    assert_true(dr_file_same(r, w));
    dr_file_unref(r);
    r = open_ok(p, p->path, DR_FILE_RDWR | DR_FILE_NO_LOCK);
    assert_true(dr_file_same(r, w));
    dr_file_unref(r);
    dr_file_unref(w);
    r = open_ok(p, p->path, 0);
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &w, &err), EBUSY,
                 "Failed to get \"write\" lock");
    dr_file_unref(r);
    w = open_ok(p, p->path, DR_FILE_RDWR);
    dr_file_unref(w);
}

static void a_writer_joins_force_shared_readers(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *r = open_ok(p, p->path, DR_FILE_FORCE_SHARE), *x;
    struct dr_file *w = open_ok(p, p->path, DR_FILE_RDWR);
    assert_true(dr_file_same(r, w));
    fill(w, 0, 10, 1);
    assert_bytes(r, 0, 10, 1);
    assert_fails(dr_file_open(p->fs, p->path, 0, &x, &err), EBUSY, "lock");
    dr_file_unref(r);
    fill(w, 0, 10, 2);
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &x, &err), EBUSY, "lock");
    dr_file_unref(w);
}

/* Every order in which two users of different kinds can leave. */
static void what_remains_open_has_only_its_own_rights(void **state)
{
    struct place *p = *state;
    static const unsigned shares[] = {DR_FILE_FORCE_SHARE, DR_FILE_NO_LOCK};
    struct dr_file *w, *x;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    for (size_t i = 0; i < 2; i++) {
        struct dr_file *stays = open_ok(p, p->path, shares[i]);
        dr_file_unref(open_ok(p, p->path, DR_FILE_RDWR));
        assert_fails(dr_file_pwrite(stays, "x", 0, 1, &err), EBADF, "not open for writing");
        w = open_ok(p, p->path, DR_FILE_RDWR);
        dr_file_unref(stays);
        fill(w, 0, 10, 1);
        assert_fails(dr_file_open(p->fs, p->path, 0, &x, &err), EBUSY, "lock");
        dr_file_unref(w);
        dr_file_unref(open_ok(p, p->path, 0));
    }
}

static void a_sharing_reader_becomes_the_only_writer(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *f = open_ok(p, p->path, DR_FILE_FORCE_SHARE), *x;
    struct dr_file *w = open_ok(p, p->path, DR_FILE_RDWR);
    assert_fails(dr_file_upgrade(f, &err), EBUSY, "Failed to get \"write\" lock");
    dr_file_unref(w);
    assert_ok(dr_file_upgrade(f, &err));
    fill(f, 0, 10, 1);
    assert_fails(dr_file_open(p->fs, p->path, 0, &x, &err), EBUSY, "lock");
    x = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
    assert_ptr_not_equal(x, f);
    dr_file_unref(x);
    dr_file_unref(f);
    dr_file_unref(open_ok(p, p->path, DR_FILE_RDWR));
}

/* Another thread's flush, say: it must not count as a reader. */
static void a_pinned_file_can_be_upgraded_and_closed(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *f = open_ok(p, p->path, 0), *w;
    dr_file_pin(f);
    assert_ok(dr_file_upgrade(f, &err));
    fill(f, 0, 10, 5);
    dr_file_unref(f);
    w = open_ok(p, p->path, DR_FILE_RDWR);
    assert_ptr_not_equal(w, f);
    assert_ok(dr_file_flush(f, &err));
    assert_bytes(f, 0, 10, 5);
    dr_file_unpin(f);
    fill(w, 0, 10, 6);
    dr_file_unref(w);
}

static void a_reader_becomes_a_writer_and_a_reader_again(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *f = open_ok(p, p->path, 0), *g;
    assert_ok(dr_file_upgrade(f, &err));
    fill(f, 0, 10, 5);
    assert_fails(dr_file_open(p->fs, p->path, 0, &g, &err), EBUSY, "lock");
    assert_ok(dr_file_downgrade(f, &err));
    assert_fails(dr_file_pwrite(f, "x", 0, 1, &err), EBADF, "not open for writing");
    assert_bytes(f, 0, 10, 5);
    g = open_ok(p, p->path, 0);
    assert_fails(dr_file_upgrade(f, &err), EBUSY, "Failed to get \"write\" lock");
    dr_file_unref(g);
    assert_ok(dr_file_upgrade(f, &err));
    dr_file_unref(f);
}

static void impossible_wishes_are_refused(void **state)
{
    struct place *p = *state;
    struct dr_file *f;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR | DR_FILE_FORCE_SHARE, &f, &err), EINVAL,
                 "shared");
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_TRUNCATE, &f, &err), EINVAL, "writing");
}

/* ------------------------------------------------------------------ many threads */

#define THREADS 4
#define ROUNDS  200

struct worker {
    struct place *p;
    struct dr_file *f;
    unsigned n;
};

static void *write_and_flush(void *user)
{
    struct worker *w = user;
    uint8_t buf[512], back[512];
    memset(buf, (int)w->n + 1, sizeof(buf));
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t off = (i * THREADS + w->n) * sizeof(buf);
        struct dr_file *same = NULL;
        if (dr_file_pwrite(w->f, buf, off, sizeof(buf), NULL) ||
            dr_file_pread(w->f, back, off, sizeof(back), NULL) ||
            memcmp(buf, back, sizeof(buf)) != 0)
            return w;
        if (i % 16 == 0 && dr_file_flush(w->f, NULL))
            return w;
        if (dr_file_open(w->p->fs, w->p->path, DR_FILE_FORCE_SHARE, &same, NULL) ||
            !dr_file_same(same, w->f))
            return w;
        dr_file_unref(same);
    }
    return NULL;
}

static void threads_share_a_file(void **state)
{
    struct place *p = *state;
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    pthread_t threads[THREADS];
    struct worker workers[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){p, f, i};
        assert_int_equal(pthread_create(&threads[i], NULL, write_and_flush, &workers[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    assert_int_equal(dr_file_size(f), THREADS * ROUNDS * 512);
    for (unsigned i = 0; i < THREADS * ROUNDS; i++)
        assert_bytes(f, i * 512u, 512, (int)(i % THREADS) + 1);
    dr_file_unref(f);
}

static void *open_and_close(void *user)
{
    struct worker *w = user;
    for (unsigned i = 0; i < ROUNDS; i++) {
        struct dr_file *f;
        if (dr_file_open(w->p->fs, w->p->path, 0, &f, NULL))
            return w;
        dr_file_unref(f);
    }
    return NULL;
}

/* The last one's lock bytes must be gone before the next one's are tested. */
static void opening_while_another_closes_never_fails(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    pthread_t threads[THREADS];
    struct worker w = {p, NULL, 0};
    for (unsigned i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, open_and_close, &w), 0);
    for (unsigned i = 0; i < THREADS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
}

#define BOTH(test)                                                  \
    {"posix: " #test, test, setup_posix, teardown_posix, NULL},     \
    {                                                               \
        "memory: " #test, test, setup_memory, teardown_memory, NULL \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(what_is_written_is_read),
        BOTH(many_buffers_are_written_in_one_call),
        BOTH(reading_past_the_end_says_where_it_ends),
        BOTH(offsets_that_no_file_has_are_refused),
        BOTH(a_reader_cannot_write),
        BOTH(zeroed_bytes_read_as_zeros),
        BOTH(zeros_are_written_where_the_container_cannot),
        BOTH(allocated_zeros_take_their_space),
        BOTH(holes_and_data_are_told_apart),
        BOTH(a_shorter_file_forgets_what_was_behind),
        BOTH(random_changes_match_a_plain_buffer),
        BOTH(only_what_was_written_is_flushed_and_failures_stick),
        BOTH(a_second_flush_waits_for_the_first),
        BOTH(no_flush_flushes_nothing),
        BOTH(copying_gives_the_same_bytes_or_says_no),
        BOTH(a_new_file_never_takes_over_a_name),
        BOTH(files_live_on_without_a_name),
        BOTH(rename_moves_and_replaces),
        BOTH(a_directory_is_listed_by_name),
        BOTH(real_paths_and_space_are_told),
        BOTH(the_same_file_is_the_same_object),
        BOTH(a_reader_that_joins_sees_what_was_appended),
        BOTH(users_in_one_process_exclude_each_other),
        BOTH(a_writer_joins_force_shared_readers),
        BOTH(what_remains_open_has_only_its_own_rights),
        BOTH(a_sharing_reader_becomes_the_only_writer),
        BOTH(a_pinned_file_can_be_upgraded_and_closed),
        BOTH(a_reader_becomes_a_writer_and_a_reader_again),
        BOTH(impossible_wishes_are_refused),
        BOTH(threads_share_a_file),
        BOTH(opening_while_another_closes_never_fails),
        cmocka_unit_test_setup_teardown(sizes_beyond_16_tib_work_in_memory, setup_memory,
                                        teardown_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
