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

#ifdef __cplusplus
}
#endif
#endif
