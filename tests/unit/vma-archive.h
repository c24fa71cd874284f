/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Archives for tests: disks whose bytes are known everywhere, their clusters in any order. */
#ifndef DR_TESTS_VMA_ARCHIVE_H
#define DR_TESTS_VMA_ARCHIVE_H

#include "place.h"

#include "archive/vma-format.h"
#include "archive/vma-layout.h"
#include "base/bytes.h"

static const uint8_t archive_uuid[16] = "fedcba9876543210";

struct archive_slot {
    uint8_t id;
    uint32_t cluster;
};

struct archive {
    struct dr_vma_header header;
    struct dr_vma_disk disks[8];
    struct archive_slot *order;
    size_t n_order;
    unsigned slots; /* per extent */
    bool empties;   /* an extent without slots between the others */
    uint8_t *bytes;
    size_t n, room;
    uint64_t last; /* where the last extent begins */
};

/* ------------------------------------------------------------------ what the disks hold */

static inline uint64_t archive_mix(uint64_t a, uint64_t b)
{
    uint64_t x = a * 0x9e3779b97f4a7c15u + b * 0xc2b2ae3d27d4eb4fu;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    return x ^ x >> 32;
}

/* Runs of blocks of zeros and of data; some clusters are full, some are empty. */
static inline bool archive_block_is_data(unsigned id, uint64_t block)
{
    unsigned kind = archive_mix(id, block / 16 / 3) % 4;
    return kind == 0 ? true : kind == 1 ? false : archive_mix(id + 1000, block / 2) % 3 != 0;
}

static inline void archive_block(const struct dr_vma_disk *disk, uint64_t block, uint8_t *out)
{
    memset(out, 0, DR_VMA_BLOCK);
    if (!archive_block_is_data(disk->id, block))
        return;
    for (size_t i = 0; i < DR_VMA_BLOCK; i += 8)
        put_le64(out + i, archive_mix(disk->id * 77, block * 512 + i / 8));
    uint64_t off = block * DR_VMA_BLOCK;
    if (off + DR_VMA_BLOCK > disk->size)
        memset(out + (disk->size - off), 0, (size_t)(off + DR_VMA_BLOCK - disk->size));
}

static inline void archive_expect(const struct dr_vma_disk *disk, uint64_t off, size_t len,
                                  uint8_t *out)
{
    uint8_t block[DR_VMA_BLOCK];
    while (len > 0) {
        size_t at = off % DR_VMA_BLOCK, n = (size_t)dr_min(len, DR_VMA_BLOCK - at);
        archive_block(disk, off / DR_VMA_BLOCK, block);
        memcpy(out, block + at, n);
        out += n;
        off += n;
        len -= n;
    }
}

/* ------------------------------------------------------------------ making */

static inline void archive_add(struct archive *a, const void *p, size_t n)
{
    if (a->n + n > a->room) {
        a->room = (a->n + n) * 2;
        a->bytes = realloc(a->bytes, a->room);
    }
    memcpy(a->bytes + a->n, p, n);
    a->n += n;
}

static inline void archive_disk(struct archive *a, unsigned id, const char *name, uint64_t size)
{
    a->disks[a->header.n_disks] =
        (struct dr_vma_disk){id, name, size, strcmp(name, "vmstate") == 0};
    a->header.disks = a->disks;
    a->header.n_disks++;
}

/* Every cluster of every disk, one after another. */
static inline void archive_in_order(struct archive *a)
{
    for (size_t i = 0; i < a->header.n_disks; i++)
        for (uint64_t c = 0; c < vma_clusters(a->disks[i].size); c++) {
            a->order = realloc(a->order, (a->n_order + 1) * sizeof(*a->order));
            a->order[a->n_order++] = (struct archive_slot){(uint8_t)a->disks[i].id, (uint32_t)c};
        }
}

static inline void archive_shuffle(struct archive *a)
{
    for (size_t i = a->n_order; i > 1; i--) {
        size_t j = archive_mix(4711, i) % i;
        struct archive_slot t = a->order[i - 1];
        a->order[i - 1] = a->order[j];
        a->order[j] = t;
    }
}

static inline void archive_extent(struct archive *a, const struct archive_slot *slots, unsigned n)
{
    struct vma_slot s[VMA_SLOTS];
    uint8_t head[VMA_EXTENT_HEADER], block[DR_VMA_BLOCK];
    size_t at = a->n;
    archive_add(a, head, sizeof(head));
    for (unsigned i = 0; i < n; i++) {
        const struct dr_vma_disk *disk = vma_header_disk(&a->header, slots[i].id);
        s[i] = (struct vma_slot){.id = slots[i].id, .cluster = slots[i].cluster};
        for (unsigned k = 0; disk && k < VMA_BLOCKS; k++) {
            uint64_t b = (uint64_t)slots[i].cluster * VMA_BLOCKS + k;
            if (b * DR_VMA_BLOCK >= disk->size || !archive_block_is_data(disk->id, b))
                continue;
            s[i].mask = (uint16_t)(s[i].mask | 1u << k);
            archive_block(disk, b, block);
            archive_add(a, block, sizeof(block));
        }
    }
    vma_extent_build(s, n, a->header.uuid, head, NULL);
    memcpy(a->bytes + at, head, sizeof(head));
    a->last = at;
}

/* Header and extents from disks, order, slots. Our own writer rounds sizes up, others do not. */
static inline void archive_build(struct archive *a)
{
    struct dr_error err = DR_ERROR_INIT;
    uint8_t *head;
    uint32_t size;
    struct dr_vma_disk rounded[8];
    memcpy(rounded, a->disks, sizeof(rounded));
    for (size_t i = 0; i < a->header.n_disks; i++)
        rounded[i].size = dr_round_up(rounded[i].size, 512);
    memcpy(a->header.uuid, archive_uuid, 16);
    a->header.disks = rounded;
    if (vma_header_build(&a->header, &head, &size, &err) < 0)
        fail_msg("%s", err.text);
    a->header.disks = a->disks;
    for (size_t i = 0; i < a->header.n_disks; i++)
        put_be64(head + VMA_AT_DEVICES + a->disks[i].id * VMA_DEVICE_LEN + 8, a->disks[i].size);
    assert_int_equal(vma_md5(head, size, VMA_AT_MD5, head + VMA_AT_MD5, "a.vma", NULL), 0);
    a->n = 0;
    archive_add(a, head, size);
    free(head);
    unsigned step = a->slots ? a->slots : VMA_WRITE_SLOTS;
    for (size_t i = 0; i < a->n_order; i += step) {
        if (a->empties)
            archive_extent(a, NULL, 0);
        archive_extent(a, a->order + i, (unsigned)dr_min(step, a->n_order - i));
    }
}

static inline void archive_write(const struct archive *a, struct dr_fs *fs, const char *path)
{
    fs->ops->unlink(fs, path, NULL);
    struct dr_file *f = open_on(fs, path, DR_FILE_CREATE);
    assert_ok(dr_file_pwrite(f, a->bytes, 0, a->n, &err));
    dr_file_unref(f);
}

static inline void archive_free(struct archive *a)
{
    free(a->order);
    free(a->bytes);
    *a = (struct archive){0};
}

#endif
