/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writes over NBD that were answered, and not flushed, when the server lost power: they are there
 * when it is back, or the next flush fails. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "drover/drover.h"
#include "slower.h"
#include "storage/nbd-kept.h"
#include "storage/storage.h"
#include "volatile-nbd.h"

#define ALL  (VOLATILE_FLUSH | VOLATILE_FUA | VOLATILE_ZEROES)
#define KIB  1024u
#define MIB  1048576u
#define SIZE ((size_t)16 * KIB)

static char dir[] = "/dev/shm/drover-replay-XXXXXX";

static char *name_of(const char *socket)
{
    char *uri = NULL;
    if (asprintf(&uri, "nbd+unix:///?socket=%s", socket) < 0)
        abort();
    return uri;
}

static char *socket_path(void)
{
    static atomic_uint number;
    char *path = NULL;
    if (asprintf(&path, "%s/%u", dir, atomic_fetch_add(&number, 1)) < 0)
        abort();
    return path;
}

static struct dr_file *open_disk(const char *socket, unsigned flags)
{
    CLEANUP_FREE char *uri = name_of(socket);
    struct dr_error err;
    struct dr_file *f = NULL;
    if (dr_file_open(dr_fs_posix(), uri, DR_FILE_RDWR | flags, &f, &err) < 0)
        fail_msg("%s", err.text);
    return f;
}

static struct volatile_nbd *start(struct volatile_plan *plan)
{
    plan->then_flags = plan->then_flags ? plan->then_flags : plan->flags;
    plan->then_size = plan->then_size ? plan->then_size : plan->size;
    struct volatile_nbd *s = volatile_start(plan);
    assert_non_null(s);
    return s;
}

/* ------------------------------------------------------------------ one writer, one cut */

enum step_kind { WRITE, DURABLE, ZERO, FLUSH, READ };

struct step {
    enum step_kind kind;
    uint64_t off, len;
};

/* Overlaps of all kinds: older writes must not come back over later ones. */
static const struct step program[] = {
    {WRITE, 0, 1024},   {WRITE, 512, 1024}, {READ, 0, 2048},   {ZERO, 1024, 1024},
    {DURABLE, 0, 512},  {WRITE, 4096, 700}, {FLUSH, 0, 0},     {DURABLE, 512, 512},
    {WRITE, 600, 100},  {READ, 0, 2048},    {DURABLE, 0, 700}, {WRITE, 8192, 512},
    {ZERO, 4000, 4500}, {WRITE, 4100, 50},  {READ, 4000, 600}, {WRITE, 0, 300},
    {FLUSH, 0, 0},      {WRITE, 100, 512},  {READ, 0, 1024},   {FLUSH, 0, 0},
};

#define STEPS (sizeof(program) / sizeof(program[0]))

/* 0, or the number of the step that failed or read something else, plus 1. */
static unsigned run_program(struct dr_file *f, uint8_t *shadow, struct dr_error *err)
{
    uint8_t bytes[8192];
    for (unsigned i = 0; i < STEPS; i++) {
        const struct step *p = &program[i];
        int r = 0;
        struct iovec iov = {.iov_base = bytes, .iov_len = (size_t)p->len};
        memset(bytes, (int)i + 1, sizeof(bytes));
        if (p->kind == WRITE)
            r = dr_file_pwrite(f, bytes, p->off, (size_t)p->len, err);
        else if (p->kind == DURABLE)
            r = dr_file_pwritev_durable(f, &iov, 1, p->off, err);
        else if (p->kind == ZERO)
            r = dr_file_zero(f, p->off, p->len, 0, err);
        else if (p->kind == FLUSH)
            r = dr_file_flush(f, err);
        else
            r = dr_file_pread(f, bytes, p->off, (size_t)p->len, err);
        if (r < 0 || (p->kind == READ && memcmp(bytes, shadow + p->off, (size_t)p->len) != 0))
            return i + 1;
        if (p->kind == WRITE || p->kind == DURABLE)
            memset(shadow + p->off, (int)i + 1, (size_t)p->len);
        if (p->kind == ZERO)
            memset(shadow + p->off, 0, (size_t)p->len);
    }
    return 0;
}

static struct volatile_seen run_trial(struct volatile_plan plan, char *wrong, size_t room)
{
    CLEANUP_FREE char *path = socket_path();
    uint8_t shadow[SIZE] = {0};
    struct dr_error err = {.text = ""};
    plan.path = path;
    plan.size = SIZE;
    struct volatile_nbd *s = start(&plan);
    struct dr_file *f = open_disk(path, 0);
    unsigned failed = run_program(f, shadow, &err);
    if (failed)
        snprintf(wrong, room, "step %u: %.200s", failed - 1, err.text);
    else if (!volatile_holds(s, shadow, 0, SIZE))
        snprintf(wrong, room, "the flush lied");
    dr_file_unref(f);
    struct volatile_seen seen = volatile_look(s);
    volatile_stop(s);
    return seen;
}

