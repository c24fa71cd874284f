/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that a packer made smaller as a whole (disk.raw.gz, disk.qcow2.xz), as files of the plain
 * bytes, which are read only.
 *
 * Where the packed file has an index (the blocks of xz, a seek table of zstd, bgzf), only what is
 * asked for is decoded. Else the file is decoded once when it is opened, which tells its size and
 * whether it is whole. Readers that go from front to back then get their bytes out of a second pass
 * and a window of 32 MiB in memory. For those that jump about, the bytes are kept in a temporary
 * file without a name, in $TMPDIR (else /var/tmp); runs of zeros take no space there. */
#ifndef DR_STORAGE_UNPACKED_H
#define DR_STORAGE_UNPACKED_H

#include "storage/source.h"

/* The first plain bytes of f, up to len, and which packer made it; NULL: none, and these are the
 * bytes of f itself. Damage at the very beginning is a failure (-EBADMSG). */
int dr_unpack_head(struct dr_file *f, uint8_t *head, size_t len, size_t *got, const char **packer,
                   struct dr_error *err);

/* The plain bytes of f, which is packed, as a file: a new reference. It has the id of f, and fs
 * NULL. at_random: its reader will jump about. damage: NULL, or what came in front of damage is the
 * file, and why.errnum tells whether there was some; pieces that are decoded each by itself
 * fail when they are read and damaged; without at_random what came in front of that is read, and
 * told by dr_source_doubtful(). -EBADMSG: damaged or cut off; -ENOSPC: no room for the temporary
 * file; -ECANCELED: dr_set_unpacking() said so. */
int dr_unpack(struct dr_file *f, bool at_random, struct dr_unpack_damage *damage,
              struct dr_file **plain, struct dr_error *err);

#endif
