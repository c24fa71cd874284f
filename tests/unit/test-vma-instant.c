/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An archive of disks in use holds what all of them held at one instant, whatever their guests do
 * meanwhile; and where it fails, there is none. */
#include <poll.h>
#include <pthread.h>
#include <unistd.h>
#include <zstd.h>

#include "archive/sums.h"
#include "faultfs.h"
#include "powerfs.h"
#include "base/cleanup.h"
#include "test-vma.h"

#include "instant.h"

#define ARCHIVE "b.vma"
#define SUMS    "b.vma.sums"
#define SIZE_A  (2u * MiB + 5 * 512)
#define SIZE_B  (40u * 64 * KiB)

static const struct dr_vma_config config = {
    .name = "qemu-server.conf", .data = (const uint8_t *)"cores: 2\n", .len = 9};

static struct dr_disk *open_rw(struct dr_fs *fs, const char *path)
{
    const struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    return disk;
}

static void make_disks(struct dr_fs *fs)
{
    make(fs, "a", "qcow2", SIZE_A, NULL);
    put(fs, "a", 0, 200 * KiB, 0x11);
    put(fs, "a", 600 * KiB, 300 * KiB, 0x22);
    put(fs, "a", SIZE_A - 512, 512, 0x44);
    make(fs, "b", "raw", SIZE_B, NULL);
    put(fs, "b", 64 * KiB, 700 * KiB, 0x55);
}

/* ------------------------------------------------------------------ a backup in its own thread */

struct backing_up {
    struct dr_fs *fs;
    struct dr_vma_create_disk disks[2];
    struct dr_vma_create_options o;
    struct dr_vma_create_result result;
    struct dr_job *job;
    pthread_t thread;
    int r;
    struct dr_error error;
};

static void *back_up(void *arg)
{
    struct backing_up *b = arg;
    b->r = dr_job_begin(b->job, &b->error);
    if (b->r == 0)
        b->r = dr_job_end(b->job,
                          dr_vma_create_fs(b->fs, ARCHIVE, &b->o, b->job, &b->result, &b->error));
    return NULL;
}

static void prepare(struct backing_up *b, struct dr_fs *fs, struct dr_disk *one,
                    struct dr_disk *two)
{
    *b = (struct backing_up){.fs = fs,
                             .disks = {{.name = "a", .disk = one}, {.name = "b", .disk = two}}};
    b->o = (struct dr_vma_create_options){.disks = b->disks,
                                          .n_disks = two ? 2 : 1,
                                          .configs = &config,
                                          .n_configs = 1,
                                          .at_instant = true};
    ok(dr_job_new(NULL, NULL, &b->job, &err));
}

static void start(struct backing_up *b)
{
    assert_int_equal(pthread_create(&b->thread, NULL, back_up, b), 0);
}

