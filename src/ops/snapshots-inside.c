/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots inside an image, which its format keeps (core/internal-snapshots.c). They are changed
 * while no request is past the disk's gate: then the disk's size may change, too. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ list */

struct collect {
    struct dr_internal_snapshot *all;
    size_t n, room;
};

static int collect_one(void *user, const struct dr_snapshot_info *info)
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
    struct dr_internal_snapshot *s = &c->all[c->n++];
    *s = (struct dr_internal_snapshot){
        .id = strdup(info->id ? info->id : ""),
        .name = strdup(info->name ? info->name : ""),
        .size = info->size,
        .vm_state = info->vm_state,
        .seconds = info->seconds,
        .nanoseconds = info->nanoseconds,
        .clock_ns = info->clock_ns,
        .has_icount = info->has_icount,
        .icount = info->icount,
    };
    return s->id && s->name ? 0 : -ENOMEM;
}

void dr_internal_snapshots_free(struct dr_internal_snapshot *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free(list[i].id);
        free(list[i].name);
    }
    free(list);
}

int dr_disk_internal_snapshots(struct dr_disk *disk, struct dr_internal_snapshot **list, size_t *n,
                               struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(list, err);
    DR_REQUIRE(n, err);
    struct collect c = {0};
    struct dr_pass pass;
    struct dr_image *image = dr_disk_enter(disk, &pass)->images[0];
    int r = dr_image_snapshot_list(image, collect_one, &c, err);
    dr_disk_leave(disk, &pass);
    if (r < 0) {
        dr_internal_snapshots_free(c.all, c.n);
        return r == -ENOMEM ? dr_fail(err, ENOMEM, "out of memory for %zu snapshots", c.n) : r;
    }
    *list = c.all;
    *n = c.n;
    return 0;
}

int dr_internal_snapshots(const char *path, const struct dr_open_options *options,
                          struct dr_internal_snapshot **list, size_t *n, struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(list, err);
    DR_REQUIRE(n, err);
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    open.flags |= DR_OPEN_NO_BACKING;
    int r = dr_open_fs(dr_fs_posix(), path, &open, &disk, err);
    return r < 0 ? r : dr_disk_internal_snapshots(disk, list, n, err);
}

/* ------------------------------------------------------------------ create, apply, delete */

struct change {
    enum { CREATE, APPLY, DELETE } what;
    const char *name; /* apply, delete: or an id */
};

/* An id says which one; a name may belong to several. What is deleted is gone: only where nothing
 * has that name it is taken for an id. */
static int change_image(const struct change *c, struct dr_image *image, struct dr_error *err)
{
    CLEANUP_FREE char *id = NULL;
    if (c->what == CREATE)
        return dr_image_snapshot_create(image, c->name, err);
    if (!image->fmt->snapshot_list)
        return dr_fail(err, ENOTSUP, "%s: %s images have no snapshots inside", image->path,
                       image->fmt->name);
    int r = dr_image_snapshot_find(image, c->name, c->what == APPLY, &id, err);
    if (r < 0)
        return r;
    return c->what == APPLY ? dr_image_snapshot_apply(image, id, err)
                            : dr_image_snapshot_delete(image, id, err);
}

static int change_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    (void)fresh;
    return change_image(user, present->images[0], err);
}

static int change_claimed(struct dr_disk *disk, struct change *c, struct dr_job *job,
                          struct dr_error *err)
{
    if (!dr_writable(disk))
        return dr_fail(err, EROFS, "%s: is open for reading only", dr_image_path(disk, 0));
    int r = dr_disk_claim(disk, "snapshot", err);
    if (r < 0)
        return r;
    uint64_t pause = 0;
    r = dr_disk_quiesce(disk, change_step, c, &pause, err);
    dr_job_held(job, pause);
    dr_disk_unclaim(disk);
    return r;
}

static int change_disk(struct dr_disk *disk, struct change c, struct dr_job *job,
                       struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(c.name, err);
    int r = dr_job_begin(job, err);
    return r < 0 ? r : dr_job_end(job, change_claimed(disk, &c, job, err));
}

static int change_path(const char *path, struct change c, const struct dr_open_options *options,
                       struct dr_error *err)
{
    DR_REQUIRE(path, err);
    DR_REQUIRE(c.name, err);
    struct dr_disk *disk = NULL;
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    open.flags |= DR_OPEN_RDWR | DR_OPEN_NO_BACKING;
    int r = dr_open_fs(dr_fs_posix(), path, &open, &disk, err);
    if (r < 0)
        return r;
    r = change_claimed(disk, &c, NULL, err);
    int closed = dr_ops_close(&disk, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_disk_internal_snapshot_create(struct dr_disk *disk, const char *name, struct dr_job *job,
                                     struct dr_error *err)
{
    return change_disk(disk, (struct change){CREATE, name}, job, err);
}

int dr_disk_internal_snapshot_apply(struct dr_disk *disk, const char *snapshot, struct dr_job *job,
                                    struct dr_error *err)
{
    return change_disk(disk, (struct change){APPLY, snapshot}, job, err);
}

int dr_disk_internal_snapshot_delete(struct dr_disk *disk, const char *snapshot, struct dr_job *job,
                                     struct dr_error *err)
{
    return change_disk(disk, (struct change){DELETE, snapshot}, job, err);
}

int dr_internal_snapshot_create(const char *path, const char *name,
                                const struct dr_open_options *options, struct dr_error *err)
{
    return change_path(path, (struct change){CREATE, name}, options, err);
}

int dr_internal_snapshot_apply(const char *path, const char *snapshot,
                               const struct dr_open_options *options, struct dr_error *err)
{
    return change_path(path, (struct change){APPLY, snapshot}, options, err);
}

int dr_internal_snapshot_delete(const char *path, const char *snapshot,
                                const struct dr_open_options *options, struct dr_error *err)
{
    return change_path(path, (struct change){DELETE, snapshot}, options, err);
}

/* ------------------------------------------------------------------ for those who change parents
 */

int dr_ops_refuse_snapshots(struct dr_image *image, const char *what, struct dr_error *err)
{
    size_t n;
    int r = dr_image_snapshot_count(image, &n, err);
    if (r < 0 || n == 0)
        return r;
    return dr_fail(err, ENOTSUP,
                   "%s: has %zu snapshot%s inside, and %s would change what they show; delete them "
                   "first (`drover snapshot -d`), or copy the disk (`drover convert`)",
                   image->path, n, n > 1 ? "s" : "", what);
}
