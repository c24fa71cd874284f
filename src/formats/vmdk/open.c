/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening and closing, and the driver's table. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/cowd.h"
#include "formats/vmdk/sesparse.h"
#include "formats/vmdk/stream.h"

static int vmdk_probe(const uint8_t *buf, size_t len, const char *path)
{
    (void)path;
    char text[VMDK_PEEK_MOST];
    if (vmdk_magic(buf, len) != VMDK_MAGIC_NONE)
        return 100;
    size_t n = vmdk_text_peek(buf, len, text);
    return vmdk_desc_probe((const uint8_t *)text, n);
}

/* ------------------------------------------------------------------ the descriptor */

static int read_embedded(struct dr_image *image, const uint8_t *buf, struct vmdk_header *h,
                         struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    struct dr_file *f = image->files[0];
    int r = vmdk_header_decode(h, image->path, buf, dr_file_size(f), err);
    if (r < 0)
        return r;
    if (h->desc_off == 0 || h->desc_len == 0)
        return dr_fail(err, EINVAL,
                       "%s: an extent without a descriptor, part of a split disk: open the disk's "
                       "descriptor file instead",
                       image->path);
    s->embedded = true;
    s->desc_off = h->desc_off * VMDK_SECTOR;
    s->desc_area = h->desc_len * VMDK_SECTOR;
    CLEANUP_FREE char *text = NULL;
    size_t len;
    r = vmdk_load_embedded(f, s->desc_off, s->desc_area, &text, &len, &s->redo, err);
    return r < 0 ? r : vmdk_desc_parse(&s->desc, image->path, text, len, err);
}

static int read_text(struct dr_image *image, struct dr_error *err)
{
    struct dr_file *f = image->files[0];
    uint64_t size = dr_file_size(f);
    if (size >= VMDK_DESC_MAX)
        return dr_fail(err, EINVAL,
                       "%s: no VMDK: neither a sparse extent nor a descriptor (%llu "
                       "bytes, expected less than %u)",
                       image->path, (unsigned long long)size, VMDK_DESC_MAX);
    CLEANUP_FREE char *text = malloc((size_t)size + 1);
    if (!text)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    size_t len = (size_t)size;
    int r = dr_file_pread(f, text, 0, len, err);
    if (r == 0)
        r = vmdk_text_decode(image->path, &text, &len, &vmdk_of(image)->recoded, err);
    return r < 0 ? r : vmdk_desc_parse(&vmdk_of(image)->desc, image->path, text, len, err);
}

static int read_descriptor(struct dr_image *image, struct vmdk_header *h, struct dr_error *err)
{
    uint8_t buf[VMDK_HEADER_SIZE] = {0};
    size_t got;
    int r = dr_file_pread_short(image->files[0], buf, 0, sizeof(buf), &got, err);
    if (r < 0)
        return r;
    if (vmdk_magic(buf, got) == VMDK_MAGIC_NONE)
        return read_text(image, err);
    if (vmdk_magic(buf, got) == VMDK_MAGIC_COWD || vmdk_magic(buf, got) == VMDK_MAGIC_SESPARSE)
        return vmdk_open_bare(image, vmdk_magic(buf, got), h, err);
    if (got < sizeof(buf) && vmdk_magic(buf, got) == VMDK_MAGIC_KDMV)
        return dr_fail(err, EINVAL, "%s: File truncated, expecting at least %zu bytes", image->path,
                       sizeof(buf));
    return read_embedded(image, buf, h, err);
}

/* ------------------------------------------------------------------ extents */

/* A large directory is read when it is needed; that it is all there is checked now. */
static int check_directory(const struct dr_image *image, const struct vmdk_extent *e,
                           uint64_t sector, struct dr_error *err)
{
    const struct dr_file *f = image->files[e->file];
    uint64_t off = sector * VMDK_SECTOR, len = e->h.n_tables * 4;
    if (dr_inside(off, len, dr_file_size(f)))
        return 0;
    return dr_fail(err, EIO, "%s: ends at %llu, expected %llu bytes at offset %llu", f->path,
                   (unsigned long long)dr_file_size(f), (unsigned long long)len,
                   (unsigned long long)off);
}

