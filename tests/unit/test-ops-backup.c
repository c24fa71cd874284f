/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A backup holds what its disks held at one instant, whatever their guests do meanwhile. */
#include <pthread.h>

#include "drover/backup.h"
#include "faultfs.h"
#include "powerfs.h"
#include "slower.h"
#include "test-ops.h"

#include "instant.h"

#define SIZE (2u * MiB + 5 * 512)

static const char *const formats[] = {"raw", "qcow2", "vmdk", "add-cow"};
#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))

/* Data, zeros and holes. add-cow stands on a parent. */
static void make_disk(struct dr_fs *fs, const char *path, const char *format)
{
    bool child = strcmp(format, "add-cow") == 0;
    if (child) {
        make(fs, "base", "raw", SIZE, NULL);
        put(fs, "base", 0, MiB, 0x77);
    }
    const struct dr_create_options o = {.format = format,
                                        .size = SIZE,
                                        .has_size = true,
                                        .backing = child ? "base" : NULL,
                                        .backing_format = child ? "raw" : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
    put(fs, path, 0, 200 * KiB, 0x11);
    put(fs, path, 100 * KiB, 30 * KiB, 0);
    put(fs, path, 600 * KiB, 300 * KiB, 0x22);
    put(fs, path, 1536 * KiB + 512, 512, 0x33);
    put(fs, path, SIZE - 512, 512, 0x44);
}

static struct dr_disk *open_rw(struct dr_fs *fs, const char *path)
{
    const struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    return disk;
}

/* ------------------------------------------------------------------ a backup in a thread of its
 * own
 */

struct backing_up {
    struct dr_disk *disk;
    struct dr_backup_options o;
    struct dr_backup_result result;
    struct dr_job *job;
    pthread_t thread;
    int r;
    struct dr_error error;
};

static void *back_up(void *arg)
{
    struct backing_up *b = arg;
    b->r = dr_disk_backup(b->disk, "copy", &b->o, b->job, &b->result, &b->error);
    return NULL;
}

/* Returns when the instant has been, and the job has copied nothing yet. */
static void begin(struct backing_up *b, struct dr_disk *disk, const char *format)
{
    *b = (struct backing_up){.disk = disk, .o = {.format = format}};
    ok(dr_job_new(NULL, NULL, &b->job, &err));
    dr_job_pause(b->job);
    assert_int_equal(pthread_create(&b->thread, NULL, back_up, b), 0);
    enum dr_job_state state = wait_for_instant(b->job);
    if (state == DR_JOB_PAUSED)
        assert_ptr_equal(b->job->beside, disk); /* to which it gives way */
}

static int end(struct backing_up *b)
{
    dr_job_resume(b->job);
    pthread_join(b->thread, NULL);
    dr_job_free(b->job);
    return b->r;
}

static void end_well(struct backing_up *b)
{
    if (end(b) < 0)
        fail_msg("backup: %s", b->error.text);
}

/* The copy holds these bytes, and its digest says so. */
static void copy_holds(struct dr_fs *fs, const uint8_t *want, uint64_t size, const char *digest)
{
    struct dr_sums sums;
    char text[DR_DIGEST_TEXT];
    same_view(fs, "copy", want, size);
    digest_of(want, size, text);
    assert_string_equal(digest, text);
    ok(dr_sums_load(&sums, fs, "copy.sums", &err));
    dr_sums_digest(&sums, text);
    assert_string_equal(digest, text);
    dr_sums_end(&sums);
}

/* Every kind of change, at places that are data, zeros or holes. */
static void change_much(struct dr_disk *disk)
{
    uint8_t buf[3000];
    memset(buf, 0x99, sizeof(buf));
    ok(dr_pwrite(disk, buf, 10 * KiB, 1, 0, &err));
    ok(dr_pwrite(disk, buf, 66 * KiB, sizeof(buf), DR_FUA, &err));
    ok(dr_pwrite(disk, buf, 110 * KiB, sizeof(buf), 0, &err));
    ok(dr_pwrite(disk, buf, 700 * KiB - 100, sizeof(buf), 0, &err));
    ok(dr_pwrite(disk, buf, MiB + 5, sizeof(buf), 0, &err));
    ok(dr_zero(disk, 128 * KiB, 64 * KiB, DR_MAY_UNMAP, &err));
    ok(dr_zero(disk, 650 * KiB, 10 * KiB, DR_EXPLICIT, &err));
    ok(dr_discard(disk, 768 * KiB, 128 * KiB, &err));
    ok(dr_discard(disk, 1536 * KiB, 64 * KiB, &err));
    ok(dr_pwrite(disk, buf, SIZE - 600, 600, 0, &err));
    ok(dr_flush(disk, &err));
}

static void what_changes_after_the_instant_is_not_in_the_backup(void **state)
{
    (void)state;
    for (size_t from = 0; from < N_FORMATS; from++)
        for (size_t to = 0; to < 3; to++) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct backing_up b;
            uint64_t size;
            make_disk(fs, "disk", formats[from]);
            uint8_t *want = view(fs, "disk", &size);
            struct dr_disk *disk = open_rw(fs, "disk");
            begin(&b, disk, formats[to]);
            change_much(disk);
            end_well(&b);
            assert_int_equal(b.result.size, SIZE);
            copy_holds(fs, want, size, b.result.digest);
            ok(dr_close(disk, &err));
            free(want);
            dr_fs_memory_free(fs);
        }
}

