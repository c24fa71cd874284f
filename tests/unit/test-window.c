/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* More files than descriptors: those that are only read lose theirs and get them back, and nobody
 * sees a difference, in their bytes or in their locks. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "place.h"
#include "storage/posix.h"

#define LIMIT 64  /* descriptors that the process may have */
#define MANY  200 /* files */

/* ------------------------------------------------------------------ in the C library's place */

static void (*before_call)(void); /* runs before each call that could lose a lock */
static int fail_open;             /* errno of every open that could get back a descriptor */
static _Atomic unsigned random_advice;
static const char *slow_path; /* opening it takes until may_open is posted */
static sem_t is_opening, may_open;

static void look(void)
{
    void (*call)(void) = before_call;
    if (!call)
        return;
    before_call = NULL;
    call();
    before_call = call;
}

int open(const char *path, int how, ...)
{
    va_list ap;
    va_start(ap, how);
    mode_t mode = how & O_CREAT ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    look();
    if (slow_path && strcmp(path, slow_path) == 0) {
        sem_post(&is_opening);
        sem_wait(&may_open);
    }
    if (fail_open && !(how & O_CREAT)) {
        errno = fail_open;
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, how, mode);
}

int close(int fd)
{
    int r = (int)syscall(SYS_close, fd);
    look();
    return r;
}

int munmap(void *at, size_t len)
{
    int r = (int)syscall(SYS_munmap, at, len);
    look();
    return r;
}

int posix_fadvise(int fd, off_t off, off_t len, int advice)
{
    random_advice += advice == POSIX_FADV_RANDOM;
    return syscall(SYS_fadvise64, fd, off, len, advice) < 0 ? errno : 0;
}

/* ------------------------------------------------------------------ many files */

struct world {
    struct place *place;
    struct rlimit limit;
    struct dr_file *files[MANY];
};

static int setup(void **state)
{
    static struct world w;
    void *place;
    memset(&w, 0, sizeof(w));
    if (setup_posix(&place) || getrlimit(RLIMIT_NOFILE, &w.limit))
        return -1;
    struct rlimit few = {.rlim_cur = LIMIT, .rlim_max = w.limit.rlim_max};
    w.place = place;
    *state = &w;
    return setrlimit(RLIMIT_NOFILE, &few);
}

static int teardown(void **state)
{
    struct world *w = *state;
    void *place = w->place;
    before_call = NULL;
    fail_open = 0;
    for (unsigned i = 0; i < MANY; i++)
        dr_file_unref(w->files[i]);
    setrlimit(RLIMIT_NOFILE, &w->limit);
    return teardown_posix(&place);
}

static const char *name(const struct world *w, unsigned i)
{
    static _Thread_local char names[4][128];
    char *at = names[i % 4];
    snprintf(at, sizeof(names[0]), "%s/f%u", w->place->dir, i);
    return at;
}

static void put(const char *path, const void *bytes, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, len), len);
    close(fd);
}

/* File i holds its number. */
static void make(struct world *w, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        put(name(w, i), &i, sizeof(i));
}

static void open_files(struct world *w, unsigned n, unsigned flags)
{
    for (unsigned i = 0; i < n; i++)
        w->files[i] = open_ok(w->place, name(w, i), flags);
}

static void assert_reads(struct dr_file *f, unsigned expect)
{
    unsigned have = ~expect;
    assert_ok(dr_file_pread(f, &have, 0, sizeof(have), &err));
    assert_int_equal(have, expect);
}

static bool is_shut(struct dr_file *f)
{
    return posix_file(f)->fd == POSIX_SHUT;
}

static void shut(struct dr_file *f)
{
    for (unsigned i = 0; i < MANY && !is_shut(f); i++)
        posix_window_make_room();
    assert_true(is_shut(f));
}

static struct dr_file *one_shut(struct world *w, unsigned flags)
{
    make(w, 1);
    open_files(w, 1, flags);
    shut(w->files[0]);
    return w->files[0];
}

