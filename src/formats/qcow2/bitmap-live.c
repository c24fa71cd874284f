/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Adding and removing a bitmap while others write to the disk, and wait for memory only:
 *
 *     beside them    the new directory becomes the image's; a new bitmap is in use in it already
 *     they wait      what notes changes goes with the new directory; with a new bitmap it begins
 *                    anew, since that one has no part in what changed before
 *     beside them    what was noted before goes into the bitmaps of before, which are in use
 *
 * Killed anywhere, the enabled bitmaps are in use, as they are whenever a writer is killed. */
#include "formats/qcow2/bitmap.h"

#include "base/cleanup.h"

struct live {
    struct dr_image *image;
    const struct dr_bitmap_change *change;
    struct qcow2_bitmap_edit edit;
    struct qcow2_track *next; /* then: the one before */
    bool switched;            /* to the new directory, whatever failed then */
};

/* begin_write, which a full refcount table calls at any time, leaves the bitmaps alone meanwhile.
 * Returns whether this is a change for here. */
static bool begin(struct live *l)
{
    const struct dr_bitmap_change *c = l->change;
    bool empty = c->action == DR_BITMAP_ADD && !c->source_name && !c->ranges;
    DR_LOCK_SCOPE(&l->image->begin_lock);
    if (!(empty || c->action == DR_BITMAP_REMOVE) || !qcow2_track_is_sound(l->image))
        return false;
    atomic_store(&qcow2_of(l->image)->editing, true);
    return true;
}

static int draft(struct live *l, struct dr_error *err)
{
    struct qcow2_bitmap_edit *e = &l->edit;
    struct qcow2_bitmap_draft *removed = qcow2_edit_find(e, l->change->name), *added = NULL;
    uint32_t at = removed ? (uint32_t)(removed - e->list) : 0;
    int r = qcow2_edit_change(e, l->change, err);
    if (r < 0)
        return r;
    if (l->change->action == DR_BITMAP_ADD) {
        added = &e->list[e->n - 1];
        if (added->b.flags & QCOW2_BITMAP_AUTO)
            qcow2_draft_flags(added, added->b.flags | QCOW2_BITMAP_IN_USE);
    }
    l->next = qcow2_track_next(e, added, at);
    return l->next ? 0 : dr_fail_errno(err, ENOMEM, "%s", l->image->path);
}

static void exchange(void *user)
{
    struct live *l = user;
    l->next = qcow2_track_exchange(l->image, l->next);
}

static int change(struct live *l, struct dr_error *err)
{
    int r = qcow2_edit_begin(&l->edit, l->image, err);
    l->edit.live = true;
    if (r == 0)
        r = draft(l, err);
    if (r == 0)
        r = qcow2_edit_commit(&l->edit, err);
    else
        qcow2_places_lose(l->image, &l->edit.taken, NULL);
    l->switched = l->edit.switched;
    qcow2_edit_end(&l->edit);
    if (l->switched)
        dr_image_quietly(l->image, exchange, l);
    return r;
}

static void give_up(struct live *l)
{
    struct dr_bitmap_change undo = {.action = DR_BITMAP_REMOVE, .name = l->change->name};
    if (l->change->action == DR_BITMAP_ADD)
        qcow2_bitmap_change_live(l->image, &undo, NULL);
}

int qcow2_bitmap_change_live(struct dr_image *image, const struct dr_bitmap_change *c,
                             struct dr_error *err)
{
    struct live l = {.image = image, .change = c};
    if (!begin(&l))
        return 1;
    int r = change(&l, err);
    atomic_store(&qcow2_of(image)->editing, false);
    if (l.switched && c->action == DR_BITMAP_ADD && l.next) {
        int stored = qcow2_track_store(image, l.next, r == 0 ? err : NULL);
        r = r < 0 ? r : stored;
    }
    if (r < 0 && l.switched)
        give_up(&l);
    qcow2_track_free(l.next);
    return r;
}
