/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* snapshot, tree, recover: in memory and on the system's files. */
#include "faultfs.h"
#include "formats/vmdk/vmdk.h"
#include "test-ops.h"

#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE (2 * MiB)

static int system_dir(void **state)
{
    static char dir[64];
    const char *base = getenv("TMPDIR");
    snprintf(dir, sizeof(dir), "%.40s/drover-ops-XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(dir) || chdir(dir) != 0)
        return -1;
    *state = dr_fs_posix();
    return 0;
}

static int remove_system_dir(void **state)
{
    char cwd[4096];
    char **names;
    size_t n;
    struct dr_fs *fs = *state;
    if (!getcwd(cwd, sizeof(cwd)) || dr_ops_list(fs, ".", &names, &n, NULL) < 0)
        return -1;
    for (size_t i = 0; i < n; i++)
        if (unlink(names[i]) != 0 && rmdir(names[i]) != 0)
            return -1;
    dr_ops_free_names(names, n);
    return chdir("/") == 0 && rmdir(cwd) == 0 ? 0 : -1;
}

static char *snapshot(struct dr_fs *fs, const char *path, const char *name)
{
    char *active = NULL;
    ok(dr_snapshot_create_fs(fs, path, name, NULL, &active, &err));
    return active;
}

static void expect_snapshot(struct dr_fs *fs, const char *path, const char *want)
{
    char *active = snapshot(fs, path, NULL);
    assert_string_equal(active, want);
    free(active);
}

static void names_are_as_vmware_gives_them(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    size_t len, again;
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL);
    put(fs, "disk.vmdk", 0, MiB, 0x11);
    uint8_t *want = view(fs, "disk.vmdk", &size);
    uint8_t *before = file_bytes(fs, "disk.vmdk", &len);
    expect_snapshot(fs, "disk.vmdk", "disk-000001.vmdk");
    expect_snapshot(fs, "disk-000001.vmdk", "disk-000002.vmdk");
    expect_snapshot(fs, "disk.vmdk", "disk-000003.vmdk");
    ok(fs->ops->unlink(fs, "disk-000002.vmdk", &err));
    expect_snapshot(fs, "disk-000003.vmdk", "disk-000002.vmdk"); /* numbers are used again */
    make(fs, "disk-000004-s001.vmdk", "raw", MiB, NULL);
    expect_snapshot(fs, "disk-000002.vmdk", "disk-000005.vmdk"); /* files of others are kept */
    same_view(fs, "disk-000005.vmdk", want, size);
    uint8_t *after = file_bytes(fs, "disk.vmdk", &again);
    assert_int_equal(len, again); /* the parent is untouched */
    assert_memory_equal(before, after, len);
    free(before);
    free(after);
    free(want);
}

static void given_names_never_clobber(void **state)
{
    struct dr_fs *fs = *state;
    char *active = NULL;
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL);
    make(fs, "taken.vmdk", "vmdk", SIZE, NULL);
    refused(dr_snapshot_create_fs(fs, "disk.vmdk", "taken.vmdk", NULL, &active, &err), EEXIST,
            "taken.vmdk");
    refused(dr_snapshot_create_fs(fs, "disk.vmdk", "disk.vmdk", NULL, &active, &err), EEXIST,
            "disk.vmdk");
    refused(dr_snapshot_create_fs(fs, "disk.vmdk", "../x.vmdk", NULL, &active, &err), EINVAL,
            "plain file name");
    active = snapshot(fs, "disk.vmdk", "before-upgrade.vmdk");
    assert_string_equal(active, "before-upgrade.vmdk");
    free(active);
    make(fs, "flat.img", "raw", SIZE, NULL);
    refused(dr_snapshot_create_fs(fs, "flat.img", NULL, NULL, &active, &err), ENOTSUP, "snapshots");
}

/* Somebody makes a file of the name in the last moment. */
static const char *last_moment;

static void intrude(const char *to)
{
    if (!last_moment || strcmp(to, last_moment) != 0)
        return;
    FILE *f = fopen(to, "w");
    assert_non_null(f);
    assert_int_equal(fprintf(f, "theirs"), 6);
    fclose(f);
}

