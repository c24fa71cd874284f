/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* commit: the upper images' data goes down, the view at the top stands still. */
#include "base/bytes.h"
#include "faultfs.h"
#include "test-ops.h"

#define SIZE (2 * MiB)

static int commit(struct dr_fs *fs, const char *path, const char *base, bool force,
                  struct dr_error *err)
{
    struct dr_commit_options o = {.base = base, .force = force};
    return dr_commit_fs(fs, path, &o, NULL, err);
}

static void family(struct dr_fs *fs)
{
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, MiB, 0x11);
    make(fs, "mid.vmdk", "vmdk", 0, "a.vmdk");
    put(fs, "mid.vmdk", 512 * KiB, 256 * KiB, 0x22);
    make(fs, "top.vmdk", "vmdk", 0, "mid.vmdk");
    put(fs, "top.vmdk", 640 * KiB, 64 * KiB, 0x33);
    put(fs, "top.vmdk", 128 * KiB, 64 * KiB, 0);
}

static void into_the_parent_empties_the_child(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "mid.vmdk", want, size);
    struct dr_disk *disk;
    struct dr_open_options alone = {.flags = DR_OPEN_NO_BACKING};
    struct dr_extent_status st;
    ok(dr_open_fs(fs, "top.vmdk", &alone, &disk, &err));
    ok(dr_block_status(disk, 0, SIZE, &st, &err));
    assert_int_equal(st.flags & DR_EXTENT_ALLOCATED, 0);
    assert_int_equal(st.len, SIZE);
    ok(dr_close(disk, &err));
    make(fs, "fresh.vmdk", "vmdk", 0, "mid.vmdk");
    assert_int_equal(disk_size(fs, "top.vmdk"), disk_size(fs, "fresh.vmdk"));
    free(want);
}

