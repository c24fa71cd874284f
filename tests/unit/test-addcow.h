/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the tests of add-cow share: files of given bytes in a file system in memory, headers built
 * byte by byte from the format's description (not by the driver), and a look at bits. */
#ifndef DROVER_TESTS_TEST_ADDCOW_H
#define DROVER_TESTS_TEST_ADDCOW_H

#include "base/bytes.h"
#include "base/cleanup.h"
#include "test-ops.h"

#define V7_HEADER 2560u

static inline void put_file(struct dr_fs *fs, const char *path, const void *bytes, size_t len)
{
    struct dr_file *f = NULL;
    fs->ops->unlink(fs, path, NULL);
    ok(dr_file_open(fs, path, DR_FILE_CREATE, &f, &err));
    if (len > 0)
        ok(dr_file_pwrite(f, bytes, 0, len, &err));
    dr_file_unref(f);
}

static inline void put_pattern(struct dr_fs *fs, const char *path, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len + 1);
    memset(buf, byte, len);
    put_file(fs, path, buf, len);
}

static inline void put_sparse(struct dr_fs *fs, const char *path, uint64_t len)
{
    struct dr_file *f = NULL;
    put_file(fs, path, "", 0);
    ok(dr_file_open(fs, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_truncate(f, len, &err));
    dr_file_unref(f);
}

static inline size_t get_file(struct dr_fs *fs, const char *path, void *buf, uint64_t off,
                              size_t len)
{
    struct dr_file *f = NULL;
    size_t got;
    ok(dr_file_open(fs, path, 0, &f, &err));
    ok(dr_file_pread_short(f, buf, off, len, &got, &err));
    dr_file_unref(f);
    return got;
}

static inline uint64_t file_len(struct dr_fs *fs, const char *path)
{
    struct dr_file *f = NULL;
    ok(dr_file_open(fs, path, 0, &f, &err));
    uint64_t size = dr_file_size(f);
    dr_file_unref(f);
    return size;
}

static inline void v7_header(uint8_t h[V7_HEADER], const char *backing, const char *image)
{
    memset(h, 0, V7_HEADER);
    memcpy(h, "ADD_COW\xff\0\0\0\1", 12);
    memcpy(h + 12, backing, strlen(backing));
    memcpy(h + 1036, image, strlen(image));
}

/* Metadata of version 1 with these bytes of bitmap. */
static inline void put_v7(struct dr_fs *fs, const char *path, const char *backing,
                          const char *image, const void *bits, size_t n_bits)
{
    uint8_t *all = malloc(V7_HEADER + n_bits);
    v7_header(all, backing, image);
    memcpy(all + V7_HEADER, bits, n_bits);
    put_file(fs, path, all, V7_HEADER + n_bits);
    free(all);
}

/* The driver's create, directly: no private directory. */
static inline int create_at(struct dr_fs *fs, const char *path, uint64_t size, const char *backing,
                            const char *format, const char *option, const char *value,
                            struct dr_error *err)
{
    struct dr_option o = {option, value};
    struct dr_create_params params = {.size = size,
                                      .options = &o,
                                      .n_options = option ? 1 : 0,
                                      .backing_name = backing,
                                      .backing_format = format};
    return dr_format_addcow.create(fs, path, &params, err);
}

static inline int open_flags(struct dr_fs *fs, const char *path, unsigned flags,
                             struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options o = {.flags = flags};
    return dr_open_fs(fs, path, &o, disk, err);
}

/* Must not open, for this reason. */
#define unopenable(fs, path, errnum, word)                               \
    do {                                                                 \
        struct dr_disk *disk_ = NULL;                                    \
        refused(dr_open_fs(fs, path, NULL, &disk_, &err), errnum, word); \
    } while (0)

static inline void write_at(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, byte, len);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

/* Every byte of [off, off + len) is this. */
static inline void reads(struct dr_disk *disk, uint64_t off, size_t len, int byte)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    ok(dr_pread(disk, buf, off, len, &err));
    for (size_t i = 0; i < len; i++)
        if (buf[i] != (uint8_t)byte)
            fail_msg("byte %llu is %02x, not %02x", (unsigned long long)(off + i), buf[i], byte);
}

/* The bit of sector n, in the file. */
static inline bool bit_in_file(struct dr_fs *fs, const char *path, uint64_t n)
{
    uint8_t byte = 0;
    get_file(fs, path, &byte, V7_HEADER + n / 8, 1);
    return byte >> n % 8 & 1;
}

#endif
