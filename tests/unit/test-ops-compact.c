/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compaction: what is given back, what must stay, and that nobody sees a difference. */
#include "test-ops.h"
#include "faultfs.h"
#include "base/bytes.h"

#include <pthread.h>
#include <stdatomic.h>

#define SIZE (4u * MiB)

static void fill(struct dr_fs *fs, const char *path, const char *format, uint64_t off, size_t len,
                 int byte)
{
    struct dr_open_options o = {.format = format, .flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

static void make_child(struct dr_fs *fs, const char *path, const char *format, const char *parent,
                       const char *parent_format)
{
    struct dr_create_options o = {
        .format = format, .backing = parent, .backing_format = parent_format};
    ok(dr_create_fs(fs, path, &o, &err));
}

static struct dr_compact_result compact(struct dr_fs *fs, const char *path,
                                        struct dr_compact_options o)
{
    struct dr_compact_result result;
    ok(dr_compact_fs(fs, path, &o, NULL, &result, &err));
    return result;
}

static void is_sound(struct dr_fs *fs, const char *path)
{
    char *json = NULL;
    ok(dr_check_fs(fs, path, NULL, DR_REPAIR_NONE, NULL, NULL, &json, &err));
    assert_null(strstr(json, "\"corruptions\""));
    assert_null(strstr(json, "\"leaks\""));
    free(json);
}

static const char *const formats[] = {"raw", "qcow2", "vmdk", "add-cow"};
#define N_FORMATS (sizeof(formats) / sizeof(formats[0]))

/* A disk of the format; those that must have a parent get one of zeros. */
static void make_disk(struct dr_fs *fs, const char *format)
{
    if (strcmp(format, "add-cow") == 0) {
        make(fs, "base", "raw", SIZE, NULL);
        make_child(fs, "disk", format, "base", "raw");
    } else {
        make(fs, "disk", format, SIZE, NULL);
    }
}

static void zeros_that_were_written_are_given_back(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_FORMATS; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint64_t size;
        make_disk(fs, formats[i]);
        fill(fs, "disk", formats[i], 0, SIZE / 2, 'x');
        fill(fs, "disk", formats[i], 256 * KiB, MiB, 0);
        uint8_t *want = view(fs, "disk", &size);
        uint64_t used = disk_size(fs, "disk");
        struct dr_compact_options dry = {.open.format = formats[i], .dry_run = true};
        struct dr_compact_result plan = compact(fs, "disk", dry);
        assert_int_equal(disk_size(fs, "disk"), used);
        struct dr_compact_result result =
            compact(fs, "disk", (struct dr_compact_options){.open.format = formats[i]});
        assert_int_equal(result.zeros, MiB);
        assert_int_equal(plan.zeros, MiB);
        assert_true(result.used_after + MiB <= used);
        assert_int_equal(disk_size(fs, "disk"), result.used_after);
        same_view(fs, "disk", want, size);
        struct dr_compact_result again =
            compact(fs, "disk", (struct dr_compact_options){.open.format = formats[i]});
        assert_int_equal(again.zeros, 0);
        assert_int_equal(again.moved, 0);
        assert_int_equal(again.after, result.after);
        if (strcmp(formats[i], "raw") != 0)
            is_sound(fs, "disk");
        free(want);
        dr_fs_memory_free(fs);
    }
}

/* Zeros of a child hide what its parent has. */
static void zeros_over_a_parent_stay_zeros(void **state)
{
    (void)state;
    for (size_t i = 1; i < N_FORMATS; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        bool vmdk = strcmp(formats[i], "vmdk") == 0;
        uint64_t size;
        make(fs, "base", vmdk ? "vmdk" : "raw", SIZE, NULL);
        fill(fs, "base", vmdk ? "vmdk" : "raw", 0, SIZE, 'p');
        make_child(fs, "disk", formats[i], "base", vmdk ? "vmdk" : "raw");
        fill(fs, "disk", formats[i], 128 * KiB, MiB, 0);
        fill(fs, "disk", formats[i], 2 * MiB, MiB, 'c');
        uint8_t *want = view(fs, "disk", &size);
        uint64_t used = disk_size(fs, "disk");
        struct dr_compact_result result =
            compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
        assert_int_equal(result.zeros, MiB);
        assert_true(disk_size(fs, "disk") + MiB <= used);
        same_view(fs, "disk", want, size);
        is_sound(fs, "disk");
        free(want);
        dr_fs_memory_free(fs);
    }
}

/* Also where the format has no word for zeros: there is nothing to be hidden. */
static void zeros_over_a_parent_s_zeros_are_given_back(void **state)
{
    static const struct dr_pair none[] = {{"zeroed_grain", "off"}, {"compat", "0.10"}};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        const char *format = i == 0 ? "vmdk" : "qcow2";
        struct dr_create_options o = {.format = format,
                                      .backing = "base",
                                      .backing_format = format,
                                      .size = SIZE,
                                      .has_size = true,
                                      .pairs = &none[i],
                                      .n_pairs = 1};
        uint64_t size;
        make(fs, "base", format, SIZE - MiB, NULL);
        fill(fs, "base", format, 0, MiB, 'p');
        fill(fs, "base", format, MiB, 256 * KiB, 0);
        ok(dr_create_fs(fs, "disk", &o, &err));
        fill(fs, "disk", format, 0, SIZE, 0);
        fill(fs, "disk", format, SIZE - 512 * KiB, 512 * KiB, 'c');
        uint8_t *want = view(fs, "disk", &size);
        struct dr_compact_result result =
            compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
        /* 1 MiB hides data, 256 KiB what nobody has looked at, 512 KiB are no zeros. */
        if (result.after > 2 * MiB + 128 * KiB)
            fail_msg("%s: still %llu bytes", format, (unsigned long long)result.after);
        same_view(fs, "disk", want, size);
        is_sound(fs, "disk");
        free(want);
        dr_fs_memory_free(fs);
    }
}

