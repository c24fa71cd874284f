/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "plant.h"

#include <string.h>

#include "base/bytes.h"
#include "toy.h"

static struct dr_format planted;

static int reserve_no_tail(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                           uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = dr_format_toy.reserve(image, off, len, want, host_len, r, err);
    if (!e && want == DR_WANT_DATA && r->off + r->len > off + len) {
        r->pad += r->off + r->len - (off + len);
        r->len = off + len - r->off;
    }
    return e;
}

static int reserve_early(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                         uint32_t host_len, struct dr_reservation *r, struct dr_error *err)
{
    int e = dr_format_toy.reserve(image, off, len, want, host_len, r, err);
    if (!e)
        dr_format_toy.publish(image, r);
    return e;
}

static void nothing(struct dr_image *image, struct dr_reservation *r)
{
    (void)image;
    (void)r;
}

static int open_long(struct dr_image *image, struct dr_error *err)
{
    int e = dr_format_toy.open(image, err);
    if (!e && strstr(dr_path_basename(image->path), "mid"))
        image->size = dr_max(image->size, 8 << 20);
    return e;
}

void plant(enum plant fault)
{
    planted = dr_format_toy;
    if (fault == PLANT_NO_TAIL)
        planted.reserve = reserve_no_tail;
    if (fault == PLANT_EARLY_PUBLISH) {
        planted.reserve = reserve_early;
        planted.publish = planted.cancel = nothing;
    }
    if (fault == PLANT_LONG_PARENT)
        planted.open = open_long;
    dr_format_register(&planted);
}
