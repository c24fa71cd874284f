/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The public handle: every call passes the disk's gate (swap.c), works on the chain that it finds
 * there, and leaves. */
#include <stdio.h>

#include "core/internal.h"
#include "base/bytes.h"
#include "storage/source.h"

static struct dr_disk *disk_new(struct dr_fs *fs, struct dr_chain *chain, unsigned flags)
{
    struct dr_disk *disk = dr_calloc_lines(sizeof(*disk));
    if (!disk)
        return NULL;
    pthread_mutex_init(&disk->gate_lock, NULL);
    pthread_cond_init(&disk->gate_cond, NULL);
    pthread_mutex_init(&disk->kept_lock, NULL);
    disk->fs = fs;
    disk->chain = chain;
    chain->hooks = &disk->hooks;
    disk->flags = flags;
    return disk;
}

int dr_open_fs(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
               struct dr_disk **disk, struct dr_error *err)
{
    struct dr_chain *chain;
    int r = dr_chain_open(fs, path, options, &chain, err);
    if (r < 0)
        return r;
    *disk = disk_new(fs, chain, options ? options->flags : 0);
    if (*disk)
        return 0;
    dr_chain_unref(chain, NULL);
    return dr_fail(err, ENOMEM, "%s: out of memory", path);
}

int dr_open(const char *path, const struct dr_open_options *options, struct dr_disk **disk,
            struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    *disk = NULL;
    DR_REQUIRE(path, err);
    return dr_open_fs(dr_fs_posix(), path, options, disk, err);
}

/* ------------------------------------------------------------------ texts that were handed out */

struct dr_kept {
    struct dr_kept *next;
    char text[];
};

static void free_kept(struct dr_disk *disk)
{
    for (size_t i = 0; i < DR_KEPT_BUCKETS; i++)
        for (struct dr_kept *kept = disk->kept[i], *next; kept; kept = next) {
            next = kept->next;
            free(kept);
        }
}

static size_t kept_bucket(const char *text)
{
    size_t h = 5381;
    while (*text)
        h = h * 33 + (unsigned char)*text++;
    return h % DR_KEPT_BUCKETS;
}

static const char *find_kept(const struct dr_disk *disk, size_t bucket, const char *text)
{
    struct dr_kept *kept = atomic_load(&disk->kept[bucket]);
    while (kept && strcmp(kept->text, text) != 0)
        kept = kept->next;
    return kept ? kept->text : NULL;
}

/* The disk's own copy of a text of one of its images, which may be closed before the caller is done
 * with it. NULL for NULL, or when there is no memory. Looking one up takes no lock. */
static const char *keep_text(const struct dr_disk *asked, const char *text)
{
    struct dr_disk *disk = (struct dr_disk *)(uintptr_t)asked; /* the copies are not its state */
    if (!text)
        return NULL;
    size_t bucket = kept_bucket(text), len = strlen(text) + 1;
    const char *found = find_kept(disk, bucket, text);
    if (found)
        return found;
    DR_LOCK_SCOPE(&disk->kept_lock);
    found = find_kept(disk, bucket, text);
    if (found)
        return found;
    struct dr_kept *kept = malloc(sizeof(*kept) + len);
    if (!kept)
        return NULL;
    memcpy(kept->text, text, len);
    kept->next = disk->kept[bucket];
    atomic_store(&disk->kept[bucket], kept);
    return kept->text;
}

int dr_close(struct dr_disk *disk, struct dr_error *err)
{
    if (!disk)
        return 0;
    int r = dr_chain_unref(disk->chain, err);
    free_kept(disk);
    pthread_mutex_destroy(&disk->kept_lock);
    pthread_cond_destroy(&disk->gate_cond);
    pthread_mutex_destroy(&disk->gate_lock);
    free(disk);
    return r;
}

/* ------------------------------------------------------------------ questions */

/* The questions take a const disk; passing its gate changes nothing that can be seen. */
static struct dr_chain *enter_to_ask(const struct dr_disk *disk, struct dr_pass *pass)
{
    return dr_disk_enter((struct dr_disk *)(uintptr_t)disk, pass);
}

