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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_compressed_write_that_fails_harms_none_after_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
