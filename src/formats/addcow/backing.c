/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Recording another parent. A short name stands in the header's first sector, which is written at
 * once or not at all. A longer one spans sectors that could tear, and then the whole file is
 * replaced: a mixture would leave a tail behind the NUL, and the image would be taken for a draft.
 */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

#define COPY_STEP (1u << 20)

static const char *recorded(const struct dr_image *image)
{
    const char *name = addcow_of(image)->h.backing;
    return name ? name : "";
}

/* ------------------------------------------------------------------ in place */

static int write_first_sector(struct dr_image *image, const char *field, struct dr_error *err)
{
    uint8_t sector[ADDCOW_SECTOR];
    struct dr_file *f = image->files[ADDCOW_META];
    int r = dr_file_pread(f, sector, 0, sizeof(sector), err);
    if (r < 0)
        return r;
    memset(sector + ADDCOW_BACKING_AT, 0, sizeof(sector) - ADDCOW_BACKING_AT);
    memcpy(sector + ADDCOW_BACKING_AT, field, strlen(field));
    r = dr_file_pwrite(f, sector, 0, sizeof(sector), err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* ------------------------------------------------------------------ by rename */

struct copy {
    struct dr_image *image;
    const char *field;
};

static int copy_run(struct dr_file *from, struct dr_file *to, uint64_t off, uint64_t len,
                    struct dr_error *err)
{
    size_t step = (size_t)dr_min(len, COPY_STEP);
    CLEANUP_FREE uint8_t *buf = malloc(step);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", from->path);
    for (uint64_t done = 0, n; done < len; done += n) {
        n = dr_min(step, len - done);
        int r = dr_file_pread(from, buf, off + done, (size_t)n, err);
        if (r == 0)
            r = dr_file_pwrite(to, buf, off + done, (size_t)n, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* The bitmap as it is, holes staying holes: it may be made for a disk of terabytes. */
static int fill_copy(void *user, struct dr_file *tmp, struct dr_error *err)
{
    const struct copy *c = user;
    const struct addcow_header *h = &addcow_of(c->image)->h;
    struct dr_file *old = c->image->files[ADDCOW_META];
    uint8_t header[ADDCOW_HEADER_SIZE];
    uint64_t size = dr_file_size(old);
    int r = dr_file_truncate(tmp, size, err);
    for (uint64_t at = h->bitmap_off, run; r == 0 && at < size; at += run) {
        enum dr_file_extent kind;
        r = dr_file_extent(old, at, size - at, &kind, &run, err);
        if (r == 0 && kind == DR_FILE_DATA)
            r = copy_run(old, tmp, at, run, err);
    }
    addcow_header_encode(header, c->field, h->image);
    return r < 0 ? r : dr_file_pwrite(tmp, header, 0, sizeof(header), err);
}

static int replace_file(struct dr_image *image, const char *field, struct dr_error *err)
{
    struct copy c = {.image = image, .field = field};
    struct dr_file *old = image->files[ADDCOW_META], *fresh = NULL;
    int r = dr_replace(image->fs, old->path, old, fill_copy, &c, &fresh, err);
    if (fresh) { /* it has the name, even if that could not be made durable */
        pthread_mutex_lock(&image->lock);
        image->files[ADDCOW_META] = fresh;
        pthread_mutex_unlock(&image->lock);
        dr_file_unref(old);
    }
    return r;
}

static int try_replace(struct dr_image *image, struct dr_error *err)
{
    struct dr_file *f = image->files[ADDCOW_META];
    uint64_t size = dr_file_size(f), need = 0, room;
    for (uint64_t at = 0, run; at < size; at += run) {
        enum dr_file_extent kind;
        int r = dr_file_extent(f, at, size - at, &kind, &run, err);
        if (r < 0)
            return r;
        need += kind == DR_FILE_DATA ? run : 0;
    }
    if (image->fs->ops->free_space &&
        image->fs->ops->free_space(image->fs, f->path, &room, NULL) == 0 && room < need)
        return dr_fail(err, ENOSPC,
                       "%s: a parent's name this long needs a new metadata file of %llu bytes, "
                       "%llu are free",
                       image->path, (unsigned long long)need, (unsigned long long)room);
    return dr_replace_try(image->fs, f->path, f, err);
}

/* ------------------------------------------------------------------ both */

static int remember(struct dr_image *image, const char *name, const char *format, const char *field,
                    struct dr_error *err)
{
    struct addcow_header *h = &addcow_of(image)->h;
    CLEANUP_FREE char *copy = name ? strdup(name) : NULL;
    CLEANUP_FREE char *kind = name ? strdup(format ? format : "raw") : NULL;
    CLEANUP_FREE char *text = name ? strdup(field) : NULL;
    if (name && (!copy || !kind || !text))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    free(image->backing_name);
    free(image->backing_format);
    free(h->backing);
    image->backing_name = DR_STEAL(copy);
    image->backing_format = DR_STEAL(kind);
    h->backing = DR_STEAL(text);
    return 0;
}

int addcow_check_backing(const struct dr_image *image, const struct dr_image *parent,
                         struct dr_error *err)
{
    for (unsigned i = 0; parent && i < image->n_files; i++)
        for (unsigned j = 0; j < parent->n_files; j++) {
            const struct dr_file_id *a = &image->files[i]->id, *b = &parent->files[j]->id;
            if (a->dev == b->dev && a->ino == b->ino)
                return dr_fail(err, EINVAL, "%s: its own %s cannot be its backing file",
                               image->path, i == ADDCOW_META ? "metadata file" : "image file");
        }
    return 0;
}

int addcow_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                       const char *format, unsigned flags, struct dr_error *err)
{
    CLEANUP_FREE char *field = NULL;
    if (parent)
        format = parent->fmt->name;
    int r = addcow_refuse_write(image, err);
    if (r == 0)
        r = addcow_check_backing(image, parent, err);
    if (r == 0)
        r = addcow_name_encode(image->path, name ? name : "", name ? format : NULL, &field, err);
    if (r < 0)
        return r;
    bool in_place = strlen(field) <= ADDCOW_SHORT_NAME &&
                    strlen(recorded(image)) <= ADDCOW_SHORT_NAME;
    if (flags & DR_TRY)
        return in_place ? 0 : try_replace(image, err);
    r = in_place ? write_first_sector(image, field, err) : replace_file(image, field, err);
    return r < 0 ? r : remember(image, name, format, field, err);
}
