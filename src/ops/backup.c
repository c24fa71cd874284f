/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* backup: copy what disks hold at one instant into new images.
 *
 *     claim each disk ─► what does its set say, and its bitmap? ─► make each target aside
 *     ─► the instant, while all their requests wait
 *     ─► copy each disk (backup-copy.h) ─► unhook it, flush its target
 *     ─► the set announces them (backup-naming.h) ─► side files with checksums
 *     ─► the targets get their names ─► the set lists them
 *     ─► the bitmaps are handed on (backup-track.h)
 *
 * Nothing of a disk changes but its list of hooks and its bitmaps. Killed anywhere, it is as its
 * guest left it, a target that has its name is whole, and the next backup misses nothing. */
#include "base/cleanup.h"
#include "base/random.h"
#include "ops/backup-copy.h"
#include "ops/backup-naming.h"
#include "ops/backup-set.h"
#include "ops/ops-internal.h"

struct backup {
    struct dr_backup_disk *what;
    struct dr_fs *fs;
    struct dr_job *job;
    const struct dr_format *fmt; /* of the target */
    bool claimed, published;

    char *path; /* real path of the disk's active image */
    struct dr_backup_set set;
    const struct dr_backup_entry *last; /* what an incremental one stands on, or NULL: it is full */
    const char *bitmap;                 /* or NULL */
    struct dr_track track;
    struct dr_changed changed;
    struct dr_disk *parent; /* the last backup */

    struct dr_new_image fresh;
    struct dr_disk *out;
    struct dr_sums sums;
    struct dr_file *side; /* that with the sums, locked while names are given */
    char *mark;           /* of the target, for the set */
    struct dr_frozen frozen;
    char time[DR_SET_TIME];
};

struct set {
    struct backup *all;
    size_t n;
    struct dr_job *job;
    uint64_t total; /* bytes of all disks */
    struct dr_spill *spill;
};

/* ------------------------------------------------------------------ full or incremental? */

static const struct dr_backup_options *options_of(const struct backup *b)
{
    return &b->what->options;
}

static int check_options(const struct backup *b, struct dr_error *err)
{
    const struct dr_backup_options *o = options_of(b);
    if (!o->set && (o->bitmap || o->since))
        return dr_fail(err, EINVAL,
                       "%s: which backup a bitmap belongs to stands in a set, and none is given",
                       b->what->target);
    if (o->bitmap && o->since)
        return dr_fail(err, EINVAL, "%s: \"bitmap\" and \"since\" exclude each other",
                       b->what->target);
    if ((o->bitmap || o->since) && !dr_writable(b->what->disk))
        return dr_fail(err, EROFS, "%s: is open for reading only, and its bitmaps must change",
                       dr_image_path(b->what->disk, 0));
    return 0;
}

/* The bitmap of the backup that was asked for must not have gone on to a later one. */
static int bitmap_since(struct backup *b, const char *name, struct dr_error *err)
{
    const char *set = options_of(b)->set;
    const struct dr_backup_entry *e = dr_set_find(&b->set, name);
    if (!e || e->leaving || e->naming)
        return dr_fail(err, ENOENT, "%s: has no backup called \"%s\"", set, name);
    if (!e->bitmap || strcmp(e->disk, b->path) != 0)
        return dr_fail(err, EINVAL, "%s: its backup \"%s\" is not one of %s with a bitmap", set,
                       name, b->path);
    const struct dr_backup_entry *last = dr_set_last(&b->set, b->path, e->bitmap);
    if (last != e)
        return dr_fail(err, EINVAL,
                       "%s: the bitmap \"%s\" has gone on from backup \"%s\" to \"%s\"", set,
                       e->bitmap, name, last->name);
    b->bitmap = e->bitmap;
    return 0;
}

/* A prune that was interrupted still removes the files that it has noted: also one that somebody
 * has made since under such a name. */
