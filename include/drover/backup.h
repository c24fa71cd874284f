/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: backups. What a disk holds at one instant is copied into a new image, of any format,
 * while other threads go on using the disk; later only what has changed since. Backups are listed
 * in a file, a set, with a digest of what each holds: so it can be verified at any time.
 *
 * The conventions of drover.h and ops.h hold. */
#ifndef DROVER_BACKUP_H
#define DROVER_BACKUP_H

#include "drover/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The digest of what a disk holds, in hexadecimal: one number for all its bytes, however they are
 * stored. docs/formats/backup.md says how it is computed. */
#define DR_DIGEST_TEXT 33

/* Where what a guest is about to change goes, while the target is slower than the guest: into a
 * file of its own, from which the job copies it later. All zeros: nowhere, and the guest waits for
 * the target. */
struct dr_backup_spill {
    /* A directory, or a name that is free: the file made there has no name as soon as it is made,
     * so it goes with the process, however that ends. NULL = no such file. */
    const char *path;
    uint64_t size; /* bytes that it may have; 0 = 1 GiB */
    /* When it is full, or its file system: the backup fails. Else the guest waits until the target
     * has taken what it is about to change. Its requests fail in neither case. */
    bool fail_when_full;
};

struct dr_backup_options {
    struct dr_open_options open; /* of the target: flags and allow_paths */
    const char *format;          /* of the target; NULL = qcow2 */
    const struct dr_pair *pairs; /* settings of the target */
    size_t n_pairs;
    const char *set; /* path of the set, which gets the backup; it is made if it is not there. NULL
                        = none */
    /* With a set: what changes from this backup on is noted by a bitmap in the disk's active image,
     * or beside it, whose name begins with this one and an '@'. Where such a bitmap notes what has
     * changed since the last backup that the set has of this disk with this name, the target is a
     * child of that one and holds only what has changed. Another bitmap of just this name says
     * which granularity new ones get. NULL = none, and the target holds all. */
    const char *bitmap;
    bool full; /* the target holds all, whatever a bitmap says */
    /* Instead of bitmap: the one of this backup in the set. -EINVAL: that has gone on to a later
     * one. */
    const char *since;
    struct dr_backup_spill spill; /* disks that are backed up together share the first one's */
};

struct dr_backup_result {
    uint64_t size;               /* of the disk at that instant */
    uint64_t copied;             /* bytes that were read from the disk */
    bool incremental;            /* the target is a child of the last backup */
    char digest[DR_DIGEST_TEXT]; /* of the disk at that instant */
};

struct dr_backup_disk {
    struct dr_disk *disk;
    const char *target; /* nothing may be there */
    struct dr_backup_options options;
    struct dr_backup_result result; /* by dr_disks_backup */
};

/* Copy several disks as they are at one instant of this call, at which their requests wait for as
 * long as it takes to note that in memory. (Before, a bitmap begins, and requests wait for memory,
 * too; but where nothing was written to the disk since it was opened, until the bitmap is durable.)
 * From then on,
 * before a range changes that was not copied yet, it is copied first; the job copies the rest. A
 * target that fails does not fail the guest: the backup fails. The targets get their names when all
 * of them are complete and durable; after a failure there are none, and the bitmaps note what they
 * did before. Holes are not read.
 *
 * TARGET.sums, beside each target, has the checksums that the digest is computed from. It may be
 * removed: then the next incremental backup reads all of this one.
 *
 * The disks are different ones, open for reading or, with a bitmap, for writing. -EBUSY: another
 * operation changes the images of one. -EEXIST: something is at a target's place. -EUCLEAN: the
 * bitmap does not tell all that has changed; a full backup begins it anew. */
DR_API int dr_disks_backup(struct dr_backup_disk *disks, size_t n, struct dr_job *job,
                           struct dr_error *err);
/* The same of one disk. options and result may be NULL. */
DR_API int dr_disk_backup(struct dr_disk *disk, const char *target,
                          const struct dr_backup_options *options, struct dr_job *job,
                          struct dr_backup_result *result, struct dr_error *err);
/* The same of a disk that nobody writes to. source (may be NULL): how to open it. */
DR_API int dr_backup(const char *path, const struct dr_open_options *source, const char *target,
                     const struct dr_backup_options *options, struct dr_job *job,
                     struct dr_backup_result *result, struct dr_error *err);

/* ------------------------------------------------------------------ sets */

struct dr_backup_entry {
    char *name;   /* of the backup, unlike all others in the set: the last part of its path */
    char *file;   /* where its image is; relative to the set's directory */
    char *format; /* of its image */
    char *parent; /* name of the backup that it stands on; NULL = it holds all */
    char *disk;   /* real path of the image that was backed up */
    char *bitmap; /* the name by which bitmaps were asked for, or NULL */
    char *noted;  /* with it: the bitmap of the disk that notes what has changed since */
    char *time;   /* of the instant: 2026-11-30T02:10:00Z */
    uint64_t size, copied;
    char digest[DR_DIGEST_TEXT];
    /* NULL, or: it is a backup no more, dr_backup_prune() is removing it or was interrupted. Its
     * files, relative to the set's directory; the last is NULL. */
    char **leaving;
    /* NULL, or: it is no backup yet, its files are getting their names, or their maker was
     * interrupted just then. The next backup or prune with this set takes it in or removes it. */
    char *naming;
    /* NULL, or when all of it was read last and had its digest, as time above. */
    char *verified;
    /* NULL, or what was found when it was read last: it does not hold what was backed up. No
     * incremental backup is made on it. */
    char *damaged;
};
/* All backups of the set, in the order in which they were made; free with dr_backup_list_free.
 * -ENOENT: there is no such file. -EINVAL: it is no set. */
