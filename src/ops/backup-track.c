/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-track.h"

#include "base/bytes.h"
#include "base/cleanup.h"

/* ------------------------------------------------------------------ changes of bitmaps */

struct change {
    struct dr_bitmap_change what[3]; /* one after another, each durable before the next */
    size_t n;
};

static int change_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct change *c = user;
    int r = 0;
    (void)fresh;
    for (size_t i = 0; r == 0 && i < c->n; i++) {
        if (c->what[i].source_name)
            c->what[i].source = present->images[0];
        r = dr_image_bitmap_change(present->images[0], &c->what[i], err);
    }
    return r;
}

static struct dr_bitmap_change removal(const char *name)
{
    return (struct dr_bitmap_change){.action = DR_BITMAP_REMOVE, .name = name};
}

/* ------------------------------------------------------------------ what is there */

struct found {
    const struct dr_track *track;
    bool bitmap, next, bitmap_bad, next_bad, disabled;
    uint64_t granularity; /* of N */
};

static int look_at(void *user, const struct dr_bitmap_info *info)
{
    struct found *f = user;
    if (strcmp(info->name, f->track->bitmap) == 0) {
        f->bitmap = true;
        f->bitmap_bad = info->inconsistent || !info->enabled;
        f->disabled = !info->inconsistent;
    } else if (strcmp(info->name, f->track->next) == 0) {
        f->next = true;
        f->next_bad = info->inconsistent;
        f->granularity = info->granularity;
    }
    return 0;
}

/* Inconsistent is what a bitmap is while its image is written to, too: first it is stored. */
static int look_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                     struct dr_error *err)
{
    struct found *f = user;
    struct dr_image *image = present->images[0];
    (void)fresh;
    if (!image->fmt->bitmap_list)
        return dr_fail(err, ENOTSUP, "%s: %s images have no bitmaps inside: back it up in full",
                       image->path, image->fmt->name);
    int r = dr_image_settle(image, err);
    return r < 0 ? r : image->fmt->bitmap_list(image, look_at, f, err);
}

/* B is added with what N has, and then N is dropped. */
static struct change rename_next(const struct dr_track *t, uint64_t granularity)
{
    return (struct change){.what = {{.action = DR_BITMAP_ADD,
                                     .name = t->bitmap,
                                     .granularity = granularity,
                                     .source_name = t->next},
                                    removal(t->next)},
                           .n = 2};
}

static int settle_leftovers(struct dr_track *t, struct found *f, struct dr_error *err)
{
    struct change c = {.what = {removal(t->next)}, .n = 1};
    if (!f->next)
        return 0;
    if (!f->bitmap && !f->next_bad) {
        c = rename_next(t, f->granularity);
        f->bitmap = true;
    }
    return dr_disk_quiesce(t->disk, change_step, &c, NULL, err);
}

int dr_track_begin(struct dr_track *t, bool anew, bool *there, struct dr_error *err)
{
    struct found f = {.track = t};
    *there = false;
    if (asprintf(&t->next, "%s~new", t->bitmap) < 0)
        t->next = NULL;
    if (!t->next)
        return dr_fail(err, ENOMEM, "out of memory for a backup");
    int r = dr_disk_quiesce(t->disk, look_step, &f, NULL, err);
    if (r == 0 && f.bitmap_bad && !anew)
        r = dr_fail(
            err, EUCLEAN,
            "%s: its bitmap \"%s\" does not tell all that has changed: %s; back it up in full "
            "(--full), which begins the bitmap anew",
            dr_image_path(t->disk, 0), t->bitmap,
            f.disabled ? "it is disabled" : "a program that wrote to the disk did not store it");
    if (r == 0)
        r = settle_leftovers(t, &f, err);
    t->had = f.bitmap;
    t->unusable = f.bitmap_bad;
    *there = r == 0 && f.bitmap && !f.bitmap_bad;
    return r;
}

/* ------------------------------------------------------------------ the instant */

int dr_changed_add(struct dr_changed *c, uint64_t off, uint64_t len)
{
    uint64_t end = off + len, last;
    if (c->n > 0 && (last = c->list[c->n - 1].off + c->list[c->n - 1].len) >= off) {
        c->list[c->n - 1].len += dr_max(end, last) - last;
        return 0;
    }
    if (c->n == c->room) {
        size_t room = c->room ? c->room * 2 : 64;
        void *more = realloc(c->list, room * sizeof(*c->list));
        if (!more)
            return -ENOMEM;
        c->list = more;
        c->room = room;
    }
    c->list[c->n].off = off;
    c->list[c->n++].len = len;
    return 0;
}

static int add_range(void *user, uint64_t off, uint64_t len)
{
    return dr_changed_add(user, off, len);
}

void dr_changed_free(struct dr_changed *c)
{
    free(c->list);
    *c = (struct dr_changed){0};
}

/* Which granularity B has, for N to have the same. */
static int granularity_of(struct dr_track *t, struct dr_image *image, uint64_t *granularity,
                          struct dr_error *err)
{
    struct dr_track swapped = {.bitmap = "", .next = (char *)(uintptr_t)t->bitmap};
    struct found f = {.track = &swapped};
    int r = image->fmt->bitmap_list(image, look_at, &f, err);
    *granularity = f.granularity;
    return r;
}

int dr_track_now(struct dr_track *t, struct dr_chain *present, struct dr_changed *changed,
                 struct dr_error *err)
{
    struct dr_image *image = present->images[0];
    struct dr_bitmap_change add = {.action = DR_BITMAP_ADD, .name = t->next};
    struct dr_error why = DR_ERROR_INIT;
    int r = t->had ? granularity_of(t, image, &add.granularity, err) : 0;
    if (r == 0 && changed) {
        r = dr_image_settle(image, err);
        if (r == 0)
            r = image->fmt->bitmap_read(image, t->bitmap, add_range, changed, &why);
        if (r < 0)
            r = dr_fail(err, -r, "%s", why.errnum ? why.text : "out of memory for a backup");
    }
    if (r == 0)
        r = dr_image_bitmap_change(image, &add, err);
    t->added = r == 0;
    return r;
}

/* ------------------------------------------------------------------ afterwards */

int dr_track_hand_on(struct dr_track *t, struct dr_error *err)
{
    struct found f = {.track = t};
    struct change drop = {.what = {removal(t->bitmap)}, .n = 1};
    int r = dr_disk_quiesce(t->disk, look_step, &f, NULL, err);
    if (r == 0 && f.bitmap)
        r = dr_disk_quiesce(t->disk, change_step, &drop, NULL, err);
    if (r == 0) {
        struct change rename = rename_next(t, f.granularity);
        r = dr_disk_quiesce(t->disk, change_step, &rename, NULL, err);
    }
    t->added = false; /* whatever is left now is the next backup's to finish */
    return r;
}

void dr_track_give_up(struct dr_track *t)
{
    struct change drop = {.what = {removal(t->next)}, .n = 1};
    if (t->added)
        dr_disk_quiesce(t->disk, change_step, &drop, NULL, NULL);
    t->added = false;
}

void dr_track_end(struct dr_track *t)
{
    free(t->next);
    *t = (struct dr_track){0};
}