static unsigned descriptors(void)
{
    unsigned n = 0;
    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static void more_files_than_descriptors_are_read(void **state)
{
    struct world *w = *state;
    unsigned others = descriptors();
    make(w, MANY);
    open_files(w, MANY, 0);
    for (unsigned round = 0; round < 2; round++)
        for (unsigned i = 0; i < MANY; i++)
            assert_reads(w->files[i * 73 % MANY], i * 73 % MANY);
    assert_true(descriptors() <= others + LIMIT / 4 * 3);
    assert_true(descriptors() > others + LIMIT / 2);
}

static void few_files_keep_their_descriptors(void **state)
{
    struct world *w = *state;
    make(w, 16);
    open_files(w, 16, 0);
    struct rlimit limit = {.rlim_cur = 4, .rlim_max = w->limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    for (unsigned i = 0; i < 16; i++)
        assert_false(is_shut(w->files[i]));
}

static void a_file_that_is_used_keeps_its_descriptor_before_one_that_is_not(void **state)
{
    struct world *w = *state;
    make(w, 20);
    open_files(w, 20, 0);
    assert_true(posix_window_make_room()); /* all have just been used: one as good as another */
    for (unsigned i = 0; i < 18; i++) {
        assert_reads(w->files[0], 0);
        assert_true(posix_window_make_room());
        assert_false(is_shut(w->files[0]));
    }
}

static int count(void *n, const char *name_found)
{
    (void)name_found;
    ++*(unsigned *)n;
    return 0;
}

/* Most of the descriptors would be for readers, but others have taken them. */
static void where_descriptors_run_out_one_is_shut(void **state)
{
    struct world *w = *state;
    int taken[LIMIT], n = 0;
    make(w, 20);
    open_files(w, 10, 0);
    while (n < LIMIT && (taken[n] = dup(0)) >= 0)
        n++;
    for (unsigned i = 10; i < 20; i++)
        w->files[i] = open_ok(w->place, name(w, i), 0);
    for (unsigned i = 0; i < 20; i++)
        assert_reads(w->files[i], i);
    struct dr_file *writer = open_ok(w->place, w->place->path, DR_FILE_CREATE);
    unsigned names = 0;
    assert_ok(w->place->fs->ops->sync_dir(w->place->fs, w->place->path, &err));
    taken[n++] = dup(0); /* the descriptor that has become free */
    assert_ok(w->place->fs->ops->list(w->place->fs, w->place->dir, count, &names, &err));
    assert_int_equal(names, 21);
    while (n > 0)
        close(taken[--n]);
    dr_file_unref(writer);
}

static void everything_that_asks_a_shut_file_opens_it(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    enum dr_file_extent kind;
    uint64_t run, bytes;
    char *where;
    struct stat st;
    assert_int_equal(stat(name(w, 0), &st), 0);

    assert_ok(dr_file_refresh_size(f, &err));
    assert_int_equal(dr_file_size(f), sizeof(unsigned));
    shut(f);
    assert_ok(dr_file_extent(f, 0, 4, &kind, &run, &err));
    assert_int_equal(kind, DR_FILE_DATA);
    shut(f);
    assert_ok(dr_file_usage(f, &bytes, &err));
    assert_int_equal(bytes, st.st_blocks * 512);
    shut(f);
    assert_int_equal(dr_file_mtime(f) / 1000000000u, st.st_mtim.tv_sec);
    shut(f);
    assert_ok(w->place->fs->ops->where(w->place->fs, f, &where, &err));
    assert_string_equal(where, name(w, 0));
    free(where);
    shut(f);
    f->dirty = true;
    assert_ok(dr_file_flush(f, &err));
    assert_false(is_shut(f));
    shut(f);
    struct dr_file *to = open_ok(w->place, w->place->other, DR_FILE_CREATE);
    assert_ok(w->place->fs->ops->copy_attrs(w->place->fs, f, to, &err));
    shut(f);
    int r = dr_file_copy(to, 0, f, 0, 4, &bytes, NULL);
    assert_true(r == 0 || r == -ENOTSUP);
    assert_false(is_shut(f));
    dr_file_unref(to);
}

static void advice_outlives_the_descriptor(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    random_advice = 0;
    dr_file_advise(f, true);
    assert_true(is_shut(f)); /* advice opens nothing */
    assert_reads(f, 0);
    assert_int_equal(random_advice, 1);
    dr_file_advise(f, false);
    shut(f);
    assert_reads(f, 0);
    assert_int_equal(random_advice, 1);
}

static void files_past_the_cache_come_back_past_the_cache(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, DR_FILE_DIRECT);
    bool direct = posix_file(f)->direct;
    assert_reads(f, 0);
    assert_int_equal(!!(fcntl(posix_file(f)->fd, F_GETFL) & O_DIRECT), direct);
}

/* ------------------------------------------------------------------ what keeps its descriptor */

static void a_writer_keeps_its_descriptor_until_it_reads_only(void **state)
{
    struct world *w = *state;
    make(w, 1);
    open_files(w, 1, DR_FILE_RDWR);
    assert_false(posix_window_make_room());
    assert_ok(dr_file_pwrite(w->files[0], "bytes", 0, 5, &err));
    assert_ok(dr_file_downgrade(w->files[0], &err));
    assert_false(posix_window_make_room()); /* the flush must tell of a failure */
    assert_ok(dr_file_flush(w->files[0], &err));
    shut(w->files[0]);
    assert_ok(dr_file_upgrade(w->files[0], &err));
    assert_false(posix_window_make_room());
}

static void a_file_that_somebody_else_opened_keeps_its_descriptor(void **state)
{
    struct world *w = *state;
    make(w, 1);
    int fd = open(name(w, 0), O_RDONLY | O_CLOEXEC);
    assert_ok(dr_file_open_fd(fd, name(w, 0), &w->files[0], &err));
    close(fd);
    assert_false(posix_window_make_room());
    assert_reads(w->files[0], 0);
}

static void a_file_without_a_name_keeps_its_descriptor(void **state)
{
    struct world *w = *state;
    make(w, 2);
    open_files(w, 2, 0);
    assert_int_equal(unlink(name(w, 0)), 0);
    assert_int_equal(unlink(name(w, 1)), 0);
    unsigned other = 7;
    put(name(w, 1), &other, sizeof(other));
    assert_false(posix_window_make_room());
    assert_reads(w->files[0], 0);
    assert_reads(w->files[1], 1);
}

/* ------------------------------------------------------------------ names */

static void a_file_that_was_renamed_is_found(void **state)
{
    struct world *w = *state;
    make(w, 1);
    open_files(w, 1, 0);
    assert_int_equal(rename(name(w, 0), w->place->other), 0);
    shut(w->files[0]);
    assert_reads(w->files[0], 0);
}

static void a_relative_name_is_good_in_any_directory(void **state)
{
    struct world *w = *state;
    int old = open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    make(w, 1);
    assert_int_equal(chdir(w->place->dir), 0);
    w->files[0] = open_ok(w->place, "f0", 0);
    shut(w->files[0]);
    assert_int_equal(chdir("/"), 0);
    assert_reads(w->files[0], 0);
    shut(w->files[0]);
    assert_reads(w->files[0], 0);
    assert_int_equal(fchdir(old), 0);
    close(old);
}

static void assert_lost(struct dr_file *f)
{
    unsigned have = 5;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_file_pread(f, &have, 0, sizeof(have), &err), -ESTALE);
    assert_int_equal(have, 5);
    if (!strstr(err.text, f->path) || !strstr(err.text, "no longer leads to the file") ||
        !strstr(err.text, "ulimit -n"))
        fail_msg("\"%s\" does not say what is wrong and what to do", err.text);
}

