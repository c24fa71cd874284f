/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/point-backup.h"

#include "base/cleanup.h"
#include "ops/backup-copy.h"
#include "ops/newimage.h"
#include "ops/ops-internal.h"

struct dr_point {
    struct dr_point_order o;
    char *target, *format, *bitmap, *image, *spill_path;
    struct dr_disk *out;
    struct dr_new_image fresh; /* of a target that is made */
    struct dr_spill *spill;
    struct dr_frozen frozen;
    struct dr_changed changed;
    struct dr_dirty left;
    struct dr_marks marks;     /* what the bitmap has at the instant */
    struct dr_marks successor; /* what changes from then on */
    bool claimed, enabled, marked, noting;
    bool durable;                 /* all of the target, which is closed */
    int (*keep_step)(void *user); /* of dr_point_together, or NULL */
    void *step_user;
};

/* ------------------------------------------------------------------ the target */

static unsigned target_flags(const struct dr_point *p)
{
    const unsigned kept = DR_OPEN_NO_FLUSH | DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_DIRECT;
    return p->o.open.flags | DR_OPEN_RDWR | (p->o.disk->flags & kept);
}

/* child: the new image is to stand on what the disk's active image stands on. */
static int create_target(struct dr_point *p, struct dr_chain *chain, bool child,
                         struct dr_error *err)
{
    struct dr_fs *fs = p->o.disk->fs;
    struct dr_image *parent = child ? chain->images[1] : NULL;
    const struct dr_format *fmt =
        dr_ops_format(p->format, DR_FORMAT_CREATE | (parent ? DR_FORMAT_BACKING : 0u), err);
    CLEANUP_FREE char *name = parent ? dr_ops_name_of(fs, p->target, chain, 1) : NULL;
    struct dr_open_options open = p->o.open;
    if (!fmt)
        return err ? -err->errnum : -EINVAL;
    if (parent && !name)
        return dr_fail(err, ENOMEM, "%s: out of memory", p->target);
    if (fmt->flags & DR_FORMAT_NOISE) /* zeros are not written in a backup */
        return dr_fail(err, ENOTSUP, "%s: a backup cannot have the format %s", p->target,
                       fmt->name);
    open.format = p->format;
    open.flags = target_flags(p) | DR_OPEN_UNCHANGED;
    open.backing = parent ? parent->path : NULL;
    open.backing_format = parent ? parent->fmt->name : NULL;
    const struct dr_create_params params = {.size = chain->images[0]->size,
                                            .backing = parent,
                                            .backing_name = name,
                                            .backing_format = open.backing_format,
                                            .all_new = true,
                                            .force = true};
    int r = parent ? dr_gate_check(fs, p->target, parent->path, &p->o.open, err) : 0;
    if (r == 0)
        r = dr_new_begin(&p->fresh, fs, p->target, false, target_flags(p), err);
    if (r == 0)
        r = dr_new_create(&p->fresh, fmt, &params, NULL, 0, target_flags(p), err);
    if (r == 0)
        r = dr_new_check_places(&p->fresh, err);
    return r < 0 ? r : dr_open_fs(fs, p->fresh.path, &open, &p->out, err);
}

/* It gets its name when it is complete: whoever is killed leaves nothing that looks like a backup.
 * One of the active image alone stands on what that stands on. */
static int make_target(struct dr_point *p, struct dr_chain *chain, struct dr_error *err)
{
    bool child = p->o.sync == DR_POINT_TOP && chain->n > 1;
    if (dr_fs_exists(p->o.disk->fs, p->target))
        return dr_fail(err, EEXIST, "%s: exists already", p->target);
    return dr_new_hide(create_target(p, chain, child, err), p->target, err);
}

static int open_target(struct dr_point *p, struct dr_error *err)
{
    struct dr_open_options open = p->o.open;
    struct dr_chain *chain = dr_disk_chain(p->o.disk);
    int r = dr_ops_reads(p->o.disk->fs, chain, p->target)
                ? dr_fail(err, EBUSY, "Source and target cannot be the same")
                : 0;
    if (r == 0 && p->o.made)
        r = make_target(p, chain, err);
    dr_chain_unref(chain, NULL);
    if (r < 0 || p->o.made)
        return r;
    open.format = p->format;
    open.flags = target_flags(p);
    r = dr_open_fs(p->o.disk->fs, p->target, &open, &p->out, err);
    if (r == 0 && dr_size(p->out) != dr_size(p->o.disk))
        r = dr_fail(err, EINVAL, "Source and target image have different sizes");
    return r;
}

/* ------------------------------------------------------------------ the bitmap */

