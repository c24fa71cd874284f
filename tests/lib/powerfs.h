/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file system in memory that remembers every change, and what may be left of them when the power
 * goes.
 *
 *     struct powerfs *p = powerfs_new();
 *     ... make images through powerfs_fs(p) ...
 *     powerfs_settle(p);                            // all this is on disk; the log starts empty
 *     ... the operation under test, through powerfs_fs(p) ...
 *     for (size_t i = 0; i <= powerfs_ops(p); i++)
 *         for (each mode, some seeds) {
 *             struct dr_fs *disk = powerfs_cut(p, i, mode, seed);
 *             ... open the images on disk and look ...
 *             dr_fs_memory_free(disk);
 *         }
 *
 * The model. The first `prefix` changes of the log happened. A flush of a file makes the earlier
 * writes, zeros and truncates of that file durable; sync_dir makes the earlier creates, renames and
 * unlinks in that directory durable, and nothing else does (a file that was flushed may have no
 * name). Of the changes that are not durable any subset has reached the disk: of a write any of its
 * 512-byte sectors; zero and truncate whole or not at all; a write that grew the file may have
 * grown it though its sectors are not there (they read as zeros); a rename is atomic. Overlapping
 * changes keep their order.
 *
 * Every change is one step under one lock, so what the log says is what happened. May be used from
 * many threads; cut and settle want no writer at work.
 */
#ifndef DR_TEST_POWERFS_H
#define DR_TEST_POWERFS_H

#include "storage/storage.h"

enum powerfs_mode {
    POWERFS_ALL,         /* everything up to prefix is on the disk */
    POWERFS_NONE,        /* only what is durable */
    POWERFS_ONLY_LAST,   /* durable, and of the rest the last change */
    POWERFS_ALL_BUT_ONE, /* seed says which is missing: (seed mod how many)-th of those not durable
                          */
    POWERFS_RANDOM,      /* any subset, by seed */
    POWERFS_MODES,
};

enum powerfs_kind {
    POWERFS_WRITE,
    POWERFS_ZERO,
    POWERFS_TRUNCATE,
    POWERFS_FLUSH,
    POWERFS_CREATE,
    POWERFS_RENAME,
    POWERFS_UNLINK,
    POWERFS_SYNC_DIR,
};

struct powerfs;

struct powerfs *powerfs_new(void);
void powerfs_free(struct powerfs *p); /* all its files must be closed */
struct dr_fs *powerfs_fs(struct powerfs *p);

/* Everything so far is durable and the log starts anew. */
void powerfs_settle(struct powerfs *p);

/* Length of the log. */
size_t powerfs_ops(struct powerfs *p);
#define POWERFS_EVERY SIZE_MAX
/* The cut after this one, when there are to be about so many, or POWERFS_EVERY one; the last one is
 * the length of the log, and the next of that is more. With sanitizers fewer (slower.h); every one
 * with DROVER_TEST_LONG. */
size_t powerfs_next(struct powerfs *p, size_t cut, size_t cuts);
enum powerfs_kind powerfs_op_kind(struct powerfs *p, size_t i);
/* One line for a message: "3 write /a.vmdk 512+1024". Returns text. */
char *powerfs_op_text(struct powerfs *p, size_t i, char *text, size_t len);

/* A new file system in memory as the disk would be; dr_fs_memory_free() ends it. The same arguments
 * give the same disk. NULL = out of memory. */
struct dr_fs *powerfs_cut(struct powerfs *p, size_t prefix, enum powerfs_mode mode, uint64_t seed);

/* Of the first prefix changes, how many may be missing: 0 means that all modes give the same. */
size_t powerfs_open_ops(struct powerfs *p, size_t prefix);

/* Planted faults: the n-th flush / sync_dir from now (0 = the next) does nothing and claims
 * success. SIZE_MAX = none. */
void powerfs_skip_flush(struct powerfs *p, size_t n);
void powerfs_skip_sync_dir(struct powerfs *p, size_t n);
/* How many flushes / sync_dirs reached the file system since the last settle, skipped ones too. */
size_t powerfs_flushes(struct powerfs *p);
size_t powerfs_sync_dirs(struct powerfs *p);

#endif
