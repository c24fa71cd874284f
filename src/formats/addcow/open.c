/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* add-cow: a raw disk with a parent, that can shed its metadata. Open, close, map. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

/* A bitmap this many times too short is one of another granularity. */
#define SHORT_BITMAP 8

int addcow_refuse_write(const struct dr_image *image, struct dr_error *err)
{
    if (addcow_of(image)->h.layout == ADDCOW_V7)
        return 0;
    return dr_fail(err, EROFS,
                   "%s: add-cow images of the layout v20 (\"ACOW\") can only be read; convert it",
                   image->path);
}

/* ------------------------------------------------------------------ open */

static int refuse_same(const struct dr_image *image, const char *name, struct dr_error *err)
{
    return dr_fail(err, EINVAL, "%s: its image file \"%s\" is the metadata file itself",
                   image->path, name);
}

/* Before it is opened: the locks would only say that somebody uses it. */
static int check_not_self(struct dr_image *image, const char *name, struct dr_error *err)
{
    CLEANUP_FREE char *full = dr_path_sibling(image->path, name);
    struct dr_file_id id;
    if (!full)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (image->fs->ops->identify(image->fs, full, &id, NULL) == 0 &&
        dr_same_id(id, image->files[ADDCOW_META]->id))
        return refuse_same(image, name, err);
    return 0;
}

static int open_raw(struct dr_image *image, struct dr_error *err)
{
    const char *name = addcow_of(image)->h.image;
    struct dr_error why = DR_ERROR_INIT;
    unsigned index;
    int r = check_not_self(image, name, err);
    if (r < 0)
        return r;
    r = dr_image_open_file(image, name, &index, &why);
    if (r == -ENOENT)
        return dr_fail(err, ENOENT, "%s: its image file \"%s\" does not exist", image->path, name);
    if (r < 0)
        return dr_fail(err, -r, "%s: cannot open its image file \"%s\": %s", image->path, name,
                       why.text);
    const struct dr_file_id *a = &image->files[ADDCOW_META]->id, *b = &image->files[index]->id;
    return a->dev == b->dev && a->ino == b->ino ? refuse_same(image, name, err) : 0;
}

/* An image file that lost its bytes looks like an empty disk; one that is about to grow has no bit
 * and, since its end would show the parent's bytes, no parent. */
static int check_empty(struct dr_image *image, uint64_t bits, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t n;
    int r = addcow_count(image, 0, bits, &n, err);
    if (r < 0 || (n == 0 && !h->backing))
        return r;
    return dr_fail(
        err, EINVAL,
        "%s: its image file \"%s\" is empty, but there are bits for a disk of %llu bytes",
        image->path, h->image, (unsigned long long)(bits * h->granule));
}

/* The raw file's length is the disk's. A bitmap that is shorter than needed reads as 0 bits. */
static int check_sizes(struct dr_image *image, struct dr_error *err)
{
    const struct addcow_header *h = &addcow_of(image)->h;
    uint64_t size = dr_file_size(image->files[ADDCOW_RAW]);
    uint64_t file = dr_file_size(image->files[ADDCOW_META]);
    uint64_t have = file > h->bitmap_off ? file - h->bitmap_off : 0;
    if (size > ADDCOW_MAX_SIZE)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", image->path,
                       (unsigned long long)size);
    image->size = size;
    if (size == 0 && have > 0 && !h->all)
        return check_empty(image, have * 8, err);
    uint64_t need = addcow_bitmap_len(h, size);
    if (h->layout != ADDCOW_V7 || have == 0 || need / SHORT_BITMAP < have)
        return 0;
    return dr_fail(err, ENOTSUP,
                   "%s: has %llu bytes of bitmap where a disk of %llu bytes needs %llu: looks like "
                   "one of the drafts v8 and v9 with a bit a cluster, which Drover does not read, "
                   "or its image file \"%s\" has grown",
                   image->path, (unsigned long long)have, (unsigned long long)size,
                   (unsigned long long)need, h->image);
}

