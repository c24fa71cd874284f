/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdio.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define MARK     ".drover.new-"
#define MARK_LEN (sizeof(MARK) - 1)
#define TAIL_LEN 6
#define NAME_LEN 200 /* of the image's name in the directory's, so that it fits NAME_MAX */
#define TRIES    16

bool dr_new_is_leftover(const char *name, char **of)
{
    size_t len = strlen(name);
    if (len < 1 + 1 + MARK_LEN + TAIL_LEN || name[0] != '.')
        return false;
    const char *mark = name + len - TAIL_LEN - MARK_LEN;
    if (memcmp(mark, MARK, MARK_LEN) != 0)
        return false;
    if (of)
        *of = strndup(name + 1, (size_t)(mark - name - 1));
    return true;
}

static void random_tail(char tail[TAIL_LEN + 1])
{
    static const char digits[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    uint8_t bytes[TAIL_LEN] = {0};
    if (getrandom(bytes, sizeof(bytes), 0) < 0)
        memset(bytes, 0, sizeof(bytes)); /* a taken name is tried again, and refused in the end */
    for (size_t i = 0; i < TAIL_LEN; i++)
        tail[i] = digits[bytes[i] % (sizeof(digits) - 1)];
    tail[TAIL_LEN] = 0;
}

static int make_dir(struct dr_new_image *n, struct dr_error *err)
{
    const char *base = dr_path_basename(n->final);
    for (int i = 0; i < TRIES; i++) {
        CLEANUP_FREE char *name = NULL;
        char tail[TAIL_LEN + 1];
        random_tail(tail);
        if (asprintf(&name, ".%.*s" MARK "%s", NAME_LEN, base, tail) < 0)
            name = NULL;
        CLEANUP_FREE char *dir = name ? dr_path_sibling(n->final, name) : NULL;
        n->path = dir ? dr_path_join(dir, base) : NULL;
        if (!n->path)
            return dr_fail(err, ENOMEM, "%s: out of memory", n->final);
        struct dr_error mine = DR_ERROR_INIT;
        int r = n->fs->ops->mkdir ? n->fs->ops->mkdir(n->fs, dir, &mine) : 0;
        if (r == 0) {
            n->dir = DR_STEAL(dir);
            return 0;
        }
        free(n->path);
        n->path = NULL;
        if (r != -EEXIST)
            return dr_fail(err, -r, "%s", mine.text);
    }
    return dr_fail(err, EEXIST, "%s: no free name for a temporary directory next to it", n->final);
}

/* Is anybody using what we are about to replace? */
static int lock_old(struct dr_new_image *n, const char *path, bool no_replace, unsigned flags,
                    struct dr_error *err)
{
    struct dr_file_id id;
    int r = n->fs->ops->identify(n->fs, path, &id, NULL);
    if (r < 0)
        return 0; /* nothing there; if it is worse, making the new one says so */
    if (no_replace)
        return dr_fail(err, EEXIST, "%s: exists already", path);
    char *real = NULL;
    if (n->fs->ops->realpath(n->fs, path, &real, NULL) == 0) {
        free(n->final);
        n->final = real;
    }
    unsigned file_flags = DR_FILE_RDWR | (flags & DR_OPEN_NO_LOCK ? DR_FILE_NO_LOCK : 0);
    return dr_file_open(n->fs, n->final, file_flags, &n->old, err);
}

int dr_new_begin(struct dr_new_image *n, struct dr_fs *fs, const char *path, bool no_replace,
                 unsigned flags, struct dr_error *err)
{
    *n = (struct dr_new_image){
        .fs = fs, .durable = !(flags & DR_OPEN_NO_FLUSH), .no_replace = no_replace};
    n->final = strdup(path);
    int r = n->final ? 0 : dr_fail(err, ENOMEM, "%s: out of memory", path);
    if (r == 0)
        r = lock_old(n, path, no_replace, flags, err);
    if (r == 0)
        r = make_dir(n, err);
    if (r < 0)
        dr_new_abandon(n);
    return r;
}

/* ------------------------------------------------------------------ moving and removing */

/* What the file of this name had before, the new one gets: owner, mode, labels. */
static void take_attrs(struct dr_fs *fs, const char *from, const char *to)
{
    CLEANUP_FILE struct dr_file *old = NULL, *fresh = NULL;
    unsigned share = DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK;
    if (dr_file_open(fs, from, share, &old, NULL) == 0 &&
        dr_file_open(fs, to, DR_FILE_RDWR | DR_FILE_NO_LOCK, &fresh, NULL) == 0)
        fs->ops->copy_attrs(fs, old, fresh, NULL);
}

static int move_one(struct dr_fs *fs, const char *dir, const char *name, const char *final,
                    bool durable, struct dr_error *err)
{
    CLEANUP_FREE char *from = dr_path_join(dir, name), *to = dr_path_sibling(final, name);
    if (!from || !to)
        return dr_fail(err, ENOMEM, "%s: out of memory", final);
    struct dr_file_id id;
    if (fs->ops->identify(fs, to, &id, NULL) == 0)
        take_attrs(fs, to, from);
    int r = fs->ops->rename(fs, from, to, err);
    if (r == 0 && durable)
        r = fs->ops->sync_dir(fs, to, err);
    return r;
}

int dr_new_move_all(struct dr_fs *fs, const char *dir, const char *final, bool durable,
                    struct dr_error *err)
{
    char **names;
    size_t n;
    const char *last = dr_path_basename(final);
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++)
        if (strcmp(names[i], last) != 0)
            r = move_one(fs, dir, names[i], final, durable, err);
    if (r == 0)
        r = move_one(fs, dir, last, final, durable, err);
    dr_ops_free_names(names, n);
    if (r == 0 && fs->ops->rmdir)
        fs->ops->rmdir(fs, dir, NULL); /* an empty directory harms nobody; recover knows it */
    return r;
}