/* Grains that hide the parent's data by an entry alone. */
static void zeroed_grains_take_no_place_over_a_parent(void **state)
{
    struct dr_fs *fs = *state;
    static const struct dr_pair zeroed = {"zeroed_grain", "on"};
    struct dr_create_options o = {.format = "vmdk",
                                  .backing = "base",
                                  .backing_format = "vmdk",
                                  .pairs = &zeroed,
                                  .n_pairs = 1};
    uint64_t size;
    make(fs, "base", "vmdk", SIZE, NULL);
    fill(fs, "base", "vmdk", 0, SIZE, 'p');
    ok(dr_create_fs(fs, "disk", &o, &err));
    fill(fs, "disk", "vmdk", 0, 3 * MiB, 1);
    fill(fs, "disk", "vmdk", 0, 3 * MiB, 0);
    fill(fs, "disk", "vmdk", 3 * MiB, 256 * KiB, 'c');
    uint8_t *want = view(fs, "disk", &size);
    struct dr_compact_result plan =
        compact(fs, "disk", (struct dr_compact_options){.dry_run = true});
    struct dr_compact_result result =
        compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
    assert_int_equal(result.zeros, 3 * MiB);
    assert_true(result.after < 512 * KiB);
    assert_int_equal(plan.after, result.after);
    same_view(fs, "disk", want, size);
    is_sound(fs, "disk");
    free(want);
}

/* The first sub-cluster of the cluster becomes zeros and keeps its place, as QEMU does it. */
static void say_zero(struct dr_fs *fs, unsigned cluster)
{
    struct dr_file *f;
    uint8_t raw[8];
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR, &f, &err));
    ok(dr_file_pread(f, raw, 40, 8, &err));
    ok(dr_file_pread(f, raw, get_be64(raw), 8, &err));
    uint64_t l2 = get_be64(raw) & ((UINT64_C(1) << 56) - 512);
    put_be64(raw, UINT64_C(1) << 32);
    ok(dr_file_pwrite(f, raw, l2 + cluster * 16 + 8, 8, &err));
    dr_file_unref(f);
}

