/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "noted.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"

#define SECTOR 512u

static struct noted_bitmap *find(struct noted *set, const char *name)
{
    for (unsigned i = 0; i < set->n; i++)
        if (!strcmp(set->list[i].name, name))
            return &set->list[i];
    return NULL;
}

/* Bits of the sectors that begin before the end. */
static uint64_t sectors(uint64_t size)
{
    uint64_t n = dr_div_up(size, SECTOR);
    return n < 64 ? (UINT64_C(1) << n) - 1 : UINT64_MAX;
}

/* Only of disks with bitmaps, which are small. */
static uint64_t differing(const uint8_t *a, const uint8_t *b, uint64_t size)
{
    uint64_t bits = 0;
    assert(size <= 64 * SECTOR);
    for (uint64_t off = 0; off < size; off += SECTOR)
        if (memcmp(a + off, b + off, dr_min(SECTOR, size - off)) != 0)
            bits |= UINT64_C(1) << off / SECTOR;
    return bits;
}

/* ------------------------------------------------------------------ reading */

static int add_range(void *user, uint64_t off, uint64_t len)
{
    uint64_t *bits = user;
    *bits |= sectors(off + len) & ~sectors(off);
    return 0;
}

static int read_one(struct dr_disk *disk, const struct dr_bitmap *b, struct noted_bitmap *found,
                    struct dr_error *err)
{
    snprintf(found->name, sizeof(found->name), "%s", b->name);
    found->enabled = b->enabled;
    found->inconsistent = b->inconsistent;
    found->bits = 0;
    if (b->inconsistent)
        return 0;
    return dr_disk_bitmap_read(disk, b->name, add_range, &found->bits, err);
}

static int read_disk(struct dr_disk *disk, struct noted *found, struct dr_error *err)
{
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    int r = dr_disk_bitmaps(disk, &list, &n, err);
    found->n = 0;
    if (r == 0 && n > NOTED_MAX)
        r = dr_fail(err, EIO, "there are %zu bitmaps", n);
    for (size_t i = 0; r == 0 && i < n; i++)
        r = read_one(disk, &list[i], &found->list[found->n++], err);
    dr_bitmaps_free(list, n);
    return r;
}

int noted_read(struct dr_fs *fs, const char *path, struct noted *found, struct dr_error *err)
{
    const struct dr_open_options o = {.flags = DR_OPEN_NO_BACKING};
    struct dr_disk *disk;
    int r = dr_open_fs(fs, path, &o, &disk, err);
    if (r < 0)
        return r;
    r = read_disk(disk, found, err);
    dr_close(disk, NULL);
    return r;
}

/* ------------------------------------------------------------------ changing */

static void follow(struct noted *now, const char *name, enum dr_bitmap_action action)
{
    struct noted_bitmap *b = find(now, name);
    const struct noted_bitmap *off = find(now, "off");
    if (action == DR_BITMAP_ADD) {
        b = &now->list[now->n++];
        *b = (struct noted_bitmap){.enabled = true};
        snprintf(b->name, sizeof(b->name), "%s", name);
    } else if (action == DR_BITMAP_REMOVE) {
        memmove(b, b + 1, (size_t)(now->list + now->n - b - 1) * sizeof(*b));
        now->n--;
    } else if (action == DR_BITMAP_CLEAR) {
        b->bits = 0;
    } else if (action == DR_BITMAP_MERGE) {
        b->bits |= off->bits;
    } else {
        b->enabled = action == DR_BITMAP_ENABLE;
    }
}

int noted_change(struct dr_disk *disk, const char *name, enum dr_bitmap_action action,
                 struct noted *now, struct dr_error *err)
{
    const struct dr_bitmap_options o = {.granularity = SECTOR, .source = "off"};
    int r = dr_disk_bitmap_change(disk, name, action, &o, err);
    if (r < 0)
        return r;
    follow(now, name, action);
    if (action != DR_BITMAP_DISABLE)
        return 0;
    /* It may have had more bits than it must; from now on it has exactly these. */
    struct noted found;
    uint64_t must = find(now, name)->bits;
    r = read_disk(disk, &found, err);
    const struct noted_bitmap *b = r < 0 ? NULL : find(&found, name);
    if (r == 0 && (!b || b->inconsistent || (must & ~b->bits)))
        r = dr_fail(err, EIO, "the bitmap %s lost bits when it was disabled", name);
    if (r == 0)
        find(now, name)->bits = b->bits;
    return r;
}

int noted_make(struct dr_disk *disk, uint64_t unit, const uint8_t *bytes, struct noted *now,
               struct dr_error *err)
{
    now->n = 0;
    int r = noted_change(disk, "off", DR_BITMAP_ADD, now, err);
    if (r == 0)
        r = dr_pwrite(disk, bytes, unit, unit, 0, err);
    if (r == 0)
        r = noted_change(disk, "off", DR_BITMAP_DISABLE, now, err);
    return r < 0 ? r : noted_change(disk, "on", DR_BITMAP_ADD, now, err);
}

void noted_compare(struct noted *now, const uint8_t *before, const uint8_t *after, uint64_t size)
{
    uint64_t bits = now->n ? differing(before, after, size) : 0;
    for (unsigned i = 0; i < now->n; i++)
        if (now->list[i].enabled)
            now->list[i].bits |= bits;
}

void noted_cut(struct noted *now, uint64_t size)
{
    for (unsigned i = 0; i < now->n; i++)
        now->list[i].bits &= sectors(size);
}

/* ------------------------------------------------------------------ judging */

static const char *wrong_one(const struct noted_bitmap *found, const struct noted_bitmap *then,
                             uint64_t changed, uint64_t all, enum noted_state state)
{
    if (found->enabled != then->enabled)
        return "is enabled, or disabled, as it never was";
    if (found->inconsistent)
        return state >= (then->enabled ? NOTED_OPEN : NOTED_ANY) ? NULL
                                                                 : "must not be inconsistent";
    if (then->enabled)
        return ((then->bits | changed) & all & ~found->bits) ? "misses a change" : NULL;
    return ((then->bits ^ found->bits) & all) ? "is disabled, and has changed" : NULL;
}

const char *noted_wrong(const struct noted *found, const struct noted *then,
                        const uint8_t *then_view, const uint8_t *view, uint64_t size,
                        enum noted_state state)
{
    static _Thread_local char text[100];
    if (found->n != then->n)
        return "there are more or less of them";
    uint64_t changed = found->n ? differing(then_view, view, size) : 0;
    for (unsigned i = 0; i < found->n; i++) {
        const struct noted_bitmap *b = find((struct noted *)(uintptr_t)then, found->list[i].name);
        const char *why = b ? wrong_one(&found->list[i], b, changed, sectors(size), state)
                            : "was not there";
        snprintf(text, sizeof(text), "%s %s", found->list[i].name, why ? why : "");
        if (why)
            return text;
    }
    return NULL;
}
