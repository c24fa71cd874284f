/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The gate of a disk: what may happen while its chain is changed, and what hooks get to see.
 * Threads meet through flags, never through time. */
#include "test-ops.h"

#include <pthread.h>
#include <sched.h>

#include "core/internal.h"
#include "faultfs.h"

#define SIZE  (1 * MiB)
#define GRAIN (64 * KiB)

struct rig {
    struct dr_fs *fs;
    struct faultfs *fault;
    struct dr_disk *disk; /* d.vmdk over p.vmdk, which is full of 0xaa */
};

static int rig_up(void **state)
{
    struct rig *g = calloc(1, sizeof(*g));
    g->fs = dr_fs_memory_new();
    g->fault = faultfs_new(g->fs);
    make(g->fs, "/d/p.vmdk", "vmdk", SIZE, NULL);
    put(g->fs, "/d/p.vmdk", 0, SIZE, 0xaa);
    make(g->fs, "/d/d.vmdk", "vmdk", SIZE, "p.vmdk");
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    ok(dr_open_fs(faultfs_fs(g->fault), "/d/d.vmdk", &o, &g->disk, &err));
    *state = g;
    return 0;
}

static int rig_down(void **state)
{
    struct rig *g = *state;
    int r = dr_close(g->disk, NULL);
    faultfs_free(g->fault);
    dr_fs_memory_free(g->fs);
    free(g);
    return r;
}

/* The same images in another chain. */
static struct dr_chain *same_again(struct dr_disk *disk)
{
    struct dr_chain *chain = dr_disk_chain(disk), *fresh = dr_chain_tail(chain, 0);
    dr_chain_unref(chain, NULL);
    assert_non_null(fresh);
    return fresh;
}

static void write_byte(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    free(buf);
}

static void wait_for(_Atomic bool *flag)
{
    while (!atomic_load(flag))
        sched_yield();
}

/* ------------------------------------------------------------------ swaps */

static void what_was_written_before_a_swap_is_read_after_it(void **state)
{
    struct rig *g = *state;
    uint8_t byte;
    write_byte(g->disk, 5, 1, 7);
    ok(dr_disk_swap(g->disk, same_again(g->disk), &err));
    ok(dr_pread(g->disk, &byte, 5, 1, &err));
    assert_int_equal(byte, 7);
    write_byte(g->disk, 6, 1, 8);
    ok(dr_close(DR_STEAL(g->disk), &err));
    uint64_t size;
    uint8_t *all = view(g->fs, "/d/d.vmdk", &size);
    assert_int_equal(all[5], 7);
    assert_int_equal(all[6], 8);
    assert_int_equal(all[7], 0xaa);
    free(all);
}

static int failing_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    (void)user;
    (void)fresh;
    return dr_fail(err, ENOSPC, "%s: no", present->images[0]->path);
}

static void a_step_that_fails_leaves_the_disk_as_it_was(void **state)
{
    struct rig *g = *state;
    struct dr_chain *before = dr_disk_chain(g->disk);
    uint64_t pause = 0;
    refused(dr_disk_quiesce(g->disk, failing_step, NULL, &pause, &err), ENOSPC, "d.vmdk");
    struct dr_chain *after = dr_disk_chain(g->disk);
    assert_ptr_equal(before, after);
    assert_true(pause > 0);
    write_byte(g->disk, 0, 1, 1); /* the gate is open */
    dr_chain_unref(before, NULL);
    dr_chain_unref(after, NULL);
}

static void the_old_chain_reads_on_for_those_who_hold_it(void **state)
{
    struct rig *g = *state;
    struct dr_chain *old = dr_disk_chain(g->disk);
    struct dr_chain *top = dr_chain_tail(old, 1); /* without d.vmdk */
    uint8_t byte;
    write_byte(g->disk, 5, 1, 7);
    ok(dr_disk_swap(g->disk, top, &err));
    ok(dr_pread(g->disk, &byte, 5, 1, &err));
    assert_int_equal(byte, 0xaa);
    ok(dr_chain_read(old, 0, &byte, 5, 1, &err));
    assert_int_equal(byte, 7);
    assert_int_equal(dr_chain_length(g->disk), 1);
    ok(dr_chain_unref(old, &err));
}