static int add_changed(void *user, uint64_t off, uint64_t len)
{
    return dr_changed_add(user, off, len);
}

static void note_change(void *user, uint64_t off, uint64_t len)
{
    dr_marks_set(user, off, len);
}

struct search {
    const char *name;
    uint64_t granularity;
};

static int match_stored(void *user, const struct dr_bitmap_info *info)
{
    struct search *s = user;
    if (strcmp(info->name, s->name) == 0)
        s->granularity = info->granularity;
    return 0;
}

static int match_memory(void *user, const struct dr_memory_bitmap_info *info)
{
    struct search *s = user;
    if (strcmp(info->name, s->name) == 0)
        s->granularity = info->granularity;
    return 0;
}

static int find_granularity(const struct dr_point *p, struct dr_image *image, uint64_t *granularity,
                            struct dr_error *err)
{
    struct search s = {.name = p->bitmap};
    int r = p->o.stored ? dr_image_bitmap_list(image, match_stored, &s, err)
                        : dr_memory_bitmaps_each(p->o.memory, image->path, match_memory, &s);
    *granularity = s.granularity;
    return r == 0 && !s.granularity
               ? dr_fail(err, ENOENT, "Bitmap '%s' could not be found", p->bitmap)
               : r;
}

/* Its bits have the bitmap's granularity. What is stored of a bitmap is read before the instant,
 * unless other changes of it come at the same instant. */
static int read_bitmap(struct dr_point *p, struct dr_image *image, uint64_t granularity,
                       struct dr_error *err)
{
    dr_marks_init(&p->marks, (unsigned)__builtin_ctzll(granularity));
    dr_marks_init(&p->successor, p->marks.bits);
    p->marked = true;
    if (dr_marks_cover(&p->marks, image->size) < 0 ||
        dr_marks_cover(&p->successor, image->size) < 0)
        return dr_fail(err, ENOMEM, "out of memory for bitmap '%s'", p->bitmap);
    return p->o.stored ? dr_image_bitmap_stored(image, p->bitmap, &p->marks, &p->enabled, err) : 0;
}

static int read_bitmap_early(struct dr_point *p, struct dr_error *err)
{
    uint64_t granularity;
    struct dr_pass pass;
    int r = find_granularity(p, dr_disk_enter(p->o.disk, &pass)->images[0], &granularity, err);
    dr_disk_leave(p->o.disk, &pass);
    if (r < 0)
        return r;
    struct dr_chain *chain = dr_disk_chain(p->o.disk);
    r = read_bitmap(p, chain->images[0], granularity, err);
    dr_chain_unref(chain, NULL);
    return r;
}

static int read_bitmap_late(struct dr_point *p, struct dr_image *image, struct dr_error *err)
{
    uint64_t granularity;
    int r = find_granularity(p, image, &granularity, err);
    return r < 0 ? r : read_bitmap(p, image, granularity, err);
}

/* At the instant, without any file unless it is read late: what the bitmap has, and from now on the
 * successor notes. */
static int begin_successor(struct dr_point *p, struct dr_chain *present, struct dr_error *err)
{
    const struct dr_hook hook = {.after = note_change, .user = &p->successor};
    int r = p->o.late ? read_bitmap_late(p, present->images[0], err) : 0;
    if (r < 0)
        return r;
    if (!p->o.stored)
        r = dr_memory_bitmap_read(p->o.memory, p->image, p->bitmap, &p->marks, &p->enabled);
    else if (p->enabled)
        dr_image_bitmap_noted(present->images[0], &p->marks);
    if (r < 0)
        return dr_fail(err, -r, "Bitmap '%s' could not be found", p->bitmap);
    if (!present->images[0]->writable)
        return 0;
    r = dr_disk_hook_quiet(p->o.disk, &hook, err);
    p->noting = r == 0;
    return r;
}

/* The bitmap gets the bits of the successor, those of one moment. */
static int hand_on(struct dr_point *p, struct dr_error *err)
{
    const struct dr_marks *ranges = p->enabled ? &p->successor : NULL;
    struct dr_bitmap_change c = {.action = DR_BITMAP_CLEAR, .name = p->bitmap, .ranges = ranges};
    int r = p->o.stored ? dr_ops_bitmap_change(p->o.disk, &c, err)
                        : dr_memory_bitmap_change(p->o.memory, p->image, p->bitmap, DR_BITMAP_CLEAR,
                                                  ranges, err);
    return r < 0 ? dr_prefix(err, r, "the backup is complete, but its bitmap has not changed") : 0;
}