static void keep_leaves_the_child_full(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    uint64_t before = disk_size(fs, "top.vmdk");
    struct dr_commit_options o = {.keep = true};
    ok(dr_commit_fs(fs, "top.vmdk", &o, NULL, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "mid.vmdk", want, size);
    assert_int_equal(disk_size(fs, "top.vmdk"), before);
    free(want);
}

static void through_several_layers(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(commit(fs, "top.vmdk", "a.vmdk", false, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "a.vmdk", want, size);
    free(want);
}

static void twice_is_the_same_as_once(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    ok(commit(fs, "mid.vmdk", NULL, true, &err));
    same_view(fs, "mid.vmdk", want, size);
    same_view(fs, "a.vmdk", want, size);
    same_view(fs, "top.vmdk", want, size); /* mid's id did not change: its view did not */
    free(want);
}

static void siblings_are_named_and_protected(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    size_t len, again;
    family(fs);
    make(fs, "other.vmdk", "vmdk", 0, "mid.vmdk");
    make(fs, "third.vmdk", "vmdk", 0, "a.vmdk");
    uint8_t *before = file_bytes(fs, "mid.vmdk", &len);
    refused(commit(fs, "top.vmdk", NULL, false, &err), EBUSY, "other.vmdk");
    uint8_t *after = file_bytes(fs, "mid.vmdk", &again);
    assert_int_equal(len, again);
    assert_memory_equal(before, after, len);
    refused(commit(fs, "top.vmdk", "a.vmdk", false, &err), EBUSY, "other.vmdk, third.vmdk");
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(commit(fs, "top.vmdk", NULL, true, &err));
    same_view(fs, "top.vmdk", want, size);
    refused(dr_open_fs(fs, "other.vmdk", NULL, &(struct dr_disk *){NULL}, &err), ESTALE, "CID");
    free(want);
    free(before);
    free(after);
}

/* After the first look around, which lists the one directory of all images once, somebody makes
 * another child. */
static const struct dr_fs_ops *real_ops;

static int late_list(struct dr_fs *fs, const char *dir, int (*each)(void *user, const char *name),
                     void *user, struct dr_error *err)
{
    int r = real_ops->list(fs, dir, each, user, err);
    fs->ops = real_ops;
    make(fs, "other.vmdk", "vmdk", 0, "mid.vmdk");
    return r;
}

static void siblings_made_meanwhile_are_protected(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_fs_ops ops = *fs->ops;
    uint64_t size;
    size_t len, again;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size), *before = file_bytes(fs, "mid.vmdk", &len);
    real_ops = fs->ops;
    ops.list = late_list;
    fs->ops = &ops;
    refused(commit(fs, "top.vmdk", NULL, false, &err), EBUSY, "other.vmdk");
    fs->ops = real_ops;
    uint8_t *after = file_bytes(fs, "mid.vmdk", &again);
    assert_int_equal(len, again);
    assert_memory_equal(before, after, len);
    same_view(fs, "top.vmdk", want, size);
    free(want);
    want = view(fs, "other.vmdk", &size);
    free(want);
    free(before);
    free(after);
}

/* A directory was copied: the name that the sibling records leads to another disk, its own parent
 * stands beside it. */
static void siblings_that_name_their_parent_elsewhere_are_protected(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_image *image;
    make(fs, "old/p.vmdk", "vmdk", SIZE, NULL);
    make(fs, "p.vmdk", "vmdk", SIZE, NULL);
    make(fs, "top.vmdk", "vmdk", 0, "p.vmdk");
    make(fs, "other.vmdk", "vmdk", 0, "p.vmdk");
    ok(dr_image_open(fs, "other.vmdk", NULL, DR_OPEN_RDWR, &image, &err));
    ok(image->fmt->set_backing(image, NULL, "old/p.vmdk", "vmdk", 0, &err));
    ok(dr_image_unref(image, &err));
    uint64_t size;
    free(view(fs, "other.vmdk", &size));
    refused(commit(fs, "top.vmdk", NULL, false, &err), EBUSY, "other.vmdk");
}

/* A child of a kind that is not read, or whose other files are not at hand, is a child. */
static void siblings_that_do_not_open_are_protected(void **state)
{
    struct dr_fs *fs = *state;
    static const char text[] =
        "# Disk DescriptorFile\nversion=3\nCID=12345678\nparentCID=11111111\n"
        "createType=\"seSparse\"\nparentFileNameHint=\"mid.vmdk\"\n"
        "RW 4096 SESPARSE \"esx-sesparse.vmdk\"\n";
    struct dr_create_options over = {
        .format = "add-cow", .backing = "mid.vmdk", .backing_format = "vmdk"};
    struct dr_file *file;
    family(fs);
    ok(dr_file_open(fs, "esx.vmdk", DR_FILE_CREATE, &file, &err));
    ok(dr_file_pwrite(file, text, 0, sizeof(text) - 1, &err));
    dr_file_unref(file);
    refused(commit(fs, "top.vmdk", NULL, false, &err), EBUSY, ": esx.vmdk;");
    ok(fs->ops->unlink(fs, "esx.vmdk", &err));
    ok(dr_create_fs(fs, "cow.add-cow", &over, &err));
    ok(fs->ops->unlink(fs, "cow.raw", &err));
    refused(commit(fs, "top.vmdk", NULL, false, &err), EBUSY, ": cow.add-cow;");
    ok(fs->ops->unlink(fs, "cow.add-cow", &err));
    ok(commit(fs, "top.vmdk", NULL, false, &err));
}

static void what_is_no_base_is_refused(void **state)
{
    struct dr_fs *fs = *state;
    family(fs);
    make(fs, "x.vmdk", "vmdk", SIZE, NULL);
    refused(commit(fs, "top.vmdk", "x.vmdk", false, &err), EINVAL, "Did not find 'x.vmdk'");
    refused(commit(fs, "top.vmdk", "top.vmdk", false, &err), EINVAL, "Did not find");
    refused(commit(fs, "a.vmdk", NULL, false, &err), ENOTSUP, "does not have a backing file");
}

static void shorter_base_grows(void **state)
{
    struct dr_fs *fs = *state;
    static const uint64_t written[] = {MiB + 64 * KiB, MiB - 64 * KiB};
    uint64_t size;
    for (int i = 0; i < 2; i++) {
        const char *base = i ? "b.vmdk" : "a.vmdk", *top = i ? "btop.vmdk" : "atop.vmdk";
        make(fs, base, "vmdk", MiB, NULL);
        make(fs, top, "vmdk", SIZE, base);
        put(fs, top, written[i], 64 * KiB, 0x55);
        uint8_t *want = view(fs, top, &size);
        ok(commit(fs, top, NULL, false, &err));
        same_view(fs, top, want, size);
        same_view(fs, base, want, size);
        free(want);
    }
}

static void make_qcow2(struct dr_fs *fs, const char *path, uint64_t size, const char *backing,
                       const char *backing_format)
{
    struct dr_create_options o = {.format = "qcow2",
                                  .size = size,
                                  .has_size = true,
                                  .backing = backing,
                                  .backing_format = backing_format};
    ok(dr_create_fs(fs, path, &o, &err));
}

static uint64_t size_of(struct dr_fs *fs, const char *path)
{
    uint64_t size;
    free(view(fs, path, &size));
    return size;
}

/* Behind the end of the base its own parent has bytes that nobody sees, and growing the base would
 * show them: they are hidden, and where the overlay has nothing there the base does not grow. */
static void a_base_that_is_shorter_than_its_parent_grows_only_for_data(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_commit_options o = {0};
    uint64_t size;
    make(fs, "lowest.raw", "raw", 2 * MiB, NULL);
    put(fs, "lowest.raw", 0, 2 * MiB, 0x11);
    make_qcow2(fs, "base", MiB, "lowest.raw", "raw");
    make_qcow2(fs, "top", 2 * MiB, "base", "qcow2");
    put(fs, "top", 64 * KiB, 64 * KiB, 0x22);
    uint8_t *before = view(fs, "top", &size);
    assert_int_equal(before[2 * MiB - 1], 0);
    ok(dr_commit_fs(fs, "top", &o, NULL, &err));
    same_view(fs, "top", before, size);
    assert_int_equal(size_of(fs, "base"), MiB);
    free(before);

    put(fs, "top", MiB + 64 * KiB, 64 * KiB, 0x33);
    before = view(fs, "top", &size);
    ok(dr_commit_fs(fs, "top", &o, NULL, &err));
    same_view(fs, "top", before, size);
    same_view(fs, "base", before, size);
    free(before);
}

static void longer_base_keeps_its_tail(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, SIZE, 0x11);
    make(fs, "top.vmdk", "vmdk", MiB, "a.vmdk");
    put(fs, "top.vmdk", 64 * KiB, 64 * KiB, 0x55);
    uint8_t *want = view(fs, "top.vmdk", &size);
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    same_view(fs, "top.vmdk", want, size);
    uint8_t *base = view(fs, "a.vmdk", &size);
    assert_int_equal(size, SIZE);
    assert_int_equal(base[SIZE - 1], 0x11);
    assert_int_equal(base[64 * KiB], 0x55);
    free(base);
    free(want);
}

