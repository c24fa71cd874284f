/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"
#include "storage/part.h"
#include "storage/remote.h"

const struct dr_format *dr_ops_format(const char *name, unsigned need, struct dr_error *err)
{
    const struct dr_format *fmt = dr_format_find(name);
    if (!fmt) {
        dr_fail(err, EINVAL, "Unknown file format '%s'", name);
        return NULL;
    }
    if ((need & DR_FORMAT_BACKING) && !(fmt->flags & DR_FORMAT_BACKING)) {
        dr_fail(err, ENOTSUP, "Backing file not supported for file format '%s'", name);
        return NULL;
    }
    if ((fmt->flags & need) != need || ((need & DR_FORMAT_CREATE) && !fmt->create)) {
        dr_fail(err, ENOTSUP, "Format driver '%s' does not support image creation", name);
        return NULL;
    }
    return fmt;
}

void dr_ops_copy_attrs(struct dr_fs *fs, const char *from, const char *to)
{
    CLEANUP_FILE struct dr_file *old = NULL, *fresh = NULL;
    unsigned share = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    if (dr_file_open(fs, from, share, &old, NULL) == 0 &&
        dr_file_open(fs, to, DR_FILE_RDWR | DR_FILE_NO_LOCK, &fresh, NULL) == 0)
        fs->ops->copy_attrs(fs, old, fresh, NULL);
}

static bool is_file_of(const struct dr_image *image, struct dr_file_id id)
{
    for (unsigned i = 0; i < image->n_files; i++)
        if (dr_ids_overlap(image->files[i]->id, id))
            return true;
    return false;
}

bool dr_ops_reads(struct dr_fs *fs, const struct dr_chain *chain, const char *path)
{
    struct dr_file_id id;
    if (fs->ops->identify(fs, path, &id, NULL) < 0)
        return false;
    for (size_t i = 0; i < chain->n; i++)
        if (is_file_of(chain->images[i], id))
            return true;
    return false;
}

int dr_ops_settings(const struct dr_pair *pairs, size_t n, struct dr_option **options,
                    struct dr_error *err)
{
    CLEANUP_FREE struct dr_option *all = calloc(n + 1, sizeof(*all));
    if (!all)
        return dr_fail(err, ENOMEM, "out of memory for %zu settings", n);
    for (size_t i = 0; i < n; i++) {
        if (!pairs || !pairs[i].name || !pairs[i].value)
            return dr_fail(err, EINVAL, "setting %zu of %zu lacks its name or its value", i + 1, n);
        all[i] = (struct dr_option){pairs[i].name, pairs[i].value};
    }
    *options = DR_STEAL(all);
    return 0;
}

/* A failure to open the parent is reported later, when it is opened for good. */
static int take_default(struct dr_fs *fs, const struct dr_format *fmt, const char *path,
                        const char *parent, const char **format, struct dr_error *err)
{
    const struct dr_format *found = NULL;
    CLEANUP_FREE char *where = dr_ops_resolve(path, parent);
    if (!where)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    *format = fmt->default_parent;
    struct dr_error why = DR_ERROR_INIT;
    int r = dr_probe(fs, where, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &found, &why);
    if (r == -ENOTSUP)
        return dr_fail(err, ENOTSUP, "%s: backing format must be specified (-F FMT): %s", path,
                       why.text);
    if (r < 0 || strcmp(found->name, *format) == 0)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: backing format must be specified for '%s' (-F FMT): it would be taken for "
                   "%s, but looks like %s",
                   path, parent, *format, found->name);
}

int dr_ops_parent_format(struct dr_fs *fs, const struct dr_format *fmt, const char *path,
                         const char *parent, const char *given, const char **format,
                         struct dr_error *err)
{
    const char *said = dr_name_format(parent);
    *format = given ? given : fmt->parent_format ? fmt->parent_format : said;
    const struct dr_format *holder = said ? dr_format_find(said) : NULL;
    bool any = given && holder && (holder->flags & DR_FORMAT_CONTAINER); /* that of the member */
    if (said && !any && strcmp(*format, said) != 0)
        return dr_fail(err, EINVAL,
                       "%s: a disk in a %s file cannot be its parent as a %s image; make the child "
                       "in a format that can have any parent",
                       path, said, *format);
    if (*format)
        return 0;
    if (fmt->default_parent)
        return take_default(fs, fmt, path, parent, format, err);
    return dr_fail(err, EINVAL, "%s: backing format must be specified for '%s' (-F FMT)", path,
                   parent);
}

unsigned dr_ops_file_flags(unsigned open_flags)
{
    return (open_flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0) |
           (open_flags & DR_OPEN_NO_FLUSH ? DR_FILE_NO_FLUSH : 0) |
           (open_flags & DR_OPEN_DIRECT ? DR_FILE_DIRECT : 0);
}

/* ------------------------------------------------------------------ directories */

struct names {
    char **all;
    size_t n;
};