static void texts_that_were_handed_out_outlive_the_chain(void **state)
{
    struct rig *g = *state;
    struct dr_extent_status status;
    write_byte(g->disk, 0, GRAIN, 1);
    ok(dr_block_status(g->disk, 0, GRAIN, &status, &err));
    const char *path = dr_image_path(g->disk, 0), *backing = dr_image_backing_name(g->disk, 0);
    struct dr_chain *old = dr_disk_chain(g->disk);
    ok(dr_disk_swap(g->disk, dr_chain_tail(old, 1), &err));
    ok(dr_chain_unref(old, &err)); /* d.vmdk is closed now */
    assert_string_equal(path, "/d/d.vmdk");
    assert_string_equal(backing, "p.vmdk");
    assert_string_equal(status.file, "/d/d.vmdk");
    assert_string_equal(dr_image_path(g->disk, 0), "/d/p.vmdk");
}

/* A swap from inside of a job: with a pass held for the whole job it would wait for itself. */
static int swap_in_progress(void *user, uint64_t done, uint64_t total)
{
    struct dr_disk *disk = user;
    (void)done;
    (void)total;
    ok(dr_disk_swap(disk, same_again(disk), &err));
    return 0;
}

static void a_disk_compared_with_itself_can_be_swapped_meanwhile(void **state)
{
    struct rig *g = *state;
    struct dr_job_options how = {.progress = swap_in_progress, .user = g->disk};
    struct dr_compare_result result;
    struct dr_job *job;
    ok(dr_job_new(NULL, &how, &job, &err));
    ok(dr_compare(g->disk, g->disk, false, job, &result, &err));
    assert_true(result.same);
    dr_job_free(job);
}

static void only_one_operation_changes_the_graph(void **state)
{
    struct rig *g = *state;
    ok(dr_disk_claim(g->disk, "a stream", &err));
    refused(dr_truncate(g->disk, SIZE / 2, &err), EBUSY, "until a stream has ended");
    dr_disk_unclaim(g->disk);
    ok(dr_disk_claim(g->disk, "a commit", &err));
    dr_disk_unclaim(g->disk);
}

/* ------------------------------------------------------------------ who waits for whom */

struct crowd {
    struct rig *g;
    _Atomic bool step_runs, may_end, entered, second_came;
    bool entered_before_second; /* what the second step saw */
};

static unsigned waiting(struct dr_disk *disk)
{
    DR_LOCK_SCOPE(&disk->gate_lock);
    return disk->waiting;
}

static int first_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct crowd *c = user;
    (void)present;
    (void)fresh;
    (void)err;
    atomic_store(&c->step_runs, true);
    wait_for(&c->may_end);
    return 0;
}

static int second_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct crowd *c = user;
    (void)present;
    (void)fresh;
    (void)err;
    c->entered_before_second = atomic_load(&c->entered);
    return 0;
}

static void *quiesce_first(void *arg)
{
    struct crowd *c = arg;
    ok(dr_disk_quiesce(c->g->disk, first_step, c, NULL, &err));
    return NULL;
}

static void *quiesce_second(void *arg)
{
    struct crowd *c = arg;
    atomic_store(&c->second_came, true);
    ok(dr_disk_quiesce(c->g->disk, second_step, c, NULL, &err));
    return NULL;
}

static void *one_request(void *arg)
{
    struct crowd *c = arg;
    struct dr_pass pass;
    dr_disk_enter(c->g->disk, &pass);
    atomic_store(&c->entered, true);
    dr_disk_leave(c->g->disk, &pass);
    return NULL;
}

