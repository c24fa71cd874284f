/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening a whole chain: find each parent, ask the gate, check that it is the right one. */
#include <stdio.h>

#include "core/fingerprint.h"
#include "core/internal.h"
#include "storage/part.h"
#include "storage/remote.h"

/* All there are. What a later library may give a meaning is not passed over in silence. */
#define OPEN_FLAGS ((2u * DR_OPEN_VERIFY - 1) | DR_OPEN_AS_FOUND | DR_OPEN_WHOLE)

/* A file of the chain so far, in a hash table by its id. */
struct seen {
    const struct dr_image *image; /* NULL: a free slot */
    struct dr_file_id id;
    bool data; /* one of the image's further files */
};

struct opening {
    struct dr_fs *fs;
    const struct dr_open_options *options;
    struct dr_gate gate;
    struct dr_image **images;
    size_t n, room;
    struct seen *seen; /* open addressing; n_slots is a power of two, or 0 */
    size_t n_seen, n_slots;
    size_t n_prints; /* images of which it is recorded what their parent was */
};

static unsigned parent_flags(unsigned flags)
{
    return flags & ~(unsigned)(DR_OPEN_RDWR | DR_OPEN_UNCHANGED | DR_OPEN_NO_RECOVER |
                               DR_OPEN_WHOLE | DR_OPEN_VERIFY);
}

/* ------------------------------------------------------------------ how long a chain may be */

static _Atomic size_t chain_bound = DR_CHAIN_MAX;

void dr_chain_set_bound(size_t n)
{
    atomic_store(&chain_bound, n ? n : DR_CHAIN_MAX);
}

size_t dr_chain_bound(void)
{
    return atomic_load(&chain_bound);
}

int dr_chain_check_length(const char *path, size_t n, struct dr_error *err)
{
    size_t bound = dr_chain_bound();
    if (n <= bound)
        return 0;
    return dr_fail(err, ELOOP,
                   "%s: the chain is longer than %zu images, the most that can be opened; commit "
                   "or stream some of its layers first",
                   path, bound);
}

/* ------------------------------------------------------------------ the images so far */

/* The same for all parts of a file, so they stand in one row. */
static size_t seen_first(size_t n_slots, struct dr_file_id id)
{
    uint64_t hash = ((uint64_t)id.ino * 31 + (uint64_t)id.dev) * UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(hash >> 32) & (n_slots - 1);
}

/* The slot that holds the id, or the free one where it belongs. */
static struct seen *seen_slot(struct seen *slots, size_t n_slots, struct dr_file_id id)
{
    size_t i = seen_first(n_slots, id);
    while (slots[i].image && !dr_same_id(slots[i].id, id))
        i = (i + 1) & (n_slots - 1);
    return &slots[i];
}

/* A slot that holds something with bytes in common, or a free one. */
static const struct seen *seen_overlap(const struct seen *slots, size_t n_slots,
                                       struct dr_file_id id)
{
    size_t i = seen_first(n_slots, id);
    while (slots[i].image && !dr_ids_overlap(slots[i].id, id))
        i = (i + 1) & (n_slots - 1);
    return &slots[i];
}

static bool seen_grow(struct opening *o)
{
    size_t n_slots = o->n_slots ? o->n_slots * 2 : 16;
    struct seen *slots = calloc(n_slots, sizeof(*slots));
    if (!slots)
        return false;
    for (size_t i = 0; i < o->n_slots; i++)
        if (o->seen[i].image)
            *seen_slot(slots, n_slots, o->seen[i].id) = o->seen[i];
    free(o->seen);
    o->seen = slots;
    o->n_slots = n_slots;
    return true;
}

static int seen_add(struct opening *o, const struct dr_image *image, struct dr_file_id id,
                    bool data, struct dr_error *err)
{
    if (2 * (o->n_seen + 1) > o->n_slots && !seen_grow(o))
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    struct seen *slot = seen_slot(o->seen, o->n_slots, id);
    if (slot->image)
        return 0;
    *slot = (struct seen){.image = image, .id = id, .data = data};
    o->n_seen++;
    return 0;
}