static int add_name(void *user, const char *name)
{
    struct names *names = user;
    char **more = realloc(names->all, (names->n + 1) * sizeof(*more));
    if (!more)
        return -ENOMEM;
    names->all = more;
    more[names->n] = strdup(name);
    return more[names->n] ? (names->n++, 0) : -ENOMEM;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

int dr_ops_list(struct dr_fs *fs, const char *dir, char ***names, size_t *n, struct dr_error *err)
{
    struct names found = {NULL, 0};
    *names = NULL;
    *n = 0;
    int r = fs->ops->list(fs, dir, add_name, &found, err);
    if (r != 0) {
        dr_ops_free_names(found.all, found.n);
        return r == -ENOMEM ? dr_fail(err, ENOMEM, "%s: out of memory", dir) : r;
    }
    if (found.n > 1)
        qsort(found.all, found.n, sizeof(*found.all), by_name);
    *names = found.all;
    *n = found.n;
    return 0;
}

void dr_ops_free_names(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
}

bool dr_ops_is_directory(struct dr_fs *fs, const char *path)
{
    char **names = NULL;
    size_t n = 0;
    bool is = !dr_remote_is(path) && dr_ops_list(fs, path, &names, &n, NULL) == 0;
    if (names)
        dr_ops_free_names(names, n);
    return is;
}

/* ------------------------------------------------------------------ space */

uint64_t dr_ops_free_space(struct dr_fs *fs, const char *path)
{
    uint64_t bytes;
    if (!fs->ops->free_space || fs->ops->free_space(fs, path, &bytes, NULL) < 0)
        return UINT64_MAX;
    return bytes;
}

/* Free space where the image's data goes: in its last file, since metadata files come first. A
 * device has all its space already. */
uint64_t dr_ops_image_space(const struct dr_image *image)
{
    const struct dr_file *file = image->files[image->n_files - 1];
    return file->block_device ? UINT64_MAX : dr_ops_free_space(image->fs, file->path);
}

int dr_ops_disk_size(struct dr_image *image, uint64_t *bytes, struct dr_error *err)
{
    *bytes = 0;
    int r = 0;
    for (unsigned i = 0; i < image->n_files && r == 0; i++) {
        uint64_t more = 0;
        struct dr_file *file = dr_image_file(image, i);
        r = dr_file_usage(file, &more, err);
        dr_file_unpin(file);
        *bytes += more;
    }
    return r;
}

/* ------------------------------------------------------------------ backing names */

bool dr_ops_is_device(struct dr_fs *fs, const char *path)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    unsigned flags = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    return dr_file_open(fs, path, flags, &file, NULL) == 0 && file->block_device;
}

char *dr_ops_resolve(const char *path, const char *name)
{
    return dr_name_beside(path, name);
}

/* 0: there is such a file; else *path is freed: -ENOENT, or -ENOMEM. */
static int keep_if_there(const struct dr_image *image, char **path, struct dr_error *err)
{
    struct dr_file_id id;
    int r = dr_name_identify(image->fs, *path, &id, NULL);
    if (r == 0)
        return 0;
    free(DR_STEAL(*path));
    return r == -ENOMEM ? dr_fail(err, ENOMEM, "%s: out of memory", image->path) : -ENOENT;
}

static int only_place(const struct dr_image *image, char **path, struct dr_error *err)
{
    *path = dr_ops_resolve(image->path, image->backing_name);
    if (!*path)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    return keep_if_there(image, path, err);
}

/* Find the next of the driver's candidates for the backing file, from number *n on, that exists. */
static int next_place(const struct dr_image *image, unsigned *n, char **path, struct dr_error *err)
{
    for (;;) {
        int r = image->fmt->backing_candidate(image, (*n)++, path, err);
        if (r < 0)
            return r;
        r = keep_if_there(image, path, err);
        if (r != -ENOENT)
            return r;
    }
}

int dr_ops_backing_path(struct dr_image *image, const struct dr_open_options *options, char **path,
                        struct dr_error *err)
{
    CLEANUP_FREE char *other = NULL;
    unsigned n = 0;
    *path = NULL;
    if (!image->backing_name)
        return -ENOENT;
    if (!image->fmt->backing_candidate)
        return only_place(image, path, err);
    int r = next_place(image, &n, path, err);
    if (r < 0)
        return r;
    r = next_place(image, &n, &other, err);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    /* Several candidates exist, for example in a copy of the directory: the recorded name still
     * leads to the original's parent. Ask which one has the content id that the image expects. */
    char *right = NULL;
    r = dr_backing_locate(image, options, &right, NULL);
    if (r == 0) {
        free(*path);
        *path = right;
    }
    return r == -ENOMEM ? dr_fail(err, ENOMEM, "%s: out of memory", image->path) : 0;
}