/* A planted fault: a change that the hook is not told of must not go unseen. */
static void a_discard_without_copying_before_is_caught(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    char digest[DR_DIGEST_TEXT];
    uint64_t size;
    make_disk(fs, "disk", "qcow2");
    uint8_t *want = view(fs, "disk", &size);
    digest_of(want, size, digest);
    struct dr_disk *disk = open_rw(fs, "disk");
    begin(&b, disk, "qcow2");
    struct dr_chain *chain = disk->chain;
    const struct dr_hooks *hooks = chain->hooks;
    assert_int_equal(hooks->n, 1);
    chain->hooks = NULL;
    ok(dr_discard(disk, 768 * KiB, 64 * KiB, &err));
    chain->hooks = hooks;
    end_well(&b);
    uint8_t *have = view(fs, "copy", &size);
    assert_true(memcmp(have, want, size) != 0);
    assert_string_not_equal(b.result.digest, digest);
    ok(dr_close(disk, &err));
    free(have);
    free(want);
}

static void the_disk_is_left_without_a_hook(void **state)
{
    struct dr_fs *fs = *state;
    make_disk(fs, "disk", "qcow2");
    struct dr_disk *disk = open_rw(fs, "disk");
    ok(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err));
    assert_int_equal(disk->hooks.n, 0);
    refused(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err), EEXIST, "copy: exists already");
    assert_int_equal(disk->hooks.n, 0);
    ok(dr_disk_claim(disk, "test", &err));
    dr_disk_unclaim(disk);
    ok(dr_close(disk, &err));
}

static void a_disk_that_is_only_read_is_backed_up(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_disk *disk = NULL;
    struct dr_backup_result result;
    uint64_t size;
    make_disk(fs, "disk", "vmdk");
    uint8_t *want = view(fs, "disk", &size);
    ok(dr_open_fs(fs, "disk", NULL, &disk, &err));
    ok(dr_disk_backup(disk, "copy", NULL, NULL, &result, &err));
    copy_holds(fs, want, size, result.digest);
    ok(dr_close(disk, &err));
    free(want);
}

static void a_target_that_belongs_to_the_disk_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    make_disk(fs, "disk", "add-cow");
    struct dr_disk *disk = open_rw(fs, "disk");
    refused(dr_disk_backup(disk, "base", NULL, NULL, NULL, &err), EBUSY, "belongs to the disk");
    ok(dr_close(disk, &err));
}

static void holes_are_not_read(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_backup_result result;
    make(fs, "disk", "raw", UINT64_C(1) << 40, NULL);
    put(fs, "disk", UINT64_C(1) << 39, 4096, 0x55);
    struct dr_disk *disk = open_rw(fs, "disk");
    ok(dr_disk_backup(disk, "copy", NULL, NULL, &result, &err));
    assert_int_equal(result.copied, 64 * KiB);
    ok(dr_close(disk, &err));
}

