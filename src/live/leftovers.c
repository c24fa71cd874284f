/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that changes of chains leave, and what a server that was killed may have left.
 *
 * The state knows them by name before they come to be: new images of snapshots, targets of mirrors,
 * images that leave a chain. The next server removes those that no disk went on with, each only if
 * it is what the state takes it for. Overlays that a commit has emptied stay; they are noted, since
 * they show nothing but the disk. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ lists of names */

static size_t find_name(const struct live_names *names, const char *name)
{
    size_t i = 0;
    while (i < names->n && strcmp(names->all[i], name) != 0)
        i++;
    return i;
}

bool live_names_add(struct live_names *names, const char *name)
{
    if (find_name(names, name) < names->n)
        return true;
    char **all = realloc(names->all, (names->n + 1) * sizeof(*all));
    if (!all)
        return false;
    names->all = all;
    char *copy = strdup(name);
    if (copy)
        all[names->n++] = copy;
    return copy;
}

void live_names_remove(struct live_names *names, const char *name)
{
    size_t i = find_name(names, name);
    if (i == names->n)
        return;
    free(names->all[i]);
    names->all[i] = names->all[--names->n];
}

void live_names_free(struct live_names *names)
{
    for (size_t i = 0; i < names->n; i++)
        free(names->all[i]);
    free(names->all);
    *names = (struct live_names){0};
}

json_t *live_names_json(const struct live_names *names)
{
    json_t *list = json_array();
    for (size_t i = 0; i < names->n; i++)
        if (json_array_append_new(list, json_string(names->all[i])) < 0) {
            json_decref(list);
            return NULL;
        }
    return list;
}

bool live_names_copy(const struct live_names *from, struct live_names *to)
{
    *to = (struct live_names){0};
    for (size_t i = 0; i < from->n; i++)
        if (!live_names_add(to, from->all[i])) {
            live_names_free(to);
            return false;
        }
    return true;
}

/* ------------------------------------------------------------------ what is removed */

static bool is_path_of(const json_t *disks, const char *path)
{
    json_t *one;
    size_t i;
    json_array_foreach(disks, i, one)
    {
        const char *its = json_string_value(json_object_get(one, "path"));
        if (its && strcmp(its, path) == 0)
            return true;
    }
    return false;
}

/* Of what the state says, a new snapshot has nothing of its own, and a parent. */
static int may_be_new(void *user, struct dr_image *image, struct dr_error *err)
{
    (void)user;
    if (image->backing_name && dr_ops_holds_nothing(image))
        return 0;
    return dr_fail(err, EEXIST, "%s: is no new snapshot: kept", image->path);
}

static void remove_snapshot(struct dr_live *live, const char *path)
{
    const struct dr_open_options open = {.allow_paths = (const char *const *)live->allow};
    dr_recover_fs(live->fs, path, &open, false, NULL, NULL, NULL, NULL); /* what is aside yet */
    if (dr_fs_exists(live->fs, path))
        dr_ops_remove_image(live->fs, path, NULL, &open, may_be_new, NULL, NULL);
}

static int may_be_target(void *user, struct dr_image *image, struct dr_error *err)
{
    const struct dr_disk *disk = user;
    if (image->size == dr_size(disk))
        return 0;
    return dr_fail(err, EEXIST, "%s: is no copy of the disk: kept", image->path);
}

/* A mirror begins anew. Its target, which was about to get its name, may have it, but the disk did
 * not go on with it. */
static void remove_target(struct dr_live *live, json_t *job)
{
    const struct dr_open_options open = {.allow_paths = (const char *const *)live->allow};
    const char *name = json_string_value(json_object_get(job, "disk"));
    const char *path = json_string_value(json_object_get(job, "target"));
    const char *format = json_string_value(json_object_get(job, "format"));
    pthread_mutex_lock(&live->lock);
    const struct live_disk *on = name ? live_find_disk(live, name) : NULL;
    pthread_mutex_unlock(&live->lock);
    if (!on || !path || !dr_fs_exists(live->fs, path))
        return;
    dr_ops_remove_image(live->fs, path, format ? format : dr_image_format(on->disk, 0), &open,
                        may_be_target, on->disk, NULL);
}