/* Some sub-clusters of a cluster are zeros, with a place, and the parent is seen in the others. */
static void zeros_beside_what_a_parent_shows_hide_nothing(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_pair pair = {"extended_l2", "on"};
    struct dr_create_options o = {.format = "qcow2",
                                  .backing = "base",
                                  .backing_format = "raw",
                                  .pairs = &pair,
                                  .n_pairs = 1};
    uint64_t size;
    make(fs, "base", "raw", SIZE, NULL);
    fill(fs, "base", "raw", 0, SIZE, 'p');
    ok(dr_create_fs(fs, "disk", &o, &err));
    fill(fs, "disk", "qcow2", 128 * KiB, 2 * KiB, 'c');
    say_zero(fs, 2);
    uint8_t *want = view(fs, "disk", &size);
    compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
    same_view(fs, "disk", want, size);
    is_sound(fs, "disk");
    free(want);
}

/* A child that was made on a disk still opens on it: the content id is not a new one. */
static void a_parent_may_be_compacted(void **state)
{
    struct dr_fs *fs = *state;
    uint64_t size;
    make(fs, "base", "vmdk", SIZE, NULL);
    fill(fs, "base", "vmdk", 0, MiB, 0);
    fill(fs, "base", "vmdk", MiB, MiB, 'p');
    make_child(fs, "disk", "vmdk", "base", "vmdk");
    uint8_t *want = view(fs, "disk", &size);
    compact(fs, "base", (struct dr_compact_options){.no_zeros = false});
    same_view(fs, "disk", want, size);
    free(want);
}

static void without_looking_for_zeros_data_stays(void **state)
{
    struct dr_fs *fs = *state;
    make(fs, "disk", "qcow2", SIZE, NULL);
    fill(fs, "disk", "qcow2", 0, MiB, 0);
    struct dr_compact_result result =
        compact(fs, "disk", (struct dr_compact_options){.no_zeros = true});
    assert_int_equal(result.zeros, 0);
    assert_int_equal(result.used_after, result.used_before);
}

/* ------------------------------------------------------------------ moving down */

/* Data on every second 64 KiB of the disk, and then the first half of it discarded: the second half
 * stands at the file's end. */
static void make_gaps(struct dr_fs *fs, const char *format)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    make(fs, "disk", format, SIZE, NULL);
    for (unsigned i = 0; i < SIZE / (128 * KiB); i++)
        put(fs, "disk", i * 128 * KiB, 64 * KiB, 1 + (int)i);
    ok(dr_open_fs(fs, "disk", &o, &disk, &err));
    ok(dr_discard(disk, 0, SIZE / 2, &err));
    ok(dr_close(disk, &err));
}

static const char *const moving[] = {"qcow2", "vmdk"};
#define N_MOVING (sizeof(moving) / sizeof(moving[0]))

static void what_stands_at_the_end_moves_into_gaps(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MOVING; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        uint64_t size, used;
        make_gaps(fs, moving[i]);
        uint8_t *want = view(fs, "disk", &size);
        used = disk_size(fs, "disk");
        struct dr_compact_result plan =
            compact(fs, "disk", (struct dr_compact_options){.dry_run = true});
        struct dr_compact_result result =
            compact(fs, "disk", (struct dr_compact_options){.no_zeros = true});
        assert_int_equal(result.moved, MiB);
        assert_int_equal(result.before - result.after, MiB);
        assert_int_equal(plan.after, result.after);
        assert_true(disk_size(fs, "disk") <= used);
        same_view(fs, "disk", want, size);
        is_sound(fs, "disk");
        free(want);
        dr_fs_memory_free(fs);
    }
}

static void a_unit_that_cannot_be_moved_is_told(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MOVING; i++)
        for (uint64_t n = 0, fired = 1; fired; n++) {
            struct dr_fs *fs = dr_fs_memory_new();
            struct faultfs *f = faultfs_new(fs);
            const struct dr_compact_options o = {.no_zeros = true};
            struct dr_job job = {.workers = 1};
            struct dr_error why = DR_ERROR_INIT;
            uint64_t size;
            make_gaps(fs, moving[i]);
            uint8_t *want = view(fs, "disk", &size);
            faultfs_arm(f, &(struct faultfs_plan){
                               .nth = n, .kinds = 1u << FAULTFS_WRITE | 1u << FAULTFS_COPY});
            int r = dr_compact_fs(faultfs_fs(f), "disk", &o, &job, NULL, &why);
            fired = faultfs_fired(f);
            faultfs_free(f);
            if (fired != (r < 0))
                fail_msg("%s, write %d: %d", moving[i], (int)n, r);
            same_view(fs, "disk", want, size);
            assert_true(fired || n > 16);
            free(want);
            dr_fs_memory_free(fs);
        }
}

