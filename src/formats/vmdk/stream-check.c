/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* check of a streamOptimized extent: every entry leads to a marker that is this grain's, whose
 * bytes lie in the file and are nobody else's. The compressed bytes themselves are not read.
 * Nothing is mended: a stream is written once. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "formats/vmdk/check.h"
#include "formats/vmdk/stream.h"

#define MAX_SECTORS (UINT64_C(1) << 33) /* bits of the map of used sectors: 1 GiB */

#define REACH 8u /* grains: compressed, they need not be longer than what they hold */

struct walk {
    struct dr_image *image;
    const struct vmdk_extent *e;
    struct dr_file *f;
    struct dr_check_result *result;
    uint8_t *used; /* a bit a sector of the file */
    uint64_t sectors;
    uint64_t last; /* sector of the grain before */
    struct vmdk_beyond beyond;
    uint64_t cut, cut_end; /* grains that were cut off, and the byte that the file must reach */
};

/* A finding. */
#define say(w, ...)                                       \
    do {                                                  \
        vmdk_say((w)->result, (w)->f->path, __VA_ARGS__); \
        (w)->result->corruptions++;                       \
    } while (0)

/* Mark sectors as used; false: one of them was already. */
static bool use(struct walk *w, uint64_t first, uint64_t n)
{
    bool free = true;
    for (uint64_t i = first; i < first + n && i < w->sectors; i++) {
        free &= !(w->used[i / 8] >> i % 8 & 1);
        w->used[i / 8] |= (uint8_t)(1u << i % 8);
    }
    return free;
}

static uint64_t guest_of(const struct walk *w, uint64_t grain)
{
    return w->e->start + grain * w->e->grain;
}

/* The grain was cut off with the end of the file. */
static void lost_with_the_end(struct walk *w, uint64_t end)
{
    w->cut++;
    w->cut_end = dr_max(w->cut_end, end);
    w->result->corruptions++;
}

/* One line for all of them. Scripts look for the first words. */
static void tell_cut(struct walk *w)
{
    if (w->cut)
        vmdk_say(w->result, w->f->path,
                 "File truncated, expecting at least %" PRIu64 " bytes: it has %" PRIu64
                 ", and %" PRIu64 " grains are lost",
                 w->cut_end, dr_file_size(w->f), w->cut);
}

static int check_grain(struct walk *w, uint64_t grain, uint32_t gte, struct dr_error *err)
{
    const struct vmdk_header *h = &w->e->h;
    uint8_t buf[VMDK_MARKER_LOOK];
    if (grain * w->e->grain >= w->e->len) {
        say(w, "there is an entry (sector %u) for guest offset %" PRIu64 ", behind the end", gte,
            guest_of(w, grain));
        return 0;
    }
    if (!vmdk_gte_fits(w->image, w->e, grain, gte) && vmdk_beyond_is_cut(&w->beyond, gte)) {
        lost_with_the_end(w, ((uint64_t)gte + 1) * VMDK_SECTOR);
        return 0;
    }
    if (!vmdk_gte_fits(w->image, w->e, grain, gte)) {
        say(w,
            "the grain at guest offset %" PRIu64 " should be at sector %u, the file has %" PRIu64,
            guest_of(w, grain), gte, w->sectors);
        return 0;
    }
    int r = dr_file_pread(w->f, buf, (uint64_t)gte * VMDK_SECTOR, sizeof(buf), err);
    if (r < 0)
        return r;
    struct vmdk_marker m = vmdk_marker_decode(buf);
    if (!vmdk_marker_is_grain(h, &m) || m.val != grain * h->grain) {
        say(w,
            "the marker at sector %u says %u bytes of sector %" PRIu64
            " of the disk, expected sector %" PRIu64,
            gte, m.size, m.val, grain * h->grain);
        return 0;
    }
    w->result->allocated_clusters++;
    w->result->compressed_clusters++;
    w->result->fragmented_clusters += gte < w->last;
    w->last = gte;
    uint64_t end = (uint64_t)gte * VMDK_SECTOR + VMDK_MARKER_HEAD + m.size;
    if (end > dr_file_size(w->f))
        lost_with_the_end(w, end);
    else if (!use(w, gte, vmdk_coded_sectors(m.size)))
        say(w, "the grain at guest offset %" PRIu64 " (sector %u) lies on something else",
            guest_of(w, grain), gte);
    return 0;
}