static int refuse_leaving(const struct backup *b, struct dr_error *err)
{
    const char *name = dr_path_basename(b->what->target);
    for (size_t i = 0; i < b->set.n; i++) {
        char **files = b->set.all[i].leaving;
        for (size_t k = 0; files && files[k]; k++)
            if (strcmp(dr_path_basename(files[k]), name) == 0)
                return dr_fail(err, EBUSY,
                               "%s: the backup \"%s\" has a file of this name and is being pruned: "
                               "prune again, or take another name",
                               b->what->target, b->set.all[i].name);
    }
    return 0;
}

static int read_set(struct backup *b, struct dr_error *err)
{
    const struct dr_backup_options *o = options_of(b);
    if (!o->set)
        return 0;
    const char *path = dr_image_path(b->what->disk, 0);
    int r = path ? b->fs->ops->realpath(b->fs, path, &b->path, err)
                 : dr_fail(err, ENOMEM, "%s: out of memory", b->what->target);
    if (r == 0)
        r = dr_naming_settle(b->fs, o->set, &o->open, b->job, err);
    if (r == 0)
        r = dr_set_load(&b->set, b->fs, o->set, err);
    if (r == 0 && dr_set_find(&b->set, dr_path_basename(b->what->target)))
        r = dr_fail(err, EEXIST, "%s: has a backup called \"%s\" already", o->set,
                    dr_path_basename(b->what->target));
    return r < 0 ? r : refuse_leaving(b, err);
}

/* That of its directory, where it is not there yet. */
static int real_path_of_set(const struct backup *b, char **path, struct dr_error *err)
{
    const char *set = options_of(b)->set;
    CLEANUP_FREE char *dir = dr_path_dirname(set), *real = NULL;
    int r = dir ? dr_real_dir(b->fs, dir, &real, err) : -ENOMEM;
    if (r == 0)
        *path = dr_path_join(real, dr_path_basename(set));
    return r == -ENOMEM || (r == 0 && !*path) ? dr_fail(err, ENOMEM, "%s: out of memory", set) : r;
}

static int look_at_bitmap(struct backup *b, struct dr_error *err)
{
    const struct dr_backup_options *o = options_of(b);
    bool there;
    int r = 0;
    b->bitmap = o->bitmap;
    if (o->since)
        r = bitmap_since(b, o->since, err);
    if (r < 0 || !b->bitmap)
        return r;
    const struct dr_backup_entry *last = dr_set_last(&b->set, b->path, b->bitmap);
    CLEANUP_FREE char *set = NULL;
    b->track = (struct dr_track){
        .disk = b->what->disk, .name = b->bitmap, .last = last ? last->noted : NULL};
    r = real_path_of_set(b, &set, err);
    if (r == 0)
        r = dr_track_begin(&b->track, set, o->full, &there, err);
    if (r == 0 && there && !o->full)
        b->last = last;
    if (r == 0 && o->since && !there)
        r = dr_fail(err, ENOENT, "%s: has no bitmap \"%s\" any more: back it up in full", b->path,
                    b->track.last);
    return r;
}

/* ------------------------------------------------------------------ the last backup */

