/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* ova: the disks of a machine, in an OVA or beside an OVF descriptor, as images.
 *
 * A disk that is named, or the only one, is an image of its own format, mostly a streamOptimized
 * VMDK: the driver makes a file of the range of the archive that it takes, and hands the image over
 * to the format found there (dr_image_enter). It is read at random, and nothing is unpacked. The
 * machine as a whole (DR_OPEN_WHOLE) stays with this driver, which lists and checks. */
#include "formats/ova/ova.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "base/json.h"
#include "archive/ova-manifest.h"

static bool has_suffix(const char *path, const char *suffix)
{
    size_t n = strlen(path), k = strlen(suffix);
    return n > k && strcasecmp(path + n - k, suffix) == 0;
}

/* A tar on a guest's raw disk is no OVA: the name has to say so, or the first member. */
static int ova_probe(const uint8_t *buf, size_t len, const char *path)
{
    if (ova_tar_begins_with_ovf(buf, len))
        return 90;
    return has_suffix(path, ".ova") && ova_tar_begins(buf, len) ? 60 : 0;
}

/* Any guest can write such a text at the beginning of a raw disk, and with it name files. */
static int ovf_probe(const uint8_t *buf, size_t len, const char *path)
{
    return has_suffix(path, ".ovf") && memmem(buf, len, "Envelope", 8) ? 60 : 0;
}

/* ------------------------------------------------------------------ open */

static int open_beside(void *user, const char *name, struct dr_file **file, struct dr_error *err)
{
    struct dr_image *image = user;
    unsigned index;
    int r = dr_image_open_file(image, name, &index, err);
    if (r == 0)
        *file = dr_file_ref(image->files[index]);
    return r;
}

static int choose(const struct dr_image *image, const struct ova *ova, struct ova_found *found,
                  struct dr_error *err)
{
    if (image->member)
        return ova_find(ova, image->member, found, err);
    size_t n = ova_disk_count(ova);
    if (n == 1) {
        ova_disk_at(ova, 0, found);
        return 0;
    }
    if (n == 0)
        return dr_fail(err, EINVAL, "%s: %s", image->path,
                       ova->descriptor ? "this machine has no disk"
                                       : "has no OVF descriptor, so its disks are not known; name "
                                         "a member of the archive, as ova:FILE#MEMBER");
    char text[400], prefix[200];
    snprintf(prefix, sizeof(prefix), "%s:%.190s#", image->fmt->name, image->files[0]->path);
    ova_list_disks(ova, prefix, text, sizeof(text));
    return dr_fail(err, EINVAL, "%s: this machine has %zu disks, name one of them: %s", image->path,
                   n, text);
}

static int refuse_disk(const struct dr_image *image, const struct ova_found *found,
                       struct dr_error *err)
{
    if (found->disk && found->disk->parent)
        return dr_fail(err, ENOTSUP,
                       "%s: '%.200s' holds only what differs from another disk of the machine "
                       "(%.100s), which is not supported",
                       image->path, found->name, found->disk->parent);
    return 0;
}

static int no_digest(const struct dr_image *image, const struct ova_manifest *m,
                     const struct ova_found *found, size_t compared, size_t n, struct dr_error *err)
{
    if (compared > 0)
        return dr_fail(err, ENOTSUP,
                       "%s: its manifest has digests of %zu of the %zu pieces of '%.200s'",
                       image->path, compared, n, found->name);
    return dr_fail(err, ENOTSUP, "%s: %s '%.200s'", image->path,
                   m->name ? "its manifest has no digest of"
                           : "has no manifest, so nothing tells what the digest should be of",
                   found->name);
}

/* Compare what the manifest has of the file, which must be something of each piece. */
static int compare_digests(struct dr_image *image, const struct ova *ova,
                           const struct ova_manifest *m, const struct ova_found *found,
                           struct dr_error *err)
{
    struct ova_digest have;
    size_t n = 0, compared = 0;
    int r = ova_file_pieces(ova, found, &n, err);
    for (size_t i = 0; r == 0 && i < n; i++) {
        CLEANUP_FREE char *name = ova_piece_name(found, i);
        const struct ova_digest *want = name ? ova_manifest_find(m, name) : NULL;
        if (!name)
            return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
        if (want)
            r = ova_digest_check(ova, want, &have, err);
        compared += want != NULL;
    }
    return r == 0 && compared < n ? no_digest(image, m, found, compared, n, err) : r;
}

static int verify(struct dr_image *image, const struct ova *ova, const struct ova_found *found,
                  struct dr_error *err)
{
    struct ova_manifest m;
    if (!(image->flags & DR_OPEN_VERIFY))
        return 0;
    int r = ova_manifest_read(ova, &m, err);
    if (r == 0)
        r = compare_digests(image, ova, &m, found, err);
    ova_manifest_free(&m);
    if (r == 0)
        image->flags &= ~(unsigned)DR_OPEN_VERIFY;
    return r;
}

