/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A bounded file for what guests are about to change, while the target of a backup is slower than
 * they are. It holds grains of 64 KiB, in any order; it has no name, and so goes with the process,
 * however that ends. Where a file system has no files without a name it loses its name as soon as
 * it is made; one whose maker was killed just then goes when another one is made beside it. Several
 * disks share one, and any thread may use it. */
#ifndef DR_OPS_BACKUP_SPILL_H
#define DR_OPS_BACKUP_SPILL_H

#include "drover/backup.h"
#include "storage/storage.h"

struct dr_spill;

/* flags: enum dr_file_flag. */
int dr_spill_new(struct dr_spill **s, struct dr_fs *fs, const struct dr_backup_spill *options,
                 unsigned flags, struct dr_error *err);
void dr_spill_free(struct dr_spill *s); /* NULL allowed */

/* When it is full: does the backup fail, or does its guest wait for the target? */
bool dr_spill_fails_when_full(const struct dr_spill *s);

/* len: a grain, or less at the end of a disk. *slot: where it is. -ENOSPC: the spill is full, or
 * its file system. */
int dr_spill_put(struct dr_spill *s, const uint8_t *buf, size_t len, uint32_t *slot,
                 struct dr_error *err);
int dr_spill_get(struct dr_spill *s, uint32_t slot, uint8_t *buf, size_t len, struct dr_error *err);
/* What is there is not needed any more. */
void dr_spill_drop(struct dr_spill *s, uint32_t slot);

#endif
