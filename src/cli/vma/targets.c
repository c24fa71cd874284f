/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "cli/vma/vma.h"

void vma_targets_add(struct vma_targets *t, unsigned id, struct dr_disk *disk, bool is_zero)
{
    t->list[t->n++] = (struct dr_vma_target){.id = id, .disk = disk, .is_zero = is_zero};
}

int vma_targets_open(struct vma_targets *t, unsigned id, const char *path,
                     const struct dr_open_options *open, bool is_zero, struct dr_error *err)
{
    struct dr_disk *disk;
    int r = dr_open(path, open, &disk, err);

    if (r == 0)
        vma_targets_add(t, id, disk, is_zero);
    return r;
}

int vma_targets_close(struct vma_targets *t)
{
    int result = 0;

    for (size_t i = 0; i < t->n; i++) {
        struct dr_error err = DR_ERROR_INIT;
        int r = dr_close(DR_STEAL(t->list[i].disk), &err);
        if (r < 0 && result == 0) {
            cli_fail(t->cli, &err);
            result = r;
        }
    }
    t->n = 0;
    return result;
}

void vma_targets_cleanup(struct vma_targets *t)
{
    for (size_t i = 0; i < t->n; i++)
        dr_close(t->list[i].disk, NULL);
    t->n = 0;
}
