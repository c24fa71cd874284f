/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An open disk goes on with its new child, and its requests do not wait for any file meanwhile.
 *
 *   beside the guest   flush the disk; the child takes its name; open it; record "goes on with the
 *                      child"; each is durable before the next
 *   requests wait      put the chain with the child on top in the place of the old one
 *   beside the guest   make the old top durable and freeze it; renew the index of the chain
 *
 * The child is empty: over the old top it reads as that does. So the record may come before the
 * switch: a server that is killed in between is begun again with the child, over all that was
 * written. (A child that was there before the snapshot covers what it holds from then on.)
 *
 * After the switch nobody writes to the old top, but it still holds in memory what the guest was
 * told is written. Until it is frozen it is writable, so each flush of the disk flushes it too, and
 * before the child (dr_chain_flush); and the ownership index leaves it out. Where it cannot be made
 * durable, the guest's flushes fail as they would have without a snapshot, and no snapshot, commit,
 * stream or rebase begins before it can: those may leave out flushes of images below the top. */
#include "base/cleanup.h"
#include "ops/snapshot.h"

static bool is_fresh(const struct snapshot *s)
{
    return !s->overlay || !s->overlay->existing;
}

/* The child on top of the images of the old chain. */
static int make_chain(struct snapshot *s, struct dr_error *err)
{
    const struct dr_chain *old = s->chain;
    CLEANUP_FREE struct dr_image **images = calloc(old->n + 1, sizeof(struct dr_image *));
    if (!images)
        return dr_fail(err, ENOMEM, "%s: out of memory", old->images[0]->path);
    images[0] = DR_STEAL(s->child);
    for (size_t i = 0; i < old->n; i++)
        images[i + 1] = dr_image_ref(old->images[i]);
    s->next = dr_chain_new(images, old->n + 1);
    return s->next ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", old->images[0]->path);
}

/* The flush makes durable what the child records of its parent, and leaves little to do for the one
 * after the switch. */
static int make_ready(struct snapshot *s, struct dr_error *err)
{
    const struct dr_overlay *o = s->overlay;
    const struct dr_image_how how = {.key_secret = o ? dr_ops_key_secret(o->pairs, o->n_pairs)
                                                     : NULL};
    int r = dr_disk_flush(s->disk, err);
    if (r == 0 && !is_fresh(s))
        r = snapshot_adopt(s, 0, err);
    else if (r == 0) {
        r = dr_new_publish(&s->fresh, err);
        s->published = r == 0;
        if (r == 0)
            r = dr_image_open_how(s->disk->fs, s->where, s->fmt->name, snapshot_child_flags(s),
                                  &how, &s->child, err);
    }
    return r < 0 ? r : make_chain(s, err);
}

/* Note what the disks go on with; back: that they go on as before. */
static int record(const struct snapshot_set *set, bool back, struct dr_error *err)
{
    CLEANUP_FREE struct dr_switch *to = calloc(set->n + 1, sizeof(*to));
    if (!to)
        return dr_fail(err, ENOMEM, "out of memory for %zu snapshots", set->n);
    for (size_t i = 0; i < set->n; i++) {
        const struct snapshot *s = &set->all[i];
        const struct dr_image *top = s->chain->images[0];
        to[i] = (struct dr_switch){s->disk, back ? top->path : s->where,
                                   back ? top->fmt->name : s->fmt->name};
    }
    return dr_job_record(set->job, to, set->n, err);
}

/* ------------------------------------------------------------------ while requests wait */

/* Is it still the chain that all was prepared for? Nobody else may change it, but a child on the
 * wrong parent would be found too late. */
static int check_prepared(const struct snapshot *s, const struct dr_chain *present,
                          struct dr_error *err)
{
    const struct dr_image *child = s->next->images[0], *top = s->chain->images[0];
    if (present == s->chain && child->size == top->size)
        return child->fmt->check_backing ? child->fmt->check_backing(child, top, err) : 0;
    return dr_fail(err, EBUSY, "%s: was changed while a snapshot of it was prepared", top->path);
}

/* Each disk's step holds the next one's requests, too, until the innermost has found all as it was
 * prepared. */
static int quiet_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct snapshot_set *set = user;
    struct snapshot *s = &set->all[set->quiet++];
    int r = check_prepared(s, present, err);
    if (r == 0 && set->quiet < set->n)
        r = dr_disk_exchange(set->all[set->quiet].disk, quiet_step, set, NULL, err);
    else if (r == 0)
        set->switched = true;
    if (set->switched) /* a failure of an inner disk comes too late to undo anything then */
        *fresh = dr_chain_ref(s->next);
    return set->switched ? 0 : r;
}

