/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Stock parts of copy policies: walking chains, reading, comparing, writing. */
#ifndef DR_OPS_STOCK_H
#define DR_OPS_STOCK_H

#include "base/bytes.h"
#include "core/core.h"
#include "ops/backup-sums.h"
#include "ops/copy.h"
#include "ops/lost.h"

/* One buffer: big enough for long writes, small enough that what was read is still in the
 * processor's cache when it is looked at and written. */
#define DR_STOCK_BUFFER (512u * 1024)

/* ------------------------------------------------------------------ walking
 *
 * The runs of images[first..last) of a chain, as if it were `size` bytes long: what lies past the
 * end of images[first] is ZERO. Holes of flat files count as ZERO. Nothing is read but metadata. */

enum dr_run_kind {
    DR_RUN_HOLE, /* none of the images says anything */
    DR_RUN_ZERO,
    DR_RUN_DATA, /* bytes that must be read to be known */
};

struct dr_run {
    uint64_t off, end; /* end > off */
    enum dr_run_kind kind;
    struct dr_file
        *file;     /* DATA as it stands in a file: for telling places apart, not for reading */
    uint64_t host; /* with file: of the byte at off */
    size_t owner;  /* index of the image that answers */
    bool past_end; /* ZERO because an image ended */
};

struct dr_walk {
    struct dr_chain *chain; /* NULL = nothing at all: one HOLE */
    size_t first, last;
    uint64_t size;
    struct dr_run run; /* the present run */
};

void dr_walk_init(struct dr_walk *w, struct dr_chain *chain, size_t first, size_t last,
                  uint64_t size);
/* Make w->run the run that contains off (< size). Cheap when it does already. */
int dr_walk_to(struct dr_walk *w, uint64_t off, struct dr_error *err);

/* Does the run read as zeros when nothing lies below the walked images? */
static inline bool dr_run_zero(const struct dr_run *run)
{
    return run->kind != DR_RUN_DATA;
}

/* Two DATA runs that are the same bytes of the same file at off. */
bool dr_run_same_place(const struct dr_run *a, const struct dr_run *b, uint64_t off);

/* ------------------------------------------------------------------ copying one chain onto another
 *
 * Used by convert and commit. DATA is copied; zeros are skipped, or written when `write_zeros`;
 * HOLE is skipped unless `hole_is_zero`. */

enum dr_item_kind { DR_ITEM_COPY, DR_ITEM_ZERO, DR_ITEM_READ_TWO, DR_ITEM_READ_A, DR_ITEM_READ_B };

struct dr_transfer {
    struct dr_walk walk;
    struct dr_chain *dst;
    size_t dst_at;
    uint64_t from;       /* of the source: the first byte; walk.size is behind the last one */
    uint64_t shift;      /* added to offsets of the source, modulo 2^64 */
    uint64_t sparse;     /* runs of zeros this long are not written as data; 0 = all is written */
    uint64_t block;      /* granule of zero detection */
    bool all;            /* zeros are data like any other */
    bool hole_is_zero;   /* HOLE reads as zeros (whole chain), else it is left alone */
    bool write_zeros;    /* the target does not read as zeros by itself */
    unsigned zero_flags; /* for dr_chain_zero */
    struct dr_lost
        *lost;    /* gets what cannot be read, and zeros are taken; NULL: that is an error */
    bool to_file; /* try to copy without passing through memory */
    /* NULL, or gets the sums of all that is copied: only with shift 0, hole_is_zero, no to_file. */
    struct dr_sums *sums;
    struct dr_job *job;
    uint64_t before, after; /* bytes of the same job in other runs, for progress */

    uint64_t pos; /* of next */
};

int dr_transfer_next(void *user, struct dr_copy_item *item, struct dr_error *err);
int dr_transfer_work(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err);
int dr_transfer_emit(void *user, struct dr_copy_item *item, uint8_t *const *buf,
                     struct dr_error *err);
/* For other policies: the walk goes to off; and bytes of the source, with what salvage allows. */
int dr_transfer_walk(struct dr_transfer *t, uint64_t off, struct dr_error *err);
int dr_transfer_read(const struct dr_transfer *t, uint8_t *buf, uint64_t off, size_t len,
                     struct dr_error *err);
/* Run it. total: bytes for progress. */
int dr_transfer_run(struct dr_transfer *t, uint64_t total, struct dr_job *job,
                    struct dr_error *err);
/* Bytes of DATA that a transfer would copy: an upper bound of what it writes. */
int dr_transfer_measure(const struct dr_transfer *t, uint64_t *bytes, struct dr_error *err);

/* ------------------------------------------------------------------ the same, compressed
 *
 * compress.c. Units of the target that are whole in the transfer are encoded; where that does not
 * make them smaller they are plain. */

struct dr_compress {
    struct dr_transfer *t;
    struct dr_chain *parent; /* what reads the same there is left out; NULL = nothing */
    uint64_t unit, group;    /* bytes: of the target's unit, and of an item */
    uint64_t pos;            /* of next */
};

/* Can the image hold compressed units? */
int dr_compress_check(const struct dr_image *image, struct dr_error *err);
int dr_compress_run(struct dr_transfer *t, struct dr_chain *parent, uint64_t total,
                    struct dr_job *job, struct dr_error *err);

/* The unit in which images[at] takes space, for zero detection and comparing: a power of two from
 * lowest to DR_STOCK_BUFFER. */
uint64_t dr_stock_block(struct dr_chain *chain, size_t at, uint64_t lowest);

/* How many requests the files of a chain want at once, as a policy's depth. NULL: 0. */
unsigned dr_stock_depth(const struct dr_chain *chain);
static inline unsigned dr_stock_depth_of_two(const struct dr_chain *a, const struct dr_chain *b)
{
    return (unsigned)dr_max(dr_stock_depth(a), dr_stock_depth(b));
}

/* ------------------------------------------------------------------ two views side by side
 *
 * Used by compare, rebase and drop-equal: [0, size) where `mask` (if any) says HOLE, a and b
 * are walked together; ranges with equal places or both zero are passed over unread. The rest come
 * as items READ_TWO, or READ_A / READ_B when the other one is zeros. */
struct dr_pair_walk {
    struct dr_walk a, b;
    struct dr_walk mask;
    bool masked;
    struct dr_image *views; /* NULL, or: only where some view of the image shows its parent */
    uint64_t size;
    uint64_t pos;
};

/* As a policy's next. */
int dr_pair_next(struct dr_pair_walk *p, struct dr_copy_item *item, struct dr_error *err);
/* buf[0] = a's bytes, buf[1] = b's, as the item's kind asks for. */
int dr_pair_read(struct dr_pair_walk *p, const struct dr_copy_item *item, uint8_t *const *buf,
                 struct dr_error *err);
/* The first place at or behind from, a multiple of step from the item's start, where the item's two
 * sides differ; item->len if none does. */
uint64_t dr_pair_differs(const struct dr_copy_item *item, uint8_t *const *buf, uint64_t from,
                         uint64_t step);

#endif