static int open_sparse(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    if (e->len > dr_round_up(e->h.capacity, e->h.grain) * VMDK_SECTOR)
        return dr_fail(err, EINVAL,
                       "%s: the descriptor says %llu sectors, the extent holds only %llu",
                       vmdk_extent_path(image, e), (unsigned long long)(e->len / VMDK_SECTOR),
                       (unsigned long long)e->h.capacity);
    e->grain = e->h.grain * VMDK_SECTOR;
    image->unclean |= e->h.unclean || e->h.inconsistent;
    int r = vmdk_is_stream(e) ? vmdk_stream_open(image, e, err) : 0;
    if (r < 0 || e->scanned)
        return r;
    r = check_directory(image, e, e->h.gd_off, err);
    if (r == 0 && vmdk_has_copies(e))
        r = check_directory(image, e, e->h.rgd_off, err);
    return r == 0 && !e->h.cowd ? vmdk_learn_tables(image, e, err) : r;
}

/* One file may serve several flat extents (partitions of a device), but is opened once. */
static struct vmdk_extent *same_file(const struct dr_image *image, const struct vmdk_extent *e,
                                     const char *name)
{
    struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        struct vmdk_extent *other = &s->extents[i];
        if (other != e && other->file != VMDK_NO_FILE &&
            strcmp(s->desc.extents[other->line].name, name) == 0)
            return other;
    }
    return NULL;
}

/* Two sparse extents in one file would hand out the same sectors twice. */
static int check_twice(const struct dr_image *image, const struct vmdk_extent *e,
                       struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    const struct dr_file *f = image->files[e->file];
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent *other = &s->extents[i];
        if (other == e || other->file == VMDK_NO_FILE ||
            !dr_file_same(f, image->files[other->file]))
            continue;
        if (vmdk_has_tables(e) || vmdk_has_tables(other))
            return dr_fail(err, EINVAL, "%s: two extents name the file %s", image->path, f->path);
    }
    return 0;
}

static int find_file(struct dr_image *image, struct vmdk_extent *e, const char *name,
                     struct dr_error *err)
{
    const struct vmdk_extent *other = same_file(image, e, name);
    if (other)
        e->file = other->file;
    if (other && !vmdk_has_tables(e) && !vmdk_has_tables(other))
        return 0; /* looked at when it was opened: a text can name one file tens of thousands times
                   */
    int r = other ? 0 : vmdk_open_name(image, e, name, err);
    return r < 0 ? r : check_twice(image, e, err);
}

static int read_sparse_header(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    uint8_t buf[VMDK_HEADER_SIZE];
    struct dr_file *f = image->files[e->file];
    size_t got = 0;
    int r = dr_file_pread_short(f, buf, 0, sizeof(buf), &got, err);
    if (r == 0 && vmdk_magic(buf, got) == VMDK_MAGIC_COWD)
        return vmdk_cowd_read(&e->h, f->path, f, NULL, err);
    if (r == 0 && got < sizeof(buf))
        return dr_fail(err, EINVAL, "%s: File truncated, expecting at least %zu bytes", f->path,
                       sizeof(buf));
    return r < 0 ? r : vmdk_header_decode(&e->h, f->path, buf, dr_file_size(f), err);
}

/* The descriptor may want more than the file has. A salvage takes the whole sectors that exist. */
static int check_flat_size(const struct dr_image *image, struct vmdk_extent *e,
                           struct dr_error *err)
{
    uint64_t size = dr_file_size(image->files[e->file]);
    if (dr_inside(e->host, e->len, size))
        return 0;
    if (image->flags & DR_OPEN_SALVAGE) {
        e->there = size > e->host ? dr_round_down(size - e->host, VMDK_SECTOR) : 0;
        return 0;
    }
    return dr_fail(
        err, EINVAL,
        "%s: File truncated, expecting at least %llu bytes: the descriptor wants %llu at "
        "%llu, the file ends at %llu; `drover convert --salvage` takes what is there",
        vmdk_extent_path(image, e), (unsigned long long)(e->host + e->len),
        (unsigned long long)e->len, (unsigned long long)e->host, (unsigned long long)size);
}

