/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The ranges of a disk that a salvage could not read. Many threads find them, in pieces and some
 * twice; the user is told each range once, joined with its neighbours, in the order of the disk. */
#ifndef DR_OPS_LOST_H
#define DR_OPS_LOST_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct dr_job;
struct dr_salvaged;

struct dr_lost {
    pthread_mutex_t lock;
    struct dr_lost_range {
        uint64_t from, to;
    } * ranges;
    size_t n, room;
    bool any;         /* something was lost, or may be wrong */
    const char *disk; /* whose ranges these are; NULL = not said */
    void (*report)(void *user, const struct dr_salvaged *range); /* NULL = only messages */
    void *user;
};
#define DR_LOST_INIT                      \
    {                                     \
        .lock = PTHREAD_MUTEX_INITIALIZER \
    }

/* [from, to) cannot be read. Where there are too many ranges to remember, the lowest ones are told
 * at once. */
void dr_lost_add(struct dr_lost *lost, uint64_t from, uint64_t to, struct dr_job *job);
/* Bytes that were taken, but that nothing vouches for: told at once. */
void dr_lost_doubt(struct dr_lost *lost, const char *disk, uint64_t from, uint64_t to,
                   struct dr_job *job);
/* Nothing could be unpacked behind the first `from` bytes: told at once. */
void dr_lost_end(struct dr_lost *lost, const char *disk, uint64_t from, const char *why,
                 struct dr_job *job);
/* Tell all, and forget them. */
void dr_lost_tell(struct dr_lost *lost, struct dr_job *job);
void dr_lost_free(struct dr_lost *lost);

#endif
