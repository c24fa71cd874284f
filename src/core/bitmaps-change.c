/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changes of bitmaps: inside an image by its driver, beside it here.
 *
 * A change of the file beside an image makes another list of bitmaps from the present one. While
 * the image is at rest, the list is loaded, changed and stored. While it is written to, the list in
 * memory changes under the lock of all its units, for which writers wait as long as that takes;
 * then the file is written, beside them: it says that the bitmaps are in use, before and
 * afterwards, and what it holds of their bits is relied on by nobody. */
#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/bitmaps-internal.h"

#define DEFAULT_GRANULARITY UINT64_C(65536)
#define MAX_GRANULARITY     (UINT64_C(1) << DR_BITMAP_FILE_MAX_BITS)

/* ------------------------------------------------------------------ changing */

/* The list of bitmaps as it is to be: a copy of the present one with one change. */
struct edit {
    struct dr_image *image;
    struct dr_bitmap_file *b;
    const struct dr_bitmap_change *c;
    const struct dr_marks *source; /* bits that the bitmap gets, or NULL */
    struct dr_noted *list;
    uint32_t n;
    struct dr_noted made; /* what the new list alone has ... */
    struct dr_noted gone; /* ... and the old one alone */
};

static int edit_add(struct edit *e, struct dr_error *err)
{
    const struct dr_bitmap_change *c = e->c;
    uint64_t granularity = c->granularity ? c->granularity : DEFAULT_GRANULARITY, bytes = 0;
    if (c->source_name) /* of an image that keeps coarser ones */
        granularity = dr_min(granularity, MAX_GRANULARITY);
    if (!*c->name)
        return dr_fail(err, EINVAL, "Bitmap name cannot be empty");
    if (granularity < 512 || granularity > MAX_GRANULARITY || granularity & (granularity - 1))
        return dr_fail(err, EINVAL,
                       "Granularity must be power of 2 and at least 512, and beside a %s image at "
                       "most 2 MiB",
                       e->image->fmt->name);
    if (strlen(c->name) > DR_BITMAP_FILE_NAME)
        return dr_fail(err, EINVAL, "Bitmap name too long: %s", c->name);
    if (dr_bitmap_file_find(e->b, c->name))
        return dr_fail(err, EEXIST, "Bitmap already exists: %s", c->name);
    if (e->b->n >= DR_BITMAP_FILE_MAX)
        return dr_fail(err, EINVAL, "%s: has %u bitmaps already, the most there can be",
                       e->image->path, e->b->n);
    unsigned bits = (unsigned)__builtin_ctzll(granularity);
    for (uint32_t i = 0; i < e->b->n; i++)
        bytes += dr_bitmaps_bytes(e->image->size, e->b->list[i].set->bits);
    int r = dr_bitmaps_check_bytes(e->image, bytes + dr_bitmaps_bytes(e->image->size, bits), err);
    if (r < 0)
        return r;
    e->made.name = strdup(c->name);
    e->made.set = dr_noted_set(bits, e->image->size);
    if (!e->made.name || !e->made.set)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (e->source)
        dr_marks_each(e->source, e->image->size, dr_bitmaps_set_range, e->made.set);
    e->list[e->n] = e->made;
    e->list[e->n++].enabled = !c->disabled;
    return 0;
}

/* One of the list gets other bits: those of old, or none, and those of the source. */
static int edit_bits(struct edit *e, struct dr_noted *one, bool keep, struct dr_error *err)
{
    e->made.set = dr_noted_set(one->set->bits, e->image->size);
    if (!e->made.set)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (keep)
        dr_marks_each(one->set, e->image->size, dr_bitmaps_set_range, e->made.set);
    if (e->source)
        dr_marks_each(e->source, e->image->size, dr_bitmaps_set_range, e->made.set);
    e->gone.set = one->set;
    one->set = e->made.set;
    return 0;
}

