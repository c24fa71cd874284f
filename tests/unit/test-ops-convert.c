/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* create, convert, compare: new images complete or not at all, the same bytes, nothing read twice.
 */
#include "faultfs.h"
#include "test-ops.h"

#define SIZE (4 * MiB)

static void pattern(struct dr_fs *fs, const char *path)
{
    put(fs, path, 0, MiB, 0x11);
    put(fs, path, MiB + 4096, 8192, 0x22);
    put(fs, path, 3 * MiB + 512, MiB - 1024, 0x33);
}

static int convert(struct dr_fs *fs, const char *from, const char *to, const char *format,
                   struct dr_error *err)
{
    struct dr_convert_options o = {.out_format = format, .sparse_size = DR_CONVERT_SPARSE_DEFAULT};
    return dr_convert_fs(fs, &from, 1, to, &o, NULL, err);
}

static void there_and_back(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.raw", "raw", SIZE, NULL);
    pattern(fs, "a.raw");
    uint8_t *want = view(fs, "a.raw", &size);
    ok(convert(fs, "a.raw", "b.vmdk", "vmdk", &err));
    same_view(fs, "b.vmdk", want, size);
    ok(convert(fs, "b.vmdk", "c.raw", "raw", &err));
    same_view(fs, "c.raw", want, size);
    assert_in_range(disk_size(fs, "c.raw"), 2 * MiB, 2 * MiB + 128 * KiB);
    assert_int_equal(count_files(fs), 3); /* nothing else is left */
    free(want);
}

static void each_subformat(void **state)
{
    static const char *const subformats[] = {"monolithicSparse", "monolithicFlat",
                                             "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"};
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.raw", "raw", SIZE, NULL);
    pattern(fs, "a.raw");
    uint8_t *want = view(fs, "a.raw", &size);
    for (size_t i = 0; i < 4; i++) {
        const char *from = "a.raw";
        struct dr_pair sub = {"subformat", subformats[i]};
        struct dr_convert_options o = {
            .out_format = "vmdk", .sparse_size = 4096, .pairs = &sub, .n_pairs = 1};
        ok(dr_convert_fs(fs, &from, 1, "x.vmdk", &o, NULL, &err)); /* over the one before */
        same_view(fs, "x.vmdk", want, size);
    }
    free(want);
}

static void files_of_others_are_not_taken_for_extents(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_pair sub = {"subformat", "monolithicFlat"};
    const char *from = "a.raw";
    make(fs, "a.raw", "raw", SIZE, NULL);
    make(fs, "x-flat.vmdk", "raw", MiB, NULL); /* by chance of this name */
    struct dr_convert_options o = {
        .out_format = "vmdk", .sparse_size = 4096, .pairs = &sub, .n_pairs = 1};
    refused(dr_convert_fs(fs, &from, 1, "x.vmdk", &o, NULL, &err), EEXIST, "x-flat.vmdk");
    make(fs, "x.vmdk", "vmdk", MiB, NULL);
    refused(dr_convert_fs(fs, &from, 1, "x.vmdk", &o, NULL, &err), EEXIST, "x-flat.vmdk");
    struct dr_create_options c = {
        .format = "vmdk", .size = MiB, .has_size = true, .pairs = &sub, .n_pairs = 1};
    refused(dr_create_fs(fs, "x.vmdk", &c, &err), EEXIST, "x-flat.vmdk");
    assert_int_equal(count_files(fs), 3);
}

/* A file system that says it is nearly full. */
static int little_space(struct dr_fs *fs, const char *path, uint64_t *bytes, struct dr_error *err)
{
    (void)fs;
    (void)path;
    (void)err;
    *bytes = MiB;
    return 0;
}

/* Only metadata are kept where there is no room. */
static int little_for_metadata(struct dr_fs *fs, const char *path, uint64_t *bytes,
                               struct dr_error *err)
{
    (void)fs;
    (void)err;
    *bytes = strstr(path, ".raw") ? 100 * MiB : KiB;
    return 0;
}

static void space_counts_where_the_data_is_kept(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_fs_ops *full = fs->ops;
    struct dr_fs_ops ops = *full;
    struct dr_create_options over = {
        .format = "add-cow", .backing = "a.raw", .backing_format = "raw"};
    make(fs, "a.raw", "raw", MiB, NULL);
    put(fs, "a.raw", 0, MiB, 0x11);
    ok(dr_create_fs(fs, "p.add-cow", &over, &err));
    over.backing = "p.add-cow";
    over.backing_format = "add-cow";
    ok(dr_create_fs(fs, "c.add-cow", &over, &err));
    put(fs, "c.add-cow", 0, MiB, 0x22);
    ops.free_space = little_for_metadata;
    fs->ops = &ops;
    struct dr_rebase_options r = {.backing = ""};
    ok(dr_rebase_fs(fs, "p.add-cow", &r, NULL, &err));
    struct dr_commit_options c = {0};
    ok(dr_commit_fs(fs, "c.add-cow", &c, NULL, &err));
    fs->ops = full;
}

