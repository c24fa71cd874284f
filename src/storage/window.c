/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/window.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/error.h"

struct window_part {
    struct dr_file *file;
    uint64_t start; /* in the window */
    uint64_t off, len;
};

struct window {
    struct dr_file base;
    size_t n;
    struct window_part parts[];
};

static void window_close(struct dr_file *f)
{
    struct window *w = (struct window *)f;
    for (size_t i = 0; i < w->n; i++)
        dr_file_unref(w->parts[i].file);
    free(f->path);
    free(w);
}

/* The part that has the byte at off, which is inside the window. */
static const struct window_part *part_at(const struct window *w, uint64_t off)
{
    size_t low = 0, high = w->n;
    while (high - low > 1) {
        size_t mid = low + (high - low) / 2;
        if (w->parts[mid].start <= off)
            low = mid;
        else
            high = mid;
    }
    return &w->parts[low];
}

static ssize_t window_pread(struct dr_file *f, void *buf, uint64_t off, size_t len)
{
    const struct window *w = (const struct window *)f;
    uint64_t size = dr_file_size(f);
    size_t done = 0;
    len = off < size ? (size_t)dr_min(len, size - off) : 0;
    while (done < len) {
        const struct window_part *p = part_at(w, off + done);
        uint64_t inner = off + done - p->start;
        size_t want = (size_t)dr_min(len - done, p->len - inner), got = 0;
        int r =
            dr_file_pread_short(p->file, (uint8_t *)buf + done, p->off + inner, want, &got, NULL);
        if (r < 0)
            return r;
        done += got;
        if (got < want) /* the file was cut since */
            break;
    }
    return (ssize_t)done;
}

/* Nothing is ever written. */
static int window_flush(struct dr_file *f)
{
    (void)f;
    return 0;
}

static uint64_t window_mtime(struct dr_file *f)
{
    const struct window *w = (const struct window *)f;
    return w->n > 0 ? dr_file_mtime(w->parts[0].file) : 0;
}

static void window_advise(struct dr_file *f, bool random)
{
    const struct window *w = (const struct window *)f;
    for (size_t i = 0; i < w->n; i++)
        dr_file_advise(w->parts[i].file, random);
}

/* The space is that of the files it shows, which are counted by themselves. */
static int window_usage(struct dr_file *f, uint64_t *bytes)
{
    (void)f;
    *bytes = 0;
    return 0;
}

static const struct dr_file_ops window_ops = {
    .name = "window",
    .close = window_close,
    .pread = window_pread,
    .flush = window_flush,
    .mtime = window_mtime,
    .advise = window_advise,
    .usage = window_usage,
};

/* Bytes of the part that its file has. */
static uint64_t there(const struct dr_window_part *p)
{
    uint64_t size = dr_file_size(p->file);
    return p->off < size ? dr_min(p->len, size - p->off) : 0;
}

int dr_file_window(const char *name, const struct dr_window_part *parts, size_t n,
                   struct dr_file **file, struct dr_error *err)
{
    uint64_t size = 0;
    struct window *w = calloc(1, sizeof(*w) + n * sizeof(w->parts[0]));
    char *path = strdup(name);
    *file = NULL;
    if (!w || !path) {
        free(w);
        free(path);
        return dr_fail(err, ENOMEM, "%s: out of memory", name);
    }
    w->base = (struct dr_file){
        .ops = &window_ops,
        .id = {.owner = w, .ino = (uintptr_t)w},
        .path = path,
        .atomic_size = 512,
        .depth = n > 0 ? parts[0].file->depth : 0,
    };
    for (size_t i = 0; i < n; i++) {
        uint64_t len = there(&parts[i]);
        if (size > INT64_MAX - len) {
            window_close(&w->base);
            return dr_fail(err, EFBIG, "%s: its parts together are too large", name);
        }
        if (len > 0)
            w->parts[w->n++] =
                (struct window_part){dr_file_ref(parts[i].file), size, parts[i].off, len};
        size += len;
        if (len < parts[i].len)
            break;
    }
    w->base.size = size;
    return dr_file_adopt(&w->base, 0, file, err);
}
