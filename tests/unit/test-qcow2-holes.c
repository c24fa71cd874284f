/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where some view of a qcow2 image with snapshots has a hole, so that another parent would show
 * there: what the driver says of all views together is compared with what each view's map says. */
#include "formats/qcow2/qcow2.h"
#include "test-qcow2-snapshots.h"

#define LARGER (SIZE + 40 * KiB + 512)

static const char *const views[] = {NULL, "1", "2"}; /* the disk, and its snapshots */
#define N_VIEWS 3

static void make_parent(struct dr_fs *fs, uint64_t size)
{
    struct dr_create_options o = {.format = "raw", .size = size, .has_size = true};
    struct dr_file *f;
    ok(dr_create_fs(fs, "dir/old.raw", &o, &err));
    ok(dr_file_open(fs, "dir/old.raw", DR_FILE_RDWR, &f, &err));
    for (uint64_t off = 0; off < size; off += 512)
        ok(dr_file_pwrite(f, "old", off, 3, &err));
    dr_file_unref(f);
}

/* Data in one view, in two and in all; zeros over holes; a disk that is longer than its snapshots.
 */
static void make_views(struct dr_fs *fs, const struct geometry *g)
{
    bool v2 = g->n > 1 && strcmp(g->pairs[1].value, "0.10") == 0;
    struct dr_create_options o = {.format = "qcow2",
                                  .size = SIZE,
                                  .has_size = true,
                                  .pairs = g->pairs,
                                  .n_pairs = g->n,
                                  .backing = "old.raw",
                                  .backing_format = "raw"};
    make_parent(fs, LARGER);
    ok(dr_create_fs(fs, PATH, &o, &err));
    struct dr_disk *disk = open_disk(fs);
    write_version(disk, 5 * KiB, 30 * KiB, 1);
    ok(dr_image_snapshot_create(top_of(disk), "one", &err));
    write_version(disk, 20 * KiB, 25 * KiB, 2);
    write_version(disk, 80 * KiB, 8 * KiB, 2);
    if (!v2)
        ok(dr_zero(disk, 60 * KiB, 4 * KiB, 0, &err));
    ok(dr_image_snapshot_create(top_of(disk), "two", &err));
    write_version(disk, 0, 5 * KiB, 3);
    write_version(disk, 50 * KiB, 2 * KiB, 3);
    if (!v2)
        ok(dr_truncate(disk, LARGER, &err));
    ok(dr_close(disk, &err));
}

/* Sets a byte of holes for every cluster in which the view has one. */
static void note_holes(struct dr_fs *fs, const char *view, uint64_t cluster, uint8_t *holes)
{
    struct dr_open_options o = {.snapshot = view, .flags = DR_OPEN_FORCE_SHARE};
    struct dr_disk *disk;
    ok(dr_open_fs(fs, PATH, &o, &disk, &err));
    struct dr_extent ext;
    for (uint64_t off = 0, size = dr_size(disk); off < size; off += ext.len) {
        ok(dr_image_map(top_of(disk), off, size - off, &ext, &err));
        for (uint64_t i = off / cluster; ext.kind == DR_HOLE && i * cluster < off + ext.len; i++)
            holes[i] = 1;
    }
    ok(dr_close(disk, &err));
}

static void check_answer(struct dr_image *image, const uint8_t *holes, uint64_t cluster,
                         uint64_t off, uint64_t len)
{
    uint64_t got = len;
    bool hole;
    ok(dr_image_views_hole(image, off, &got, &hole, &err));
    assert_in_range(got, 1, len);
    for (uint64_t i = off / cluster; i * cluster < off + got; i++)
        if (holes[i] != hole)
            fail_msg("%llu+%llu: cluster %llu is said to be %s hole", (unsigned long long)off,
                     (unsigned long long)got, (unsigned long long)i, hole ? "a" : "no");
}

static void each_hole_of_a_view_is_told_and_no_other(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        struct dr_fs *fs = dr_fs_memory_new();
        make_views(fs, &geometries[i]);
        struct dr_disk *disk = open_disk(fs);
        struct dr_image *image = top_of(disk);
        struct dr_views all = {0};
        uint64_t start, cluster, size = dr_size(disk);
        uint8_t holes[LARGER / 512 + 1] = {0};
        image->fmt->unit(image, 0, &start, &cluster);
        for (size_t k = 0; k < N_VIEWS; k++)
            note_holes(fs, views[k], cluster, holes);
        ok(dr_image_views_begin(image, &all, &err));
        const uint64_t lengths[] = {512, cluster, 3 * cluster, 65 * cluster, size};
        for (size_t k = 0; k < sizeof(lengths) / sizeof(lengths[0]); k++)
            for (uint64_t off = 0; off < size; off += 512)
                check_answer(image, holes, cluster, off, dr_min(lengths[k], size - off));
        for (uint64_t off = size; off > 0; off -= 512) /* each answer is forgotten for the next */
            check_answer(image, holes, cluster, off - 512, 512);
        ok(dr_image_views_end(image, &err));
        ok(dr_close(disk, &err));
        dr_fs_memory_free(fs);
    }
}

static uint64_t peek(struct dr_fs *fs, uint64_t off)
{
    struct dr_file *f;
    uint8_t raw[8];
    ok(dr_file_open(fs, PATH, DR_FILE_NO_LOCK, &f, &err));
    ok(dr_file_pread(f, raw, off, sizeof(raw), &err));
    dr_file_unref(f);
    return get_be64(raw);
}

/* Nobody else uses it, so nothing need be copied. */
static void a_table_of_the_disk_alone_is_filled_where_it_is(void **state)
{
    (void)state;
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_rebase_options o = {.backing = ""};
    make_views(fs, &geometries[0]);
    uint64_t l1 = peek(fs, QCOW2_AT_L1 + 4), before = peek(fs, l1);
    uint64_t first = peek(fs, l1) & QCOW2_OFFSET, hole = first + 70 * KiB / 4096 * 8;
    assert_int_equal(peek(fs, hole), 0);
    ok(dr_rebase_fs(fs, PATH, &o, NULL, &err));
    assert_int_equal(peek(fs, l1), before);
    assert_int_not_equal(peek(fs, hole), 0);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(each_hole_of_a_view_is_told_and_no_other),
        cmocka_unit_test(a_table_of_the_disk_alone_is_filled_where_it_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
