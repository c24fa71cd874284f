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

struct live_disk *qmp_device_image(struct dr_live *live, json_t *args, char **image,
                                   struct qmp_error *err)
{
    const char *device = qmp_string(args, "device"), *name = qmp_string(args, "x-image");
    struct live_disk *on = find_device(live, device, image);
    if (on && name)
        return qmp_chain_path(live, on, NULL, name, image, err) < 0 ? NULL : on;
    for (size_t n = 0; !on && *image && (on = live_nth_disk(live, n)); n++)
        on = live_has_image(on, *image) ? on : NULL;
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
    return qmp_begin_job(live, on, args, &order, NULL, err);
}

/* ------------------------------------------------------------------ delete */

static char *path_at(const struct dr_chain *chain, size_t i)
{
    return strdup(chain->images[i]->path);
}

/* Down: the image goes into its parent. Else its child takes what it needs of it, and all other
 * images read as before. */
static int delete_order(const struct dr_chain *chain, const char *image, bool down,
                        struct live_order *order, struct qmp_error *err)
{
    size_t at = dr_ops_member(chain, image);
    const char *top = chain->images[0]->path;
    bool lowest = at + 1 >= chain->n;
    if (at == chain->n)
        return dr_fail(&err->text, EINVAL, "Did not find '%s' in the backing chain of '%s'", image,
                       top);
    if (at == 0)
        return dr_fail(&err->text, EINVAL,
                       "'%s' is the active image: only images below it can be deleted", image);
    if (down && lowest)
        return dr_fail(&err->text, EINVAL, "'%s' has no parent that it could go down into", image);
    order->kind = down ? LIVE_COMMIT : LIVE_STREAM;
    order->top = down ? path_at(chain, at) : at > 1 ? path_at(chain, at - 1) : NULL;
    order->base = lowest ? NULL : path_at(chain, at + 1);
    bool all = (order->base || lowest) && (order->top || (!down && at == 1));
    return all ? 0 : dr_fail(&err->text, ENOMEM, "out of memory");
}

static json_t *delete_image(struct dr_live *live, json_t *args, struct qmp_error *err)
{
    struct live_order order = {.remove = qmp_bool(args, "remove", false),
                               .force = qmp_bool(args, "force", false)};
    struct live_disk *on = qmp_device(live, args, err);
    if (!on)
        return NULL;
    struct dr_chain *chain = dr_disk_chain(on->disk);
    int r =
        delete_order(chain, qmp_string(args, "image"), qmp_bool(args, "down", false), &order, err);
    dr_chain_unref(chain, NULL);
    if (r == 0)
        return qmp_begin_job(live, on, args, &order, NULL, err);
    live_order_clear(&order);
    return NULL;
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
      {"auto-dismiss", 'b', false},
      {"x-hurry", 'b', false}}},
    {"x-drover-delete",
     delete_image,
     {{"job-id", 's', false},
      {"device", 's', true},
      {"image", 's', true},
      {"down", 'b', false},
      {"remove", 'b', false},
      {"force", 'b', false},
      {"speed", 'n', false},
      {"auto-finalize", 'b', false},
      {"auto-dismiss", 'b', false},
      {"x-hurry", 'b', false}}},
    {0},
};