static int edit_list(struct edit *e, struct dr_error *err)
{
    const struct dr_bitmap_change *c = e->c;
    e->n = e->b->n;
    e->list = calloc(e->n + 1, sizeof(*e->list));
    if (!e->list)
        return dr_fail_errno(err, ENOMEM, "%s", e->image->path);
    if (e->n)
        memcpy(e->list, e->b->list, e->n * sizeof(*e->list));
    if (c->action == DR_BITMAP_ADD)
        return edit_add(e, err);
    const struct dr_noted *old = dr_bitmap_file_find(e->b, c->name);
    if (!old)
        return dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", c->name);
    struct dr_noted *one = &e->list[old - e->b->list];
    if (c->action == DR_BITMAP_REMOVE) {
        e->gone = *one;
        memmove(one, one + 1, (size_t)(e->list + --e->n - one) * sizeof(*one));
        return 0;
    }
    bool rebuilt = c->action == DR_BITMAP_CLEAR && c->ranges;
    if (one->distrust != DR_TRUSTED && !rebuilt)
        return dr_bitmaps_unusable(c->name, err);
    one->distrust = DR_TRUSTED;
    if (c->action == DR_BITMAP_CLEAR || c->action == DR_BITMAP_MERGE)
        return edit_bits(e, one, c->action == DR_BITMAP_MERGE, err);
    one->enabled = c->action == DR_BITMAP_ENABLE;
    return 0;
}

/* Without bitmaps there is no file. */
static int remove_file(struct dr_image *image, struct dr_bitmap_file *b, struct dr_error *err)
{
    struct dr_fs *fs = image->fs;
    int r = b->generation ? fs->ops->unlink(fs, b->path, err) : 0;
    if (r == 0 && !(image->flags & DR_OPEN_NO_FLUSH))
        r = fs->ops->sync_dir(fs, b->path, err);
    return r;
}

/* The list takes the place of the present one in memory, which e->list is from now on. */
static void swap_lists(struct edit *e)
{
    struct dr_bitmap_file *b = e->b;
    struct dr_noted *list = b->list;
    uint32_t n = b->n;
    b->list = e->list;
    b->n = e->n;
    b->disk = e->image->size;
    e->list = list;
    e->n = n;
}

static int store(struct edit *e, bool live, struct dr_error *err)
{
    struct dr_bitmap_file *b = e->b;
    if (!b->n)
        return remove_file(e->image, b, err);
    return live ? dr_bitmap_file_store(b, true, e->image->files[0], err)
                : dr_bitmaps_store_clean(e->image, b, err);
}

/* The new list is there for good, or it was given up: free what belongs to the other one alone. */
static void edit_end(struct edit *e, bool done)
{
    struct dr_noted *other = done ? &e->gone : &e->made;
    free(e->list);
    free(other->name);
    dr_noted_set_free(other->set);
}

/* The image is not being written to: the bitmaps that are trusted stay so, whenever this is
 * interrupted. After a failure the file may have either list. */
static int change_at_rest(struct dr_image *image, struct edit *e, struct dr_error *err)
{
    struct dr_bitmap_file b;
    int r = dr_bitmaps_load(image, &b, err);
    e->b = &b;
    if (r == 0 || r == -ENOENT)
        r = edit_list(e, err);
    if (r == 0) {
        swap_lists(e);
        r = store(e, false, err);
        if (r < 0)
            swap_lists(e);
    }
    edit_end(e, r == 0);
    e->b = NULL;
    dr_bitmap_file_free(&b);
    return r;
}

/* ------------------------------------------------------------------ while it is written to */

/* The image is written to, and there were no bitmaps when that began: load what came since. */
static int note_from_now(struct dr_image *image, struct dr_noting **fresh, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    *fresh = NULL;
    if (!image->noting_begun || image->noting)
        return 0;
    struct dr_noting *n = dr_noting_new();
    if (!n)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_bitmaps_load(image, &n->file, err);
    if (r < 0 && r != -ENOENT) {
        dr_noting_free(n);
        return r;
    }
    dr_bitmaps_distrust(&n->file, DR_FOREIGN);
    *fresh = n;
    return 0;
}

/* In memory, with every writer kept out. What was noted so far goes into the bitmaps first, and
 * what changes afterwards into those that there are then. */
static int change_in_memory(struct dr_image *image, struct edit *e, struct dr_error *err)
{
    struct dr_noting *n = image->noting;
    dr_noting_put(image, n);
    e->b = &n->file;
    int r = edit_list(e, err);
    if (r < 0)
        return r;
    swap_lists(e);
    dr_noting_marks(n, image->size, e->list, e->n); /* those of before may come back */
    return 0;
}

