/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The qcow2 driver's own view of an open image. Files of this folder only.
 *
 *   header.c   the first cluster: decode, check, encode    entry.c   L1 and L2 entries
 *   head.c     rewriting the first cluster, crash-safe     map.c     look-up
 *   open.c     open, close, probe, begin, end              alloc.c   counts, finding free clusters
 *   reftable.c the refcount table grows                    write.c   reserve, publish, release
 *   codec.c    compressed clusters                         create.c  new images, measure
 *   backing.c  set_backing, set_bitmaps, set_head          resize.c  resize, trim
 *   check.c    check, repair, recover                      info.c    info
 *   crypt.c    encrypted data
 *   amend.c    another version and the like                refcounts.c  counts of another width
 *   snapshot.h internal snapshots (snapshot*.c, views*.c)  bitmap.h  bitmaps (bitmap*.c)
 *
 *   header ─► L1 table ─► L2 tables ─► data clusters
 *          ─► refcount table ─► refcount blocks: how many ways lead to each cluster of the file
 *
 * Order of the metadata (invariant 1): a count becomes durable before what needs it, a table before
 * the link to it. */
#ifndef DR_FORMATS_QCOW2_QCOW2_H
#define DR_FORMATS_QCOW2_QCOW2_H

#include "base/bytes.h"
#include "core/core.h"
#include "formats/qcow2/header.h"

#define ULL(x) ((unsigned long long)(x))

/* Levels of the page cache: a table is one below the link to it. */
#ifndef QCOW2_LEVELS /* tests build a driver in which the order is wrong */
#define QCOW2_LEVELS 0, 1, 2, 3
#endif
static const unsigned qcow2_levels[] = {QCOW2_LEVELS};
#define QCOW2_LEVEL_BLOCK qcow2_levels[0]
#define QCOW2_LEVEL_ROOT  qcow2_levels[1]
#define QCOW2_LEVEL_L2    qcow2_levels[2]
#define QCOW2_LEVEL_L1    qcow2_levels[3]

#define QCOW2_COPIED      (UINT64_C(1) << 63) /* the only way to what it points to */
#define QCOW2_CODED       (UINT64_C(1) << 62)
#define QCOW2_ZERO        UINT64_C(1)
#define QCOW2_OFFSET      UINT64_C(0x00fffffffffffe00)
#define QCOW2_NO_PLACE    UINT64_MAX
#define QCOW2_FREE_RANGES 256

/* An L2 entry, of either kind. Without sub-clusters the masks have one bit. */
struct qcow2_entry {
    uint64_t host;       /* of the cluster, or of the first coded byte; QCOW2_NO_PLACE = none */
    uint32_t coded;      /* bytes of the coded cluster, an upper bound; 0 = not coded */
    bool copied;         /* nothing else refers to host */
    uint32_t held, zero; /* sub-clusters with data at host / that read as zeros */
};

struct qcow2_free { /* clusters */
    uint64_t first, n;
};

/* Numbers of clusters; open addressing, 0 is none (cluster 0 is the header). */
struct qcow2_set {
    uint64_t *slots;
    size_t n, room; /* room: 0 or a power of two */
};

struct qcow2 {
    struct qcow2_header h; /* as on disk; l1_*, reftable_* change under image->lock */
    uint64_t cluster;      /* bytes */
    unsigned entry;        /* bytes of an L2 entry */
    uint64_t l2_entries;   /* in a table, a power of two: */
    unsigned l2_bits;
    unsigned subs;       /* in a cluster: 1 or 32 */
    uint64_t sub;        /* bytes */
    unsigned data;       /* index in files[] of the file with the guest's data */
    bool marked;         /* begin_write has been through */
    bool changing;       /* the same, for changes of the guest's view */
    uint64_t bitmaps_at; /* bitmap directory; 0 = there are no bitmaps */
    uint64_t bitmaps_len;
    uint32_t n_bitmaps;
    struct qcow2_track *track; /* what changes, for the bitmaps; NULL: none is enabled */
    _Atomic bool editing;      /* the bitmaps change: begin_write leaves them alone */
    bool bitmaps_bad;          /* the extension makes no sense; opened to be repaired */
    uint64_t crypto_at, crypto_len;
    struct dr_file *plain; /* the guest's data, decrypted; NULL: nothing is encrypted, or there is
                              no password */
    char *data_name;       /* as recorded, or NULL */