/* A middle image that is shorter ends the view: its zeros have to go down, too. */
static void shorter_middle_image_commits_its_zeros(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.vmdk", "vmdk", SIZE, NULL);
    put(fs, "a.vmdk", 0, SIZE, 0x11);
    make(fs, "mid.vmdk", "vmdk", MiB, "a.vmdk");
    make(fs, "top.vmdk", "vmdk", SIZE, "mid.vmdk");
    put(fs, "top.vmdk", SIZE - 64 * KiB, 64 * KiB, 0x33);
    uint8_t *want = view(fs, "top.vmdk", &size);
    assert_int_equal(want[MiB], 0);
    ok(commit(fs, "top.vmdk", "a.vmdk", false, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "a.vmdk", want, size);
    free(want);
}

/* Once it is out of the chain, the zeros behind its end must be its parent's: as far as anybody
 * above can see, and no further. */
static void shorter_middle_image_that_goes_down_itself_leaves_its_zeros(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "a.vmdk", "vmdk", SIZE + MiB, NULL);
    put(fs, "a.vmdk", 0, SIZE + MiB, 0x11);
    make(fs, "mid.vmdk", "vmdk", MiB, "a.vmdk");
    make(fs, "top.vmdk", "vmdk", SIZE, "mid.vmdk");
    uint8_t *want = view(fs, "top.vmdk", &size);
    assert_int_equal(want[MiB], 0);
    const struct dr_commit_options o = {.top = "mid.vmdk"};
    ok(dr_commit_fs(fs, "top.vmdk", &o, NULL, &err));
    same_view(fs, "top.vmdk", want, size);
    free(want);
    want = view(fs, "a.vmdk", &size);
    assert_int_equal(want[SIZE - 1], 0);
    assert_int_equal(want[SIZE], 0x11);
    free(want);
}