static void a_name_that_leads_elsewhere_is_an_error_until_it_leads_back(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    unsigned same = 0;
    assert_int_equal(rename(name(w, 0), w->place->other), 0);
    assert_lost(f); /* nothing there */
    put(name(w, 0), &same, sizeof(same));
    assert_lost(f); /* another file */
    assert_int_equal(unlink(name(w, 0)), 0);
    assert_int_equal(mkfifo(name(w, 0), 0600), 0);
    assert_lost(f); /* which to open would take for ever */
    assert_int_equal(unlink(name(w, 0)), 0);
    assert_int_equal(symlink(name(w, 0), name(w, 0)), 0);
    assert_lost(f);
    assert_int_equal(rename(w->place->other, name(w, 0)), 0);
    assert_reads(f, 0);
}

static const char *turns, *turned_to;

static void turn_the_name(void)
{
    if (turns)
        assert_int_equal(rename(turned_to, turns), 0);
    turns = NULL;
}

/* After the look and before the open. */
static void a_name_that_turns_in_the_last_moment_is_an_error(void **state)
{
    struct world *w = *state;
    unsigned same = 0;
    struct dr_file *f = one_shut(w, 0);
    put(w->place->other, &same, sizeof(same));
    turns = name(w, 0);
    turned_to = w->place->other;
    before_call = turn_the_name;
    assert_lost(f);
    assert_null(turns);
}

