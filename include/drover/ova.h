/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: OVA archives, a virtual machine in one file: a descriptor, its disks as streamOptimized
 * VMDKs, and a manifest of their digests. docs/formats/ova.md has the format.
 *
 * The conventions of drover.h hold. A disk inside an archive is an ordinary image, and is read as
 * one: dr_open("ova:machine.ova#disk1.vmdk", ...); dr_info() and dr_check() of the whole archive
 * tell of all of it.
 */
#ifndef DROVER_OVA_H
#define DROVER_OVA_H

#include "drover/drover.h"
#include "drover/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DR_OVA_DISKS_MAX 60u

struct dr_ova_create_options {
    const char *name; /* of the machine: letters, digits, "-", "_", "."; NULL = "machine" */
    struct dr_disk *const *disks; /* open ones; they stay the caller's, and are only read */
    size_t n_disks;               /* 1 to DR_OVA_DISKS_MAX */
    uint64_t memory;              /* bytes, whole MiB; 0 = 1 GiB */
    unsigned cpus;                /* 0 = 1 */
    const char *controller;       /* "lsilogic" (also NULL), or "ide": 4 disks at most */
    const struct dr_pair *pairs;  /* settings of the VMDKs, such as compression_level */
    size_t n_pairs;
    bool has_mtime;
    int64_t mtime; /* of the members, seconds since 1970; without has_mtime: now */
    bool replace;  /* an archive that has the name gives way */
    bool no_sync;  /* do not wait until all is durable */
    bool use_fd;   /* write to fd, a pipe; the path is for messages only. Disks are compressed twice
                      then: sizes stand in front of them */
    int fd;        /* is not closed */
};

struct dr_ova_create_result {
    uint64_t bytes; /* of the archive */
};

/* Write the machine. Under its name the archive appears when it is complete and durable; after a
 * failure, or killed anywhere, nothing has changed. -EEXIST: something has the name. -ESTALE: a
 * disk changed while it went into a pipe. job and result may be NULL. */
DR_API int dr_ova_create(const char *path, const struct dr_ova_create_options *options,
                         struct dr_job *job, struct dr_ova_create_result *result,
                         struct dr_error *err);

#ifdef __cplusplus
}
#endif

#endif
