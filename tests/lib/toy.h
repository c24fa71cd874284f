/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A toy image format, only for tests: everything a rich format needs, in small sizes, so that a
 * short random run reaches every corner of the driver contract.
 *
 * All integers big endian. Clusters of 512 to 4096 bytes. A guest unit is a cluster, of eight
 * sub-units where clusters have 4096 bytes. With small clusters, tables of all kinds and data share
 * the pages of the cache.
 *
 *   header       one sector at 0: where everything is, and the switches of all changes
 *   roots        place of each count block, u64. Those of the data file stand at 4096 and never
 *                move. Those of the image file begin small; when they are full, a larger table is
 *                written elsewhere and the header switched.
 *   count block  one cluster, with the counts of 64 clusters or more, u16. In the image file it
 * stands in the first of those; the first block is elsewhere. level 1      512 x u64, place of each
 * level-2 table level 2      l2_entries x 16 bytes, in as many clusters as it takes: u64 host, u8
 * held sub-units, u8 zero sub-units, u16 length of the coded unit (0 = plain), u32 0
 *
 * An internal snapshot is a further level-1 table. The count of a cluster is the number of ways
 * that lead to it from all level-1 tables; what has a count above one is copied before it changes.
 */
#ifndef DROVER_TESTS_TOY_H
#define DROVER_TESTS_TOY_H

#include "core/core.h"

#define TOY_SECTOR       512u
#define TOY_ROOTS        512u /* most entries of a roots table */
#define TOY_L1           512u /* entries in a level-1 table */
#define TOY_L1_BYTES     4096u
#define TOY_MAX_CLUSTERS 32768u
#define TOY_MAX_CLUSTER  4096u
#define TOY_MAX_L2       65536u
#define TOY_SNAPSHOTS    4u

enum {
    TOY_DATA_ROOTS_AT = 4096,
    TOY_FIRST_L1 = 8192,
    TOY_FIRST_ROOTS = 12288,
    TOY_FIRST_BLOCK = 16384
};

enum toy_space { TOY_META, TOY_DATA }; /* index in files[] and of the counts */

/* A level-2 entry. */
struct toy_entry {
    uint64_t host;
    uint8_t held, zero;
    uint16_t coded;
};

struct toy {
    uint32_t cluster, sub, subs;   /* bytes, bytes, how many */
    uint32_t l2_entries, l2_bytes; /* l2_bytes: whole clusters */
    uint32_t clusters;             /* limit of each file: beyond it, no space */
    uint64_t l1_at;
    uint64_t roots_at; /* of the image file's counts */
    uint32_t roots_n;
    uint64_t snapshots[TOY_SNAPSHOTS]; /* level-1 tables, 0 = none; the id is the index + 1 */
    bool marked;                       /* the unclean flag is on disk, set by this open */
    uint32_t block;                    /* counts in a block */
    bool leaks;                        /* a change failed half way: recover counts anew */
    bool moving;                       /* the roots are being moved */
    bool roots_full;                   /* they must be moved before anything is allocated */
    bool has_data;
    char data_name[64];
    uint64_t blocks[2][TOY_ROOTS]; /* the roots, as published in memory */
    uint64_t coded_next;           /* where the next coded unit may start, 0 = nowhere */
};

extern const struct dr_format dr_format_toy;

/* The header, at these places. */
enum {
    TOY_OFF_FLAGS = 8,
    TOY_OFF_SIZE = 16,
    TOY_OFF_CLUSTERS = 24,
    TOY_OFF_L2 = 28,
    TOY_OFF_SNAPSHOTS = 32,
    TOY_OFF_DATA = 64,
    TOY_OFF_BACKING_FORMAT = 128,
    TOY_OFF_BACKING = 144,
    TOY_OFF_ROOTS_AT = 464,
    TOY_OFF_ROOTS_N = 472,
    TOY_OFF_CLUSTER = 476,
    TOY_OFF_L1 = 480,
    TOY_OFF_BLOCK = 488,
};
enum { TOY_BACKING_CAP = TOY_OFF_ROOTS_AT - TOY_OFF_BACKING };
enum { TOY_FLAG_UNCLEAN = 1 };

int toy_read_header(struct dr_image *image, uint8_t sector[512], struct dr_error *err);
int toy_write_header(struct dr_image *image, const uint8_t sector[512], struct dr_error *err);

