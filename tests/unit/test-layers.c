/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Chains whose layers stand in several file systems, and what is asked of all layers at once. */
#include "test-ops.h"

#include <stdio.h>

#include "faultfs.h"

#define SIZE  (1 * MiB)
#define GRAIN (64 * KiB)

/* ------------------------------------------------------------------ durable layers */

struct counts {
    _Atomic unsigned flushes, dirs;
};

static int count_io(void *user, const struct faultfs_io *io)
{
    struct counts *c = user;
    if (io->kind == FAULTFS_FLUSH)
        atomic_fetch_add(&c->flushes, 1);
    if (io->kind == FAULTFS_SYNC_DIR)
        atomic_fetch_add(&c->dirs, 1);
    return 0;
}

static int fail_one_flush(void *user, const struct faultfs_io *io)
{
    return io->kind == FAULTFS_FLUSH && strstr(io->path, (const char *)user) ? -EIO : 0;
}

static int refuse_data(void *user, const struct faultfs_io *io)
{
    int *left = user;
    return io->kind == FAULTFS_FLUSH && *left > 0 && (*left)-- ? -ENOSPC : 0;
}

/* Who is told that there is no space tries again when there is some. */
static void data_that_had_no_space_is_lost_and_not_waited_for(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    const struct dr_open_options rw = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    int left = 1;
    make(memory, "/d", "qcow2", SIZE, NULL);
    ok(dr_open_fs(faultfs_fs(fault), "/d", &rw, &disk, &err));
    ok(dr_pwrite(disk, "data", 0, 4, 0, &err));
    faultfs_observe(fault, refuse_data, &left);
    refused(dr_flush(disk, &err), ENOSPC, "");
    refused(dr_flush(disk, &err), EIO, "what was written since the last good one may be lost");
    refused(dr_close(disk, &err), EIO, "a flush failed");
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

#define LAYERS 40

static void make_layers(struct dr_fs *fs)
{
    char path[32], parent[32];
    make(fs, "/d/0.vmdk", "vmdk", SIZE, NULL);
    for (int i = 1; i < LAYERS; i++) {
        snprintf(path, sizeof(path), "/d/%d.vmdk", i);
        snprintf(parent, sizeof(parent), "%d.vmdk", i - 1);
        make(fs, path, "vmdk", SIZE, parent);
    }
}

static void each_layer_is_flushed_once_and_their_directory_once(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct dr_disk *disk = NULL;
    struct counts c = {0};
    make_layers(memory);
    ok(dr_open_fs(faultfs_fs(fault), "/d/39.vmdk", NULL, &disk, &err));
    struct dr_chain *chain = dr_disk_chain(disk);
    faultfs_observe(fault, count_io, &c);
    ok(dr_chain_harden(chain, 0, &err));
    assert_int_equal(c.flushes, LAYERS);
    assert_int_equal(c.dirs, 1);
    c.flushes = c.dirs = 0;
    ok(dr_chain_harden(chain, LAYERS - 3, &err));
    assert_int_equal(c.flushes, 3);
    ok(dr_chain_harden(chain, LAYERS, &err)); /* nothing below */
    faultfs_observe(fault, NULL, NULL);
    dr_chain_unref(chain, NULL);
    ok(dr_close(disk, &err));
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

static void a_layer_that_cannot_be_made_durable_is_named(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct dr_disk *disk = NULL;
    make_layers(memory);
    ok(dr_open_fs(faultfs_fs(fault), "/d/39.vmdk", NULL, &disk, &err));
    struct dr_chain *chain = dr_disk_chain(disk);
    faultfs_observe(fault, fail_one_flush, "/d/17.vmdk");
    refused(dr_chain_harden(chain, 0, &err), EIO, "/d/17.vmdk");
    faultfs_observe(fault, NULL, NULL);
    dr_chain_unref(chain, NULL);
    dr_close(disk, NULL);
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

/* ------------------------------------------------------------------ discards */

/* Without a parent there is nothing to hide: the grain is given back, entry and all. */
static void a_discard_on_the_lowest_layer_leaves_a_hole(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    struct dr_extent ext;
    make(memory, "/d/x.vmdk", "vmdk", SIZE, NULL);
    put(memory, "/d/x.vmdk", 0, 2 * GRAIN, 5);
    ok(dr_open_fs(memory, "/d/x.vmdk", &o, &disk, &err));
    ok(dr_discard(disk, 0, GRAIN, &err));
    ok(dr_image_map(disk->chain->images[0], 0, GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_HOLE);
    ok(dr_image_map(disk->chain->images[0], GRAIN, GRAIN, &ext, &err));
    assert_int_equal(ext.kind, DR_DATA);
    ok(dr_close(disk, &err));
    dr_fs_memory_free(memory);
}

/* ------------------------------------------------------------------ several file systems */

struct two {
    struct dr_fs *upper, *lower;
    struct dr_chain *chain; /* a VMDK in upper over a raw image in lower, both called /d/x */
};

static struct dr_image *open_one(struct dr_fs *fs, const char *path, const char *format,
                                 unsigned flags)
{
    struct dr_image *image = NULL;
    ok(dr_image_open(fs, path, format, flags, &image, &err));
    return image;
}

static int two_up(void **state)
{
    struct two *t = calloc(1, sizeof(*t));
    t->upper = dr_fs_memory_new();
    t->lower = dr_fs_memory_new();
    make(t->upper, "/d/x", "vmdk", SIZE, NULL);
    make(t->lower, "/d/x", "raw", SIZE, NULL);
    put(t->lower, "/d/x", 0, SIZE, 0x77);
    struct dr_image *images[] = {open_one(t->upper, "/d/x", "vmdk", DR_OPEN_RDWR),
                                 open_one(t->lower, "/d/x", "raw", 0)};
    t->chain = dr_chain_new(images, 2);
    *state = t;
    return 0;
}

static int two_down(void **state)
{
    struct two *t = *state;
    int r = dr_chain_unref(t->chain, NULL);
    dr_fs_memory_free(t->upper);
    dr_fs_memory_free(t->lower);
    free(t);
    return r;
}

static void layers_of_two_file_systems_are_different_files(void **state)
{
    struct two *t = *state;
    assert_false(dr_same_id(dr_image_id(t->chain->images[0]), dr_image_id(t->chain->images[1])));
}

static void a_write_brings_its_edges_from_the_other_file_system(void **state)
{
    struct two *t = *state;
    uint8_t buf[GRAIN];
    ok(dr_chain_write(t->chain, 0, "new", 1000, 3, &err));
    ok(dr_chain_flush(t->chain, 0, &err));
    ok(dr_chain_read(t->chain, 0, buf, 0, sizeof(buf), &err));
    assert_int_equal(buf[999], 0x77);
    assert_memory_equal(buf + 1000, "new", 3);
    assert_int_equal(buf[1003], 0x77);
    uint64_t size;
    uint8_t *alone = view(t->lower, "/d/x", &size); /* the parent is as it was */
    for (uint64_t i = 0; i < size; i++)
        assert_int_equal(alone[i], 0x77);
    free(alone);
}

/* Bytes that the file systems cannot copy among themselves go through memory. */
static void a_transfer_between_file_systems_copies_everything(void **state)
{
    struct two *t = *state;
    struct dr_transfer transfer = {
        .dst = t->chain, .dst_at = 0, .to_file = true, .block = 4096, .write_zeros = true};
    struct dr_chain *source = dr_chain_tail(t->chain, 1);
    uint8_t buf[GRAIN];
    dr_walk_init(&transfer.walk, source, 0, source->n, SIZE);
    ok(dr_transfer_run(&transfer, SIZE, NULL, &err));
    struct dr_place place;
    for (uint64_t off = 0; off < SIZE; off += GRAIN) {
        ok(dr_chain_map(t->chain, 0, off, GRAIN, &place, &err));
        assert_int_equal(place.owner, 0);
        dr_place_done(&place);
        ok(dr_chain_read(t->chain, 0, buf, off, sizeof(buf), &err));
        assert_int_equal(buf[0], 0x77);
        assert_int_equal(buf[sizeof(buf) - 1], 0x77);
    }
    dr_chain_unref(source, NULL);
}

#define T(name) cmocka_unit_test_setup_teardown(name, two_up, two_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(data_that_had_no_space_is_lost_and_not_waited_for),
        cmocka_unit_test(each_layer_is_flushed_once_and_their_directory_once),
        cmocka_unit_test(a_layer_that_cannot_be_made_durable_is_named),
        cmocka_unit_test(a_discard_on_the_lowest_layer_leaves_a_hole),
        T(layers_of_two_file_systems_are_different_files),
        T(a_write_brings_its_edges_from_the_other_file_system),
        T(a_transfer_between_file_systems_copies_everything),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