/* A file that has gone leaves its number to the next. Here it has not gone. */
static void no_other_file_gets_the_number_of_one_that_is_shut(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, DR_FILE_NO_LOCK);
    for (unsigned i = 0; i < 50; i++) {
        unsigned other = 77;
        assert_int_equal(unlink(name(w, 0)), 0);
        put(name(w, 0), &other, sizeof(other));
        assert_lost(f);
    }
}

static void our_own_renames_and_removals_take_no_file_from_a_reader(void **state)
{
    struct world *w = *state;
    struct dr_fs *fs = w->place->fs;
    make(w, 5);
    open_files(w, 5, 0);
    struct dr_file *sharing = open_ok(w->place, name(w, 0), DR_FILE_FORCE_SHARE);
    for (unsigned i = 0; i < 5; i++)
        shut(w->files[i]);
    shut(sharing);
    assert_ok(fs->ops->unlink(fs, name(w, 0), &err));
    assert_ok(fs->ops->rename_new(fs, name(w, 1), w->place->other, &err));
    assert_ok(fs->ops->rename(fs, name(w, 2), name(w, 3), &err));
    assert_true(is_shut(w->files[4]));
    for (unsigned i = 0; i < 5; i++)
        assert_reads(w->files[i], i);
    assert_reads(sharing, 0);
    dr_file_unref(sharing);
}

/* ------------------------------------------------------------------ faults */

static void assert_read_fails(struct dr_file *f, int errnum, const char *words)
{
    unsigned have;
    fail_open = errnum;
    for (int i = 0; i < 2; i++) {
        struct dr_error err = DR_ERROR_INIT;
        assert_int_equal(dr_file_pread(f, &have, 0, sizeof(have), &err), -errnum);
        if (!strstr(err.text, f->path) || !strstr(err.text, words))
            fail_msg("\"%s\" lacks \"%s\"", err.text, words);
    }
    fail_open = 0;
}

static void a_descriptor_that_cannot_be_had_again_is_an_error_that_passes(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    assert_read_fails(f, EMFILE, "raise the limit");
    assert_read_fails(f, ENFILE, "raise the limit");
    assert_read_fails(f, EACCES, "change its mode");
    assert_read_fails(f, EIO, "Input/output error");
    assert_reads(f, 0);
}

static void everything_fails_in_words_when_the_file_cannot_be_opened(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    enum dr_file_extent kind;
    uint64_t run;
    char *where;
    struct dr_fs *fs = w->place->fs;
    fail_open = EACCES;
    assert_fails(dr_file_extent(f, 0, 4, &kind, &run, &err), EACCES, "change its mode");
    assert_fails(dr_file_usage(f, &run, &err), EACCES, "change its mode");
    assert_fails(dr_file_refresh_size(f, &err), EACCES, "change its mode");
    assert_fails(fs->ops->where(fs, f, &where, &err), EACCES, f->path);
    assert_fails(dr_file_upgrade(f, &err), EACCES, f->path);
    assert_fails(fs->ops->unlink(fs, f->path, &err), EACCES, "is in use");
    assert_fails(fs->ops->rename(fs, f->path, w->place->other, &err), EACCES, "is in use");
    assert_fails(fs->ops->rename_new(fs, f->path, w->place->other, &err), EACCES, "is in use");
    assert_int_equal(dr_file_mtime(f), 0);
    fail_open = 0;
    assert_reads(f, 0);
}

