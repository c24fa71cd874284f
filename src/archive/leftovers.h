/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_ARCHIVE_LEFTOVERS_H
#define DR_ARCHIVE_LEFTOVERS_H

#include "storage/storage.h"

/* What interrupted attempts at this very file left gives its space back, before the next attempt.
 */
void vma_drop_leftovers(struct dr_fs *fs, const char *path);

#endif
