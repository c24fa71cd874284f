/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Disks that go through pipes: written from front to back, and read once, in order, without
 * knowing how long they are. */
#ifndef DR_OPS_PIPES_H
#define DR_OPS_PIPES_H

#include "ops/stock.h"
#include "storage/source.h"

/* ------------------------------------------------------------------ to a pipe */

/* The guest's bytes [from, to) of the disk, holes as zeros, and zeros up to the end of the sector,
 * to the end of out (dr_file_open_pipe(), or any file). total: bytes of the job, for progress, of
 * which those that out has are done. lost and sums as in struct dr_transfer; with sums, from is 0.
 * Flushes nothing. */
int dr_pipe_write(struct dr_disk *disk, uint64_t from, uint64_t to, struct dr_file *out,
                  uint64_t total, struct dr_lost *lost, struct dr_sums *sums, struct dr_job *job,
                  struct dr_error *err);

/* ------------------------------------------------------------------ from a pipe
 *
 * Raw bytes that come from a source one after another; what is compressed is unpacked on the way.
 * Memory is bounded however much comes. */

struct dr_piped {
    struct dr_source *source;
    const char *name;
    uint8_t *head; /* what was read to find out the format, and is given out first */
    size_t head_len, head_at;
    uint64_t left;        /* bytes that are still wanted */
    struct dr_sums *sums; /* NULL, or gets the sums of all that is copied, and its size */
    /* an image that can be read in one pass; ops NULL: raw bytes */
    const struct dr_incoming_ops *ops;
    void *state;
    struct dr_inflow inflow;
    struct dr_incoming incoming;
    uint64_t reached; /* guest bytes that are dealt with */
};

/* format "raw": the bytes as they come. NULL: unpacked, and found out. Images
 * that cannot be read in one pass are refused (-ENOTSUP). source is taken over, also after a
 * failure. End with dr_piped_close().
 */
int dr_piped_begin(struct dr_piped *p, struct dr_source *source, const char *format,
                   struct dr_error *err);
/* Only the bytes [from, to) of those that come, as far as there are some. */
int dr_piped_range(struct dr_piped *p, uint64_t from, uint64_t to, struct dr_error *err);
void dr_piped_close(struct dr_piped *p);
/* All that comes into the disk, which must be able to grow and grows to it, or into a file from its
 * beginning on. *size (may be NULL): how many bytes came. */
int dr_piped_to_disk(struct dr_piped *p, struct dr_disk *disk, uint64_t sparse, uint64_t *size,
                     struct dr_job *job, struct dr_error *err);
int dr_piped_to_file(struct dr_piped *p, struct dr_file *out, uint64_t *size, struct dr_job *job,
                     struct dr_error *err);

/* The same for an image that is read in one pass (p->ops), whose disk has p->incoming.size bytes:
 * into a disk that reads as zeros, or a file, whose zeros are written, too. No sums. */
int dr_piped_image_to_disk(struct dr_piped *p, struct dr_disk *disk, uint64_t sparse,
                           struct dr_job *job, struct dr_error *err);
int dr_piped_image_to_file(struct dr_piped *p, struct dr_file *out, struct dr_job *job,
                           struct dr_error *err);

/* How bytes that came go into the disk (dr_transfer_emit): runs of zeros of sparse bytes stay out;
 * 0 = all is written. */
struct dr_transfer dr_piped_transfer(struct dr_disk *disk, uint64_t sparse, struct dr_job *job);

#endif
