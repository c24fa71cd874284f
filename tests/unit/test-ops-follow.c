/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Mirrors and commits with pivot whose guest's writes block: what the guest writes reaches the
 * other side, too, before it is told. */
#include "faultfs.h"
#include "test-ops-crowd.h"

static const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};

struct told {
    struct crowd *crowd;
    struct dr_job *job;
    _Atomic unsigned errors;
    _Atomic bool switches; /* only the switch is left */
};

static void on_ready(void *user)
{
    struct told *t = user;
    crowd_pass(t->crowd, 40);
    dr_job_complete(t->job, true);
}

static int on_switch(void *user)
{
    struct told *t = user;
    assert_ptr_equal(t->job->beside, t->crowd->disk); /* so it has given way */
    atomic_store(&t->switches, true);
    crowd_pass(t->crowd, 20);
    return 0;
}

static enum dr_error_action on_error(void *user, bool reading, int error, const char *text)
{
    struct told *t = user;
    assert_false(reading);
    assert_int_equal(error, EIO);
    assert_non_null(text);
    atomic_fetch_add(&t->errors, 1);
    return DR_ERROR_STOP; /* the job is not paused: it tries again at once */
}

static void make_job(struct told *t, struct crowd *crowd)
{
    const struct dr_job_options o = {
        .ready = on_ready, .before_switch = on_switch, .error = on_error, .user = t};
    *t = (struct told){.crowd = crowd};
    ok(dr_job_new(NULL, &o, &t->job, &err));
}

static void make_pair(struct dr_fs *fs, const char *top_format, const char *base_format)
{
    for (unsigned i = 0; i < 2; i++) {
        struct dr_create_options c = {.format = i ? top_format : base_format,
                                      .size = i ? 0 : CROWD_SIZE,
                                      .has_size = i == 0,
                                      .backing = i ? "base" : NULL,
                                      .backing_format = i ? base_format : NULL};
        struct dr_open_options open = {.flags = DR_OPEN_RDWR, .format = c.format};
        struct dr_disk *disk;
        uint8_t *buf = malloc(MiB);
        memset(buf, 0x11 * ((int)i + 1), MiB);
        ok(dr_create_fs(fs, i ? "top" : "base", &c, &err));
        ok(dr_open_fs(fs, i ? "top" : "base", &open, &disk, &err));
        ok(dr_pwrite(disk, buf, i * 512 * KiB, MiB, 0, &err));
        ok(dr_close(disk, &err));
        free(buf);
    }
}

/* ------------------------------------------------------------------ under a crowd */

static const char *const formats[] = {"raw", "vmdk", "qcow2", "add-cow"};

static void a_mirror_holds_what_a_crowd_wrote(void **state)
{
    (void)state;
    for (size_t i = 0; i < 4; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd crowd;
        struct told t;
        const struct dr_mirror_options o = {.format = formats[i], .write_blocking = true};
        make_pair(fs, "qcow2", "qcow2");
        crowd_begin(&crowd, fs, "top");
        make_job(&t, &crowd);
        ok(dr_disk_mirror(crowd.disk, "moved", &o, t.job, &err));
        assert_string_equal(dr_image_path(crowd.disk, 0), "moved");
        dr_job_free(t.job);
        crowd_end(&crowd, "moved");
        dr_fs_memory_free(fs);
    }
}

