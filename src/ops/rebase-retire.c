/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The end of a stream that leaves nothing but the image's plain file (add-cow): the disk goes on
 * with that file as a raw image, without being opened again, and the rest of the image is removed.
 *
 * The copy has made every byte the plain file's own; only a discard can undo that, and only on a
 * disk that has no parent: a bitmap follows those. While requests wait, what was discarded is made
 * zeros again, all is made durable, the image forgets its parent, and the new image is recorded.
 * Killed before that, the name leads to the whole image; killed afterwards, the plain file is the
 * disk, and what is left of the image reads the same. */
#include "ops/rebase.h"

#include "base/cleanup.h"

int rebase_retire_check(const struct rebase *rb, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb);
    if (!rb->retire)
        return 0;
    if (rb->name || rb->at > 0)
        return dr_fail(err, EINVAL,
                       "%s: only the active image can be left to its plain file, and only without "
                       "a parent",
                       rb->path);
    if (!image->fmt->plain || !image->fmt->plain(image))
        return dr_fail(err, ENOTSUP, "%s: %s images do not keep their disk in a plain file",
                       rb->path, image->fmt->name);
    return dr_ops_retire_check(image, &rb->o->open, err);
}

static unsigned plain_index(const struct dr_image *image)
{
    const struct dr_file *plain = image->fmt->plain(image);
    unsigned i = 0;
    while (image->files[i] != plain)
        i++;
    return i;
}

/* A chain of the plain file alone. */
static int make_chain(const struct rebase *rb, struct dr_chain **chain, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb), *plain;
    int r = dr_image_over(image, plain_index(image), "raw", &plain, err);
    if (r < 0)
        return r;
    if (plain->size != image->size)
        r = dr_fail(err, EIO, "%s: holds %llu bytes, and the disk has %llu", plain->path,
                    (unsigned long long)plain->size, (unsigned long long)image->size);
    *chain = r == 0 ? dr_chain_new(&plain, 1) : NULL;
    if (r < 0)
        dr_image_unref(plain, NULL);
    return r < 0 || *chain ? r : dr_fail(err, ENOMEM, "%s: out of memory", rb->path);
}

int rebase_retire_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct rebase *rb = user;
    struct dr_image *image = rebase_overlay(rb);
    struct dr_chain *next = NULL;
    int r = make_chain(rb, &next, err);
    if (r == 0)
        r = rebase_own_rest(rb, err);
    if (r == 0)
        r = dr_chain_flush(present, 0, err);
    if (r == 0 && image->backing_name)
        r = dr_image_set_backing(image, NULL, NULL, NULL, 0, err);
    if (r == 0)
        r = dr_image_settle(image, err);
    if (r == 0) {
        const struct dr_switch to = {rb->disk, next->images[0]->path, next->images[0]->fmt->name};
        r = dr_job_record(rb->job, &to, 1, err);
    }
    if (r == 0) {
        dr_image_leave(image, image->fmt->plain(image));
        *fresh = DR_STEAL(next);
    }
    dr_chain_unref(next, NULL);
    return r;
}

/* The disk has gone over. */
int rebase_retire_end(const struct rebase *rb, struct dr_error *err)
{
    struct dr_image *image = rebase_overlay(rb);
    int r = dr_ops_retire_remove(image, &rb->o->open, err);
    return r < 0 ? dr_prefix(err, r, "the disk goes on with %s, but what was %s is still there",
                             image->fmt->plain(image)->path, rb->path)
                 : 0;
}