static void a_request_that_waited_gets_in_before_the_next_swap(void **state)
{
    struct crowd c = {.g = *state};
    pthread_t first, second, request;
    pthread_create(&first, NULL, quiesce_first, &c);
    wait_for(&c.step_runs);
    pthread_create(&request, NULL, one_request, &c);
    pthread_create(&second, NULL, quiesce_second, &c);
    wait_for(&c.second_came);
    /* Both wait: the request, and the second's flush, which is a request too. */
    while (waiting(c.g->disk) < 2)
        sched_yield();
    assert_false(atomic_load(&c.entered));
    atomic_store(&c.may_end, true);
    pthread_join(first, NULL);
    pthread_join(request, NULL);
    pthread_join(second, NULL);
    assert_true(c.entered_before_second);
}

struct inside {
    struct rig *g;
    struct dr_pass pass;
    _Atomic bool stepped;
};

static int note_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    (void)present;
    (void)fresh;
    (void)err;
    atomic_store((_Atomic bool *)user, true);
    return 0;
}

static void *quiesce_noting(void *arg)
{
    struct inside *in = arg;
    ok(dr_disk_quiesce(in->g->disk, note_step, &in->stepped, NULL, &err));
    return NULL;
}

static void a_step_waits_for_every_request_inside(void **state)
{
    struct inside in = {.g = *state};
    pthread_t thread;
    dr_disk_enter(in.g->disk, &in.pass);
    pthread_create(&thread, NULL, quiesce_noting, &in);
    while (!atomic_load(&in.g->disk->closed))
        sched_yield();
    for (int i = 0; i < 1000; i++)
        sched_yield();
    assert_false(atomic_load(&in.stepped));
    dr_disk_leave(in.g->disk, &in.pass);
    pthread_join(thread, NULL);
    assert_true(atomic_load(&in.stepped));
}

/* ------------------------------------------------------------------ flushes */

/* A flush that waits for the disk until it is told to go on. */
struct slow_flush {
    struct rig *g;
    pthread_t thread;
    _Atomic bool runs, may_end, changed;
};

static int hold_flush(void *user, const struct faultfs_io *io)
{
    struct slow_flush *s = user;
    if (io->kind == FAULTFS_FLUSH && !atomic_exchange(&s->runs, true))
        wait_for(&s->may_end);
    return 0;
}

static void *flush_slowly(void *arg)
{
    struct slow_flush *s = arg;
    ok(dr_flush(s->g->disk, &err));
    return NULL;
}

static void begin_slow_flush(struct slow_flush *s)
{
    write_byte(s->g->disk, 0, 1, 1);
    faultfs_observe(s->g->fault, hold_flush, s);
    pthread_create(&s->thread, NULL, flush_slowly, s);
    wait_for(&s->runs);
}

static void end_slow_flush(struct slow_flush *s)
{
    atomic_store(&s->may_end, true);
    pthread_join(s->thread, NULL);
    faultfs_observe(s->g->fault, NULL, NULL);
}

static int exchange_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                         struct dr_error *err)
{
    (void)user;
    (void)err;
    *fresh = dr_chain_tail(present, 0);
    return 0;
}

static void an_exchange_does_not_wait_for_a_flush(void **state)
{
    struct slow_flush s = {.g = *state};
    begin_slow_flush(&s);
    ok(dr_disk_exchange(s.g->disk, exchange_step, NULL, NULL, &err));
    write_byte(s.g->disk, 0, 1, 2);
    end_slow_flush(&s);
}

static void *change_disk(void *arg)
{
    struct slow_flush *s = arg;
    ok(dr_disk_quiesce_unflushed(s->g->disk, note_step, &s->changed, NULL, &err));
    return NULL;
}

