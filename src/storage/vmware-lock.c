/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "storage/vmware-lock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"

static int is_lock(void *user, const char *name)
{
    size_t n = strlen(name), suffix = strlen(DR_VMWARE_LOCK_SUFFIX);
    (void)user;
    return n > suffix && strcmp(name + n - suffix, DR_VMWARE_LOCK_SUFFIX) == 0;
}

int dr_vmware_lock_look(struct dr_fs *fs, const char *path, bool *locked, struct dr_error *err)
{
    CLEANUP_FREE char *dir = NULL;
    if (asprintf(&dir, "%s" DR_VMWARE_LOCK_SUFFIX, path) < 0) {
        dir = NULL;
        return dr_fail_errno(err, ENOMEM, "%s", path);
    }
    *locked = fs->ops->list(fs, dir, is_lock, NULL, NULL) > 0;
    return 0;
}

int dr_vmware_lock_refuse(const char *path, struct dr_error *err)
{
    return dr_fail(err, EBUSY,
                   "%s: VMware has a lock on it (%s" DR_VMWARE_LOCK_SUFFIX
                   "), so a virtual machine may be writing to it; if none is, remove that "
                   "directory, or use --locking off",
                   path, path);
}
