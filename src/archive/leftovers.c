/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <time.h>

#include "archive/leftovers.h"
#include "base/cleanup.h"
#include "ops/ops-internal.h"

#define OLD_NS (3600ull * 1000 * 1000 * 1000)

/* A clock of another machine that shares the file system may be wrong, but hardly by that much. */
static bool is_old(struct dr_file *file)
{
    struct timespec t;
    uint64_t changed = dr_file_mtime(file);
    clock_gettime(CLOCK_REALTIME, &t);
    uint64_t now = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
    return changed > 0 && now > OLD_NS && changed < now - OLD_NS;
}

/* An attempt holds the lock of its file, so a file that can be locked is left over. An attempt
 * that has just begun may have created its file and not locked it yet: an empty file counts as
 * left over only when it is old. */
static bool is_dead(struct dr_fs *fs, const char *path)
{
    CLEANUP_FILE struct dr_file *file = NULL;
    return dr_file_open(fs, path, DR_FILE_RDWR, &file, NULL) == 0 &&
           (dr_file_size(file) > 0 || is_old(file));
}

void vma_drop_leftovers(struct dr_fs *fs, const char *path)
{
    dr_ops_remove_asides(fs, path, is_dead);
}
