/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/memory-bitmaps.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/core.h"
#include "ops/ops-internal.h"

struct bitmap {
    struct bitmap *next;
    char *name, *image;
    bool enabled;
    _Atomic bool missed; /* its image may have changed while another one was the active one */
    uint64_t covered;    /* bytes of the disk that marks has room for */
    struct dr_marks marks;
};

struct dr_memory_bitmaps {
    struct dr_disk *disk;
    struct bitmap *list; /* the newest first */
    bool hooked;
};

struct dr_memory_bitmaps *dr_memory_bitmaps_new(struct dr_disk *disk)
{
    struct dr_memory_bitmaps *set = calloc(1, sizeof(*set));
    if (set)
        set->disk = disk;
    return set;
}

static void free_bitmap(struct bitmap *b)
{
    if (!b)
        return;
    free(b->name);
    free(b->image);
    dr_marks_free(&b->marks);
    free(b);
}

void dr_memory_bitmaps_free(struct dr_memory_bitmaps *set)
{
    if (!set)
        return;
    if (set->hooked)
        dr_disk_unhook(set->disk, set);
    for (struct bitmap *b = set->list, *next; b; b = next) {
        next = b->next;
        free_bitmap(b);
    }
    free(set);
}

static struct bitmap **find(struct dr_memory_bitmaps *set, const char *image, const char *name)
{
    struct bitmap **at = &set->list;
    while (*at && (strcmp((*at)->name, name) != 0 || strcmp((*at)->image, image) != 0))
        at = &(*at)->next;
    return at;
}

static const struct bitmap *look_up(const struct dr_memory_bitmaps *set, const char *image,
                                    const char *name)
{
    const struct bitmap *b = set ? set->list : NULL;
    while (b && (strcmp(b->name, name) != 0 || strcmp(b->image, image) != 0))
        b = b->next;
    return b;
}

static int not_found(const char *name, struct dr_error *err)
{
    return dr_fail(err, ENOENT, "Dirty bitmap '%s' not found", name);
}

static int set_range(void *user, uint64_t off, uint64_t len)
{
    dr_marks_set(user, off, len);
    return 0;
}

/* ------------------------------------------------------------------ the guest's side */

/* The disk's hook, past its gate: neither the chain nor the list changes meanwhile. What lies
 * behind the end that a bitmap knows needs no bit (each_range). */
static void on_change(void *user, uint64_t off, uint64_t len)
{
    struct dr_memory_bitmaps *set = user;
    const char *active = set->disk->chain->images[0]->path;
    for (struct bitmap *b = set->list; b; b = b->next)
        if (b->enabled && strcmp(b->image, active) == 0)
            dr_marks_set(&b->marks, off, len);
        else if (b->enabled)
            atomic_store(&b->missed, true);
}

static const struct dr_image *active_image(const struct dr_memory_bitmaps *set)
{
    return atomic_load(&set->disk->chain)->images[0];
}

static bool is_active(const struct dr_memory_bitmaps *set, const struct bitmap *b)
{
    return strcmp(b->image, active_image(set)->path) == 0;
}

/* What is set in it, and what counts as set: all, if it has missed something; what the disk has
 * grown by, where a guest may have written and a larger disk of earlier may have had bytes. */
static int each_range(const struct dr_memory_bitmaps *set, const struct bitmap *b,
                      int (*each)(void *user, uint64_t off, uint64_t len), void *user)
{
    bool active = is_active(set, b);
    uint64_t size = active ? active_image(set)->size : b->covered;
    if (active && atomic_load(&b->missed))
        return size ? each(user, 0, size) : 0;
    int r = dr_marks_each(&b->marks, dr_min(b->covered, size), each, user);
    return r == 0 && size > b->covered && b->enabled ? each(user, b->covered, size - b->covered)
                                                     : r;
}

/* ------------------------------------------------------------------ changes */

struct change {
    struct dr_memory_bitmaps *set;
    const char *image, *name;
    enum dr_bitmap_action action;
    const struct dr_marks *ranges;
    struct bitmap *made; /* of ADD; taken over */
    struct bitmap *gone; /* it has left the list */
};

/* Other bits, in marks of their own, which cover the disk as it is now. keep: the present ones
 * stay, too. */
