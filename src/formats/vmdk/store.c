/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Writing the descriptor back so that a crash leaves the old text or the new one.
 *
 * One changed sector is written where it is. More of them in an embedded descriptor go through a
 * redo copy in its second half, behind the NULs that end the text for every reader: copy, flush,
 * text, flush, erase the copy, flush. A text file is replaced by rename. */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/vmdk.h"

#define REDO_AT   (10 * VMDK_SECTOR) /* in the descriptor's area; the text has what is before */
#define REDO_SIZE (10 * VMDK_SECTOR)
#define REDO_HEAD 32u

static const char redo_magic[16] = "\0drover redo 1\0";

/* ------------------------------------------------------------------ the redo copy */

static void redo_encode(uint8_t block[REDO_SIZE], const struct vmdk_desc *d)
{
    memset(block, 0, REDO_SIZE);
    memcpy(block, redo_magic, sizeof(redo_magic));
    put_le64(block + 16, d->len);
    put_le64(block + 24, XXH3_64bits(d->text, d->len));
    memcpy(block + REDO_HEAD, d->text, d->len);
}

/* The length of the text in a valid copy, or 0. */
static size_t redo_valid(const uint8_t *block, size_t size)
{
    if (size < REDO_SIZE || memcmp(block, redo_magic, sizeof(redo_magic)) != 0)
        return 0;
    uint64_t len = get_le64(block + 16);
    if (len > REDO_SIZE - REDO_HEAD ||
        get_le64(block + 24) != XXH3_64bits(block + REDO_HEAD, (size_t)len))
        return 0;
    return (size_t)len;
}

int vmdk_load_embedded(struct dr_file *f, uint64_t off, uint64_t area, char **text, size_t *len,
                       bool *redo, struct dr_error *err)
{
    *len = (size_t)dr_min(area, VMDK_DESC_MAX);
    CLEANUP_FREE char *buf = malloc(*len + 1);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    int r = dr_file_pread(f, buf, off, *len, err);
    if (r < 0)
        return r;
    size_t n = *len > REDO_AT ? redo_valid((uint8_t *)buf + REDO_AT, *len - REDO_AT) : 0;
    *redo = n > 0;
    if (n > 0) {
        memmove(buf, buf + REDO_AT + REDO_HEAD, n);
        *len = n;
    }
    buf[*len] = '\0';
    *text = DR_STEAL(buf);
    return 0;
}

static bool redo_possible(const struct vmdk_state *s, size_t old_len, size_t new_len)
{
    return s->desc_area >= REDO_AT + REDO_SIZE && old_len <= REDO_AT &&
           new_len <= REDO_SIZE - REDO_HEAD;
}

