/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New images, which may be several files and may replace older ones.
 *
 * A new image is made, complete, under its own name in a private directory next to its place
 * (core/aside.h has the directory's name), and then its files are moved: the other files first, the
 * main file, the one that was asked for, last (core/publish.h). Until then nothing under the final
 * names has changed. The directory is locked as long as somebody is at work in it.
 *
 * A block device keeps its name and its node: an image on it is made in its place, there is no
 * directory, and publishing it does nothing. Abandoned, it loses its header.
 *
 * An attempt that was killed leaves its directory. What is in it tells whether the image had begun
 * to appear and must be finished, or nothing had changed and it can be removed (dr_new_judge). */
#ifndef DR_OPS_NEWIMAGE_H
#define DR_OPS_NEWIMAGE_H

#include "core/aside.h"
#include "core/publish.h"
#include "drover/ops.h"
#include "formats/format.h"

struct dr_new_image {
    struct dr_fs *fs;
    char *final;              /* where it will stand, links followed */
    char *dir;                /* the private directory, NULL = not made */
    char *path;               /* dir/NAME: where it is made */
    struct dr_file *old;      /* what has the place now, locked against other users; or NULL */
    struct dr_dir_lock *lock; /* of dir: its files are closed before they are moved, and others must
                               * not take it for a leftover then; NULL = no such locks there */
    bool on_device;           /* final is a block device: the image is made there at once */
    bool made_there;          /* and it has a header */
    unsigned file_flags;      /* how that was opened */
    bool durable;             /* make the names durable */
    bool no_replace;          /* nothing that is there gives way */
};

/* flags: enum dr_open_flag: NO_LOCK, NO_FLUSH. On failure nothing is left; else end with
 * dr_new_publish or dr_new_abandon. */
int dr_new_begin(struct dr_new_image *n, struct dr_fs *fs, const char *path, bool no_replace,
                 unsigned flags, struct dr_error *err);
/* Create the image by its driver in the private directory. what: all but the settings, which are
 * pairs, and what n knows. */
int dr_new_create(struct dr_new_image *n, const struct dr_format *fmt,
                  const struct dr_create_params *what, const struct dr_pair *pairs, size_t n_pairs,
                  unsigned flags, struct dr_error *err);
/* Make the one file that the image will be, empty, for the caller to write; dr_file_unref it before
 * the end. */
int dr_new_open_file(struct dr_new_image *n, const struct dr_format *fmt, unsigned flags,
                     struct dr_file **file, struct dr_error *err);
/* Would moving what has been made so far take the place of files that are not the old image's? */
int dr_new_check_places(const struct dr_new_image *n, struct dr_error *err);
/* Give the files made so far owner, mode and labels of the file at from, as far as we may. */
void dr_new_take_attrs(const struct dr_new_image *n, const char *from);
/* The image is closed and complete: move it to its place. Ends n, whatever the result. */
int dr_new_publish(struct dr_new_image *n, struct dr_error *err);
/* Remove what was made; on a device, the beginning of it. Does nothing after an end. */
void dr_new_abandon(struct dr_new_image *n);

static inline void dr_cleanup_new(struct dr_new_image *n)
{
    dr_new_abandon(n);
}
#define CLEANUP_NEW __attribute__((cleanup(dr_cleanup_new)))

/* The message of a failure r names the image path, not its private directory. Returns r. */
static inline int dr_new_hide(int r, const char *path, struct dr_error *err)
{
    if (r < 0 && err)
        dr_aside_hide(err->text, DR_ASIDE_DIR, path ? dr_path_basename(path) : NULL);
    return r;
}

/* ------------------------------------------------------------------ private directories
 * (private-dir.c), with newimage.c and recover.c
 *
 * dir: a private directory of the image final, which the caller has locked where it can be. */

/* Plan to move the files in dir next to final. A file that has one of the names now gives way. */
int dr_new_plan(struct dr_fs *fs, const char *dir, const char *final, struct dr_publish *plan,
                struct dr_error *err);
/* Do so, and remove the directory. The new files get owner, mode and labels of those that give way,
 * whose bitmaps beside final go, too. */
int dr_new_move(struct dr_publish *plan, const char *dir, const char *final, struct dr_error *err);
int dr_new_remove_all(struct dr_fs *fs, const char *dir, struct dr_error *err);

enum dr_new_state {
    DR_NEW_UNKNOWN,    /* not recognised, or the old image may be nowhere else: leave it alone */
    DR_NEW_UNUSED,     /* no file had begun to move, or all have moved: remove it */
    DR_NEW_HALF_MOVED, /* its main file lacks extents that have been moved already: the new image
                        * was complete, and moving the rest finishes it */
};
/* Decide what becomes of dir, whose process was interrupted. */
enum dr_new_state dr_new_judge(struct dr_fs *fs, const char *dir, const char *final);
/* A half moved image may be finished only while nothing has its final name: an image that still had
 * it when the attempt was killed has been usable, and may have been used, since. */
bool dr_new_may_finish(struct dr_fs *fs, const char *final);
int dr_new_finish(struct dr_fs *fs, const char *dir, const char *final, struct dr_error *err);

/* Other attempts at the image n, which nobody is at work on any more. */

/* Did one of them move the file of this name next to the image, before it was interrupted? Then it
 * belongs to nobody and may be replaced. */
bool dr_new_left_by_others(const struct dr_new_image *n, const char *name);
/* Remove those that are in this state. */
void dr_new_drop_others(const struct dr_new_image *n, enum dr_new_state state);
/* Finish or remove what interrupted attempts at the image final have left, as far as that is safe.
 */
void dr_new_settle_others(struct dr_fs *fs, const char *final);

#endif
