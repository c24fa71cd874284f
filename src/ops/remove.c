/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Removing an image: all of its files, when nobody uses it. The main file goes last, since as long
 * as something is left its name tells whose it is. */
#include <stdio.h>

#include "base/cleanup.h"
#include "core/fingerprint.h"
#include "ops/ops-internal.h"

/* Names of the images beside this one that have it as their parent, with commas between; "" = none,
 * NULL = out of memory. */
static char *children_in(const struct dr_scan *scan, struct dr_file_id own)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    if (!out)
        return NULL;
    for (size_t i = 0; i < scan->n; i++)
        if (dr_scan_is_child(&scan->all[i], own) && !dr_same_id(scan->all[i].id, own))
            fprintf(out, "%s%s", ftell(out) > 0 ? ", " : "", scan->all[i].path);
    fclose(out);
    return text;
}

int dr_ops_children(struct dr_image *image, const struct dr_open_options *open, char **names,
                    struct dr_error *err)
{
    struct dr_scan scan = {0};
    *names = NULL;
    int r = dr_scan_beside(&scan, image->fs, image->path, open, err);
    if (r == 0)
        *names = children_in(&scan, dr_image_id(image));
    dr_scan_free(&scan);
    return r < 0 || *names ? r : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
}

int dr_ops_lock(struct dr_image *image, struct dr_error *err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < image->n_files; i++)
        r = image->files[i]->block_device
                ? dr_fail(err, ENOTSUP, "%s: is a block device, which cannot be removed",
                          image->files[i]->path)
                : dr_file_upgrade(image->files[i], err);
    return r;
}

static int refuse_children(struct dr_image *image, const struct dr_open_options *open,
                           struct dr_error *err)
{
    CLEANUP_FREE char *names = NULL;
    int r = dr_ops_children(image, open, &names, err);
    if (r == 0 && *names)
        r = dr_fail(err, EBUSY, "%s: these images have it as their parent: %s", image->path, names);
    return r;
}

/* Links are followed: unlinking a link would leave the file where it is. */
static int unlink_file(struct dr_fs *fs, const struct dr_file *file, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    struct dr_file_id id;
    int r = fs->ops->realpath(fs, file->path, &real, err);
    if (r == 0)
        r = fs->ops->identify(fs, real, &id, err);
    if (r == 0 && !dr_same_id(id, file->id))
        r = dr_fail(err, ESTALE, "%s: was replaced by somebody else meanwhile", file->path);
    return r < 0 ? r : fs->ops->unlink(fs, real, err);
}

/* The bitmaps, and what is recorded of the parent, beside the image go first: without it nobody
 * would know whose they were. */
static int unlink_bitmaps(struct dr_fs *fs, const struct dr_file *file, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL;
    int r = fs->ops->realpath(fs, file->path, &real, err);
    if (r == 0)
        r = dr_bitmaps_unlink(fs, real, err);
    return r < 0 ? r : dr_fingerprint_remove(fs, real, err);
}

/* The main file goes when the loss of the others is durable. */
static int unlink_files(struct dr_fs *fs, const struct dr_image *image, bool flush,
                        struct dr_error *err)
{
    const char *main = image->files[0]->path;
    int r = 0;
    for (unsigned i = image->n_files; r == 0 && i-- > 0;) {
        if (i == 0 && image->n_files > 1 && flush)
            r = fs->ops->sync_dir(fs, main, err);
        if (r == 0)
            r = unlink_file(fs, image->files[i], err);
    }
    return r == 0 && flush ? fs->ops->sync_dir(fs, main, err) : r;
}

int dr_ops_remove_image(struct dr_fs *fs, const char *path, const char *format,
                        const struct dr_open_options *open,
                        int (*may)(void *user, struct dr_image *image, struct dr_error *err),
                        void *user, struct dr_error *err)
{
    CLEANUP_IMAGE struct dr_image *image = NULL;
    unsigned flags = open->flags & (DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_SALVAGE);
    /* Without one of its files it is not opened: nobody knows whether that is lost or elsewhere. */
    int r = dr_image_open(fs, path, format, flags, &image, err);
    if (r == 0 && (image->contained || (image->fmt->flags & DR_FORMAT_MEMBERS)))
        r = dr_fail(err, ENOTSUP, "%s: is a disk inside an archive, which is not removed",
                    image->path);
    if (r == 0)
        r = dr_ops_lock(image, err);
    if (r == 0 && may)
        r = may(user, image, err);
    if (r == 0)
        r = refuse_children(image, open, err);
    if (r == 0)
        r = unlink_bitmaps(fs, image->files[0], err);
    return r < 0 ? r : unlink_files(fs, image, !(open->flags & DR_OPEN_NO_FLUSH), err);
}

bool dr_ops_holds_nothing(struct dr_image *image)
{
    struct dr_extent ext = {.kind = DR_HOLE};
    size_t snapshots = 0;
    if (dr_image_snapshot_count(image, &snapshots, NULL) < 0)
        return false;
    for (uint64_t off = 0; off < image->size && ext.kind == DR_HOLE; off += ext.len)
        if (dr_image_map(image, off, image->size - off, &ext, NULL) < 0)
            return false;
    return ext.kind == DR_HOLE && snapshots == 0;
}

/* ------------------------------------------------------------------ what leaves a chain */

int dr_ops_left_begin(struct dr_ops_left *left, struct dr_disk *disk, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    left->paths = calloc(chain->n, sizeof(*left->paths));
    left->formats = calloc(chain->n, sizeof(*left->formats));
    bool all = left->paths && left->formats;
    for (size_t i = 0; all && i < chain->n; i++) {
        left->formats[i] = chain->images[i]->fmt;
        left->paths[i] = strdup(chain->images[i]->path);
        left->n = i + 1;
        all = left->paths[i];
    }
    int r = all ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", chain->images[0]->path);
    dr_chain_unref(chain, NULL);
    return r;
}

static bool is_in(const struct dr_chain *chain, const char *path)
{
    for (size_t i = 0; i < chain->n; i++)
        if (strcmp(chain->images[i]->path, path) == 0)
            return true;
    return false;
}

/* Upper ones first: they have the lower ones as parents. */
int dr_ops_left_remove(const struct dr_ops_left *left, struct dr_disk *disk,
                       const struct dr_open_options *open, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    int r = 0;
    for (size_t i = 0; r == 0 && i < left->n; i++) {
        if (is_in(chain, left->paths[i]))
            continue;
        r = dr_ops_remove_image(disk->fs, left->paths[i], left->formats[i]->name, open, NULL, NULL,
                                err);
        if (r < 0)
            r = dr_prefix(err, r, "%s goes on without %s, but that could not be removed",
                          chain->images[0]->path, left->paths[i]);
    }
    dr_chain_unref(chain, NULL);
    return r;
}

void dr_ops_left_free(struct dr_ops_left *left)
{
    for (size_t i = 0; i < left->n; i++)
        free(left->paths[i]);
    free(left->paths);
    free(left->formats);
    *left = (struct dr_ops_left){0};
}
