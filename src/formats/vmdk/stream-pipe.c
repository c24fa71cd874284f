/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading a streamOptimized image in one pass: what comes before the first grain, then marker after
 * marker. The tables are not needed, since each grain says where it belongs; where they come first
 * (VDDK, qemu-img), they tell how many grains must follow. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/stream.h"

#define FRONT_MOST     (UINT64_C(256) << 20) /* bytes in front of the first grain that are held */
#define SIZE_OF_A_PIPE (UINT64_C(1) << 62)

struct reader {
    const char *name;
    struct dr_inflow *in;
    struct vmdk_header h;
    uint64_t disk;             /* bytes */
    uint64_t at;               /* bytes read */
    uint64_t grains, expected; /* expected: UINT64_MAX = the tables come later */
    uint64_t next;             /* sector of the disk that no grain may be in front of */
};

/* Exactly len bytes. */
static int take(struct reader *r, void *buf, size_t len, struct dr_error *err)
{
    size_t got = 0;
    int ret = r->in->read(r->in->user, buf, len, &got, err);
    r->at += got;
    if (ret < 0 || got == len)
        return ret;
    return dr_fail(err, EIO, "%s: the stream is cut off: it ends at %llu, in the middle of %s",
                   r->name, (unsigned long long)r->at,
                   r->grains > 0 ? "its grains" : "what comes before them");
}

/* ------------------------------------------------------------------ what comes first */

static int read_text(struct reader *r, const uint8_t *front, struct dr_error *err)
{
    struct vmdk_desc d = {0};
    uint32_t parent = VMDK_NO_PARENT;
    const uint8_t *text = front + r->h.desc_off * VMDK_SECTOR;
    int ret = vmdk_desc_parse(&d, r->name, text,
                              (size_t)dr_min(r->h.desc_len * VMDK_SECTOR, VMDK_DESC_MAX), err);
    if (ret < 0)
        return ret;
    ret = vmdk_desc_get_id(&d, r->name, "parentCID", &parent, err);
    if (ret == -ENOENT)
        ret = 0;
    if (ret == 0 && (parent != VMDK_NO_PARENT || vmdk_desc_find(&d, "parentFileNameHint")))
        ret = dr_fail(err, ENOTSUP, "%s: has a parent, and cannot be read from a pipe without it",
                      r->name);
    if (ret == 0 && (d.n_extents != 1 || d.extents[0].type != VMDK_SPARSE ||
                     d.extents[0].sectors > dr_round_up(r->h.capacity, r->h.grain)))
        ret = dr_fail(err, EINVAL,
                      "%s: the descriptor has %zu extents, expected one of at most %llu sectors",
                      r->name, d.n_extents, (unsigned long long)r->h.capacity);
    if (ret == 0)
        r->disk = d.extents[0].sectors * VMDK_SECTOR;
    vmdk_desc_free(&d);
    return ret;
}

/* How many grains do the tables in front lead to? */
static int count_grains(struct reader *r, const uint8_t *front, struct dr_error *err)
{
    const struct vmdk_header *h = &r->h;
    uint64_t sectors = h->overhead;
    r->expected = UINT64_MAX;
    if (!dr_inside(h->gd_off, h->gd_sectors, sectors))
        return 0;
    r->expected = 0;
    for (uint64_t t = 0; t < h->n_tables; t++) {
        uint32_t gde = get_le32(front + h->gd_off * VMDK_SECTOR + t * 4);
        if (gde != 0 && !dr_inside(gde, h->gt_sectors, sectors))
            return dr_fail(
                err, EIO,
                "%s: grain directory entry %llu says sector %u, expected one in front of "
                "the grains at %llu",
                r->name, (unsigned long long)t, gde, (unsigned long long)sectors);
        for (uint32_t i = 0; gde != 0 && i < h->gtes; i++)
            r->expected += get_le32(front + (uint64_t)gde * VMDK_SECTOR + i * 4) > 1;
    }
    return 0;
}

static int read_front(struct reader *r, struct dr_error *err)
{
    uint8_t head[VMDK_HEADER_SIZE];
    int ret = take(r, head, sizeof(head), err);
    if (ret < 0)
        return ret;
    if (vmdk_magic(head, sizeof(head)) == VMDK_MAGIC_NONE)
        return dr_fail(err, ENOTSUP,
                       "%s: a VMDK whose data is in other files cannot be read from a pipe",
                       r->name);
    ret = vmdk_header_decode(&r->h, r->name, head, SIZE_OF_A_PIPE, err);
    if (ret < 0)
        return ret;
    uint64_t len = r->h.overhead * VMDK_SECTOR;
    if (!(r->h.flags & VMDK_FLAG_COMPRESSED))
        return dr_fail(err, ENOTSUP,
                       "%s: a VMDK that is no stream (streamOptimized) may have its grains in any "
                       "order and cannot be read from a pipe: save it to a file first",
                       r->name);
    if (r->h.desc_off == 0 || !dr_inside(r->h.desc_off, r->h.desc_len, r->h.overhead) ||
        r->h.overhead > FRONT_MOST / VMDK_SECTOR)
        return dr_fail(err, ENOTSUP,
                       "%s: the descriptor (sector %llu) is not in front of the grains (sector "
                       "%llu): it cannot be read from a pipe",
                       r->name, (unsigned long long)r->h.desc_off,
                       (unsigned long long)r->h.overhead);
    CLEANUP_FREE uint8_t *front = malloc((size_t)len);
    if (!front)
        return dr_fail_errno(err, ENOMEM, "%s", r->name);
    memcpy(front, head, sizeof(head));
    ret = take(r, front + sizeof(head), (size_t)len - sizeof(head), err);
    if (ret == 0)
        ret = read_text(r, front, err);
    return ret < 0 ? ret : count_grains(r, front, err);
}

