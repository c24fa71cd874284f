/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* vma: a disk inside a backup archive as an image. Read-only; the archive's index maps it. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/source.h"
#include "archive/vma-index.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "core/core.h"

/* One answer of map looks at no more clusters than this: the image is locked meanwhile. */
#define MAP_CLUSTERS 16384u

struct vma {
    struct dr_file *plain; /* the archive's bytes without compression */
    const char *compression;
    struct dr_vma_header header;
    const struct dr_vma_disk *disk; /* NULL: the whole archive (DR_OPEN_WHOLE) */
    struct vma_index *index;
    bool from_side_file;
};

static int vma_probe(const uint8_t *buf, size_t len, const char *path)
{
    if (len >= 4 && memcmp(buf, "VMA\0", 4) == 0)
        return 100;
    /* The first bytes of a compressed file do not show what it holds, so its name decides. */
    return strstr(dr_path_basename(path), ".vma.") && dr_source_compression_of(buf, len) ? 60 : 0;
}

/* ------------------------------------------------------------------ which disk */

/* "name, name": what could have been asked for; each with prefix in front. */
static void list_disks(const struct vma *v, const char *prefix, char *text, size_t size)
{
    size_t n = 0;
    text[0] = '\0';
    for (size_t i = 0; i < v->header.n_disks; i++) {
        char shown[VMA_SHOWN];
        if (v->header.disks[i].vmstate)
            continue;
        const char *name = vma_show(v->header.disks[i].name, shown, sizeof(shown));
        if (n + strlen(prefix) + strlen(name) + 8 > size) {
            snprintf(text + n, size - n, ", ...");
            return;
        }
        n += (size_t)snprintf(text + n, size - n, "%s%s%s", n ? ", " : "", prefix, name);
    }
}

static int only_disk(struct dr_image *image, struct vma *v, struct dr_error *err)
{
    unsigned disks = 0;
    uint64_t size = 0;
    for (size_t i = 0; i < v->header.n_disks; i++) {
        if (v->header.disks[i].vmstate)
            continue;
        disks++;
        v->disk = &v->header.disks[i];
        size += v->disk->size; /* each is bounded, and there are at most 254 */
    }
    if (disks == 1)
        return 0;
    if (image->flags & DR_OPEN_WHOLE) {
        v->disk = NULL;
        image->size = size;
        return 0;
    }
    if (disks == 0)
        return dr_fail(err, EINVAL, "%s: this archive holds no disk", image->path);
    char text[400], prefix[200];
    snprintf(prefix, sizeof(prefix), "vma:%.190s#", image->files[0]->path);
    list_disks(v, prefix, text, sizeof(text));
    return dr_fail(err, EINVAL, "%s: this archive holds %u disks, name one of them: %s",
                   image->path, disks, text);
}

static bool has_id(const struct dr_vma_disk *disk, const char *member)
{
    char id[8];
    snprintf(id, sizeof(id), "%u", disk->id);
    return strcmp(id, member) == 0;
}

static int named_disk(const struct dr_image *image, struct vma *v, struct dr_error *err)
{
    char shown[VMA_SHOWN], text[400];
    unsigned n = 0;
    for (size_t i = 0; i < v->header.n_disks; i++)
        if (strcmp(v->header.disks[i].name, image->member) == 0) {
            v->disk = &v->header.disks[i];
            n++;
        }
    for (size_t i = 0; n == 0 && !v->disk && i < v->header.n_disks; i++)
        if (has_id(&v->header.disks[i], image->member))
            v->disk = &v->header.disks[i];
    vma_show(image->member, shown, sizeof(shown));
    if (n > 1)
        return dr_fail(err, EINVAL,
                       "%s: %u disks have the name '%s'; say which by its number, as #%u",
                       image->path, n, shown, v->disk->id);
    if (!v->disk) {
        list_disks(v, "", text, sizeof(text));
        return dr_fail(err, ENOENT, "%s: has no disk '%s', only: %s", image->files[0]->path, shown,
                       text[0] ? text : "none at all");
    }
    if (v->disk->vmstate)
        return dr_fail(err, EINVAL,
                       "%s: is the state of a running machine, a stream and no disk; "
                       "`drover vma extract` takes it out",
                       image->path);
    return 0;
}

/* ------------------------------------------------------------------ open, close */

/* Load the index from the side file; if it is missing or does not fit, build it from the
 * archive. */
static int get_index(struct dr_image *image, struct vma *v, struct dr_error *err)
{
    CLEANUP_FREE char *side = vma_index_path(image->files[0]->path);
    if (!side)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = vma_index_load(image->fs, side, v->plain, &v->header, &v->index, NULL);
    v->from_side_file = r == 0;
    return r == 0 ? 0 : vma_index_build(v->plain, &v->header, NULL, &v->index, err);
}