/* Returns when the instant has been, and the job has copied nothing yet. */
static void start_paused(struct backing_up *b)
{
    dr_job_pause(b->job);
    start(b);
    wait_for_instant(b->job);
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

static void change_much(struct dr_disk *disk)
{
    uint8_t buf[3000];
    memset(buf, 0x99, sizeof(buf));
    ok(dr_pwrite(disk, buf, 10 * KiB, 1, 0, &err));
    ok(dr_pwrite(disk, buf, 66 * KiB, sizeof(buf), DR_FUA, &err));
    ok(dr_pwrite(disk, buf, 700 * KiB - 100, sizeof(buf), 0, &err));
    ok(dr_pwrite(disk, buf, MiB + 5, sizeof(buf), 0, &err));
    ok(dr_zero(disk, 128 * KiB, 64 * KiB, DR_MAY_UNMAP, &err));
    ok(dr_discard(disk, 768 * KiB, 128 * KiB, &err));
    ok(dr_pwrite(disk, buf, dr_size(disk) - 600, 600, 0, &err));
    ok(dr_flush(disk, &err));
}

/* ------------------------------------------------------------------ what is in the archive */

static void has_digest(const uint8_t *bytes, uint64_t size, const char *digest)
{
    char text[DR_DIGEST_TEXT];
    digest_of(bytes, size, text);
    assert_string_equal(digest, text);
}

static void sums_fit(struct dr_fs *fs, const struct unpacked *u)
{
    struct vma_sums *s = NULL;
    ok(vma_sums_open(fs, SUMS, &u->header, &s, &err));
    for (size_t i = 0; i < u->header.n_disks; i++) {
        unsigned id = u->header.disks[i].id;
        for (uint32_t c = 0; c < u->clusters[id]; c++) {
            const uint8_t *cluster = u->disk[id] + (size_t)c * DR_VMA_CLUSTER;
            struct vma_sum have, want = vma_sum_of(cluster);
            bool known;
            ok(vma_sums_get(s, id, c, &have, &known, &err));
            assert_int_equal(known, !dr_is_zero(cluster, DR_VMA_CLUSTER));
            if (known)
                assert_true(have.low == want.low && have.high == want.high);
        }
    }
    vma_sums_close(s);
}

static void what_changes_after_the_instant_is_not_in_the_archive(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    struct unpacked u;
    uint64_t size_a, size_b, data = 0;
    make_disks(fs);
    uint8_t *a = view(fs, "a", &size_a), *c = view(fs, "b", &size_b);
    struct dr_disk *one = open_rw(fs, "a"), *two = open_rw(fs, "b");
    prepare(&b, fs, one, two);
    start_paused(&b);
    change_much(two);
    change_much(one);
    end_well(&b);
    unpack_file(fs, ARCHIVE, &u);
    assert_false(u.ascending);
    assert_int_equal(u.header.n_configs, 1);
    has_disk(&u, 1, a, size_a);
    has_disk(&u, 2, c, size_b);
    sums_fit(fs, &u);
    has_digest(a, size_a, b.result.disks[0].digest);
    has_digest(c, size_b, b.result.disks[1].digest);
    for (int i = 0; i < 2; i++)
        data += b.result.disks[i].size - b.result.disks[i].zero_bytes;
    assert_true(data > 1200 * KiB && data <= u.blocks * DR_VMA_BLOCK);
    unpacked_free(&u);
    assert_int_equal(one->hooks.n + two->hooks.n, 0);
    ok(dr_truncate(one, 4 * MiB, &err)); /* nobody claims it any more */
    ok(dr_close(one, &err));
    ok(dr_close(two, &err));
    free(a);
    free(c);
}

/* A planted fault: a change that the hook is not told of must not go unseen. */
static void a_write_past_the_hook_is_caught(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    struct unpacked u;
    uint64_t size;
    uint8_t byte = 0x77;
    make_disks(fs);
    uint8_t *want = view(fs, "a", &size);
    struct dr_disk *disk = open_rw(fs, "a");
    prepare(&b, fs, disk, NULL);
    start_paused(&b);
    struct dr_chain *chain = disk->chain;
    const struct dr_hooks *hooks = chain->hooks;
    chain->hooks = NULL;
    ok(dr_pwrite(disk, &byte, 100, 1, 0, &err));
    chain->hooks = hooks;
    end_well(&b);
    unpack_file(fs, ARCHIVE, &u);
    assert_int_equal(u.disk[1][100], 0x77);
    assert_int_equal(want[100], 0x11);
    unpacked_free(&u);
    ok(dr_close(disk, &err));
    free(want);
}

static uint8_t *unpack_zstd(const uint8_t *coded, size_t len, size_t *plain_len)
{
    size_t room = 16 * MiB;
    uint8_t *plain = malloc(room);
    ZSTD_DCtx *zstd = ZSTD_createDCtx();
    ZSTD_inBuffer in = {coded, len, 0};
    ZSTD_outBuffer out = {plain, room, 0};
    size_t left = 1;
    while (in.pos < in.size)
        assert_false(ZSTD_isError(left = ZSTD_decompressStream(zstd, &out, &in)));
    assert_int_equal(left, 0);
    ZSTD_freeDCtx(zstd);
    *plain_len = out.pos;
    return plain;
}

static void a_compressed_archive_holds_the_same(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    struct unpacked u;
    uint64_t size;
    size_t len, plain_len;
    make_disks(fs);
    uint8_t *want = view(fs, "a", &size);
    struct dr_disk *disk = open_rw(fs, "a");
    prepare(&b, fs, disk, NULL);
    b.o.compression = DR_VMA_ZSTD;
    start_paused(&b);
    change_much(disk);
    end_well(&b);
    uint8_t *coded = file_bytes(fs, ARCHIVE, &len);
    uint8_t *plain = unpack_zstd(coded, len, &plain_len);
    assert_true(len < plain_len / 10);
    unpack(plain, plain_len, &u);
    has_disk(&u, 1, want, size);
    sums_fit(fs, &u);
    unpacked_free(&u);
    ok(dr_close(disk, &err));
    free(plain);
    free(coded);
    free(want);
}

static void holes_are_not_read(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    make(fs, "a", "qcow2", UINT64_C(1) << 35, NULL);
    put(fs, "a", UINT64_C(1) << 34, 4096, 0x55);
    struct dr_disk *disk = open_rw(fs, "a");
    prepare(&b, fs, disk, NULL);
    start(&b);
    end_well(&b);
    assert_int_equal(b.result.disks[0].copied, 64 * KiB);
    assert_int_equal(b.result.disks[0].zero_bytes, (UINT64_C(1) << 35) - 4096);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ pipes */

struct reader {
    int fd;
    uint8_t *bytes;
    size_t len, room;
    pthread_t thread;
};

static void *read_all(void *arg)
{
    struct reader *r = arg;
    ssize_t n;
    while ((n = read(r->fd, r->bytes + r->len, r->room - r->len)) > 0)
        r->len += (size_t)n;
    return NULL;
}

static void read_begin(struct reader *r, int fd)
{
    *r = (struct reader){.fd = fd, .room = 16 * MiB, .bytes = malloc(16 * MiB)};
    assert_int_equal(pthread_create(&r->thread, NULL, read_all, r), 0);
}

static void read_end(struct reader *r)
{
    pthread_join(r->thread, NULL);
    close(r->fd);
}

static void a_pipe_gets_the_same(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    struct reader reader;
    struct unpacked u;
    uint64_t size_a, size_b;
    int fds[2];
    make_disks(fs);
    uint8_t *a = view(fs, "a", &size_a), *c = view(fs, "b", &size_b);
    struct dr_disk *one = open_rw(fs, "a"), *two = open_rw(fs, "b");
    assert_int_equal(pipe(fds), 0);
    prepare(&b, fs, one, two);
    b.o.use_fd = true;
    b.o.fd = fds[1];
    read_begin(&reader, fds[0]);
    start_paused(&b);
    change_much(one);
    change_much(two);
    end_well(&b);
    close(fds[1]);
    read_end(&reader);
    unpack(reader.bytes, reader.len, &u);
    has_disk(&u, 1, a, size_a);
    has_disk(&u, 2, c, size_b);
    unpacked_free(&u);
    ok(dr_close(one, &err));
    ok(dr_close(two, &err));
    free(reader.bytes);
    free(a);
    free(c);
}

/* Does a reader see that the archive is not whole, by a piece of an extent at its end? */
static bool ends_within_an_extent(const uint8_t *bytes, size_t len)
{
    struct dr_vma_header header;
    uint32_t size;
    ok(vma_header_size(bytes, "archive", &size, &err));
    ok(vma_header_parse(bytes, size, "archive", &header, NULL, NULL, &err));
    uint64_t off = size;
    while (off + VMA_EXTENT_HEADER <= len) {
        struct vma_extent e;
        ok(vma_extent_parse(bytes + off, header.uuid, "archive", off, &e, &err));
        off += VMA_EXTENT_HEADER + e.data_len;
    }
    vma_header_free(&header);
    return off != len;
}

static void what_a_failed_backup_sent_into_a_pipe_is_seen_to_be_no_whole_archive(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    struct reader reader;
    int fds[2];
    make_disks(fs);
    struct dr_disk *disk = open_rw(fs, "b");
    assert_int_equal(pipe(fds), 0);
    prepare(&b, fs, disk, NULL);
    b.o.use_fd = true;
    b.o.fd = fds[1];
    read_begin(&reader, fds[0]);
    start_paused(&b);
    change_much(disk); /* some extents are there, and each is a whole one */
    dr_job_cancel(b.job);
    assert_int_equal(end(&b), -ECANCELED);
    close(fds[1]);
    read_end(&reader);
    assert_true(reader.len > VMA_FIXED_HEADER + DR_VMA_CLUSTER);
    assert_true(ends_within_an_extent(reader.bytes, reader.len));
    ok(dr_close(disk, &err));
    free(reader.bytes);
}

static void a_guest_does_not_fail_where_nobody_reads_the_pipe(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    int fds[2];
    make_disks(fs);
    struct dr_disk *disk = open_rw(fs, "b");
    assert_int_equal(pipe(fds), 0);
    prepare(&b, fs, disk, NULL);
    b.o.use_fd = true;
    b.o.fd = fds[1];
    start_paused(&b);
    close(fds[0]);
    change_much(disk);
    assert_int_equal(end(&b), -EPIPE);
    close(fds[1]);
    assert_int_equal(disk->hooks.n, 0);
    ok(dr_close(disk, &err));
}

static void *overwrite_all(void *disk)
{
    uint8_t *buf = malloc(64 * KiB);
    memset(buf, 0x99, 64 * KiB);
    for (uint64_t off = 0; off < SIZE_B; off += 64 * KiB)
        ok(dr_pwrite(disk, buf, off, 64 * KiB, 0, &err));
    free(buf);
    return NULL;
}

/* The guest waits for a pipe that nobody empties, but not after the backup was cancelled. */
static void a_cancelled_backup_frees_a_guest_that_waits_for_the_pipe(void **state)
{
    struct dr_fs *fs = *state;
    struct backing_up b;
    pthread_t guest;
    int fds[2];
    free(random_disk(fs, "a", SIZE_B, UINT64_MAX, 1)); /* more than a pipe takes */
    struct dr_disk *disk = open_rw(fs, "a");
    assert_int_equal(pipe(fds), 0);
    struct pollfd room = {.fd = fds[1], .events = POLLOUT};
    prepare(&b, fs, disk, NULL);
    b.o.use_fd = true;
    b.o.fd = fds[1];
    start_paused(&b);
    assert_int_equal(pthread_create(&guest, NULL, overwrite_all, disk), 0);
    while (poll(&room, 1, 0) == 1)
        sched_yield();
    dr_job_cancel(b.job);
    pthread_join(guest, NULL);
    assert_int_equal(end(&b), -ECANCELED);
    close(fds[0]);
    close(fds[1]);
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ failures and cuts */

/* Whichever of its I/Os fails: there is a whole archive, or none, and the disk reads as before. */
static void a_failure_leaves_a_whole_archive_or_none(void **state)
{
    (void)state;
    for (uint64_t nth = 0, fired = 1; fired; nth++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *f = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(f);
        struct dr_error why = DR_ERROR_INIT;
        struct dr_job job = {.workers = 1};
        uint64_t size;
        make_disks(fs);
        uint8_t *want = view(fs, "b", &size);
        struct dr_disk *disk = open_rw(fs, "b");
        const struct dr_vma_create_disk d = {.name = "b", .disk = disk};
        const struct dr_vma_create_options o = {
            .disks = &d, .n_disks = 1, .at_instant = true, .spill = {.path = "spill"}};
        faultfs_arm(f, &(struct faultfs_plan){.nth = nth});
        int r = dr_vma_create_fs(fs, ARCHIVE, &o, &job, NULL, &why);
        fired = faultfs_fired(f);
        faultfs_disarm(f);
        if (r < 0 && why.errnum == 0)
            fail_msg("I/O %d: no text", (int)nth);
        if (exists(fs, ARCHIVE)) {
            struct unpacked u;
            unpack_file(fs, ARCHIVE, &u);
            has_disk(&u, 1, want, size);
            if (r == 0)
                sums_fit(fs, &u);
            unpacked_free(&u);
        } else
            assert_true(r < 0);
        assert_int_equal(disk->hooks.n, 0);
        ok(dr_disk_claim(disk, "test", &err));
        dr_disk_unclaim(disk);
        ok(dr_close(disk, &err));
        same_view(fs, "b", want, size);
        free(want);
        faultfs_free(f);
        dr_fs_memory_free(memory);
    }
}

/* Somebody makes the file of checksums when the archive is about to get its name. */
static int takes_the_name_of_the_checksums(void *user, const struct faultfs_io *io)
{
    struct dr_fs **memory = user;
    struct dr_file *file = NULL;
    if (!*memory || io->kind != FAULTFS_RENAME || strstr(io->to, ".sums") ||
        !strstr(io->to, ARCHIVE))
        return 0;
    ok(dr_file_open(DR_STEAL(*memory), ARCHIVE ".sums", DR_FILE_CREATE, &file, &err));
    ok(dr_file_pwrite(file, "mine", 0, 4, &err));
    dr_file_unref(file);
    return 0;
}

static void a_listed_archive_that_fails_takes_nothing_of_others_with_it(void **state)
{
    struct dr_fs *memory = *state, *planted = memory;
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    make_disks(fs);
    struct dr_disk *disk = open_rw(fs, "b");
    const struct dr_vma_create_disk d = {.name = "b", .disk = disk};
    const struct dr_vma_create_options o = {
        .disks = &d, .n_disks = 1, .at_instant = true, .set = "set.json"};
    faultfs_observe(f, takes_the_name_of_the_checksums, &planted);
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EEXIST, ".sums");
    faultfs_observe(f, NULL, NULL);
    assert_null(planted);
    assert_false(exists(fs, ARCHIVE) || exists(fs, "set.json"));
    assert_true(exists(fs, ARCHIVE ".sums"));
    ok(dr_close(disk, &err));
    faultfs_free(f);
}

static int (*real_path)(struct dr_fs *fs, const char *path, char **real, struct dr_error *err);

static int no_path_of_b(struct dr_fs *fs, const char *path, char **real, struct dr_error *err)
{
    return strcmp(path, "b") == 0 ? dr_fail_errno(err, ENOENT, "%s", path)
                                  : real_path(fs, path, real, err);
}

static void an_archive_of_a_disk_that_has_no_name_any_more_is_not_listed(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_fs_ops *whole = fs->ops;
    struct dr_fs_ops ops = *whole;
    make_disks(fs);
    struct dr_disk *disk = open_rw(fs, "b");
    const struct dr_vma_create_disk d = {.name = "b", .disk = disk};
    const struct dr_vma_create_options o = {
        .disks = &d, .n_disks = 1, .at_instant = true, .set = "set.json"};
    real_path = whole->realpath;
    ops.realpath = no_path_of_b;
    fs->ops = &ops;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), ENOENT, "b");
    fs->ops = whole;
    assert_false(exists(fs, ARCHIVE) || exists(fs, "set.json"));
    ok(dr_close(disk, &err));
}

