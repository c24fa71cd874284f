/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Each single I/O of a whole operation fails in turn: the operation says so or copes, the disk
 * reads as before, doing it again works, and nothing half-made is left behind. */
#include "test-ops.h"
#include "faultfs.h"

#include <stdio.h>

#define SIZE (512 * KiB)

struct operation {
    const char *name;
    int (*run)(struct dr_fs *fs, struct dr_job *job, struct dr_error *err);
    bool addcow; /* top.add-cow over mid.vmdk, else top.vmdk */
};

static int onto_stranger(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    return dr_rebase_fs(fs, "top.vmdk", &o, job, err);
}

static int flatten(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_rebase_options o = {.backing = ""};
    return dr_rebase_fs(fs, "top.vmdk", &o, job, err);
}

static int stream(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_stream_options o = {.base = "a.vmdk"};
    return dr_stream_fs(fs, "top.vmdk", &o, job, err);
}

static int commit(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top.vmdk", &o, job, err);
}

static int commit_deep(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_commit_options o = {.base = "a.vmdk"};
    return dr_commit_fs(fs, "top.vmdk", &o, job, err);
}

static int convert(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_convert_options o = {
        .out_format = "vmdk", .sparse_size = 4096, .pairs = &sub, .n_pairs = 1};
    return dr_convert_fs(fs, &from, 1, "out.vmdk", &o, job, err);
}

static int convert_to_stream(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    const char *from = "top.vmdk";
    struct dr_pair sub = {"subformat", "streamOptimized"};
    struct dr_convert_options o = {
        .out_format = "vmdk", .sparse_size = 4096, .pairs = &sub, .n_pairs = 1};
    return dr_convert_fs(fs, &from, 1, "out.vmdk", &o, job, err);
}

static int snapshot(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    char *active = NULL;
    (void)job;
    int r = dr_snapshot_create_fs(fs, "top.vmdk", "snap.vmdk", NULL, &active, err);
    free(active);
    return r;
}

static int cow_rebase(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    return dr_rebase_fs(fs, "top.add-cow", &o, job, err);
}

static int cow_retire(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_stream_options s = {0};
    struct dr_retire_options o = {.keep = true}; /* what may be done again */
    struct dr_error why = DR_ERROR_INIT;
    char *plain = NULL;
    int r = exists(fs, "top.add-cow") ? dr_stream_fs(fs, "top.add-cow", &s, job, &why) : 0;
    if (r < 0)
        return dr_fail(err, -r, "%s", why.text);
    r = dr_retire_fs(fs, "top.add-cow", &o, &plain, err);
    free(plain);
    return r;
}

static int cow_commit(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_commit_options o = {0};
    return dr_commit_fs(fs, "top.add-cow", &o, job, err);
}

static int cow_convert(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    const char *from = "top.add-cow";
    struct dr_convert_options o = {.out_format = "add-cow", .sparse_size = 4096};
    return dr_convert_fs(fs, &from, 1, "out.add-cow", &o, job, err);
}

static int cow_snapshot(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    char *active = NULL;
    (void)job;
    int r = dr_snapshot_create_fs(fs, "top.add-cow", "snap.add-cow", NULL, &active, err);
    free(active);
    return r;
}

/* ------------------------------------------------------------------ the same on an open disk */

static int open_top(struct dr_fs *fs, bool addcow, struct dr_disk **disk, struct dr_error *err)
{
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    return dr_open_fs(fs, addcow ? "top.add-cow" : "top.vmdk", &rw, disk, err);
}

