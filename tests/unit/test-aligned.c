/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Any offset, length and buffer on files that take only aligned ones: a file in memory that refuses
 * everything else, O_DIRECT on a file system, O_DIRECT on a device with sectors of 4096 bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/error.h"
#include "storage/aligned.h"
#include "storage/posix.h"
#include "storage/storage.h"
#include "place.h"

#define BLOCK 4096u
#define BYTES (1u << 20)

/* ------------------------------------------------------------------ a strict file in memory */

static const struct dr_file_ops *memory_ops;
static struct dr_file_ops strict_ops;

static bool at_block(uint64_t off, uint64_t len, const void *buf)
{
    return off % BLOCK == 0 && len % BLOCK == 0 && (uintptr_t)buf % 512 == 0;
}

static ssize_t strict_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    ssize_t n = at_block(off, len, buf) ? memory_ops->pread(f, buf, off, len) : -EINVAL;
    sched_yield(); /* between the look at a block and its change */
    return n;
}

static int strict_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    uint64_t at = off;
    for (int i = 0; i < n; i++) {
        bool at_end = i == n - 1 && at + iov[i].iov_len >= dr_file_size(f);
        if (!at_block(at, at_end ? 0 : iov[i].iov_len, iov[i].iov_base))
            return -EINVAL;
        at += iov[i].iov_len;
    }
    return memory_ops->pwritev(f, iov, n, off);
}

static int strict_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags)
{
    bool at_end = off + len >= dr_file_size(f);
    return at_block(off, at_end ? 0 : len, NULL) ? memory_ops->zero(f, off, len, flags) : -EINVAL;
}

struct target {
    struct dr_fs *fs;
    struct dr_file *f;
    char path[128];
    bool fixed; /* a device: its size stays */
};

static void strict_open(struct target *t)
{
    t->fs = dr_fs_memory_new();
    t->f = open_on(t->fs, "/f", DR_FILE_CREATE);
    memory_ops = t->f->ops;
    strict_ops = *memory_ops;
    strict_ops.pread = strict_pread;
    strict_ops.pwritev = strict_pwritev;
    strict_ops.zero = strict_zero;
    t->f->ops = &strict_ops;
    t->f->read_align = t->f->write_align = BLOCK;
    t->f->mem_align = 512;
}

static void strict_close(struct target *t)
{
    t->f->ops = memory_ops;
    dr_file_unref(t->f);
    dr_fs_memory_free(t->fs);
}

/* ------------------------------------------------------------------ against a plain buffer */

static uint64_t seed;

static uint64_t next_random(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 24) % below;
}

static uint8_t expected[BYTES], now[BYTES];

static void random_write(struct dr_file *f, uint64_t off, size_t len)
{
    static uint8_t buf[40000 + 8];
    uint8_t *from = buf + next_random(8);
    size_t half = next_random(len);
    memset(from, (int)(1 + next_random(255)), half);
    memset(from + half, (int)(1 + next_random(255)), len - half);
    memcpy(expected + off, from, len);
    struct iovec iov[3] = {{from, half}, {NULL, 0}, {from + half, len - half}};
    assert_ok(next_random(8) ? dr_file_pwritev(f, iov, 3, off, &err)
                             : dr_file_pwritev_durable(f, iov, 3, off, &err));
}

