/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A new descriptor for data that is there: the disk's own was lost, or made useless. The files with
 * the data are only looked at. Of a split disk any piece may be named; all its pieces are found by
 * their numbers, and none may be missing. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/vmdk.h"

/* "X-s012.vmdk": stem "X-s", number 12, end ".vmdk". */
struct piece_name {
    size_t stem, digits; /* how many characters they are */
    unsigned number;
    const char *end;
};

static bool parse_name(const char *name, struct piece_name *p)
{
    const char *dot = strrchr(name, '.'), *digits = dot;
    if (!dot)
        return false;
    while (digits > name && isdigit((unsigned char)digits[-1]))
        digits--;
    if (dot - digits < 3 || dot - digits > 6 || digits - name < 3 || digits[-2] != '-' ||
        !strchr("fs", digits[-1]))
        return false;
    *p = (struct piece_name){(size_t)(digits - name), (size_t)(dot - digits),
                             (unsigned)strtoul(digits, NULL, 10), dot};
    return true;
}

/* ------------------------------------------------------------------ the pieces of a split disk */

struct pieces {
    const char *like; /* the name of one of them */
    struct piece_name parts;
    size_t width; /* numbers have so many digits at least; 0: it is not known */
    char **names; /* by number, from 1 on */
    unsigned n;
    char *other; /* a piece whose number has another width: it is another disk's */
    bool no_memory;
};

static bool is_filled_up(const char *name, const struct piece_name *parts)
{
    return name[parts->stem] == '0';
}

/* X-s001.vmdk and X-s0001.vmdk are of two disks, and so are X-s100.vmdk and X-s0001.vmdk. */
static bool same_width(const struct pieces *p, const char *name, const struct piece_name *parts)
{
    if (!is_filled_up(name, parts))
        return parts->digits >= p->width;
    return p->width ? parts->digits == p->width : parts->digits <= p->parts.digits;
}

static bool same_disk(const struct pieces *p, const char *name, struct piece_name *parts)
{
    return parse_name(name, parts) && parts->number > 0 && parts->stem == p->parts.stem &&
           strncmp(name, p->like, parts->stem) == 0 && strcmp(parts->end, p->parts.end) == 0 &&
           same_width(p, name, parts);
}

/* Only a number that was filled up tells the width: 1000 may come behind 999, or 0999. */
static int note_width(void *user, const char *name)
{
    struct pieces *p = user;
    struct piece_name parts;
    size_t width = p->width;
    p->width = 0;
    bool tells = same_disk(p, name, &parts) && is_filled_up(name, &parts);
    p->width = tells && width == 0 ? parts.digits : width;
    if (!tells || width == 0 || parts.digits == width)
        return 0;
    p->other = strdup(name);
    p->no_memory = !p->other;
    return 1;
}

static int find_width(struct dr_fs *fs, const char *dir, struct pieces *p, struct dr_error *err)
{
    int r = fs->ops->list(fs, dir, note_width, p, err);
    if (p->width == 0)
        p->width = 3;
    if (!p->other)
        return r > 0 ? -ENOMEM : r;
    return dr_fail(err, EINVAL,
                   "%s: may be a piece of %.*s%0*u%s's disk or of %s's, two disks by the widths of "
                   "their numbers: name one of those",
                   p->like, (int)p->parts.stem, p->like, (int)p->width, 1u, p->parts.end, p->other);
}

static int note_piece(void *user, const char *name)
{
    struct pieces *p = user;
    struct piece_name parts;
    if (!same_disk(p, name, &parts))
        return 0;
    if (parts.number > p->n) {
        char **grown = realloc(p->names, parts.number * sizeof(*grown));
        p->no_memory = !grown;
        if (!grown)
            return 1;
        memset(grown + p->n, 0, (parts.number - p->n) * sizeof(*grown));
        p->names = grown;
        p->n = parts.number;
    }
    if (!p->names[parts.number - 1])
        p->names[parts.number - 1] = strdup(name);
    p->no_memory = !p->names[parts.number - 1];
    return p->no_memory;
}

