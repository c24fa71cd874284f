/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An archive, read in both ways: from a file that can seek and one after another. Both must come to
 * the same end and leave the same disks; what is good has every cluster, in the index too.
 *
 * The input: a byte of flags, the archive. Its checksums are put right first (unless the flags say
 * no), else nothing would get past them. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "archive/vma-index.h"
#include "archive/vma-layout.h"
#include "archive/vma-read.h"
#include "core/core.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define PATH  "/a.vma"
#define SMALL (1u << 20) /* larger disks are only checked */

enum { AS_IT_IS = 1, SALVAGE = 2, HEADERS = 4, FILLED = 8 };

/* ------------------------------------------------------------------ checksums put right */

static void resum_extents(uint8_t *buf, size_t size, size_t at)
{
    const uint8_t *uuid = buf + VMA_AT_UUID;
    while (at + VMA_EXTENT_HEADER <= size) {
        uint8_t *extent = buf + at;
        unsigned blocks = 0;
        if (memcmp(extent, VMA_EXTENT_MAGIC, 6) == 0) {
            for (unsigned i = 0; i < VMA_SLOTS; i++)
                if (extent[VMA_AT_SLOTS + i * 8 + 3])
                    blocks += (unsigned)__builtin_popcount(get_be16(extent + VMA_AT_SLOTS + i * 8));
            memcpy(extent + VMA_AT_EXTENT_UUID, uuid, 16);
            vma_md5(extent, VMA_EXTENT_HEADER, VMA_AT_EXTENT_MD5, extent + VMA_AT_EXTENT_MD5,
                    "a.vma", NULL);
        }
        at += VMA_EXTENT_HEADER + blocks * (size_t)DR_VMA_BLOCK;
    }
}

static void resum(uint8_t *buf, size_t size)
{
    uint32_t header;
    if (size < VMA_FIXED_HEADER || vma_header_size(buf, PATH, &header, NULL) < 0 || header > size)
        return;
    vma_md5(buf, header, VMA_AT_MD5, buf + VMA_AT_MD5, "a.vma", NULL);
    resum_extents(buf, size, header);
}

/* ------------------------------------------------------------------ one reading */

struct outcome {
    int result;
    struct dr_vma_extract_result counts;
    uint64_t told[6]; /* bytes of damage by kind */
    uint8_t *disk;    /* of the first small disk */
    uint64_t size;
};

static void on_damage(void *user, const struct dr_vma_damage *d)
{
    if (!d->text || d->len == 0)
        abort();
    ((struct outcome *)user)->told[d->kind] += d->len;
}

static bool make_target(struct dr_fs *fs, const struct dr_vma_header *h, unsigned flags,
                        struct dr_vma_target *t)
{
    static uint8_t fill[SMALL];
    size_t i = 0;
    while (i < h->n_disks && h->disks[i].size > SMALL)
        i++;
    if (i == h->n_disks)
        return false;
    struct dr_file *f;
    struct dr_open_options o = {.format = "raw", .flags = DR_OPEN_RDWR};
    uint64_t size = dr_round_up(h->disks[i].size, 512);
    memset(fill, flags & FILLED ? 0x5a : 0, sizeof(fill));
    if (dr_file_open(fs, "/t", DR_FILE_CREATE | DR_FILE_TRUNCATE, &f, NULL) < 0 ||
        dr_file_pwrite(f, fill, 0, (size_t)size, NULL) < 0)
        abort();
    dr_file_unref(f);
    *t = (struct dr_vma_target){.id = h->disks[i].id, .is_zero = !(flags & FILLED)};
    if (dr_open_fs(fs, "/t", &o, &t->disk, NULL) < 0)
        abort();
    return true;
}

static void end_target(struct dr_vma_target *t, struct outcome *out)
{
    out->size = dr_size(t->disk);
    out->disk = malloc(out->size);
    if (!out->disk || dr_pread(t->disk, out->disk, 0, out->size, NULL) < 0 ||
        dr_close(t->disk, NULL) < 0)
        abort();
}

