/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the parts of VMDK's check share. Files of this folder only.
 *
 *   check.c         the order of a check; grain directories, leaks
 *   check-tables.c  grain tables and their redundant copies
 *   check-ahead.c   reading them, many at once
 *   check-beyond.c  entries that lead behind the end of the file: cut off, or damaged?
 *   check-text.c    the descriptor against what the files say
 */
#ifndef DR_FORMATS_VMDK_CHECK_H
#define DR_FORMATS_VMDK_CHECK_H

#include "formats/ahead.h"
#include "formats/vmdk/vmdk.h"

/* Places behind the end of a file to which entries lead, as bits of 64 KiB or a grain. */
struct vmdk_beyond {
    uint8_t *bits;  /* NULL: none yet */
    uint64_t unit;  /* sectors a bit */
    uint64_t first; /* the bit that the end of the file lies in */
    uint64_t last;  /* the highest that is set */
    uint64_t end;   /* vmdk_beyond_end's answer */
};

/* The entry's grain begins at the sector and is not all in the file. -ENOMEM. */
int vmdk_beyond_add(struct vmdk_beyond *b, const struct vmdk_extent *e, uint64_t file_size,
                    uint32_t sector, struct dr_error *err);
/* All entries are known: find out how far the file once went. Grains are appended one behind the
 * other, so what was cut off follows the end of the file without large gaps. reach: bits that may
 * lie between two places. */
void vmdk_beyond_end(struct vmdk_beyond *b, uint64_t reach);
/* Was the grain at the sector lost with the end of the file? */
bool vmdk_beyond_is_cut(const struct vmdk_beyond *b, uint32_t sector);

/* What a table entry says. */
enum vmdk_entry {
    VMDK_ENTRY_HOLE,
    VMDK_ENTRY_ZERO,
    VMDK_ENTRY_DATA,
    VMDK_ENTRY_BAD_ZERO, /* 1, and the extent has no zeroed grains */
    VMDK_ENTRY_METADATA, /* a grain in the header, the descriptor, a directory or a table */
    VMDK_ENTRY_BEYOND,   /* a grain that is not all in the file */
};

enum vmdk_finding {
    VMDK_NOTHING,
    VMDK_FOUND_ZERO,
    VMDK_FOUND_METADATA,
    VMDK_FOUND_BEYOND,
    VMDK_FOUND_TWICE,  /* another entry leads to the same place */
    VMDK_FOUND_ODD,    /* not at a multiple of the grain's size: VirtualBox does that */
    VMDK_FOUND_GONE,   /* 0, and only the redundant table has the grain */
    VMDK_FOUND_DIFFER, /* of tables, not of entries */
};

/* Neighbours with the same finding, told in one line. */
struct vmdk_findings {
    enum vmdk_finding what;
    uint64_t first, n;  /* grains, or tables */
    uint32_t low, high; /* sectors */
};

struct vmdk_area {
    uint64_t first, end; /* sectors */
};

/* The check of one sparse extent. */
struct vmdk_walk {
    struct dr_image *image;
    struct vmdk_extent *e;
    struct dr_file *f;
    const char *path;
    unsigned fix;
    struct dr_check_result *result;
    /* A bit for each unit of the file: something is there; two entries lead there. The unit is a
     * grain, unless some grain is not at a multiple of its size. */
    uint8_t *used, *twice;
    uint8_t *seen; /* the second pass met it */
    uint64_t unit, n_used;
    uint64_t n_twice;
    uint32_t places;   /* all entries, ORed */
    uint8_t *suspect;  /* a bit for each table that has an entry that cannot be */
    uint64_t orphaned; /* so many grains may have lost their entry to damage that stays */
    struct vmdk_area *areas;
    size_t n_areas; /* metadata among the grains, in order */
    struct vmdk_beyond beyond;
    uint64_t cut, cut_end; /* grains that were cut off, and the byte behind the last of them */
    struct vmdk_findings findings, tables, entries[2]; /* of the directory, of its copy */
    bool changed;                                      /* something was written */
    bool damaged;                                      /* something is wrong that was not mended */
    bool odd;     /* some table stands elsewhere than create would have put it */
    bool regular; /* every usable entry of the directories leads to where create puts tables */
    struct dr_ahead *ahead;
};

/* Threads that read; 0: a processor's each, or as many requests as the file wants. For tests. */
extern unsigned vmdk_check_readers;

#define vmdk_say_of(w, ...) vmdk_say((w)->result, (w)->path, __VA_ARGS__)

static inline bool vmdk_fixing(const struct vmdk_walk *w)
{
    return (w->fix & DR_CHECK_FIX_ALL) == DR_CHECK_FIX_ALL && w->e->access == VMDK_RW;
}

static inline void vmdk_count(struct vmdk_walk *w, bool fixed)
{
    if (fixed)
        w->result->corruptions_fixed++;
    else
        w->result->corruptions++;
    w->damaged |= !fixed;
}

static inline bool vmdk_is_used(const struct vmdk_walk *w, uint64_t unit)
{
    return w->used[unit / 8] >> unit % 8 & 1;
}

/* ------------------------------------------------------------------ check.c */

/* buf: as many bytes as a table has on disk are written from it. */
int vmdk_write_table(struct vmdk_walk *w, uint32_t sector, const uint8_t *buf,
                     struct dr_error *err);
/* Make a place for a table whose directory entry is unusable, with buf in it. */
int vmdk_new_table(struct vmdk_walk *w, uint64_t table, bool copy, const uint8_t *buf,
                   struct dr_error *err);

/* ------------------------------------------------------------------ check-ahead.c */

/* Is there a redundant table, in a place of its own where one can be? */
bool vmdk_has_copy(const struct vmdk_walk *w, uint64_t table);
/* Show all tables that can be where the directory says, in order, and, with copies, the redundant
 * one of each that vmdk_has_copy(). bytes, copy: NULL where it is a hole; copy also without one.
 * The bytes may be changed. Nothing of the tables is written meanwhile. */
typedef int (*vmdk_table_fn)(struct vmdk_walk *w, uint64_t table, uint8_t *bytes, uint8_t *copy,
                             struct dr_error *err);
int vmdk_read_tables(struct vmdk_walk *w, bool copies, vmdk_table_fn fn, struct dr_error *err);

/* ------------------------------------------------------------------ check-tables.c */

/* Note what all entries lead to. */
int vmdk_mark_tables(struct vmdk_walk *w, struct dr_error *err);
/* Then tell what is wrong with the tables, and mend it. */
int vmdk_check_tables(struct vmdk_walk *w, struct dr_error *err);
void vmdk_walk_free(struct vmdk_walk *w);

/* ------------------------------------------------------------------ check-text.c */

int vmdk_check_text(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                    struct dr_error *err);

#endif
