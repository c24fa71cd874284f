/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An archive of disks as they were at one instant becomes a member of a set of backups: each of its
 * disks gets an entry, ARCHIVE#DISK, in the order in which backups get theirs
 * (ops/backup-naming.h). An archive always holds all of its disks: it begins no bitmaps, and stands
 * between no incremental backups. */
#ifndef DR_ARCHIVE_VMA_LISTED_H
#define DR_ARCHIVE_VMA_LISTED_H

#include "drover/vma.h"
#include "ops/backup-naming.h"

struct vma_listed {
    struct dr_naming naming;
    struct dr_backup_entry *entries;
    size_t n;
    char *mark;
    char time[32];
    bool had; /* the set was there, with backups in it */
    bool announced;
};

/* Before anything is written: settle what interrupted backups left in the set, and refuse names
 * that it has. path: of the archive. All zeros in l, but for the time. */
int vma_listed_begin(struct vma_listed *l, struct dr_fs *fs, const char *path,
                     const struct dr_vma_create_options *o, struct dr_job *job,
                     struct dr_error *err);
/* The archive is complete and durable at temp, and is to be called path. */
int vma_listed_announce(struct vma_listed *l, struct dr_fs *fs, const char *path, const char *temp,
                        const struct dr_vma_create_options *o,
                        const struct dr_vma_disk_result *results, struct dr_error *err);
/* The archive has its name. */
int vma_listed_confirm(struct vma_listed *l, struct dr_error *err);
/* What was announced and not confirmed is withdrawn. */
void vma_listed_end(struct vma_listed *l);

#endif
