/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What comes in between while a disk is copied and goes over to another image. */
#include "faultfs.h"
#include "test-ops.h"

static const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};

#define SIZE (2 * MiB)

/* base ← top, both qcow2, with data in each. */
static void family(struct dr_fs *fs)
{
    for (unsigned i = 0; i < 2; i++) {
        struct dr_create_options c = {.format = "qcow2",
                                      .size = i ? 0 : SIZE,
                                      .has_size = i == 0,
                                      .backing = i ? "base" : NULL,
                                      .backing_format = i ? "qcow2" : NULL};
        ok(dr_create_fs(fs, i ? "top" : "base", &c, &err));
        put(fs, i ? "top" : "base", i * 512 * KiB, 640 * KiB, 0x11 * ((int)i + 1));
    }
}

/* ------------------------------------------------------------------ a cancel at any moment */

struct cancelling {
    struct dr_job *job;
    uint64_t at; /* the call to a file before which the job is cancelled */
    _Atomic uint64_t calls;
};

static int cancel_at(void *user, const struct faultfs_io *io)
{
    struct cancelling *c = user;
    (void)io;
    if (atomic_fetch_add(&c->calls, 1) == c->at)
        dr_job_cancel(c->job);
    return 0;
}

static int go_over(struct dr_disk *disk, bool mirror, struct dr_job *job, struct dr_error *err)
{
    const struct dr_commit_options pivot = {.pivot = true};
    return mirror ? dr_disk_mirror(disk, "moved", NULL, job, err)
                  : dr_disk_commit(disk, &pivot, job, err);
}

/* Cancelled at its n-th call. Returns whether it had so many. */
static bool cancelled_at(bool mirror, uint64_t n, const uint8_t *want)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(fs);
    struct dr_error why = DR_ERROR_INIT;
    struct cancelling c = {.at = n};
    const struct dr_job_options one = {.workers = 1};
    struct dr_disk *disk;
    uint8_t *have = malloc(SIZE);
    family(fs);
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &disk, &err));
    ok(dr_job_new(NULL, &one, &c.job, &err));
    faultfs_observe(f, cancel_at, &c);
    int r = go_over(disk, mirror, c.job, &why);
    faultfs_observe(f, NULL, NULL);
    if (r != 0 && r != -ECANCELED)
        fail_msg("cancelled at call %llu: %s", (unsigned long long)n, why.text);
    const char *gone_to = mirror ? "moved" : "base";
    assert_string_equal(dr_image_path(disk, 0), r == 0 ? gone_to : "top");
    assert_int_equal(dr_chain_length(disk), r == 0 ? 1 : 2);
    ok(dr_pread(disk, have, 0, SIZE, &err));
    assert_memory_equal(have, want, SIZE);
    if (r < 0) /* nothing is left of it that is in the way of another one */
        ok(go_over(disk, mirror, NULL, &err));
    ok(dr_pread(disk, have, 0, SIZE, &err));
    assert_memory_equal(have, want, SIZE);
    ok(dr_close(disk, &err));
    same_view(fs, gone_to, want, SIZE);
    same_view(fs, "top", want, SIZE);
    dr_job_free(c.job);
    bool had = c.calls > n;
    faultfs_free(f);
    dr_fs_memory_free(fs);
    free(have);
    return had;
}

static void a_cancel_at_any_moment_leaves_one_disk_or_the_other(void **state)
{
    uint64_t size;
    family(*state);
    uint8_t *want = view(*state, "top", &size);
    for (int mirror = 0; mirror < 2; mirror++)
        for (uint64_t n = 0; cancelled_at(mirror, n, want); n++)
            ;
    free(want);
}

/* ------------------------------------------------------------------ a resize */

struct resizing {
    struct dr_disk *disk;
    struct dr_job *job;
    unsigned refused;
};

static void resize_now(struct resizing *z)
{
    refused(dr_truncate(z->disk, 2 * SIZE, &err), EBUSY, "resize must wait until");
    z->refused++;
}

static void when_ready(void *user)
{
    struct resizing *z = user;
    resize_now(z);
    dr_job_complete(z->job, true);
}

static int before_switch(void *user)
{
    resize_now(user);
    return 0;
}

