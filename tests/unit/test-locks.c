/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Two processes and one file: who keeps whom out. The other process is a fork of this one or
 * qemu-io, which takes the same lock bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "storage/storage.h"

static char path[] = "/tmp/drover-locks-XXXXXX";

static int setup(void **state)
{
    (void)state;
    strcpy(path + strlen(path) - 6, "XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0 || ftruncate(fd, 1 << 20))
        return -1;
    close(fd);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    return unlink(path);
}

/* ------------------------------------------------------------------ the other process */

struct other {
    pid_t pid;
    int to, from;
};

static void plumb(int in[2], int out[2])
{
    assert_int_equal(pipe2(in, O_CLOEXEC), 0);
    assert_int_equal(pipe2(out, O_CLOEXEC), 0);
}

/* This program again, started anew: a mere fork would share our table and descriptions. Opens the
 * file, says '+' or '-', stays until its input ends. */
static int child_life(const char *name, const char *flags)
{
    struct dr_file *f = NULL;
    unsigned how = (unsigned)strtoul(flags, NULL, 0);
    char c = dr_file_open(dr_fs_posix(), name, how, &f, NULL) ? '-' : '+';
    if (write(1, &c, 1) == 1)
        while (read(0, &c, 1) > 0)
            ;
    dr_file_unref(f);
    return 0;
}

static bool other_opens(struct other *o, unsigned flags)
{
    int in[2], out[2];
    char c = 0, how[16];
    plumb(in, out);
    snprintf(how, sizeof(how), "%u", flags);
    o->pid = fork();
    if (o->pid == 0) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execl("/proc/self/exe", "child", path, how, (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    o->to = in[1];
    o->from = out[0];
    assert_int_equal(read(o->from, &c, 1), 1);
    return c == '+';
}

static void other_ends(struct other *o)
{
    close(o->to);
    close(o->from);
    assert_int_equal(waitpid(o->pid, NULL, 0), o->pid);
}

/* qemu-io that has the file open and waits for commands. */
static void qemu_opens(struct other *o, const char *mode)
{
    int in[2], out[2];
    plumb(in, out);
    o->pid = fork();
    if (o->pid == 0) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execlp("qemu-io", "qemu-io", "-f", "qcow2", mode, path, (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    o->to = in[1];
    o->from = out[0];
    /* Its answer shows that it has opened the file. */
    char text[4096] = "";
    size_t n = 0;
    assert_int_equal(write(o->to, "length\n", 7), 7);
    while (!strstr(text, "1 MiB")) {
        ssize_t got = read(o->from, text + n, sizeof(text) - 1 - n);
        if (got <= 0)
            fail_msg("qemu-io did not open the file: %s", text);
        n += (size_t)got;
        text[n] = '\0';
    }
}

/* A format, because over plain raw qemu-io shares everything it does not need itself. */
static bool qemu_makes_the_image(void)
{
    char line[128];
    snprintf(line, sizeof(line), "qemu-img create -q -f qcow2 %s 1M >/dev/null 2>&1", path);
    return system(line) == 0;
}

/* What qemu-io says to the file as it is locked now; "" = it could do its work. */
static void qemu_tries(const char *options, const char *command, char *said, size_t len)
{
    char line[512];
    snprintf(line, sizeof(line), "qemu-io -f qcow2 %s -c '%s' %s 2>&1 >/dev/null", options, command,
             path);
    FILE *p = popen(line, "r");
    size_t n = fread(said, 1, len - 1, p);
    said[n] = '\0';
    pclose(p);
}

/* ------------------------------------------------------------------ drover and drover */

static const unsigned modes[] = {0, DR_FILE_RDWR, DR_FILE_FORCE_SHARE,
                                 DR_FILE_RDWR | DR_FILE_NO_LOCK};

static void check_pair(unsigned theirs, unsigned ours, const char *words)
{
    struct other o;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f;
    assert_true(other_opens(&o, theirs));
    int r = dr_file_open(dr_fs_posix(), path, ours, &f, &err);
    if (words) {
        assert_int_equal(r, -EBUSY);
        assert_non_null(strstr(err.text, words));
        assert_non_null(strstr(err.text, "Is another process using the image ["));
        assert_non_null(strstr(err.text, path));
    } else {
        assert_int_equal(r, 0);
        dr_file_unref(f);
    }
    other_ends(&o);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, ours, &f, NULL), 0);
    dr_file_unref(f);
}

static void two_processes_exclude_each_other(void **state)
{
    (void)state;
    const char *write = "Failed to get \"write\" lock";
    const char *shared = "Failed to get shared \"write\" lock";
    const char *expect[4][4] = {
        /* theirs   ours: reader, writer, sharer, unlocked */
        {NULL, write, NULL, NULL},
        {shared, write, NULL, NULL},
        {NULL, NULL, NULL, NULL},
        {NULL, NULL, NULL, NULL},
    };
    for (int theirs = 0; theirs < 4; theirs++)
        for (int ours = 0; ours < 4; ours++)
            check_pair(modes[theirs], modes[ours], expect[theirs][ours]);
}

static bool locked(off_t byte)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_GETLK, &fl), 0);
    close(fd);
    return fl.l_type != F_UNLCK;
}