static int late_rename(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    intrude(to);
    return dr_fs_posix()->ops->rename(fs, from, to, err);
}

static int late_rename_new(struct dr_fs *fs, const char *from, const char *to, struct dr_error *err)
{
    intrude(to);
    return dr_fs_posix()->ops->rename_new(fs, from, to, err);
}

static void expect_theirs(struct dr_fs *fs, const char *path, size_t files)
{
    size_t len;
    uint8_t *bytes = file_bytes(fs, path, &len);
    assert_int_equal(len, 6);
    assert_memory_equal(bytes, "theirs", 6);
    free(bytes);
    assert_int_equal(count_files(fs), files); /* and nothing half made is left */
    ok(fs->ops->unlink(fs, path, &err));
}

static void what_somebody_made_meanwhile_is_his(void **state)
{
    (void)state;
    struct dr_fs_ops ops = *dr_fs_posix()->ops;
    struct dr_fs race = {.ops = &ops}, *fs = &race;
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    char *active = NULL;
    ok(dr_create_fs(fs, "disk.vmdk", &o, &err)); /* two files */
    ops.rename = late_rename;
    ops.rename_new = late_rename_new;
    last_moment = "s.vmdk";
    refused(dr_snapshot_create_fs(fs, "disk.vmdk", "s.vmdk", NULL, &active, &err), EEXIST,
            "s.vmdk: exists by now");
    expect_theirs(fs, "s.vmdk", 3);
    last_moment = "s-s001.vmdk";
    refused(dr_snapshot_create_fs(fs, "disk.vmdk", "s.vmdk", NULL, &active, &err), EEXIST,
            "s-s001.vmdk: exists by now");
    expect_theirs(fs, "s-s001.vmdk", 3);
    last_moment = "new.vmdk";
    refused(dr_create_fs(fs, "new.vmdk", &o, &err), EEXIST, "new.vmdk: exists by now");
    expect_theirs(fs, "new.vmdk", 3);
    last_moment = NULL;
    assert_int_equal(symlink("nowhere", "link.vmdk"), 0); /* nothing of anybody's is lost there */
    ok(dr_create_fs(fs, "link.vmdk", &o, &err));
    assert_true(exists(fs, "link.vmdk"));
}

static void edit(struct dr_fs *fs, const char *path, const char *key, const char *value)
{
    struct dr_image *image;
    struct vmdk_desc d;
    ok(dr_image_open(fs, path, NULL, DR_OPEN_RDWR | DR_OPEN_NO_BACKING, &image, &err));
    ok(vmdk_desc_copy(image, &d, &err));
    ok(value ? vmdk_desc_set(&d, key, value, true, NULL, &err) : vmdk_desc_remove(&d, key, &err));
    ok(vmdk_store(image, &d, 0, &err));
    ok(dr_image_unref(image, &err));
}

/* VMware's children say nothing of the adapter. */
static void what_the_parent_leaves_to_its_own_is_taken_from_there(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_image *image;
    make(fs, "base.vmdk", "vmdk", MiB, NULL);
    edit(fs, "base.vmdk", "ddb.adapterType", "lsilogic");
    make(fs, "mid.vmdk", "vmdk", 0, "base.vmdk");
    edit(fs, "mid.vmdk", "ddb.adapterType", NULL);
    edit(fs, "mid.vmdk", "ddb.virtualHWVersion", "14");
    char *active = NULL;
    ok(dr_snapshot_create_fs(fs, "mid.vmdk", "top.vmdk", NULL, &active, &err));
    free(active);
    ok(dr_image_open(fs, "top.vmdk", NULL, DR_OPEN_NO_BACKING, &image, &err));
    char *adapter = vmdk_desc_get(&vmdk_of(image)->desc, "ddb.adapterType");
    char *version = vmdk_desc_get(&vmdk_of(image)->desc, "ddb.virtualHWVersion");
    assert_string_equal(adapter, "lsilogic");
    assert_string_equal(version, "14");
    free(adapter);
    free(version);
    ok(dr_image_unref(image, &err));
}

