/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the parent of an image was when somebody recorded it: a small file beside the image,
 * IMAGE.drover-parent, which other programs do not see. docs/formats/fingerprint.md has the format.
 *
 * It counts as long as the image records the parent name that it is about: another one was put
 * there by a program that knows nothing of the file. An image without it costs two looks at names
 * when it is opened, one with it about 18 reads of 64 KiB. */
#ifndef DR_CORE_FINGERPRINT_H
#define DR_CORE_FINGERPRINT_H

#include "core/core.h"

#define DR_FINGERPRINT_SUFFIX ".drover-parent"
#define DR_FINGERPRINT_HEX    33 /* 128 bits as text */
#define DR_FINGERPRINT_FORMAT 32

struct dr_fingerprint {
    uint64_t size; /* of the parent, in bytes */
    char format[DR_FINGERPRINT_FORMAT];
    bool has_id;
    uint32_t id;                      /* its content id */
    char sampled[DR_FINGERPRINT_HEX]; /* of some blocks of what it shows */
    char full[DR_FINGERPRINT_HEX];    /* of all of it; "" = not recorded */
};

/* 1 and *print; 0: there is none, or it is about another name. -EBADMSG: it is damaged. */
int dr_fingerprint_load(const struct dr_image *image, struct dr_fingerprint *print,
                        struct dr_error *err);
/* Replace it, atomically and durably. The image records a parent. */
int dr_fingerprint_store(const struct dr_image *image, const struct dr_fingerprint *print,
                         struct dr_error *err);
/* The image is about to record that name for its parent, which is like print: until it does, what
 * is recorded of the present one counts. Does nothing where nothing is. */
int dr_fingerprint_store_next(const struct dr_image *image, const char *name,
                              const struct dr_fingerprint *print, struct dr_error *err);
/* Nothing happens where there is none. */
int dr_fingerprint_remove(struct dr_fs *fs, const char *path, struct dr_error *err);
/* The same, before another image takes the place of this one. *text, malloc'ed, is what was there
 * (NULL: nothing), for dr_fingerprint_put_back() if that fails, which has failures of its own only
 * where the record is lost, and then tells nobody. */
int dr_fingerprint_set_aside(struct dr_fs *fs, const char *path, char **text, struct dr_error *err);
void dr_fingerprint_put_back(struct dr_fs *fs, const char *path, const char *text);
/* Size, format and content id. -ESTALE says in full what is different. */
int dr_fingerprint_compare(const struct dr_image *image, const struct dr_fingerprint *print,
                           const struct dr_image *parent, struct dr_error *err);
/* images[first] of the chain, and what is below it, is the parent: the hash of some blocks of what
 * it shows, or of all of it. stopped, or NULL, is asked before each block: true is -ECANCELED. */
int dr_fingerprint_sample(struct dr_chain *chain, size_t first, char text[DR_FINGERPRINT_HEX],
                          struct dr_error *err);
int dr_fingerprint_full(struct dr_chain *chain, size_t first, bool (*stopped)(void *user),
                        void *user, char text[DR_FINGERPRINT_HEX], struct dr_error *err);
/* -ESTALE: its blocks are others. */
int dr_fingerprint_compare_sample(const struct dr_image *image, const struct dr_fingerprint *print,
                                  struct dr_chain *chain, size_t first, struct dr_error *err);
/* The message for that; how: what was compared. */
int dr_fingerprint_refuse(const struct dr_image *image, const struct dr_image *parent,
                          const char *how, struct dr_error *err);
/* When a chain is opened: load, and compare what costs nothing as soon as the parent is open. 1:
 * there is a record, so that dr_fingerprint_check_sample() has to follow when the chain is
 * complete. That one reads the parent; what cannot be read of it is left to those who read it next.
 */
int dr_fingerprint_check(const struct dr_image *image, const struct dr_image *parent,
                         struct dr_error *err);
int dr_fingerprint_check_sample(struct dr_chain *chain, size_t child, struct dr_error *err);

#endif
