/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How incremental backups find out what has changed: each backup begins a bitmap of its own in
 * the disk's active image, or beside it, shortly before its instant. The set says which one. At the
 * instant itself, while requests wait, only memory is read. It is called
 *
 *     NAME@SSSSSSSS.RRRRRRRR    NAME: as the user calls them; S: the set's path, hashed; R: random
 *
 * so one that somebody else made, or that came back with an older copy of the disk, is never taken
 * for it. When the target is durable and the set has the backup, the bitmap of the one before is
 * removed. So, whatever is interrupted, the bitmap of the last backup in the set is there and has
 * noted all that changed since. Others of the same name and set are left over, and removed. */
#ifndef DR_OPS_BACKUP_TRACK_H
#define DR_OPS_BACKUP_TRACK_H

#include "core/core.h"
#include "core/marks.h"

/* What has changed: ascending ranges that do not touch. */
struct dr_changed {
    struct {
        uint64_t off, len;
    } * list;
    size_t n, room;
};

struct dr_track {
    struct dr_disk *disk; /* claimed by the caller, open for writing */
    const char *name;     /* as the user calls them */
    const char *last;     /* the bitmap of the last backup, or NULL */
    char *next;           /* that of this one; by dr_track_begin */

    /* private */
    char *prefix;
    uint64_t granularity; /* of next; 0 = the format's default */
    bool had, added;      /* last / next is there */
    bool reads_last;
    struct dr_marks marks; /* what last has, if reads_last */
};

/* Look at what there is, and remove what is left over. set: its real path. *there: `last` is there,
 * to be relied on. -EUCLEAN: it is there, but does not tell all; not so with `anew`. Ends with
 * dr_track_end. */
int dr_track_begin(struct dr_track *t, const char *set, bool anew, bool *there,
                   struct dr_error *err);
/* Shortly before the instant: `next` begins, durably, and what `last` has got so far is read. */
int dr_track_prepare(struct dr_track *t, bool incremental, struct dr_error *err);
/* In a step of dr_disk_exchange, at the instant: changed gets what `last` has, after
 * dr_track_prepare with incremental. Reads no file. */
int dr_track_now(struct dr_track *t, struct dr_chain *present, struct dr_changed *changed,
                 struct dr_error *err);
/* The backup is durable, and its set says so: `last` is removed. */
int dr_track_hand_on(struct dr_track *t, struct dr_error *err);
/* The set may say that there is the backup, and says so for good or not: both bitmaps stay. */
void dr_track_keep(struct dr_track *t);
/* There is no backup: `next` is removed, unless it was handed on or kept. */
void dr_track_give_up(struct dr_track *t);
void dr_track_end(struct dr_track *t);

/* Ranges come in order; one that touches the last one joins it. 0 or -ENOMEM. */
int dr_changed_add(struct dr_changed *c, uint64_t off, uint64_t len);
void dr_changed_free(struct dr_changed *c);

#endif