static int little_space(struct dr_fs *fs, const char *path, uint64_t *bytes, struct dr_error *err)
{
    (void)fs;
    (void)path;
    (void)err;
    *bytes = MiB;
    return 0;
}

struct bad_tables {
    const char *path;
    uint64_t at[2]; /* of its grain tables: the one and its copy */
};

static int fail_tables(void *user, const struct faultfs_io *io)
{
    const struct bad_tables *bad = user;
    bool hit = io->kind == FAULTFS_READ && strcmp(io->path, bad->path) == 0;
    for (unsigned i = 0; i < 2; i++)
        if (hit && io->off <= bad->at[i] && bad->at[i] < io->off + io->len)
            return -EIO;
    return 0;
}

/* Only a look at all that is to be copied says whether it fits. Nothing is written before. */
static void what_cannot_be_looked_at_for_space_stops_the_commit(void **state)
{
    struct dr_fs *fs = *state;
    struct bad_tables bad = {.path = "top.vmdk"};
    size_t len, now;
    family(fs);
    uint8_t *top = file_bytes(fs, "top.vmdk", &len);
    for (unsigned i = 0; i < 2; i++) /* rgdOffset, gdOffset */
        bad.at[i] = get_le32(top + get_le64(top + 48 + 8 * i) * 512) * UINT64_C(512);
    free(top);
    uint8_t *before = file_bytes(fs, "mid.vmdk", &len);
    struct faultfs *f = faultfs_new(fs);
    struct dr_fs *faulty = faultfs_fs(f);
    const struct dr_fs_ops *full = faulty->ops;
    struct dr_fs_ops ops = *full;
    ops.free_space = little_space;
    faulty->ops = &ops;
    faultfs_observe(f, fail_tables, &bad);
    refused(commit(faulty, "top.vmdk", NULL, false, &err), EIO, "top.vmdk");
    assert_int_equal(faultfs_count_of(f, FAULTFS_WRITE), 0);
    faultfs_observe(f, NULL, NULL);
    ok(commit(faulty, "top.vmdk", NULL, false, &err));
    faulty->ops = full;
    faultfs_free(f);
    uint8_t *after = file_bytes(fs, "mid.vmdk", &now);
    assert_true(now != len || memcmp(before, after, len) != 0);
    free(before);
    free(after);
}

/* ------------------------------------------------------------------ interrupted */

/* As if killed between the two ids: P has its new one, M still the old. */
static void tell_only_the_parent(struct dr_fs *fs, const char *parent, const char *child)
{
    struct dr_image *p, *m;
    ok(dr_image_open(fs, parent, NULL, DR_OPEN_RDWR | DR_OPEN_UNCHANGED, &p, &err));
    ok(dr_image_open(fs, child, NULL, 0, &m, &err));
    ok(p->fmt->set_id(p, p->fmt->commit_id(p, m), &err));
    ok(dr_image_unref(m, &err));
    ok(dr_image_unref(p, &err));
}

static void interrupted_between_the_ids_reads_the_same_and_goes_on(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    tell_only_the_parent(fs, "mid.vmdk", "top.vmdk");
    same_view(fs, "top.vmdk", want, size);
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "mid.vmdk", want, size);
    free(want);
}

/* Whatever write fails after that, the disk reads the same, and the commit can be finished. */
static void interrupted_between_the_ids_may_be_interrupted_again(void **state)
{
    (void)state;
    bool fired = true;
    for (uint64_t n = 0; fired; n++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint64_t size;
        family(fs);
        uint8_t *want = view(fs, "top.vmdk", &size);
        tell_only_the_parent(fs, "mid.vmdk", "top.vmdk");
        struct faultfs *f = faultfs_new(fs);
        faultfs_arm(
            f, &(struct faultfs_plan){.nth = n, .kinds = 1u << FAULTFS_WRITE, .for_good = true});
        commit(faultfs_fs(f), "top.vmdk", NULL, false, NULL);
        fired = faultfs_fired(f);
        faultfs_free(f);
        same_view(fs, "top.vmdk", want, size);
        ok(commit(fs, "top.vmdk", NULL, false, &err));
        same_view(fs, "top.vmdk", want, size);
        free(want);
        dr_fs_memory_free(fs);
    }
}