static void pieces_free(struct pieces *p)
{
    for (unsigned i = 0; i < p->n; i++)
        free(p->names[i]);
    free(p->names);
    free(p->other);
}

static int find_pieces(struct dr_fs *fs, const char *path, struct pieces *p, struct dr_error *err)
{
    CLEANUP_FREE char *dir = dr_path_dirname(path);
    int r = dir ? 0 : -ENOMEM;
    if (r == 0 && p->width == 0)
        r = find_width(fs, dir, p, err);
    if (r == 0)
        r = fs->ops->list(fs, dir, note_piece, p, err);
    if (!dir || p->no_memory)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    for (unsigned i = 0; r == 0 && i < p->n; i++)
        if (!p->names[i])
            r = dr_fail(err, ENOENT,
                        "%s: piece %u of %u of the disk %.*s... is missing; without it all that "
                        "follows would move",
                        path, i + 1, p->n, (int)p->parts.stem, p->like);
    return r;
}

/* ------------------------------------------------------------------ one file */

/* Has the extent a descriptor of its own that can be read? Then it is an image as it is. */
static int refuse_image(struct dr_file *f, const struct vmdk_header *h, struct dr_error *err)
{
    CLEANUP_FREE char *text = NULL;
    struct vmdk_desc d;
    size_t len;
    bool redo;
    if (h->desc_off == 0 || h->desc_len == 0 ||
        vmdk_load_embedded(f, h->desc_off * VMDK_SECTOR, h->desc_len * VMDK_SECTOR, &text, &len,
                           &redo, NULL) < 0 ||
        vmdk_desc_parse(&d, f->path, text, len, NULL) < 0)
        return 0;
    vmdk_desc_free(&d);
    return dr_fail(err, EINVAL, "%s: has its descriptor inside, and can be opened as it is",
                   f->path);
}

static int look_at_sparse(struct dr_file *f, const uint8_t *head, struct vmdk_adopted *a,
                          struct dr_error *err)
{
    struct vmdk_header h;
    int r = vmdk_header_decode(&h, f->path, head, dr_file_size(f), err);
    if (r == 0 && (h.flags & VMDK_FLAG_COMPRESSED))
        r = dr_fail(err, ENOTSUP, "%s: a stream, which cannot be an extent of another disk",
                    f->path);
    if (r == 0)
        r = refuse_image(f, &h, err);
    a->sparse = true;
    a->sectors = h.capacity;
    return r;
}

static int look_at(struct dr_file *f, struct vmdk_adopted *a, struct dr_error *err)
{
    uint8_t head[VMDK_HEADER_SIZE] = {0};
    uint64_t size = dr_file_size(f);
    size_t got;
    int r = dr_file_pread_short(f, head, 0, sizeof(head), &got, err);
    if (r < 0)
        return r;
    if (vmdk_magic(head, got) != VMDK_MAGIC_NONE)
        return look_at_sparse(f, head, a, err);
    if (vmdk_desc_probe(head, got) > 0)
        return dr_fail(err, EINVAL, "%s: is a descriptor itself, and no data", f->path);
    if (size == 0 || size % VMDK_SECTOR)
        return dr_fail(err, EINVAL, "%s: %llu bytes, expected whole sectors of 512", f->path,
                       (unsigned long long)size);
    a->sparse = false;
    a->sectors = size / VMDK_SECTOR;
    return 0;
}

/* The file of this name beside the descriptor. */
static int adopt_one(struct dr_fs *fs, const char *path, const char *name, unsigned flags,
                     struct vmdk_adopted *a, struct dr_error *err)
{
    CLEANUP_FREE char *where = dr_path_sibling(path, name);
    struct dr_file *f = NULL;
    a->name = strdup(name);
    if (!where || !a->name)
        return dr_fail_errno(err, ENOMEM, "%s", path);
    if (!vmdk_name_is_writable(name))
        return dr_fail(err, EINVAL, "%s: a descriptor cannot name it: it has a quote or a line end",
                       where);
    int r = dr_file_open(fs, where, flags & DR_FILE_NO_LOCK, &f, err);
    if (r == 0)
        r = look_at(f, a, err);
    dr_file_unref(f);
    return r;
}

