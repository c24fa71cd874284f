/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* snapshot: a new, empty child becomes the active disk; what was active keeps its name and is the
 * frozen parent. By path the parent is not written to. How an open disk goes on with the child is
 * in snapshot-switch.c. */
#include <ctype.h>
#include <stdio.h>
#include <strings.h>

#include "base/cleanup.h"
#include "drover/chain.h"
#include "ops/snapshot.h"
#include "ops/vmsd-record.h"

#define DIGITS     6
#define MAX_NUMBER 999999u

/* The length of "X" in X.vmdk and in X-000012.vmdk. */
static size_t stem_length(const char *name, const char *suffix)
{
    size_t len = strlen(name), tail = strlen(suffix) + 1;
    if (len > tail && name[len - tail] == '.' && strcasecmp(name + len - tail + 1, suffix) == 0)
        len -= tail;
    if (len <= DIGITS + 1 || name[len - DIGITS - 1] != '-')
        return len;
    for (size_t i = len - DIGITS; i < len; i++)
        if (!isdigit((unsigned char)name[i]))
            return len;
    return len - DIGITS - 1;
}

/* stem-NNNNNN.x or stem-NNNNNN-x: the number NNNNNN; else 0. Files without a descriptor count too:
 * somebody may be making them, or they are what is left of a disk. */
static unsigned number_of(const char *name, const char *stem, size_t stem_len)
{
    if (strncmp(name, stem, stem_len) != 0 || name[stem_len] != '-')
        return 0;
    const char *p = name + stem_len + 1;
    unsigned n = 0;
    for (int i = 0; i < DIGITS; i++) {
        if (!isdigit((unsigned char)p[i]))
            return 0;
        n = n * 10 + (unsigned)(p[i] - '0');
    }
    return p[DIGITS] == '.' || p[DIGITS] == '-' || p[DIGITS] == 0 ? n : 0;
}

static int free_number(struct dr_fs *fs, const char *path, size_t stem_len, unsigned *number,
                       struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE uint8_t *used = calloc(1, MAX_NUMBER + 2);
    char **names;
    size_t n;
    if (!dir || !used)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n; i++)
        used[number_of(names[i], dr_path_basename(path), stem_len)] = 1;
    dr_ops_free_names(names, n);
    *number = 1;
    while (used[*number])
        (*number)++;
    return *number <= MAX_NUMBER ? 0 : dr_fail(err, EEXIST, "%s: no free snapshot number", path);
}

static int choose_name(struct dr_fs *fs, const struct dr_image *image, const struct dr_format *fmt,
                       const char *name, char **chosen, struct dr_error *err)
{
    const char *base = dr_path_basename(image->path);
    if (name && (!*name || strchr(name, '/')))
        return dr_fail(err, EINVAL,
                       "\"%s\": a snapshot stands in its disk's directory and needs a "
                       "plain file name",
                       name);
    if (name) {
        *chosen = strdup(name);
        return *chosen ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    }
    const char *suffix = fmt->snapshot_suffix;
    size_t stem = stem_length(base, image->fmt->snapshot_suffix);
    unsigned number = 0;
    int r = free_number(fs, image->path, stem, &number, err);
    if (r < 0)
        return r;
    if (asprintf(chosen, "%.*s-%06u.%s", (int)stem, base, number, suffix) < 0)
        *chosen = NULL;
    return *chosen ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
}

/* A writer's lock keeps others from using the disk and from making a second snapshot at the same
 * time; a parent that may only be read is frozen already. */
static int open_exclusive(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                          struct dr_disk **disk, struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    struct dr_error why = DR_ERROR_INIT;
    open.flags |= DR_OPEN_RDWR | DR_OPEN_UNCHANGED;
    int r = dr_open_fs(fs, path, &open, disk, &why);
    if (r == -EACCES || r == -EROFS || r == -EPERM) {
        open.flags &= ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED);
        return dr_open_fs(fs, path, &open, disk, err);
    }
    return r < 0 ? dr_fail(err, -r, "%s", why.text) : 0;
}