/* All of 100..103, 200..203 as a text: "r w" style would hide a byte too many. */
static void assert_locks(const char *expect)
{
    char have[9] = "";
    for (int i = 0; i < 8; i++)
        have[i] = locked(i < 4 ? 100 + i : 196 + i) ? '1' : '0';
    assert_string_equal(have, expect);
}

static void the_bytes_are_those_of_qemu(void **state)
{
    (void)state;
    struct dr_file *f;
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    assert_locks("10000101");
    assert_int_equal(dr_file_upgrade(f, NULL), 0);
    assert_locks("11010101");
    assert_int_equal(dr_file_downgrade(f, NULL), 0);
    assert_locks("10000101");
    dr_file_unref(f);
    assert_locks("00000000");
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_FORCE_SHARE, &f, NULL), 0);
    assert_locks("10000000");
    struct dr_file *r;
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &r, NULL), 0);
    assert_locks("10000101");
    dr_file_unref(r);
    dr_file_unref(f);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR | DR_FILE_NO_LOCK, &f, NULL),
                     0);
    assert_locks("00000000");
    dr_file_unref(f);
}

static void an_upgrade_fails_while_another_process_reads(void **state)
{
    (void)state;
    struct other o;
    struct dr_file *f;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    assert_true(other_opens(&o, 0));
    assert_int_equal(dr_file_upgrade(f, &err), -EBUSY);
    assert_non_null(strstr(err.text, "Failed to get \"write\" lock"));
    other_ends(&o);
    /* Still a reader with a reader's rights. */
    assert_locks("10000101");
    assert_int_equal(dr_file_pwrite(f, "x", 0, 1, NULL), -EBADF);
    assert_false(other_opens(&o, DR_FILE_RDWR));
    other_ends(&o);
    assert_int_equal(dr_file_upgrade(f, NULL), 0);
    assert_int_equal(dr_file_pwrite(f, "x", 0, 1, NULL), 0);
    assert_false(other_opens(&o, 0));
    other_ends(&o);
    dr_file_unref(f);
}

static void a_writer_over_a_shared_read_is_seen_outside(void **state)
{
    (void)state;
    struct other o;
    struct dr_file *r, *w;
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_FORCE_SHARE, &r, NULL), 0);
    assert_true(other_opens(&o, DR_FILE_RDWR));
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &w, NULL), -EBUSY);
    other_ends(&o);
    assert_locks("10000000");
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &w, NULL), 0);
    assert_true(dr_file_same(r, w));
    assert_false(other_opens(&o, 0));
    other_ends(&o);
    dr_file_unref(r);
    dr_file_unref(w);
    assert_locks("00000000");
}