static inline unsigned toy_data_space(const struct toy *t)
{
    return t->has_data ? TOY_DATA : TOY_META;
}

static inline uint32_t toy_round_up(const struct toy *t, uint64_t len)
{
    return (uint32_t)((len + t->cluster - 1) / t->cluster * t->cluster);
}

static inline uint32_t toy_roots_bytes(const struct toy *t)
{
    return toy_round_up(t, 8ull * t->roots_n);
}

struct toy_entry toy_get_entry(const uint8_t *p);
void toy_put_entry(uint8_t *p, const struct toy_entry *e);
/* NULL, or what is wrong with it. */
const char *toy_entry_problem(const struct toy *t, const struct toy_entry *e);

/* toy.c, for toy-write.c; image->lock held, -EAGAIN as in a callback. */
uint8_t toy_all(const struct toy *t);
uint64_t toy_span(const struct toy *t);
uint64_t toy_count_at(const struct toy *t, unsigned space, uint64_t place);
int toy_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count);
int toy_used_count(struct dr_image *image, unsigned space, uint64_t place, uint16_t *count,
                   struct dr_error *err);
int toy_find_l2(struct dr_image *image, uint64_t off, uint64_t *table, uint64_t *hole,
                struct dr_error *err);
uint64_t toy_entry_place(const struct toy *t, uint64_t table, uint64_t off);
int toy_entry_at(struct dr_image *image, const struct dr_page *page, uint64_t at, uint64_t off,
                 struct toy_entry *e, struct dr_error *err);

/* toy-write.c, the callbacks; and the roots go elsewhere, where there is room for more of them. */
int toy_move_roots(struct dr_image *image, struct dr_error *err);
int toy_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
void toy_publish(struct dr_image *image, struct dr_reservation *r);
void toy_cancel(struct dr_image *image, struct dr_reservation *r);
void toy_release(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone);
void toy_reuse(struct dr_image *image, const struct dr_freed *gone);

/* toy-write.c, for toy-snapshot.c and the moving of roots; image->lock held, -EAGAIN as in a
 * callback.
 */
/* Counts of all clusters in [place, place + len): pin them, unpin them (they are in memory). */
int toy_pin_counts(struct dr_image *image, unsigned space, uint64_t place, uint64_t len);
/* Allocates len bytes of whole clusters in a row; their counts are one. */
int toy_allocate(struct dr_image *image, unsigned space, uint64_t len, uint64_t *place,
                 struct dr_error *err);
/* A way to [place, place + len) is gone. Its counts are pinned, and stay so until they are lowered.
 */
void toy_free(struct dr_image *image, unsigned space, uint64_t place, uint64_t len);

/* toy-create.c */
extern const char toy_magic[8];
extern const struct dr_option_help toy_options[];
int toy_create(struct dr_fs *fs, const char *path, const struct dr_create_params *p,
               struct dr_error *err);
/* Record the parent in a header; NULL = none. */
int toy_header_backing(uint8_t *h, const char *name, const char *format, struct dr_error *err);
/* False: no such clusters. */
bool toy_set_cluster(struct toy *t, uint32_t cluster);

/* toy-check.c */
int toy_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
              struct dr_error *err);
int toy_recover(struct dr_image *image, struct dr_error *err);
int toy_trim(struct dr_image *image, struct dr_error *err);
/* Make the counts on disk what the tables say, with one more level-1 table (0 = none). */
int toy_recount(struct dr_image *image, uint64_t extra_l1, struct dr_error *err);

/* toy-snapshot.c */
int toy_snapshot_create(struct dr_image *image, const char *name, struct dr_error *err);
int toy_snapshot_apply(struct dr_image *image, const char *id, struct dr_error *err);
int toy_snapshot_delete(struct dr_image *image, const char *id, struct dr_error *err);
int toy_snapshot_list(struct dr_image *image, dr_snapshot_each each, void *user,
                      struct dr_error *err);

/* Keep the present state of a closed image as an internal snapshot. */
int toy_snapshot(struct dr_fs *fs, const char *path, struct dr_error *err);
/* What the first snapshot holds in [0, len), unheld bytes as `hole`. The image must be closed. */
int toy_snapshot_read(struct dr_fs *fs, const char *path, uint8_t *buf, size_t len, uint8_t hole,
                      struct dr_error *err);

#endif
