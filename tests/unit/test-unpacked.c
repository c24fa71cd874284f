/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Packed files as files of their plain bytes, where the host's files fail or are full. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <zlib.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(salvage_keeps_what_comes_before_bytes_that_cannot_be_read),
        cmocka_unit_test(readers_that_jump_end_where_there_is_no_room_to_unpack),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