static int renew(struct change *c, struct bitmap *b, bool keep)
{
    struct dr_marks fresh;
    uint64_t size = is_active(c->set, b) ? active_image(c->set)->size : b->covered;
    dr_marks_init(&fresh, b->marks.bits);
    int r = dr_marks_cover(&fresh, size);
    if (r == 0 && keep)
        r = each_range(c->set, b, set_range, &fresh);
    if (r == 0 && c->ranges)
        r = dr_marks_each(c->ranges, size, set_range, &fresh);
    if (r < 0) {
        dr_marks_free(&fresh);
        return r;
    }
    dr_marks_move(&b->marks, &fresh);
    b->covered = size;
    atomic_store(&b->missed, false);
    return 0;
}

static int change_found(struct change *c, struct bitmap **at)
{
    struct bitmap *b = *at;
    int r = 0;
    if (c->action == DR_BITMAP_REMOVE) {
        *at = b->next;
        c->gone = b;
    } else if (c->action == DR_BITMAP_CLEAR || c->action == DR_BITMAP_MERGE) {
        r = renew(c, b, c->action == DR_BITMAP_MERGE);
    } else {
        r = renew(c, b, true); /* what is new now counts by what it was until now */
        if (r == 0)
            b->enabled = c->action == DR_BITMAP_ENABLE;
    }
    return r;
}

static int add_hook(struct dr_memory_bitmaps *set, struct dr_error *err)
{
    const struct dr_hook hook = {.after = on_change, .user = set};
    int r = set->hooked ? 0 : dr_disk_hook_quiet(set->disk, &hook, err);
    set->hooked |= r == 0;
    return r;
}

/* Of dr_disk_exchange. */
static int change_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    struct change *c = user;
    (void)present, (void)fresh;
    struct bitmap **at = find(c->set, c->image, c->name);
    if (c->made) { /* to be added */
        int r = *at ? dr_fail(err, EEXIST, "Bitmap already exists: %s", c->name)
                    : add_hook(c->set, err);
        if (r < 0)
            return r;
        c->made->next = c->set->list;
        c->set->list = DR_STEAL(c->made);
        return 0;
    }
    int r = *at ? change_found(c, at) : not_found(c->name, err);
    return r == -ENOMEM ? dr_fail(err, ENOMEM, "out of memory for bitmap '%s'", c->name) : r;
}

static struct bitmap *make(const char *image, const char *name, uint64_t granularity, bool enabled,
                           uint64_t size)
{
    struct bitmap *b = calloc(1, sizeof(*b));
    if (!b)
        return NULL;
    dr_marks_init(&b->marks, (unsigned)__builtin_ctzll(granularity));
    b->name = strdup(name);
    b->image = strdup(image);
    b->enabled = enabled;
    b->covered = size; /* from here on what is new is set (each_range) */
    if (b->name && b->image && dr_marks_cover(&b->marks, b->covered) == 0)
        return b;
    free_bitmap(b);
    return NULL;
}

/* *c begins a change that adds one. */
static int begin_add(struct change *c, uint64_t granularity, bool enabled, uint64_t size,
                     struct dr_error *err)
{
    if (!*c->name)
        return dr_fail(err, EINVAL, "Bitmap name cannot be empty");
    if (granularity < 512 || granularity > UINT32_MAX || granularity & (granularity - 1))
        return dr_fail(err, EINVAL, "Granularity must be power of 2 and at least 512");
    if (strlen(c->name) > DR_MEMORY_BITMAP_NAME)
        return dr_fail(err, EINVAL, "Bitmap name too long: %s", c->name);
    c->action = DR_BITMAP_ADD;
    c->made = make(c->image, c->name, granularity, enabled, size);
    return c->made ? 0 : dr_fail(err, ENOMEM, "out of memory for bitmap '%s'", c->name);
}

/* quiet: no request is past the gate. Ends the change. */
static int carry_out(struct change *c, bool quiet, struct dr_error *err)
{
    int r = quiet ? change_step(c, NULL, NULL, err)
                  : dr_disk_exchange(c->set->disk, change_step, c, NULL, err);
    free_bitmap(c->made);
    free_bitmap(c->gone);
    return r;
}

