/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Reading streamOptimized extents at random.
 *
 * Where the grain directory is, the header says, or, if it was written in one go, a copy of the
 * header at the end, the footer. The tables are those of other sparse extents; their entries lead
 * to markers. The core reads a grain and has it decoded here, and keeps it for later readers.
 *
 * A stream that was cut off has lost footer and tables. A salvage opens it all the same: it walks
 * over the markers and remembers which grains are there. */
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/codec.h"
#include "base/error.h"
#include "formats/vmdk/stream.h"

#define FOOTER_SECTORS 3u          /* marker, header, end of stream */
#define TAIL           (64u << 10) /* bytes at the end in which a footer is looked for */

bool vmdk_marker_is_known(const struct vmdk_header *h, const struct vmdk_marker *m)
{
    switch (m->type) {
    case VMDK_MARKER_EOS:
        return m->val == 0;
    case VMDK_MARKER_GT:
        return m->val == h->gt_sectors;
    case VMDK_MARKER_GD:
        return m->val == h->gd_sectors;
    case VMDK_MARKER_FOOTER:
        return m->val == 1;
    case VMDK_MARKER_PROGRESS:
        return m->val <= 2048;
    default:
        return false;
    }
}

/* ------------------------------------------------------------------ the footer */

static bool is_footer(const uint8_t *at)
{
    struct vmdk_marker m = vmdk_marker_decode(at);
    return m.val == 1 && m.size == 0 && m.type == VMDK_MARKER_FOOTER &&
           vmdk_magic(at + VMDK_SECTOR, VMDK_SECTOR) == VMDK_MAGIC_KDMV;
}

/* What the footer says counts, where it tells of the same disk. */
static int take_footer(struct dr_file *f, struct vmdk_header *h, const uint8_t *sector, uint64_t at,
                       struct dr_error *err)
{
    struct vmdk_header foot;
    int r = vmdk_header_decode(&foot, f->path, sector, dr_file_size(f), err);
    if (r < 0)
        return dr_prefix(err, r, "the footer at offset %llu", (unsigned long long)at);
    if (foot.gd_off == VMDK_GD_AT_END || foot.capacity != h->capacity || foot.grain != h->grain ||
        foot.gtes != h->gtes || !(foot.flags & VMDK_FLAG_COMPRESSED))
        return dr_fail(err, EINVAL,
                       "%s: the footer at offset %llu and the header tell of different disks",
                       f->path, (unsigned long long)at);
    h->gd_off = foot.gd_off;
    h->rgd_off = foot.rgd_off;
    h->flags = foot.flags;
    return 0;
}

/* Look for the footer in the last `tail` bytes, from the end on; its place need not be the last:
 * archives pad their members. *found: it is there, and h has what it says. */
static int find_footer(struct dr_file *f, struct vmdk_header *h, uint64_t tail, bool *found,
                       struct dr_error *err)
{
    uint64_t end = dr_round_down(dr_file_size(f), VMDK_SECTOR);
    size_t len = (size_t)dr_min(end, tail);
    *found = false;
    if (len < FOOTER_SECTORS * VMDK_SECTOR)
        return 0;
    CLEANUP_FREE uint8_t *buf = malloc(len);
    if (!buf)
        return dr_fail_errno(err, ENOMEM, "%s", f->path);
    int r = dr_file_pread(f, buf, end - len, len, err);
    if (r < 0)
        return r;
    for (size_t at = len - (FOOTER_SECTORS - 1) * VMDK_SECTOR;; at -= VMDK_SECTOR) {
        *found = is_footer(buf + at);
        if (*found)
            return take_footer(f, h, buf + at + VMDK_SECTOR, end - len + at, err);
        if (at == 0)
            return 0;
    }
}

/* ------------------------------------------------------------------ grains without tables */

