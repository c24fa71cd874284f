/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "cli/cmd-vma.h"

/* Of what we keep there for ourselves. */
#define OURS ".drover."

/* Is it one of the names that we keep for ourselves? */
static bool is_ours(const char *name)
{
    return strncmp(name, OURS, strlen(OURS)) == 0;
}

static void cleanup_dir(DIR **dir)
{
    if (*dir)
        closedir(*dir);
}
#define CLEANUP_DIR __attribute__((cleanup(cleanup_dir)))

static int failed_in(const struct vma_place *p, const char *dir, const char *what, const char *name)
{
    cli_error(p->cli, "%s/%s: %s: %s", dir, name, what, strerror(errno));
    return -1;
}

static int failed(const struct vma_place *p, const char *what, const char *name)
{
    return failed_in(p, p->dir, what, name);
}

/* Are files made elsewhere than where they will be? */
static bool is_apart(const struct vma_place *p)
{
    return strcmp(p->dir, p->work) != 0;
}

/* fsync(), if that is wanted. */
static int settle(const struct vma_place *p, int fd)
{
    return p->no_sync ? 0 : fsync(fd);
}

static int open_dir(int at, const char *name)
{
    return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static DIR *list(int fd)
{
    int again = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = again < 0 ? NULL : fdopendir(again);

    if (!dir && again >= 0)
        close(again);
    return dir;
}

static bool is_dots(const char *name)
{
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

/* Creating an image uses a directory of its own within: depth is theirs, not a stranger's. */
static void remove_all(int fd, int depth)
{
    CLEANUP_DIR DIR *dir = list(fd);
    const struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        if (is_dots(entry->d_name) || unlinkat(fd, entry->d_name, 0) == 0 || depth == 0)
            continue;
        CLEANUP_CLOSE int below = open_dir(fd, entry->d_name);
        if (below < 0)
            continue;
        remove_all(below, depth - 1);
        unlinkat(fd, entry->d_name, AT_REMOVEDIR);
    }
}

/* ------------------------------------------------------------------ begin */

static int out_of_memory(const struct vma_place *p)
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
        return out_of_memory(p);
    if (mkdir(dir, 0777) < 0) {
        cli_error(p->cli, "unable to create target directory %s: %s", dir, strerror(errno));
        return -1;
    }
    p->made_dir = true;
    p->dir_fd = open_dir(AT_FDCWD, dir);
    p->work_fd = p->dir_fd < 0 ? -1 : open_dir(p->dir_fd, ".");
    return p->work_fd < 0 ? failed(p, "cannot be opened", "") : 0;
}

