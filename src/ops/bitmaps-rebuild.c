/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Making a bitmap right again that may lack changes: what differs between the disk and a backup of
 * it is what it has to say, to the granule or a little more. What is zero on both sides is not
 * read. */
#include "base/bytes.h"
#include "core/marks.h"
#include "ops/ops-internal.h"

#define STEP 512u /* the finest granularity */

struct rebuild {
    struct dr_pair_walk pair;
    struct dr_marks differs;
    const char *bitmap;
    struct dr_chain *against;
    struct dr_job *job;
};

static int next_item(void *user, struct dr_copy_item *item, struct dr_error *err)
{
    struct rebuild *rb = user;
    return dr_pair_next(&rb->pair, item, err);
}

static int mark_item(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err)
{
    struct rebuild *rb = user;
    int r = dr_pair_read(&rb->pair, item, buf, err);
    for (uint64_t at = 0; r == 0 && at < item->len; at += STEP) {
        at = dr_pair_differs(item, buf, at, STEP);
        if (at < item->len)
            dr_marks_set(&rb->differs, item->off + at, dr_min(STEP, item->len - at));
    }
    return r;
}

/* No request is past the gate: what is compared stays as it is until the bitmap says so. */
static int rebuild_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    struct rebuild *rb = user;
    uint64_t size = present->images[0]->size, theirs = rb->against->images[0]->size;
    (void)fresh;
    rb->pair.size = size;
    dr_walk_init(&rb->pair.a, present, 0, present->n, size);
    dr_walk_init(&rb->pair.b, rb->against, 0, rb->against->n, size);
    if (dr_marks_cover(&rb->differs, size) < 0)
        return dr_fail_errno(err, ENOMEM, "%s", present->images[0]->path);
    const struct dr_copy_policy policy = {
        .user = rb,
        .next = next_item,
        .work = mark_item,
        .buffers = 2,
        .buffer_size = DR_STOCK_BUFFER,
        .depth = dr_stock_depth_of_two(present, rb->against),
        .total = size,
    };
    int r = dr_copy_run(&policy, rb->job, err);
    if (r == 0 && size > theirs) /* what the backup does not have at all, be it zeros */
        dr_marks_set(&rb->differs, theirs, size - theirs);
    return r < 0 ? r : dr_image_bitmap_rebuild(present->images[0], rb->bitmap, &rb->differs, err);
}

static int rebuild(struct dr_disk *disk, struct rebuild *rb, struct dr_error *err)
{
    int r = dr_disk_claim(disk, "bitmap", err);
    if (r < 0)
        return r;
    r = dr_disk_quiesce(disk, rebuild_step, rb, NULL, err);
    dr_disk_unclaim(disk);
    return r;
}

int dr_disk_bitmap_rebuild(struct dr_disk *disk, const char *bitmap, struct dr_disk *against,
                           struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(bitmap, err);
    DR_REQUIRE(against, err);
    if (disk == against)
        return dr_fail(err, EINVAL, "a disk cannot be its own backup");
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    struct rebuild rb = {.bitmap = bitmap, .against = dr_disk_chain(against), .job = job};
    dr_marks_init(&rb.differs, (unsigned)__builtin_ctz(STEP));
    r = rebuild(disk, &rb, err);
    dr_marks_free(&rb.differs);
    dr_chain_unref(rb.against, NULL);
    return dr_job_end(job, r);
}
