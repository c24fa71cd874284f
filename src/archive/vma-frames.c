/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The zstd seekable format, version 0.1.0: frames, then a skippable frame with the table. */
#include <stdlib.h>
#include <zstd.h>

#include "archive/vma-output.h"
#include "base/bytes.h"
#include "base/cleanup.h"

#define SKIPPABLE_MAGIC 0x184d2a5eu
#define SEEKABLE_MAGIC  0x8f92eab1u
#define MAX_FRAMES      0x8000000u
#define ENTRY           8u /* compressed size, plain size */
#define FOOTER          9u /* number of frames, descriptor, magic */

struct frame {
    uint32_t coded, plain;
};

struct context {
    struct context *next;
    ZSTD_CCtx *zstd;
};

struct vma_frames {
    int level;
    struct frame *all;
    size_t n, room;
    pthread_mutex_t lock;
    struct context *idle; /* under lock; as many as threads ever compressed at once */
};

int vma_frames_new(int level, struct vma_frames **frames, struct dr_error *err)
{
    if (level < ZSTD_minCLevel() || level > ZSTD_maxCLevel())
        return dr_fail(err, EINVAL, "compression level %d: zstd has %d to %d", level,
                       ZSTD_minCLevel(), ZSTD_maxCLevel());
    struct vma_frames *f = calloc(1, sizeof(*f));
    if (!f)
        return dr_fail(err, ENOMEM, "out of memory for compression");
    f->level = level ? level : ZSTD_CLEVEL_DEFAULT;
    pthread_mutex_init(&f->lock, NULL);
    *frames = f;
    return 0;
}

void vma_frames_free(struct vma_frames *f)
{
    if (!f)
        return;
    while (f->idle) {
        struct context *c = f->idle;
        f->idle = c->next;
        ZSTD_freeCCtx(c->zstd);
        free(c);
    }
    pthread_mutex_destroy(&f->lock);
    free(f->all);
    free(f);
}

size_t vma_frames_bound(size_t len)
{
    return ZSTD_compressBound(len) + 4; /* and the frame's checksum */
}

static void give_back(struct vma_frames *f, struct context *c)
{
    DR_LOCK_SCOPE(&f->lock);
    c->next = f->idle;
    f->idle = c;
}

static struct context *take_idle(struct vma_frames *f)
{
    DR_LOCK_SCOPE(&f->lock);
    struct context *c = f->idle;
    if (c)
        f->idle = c->next;
    return c;
}

static struct context *take(struct vma_frames *f)
{
    struct context *c = take_idle(f);
    if (c)
        return c;
    c = calloc(1, sizeof(*c));
    if (c)
        c->zstd = ZSTD_createCCtx();
    if (c && c->zstd)
        return c;
    free(c);
    return NULL;
}

int vma_frames_compress(struct vma_frames *f, const void *plain, size_t len, void *out,
                        size_t *out_len, struct dr_error *err)
{
    struct context *c = take(f);
    if (!c)
        return dr_fail(err, ENOMEM, "out of memory for compression");
    ZSTD_CCtx_setParameter(c->zstd, ZSTD_c_compressionLevel, f->level);
    ZSTD_CCtx_setParameter(c->zstd, ZSTD_c_checksumFlag, 1);
    size_t n = ZSTD_compress2(c->zstd, out, vma_frames_bound(len), plain, len);
    give_back(f, c);
    if (ZSTD_isError(n))
        return dr_fail(err, ENOMEM, "compression failed: %s", ZSTD_getErrorName(n));
    *out_len = n;
    return 0;
}

int vma_frames_add(struct vma_frames *f, size_t coded, size_t plain, struct dr_error *err)
{
    if (f->n == MAX_FRAMES || coded > UINT32_MAX || plain > UINT32_MAX)
        return dr_fail(err, EFBIG, "the archive has more than %u zstd frames", MAX_FRAMES);
    if (f->n == f->room) {
        size_t room = f->room ? f->room * 2 : 256;
        struct frame *more = realloc(f->all, room * sizeof(*more));
        if (!more)
            return dr_fail(err, ENOMEM, "out of memory for the sizes of %zu zstd frames", room);
        f->all = more;
        f->room = room;
    }
    f->all[f->n++] = (struct frame){(uint32_t)coded, (uint32_t)plain};
    return 0;
}

int vma_frames_table(const struct vma_frames *f, uint8_t **buf, size_t *len, struct dr_error *err)
{
    size_t body = f->n * ENTRY + FOOTER;
    uint8_t *out = malloc(8 + body), *p = out;
    if (!out)
        return dr_fail(err, ENOMEM, "out of memory for the sizes of %zu zstd frames", f->n);
    put_le32(p, SKIPPABLE_MAGIC);
    put_le32(p + 4, (uint32_t)body);
    p += 8;
    for (size_t i = 0; i < f->n; i++, p += ENTRY) {
        put_le32(p, f->all[i].coded);
        put_le32(p + 4, f->all[i].plain);
    }
    put_le32(p, (uint32_t)f->n);
    p[4] = 0; /* no checksums here: each frame has its own */
    put_le32(p + 5, SEEKABLE_MAGIC);
    *buf = out;
    *len = 8 + body;
    return 0;
}