static void another_operation_waits_for_the_backup(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    make_disk(fs, "disk", "qcow2");
    struct dr_disk *disk = open_rw(fs, "disk");
    begin(&b, disk, NULL);
    refused(dr_truncate(disk, 4 * MiB, &err), EBUSY, "until backup has ended");
    refused(dr_disk_snapshot(disk, "s", NULL, NULL, NULL, &err), EBUSY, "until backup has ended");
    end_well(&b);
    ok(dr_truncate(disk, 4 * MiB, &err));
    ok(dr_close(disk, &err));
}

static void a_cancelled_backup_leaves_nothing(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    make_disk(fs, "disk", "qcow2");
    size_t files = count_files(fs);
    struct dr_disk *disk = open_rw(fs, "disk");
    begin(&b, disk, NULL);
    change_much(disk);
    dr_job_cancel(b.job);
    assert_int_equal(end(&b), -ECANCELED);
    assert_int_equal(disk->hooks.n, 0);
    ok(dr_close(disk, &err));
    assert_int_equal(count_files(fs), files);
}

/* ------------------------------------------------------------------ failures */

static int fails_writing_copies(void *user, const struct faultfs_io *io)
{
    const _Atomic bool *on = user;
    return atomic_load(on) && io->kind == FAULTFS_WRITE && strstr(io->path, "copy") ? -ENOSPC : 0;
}

static void a_full_target_fails_the_backup_and_not_the_guest(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct dr_fs *fs = faultfs_fs(f);
    struct backing_up b;
    _Atomic bool on = false;
    uint8_t byte = 1;
    make_disk(fs, "disk", "qcow2");
    size_t files = count_files(fs);
    struct dr_disk *disk = open_rw(fs, "disk");
    begin(&b, disk, "raw");
    faultfs_observe(f, fails_writing_copies, &on);
    atomic_store(&on, true);
    ok(dr_pwrite(disk, &byte, 0, 1, 0, &err));
    atomic_store(&on, false); /* too late: what the disk held there is gone */
    ok(dr_pread(disk, &byte, 0, 1, &err));
    assert_int_equal(byte, 1);
    assert_int_equal(end(&b), -ENOSPC);
    assert_non_null(strstr(b.error.text, "copy"));
    ok(dr_close(disk, &err));
    assert_int_equal(count_files(fs), files);
    faultfs_free(f);
}

/* Whichever of its I/Os fails: there is a whole copy, or none, and the disk reads as before. */
static void a_failure_leaves_a_whole_copy_or_none(void **state)
{
    (void)state;
    for (uint64_t nth = 0, fired = 1; fired; nth++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(f);
        struct dr_backup_result result;
        struct dr_error why = DR_ERROR_INIT;
        uint64_t size;
        make_disk(fs, "disk", "qcow2");
        uint8_t *want = view(fs, "disk", &size);
        struct dr_disk *disk = open_rw(fs, "disk");
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth});
        int r = dr_disk_backup(disk, "copy", NULL, NULL, &result, &why);
        fired = faultfs_fired(f);
        faultfs_disarm(f);
        uint8_t *have = malloc(size);
        ok(dr_pread(disk, have, 0, size, &err));
        assert_memory_equal(have, want, size);
        if (r == 0)
            copy_holds(fs, want, size, result.digest);
        else if (why.errnum == 0)
            fail_msg("I/O %d: no text", (int)nth);
        else if (exists(fs, "copy"))
            same_view(fs, "copy", want, size);
        assert_int_equal(disk->hooks.n, 0);
        ok(dr_close(disk, &err));
        free(have);
        free(want);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* ------------------------------------------------------------------ power cuts */

/* A copy that has its name is whole, and has its checksums; a rerun makes one where there is none.
 */
