/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file of bitmaps beside an image. What is found in one that loads is inside of its disk, and
 * the same is found again when it was stored. Whatever it is, it is listed or refused with a
 * reason, and keeps nobody from the disk, unless a later program made it.
 *
 * The input: a byte (even: a whole file; odd: contents, to which the header is made), then the
 * bytes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/bitmap-file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define DISK   "/disk"
#define BESIDE "/disk" DR_BITMAP_FILE_SUFFIX
#define BYTES  65536u /* of the disk; also what seeds.py says */
#define FIRST  8192u  /* where contents begin */
#define HEAD   512u

static void must(bool true_)
{
    if (!true_)
        abort();
}

static void put(struct dr_fs *fs, const char *path, const void *bytes, size_t n)
{
    struct dr_file *f;
    must(dr_file_open(fs, path, DR_FILE_CREATE, &f, NULL) == 0);
    must(n == 0 || dr_file_pwrite(f, bytes, 0, n, NULL) == 0);
    dr_file_unref(f);
}

static void put_contents(struct dr_fs *fs, const uint8_t *bytes, size_t n)
{
    CLEANUP_FREE uint8_t *file = calloc(1, FIRST + n);
    must(file);
    memcpy(file, "DRBITMAP", 8);
    put_le32(file + 8, 1);
    put_le64(file + 16, 2);
    put_le64(file + 24, FIRST);
    put_le64(file + 32, n);
    put_le64(file + 40, XXH3_64bits(bytes, n));
    put_le64(file + HEAD - 8, XXH3_64bits(file, HEAD - 8));
    memcpy(file + FIRST, bytes, n);
    put(fs, BESIDE, file, FIRST + n);
}

/* ------------------------------------------------------------------ the file alone */

/* A sum over ranges, which are ascending and inside of the disk. */
struct seen {
    uint64_t end, sum, size;
};

static int see(void *user, uint64_t off, uint64_t len)
{
    struct seen *s = user;
    must(len && off >= s->end && dr_inside(off, len, s->size));
    s->end = off + len;
    s->sum = s->sum * 31 + off * 7 + len;
    return 0;
}

static void compare(const struct dr_bitmap_file *a, const struct dr_bitmap_file *b)
{
    must(a->n == b->n && a->n_files == b->n_files && a->disk == b->disk);
    must(a->n_files == 0 || memcmp(a->files, b->files, a->n_files * sizeof(*a->files)) == 0);
    for (uint32_t i = 0; i < a->n; i++) {
        const struct dr_noted *x = &a->list[i], *y = &b->list[i];
        struct seen of_x = {.size = a->disk}, of_y = of_x;
        must(strcmp(x->name, y->name) == 0 && x->enabled == y->enabled);
        must(x->distrust == y->distrust && x->set->bits == y->set->bits);
        must(dr_bitmap_file_find(a, x->name) == x);
        dr_marks_each(x->set, a->disk, see, &of_x);
        dr_marks_each(y->set, b->disk, see, &of_y);
        must(of_x.sum == of_y.sum);
    }
}

static int load(struct dr_fs *fs, struct dr_bitmap_file *b)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = dr_bitmap_file_load(fs, BESIDE, b, &err);
    must((r < 0 && r != -ENOENT) == (err.text[0] != '\0'));
    return r;
}

/* in_use, as the file of a writer who was interrupted. */
static void store_and_load(struct dr_fs *fs, struct dr_bitmap_file *b, bool in_use)
{
    struct dr_bitmap_file again;
    struct dr_file *disk;
    must(dr_file_open(fs, DISK, 0, &disk, NULL) == 0);
    must(dr_bitmap_file_store(b, in_use, disk, NULL) == 0);
    must(load(fs, &again) == 0 && again.in_use == in_use);
    compare(b, &again);
    dr_bitmap_file_free(&again);
    must(dr_bitmap_file_use(b, disk, NULL) == 0);
    must(load(fs, &again) == 0 && again.in_use);
    compare(b, &again);
    dr_bitmap_file_free(&again);
    dr_file_unref(disk);
}

/* ------------------------------------------------------------------ beside a disk */

struct found {
    unsigned n, bad;
};

static int count(void *user, const struct dr_bitmap_info *info)
{
    struct found *f = user;
    f->n++;
    f->bad += info->inconsistent;
    return 0;
}

static int list(struct dr_image *image, struct found *f)
{
    struct dr_error err = DR_ERROR_INIT;
    *f = (struct found){0};
    int r = dr_image_bitmap_list(image, count, f, &err);
    must((r < 0) == (err.text[0] != '\0'));
    return r;
}

/* A new bitmap is trusted beside whatever others there are, and its removal leaves them. */
static void use_disk(struct dr_fs *fs, int loaded)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_bitmap_change c = {.action = DR_BITMAP_ADD, .name = "made here"};
    struct dr_image *image = NULL;
    struct found before, after;
    must(dr_image_open(fs, DISK, "raw", DR_OPEN_RDWR, &image, NULL) == 0);
    must((list(image, &before) == 0) == (loaded == 0));
    int r = dr_image_begin(image, 0, true, &err);
    must(r == 0 || (r == -ENOTSUP && loaded == -ENOTSUP && err.text[0]));
    if (r == 0 && loaded == 0) {
        must(dr_image_settle(image, NULL) == 0 && list(image, &after) == 0);
        must(after.n == before.n && after.bad == before.bad);
    }
    r = dr_image_bitmap_change(image, &c, NULL);
    must(r == 0 || loaded < 0 || before.n > 0);
    if (r == 0) {
        must(list(image, &after) == 0 && after.n == before.n + 1 && after.bad == before.bad);
        c.action = DR_BITMAP_REMOVE;
        must(dr_image_bitmap_change(image, &c, NULL) == 0);
        must(list(image, &after) == 0 && after.n == before.n && after.bad == before.bad);
    }
    must(dr_image_unref(image, NULL) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct dr_fs *fs = dr_fs_memory_new();
    static const uint8_t disk[BYTES];
    struct dr_bitmap_file b;
    must(fs);
    put(fs, DISK, disk, sizeof(disk));
    if (size > 0 && data[0] % 2)
        put_contents(fs, data + 1, size - 1);
    else if (size > 0)
        put(fs, BESIDE, data + 1, size - 1);
    int r = size > 0 ? load(fs, &b) : -ENOENT;
    if (size > 0) {
        use_disk(fs, r);
        dr_bitmap_file_free(&b);
        r = load(fs, &b);
        if (r == 0) {
            store_and_load(fs, &b, false);
            store_and_load(fs, &b, true);
        }
        dr_bitmap_file_free(&b);
    }
    dr_fs_memory_free(fs);
    return 0;
}