static void child_of_a_split_disk_is_split(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    ok(dr_create_fs(fs, "disk.vmdk", &o, &err));
    put(fs, "disk.vmdk", 0, MiB, 0x11);
    expect_snapshot(fs, "disk.vmdk", "disk-000001.vmdk");
    assert_true(exists(fs, "disk-000001-s001.vmdk"));
    put(fs, "disk-000001.vmdk", 0, 64 * KiB, 0x22);
    /* an extent of the next number is somebody else's */
    make(fs, "disk-000002-s001.vmdk", "raw", MiB, NULL);
    expect_snapshot(fs, "disk-000001.vmdk", "disk-000003.vmdk");
    uint64_t size;
    uint8_t *have = view(fs, "disk-000003.vmdk", &size);
    assert_int_equal(have[0], 0x22);
    assert_int_equal(have[MiB - 1], 0x11);
    free(have);
}

static void disk_in_use_is_not_frozen(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    char *active = NULL;
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL);
    ok(dr_open_fs(fs, "disk.vmdk", &rw, &disk, &err));
    assert_true(dr_snapshot_create_fs(fs, "disk.vmdk", NULL, NULL, &active, NULL) < 0);
    ok(dr_close(disk, &err));
    assert_int_equal(count_files(fs), 1);
}

/* ------------------------------------------------------------------ tree */

static const struct dr_tree_node *find(const struct dr_tree_node *nodes, size_t n, const char *path)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(nodes[i].path, path) == 0)
            return &nodes[i];
    fail_msg("%s is not in the tree", path);
    return NULL;
}

static void tree_has_the_family_and_nobody_else(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_tree_node *nodes;
    size_t n;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", 0, "a.vmdk");
    make(fs, "c.vmdk", "vmdk", 0, "a.vmdk");
    make(fs, "d.vmdk", "vmdk", 0, "c.vmdk");
    make(fs, "0-last.vmdk", "vmdk", 0, "d.vmdk");
    make(fs, "stranger.vmdk", "vmdk", SIZE, NULL);
    make(fs, "notes.txt", "raw", 100, NULL);
    ok(dr_tree_fs(fs, "c.vmdk", NULL, &nodes, &n, &err));
    assert_int_equal(n, 5);
    assert_string_equal(nodes[0].path, "a.vmdk");
    assert_true(nodes[0].parent == SIZE_MAX);
    for (size_t i = 1; i < n; i++)
        assert_true(nodes[i].parent < i);
    assert_true(find(nodes, n, "c.vmdk")->asked);
    assert_false(find(nodes, n, "a.vmdk")->asked);
    assert_string_equal(nodes[find(nodes, n, "0-last.vmdk")->parent].path, "d.vmdk");
    assert_int_equal(find(nodes, n, "d.vmdk")->size, SIZE);
    assert_null(find(nodes, n, "d.vmdk")->problem);
    dr_tree_free(nodes, n);
}

static void tree_tells_what_does_not_open(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_tree_node *nodes;
    size_t n;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", 0, "a.vmdk");
    put(fs, "a.vmdk", 0, 512, 0x11); /* another id: b is stale */
    ok(dr_tree_fs(fs, "a.vmdk", NULL, &nodes, &n, &err));
    assert_int_equal(n, 2);
    assert_null(nodes[0].problem);
    assert_non_null(nodes[1].problem);
    assert_non_null(strstr(nodes[1].problem, "CID"));
    dr_tree_free(nodes, n);
    ok(fs->ops->unlink(fs, "a.vmdk", &err));
    ok(dr_tree_fs(fs, "b.vmdk", NULL, &nodes, &n, &err));
    assert_int_equal(n, 1);
    assert_non_null(strstr(nodes[0].problem, "a.vmdk"));
    dr_tree_free(nodes, n);
}

/* ------------------------------------------------------------------ recover */

struct lines {
    unsigned n;
    char last[512];
};

static void keep_line(void *user, const char *line)
{
    struct lines *l = user;
    l->n++;
    snprintf(l->last, sizeof(l->last), "%s", line);
}

static unsigned recover(struct dr_fs *fs, const char *path, bool dry_run, struct lines *lines)
{
    unsigned found = 0;
    *lines = (struct lines){0};
    ok(dr_recover_fs(fs, path, NULL, dry_run, keep_line, lines, &found, &err));
    assert_int_equal(found, lines->n);
    return found;
}

