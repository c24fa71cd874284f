/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The directory of a tar: which members there are, and where in the file their bytes stand. GNU,
 * ustar and pax headers, as libarchive reads them. */
#ifndef DR_ARCHIVE_OVA_TAR_H
#define DR_ARCHIVE_OVA_TAR_H

#include "storage/storage.h"

#define OVA_MEMBERS_MAX 4096u
#define OVA_NAME_MAX    4096u /* bytes; a member with a longer name has none */

struct ova_member {
    char *name; /* without "./" in front; any bytes: never the name of a file outside */
    uint64_t off, size;
    const char *odd; /* why its bytes are no range of the file, or NULL */
};

struct ova_tar {
    struct ova_member *members; /* in the order of the file */
    size_t n;
    char *problem; /* why the directory ends before its end, or NULL */
};

/* Reads headers only. What stands behind a damaged header, or a cut, is not known: t->problem.
 * Fails where not even the first header can be read. End with ova_tar_free(), also after a failure.
 */
int ova_tar_read(struct dr_file *f, struct ova_tar *t, struct dr_error *err);
void ova_tar_free(struct ova_tar *t);

/* NULL: there is none. -ENOTUNIQ in *r: two have the name. */
const struct ova_member *ova_tar_find(const struct ova_tar *t, const char *name, int *r);

/* Does the file begin like a tar: is the sum of its first header right? len bytes of it are in buf.
 */
bool ova_tar_begins(const uint8_t *buf, size_t len);
/* The same, and its first member is an OVF descriptor. */
bool ova_tar_begins_with_ovf(const uint8_t *buf, size_t len);

/* name without any "./" in front. */
const char *ova_plain_name(const char *name);

#endif
