/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A place that somebody has looked up and is at work on is not given away, however durable its
 * removal is (invariant 2). */
#include "test-ops.h"

#include <pthread.h>
#include <time.h>

#include "faultfs.h"

#define GRAIN (64 * KiB)

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct dr_chain *chain;
    bool punched, flushed;
    int result;
} drop = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void say(bool *what)
{
    pthread_mutex_lock(&drop.lock);
    *what = true;
    pthread_cond_broadcast(&drop.changed);
    pthread_mutex_unlock(&drop.lock);
}

static int see_punch(void *user, const struct faultfs_io *io)
{
    (void)user;
    if (io->kind == FAULTFS_ZERO)
        say(&drop.punched);
    return 0;
}

static void *drop_and_flush(void *user)
{
    (void)user;
    drop.result = dr_chain_drop(drop.chain, 0, 0, GRAIN, NULL);
    if (drop.result == 0)
        drop.result = dr_chain_flush(drop.chain, 0, NULL);
    say(&drop.flushed);
    return NULL;
}

/* Does it come to that while the place is held? Where all is well this waits in vain. */
static bool place_is_given_away(void)
{
    struct timespec until;
    int r = 0;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 100000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&drop.lock);
    while (r == 0 && !drop.punched && !drop.flushed)
        r = pthread_cond_timedwait(&drop.changed, &drop.lock, &until);
    bool away = drop.punched || drop.flushed;
    pthread_mutex_unlock(&drop.lock);
    return away;
}

static void what_is_being_read_is_not_punched(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    struct dr_place place;
    uint8_t byte = 0;
    pthread_t thread;
    make(memory, "a.vmdk", "vmdk", MiB, NULL);
    put(memory, "a.vmdk", 0, MiB, 0x11);
    ok(dr_open_fs(faultfs_fs(f), "a.vmdk", &rw, &disk, &err));
    drop.chain = disk->chain;
    ok(dr_chain_map(drop.chain, 0, 0, GRAIN, &place, &err));
    faultfs_observe(f, see_punch, NULL);
    assert_int_equal(pthread_create(&thread, NULL, drop_and_flush, NULL), 0);
    bool away = place_is_given_away();
    ok(dr_file_pread(place.ext.file, &byte, place.ext.host, 1, &err));
    dr_place_done(&place);
    pthread_join(thread, NULL);
    faultfs_observe(f, NULL, NULL);
    assert_int_equal(drop.result, 0);
    assert_true(drop.punched); /* or nothing was tested */
    assert_false(away);
    assert_int_equal(byte, 0x11);
    ok(dr_close(disk, &err));
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_being_read_is_not_punched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