static void sound_disk_needs_nothing(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", 0, "a.vmdk");
    put(fs, "b.vmdk", 0, 512, 0x11);
    assert_int_equal(recover(fs, "b.vmdk", false, &lines), 0);
}

static void mkdir_in(struct dr_fs *fs, const char *path)
{
    if (fs->ops->mkdir)
        ok(fs->ops->mkdir(fs, path, 0700, &err));
}

static void half_made_image_is_removed(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    mkdir_in(fs, ".a-000001.vmdk.drover.new-abc123");
    make(fs, "x", "raw", MiB, NULL);
    ok(fs->ops->rename(fs, "x", ".a-000001.vmdk.drover.new-abc123/a-000001.vmdk", &err));
    make(fs, ".other.vmdk.drover-abc123", "raw", MiB, NULL); /* of another disk */
    make(fs, ".a.vmdk.drover-abc123", "raw", MiB, NULL);
    size_t files = count_files(fs);
    assert_int_equal(recover(fs, "a.vmdk", true, &lines), 2);
    assert_int_equal(count_files(fs), files);
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 2);
    assert_non_null(strstr(lines.last, "removed"));
    assert_false(exists(fs, ".a-000001.vmdk.drover.new-abc123/a-000001.vmdk"));
    assert_false(exists(fs, ".a.vmdk.drover-abc123"));
    assert_true(exists(fs, ".other.vmdk.drover-abc123"));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 0);
}

static void half_moved_image_is_moved_to_the_end(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    uint64_t size;
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    ok(dr_create_fs(fs, "a.vmdk", &o, &err));
    put(fs, "a.vmdk", 0, MiB, 0x11);
    mkdir_in(fs, ".a.vmdk.drover.new-abc123");
    ok(fs->ops->rename(fs, "a.vmdk", ".a.vmdk.drover.new-abc123/a.vmdk", &err));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 1);
    assert_non_null(strstr(lines.last, "finished"));
    uint8_t *have = view(fs, "a.vmdk", &size);
    assert_int_equal(have[MiB - 1], 0x11);
    free(have);
    assert_int_equal(count_files(fs), 2);
}

/* Made again before anybody recovered: what was left must not come back. */
static void half_moved_image_that_was_made_again_is_forgotten(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    uint64_t size;
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    ok(dr_create_fs(fs, "a.vmdk", &o, &err));
    put(fs, "a.vmdk", 0, MiB, 0x11);
    mkdir_in(fs, ".a.vmdk.drover.new-abc123");
    ok(fs->ops->rename(fs, "a.vmdk", ".a.vmdk.drover.new-abc123/a.vmdk", &err));
    ok(dr_create_fs(fs, "a.vmdk", &o, &err));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 0);
    uint8_t *have = view(fs, "a.vmdk", &size);
    assert_int_equal(have[0], 0);
    free(have);
    assert_int_equal(count_files(fs), 2);
}

/* A file system that has no locks. */
static int open_without_locks(struct dr_fs *fs, const char *path, unsigned flags,
                              struct dr_file **file, struct dr_error *err)
{
    if ((flags & DR_FILE_RDWR) && !(flags & DR_FILE_NO_LOCK))
        return dr_fail(err, ENOLCK, "%s: no locks here", path);
    return dr_fs_posix()->ops->open(fs, path, flags, file, err);
}

static void what_may_be_in_use_is_left_alone(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_fs_ops ops = *fs->ops;
    struct dr_fs blind = {.ops = &ops};
    struct dr_open_options unlocked = {.flags = DR_OPEN_NO_LOCK};
    unsigned found;
    ops.open = open_without_locks;
    make(fs, "disk.vmdk", "vmdk", MiB, NULL);
    make(fs, ".disk.vmdk.drover-abc123", "raw", KiB, NULL);
    ok(fs->ops->mkdir(fs, ".disk.vmdk.drover.new-abc123", 0700, &err));
    make(fs, ".disk.vmdk.drover.new-abc123/disk.vmdk", "vmdk", MiB, NULL);
    ok(dr_recover_fs(&blind, "disk.vmdk", NULL, false, NULL, NULL, &found, &err));
    assert_int_equal(found, 0);
    assert_int_equal(count_files(fs), 3);
    ok(dr_recover_fs(&blind, "disk.vmdk", &unlocked, false, NULL, NULL, &found, &err));
    assert_int_equal(found, 2);
    assert_int_equal(count_files(fs), 1);
}