static void a_disk_keeps_its_size_until_it_has_gone_over(void **state)
{
    (void)state;
    for (int mirror = 0; mirror < 2; mirror++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct resizing z = {0};
        const struct dr_job_options o = {
            .ready = when_ready, .before_switch = before_switch, .user = &z};
        family(fs);
        ok(dr_open_fs(fs, "top", &rw, &z.disk, &err));
        ok(dr_job_new(NULL, &o, &z.job, &err));
        ok(go_over(z.disk, mirror, z.job, &err));
        assert_int_equal(z.refused, 2);
        assert_int_equal(dr_size(z.disk), SIZE);
        ok(dr_truncate(z.disk, 2 * SIZE, &err));
        assert_int_equal(dr_size(z.disk), 2 * SIZE);
        dr_job_free(z.job);
        ok(dr_close(z.disk, &err));
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ no space, and a bitmap */

struct filling {
    struct dr_disk *disk;
    uint64_t at;
    _Atomic uint64_t writes;
    unsigned asked;
};

/* Once. */
static int full_at(void *user, const struct faultfs_io *io)
{
    struct filling *z = user;
    bool grows = io->kind == FAULTFS_WRITE && strcmp(io->path, "base") == 0;
    return grows && atomic_fetch_add(&z->writes, 1) == z->at ? -ENOSPC : 0;
}

static enum dr_error_action try_again(void *user, bool reading, int error, const char *text)
{
    struct filling *z = user;
    (void)text;
    assert_false(reading);
    assert_int_equal(error, ENOSPC);
    z->asked++;
    return DR_ERROR_STOP; /* somebody has made space at once */
}

struct marks {
    uint64_t off, end; /* expected */
    bool all;
};

static int look_for_marks(void *user, uint64_t off, uint64_t len)
{
    struct marks *m = user;
    m->all |= off <= m->off && off + len >= m->end;
    return 0;
}

/* Does the bitmap of base say that all of [off, end) was written to? */
static bool all_marked(struct dr_fs *fs, uint64_t off, uint64_t end)
{
    struct marks m = {off, end, false};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, "base", NULL, &disk, &err));
    ok(dr_disk_bitmap_read(disk, "since", look_for_marks, &m, &err));
    ok(dr_close(disk, &err));
    return m.all;
}

/* A commit finds no space for its n-th write, but then it does. Returns whether it had so many. */
static bool filled_at(uint64_t n, const uint8_t *want)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(fs);
    struct filling z = {.at = n};
    const struct dr_job_options o = {.error = try_again, .workers = 1, .user = &z};
    const struct dr_commit_options keep = {.keep = true};
    const struct dr_bitmap_options fine = {.granularity = 64 * KiB};
    struct dr_error why = DR_ERROR_INIT;
    struct dr_job *job;
    char *json = NULL;
    family(fs);
    ok(dr_open_fs(fs, "base", &rw, &z.disk, &err));
    ok(dr_disk_bitmap_change(z.disk, "since", DR_BITMAP_ADD, &fine, &err));
    ok(dr_close(z.disk, &err));
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &z.disk, &err));
    ok(dr_job_new(NULL, &o, &job, &err));
    faultfs_observe(f, full_at, &z);
    int r = dr_disk_commit(z.disk, &keep, job, &why);
    faultfs_observe(f, NULL, NULL);
    dr_job_free(job);
    if (r < 0) { /* it was not in the copying: a second attempt goes on */
        assert_int_equal(r, -ENOSPC);
        ok(dr_disk_commit(z.disk, &keep, NULL, &err));
    }
    ok(dr_close(z.disk, &err));
    same_view(fs, "base", want, SIZE);
    assert_true(all_marked(fs, 512 * KiB, 1152 * KiB));
    ok(dr_check_fs(fs, "base", NULL, DR_REPAIR_NONE, NULL, NULL, &json, &err));
    assert_null(strstr(json, "\"corruptions\""));
    free(json);
    bool had = z.writes > n;
    faultfs_free(f);
    dr_fs_memory_free(fs);
    return had;
}

static void a_bitmap_misses_nothing_of_a_commit_that_had_no_space(void **state)
{
    uint64_t size;
    family(*state);
    uint8_t *want = view(*state, "top", &size);
    for (uint64_t n = 0; filled_at(n, want); n++)
        ;
    free(want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(a_cancel_at_any_moment_leaves_one_disk_or_the_other),
        cmocka_unit_test(a_disk_keeps_its_size_until_it_has_gone_over),
        ops_test(a_bitmap_misses_nothing_of_a_commit_that_had_no_space),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
