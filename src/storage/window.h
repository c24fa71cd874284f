/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Ranges of files, one behind another, as a file that is only read. */
#ifndef DR_STORAGE_WINDOW_H
#define DR_STORAGE_WINDOW_H

#include "storage/storage.h"

struct dr_window_part {
    struct dr_file *file; /* a user of it is added for as long as the window lives */
    uint64_t off, len;
};

/* A member of a tar is one range; a disk that was split is several. Parts may reach behind the ends
 * of their files, where the window ends, too: the parts behind that one are not seen. name: for
 * messages. Reads from many threads, as the files do. */
int dr_file_window(const char *name, const struct dr_window_part *parts, size_t n,
                   struct dr_file **file, struct dr_error *err);

#endif
