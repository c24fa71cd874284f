/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info: the keys of qemu-img's format-specific data, in its order. */
#include "formats/qcow2/bitmap.h"

#include "base/json.h"

static int put_bitmap(void *user, const struct dr_bitmap_info *info)
{
    json_t *flags = json_array(), *one = json_object();
    int bad = info->inconsistent ? json_array_append_new(flags, json_string("in-use")) : 0;
    if (info->enabled)
        bad |= json_array_append_new(flags, json_string("auto"));
    bad |= json_object_set_new(one, "flags", flags);
    bad |= json_object_set_new(one, "name", dr_json_text(info->name));
    bad |= json_object_set_new(one, "granularity", json_integer((json_int_t)info->granularity));
    bad |= json_array_append_new(user, one);
    return bad ? -ENOMEM : 0;
}

static int put_bitmaps(struct dr_image *image, json_t *data, struct dr_error *err)
{
    json_t *all = json_array();
    int r = qcow2_bitmap_list(image, put_bitmap, all, err);
    if (r == 0 && json_array_size(all) && json_object_set(data, "bitmaps", all))
        r = -ENOMEM;
    json_decref(all);
    return r == -ENOMEM ? dr_fail_errno(err, ENOMEM, "%s", image->path) : r;
}

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
    int r = h->version >= 3 ? put_bitmaps(image, data, err) : 0;
    if (r < 0)
        return r;
    bad |= json_object_set_new(data, "refcount-bits", json_integer(1 << h->refcount_order));
    if (h->crypt && (r = qcow2_crypt_info(image, data, err)) < 0)
        return r;
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
