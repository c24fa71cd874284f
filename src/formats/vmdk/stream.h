/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* streamOptimized: compressed grains, each behind a marker that begins a sector.
 *
 * A marker in front of a grain has the grain's first sector on the disk (its LBA) and the number of
 * compressed bytes, which follow at once. Another marker has a type, and sectors that follow it.
 * docs/formats/vmdk.md has where the tables are. Pure: no I/O. */
#ifndef DR_FORMATS_VMDK_STREAM_H
#define DR_FORMATS_VMDK_STREAM_H

#include "formats/vmdk/vmdk.h"

#define VMDK_MARKER_HEAD 12u /* bytes of a grain's marker */
#define VMDK_MARKER_LOOK 16u /* bytes that tell what a marker is */

enum vmdk_marker_type {
    VMDK_MARKER_EOS,
    VMDK_MARKER_GT,
    VMDK_MARKER_GD,
    VMDK_MARKER_FOOTER,
    VMDK_MARKER_PROGRESS, /* undocumented: some vSphere images have such blocks */
};

struct vmdk_marker {
    uint64_t val;  /* of a grain: its LBA; else the number of sectors that follow */
    uint32_t size; /* compressed bytes; 0: no grain */
    uint32_t type;
};

static inline struct vmdk_marker vmdk_marker_decode(const uint8_t buf[VMDK_MARKER_LOOK])
{
    return (struct vmdk_marker){get_le64(buf), get_le32(buf + 8), get_le32(buf + 12)};
}

/* The most compressed bytes that a grain of this header may have. */
static inline uint64_t vmdk_coded_max(const struct vmdk_header *h)
{
    return 2 * h->grain * VMDK_SECTOR;
}

/* Sectors that a grain takes in the file. */
static inline uint64_t vmdk_coded_sectors(uint32_t size)
{
    return dr_div_up(VMDK_MARKER_HEAD + (uint64_t)size, VMDK_SECTOR);
}

/* Can this be the marker of a grain of such a disk? */
static inline bool vmdk_marker_is_grain(const struct vmdk_header *h, const struct vmdk_marker *m)
{
    return m->size > 0 && m->size <= vmdk_coded_max(h) && m->val % h->grain == 0 &&
           m->val < h->capacity;
}

/* ------------------------------------------------------------------ writing (stream-write.c) */

#define VMDK_STREAM_TYPE "streamOptimized"

/* What create.c makes of the settings of a new stream. */
struct vmdk_stream_plan {
    char *text; /* the descriptor, malloc'ed */
    size_t len;
    uint64_t sectors;
    int level; /* of compression; 0 = default */
};
int vmdk_stream_wanted(const char *path, const struct dr_create_params *params,
                       struct dr_error *err);
int vmdk_stream_plan(const char *path, const struct dr_create_params *params,
                     struct vmdk_stream_plan *plan, struct dr_error *err);
extern const struct dr_sequential vmdk_sequential;

/* Reading in one pass (stream-pipe.c). */
extern const struct dr_incoming_ops vmdk_incoming;

/* ------------------------------------------------------------------ reading */

/* A block of metadata that a reader may pass over: what its marker says is bounded by what the
 * header needs. */
bool vmdk_marker_is_known(const struct vmdk_header *h, const struct vmdk_marker *m);

/* The bytes in buf, which has what is behind the marker's twelve bytes, as a whole grain. disk_len:
 * how many bytes of the grain belong to the disk: a shorter grain is damaged. where: for the
 * message. */
int vmdk_grain_inflate(const char *where, uint64_t host, uint64_t lba, const uint8_t *in,
                       uint32_t size, uint8_t *out, uint64_t grain, uint64_t disk_len,
                       struct dr_error *err);

#endif
