/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a lock of VMware's beside a descriptor means for those who open the disk. */
#include "base/notice.h"
#include "formats/vmdk/vmdk.h"
#include "storage/vmware-lock.h"

int vmdk_refuse_locked(const struct dr_image *image, struct dr_error *err)
{
    if (!vmdk_of(image)->vmware_lock || (image->flags & DR_OPEN_NO_LOCK))
        return 0;
    return dr_vmware_lock_refuse(image->path, err);
}

int vmdk_look_for_lock(struct dr_image *image, struct dr_error *err)
{
    bool *locked = &vmdk_of(image)->vmware_lock;
    int r = dr_vmware_lock_look(image->fs, image->path, locked, err);
    if (r < 0 || !*locked || (image->flags & DR_OPEN_RECORDED))
        return r;
    if (image->flags & DR_OPEN_RDWR)
        return vmdk_refuse_locked(image, err);
    if (!(image->flags & (DR_OPEN_FORCE_SHARE | DR_OPEN_NO_LOCK)))
        dr_notice("%s: VMware has a lock on it (%s" DR_VMWARE_LOCK_SUFFIX
                  "): a virtual machine may be writing to it, and what is read may fit together "
                  "badly (-U reads it without this warning)",
                  image->path, image->path);
    return 0;
}
