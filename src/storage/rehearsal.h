/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A file system on top of another one, in which everything may be changed and nothing is: files are
 * opened for reading, what is written to them stays in memory and is read back. For finding out
 * what an operation would do. New, renamed and removed names are refused (-EROFS).
 *
 * Not more than `limit` bytes are kept; a write that needs more fails with -EFBIG. */
#ifndef DR_STORAGE_REHEARSAL_H
#define DR_STORAGE_REHEARSAL_H

#include "storage/storage.h"

struct dr_rehearsal;

/* Called for each write, truncation and so on, by any thread, in order: len bytes at off. */
typedef void (*dr_rehearsal_wrote)(void *user, const char *path, uint64_t off, uint64_t len);

/* wrote may be NULL. NULL = out of memory. */
struct dr_rehearsal *dr_rehearsal_new(struct dr_fs *inner, uint64_t limit, dr_rehearsal_wrote wrote,
                                      void *user);
struct dr_fs *dr_rehearsal_fs(struct dr_rehearsal *r);
/* No file of it is open any more. NULL allowed. */
void dr_rehearsal_free(struct dr_rehearsal *r);

#endif
