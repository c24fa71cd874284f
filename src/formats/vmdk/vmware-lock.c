/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VMware's hosted products lock a disk X.vmdk by a directory X.vmdk.lck with a file NAME.lck in it.
 * No other program takes part in that, so what we can do is look. A crash leaves the directory
 * behind. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/notice.h"
#include "formats/vmdk/vmdk.h"

#define SUFFIX ".lck"

static int is_lock(void *user, const char *name)
{
    size_t n = strlen(name);
    (void)user;
    return n > strlen(SUFFIX) && strcmp(name + n - strlen(SUFFIX), SUFFIX) == 0;
}

int vmdk_refuse_locked(const struct dr_image *image, struct dr_error *err)
{
    if (!vmdk_of(image)->vmware_lock || (image->flags & DR_OPEN_NO_LOCK))
        return 0;
    return dr_fail(err, EBUSY,
                   "%s: VMware has a lock on it (%s" SUFFIX "), so a virtual machine may be "
                   "writing to it; if none is, remove that directory, or use --locking off",
                   image->path, image->path);
}

int vmdk_look_for_lock(struct dr_image *image, struct dr_error *err)
{
    CLEANUP_FREE char *dir = NULL;
    if (asprintf(&dir, "%s" SUFFIX, image->path) < 0) {
        dir = NULL;
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    }
    vmdk_of(image)->vmware_lock = image->fs->ops->list(image->fs, dir, is_lock, NULL, NULL) > 0;
    if (!vmdk_of(image)->vmware_lock || (image->flags & DR_OPEN_RECORDED))
        return 0;
    if (image->flags & DR_OPEN_RDWR)
        return vmdk_refuse_locked(image, err);
    if (!(image->flags & (DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)))
        dr_notice("%s: VMware has a lock on it (%s): a virtual machine may be writing to it, and "
                  "what is read may fit together badly (-U reads it without this warning)",
                  image->path, dir);
    return 0;
}