/* Keep the ids of an image that stays in the chain. */
static int remember(struct opening *o, const struct dr_image *image, struct dr_error *err)
{
    int r = seen_add(o, image, dr_image_id(image), false, err);
    for (unsigned i = 1; r == 0 && i < image->n_files; i++)
        r = seen_add(o, image, image->files[i]->id, true, err);
    return r;
}

/* Takes over the reference on success. */
static int push(struct opening *o, struct dr_image *image, struct dr_error *err)
{
    if (o->n == o->room) {
        size_t room = o->room ? o->room * 2 : 8;
        struct dr_image **images = realloc(o->images, room * sizeof(struct dr_image *));
        if (!images)
            return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
        o->images = images;
        o->room = room;
    }
    o->images[o->n++] = image;
    return 0;
}

static void clear(struct opening *o)
{
    dr_gate_clear(&o->gate);
    free(o->images);
    free(o->seen);
}

/* ------------------------------------------------------------------ one candidate */

/* Before the parent is opened: its locks would only say that somebody uses it. */
static int refuse_loop(const struct opening *o, const char *path, struct dr_error *err)
{
    struct dr_file_id id;
    const struct dr_image *child = o->images[o->n - 1];
    int r = dr_name_identify(o->fs, path, &id, err);
    if (r < 0)
        return r;
    const struct seen *slot = seen_overlap(o->seen, o->n_slots, id);
    if (!slot->image)
        return 0;
    if (slot->data)
        return dr_fail(err, EINVAL, "%s: its backing file %s is the file that holds the data of %s",
                       child->path, path, slot->image->path);
    if (!dr_same_id(slot->id, id))
        return dr_fail(err, EINVAL,
                       "%s: its backing file %s has bytes in common with %s, which is in the chain",
                       child->path, path, slot->image->path);
    return dr_fail(err, ELOOP, "%s: its backing file %s is already in the chain: a loop",
                   child->path, path);
}

static bool says_format(const char *path)
{
    DR_CLEANUP_PART struct dr_part part = {0};
    return dr_part_is(path) && dr_part_parse(path, &part, NULL) == 0 && part.format;
}

/* Nothing recorded means that the format was never established: a guest may have written anything
 * into a raw parent, so only an explicit wish turns probing on. */
static int parent_format(const struct opening *o, const char *path, const char *recorded,
                         const char **format, struct dr_error *err)
{
    const struct dr_image *child = o->images[o->n - 1];
    *format = recorded;
    if (recorded || o->gate.any || dr_name_format(path) || says_format(path))
        return 0;
    const struct dr_format *found;
    int r = dr_probe(o->fs, path, DR_FILE_FORCE_SHARE, &found, err);
    if (r == 0 && !(found->flags & DR_FORMAT_NO_PROBE))
        return dr_fail(
            err, EINVAL,
            "%s: does not record the format of its backing file %s, which looks like %s; "
            "name the format of the backing file if you trust it",
            child->path, path, found->name);
    *format = "raw";
    return r;
}

static int check_parent(struct opening *o, const struct dr_image *child,
                        const struct dr_image *parent, struct dr_error *err)
{
    if (child->flags & DR_OPEN_NO_CHECK_ID)
        return 0;
    int r = child->fmt->check_backing ? child->fmt->check_backing(child, parent, err) : 0;
    if (r < 0 || (o->options->flags & DR_OPEN_NO_FINGERPRINT))
        return r;
    r = dr_fingerprint_check(child, parent, err);
    o->n_prints += r > 0;
    return r < 0 ? r : 0;
}

/* What takes reading the parents waits for all of them. */
static int check_samples(const struct opening *o, struct dr_chain *chain, struct dr_error *err)
{
    int r = 0;
    if (o->options->flags & DR_OPEN_SALVAGE)
        return 0;
    for (size_t i = 0; r == 0 && o->n_prints > 0 && i + 1 < chain->n; i++)
        r = dr_fingerprint_check_sample(chain, i, err);
    return r;
}