static bool look_after_cut(struct dr_fs *fs, const uint8_t *want, uint64_t size, bool report)
{
    struct dr_sums sums;
    uint8_t *have;
    uint64_t n;
    same_view(fs, "disk", want, size);
    if (!exists(fs, "copy")) {
        struct dr_error why = DR_ERROR_INIT;
        struct dr_disk *disk = open_rw(fs, "disk");
        int r = dr_disk_backup(disk, "copy", NULL, NULL, NULL, &why);
        ok(dr_close(disk, &err));
        if (r < 0 && report)
            fail_msg("the rerun fails: %s", why.text);
        if (r < 0)
            return false;
    }
    struct dr_disk *copy = NULL;
    if (dr_open_fs(fs, "copy", NULL, &copy, NULL) < 0) {
        if (report)
            fail_msg("the copy does not open");
        return false;
    }
    ok(dr_close(copy, &err));
    have = view(fs, "copy", &n);
    bool good = n == size && memcmp(have, want, size) == 0;
    if (good && dr_sums_load(&sums, fs, "copy.sums", NULL) == 0)
        dr_sums_end(&sums);
    else
        good = false;
    free(have);
    if (report && !good)
        fail_msg("the copy, or its checksums, is not whole");
    return good;
}

static bool cut_everywhere(size_t skip, size_t *flushes, bool report)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    uint64_t size;
    bool good = true;
    make_disk(fs, "disk", "qcow2");
    uint8_t *want = view(fs, "disk", &size);
    struct dr_disk *disk = open_rw(fs, "disk");
    powerfs_settle(p);
    powerfs_skip_flush(p, skip);
    ok(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err));
    *flushes = powerfs_flushes(p);
    for (size_t i = 0; i <= powerfs_ops(p) && good; i = powerfs_next(p, i, POWERFS_EVERY))
        for (int mode = 0; mode < POWERFS_MODES && good; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            good = look_after_cut(cut, want, size, report);
            dr_fs_memory_free(cut);
        }
    ok(dr_close(disk, &err));
    free(want);
    powerfs_free(p);
    return good;
}

static void after_a_power_cut_a_copy_with_its_name_is_whole(void **state)
{
    size_t flushes;
    (void)state;
    assert_true(cut_everywhere(SIZE_MAX, &flushes, true));
    assert_true(flushes > 1);
}

/* A planted fault: a name before the data is durable. */
static void a_missing_flush_is_caught(void **state)
{
    size_t flushes, caught = 0;
    (void)state;
    ONLY_IN_A_PLAIN_BUILD();
    assert_true(cut_everywhere(SIZE_MAX, &flushes, true));
    for (size_t skip = 0, n; skip < flushes; skip++)
        caught += !cut_everywhere(skip, &n, false);
    assert_true(caught > 0);
}

/* ------------------------------------------------------------------ a crowd, and the very instant
 *
 * Each writer has its own pieces of the disk. A hook of the test's own tells what the disk holds,
 * under the locks of the units: so at any moment at which no request is under way, `shadow` is what
 * the disk holds. Such a moment is the instant: the backup is of two disks, and the test keeps a
 * request inside the second one, so that the first one's gate is closed until the test has seen. */

#define WRITERS 3
#define PIECE   (16u * KiB)

struct crowd {
    struct dr_disk *disk;
    uint8_t *shadow, *either; /* either: the byte may be a zero as well, after a discard */
    _Atomic bool stop;
    _Atomic unsigned steps;
    struct writer {
        struct crowd *crowd;
        unsigned which;
        pthread_t thread;
        char trouble[300];
    } writers[WRITERS];
};

static _Thread_local const uint8_t *bytes_now; /* what this thread's request writes at ... */
static _Thread_local uint64_t bytes_at;
static _Thread_local bool discards;

static void note_change(void *user, uint64_t off, uint64_t len)
{
    struct crowd *c = user;
    if (discards) {
        memset(c->either + off, 1, len);
        return;
    }
    memset(c->either + off, 0, len);
    if (bytes_now)
        memcpy(c->shadow + off, bytes_now + (off - bytes_at), len);
    else
        memset(c->shadow + off, 0, len);
}

/* Nobody else changes this piece: what it reads now is what it held since the discard. */
static int settle(struct crowd *c, uint64_t off, size_t len, uint8_t *buf, struct dr_error *err)
{
    int r = dr_pread(c->disk, buf, off, len, err);
    for (size_t i = 0; r == 0 && i < len; i++)
        if (buf[i] != c->shadow[off + i] && buf[i] != 0)
            r = dr_fail(err, EILSEQ, "discarded byte %zu is %02x", (size_t)off + i, buf[i]);
    return r;
}

