/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* VirtualBox's children. They have neither a parentCID nor a name of the parent, which only the
 * machine's settings have, but its UUID: read alone they would be a disk full of zeros. The parent
 * is looked for among the disks in the same directory. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "formats/vmdk/vmdk.h"

#define MAX_LOOKED_AT 4096u  /* files of a directory */
#define HEAD          65536u /* bytes in which the text of a disk has its UUID */

/* Only the digits count. */
static bool same_uuid(const char *a, const char *b)
{
    unsigned digits = 0;
    for (;;) {
        while (*a && !isxdigit((unsigned char)*a))
            a++;
        while (*b && !isxdigit((unsigned char)*b))
            b++;
        if (!*a || !*b)
            return *a == *b && digits == 32;
        if (tolower((unsigned char)*a++) != tolower((unsigned char)*b++))
            return false;
        digits++;
    }
}

static bool is_nil(const char *uuid)
{
    return uuid[strspn(uuid, "0-{} ")] == '\0';
}

/* Where the text begins in a file that starts so. */
static uint64_t text_offset(const uint8_t *buf, size_t len)
{
    bool embedded = vmdk_magic(buf, len) == VMDK_MAGIC_KDMV && len >= VMDK_HEADER_SIZE;
    uint64_t sector = embedded ? get_le64(buf + 28) : 0;
    return sector < VMDK_MAX_SECTORS ? sector * VMDK_SECTOR : 0;
}

/* The value of the key in the descriptor of a file; NULL: it is no disk that says so. */
static char *value_of_file(struct dr_file *f, const char *key)
{
    CLEANUP_FREE char *buf = malloc(HEAD);
    struct vmdk_desc d;
    size_t got = 0;
    if (!buf || dr_file_pread_short(f, buf, 0, VMDK_HEADER_SIZE, &got, NULL) < 0)
        return NULL;
    uint64_t off = text_offset((uint8_t *)buf, got);
    bool is_text = vmdk_magic((uint8_t *)buf, got) == VMDK_MAGIC_NONE;
    /* In the data of a flat disk a guest may write what looks like a descriptor. */
    if (is_text ? dr_file_size(f) > VMDK_DESC_MAX : off == 0)
        return NULL;
    if (dr_file_pread_short(f, buf, off, HEAD, &got, NULL) < 0 ||
        vmdk_desc_parse(&d, f->path, buf, got, NULL) < 0)
        return NULL;
    char *value = vmdk_desc_get(&d, key);
    vmdk_desc_free(&d);
    return value;
}

struct search {
    const struct dr_image *image;
    const char *uuid;
    unsigned looked_at;
    char *found, *second; /* names */
};

static bool is_named_vmdk(const char *name)
{
    size_t len = strlen(name);
    return len > 5 && strcasecmp(name + len - 5, ".vmdk") == 0 && vmdk_name_is_writable(name);
}

static int look_at(void *user, const char *name)
{
    static const struct dr_open_options defaults;
    struct search *s = user;
    struct dr_file *f;
    if (!is_named_vmdk(name) || strcmp(name, dr_path_basename(s->image->path)) == 0 ||
        s->looked_at++ >= MAX_LOOKED_AT || s->second)
        return 0;
    CLEANUP_FREE char *path = dr_path_sibling(s->image->path, name);
    if (!path || dr_gate_check(s->image->fs, s->image->path, path, &defaults, NULL) < 0 ||
        dr_file_open(s->image->fs, path, DR_FILE_NO_LOCK, &f, NULL) < 0)
        return 0;
    CLEANUP_FREE char *uuid = value_of_file(f, "ddb.uuid.image");
    dr_file_unref(f);
    if (uuid && same_uuid(uuid, s->uuid)) {
        char **place = s->found ? &s->second : &s->found;
        *place = strdup(name);
        return *place ? 0 : -ENOMEM;
    }
    return 0;
}

static int search_directory(struct search *s, struct dr_error *err)
{
    const struct dr_image *image = s->image;
    CLEANUP_FREE char *dir = dr_path_dirname(image->path);
    struct dr_error why = DR_ERROR_INIT;
    int r = dir ? 0 : -ENOMEM;
    if (r == 0 && image->fs->ops->list)
        r = image->fs->ops->list(image->fs, dir, look_at, s, &why);
    if (r < 0 && why.errnum)
        return dr_fail(err, -r,
                       "%s: a VirtualBox differencing image, whose parent is known by its UUID, "
                       "%s, and cannot be looked for: %s",
                       image->path, s->uuid, why.text);
    if (r < 0)
        return dr_fail_errno(err, -r, "%s", image->path);
    if (s->second)
        return dr_fail(err, EINVAL,
                       "%s: a VirtualBox differencing image, and both %s and %s have the UUID of "
                       "its parent, %s; say which it is: drover rebase -u -F vmdk -b PARENT %s",
                       image->path, s->found, s->second, s->uuid, image->path);
    if (s->found)
        return 0;
    return dr_fail(
        err, ENOENT,
        "%s: a VirtualBox differencing image, whose parent is known by its UUID, %s, and "
        "no disk in its directory has that; if you know which it is: drover rebase -u -F "
        "vmdk -b PARENT %s",
        image->path, s->uuid, image->path);
}

int vmdk_find_by_uuid(struct dr_image *image, struct dr_error *err)
{
    struct vmdk_state *s = vmdk_of(image);
    CLEANUP_FREE char *uuid = vmdk_desc_get(&s->desc, "ddb.uuid.parent");
    struct search search = {.image = image, .uuid = uuid};
    if (!uuid || is_nil(uuid) || s->parent_cid != VMDK_NO_PARENT)
        return 0;
    int r = search_directory(&search, err);
    if (r == 0) {
        s->by_uuid = true;
        image->backing_name = DR_STEAL(search.found);
    }
    free(search.found);
    free(search.second);
    return r;
}

int vmdk_check_uuid(const struct dr_image *image, const struct dr_image *parent,
                    struct dr_error *err)
{
    CLEANUP_FREE char *want = vmdk_desc_get(&vmdk_of(image)->desc, "ddb.uuid.parent");
    CLEANUP_FREE char *have = vmdk_desc_get(&vmdk_of(parent)->desc, "ddb.uuid.image");
    if (want && have && same_uuid(want, have))
        return 0;
    return dr_fail(
        err, ESTALE,
        "%s: was made on a disk with the UUID %s, but that of %s is %s; if you know that "
        "it is right: drover rebase -u -F vmdk -b PARENT %s",
        image->path, want ? want : "?", parent->path, have ? have : "not told", image->path);
}
