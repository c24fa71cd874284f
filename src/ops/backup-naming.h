/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Between the moment at which a new backup gets its name and the one at which its set lists it
 * there is a gap, in which its maker may be killed. So the set announces it before:
 *
 *     announce: the entries, marked as getting their names ─► the files get their names
 *     ─► confirm: the marks are taken away, and the entries are backups
 *
 * The set is held all the while. So whoever holds it and finds a mark knows that nobody is at work
 * on the entry any more, and settles it: the backups of one instant are taken in if all of them
 * have their names, and else removed. The mark tells the file that was announced from another one
 * that has its name: what does not fit the mark is not touched. */
#ifndef DR_OPS_BACKUP_NAMING_H
#define DR_OPS_BACKUP_NAMING_H

#include "core/core.h"
#include "ops/backup-set.h"
#include "ops/job.h"

struct dr_naming {
    struct dr_set_writer held;
    const struct dr_backup_entry *entries; /* the caller's; they last until dr_naming_end */
    size_t n;
    bool had;       /* there was one when the backup began */
    bool made;      /* there was no set before */
    bool confirmed; /* the set lists them; after a failure perhaps not durably */
};

/* The mark of the complete, closed file at path, malloc'ed. It stays when the file is renamed. All
 * that are announced together have the same random number `group`. */
int dr_naming_mark(struct dr_fs *fs, const char *path, uint64_t group, char **mark,
                   struct dr_error *err);
/* The entries have their marks. had: the set was there when the backup began, with backups in it.
 * -EEXIST: one of the names is taken. -ESTALE: the set has gone since, or the backup that one of
 * the entries stands on has gone from it. On failure nothing is held and the set is as it was; else
 * end with dr_naming_end. */
int dr_naming_announce(struct dr_naming *g, struct dr_fs *fs, const char *set, bool had,
                       const struct dr_backup_entry *entries, size_t n, struct dr_error *err);
/* All files have their names, durably. */
int dr_naming_confirm(struct dr_naming *g, struct dr_error *err);
/* The files are gone again: the set forgets the entries. */
void dr_naming_withdraw(struct dr_naming *g);
void dr_naming_end(struct dr_naming *g);

/* Settle what interrupted backups have announced in the set, and tell the job. What cannot be
 * settled now stays as it is, and is told, too. open (may be NULL): which paths are allowed. */
int dr_naming_settle(struct dr_fs *fs, const char *set, const struct dr_open_options *open,
                     struct dr_job *job, struct dr_error *err);

#endif