static int open_extent_file(struct dr_image *image, struct vmdk_extent *e,
                            const struct vmdk_extent_line *line, struct dr_error *err)
{
    int r = find_file(image, e, line->name, err);
    if (r < 0)
        return r;
    if (e->type == VMDK_SPARSE) {
        r = read_sparse_header(image, e, err);
        return r < 0 ? r : open_sparse(image, e, err);
    }
    if (e->type == VMDK_SESPARSE)
        return vmdk_sesparse_open(image, e, err);
    e->host = line->offset * VMDK_SECTOR;
    return check_flat_size(image, e, err);
}

/* A salvage goes on without an extent that is not there, or whose header is damaged. */
static int open_or_miss(struct dr_image *image, struct vmdk_extent *e,
                        const struct vmdk_extent_line *line, struct dr_error *err)
{
    bool salvage = image->flags & DR_OPEN_SALVAGE;
    int r = open_extent_file(image, e, line, err);
    if (r == 0 || !salvage || (r != -ENOENT && r != -EINVAL && r != -EIO))
        return r;
    dr_error_reset(err);
    e->type = VMDK_ABSENT;
    e->grain = 0;
    e->file = VMDK_NO_FILE;
    return 0;
}

static int refuse_type(const struct dr_image *image, const struct vmdk_extent_line *line,
                       struct dr_error *err)
{
    static const struct {
        const char *type, *why;
    } known[] = {
        {"VMFSRDM", "it maps a device of an ESXi host, and holds no data: copy the disk there"},
        {"VSANSPARSE", "it is an object of a vSAN, not a file: export the disk there"},
    };
    const char *why = "not supported yet";
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (strcasecmp(line->type_name, known[i].type) == 0)
            why = known[i].why;
    return dr_fail(err, ENOTSUP, "%s: extent type %s (%s): %s", image->path, line->type_name,
                   line->name ? line->name : "no file", why);
}

/* first: the header of files[0] if the descriptor is embedded and this is its first extent. */
static int open_extent(struct dr_image *image, const struct vmdk_extent_line *line,
                       const struct vmdk_header *first, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    if (line->type == VMDK_UNSUPPORTED)
        return refuse_type(image, line, err);
    uint64_t len = line->sectors * VMDK_SECTOR;
    if (line->sectors == 0 && !first)
        return 0; /* VirtualBox's placeholder "NOACCESS 0 ZERO" */
    if (len >= VMDK_MAX_SECTORS * VMDK_SECTOR - image->size) /* bytes stay below 2^63 */
        return dr_fail(err, EINVAL, "%s: the extents are more than %llu sectors", image->path,
                       (unsigned long long)VMDK_MAX_SECTORS - 1);
    struct vmdk_extent *e = &s->extents[s->n_extents++];
    e->line = (size_t)(line - s->desc.extents);
    e->type = line->type;
    e->access = line->access;
    memcpy(e->type_name, line->type_name, sizeof(e->type_name));
    e->start = image->size;
    e->len = e->there = len;
    e->file = VMDK_NO_FILE;
    image->size += len;
    if (first) {
        e->file = 0; /* whatever the name says: files get renamed */
        e->h = *first;
        return e->type == VMDK_SESPARSE ? vmdk_sesparse_open(image, e, err)
                                        : open_sparse(image, e, err);
    }
    if (e->type == VMDK_ZERO)
        return 0;
    if (e->access == VMDK_NOACCESS) {
        e->type = VMDK_ABSENT;
        return 0;
    }
    return open_or_miss(image, e, line, err);
}

static int open_extents(struct dr_image *image, const struct vmdk_header *h, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    size_t n = s->desc.n_extents;
    if (n == 0)
        return dr_fail(err, EINVAL, "%s: the descriptor names no extent", image->path);
    if (s->embedded && !s->bare && s->desc.extents[0].type != VMDK_SPARSE)
        return dr_fail(err, EINVAL,
                       "%s: the first extent of an embedded descriptor is %s, expected SPARSE",
                       image->path, s->desc.extents[0].type_name);
    s->extents = calloc(n, sizeof(s->extents[0]));
    if (!s->extents)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = 0;
    for (size_t i = 0; r == 0 && i < n; i++)
        r = open_extent(image, &s->desc.extents[i], s->embedded && i == 0 ? h : NULL, err);
    return r;
}

