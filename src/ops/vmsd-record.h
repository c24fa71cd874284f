/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The list of a machine's snapshots, X.vmsd, while a snapshot is made. */
#ifndef DR_OPS_VMSD_RECORD_H
#define DR_OPS_VMSD_RECORD_H

#include "core/publish.h"
#include "ops/ops-internal.h"
#include "ops/vmsd.h"

struct vmsd_record {
    struct dr_fs *fs;
    char *path; /* of the .vmsd; NULL: the disk is no machine's, as far as can be seen */
    struct vmsd vmsd;
    struct dr_file *old; /* locked */
    struct dr_temp temp;
};

/* Write, but not yet in the old one's place, the list in which a snapshot freezes the first image
 * of the chain. On failure, too, vmsd_record_end() must follow. */
int vmsd_record_begin(struct vmsd_record *record, struct dr_fs *fs, const struct dr_chain *chain,
                      struct dr_error *err);
int vmsd_record_publish(struct vmsd_record *record, struct dr_error *err);
void vmsd_record_end(struct vmsd_record *record);

#endif
