/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The VMDK driver's own view of an open image. Files of this folder only.
 *
 *   descriptor*.c  the text            header.c   the sparse extent's header
 *   charset.c      names in the text   names.c    files that are called otherwise
 *   open.c         open, close, probe  store.c    writing the descriptor back, crash-safe
 *   extent.c       look-up, GD, map    write.c    reserve, publish, release, begin, end
 *   ids.c          content ids         backing.c  set_backing, candidates
 *   create.c       new images          recover.c  recover, trim
 *   amend.c        other settings      adopt.c    descriptors for what is there
 *   check*.c       check, repair       info.c     info
 *   stream*.c      streamOptimized
 *   vmware-lock.c  locks of VMware's
 *   resize.c       another size        tables.c   its tables
 *   cowd*.c        the sparse extent of ESX (vmfsSparse)
 *   sesparse.c     ... and of later ESX
 *   uuid.c         VirtualBox's children
 *   bare.c         these without their descriptors
 */
#ifndef DR_FORMATS_VMDK_VMDK_H
#define DR_FORMATS_VMDK_VMDK_H

#include "base/bytes.h"
#include "core/core.h"
#include "formats/vmdk/descriptor.h"
#include "formats/vmdk/header.h"

#define VMDK_FLAT_UNIT UINT64_C(65536) /* lock width where there are no grains */

/* A grain of a stream that has lost its tables, and the sector of its marker. */
struct vmdk_found {
    uint64_t grain, sector;
};

/* One non-empty extent of the disk. */
struct vmdk_extent {
    enum vmdk_extent_type type;
    size_t line; /* index in desc.extents */
    enum vmdk_access access;
    uint64_t start, len; /* guest bytes; the line in the descriptor says so, not the header */
    unsigned file;       /* index in image->files; ZERO and NOACCESS have none: VMDK_NO_FILE */
    uint64_t host;       /* FLAT, VMFS: byte offset in the file */
    uint64_t there;      /* bytes that can be read: less than len only with DR_OPEN_SALVAGE */
    char type_name[24];  /* as the descriptor says */

    /* SPARSE, which a COWD extent is, too (h.cowd) */
    struct vmdk_header h;
    uint64_t grain; /* bytes */
    /* The directories, n_tables entries each, while vmdk_load_directories' caller works on whole
     * tables; look-ups go through the page cache. rgd NULL: there are no redundant tables. */
    uint32_t *gd, *rgd;
    /* The sector of the first table, if all that are used stand in a row, as programs lay them out
     * that make a disk with its tables; the directory need not be asked then. 0: it must be. */
    uint32_t tables_at;
    _Atomic bool marked; /* the unclean byte is set by this open */
    bool torn;           /* ... and stays: a table and its copy may differ */

    /* A stream without tables (scanned): the grains that are there, by number. */
    struct vmdk_found *found;
    size_t n_found;
    bool scanned, complete; /* complete: what was not found is not in the stream */

    /* Allocation, under image->lock. */
    _Atomic uint64_t
        next;       /* also read without it; sector behind the last grain; 0: not looked at yet */
    uint32_t *free; /* sectors of grains that came back in this session */
    size_t n_free;
    struct vmdk_sesparse *se;     /* SESPARSE */
    struct vmdk_compact *compact; /* where grains move to; NULL: they do not */
    uint32_t spare_table;         /* COWD: a place that a table was begun in, 0: none */
};
#define VMDK_NO_FILE UINT32_MAX

struct vmdk_state {
    struct vmdk_desc desc;
    bool vmware_lock;             /* there is a directory X.vmdk.lck with a lock in it */
    bool embedded;                /* the descriptor is part of files[0] */
    uint64_t desc_off, desc_area; /* embedded: bytes */
    bool redo;                    /* the descriptor came from a redo copy that is to be finished */
    bool recoded; /* the text is one in UTF-8 with line feeds of a file that has another */
    bool by_uuid; /* the parent was found by its UUID (uuid.c) */
    bool bare;    /* there is no descriptor: a text stands for it that is in no file */
    uint32_t cid, parent_cid;
    bool cid_changed; /* since open or the last end_write */
    /* A commit into the parent was interrupted, or failed: its CID is the one that follows from
     * ours, and our record of it is old. The write that changes our CID must mend that record, too.
     */
    bool parent_moved;
    uint32_t parent_now;
    struct vmdk_extent *extents;
    size_t n_extents;
};