static int enter(struct dr_image *image, const struct ova *ova, struct dr_error *err)
{
    struct ova_found found;
    struct dr_file *file = NULL;
    int r = choose(image, ova, &found, err);
    if (r == 0)
        r = refuse_disk(image, &found, err);
    if (r == 0)
        r = verify(image, ova, &found, err);
    if (r == 0)
        r = ova_file_open(ova, &found, image->flags & DR_OPEN_SALVAGE, &file, err);
    return r < 0 ? r : dr_image_enter(image, file, err);
}

static uint64_t capacity_of(const struct ova *ova)
{
    struct ova_found d;
    uint64_t sum = 0;
    for (size_t i = 0; ova_disk_at(ova, i, &d); i++)
        if (d.disk->has_capacity && d.disk->capacity <= INT64_MAX - sum)
            sum += d.disk->capacity;
    return sum;
}

static int ova_format_open(struct dr_image *image, struct dr_error *err)
{
    struct ova *ova = calloc(1, sizeof(*ova));
    if (!ova)
        return dr_fail(err, ENOMEM, "%s: out of memory", image->path);
    int r = ova_open(image->files[0], open_beside, image, ova, err);
    if (r == 0 && !image->member && (image->flags & DR_OPEN_WHOLE)) {
        image->state = ova;
        image->size = capacity_of(ova);
        return 0;
    }
    if (r == 0)
        r = enter(image, ova, err);
    ova_close(ova);
    free(ova);
    return r;
}

static void ova_format_close(struct dr_image *image)
{
    struct ova *ova = image->state;
    if (ova)
        ova_close(ova);
    free(ova);
}

static void ova_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen)
{
    (void)image;
    *uoff = off & ~UINT64_C(65535);
    *ulen = 65536;
}

static int ova_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
                   struct dr_error *err)
{
    (void)off;
    (void)len;
    (void)ext;
    return dr_fail(err, EINVAL, "%s: is a machine with its disks, not one disk", image->path);
}

/* ------------------------------------------------------------------ info */

static void put_text(json_t *o, const char *key, const char *text)
{
    if (text)
        json_object_set_new(o, key, dr_json_text(text));
}

static json_t *describe(const struct dr_image *image, const struct ova *ova,
                        const struct ova_found *d)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *name = NULL;
    uint64_t stored = 0;
    json_t *o = json_object();
    put_text(o, "id", d->disk->id);
    put_text(o, "name", d->name);
    if (asprintf(&name, "%s:%s#%s", image->fmt->name, image->files[0]->path, d->name) >= 0)
        put_text(o, "image", name);
    if (d->disk->has_capacity)
        json_object_set_new(o, "capacity", json_integer((json_int_t)d->disk->capacity));
    else
        put_text(o, "capacity", d->disk->odd_capacity);
    if (d->file)
        put_text(o, "compression", d->file->compression);
    int r = ova_file_stored(ova, d, &stored, &why);
    if (r == 0)
        json_object_set_new(o, "stored", json_integer((json_int_t)stored));
    else
        put_text(o, "problem", why.text);
    return o;
}

/* It is only looked for here; `check` reads all that it tells of. */
static void put_manifest(json_t *data, const struct ova *ova)
{
    struct dr_error why = DR_ERROR_INIT;
    struct ova_manifest m;
    int r = ova_manifest_read(ova, &m, &why);
    put_text(data, "manifest", r < 0 ? why.text : m.name ? m.name : "none");
    ova_manifest_free(&m);
}

static int ova_info(struct dr_image *image, json_t *data, uint64_t *cluster_size,
                    struct dr_error *err)
{
    const struct ova *ova = image->state;
    json_t *disks = json_array();
    struct ova_found d;
    (void)err;
    put_text(data, "machine", ova->ovf.name);
    put_text(data, "descriptor", ova->descriptor ? dr_path_basename(ova->descriptor) : "none");
    put_manifest(data, ova);
    for (size_t i = 0; ova_disk_at(ova, i, &d); i++)
        json_array_append_new(disks, describe(image, ova, &d));
    json_object_set_new(data, "disks", disks);
    put_text(data, "problem", ova->tar.problem);
    *cluster_size = 0;
    return 0;
}

/* ------------------------------------------------------------------ the tables */

const struct dr_format dr_format_ova = {
    .name = "ova",
    .flags = DR_FORMAT_MEMBERS | DR_FORMAT_CONTAINER,
    .probe = ova_probe,
    .open = ova_format_open,
    .close = ova_format_close,
    .unit = ova_unit,
    .map = ova_map,
    .info = ova_info,
    .check = ova_check,
};

const struct dr_format dr_format_ovf = {
    .name = "ovf",
    .flags = DR_FORMAT_MEMBERS | DR_FORMAT_CONTAINER,
    .probe = ovf_probe,
    .open = ova_format_open,
    .close = ova_format_close,
    .unit = ova_unit,
    .map = ova_map,
    .info = ova_info,
    .check = ova_check,
};
