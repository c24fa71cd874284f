/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Things that only the operating system's files have: kinds, owners, modes, labels. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <grp.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "base/error.h"
#include "core/core.h"
#include "storage/storage.h"
#include "place.h"

/* ------------------------------------------------------------------ signals */

/* Stands for the C library's function: a signal interrupts so many of the next calls. */
static _Atomic int interruptions;

__attribute__((visibility("default"))) ssize_t pwrite(int fd, const void *buf, size_t n, off_t off)
{
    const struct iovec iov = {(void *)(uintptr_t)buf, n};
    if (interruptions > 0) {
        interruptions--;
        errno = EINTR;
        return -1;
    }
    return pwritev(fd, &iov, 1, off);
}

static void a_write_that_a_signal_interrupts_goes_on(void **state)
{
    struct place *p = *state;
    char got[3];
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    interruptions = 3;
    assert_ok(dr_file_pwrite(f, "abc", 0, 3, &err));
    assert_int_equal(interruptions, 0);
    assert_ok(dr_file_pread(f, got, 0, 3, &err));
    assert_memory_equal(got, "abc", 3);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ kinds and attributes */

static void things_that_are_no_files_are_refused_at_once(void **state)
{
    struct place *p = *state;
    struct dr_file *f;
    assert_fails(dr_file_open(p->fs, p->dir, 0, &f, &err), EISDIR, "is a directory");
    assert_fails(dr_file_open(p->fs, p->dir, DR_FILE_RDWR, &f, &err), EISDIR, "is a directory");
    assert_int_equal(mkfifo(p->path, 0600), 0);
    assert_fails(dr_file_open(p->fs, p->path, 0, &f, &err), EINVAL, "is a pipe");
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &f, &err), EINVAL, "is a pipe");
    assert_fails(dr_file_open(p->fs, p->path, DR_FILE_CREATE | DR_FILE_TRUNCATE, &f, &err), EINVAL,
                 "is a pipe");
    assert_fails(dr_file_open(p->fs, "/dev/zero", 0, &f, &err), EINVAL, "character device");
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    strcpy(addr.sun_path, p->other);
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(s, (struct sockaddr *)&addr, sizeof(addr)), 0);
    assert_fails(dr_file_open(p->fs, p->other, 0, &f, &err), EINVAL, "is a socket");
    close(s);
}

