/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef DR_OPS_FINGERPRINT_H
#define DR_OPS_FINGERPRINT_H

#include "core/fingerprint.h"
#include "ops/ops-internal.h"

/* Record beside the image that chain's images[first] and what is below it is its parent. */
int ops_fingerprint_take(const struct dr_image *image, struct dr_chain *chain, size_t first,
                         bool full, struct dr_job *job, struct dr_error *err);
/* The same without the full hash. */
int ops_fingerprint_renew(const struct dr_image *image, struct dr_chain *chain, size_t first,
                          struct dr_error *err);
/* Before the image records that name for it: a record that is there goes on to count, and one of
 * the new parent counts from then on, until ops_fingerprint_renew(). A kill in between loses
 * neither. A failure is passed over: at worst it would. */
void ops_fingerprint_announce(const struct dr_image *image, const char *name,
                              struct dr_chain *chain, size_t first);
/* -ESTALE: it is not what was recorded. full: compare all, if that was recorded. */
int ops_fingerprint_verify(const struct dr_image *image, struct dr_chain *chain, size_t first,
                           const struct dr_fingerprint *print, bool full, struct dr_error *err);
/* The same of an image that nobody has to have open; 0 also where nothing is recorded. */
int ops_fingerprint_look(struct dr_fs *fs, const char *path, const char *format,
                         const struct dr_open_options *open, bool full, struct dr_error *err);

#endif