/* Nobody says that the commit is done again first. */
static void interrupted_between_the_ids_goes_on_with_other_work(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    tell_only_the_parent(fs, "mid.vmdk", "top.vmdk");
    put(fs, "top.vmdk", MiB, 64 * KiB, 0x44);
    uint8_t *want = view(fs, "top.vmdk", &size);
    assert_int_equal(want[MiB], 0x44);
    tell_only_the_parent(fs, "a.vmdk", "mid.vmdk");
    same_view(fs, "top.vmdk", want, size);
    ok(commit(fs, "top.vmdk", NULL, false, &err)); /* mid gets a new id by that */
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "mid.vmdk", want, size);
    free(want);
}

static void count_lines(void *user, const char *line)
{
    (void)line;
    ++*(unsigned *)user;
}

static void recover_repairs_an_interrupted_commit(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    unsigned found = 9, lines = 0;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    tell_only_the_parent(fs, "mid.vmdk", "top.vmdk");
    ok(dr_recover_fs(fs, "top.vmdk", NULL, true, count_lines, &lines, &found, &err));
    assert_int_equal(found, lines);
    assert_true(found > 0);
    unsigned again = 0;
    ok(dr_recover_fs(fs, "top.vmdk", NULL, false, NULL, NULL, &again, &err));
    assert_int_equal(again, found); /* the rehearsal changed nothing */
    ok(dr_recover_fs(fs, "top.vmdk", NULL, false, NULL, NULL, &again, &err));
    assert_int_equal(again, 0);
    same_view(fs, "top.vmdk", want, size);
    free(want);
}

static int stop_soon(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    (void)total;
    return done > 0;
}

static void stopped_commit_reads_the_same_and_goes_on(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    family(fs);
    uint8_t *want = view(fs, "top.vmdk", &size);
    struct dr_job job = {.cancelled = 1, .progress = stop_soon};
    struct dr_commit_options o = {0};
    refused(dr_commit_fs(fs, "top.vmdk", &o, &job, &err), ECANCELED, "stopped");
    same_view(fs, "top.vmdk", want, size);
    ok(commit(fs, "top.vmdk", NULL, false, &err));
    same_view(fs, "top.vmdk", want, size);
    same_view(fs, "mid.vmdk", want, size);
    free(want);
}

/* ------------------------------------------------------------------ by chance */

static void random_image(struct dr_fs *fs, uint64_t *seed, const char *name, uint64_t size,
                         const char *backing)
{
    make(fs, name, "vmdk", size, backing);
    for (unsigned i = 0; i < 6; i++) {
        uint64_t off = next_random(seed) % (size / 512) * 512;
        uint64_t len = dr_min(size - off, (next_random(seed) % 300 + 1) * 512);
        put(fs, name, off, len, next_random(seed) % 3 ? (int)(next_random(seed) % 4 + 1) : 0);
    }
}

static void any_commit_keeps_any_view(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t seed = 0x7654321, size;
    for (int round = 0; round < 60; round++) {
        random_image(fs, &seed, "a.vmdk", SIZE, NULL);
        random_image(fs, &seed, "b.vmdk", round % 3 ? SIZE : MiB + 512, "a.vmdk");
        random_image(fs, &seed, "c.vmdk", SIZE - 512, "b.vmdk");
        bool deep = round % 3 == 0 || next_random(&seed) % 2;
        uint8_t *want = view(fs, "c.vmdk", &size);
        struct dr_job job = {.workers = (unsigned)(next_random(&seed) % 2 + 1)};
        struct dr_commit_options o = {.base = deep ? "a.vmdk" : NULL};
        ok(dr_commit_fs(fs, "c.vmdk", &o, &job, &err));
        same_view(fs, "c.vmdk", want, size);
        uint64_t n;
        uint8_t *below = view(fs, deep ? "a.vmdk" : "b.vmdk", &n);
        assert_memory_equal(below, want, size);
        free(below);
        free(want);
    }
}

/* An id across two sectors cannot be changed in one write, and a small descriptor has no room for
 * doing it safely otherwise. */
