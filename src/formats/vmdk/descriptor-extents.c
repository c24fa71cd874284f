/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Changing the lines of a descriptor that say how large the disk is. */
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/descriptor.h"

static const struct vmdk_line *extent_line(const struct vmdk_desc *d, size_t i)
{
    for (size_t l = 0; l < d->n_lines; l++)
        if (d->lines[l].kind == VMDK_LINE_EXTENT && i-- == 0)
            return &d->lines[l];
    return NULL;
}

static size_t skip(const struct vmdk_desc *d, size_t at, size_t end, bool blanks)
{
    while (at < end && (isspace((unsigned char)d->text[at]) != 0) == blanks)
        at++;
    return at;
}

int vmdk_desc_set_sectors(struct vmdk_desc *d, size_t i, uint64_t sectors, struct dr_error *err)
{
    const struct vmdk_line *l = extent_line(d, i);
    char number[24];
    if (!l)
        return dr_fail(err, EINVAL, "VMDK descriptor: no extent %zu", i);
    size_t end = l->off + l->len;
    size_t at = skip(d, l->off, end, true);           /* to the access */
    at = skip(d, skip(d, at, end, false), end, true); /* to the number of sectors */
    snprintf(number, sizeof(number), "%" PRIu64, sectors);
    return vmdk_desc_splice(d, at, skip(d, at, end, false) - at, number, err);
}

int vmdk_desc_add_extent(struct vmdk_desc *d, size_t i, uint64_t sectors, const char *name,
                         struct dr_error *err)
{
    static const char *const accesses[] = {"RW", "RDONLY", "NOACCESS"};
    const struct vmdk_line *l = extent_line(d, i);
    CLEANUP_FREE char *line = NULL;
    if (!l)
        return dr_fail(err, EINVAL, "VMDK descriptor: no extent %zu", i);
    const struct vmdk_extent_line *like = &d->extents[i];
    bool open_end = l->end == l->off + l->len; /* the last line of the text, without a line end */
    const char *eol = !open_end && d->text[l->off + l->len] == '\r' ? "\r\n" : "\n";
    if (asprintf(&line, "%s%s %" PRIu64 " %s \"%s\"%s%s", open_end ? eol : "",
                 accesses[like->access], sectors, like->type_name, name,
                 like->type == VMDK_FLAT ? " 0" : "", open_end ? "" : eol) < 0) {
        line = NULL;
        return dr_fail_errno(err, ENOMEM, "VMDK descriptor");
    }
    return vmdk_desc_splice(d, l->end, 0, line, err);
}

int vmdk_desc_set_type(struct vmdk_desc *d, size_t i, const char *type, struct dr_error *err)
{
    const struct vmdk_line *l = extent_line(d, i);
    CLEANUP_FREE char *text = NULL;
    if (!l)
        return dr_fail(err, EINVAL, "VMDK descriptor: no extent %zu", i);
    size_t end = l->off + l->len, at = skip(d, l->off, end, true);
    for (int word = 0; word < 2; word++) /* past the access, and the number of sectors */
        at = skip(d, skip(d, at, end, false), end, true);
    if (asprintf(&text, "%s \"%s\"%s", type, d->extents[i].name,
                 strcmp(type, "FLAT") == 0 ? " 0" : "") < 0) {
        text = NULL;
        return dr_fail_errno(err, ENOMEM, "VMDK descriptor");
    }
    return vmdk_desc_splice(d, at, end - at, text, err);
}

int vmdk_desc_remove_extent(struct vmdk_desc *d, size_t i, struct dr_error *err)
{
    const struct vmdk_line *l = extent_line(d, i);
    if (!l)
        return dr_fail(err, EINVAL, "VMDK descriptor: no extent %zu", i);
    return vmdk_desc_splice(d, l->off, l->end - l->off, "", err);
}

/* The value of a key as a number; 0: there is none. */
static uint64_t number_of(const struct vmdk_desc *d, const char *key)
{
    CLEANUP_FREE char *value = vmdk_desc_get(d, key);
    return value ? strtoull(value, NULL, 10) : 0;
}

int vmdk_desc_set_cylinders(struct vmdk_desc *d, uint64_t sectors, struct dr_error *err)
{
    CLEANUP_FREE char *adapter = vmdk_desc_get(d, "ddb.adapterType");
    bool ide = !adapter || strcasecmp(adapter, "ide") == 0;
    uint64_t heads = number_of(d, "ddb.geometry.heads"),
             track = number_of(d, "ddb.geometry.sectors");
    char text[24];
    if (!vmdk_desc_find(d, "ddb.geometry.cylinders") || heads - 1 > 254 || track - 1 > 254)
        return 0;
    snprintf(text, sizeof(text), "%" PRIu64,
             dr_min(dr_max(sectors / (heads * track), 1), (uint64_t)(ide ? 16383 : 65535)));
    return vmdk_desc_set(d, "ddb.geometry.cylinders", text, true, NULL, err);
}
