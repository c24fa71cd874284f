/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A bitmap is read once, before clients are served, into a list of the ranges that it has marked:
 * while the disk is open for writing, its bitmaps are in memory elsewhere. Where clients write, an
 * enabled one is marked here before the request goes on, so it never lacks what was written. */
#include "cli/serve/contexts.h"

#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

/* NBD_STATE_DIRTY of QEMU's contexts. */
#define DIRTY 1u

/* ------------------------------------------------------------------ ranges that are marked */

/* The first range that ends behind off. */
static size_t find_marked(const struct context *c, uint64_t off)
{
    size_t low = 0, high = c->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (c->marked[middle].off + c->marked[middle].len > off)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static bool make_room(struct context *c)
{
    if (c->n < c->room)
        return true;
    struct marked *more = reallocarray(c->marked, c->room ? 2 * c->room : 16, sizeof(*more));
    if (!more)
        return false;
    c->marked = more;
    c->room = c->room ? 2 * c->room : 16;
    return true;
}

static int append(void *user, uint64_t off, uint64_t len)
{
    struct context *c = user;
    if (!make_room(c))
        return -ENOMEM;
    c->marked[c->n++] = (struct marked){off, len};
    return 0;
}

/* Mark [off, end), joined with the ranges that it touches. Without memory for another range the one
 * before or behind it grows: a bitmap may say too much, never too little. */
static void mark(struct context *c, uint64_t off, uint64_t end)
{
    size_t first = find_marked(c, off ? off - 1 : 0), last = first;
    if (first < c->n && c->marked[first].off <= off &&
        c->marked[first].off + c->marked[first].len >= end)
        return;
    while (last < c->n && c->marked[last].off <= end)
        last++;
    if (first == last && !make_room(c)) {
        first -= first == c->n; /* not the only one: there was room for it */
        last = first + 1;
    }
    if (first < last) {
        off = dr_min(off, c->marked[first].off);
        end = dr_max(end, c->marked[last - 1].off + c->marked[last - 1].len);
    }
    memmove(&c->marked[first + 1], &c->marked[last], (c->n - last) * sizeof(*c->marked));
    c->n = c->n - (last - first) + 1;
    c->marked[first] = (struct marked){off, end - off};
}

void contexts_note(struct contexts *c, uint64_t off, uint64_t len)
{
    if (len == 0 || !dr_inside(off, len, c->size))
        return; /* it will be refused */
    pthread_mutex_lock(&c->lock);
    for (size_t i = 0; i < c->n; i++) {
        uint64_t unit = c->list[i].granularity;
        if (c->list[i].notes)
            mark(&c->list[i], dr_round_down(off, unit),
                 dr_min(dr_round_up(off + len, unit), c->size));
    }
    pthread_mutex_unlock(&c->lock);
}

/* ------------------------------------------------------------------ opening */

/* Is it there, and can it be relied on? 0, 1 after a message; -ENOENT: it is not there. */
static int look_at_bitmap(const struct cli *cli, struct dr_disk *disk, const char *name,
                          bool writable, struct context *to)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_bitmap *list = NULL;
    size_t n = 0, i = 0;
    int r = dr_disk_bitmaps(disk, &list, &n, &err);
    while (r == 0 && i < n && strcmp(list[i].name, name) != 0)
        i++;
    if (r == 0 && i < n) {
        to->notes = writable && list[i].enabled;
        to->granularity = list[i].granularity;
        if (list[i].inconsistent) {
            cli_error(cli,
                      "Bitmap '%s' is inconsistent and cannot be used: a full backup is needed; "
                      "'drover bitmap --rebuild --against BACKUP' makes it right again",
                      name);
            r = 1;
        }
    } else if (r == 0 || r == -ENOTSUP) {
        r = -ENOENT;
    } else {
        cli_fail(cli, &err);
        r = 1;
    }
    dr_bitmaps_free(list, n);
    return r;
}

static int read_bitmap(const struct cli *cli, struct dr_disk *disk, const char *name, bool writable,
                       struct context *to)
{
    struct dr_error err = DR_ERROR_INIT;
    int r = look_at_bitmap(cli, disk, name, writable, to);
    if (r != 0)
        return r;
    r = make_room(to) ? dr_disk_bitmap_read(disk, name, append, to, &err) : -ENOMEM;
    if (r == -ENOMEM)
        cli_error(cli, "out of memory");
    else if (r < 0)
        cli_fail(cli, &err);
    return r < 0;
}

