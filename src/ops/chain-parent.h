/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Looking for the parent of an image that is not where the image says, or is not the right one. */
#ifndef DR_OPS_CHAIN_PARENT_H
#define DR_OPS_CHAIN_PARENT_H

#include "ops/ops-internal.h"

/* Files that are looked at in directories which nobody has named: what lies near an image may be
 * anything. */
#define CHAIN_NEARBY_MAX 4096

/* Add to the scan: the image's directory, those named, and those near it (below it, above it, and
 * beside it). */
int chain_scan_around(struct dr_scan *scan, struct dr_fs *fs, const char *path,
                      const struct dr_chain_options *o, struct dr_error *err);

/* The entry that is the parent of scan->all[child] as far as can be told: by its content id where
 * the format has such, else by name, format and size. Returns how many there are that it may as
 * well be; *found is the best of them, but if two are equally good the result is above 1. */
size_t chain_find_parent(const struct dr_scan *scan, struct dr_fs *fs, size_t child, size_t *found);

#endif