static inline struct vmdk_state *vmdk_of(const struct dr_image *image)
{
    return image->state;
}

/* ------------------------------------------------------------------ extent.c */

/* The extent that holds off; off < image->size. */
struct vmdk_extent *vmdk_extent_at(const struct dr_image *image, uint64_t off);
const char *vmdk_extent_path(const struct dr_image *image, const struct vmdk_extent *e);

/* Where the entry of a grain stands in the file. */
struct vmdk_slot {
    uint64_t table, entry;
    uint64_t pos, rpos; /* byte offsets of the entry in the table and in its copy; 0 = no table /
                           no copy */
    uint32_t gde;
};
/* [page] Fills in all but rpos. -EIO: the directory points outside the file. */
int vmdk_slot(struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
              struct vmdk_slot *slot, struct dr_error *err);
/* [page] Fills in rpos of a slot that has pos. */
int vmdk_slot_copy(struct dr_image *image, const struct vmdk_extent *e, struct vmdk_slot *slot);
/* Set e->tables_at: at opening, and when an entry of the directory was changed. */
int vmdk_learn_tables(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
/* Read the directories of a sparse extent into e->gd and e->rgd / forget them. */
int vmdk_load_directories(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
void vmdk_drop_directories(struct vmdk_extent *e);
/* Does a directory entry point to a place where a table can be? */
bool vmdk_table_fits(const struct dr_image *image, const struct vmdk_extent *e, uint32_t gde);
/* Bytes of the grain that belong to the disk: the last one may be cut. */
uint64_t vmdk_grain_len(const struct vmdk_extent *e, uint64_t grain);
/* Is gte a place where grain's bytes can be? */
bool vmdk_gte_fits(const struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                   uint32_t gte);
/* Are its bytes found through tables? No two such extents share a file. */
static inline bool vmdk_has_tables(const struct vmdk_extent *e)
{
    return e->type == VMDK_SPARSE || e->type == VMDK_SESPARSE;
}
/* How many tables the extent's line asks for. The header's capacity may be more, and what it then
 * takes for entries need not be any: nothing behind these is ever written. */
static inline uint64_t vmdk_tables_used(const struct vmdk_extent *e)
{
    return dr_div_up(e->len, e->grain * e->h.gtes);
}
static inline bool vmdk_has_copies(const struct vmdk_extent *e)
{
    return e->h.flags & VMDK_FLAG_RGD;
}
static inline bool vmdk_has_zero_grains(const struct vmdk_extent *e)
{
    return e->h.flags & VMDK_FLAG_ZERO_GRAINS;
}

int vmdk_map(struct dr_image *image, uint64_t off, uint64_t len, struct dr_extent *ext,
             struct dr_error *err);
void vmdk_unit(const struct dr_image *image, uint64_t off, uint64_t *uoff, uint64_t *ulen);

/* ------------------------------------------------------------------ stream.c */

/* Compressed, each grain behind a marker? Such an extent is only read. */
static inline bool vmdk_is_stream(const struct vmdk_extent *e)
{
    return e->h.flags & VMDK_FLAG_COMPRESSED;
}
/* Call each for two flat extents that share bytes of a file, of which one may be written: a begins
 * first. A result below 0 ends that. */
typedef int (*vmdk_overlap_fn)(void *user, const struct vmdk_extent *a, const struct vmdk_extent *b,
                               struct dr_error *err);
int vmdk_each_overlap(const struct dr_image *image, vmdk_overlap_fn each, void *user,
                      struct dr_error *err);
/* -EROFS: a part of the disk is a stream, or of another kind that is only read. A parent that is
 * opened for reading becomes a writer only when something is committed into it. */
int vmdk_refuse_streams(const struct dr_image *image, struct dr_error *err);
/* Read the footer. An image that is opened for salvage may lack one: its grains are looked for, and
 * e->scanned says so. */
int vmdk_stream_open(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);
/* The grain whose marker is at the sector, from `inner` on. next: the sector of the next one, if it
 * is known. */
void vmdk_map_coded(const struct dr_image *image, const struct vmdk_extent *e, uint64_t grain,
                    uint64_t inner, uint64_t sector, uint64_t next, struct dr_extent *ext);
/* map of a scanned extent; rel: byte in the extent. */
int vmdk_map_found(const struct dr_image *image, const struct vmdk_extent *e, uint64_t rel,
                   uint64_t len, struct dr_extent *ext, struct dr_error *err);
int vmdk_decode(struct dr_image *image, const struct dr_extent *ext, const uint8_t *in,
                size_t in_len, uint8_t *out, struct dr_error *err);
int vmdk_check_stream(struct dr_image *image, struct vmdk_extent *e, struct dr_check_result *result,
                      struct dr_error *err);

/* ------------------------------------------------------------------ vmware-lock.c */

/* Look for a lock of VMware's: -EBUSY for a writer, a notice for a reader. Those who said that they
 * know better (FORCE_SHARE, NO_LOCK) hear nothing. */
int vmdk_look_for_lock(struct dr_image *image, struct dr_error *err);
/* -EBUSY: there was one when it was opened. A parent becomes a writer later. */
int vmdk_refuse_locked(const struct dr_image *image, struct dr_error *err);

/* ------------------------------------------------------------------ write.c */

/* -EROFS: this extent cannot be written. */
int vmdk_check_writable(const struct dr_image *image, const struct vmdk_extent *e, uint64_t off,
                        struct dr_error *err);
int vmdk_reserve(struct dr_image *image, uint64_t off, uint64_t len, enum dr_want want,
                 uint32_t host_len, struct dr_reservation *r, struct dr_error *err);
void vmdk_publish(struct dr_image *image, struct dr_reservation *r);
void vmdk_cancel(struct dr_image *image, struct dr_reservation *r);
void vmdk_reuse(struct dr_image *image, const struct dr_freed *gone);
/* Give back to the file system what this session reserved and did not use: nothing leaks without a
 * crash. No write is in flight. */
int vmdk_tidy(struct dr_image *image, struct vmdk_extent *e, struct dr_error *err);

/* ------------------------------------------------------------------ store.c */

enum vmdk_store_flag {
    VMDK_STORE_TRY = 1 << 0,     /* only find out whether it would work */
    VMDK_STORE_ANY_MIX = 1 << 1, /* each sector old or new is fine: no redo copy, no rename */
};
/* Make fresh the image's descriptor, durably; takes it over on success. -ENOSPC: does not fit. */
int vmdk_store(struct dr_image *image, struct vmdk_desc *fresh, unsigned flags,
               struct dr_error *err);
/* A copy of the descriptor to edit. */
int vmdk_desc_copy(const struct dr_image *image, struct vmdk_desc *copy, struct dr_error *err);
/* Embedded descriptor of [off, off+area) of f: the text as it counts, that is the redo copy if
 * there is a valid one. *text: malloc'ed. */
int vmdk_load_embedded(struct dr_file *f, uint64_t off, uint64_t area, char **text, size_t *len,
                       bool *redo, struct dr_error *err);
/* Finish an interrupted vmdk_store. */
int vmdk_finish_redo(struct dr_image *image, struct dr_error *err);

/* ------------------------------------------------------------------ tables.c
 *
 * Tables of a sparse extent are changed as a whole, past the page cache: for resize, which no
 * request accompanies. All metadata was flushed; what is written here, the page cache has forgotten
 * when the function returns. */

/* The extent's header and tables have room for so many sectors, which may be fewer than before. The
 * old tables hold until one sector of the header switches to new ones. */
int vmdk_set_capacity(struct dr_image *image, struct vmdk_extent *e, uint64_t sectors,
                      struct dr_error *err);
/* Nothing of the extent stands behind its end, neither in the tables nor in the last grain. was:
 * its length before, if it was longer. give: the grains there come back to use. */
int vmdk_clear_behind(struct dr_image *image, struct vmdk_extent *e, uint64_t was, bool give,
                      struct dr_error *err);
/* [from, to) of the extent, whole grains which have no entry, reads as zeros whatever the parent
 * has. The header has room for them; they may lie behind the end of the extent. */
int vmdk_mask(struct dr_image *image, struct vmdk_extent *e, uint64_t from, uint64_t to,
              struct dr_error *err);
/* Directories and tables in a row from this sector on, where the file has as much room and nothing
 * stands. One sector of the header switches to them; what it led to before is the caller's. */
int vmdk_place_row(struct dr_image *image, struct vmdk_extent *e, uint64_t from,
                   struct dr_error *err);
/* Write e->gd, or e->rgd if copy, into the file. */
int vmdk_store_directory(struct dr_image *image, const struct vmdk_extent *e, bool copy,
                         struct dr_error *err);
/* Forget the pages of the extent's file: tables were written past them. */
void vmdk_forget_pages(struct dr_image *image, const struct vmdk_extent *e);
/* The rest of the disk's last grain becomes zeros, as far as the file has it. buf: its table. */
int vmdk_clear_last_grain(struct dr_image *image, const struct vmdk_extent *e, const uint8_t *buf,
                          struct dr_error *err);

/* ------------------------------------------------------------------ ids.c, backing.c, ... */

/* Open the extent's file and set e->file. */
int vmdk_open_name(struct dr_image *image, struct vmdk_extent *e, const char *name,
                   struct dr_error *err);
/* The name with slashes and without a drive letter, malloc'ed; NULL: no memory. */
char *vmdk_with_slashes(const char *name);
/* The one file in the image's directory that is called as the last part of name, but perhaps for
 * the case; its name, malloc'ed. NULL: there is none, or there are several. */
char *vmdk_find_beside(const struct dr_image *image, const char *name);
/* Sets backing_name and by_uuid of a child whose descriptor knows its parent's UUID alone. -ENOENT,
 * -EINVAL: no disk in the directory has it, or two have; the message says what mends that. */
int vmdk_find_by_uuid(struct dr_image *image, struct dr_error *err);
/* -ESTALE: the parent has another UUID than the one that image was made on. */
int vmdk_check_uuid(const struct dr_image *image, const struct dr_image *parent,
                    struct dr_error *err);

int vmdk_begin_write(struct dr_image *image, uint64_t off, bool changes, struct dr_error *err);
int vmdk_end_write(struct dr_image *image, struct dr_error *err);
uint32_t vmdk_id(const struct dr_image *image);
uint32_t vmdk_parent_id(const struct dr_image *image);
uint32_t vmdk_commit_id(const struct dr_image *parent, const struct dr_image *child);
int vmdk_set_id(struct dr_image *image, uint32_t id, struct dr_error *err);
int vmdk_set_parent_id(struct dr_image *image, uint32_t id, struct dr_error *err);
int vmdk_check_backing(const struct dr_image *image, const struct dr_image *parent,
                       struct dr_error *err);
/* Set or clear the unclean byte of one sparse extent; the caller flushes. */
int vmdk_mark(struct dr_image *image, struct vmdk_extent *e, bool unclean, bool changes,
              struct dr_error *err);

int vmdk_set_backing(struct dr_image *image, const struct dr_image *parent, const char *name,
                     const char *format, unsigned flags, struct dr_error *err);
int vmdk_backing_candidate(const struct dr_image *image, unsigned n, char **path,
                           struct dr_error *err);
/* -EINVAL: no child can record this parent. */
int vmdk_check_parent_id(const struct dr_image *parent, struct dr_error *err);
/* Is image a VMDK? For parents. */
bool vmdk_is(const struct dr_image *image);

int vmdk_create(struct dr_fs *fs, const char *path, const struct dr_create_params *params,
                struct dr_error *err);
/* A new extent of a split disk, complete and durable but for its name. -EEXIST. */
struct vmdk_new_extent {
    bool sparse, zero_grains;
    uint64_t sectors, grain;
};
int vmdk_make_extent(struct dr_fs *fs, const char *path, const struct vmdk_new_extent *how,
                     struct dr_error *err);
#define VMDK_SPLIT_SECTORS \
    UINT64_C(4192256) /* 2047 MiB: with its tables a piece stays below 2 GiB */
int vmdk_measure(const char *path, const struct dr_create_params *params, struct dr_cost *cost,
                 struct dr_error *err);
extern const struct dr_option_help vmdk_create_options[];

/* adopt.c: a file with data that is there, for a new descriptor at path. given: paths of such
 * files; of a split disk one is enough, its other pieces are found. Also after a failure *out is
 * the caller's, with n_out names to free. */
struct vmdk_adopted {
    char *name; /* beside the descriptor */
    uint64_t sectors;
    bool sparse;
};
int vmdk_adopt(struct dr_fs *fs, const char *path, const char *const *given, size_t n,
               unsigned flags, struct vmdk_adopted **out, size_t *n_out, struct dr_error *err);
/* The createType that fits them. */
const char *vmdk_adopted_type(const struct vmdk_adopted *a, size_t n);

/* What programs compute: 16 heads and 63 sectors for IDE, 255 and 63 for SCSI. */
struct vmdk_geometry {
    uint64_t cylinders;
    unsigned heads, sectors;
};
struct vmdk_geometry vmdk_geometry_of(const char *adapter, uint64_t sectors);
/* The adapter type as VMware spells it; NULL: there is no such type. */
const char *vmdk_adapter_name(const char *name);
/* Can it be the value of an entry of the data base? */
bool vmdk_value_is_writable(const char *value);

int vmdk_amend(struct dr_image *image, struct dr_amend *what, enum dr_amend_phase phase,
               struct dr_error *err);
extern const struct dr_option_help vmdk_amend_options[];
int vmdk_recover(struct dr_image *image, struct dr_error *err);
int vmdk_may_resize(struct dr_image *image, uint64_t size, struct dr_error *err);
int vmdk_resize(struct dr_image *image, uint64_t size, uint64_t parent_size, struct dr_error *err);
/* The sparse extent ends at the sector `end`, behind all that anything points to. */
int vmdk_cut(struct dr_image *image, struct vmdk_extent *e, uint64_t end, struct dr_error *err);
int vmdk_trim(struct dr_image *image, struct dr_error *err);

/* compact*.c: grains of sparse extents move down, and tables that keep the file from being cut.
 * image->lock held: a free sector for a grain that stands at gte now, nearer to the file's
 * beginning; 0: it stays where it is. give_up: it is free again. is_kept: a table is to stand where
 * the grain at the sector would. */
uint32_t vmdk_lower_take(struct vmdk_extent *e, uint32_t gte);
void vmdk_lower_give_up(struct vmdk_extent *e, uint32_t sector);
bool vmdk_is_kept(const struct vmdk_extent *e, uint32_t sector);
int vmdk_compact_begin(struct dr_image *image, struct dr_error *err);
int vmdk_compact_look(struct dr_image *image, struct dr_error *err);
/* image->lock held: the grain at the sector has lost its entry. */
void vmdk_compact_lost(struct vmdk_extent *e, uint32_t sector);
bool vmdk_compact_moves(const struct dr_image *image, const struct dr_extent *ext);
void vmdk_compact_spare(struct dr_image *image, const struct dr_extent *ext);
uint64_t vmdk_compact_length(const struct dr_image *image);
int vmdk_compact_finish(struct dr_image *image, bool *again, struct dr_error *err);
void vmdk_compact_end(struct dr_image *image);
int vmdk_info(struct dr_image *image, json_t *data, uint64_t *cluster_size, struct dr_error *err);
/* Report a finding of check: the path, and the text. */
void vmdk_say(struct dr_check_result *result, const char *path, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int vmdk_check(struct dr_image *image, unsigned fix, struct dr_check_result *result,
               struct dr_error *err);

/* Can all entries of the table be, if this is its content? */
bool vmdk_table_is_sound(const struct dr_image *image, const struct vmdk_extent *e, uint64_t table,
                         const uint8_t *buf);
/* Table-wise reading outside the page cache (recover, check, trim). The table of gde as gtes
 * little-endian entries; *hole: nothing is stored there, buf is zeroed. */
int vmdk_read_table(struct dr_image *image, const struct vmdk_extent *e, uint32_t gde, uint8_t *buf,
                    bool *hole, struct dr_error *err);

#endif
