/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Files that a descriptor names otherwise than they are called here: it was written on another
 * system, or its disk was moved. They are looked for beside it, and nowhere else. */
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/cleanup.h"
#include "formats/vmdk/vmdk.h"

/* "C:\VMs\x.vmdk" → "/VMs/x.vmdk" */
char *vmdk_with_slashes(const char *name)
{
    bool drive = name[0] && name[1] == ':' && (name[2] == '\\' || name[2] == '/');
    char *s = strdup(name + (drive ? 2 : 0));
    for (char *p = s; p && *p; p++)
        if (*p == '\\')
            *p = '/';
    return s;
}

/* ------------------------------------------------------------------ in the directory */

struct search {
    const char *name;
    char *found;    /* called so but for the case */
    unsigned alike; /* names that are */
    bool exact;
};

static int look_at(void *user, const char *name)
{
    struct search *s = user;
    bool exact = strcmp(name, s->name) == 0;
    if (s->exact || strcasecmp(name, s->name) != 0)
        return 0;
    s->exact = exact;
    s->alike++;
    free(s->found);
    s->found = strdup(name);
    return s->found ? 0 : -ENOMEM;
}

char *vmdk_find_beside(const struct dr_image *image, const char *name)
{
    CLEANUP_FREE char *slashed = vmdk_with_slashes(name);
    CLEANUP_FREE char *dir = dr_path_dirname(image->path);
    struct search s = {.name = slashed ? dr_path_basename(slashed) : NULL};
    if (!dir || !s.name || s.name[0] == '\0' || !image->fs->ops->list)
        return NULL;
    int r = image->fs->ops->list(image->fs, dir, look_at, &s, NULL);
    if (r == 0 && (s.exact || s.alike == 1))
        return s.found;
    free(s.found); /* of two nobody can say which */
    return NULL;
}

/* ------------------------------------------------------------------ extents */

/* Under one of its names, or -ENOENT. */
static int open_as_named(struct dr_image *image, unsigned *index, const char *utf8,
                         const char *name, struct dr_error *err)
{
    if (!utf8)
        return dr_image_open_file(image, name, index, err);
    int r = dr_image_open_file(image, utf8, index, err);
    return r == 0 || dr_image_open_file(image, name, index, NULL) < 0 ? r : 0;
}

/* In the charset that the text says it is in; but a file may have come here with its bytes, or
 * from a system that does not tell cases apart, or from another directory. */
int vmdk_open_name(struct dr_image *image, struct vmdk_extent *e, const char *name,
                   struct dr_error *err)
{
    const struct vmdk_desc *d = &vmdk_of(image)->desc;
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *utf8 = vmdk_desc_to_utf8(d, name);
    int r = open_as_named(image, &e->file, utf8, name, &why);
    if (r == -ENOENT) { /* what is somewhere else, and not allowed, is not replaced */
        CLEANUP_FREE char *beside = vmdk_find_beside(image, utf8 ? utf8 : name);
        if (beside && dr_image_open_file(image, beside, &e->file, NULL) == 0)
            return 0;
    }
    if (r == 0)
        return 0;
    CLEANUP_FREE char *charset = vmdk_desc_unknown_charset(d, name);
    return charset
               ? dr_fail(err, -r, "%s (the descriptor is in the charset %s, which is not known)",
                         why.text, charset)
               : dr_fail(err, -r, "%s", why.text);
}
