/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A whole image, of whatever format it looks like: opened, mapped, read, checked; then opened for
 * writing (which recovers what was not closed), written, and opened again. All in memory.
 *
 * The input is the file disk.vmdk; if it holds the line "--8<--", what follows that line is the
 * file extent.vmdk, which a descriptor may name. flat.raw (64 KiB) is always there. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/core.h"
#include "drover/ops.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MARK "\n--8<--\n"

static void put(struct dr_fs *fs, const char *name, const void *data, size_t size)
{
    struct dr_file *f;
    if (dr_file_open(fs, name, DR_FILE_RDWR | DR_FILE_CREATE, &f, NULL) < 0)
        abort();
    if (size > 0 && dr_file_pwrite(f, data, 0, size, NULL) < 0)
        abort();
    dr_file_unref(f);
}

static void report(void *user, const char *line)
{
    (void)user;
    if (line[0] == '\0')
        abort();
}

/* Every answer must move on; a disk of many small pieces is left half way. */
static void look(struct dr_disk *disk)
{
    static uint8_t buf[8192];
    uint64_t size = dr_size(disk), off = 0;
    struct dr_extent_status s;
    for (int i = 0; i < 300 && off < size; i++, off += s.len) {
        if (dr_block_status(disk, off, size - off, &s, NULL) < 0)
            break;
        if (s.len == 0 || s.len > size - off)
            abort();
        size_t n = s.len < sizeof(buf) ? (size_t)s.len : sizeof(buf);
        dr_pread(disk, buf, off, n, NULL);
    }
    if (size > sizeof(buf))
        dr_pread(disk, buf, size - sizeof(buf), sizeof(buf), NULL);
}

/* What is found to be damaged; UINT64_MAX: nobody can say. */
static uint64_t check(struct dr_fs *fs, unsigned fix)
{
    struct dr_image *image;
    struct dr_check_result result = {.report = report};
    unsigned flags = fix ? DR_OPEN_RDWR : 0;
    if (dr_image_open(fs, "/d/disk.vmdk", NULL, flags, &image, NULL) < 0)
        return UINT64_MAX;
    int r = image->fmt->check ? image->fmt->check(image, fix, &result, NULL) : -ENOTSUP;
    dr_image_unref(image, NULL);
    return r < 0 || result.check_errors ? UINT64_MAX : result.corruptions;
}

/* What was written is read back, here and after the next open. */
static void write_some(struct dr_disk *disk)
{
    static const uint8_t text[700] = "written by the fuzzer";
    uint8_t back[sizeof(text)];
    uint64_t size = dr_size(disk);
    if (size < sizeof(text) + 512)
        return;
    uint64_t places[] = {0, size / 2 / 512 * 512 + 100, size - sizeof(text)};
    for (size_t i = 0; i < 3; i++) {
        if (places[i] + sizeof(text) > size ||
            dr_pwrite(disk, text, places[i], sizeof(text), 0, NULL) < 0)
            continue;
        if (dr_pread(disk, back, places[i], sizeof(back), NULL) == 0 &&
            memcmp(text, back, sizeof(text)) != 0)
            abort();
    }
    dr_zero(disk, 0, size < 200000 ? size : 200000, DR_MAY_UNMAP, NULL);
    dr_discard(disk, 0, size < 100000 ? size : 100000, NULL);
    dr_flush(disk, NULL);
}

static int no_range(void *user, uint64_t off, uint64_t len)
{
    uint64_t *end = user;
    if (off < *end || len == 0)
        abort(); /* ascending */
    *end = off + len;
    return 0;
}

static void change_bitmaps(struct dr_disk *disk)
{
    static const struct dr_bitmap_options merge = {.source = "fuzz"};
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    if (dr_disk_bitmaps(disk, &list, &n, NULL) < 0)
        return;
    dr_disk_bitmap_change(disk, "fuzz", DR_BITMAP_ADD, NULL, NULL);
    write_some(disk);
    for (size_t i = 0; i < n; i++) {
        uint64_t end = 0;
        dr_disk_bitmap_read(disk, list[i].name, no_range, &end, NULL);
        if (end > dr_size(disk))
            abort();
        dr_disk_bitmap_change(disk, list[i].name, DR_BITMAP_MERGE, &merge, NULL);
        dr_disk_bitmap_change(disk, list[i].name, i % 2 ? DR_BITMAP_CLEAR : DR_BITMAP_REMOVE, NULL,
                              NULL);
    }
    dr_bitmaps_free(list, n);
}

static int first_id(void *user, const struct dr_snapshot_info *info)
{
    char **id = user;
    if (!*id)
        *id = strdup(info->id);
    return 0;
}

/* Those inside: one more, back to the first, and that one goes. */
static void change_snapshots(struct dr_disk *disk)
{
    struct dr_image *image = disk->chain->images[0];
    char *id = NULL;
    dr_image_snapshot_create(image, "fuzz", NULL);
    write_some(disk);
    if (dr_image_snapshot_list(image, first_id, &id, NULL) == 0 && id) {
        dr_image_snapshot_apply(image, id, NULL);
        write_some(disk);
        dr_image_snapshot_delete(image, id, NULL);
    }
    free(id);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct dr_fs *fs = dr_fs_memory_new();
    if (!fs)
        return 0;
    static const uint8_t flat[65536];
    const uint8_t *mark = memmem(data, size, MARK, sizeof(MARK) - 1);
    size_t first = mark ? (size_t)(mark - data) + 1 : size;
    put(fs, "/d/disk.vmdk", data, first);
    if (mark)
        put(fs, "/d/extent.vmdk", mark + sizeof(MARK) - 1, size - first - sizeof(MARK) + 2);
    put(fs, "/d/flat.raw", flat, sizeof(flat));

    struct dr_open_options options = {.flags = 0};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    int r = dr_open_fs(fs, "/d/disk.vmdk", &options, &disk, &err);
    if (r < 0 && (err.errnum == 0 || err.text[0] == '\0'))
        abort(); /* every refusal says why */
    if (r == 0) {
        look(disk);
        dr_close(disk, NULL);
        bool sound = check(fs, 0) == 0;
        options.flags = DR_OPEN_RDWR;
        if (dr_open_fs(fs, "/d/disk.vmdk", &options, &disk, NULL) == 0) {
            write_some(disk);
            dr_close(disk, NULL);
        }
        if (sound && check(fs, 0) != 0)
            abort(); /* what was sound stays so */
        if (dr_open_fs(fs, "/d/disk.vmdk", &options, &disk, NULL) == 0) {
            change_bitmaps(disk);
            dr_close(disk, NULL);
        }
        if (sound && check(fs, 0) != 0)
            abort(); /* what was sound stays so */
        if (dr_open_fs(fs, "/d/disk.vmdk", &options, &disk, NULL) == 0) {
            change_snapshots(disk);
            dr_close(disk, NULL);
        }
        if (sound && check(fs, 0) != 0)
            abort();
        check(fs, DR_CHECK_FIX_ALL);
    }
    dr_fs_memory_free(fs);
    return 0;
}