static void a_step_waits_for_flushes_while_requests_go_on(void **state)
{
    struct slow_flush s = {.g = *state};
    pthread_t changer, later;
    begin_slow_flush(&s);
    pthread_create(&changer, NULL, change_disk, &s);
    while (!atomic_load(&s.g->disk->flushes_closed))
        sched_yield();
    for (int i = 0; i < 1000; i++)
        write_byte(s.g->disk, 0, 1, i); /* the gate is open */
    pthread_create(&later, NULL, flush_slowly, &s);
    while (waiting(s.g->disk) < 1) /* flushes that come now wait for the change */
        sched_yield();
    assert_false(atomic_load(&s.changed));
    end_slow_flush(&s);
    pthread_join(changer, NULL);
    pthread_join(later, NULL);
    assert_true(atomic_load(&s.changed));
}

/* ------------------------------------------------------------------ epochs */

static void a_place_in_a_frozen_image_is_held_like_any_other(void **state)
{
    struct rig *g = *state;
    struct dr_chain *chain = dr_disk_chain(g->disk);
    struct dr_place place;
    ok(dr_chain_map(chain, 0, 0, GRAIN, &place, &err));
    assert_int_equal(place.owner, 1);
    assert_false(chain->images[1]->writable);
    assert_ptr_equal(place.pinned, chain->images[1]); /* thawing it will wait for us to be done */
    dr_place_done(&place);
    dr_chain_unref(chain, NULL);
}

/* ------------------------------------------------------------------ hooks */

struct watch {
    struct rig *g;
    bool changed[SIZE / 512]; /* dirty tracking */
    uint8_t *old;             /* copy before write: the disk as it was when the hook came */
    bool copied[SIZE / 512];
    int fail_before;
    pthread_mutex_t lock;
};

static void mark(void *user, uint64_t off, uint64_t len)
{
    struct watch *w = user;
    DR_LOCK_SCOPE(&w->lock);
    for (uint64_t s = off / 512; s <= (off + len - 1) / 512; s++)
        w->changed[s] = true;
}

static int copy_old(void *user, struct dr_chain *chain, uint64_t off, uint64_t len,
                    struct dr_error *err)
{
    struct watch *w = user;
    if (w->fail_before)
        return dr_fail(err, w->fail_before, "no room for the old data");
    for (uint64_t s = off / 512; s <= (off + len - 1) / 512; s++) {
        if (w->copied[s])
            continue;
        int r = dr_chain_read(chain, 0, w->old + s * 512, s * 512, 512, err);
        if (r < 0)
            return r;
        w->copied[s] = true;
    }
    return 0;
}

static void every_kind_of_change_is_marked(void **state)
{
    static const struct {
        const char *what;
        uint64_t off, len;
    } table[] = {{"new grain", 0, 512},
                 {"in place", 512, 512},
                 {"zeros", GRAIN, GRAIN},
                 {"discard", 8 * GRAIN, GRAIN},
                 {"several", 5 * GRAIN - 512, 2 * GRAIN}};
    struct rig *g = *state;
    struct watch w = {.g = g, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct dr_hook hook = {.after = mark, .user = &w};
    write_byte(g->disk, 8 * GRAIN, 512, 9);
    ok(dr_disk_hook(g->disk, &hook, &err));
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        memset(w.changed, 0, sizeof(w.changed));
        if (strcmp(table[i].what, "zeros") == 0)
            ok(dr_zero(g->disk, table[i].off, table[i].len, 0, &err));
        else if (strcmp(table[i].what, "discard") == 0)
            ok(dr_discard(g->disk, table[i].off, table[i].len, &err));
        else
            write_byte(g->disk, table[i].off, table[i].len, 3);
        for (uint64_t s = 0; s < SIZE / 512; s++) {
            bool in = s * 512 >= table[i].off && s * 512 < table[i].off + table[i].len;
            if (w.changed[s] != in)
                fail_msg("%s: sector %llu is %smarked", table[i].what, (unsigned long long)s,
                         in ? "not " : "");
        }
    }
    /* What a job fills in changes nothing that the guest reads. */
    memset(w.changed, 0, sizeof(w.changed));
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(g->disk, &pass);
    ok(dr_chain_fill(chain, 0, NULL, 12 * GRAIN, GRAIN, &err));
    dr_disk_leave(g->disk, &pass);
    for (uint64_t s = 0; s < SIZE / 512; s++)
        assert_false(w.changed[s]);
    dr_disk_unhook(g->disk, &w);
    write_byte(g->disk, 0, 512, 4);
    assert_false(w.changed[0]);
    pthread_mutex_destroy(&w.lock);
}

