/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What each image of a family holds, and how much of that can still be read through a disk on top.
 *
 * All images are walked side by side, from their metadata alone. A part of the disk in which no
 * image changes from data to hole or the like is one step; elsewhere a window of 4 MiB is drawn as
 * one bit for each sector and image. So memory depends on the number of images only, and the work
 * on how many pieces their maps have.
 *
 * From the leaves down to the roots it is then known where an image is asked for its bytes: a leaf
 * everywhere, another one wherever an image on it is asked and has a hole. */
#include <stdio.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define WINDOW (UINT64_C(4) << 20)
#define SECTOR 512u
#define WORDS  (WINDOW / SECTOR / 64)

struct layer {
    struct dr_chain *chain; /* the image alone; NULL: as if it were empty */
    struct dr_walk walk;
    uint64_t size;
    size_t parent; /* index, SIZE_MAX = none */
    bool leaf;
    uint64_t data[WORDS]; /* it has bytes there */
    uint64_t own[WORDS];  /* it answers there, with bytes or zeros */
    uint64_t need[WORDS]; /* somebody asks it */
    struct dr_layer_usage *usage;
};

struct rank {
    size_t depth; /* images below it */
    size_t layer;
};

struct family {
    struct layer *layers;
    struct rank *order; /* upper ones first */
    size_t n;
    uint64_t size; /* of the largest */
};

/* ------------------------------------------------------------------ opening */

static void format_ids(const struct dr_image *image, struct dr_layer_usage *usage)
{
    if (!image->fmt->id || !image->fmt->parent_id)
        return;
    snprintf(usage->id, sizeof(usage->id), "%08x", image->fmt->id(image));
    if (image->backing_name)
        snprintf(usage->parent_id, sizeof(usage->parent_id), "%08x", image->fmt->parent_id(image));
}

/* An image that does not open is passed over: what is wrong with it is told elsewhere. */
static void open_layer(struct dr_fs *fs, const struct dr_tree_node *node,
                       const struct dr_open_options *options, struct layer *l)
{
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    struct dr_image *image;
    flags |= options ? options->flags & DR_OPEN_ANY_PATH : 0u;
    if (!node->format || !dr_format_find(node->format) ||
        dr_image_open(fs, node->path, node->format, flags, &image, NULL) < 0)
        return;
    format_ids(image, l->usage);
    l->size = image->size;
    l->chain = dr_chain_new(&image, 1);
    if (!l->chain)
        return;
    l->usage->known = true;
    dr_walk_init(&l->walk, l->chain, 0, 1, l->size);
}

static size_t depth_of(const struct dr_tree_node *nodes, size_t n, size_t i)
{
    size_t depth = 0;
    while (depth < n && nodes[i].parent < n) {
        i = nodes[i].parent;
        depth++;
    }
    return depth;
}

static int upper_first(const void *a, const void *b)
{
    const struct rank *x = a, *y = b;
    return x->depth < y->depth ? 1 : x->depth > y->depth ? -1 : 0;
}

static void open_all(struct family *f, struct dr_fs *fs, const struct dr_tree_node *nodes,
                     const struct dr_open_options *options, struct dr_layer_usage *usage)
{
    for (size_t i = 0; i < f->n; i++) {
        usage[i] = (struct dr_layer_usage){.known = false};
        f->layers[i].usage = &usage[i];
        f->layers[i].parent = nodes[i].parent < f->n ? nodes[i].parent : SIZE_MAX;
        f->layers[i].leaf = true;
        f->order[i] = (struct rank){.depth = depth_of(nodes, f->n, i), .layer = i};
    }
    for (size_t i = 0; i < f->n; i++) {
        if (f->layers[i].parent != SIZE_MAX)
            f->layers[f->layers[i].parent].leaf = false;
        open_layer(fs, &nodes[i], options, &f->layers[i]);
        f->size = dr_max(f->size, f->layers[i].size);
    }
    qsort(f->order, f->n, sizeof(*f->order), upper_first);
}

/* ------------------------------------------------------------------ one step */

/* Its tables are damaged: nothing is told of it. */
static void give_up(struct layer *l)
{
    dr_chain_unref(l->chain, NULL);
    l->chain = NULL;
    l->usage->known = false;
    l->usage->allocated = l->usage->exclusive = 0;
}

/* Go to off. Returns where the run there ends. */
static uint64_t run_end(struct layer *l, uint64_t off)
{
    if (l->chain && off < l->size && dr_walk_to(&l->walk, off, NULL) < 0)
        give_up(l);
    return l->chain && off < l->size ? dr_min(l->walk.run.end, l->size) : UINT64_MAX;
}