static int fails_writing_archives(void *user, const struct faultfs_io *io)
{
    const _Atomic bool *on = user;
    return atomic_load(on) && io->kind == FAULTFS_WRITE && strstr(io->path, ARCHIVE) ? -ENOSPC : 0;
}

static void a_full_target_fails_the_backup_and_not_the_guest(void **state)
{
    struct faultfs *f = faultfs_new(*state);
    struct dr_fs *fs = faultfs_fs(f);
    struct backing_up b;
    _Atomic bool on = false;
    make_disks(fs);
    size_t files = count_files(fs);
    struct dr_disk *one = open_rw(fs, "a"), *two = open_rw(fs, "b");
    prepare(&b, fs, one, two);
    start_paused(&b);
    faultfs_observe(f, fails_writing_archives, &on);
    atomic_store(&on, true);
    change_much(two);
    atomic_store(&on, false); /* too late: what the disk held there is gone */
    change_much(one);
    assert_int_equal(end(&b), -ENOSPC);
    assert_non_null(strstr(b.error.text, ARCHIVE));
    ok(dr_close(one, &err));
    ok(dr_close(two, &err));
    assert_int_equal(count_files(fs), files);
    faultfs_free(f);
}

static bool look_after_cut(struct dr_fs *fs, const uint8_t *want, uint64_t size)
{
    if (!exists(fs, ARCHIVE))
        return true;
    struct dr_vma_header header;
    struct vma_sums *s = NULL;
    size_t len;
    uint32_t head;
    uint8_t *bytes = file_bytes(fs, ARCHIVE, &len), *have = calloc(1, size + DR_VMA_CLUSTER);
    uint64_t clusters = 0, off;
    bool good = len >= VMA_FIXED_HEADER && vma_header_size(bytes, "b", &head, NULL) == 0 &&
                len >= head && vma_header_parse(bytes, head, "b", &header, NULL, NULL, NULL) == 0;
    if (!good) {
        free(bytes);
        free(have);
        return false;
    }
    for (off = head; good && off + VMA_EXTENT_HEADER <= len;) {
        struct vma_extent e;
        good = vma_extent_parse(bytes + off, header.uuid, "b", off, &e, NULL) == 0 &&
               off + VMA_EXTENT_HEADER + e.data_len <= len;
        for (unsigned i = 0; good && i < e.n; i++)
            for (unsigned k = 0; k < VMA_BLOCKS; k++)
                if (e.slot[i].mask >> k & 1)
                    memcpy(have + (size_t)e.slot[i].cluster * DR_VMA_CLUSTER + k * DR_VMA_BLOCK,
                           bytes + off + VMA_EXTENT_HEADER + vma_block_at(&e.slot[i], k),
                           DR_VMA_BLOCK);
        off += good ? VMA_EXTENT_HEADER + e.data_len : 0;
        clusters += good ? e.n : 0;
    }
    good = good && off == len && clusters == vma_clusters(size) && memcmp(have, want, size) == 0;
    if (good && exists(fs, SUMS)) {
        good = vma_sums_open(fs, SUMS, &header, &s, NULL) == 0;
        vma_sums_close(s);
    }
    vma_header_free(&header);
    free(bytes);
    free(have);
    return good;
}

