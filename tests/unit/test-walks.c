/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a walk over a disk costs: questions to the drivers, reads of metadata pages, questions about
 * holes of the files. The costs of a walk in docs/design.md are counted here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/core.h"
#include "faultfs.h"
#include "ops/ops-internal.h"
#include "toy.h"
#include "outcome.h"

#define KIB UINT64_C(1024)
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)

/* ------------------------------------------------------------------ operations walk once */

static _Atomic uint64_t asked; /* calls of map */
static struct dr_format counted;

static int counted_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                       struct dr_error *err)
{
    int r = dr_format_toy.map(image, off, len, ext, err);
    asked += r == 0;
    return r;
}

static uint64_t free_bytes;

static int some_space(struct dr_fs *fs, const char *path, uint64_t *bytes, struct dr_error *err)
{
    (void)fs, (void)path, (void)err;
    *bytes = free_bytes;
    return 0;
}

#define SIZE (4 * MIB)
enum { PIECES = 64 };

static void make_toy(struct dr_fs *fs, const char *path, const char *backing, uint8_t byte)
{
    struct dr_create_params p = {
        .size = SIZE, .backing_name = backing, .backing_format = backing ? "toy" : NULL};
    struct dr_open_options open = {.flags = DR_OPEN_RDWR | DR_OPEN_NO_BACKING};
    struct dr_disk *disk;
    uint8_t buf[512];
    memset(buf, byte, sizeof(buf));
    ok(dr_format_toy.create(fs, path, &p, &err));
    ok(dr_open_fs(fs, path, &open, &disk, &err));
    for (uint64_t i = 0; i < PIECES; i++)
        ok(dr_pwrite(disk, buf, i * (SIZE / PIECES) + byte * 512u, sizeof(buf), 0, &err));
    ok(dr_close(disk, &err));
}

static void convert_it(struct dr_fs *fs)
{
    const char *from = "dir/top.toy";
    ok(dr_convert_fs(fs, &from, 1, "dir/target", NULL, NULL, &err));
}

static void commit_it(struct dr_fs *fs)
{
    struct dr_commit_options o = {.keep = true};
    ok(dr_commit_fs(fs, "dir/top.toy", &o, NULL, &err));
}

static void rebase_it(struct dr_fs *fs)
{
    struct dr_rebase_options o = {.backing = ""};
    ok(dr_rebase_fs(fs, "dir/top.toy", &o, NULL, &err));
}

/* Questions that the operation puts to the drivers when there is this much space. */
static uint64_t asked_with_space(void (*operation)(struct dr_fs *), uint64_t space)
{
    struct dr_fs *fs = dr_fs_memory_new();
    assert_non_null(fs);
    struct dr_fs_ops ops = *fs->ops;
    ops.free_space = some_space;
    fs->ops = &ops;
    free_bytes = space;
    make_toy(fs, "dir/base.toy", NULL, 1);
    make_toy(fs, "dir/top.toy", "base.toy", 2);
    uint64_t before = asked;
    operation(fs);
    before = asked - before;
    dr_fs_memory_free(fs);
    return before;
}

/* Only where the disk might not fit is it looked through beforehand for what is to be copied. */
static void operations_walk_once_where_all_of_the_disk_would_fit(void **state)
{
    static const struct {
        const char *name;
        void (*run)(struct dr_fs *);
    } operations[] = {{"convert", convert_it}, {"commit", commit_it}, {"rebase", rebase_it}};
    (void)state;
    counted = dr_format_toy;
    counted.map = counted_map;
    dr_format_register(&counted);
    for (size_t i = 0; i < sizeof(operations) / sizeof(operations[0]); i++) {
        uint64_t once = asked_with_space(operations[i].run, SIZE);
        uint64_t twice = asked_with_space(operations[i].run, SIZE - 1);
        if (once + PIECES > twice)
            fail_msg("%s: %llu questions, %llu where it must look", operations[i].name,
                     (unsigned long long)once, (unsigned long long)twice);
    }
    dr_format_register(NULL);
}

/* ------------------------------------------------------------------ pages */

enum { LAYERS = 100, SCATTERED = 2000, WINDOWS = 2048 };

static void path_of(char path[64], const char *format, unsigned i)
{
    snprintf(path, 64, "dir/l%u.%s", i, format);
}

