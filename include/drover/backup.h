/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: backups. What a disk holds at one instant is copied into a new image, of any format,
 * while other threads go on using the disk.
 *
 * The conventions of drover.h and ops.h hold. */
#ifndef DROVER_BACKUP_H
#define DROVER_BACKUP_H

#include "drover/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The digest of what a disk holds, in hexadecimal: one number for all its bytes, however they are
 * stored. docs/formats/backup.md says how it is computed. */
#define DR_DIGEST_TEXT 33

struct dr_backup_options {
    struct dr_open_options open; /* of the target: flags and allow_paths */
    const char *format;          /* of the target; NULL = qcow2 */
    const struct dr_pair *pairs; /* settings of the target */
    size_t n_pairs;
};

struct dr_backup_result {
    uint64_t size;               /* of the disk at that instant */
    uint64_t copied;             /* bytes that were read from the disk */
    char digest[DR_DIGEST_TEXT]; /* of the disk at that instant */
};

struct dr_backup_disk {
    struct dr_disk *disk;
    const char *target; /* nothing may be there */
    struct dr_backup_options options;
    struct dr_backup_result result; /* by dr_disks_backup */
};

/* Copy several disks as they are at one instant of this call, at which their requests wait, for as
 * long as it takes to note the instant and no longer: nothing is written or flushed then. From then
 * on, before a range changes that was not copied yet, it is copied first; the job copies the rest.
 * A target that fails does not fail the guest: the backup fails. The targets get their names when
 * all of them are complete and durable; after a failure there are none. Holes are not read.
 *
 * TARGET.sums, beside each target, has the checksums that the digest is computed from. It may be
 * removed.
 *
 * The disks are different ones, open for reading or writing. -EBUSY: another operation changes the
 * images of one. -EEXIST: something is at a target's place. */
DR_API int dr_disks_backup(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                           struct dr_error *err);
/* The same of one disk. options and result may be NULL. */
DR_API int dr_disk_backup(struct dr_disk *disk, const char *target,
                          const struct dr_backup_options *options, struct dr_job *job,
                          struct dr_backup_result *result, struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
