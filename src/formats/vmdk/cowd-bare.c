/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A COWD extent that is opened without its descriptor: for reading, with a text that stands for
 * the descriptor. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "formats/vmdk/cowd.h"

#define CHILD_SUFFIX "-delta.vmdk"

/* ESX calls the data of a child so, and leaves to the descriptor what its parent is. Read alone
 * it is full of zeros where only the parent has something. */
static int refuse_child(const struct dr_image *image, struct dr_error *err)
{
    const char *name = dr_path_basename(image->path);
    size_t len = strlen(name), suffix = strlen(CHILD_SUFFIX);
    if ((image->flags & (DR_OPEN_SALVAGE | DR_OPEN_NO_BACKING)) || len <= suffix ||
        strcmp(name + len - suffix, CHILD_SUFFIX) != 0)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: the data of a disk whose parent, if it has one, only its descriptor "
                   "knows: open %.*s.vmdk instead; `drover convert --salvage` takes what this file "
                   "has alone",
                   image->path, (int)(len - suffix), name);
}

static int print_parent(const struct dr_image *image, FILE *f,
                        const struct vmdk_cowd_origin *origin, struct dr_error *err)
{
    if (origin->parent[0] == '\0') {
        fprintf(f, "parentCID=ffffffff\n");
        return 0;
    }
    if (!vmdk_name_is_writable(origin->parent))
        return dr_fail(err, EINVAL,
                       "%s: the parent's name in the COWD header has a quote or a "
                       "line end",
                       image->path);
    fprintf(f, "parentCID=%08x\nparentFileNameHint=\"%s\"\n",
            origin->parent_generation == VMDK_NO_PARENT ? VMDK_NO_PARENT - 1
                                                        : origin->parent_generation,
            origin->parent);
    return 0;
}

int vmdk_cowd_text(const struct dr_image *image, const struct vmdk_header *h,
                   const struct vmdk_cowd_origin *origin, char **text, size_t *len,
                   struct dr_error *err)
{
    *text = NULL;
    int r = refuse_child(image, err);
    if (r < 0)
        return r;
    FILE *f = open_memstream(text, len);
    if (!f)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    fprintf(f, "# Disk DescriptorFile\nversion=1\nCID=%08x\ncreateType=\"vmfsSparse\"\n",
            origin->generation);
    r = print_parent(image, f, origin, err);
    fprintf(f, "RW %llu VMFSSPARSE \"this file\"\n", (unsigned long long)h->capacity);
    if ((fclose(f) != 0 || !*text) && r == 0)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return r;
}