static void leave(const struct dr_disk *disk, struct dr_pass *pass)
{
    dr_disk_leave((struct dr_disk *)(uintptr_t)disk, pass);
}

uint64_t dr_size(const struct dr_disk *disk)
{
    struct dr_pass pass;
    uint64_t size = enter_to_ask(disk, &pass)->images[0]->size;
    leave(disk, &pass);
    return size;
}

bool dr_writable(const struct dr_disk *disk)
{
    struct dr_pass pass;
    bool writable = enter_to_ask(disk, &pass)->images[0]->writable;
    leave(disk, &pass);
    return writable;
}

uint32_t dr_block_size(const struct dr_disk *disk)
{
    const uint64_t without = 4096, least = 512, most = 2 << 20;
    struct dr_pass pass;
    struct dr_image *image = enter_to_ask(disk, &pass)->images[0];
    uint64_t uoff, ulen = without;
    if (!(image->fmt->flags & DR_FORMAT_NO_PROBE) && image->size > 0)
        image->fmt->unit(image, 0, &uoff, &ulen);
    leave(disk, &pass);
    uint64_t block = least; /* the only unit of a small disk may end with it */
    while (block < ulen && block < most)
        block *= 2;
    return (uint32_t)block;
}

size_t dr_chain_length(const struct dr_disk *disk)
{
    struct dr_pass pass;
    size_t n = enter_to_ask(disk, &pass)->n;
    leave(disk, &pass);
    return n;
}

const char *dr_image_path(const struct dr_disk *disk, size_t index)
{
    struct dr_pass pass;
    const struct dr_chain *chain = enter_to_ask(disk, &pass);
    const char *path = index < chain->n ? keep_text(disk, chain->images[index]->path) : NULL;
    leave(disk, &pass);
    return path;
}

const char *dr_image_format(const struct dr_disk *disk, size_t index)
{
    struct dr_pass pass;
    const struct dr_chain *chain = enter_to_ask(disk, &pass);
    const char *name = index < chain->n ? chain->images[index]->fmt->name : NULL;
    leave(disk, &pass);
    return name;
}

static const char *packer_of(const struct dr_image *image)
{
    uint8_t head[16];
    size_t got = 0;
    if (image->packer || !(image->fmt->flags & DR_FORMAT_NO_PROBE) || image->member ||
        image->n_files == 0 ||
        dr_file_pread_short(image->files[0], head, 0, sizeof(head), &got, NULL) < 0)
        return image->packer;
    return dr_source_compression_of(head, got);
}

const char *dr_image_packer(const struct dr_disk *disk, size_t index)
{
    struct dr_pass pass;
    const struct dr_chain *chain = enter_to_ask(disk, &pass);
    const char *name = index < chain->n ? packer_of(chain->images[index]) : NULL;
    leave(disk, &pass);
    return name;
}

uint64_t dr_image_size(const struct dr_disk *disk, size_t index)
{
    struct dr_pass pass;
    const struct dr_chain *chain = enter_to_ask(disk, &pass);
    uint64_t size = index < chain->n ? chain->images[index]->size : 0;
    leave(disk, &pass);
    return size;
}

const char *dr_image_backing_name(const struct dr_disk *disk, size_t index)
{
    struct dr_pass pass;
    const struct dr_chain *chain = enter_to_ask(disk, &pass);
    const char *name = index < chain->n ? keep_text(disk, chain->images[index]->backing_name)
                                        : NULL;
    leave(disk, &pass);
    return name;
}

/* ------------------------------------------------------------------ data */