static void a_base_holds_what_a_crowd_wrote(void **state)
{
    static const struct {
        const char *top, *base;
    } pairs[] = {{"vmdk", "vmdk"}, {"qcow2", "qcow2"}, {"add-cow", "raw"}, {"qcow2", "raw"}};
    (void)state;
    for (size_t i = 0; i < 8; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd crowd;
        struct told t;
        bool pivot = i % 2;
        const struct dr_commit_options o = {.pivot = pivot, .write_blocking = true};
        make_pair(fs, pairs[i / 2].top, pairs[i / 2].base);
        crowd_begin(&crowd, fs, "top");
        make_job(&t, &crowd);
        ok(dr_disk_commit(crowd.disk, &o, t.job, &err));
        assert_string_equal(dr_image_path(crowd.disk, 0), pivot ? "base" : "top");
        dr_job_free(t.job);
        crowd_end(&crowd, "top");
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ a target that fails */

struct unreliable {
    struct told *told;
    _Atomic unsigned writes, failed;
};

/* Later the target is the disk. */
static int fail_every_fifth(void *user, const struct faultfs_io *io)
{
    struct unreliable *u = user;
    if (io->kind != FAULTFS_WRITE || !strstr(io->path, "moved") ||
        atomic_load(&u->told->switches) || atomic_fetch_add(&u->writes, 1) % 5 != 4)
        return 0;
    atomic_fetch_add(&u->failed, 1);
    return -EIO;
}

/* The crowd would fail with any request of its own that fails. */
static void a_target_that_fails_fails_no_write_of_the_guest(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct crowd crowd;
    struct told t;
    const struct dr_mirror_options o = {.format = "raw", .write_blocking = true};
    make_pair(fs, "qcow2", "qcow2");
    crowd_begin(&crowd, faultfs_fs(f), "top");
    struct unreliable u = {.told = &t};
    make_job(&t, &crowd);
    faultfs_observe(f, fail_every_fifth, &u);
    ok(dr_disk_mirror(crowd.disk, "moved", &o, t.job, &err));
    assert_true(u.failed > 0);
    assert_true(t.errors <= u.failed);
    dr_job_free(t.job);
    crowd_end(&crowd, "moved");
    faultfs_free(f);
}

/* ------------------------------------------------------------------ a guest that is faster */

#define LARGE  (64u * MiB)
#define GRAIN  (64u * KiB)
#define GRAINS (LARGE / GRAIN)
#define BLOCK  (512u * KiB) /* what the job copies in one piece */

/* For each 64 KiB that the job writes, its guest writes to two other places. */
struct fast_guest {
    struct dr_disk *disk;
    bool nested; /* the target is written by the guest's own write */
    uint64_t seed, copied, held;
    uint32_t last[GRAINS]; /* written to each place */
};

static int write_twice_as_much(void *user, const struct faultfs_io *io)
{
    struct fast_guest *g = user;
    if (io->kind != FAULTFS_WRITE || !strstr(io->path, "moved") || g->nested)
        return 0;
    g->copied += io->len;
    if (atomic_load(&g->disk->closed)) {
        g->held += io->len;
        return 0;
    }
    g->nested = true;
    for (uint64_t i = 0; i < 2 * ((io->len + GRAIN - 1) / GRAIN); i++) {
        uint64_t grain;
        do
            grain = next_random(&g->seed) % GRAINS;
        while (grain * GRAIN / BLOCK == io->off / BLOCK);
        g->last[grain]++;
        ok(dr_pwrite(g->disk, &g->last[grain], grain * GRAIN, sizeof(uint32_t), 0, &err));
    }
    g->nested = false;
    return 0;
}

static void a_guest_that_is_faster_than_the_copy_does_not_keep_it_busy(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct fast_guest *g = calloc(1, sizeof(*g));
    const struct dr_job_options one = {.workers = 1};
    const struct dr_mirror_options o = {.format = "raw"};
    struct dr_job *job;
    g->seed = 7;
    make(fs, "top", "raw", LARGE, NULL);
    uint8_t *all = malloc(LARGE);
    memset(all, 0x33, LARGE);
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &g->disk, &err));
    ok(dr_pwrite(g->disk, all, 0, LARGE, 0, &err));
    faultfs_observe(f, write_twice_as_much, g);
    ok(dr_job_new(NULL, &one, &job, &err));
    ok(dr_disk_mirror(g->disk, "moved", &o, job, &err));
    dr_job_free(job);
    faultfs_observe(f, NULL, NULL);
    assert_string_equal(dr_image_path(g->disk, 0), "moved");
    /* all, and at least once again; more rounds like that one are of no use, so writes block */
    assert_in_range(g->copied / LARGE, 2, 5);
    assert_true(g->held <= MiB);
    ok(dr_pread(g->disk, all, 0, LARGE, &err));
    for (unsigned i = 0; i < GRAINS; i++) {
        uint32_t have;
        memcpy(&have, all + i * GRAIN, sizeof(have));
        assert_int_equal(have, g->last[i] ? g->last[i] : 0x33333333);
    }
    ok(dr_close(g->disk, &err));
    free(all);
    free(g);
    faultfs_free(f);
}

/* ------------------------------------------------------------------ while requests wait */

/* A guest that writes to the overlay after all that was clean there has been dropped, and again
 * beside the job's copying of that. */
struct late_guest {
    struct dr_disk *disk;
    struct dr_job *job;
    bool switches, wrote, nested;
    unsigned flushes;  /* of the overlay, the first of which comes when it was dropped */
    unsigned again;    /* writes beside the copying */
    bool unflushed;    /* the overlay has something that was written since its last flush */
    bool flushed_late; /* it still had when requests waited */
    unsigned punched, punched_late;
};

static void late_write(struct late_guest *g, uint64_t off, size_t len)
{
    uint8_t *buf = malloc(len);
    memset(buf, 0x44, len);
    g->nested = true;
    ok(dr_pwrite(g->disk, buf, off, len, 0, &err));
    g->nested = false;
    free(buf);
}

