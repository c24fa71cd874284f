/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the bitmaps of a small disk must say: a mirror of them in memory, for test-programs.c. It
 * follows each operation that ended well, and judges bitmaps that were read after a power cut. */
#ifndef DR_TEST_NOTED_H
#define DR_TEST_NOTED_H

#include "core/core.h"
#include "drover/ops.h"

enum { NOTED_MAX = 3 };

struct noted_bitmap {
    char name[8];
    bool enabled, inconsistent;
    /* A bit for each sector of the disk. Enabled: those that must be set; others may be. Disabled:
     * those that are. */
    uint64_t bits;
};

struct noted {
    struct noted_bitmap list[NOTED_MAX];
    unsigned n;
};

/* "on" is enabled and has no bits; "off" is disabled, and has bits in the second unit. The disk
 * shows `unit` bytes at `bytes` there. */
int noted_make(struct dr_disk *disk, uint64_t unit, const uint8_t *bytes, struct noted *now,
               struct dr_error *err);

/* "off" is merged into the bitmap; the other actions have no arguments. */
int noted_change(struct dr_disk *disk, const char *name, enum dr_bitmap_action action,
                 struct noted *now, struct dr_error *err);

/* Enabled ones must have what differs. size: the smaller one, where it changed. */
void noted_compare(struct noted *now, const uint8_t *before, const uint8_t *after, uint64_t size);

/* Bits behind the end are forgotten. */
void noted_cut(struct noted *now, uint64_t size);

/* The bitmaps of an image; bits of an inconsistent one are not read. */
int noted_read(struct dr_fs *fs, const char *path, struct noted *found, struct dr_error *err);

/* Which of them a cut may leave inconsistent. */
enum noted_state {
    NOTED_STORED, /* none: the disk was closed */
    NOTED_OPEN,   /* the enabled ones: their bits are in memory */
    NOTED_ANY,    /* all: each gets another length when the disk gets another size, and those in a
                     file beside the image are distrusted together */
};

/* Can `found` be what is left of `then`? then_view and view are what the disk showed, up to size.
 * NULL, or what is wrong. */
const char *noted_wrong(const struct noted *found, const struct noted *then,
                        const uint8_t *then_view, const uint8_t *view, uint64_t size,
                        enum noted_state state);

#endif
