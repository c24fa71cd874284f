/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New images. The raw file first, at its full length and durable; the header last: metadata with a
 * magic number is complete. An image file that exists is never overwritten or resized. */
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/addcow/addcow.h"

#define SUFFIX ".add-cow"

const struct dr_option_help addcow_create_options[] = {
    {"image_file", "str", "Name of the raw file (made unless it exists; NAME.raw)", NULL},
    {"layout", "str", "Layout of the metadata (only v7 is written)", "v7"},
    {"reuse", "bool (on/off)", "Take an existing image_file and hide what it holds", NULL},
    {NULL, NULL, NULL, NULL},
};

struct plan {
    struct dr_fs *fs;
    const char *path, *final;
    const struct dr_create_params *params;
    struct addcow_header h;
    char *backing; /* as the header's field has it */
    char *image;   /* the same */
    char *raw_path;
    bool exists, reuse;
    bool made_raw, made_meta;
    struct dr_file *raw, *meta;
};

static void plan_free(struct plan *p)
{
    dr_file_unref(p->raw);
    dr_file_unref(p->meta);
    free(p->backing);
    free(p->image);
    free(p->raw_path);
}

/* ------------------------------------------------------------------ options */

static int take_layout(const struct plan *p, const char *value, struct dr_error *err)
{
    if (strcmp(value, "v7") == 0)
        return 0;
    if (strcmp(value, "v20") == 0)
        return dr_fail(err, ENOTSUP, "%s: add-cow images of the layout v20 can only be read",
                       p->path);
    return dr_fail(err, EINVAL, "%s: layout=%s is none of the known layouts v7, v20", p->path,
                   value);
}

static int take_option(struct plan *p, const struct dr_option *o, struct dr_error *err)
{
    if (strcmp(o->name, "image_file") == 0) {
        free(p->image);
        p->image = strdup(o->value);
        return p->image ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
    }
    if (strcmp(o->name, "layout") == 0)
        return take_layout(p, o->value, err);
    if (strcmp(o->name, "reuse") != 0)
        return dr_fail(err, EINVAL, "%s: unknown create option '%s'", p->path, o->name);
    p->reuse = strcmp(o->value, "on") == 0;
    if (p->reuse || strcmp(o->value, "off") == 0)
        return 0;
    return dr_fail(err, EINVAL, "%s: reuse=%s is neither on nor off", p->path, o->value);
}

/* disk.add-cow → disk.raw, anything else → NAME.raw */
static char *default_image(const char *path)
{
    const char *base = dr_path_basename(path);
    size_t len = strlen(base), tail = sizeof(SUFFIX) - 1;
    if (len > tail && strcmp(base + len - tail, SUFFIX) == 0)
        len -= tail;
    char *name = malloc(len + sizeof(".raw"));
    if (name) {
        memcpy(name, base, len);
        strcpy(name + len, ".raw");
    }
    return name;
}

static int read_options(struct plan *p, struct dr_error *err)
{
    const struct dr_create_params *params = p->params;
    for (size_t i = 0; i < params->n_options; i++) {
        int r = take_option(p, &params->options[i], err);
        if (r < 0)
            return r;
    }
    if (!p->image)
        p->image = default_image(p->path);
    if (!p->image)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    if (!*p->image)
        return dr_fail(err, EINVAL, "%s: the name of the image file is empty", p->path);
    const char *format = params->backing ? params->backing->fmt->name : params->backing_format;
    if (params->backing_name)
        return addcow_name_encode(p->path, params->backing_name, format, &p->backing, err);
    p->backing = strdup("");
    return p->backing ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
}

/* ------------------------------------------------------------------ the image file's place */

