/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info: the keys of qemu-img's format-specific data, in its order. */
#include "formats/qcow2/qcow2.h"

#include "base/json.h"

int qcow2_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err)
{
    const struct qcow2 *q = qcow2_of(image);
    const struct qcow2_header *h = &q->h;
    int bad = 0;
    *cluster_size = q->cluster;
    bad |= json_object_set_new(data, "compat", json_string(h->version < 3 ? "0.10" : "1.1"));
    if (qcow2_has_data_file(q) && q->data_name)
        bad |= json_object_set_new(data, "data-file", dr_json_text(q->data_name));
    if (h->version >= 3)
        bad |= json_object_set_new(data, "compression-type",
                                   json_string(h->compression == QCOW2_ZSTD ? "zstd" : "zlib"));
    else
        bad |= json_object_set_new(data, "compression-type", json_string("zlib"));
    if (h->version >= 3)
        bad |=
            json_object_set_new(data, "lazy-refcounts", json_boolean(h->compatible & QCOW2_LAZY));
    bad |= json_object_set_new(data, "refcount-bits", json_integer(1 << h->refcount_order));
    if (h->version >= 3) {
        bad |= json_object_set_new(data, "corrupt", json_boolean(h->incompatible & QCOW2_CORRUPT));
        bad |=
            json_object_set_new(data, "extended-l2", json_boolean(h->incompatible & QCOW2_EXTL2));
    }
    if (qcow2_has_data_file(q))
        bad |=
            json_object_set_new(data, "data-file-raw", json_boolean(h->autoclear & QCOW2_DATA_RAW));
    return bad ? dr_fail_errno(err, ENOMEM, "%s", image->path) : 0;
}
