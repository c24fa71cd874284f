/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "base/rename.h"
#include "cli/vma/place.h"

bool place_is_ours(const char *name)
{
    return strncmp(name, PLACE_OURS, strlen(PLACE_OURS)) == 0;
}

void place_cleanup_dir(DIR **dir)
{
    if (*dir)
        closedir(*dir);
}

int place_failed_in(const struct vma_place *p, const char *dir, const char *what, const char *name)
{
    cli_error(p->cli, "%s/%s: %s: %s", dir, name, what, strerror(errno));
    return -1;
}

int place_failed(const struct vma_place *p, const char *what, const char *name)
{
    return place_failed_in(p, p->dir, what, name);
}

bool place_is_apart(const struct vma_place *p)
{
    return strcmp(p->dir, p->work) != 0;
}

int place_settle(const struct vma_place *p, int fd)
{
    return p->no_sync ? 0 : fsync(fd);
}

int place_settle_dir(const struct vma_place *p, int fd)
{
    int r = p->no_sync ? 0 : dr_fsync_dir(fd);
    errno = r < 0 ? -r : errno;
    return r < 0 ? -1 : 0;
}

static int open_dir(int at, const char *name)
{
    return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

DIR *place_list(int fd)
{
    int again = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = again < 0 ? NULL : fdopendir(again);

    if (!dir && again >= 0)
        close(again);
    return dir;
}

bool place_is_dots(const char *name)
{
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

static bool is_aside(const char *name)
{
    return strncmp(name, PLACE_ASIDE, strlen(PLACE_ASIDE)) == 0;
}

/* Creating an image uses a directory of its own within: depth is theirs, not a stranger's. What a
 * run that was killed had put aside is somebody's, and may be all that he has: it stays. */
static void remove_all(int fd, int depth)
{
    CLEANUP_DIR DIR *dir = place_list(fd);
    const struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        if (place_is_dots(entry->d_name) || is_aside(entry->d_name) ||
            unlinkat(fd, entry->d_name, 0) == 0 || depth == 0)
            continue;
        CLEANUP_CLOSE int below = open_dir(fd, entry->d_name);
        if (below < 0)
            continue;
        remove_all(below, depth - 1);
        unlinkat(fd, entry->d_name, AT_REMOVEDIR);
    }
}

/* ------------------------------------------------------------------ begin */

int place_out_of_memory(const struct vma_place *p)
{
    cli_error(p->cli, "out of memory");
    return -1;
}

int vma_place_begin_new(struct vma_place *p, const char *dir)
{
    p->dir_fd = p->work_fd = -1;
    p->dir = strdup(dir);
    p->work = strdup(dir);
    if (!p->dir || !p->work)
        return place_out_of_memory(p);
    if (mkdir(dir, 0777) < 0) {
        cli_error(p->cli, "unable to create target directory %s: %s", dir, strerror(errno));
        return -1;
    }
    p->made_dir = true;
    p->dir_fd = open_dir(AT_FDCWD, dir);
    p->work_fd = p->dir_fd < 0 ? -1 : open_dir(p->dir_fd, ".");
    return p->work_fd < 0 ? place_failed(p, "cannot be opened", "") : 0;
}

/* It stays as it is, whatever becomes of us. */
static void leave_work(struct vma_place *p)
{
    close(p->work_fd);
    p->work_fd = -1;
}

/* The process that held the lock may have removed the directory before it released the lock: then
 * we have locked a directory without a name. */
static bool is_gone(const struct vma_place *p, const char *work)
{
    struct stat ours, named;

    return fstat(p->work_fd, &ours) < 0 ||
           fstatat(p->dir_fd, work, &named, AT_SYMLINK_NOFOLLOW) < 0 ||
           ours.st_dev != named.st_dev || ours.st_ino != named.st_ino;
}

static int begin_work(struct vma_place *p, const char *work)
{
    bool there = mkdirat(p->dir_fd, work, 0700) < 0 && errno == EEXIST;

    p->work_fd = open_dir(p->dir_fd, work);
    if (p->work_fd < 0)
        return place_failed(p, "cannot be made or opened", work);
    bool locked = flock(p->work_fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
    if (!locked || is_gone(p, work)) {
        cli_error(p->cli, "%s/%s: another extraction is using it", p->dir, work);
        leave_work(p);
        return -1;
    }
    p->found = there && p->keep;
    if (there && !p->keep) /* of one that was killed */
        vma_place_empty(p);
    return 0;
}

int vma_place_begin(struct vma_place *p, const char *dir, const char *work)
{
    p->dir_fd = p->work_fd = -1;
    p->dir = strdup(dir);
    if (!p->dir || asprintf(&p->work, "%s/%s", dir, work) < 0) {
        p->work = NULL;
        return place_out_of_memory(p);
    }
    p->made_dir = p->make_dir && mkdir(dir, 0777) == 0;
    if (p->make_dir && !p->made_dir && errno != EEXIST) {
        cli_error(p->cli, "%s: cannot be made: %s", dir, strerror(errno));
        return -1;
    }
    p->dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (p->dir_fd < 0) {
        cli_error(p->cli, "%s: %s", dir, strerror(errno));
        return -1;
    }
    return begin_work(p, work);
}

void vma_place_empty(struct vma_place *p)
{
    remove_all(p->work_fd, 2);
    p->found = false;
}

/* ------------------------------------------------------------------ files */

bool place_exists(int fd, const char *name)
{
    return faccessat(fd, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static int hold(struct vma_place *p, const char *name, const struct stat *st, struct dr_disk *disk)
{
    struct vma_claim *bigger = reallocarray(p->old, p->n_old + 1, sizeof(*bigger));
    char *copy = strdup(name);

    p->old = bigger ? bigger : p->old;
    if (!bigger || !copy) {
        free(copy);
        dr_close(disk, NULL);
        return place_out_of_memory(p);
    }
    p->old[p->n_old++] = (struct vma_claim){copy, disk, st->st_dev, st->st_ino};
    return 0;
}

static bool is_at(const struct vma_place *p, const char *name, dev_t dev, ino_t ino)
{
    struct stat st;

    return fstatat(p->dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_dev == dev &&
           st.st_ino == ino;
}

bool place_is_claimed(const struct vma_place *p, const char *name)
{
    for (size_t i = 0; i < p->n_old; i++) {
        const struct vma_claim *c = &p->old[i];
        if (strcmp(c->name, name) == 0 && is_at(p, name, c->dev, c->ino))
            return true;
    }
    return false;
}

int place_claim(struct vma_place *p, const char *name)
{
    const struct dr_open_options open = {.format = "raw", .flags = DR_OPEN_RDWR | p->flags};
    CLEANUP_FREE char *path = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    struct stat st;

    if (fstatat(p->dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return 0;
    if (S_ISLNK(st.st_mode))
        return hold(p, name, &st, NULL); /* of a link only the link is replaced */
    if (!S_ISREG(st.st_mode)) {
        cli_error(p->cli, "%s/%s: is no regular file, and not replaced by one", p->dir, name);
        return -1;
    }
    if (asprintf(&path, "%s/%s", p->dir, name) < 0)
        return place_out_of_memory(p);
    if (dr_open(path, &open, &disk, &err) < 0) {
        cli_fail(p->cli, &err);
        return -1;
    }
    if (is_at(p, name, st.st_dev, st.st_ino))
        return hold(p, name, &st, disk);
    cli_error(p->cli, "%s/%s: was replaced by somebody else just now", p->dir, name);
    dr_close(disk, NULL);
    return -1;
}

static int check(struct vma_place *p, const char *made, const char *name)
{
    bool taken = false;

    if (place_is_apart(p) && place_is_ours(name)) {
        cli_error(p->cli, "%s/%s: files of that name are kept for what is not complete", p->dir,
                  name);
        return -1;
    }
    for (size_t i = 0; i < p->n; i++)
        taken |= strcmp(p->files[i].name, name) == 0 || strcmp(p->files[i].made, made) == 0 ||
                 strcmp(p->files[i].name, made) == 0 || strcmp(p->files[i].made, name) == 0;
    if (taken) {
        CLEANUP_FREE char *escaped = vma_escape(name);
        cli_error(p->cli, "more than one file would be called '%s' in %s", escaped ? escaped : "?",
                  p->dir);
        return -1;
    }
    if (p->replace)
        return place_claim(p, name);
    if (p->finishing || !place_exists(p->dir_fd, name))
        return 0;
    cli_error(p->cli, "%s/%s: exists already%s", p->dir, name,
              place_is_apart(p) ? " (--force replaces it)" : "");
    return -1;
}

int place_append(struct vma_file **files, size_t *count, const char *made, const char *name)
{
    struct vma_file *bigger = reallocarray(*files, *count + 1, sizeof(*bigger));
    if (!bigger)
        return -1;
    *files = bigger;
    CLEANUP_FREE char *m = strdup(made);
    CLEANUP_FREE char *n = strdup(name);
    if (!m || !n)
        return -1;
    (*files)[(*count)++] = (struct vma_file){.made = DR_STEAL(m), .name = DR_STEAL(n)};
    return 0;
}

static void drop(struct vma_file *files, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        free(files[i].made);
        free(files[i].name);
    }
    free(files);
}

int vma_place_add(struct vma_place *p, const char *made, const char *name)
{
    if (check(p, made, name) < 0)
        return -1;
    return place_append(&p->files, &p->n, made, name) < 0 ? place_out_of_memory(p) : 0;
}

static int put(const struct vma_place *p, int fd, const char *name, const void *data, size_t len)
{
    const char *at = data;

    while (len > 0) {
        ssize_t n = write(fd, at, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return place_failed_in(p, p->work, "write", name);
        at += n;
        len -= (size_t)n;
    }
    return place_settle(p, fd) < 0 ? place_failed_in(p, p->work, "fsync", name) : 0;
}

static int make(const struct vma_place *p, const char *name, const void *data, size_t len)
{
    CLEANUP_CLOSE int fd =
        openat(p->work_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);

    return fd < 0 ? place_failed_in(p, p->work, "cannot be made", name)
                  : put(p, fd, name, data, len);
}

int vma_place_write(struct vma_place *p, const char *made, const char *name, const void *data,
                    size_t len)
{
    if (vma_place_add(p, made, name) < 0)
        return -1;
    if (p->found) /* left by the run that was interrupted */
        unlinkat(p->work_fd, made, 0);
    return make(p, made, data, len);
}

int vma_place_note(struct vma_place *p, const char *name, const void *data, size_t len)
{
    char fresh[256];

    snprintf(fresh, sizeof(fresh), "%s.new", name);
    unlinkat(p->work_fd, fresh, 0);
    if (make(p, fresh, data, len) < 0)
        return -1;
    if (renameat(p->work_fd, fresh, p->work_fd, name) < 0 || place_settle_dir(p, p->work_fd) < 0)
        return place_failed_in(p, p->work, "cannot be replaced", name);
    return 0;
}

char *vma_place_path(const struct vma_place *p, const char *made)
{
    char *path;

    return asprintf(&path, "%s/%s", p->work, made) < 0 ? NULL : path;
}

int vma_place_sync(struct vma_place *p)
{
    if (place_settle_dir(p, p->work_fd) < 0 || place_settle_dir(p, p->dir_fd) < 0)
        return place_failed(p, "fsync", ".");
    return 0;
}

/* ------------------------------------------------------------------ end */

/* Remove the old files that were put aside and have been replaced by published ones. Tell of the
 * others: an earlier, interrupted extraction left them, and they may be the only copy. */
static void remove_aside(const struct vma_place *p)
{
    CLEANUP_DIR DIR *dir = place_list(p->work_fd);
    const struct dirent *entry;

    for (size_t i = 0; p->published && i < p->n; i++) {
        char name[NAME_MAX + 1];
        if (place_aside(name, p->files[i].name) == 0)
            unlinkat(p->work_fd, name, 0);
    }
    while (dir && (entry = readdir(dir))) {
        if (is_aside(entry->d_name))
            cli_error(p->cli,
                      "%s/%s: is the %s that was to be replaced when an extraction was interrupted",
                      p->work, entry->d_name, entry->d_name + strlen(PLACE_ASIDE));
    }
}

static void remove_made(const struct vma_place *p)
{
    if (place_is_apart(p)) {
        remove_all(p->work_fd, 2);
        remove_aside(p);
        unlinkat(p->dir_fd, strrchr(p->work, '/') + 1, AT_REMOVEDIR);
        return;
    }
    for (size_t i = 0; i < p->n && !p->published; i++)
        unlinkat(p->work_fd, p->files[i].made, 0);
}

void vma_place_end(struct vma_place *p)
{
    if (!p->dir)
        return;
    if (p->work && p->work_fd >= 0 && !p->keep)
        remove_made(p);
    if (p->made_dir && !p->keep && !p->published)
        rmdir(p->dir);
    if (p->work_fd >= 0)
        close(p->work_fd);
    if (p->dir_fd >= 0)
        close(p->dir_fd);
    for (size_t i = 0; i < p->n_old; i++) {
        dr_close(p->old[i].disk, NULL);
        free(p->old[i].name);
    }
    free(p->old);
    drop(p->files, p->n);
    drop(p->moved, p->n_moved);
    free(p->dir);
    free(p->work);
    *p = (struct vma_place){0};
}
