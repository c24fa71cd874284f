/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* commit: write what upper images hold down into a lower one. C is the topmost image that goes
 * down, M the base's direct child, P the base; C and M may be the same. Above C there may be more
 * images, the lowest of which, K, has P as its parent afterwards.
 *
 * The order (docs/formats/protocols.md): P gets the id that says "M is being committed into me", M
 * learns it, and from then on every byte that changes in P is masked by C..M, so the view at the
 * top stands still. Whatever is interrupted is finished by doing it again.
 *
 * Other threads may read and write the disk meanwhile. Where C is what they write to, a bitmap
 * follows their changes: these are copied again, round by round and at last while requests wait,
 * and what has changed since is kept when C is emptied. Near the end their writes reach P, too,
 * before they are answered (follow.h), so that what is left gets less however fast they are. */
#include "ops/commit.h"

#include "base/cleanup.h"
#include "ops/fingerprint.h"

static bool has_ids(const struct commit *c)
{
    const struct dr_format *p = commit_p(c)->fmt, *m = commit_m(c)->fmt;
    return (p->flags & DR_FORMAT_CONTENT_ID) && (m->flags & DR_FORMAT_CONTENT_ID) && m->parent_id &&
           p->id;
}

/* ------------------------------------------------------------------ what may be refused */

