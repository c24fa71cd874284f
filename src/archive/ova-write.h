/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the writer of OVAs is made of: the text of a descriptor, headers of a tar, and a file that
 * sums up what goes through it. */
#ifndef DR_ARCHIVE_OVA_WRITE_H
#define DR_ARCHIVE_OVA_WRITE_H

#include "archive/ova-manifest.h"
#include "drover/ova.h"

#define OVA_BLOCK 512u

struct ova_new_disk {
    char *name; /* of its file */
    struct dr_disk *disk;
    uint64_t capacity; /* bytes, whole sectors */
    uint64_t size;     /* bytes of its file */
    uint64_t stored;   /* bytes of the disk that the file holds */
    struct ova_digest digest;
};

/* The descriptor, padded with blank lines to at least `room` bytes; malloc'ed, NULL = out of
 * memory. Its length is the same for all sizes when room is 0 and `sizes` false: the room to leave.
 */
char *ova_descriptor(const char *name, const struct dr_ova_create_options *o,
                     const struct ova_new_disk *disks, size_t n, bool sizes, size_t room);

/* The header of a regular file: ustar, or, for sizes that ustar cannot have, GNU. */
int ova_tar_header(const char *name, uint64_t size, int64_t mtime, uint8_t block[OVA_BLOCK],
                   struct dr_error *err);

/* A file that adds what is written to it to the sum and passes it on, to the end of `out`; with
 * NULL it is only counted, in the file's size. Written from front to back by one thread. */
int ova_tap(struct dr_file *out, const char *name, struct ova_summing *sum, struct dr_file **tap,
            struct dr_error *err);

#endif
