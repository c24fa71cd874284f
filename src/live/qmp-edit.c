/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands that change what lies below the active image of a disk, and have no name in QEMU. */
#include <stdlib.h>
#include <string.h>

#include "live/live.h"
#include "ops/ops-internal.h"

/* ------------------------------------------------------------------ which image */

static struct live_disk *find_device(struct dr_live *live, const char *name, char **path)
{
    DR_LOCK_SCOPE(&live->lock);
    struct live_disk *on = live_find_device(live, name);
    const char *its = on ? NULL : live_node_path(live, name);
    *path = its ? strdup(its) : NULL;
    return on;
}

static bool has_image(const struct live_disk *on, const char *path)
{
    struct dr_chain *chain = dr_disk_chain(on->disk);
    bool has = false;
    for (size_t i = 0; i < chain->n && !has; i++)
        has = strcmp(chain->images[i]->path, path) == 0;
    dr_chain_unref(chain, NULL);
    return has;
}

struct live_disk *qmp_device_image(struct dr_live *live, json_t *args, char **image,
                                   struct qmp_error *err)
{
    const char *device = qmp_string(args, "device"), *name = qmp_string(args, "x-image");
    struct live_disk *on = find_device(live, device, image);
    if (on && name)
        return qmp_chain_path(live, on, NULL, name, image, err) < 0 ? NULL : on;
    for (size_t n = 0; !on && *image && (on = live_nth_disk(live, n)); n++)
        on = has_image(on, *image) ? on : NULL;
    if (on)
        return on;
    free(*image); /* perhaps it is a node that is no disk yet: its active image is meant */
    *image = NULL;
    return qmp_root_device(live, args, err);
}

/* ------------------------------------------------------------------ rebase */

/* Give an image another parent, and copy into it what that does not show. QEMU has a rebase that
 * changes the name only (change-backing-file). */
static json_t *rebase(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    const char *format = qmp_string(args, "backing-format");
    struct live_order order = {.kind = LIVE_REBASE};
    struct live_disk *on = qmp_device_image(live, args, &order.top, err);
    if (!on) {
        live_order_clear(&order);
        return NULL;
    }
    order.base = strdup(qmp_string(args, "backing-file"));
    order.format = format ? strdup(format) : NULL;
    if (!order.base || (format && !order.format)) {
        live_order_clear(&order);
        return qmp_fail(err, NULL, "out of memory");
    }
    return qmp_begin_job(live, on, args, &order, err);
}

/* ------------------------------------------------------------------ the table */

const struct qmp_command qmp_edit_commands[] = {
    {"x-drover-rebase",
     rebase,
     {{"job-id", 's', false},
      {"device", 's', true},
      {"x-image", 's', false},
      {"backing-file", 's', true},
      {"backing-format", 's', false},
      {"speed", 'n', false},
      {"auto-finalize", 'b', false},
      {"auto-dismiss", 'b', false}}},
    {0},
};