static int choose_images(struct commit *c, struct dr_error *err)
{
    if (c->chain->n < 2)
        return dr_fail(err, ENOTSUP, "%s: Image does not have a backing file", c->path);
    c->first = c->o->top ? dr_ops_member(c->chain, c->o->top) : 0;
    if (c->first + 1 >= c->chain->n)
        return dr_fail(err, EINVAL, "%s: '%s' is not an image of its chain that has a backing file",
                       c->path, c->o->top);
    c->base = c->o->base ? dr_ops_member(c->chain, c->o->base) : c->first + 1;
    if (c->base <= c->first || c->base >= c->chain->n)
        return dr_fail(err, EINVAL, "Did not find '%s' in the backing chain of '%s'", c->o->base,
                       commit_c(c)->path);
    c->keep = c->o->keep || c->o->base || c->first > 0 || c->o->pivot;
    if (c->first == 0 && !commit_c(c)->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", c->path);
    return 0;
}

/* Do the images above P say anything but zeros behind P's end? */
static int holds_data_behind(struct commit *c, uint64_t from, bool *data, struct dr_error *err)
{
    struct dr_walk above;
    dr_walk_init(&above, c->chain, c->first, c->base, commit_c(c)->size);
    *data = false;
    for (uint64_t off = from; off < above.size && !*data; off = above.run.end) {
        int r = dr_walk_to(&above, off, err);
        if (r < 0)
            return r;
        *data = above.run.kind == DR_RUN_DATA;
    }
    return 0;
}

/* Bytes to copy into P, and whether it has to grow first. A P that cannot is no obstacle when there
 * is nothing to put behind its end: zeros show there anyway. A C that ends before P hides the rest
 * of P from K: without C, the zeros that K sees there have to be in P. */
static int check_growth(struct commit *c, struct dr_error *err)
{
    const struct dr_image *p = commit_p(c), *k = commit_k(c);
    c->size = commit_c(c)->size;
    if (k)
        c->size = dr_max(c->size, dr_min(k->size, p->size));
    if (p->size >= c->size)
        return 0;
    bool below_is_longer = c->base + 1 < c->chain->n &&
                           c->chain->images[c->base + 1]->size > p->size;
    if (p->fmt->resize && !below_is_longer)
        return 0;
    bool data = c->shared && c->first == 0; /* a guest may write there at any time */
    int r = data ? 0 : holds_data_behind(c, p->size, &data, err);
    if (r == 0 && data && p->fmt->resize)
        return 0; /* what its own parent has behind its end has to be hidden: not without need */
    if (r == 0 && data)
        return dr_fail(err, ENOTSUP,
                       "%s: ends at %llu, %s holds data behind that, and images of its format "
                       "cannot grow",
                       p->path, (unsigned long long)p->size, c->path);
    c->size = p->size;
    return r;
}

static void transfer_init(void *user, bool first, struct dr_transfer *t)
{
    const struct commit *c = user;
    (void)first; /* P has something already */
    *t = (struct dr_transfer){
        .dst = c->chain,
        .dst_at = c->base,
        .write_zeros = true,
        .zero_flags = DR_MAY_UNMAP,
        .to_file = true,
        .block = 4096,
        .job = c->job,
    };
    dr_walk_init(&t->walk, c->chain, c->first, c->base, c->size);
}

/* DATA above that P has no place for yet. */
static int check_space(const struct commit *c, struct dr_error *err)
{
    struct dr_walk above, own;
    uint64_t need = 0, room = dr_ops_image_space(commit_p(c));
    if (c->size <= room)
        return 0; /* whatever is in it: no need to look */
    dr_walk_init(&above, c->chain, c->first, c->base, c->size);
    dr_walk_init(&own, c->chain, c->base, c->base + 1, c->size);
    for (uint64_t off = 0, end; off < above.size; off = end) {
        int r = dr_walk_to(&above, off, err);
        if (r == 0)
            r = dr_walk_to(&own, off, err);
        if (r < 0)
            return r;
        end = dr_min(above.run.end, own.run.end);
        if (above.run.kind == DR_RUN_DATA && own.run.kind != DR_RUN_DATA)
            need += end - off;
    }
    if (need <= room)
        return 0;
    return dr_fail(err, ENOSPC, "%s: needs %llu more bytes, its file system has %llu free",
                   commit_p(c)->path, (unsigned long long)need, (unsigned long long)room);
}

/* K's record of P as its parent. */
static int adopt(const struct commit *c, unsigned flags, struct dr_error *err)
{
    struct dr_image *k = commit_k(c), *p = commit_p(c);
    if (!k)
        return 0;
    CLEANUP_FREE char *name = dr_ops_name_of(c->fs, k->path, c->chain, c->base);
    if (!name)
        return dr_fail(err, ENOMEM, "%s: out of memory", k->path);
    return dr_image_set_backing(k, p, name, p->fmt->name, flags, err);
}

static int check_child(const struct commit *c, struct dr_error *err)
{
    struct dr_image *m = commit_m(c);
    int r = adopt(c, DR_TRY, err);
    if (r < 0 || !has_ids(c) || !m->fmt->set_backing)
        return r;
    return dr_image_set_backing(m, commit_p(c), m->backing_name, m->backing_format, DR_TRY, err);
}

/* What goes down into P shows in the snapshots inside the images above it, too. */
static int check_snapshots(const struct commit *c, struct dr_error *err)
{
    int r = 0;
    for (size_t i = c->first; r == 0 && i < c->base; i++)
        r = dr_ops_refuse_snapshots(c->chain->images[i], "a commit of the image", err);
    return r;
}

static int prepare(struct commit *c, struct dr_error *err)
{
    int r = choose_images(c, err);
    if (r == 0)
        r = check_snapshots(c, err);
    if (r == 0)
        r = check_growth(c, err);
    if (r == 0)
        r = commit_check_pivot(c, err);
    if (r == 0)
        r = commit_check_siblings(c, err);
    if (r == 0)
        r = check_child(c, err);
    if (r == 0)
        r = check_space(c, err);
    return r;
}

/* ------------------------------------------------------------------ beginning */

static int thaw_one(struct commit *c, struct dr_image *image, bool unchanged, struct dr_error *err)
{
    if (image->writable)
        return 0;
    int r = dr_image_thaw(image, unchanged, err);
    if (r == 0)
        c->thawed[c->n_thawed++] = image;
    return r;
}

/* Every file that will be written, locked against others before anything changes. */
static int thaw(struct commit *c, struct dr_error *err)
{
    /* A child without ids does not mind that P gets a new one, and P's other children must notice.
     */
    int r = thaw_one(c, commit_p(c), has_ids(c), err);
    if (r == 0) { /* where P's file system is full, say, the guest's flushes must not fail */
        commit_p(c)->masked = true;
        commit_p(c)->overwritten = true;
    }
    if (r == 0 && has_ids(c))
        r = thaw_one(c, commit_m(c), true, err);
    if (r == 0 && commit_k(c))
        r = thaw_one(c, commit_k(c), true, err);
    /* An earlier commit may have been killed: what it wrote last must not be lost behind what we
     * write first. */
    for (size_t i = c->first; r == 0 && i <= c->base; i++)
        r = dr_image_harden(c->chain->images[i], err);
    /* Before the locks somebody could make another child. */
    return r < 0 || c->o->force ? r : commit_check_siblings(c, err);
}

/* P's id is computed from M's, which must not change between the two: a guest's first write would
 * change it. */
static int fix_id(const struct commit *c, struct dr_error *err)
{
    struct dr_image *m = commit_m(c);
    if (!c->shared || c->base > 1)
        return 0;
    return dr_image_begin(m, 0, !(m->flags & DR_OPEN_UNCHANGED), err);
}

/* A commit that was stopped between telling P and telling M is done again in the same way: while M
 * has its ids, P's is the same one. */
static int exchange_ids(const struct commit *c, struct dr_error *err)
{
    struct dr_image *p = commit_p(c), *m = commit_m(c);
    int r = fix_id(c, err);
    if (r == 0) /* their bitmaps must know first that the files are going to change */
        r = dr_image_begin(p, 0, false, err);
    if (r == 0)
        r = dr_image_begin(m, 0, false, err);
    if (r < 0)
        return r;
    uint32_t id = p->fmt->commit_id(p, m);
    r = p->fmt->set_id(p, id, err);
    return r < 0 ? r : m->fmt->set_parent_id(m, id, err);
}

/* The same images: what is known of frozen ones does not hold for thawed ones, and the other way
 * round. */
static int renew_chain(struct dr_chain *present, struct dr_chain **fresh, struct dr_error *err)
{
    *fresh = dr_chain_tail(present, 0);
    return *fresh ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", present->images[0]->path);
}

static int begin_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct commit *c = user;
    struct dr_chain *next = NULL;
    int r = renew_chain(present, &next, err);
    if (r == 0 && has_ids(c))
        r = exchange_ids(c, err);
    if (r == 0 && commit_p(c)->size < c->size)
        r = dr_chain_resize(next, c->base, c->size, err);
    if (r == 0)
        *fresh = DR_STEAL(next);
    dr_chain_unref(next, NULL);
    return r;
}

