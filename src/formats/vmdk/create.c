/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* New images, laid out as VMware and QEMU do. The extents come first, the descriptor (or, where it
 * is embedded, the header) last: a crash leaves files that nothing takes for an image. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/codec.h"
#include "base/random.h"
#include "formats/vmdk/cowd.h"
#include "formats/vmdk/stream.h"

const struct dr_option_help vmdk_create_options[] = {
    {"adapter_type", "str",
     "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX", NULL},
    {"compat6", "bool (on/off)", "VMDK version 6 image", "off"},
    {"hwversion", "str", "VMDK hardware version", "undefined"},
    {"toolsversion", "str", "VMware guest tools version", NULL},
    {"subformat", "str",
     "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
     "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized | vmfs | vmfsSparse}",
     NULL},
    {"compression_level", "num", "streamOptimized: 1 (fast) to 12 (small)", NULL},
    {"zeroed_grain", "bool (on/off)",
     "Enable efficient zero writes using the zeroed-grain GTE feature", NULL},
    {NULL, NULL, NULL, NULL},
};

struct subformat {
    const char *name, *type; /* of the extents */
    bool split, sparse;
    const char *suffix; /* of the extents' names; NULL: all in one file */
    bool stream, cowd;
};

static const struct subformat subformats[] = {
    {"monolithicSparse", "SPARSE", false, true, NULL, false, false},
    {"monolithicFlat", "FLAT", false, false, "-flat", false, false},
    {"twoGbMaxExtentSparse", "SPARSE", true, true, "-s", false, false},
    {"twoGbMaxExtentFlat", "FLAT", true, false, "-f", false, false},
    {"vmfs", "VMFS", false, false, "-flat", false, false},
    {"vmfsSparse", "VMFSSPARSE", false, true, "-delta", false, true},
    {VMDK_STREAM_TYPE, "SPARSE", false, true, NULL, true, false},
};

struct piece {
    uint64_t sectors;
    char *name;
};

/* Everything about the image to be made. */
struct plan {
    struct dr_fs *fs;
    const char *path;
    const struct dr_create_params *params;
    const struct subformat *sub;
    char *adapter, *hwversion, *toolsversion; /* owned; NULL = default */
    bool compat6, zero_grains;
    int level; /* of compression; 0 = default */
    uint64_t sectors;
    struct piece *pieces;
    size_t n_pieces;
    const char *adopted_type; /* of data that is there, and whether it is sparse */
    bool pieces_sparse;
    uint32_t cid, parent_cid;
    char **made; /* paths, to be removed on failure */
    size_t n_made;
};

static void plan_free(struct plan *p)
{
    for (size_t i = 0; i < p->n_pieces; i++)
        free(p->pieces[i].name);
    for (size_t i = 0; i < p->n_made; i++)
        free(p->made[i]);
    free(p->pieces);
    free(p->made);
    free(p->adapter);
    free(p->hwversion);
    free(p->toolsversion);
}

/* ------------------------------------------------------------------ options */

static const struct subformat *find_subformat(const char *name)
{
    for (size_t i = 0; i < sizeof(subformats) / sizeof(subformats[0]); i++)
        if (strcasecmp(subformats[i].name, name) == 0)
            return &subformats[i];
    return NULL;
}

static int option_subformat(struct plan *p, const char *value, struct dr_error *err)
{
    p->sub = find_subformat(value);
    if (p->sub)
        return 0;
    return dr_fail(err, EINVAL, "%s: invalid parameter value: %s", p->path, value);
}