static int open_parent(struct backup *b, struct dr_error *err)
{
    const struct dr_backup_options *o = options_of(b);
    const unsigned kept = DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH;
    struct dr_open_options open = o->open;
    CLEANUP_FREE char *path = dr_set_path(o->set, b->last);
    if (!path)
        return dr_fail(err, ENOMEM, "%s: out of memory", o->set);
    const struct dr_backup_entry *damaged = dr_set_damaged(&b->set, b->last);
    if (damaged)
        return dr_fail(
            err, EBADMSG,
            "%s: its backup \"%s\" is damaged: %s; verify it again, or begin anew with a "
            "full backup (--full)",
            o->set, damaged->name, damaged->damaged);
    open.format = b->last->format;
    open.flags = (o->open.flags | b->what->disk->flags) & kept;
    int r = dr_gate_check(b->fs, o->set, path, &open, err);
    if (r == 0) /* the target is to be able to open it, too */
        r = dr_gate_check(b->fs, b->what->target, path, &open, err);
    if (r == 0)
        r = dr_open_fs(b->fs, path, &open, &b->parent, err);
    if (r == 0)
        r = dr_chain_check_length(b->what->target, b->parent->chain->n + 1, err);
    if (r == 0 && !dr_sums_fits(b->last->size, dr_size(b->parent)))
        r = dr_fail(err, EBADMSG, "%s: has %llu bytes, and had %llu when it was made", path,
                    (unsigned long long)dr_size(b->parent), (unsigned long long)b->last->size);
    if (r == 0) /* what is left out must be there for good */
        r = dr_chain_harden(b->parent->chain, 0, err);
    return r < 0 ? dr_prefix(err, r, "the last backup, \"%s\"", b->last->name) : 0;
}

/* From its side file, or else from all of its bytes. They must be those that it had: the new
 * backup's digest is made of these sums, and would vouch for damage. */
static int sums_of_parent(struct backup *b, struct dr_error *err)
{
    CLEANUP_FREE char *side = dr_sums_path(b->parent->chain->images[0]->path);
    char digest[DR_DIGEST_TEXT];
    if (side && dr_sums_load(&b->sums, b->fs, side, NULL) == 0) {
        dr_sums_digest(&b->sums, digest);
        if (strcmp(digest, b->last->digest) == 0 && b->sums.size == b->last->size)
            return 0;
        dr_sums_end(&b->sums);
    }
    dr_job_message(b->job,
                   "%s: there is no such file that belongs to the last backup: all of that "
                   "is read for its checksums",
                   side ? side : b->last->name);
    int r = dr_sums_of_part(&b->sums, DR_CHECKSUM_XXH3, b->parent, b->last->size, NULL, err);
    if (r < 0)
        return r;
    dr_sums_digest(&b->sums, digest);
    if (strcmp(digest, b->last->digest) == 0)
        return 0;
    return dr_fail(err, EBADMSG,
                   "%s: its digest is %s, and that of backup \"%s\" was %s; begin anew with a full "
                   "backup (--full)",
                   dr_image_path(b->parent, 0), digest, b->last->name, b->last->digest);
}

static int begin_sums(struct backup *b, struct dr_error *err)
{
    uint64_t size = dr_size(b->what->disk);
    if (!b->last)
        return dr_sums_begin(&b->sums, size, err);
    int r = open_parent(b, err);
    if (r == 0)
        r = sums_of_parent(b, err);
    return r < 0 ? r : dr_sums_resize(&b->sums, size, err);
}

/* ------------------------------------------------------------------ the target */

static unsigned target_flags(const struct backup *b)
{
    const unsigned kept = DR_OPEN_NO_FLUSH | DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_DIRECT;
    return DR_OPEN_RDWR | (b->what->disk->flags & kept) | options_of(b)->open.flags;
}

static int create_target(struct backup *b, struct dr_error *err)
{
    const struct dr_backup_options *o = options_of(b);
    const char *parent = b->parent ? b->parent->chain->images[0]->path : NULL;
    CLEANUP_FREE char *name = parent ? dr_ops_name_from(b->fs, b->what->target, parent) : NULL;
    struct dr_open_options open = o->open;
    if (parent && !name)
        return dr_fail(err, ENOMEM, "%s: out of memory", b->what->target);
    if (b->fmt->flags & DR_FORMAT_NOISE) /* zeros are not written in a backup */
        return dr_fail(err, ENOTSUP, "%s: a backup cannot have the format %s", b->what->target,
                       b->fmt->name);
    open.format = b->fmt->name;
    open.flags = target_flags(b) | DR_OPEN_UNCHANGED;
    open.backing = parent;
    open.backing_format = parent ? b->last->format : NULL;
    open.key_secret = dr_ops_key_secret(o->pairs, o->n_pairs);
    const struct dr_create_params params = {
        .size = b->sums.size,
        .backing = parent ? b->parent->chain->images[0] : NULL,
        .backing_name = name,
        .backing_format = open.backing_format,
        .stop = dr_job_stop_flag(b->job),
        .all_new = true,
        .force = true,
    };
    int r = dr_new_create(&b->fresh, b->fmt, &params, o->pairs, o->n_pairs, target_flags(b), err);
    if (r == 0)
        r = dr_new_check_places(&b->fresh, err);
    return r < 0 ? r : dr_open_fs(b->fs, b->fresh.path, &open, &b->out, err);
}

