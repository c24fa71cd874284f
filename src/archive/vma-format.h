/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The bytes of a VMA archive: parsing and building headers, nothing else. No I/O, no state.
 * Everything on disk is big endian, except the length in front of each blob.
 * Source of every number: docs/formats/vma.md. */
#ifndef DR_ARCHIVE_VMA_FORMAT_H
#define DR_ARCHIVE_VMA_FORMAT_H

#include "base/error.h"
#include "drover/vma.h"

#define VMA_FIXED_HEADER  12288u
#define VMA_HEADER_MAX    (64u << 20) /* no legal header is larger; checked before allocating */
#define VMA_EXTENT_HEADER 512u
#define VMA_SLOTS         59u /* blockinfo entries of an extent */
#define VMA_WRITE_SLOTS   58u /* what other writers fill, and ours */
#define VMA_BLOCKS        16u /* 4 KiB blocks of a cluster */
#define VMA_MAX_BLOCKS    (VMA_SLOTS * VMA_BLOCKS)
#define VMA_EXTENT_MAX    (VMA_EXTENT_HEADER + VMA_SLOTS * DR_VMA_CLUSTER)
#define VMA_MAX_SIZE      (1ull << 48) /* of a disk: cluster numbers have 32 bits */
#define VMA_MAX_DISKS     254u         /* that a writer may use; readers accept id 255 too */
#define VMA_SHOWN         200u         /* enough of a name for a message */

/* A name from an archive for a message: what is not plain ASCII as \xNN, cut to fit. Returns buf.
 */
const char *vma_show(const char *name, char *buf, size_t size);

/* ------------------------------------------------------------------ header */

/* -EINVAL: what begins with these bytes is no archive; err says what it is, if that is known. */
int vma_check_magic(const uint8_t *begin, size_t len, const char *name, struct dr_error *err);

/* From the first VMA_FIXED_HEADER bytes: is it an archive, of version 1, and how long is the whole
 * header (*size <= VMA_HEADER_MAX)? name is for messages. */
int vma_header_size(const uint8_t *fixed, const char *name, uint32_t *size, struct dr_error *err);

/* The whole header, size bytes, checksum and all. The result's strings and data are its own copies;
 * end with vma_header_free. warn (may be NULL) gets what is odd but legal. */
int vma_header_parse(const uint8_t *buf, uint32_t size, const char *name,
                     struct dr_vma_header *header, void (*warn)(void *user, const char *text),
                     void *user, struct dr_error *err);
/* The same for a header whose checksum may be wrong: what cannot be is left out, with a warning,
 * and a device that has a size and no good name is called disk-ID. -EINVAL still: no archive at
 * all. */
int vma_header_guess(const uint8_t *buf, uint32_t size, const char *name,
                     struct dr_vma_header *header, void (*warn)(void *user, const char *text),
                     void *user, struct dr_error *err);
void vma_header_free(struct dr_vma_header *header);

/* The other direction: checks names, counts and sizes against the rules for writers. *buf is
 * malloc'ed, *size a multiple of 512. header->header_size is set. */
int vma_header_build(struct dr_vma_header *header, uint8_t **buf, uint32_t *size,
                     struct dr_error *err);

/* The disk with this id, or NULL. */
const struct dr_vma_disk *vma_header_disk(const struct dr_vma_header *header, unsigned id);

/* ------------------------------------------------------------------ extents */

struct vma_slot {
    uint8_t id;       /* 0 = unused */
    uint32_t cluster; /* guest offset / 65536 */
    uint16_t mask;    /* bit k: block k is stored */
    uint32_t data;    /* byte offset of its first stored block behind the extent header */
};

struct vma_extent {
    unsigned n;                      /* used slots */
    struct vma_slot slot[VMA_SLOTS]; /* in the order of the file, unused ones left out */
    uint32_t data_len;               /* bytes behind the extent header */
};

/* Check the 512 bytes at buf, which stand at off of the archive: magic, reserved, uuid, MD5, count
 * of blocks. Not: whether disks and clusters exist (vma_slot_check). */
int vma_extent_parse(const uint8_t *buf, const uint8_t uuid[16], const char *name, uint64_t off,
                     struct vma_extent *extent, struct dr_error *err);

/* Does the slot name a disk of the header and a cluster inside it? off: of the extent. */
int vma_slot_check(const struct dr_vma_header *header, const struct vma_slot *slot,
                   const char *name, uint64_t off, struct dr_error *err);

/* Write the 512 bytes of an extent with these slots (data of the slots is not looked at).
 * -ENOTSUP: OpenSSL gives no MD5; then vma_header_build has failed before. */
int vma_extent_build(const struct vma_slot *slots, unsigned n, const uint8_t uuid[16],
                     uint8_t buf[VMA_EXTENT_HEADER], struct dr_error *err);

/* Where block k (its mask bit is set) of a slot stands behind the extent header. */
static inline uint32_t vma_block_at(const struct vma_slot *slot, unsigned k)
{
    return slot->data + (uint32_t)__builtin_popcount(slot->mask & ((1u << k) - 1)) * DR_VMA_BLOCK;
}

static inline uint64_t vma_clusters(uint64_t size)
{
    return size / DR_VMA_CLUSTER + (size % DR_VMA_CLUSTER != 0);
}

#endif
