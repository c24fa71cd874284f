/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that were made aside get their names: the one machine for that, for replaced files
 * (replace.c), new images (ops/newimage.c), archives and their checksums (archive/vma-write.c).
 *
 * A set is what has to appear together. Its main files are opened by their names; its parts
 * (extents) are files that the main files name. Renames are atomic one by one only, so
 * dr_publish() goes in this order, and makes the directory durable after each step:
 *
 *     look    every name must be free, or lead to the file that may give way
 *     aside   only if an old part gives way: the old main files get their aside names. From now on
 *             nobody opens an old main file over new parts.
 *     parts   get their names
 *     mains   get their names: the new files exist
 *
 * A failure undoes what was done, except when an old file has been replaced: then there is no way
 * back, and what is left must be kept so that another dr_publish() of it can go on. The same is so
 * when the process is killed. A file that somebody else puts in the place of a name meanwhile is
 * not replaced.
 *
 * How the files become durable before, what they are called while they are aside (core/aside.h),
 * and how others are kept from them (dr_dir_lock()) is the caller's affair; for a single file
 * struct dr_temp does that, too. */
#ifndef DR_CORE_PUBLISH_H
#define DR_CORE_PUBLISH_H

#include "storage/storage.h"

struct dr_publish_file {
    char *from;  /* where it was made */
    char *to;    /* the name it gets; all those of a set are in one directory */
    char *aside; /* of a main file: what the file that gives way is called while parts change
                  * hands; all those of a set are in one directory. NULL = the set has no parts */
    bool part;
    bool replaces; /* the file `old` gives way, if it still has the name */
    struct dr_file_id old;
    /* by dr_publish: */
    bool moved, put_aside;
};

enum dr_publish_state {
    DR_PUBLISH_UNDONE, /* nothing has changed, or all was undone */
    DR_PUBLISH_STUCK,  /* some files have their names, and the others must be kept */
    DR_PUBLISH_DONE,   /* all files have their names. After a failure: perhaps not durably */
};

struct dr_publish {
    struct dr_fs *fs;
    bool durable;
    bool over_links; /* a link that leads nowhere may give way */
    bool again;      /* an earlier attempt at this set may have moved parts, not durably */
    bool no_follow;  /* a link is what has the name, and `old` its own id, wherever it leads */
    struct dr_publish_file *files;
    size_t n;
    enum dr_publish_state state; /* by dr_publish */
};

/* Add a copy of file, strings included. */
int dr_publish_add(struct dr_publish *p, const struct dr_publish_file *file, struct dr_error *err);
/* Free what was added. */
void dr_publish_end(struct dr_publish *p);

/* -EEXIST: something has a name that was to be free. -ESTALE: another file has the name of the one
 * that was to be replaced. A file that is no longer there needs not give way. What was put aside,
 * also by an earlier attempt, is removed at the end. */
int dr_publish(struct dr_publish *p, struct dr_error *err);

/* ------------------------------------------------------------------ one file (replace.c) */

/* A file that is written under a temporary name and takes its own when it is complete. All zeros
 * when it does not exist. */
struct dr_temp {
    struct dr_fs *fs;
    struct dr_file *file; /* to be written to; locked as `old` is */
    struct dr_file *old;  /* the file that gives way, or NULL: the name must be free */
    char *path;           /* the name it takes; of old with links followed */
    char *temp;           /* its temporary name; NULL = it has its own */
};

/* old: the open file that path leads to (-ESTALE if it does not any more), or NULL. like: the new
 * file gets its owner, mode and labels; NULL = those of any new file. Both stay the caller's and
 * old must stay open. On failure nothing is left. */
int dr_temp_create(struct dr_temp *t, struct dr_fs *fs, const char *path, struct dr_file *old,
                   struct dr_file *like, struct dr_error *err);
/* Make it durable (unless the file is NO_FLUSH) and give it the name. t->file stays open. After a
 * failure the file may have its name all the same (t->temp is NULL): then it may not be durable,
 * and its flushes fail from now on. */
int dr_temp_publish(struct dr_temp *t, struct dr_error *err);
/* Close the file, and remove it if it has not got its name. */
void dr_temp_end(struct dr_temp *t);

#endif