struct trials {
    struct volatile_plan plan;
    bool answers; /* what they have is counted */
    uint64_t next, end, stride;
    unsigned cuts;
    char wrong[300];
    pthread_mutex_t lock;
};

static void *work(void *user)
{
    struct trials *all = user;
    for (;;) {
        pthread_mutex_lock(&all->lock);
        struct volatile_plan plan = all->plan;
        uint64_t at = all->next;
        all->next += all->stride;
        bool over = at >= all->end || all->wrong[0];
        pthread_mutex_unlock(&all->lock);
        if (over)
            return NULL;
        char wrong[300] = "";
        plan.seed = (unsigned)at;
        plan.lose_all = at % 2;
        *(all->answers ? &plan.after_out : &plan.after_in) = at;
        unsigned cuts = run_trial(plan, wrong, sizeof(wrong)).cuts;
        pthread_mutex_lock(&all->lock);
        all->cuts += cuts;
        if (wrong[0])
            snprintf(all->wrong, sizeof(all->wrong), "cut at byte %llu %s the server: %.200s",
                     (unsigned long long)at, all->answers ? "from" : "to", wrong);
        pthread_mutex_unlock(&all->lock);
    }
}

#define WORKERS 24 /* they wait most of the time */

static void cut_everywhere(struct volatile_plan plan, bool answers)
{
    char wrong[300] = "";
    pthread_t threads[WORKERS];
    struct volatile_seen seen = run_trial(plan, wrong, sizeof(wrong));
    struct trials all = {.plan = plan,
                         .answers = answers,
                         .next = answers ? 153 : 1, /* behind the greeting */
                         .end = answers ? seen.out : seen.in,
                         .stride = getenv("DROVER_TEST_LONG") ? 1 : 47 * SLOWER};
    assert_string_equal(wrong, "");
    pthread_mutex_init(&all.lock, NULL);
    for (int i = 0; i < WORKERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &all), 0);
    for (int i = 0; i < WORKERS; i++)
        pthread_join(threads[i], NULL);
    pthread_mutex_destroy(&all.lock);
    if (all.wrong[0])
        fail_msg("%s", all.wrong);
    assert_true(all.cuts >= (all.end - 200) / all.stride);
}

static void nothing_is_lost_at_whatever_byte_the_power_goes(void **state)
{
    (void)state;
    for (int answers = 0; answers < 2; answers++)
        cut_everywhere((struct volatile_plan){.flags = ALL}, answers);
}

static void nothing_is_lost_without_fua_and_zeros(void **state)
{
    (void)state;
    cut_everywhere((struct volatile_plan){.flags = VOLATILE_FLUSH}, false);
}

/* ------------------------------------------------------------------ many writers and connections
 */

#define WRITERS 8u
#define REGION  ((size_t)64 * KIB)
#define BLOCK   512u

struct writer {
    struct dr_file *f;
    struct volatile_nbd *server;
    unsigned number, seed, rounds;
    uint8_t shadow[REGION];
    char wrong[300];
};

static size_t some(struct writer *w, size_t n)
{
    return (size_t)rand_r(&w->seed) % n;
}

static size_t some_offset(struct writer *w)
{
    return some(w, REGION / BLOCK - 7) * BLOCK;
}

static int write_some(struct writer *w, struct dr_error *err)
{
    uint8_t bytes[8 * BLOCK];
    size_t off = some_offset(w), len = (some(w, 8) + 1) * BLOCK;
    memset(bytes, (int)some(w, 255) + 1, sizeof(bytes));
    int r = dr_file_pwrite(w->f, bytes, w->number * REGION + off, len, err);
    if (r == 0)
        memcpy(w->shadow + off, bytes, len);
    return r;
}

static int read_some(struct writer *w, struct dr_error *err)
{
    uint8_t bytes[8 * BLOCK];
    size_t off = some_offset(w);
    int r = dr_file_pread(w->f, bytes, w->number * REGION + off, sizeof(bytes), err);
    if (r == 0 && memcmp(bytes, w->shadow + off, sizeof(bytes)) != 0)
        return dr_fail(err, EILSEQ, "an older state was read");
    return r;
}

static int flush_all(struct writer *w, struct dr_error *err)
{
    int r = dr_file_flush(w->f, err);
    if (r == 0 && !volatile_holds(w->server, w->shadow, w->number * REGION, REGION))
        return dr_fail(err, EILSEQ, "the flush lied");
    return r;
}

