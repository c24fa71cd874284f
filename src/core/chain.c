/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Chains: images linked by backing, and the walk that finds where a byte lives. */
#include "core/internal.h"
#include "base/bytes.h"

struct dr_chain *dr_chain_new(struct dr_image *const *images, size_t n)
{
    struct dr_chain *chain = malloc(sizeof(*chain) + n * sizeof(struct dr_image *));
    if (!chain) {
        for (size_t i = 0; i < n; i++)
            dr_image_unref(images[i], NULL);
        return NULL;
    }
    atomic_init(&chain->refs, 1);
    chain->hooks = NULL;
    chain->n = n;
    memcpy(chain->images, images, n * sizeof(struct dr_image *));
    chain->index = dr_index_new(chain->images, n);
    return chain;
}

struct dr_chain *dr_chain_ref(struct dr_chain *chain)
{
    atomic_fetch_add(&chain->refs, 1);
    return chain;
}

/* Deepest first: a child's data must not become durable on a parent that is not. */
int dr_chain_unref(struct dr_chain *chain, struct dr_error *err)
{
    int result = 0;
    if (!chain || atomic_fetch_sub(&chain->refs, 1) != 1)
        return 0;
    dr_index_free(chain->index);
    for (size_t i = chain->n; i-- > 0;) {
        int r = dr_image_unref(chain->images[i], err);
        if (r < 0 && result == 0)
            result = r;
    }
    free(chain);
    return result;
}

struct dr_chain *dr_chain_tail(struct dr_chain *chain, size_t first)
{
    for (size_t i = first; i < chain->n; i++)
        dr_image_ref(chain->images[i]);
    return dr_chain_new(chain->images + first, chain->n - first);
}

void dr_chain_renew_index(struct dr_chain *chain)
{
    dr_index_free(chain->index);
    chain->index = dr_index_new(chain->images, chain->n);
}

/* ------------------------------------------------------------------ places */

/* Frozen images, too: one that is thawed meanwhile frees and reuses places. */
static void place_pin(struct dr_place *place, struct dr_image *image)
{
    if (image->fmt->flags & DR_FORMAT_FIXED_MAP)
        return;
    place->ticket = dr_epoch_enter(image->ranges);
    place->pinned = image;
}

void dr_place_done(struct dr_place *place)
{
    if (place->pinned)
        dr_epoch_leave(place->pinned->ranges, place->ticket);
    place->pinned = NULL;
}

int dr_chain_map_part(struct dr_chain *chain, size_t first, size_t last, uint64_t off, uint64_t len,
                      struct dr_place *place, struct dr_error *err)
{
    struct dr_index *asked = NULL;
    *place = (struct dr_place){.owner = chain->n};
    for (size_t i = first; i < last; i++) {
        struct dr_index *index = dr_index_at(chain->index, i), *below;
        size_t owner;
        if (index && index != asked) {
            asked = index; /* once: an owner that has become empty is passed layer by layer */
            if (dr_index_find(index, i, off, &owner, &len))
                i = owner;
            if (i >= last)
                break;
        } else if (!index && i + 1 < last && (below = dr_index_at(chain->index, i + 1))) {
            len = dr_index_reach(below, off, len);
        }
        struct dr_image *image = chain->images[i];
        if (off >= image->size) {
            place->ext = (struct dr_extent){.kind = DR_ZERO, .len = len};
            place->owner = i;
            place->past_end = true;
            return 0;
        }
        len = dr_min(len, image->size - off);
        place_pin(place, image);
        int r = dr_image_map(image, off, len, &place->ext, err);
        if (r == 0 && place->ext.kind != DR_HOLE) {
            place->owner = i;
            return 0;
        }
        dr_place_done(place);
        if (r < 0)
            return r;
        len = place->ext.len;
    }
    place->ext = (struct dr_extent){.kind = DR_HOLE, .len = len};
    return 0;
}

int dr_chain_map(struct dr_chain *chain, size_t first, uint64_t off, uint64_t len,
                 struct dr_place *place, struct dr_error *err)
{
    return dr_chain_map_part(chain, first, chain->n, off, len, place, err);
}

