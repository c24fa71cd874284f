/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the tests of operations share: disks in a file system in memory, written and read whole. */
#ifndef DROVER_TESTS_TEST_OPS_H
#define DROVER_TESTS_TEST_OPS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "ops/ops-internal.h"
#include "outcome.h"

#define KiB 1024u
#define MiB (1024u * 1024u)

static inline void make(struct dr_fs *fs, const char *path, const char *format, uint64_t size,
                        const char *backing)
{
    struct dr_create_options o = {.format = format,
                                  .size = size,
                                  .has_size = size != 0,
                                  .backing = backing,
                                  .backing_format = backing ? "vmdk" : NULL};
    ok(dr_create_fs(fs, path, &o, &err));
}

static inline void put(struct dr_fs *fs, const char *path, uint64_t off, size_t len, int byte)
{
    struct dr_open_options o = {.flags = DR_OPEN_RDWR};
    struct dr_disk *disk = NULL;
    uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_open_fs(fs, path, &o, &disk, &err));
    if (byte == 0)
        ok(dr_zero(disk, off, len, DR_EXPLICIT, &err));
    else
        ok(dr_pwrite(disk, buf, off, len, 0, &err));
    ok(dr_close(disk, &err));
    free(buf);
}

/* All bytes of a disk, as anybody reads them. */
static inline uint8_t *view(struct dr_fs *fs, const char *path, uint64_t *size)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    *size = dr_size(disk);
    uint8_t *buf = malloc(*size + 1);
    ok(dr_pread(disk, buf, 0, *size, &err));
    ok(dr_close(disk, &err));
    return buf;
}

static inline void same_view(struct dr_fs *fs, const char *path, const uint8_t *want, uint64_t size)
{
    uint64_t n;
    uint8_t *have = view(fs, path, &n);
    if (n != size)
        fail_msg("%s has %llu bytes, not %llu", path, (unsigned long long)n,
                 (unsigned long long)size);
    for (uint64_t i = 0; i < n; i++)
        if (have[i] != want[i])
            fail_msg("%s differs at %llu: %02x, not %02x", path, (unsigned long long)i, have[i],
                     want[i]);
    free(have);
}

static inline uint64_t disk_size(struct dr_fs *fs, const char *path)
{
    struct dr_image *image;
    uint64_t bytes;
    ok(dr_image_open(fs, path, NULL, DR_OPEN_NO_BACKING, &image, &err));
    ok(dr_ops_disk_size(image, &bytes, &err));
    dr_image_unref(image, NULL);
    return bytes;
}

static inline bool exists(struct dr_fs *fs, const char *path)
{
    struct dr_file_id id;
    return fs->ops->identify(fs, path, &id, NULL) == 0;
}

static inline size_t count_files(struct dr_fs *fs)
{
    char **names;
    size_t n;
    ok(dr_ops_list(fs, ".", &names, &n, &err));
    dr_ops_free_names(names, n);
    return n;
}

/* The bytes of a file as they are, to see that nothing touched it. */
static inline uint8_t *file_bytes(struct dr_fs *fs, const char *path, size_t *len)
{
    struct dr_file *file;
    ok(dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, &err));
    *len = dr_file_size(file);
    uint8_t *buf = malloc(*len + 1);
    ok(dr_file_pread(file, buf, 0, *len, &err));
    dr_file_unref(file);
    return buf;
}

static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline int new_fs(void **state)
{
    *state = dr_fs_memory_new();
    return *state ? 0 : -1;
}

static inline int free_fs(void **state)
{
    dr_fs_memory_free(*state);
    return 0;
}

#define ops_test(f) cmocka_unit_test_setup_teardown(f, new_fs, free_fs)

#endif