static void hooks_stay_with_the_disk_when_its_chain_changes(void **state)
{
    struct rig *g = *state;
    struct watch w = {.g = g, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct dr_hook hook = {.after = mark, .user = &w};
    ok(dr_disk_hook(g->disk, &hook, &err));
    ok(dr_disk_swap(g->disk, same_again(g->disk), &err));
    write_byte(g->disk, 1024, 512, 4);
    assert_true(w.changed[2]);
    dr_disk_unhook(g->disk, &w);
    pthread_mutex_destroy(&w.lock);
}

/* Four writers, each with sectors of its own in shared grains; the copy is the disk as it was. */
#define WRITERS 4
struct writer {
    struct dr_disk *disk;
    unsigned seed, which;
};

static void *write_around(void *arg)
{
    struct writer *w = arg;
    unsigned x = w->seed;
    uint8_t buf[512];
    for (int i = 0; i < 300; i++) {
        x = x * 1664525u + 1013904223u;
        uint64_t off = ((uint64_t)(x >> 8) % (SIZE / 512 / WRITERS) * WRITERS + w->which) * 512;
        memset(buf, (int)(x >> 24), sizeof(buf));
        if (x % 5 == 0)
            ok(dr_zero(w->disk, off, 512, DR_MAY_UNMAP, &err));
        else
            ok(dr_pwrite(w->disk, buf, off, 512, 0, &err));
    }
    return NULL;
}

static void copy_before_write_keeps_the_moment_the_hook_came(void **state)
{
    struct rig *g = *state;
    for (uint64_t off = 0; off < SIZE; off += 3 * 512) /* some grains in place, some the parent's */
        if (off / GRAIN % 2 == 0)
            write_byte(g->disk, off, 512, (int)(off / 512));
    uint8_t *moment = malloc(SIZE), *now = malloc(SIZE);
    ok(dr_pread(g->disk, moment, 0, SIZE, &err));
    struct watch w = {.g = g, .old = malloc(SIZE), .lock = PTHREAD_MUTEX_INITIALIZER};
    struct dr_hook hook = {.before = copy_old, .after = mark, .user = &w};
    ok(dr_disk_hook(g->disk, &hook, &err));
    pthread_t threads[WRITERS];
    struct writer writers[WRITERS];
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i] = (struct writer){g->disk, i * 77 + 1, i};
        pthread_create(&threads[i], NULL, write_around, &writers[i]);
    }
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(threads[i], NULL);
    ok(dr_pread(g->disk, now, 0, SIZE, &err));
    for (uint64_t s = 0; s < SIZE / 512; s++) {
        const uint8_t *then = w.copied[s] ? w.old + s * 512 : now + s * 512;
        assert_memory_equal(then, moment + s * 512, 512);
        if (!w.changed[s])
            assert_memory_equal(now + s * 512, moment + s * 512, 512);
    }
    dr_disk_unhook(g->disk, &w);
    pthread_mutex_destroy(&w.lock);
    free(w.old);
    free(now);
    free(moment);
}

static void a_write_whose_old_data_cannot_be_kept_fails_and_changes_nothing(void **state)
{
    struct rig *g = *state;
    uint8_t byte;
    write_byte(g->disk, 0, 512, 1);
    struct watch w = {.g = g, .fail_before = ENOSPC};
    struct dr_hook hook = {.before = copy_old, .user = &w};
    ok(dr_disk_hook(g->disk, &hook, &err));
    uint8_t buf[512] = {2};
    refused(dr_pwrite(g->disk, buf, 0, 512, 0, &err), ENOSPC, "no room");
    refused(dr_zero(g->disk, 0, 512, 0, &err), ENOSPC, "no room");
    dr_disk_unhook(g->disk, &w);
    ok(dr_pread(g->disk, &byte, 0, 1, &err));
    assert_int_equal(byte, 1);
}