/* ------------------------------------------------------------------ overlaps */

static bool in_flat_file(const struct vmdk_extent *e)
{
    return e->file != VMDK_NO_FILE && !vmdk_has_tables(e);
}

static int by_place(const void *a, const void *b)
{
    const struct vmdk_extent *x = *(struct vmdk_extent *const *)a,
                             *y = *(struct vmdk_extent *const *)b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->host < y->host ? -1 : x->host > y->host;
}

int vmdk_each_overlap(const struct dr_image *image, vmdk_overlap_fn each, void *user,
                      struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    size_t n = 0;
    CLEANUP_FREE struct vmdk_extent **all = malloc(s->n_extents * sizeof(struct vmdk_extent *));
    if (!all && s->n_extents > 0)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    for (size_t i = 0; i < s->n_extents; i++)
        if (in_flat_file(&s->extents[i]))
            all[n++] = &s->extents[i];
    if (n > 1)
        qsort(all, n, sizeof(struct vmdk_extent *), by_place);
    const struct vmdk_extent *last = NULL; /* the one that reaches furthest */
    for (size_t i = 0; i < n; i++) {
        bool shares = last && last->file == all[i]->file && all[i]->host < last->host + last->len;
        int r = shares && (last->access == VMDK_RW || all[i]->access == VMDK_RW)
                    ? each(user, last, all[i], err)
                    : 0;
        if (r < 0)
            return r;
        if (!shares || all[i]->host + all[i]->len > last->host + last->len)
            last = all[i];
    }
    return 0;
}

/* Writing one guest range would change another. */
static int refuse_overlap(void *user, const struct vmdk_extent *a, const struct vmdk_extent *b,
                          struct dr_error *err)
{
    const struct dr_image *image = user;
    return dr_fail(err, EROFS,
                   "%s: two extents share the bytes of %s from %llu on: the disk can be read, but "
                   "not written",
                   image->path, image->files[a->file]->path, (unsigned long long)b->host);
}

/* ------------------------------------------------------------------ streams */

int vmdk_refuse_streams(const struct dr_image *image, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    if (s->bare)
        return dr_fail(err, EROFS,
                       "%s: an ESX extent without its descriptor, where the content id stands, can "
                       "be read, but not written",
                       image->path);
    for (size_t i = 0; i < s->n_extents; i++)
        if (vmdk_is_stream(&s->extents[i]))
            return dr_fail(err, EROFS,
                           "%s: streamOptimized disks are written once and cannot be changed; "
                           "convert it, or create an overlay on it",
                           vmdk_extent_path(image, &s->extents[i]));
    for (size_t i = 0; i < s->n_extents; i++)
        if (s->extents[i].type == VMDK_SESPARSE)
            return dr_fail(err, EROFS,
                           "%s: seSparse disks can only be read: convert it, or create an overlay "
                           "on it",
                           vmdk_extent_path(image, &s->extents[i]));
    return 0;
}

/* ------------------------------------------------------------------ the parent */

static int read_ids(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    s->parent_cid = VMDK_NO_PARENT;
    int r = vmdk_desc_get_id(&s->desc, image->path, "CID", &s->cid, err);
    if (r == -ENOENT)
        return dr_fail(err, EINVAL, "%s: no line 'CID=' in the VMDK descriptor", image->path);
    if (r == 0)
        r = vmdk_desc_get_id(&s->desc, image->path, "parentCID", &s->parent_cid, err);
    return r == -ENOENT ? 0 : r;
}

