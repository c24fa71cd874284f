/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* dr_vma_extract_files: what its two files share, and the call on any file system. */
#ifndef DR_ARCHIVE_EXTRACT_FILES_H
#define DR_ARCHIVE_EXTRACT_FILES_H

#include <jansson.h>

#include "archive/stage.h"
#include "archive/vma-read.h"

struct files {
    struct dr_vma *vma;
    const struct dr_vma_files_options *o;
    const struct dr_vma_new_disk *disks; /* of o, with the name of o->path */
    struct dr_vma_new_disk alone;
    struct stage stage;
    struct dr_vma_target targets[512]; /* new images first, then those of the caller */
    size_t n_new, n_targets;
    struct dr_job *job;
    uint64_t resume_from;
    json_t *record; /* with resume */
    struct dr_vma_files_result result;
};

/* As dr_vma_extract_files; the archive may be in another file system. */
int dr_vma_extract_files_fs(struct dr_fs *fs, struct dr_vma *vma,
                            const struct dr_vma_files_options *options, struct dr_job *job,
                            struct dr_vma_files_result *result, struct dr_error *err);

/* ------------------------------------------------------------------ the record (extract-record.c)
 *
 * With resume a file in the staging directory says which extraction this is and how far it is. */

#define RECORD STAGE_OURS "record"

/* Read the record of an interrupted extraction, if there is one: sets resume_from and finishing.
 * -ESTALE: it is another extraction's. */
int files_record_load(struct files *x, struct dr_error *err);
/* Everything that the archive holds before off is durable in the new images. */
int files_record_save(struct files *x, uint64_t off, struct dr_error *err);
/* All files are complete, and only their names are missing. */
int files_record_complete(struct files *x, struct dr_error *err);

#endif
