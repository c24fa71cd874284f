/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* streamOptimized images as different programs lay them out, made by hand. Grains are 4 KiB, so a
 * table is for 2 MiB; grain g is filled with bytes that follow from g. */
#ifndef DROVER_TESTS_TEST_VMDK_STREAM_H
#define DROVER_TESTS_TEST_VMDK_STREAM_H

#include <stdio.h>
#include <stdlib.h>

#include "base/codec.h"
#include "base/bytes.h"
#include "formats/vmdk/stream.h"
#include "test-in-memory.h"

#define GRAIN_SECTORS 8u
#define GRAIN         (GRAIN_SECTORS * 512u)
#define TABLES        3u
#define CAPACITY      (2 * 512 * GRAIN_SECTORS + 100 * GRAIN_SECTORS + 3) /* the last one is cut */
#define LAST_GRAIN    (2 * 512 + 100)
#define DISK          (CAPACITY * 512u)
#define ROOM          (1u << 20)

enum layout {
    FOOTER,            /* ovftool: nothing but the footer says where the directory is */
    FOOTER_AND_HEADER, /* VMDK-stream-converter: so does the header */
    STALE_HEADER,      /* as before, but the header is wrong */
    FRONT,             /* VDDK: tables in front of the grains, no footer */
    FRONT_TWICE,       /* qemu-img: two of each, and no end of stream */
    LAYOUTS,
};

struct making {
    enum layout layout;
    bool raw;         /* deflate without zlib's frame */
    bool empty_table; /* write tables without grains, too */
    unsigned padding; /* bytes behind the end */
    /* made */
    uint8_t *buf;
    size_t len;
    uint32_t tables[TABLES], copies[TABLES], gtes[TABLES * 512];
};

static const uint64_t made_grains[] = {0, 1, 5, 511, 512 + 511, LAST_GRAIN};
#define N_GRAINS (sizeof(made_grains) / sizeof(made_grains[0]))

static inline void fill_grain(uint64_t grain, uint8_t *plain)
{
    for (size_t i = 0; i < GRAIN; i++)
        plain[i] = (uint8_t)(1 + (grain * 7 + i / 16) % 251);
}

static inline void expected_disk(uint8_t *disk)
{
    uint8_t plain[GRAIN];
    memset(disk, 0, DISK);
    for (size_t i = 0; i < N_GRAINS; i++) {
        fill_grain(made_grains[i], plain);
        memcpy(disk + made_grains[i] * GRAIN, plain, dr_min(GRAIN, DISK - made_grains[i] * GRAIN));
    }
}

static inline void *add_sectors(struct making *m, size_t n)
{
    void *at = m->buf + m->len;
    m->len += n * 512;
    assert_true(m->len <= ROOM);
    return at;
}

static inline uint32_t sector_now(const struct making *m)
{
    return (uint32_t)(m->len / 512);
}

static inline void add_marker(struct making *m, uint64_t val, uint32_t type)
{
    uint8_t *at = add_sectors(m, 1);
    put_le64(at, val);
    put_le32(at + 12, type);
}

static inline void add_grain(struct making *m, uint64_t grain)
{
    uint8_t plain[GRAIN], coded[2 * GRAIN];
    fill_grain(grain, plain);
    size_t plain_len = grain == LAST_GRAIN ? 3 * 512 : GRAIN;
    int64_t len = dr_zlib(plain, plain_len, 6, coded, sizeof(coded));
    assert_true(len > 6);
    size_t skip = m->raw ? 2 : 0, used = (size_t)len - (m->raw ? 6 : 0);
    m->gtes[grain] = sector_now(m);
    uint8_t *at = add_sectors(m, dr_div_up(12 + used, 512));
    put_le64(at, grain * GRAIN_SECTORS);
    put_le32(at + 8, (uint32_t)used);
    memcpy(at + 12, coded + skip, used);
}

static inline void put_table(const struct making *m, uint8_t *at, uint64_t table)
{
    for (size_t i = 0; i < 512; i++)
        put_le32(at + i * 4, m->gtes[table * 512 + i]);
}