static void read_all(struct dr_fs *fs, unsigned flags, bool in_order, struct outcome *out)
{
    struct dr_vma *vma;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_job job = {.workers = 1};
    struct dr_vma_target t;
    struct dr_vma_extract_options o = {.salvage = flags & SALVAGE,
                                       .headers_only = flags & HEADERS,
                                       .damage = on_damage,
                                       .user = out};
    *out = (struct outcome){0};
    out->result = dr_vma_open_fs(fs, PATH, NULL, &vma, &err);
    if (out->result == 0) {
        vma->in_order = in_order;
        if (!(flags & HEADERS) && make_target(fs, dr_vma_header(vma), flags, &t)) {
            o.targets = &t;
            o.n_targets = 1;
        }
        out->result = dr_vma_extract(vma, &o, &job, &out->counts, &err);
        if (o.n_targets)
            end_target(&t, out);
        dr_vma_close(vma);
    }
    if ((out->result < 0) != (err.text[0] != '\0'))
        abort();
}

/* ------------------------------------------------------------------ what must hold */

static void check_alone(const struct outcome *o, unsigned flags)
{
    const struct dr_vma_extract_result *c = &o->counts;
    const uint64_t counted[] = {c->missing_bytes,   c->duplicate_bytes, c->checksum_bytes,
                                c->different_bytes, c->extent_bytes,    c->doubtful_bytes};
    if (memcmp(counted, o->told, sizeof(counted)) != 0)
        abort();
    uint64_t any = 0;
    for (unsigned i = 0; i < 6; i++)
        any |= counted[i];
    if (!(flags & SALVAGE) && o->result == 0 && any)
        abort();
    if (!(flags & SALVAGE) && o->result == -EBADMSG && !any)
        abort();
}

static void check_same(const struct outcome *a, const struct outcome *b)
{
    if (a->result != b->result || memcmp(&a->counts, &b->counts, sizeof(a->counts)) != 0 ||
        a->size != b->size)
        abort();
    if (a->result == 0 && a->disk && memcmp(a->disk, b->disk, a->size) != 0)
        abort();
}

/* The index knows the same archives as good. */
static void check_index(struct dr_fs *fs, const struct outcome *o)
{
    struct dr_vma *vma;
    struct vma_index *index = NULL;
    if (dr_vma_open_fs(fs, PATH, NULL, &vma, NULL) < 0)
        return;
    const struct dr_vma_header *h = dr_vma_header(vma);
    struct dr_file *file = dr_source_file(vma->source);
    int r = file ? vma_index_build(file, h, NULL, &index, NULL) : -ENOTSUP;
    if (file && o->result == 0 && r < 0)
        abort();
    for (size_t i = 0; r == 0 && i < h->n_disks; i++)
        for (uint64_t c = 0; !h->disks[i].vmstate && c < vma_clusters(h->disks[i].size); c++)
            if (!vma_index_find(index, h->disks[i].id, (uint32_t)c).present)
                abort();
    vma_index_free(index);
    dr_vma_close(vma);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    struct outcome a, b;
    unsigned flags = data[0];
    struct dr_fs *fs = dr_fs_memory_new();
    struct dr_file *f;
    uint8_t *copy = malloc(size);
    if (!fs || !copy || dr_file_open(fs, PATH, DR_FILE_CREATE, &f, NULL) < 0)
        abort();
    memcpy(copy, data + 1, size - 1);
    if (!(flags & AS_IT_IS))
        resum(copy, size - 1);
    if (size > 1 && dr_file_pwrite(f, copy, 0, size - 1, NULL) < 0)
        abort();
    dr_file_unref(f);
    free(copy);
    read_all(fs, flags, false, &a);
    read_all(fs, flags, true, &b);
    check_alone(&a, flags);
    check_alone(&b, flags);
    check_same(&a, &b);
    if (!(flags & SALVAGE))
        check_index(fs, &a);
    free(a.disk);
    free(b.disk);
    dr_fs_memory_free(fs);
    return 0;
}