/* The directory with its links followed, and the name in it, which may not exist. */
static int real_place(struct plan *p, const char *path, char **real, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE char *real_dir = NULL;
    if (!dir)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    int r = dr_real_dir(p->fs, dir, &real_dir, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot make its image file", p->path);
    *real = dr_path_join(real_dir, dr_path_basename(path));
    return *real ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
}

static int refuse_self(const struct plan *p, struct dr_error *err)
{
    return dr_fail(err, EINVAL, "%s: its image file \"%s\" would be the metadata file itself",
                   p->path, p->image);
}

/* Opening refuses what is outside; and the pair must stay a pair when its directory is moved: what
 * is given with an absolute name is recorded relative. */
static int check_tree(struct plan *p, const char *full, struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *own = NULL, *dir = NULL;
    bool inside = false;
    if (strcmp(p->image, dr_path_basename(p->final)) == 0)
        return refuse_self(p, err);
    if (!p->exists && !strchr(p->image, '/'))
        return 0;
    int r = p->exists ? p->fs->ops->realpath(p->fs, full, &real, err)
                      : real_place(p, full, &real, err);
    if (r == 0)
        r = dr_gate_own_tree(p->fs, p->final, real, &inside, err);
    if (r == 0 && !inside && !p->params->any_path)
        return dr_fail(err, EACCES,
                       "%s: its image file \"%s\" (%s) must be in the metadata's own directory",
                       p->path, p->image, real);
    if (r == 0)
        r = real_place(p, p->final, &own, err);
    if (r < 0)
        return r;
    if (strcmp(real, own) == 0)
        return refuse_self(p, err);
    dir = dr_path_dirname(own);
    if (p->image[0] != '/' || !dir || !dr_path_inside(dir, real))
        return 0;
    const char *rest = real + strlen(dir);
    char *relative = strdup(*rest == '/' ? rest + 1 : rest);
    if (!relative)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    free(p->image);
    p->image = relative;
    return 0;
}

static int check_not_parent(const struct plan *p, struct dr_file_id id, struct dr_error *err)
{
    const struct dr_image *parent = p->params->backing;
    for (unsigned i = 0; parent && i < parent->n_files; i++)
        if (dr_ids_overlap(parent->files[i]->id, id))
            return dr_fail(err, EINVAL, "%s: its image file \"%s\" is also its backing file",
                           p->path, p->image);
    return 0;
}

/* A raw file that is made goes where the metadata is made and moves with it. One that exists, or is
 * to be in another directory, is named by the place where it will stay. */
static int find_place(struct plan *p, struct dr_error *err)
{
    struct dr_file_id id;
    CLEANUP_FREE char *full = dr_path_sibling(p->final, p->image);
    if (!full)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    p->exists = !p->params->all_new && p->fs->ops->identify(p->fs, full, &id, NULL) == 0;
    int r = p->exists ? check_not_parent(p, id, err) : 0;
    if (r == 0)
        r = check_tree(p, full, err);
    if (r < 0)
        return r;
    if (strlen(p->image) >= ADDCOW_NAME_FIELD)
        return dr_fail(err, ENAMETOOLONG,
                       "%s: the name of its image file has %zu bytes, at most %u fit", p->path,
                       strlen(p->image), ADDCOW_NAME_FIELD - 1);
    bool stays = p->exists || strchr(p->image, '/');
    if (stays && p->params->all_new)
        return dr_fail(err, ENOTSUP,
                       "%s: its image file \"%s\" must be made next to it here; to have it in "
                       "another directory make the pair with create and write over it with "
                       "convert -n",
                       p->path, p->image);
    p->raw_path = dr_path_sibling(stays ? p->final : p->path, p->image);
    return p->raw_path ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
}

/* ------------------------------------------------------------------ the raw file */

static int make_raw(struct plan *p, struct dr_error *err)
{
    unsigned flags = DR_FILE_CREATE | p->params->file_flags;
    int r = dr_file_open(p->fs, p->raw_path, flags, &p->raw, err);
    if (r < 0)
        return r;
    p->made_raw = true;
    r = dr_file_truncate(p->raw, p->params->size, err);
    return r < 0 ? r : dr_file_flush(p->raw, err);
}

static int check_empty(const struct plan *p, struct dr_error *err)
{
    enum dr_file_extent kind = DR_FILE_HOLE;
    uint64_t size = dr_file_size(p->raw), run = 0;
    for (uint64_t at = 0; at < size && kind == DR_FILE_HOLE; at += run) {
        int r = dr_file_extent(p->raw, at, size - at, &kind, &run, err);
        if (r < 0)
            return r;
    }
    if (kind == DR_FILE_HOLE)
        return 0;
    return dr_fail(
        err, EEXIST,
        "%s: its image file %s exists and holds data, which the backing file would hide; "
        "reuse=on takes it all the same, or give another image_file",
        p->path, p->raw_path);
}

/* Whose metadata names the same raw file? */
struct search {
    const struct plan *plan;
    const char *beside; /* a path in the directory that is looked through */
    char *owner;        /* a path */
};

/* The raw file that the metadata in f names, if it is metadata. */
static char *image_of(struct dr_file *f)
{
    uint8_t head[ADDCOW_HEADER_SIZE];
    size_t got;
    struct addcow_header h = {0};
    if (dr_file_pread_short(f, head, 0, sizeof(head), &got, NULL) < 0 ||
        addcow_probe(head, got, f->path) < 100 || addcow_header_read(f, &h, NULL) < 0)
        return NULL;
    char *image = dr_path_sibling(f->path, h.image);
    addcow_header_free(&h);
    return image;
}

/* Is this the image whose place the new one takes? */
static bool is_replaced(const struct plan *p, const char *path)
{
    struct dr_file_id a, b;
    return p->fs->ops->identify(p->fs, path, &a, NULL) == 0 &&
           p->fs->ops->identify(p->fs, p->final, &b, NULL) == 0 && dr_same_id(a, b);
}

static int look_at(void *user, const char *name)
{
    struct search *s = user;
    struct dr_fs *fs = s->plan->fs;
    struct dr_file *f;
    struct dr_file_id id;
    CLEANUP_FREE char *path = dr_path_sibling(s->beside, name);
    if (!path || is_replaced(s->plan, path) ||
        dr_file_open(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &f, NULL) < 0)
        return 0;
    CLEANUP_FREE char *image = image_of(f);
    dr_file_unref(f);
    if (!image || fs->ops->identify(fs, image, &id, NULL) < 0 || !dr_same_id(id, s->plan->raw->id))
        return 0;
    s->owner = DR_STEAL(path);
    return 1;
}

static int look_beside(struct search *s, const char *path, struct dr_error *err)
{
    struct dr_fs *fs = s->plan->fs;
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    if (!dir)
        return dr_fail_errno(err, ENOMEM, "%s", s->plan->path);
    s->beside = path;
    fs->ops->list(fs, dir, look_at, s, NULL);
    return 0;
}

/* Two disks in one file would write over each other. Metadata stands where the new one will, or,
 * since names lead only downwards, at or above the raw file; its own directory is the usual one. */
static int refuse_taken(const struct plan *p, struct dr_error *err)
{
    struct search s = {.plan = p};
    CLEANUP_FREE char *real = NULL;
    int r = look_beside(&s, p->final, err);
    if (r == 0 && !s.owner)
        r = p->fs->ops->realpath(p->fs, p->raw_path, &real, err);
    if (real)
        r = look_beside(&s, real, err);
    if (r < 0 || !s.owner)
        return r;
    r = dr_fail(err, EEXIST,
                "%s: its image file %s is that of %s already; reuse=on takes it all the same, "
                "or give another image_file",
                p->path, p->raw_path, s.owner);
    free(s.owner);
    return r;
}

static int take_raw(struct plan *p, struct dr_error *err)
{
    unsigned flags = DR_FILE_RDWR | p->params->file_flags;
    int r = dr_file_open(p->fs, p->raw_path, flags, &p->raw, err);
    if (r < 0)
        return dr_prefix(err, r, "%s: cannot take its image file", p->path);
    if (dr_file_size(p->raw) != p->params->size)
        return dr_fail(err, EINVAL,
                       "%s: its image file %s exists and has %llu bytes, the disk is to have %llu; "
                       "remove it, or name another with image_file",
                       p->path, p->raw_path, (unsigned long long)dr_file_size(p->raw),
                       (unsigned long long)p->params->size);
    if (!p->reuse)
        r = refuse_taken(p, err);
    if (r == 0 && p->params->backing_name && !p->reuse)
        r = check_empty(p, err);
    if (r == 0) /* another program may have left its data in memory */
        atomic_store(&p->raw->dirty, true);
    return r < 0 ? r : dr_file_flush(p->raw, err);
}

/* ------------------------------------------------------------------ the metadata */

/* Without a parent an image file that exists is the disk: where it holds data, the bits say so. Its
 * holes read as zeros either way. */
static int adopt(struct plan *p, struct dr_error *err)
{
    uint64_t size = p->params->size;
    int r = 0;
    if (!p->exists || p->reuse || p->params->backing_name)
        return 0;
    for (uint64_t at = 0, run; r == 0 && at < size; at += run) {
        enum dr_file_extent kind;
        r = dr_file_extent(p->raw, at, size - at, &kind, &run, err);
        if (r == 0 && kind == DR_FILE_DATA)
            r = addcow_set_in_file(p->meta, &p->h, at / p->h.granule, addcow_bits(&p->h, at + run),
                                   err);
    }
    return r;
}

static int make_meta(struct plan *p, struct dr_error *err)
{
    uint8_t header[ADDCOW_HEADER_SIZE];
    unsigned flags = DR_FILE_CREATE | p->params->file_flags;
    uint64_t len = p->h.bitmap_off + addcow_bitmap_len(&p->h, p->params->size);
    addcow_header_encode(header, p->backing, p->image);
    int r = dr_file_open(p->fs, p->path, flags, &p->meta, err);
    if (r < 0)
        return r;
    p->made_meta = true;
    r = dr_file_truncate(p->meta, len, err);
    if (r == 0)
        r = adopt(p, err);
    if (r == 0)
        r = dr_file_flush(p->meta, err);
    if (r == 0)
        r = dr_file_pwrite(p->meta, header, 0, sizeof(header), err);
    return r < 0 ? r : dr_file_flush(p->meta, err);
}

static int sync_name(const struct plan *p, const char *path, struct dr_error *err)
{
    return p->params->file_flags & DR_FILE_NO_FLUSH ? 0 : p->fs->ops->sync_dir(p->fs, path, err);
}

static int make_files(struct plan *p, struct dr_error *err)
{
    int r = p->exists ? take_raw(p, err) : make_raw(p, err);
    if (r == 0)
        r = sync_name(p, p->raw_path, err);
    if (r == 0)
        r = make_meta(p, err);
    if (r == 0)
        r = sync_name(p, p->path, err);
    if (r < 0 && p->made_meta)
        p->fs->ops->unlink(p->fs, p->path, NULL);
    if (r < 0 && p->made_raw)
        p->fs->ops->unlink(p->fs, p->raw_path, NULL);
    return r;
}

static int check_size(const char *path, uint64_t size, struct dr_error *err)
{
    if (size <= ADDCOW_MAX_SIZE)
        return 0;
    return dr_fail(err, EFBIG, "%s: %llu bytes are more than a disk can have", path,
                   (unsigned long long)size);
}

int addcow_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                   struct dr_error *err)
{
    struct plan p = {
        .path = path,
        .params = params,
        .h = {.layout = ADDCOW_V7, .bitmap_off = ADDCOW_HEADER_SIZE, .granule = ADDCOW_SECTOR},
    };
    int r = check_size(path, params->size, err);
    if (r == 0)
        r = read_options(&p, err);
    plan_free(&p);
    *cost = (struct dr_cost){.fixed = p.h.bitmap_off + addcow_bitmap_len(&p.h, params->size) +
                                      params->size};
    return r;
}

int addcow_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                  struct dr_error *err)
{
    struct plan p = {
        .fs = fs,
        .path = path,
        .final = params->final ? params->final : path,
        .params = params,
        .h = {.layout = ADDCOW_V7, .bitmap_off = ADDCOW_HEADER_SIZE, .granule = ADDCOW_SECTOR},
    };
    int r = check_size(path, params->size, err);
    if (r == 0)
        r = read_options(&p, err);
    if (r == 0)
        r = find_place(&p, err);
    if (r == 0)
        r = make_files(&p, err);
    plan_free(&p);
    return r;
}
