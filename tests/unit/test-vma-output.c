/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where new archives go: names that appear only with a complete archive, pipes that are slow or go
 * away, and what is refused before anything is written. */
#include "test-vma.h"
#include "faultfs.h"
#include "powerfs.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "archive/sums.h"
#include "core/aside.h"

#define ARCHIVE "b.vma"
#define SUMS    "b.vma.sums"

static const struct dr_vma_config config = {
    .name = "qemu-server.conf", .data = (const uint8_t *)"cores: 2\n", .len = 9};

static int create(struct dr_fs *fs, const char *path, const struct dr_vma_create_disk *disk,
                  struct dr_vma_create_options o, struct dr_error *err)
{
    struct dr_job job = {.workers = 3};
    o.disks = disk;
    o.n_disks = disk ? 1 : 0;
    return dr_vma_create_fs(fs, path, &o, &job, NULL, err);
}

static void open_one(struct dr_fs *fs, uint64_t size, struct dr_vma_create_disk *disk)
{
    free(random_disk(fs, "d", size, 0xffffff00ff00ffff, 1));
    *disk = (struct dr_vma_create_disk){.name = "d", .disk = open_disk(fs, "d")};
}

/* ------------------------------------------------------------------ refusals */

static void bad_wishes_are_refused_before_anything_is_written(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_create_disk good, disks[255];
    open_one(fs, 4096, &good);
    const struct {
        struct dr_vma_create_disk disk;
        const char *word;
    } cases[] = {
        {{.name = "", .disk = good.disk}, "name ''"},
        {{.name = NULL, .disk = good.disk}, "without a name"},
        {{.name = "a b", .disk = good.disk}, "blanks"},
        {{.name = "a/b", .disk = good.disk}, "'/'"},
        {{.name = "a\nb", .disk = good.disk}, "\\x0a"},
        {{.name = "d"}, "no image"},
        {{.name = "vmstate", .disk = good.disk}, "vmstate"},
        {{.name = "x", .vmstate = true, .state_size = 1}, "vmstate"},
        {{.name = "vmstate", .vmstate = true}, "size 0"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++)
        refused(create(fs, ARCHIVE, &cases[i].disk, (struct dr_vma_create_options){0}, &err),
                EINVAL, cases[i].word);
    struct dr_vma_create_options o = {.disks = disks, .n_disks = 2};
    disks[0] = disks[1] = good;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EINVAL, "two disks");
    o.n_disks = 255;
    refused(dr_vma_create_fs(fs, ARCHIVE, &o, NULL, NULL, &err), EINVAL, "255 disks");
    struct dr_vma_config two[] = {config, config};
    o = (struct dr_vma_create_options){.configs = two, .n_configs = 2};
    refused(create(fs, ARCHIVE, &good, o, &err), EINVAL, "two configurations");
    two[0].len = 65536;
    o.n_configs = 1;
    refused(create(fs, ARCHIVE, &good, o, &err), EINVAL, "65535");
    refused(create(fs, ARCHIVE, NULL, (struct dr_vma_create_options){0}, &err), EINVAL, "without");
    assert_int_equal(count_files(fs), 1);
    ok(dr_close(good.disk, &err));
}

static void what_is_there_stays_unless_it_may_be_replaced(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_create_disk disk;
    open_one(fs, 70000, &disk);
    make(fs, ARCHIVE, "raw", 8192, NULL);
    refused(create(fs, ARCHIVE, &disk, (struct dr_vma_create_options){0}, &err), EEXIST, ARCHIVE);
    make(fs, SUMS, "raw", 8192, NULL);
    struct dr_vma_create_options o = {.replace = true};
    refused(create(fs, ARCHIVE, &disk, o, &err), EEXIST, "no checksums");
    ok(fs->ops->unlink(fs, SUMS, &err));
    o.sums = "d";
    refused(create(fs, ARCHIVE, &disk, o, &err), EEXIST, "d: exists");
    assert_int_equal(count_files(fs), 2);
    o.sums = NULL;
    ok(create(fs, ARCHIVE, &disk, o, &err));
    struct unpacked u;
    unpack_file(fs, ARCHIVE, &u);
    unpacked_free(&u);
    assert_int_equal(count_files(fs), 3);
    ok(dr_close(disk.disk, &err));
}

/* ------------------------------------------------------------------ failures on the way */

