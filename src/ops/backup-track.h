/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* How incremental backups find out what has changed: a bitmap B inside the disk's active image,
 * which notes what was written since the last backup, and how it is handed on to the next one.
 *
 *     at the instant       a second bitmap N ("B~new") is added, empty and enabled; B goes on
 * noting target durable, set  the set names the new backup then                 B is removed; B is
 * added anew with what N has; N is removed
 *
 * B always has all that N has, and more. So where both are found after an interruption, B is right
 * whichever backup is the last in the set, and N is dropped. Where only N is found, the set names
 * the backup of the instant at which N began: it becomes B. */
#ifndef DR_OPS_BACKUP_TRACK_H
#define DR_OPS_BACKUP_TRACK_H

#include "core/core.h"

/* What has changed: ascending ranges that do not touch. */
struct dr_changed {
    struct {
        uint64_t off, len;
    } * list;
    size_t n, room;
};

struct dr_track {
    struct dr_disk *disk; /* claimed by the caller, open for writing */
    const char *bitmap;

    /* private */
    char *next;    /* the name of N */
    bool had;      /* there is B */
    bool added;    /* there is N */
    bool unusable; /* B is inconsistent */
};

/* Finish or undo what an interrupted backup has left. *there: B is there, to be relied on.
 * -EUCLEAN: it is there, but a writer did not store it; not so with `anew`, for which it is going
 * to be dropped. Ends with dr_track_end. */
int dr_track_begin(struct dr_track *t, bool anew, bool *there, struct dr_error *err);
/* In a step of dr_disk_quiesce, at the instant: N begins. changed: gets what B has; NULL = nobody
 * wants to know. */
int dr_track_now(struct dr_track *t, struct dr_chain *present, struct dr_changed *changed,
                 struct dr_error *err);
/* The backup is durable, and its set says so: from now on B notes what changed since then. */
int dr_track_hand_on(struct dr_track *t, struct dr_error *err);
/* There is no backup: drops N, and leaves B as it was. */
void dr_track_give_up(struct dr_track *t);
void dr_track_end(struct dr_track *t);

/* Ranges come in order; one that touches the last one joins it. 0 or -ENOMEM. */
int dr_changed_add(struct dr_changed *c, uint64_t off, uint64_t len);
void dr_changed_free(struct dr_changed *c);

#endif