static int read_backing(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    CLEANUP_FREE char *hint = vmdk_desc_get(&s->desc, "parentFileNameHint");
    bool alone = image->flags & DR_OPEN_NO_BACKING;
    if (!hint && vmdk_desc_find(&s->desc, "parentFileNameHint"))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    if (!alone) {
        int r = vmdk_find_by_uuid(image, err);
        if (r < 0)
            return r;
    }
    if (hint && hint[0] && !s->by_uuid) {
        image->backing_name = vmdk_desc_to_utf8(&s->desc, hint);
        if (!image->backing_name)
            image->backing_name = DR_STEAL(hint);
    }
    if (image->backing_name) {
        image->backing_format = strdup("vmdk");
        return image->backing_format ? 0 : dr_fail_errno(err, ENOMEM, "%s", image->path);
    }
    if (s->parent_cid != VMDK_NO_PARENT && !alone)
        return dr_fail(err, EINVAL,
                       "%s: made on a parent with CID %08x, but parentFileNameHint is missing",
                       image->path, s->parent_cid);
    return 0;
}

/* ------------------------------------------------------------------ open, close */

static int vmdk_open(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_header h = {0};
    image->state = calloc(1, sizeof(struct vmdk_state));
    if (!image->state)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    image->size = 0;
    int r = read_descriptor(image, &h, err);
    if (r == 0)
        r = vmdk_look_for_lock(image, err);
    if (r == 0)
        r = read_ids(image, err);
    if (r == 0)
        r = read_backing(image, err);
    if (r == 0 && !(image->flags & DR_OPEN_RECORDED))
        r = open_extents(image, &h, err);
    if (r == 0 && (image->flags & DR_OPEN_RDWR))
        r = vmdk_refuse_streams(image, err);
    if (r == 0 && (image->flags & DR_OPEN_RDWR))
        r = vmdk_each_overlap(image, refuse_overlap, image, err);
    image->unclean |= vmdk_of(image)->redo;
    return r;
}

static void vmdk_close(struct dr_image *image)
{
    struct vmdk_state *s = vmdk_of(image);
    if (!s)
        return;
    vmdk_compact_end(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        vmdk_drop_directories(&s->extents[i]);
        free(s->extents[i].free);
        free(s->extents[i].found);
        free(s->extents[i].se);
    }
    free(s->extents);
    vmdk_desc_free(&s->desc);
    free(s);
    image->state = NULL;
}

const struct dr_format dr_format_vmdk = {
    .name = "vmdk",
    .flags = DR_FORMAT_BACKING | DR_FORMAT_WRITE | DR_FORMAT_CREATE | DR_FORMAT_CONTENT_ID |
             DR_FORMAT_PUNCH_FREED | DR_FORMAT_REPAIR_AS_FOUND | DR_FORMAT_ADOPTS |
             DR_FORMAT_KEEPS_ZEROED,
    .create_options = vmdk_create_options,
    .parent_format = "vmdk",
    .snapshot_suffix = "vmdk",
    .probe = vmdk_probe,
    .open = vmdk_open,
    .close = vmdk_close,
    .create = vmdk_create,
    .measure = vmdk_measure,
    .unit = vmdk_unit,
    .map = vmdk_map,
    .reserve = vmdk_reserve,
    .publish = vmdk_publish,
    .cancel = vmdk_cancel,
    .reuse = vmdk_reuse,
    .decode = vmdk_decode,
    .sequential = &vmdk_sequential,
    .incoming = &vmdk_incoming,
    .begin_write = vmdk_begin_write,
    .end_write = vmdk_end_write,
    .set_backing = vmdk_set_backing,
    .amend = vmdk_amend,
    .amend_options = vmdk_amend_options,
    .backing_candidate = vmdk_backing_candidate,
    .check_backing = vmdk_check_backing,
    .id = vmdk_id,
    .parent_id = vmdk_parent_id,
    .commit_id = vmdk_commit_id,
    .set_id = vmdk_set_id,
    .set_parent_id = vmdk_set_parent_id,
    .may_resize = vmdk_may_resize,
    .resize = vmdk_resize,
    .recover = vmdk_recover,
    .trim = vmdk_trim,
    .compact_begin = vmdk_compact_begin,
    .compact_look = vmdk_compact_look,
    .compact_moves = vmdk_compact_moves,
    .compact_spare = vmdk_compact_spare,
    .compact_length = vmdk_compact_length,
    .compact_finish = vmdk_compact_finish,
    .compact_end = vmdk_compact_end,
    .info = vmdk_info,
    .check = vmdk_check,
};