    /* Writing, under image->lock. */
    uint64_t *reftable;  /* as published in memory; NULL: not read yet */
    uint64_t reftable_n; /* entries */
    bool reftable_full;  /* must grow before anything is allocated */
    bool reftable_moving;
    uint64_t cursor; /* cluster: nothing below it is free but what `free` tells */
    struct qcow2_free free[QCOW2_FREE_RANGES];
    unsigned n_free;
    uint64_t coded_next; /* where the next coded cluster may start; 0 = at a new cluster */
    char *damage;        /* what was found wrong: nothing more is written; NULL = nothing */
    bool damage_noted; /* nothing more is written, and no mark needs to be: it is, or not wanted */
    struct qcow2_set meta;         /* clusters of tables that are known: none of them takes data */
    struct qcow2_compact *compact; /* where units move to; NULL: they do not */
    struct qcow2_views *views;     /* the disk and its snapshots, while they are filled together */
};

static inline struct qcow2 *qcow2_of(const struct dr_image *image)
{
    return image->state;
}

static inline bool qcow2_has_data_file(const struct qcow2 *q)
{
    return q->h.incompatible & QCOW2_DATA_FILE;
}

/* Where the guest's bytes are read and written. */
static inline struct dr_file *qcow2_data(const struct dr_image *image)
{
    const struct qcow2 *q = qcow2_of(image);
    return q->plain ? q->plain : image->files[q->data];
}

/* The cluster that holds a byte of the guest's disk or of the file; where it begins, and where the
 * byte is in it. Shifts and masks, since each look-up does a dozen of these. */
static inline uint64_t qcow2_cluster_of(const struct qcow2 *q, uint64_t off)
{
    return off >> q->h.cluster_bits;
}

static inline uint64_t qcow2_in_cluster(const struct qcow2 *q, uint64_t off)
{
    return off & (q->cluster - 1);
}

static inline uint64_t qcow2_cluster_start(const struct qcow2 *q, uint64_t off)
{
    return off & ~(q->cluster - 1);
}

/* ------------------------------------------------------------------ entry.c */

/* NULL, or what is wrong with it. raw: q->entry bytes. off: guest offset of its cluster. */
const char *qcow2_entry_decode(const struct qcow2 *q, const uint8_t *raw, uint64_t off,
                               struct qcow2_entry *e);
void qcow2_entry_encode(const struct qcow2 *q, const struct qcow2_entry *e, uint8_t *raw);
static inline uint32_t qcow2_all_subs(const struct qcow2 *q)
{
    return q->subs == 32 ? UINT32_MAX : 1;
}

/* ------------------------------------------------------------------ map.c */

/* The L1 entry v at byte `at`: -EIO where it cannot be one. */
int qcow2_check_l1_entry(struct dr_image *image, uint64_t at, uint64_t v, struct dr_error *err);
/* [page] Guest bytes that one L2 table covers. */
static inline uint64_t qcow2_l2_span(const struct qcow2 *q)
{
    return q->l2_entries * q->cluster;
}
/* [page] The L2 table for off: *table 0 = none, *copied = only this L1 table refers to it. *hole:
 * how many bytes from off on have none. */
int qcow2_find_l2(struct dr_image *image, uint64_t off, uint64_t *table, bool *copied,
                  uint64_t *hole, struct dr_error *err);
uint64_t qcow2_entry_at(const struct qcow2 *q, uint64_t table, uint64_t off);
/* [page] The page of an entry of len bytes at byte `at` of an L1 or L2 table. -EIO: the file ends
 * before it. */
int qcow2_get_table_page(struct dr_image *image, uint64_t at, unsigned len, struct dr_page **page,
                         struct dr_error *err);
/* A damaged entry: -EIO naming it. */
int qcow2_read_entry(struct dr_image *image, const struct dr_page *page, uint64_t at, uint64_t off,
                     struct qcow2_entry *e, struct dr_error *err);
int qcow2_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
              struct dr_error *err);

/* ------------------------------------------------------------------ guard.c; image->lock held
 *
 * Which clusters hold tables: a damaged image may have an entry that leads there. Without memory
 * the protection is less, nothing else. */

void qcow2_guard(struct qcow2 *q, uint64_t host);
void qcow2_unguard(struct qcow2 *q, uint64_t host, uint64_t len);
/* What [host, host + len) belongs to, or NULL: it may take data. */
const char *qcow2_guarded(const struct qcow2 *q, uint64_t host, uint64_t len);

/* ------------------------------------------------------------------ alloc.c; image->lock held */

/* The count of the i-th entry of a block. */
uint64_t qcow2_count_get(unsigned order, const uint8_t *block, uint64_t i);
void qcow2_count_put(unsigned order, uint8_t *block, uint64_t i, uint64_t count);
uint64_t qcow2_block_entries(const struct qcow2 *q);
uint64_t qcow2_max_count(const struct qcow2 *q);
/* [page] The count of the cluster at host. */
int qcow2_count(struct dr_image *image, uint64_t host, uint64_t *count);
/* [page] Pin / unpin the counts of all clusters that [host, host + len) touches, which are in use.
 */