static int take_parent(struct dr_image *image, struct dr_error *err)
{
    struct addcow_header *h = &addcow_of(image)->h;
    if (!h->backing || h->all)
        return 0;
    if (h->layout == ADDCOW_V7)
        return addcow_name_decode(image->path, h->backing, &image->backing_name,
                                  &image->backing_format, err);
    image->backing_name = strdup(h->backing);
    if (!image->backing_name)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    image->backing_format = h->backing_fmt ? strdup(h->backing_fmt) : NULL;
    return image->backing_format || !h->backing_fmt ? 0
                                                    : dr_fail_errno(err, ENOMEM, "%s", image->path);
}

static int addcow_open(struct dr_image *image, struct dr_error *err)
{
    struct addcow_state *s = calloc(1, sizeof(*s));
    if (!s)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    s->pending_end = &s->pending;
    image->state = s;
    int r = addcow_header_read(image->files[ADDCOW_META], &s->h, err);
    if (r == 0 && image->writable)
        r = addcow_refuse_write(image, err);
    bool whole = !(image->flags & DR_OPEN_RECORDED);
    if (r == 0 && whole)
        r = open_raw(image, err);
    if (r == 0 && whole)
        r = check_sizes(image, err);
    return r < 0 ? r : take_parent(image, err);
}

static void addcow_close(struct dr_image *image)
{
    struct addcow_state *s = addcow_of(image);
    if (!s)
        return;
    for (struct addcow_pending *p = s->pending, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    addcow_header_free(&s->h);
    free(s);
    image->state = NULL;
}

/* ------------------------------------------------------------------ map */

static void addcow_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    *ulen = addcow_of(image)->h.granule;
    *uoff = dr_round_down(off, *ulen);
}

/* Bits from `bit` on that are alike as far as the page, or the hole it lies in, tells; < end. */
static uint64_t run_in_page(struct dr_image *image, const struct dr_page *page, uint64_t bit,
                            uint64_t end, bool *set)
{
    uint64_t start = addcow_of(image)->h.bitmap_off, at = start + bit / 8;
    uint64_t zero_until = dr_page_zero_until(image, page), first = bit - bit % 8;
    if (zero_until > at) {
        *set = false;
        return dr_min(end, (zero_until - start) * 8) - bit;
    }
    uint64_t bytes = dr_round_down(at, DR_PAGE_SIZE) + DR_PAGE_SIZE - at;
    return addcow_run(dr_page_at(page, at), bit - first, dr_min(end - first, bytes * 8), set);
}

static int addcow_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                      struct dr_error *err)
{
    (void)err;
    const struct addcow_header *h = &addcow_of(image)->h;
    bool set = true;
    if (!h->all) {
        struct dr_page *page;
        uint64_t bit = off / h->granule, end = addcow_bits(h, off + len);
        int r = dr_page_get(image, ADDCOW_META, h->bitmap_off + bit / 8, &page);
        if (r < 0)
            return r;
        end = bit + run_in_page(image, page, bit, end, &set);
        len = dr_min(len, end * h->granule - off);
    }
    *ext = (struct dr_extent){.kind = DR_HOLE, .len = len};
    if (set) {
        ext->kind = DR_DATA;
        ext->file = image->files[ADDCOW_RAW];
        ext->host = off;
        ext->in_place = h->layout == ADDCOW_V7;
        ext->flat = true;
    }
    return 0;
}

/* The file that remains when the metadata and the parents are thrown away. */
static struct dr_file *addcow_plain(const struct dr_image *image)
{
    return image->files[ADDCOW_RAW];
}

const struct dr_format dr_format_addcow = {
    .name = "add-cow",
    .flags = DR_FORMAT_BACKING | DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_PUNCH_FREED,
    .create_options = addcow_create_options,
    .default_parent = "raw",
    .snapshot_suffix = "add-cow",
    .span = ADDCOW_SPAN,
    .probe = addcow_probe,
    .open = addcow_open,
    .close = addcow_close,
    .create = addcow_create,
    .measure = addcow_measure,
    .plain = addcow_plain,
    .unit = addcow_unit,
    .map = addcow_map,
    .reserve = addcow_reserve,
    .publish = addcow_publish,
    .cancel = addcow_cancel,
    .reuse = addcow_reuse,
    .begin_write = addcow_begin_write,
    .set_backing = addcow_set_backing,
    .check_backing = addcow_check_backing,
    .resize = addcow_resize,
    .trim = addcow_trim,
    .info = addcow_info,
    .check = addcow_check,
};