/* The bytes are those of the users that are left, in whatever order they leave. */
static void locks_go_with_their_user(void **state)
{
    (void)state;
    static const struct {
        unsigned first, second;
        const char *first_leaves, *second_leaves;
    } cases[] = {
        {DR_FILE_FORCE_SHARE, DR_FILE_RDWR, "11010101", "10000000"},
        {DR_FILE_RDWR, DR_FILE_FORCE_SHARE, "10000000", "11010101"},
        {DR_FILE_FORCE_SHARE, 0, "10000101", "10000000"},
        {DR_FILE_NO_LOCK, DR_FILE_RDWR, "11010101", "00000000"},
        {DR_FILE_NO_LOCK, DR_FILE_FORCE_SHARE, "10000000", "00000000"},
        {DR_FILE_RDWR | DR_FILE_NO_LOCK, 0, "10000101", "00000000"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct dr_file *f[2];
        for (int leaves = 0; leaves < 2; leaves++) {
            assert_int_equal(dr_file_open(dr_fs_posix(), path, cases[i].first, &f[0], NULL), 0);
            assert_int_equal(dr_file_open(dr_fs_posix(), path, cases[i].second, &f[1], NULL), 0);
            dr_file_unref(f[leaves]);
            assert_locks(leaves ? cases[i].second_leaves : cases[i].first_leaves);
            dr_file_unref(f[!leaves]);
            assert_locks("00000000");
        }
    }
}

static void an_upgrade_follows_the_file_not_its_name(void **state)
{
    (void)state;
    struct dr_file *f, *g;
    char moved[64];
    snprintf(moved, sizeof(moved), "%s.old", path);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    assert_int_equal(rename(path, moved), 0);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_CREATE, &g, NULL), 0);
    assert_int_equal(dr_file_upgrade(f, NULL), 0);
    assert_int_equal(dr_file_pwrite(f, "x", 0, 1, NULL), 0);
    assert_int_equal(dr_file_refresh_size(g, NULL), 0);
    assert_int_equal(dr_file_size(g), 0);
    dr_file_unref(f);
    dr_file_unref(g);
    unlink(moved);
}

/* ------------------------------------------------------------------ at every instant */

static void (*between)(void); /* called after each change of a lock */
static int lock_error;        /* what setting a lock fails with */

/* In the place of the C library's. */
int fcntl(int fd, int cmd, ...)
{
    va_list ap;
    va_start(ap, cmd);
    void *arg = va_arg(ap, void *);
    va_end(ap);
    if (cmd == F_OFD_SETLK && lock_error) {
        errno = lock_error;
        return -1;
    }
    int r = (int)syscall(SYS_fcntl, fd, cmd, arg);
    if (cmd == F_OFD_SETLK && between) {
        void (*call)(void) = between;
        between = NULL;
        call();
        between = call;
    }
    return r;
}

static int lock_changes, writers_let_in;

static void set_byte(int fd, off_t byte)
{
    struct flock fl = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_SETLK, &fl), 0);
}

static bool held(int fd, off_t byte)
{
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_GETLK, &fl), 0);
    return fl.l_type != F_UNLCK;
}

/* A writer who takes his bytes, looks, and goes again at once if there is anybody. */
static void a_writer_comes(void)
{
    static const off_t own[] = {100, 101, 103, 201, 203}, others[] = {201, 203, 101, 103};
    int fd = open(path, O_RDWR | O_CLOEXEC);
    bool refused = false;
    for (size_t i = 0; i < sizeof(own) / sizeof(own[0]); i++)
        set_byte(fd, own[i]);
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        refused |= held(fd, others[i]);
    lock_changes++;
    writers_let_in += !refused;
    close(fd);
}

static void no_writer_gets_between_reader_and_writer(void **state)
{
    (void)state;
    struct other o;
    struct dr_file *f;
    lock_changes = writers_let_in = 0;
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    between = a_writer_comes;
    assert_int_equal(dr_file_upgrade(f, NULL), 0);
    assert_int_equal(dr_file_downgrade(f, NULL), 0);
    between = NULL;
    assert_true(other_opens(&o, 0));
    between = a_writer_comes;
    assert_int_equal(dr_file_upgrade(f, NULL), -EBUSY);
    between = NULL;
    other_ends(&o);
    assert_locks("10000101");
    assert_true(lock_changes > 10);
    assert_int_equal(writers_let_in, 0);
    dr_file_unref(f);
}