int qcow2_pin_counts(struct dr_image *image, uint64_t host, uint64_t len);
void qcow2_unpin_counts(struct dr_image *image, uint64_t host, uint64_t len);
/* [page] Pin them for a reservation; they may be free. */
int qcow2_reserve_counts(struct dr_image *image, struct dr_reservation *r, uint64_t host,
                         uint64_t len);
/* Pinned counts: add diff. */
void qcow2_add(struct dr_image *image, uint64_t host, uint64_t len, int diff);
/* [page] Add diff (-1, 0 or 1) to the counts of clusters from the i-th on, n at most, all of which
 * are in use. *done: as many as stand in one page, and none whose count would be too large
 * afterwards, or 0 unless that is asked for. -EOVERFLOW: the first one would be too large. */
enum qcow2_shift { QCOW2_SHIFT_LOOK, QCOW2_SHIFT_CHANGE, QCOW2_SHIFT_TO_ZERO };
int qcow2_shift_counts(struct dr_image *image, uint64_t i, uint64_t n, int diff,
                       enum qcow2_shift how, uint64_t *done);
/* [page] *done of n clusters from the i-th on, in one page of counts: if the first one is counted 0
 * times so are all of these, and are counted once from now on, and pinned for qcow2_free_later();
 * else none of them is changed. */
int qcow2_revive_counts(struct dr_image *image, uint64_t i, uint64_t n, uint64_t *done,
                        bool *revived);
/* [page] How many of n clusters from the i-th on, in one page of counts, are counted once. */
int qcow2_count_sole(struct dr_image *image, uint64_t i, uint64_t n, uint64_t *sole);
/* [page] n free clusters in a row; their counts are still 0, and in memory. */
int qcow2_find_free(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err);
/* [page] The same, counted 1 from now on. */
int qcow2_allocate(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err);
/* [page] These n clusters are counted 1 from now on. 1: one of them is not free. */
int qcow2_allocate_at(struct dr_image *image, uint64_t host, uint64_t n);
/* [page] A place for so many coded bytes that are going to be counted `times` times, behind those
 * that were written last. 1: they do not fit there. */
int qcow2_find_packed(struct dr_image *image, uint32_t len, uint64_t times, uint64_t *host);
/* Coded bytes were given a place that ends there. */
void qcow2_packed_until(struct qcow2 *q, uint64_t end);
/* One way to each cluster of [host, host + len) is gone, and was pinned: it stays so until release.
 */
void qcow2_free_later(struct dr_image *image, uint64_t host, uint64_t len);
/* The cluster is free again. */
void qcow2_note_free(struct qcow2 *q, uint64_t host, uint64_t len);
/* [page] The tables contradict each other at a place that was to be written to: nothing more is
 * written by this open, and begin_write, which is asked for, records that and fails with the text.
 * Returns -EAGAIN. */
