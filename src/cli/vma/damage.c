/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include <inttypes.h>

#include "cli/vma/vma.h"

static const char *kind_name(enum dr_vma_damage_kind kind)
{
    static const char *const names[] = {
        [DR_VMA_MISSING] = "missing",   [DR_VMA_DUPLICATE] = "duplicate",
        [DR_VMA_CHECKSUM] = "checksum", [DR_VMA_DIFFERS] = "differs",
        [DR_VMA_EXTENT] = "extent",     [DR_VMA_DOUBTFUL] = "doubtful",
        [DR_VMA_HEADER] = "header",
    };

    return (size_t)kind < sizeof(names) / sizeof(names[0]) ? names[kind] : "damage";
}

static const char *kind_text(enum dr_vma_damage_kind kind)
{
    static const char *const texts[] = {
        [DR_VMA_MISSING] = "missing",
        [DR_VMA_DUPLICATE] = "stored a second time",
        [DR_VMA_CHECKSUM] = "not what the checksums say",
        [DR_VMA_DIFFERS] = "not what the disk compared with holds",
        [DR_VMA_EXTENT] = "not a valid part of an archive",
        [DR_VMA_DOUBTFUL] = "taken, but may be wrong anywhere: the compressed stream is damaged",
        [DR_VMA_HEADER] = "taken, but the header is wrong or does not list it",
    };

    return (size_t)kind < sizeof(texts) / sizeof(texts[0]) ? texts[kind] : "damaged";
}

static json_t *as_json(const struct dr_vma_damage *damage, const struct dr_vma_disk *disk)
{
    json_t *item = json_pack("{s:s, s:I, s:I}", "kind", kind_name(damage->kind), "offset",
                             (json_int_t)damage->off, "length", (json_int_t)damage->len);

    if (item && disk) {
        json_object_set_new(item, "disk", vma_json_name(disk->name));
        json_object_set_new(item, "id", json_integer((json_int_t)disk->id));
    }
    if (item && damage->text)
        json_object_set_new(item, "text", vma_json_name(damage->text));
    return item;
}

void vma_damage_add(void *user, const struct dr_vma_damage *damage)
{
    struct vma_damage *d = user;
    const struct dr_vma_disk *disk = damage->id ? vma_find_id(d->header, damage->id) : NULL;

    d->n++;
    if (d->array)
        json_array_append_new(d->array, as_json(damage, disk));
    if (!d->lines)
        return;
    CLEANUP_FREE char *name = disk ? vma_escape(disk->name) : NULL;
    /* The text says what was expected there; for disks the kind is enough. */
    bool more = damage->kind == DR_VMA_EXTENT && damage->text;
    CLEANUP_FREE char *text = more ? vma_escape(damage->text) : NULL;
    fprintf(d->lines, "%s: %" PRIu64 "..%" PRIu64 " (%" PRIu64 " bytes): %s%s%s\n",
            name ? name : "archive", damage->off, damage->off + damage->len, damage->len,
            kind_text(damage->kind), text ? ": " : "", text ? text : "");
}

static void set(json_t *object, const char *key, uint64_t value)
{
    json_object_set_new(object, key, json_integer((json_int_t)value));
}

void vma_damage_free(struct vma_damage *d)
{
    json_decref(d->array);
}

void vma_damage_json(json_t *object, const struct vma_damage *d,
                     const struct dr_vma_extract_result *result)
{
    set(object, "bytes-read", result->bytes_read);
    set(object, "zero-bytes", result->zero_bytes);
    set(object, "missing-bytes", result->missing_bytes);
    set(object, "duplicate-bytes", result->duplicate_bytes);
    set(object, "checksum-bytes", result->checksum_bytes);
    set(object, "different-bytes", result->different_bytes);
    set(object, "extent-bytes", result->extent_bytes);
    set(object, "doubtful-bytes", result->doubtful_bytes);
    set(object, "header-bytes", result->header_bytes);
    json_object_set_new(object, "sums-used", json_boolean(result->sums_used));
    json_object_set(object, "damage", d->array);
}