/* The backup has failed: what was written is durable, and what was not goes on being noted. */
static void hand_on_rest(struct dr_point *p)
{
    if (!p->durable && (!p->out || dr_chain_flush(p->out->chain, 0, NULL) < 0))
        return;
    p->enabled = true; /* for what is left, also where the bitmap notes nothing itself */
    for (uint64_t off = 0; (off = dr_dirty_next(&p->left, off)) < p->frozen.size;
         off += DR_DIRTY_GRAIN)
        dr_marks_set(&p->successor, off, dr_min(DR_DIRTY_GRAIN, p->frozen.size - off));
    hand_on(p, NULL);
}

/* ------------------------------------------------------------------ the instant */

static int add_top(struct dr_point *p, struct dr_chain *present, struct dr_error *err)
{
    struct dr_walk walk;
    uint64_t size = p->frozen.size;
    int r = 0;
    dr_walk_init(&walk, present, 0, 1, size);
    for (uint64_t off = 0; r == 0 && off < size; off = walk.run.end) {
        r = dr_walk_to(&walk, off, err);
        if (r == 0 && walk.run.kind != DR_RUN_HOLE &&
            dr_changed_add(&p->changed, off, dr_min(walk.run.end, size) - off) < 0)
            r = dr_fail(err, ENOMEM, "out of memory for a backup");
    }
    return r;
}

/* Of struct dr_frozen. */
static int choose_ranges(void *user, struct dr_chain *present, struct dr_error *err)
{
    struct dr_point *p = user;
    int r = p->bitmap ? begin_successor(p, present, err) : 0;
    if (r < 0)
        return r;
    if (p->o.sync == DR_POINT_TOP)
        return add_top(p, present, err);
    r = p->o.sync == DR_POINT_BITMAP
            ? dr_marks_each(&p->marks, p->frozen.size, add_changed, &p->changed)
            : dr_changed_add(&p->changed, 0, p->frozen.size);
    return r < 0 ? dr_fail(err, ENOMEM, "out of memory for a backup") : 0;
}

static int copy_strings(struct dr_point *p, struct dr_error *err)
{
    const struct dr_point_order *o = &p->o;
    const char *image = dr_image_path(o->disk, 0);
    p->target = strdup(o->target);
    p->format = strdup(o->format);
    p->image = image ? strdup(image) : NULL;
    p->bitmap = o->bitmap ? strdup(o->bitmap) : NULL;
    p->spill_path = o->spill.path ? strdup(o->spill.path) : NULL;
    p->o.spill.path = p->spill_path;
    bool all = p->target && p->format && p->image && (p->bitmap || !o->bitmap) &&
               (p->spill_path || !o->spill.path);
    return all ? 0 : dr_fail(err, ENOMEM, "out of memory for a backup");
}

static int begin(struct dr_point *p, struct dr_error *err)
{
    int r = copy_strings(p, err);
    if (r == 0) {
        r = dr_disk_claim(p->o.disk, "backup", err);
        p->claimed = r == 0;
    }
    if (r == 0)
        r = open_target(p, err);
    if (r == 0 && p->bitmap && !p->o.late)
        r = read_bitmap_early(p, err);
    if (r == 0)
        r = dr_dirty_make(&p->left, dr_size(p->o.disk), err);
    if (r == 0 && p->spill_path)
        r = dr_spill_new(&p->spill, p->o.disk->fs, &p->o.spill, dr_ops_file_flags(p->o.disk->flags),
                         err);
    if (r < 0)
        return r;
    p->frozen = (struct dr_frozen){.disk = p->o.disk,
                                   .size = dr_size(p->o.disk),
                                   .target = p->out->chain,
                                   .changed = &p->changed,
                                   .left = &p->left,
                                   .at_instant = choose_ranges,
                                   .user = p,
                                   .spill = p->spill};
    return dr_frozen_begin(&p->frozen, err);
}

int dr_point_begin(struct dr_point **point, const struct dr_point_order *order,
                   struct dr_error *err)
{
    struct dr_point *p = calloc(1, sizeof(*p));
    *point = NULL;
    if (!p)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    p->o = *order;
    int r = begin(p, err);
    if (r < 0)
        dr_point_free(p);
    else
        *point = p;
    return r;
}

int dr_point_now_quiet(struct dr_point *p, struct dr_chain *present, struct dr_error *err)
{
    return dr_frozen_now_quiet(&p->frozen, present, err);
}

int dr_point_now(struct dr_point *p, struct dr_error *err)
{
    struct dr_frozen *one = &p->frozen;
    int r = dr_frozen_now_all(&one, 1, NULL, err);
    if (r == 0)
        dr_disk_lend(p->o.disk);
    return r;
}

/* ------------------------------------------------------------------ the copy */

