/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* amend: whatever is cut off or fails, the image opens, has no corruption, and the disk and its
 * snapshot show what they did; asked again, it is done. */
#include "test-ops.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include "base/bytes.h"
#include "faultfs.h"
#include "formats/qcow2/qcow2.h"
#include "powerfs.h"

#define IMAGE  "dir/a.qcow2"
#define PARENT "dir/parent.raw"
#define SIZE   (192 * KiB)

#define OLD_SNAPSHOT 2u

struct amendment {
    const char *name;
    struct dr_pair before[3], after[3]; /* create's options, amend's */
    unsigned snapshot; /* OLD_SNAPSHOT: its entry says no more than old programs wrote */
    bool parent;
    bool refused; /* a count is too high for the new width */
};

static const struct amendment amendments[] = {
    {"upgrade",
     {{"compat", "0.10"}},
     {{"compat", "1.1"}, {"lazy_refcounts", "on"}},
     true,
     false,
     false},
    {"upgrade of an old snapshot",
     {{"compat", "0.10"}, {"cluster_size", "512"}},
     {{"compat", "1.1"}, {"refcount_bits", "8"}},
     OLD_SNAPSHOT,
     false,
     false},
    {"upgrade over a parent",
     {{"compat", "0.10"}, {"cluster_size", "512"}},
     {{"compat", "1.1"}},
     false,
     true,
     false},
    {"downgrade", {{"cluster_size", "4096"}}, {{"compat", "0.10"}}, false, false, false},
    {"downgrade over a parent",
     {{"cluster_size", "4096"}},
     {{"compat", "0.10"}},
     false,
     true,
     false},
    {"downgrade with a snapshot",
     {{"cluster_size", "512"}},
     {{"compat", "0.10"}},
     true,
     false,
     false},
    {"wider counts",
     {{"cluster_size", "512"}, {"refcount_bits", "8"}},
     {{"refcount_bits", "64"}},
     true,
     false,
     false},
    {"narrower counts",
     {{"cluster_size", "1024"}, {"refcount_bits", "64"}},
     {{"refcount_bits", "1"}},
     false,
     false,
     false},
    {"counts of two bits",
     {{"cluster_size", "512"}, {"refcount_bits", "16"}},
     {{"refcount_bits", "2"}},
     true,
     false,
     false},
    {"counts too narrow",
     {{"cluster_size", "512"}, {"refcount_bits", "16"}},
     {{"refcount_bits", "1"}},
     true,
     false,
     true},
    {"all at once",
     {{"compat", "0.10"}, {"cluster_size", "512"}},
     {{"compat", "1.1"}, {"refcount_bits", "32"}, {"lazy_refcounts", "on"}},
     false,
     true,
     false},
};
#define AMENDMENTS (sizeof(amendments) / sizeof(amendments[0]))

static size_t count(const struct dr_pair *pairs)
{
    size_t n = 0;
    while (n < 3 && pairs[n].name)
        n++;
    return n;
}