static void a_child_that_cannot_learn_the_new_id_is_refused_before_anything(void **state)
{
    struct dr_fs *fs = *state;
    char text[2048] = "", moved[2048] = "";
    struct dr_file *f;
    family(fs);
    ok(dr_file_open(fs, "top.vmdk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, text, 512, 1024, &err));
    size_t line = (size_t)(strstr(text, "parentCID=") - text), pad = 512 - 14 - line;
    memcpy(moved, text, line);
    memset(moved + line, '#', pad - 1);
    strcat(moved, "\n");
    strcat(moved, text + line);
    assert_in_range(strlen(moved), 513, 1023);
    ok(dr_file_pwrite(f, moved, 512, 1024, &err));
    uint8_t sectors[8] = {2};
    ok(dr_file_pwrite(f, sectors, 36, 8, &err)); /* descriptorSize */
    dr_file_unref(f);
    size_t len, now;
    uint8_t *before = file_bytes(fs, "mid.vmdk", &len);
    refused(commit(fs, "top.vmdk", NULL, false, &err), ENOSPC, "no room");
    uint8_t *after = file_bytes(fs, "mid.vmdk", &now);
    assert_int_equal(len, now);
    assert_memory_equal(before, after, len);
    free(before);
    free(after);
}

/* The base's file system has no space left from the first data on. */
static int fill_base(void *user, const struct faultfs_io *io)
{
    bool *full = user;
    bool base = io->kind == FAULTFS_WRITE && strcmp(io->path, "base") == 0;
    *full |= base && io->len >= 64 * KiB;
    return base && *full ? -ENOSPC : 0;
}

/* New tables of the base are in memory only when it is given up. */
static void a_guest_reads_what_it_did_after_a_commit_had_no_space(void **state)
{
    struct dr_fs *fs = *state;
    struct faultfs *f = faultfs_new(fs);
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    const struct dr_commit_options lower = {.top = "mid", .base = "base"};
    struct dr_create_options o = {.format = "qcow2", .size = 512 * KiB, .has_size = true};
    struct dr_disk *disk;
    uint64_t size;
    bool full = false;
    ok(dr_create_fs(fs, "base", &o, &err));
    o = (struct dr_create_options){.format = "qcow2", .backing = "base", .backing_format = "qcow2"};
    ok(dr_create_fs(fs, "mid", &o, &err));
    put(fs, "mid", 64 * KiB, 192 * KiB, 0x22);
    o.backing = "mid";
    ok(dr_create_fs(fs, "top", &o, &err));
    uint8_t *want = view(fs, "top", &size), *have = malloc(size);
    ok(dr_open_fs(faultfs_fs(f), "top", &rw, &disk, &err));
    faultfs_observe(f, fill_base, &full);
    refused(dr_disk_commit(disk, &lower, NULL, &err), ENOSPC, "base: ");
    assert_true(full);
    ok(dr_pread(disk, have, 0, size, &err));
    assert_memory_equal(have, want, size);
    faultfs_observe(f, NULL, NULL);
    ok(dr_disk_commit(disk, &lower, NULL, &err));
    ok(dr_pread(disk, have, 0, size, &err));
    assert_memory_equal(have, want, size);
    ok(dr_close(disk, &err));
    same_view(fs, "top", want, size);
    free(have);
    free(want);
    faultfs_free(f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        ops_test(into_the_parent_empties_the_child),
        ops_test(keep_leaves_the_child_full),
        ops_test(a_child_that_cannot_learn_the_new_id_is_refused_before_anything),
        ops_test(through_several_layers),
        ops_test(twice_is_the_same_as_once),
        ops_test(siblings_are_named_and_protected),
        ops_test(siblings_made_meanwhile_are_protected),
        ops_test(siblings_that_name_their_parent_elsewhere_are_protected),
        ops_test(siblings_that_do_not_open_are_protected),
        ops_test(what_is_no_base_is_refused),
        ops_test(shorter_base_grows),
        ops_test(a_base_that_is_shorter_than_its_parent_grows_only_for_data),
        ops_test(longer_base_keeps_its_tail),
        ops_test(shorter_middle_image_commits_its_zeros),
        ops_test(shorter_middle_image_that_goes_down_itself_leaves_its_zeros),
        ops_test(what_cannot_be_looked_at_for_space_stops_the_commit),
        ops_test(interrupted_between_the_ids_reads_the_same_and_goes_on),
        ops_test(interrupted_between_the_ids_may_be_interrupted_again),
        ops_test(interrupted_between_the_ids_goes_on_with_other_work),
        ops_test(recover_repairs_an_interrupted_commit),
        ops_test(stopped_commit_reads_the_same_and_goes_on),
        ops_test(any_commit_keeps_any_view),
        ops_test(a_guest_reads_what_it_did_after_a_commit_had_no_space),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