static unsigned flags_of(const struct snapshot *s)
{
    return s->options ? s->options->flags : 0;
}

unsigned snapshot_child_flags(const struct snapshot *s)
{
    const unsigned kept = DR_OPEN_NO_FLUSH | DR_OPEN_NO_LOCK | DR_OPEN_ANY_PATH | DR_OPEN_DIRECT;
    return ((s->disk->flags | flags_of(s)) & kept) | DR_OPEN_RDWR;
}

/* The first write of an open gives the parent another content id, and the child records the
 * present one. So that comes first: from then on the id stays until the parent is closed. Behind
 * its end the parent has no place that writing would have to be prepared for. */
static int settle_id(const struct snapshot *s, struct dr_error *err)
{
    struct dr_image *top = s->chain->images[0];
    if (!s->fmt || s->fmt != top->fmt || !top->writable || !(s->fmt->flags & DR_FORMAT_CONTENT_ID))
        return 0;
    return dr_image_begin(top, top->size, !(top->flags & DR_OPEN_UNCHANGED), err);
}

static int make_child(struct snapshot *s, struct dr_error *err)
{
    struct dr_image *image = s->chain->images[0];
    const struct dr_overlay *o = s->overlay;
    bool alike = s->fmt == image->fmt;
    CLEANUP_FREE char *name = dr_ops_name_of(s->disk->fs, s->where, s->chain, 0);
    const struct dr_create_params what = {
        .size = image->size,
        .backing = image,
        .backing_name = o && o->path ? name : dr_path_basename(image->path),
        .backing_format = image->fmt->name,
        .like = alike ? image : NULL,
        .like_chain = alike ? s->chain : NULL,
        .all_new = true,
        .force = true,
    };
    if (!name)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    pthread_mutex_lock(&image->begin_lock); /* begin_write edits what is taken over */
    int r = dr_new_create(&s->fresh, s->fmt, &what, o ? o->pairs : NULL, o ? o->n_pairs : 0,
                          flags_of(s), err);
    pthread_mutex_unlock(&image->begin_lock);
    /* The user of the disk goes on with the child; a parent that may only be read says nothing
     * about who that is. */
    if (r == 0 && image->writable)
        dr_new_take_attrs(&s->fresh, image->path);
    return r;
}

static int choose_format(struct snapshot *s, struct dr_error *err)
{
    const struct dr_image *image = s->chain->images[0];
    s->fmt = image->fmt;
    if (s->overlay && s->overlay->format)
        s->fmt = dr_ops_format(s->overlay->format, DR_FORMAT_CREATE | DR_FORMAT_BACKING, err);
    if (!s->fmt)
        return err ? -err->errnum : -EINVAL;
    if (!(s->fmt->flags & DR_FORMAT_BACKING) || !s->fmt->create || !s->fmt->snapshot_suffix)
        return dr_fail(err, ENOTSUP, "%s: %s images cannot have snapshots", image->path,
                       s->fmt->name);
    if (s->fmt->parent_format && strcmp(s->fmt->parent_format, image->fmt->name) != 0)
        return dr_fail(err, ENOTSUP, "%s: is a %s image, and the parent of a %s image must be %s",
                       image->path, image->fmt->name, s->fmt->name, s->fmt->parent_format);
    return 0;
}

static int choose_place(struct snapshot *s, struct dr_error *err)
{
    const struct dr_image *image = s->chain->images[0];
    CLEANUP_FREE char *chosen = NULL;
    if (s->overlay && s->overlay->path)
        s->where = strdup(s->overlay->path);
    else if (dr_name_is_remote(image->path))
        return dr_fail(
            err, ENOTSUP,
            "%s: is a disk on a server, where no snapshot can be made beside it; create -b "
            "makes an image here that stands on it",
            image->path);
    else {
        int r = choose_name(s->disk->fs, image, s->fmt, s->name, &chosen, err);
        if (r < 0)
            return r;
        s->where = dr_path_sibling(image->path, chosen);
    }
    return s->where ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", image->path);
}