/* Clusters of 512 bytes: a refcount block counts 128 KiB of the file, and those behind its end go.
 */
static void refcount_blocks_of_what_was_cut_go(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_pair pairs[] = {{"cluster_size", "512"}};
    struct dr_create_options o = {
        .format = "qcow2", .size = SIZE, .has_size = true, .pairs = pairs, .n_pairs = 1};
    uint64_t size;
    ok(dr_create_fs(fs, "disk", &o, &err));
    fill(fs, "disk", "qcow2", 0, MiB, 0);
    fill(fs, "disk", "qcow2", 2 * MiB, 64 * KiB, 'd');
    uint8_t *want = view(fs, "disk", &size);
    struct dr_compact_result result =
        compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
    assert_true(result.after < 256 * KiB);
    same_view(fs, "disk", want, size);
    is_sound(fs, "disk");
    fill(fs, "disk", "qcow2", 0, MiB, 'n');
    is_sound(fs, "disk");
    free(want);
}

/* What a snapshot inside shares stays where it is, and so does the end of the file. */
static void snapshots_inside_keep_what_they_show(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_image *image;
    uint64_t size, n;
    uint8_t *then = malloc(SIZE);
    make_gaps(fs, "qcow2");
    uint8_t *want = view(fs, "disk", &size);
    ok(dr_image_open(fs, "disk", NULL, DR_OPEN_RDWR, &image, &err));
    ok(dr_image_snapshot_create(image, "s", &err));
    ok(dr_image_unref(image, &err));
    put(fs, "disk", 0, 640 * KiB, 'n');
    put(fs, "disk", 0, 320 * KiB, 0);
    uint8_t *now = view(fs, "disk", &n);
    compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
    same_view(fs, "disk", now, n);
    is_sound(fs, "disk");
    struct dr_open_options shown = {.snapshot = "s"};
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, "disk", &shown, &disk, &err));
    ok(dr_pread(disk, then, 0, SIZE, &err));
    ok(dr_close(disk, &err));
    assert_memory_equal(then, want, SIZE);
    free(then);
    free(want);
    free(now);
}

/* ------------------------------------------------------------------ what it costs */

static int add_up_reads(void *user, const struct faultfs_io *io)
{
    _Atomic uint64_t *bytes = user;
    if (io->kind == FAULTFS_READ)
        *bytes += io->len;
    return 0;
}

static void nothing_to_give_back_is_found_in_the_metadata(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MOVING; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *counter = faultfs_new(fs);
        struct dr_compact_options o = {.no_zeros = true};
        _Atomic uint64_t bytes = 0;
        make(fs, "disk", moving[i], SIZE, NULL);
        fill(fs, "disk", moving[i], 0, SIZE, 'x');
        faultfs_observe(counter, add_up_reads, &bytes);
        struct dr_compact_result result = compact(faultfs_fs(counter), "disk", o);
        assert_int_equal(result.after, result.before);
        assert_true(bytes > 0 && bytes < SIZE / 4);
        bytes = 0;
        compact(faultfs_fs(counter), "disk", (struct dr_compact_options){.dry_run = true});
        assert_true(bytes >= SIZE);
        faultfs_free(counter);
        dr_fs_memory_free(fs);
    }
}

