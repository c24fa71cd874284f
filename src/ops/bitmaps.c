/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Bitmaps of an image, inside it or in a file beside it. Where a change cannot be made beside those
 * who write, it is made while no request is past the disk's gate. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ list */

struct collect {
    struct dr_bitmap *all;
    size_t n, room;
};

static int collect_one(void *user, const struct dr_bitmap_info *info)
{
    struct collect *c = user;
    if (c->n == c->room) {
        size_t room = c->room ? c->room * 2 : 16;
        void *more = realloc(c->all, room * sizeof(*c->all));
        if (!more)
            return -ENOMEM;
        c->all = more;
        c->room = room;
    }
    struct dr_bitmap *b = &c->all[c->n++];
    *b = (struct dr_bitmap){strdup(info->name), info->granularity, info->enabled,
                            info->inconsistent};
    return b->name ? 0 : -ENOMEM;
}

void dr_bitmaps_free(struct dr_bitmap *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(list[i].name);
    free(list);
}

static int list(struct dr_image *image, struct collect *c, struct dr_error *err)
{
    return dr_image_bitmap_list(image, collect_one, c, err);
}

int dr_disk_bitmaps(struct dr_disk *disk, struct dr_bitmap **bitmaps, size_t *n,
                    struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(bitmaps, err);
    DR_REQUIRE(n, err);
    struct collect c = {0};
    struct dr_pass pass;
    int r = list(dr_disk_enter(disk, &pass)->images[0], &c, err);
    dr_disk_leave(disk, &pass);
    if (r < 0) {
        dr_bitmaps_free(c.all, c.n);
        return r == -ENOMEM ? dr_fail(err, ENOMEM, "out of memory for %zu bitmaps", c.n) : r;
    }
    *bitmaps = c.all;
    *n = c.n;
    return 0;
}

/* ------------------------------------------------------------------ read */

int dr_disk_bitmap_read(struct dr_disk *disk, const char *bitmap,
                        int (*each)(void *user, uint64_t off, uint64_t len), void *user,
                        struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(bitmap, err);
    DR_REQUIRE(each, err);
    struct dr_pass pass;
    struct dr_image *image = dr_disk_enter(disk, &pass)->images[0];
    int r = dr_image_bitmap_read(image, bitmap, each, user, err);
    dr_disk_leave(disk, &pass);
    return r;
}

/* ------------------------------------------------------------------ change */

static int change_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    (void)fresh;
    return dr_image_bitmap_change(present->images[0], user, err);
}

