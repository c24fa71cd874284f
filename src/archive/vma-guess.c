/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Salvaging archives whose header is damaged, or does not list all devices. Extents have checksums
 * of their own and the archive's uuid: the first one tells where the header ends and what the uuid
 * is, and all of them together which clusters of which devices there are. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "archive/vma-layout.h"
#include "archive/vma-read.h"

__attribute__((format(printf, 2, 3))) static void tell(const struct dr_vma *vma, const char *fmt,
                                                       ...)
{
    char text[1024], line[1536];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    snprintf(line, sizeof(line), "%s: %s", vma->name, text);
    if (vma->message)
        vma->message(vma->user, line);
}

/* ------------------------------------------------------------------ from extent to extent */

struct walk {
    struct dr_file *file;
    const char *name;
    uint64_t pos; /* of the unit in buf at pos - off */
    uint64_t off;
    size_t len;
    uint8_t *buf; /* VMA_READ_WINDOW */
};

/* The unit at pos, or NULL: the file ends, or cannot be read there. wide: units are looked at one
 * by one. */
static const uint8_t *unit_at(struct walk *w, bool wide)
{
    size_t want = wide ? VMA_READ_WINDOW : VMA_EXTENT_HEADER;
    if (w->pos < w->off || w->pos + VMA_EXTENT_HEADER > w->off + w->len) {
        w->off = w->pos;
        if (dr_file_pread_short(w->file, w->buf, w->pos, want, &w->len, NULL) < 0 &&
            (!wide ||
             dr_file_pread_short(w->file, w->buf, w->pos, VMA_EXTENT_HEADER, &w->len, NULL) < 0))
            w->len = 0;
        if (w->len < VMA_EXTENT_HEADER)
            return NULL;
    }
    return w->buf + (w->pos - w->off);
}

/* An extent whose checksum is right, of any archive. */
static bool is_extent(const uint8_t *unit, const struct walk *w, struct vma_extent *e)
{
    return unit && memcmp(unit, VMA_EXTENT_MAGIC, 4) == 0 &&
           vma_extent_parse(unit, unit + VMA_AT_EXTENT_UUID, w->name, w->pos, e, NULL) == 0;
}

