/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* rebase, stream: another parent, the same bytes. */
#include "faultfs.h"
#include "test-ops.h"

#define SIZE (2 * MiB)

static int rebase(struct dr_fs *fs, const char *path, const char *backing, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = backing, .backing_format = "vmdk"};
    return dr_rebase_fs(fs, path, &o, NULL, err);
}

/* The chain a <- mid <- top, and a stranger b. */
static void family(struct dr_fs *fs)
{
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, MiB, 0x11);
    make(fs, "mid.vmdk", "vmdk", 0, "a.vmdk");
    put(fs, "mid.vmdk", 512 * KiB, 256 * KiB, 0x22);
    make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
    put(fs, "top.vmdk", 640 * KiB, 64 * KiB, 0x33);
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
    put(fs, "b.vmdk", 0, 256 * KiB, 0x11);
    put(fs, "b.vmdk", MiB + 512 * KiB, 128 * KiB, 0x44);
}

static void check_parent(struct dr_fs *fs, const char *path, const char *want, size_t chain)
{
    struct dr_disk *disk;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    if (want)
        assert_string_equal(dr_image_backing_name(disk, 0), want);
    else
        assert_null(dr_image_backing_name(disk, 0));
    assert_int_equal(dr_chain_length(disk), chain);
    ok(dr_close(disk, &err));
}

static void onto_a_stranger_the_view_stays(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(rebase(fs, "top.vmdk", "b.vmdk", &err));
    same_view(fs, "top.vmdk", want, size);
    check_parent(fs, "top.vmdk", "b.vmdk", 2);
    free(want);
}

static void onto_the_grandparent_takes_only_what_lies_between(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    uint64_t before = disk_size(fs, "top.vmdk");
    ok(rebase(fs, "top.vmdk", "a.vmdk", &err));
    same_view(fs, "top.vmdk", want, size);
    check_parent(fs, "top.vmdk", "a.vmdk", 2);
    /* 256 KiB of mid, of which 64 KiB were covered */
    assert_in_range(disk_size(fs, "top.vmdk"), before + 192 * KiB, before + 200 * KiB);
    free(want);
}

static void to_nothing_flattens(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(rebase(fs, "top.vmdk", "", &err));
    same_view(fs, "top.vmdk", want, size);
    check_parent(fs, "top.vmdk", NULL, 1);
    free(want);
}

static void refusal_comes_before_any_write(void **state)
{
    struct dr_fs *fs = *state;
    size_t len, again;
    family(fs);
    make(fs, "raw.img", "raw", SIZE, NULL);
    uint8_t *before = file_bytes(fs, "top.vmdk", &len);
    struct dr_rebase_options o = {.backing = "raw.img", .backing_format = "raw"};
    refused(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err), EINVAL, "must be a VMDK");
    refused(rebase(fs, "top.vmdk", "missing.vmdk", &err), ENOENT, "missing.vmdk");
    refused(rebase(fs, "top.vmdk", "top.vmdk", &err), ELOOP, "its own backing file");
    refused(rebase(fs, "top.vmdk", "quo\"te.vmdk", &err), ENOENT, "quo\"te");
    refused(rebase(fs, "a.vmdk", "mid.vmdk", &err), ELOOP, "loop");
    refused(rebase(fs, "raw.img", "a.vmdk", &err), ENOTSUP, "no backing file");
    uint8_t *after = file_bytes(fs, "top.vmdk", &again);
    assert_int_equal(len, again);
    assert_memory_equal(before, after, len);
    free(before);
    free(after);
}

/* It is open already, and its bytes as another format would be other bytes. */
static void onto_the_grandparent_as_another_format_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const char *const names[] = {"a", "mid", "top"};
    for (size_t i = 0; i < 3; i++) {
        struct dr_create_options o = {.format = "qcow2",
                                      .size = SIZE,
                                      .has_size = i == 0,
                                      .backing = i ? names[i - 1] : NULL,
                                      .backing_format = i ? "qcow2" : NULL};
        ok(dr_create_fs(fs, names[i], &o, &err));
    }
    struct dr_rebase_options o = {.backing = "a", .backing_format = "raw"};
    refused(dr_rebase_fs(fs, "top", &o, NULL, &err), EINVAL, "is open as qcow2, not as raw");
    o.backing_format = "qcow2";
    ok(dr_rebase_fs(fs, "top", &o, NULL, &err));
    check_parent(fs, "top", "a", 2);
}

