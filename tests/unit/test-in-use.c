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

struct world {
    struct dr_fs *memory;
    struct faultfs *f;
    struct dr_disk *disk;
};

static struct world begin(void)
{
    struct world w = {.memory = dr_fs_memory_new()};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    w.f = faultfs_new(w.memory);
    make(w.memory, "a.vmdk", "vmdk", MiB, NULL);
    put(w.memory, "a.vmdk", 0, MiB, 0x11);
    ok(dr_open_fs(faultfs_fs(w.f), "a.vmdk", &rw, &w.disk, &err));
    drop.chain = w.disk->chain;
    drop.punched = drop.flushed = false;
    return w;
}

static void end(struct world *w, pthread_t thread)
{
    pthread_join(thread, NULL);
    faultfs_observe(w->f, NULL, NULL);
    assert_int_equal(drop.result, 0);
    assert_true(drop.punched); /* or nothing was tested */
    ok(dr_close(w->disk, &err));
    faultfs_free(w->f);
    dr_fs_memory_free(w->memory);
}

static void what_is_being_read_is_not_punched(void **state)
{
    (void)state;
    struct world w = begin();
    struct dr_place place;
    uint8_t byte = 0;
    pthread_t thread;
    ok(dr_chain_map(drop.chain, 0, 0, GRAIN, &place, &err));
    faultfs_observe(w.f, see_punch, NULL);
    assert_int_equal(pthread_create(&thread, NULL, drop_and_flush, NULL), 0);
    bool away = place_is_given_away();
    ok(dr_file_pread(place.ext.file, &byte, place.ext.host, 1, &err));
    dr_place_done(&place);
    end(&w, thread);
    assert_false(away);
    assert_int_equal(byte, 0x11);
}

struct writing {
    bool begun, away;
    pthread_t thread;
};

/* The bytes are about to go to the place that was looked up. */
static int see_write(void *user, const struct faultfs_io *io)
{
    struct writing *wr = user;
    if (io->kind == FAULTFS_WRITE && io->len == 5 * 512 && !wr->begun) {
        wr->begun = true;
        assert_int_equal(pthread_create(&wr->thread, NULL, drop_and_flush, NULL), 0);
        wr->away = place_is_given_away();
    }
    return see_punch(NULL, io);
}

static void what_is_being_written_is_not_punched(void **state)
{
    (void)state;
    struct world w = begin();
    struct writing wr = {0};
    uint8_t bytes[5 * 512] = {0};
    ok(dr_chain_write(drop.chain, 0, bytes, 0, 512, &err)); /* what comes with a first write */
    faultfs_observe(w.f, see_write, &wr);
    ok(dr_chain_write(drop.chain, 0, bytes, 0, sizeof(bytes), &err));
    assert_true(wr.begun);
    end(&w, wr.thread);
    assert_false(wr.away);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_being_read_is_not_punched),
        cmocka_unit_test(what_is_being_written_is_not_punched),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
