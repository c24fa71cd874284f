/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Shared by the parts of the operating system's storage: posix.c (bytes), posix-lock.c (lock
 * bytes), posix-fs.c (names). */
#ifndef DR_STORAGE_POSIX_H
#define DR_STORAGE_POSIX_H

#include <sys/stat.h>

#include "storage/storage.h"

struct posix_file {
    struct dr_file base;
    int fd;                 /* stays the same number for as long as the object lives */
    int cached;             /* a writer with O_DIRECT: the same file without it, else -1 */
    _Atomic bool direct;    /* fd has O_DIRECT */
    unsigned use, unshared; /* lock bytes held; under the file's state_lock */
    uint32_t sector;        /* block device: its logical block */
    uint32_t block;         /* regular file: the file system's block */
    /* Calls that the file system refused; they are not tried again. */
    _Atomic bool no_punch, no_zero_range, no_seek, no_dsync;
    /* Copies into this file: never possible, or not from files of that device. */
    _Atomic bool no_clone, no_copy;
    _Atomic uint64_t no_clone_from, no_copy_from; /* dr_file_id.dev + 1; 0 = none */
    _Atomic bool inode_dirty; /* owner, mode or labels were set: fdatasync is not enough */
};

static inline struct posix_file *posix_file(struct dr_file *f)
{
    return (struct posix_file *)f;
}

extern const struct dr_file_ops posix_file_ops;

/* Two nodes for one block device are one device; its number stands in for the inode. */
struct dr_file_id posix_id(const struct stat *st);

/* Regular file or block device; others fail with the reason. */
int posix_check_type(const char *path, const struct stat *st, struct dr_error *err);

/* Open path or the file behind a /proc link, with O_DIRECT if *direct and the file system takes it;
 * *direct says so. The descriptor or -errno. */
int posix_open_fd(const char *path, int how, mode_t mode, bool *direct);
/* A file that is written with O_DIRECT gets p->cached; if there cannot be one it is no longer
 * direct.
 */
void posix_open_cached(struct posix_file *p);
/* Stop using O_DIRECT. */
void posix_give_up_direct(struct posix_file *p);

int posix_lock(struct dr_file *f, unsigned use, unsigned unshared, struct dr_error *err);
int posix_upgrade(struct dr_file *f, struct dr_error *err);
int posix_downgrade(struct dr_file *f, struct dr_error *err);

#endif
