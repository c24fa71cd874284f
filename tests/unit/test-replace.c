/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "core/aside.h"
#include "storage/storage.h"
#include "place.h"

static int setup(void **state)
{
    int r = setup_posix(state);
    struct place *p = *state;
    if (r == 0)
        snprintf(p->path, sizeof(p->path), "%s/disk.vmdk", p->dir);
    return r;
}

static struct dr_file *open_file(struct place *p, unsigned flags)
{
    return open_ok(p, p->path, flags);
}

static struct dr_file *make_old(struct place *p)
{
    struct dr_file *f = open_file(p, DR_FILE_CREATE);
    assert_int_equal(dr_file_pwrite(f, "old", 0, 3, NULL), 0);
    return f;
}

static int fill_new(void *user, struct dr_file *tmp, struct dr_error *err)
{
    (void)user;
    return dr_file_pwrite(tmp, "fresh", 0, 5, err);
}

static int fill_badly(void *user, struct dr_file *tmp, struct dr_error *err)
{
    (void)user;
    (void)dr_file_pwrite(tmp, "x", 0, 1, err);
    return dr_fail(err, ENOSPC, "no room");
}

static void assert_text(struct dr_file *f, const char *text)
{
    char buf[16] = "";
    assert_int_equal(dr_file_size(f), strlen(text));
    assert_int_equal(dr_file_pread(f, buf, 0, strlen(text), NULL), 0);
    assert_string_equal(buf, text);
}

static int count_name(void *user, const char *name)
{
    (void)name;
    ++*(int *)user;
    return 0;
}

static int names_in(struct place *p)
{
    int n = 0;
    assert_int_equal(p->fs->ops->list(p->fs, p->dir, count_name, &n, NULL), 0);
    return n;
}

static void the_new_file_has_the_name_and_the_old_one_stays_open(void **state)
{
    struct place *p = *state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *old = make_old(p), *fresh;
    assert_int_equal(dr_replace(p->fs, p->path, old, fill_new, NULL, &fresh, &err), 0);
    assert_text(old, "old");
    assert_text(fresh, "fresh");
    assert_string_equal(fresh->path, p->path);
    assert_int_equal(names_in(p), 1);
    assert_int_equal(dr_file_pwrite(fresh, "F", 0, 1, &err), 0);
    dr_file_unref(old);
    dr_file_unref(fresh);
    fresh = open_file(p, 0);
    assert_text(fresh, "Fresh");
    dr_file_unref(fresh);
}

static void mode_owner_and_locks_are_those_of_the_old_file(void **state)
{
    struct place *p = *state;
    struct dr_file *old = make_old(p), *fresh, *other;
    struct dr_error err = DR_ERROR_INIT;
    struct stat st;
    assert_int_equal(chmod(p->path, 0604), 0);
    if (geteuid() == 0)
        assert_int_equal(chown(p->path, 65534, 65534), 0);
    assert_int_equal(dr_replace(p->fs, p->path, old, fill_new, NULL, &fresh, &err), 0);
    assert_int_equal(stat(p->path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0604);
    if (geteuid() == 0)
        assert_int_equal(st.st_uid, 65534);
    assert_int_equal(dr_file_open(p->fs, p->path, DR_FILE_RDWR, &other, &err), -EBUSY);
    int fd = open(p->path, O_RDONLY);
    struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 201, .l_len = 1};
    assert_int_equal(fcntl(fd, F_OFD_GETLK, &fl), 0);
    assert_int_equal(fl.l_type, F_RDLCK);
    close(fd);
    dr_file_unref(old);
    dr_file_unref(fresh);
}

static mode_t mode_before_attrs;

static int look_then_copy_attrs(struct dr_fs *fs, struct dr_file *from, struct dr_file *to,
                                struct dr_error *err)
{
    struct stat st;
    mode_before_attrs = stat(to->path, &st) ? 0 : st.st_mode & 07777;
    return dr_fs_posix()->ops->copy_attrs(fs, from, to, err);
}

static int fill_and_look(void *user, struct dr_file *tmp, struct dr_error *err)
{
    struct stat st;
    *(mode_t *)user = stat(tmp->path, &st) ? 0 : st.st_mode & 07777;
    return fill_new(NULL, tmp, err);
}

static unsigned opens;

static int open_and_lose_the_first(struct dr_fs *fs, const char *path, unsigned flags,
                                   struct dr_file **file, struct dr_error *why)
{
    int r = dr_fs_posix()->ops->open(fs, path, flags, file, why);
    if (r == 0 && (flags & DR_FILE_CREATE) && opens++ == 0)
        assert_int_equal(unlink(path), 0);
    return r;
}

/* Another process's recovery looks between the making of the file and its locking. */
static void a_new_file_taken_for_a_leftover_is_made_again(void **state)
{
    struct place *p = *state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs fs = {.ops = &ops};
    ops.open = open_and_lose_the_first;
    opens = 0;
    assert_ok(dr_replace(&fs, p->path, NULL, fill_new, NULL, NULL, &err));
    assert_int_equal(opens, 2);
    assert_int_equal(access(p->path, F_OK), 0);
}

