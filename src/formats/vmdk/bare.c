/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* An extent of ESX that is opened without its descriptor: for reading, with a text that stands for
 * the descriptor. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "formats/vmdk/cowd.h"
#include "formats/vmdk/sesparse.h"

/* ESX calls the data of a child so, and leaves to the descriptor what its parent is. Read alone
 * it is full of zeros where only the parent has something. */
static int refuse_child(const struct dr_image *image, const char *suffix, struct dr_error *err)
{
    const char *name = dr_path_basename(image->path);
    size_t len = strlen(name), end = strlen(suffix);
    if (len <= end || strcmp(name + len - end, suffix) != 0)
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: the data of a disk whose parent, if it has one, only its descriptor "
                   "knows: open %.*s.vmdk instead; `drover convert --salvage` takes what this file "
                   "has alone",
                   image->path, (int)(len - end), name);
}

/* The same under another name: its header says that it is a child, and not whose. */
static int refuse_nameless(const struct dr_image *image, const struct vmdk_cowd_origin *origin,
                           struct dr_error *err)
{
    if (!origin->child || origin->parent[0] ||
        (image->flags & (DR_OPEN_SALVAGE | DR_OPEN_NO_BACKING)))
        return 0;
    return dr_fail(err, EINVAL,
                   "%s: the data of a disk with a parent, which only its descriptor knows: open "
                   "that instead; `drover convert --salvage` takes what this file has alone",
                   image->path);
}

static int print_parent(const struct dr_image *image, FILE *f,
                        const struct vmdk_cowd_origin *origin, struct dr_error *err)
{
    uint32_t id = origin->parent_generation;
    if (origin->parent[0] == '\0') {
        fprintf(f, "parentCID=ffffffff\n");
        return 0;
    }
    if (!vmdk_name_is_writable(origin->parent))
        return dr_fail(err, EINVAL, "%s: the parent's name in the header has a quote or a line end",
                       image->path);
    fprintf(f, "parentCID=%08x\nparentFileNameHint=\"%s\"\n",
            id == VMDK_NO_PARENT ? VMDK_NO_PARENT - 1 : id, origin->parent);
    return 0;
}

static int make_text(const struct dr_image *image, const char *type, uint64_t sectors,
                     const struct vmdk_cowd_origin *origin, struct dr_error *err)
{
    struct vmdk_desc *d = &vmdk_of(image)->desc;
    CLEANUP_FREE char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    if (!f)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    fprintf(f, "# Disk DescriptorFile\nversion=1\nCID=%08x\ncreateType=\"%s\"\n",
            origin->generation, strcmp(type, "SESPARSE") == 0 ? "seSparse" : "vmfsSparse");
    int r = print_parent(image, f, origin, err);
    fprintf(f, "RW %llu %s \"this file\"\n", (unsigned long long)sectors, type);
    if ((fclose(f) != 0 || !text) && r == 0)
        return dr_fail_errno(err, ENOMEM, "%s", image->path);
    return r < 0 ? r : vmdk_desc_parse(d, image->path, text, len, err);
}

int vmdk_open_bare(struct dr_image *image, enum vmdk_magic magic, struct vmdk_header *h,
                   struct dr_error *err)
{
    bool cowd = magic == VMDK_MAGIC_COWD;
    struct vmdk_cowd_origin origin = {.parent = ""};
    struct vmdk_sesparse se = {0};
    int r = image->flags & (DR_OPEN_SALVAGE | DR_OPEN_NO_BACKING)
                ? 0
                : refuse_child(image, cowd ? "-delta.vmdk" : "-sesparse.vmdk", err);
    vmdk_of(image)->embedded = vmdk_of(image)->bare = true;
    if (r < 0)
        return r;
    r = cowd ? vmdk_cowd_read(h, image->path, image->files[0], &origin, err)
             : vmdk_sesparse_read(&se, image->path, image->files[0], image->flags, err);
    if (r == 0)
        r = refuse_nameless(image, &origin, err);
    if (r < 0)
        return r;
    return make_text(image, cowd ? "VMFSSPARSE" : "SESPARSE", cowd ? h->capacity : se.capacity,
                     &origin, err);
}