static void what_could_not_be_tried_to_flush_is_not_lost(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    f->dirty = true;
    fail_open = EMFILE;
    assert_fails(dr_file_flush(f, &err), EMFILE, "raise the limit");
    fail_open = 0;
    assert_true(f->dirty);
    assert_ok(dr_file_flush(f, &err));
}

/* ------------------------------------------------------------------ locks */

static bool held(const char *path, off_t byte)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    assert_true(fd >= 0);
    assert_int_equal(fcntl(fd, F_OFD_GETLK, &fl), 0);
    syscall(SYS_close, fd);
    return fl.l_type != F_UNLCK;
}

/* The lock bytes 100 to 103 and 200 to 203, as others see them. */
static const char *locks_of(const char *path)
{
    static char bits[9];
    for (int i = 0; i < 8; i++)
        bits[i] = held(path, 100 + i % 4 + (i < 4 ? 0 : 100)) ? '1' : '0';
    return bits;
}

/* Another process, which has none of our descriptors, looks at the locks when it is asked. */
struct onlooker {
    pid_t pid;
    int ask, answer;
};

static struct onlooker onlooker;
static unsigned looks;

static void onlooker_works(int ask, int answer, const struct world *w, unsigned n)
{
    char byte;
    while (read(ask, &byte, 1) == 1) {
        byte = 1;
        for (unsigned i = 0; i < n; i++)
            byte = byte && strcmp(locks_of(name(w, i)), "10000101") == 0;
        if (write(answer, &byte, 1) != 1)
            break;
    }
    _exit(0);
}

static void onlooker_starts(const struct world *w, unsigned n)
{
    int ask[2], answer[2];
    assert_int_equal(pipe(ask), 0);
    assert_int_equal(pipe(answer), 0);
    onlooker.pid = fork();
    if (onlooker.pid == 0) {
        close(ask[1]);
        close(answer[0]);
        onlooker_works(ask[0], answer[1], w, n);
    }
    close(ask[0]);
    close(answer[1]);
    onlooker.ask = ask[1];
    onlooker.answer = answer[0];
    looks = 0;
}

static void onlooker_looks(void)
{
    char byte = 1;
    assert_int_equal(write(onlooker.ask, &byte, 1), 1);
    assert_int_equal(read(onlooker.answer, &byte, 1), 1);
    looks++;
    if (!byte)
        fail_msg("at look %u a lock byte was missing", looks);
}

static void onlooker_ends(void)
{
    int status;
    close(onlooker.ask);
    close(onlooker.answer);
    waitpid(onlooker.pid, &status, 0);
    assert_int_equal(status, 0);
}

/* At each call that opens, closes or unmaps something, by all that happens to a file on the way. */
static void the_lock_bytes_are_never_missing(void **state)
{
    struct world *w = *state;
    enum { N = 8 };
    make(w, N);
    assert_int_equal(truncate(name(w, 3), 0), 0); /* an empty file has locks like any other */
    onlooker_starts(w, N);
    open_files(w, N, 0);
    before_call = onlooker_looks;
    onlooker_looks();
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < N; i++)
            shut(w->files[i]);
        for (unsigned i = 0; i < N; i++)
            assert_ok(dr_file_refresh_size(w->files[i], &err));
    }
    shut(w->files[5]);
    assert_ok(w->place->fs->ops->rename(w->place->fs, name(w, 5), name(w, 5), &err));
    before_call = NULL;
    assert_true(looks > 3 * 2 * N);
    onlooker_ends();
}