static bool cut_everywhere(size_t skip, size_t *flushes)
{
    struct powerfs *p = powerfs_new();
    struct dr_fs *fs = powerfs_fs(p);
    struct dr_job job = {.workers = 1};
    uint64_t size;
    bool good = true;
    make_disks(fs);
    uint8_t *want = view(fs, "b", &size);
    struct dr_disk *disk = open_rw(fs, "b");
    const struct dr_vma_create_disk d = {.name = "b", .disk = disk};
    const struct dr_vma_create_options o = {.disks = &d, .n_disks = 1, .at_instant = true};
    powerfs_settle(p);
    powerfs_skip_flush(p, skip);
    ok(dr_vma_create_fs(fs, ARCHIVE, &o, &job, NULL, &err));
    *flushes = powerfs_flushes(p);
    for (size_t i = 0; i <= powerfs_ops(p) && good; i++)
        for (int mode = 0; mode < POWERFS_MODES && good; mode++) {
            struct dr_fs *cut = powerfs_cut(p, i, (enum powerfs_mode)mode, i);
            good = look_after_cut(cut, want, size);
            dr_fs_memory_free(cut);
        }
    ok(dr_close(disk, &err));
    free(want);
    powerfs_free(p);
    return good;
}

/* ------------------------------------------------------------------ failures that are not the end
 */