static void make_parent(struct dr_fs *fs)
{
    struct dr_file *f;
    uint8_t *bytes = malloc(SIZE);
    memset(bytes, 0x77, SIZE);
    ok(dr_file_open(fs, PARENT, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, bytes, 0, SIZE, &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
    free(bytes);
    ok(fs->ops->sync_dir(fs, PARENT, &err));
}

/* Before 2012 the entry of a snapshot ended with its id and name. */
static void make_old(struct dr_fs *fs)
{
    uint8_t entry[512], raw[8];
    struct dr_file *f;
    ok(dr_file_open(fs, IMAGE, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, raw, QCOW2_AT_SNAPSHOTS + 4, 8, &err));
    uint64_t at = get_be64(raw);
    ok(dr_file_pread(f, entry, at, sizeof(entry), &err));
    uint32_t extra = get_be32(entry + 36), names = get_be16(entry + 12) + get_be16(entry + 14);
    assert_true(extra >= 16);
    put_be32(entry + 36, 0);
    memmove(entry + 40, entry + 40 + extra, names);
    memset(entry + 40 + names, 0, sizeof(entry) - 40 - names);
    ok(dr_file_pwrite(f, entry, at, sizeof(entry), &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
}

/* Data, zeros, and what a snapshot shares with the disk. */
static void make_disk(struct dr_fs *fs, const struct amendment *a)
{
    struct dr_create_options o = {.format = "qcow2",
                                  .size = SIZE,
                                  .has_size = true,
                                  .pairs = a->before,
                                  .n_pairs = count(a->before)};
    if (a->parent) {
        make_parent(fs);
        o.backing = "parent.raw";
        o.backing_format = "raw";
    }
    ok(dr_create_fs(fs, IMAGE, &o, &err));
    put(fs, IMAGE, 0, 20 * KiB, 1);
    put(fs, IMAGE, 90 * KiB, 5000, 2);
    if (!a->snapshot || strcmp(a->after[0].name, "compat") != 0 ||
        !strcmp(a->after[0].value, "0.10"))
        put(fs, IMAGE, 30 * KiB, 16 * KiB, 0);
    if (a->snapshot) {
        struct dr_open_options open = {.flags = DR_OPEN_RDWR};
        struct dr_disk *disk;
        ok(dr_open_fs(fs, IMAGE, &open, &disk, &err));
        ok(dr_disk_internal_snapshot_create(disk, "one", NULL, &err));
        ok(dr_close(disk, &err));
        if (a->snapshot == OLD_SNAPSHOT)
            make_old(fs);
        put(fs, IMAGE, 4 * KiB, 4 * KiB, 3);
    }
    put(fs, IMAGE, 8 * KiB, 8 * KiB, 0);
}

static int amend(struct dr_fs *fs, const struct amendment *a, struct dr_error *err)
{
    struct dr_amend_options o = {.pairs = a->after, .n_pairs = count(a->after)};
    return dr_amend_fs(fs, IMAGE, &o, NULL, err);
}

static void remember(void *user, const char *line)
{
    snprintf(user, 200, "%s", line);
}

static void is_sound(struct dr_fs *fs, const char *when)
{
    char line[200] = "";
    struct dr_check_result result = {.report = remember, .user = line};
    struct dr_error why = DR_ERROR_INIT;
    struct dr_image *image;
    if (dr_image_open(fs, IMAGE, "qcow2", 0, &image, &why) < 0)
        fail_msg("%s: %s", when, why.text);
    if (image->fmt->check(image, 0, &result, &why) < 0)
        fail_msg("%s: check: %s", when, why.text);
    if (result.corruptions)
        fail_msg("%s: %llu corruptions: %s", when, (unsigned long long)result.corruptions, line);
    dr_image_unref(image, NULL);
}

static uint8_t *content(struct dr_fs *fs, const char *snapshot, const char *when)
{
    struct dr_error why = DR_ERROR_INIT;
    struct dr_open_options o = {.format = "qcow2", .snapshot = snapshot};
    struct dr_disk *disk;
    uint8_t *bytes = malloc(SIZE);
    if (dr_open_fs(fs, IMAGE, &o, &disk, &why) < 0)
        fail_msg("%s: %s", when, why.text);
    assert_int_equal(dr_size(disk), SIZE);
    if (dr_pread(disk, bytes, 0, SIZE, &why) < 0)
        fail_msg("%s: %s", when, why.text);
    ok(dr_close(disk, &err));
    return bytes;
}

struct views {
    uint8_t *disk, *snapshot;
};

static struct views look(struct dr_fs *fs, const struct amendment *a, const char *when)
{
    return (struct views){content(fs, NULL, when), a->snapshot ? content(fs, "one", when) : NULL};
}

static void same(struct dr_fs *fs, const struct amendment *a, const struct views *v,
                 const char *when)
{
    struct views now = look(fs, a, when);
    if (memcmp(now.disk, v->disk, SIZE) != 0)
        fail_msg("%s: the disk has changed", when);
    if (a->snapshot && memcmp(now.snapshot, v->snapshot, SIZE) != 0)
        fail_msg("%s: the snapshot has changed", when);
    free(now.disk);
    free(now.snapshot);
}

static void is_done(struct dr_fs *fs, const struct amendment *a, const char *when)
{
    struct dr_image *image;
    ok(dr_image_open(fs, IMAGE, "qcow2", 0, &image, &err));
    const struct qcow2 *q = image->state;
    for (size_t i = 0; i < count(a->after); i++) {
        const char *name = a->after[i].name, *value = a->after[i].value;
        bool right = true;
        if (strcmp(name, "compat") == 0)
            right = q->h.version == (strcmp(value, "1.1") ? 2 : 3);
        else if (strcmp(name, "refcount_bits") == 0)
            right = 1 << q->h.refcount_order == atoi(value);
        else if (strcmp(name, "lazy_refcounts") == 0)
            right = (q->h.compatible & QCOW2_LAZY) != 0;
        if (!right)
            fail_msg("%s: %s is not %s", when, name, value);
    }
    ok(dr_image_unref(image, &err));
}

static void amendments_survive_cuts(void **state)
{
    (void)state;
    for (size_t i = 0; i < AMENDMENTS; i++) {
        const struct amendment *a = &amendments[i];
        struct powerfs *p = powerfs_new();
        struct dr_error why = DR_ERROR_INIT;
        char when[160], op[80];
        make_disk(powerfs_fs(p), a);
        struct views v = look(powerfs_fs(p), a, a->name);
        powerfs_settle(p);
        int r = amend(powerfs_fs(p), a, &why);
        if (r != (a->refused ? -EINVAL : 0))
            fail_msg("%s: %d %s", a->name, r, why.text);
        for (size_t k = 0; k <= powerfs_ops(p); k++)
            for (unsigned mode = 0; mode < POWERFS_MODES; mode++) {
                if (mode && !powerfs_open_ops(p, k))
                    continue;
                struct dr_fs *disk = powerfs_cut(p, k, mode, 7 * k + i);
                snprintf(when, sizeof(when), "%s, cut after %zu (%s), mode %u", a->name, k,
                         k ? powerfs_op_text(p, k - 1, op, sizeof(op)) : "nothing", mode);
                is_sound(disk, when);
                same(disk, a, &v, when);
                if (!a->refused && (mode == POWERFS_RANDOM || k == powerfs_ops(p))) {
                    ok(amend(disk, a, &err));
                    is_done(disk, a, when);
                    is_sound(disk, when);
                    same(disk, a, &v, when);
                    put(disk, IMAGE, 100 * KiB, 30 * KiB, 9);
                    is_sound(disk, when);
                }
                dr_fs_memory_free(disk);
            }
        free(v.disk);
        free(v.snapshot);
        powerfs_free(p);
    }
}

/* The n-th I/O of the amendment fails. False: there is none. */
static bool fail_nth(const struct amendment *a, uint64_t nth)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct dr_error why = DR_ERROR_INIT;
    char when[100];
    make_disk(memory, a);
    struct views v = look(memory, a, a->name);
    struct faultfs *f = faultfs_new(memory);
    struct faultfs_plan plan = {.nth = nth,
                                .error = nth % 2 ? EIO : ENOSPC,
                                .for_good = nth % 3 == 0,
                                .partial = nth % 5 == 0};
    faultfs_arm(f, &plan);
    int r = amend(faultfs_fs(f), a, &why);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    snprintf(when, sizeof(when), "%s, I/O %llu failed", a->name, (unsigned long long)nth);
    is_sound(memory, when);
    same(memory, a, &v, when);
    if (r == 0)
        is_done(memory, a, when);
    else if (!a->refused)
        ok(amend(memory, a, &err));
    is_sound(memory, when);
    same(memory, a, &v, when);
    free(v.disk);
    free(v.snapshot);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void amendments_survive_faults(void **state)
{
    (void)state;
    for (size_t i = 0; i < AMENDMENTS; i++)
        for (uint64_t nth = 0; fail_nth(&amendments[i], nth); nth++)
            ;
}

/* Nothing is changed by what is refused, even if only the last setting is. */
static void a_refusal_changes_nothing(void **state)
{
    static const struct dr_pair wrong[][2] = {
        {{"refcount_bits", "32"}, {"backing_file", "other"}},
        {{"lazy_refcounts", "on"}, {"data_file", "x"}},
        {{"refcount_bits", "8"}, {"compat", "0.10"}},
        {{"refcount_bits", "8"}, {"size", "1000"}},
        {{"lazy_refcounts", "on"}, {"data_file_raw", "on"}},
        {{"lazy_refcounts", "on"}, {"size", "4096"}},
        {{"lazy_refcounts", "on"}, {"size", "1099511627776"}},
    };
    struct dr_fs *fs = dr_fs_memory_new();
    uint8_t before[4096], after[4096];
    struct dr_file *f;
    (void)state;
    make_disk(fs, &amendments[6]);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        struct dr_amend_options o = {.pairs = wrong[i], .n_pairs = 2};
        struct dr_error why = DR_ERROR_INIT;
        ok(dr_file_open(fs, IMAGE, 0, &f, &err));
        ok(dr_file_pread(f, before, 0, sizeof(before), &err));
        dr_file_unref(f);
        assert_true(dr_amend_fs(fs, IMAGE, &o, NULL, &why) < 0);
        ok(dr_file_open(fs, IMAGE, 0, &f, &err));
        ok(dr_file_pread(f, after, 0, sizeof(after), &err));
        dr_file_unref(f);
        assert_memory_equal(before, after, sizeof(before));
    }
    dr_fs_memory_free(fs);
}

/* An interrupted change of the size leaves entries behind the end, which version 2 cannot have. */
static void zeros_behind_the_end_do_not_get_into_version_2(void **state)
{
    const struct amendment down = {
        "downgrade", {{"cluster_size", "4096"}}, {{"compat", "0.10"}}, false, false, false};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_disk *disk;
    struct dr_file *f;
    uint8_t raw[8], sector[512];
    (void)state;
    make_disk(fs, &down);
    put(fs, IMAGE, 160 * KiB, 16 * KiB, 0);
    put_be64(raw, 100 * KiB);
    ok(dr_file_open(fs, IMAGE, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, raw, QCOW2_AT_SIZE, sizeof(raw), &err));
    ok(dr_file_flush(f, &err));
    dr_file_unref(f);
    ok(amend(fs, &down, &err));
    is_done(fs, &down, "downgrade");
    is_sound(fs, "downgrade");
    ok(dr_open_fs(fs, IMAGE, &open, &disk, &err));
    ok(dr_truncate(disk, SIZE, &err));
    ok(dr_pread(disk, sector, 170 * KiB, sizeof(sector), &err));
    assert_int_equal(sector[0], 0);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(fs);
}

/* ------------------------------------------------------------------ an open disk */

#define THREADS 3
#define PART    (SIZE / THREADS)

struct writer {
    pthread_t thread;
    struct dr_disk *disk;
    uint64_t from; /* its own part of the disk */
    atomic_bool *stop;
    uint8_t last[PART / 512]; /* what it wrote into each sector; 0 = zeros */
    bool failed;
};

static void *write_and_read(void *arg)
{
    struct writer *w = arg;
    uint8_t sector[512];
    for (unsigned i = 0; !atomic_load(w->stop) && !w->failed; i++) {
        unsigned at = i * 37 % (PART / 512);
        uint64_t off = w->from + 512 * (uint64_t)at;
        uint8_t value = i % 5 ? (uint8_t)(i % 255 + 1) : 0;
        memset(sector, value, sizeof(sector));
        int r = value ? dr_pwrite(w->disk, sector, off, sizeof(sector), 0, NULL)
                      : dr_zero(w->disk, off, sizeof(sector), i % 2 ? DR_MAY_UNMAP : 0, NULL);
        w->last[at] = value;
        at = i * 11 % (PART / 512);
        if (r == 0)
            r = dr_pread(w->disk, sector, w->from + 512 * (uint64_t)at, sizeof(sector), NULL);
        w->failed = r < 0 || sector[0] != w->last[at] || sector[511] != w->last[at];
    }
    return NULL;
}

static void an_open_disk_is_amended_while_others_use_it(void **state)
{
    static const struct dr_pair steps[] = {
        {"refcount_bits", "64"}, {"refcount_bits", "1"},  {"lazy_refcounts", "on"},
        {"size", "1000448"},     {"refcount_bits", "16"}, {"compat", "0.10"},
        {"compat", "1.1"},       {"size", "3000320"},     {"refcount_bits", "2"},
        {"refcount_bits", "16"}, {"compat", "0.10"}};
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_create_options o = {.format = "qcow2", .size = SIZE, .has_size = true};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    static struct writer w[THREADS];
    atomic_bool stop = false;
    struct dr_disk *disk;
    (void)state;
    o.pairs = &(const struct dr_pair){"cluster_size", "1024"};
    o.n_pairs = 1;
    ok(dr_create_fs(fs, IMAGE, &o, &err));
    ok(dr_open_fs(fs, IMAGE, &open, &disk, &err));
    for (unsigned i = 0; i < THREADS; i++) {
        w[i] = (struct writer){.disk = disk, .from = i * PART, .stop = &stop};
        assert_int_equal(pthread_create(&w[i].thread, NULL, write_and_read, &w[i]), 0);
    }
    for (size_t i = 0; i < sizeof(steps) / sizeof(steps[0]); i++) {
        struct dr_amend_options a = {.pairs = &steps[i], .n_pairs = 1};
        ok(dr_disk_amend(disk, &a, NULL, &err));
    }
    atomic_store(&stop, true);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(w[i].thread, NULL);
        assert_false(w[i].failed);
    }
    ok(dr_close(disk, &err));
    is_sound(fs, "amended while it was open");
    dr_fs_memory_free(fs);
}

/* The nth write fails while what version 2 cannot hold is given up. False: there is none. */
static bool downgrade_with_failure(const struct amendment *a, uint64_t nth)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_amend_options o = {.pairs = a->after, .n_pairs = count(a->after)};
    char line[200] = "";
    struct dr_check_result result = {.report = remember, .user = line};
    struct dr_disk *disk;
    struct dr_image *image;
    make_disk(memory, a);
    struct faultfs *f = faultfs_new(memory);
    ok(dr_open_fs(faultfs_fs(f), IMAGE, &open, &disk, &err));
    faultfs_arm(f,
                &(struct faultfs_plan){.nth = nth, .kinds = 1u << FAULTFS_WRITE, .error = ENOSPC});
    int r = dr_disk_amend(disk, &o, NULL, NULL);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    assert_int_equal(r, fired ? -ENOSPC : 0);
    /* as somebody finds it who comes after a kill */
    ok(dr_image_open(memory, IMAGE, "qcow2", DR_OPEN_NO_LOCK, &image, &err));
    ok(image->fmt->check(image, 0, &result, &err));
    dr_image_unref(image, NULL);
    if (result.leaks || result.corruptions)
        fail_msg("%s, write %llu failed: %s", a->name, (unsigned long long)nth, line);
    dr_close(disk, NULL);
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

/* What it gave up until then is free, and what it did not give up is counted. */
static void a_downgrade_that_failed_leaves_nothing_to_a_later_flush(void **state)
{
    (void)state;
    for (size_t i = 0; i < AMENDMENTS; i++)
        if (strncmp(amendments[i].name, "downgrade", 9) == 0)
            for (uint64_t nth = 0; downgrade_with_failure(&amendments[i], nth); nth++)
                ;
}

/* A write that is not refused after an amendment failed is there, and the image is sound. */
static bool write_after_failure(const struct amendment *a, uint64_t nth)
{
    struct dr_fs *memory = dr_fs_memory_new();
    struct dr_open_options open = {.flags = DR_OPEN_RDWR};
    struct dr_amend_options o = {.pairs = a->after, .n_pairs = count(a->after)};
    struct dr_disk *disk;
    char when[100];
    uint8_t wrote[8 * KiB], read[8 * KiB];
    make_disk(memory, a);
    struct faultfs *f = faultfs_new(memory);
    ok(dr_open_fs(faultfs_fs(f), IMAGE, &open, &disk, &err));
    memset(wrote, 0x5a, sizeof(wrote));
    ok(dr_pwrite(disk, wrote, 0, 512, 0, &err));
    faultfs_arm(f, &(struct faultfs_plan){.nth = nth, .error = EIO});
    dr_disk_amend(disk, &o, NULL, NULL);
    bool fired = faultfs_fired(f);
    faultfs_disarm(f);
    snprintf(when, sizeof(when), "%s, I/O %llu failed", a->name, (unsigned long long)nth);
    int r = dr_pwrite(disk, wrote, 130 * KiB, sizeof(wrote), 0, NULL);
    int closed = dr_close(disk, NULL);
    is_sound(memory, when);
    if (r == 0 && closed == 0) {
        ok(dr_open_fs(memory, IMAGE, NULL, &disk, &err));
        ok(dr_pread(disk, read, 130 * KiB, sizeof(read), &err));
        ok(dr_close(disk, &err));
        assert_memory_equal(wrote, read, sizeof(read));
    }
    faultfs_free(f);
    dr_fs_memory_free(memory);
    return fired;
}

static void an_open_disk_goes_on_after_an_amendment_failed(void **state)
{
    (void)state;
    for (size_t i = 0; i < AMENDMENTS; i++)
        for (uint64_t nth = 0; write_after_failure(&amendments[i], nth); nth++)
            ;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(amendments_survive_cuts),
        cmocka_unit_test(amendments_survive_faults),
        cmocka_unit_test(a_refusal_changes_nothing),
        cmocka_unit_test(zeros_behind_the_end_do_not_get_into_version_2),
        cmocka_unit_test(an_open_disk_is_amended_while_others_use_it),
        cmocka_unit_test(a_downgrade_that_failed_leaves_nothing_to_a_later_flush),
        cmocka_unit_test(an_open_disk_goes_on_after_an_amendment_failed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
