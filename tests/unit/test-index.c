/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The index of a chain says what asking layer by layer says, with random chains, threads and little
 * memory; and its answers cost the same however deep the chain is, counted in questions to the
 * drivers.
 *
 * Most chains are of a driver whose images are one line of text, "PAT size seed unit share parent":
 * what a unit of an image is (nothing, zeros, or bytes at a place) follows from the seed, and
 * `share` of 1000 are something. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "core/internal.h"
#include "drover/drover.h"
#include "ops/ops-internal.h"
#include "outcome.h"

#define KIB UINT64_C(1024)
#define MIB (1024 * KIB)
#define GIB (1024 * MIB)

/* ------------------------------------------------------------------ the driver */

struct pat {
    uint64_t seed, unit, share;
};

static _Atomic uint64_t asked; /* calls of map */

static int pat_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    return len >= 4 && memcmp(buf, "PAT ", 4) == 0 ? 100 : 0;
}

static int pat_open(struct dr_image *image, struct dr_error *err)
{
    char text[256] = "", parent[128] = "";
    unsigned long long size, seed, unit, share;
    int r = dr_file_pread_short(image->files[0], text, 0, sizeof(text) - 1, NULL, err);
    if (r < 0)
        return r;
    if (sscanf(text, "PAT %llu %llu %llu %llu %127s", &size, &seed, &unit, &share, parent) < 4)
        return dr_fail(err, EINVAL, "%s: not understood", image->path);
    struct pat *p = malloc(sizeof(*p));
    *p = (struct pat){.seed = seed, .unit = unit, .share = share};
    image->state = p;
    image->size = size;
    if (*parent) {
        image->backing_name = strdup(parent);
        image->backing_format = strdup("pat");
    }
    return 0;
}

static void pat_close(struct dr_image *image)
{
    free(image->state);
}

static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 31) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 32;
}

static enum dr_kind pat_kind(const struct pat *p, uint64_t unit)
{
    uint64_t x = mixed(p->seed + mixed(unit));
    if (p->share == 0 || x % 1000 >= p->share)
        return DR_HOLE;
    return x >> 32 & 1 ? DR_ZERO : DR_DATA;
}

static int pat_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                   struct dr_error *err)
{
    (void)err;
    const struct pat *p = image->state;
    uint64_t first = off / p->unit, n = 1;
    enum dr_kind kind = pat_kind(p, first);
    atomic_fetch_add(&asked, 1);
    while ((first + n) * p->unit < off + len && p->share > 0 && pat_kind(p, first + n) == kind)
        n++;
    uint64_t end = p->share > 0 ? (first + n) * p->unit : off + len;
    *ext = (struct dr_extent){.kind = kind, .len = dr_min(len, end - off)};
    if (kind == DR_DATA) {
        ext->file = image->files[0];
        ext->host = off;
    }
    return 0;
}

static const struct dr_format pat_format = {
    .name = "pat",
    .flags = DR_FORMAT_BACKING,
    .probe = pat_probe,
    .open = pat_open,
    .close = pat_close,
    .map = pat_map,
};

/* ------------------------------------------------------------------ chains */

static int setup(void **state)
{
    dr_format_register(&pat_format);
    *state = dr_fs_memory_new();
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    const struct dr_cache_limits usual = {.index = 32 * MIB};
    dr_set_cache_limits(&usual, NULL);
    dr_fs_memory_free(*state);
    dr_format_register(NULL);
    return 0;
}

static const char *layer(char name[32], unsigned i)
{
    snprintf(name, 32, "dir/p%u", i);
    return name;
}

/* Image i, on image i + 1 unless it is the last. */
static void make_layer(struct dr_fs *fs, unsigned i, bool last, uint64_t size, uint64_t seed,
                       uint64_t unit, uint64_t share)
{
    char name[32], text[200];
    struct dr_file *file;
    int n = snprintf(text, sizeof(text), "PAT %llu %llu %llu %llu ", (unsigned long long)size,
                     (unsigned long long)seed, (unsigned long long)unit, (unsigned long long)share);
    if (!last)
        snprintf(text + n, sizeof(text) - (size_t)n, "p%u", i + 1);
    unsigned flags = DR_FILE_RDWR | DR_FILE_CREATE | DR_FILE_TRUNCATE;
    ok(dr_file_open(fs, layer(name, i), flags, &file, &err));
    ok(dr_file_pwrite(file, text, 0, strlen(text), &err));
    dr_file_unref(file);
}

