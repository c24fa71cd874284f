/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the tests of the VMDK driver share: images in memory, made, written, poked. */
#ifndef DR_TESTS_TEST_VMDK_H
#define DR_TESTS_TEST_VMDK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"
#include "formats/vmdk/vmdk.h"
#include "test-in-memory.h"

#define MIB   (UINT64_C(1) << 20)
#define TIB   (UINT64_C(1) << 40)
#define GRAIN 65536u

static inline int create_in(struct dr_fs *fs, const char *path, uint64_t size,
                            const char *subformat, const char *zeroed, const char *parent)
{
    struct dr_option options[] = {{"subformat", subformat}, {"zeroed_grain", zeroed}};
    struct dr_create_params p = {.size = size,
                                 .options = options,
                                 .n_options = zeroed ? 2 : 1,
                                 .backing_name = parent,
                                 .force = true};
    if (parent) {
        CLEANUP_FREE char *where = dr_path_sibling(path, parent);
        int r = dr_image_open(fs, where, "vmdk", 0, &p.backing, &err);
        if (r < 0)
            return r;
    }
    int r = dr_format_vmdk.create(fs, path, &p, &err);
    dr_image_unref(p.backing, NULL);
    return r;
}

static inline int create(const char *path, uint64_t size, const char *parent)
{
    return create_in(mem, path, size, "monolithicSparse", NULL, parent);
}

static inline int open_in(struct dr_fs *fs, const char *path, unsigned flags, struct dr_disk **disk)
{
    struct dr_open_options o = {.flags = flags};
    return dr_open_fs(fs, path, &o, disk, &err);
}

static inline struct dr_disk *opened(const char *path, unsigned flags)
{
    struct dr_disk *disk = NULL;
    ok(open_in(mem, path, flags, &disk));
    return disk;
}

static inline struct dr_image *image_of(const char *path, unsigned flags)
{
    struct dr_image *image = NULL;
    ok(dr_image_open(mem, path, "vmdk", flags, &image, &err));
    return image;
}

static inline void fill(uint8_t *buf, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (uint8_t)(seed + i * 7 + i / 251);
}

static inline void write_at(struct dr_disk *disk, uint64_t off, size_t len, unsigned seed)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    fill(buf, len, seed);
    ok(dr_pwrite(disk, buf, off, len, 0, &err));
}

static inline void reads(struct dr_disk *disk, uint64_t off, size_t len, unsigned seed)
{
    CLEANUP_FREE uint8_t *buf = malloc(len), *want = malloc(len);
    fill(want, len, seed);
    ok(dr_pread(disk, buf, off, len, &err));
    assert_memory_equal(buf, want, len);
}

static inline void reads_zero(struct dr_disk *disk, uint64_t off, size_t len)
{
    CLEANUP_FREE uint8_t *buf = malloc(len);
    memset(buf, 1, len);
    ok(dr_pread(disk, buf, off, len, &err));
    assert_true(dr_is_zero(buf, len));
}

static inline void write_one(const char *path, uint64_t off, size_t len, unsigned seed,
                             unsigned flags)
{
    struct dr_disk *disk = opened(path, DR_OPEN_RDWR | flags);
    write_at(disk, off, len, seed);
    ok(dr_close(disk, &err));
}

/* Bytes of a file in memory, outside of any image. */
static inline void peek(const char *path, uint64_t off, void *buf, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_NO_LOCK, &f, &err));
    ok(dr_file_pread(f, buf, off, len, &err));
    dr_file_unref(f);
}

static inline void poke(const char *path, uint64_t off, const void *buf, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_RDWR, &f, &err));
    ok(dr_file_pwrite(f, buf, off, len, &err));
    dr_file_unref(f);
}

static inline uint32_t peek32(const char *path, uint64_t off)
{
    uint8_t b[4];
    peek(path, off, b, 4);
    return get_le32(b);
}

static inline void poke32(const char *path, uint64_t off, uint32_t v)
{
    uint8_t b[4];
    put_le32(b, v);
    poke(path, off, b, 4);
}

static inline void make_text(const char *path, const char *text)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, text, 0, strlen(text), &err));
    dr_file_unref(f);
}

static inline void make_zeros(const char *path, uint64_t size)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_CREATE, &f, &err));
    ok(dr_file_truncate(f, size, &err));
    dr_file_unref(f);
}

static inline uint64_t file_size(const char *path)
{
    struct dr_file *f;
    ok(dr_file_open(mem, path, DR_FILE_NO_LOCK, &f, &err));
    uint64_t size = dr_file_size(f);
    dr_file_unref(f);
    return size;
}

static inline uint32_t cid_of(const char *path)
{
    struct dr_image *image = image_of(path, DR_OPEN_NO_BACKING);
    uint32_t id = vmdk_id(image);
    dr_image_unref(image, NULL);
    return id;
}

/* Layout of a monolithic image of up to 32 MiB. */
#define GT_AT  (0x1b * 512u)
#define RGT_AT (0x16 * 512u)
#define GD_AT  (0x1a * 512u)
#define RGD_AT (0x15 * 512u)

static char lines[4096];

static inline void note(void *user, const char *line)
{
    (void)user;
    size_t used = strlen(lines);
    snprintf(lines + used, sizeof(lines) - used, "%s\n", line);
}

static inline struct dr_check_result checked(const char *path, unsigned fix)
{
    struct dr_check_result result = {.report = note};
    lines[0] = '\0';
    struct dr_image *image = image_of(path, fix ? DR_OPEN_RDWR | DR_OPEN_AS_FOUND : 0);
    ok(vmdk_check(image, fix, &result, &err));
    ok(dr_image_unref(image, &err));
    return result;
}

static inline void finds(const char *path, uint64_t corruptions, uint64_t leaks, const char *why)
{
    struct dr_check_result r = checked(path, 0);
    if (r.corruptions != corruptions || r.leaks != leaks || !strstr(lines, why))
        fail_msg("%llu corruptions, %llu leaks: %s", (unsigned long long)r.corruptions,
                 (unsigned long long)r.leaks, lines);
}

#define T(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

#endif