const char *vmdk_adapter_name(const char *name)
{
    static const char *const names[] = {"ide", "lsilogic", "buslogic", "legacyESX"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (strcasecmp(names[i], name) == 0)
            return names[i];
    return NULL;
}

static int option_adapter(struct plan *p, const char *value, struct dr_error *err)
{
    const char *name = vmdk_adapter_name(value);
    if (!name)
        return dr_fail(err, EINVAL, "%s: Unknown adapter type: %s", p->path, value);
    free(p->adapter);
    p->adapter = strdup(name);
    return p->adapter ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
}

static int option_bool(const struct plan *p, const struct dr_option *o, bool *value,
                       struct dr_error *err)
{
    *value = strcmp(o->value, "on") == 0;
    if (*value || strcmp(o->value, "off") == 0)
        return 0;
    return dr_fail(err, EINVAL, "%s: Parameter '%s' expects 'on' or 'off'", p->path, o->name);
}

bool vmdk_value_is_writable(const char *value)
{
    return vmdk_name_is_writable(value) && strlen(value) <= 64;
}

static int option_text(const struct plan *p, const struct dr_option *o, char **value,
                       struct dr_error *err)
{
    if (!vmdk_value_is_writable(o->value))
        return dr_fail(err, EINVAL, "%s: '%s' cannot be the value of %s", p->path, o->value,
                       o->name);
    free(*value);
    *value = strdup(o->value);
    return *value ? 0 : dr_fail_errno(err, ENOMEM, "%s", p->path);
}

static int option_level(struct plan *p, const char *value, struct dr_error *err)
{
    char *end;
    long level = strtol(value, &end, 10);
    if (end == value || *end || level < 1 || level > DR_ZLIB_MAX)
        return dr_fail(err, EINVAL, "%s: compression_level '%s', expected 1 to %d", p->path, value,
                       DR_ZLIB_MAX);
    p->level = (int)level;
    return 0;
}

static int take_option(struct plan *p, const struct dr_option *o, struct dr_error *err)
{
    if (strcmp(o->name, "subformat") == 0)
        return option_subformat(p, o->value, err);
    if (strcmp(o->name, "adapter_type") == 0)
        return option_adapter(p, o->value, err);
    if (strcmp(o->name, "compat6") == 0)
        return option_bool(p, o, &p->compat6, err);
    if (strcmp(o->name, "zeroed_grain") == 0)
        return option_bool(p, o, &p->zero_grains, err);
    if (strcmp(o->name, "compression_level") == 0)
        return option_level(p, o->value, err);
    if (strcmp(o->name, "hwversion") == 0)
        return option_text(p, o, &p->hwversion, err);
    if (strcmp(o->name, "toolsversion") == 0)
        return option_text(p, o, &p->toolsversion, err);
    return dr_fail(err, EINVAL, "%s: vmdk: unknown create option '%s'", p->path, o->name);
}

/* A child is sparse, and split as its parent is. */
static bool like_is_split(const struct plan *p)
{
    const struct dr_image *like = p->params->like;
    if (!like || !vmdk_is(like))
        return false;
    CLEANUP_FREE char *type = vmdk_desc_get(&vmdk_of(like)->desc, "createType");
    return type && strcasestr(type, "GbMaxExtent");
}

/* VMware's own children leave most of the data base to their parents. */
static char *inherited(const struct plan *p, const char *key)
{
    const struct dr_image *image = p->params->like;
    const struct dr_chain *chain = p->params->like_chain;
    char *value = image && vmdk_is(image) ? vmdk_desc_get(&vmdk_of(image)->desc, key) : NULL;
    for (size_t i = 1; !value && chain && i < chain->n && vmdk_is(chain->images[i]); i++)
        value = vmdk_desc_get(&vmdk_of(chain->images[i])->desc, key);
    return value;
}

/* The machine of a disk whose descriptor was lost is most likely one of an ESXi host. */
static bool is_adopted_from_a_host(const struct plan *p)
{
    return p->params->n_adopt && strcmp(p->sub->type, "VMFS") == 0;
}

static void inherit(struct plan *p)
{
    if (!p->adapter)
        p->adapter = inherited(p, "ddb.adapterType");
    if (!p->hwversion && !p->compat6)
        p->hwversion = inherited(p, "ddb.virtualHWVersion");
}

static bool like_is_cowd(const struct plan *p)
{
    const struct dr_image *like = p->params->like;
    return like && vmdk_is(like) && vmdk_of(like)->n_extents > 0 &&
           vmdk_of(like)->extents[0].h.cowd;
}

static const char *default_subformat(const struct plan *p)
{
    if (like_is_cowd(p))
        return "vmfsSparse";
    return like_is_split(p) ? "twoGbMaxExtentSparse" : "monolithicSparse";
}

static int read_options(struct plan *p, struct dr_error *err)
{
    for (size_t i = 0; i < p->params->n_options; i++) {
        int r = take_option(p, &p->params->options[i], err);
        if (r < 0)
            return r;
    }
    if (p->compat6 && p->hwversion)
        return dr_fail(err, EINVAL, "%s: compat6 cannot be enabled with hwversion set", p->path);
    inherit(p);
    if (!p->sub && p->params->n_adopt)
        p->sub = find_subformat(p->adopted_type);
    if (p->params->n_adopt &&
        (!p->sub->suffix || p->sub->cowd || p->sub->sparse != p->pieces_sparse ||
         (p->n_pieces > 1 && !p->sub->split)))
        return dr_fail(err, EINVAL, "%s: what the data is goes with %s, not with %s", p->path,
                       p->adopted_type, p->sub->name);
    if (!p->sub)
        p->sub = find_subformat(default_subformat(p));
    if (p->level && !p->sub->stream)
        return dr_fail(err, EINVAL, "%s: compression_level goes with streamOptimized only",
                       p->path);
    if (p->zero_grains && p->sub->stream)
        return dr_fail(err, EINVAL, "%s: a stream leaves zeros out and has no zeroed grains",
                       p->path);
    if (p->zero_grains && p->sub->cowd)
        return dr_fail(err, EINVAL, "%s: vmfsSparse has no zeroed grains", p->path);
    if (p->zero_grains && !p->sub->sparse)
        return dr_fail(err, EINVAL, "%s: Flat image can't enable zeroed grain", p->path);
    return 0;
}

static int read_backing(struct plan *p, struct dr_error *err)
{
    const struct dr_create_params *params = p->params;
    const char *format = params->backing ? params->backing->fmt->name : params->backing_format;
    p->parent_cid = VMDK_NO_PARENT;
    if (!params->backing_name)
        return 0;
    if (!p->sub->sparse)
        return dr_fail(err, EINVAL, "%s: Flat image can't have backing file", p->path);
    if (p->sub->stream)
        return dr_fail(err, EINVAL,
                       "%s: streamOptimized is for whole disks, which have no backing file",
                       p->path);
    if (!vmdk_name_is_writable(params->backing_name) || strlen(params->backing_name) >= PATH_MAX)
        return dr_fail(err, EINVAL,
                       "%s: a VMDK cannot record the parent's name \"%s\": it has a quote or a "
                       "line end, or is too long",
                       p->path, params->backing_name);
    if (format && strcmp(format, "vmdk") != 0)
        return dr_fail(err, EINVAL, "%s: a VMDK's parent must be a VMDK, not %s", p->path, format);
    if (!params->backing)
        return dr_fail(err, EINVAL,
                       "%s: a VMDK records its parent's CID: it cannot be made without opening %s",
                       p->path, params->backing_name);
    p->parent_cid = vmdk_id(params->backing);
    return vmdk_check_parent_id(params->backing, err);
}

/* ------------------------------------------------------------------ pieces */

/* The name of the n-th extent (from 0), without directory: X-s001.vmdk, X-flat.vmdk. */
static char *piece_name(const struct plan *p, size_t n)
{
    const char *base = dr_path_basename(p->path), *dot = strrchr(base, '.');
    int stem = dot && dot != base ? (int)(dot - base) : (int)strlen(base);
    const char *ext = dot && dot != base ? dot : ".vmdk";
    char *name;
    if (!p->sub->suffix)
        return strdup(base);
    int r = p->sub->split ? asprintf(&name, "%.*s%s%03zu%s", stem, base, p->sub->suffix, n + 1, ext)
                          : asprintf(&name, "%.*s%s%s", stem, base, p->sub->suffix, ext);
    return r < 0 ? NULL : name;
}

/* The pieces are files that are there. */
static int adopt_pieces(struct plan *p, struct dr_error *err)
{
    const struct dr_create_params *params = p->params;
    const char *place = params->final ? params->final : p->path;
    struct vmdk_adopted *a = NULL;
    size_t n = 0;
    int r =
        vmdk_adopt(p->fs, place, params->adopt, params->n_adopt, params->file_flags, &a, &n, err);
    p->pieces = r == 0 ? calloc(n, sizeof(*p->pieces)) : NULL;
    if (r == 0 && !p->pieces)
        r = dr_fail_errno(err, ENOMEM, "%s", place);
    for (size_t i = 0; r == 0 && i < n; i++) {
        if (a[i].sectors >= VMDK_MAX_SECTORS - p->sectors)
            r = dr_fail(err, EFBIG, "%s: the files are more than a VMDK can have", place);
        p->pieces[i] = (struct piece){a[i].sectors, DR_STEAL(a[i].name)};
        p->n_pieces = i + 1;
        p->sectors += a[i].sectors;
    }
    if (r == 0) {
        p->pieces_sparse = a[0].sparse;
        for (size_t i = 0; i < n; i++)
            a[i].name = p->pieces[i].name;
        p->adopted_type = vmdk_adopted_type(a, n);
    }
    for (size_t i = 0; r < 0 && a && i < n; i++)
        free(a[i].name);
    free(a);
    return r;
}

/* The size of the n-th piece: the parent's cuts if they are for a disk of this size. */
static uint64_t piece_size(const struct plan *p, size_t n, uint64_t left)
{
    const struct dr_image *like = p->params->like;
    if (!p->sub->split)
        return left;
    if (like && like_is_split(p) && like->size == p->sectors * VMDK_SECTOR &&
        n < vmdk_of(like)->n_extents)
        return vmdk_of(like)->extents[n].len / VMDK_SECTOR;
    return dr_min(left, VMDK_SPLIT_SECTORS);
}

static int cut_pieces(struct plan *p, struct dr_error *err)
{
    uint64_t left = p->sectors;
    do {
        struct piece *grown = realloc(p->pieces, (p->n_pieces + 1) * sizeof(*grown));
        if (!grown)
            return dr_fail_errno(err, ENOMEM, "%s", p->path);
        p->pieces = grown;
        uint64_t sectors = dr_min(left, piece_size(p, p->n_pieces, left));
        grown[p->n_pieces].sectors = sectors;
        grown[p->n_pieces].name = piece_name(p, p->n_pieces);
        if (!grown[p->n_pieces++].name)
            return dr_fail_errno(err, ENOMEM, "%s", p->path);
        left -= sectors;
    } while (left > 0);
    return 0;
}

/* ------------------------------------------------------------------ the descriptor's text */

struct vmdk_geometry vmdk_geometry_of(const char *adapter, uint64_t sectors)
{
    bool ide = strcasecmp(adapter, "ide") == 0;
    struct vmdk_geometry g = {.heads = ide ? 16 : 255, .sectors = 63};
    uint64_t cylinders = dr_max(sectors / ((uint64_t)g.heads * g.sectors), 1);
    g.cylinders = dr_min(cylinders, ide ? 16383 : 65535);
    return g;
}

static void print_geometry(FILE *f, const struct plan *p, const char *adapter)
{
    struct vmdk_geometry g = vmdk_geometry_of(adapter, p->sectors);
    fprintf(f, "ddb.geometry.cylinders = \"%llu\"\n", (unsigned long long)g.cylinders);
    fprintf(f, "ddb.geometry.heads = \"%u\"\n", g.heads);
    fprintf(f, "ddb.geometry.sectors = \"%u\"\n", g.sectors);
}

/* Without an encoding VMware takes names to be in the machine's own. */
static bool has_foreign_letters(const struct plan *p)
{
    bool found = false;
    for (const char *c = p->params->backing_name; c && *c; c++)
        found |= (unsigned char)*c >= 0x80;
    for (size_t i = 0; i < p->n_pieces; i++)
        for (const char *c = p->pieces[i].name; *c; c++)
            found |= (unsigned char)*c >= 0x80;
    return found;
}

/* As VMware's begin. */
static void print_uuid(FILE *f)
{
    uint8_t id[16];
    dr_random(id, sizeof(id));
    fprintf(f, "ddb.uuid = \"60 00 C2 9%x", id[3] & 0x0f);
    for (size_t i = 4; i < sizeof(id); i++)
        fprintf(f, "%s%02x", i == 8 ? "-" : " ", id[i]);
    fprintf(f, "\"\n");
}

static void print_text(FILE *f, const struct plan *p)
{
    bool stream = p->sub->stream;
    /* ESXi starts no machine from a SCSI disk that says ide, and takes its own kinds as such. */
    bool host = stream || p->sub->cowd || is_adopted_from_a_host(p);
    const char *adapter = p->adapter ? p->adapter : host ? "lsilogic" : "ide";
    fprintf(f, "# Disk DescriptorFile\nversion=1\n");
    if (has_foreign_letters(p))
        fprintf(f, "encoding=\"UTF-8\"\n");
    fprintf(f, "CID=%08x\nparentCID=%08x\n", p->cid, p->parent_cid);
    fprintf(f, "createType=\"%s\"\n", p->sub->name);
    if (p->params->backing_name)
        fprintf(f, "parentFileNameHint=\"%s\"\n", p->params->backing_name);
    fprintf(f, "\n# Extent description\n");
    for (size_t i = 0; i < p->n_pieces; i++)
        fprintf(f, "%s %llu %s \"%s\"%s\n", stream ? "RDONLY" : "RW",
                (unsigned long long)p->pieces[i].sectors, p->sub->type, p->pieces[i].name,
                strcmp(p->sub->type, "FLAT") == 0 ? " 0" : "");
    /* The blank behind "Base" is VMware's. */
    fprintf(f, "\n# The Disk Data Base \n#DDB\n\n");
    fprintf(f, "ddb.adapterType = \"%s\"\n", adapter);
    print_geometry(f, p, adapter);
    /* VMware's own end with the CID. */
    fprintf(f, "ddb.longContentID = \"%08x%08x%08x%08x\"\n", vmdk_random_cid(8), vmdk_random_cid(8),
            vmdk_random_cid(8), p->cid);
    fprintf(f, "ddb.toolsVersion = \"%s\"\n", p->toolsversion ? p->toolsversion : "2147483647");
    if (!p->params->backing_name) /* a child is known by its base's */
        print_uuid(f);
    fprintf(f, "ddb.virtualHWVersion = \"%s\"\n",
            p->hwversion ? p->hwversion
                         : (p->compat6 ? "6"
                            : host     ? "8"
                                       : "4"));
}

static int make_text(const struct plan *p, char **text, size_t *len, struct dr_error *err)
{
    *text = NULL;
    FILE *f = open_memstream(text, len);
    if (!f)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    print_text(f, p);
    if (fclose(f) != 0 || !*text) /* closing allocates, and does not say when it could not */
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    size_t room = p->sub->suffix ? VMDK_DESC_MAX : VMDK_DESC_SECTORS * VMDK_SECTOR;
    if (*len >= room)
        return dr_fail(err, ENOSPC, "%s: the descriptor would have %zu bytes, less than %zu fit",
                       p->path, *len, room);
    return 0;
}

/* ------------------------------------------------------------------ files */

static int new_file(struct plan *p, const char *name, struct dr_file **f, struct dr_error *err)
{
    CLEANUP_FREE char *path = dr_path_sibling(p->path, name);
    char **grown = realloc(p->made, (p->n_made + 1) * sizeof(*grown));
    if (grown)
        p->made = grown;
    if (!path || !grown)
        return dr_fail_errno(err, ENOMEM, "%s", p->path);
    int r = dr_file_open(p->fs, path, DR_FILE_CREATE | p->params->file_flags, f, err);
    if (r == 0)
        p->made[p->n_made++] = DR_STEAL(path);
    return r;
}

/* One grain directory: every table has its place; the tables themselves stay a hole. */
static int write_directory(struct dr_file *f, const struct vmdk_header *h, uint64_t sector,
                           struct dr_error *err)
{
    size_t size = (size_t)(h->gd_sectors * VMDK_SECTOR);
    if (size == 0)
        return 0;
    CLEANUP_FREE uint8_t *buf = calloc(1, size);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    for (uint64_t i = 0; i < h->n_tables; i++)
        put_le32(buf + i * 4, (uint32_t)(sector + h->gd_sectors + i * h->gt_sectors));
    return dr_file_pwrite(f, buf, sector * VMDK_SECTOR, size, err);
}

/* The header comes last, behind a flush: an extent with a magic number is complete. */
static int write_sparse(struct dr_file *f, const struct vmdk_header *h, const char *text,
                        size_t len, struct dr_error *err)
{
    uint8_t buf[VMDK_HEADER_SIZE];
    vmdk_header_encode(h, buf);
    int r = dr_file_truncate(f, h->overhead * VMDK_SECTOR, err);
    if (r == 0 && text)
        r = dr_file_pwrite(f, text, h->desc_off * VMDK_SECTOR, len, err);
    if (r == 0)
        r = write_directory(f, h, h->rgd_off, err);
    if (r == 0)
        r = write_directory(f, h, h->gd_off, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = dr_file_pwrite(f, buf, 0, sizeof(buf), err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int write_flat(struct dr_file *f, uint64_t sectors, struct dr_error *err)
{
    int r = dr_file_truncate(f, sectors * VMDK_SECTOR, err);
    return r < 0 ? r : dr_file_flush(f, err);
}

static int layout_piece(const struct plan *p, const struct piece *piece, struct vmdk_header *h,
                        struct dr_error *err)
{
    if (p->sub->cowd)
        return vmdk_cowd_layout(h, p->path, piece->sectors, err);
    return vmdk_header_layout(h, p->path, piece->sectors, VMDK_DEFAULT_GRAIN,
                              p->sub->suffix ? 0 : VMDK_DESC_SECTORS, p->zero_grains, err);
}

/* text: the embedded descriptor, or NULL. */
static int make_piece(struct plan *p, const struct piece *piece, const char *text, size_t len,
                      struct dr_error *err)
{
    struct vmdk_header h = {0};
    struct dr_file *f = NULL;
    int r = p->sub->sparse ? layout_piece(p, piece, &h, err) : 0;
    if (r < 0)
        return r;
    r = new_file(p, piece->name, &f, err);
    if (r < 0)
        return r;
    if (p->sub->cowd)
        r = vmdk_cowd_write_new(f, &h, err);
    else if (p->sub->sparse)
        r = write_sparse(f, &h, text, len, err);
    else
        r = write_flat(f, piece->sectors, err);
    dr_file_unref(f);
    return r;
}

int vmdk_make_extent(struct dr_fs *fs, const char *path, const struct vmdk_new_extent *how,
                     struct dr_error *err)
{
    struct vmdk_header h = {0};
    struct dr_file *f = NULL;
    int r = how->sparse
                ? vmdk_header_layout(&h, path, how->sectors, how->grain, 0, how->zero_grains, err)
                : 0;
    if (r == 0)
        r = dr_file_open(fs, path, DR_FILE_CREATE, &f, err);
    if (r < 0)
        return r;
    r = how->sparse ? write_sparse(f, &h, NULL, 0, err) : write_flat(f, how->sectors, err);
    dr_file_unref(f);
    if (r < 0)
        fs->ops->unlink(fs, path, NULL);
    return r;
}

static int sync_names(const struct plan *p, struct dr_error *err)
{
    return p->params->file_flags & DR_FILE_NO_FLUSH ? 0 : p->fs->ops->sync_dir(p->fs, p->path, err);
}

static int make_text_file(struct plan *p, const char *text, size_t len, struct dr_error *err)
{
    struct dr_file *f = NULL;
    int r = sync_names(p, err); /* the extents' */
    if (r == 0)
        r = new_file(p, dr_path_basename(p->path), &f, err);
    if (r < 0)
        return r;
    r = dr_file_pwrite(f, text, 0, len, err);
    if (r == 0)
        r = dr_file_flush(f, err);
    dr_file_unref(f);
    return r;
}

static int make_files(struct plan *p, struct dr_error *err)
{
    CLEANUP_FREE char *text = NULL;
    size_t len;
    int r = make_text(p, &text, &len, err);
    if (r == 0 && !p->sub->suffix)
        r = make_piece(p, &p->pieces[0], text, len, err);
    size_t n = p->sub->suffix && !p->params->n_adopt ? p->n_pieces : 0;
    for (size_t i = 0; r == 0 && i < n; i++)
        r = make_piece(p, &p->pieces[i], NULL, 0, err);
    if (r == 0 && p->sub->suffix)
        r = make_text_file(p, text, len, err);
    if (r == 0)
        r = sync_names(p, err);
    while (r < 0 && p->n_made > 0) {
        p->fs->ops->unlink(p->fs, p->made[--p->n_made], NULL);
        free(p->made[p->n_made]);
    }
    return r;
}

/* A disk that is all zeros. */
static int make_empty_stream(struct plan *p, struct dr_error *err)
{
    struct dr_file *f = NULL;
    void *state = NULL;
    int r = new_file(p, dr_path_basename(p->path), &f, err);
    if (r < 0)
        return r;
    r = vmdk_sequential.begin(p->path, p->params, f, &state, err);
    if (r == 0)
        r = vmdk_sequential.finish(state, err);
    vmdk_sequential.free(state);
    if (r == 0)
        r = dr_file_flush(f, err);
    if (r == 0)
        r = sync_names(p, err);
    dr_file_unref(f);
    if (r < 0)
        p->fs->ops->unlink(p->fs, p->made[0], NULL);
    return r;
}

/* VMware's limit for disks that grow: its tables cannot lead further. Who has such a parent has
 * decided already. */
#define MAX_SPARSE_SECTORS (UINT64_C(1) << 32)

static int refuse_oversize(const struct plan *p, struct dr_error *err)
{
    const struct dr_create_params *params = p->params;
    if (p->sectors <= MAX_SPARSE_SECTORS || !p->sub->sparse || p->sub->stream || params->force ||
        params->backing || params->like || params->n_adopt)
        return 0;
    return dr_fail(err, EFBIG,
                   "%s: %llu bytes: VMware takes no growing VMDK of more than 2 TiB; a flat one "
                   "(subformat=monolithicFlat) may be larger, and --force makes this one",
                   p->path, (unsigned long long)params->size);
}

/* Everything but the files. */
static int make_plan(struct plan *p, struct dr_error *err)
{
    const struct dr_create_params *params = p->params;
    const char *path = p->path;
    if (!vmdk_name_is_writable(dr_path_basename(path)))
        return dr_fail(err, EINVAL,
                       "%s: a VMDK's name must not have quotes or line ends: it stands in the "
                       "descriptor",
                       path);
    if (params->size > VMDK_MAX_SECTORS * VMDK_SECTOR - VMDK_SECTOR)
        return dr_fail(err, EFBIG, "%s: %llu bytes are more than a VMDK can have", path,
                       (unsigned long long)params->size);
    p->sectors = dr_div_up(params->size, VMDK_SECTOR);
    if (params->n_adopt)
        p->sectors = 0;
    int r = params->n_adopt ? adopt_pieces(p, err) : 0;
    if (r == 0)
        r = read_options(p, err);
    if (r == 0)
        r = read_backing(p, err);
    if (r == 0)
        r = refuse_oversize(p, err);
    return r < 0 || params->n_adopt ? r : cut_pieces(p, err);
}

int vmdk_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                struct dr_error *err)
{
    struct plan p = {.fs = fs, .path = path, .params = params, .cid = vmdk_random_cid(8)};
    int r = make_plan(&p, err);
    if (r == 0)
        r = p.sub->stream ? make_empty_stream(&p, err) : make_files(&p, err);
    plan_free(&p);
    return r;
}

/* ------------------------------------------------------------------ streams */

int vmdk_stream_wanted(const char *path, const struct dr_create_params *params,
                       struct dr_error *err)
{
    const struct subformat *sub = NULL;
    (void)path;
    (void)err;
    for (size_t i = 0; i < params->n_options; i++)
        if (strcmp(params->options[i].name, "subformat") == 0)
            sub = find_subformat(params->options[i].value);
    return sub && sub->stream;
}

int vmdk_stream_plan(const char *path, const struct dr_create_params *params,
                     struct vmdk_stream_plan *plan, struct dr_error *err)
{
    struct plan p = {.path = path, .params = params, .cid = vmdk_random_cid(8)};
    int r = make_plan(&p, err);
    if (r == 0)
        r = make_text(&p, &plan->text, &plan->len, err);
    plan->sectors = p.sectors;
    plan->level = p.level;
    plan_free(&p);
    return r;
}

/* ------------------------------------------------------------------ measure */

/* Pieces are whole grains but for the last, so the disk's grains are the pieces' grains. */
static int measure_piece(const struct plan *p, size_t i, struct dr_cost *cost, struct dr_error *err)
{
    struct vmdk_header h = {0};
    uint64_t sectors = p->pieces[i].sectors;
    if (p->sub->sparse) {
        int r = layout_piece(p, &p->pieces[i], &h, err);
        if (r < 0)
            return r;
        sectors = h.overhead;
        if (p->sub->cowd) /* the most that they can be */
            sectors += h.n_tables * h.gt_sectors;
        cost->unit = (p->sub->cowd ? h.grain : VMDK_DEFAULT_GRAIN) * VMDK_SECTOR;
    }
    cost->fixed += sectors * VMDK_SECTOR;
    return 0;
}

int vmdk_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                 struct dr_error *err)
{
    struct dr_create_params any = *params;
    struct plan p = {.path = path, .params = &any, .cid = vmdk_random_cid(8)};
    CLEANUP_FREE char *text = NULL;
    any.force = true; /* nothing is made */
    size_t len = 0;
    *cost = (struct dr_cost){0};
    int r = make_plan(&p, err);
    if (r == 0 && p.sub->stream)
        r = dr_fail(err, ENOTSUP, "%s: how long a stream gets depends on what it compresses", path);
    if (r == 0)
        r = make_text(&p, &text, &len, err);
    for (size_t i = 0; r == 0 && i < p.n_pieces; i++)
        r = measure_piece(&p, i, cost, err);
    if (r == 0 && p.sub->suffix) /* else it stands in the extent; the names may be any */
        cost->fixed += len + p.n_pieces * NAME_MAX;
    plan_free(&p);
    return r;
}