static void *write_region(void *user)
{
    struct writer *w = user;
    struct dr_error err = {.text = ""};
    int r = 0;
    for (unsigned i = 0; i < w->rounds && r == 0; i++) {
        r = write_some(w, &err);
        if (r == 0)
            r = read_some(w, &err);
        if (r == 0 && i % 16 == 0)
            r = flush_all(w, &err);
    }
    if (r < 0)
        snprintf(w->wrong, sizeof(w->wrong), "%.200s", err.text);
    return NULL;
}

/* Power goes again and again, while writers flush, each of which knows what must be there. */
static void write_under_cuts(struct volatile_plan plan, unsigned cuts, unsigned rounds)
{
    CLEANUP_FREE char *path = socket_path();
    CLEANUP_FREE struct writer *w = calloc(WRITERS, sizeof(*w));
    pthread_t threads[WRITERS];
    plan.path = path;
    plan.size = WRITERS * REGION;
    struct volatile_nbd *s = start(&plan);
    struct dr_file *f = open_disk(path, 0);
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i].f = f;
        w[i].server = s;
        w[i].number = w[i].seed = i;
        w[i].rounds = rounds;
        assert_int_equal(pthread_create(&threads[i], NULL, write_region, &w[i]), 0);
    }
    for (unsigned i = 0; i < cuts; i++) {
        unsigned writes = volatile_look(s).writes, tries = 0;
        while (volatile_look(s).writes < writes + 400 && tries++ < 4000)
            nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
        if (i % 2)
            volatile_hang_up(s);
        else
            volatile_cut(s);
    }
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    struct volatile_seen seen = volatile_look(s);
    dr_file_unref(f);
    volatile_stop(s);
    for (unsigned i = 0; i < WRITERS; i++)
        assert_string_equal(w[i].wrong, "");
    assert_true(seen.connections > cuts);
    assert_true(!(plan.flags & VOLATILE_MULTI_CONN) || seen.connections > cuts + 1);
}

static void many_writers_lose_nothing_when_power_goes_again_and_again(void **state)
{
    (void)state;
    write_under_cuts((struct volatile_plan){.flags = ALL | VOLATILE_MULTI_CONN}, 3, 500);
    write_under_cuts((struct volatile_plan){.flags = ALL}, 2, 300);
}

/* The new connection of a busy file leads to the server that is back, while old ones are silent. */
static void a_flush_does_not_pass_by_connections_that_are_dead(void **state)
{
    (void)state;
    setenv("DROVER_NET_TIMEOUT", "1", 1);
    for (unsigned at = 1; at < 4; at += 2)
        write_under_cuts((struct volatile_plan){.flags = ALL | VOLATILE_MULTI_CONN,
                                                .silent = true,
                                                .lose_all = true,
                                                .after_in = at * 3000},
                         0, 40);
    unsetenv("DROVER_NET_TIMEOUT");
}

/* ------------------------------------------------------------------ bounds */

static void fill(struct dr_file *f, unsigned mib, int value, int expected)
{
    CLEANUP_FREE uint8_t *bytes = malloc(MIB);
    struct dr_error err;
    memset(bytes, value, MIB);
    for (unsigned i = 0; i < mib; i++)
        assert_int_equal(dr_file_pwrite(f, bytes, i % 8 * MIB, MIB, &err), expected);
}

static void more_than_is_kept_is_flushed_unasked(void **state)
{
    (void)state;
    CLEANUP_FREE char *path = socket_path();
    CLEANUP_FREE uint8_t *shadow = malloc(8 * MIB);
    struct volatile_plan plan = {.path = path, .size = 8 * MIB, .flags = ALL, .lose_all = true};
    struct volatile_nbd *s = start(&plan);
    struct dr_file *f = open_disk(path, 0);
    struct dr_error err;
    fill(f, 40, 1, 0);
    assert_in_range(volatile_look(s).flushes, 2, 4);
    fill(f, 8, 2, 0);
    volatile_cut(s);
    memset(shadow, 2, 8 * MIB);
    assert_int_equal(dr_file_flush(f, &err), 0);
    assert_true(volatile_holds(s, shadow, 0, 8 * MIB));
    /* Many small ones, too. */
    unsigned before = volatile_look(s).flushes;
    for (unsigned i = 0; i < NBD_KEPT_WRITES / 2 + 10; i++)
        assert_int_equal(dr_file_zero(f, i % 100 * 512, 512, 0, &err), 0);
    assert_in_range(volatile_look(s).flushes, before + 1, before + 2);
    dr_file_unref(f);
    volatile_stop(s);
}