/* Add a grain that was found. Later ones of the same place win. */
static int found_add(struct vmdk_extent *e, uint64_t grain, uint64_t sector, size_t *room)
{
    if (e->n_found == *room) {
        size_t more = *room ? *room * 2 : 1024;
        struct vmdk_found *grown = realloc(e->found, more * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        e->found = grown;
        *room = more;
    }
    e->found[e->n_found++] = (struct vmdk_found){grain, sector};
    return 0;
}

static int by_grain(const void *a, const void *b)
{
    const struct vmdk_found *x = a, *y = b;
    if (x->grain != y->grain)
        return x->grain < y->grain ? -1 : 1;
    return x->sector < y->sector ? -1 : x->sector > y->sector;
}

static void found_sort(struct vmdk_extent *e)
{
    size_t n = 0;
    if (e->n_found > 0)
        qsort(e->found, e->n_found, sizeof(e->found[0]), by_grain);
    for (size_t i = 0; i < e->n_found; i++) {
        if (n > 0 && e->found[n - 1].grain == e->found[i].grain)
            n--;
        e->found[n++] = e->found[i];
    }
    e->n_found = n;
}

/* Walk over the markers from the first grain on. Where no marker is, the next one is looked for
 * sector by sector, and must then look like one in all its parts. */
static int scan(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    uint64_t sectors = dr_file_size(f) / VMDK_SECTOR, at = dr_max(e->h.overhead, 1);
    size_t room = 0;
    bool lost = false; /* between markers */
    e->scanned = true;
    for (uint64_t n; at < sectors; at += n) {
        uint8_t buf[VMDK_MARKER_LOOK];
        int r = dr_file_pread(f, buf, at * VMDK_SECTOR, sizeof(buf), err);
        if (r < 0)
            return r;
        struct vmdk_marker m = vmdk_marker_decode(buf);
        n = 1;
        if (vmdk_marker_is_grain(&e->h, &m) && (!lost || dr_is_zlib(buf + VMDK_MARKER_HEAD, 2))) {
            n = vmdk_coded_sectors(m.size);
            if (at + n > dr_div_up(dr_file_size(f), VMDK_SECTOR))
                break; /* the file ends in it */
            if (found_add(e, m.val / e->h.grain, at, &room) < 0)
                return dr_fail_errno(err, ENOMEM, "%s", f->path);
            lost = false;
        } else if (!lost && m.size == 0 && vmdk_marker_is_known(&e->h, &m)) {
            n = m.val + 1;
            e->complete = m.type == VMDK_MARKER_EOS || m.type == VMDK_MARKER_FOOTER;
            if (e->complete)
                break;
        } else {
            lost = true;
        }
    }
    found_sort(e);
    return 0;
}

/* ------------------------------------------------------------------ opening */

/* Programs that fetch the head of a file look for the first words. How long the stream was is not
 * known; its end takes a footer and the end of stream at least. */
static int cut_off(const struct dr_file *f, const struct vmdk_extent *e, struct dr_error *err)
{
    uint64_t size = dr_file_size(f);
    return dr_fail(err, EINVAL,
                   "%s: File truncated, expecting at least %llu bytes: the stream is cut off: the "
                   "file ends at %llu, expected a footer there that says where the grain directory "
                   "is; a stream of %llu bytes (virtual size); `convert --salvage` reads what is "
                   "left",
                   f->path, (unsigned long long)(size + FOOTER_SECTORS * VMDK_SECTOR),
                   (unsigned long long)size, (unsigned long long)(e->h.capacity * VMDK_SECTOR));
}

int vmdk_stream_open(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err)
{
    struct dr_file *f = image->files[e->file];
    bool at_end = e->h.gd_off == VMDK_GD_AT_END, found;
    int r = find_footer(f, &e->h, at_end ? TAIL : FOOTER_SECTORS * VMDK_SECTOR, &found, err);
    if (image->flags & DR_OPEN_SALVAGE) {
        if (at_end && (r < 0 || !found)) {
            dr_error_reset(err);
            return scan(image, e, err);
        }
        return 0;
    }
    return r == 0 && at_end && !found ? cut_off(f, e, err) : r;
}

/* ------------------------------------------------------------------ map */

void vmdk_map_coded(const struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                    uint64_t inner, uint64_t sector, uint64_t next, struct dr_extent *ext)
{
    uint64_t most = dr_round_up(VMDK_MARKER_HEAD + vmdk_coded_max(&e->h), VMDK_SECTOR);
    if (next > sector)
        most = dr_min(most, (next - sector) * VMDK_SECTOR);
    *ext = (struct dr_extent){
        .kind = DR_CODED,
        .len = e->grain - inner,
        .file = image->files[e->file],
        .host = sector * VMDK_SECTOR,
        .host_len = (uint32_t)most,
        .unit = (uint32_t)e->grain,
        .inner = (uint32_t)inner,
        .tag = e->start + grain * e->grain,
    };
}

/* The first grain that was found and is not before this one; n_found: there is none. */
static size_t found_from(const struct vmdk_extent *e, uint64_t grain)
{
    size_t lo = 0, hi = e->n_found;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (e->found[mid].grain < grain)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

int vmdk_map_found(const struct dr_image *image, const struct vmdk_extent *e, uint64_t rel,
                   uint64_t len, struct dr_extent *ext, struct dr_error *err)
{
    uint64_t grain = rel / e->grain, inner = rel % e->grain;
    size_t i = found_from(e, grain);
    if (i < e->n_found && e->found[i].grain == grain) {
        vmdk_map_coded(image, e, grain, inner, e->found[i].sector, 0, ext);
    } else if (i < e->n_found) {
        *ext = (struct dr_extent){.kind = DR_HOLE, .len = e->found[i].grain * e->grain - rel};
    } else if (e->complete) {
        *ext = (struct dr_extent){.kind = DR_HOLE, .len = len};
    } else {
        return dr_fail(err, EIO, "%s: the file ends at %llu: nothing is known of guest offset %llu",
                       vmdk_extent_path(image, e),
                       (unsigned long long)dr_file_size(image->files[e->file]),
                       (unsigned long long)(e->start + rel));
    }
    ext->len = dr_min(ext->len, len);
    return 0;
}

/* ------------------------------------------------------------------ decoding */

int vmdk_grain_inflate(const char *where, uint64_t host, uint64_t lba, const uint8_t *in,
                       uint32_t size, uint8_t *out, uint64_t grain, uint64_t disk_len,
                       struct dr_error *err)
{
    int64_t got = dr_unzlib(in, size, out, (size_t)grain);
    if (got < 0)
        return dr_fail(err, EIO,
                       "%s: the %u compressed bytes of the grain at offset %llu (sector %llu of "
                       "the disk) are damaged",
                       where, size, (unsigned long long)host, (unsigned long long)lba);
    if ((uint64_t)got < disk_len)
        return dr_fail(err, EIO,
                       "%s: the grain at offset %llu (sector %llu of the disk) has %llu bytes, "
                       "expected %llu",
                       where, (unsigned long long)host, (unsigned long long)lba,
                       (unsigned long long)got, (unsigned long long)disk_len);
    memset(out + got, 0, (size_t)(grain - (uint64_t)got));
    return 0;
}

int vmdk_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                size_t in_len, uint8_t *out, struct dr_error *err)
{
    const struct vmdk_extent *e = vmdk_extent_at(image, ext->tag);
    const char *path = ext->file->path;
    uint64_t rel = ext->tag - e->start, lba = rel / VMDK_SECTOR;
    if (in_len < VMDK_MARKER_LOOK)
        return dr_fail(err, EIO, "%s: ends at %llu, expected a grain at offset %llu", path,
                       (unsigned long long)dr_file_size(ext->file), (unsigned long long)ext->host);
    struct vmdk_marker m = vmdk_marker_decode(in);
    if (m.val != lba || m.size == 0 || m.size > vmdk_coded_max(&e->h))
        return dr_fail(err, EIO,
                       "%s: the marker at offset %llu says %u compressed bytes of sector %llu of "
                       "the disk, expected 1 to %llu of sector %llu",
                       path, (unsigned long long)ext->host, m.size, (unsigned long long)m.val,
                       (unsigned long long)vmdk_coded_max(&e->h), (unsigned long long)lba);
    if (m.size > in_len - VMDK_MARKER_HEAD)
        return dr_fail(
            err, EIO, "%s: the grain at offset %llu should have %u compressed bytes, but %s", path,
            (unsigned long long)ext->host, m.size,
            in_len == ext->host_len ? "the next one begins in them" : "the file ends in them");
    return vmdk_grain_inflate(path, ext->host, lba, in + VMDK_MARKER_HEAD, m.size, out, e->grain,
                              vmdk_grain_len(e, rel / e->grain), err);
}
