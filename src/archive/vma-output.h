/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where a new archive goes: appended to a file, or written to a descriptor (pipe, socket, device).
 * And its zstd frames, when it is compressed. */
#ifndef DR_ARCHIVE_VMA_OUTPUT_H
#define DR_ARCHIVE_VMA_OUTPUT_H

#include "ops/copy.h"
#include "storage/storage.h"

struct vma_output {
    struct dr_file *file; /* not owned; NULL = fd */
    int fd;               /* not owned */
    int own_fd;           /* the same object, opened here so that it does not block; or -1 */
    bool socket;
    const char *name; /* for messages */
    struct dr_job *job;
    uint64_t pos; /* bytes written */
};

void vma_output_to_file(struct vma_output *o, struct dr_file *file, const char *name,
                        struct dr_job *job);
void vma_output_to_fd(struct vma_output *o, int fd, const char *name, struct dr_job *job);
void vma_output_close(struct vma_output *o); /* closes neither file nor fd */

/* Write all len bytes, however slowly the reader takes them. -EPIPE: the reader is gone; no
 * signal is raised. -ECANCELED: the job was stopped meanwhile. One thread at a time. */
int vma_output_write(struct vma_output *o, const void *buf, size_t len, struct dr_error *err);
/* Flush a file or device; a pipe or socket needs nothing. */
int vma_output_sync(struct vma_output *o, struct dr_error *err);

/* ------------------------------------------------------------------ zstd (vma-frames.c)
 *
 * Independent frames with a table of their sizes at the end: plain `zstd -d` reads them one after
 * the other, who knows the table reads any of them. */

struct vma_frames;

int vma_frames_new(int level, struct vma_frames **frames, struct dr_error *err);
void vma_frames_free(struct vma_frames *f); /* NULL allowed */
/* Room that a frame of len plain bytes may need. */
size_t vma_frames_bound(size_t len);
/* One frame of len plain bytes into out, which has vma_frames_bound(len). Any threads. */
int vma_frames_compress(struct vma_frames *f, const void *plain, size_t len, void *out,
                        size_t *out_len, struct dr_error *err);
/* Record that this frame comes next in the file. One thread at a time. */
int vma_frames_add(struct vma_frames *f, size_t coded, size_t plain, struct dr_error *err);
/* The table, for the end of the file. *buf is malloc'ed. */
int vma_frames_table(const struct vma_frames *f, uint8_t **buf, size_t *len, struct dr_error *err);

#endif
