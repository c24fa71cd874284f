/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Archives made extent by extent, in a file system in memory, and what their disks must read. */
#ifndef DROVER_TESTS_TEST_VMA_ARCHIVE_H
#define DROVER_TESTS_TEST_VMA_ARCHIVE_H

#include <stdio.h>

#include "archive/vma-layout.h"
#include "archive/vma-read.h"
#include "test-ops.h"

#define ARCHIVE "/a.vma"
#define TEXT    32768

struct archive {
    struct dr_vma_header header;
    struct dr_vma_disk disks[256];
    struct dr_vma_config config;
    uint8_t *buf;
    size_t len, room;
    size_t extents[64]; /* where they begin */
    unsigned n_extents;
    uint8_t *image[256]; /* by id: what the disks read */
};

struct bench {
    struct dr_fs *fs;
    struct archive a;
    bool in_order; /* as if the archive could not seek */
    char warnings[TEXT];
    char damage[TEXT]; /* a line each: kind id off len */
    unsigned workers;
    struct dr_vma_extract_result result;
};

static inline uint8_t pattern(unsigned id, uint32_t cluster, unsigned block, unsigned at)
{
    return (uint8_t)(1 + (id * 7 + cluster * 31 + block * 3 + at / 512) % 255);
}

static inline void add_disk(struct archive *a, unsigned id, const char *name, uint64_t size)
{
    a->disks[a->header.n_disks++] =
        (struct dr_vma_disk){id, name, size, strcmp(name, "vmstate") == 0};
    a->image[id] = calloc(1, size + 64 * DR_VMA_CLUSTER);
}

/* By hand where the rules for writers say no. */
static inline void end_header(struct archive *a)
{
    uint32_t size;
    struct dr_vma_disk odd = {0};
    uint64_t sizes[256];
    struct dr_vma_header *h = &a->header;
    memcpy(h->uuid, "fedcba9876543210", 16);
    h->disks = a->disks;
    for (size_t i = 0; i < h->n_disks; i++) {
        sizes[i] = a->disks[i].size;
        a->disks[i].size = dr_round_up(a->disks[i].size, 512);
        if (a->disks[i].id == 255) {
            odd = a->disks[i];
            a->disks[i].id = 254;
        }
    }
    ok(vma_header_build(h, &a->buf, &size, &err));
    for (size_t i = 0; i < h->n_disks; i++) {
        a->disks[i].size = sizes[i];
        put_be64(a->buf + VMA_AT_DEVICES + a->disks[i].id * 32 + 8, sizes[i]);
    }
    if (odd.id) {
        memmove(a->buf + VMA_AT_DEVICES + 255 * 32, a->buf + VMA_AT_DEVICES + 254 * 32, 32);
        memset(a->buf + VMA_AT_DEVICES + 254 * 32, 0, 32);
        a->disks[h->n_disks - 1].id = 255;
    }
    assert_int_equal(vma_md5(a->buf, size, VMA_AT_MD5, a->buf + VMA_AT_MD5, "a.vma", NULL), 0);
    a->len = size;
}

/* Room for more bytes. Seldom: the C library may fill what it has left over each time. */
static inline void need(struct archive *a, size_t more)
{
    if (a->len + more <= a->room)
        return;
    a->room = 2 * (a->len + more);
    uint8_t *buf = malloc(a->room);
    memcpy(buf, a->buf, a->len);
    free(a->buf);
    a->buf = buf;
}

static inline void add_cluster(struct archive *a, const struct vma_slot *s, bool counts)
{
    for (unsigned k = 0; k < 16; k++) {
        if (!(s->mask & 1u << k))
            continue;
        for (unsigned at = 0; at < 4096; at++) {
            uint8_t v = pattern(s->id, s->cluster, k, at);
            a->buf[a->len + at] = v;
            if (counts && a->image[s->id])
                a->image[s->id][(uint64_t)s->cluster * 65536 + k * 4096 + at] = v;
        }
        a->len += 4096;
    }
}

/* counts: the disks read so (not for duplicates and other disks' clusters). */
static inline void add_extent(struct archive *a, const struct vma_slot *slots, unsigned n,
                              bool counts)
{
    need(a, 512 + (size_t)n * 65536);
    a->extents[a->n_extents++] = a->len;
    assert_int_equal(vma_extent_build(slots, n, a->header.uuid, a->buf + a->len, NULL), 0);
    a->len += 512;
    for (unsigned i = 0; i < n; i++)
        if (slots[i].id)
            add_cluster(a, &slots[i], counts);
}

static inline void write_file(struct dr_fs *fs, const char *path, const void *data, size_t len)
{
    struct dr_file *f;
    ok(dr_file_open(fs, path, DR_FILE_CREATE | DR_FILE_TRUNCATE, &f, &err));
    ok(dr_file_truncate(f, 0, &err));
    ok(dr_file_pwrite(f, data, 0, len, &err));
    dr_file_unref(f);
}

static inline void store(struct bench *b)
{
    write_file(b->fs, ARCHIVE, b->a.buf, b->a.len);
}

static inline int setup(void **state)
{
    struct bench *b = calloc(1, sizeof(*b));
    b->fs = dr_fs_memory_new();
    *state = b;
    return 0;
}