static int open_parent(struct opening *o, const char *path, const char *recorded,
                       struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 1], *parent = NULL;
    const char *format = NULL;
    const struct dr_image_how how = {.gate = &o->gate};
    int r = refuse_loop(o, path, err);
    if (r == 0)
        r = parent_format(o, path, recorded, &format, err);
    if (r == 0)
        r = dr_image_open_how(o->fs, path, format, parent_flags(o->options->flags), &how, &parent,
                              err);
    if (r < 0 || !parent)
        return r;
    r = check_parent(o, child, parent, err);
    if (r == 0)
        r = push(o, parent, err);
    if (r < 0)
        dr_image_unref(parent, NULL);
    return r;
}

/* ------------------------------------------------------------------ all candidates */

static int candidate(const struct dr_image *child, unsigned n, char **path, struct dr_error *err)
{
    if (child->fmt->backing_candidate)
        return child->fmt->backing_candidate(child, n, path, err);
    if (n > 0)
        return -ENOENT;
    const char *name = child->backing_name;
    name = dr_name_format(name) ? strchr(name, ':') + 1 : name;
    int r = dr_remote_check_beside(dr_image_named_file(child)->path, name, err);
    if (r < 0)
        return r;
    *path = dr_name_beside(child->path, child->backing_name);
    return *path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", child->path);
}

/* Which of two failures tells more about why no candidate will do? */
static bool tells_more(int fresh, int old)
{
    static const int order[] = {-ENOENT, -ENOTDIR, -EACCES, -EINVAL};
    size_t n = sizeof(order) / sizeof(order[0]), f = n, o = n;
    for (size_t i = 0; i < n; i++) {
        f = order[i] == fresh ? i : f;
        o = order[i] == old ? i : o;
    }
    return f > o;
}

/* The parent that was opened is where the gate allowed it to be, or goes. */
static int keep_parent(struct opening *o, struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 2], *parent = o->images[o->n - 1];
    int r = dr_gate_pass_file(&o->gate, child->path, dr_image_named_file(parent), err);
    if (r == 0)
        return 0;
    o->n--;
    dr_image_unref(parent, NULL);
    return r;
}

static int open_recorded_parent(struct opening *o, struct dr_error *err)
{
    struct dr_image *child = o->images[o->n - 1];
    struct dr_error best = DR_ERROR_INIT;
    int result = -ENOENT;
    for (unsigned i = 0;; i++) {
        CLEANUP_FREE char *path = NULL;
        struct dr_error why = DR_ERROR_INIT;
        int r = candidate(child, i, &path, &why);
        if (r == -ENOENT)
            break;
        if (r == 0)
            r = dr_gate_pass(&o->gate, child->path, path, &why);
        if (r == 0)
            r = open_parent(o, path, child->backing_format, &why);
        if (r == 0)
            r = keep_parent(o, &why);
        if (r == 0)
            return 0;
        if (best.errnum == 0 || tells_more(r, result)) {
            best = why;
            result = r;
        }
    }
    return dr_fail(err, -result, "%s: cannot open its backing file \"%s\": %s", child->path,
                   child->backing_name, best.errnum ? best.text : "not found");
}

/* Only to learn where it is: without locks, and without its own parents. */
#define LOOK_ON (DR_OPEN_NO_BACKING | DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)

int dr_backing_locate(struct dr_image *child, const struct dr_open_options *options, char **path,
                      struct dr_error *err)
{
    struct dr_open_options open = options ? *options : (struct dr_open_options){0};
    open.flags = (open.flags & DR_OPEN_ANY_PATH) | LOOK_ON;
    struct opening o = {.fs = child->fs, .options = &open};
    *path = NULL;
    int r = dr_gate_make(&o.gate, o.fs, &open, err);
    if (r == 0)
        r = push(&o, child, err);
    if (r == 0)
        r = remember(&o, child, err);
    if (r == 0)
        r = open_recorded_parent(&o, err);
    if (r == 0) {
        *path = strdup(o.images[1]->path);
        dr_image_unref(o.images[1], NULL);
        r = *path ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", child->path);
    }
    clear(&o);
    return r;
}