DR_API int dr_backup_list(const char *set, struct dr_backup_entry **list, size_t *n,
                          struct dr_error *err);
DR_API void dr_backup_list_free(struct dr_backup_entry *list, size_t n);

/* How the files of a backup look. */
struct dr_backup_files {
    uint64_t size;   /* bytes that its image shows */
    uint64_t stored; /* bytes of the file system that its files take; those of an archive for each
                        of its disks */
};
/* Open the image of an entry of the set, without its parents, and look at its sizes; nothing that
 * it holds is read. open (may be NULL): how. -ENOENT: the image is not there. -EBADMSG: it has
 * another size than the disk had. Else it cannot be opened. */
DR_API int dr_backup_look(const char *set, const struct dr_backup_entry *e,
                          const struct dr_open_options *open, struct dr_backup_files *files,
                          struct dr_error *err);

/* Read all that the backup called name shows, and compare its digest with the set's. With against,
 * the open disk, which other threads may use: read that, as it is at one instant of this call,
 * instead of the backup. open (may be NULL): how to open the backup. -EBADMSG: something differs;
 * the text says where, as far as checksums tell. Without against the set records what was found
 * (verified, damaged); where it cannot be written, a message of the job says so. */
DR_API int dr_backup_verify(const char *set, const char *name, const struct dr_open_options *open,
                            struct dr_disk *against, struct dr_job *job, struct dr_error *err);

/* The digest of what the disk holds at one instant of this call. text: DR_DIGEST_TEXT bytes. */
DR_API int dr_disk_digest(struct dr_disk *disk, struct dr_job *job, char *text,
                          struct dr_error *err);

/* ------------------------------------------------------------------ old backups go
 *
 * Those of one disk with one bitmap are a series. What a removed backup holds and a kept one needs
 * goes into that one first, and each kept one shows what it did at every moment, so its digest and
 * its checksums stay valid. */

struct dr_prune_step {
    const char *const *names; /* of backups that stand on each other, the newest first */
    size_t n;
    const char *into; /* the backup that gets what it needs of them, or NULL: none needs them */
    uint64_t copied;  /* bytes for that */
    uint64_t freed;   /* bytes of the file system that come back, as far as is known before */
    bool verified;    /* what is in `into` now was read before anything was removed, and is right */
};

struct dr_prune_options {
    struct dr_open_options open; /* how to open the backups; their formats are the set's */
    unsigned keep;               /* the newest ones of each series, at least 1 */
    const char *like; /* only the series of this backup, or of its archive's disks; NULL = all. What
                         an interrupted call was removing goes in each case */
    bool dry_run;     /* only tell */
    bool no_verify;   /* do not read what is merged: a backup that is damaged stays so */
    void (*tell)(void *user, const struct dr_prune_step *step); /* NULL, or: of each step */
    void *user;
};
/* Remove all but the newest backups of each series. qcow2 backups in one directory that stand on
 * each other are merged into the oldest file, which then takes the place of the kept one's; any
 * others by copying all that the kept one needs into it. Interrupted anywhere, call it again.
 * A backup that others are merged into is read before anything changes, and what was merged before
 * anything is removed. -EBADMSG: it is not what the backup held, and nothing was removed.
 * -EBUSY, -EAGAIN: somebody uses a backup, or an image that is no backup of the set stands on one
 * that would go. -ENOSPC: there is no room for the copy. -ESTALE: the set is not what it was when
 * this call began. After all of these nothing has changed but steps that were told. */
DR_API int dr_backup_prune(const char *set, const struct dr_prune_options *options,
                           struct dr_job *job, struct dr_error *err);

/* ------------------------------------------------------------------ restore */

struct dr_restore_options {
    struct dr_open_options source; /* how to open what is restored */
    struct dr_open_options open;   /* how to open the disk; RDWR is implied */
    bool shrink;                   /* the disk may become smaller: what is behind the end is lost */
};
/* Make the existing disk hold what the image at source shows. Both are read, and only what differs
 * is written, so doing it again goes on where an interrupted call ended. Zeros give space back. The
 * disk gets the source's size. written (may be NULL): bytes. -EAGAIN/-EBUSY: somebody uses it. */
DR_API int dr_restore(const char *source, const char *disk,
                      const struct dr_restore_options *options, struct dr_job *job,
                      uint64_t *written, struct dr_error *err);

#ifdef __cplusplus
}
#endif
#endif
