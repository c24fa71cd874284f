/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names for what is made aside: a file or directory that stands, hidden, next to the name it will
 * take in the end, and that a later run knows again by its own name.
 *
 *     .NAME<mark>-RANDOM          while that fits NAME_MAX
 *     .STEM<mark>~HASHRANDOM      STEM: the beginning of NAME, HASH: 16 hex digits, of all of NAME
 *
 * A cut name does not tell whose it is, but whether it is a given name's: compare with
 * dr_aside_is_of(). */
#ifndef DR_CORE_ASIDE_H
#define DR_CORE_ASIDE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DR_ASIDE_FILE "drover"     /* one file that is being replaced or written (replace.c) */
#define DR_ASIDE_DIR  "drover.new" /* a directory with the files of a new image (ops/newimage.c) */

struct dr_aside {
    const char *stem; /* points into the name that was parsed */
    size_t stem_len;
    bool cut; /* stem is only the beginning */
    uint64_t hash;
    const char *end; /* behind what was parsed */
};

/* A fresh random name for base, malloc'ed; NULL = out of memory. */
char *dr_aside_name(const char *base, const char *mark);
/* The same without RANDOM: the one name with this mark for base. */
char *dr_aside_fixed_name(const char *base, const char *mark);
/* The path of such a name next to path, malloc'ed; NULL = out of memory. */
char *dr_aside_path(const char *path, const char *mark);
/* Is name such a name with this mark? No directory in name. */
bool dr_aside_parse(const char *name, const char *mark, struct dr_aside *a);
bool dr_aside_is_of(const struct dr_aside *a, const char *base);
/* In a message: a file inside such a directory is told by its own name, and a name made aside by
 * the one that it stands for. base: that name; without it (NULL) a cut name is told as its stem. */
void dr_aside_hide(char *text, const char *mark, const char *base);

#endif