static inline void add_table(struct making *m, uint64_t table)
{
    bool used = m->empty_table;
    for (size_t i = 0; i < 512; i++)
        used |= m->gtes[table * 512 + i] != 0;
    if (!used)
        return;
    add_marker(m, 4, VMDK_MARKER_GT);
    m->tables[table] = sector_now(m);
    put_table(m, add_sectors(m, 4), table);
}

static inline void header(const struct making *m, uint64_t gd_off, uint64_t rgd_off,
                          uint64_t overhead, uint8_t buf[512])
{
    struct vmdk_header h = {
        .version = m->layout == FRONT_TWICE ? 1 : 3,
        .flags = 0x30001 | (m->layout == FRONT_TWICE ? 2 : 0),
        .capacity = CAPACITY,
        .grain = GRAIN_SECTORS,
        .desc_off = 1,
        .desc_len = 2,
        .gtes = 512,
        .rgd_off = rgd_off,
        .gd_off = gd_off,
        .overhead = overhead,
    };
    vmdk_header_encode(&h, buf);
    put_le16(buf + 77, 1);
}

static inline void make_stream(struct making *m)
{
    bool front = m->layout == FRONT || m->layout == FRONT_TWICE;
    unsigned copies = m->layout == FRONT_TWICE ? 2 : front;
    m->buf = calloc(1, ROOM);
    m->len = 0;
    assert_non_null(m->buf);
    uint8_t *head = add_sectors(m, 1), *text = add_sectors(m, 2), *dirs[2] = {NULL, NULL};
    uint32_t dir_at[2] = {0, 0}, gd_at = 0;
    snprintf((char *)text, 1024,
             "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
             "createType=\"streamOptimized\"\n\n# Extent description\n"
             "RDONLY %u SPARSE \"generated-stream.vmdk\"\n\n# The Disk Data Base \n#DDB\n",
             CAPACITY);
    for (unsigned i = 0; i < copies; i++) {
        dir_at[i] = sector_now(m);
        dirs[i] = add_sectors(m, 1 + TABLES * 4);
    }
    add_sectors(m, (GRAIN_SECTORS - sector_now(m) % GRAIN_SECTORS) % GRAIN_SECTORS);
    uint32_t overhead = sector_now(m);
    for (size_t i = 0, table = 0; i <= N_GRAINS; i++) {
        uint64_t next = i < N_GRAINS ? made_grains[i] / 512 : TABLES;
        for (; table < next; table++)
            if (!front)
                add_table(m, table);
        if (i < N_GRAINS)
            add_grain(m, made_grains[i]);
        if (i == 1 && !front)
            add_marker(m, 0, VMDK_MARKER_PROGRESS);
    }
    for (unsigned i = 0; i < copies; i++)
        for (uint32_t t = 0; t < TABLES; t++) {
            put_le32(dirs[i] + t * 4, dir_at[i] + 1 + t * 4);
            put_table(m, dirs[i] + 512 + t * 2048, t);
        }
    if (!front) {
        add_marker(m, 1, VMDK_MARKER_GD);
        gd_at = sector_now(m);
        uint8_t *gd = add_sectors(m, 1);
        for (uint32_t t = 0; t < TABLES; t++)
            put_le32(gd + t * 4, m->tables[t]);
        add_marker(m, 1, VMDK_MARKER_FOOTER);
        header(m, gd_at, 0, overhead, add_sectors(m, 1));
    }
    if (m->layout != FRONT_TWICE)
        add_sectors(m, 1); /* end of stream */
    uint64_t where[LAYOUTS] = {VMDK_GD_AT_END, gd_at, 1, dir_at[0], dir_at[1]};
    if (m->layout == STALE_HEADER)
        where[STALE_HEADER] = overhead;
    header(m, where[m->layout], dir_at[0], overhead, head);
    m->len += m->padding;
    assert_true(m->len <= ROOM);
}

static inline void save_stream(const struct making *m, const char *path)
{
    struct dr_file *f;
    mem->ops->unlink(mem, path, NULL);
    ok(dr_file_open(mem, path, DR_FILE_RDWR | DR_FILE_CREATE, &f, &err));
    ok(dr_file_pwrite(f, m->buf, 0, m->len, &err));
    dr_file_unref(f);
}

#endif
