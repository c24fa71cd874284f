/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "cli/vma/extract.h"
#include "cli/common/json.h"

#define RECORD   ".drover.record"
#define POSITION "position" /* in the archive: all before it is durable in the files */
#define COMPLETE "complete"
#define ARCHIVE  "archive" /* which file it was */

/* The properties of an extraction that must be the same for a later run to go on with it. */
static json_t *describe(const struct extract *x)
{
    char uuid[33];
    json_t *items = json_array(), *pairs = json_object();

    for (unsigned i = 0; i < 16; i++)
        sprintf(uuid + 2 * i, "%02x", x->header->uuid[i]);
    for (size_t i = 0; i < x->n; i++)
        json_array_append_new(items, json_pack("{s:i, s:I, s:o}", "id", (int)x->items[i].disk->id,
                                               "size", (json_int_t)x->items[i].disk->size, "file",
                                               vma_json_name(x->items[i].file)));
    for (size_t i = 0; i < x->pairs.n; i++)
        json_object_set_new(pairs, x->pairs.pairs[i].name, vma_json_name(x->pairs.pairs[i].value));
    return json_pack("{s:s, s:I, s:I, s:s, s:o, s:o}", "uuid", uuid, "ctime",
                     (json_int_t)x->header->ctime, "header-size",
                     (json_int_t)x->header->header_size, "format", x->form.format, "options", pairs,
                     "disks", items);
}

/* Size and time of the archive, which tell it from another file that took its name. NULL for a
 * pipe, which has neither. */
static json_t *identity(const struct extract *x)
{
    const char *path = x->args->operands[0];
    struct stat st;
    int r = strcmp(path, "-") == 0 ? fstat(STDIN_FILENO, &st) : stat(path, &st);

    if (r < 0 || !S_ISREG(st.st_mode))
        return NULL;
    return json_pack("{s:I, s:I}", "size", (json_int_t)st.st_size, "mtime-ns",
                     (json_int_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec);
}

/* A header alone does not tell archives apart: reproducible ones of the same disks have the same.
 * What is on disk already must not be mixed with another day's data. */
static bool is_same_archive(const struct extract *x, const json_t *old, const json_t *now)
{
    if (old && now)
        return json_equal(old, now);
    return x->header->uuid[6] >> 4 == 4; /* random: no other has it */
}

static int save(struct extract *x)
{
    CLEANUP_FREE char *text = json_dumps(x->record, JSON_COMPACT);

    return text ? vma_place_note(&x->place, RECORD, text, strlen(text)) : -1;
}

static json_t *load(const struct extract *x)
{
    CLEANUP_CLOSE int fd = openat(x->place.work_fd, RECORD, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    json_error_t where;

    return fd < 0 ? NULL : json_loadfd(fd, 0, &where);
}

/* All but how far it was. */
static bool is_same_extraction(struct extract *x, json_t *old)
{
    CLEANUP_JSON json_t *archive = json_incref(json_object_get(old, ARCHIVE));
    CLEANUP_JSON json_t *now = json_deep_copy(x->record);

    json_object_del(old, POSITION);
    json_object_del(old, COMPLETE);
    json_object_del(old, ARCHIVE);
    json_object_del(now, ARCHIVE);
    return json_equal(old, now) && is_same_archive(x, archive, json_object_get(x->record, ARCHIVE));
}

int extract_resume(struct extract *x)
{
    CLEANUP_JSON json_t *old = load(x);
    json_t *archive = identity(x);

    x->record = describe(x);
    if (!x->record || (archive && json_object_set_new(x->record, ARCHIVE, archive) < 0))
        return -1;
    if (!x->place.found)
        return 0;
    if (!old) { /* it was stopped before there was anything to go on from */
        vma_place_empty(&x->place);
        return 0;
    }
    uint64_t position = cli_json_number(old, POSITION);
    x->place.finishing = json_is_true(json_object_get(old, COMPLETE));
    if (!is_same_extraction(x, old)) {
        cli_error(x->cli,
                  "%s holds what is left of another extraction, or of one from an archive that has "
                  "changed since: finish that one, or remove it",
                  x->place.work);
        return -1;
    }
    x->o.resume_from = position;
    return 0;
}

int extract_record(struct extract *x)
{
    json_object_set_new(x->record, POSITION, json_integer((json_int_t)x->o.resume_from));
    return save(x);
}

int extract_checkpoint(void *user, uint64_t off)
{
    struct extract *x = user;

    json_object_set_new(x->record, POSITION, json_integer((json_int_t)off));
    return save(x);
}

int extract_record_complete(struct extract *x)
{
    json_object_set_new(x->record, COMPLETE, json_true());
    return save(x);
}
