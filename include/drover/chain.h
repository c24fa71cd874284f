/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Drover: which images stand on which, what each of them holds, what is wrong with their
 * references, and mending those. */
#ifndef DROVER_CHAIN_H
#define DROVER_CHAIN_H

#include "drover/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* All images in the directory that are of a format with a magic number, and their ancestors
 * wherever those are, as dr_tree() tells of one family. Parents stand before children; `asked` is
 * false for all. Free with dr_tree_free(). */
DR_API int dr_forest(const char *dir, const struct dr_open_options *options,
                     struct dr_tree_node **nodes, size_t *n, struct dr_error *err);

#define DR_LAYER_ID 40

struct dr_layer_usage {
    bool known;           /* false: the image does not open or is damaged, and the numbers are 0 */
    uint64_t allocated;   /* bytes of the disk for which the image itself has data */
    uint64_t exclusive;   /* of these, the bytes that can be read through a disk on top of it. The
                             others are covered by images above it, in every disk */
    char id[DR_LAYER_ID]; /* content id, "" = its format has none */
    char parent_id[DR_LAYER_ID]; /* the content id that it expects of its parent, "" = none */
};
/* Tell what each image of a family holds; a node's `parent` says on which one it stands, its
 * `format` how to open it. usage: n of them. Only metadata is read, one image beside the other, and
 * no locks are taken. */
DR_API int dr_tree_usage(const struct dr_tree_node *nodes, size_t n,
                         const struct dr_open_options *options, struct dr_layer_usage *usage,
                         struct dr_error *err);

/* ------------------------------------------------------------------ differences */

/* Tell every range in which two disks differ: each(off, len), ascending, never two that touch, in
 * multiples of 512 bytes but at the end of a disk. What lies behind the end of the shorter one
 * counts as zeros there. Images that both disks share are not read where they answer for both. A
 * result of each other than 0 ends it and becomes its result. The disks must not change. */
DR_API int dr_diff(struct dr_disk *a, struct dr_disk *b,
                   int (*each)(void *user, uint64_t off, uint64_t len), void *user,
                   struct dr_job *job, struct dr_error *err);

/* ------------------------------------------------------------------ check */

enum dr_chain_fault {
    DR_CHAIN_DAMAGED,   /* the image itself does not open */
    DR_CHAIN_MISSING,   /* its parent is nowhere */
    DR_CHAIN_MOVED,     /* its parent is elsewhere: dr_relocate() mends that */
    DR_CHAIN_LOOP,      /* it is its own ancestor */
    DR_CHAIN_CHANGED,   /* its parent is not, or no longer, the one it was made on */
    DR_CHAIN_FORBIDDEN, /* its parent is where images may not lead */
    DR_CHAIN_REFUSED,   /* its parent does not open for another reason */
    /* What follows does not keep a disk from being read right. */
    DR_CHAIN_CAPACITY, /* it and its parent are not of one size */
    DR_CHAIN_FORMAT,   /* it does not record the format of its parent */
    DR_CHAIN_SIBLING,  /* not of the chain: an image on one of its members that is not valid */
};

struct dr_chain_finding {
    enum dr_chain_fault fault;
    char *path;  /* of the image that has it */
    char *text;  /* one line that begins with the path */
    char *found; /* MOVED: where the parent is; else NULL */
};

struct dr_chain_options {
    struct dr_open_options open;
    /* NULL, or NULL-terminated: directories to look for a parent in, besides the image's own and
     * those near it. */
    const char *const *search;
    /* A line for each thing that is done, or would be. NULL: nobody asks. */
    void (*report)(void *user, const char *line);
    void *user;
    bool dry_run; /* of relocate and pack: change nothing */
};

/* "missing", "moved", ... */
DR_API const char *dr_chain_fault_name(enum dr_chain_fault fault);
static inline bool dr_chain_fault_is_harmless(enum dr_chain_fault fault)
{
    return fault >= DR_CHAIN_CAPACITY;
}

/* Examine an image and its ancestors, or all images of a directory. *images: how many there were.
 * options may be NULL. Nothing is written. Free with dr_chain_findings_free(). */
DR_API int dr_chain_examine(const char *path, const struct dr_chain_options *options,
                            struct dr_chain_finding **findings, size_t *n, size_t *images,
                            struct dr_error *err);
DR_API void dr_chain_findings_free(struct dr_chain_finding *findings, size_t n);

/* ------------------------------------------------------------------ references
 *
 * Both work on an image and its ancestors, or on all images of a directory, and change nothing but
 * the recorded name of a parent, one image after another, each atomically: cut off anywhere, each
 * image has its old record or its new one. *changed (may be NULL): how many were, or would be. */

/* Where the parent of an image is not where it says, find it, as dr_chain_examine() does, and
 * record where it is. -ENOENT: a parent was not found, or several images may be it; what could be
 * mended was. */