/* ------------------------------------------------------------------ all together */

static int refuse_elsewhere(struct dr_fs *fs, const char *path, const char *given,
                            struct dr_error *err)
{
    CLEANUP_FREE char *where = dr_path_sibling(path, dr_path_basename(given));
    struct dr_file_id there, beside;
    int r = where ? fs->ops->identify(fs, given, &there, err) : -ENOMEM;
    if (r == 0 && fs->ops->identify(fs, where, &beside, NULL) == 0 && dr_same_id(there, beside))
        return 0;
    return r < 0 ? r
                 : dr_fail(err, EINVAL,
                           "%s: is not in the directory of %s, where its descriptor looks for it",
                           given, path);
}

/* Two ranges of the disk would be one. */
static int refuse_twice(const char *const *given, size_t n, struct dr_error *err)
{
    for (size_t i = 1; i < n; i++)
        for (size_t k = 0; k < i; k++)
            if (strcmp(dr_path_basename(given[i]), dr_path_basename(given[k])) == 0)
                return dr_fail(err, EINVAL, "%s: is given twice", given[i]);
    return 0;
}

static int adopt_all(struct dr_fs *fs, const char *path, const char *const *names, size_t n,
                     unsigned flags, struct vmdk_adopted *out, size_t *n_out, struct dr_error *err)
{
    for (size_t i = 0; i < n; i++) {
        *n_out = i + 1;
        int r = adopt_one(fs, path, names[i], flags, &out[i], err);
        if (r == 0 && out[i].sparse != out[0].sparse)
            r = dr_fail(err, EINVAL, "%s: %s is %s, but %s is not", path, out[i].name,
                        out[i].sparse ? "sparse" : "flat", out[0].name);
        if (r < 0)
            return r;
    }
    return 0;
}

/* One that is given may tell how wide the numbers are. */
static void take_width(struct pieces *p, const char *const *given, size_t n)
{
    for (size_t i = 0; i < n && p->width == 0; i++) {
        struct piece_name parts;
        const char *name = dr_path_basename(given[i]);
        if (same_disk(p, name, &parts) && is_filled_up(name, &parts))
            p->width = parts.digits;
    }
}

int vmdk_adopt(struct dr_fs *fs, const char *path, const char *const *given, size_t n,
               unsigned flags, struct vmdk_adopted **out, size_t *n_out, struct dr_error *err)
{
    struct pieces p = {.like = dr_path_basename(given[0])};
    bool split = parse_name(p.like, &p.parts);
    int r = 0;
    if (split)
        take_width(&p, given, n);
    for (size_t i = 0; r == 0 && i < n; i++) {
        struct piece_name parts;
        r = refuse_elsewhere(fs, path, given[i], err);
        if (r == 0 && split && !same_disk(&p, dr_path_basename(given[i]), &parts))
            r = dr_fail(err, EINVAL, "%s: is no piece of the disk of %s", given[i], given[0]);
    }
    if (r == 0 && !split)
        r = refuse_twice(given, n, err);
    if (r == 0 && split)
        r = find_pieces(fs, path, &p, err);
    size_t all = split ? p.n : n;
    CLEANUP_FREE const char **names = calloc(all ? all : 1, sizeof(*names));
    *out = calloc(all ? all : 1, sizeof(**out));
    if (r == 0 && (!names || !*out))
        r = dr_fail_errno(err, ENOMEM, "%s", path);
    for (size_t i = 0; r == 0 && i < all; i++)
        names[i] = split ? p.names[i] : dr_path_basename(given[i]);
    if (r == 0)
        r = adopt_all(fs, path, names, all, flags, *out, n_out, err);
    pieces_free(&p);
    return r;
}

const char *vmdk_adopted_type(const struct vmdk_adopted *a, size_t n)
{
    struct piece_name parts;
    const char *end = n ? strstr(a[0].name, "-flat.") : NULL;
    if (n && a[0].sparse)
        return "twoGbMaxExtentSparse";
    if (n != 1 || parse_name(a[0].name, &parts))
        return "twoGbMaxExtentFlat";
    return end ? "vmfs" : "monolithicFlat";
}