int commit_quiesce(struct commit *c,
                   int (*by)(struct dr_disk *, dr_quiet_step, void *, uint64_t *,
                             struct dr_error *),
                   dr_quiet_step step, struct dr_error *err)
{
    uint64_t pause = 0;
    int r = by(c->disk, step, c, &pause, err);
    dr_job_held(c->job, pause);
    dr_chain_unref(c->chain, NULL);
    c->chain = dr_disk_chain(c->disk);
    return r;
}

/* ------------------------------------------------------------------ the copy */

static int flush_base(void *user, struct dr_error *err)
{
    const struct commit *c = user;
    return dr_image_flush(commit_p(c), err);
}

/* Returns with all but a bounded part of what the guest has changed in P, durably. */
static int copy(struct commit *c, struct dr_error *err)
{
    int r = dr_follow_all(&c->follow, err);
    if (r == 0)
        r = dr_follow_rounds(&c->follow, err);
    if (r == 0 && c->o->pivot)
        r = dr_follow_until_told(&c->follow, err);
    if (r == 0 && c->o->pivot)
        dr_follow_watch(&c->follow);
    if (r == 0) /* the next failure is the end: little shall be left for it */
        r = dr_follow_catch_up(&c->follow, err);
    if (!c->o->write_blocking)
        dr_follow_stop(&c->follow); /* whoever is asked next may take long */
    if (r == 0)
        r = c->part == COMMIT_FIRST ? dr_job_rest(c->job, err) : dr_job_before_switch(c->job, err);
    if (r == 0)
        r = dr_follow_catch_up(&c->follow, err);
    return r < 0 || c->follow.dirty.disk ? r : flush_base(c, err); /* else that has flushed it */
}

/* ------------------------------------------------------------------ the end */

static int freeze_all(struct commit *c, struct dr_error *err)
{
    int r = 0;
    while (r == 0 && c->n_thawed > 0) {
        r = dr_image_freeze(c->thawed[c->n_thawed - 1], err);
        c->n_thawed -= r == 0;
    }
    return r;
}

/* Without C..M if there is something above them. */
static int make_chain(const struct commit *c, const struct dr_chain *old, struct dr_chain **chain,
                      struct dr_error *err)
{
    CLEANUP_FREE struct dr_image **images = calloc(old->n, sizeof(struct dr_image *));
    size_t n = 0;
    *chain = NULL;
    if (!images)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    for (size_t i = 0; i < old->n; i++)
        if (c->first == 0 || i < c->first || i >= c->base)
            images[n++] = dr_image_ref(old->images[i]);
    *chain = dr_chain_new(images, n);
    return *chain ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", c->path);
}