/* Only what the guest is about to change is copied, until somebody ends it. */
static int wait_for_end(struct dr_point *p, struct dr_job *job, struct dr_error *err)
{
    int r = 0;
    while (r == 0 && !atomic_load(&p->frozen.broken)) {
        uint32_t bell = dr_job_bell(job);
        r = dr_job_rest(job, err);
        if (r == 0 && !atomic_load(&p->frozen.broken))
            dr_job_sleep(job, bell, UINT64_C(1000000000)); /* a copy that breaks rings no bell */
    }
    return r;
}

static int copy(struct dr_point *p, struct dr_job *job, struct dr_error *err)
{
    int r = p->o.sync == DR_POINT_NONE ? wait_for_end(p, job, err)
                                       : dr_frozen_copy(&p->frozen, 0, 0, job, err);
    int broken = dr_frozen_finish(&p->frozen, err);
    r = r < 0 ? r : broken;
    while (r == 0 && (r = dr_chain_flush(p->out->chain, 0, err)) < 0 &&
           (r = dr_job_after_failure(job, r, err)) == 0)
        dr_error_reset(err);
    return r < 0 ? r : dr_job_before_switch(job, err);
}

void dr_point_together(struct dr_point *p, int (*keep_step)(void *user), void *user)
{
    p->keep_step = keep_step;
    p->step_user = user;
}

static int keep_step(struct dr_point *p, struct dr_error *err)
{
    if (!p->keep_step || p->keep_step(p->step_user) == 0)
        return 0;
    return dr_fail(err, ECANCELED, "cancelled");
}

/* The target has its name, and a backup that belongs with it has failed. */
static void remove_target(struct dr_point *p)
{
    const struct dr_open_options open = {.flags = target_flags(p) & ~(unsigned)DR_OPEN_RDWR,
                                         .allow_paths = p->o.open.allow_paths};
    dr_ops_remove_image(p->o.disk->fs, p->target, p->format, &open, NULL, NULL, NULL);
}

static int name_target(struct dr_point *p, struct dr_error *err)
{
    int r = p->o.made ? dr_new_hide(dr_new_publish(&p->fresh, err), p->target, err) : 0;
    if (r < 0)
        return r;
    r = keep_step(p, err);
    if (r < 0 && p->o.made)
        remove_target(p);
    return r;
}

/* The target is durable when it is closed; only then it gets its name, and only then the bitmap is
 * handed on. */
static int run(struct dr_point *p, struct dr_job *job, struct dr_error *err)
{
    dr_job_beside(job, p->o.disk);
    int r = copy(p, job, err);
    dr_disk_take_back(p->o.disk);
    if (r == 0) {
        r = dr_ops_close(&p->out, err);
        p->durable = r == 0;
    }
    if (r == 0)
        r = keep_step(p, err);
    if (r == 0)
        r = name_target(p, err);
    if (r == 0)
        return p->bitmap && p->o.mode != DR_POINT_NEVER ? hand_on(p, err) : 0;
    /* A target that was made for this is removed, so nothing of it counts as saved. */
    if (p->bitmap && p->o.mode == DR_POINT_ALWAYS && !p->o.made)
        hand_on_rest(p);
    return r;
}

/* All but the memory of the strings: nobody is kept from anything any more. */
static void end(struct dr_point *p)
{
    if (p->noting)
        dr_disk_unhook(p->o.disk, &p->successor);
    p->noting = false;
    dr_frozen_end(&p->frozen);
    dr_spill_free(DR_STEAL(p->spill));
    dr_dirty_free(&p->left);
    dr_changed_free(&p->changed);
    dr_ops_close(&p->out, NULL);
    dr_new_abandon(&p->fresh);
    if (p->claimed) {
        dr_disk_take_back(p->o.disk);
        dr_disk_unclaim(p->o.disk);
    }
    p->claimed = false;
}

int dr_point_run(struct dr_point *p, struct dr_job *job, struct dr_error *err)
{
    int r = dr_job_begin(job, err);
    if (r == 0)
        r = dr_job_end(job, run(p, job, err));
    end(p);
    return r;
}

void dr_point_free(struct dr_point *p)
{
    if (!p)
        return;
    end(p);
    if (p->marked) {
        dr_marks_free(&p->marks);
        dr_marks_free(&p->successor);
    }
    free(p->target);
    free(p->format);
    free(p->image);
    free(p->bitmap);
    free(p->spill_path);
    free(p);
}

bool dr_point_uses(const struct dr_point *p, const struct dr_disk *disk, const char *image,
                   const char *bitmap)
{
    return p && p->bitmap && p->o.disk == disk && strcmp(p->bitmap, bitmap) == 0 &&
           strcmp(p->image, image) == 0;
}