static void *write_much(void *arg)
{
    struct writer *w = arg;
    struct crowd *c = w->crowd;
    uint64_t seed = 99 + w->which;
    uint8_t *buf = malloc(PIECE);
    while (!atomic_load(&c->stop) && !w->trouble[0]) {
        struct dr_error err = DR_ERROR_INIT;
        uint64_t piece = next_random(&seed) % (SIZE / PIECE / WRITERS) * WRITERS + w->which;
        uint64_t from = next_random(&seed) % PIECE, off = piece * PIECE + from;
        size_t len = (size_t)(next_random(&seed) % (PIECE - from) + 1);
        int r;
        bytes_at = off;
        bytes_now = NULL;
        discards = false;
        switch (next_random(&seed) % 6) {
        case 0:
            r = dr_zero(c->disk, off, len, DR_MAY_UNMAP, &err);
            break;
        case 1:
            discards = true;
            r = dr_discard(c->disk, off, len, &err);
            discards = false;
            if (r == 0)
                r = settle(c, off, len, buf, &err);
            /* either from now on: a write says what it is */
            if (r == 0) {
                bytes_now = buf;
                r = dr_pwrite(c->disk, buf, off, len, 0, &err);
            }
            break;
        default:
            memset(buf, (int)(next_random(&seed) % 255 + 1), len);
            bytes_now = buf;
            r = dr_pwrite(c->disk, buf, off, len, next_random(&seed) % 8 ? 0 : DR_FUA, &err);
        }
        if (r < 0)
            snprintf(w->trouble, sizeof(w->trouble), "%s", err.text);
        atomic_fetch_add(&c->steps, 1);
    }
    free(buf);
    return NULL;
}

static void crowd_begin(struct crowd *c, struct dr_disk *disk)
{
    const struct dr_hook hook = {.after = note_change, .user = c};
    *c = (struct crowd){.disk = disk, .shadow = malloc(SIZE), .either = calloc(1, SIZE)};
    ok(dr_pread(disk, c->shadow, 0, SIZE, &err));
    ok(dr_disk_hook(disk, &hook, &err));
    for (unsigned i = 0; i < WRITERS; i++) {
        c->writers[i].crowd = c;
        c->writers[i].which = i;
        assert_int_equal(pthread_create(&c->writers[i].thread, NULL, write_much, &c->writers[i]),
                         0);
    }
}

static void crowd_pass(struct crowd *c, unsigned n)
{
    unsigned from = atomic_load(&c->steps);
    while (atomic_load(&c->steps) - from < n)
        sched_yield();
}

static void crowd_end(struct crowd *c)
{
    atomic_store(&c->stop, true);
    for (unsigned i = 0; i < WRITERS; i++)
        pthread_join(c->writers[i].thread, NULL);
    for (unsigned i = 0; i < WRITERS; i++)
        if (c->writers[i].trouble[0])
            fail_msg("writer %u: %s", i, c->writers[i].trouble);
    dr_disk_unhook(c->disk, c);
    free(c->shadow);
    free(c->either);
}

struct two {
    struct dr_backup_disk disks[2];
    int r;
    struct dr_error error;
};

static void *back_up_two(void *arg)
{
    struct two *two = arg;
    two->r = dr_disks_backup(two->disks, 2, NULL, &two->error);
    return NULL;
}

static void check_crowded(struct dr_fs *fs, const uint8_t *want, const uint8_t *either)
{
    uint64_t size;
    uint8_t *have = view(fs, "copy", &size);
    assert_int_equal(size, SIZE);
    for (uint64_t i = 0; i < size; i++)
        if (have[i] != want[i] && !(either[i] && have[i] == 0))
            fail_msg("byte %llu is %02x, not %02x", (unsigned long long)i, have[i], want[i]);
    free(have);
}

