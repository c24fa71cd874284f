/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One step of a prune: backups that stand on each other leave their set, and the kept backup that
 * stands on them, if there is one, gets what it needs of them.
 *
 *     look ─► verify what the kept one shows ─► the set marks them as leaving ─► merge
 *     ─► verify what was merged ─► finish: files go, the set forgets them
 *
 * The kept one K reads the same at every moment. There are two ways to merge:
 *
 *     down   what K and those that leave hold goes into the oldest image by a commit, under which K
 *            masks each change; then that image is renamed over K's. Costs what has changed.
 *     up     what K does not hold itself is copied into it by a stream, and K stands alone. Costs
 *            what the oldest ones hold.
 *
 * Down is for images that are one file each, in one directory, that are of one format, and whose
 * children do not record more of them than a name. In both cases K has no parent when it is done,
 * which tells whoever comes after an interruption what is left to do. */
#ifndef DR_OPS_BACKUP_MERGE_H
#define DR_OPS_BACKUP_MERGE_H

#include "ops/backup-set.h"
#include "ops/ops-internal.h"

enum dr_merge_way { DR_MERGE_NOT, DR_MERGE_DOWN, DR_MERGE_UP };

struct dr_merge {
    struct dr_fs *fs;
    const char *set;
    const struct dr_open_options *open; /* of the images; their formats are the set's */
    struct dr_job *job;
    const struct dr_backup_entry **gone; /* the newest first */
    size_t n;
    const struct dr_backup_entry *into; /* the kept one, or NULL */

    /* by dr_merge_look: */
    enum dr_merge_way way;
    uint64_t size; /* of the kept one's image, if there is something to merge */
    char ***files; /* of each that leaves, relative to the set's directory; NULL-terminated */
    uint64_t copied, freed; /* as in struct dr_prune_step */
    bool verified;          /* by dr_merge_verify_merged */
};

/* Find out what has to be done, and refuse what cannot be. exclusive: somebody who uses one of the
 * images is a reason to refuse. Ends with dr_merge_end, also after a failure. */
int dr_merge_look(struct dr_merge *m, bool exclusive, struct dr_error *err);
/* Read all that the kept one shows, if something is to be merged into it: damage must be found as
 * long as all that leaves is there. -EBADMSG: it is not what it held; the set records that. */
int dr_merge_verify_kept(struct dr_merge *m, struct dr_error *err);
/* Read what is to be the kept one from now on. -EBADMSG: it is not what that held; if it has the
 * kept one's name already, the set records that. */
int dr_merge_verify_merged(struct dr_merge *m, struct dr_error *err);
/* The set says durably that they are leaving: give the kept one what it needs. */
int dr_merge_copy(struct dr_merge *m, struct dr_error *err);
/* Remove them, and let the set forget them. */
int dr_merge_finish(struct dr_merge *m, struct dr_error *err);
void dr_merge_end(struct dr_merge *m);

#endif