int qcow2_damage(struct dr_image *image, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* Fails with what was found. */
int qcow2_refuse_damaged(struct dr_image *image, struct dr_error *err);
void qcow2_release(struct dr_image *image, const struct dr_freed *freed, struct dr_freed *gone);
void qcow2_reuse(struct dr_image *image, const struct dr_freed *gone);

/* ------------------------------------------------------------------ reftable.c; no lock held */

int qcow2_load_reftable(struct dr_image *image, struct dr_error *err);
int qcow2_grow_reftable(struct dr_image *image, struct dr_error *err);
/* Like qcow2_allocate and then qcow2_free_later, for callers that hold no lock. */
/* No lock is held. */
int qcow2_take(struct dr_image *image, uint64_t n, uint64_t *host, struct dr_error *err);
/* Write a table into clusters that were taken, past the page cache, which forgets what it has of
 * that place: nothing in there is dirty, since a dirty sector keeps all of its page. */
int qcow2_write_taken(struct dr_image *image, const void *bytes, uint64_t len, uint64_t host,
                      struct dr_error *err);
int qcow2_lose(struct dr_image *image, uint64_t host, uint64_t len, struct dr_error *err);
/* The same of qcow2_count. */
int qcow2_count_of(struct dr_image *image, uint64_t host, uint64_t *count, struct dr_error *err);

/* ------------------------------------------------------------------ head.c; no lock held */

/* The first cluster, malloc'ed. */
int qcow2_read_head(struct dr_image *image, uint8_t **head, struct dr_error *err);
/* Write bytes of the first sector, durably: a switch. */
int qcow2_switch(struct dr_image *image, unsigned at, const void *bytes, size_t len,
                 struct dr_error *err);
/* The same for a switch to another table or size. When it fails, the file may have the one or the
 * other, so nothing more is written by this open: opening the image again tells. */
int qcow2_switch_tables(struct dr_image *image, unsigned at, const void *bytes, size_t len,
                        struct dr_error *err);
/* Set and clear bits of a feature field (QCOW2_AT_...). */
int qcow2_switch_bits(struct dr_image *image, unsigned field, uint64_t set, uint64_t clear,
                      struct dr_error *err);

/* ------------------------------------------------------------------ backing.c; nobody writes */

/* Another directory of bitmaps: one switch of the first sector. n 0: there are none any more. After
 * a failure the header names the old one, or q->damage is set: the one or the other. */
int qcow2_set_bitmaps(struct dr_image *image, uint32_t n, uint64_t len, uint64_t at,
                      struct dr_error *err);

/* The header's version, and the data file's recorded name ("": none, NULL: as it is), by one
 * switch. Another version has no features set, and counts of 16 bits. try: write nothing. After a
 * failure the header is the old one, or q->damage is set: the one or the other. */
int qcow2_set_head(struct dr_image *image, unsigned version, const char *data_file, bool try,
                   struct dr_error *err);

/* ------------------------------------------------------------------ check.c */

/* Forget what is in memory of the tables and the counts: the driver has changed them in the file.
 */
int qcow2_reload(struct dr_image *image, struct dr_error *err);
/* -EIO where something is counted less often than it is used, or its count cannot say how often, so
 * that one user could not be told from the last one. All is flushed, and nobody writes. */
int qcow2_refuse_low_counts(struct dr_image *image, struct dr_error *err);

/* ------------------------------------------------------------------ crypt.c */

/* Open what is encrypted, if the caller has said which secret has the password. */
int qcow2_unlock(struct dr_image *image, struct dr_error *err);
/* Is it encrypted, and was not opened? Then the guest's bytes cannot be had. */
static inline bool qcow2_is_locked(const struct qcow2 *q)
{
    return q->h.crypt && !q->plain;
}
int qcow2_refuse_locked(const struct dr_image *image, struct dr_error *err);
bool qcow2_encrypted(const struct dr_image *image);
int qcow2_crypt_info(struct dr_image *image, json_t *data, struct dr_error *err);

/* ------------------------------------------------------------------ write.c; image->lock held */

/* [page] May data be written? */
int qcow2_ready_to_write(struct dr_image *image, struct dr_error *err);
/* [page] A new L2 table at `fresh`, which is free and not counted yet: a copy of the one at old
 * without COPIED, whose pages are in memory; or, if old is 0, empty. */
int qcow2_write_table(struct dr_image *image, uint64_t fresh, uint64_t old);
/* [page] An L2 table at fresh, which is free, in the place of old (0 = none), whose pages are in
 * memory and which is freed; link: where its L1 entry stands. shares: others keep the old one, so
 * what the two lead to is shared. dr_free_ahead comes before. */
int qcow2_replace_table(struct dr_image *image, uint64_t link, uint64_t old, uint64_t fresh,
                        bool shares);

/* ------------------------------------------------------------------ the callbacks */

int qcow2_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                  uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
void qcow2_publish(struct dr_image *image, struct dr_reservation *r);
void qcow2_cancel(struct dr_image *image, struct dr_reservation *r);
int qcow2_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                 size_t in_len, uint8_t *out, struct dr_error *err);
int64_t qcow2_encode(struct dr_image *image, const uint8_t *in, size_t in_len, uint64_t guest_off,
                     uint8_t *out, size_t out_cap);
extern const struct dr_option_help qcow2_create_options[];
int qcow2_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                 struct dr_error *err);
int qcow2_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                  struct dr_error *err);
int qcow2_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                      const char *format, unsigned flags, struct dr_error *err);
extern const struct dr_option_help qcow2_amend_options[];
int qcow2_amend(struct dr_image *image, struct dr_amend *what, enum dr_amend_phase phase,
                struct dr_error *err);
int qcow2_recover(struct dr_image *image, struct dr_error *err);
/* Repair the image, whose snapshots' entries get what version 3 demands, also in version 2. */
int qcow2_complete_snapshots(struct dr_image *image, struct dr_error *err);
int qcow2_resize(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err);
/* May the disk get this size? */
int qcow2_check_size(struct dr_image *image, uint64_t size, struct dr_error *err);
/* The L1 table moves to n clusters at fresh, which were taken for it. */
int qcow2_place_l1(struct dr_image *image, uint64_t fresh, uint64_t n, struct dr_error *err);
/* Whole clusters behind the disk's end become nothing; an interrupted change of the size leaves
 * some. Durable with the next flush. */
int qcow2_clear_behind(struct dr_image *image, struct dr_error *err);
int qcow2_trim(struct dr_image *image, struct dr_error *err);
int qcow2_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err);
int qcow2_orphans(struct dr_image *image, dr_orphan_fn each, void *user, struct dr_error *err);
int qcow2_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
                struct dr_error *err);

#endif
