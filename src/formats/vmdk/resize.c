/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Another size of the disk. The descriptor's lines are what says the size, so writing them is the
 * switch. Growing: whatever the new lines speak of is made, durably, before: tables (tables.c), new
 * extents of a split disk, longer files. Shrinking: the lines first, then what they no longer speak
 * of is given back. A crash leaves the old size or the new one, and at most files or space that
 * nothing leads to. */
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"

/* One change of size. */
struct resize {
    struct dr_image *image;
    struct vmdk_state *s;
    uint64_t old, size;
    uint64_t parent_size;
    struct vmdk_desc desc; /* as it will be; has no text any more once it holds */
    bool storing;          /* it may be on disk, whatever came of writing it */
    char **made;           /* paths of new extents */
    size_t n_made;
};

static struct vmdk_extent *last_extent(const struct resize *z)
{
    return &z->s->extents[z->s->n_extents - 1];
}

/* A piece of a split disk has a bound, so such a disk grows by pieces. */
static bool is_split(const struct vmdk_state *s)
{
    CLEANUP_FREE char *type = vmdk_desc_get(&s->desc, "createType");
    return type && strcasestr(type, "GbMaxExtent");
}

/* The geometry follows where the descriptor has room for it. -ENOSPC: not even for the lines. */
static int try_lines(struct resize *z, struct dr_error *err)
{
    struct vmdk_desc with;
    int r = vmdk_desc_parse(&with, z->image->path, z->desc.text, z->desc.len, err);
    if (r < 0)
        return r;
    r = vmdk_desc_set_cylinders(&with, z->size / VMDK_SECTOR, NULL);
    if (r == 0)
        r = vmdk_store(z->image, &with, VMDK_STORE_TRY, NULL);
    if (r < 0) {
        vmdk_desc_free(&with);
        return vmdk_store(z->image, &z->desc, VMDK_STORE_TRY, err);
    }
    vmdk_desc_free(&z->desc);
    z->desc = with;
    return 0;
}

static int store_lines(struct resize *z, struct dr_error *err)
{
    z->storing = true;
    return vmdk_store(z->image, &z->desc, 0, err);
}

/* ------------------------------------------------------------------ the last extent grows */

