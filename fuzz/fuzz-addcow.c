/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An add-cow image: header, names, bitmap. Every sector reads from the raw file or from the parent
 * as its bit says; it is written, emptied, resized, given another parent and checked, and reads as
 * it must each time.
 *
 * The input: two bytes, the length of img.raw in units of 100; one byte n, n bytes of the name of
 * another parent; the file disk.add-cow. base.raw (5000 bytes) is always there. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PATH      "/d/disk.add-cow"
#define BASE_SIZE 5000u
#define MAX_SIZE  300000u

static uint8_t base[BASE_SIZE], raw[MAX_SIZE], want[MAX_SIZE], got[MAX_SIZE];

static void put(struct dr_fs *fs, const char *name, const void *data, size_t size)
{
    struct dr_file *f;
    if (dr_file_open(fs, name, DR_FILE_CREATE, &f, NULL) < 0)
        abort();
    if (size > 0 && dr_file_pwrite(f, data, 0, size, NULL) < 0)
        abort();
    dr_file_unref(f);
}

static struct dr_disk *opened(struct dr_fs *fs, unsigned flags)
{
    struct dr_open_options options = {.flags = flags};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    if (dr_open_fs(fs, PATH, &options, &disk, &err) < 0 && (err.errnum == 0 || err.text[0] == '\0'))
        abort(); /* every refusal says why */
    return disk;
}

/* What version 1 must show. False: not known here. */
static bool expect(const struct dr_disk *disk, const uint8_t *file, size_t size)
{
    const char *name = dr_image_backing_name(disk, 0);
    uint64_t n = dr_size(disk);
    if (n > MAX_SIZE || strcmp(dr_image_format(disk, 0), "add-cow") != 0 || size < 2560 ||
        file[1] != 'D' || (name && (dr_chain_length(disk) < 2 || strcmp(name, "base.raw") != 0)) ||
        strcmp((const char *)file + 1036, "img.raw") != 0)
        return false;
    for (size_t i = 0; i < n; i++) {
        size_t at = 2560 + i / 512 / 8;
        bool own = at < size && (file[at] >> (i / 512 % 8) & 1);
        want[i] = own ? raw[i] : name && i < BASE_SIZE ? base[i] : 0;
    }
    return true;
}

static void compare(struct dr_disk *disk)
{
    uint64_t size = dr_size(disk);
    if (size > MAX_SIZE || dr_pread(disk, got, 0, size, NULL) < 0 || memcmp(got, want, size) != 0)
        abort();
}

static void look(struct dr_disk *disk)
{
    struct dr_extent_status s;
    uint64_t size = dr_size(disk);
    for (uint64_t off = 0; off < size; off += s.len)
        if (dr_block_status(disk, off, size - off, &s, NULL) < 0)
            break;
        else if (s.len == 0 || s.len > size - off)
            abort();
}

static void change_some(struct dr_disk *disk)
{
    uint64_t size = dr_size(disk), third = size / 3;
    if (size == 0)
        return; /* it may be refused to grow */
    memset(want, 0x77, third);
    if (dr_pwrite(disk, want, 0, third, 0, NULL) < 0)
        abort();
    memset(want + third, 0, third);
    if (dr_zero(disk, third, third, DR_MAY_UNMAP, NULL) < 0)
        abort();
    compare(disk);
    if (dr_flush(disk, NULL) < 0)
        abort();
    if (size == 0)
        return; /* over a parent it cannot grow, and it is refused */
    uint64_t other = size < 9000 ? size + 20000 : size - 7001;
    if (other > size)
        memset(want + size, 0, other - size);
    if (other > MAX_SIZE || dr_truncate(disk, other, NULL) < 0)
        abort();
    compare(disk);
}

static void report(void *user, const char *line)
{
    (void)user;
    if (line[0] == '\0')
        abort();
}

static void check(struct dr_fs *fs, unsigned fix)
{
    struct dr_image *image;
    struct dr_check_result result = {.report = report};
    if (dr_image_open(fs, PATH, NULL, fix ? DR_OPEN_RDWR : 0, &image, NULL) < 0)
        return;
    if (image->fmt->check)
        image->fmt->check(image, fix, &result, NULL);
    dr_image_unref(image, NULL);
}

/* A trial tells what will happen, and success is found by the next open. */
static void other_parent(struct dr_fs *fs, const char *name)
{
    struct dr_image *image;
    struct dr_error err = DR_ERROR_INIT;
    if (dr_image_open(fs, PATH, "add-cow", DR_OPEN_RDWR | DR_OPEN_NO_BACKING, &image, NULL) < 0)
        return;
    int try = image->fmt->set_backing(image, NULL, name, "raw", DR_TRY, &err);
    if (try < 0 && err.text[0] == '\0')
        abort();
    err = (struct dr_error)DR_ERROR_INIT;
    int done = image->fmt->set_backing(image, NULL, name, "raw", 0, &err);
    if ((try == 0) != (done == 0))
        abort();
    dr_image_unref(image, NULL);
    if (done < 0)
        return;
    if (dr_image_open(fs, PATH, "add-cow", DR_OPEN_NO_BACKING, &image, NULL) < 0)
        abort();
    if (!image->backing_name != !name || (name && strcmp(image->backing_name, name) != 0))
        abort();
    dr_image_unref(image, NULL);
}

static void fill_constants(void)
{
    for (size_t i = 0; i < MAX_SIZE; i++)
        raw[i] = (uint8_t)(1 + i % 253);
    memset(base, 0xba, sizeof(base));
}

static void whole(struct dr_fs *fs, const uint8_t *file, size_t size)
{
    struct dr_disk *disk = opened(fs, 0);
    if (!disk)
        return;
    bool known = expect(disk, file, size);
    if (known)
        compare(disk);
    look(disk);
    dr_close(disk, NULL);
    check(fs, 0);
    if (known && (disk = opened(fs, DR_OPEN_RDWR))) {
        change_some(disk);
        if (dr_close(disk, NULL) < 0)
            abort();
        if (!(disk = opened(fs, 0)))
            abort();
        compare(disk);
        dr_close(disk, NULL);
    }
    check(fs, DR_CHECK_FIX_ALL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char name[256];
    if (size < 3 || size - 3 < data[2])
        return 0;
    struct dr_fs *fs = dr_fs_memory_new();
    if (!fs)
        return 0;
    size_t raw_size = (size_t)(data[0] << 8 | data[1]) * 100 % (MAX_SIZE / 2), n = data[2];
    memcpy(name, data + 3, n);
    name[n] = '\0';
    fill_constants();
    put(fs, "/d/base.raw", base, sizeof(base));
    put(fs, "/d/img.raw", raw, raw_size);
    put(fs, PATH, data + 3 + n, size - 3 - n);
    whole(fs, data + 3 + n, size - 3 - n);
    other_parent(fs, name[0] ? name : NULL);
    dr_fs_memory_free(fs);
    return 0;
}
