/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing the first cluster. A switch is a write inside its first 512 bytes (invariant 10). */
#include "formats/qcow2/qcow2.h"

#include "base/cleanup.h"

int qcow2_read_head(struct dr_image *image, uint8_t **head, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    *head = malloc(q->cluster);
    if (!*head)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    int r = dr_file_pread_short(image->files[0], *head, 0, q->cluster, NULL, err);
    if (r < 0) {
        free(*head);
        *head = NULL;
    }
    return r;
}

int qcow2_switch(struct dr_image *image, unsigned at, const void *bytes, size_t len,
                 struct dr_error *err)
{
    int r = dr_file_pwrite(image->files[0], bytes, at, len, err);
    return r < 0 ? r : dr_file_flush(image->files[0], err);
}

int qcow2_switch_tables(struct dr_image *image, unsigned at, const void *bytes, size_t len,
                        struct dr_error *err)
{
    struct qcow2 *q = qcow2_of(image);
    int r = qcow2_switch(image, at, bytes, len, err);
    if (r == 0)
        return 0;
    DR_LOCK_SCOPE(&image->lock);
    if (!q->damage)
        q->damage = strdup("whether its header was written is not known");
    q->damage_noted = true; /* the image itself is as good as before */
    return r;
}

static uint64_t *feature_field(struct qcow2 *q, unsigned field)
{
    if (field == QCOW2_AT_INCOMPATIBLE)
        return &q->h.incompatible;
    return field == QCOW2_AT_COMPATIBLE ? &q->h.compatible : &q->h.autoclear;
}

int qcow2_switch_bits(struct dr_image *image, unsigned field, uint64_t set, uint64_t clear,
                      struct dr_error *err)
{
    uint64_t *present = feature_field(qcow2_of(image), field), value = (*present & ~clear) | set;
    uint8_t raw[8];
    if (value == *present)
        return 0;
    put_be64(raw, value);
    int r = qcow2_switch(image, field, raw, sizeof(raw), err);
    if (r == 0)
        *present = value;
    return r;
}
