/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* Looking on must neither wait for a writer nor keep one out. */
#define LOOK_ON (DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)

size_t dr_scan_find(const struct dr_scan *s, struct dr_file_id id)
{
    size_t i = 0;
    while (i < s->n && !dr_ids_overlap(s->all[i].id, id))
        i++;
    return i;
}

static void clear_entry(struct dr_scan_entry *e)
{
    free(e->path);
    free(e->backing_name);
    free(e->backing_path);
    free(e->backing_format);
    free(e->problem);
}

void dr_scan_free(struct dr_scan *s)
{
    for (size_t i = 0; i < s->n; i++)
        clear_entry(&s->all[i]);
    free(s->all);
    for (size_t i = 0; i < s->n_dirs; i++)
        free(s->dirs[i]);
    free(s->dirs);
    free(s->parts);
    *s = (struct dr_scan){0};
}

bool dr_scan_is_part(const struct dr_scan *s, struct dr_file_id id)
{
    for (size_t i = 0; i < s->n_parts; i++)
        if (dr_ids_overlap(s->parts[i], id))
            return true;
    return false;
}

static int add_parts(struct dr_scan *s, const struct dr_image *image, struct dr_error *err)
{
    if (image->n_files < 2)
        return 0;
    struct dr_file_id *more = realloc(s->parts, (s->n_parts + image->n_files) * sizeof(*more));
    if (!more)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    s->parts = more;
    for (unsigned i = 1; i < image->n_files; i++)
        more[s->n_parts++] = image->files[i]->id;
    return 0;
}

bool dr_scan_is_opaque(const struct dr_scan_entry *e)
{
    return (e->fmt->flags & DR_FORMAT_NO_PROBE) ||
           ((e->fmt->flags & DR_FORMAT_MEMBERS) && !dr_name_format(e->path));
}

/* The functions of a scan fail only for want of memory. */
static int look_at_backing(struct dr_scan_entry *e, struct dr_image *image,
                           const struct dr_open_options *options)
{
    struct dr_fs *fs = image->fs;
    e->has_ids = image->fmt->id && image->fmt->parent_id;
    if (e->has_ids) {
        e->content_id = image->fmt->id(image);
        e->parent_id = image->fmt->parent_id(image);
    }
    if (!image->backing_name)
        return 0;
    e->backing_name = strdup(image->backing_name);
    if (image->backing_format)
        e->backing_format = strdup(image->backing_format);
    if (!e->backing_name || (image->backing_format && !e->backing_format))
        return -ENOMEM;
    int r = dr_ops_backing_path(image, options, &e->backing_path, NULL);
    if (r == 0) {
        r = dr_name_identify(fs, e->backing_path, &e->backing_id, NULL);
        if (r < 0)
            free(DR_STEAL(e->backing_path));
    }
    return r == -ENOMEM ? r : 0;
}

static int look_inside(struct dr_scan *s, struct dr_scan_entry *e, struct dr_fs *fs,
                       const struct dr_open_options *options, struct dr_error *err)
{
    unsigned flags = LOOK_ON | (options ? options->flags & DR_OPEN_ANY_PATH : 0u);
    CLEANUP_IMAGE struct dr_image *image = NULL;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_image_open(fs, e->path, e->fmt->name, flags, &image, &why);
    if (r < 0) { /* whose child it is may be known all the same */
        if (r == -ENOMEM || !(e->problem = strdup(why.text)))
            return -ENOMEM;
        r = dr_image_open(fs, e->path, e->fmt->name, flags | DR_OPEN_RECORDED, &image, NULL);
        e->fmt = NULL;
        if (r == 0)
            return look_at_backing(e, image, options);
        return r == -ENOMEM ? r : 0;
    }
    e->size = image->size;
    e->unclean = image->unclean;
    r = dr_ops_disk_size(image, &e->disk_size, NULL);
    if (r != -ENOMEM)
        r = look_at_backing(e, image, options);
    return r < 0 ? r : add_parts(s, image, err);
}

int dr_scan_file(struct dr_scan *s, struct dr_fs *fs, const char *path,
                 const struct dr_open_options *options, struct dr_error *err)
{
    struct dr_scan_entry e = {0};
    int r = dr_name_identify(fs, path, &e.id, NULL);
    if (r == 0 && dr_scan_find(s, e.id) == s->n)
        r = dr_probe(fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &e.fmt, NULL);
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r < 0 || !e.fmt)
        return 0; /* gone, seen, a directory, not ours to read */
    struct dr_scan_entry *more = realloc(s->all, (s->n + 1) * sizeof(*more));
    if (more)
        s->all = more;
    e.path = strdup(path);
    r = more && e.path ? 0 : -ENOMEM;
    if (r == 0 && !dr_scan_is_opaque(&e))
        r = look_inside(s, &e, fs, options, err);
    if (r < 0) {
        clear_entry(&e);
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    }
    s->all[s->n++] = e;
    return 0;
}

/* 1 = is in the list already, 0 = is now, or -ENOMEM. */
static int remember_dir(struct dr_scan *s, const char *dir, struct dr_error *err)
{
    for (size_t i = 0; i < s->n_dirs; i++)
        if (strcmp(s->dirs[i], dir) == 0)
            return 1;
    char **more = realloc(s->dirs, (s->n_dirs + 1) * sizeof(char *));
    if (more)
        s->dirs = more;
    char *copy = more ? strdup(dir) : NULL;
    if (!copy)
        return dr_fail(err, ENOMEM, "%s: out of memory", dir);
    s->dirs[s->n_dirs++] = copy;
    return 0;
}

int dr_scan_dir(struct dr_scan *s, struct dr_fs *fs, const char *dir,
                const struct dr_open_options *options, struct dr_error *err)
{
    char **names = NULL;
    size_t n = 0;
    int r = remember_dir(s, dir, err);
    if (r != 0)
        return r < 0 ? r : 0;
    r = dr_ops_list(fs, dir, &names, &n, err);
    for (size_t i = 0; r == 0 && i < n; i++) {
        CLEANUP_FREE char *path = strcmp(dir, ".") == 0 ? strdup(names[i])
                                                        : dr_path_join(dir, names[i]);
        r = path ? dr_scan_file(s, fs, path, options, err)
                 : dr_fail(err, ENOMEM, "%s: out of memory", dir);
    }
    if (names)
        dr_ops_free_names(names, n);
    return r;
}

/* *dir: where the file is in truth, links followed; NULL = where path says, or not known. */
static int elsewhere(struct dr_fs *fs, const char *path, const char *here, char **dir,
                     struct dr_error *err)
{
    CLEANUP_FREE char *real = NULL, *real_here = NULL;
    *dir = NULL;
    if (fs->ops->realpath(fs, path, &real, NULL) < 0 ||
        fs->ops->realpath(fs, here, &real_here, NULL) < 0)
        return 0;
    CLEANUP_FREE char *there = dr_path_dirname(real);
    if (!there)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (strcmp(there, real_here) != 0)
        *dir = DR_STEAL(there);
    return 0;
}

int dr_scan_beside(struct dr_scan *s, struct dr_fs *fs, const char *path,
                   const struct dr_open_options *options, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    CLEANUP_FREE char *other = NULL;
    if (!dir)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    int r = dr_scan_dir(s, fs, dir, options, err);
    if (r == 0)
        r = elsewhere(fs, path, dir, &other, err);
    return r == 0 && other ? dr_scan_dir(s, fs, other, options, err) : r;
}