/* ------------------------------------------------------------------ afterwards */

static int renewed_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                        struct dr_error *err)
{
    struct dr_chain **renewed = user;
    (void)present;
    (void)err;
    *fresh = DR_STEAL(*renewed);
    return 0;
}

/* A chain of the same images, which knows those that were frozen as frozen. Without memory look-ups
 * ask layer by layer. */
static void renew_chain(struct dr_disk *disk, struct dr_chain *chain, struct dr_job *job)
{
    struct dr_chain *renewed = dr_chain_tail(chain, 0);
    uint64_t pause = 0;
    if (renewed)
        dr_disk_exchange(disk, renewed_step, &renewed, &pause, NULL);
    dr_job_held(job, pause);
}

int dr_ops_freeze_parents(struct dr_disk *disk, struct dr_job *job, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(disk);
    bool any = false;
    int r = 0;
    for (size_t i = chain->n; r == 0 && i-- > 1;)
        if (chain->images[i]->writable) {
            r = dr_image_freeze(chain->images[i], err);
            any |= r == 0;
        }
    if (any)
        renew_chain(disk, chain, job);
    dr_chain_unref(chain, NULL);
    return r;
}

static int freeze_old(const struct snapshot *s, struct dr_job *job, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_ops_freeze_parents(s->disk, job, &why);
    return r == 0 ? 0
                  : dr_fail(err, -r,
                            "%s: the disk goes on with %s, but what was written before may not be "
                            "safe: %s",
                            s->chain->images[0]->path, s->where, why.text);
}

/* ------------------------------------------------------------------ a failure before the switch */

/* The child has its name, and nobody has used it. r: the failure. */
static void remove_child(const struct snapshot *s, int r, struct dr_error *err)
{
    static const struct dr_open_options defaults;
    struct dr_open_options open = s->options ? *s->options : defaults;
    open.flags |= s->disk->flags & (DR_OPEN_NO_LOCK | DR_OPEN_NO_FLUSH | DR_OPEN_ANY_PATH);
    if (dr_ops_remove_image(s->disk->fs, s->where, s->fmt->name, &open, NULL, NULL, NULL) < 0)
        dr_prefix(err, r, "%s was made, and cannot be removed: the disk goes on without it",
                  s->where);
}

/* No file is left that nobody knows of, and none goes that the next server would look for. */
static void undo(const struct snapshot_set *set, bool recorded, int r, struct dr_error *err)
{
    bool back = !recorded || record(set, true, NULL) == 0;
    for (size_t i = 0; i < set->n; i++) {
        struct snapshot *s = &set->all[i];
        dr_chain_unref(DR_STEAL(s->next), NULL);
        dr_image_unref(DR_STEAL(s->child), NULL);
        if (!back)
            dr_prefix(err, r,
                      "%s goes on without %s, which was made; that cannot be recorded, so when it "
                      "is served again it goes on with that",
                      s->chain->images[0]->path, s->where);
        else if (s->published)
            remove_child(s, r, err);
    }
}

/* ------------------------------------------------------------------ all of it */

static int switch_prepared(struct snapshot_set *set, struct dr_error *err)
{
    uint64_t pause = 0;
    bool recorded = false;
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++)
        r = make_ready(&set->all[i], err);
    if (r == 0)
        r = record(set, false, err);
    recorded = r == 0;
    if (r == 0) {
        r = dr_disk_exchange(set->all[0].disk, quiet_step, set, &pause, err);
        dr_job_held(set->job, pause);
    }
    if (!set->switched)
        undo(set, recorded, r, err);
    return r;
}

int snapshot_switch(struct snapshot_set *set, struct dr_error *err)
{
    for (size_t i = 0; i < set->n; i++)
        dr_disk_announce(set->all[i].disk, true);
    int r = switch_prepared(set, err);
    for (size_t i = 0; i < set->n; i++)
        dr_disk_announce(set->all[i].disk, false);
    for (size_t i = 0; set->switched && i < set->n; i++) {
        int frozen = freeze_old(&set->all[i], set->job, r == 0 ? err : NULL);
        r = r < 0 ? r : frozen;
        dr_chain_unref(DR_STEAL(set->all[i].next), NULL);
    }
    return r;
}