int live_leftovers_begin(struct dr_live *live, json_t *state, struct dr_error *err)
{
    json_t *one, *disks = json_object_get(state, "disks");
    size_t i;
    bool all = true;
    json_array_foreach(json_object_get(state, "making"), i, one)
    {
        const char *path = json_string_value(one);
        if (path && !is_path_of(disks, path))
            remove_snapshot(live, path);
    }
    json_array_foreach(json_object_get(state, "jobs"), i, one)
    {
        const char *path = json_string_value(json_object_get(one, "target"));
        if (json_is_true(json_object_get(one, "naming")) && path && !is_path_of(disks, path))
            remove_target(live, one);
    }
    json_array_foreach(json_object_get(state, "emptied"), i, one)
    {
        const char *path = json_string_value(one);
        if (path && dr_fs_exists(live->fs, path))
            all &= live_names_add(&live->emptied, path);
    }
    return all ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", live->state);
}

/* ------------------------------------------------------------------ snapshots */

int live_making(struct dr_live *live, const char *const *paths, size_t n, bool begin,
                struct dr_error *err)
{
    bool all = true;
    if (!live->state)
        return 0;
    pthread_mutex_lock(&live->lock);
    for (size_t i = 0; i < n; i++)
        if (begin)
            all &= live_names_add(&live->making, paths[i]);
        else
            live_names_remove(&live->making, paths[i]);
    live->changed |= !begin;
    pthread_mutex_unlock(&live->lock);
    if (!all)
        return dr_fail(err, ENOMEM, "%s: out of memory", live->state);
    return begin ? live_state_save(live, err) : 0;
}

/* ------------------------------------------------------------------ what left a chain */

bool live_has_image(const struct live_disk *on, const char *path)
{
    struct dr_chain *chain = dr_disk_chain(on->disk);
    struct dr_file_id id;
    bool known = dr_name_identify(chain->images[0]->fs, path, &id, NULL) == 0, has = false;
    for (size_t i = 0; i < chain->n && !has; i++)
        has = strcmp(chain->images[i]->path, path) == 0 ||
              (known && dr_same_id(dr_image_id(chain->images[i]), id));
    dr_chain_unref(chain, NULL);
    return has;
}

void live_images_free(struct live_images *images)
{
    for (size_t i = 0; i < images->n; i++)
        free(images->all[i].path);
    free(images->all);
    *images = (struct live_images){0};
}

static bool add_image(struct live_images *images, const char *path, const char *format)
{
    struct live_image *all = realloc(images->all, (images->n + 1) * sizeof(*all));
    if (!all)
        return false;
    images->all = all;
    all[images->n] = (struct live_image){strdup(path), format};
    return all[images->n].path && ++images->n;
}

json_t *live_images_json(const struct live_images *images)
{
    json_t *list = json_array();
    for (size_t i = 0; i < images->n; i++)
        if (json_array_append_new(list, json_pack("{s:s, s:s}", "path", images->all[i].path,
                                                  "format", images->all[i].format)) < 0) {
            json_decref(list);
            return NULL;
        }
    return list;
}

static int parse_image(const json_t *object, const char *key, struct live_images *images,
                       struct dr_error *err)
{
    const char *path = json_string_value(json_object_get(object, key));
    const char *name = json_string_value(json_object_get(object, "format"));
    const struct dr_format *fmt = name ? dr_format_find(name) : NULL;
    if (path && fmt && !add_image(images, path, fmt->name))
        return dr_fail(err, ENOMEM, "out of memory for what leaves a chain");
    return 0;
}