/* The file could not be written: in memory there are the bitmaps of before, with every writer kept
 * out. They get what was noted meanwhile. */
static void change_back(struct dr_image *image, struct edit *e)
{
    struct dr_range range;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    pthread_mutex_lock(&image->begin_lock);
    swap_lists(e);
    dr_noting_put(image, image->noting);
    pthread_mutex_unlock(&image->begin_lock);
    dr_range_unlock(image->ranges, &range);
}

/* Writers wait for what happens in memory, and not for the file. */
static int change_live(struct dr_image *image, struct edit *e, struct dr_range *range,
                       struct dr_error *err)
{
    int r = change_in_memory(image, e, err);
    bool swapped = r == 0;
    dr_range_unlock(image->ranges, range);
    if (r == 0)
        r = store(e, true, err);
    if (r == 0 && !e->b->n) { /* there is no file any more */
        e->b->generation = 0;
        e->b->in_use = false;
    }
    pthread_mutex_unlock(&image->begin_lock);
    if (swapped && r < 0)
        change_back(image, e);
    edit_end(e, r == 0);
    return r;
}

/* The source's bits, before the lock of the image is taken: it may be the other way round in
 * another thread. */
static int read_source(struct dr_image *image, const struct dr_bitmap_change *c,
                       struct dr_marks **set, struct dr_error *err)
{
    if (c->source->size != image->size)
        return dr_fail(err, EINVAL,
                       "Bitmaps are of different sizes (destination size is %llu, source size is "
                       "%llu) and can't be merged",
                       (unsigned long long)image->size, (unsigned long long)c->source->size);
    *set = dr_noted_set(DR_BITMAP_FILE_MIN_BITS, image->size);
    if (!*set)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return dr_image_bitmap_read(c->source, c->source_name, dr_bitmaps_set_range, *set, err);
}

/* 1: it is not there, or not to be trusted. */
static int copy_bits(struct dr_image *image, const struct dr_bitmap_file *b, const char *name,
                     struct dr_marks **set, struct dr_error *err)
{
    const struct dr_noted *one = dr_bitmap_file_find(b, name);
    if (!one || one->distrust != DR_TRUSTED)
        return 1;
    *set = dr_noted_set(one->set->bits, image->size);
    if (!*set)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return dr_marks_each(one->set, image->size, dr_bitmaps_set_range, *set);
}

/* A bitmap of the image itself that is to be merged: what is noted for it by now, too. One look
 * under the lock: the first write may begin at any moment. 1: dr_image_bitmap_read() says why not.
 */
static int read_own_source(struct dr_image *image, const struct dr_bitmap_change *c,
                           struct dr_marks **set, struct dr_error *err)
{
    DR_LOCK_SCOPE(&image->begin_lock);
    struct dr_noting *n = image->noting;
    struct dr_bitmap_file stored = {0};
    if (n)
        dr_noting_put(image, n);
    int r = n ? 0 : dr_bitmaps_load(image, &stored, NULL);
    r = r < 0 ? 1 : copy_bits(image, n ? &n->file : &stored, c->source_name, set, err);
    dr_bitmap_file_free(&stored);
    return r;
}

/* Changes of bitmaps wait for one another; the caller has claimed the disk. */
static int change_now(struct dr_image *image, struct edit *e, struct dr_error *err)
{
    struct dr_noting *fresh;
    struct dr_range range;
    int r = note_from_now(image, &fresh, err);
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    pthread_mutex_lock(&image->begin_lock);
    if (!image->noting && image->noting_begun)
        image->noting = DR_STEAL(fresh);
    dr_noting_free(fresh);
    if (image->noting)
        return change_live(image, e, &range, err);
    dr_range_unlock(image->ranges, &range); /* the first write waits for begin_lock */
    r = change_at_rest(image, e, err);
    pthread_mutex_unlock(&image->begin_lock);
    return r;
}