static struct dr_disk *open_top(struct dr_fs *fs, const char *path, unsigned flags)
{
    struct dr_disk *disk;
    struct dr_open_options open = {.flags = flags};
    ok(dr_open_fs(fs, path, &open, &disk, &err));
    return disk;
}

/* ------------------------------------------------------------------ layer by layer */

static void plain_map(struct dr_chain *chain, size_t first, size_t last, uint64_t off,
                      struct dr_place *place)
{
    *place = (struct dr_place){.owner = chain->n, .ext.kind = DR_HOLE};
    for (size_t i = first; i < last; i++) {
        struct dr_image *image = chain->images[i];
        if (off >= image->size) {
            *place = (struct dr_place){.owner = i, .ext.kind = DR_ZERO, .past_end = true};
            return;
        }
        ok(dr_image_map(image, off, 1, &place->ext, &err));
        if (place->ext.kind != DR_HOLE) {
            place->owner = i;
            return;
        }
    }
}

static void assert_same_place(struct dr_chain *chain, size_t first, size_t last, uint64_t off,
                              const struct dr_place *place, uint64_t at)
{
    struct dr_place plain;
    plain_map(chain, first, last, off + at, &plain);
    bool same = plain.owner == place->owner && plain.past_end == place->past_end &&
                plain.ext.kind == place->ext.kind && plain.ext.file == place->ext.file;
    if (same && plain.ext.kind == DR_DATA)
        same = plain.ext.host == place->ext.host + at;
    if (!same)
        fail_msg("byte %llu of images %zu to %zu: kind %d, owner %zu; layer by layer: kind %d, "
                 "owner %zu",
                 (unsigned long long)(off + at), first, last, place->ext.kind, place->owner,
                 plain.ext.kind, plain.owner);
}

/* One question, and its answer at both ends and in the middle. */
static void compare_at(struct dr_chain *chain, size_t first, size_t last, uint64_t off,
                       uint64_t len)
{
    struct dr_place place;
    ok(dr_chain_map_part(chain, first, last, off, len, &place, &err));
    assert_true(place.ext.len > 0 && place.ext.len <= len);
    assert_same_place(chain, first, last, off, &place, 0);
    assert_same_place(chain, first, last, off, &place, place.ext.len / 2);
    assert_same_place(chain, first, last, off, &place, place.ext.len - 1);
    dr_place_done(&place);
}

struct asker {
    struct dr_chain *chain;
    uint64_t seed;
    unsigned n;
};

static void *ask_at_random(void *user)
{
    struct asker *a = user;
    for (unsigned i = 0; i < a->n; i++) {
        uint64_t x = mixed(a->seed + i), y = mixed(x);
        size_t first = x % 4 ? 0 : (size_t)(x >> 8) % a->chain->n;
        size_t last = y % 4 ? a->chain->n : first + 1 + (size_t)(y >> 8) % (a->chain->n - first);
        uint64_t size = a->chain->images[first]->size, off = mixed(y) % size;
        uint64_t len = y >> 40 & 1 ? size - off : dr_min(size - off, UINT64_C(4096));
        compare_at(a->chain, first, last, off, len);
    }
    return NULL;
}

static void ask_by_threads(struct dr_chain *chain, uint64_t seed, unsigned n)
{
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    struct asker askers[THREADS];
    for (unsigned t = 0; t < THREADS; t++) {
        askers[t] = (struct asker){.chain = chain, .seed = seed * 100 + t, .n = n};
        assert_int_equal(pthread_create(&threads[t], NULL, ask_at_random, &askers[t]), 0);
    }
    for (unsigned t = 0; t < THREADS; t++)
        pthread_join(threads[t], NULL);
}