static int open_chain(struct opening *o, struct dr_error *err)
{
    const struct dr_open_options *options = o->options;
    if (options->flags & DR_OPEN_NO_BACKING)
        return 0;
    int r = remember(o, o->images[0], err);
    if (r == 0 && options->backing) {
        r = open_parent(o, options->backing, options->backing_format, err);
        if (r == 0)
            r = remember(o, o->images[1], err);
    }
    while (r == 0 && o->images[o->n - 1]->backing_name) {
        r = dr_chain_check_length(o->images[0]->path, o->n + 1, err);
        if (r == 0)
            r = open_recorded_parent(o, err);
        if (r == 0)
            r = remember(o, o->images[o->n - 1], err);
    }
    return r;
}

/* By a link from elsewhere an image is itself found, and what it names is not. */
static int hint_at_link(struct dr_fs *fs, const char *path, int r, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *beside = NULL, *dir = dr_path_dirname(path);
    if (r != -ENOENT || !err || err->errnum != ENOENT || !dir || dr_name_is_remote(path) ||
        fs->ops->realpath(fs, path, &real, NULL) < 0 ||
        fs->ops->realpath(fs, dir, &beside, NULL) < 0)
        return r;
    CLEANUP_FREE char *real_dir = dr_path_dirname(real);
    size_t used = strlen(err->text);
    if (real_dir && strcmp(real_dir, beside) != 0)
        snprintf(err->text + used, sizeof(err->text) - used,
                 " (%s is a link: what it names is looked for beside the link; use the name %s)",
                 path, real);
    return r;
}

static void drop_images(struct opening *o)
{
    while (o->n > 0)
        dr_image_unref(o->images[--o->n], NULL);
}

int dr_chain_open(struct dr_fs *fs, const char *path, const struct dr_open_options *options,
                  struct dr_chain **chain, struct dr_error *err)
{
    static const struct dr_open_options defaults;
    struct opening o = {.fs = fs, .options = options ? options : &defaults};
    struct dr_image *image;
    if (o.options->flags & ~OPEN_FLAGS)
        return dr_fail(err, EINVAL, "%s: unknown flags %#x", path, o.options->flags & ~OPEN_FLAGS);
    if ((o.options->flags & DR_OPEN_SALVAGE) && (o.options->flags & DR_OPEN_RDWR))
        return dr_fail(err, EINVAL, "%s: an image with missing parts can only be read", path);
    int r = dr_gate_make(&o.gate, fs, o.options, err);
    if (r < 0)
        return r;
    const struct dr_image_how how = {&o.gate, o.options->data_file, o.options->key_secret};
    r = dr_image_open_how(fs, path, o.options->format, o.options->flags, &how, &image, err);
    if (r == 0) {
        r = push(&o, image, err);
        if (r < 0)
            dr_image_unref(image, NULL);
    }
    if (r == 0 && (image->flags & DR_OPEN_VERIFY)) /* who verifies takes it away */
        r = dr_fail(err, ENOTSUP, "%s: nothing has digests of it that could be compared", path);
    if (r == 0 && o.options->snapshot)
        r = dr_image_snapshot_show(o.images[0], o.options->snapshot, err);
    if (r == 0)
        r = open_chain(&o, err);
    if (r < 0) {
        drop_images(&o);
        clear(&o);
        return hint_at_link(fs, path, r, err);
    }
    *chain = dr_chain_new(o.images, o.n);
    r = *chain ? check_samples(&o, *chain, err) : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r < 0)
        dr_chain_unref(DR_STEAL(*chain), NULL);
    clear(&o);
    return r;
}