static void random_changes(struct target *t)
{
    uint64_t size = t->fixed ? BYTES : 0;
    memset(expected, 0, sizeof(expected));
    if (t->fixed)
        assert_ok(dr_file_zero(t->f, 0, BYTES, 0, &err));
    for (unsigned i = 0; i < 600; i++) {
        uint64_t off = next_random(BYTES - 40000);
        size_t len = 1 + next_random(next_random(2) ? 700 : 40000);
        if (next_random(4) == 0) {
            off = dr_round_down(off, BLOCK);
            len = BLOCK * (1 + len / 5000); /* fits in 40000 */
        }
        unsigned what = (unsigned)next_random(8);
        if (what < 5) {
            random_write(t->f, off, len);
        } else if (what < 7 || t->fixed) {
            memset(expected + off, 0, len);
            assert_ok(dr_file_zero(t->f, off, len, what & 1 ? DR_FILE_ZERO_PUNCH : 0, &err));
        } else {
            memset(expected + off, 0, BYTES - off);
            assert_ok(dr_file_truncate(t->f, off, &err));
            size = off;
            continue;
        }
        size = dr_max(size, off + len);
        if (i % 20)
            continue;
        uint64_t from = next_random(size);
        assert_int_equal(dr_file_size(t->f), size);
        assert_ok(dr_file_pread(t->f, now, from, size - from, &err));
        assert_memory_equal(now, expected + from, size - from);
    }
    assert_ok(dr_file_flush(t->f, &err));
    assert_ok(dr_file_refresh_size(t->f, &err));
    assert_true(t->fixed || dr_file_size(t->f) == size);
    size_t got;
    assert_ok(dr_file_pread_short(t->f, now, 0, BYTES, &got, &err));
    assert_int_equal(got, dr_min(dr_file_size(t->f), BYTES));
    assert_memory_equal(now, expected, BYTES);
}

/* ------------------------------------------------------------------ neighbours */

#define THREADS 4
#define ROUNDS  400

static pthread_barrier_t all_here;

struct neighbour {
    struct dr_file *f;
    unsigned n;
};

/* Every thread has sectors of its own, which share blocks with those of the others. */
static void *write_sectors(void *user)
{
    struct neighbour *w = user;
    uint8_t sector[512], back[512];
    pthread_barrier_wait(&all_here);
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t off = ((i % 8) * THREADS + w->n) * sizeof(sector);
        memset(sector, (int)(1 + i + w->n * 50), sizeof(sector));
        if (dr_file_pwrite(w->f, sector, off, sizeof(sector), NULL) ||
            dr_file_pread(w->f, back, off, sizeof(back), NULL) ||
            memcmp(sector, back, sizeof(sector)) != 0)
            return w;
    }
    return NULL;
}

