/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The cache of decoded units, by means of the toy, whose decoder is counted here. */
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"
#include "faultfs.h"
#include "outcome.h"
#include "toy.h"

#define KIB  1024u
#define MIB  (1024u * KIB)
#define UNIT 4096u

static _Atomic unsigned n_decoded;
static void (*inside_decode)(void); /* once */

static int counting_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                           size_t in_len, uint8_t *out, struct dr_error *err)
{
    void (*inside)(void) = inside_decode;
    inside_decode = NULL;
    n_decoded++;
    if (inside)
        inside();
    return dr_format_toy.decode(image, ext, in, in_len, out, err);
}

static struct dr_format counting;

struct world {
    struct dr_fs *memory;
    struct faultfs *counted;
    struct dr_fs *fs;
    struct dr_disk *disk;
};

static void limit(uint64_t bytes)
{
    struct dr_cache_limits limits = {.decoded = bytes};
    ok(dr_set_cache_limits(&limits, &err));
}

static int setup(void **state)
{
    static struct world w;
    struct dr_create_params p = {.size = 4 * MIB};
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    counting = dr_format_toy;
    counting.decode = counting_decode;
    dr_format_register(&counting);
    w.memory = dr_fs_memory_new();
    w.counted = faultfs_new(w.memory);
    w.fs = faultfs_fs(w.counted);
    ok(dr_format_toy.create(w.fs, "dir/disk.toy", &p, &err));
    ok(dr_open_fs(w.fs, "dir/disk.toy", &o, &w.disk, &err));
    n_decoded = 0;
    *state = &w;
    return 0;
}

static int teardown(void **state)
{
    struct world *w = *state;
    dr_close(w->disk, NULL);
    limit(32 * MIB);
    dr_format_register(NULL);
    faultfs_free(w->counted);
    dr_fs_memory_free(w->memory);
    return 0;
}

/* The unit number n gets runs of the byte `value`, each `run` bytes long and one apart, so that the
 * coded unit is as large as wanted. */
static void write_unit(struct world *w, unsigned n, uint8_t value, unsigned run)
{
    uint8_t plain[UNIT], coded[UNIT];
    for (unsigned i = 0; i < UNIT; i++)
        plain[i] = (uint8_t)(value + i / run % 2);
    int64_t len = dr_format_toy.encode(NULL, plain, UNIT, 0, coded, sizeof(coded));
    assert_in_range(len, 1, UNIT - 1);
    ok(dr_chain_write_coded(w->disk->chain, 0, coded, (uint32_t)len, (uint64_t)n * UNIT, UNIT,
                            &err));
}

static uint8_t byte_of(struct world *w, uint64_t off)
{
    uint8_t byte;
    ok(dr_pread(w->disk, &byte, off, 1, &err));
    return byte;
}

/* ------------------------------------------------------------------ tests */

static void a_unit_that_is_read_in_small_steps_is_decoded_once(void **state)
{
    struct world *w = *state;
    write_unit(w, 0, 10, 100);
    faultfs_reset(w->counted);
    for (unsigned i = 0; i < UNIT; i += 64)
        assert_int_equal(byte_of(w, i), 10 + i / 100 % 2);
    assert_int_equal(n_decoded, 1);
    assert_int_equal(faultfs_count_of(w->counted, FAULTFS_READ), 1);
}

static struct world *beside;
static pthread_t second;

static void *read_beside(void *user)
{
    struct world *w = user;
    return byte_of(w, 100) == 11 ? NULL : w;
}

static void start_second_reader(void)
{
    assert_int_equal(pthread_create(&second, NULL, read_beside, beside), 0);
}

static void two_readers_of_a_unit_decode_it_once(void **state)
{
    struct world *w = beside = *state;
    void *result;
    write_unit(w, 0, 10, 100);
    inside_decode = start_second_reader;
    assert_int_equal(byte_of(w, 0), 10);
    pthread_join(second, &result);
    assert_null(result);
    assert_int_equal(n_decoded, 1);
}

static uint64_t host_of(struct world *w, uint64_t off)
{
    struct dr_extent ext;
    ok(dr_image_map(w->disk->chain->images[0], off, UNIT, &ext, &err));
    assert_int_equal(ext.kind, DR_CODED);
    return ext.host;
}

static void a_place_that_is_used_again_shows_its_new_unit(void **state)
{
    struct world *w = *state;
    write_unit(w, 0, 10, 100);
    assert_int_equal(byte_of(w, 0), 10);
    uint64_t host = host_of(w, 0);
    ok(dr_chain_drop(w->disk->chain, 0, 0, UNIT, &err));
    ok(dr_flush(w->disk, &err)); /* releases the place */
    write_unit(w, 7, 77, 100);
    assert_int_equal(host_of(w, 7 * UNIT), host);
    assert_int_equal(byte_of(w, 7 * UNIT), 77);
}

static void units_in_a_row_are_read_by_few_calls(void **state)
{
    struct world *w = *state;
    for (unsigned i = 0; i < 128; i++)
        write_unit(w, i, (uint8_t)i, 50);
    ok(dr_flush(w->disk, &err));
    faultfs_reset(w->counted);
    for (unsigned i = 0; i < 128; i++)
        assert_int_equal(byte_of(w, i * UNIT), i);
    assert_int_equal(n_decoded, 128);
    assert_in_range(faultfs_count_of(w->counted, FAULTFS_READ), 1, 4);
}