static void nothing_half_made_is_left(struct dr_fs *fs, bool failed, bool replace, const char *what,
                                      unsigned long long n)
{
    struct dr_error why = DR_ERROR_INIT;
    char **names;
    size_t count;
    ok(dr_ops_list(fs, ".", &names, &count, &err));
    for (size_t i = 0; i < count; i++) {
        struct dr_aside a;
        if (dr_aside_parse(names[i], DR_ASIDE_FILE, &a))
            fail_msg("%s %llu leaves %s", what, n, names[i]);
    }
    dr_ops_free_names(names, count);
    if (failed && !replace && !exists(fs, ARCHIVE))
        assert_false(exists(fs, SUMS));
    if (!exists(fs, ARCHIVE))
        return;
    struct unpacked u;
    struct vma_sums *s = NULL;
    unpack_file(fs, ARCHIVE, &u);
    int r = vma_sums_open(fs, SUMS, &u.header, &s, &why);
    if (r != 0 && r != -ENOENT)
        fail_msg("%s %llu: the checksums are not the archive's: %s", what, n, why.text);
    vma_sums_close(s);
    unpacked_free(&u);
}

/* Each I/O on the archive's side fails in turn. */
static void failing_io(struct dr_fs *fs, bool replace, int error)
{
    struct faultfs *faults = faultfs_new(fs);
    struct dr_vma_create_disk disk;
    struct dr_vma_create_options o = {.replace = replace};
    const unsigned kinds = 1u << FAULTFS_OPEN | 1u << FAULTFS_WRITE | 1u << FAULTFS_TRUNCATE |
                           1u << FAULTFS_FLUSH | 1u << FAULTFS_RENAME | 1u << FAULTFS_SYNC_DIR;
    open_one(fs, 65536 * 140, &disk);
    for (uint64_t n = 0;; n++) {
        if (replace) {
            struct dr_vma_create_options first = {.replace = true};
            ok(create(fs, ARCHIVE, &disk, first, &err));
        }
        struct dr_error why = DR_ERROR_INIT;
        faultfs_arm(faults, &(struct faultfs_plan){.nth = n, .kinds = kinds, .error = error});
        int r = create(faultfs_fs(faults), ARCHIVE, &disk, o, &why);
        bool fired = faultfs_fired(faults);
        faultfs_disarm(faults);
        if (!fired)
            break;
        if (r < 0 && strstr(why.text, ".drover-"))
            fail_msg("the text of %llu tells a temporary name: %s", (unsigned long long)n,
                     why.text);
        nothing_half_made_is_left(fs, r < 0, replace, replace ? "replacing" : "making", n);
        if (exists(fs, ARCHIVE))
            ok(fs->ops->unlink(fs, ARCHIVE, &err));
        if (exists(fs, SUMS))
            ok(fs->ops->unlink(fs, SUMS, &err));
    }
    assert_true(exists(fs, ARCHIVE));
    ok(dr_close(disk.disk, &err));
    faultfs_free(faults);
}

static void a_failed_write_leaves_nothing(void **state)
{
    failing_io(*state, false, ENOSPC);
}

static void a_failed_replacement_leaves_a_whole_archive(void **state)
{
    failing_io(*state, true, EIO);
}

static int no_more(void *user, const struct faultfs_io *io)
{
    uint64_t *room = user;
    return io->kind == FAULTFS_WRITE && strstr(io->path, ".vma.drover-") &&
                   io->off + io->len > *room
               ? -ENOSPC
               : 0;
}

static void a_full_disk_is_told(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *faults = faultfs_new(fs);
    struct dr_vma_create_disk disk;
    uint64_t room = 5 * MiB;
    open_one(fs, 65536 * 300, &disk);
    faultfs_observe(faults, no_more, &room);
    refused(create(faultfs_fs(faults), ARCHIVE, &disk, (struct dr_vma_create_options){0}, &err),
            ENOSPC, "b.vma: cannot write");
    assert_int_equal(count_files(fs), 1);
    ok(dr_close(disk.disk, &err));
    faultfs_free(faults);
}

static int bad_sector(void *user, const struct faultfs_io *io)
{
    uint64_t bad = *(uint64_t *)user;
    return io->kind == FAULTFS_READ && io->off <= bad && bad < io->off + io->len ? -EIO : 0;
}

static void unreadable_disks_are_told_by_name_and_place(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *faults = faultfs_new(fs);
    struct dr_vma_create_disk disk;
    uint64_t bad = 65536 * 100;
    open_one(fs, 65536 * 140, &disk);
    ok(dr_close(disk.disk, &err));
    disk.disk = open_disk(faultfs_fs(faults), "d");
    disk.name = "drive-virtio7";
    faultfs_observe(faults, bad_sector, &bad);
    refused(create(fs, ARCHIVE, &disk, (struct dr_vma_create_options){0}, &err), EIO,
            "disk 'drive-virtio7' at offset 6455296");
    assert_int_equal(count_files(fs), 1);
    faultfs_observe(faults, NULL, NULL);
    ok(dr_close(disk.disk, &err));
    faultfs_free(faults);
}