static void one_instant(struct dr_fs *fs, struct crowd *c, struct dr_disk *other,
                        const char *format)
{
    uint8_t *want = malloc(SIZE), *either = malloc(SIZE);
    struct two two = {.disks = {{.disk = c->disk, .target = "copy", .options = {.format = format}},
                                {.disk = other, .target = "other-copy"}}};
    struct dr_pass pass;
    pthread_t thread;
    dr_disk_enter(other, &pass);
    assert_int_equal(pthread_create(&thread, NULL, back_up_two, &two), 0);
    while (!atomic_load(&other->closed))
        sched_yield();
    memcpy(want, c->shadow, SIZE);
    memcpy(either, c->either, SIZE);
    dr_disk_leave(other, &pass);
    pthread_join(thread, NULL);
    if (two.r < 0)
        fail_msg("%s", two.error.text);
    check_crowded(fs, want, either);
    free(want);
    free(either);
    const struct dr_open_options open = {.flags = 0};
    ok(dr_ops_remove_image(fs, "copy", format, &open, NULL, NULL, &err));
    ok(dr_ops_remove_image(fs, "other-copy", "qcow2", &open, NULL, NULL, &err));
}

static void a_backup_under_writers_is_the_disk_at_the_instant(void **state)
{
    const char *soak = getenv("DROVER_SOAK");
    unsigned rounds = soak ? 4 * (unsigned)strtoul(soak, NULL, 0) : 4;
    (void)state;
    for (size_t from = 0; from < N_FORMATS; from++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct crowd crowd;
        make_disk(fs, "disk", formats[from]);
        make(fs, "other", "qcow2", MiB, NULL);
        struct dr_disk *disk = open_rw(fs, "disk"), *other = open_rw(fs, "other");
        crowd_begin(&crowd, disk);
        for (unsigned i = 0; i < rounds; i++) {
            crowd_pass(&crowd, 20);
            one_instant(fs, &crowd, other, formats[(from + i) % 3]);
        }
        crowd_end(&crowd);
        ok(dr_close(disk, &err));
        ok(dr_close(other, &err));
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ several disks */

static void two_disks_get_both_copies_or_none(void **state)
{
    struct dr_fs *fs = *state;
    make_disk(fs, "disk", "qcow2");
    make(fs, "other", "qcow2", MiB, NULL);
    make(fs, "taken", "qcow2", MiB, NULL);
    size_t files = count_files(fs);
    struct dr_disk *disk = open_rw(fs, "disk"), *other = open_rw(fs, "other");
    struct dr_backup_disk disks[2] = {{.disk = disk, .target = "copy"},
                                      {.disk = other, .target = "taken"}};
    refused(dr_disks_backup(disks, 2, NULL, &err), EEXIST, "taken: exists already");
    assert_int_equal(count_files(fs), files);
    disks[1].target = "copy"; /* found out only when the first one has the name */
    refused(dr_disks_backup(disks, 2, NULL, &err), EEXIST, "copy");
    assert_int_equal(count_files(fs), files);
    disks[1].target = "copy2";
    ok(dr_disks_backup(disks, 2, NULL, &err));
    assert_true(exists(fs, "copy") && exists(fs, "copy2"));
    ok(dr_close(disk, &err));
    ok(dr_close(other, &err));
}

static void a_file_of_another_kind_is_not_taken_for_old_checksums(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_file *file = NULL;
    make_disk(fs, "disk", "qcow2");
    ok(dr_file_open(fs, "copy.sums", DR_FILE_CREATE, &file, &err));
    ok(dr_file_pwrite(file, "a letter of importance", 0, 22, &err));
    dr_file_unref(file);
    struct dr_disk *disk = open_rw(fs, "disk");
    refused(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err), EEXIST, "copy.sums");
    assert_true(exists(fs, "copy.sums"));
    assert_false(exists(fs, "copy"));
    ok(dr_close(disk, &err));
}

struct winner {
    struct dr_disk *disk;
    bool won;
};

static int make_the_other_copy(void *user)
{
    struct winner *w = user;
    ok(dr_disk_backup(w->disk, "copy", NULL, NULL, NULL, &err));
    w->won = true;
    return 0;
}

static void of_two_backups_to_one_name_the_first_keeps_its_checksums(void **state)
{
    struct dr_fs *fs = *state;
    char digest[DR_DIGEST_TEXT], have[DR_DIGEST_TEXT];
    struct dr_job *job;
    struct dr_sums sums;
    make_disk(fs, "disk", "qcow2");
    make(fs, "other", "qcow2", MiB, NULL);
    struct dr_disk *disk = open_rw(fs, "disk");
    struct winner w = {.disk = open_rw(fs, "other")};
    const struct dr_job_options o = {.before_switch = make_the_other_copy, .user = &w};
    ok(dr_job_new(NULL, &o, &job, &err));
    ok(dr_disk_digest(w.disk, NULL, digest, &err));
    refused(dr_disk_backup(disk, "copy", NULL, job, NULL, &err), EEXIST, "copy");
    assert_true(w.won);
    ok(dr_sums_load(&sums, fs, "copy.sums", &err));
    dr_sums_digest(&sums, have);
    dr_sums_end(&sums);
    assert_string_equal(have, digest);
    dr_job_free(job);
    ok(dr_close(disk, &err));
    ok(dr_close(w.disk, &err));
}

static void nobody_makes_a_backup_while_another_gives_it_its_name(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_file *held;
    struct dr_sums sums;
    make_disk(fs, "disk", "qcow2");
    struct dr_disk *disk = open_rw(fs, "disk");
    ok(dr_sums_begin(&sums, SIZE, &err));
    ok(dr_sums_save_for(&sums, fs, "copy", 0, &held, &err));
    refused(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err), EEXIST, "copy");
    assert_true(exists(fs, "copy.sums") && !exists(fs, "copy"));
    dr_file_unref(held);
    ok(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err));
    dr_sums_end(&sums);
    ok(dr_close(disk, &err));
}