/* ------------------------------------------------------------------ the same answers */

static void the_index_says_what_the_layers_say(void **state)
{
    struct dr_fs *fs = *state;
    static const uint64_t units[] = {64 * KIB, 4 * KIB, 512, 1 * MIB, 40 * MIB};
    static const uint64_t shares[] = {0, 1, 20, 300};
    for (uint64_t seed = 1; seed <= 12; seed++) {
        unsigned n = 2 + (unsigned)(mixed(seed) % 12);
        for (unsigned i = 0; i < n; i++) {
            uint64_t x = mixed(seed * 1000 + i);
            uint64_t size = x % 3 ? 200 * MIB : 1 + mixed(x) % (300 * MIB);
            make_layer(fs, i, i + 1 == n, size, x, units[x >> 8 & 3], shares[x >> 16 & 3]);
        }
        struct dr_disk *disk = open_top(fs, "dir/p0", 0);
        struct dr_chain *chain = dr_disk_chain(disk);
        ask_by_threads(chain, seed, 300);
        dr_chain_unref(chain, NULL);
        dr_close(disk, NULL);
    }
    assert_int_equal(dr_index_bytes(), 0);
}

static void a_long_run_of_one_owner_ends_where_it_ends(void **state)
{
    struct dr_fs *fs = *state;
    make_layer(fs, 0, false, 100 * GIB + 5, 1, 64 * KIB, 0);
    make_layer(fs, 1, false, 90 * GIB + 77, 2, 40 * MIB, 1);
    make_layer(fs, 2, false, 95 * GIB, 3, 64 * KIB, 0);
    make_layer(fs, 3, true, 80 * GIB + 1, 4, 3 * GIB, 500);
    struct dr_disk *disk = open_top(fs, "dir/p0", 0);
    struct dr_chain *chain = dr_disk_chain(disk);
    for (uint64_t off = 0; off < 100 * GIB + 5;) {
        struct dr_place place;
        compare_at(chain, 0, 4, off, 100 * GIB + 5 - off);
        ok(dr_chain_map(chain, 0, off, 100 * GIB + 5 - off, &place, &err));
        dr_place_done(&place);
        off += place.ext.len;
    }
    ask_by_threads(chain, 5, 300);
    dr_chain_unref(chain, NULL);
    dr_close(disk, NULL);
}

