/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Leftovers of images that were being made when the process was killed: nothing is finished over,
 * removed from or taken from anybody else. On the system's own files. */
#include "test-ops.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/rename.h"
#include "core/aside.h"
#include "faultfs.h"

#define SIZE (2 * MiB)

static int enter_dir(void **state)
{
    static char dir[64];
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof(dir), "%.40s/drover-left-XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(dir) || chdir(dir) != 0)
        return -1;
    *state = dir;
    return 0;
}

static int leave_dir(void **state)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf '%s'", (const char *)*state);
    return chdir("/") == 0 && system(command) == 0 ? 0 : -1;
}

static bool is_there(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

/* A new split image as a kill leaves it between the extents and the main file. The names stand in
 * the descriptor, so the files can be made where they are and moved by hand. */
static void half_moved(const char *stem)
{
    char name[64], extent[80], dir[100], inside[200];
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    snprintf(name, sizeof(name), "%s.vmdk", stem);
    snprintf(extent, sizeof(extent), "%s-s001.vmdk", stem);
    snprintf(dir, sizeof(dir), ".%s.drover.new-abc123", name);
    snprintf(inside, sizeof(inside), "%s/%s", dir, name);
    bool old = is_there(name);
    if (old)
        assert_int_equal(rename(name, "put-by"), 0);
    ok(dr_create_fs(dr_fs_posix(), name, &o, &err));
    assert_int_equal(mkdir(dir, 0700), 0);
    assert_int_equal(rename(name, inside), 0);
    if (old)
        assert_int_equal(rename("put-by", name), 0);
}

static int recover(const char *path, unsigned *found, struct dr_error *err)
{
    return dr_recover_fs(dr_fs_posix(), path, NULL, false, NULL, NULL, found, err);
}

static void an_image_that_was_usable_since_is_not_replaced(void **state)
{
    (void)state;
    unsigned found = 0;
    uint64_t size;
    make(dr_fs_posix(), "d.vmdk", "vmdk", MiB, NULL);
    half_moved("d");
    put(dr_fs_posix(), "d.vmdk", 0, 4096, 0x77); /* the machine goes on with the old image */
    refused(recover("d.vmdk", &found, &err), ENOTEMPTY, "drover.new-abc123");
    uint8_t *all = view(dr_fs_posix(), "d.vmdk", &size);
    assert_int_equal(size, MiB);
    assert_int_equal(all[0], 0x77);
    free(all);
    /* The person decides for the new one. */
    assert_int_equal(unlink("d.vmdk"), 0);
    ok(recover("d.vmdk", &found, &err));
    free(view(dr_fs_posix(), "d.vmdk", &size));
    assert_int_equal(size, SIZE);
}

static void another_disk_of_a_like_name_is_left_alone(void **state)
{
    (void)state;
    unsigned found = 0;
    make(dr_fs_posix(), "vm-100-disk-0.vmdk", "vmdk", MiB, NULL);
    half_moved("vm-101-disk-0");
    ok(recover("vm-100-disk-0.vmdk", &found, &err));
    assert_int_equal(found, 0);
    assert_true(is_there(".vm-101-disk-0.vmdk.drover.new-abc123/vm-101-disk-0.vmdk"));
    ok(recover("vm-101-disk-0.vmdk", &found, &err));
    assert_int_equal(found, 1);
    assert_true(is_there("vm-101-disk-0.vmdk"));
}

static void snapshots_of_a_disk_are_of_its_family(void **state)
{
    (void)state;
    unsigned found = 0;
    make(dr_fs_posix(), "a.b.vmdk", "vmdk", MiB, NULL);
    half_moved("a.b-000002");
    half_moved("a");
    ok(recover("a.b.vmdk", &found, &err));
    assert_int_equal(found, 1);
    assert_true(is_there("a.b-000002.vmdk"));
    assert_false(is_there("a.vmdk"));
}

/* A file that replaces another one, as a kill leaves it; *name is where it stands. */
static void half_written(const char *of, char *name, size_t room)
{
    CLEANUP_FREE char *aside = dr_aside_name(of, DR_ASIDE_FILE);
    snprintf(name, room, "%s", aside);
    int fd = open(name, O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    close(fd);
}

static void a_file_is_removed_only_where_its_name_is_of_the_family(void **state)
{
    (void)state;
    static const struct {
        const char *of;
        bool ours;
    } files[] = {
        {"disk.vmdk", true},         {"disk-000001.vmdk", true},   {"disk-000001-s002.vmdk", true},
        {"disk-s001.vmdk", true},    {"disk-flat.vmdk", true},     {"disk2.vmdk", false},
        {"disk-abcdef.vmdk", false}, {"diskX000001.vmdk", false},  {"disk-00001.vmdk", false},
        {"disk-s01.vmdk", false},    {"disk-000001x.vmdk", false},
    };
    make(dr_fs_posix(), "disk.vmdk", "vmdk", MiB, NULL);
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        char name[NAME_MAX + 1];
        unsigned found = 0;
        half_written(files[i].of, name, sizeof(name));
        ok(recover("disk.vmdk", &found, &err));
        if (found != files[i].ours || is_there(name) == files[i].ours)
            fail_msg("%s: found %u", files[i].of, found);
        unlink(name);
    }
}

/* Then its beginning alone does not tell whose it is, and no file of that name is there yet. */
static void a_file_beside_an_image_of_a_long_name_is_known_by_the_whole_name(void **state)
{
    (void)state;
    char image[230], beside[NAME_MAX + 1], name[NAME_MAX + 1];
    unsigned found = 0;
    memset(image, 'x', sizeof(image));
    snprintf(image + sizeof(image) - 5, 5, ".raw");
    make(dr_fs_posix(), image, "raw", MiB, NULL);
    snprintf(beside, sizeof(beside), "%s%s", image, DR_BITMAP_FILE_SUFFIX);
    half_written(beside, name, sizeof(name));
    assert_non_null(strstr(name, ".drover~"));
    ok(recover(image, &found, &err));
    assert_int_equal(found, 1);
    assert_false(is_there(name));
}

/* Without renames that never replace, a name is taken by a second link; then the first one goes. */
static void a_second_link_is_no_other_file(void **state)
{
    (void)state;
    int fd = open("from", O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(link("from", "to"), 0);
    assert_int_equal(dr_rename_new(AT_FDCWD, "from", AT_FDCWD, "to"), 0);
    assert_false(is_there("from"));
    assert_true(is_there("to"));
    fd = open("from", O_CREAT | O_WRONLY, 0600);
    close(fd);
    assert_int_equal(dr_rename_new(AT_FDCWD, "from", AT_FDCWD, "to"), -EEXIST);
    assert_true(is_there("from"));
}

static void a_published_image_whose_first_link_is_left_stays_as_it_is(void **state)
{
    (void)state;
    unsigned found = 0;
    uint64_t size;
    half_moved("d");
    const char *dir = ".d.vmdk.drover.new-abc123", *inside = ".d.vmdk.drover.new-abc123/d.vmdk";
    assert_int_equal(link(inside, "d.vmdk"), 0);
    ok(recover("d.vmdk", &found, &err));
    assert_int_equal(found, 1);
    assert_false(is_there(dir));
    free(view(dr_fs_posix(), "d.vmdk", &size));
    assert_int_equal(size, SIZE);
}

/* The attempt that was killed had one file, so d-s001.vmdk is not from it. */
static void an_extent_that_no_leftover_names_is_somebody_elses(void **state)
{
    (void)state;
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    make(dr_fs_posix(), "x.vmdk", "vmdk", MiB, NULL);
    assert_int_equal(mkdir(".d.vmdk.drover.new-abc123", 0700), 0);
    assert_int_equal(rename("x.vmdk", ".d.vmdk.drover.new-abc123/d.vmdk"), 0);
    int fd = open("d-s001.vmdk", O_CREAT | O_WRONLY, 0600);
    assert_int_equal(write(fd, "mine", 4), 4);
    /* In use, so that the attempt is not taken for dead and removed before. */
    o.flags = DR_OPEN_NO_LOCK;
    refused(dr_create_fs(dr_fs_posix(), "d.vmdk", &o, &err), EEXIST, "d-s001.vmdk");
    close(fd);
    struct stat st;
    assert_int_equal(stat("d-s001.vmdk", &st), 0);
    assert_int_equal(st.st_size, 4);
}

static int note_step(void *user, const struct faultfs_io *io)
{
    char *steps = user;
    size_t n = strlen(steps);
    if (io->kind == FAULTFS_RENAME || io->kind == FAULTFS_SYNC_DIR)
        snprintf(steps + n, 256 - n, "%s %s, ", faultfs_kind_name(io->kind),
                 dr_path_basename(io->path));
    return 0;
}

/* The process may have been killed before the names of the extents were durable. */
static void extents_are_durable_before_a_half_moved_image_is_finished(void **state)
{
    (void)state;
    struct faultfs *faults = faultfs_new(dr_fs_posix());
    char steps[256] = "";
    half_moved("d");
    faultfs_observe(faults, note_step, steps);
    ok(dr_recover_fs(faultfs_fs(faults), "d.vmdk", NULL, false, NULL, NULL, NULL, &err));
    assert_string_equal(steps, "sync_dir d.vmdk, rename d.vmdk, sync_dir d.vmdk, ");
    faultfs_free(faults);
}

static void last_line(void *user, const char *line)
{
    snprintf(user, 256, "%s", line);
}

/* What a call that fails has hidden is still there for the next attempt. */
static void a_recovery_that_fails_anywhere_says_so_and_can_be_made_again(void **state)
{
    (void)state;
    struct faultfs *faults = faultfs_new(dr_fs_posix());
    bool fired = true;
    for (uint64_t nth = 0; fired; nth++) {
        unsigned found;
        char line[256] = "";
        half_moved("d");
        faultfs_arm(faults, &(struct faultfs_plan){.nth = nth});
        int r =
            dr_recover_fs(faultfs_fs(faults), "d.vmdk", NULL, false, last_line, line, &found, NULL);
        fired = faultfs_fired(faults);
        faultfs_disarm(faults);
        assert_true(fired || r == 0);
        if (r == 0 && !is_there("d.vmdk") && !strstr(line, "left alone"))
            fail_msg("call %llu fails, and nothing is said: %s", (unsigned long long)nth, line);
        ok(recover("d.vmdk", &found, &err));
        assert_true(is_there("d.vmdk"));
        assert_int_equal(unlink("d.vmdk"), 0);
        assert_int_equal(unlink("d-s001.vmdk"), 0);
    }
    faultfs_free(faults);
}

/* ------------------------------------------------------------------ somebody is still at work */

static const struct dr_pair split = {"subformat", "twoGbMaxExtentSparse"};
static const struct dr_create_options split_image = {
    .format = "vmdk", .size = 2 * SIZE, .has_size = true, .pairs = &split, .n_pairs = 1};

static void made_but_not_moved(struct dr_new_image *n)
{
    struct dr_create_params what = {.size = 2 * SIZE};
    ok(dr_new_begin(n, dr_fs_posix(), "d.vmdk", false, 0, &err));
    ok(dr_new_create(n, dr_format_find("vmdk"), &what, &split, 1, 0, &err));
}

/* The image is complete and closed, and about to be moved. */
static void recover_leaves_an_image_alone_that_is_being_made(void **state)
{
    (void)state;
    struct dr_new_image n;
    struct dr_open_options unlocked = {.flags = DR_OPEN_NO_LOCK};
    char line[256] = "";
    unsigned found = 0;
    uint64_t size;
    make(dr_fs_posix(), "d-000001.vmdk", "vmdk", MiB, NULL); /* one of the family, to start from */
    made_but_not_moved(&n);
    for (int i = 0; i < 2; i++) {
        ok(dr_recover_fs(dr_fs_posix(), "d-000001.vmdk", i ? &unlocked : NULL, false, last_line,
                         line, &found, &err));
        assert_int_equal(found, 0);
        assert_non_null(strstr(line, "is making d.vmdk there: left alone"));
    }
    ok(dr_new_publish(&n, &err));
    free(view(dr_fs_posix(), "d.vmdk", &size));
    assert_int_equal(size, 2 * SIZE);
}

static void a_second_attempt_leaves_the_first_alone(void **state)
{
    (void)state;
    struct dr_new_image first, second;
    uint64_t size;
    made_but_not_moved(&first);
    made_but_not_moved(&second);
    ok(dr_new_publish(&first, &err));
    refused(dr_new_publish(&second, &err), EEXIST, "d-s001.vmdk");
    free(view(dr_fs_posix(), "d.vmdk", &size));
    assert_int_equal(size, 2 * SIZE);
}

static int busy_rename_new(struct dr_fs *fs, const char *from, const char *to, struct dr_error *why)
{
    (void)fs;
    if (strcmp(dr_path_basename(to), "d.vmdk") == 0) { /* its extents have been moved */
        unsigned found = 0;
        ok(recover("d.vmdk", &found, &err));
        assert_int_equal(found, 0);
        refused(dr_create_fs(dr_fs_posix(), "d.vmdk", &split_image, &err), EEXIST, "d-s001.vmdk");
    }
    return dr_fs_posix()->ops->rename_new(fs, from, to, why);
}

static void an_image_that_is_being_moved_is_left_to_its_mover(void **state)
{
    (void)state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs busy = {.ops = &ops};
    uint64_t size;
    ops.rename_new = busy_rename_new;
    ok(dr_create_fs(dr_fs_posix(), "d.vmdk", &split_image,
                    &err)); /* the old main file goes aside */
    put(dr_fs_posix(), "d.vmdk", 0, 4096, 0x77);
    ok(dr_create_fs(&busy, "d.vmdk", &split_image, &err));
    uint8_t *all = view(dr_fs_posix(), "d.vmdk", &size);
    assert_int_equal(all[0], 0);
    free(all);
}

static void what_a_killed_process_was_making_is_removed(void **state)
{
    (void)state;
    unsigned found = 0;
    int status;
    make(dr_fs_posix(), "d-000001.vmdk", "vmdk", MiB, NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct dr_new_image n;
        made_but_not_moved(&n);
        raise(SIGKILL);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    ok(recover("d-000001.vmdk", &found, &err));
    assert_int_equal(found, 1);
    ok(recover("d-000001.vmdk", &found, &err));
    assert_int_equal(found, 0);
}

static struct dr_dir_lock *looking;

static int mkdir_under_eyes(struct dr_fs *fs, const char *path, unsigned mode, struct dr_error *err)
{
    int r = dr_fs_posix()->ops->mkdir(fs, path, mode, err);
    return r < 0 || looking ? r : dr_dir_lock(dr_fs_posix(), path, &looking, err);
}

static int mkdir_in_vain(struct dr_fs *fs, const char *path, unsigned mode, struct dr_error *err)
{
    int r = dr_fs_posix()->ops->mkdir(fs, path, mode, err);
    if (r == 0 && !looking) {
        r = dr_dir_lock(dr_fs_posix(), path, &looking, err);
        assert_int_equal(rmdir(path), 0);
    }
    return r;
}

/* Another process's recovery locks the directory, or even removes it, before its maker can. */
static void a_directory_taken_for_a_leftover_is_made_again(void **state)
{
    (void)state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs watched = {.ops = &ops};
    unsigned found = 0;
    uint64_t size;
    for (int i = 0; i < 2; i++) {
        ops.mkdir = i == 0 ? mkdir_under_eyes : mkdir_in_vain;
        ok(dr_create_fs(&watched, "d.vmdk", &split_image, &err));
        assert_non_null(looking);
        dr_dir_unlock(looking);
        looking = NULL;
        free(view(dr_fs_posix(), "d.vmdk", &size));
        ok(recover("d.vmdk", &found, &err));
        assert_int_equal(found, 0);
    }
}

/* ------------------------------------------------------------------ the way back is barred */

static unsigned renames;

static int rename_once(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    if (renames++ > 0)
        return dr_fail(err, ENOSPC, "%s: no room for names", to);
    return dr_fs_posix()->ops->rename(fs, from, to, err);
}

static int rename_new_never(struct dr_fs *fs, const char *from, const char *to,
                            struct dr_error *err)
{
    (void)fs;
    (void)from;
    return dr_fail(err, ENOSPC, "%s: no room for names", to);
}

static void an_old_image_that_cannot_go_back_is_kept(void **state)
{
    (void)state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs full = {.ops = &ops};
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    unsigned found = 0;
    uint64_t size;
    ok(dr_create_fs(dr_fs_posix(), "d.vmdk", &o, &err));
    ops.rename = rename_once; /* the old main file gets out of the way, and that is all */
    ops.rename_new = rename_new_never;
    renames = 0;
    o.size = 2 * SIZE;
    refused(dr_create_fs(&full, "d.vmdk", &o, &err), ENOSPC, "recover");
    assert_false(is_there("d.vmdk"));
    ok(recover("d.vmdk", &found, &err)); /* both were complete: the new one it is */
    free(view(dr_fs_posix(), "d.vmdk", &size));
    assert_int_equal(size, 2 * SIZE);
}

#define T(name) cmocka_unit_test_setup_teardown(name, enter_dir, leave_dir)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(an_image_that_was_usable_since_is_not_replaced),
        T(another_disk_of_a_like_name_is_left_alone),
        T(snapshots_of_a_disk_are_of_its_family),
        T(a_file_is_removed_only_where_its_name_is_of_the_family),
        T(a_file_beside_an_image_of_a_long_name_is_known_by_the_whole_name),
        T(a_second_link_is_no_other_file),
        T(a_published_image_whose_first_link_is_left_stays_as_it_is),
        T(an_extent_that_no_leftover_names_is_somebody_elses),
        T(extents_are_durable_before_a_half_moved_image_is_finished),
        T(a_recovery_that_fails_anywhere_says_so_and_can_be_made_again),
        T(recover_leaves_an_image_alone_that_is_being_made),
        T(a_second_attempt_leaves_the_first_alone),
        T(an_image_that_is_being_moved_is_left_to_its_mover),
        T(what_a_killed_process_was_making_is_removed),
        T(a_directory_taken_for_a_leftover_is_made_again),
        T(an_old_image_that_cannot_go_back_is_kept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