/* The text and the NULs behind it, then the copy is erased. */
static int write_primary(struct dr_image *image, const struct vmdk_desc *d, struct dr_error *err)
{
    uint8_t block[REDO_AT];
    struct dr_file *f = image->files[0];
    uint64_t off = vmdk_of(image)->desc_off;
    memset(block, 0, sizeof(block));
    memcpy(block, d->text, d->len);
    int r = dr_file_pwrite(f, block, off, sizeof(block), err);
    if (r == 0)
        r = dr_file_flush(f, err);
    memset(block, 0, sizeof(block));
    if (r == 0)
        r = dr_file_pwrite(f, block, off + REDO_AT, REDO_SIZE, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int store_by_redo(struct dr_image *image, const struct vmdk_desc *d, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    struct dr_file *f = image->files[0];
    uint8_t block[REDO_SIZE];
    redo_encode(block, d);
    int r = dr_file_pwrite(f, block, s->desc_off + REDO_AT, sizeof(block), err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r < 0) {
        /* It must not come to life later. */
        memset(block, 0, sizeof(block));
        dr_file_pwrite(f, block, s->desc_off + REDO_AT, sizeof(block), NULL);
        return r;
    }
    s->redo = true;
    r = write_primary(image, d, err);
    if (r == 0)
        s->redo = false;
    return r;
}

int vmdk_finish_redo(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    if (!s->redo)
        return 0;
    int r = write_primary(image, &s->desc, err);
    if (r == 0)
        s->redo = false;
    return r;
}

/* ------------------------------------------------------------------ in place */

static uint8_t byte_at(const struct vmdk_desc *d, size_t i)
{
    return i < d->len ? (uint8_t)d->text[i] : 0;
}

static bool sector_differs(const struct vmdk_desc *a, const struct vmdk_desc *b, size_t sector)
{
    for (size_t i = sector * VMDK_SECTOR; i < (sector + 1) * VMDK_SECTOR; i++)
        if (byte_at(a, i) != byte_at(b, i))
            return true;
    return false;
}

static size_t text_sectors(const struct vmdk_desc *a, const struct vmdk_desc *b)
{
    return (size_t)dr_div_up(dr_max(a->len, b->len), VMDK_SECTOR);
}

static size_t count_changed(const struct vmdk_desc *a, const struct vmdk_desc *b)
{
    size_t changed = 0;
    for (size_t i = 0; i < text_sectors(a, b); i++)
        changed += sector_differs(a, b, i);
    return changed;
}

static int write_sector(struct dr_image *image, const struct vmdk_desc *d, size_t sector,
                        struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    uint8_t buf[VMDK_SECTOR];
    size_t start = sector * VMDK_SECTOR, len = VMDK_SECTOR;
    for (size_t i = 0; i < VMDK_SECTOR; i++)
        buf[i] = byte_at(d, start + i);
    if (!s->embedded)
        len = (size_t)dr_min(len, d->len - start); /* same length: nothing behind it changes */
    return dr_file_pwrite(image->files[0], buf, (s->embedded ? s->desc_off : 0) + start, len, err);
}

static int store_in_place(struct dr_image *image, const struct vmdk_desc *d, struct dr_error *err)
{
    const struct vmdk_desc *old = &vmdk_of(image)->desc;
    int r = 0;
    for (size_t i = 0; r == 0 && i < text_sectors(old, d); i++)
        if (sector_differs(old, d, i))
            r = write_sector(image, d, i, err);
    return r < 0 ? r : dr_file_flush(image->files[0], err);
}

/* ------------------------------------------------------------------ a text file */

static int fill_text(void *user, struct dr_file *tmp, struct dr_error *err)
{
    const struct vmdk_desc *d = user;
    return dr_file_pwrite(tmp, d->text, 0, d->len, err);
}

static int store_by_rename(struct dr_image *image, struct vmdk_desc *d, struct dr_error *err)
{
    struct dr_file *old = image->files[0], *fresh = NULL;
    int r = dr_replace(image->fs, old->path, old, fill_text, d, &fresh, err);
    if (fresh) { /* it has the name, even if that could not be made durable */
        pthread_mutex_lock(&image->lock); /* a flush may be under way */
        image->files[0] = fresh;
        pthread_mutex_unlock(&image->lock);
        dr_file_unref(old);
    }
    return r;
}

/* ------------------------------------------------------------------ all together */

enum way { IN_PLACE, BY_REDO, BY_RENAME };

static int choose_way(const struct dr_image *image, const struct vmdk_desc *d, unsigned flags,
                      enum way *way, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    bool same_len = d->len == s->desc.len;
    bool few = count_changed(&s->desc, d) <= 1 || (same_len && (flags & VMDK_STORE_ANY_MIX));
    *way = IN_PLACE;
    if (!s->embedded) {
        if (!same_len || !few || s->recoded)
            *way = BY_RENAME;
        return 0;
    }
    if (d->len >= s->desc_area)
        return dr_fail(err, ENOSPC,
                       "%s: the descriptor would be %zu bytes long, there is room for %llu",
                       image->path, d->len, (unsigned long long)s->desc_area - 1);
    if (few)
        return 0;
    *way = BY_REDO;
    if (!redo_possible(s, s->desc.len, d->len))
        return dr_fail(err, ENOSPC,
                       "%s: the descriptor has no room for a safe rewrite: it would be %zu bytes "
                       "long, at most %u are possible in a descriptor of %u sectors",
                       image->path, d->len, REDO_SIZE - REDO_HEAD, VMDK_DESC_SECTORS);
    return 0;
}

static int write_back(struct dr_image *image, struct vmdk_desc *d, enum way way,
                      struct dr_error *err)
{
    int r = vmdk_finish_redo(image, err); /* an older copy would win over what is written now */
    if (r < 0)
        return r;
    switch (way) {
    case BY_REDO:
        return store_by_redo(image, d, err);
    case BY_RENAME:
        return store_by_rename(image, d, err);
    default:
        return store_in_place(image, d, err);
    }
}

int vmdk_store(struct dr_image *image, struct vmdk_desc *fresh, unsigned flags,
               struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    enum way way = IN_PLACE;
    int r = vmdk_refuse_streams(image, err);
    if (r == 0)
        r = choose_way(image, fresh, flags, &way, err);
    if (r == 0 && way == BY_RENAME && (flags & VMDK_STORE_TRY))
        r = dr_replace_try(image->fs, image->files[0]->path, image->files[0], err);
    if (r < 0 || (flags & VMDK_STORE_TRY))
        return r;
    r = write_back(image, fresh, way, err);
    if (r < 0 && !s->redo)
        return r;
    /* With the redo copy durable the new text is what counts, even if its own place could not be
     * written. */
    vmdk_desc_free(&s->desc);
    s->desc = *fresh;
    s->recoded = false;
    *fresh = (struct vmdk_desc){0};
    return r;
}

int vmdk_desc_copy(const struct dr_image *image, struct vmdk_desc *copy, struct dr_error *err)
{
    const struct vmdk_desc *d = &vmdk_of(image)->desc;
    return vmdk_desc_parse(copy, image->path, d->text, d->len, err);
}