static void unsafe_rewrites_only_the_name_and_refuses_nonsense(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    struct dr_rebase_options o = {
        .backing = "missing.vmdk", .backing_format = "vmdk", .unsafe = true};
    refused(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err), ENOENT, "missing.vmdk");
    o.backing = "top.vmdk";
    refused(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err), ELOOP, "its own backing file");
    o.backing = "top.vmdk";
    refused(dr_rebase_fs(fs, "mid.vmdk", &o, NULL, &err), ELOOP, "loop");
    make(fs, "junk", "raw", 70 * KiB, NULL);
    o.backing = "junk";
    refused(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err), EINVAL, "junk");
    o.backing = "b.vmdk";
    ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    check_parent(fs, "top.vmdk", "b.vmdk", 2);
    uint8_t *have = view(fs, "top.vmdk", &size);
    assert_int_equal(have[640 * KiB], 0x33); /* its own */
    assert_int_equal(have[512 * KiB], 0);    /* was mid's, b has nothing */
    free(have);
    o.backing = "missing.vmdk";
    o.force = true;
    ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    refused(dr_open_fs(fs, "top.vmdk", NULL, &(struct dr_disk *){NULL}, &err), ENOENT,
            "missing.vmdk");
}

static void zeros_of_the_old_parent_hide_the_new_one(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "old.vmdk", "vmdk", SIZE, NULL);
    make(fs, "new.vmdk", "vmdk", SIZE, NULL);
    put(fs, "new.vmdk", 0, SIZE, 0x77);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(rebase(fs, "top.vmdk", "new.vmdk", &err));
    same_view(fs, "top.vmdk", want, size);
    free(want);
}

/* Where the middle image ends its child reads zeros, whatever lies deeper: stream and rebase must
 * keep them. */
static void shorter_middle_image_keeps_its_zeros(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    for (int how = 0; how < 2; how++) {
        make(fs, "base.vmdk", "vmdk", SIZE, NULL);
        put(fs, "base.vmdk", 0, SIZE, 0x11);
        make(fs, "mid.vmdk", "vmdk", 512 * KiB, "base.vmdk");
        make(fs, "top.vmdk", "vmdk", SIZE, "mid.vmdk");
        uint8_t *want = view(fs, "top.vmdk", &size);
        assert_int_equal(want[512 * KiB - 1], 0x11);
        assert_int_equal(want[512 * KiB], 0);
        struct dr_stream_options s = {.base = "base.vmdk"};
        if (how == 0)
            ok(dr_stream_fs(fs, "top.vmdk", &s, NULL, &err));
        else
            ok(rebase(fs, "top.vmdk", "base.vmdk", &err));
        same_view(fs, "top.vmdk", want, size);
        check_parent(fs, "top.vmdk", "base.vmdk", 2);
        free(want);
    }
}

static void stream_to_nothing_and_to_a_stranger(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    struct dr_stream_options s = {.base = "b.vmdk"};
    refused(dr_stream_fs(fs, "top.vmdk", &s, NULL, &err), EINVAL, "not one of its backing files");
    s.base = "top.vmdk";
    refused(dr_stream_fs(fs, "top.vmdk", &s, NULL, &err), EINVAL, "not one of its backing files");
    s.base = NULL;
    ok(dr_stream_fs(fs, "top.vmdk", &s, NULL, &err));
    check_parent(fs, "top.vmdk", NULL, 1);
    same_view(fs, "top.vmdk", want, size);
    free(want);
}

/* By its path, and while others may use it. */
static void drop_equal_in(struct dr_fs *fs, bool in_use)
{
    uint64_t size;
    make(fs, "old.vmdk", "vmdk", SIZE, NULL);
    make(fs, "new.vmdk", "vmdk", SIZE, NULL);
    put(fs, "new.vmdk", 0, MiB, 0x55);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    put(fs, "top.vmdk", 0, MiB, 0x55);
    put(fs, "top.vmdk", MiB, 64 * KiB, 0x66);
    uint8_t *want = view(fs, "top.vmdk", &size);
    struct dr_rebase_options o = {
        .backing = "new.vmdk", .backing_format = "vmdk", .drop_equal = true};
    struct dr_open_options writable = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    struct dr_extent_status st;
    if (in_use) {
        ok(dr_open_fs(fs, "top.vmdk", &writable, &disk, &err));
        ok(dr_disk_rebase(disk, &o, NULL, &err));
        ok(dr_close(disk, &err));
    } else {
        ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    }
    same_view(fs, "top.vmdk", want, size);
    ok(dr_open_fs(fs, "top.vmdk", NULL, &disk, &err));
    ok(dr_block_status(disk, 0, SIZE, &st, &err));
    assert_int_equal(st.depth, 1);
    ok(dr_block_status(disk, MiB, SIZE - MiB, &st, &err));
    assert_int_equal(st.depth, 0);
    ok(dr_close(disk, &err));
    free(want);
}