/* Zeros that a snapshot inside has, too, would come free no more, and take a table of their own. */
static void zeros_of_snapshots_inside_stay(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_image *image;
    uint64_t size;
    make(fs, "disk", "qcow2", SIZE, NULL);
    fill(fs, "disk", "qcow2", 0, MiB, 0);
    fill(fs, "disk", "qcow2", MiB, MiB, 'd');
    ok(dr_image_open(fs, "disk", NULL, DR_OPEN_RDWR, &image, &err));
    ok(dr_image_snapshot_create(image, "s", &err));
    ok(dr_image_unref(image, &err));
    uint8_t *want = view(fs, "disk", &size);
    struct dr_compact_result plan =
        compact(fs, "disk", (struct dr_compact_options){.dry_run = true});
    struct dr_compact_result result =
        compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
    assert_int_equal(plan.zeros, 0);
    assert_int_equal(result.zeros, 0);
    assert_true(result.after <= result.before);
    same_view(fs, "disk", want, size);
    is_sound(fs, "disk");
    free(want);
}

/* Version 2 keeps the places of zeros over a parent; and parts of one cluster come free once. */
static void a_dry_run_promises_no_more_than_comes(void **state)
{
    static const struct dr_pair pairs[] = {{"compat", "0.10"}, {"extended_l2", "on"}};
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_create_options o = {.format = "qcow2",
                                      .backing = "base",
                                      .backing_format = "raw",
                                      .pairs = &pairs[i],
                                      .n_pairs = 1};
        make(fs, "base", "raw", SIZE, NULL);
        ok(dr_create_fs(fs, "disk", &o, &err));
        fill(fs, "disk", "qcow2", 0, 2 * MiB, 'd');
        for (unsigned at = 0; i == 0 && at < 16; at++)
            fill(fs, "disk", "qcow2", at * 64 * KiB, 64 * KiB, 0);
        for (unsigned at = 0; i == 1 && at < 16; at++) /* every other sub-cluster */
            fill(fs, "disk", "qcow2", 2 * MiB + at * 4 * KiB, 2 * KiB, 0);
        struct dr_compact_result plan =
            compact(fs, "disk", (struct dr_compact_options){.dry_run = true});
        struct dr_compact_result result =
            compact(fs, "disk", (struct dr_compact_options){.no_zeros = false});
        assert_true(result.after <= plan.after);
        dr_fs_memory_free(fs);
    }
}

/* Grains that only the redundant directory leads to are no gaps, nor is the file's end unused. */
static void a_damaged_directory_is_left_to_the_repair(void **state)
{
    struct dr_fs *fs = *state;
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    struct dr_file *f;
    uint8_t raw[8];
    make(fs, "disk", "vmdk", SIZE, NULL);
    fill(fs, "disk", "vmdk", 0, MiB, 'd');
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR, &f, &err));
    uint64_t length = dr_file_size(f);
    ok(dr_file_pread(f, raw, 56, 8, &err));
    ok(dr_file_pwrite(f, "\0\0\0", get_le64(raw) * 512, 4, &err));
    dr_file_unref(f);
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    struct dr_compact_options o = {.no_zeros = true};
    int r = dr_disk_compact(disk, &o, NULL, NULL, NULL);
    dr_close(disk, NULL);
    ok(dr_file_open(fs, "disk", 0, &f, &err));
    assert_int_equal(dr_file_size(f), length);
    dr_file_unref(f);
    assert_int_equal(r, -EIO);
}

/* The entry of the second unit says what that of the first one says. */
static void share_a_unit(struct dr_fs *fs, bool qcow2)
{
    struct dr_file *f;
    uint8_t raw[8];
    uint64_t table;
    ok(dr_file_open(fs, "disk", DR_FILE_RDWR, &f, &err));
    if (qcow2) {
        ok(dr_file_pread(f, raw, 40, 8, &err));
        ok(dr_file_pread(f, raw, get_be64(raw), 8, &err));
        table = get_be64(raw) & ((UINT64_C(1) << 56) - 512);
    } else {
        ok(dr_file_pread(f, raw, 56, 8, &err));
        ok(dr_file_pread(f, raw, get_le64(raw) * 512, 4, &err));
        table = (uint64_t)get_le32(raw) * 512;
    }
    unsigned entry = qcow2 ? 8 : 4;
    ok(dr_file_pread(f, raw, table, entry, &err));
    ok(dr_file_pwrite(f, raw, table + entry, entry, &err));
    dr_file_unref(f);
}