static void attributes_are_taken_over(void **state)
{
    struct place *p = *state;
    struct stat st;
    struct dr_file *a = open_ok(p, p->path, DR_FILE_CREATE);
    struct dr_file *b = open_ok(p, p->other, DR_FILE_CREATE | DR_FILE_PRIVATE);
    assert_int_equal(stat(p->other, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    assert_int_equal(chmod(p->path, 0640), 0);
    if (geteuid() == 0)
        assert_int_equal(chown(p->path, 65534, 12), 0);
    assert_ok(p->fs->ops->copy_attrs(p->fs, a, b, &err));
    assert_int_equal(stat(p->other, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0640);
    if (geteuid() == 0) {
        assert_int_equal(st.st_uid, 65534);
        assert_int_equal(st.st_gid, 12);
    }
    dr_file_unref(a);
    dr_file_unref(b);
}

static struct dr_file *written(struct place *p, const char *path)
{
    struct dr_file *f = open_ok(p, path, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(f, "abc", 0, 3, &err));
    return f;
}

/* Copying from another file system may be refused; copying within one goes on. */
static void a_source_elsewhere_does_not_bar_those_beside_the_target(void **state)
{
    struct place *p = *state;
    char far_path[64], got[3];
    uint64_t copied;
    snprintf(far_path, sizeof(far_path), "/dev/shm/drover-copy-%ld", (long)getpid());
    struct dr_file *dst = open_ok(p, p->path, DR_FILE_CREATE);
    struct dr_file *near = written(p, p->other), *far = written(p, far_path);
    struct dr_file *sources[] = {far, near, far, near};
    bool here = dr_file_copy(dst, 0, near, 0, 3, &copied, NULL) == 0;
    for (int i = 0; i < 4; i++) {
        assert_ok(dr_file_truncate(dst, 0, &err));
        int r = dr_file_copy(dst, 0, sources[i], 0, 3, &copied, NULL);
        if (sources[i] == near)
            assert_int_equal(r, here ? 0 : -ENOTSUP);
        else
            assert_true(r == 0 || r == -ENOTSUP);
        if (r < 0)
            continue;
        assert_int_equal(copied, 3);
        assert_ok(dr_file_pread(dst, got, 0, 3, &err));
        assert_memory_equal(got, "abc", 3);
    }
    dr_file_unref(dst);
    dr_file_unref(near);
    dr_file_unref(far);
    assert_int_equal(unlink(far_path), 0);
}

static void label_and_list_are_taken_over(void **state)
{
    struct place *p = *state;
    /* Version 2; owner rw-, user 65534 r--, group r--, mask r--, others ---. */
    static const uint8_t list[] = {
        2, 0,    0,    0,    1,    0,    6,  0, 0xff, 0xff, 0xff, 0xff, 2,    0,   4,
        0, 0xfe, 0xff, 0,    0,    4,    0,  4, 0,    0xff, 0xff, 0xff, 0xff, 16,  0,
        4, 0,    0xff, 0xff, 0xff, 0xff, 32, 0, 0,    0,    0xff, 0xff, 0xff, 0xff};
    char value[64];
    struct dr_file *a = open_ok(p, p->path, DR_FILE_CREATE);
    struct dr_file *b = open_ok(p, p->other, DR_FILE_CREATE | DR_FILE_PRIVATE);
    bool able = setxattr(p->path, "security.drover", "secret", 6, 0) == 0 &&
                setxattr(p->path, "security.ima", "hash", 4, 0) == 0 &&
                setxattr(p->path, "system.posix_acl_access", list, sizeof(list), 0) == 0;
    if (able) {
        assert_ok(p->fs->ops->copy_attrs(p->fs, a, b, &err));
        assert_int_equal(getxattr(p->other, "security.drover", value, sizeof(value)), 6);
        assert_memory_equal(value, "secret", 6);
        assert_int_equal(getxattr(p->other, "security.ima", value, sizeof(value)), -1);
        assert_int_equal(getxattr(p->other, "system.posix_acl_access", value, sizeof(value)),
                         sizeof(list));
        assert_memory_equal(value, list, sizeof(list));
    }
    dr_file_unref(a);
    dr_file_unref(b);
    if (!able)
        skip();
}

/* In a child without rights: the owner's group cannot be given, so its bits shrink to the others'.
 */
static mode_t mode_copied_by(struct place *p, uid_t user)
{
    struct stat st;
    pid_t pid = fork();
    if (pid == 0) {
        struct dr_file *a, *b;
        bool ok = setgroups(0, NULL) == 0 && setgid(user) == 0 && setuid(user) == 0 &&
                  dr_file_open(p->fs, p->path, 0, &a, NULL) == 0 &&
                  dr_file_open(p->fs, p->other, DR_FILE_CREATE | DR_FILE_PRIVATE, &b, NULL) == 0 &&
                  p->fs->ops->copy_attrs(p->fs, a, b, NULL) == 0;
        _exit(!ok);
    }
    int status = -1;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    assert_int_equal(stat(p->other, &st), 0);
    return st.st_mode & 07777;
}

static void rights_never_get_wider_for_want_of_privilege(void **state)
{
    struct place *p = *state;
    if (geteuid() != 0)
        skip();
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    assert_int_equal(chmod(p->dir, 0777), 0);
    assert_int_equal(chown(p->path, 65534, 12), 0);
    assert_int_equal(chmod(p->path, 0664), 0);
    assert_int_equal(mode_copied_by(p, 65534), 0644);
}

/* ------------------------------------------------------------------ the size */

/* Between our open and our lock another process, which had the lock, appends and goes. */
static int open_and_be_overtaken(struct dr_fs *fs, const char *path, unsigned flags,
                                 struct dr_file **file, struct dr_error *err)
{
    int r = dr_fs_posix()->ops->open(fs, path, flags, file, err);
    FILE *other = fopen(path, "a");
    fputs("appended", other);
    fclose(other);
    return r;
}

static void the_size_is_the_one_behind_the_lock(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_fs_ops ops = *p->fs->ops;
    struct dr_fs late = {.ops = &ops};
    struct dr_file *f;
    ops.open = open_and_be_overtaken;
    assert_int_equal(dr_file_open(&late, p->path, DR_FILE_RDWR, &f, NULL), 0);
    assert_int_equal(dr_file_size(f), 8);
    dr_file_unref(f);
}

/* A reader without a lock sees an old size, which a writer must not inherit. */
static void a_writer_does_not_inherit_the_size_an_onlooker_saw(void **state)
{
    struct place *p = *state;
    dr_file_unref(open_ok(p, p->path, DR_FILE_CREATE));
    struct dr_file *looks = open_ok(p, p->path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK);
    FILE *other = fopen(p->path, "a");
    fputs("appended", other);
    fclose(other);
    struct dr_file *writes = open_ok(p, p->path, DR_FILE_RDWR);
    assert_int_equal(dr_file_size(writes), 8);
    dr_file_unref(writes);
    dr_file_unref(looks);
}

/* The directory lets a stranger read whatever is made in it. */
static void what_a_directory_gives_to_new_files_is_not_taken_over(void **state)
{
    struct place *p = *state;
    struct {
        uint32_t version;
        struct {
            uint16_t tag, perm;
            uint32_t id;
        } e[5];
    } acl = {2, {{1, 6, ~0u}, {2, 6, 65534}, {4, 5, ~0u}, {16, 7, ~0u}, {32, 5, ~0u}}};
    char buf[256];
    struct stat st;
    struct dr_file *old = open_ok(p, p->path, DR_FILE_CREATE);
    assert_int_equal(chmod(p->path, 0640), 0);
    if (setxattr(p->dir, "system.posix_acl_default", &acl, sizeof(acl), 0)) {
        print_message("no access lists here\n");
        dr_file_unref(old);
        return;
    }
    struct dr_file *fresh = open_ok(p, p->other, DR_FILE_CREATE | DR_FILE_PRIVATE);
    assert_true(getxattr(p->other, "system.posix_acl_access", buf, sizeof(buf)) > 0);
    assert_ok(p->fs->ops->copy_attrs(p->fs, old, fresh, &err));
    assert_true(getxattr(p->other, "system.posix_acl_access", buf, sizeof(buf)) < 0);
    assert_int_equal(stat(p->other, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0640);
    assert_ok(p->fs->ops->copy_attrs(p->fs, fresh, old, &err)); /* to one that has none either */
    dr_file_unref(old);
    dr_file_unref(fresh);
}

/* ------------------------------------------------------------------ names that turn */

static char turn_link[128], turn_to[128];

/* The link is looked at, found good, and turned before it is followed. */
static int open_turned(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                       struct dr_error *err)
{
    if (strcmp(path, turn_link) == 0) {
        unlink(turn_link);
        if (symlink(turn_to, turn_link))
            return -EIO;
    }
    return dr_fs_posix()->ops->open(fs, path, flags, file, err);
}

static void put_text(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");
    fputs(text, f);
    fclose(f);
}

static void a_link_that_turns_outside_is_not_followed(void **state)
{
    struct place *p = *state;
    char inner[100], image[128], good[128];
    snprintf(inner, sizeof(inner), "%s/inner", p->dir);
    snprintf(image, sizeof(image), "%s/d.vmdk", inner);
    snprintf(good, sizeof(good), "%s/good", inner);
    snprintf(turn_link, sizeof(turn_link), "%s/link", inner);
    snprintf(turn_to, sizeof(turn_to), "%s/secret", p->dir);
    assert_int_equal(mkdir(inner, 0700), 0);
    char sector[513];
    memset(sector, 'x', 512);
    sector[512] = 0;
    put_text(good, sector);
    put_text(turn_to, sector);
    put_text(image, "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
                    "createType=\"monolithicFlat\"\nRW 1 FLAT \"link\" 0\n");
    assert_int_equal(symlink(good, turn_link), 0);
    struct dr_fs_ops ops = *p->fs->ops;
    struct dr_fs turning = {.ops = &ops};
    struct dr_disk *disk = NULL;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_open_fs(&turning, image, NULL, &disk, &err), 0);
    dr_close(disk, NULL);
    ops.open = open_turned;
    assert_int_equal(dr_open_fs(&turning, image, NULL, &disk, &err), -EACCES);
    assert_non_null(strstr(err.text, "secret"));
}

/* The file is opened; before it can be locked, who had the lock has put another in its place. */
static int replacements;

static int open_and_be_replaced(struct dr_fs *fs, const char *path, unsigned flags,
                                struct dr_file **file, struct dr_error *err)
{
    char fresh[160];
    int r = dr_fs_posix()->ops->open(fs, path, flags, file, err);
    if (r == 0 && replacements-- > 0) {
        snprintf(fresh, sizeof(fresh), "%s.fresh", path);
        put_text(fresh, "fresh");
        if (rename(fresh, path))
            return -EIO;
    }
    return r;
}

static void what_gets_locked_is_what_the_name_leads_to(void **state)
{
    struct place *p = *state;
    struct dr_fs_ops ops = *p->fs->ops;
    struct dr_fs race = {.ops = &ops};
    struct dr_file *f;
    ops.open = open_and_be_replaced;
    static const unsigned ways[] = {0, DR_FILE_RDWR, DR_FILE_CREATE | DR_FILE_TRUNCATE};
    for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
        struct stat st;
        put_text(p->path, "old");
        replacements = 2;
        assert_ok(dr_file_open(&race, p->path, ways[i], &f, &err));
        assert_int_equal(stat(p->path, &st), 0);
        assert_int_equal(f->id.ino, st.st_ino);
        assert_int_equal(dr_file_size(f), ways[i] & DR_FILE_TRUNCATE ? 0 : 5);
        dr_file_unref(f);
    }
    replacements = 1000;
    assert_fails(dr_file_open(&race, p->path, DR_FILE_RDWR, &f, &err), EBUSY, "being replaced");
    replacements = 1;
    unlink(p->path);
    assert_fails(dr_file_open(&race, p->path, DR_FILE_CREATE, &f, &err), ESTALE, "taken away");
    replacements = 1; /* who only looks on looks at either */
    assert_ok(dr_file_open(&race, p->path, DR_FILE_NO_LOCK, &f, &err));
    dr_file_unref(f);
}

static void a_file_system_that_counts_no_blocks_is_not_full(void **state)
{
    struct place *p = *state;
    uint64_t space;
    assert_ok(p->fs->ops->free_space(p->fs, "/proc/self/status", &space, &err));
    assert_int_equal(space, UINT64_MAX);
}

/* A parent on a medium that nobody can write: its file system knows no flush. */
static void where_nothing_can_be_flushed_all_is_durable(void **state)
{
    struct place *p = *state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f = open_ok(p, "/proc/sys/kernel/ostype", DR_FILE_NO_LOCK);
    f->dirty = true;
    if (dr_file_flush(f, &err) < 0)
        fail_msg("%s", err.text);
    dr_file_unref(f);
}

/* Calls of this thread that write, or -1 where the kernel does not count them. */
static long count_write_calls(void)
{
    FILE *f = fopen("/proc/thread-self/io", "re");
    long n = -1;
    char line[64];
    while (f && n < 0 && fgets(line, sizeof(line), f))
        if (sscanf(line, "syscw: %ld", &n) != 1)
            n = -1;
    if (f)
        fclose(f);
    return n;
}

/* Three buffers whose edges are not those of the pieces, 1 MiB in all. */
static void on_ext4_a_large_write_goes_in_pieces_and_a_durable_one_whole(void **state)
{
    struct place *p = *state;
    static uint8_t wrote[1 << 20], read[1 << 20];
    const size_t edge = 100000, off = 5 << 10;
    for (size_t i = 0; i < sizeof(wrote); i++)
        wrote[i] = (uint8_t)(i * 7 + i / 251);
    struct dr_file *f = open_ok(p, p->path, DR_FILE_CREATE);
    struct statfs fs;
    assert_int_equal(statfs(p->path, &fs), 0);
    bool ext4 = fs.f_type == EXT4_SUPER_MAGIC;
    for (int durable = 0; durable < 2; durable++) {
        struct iovec iov[] = {
            {wrote, 1}, {wrote + 1, edge - 1}, {wrote + edge, sizeof(wrote) - edge}};
        long before = count_write_calls();
        if (durable)
            assert_ok(dr_file_pwritev_durable(f, iov, 3, off, &err));
        else
            assert_ok(dr_file_pwritev(f, iov, 3, off, &err));
        long calls = count_write_calls() - before;
        assert_ok(dr_file_pread(f, read, off, sizeof(read), &err));
        assert_memory_equal(read, wrote, sizeof(read));
        memset(read, 0, sizeof(read));
        if (before >= 0 && !durable)
            assert_int_equal(calls, ext4 ? 9 : 1); /* the edges are inside pieces of 128 KiB */
        else if (before >= 0)
            assert_true(calls == 1 || calls == 2); /* 2: this file system has no RWF_DSYNC */
        assert_ok(dr_file_flush(f, &err));         /* until then a new file has no durable writes */
    }
    dr_file_unref(f);
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup_posix, teardown_posix)
    const struct CMUnitTest tests[] = {
        T(a_write_that_a_signal_interrupts_goes_on),
        T(things_that_are_no_files_are_refused_at_once),
        T(attributes_are_taken_over),
        T(a_source_elsewhere_does_not_bar_those_beside_the_target),
        T(label_and_list_are_taken_over),
        T(rights_never_get_wider_for_want_of_privilege),
        T(what_a_directory_gives_to_new_files_is_not_taken_over),
        T(the_size_is_the_one_behind_the_lock),
        T(a_file_system_that_counts_no_blocks_is_not_full),
        T(where_nothing_can_be_flushed_all_is_durable),
        T(on_ext4_a_large_write_goes_in_pieces_and_a_durable_one_whole),
        T(a_link_that_turns_outside_is_not_followed),
        T(what_gets_locked_is_what_the_name_leads_to),
        T(a_writer_does_not_inherit_the_size_an_onlooker_saw),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
