/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Adding whole extents to a new archive from many threads, in any order.
 *
 * In a file each extent gets its place under a lock and is written there without it. A pipe has one
 * end: those who have an extent take turns, and the one whose turn it is writes without a lock, so
 * that the others can be told that it has failed, or that the job was stopped. After the first
 * failure in a pipe nobody adds anything. In a file the others go on: the extent has its place, and
 * is written there when it is added again. */
#ifndef DR_ARCHIVE_VMA_APPEND_H
#define DR_ARCHIVE_VMA_APPEND_H

#include "archive/vma-output.h"

struct vma_append {
    struct vma_output *out;
    struct vma_frames *frames; /* NULL = not compressed */

    /* private */
    pthread_mutex_t lock;
    pthread_cond_t turn;
    uint64_t next, now; /* a pipe: the turn that the next one gets, and whose turn it is */
    int failed;
    struct vma_append_room *idle;  /* under lock; as many as threads ever added at once */
    struct vma_append_room *stuck; /* under lock; those that are to be added again */
};

/* Memory for an extent while it is made: its bytes, and room for its frames. */
struct vma_append_room {
    struct vma_append_room *next;
    uint8_t *plain, *coded;
    /* While it is stuck: what was to be written where, and for whom. */
    const void *whose;
    const uint8_t *bytes;
    size_t len;
    uint64_t id, place;
    bool is_stuck;
};

void vma_append_begin(struct vma_append *a, struct vma_output *out, struct vma_frames *frames);
void vma_append_end(struct vma_append *a);

/* room->plain has `most` bytes, the same for all calls. NULL = out of memory. */
struct vma_append_room *vma_append_take(struct vma_append *a, size_t most);
void vma_append_give(struct vma_append *a, struct vma_append_room *room);
/* The caller may try again what vma_append could not write. So give the room back like this, with
 * what the caller knows the extent by; the next time ask first whether there is one, and add that
 * again. NULL: there is none. */
void vma_append_keep(struct vma_append *a, struct vma_append_room *room, const void *whose,
                     uint64_t id);
struct vma_append_room *vma_append_stuck(struct vma_append *a, const void *whose, uint64_t id);
int vma_append_again(struct vma_append *a, struct vma_append_room *room, struct dr_error *err);

/* Add the first len bytes of room->plain. head: bytes at their beginning that get a frame of their
 * own, if they are not all: a reader that looks for a cluster then decompresses no data. */
int vma_append(struct vma_append *a, struct vma_append_room *room, size_t len, size_t head,
               struct dr_error *err);

#endif
