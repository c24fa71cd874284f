/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: checksums of what a disk shows, which are the same whatever the format, the chain, the
 * compression and the layout of its image.
 *
 * The conventions of drover.h and ops.h hold. */
#ifndef DROVER_CHECKSUM_H
#define DROVER_CHECKSUM_H

#include "drover/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dr_checksum_options {
    enum dr_checksum kind; /* not with `against` */
    /* The checksums of each 64 KiB are written to this file, which takes the place of another one
     * of its kind. NULL = they are not */
    const char *save;
    /* A file that was saved before, of any disk: what differs from that is told. NULL = none */
    const char *against;
    /* Called with each range that differs, in order, in whole pieces of 64 KiB but for the end of
     * the longer disk. What only one of the disks has differs where it is not zeros. NULL allowed.
     */
    void (*differs)(void *user, uint64_t off, uint64_t len);
    void *user;
};

struct dr_checksum_result {
    enum dr_checksum kind;
    uint64_t size; /* of the disk in bytes, at that instant */
    char digest[DR_CHECKSUM_TEXT];
    /* With `against`: */
    bool same;             /* no byte differs; the sizes may */
    uint64_t against_size; /* of the disk whose checksums these are */
};

/* Read what the disk holds at one instant of this call, while other threads may use it. Holes are
 * not read. -EBUSY: another operation changes its images. -EINVAL: `against` holds no checksums, or
 * damaged ones. */
DR_API int dr_disk_checksum(struct dr_disk *disk, const struct dr_checksum_options *options,
                            struct dr_job *job, struct dr_checksum_result *result,
                            struct dr_error *err);

/* Does the file hold saved checksums, or is it a disk that begins with the same letters? Only a
 * file whose header has its own right checksum counts. -EINVAL: then something else in it is wrong,
 * so it should be taken for neither. -errno: it cannot be read. */
DR_API int dr_checksum_is_saved(const char *path, bool *saved, struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
