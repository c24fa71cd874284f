/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Images of formats that have no room for bitmaps, with a file of them beside, and a text that says
 * what is in them. */
#ifndef DR_TEST_BITMAPS_BESIDE_H
#define DR_TEST_BITMAPS_BESIDE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "core/bitmap-file.h"
#include "core/internal.h"
#include "ops/ops-internal.h"
#include "outcome.h"

#define KIB    1024u
#define MIB    (1024u * KIB)
#define SIZE   (1 * MIB + 4 * KIB)
#define PATH   "/dir/disk"
#define BESIDE PATH DR_BITMAP_FILE_SUFFIX

struct kind {
    const char *format;
    struct dr_pair pairs[1];
    size_t n_pairs;
};
static const struct kind kinds[] = {
    {.format = "raw"},
    {.format = "vmdk"},
    {.format = "vmdk", {{"subformat", "twoGbMaxExtentFlat"}}, 1},
    {.format = "add-cow"},
    {.format = "qcow2", {{"compat", "0.10"}}, 1},
};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))

static inline void create(struct dr_fs *fs, const struct kind *k)
{
    struct dr_create_options o = {.format = k->format,
                                  .size = SIZE,
                                  .has_size = true,
                                  .pairs = k->pairs,
                                  .n_pairs = k->n_pairs};
    ok(dr_create_fs(fs, PATH, &o, &err));
}

#include "test-bitmaps.h"

/* ------------------------------------------------------------------ what they say */

/* "name granularity on|off ranges in sectors;" for each. */
static inline struct text describe(struct dr_disk *disk)
{
    struct text t = {.n = 0};
    struct dr_bitmap *list = NULL;
    size_t n = 0;
    ok(dr_disk_bitmaps(disk, &list, &n, &err));
    for (size_t i = 0; i < n; i++) {
        put(&t, "%s %llu %s", list[i].name, (unsigned long long)list[i].granularity,
            list[i].enabled ? "on" : "off");
        if (list[i].inconsistent)
            put(&t, " inconsistent");
        else
            ok(dr_disk_bitmap_read(disk, list[i].name, put_range, &t, &err));
        put(&t, ";");
    }
    dr_bitmaps_free(list, n);
    return t;
}

#endif