static int end_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                    struct dr_error *err)
{
    struct commit *c = user;
    struct dr_chain *next = NULL;
    int r = make_chain(c, present, &next, err);
    if (r == 0 && c->follow.dirty.disk)
        r = dr_follow_rest(&c->follow, err);
    if (r == 0)
        r = dr_image_flush(commit_p(c), err);
    if (r == 0)
        r = adopt(c, 0, err);
    if (r == 0)
        r = freeze_all(c, err);
    if (r == 0) {
        dr_chain_renew_index(next); /* made while P was writable, since that may fail */
        *fresh = DR_STEAL(next);
    }
    dr_chain_unref(next, NULL);
    return r;
}

/* After a failure the disk goes on as before. What was written into P is masked; the same commit
 * finishes it. */
static int undo_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    struct commit *c = user;
    dr_follow_stop(&c->follow);
    while (c->n_thawed > 0) {
        struct dr_image *image = c->thawed[--c->n_thawed];
        if (dr_image_freeze(image, NULL) < 0) /* its flushes fail: those of the disk must not */
            dr_image_give_up(image);
    }
    return renew_chain(present, fresh, err);
}

static void undo(struct commit *c)
{
    uint64_t pause = 0;
    dr_disk_quiesce_unflushed(c->disk, undo_step, c, &pause, NULL);
    dr_job_held(c->job, pause);
    dr_chain_unref(c->chain, NULL);
    c->chain = dr_disk_chain(c->disk);
}

/* ------------------------------------------------------------------ the record of the parent */

static bool has_print(const struct dr_image *image)
{
    struct dr_fingerprint print;
    return image && dr_fingerprint_load(image, &print, NULL) != 0;
}

/* P is about to change, and with it what M shows, and so on up to the parent of C: what is recorded
 * of them must not count any more. */
static int forget_prints(struct commit *c, struct dr_error *err)
{
    int r = 0;
    c->forgot = calloc(c->base, sizeof(struct dr_image *));
    if (!c->forgot)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->path);
    c->k_print = has_print(commit_k(c));
    for (size_t i = c->base; r == 0 && i-- > c->first;) {
        const struct dr_image *image = c->chain->images[i];
        if (!has_print(image))
            continue;
        c->forgot[c->n_forgot++] = image;
        r = dr_fingerprint_remove(c->fs, image->files[0]->path, err);
    }
    return r;
}

/* K is about to have P as its parent, which holds all by now. */
static void announce_print(const struct commit *c)
{
    const struct dr_image *k = commit_k(c);
    CLEANUP_FREE char *name = k && c->k_print ? dr_ops_name_of(c->fs, k->path, c->chain, c->base)
                                              : NULL;
    if (name)
        ops_fingerprint_announce(k, name, c->chain, c->base);
}

/* Stands on P now, as K or as an M that is still there, or is one of those that were forgotten. */
static bool needs_print(const struct commit *c, size_t i)
{
    if (c->chain->images[i + 1] == c->p)
        return c->k_print || c->n_forgot > 0;
    for (size_t k = 0; k < c->n_forgot; k++)
        if (c->forgot[k] == c->chain->images[i])
            return true;
    return false;
}

/* A record that cannot be written is no failure of what was done. */
static void renew_prints(const struct commit *c)
{
    struct dr_error why = DR_ERROR_INIT;
    for (size_t i = 0; i + 1 < c->chain->n; i++) {
        const struct dr_image *image = c->chain->images[i];
        if (needs_print(c, i) && image->backing_name &&
            ops_fingerprint_renew(image, c->chain, i + 1, &why) < 0)
            dr_job_message(c->job, "%s: what its parent is was not recorded: %s", image->path,
                           why.text);
    }
}

/* ------------------------------------------------------------------ the whole */

