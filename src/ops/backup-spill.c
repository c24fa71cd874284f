/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "ops/backup-spill.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/random.h"
#include "ops/backup-sums.h"
#include "ops/ops-internal.h"

#define GRAIN        DR_SUMS_GRAIN
#define DEFAULT_SIZE (UINT64_C(1) << 30)
#define MOST_SLOTS   (UINT32_MAX / 2)
#define ATTEMPTS     16 /* at a name that nobody has */
#define PREFIX       ".drover-spill-"
#define DIGITS       ((size_t)16)

struct dr_spill {
    struct dr_file *file;
    char *path; /* as the user says it */
    bool fails_when_full;
    uint32_t n; /* slots that there may be */

    pthread_mutex_t lock;
    uint32_t used;   /* slots [used, n) have never been used; under lock, as the next three */
    uint32_t *free_; /* a stack of those that were dropped */
    size_t n_free, room;
};

/* ------------------------------------------------------------------ beginning and end */

static bool is_dir(struct dr_fs *fs, const char *path)
{
    enum dr_name_kind kind;
    return dr_look(fs, path, &kind, NULL, NULL) == 0 && kind == DR_NAME_DIR;
}

static bool is_spill_name(const char *name)
{
    const size_t len = sizeof(PREFIX) - 1;
    return strncmp(name, PREFIX, len) == 0 && strlen(name) == len + DIGITS &&
           strspn(name + len, "0123456789abcdef") == DIGITS;
}

/* A file that had no time to lose its name has nobody that holds its lock. */
static void remove_left(struct dr_fs *fs, const char *path)
{
    enum dr_name_kind kind;
    CLEANUP_FILE struct dr_file *file = NULL;
    if (dr_look(fs, path, &kind, NULL, NULL) == 0 && kind == DR_NAME_FILE &&
        dr_file_open(fs, path, DR_FILE_RDWR, &file, NULL) == 0)
        fs->ops->unlink(fs, path, NULL);
}

static void remove_all_left(struct dr_fs *fs, const char *dir)
{
    char **names;
    size_t n;
    if (dr_ops_list(fs, dir, &names, &n, NULL) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        CLEANUP_FREE char *path = is_spill_name(names[i]) ? dr_path_join(dir, names[i]) : NULL;
        if (path)
            remove_left(fs, path);
    }
    dr_ops_free_names(names, n);
}

static int create(struct dr_spill *s, struct dr_fs *fs, const char *path, unsigned flags,
                  struct dr_error *err)
{
    const unsigned how = DR_FILE_CREATE | DR_FILE_PRIVATE | DR_FILE_NO_FLUSH;
    int r = dr_file_open(fs, path, how | flags, &s->file, err);
    if (r < 0)
        return r;
    r = fs->ops->unlink(fs, path, err);
    return r < 0 ? dr_prefix(err, r, "the spill file is to have no name") : 0;
}

/* A name that is taken, or was while somebody looked whether the file is left over. */
static bool is_taken(int r)
{
    return r == -EEXIST || r == -EAGAIN || r == -EBUSY || r == -ESTALE;
}

static int create_named(struct dr_spill *s, struct dr_fs *fs, const char *dir, unsigned flags,
                        struct dr_error *err)
{
    int r = -EEXIST;
    for (int i = 0; i < ATTEMPTS && is_taken(r); i++) {
        char name[sizeof(PREFIX) + DIGITS];
        snprintf(name, sizeof(name), PREFIX "%0*llx", (int)DIGITS,
                 (unsigned long long)dr_random64());
        CLEANUP_FREE char *path = dr_path_join(dir, name);
        if (!path)
            return dr_fail(err, ENOMEM, "%s: out of memory", dir);
        dr_error_reset(err);
        r = create(s, fs, path, flags, err);
    }
    return r;
}