static int vma_open(struct dr_image *image, struct dr_error *err)
{
    struct vma *v = calloc(1, sizeof(*v));
    image->state = v;
    if (!v)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = dr_source_plain_file(image->files[0], &v->plain, &v->compression, err);
    if (r == 0)
        r = vma_index_header(v->plain, &v->header, NULL, NULL, err);
    if (r == 0)
        r = image->member ? named_disk(image, v, err) : only_disk(image, v, err);
    if (r == 0 && v->disk) {
        image->size = v->disk->size;
        r = get_index(image, v, err);
    }
    return r;
}

static void vma_close(struct dr_image *image)
{
    struct vma *v = image->state;
    if (!v)
        return;
    vma_index_free(v->index);
    vma_header_free(&v->header);
    dr_file_unref(v->plain);
    free(v);
}

/* ------------------------------------------------------------------ map */

static void vma_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    (void)image;
    *uoff = dr_round_down(off, DR_VMA_CLUSTER);
    *ulen = DR_VMA_CLUSTER;
}

/* Host offset of block k of a cluster; false: the block is zeros. */
static bool block_place(const struct vma_place *p, unsigned k, uint64_t *host)
{
    *host = p->host + (uint64_t)__builtin_popcount(p->mask & ((1u << k) - 1)) * DR_VMA_BLOCK;
    return p->mask >> k & 1;
}

/* Count the blocks of the cluster from k on that are stored like block k, or are zeros like it. */
static unsigned same_blocks(const struct vma_place *p, unsigned k, bool data)
{
    unsigned n = k;
    while (n < VMA_BLOCKS && (p->mask >> n & 1) == data)
        n++;
    return n - k;
}

static int vma_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                   struct dr_error *err)
{
    const struct vma *v = image->state;
    if (!v->disk)
        return dr_fail(err, EINVAL, "%s: is several disks, not one", image->path);
    uint64_t at = dr_round_down(off, DR_VMA_BLOCK), end = off + len, host, next;
    unsigned k = (unsigned)(at % DR_VMA_CLUSTER / DR_VMA_BLOCK), n = 0;
    struct vma_place p = vma_index_find(v->index, v->disk->id, (uint32_t)(at / DR_VMA_CLUSTER));
    bool data = block_place(&p, k, &host);
    *ext = (struct dr_extent){.kind = DR_ZERO};
    if (data)
        *ext = (struct dr_extent){.kind = DR_DATA, .file = v->plain, .host = host + (off - at)};
    for (next = host;;) {
        unsigned blocks = same_blocks(&p, k, data);
        at += (uint64_t)blocks * DR_VMA_BLOCK;
        next += (uint64_t)blocks * DR_VMA_BLOCK;
        if (k + blocks < VMA_BLOCKS || at >= end || ++n == MAP_CLUSTERS)
            break;
        k = 0;
        p = vma_index_find(v->index, v->disk->id, (uint32_t)(at / DR_VMA_CLUSTER));
        if ((p.mask & 1) != data || (data && p.host != next))
            break;
    }
    ext->len = dr_min(at, end) - off;
    return 0;
}

/* ------------------------------------------------------------------ info */

static json_t *describe(const struct dr_vma_disk *disk)
{
    char shown[VMA_SHOWN];
    return json_pack("{s:I, s:s, s:I}", "id", (json_int_t)disk->id, "name",
                     vma_show(disk->name, shown, sizeof(shown)), "size", (json_int_t)disk->size);
}

static int vma_info(struct dr_image *image, json_t *data, uint64_t *cluster_size,
                    struct dr_error *err)
{
    const struct vma *v = image->state;
    json_t *disks = json_array();
    int bad = 0;
    for (size_t i = 0; i < v->header.n_disks; i++)
        dr_json_append(&disks, describe(&v->header.disks[i]));
    if (v->disk)
        bad |= json_object_set_new(data, "disk-id", json_integer((json_int_t)v->disk->id));
    bad |= json_object_set_new(data, "disks", disks);
    bad |= json_object_set_new(data, "compression",
                               json_string(v->compression ? v->compression : "none"));
    if (v->disk)
        bad |= json_object_set_new(data, "index",
                                   json_string(v->from_side_file ? "side file" : "headers"));
    *cluster_size = DR_VMA_CLUSTER;
    return bad ? dr_fail_errno(err, ENOMEM, "%s", image->path) : 0;
}

const struct dr_format dr_format_vma = {
    .name = "vma",
    .flags = DR_FORMAT_MEMBERS,
    .probe = vma_probe,
    .open = vma_open,
    .close = vma_close,
    .unit = vma_unit,
    .map = vma_map,
    .info = vma_info,
};