int dr_new_remove_all(struct dr_fs *fs, const char *dir, struct dr_error *err)
{
    char **names;
    size_t n;
    int r = dr_ops_list(fs, dir, &names, &n, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < n && r == 0; i++) {
        CLEANUP_FREE char *path = dr_path_join(dir, names[i]);
        r = path ? fs->ops->unlink(fs, path, err) : dr_fail(err, ENOMEM, "%s: out of memory", dir);
    }
    dr_ops_free_names(names, n);
    if (r == 0 && fs->ops->rmdir)
        r = fs->ops->rmdir(fs, dir, err);
    return r;
}

static void forget(struct dr_new_image *n)
{
    dr_file_unref(n->old);
    free(n->final);
    free(n->dir);
    free(n->path);
    *n = (struct dr_new_image){0};
}

static bool is_part_of(const struct dr_image *image, struct dr_file_id id)
{
    for (unsigned i = 0; image && i < image->n_files; i++)
        if (dr_ops_same_id(image->files[i]->id, id))
            return true;
    return false;
}

/* The image that gives way, to tell its files from others; NULL if it is none that opens. */
static struct dr_image *open_old(const struct dr_new_image *n)
{
    struct dr_image *image;
    unsigned flags = DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK;
    if (!n->old || dr_image_open(n->fs, n->final, NULL, flags, &image, NULL) < 0)
        return NULL;
    return image;
}

int dr_new_check_places(const struct dr_new_image *n, struct dr_error *err)
{
    char **names;
    size_t count;
    int r = dr_ops_list(n->fs, n->dir, &names, &count, err);
    if (r < 0)
        return r;
    CLEANUP_IMAGE struct dr_image *image = open_old(n);
    for (size_t i = 0; i < count && r == 0; i++) {
        CLEANUP_FREE char *to = dr_path_sibling(n->final, names[i]);
        struct dr_file_id id;
        if (!to || n->fs->ops->identify(n->fs, to, &id, NULL) < 0)
            continue;
        bool main_file = strcmp(names[i], dr_path_basename(n->final)) == 0;
        if (n->no_replace || (!main_file && !is_part_of(image, id)))
            r = dr_fail(err, EEXIST, "%s: exists already and is no part of %s", to, n->final);
    }
    dr_ops_free_names(names, count);
    return r;
}

int dr_new_publish(struct dr_new_image *n, struct dr_error *err)
{
    int r = dr_new_check_places(n, err);
    if (r == 0)
        r = dr_new_move_all(n->fs, n->dir, n->final, n->durable, err);
    if (r < 0) /* what was moved belongs to no descriptor yet; recover finishes or undoes it */
        dr_new_remove_all(n->fs, n->dir, NULL);
    forget(n);
    return r;
}

void dr_new_abandon(struct dr_new_image *n)
{
    if (n->dir)
        dr_new_remove_all(n->fs, n->dir, NULL);
    forget(n);
}

/* Where the component begins that holds the mark: behind a slash, a quote or ": ". */
static char *component_start(char *text, char *mark)
{
    char *at = mark;
    while (at > text && !strchr("/'\"", at[-1]) &&
           !(at - text >= 2 && memcmp(at - 2, ": ", 2) == 0))
        at--;
    return at;
}

int dr_new_hide(int r, struct dr_error *err)
{
    char *mark;
    while (r < 0 && err && (mark = strstr(err->text, MARK))) {
        char *start = component_start(err->text, mark), *end = mark + MARK_LEN;
        end += strnlen(end, TAIL_LEN);
        if (*end == '/') { /* DIR/FILE: the file has its own name already */
            memmove(start, end + 1, strlen(end + 1) + 1);
        } else { /* the directory itself stands for the image: .NAME.mark → NAME */
            memmove(mark, end, strlen(end) + 1);
            if (*start == '.')
                memmove(start, start + 1, strlen(start + 1) + 1);
        }
    }
    return r;
}

int dr_new_create(struct dr_fs *fs, const char *path, const struct dr_format *fmt, uint64_t size,
                  const struct dr_pair *pairs, size_t n_pairs, struct dr_image *backing,
                  const char *backing_name, const char *backing_format, unsigned flags,
                  struct dr_error *err)
{
    CLEANUP_FREE struct dr_option *options = calloc(n_pairs + 1, sizeof(*options));
    if (!options)
        return dr_fail(err, ENOMEM, "%s: out of memory", path);
    for (size_t i = 0; i < n_pairs; i++)
        options[i] = (struct dr_option){pairs[i].name, pairs[i].value};
    struct dr_create_params params = {
        .size = size,
        .options = options,
        .n_options = n_pairs,
        .backing = backing,
        .backing_name = backing_name,
        .backing_format = backing_format,
        .file_flags = dr_ops_file_flags(flags),
    };
    return fmt->create(fs, path, &params, err);
}