/* Neither holes nor what the base has a place for, with data above or without. */
static void a_commit_needs_space_for_new_data_only(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_fs_ops *full = fs->ops;
    struct dr_fs_ops ops = *full;
    make(fs, "base.vmdk", "vmdk", 16 * MiB, NULL);
    put(fs, "base.vmdk", 0, 4 * MiB, 0x11);
    make(fs, "top.vmdk", "vmdk", 0, "base.vmdk");
    put(fs, "top.vmdk", 2 * MiB, 2 * MiB, 0x22);
    put(fs, "top.vmdk", 8 * MiB, MiB, 0x33);
    ops.free_space = little_space;
    fs->ops = &ops;
    struct dr_commit_options c = {0};
    ok(dr_commit_fs(fs, "top.vmdk", &c, NULL, &err));
    put(fs, "top.vmdk", 9 * MiB, MiB + 64 * KiB, 0x44);
    refused(dr_commit_fs(fs, "top.vmdk", &c, NULL, &err), ENOSPC, "needs 1114112 more bytes");
    fs->ops = full;
}

static void a_backing_file_in_use_is_read_without_locks_when_told_so(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options writable = {.flags = DR_OPEN_RDWR};
    struct dr_convert_options o = {
        .out_format = "vmdk", .backing = "base.vmdk", .backing_format = "vmdk"};
    struct dr_disk *base;
    const char *from = "a.raw";
    make(fs, "a.raw", "raw", MiB, NULL);
    make(fs, "base.vmdk", "vmdk", MiB, NULL);
    ok(dr_open_fs(fs, "base.vmdk", &writable, &base, &err));
    refused(dr_convert_fs(fs, &from, 1, "new.vmdk", &o, NULL, &err), EBUSY, "lock");
    o.target_flags = DR_OPEN_NO_LOCK;
    ok(dr_convert_fs(fs, &from, 1, "new.vmdk", &o, NULL, &err));
    ok(dr_close(base, &err));
}

static void note_message(void *user, const char *text)
{
    if (strstr(text, "free"))
        ++*(int *)user;
}

static void space_is_looked_at_before_copying(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_fs_ops *full = fs->ops;
    struct dr_fs_ops ops = *full;
    int told = 0;
    const char *from = "a.raw";
    make(fs, "a.raw", "raw", SIZE, NULL);
    pattern(fs, "a.raw");
    make(fs, "base.vmdk", "vmdk", SIZE, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "base.vmdk");
    put(fs, "top.vmdk", 0, 2 * MiB, 0x11);
    make(fs, "child.vmdk", "vmdk", 0, "top.vmdk");
    ops.free_space = little_space;
    fs->ops = &ops;
    struct dr_convert_options o = {.sparse_size = 0};
    refused(dr_convert_fs(fs, &from, 1, "b.raw", &o, NULL, &err), ENOSPC, "b.raw");
    struct dr_commit_options c = {.force = true};
    refused(dr_commit_fs(fs, "top.vmdk", &c, NULL, &err), ENOSPC, "base.vmdk");
    struct dr_rebase_options r = {.backing = ""};
    refused(dr_rebase_fs(fs, "child.vmdk", &r, NULL, &err), ENOSPC, "child.vmdk");
    r = (struct dr_rebase_options){.backing = "base.vmdk", .backing_format = "vmdk"};
    refused(dr_rebase_fs(fs, "child.vmdk", &r, NULL, &err), ENOSPC, "child.vmdk");
    struct dr_stream_options s = {.base = NULL};
    refused(dr_stream_fs(fs, "child.vmdk", &s, NULL, &err), ENOSPC, "child.vmdk");
    /* parents that are alike need no room, however much they hold */
    make(fs, "same.vmdk", "vmdk", SIZE, NULL);
    put(fs, "same.vmdk", 0, 2 * MiB, 0x11);
    r.backing = "same.vmdk";
    ok(dr_rebase_fs(fs, "child.vmdk", &r, NULL, &err));
    assert_false(exists(fs, "b.raw"));
    /* what is sparse may turn out smaller: a word is enough */
    struct dr_job job = {.message = note_message, .user = &told};
    o.sparse_size = 4096;
    ok(dr_convert_fs(fs, &from, 1, "b.raw", &o, &job, &err));
    assert_int_equal(told, 1);
    fs->ops = full;
}