static void see_overlay(struct late_guest *g, const struct faultfs_io *io, bool waiting)
{
    if (io->kind == FAULTFS_WRITE && !waiting)
        g->unflushed = true;
    if (io->kind == FAULTFS_FLUSH) {
        g->flushes += g->switches;
        g->flushed_late = g->flushed_late || (waiting && g->unflushed);
        g->unflushed = false;
    }
    if (io->kind == FAULTFS_ZERO)
        *(waiting ? &g->punched_late : &g->punched) += 1;
}

/* What was clean has gone from the overlay before the job copies what has changed since. */
static int see_pivot(void *user, const struct faultfs_io *io)
{
    struct late_guest *g = user;
    bool waiting = atomic_load(&g->disk->closed), top = strstr(io->path, "top");
    if (top)
        see_overlay(g, io, waiting);
    if (waiting || g->nested || g->flushes == 0)
        return 0;
    if (top && io->kind == FAULTFS_FLUSH && !g->wrote) {
        g->wrote = true;
        late_write(g, 0, 1536 * KiB);
    } else if (!top && io->kind == FAULTFS_WRITE && g->wrote && g->again < 4) {
        late_write(g, 2 * MiB + g->again++ * 64 * KiB, 64 * KiB);
    }
    return 0;
}

static int late_switch(void *user)
{
    ((struct late_guest *)user)->switches = true;
    return 0;
}

static void
requests_wait_neither_for_what_was_written_long_ago_nor_for_space_to_be_given_back(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct late_guest g = {0};
    const struct dr_job_options o = {.before_switch = late_switch, .user = &g, .workers = 1};
    const struct dr_commit_options pivot = {.pivot = true};
    make_pair(fs, "qcow2", "qcow2");
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &g.disk, &err));
    faultfs_observe(f, see_pivot, &g);
    ok(dr_job_new(NULL, &o, &g.job, &err));
    ok(dr_disk_commit(g.disk, &pivot, g.job, &err));
    faultfs_observe(f, NULL, NULL);
    assert_string_equal(dr_image_path(g.disk, 0), "base");
    assert_int_equal(g.again, 4);
    assert_false(g.flushed_late);
    assert_int_equal(g.punched_late, 0);
    assert_true(g.punched > 0);
    dr_job_free(g.job);
    ok(dr_close(g.disk, &err));
    faultfs_free(f);
}

/* A guest that writes to one place all the time, and, once the overlay was dropped, to it and to
 * another. */
struct hot_guest {
    struct dr_disk *disk;
    bool switches;
    unsigned flushes;  /* of the overlay since then */
    uint64_t *longest; /* write to the overlay on behalf of the guest */
    uint64_t hot, cold;
};

static void hot_write(struct hot_guest *g, uint64_t off, uint64_t *longest)
{
    uint8_t buf[4 * KiB];
    memset(buf, 0x44, sizeof(buf));
    g->longest = longest;
    ok(dr_pwrite(g->disk, buf, off, sizeof(buf), 0, &err));
    g->longest = NULL;
}

static int see_hot(void *user, const struct faultfs_io *io)
{
    struct hot_guest *g = user;
    if (!strstr(io->path, "top") || atomic_load(&g->disk->closed))
        return 0;
    if (g->longest && io->kind == FAULTFS_WRITE)
        *g->longest = dr_max(*g->longest, io->len);
    if (io->kind == FAULTFS_FLUSH && g->switches && ++g->flushes == 2) {
        hot_write(g, 2 * MiB, &g->hot);
        hot_write(g, 1 * MiB, &g->cold);
    }
    return 0;
}

static int hot_switch(void *user)
{
    struct hot_guest *g = user;
    const size_t len = 1536 * KiB; /* so much that it is copied before the switch */
    uint8_t *buf = malloc(len);
    memset(buf, 0x33, len);
    g->switches = true;
    ok(dr_pwrite(g->disk, buf, 1536 * KiB, len, 0, &err));
    free(buf);
    return 0;
}

