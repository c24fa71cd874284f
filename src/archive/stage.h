/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A staging directory: files are made in it and get their names in the target directory all
 * together, when they are complete and durable, or not at all.
 *
 *     begin     make and lock the staging directory; learn what an interrupted attempt left in it
 *     plan      which files there will be; what they replace is locked from here on
 *     ...       the caller makes them (stage_path, stage_write)
 *     publish   rename them (stage-publish.c)
 *     end       remove what was not published, unless it is to be kept
 *
 * The staging directory lies in the target directory, so that renaming moves no bytes. With
 * `in_sight` there is none: the files are made in the target directory, which is new, under other
 * names.
 *
 * Files in the staging directory that were not planned are taken for extents of a planned image
 * and are published before all others, except those with names that begin with STAGE_OURS. */
#ifndef DR_ARCHIVE_STAGE_H
#define DR_ARCHIVE_STAGE_H

#include <limits.h>

#include "drover/vma.h"
#include "ops/ops-internal.h"

/* No file whose name begins so is published. */
#define STAGE_OURS ".drover."
/* An old file in the staging directory, while extents of the image that replaces it are moved. */
#define STAGE_ASIDE STAGE_OURS "old."

struct stage_file {
    char *made; /* its name until it is published */
    char *name; /* its name afterwards */
    bool image; /* may have extents beside it */
};

/* A file that will be replaced. */
struct stage_claim {
    char *name;
    struct dr_file *file; /* holds the lock; NULL = a symbolic link, which needs none */
    struct dr_file_id id;
};

struct stage {
    struct dr_fs *fs;
    struct dr_job *job; /* for messages */
    char *dir;          /* the target directory */
    char *work;         /* the staging directory; the same as dir with in_sight */
    bool in_sight;      /* see above */
    bool make_dir;      /* make dir if it does not exist */
    bool keep;          /* an attempt that fails leaves everything, for another one to go on */
    bool replace;       /* existing files give way */
    bool no_lock;       /* take no locks on the files that give way */
    bool no_sync;       /* do not wait until anything is durable */
    bool finishing;     /* all files are complete; some may have their names already */
    bool entered;       /* stage_begin has succeeded: the files in work are ours */
    bool made_dir;      /* dir did not exist before */
    bool found;         /* an earlier attempt left files, which are kept */
    bool stuck;         /* publishing could neither go on nor be undone */
    bool published;
    struct dr_dir_lock *lock;
    struct dr_file_id work_id;
    struct stage_file *files;
    size_t n_files;
    struct stage_claim *claims;
    size_t n_claims;
};

/* The caller has set fs, job and the flags up to finishing. work: the name of the staging
 * directory in dir. -EBUSY: another process uses it. After a failure call stage_end, too. */
int stage_begin(struct stage *s, const char *dir, const char *work, struct dr_error *err);
/* Remove what an earlier attempt left, except for old files. */
void stage_empty(struct stage *s);
/* A file that will be made as `made` and published as `name`. image: extents that belong to it may
 * be made beside it. -EEXIST: another file has the name and may not be replaced; -EBUSY: or is in
 * use; -EINVAL: two files would have one name. */
int stage_plan(struct stage *s, const char *made, const char *name, bool image,
               struct dr_error *err);
/* Make such a file with this content; durable, except for its name. */
int stage_write(struct stage *s, const char *made, const void *data, size_t len,
                struct dr_error *err);
/* Replace a file in the staging directory that will not be published, durably. */
int stage_note(struct stage *s, const char *name, const void *data, size_t len,
               struct dr_error *err);
/* The path of a file in the staging directory, malloc'ed. NULL = out of memory. */
char *stage_path(const struct stage *s, const char *made);
/* Make the names in both directories durable. */
int stage_sync(const struct stage *s, struct dr_error *err);
/* Give all files their names, durably. After a failure nothing has its final name, unless an old
 * file has been replaced: then keep is set, and what is left stays in the staging directory. */
int stage_publish(struct stage *s, struct dr_error *err);
void stage_end(struct stage *s);

/* ------------------------------------------------------------------ for stage-publish.c */

/* Is the staging directory still the one that stage_begin has made? */
bool stage_has_work_dir(const struct stage *s);
int stage_no_memory(const struct stage *s, struct dr_error *err);
/* Lock the file of that name in dir, which will be replaced. Nothing there: 0. */
int stage_claim(struct stage *s, const char *name, struct dr_error *err);
/* NULL: no file of that name was claimed. */
const struct stage_claim *stage_claim_of(const struct stage *s, const char *name);
/* Where the old file of that name is put aside, malloc'ed. */
char *stage_aside(const struct stage *s, const char *name);

#endif