/* The first extent from pos on that begins before limit: where it is; 0 = there is none. */
static uint64_t first_extent(struct walk *w, uint64_t limit, uint8_t uuid[16])
{
    struct vma_extent e;
    for (; w->pos < limit; w->pos += VMA_EXTENT_HEADER) {
        const uint8_t *unit = unit_at(w, true);
        if (is_extent(unit, w, &e)) {
            memcpy(uuid, unit + VMA_AT_EXTENT_UUID, 16);
            return w->pos;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ the header */

/* Where the extents begin: at the first one, or before, where those in front of it are damaged. */
static uint64_t header_end(const uint8_t *fixed, uint64_t first)
{
    uint64_t told = get_be32(fixed + VMA_AT_HEADER_SIZE);
    return told >= VMA_FIXED_HEADER && told < first && told % 512 == 0 ? told : first;
}

/* What cannot be read of it is zeros. */
static void read_some(struct dr_file *f, uint8_t *buf, uint64_t len)
{
    memset(buf, 0, (size_t)len);
    for (uint64_t at = 0; at < len; at += 512)
        if (dr_file_pread_short(f, buf + at, at, (size_t)dr_min(512, len - at), NULL, NULL) < 0)
            memset(buf + at, 0, (size_t)dr_min(512, len - at));
}

int vma_guess_header(struct dr_vma *vma, struct dr_error *err)
{
    uint8_t uuid[16];
    struct walk w = {.file = dr_source_file(vma->source),
                     .name = vma->name,
                     .pos = VMA_FIXED_HEADER,
                     .buf = malloc(VMA_READ_WINDOW)};
    if (!w.buf)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    uint64_t limit = dr_min(dr_file_size(w.file), VMA_HEADER_MAX);
    uint64_t first = first_extent(&w, limit, uuid);
    free(w.buf);
    if (first == 0)
        return -EINVAL;
    CLEANUP_FREE uint8_t *all = malloc((size_t)first);
    if (!all)
        return dr_fail(err, ENOMEM, "%s: out of memory for a header of %" PRIu64 " bytes",
                       vma->name, first);
    read_some(w.file, all, first);
    int r = vma_header_guess(all, (uint32_t)header_end(all, first), vma->name, &vma->header,
                             vma->message, vma->user, err);
    if (r == 0 && memcmp(vma->header.uuid, uuid, 16) != 0)
        tell(vma, "its uuid is taken from the extent at offset %" PRIu64, first);
    memcpy(vma->header.uuid, uuid, 16);
    vma->uuid_known = true;
    return r;
}

/* ------------------------------------------------------------------ devices */

static struct dr_vma_disk *disk_of(struct dr_vma *vma, unsigned id)
{
    return (struct dr_vma_disk *)vma_header_disk(&vma->header, id);
}

static bool name_is_taken(const struct dr_vma_header *h, const char *name)
{
    for (size_t i = 0; i < h->n_disks; i++)
        if (strcmp(h->disks[i].name, name) == 0)
            return true;
    return false;
}

/* The header has room for all devices that there can be. */
static int add_disk(struct dr_vma *vma, unsigned id, uint64_t size, struct dr_error *err)
{
    struct dr_vma_header *h = &vma->header;
    char name[64];
    snprintf(name, sizeof(name), "unlisted-%u", id);
    while (name_is_taken(h, name) && strlen(name) + 2 < sizeof(name))
        strcat(name, "_");
    char *copy = strdup(name);
    if (!copy)
        return dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    size_t i = h->n_disks++;
    for (; i > 0 && h->disks[i - 1].id > id; i--)
        h->disks[i] = h->disks[i - 1];
    h->disks[i] = (struct dr_vma_disk){.id = id, .name = copy, .size = size};
    vma->odd[id] = true;
    tell(vma,
         "device %u is not in the header: its clusters are taken as disk '%s' of %" PRIu64 " bytes",
         id, name, size);
    return 0;
}

/* A header that may be wrong may give a disk too small a size. */
static bool may_grow(const struct dr_vma *vma, const struct dr_vma_disk *disk)
{
    return vma->header.wrong_sum && !disk->vmstate;
}

static void grow_disk(struct dr_vma *vma, struct dr_vma_disk *disk, uint64_t size)
{
    if (vma_clusters(disk->size) * DR_VMA_CLUSTER >= size)
        return;
    tell(vma,
         "device %u has %" PRIu64 " bytes by the header, but there are clusters up to %" PRIu64,
         disk->id, disk->size, size);
    disk->size = size;
    vma->odd[disk->id] = true;
}

/* An extent's checksum keeps no hostile archive from naming any cluster: one slot would make a disk
 * of 256 TiB, longer than a file may be in many file systems, and the salvage of all disks would
 * end there. So a disk is only taken to be longer than this where a good part of its clusters are
 * in the archive. 16 TiB is as long as a file can be in ext4. */
#define FAR_CLUSTERS ((UINT64_C(16) << 40) / DR_VMA_CLUSTER)
#define FAR_SHARE    64u /* one in so many */

/* Which clusters of a device there are. */
struct extent_of_disk {
    uint64_t slots;     /* that name one, also one that others name */
    uint64_t end, near; /* behind the last one; behind the last one below FAR_CLUSTERS */
};

static void note_slots(const struct vma_extent *e, struct extent_of_disk disks[256])
{
    for (unsigned i = 0; i < e->n; i++) {
        struct extent_of_disk *d = &disks[e->slot[i].id];
        uint64_t end = (uint64_t)e->slot[i].cluster + 1;
        d->slots++;
        d->end = dr_max(d->end, end);
        if (end <= FAR_CLUSTERS)
            d->near = dr_max(d->near, end);
    }
}

/* Clusters that the disk must have for those that there are, as far as these are plausible. */
static uint64_t clusters_of(const struct dr_vma *vma, unsigned id, const struct extent_of_disk *d)
{
    if (d->end == d->near || d->slots >= d->end / FAR_SHARE)
        return d->end;
    tell(vma,
         "device %u: its clusters from %" PRIu64 " on, up to %" PRIu64
         ", are left out: only %" PRIu64 " clusters of it are in the archive",
         id, (uint64_t)FAR_CLUSTERS, d->end - 1, d->slots);
    return d->near;
}

static void find_clusters(struct walk *w, const uint8_t uuid[16], struct extent_of_disk disks[256])
{
    uint64_t size = dr_file_size(w->file);
    bool wide = false, shifted = dr_source_has_gaps(w->file);
    while (w->pos < size) {
        struct vma_extent e;
        const uint8_t *unit = unit_at(w, wide);
        bool good = is_extent(unit, w, &e) && memcmp(unit + VMA_AT_EXTENT_UUID, uuid, 16) == 0;
        if (good)
            note_slots(&e, disks);
        w->pos += good              ? VMA_EXTENT_HEADER + e.data_len
                  : shifted && unit ? vma_next_magic(unit)
                                    : VMA_EXTENT_HEADER;
        wide = !good;
    }
}

int vma_find_unlisted(struct dr_vma *vma, struct dr_error *err)
{
    struct extent_of_disk disks[256] = {0};
    struct walk w = {.file = dr_source_file(vma->source),
                     .name = vma->name,
                     .pos = vma->header.header_size,
                     .buf = malloc(VMA_READ_WINDOW)};
    int r = w.buf ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", vma->name);
    if (r == 0)
        find_clusters(&w, vma->header.uuid, disks);
    free(w.buf);
    for (unsigned id = 1; id < 256 && r == 0; id++) {
        struct dr_vma_disk *disk = disk_of(vma, id);
        if (disk && !may_grow(vma, disk))
            continue;
        uint64_t size = clusters_of(vma, id, &disks[id]) * DR_VMA_CLUSTER;
        if (disk)
            grow_disk(vma, disk, size);
        else if (size > 0)
            r = add_disk(vma, id, size, err);
    }
    return r;
}
