/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Grain tables are read ahead by several threads: they find the same as one, in the same order,
 * read nothing but metadata, and as many requests are under way as the file wants. */
#include "test-vmdk.h"
#include "base/cleanup.h"
#include "faultfs.h"
#include "formats/vmdk/check.h"

#include <pthread.h>

#define DISK "/d/a.vmdk"
#define SPAN (512 * GRAIN) /* of a table */

/* Data below the first 16 tables, and below every 1000th. */
static void make_large(void)
{
    ok(create(DISK, TIB, NULL));
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    for (uint64_t t = 0; t < TIB / SPAN; t += t < 16 ? 1 : 1000)
        write_at(disk, t * SPAN + t % 500 * GRAIN, 2 * GRAIN, 1 + (unsigned)(t % 200));
    ok(dr_close(disk, &err));
}

static struct dr_check_result checked_in(struct dr_fs *fs, unsigned readers)
{
    struct dr_check_result result = {.report = note};
    struct dr_image *image;
    lines[0] = '\0';
    vmdk_check_readers = readers;
    ok(dr_image_open(fs, DISK, "vmdk", 0, &image, &err));
    ok(vmdk_check(image, 0, &result, &err));
    ok(dr_image_unref(image, &err));
    vmdk_check_readers = 0;
    return result;
}

/* ------------------------------------------------------------------ the same */

static void same_by_one_and_four(const char *what)
{
    struct dr_check_result one = checked_in(mem, 1);
    CLEANUP_FREE char *said = strdup(lines);
    for (int i = 0; i < 3; i++) {
        struct dr_check_result four = checked_in(mem, 4);
        if (memcmp(&one, &four, sizeof(one)) != 0 || strcmp(lines, said) != 0)
            fail_msg("%s: one thread says:\n%sfour say:\n%s", what, said, lines);
    }
}

static uint32_t table_at(uint64_t t, bool copy)
{
    uint64_t gd;
    peek(DISK, copy ? 48 : 56, &gd, 8);
    return peek32(DISK, gd * 512 + 4 * t);
}

static void one_thread_and_four_find_and_say_the_same(void **state)
{
    (void)state;
    make_large();
    same_by_one_and_four("a sound disk");
    assert_string_equal(lines, "");
    uint64_t third = (uint64_t)table_at(3, false) * 512, copy = (uint64_t)table_at(3, true) * 512;
    poke32(DISK, third + 4 * 3, 7);            /* in the metadata */
    poke32(DISK, third + 4 * 100, 0x7fffffff); /* behind the end */
    poke32(DISK, copy + 4 * 200, 128);         /* the copy differs */
    poke32(DISK, (uint64_t)table_at(5, false) * 512 + 4 * 9, peek32(DISK, third + 4 * 4));
    same_by_one_and_four("damaged entries");
    assert_non_null(strstr(lines, "metadata stands there"));
    assert_non_null(strstr(lines, "belongs to another one too"));
    uint64_t rgd;
    peek(DISK, 48, &rgd, 8);
    poke32(DISK, rgd * 512 + 4 * 7, table_at(7, false)); /* no copy of its own, amid a row */
    poke32(DISK, rgd * 512 + 4 * 9, table_at(14, true)); /* rows end there */
    same_by_one_and_four("damaged directories");
}

/* ------------------------------------------------------------------ what it costs */

struct reads {
    pthread_mutex_t lock;
    uint64_t bytes, n, end;
};

static int count_read(void *user, const struct faultfs_io *io)
{
    struct reads *r = user;
    if (io->kind != FAULTFS_READ)
        return 0;
    pthread_mutex_lock(&r->lock);
    r->bytes += io->len;
    r->n++;
    r->end = r->end > io->off + io->len ? r->end : io->off + io->len;
    pthread_mutex_unlock(&r->lock);
    return 0;
}

/* Of 1 TiB, 128 MiB are tables, most of them holes here. */
static void only_metadata_is_read_in_large_pieces(void **state)
{
    (void)state;
    struct reads r = {.lock = PTHREAD_MUTEX_INITIALIZER};
    struct faultfs *f = faultfs_new(mem);
    uint64_t overhead;
    make_large();
    peek(DISK, 64, &overhead, 8);
    faultfs_observe(f, count_read, &r);
    struct dr_check_result result = checked_in(faultfs_fs(f), 4);
    assert_true(result.corruptions == 0 && result.leaks == 0);
    assert_true(r.end <= overhead * 512);
    assert_true(r.n < 300 && r.bytes < 3 * overhead * 512 / 2);
    faultfs_free(f);
}

struct meeting {
    pthread_mutex_t lock;
    pthread_cond_t all_there;
    unsigned there, wanted;
    uint64_t from;
};

static int meet(void *user, const struct faultfs_io *io)
{
    struct meeting *m = user;
    if (io->kind != FAULTFS_READ || io->off < m->from)
        return 0;
    pthread_mutex_lock(&m->lock);
    if (++m->there == m->wanted)
        pthread_cond_broadcast(&m->all_there);
    while (m->there < m->wanted)
        pthread_cond_wait(&m->all_there, &m->lock);
    pthread_mutex_unlock(&m->lock);
    return 0;
}

/* Without eight readers the test hangs. */
static void a_file_far_away_gets_as_many_requests_at_once_as_it_wants(void **state)
{
    (void)state;
    struct meeting m = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 8, 0};
    struct faultfs *far = faultfs_new(mem);
    make_large();
    struct dr_disk *disk = opened(DISK, DR_OPEN_RDWR);
    for (uint64_t row = 0; row < 32; row++) /* a hole is not read */
        write_at(disk, (row * 128 + 64) * SPAN, 512, 1);
    ok(dr_close(disk, &err));
    m.from = (uint64_t)table_at(0, true) * 512;
    uint64_t primary = (uint64_t)table_at(0, false) * 512;
    m.from = m.from > primary ? m.from : primary; /* the row that stands last */
    faultfs_set_depth(far, 8);
    faultfs_observe(far, meet, &m);
    struct dr_check_result result = checked_in(faultfs_fs(far), 0);
    assert_true(result.corruptions == 0 && m.there >= 8);
    faultfs_free(far);
}

static void a_row_that_cannot_be_read_fails_the_check(void **state)
{
    (void)state;
    struct faultfs *f = faultfs_new(mem);
    struct dr_image *image;
    make_large();
    bool failed = true;
    for (uint64_t n = 0; failed; n += 13) {
        struct dr_check_result result = {.report = note};
        ok(dr_image_open(faultfs_fs(f), DISK, "vmdk", 0, &image, &err));
        faultfs_arm(f, &(struct faultfs_plan){.nth = n, .kinds = 1u << FAULTFS_READ});
        failed = vmdk_check(image, 0, &result, NULL) < 0;
        assert_int_equal(failed, faultfs_fired(f));
        faultfs_disarm(f);
        ok(dr_image_unref(image, &err));
    }
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(one_thread_and_four_find_and_say_the_same),
        T(only_metadata_is_read_in_large_pieces),
        T(a_file_far_away_gets_as_many_requests_at_once_as_it_wants),
        T(a_row_that_cannot_be_read_fails_the_check),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