static void damaged_checksums_are_refused(void **state)
{
    struct dr_fs *fs = *state;
    static const uint64_t places[] = {0, 9, 17, 25, 33, 49, 4096 + 5};
    make_disk(fs, "disk", "qcow2");
    struct dr_disk *disk = open_rw(fs, "disk");
    ok(dr_disk_backup(disk, "copy", NULL, NULL, NULL, &err));
    ok(dr_close(disk, &err));
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        struct dr_file *file = NULL;
        struct dr_sums sums;
        uint8_t byte;
        ok(dr_file_open(fs, "copy.sums", DR_FILE_RDWR, &file, &err));
        ok(dr_file_pread(file, &byte, places[i], 1, &err));
        byte ^= 0x10;
        ok(dr_file_pwrite(file, &byte, places[i], 1, &err));
        refused(dr_sums_load(&sums, fs, "copy.sums", &err), EINVAL, "copy.sums");
        byte ^= 0x10;
        ok(dr_file_pwrite(file, &byte, places[i], 1, &err));
        dr_file_unref(file);
        ok(dr_sums_load(&sums, fs, "copy.sums", &err));
        dr_sums_end(&sums);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_changes_after_the_instant_is_not_in_the_backup),
        ops_test(a_discard_without_copying_before_is_caught),
        ops_test(the_disk_is_left_without_a_hook),
        ops_test(a_disk_that_is_only_read_is_backed_up),
        ops_test(a_target_that_belongs_to_the_disk_is_refused),
        ops_test(holes_are_not_read),
        ops_test(another_operation_waits_for_the_backup),
        ops_test(a_cancelled_backup_leaves_nothing),
        ops_test(a_full_target_fails_the_backup_and_not_the_guest),
        cmocka_unit_test(a_failure_leaves_a_whole_copy_or_none),
        cmocka_unit_test(after_a_power_cut_a_copy_with_its_name_is_whole),
        cmocka_unit_test(a_missing_flush_is_caught),
        cmocka_unit_test(a_backup_under_writers_is_the_disk_at_the_instant),
        ops_test(two_disks_get_both_copies_or_none),
        ops_test(a_file_of_another_kind_is_not_taken_for_old_checksums),
        ops_test(of_two_backups_to_one_name_the_first_keeps_its_checksums),
        ops_test(nobody_makes_a_backup_while_another_gives_it_its_name),
        ops_test(damaged_checksums_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
