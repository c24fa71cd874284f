/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A set of bits that many threads set at once without a lock: which granules of a disk changed.
 *
 * The bits stand in pages of 4 KiB that are allocated when the first bit of them is set. Where
 * there is no memory for a page, or dr_marks_pages of them are in use, the whole range that the
 * page stands for counts as changed: a set may say too much, and never too little. Setting cannot
 * fail.
 *
 * Only dr_marks_set may be called by several threads, and only while nobody calls the others. */
#ifndef DR_CORE_MARKS_H
#define DR_CORE_MARKS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DR_MARKS_PAGE      4096u
#define DR_MARKS_PAGE_BITS (DR_MARKS_PAGE * 8)

/* The most pages that one set has in memory: 32 MiB. Tests make it less. */
extern size_t dr_marks_pages;

struct dr_marks {
    unsigned bits; /* a bit stands for 1 << bits bytes of the disk */
    size_t n_pages, n_used;
    _Atomic(_Atomic uint8_t *) *pages; /* NULL: nothing can be set yet */
    pthread_mutex_t lock;              /* pages are allocated under it */
    _Atomic bool all;                  /* the whole disk counts as changed */
};

/* An empty set for a disk of no bytes. Ends with dr_marks_free. */
void dr_marks_init(struct dr_marks *m, unsigned bits);
void dr_marks_free(struct dr_marks *m);
/* The set is what from is, which must not be used any more. Nobody uses either meanwhile. */
void dr_marks_move(struct dr_marks *m, struct dr_marks *from);
/* From now on the set has room for a disk of that size. What is set stays. 0 or -ENOMEM. */
int dr_marks_cover(struct dr_marks *m, uint64_t size);
/* What lies outside of the disk that the set covers is passed over. */
void dr_marks_set(struct dr_marks *m, uint64_t off, uint64_t len);

/* What lies behind the end of a disk of that size is not set any more. A page that says that all of
 * it is set stays so if the disk's end is in it. */
void dr_marks_cut(struct dr_marks *m, uint64_t size);

/* How the bits of page i stand: nowhere (all are 0), in *bits, or all of them are 1. */
enum dr_marks_kind { DR_MARKS_NONE, DR_MARKS_SOME, DR_MARKS_WHOLE };
enum dr_marks_kind dr_marks_page(const struct dr_marks *m, size_t i, const _Atomic uint8_t **bits);

/* Call each for the ranges of a disk of `size` bytes that are set: ascending, never two that touch,
 * cut at the disk's end. A result other than 0 ends it and becomes its result. */
int dr_marks_each(const struct dr_marks *m, uint64_t size,
                  int (*each)(void *user, uint64_t off, uint64_t len), void *user);

#endif