static void making_an_image_again_removes_what_was_left_of_it(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    const char *dead = ".b.vmdk.drover.new-dead01/b.vmdk";
    const char *alive = ".b.vmdk.drover.new-live01/b.vmdk";
    const char *others = ".c.vmdk.drover.new-dead01/c.vmdk";
    mkdir_in(fs, ".b.vmdk.drover.new-dead01");
    mkdir_in(fs, ".b.vmdk.drover.new-live01");
    mkdir_in(fs, ".c.vmdk.drover.new-dead01");
    for (int i = 0; i < 3; i++) {
        make(fs, "x", "raw", MiB, NULL);
        ok(fs->ops->rename(fs, "x", i == 0 ? dead : i == 1 ? alive : others, &err));
    }
    ok(dr_open_fs(fs, alive, &rw, &disk, &err));
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
    assert_false(exists(fs, dead));
    assert_true(exists(fs, alive));
    assert_true(exists(fs, others));
    ok(dr_close(disk, &err));
    ok(fs->ops->unlink(fs, alive, &err));
    ok(fs->ops->unlink(fs, others, &err));
    if (fs->ops->rmdir) {
        ok(fs->ops->rmdir(fs, ".b.vmdk.drover.new-live01", &err));
        ok(fs->ops->rmdir(fs, ".c.vmdk.drover.new-dead01", &err));
    }
}

static void work_under_way_is_left_alone(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    make(fs, ".a.vmdk.drover-abc123", "raw", MiB, NULL);
    ok(dr_open_fs(fs, ".a.vmdk.drover-abc123", &rw, &disk, &err));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 0);
    assert_true(exists(fs, ".a.vmdk.drover-abc123"));
    ok(dr_close(disk, &err));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 1);
    assert_false(exists(fs, ".a.vmdk.drover-abc123"));
}

static void unclean_image_is_mended(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    struct dr_file *file;
    uint64_t size;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, MiB, 0x11);
    uint8_t *want = view(fs, "a.vmdk", &size);
    ok(dr_file_open(fs, "a.vmdk", DR_FILE_RDWR, &file, &err));
    ok(dr_file_pwrite(file, "\1", 72, 1, &err)); /* uncleanShutdown */
    dr_file_unref(file);
    assert_int_equal(recover(fs, "a.vmdk", true, &lines), 1);
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 1);
    assert_non_null(strstr(lines.last, "mended"));
    assert_int_equal(recover(fs, "a.vmdk", false, &lines), 0);
    same_view(fs, "a.vmdk", want, size);
    free(want);
}

