/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The extents of ESX behind a descriptor that is sound: the input is the extent. Mapped, read,
 * checked, written; what was sound stays so, and what was written is there after the next open. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SIZE (9000 * UINT64_C(512))
static const char text[] = "# Disk DescriptorFile\nversion=1\nCID=12345678\n"
                           "parentCID=ffffffff\ncreateType=\"custom\"\n"
                           "RW 9000 %s \"extent.vmdk\"\n";

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

static struct dr_disk *opened(struct dr_fs *fs, unsigned flags)
{
    struct dr_open_options o = {.format = "vmdk", .flags = flags};
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk = NULL;
    if (dr_open_fs(fs, "/d/disk.vmdk", &o, &disk, &err) < 0 && err.text[0] == '\0')
        abort(); /* every refusal says why */
    return disk;
}

static bool is_sound(struct dr_fs *fs)
{
    struct dr_image *image;
    struct dr_check_result result = {.report = report};
    if (dr_image_open(fs, "/d/disk.vmdk", "vmdk", 0, &image, NULL) < 0)
        return false;
    int r = image->fmt->check(image, 0, &result, NULL);
    dr_image_unref(image, NULL);
    return r == 0 && result.corruptions == 0 && result.check_errors == 0;
}

static bool read_all(struct dr_fs *fs, uint8_t *buf)
{
    struct dr_disk *disk = opened(fs, 0);
    struct dr_extent_status s;
    if (!disk)
        return false;
    for (uint64_t off = 0; off < SIZE && dr_block_status(disk, off, SIZE - off, &s, NULL) == 0;
         off += s.len)
        if (s.len == 0 || s.len > SIZE - off)
            abort();
    bool whole = dr_pread(disk, buf, 0, SIZE, NULL) == 0;
    dr_close(disk, NULL);
    return whole;
}

/* A few places; *want follows. */
static bool write_some(struct dr_fs *fs, uint8_t *want)
{
    static const struct {
        uint64_t off, len;
    } places[] = {{0, 700}, {4200 * 512 - 100, 3000}, {SIZE - 300, 300}};
    struct dr_disk *disk = opened(fs, DR_OPEN_RDWR);
    bool all = disk != NULL;
    for (size_t i = 0; all && i < sizeof(places) / sizeof(places[0]); i++) {
        memset(want + places[i].off, 0x5a, places[i].len);
        all = dr_pwrite(disk, want + places[i].off, places[i].off, places[i].len, 0, NULL) == 0;
    }
    return disk && dr_close(disk, NULL) == 0 && all;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t before[SIZE], after[SIZE];
    char desc[sizeof(text) + 20];
    struct dr_fs *fs = dr_fs_memory_new();
    if (!fs)
        return 0;
    bool se = size > 0 && data[0] == 0xbe;
    snprintf(desc, sizeof(desc), text, se ? "SESPARSE" : "VMFSSPARSE");
    put(fs, "/d/disk.vmdk", desc, strlen(desc));
    put(fs, "/d/extent.vmdk", data, size);
    bool whole = read_all(fs, before), sound = is_sound(fs);
    if (write_some(fs, before) && whole && sound &&
        (!read_all(fs, after) || memcmp(before, after, SIZE) != 0))
        abort();
    if (sound && !is_sound(fs))
        abort();
    dr_fs_memory_free(fs);
    return 0;
}
