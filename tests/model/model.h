/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The harness that every writable format goes through: what images there are, and the random
 * operations on them. */
#ifndef DROVER_TESTS_MODEL_H
#define DROVER_TESTS_MODEL_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "core/core.h"
#include "drover/ops.h"
#include "shadow.h"
#include "slower.h"

/* ------------------------------------------------------------------ images under test */

/* Where the images of a subject stand in a file system. */
#define MODEL_TOP  "dir/top"
#define MODEL_BASE "dir/base"

struct subject {
    const char *name;
    const char *format, *base_format; /* base_format NULL: no backing image */
    uint64_t size, base_size;
    struct dr_pair pairs[4];
    unsigned n_pairs;
    bool uneven;     /* put together from extents of uneven size, by hand */
    bool waits;      /* a write may have to wait for a flush */
    bool snapshot;   /* an internal snapshot is taken after the first writes (toy) */
    bool snapshots;  /* short programs begin with a snapshot inside, and with data */
    bool junk;       /* the raw file dir/top.raw is full of what nothing shows (add-cow) */
    uint64_t fill;   /* so much is written first: the tables are about to be full (qcow2) */
    uint64_t device; /* the top stands on a block device of that size, full of junk */
    bool bitmaps;    /* the top has bitmaps, which are looked at whenever all of it is read */
    bool zeroes;     /* new images read as zeros but for what the base has: always so */
};

extern const struct subject model_subjects[];
extern const size_t model_n_subjects;

/* Paths with the suffix of the format; in static storage of the thread. */
const char *subject_top(const struct subject *s);
const char *subject_base(const struct subject *s);

/* Make the images: the base with random content, the top empty. view: what the top shows then, an
 * initialised shadow of the top's size. below (may be NULL): what the base provides, padded with
 * zeros to the top's size. Fails the test on any error. */
void subject_make(const struct subject *s, struct dr_fs *fs, struct rnd *rnd, struct shadow *view,
                  uint8_t **below);

/* One image by a format's own create. */
int model_create(struct dr_fs *fs, const char *format, const char *path, uint64_t size,
                 const struct dr_pair *pairs, size_t n, const char *backing,
                 const char *backing_format, struct dr_error *err);

int model_open(struct dr_fs *fs, const struct subject *s, unsigned flags, struct dr_disk **disk,
               struct dr_error *err);
/* The whole disk as a read-only open shows it; malloc'ed, NULL on error. */
uint8_t *model_read_all(struct dr_fs *fs, const char *path, const char *format, uint64_t *size,
                        struct dr_error *err);
/* Check the top image; -ENOTSUP formats count as clean. */
int model_check(struct dr_fs *fs, const struct subject *s, unsigned fix,
                struct dr_check_result *result, struct dr_error *err);

/* bitmaps.c. Add two to the top, which holds `content`; none where the subject has none. */
void model_add_bitmaps(const struct subject *s, struct dr_fs *fs, const uint8_t *content);
/* They miss nothing of what has changed since, or say that they are not to be trusted; which they
 * must not where they have to be consistent. Other disks and subjects: nothing. */
void model_check_bitmaps(struct dr_disk *disk, const uint8_t *now, uint64_t size, bool consistent);
/* The disk gets this size: what it cuts off is forgotten, also when the disk grows again. */
void model_limit_bitmaps(uint64_t size);
/* Remove them, since with inconsistent ones a disk keeps its size; then nobody looks at any until
 * they are resumed, for other file systems. */
void model_pause_bitmaps(const struct subject *s, struct dr_fs *fs);
void model_resume_bitmaps(void);

void model_check_line(void *user, const char *line); /* for dr_check_result.report */

/* ------------------------------------------------------------------ how long, which numbers */

uint64_t model_seed(void);         /* DROVER_SEED or a fixed one */
unsigned model_length(unsigned n); /* n, times DROVER_SOAK */
const char *model_only(void);      /* DROVER_ONLY: part of the names of the subjects to run */
/* Run test over all subjects (that `takes` accepts, NULL = all); returns cmocka's result. */
int model_run(const char *group, void (*test)(void **state),
              bool (*takes)(const struct subject *s));

/* A failure: says seed and subject first. Does not return. */
#define MODEL_FAIL(s, ...) model_fail(__FILE__, __LINE__, s, __VA_ARGS__)
_Noreturn void model_fail(const char *file, int line, const struct subject *s, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* A program of the suite "plant" runs the planted faults of the qcow2 driver, and nothing else. */
#ifdef MODEL_PLANTS
#define MODEL_ONLY_PLANTS true
#else
#define MODEL_ONLY_PLANTS false
#endif

/* Planted faults: does test(state) fail? It runs in a process of its own. */
bool model_detects(void (*test)(void **state), const struct subject *s);
const struct subject *model_subject(const char *name);

/* ------------------------------------------------------------------ operations */

enum op_kind {
    OP_WRITE,
    OP_ZERO,
    OP_ZERO_UNMAP,
    OP_ZERO_EXPLICIT,
    OP_DISCARD,
    OP_FLUSH,
    OP_FILL,
    OP_DROP,
    OP_CODED,
    OP_READ,
    OP_STATUS,
    OP_REOPEN,
    OP_KINDS,
};

struct op {
    enum op_kind kind;
    uint64_t off, len;
    uint64_t seed; /* of the data */
    unsigned data; /* 0 random bytes, 1 zeros, 2 one value */
};

struct workload {
    const struct subject *subject;
    struct dr_fs *fs;
    struct dr_disk *disk;
    struct shadow *view;
    const uint8_t *below; /* what the base shows, for drop; NULL: no base */
    uint64_t align;       /* offsets and lengths are multiples; 1 = bytes */
    uint8_t *buf;         /* as long as the disk */
    struct dr_error err;
};

void workload_init(struct workload *w, const struct subject *s, struct dr_fs *fs,
                   struct shadow *view, const uint8_t *below);
void workload_free(struct workload *w);   /* the disk must be closed */
const char *op_text(const struct op *op); /* in static storage */
struct op workload_next(const struct workload *w, struct rnd *rnd);
/* Run it: update the shadow first, then the disk, and look at what a single thread can know. 0 or
 * the operation's error; wrong content fails the test. */
int workload_run(struct workload *w, const struct op *op);
/* A failed operation left each sector old or new: read it and go on with what is there. */
void workload_settle(struct workload *w, const struct op *op);
/* The whole disk reads as the shadow says. */
void workload_verify(struct workload *w, const char *when);
int workload_open(struct workload *w, unsigned flags);
int workload_close(struct workload *w);

#endif
