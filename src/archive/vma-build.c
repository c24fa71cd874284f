/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Building headers and extents by the rules for writers: what every known reader takes. */
#include <inttypes.h>
#include <stdlib.h>

#include "archive/vma-format.h"
#include "archive/vma-layout.h"
#include "base/bytes.h"
#include "base/cleanup.h"

/* ------------------------------------------------------------------ rules */

static int check_disk(const struct dr_vma_header *h, size_t i, struct dr_error *err)
{
    const struct dr_vma_disk *d = &h->disks[i];
    char shown[VMA_SHOWN];
    vma_show(d->name, shown, sizeof(shown));
    if (d->id < 1 || d->id > VMA_MAX_DISKS || (i > 0 && h->disks[i - 1].id >= d->id))
        return dr_fail(err, EINVAL, "disk '%s': device id %u, expected ascending ids from 1 to %u",
                       shown, d->id, VMA_MAX_DISKS);
    if (!dr_vma_name_is_safe(d->name) || strpbrk(d->name, " "))
        return dr_fail(err, EINVAL,
                       "disk name '%s' cannot be in an archive: 1 to 255 characters, no '/', no "
                       "blanks, no control characters",
                       shown);
    if (d->vmstate != (strcmp(d->name, "vmstate") == 0))
        return dr_fail(err, EINVAL, "'%s': the name 'vmstate' is for the state of a machine alone",
                       shown);
    if (d->size == 0 || d->size > VMA_MAX_SIZE || (!d->vmstate && d->size % 512 != 0))
        return dr_fail(err, EINVAL,
                       "disk '%s': size %" PRIu64
                       ", expected a multiple of 512 from 512 to %llu bytes",
                       shown, d->size, VMA_MAX_SIZE);
    for (size_t k = 0; k < i; k++)
        if (strcmp(h->disks[k].name, d->name) == 0)
            return dr_fail(err, EINVAL, "two disks have the name '%s'", shown);
    return 0;
}

static int check_config(const struct dr_vma_header *h, size_t i, struct dr_error *err)
{
    const struct dr_vma_config *c = &h->configs[i];
    char shown[VMA_SHOWN];
    if (!c->name)
        return dr_fail(err, EINVAL, "a configuration file without a name");
    vma_show(c->name, shown, sizeof(shown));
    if (!dr_vma_name_is_safe(c->name))
        return dr_fail(err, EINVAL,
                       "configuration name '%s' cannot be in an archive: 1 to 255 characters, no "
                       "'/', no control characters",
                       shown);
    if (c->len > VMA_BLOB_MAX)
        return dr_fail(err, EINVAL, "configuration '%s': %zu bytes, at most %u can be", shown,
                       c->len, VMA_BLOB_MAX);
    if (!c->data && c->len > 0)
        return dr_fail(err, EINVAL, "configuration '%s': its content is not given", shown);
    for (size_t k = 0; k < i; k++)
        if (strcmp(h->configs[k].name, c->name) == 0)
            return dr_fail(err, EINVAL, "two configurations have the name '%s'", shown);
    return 0;
}

static int check_header(const struct dr_vma_header *h, struct dr_error *err)
{
    if (h->n_disks > VMA_MAX_DISKS || h->n_configs > VMA_CONFIGS)
        return dr_fail(err, EINVAL,
                       "%zu disks and %zu configurations, at most %u and %u fit into an archive",
                       h->n_disks, h->n_configs, VMA_MAX_DISKS, VMA_CONFIGS);
    int r = 0;
    for (size_t i = 0; i < h->n_disks && r == 0; i++)
        r = check_disk(h, i, err);
    for (size_t i = 0; i < h->n_configs && r == 0; i++)
        r = check_config(h, i, err);
    return r;
}

/* ------------------------------------------------------------------ header */

/* Byte 0 of the blobs is never used, since pointer 0 means "none". It is there even when there
 * is no blob: the reference tool writes headers without it but does not read them. */
