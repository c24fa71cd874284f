/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Between powerfs.c, which records, and powerfs-cut.c, which builds disks from the record. */
#ifndef DR_TEST_POWERFS_LOG_H
#define DR_TEST_POWERFS_LOG_H

#include "powerfs.h"

struct power_op {
    enum powerfs_kind kind;
    uint64_t ino; /* file changes, create, rename */
    uint64_t off; /* truncate: the size */
    uint64_t len;
    uint8_t *data; /* write */
    char *path;    /* name changes: real path; sync_dir: the directory; else for messages */
    char *to;      /* rename */
};

/* What settle found: the names, and each file's bytes under "/<ino>" in base. */
struct power_name {
    char *path;
    uint64_t ino;
};

struct powerfs {
    struct dr_fs fs;
    struct dr_fs *live; /* memory: everything, as the program sees it */
    struct dr_fs *base; /* memory: the bytes at the last settle */
    struct power_name *names;
    size_t n_names;
    pthread_mutex_t lock; /* changes of live, and the log */
    uint64_t device;      /* ino of the file that was made a block device last; 0 = none */
    struct power_op *log;
    size_t n_ops, room;
    size_t flushes, sync_dirs;
    size_t skip_flush, skip_sync_dir; /* count down; SIZE_MAX = none */
};

void power_names_free(struct power_name *names, size_t n);
/* Set, or with ino 0 remove. False = out of memory. */
bool power_name_set(struct power_name **names, size_t *n, const char *path, uint64_t ino);
/* The bytes of src onto dst, which is empty. */
int power_copy_bytes(struct dr_file *src, struct dr_file *dst);
char *power_base_path(char text[32], uint64_t ino);

#endif
