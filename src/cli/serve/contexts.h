/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a server can tell of a disk beside where its data lies: which parts a bitmap has marked, and
 * which image of the chain holds them. NBD calls these metadata contexts, and the names are QEMU's.
 */
#ifndef DR_CLI_SERVE_CONTEXTS_H
#define DR_CLI_SERVE_CONTEXTS_H

#include <pthread.h>

#include "cli/common/image.h"

#define CONTEXT_BITMAP "qemu:dirty-bitmap:"
#define CONTEXT_DEPTH  "qemu:allocation-depth"
#define CONTEXT_MOST   32

/* A range that a bitmap has marked. */
struct marked {
    uint64_t off, len;
};

struct context {
    char *name;
    bool depth;            /* else a bitmap: */
    struct marked *marked; /* ascending, never two that touch */
    size_t n, room;
    bool notes;           /* it is enabled: what clients write is marked */
    uint64_t granularity; /* of such marks */
};

struct contexts {
    struct context list[CONTEXT_MOST];
    size_t n;
    uint64_t size;         /* of the disk */
    struct dr_disk *depth; /* open for reading, for CONTEXT_DEPTH; or NULL */
    pthread_mutex_t lock;  /* of what is marked */
};

/* So many bytes from where the one before ends. */
struct context_extent {
    uint32_t len, flags;
};

/* The image's bitmaps of these names, of the nearest image in its chain that has one, as they are
 * now; and with depth, where its data is. writable: clients write to the disk. It stays until
 * the process ends. 0, or 1 after a message. */
int contexts_open(const struct cli *cli, const struct cli_image *image, const char *const *bitmaps,
                  size_t n, bool depth, bool writable, struct contexts *c);

/* Clients are about to change [off, off + len). */
void contexts_note(struct contexts *c, uint64_t off, uint64_t len);

/* What the context says from off on, at most `most` pieces, of which all but the last end where the
 * next begins to differ; together at most len bytes. [off, off + len) is inside the disk. How many;
 * 0: it cannot be told. Any thread. */
size_t contexts_tell(struct contexts *c, size_t context, uint64_t off, uint32_t len,
                     struct context_extent *out, size_t most);

#endif
