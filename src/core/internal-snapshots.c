/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Snapshots inside an image. A driver does them with everything durable and nobody writing: the
 * core flushes, and locks the whole image against every change, so that no in-place writer is left
 * who looked up a place before it became the snapshot's. Readers go on. */
#include "core/internal.h"

#include "base/bytes.h"
#include "base/cleanup.h"

typedef int (*snapshot_change)(struct dr_image *image, const char *name, struct dr_error *err);

static int change_alone(struct dr_image *image, snapshot_change change, bool guest_view,
                        const char *name, struct dr_error *err)
{
    struct dr_range range;
    if (!change)
        return dr_fail(err, ENOTSUP, "%s: %s images have no snapshots inside", image->path,
                       image->fmt->name);
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    int r = dr_image_begin(image, 0, guest_view, err);
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    r = dr_image_flush_all(image, err);
    if (r == 0)
        r = change(image, name, err);
    int flushed = dr_image_flush_all(image, r < 0 ? NULL : err); /* also what was freed goes */
    dr_range_unlock(image->ranges, &range);
    return r < 0 ? r : flushed;
}

int dr_image_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err)
{
    return change_alone(image, image->fmt->snapshot_create, false, name, err);
}

int dr_image_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err)
{
    int r = change_alone(image, image->fmt->snapshot_apply, true, id, err);
    dr_noting_everything(image);
    return r;
}

int dr_image_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err)
{
    return change_alone(image, image->fmt->snapshot_delete, false, id, err);
}

int dr_image_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                           struct dr_error *err)
{
    return image->fmt->snapshot_list ? image->fmt->snapshot_list(image, each, user, err) : 0;
}

static int count_one(void *user, const struct dr_snapshot_info *info)
{
    (void)info;
    ++*(size_t *)user;
    return 0;
}

int dr_image_snapshot_count(struct dr_image *image, size_t *n, struct dr_error *err)
{
    *n = 0;
    return dr_image_snapshot_list(image, count_one, n, err);
}

/* ------------------------------------------------------------------ all views together */

int dr_image_views_begin(struct dr_image *image, struct dr_views *views, struct dr_error *err)
{
    return image->fmt->views_begin(image, views, err);
}

int dr_image_views_hole(struct dr_image *image, uint64_t off, uint64_t *len, bool *hole,
                        struct dr_error *err)
{
    uint64_t asked = *len;
    int r;
    do {
        struct dr_hold hold = {0};
        DR_LOCK_SCOPE(&image->lock);
        do {
            *len = asked;
            r = image->fmt->views_hole(image, off, len, hole, err);
        } while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, off, err)) == 0);
        dr_hold_end(&hold);
    } while (r == 1);
    return r;
}

int dr_image_views_fill(struct dr_image *image, const struct dr_views *views, const void *buf,
                        uint32_t coded_len, uint64_t off, uint64_t len, struct dr_error *err)
{
    const uint8_t *bytes = buf;
    int r = dr_image_begin(image, off, false, err);
    for (uint64_t end = off + len, n; r == 0 && off < end; off += n) {
        struct dr_range range;
        uint64_t group = dr_round_down(off, views->group);
        n = dr_min(end, group + views->group) - off;
        dr_range_lock(image->ranges, &range, group, views->group, true);
        r = image->fmt->views_fill(image, bytes, coded_len, off, n, err);
        dr_range_unlock(image->ranges, &range);
        bytes = bytes ? bytes + n : NULL;
        if (r == 0)
            r = dr_image_relieve(image, err);
    }
    return r;
}

int dr_image_views_end(struct dr_image *image, struct dr_error *err)
{
    struct dr_range range;
    if (!image->writable)
        return image->fmt->views_end(image, err);
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    int r = dr_image_flush_all(image, err); /* what was freed has lower counts */
    int ended = image->fmt->views_end(image, r == 0 ? err : NULL);
    if (r == 0 && ended == 0)
        r = dr_image_flush_all(image, err);
    dr_range_unlock(image->ranges, &range);
    return r < 0 ? r : ended;
}

