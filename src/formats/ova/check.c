/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Is a machine whole? Each of its files is there and as long as the descriptor says, has the digest
 * of the manifest, and each disk is as large as the descriptor says, and without errors itself. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "archive/ova-manifest.h"
#include "base/cleanup.h"
#include "base/error.h"
#include "formats/ova/ova.h"

struct checking {
    struct dr_image *image;
    const struct ova *ova;
    struct dr_check_result *result;
    const char *inside; /* the disk whose check reports, or NULL */
};

__attribute__((format(printf, 2, 3))) static void note(struct checking *c, const char *format, ...)
{
    va_list args;
    CLEANUP_FREE char *line = NULL;
    va_start(args, format);
    int n = vasprintf(&line, format, args);
    va_end(args);
    if (n >= 0)
        c->result->report(c->result->user, line);
    else
        line = NULL;
}

static void damage(struct checking *c, const char *text)
{
    c->result->corruptions++;
    note(c, "ERROR: %s", text);
}

static void check_files(struct checking *c)
{
    const struct ovf *ovf = &c->ova->ovf;
    for (size_t i = 0; i < ovf->n_files; i++) {
        struct dr_error why = DR_ERROR_INIT;
        struct ova_found found = {.file = &ovf->files[i], .name = ovf->files[i].href};
        uint64_t stored;
        if (ova_file_stored(c->ova, &found, &stored, &why) < 0)
            damage(c, why.text);
    }
}

/* ------------------------------------------------------------------ digests */

/* Tell of a file that has no digest. A disk in pieces has one for each; where pieces are not there,
 * that is told already. */
static void check_has_digest(struct checking *c, const struct ova_manifest *m,
                             const struct ovf_file *f)
{
    const struct ova_found found = {.file = f, .name = f->href};
    struct dr_error why = DR_ERROR_INIT;
    size_t n = 0;
    if (ova_file_pieces(c->ova, &found, &n, &why) < 0)
        n = 1;
    for (size_t i = 0; i < n; i++) {
        CLEANUP_FREE char *name = ova_piece_name(&found, i);
        if (name && !ova_manifest_find(m, name)) {
            note(c, "%s: the manifest has no digest of '%s', so its bytes were not compared",
                 c->ova->file->path, n > 1 ? name : f->href);
            return;
        }
    }
}

static bool is_referred_to(const struct ova *ova, const char *name)
{
    for (size_t i = 0; i < ova->ovf.n_files; i++)
        if (strcmp(ova_plain_name(ova->ovf.files[i].href), ova_plain_name(name)) == 0)
            return true;
    return false;
}

static int check_digests(struct checking *c, const struct ova_manifest *m, struct dr_error *err)
{
    for (size_t i = 0; i < m->n; i++) {
        struct dr_error why = DR_ERROR_INIT;
        struct ova_digest have;
        int r = ova_digest_check(c->ova, &m->all[i], &have, &why);
        if (r == -ENOENT && is_referred_to(c->ova, m->all[i].name))
            continue; /* told already */
        if (r == -ENOMEM)
            return dr_fail(err, ENOMEM, "%s", why.text);
        if (r < 0)
            damage(c, why.text);
    }
    for (size_t i = 0; i < c->ova->ovf.n_files; i++)
        check_has_digest(c, m, &c->ova->ovf.files[i]);
    if (m->has_certificate)
        note(c, "%s: has a certificate, which was not checked: nothing says who made the manifest",
             c->ova->file->path);
    return 0;
}

static int check_manifest(struct checking *c, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    struct ova_manifest m;
    int r = ova_manifest_read(c->ova, &m, &why);
    if (r == -EINVAL || r == -EIO || r == -EFBIG || r == -E2BIG || r == -ENOTUNIQ) {
        damage(c, why.text);
        r = 0;
    } else if (r < 0) {
        r = dr_fail(err, -r, "%s", why.text);
    } else if (!m.name) {
        note(c,
             "%s: has no manifest: nothing tells whether the bytes of its files are those that "
             "were written",
             c->ova->file->path);
    } else {
        r = check_digests(c, &m, err);
    }
    ova_manifest_free(&m);
    return r;
}

/* ------------------------------------------------------------------ disks */

static void report_inside(void *user, const char *line)
{
    struct checking *c = user;
    note(c, "%s: %s", c->inside, line);
}

static void check_size(struct checking *c, const struct ova_found *d, uint64_t size)
{
    char text[500];
    if (!d->disk->has_capacity || d->disk->capacity == size)
        return;
    snprintf(text, sizeof(text),
             "%.200s: '%.150s' is a disk of %" PRIu64 " bytes, the descriptor "
             "says %" PRIu64,
             c->ova->file->path, d->name, size, d->disk->capacity);
    damage(c, text);
}

static void add_results(struct dr_check_result *sum, const struct dr_check_result *one)
{
    sum->corruptions += one->corruptions;
    sum->leaks += one->leaks;
    sum->check_errors += one->check_errors;
    sum->total_clusters += one->total_clusters;
    sum->allocated_clusters += one->allocated_clusters;
    sum->fragmented_clusters += one->fragmented_clusters;
    sum->compressed_clusters += one->compressed_clusters;
}

/* Damage that keeps the disk from opening is a finding, too. */
static int check_disk(struct checking *c, const struct ova_found *d, struct dr_error *err)
{
    struct dr_error why = DR_ERROR_INIT;
    CLEANUP_FREE char *name = NULL;
    struct dr_image *disk = NULL;
    unsigned flags = (c->image->flags & ~(unsigned)DR_OPEN_WHOLE) | DR_OPEN_NO_BACKING;
    uint64_t stored;
    if (ova_file_stored(c->ova, d, &stored, NULL) < 0)
        return 0; /* told already */
    if (asprintf(&name, "%s:%s#%s", c->image->fmt->name, c->ova->file->path, d->name) < 0)
        return dr_fail(err, ENOMEM, "%s: out of memory", c->image->path);
    const struct dr_image_how how = {.gate = c->image->gate};
    int r = dr_image_open_how(c->image->fs, name, NULL, flags, &how, &disk, &why);
    if (r == -ENOMEM)
        return dr_fail(err, ENOMEM, "%s", why.text);
    if (r == -ENOTSUP) {
        note(c, "%s, so it was not checked as an image", why.text);
        return 0;
    }
    if (r < 0) {
        damage(c, why.text);
        return 0;
    }
    check_size(c, d, disk->size);
    c->inside = d->name;
    struct dr_check_result one = {.report = report_inside, .user = c};
    if (disk->fmt->check)
        r = disk->fmt->check(disk, 0, &one, err);
    add_results(c->result, &one);
    dr_image_unref(disk, NULL);
    return r;
}

int ova_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
              struct dr_error *err)
{
    const struct ova *ova = image->state;
    struct checking c = {.image = image, .ova = ova, .result = result};
    struct ova_found d;
    (void)fix; /* it is read-only */
    if (ova->tar.problem)
        damage(&c, ova->tar.problem);
    if (!ova->descriptor)
        damage(&c, "there is no OVF descriptor in the archive");
    check_files(&c);
    int r = check_manifest(&c, err);
    for (size_t i = 0; r == 0 && ova_disk_at(ova, i, &d); i++)
        if (d.file)
            r = check_disk(&c, &d, err);
        else
            damage(&c, "a disk refers to a file that the descriptor does not list");
    result->image_end_offset = dr_file_size(image->files[0]);
    return r;
}