/* ------------------------------------------------------------------ forced unit access */

struct counts {
    unsigned writes, flushes;
};

static int count_io(void *user, const struct faultfs_io *io)
{
    struct counts *c = user;
    c->writes += io->kind == FAULTFS_WRITE;
    c->flushes += io->kind == FAULTFS_FLUSH;
    return 0;
}

static void a_durable_write_in_place_flushes_no_metadata(void **state)
{
    struct rig *g = *state;
    struct counts c = {0};
    uint8_t buf[4096] = {1};
    ok(dr_pwrite(g->disk, buf, 0, sizeof(buf), DR_FUA, &err)); /* a new grain: with its metadata */
    faultfs_observe(g->fault, count_io, &c);
    ok(dr_pwrite(g->disk, buf, 4096, sizeof(buf), DR_FUA, &err));
    assert_int_equal(c.writes, 1);
    assert_int_equal(c.flushes, 1);
    c = (struct counts){0};
    ok(dr_flush(g->disk, &err)); /* nothing is left to do */
    assert_int_equal(c.writes + c.flushes, 0);
    /* Metadata that leads to the bytes is not durable yet: all of it must be. */
    ok(dr_pwrite(g->disk, buf, 4 * GRAIN, 512, 0, &err));
    c = (struct counts){0};
    ok(dr_pwrite(g->disk, buf, 4 * GRAIN + 512, 512, DR_FUA, &err));
    assert_true(c.flushes >= 2);
    faultfs_observe(g->fault, NULL, NULL);
}

/* ------------------------------------------------------------------ a base that fails */

static int fail_base(void *user, const struct faultfs_io *io)
{
    (void)user;
    return io->kind == FAULTFS_FLUSH && strstr(io->path, "p.vmdk") ? -EIO : 0;
}

static void a_base_that_fails_does_not_take_the_disk_with_it(void **state)
{
    struct rig *g = *state;
    write_byte(g->disk, 0, 2 * GRAIN, 1);
    ok(dr_flush(g->disk, &err));
    faultfs_observe(g->fault, fail_base, NULL);
    refused(dr_disk_commit(g->disk, NULL, NULL, &err), EIO, "p.vmdk");
    write_byte(g->disk, GRAIN, 512, 2);
    ok(dr_flush(g->disk, &err)); /* the disk and its file are well */
    ok(dr_disk_swap(g->disk, same_again(g->disk), &err));
    faultfs_observe(g->fault, NULL, NULL);
    uint8_t byte;
    ok(dr_pread(g->disk, &byte, GRAIN, 1, &err));
    assert_int_equal(byte, 2);
}

#define T(name) cmocka_unit_test_setup_teardown(name, rig_up, rig_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(what_was_written_before_a_swap_is_read_after_it),
        T(a_step_that_fails_leaves_the_disk_as_it_was),
        T(the_old_chain_reads_on_for_those_who_hold_it),
        T(texts_that_were_handed_out_outlive_the_chain),
        T(a_disk_compared_with_itself_can_be_swapped_meanwhile),
        T(only_one_operation_changes_the_graph),
        T(a_request_that_waited_gets_in_before_the_next_swap),
        T(a_step_waits_for_every_request_inside),
        T(an_exchange_does_not_wait_for_a_flush),
        T(a_step_waits_for_flushes_while_requests_go_on),
        T(a_place_in_a_frozen_image_is_held_like_any_other),
        T(every_kind_of_change_is_marked),
        T(hooks_stay_with_the_disk_when_its_chain_changes),
        T(copy_before_write_keeps_the_moment_the_hook_came),
        T(a_write_whose_old_data_cannot_be_kept_fails_and_changes_nothing),
        T(a_durable_write_in_place_flushes_no_metadata),
        T(a_base_that_fails_does_not_take_the_disk_with_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