int snapshot_adopt(struct snapshot *s, unsigned flags, struct dr_error *err)
{
    const struct dr_image *parent = s->chain->images[0];
    CLEANUP_FREE char *name = dr_ops_name_of(s->disk->fs, s->where, s->chain, 0);
    if (!name)
        return dr_fail(err, ENOMEM, "%s: out of memory", s->where);
    return dr_image_set_backing(s->child, parent, name, parent->fmt->name, flags, err);
}

/* Nobody else has it: it is open for writing from here on. */
static int open_existing(struct snapshot *s, struct dr_error *err)
{
    const struct dr_image *top = s->chain->images[0];
    if (!s->fmt->set_backing)
        return dr_fail(err, ENOTSUP, "%s: %s images have no backing file to change", s->where,
                       s->fmt->name);
    int r =
        dr_image_open(s->disk->fs, s->where, s->fmt->name, snapshot_child_flags(s), &s->child, err);
    if (r == 0 && s->child->size != top->size)
        r = dr_fail(err, EINVAL, "%s: holds %llu bytes, and the disk has %llu", s->where,
                    (unsigned long long)s->child->size, (unsigned long long)top->size);
    return r < 0 ? r : snapshot_adopt(s, DR_TRY, err);
}

/* Everything that may be refused, and the child, complete, in its private directory. live: the
 * parent is in use. */
static int prepare(struct snapshot *s, bool live, struct dr_error *err)
{
    struct dr_image *image = s->chain->images[0];
    struct dr_fs *fs = s->disk->fs;
    int r = choose_format(s, err);
    if (r == 0)
        r = dr_chain_check_length(image->path, s->chain->n + 1, err);
    if (r == 0)
        r = choose_place(s, err);
    /* Through a link, or in another directory, the child could not open the disk. */
    if (r == 0)
        r = dr_gate_check(fs, s->where, image->path, s->options, err);
    if (r == 0 && live)
        r = settle_id(s, err);
    if (r == 0 && s->overlay && s->overlay->existing)
        return open_existing(s, err);
    if (r == 0)
        r = dr_new_begin(&s->fresh, fs, s->where, true, flags_of(s), err);
    return r < 0 ? r : make_child(s, err);
}

/* ------------------------------------------------------------------ on an open disk, and by path
 */

/* The child takes its name, then the list of the machine's snapshots: what could fail of that comes
 * first. */
static int publish(struct snapshot_set *set, struct dr_error *err)
{
    struct snapshot *s = &set->all[0];
    struct vmsd_record record = {0};
    struct dr_error why = DR_ERROR_INIT;
    int r = s->record ? vmsd_record_begin(&record, s->disk->fs, s->chain, err) : 0;
    if (r == 0)
        r = dr_new_publish(&s->fresh, err);
    if (r == 0) {
        set->switched = true;
        r = vmsd_record_publish(&record, &why);
    }
    if (why.errnum)
        dr_fail(err, why.errnum, "%s: is there, but its machine's list was not changed: %s",
                s->where, why.text);
    vmsd_record_end(&record);
    return r;
}

static int snapshots_claimed(struct snapshot_set *set, bool live, struct dr_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < set->n; i++) {
        r = live ? dr_ops_freeze_parents(set->all[i].disk, set->job, err) : 0;
        set->all[i].chain = dr_disk_chain(set->all[i].disk);
        if (r == 0)
            r = prepare(&set->all[i], live, err);
    }
    if (r == 0)
        r = live ? snapshot_switch(set, err) : publish(set, err);
    for (size_t i = 0; i < set->n; i++) {
        dr_new_abandon(&set->all[i].fresh);
        dr_image_unref(set->all[i].child, NULL);
        int closed = dr_chain_unref(set->all[i].chain, r == 0 ? err : NULL);
        r = r < 0 ? r : closed;
    }
    return r;
}