int dr_memory_bitmap_add(struct dr_memory_bitmaps *set, const char *image, const char *name,
                         uint64_t granularity, bool enabled, struct dr_error *err)
{
    struct change c = {.set = set, .image = image, .name = name};
    int r = begin_add(&c, granularity, enabled, dr_size(set->disk), err);
    return r < 0 ? r : carry_out(&c, false, err);
}

int dr_memory_bitmap_add_quiet(struct dr_memory_bitmaps *set, const char *image, const char *name,
                               uint64_t granularity, bool enabled, struct dr_error *err)
{
    struct change c = {.set = set, .image = image, .name = name};
    int r = begin_add(&c, granularity, enabled, active_image(set)->size, err);
    return r < 0 ? r : carry_out(&c, true, err);
}

int dr_memory_bitmap_change(struct dr_memory_bitmaps *set, const char *image, const char *name,
                            enum dr_bitmap_action action, const struct dr_marks *ranges,
                            struct dr_error *err)
{
    struct change c = {
        .set = set, .image = image, .name = name, .action = action, .ranges = ranges};
    return carry_out(&c, false, err);
}

int dr_memory_bitmap_change_quiet(struct dr_memory_bitmaps *set, const char *image,
                                  const char *name, enum dr_bitmap_action action,
                                  const struct dr_marks *ranges, struct dr_error *err)
{
    struct change c = {
        .set = set, .image = image, .name = name, .action = action, .ranges = ranges};
    return carry_out(&c, true, err);
}

/* ------------------------------------------------------------------ asking */

bool dr_memory_bitmap_has(const struct dr_memory_bitmaps *set, const char *image, const char *name)
{
    return look_up(set, image, name);
}

static int count_range(void *user, uint64_t off, uint64_t len)
{
    uint64_t *bytes = user;
    (void)off;
    *bytes += len;
    return 0;
}

/* In whole granules, as QEMU counts: the last one may end behind the disk. */
static uint64_t count(const struct dr_memory_bitmaps *set, const struct bitmap *b)
{
    uint64_t bytes = 0;
    each_range(set, b, count_range, &bytes);
    return dr_round_up(bytes, UINT64_C(1) << b->marks.bits);
}

int dr_memory_bitmaps_each(const struct dr_memory_bitmaps *set, const char *image,
                           int (*each)(void *user, const struct dr_memory_bitmap_info *info),
                           void *user)
{
    int r = 0;
    for (const struct bitmap *b = set ? set->list : NULL; b && r == 0; b = b->next) {
        if (strcmp(b->image, image) != 0)
            continue;
        const struct dr_memory_bitmap_info info = {.name = b->name,
                                                   .image = b->image,
                                                   .granularity = UINT64_C(1) << b->marks.bits,
                                                   .dirty = count(set, b),
                                                   .enabled = b->enabled};
        r = each(user, &info);
    }
    return r;
}

int dr_memory_bitmap_read(const struct dr_memory_bitmaps *set, const char *image, const char *name,
                          struct dr_marks *into, bool *enabled)
{
    const struct bitmap *b = look_up(set, image, name);
    if (!b)
        return -ENOENT;
    *enabled = b->enabled;
    return each_range(set, b, set_range, into);
}

/* ------------------------------------------------------------------ other images */

void dr_memory_bitmaps_moved(struct dr_memory_bitmaps *set, const char *image)
{
    for (struct bitmap *b = set ? set->list : NULL; b; b = b->next)
        if (b->enabled && strcmp(b->image, image) != 0)
            atomic_store(&b->missed, true);
}

static bool has_image(const struct dr_chain *chain, const char *path)
{
    for (size_t i = 0; i < chain->n; i++)
        if (strcmp(chain->images[i]->path, path) == 0)
            return true;
    return false;
}

static int prune_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                      struct dr_error *err)
{
    struct dr_memory_bitmaps *set = user;
    (void)fresh, (void)err;
    for (struct bitmap **at = &set->list, *b; (b = *at);) {
        if (has_image(present, b->image)) {
            at = &b->next;
            continue;
        }
        *at = b->next;
        free_bitmap(b);
    }
    return 0;
}

void dr_memory_bitmaps_prune(struct dr_memory_bitmaps *set)
{
    if (set && set->list)
        dr_disk_exchange(set->disk, prune_step, set, NULL, NULL);
}
