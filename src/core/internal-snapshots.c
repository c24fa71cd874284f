/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots inside an image. A driver does them with everything durable and nobody writing: the
 * core flushes, and locks the whole image against every change, so that no in-place writer is left
 * who looked up a place before it became the snapshot's. Readers go on. */
#include "core/internal.h"

typedef int (*snapshot_change)(struct dr_image *image, const char *name, struct dr_error *err);

static int change_alone(struct dr_image *image, snapshot_change change, bool guest_view,
                        const char *name, struct dr_error *err)
{
    struct dr_range range;
    if (!change)
        return dr_fail(err, ENOTSUP, "%s: %s images have no snapshots inside", image->path,
                       image->fmt->name);
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    int r = dr_image_begin(image, 0, guest_view, err);
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    r = dr_image_flush_all(image, err);
    if (r == 0)
        r = change(image, name, err);
    int flushed = dr_image_flush_all(image, r < 0 ? NULL : err); /* also what was freed goes */
    dr_range_unlock(image->ranges, &range);
    return r < 0 ? r : flushed;
}

int dr_image_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err)
{
    return change_alone(image, image->fmt->snapshot_create, false, name, err);
}

int dr_image_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err)
{
    return change_alone(image, image->fmt->snapshot_apply, true, id, err);
}

int dr_image_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err)
{
    return change_alone(image, image->fmt->snapshot_delete, false, id, err);
}

int dr_image_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                           struct dr_error *err)
{
    return image->fmt->snapshot_list ? image->fmt->snapshot_list(image, each, user, err) : 0;
}
