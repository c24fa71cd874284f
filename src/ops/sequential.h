/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images that are written once, from front to back (struct dr_sequential of formats/format.h): into
 * a new file, which gets its name when it is complete, or to the end of any dr_file, as a pipe. */
#ifndef DR_OPS_SEQUENTIAL_H
#define DR_OPS_SEQUENTIAL_H

#include "ops/stock.h"

/* Do the settings ask for such an image? *wanted; fails where they go with none. */
int dr_sequential_wanted(const char *target, const struct dr_convert_options *o, bool *wanted,
                         struct dr_error *err);

/* The guest's bytes [from, to) of a disk. */
struct dr_sequential_part {
    struct dr_disk *disk;
    uint64_t from, to;
};

/* The parts, each beginning at a sector, one after another make a disk of `total` bytes. */
struct dr_sequential_job {
    const struct dr_convert_options *o; /* format, settings, salvage, flags, checksum */
    const struct dr_sequential_part *parts;
    size_t n;
    uint64_t total;
    struct dr_lost *lost; /* for salvage */
    struct dr_job *job;
    uint64_t before, after; /* for progress: bytes of the job in front of it and behind it */
    struct dr_sums *sums;   /* NULL, or gets the sums of the disk; with one part */
    uint64_t *stored;       /* NULL, or gets the bytes of the disk that went out */
};

/* In an image at the end of out. path: the image's, which it may record. Flushes nothing. */
int dr_sequential_write(struct dr_file *out, const char *path, const struct dr_sequential_job *what,
                        struct dr_error *err);
/* In a new image at target. */
int dr_sequential_convert(struct dr_fs *fs, const char *target,
                          const struct dr_sequential_job *what, struct dr_error *err);

#endif