/* Also where there is nothing to do. A flag that a later library may give a meaning is refused. */
static int may_change(const struct dr_chain *chain, unsigned flags, struct dr_error *err)
{
    const unsigned known = DR_FUA | DR_MAY_UNMAP | DR_EXPLICIT | DR_FAST;
    const struct dr_image *top = chain->images[0];
    if (flags & ~known)
        return dr_fail(err, EINVAL, "%s: unknown flags %#x", top->path, flags & ~known);
    if (!top->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", top->path);
    return 0;
}

int dr_pread(struct dr_disk *disk, void *buf, uint64_t off, size_t len, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE_N(buf, len, err);
    struct dr_pass pass;
    int r = dr_chain_read(dr_disk_enter(disk, &pass), 0, buf, off, len, err);
    dr_disk_leave(disk, &pass);
    return r;
}

/* What has to be flushed after a change with DR_FUA is flushed outside the gate, as by dr_flush():
 * whoever changes the chain meanwhile need not wait for that. */
int dr_pwrite(struct dr_disk *disk, const void *buf, uint64_t off, size_t len, unsigned flags,
              struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE_N(buf, len, err);
    struct dr_pass pass;
    bool durable = !(flags & DR_FUA);
    bool at_once = !durable && !dr_disk_is_about_to_change(disk);
    struct dr_chain *chain = dr_disk_enter(disk, &pass);
    int r = may_change(chain, flags, err);
    if (r == 0 && at_once)
        r = dr_chain_write_durable(chain, 0, buf, off, len, &durable, err);
    else if (r == 0)
        r = dr_chain_write(chain, 0, buf, off, len, err);
    dr_disk_leave(disk, &pass);
    return r < 0 || durable ? r : dr_disk_flush(disk, err);
}

int dr_zero(struct dr_disk *disk, uint64_t off, uint64_t len, unsigned flags, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(disk, &pass);
    int r = may_change(chain, flags, err);
    if (r == 0)
        r = dr_chain_zero(chain, 0, off, len, flags, err);
    dr_disk_leave(disk, &pass);
    return r < 0 || !(flags & DR_FUA) ? r : dr_disk_flush(disk, err);
}

int dr_discard(struct dr_disk *disk, uint64_t off, uint64_t len, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(disk, &pass);
    int r = may_change(chain, 0, err);
    if (r == 0)
        r = dr_chain_discard(chain, 0, off, len, err);
    dr_disk_leave(disk, &pass);
    return r;
}

int dr_flush(struct dr_disk *disk, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    return dr_disk_flush(disk, err);
}

/* A disk that grows shows zeros behind its old end, never its parent. The driver takes care of
 * whole units; the unit that the old end lies in is made this image's own here. */
static int fill_last_unit(struct dr_chain *chain, size_t at, uint64_t parent_size,
                          struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    uint64_t uoff, ulen, end = image->size;
    if (parent_size <= end || end == 0)
        return 0;
    image->fmt->unit(image, end - 1, &uoff, &ulen);
    if (uoff + ulen == end)
        return 0;
    CLEANUP_FREE uint8_t *buf = malloc(end - uoff);
    if (!buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = dr_chain_read(chain, at, buf, uoff, end - uoff, err);
    return r < 0 ? r : dr_chain_fill(chain, at, buf, uoff, end - uoff, err);
}

/* The unit that the old end lies in may be one that a snapshot has, too, or a coded one. Writing
 * its last byte again gives it a place of its own, with zeros behind the end. */
static int own_last_unit(struct dr_chain *chain, size_t at, struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    struct dr_extent ext;
    uint64_t uoff, ulen, end = image->size;
    uint8_t last;
    if (end == 0)
        return 0;
    image->fmt->unit(image, end - 1, &uoff, &ulen);
    int r = uoff + ulen == end ? 0 : dr_image_map(image, end - 1, 1, &ext, err);
    if (r < 0 || uoff + ulen == end || ext.kind == DR_HOLE || ext.kind == DR_ZERO || ext.in_place)
        return r;
    r = dr_chain_read(chain, at, &last, end - 1, 1, err);
    return r < 0 ? r : dr_chain_write(chain, at, &last, end - 1, 1, err);
}

static uint64_t parent_size_of(const struct dr_chain *chain, size_t at)
{
    if (chain->n > at + 1)
        return chain->images[at + 1]->size;
    return chain->images[at]->backing_name ? UINT64_MAX : 0;
}

static int refuse_resize(const struct dr_image *image, struct dr_error *err)
{
    char able[100] = "";
    const struct dr_format *fmt;
    for (size_t i = 0, n = 0; (fmt = dr_format_at(i)) && n < sizeof(able); i++)
        if (fmt->resize)
            n += (size_t)snprintf(able + n, sizeof(able) - n, "%s%s", n ? ", " : "", fmt->name);
    return dr_fail(err, ENOTSUP,
                   "%s: %s images cannot change their size; convert it to one that can: %s",
                   image->path, image->fmt->name, able);
}

static int switch_size(struct dr_chain *chain, size_t at, uint64_t size, struct dr_error *err)
{
    struct dr_image *image = chain->images[at];
    if (!image->writable)
        return dr_fail(err, EROFS, "%s: is open for reading only", image->path);
    if (!image->fmt->resize)
        return refuse_resize(image, err);
    if (size > INT64_MAX)
        return dr_fail(err, EFBIG, "%s: no disk is larger than 2^63-1 bytes", image->path);
    uint64_t below = parent_size_of(chain, at);
    int r = image->fmt->may_resize ? image->fmt->may_resize(image, size, err) : 0;
    if (r == 0)
        r = dr_image_begin(image, 0, !(image->flags & DR_OPEN_UNCHANGED), err);
    if (r == 0 && size > image->size && chain->n > at + 1)
        r = fill_last_unit(chain, at, below, err);
    if (r == 0 && size > image->size)
        r = own_last_unit(chain, at, err);
    if (r == 0)
        r = dr_chain_flush(chain, at, err);
    if (r == 0)
        r = dr_noting_check_size(image, size, err);
    if (r < 0)
        return r;
    uint64_t old = image->size;
    r = image->fmt->resize(image, size, below, err);
    dr_noting_resized(image, old);
    return r;
}

/* The size is switched. */
static int allocate_growth(struct dr_chain *chain, size_t at, uint64_t old,
                           enum dr_preallocation how, struct dr_error *err)
{
    const struct dr_image *image = chain->images[at];
    if (how == DR_PREALLOC_OFF && image->always_placed)
        how = DR_PREALLOC_METADATA;
    if (how == DR_PREALLOC_OFF || image->size <= old)
        return 0;
    int r = dr_chain_allocate(chain, at, old, image->size - old, how, err);
    return r < 0 ? r : dr_chain_flush(chain, at, err);
}

int dr_chain_resize(struct dr_chain *chain, size_t at, uint64_t size, struct dr_error *err)
{
    uint64_t old = chain->images[at]->size;
    int r = switch_size(chain, at, size, err);
    return r < 0 ? r : allocate_growth(chain, at, old, DR_PREALLOC_OFF, err);
}

struct resizing {
    uint64_t size;
    enum dr_preallocation prealloc;
};

static int resize_step(void *user, struct dr_chain *present, struct dr_chain **fresh,
                       struct dr_error *err)
{
    (void)fresh;
    const struct resizing *to = user;
    const struct dr_image *image = present->images[0];
    uint64_t old = image->size;
    bool fills = to->prealloc != DR_PREALLOC_OFF;
    if (fills && to->size < old)
        return dr_fail(err, EINVAL, "%s: Preallocation can't be used for shrinking an image",
                       image->path);
    if (to->prealloc == DR_PREALLOC_METADATA && (image->fmt->flags & DR_FORMAT_NO_PROBE))
        return dr_fail(err, ENOTSUP,
                       "%s: Unsupported preallocation mode: metadata: a %s disk has none",
                       image->path, image->fmt->name);
    int r = switch_size(present, 0, to->size, err);
    if (r < 0)
        return r;
    if (to->size < old) /* should it grow again, nothing of that is there any more */
        dr_hooks_after(present, to->size, old - to->size);
    r = allocate_growth(present, 0, old, to->prealloc, err);
    if (r == 0)
        return 0;
    bool back = switch_size(present, 0, old, NULL) == 0;
    return dr_prefix(err, r, "Could not preallocate new data%s",
                     back ? "" : ", and the disk keeps its new size");
}

int dr_resize(struct dr_disk *disk, uint64_t size, enum dr_preallocation prealloc,
              struct dr_error *err)
{
    struct resizing to = {size, prealloc};
    DR_REQUIRE(disk, err);
    if (prealloc > DR_PREALLOC_FULL)
        return dr_fail(err, EINVAL, "preallocation mode %u is not known", (unsigned)prealloc);
    int r = dr_disk_claim(disk, "resize", err);
    if (r < 0)
        return r;
    r = dr_disk_quiesce(disk, resize_step, &to, NULL, err);
    dr_disk_unclaim(disk);
    return r;
}

int dr_truncate(struct dr_disk *disk, uint64_t size, struct dr_error *err)
{
    return dr_resize(disk, size, DR_PREALLOC_OFF, err);
}

/* ------------------------------------------------------------------ where bytes live */

static int status_at(const struct dr_disk *disk, struct dr_chain *chain, uint64_t off, uint64_t len,
                     struct dr_extent_status *status, struct dr_error *err)
{
    struct dr_place place;
    bool zero = false;
    int r = dr_chain_map(chain, 0, off, len, &place, err);
    if (r == 0 && place.ext.kind == DR_DATA && place.ext.flat)
        r = dr_place_sparse(&place, &zero, err);
    dr_place_done(&place);
    if (r < 0)
        return r;
    *status = (struct dr_extent_status){.off = off, .len = place.ext.len};
    status->depth = (unsigned)(place.owner < chain->n ? place.owner : chain->n - 1);
    if (place.past_end) { /* no image has it; the parent's child is the last that could */
        status->flags = DR_EXTENT_ZERO;
        status->depth--;
        return 0;
    }
    switch (place.ext.kind) {
    case DR_HOLE:
        status->flags = DR_EXTENT_ZERO;
        break;
    case DR_ZERO:
        status->flags = DR_EXTENT_ALLOCATED | DR_EXTENT_ZERO;
        break;
    case DR_DATA:
        status->flags = DR_EXTENT_ALLOCATED | (zero ? DR_EXTENT_ZERO : DR_EXTENT_DATA);
        if (place.ext.file->encrypted)
            break;
        status->flags |= DR_EXTENT_OFFSET;
        status->host_off = place.ext.host;
        struct dr_file *whole = dr_file_whole(place.ext.file, &status->host_off);
        status->file = keep_text(disk, whole->path);
        break;
    case DR_CODED:
        status->flags = DR_EXTENT_ALLOCATED | DR_EXTENT_DATA | DR_EXTENT_CODED;
        break;
    }
    return 0;
}

static bool status_continues(const struct dr_extent_status *a, const struct dr_extent_status *b)
{
    if (a->flags != b->flags || a->depth != b->depth || a->file != b->file)
        return false;
    return !(a->flags & DR_EXTENT_OFFSET) || a->host_off + a->len == b->host_off;
}

/* A short answer is fine; a pass that lasts long holds up every change of the chain. */
#define MAX_JOINED 4096

int dr_block_status(struct dr_disk *disk, uint64_t off, uint64_t len,
                    struct dr_extent_status *status, struct dr_error *err)
{
    DR_REQUIRE(disk, err);
    DR_REQUIRE(status, err);
    struct dr_pass pass;
    struct dr_chain *chain = dr_disk_enter(disk, &pass);
    int r = 0;
    if (len == 0 || !dr_inside(off, len, chain->images[0]->size))
        r = dr_fail(err, EINVAL, "%s: %llu bytes at %llu are not inside the disk of %llu bytes",
                    chain->images[0]->path, (unsigned long long)len, (unsigned long long)off,
                    (unsigned long long)chain->images[0]->size);
    if (r == 0)
        r = status_at(disk, chain, off, len, status, err);
    for (unsigned n = 0; r == 0 && status->len < len && n < MAX_JOINED;
         n++) { /* damage behind what is known is told when asked */
        struct dr_extent_status more;
        if (status_at(disk, chain, off + status->len, len - status->len, &more, NULL) < 0 ||
            !status_continues(status, &more))
            break;
        status->len += more.len;
    }
    dr_disk_leave(disk, &pass);
    return r;
}