static void a_shut_file_becomes_a_writer_and_a_reader_again(void **state)
{
    struct world *w = *state;
    static const unsigned flags[] = {0, DR_FILE_FORCE_SHARE};
    static const char *const before[] = {"10000101", "10000000"};
    for (unsigned i = 0; i < 2; i++) {
        struct dr_file *f = one_shut(w, flags[i]);
        assert_string_equal(locks_of(f->path), before[i]);
        assert_reads(f, 0); /* with a descriptor, or without one: */
        if (i == 0)
            shut(f);
        assert_ok(dr_file_upgrade(f, &err));
        assert_string_equal(locks_of(f->path), "11010101");
        assert_ok(dr_file_pwrite(f, "\1\0\0\0", 0, 4, &err));
        assert_ok(dr_file_downgrade(f, &err));
        assert_ok(dr_file_flush(f, &err));
        assert_string_equal(locks_of(f->path), "10000101");
        shut(f);
        assert_string_equal(locks_of(f->path), "10000101");
        assert_reads(f, 1);
        dr_file_unref(f);
        w->files[0] = NULL;
        assert_string_equal(locks_of(name(w, 0)), "00000000");
    }
}

static void a_shut_file_with_another_reader_does_not_become_a_writer(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    onlooker_starts(w, 1);
    int fd = open(name(w, 0), O_RDONLY | O_CLOEXEC); /* a stranger who uses it and shares nothing */
    static const off_t bytes[] = {100, 201, 203};
    for (unsigned i = 0; i < 3; i++) {
        struct flock fl = {.l_type = F_RDLCK, .l_start = bytes[i], .l_len = 1};
        assert_int_equal(fcntl(fd, F_OFD_SETLK, &fl), 0);
    }
    assert_fails(dr_file_upgrade(f, &err), EBUSY, "lock");
    close(fd);
    onlooker_looks();
    shut(f); /* as before */
    onlooker_looks();
    onlooker_ends();
    assert_reads(f, 0);
}

static void locks_go_with_the_last_user(void **state)
{
    struct world *w = *state;
    for (unsigned i = 0; i < 3; i++) {
        struct dr_file *f = one_shut(w, 0);
        int alive[2];
        assert_int_equal(pipe(alive), 0);
        if (i == 1)
            assert_reads(f, 0); /* has a descriptor again, and the locks on the first one */
        pid_t child = i == 2 ? fork() : 0; /* a child that lives on has nothing of it */
        if (i == 2 && child == 0) {
            char byte;
            close(alive[1]);
            _exit(read(alive[0], &byte, 1) != 0);
        }
        assert_string_equal(locks_of(name(w, 0)), "10000101");
        dr_file_unref(f);
        w->files[0] = NULL;
        assert_string_equal(locks_of(name(w, 0)), "00000000");
        close(alive[0]);
        close(alive[1]);
        if (child > 0)
            waitpid(child, NULL, 0);
    }
}

/* The last user goes while somebody has a call to make. */
static void a_pinned_file_can_be_read_when_its_users_and_its_name_have_gone(void **state)
{
    struct world *w = *state;
    struct dr_file *f = one_shut(w, 0);
    unsigned other = 9;
    dr_file_pin(f);
    dr_file_unref(f);
    w->files[0] = NULL;
    assert_string_equal(locks_of(name(w, 0)), "00000000");
    assert_int_equal(unlink(name(w, 0)), 0);
    put(name(w, 0), &other, sizeof(other));
    assert_false(posix_window_make_room());
    assert_reads(f, 0);
    dr_file_unpin(f);
}

/* ------------------------------------------------------------------ threads */

#define THREADS 8
#define ROUNDS  2000

struct reader {
    struct world *w;
    unsigned seed;
    pthread_t thread;
    unsigned wrong;
};

static void *read_everywhere(void *arg)
{
    struct reader *r = arg;
    uint64_t x = r->seed;
    for (unsigned i = 0; i < ROUNDS; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        unsigned n = (unsigned)(x >> 33) % MANY, have = ~n;
        /* A few files that all want, and many that few want. */
        if (i % 2)
            n %= 8;
        r->wrong += dr_file_pread(r->w->files[n], &have, 0, sizeof(have), NULL) != 0 || have != n;
    }
    return NULL;
}

