/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The file that lists backups: a JSON text beside them, replaced as a whole
 * (docs/formats/backup.md). What it says is taken as hostile: a name in it leads to a file only
 * through the gate. */
#ifndef DR_OPS_BACKUP_SET_H
#define DR_OPS_BACKUP_SET_H

#include "drover/backup.h"
#include "storage/storage.h"

struct dr_backup_set {
    struct dr_backup_entry *all; /* in the order in which they were made */
    size_t n;
};

/* A set that is not there is empty. -EINVAL: it is no such file. */
int dr_set_load(struct dr_backup_set *s, struct dr_fs *fs, const char *path, struct dr_error *err);
void dr_set_free(struct dr_backup_set *s);
/* NULL: there is none of that name. */
const struct dr_backup_entry *dr_set_find(const struct dr_backup_set *s, const char *name);
/* The last one that was made of a disk with this bitmap and is not leaving, or NULL. disk: its real
 * path. */
const struct dr_backup_entry *dr_set_last(const struct dr_backup_set *s, const char *disk,
                                          const char *bitmap);

/* The set, held for writing: nobody else can write it meanwhile, in this process or another. */
struct dr_set_writer {
    struct dr_fs *fs;
    const char *path;
    struct dr_file *file; /* NULL: there is no set yet */
};
/* Waits for others, who are quick. */
int dr_set_hold(struct dr_set_writer *w, struct dr_fs *fs, const char *path, struct dr_error *err);
int dr_set_read_held(const struct dr_set_writer *w, struct dr_backup_set *s, struct dr_error *err);
/* It says s and then the n entries, durably and at once; it is still held. -EEXIST: there was no
 * set, and somebody else has made one meanwhile. *written (may be NULL): it does say so; after a
 * failure perhaps not durably. */
int dr_set_write_held(struct dr_set_writer *w, const struct dr_backup_set *s,
                      const struct dr_backup_entry *entries, size_t n, bool *written,
                      struct dr_error *err);
void dr_set_release(struct dr_set_writer *w);
/* While nobody else can write the set: change sees what it says now. When it returns 1, what it has
 * made of s is written, durably and at once; 0: the set stays as it is; else a failure. */
int dr_set_change(struct dr_fs *fs, const char *path,
                  int (*change)(void *user, struct dr_backup_set *s, struct dr_error *err),
                  void *user, struct dr_error *err);
/* A list of an entry's files that ends with NULL, malloc'ed like its texts; NULL = out of memory.
 */
char **dr_set_copy_files(char *const *files);
/* Now, as the times of backups are written: bytes of text. */
#define DR_SET_TIME 32
void dr_set_time_now(char *text);
/* All of the backup was read just now, and is right. */
int dr_set_mark_verified(struct dr_backup_entry *e, struct dr_error *err);
/* What was found when the backup was read: damage, or NULL. The set records it, if it still has the
 * backup. A failure is a message of the job. */
void dr_set_record_verified(struct dr_fs *fs, const char *path, const struct dr_backup_entry *e,
                            const char *damage, const struct dr_job *job);
/* The entry itself, or one that it stands on, which was found damaged since e was found good; NULL:
 * there is none. */
const struct dr_backup_entry *dr_set_damaged(const struct dr_backup_set *s,
                                             const struct dr_backup_entry *e);
/* Does the disk show what the entry says that its backup, at path, held? -EBADMSG: no, and where if
 * the backup's side file knows. */
int dr_verify_disk(struct dr_fs *fs, const struct dr_backup_entry *e, const char *path,
                   struct dr_disk *disk, struct dr_job *job, struct dr_error *err);
/* Take the entry out of s, and free it. */
void dr_set_drop(struct dr_backup_set *s, struct dr_backup_entry *e);
/* The path of a file whose name in the set is this, malloc'ed; NULL = out of memory. */
char *dr_set_path_of(const char *set, const char *name);
/* The path of the entry's image, or its name, vma:ARCHIVE#DISK, malloc'ed; NULL = out of memory. */
char *dr_set_path(const char *set, const struct dr_backup_entry *e);
/* The path of the image's main file, or of the archive that it is in. */
char *dr_set_main_file(struct dr_fs *fs, const char *set, const struct dr_backup_entry *e);
/* Is it a disk in an archive? An archive holds all of its disks: it has no parent, and no bitmap.
 */
bool dr_set_in_archive(const struct dr_backup_entry *e);
/* Are both in one archive? */
bool dr_set_same_archive(const struct dr_backup_entry *a, const struct dr_backup_entry *b);
/* Remove an archive with its checksums and its index, unless somebody uses it. */
int dr_set_remove_archive(struct dr_fs *fs, const char *path, struct dr_error *err);

#endif
