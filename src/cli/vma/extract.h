/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* drover vma extract: what its two files share. */
#ifndef DR_CLI_VMA_EXTRACT_H
#define DR_CLI_VMA_EXTRACT_H

#include "cli/vma/place.h"

struct extract_item {
    const struct dr_vma_disk *disk;
    char *file; /* its name in the place */
};

struct extract {
    const struct cli *cli;
    const struct cli_args *args;
    const char *archive;
    const char *output; /* one disk goes into this file; NULL = all into a directory */
    bool in_place;      /* it is there already, and is written over */
    bool configs;
    struct vma_form form;
    struct cli_pairs pairs;
    struct dr_vma *vma;
    const struct dr_vma_header *header;
    struct extract_item items[256];
    size_t n;
    struct vma_place place;
    struct vma_targets targets;
    struct vma_damage damage;
    struct dr_vma_extract_options o;
    struct dr_vma_extract_result result;
    json_t *record; /* with --resume: what is going on, and how far it is */
};

/* vma/resume.c. The record stands beside the files. */

/* Looks for a record: o.resume_from and place.finishing are set by it. What is there of another
 * extraction is refused. */
int extract_resume(struct extract *x);
/* All targets are there: from here on --resume goes on. */
int extract_record(struct extract *x);
/* The library's checkpoint. */
int extract_checkpoint(void *user, uint64_t off); /* user: struct extract */
/* All is there, only the names are missing. */
int extract_record_complete(struct extract *x);

#endif