static void where_nothing_can_be_locked_reading_is_allowed_and_writing_is_not(void **state)
{
    (void)state;
    static const struct {
        int error;
        bool lacks_locks;
    } table[] = {{ENOLCK, true},  {EOPNOTSUPP, true}, {EINVAL, true}, {ENOSYS, true},
                 {EAGAIN, false}, {EACCES, false},    {EIO, false},   {EDEADLK, false}};
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        struct dr_file *f = NULL;
        int error = table[i].error;
        lock_error = error;
        int reading = dr_file_open(dr_fs_posix(), path, 0, &f, NULL);
        if (reading == 0)
            dr_file_unref(f);
        int writing = dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &f, NULL);
        int unlocked = dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR | DR_FILE_NO_LOCK, &f, NULL);
        if (unlocked == 0)
            dr_file_unref(f);
        lock_error = 0;
        assert_int_equal(reading, table[i].lacks_locks ? 0 : -error);
        assert_int_equal(writing, table[i].lacks_locks ? -ENOLCK : -error);
        assert_int_equal(unlocked, 0);
    }
}

/* ------------------------------------------------------------------ drover and qemu */

static void we_keep_qemu_out(void **state)
{
    (void)state;
    char said[1024];
    struct dr_file *f;
    if (!qemu_makes_the_image())
        skip();
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &f, NULL), 0);
    qemu_tries("", "write 0 512", said, sizeof(said));
    assert_non_null(strstr(said, "Failed to get \"write\" lock"));
    qemu_tries("-r", "read 0 512", said, sizeof(said));
    assert_non_null(strstr(said, "Failed to get shared \"write\" lock"));
    qemu_tries("-r -U", "read 0 512", said, sizeof(said));
    assert_string_equal(said, "");
    dr_file_unref(f);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    qemu_tries("", "write 0 512", said, sizeof(said));
    assert_non_null(strstr(said, "Failed to get \"write\" lock"));
    qemu_tries("-r", "read 0 512", said, sizeof(said));
    assert_string_equal(said, "");
    dr_file_unref(f);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_FORCE_SHARE, &f, NULL), 0);
    qemu_tries("", "write 0 512", said, sizeof(said));
    assert_string_equal(said, "");
    dr_file_unref(f);
    qemu_tries("", "write 0 512", said, sizeof(said));
    assert_string_equal(said, "");
}

static void qemu_keeps_us_out(void **state)
{
    (void)state;
    struct other o;
    struct dr_file *f;
    struct dr_error err = DR_ERROR_INIT;
    if (!qemu_makes_the_image())
        skip();
    qemu_opens(&o, "--cache=writeback"); /* a writer */
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &f, &err), -EBUSY);
    assert_non_null(strstr(err.text, "Failed to get \"write\" lock"));
    dr_error_reset(&err);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, &err), -EBUSY);
    assert_non_null(strstr(err.text, "Failed to get shared \"write\" lock"));
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_FORCE_SHARE, &f, NULL), 0);
    dr_file_unref(f);
    other_ends(&o);
    qemu_opens(&o, "-r");
    dr_error_reset(&err);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, DR_FILE_RDWR, &f, NULL), -EBUSY);
    assert_int_equal(dr_file_open(dr_fs_posix(), path, 0, &f, NULL), 0);
    assert_int_equal(dr_file_upgrade(f, NULL), -EBUSY);
    dr_file_unref(f);
    other_ends(&o);
}

int main(int argc, char **argv)
{
    if (argc == 3)
        return child_life(argv[1], argv[2]);
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(two_processes_exclude_each_other),
        T(the_bytes_are_those_of_qemu),
        T(an_upgrade_fails_while_another_process_reads),
        T(a_writer_over_a_shared_read_is_seen_outside),
        T(locks_go_with_their_user),
        T(an_upgrade_follows_the_file_not_its_name),
        T(no_writer_gets_between_reader_and_writer),
        T(where_nothing_can_be_locked_reading_is_allowed_and_writing_is_not),
        T(we_keep_qemu_out),
        T(qemu_keeps_us_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