static int close_top(struct dr_disk *disk, int r, struct dr_error *err)
{
    int closed = dr_close(disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int open_rebase(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_rebase_options o = {
        .backing = "b.vmdk", .backing_format = "vmdk", .drop_equal = true};
    struct dr_disk *disk = NULL;
    int r = open_top(fs, false, &disk, err);
    if (r < 0)
        return r;
    *job = (struct dr_job){.workers = 1};
    return close_top(disk, dr_disk_rebase(disk, &o, job, err), err);
}

static int open_commit(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    int r = open_top(fs, false, &disk, err);
    if (r < 0)
        return r;
    *job = (struct dr_job){.workers = 1};
    return close_top(disk, dr_disk_commit(disk, NULL, job, err), err);
}

static int open_commit_lower(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_commit_options o = {.top = "mid.vmdk"};
    struct dr_disk *disk = NULL;
    int r = open_top(fs, false, &disk, err);
    if (r < 0)
        return r;
    *job = (struct dr_job){.workers = 1};
    if (dr_chain_length(disk) == 3) /* else it was done before */
        r = dr_disk_commit(disk, &o, job, err);
    return close_top(disk, r, err);
}

static int open_snapshot(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    (void)job;
    int r = open_top(fs, false, &disk, err);
    return r < 0 ? r
                 : close_top(disk, dr_disk_snapshot(disk, "s.vmdk", NULL, NULL, NULL, err), err);
}

static int open_cow_commit(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    int r = open_top(fs, true, &disk, err);
    if (r < 0)
        return r;
    *job = (struct dr_job){.workers = 1};
    return close_top(disk, dr_disk_commit(disk, NULL, job, err), err);
}

static int open_cow_stream(struct dr_fs *fs, struct dr_job *job, struct dr_error *err)
{
    struct dr_disk *disk = NULL;
    int r = open_top(fs, true, &disk, err);
    if (r < 0)
        return r;
    *job = (struct dr_job){.workers = 1};
    return close_top(disk, dr_disk_stream(disk, NULL, job, err), err);
}

static const struct operation operations[] = {
    {"rebase", onto_stranger, false},
    {"flatten", flatten, false},
    {"stream", stream, false},
    {"commit", commit, false},
    {"commit deep", commit_deep, false},
    {"convert", convert, false},
    {"convert to a stream", convert_to_stream, false},
    {"snapshot", snapshot, false},
    {"add-cow: rebase", cow_rebase, true},
    {"add-cow: stream, retire", cow_retire, true},
    {"add-cow: commit", cow_commit, true},
    {"add-cow: convert", cow_convert, true},
    {"add-cow: snapshot", cow_snapshot, true},
    {"open: rebase", open_rebase, false},
    {"open: commit", open_commit, false},
    {"open: commit of a lower layer", open_commit_lower, false},
    {"open: snapshot", open_snapshot, false},
    {"open, add-cow: commit", open_cow_commit, true},
    {"open, add-cow: stream", open_cow_stream, true},
};

static bool is_snapshot(const struct operation *o)
{
    return o->run == snapshot || o->run == cow_snapshot || o->run == open_snapshot;
}

static void addcow_top(struct dr_fs *fs)
{
    struct dr_create_options o = {
        .format = "add-cow", .backing = "mid.vmdk", .backing_format = "vmdk"};
    ok(fs->ops->unlink(fs, "top.vmdk", &err)); /* mid.vmdk has one child */
    ok(dr_create_fs(fs, "top.add-cow", &o, &err));
    put(fs, "top.add-cow", 65 * KiB, 5 * KiB, 0x33);
    put(fs, "top.add-cow", 192 * KiB, 64 * KiB, 0);
}

static void family(struct dr_fs *fs)
{
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, 256 * KiB, 0x11);
    make(fs, "mid.vmdk", "vmdk", 0, "a.vmdk");
    put(fs, "mid.vmdk", 128 * KiB, 64 * KiB, 0x22);
    make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
    put(fs, "top.vmdk", 64 * KiB, 4 * KiB, 0x33);
    put(fs, "top.vmdk", 192 * KiB, 64 * KiB, 0);
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
    put(fs, "b.vmdk", 0, 64 * KiB, 0x11);
}

/* Temporary names of ours that are still there. */
static size_t leftovers(struct dr_fs *fs)
{
    char **names;
    size_t n, count = 0;
    ok(dr_ops_list(fs, ".", &names, &n, &err));
    for (size_t i = 0; i < n; i++)
        count += names[i][0] == '.';
    dr_ops_free_names(names, n);
    return count;
}

/* The disk, or what it is when its metadata has been thrown away. */
static const char *top_of(const struct operation *o, struct dr_fs *fs)
{
    if (!o->addcow)
        return "top.vmdk";
    return exists(fs, "top.add-cow") ? "top.add-cow" : "top.raw";
}

/* True: the n-th I/O was reached and failed. */
static bool one_fault(const struct operation *o, uint64_t n, int error, bool for_good)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    struct dr_job job = {.workers = 1};
    struct dr_error why = DR_ERROR_INIT;
    uint64_t size;
    family(fs);
    if (o->addcow)
        addcow_top(fs);
    uint8_t *want = view(fs, top_of(o, fs), &size);
    faultfs_arm(f, &(struct faultfs_plan){
                       .nth = n, .error = error, .for_good = for_good, .partial = true, .seed = n});
    int r = o->run(fs, &job, &why);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    if (r < 0 && (!fired || why.errnum == 0))
        fail_msg("%s, I/O %d: fails with %d for no reason: %s", o->name, (int)n, r, why.text);
    same_view(fs, top_of(o, fs), want, size);
    if (!for_good && r < 0 && leftovers(fs) > 1) /* one that could not be removed */
        fail_msg("%s, I/O %d: %d leftovers", o->name, (int)n, (int)leftovers(fs));
    if (r < 0) {
        unsigned found;
        ok(dr_recover_fs(fs, top_of(o, fs), NULL, false, NULL, NULL, &found, &err));
        same_view(fs, top_of(o, fs), want, size);
        struct dr_error again = DR_ERROR_INIT;
        r = o->run(fs, &job, &again);
        if (r < 0 && !(is_snapshot(o) && r == -EEXIST))
            fail_msg("%s, I/O %d: the rerun fails: %s (at first: %s)", o->name, (int)n, again.text,
                     why.text);
        same_view(fs, top_of(o, fs), want, size);
    }
    free(want);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void every_io_fails_once(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
        uint64_t n = 0;
        while (one_fault(&operations[i], n, n % 2 ? ENOSPC : EIO, false))
            n++;
        assert_in_range(n, 20, 100000);
    }
}