/* ------------------------------------------------------------------ which one */

/* The first snapshot with this id, and the first with this name, of which one may be NULL. */
struct search {
    const char *id, *name;
    bool both; /* must be of one snapshot */
    char *by_id, *by_name;
    bool no_memory;
};

static void take_id(struct search *s, char **out, const struct dr_snapshot_info *info)
{
    if (*out)
        return;
    *out = strdup(info->id);
    s->no_memory |= !*out;
}

static int look_at(void *user, const struct dr_snapshot_info *info)
{
    struct search *s = user;
    bool id = s->id && strcmp(s->id, info->id) == 0;
    bool name = s->name && strcmp(s->name, info->name) == 0;
    if (s->both)
        id = name = id && name;
    if (id)
        take_id(s, &s->by_id, info);
    if (name)
        take_id(s, &s->by_name, info);
    return 0;
}

static int search(struct dr_image *image, struct search *s, bool ids_first, char **id,
                  struct dr_error *err)
{
    int r = dr_image_snapshot_list(image, look_at, s, err);
    char **chosen = (ids_first && s->by_id) || !s->by_name ? &s->by_id : &s->by_name;
    *id = *chosen;
    *chosen = NULL;
    free(s->by_id);
    free(s->by_name);
    if (r == 0 && *id && !s->no_memory)
        return 0;
    free(*id);
    *id = NULL;
    if (r < 0)
        return r;
    return s->no_memory ? dr_fail_errno(err, ENOMEM, "%s", image->path) : -ENOENT;
}

static int has_none(const struct dr_image *image, const char *text, struct dr_error *err)
{
    return dr_fail(err, ENOENT, "%s: has no snapshot %s inside", image->path, text);
}

int dr_image_snapshot_find(struct dr_image *image, const char *text, bool ids_first, char **id,
                           struct dr_error *err)
{
    struct search s = {.id = text, .name = text};
    int r = search(image, &s, ids_first, id, err);
    return r == -ENOENT ? has_none(image, text, err) : r;
}

/* The value of NAME=VALUE at *at, malloc'ed; *at moves behind it and a comma. NULL: it is not of
 * that name. */
static char *value_of(const char **at, const char *name)
{
    size_t len = strlen(name);
    if (strncmp(*at, name, len) != 0)
        return NULL;
    const char *value = *at + len, *end = strchrnul(value, ',');
    *at = *end ? end + 1 : end;
    return strndup(value, (size_t)(end - value));
}

static int find_shown(struct dr_image *image, const char *text, char **id, struct dr_error *err)
{
    CLEANUP_FREE char *by_id = NULL, *by_name = NULL;
    const char *at = text;
    if (strncmp(text, "snapshot.id=", 12) != 0 && strncmp(text, "snapshot.name=", 14) != 0)
        return dr_image_snapshot_find(image, text, true, id, err);
    by_id = value_of(&at, "snapshot.id=");
    by_name = value_of(&at, "snapshot.name=");
    if (!by_id)
        by_id = value_of(&at, "snapshot.id=");
    if (*at)
        return dr_fail(err, EINVAL,
                       "\"%s\" does not name a snapshot; expected an id or a name, or "
                       "snapshot.id=ID,snapshot.name=NAME",
                       text);
    struct search s = {.id = by_id, .name = by_name, .both = by_id && by_name};
    int r = search(image, &s, true, id, err);
    return r == -ENOENT ? has_none(image, text, err) : r;
}

int dr_image_snapshot_show(struct dr_image *image, const char *text, struct dr_error *err)
{
    CLEANUP_FREE char *id = NULL;
    if (!image->fmt->snapshot_show)
        return dr_fail(err, ENOTSUP, "%s: %s images have no snapshots inside that can be read",
                       image->path, image->fmt->name);
    if (image->writable)
        return dr_fail(err, EINVAL, "%s: a snapshot inside can only be read", image->path);
    int r = find_shown(image, text, &id, err);
    return r < 0 ? r : image->fmt->snapshot_show(image, id, err);
}