size_t dr_ops_member(const struct dr_chain *chain, const char *name)
{
    struct dr_fs *fs = chain->images[0]->fs;
    CLEANUP_FREE char *beside = dr_ops_resolve(chain->images[0]->path, name);
    const char *ways[] = {name, beside ? beside : name};
    for (size_t w = 0; w < 2; w++) {
        struct dr_file_id id;
        if (dr_name_identify(fs, ways[w], &id, NULL) < 0)
            continue;
        for (size_t i = 0; i < chain->n; i++)
            if (dr_same_id(dr_image_id(chain->images[i]), id))
                return i;
    }
    for (size_t i = 0; i + 1 < chain->n; i++)
        if (chain->images[i]->backing_name && strcmp(chain->images[i]->backing_name, name) == 0)
            return i + 1;
    return chain->n;
}

/* Relative path from directory `from` to directory `to`, both real paths: "../x/". */
static char *relative(const char *from, const char *to, const char *name)
{
    size_t same = 0, i = 0, ups = 0;
    for (; from[i] && from[i] == to[i]; i++)
        if (from[i] == '/')
            same = i;
    if ((!from[i] || from[i] == '/') && (!to[i] || to[i] == '/'))
        same = i;
    for (const char *p = from + same; *p; p++)
        ups += p[0] == '/' && p[1];
    const char *rest = to + same + (to[same] == '/');
    char *out = malloc(ups * 3 + strlen(rest) + strlen(name) + 2);
    if (!out)
        return NULL;
    char *end = out;
    for (size_t u = 0; u < ups; u++)
        end = stpcpy(end, "../");
    if (*rest)
        end = stpcpy(stpcpy(end, rest), "/");
    strcpy(end, name);
    return out;
}

static char *file_name_from(struct dr_fs *fs, const char *path, const char *target)
{
    CLEANUP_FREE char *from = NULL, *to = NULL, *real_from = NULL, *real_to = NULL;
    if (dr_remote_is(target) || dr_part_is(target))
        return dr_name_absolute(target); /* no way of directories leads there */
    from = dr_path_dirname(path);
    to = dr_path_dirname(target);
    if (!from || !to)
        return NULL;
    if (strcmp(from, to) == 0)
        return strdup(dr_path_basename(target));
    if (fs->ops->realpath(fs, from, &real_from, NULL) < 0 ||
        fs->ops->realpath(fs, to, &real_to, NULL) < 0)
        return strdup(target);
    return relative(real_from, real_to, dr_path_basename(target));
}

char *dr_ops_name_from(struct dr_fs *fs, const char *path, const char *target)
{
    const char *said = dr_name_format(target);
    if (!said)
        return file_name_from(fs, path, target);
    CLEANUP_FREE char *name = file_name_from(fs, path, target + strlen(said) + 1);
    char *out = NULL;
    return name && asprintf(&out, "%s:%s", said, name) >= 0 ? out : NULL;
}

/* Has the header of the image above it the name by which images[k] was opened? */
static bool is_recorded(const struct dr_chain *chain, size_t k)
{
    const struct dr_image *above = k > 0 ? chain->images[k - 1] : NULL;
    CLEANUP_FREE char *recorded =
        above && above->backing_name ? dr_ops_resolve(above->path, above->backing_name) : NULL;
    return recorded && strcmp(recorded, chain->images[k]->path) == 0;
}

char *dr_ops_name_of(struct dr_fs *fs, const char *path, const struct dr_chain *chain, size_t k)
{
    CLEANUP_FREE char *name = dr_ops_name_from(fs, path, chain->images[k]->path);
    return !name || is_recorded(chain, k) ? DR_STEAL(name) : dr_without_secrets(name);
}

void dr_ops_remove_asides(struct dr_fs *fs, const char *path,
                          bool (*is_dead)(struct dr_fs *fs, const char *aside))
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    char **names;
    size_t n;
    if (!dir || dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        struct dr_aside aside;
        CLEANUP_FREE char *left = NULL;
        if (dr_aside_parse(names[i], DR_ASIDE_FILE, &aside) &&
            dr_aside_is_of(&aside, dr_path_basename(path)))
            left = dr_path_sibling(path, names[i]);
        if (left && (!is_dead || is_dead(fs, left)))
            fs->ops->unlink(fs, left, NULL);
    }
    dr_ops_free_names(names, n);
}

void dr_ops_report(void (*report)(void *user, const char *line), void *user, const char *fmt, ...)
{
    CLEANUP_FREE char *line = NULL;
    va_list ap;
    if (!report)
        return;
    va_start(ap, fmt);
    if (vasprintf(&line, fmt, ap) < 0)
        line = NULL;
    va_end(ap);
    if (line)
        report(user, line);
}

const char *dr_ops_key_secret(const struct dr_pair *pairs, size_t n)
{
    const char *secret = NULL;
    for (size_t i = 0; i < n; i++)
        if (strcmp(pairs[i].name, "key-secret") == 0 ||
            strcmp(pairs[i].name, "encrypt.key-secret") == 0)
            secret = pairs[i].value;
    return secret;
}