struct retries {
    _Atomic bool on; /* writes to the archive fail */
    unsigned asked;
};

static enum dr_error_action ask(void *user, bool reading, int error, const char *text)
{
    struct retries *t = user;
    (void)text;
    assert_false(reading);
    assert_int_equal(error, ENOSPC);
    if (++t->asked == 3)
        atomic_store(&t->on, false);
    return DR_ERROR_STOP; /* and the job is not paused: again, at once */
}

static void retry_extents(struct dr_fs *memory, enum dr_vma_compression compression)
{
    struct faultfs *f = faultfs_new(memory);
    struct dr_fs *fs = faultfs_fs(f);
    struct retries t = {.on = false};
    const struct dr_job_options jo = {.error = ask, .user = &t, .workers = 1};
    struct backing_up b;
    uint64_t size;
    make_disks(fs);
    uint8_t *want = view(fs, "b", &size), *have;
    struct dr_disk *one = open_rw(fs, "a"), *two = open_rw(fs, "b");
    prepare(&b, fs, one, two);
    b.o.compression = compression;
    dr_job_free(b.job);
    ok(dr_job_new(NULL, &jo, &b.job, &err));
    start_paused(&b);
    faultfs_observe(f, fails_writing_archives, &t.on);
    atomic_store(&t.on, true);
    end_well(&b);
    assert_int_equal(t.asked, 3);
    faultfs_observe(f, NULL, NULL);
    have = view(fs, "vma:" ARCHIVE "#b", &size);
    assert_memory_equal(have, want, size);
    free(have);
    free(want);
    ok(dr_close(one, &err));
    ok(dr_close(two, &err));
    faultfs_free(f);
}