static int make_target(struct backup *b, struct dr_error *err)
{
    const char *target = b->what->target, *format = options_of(b)->format;
    struct dr_chain *chain = dr_disk_chain(b->what->disk);
    int r = 0;
    if (dr_ops_reads(b->fs, chain, target))
        r = dr_fail(err, EBUSY, "%s: belongs to the disk itself: the target must be another file",
                    target);
    else if (dr_fs_exists(b->fs, target))
        r = dr_fail(err, EEXIST, "%s: exists already", target);
    dr_chain_unref(chain, NULL);
    if (r < 0)
        return r;
    b->fmt = dr_ops_format(format ? format : "qcow2",
                           DR_FORMAT_CREATE | (b->last ? DR_FORMAT_BACKING : 0u), err);
    if (!b->fmt)
        return err ? -err->errnum : -EINVAL;
    if (b->last && b->fmt->parent_format && strcmp(b->fmt->parent_format, b->last->format) != 0)
        return dr_fail(err, ENOTSUP,
                       "%s: a %s image cannot stand on the last backup, which is a %s image",
                       target, b->fmt->name, b->last->format);
    r = dr_new_begin(&b->fresh, b->fs, target, false, target_flags(b), err);
    return r < 0 ? r : create_target(b, err);
}

/* ------------------------------------------------------------------ the instant */

/* Where the disk has become smaller, the sum of its last, partial grain is another one. */
static int note_new_end(struct backup *b, struct dr_error *err)
{
    uint64_t size = b->sums.size, from = dr_round_down(size, DR_SUMS_GRAIN);
    if (!b->last || b->last->size <= size || from == size)
        return 0;
    return dr_changed_add(&b->changed, from, size - from) == 0
               ? 0
               : dr_fail(err, ENOMEM, "out of memory for a backup");
}

/* Of struct dr_frozen: what has changed is known at the instant. */
static int at_instant(void *user, struct dr_chain *present, struct dr_error *err)
{
    struct backup *b = user;
    int r = b->last ? dr_track_now(&b->track, present, &b->changed, err) : 0;
    return r < 0 ? r : note_new_end(b, err);
}

static int prepare(const struct set *set, struct backup *b, struct dr_error *err)
{
    int r = check_options(b, err);
    if (r == 0) {
        r = dr_disk_claim(b->what->disk, "backup", err);
        b->claimed = r == 0;
    }
    if (r == 0)
        r = read_set(b, err);
    if (r == 0)
        r = look_at_bitmap(b, err);
    if (r == 0)
        r = begin_sums(b, err);
    if (r == 0)
        r = make_target(b, err);
    if (r != 0)
        return r;
    b->frozen = (struct dr_frozen){.disk = b->what->disk,
                                   .size = b->sums.size,
                                   .target = b->out->chain,
                                   .sums = &b->sums,
                                   .changed = b->last ? &b->changed : NULL,
                                   .at_instant = at_instant,
                                   .user = b,
                                   .spill = set->spill};
    return dr_frozen_begin(&b->frozen, err);
}

/* All of them are of one second, too. */
static void note_time(struct set *set)
{
    char now[DR_SET_TIME];
    dr_set_time_now(now);
    for (size_t i = 0; i < set->n; i++)
        memcpy(set->all[i].time, now, sizeof(now));
}