static void odd_sizes_are_rounded_up_to_sectors(void **state)
{
    static const char *const formats[] = {"raw", "vmdk"};
    struct dr_fs *fs = *state;
    struct dr_file *file;
    uint64_t size;
    ok(dr_file_open(fs, "a.raw", DR_FILE_CREATE, &file, &err));
    ok(dr_file_truncate(file, 1000, &err));
    ok(dr_file_pwrite(file, "x", 999, 1, &err));
    dr_file_unref(file);
    for (int i = 0; i < 2; i++) {
        ok(convert(fs, "a.raw", "b", formats[i], &err));
        uint8_t *have = view(fs, "b", &size);
        assert_int_equal(size, 1024);
        assert_int_equal(have[998], 0);
        assert_int_equal(have[999], 'x');
        assert_int_equal(have[1000], 0);
        free(have);
    }
}

/* What the buffer held before must not get into the image. */
static void between_two_sources_a_stream_has_zeros(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_pair sub = {"subformat", "streamOptimized"};
    const struct dr_convert_options o = {.out_format = "vmdk", .pairs = &sub, .n_pairs = 1};
    static const char *const from[] = {"a.raw", "b.raw"};
    struct dr_job job = {.workers = 1};
    struct dr_file *file;
    uint64_t size;
    for (size_t i = 0; i < 2; i++) {
        make(fs, from[i], "raw", 16 * MiB, NULL);
        put(fs, from[i], 0, 16 * MiB, 0x11);
    }
    ok(dr_file_open(fs, "a.raw", DR_FILE_RDWR, &file, &err));
    ok(dr_file_truncate(file, 16 * MiB - 24, &err)); /* the next one begins with a grain */
    dr_file_unref(file);
    ok(dr_convert_fs(fs, from, 2, "c", &o, &job, &err));
    uint8_t *have = view(fs, "c", &size);
    assert_int_equal(size, 32 * MiB);
    for (uint64_t i = 0; i < size; i++)
        if (have[i] != (i >= 16 * MiB - 24 && i < 16 * MiB ? 0 : 0x11))
            fail_msg("at %llu: %02x", (unsigned long long)i, have[i]);
    free(have);
}

struct one_fault {
    unsigned left; /* of those that still work */
    bool failed;
};

/* One fails, and the next attempt says that all is well. */
static int fail_base_once(void *user, const struct faultfs_io *io)
{
    struct one_fault *one = user;
    bool counts = io->kind == FAULTFS_FLUSH || io->kind == FAULTFS_SYNC_DIR;
    if (one->failed || !counts || strcmp(io->path, "base.vmdk") != 0 || one->left-- > 0)
        return 0;
    one->failed = true;
    return -EIO;
}

static void a_backing_file_that_cannot_be_made_durable_is_not_relied_on(void **state)
{
    (void)state;
    const char *from = "a.raw";
    const struct dr_convert_options o = {
        .out_format = "vmdk", .backing = "base.vmdk", .backing_format = "vmdk"};
    struct one_fault one = {.failed = true};
    for (unsigned n = 0; one.failed; n++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(fs);
        struct dr_error why = DR_ERROR_INIT;
        make(fs, "a.raw", "raw", MiB, NULL);
        make(fs, "base.vmdk", "vmdk", MiB, NULL);
        one = (struct one_fault){.left = n};
        faultfs_observe(f, fail_base_once, &one);
        int r = dr_convert_fs(faultfs_fs(f), &from, 1, "new.vmdk", &o, NULL, &why);
        if (one.failed != (r < 0) || exists(fs, "new.vmdk") != (r == 0))
            fail_msg("%u: %d %s", n, r, why.text);
        assert_true(n > 0 || one.failed);
        faultfs_free(f);
        dr_fs_memory_free(fs);
    }
}

static void written_zeros_become_holes(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.raw", "raw", SIZE, NULL);
    put(fs, "a.raw", 0, SIZE, 0x11);
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    uint8_t *zeros = calloc(1, MiB);
    ok(dr_open_fs(fs, "a.raw", &rw, &disk, &err));
    ok(dr_pwrite(disk, zeros, MiB, MiB, 0, &err)); /* as data */
    ok(dr_close(disk, &err));
    uint8_t *want = view(fs, "a.raw", &size);
    ok(convert(fs, "a.raw", "b.raw", "raw", &err));
    same_view(fs, "b.raw", want, size);
    assert_int_equal(disk_size(fs, "b.raw"), SIZE - MiB);
    ok(convert(fs, "a.raw", "b.vmdk", "vmdk", &err));
    assert_in_range(disk_size(fs, "b.vmdk"), SIZE - MiB, SIZE - MiB + 128 * KiB);
    free(zeros);
    free(want);
}

