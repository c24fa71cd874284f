/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Any offset, length and buffer on files that only take aligned ones; for file-io.c. */
#ifndef DR_STORAGE_ALIGNED_H
#define DR_STORAGE_ALIGNED_H

#include "storage/storage.h"

/* A range of a file that is being changed, in a list that belongs to the file. */
struct dr_busy_range {
    uint64_t off, end;
    struct dr_busy_range *next;
};

/* Wait until nobody else changes bytes in the blocks of [off, off+len), then keep others out until
 * dr_aligned_end(). Nothing to do, and nothing is done, where every byte can be written alone. */
void dr_aligned_begin(struct dr_file *f, uint64_t off, uint64_t len, struct dr_busy_range *range);
void dr_aligned_end(struct dr_file *f, struct dr_busy_range *range);

/* As the operations pread, pwritev and zero of struct dr_file_ops, without their conditions. */
ssize_t dr_aligned_pread(struct dr_file *f, void *buf, uint64_t off, size_t len);
/* len = all of iov. *durable: make the bytes durable, too; false afterwards = that is still to be
 * done by a flush. */
int dr_aligned_pwritev(struct dr_file *f, struct iovec *iov, int n, uint64_t off, uint64_t len,
                       bool *durable);
int dr_aligned_zero(struct dr_file *f, uint64_t off, uint64_t len, unsigned flags);

/* The file is known to reach up to end. */
static inline void dr_file_grow_size(struct dr_file *f, uint64_t end)
{
    uint64_t size = f->size;
    while (size < end && !atomic_compare_exchange_weak(&f->size, &size, end))
        ;
}

#endif