static int change_beside(struct dr_image *image, const struct dr_bitmap_change *c,
                         struct dr_error *err)
{
    struct dr_marks *read = NULL;
    struct edit e = {.image = image, .c = c, .source = c->ranges};
    bool merges = c->source_name && (c->action == DR_BITMAP_ADD || c->action == DR_BITMAP_MERGE);
    int r = merges && c->source == image ? read_own_source(image, c, &read, err) : 1;
    if (r == 1)
        r = merges ? read_source(image, c, &read, err) : 0;
    if (read)
        e.source = read;
    if (r == 0)
        r = change_now(image, &e, err);
    dr_noted_set_free(read);
    return r;
}

/* With every writer kept out, and all durable before and afterwards. */
static int change_inside(struct dr_image *image, const struct dr_bitmap_change *c,
                         struct dr_error *err)
{
    struct dr_range range;
    int r = dr_image_begin(image, 0, false, err);
    if (r < 0)
        return r;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    r = dr_image_flush_all(image, err);
    if (r == 0) {
        r = image->fmt->bitmap_change(image, c, err);
        if (r < 0) /* perhaps nothing is noted any more: the next change of the view begins anew */
            atomic_fetch_and(&image->begun, ~(unsigned)DR_BEGUN_CHANGES);
    }
    int flushed = dr_image_flush_all(image, r < 0 ? NULL : err);
    dr_range_unlock(image->ranges, &range);
    return r < 0 ? r : flushed;
}

void dr_image_quietly(struct dr_image *image, void (*step)(void *user), void *user)
{
    struct dr_range range;
    dr_range_lock(image->ranges, &range, 0, UINT64_MAX, true);
    pthread_mutex_lock(&image->begin_lock);
    step(user);
    pthread_mutex_unlock(&image->begin_lock);
    dr_range_unlock(image->ranges, &range);
}

static int check_place(struct dr_image *image, const struct dr_bitmap_change *change,
                       struct dr_error *err)
{
    if (!dr_image_bitmaps_inside(image) && (change->inside || dr_bitmaps_no_place(image)))
        return dr_fail(err, ENOTSUP, "Can't store persistent bitmaps to %s: %s", image->path,
                       strerror(ENOTSUP));
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    return 0;
}

int dr_image_bitmap_change(struct dr_image *image, const struct dr_bitmap_change *change,
                           struct dr_error *err)
{
    int r = check_place(image, change, err);
    if (r < 0)
        return r;
    return dr_image_bitmaps_inside(image) ? change_inside(image, change, err)
                                          : change_beside(image, change, err);
}

int dr_image_bitmap_change_live(struct dr_image *image, const struct dr_bitmap_change *change,
                                struct dr_error *err)
{
    int r = check_place(image, change, err);
    if (r < 0)
        return r;
    if (!dr_image_bitmaps_inside(image))
        return change_beside(image, change, err);
    bool changing = atomic_load(&image->begun) & DR_BEGUN_CHANGES;
    return changing && image->fmt->bitmap_change_live
               ? image->fmt->bitmap_change_live(image, change, err)
               : 1;
}

/* ------------------------------------------------------------------ rebuilding */

struct search {
    const char *name;
    uint64_t granularity;
    bool enabled, found;
};

static int find_one(void *user, const struct dr_bitmap_info *info)
{
    struct search *s = user;
    if (strcmp(info->name, s->name) == 0) {
        s->granularity = info->granularity;
        s->enabled = info->enabled;
        s->found = true;
    }
    return 0;
}

int dr_image_bitmap_rebuild(struct dr_image *image, const char *name, const struct dr_marks *ranges,
                            struct dr_error *err)
{
    struct search s = {.name = name};
    struct dr_bitmap_change c = {.action = DR_BITMAP_CLEAR, .name = name, .ranges = ranges};
    if (!dr_image_bitmaps_inside(image))
        return dr_image_bitmap_change(image, &c, err);
    int r = dr_image_bitmap_list(image, find_one, &s, err);
    if (r == 0 && !s.found)
        r = dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
    c.action = DR_BITMAP_REMOVE;
    if (r == 0)
        r = dr_image_bitmap_change(image, &c, err);
    c.action = DR_BITMAP_ADD;
    c.granularity = s.granularity;
    c.disabled = !s.enabled;
    return r < 0 ? r : dr_image_bitmap_change(image, &c, err);
}
