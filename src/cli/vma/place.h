/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A directory into which files come all together, when they are complete, or not at all. */
#ifndef DR_CLI_VMA_PLACE_H
#define DR_CLI_VMA_PLACE_H

#include <dirent.h>
#include <limits.h>

#include "cli/vma/vma.h"

struct vma_file {
    char *made; /* its name in the directory of work */
    char *name; /* its name in dir in the end */
    bool aside; /* what had that name is put aside */
};

/* A file that is replaced in the end. */
struct vma_claim {
    char *name;
    struct dr_disk *disk; /* locked; NULL = a link */
    dev_t dev;
    ino_t ino;
};

struct vma_place {
    const struct cli *cli;
    char *dir, *work; /* the same, when files only get other names in the end */
    int dir_fd, work_fd;
    bool make_dir, made_dir;
    bool keep;      /* what is there stays after a failure: to go on from */
    bool replace;   /* existing files give way */
    bool no_sync;   /* nothing waits until it is durable */
    bool found;     /* an interrupted extraction's files are there */
    bool finishing; /* all is there, some may have their names already */
    bool lost;      /* something gave way already */
    bool published;
    unsigned flags; /* DR_OPEN_NO_LOCK: of what is replaced */
    struct vma_file *files, *moved;
    size_t n, n_moved;
    struct vma_claim *old;
    size_t n_old;
};

/* dir must not exist, and its files are made in it. 0, or -1 after a message. */
int vma_place_begin_new(struct vma_place *p, const char *dir);
/* dir must exist, but with make_dir; its files are made in dir/work. With keep, files that are
 * there already stay. */
int vma_place_begin(struct vma_place *p, const char *dir, const char *work);
/* What was found is of no use, but for old files that were put aside. */
void vma_place_empty(struct vma_place *p);
/* A file that will be made as made and be called name in the end: refused when name is taken. */
int vma_place_add(struct vma_place *p, const char *made, const char *name);
/* Such a file, with this content, durable. */
int vma_place_write(struct vma_place *p, const char *made, const char *name, const void *data,
                    size_t len);
/* A file in the directory of work that is no result; replaced at once, durable. */
int vma_place_note(struct vma_place *p, const char *name, const void *data, size_t len);
/* The path of a file in the directory of work, malloc'ed. */
char *vma_place_path(const struct vma_place *p, const char *made);
/* The entries of dir are durable. */
int vma_place_sync(struct vma_place *p);
/* All files get their names (vma/publish.c). */
int vma_place_publish(struct vma_place *p);
/* What was not published is removed (unless it is to be kept). */
void vma_place_end(struct vma_place *p);

/* ------------------------------------------------------------------ with vma/publish.c */

/* What begins so is kept for what is not complete. */
#define PLACE_OURS  ".drover."
#define PLACE_ASIDE PLACE_OURS "old."
bool place_is_ours(const char *name);
/* Where the old file of that name is while its extents change hands. -ENAMETOOLONG. */
int place_aside(char aside[NAME_MAX + 1], const char *name);
/* Are files made elsewhere than where they will be? */
bool place_is_apart(const struct vma_place *p);
bool place_exists(int fd, const char *name);
bool place_is_dots(const char *name);

/* Failures: all of them return -1, after a message. */
int place_failed_in(const struct vma_place *p, const char *dir, const char *what, const char *name);
int place_failed(const struct vma_place *p, const char *what, const char *name);
int place_out_of_memory(const struct vma_place *p);
/* What will be replaced is locked until then: it must not be what somebody is using. */
int place_claim(struct vma_place *p, const char *name);
/* Has the name still what was claimed? */
bool place_is_claimed(const struct vma_place *p, const char *name);

/* fsync() of a file / of a directory, if that is wanted. */
int place_settle(const struct vma_place *p, int fd);
int place_settle_dir(const struct vma_place *p, int fd);
int place_append(struct vma_file **files, size_t *count, const char *made, const char *name);
/* The entries of the directory fd, which stays open. NULL: errno. */
DIR *place_list(int fd);
void place_cleanup_dir(DIR **dir);
#define CLEANUP_DIR __attribute__((cleanup(place_cleanup_dir)))

#endif