static int create_in(struct dr_spill *s, struct dr_fs *fs, const char *dir, unsigned flags,
                     struct dr_error *err)
{
    if (!(flags & DR_FILE_NO_LOCK))
        remove_all_left(fs, dir);
    int r = dr_file_open_nameless(fs, dir, flags | DR_FILE_NO_FLUSH, &s->file, err);
    return r == -ENOTSUP ? create_named(s, fs, dir, flags, err) : r;
}

/* A name that is free tells only the directory. */
static int create_at(struct dr_spill *s, struct dr_fs *fs, const char *path, unsigned flags,
                     struct dr_error *err)
{
    if (is_dir(fs, path))
        return create_in(s, fs, path, flags, err);
    if (dr_look(fs, path, NULL, NULL, NULL) == 0)
        return dr_fail(err, EEXIST, "%s: exists already: the spill file is a new one", path);
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    return dir ? create_in(s, fs, dir, flags, err)
               : dr_fail(err, ENOMEM, "%s: out of memory", path);
}

int dr_spill_new(struct dr_spill **spill, struct dr_fs *fs, const struct dr_backup_spill *options,
                 unsigned flags, struct dr_error *err)
{
    uint64_t slots = (options->size ? options->size : DEFAULT_SIZE) / GRAIN;
    *spill = NULL;
    if (slots == 0)
        return dr_fail(err, EINVAL, "%s: a spill file of %llu bytes: it takes pieces of %u",
                       options->path, (unsigned long long)options->size, GRAIN);
    struct dr_spill *s = calloc(1, sizeof(*s));
    if (!s)
        return dr_fail(err, ENOMEM, "%s: out of memory", options->path);
    s->n = (uint32_t)dr_min(slots, MOST_SLOTS);
    s->fails_when_full = options->fail_when_full;
    s->path = strdup(options->path);
    pthread_mutex_init(&s->lock, NULL);
    int r = s->path ? create_at(s, fs, s->path, flags, err)
                    : dr_fail(err, ENOMEM, "%s: out of memory", options->path);
    if (r < 0)
        dr_spill_free(s);
    else
        *spill = s;
    return r;
}

void dr_spill_free(struct dr_spill *s)
{
    if (!s)
        return;
    dr_file_unref(s->file);
    pthread_mutex_destroy(&s->lock);
    free(s->free_);
    free(s->path);
    free(s);
}

bool dr_spill_fails_when_full(const struct dr_spill *s)
{
    return s->fails_when_full;
}

/* ------------------------------------------------------------------ slots */

static int take_slot(struct dr_spill *s, uint32_t *slot, struct dr_error *err)
{
    DR_LOCK_SCOPE(&s->lock);
    if (s->n_free > 0)
        *slot = s->free_[--s->n_free];
    else if (s->used < s->n)
        *slot = s->used++;
    else
        return dr_fail(err, ENOSPC,
                       "%s: the spill file is full, with %llu bytes: the target is slower than "
                       "those who write to the disk",
                       s->path, (unsigned long long)s->n * GRAIN);
    return 0;
}

void dr_spill_drop(struct dr_spill *s, uint32_t slot)
{
    DR_LOCK_SCOPE(&s->lock);
    if (s->n_free == s->room) {
        size_t room = s->room ? s->room * 2 : 64;
        uint32_t *more = realloc(s->free_, room * sizeof(*more));
        if (!more)
            return; /* the spill is smaller by one slot */
        s->free_ = more;
        s->room = room;
    }
    s->free_[s->n_free++] = slot;
}

int dr_spill_put(struct dr_spill *s, const uint8_t *buf, size_t len, uint32_t *slot,
                 struct dr_error *err)
{
    int r = take_slot(s, slot, err);
    if (r < 0)
        return r;
    r = dr_file_pwrite(s->file, buf, (uint64_t)*slot * GRAIN, len, err);
    if (r < 0)
        dr_spill_drop(s, *slot);
    return r == -EDQUOT ? -ENOSPC : r;
}

int dr_spill_get(struct dr_spill *s, uint32_t slot, uint8_t *buf, size_t len, struct dr_error *err)
{
    return dr_file_pread(s->file, buf, (uint64_t)slot * GRAIN, len, err);
}
