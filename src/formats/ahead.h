/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Pieces of a file that are read ahead of their use, several at a time.
 *
 * A pass adds the pieces that it wants in the order of the file. Helper threads read them; each is
 * used by the caller's thread, in the order in which it was added. So a check finds the same and
 * says the same however many threads read, and only the reading has to be safe for threads. Less
 * than 4 MiB wait at a time.
 *
 * There are as many helpers as the file wants requests at once, one less than processors at least,
 * and none before two pieces wait. */
#ifndef DR_FORMATS_AHEAD_H
#define DR_FORMATS_AHEAD_H

#include "storage/storage.h"

#define DR_AHEAD_STEP (UINT64_C(256) << 10) /* bytes of a piece, at most */

struct dr_ahead;

struct dr_ahead_range {
    uint64_t at;
    size_t len; /* 0: nothing is read, the piece only waits its turn */
    bool used;  /* surely no hole: the file need not be asked */
};

/* Uses a piece. bytes NULL: it is a hole, and so zeros; else they may be changed. Behind the file's
 * end there are zeros. */
typedef int (*dr_ahead_fn)(void *user, const void *what, uint8_t *bytes, struct dr_error *err);

/* what_size: of what the caller says of a piece. readers: threads, the caller's with them; 0: as
 * above. NULL: out of memory. */
struct dr_ahead *dr_ahead_new(struct dr_file *f, size_t what_size, unsigned readers);
void dr_ahead_free(struct dr_ahead *a);
/* From start to finish pieces may be added. Each is shown to fn by this thread, in the order of
 * adding, during a call of add or finish. finish: r < 0 drops what waits; returns r, or what went
 * wrong. After a failed add: nothing but finish, with that failure. */
void dr_ahead_start(struct dr_ahead *a, dr_ahead_fn fn, void *user);
/* alone: the piece is used before this returns, since its use may write to the file what the next
 * one reads. */
int dr_ahead_add(struct dr_ahead *a, const struct dr_ahead_range *range, const void *what,
                 bool alone, struct dr_error *err);
int dr_ahead_finish(struct dr_ahead *a, int r, struct dr_error *err);

#endif
