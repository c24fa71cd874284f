/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What tests of new archives share: an archive in memory taken apart with the parser alone. */
#ifndef DROVER_TESTS_TEST_VMA_H
#define DROVER_TESTS_TEST_VMA_H

#include "test-ops.h"

#include "archive/vma-format.h"
#include "archive/vma-write.h"

struct unpacked {
    struct dr_vma_header header;
    uint8_t *disk[256];     /* by id; whole clusters */
    uint64_t clusters[256]; /* of disks; of a stream: as many as there were */
    unsigned extents, empty_extents;
    uint64_t blocks;
    bool ascending; /* each disk's clusters, and disks one after another */
};

static inline void unpack_extent(struct unpacked *u, const struct vma_extent *e,
                                 const uint8_t *data, uint64_t *last, uint64_t off)
{
    for (unsigned i = 0; i < e->n; i++) {
        const struct vma_slot *s = &e->slot[i];
        const struct dr_vma_disk *d = vma_header_disk(&u->header, s->id);
        assert_non_null(d);
        if (!d->vmstate)
            ok(vma_slot_check(&u->header, s, "archive", off, &err));
        u->ascending &= *last < ((uint64_t)s->id << 32 | s->cluster) + 1;
        *last = ((uint64_t)s->id << 32 | s->cluster) + 1;
        if (s->cluster >= u->clusters[s->id]) {
            assert_true(d->vmstate);
            assert_int_equal(s->cluster, u->clusters[s->id]);
            u->clusters[s->id]++;
            u->disk[s->id] = realloc(u->disk[s->id], u->clusters[s->id] * DR_VMA_CLUSTER);
            memset(u->disk[s->id] + (uint64_t)s->cluster * DR_VMA_CLUSTER, 0xee, DR_VMA_CLUSTER);
        }
        uint8_t *to = u->disk[s->id] + (uint64_t)s->cluster * DR_VMA_CLUSTER;
        for (unsigned k = 0; k < DR_VMA_CLUSTER; k += 512)
            assert_int_equal(to[k], 0xee); /* each cluster comes once */
        memset(to, 0, DR_VMA_CLUSTER);
        for (unsigned k = 0; k < VMA_BLOCKS; k++)
            if (s->mask >> k & 1) {
                memcpy(to + k * DR_VMA_BLOCK, data + vma_block_at(s, k), DR_VMA_BLOCK);
                assert_false(dr_is_zero(to + k * DR_VMA_BLOCK, DR_VMA_BLOCK));
                u->blocks++;
            }
    }
}

/* Every cluster must be there, once. */
static inline void unpack(const uint8_t *buf, size_t len, struct unpacked *u)
{
    uint32_t size;
    uint64_t last = 0, slots = 0, clusters = 0;
    memset(u, 0, sizeof(*u));
    u->ascending = true;
    assert_true(len >= VMA_FIXED_HEADER);
    ok(vma_header_size(buf, "archive", &size, &err));
    assert_true(len >= size);
    ok(vma_header_parse(buf, size, "archive", &u->header, NULL, NULL, &err));
    for (size_t i = 0; i < u->header.n_disks; i++) {
        const struct dr_vma_disk *d = &u->header.disks[i];
        u->clusters[d->id] = d->vmstate ? 0 : vma_clusters(d->size);
        u->disk[d->id] = malloc(u->clusters[d->id] * DR_VMA_CLUSTER + 1);
        memset(u->disk[d->id], 0xee, u->clusters[d->id] * DR_VMA_CLUSTER);
    }
    for (uint64_t off = size; off < len;) {
        struct vma_extent e;
        ok(vma_extent_parse(buf + off, u->header.uuid, "archive", off, &e, &err));
        assert_true(e.n <= VMA_WRITE_SLOTS);
        assert_true(off + VMA_EXTENT_HEADER + e.data_len <= len);
        unpack_extent(u, &e, buf + off + VMA_EXTENT_HEADER, &last, off);
        off += VMA_EXTENT_HEADER + e.data_len;
        u->extents++;
        u->empty_extents += e.n == 0;
        slots += e.n;
    }
    for (unsigned id = 0; id < 256; id++)
        clusters += u->clusters[id];
    assert_int_equal(slots, clusters); /* none came twice, so none is missing */
}

static inline void unpack_file(struct dr_fs *fs, const char *path, struct unpacked *u)
{
    size_t len;
    uint8_t *buf = file_bytes(fs, path, &len);
    unpack(buf, len, u);
    free(buf);
}

static inline void unpacked_free(struct unpacked *u)
{
    for (unsigned i = 0; i < 256; i++)
        free(u->disk[i]);
    vma_header_free(&u->header);
}

/* The disk as the archive has it: want, then zeros to the end of its last cluster. */
static inline void has_disk(const struct unpacked *u, unsigned id, const uint8_t *want,
                            uint64_t size)
{
    assert_int_equal(u->clusters[id], vma_clusters(size));
    for (uint64_t i = 0; i < u->clusters[id] * DR_VMA_CLUSTER; i++)
        if (u->disk[id][i] != (i < size ? want[i] : 0))
            fail_msg("disk %u differs at %llu", id, (unsigned long long)i);
}

static inline struct dr_disk *open_disk(struct dr_fs *fs, const char *path)
{
    struct dr_disk *disk = NULL;
    ok(dr_open_fs(fs, path, NULL, &disk, &err));
    return disk;
}

/* A raw disk of any length; blocks of random bytes where the pattern has a 1 (one bit a block). */
static inline uint8_t *random_disk(struct dr_fs *fs, const char *path, uint64_t size,
                                   uint64_t pattern, uint64_t seed)
{
    struct dr_file *file = NULL;
    uint8_t *bytes = calloc(1, size + 8);
    uint64_t state = seed * 2 + 1;
    ok(dr_file_open(fs, path, DR_FILE_CREATE, &file, &err));
    ok(dr_file_truncate(file, size, &err));
    for (uint64_t off = 0, b = 0; off < size; off += DR_VMA_BLOCK, b++) {
        uint64_t len = dr_min(DR_VMA_BLOCK, size - off);
        if (!(pattern >> b % 64 & 1))
            continue;
        for (uint64_t i = 0; i < len; i += 8)
            put_le64(bytes + off + i, next_random(&state));
        memset(bytes + size, 0, 8);
        ok(dr_file_pwrite(file, bytes + off, off, len, &err));
    }
    dr_file_unref(file);
    return bytes;
}

#endif
