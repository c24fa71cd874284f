/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The recorded parent: where it may be, and recording another one. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/vmdk.h"

/* ------------------------------------------------------------------ where it may be */

#define MAX_CANDIDATES 10

struct candidates {
    char *path[MAX_CANDIDATES];
    unsigned n;
};

static void candidates_free(struct candidates *c)
{
    while (c->n > 0)
        free(c->path[--c->n]);
}

/* Takes path over; NULL = out of memory. */
static bool add(struct candidates *c, char *path)
{
    if (!path)
        return false;
    for (unsigned i = 0; i < c->n; i++)
        if (strcmp(c->path[i], path) == 0) {
            free(path);
            return true;
        }
    c->path[c->n++] = path;
    return true;
}

/* dir/../LAST/NAME of .../LAST/NAME: a linked clone beside its parent's directory. */
static bool add_neighbour(struct candidates *c, const char *image_path, const char *slashed)
{
    const char *name = dr_path_basename(slashed);
    if (name == slashed || name - 1 == slashed)
        return true;
    CLEANUP_FREE char *parent_dir = strndup(slashed, (size_t)(name - 1 - slashed));
    CLEANUP_FREE char *relative = NULL;
    if (!parent_dir)
        return false;
    if (asprintf(&relative, "../%s/%s", dr_path_basename(parent_dir), name) < 0) {
        relative = NULL;
        return false;
    }
    return add(c, dr_path_sibling(image_path, relative));
}

static bool collect(struct candidates *c, const char *path, const char *hint)
{
    CLEANUP_FREE char *slashed = vmdk_with_slashes(hint);
    if (!slashed || !add(c, dr_path_sibling(path, hint)))
        return false;
    const char *name = dr_path_basename(slashed);
    return *name == '\0' || /* a directory is no disk */
           ((slashed[0] == '/' || add(c, dr_path_sibling(path, slashed))) &&
            add(c, dr_path_sibling(path, name)) && add_neighbour(c, path, slashed));
}

/* Behind the places of the name in UTF-8 those of its bytes. */
static bool collect_bytes(struct candidates *c, const struct dr_image *image)
{
    CLEANUP_FREE char *hint = vmdk_desc_get(&vmdk_of(image)->desc, "parentFileNameHint");
    CLEANUP_FREE char *utf8 = hint ? vmdk_desc_to_utf8(&vmdk_of(image)->desc, hint) : NULL;
    return !utf8 || strcmp(utf8, image->backing_name) != 0 || collect(c, image->path, hint);
}

/* A system that does not tell cases apart may have written the name. Looked for last: the whole
 * directory is read. */
static bool add_alike(struct candidates *c, const struct dr_image *image)
{
    CLEANUP_FREE char *name = vmdk_find_beside(image, image->backing_name);
    return !name || add(c, dr_path_sibling(image->path, name));
}

/* Why no place was right may be that the name could not be read. */
static int name_charset(const struct dr_image *image, struct dr_error *err)
{
    CLEANUP_FREE char *charset =
        vmdk_desc_unknown_charset(&vmdk_of(image)->desc, image->backing_name);
    if (!charset)
        return -ENOENT;
    return dr_fail(err, EINVAL,
                   "not found; the descriptor is in the charset %s, which is not known", charset);
}

int vmdk_backing_candidate(const struct dr_image *image, unsigned n, char **path,
                           struct dr_error *err)
{
    struct candidates c = {.n = 0};
    int r = -ENOENT;
    if (!image->backing_name)
        return r;
    if (!collect(&c, image->path, image->backing_name) || !collect_bytes(&c, image) ||
        (n >= c.n && !add_alike(&c, image)))
        r = dr_fail_errno(err, ENOMEM, "%s", image->path);
    else if (n < c.n) {
        *path = c.path[n];
        c.path[n] = NULL;
        r = 0;
    } else if (n == c.n) {
        r = name_charset(image, err);
    }
    candidates_free(&c);
    return r;
}

/* ------------------------------------------------------------------ recording another one */

#define NO_UUID "00000000-0000-0000-0000-000000000000"

/* Names are bytes to us; a text in another charset must not get UTF-8 mixed in. */
static bool charset_allows(const struct vmdk_desc *d, const char *name)
{
    CLEANUP_FREE char *encoding = vmdk_desc_get(d, "encoding");
    if (!encoding || strcasecmp(encoding, "UTF-8") == 0 || strcasecmp(encoding, "UTF8") == 0)
        return true;
    for (; *name; name++)
        if ((unsigned char)*name >= 0x80)
            return false;
    return true;
}

static int check_name(const struct dr_image *image, const char *name, struct dr_error *err)
{
    if (!vmdk_name_is_writable(name))
        return dr_fail(err, EINVAL,
                       "%s: a VMDK cannot record the parent's name \"%s\": quotes and line ends "
                       "are impossible",
                       image->path, name);
    if (strlen(name) >= PATH_MAX)
        return dr_fail(err, ENAMETOOLONG, "%s: the parent's name has %zu bytes, at most %d fit",
                       image->path, strlen(name), PATH_MAX - 1);
    if (!charset_allows(&vmdk_of(image)->desc, name))
        return dr_fail(err, EILSEQ,
                       "%s: the descriptor is not in UTF-8: only ASCII names can be recorded",
                       image->path);
    return 0;
}

