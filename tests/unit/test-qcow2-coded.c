/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Places of compressed clusters, which lie byte by byte next to each other. */
#include "test-qcow2-snapshots.h"

#include "faultfs.h"

/* The place of one that could not be written is given back, and the next one does not follow it. */
static void a_compressed_write_that_fails_harms_none_after_it(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_GEOMETRIES; i++) {
        if (!geometries[i].coded)
            continue;
        struct dr_fs *fs = dr_fs_memory_new();
        struct faultfs *faults = faultfs_new(fs);
        create(fs, &geometries[i], SIZE);
        struct dr_disk *disk = open_disk(faultfs_fs(faults));
        struct dr_image *image = top_of(disk);
        uint64_t start, cluster;
        image->fmt->unit(image, 0, &start, &cluster);
        uint8_t *expected = calloc(1, SIZE), *coded = malloc(cluster);
        write_coded(disk, 0, 2 * cluster, 1);
        fill(expected, 0, 2 * cluster, 1);
        fill(expected + 2 * cluster, 2 * cluster, 4 * cluster, 2);
        int64_t n =
            image->fmt->encode(image, expected + 2 * cluster, cluster, 2 * cluster, coded, cluster);
        assert_true(n > 0);
        faultfs_arm(faults, &(struct faultfs_plan){.kinds = 1u << FAULTFS_WRITE, .error = ENOSPC});
        refused(
            dr_chain_write_coded(disk->chain, 0, coded, (uint32_t)n, 2 * cluster, cluster, &err),
            ENOSPC, "");
        assert_true(faultfs_fired(faults));
        faultfs_disarm(faults);
        write_coded(disk, 2 * cluster, 4 * cluster, 2);
        ok(dr_close(disk, &err));
        check_clean(fs);
        view_is(fs, NULL, expected);
        free(expected);
        free(coded);
        faultfs_free(faults);
        dr_fs_memory_free(fs);
    }
}

struct meanwhile {
    struct dr_disk *disk;
    uint64_t off, cluster;
    bool done;
};

/* The first write fails, and while it is under way a plain one takes the next place. */
static int write_plain_and_fail(void *user, const struct faultfs_io *io)
{
    struct meanwhile *m = user;
    if (io->kind != FAULTFS_WRITE || m->done)
        return 0;
    m->done = true;
    write_version(m->disk, m->off, m->cluster, 3);
    return -ENOSPC;
}

/* Half of the cluster does not get smaller. */
static void write_half_coded(struct dr_disk *disk, uint64_t off, uint64_t cluster, int expected)
{
    struct dr_image *image = top_of(disk);
    uint8_t *plain = calloc(1, cluster), *coded = malloc(cluster);
    uint64_t seed = off + 1;
    for (uint64_t i = 0; i < cluster / 2; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
        plain[i] = (uint8_t)(seed >> 56);
    }
    int64_t n = image->fmt->encode(image, plain, cluster, off, coded, cluster);
    assert_in_range(n, cluster / 2, cluster - 1);
    assert_int_equal(dr_chain_write_coded(disk->chain, 0, coded, (uint32_t)n, off, cluster, NULL),
                     expected);
    free(plain);
    free(coded);
}

/* A place that lies in two clusters, of which another one has a part, too: the second is free when
 * the write has failed, though others lie behind it by then. */
static void a_compressed_write_that_fails_gives_its_second_cluster_back(void **state)
{
    (void)state;
    const struct geometry small = {PAIRS({"cluster_size", "4096"})};
    struct dr_fs *fs = dr_fs_memory_new();
    struct faultfs *faults = faultfs_new(fs);
    create(fs, &small, SIZE);
    struct dr_disk *disk = open_disk(faultfs_fs(faults));
    const struct dr_file *file = top_of(disk)->files[0];
    struct meanwhile m = {.disk = disk, .off = 40 * KiB, .cluster = 4096};
    write_half_coded(disk, 0, 4096, 0);
    faultfs_observe(faults, write_plain_and_fail, &m);
    write_half_coded(disk, 4096, 4096, -ENOSPC);
    faultfs_observe(faults, NULL, NULL);
    assert_true(m.done);
    uint64_t end = dr_file_size(file);
    write_version(disk, 80 * KiB, 4096, 4);
    assert_int_equal(dr_file_size(file), end);
    ok(dr_close(disk, &err));
    check_clean(fs);
    faultfs_free(faults);
    dr_fs_memory_free(fs);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_compressed_write_that_fails_harms_none_after_it),
        cmocka_unit_test(a_compressed_write_that_fails_gives_its_second_cluster_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