static void sparse_zero_means_all_is_written(void **state)
{
    struct dr_fs *fs = *state;
    const char *from = "a.raw";
    make(fs, "a.raw", "raw", SIZE, NULL);
    struct dr_convert_options o = {.sparse_size = 0};
    ok(dr_convert_fs(fs, &from, 1, "b.raw", &o, NULL, &err));
    assert_int_equal(disk_size(fs, "b.raw"), SIZE);
}

static void several_sources_follow_each_other(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.raw", "raw", MiB + 512, NULL);
    put(fs, "a.raw", MiB - 512, 1024, 0x11);
    make(fs, "b.vmdk", "vmdk", MiB, NULL);
    put(fs, "b.vmdk", 0, 1024, 0x22);
    const char *from[] = {"a.raw", "b.vmdk", "a.raw"};
    struct dr_convert_options o = {.sparse_size = 4096};
    ok(dr_convert_fs(fs, from, 3, "all.raw", &o, NULL, &err));
    uint8_t *have = view(fs, "all.raw", &size);
    assert_int_equal(size, 3 * MiB + 1024);
    assert_int_equal(have[MiB], 0x11);
    assert_int_equal(have[MiB + 512], 0x22);
    assert_int_equal(have[MiB + 512 + 1024], 0);
    assert_int_equal(have[size - 1], 0x11);
    free(have);
}

static int stop_now(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)done;
    (void)total;
    return 1;
}

static void failure_keeps_the_old_target_and_leaves_nothing(void **state)
{
    struct dr_fs *fs = *state;
    size_t len, again;
    make(fs, "a.raw", "raw", SIZE, NULL);
    pattern(fs, "a.raw");
    make(fs, "old.vmdk", "vmdk", MiB, NULL);
    uint8_t *before = file_bytes(fs, "old.vmdk", &len);
    const char *from = "a.raw";
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    struct dr_job job = {.cancelled = 1, .progress = stop_now};
    refused(dr_convert_fs(fs, &from, 1, "old.vmdk", &o, &job, &err), ECANCELED, "stopped");
    struct dr_pair bad = {"nonsense", "1"};
    o.pairs = &bad;
    o.n_pairs = 1;
    refused(dr_convert_fs(fs, &from, 1, "old.vmdk", &o, NULL, &err), EINVAL, "nonsense");
    from = "missing";
    refused(dr_convert_fs(fs, &from, 1, "old.vmdk", &o, NULL, &err), ENOENT, "missing");
    uint8_t *after = file_bytes(fs, "old.vmdk", &again);
    assert_int_equal(len, again);
    assert_memory_equal(before, after, len);
    assert_int_equal(count_files(fs), 2);
    free(before);
    free(after);
}

/* While it was being copied another file got the name: not ours to replace. */
static int replaced_by_another(void *user, uint64_t done, uint64_t total)
{
    struct dr_fs *fs = user;
    (void)done;
    (void)total;
    if (exists(fs, "theirs.vmdk"))
        ok(fs->ops->rename(fs, "theirs.vmdk", "out.vmdk", &err));
    return 0;
}

static void target_that_changed_hands_is_left_alone(void **state)
{
    struct dr_fs *fs = *state;
    const char *from = "src.vmdk";
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    struct dr_job job = {.progress = replaced_by_another, .user = fs};
    size_t len, again;
    make(fs, "src.vmdk", "vmdk", SIZE, NULL);
    put(fs, "src.vmdk", 0, MiB, 0x11);
    for (int there = 0; there < 2; there++) {
        make(fs, "theirs.vmdk", "vmdk", MiB, NULL);
        if (there)
            make(fs, "out.vmdk", "vmdk", MiB, NULL);
        uint8_t *want = file_bytes(fs, "theirs.vmdk", &len);
        refused(dr_convert_fs(fs, &from, 1, "out.vmdk", &o, &job, &err), there ? ESTALE : EEXIST,
                there ? "out.vmdk: was replaced" : "out.vmdk: exists by now");
        uint8_t *have = file_bytes(fs, "out.vmdk", &again);
        assert_int_equal(len, again);
        assert_memory_equal(have, want, len);
        free(have);
        free(want);
        assert_int_equal(count_files(fs), 2);
        ok(fs->ops->unlink(fs, "out.vmdk", &err));
    }
}