/* Four units, and behind them places in the file that are free again. */
static void make_free_places(struct world *w)
{
    for (unsigned i = 0; i < 40; i++)
        write_unit(w, i, (uint8_t)(i + 1), 50);
    ok(dr_chain_drop(w->disk->chain, 0, 4 * UNIT, 36 * UNIT, &err));
    ok(dr_flush(w->disk, &err));
}

static void what_was_read_ahead_is_not_shown_once_it_is_written(void **state)
{
    struct world *w = *state;
    make_free_places(w);
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(byte_of(w, i * UNIT), i + 1);
    for (unsigned i = 4; i < 40; i++)
        write_unit(w, i, (uint8_t)(i + 101), 50);
    for (unsigned i = 4; i < 40; i++)
        assert_int_equal(byte_of(w, i * UNIT), i + 101);
}

static const struct dr_file_ops *real_ops;
static struct world *write_behind;

/* Between the read of a window and its use a unit is written where the window has read. */
static ssize_t overtaken_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    ssize_t n = real_ops->pread(f, buf, off, len);
    struct world *w = write_behind;
    if (w && len > 8 * UNIT) {
        write_behind = NULL;
        write_unit(w, 20, 200, 50);
    }
    return n;
}

static void a_unit_written_while_its_bytes_are_read_ahead_is_shown(void **state)
{
    struct world *w = *state;
    static struct dr_file_ops ops;
    make_free_places(w);
    struct dr_file *f = w->disk->chain->images[0]->files[0];
    real_ops = f->ops;
    ops = *real_ops;
    ops.pread = overtaken_pread;
    f->ops = &ops;
    assert_int_equal(byte_of(w, 0), 1);
    write_behind = w;
    for (unsigned i = 1; i < 4; i++)
        assert_int_equal(byte_of(w, i * UNIT), i + 1);
    assert_null(write_behind);
    assert_int_equal(byte_of(w, 20 * UNIT), 200);
    f->ops = real_ops;
}

static void units_go_when_they_take_more_than_the_limit(void **state)
{
    struct world *w = *state;
    for (unsigned i = 0; i < 512; i++)
        write_unit(w, i, (uint8_t)i, 200);
    limit(1 * MIB); /* about 250 units */
    for (unsigned i = 0; i < 512; i++)
        assert_int_equal(byte_of(w, i * UNIT), (uint8_t)i);
    assert_int_equal(n_decoded, 512);
    assert_int_equal(byte_of(w, 511 * UNIT), (uint8_t)511);
    assert_int_equal(n_decoded, 512);
    assert_int_equal(byte_of(w, 0), 0);
    assert_int_equal(n_decoded, 513);
}

/* Whoever copies the disk does not come back, so nothing is kept for him; what is there is used. */
static void units_that_a_large_request_reads_are_decoded_into_its_buffer(void **state)
{
    struct world *w = *state;
    static uint8_t buf[32 * UNIT];
    for (unsigned i = 0; i < 32; i++)
        write_unit(w, i, (uint8_t)(i + 1), 50);
    assert_int_equal(byte_of(w, 3 * UNIT), 4);
    assert_int_equal(n_decoded, 1);
    ok(dr_pread(w->disk, buf, 0, sizeof(buf), &err));
    assert_int_equal(n_decoded, 32);
    for (unsigned i = 0; i < sizeof(buf); i++)
        assert_int_equal(buf[i], i / UNIT + 1 + i % UNIT / 50 % 2);
    assert_int_equal(byte_of(w, 3 * UNIT), 4);
    assert_int_equal(n_decoded, 32);
    assert_int_equal(byte_of(w, 4 * UNIT), 5);
    assert_int_equal(n_decoded, 33);
}

/* Each reader hears of the damage, and nothing of it is kept. */
static void a_unit_that_does_not_decode_fails_each_time(void **state)
{
    struct world *w = *state;
    struct dr_error told = DR_ERROR_INIT;
    uint8_t byte, nothing[512] = {0};
    write_unit(w, 0, 10, 4000);
    ok(dr_file_pwrite(w->disk->chain->images[0]->files[0], nothing, host_of(w, 0), 512, &err));
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(dr_pread(w->disk, &byte, 0, 1, NULL), -EIO);
    assert_int_equal(n_decoded, 3);
    assert_int_equal(dr_pread(w->disk, &byte, 0, 1, &told), -EIO);
    assert_non_null(strstr(told.text, "coded unit"));
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_unit_that_is_read_in_small_steps_is_decoded_once),
        T(two_readers_of_a_unit_decode_it_once),
        T(a_place_that_is_used_again_shows_its_new_unit),
        T(units_in_a_row_are_read_by_few_calls),
        T(what_was_read_ahead_is_not_shown_once_it_is_written),
        T(a_unit_written_while_its_bytes_are_read_ahead_is_shown),
        T(units_go_when_they_take_more_than_the_limit),
        T(units_that_a_large_request_reads_are_decoded_into_its_buffer),
        T(a_unit_that_does_not_decode_fails_each_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