static void *change_some(void *arg)
{
    struct reader *r = arg;
    for (unsigned i = 0; i < ROUNDS / 10; i++) {
        unsigned n = (i * 7 + r->seed) % MANY;
        struct dr_file *more;
        r->wrong += dr_file_open(r->w->place->fs, name(r->w, n), 0, &more, NULL) != 0;
        dr_file_unref(more);
        struct dr_file *f = r->w->files[n];
        r->wrong += dr_file_upgrade(f, NULL) != 0 || dr_file_downgrade(f, NULL) != 0;
        dr_file_advise(f, i % 2);
    }
    return NULL;
}

static void many_threads_read_more_files_than_descriptors(void **state)
{
    struct world *w = *state;
    struct reader r[THREADS + 1];
    make(w, MANY);
    open_files(w, MANY, 0);
    for (unsigned i = 0; i <= THREADS; i++) {
        r[i] = (struct reader){.w = w, .seed = i + 1};
        assert_int_equal(
            pthread_create(&r[i].thread, NULL, i == THREADS ? change_some : read_everywhere, &r[i]),
            0);
    }
    for (unsigned i = 0; i <= THREADS; i++) {
        pthread_join(r[i].thread, NULL);
        assert_int_equal(r[i].wrong, 0);
    }
    for (unsigned i = 0; i < MANY; i++)
        assert_string_equal(locks_of(name(w, i)), "10000101");
}

static void *read_first(void *arg)
{
    struct world *w = arg;
    unsigned have = 1;
    int r = dr_file_pread(w->files[0], &have, 0, sizeof(have), NULL);
    return r == 0 && have == 0 ? w : NULL;
}

static void a_file_that_opens_slowly_makes_only_its_own_users_wait(void **state)
{
    struct world *w = *state;
    pthread_t threads[2];
    make(w, MANY);
    open_files(w, MANY, 0);
    shut(w->files[0]);
    sem_init(&is_opening, 0, 0);
    sem_init(&may_open, 0, 0);
    slow_path = w->files[0]->path;
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, read_first, w), 0);
    sem_wait(&is_opening);
    for (unsigned i = 1; i < MANY; i++)
        assert_reads(w->files[i], i);
    for (unsigned i = 1; i < 20; i++) {
        dr_file_unref(w->files[i]);
        w->files[i] = open_ok(w->place, name(w, i), 0);
    }
    sem_post(&may_open);
    for (unsigned i = 0; i < 2; i++) {
        void *right;
        pthread_join(threads[i], &right);
        assert_non_null(right);
    }
    assert_int_equal(sem_trywait(&is_opening), -1); /* both waited for one open */
    slow_path = NULL;
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(more_files_than_descriptors_are_read),
        T(few_files_keep_their_descriptors),
        T(a_file_that_is_used_keeps_its_descriptor_before_one_that_is_not),
        T(where_descriptors_run_out_one_is_shut),
        T(everything_that_asks_a_shut_file_opens_it),
        T(advice_outlives_the_descriptor),
        T(files_past_the_cache_come_back_past_the_cache),
        T(a_writer_keeps_its_descriptor_until_it_reads_only),
        T(a_file_that_somebody_else_opened_keeps_its_descriptor),
        T(a_file_without_a_name_keeps_its_descriptor),
        T(a_file_that_was_renamed_is_found),
        T(a_relative_name_is_good_in_any_directory),
        T(a_name_that_leads_elsewhere_is_an_error_until_it_leads_back),
        T(a_name_that_turns_in_the_last_moment_is_an_error),
        T(no_other_file_gets_the_number_of_one_that_is_shut),
        T(our_own_renames_and_removals_take_no_file_from_a_reader),
        T(a_descriptor_that_cannot_be_had_again_is_an_error_that_passes),
        T(everything_fails_in_words_when_the_file_cannot_be_opened),
        T(what_could_not_be_tried_to_flush_is_not_lost),
        T(the_lock_bytes_are_never_missing),
        T(a_shut_file_becomes_a_writer_and_a_reader_again),
        T(a_shut_file_with_another_reader_does_not_become_a_writer),
        T(locks_go_with_the_last_user),
        T(a_pinned_file_can_be_read_when_its_users_and_its_name_have_gone),
        T(a_file_that_opens_slowly_makes_only_its_own_users_wait),
        T(many_threads_read_more_files_than_descriptors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