static void write_byte(struct dr_fs *fs, const char *path, uint64_t off, size_t len, int byte)
{
    struct dr_disk *disk = open_top(fs, path, DR_OPEN_RDWR);
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

/* What is known beyond a window ends where the next of the upper layer's bytes stand, also when a
 * walk has come to the window, which asks the layer about it only once. */
static void a_hole_of_a_walk_ends_where_it_ends(void **state)
{
    struct dr_fs *fs = *state;
    static const struct dr_pair small = {"cluster_size", "16k"}; /* a table has 32 MiB */
    struct dr_create_options o = {.format = "raw", .size = 72 * MIB, .has_size = true};
    uint8_t *buf = malloc(8 * MIB), first;
    ok(dr_create_fs(fs, "base", &o, &err));
    write_byte(fs, "base", 60 * MIB, 8 * MIB, 1);
    for (unsigned i = 0; i < 2; i++) {
        o = (struct dr_create_options){.format = "qcow2",
                                       .backing = i ? "mid" : "base",
                                       .backing_format = i ? "qcow2" : "raw",
                                       .pairs = &small,
                                       .n_pairs = 1};
        ok(dr_create_fs(fs, i ? "top" : "mid", &o, &err));
    }
    write_byte(fs, "mid", 0, 64 * KIB, 2);
    write_byte(fs, "mid", 66 * MIB, 64 * KIB, 3);
    for (unsigned writable = 0; writable < 2; writable++) {
        struct dr_disk *disk = open_top(fs, "top", writable ? DR_OPEN_RDWR : 0);
        ok(dr_pread(disk, &first, 32 * MIB, 1, &err)); /* the beginning of a window */
        assert_int_equal(first, 0);
        ok(dr_close(disk, &err));
        disk = open_top(fs, "top", writable ? DR_OPEN_RDWR : 0);
        ok(dr_pread(disk, &first, 0, 1, &err));
        ok(dr_pread(disk, buf, 60 * MIB, 8 * MIB, &err));
        assert_int_equal(first, 2);
        assert_int_equal(buf[4 * MIB], 1);
        assert_int_equal(buf[6 * MIB], 3);
        ok(dr_close(disk, &err));
    }
    free(buf);
}

static void with_little_memory_windows_go_and_come_back(void **state)
{
    struct dr_fs *fs = *state;
    const struct dr_cache_limits little = {.index = 1 * MIB};
    ok(dr_set_cache_limits(&little, &err));
    for (unsigned i = 0; i < 3; i++)
        make_layer(fs, i, i == 2, 2 * GIB, i, 8 * KIB, 300);
    struct dr_disk *a = open_top(fs, "dir/p0", 0), *b = open_top(fs, "dir/p0", 0);
    struct dr_chain *chain_a = dr_disk_chain(a), *chain_b = dr_disk_chain(b);
    for (int round = 0; round < 3; round++) {
        ask_by_threads(chain_a, (uint64_t)round, 60);
        ask_by_threads(chain_b, (uint64_t)round + 10, 60);
        assert_in_range(dr_index_bytes(), 1, 1 * MIB);
    }
    dr_chain_unref(chain_a, NULL);
    dr_chain_unref(chain_b, NULL);
    dr_close(a, NULL);
    dr_close(b, NULL);
    assert_int_equal(dr_index_bytes(), 0);
}

/* Where windows are found takes memory, too: chains that are not asked any more give it back. */
static void each_of_many_large_disks_gets_an_index(void **state)
{
    enum { DISKS = 12 };
    struct dr_fs *fs = *state;
    const struct dr_cache_limits little = {.index = 1 * MIB};
    struct dr_disk *disks[DISKS];
    ok(dr_set_cache_limits(&little, &err));
    for (unsigned i = 0; i < 3; i++)
        make_layer(fs, i, i == 2, 4096 * GIB, i, 8 * MIB, 300);
    for (unsigned i = 0; i < 2 * DISKS; i++) {
        struct dr_disk **disk = &disks[i % DISKS];
        if (i < DISKS)
            *disk = open_top(fs, "dir/p0", 0);
        struct dr_chain *chain = dr_disk_chain(*disk);
        uint64_t before = 0;
        for (int again = 0; again < 2; again++) {
            before = atomic_load(&asked);
            for (uint64_t n = 0; n < 8; n++) {
                struct dr_place place;
                ok(dr_chain_map(chain, 0, (100 + n) * GIB, 4096, &place, &err));
                dr_place_done(&place);
            }
        }
        assert_in_range(atomic_load(&asked) - before, 0, 8); /* the owners */
        dr_chain_unref(chain, NULL);
        assert_in_range(dr_index_bytes(), 1, 1 * MIB);
    }
    for (unsigned i = 0; i < DISKS; i++)
        dr_close(disks[i], NULL);
    assert_int_equal(dr_index_bytes(), 0);
}

/* vmdk and add-cow in one chain, the top open for writing. */
static void real_formats_say_the_same(void **state)
{
    struct dr_fs *fs = *state;
    static const struct {
        const char *path, *format, *backing, *backing_format;
        uint64_t size;
    } images[] = {
        {"dir/0.vmdk", "vmdk", NULL, NULL, 150 * MIB},
        {"dir/1.vmdk", "vmdk", "0.vmdk", "vmdk", 130 * MIB},
        {"dir/2.cow", "add-cow", "1.vmdk", "vmdk", 140 * MIB},
        {"dir/3.cow", "add-cow", "2.cow", "add-cow", 99 * MIB + 512},
        {"dir/4.cow", "add-cow", "3.cow", "add-cow", 160 * MIB},
    };
    enum { N = sizeof(images) / sizeof(images[0]) };
    uint8_t buf[5000];
    memset(buf, 0x11, sizeof(buf));
    for (unsigned i = 0; i < N; i++) {
        struct dr_create_options o = {.format = images[i].format,
                                      .size = images[i].size,
                                      .has_size = true,
                                      .backing = images[i].backing,
                                      .backing_format = images[i].backing_format};
        ok(dr_create_fs(fs, images[i].path, &o, &err));
        struct dr_disk *disk = open_top(fs, images[i].path, DR_OPEN_RDWR);
        for (uint64_t w = 0; w < 200; w++) {
            uint64_t off = mixed(w + i * 1000) % (images[i].size - sizeof(buf));
            if (w % 5)
                ok(dr_pwrite(disk, buf, dr_round_down(off, 512), 4096, 0, &err));
            else
                ok(dr_zero(disk, dr_round_down(off, 512), 4096, 0, &err));
        }
        ok(dr_close(disk, &err));
    }
    for (unsigned writable = 0; writable < 2; writable++) {
        struct dr_disk *disk = open_top(fs, images[N - 1].path, writable ? DR_OPEN_RDWR : 0);
        struct dr_chain *chain = dr_disk_chain(disk);
        ask_by_threads(chain, 77 + writable, 1500);
        dr_chain_unref(chain, NULL);
        dr_close(disk, NULL);
    }
}

/* dir/3.vmdk on dir/2.vmdk on ... */
static void make_four(struct dr_fs *fs)
{
    for (unsigned i = 0; i < 4; i++) {
        char path[32], below[32];
        snprintf(path, sizeof(path), "dir/%u.vmdk", i);
        snprintf(below, sizeof(below), "%u.vmdk", i - 1);
        struct dr_create_options o = {
            .format = "vmdk", .size = MIB, .has_size = true, .backing = i ? below : NULL};
        ok(dr_create_fs(fs, path, &o, &err));
    }
}

static void an_image_that_was_committed_into_is_indexed_again(void **state)
{
    struct dr_fs *fs = *state;
    make_four(fs);
    struct dr_disk *disk = open_top(fs, "dir/3.vmdk", DR_OPEN_RDWR);
    ok(dr_disk_commit(disk, NULL, NULL, &err));
    struct dr_chain *chain = dr_disk_chain(disk);
    for (size_t i = 1; i < 4; i++)
        assert_non_null(dr_index_at(chain->index, i));
    dr_chain_unref(chain, NULL);
    ok(dr_close(disk, &err));
}

/* Commit thaws the parent while the chain that has it in its index still lives. */
static void what_a_thawed_image_gets_is_seen(void **state)
{
    struct dr_fs *fs = *state;
    uint8_t buf[512], got[512];
    make_four(fs);
    struct dr_disk *disk = open_top(fs, "dir/3.vmdk", DR_OPEN_RDWR);
    struct dr_chain *chain = dr_disk_chain(disk);
    struct dr_place place;
    ok(dr_chain_map(chain, 0, 0, 512, &place, &err)); /* nobody has it */
    dr_place_done(&place);
    assert_int_equal(place.owner, 4);
    ok(dr_image_thaw(chain->images[2], true, &err));
    memset(buf, 0x77, sizeof(buf));
    ok(dr_chain_write(chain, 2, buf, 0, sizeof(buf), &err));
    ok(dr_chain_read(chain, 0, got, 0, sizeof(got), &err));
    assert_memory_equal(got, buf, sizeof(buf));
    ok(dr_image_freeze(chain->images[2], &err));
    ok(dr_chain_read(chain, 0, got, 0, sizeof(got), &err));
    assert_memory_equal(got, buf, sizeof(buf));
    dr_chain_unref(chain, NULL);
    dr_close(disk, NULL);
}

/* ------------------------------------------------------------------ what it costs */

static uint64_t asked_for_a_walk(struct dr_chain *chain)
{
    uint64_t before = atomic_load(&asked), size = chain->images[0]->size;
    for (uint64_t off = 0; off < size;) {
        struct dr_place place;
        ok(dr_chain_map(chain, 0, off, size - off, &place, &err));
        dr_place_done(&place);
        off += place.ext.len;
    }
    return atomic_load(&asked) - before;
}

static uint64_t count_places(struct dr_chain *chain)
{
    uint64_t n = 0, size = chain->images[0]->size;
    for (uint64_t off = 0; off < size; n++) {
        struct dr_place place;
        ok(dr_chain_map(chain, 0, off, size - off, &place, &err));
        dr_place_done(&place);
        off += place.ext.len;
    }
    return n;
}

static uint64_t count_runs(struct dr_image *image)
{
    uint64_t n = 0;
    for (uint64_t off = 0; off < image->size; n++) {
        struct dr_extent ext;
        ok(dr_image_map(image, off, image->size - off, &ext, &err));
        off += ext.len;
    }
    return n;
}

static struct dr_chain *deep_chain(struct dr_fs *fs, unsigned n, struct dr_disk **disk)
{
    for (unsigned i = 0; i < n; i++)
        make_layer(fs, i, i + 1 == n, 64 * GIB, 1, MIB, i + 1 == n ? 60 : 0);
    *disk = open_top(fs, "dir/p0", 0);
    return dr_disk_chain(*disk);
}

/* Empty layers cost a few questions each, whatever there is below them to be found. */
static void the_questions_of_a_walk_do_not_grow_with_the_depth(void **state)
{
    uint64_t first[2], again[2];
    static const unsigned depth[] = {2, 300};
    for (unsigned i = 0; i < 2; i++) {
        struct dr_disk *disk;
        struct dr_chain *chain = deep_chain(*state, depth[i], &disk);
        first[i] = asked_for_a_walk(chain);
        again[i] = asked_for_a_walk(chain);
        dr_chain_unref(chain, NULL);
        dr_close(disk, NULL);
    }
    assert_true(again[1] <= again[0]);
    assert_true(first[1] - first[0] <= (depth[1] - depth[0]) * 4u);
}

/* The first walk asks about each run of a layer, and about each place that it comes to once more
 * or twice, however the runs are scattered over the layers. */
static void a_walk_asks_about_each_run_of_a_layer_hardly_more_than_once(void **state)
{
    enum { N = 300 };
    struct dr_disk *disk;
    uint64_t runs = 0;
    for (unsigned i = 0; i < N; i++)
        make_layer(*state, i, i + 1 == N, 64 * GIB, i, 8 * MIB, 3);
    disk = open_top(*state, "dir/p0", 0);
    struct dr_chain *chain = dr_disk_chain(disk);
    uint64_t questions = asked_for_a_walk(chain);
    for (size_t i = 0; i < N; i++)
        runs += count_runs(chain->images[i]);
    assert_true(questions <= runs + 2 * count_places(chain));
    dr_chain_unref(chain, NULL);
    dr_close(disk, NULL);
}

/* A small read of a place that was asked about before asks the owner, and nobody else. */
static void a_read_asks_only_the_owner(void **state)
{
    struct dr_disk *disk;
    struct dr_chain *chain = deep_chain(*state, 300, &disk);
    asked_for_a_walk(chain);
    uint64_t before = atomic_load(&asked);
    for (uint64_t i = 0; i < 1000; i++) {
        struct dr_place place;
        ok(dr_chain_map(chain, 0, mixed(i) % (64 * GIB - 4096), 4096, &place, &err));
        dr_place_done(&place);
    }
    assert_true(atomic_load(&asked) - before <= 1000);
    dr_chain_unref(chain, NULL);
    dr_close(disk, NULL);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(the_index_says_what_the_layers_say),
        T(a_long_run_of_one_owner_ends_where_it_ends),
        T(a_hole_of_a_walk_ends_where_it_ends),
        T(with_little_memory_windows_go_and_come_back),
        T(each_of_many_large_disks_gets_an_index),
        T(real_formats_say_the_same),
        T(what_a_thawed_image_gets_is_seen),
        T(an_image_that_was_committed_into_is_indexed_again),
        T(the_questions_of_a_walk_do_not_grow_with_the_depth),
        T(a_walk_asks_about_each_run_of_a_layer_hardly_more_than_once),
        T(a_read_asks_only_the_owner),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