static void an_extent_that_could_not_be_written_is_written_again(void **state)
{
    struct dr_fs *other = dr_fs_memory_new();
    retry_extents(*state, DR_VMA_PLAIN);
    retry_extents(other, DR_VMA_ZSTD);
    dr_fs_memory_free(other);
}

static void after_a_power_cut_an_archive_with_its_name_is_whole(void **state)
{
    size_t flushes, caught = 0;
    (void)state;
    assert_true(cut_everywhere(SIZE_MAX, &flushes));
    assert_true(flushes > 1);
    for (size_t skip = 0, n; skip < flushes; skip++) /* planted: a flush is missing */
        caught += !cut_everywhere(skip, &n);
    assert_true(caught > 0);
}

static void what_cannot_be_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    make_disks(fs);
    struct dr_disk *disk = open_rw(fs, "b");
    struct dr_vma_create_disk d = {.name = "b", .disk = disk};
    struct dr_vma_create_options o = {.disks = &d, .n_disks = 1, .at_instant = true};
    ok(dr_disk_claim(disk, "test", &err));
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EBUSY, "until test has ended");
    dr_disk_unclaim(disk);
    o.reproducible = true;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EINVAL, "not reproducible");
    o.reproducible = false;
    d.vmstate = true;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EINVAL, "state of a machine");
    o.n_disks = 0;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EINVAL, "without a disk");
    assert_false(exists(fs, ARCHIVE));
    ok(dr_close(disk, &err));
}