/* Files are written before and afterwards: at the instant nobody waits for one. */
static int take_instant(struct set *set, struct dr_error *err)
{
    CLEANUP_FREE struct dr_frozen **all = calloc(set->n + 1, sizeof(*all));
    int r = 0;
    if (!all)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        all[i] = &set->all[i].frozen;
        if (set->all[i].bitmap)
            r = dr_track_prepare(&set->all[i].track, set->all[i].last, err);
    }
    note_time(set);
    return r < 0 ? r : dr_frozen_now_all(all, set->n, set->job, err);
}

/* ------------------------------------------------------------------ the copy */

/* A target that is full may notice it only when its metadata is written. */
static int flush_target(struct backup *b, struct dr_error *err)
{
    int r;
    do
        r = dr_chain_flush(b->out->chain, 0, err);
    while (r < 0 && (r = dr_job_after_failure(b->job, r, err)) == 0);
    return r;
}

/* A target that counts in sectors ends behind the disk, and a larger last backup has bytes there.
 */
static int zero_behind_end(struct backup *b, struct dr_error *err)
{
    uint64_t size = b->sums.size, end = dr_size(b->out);
    return b->last && end > size ? dr_zero(b->out, size, end - size, 0, err) : 0;
}

static int copy_one(struct set *set, struct backup *b, uint64_t before, struct dr_error *err)
{
    uint64_t after = set->total - before - b->sums.size;
    dr_job_beside(set->job, b->what->disk);
    int r = dr_frozen_copy(&b->frozen, before, after, set->job, err);
    int broken = dr_frozen_finish(&b->frozen, err);
    r = r < 0 ? r : broken;
    b->what->result.copied = atomic_load(&b->frozen.copied);
    if (r == 0)
        r = zero_behind_end(b, err);
    if (r == 0)
        r = flush_target(b, err);
    return r < 0 ? r : dr_ops_close(&b->out, err);
}

static int copy_all(struct set *set, struct dr_error *err)
{
    uint64_t before = 0;
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        r = copy_one(set, &set->all[i], before, err);
        before += set->all[i].sums.size;
    }
    return r;
}

/* ------------------------------------------------------------------ names */

/* The side file first: where the target has its name, its checksums are there. It is held for as
 * long as it may have to be removed again, so that it is not that of somebody else by then. */
static int publish_one(struct backup *b, struct dr_error *err)
{
    struct dr_backup_result *result = &b->what->result;
    struct dr_file_id id, now;
    bool known = b->fs->ops->identify(b->fs, b->fresh.path, &id, NULL) == 0;
    int r = dr_sums_save_for(&b->sums, b->fs, b->what->target, dr_ops_file_flags(target_flags(b)),
                             &b->side, err);
    if (r == 0) {
        r = dr_new_publish(&b->fresh, err);
        b->published = r == 0; /* or it has the name, perhaps not durably */
        if (r < 0 && known && b->fs->ops->identify(b->fs, b->what->target, &now, NULL) == 0)
            b->published = dr_same_id(id, now);
    }
    result->size = b->sums.size;
    result->incremental = b->last;
    dr_sums_digest(&b->sums, result->digest);
    return r;
}

/* There is to be no target where another one did not get its name, or the set not its entry. */
static void unpublish(struct backup *b)
{
    struct dr_open_options open = options_of(b)->open;
    CLEANUP_FREE char *sums = dr_sums_path(b->what->target);
    open.flags = target_flags(b) & (DR_OPEN_NO_LOCK | DR_OPEN_NO_FLUSH | DR_OPEN_ANY_PATH);
    if (b->published)
        dr_ops_remove_image(b->fs, b->what->target, b->fmt->name, &open, NULL, NULL, NULL);
    if (sums && b->side)
        b->fs->ops->unlink(b->fs, sums, NULL);
}