static void interrupted_attempts_give_way(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_file *busy = NULL;
    make(fs, ".b.vma.drover-abcdef", "raw", 8192, NULL);
    make(fs, ".b.vma.sums.drover-abcdef", "raw", 8192, NULL);
    make(fs, ".c.vma.drover-abcdef", "raw", 8192, NULL);
    make(fs, ".b.vma.drover-ghijkl", "raw", 8192, NULL);
    ok(dr_file_open(fs, ".b.vma.drover-ghijkl", DR_FILE_RDWR, &busy, &err));
    struct dr_vma_create_options o = {.configs = &config, .n_configs = 1};
    ok(create(fs, ARCHIVE, NULL, o, &err));
    dr_file_unref(busy);
    assert_false(exists(fs, ".b.vma.drover-abcdef"));
    assert_false(exists(fs, ".b.vma.sums.drover-abcdef"));
    assert_true(exists(fs, ".c.vma.drover-abcdef"));
    assert_true(exists(fs, ".b.vma.drover-ghijkl"));
}

/* ------------------------------------------------------------------ power cuts */

/* Every cluster has the sum that the file says, or there is no such file. */
static bool sums_fit(struct dr_fs *fs, const struct unpacked *u, const char *what)
{
    struct vma_sums *s = NULL;
    struct dr_error why = DR_ERROR_INIT;
    int r = vma_sums_open(fs, SUMS, &u->header, &s, &why);
    if (r == -ENOENT)
        return false;
    if (r < 0)
        fail_msg("%s: %s", what, why.text);
    for (uint32_t c = 0; c < u->clusters[1]; c++) {
        const uint8_t *cluster = u->disk[1] + (uint64_t)c * DR_VMA_CLUSTER;
        struct vma_sum have, want = vma_sum_of(cluster);
        bool known, zero = dr_is_zero(cluster, DR_VMA_CLUSTER);
        ok(vma_sums_get(s, 1, c, &have, &known, &err));
        if (known == zero || (known && (have.low != want.low || have.high != want.high)))
            fail_msg("%s: the sum of cluster %u is another archive's", what, c);
    }
    vma_sums_close(s);
    return true;
}

enum found { FOUND_NOTHING, FOUND_OLD, FOUND_NEW };

static enum found look(struct dr_fs *fs, uint8_t old, uint8_t new, bool *sums, const char *what)
{
    struct unpacked u;
    *sums = false;
    if (!exists(fs, ARCHIVE))
        return FOUND_NOTHING;
    unpack_file(fs, ARCHIVE, &u);
    *sums = sums_fit(fs, &u, what);
    uint8_t first = u.disk[1][0];
    assert_true(first == old || first == new);
    unpacked_free(&u);
    return first == new ? FOUND_NEW : FOUND_OLD;
}

static void cut(struct powerfs *p, size_t i, enum powerfs_mode mode, uint64_t seed, bool replace)
{
    char what[200], op[100] = "the beginning";
    if (i > 0)
        powerfs_op_text(p, i - 1, op, sizeof(op));
    snprintf(what, sizeof(what), "cut after %s, mode %d, seed %d", op, (int)mode, (int)seed);
    struct dr_fs *disk = powerfs_cut(p, i, mode, seed);
    bool sums;
    enum found found = look(disk, 1, 2, &sums, what);
    if (replace && found == FOUND_NOTHING)
        fail_msg("%s: neither the old archive nor the new one is there", what);
    if (i == powerfs_ops(p) && (found != FOUND_NEW || !sums))
        fail_msg("%s: success was told too early", what);
    dr_fs_memory_free(disk);
}

/* Header and uuid stay the same, as they do in a store that deduplicates: only the data tells the
 * archives apart. */
