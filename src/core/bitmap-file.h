/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file beside an image that holds its dirty bitmaps, where the format has no room for them
 * inside: IMAGE.drover-bitmaps. docs/formats/bitmaps.md describes it byte by byte.
 *
 * The file has two headers of one sector. The valid one with the higher generation counts; it leads
 * to the contents: what the image's files looked like, and the bitmaps. New contents are written
 * where neither header leads, made durable, and then the older header is replaced. So a reader
 * finds the old bitmaps or the new ones, whenever a writer is interrupted.
 *
 * This module reads and writes the file. bitmaps.c decides when, and whether what it says still
 * goes with the image. */
#ifndef DR_CORE_BITMAP_FILE_H
#define DR_CORE_BITMAP_FILE_H

#include "core/core.h"
#include "core/marks.h"

#define DR_BITMAP_FILE_MIN_BITS 9u  /* granularity */
#define DR_BITMAP_FILE_MAX_BITS 21u /* 2 MiB */
#define DR_BITMAP_FILE_MAX      256u
#define DR_BITMAP_FILE_NAME     1023u
#define DR_BITMAP_FILE_FILES    65536u
#define DR_BITMAP_FILE_BYTES    (UINT64_C(128) << 20) /* bytes of bits of all bitmaps together */

/* Why a bitmap may lack changes. Numbers in the file. */
enum dr_distrust {
    DR_TRUSTED,
    DR_UNCLEAN, /* a writer of the image was interrupted */
    DR_FOREIGN, /* the image was changed by somebody who did not know of the bitmap */
    DR_DISTRUSTS
};

struct dr_noted {
    char *name;
    bool enabled; /* changes set its bits */
    enum dr_distrust distrust;
    struct dr_marks *set;
};

/* A file of the image as it was when the bitmaps were stored. */
struct dr_noted_file {
    struct dr_file_stamp stamp;
    uint64_t sample; /* hash of some of its bytes */
};

struct dr_bitmap_file {
    char *path;
    uint64_t generation;
    bool in_use;                 /* a writer has the image open, or was interrupted */
    uint64_t at, len, sum;       /* the contents that the header leads to */
    uint64_t keep_from, keep_to; /* bytes of the file that a header may lead to */
    uint64_t disk;               /* bytes of the disk that the bitmaps are for */
    struct dr_noted_file *files;
    uint32_t n_files;
    struct dr_noted *list;
    uint32_t n;
};

/* 0, -ENOENT: there is none (silently), -EBADMSG: it is damaged, or no file of this kind, -ENOTSUP:
 * of a later version. Errors name the file, the offset, and what was expected. Ends with
 * dr_bitmap_file_free, also after a failure. */
int dr_bitmap_file_load(struct dr_fs *fs, const char *path, struct dr_bitmap_file *b,
                        struct dr_error *err);
void dr_bitmap_file_free(struct dr_bitmap_file *b);

/* Write b's contents aside, then a header that leads there and says in_use. Durable on return,
 * unless `like`, a file of the image, is NO_FLUSH. b->generation 0: the file is made, with like's
 * owner and mode; -EEXIST: there is one. After a failure the file has the old contents or the new
 * ones, and the next call is right in both cases. */
int dr_bitmap_file_store(struct dr_bitmap_file *b, bool in_use, struct dr_file *like,
                         struct dr_error *err);
/* Write only a header: the same contents, in use. */
int dr_bitmap_file_use(struct dr_bitmap_file *b, struct dr_file *like, struct dr_error *err);

/* NULL: there is none of that name. */
struct dr_noted *dr_bitmap_file_find(const struct dr_bitmap_file *b, const char *name);
/* A set for a disk of that size; NULL = out of memory. */
struct dr_marks *dr_noted_set(unsigned bits, uint64_t size);
void dr_noted_set_free(struct dr_marks *set);

#endif