int dr_ops_bitmap_change(struct dr_disk *disk, struct dr_bitmap_change *c, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    struct dr_image *image = chain->images[0];
    if (!c->source) /* its images stay as they are: its disk is not written to while it is read */
        c->source = image;
    int r = dr_image_bitmap_change_live(image, c, err);
    if (r == 1)
        r = dr_disk_quiesce(disk, change_step, c, NULL, err);
    int closed = dr_chain_unref(chain, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* merge: the bitmap gets what the source has, also a new one. */
static int change_bitmap(struct dr_disk *disk, const char *bitmap, enum dr_bitmap_action action,
                         const struct dr_bitmap_options *o, bool merge, struct dr_error *err)
{
    struct dr_chain *source = NULL;
    if (merge && o->source_disk && o->source_disk != disk)
        source = dr_disk_chain(o->source_disk);
    struct dr_bitmap_change change = {
        .action = action,
        .name = bitmap,
        .granularity = o->granularity,
        .disabled = o->disabled,
        .inside = o->inside && action == DR_BITMAP_ADD,
        .source = source ? source->images[0] : NULL,
        .source_name = merge ? o->source : NULL,
    };
    int r = dr_disk_borrow(disk, "bitmap", err);
    if (r == 0) {
        r = dr_ops_bitmap_change(disk, &change, err);
        dr_disk_unborrow(disk);
    }
    if (source)
        dr_chain_unref(source, NULL);
    return r;
}

int dr_disk_bitmap_change(struct dr_disk *disk, const char *bitmap, enum dr_bitmap_action action,
                          const struct dr_bitmap_options *options, struct dr_error *err)
{
    static const struct dr_bitmap_options defaults;
    const struct dr_bitmap_options *o = options ? options : &defaults;
    DR_REQUIRE(disk, err);
    DR_REQUIRE(bitmap, err);
    if (action > DR_BITMAP_MERGE)
        return dr_fail(err, EINVAL, "%u is no change of a bitmap", (unsigned)action);
    if (action == DR_BITMAP_MERGE)
        DR_REQUIRE(o->source, err);
    return change_bitmap(disk, bitmap, action, o, action == DR_BITMAP_MERGE, err);
}

/* ------------------------------------------------------------------ for convert; qemu-img's texts
 */

struct listed {
    struct dr_bitmap *all;
    size_t n;
};

static int name_order(const void *a, const void *b)
{
    const struct dr_bitmap *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* present: those of the target; sorted here. */
static int check_copy(const struct listed *copied, const struct listed *present, bool skip_broken,
                      struct dr_error *err)
{
    if (present->n)
        qsort(present->all, present->n, sizeof(*present->all), name_order);
    for (size_t i = 0; i < copied->n; i++) {
        const struct dr_bitmap *b = &copied->all[i];
        if (b->inconsistent && skip_broken)
            continue;
        if (b->inconsistent)
            return dr_fail(err, EUCLEAN, "Cannot copy inconsistent bitmap '%s'", b->name);
        if (present->n && bsearch(b, present->all, present->n, sizeof(*b), name_order))
            return dr_fail(err, EEXIST, "Failed to create bitmap %s: Bitmap already exists: %s",
                           b->name, b->name);
    }
    return 0;
}

/* inside: those in files beside their images do not count. */
static int list_one(struct dr_disk *disk, bool inside, struct listed *l, struct dr_error *err)
{
    if (inside && !dr_image_bitmaps_inside(disk->chain->images[0]))
        return -ENOTSUP;
    return dr_disk_bitmaps(disk, &l->all, &l->n, err);
}

static int list_both(struct dr_disk *from, struct dr_disk *to, bool inside, struct listed *copied,
                     struct listed *present, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = list_one(to, inside, present, &why);
    if (r == -ENOTSUP)
        return dr_fail(err, ENOTSUP, "Format driver '%s' does not support bitmaps",
                       dr_image_format(to, 0));
    if (r == 0)
        r = list_one(from, inside, copied, &why);
    if (r == -ENOTSUP)
        return dr_fail(err, ENOTSUP, "Source lacks bitmap support");
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

int dr_ops_bitmaps_check(struct dr_disk *from, struct dr_disk *to,
                         const struct dr_convert_options *o, struct dr_error *err)
{
    struct listed copied = {0}, present = {0};
    int r = list_both(from, to, o->bitmaps_inside, &copied, &present, err);
    if (r == 0)
        r = check_copy(&copied, &present, o->skip_broken_bitmaps, err);
    dr_bitmaps_free(copied.all, copied.n);
    dr_bitmaps_free(present.all, present.n);
    return r;
}

/* At once: a bitmap that is there without its bits would hide what was written. */
static int copy_one(struct dr_disk *from, struct dr_disk *to, const struct dr_bitmap *b,
                    struct dr_error *err)
{
    const struct dr_bitmap_options o = {.granularity = b->granularity,
                                        .disabled = !b->enabled,
                                        .source = b->name,
                                        .source_disk = from};
    struct dr_error why = DR_ERROR_INIT;
    int r = change_bitmap(to, b->name, DR_BITMAP_ADD, &o, true, &why);
    return r == 0 ? 0 : dr_fail(err, -r, "Failed to create bitmap %s: %s", b->name, why.text);
}

int dr_ops_bitmaps_copy(struct dr_disk *from, struct dr_disk *to, struct dr_job *job,
                        struct dr_error *err)
{
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    int r = dr_disk_bitmaps(from, &list, &n, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (dr_job_stopped(job))
            r = dr_fail(err, ECANCELED, "stopped on request");
        else if (list[i].inconsistent)
            dr_job_message(job, "warning: Skipping inconsistent bitmap '%s'", list[i].name);
        else
            r = copy_one(from, to, &list[i], err);
    dr_bitmaps_free(list, n);
    return r;
}

/* ------------------------------------------------------------------ for a disk that goes over */

static int list_quietly(struct dr_image *image, struct collect *c, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = list(image, c, &why);
    if (r == 0 || r == -ENOTSUP)
        return r;
    return r == -ENOMEM ? dr_fail(err, ENOMEM, "%s: out of memory for its bitmaps", image->path)
                        : dr_fail(err, -r, "%s", why.text);
}

int dr_ops_bitmaps_check_move(struct dr_image *from, struct dr_image *to, struct dr_error *err)
{
    struct collect its = {0}, there = {0};
    int r = list_quietly(from, &its, err);
    if (r == 0 && its.n > 0) {
        r = list_quietly(to, &there, err);
        if (r == -ENOTSUP)
            r = dr_fail(err, ENOTSUP,
                        "%s: has %zu bitmap%s inside, which %s cannot keep: remove them first, "
                        "or commit without going over",
                        from->path, its.n, its.n > 1 ? "s" : "", to->path);
    } else if (r == -ENOTSUP) {
        r = 0; /* it has none */
    }
    dr_bitmaps_free(its.all, its.n);
    dr_bitmaps_free(there.all, there.n);
    return r;
}

/* In one step, as in copy_one. */
static int move_one(struct dr_image *from, struct dr_image *to, const struct dr_bitmap *b,
                    struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    struct dr_bitmap_change change = {.action = DR_BITMAP_ADD,
                                      .name = b->name,
                                      .granularity = b->granularity,
                                      .disabled = !b->enabled,
                                      .source = from,
                                      .source_name = b->name};
    int r = dr_image_bitmap_change(to, &change, &why);
    if (r != -EEXIST)
        return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
    change.action = DR_BITMAP_MERGE;
    return dr_image_bitmap_change(to, &change, err);
}

int dr_ops_bitmaps_move(struct dr_image *from, struct dr_image *to, struct dr_job *job,
                        struct dr_error *err)
{
    struct collect its = {0};
    int r = list_quietly(from, &its, err);
    if (r == 0 && its.n > 0) { /* those that note writes are complete only when it is settled */
        dr_bitmaps_free(its.all, its.n);
        its = (struct collect){0};
        r = dr_image_settle(from, err);
        if (r == 0)
            r = list_quietly(from, &its, err);
    }
    if (r == -ENOTSUP)
        r = 0;
    for (size_t i = 0; r == 0 && i < its.n; i++)
        if (its.all[i].inconsistent)
            dr_job_message(job, "%s: its bitmap '%s' is inconsistent, and stays there", from->path,
                           its.all[i].name);
        else
            r = move_one(from, to, &its.all[i], err);
    dr_bitmaps_free(its.all, its.n);
    return r;
}
