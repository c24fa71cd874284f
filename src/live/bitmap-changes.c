/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Carrying out changes of bitmaps that were read and found possible (qmp-bitmaps.c): alone, beside
 * the guest where that goes; or at one instant with others, while the requests of all their disks
 * wait. The latter can be undone, as long as these wait. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

void live_change_free(struct live_change *c)
{
    for (size_t i = 0; i < c->n_sources; i++)
        free(c->sources[i].image);
    free(c->sources);
    free(c->image);
    if (c->saved)
        dr_marks_free(&c->before);
    *c = (struct live_change){0};
}

/* ------------------------------------------------------------------ reading */

int live_read_stored(struct dr_image *image, const char *name, struct dr_marks *into,
                     struct dr_error *err)
{
    bool enabled;
    int r = dr_image_bitmap_stored(image, name, into, &enabled, err);
    if (r == 0 && enabled)
        dr_image_bitmap_noted(image, into);
    return r;
}

static struct dr_image *image_in(const struct dr_chain *chain, const char *path)
{
    size_t k = dr_ops_member(chain, path);
    return k < chain->n ? chain->images[k] : NULL;
}

static int read_bitmap(const struct live_disk *on, const struct dr_chain *chain, const char *path,
                       const char *name, bool stored, struct dr_marks *into, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    bool enabled;
    struct dr_image *image = image_in(chain, path);
    int r = !stored ? dr_memory_bitmap_read(on->bitmaps, path, name, into, &enabled)
            : image ? live_read_stored(image, name, into, &why)
                    : -ENOENT;
    return r < 0 ? dr_fail(err, -r, "%s", why.errnum ? why.text : "the bitmap could not be read")
                 : 0;
}

static int make_marks(struct dr_marks *marks, const struct live_change *c, uint64_t size,
                      struct dr_error *err)
{
    dr_marks_init(marks, (unsigned)__builtin_ctzll(c->granularity));
    return dr_marks_cover(marks, size) < 0
               ? dr_fail(err, ENOMEM, "out of memory for bitmap '%s'", c->name)
               : 0;
}

/* ------------------------------------------------------------------ alone */

static int add_now(const struct live_change *c, struct dr_error *err)
{
    const struct dr_bitmap_options o = {.granularity = c->granularity, .disabled = c->disabled};
    return c->stored ? dr_disk_bitmap_change(c->on->disk, c->name, DR_BITMAP_ADD, &o, err)
                     : dr_memory_bitmap_add(c->on->bitmaps, c->image, c->name, c->granularity,
                                            !c->disabled, err);
}

static int merge_into(const struct live_change *c, const struct dr_marks *marks,
                      struct dr_error *err)
{
    struct dr_disk *disk = c->on->disk;
    struct dr_bitmap_change change = {.action = DR_BITMAP_MERGE, .name = c->name, .ranges = marks};
    if (!c->stored)
        return dr_memory_bitmap_change(c->on->bitmaps, c->image, c->name, DR_BITMAP_MERGE, marks,
                                       err);
    int r = dr_disk_borrow(disk, "bitmap", err);
    if (r < 0)
        return r;
    r = dr_ops_bitmap_change(disk, &change, err);
    dr_disk_unborrow(disk);
    return r;
}

/* All or nothing: what the sources have is gathered first. */
static int merge_now(const struct live_change *c, struct dr_error *err)
{
    struct dr_marks marks;
    int r = make_marks(&marks, c, dr_size(c->on->disk), err);
    for (size_t i = 0; r == 0 && i < c->n_sources; i++) {
        const struct live_source *s = &c->sources[i];
        struct dr_pass pass;
        const struct dr_chain *chain = dr_disk_enter(s->on->disk, &pass);
        r = read_bitmap(s->on, chain, s->image, s->name, s->stored, &marks, err);
        dr_disk_leave(s->on->disk, &pass);
    }
    if (r == 0)
        r = merge_into(c, &marks, err);
    dr_marks_free(&marks);
    return r;
}

int live_change_now(const struct live_change *c, struct dr_error *err)
{
    if (c->action == DR_BITMAP_ADD)
        return add_now(c, err);
    if (c->action == DR_BITMAP_MERGE)
        return merge_now(c, err);
    if (c->stored)
        return dr_disk_bitmap_change(c->on->disk, c->name, c->action, NULL, err);
    return dr_memory_bitmap_change(c->on->bitmaps, c->image, c->name, c->action, NULL, err);
}