static void replaced_file_keeps_its_mode(void **state)
{
    struct dr_fs *fs = *state;
    struct stat st;
    make(fs, "a.raw", "raw", SIZE, NULL);
    make(fs, "b.vmdk", "vmdk", SIZE, NULL);
    assert_int_equal(chmod("b.vmdk", 0600), 0);
    const char *from = "a.raw";
    struct dr_convert_options o = {.out_format = "vmdk", .sparse_size = 4096};
    ok(dr_convert_fs(fs, &from, 1, "b.vmdk", &o, NULL, &err));
    assert_int_equal(stat("b.vmdk", &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(symlink("b.vmdk", "link.vmdk"), 0);
    ok(dr_convert_fs(fs, &from, 1, "link.vmdk", &o, NULL, &err));
    assert_int_equal(lstat("link.vmdk", &st), 0);
    assert_true(S_ISLNK(st.st_mode)); /* what it leads to was replaced */
}

static void child_has_the_mode_of_its_parent(void **state)
{
    struct dr_fs *fs = *state;
    struct stat st;
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL);
    assert_int_equal(chmod("disk.vmdk", 0600), 0);
    free(snapshot(fs, "disk.vmdk", NULL));
    assert_int_equal(stat("disk-000001.vmdk", &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
}

/* ------------------------------------------------------------------ names as long as they can be
 */

static const char *stuck_name; /* this file cannot be renamed out of a private directory */

static int rename_all_but_one(struct dr_fs *fs, const char *from, const char *to,
                              struct dr_error *err)
{
    if (strcmp(dr_path_basename(to), stuck_name) == 0 &&
        strcmp(dr_path_basename(from), stuck_name) == 0)
        return dr_fail(err, EIO, "%s: stuck", to);
    return dr_fs_posix()->ops->rename(fs, from, to, err);
}

static int rename_new_all_but_one(struct dr_fs *fs, const char *from, const char *to,
                                  struct dr_error *err)
{
    if (strcmp(dr_path_basename(to), stuck_name) == 0)
        return dr_fail(err, EIO, "%s: stuck", to);
    return dr_fs_posix()->ops->rename_new(fs, from, to, err);
}

static char *long_name(const char *begin, const char *end, size_t len)
{
    char *name = malloc(len + 1);
    assert_non_null(name);
    memset(name, 'x', len);
    memcpy(name, begin, strlen(begin));
    strcpy(name + len - strlen(end), end);
    return name;
}

/* The image name is replaced by one with other extents, but its main file does not get its name. */
static void stop_before_the_main_file(struct dr_fs *fs, const char *name)
{
    struct dr_fs_ops ops = *fs->ops;
    struct dr_fs sticky = {.ops = &ops};
    struct dr_pair sub = {"subformat", "twoGbMaxExtentSparse"};
    struct dr_create_options o = {
        .format = "vmdk", .size = SIZE, .has_size = true, .pairs = &sub, .n_pairs = 1};
    ok(dr_create_fs(fs, name, &o, &err));
    put(fs, name, 0, MiB, 0x11);
    ops.rename = rename_all_but_one;
    ops.rename_new = rename_new_all_but_one;
    stuck_name = name;
    o.size = 2 * SIZE;
    refused(dr_create_fs(&sticky, name, &o, &err), EIO, "recover");
    assert_false(exists(fs, name));
}

static void remove_split(struct dr_fs *fs, const char *name)
{
    char extent[NAME_MAX + 1];
    snprintf(extent, sizeof(extent), "%.*s-s001.vmdk", (int)(strlen(name) - 5), name);
    ok(fs->ops->unlink(fs, extent, &err));
    ok(fs->ops->unlink(fs, name, &err));
}

static void recover_finishes_a_replacement_whatever_the_length_of_its_name(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    uint64_t size;
    static const size_t lengths[] = {20, 199, 200, 201, 236, 237, 250};
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL); /* recovered first, and no reason to remove others */
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        for (int neighbour = 0; neighbour < 2; neighbour++) {
            char *name = long_name("disk-000001-", ".vmdk", lengths[i]);
            stop_before_the_main_file(fs, name);
            assert_int_equal(recover(fs, neighbour ? "disk.vmdk" : name, false, &lines), 1);
            if (!exists(fs, name))
                fail_msg("%zu bytes, by %s: the image is gone: %s", lengths[i],
                         neighbour ? "a neighbour" : "its name", lines.last);
            free(view(fs, name, &size));
            assert_int_equal(size, 2 * SIZE);
            assert_int_equal(count_files(fs), 3);
            remove_split(fs, name);
            free(name);
        }
}

/* Earlier versions cut the names of such directories, and the image that is in one may be the only
 * one there is. */
static void recover_keeps_what_it_cannot_assign(void **state)
{
    struct dr_fs *fs = *state;
    char *name = long_name("disk-000001-", ".vmdk", 230), dir[NAME_MAX + 1], path[600];
    unsigned found = 0;
    make(fs, "disk.vmdk", "vmdk", SIZE, NULL);
    snprintf(dir, sizeof(dir), ".%.200s.drover.new-abc123", name);
    ok(fs->ops->mkdir(fs, dir, 0700, &err));
    make(fs, "x.vmdk", "vmdk", MiB, NULL);
    snprintf(path, sizeof(path), "%s/%s", dir, name);
    ok(fs->ops->rename(fs, "x.vmdk", path, &err));
    for (int i = 0; i < 2; i++) {
        refused(dr_recover_fs(fs, "disk.vmdk", NULL, false, NULL, NULL, &found, &err), ENOTEMPTY,
                dir);
        assert_int_equal(found, 1);
        assert_true(exists(fs, path));
        /* The second time round: the old image alone, and nothing has its name. */
        if (i == 0) {
            snprintf(dir, sizeof(dir), ".disk-000002.vmdk.drover.new-abc123");
            ok(fs->ops->mkdir(fs, dir, 0700, &err));
            char aside[600];
            snprintf(aside, sizeof(aside), "%s/.replaced", dir);
            ok(fs->ops->rename(fs, path, aside, &err));
            snprintf(path, sizeof(path), "%s", aside);
            char empty[600];
            snprintf(empty, sizeof(empty), ".%.200s.drover.new-abc123", name);
            ok(fs->ops->rmdir(fs, empty, &err));
        }
    }
    ok(fs->ops->unlink(fs, path, &err));
    ok(fs->ops->rmdir(fs, dir, &err));
    free(name);
}

static void images_may_have_the_longest_names_there_are(void **state)
{
    struct dr_fs *fs = *state;
    struct lines lines;
    char *name = long_name("disk-", ".vmdk", NAME_MAX), *child = long_name("c", ".vmdk", NAME_MAX);
    char *copy = long_name("copy", ".vmdk", NAME_MAX);
    uint64_t size;
    const char *from = name;
    struct dr_convert_options o = {.out_format = "vmdk"};
    struct dr_create_options split = {.format = "vmdk", .size = SIZE, .has_size = true};
    for (int again = 0; again < 2; again++)
        ok(dr_create_fs(fs, name, &split, &err));
    free(snapshot(fs, name, child));
    put(fs, child, 0, MiB, 0x22);
    for (int again = 0; again < 2; again++)
        ok(dr_convert_fs(fs, &from, 1, copy, &o, NULL, &err));
    free(view(fs, copy, &size));
    assert_int_equal(size, SIZE);
    assert_int_equal(recover(fs, name, false, &lines), 0);
    assert_int_equal(count_files(fs), 3);
    free(name);
    free(child);
    free(copy);
}

#define both(f)                                          \
    cmocka_unit_test_setup_teardown(f, new_fs, free_fs), \
        cmocka_unit_test_setup_teardown(f, system_dir, remove_system_dir)

/* ------------------------------------------------------------------ of an open disk */

/* When the child gets its name, somebody has written for the first time, which gives the parent
 * another id. */
struct late_writer {
    struct dr_fs *memory;
    struct dr_disk *disk;
    bool looked;
    uint32_t parent_id, recorded;
};

static int write_when_it_is_named(void *user, const struct faultfs_io *io)
{
    struct late_writer *w = user;
    struct dr_image *child = NULL;
    if (io->kind != FAULTFS_RENAME || !strstr(io->path, "-000001.vmdk"))
        return 0;
    ok(dr_pwrite(w->disk, "late", 0, 4, 0, &err));
    ok(dr_image_open(w->memory, io->path, "vmdk", DR_OPEN_NO_LOCK, &child, &err));
    struct dr_chain *chain = dr_disk_chain(w->disk);
    w->recorded = child->fmt->parent_id(child);
    w->parent_id = chain->images[0]->fmt->id(chain->images[0]);
    w->looked = true;
    dr_chain_unref(chain, NULL);
    dr_image_unref(child, NULL);
    return 0;
}

static void a_child_knows_its_parent_before_it_has_its_name(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct late_writer w = {.memory = memory};
    make(memory, "/d/d.vmdk", "vmdk", MiB, NULL);
    ok(dr_open_fs(faultfs_fs(fault), "/d/d.vmdk", &o, &w.disk, &err));
    faultfs_observe(fault, write_when_it_is_named, &w);
    ok(dr_disk_snapshot(w.disk, NULL, NULL, NULL, NULL, &err));
    faultfs_observe(fault, NULL, NULL);
    assert_true(w.looked);
    assert_int_equal(w.recorded, w.parent_id);
    ok(dr_close(w.disk, &err));
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

struct meanwhile {
    struct dr_fs *fs;
    uint64_t nth, seen;
    struct dr_file_id old; /* the disk before it goes back */
    bool made, on_old;
};

/* Somebody makes a child of the disk, if that can be done at this moment. */
static int make_a_child(void *user, const struct faultfs_io *io)
{
    struct meanwhile *m = user;
    struct dr_create_options o = {
        .format = "vmdk", .backing = "disk.vmdk", .backing_format = "vmdk"};
    struct dr_error why = DR_ERROR_INIT;
    (void)io;
    if (m->seen++ != m->nth)
        return 0;
    struct dr_file_id now;
    m->on_old = dr_name_identify(m->fs, "disk.vmdk", &now, NULL) == 0 && dr_same_id(now, m->old);
    m->made = dr_create_fs(m->fs, "child.vmdk", &o, &why) == 0;
    return 0;
}

static void a_child_made_while_a_disk_goes_back_never_shows_something_else(void **state)
{
    (void)state;
    bool more = true;
    unsigned refused_late = 0;
    for (uint64_t nth = 0; more; nth++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *fault = faultfs_new(fs);
        struct meanwhile m = {.fs = fs, .nth = nth};
        struct dr_error problem = DR_ERROR_INIT;
        uint64_t size;
        make(fs, "base.vmdk", "vmdk", SIZE, NULL);
        make(fs, "disk.vmdk", "vmdk", 0, "base.vmdk");
        put(fs, "disk.vmdk", 0, 64 * KiB, 0x22);
        uint8_t *want = view(fs, "disk.vmdk", &size);
        ok(dr_name_identify(fs, "disk.vmdk", &m.old, &err));
        faultfs_observe(fault, make_a_child, &m);
        int r = dr_snapshot_revert_fs(faultfs_fs(fault), "disk.vmdk", "base.vmdk", NULL, &problem);
        more = m.seen > nth;
        struct dr_disk *child = NULL;
        if (m.made && m.on_old && dr_open_fs(fs, "child.vmdk", NULL, &child, NULL) == 0) {
            ok(dr_close(child, &err)); /* in the last moment: it is refused, by its parent's id */
            same_view(fs, "child.vmdk", want, size);
        }
        if (r < 0)
            assert_true(m.made && r == -EBUSY);
        refused_late += r < 0 && strstr(problem.text, "child.vmdk was made on it meanwhile");
        free(want);
        faultfs_free(fault);
        dr_fs_memory_free(fs);
    }
    assert_true(refused_late > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_child_knows_its_parent_before_it_has_its_name),
        cmocka_unit_test(a_child_made_while_a_disk_goes_back_never_shows_something_else),
        both(names_are_as_vmware_gives_them),
        both(given_names_never_clobber),
        cmocka_unit_test_setup_teardown(what_somebody_made_meanwhile_is_his, system_dir,
                                        remove_system_dir),
        both(what_the_parent_leaves_to_its_own_is_taken_from_there),
        both(child_of_a_split_disk_is_split),
        both(disk_in_use_is_not_frozen),
        both(tree_has_the_family_and_nobody_else),
        both(tree_tells_what_does_not_open),
        both(sound_disk_needs_nothing),
        both(half_made_image_is_removed),
        both(half_moved_image_is_moved_to_the_end),
        both(half_moved_image_that_was_made_again_is_forgotten),
        both(work_under_way_is_left_alone),
        cmocka_unit_test_setup_teardown(what_may_be_in_use_is_left_alone, system_dir,
                                        remove_system_dir),
        both(making_an_image_again_removes_what_was_left_of_it),
        both(unclean_image_is_mended),
        cmocka_unit_test_setup_teardown(
            recover_finishes_a_replacement_whatever_the_length_of_its_name, system_dir,
            remove_system_dir),
        cmocka_unit_test_setup_teardown(recover_keeps_what_it_cannot_assign, system_dir,
                                        remove_system_dir),
        cmocka_unit_test_setup_teardown(images_may_have_the_longest_names_there_are, system_dir,
                                        remove_system_dir),
        cmocka_unit_test_setup_teardown(child_has_the_mode_of_its_parent, system_dir,
                                        remove_system_dir),
        cmocka_unit_test_setup_teardown(replaced_file_keeps_its_mode, system_dir,
                                        remove_system_dir),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
