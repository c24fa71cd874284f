/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_ARCHIVE_LEFTOVERS_H
#define DR_ARCHIVE_LEFTOVERS_H

#include "storage/storage.h"

/* Remove the temporary files that earlier, interrupted attempts to make the file at `path` left,
 * so that their space is free for the next attempt. */
void vma_drop_leftovers(struct dr_fs *fs, const char *path);

#endif