/* ------------------------------------------------------------------ at one instant */

static const struct dr_chain *chain_of(const struct live_moment *m, const struct live_disk *on)
{
    for (size_t i = 0; i < m->n; i++)
        if (m->all[i].on == on)
            return m->all[i].chain;
    return NULL;
}

/* ranges: as in struct dr_bitmap_change. */
static int act(const struct live_change *c, const struct live_moment *m,
               enum dr_bitmap_action action, bool disabled, const struct dr_marks *ranges,
               struct dr_error *err)
{
    struct dr_memory_bitmaps *set = c->on->bitmaps;
    struct dr_image *image = image_in(chain_of(m, c->on), c->image);
    if (c->stored && image) {
        const struct dr_bitmap_change change = {.action = action,
                                                .name = c->name,
                                                .granularity = c->granularity,
                                                .disabled = disabled,
                                                .source = image,
                                                .ranges = ranges};
        return dr_image_bitmap_change(image, &change, err);
    }
    if (c->stored)
        return dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", c->name);
    if (action == DR_BITMAP_ADD)
        return dr_memory_bitmap_add_quiet(set, c->image, c->name, c->granularity, !disabled, err);
    return dr_memory_bitmap_change_quiet(set, c->image, c->name, action, ranges, err);
}

/* What the bitmap is now. */
static int save(struct live_change *c, const struct live_moment *m, struct dr_error *err)
{
    const struct dr_chain *chain = chain_of(m, c->on);
    int r = make_marks(&c->before, c, chain->images[0]->size, err);
    c->saved = true;
    return r < 0 ? r : read_bitmap(c->on, chain, c->image, c->name, c->stored, &c->before, err);
}

static int merge_quiet(struct live_change *c, const struct live_moment *m, struct dr_error *err)
{
    struct dr_marks marks;
    int r = make_marks(&marks, c, chain_of(m, c->on)->images[0]->size, err);
    for (size_t i = 0; r == 0 && i < c->n_sources; i++) {
        const struct live_source *s = &c->sources[i];
        r = read_bitmap(s->on, chain_of(m, s->on), s->image, s->name, s->stored, &marks, err);
    }
    if (r == 0)
        r = act(c, m, DR_BITMAP_MERGE, false, &marks, err);
    dr_marks_free(&marks);
    return r;
}

int live_change_quiet(struct live_change *c, const struct live_moment *m, struct dr_error *err)
{
    bool loses = c->action != DR_BITMAP_ADD && c->action != DR_BITMAP_ENABLE &&
                 c->action != DR_BITMAP_DISABLE;
    bool broken = c->action == DR_BITMAP_REMOVE; /* it may be inconsistent, and go all the same */
    int r = loses ? save(c, m, broken ? NULL : err) : 0;
    c->readable = r == 0;
    if (r < 0 && !broken)
        return r;
    r = c->action == DR_BITMAP_MERGE ? merge_quiet(c, m, err)
                                     : act(c, m, c->action, c->disabled, NULL, err);
    c->done = r == 0;
    return r;
}

static int undo(const struct live_change *c, const struct live_moment *m, struct dr_error *err)
{
    switch (c->action) {
    case DR_BITMAP_ADD:
        return act(c, m, DR_BITMAP_REMOVE, false, NULL, err);
    case DR_BITMAP_ENABLE:
        return c->was_enabled ? 0 : act(c, m, DR_BITMAP_DISABLE, false, NULL, err);
    case DR_BITMAP_DISABLE:
        return c->was_enabled ? act(c, m, DR_BITMAP_ENABLE, false, NULL, err) : 0;
    case DR_BITMAP_REMOVE:
        return c->readable ? act(c, m, DR_BITMAP_ADD, !c->was_enabled, &c->before, err)
                           : dr_fail(err, EUCLEAN, "it was inconsistent");
    default:
        return act(c, m, DR_BITMAP_CLEAR, false, &c->before, err);
    }
}

int live_change_undo(struct live_change *c, const struct live_moment *m, struct dr_error *err)
{
    bool done = c->done;
    c->done = false;
    return done ? undo(c, m, err) : 0;
}