/* A state of a server that knew no lists has the only image that goes, if any, as the target. */
int live_leaving_parse(const json_t *job, struct live_images *images, struct dr_error *err)
{
    json_t *one, *list = json_object_get(job, "leaving");
    bool retires = json_is_true(json_object_get(job, "retire"));
    size_t i;
    int r = 0;
    if (!list && !retires && json_is_true(json_object_get(job, "remove")))
        return parse_image(job, "target", images, err);
    json_array_foreach(list, i, one)
    {
        if (r == 0)
            r = parse_image(one, "path", images, err);
    }
    return r;
}

/* Which images of the chain leave it: [first, end). */
static void leaving_range(const struct live_order *o, const struct dr_chain *chain, size_t *first,
                          size_t *end)
{
    size_t top = o->top ? dr_ops_member(chain, o->top) : 0;
    *end = o->base ? dr_ops_member(chain, o->base) : chain->n;
    *first = o->kind == LIVE_STREAM ? top + 1 : top;
}

int live_note_leaving(struct live_job *job, struct dr_error *err)
{
    const struct live_order *o = &job->order;
    struct live_images leaving = {0};
    size_t first, end;
    bool all = true;
    if ((o->kind != LIVE_COMMIT && !(o->kind == LIVE_STREAM && o->remove)) || o->leaving.n > 0)
        return 0;
    struct dr_chain *chain = dr_disk_chain(job->on->disk);
    for (leaving_range(o, chain, &first, &end); all && first < end; first++)
        all = add_image(&leaving, chain->images[first]->path, chain->images[first]->fmt->name);
    dr_chain_unref(chain, NULL);
    if (!all) {
        live_images_free(&leaving);
        return dr_fail(err, ENOMEM, "out of memory for what leaves a chain");
    }
    DR_LOCK_SCOPE(&job->live->lock);
    job->order.leaving = leaving;
    return 0;
}

/* A commit empties the active image, durably, before the state names the base: what is in it now
 * was written to it since, by somebody who went on with it. */
static bool was_written_to(const struct live_job *job, struct dr_image *image)
{
    const struct live_order *o = &job->order;
    return o->kind == LIVE_COMMIT && !o->top && strcmp(image->path, o->leaving.all[0].path) == 0 &&
           !dr_ops_holds_nothing(image);
}

/* An image that left the chain still has a parent there, as its former child has now, or one that
 * leaves with it. */
static int may_have_left(void *user, struct dr_image *image, struct dr_error *err)
{
    const struct live_job *job = user;
    const struct live_images *leaving = &job->order.leaving;
    CLEANUP_FREE char *parent = NULL;
    struct dr_chain *chain = dr_disk_chain(job->on->disk);
    bool has = dr_ops_backing_path(image, NULL, &parent, NULL) == 0 &&
               dr_ops_member(chain, parent) < chain->n;
    dr_chain_unref(chain, NULL);
    for (size_t i = 0; parent && !has && i < leaving->n; i++)
        has = strcmp(parent, leaving->all[i].path) == 0;
    if (!has)
        return dr_fail(err, EEXIST, "%s: has left the chain of the disk already: its file stays",
                       image->path);
    return was_written_to(job, image)
               ? dr_fail(err, EEXIST,
                         "%s: was written to since the disk goes on without it: its file stays",
                         image->path)
               : 0;
}

int live_remove_left(const struct live_job *job, struct dr_error *err)
{
    const struct live_order *o = &job->order;
    const struct dr_open_options open = {.allow_paths = (const char *const *)job->live->allow};
    struct dr_fs *fs = job->on->disk->fs;
    int r = 0;
    for (size_t i = 0; o->remove && r == 0 && i < o->leaving.n; i++) {
        const struct live_image *image = &o->leaving.all[i];
        if (!live_has_image(job->on, image->path) && dr_fs_exists(fs, image->path))
            r = dr_ops_remove_image(fs, image->path, image->format, &open, may_have_left,
                                    (void *)(uintptr_t)job, err);
    }
    return r;
}