static int begin_work(struct vma_place *p, const char *work)
{
    bool there = mkdirat(p->dir_fd, work, 0700) < 0 && errno == EEXIST;

    p->work_fd = open_dir(p->dir_fd, work);
    if (p->work_fd < 0)
        return failed(p, "cannot be made or opened", work);
    if (flock(p->work_fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK) {
        cli_error(p->cli, "%s/%s: another extraction is using it", p->dir, work);
        close(p->work_fd);
        p->work_fd = -1;
        return -1;
    }
    p->found = there && p->keep;
    if (there && !p->keep) /* of one that was killed */
        remove_all(p->work_fd, 2);
    return 0;
}

/* An archive has up to 254 disks, a disk some files, and each may take the place of another. */
static void allow_many_files(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int vma_place_begin(struct vma_place *p, const char *dir, const char *work)
{
    allow_many_files();
    p->dir_fd = p->work_fd = -1;
    p->dir = strdup(dir);
    if (!p->dir || asprintf(&p->work, "%s/%s", dir, work) < 0) {
        p->work = NULL;
        return out_of_memory(p);
    }
    p->made_dir = mkdir(dir, 0777) == 0;
    if (!p->made_dir && errno != EEXIST) {
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

static bool exists(int fd, const char *name)
{
    return faccessat(fd, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

static int hold(struct vma_place *p, struct dr_disk *disk)
{
    struct dr_disk **bigger = reallocarray(p->old, p->n_old + 1, sizeof(*bigger));

    if (!bigger) {
        dr_close(disk, NULL);
        return out_of_memory(p);
    }
    p->old = bigger;
    p->old[p->n_old++] = disk;
    return 0;
}

/* What will be replaced is locked until then: it must not be what somebody is using. */
static int claim(struct vma_place *p, const char *name)
{
    const struct dr_open_options open = {.format = "raw", .flags = DR_OPEN_RDWR | p->flags};
    CLEANUP_FREE char *path = NULL;
    struct dr_error err = DR_ERROR_INIT;
    struct dr_disk *disk;
    struct stat st;

    if (fstatat(p->dir_fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 || S_ISLNK(st.st_mode))
        return 0; /* of a link only the link is replaced */
    if (!S_ISREG(st.st_mode)) {
        cli_error(p->cli, "%s/%s: is no regular file, and not replaced by one", p->dir, name);
        return -1;
    }
    if (asprintf(&path, "%s/%s", p->dir, name) < 0)
        return out_of_memory(p);
    if (dr_open(path, &open, &disk, &err) < 0) {
        cli_fail(p->cli, &err);
        return -1;
    }
    return hold(p, disk);
}

static int check(struct vma_place *p, const char *made, const char *name)
{
    bool taken = false;

    if (is_apart(p) && is_ours(name)) {
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
        return claim(p, name);
    if (p->finishing || !exists(p->dir_fd, name))
        return 0;
    cli_error(p->cli, "%s/%s: exists already%s", p->dir, name,
              is_apart(p) ? " (--force replaces it)" : "");
    return -1;
}

static int append(struct vma_file **files, size_t *count, const char *made, const char *name)
{
    struct vma_file *bigger = reallocarray(*files, *count + 1, sizeof(*bigger));
    if (!bigger)
        return -1;
    *files = bigger;
    CLEANUP_FREE char *m = strdup(made);
    CLEANUP_FREE char *n = strdup(name);
    if (!m || !n)
        return -1;
    (*files)[(*count)++] = (struct vma_file){DR_STEAL(m), DR_STEAL(n)};
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
    return append(&p->files, &p->n, made, name) < 0 ? out_of_memory(p) : 0;
}

static int put(const struct vma_place *p, int fd, const char *name, const void *data, size_t len)
{
    const char *at = data;

    while (len > 0) {
        ssize_t n = write(fd, at, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return failed_in(p, p->work, "write", name);
        at += n;
        len -= (size_t)n;
    }
    return settle(p, fd) < 0 ? failed_in(p, p->work, "fsync", name) : 0;
}

static int make(const struct vma_place *p, const char *name, const void *data, size_t len)
{
    CLEANUP_CLOSE int fd =
        openat(p->work_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);

    return fd < 0 ? failed_in(p, p->work, "cannot be made", name) : put(p, fd, name, data, len);
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
    if (renameat(p->work_fd, fresh, p->work_fd, name) < 0 || settle(p, p->work_fd) < 0)
        return failed_in(p, p->work, "cannot be replaced", name);
    return 0;
}

char *vma_place_path(const struct vma_place *p, const char *made)
{
    char *path;

    return asprintf(&path, "%s/%s", p->work, made) < 0 ? NULL : path;
}

int vma_place_sync(struct vma_place *p)
{
    if (settle(p, p->work_fd) < 0 || settle(p, p->dir_fd) < 0)
        return failed(p, "fsync", ".");
    return 0;
}

/* ------------------------------------------------------------------ end */

static int move(struct vma_place *p, const char *made, const char *name)
{
    unsigned flags = p->replace ? 0 : RENAME_NOREPLACE;
    int r = append(&p->moved, &p->n_moved, made, name);

    if (r < 0)
        return out_of_memory(p);
    bool gives_way = p->replace && exists(p->dir_fd, name);
    r = renameat2(p->work_fd, made, p->dir_fd, name, flags);
    /* File systems that do not know the flag. */
    if (r < 0 && errno == EINVAL && flags) {
        if (exists(p->dir_fd, name))
            errno = EEXIST;
        else
            r = renameat(p->work_fd, made, p->dir_fd, name);
    }
    p->lost |= r == 0 && gives_way;
    if (r == 0)
        return 0;
    failed(p, "cannot get its name", name);
    const struct vma_file *last = &p->moved[--p->n_moved];
    free(last->made);
    free(last->name);
    return -1;
}

static void move_back(struct vma_place *p)
{
    while (p->n_moved > 0) {
        const struct vma_file *f = &p->moved[--p->n_moved];
        renameat(p->dir_fd, f->name, p->work_fd, f->made);
        free(f->made);
        free(f->name);
    }
}

static bool is_result(const struct vma_place *p, const char *name)
{
    for (size_t i = 0; i < p->n; i++) {
        if (strcmp(p->files[i].made, name) == 0)
            return true;
    }
    return false;
}

static bool is_part(const struct vma_place *p, const char *name)
{
    return !is_dots(name) && !is_ours(name) && !is_result(p, name);
}

/* Where the old file of that number is while its extents change hands. */
static void aside(char name[40], size_t i)
{
    snprintf(name, 40, OURS "old.%zu", i);
}

/* Several files cannot change hands at once. While extents do, no name leads to an old descriptor
 * over new extents. */
static int put_aside(struct vma_place *p)
{
    char old[40];

    for (size_t i = 0; i < p->n; i++) {
        aside(old, i);
        if (exists(p->dir_fd, p->files[i].name) && exists(p->work_fd, p->files[i].made) &&
            renameat(p->dir_fd, p->files[i].name, p->work_fd, old) < 0)
            return failed(p, "cannot be put aside", p->files[i].name);
    }
    if (settle(p, p->work_fd) < 0 || settle(p, p->dir_fd) < 0)
        return failed(p, "fsync", ".");
    return 0;
}

static void put_back(const struct vma_place *p)
{
    char old[40];

    for (size_t i = 0; i < p->n; i++) {
        aside(old, i);
        if (exists(p->work_fd, old) && !exists(p->dir_fd, p->files[i].name))
            renameat(p->work_fd, old, p->dir_fd, p->files[i].name);
    }
}

/* Extents of images of several files that take the place of others. */
static int make_room(struct vma_place *p, DIR *dir)
{
    const struct dirent *entry;
    bool any = false;

    while (p->replace && (entry = readdir(dir))) {
        if (!is_part(p, entry->d_name) || !exists(p->dir_fd, entry->d_name))
            continue;
        if (claim(p, entry->d_name) < 0)
            return -1;
        any = true;
    }
    rewinddir(dir);
    return any ? put_aside(p) : 0;
}

/* Extents have their names already, and come first, so that the file that names them is never
 * without them. */
static int move_parts(struct vma_place *p)
{
    CLEANUP_DIR DIR *dir = list(p->work_fd);
    const struct dirent *entry;

    if (!dir)
        return failed(p, "cannot be listed", "");
    if (make_room(p, dir) < 0)
        return -1;
    while ((entry = readdir(dir))) {
        if (is_part(p, entry->d_name) && move(p, entry->d_name, entry->d_name) < 0)
            return -1;
    }
    return settle(p, p->dir_fd) < 0 ? failed(p, "fsync", ".") : 0;
}

static int move_all(struct vma_place *p)
{
    if (is_apart(p) && move_parts(p) < 0)
        return -1;
    for (size_t i = 0; i < p->n; i++) {
        const struct vma_file *f = &p->files[i];
        bool there = p->finishing && !exists(p->work_fd, f->made) && exists(p->dir_fd, f->name);
        bool named = !is_apart(p) && strcmp(f->made, f->name) == 0;
        if (!there && !named && move(p, f->made, f->name) < 0)
            return -1;
    }
    return settle(p, p->dir_fd) < 0 ? failed(p, "fsync", ".") : 0;
}

/* The name of a directory that was made is an entry of its parent. */
static int sync_parent(const struct vma_place *p)
{
    CLEANUP_CLOSE int fd = p->made_dir ? openat(p->dir_fd, "..", O_RDONLY | O_DIRECTORY) : -1;

    return fd >= 0 && settle(p, fd) < 0 ? failed(p, "fsync", "..") : 0;
}

/* Where something has given way there is no way back: the rest of what took its place stays. */
static void undo(struct vma_place *p)
{
    if (!p->lost) {
        move_back(p);
        put_back(p);
        return;
    }
    cli_error(p->cli, "what did not get its name is complete in %s", p->work);
    p->keep = true;
}

int vma_place_publish(struct vma_place *p)
{
    if (move_all(p) < 0 || sync_parent(p) < 0) {
        undo(p);
        return -1;
    }
    p->published = true;
    p->keep = false;
    return 0;
}

static void remove_made(const struct vma_place *p)
{
    if (is_apart(p)) {
        remove_all(p->work_fd, 2);
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
    for (size_t i = 0; i < p->n_old; i++)
        dr_close(p->old[i], NULL);
    free(p->old);
    drop(p->files, p->n);
    drop(p->moved, p->n_moved);
    free(p->dir);
    free(p->work);
    *p = (struct vma_place){0};
}
