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

int vma_targets_create(struct vma_targets *t, unsigned id, uint64_t size, const char *path,
                       const struct vma_form *form, struct dr_error *err)
{
    const struct dr_create_options create = {
        .format = form->format,
        .size = size,
        .has_size = true,
        .pairs = form->pairs,
        .n_pairs = form->n_pairs,
        .no_replace = true,
        .flags = form->flags,
    };
    const struct dr_open_options open = {.format = form->format,
                                         .flags = DR_OPEN_RDWR | form->flags};

    int r = dr_create(path, &create, err);
    if (r == 0)
        r = vma_targets_open(t, id, path, &open, true, err);
    if (r < 0)
        return r;
    /* Disks of archives may have any size; new images are made of whole sectors. Formats that
     * cannot say it exactly keep the zeros at the end. */
    struct dr_disk *disk = t->list[t->n - 1].disk;
    if (dr_size(disk) > size)
        dr_truncate(disk, size, NULL);
    return 0;
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