static void check_neighbours(struct target *t)
{
    pthread_t threads[THREADS];
    struct neighbour workers[THREADS];
    pthread_barrier_init(&all_here, NULL, THREADS);
    for (unsigned i = 0; i < THREADS; i++) {
        workers[i] = (struct neighbour){t->f, i};
        assert_int_equal(pthread_create(&threads[i], NULL, write_sectors, &workers[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        void *failed;
        pthread_join(threads[i], &failed);
        assert_null(failed);
    }
    pthread_barrier_destroy(&all_here);
}

static void a_strict_file_takes_any_request(void **state)
{
    (void)state;
    struct target t = {0};
    strict_open(&t);
    seed = 1;
    random_changes(&t);
    strict_close(&t);
}

static void neighbours_in_one_block_keep_their_bytes(void **state)
{
    (void)state;
    struct target t = {0};
    strict_open(&t);
    check_neighbours(&t);
    strict_close(&t);
}

/* ------------------------------------------------------------------ one after the other */

struct queued {
    struct dr_file *file;
    uint64_t off, len;
    struct dr_busy_range range;
    unsigned turn;
};

static _Atomic unsigned turns;

static void *lock_range(void *user)
{
    struct queued *q = user;
    dr_aligned_begin(q->file, q->off, q->len, &q->range);
    q->turn = atomic_fetch_add(&turns, 1);
    return NULL;
}

/* Until so many ranges are locked or wait. */
static void wait_for_ranges(struct dr_file *f, unsigned wanted)
{
    time_t until = time(NULL) + 20;
    for (unsigned n = 0; n < wanted;) {
        sched_yield();
        n = 0;
        pthread_mutex_lock(&f->range_lock);
        for (struct dr_busy_range *r = f->busy; r; r = r->next)
            n++;
        pthread_mutex_unlock(&f->range_lock);
        if (time(NULL) > until)
            fail_msg("%u ranges, not %u", n, wanted);
    }
}

/* The end is locked with all that lies behind it: who writes there comes later. */
static void a_writer_of_the_last_block_is_not_overtaken(void **state)
{
    struct target t;
    (void)state;
    strict_open(&t);
    assert_int_equal(dr_file_truncate(t.f, 2 * BLOCK, NULL), 0);
    struct queued first = {.file = t.f, .off = BLOCK, .len = BLOCK};
    struct queued end = {.file = t.f, .off = BLOCK, .len = BLOCK + 100};
    struct queued behind = {.file = t.f, .off = 8 * BLOCK, .len = BLOCK};
    pthread_t a, b;
    atomic_store(&turns, 0);
    lock_range(&first);
    assert_int_equal(pthread_create(&a, NULL, lock_range, &end), 0);
    wait_for_ranges(t.f, 2);
    assert_int_equal(pthread_create(&b, NULL, lock_range, &behind), 0);
    wait_for_ranges(t.f, 3);
    dr_aligned_end(t.f, &first.range);
    pthread_join(a, NULL);
    dr_aligned_end(t.f, &end.range);
    pthread_join(b, NULL);
    dr_aligned_end(t.f, &behind.range);
    assert_int_equal(end.turn, 1);
    assert_int_equal(behind.turn, 2);
    strict_close(&t);
}

static void what_fits_is_handed_through_as_it_is(void **state)
{
    (void)state;
    struct target t = {0};
    static uint8_t blocks[2][BLOCK] __attribute__((aligned(BLOCK)));
    strict_open(&t);
    struct iovec iov[2] = {{blocks[0], BLOCK}, {blocks[1], BLOCK}};
    memset(blocks, 7, sizeof(blocks));
    assert_ok(dr_file_pwritev(t.f, iov, 2, BLOCK, &err));
    assert_ptr_equal(iov[0].iov_base, blocks[0]); /* nothing was taken out */
    assert_ok(dr_file_pread(t.f, now, 0, 3 * BLOCK, &err));
    assert_true(dr_is_zero(now, BLOCK));
    assert_memory_equal(now + BLOCK, blocks, sizeof(blocks));
    strict_close(&t);
}

/* ------------------------------------------------------------------ O_DIRECT */

static bool is_direct(const struct dr_file *f)
{
    const struct posix_file *p = (const struct posix_file *)f;
    return fcntl(p->fd, F_GETFL) & O_DIRECT;
}

static void direct_files_have_the_same_bytes(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct target t = {.f = open_ok(p, p->path, DR_FILE_DIRECT)};
    bool direct = is_direct(t.f);
    assert_ok(dr_file_upgrade(t.f, &err));
    assert_int_equal(is_direct(t.f), direct);
    for (seed = 2; seed < 5; seed++) {
        random_changes(&t);
        struct dr_file *cached = open_ok(p, p->path, DR_FILE_FORCE_SHARE);
        assert_false(is_direct(cached));
        memset(now, 1, sizeof(now));
        assert_ok(dr_file_pread_short(cached, now, 0, BYTES, NULL, &err));
        assert_memory_equal(now, expected, BYTES);
        dr_file_unref(cached);
        assert_ok(dr_file_truncate(t.f, 0, &err));
    }
    check_neighbours(&t);
    assert_ok(dr_file_downgrade(t.f, &err));
    assert_int_equal(is_direct(t.f), direct);
    assert_ok(dr_file_pread(t.f, now, 1, 5000, &err));
    dr_file_unref(t.f);
    if (!direct) {
        print_message("this file system has no O_DIRECT: only the way without was tested\n");
        skip();
    }
}

static void direct_files_are_copied_in_the_kernel_or_by_hand(void **state)
{
    struct place *p = *state;
    struct dr_file *a = open_ok(p, p->path, DR_FILE_CREATE | DR_FILE_DIRECT);
    struct dr_file *b = open_ok(p, p->other, DR_FILE_CREATE | DR_FILE_DIRECT);
    uint64_t copied;
    memset(expected, 9, BYTES);
    assert_ok(dr_file_pwrite(a, expected, 0, 100001, &err));
    int r = dr_file_copy(b, 4096, a, 0, 100001, &copied, NULL);
    assert_true(r == 0 || r == -ENOTSUP);
    if (r == 0) {
        assert_int_equal(dr_file_size(b), 4096 + copied);
        assert_ok(dr_file_pread(b, now, 4096, copied, &err));
        assert_memory_equal(now, expected, copied);
    }
    dr_file_unref(a);
    dr_file_unref(b);
}

/* A file system without O_DIRECT, or with a device below that wants more than we give. */
static void where_direct_is_refused_the_cache_serves(void **state)
{
    (void)state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f;
    if (dr_file_open(dr_fs_posix(), "/proc/sys/kernel/ostype", DR_FILE_DIRECT | DR_FILE_NO_LOCK, &f,
                     &err))
        fail_msg("%s", err.text);
    assert_false(is_direct(f));
    assert_int_equal(dr_file_pread(f, now, 1, 3, NULL), 0);
    dr_file_unref(f);
}

static char device[64];

/* Also after a failure: a device that is left behind outlives the test. */
static int teardown_device(void **state)
{
    char cmd[128];
    snprintf(cmd, sizeof(cmd), "PATH=$PATH:/sbin:/usr/sbin losetup -d %s", device);
    int r = device[0] ? system(cmd) : 0;
    return teardown_posix(state) | r;
}

static bool attach(struct place *p)
{
    char cmd[512];
    snprintf(cmd, sizeof(cmd),
             "PATH=$PATH:/sbin:/usr/sbin; truncate -s %u %s && losetup -b 4096 -f --show %s "
             "2>/dev/null",
             BYTES, p->path, p->path);
    FILE *out = popen(cmd, "r");
    bool ok = fgets(device, sizeof(device), out) != NULL;
    device[strcspn(device, "\n")] = '\0';
    return pclose(out) == 0 && ok;
}

static void a_device_of_large_sectors_takes_any_request(void **state)
{
    struct place *p = *state;
    if (geteuid() != 0 || !attach(p)) {
        print_message("only root can make loop devices\n");
        skip();
    }
    struct target t = {.fixed = true, .f = open_ok(p, device, DR_FILE_RDWR | DR_FILE_DIRECT)};
    assert_true(is_direct(t.f));
    assert_int_equal(t.f->write_align, 4096);
    seed = 6;
    random_changes(&t);
    check_neighbours(&t);
    dr_file_unref(t.f);
}

static blkcnt_t blocks_of(const char *path)
{
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return st.st_blocks;
}

/* Whole sectors are given back; the rest of the range is written. */
static void a_device_gives_back_the_space_of_zeros(void **state)
{
    struct place *p = *state;
    const uint64_t off = 5 * 4096 + 100, len = 20 * 4096;
    uint8_t *buf = malloc(BYTES);
    if (geteuid() != 0 || !attach(p)) {
        print_message("only root can make loop devices\n");
        free(buf);
        skip();
    }
    struct dr_file *f = open_ok(p, device, DR_FILE_RDWR);
    memset(buf, 0xaa, BYTES);
    assert_ok(dr_file_pwrite(f, buf, 0, BYTES, &err));
    assert_ok(dr_file_flush(f, &err));
    blkcnt_t before = blocks_of(p->path);
    assert_ok(dr_file_zero(f, off, len, DR_FILE_ZERO_PUNCH, &err));
    assert_ok(dr_file_flush(f, &err));
    assert_true(blocks_of(p->path) <= before - 19 * 4096 / 512);
    assert_ok(dr_file_pread(f, buf, 0, BYTES, &err));
    for (uint64_t i = 0; i < BYTES; i++)
        assert_int_equal(buf[i], i - off < len ? 0 : 0xaa);
    dr_file_unref(f);
    free(buf);
}

/* ------------------------------------------------------------------ durable writes */

static unsigned flushes, durable_writes;
static int durable_result;

static int count_flush(struct dr_file *f)
{
    (void)f;
    flushes++;
    return 0;
}

static int count_durable(struct dr_file *f, struct iovec *iov, int n, uint64_t off)
{
    durable_writes++;
    int r = durable_result < 0 ? durable_result : memory_ops->pwritev(f, iov, n, off);
    return r < 0 ? r : durable_result;
}

static int write_durably(struct dr_file *f, struct dr_error *err)
{
    char text[] = "durable";
    struct iovec iov = {text, 7};
    return dr_file_pwritev_durable(f, &iov, 1, 100, err);
}

static void a_durable_write_is_one_call_where_there_is_one(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f = open_on(fs, "/f", DR_FILE_CREATE);
    memory_ops = f->ops;
    strict_ops = *memory_ops;
    strict_ops.flush = count_flush;
    f->ops = &strict_ops;
    assert_ok(dr_file_flush(f, &err)); /* the new inode */
    flushes = durable_writes = 0;
    assert_ok(write_durably(f, &err));
    assert_int_equal(flushes, 1);
    strict_ops.pwritev_durable = count_durable;
    durable_result = 0;
    assert_ok(write_durably(f, &err));
    assert_int_equal(durable_writes, 1);
    assert_ok(dr_file_flush(f, &err)); /* nothing is left to flush */
    assert_int_equal(flushes, 1);
    durable_result = 1; /* written, but not durable */
    assert_ok(write_durably(f, &err));
    assert_int_equal(flushes, 2);
    assert_ok(dr_file_pread(f, now, 100, 7, &err));
    assert_memory_equal(now, "durable", 7);
    durable_result = -ENOSPC;
    assert_fails(write_durably(f, &err), ENOSPC, "cannot write durably");
    durable_result = -EIO;
    assert_fails(write_durably(f, &err), EIO, "cannot write durably");
    durable_result = 0;
    assert_fails(write_durably(f, &err), EIO, "earlier flush failed");
    assert_fails(dr_file_flush(f, &err), EIO, "earlier flush failed");
    assert_int_equal(durable_writes, 4);
    f->ops = memory_ops;
    dr_file_unref(f);
    f = open_on(fs, "/g", DR_FILE_CREATE | DR_FILE_NO_FLUSH);
    f->ops = &strict_ops;
    assert_ok(write_durably(f, &err));
    assert_int_equal(durable_writes, 4);
    assert_int_equal(flushes, 2);
    f->ops = memory_ops;
    dr_file_unref(f);
    dr_fs_memory_free(fs);
}

int main(void)
{
#define P(test) cmocka_unit_test_setup_teardown(test, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_strict_file_takes_any_request),
        cmocka_unit_test(neighbours_in_one_block_keep_their_bytes),
        cmocka_unit_test(a_writer_of_the_last_block_is_not_overtaken),
        cmocka_unit_test(what_fits_is_handed_through_as_it_is),
        P(direct_files_have_the_same_bytes),
        P(direct_files_are_copied_in_the_kernel_or_by_hand),
        cmocka_unit_test(where_direct_is_refused_the_cache_serves),
        cmocka_unit_test_setup_teardown(a_device_of_large_sectors_takes_any_request, setup_posix,
                                        teardown_device),
        cmocka_unit_test_setup_teardown(a_device_gives_back_the_space_of_zeros, setup_posix,
                                        teardown_device),
        cmocka_unit_test(a_durable_write_is_one_call_where_there_is_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
