/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-track.h"

#include <stdio.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/random.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ changes of bitmaps */

static int remove_bitmap(struct dr_track *t, const char *name, struct dr_error *err)
{
    struct dr_bitmap_change change = {.action = DR_BITMAP_REMOVE, .name = name};
    return dr_ops_bitmap_change(t->disk, &change, err);
}

/* ------------------------------------------------------------------ what is there */

#define NOT_STORED "a program that wrote to the disk did not store it"

/* Here it counts as inconsistent only where it lacks changes. */
static bool lacks_changes(const struct dr_bitmap_info *info)
{
    return info->inconsistent && !info->noting;
}

struct found {
    struct dr_track *track;
    const char *distrust; /* NULL, or why the bitmap of the last backup does not tell all */
    bool inconsistent;    /* that is why */
    char *left;           /* one that is left over, malloc'ed */
};

static int look_at(void *user, const struct dr_bitmap_info *info)
{
    struct found *f = user;
    struct dr_track *t = f->track;
    if (t->last && strcmp(info->name, t->last) == 0) {
        t->had = true;
        t->granularity = info->granularity;
        f->inconsistent = lacks_changes(info);
        f->distrust = f->inconsistent ? info->distrust ? info->distrust : NOT_STORED
                      : info->enabled ? NULL
                                      : "it is disabled";
    } else if (strncmp(info->name, t->prefix, strlen(t->prefix)) == 0 && !f->left) {
        f->left = strdup(info->name);
        return f->left ? 0 : -ENOMEM;
    } else if (strcmp(info->name, t->name) == 0 && !t->had) {
        t->granularity = info->granularity;
    }
    return 0;
}

static int look_once(struct found *f, struct dr_image *image, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_image_bitmap_list(image, look_at, f, &why);
    if (r == -ENOTSUP)
        return dr_fail(err, ENOTSUP, "%s; back it up without one", why.text);
    return r < 0 ? dr_fail(err, -r, "%s", why.errnum ? why.text : "out of memory for a backup") : 0;
}

/* One look for each bitmap that is left over: there is mostly none. */
static int look(struct found *f, struct dr_error *err)
{
    struct dr_chain *chain = dr_disk_chain(f->track->disk);
    int r;
    do {
        free(DR_STEAL(f->left));
        r = look_once(f, chain->images[0], err);
        if (r == 0 && f->left)
            r = remove_bitmap(f->track, f->left, err);
    } while (r == 0 && f->left);
    free(f->left);
    int closed = dr_chain_unref(chain, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

static int choose_names(struct dr_track *t, const char *set, struct dr_error *err)
{
    uint64_t place = XXH3_64bits(set, strlen(set));
    if (asprintf(&t->prefix, "%s@%08x.", t->name, (unsigned)place) < 0)
        t->prefix = NULL;
    if (!t->prefix || asprintf(&t->next, "%s%08x", t->prefix, dr_random32()) < 0)
        t->next = NULL;
    return t->next ? 0 : dr_fail(err, ENOMEM, "out of memory for a backup");
}

int dr_track_begin(struct dr_track *t, const char *set, bool anew, bool *there,
                   struct dr_error *err)
{
    struct found f = {.track = t};
    *there = false;
    int r = choose_names(t, set, err);
    if (r == 0)
        r = look(&f, err);
    if (r < 0)
        return r;
    if (t->had && f.distrust && !anew)
        return dr_fail(err, EUCLEAN,
                       "%s: its bitmap \"%s\" does not tell all that has changed: %s; back it up "
                       "in full (--full), which begins a new one%s",
                       dr_image_path(t->disk, 0), t->last, f.distrust,
                       f.inconsistent ? ", or compare the disk with its last backup "
                                        "(drover bitmap --rebuild)"
                                      : "");
    *there = t->had && !f.distrust;
    return 0;
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

void dr_changed_free(struct dr_changed *c)
{
    free(c->list);
    *c = (struct dr_changed){0};
}

static int add_range(void *user, uint64_t off, uint64_t len)
{
    return dr_changed_add(user, off, len);
}

/* What `last` has of the time before now is in its image or beside it, and does not change. */
static int read_last(struct dr_track *t, struct dr_image *image, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    bool enabled;
    dr_marks_init(&t->marks, (unsigned)__builtin_ctzll(t->granularity));
    t->reads_last = true;
    int r = dr_marks_cover(&t->marks, image->size);
    if (r == 0)
        r = dr_image_bitmap_stored(image, t->last, &t->marks, &enabled, &why);
    return r < 0 ? dr_fail(err, -r, "%s", why.errnum ? why.text : "out of memory for a backup") : 0;
}

int dr_track_prepare(struct dr_track *t, bool incremental, struct dr_error *err)
{
    struct dr_bitmap_change add = {
        .action = DR_BITMAP_ADD, .name = t->next, .granularity = t->granularity};
    int r = dr_ops_bitmap_change(t->disk, &add, err);
    t->added = r == 0;
    if (r < 0 || !incremental)
        return r;
    struct dr_chain *chain = dr_disk_chain(t->disk);
    r = read_last(t, chain->images[0], err);
    int closed = dr_chain_unref(chain, r == 0 ? err : NULL);
    return r < 0 ? r : closed;
}

int dr_track_now(struct dr_track *t, struct dr_chain *present, struct dr_changed *changed,
                 struct dr_error *err)
{
    struct dr_image *image = present->images[0];
    dr_image_bitmap_noted(image, &t->marks);
    int r = dr_marks_each(&t->marks, image->size, add_range, changed);
    return r < 0 ? dr_fail(err, -r, "out of memory for a backup") : 0;
}

/* ------------------------------------------------------------------ afterwards */

int dr_track_hand_on(struct dr_track *t, struct dr_error *err)
{
    t->added = false; /* it is the set's from now on */
    return t->had ? remove_bitmap(t, t->last, err) : 0;
}

void dr_track_keep(struct dr_track *t)
{
    t->added = false;
}

void dr_track_give_up(struct dr_track *t)
{
    if (t->added)
        remove_bitmap(t, t->next, NULL);
    t->added = false;
}

void dr_track_end(struct dr_track *t)
{
    free(t->prefix);
    free(t->next);
    if (t->reads_last)
        dr_marks_free(&t->marks);
    *t = (struct dr_track){0};
}
