/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Recording another parent in whatever image: a trial tells what will happen, success is found by
 * the next open, and failure changes nothing that counts.
 *
 * The input: one byte n, n bytes of the parent's name, the file disk.vmdk. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PATH "/d/disk.vmdk"

static struct dr_image *opened(struct dr_fs *fs, unsigned flags)
{
    struct dr_image *image = NULL;
    dr_image_open(fs, PATH, "vmdk", flags | DR_OPEN_NO_BACKING, &image, NULL);
    return image;
}

static bool same(const char *a, const char *b)
{
    return (!a || !b) ? a == b : strcmp(a, b) == 0;
}

/* What is recorded must be `name`, to an open that writes nothing and to one that recovers. */
static void expect(struct dr_fs *fs, const char *name)
{
    for (int rw = 0; rw < 2; rw++) {
        struct dr_image *image = opened(fs, rw ? DR_OPEN_RDWR : 0);
        if (!image) {
            if (!rw)
                abort(); /* it opened before */
            continue;    /* not recoverable */
        }
        if (!same(image->backing_name, name))
            abort();
        dr_image_unref(image, NULL);
    }
}

static void change(struct dr_fs *fs, const char *name)
{
    struct dr_image *image = opened(fs, DR_OPEN_RDWR);
    if (!image)
        return;
    struct dr_error err = DR_ERROR_INIT;
    char *before = image->backing_name ? strdup(image->backing_name) : NULL;
    int try = image->fmt->set_backing(image, NULL, name, NULL, DR_TRY, &err);
    if (try < 0 && err.text[0] == '\0')
        abort();
    if (!same(image->backing_name, before))
        abort();
    err = (struct dr_error)DR_ERROR_INIT;
    int done = image->fmt->set_backing(image, NULL, name, NULL, 0, &err);
    if ((try == 0) != (done == 0))
        abort();
    dr_image_unref(image, NULL);
    expect(fs, done == 0 ? name : before);
    free(before);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char name[256];
    if (size < 1 || size - 1 < data[0])
        return 0;
    memcpy(name, data + 1, data[0]);
    name[data[0]] = '\0';
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f;
    if (!fs || dr_file_open(fs, PATH, DR_FILE_CREATE, &f, NULL) < 0)
        abort();
    size_t skip = 1 + (size_t)data[0];
    if (size > skip && dr_file_pwrite(f, data + skip, 0, size - skip, NULL) < 0)
        abort();
    dr_file_unref(f);
    change(fs, name[0] ? name : NULL);
    dr_fs_memory_free(fs);
    return 0;
}
