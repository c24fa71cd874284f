/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Subjects with bitmaps: whoever reads the whole image compares it with what it held when the
 * bitmaps were made. An enabled bitmap that is not marked as in use must have every difference. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

static struct {
    const struct subject *subject;
    uint8_t *content; /* when the bitmaps were made */
    uint64_t size;    /* the disk was never smaller since */
    bool paused;
} made;

static void add(const struct subject *s, struct dr_disk *disk, const char *name,
                uint64_t granularity)
{
    struct dr_error err = DR_ERROR_INIT;
    const struct dr_bitmap_options o = {.granularity = granularity};
    if (dr_disk_bitmap_change(disk, name, DR_BITMAP_ADD, &o, &err))
        MODEL_FAIL(s, "add a bitmap: %s", err.text);
}

void model_add_bitmaps(const struct subject *s, struct dr_fs *fs, const uint8_t *content)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    free(made.content);
    made.content = NULL;
    made.subject = NULL;
    if (!s->bitmaps)
        return;
    if (model_open(fs, s, DR_OPEN_RDWR, &disk, &err))
        MODEL_FAIL(s, "open to add bitmaps: %s", err.text);
    add(s, disk, "fine", 512);
    add(s, disk, "coarse", 65536);
    if (dr_close(disk, &err))
        MODEL_FAIL(s, "close after adding bitmaps: %s", err.text);
    made.content = malloc(s->size + 1);
    memcpy(made.content, content, s->size);
    made.size = s->size;
    made.subject = s;
}

void model_limit_bitmaps(uint64_t size)
{
    made.size = dr_min(made.size, size);
}

struct cover {
    const char *name;
    const uint8_t *now;
    uint64_t size, next; /* all is well up to here */
};

static int cover_range(void *user, uint64_t off, uint64_t len)
{
    struct cover *c = user;
    uint64_t end = dr_min(off, c->size);
    if (end > c->next && memcmp(made.content + c->next, c->now + c->next, end - c->next))
        MODEL_FAIL(made.subject, "the bitmap %s misses a change between %llu and %llu", c->name,
                   (unsigned long long)c->next, (unsigned long long)end);
    c->next = dr_min(off + len, c->size);
    return 0;
}

void model_check_bitmaps(struct dr_disk *disk, const uint8_t *now, uint64_t size, bool consistent)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    if (!made.subject || made.paused ||
        strcmp(dr_image_path(disk, 0), subject_top(made.subject)) != 0)
        return;
    if (dr_disk_bitmaps(disk, &list, &n, &err) || n != 2)
        MODEL_FAIL(made.subject, "%zu bitmaps: %s", n, err.text);
    for (size_t i = 0; i < n; i++) {
        struct cover c = {list[i].name, now, dr_min(size, made.size), 0};
        if (consistent && list[i].inconsistent)
            MODEL_FAIL(made.subject, "the bitmap %s was not stored", c.name);
        if (list[i].inconsistent)
            continue;
        if (dr_disk_bitmap_read(disk, c.name, cover_range, &c, &err))
            MODEL_FAIL(made.subject, "the bitmap %s cannot be read: %s", c.name, err.text);
        cover_range(&c, c.size, 0);
    }
    dr_bitmaps_free(list, n);
}

void model_pause_bitmaps(const struct subject *s, struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    if (made.subject != s)
        return;
    made.paused = true;
    if (model_open(fs, s, DR_OPEN_RDWR, &disk, &err) ||
        dr_disk_bitmap_change(disk, "fine", DR_BITMAP_REMOVE, NULL, &err) ||
        dr_disk_bitmap_change(disk, "coarse", DR_BITMAP_REMOVE, NULL, &err) || dr_close(disk, &err))
        MODEL_FAIL(s, "remove the bitmaps: %s", err.text);
}

void model_resume_bitmaps(void)
{
    made.paused = false;
}