/* Layer i on layer i - 1, with every LAYERS-th piece or so; part LAYERS: with none. */
static void make_layer(struct dr_fs *fs, const char *format, unsigned i, unsigned part)
{
    char path[64], parent[64];
    struct dr_image *below = NULL;
    struct dr_disk *disk;
    struct dr_open_options open = {.format = format, .flags = DR_OPEN_RDWR | DR_OPEN_NO_BACKING};
    static uint8_t buf[64 * KIB];
    memset(buf, 0x5a, sizeof(buf));
    path_of(path, format, i);
    path_of(parent, format, i - 1);
    if (i > 0)
        ok(dr_image_open(fs, parent, format, DR_OPEN_NO_BACKING, &below, &err));
    struct dr_create_params p = {.size = 64 * GIB,
                                 .backing = below,
                                 .backing_name = i ? strrchr(parent, '/') + 1 : NULL,
                                 .backing_format = i ? format : NULL};
    ok(dr_format_find(format)->create(fs, path, &p, &err));
    dr_image_unref(below, NULL);
    ok(dr_open_fs(fs, path, &open, &disk, &err));
    for (uint64_t piece = 0; piece < SCATTERED; piece++)
        if (piece * 7919 % 104729 % LAYERS == part)
            ok(dr_pwrite(disk, buf, piece * (32 * MIB), sizeof(buf), 0, &err));
    ok(dr_close(disk, &err));
}

/* The number of pieces. */
static uint64_t walk(struct dr_chain *chain)
{
    uint64_t pieces = 0, size = chain->images[0]->size;
    for (uint64_t off = 0; off < size;) {
        struct dr_place place;
        ok(dr_chain_map(chain, 0, off, size - off, &place, &err));
        pieces += place.ext.kind == DR_DATA;
        dr_place_done(&place);
        off += place.ext.len;
    }
    return pieces;
}

static void a_walk_reads_a_page_for_each_piece_and_a_few_for_each_layer(void **state)
{
    static const char *const formats[] = {"vmdk", "add-cow"};
    (void)state;
    for (size_t f = 0; f < 2; f++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *fault = faultfs_new(memory);
        struct dr_fs *fs = faultfs_fs(fault);
        struct dr_disk *disk;
        char path[64];
        for (unsigned i = 0; i < LAYERS; i++)
            make_layer(fs, formats[f], i, i);
        path_of(path, formats[f], LAYERS - 1);
        struct dr_open_options open = {.format = formats[f]};
        ok(dr_open_fs(fs, path, &open, &disk, &err));
        struct dr_chain *chain = dr_disk_chain(disk);
        faultfs_reset(fault);
        assert_int_equal(walk(chain), SCATTERED);
        assert_true(faultfs_count_of(fault, FAULTFS_READ) <= SCATTERED + 4 * LAYERS);
        assert_true(faultfs_count_of(fault, FAULTFS_EXTENT) <= SCATTERED + 4 * LAYERS);
        faultfs_reset(fault); /* all that is needed is in memory now */
        assert_int_equal(walk(chain), SCATTERED);
        assert_int_equal(faultfs_count(fault), 0);
        /* windows of at most 3 segments, and where to find them */
        assert_true(dr_index_bytes() <= WINDOWS * (40 + 3 * 8 + 8) + 64);
        dr_chain_unref(chain, NULL);
        ok(dr_close(disk, &err));
        faultfs_free(fault);
        dr_fs_memory_free(memory);
    }
}

static void an_empty_layer_costs_a_walk_one_or_two_reads_and_a_question_about_holes(void **state)
{
    static const char *const formats[] = {"vmdk", "add-cow"};
    static const unsigned most[] = {1, 2};
    (void)state;
    for (size_t f = 0; f < 2; f++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *fault = faultfs_new(memory);
        struct dr_open_options open = {.format = formats[f]};
        uint64_t reads[2], questions[2], pieces = 0;
        for (unsigned depth = 0, i = 0; depth < 2; depth++) {
            struct dr_disk *disk;
            char path[64];
            for (; i <= depth * LAYERS; i++)
                make_layer(faultfs_fs(fault), formats[f], i, i ? LAYERS : 0);
            path_of(path, formats[f], i - 1);
            ok(dr_open_fs(faultfs_fs(fault), path, &open, &disk, &err));
            struct dr_chain *chain = dr_disk_chain(disk);
            faultfs_reset(fault);
            uint64_t found = walk(chain);
            assert_true(found > 0 && (depth == 0 || found == pieces));
            pieces = found;
            reads[depth] = faultfs_count_of(fault, FAULTFS_READ);
            questions[depth] = faultfs_count_of(fault, FAULTFS_EXTENT);
            dr_chain_unref(chain, NULL);
            ok(dr_close(disk, &err));
        }
        assert_true(reads[1] <= reads[0] + most[f] * LAYERS);
        assert_true(questions[1] <= questions[0] + LAYERS);
        faultfs_free(fault);
        dr_fs_memory_free(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(operations_walk_once_where_all_of_the_disk_would_fit),
        cmocka_unit_test(an_empty_layer_costs_a_walk_one_or_two_reads_and_a_question_about_holes),
        cmocka_unit_test(a_walk_reads_a_page_for_each_piece_and_a_few_for_each_layer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