int dr_place_sparse(struct dr_place *place, bool *zero, struct dr_error *err)
{
    *zero = false;
    struct dr_extent *ext = &place->ext;
    if (ext->kind != DR_DATA)
        return 0;
    enum dr_file_extent kind;
    uint64_t run;
    int r = dr_file_extent(ext->file, ext->host, ext->len, &kind, &run, err);
    if (r < 0)
        return r;
    /* Metadata points here, so the file must have it: its end is not a hole (invariant 8). */
    uint64_t size = dr_file_size(ext->file);
    if (!dr_inside(ext->host, ext->len, size))
        return dr_fail(err, EIO, "%s: ends at %llu, data up to %llu was expected", ext->file->path,
                       (unsigned long long)size, (unsigned long long)(ext->host + ext->len));
    ext->len = run;
    *zero = kind == DR_FILE_HOLE;
    return 0;
}

int dr_chain_flush(struct dr_chain *chain, size_t at, struct dr_error *err)
{
    int result = 0;
    for (size_t i = chain->n; i-- > at;) {
        struct dr_image *image = chain->images[i];
        int r = 0;
        if (i == at || !image->masked)
            r = image->leaving ? dr_image_flush_keep(image, err) : dr_image_flush(image, err);
        if (r < 0 && result == 0)
            result = r;
    }
    return result;
}

/* Flushes of a device that come together are carried out together, so those of a deep chain take as
 * long as a few. */
#define HARDEN_THREADS 8

struct hardening {
    struct dr_chain *chain;
    _Atomic size_t left; /* images[0..left) are still to be done, deepest first */
    size_t first;
    _Atomic int result;
    struct dr_error *err; /* of the thread that fails first */
};

static void *harden_files(void *arg)
{
    struct hardening *h = arg;
    while (atomic_load(&h->result) == 0) {
        size_t i = atomic_fetch_sub(&h->left, 1);
        if (i <= h->first || i > h->chain->n)
            break;
        struct dr_error why = DR_ERROR_INIT;
        int none = 0, r = dr_image_harden_files(h->chain->images[i - 1], &why);
        if (r < 0 && atomic_compare_exchange_strong(&h->result, &none, r) && h->err)
            *h->err = why;
    }
    return NULL;
}

static int harden_in_threads(struct dr_chain *chain, size_t first, struct dr_error *err)
{
    struct hardening h = {.chain = chain, .left = chain->n, .first = first, .err = err};
    pthread_t threads[HARDEN_THREADS];
    unsigned n = 0, wanted = chain->n - first > HARDEN_THREADS ? HARDEN_THREADS - 1 : 0;
    while (n < wanted && pthread_create(&threads[n], NULL, harden_files, &h) == 0)
        n++;
    harden_files(&h);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    return h.result;
}

/* Directories that are done. A chain has few, so they are looked through one by one. */
struct dirs {
    char **all;
    size_t n;
};

static void clear_dirs(struct dirs *dirs)
{
    while (dirs->n > 0)
        free(dirs->all[--dirs->n]);
    free(dirs->all);
}

/* *fresh: the file's directory was not in the list. */
static int add_dir(struct dirs *dirs, const struct dr_file *file, bool *fresh, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(file->path);
    for (size_t i = 0; dir && i < dirs->n; i++)
        if (strcmp(dirs->all[i], dir) == 0) {
            *fresh = false;
            return 0;
        }
    char **more = dir ? realloc(dirs->all, (dirs->n + 1) * sizeof(*more)) : NULL;
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", file->path);
    dirs->all = more;
    dirs->all[dirs->n++] = DR_STEAL(dir);
    *fresh = true;
    return 0;
}

/* The layers of a chain mostly stand in one directory, which is made durable once. */
static int harden_names(struct dr_chain *chain, size_t first, struct dr_error *err)
{
    struct dirs dirs = {0};
    int r = 0;
    for (size_t i = chain->n; r == 0 && i-- > first;) {
        struct dr_image *image = chain->images[i];
        for (unsigned f = 0; r == 0 && f < image->n_files; f++) {
            bool fresh = false;
            struct dr_file *file = dr_image_file(image, f);
            if (!file->block_device) /* nobody makes the name of a device durable, or needs to */
                r = add_dir(&dirs, file, &fresh, err);
            if (r == 0 && fresh)
                r = dr_image_harden_name(image, file, err);
            dr_file_unpin(file);
        }
    }
    clear_dirs(&dirs);
    return r;
}

int dr_chain_harden(struct dr_chain *chain, size_t first, struct dr_error *err)
{
    int r = first < chain->n ? harden_in_threads(chain, first, err) : 0;
    return r < 0 ? r : harden_names(chain, first, err);
}
