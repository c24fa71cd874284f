/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A toy image format, only for tests: everything a rich format needs, in small sizes, so that a
 * short random run reaches every corner of the driver contract.
 *
 * All integers big endian. Clusters of 4 KiB; guest units of 4 KiB in eight sub-units of 512.
 *
 *   cluster 0   header (one sector)
 *   cluster 1   roots of the counts of the image file: 512 x u64, place of each count block
 *   cluster 2   the same for the data file
 *   cluster 3   level-1 table: 512 x u64, place of each level-2 table
 *   cluster 4   first count block of the image file: 64 x u16; each further one stands in the first
 *               of the 64 clusters it counts; the data file's are where there was room
 *   level-2     l2_entries x 16 bytes: u64 host, u8 held sub-units, u8 zero sub-units, u16 length
 * of the coded unit (0 = plain), u32 0
 *
 * An internal snapshot is a second level-1 table; tables and data below it have a count above one
 * and are copied before they change.
 */
#ifndef DROVER_TESTS_TOY_H
#define DROVER_TESTS_TOY_H

#include "core/core.h"

#define TOY_CLUSTER      4096u
#define TOY_SUB          512u
#define TOY_BLOCK        64u  /* counts in a block */
#define TOY_ROOTS        512u /* entries in a roots page and in a level-1 table */
#define TOY_MAX_CLUSTERS (TOY_BLOCK * TOY_ROOTS)
#define TOY_MAX_L2       256u
#define TOY_L1_AT        (3u * TOY_CLUSTER)

enum toy_space { TOY_META, TOY_DATA }; /* index in files[] and of the counts */

/* A level-2 entry. */
struct toy_entry {
    uint64_t host;
    uint8_t held, zero;
    uint16_t coded;
};

struct toy {
    uint32_t l2_entries;
    uint32_t clusters; /* limit of each file: beyond it, no space */
    uint64_t snapshot; /* level-1 table of the internal snapshot, 0 = none */
    bool marked;       /* the unclean flag is on disk, set by this open */
    bool has_data;
    char data_name[64];
    uint64_t blocks[2][TOY_ROOTS]; /* the roots, as published in memory */
    uint64_t coded_next;           /* where the next coded unit may start, 0 = nowhere */
};

extern const struct dr_format dr_format_toy;

/* Header, shared by toy.c and toy-check.c. */
int toy_read_header(struct dr_image *image, uint8_t sector[512], struct dr_error *err);
int toy_write_header(struct dr_image *image, const uint8_t sector[512], struct dr_error *err);

enum { TOY_OFF_FLAGS = 8 };
enum { TOY_FLAG_UNCLEAN = 1 };

static inline unsigned toy_data_space(const struct toy *t)
{
    return t->has_data ? TOY_DATA : TOY_META;
}

struct toy_entry toy_get_entry(const uint8_t *p);
void toy_put_entry(uint8_t *p, const struct toy_entry *e);
/* NULL, or what is wrong with it. */
const char *toy_entry_problem(const struct toy *t, const struct toy_entry *e);

/* toy-check.c */
int toy_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
              struct dr_error *err);
int toy_recover(struct dr_image *image, struct dr_error *err);
int toy_trim(struct dr_image *image, struct dr_error *err);

/* Keep the present state of a closed image as its internal snapshot (replacing none: -EEXIST). */
int toy_snapshot(struct dr_fs *fs, const char *path, struct dr_error *err);
/* What the snapshot holds in [0, len), unheld bytes as `hole`. The image must be closed. */
int toy_snapshot_read(struct dr_fs *fs, const char *path, uint8_t *buf, size_t len, uint8_t hole,
                      struct dr_error *err);

#endif