static uint32_t blobs_size(const struct dr_vma_header *h)
{
    size_t n = 1;
    for (size_t i = 0; i < h->n_configs; i++)
        n += 2 + strlen(h->configs[i].name) + 1 + 2 + h->configs[i].len;
    for (size_t i = 0; i < h->n_disks; i++)
        n += 2 + strlen(h->disks[i].name) + 1;
    return (uint32_t)n; /* by check_header: below 17 MiB */
}

/* Returns what points to the blob. */
static uint32_t add_blob(uint8_t *blobs, uint32_t *end, const void *data, size_t len)
{
    uint32_t at = *end;
    put_le16(blobs + at, (uint16_t)len);
    if (len > 0)
        memcpy(blobs + at + 2, data, len);
    *end = at + 2 + (uint32_t)len;
    return at;
}

static uint32_t fill_blobs(const struct dr_vma_header *h, uint8_t *buf)
{
    uint8_t *blobs = buf + VMA_FIXED_HEADER;
    uint32_t end = 1;
    for (size_t i = 0; i < h->n_configs; i++) {
        const struct dr_vma_config *c = &h->configs[i];
        put_be32(buf + VMA_AT_CONFIG_NAMES + i * 4,
                 add_blob(blobs, &end, c->name, strlen(c->name) + 1));
        put_be32(buf + VMA_AT_CONFIG_DATA + i * 4, add_blob(blobs, &end, c->data, c->len));
    }
    for (size_t i = 0; i < h->n_disks; i++) {
        const struct dr_vma_disk *d = &h->disks[i];
        uint8_t *entry = buf + VMA_AT_DEVICES + d->id * VMA_DEVICE_LEN;
        put_be32(entry, add_blob(blobs, &end, d->name, strlen(d->name) + 1));
        put_be64(entry + 8, d->size);
    }
    return end;
}

int vma_header_build(struct dr_vma_header *header, uint8_t **buf, uint32_t *size,
                     struct dr_error *err)
{
    *buf = NULL;
    int r = check_header(header, err);
    if (r < 0)
        return r;
    *size = (uint32_t)dr_round_up(VMA_FIXED_HEADER + blobs_size(header), 512);
    CLEANUP_FREE uint8_t *out = calloc(1, *size);
    if (!out)
        return dr_fail(err, ENOMEM, "out of memory for a header of %" PRIu32 " bytes", *size);
    memcpy(out, VMA_MAGIC, 4);
    put_be32(out + VMA_AT_VERSION, 1);
    memcpy(out + VMA_AT_UUID, header->uuid, sizeof(header->uuid));
    put_be64(out + VMA_AT_CTIME, (uint64_t)header->ctime);
    put_be32(out + VMA_AT_BLOB_OFFSET, VMA_FIXED_HEADER);
    put_be32(out + VMA_AT_BLOB_SIZE, fill_blobs(header, out));
    put_be32(out + VMA_AT_HEADER_SIZE, *size);
    r = vma_md5(out, *size, VMA_AT_MD5, out + VMA_AT_MD5, "the archive's header", err);
    if (r < 0)
        return r;
    header->header_size = *size;
    *buf = DR_STEAL(out);
    return 0;
}

/* ------------------------------------------------------------------ extents */

int vma_extent_build(const struct vma_slot *slots, unsigned n, const uint8_t uuid[16],
                     uint8_t buf[VMA_EXTENT_HEADER], struct dr_error *err)
{
    unsigned blocks = 0;
    memset(buf, 0, VMA_EXTENT_HEADER);
    memcpy(buf, VMA_EXTENT_MAGIC, 6);
    memcpy(buf + VMA_AT_EXTENT_UUID, uuid, 16);
    for (unsigned i = 0; i < n && i < VMA_SLOTS; i++) {
        put_be64(buf + VMA_AT_SLOTS + i * 8,
                 (uint64_t)slots[i].mask << 48 | (uint64_t)slots[i].id << 32 | slots[i].cluster);
        blocks += slots[i].id ? (unsigned)__builtin_popcount(slots[i].mask) : 0u;
    }
    put_be16(buf + VMA_AT_EXTENT_COUNT, (uint16_t)blocks);
    return vma_md5(buf, VMA_EXTENT_HEADER, VMA_AT_EXTENT_MD5, buf + VMA_AT_EXTENT_MD5, "an extent",
                   err);
}