DR_API int dr_relocate(const char *path, const struct dr_chain_options *options, unsigned *changed,
                       struct dr_error *err);
/* Record names of parents that are relative to the image's directory, so that a whole directory can
 * be moved. */
DR_API int dr_pack_names(const char *path, const struct dr_chain_options *options,
                         unsigned *changed, struct dr_error *err);

/* ------------------------------------------------------------------ fingerprints of parents
 *
 * Beside an image can stand, in a small file, what its parent was: size, format, content id, a hash
 * of some blocks and perhaps one of all. From then on opening the image fails with -ESTALE where
 * size, format, id or the blocks are others, unless DR_OPEN_NO_FINGERPRINT is set, and so do
 * dr_chain_examine() and a rebase with `unsafe`, which compare all if that was recorded; operations
 * that give it another parent record that one. */
struct dr_fingerprint_options {
    struct dr_open_options open;
    bool full_hash; /* read all of the parent, too */
    bool remove;    /* forget what was recorded */
};
/* Record the present parent of the image, whatever was recorded before. -EINVAL: it has none. */
DR_API int dr_fingerprint(const char *path, const struct dr_fingerprint_options *options,
                          struct dr_job *job, struct dr_error *err);

/* ------------------------------------------------------------------ snapshots that are images
 *
 * name: an image of the disk's family, as a path or beside the disk, or what a .vmsd beside the
 * disk calls the snapshot that froze it. Other images are looked for in the disk's directory. */

enum dr_snapshot_merge {
    DR_SNAPSHOT_MERGE_BEST, /* whichever copies fewer bytes */
    DR_SNAPSHOT_MERGE_UP,   /* into the images that stand on it */
    DR_SNAPSHOT_MERGE_DOWN, /* into its parent */
};

struct dr_snapshot_options {
    struct dr_open_options open; /* flags and allow_paths, for all images */
    enum dr_snapshot_merge merge;
    bool dry_run;     /* only report */
    bool update_vmsd; /* the machine's .vmsd is changed, too */
    /* A line that says what is done. NULL: nobody asks. */
    void (*report)(void *user, const char *line);
    void *user;
};

struct dr_snapshot_plan {
    uint64_t up, down; /* bytes that each way copies */
    bool possible_down;
    bool goes_down;
};

/* dr_snapshot_create() with these options; merge and report are for others, and dry_run is
 * -ENOTSUP. update_vmsd: the list of the machine whose .vmx uses the disk, or whose .vmsd knows an
 * image of its chain, gets a snapshot, "Snapshot N", that froze the disk. -EINVAL: two machines use
 * it, or such a file cannot be understood; -ENOENT: the machine has no .vmsd. No machine at all is
 * no failure. Where the child is there and only the list could not be replaced, it fails, and
 * *active is set. The .vmx stays as it is. */
DR_API int dr_snapshot_take(const char *path, const char *name,
                            const struct dr_snapshot_options *options, char **active,
                            struct dr_error *err);
/* Take the image out of its family: what it holds goes into the images on it, which get its parent,
 * or into its parent, which then reads as it did. An image on which nothing stands is removed.
 * Every other image but that parent reads the same, whenever it is interrupted; doing it again goes
 * on. -EBUSY: one of the images is in use, or DOWN is impossible. */
DR_API int dr_snapshot_delete(const char *disk, const char *name,
                              const struct dr_snapshot_options *options,
                              struct dr_snapshot_plan *plan, struct dr_job *job,
                              struct dr_error *err);
/* The disk becomes an empty image on that one, and keeps its name, format and layout; what it held
 * is gone. -EBUSY: it is in use, or other images stand on it. */
DR_API int dr_snapshot_revert(const char *disk, const char *name,
                              const struct dr_snapshot_options *options, struct dr_error *err);

/* What the files of virtual machines (.vmx, .vmsd) in a directory say of images. */
struct dr_machine_note {
    char *descriptor; /* path of the .vmx or .vmsd */
    char *image;      /* path of the image, "" = the descriptor cannot be read, text says why */
    char *device;     /* "scsi0:0", "" = not said */
    char *snapshot;   /* name of the snapshot that froze it; NULL: the machine uses it now */
    char *text;       /* NULL, or the reason */
    uint64_t uid, parent_uid; /* of the snapshot; 0 = none */
    int64_t microseconds;     /* when it was taken, since 1970; 0 = not known */
    bool current;             /* the machine runs on this snapshot */
};
DR_API int dr_machine_notes(const char *dir, struct dr_machine_note **notes, size_t *n,
                            struct dr_error *err);
DR_API void dr_machine_notes_free(struct dr_machine_note *notes, size_t n);

#ifdef __cplusplus
}
#endif
#endif