static int snapshots(struct snapshot_set *set, bool live, struct dr_error *err)
{
    size_t claimed = 0;
    int r = 0;
    while (r == 0 && claimed < set->n) {
        r = dr_disk_claim(set->all[claimed].disk, "snapshot", err);
        claimed += r == 0;
    }
    if (r == 0)
        r = snapshots_claimed(set, live, err);
    while (claimed > 0)
        dr_disk_unclaim(set->all[--claimed].disk);
    return r;
}

static int snapshot(struct snapshot *s, bool live, char **active, struct dr_job *job,
                    struct dr_error *err)
{
    struct snapshot_set set = {.all = s, .n = 1, .job = job};
    int r = snapshots(&set, live, err);
    if ((r == 0 || set.switched) && active)
        *active = DR_STEAL(s->where);
    free(s->where);
    return r;
}

static int snapshot_disks(struct dr_overlay *overlays, size_t n, struct dr_job *job,
                          struct dr_error *err)
{
    struct snapshot_set set = {.all = calloc(n, sizeof(*set.all)), .n = n, .job = job};
    int r = set.all ? 0 : dr_fail(err, ENOMEM, "out of memory for %zu snapshots", n);
    for (size_t i = 0; r == 0 && i < n; i++) {
        set.all[i] = (struct snapshot){
            .disk = overlays[i].disk, .options = &overlays[i].open, .overlay = &overlays[i]};
        if (!dr_writable(overlays[i].disk))
            r = dr_fail(err, EROFS, "%s: is open for reading only",
                        dr_image_path(overlays[i].disk, 0));
    }
    if (r == 0)
        r = snapshots(&set, true, err);
    for (size_t i = 0; set.all && i < n; i++) {
        overlays[i].active = r == 0 || set.switched ? DR_STEAL(set.all[i].where) : NULL;
        free(set.all[i].where);
    }
    free(set.all);
    return r;
}

int dr_disks_snapshot(struct dr_overlay *overlays, size_t n, struct dr_job *job,
                      struct dr_error *err)
{
    DR_REQUIRE(overlays, err);
    if (n == 0)
        return dr_fail(err, EINVAL, "no disk to make a snapshot of");
    for (size_t i = 0; i < n; i++)
        DR_REQUIRE(overlays[i].disk, err);
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    r = dr_job_end(job, snapshot_disks(overlays, n, job, err));
    return dr_new_hide(r, NULL, err);
}

int dr_disk_snapshot(struct dr_disk *disk, const char *name, const struct dr_open_options *options,
                     char **active, struct dr_job *job, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    struct snapshot s = {.disk = disk, .options = options, .name = name};
    int r = dr_job_begin(job, err);
    if (r < 0)
        return r;
    if (!dr_writable(disk))
        r = dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    else
        r = snapshot(&s, true, active, job, err);
    return dr_new_hide(dr_job_end(job, r), NULL, err);
}

static int create(struct dr_fs *fs, const char *path, const char *name,
                  const struct dr_open_options *options, bool record, char **active,
                  struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    int r = open_exclusive(fs, path, options, &disk, err);
    struct snapshot s = {.disk = disk, .options = options, .name = name, .record = record};
    return r < 0 ? r : snapshot(&s, false, active, NULL, err);
}

int dr_snapshot_create_fs(struct dr_fs *fs, const char *path, const char *name,
                          const struct dr_open_options *options, char **active,
                          struct dr_error *err)
{
    return create(fs, path, name, options, false, active, err);
}

int dr_snapshot_take(const char *path, const char *name, const struct dr_snapshot_options *options,
                     char **active, struct dr_error *err)
{
    static const struct dr_snapshot_options defaults;
    const struct dr_snapshot_options *o = options ? options : &defaults;
    DR_REQUIRE(path, err);
    if (o->dry_run)
        return dr_fail(err, ENOTSUP, "%s: making a snapshot has no dry run", path);
    return dr_new_hide(create(dr_fs_posix(), path, name, &o->open, o->update_vmsd, active, err),
                       name, err);
}

int dr_snapshot_create(const char *path, const char *name, const struct dr_open_options *options,
                       char **active, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    return dr_new_hide(dr_snapshot_create_fs(dr_fs_posix(), path, name, options, active, err), name,
                       err);
}
