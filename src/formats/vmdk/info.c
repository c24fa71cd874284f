/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* info: the keys of qemu-img's format-specific data, in its order. */
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "formats/vmdk/vmdk.h"

static json_t *extent_info(const struct dr_image *image, const struct vmdk_extent *e)
{
    const struct vmdk_state *s = vmdk_of(image);
    bool own = s->embedded && e->file == 0;
    json_t *o = json_object();
    if (vmdk_is_stream(e))
        dr_json_put(&o, "compressed", json_true());
    dr_json_put(&o, "virtual-size", json_integer((json_int_t)e->len));
    dr_json_put(&o, "filename",
                dr_json_text(e->file == VMDK_NO_FILE ? "" : image->files[e->file]->path));
    if (vmdk_has_tables(e))
        dr_json_put(&o, "cluster-size", json_integer((json_int_t)e->grain));
    dr_json_put(&o, "format", dr_json_text(own ? "" : e->type_name));
    return o;
}

int vmdk_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    CLEANUP_FREE char *type = vmdk_desc_get(&s->desc, "createType");
    if (!type && vmdk_desc_find(&s->desc, "createType"))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    json_t *extents = json_array();
    *cluster_size = s->n_extents > 0 ? s->extents[0].grain : 0;
    for (size_t i = 0; i < s->n_extents; i++)
        dr_json_append(&extents, extent_info(image, &s->extents[i]));
    bool bad = json_object_set_new(data, "cid", json_integer(s->cid)) < 0 ||
               json_object_set_new(data, "parent-cid", json_integer(s->parent_cid)) < 0 ||
               json_object_set_new(data, "create-type", dr_json_text(type ? type : "")) < 0 ||
               json_object_set(data, "extents", extents) < 0;
    json_decref(extents);
    return bad ? dr_fail_errno(err, ENOMEM, "%s", image->path) : 0;
}
