/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What comes in front of an archive and next to it: compressed containers, with and without a seek
 * table, and the side file of the index.
 *
 * The input: a byte (even: a container; odd: the disks of a side file, whose other fields and
 * checksum are put right), then the bytes. */
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "storage/source.h"
#include "archive/vma-index.h"
#include "base/bytes.h"
#include "base/cleanup.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PATH   "/a.vma"
#define SIDE   "/a.vma.idx"
#define ENOUGH (8u << 20) /* plain bytes to look at */
#define FIXED  72u
#define PIECE  50000u

static void must(bool true_)
{
    if (!true_)
        abort();
}

static void put(struct dr_fs *fs, const char *path, const void *bytes, size_t n)
{
    struct dr_file *f;
    must(dr_file_open(fs, path, DR_FILE_CREATE | DR_FILE_TRUNCATE, &f, NULL) == 0);
    must(n == 0 || dr_file_pwrite(f, bytes, 0, n, NULL) == 0);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ containers */

/* The bytes that were read one after another are those at random, too. */
static void compare(struct dr_file *plain, const uint8_t *buf, uint64_t at, size_t n)
{
    CLEANUP_FREE uint8_t *again = malloc(n + 1);
    size_t got = 0;
    must(again && dr_file_pread_short(plain, again, at, n, &got, NULL) == 0);
    must(got == n && memcmp(buf, again, n) == 0);
}

static void read_source(struct dr_fs *fs)
{
    static uint8_t buf[PIECE];
    struct dr_error err = DR_ERROR_INIT;
    struct dr_source *s;
    size_t got = 1;
    int r = dr_source_open(fs, PATH, -1, &s, &err);
    if (r < 0) {
        must(err.text[0]);
        return;
    }
    for (unsigned turn = 0; r == 0 && got > 0 && dr_source_pos(s) < ENOUGH; turn++) {
        uint64_t at = dr_source_pos(s), skipped;
        r = dr_source_read(s, buf, 1 + turn * 7919 % PIECE, &got, &err);
        must(dr_source_pos(s) == at + got);
        if (r == 0 && got > 0 && dr_source_file(s))
            compare(dr_source_file(s), buf, at, got);
        if (r == 0 && turn % 5 == 4)
            r = dr_source_skip(s, 1000, &skipped, &err);
    }
    must((r < 0) == (err.text[0] != '\0'));
    dr_source_close(s);
}

static void read_plain_file(struct dr_fs *fs)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_file *f, *plain;
    const char *compression;
    must(dr_file_open(fs, PATH, 0, &f, NULL) == 0);
    int r = dr_source_plain_file(f, &plain, &compression, &err);
    must((r < 0) == (err.text[0] != '\0') && (r < 0) == !plain);
    dr_file_unref(plain);
    dr_file_unref(f);
}

/* ------------------------------------------------------------------ side files */

/* Two disks: clusters of all kinds; clusters of none. */
static void make_archive(struct dr_fs *fs)
{
    struct dr_vma_disk disks[] = {{1, "a", 40 * DR_VMA_CLUSTER, false},
                                  {9, "b", 600ull * DR_VMA_CLUSTER, false}};
    struct dr_vma_header h = {.disks = disks, .n_disks = 2};
    uint8_t *head;
    uint32_t size;
    must(vma_header_build(&h, &head, &size, NULL) == 0);
    size_t room = size + 700 * (VMA_EXTENT_HEADER + DR_VMA_CLUSTER), n = size;
    CLEANUP_FREE uint8_t *bytes = calloc(1, room);
    must(bytes);
    memcpy(bytes, head, size);
    free(head);
    for (uint32_t i = 0; i < 640; i++) {
        struct vma_slot s = {i < 40 ? 1 : 9, i < 40 ? i : i - 40, 0, 0};
        s.mask = i >= 40 ? 0 : i > 0 && i < 5 ? 0xffff : (uint16_t)(i % 3);
        must(vma_extent_build(&s, 1, h.uuid, bytes + n, NULL) == 0);
        n += VMA_EXTENT_HEADER + (size_t)__builtin_popcount(s.mask) * DR_VMA_BLOCK;
    }
    put(fs, PATH, bytes, n);
}

static void load_side(struct dr_fs *fs, struct dr_file *archive, const struct dr_vma_header *h)
{
    struct dr_error err = DR_ERROR_INIT;
    struct vma_index *index;
    int r = vma_index_load(fs, SIDE, archive, h, &index, &err);
    must((r < 0) == (err.text[0] != '\0') && (r < 0) == !index);
    for (size_t i = 0; r == 0 && i < h->n_disks; i++)
        for (uint32_t c = 0; c < vma_clusters(h->disks[i].size); c++) {
            struct vma_place p = vma_index_find(index, h->disks[i].id, c);
            uint64_t bytes = (uint64_t)__builtin_popcount(p.mask) * DR_VMA_BLOCK;
            must(p.present && (!p.mask || dr_inside(p.host, bytes, dr_file_size(archive))));
        }
    vma_index_free(index);
}

static void fake_side(struct dr_fs *fs, const uint8_t *data, size_t size)
{
    struct dr_file *f = NULL;
    CLEANUP_FREE uint8_t *bytes = malloc(FIXED + size + 8);
    must(bytes && dr_file_open(fs, SIDE, 0, &f, NULL) == 0);
    must(dr_file_pread(f, bytes, 0, FIXED, NULL) == 0);
    dr_file_unref(f);
    memcpy(bytes + FIXED, data, size);
    put_le64(bytes + FIXED + size, XXH3_64bits(bytes, FIXED + size));
    put(fs, SIDE, bytes, FIXED + size + 8);
}

static void try_side(struct dr_fs *fs, const uint8_t *data, size_t size)
{
    struct dr_vma_header h = {0};
    struct vma_index *index;
    struct dr_file *archive;
    make_archive(fs);
    must(dr_file_open(fs, PATH, 0, &archive, NULL) == 0);
    must(vma_index_header(archive, &h, NULL, NULL, NULL) == 0);
    must(vma_index_build(archive, &h, NULL, &index, NULL) == 0);
    must(vma_index_save(index, fs, SIDE, archive, &h, NULL) == 0);
    vma_index_free(index);
    load_side(fs, archive, &h);
    fake_side(fs, data, size);
    load_side(fs, archive, &h);
    vma_header_free(&h);
    dr_file_unref(archive);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct dr_fs *fs = dr_fs_memory_new();
    must(fs);
    if (size > 0 && data[0] % 2) {
        try_side(fs, data + 1, size - 1);
    } else if (size > 0) {
        put(fs, PATH, data + 1, size - 1);
        read_source(fs);
        read_plain_file(fs);
    }
    dr_fs_memory_free(fs);
    return 0;
}