/* ------------------------------------------------------------------ a crowd
 *
 * Each writer counts: number k goes into its block k % BLOCKS of the first disk, and when that is
 * done into the same block of the second one. So what an instant shows tells how many steps had
 * been done, and which numbers all other blocks must have. */

#define WRITERS 3
#define BLOCKS  24u
#define STEPS   100u /* before the instant, at least */

struct writer {
    struct dr_disk *disks[2];
    unsigned which;
    _Atomic unsigned done;
    _Atomic bool stop;
    pthread_t thread;
    int r;
};

static uint64_t place_of(unsigned which, uint64_t k)
{
    return (k % BLOCKS * WRITERS + which) * 20 * KiB;
}

static void *count_up(void *arg)
{
    struct writer *w = arg;
    struct dr_error why;
    for (uint64_t k = 1; w->r == 0 && !atomic_load(&w->stop); k++) {
        for (int i = 0; i < 2 && w->r == 0; i++)
            w->r = dr_pwrite(w->disks[i], &k, place_of(w->which, k), sizeof(k), 0, &why);
        atomic_fetch_add(&w->done, 1);
    }
    return NULL;
}

static uint64_t number_at(const struct unpacked *u, unsigned id, unsigned which, uint64_t k)
{
    uint64_t n;
    memcpy(&n, u->disk[id] + place_of(which, k), sizeof(n));
    return n;
}