static void target_in_use_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    make(fs, "a.raw", "raw", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
    ok(dr_open_fs(fs, "b.vmdk", &rw, &disk, &err));
    struct dr_error why = DR_ERROR_INIT;
    int r = convert(fs, "a.raw", "b.vmdk", "raw", &why);
    assert_true(r == -EAGAIN || r == -EBUSY);
    assert_non_null(strstr(why.text, "lock"));
    ok(dr_close(disk, &err));
    assert_int_equal(count_files(fs), 2);
}

static void into_an_existing_target_old_bytes_are_gone(void **state)
{
    static const char *const formats[] = {"raw", "vmdk"};
    struct dr_fs *fs = *state;
    uint64_t size;
    const char *from = "a.raw";
    make(fs, "a.raw", "raw", SIZE, NULL);
    pattern(fs, "a.raw");
    uint8_t *want = view(fs, "a.raw", &size);
    for (int i = 0; i < 2; i++) {
        struct dr_convert_options o = {
            .out_format = formats[i], .no_create = true, .sparse_size = 4096};
        make(fs, "b", formats[i], SIZE, NULL);
        put(fs, "b", 0, SIZE, 0x99);
        ok(dr_convert_fs(fs, &from, 1, "b", &o, NULL, &err));
        same_view(fs, "b", want, size);
    }
    struct dr_convert_options o = {.out_format = "raw", .no_create = true, .sparse_size = 4096};
    make(fs, "small", "raw", MiB, NULL);
    refused(dr_convert_fs(fs, &from, 1, "small", &o, NULL, &err), ENOSPC, "small");
    free(want);
}

static void backing_of_the_target_keeps_what_is_the_same(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "base.vmdk", "vmdk", SIZE, NULL);
    put(fs, "base.vmdk", 0, 2 * MiB, 0x11);
    make(fs, "mid.vmdk", "vmdk", 0, "base.vmdk");
    put(fs, "mid.vmdk", MiB, 64 * KiB, 0x22);
    put(fs, "mid.vmdk", 128 * KiB, 64 * KiB, 0);
    make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
    put(fs, "top.vmdk", 3 * MiB, 64 * KiB, 0x33);
    make(fs, "twin.vmdk", "vmdk", SIZE, NULL); /* as base, but another file and a little more */
    put(fs, "twin.vmdk", 0, 2 * MiB + 64 * KiB, 0x11);
    uint8_t *want = view(fs, "top.vmdk", &size);
    static const char *const backings[] = {"base.vmdk", "mid.vmdk", "twin.vmdk"};
    for (int i = 0; i < 3; i++) {
        const char *from = "top.vmdk";
        struct dr_convert_options o = {.out_format = "vmdk",
                                       .sparse_size = 4096,
                                       .backing = backings[i],
                                       .backing_format = "vmdk"};
        ok(dr_convert_fs(fs, &from, 1, "out.vmdk", &o, NULL, &err));
        same_view(fs, "out.vmdk", want, size);
        assert_in_range(disk_size(fs, "out.vmdk"), 64 * KiB, 512 * KiB);
    }
    free(want);
}

static void scribble(struct dr_fs *fs, uint64_t *seed, const char *path, uint64_t size)
{
    for (unsigned i = 0; i < 5; i++) {
        uint64_t off = next_random(seed) % (size / 512) * 512;
        uint64_t len = dr_min(size - off, (next_random(seed) % 400 + 1) * 512);
        put(fs, path, off, len, (int)(next_random(seed) % 3));
    }
}

static void any_backing_of_the_target_gives_the_same_view(void **state)
{
    static const uint64_t sizes[] = {MiB, MiB + 512, 2 * MiB};
    struct dr_fs *fs = *state;
    uint64_t seed = 0xabcdef, size;
    for (int round = 0; round < 40; round++) {
        const char *from = "src.raw";
        uint64_t src = sizes[next_random(&seed) % 3], back = sizes[next_random(&seed) % 3];
        make(fs, "src.raw", "raw", src, NULL);
        scribble(fs, &seed, "src.raw", src);
        make(fs, "deep.vmdk", "vmdk", back, NULL);
        scribble(fs, &seed, "deep.vmdk", back);
        make(fs, "back.vmdk", "vmdk", back, "deep.vmdk");
        scribble(fs, &seed, "back.vmdk", back);
        uint8_t *want = view(fs, "src.raw", &size);
        struct dr_convert_options o = {.out_format = "vmdk",
                                       .sparse_size = round % 2 ? 4096 : 0,
                                       .backing = "back.vmdk",
                                       .backing_format = "vmdk"};
        ok(dr_convert_fs(fs, &from, 1, "out.vmdk", &o, NULL, &err));
        same_view(fs, "out.vmdk", want, size);
        free(want);
    }
}