/* Zeros to which two entries lead, in a disk that is open: nothing of it is given back or moved. */
static void an_open_disk_that_is_damaged_is_left_as_it_is(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_MOVING; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
        struct dr_compact_options o = {.no_zeros = false};
        struct dr_disk *disk = NULL;
        uint64_t size;
        make(fs, "disk", moving[i], SIZE, NULL);
        fill(fs, "disk", moving[i], 0, 256 * KiB, 0);
        fill(fs, "disk", moving[i], 256 * KiB, MiB, 'd');
        share_a_unit(fs, strcmp(moving[i], "qcow2") == 0);
        uint64_t used = disk_size(fs, "disk");
        uint8_t *want = view(fs, "disk", &size);
        ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
        struct dr_error why = DR_ERROR_INIT;
        assert_int_equal(dr_disk_compact(disk, &o, NULL, NULL, &why), -EIO);
        assert_non_null(strstr(why.text, "drover check"));
        ok(dr_close(disk, &err));
        assert_int_equal(disk_size(fs, "disk"), used);
        same_view(fs, "disk", want, size);
        free(want);
        dr_fs_memory_free(fs);
    }
}

/* ------------------------------------------------------------------ at random */

struct kind {
    const char *format;
    const char *name, *value; /* an option */
};
static const struct kind kinds[] = {
    {"qcow2", "cluster_size", "512"},
    {"qcow2", "cluster_size", "4k"},
    {"qcow2", "extended_l2", "on"},
    {"qcow2", "refcount_bits", "64"},
    {"vmdk", "subformat", "twoGbMaxExtentSparse"},
    {"vmdk", "subformat", "vmfsSparse"},
    {"vmdk", "zeroed_grain", "on"},
};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))
#define SMALL   (1024u * KiB)

static void change_at_random(struct dr_disk *disk, uint8_t *shadow, uint64_t *rnd)
{
    uint64_t len = 512 + next_random(rnd) % (160 * KiB) / 512 * 512;
    uint64_t off = next_random(rnd) % (SMALL - len) / 512 * 512;
    uint64_t how = next_random(rnd) % 4;
    memset(shadow + off, how == 0 ? 1 + (int)(next_random(rnd) % 255) : 0, len);
    if (how == 1)
        ok(dr_zero(disk, off, len, DR_MAY_UNMAP, &err));
    else
        ok(dr_pwrite(disk, shadow + off, off, len, 0, &err));
}

static void snapshot_inside(struct dr_fs *fs, const char *name)
{
    struct dr_image *image;
    ok(dr_image_open(fs, "disk", NULL, DR_OPEN_RDWR, &image, &err));
    ok(dr_image_snapshot_create(image, name, &err));
    ok(dr_image_unref(image, &err));
}

/* Snapshots write the refcount blocks anew, all of them in a row: there, one counts the others. */
static void refcount_blocks_that_count_each_other_go(void **state)
{
    struct dr_fs *fs = *state;
    static const struct dr_pair pairs[] = {{"cluster_size", "512"}, {"refcount_bits", "64"}};
    const struct dr_create_options o = {
        .format = "qcow2", .size = SIZE, .has_size = true, .pairs = pairs, .n_pairs = 2};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_create_fs(fs, "disk", &o, &err));
    fill(fs, "disk", "qcow2", 0, 3 * MiB, 'd');
    snapshot_inside(fs, "s");
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_zero(disk, 2 * MiB, MiB, DR_MAY_UNMAP, &err));
    ok(dr_close(disk, &err));
    fill(fs, "disk", "qcow2", 0, MiB, 'e');
    snapshot_inside(fs, "t");
    struct dr_compact_options how = {.no_zeros = true}, dry = how;
    dry.dry_run = true;
    uint64_t promised = compact(fs, "disk", dry).after;
    assert_int_equal(compact(fs, "disk", how).after, promised);
    is_sound(fs, "disk");
}