/* A flat file may be longer than its extent, and have anything there. */
static int grow_flat(struct resize *z, struct vmdk_extent *e, uint64_t len, struct dr_error *err)
{
    struct dr_file *f = z->image->files[e->file];
    uint64_t from = e->host + e->len, end = e->host + len, size = dr_file_size(f);
    int r = 0;
    for (size_t i = 0; i < z->s->n_extents; i++) {
        const struct vmdk_extent *other = &z->s->extents[i];
        if (other != e && other->file == e->file && other->host + other->len > from)
            return dr_fail(err, EINVAL, "%s: cannot grow: another extent stands behind it in %s",
                           z->image->path, f->path);
    }
    if (f->block_device && size < end)
        return dr_fail(err, ENOSPC,
                       "%s: a device of %" PRIu64 " bytes, the disk would need %" PRIu64, f->path,
                       size, end);
    if (size > from)
        r = dr_file_zero(f, from, dr_min(size, end) - from, DR_FILE_ZERO_PUNCH, err);
    if (r == 0 && size < end)
        r = dr_file_truncate(f, end, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* What the core could not fill, without the parent at hand, must be this image's own. */
static int check_last_grain(struct resize *z, const struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_extent ext;
    uint64_t start = dr_round_down(e->len, e->grain);
    if (z->parent_size <= z->old || start == e->len)
        return 0;
    int r = dr_image_map(z->image, e->start + start, e->len - start, &ext, err);
    if (r < 0 || ext.kind != DR_HOLE)
        return r;
    return dr_fail(err, EINVAL,
                   "%s: cannot grow without its parent: the last %" PRIu64 " bytes come from there",
                   z->image->path, e->len - start);
}

/* Zeros where a longer parent would show: [from, to) of the disk. */
static int mask_parent(struct resize *z, struct vmdk_extent *e, uint64_t from, uint64_t to,
                       struct dr_error *err)
{
    to = dr_min(to, z->parent_size);
    return to > from ? vmdk_mask(z->image, e, from - e->start, to - e->start, err) : 0;
}

static int grow_sparse(struct resize *z, struct vmdk_extent *e, uint64_t len, struct dr_error *err)
{
    int r = check_last_grain(z, e, err);
    if (r == 0)
        r = vmdk_clear_behind(z->image, e, e->len, false, err);
    if (r == 0)
        r = vmdk_set_capacity(z->image, e, dr_max(len / VMDK_SECTOR, e->h.capacity), err);
    return r < 0 ? r : mask_parent(z, e, z->old, e->start + len, err);
}

static int grow_last(struct resize *z, struct dr_error *err)
{
    struct vmdk_extent *e = last_extent(z);
    uint64_t len = e->len + (z->size - z->old);
    int r = vmdk_desc_set_sectors(&z->desc, e->line, len / VMDK_SECTOR, err);
    if (r == 0)
        r = try_lines(z, err);
    if (r == 0 && e->type == VMDK_SPARSE)
        r = grow_sparse(z, e, len, err);
    else if (r == 0 && e->type != VMDK_ZERO)
        r = grow_flat(z, e, len, err);
    if (r == 0)
        r = store_lines(z, err);
    if (!z->desc.text) { /* also if it holds, but could not be written in full */
        DR_LOCK_SCOPE(&z->image->lock);
        e->len = e->there = len;
        z->image->size = z->size;
    }
    return r;
}

/* ------------------------------------------------------------------ a split disk gets pieces */

/* The name of the n-th piece behind the one called so: its last number, or one that is added,
 * counts up. */
static char *next_name(const char *name, unsigned n)
{
    const char *base = dr_path_basename(name), *dot = strrchr(base, '.');
    const char *end = dot && dot != base ? dot : base + strlen(base), *digits = end;
    char *next;
    while (digits > base && isdigit((unsigned char)digits[-1]) && end - digits < 9)
        digits--;
    unsigned long number = digits < end ? strtoul(digits, NULL, 10) : 1;
    int r = asprintf(&next, "%.*s%s%0*lu%s", (int)(digits - name), name, digits < end ? "" : "-",
                     digits < end ? (int)(end - digits) : 3, number + n, end);
    return r < 0 ? NULL : next;
}

/* The next file beside the last extent's, and its name in the text. Names that are taken are passed
 * over: an interrupted resize may have left them, or somebody else. */
static int make_piece(struct resize *z, uint64_t sectors, unsigned *n, char **name,
                      struct dr_error *err)
{
    const struct vmdk_extent *like = last_extent(z);
    const struct vmdk_new_extent how = {.sparse = like->type == VMDK_SPARSE,
                                        .zero_grains = vmdk_has_zero_grains(like),
                                        .sectors = sectors,
                                        .grain = like->h.grain};
    char **made = realloc(z->made, (z->n_made + 1) * sizeof(*made));
    int r = -EEXIST;
    if (!made)
        return dr_fail_errno(err, ENOMEM, "%s", z->image->path);
    z->made = made;
    while (r == -EEXIST) {
        CLEANUP_FREE char *path = next_name(vmdk_extent_path(z->image, like), ++*n);
        *name = next_name(z->s->desc.extents[like->line].name, *n);
        if (!path || !*name)
            return dr_fail_errno(err, ENOMEM, "%s", z->image->path);
        r = vmdk_make_extent(z->image->fs, path, &how, err);
        if (r == 0)
            z->made[z->n_made++] = DR_STEAL(path);
        if (r < 0) {
            free(*name);
            *name = NULL;
        }
    }
    if (r == 0 && err)
        *err = (struct dr_error){0};
    return r;
}

/* Open what was made as the extent behind the last one, which does not count yet. */
static int open_piece(struct resize *z, struct vmdk_extent *e, const char *name, uint64_t sectors,
                      struct dr_error *err)
{
    const struct vmdk_extent *like = last_extent(z);
    uint8_t buf[VMDK_HEADER_SIZE];
    *e = (struct vmdk_extent){.type = like->type, .access = VMDK_RW, .len = sectors * VMDK_SECTOR};
    e->there = e->len;
    memcpy(e->type_name, like->type_name, sizeof(e->type_name));
    int r = vmdk_open_name(z->image, e, name, err);
    if (r < 0 || e->type != VMDK_SPARSE)
        return r;
    struct dr_file *f = z->image->files[e->file];
    r = dr_file_pread(f, buf, 0, sizeof(buf), err);
    if (r == 0)
        r = vmdk_header_decode(&e->h, f->path, buf, dr_file_size(f), err);
    e->grain = e->h.grain * VMDK_SECTOR;
    return r;
}

/* Give the disk one more piece, of at most `left` sectors. */
static int add_piece(struct resize *z, struct vmdk_extent *e, uint64_t start, uint64_t left,
                     unsigned *n, struct dr_error *err)
{
    CLEANUP_FREE char *name = NULL;
    uint64_t sectors = dr_min(left, VMDK_SPLIT_SECTORS);
    int r = make_piece(z, sectors, n, &name, err);
    if (r == 0)
        r = vmdk_desc_add_extent(&z->desc, z->desc.n_extents - 1, sectors, name, err);
    if (r == 0)
        r = open_piece(z, e, name, sectors, err);
    if (r < 0)
        return r;
    e->line = z->desc.n_extents - 1;
    e->start = start;
    if (e->type == VMDK_SPARSE)
        r = mask_parent(z, e, start, start + e->len, err);
    return r;
}

/* The array moves under the lock: somebody may be looking up where the disk's bytes are. */
static int room_for(struct resize *z, size_t more, struct dr_error *err)
{
    DR_LOCK_SCOPE(&z->image->lock);
    struct vmdk_extent *all =
        realloc(z->s->extents, (z->s->n_extents + more) * sizeof(*z->s->extents));
    if (!all)
        return dr_fail_errno(err, ENOMEM, "%s", z->image->path);
    z->s->extents = all;
    return 0;
}

static int add_pieces(struct resize *z, struct dr_error *err)
{
    uint64_t left = (z->size - z->old) / VMDK_SECTOR;
    size_t more = (size_t)dr_div_up(left, VMDK_SPLIT_SECTORS), n_old = z->s->n_extents;
    struct vmdk_extent *e = last_extent(z);
    unsigned n = 0;
    if (e->line + 1 != z->desc.n_extents)
        return dr_fail(err, ENOTSUP, "%s: cannot grow: its last extent has no sectors",
                       z->image->path);
    /* An interrupted shrinking may have left entries behind the end. */
    int r = e->type == VMDK_SPARSE ? vmdk_clear_behind(z->image, e, e->len, false, err) : 0;
    if (r == 0)
        r = room_for(z, more, err);
    for (size_t i = 0; r == 0 && i < more; i++) {
        e = &z->s->extents[n_old + i];
        r = add_piece(z, e, e[-1].start + e[-1].len, left, &n, err);
        left -= dr_min(left, VMDK_SPLIT_SECTORS);
    }
    if (r == 0)
        r = try_lines(z, err);
    if (r == 0)
        r = z->image->fs->ops->sync_dir(z->image->fs, z->made[0], err);
    if (r == 0)
        r = store_lines(z, err);
    if (r < 0 && !z->storing)
        for (size_t i = z->n_made; i-- > 0;)
            z->image->fs->ops->unlink(z->image->fs, z->made[i], NULL);
    if (!z->desc.text) {
        DR_LOCK_SCOPE(&z->image->lock);
        z->s->n_extents += more;
        z->image->size = z->size;
    }
    return r;
}

static int grow(struct resize *z, struct dr_error *err)
{
    const struct vmdk_extent *e = last_extent(z);
    int r = e->type == VMDK_ZERO ? 0 : vmdk_check_writable(z->image, e, e->start, err);
    if (r == 0 && e->type != VMDK_ZERO)
        r = vmdk_begin_write(z->image, e->start, !(z->image->flags & DR_OPEN_UNCHANGED), err);
    if (r == 0) /* behind begin_write, which changes the text */
        r = vmdk_desc_copy(z->image, &z->desc, err);
    if (r < 0)
        return r;
    return is_split(z->s) && e->type != VMDK_ZERO && !e->h.cowd ? add_pieces(z, err)
                                                                : grow_last(z, err);
}

/* ------------------------------------------------------------------ shrinking */

/* Other extents may stand behind this one in the same file. */
static int cut_flat(const struct resize *z, const struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = z->image->files[e->file];
    for (size_t i = 0; i < z->s->n_extents; i++) {
        const struct vmdk_extent *other = &z->s->extents[i];
        if (other != e && other->file == e->file && other->host > e->host)
            return 0;
    }
    int r = f->block_device ? 0 : dr_file_truncate(f, e->host + e->len, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

/* Unlink the files of an extent that is gone, if no other extent has them. They stay open until the
 * image is closed: a job may be reading there. */
static void unlink_piece(const struct resize *z, const struct vmdk_extent *gone)
{
    if (gone->file == VMDK_NO_FILE || z->image->files[gone->file]->block_device)
        return;
    for (size_t i = 0; i < z->s->n_extents; i++)
        if (z->s->extents[i].file == gone->file)
            return;
    z->image->fs->ops->unlink(z->image->fs, vmdk_extent_path(z->image, gone), NULL);
    atomic_store(&z->image->files[gone->file]->unlinked, true);
}

/* The lines have the new size. */
static int cut_last(struct resize *z, uint64_t was, struct dr_error *err)
{
    struct vmdk_extent *e = last_extent(z);
    if (e->file == VMDK_NO_FILE)
        return 0;
    if (e->type != VMDK_SPARSE)
        return cut_flat(z, e, err);
    int r = vmdk_clear_behind(z->image, e, was, true, err);
    if (r == 0)
        r = vmdk_set_capacity(z->image, e, e->len / VMDK_SECTOR, err);
    return r < 0 ? r : vmdk_trim(z->image, err);
}

/* The disk consists of the first `keep` extents, the last of which has this length. */
static int switch_to_less(struct resize *z, size_t keep, uint64_t len, struct dr_error *err)
{
    int r = try_lines(z, err);
    if (r == 0)
        r = store_lines(z, err);
    if (r < 0) /* the old size may hold: nothing is given up */
        return r;
    DR_LOCK_SCOPE(&z->image->lock);
    z->s->n_extents = keep;
    z->s->extents[keep - 1].len = z->s->extents[keep - 1].there = len;
    z->image->size = z->size;
    return 0;
}

static int shrink(struct resize *z, struct dr_error *err)
{
    size_t n = z->s->n_extents, keep = n;
    while (z->s->extents[keep - 1].start >= z->size)
        keep--;
    struct vmdk_extent *e = &z->s->extents[keep - 1];
    uint64_t len = z->size - e->start, was = e->len;
    bool fixed = e->type == VMDK_ZERO;
    int r = fixed ? 0 : vmdk_check_writable(z->image, e, e->start, err);
    if (r == 0 && !fixed)
        r = vmdk_begin_write(z->image, e->start, !(z->image->flags & DR_OPEN_UNCHANGED), err);
    if (r == 0) /* behind begin_write, which changes the text */
        r = vmdk_desc_copy(z->image, &z->desc, err);
    for (size_t i = n; r == 0 && i-- > keep;)
        r = vmdk_desc_remove_extent(&z->desc, z->s->extents[i].line, err);
    if (r == 0)
        r = vmdk_desc_set_sectors(&z->desc, e->line, len / VMDK_SECTOR, err);
    if (r == 0)
        r = switch_to_less(z, keep, len, err);
    if (r < 0)
        return r;
    for (size_t i = keep; i < n; i++) {
        unlink_piece(z, &z->s->extents[i]);
        free(z->s->extents[i].free);
    }
    if (keep < n)
        z->image->fs->ops->sync_dir(z->image->fs, z->image->path, NULL);
    return cut_last(z, was, err);
}

/* ------------------------------------------------------------------ all together */

static int check_types(const struct dr_image *image, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent *e = &s->extents[i];
        if (e->type != VMDK_SPARSE && e->type != VMDK_FLAT && e->type != VMDK_VMFS &&
            e->type != VMDK_ZERO)
            return dr_fail(err, ENOTSUP, "%s: extents of type %s cannot change their size",
                           image->path, e->type_name);
    }
    return 0;
}

/* Those of ESX count in 32 bits. */
static int check_last_length(const struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    const struct vmdk_extent *e = &s->extents[s->n_extents - 1];
    struct vmdk_header h = e->h;
    if (!e->h.cowd || size <= image->size)
        return 0;
    return vmdk_cowd_resized(&h, vmdk_extent_path(image, e), (size - e->start) / VMDK_SECTOR, err);
}

int vmdk_may_resize(struct dr_image *image, uint64_t size, struct dr_error *err)
{
    const char *path = image->path;
    if (size % VMDK_SECTOR)
        return dr_fail(err, EINVAL, "%s: The new size must be a multiple of 512", path);
    if (size == 0 || vmdk_of(image)->n_extents == 0)
        return dr_fail(err, EINVAL, "%s: a VMDK %s", path,
                       size == 0 ? "cannot be made empty" : "without sectors cannot grow");
    if (size > VMDK_MAX_SECTORS * VMDK_SECTOR - VMDK_SECTOR)
        return dr_fail(err, EFBIG, "%s: %" PRIu64 " bytes are more than a VMDK can have", path,
                       size);
    int r = check_types(image, err);
    return r < 0 ? r : check_last_length(image, size, err);
}

int vmdk_resize(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err)
{
    struct resize z = {.image = image,
                       .s = vmdk_of(image),
                       .old = image->size,
                       .size = size,
                       .parent_size = parent_size};
    if (size == z.old)
        return 0;
    int r = size > z.old ? grow(&z, err) : shrink(&z, err);
    vmdk_desc_free(&z.desc);
    for (size_t i = 0; i < z.n_made; i++)
        free(z.made[i]);
    free(z.made);
    return r;
}