static void create_replaces_only_what_it_may(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_create_options o = {
        .format = "vmdk", .size = MiB, .has_size = true, .no_replace = true};
    make(fs, "a.vmdk", "vmdk", 2 * MiB, NULL);
    refused(dr_create_fs(fs, "a.vmdk", &o, &err), EEXIST, "a.vmdk");
    o.no_replace = false;
    ok(dr_create_fs(fs, "a.vmdk", &o, &err));
    o.format = "nonsense";
    refused(dr_create_fs(fs, "a.vmdk", &o, &err), EINVAL, "nonsense");
    o.format = "vmdk";
    o.backing = "missing.vmdk";
    refused(dr_create_fs(fs, "a.vmdk", &o, &err), ENOENT, "missing.vmdk");
    o.format = "raw";
    refused(dr_create_fs(fs, "a.vmdk", &o, &err), ENOTSUP, "raw");
    o = (struct dr_create_options){.format = "vmdk"};
    refused(dr_create_fs(fs, "a.vmdk", &o, &err), EINVAL, "size");
    uint64_t size;
    free(view(fs, "a.vmdk", &size));
    assert_int_equal(size, MiB);
    assert_int_equal(count_files(fs), 1);
}

/* ------------------------------------------------------------------ compare */

static struct dr_compare_result compare(struct dr_fs *fs, const char *a, const char *b, bool strict,
                                        unsigned workers)
{
    struct dr_disk *da, *db;
    struct dr_compare_result result;
    struct dr_job job = {.workers = workers};
    ok(dr_open_fs(fs, a, NULL, &da, &err));
    ok(dr_open_fs(fs, b, NULL, &db, &err));
    ok(dr_compare(da, db, strict, &job, &result, &err));
    ok(dr_close(da, &err));
    ok(dr_close(db, &err));
    return result;
}

static void compare_finds_the_first_difference(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t seed = 99;
    make(fs, "a.raw", "raw", SIZE, NULL);
    put(fs, "a.raw", 0, SIZE, 0x11);
    ok(convert(fs, "a.raw", "b.vmdk", "vmdk", &err));
    assert_true(compare(fs, "a.raw", "b.vmdk", false, 2).same);
    uint64_t first = SIZE;
    for (int i = 0; i < 30; i++) {
        uint64_t off = next_random(&seed) % SIZE;
        put(fs, "b.vmdk", off, 1, 0x12);
        first = dr_min(first, off / 512 * 512);
        struct dr_compare_result r = compare(fs, "a.raw", "b.vmdk", false, (unsigned)(i % 3 + 1));
        assert_false(r.same);
        assert_int_equal(r.mismatch_off, first);
    }
}

static void compare_takes_zeros_and_sizes_as_they_are(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "a.raw", "raw", MiB, NULL);
    make(fs, "b.vmdk", "vmdk", 2 * MiB, NULL);
    put(fs, "b.vmdk", 64 * KiB, 64 * KiB, 0);
    struct dr_compare_result r = compare(fs, "a.raw", "b.vmdk", false, 1);
    assert_true(r.same);
    assert_true(r.size_differs);
    r = compare(fs, "b.vmdk", "a.raw", true, 1);
    assert_false(r.same);
    assert_true(r.size_differs);
    put(fs, "b.vmdk", MiB + 1000, 1, 5);
    r = compare(fs, "a.raw", "b.vmdk", false, 1);
    assert_false(r.same);
    assert_int_equal(r.mismatch_off, MiB + 512);
    make(fs, "c.vmdk", "vmdk", 2 * MiB, NULL);
    make(fs, "d.vmdk", "vmdk", 2 * MiB, NULL);
    assert_true(compare(fs, "c.vmdk", "d.vmdk", true, 1).same);
    put(fs, "d.vmdk", MiB, 64 * KiB, 0);
    r = compare(fs, "c.vmdk", "d.vmdk", true, 1);
    assert_false(r.same);
    assert_true(r.strict_allocation);
    assert_int_equal(r.mismatch_off, MiB);
}

