/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VMware's hosted products lock a disk X.vmdk by a directory X.vmdk.lck with a file NAME.lck in it.
 * No other program takes part in that, so what we can do is look. A crash leaves the directory
 * behind. */
#ifndef DR_STORAGE_VMWARE_LOCK_H
#define DR_STORAGE_VMWARE_LOCK_H

#include "base/error.h"
#include "storage/storage.h"

#define DR_VMWARE_LOCK_SUFFIX ".lck"

/* *locked: there is such a lock beside the file at path. */
int dr_vmware_lock_look(struct dr_fs *fs, const char *path, bool *locked, struct dr_error *err);
/* The message for a writer: -EBUSY. */
int dr_vmware_lock_refuse(const char *path, struct dr_error *err);

#endif