static void nobody_else_can_open_the_new_file_too_early(void **state)
{
    struct place *p = *state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs fs = {.ops = &ops};
    struct dr_file *old;
    mode_t in_fill = 0;
    ops.copy_attrs = look_then_copy_attrs;
    assert_int_equal(dr_file_open(&fs, p->path, DR_FILE_CREATE, &old, NULL), 0);
    assert_int_equal(chmod(p->path, 0400), 0);
    assert_int_equal(dr_replace(&fs, p->path, old, fill_and_look, &in_fill, NULL, NULL), 0);
    assert_int_equal(mode_before_attrs, 0600);
    assert_int_equal(in_fill, 0400);
    dr_file_unref(old);
}

static void a_failed_fill_changes_nothing(void **state)
{
    struct place *p = *state;
    struct dr_file *old = make_old(p), *fresh;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_replace(p->fs, p->path, old, fill_badly, NULL, &fresh, &err), -ENOSPC);
    assert_string_equal(err.text, "no room");
    assert_null(fresh);
    assert_int_equal(names_in(p), 1);
    dr_file_unref(old);
    old = open_file(p, 0);
    assert_text(old, "old");
    dr_file_unref(old);
}

static void somebody_elses_file_is_not_replaced(void **state)
{
    struct place *p = *state;
    struct dr_file *old = make_old(p), *theirs, *fresh;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(unlink(p->path), 0);
    theirs = open_file(p, DR_FILE_CREATE);
    assert_int_equal(dr_replace(p->fs, p->path, old, fill_new, NULL, &fresh, &err), -ESTALE);
    assert_int_equal(dr_file_size(theirs), 0);
    assert_int_equal(names_in(p), 1);
    dr_file_unref(theirs);
    dr_file_unref(old);
}

static void a_link_is_followed_not_replaced(void **state)
{
    struct place *p = *state;
    char link_path[160];
    struct stat st;
    struct dr_file *old = make_old(p), *fresh;
    struct dr_error err = DR_ERROR_INIT;
    snprintf(link_path, sizeof(link_path), "%s/link", p->dir);
    assert_int_equal(symlink("disk.vmdk", link_path), 0);
    assert_int_equal(dr_replace(p->fs, link_path, old, fill_new, NULL, &fresh, &err), 0);
    assert_int_equal(lstat(link_path, &st), 0);
    assert_true(S_ISLNK(st.st_mode));
    dr_file_unref(old);
    dr_file_unref(fresh);
    fresh = open_file(p, 0);
    assert_text(fresh, "fresh");
    dr_file_unref(fresh);
}

static void a_new_name_is_made_but_never_taken_over(void **state)
{
    struct place *p = *state;
    struct dr_file *fresh;
    struct dr_error err = DR_ERROR_INIT;
    assert_int_equal(dr_replace(p->fs, p->path, NULL, fill_new, NULL, NULL, &err), 0);
    assert_int_equal(dr_replace(p->fs, p->path, NULL, fill_new, NULL, &fresh, &err), -EEXIST);
    assert_null(fresh);
    assert_int_equal(names_in(p), 1);
    fresh = open_file(p, 0);
    assert_text(fresh, "fresh");
    dr_file_unref(fresh);
}

static int bad_sync_dir(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    (void)fs;
    return dr_fail(err, EIO, "%s: no sync", path);
}

static void a_name_that_is_not_durable_fails_later_flushes(void **state)
{
    struct place *p = *state;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_fs *mem = dr_fs_memory_new();
    const struct dr_fs_ops *good = mem->ops;
    struct dr_fs_ops bad = *good;
    (void)p;
    bad.sync_dir = bad_sync_dir;
    mem->ops = &bad;
    struct dr_file *old, *fresh;
    assert_int_equal(dr_file_open(mem, "/a", DR_FILE_CREATE, &old, &err), 0);
    assert_int_equal(dr_replace(mem, "/a", old, fill_new, NULL, &fresh, &err), -EIO);
    assert_non_null(fresh);
    assert_int_equal(dr_file_flush(fresh, &err), -EIO);
    dr_file_unref(old);
    dr_file_unref(fresh);
    mem->ops = good;
    dr_fs_memory_free(mem);
}

static int (*good_open)(struct dr_fs *fs, const char *path, unsigned flags, struct dr_file **file,
                        struct dr_error *err);

static int open_nothing_new(struct dr_fs *fs, const char *path, unsigned flags,
                            struct dr_file **file, struct dr_error *err)
{
    if (flags & DR_FILE_CREATE)
        return dr_fail(err, EACCES, "%s: a directory without write permission", path);
    return good_open(fs, path, flags, file, err);
}

