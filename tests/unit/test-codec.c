/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Compressing and decompressing whole buffers. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base/codec.h"

#define SIZE 65536u

struct codec {
    const char *name;
    int64_t (*encode)(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_cap);
    size_t (*decode)(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len);
};

static const struct codec codecs[] = {
    {"deflate", dr_deflate_4k, dr_inflate},
    {"zstd", dr_zstd, dr_unzstd},
};
#define N_CODECS (sizeof(codecs) / sizeof(codecs[0]))

/* Words of eight letters from a list of eight, in random order. */
static void make_text(uint8_t *buf, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++) {
        if (i % 8 == 0)
            seed = seed * 1103515245u + 12345u;
        buf[i] = (uint8_t)((unsigned char)"etaoinsh"[(seed >> 16) % 8] + i % 8);
    }
}

static void make_noise(uint8_t *buf, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++) {
        seed = seed * 1103515245u + 12345u;
        buf[i] = (uint8_t)(seed >> 16);
    }
}

static void what_is_encoded_decodes_to_the_same_bytes(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE], back[SIZE];
    (void)state;
    for (unsigned i = 0; i < N_CODECS; i++)
        for (size_t len = 1; len <= SIZE; len = len * 5 + 1) {
            make_text(plain, len, (unsigned)len);
            int64_t n = codecs[i].encode(plain, len, coded, SIZE);
            assert_in_range(n, 1, SIZE);
            if (len > 1000)
                assert_in_range(n, 1, len / 2);
            memset(back, 0xee, SIZE);
            assert_int_equal(codecs[i].decode(coded, (size_t)n, back, len), len);
            assert_memory_equal(back, plain, len);
        }
}

/* The length that a format tells may be an upper bound. */
static void bytes_behind_the_end_do_not_matter(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE], back[SIZE];
    (void)state;
    make_text(plain, SIZE, 3);
    for (unsigned i = 0; i < N_CODECS; i++) {
        make_noise(coded, SIZE, 4);
        int64_t n = codecs[i].encode(plain, SIZE, coded, SIZE);
        assert_in_range(n, 1, SIZE - 511);
        assert_int_equal(codecs[i].decode(coded, (size_t)n + 511, back, SIZE), SIZE);
        assert_memory_equal(back, plain, SIZE);
    }
}

static void the_beginning_can_be_had_alone(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE], back[SIZE];
    (void)state;
    make_text(plain, SIZE, 5);
    for (unsigned i = 0; i < N_CODECS; i++) {
        int64_t n = codecs[i].encode(plain, SIZE, coded, SIZE);
        memset(back, 0xee, SIZE);
        assert_int_equal(codecs[i].decode(coded, (size_t)n, back, 5000), 5000);
        assert_memory_equal(back, plain, 5000);
        assert_int_equal(back[5000], 0xee);
    }
}

static void damage_gives_fewer_bytes_and_harms_no_later_call(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE], cut[SIZE], back[SIZE];
    (void)state;
    make_text(plain, SIZE, 6);
    for (unsigned i = 0; i < N_CODECS; i++) {
        int64_t n = codecs[i].encode(plain, SIZE, coded, SIZE);
        assert_in_range(codecs[i].decode(coded, (size_t)n / 2, back, SIZE), 0, SIZE - 1);
        memset(cut, 0xff, SIZE);
        assert_in_range(codecs[i].decode(cut, SIZE, back, SIZE), 0, SIZE - 1);
        assert_int_equal(codecs[i].decode(coded, 0, back, SIZE), 0);
        assert_int_equal(codecs[i].decode(coded, (size_t)n, back, SIZE), SIZE);
        assert_memory_equal(back, plain, SIZE);
    }
}

static void what_does_not_fit_is_refused_and_harms_no_later_call(void **state)
{
    static uint8_t plain[SIZE], text[SIZE], coded[SIZE], back[SIZE];
    (void)state;
    make_noise(plain, SIZE, 7);
    make_text(text, SIZE, 8);
    for (unsigned i = 0; i < N_CODECS; i++) {
        assert_int_equal(codecs[i].encode(plain, SIZE, coded, SIZE - 1), -ENOTSUP);
        int64_t n = codecs[i].encode(text, SIZE, coded, SIZE);
        assert_int_equal(codecs[i].decode(coded, (size_t)n, back, SIZE), SIZE);
        assert_memory_equal(back, text, SIZE);
    }
}

/* Some programs end a stream by a flush, without a last block. */
static void a_stream_without_an_end_decodes(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE], back[SIZE];
    (void)state;
    make_text(plain, SIZE, 9);
    z_stream z = {.next_in = plain, .avail_in = SIZE, .next_out = coded, .avail_out = SIZE};
    assert_int_equal(deflateInit2(&z, 6, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_SYNC_FLUSH), Z_OK);
    size_t n = SIZE - z.avail_out;
    deflateEnd(&z);
    assert_int_equal(dr_inflate(coded, n, back, SIZE), SIZE);
    assert_memory_equal(back, plain, SIZE);
}

/* The same 5000 bytes again and again: matches would have to reach back too far. */
static void deflate_refers_no_further_back_than_4096_bytes(void **state)
{
    static uint8_t plain[SIZE], coded[SIZE];
    (void)state;
    make_noise(plain, 5000, 10);
    for (size_t i = 5000; i < SIZE; i++)
        plain[i] = plain[i - 5000];
    assert_int_equal(dr_deflate_4k(plain, SIZE, coded, SIZE - 1), -ENOTSUP);
    for (size_t i = 3000; i < SIZE; i++)
        plain[i] = plain[i - 3000];
    assert_in_range(dr_deflate_4k(plain, SIZE, coded, SIZE - 1), 1, 8000);
}

static void *encode_and_decode(void *arg)
{
    static const unsigned rounds = 20;
    unsigned seed = *(unsigned *)arg;
    uint8_t *plain = malloc(3 * SIZE), *coded = plain + SIZE, *back = coded + SIZE;
    bool good = plain;
    for (unsigned n = 0; good && n < rounds * N_CODECS; n++) {
        const struct codec *c = &codecs[n % N_CODECS];
        make_text(plain, SIZE, seed + n);
        int64_t len = c->encode(plain, SIZE, coded, SIZE);
        good = len > 0 && c->decode(coded, (size_t)len, back, SIZE) == SIZE &&
               memcmp(plain, back, SIZE) == 0;
    }
    free(plain);
    return good ? arg : NULL;
}

/* More than contexts are kept. */
static void many_threads_do_not_disturb_each_other(void **state)
{
    pthread_t threads[24];
    unsigned seeds[24];
    (void)state;
    for (unsigned i = 0; i < 24; i++) {
        seeds[i] = 1000 * i;
        assert_int_equal(pthread_create(&threads[i], NULL, encode_and_decode, &seeds[i]), 0);
    }
    for (unsigned i = 0; i < 24; i++) {
        void *good;
        pthread_join(threads[i], &good);
        assert_ptr_equal(good, &seeds[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_encoded_decodes_to_the_same_bytes),
        cmocka_unit_test(bytes_behind_the_end_do_not_matter),
        cmocka_unit_test(the_beginning_can_be_had_alone),
        cmocka_unit_test(damage_gives_fewer_bytes_and_harms_no_later_call),
        cmocka_unit_test(what_does_not_fit_is_refused_and_harms_no_later_call),
        cmocka_unit_test(a_stream_without_an_end_decodes),
        cmocka_unit_test(deflate_refers_no_further_back_than_4096_bytes),
        cmocka_unit_test(many_threads_do_not_disturb_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