/* Note which entries lead behind the end of the file. */
static int look_behind(struct walk *w, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint8_t buf[VMDK_GTES * 4];
    int r = 0;
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++) {
        bool hole = true;
        if (vmdk_table_fits(w->image, e, e->gd[t]))
            r = vmdk_read_table(w->image, e, e->gd[t], buf, &hole, err);
        for (uint32_t i = 0; r == 0 && !hole && i < e->h.gtes; i++)
            if (get_le32(buf + i * 4) >= w->sectors)
                r = vmdk_beyond_add(&w->beyond, e, dr_file_size(w->f), get_le32(buf + i * 4), err);
    }
    vmdk_beyond_end(&w->beyond, REACH);
    return r;
}

static int check_table(struct walk *w, uint64_t table, struct dr_error *err)
{
    const struct vmdk_extent *e = w->e;
    uint32_t gde = e->gd[table];
    uint8_t buf[VMDK_GTES * 4];
    bool hole;
    if (gde == 0)
        return 0;
    if (!vmdk_table_fits(w->image, e, gde)) {
        say(w, "grain directory entry %" PRIu64 " says sector %u, which is outside the file", table,
            gde);
        return 0;
    }
    int r = vmdk_read_table(w->image, e, gde, buf, &hole, err);
    for (uint32_t i = 0; r == 0 && i < e->h.gtes; i++) {
        uint32_t gte = get_le32(buf + i * 4);
        if (gte != 0 && !(gte == 1 && vmdk_has_zero_grains(e)))
            r = check_grain(w, table * e->h.gtes + i, gte, err);
    }
    return r;
}

/* The metadata first: a grain that lies on it is what is wrong. */
static void use_metadata(struct walk *w)
{
    const struct vmdk_header *h = &w->e->h;
    use(w, 0, 1);
    if (h->desc_off)
        use(w, h->desc_off, h->desc_len);
    use(w, h->gd_off, h->gd_sectors);
    for (uint64_t t = 0; t < h->n_tables; t++)
        if (vmdk_table_fits(w->image, w->e, w->e->gd[t]) && !use(w, w->e->gd[t], h->gt_sectors))
            say(w, "grain table %" PRIu64 " (sector %u) lies on something else", t, w->e->gd[t]);
}

int vmdk_check_stream(struct dr_image *image, struct vmdk_extent *e, struct dr_check_result *result,
                      struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    struct walk w = {.image = image, .e = e, .f = f, .result = result};
    w.sectors = dr_div_up(dr_file_size(f), VMDK_SECTOR);
    if (w.sectors > MAX_SECTORS)
        return dr_fail(err, EFBIG, "%s: too many sectors to check", f->path);
    CLEANUP_FREE uint8_t *used = w.used = calloc(1, (size_t)(w.sectors / 8 + 1));
    if (!used)
        return dr_fail_errno(err, ENOMEM, "%s: %" PRIu64 " sectors to check", f->path, w.sectors);
    int r = vmdk_load_directories(image, e, err);
    if (r == 0) {
        use_metadata(&w);
        result->total_clusters += dr_div_up(e->len, e->grain);
    }
    if (r == 0)
        r = look_behind(&w, err);
    for (uint64_t t = 0; r == 0 && t < e->h.n_tables; t++)
        r = check_table(&w, t, err);
    tell_cut(&w);
    free(w.beyond.bits);
    vmdk_drop_directories(e);
    result->image_end_offset = dr_max(result->image_end_offset, dr_file_size(f));
    return r;
}