static void one_life(const struct kind *kind, uint64_t seed)
{
    const struct dr_pair pair = {kind->name, kind->value};
    struct dr_create_options o = {
        .format = kind->format, .size = SMALL, .has_size = true, .pairs = &pair, .n_pairs = 1};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_fs *fs = dr_fs_memory_new();
    uint8_t *shadow = calloc(1, SMALL);
    ok(dr_create_fs(fs, "disk", &o, &err));
    for (int round = 0; round < 6; round++) {
        struct dr_disk *disk = NULL;
        ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
        for (int i = 0; i < 8; i++)
            change_at_random(disk, shadow, &seed);
        if (strcmp(kind->format, "qcow2") == 0 && (round == 1 || round == 3))
            ok(dr_disk_bitmap_change(disk, round == 1 ? "one" : "two", DR_BITMAP_ADD, NULL, &err));
        if (round == 4 && strcmp(kind->format, "qcow2") == 0)
            ok(dr_disk_bitmap_change(disk, "one", DR_BITMAP_REMOVE, NULL, &err));
        ok(dr_close(disk, &err));
        if (round == 2 && strcmp(kind->format, "qcow2") == 0)
            snapshot_inside(fs, "s");
        struct dr_compact_options how = {.no_zeros = next_random(&seed) % 3 == 0};
        struct dr_compact_result result = compact(fs, "disk", how);
        assert_true(result.after <= result.before);
        same_view(fs, "disk", shadow, SMALL);
        is_sound(fs, "disk");
    }
    free(shadow);
    dr_fs_memory_free(fs);
}

static void whatever_came_before_the_disk_reads_the_same(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_KINDS; i++)
        for (uint64_t seed = 1; seed <= 3; seed++)
            one_life(&kinds[i], seed * 7919);
}

/* ------------------------------------------------------------------ beside its users */

struct user {
    struct dr_disk *disk;
    uint8_t *shadow; /* of all of the disk; each user has a half */
    uint64_t from, seed;
    _Atomic bool *stop;
    pthread_t thread;
};

static void *use(void *arg)
{
    struct user *u = arg;
    uint8_t buf[129 * KiB];
    while (!atomic_load(u->stop)) {
        uint64_t len = 512 + next_random(&u->seed) % (128 * KiB) / 512 * 512;
        uint64_t off = u->from + next_random(&u->seed) % (SMALL / 2 - len) / 512 * 512;
        if (next_random(&u->seed) % 2) {
            memset(u->shadow + off, next_random(&u->seed) % 3 ? 0 : 7, len);
            ok(dr_pwrite(u->disk, u->shadow + off, off, len, 0, &err));
        } else {
            ok(dr_pread(u->disk, buf, off, len, &err));
            assert_memory_equal(buf, u->shadow + off, len);
        }
    }
    return NULL;
}

static int add_up_dirty(void *user, uint64_t off, uint64_t len)
{
    (void)off;
    *(uint64_t *)user += len;
    return 0;
}

static void users_write_while_it_is_compacted(void **state)
{
    static const struct kind live[] = {{"qcow2", "cluster_size", "4k"}, {"vmdk", NULL, NULL}};
    (void)state;
    for (size_t k = 0; k < 2; k++) {
        const struct dr_pair pair = {live[k].name, live[k].value};
        struct dr_create_options o = {.format = live[k].format,
                                      .size = SMALL,
                                      .has_size = true,
                                      .pairs = &pair,
                                      .n_pairs = live[k].name != NULL};
        struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
        struct dr_fs *fs = dr_fs_memory_new();
        struct dr_disk *disk = NULL;
        uint8_t *shadow = calloc(1, SMALL);
        _Atomic bool stop = false;
        ok(dr_create_fs(fs, "disk", &o, &err));
        ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
        if (k == 0) /* it moves, too, while it notes what they write */
            ok(dr_disk_bitmap_change(disk, "b", DR_BITMAP_ADD, NULL, &err));
        struct user users[2];
        for (unsigned i = 0; i < 2; i++) {
            users[i] = (struct user){disk, shadow, i * SMALL / 2, 11 + i, &stop, 0};
            assert_int_equal(pthread_create(&users[i].thread, NULL, use, &users[i]), 0);
        }
        uint64_t moved = 0, zeros = 0;
        for (unsigned i = 0; i < 12 || ((!moved || !zeros) && i < 1000); i++) {
            struct dr_compact_result result;
            ok(dr_disk_compact(disk, NULL, NULL, &result, &err));
            moved += result.moved;
            zeros += result.zeros;
        }
        assert_true(moved > 0 && zeros > 0);
        atomic_store(&stop, true);
        for (unsigned i = 0; i < 2; i++)
            pthread_join(users[i].thread, NULL);
        ok(dr_close(disk, &err));
        same_view(fs, "disk", shadow, SMALL);
        is_sound(fs, "disk");
        if (k == 0) {
            uint64_t dirty = 0;
            ok(dr_open_fs(fs, "disk", NULL, &disk, &err));
            ok(dr_disk_bitmap_read(disk, "b", add_up_dirty, &dirty, &err));
            ok(dr_close(disk, &err));
            assert_true(dirty > 0);
        }
        free(shadow);
        dr_fs_memory_free(fs);
    }
}