/* The steps of one writer that a disk shows; all its other blocks must fit. */
static uint64_t steps_of(const struct unpacked *u, unsigned id, unsigned which)
{
    uint64_t last = 0;
    for (uint64_t k = 0; k < BLOCKS; k++)
        last = dr_max(last, number_at(u, id, which, k));
    for (uint64_t k = last; k + BLOCKS > last && k > 0; k--)
        assert_int_equal(number_at(u, id, which, k), k);
    return last;
}

/* spill: bytes; 0 = none */
static void archive_in_a_crowd(struct dr_fs *fs, uint64_t spill)
{
    struct writer writers[WRITERS] = {0};
    struct backing_up b;
    struct unpacked u;
    make(fs, "a", "qcow2", 2 * MiB, NULL);
    make(fs, "b", "raw", 2 * MiB, NULL);
    struct dr_disk *one = open_rw(fs, "a"), *two = open_rw(fs, "b");
    prepare(&b, fs, one, two);
    b.o.spill = (struct dr_backup_spill){.path = spill ? "spill" : NULL, .size = spill};
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i].disks[0] = one;
        writers[i].disks[1] = two;
        writers[i].which = i;
        assert_int_equal(pthread_create(&writers[i].thread, NULL, count_up, &writers[i]), 0);
    }
    while (atomic_load(&writers[0].done) < STEPS)
        sched_yield();
    start(&b);
    end_well(&b);
    for (unsigned i = 0; i < WRITERS; i++) {
        atomic_store(&writers[i].stop, true);
        pthread_join(writers[i].thread, NULL);
        assert_int_equal(writers[i].r, 0);
    }
    unpack_file(fs, ARCHIVE, &u);
    for (unsigned i = 0; i < WRITERS; i++) {
        uint64_t first = steps_of(&u, 1, i), second = steps_of(&u, 2, i);
        assert_true(first == second || first == second + 1);
    }
    assert_true(steps_of(&u, 1, 0) >= STEPS);
    sums_fit(fs, &u);
    unpacked_free(&u);
    ok(dr_close(one, &err));
    ok(dr_close(two, &err));
}

static void an_archive_shows_one_instant_of_two_disks_in_a_crowd(void **state)
{
    archive_in_a_crowd(*state, 0);
}

static void so_it_does_with_a_spill_that_is_ample_or_always_full(void **state)
{
    struct dr_fs *other = dr_fs_memory_new();
    archive_in_a_crowd(*state, 4 * MiB);
    archive_in_a_crowd(other, 64 * KiB);
    dr_fs_memory_free(other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(what_changes_after_the_instant_is_not_in_the_archive),
        ops_test(a_write_past_the_hook_is_caught),
        ops_test(a_compressed_archive_holds_the_same),
        ops_test(holes_are_not_read),
        ops_test(a_pipe_gets_the_same),
        ops_test(what_a_failed_backup_sent_into_a_pipe_is_seen_to_be_no_whole_archive),
        ops_test(a_guest_does_not_fail_where_nobody_reads_the_pipe),
        ops_test(a_cancelled_backup_frees_a_guest_that_waits_for_the_pipe),
        ops_test(a_failure_leaves_a_whole_archive_or_none),
        ops_test(a_listed_archive_that_fails_takes_nothing_of_others_with_it),
        ops_test(an_archive_of_a_disk_that_has_no_name_any_more_is_not_listed),
        ops_test(a_full_target_fails_the_backup_and_not_the_guest),
        ops_test(an_extent_that_could_not_be_written_is_written_again),
        ops_test(after_a_power_cut_an_archive_with_its_name_is_whole),
        ops_test(what_cannot_be_is_refused),
        ops_test(an_archive_shows_one_instant_of_two_disks_in_a_crowd),
        ops_test(so_it_does_with_a_spill_that_is_ample_or_always_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