static void cuts(struct dr_fs *fs, bool replace)
{
    struct powerfs *p = powerfs_new();
    struct dr_vma_create_options o = {.reproducible = true, .replace = true};
    for (int byte = replace ? 1 : 2; byte <= 2; byte++) {
        make(fs, "d", "raw", 5 * DR_VMA_CLUSTER, NULL);
        put(fs, "d", 0, 3 * DR_VMA_CLUSTER - 5000, byte);
        struct dr_vma_create_disk disk = {.name = "d", .disk = open_disk(fs, "d")};
        powerfs_settle(p);
        ok(create(powerfs_fs(p), ARCHIVE, &disk, o, &err));
        ok(dr_close(disk.disk, &err));
    }
    for (size_t i = 0; i <= powerfs_ops(p); i++)
        for (int mode = 0; mode < POWERFS_MODES; mode++)
            for (uint64_t seed = 0; seed < (mode >= POWERFS_ALL_BUT_ONE ? 8 : 1); seed++)
                cut(p, i, (enum powerfs_mode)mode, seed, replace);
    powerfs_free(p);
}

static void a_power_cut_leaves_nothing_or_all(void **state)
{
    cuts(*state, false);
}

static void a_power_cut_leaves_the_old_or_the_new(void **state)
{
    cuts(*state, true);
}

/* ------------------------------------------------------------------ pipes */

struct reader {
    int fd;
    size_t stop_after; /* bytes; then the end is closed */
    size_t step;
    bool keep_open;
    struct dr_job *cancel; /* when enough was read */
    uint8_t *buf;
    size_t len;
};

static void *read_all(void *user)
{
    struct reader *r = user;
    size_t room = 0;
    while (r->len < r->stop_after) {
        if (r->len + r->step > room)
            r->buf = realloc(r->buf, room = (r->len + r->step) * 2);
        ssize_t n = read(r->fd, r->buf + r->len, r->step);
        if (n <= 0)
            break;
        r->len += (size_t)n;
    }
    dr_job_cancel(r->cancel);
    if (!r->keep_open)
        close(r->fd);
    return NULL;
}

static int create_into(struct dr_fs *fs, int fd, const struct dr_vma_create_disk *disk,
                       struct dr_job *job, struct dr_error *err)
{
    struct dr_vma_create_options o = {
        .disks = disk, .n_disks = 1, .use_fd = true, .fd = fd, .reproducible = true};
    struct dr_job three = {.workers = 3};
    return dr_vma_create_fs(fs, "the pipe", &o, job ? job : &three, NULL, err);
}

static void slow(struct dr_fs *fs, const int ends[2], size_t step)
{
    struct dr_vma_create_disk disk;
    struct reader reader = {.fd = ends[0], .stop_after = SIZE_MAX, .step = step};
    pthread_t thread;
    open_one(fs, 65536 * 70, &disk);
    assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
    ok(create_into(fs, ends[1], &disk, NULL, &err));
    close(ends[1]);
    pthread_join(thread, NULL);
    ok(create(fs, ARCHIVE, &disk, (struct dr_vma_create_options){.reproducible = true}, &err));
    size_t len;
    uint8_t *want = file_bytes(fs, ARCHIVE, &len);
    assert_int_equal(len, reader.len);
    assert_memory_equal(want, reader.buf, len);
    assert_int_equal(count_files(fs), 3); /* no checksums of what goes into a pipe */
    free(want);
    free(reader.buf);
    ok(dr_close(disk.disk, &err));
}

static void a_slow_pipe_gets_everything(void **state)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    slow(*state, ends, 1000);
}

static void a_pipe_that_does_not_block_gets_everything(void **state)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    slow(*state, ends, 3000);
}

static void a_socket_gets_everything(void **state)
{
    int ends[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    slow(*state, ends, 5000);
}

/* SIGPIPE would end this program: its action is the default. */
static void reader_goes_away(struct dr_fs *fs, const int ends[2])
{
    struct dr_vma_create_disk disk;
    struct reader reader = {.fd = ends[0], .stop_after = 100000, .step = 1000};
    pthread_t thread;
    sigset_t pending, mask;
    open_one(fs, 65536 * 140, &disk);
    assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
    refused(create_into(fs, ends[1], &disk, NULL, &err), EPIPE, "the pipe: nobody reads");
    pthread_join(thread, NULL);
    sigpending(&pending);
    assert_false(sigismember(&pending, SIGPIPE));
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    assert_false(sigismember(&mask, SIGPIPE));
    close(ends[1]);
    free(reader.buf);
    ok(dr_close(disk.disk, &err));
}

static void a_pipes_reader_may_go_away(void **state)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    reader_goes_away(*state, ends);
}

