/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The toy's internal snapshots. The core has written and flushed everything and keeps writers out;
 * readers go on. Each change is: raise the counts of what gets another way to it, durably; write a
 * level-1 table that nothing points to; switch the header; then hand what lost a way to the core.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "toy.h"

/* A copy of the level-1 table at `from`, with counts that include it. */
static int copy_l1(struct dr_image *image, uint64_t from, uint64_t *copy, struct dr_error *err)
{
    struct dr_hold hold = {0};
    uint8_t l1[TOY_L1_BYTES];
    int r;
    pthread_mutex_lock(&image->lock);
    do
        r = toy_allocate(image, TOY_META, TOY_L1_BYTES, copy, err);
    while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    pthread_mutex_unlock(&image->lock);
    if (!r)
        r = dr_image_flush(image, err);
    if (!r)
        r = dr_file_pread(image->files[0], l1, from, sizeof(l1), err);
    if (!r)
        r = dr_file_pwrite(image->files[0], l1, *copy, sizeof(l1), err);
    if (!r)
        r = toy_recount(image, *copy, err);
    DR_LOCK_SCOPE(&image->lock);
    dr_page_forget(image, 0, 0, dr_file_size(image->files[0]));
    return r;
}

/* One sector of the header is the switch. */
static int switch_header(struct dr_image *image, unsigned field, uint64_t value,
                         struct dr_error *err)
{
    uint8_t h[512];
    int r = toy_read_header(image, h, err);
    if (r)
        return r;
    put_be64(h + field, value);
    return toy_write_header(image, h, err);
}

/* ------------------------------------------------------------------ trees that go */

static int lose(struct dr_image *image, unsigned space, uint64_t place, uint64_t len,
                struct dr_error *err)
{
    struct dr_hold hold = {0};
    int r;
    DR_LOCK_SCOPE(&image->lock);
    do {
        if (!(r = dr_free_ahead(image, 1)))
            r = toy_pin_counts(image, space, place, len);
    } while (r == -EAGAIN && (r = dr_image_satisfy(image, &hold, 0, err)) == 0);
    dr_hold_end(&hold);
    if (!r)
        toy_free(image, space, place, len);
    return r;
}

static int lose_table(struct dr_image *image, uint64_t table, struct dr_error *err)
{
    const struct toy *t = image->state;
    CLEANUP_FREE uint8_t *l2 = malloc(t->l2_bytes);
    if (!l2)
        return dr_fail(err, ENOMEM, "out of memory");
    int r = dr_file_pread_short(image->files[0], l2, table, t->l2_bytes, NULL, err);
    for (uint32_t i = 0; !r && i < t->l2_entries; i++) {
        struct toy_entry e = toy_get_entry(l2 + 16 * i);
        if (e.held)
            r = lose(image, toy_data_space(t), e.host, 1, err);
    }
    return r ? r : lose(image, TOY_META, table, t->l2_bytes, err);
}

static int lose_tree(struct dr_image *image, uint64_t l1_at, struct dr_error *err)
{
    uint8_t l1[TOY_L1_BYTES];
    int r = dr_file_pread(image->files[0], l1, l1_at, sizeof(l1), err);
    for (unsigned i = 0; !r && i < TOY_L1; i++)
        if (get_be64(l1 + 8 * i))
            r = lose_table(image, get_be64(l1 + 8 * i), err);
    return r ? r : lose(image, TOY_META, l1_at, TOY_L1_BYTES, err);
}

/* ------------------------------------------------------------------ the callbacks */

/* After a failure counts may be too high: the mark stays, and the next open counts anew. */
static int ended(struct dr_image *image, int r)
{
    struct toy *t = image->state;
    t->leaks |= r < 0;
    return r;
}

static int find_snapshot(const struct dr_image *image, const char *id, unsigned *slot,
                         struct dr_error *err)
{
    const struct toy *t = image->state;
    *slot = (unsigned)strtoul(id, NULL, 10) - 1;
    if (*slot < TOY_SNAPSHOTS && t->snapshots[*slot])
        return 0;
    return dr_fail(err, ENOENT, "%s: has no snapshot %s", image->path, id);
}

int toy_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err)
{
    struct toy *t = image->state;
    unsigned slot = 0;
    uint64_t copy;
    (void)name;
    while (slot < TOY_SNAPSHOTS && t->snapshots[slot])
        slot++;
    if (slot == TOY_SNAPSHOTS)
        return dr_fail(err, ENOSPC, "%s: has room for %u snapshots", image->path, TOY_SNAPSHOTS);
    int r = copy_l1(image, t->l1_at, &copy, err);
    if (!r)
        r = switch_header(image, TOY_OFF_SNAPSHOTS + 8 * slot, copy, err);
    if (!r)
        t->snapshots[slot] = copy;
    return ended(image, r);
}