static void info_has_the_keys_in_order(void **state)
{
    static const char *const keys[] = {"\"backing-filename-format\": \"vmdk\"",
                                       "\"virtual-size\": 4194304",
                                       "\"filename\": \"top.vmdk\"",
                                       "\"cluster-size\": 65536",
                                       "\"format\": \"vmdk\"",
                                       "\"actual-size\": ",
                                       "\"format-specific\": {",
                                       "\"type\": \"vmdk\"",
                                       "\"data\": {",
                                       "\"full-backing-filename\": \"base.vmdk\"",
                                       "\"backing-filename\": \"base.vmdk\"",
                                       "\"dirty-flag\": false"};
    struct dr_fs *fs = *state;
    char *json;
    make(fs, "base.vmdk", "vmdk", SIZE, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "base.vmdk");
    ok(dr_info_fs(fs, "top.vmdk", NULL, false, &json, &err));
    const char *at = json;
    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        at = strstr(at, keys[i]);
        if (!at)
            fail_msg("no %s in its place in %s", keys[i], json);
    }
    free(json);
    ok(dr_info_fs(fs, "top.vmdk", NULL, true, &json, &err));
    assert_int_equal(json[0], '[');
    free(json);
}

static struct dr_pair split_pair = {"subformat", "twoGbMaxExtentSparse"};
static struct dr_create_options split_options = {
    .format = "vmdk", .size = MiB, .has_size = true, .pairs = &split_pair, .n_pairs = 1};

/* d.vmdk, two files, full of 0x44. */
static uint8_t *make_split(struct dr_fs *fs, uint64_t *size)
{
    ok(dr_create_fs(fs, "d.vmdk", &split_options, &err));
    put(fs, "d.vmdk", 0, MiB, 0x44);
    return view(fs, "d.vmdk", size);
}

/* Each rename in turn fails, once: the old disk is whole, or the new one can be finished. */
static void a_failing_rename_never_costs_the_old_extents(void **state)
{
    struct dr_fs *fs = *state;
    for (uint64_t n = 0; n < 3; n++) { /* the old descriptor aside, the extent, the descriptor */
        uint64_t size;
        uint8_t *want = make_split(fs, &size);
        struct faultfs *f = faultfs_new(fs);
        struct dr_error problem = DR_ERROR_INIT;
        faultfs_arm(f, &(struct faultfs_plan){.nth = n, .kinds = 1u << FAULTFS_RENAME});
        assert_true(dr_create_fs(faultfs_fs(f), "d.vmdk", &split_options, &problem) < 0);
        faultfs_free(f);
        if (n > 1) {
            assert_false(exists(fs, "d.vmdk"));
            ok(dr_recover_fs(fs, "d.vmdk", NULL, false, NULL, NULL, NULL, &err));
            memset(want, 0, size);
        }
        same_view(fs, "d.vmdk", want, size);
        free(want);
    }
}

static void what_is_recorded_of_the_parent_stays_with_an_image_that_is_not_replaced(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_create_options base = {.format = "raw", .size = MiB, .has_size = true};
    const struct dr_create_options top = {
        .format = "qcow2", .backing = "base", .backing_format = "raw"};
    struct dr_error problem = DR_ERROR_INIT;
    ok(dr_create_fs(fs, "base", &base, &err));
    ok(dr_create_fs(fs, "top", &top, &err));
    ok(dr_fingerprint_fs(fs, "top", NULL, NULL, &err));
    struct faultfs *f = faultfs_new(fs);
    faultfs_arm(f, &(struct faultfs_plan){.nth = 0, .kinds = 1u << FAULTFS_RENAME});
    assert_true(dr_create_fs(faultfs_fs(f), "top", &top, &problem) < 0);
    faultfs_free(f);
    assert_true(exists(fs, "top.drover-parent"));
    ok(dr_create_fs(fs, "top", &top, &err));
    assert_false(exists(fs, "top.drover-parent"));
}

static bool all_bytes_are(const uint8_t *buf, uint64_t size, uint8_t byte)
{
    return buf[0] == byte && memcmp(buf, buf + 1, size - 1) == 0;
}