/* The second and third cluster of a new image have the reference counts. */
static int no_counts(void *user, const struct faultfs_io *io)
{
    bool *failed = user;
    if (io->kind != FAULTFS_READ || strcmp(io->path, "top") != 0 || io->off < 64 * KiB ||
        io->off >= 192 * KiB)
        return 0;
    *failed = true;
    return -EIO;
}

/* What cannot be given up stays, and the rebase says so. */
static void units_that_cannot_be_given_up_are_told(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    const struct dr_create_options top = {
        .format = "qcow2", .backing = "old", .backing_format = "raw"};
    const struct dr_rebase_options o = {
        .backing = "new", .backing_format = "raw", .drop_equal = true};
    bool failed = false;
    uint64_t size;
    make(fs, "old", "raw", SIZE, NULL);
    make(fs, "new", "raw", SIZE, NULL);
    put(fs, "new", 0, MiB, 0x11);
    ok(dr_create_fs(fs, "top", &top, &err));
    put(fs, "top", 0, MiB, 0x11);
    put(fs, "top", MiB, SIZE - MiB, 0); /* nothing is missing of the old parent */
    uint8_t *want = view(fs, "top", &size);
    faultfs_observe(f, no_counts, &failed);
    refused(dr_rebase_fs(faultfs_fs(f), "top", &o, NULL, &err), EIO,
            "what equals the parent stays");
    faultfs_observe(f, NULL, NULL);
    assert_true(failed);
    same_view(fs, "top", want, size);
    free(want);
    faultfs_free(f);
}

static void drop_equal_gives_up_what_the_parent_has(void **state)
{
    (void)state;
    for (int in_use = 0; in_use < 2; in_use++) {
        struct dr_fs *fs = dr_fs_memory_new();
        drop_equal_in(fs, in_use);
        dr_fs_memory_free(fs);
    }
}

static void dry_run_writes_nothing(void **state)
{
    struct dr_fs *fs = *state;
    size_t len, again;
    family(fs);
    uint8_t *before = file_bytes(fs, "top.vmdk", &len);
    struct dr_rebase_options o = {.backing = "b.vmdk", .backing_format = "vmdk", .dry_run = true};
    ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    uint8_t *after = file_bytes(fs, "top.vmdk", &again);
    assert_int_equal(len, again);
    assert_memory_equal(before, after, len);
    free(before);
    free(after);
}

static int stop_half_way(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    return done > 0 && done < total;
}

static void stopped_rebase_changes_nothing_and_can_be_repeated(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    struct dr_job job = {.cancelled = 1, .progress = stop_half_way};
    struct dr_rebase_options o = {.backing = "b.vmdk", .backing_format = "vmdk"};
    refused(dr_rebase_fs(fs, "top.vmdk", &o, &job, &err), ECANCELED, "stopped");
    same_view(fs, "top.vmdk", want, size);
    check_parent(fs, "top.vmdk", "mid.vmdk", 3);
    ok(dr_rebase_fs(fs, "top.vmdk", &o, NULL, &err));
    same_view(fs, "top.vmdk", want, size);
    free(want);
}

static void holes_of_huge_parents_are_not_read(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t huge = 100ull << 30;
    make(fs, "old.vmdk", "vmdk", huge, NULL);
    make(fs, "new.vmdk", "vmdk", huge, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "old.vmdk");
    put(fs, "top.vmdk", huge - MiB, MiB, 0x12);
    ok(rebase(fs, "top.vmdk", "new.vmdk", &err));
    ok(rebase(fs, "top.vmdk", "", &err));
    assert_in_range(disk_size(fs, "top.vmdk"), MiB, 20 * MiB);
}

/* ------------------------------------------------------------------ by chance */