/* It would have to be copied from the base again for the next write, and be dropped once more. */
static void what_a_guest_keeps_writing_to_is_not_dropped_before_requests_wait(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct hot_guest g = {0};
    const struct dr_job_options o = {.before_switch = hot_switch, .user = &g, .workers = 1};
    const struct dr_commit_options pivot = {.pivot = true};
    struct dr_job *job;
    uint8_t have[4 * KiB], want[4 * KiB];
    make_pair(fs, "qcow2", "qcow2");
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &g.disk, &err));
    faultfs_observe(f, see_hot, &g);
    ok(dr_job_new(NULL, &o, &job, &err));
    ok(dr_disk_commit(g.disk, &pivot, job, &err));
    faultfs_observe(f, NULL, NULL);
    assert_string_equal(dr_image_path(g.disk, 0), "base");
    assert_int_equal(g.hot, 4 * KiB);
    assert_true(g.cold >= 64 * KiB);
    memset(want, 0x44, sizeof(want));
    for (unsigned at = 1; at <= 2; at++) {
        ok(dr_pread(g.disk, have, at * MiB, sizeof(have), &err));
        assert_memory_equal(have, want, sizeof(have));
    }
    dr_job_free(job);
    ok(dr_close(g.disk, &err));
    faultfs_free(f);
}

/* ------------------------------------------------------------------ many zeros */

static uint64_t first_item_of_zeros(struct dr_chain *chain, const struct dr_job *job)
{
    struct dr_job copy = *job;
    struct dr_transfer t = {.dst = chain, .hole_is_zero = true, .write_zeros = true, .job = &copy};
    struct dr_copy_item item = {0};
    dr_walk_init(&t.walk, chain, 0, 1, LARGE);
    assert_int_equal(dr_transfer_next(&t, &item, NULL), 1);
    assert_int_equal(item.kind, DR_ITEM_ZERO);
    return item.aux[0];
}

static void a_job_beside_a_guest_makes_many_zeros_in_parts(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk;
    make(fs, "top", "qcow2", LARGE, NULL);
    ok(dr_open_fs(fs, "top", &rw, &disk, &err));
    ok(dr_zero(disk, 0, LARGE, 0, &err));
    struct dr_chain *chain = dr_disk_chain(disk);
    const struct dr_job beside = {.beside = disk}, hurry = {.beside = disk, .hurry = true};
    assert_int_equal(first_item_of_zeros(chain, &beside), 16 * MiB);
    assert_int_equal(first_item_of_zeros(chain, &hurry), LARGE);
    ok(dr_chain_unref(chain, &err));
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ a job that sleeps */

struct sleeper {
    struct dr_disk *disk;
    struct dr_job *job;
    pthread_t guest;
    _Atomic uint64_t awaited, seen; /* offset + 1 of the last write, on either side */
};

static int see_writes(void *user, const struct faultfs_io *io)
{
    struct sleeper *s = user;
    uint64_t awaited = atomic_load(&s->awaited);
    if (io->kind == FAULTFS_WRITE && strstr(io->path, "moved") && awaited && awaited > io->off &&
        awaited <= io->off + io->len)
        atomic_store(&s->seen, awaited);
    return 0;
}

static void *write_now_and_then(void *user)
{
    struct sleeper *s = user;
    for (uint64_t off = 0; off < 3 * MiB; off += MiB) {
        atomic_store(&s->awaited, off + 1);
        if (dr_pwrite(s->disk, "x", off, 1, 0, NULL) < 0)
            return s;
        while (atomic_load(&s->seen) != off + 1) /* for ever, if the job sleeps on */
            sched_yield();
    }
    dr_job_complete(s->job, true);
    return NULL;
}

static void begin_guest(void *user)
{
    struct sleeper *s = user;
    assert_int_equal(pthread_create(&s->guest, NULL, write_now_and_then, s), 0);
}

static void a_job_that_is_ready_wakes_up_for_each_change(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    struct sleeper s = {0};
    const struct dr_job_options o = {.ready = begin_guest, .user = &s};
    const struct dr_mirror_options raw = {.format = "raw"};
    void *trouble;
    make(fs, "top", "raw", 4 * MiB, NULL);
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &s.disk, &err));
    faultfs_observe(f, see_writes, &s);
    ok(dr_job_new(NULL, &o, &s.job, &err));
    ok(dr_disk_mirror(s.disk, "moved", &raw, s.job, &err));
    pthread_join(s.guest, &trouble);
    assert_null(trouble);
    dr_job_free(s.job);
    ok(dr_close(s.disk, &err));
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_mirror_holds_what_a_crowd_wrote),
        cmocka_unit_test(a_base_holds_what_a_crowd_wrote),
        ops_test(a_target_that_fails_fails_no_write_of_the_guest),
        ops_test(a_guest_that_is_faster_than_the_copy_does_not_keep_it_busy),
        ops_test(
            requests_wait_neither_for_what_was_written_long_ago_nor_for_space_to_be_given_back),
        ops_test(what_a_guest_keeps_writing_to_is_not_dropped_before_requests_wait),
        ops_test(a_job_beside_a_guest_makes_many_zeros_in_parts),
        ops_test(a_job_that_is_ready_wakes_up_for_each_change),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