/* In one of the disk's parents. */
static int read_parents_bitmap(const struct cli *cli, const struct cli_image *image,
                               struct dr_disk *disk, const char *name, struct context *to)
{
    int r = -ENOENT;
    for (size_t i = 1; r == -ENOENT && i < dr_chain_length(disk); i++) {
        struct dr_error err = DR_ERROR_INIT;
        struct dr_disk *parent = NULL;
        struct dr_open_options how = {.format = dr_image_format(disk, i),
                                      .flags = image->open.flags,
                                      .allow_paths = image->open.allow_paths};
        if (dr_open(dr_image_path(disk, i), &how, &parent, &err) < 0) {
            cli_fail(cli, &err);
            return 1;
        }
        r = read_bitmap(cli, parent, name, false, to);
        dr_close(parent, NULL);
    }
    return r;
}

static int add_bitmap(const struct cli *cli, const struct cli_image *image, struct dr_disk *disk,
                      const char *name, bool writable, struct contexts *c)
{
    struct context *to = &c->list[c->n++];
    if (asprintf(&to->name, CONTEXT_BITMAP "%s", name) < 0) {
        to->name = NULL;
        cli_error(cli, "out of memory");
        return 1;
    }
    int r = read_bitmap(cli, disk, name, writable, to);
    if (r == -ENOENT)
        r = read_parents_bitmap(cli, image, disk, name, to);
    if (r == -ENOENT)
        cli_error(cli, "Bitmap '%s' is not found", name);
    return r != 0;
}

int contexts_open(const struct cli *cli, const struct cli_image *image, const char *const *bitmaps,
                  size_t n, bool depth, bool writable, struct contexts *c)
{
    struct dr_disk *disk = NULL;
    *c = (struct contexts){.n = 0};
    pthread_mutex_init(&c->lock, NULL);
    if (n + depth > CONTEXT_MOST) {
        cli_error(cli, "%zu bitmaps: expected at most %d", n, CONTEXT_MOST - 1);
        return 1;
    }
    if (cli_image_open(cli, image, &disk) != 0)
        return 1;
    c->size = dr_size(disk);
    int code = 0;
    for (size_t i = 0; code == 0 && i < n; i++)
        code = add_bitmap(cli, image, disk, bitmaps[i], writable, c);
    if (code == 0 && depth) {
        c->list[c->n++] = (struct context){.name = strdup(CONTEXT_DEPTH), .depth = true};
        c->depth = DR_STEAL(disk);
        code = c->list[c->n - 1].name == NULL;
    }
    dr_close(disk, NULL);
    return code;
}

/* ------------------------------------------------------------------ telling */

/* Add to what out has, joined where the flags are the same. False: there is no room. */
static bool add_extent(struct context_extent *out, size_t *n, size_t most, uint64_t len,
                       uint32_t flags)
{
    bool same = *n > 0 && out[*n - 1].flags == flags;
    if (!same && *n == most)
        return false;
    if (!same)
        out[(*n)++] = (struct context_extent){0, flags};
    out[*n - 1].len += (uint32_t)len;
    return true;
}

static size_t tell_marked(const struct context *c, uint64_t off, uint64_t end,
                          struct context_extent *out, size_t most)
{
    size_t n = 0;
    bool room = true;
    for (size_t i = find_marked(c, off); room && off < end; i++) {
        uint64_t from = i < c->n ? dr_min(c->marked[i].off, end) : end;
        uint64_t to = i < c->n ? dr_min(c->marked[i].off + c->marked[i].len, end) : end;
        if (from > off) {
            room = add_extent(out, &n, most, from - off, 0);
            off = from;
        }
        if (room && to > off) {
            room = add_extent(out, &n, most, to - off, DIRTY);
            off = to;
        }
    }
    return n;
}

/* 0: no image has it; 1: the disk's own; 2: its parent, and so on. */
static size_t tell_depth(struct dr_disk *disk, uint64_t off, uint64_t end,
                         struct context_extent *out, size_t most)
{
    struct dr_error err = DR_ERROR_INIT;
    struct dr_extent_status status;
    size_t n = 0;
    while (off < end && dr_block_status(disk, off, end - off, &status, &err) == 0) {
        uint32_t depth = status.flags & DR_EXTENT_ALLOCATED ? status.depth + 1 : 0;
        if (!add_extent(out, &n, most, status.len, depth))
            break;
        off += status.len;
    }
    return n;
}

size_t contexts_tell(struct contexts *c, size_t context, uint64_t off, uint32_t len,
                     struct context_extent *out, size_t most)
{
    if (c->list[context].depth)
        return tell_depth(c->depth, off, off + len, out, most);
    pthread_mutex_lock(&c->lock);
    size_t n = tell_marked(&c->list[context], off, off + len, out, most);
    pthread_mutex_unlock(&c->lock);
    return n;
}
