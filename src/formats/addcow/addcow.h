/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The add-cow driver's own view of an open image. Files of this folder only.
 *
 * Three files: the metadata (header and one bit a unit), a plain raw file with the disk's bytes at
 * the disk's own offsets, and the parent. A bit says who has the unit: 1 the raw file, 0 the
 * parent.
 *
 *   header.c  both layouts, probe, the drafts that are refused   name.c    a parent's name and
 * format bitmap.c  words and runs of bits, in memory and in the file  open.c    open, close, map
 *   write.c   reserve, publish, release, resize, trim            create.c  new images
 *   backing.c set_backing                                        check.c   info, check
 */
#ifndef DR_FORMATS_ADDCOW_ADDCOW_H
#define DR_FORMATS_ADDCOW_ADDCOW_H

#include "core/core.h"

#define ADDCOW_SECTOR      512u
#define ADDCOW_NAME_FIELD  1024u /* version 1: NUL-padded */
#define ADDCOW_HEADER_SIZE 2560u /* version 1 */
#define ADDCOW_BACKING_AT  12u
#define ADDCOW_IMAGE_AT    1036u
#define ADDCOW_RESERVED_AT 2060u
/* The longest backing name that stands in the header's first sector, with its NUL. */
#define ADDCOW_SHORT_NAME 499u
#define ADDCOW_SPAN       (16u << 20)
#define ADDCOW_MAX_SIZE   ((uint64_t)INT64_MAX - 511)

enum addcow_layout {
    ADDCOW_V7,  /* "ADD_COW\xff", version 1 */
    ADDCOW_V20, /* "ACOW", the last revision: read only */
};

struct addcow_header {
    enum addcow_layout layout;
    uint64_t bitmap_off;
    uint32_t granule; /* guest bytes a bit stands for */
    bool all;         /* ALL_ALLOCATED: the raw file is the disk, bits and parent are ignored */
    char *backing;    /* as the field has it; NULL = empty */
    char *backing_fmt;
    char *image; /* name of the raw file */
};

/* A dropped range of the raw file that is still to be punched: nobody may write there before. */
struct addcow_pending {
    uint64_t off, len;
    struct addcow_pending *next;
};

struct addcow_state {
    struct addcow_header h;
    /* under image->lock */
    struct addcow_pending *pending, **pending_end; /* in the order they were dropped */
    size_t n_pending;
};

static inline struct addcow_state *addcow_of(const struct dr_image *image)
{
    return image->state;
}

enum { ADDCOW_META = 0, ADDCOW_RAW = 1 }; /* index in image->files */

/* ------------------------------------------------------------------ header.c */

int addcow_probe(const uint8_t *buf, size_t len, const char *path);
/* Reads and checks the header of f. On failure h is empty. */
int addcow_header_read(struct dr_file *f, struct addcow_header *h, struct dr_error *err);
void addcow_header_free(struct addcow_header *h);
/* Version 1. Both names are short enough. backing "" = none. */
void addcow_header_encode(uint8_t out[ADDCOW_HEADER_SIZE], const char *backing, const char *image);

/* ------------------------------------------------------------------ name.c */

/* Make the text of version 1's field for a parent of this name and format (NULL = raw). *field is
 * malloc'ed, at most 1023 bytes. */
int addcow_name_encode(const char *path, const char *name, const char *format, char **field,
                       struct dr_error *err);
/* Take the name and the format out of such a text. *name and *format are malloc'ed. */
int addcow_name_decode(const char *path, const char *field, char **name, char **format,
                       struct dr_error *err);

/* ------------------------------------------------------------------ bitmap.c */

/* Bits [first, end) of p: how many from first on are alike, and what they are. first < end. */
uint64_t addcow_run(const uint8_t *p, uint64_t first, uint64_t end, bool *set);
void addcow_edit_bits(uint8_t *p, uint64_t first, uint64_t end, bool set);

/* Bytes of bitmap for a disk of size bytes; bits. */
static inline uint64_t addcow_bits(const struct addcow_header *h, uint64_t size)
{
    return size / h->granule + (size % h->granule != 0);
}
static inline uint64_t addcow_bitmap_len(const struct addcow_header *h, uint64_t size)
{
    uint64_t bits = addcow_bits(h, size);
    return bits / 8 + (bits % 8 != 0);
}

/* How many of the bits [first, end) are set in the file. Holes are not read. */
int addcow_count(struct dr_image *image, uint64_t first, uint64_t end, uint64_t *n,
                 struct dr_error *err);
/* Set bits [first, end) in the file; not flushed, pages forgotten. */
int addcow_set_in_file(struct dr_file *f, const struct addcow_header *h, uint64_t first,
                       uint64_t end, struct dr_error *err);
/* The file ends with the bitmap of a disk of size bytes and no bit behind its end is set; not
 * flushed. */
int addcow_cut_tail(struct dr_file *f, const struct addcow_header *h, uint64_t size,
                    struct dr_error *err);

/* ------------------------------------------------------------------ the rest */

int addcow_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                   uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
void addcow_publish(struct dr_image *image, struct dr_reservation *r);
void addcow_cancel(struct dr_image *image, struct dr_reservation *r);
void addcow_reuse(struct dr_image *image, const struct dr_freed *gone);
int addcow_begin_write(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err);
int addcow_resize(struct dr_image *image, uint64_t size, uint64_t parent_size,
                  struct dr_error *err);
int addcow_trim(struct dr_image *image, struct dr_error *err);

int addcow_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                  struct dr_error *err);
int addcow_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                   struct dr_error *err);
extern const struct dr_option_help addcow_create_options[];

int addcow_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                       const char *format, unsigned flags, struct dr_error *err);
/* The parent must be other files than these. */
int addcow_check_backing(const struct dr_image *image, const struct dr_image *parent,
                         struct dr_error *err);

int addcow_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err);
int addcow_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                 struct dr_error *err);

/* The last revision is not written. */
int addcow_refuse_write(const struct dr_image *image, struct dr_error *err);

#endif
