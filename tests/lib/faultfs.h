/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file system around another one that counts every I/O and can fail the N-th.
 *
 *     struct dr_fs *memory = dr_fs_memory_new();
 *     struct faultfs *f = faultfs_new(memory);
 *     run(faultfs_fs(f));                          // count
 *     uint64_t n = faultfs_count(f);
 *     for (uint64_t i = 0; i < n; i++) {
 *         faultfs_arm(f, &(struct faultfs_plan){.nth = i, .error = EIO});
 *         run(faultfs_fs(f));                      // must fail or cope; never lie
 *         faultfs_disarm(f);
 *         verify(memory or faultfs_fs(f));
 *     }
 *
 * May be used from many threads. Files opened through faultfs_fs() and through the inner file
 * system are different objects of the process-wide table, though they show the same bytes; do not
 * have both open for writing. Lock, upgrade and downgrade, and locks of directories, go to the
 * inner file system uncounted.
 */
#ifndef DR_TEST_FAULTFS_H
#define DR_TEST_FAULTFS_H

#include "storage/storage.h"

enum faultfs_kind {
    FAULTFS_OPEN,
    FAULTFS_READ,
    FAULTFS_WRITE,
    FAULTFS_ZERO,
    FAULTFS_TRUNCATE,
    FAULTFS_FLUSH,
    FAULTFS_EXTENT,
    FAULTFS_COPY,
    FAULTFS_RENAME,
    FAULTFS_UNLINK,
    FAULTFS_SYNC_DIR,
    FAULTFS_LIST,
    FAULTFS_KINDS,
};

struct faultfs_io {
    enum faultfs_kind kind;
    uint64_t index;   /* how many I/Os came before it, since the last arm or reset */
    const char *path; /* of the file as opened, or the name; rename: the old name */
    const char *to;   /* rename: the new name */
    uint64_t off, len;
};

/* Before each I/O, from the thread that does it, no lock held. 0 = go on; -errno = it fails. */
typedef int (*faultfs_observer)(void *user, const struct faultfs_io *io);

struct faultfs_plan {
    uint64_t nth;   /* the I/O that fails, counted among `kinds` from 0 at faultfs_arm */
    unsigned kinds; /* mask of 1u << enum faultfs_kind; 0 = all */
    int error;      /* positive errno; 0 = EIO */
    bool for_good;  /* every later one of these kinds fails too */
    bool partial;   /* a write, zero or copy that fails does some of its 512-byte sectors first */
    uint64_t seed;  /* which ones; 0 = the first half */
};

struct faultfs;

/* inner is not taken over and must outlive it. NULL = out of memory. */
struct faultfs *faultfs_new(struct dr_fs *inner);
void faultfs_free(struct faultfs *f);
struct dr_fs *faultfs_fs(struct faultfs *f);

void faultfs_arm(struct faultfs *f, const struct faultfs_plan *plan); /* also resets the counts */
void faultfs_disarm(struct faultfs *f);
bool faultfs_fired(struct faultfs *f); /* has the plan made something fail? */

void faultfs_reset(struct faultfs *f); /* counts back to 0 */
uint64_t faultfs_count(struct faultfs *f);
uint64_t faultfs_count_of(struct faultfs *f, enum faultfs_kind kind);
void faultfs_observe(struct faultfs *f, faultfs_observer observer, void *user); /* NULL = none */

/* Files opened from now on want this many requests at once. */
void faultfs_set_depth(struct faultfs *f, unsigned depth);

const char *faultfs_kind_name(enum faultfs_kind kind);

#endif