static void reader_free(void *state)
{
    free(state);
}

static int reader_begin(const char *name, struct dr_inflow *in, void **state,
                        struct dr_incoming *what, struct dr_error *err)
{
    struct reader *r = *state = calloc(1, sizeof(*r));
    if (!r)
        return dr_fail_errno(err, ENOMEM, "%s", name);
    r->name = name;
    r->in = in;
    int ret = read_front(r, err);
    what->size = r->disk;
    what->unit = r->h.grain * VMDK_SECTOR;
    what->coded_most = (size_t)(vmdk_coded_max(&r->h) + 2 * VMDK_SECTOR);
    return ret;
}

/* ------------------------------------------------------------------ grains */

static int skip(struct reader *r, uint64_t sectors, struct dr_error *err)
{
    uint8_t buf[VMDK_SECTOR];
    int ret = 0;
    for (uint64_t i = 0; ret == 0 && i < sectors; i++)
        ret = take(r, buf, sizeof(buf), err);
    return ret;
}

/* All that was announced has come. */
static int check_end(const struct reader *r, struct dr_error *err)
{
    if (r->expected == UINT64_MAX || r->grains == r->expected)
        return 0;
    return dr_fail(
        err, EIO, "%s: the stream is cut off: %llu grains came up to %llu, expected %llu", r->name,
        (unsigned long long)r->grains, (unsigned long long)r->at, (unsigned long long)r->expected);
}

static int check_place(struct reader *r, const struct vmdk_marker *m, struct dr_error *err)
{
    if (!vmdk_marker_is_grain(&r->h, m) || m->val * VMDK_SECTOR >= r->disk)
        return dr_fail(err, EIO,
                       "%s: the marker at offset %llu says %u bytes of sector %llu of the disk, "
                       "which cannot be",
                       r->name, (unsigned long long)(r->at - VMDK_SECTOR), m->size,
                       (unsigned long long)m->val);
    if (m->val < r->next)
        return dr_fail(err, ENOTSUP,
                       "%s: the grain at offset %llu (sector %llu of the disk) is not in the order "
                       "of the disk: save the stream to a file first",
                       r->name, (unsigned long long)(r->at - VMDK_SECTOR),
                       (unsigned long long)m->val);
    r->next = m->val + r->h.grain;
    r->grains++;
    return 0;
}

static int reader_next(void *state, uint8_t *coded, size_t *len, uint64_t *off,
                       struct dr_error *err)
{
    struct reader *r = state;
    for (;;) {
        size_t got = 0;
        if (r->expected == r->grains)
            return 0;
        int ret = r->in->read(r->in->user, coded, VMDK_SECTOR, &got, err);
        r->at += got;
        if (ret < 0)
            return ret;
        if (got < VMDK_SECTOR)
            return r->expected != UINT64_MAX
                       ? check_end(r, err)
                       : dr_fail(err, EIO,
                                 "%s: the stream is cut off: it ends at %llu without a "
                                 "mark that it should",
                                 r->name, (unsigned long long)r->at);
        struct vmdk_marker m = vmdk_marker_decode(coded);
        if (m.size > 0) {
            ret = check_place(r, &m, err);
            *off = m.val * VMDK_SECTOR;
            *len = VMDK_MARKER_HEAD + m.size;
            size_t rest = (size_t)(vmdk_coded_sectors(m.size) - 1) * VMDK_SECTOR;
            /* Of the last grain qemu-img may leave out the padding. */
            if (ret == 0 && rest > 0 && r->grains == r->expected)
                rest = *len > VMDK_SECTOR ? *len - VMDK_SECTOR : 0;
            if (ret == 0 && rest > 0)
                ret = take(r, coded + VMDK_SECTOR, rest, err);
            return ret < 0 ? ret : 1;
        }
        if (!vmdk_marker_is_known(&r->h, &m))
            return dr_fail(err, EIO,
                           "%s: the marker at offset %llu is of type %u with %llu sectors, "
                           "which is none that is known",
                           r->name, (unsigned long long)(r->at - VMDK_SECTOR), m.type,
                           (unsigned long long)m.val);
        if (m.type == VMDK_MARKER_EOS)
            return check_end(r, err);
        ret = skip(r, m.val, err);
        if (ret < 0)
            return ret;
    }
}

static int reader_decode(const void *state, const uint8_t *coded, size_t len, uint64_t off,
                         uint8_t *out, struct dr_error *err)
{
    const struct reader *r = state;
    uint64_t grain = r->h.grain * VMDK_SECTOR;
    return vmdk_grain_inflate(r->name, off, off / VMDK_SECTOR, coded + VMDK_MARKER_HEAD,
                              (uint32_t)(len - VMDK_MARKER_HEAD), out, grain,
                              dr_min(grain, r->disk - off), err);
}

const struct dr_incoming_ops vmdk_incoming = {
    .begin = reader_begin,
    .next = reader_next,
    .decode = reader_decode,
    .free = reader_free,
};
