/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Packed files as files of their plain bytes, where the host's files fail or are full. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <lzma.h>
#include <zlib.h>

#include "base/bytes.h"
#include "faultfs.h"
#include "outcome.h"
#include "storage/unpacked.h"

#define MIB ((size_t)1 << 20)

/* A file of `len` plain bytes, which nothing makes smaller where noise is set. */
static void make_packed(struct dr_fs *fs, size_t len, bool noise)
{
    uint8_t *plain = calloc(1, len);
    uint64_t seed = 1;
    for (size_t i = 0; noise && i < len; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
        plain[i] = (uint8_t)(seed >> 56);
    }
    z_stream z = {.next_in = plain, .avail_in = (uInt)len};
    assert_int_equal(deflateInit2(&z, 1, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    size_t room = deflateBound(&z, len);
    uint8_t *packed = malloc(room);
    z.next_out = packed;
    z.avail_out = (uInt)room;
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    struct dr_file *f;
    ok(dr_file_open(fs, "/d.gz", DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, packed, 0, z.total_out, &err));
    dr_file_unref(f);
    deflateEnd(&z);
    free(packed);
    free(plain);
}

static int fail_behind(void *user, const struct faultfs_io *io)
{
    return io->kind == FAULTFS_READ && io->off + io->len > *(uint64_t *)user ? -EIO : 0;
}

static void salvage_keeps_what_comes_before_bytes_that_cannot_be_read(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct dr_file *f, *plain;
    struct dr_unpack_damage damage = {0};
    struct dr_error why = DR_ERROR_INIT;
    uint64_t readable = MIB;
    uint8_t byte;
    make_packed(memory, 2 * MIB, true);
    ok(dr_file_open(faultfs_fs(fault), "/d.gz", 0, &f, &err));
    faultfs_observe(fault, fail_behind, &readable);
    assert_int_equal(dr_unpack(f, true, NULL, &plain, &why), -EIO);
    ok(dr_unpack(f, true, &damage, &plain, &err));
    assert_int_equal(damage.why.errnum, EIO);
    assert_true(damage.came > MIB / 2 && damage.came <= MIB && damage.vouched == 0);
    assert_int_equal(dr_file_size(plain), damage.came);
    ok(dr_file_pread(plain, &byte, damage.came - 1, 1, &err));
    dr_file_unref(plain);
    dr_file_unref(f);
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

static void readers_that_jump_end_where_there_is_no_room_to_unpack(void **state)
{
    (void)state;
    struct dr_fs *memory = dr_fs_memory_new();
    struct faultfs *fault = faultfs_new(memory);
    struct dr_file *f, *plain;
    struct dr_error why = DR_ERROR_INIT;
    const char *set = getenv("TMPDIR");
    char *before = set ? strdup(set) : NULL;
    uint64_t reads = 0;
    uint8_t byte;
    make_packed(memory, 80 * MIB, false);
    ok(dr_file_open(faultfs_fs(fault), "/d.gz", 0, &f, &err));
    ok(dr_unpack(f, false, NULL, &plain, &err));
    setenv("TMPDIR", "/nowhere/at/all", 1);
    for (int i = 0; i < 12; i++) {
        int r = dr_file_pread(plain, &byte, 0, 1, &why);
        assert_int_equal(r, i < 3 ? 0 : -ENOENT);
        dr_file_pread(plain, &byte, 79 * MIB, 1, &why);
        if (i == 4)
            reads = faultfs_count_of(fault, FAULTFS_READ);
    }
    assert_int_equal(faultfs_count_of(fault, FAULTFS_READ), reads);
    if (before)
        setenv("TMPDIR", before, 1);
    else
        unsetenv("TMPDIR");
    free(before);
    dr_file_unref(plain);
    dr_file_unref(f);
    faultfs_free(fault);
    dr_fs_memory_free(memory);
}

/* ------------------------------------------------------------------ pieces */

#define PIECE (64u * 1000)

struct packed {
    uint8_t *p;
    size_t n;
};

static void noise(uint8_t *p, size_t n)
{
    uint64_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
        p[i] = (uint8_t)(seed >> 56);
    }
}

/* Members that tell their sizes, as bgzip makes them. */
static void bgzip(struct packed *out, const uint8_t *plain, size_t len)
{
    for (size_t at = 0; at < len; at += PIECE) {
        uint8_t head[18] = {0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 6, 0, 'B', 'C', 2, 0};
        size_t n = len - at < PIECE ? len - at : PIECE;
        z_stream z = {.next_in = (Bytef *)(plain + at), .avail_in = (uInt)n};
        z.next_out = out->p + out->n + sizeof(head);
        z.avail_out = 2 * PIECE;
        assert_int_equal(deflateInit2(&z, 1, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY), Z_OK);
        assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
        put_le16(head + 16, (uint16_t)(z.total_out + 25));
        memcpy(out->p + out->n, head, sizeof(head));
        put_le32(z.next_out, (uint32_t)crc32(0, plain + at, (uInt)n));
        put_le32(z.next_out + 4, (uint32_t)n);
        out->n += sizeof(head) + z.total_out + 8;
        deflateEnd(&z);
    }
}

static void xz(struct packed *out, const uint8_t *plain, size_t len)
{
    lzma_stream x = LZMA_STREAM_INIT;
    assert_int_equal(lzma_easy_encoder(&x, 0, LZMA_CHECK_CRC32), LZMA_OK);
    x.next_out = out->p;
    x.avail_out = 2 * len;
    for (size_t at = 0; at < len; at += PIECE) {
        x.next_in = plain + at;
        x.avail_in = len - at < PIECE ? len - at : PIECE;
        lzma_action action = at + PIECE < len ? LZMA_FULL_FLUSH : LZMA_FINISH;
        assert_int_equal(lzma_code(&x, action), LZMA_STREAM_END);
    }
    out->n = x.total_out;
    lzma_end(&x);
}

static int add_read(void *user, const struct faultfs_io *io)
{
    if (io->kind == FAULTFS_READ)
        *(uint64_t *)user += io->len;
    return 0;
}

static void a_byte_of_a_file_in_pieces_costs_its_piece(void **state)
{
    (void)state;
    static void (*const kinds[])(struct packed *, const uint8_t *, size_t) = {bgzip, xz};
    uint8_t *plain = malloc(2 * MIB), byte;
    noise(plain, 2 * MIB);
    for (size_t i = 0; i < 2; i++) {
        struct dr_fs *memory = dr_fs_memory_new();
        struct faultfs *fault = faultfs_new(memory);
        struct packed packed = {malloc(5 * MIB), 0};
        struct dr_file *f, *file;
        uint64_t bytes = 0;
        kinds[i](&packed, plain, 2 * MIB);
        ok(dr_file_open(memory, "/p", DR_FILE_CREATE, &f, &err));
        ok(dr_file_pwrite(f, packed.p, 0, packed.n, &err));
        dr_file_unref(f);
        ok(dr_file_open(faultfs_fs(fault), "/p", 0, &f, &err));
        faultfs_observe(fault, add_read, &bytes);
        ok(dr_unpack(f, true, NULL, &file, &err));
        assert_int_equal(dr_file_size(file), 2 * MIB);
        for (size_t at = 2 * MIB - 1; at > 0; at /= 2) {
            ok(dr_file_pread(file, &byte, at, 1, &err));
            assert_int_equal(byte, plain[at]);
            if (at == 2 * MIB - 1)
                assert_true(bytes < 5 * PIECE);
        }
        faultfs_observe(fault, NULL, NULL);
        dr_file_unref(file);
        dr_file_unref(f);
        free(packed.p);
        faultfs_free(fault);
        dr_fs_memory_free(memory);
    }
    free(plain);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(salvage_keeps_what_comes_before_bytes_that_cannot_be_read),
        cmocka_unit_test(readers_that_jump_end_where_there_is_no_room_to_unpack),
        cmocka_unit_test(a_byte_of_a_file_in_pieces_costs_its_piece),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
