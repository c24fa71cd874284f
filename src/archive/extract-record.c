/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "archive/extract-files.h"
#include "base/json.h"

#define POSITION "position" /* in the archive: all before it is durable in the files */
#define COMPLETE "complete"
#define ARCHIVE  "archive" /* which file it was */

/* Far more than any record takes. */
#define RECORD_MAX (16u << 20)

static int no_memory(const struct files *x, struct dr_error *err)
{
    return dr_fail(err, ENOMEM, "%s: out of memory", x->stage.work);
}

static void drop_json(json_t **value)
{
    json_decref(*value);
}
#define CLEANUP_JSON __attribute__((cleanup(drop_json)))

/* ------------------------------------------------------------------ which extraction it is */

/* NULL: there is no memory. Names of formats and settings are checked when images are made. */
static json_t *describe_disk(const struct files *x, const struct dr_vma_new_disk *d)
{
    json_t *pairs = json_object();
    int r = 0;
    for (size_t i = 0; i < d->n_pairs && r == 0; i++)
        r = json_object_set_new_nocheck(pairs, d->pairs[i].name, dr_json_text(d->pairs[i].value));
    if (r < 0) {
        json_decref(pairs);
        return NULL;
    }
    const struct dr_vma_disk *disk = vma_header_disk(&x->vma->header, d->id);
    return json_pack("{s:i, s:I, s:o, s:o, s:o}", "id", (int)d->id, "size",
                     (json_int_t)(disk ? disk->size : 0), "file", dr_json_text(d->file), "format",
                     dr_json_text(d->format ? d->format : "raw"), "options", pairs);
}

/* The properties of an extraction that must be the same for a later call to go on with it. */
static json_t *describe(const struct files *x)
{
    const struct dr_vma_header *header = &x->vma->header;
    char uuid[33];
    json_t *disks = json_array();
    for (unsigned i = 0; i < 16; i++)
        sprintf(uuid + 2 * i, "%02x", header->uuid[i]);
    for (size_t i = 0; i < x->o->n_disks; i++)
        if (json_array_append_new(disks, describe_disk(x, &x->disks[i])) < 0) {
            json_decref(disks);
            return NULL;
        }
    return json_pack("{s:s, s:I, s:I, s:o}", "uuid", uuid, "ctime", (json_int_t)header->ctime,
                     "header-size", (json_int_t)header->header_size, "disks", disks);
}

/* Size and time of the archive, which tell it from another file that took its name. NULL for a
 * pipe, which has neither. */
static json_t *identity(const struct files *x)
{
    struct dr_file *file = dr_source_stored(x->vma->source);
    if (!file || file->block_device)
        return NULL;
    return json_pack("{s:I, s:I}", "size", (json_int_t)dr_file_size(file), "mtime-ns",
                     (json_int_t)dr_file_mtime(file));
}

/* A header alone does not tell archives apart: reproducible ones of the same disks have the same,
 * and the bytes that are in the files already must not be mixed with those of another day. */
static bool is_same_archive(const struct files *x, const json_t *old, const json_t *now)
{
    if (old && now)
        return json_equal(old, now);
    return x->vma->header.uuid[6] >> 4 == 4; /* random: no other archive has it */
}

/* Compares all but how far it was. */
static bool is_same_extraction(const struct files *x, json_t *old)
{
    CLEANUP_JSON json_t *archive = json_incref(json_object_get(old, ARCHIVE));
    CLEANUP_JSON json_t *now = json_deep_copy(x->record);
    json_object_del(old, POSITION);
    json_object_del(old, COMPLETE);
    json_object_del(old, ARCHIVE);
    json_object_del(now, ARCHIVE);
    return json_equal(old, now) && is_same_archive(x, archive, json_object_get(x->record, ARCHIVE));
}

/* ------------------------------------------------------------------ load and save */

/* NULL: there is none that can be read. */
static json_t *load(const struct files *x)
{
    CLEANUP_FREE char *path = stage_path(&x->stage, RECORD);
    CLEANUP_FILE struct dr_file *file = NULL;
    if (!path ||
        dr_file_open(x->stage.fs, path, DR_FILE_FORCE_SHARE | DR_FILE_NO_LOCK, &file, NULL) < 0)
        return NULL;
    size_t len = (size_t)dr_min(dr_file_size(file), RECORD_MAX);
    CLEANUP_FREE char *text = malloc(len + 1);
    if (!text || dr_file_pread(file, text, 0, len, NULL) < 0)
        return NULL;
    json_error_t where;
    return json_loadb(text, len, 0, &where);
}

static int save(struct files *x, struct dr_error *err)
{
    CLEANUP_FREE char *text = dr_json_dump(x->record, JSON_COMPACT);
    return text ? stage_note(&x->stage, RECORD, text, strlen(text), err) : no_memory(x, err);
}

int files_record_load(struct files *x, struct dr_error *err)
{
    json_t *archive = identity(x);
    x->record = describe(x);
    if (!x->record) {
        json_decref(archive);
        return no_memory(x, err);
    }
    if (archive && json_object_set_new(x->record, ARCHIVE, archive) < 0)
        return no_memory(x, err);
    if (!x->stage.found)
        return 0;
    CLEANUP_JSON json_t *old = load(x);
    if (!old) { /* it was interrupted before there was anything to go on from */
        stage_empty(&x->stage);
        return 0;
    }
    json_int_t position = json_integer_value(json_object_get(old, POSITION));
    x->stage.finishing = json_is_true(json_object_get(old, COMPLETE));
    if (!is_same_extraction(x, old))
        return dr_fail(err, ESTALE,
                       "%s holds what is left of another extraction, or of one from an archive "
                       "that has changed since: finish that one, or remove it",
                       x->stage.work);
    x->resume_from = position > 0 ? (uint64_t)position : 0;
    return 0;
}

int files_record_save(struct files *x, uint64_t off, struct dr_error *err)
{
    if (json_object_set_new(x->record, POSITION, json_integer((json_int_t)off)) < 0)
        return no_memory(x, err);
    return save(x, err);
}

int files_record_complete(struct files *x, struct dr_error *err)
{
    if (json_object_set_new(x->record, COMPLETE, json_true()) < 0)
        return no_memory(x, err);
    return save(x, err);
}