int toy_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err)
{
    struct toy *t = image->state;
    unsigned slot;
    uint64_t copy, old = t->l1_at;
    int r = find_snapshot(image, id, &slot, err);
    if (!r)
        r = copy_l1(image, t->snapshots[slot], &copy, err);
    if (!r)
        r = switch_header(image, TOY_OFF_L1, copy, err);
    if (r)
        return ended(image, r);
    pthread_mutex_lock(&image->lock); /* readers look there */
    t->l1_at = copy;
    pthread_mutex_unlock(&image->lock);
    return ended(image, lose_tree(image, old, err));
}

int toy_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err)
{
    struct toy *t = image->state;
    unsigned slot;
    int r = find_snapshot(image, id, &slot, err);
    if (!r)
        r = switch_header(image, TOY_OFF_SNAPSHOTS + 8 * slot, 0, err);
    if (r)
        return r;
    uint64_t old = t->snapshots[slot];
    t->snapshots[slot] = 0;
    return ended(image, lose_tree(image, old, err));
}

int toy_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                      struct dr_error *err)
{
    const struct toy *t = image->state;
    int r = 0;
    (void)err;
    for (unsigned i = 0; !r && i < TOY_SNAPSHOTS; i++) {
        char id[12];
        snprintf(id, sizeof(id), "%u", i + 1);
        if (t->snapshots[i])
            r = each(user, &(struct dr_snapshot_info){.id = id, .name = id, .size = image->size});
    }
    return r;
}

/* ------------------------------------------------------------------ of closed images */

int toy_snapshot(struct dr_fs *fs, const char *path, struct dr_error *err)
{
    struct dr_image *image;
    int r = dr_image_open(fs, path, "toy", DR_OPEN_RDWR, &image, err);
    if (r)
        return r;
    r = dr_image_snapshot_create(image, "", err);
    int closed = dr_image_unref(image, err);
    return r ? r : closed;
}

static int snapshot_unit(struct dr_image *image, const struct toy_entry *e, uint8_t *unit,
                         uint8_t hole, struct dr_error *err)
{
    const struct toy *t = image->state;
    struct dr_file *f = image->files[toy_data_space(t)];
    uint8_t coded[TOY_MAX_CLUSTER];
    int r = 0;
    memset(unit, hole, t->cluster);
    if (e->coded) {
        r = dr_file_pread(f, coded, e->host, e->coded, err);
        return r ? r
                 : image->fmt->decode(image, &(struct dr_extent){.unit = t->cluster}, coded,
                                      e->coded, unit, err);
    }
    for (unsigned i = 0; !r && i < t->subs; i++) {
        if (e->zero >> i & 1)
            memset(unit + i * t->sub, 0, t->sub);
        if (e->held >> i & 1)
            r = dr_file_pread_short(f, unit + i * t->sub, e->host + i * t->sub, t->sub, NULL, err);
    }
    return r;
}

static int snapshot_read(struct dr_image *image, uint8_t *buf, size_t len, uint8_t hole,
                         struct dr_error *err)
{
    const struct toy *t = image->state;
    uint8_t raw[16], unit[TOY_MAX_CLUSTER];
    int r = 0;
    for (uint64_t at = 0; !r && at < len; at += t->cluster) {
        uint64_t i = at / t->cluster;
        struct toy_entry e = {0};
        r = dr_file_pread(image->files[0], raw, t->snapshots[0] + 8 * (i / t->l2_entries), 8, err);
        uint64_t table = get_be64(raw);
        if (!r && table)
            r = dr_file_pread_short(image->files[0], raw, table + 16 * (i % t->l2_entries), 16,
                                    NULL, err);
        if (table)
            e = toy_get_entry(raw);
        if (!r)
            r = snapshot_unit(image, &e, unit, hole, err);
        memcpy(buf + at, unit, dr_min(t->cluster, len - at));
    }
    return r;
}

int toy_snapshot_read(struct dr_fs *fs, const char *path, uint8_t *buf, size_t len, uint8_t hole,
                      struct dr_error *err)
{
    struct dr_image *image;
    int r = dr_image_open(fs, path, "toy", 0, &image, err);
    if (r)
        return r;
    r = snapshot_read(image, buf, len, hole, err);
    int closed = dr_image_unref(image, err);
    return r ? r : closed;
}