static int run(struct commit *c, struct dr_error *err)
{
    c->follow = (struct dr_follow){.job = c->job,
                                   .size = c->size,
                                   .write_blocking = c->o->write_blocking,
                                   .transfer = transfer_init,
                                   .flush = flush_base,
                                   .user = c};
    c->p = commit_p(c);
    int r = thaw(c, err);
    if (r == 0)
        r = forget_prints(c, err);
    if (r == 0 && c->shared && c->first == 0)
        r = dr_follow_begin(&c->follow, c->disk, err);
    if (r == 0)
        r = commit_quiesce(c, dr_disk_quiesce, begin_step, err);
    if (r == 0)
        r = copy(c, err);
    if (r == 0)
        announce_print(c);
    bool pivots = r == 0 && commit_shall_pivot(c);
    if (pivots)
        r = commit_pivot(c, err);
    else if (r == 0) /* the guest would change more during the flush of what is no part of this */
        r = commit_quiesce(c, c->follow.dirty.disk ? dr_disk_quiesce_unflushed : dr_disk_quiesce,
                           end_step, err);
    if (r < 0 && c->shared && c->n_thawed > 0)
        undo(c);
    else if (r == 0 && !c->keep && !pivots)
        r = commit_empty_top(c, err);
    dr_follow_end(&c->follow);
    if (r == 0)
        renew_prints(c);
    free(c->forgot);
    return r;
}

static int commit_claimed(struct commit *c, struct dr_error *err)
{
    c->chain = dr_disk_chain(c->disk);
    c->path = c->chain->images[0]->path;
    int r = prepare(c, err);
    if (r == 0)
        r = run(c, err);
    int closed = dr_chain_unref(c->chain, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

/* A pivot goes to the active image's parent. Images between it and the base go down before, as they
 * would by a commit of their own. */
static int commit_between(struct commit *c, struct dr_error *err)
{
    const struct dr_commit_options *o = c->o;
    struct dr_chain *chain = dr_disk_chain(c->disk);
    size_t base = o->pivot && o->base ? dr_ops_member(chain, o->base) : 0;
    int r = 0;
    if (base > 1 && base < chain->n && !o->top) {
        const struct dr_commit_options between = {.open = o->open,
                                                  .base = o->base,
                                                  .top = chain->images[1]->path,
                                                  .force = o->force,
                                                  .emptied = o->emptied,
                                                  .n_emptied = o->n_emptied,
                                                  .committed = o->committed,
                                                  .n_committed = o->n_committed};
        struct commit first = *c;
        first.o = &between;
        first.part = COMMIT_FIRST;
        r = commit_claimed(&first, err);
        c->part = COMMIT_SECOND;
    }
    dr_chain_unref(chain, NULL);
    return r;
}

static int commit(struct dr_disk *disk, const struct dr_commit_options *options, bool shared,
                  struct dr_job *job, struct dr_error *err)
{
    struct commit c = {.fs = disk->fs, .o = options, .job = job, .shared = shared, .disk = disk};
    int r = dr_disk_claim(disk, "commit", err);
    if (r < 0)
        return r;
    struct dr_ops_left left = {0};
    r = dr_ops_freeze_parents(disk, job, err);
    if (r == 0 && options->remove)
        r = dr_ops_left_begin(&left, disk, err);
    if (r == 0)
        r = commit_between(&c, err);
    if (r == 0)
        r = commit_claimed(&c, err);
    if (r == 0)
        r = dr_ops_left_remove(&left, disk, &options->open, err);
    dr_ops_left_free(&left);
    dr_disk_unclaim(disk);
    return r;
}

int dr_disk_commit(struct dr_disk *disk, const struct dr_commit_options *options,
                   struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    static const struct dr_commit_options defaults;
    int r = dr_job_begin_beside(job, disk, err);
    if (r < 0)
        return r;
    return dr_job_end(job, commit(disk, options ? options : &defaults, true, job, err));
}

int dr_commit_fs(struct dr_fs *fs, const char *path, const struct dr_commit_options *options,
                 struct dr_job *job, struct dr_error *err)
{
    struct dr_open_options open = options->open;
    struct dr_disk *disk = NULL;
    open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, &disk, err);
    if (r < 0)
        return r;
    r = commit(disk, options, false, job, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_commit(const char *path, const struct dr_commit_options *options, struct dr_job *job,
              struct dr_error *err)
{
    DR_REQUIRE(path, err);
    static const struct dr_commit_options defaults;
    options = options ? options : &defaults;
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, dr_commit_fs(dr_fs_posix(), path, options, job, err));
}