/* The strings that are not the set's own are freed by free_entries(). */
static bool make_entry(const struct backup *b, struct dr_backup_entry *e)
{
    *e = (struct dr_backup_entry){
        .name = (char *)(uintptr_t)dr_path_basename(b->what->target),
        .file = dr_ops_name_from(b->fs, options_of(b)->set, b->what->target),
        .format = (char *)(uintptr_t)b->fmt->name,
        .parent = b->last ? b->last->name : NULL,
        .disk = b->path,
        .bitmap = (char *)(uintptr_t)b->bitmap,
        .noted = b->track.next,
        .time = (char *)(uintptr_t)b->time,
        .size = b->sums.size,
        .copied = b->what->result.copied,
        .naming = b->mark,
    };
    dr_sums_digest(&b->sums, e->digest);
    return e->file;
}

static int make_entries(struct set *set, struct dr_backup_entry *entries, struct dr_error *err)
{
    const uint64_t group = dr_random64();
    for (size_t i = 0; i < set->n; i++) {
        struct backup *b = &set->all[i];
        int r = dr_naming_mark(b->fs, b->fresh.path, group, &b->mark, err);
        if (r < 0)
            return r;
        if (!make_entry(b, &entries[i]))
            return dr_fail(err, ENOMEM, "%s: out of memory", b->what->target);
    }
    return 0;
}

static int give_names(struct set *set, struct dr_naming *naming, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++)
        r = publish_one(&set->all[i], err);
    if (r == 0 && naming)
        r = dr_naming_confirm(naming, err);
    if (r == 0)
        return 0;
    for (size_t i = 0; i < set->n; i++)
        if (naming && naming->confirmed) /* the directory of the set may not be durable */
            dr_track_keep(&set->all[i].track);
        else
            unpublish(&set->all[i]);
    return r;
}

static int publish_listed(struct set *set, struct dr_backup_entry *entries, struct dr_error *err)
{
    const struct backup *first = &set->all[0];
    struct dr_naming naming = {0};
    int r = make_entries(set, entries, err);
    if (r == 0)
        r = dr_naming_announce(&naming, first->fs, options_of(first)->set, first->set.n > 0,
                               entries, set->n, err);
    if (r < 0)
        return r;
    r = give_names(set, &naming, err);
    if (r < 0 && !naming.confirmed)
        dr_naming_withdraw(&naming);
    dr_naming_end(&naming);
    return r;
}

static int publish_all(struct set *set, struct dr_error *err)
{
    int r = dr_job_before_switch(set->job, err);
    if (r < 0 || !options_of(&set->all[0])->set)
        return r < 0 ? r : give_names(set, NULL, err);
    CLEANUP_FREE struct dr_backup_entry *entries = calloc(set->n, sizeof(*entries));
    r = entries ? publish_listed(set, entries, err) : dr_fail(err, ENOMEM, "out of memory");
    for (size_t i = 0; entries && i < set->n; i++)
        free(entries[i].file);
    return r;
}

/* The backups are there. A bitmap that could not be removed is removed by the next backup. */
static void hand_on_all(struct set *set)
{
    for (size_t i = 0; i < set->n; i++) {
        struct backup *b = &set->all[i];
        struct dr_error why = DR_ERROR_INIT;
        if (b->bitmap && dr_track_hand_on(&b->track, &why) < 0)
            dr_job_message(set->job, "%s: the bitmap of the last backup could not be removed: %s",
                           b->path, why.text);
    }
}

/* ------------------------------------------------------------------ the whole */

static void end_one(struct backup *b)
{
    dr_frozen_end(&b->frozen);
    dr_track_give_up(&b->track);
    dr_track_end(&b->track);
    dr_changed_free(&b->changed);
    dr_ops_close(&b->out, NULL);
    dr_new_abandon(&b->fresh);
    dr_ops_close(&b->parent, NULL);
    dr_sums_end(&b->sums);
    dr_file_unref(b->side);
    dr_set_free(&b->set);
    free(b->path);
    free(b->mark);
    if (b->claimed)
        dr_disk_unclaim(b->what->disk);
}