/* So many pieces of the disk are filled, compressed. */
static uint64_t flushes_of_a_compressing_rebase(uint64_t size)
{
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_create_options o = {.format = "qcow2", .backing = "old.raw", .backing_format = "raw"};
    make(fs, "old.raw", "raw", size, NULL);
    put(fs, "old.raw", 0, size, 0x11);
    ok(dr_create_fs(fs, "top.qcow2", &o, &err));
    struct faultfs *f = faultfs_new(fs);
    struct dr_rebase_options compress = {.backing = "", .compress = true};
    struct dr_job job = {.workers = 1};
    ok(dr_rebase_fs(faultfs_fs(f), "top.qcow2", &compress, &job, &err));
    uint64_t flushes = faultfs_count_of(f, FAULTFS_FLUSH);
    faultfs_free(f);
    dr_fs_memory_free(fs);
    return flushes;
}

/* A run that is killed has to do again what was filled since the last flush: 128 MiB are not too
 * much for that. */
static void a_compressing_rebase_flushes_now_and_then_only(void **state)
{
    (void)state;
    uint64_t few = flushes_of_a_compressing_rebase(MiB);
    assert_int_equal(flushes_of_a_compressing_rebase(16 * MiB), few);
    assert_true(flushes_of_a_compressing_rebase(130 * MiB) > few);
}

static void random_chain(struct dr_fs *fs, uint64_t *seed, const char *name, const char *backing)
{
    static const uint64_t sizes[] = {MiB, MiB + 512, 2 * MiB, 3 * MiB - 512, 192 * KiB};
    uint64_t size = sizes[next_random(seed) % 5];
    make(fs, name, "vmdk", size, backing);
    for (unsigned i = 0; i < 6; i++) {
        uint64_t off = next_random(seed) % (size / 512) * 512;
        uint64_t len = dr_min(size - off, (next_random(seed) % 300 + 1) * 512);
        put(fs, name, off, len, next_random(seed) % 3 ? (int)(next_random(seed) % 4 + 1) : 0);
    }
}

static void any_rebase_keeps_any_view(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t seed = 0x1234567, size;
    for (int round = 0; round < 60; round++) {
        random_chain(fs, &seed, "a.vmdk", NULL);
        random_chain(fs, &seed, "b.vmdk", "a.vmdk");
        random_chain(fs, &seed, "c.vmdk", "b.vmdk");
        random_chain(fs, &seed, "top.vmdk", "c.vmdk");
        random_chain(fs, &seed, "x.vmdk", NULL);
        random_chain(fs, &seed, "y.vmdk", round % 2 ? "x.vmdk" : "a.vmdk");
        static const char *const targets[] = {"a.vmdk", "b.vmdk", "c.vmdk", "x.vmdk", "y.vmdk", ""};
        uint8_t *want = view(fs, "top.vmdk", &size);
        for (int step = 0; step < 3; step++) {
            struct dr_rebase_options o = {.backing = targets[next_random(&seed) % 6],
                                          .backing_format = "vmdk",
                                          .drop_equal = next_random(&seed) % 2};
            struct dr_job job = {.workers = (unsigned)(next_random(&seed) % 2 + 1)};
            ok(dr_rebase_fs(fs, "top.vmdk", &o, &job, &err));
            same_view(fs, "top.vmdk", want, size);
        }
        free(want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(onto_a_stranger_the_view_stays),
        ops_test(onto_the_grandparent_takes_only_what_lies_between),
        ops_test(to_nothing_flattens),
        ops_test(refusal_comes_before_any_write),
        ops_test(onto_the_grandparent_as_another_format_is_refused),
        ops_test(unsafe_rewrites_only_the_name_and_refuses_nonsense),
        ops_test(zeros_of_the_old_parent_hide_the_new_one),
        ops_test(shorter_middle_image_keeps_its_zeros),
        ops_test(stream_to_nothing_and_to_a_stranger),
        ops_test(drop_equal_gives_up_what_the_parent_has),
        ops_test(units_that_cannot_be_given_up_are_told),
        ops_test(dry_run_writes_nothing),
        ops_test(stopped_rebase_changes_nothing_and_can_be_repeated),
        ops_test(holes_of_huge_parents_are_not_read),
        cmocka_unit_test(a_compressing_rebase_flushes_now_and_then_only),
        ops_test(any_rebase_keeps_any_view),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