static void what_cannot_be_kept_is_lost_with_a_word(void **state)
{
    (void)state;
    for (int flushes = 0; flushes < 2; flushes++) {
        CLEANUP_FREE char *path = socket_path();
        struct volatile_plan plan = {
            .path = path, .size = 8 * MIB, .flags = flushes ? ALL : VOLATILE_ZEROES};
        struct volatile_nbd *s = start(&plan);
        struct dr_file *f = open_disk(path, flushes ? DR_FILE_NO_FLUSH : 0);
        struct dr_error err = {.text = ""};
        uint8_t byte = 1;
        fill(f, 36, 1, 0);
        assert_int_equal(volatile_look(s).flushes, 0);
        volatile_cut(s);
        while (volatile_look(s).connections < 2) /* a read goes on */
            assert_int_equal(dr_file_pread(f, &byte, 0, 1, &err), 0);
        int r = dr_file_pwrite(f, &byte, 0, 1, &err);
        assert_int_equal(r, -EIO);
        assert_non_null(strstr(err.text, "may not be there"));
        assert_non_null(strstr(err.text, "kept in memory"));
        if (!flushes)
            assert_int_equal(dr_file_flush(f, &err), -EIO);
        dr_file_unref(f);
        volatile_stop(s);
    }
}

static void the_little_that_an_unsafe_writer_wrote_is_written_again(void **state)
{
    (void)state;
    CLEANUP_FREE char *path = socket_path();
    struct volatile_plan plan = {.path = path, .size = MIB, .flags = ALL, .lose_all = true};
    struct volatile_nbd *s = start(&plan);
    struct dr_file *f = open_disk(path, DR_FILE_NO_FLUSH);
    struct dr_error err = {.text = ""};
    uint8_t bytes[512];
    memset(bytes, 7, sizeof(bytes));
    assert_int_equal(dr_file_pwrite(f, bytes, 0, sizeof(bytes), &err), 0);
    volatile_cut(s);
    assert_int_equal(dr_file_pread(f, bytes, 0, sizeof(bytes), &err), 0);
    assert_int_equal(bytes[511], 7);
    assert_int_equal(volatile_look(s).flushes, 0);
    dr_file_unref(f);
    volatile_stop(s);
}

/* ------------------------------------------------------------------ servers that changed */

static void a_flush_to_a_server_that_changed_fails(struct volatile_plan then, const char *why)
{
    CLEANUP_FREE char *path = socket_path();
    struct dr_error err = {.text = ""};
    uint8_t bytes[512] = {1};
    then.path = path;
    then.size = MIB;
    then.flags = ALL;
    then.lose_all = true;
    struct volatile_nbd *s = start(&then);
    struct dr_file *f = open_disk(path, 0);
    assert_int_equal(dr_file_pwrite(f, bytes, 0, sizeof(bytes), &err), 0);
    volatile_cut(s);
    for (int i = 0; i < 2; i++) {
        assert_true(dr_file_flush(f, &err) < 0);
        if (!strstr(err.text, why) || !strstr(err.text, path))
            fail_msg("%s", err.text);
    }
    dr_file_unref(f);
    volatile_stop(s);
}

static void what_another_server_would_not_have_fails_the_flush(void **state)
{
    (void)state;
    a_flush_to_a_server_that_changed_fails((struct volatile_plan){.then_size = MIB / 2},
                                           "another disk");
    a_flush_to_a_server_that_changed_fails(
        (struct volatile_plan){.then_flags = ALL | VOLATILE_READ_ONLY}, "another disk");
    a_flush_to_a_server_that_changed_fails(
        (struct volatile_plan){.then_flags = ALL & ~(unsigned)VOLATILE_FLUSH}, "another disk");
    a_flush_to_a_server_that_changed_fails((struct volatile_plan){.then_errno = 28 /* ENOSPC */},
                                           "No space left");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_is_lost_at_whatever_byte_the_power_goes),
        cmocka_unit_test(nothing_is_lost_without_fua_and_zeros),
        cmocka_unit_test(many_writers_lose_nothing_when_power_goes_again_and_again),
        cmocka_unit_test(a_flush_does_not_pass_by_connections_that_are_dead),
        cmocka_unit_test(more_than_is_kept_is_flushed_unasked),
        cmocka_unit_test(what_cannot_be_kept_is_lost_with_a_word),
        cmocka_unit_test(the_little_that_an_unsafe_writer_wrote_is_written_again),
        cmocka_unit_test(what_another_server_would_not_have_fails_the_flush),
    };
    if (!mkdtemp(dir))
        return 77;
    setenv("DROVER_NET_RECONNECT", "30", 1);
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(dir);
    return r;
}