static inline int setup_in_order(void **state)
{
    setup(state);
    ((struct bench *)*state)->in_order = true;
    return 0;
}

static inline void empty_archive(struct archive *a)
{
    for (unsigned i = 0; i < 256; i++)
        free(a->image[i]);
    free(a->buf);
    *a = (struct archive){0};
}

static inline int teardown(void **state)
{
    struct bench *b = *state;
    empty_archive(&b->a);
    dr_fs_memory_free(b->fs);
    free(b);
    return 0;
}

static inline void note_warning(void *user, const char *text)
{
    struct bench *b = user;
    size_t n = strlen(b->warnings);
    snprintf(b->warnings + n, TEXT - n, "%s\n", text);
}

static inline void note_damage(void *user, const struct dr_vma_damage *d)
{
    static const char *const kinds[] = {"missing", "duplicate", "checksum", "differs", "extent"};
    struct bench *b = user;
    size_t n = strlen(b->damage);
    assert_non_null(d->text);
    snprintf(b->damage + n, TEXT - n, "%s %u %llu %llu\n", kinds[d->kind], d->id,
             (unsigned long long)d->off, (unsigned long long)d->len);
}

/* Opens ARCHIVE and reads it once. */
static inline int extract(struct bench *b, struct dr_vma_extract_options o, struct dr_error *err)
{
    struct dr_vma_open_options open = {.message = note_warning, .user = b};
    struct dr_job job = {.workers = b->workers};
    struct dr_vma *vma;
    b->warnings[0] = b->damage[0] = '\0';
    int r = dr_vma_open_fs(b->fs, ARCHIVE, &open, &vma, err);
    if (r < 0)
        return r;
    vma->in_order = b->in_order;
    o.damage = note_damage;
    o.user = b;
    r = dr_vma_extract(vma, &o, &job, &b->result, err);
    dr_vma_close(vma);
    return r;
}

static inline const char *target_path(unsigned id)
{
    static char path[32];
    snprintf(path, sizeof(path), "/disk%u", id);
    return path;
}

/* A raw disk of size bytes, all `fill`, open for the extraction. */
static inline struct dr_vma_target target(struct bench *b, unsigned id, uint64_t size, int fill)
{
    struct dr_open_options o = {.format = "raw", .flags = DR_OPEN_RDWR};
    struct dr_vma_target t = {.id = id, .is_zero = fill == 0};
    uint8_t *buf = malloc(size);
    memset(buf, fill, size);
    write_file(b->fs, target_path(id), buf, size);
    free(buf);
    ok(dr_open_fs(b->fs, target_path(id), &o, &t.disk, &err));
    return t;
}

static inline void end_target(struct dr_vma_target *t)
{
    if (t->disk)
        ok(dr_close(t->disk, &err));
    t->disk = NULL;
}

/* The target reads as the archive's disk, and `fill` behind it. */
static inline void expect_image(struct bench *b, const struct dr_vma_target *t, int fill)
{
    uint64_t size = dr_size(t->disk), own = 0;
    for (size_t i = 0; i < b->a.header.n_disks; i++)
        if (b->a.disks[i].id == t->id)
            own = dr_min(size, b->a.disks[i].size);
    uint8_t *buf = malloc(size);
    ok(dr_pread(t->disk, buf, 0, size, &err));
    for (uint64_t i = 0; i < size; i++)
        if (buf[i] != (i < own ? b->a.image[t->id][i] : (uint8_t)fill))
            fail_msg("disk %u: byte %llu is %02x", t->id, (unsigned long long)i, buf[i]);
    free(buf);
}

/* ------------------------------------------------------------------ archives */

/* Two disks of odd sizes, in any order, with all sorts of masks, unused slots and empty extents. */
static inline void odd_archive(struct archive *a)
{
    add_disk(a, 1, "drive-scsi0", 5 * 65536 + 4096 + 700);
    add_disk(a, 9, "drive-scsi1", 3 * 65536);
    end_header(a);
    add_extent(a, NULL, 0, true);
    struct vma_slot one[] = {{0, 77, 0xffff, 0}, {9, 2, 0xffff, 0}, {1, 4, 0x00f0, 0},
                             {0, 0, 0, 0},       {1, 0, 0, 0},      {1, 1, 0, 0}};
    add_extent(a, one, 6, true);
    struct vma_slot two[59] = {{0}};
    two[3] = (struct vma_slot){1, 5, 0x0003, 0}; /* the second block is cut by the disk's end */
    two[57] = (struct vma_slot){9, 0, 0x8001, 0};
    two[58] = (struct vma_slot){9, 1, 0xffff, 0};
    add_extent(a, two, 59, true);
    struct vma_slot three[] = {{1, 3, 0xffff, 0}, {1, 2, 0x7fff, 0}};
    add_extent(a, three, 2, true);
    add_extent(a, NULL, 0, true);
}

/* Four clusters of one disk, an extent each. */
static inline void plain_archive(struct archive *a)
{
    add_disk(a, 1, "drive-scsi0", 4 * 65536);
    end_header(a);
    for (uint32_t c = 0; c < 4; c++) {
        struct vma_slot s = {1, c, (uint16_t)(c == 2 ? 0 : 0x0101 << c), 0};
        add_extent(a, &s, 1, true);
    }
}

#endif
