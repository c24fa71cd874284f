/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the programs that show disks to others share. They stand on the public API alone. */
#ifndef DR_EXPORTS_EXPORTS_H
#define DR_EXPORTS_EXPORTS_H

#include <string.h>

#include "drover/drover.h"

/* Open a new, empty disk over the one at path, which is only read. Everything that is written goes
 * to a file in $TMPDIR (else /var/tmp) that has no name any more when this returns, so its space is
 * free again as soon as the disk is closed or the process ends, however it ends. A flush makes
 * nothing durable. options: how to open path, as for dr_open(); snapshot is refused. */
int temporary_open(const char *path, const struct dr_open_options *options, struct dr_disk **disk,
                   struct dr_error *err);

/* The export's name of a disk that got none: the member of an archive, or the file's own name. A
 * part of disk. */
static inline const char *export_default_name(const char *disk)
{
    const char *member = dr_name_format(disk) ? strrchr(disk, '#') : NULL;
    const char *slash = strrchr(disk, '/');
    if (member && (!slash || member > slash) && member[1])
        return member + 1;
    return slash ? slash + 1 : disk;
}

#endif