static void a_sockets_reader_may_go_away(void **state)
{
    int ends[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    reader_goes_away(*state, ends);
}

/* Nobody reads on, nobody closes: the job can be stopped all the same. */
static void a_stuck_pipe_can_be_given_up(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_vma_create_disk disk;
    struct dr_job job = {.workers = 3};
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    struct reader reader = {
        .fd = ends[0], .stop_after = 50000, .step = 1000, .cancel = &job, .keep_open = true};
    pthread_t thread;
    open_one(fs, 65536 * 140, &disk);
    assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
    refused(create_into(fs, ends[1], &disk, &job, &err), ECANCELED, "stopped");
    pthread_join(thread, NULL);
    assert_int_equal(fcntl(ends[1], F_GETFL) & O_NONBLOCK, 0); /* others may share it */
    close(ends[0]);
    close(ends[1]);
    free(reader.buf);
    ok(dr_close(disk.disk, &err));
}

/* ------------------------------------------------------------------ the system's files */

static char *in_dir(const char *dir, const char *name)
{
    char *path = dr_path_join(dir, name);
    assert_non_null(path);
    return path;
}

static void fifos_and_devices_are_written_to(void **state)
{
    struct dr_fs *fs = *state;
    char dir[] = "/tmp/test-vma-output-XXXXXX";
    assert_non_null(mkdtemp(dir));
    char *path = in_dir(dir, "fifo");
    assert_int_equal(mkfifo(path, 0600), 0);
    struct dr_vma_create_disk disk;
    open_one(fs, 65536 * 20, &disk);
    struct dr_vma_create_options o = {.disks = &disk, .n_disks = 1};
    struct reader reader = {.stop_after = SIZE_MAX, .step = 65536};
    reader.fd = open(path, O_RDONLY | O_NONBLOCK);
    fcntl(reader.fd, F_SETFL, 0);
    pthread_t thread;
    int hold = open(path, O_WRONLY); /* else the reader may see an end before the writer comes */
    assert_int_equal(pthread_create(&thread, NULL, read_all, &reader), 0);
    ok(dr_vma_create(path, &o, NULL, NULL, &err));
    close(hold);
    pthread_join(thread, NULL);
    struct unpacked u;
    unpack(reader.buf, reader.len, &u);
    unpacked_free(&u);
    free(reader.buf);
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_true(S_ISFIFO(st.st_mode));
    ok(dr_vma_create("/dev/null", &o, NULL, NULL, &err));
    assert_int_not_equal(access("/dev/null.sums", F_OK), 0);
    unlink(path);
    refused(dr_vma_create(dir, &o, NULL, NULL, &err), EEXIST, dir);
    assert_int_equal(rmdir(dir), 0);
    free(path);
    ok(dr_close(disk.disk, &err));
}

static void a_file_keeps_its_mode_when_replaced(void **state)
{
    struct dr_fs *fs = *state;
    char dir[] = "/tmp/test-vma-output-XXXXXX";
    assert_non_null(mkdtemp(dir));
    char *path = in_dir(dir, "x.vma"), *sums = in_dir(dir, "x.vma.sums");
    struct dr_vma_create_disk disk;
    open_one(fs, 65536 * 20, &disk);
    struct dr_vma_create_options o = {.disks = &disk, .n_disks = 1};
    ok(dr_vma_create(path, &o, NULL, NULL, &err));
    assert_int_equal(chmod(path, 0640), 0);
    refused(dr_vma_create(path, &o, NULL, NULL, &err), EEXIST, path);
    o.replace = true;
    o.no_sync = true;
    ok(dr_vma_create(path, &o, NULL, NULL, &err));
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0640);
    struct unpacked u;
    unpack_file(dr_fs_posix(), path, &u);
    unpacked_free(&u);
    assert_int_equal(unlink(sums), 0);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
    free(path);
    free(sums);
    ok(dr_close(disk.disk, &err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(bad_wishes_are_refused_before_anything_is_written),
        ops_test(what_is_there_stays_unless_it_may_be_replaced),
        ops_test(a_failed_write_leaves_nothing),
        ops_test(a_failed_replacement_leaves_a_whole_archive),
        ops_test(a_full_disk_is_told),
        ops_test(unreadable_disks_are_told_by_name_and_place),
        ops_test(interrupted_attempts_give_way),
        ops_test(a_power_cut_leaves_nothing_or_all),
        ops_test(a_power_cut_leaves_the_old_or_the_new),
        ops_test(a_slow_pipe_gets_everything),
        ops_test(a_pipe_that_does_not_block_gets_everything),
        ops_test(a_socket_gets_everything),
        ops_test(a_pipes_reader_may_go_away),
        ops_test(a_sockets_reader_may_go_away),
        ops_test(a_stuck_pipe_can_be_given_up),
        ops_test(fifos_and_devices_are_written_to),
        ops_test(a_file_keeps_its_mode_when_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