/* Whatever the moment: nobody ever reads the old descriptor over new extents. */
static void a_split_image_that_is_replaced_is_old_or_new_or_not_there(void **state)
{
    struct dr_fs *fs = *state;
    bool fired = true, saw_none = false;
    for (uint64_t n = 0; fired; n++) {
        uint64_t size;
        free(make_split(fs, &size));
        struct faultfs *f = faultfs_new(fs);
        struct dr_error problem = DR_ERROR_INIT;
        faultfs_arm(f, &(struct faultfs_plan){.nth = n, .for_good = true});
        int r = dr_create_fs(faultfs_fs(f), "d.vmdk", &split_options, &problem);
        fired = faultfs_fired(f);
        faultfs_free(f);
        assert_true(fired || r == 0);
        saw_none |= !exists(fs, "d.vmdk");
        for (int recovered = 0; recovered < 2; recovered++) {
            if (recovered && n % 2)
                ok(dr_create_fs(fs, "d.vmdk", &split_options,
                                &err)); /* making it again finishes, too */
            else if (recovered)
                ok(dr_recover_fs(fs, "d.vmdk", NULL, false, NULL, NULL, NULL, &err));
            if (!recovered && !exists(fs, "d.vmdk"))
                continue;
            uint8_t *have = view(fs, "d.vmdk", &size);
            assert_true(all_bytes_are(have, size, 0x44) || all_bytes_are(have, size, 0));
            free(have);
        }
    }
    assert_true(saw_none); /* the moment in question was among them */
}

/* ------------------------------------------------------------------ far files */

#define FAR_DEPTH 24u

/* A file that answers nobody before as many requests are under way as it wants. */
struct far_file {
    pthread_mutex_t lock;
    pthread_cond_t more;
    unsigned inside, most;
};

static int answer_when_many_ask(void *user, const struct faultfs_io *io)
{
    struct far_file *f = user;
    struct timespec end;
    if (io->kind != FAULTFS_READ || !strstr(io->path, "far.raw") || io->len < 64 * KiB)
        return 0;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += 20; /* it fails then, it does not hang */
    pthread_mutex_lock(&f->lock);
    f->inside++;
    f->most = (unsigned)dr_max(f->most, f->inside);
    pthread_cond_broadcast(&f->more);
    while (f->most < FAR_DEPTH && pthread_cond_timedwait(&f->more, &f->lock, &end) == 0)
        ;
    f->inside--;
    pthread_mutex_unlock(&f->lock);
    return 0;
}

static void a_far_file_gets_as_many_requests_as_it_wants(void **state)
{
    struct dr_fs *memory = *state;
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    const char *from = "far.raw";
    struct far_file far = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};
    make(fs, from, "raw", 40 * (uint64_t)DR_STOCK_BUFFER, NULL);
    put(fs, from, 0, 40 * (size_t)DR_STOCK_BUFFER, 0x11);
    faultfs_set_depth(f, FAR_DEPTH);
    faultfs_observe(f, answer_when_many_ask, &far);
    struct dr_convert_options o = {.sparse_size = 4096, .out_format = "vmdk"};
    ok(dr_convert_fs(fs, &from, 1, "out.vmdk", &o, NULL, &err));
    faultfs_observe(f, NULL, NULL);
    assert_int_equal(far.most, FAR_DEPTH);
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(there_and_back),
        ops_test(each_subformat),
        ops_test(a_failing_rename_never_costs_the_old_extents),
        ops_test(what_is_recorded_of_the_parent_stays_with_an_image_that_is_not_replaced),
        ops_test(a_split_image_that_is_replaced_is_old_or_new_or_not_there),
        ops_test(files_of_others_are_not_taken_for_extents),
        ops_test(space_is_looked_at_before_copying),
        ops_test(space_counts_where_the_data_is_kept),
        ops_test(a_commit_needs_space_for_new_data_only),
        ops_test(a_backing_file_in_use_is_read_without_locks_when_told_so),
        ops_test(odd_sizes_are_rounded_up_to_sectors),
        ops_test(between_two_sources_a_stream_has_zeros),
        cmocka_unit_test(a_backing_file_that_cannot_be_made_durable_is_not_relied_on),
        ops_test(written_zeros_become_holes),
        ops_test(sparse_zero_means_all_is_written),
        ops_test(several_sources_follow_each_other),
        ops_test(failure_keeps_the_old_target_and_leaves_nothing),
        ops_test(target_that_changed_hands_is_left_alone),
        ops_test(target_in_use_is_refused),
        ops_test(into_an_existing_target_old_bytes_are_gone),
        ops_test(backing_of_the_target_keeps_what_is_the_same),
        ops_test(any_backing_of_the_target_gives_the_same_view),
        ops_test(create_replaces_only_what_it_may),
        ops_test(compare_finds_the_first_difference),
        ops_test(compare_takes_zeros_and_sizes_as_they_are),
        ops_test(info_has_the_keys_in_order),
        ops_test(a_far_file_gets_as_many_requests_as_it_wants),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
