/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* amend: what the descriptor says of the machine, and the kind of a flat disk. All changes are made
 * to a copy of the text, and that is stored at once (store.c): a crash leaves the old one or the
 * new. No byte of the disk changes, so its CID stays. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/vmdk.h"

const struct dr_option_help vmdk_amend_options[] = {
    {"adapter_type", "str", "Virtual adapter type: ide, lsilogic, buslogic or legacyESX", NULL},
    {"hwversion", "str", "VMDK hardware version", NULL},
    {"subformat", "str",
     "Another kind of flat disk, without a copy: monolithicFlat, twoGbMaxExtentFlat or vmfs", NULL},
    {"toolsversion", "str", "VMware guest tools version", NULL},
    {NULL, NULL, NULL, NULL},
};

/* ------------------------------------------------------------------ the machine */

static int set_text(struct dr_image *image, struct vmdk_desc *d, const struct dr_option *o,
                    const char *key, struct dr_error *err)
{
    if (!vmdk_value_is_writable(o->value))
        return dr_fail(err, EINVAL, "%s: '%s' cannot be the value of %s", image->path, o->value,
                       o->name);
    return vmdk_desc_set_ddb(d, key, o->value, err);
}

/* The geometry that programs compute for the adapter goes with it. */
static int set_adapter(struct dr_image *image, struct vmdk_desc *d, const char *value,
                       struct dr_error *err)
{
    const char *adapter = vmdk_adapter_name(value);
    if (!adapter)
        return dr_fail(err, EINVAL, "%s: Unknown adapter type: %s", image->path, value);
    struct vmdk_geometry g = vmdk_geometry_of(adapter, image->size / VMDK_SECTOR);
    const struct {
        const char *key;
        uint64_t value;
    } numbers[] = {
        {"ddb.geometry.cylinders", g.cylinders},
        {"ddb.geometry.heads", g.heads},
        {"ddb.geometry.sectors", g.sectors},
    };
    int r = vmdk_desc_set_ddb(d, "ddb.adapterType", adapter, err);
    for (size_t i = 0; r == 0 && i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        char text[24];
        snprintf(text, sizeof(text), "%llu", (unsigned long long)numbers[i].value);
        r = vmdk_desc_set_ddb(d, numbers[i].key, text, err);
    }
    return r;
}

/* ------------------------------------------------------------------ the kind */

/* Kinds whose data is laid out alike: bytes of the disk in files. */
static const struct {
    const char *name, *extents;
    bool one;      /* extent, and no more */
    uint64_t most; /* sectors of an extent; 0: any number */
} kinds[] = {
    {"monolithicFlat", "FLAT", true, 0},
    {"twoGbMaxExtentFlat", "FLAT", false, VMDK_SPLIT_SECTORS},
    {"vmfs", "VMFS", true, 0},
};

/* Why the disk cannot become this kind where it is; NULL: it can. */
static const char *why_not(const struct dr_image *image, size_t kind)
{
    const struct vmdk_state *s = vmdk_of(image);
    if (kinds[kind].one && s->desc.n_extents != 1)
        return "has several extents";
    for (size_t i = 0; i < s->desc.n_extents; i++) {
        const struct vmdk_extent_line *l = &s->desc.extents[i];
        if (l->type != VMDK_FLAT && l->type != VMDK_VMFS)
            return "is not flat";
        if (strcasecmp(l->type_name, "VMFSRAW") == 0)
            return "stands on a device";
        if (l->offset != 0)
            return "does not begin at the beginning of its file";
        if (kinds[kind].most && l->sectors > kinds[kind].most)
            return "has an extent of more than 2047 MiB";
    }
    return NULL;
}

static int set_kind(struct dr_image *image, struct vmdk_desc *d, const char *value,
                    struct dr_error *err)
{
    CLEANUP_FREE char *now = vmdk_desc_get(d, "createType");
    const char *why = "is of a kind with another layout";
    size_t kind = 0, n = sizeof(kinds) / sizeof(kinds[0]);
    if (now && strcasecmp(now, value) == 0)
        return 0;
    while (kind < n && strcasecmp(kinds[kind].name, value) != 0)
        kind++;
    if (kind < n)
        why = why_not(image, kind);
    if (why)
        return dr_fail(err, ENOTSUP,
                       "%s: %s, and cannot become %s where it is; `drover convert -O vmdk -o "
                       "subformat=%s` makes a copy of that kind",
                       image->path, why, value, value);
    int r = vmdk_desc_set(d, "createType", kinds[kind].name, true, NULL, err);
    for (size_t i = 0; r == 0 && i < d->n_extents; i++)
        r = vmdk_desc_set_type(d, i, kinds[kind].extents, err);
    return r;
}

/* ------------------------------------------------------------------ all together */

static int edit(struct dr_image *image, const struct dr_option *o, struct vmdk_desc *d,
                struct dr_error *err)
{
    if (strcmp(o->name, "adapter_type") == 0)
        return set_adapter(image, d, o->value, err);
    if (strcmp(o->name, "hwversion") == 0)
        return set_text(image, d, o, "ddb.virtualHWVersion", err);
    if (strcmp(o->name, "toolsversion") == 0)
        return set_text(image, d, o, "ddb.toolsVersion", err);
    if (strcmp(o->name, "subformat") == 0)
        return set_kind(image, d, o->value, err);
    return dr_fail(err, EINVAL, "%s: Invalid parameter '%s'", image->path, o->name);
}

/* The extents' types in memory follow the text. */
static void take_types(struct dr_image *image)
{
    struct vmdk_state *s = vmdk_of(image);
    for (size_t i = 0; i < s->n_extents; i++) {
        const struct vmdk_extent_line *l = &s->desc.extents[s->extents[i].line];
        if (s->extents[i].type != VMDK_FLAT && s->extents[i].type != VMDK_VMFS)
            continue;
        s->extents[i].type = l->type;
        memcpy(s->extents[i].type_name, l->type_name, sizeof(l->type_name));
    }
}

int vmdk_amend(struct dr_image *image, struct dr_amend *what, enum dr_amend_phase phase,
               struct dr_error *err)
{
    struct vmdk_desc d;
    what->size = image->size;
    if (phase == DR_AMEND_LAST)
        return 0;
    int r = vmdk_desc_copy(image, &d, err);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < what->n_options; i++)
        r = edit(image, &what->options[i], &d, err);
    if (r == 0)
        r = vmdk_store(image, &d, phase == DR_AMEND_CHECK ? VMDK_STORE_TRY : 0, err);
    vmdk_desc_free(&d);
    if (r == 0 && phase == DR_AMEND_FIRST)
        take_types(image);
    return r;
}