static void set_bits(uint64_t *bits, size_t from, size_t to)
{
    for (size_t i = from; i < to; i = (i | 63) + 1) {
        size_t end = dr_min(to, (i | 63) + 1);
        uint64_t ones = end - i == 64 ? UINT64_MAX : (UINT64_C(1) << (end - i)) - 1;
        bits[i / 64] |= ones << (i % 64);
    }
}

/* Behind its end an image answers: a disk is not asked there, and a parent shows nothing. */
static void draw_run(struct layer *l, uint64_t start, uint64_t off, uint64_t end)
{
    size_t from = (size_t)((off - start) / SECTOR);
    size_t to = (size_t)((end - start + SECTOR - 1) / SECTOR);
    bool behind = l->chain && off >= l->size;
    if (behind || (l->chain && l->walk.run.kind != DR_RUN_HOLE))
        set_bits(l->own, from, to);
    if (!behind && l->chain && l->walk.run.kind == DR_RUN_DATA)
        set_bits(l->data, from, to);
}

static void draw(struct layer *l, uint64_t start, uint64_t end)
{
    memset(l->data, 0, sizeof(l->data));
    memset(l->own, 0, sizeof(l->own));
    for (uint64_t off = start, next; off < end; off = next) {
        next = dr_min(end, run_end(l, off));
        if (off < l->size)
            next = dr_min(next, l->size);
        draw_run(l, start, off, next);
    }
}

static uint64_t count(const uint64_t *a, const uint64_t *b)
{
    uint64_t n = 0;
    for (size_t w = 0; w < WORDS; w++)
        n += (unsigned)__builtin_popcountll(a[w] & b[w]);
    return n;
}

/* Each bit stands for `weight` bytes. */
static void tell_needs(struct family *f, uint64_t weight)
{
    for (size_t i = 0; i < f->n; i++)
        memset(f->layers[i].need, f->layers[i].leaf ? 0xff : 0, sizeof(f->layers[i].need));
    for (size_t i = 0; i < f->n; i++) {
        struct layer *l = &f->layers[f->order[i].layer];
        struct layer *below = l->parent == SIZE_MAX ? NULL : &f->layers[l->parent];
        l->usage->allocated += weight * count(l->data, l->data);
        l->usage->exclusive += weight * count(l->data, l->need);
        for (size_t w = 0; below && w < WORDS; w++)
            below->need[w] |= l->need[w] & ~l->own[w];
    }
}

static void step(struct family *f, uint64_t off, uint64_t *next)
{
    uint64_t end = f->size;
    for (size_t i = 0; i < f->n; i++)
        end = dr_min(end, run_end(&f->layers[i], off));
    bool even = end - off >= WINDOW;
    *next = even ? end : dr_min(off + WINDOW, f->size);
    for (size_t i = 0; i < f->n; i++)
        draw(&f->layers[i], off, even ? off + SECTOR : *next);
    tell_needs(f, even ? end - off : SECTOR);
}

int dr_tree_usage_fs(struct dr_fs *fs, const struct dr_tree_node *nodes, size_t n,
                     const struct dr_open_options *options, struct dr_layer_usage *usage,
                     struct dr_error *err)
{
    CLEANUP_FREE struct layer *layers = calloc(n, sizeof(*layers));
    CLEANUP_FREE struct rank *order = calloc(n, sizeof(*order));
    struct family f = {.layers = layers, .order = order, .n = n};
    if (n > 0 && (!layers || !order))
        return dr_fail(err, ENOMEM, "out of memory for %zu images", n);
    open_all(&f, fs, nodes, options, usage);
    for (uint64_t off = 0; off < f.size;)
        step(&f, off, &off);
    for (size_t i = 0; i < n; i++) {
        dr_chain_unref(layers[i].chain, NULL); /* whose last sector may not be a whole one */
        usage[i].allocated = dr_min(usage[i].allocated, layers[i].size);
        usage[i].exclusive = dr_min(usage[i].exclusive, layers[i].size);
    }
    return 0;
}

int dr_tree_usage(const struct dr_tree_node *nodes, size_t n, const struct dr_open_options *options,
                  struct dr_layer_usage *usage, struct dr_error *err)
{
    DR_REQUIRE(nodes, err);
    DR_REQUIRE(usage, err);
    return dr_tree_usage_fs(dr_fs_posix(), nodes, n, options, usage, err);
}