static int check_parent(const struct dr_image *image, const struct dr_image *parent,
                        const char *format, struct dr_error *err)
{
    const char *is = parent ? parent->fmt->name : format;
    if (is && strcmp(is, "vmdk") != 0)
        return dr_fail(err, EINVAL,
                       "%s: a VMDK's parent must be a VMDK, not %s: convert that first (drover "
                       "convert -O vmdk)",
                       image->path, is);
    bool recorded = image->backing_name && vmdk_parent_id(image) == VMDK_NO_PARENT;
    return parent && !recorded ? vmdk_check_parent_id(parent, err) : 0; /* a commit may mend it */
}

/* Without an open parent its id is unknown: the recorded one stays. */
static uint32_t new_parent_id(const struct dr_image *image, const struct dr_image *parent,
                              const char *name)
{
    if (!name)
        return VMDK_NO_PARENT;
    if (parent)
        return vmdk_id(parent);
    uint32_t old = vmdk_parent_id(image);
    return old == VMDK_NO_PARENT ? VMDK_NO_PARENT - 1 : old;
}

/* VirtualBox's disks record the UUID of their parent, too, by which they find it: that of the new
 * one, or zeros, its way to say that there is none. An old UUID would be looked for again. */
static int edit_uuids(struct vmdk_desc *d, const struct dr_image *parent, struct dr_error *err)
{
    static const char *const keys[][2] = {{"ddb.uuid.parent", "ddb.uuid.image"},
                                          {"ddb.uuid.parentmodification", "ddb.uuid.modification"}};
    int r = 0;
    for (size_t i = 0; r == 0 && i < sizeof(keys) / sizeof(keys[0]); i++) {
        if (!vmdk_desc_find(d, keys[i][0]))
            continue;
        CLEANUP_FREE char *uuid = parent ? vmdk_desc_get(&vmdk_of(parent)->desc, keys[i][1]) : NULL;
        bool fits = uuid && strlen(uuid) == strlen(NO_UUID);
        r = vmdk_desc_set(d, keys[i][0], fits ? uuid : NO_UUID, true, NULL, err);
    }
    return r;
}

static int edit_backing(struct vmdk_desc *d, const struct dr_image *parent, const char *name,
                        uint32_t id, struct dr_error *err)
{
    char text[9];
    snprintf(text, sizeof(text), "%08x", id);
    int r = vmdk_desc_set(d, "parentCID", text, false, "CID", err);
    if (r < 0)
        return r;
    if (name)
        r = vmdk_desc_set(d, "parentFileNameHint", name, true, "createType", err);
    else
        r = vmdk_desc_remove(d, "parentFileNameHint", err);
    return r < 0 ? r : edit_uuids(d, name ? parent : NULL, err);
}

static int remember(struct dr_image *image, const char *name, uint32_t id, struct dr_error *err)
{
    CLEANUP_FREE char *copy = name ? strdup(name) : NULL;
    CLEANUP_FREE char *format = name ? strdup("vmdk") : NULL;
    if (name && (!copy || !format))
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    free(image->backing_name);
    free(image->backing_format);
    image->backing_name = DR_STEAL(copy);
    image->backing_format = DR_STEAL(format);
    vmdk_of(image)->parent_cid = id;
    vmdk_of(image)->parent_moved = false;
    vmdk_of(image)->by_uuid = false;
    return 0;
}

static int record(struct dr_image *image, const struct dr_image *parent, const char *name,
                  uint32_t id, unsigned flags, struct dr_error *err)
{
    struct vmdk_desc d;
    int r = vmdk_desc_copy(image, &d, err);
    if (r < 0)
        return r;
    r = edit_backing(&d, parent, name, id, err);
    if (r == 0)
        r = vmdk_store(image, &d, flags & DR_TRY ? VMDK_STORE_TRY : 0, err);
    vmdk_desc_free(&d);
    return r;
}

int vmdk_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                     const char *format, unsigned flags, struct dr_error *err)
{
    const struct vmdk_state *s = vmdk_of(image);
    int r = name ? check_name(image, name, err) : 0;
    if (r == 0)
        r = check_parent(image, parent, format, err);
    if (r < 0)
        return r;
    for (size_t i = 0; name && i < s->n_extents; i++)
        if (s->extents[i].type != VMDK_SPARSE)
            return dr_fail(err, EINVAL,
                           "%s: only sparse extents can have a parent, this image has one of type "
                           "%s",
                           image->path, s->extents[i].type_name);
    uint32_t id = new_parent_id(image, parent, name);
    /* A commit tries with the parent it has, and then records an id that is not known yet: all
     * digits may change. */
    if ((flags & DR_TRY) && id == vmdk_parent_id(image))
        id = ~id;
    r = record(image, parent, name, id, flags, err);
    if (r < 0 || (flags & DR_TRY))
        return r;
    return remember(image, name, id, err);
}