/* The place that was chosen for the refcount table has room for it as it was, not for the longer
 * one that a writer's clusters took meanwhile. */
static void a_refcount_table_that_grows_meanwhile_overwrites_nothing(void **state)
{
    struct dr_fs *fs = *state;
    static const struct dr_pair pairs[] = {{"cluster_size", "512"}, {"refcount_bits", "64"}};
    const struct dr_create_options o = {
        .format = "qcow2", .size = 16 * MiB, .has_size = true, .pairs = pairs, .n_pairs = 2};
    struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    ok(dr_create_fs(fs, "disk", &o, &err));
    fill(fs, "disk", "qcow2", 128 * KiB, 2 * MiB, 'd');
    fill(fs, "disk", "qcow2", 0, 2 * KiB, 'e');
    ok(dr_open_fs(fs, "disk", &rw, &disk, &err));
    ok(dr_discard(disk, 132 * KiB, 2 * MiB - 4 * KiB, &err));
    ok(dr_flush(disk, &err));
    struct dr_image *image = disk->chain->images[0];
    ok(dr_image_compact_begin(image, &err));
    uint8_t *buf = malloc(8 * MiB);
    memset(buf, 'f', 8 * MiB);
    ok(dr_pwrite(disk, buf, 4 * MiB, 8 * MiB, 0, &err));
    free(buf);
    ok(dr_discard(disk, 4 * MiB, 7 * MiB, &err));
    ok(dr_flush(disk, &err));
    uint8_t *want = malloc(16 * MiB);
    ok(dr_pread(disk, want, 0, 16 * MiB, &err));
    bool again = false;
    ok(dr_image_compact_finish(image, &again, &err));
    dr_image_compact_end(image);
    ok(dr_close(disk, &err));
    is_sound(fs, "disk");
    same_view(fs, "disk", want, 16 * MiB);
    free(want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(zeros_that_were_written_are_given_back),
        cmocka_unit_test(zeros_over_a_parent_stay_zeros),
        cmocka_unit_test(zeros_over_a_parent_s_zeros_are_given_back),
        ops_test(zeroed_grains_take_no_place_over_a_parent),
        ops_test(zeros_beside_what_a_parent_shows_hide_nothing),
        ops_test(a_parent_may_be_compacted),
        ops_test(without_looking_for_zeros_data_stays),
        cmocka_unit_test(what_stands_at_the_end_moves_into_gaps),
        cmocka_unit_test(a_unit_that_cannot_be_moved_is_told),
        ops_test(refcount_blocks_of_what_was_cut_go),
        ops_test(snapshots_inside_keep_what_they_show),
        ops_test(zeros_of_snapshots_inside_stay),
        cmocka_unit_test(a_dry_run_promises_no_more_than_comes),
        ops_test(a_damaged_directory_is_left_to_the_repair),
        cmocka_unit_test(an_open_disk_that_is_damaged_is_left_as_it_is),
        cmocka_unit_test(nothing_to_give_back_is_found_in_the_metadata),
        cmocka_unit_test(whatever_came_before_the_disk_reads_the_same),
        cmocka_unit_test(users_write_while_it_is_compacted),
        ops_test(refcount_blocks_that_count_each_other_go),
        ops_test(a_refcount_table_that_grows_meanwhile_overwrites_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
