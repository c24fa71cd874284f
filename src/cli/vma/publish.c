/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that are complete get their names. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "base/rename.h"
#include "cli/vma/place.h"

static int move(struct vma_place *p, const char *made, const char *name)
{
    int r = place_append(&p->moved, &p->n_moved, made, name);

    if (r < 0)
        return place_out_of_memory(p);
    /* Only what was claimed gives way: a file that came later may be in use. */
    bool gives_way = p->replace && place_is_claimed(p, name);
    if (gives_way) {
        r = renameat(p->work_fd, made, p->dir_fd, name);
    } else {
        r = dr_rename_new(p->work_fd, made, p->dir_fd, name);
        errno = r < 0 ? -r : errno;
    }
    p->lost |= r == 0 && gives_way;
    if (r == 0)
        return 0;
    place_failed(p, "cannot get its name", name);
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
    return !place_is_dots(name) && !place_is_ours(name) && !is_result(p, name);
}

int place_aside(char aside[NAME_MAX + 1], const char *name)
{
    int n = snprintf(aside, NAME_MAX + 1, PLACE_ASIDE "%s", name);

    return n > NAME_MAX ? -ENAMETOOLONG : 0;
}

static int put_one_aside(const struct vma_place *p, const char *name)
{
    char aside[NAME_MAX + 1];
    int r = place_aside(aside, name);

    if (r == 0)
        return renameat(p->dir_fd, name, p->work_fd, aside);
    errno = -r;
    return -1;
}

/* Several files cannot change hands at once. While extents do, no name leads to an old descriptor
 * over new extents. */
static int put_aside(struct vma_place *p)
{
    for (size_t i = 0; i < p->n; i++) {
        struct vma_file *f = &p->files[i];
        if (!place_is_claimed(p, f->name) || !place_exists(p->work_fd, f->made))
            continue;
        if (put_one_aside(p, f->name) < 0)
            return place_failed(p, "cannot be put aside", f->name);
        f->aside = true;
    }
    if (place_settle_dir(p, p->work_fd) < 0 || place_settle_dir(p, p->dir_fd) < 0)
        return place_failed(p, "fsync", ".");
    return 0;
}

/* Not what a run before this one put aside: of that the extents may be gone. */
static void put_back(const struct vma_place *p)
{
    char aside[NAME_MAX + 1];

    for (size_t i = 0; i < p->n; i++) {
        const struct vma_file *f = &p->files[i];
        if (f->aside && place_aside(aside, f->name) == 0 && !place_exists(p->dir_fd, f->name))
            renameat(p->work_fd, aside, p->dir_fd, f->name);
    }
}

/* Extents of images of several files that take the place of others. */
static int make_room(struct vma_place *p, DIR *dir)
{
    const struct dirent *entry;
    bool any = false;

    while (p->replace && (entry = readdir(dir))) {
        if (!is_part(p, entry->d_name) || !place_exists(p->dir_fd, entry->d_name))
            continue;
        if (place_claim(p, entry->d_name) < 0)
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
    CLEANUP_DIR DIR *dir = place_list(p->work_fd);
    const struct dirent *entry;

    if (!dir)
        return place_failed(p, "cannot be listed", "");
    if (make_room(p, dir) < 0)
        return -1;
    while ((entry = readdir(dir))) {
        if (is_part(p, entry->d_name) && move(p, entry->d_name, entry->d_name) < 0)
            return -1;
    }
    return place_settle_dir(p, p->dir_fd) < 0 ? place_failed(p, "fsync", ".") : 0;
}

static int move_all(struct vma_place *p)
{
    if (place_is_apart(p) && move_parts(p) < 0)
        return -1;
    for (size_t i = 0; i < p->n; i++) {
        const struct vma_file *f = &p->files[i];
        bool there = p->finishing && !place_exists(p->work_fd, f->made) &&
                     place_exists(p->dir_fd, f->name);
        bool named = !place_is_apart(p) && strcmp(f->made, f->name) == 0;
        if (!there && !named && move(p, f->made, f->name) < 0)
            return -1;
    }
    return place_settle_dir(p, p->dir_fd) < 0 ? place_failed(p, "fsync", ".") : 0;
}

/* The name of a directory that was made, now or by a run that was killed, is an entry of its
 * parent. */
static int sync_parent(const struct vma_place *p)
{
    CLEANUP_CLOSE int fd = p->make_dir || p->made_dir
                               ? openat(p->dir_fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC)
                               : -1;

    return fd >= 0 && place_settle_dir(p, fd) < 0 ? place_failed(p, "fsync", "..") : 0;
}

/* After an old file was replaced the others cannot go back: keep the new files that have not got
 * their names yet. */
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