static void a_try_finds_out_what_would_stop_a_replacement_and_changes_nothing(void **state)
{
    struct place *p = *state;
    struct dr_fs *mem = dr_fs_memory_new();
    const struct dr_fs_ops *good = mem->ops;
    struct dr_fs_ops bad = *good;
    struct dr_file *old = make_old(p);
    assert_int_equal(dr_replace_try(p->fs, p->path, old, NULL), 0);
    assert_int_equal(names_in(p), 1);
    assert_text(old, "old");
    dr_file_unref(old);

    assert_int_equal(dr_file_open(mem, "/a", DR_FILE_CREATE, &old, NULL), 0);
    good_open = good->open;
    bad.open = open_nothing_new;
    mem->ops = &bad;
    assert_int_equal(dr_replace_try(mem, "/a", old, NULL), -EACCES);
    bad = *good; /* a directory that may be written to, and not be opened to make that durable */
    bad.sync_dir = bad_sync_dir;
    assert_int_equal(dr_replace_try(mem, "/a", old, NULL), -EIO);
    mem->ops = good;
    dr_file_unref(old);
    dr_fs_memory_free(mem);
}

static void names_made_aside_are_known_again(void **state)
{
    (void)state;
    struct dr_aside a;
    assert_true(dr_aside_parse(".disk.vmdk.drover-a1b2c3", DR_ASIDE_FILE, &a));
    assert_true(dr_aside_is_of(&a, "disk.vmdk"));
    assert_false(dr_aside_is_of(&a, "disk.vmd"));
    assert_false(dr_aside_is_of(&a, "disk.vmdk2"));
    assert_true(dr_aside_parse("..a.drover-x.drover-000000", DR_ASIDE_FILE, &a));
    assert_true(dr_aside_is_of(&a, ".a.drover-x"));
    assert_true(dr_aside_parse(".a.drover.new-000000", DR_ASIDE_DIR, &a));
    assert_false(dr_aside_parse(".a.drover.new-000000", DR_ASIDE_FILE, &a));
    /* A name ends at its NUL, whatever stands behind it. */
    assert_false(dr_aside_parse("\0a.drover-a1b2c3", DR_ASIDE_FILE, &a));
    assert_false(dr_aside_parse(".\0a.drover-a1b2c3", DR_ASIDE_FILE, &a));
    static const char *const foreign[] = {
        "disk.vmdk",
        ".disk.vmdk.drover-a1b2c",
        ".disk.vmdk.drover-a1b2c3x",
        ".disk.vmdk.drover-A1b2c3",
        "disk.vmdk.drover-a1b2c3",
        ".disk.vmdk.drover~a1b2c3",
        ".disk.vmdk.drover~0123456789abcdegabcdef",
        ".drover-a1b2c3",
        "",
    };
    for (size_t i = 0; i < sizeof(foreign) / sizeof(foreign[0]); i++)
        if (dr_aside_parse(foreign[i], DR_ASIDE_FILE, &a))
            fail_msg("%s is taken for one of ours", foreign[i]);
}

static void long_names_are_cut_and_still_told_apart(void **state)
{
    (void)state;
    char base[NAME_MAX + 1], other[NAME_MAX + 1];
    for (size_t len = 1; len <= NAME_MAX; len++) {
        struct dr_aside a;
        memset(base, 'x', len);
        base[len] = 0;
        strcpy(other, base);
        other[len - 1] = 'y';
        char *name = dr_aside_name(base, DR_ASIDE_DIR);
        assert_non_null(name);
        assert_true(strlen(name) <= NAME_MAX);
        assert_true(dr_aside_parse(name, DR_ASIDE_DIR, &a));
        assert_true(dr_aside_is_of(&a, base));
        assert_false(dr_aside_is_of(&a, other));
        other[len - 1] = 0;
        assert_false(dr_aside_is_of(&a, other));
        free(name);
    }
}

static void a_cut_name_ends_with_a_whole_character(void **state)
{
    (void)state;
    char base[NAME_MAX + 1] = "";
    for (size_t i = 0; i + 3 <= NAME_MAX; i += 3)
        strcat(base, "\xe2\x82\xac"); /* the Euro sign */
    struct dr_aside a;
    char *name = dr_aside_name(base, DR_ASIDE_FILE);
    assert_non_null(name);
    assert_true(dr_aside_parse(name, DR_ASIDE_FILE, &a));
    assert_true(a.cut);
    assert_int_equal(a.stem_len % 3, 0);
    free(name);
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, setup, teardown_posix)
    const struct CMUnitTest tests[] = {
        T(the_new_file_has_the_name_and_the_old_one_stays_open),
        T(mode_owner_and_locks_are_those_of_the_old_file),
        T(nobody_else_can_open_the_new_file_too_early),
        T(a_new_file_taken_for_a_leftover_is_made_again),
        T(a_failed_fill_changes_nothing),
        T(somebody_elses_file_is_not_replaced),
        T(a_link_is_followed_not_replaced),
        T(a_new_name_is_made_but_never_taken_over),
        T(a_name_that_is_not_durable_fails_later_flushes),
        T(a_try_finds_out_what_would_stop_a_replacement_and_changes_nothing),
        cmocka_unit_test(names_made_aside_are_known_again),
        cmocka_unit_test(long_names_are_cut_and_still_told_apart),
        cmocka_unit_test(a_cut_name_ends_with_a_whole_character),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