static void every_io_fails_for_good(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++)
        for (uint64_t n = 0; one_fault(&operations[i], n, EIO, true); n++)
            ;
}

/* ------------------------------------------------------------------ salvage */

static int bad_spot(void *user, const struct faultfs_io *io)
{
    if (io->kind != FAULTFS_READ || !strstr(io->path, "bad.raw"))
        return 0;
    return io->off < 100 * KiB + 512 && io->off + io->len > 100 * KiB ? user ? *(int *)user : -EIO
                                                                      : 0;
}

static void note(void *user, const char *text)
{
    snprintf(user, 256, "%s", text);
}

static void salvage_loses_only_what_cannot_be_read(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    const char *from = "bad.raw";
    char text[256] = "";
    uint64_t size;
    make(fs, "bad.raw", "raw", SIZE, NULL);
    put(fs, "bad.raw", 0, SIZE, 0x11);
    faultfs_observe(f, bad_spot, NULL);
    struct dr_convert_options o = {.sparse_size = 4096};
    refused(dr_convert_fs(fs, &from, 1, "out.raw", &o, NULL, &err), EIO, "bad.raw");
    o.salvage = true;
    struct dr_job job = {.message = note, .user = text};
    ok(dr_convert_fs(fs, &from, 1, "out.raw", &o, &job, &err));
    faultfs_observe(f, NULL, NULL);
    assert_non_null(strstr(text, "102400 to 102912"));
    uint8_t *have = view(fs, "out.raw", &size);
    for (uint64_t i = 0; i < size; i++)
        assert_int_equal(have[i], i >= 100 * KiB && i < 100 * KiB + 512 ? 0 : 0x11);
    free(have);
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

/* Trying again may give the bytes, so none of them is given up. */
static void salvage_ends_where_a_read_fails_for_other_reasons_than_damage(void **state)
{
    (void)state;
    static const int reasons[] = {ENOMEM, ENOSPC, EACCES, EBUSY, ENOTCONN};
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    const char *from = "bad.raw";
    struct dr_convert_options o = {.sparse_size = 4096, .salvage = true};
    make(fs, "bad.raw", "raw", SIZE, NULL);
    put(fs, "bad.raw", 0, SIZE, 0x11);
    for (size_t i = 0; i < sizeof(reasons) / sizeof(reasons[0]); i++) {
        int fails = -reasons[i];
        faultfs_observe(f, bad_spot, &fails);
        refused(dr_convert_fs(fs, &from, 1, "out.raw", &o, NULL, &err), reasons[i], "bad.raw");
        faultfs_observe(f, NULL, NULL);
    }
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

static void salvage_of_a_whole_disk_reads_no_more_than_a_copy(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    const char *from = "top.vmdk";
    uint64_t reads[2];
    make(fs, "top.vmdk", "vmdk", SIZE, NULL);
    put(fs, "top.vmdk", 0, SIZE / 2, 0x11);
    for (int i = 0; i < 2; i++) {
        struct dr_convert_options o = {.sparse_size = 4096, .salvage = i == 1};
        struct dr_job job = {.workers = 1};
        uint64_t before = faultfs_count_of(f, FAULTFS_READ);
        ok(dr_convert_fs(fs, &from, 1, i ? "b.raw" : "a.raw", &o, &job, &err));
        reads[i] = faultfs_count_of(f, FAULTFS_READ) - before;
    }
    assert_true(reads[1] <= reads[0]);
    faultfs_free(f);
    dr_fs_memory_free(memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_io_fails_once),
        cmocka_unit_test(every_io_fails_for_good),
        cmocka_unit_test(salvage_loses_only_what_cannot_be_read),
        cmocka_unit_test(salvage_ends_where_a_read_fails_for_other_reasons_than_damage),
        cmocka_unit_test(salvage_of_a_whole_disk_reads_no_more_than_a_copy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
