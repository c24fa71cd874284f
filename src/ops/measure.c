/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* measure: what a new image would take. The driver knows what its metadata costs, the walk over the
 * source knows where there is data. */
#include "base/cleanup.h"
#include "ops/ops-internal.h"

/* source: the image on top of what is to be converted, or NULL. */
static int ask_driver(const struct dr_format *fmt, const struct dr_measure_options *o,
                      uint64_t size, struct dr_image *source, struct dr_cost *cost,
                      struct dr_error *err)
{
    if (!fmt->measure)
        return dr_fail(err, ENOTSUP, "Block driver '%s' does not support size measurement",
                       fmt->name);
    CLEANUP_FREE struct dr_option *options = NULL;
    int r = dr_ops_settings(o->pairs, o->n_pairs, &options, err);
    if (r < 0)
        return r;
    const struct dr_create_params params = {
        .size = size, .options = options, .n_options = o->n_pairs, .bitmaps_of = source};
    return fmt->measure(fmt->name, &params, cost, err);
}

/* Count the bytes of the target's units in which the source has data. */
static int count_units(struct dr_chain *chain, uint64_t unit, uint64_t *bytes, struct dr_error *err)
{
    struct dr_walk walk;
    uint64_t counted = 0; /* up to here */
    dr_walk_init(&walk, chain, 0, chain->n, chain->images[0]->size);
    *bytes = 0;
    for (uint64_t off = 0; off < walk.size; off = walk.run.end) {
        int r = dr_walk_to(&walk, off, err);
        if (r < 0)
            return r;
        if (walk.run.kind != DR_RUN_DATA)
            continue;
        uint64_t from = dr_max(counted, dr_round_down(off, unit));
        counted = dr_max(counted, dr_round_up(walk.run.end, unit));
        *bytes += counted - from;
    }
    return 0;
}

static int measure(struct dr_fs *fs, const char *source, uint64_t size, const struct dr_format *fmt,
                   const struct dr_measure_options *o, struct dr_measure_result *result,
                   struct dr_error *err)
{
    CLEANUP_DISK struct dr_disk *disk = NULL;
    struct dr_cost cost = {0};
    uint64_t bytes = 0;
    int r = source ? dr_open_fs(fs, source, o->source, &disk, err) : 0;
    if (r < 0)
        return r;
    size = disk ? dr_size(disk) : size;
    r = ask_driver(fmt, o, size, disk ? disk->chain->images[0] : NULL, &cost, err);
    if (r == 0 && disk && cost.unit && !o->backing)
        r = count_units(disk->chain, cost.unit, &bytes, err);
    uint64_t all = cost.unit ? dr_round_up(size, cost.unit) : 0;
    *result = (struct dr_measure_result){.required = cost.fixed + (o->backing ? all : bytes),
                                         .fully_allocated = cost.fixed + all,
                                         .has_bitmaps = cost.has_bitmaps,
                                         .bitmaps = cost.bitmaps};
    return r;
}

int dr_measure_fs(struct dr_fs *fs, const char *source, uint64_t size,
                  const struct dr_measure_options *options, struct dr_measure_result *result,
                  struct dr_error *err)
{
    static const struct dr_measure_options defaults;
    const struct dr_measure_options *o = options ? options : &defaults;
    const char *name = o->out_format ? o->out_format : "raw";
    const struct dr_format *fmt = dr_format_find(name);
    if (!fmt)
        return dr_fail(err, EINVAL, "Unknown file format '%s'", name);
    if (size > INT64_MAX - 511)
        return dr_fail(err, EFBIG, "no disk has %llu bytes", (unsigned long long)size);
    return measure(fs, source, size, fmt, o, result, err);
}

int dr_measure(const char *source, uint64_t size, const struct dr_measure_options *options,
               struct dr_measure_result *result, struct dr_error *err)
{
    DR_REQUIRE(result, err);
    return dr_measure_fs(dr_fs_posix(), source, size, options, result, err);
}