static int begin_spill(struct set *set, struct dr_error *err)
{
    const struct backup *b = &set->all[0];
    const struct dr_backup_spill *spill = &options_of(b)->spill;
    return spill->path
               ? dr_spill_new(&set->spill, b->fs, spill, dr_ops_file_flags(target_flags(b)), err)
               : 0;
}

static int run(struct set *set, struct dr_error *err)
{
    int r = begin_spill(set, err);
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        r = prepare(set, &set->all[i], err);
        if (r == 0 && dr_add_overflow(set->total, set->all[i].sums.size, &set->total))
            r = dr_fail(err, EFBIG, "the disks together are too large");
    }
    if (r == 0)
        r = take_instant(set, err);
    if (r == 0)
        r = copy_all(set, err);
    if (r == 0)
        r = publish_all(set, err);
    if (r == 0)
        hand_on_all(set);
    for (size_t i = 0; i < set->n; i++)
        end_one(&set->all[i]);
    dr_spill_free(set->spill);
    return r;
}

/* No job is begun or ended. */
static int backup_disks(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                        struct dr_error *err)
{
    struct set set = {.all = calloc(n, sizeof(*set.all)), .n = n, .job = job};
    if (!set.all)
        return dr_fail(err, ENOMEM, "out of memory for %zu backups", n);
    for (size_t i = 0; i < n; i++) {
        disks[i].result = (struct dr_backup_result){0};
        set.all[i] = (struct backup){.what = &disks[i], .fs = disks[i].disk->fs, .job = job};
    }
    int r = run(&set, err);
    free(set.all);
    for (size_t i = 0; r < 0 && i < n; i++)
        dr_new_hide(r, disks[i].target, err);
    return r;
}

static bool same_set(const char *a, const char *b)
{
    return a && b ? strcmp(a, b) == 0 : a == b;
}

int dr_disks_backup(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                    struct dr_error *err)
{
    DR_REQUIRE(disks, err);
    if (n == 0)
        return dr_fail(err, EINVAL, "no disk to back up");
    for (size_t i = 0; i < n; i++) {
        DR_REQUIRE(disks[i].disk, err);
        DR_REQUIRE(disks[i].target, err);
        if (!same_set(disks[i].options.set, disks[0].options.set))
            return dr_fail(err, EINVAL, "disks that are backed up at one instant have one set");
    }
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, backup_disks(disks, n, job, err));
}

int dr_disk_backup(struct dr_disk *disk, const char *target,
                   const struct dr_backup_options *options, struct dr_job *job,
                   struct dr_backup_result *result, struct dr_error *err)
{
    struct dr_backup_disk one = {.disk = disk, .target = target};
    if (options)
        one.options = *options;
    int r = dr_disks_backup(&one, 1, job, err);
    if (r == 0 && result)
        *result = one.result;
    return r;
}

int dr_backup_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *source,
                 const char *target, const struct dr_backup_options *options, struct dr_job *job,
                 struct dr_backup_result *result, struct dr_error *err)
{
    struct dr_backup_disk one = {.target = target};
    struct dr_open_options open = source ? *source : (struct dr_open_options){0};
    if (options)
        one.options = *options;
    if (one.options.bitmap || one.options.since) /* what can be read stays as it is */
        open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, &one.disk, err);
    if (r < 0)
        return r;
    r = backup_disks(&one, 1, job, err);
    int closed = dr_close(one.disk, r == 0 ? err : NULL);
    if (r == 0 && result)
        *result = one.result;
    return r < 0 ? r : closed;
}

int dr_backup(const char *path, const struct dr_open_options *source, const char *target,
              const struct dr_backup_options *options, struct dr_job *job,
              struct dr_backup_result *result, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(target, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    return dr_job_end(job,
                      dr_backup_fs(dr_fs_posix(), path, source, target, options, job, result, err));
}
